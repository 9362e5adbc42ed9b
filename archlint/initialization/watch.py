"""Watch what a constructor does to storages, at torch's dispatcher, without allocating weights.

Random and uninitialised tensors beyond a limit live on meta; what follows from literals (tables,
indices, drop rates) and what is small is computed for real. Every storage has a
:class:`~archlint.initialization.contents.Storage` that says which law its elements have; each
operator of the dispatcher moves contents from its arguments to its results. An operator that is
not understood gives contents of unknown law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from archlint.graph.torch_recorder.results import Results, mapped, tensors_of
from archlint.initialization import calls
from archlint.initialization.contents import (
    LABELS,
    Content,
    Event,
    Geometry,
    Piece,
    Storage,
    one,
)
from archlint.initialization.laws import (
    Draw,
    Grid,
    Law,
    combine,
    constant,
    normal,
    of_moments,
    orthogonal,
    uniform,
    uninitialised,
    unknown,
)

# Elements up to which a tensor is real: random ones, filled ones, ones that follow from literals.
SMALL, FILLED, COMPUTED = 1 << 10, 1 << 22, 1 << 24


class NeedsElements(RuntimeError):
    """A constructor read a number out of a tensor that has none."""


@dataclass(frozen=True)
class Operator:
    """What the schema of an operator says. ``written`` are positions or names of arguments."""

    name: str
    overload: str
    view: bool
    written: tuple[int | str, ...]
    pointwise: bool
    seeded: bool


@lru_cache(maxsize=4096)
def operator(func: Any) -> Operator:
    """The schema of an operator, read once."""
    schema = func._schema
    written: list[int | str] = []
    for i, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(argument.name if argument.kwarg_only else i)
    view = not written and any(r.alias_info is not None for r in schema.returns)
    return Operator(
        schema.name.partition("::")[2], schema.overload_name, view, tuple(written),
        torch.Tag.pointwise in func.tags, torch.Tag.nondeterministic_seeded in func.tags,
    )  # fmt: skip


Handler = Callable[["Watcher", "Call"], Any]
_HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Register what is done for operators of the dispatcher."""

    def register(function: Handler) -> Handler:
        for name in names:
            _HANDLERS[name] = function
        return function

    return register


@dataclass
class Call:
    """One call of the dispatcher."""

    func: Any
    op: Operator
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or name."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    @cached_property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return tensors_of(self.args, self.kwargs)

    @property
    def target(self) -> Tensor:
        """The tensor that is written into, or the first argument."""
        for where in self.op.written:
            found = self.kwargs.get(where) if isinstance(where, str) else self.args[where]
            if isinstance(found, Tensor):
                return found
        found = self.args[0]
        assert isinstance(found, Tensor)
        return found


class Watcher:
    """Knows what every storage holds. ``limit``: elements up to which random tensors are real."""

    def __init__(self, limit: int = SMALL, stop: FrameType | None = None) -> None:
        self.limit = limit
        self.filled, self.computed = max(FILLED, limit), max(COMPUTED, limit)
        self.stop = stop
        self.paused = False
        self.unallocated = 0  # elements that were left on meta
        self._storages: dict[int, tuple[StorageWeakRef, Storage]] = {}
        self._results = Results(modes=0)
        self._laws: dict[Any, tuple[Law, Sequence[Law]]] = {}

    # ------------------------------------------------------------------ storages

    def storage(self, tensor: Tensor) -> Storage | None:
        """What is known of a tensor's storage."""
        if tensor.layout is not torch.strided:
            return None
        found = self._storages.get(tensor.untyped_storage()._cdata)
        return found[1] if found is not None else None

    def put(self, tensor: Tensor, storage: Storage) -> None:
        """Say what a tensor's storage holds."""
        raw = tensor.untyped_storage()
        # the weak reference keeps the address from being used again
        self._storages[raw._cdata] = (StorageWeakRef(raw), storage)  # type: ignore[no-untyped-call]

    def known(self, tensor: Tensor) -> Storage:
        """The same; for a tensor from elsewhere, what its elements say."""
        if tensor.layout is torch.strided:
            raw = tensor.untyped_storage()
            held = self._storages.get(raw._cdata)
            found, size = held[1] if held is not None else None, tensor.element_size()
            numel = raw.nbytes() // size if size else tensor.numel()
        else:
            found, numel = None, tensor.numel()
        if found is None or found.numel != numel:  # or one whose elements have another size
            here = self.is_real(tensor)
            law = None if here else unknown("a tensor from elsewhere")
            found = Storage(numel, Piece(law, Event()), real=here)
            if tensor.layout is torch.strided:
                self.put(tensor, found)
        return found

    def is_real(self, tensor: Tensor) -> bool:
        """Whether a tensor's elements follow from literals and are there."""
        if tensor.is_meta:
            return False
        found = self.storage(tensor)
        return found is None or (found.real and not found.stale)

    def has_elements(self, tensor: Tensor) -> bool:
        """Whether a tensor's elements are there, drawn or not."""
        if tensor.is_meta:
            return False
        found = self.storage(tensor)
        return found is None or not found.stale

    def content(self, tensor: Tensor) -> Content:
        """What a tensor holds, laws only."""
        if tensor.layout is not torch.strided or tensor.is_complex():
            return one(Piece(unknown("a sparse or complex tensor"), Event()))
        known = self.known(tensor)
        if known.labels is None and tensor.numel() == known.numel and tensor.is_contiguous():
            read = one(known.pieces[0])
        else:
            read = known.read(geometry(tensor))
        if all(piece.law is not None for piece in read.pieces):
            return read
        if not self.has_elements(tensor):
            return read.mapped(lambda p: p if p.law else replace(p, law=unknown("no elements")))
        flat = tensor.detach().reshape(-1)
        places = None if read.labels is None else np.repeat(read.labels, read.run)
        found = []
        for i, piece in enumerate(read.pieces):
            if piece.law is None:
                mine = flat if places is None else flat[torch.from_numpy(places == i)]
                piece = replace(piece, law=law_of_elements(mine))
            found.append(piece)
        return replace(read, pieces=tuple(found))

    def write(self, tensor: Tensor, content: Content, derived: bool = False) -> None:
        """Put a content where a tensor is."""
        storage = self.known(tensor)
        if storage.numel and tensor.numel() == storage.numel and tensor.is_contiguous():
            storage.write_whole(content, derived)
        else:
            storage.write(geometry(tensor), content, derived)
        self._settle(tensor, storage)

    def _settle(self, tensor: Tensor, storage: Storage) -> None:
        """Whether a real storage is free of draws."""
        if not tensor.is_meta and not storage.stale:
            storage.real = all(p.law is None or _is_fixed(p.law) for p in storage.pieces)

    def compatible(self, tensor: Tensor, value: Any) -> Any:
        """A tensor that can take the place of another one's data."""
        if not isinstance(value, Tensor) or tensor.device == value.device:
            return value
        with pause(self):
            content = self.content(value.detach())
            made = torch.empty(value.shape, dtype=value.dtype, device=tensor.device)
        storage = Storage(made.numel(), content.pieces[0])
        storage.write(geometry(made), content)
        storage.stale = made.device.type != "meta"
        if self.is_real(value):
            storage.elements = value.detach().clone()
        self.put(made, storage)
        return made

    def event(self, text: str = "", initialiser: bool = False, named: bool = True) -> Event:
        """The call that runs now."""
        return calls.event(self.stop, text, initialiser, named)

    def combined(
        self, known: Hashable, function: Callable[..., Grid], name: str, laws: Sequence[Law]
    ) -> Law:
        """:func:`combine`, worked out once for laws that differ in their draw alone. ``known``
        tells the function."""
        drawn = [law for law in laws if law.draw is not None]
        if len(drawn) > 1 or not all(law.known for law in laws):
            return combine(function, name, laws)
        draw = drawn[0].draw if drawn else None
        key = (known, *[law.apart_from_draw for law in laws])
        found = self._laws.get(key)
        if found is None:
            law = combine(function, name, laws)
            if law.draw is None or law.draw is draw:
                self._laws[key] = law, laws  # the arrays of these laws are known by identity
            return law
        law = found[0]
        return law if law.draw is None or law.draw is draw else replace(law, draw=draw)

    # ------------------------------------------------------------------ execution

    def execute(self, call: Call) -> Any:
        """Run a call: for real where all elements are there, else on meta."""
        tensors, kwargs = call.tensors, call.kwargs
        if kwargs:
            kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        if all(map(self.has_elements, tensors)) and self._fits(call, tensors, kwargs):
            return call.func(*call.args, **kwargs)
        if call.op.name in _READS:
            raise NeedsElements(f"{call.op.name} of a tensor without elements")
        if "generator" in kwargs:
            kwargs["generator"] = None
        written = [t for t in tensors if any(t is w for w in self._written(call))]
        if any(t.device.type != "meta" for t in written):
            for t in written:
                self.known(t).stale = True
                self.known(t).real = False
            return written[0]
        args = call.args
        if any(t.device.type != "meta" for t in tensors):
            args, kwargs = pytree.tree_map_only(Tensor, _on_meta, (args, kwargs))
        return self._results.of(call.func, args, kwargs)

    @staticmethod
    def _written(call: Call) -> list[Any]:
        return [call.kwargs.get(w) if isinstance(w, str) else call.args[w] for w in call.op.written]

    def _fits(self, call: Call, tensors: Sequence[Tensor], kwargs: Mapping[str, Any]) -> bool:
        """Whether the results are small enough to be computed."""
        if call.op.written or not tensors or max(t.numel() for t in tensors) < 1 << 18:
            return True
        if call.op.name in _READS:
            return True
        args, kwargs = pytree.tree_map_only(Tensor, _on_meta, (call.args, kwargs))
        try:
            result = call.func(*args, **kwargs)
        except (RuntimeError, NotImplementedError):
            return True
        found = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor)]
        return all(t.numel() <= self.computed for t in found)

    def dispatched(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the dispatcher."""
        if self.paused:
            return self._results.of(func, args, kwargs)
        op = operator(func)
        return self.handled(Call(func, op, args, kwargs))

    def handled(self, call: Call) -> Any:
        """Run a call and note what it does."""
        func, op, args, kwargs = call.func, call.op, call.args, call.kwargs
        if op.name in _FACTORIES:
            return _made(self, call)
        if op.name == "set_":  # the storage is exchanged, and with it what is known
            with torch._C.DisableTorchFunction():  # which set_ passes by: devices are as they are
                if len(args) > 1:
                    args = (args[0], self.compatible(args[0], args[1]), *args[2:])
                return func(*args, **kwargs)
        if op.view:
            result = func(*args, **kwargs)
            if op.name == "lift_fresh" and self.storage(result) is None:
                self.file(result, lambda: Piece(None, self.event("tensor")))
            return result
        if not op.seeded and all(map(self.is_real, call.tensors)):
            return self._computed(call)
        handler = _HANDLERS.get(op.name)
        if handler is None and op.pointwise:
            handler = _elementwise
        return (handler or _opaque)(self, call)

    def _computed(self, call: Call) -> Any:
        """What follows from literals."""
        result = self.execute(call)
        if not call.op.written:
            self.file(result, lambda: Piece(None, self._event_of(call)))
            return result
        for target in self._written(call):
            if isinstance(target, Tensor) and target.layout is torch.strided:
                storage = self.known(target)
                only = storage.pieces[0] if storage.labels is None else None
                if only is not None and only.law is None and not _whole(self, target):
                    continue  # a table that is written in parts: its elements say all
                self.write(target, one(Piece(None, self.event(*_filling(call)))))
        return result

    def _event_of(self, call: Call) -> Event:
        """Where something computed from literals comes from; a copy is from where its source is."""
        source = self.storage(call.args[0]) if call.op.name in _COPIES else None
        if source is not None and source.labels is None:
            return source.pieces[0].event
        return self.event(call.op.name)

    def file(self, result: Any, piece: Callable[[], Piece]) -> None:
        """Say what new tensors hold."""
        made: Piece | None = None
        for tensor in tensors_of((result,), None):
            if tensor.layout is torch.strided:
                made = made or piece()
                here = tensor.device.type != "meta"
                if made.law is None and not here:
                    made = replace(made, law=unknown("a table too large to compute"))
                self.put(tensor, Storage(_numel(tensor), made, real=here and made.law is None))


_COPIES = frozenset(("clone", "_to_copy", "lift_fresh_copy"))


def _filling(call: Call) -> tuple[str, bool]:
    """What a user would write for filling with a number."""
    if call.op.name == "zero_":
        return "zeros_()", True
    value = call.argument(1, "value")
    if call.op.name == "fill_" and isinstance(value, int | float):
        return f"fill_({calls.literal(value)})", True
    return call.op.name, True


def _numel(tensor: Tensor) -> int:
    size = tensor.element_size()
    return tensor.untyped_storage().nbytes() // size if size else tensor.numel()


def _is_fixed(law: Law) -> bool:
    return law.draw is None and law.known


def geometry(tensor: Tensor) -> Geometry:
    """Where a tensor's elements lie."""
    return Geometry(int(tensor.storage_offset()), tuple(tensor.shape), tuple(tensor.stride()))


def _on_meta(tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta":
        return tensor
    if tensor.layout is not torch.strided:
        return tensor.to("meta")
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def law_of_elements(elements: Tensor) -> Law:
    """The law of elements that follow from literals: a number, or a table's moments."""
    if elements.numel() == 0 or elements.is_complex():
        return unknown("no real elements")
    array = elements.detach().to(torch.float64).numpy().reshape(-1)
    if bool((array == array[0]).all()):
        return constant(float(array[0]))
    if not np.isfinite(array).all():
        return unknown("elements that are not finite")
    square = array * array
    raw = (float(array.mean()), float(square.mean()), float((square * array).mean()),
           float((square * square).mean()))  # fmt: skip
    return of_moments("deterministic", raw, raw[0] == raw[2] == 0.0, None)


# --------------------------------------------------------------------------- creation

_EMPTY = frozenset(("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"))
_FILLED = frozenset(
    ("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
     "new_full")
)  # fmt: skip
_SIZED = frozenset(("empty", "zeros", "ones"))  # of a size; a type that is not given is the default
_DRAWN = frozenset(("rand", "randn", "rand_like", "randn_like", "normal"))
_WHOLE = frozenset(("randint", "randint_like"))
_TABLES = frozenset(
    ("arange", "linspace", "logspace", "range", "eye", "scalar_tensor", "tril_indices",
     "triu_indices", "randperm", "hann_window", "hamming_window", "blackman_window",
     "bartlett_window", "kaiser_window", "fft_fftfreq", "fft_rfftfreq")
)  # fmt: skip
_FACTORIES = _EMPTY | _FILLED | _DRAWN | _WHOLE | _TABLES
_READS = frozenset(("_local_scalar_dense", "is_nonzero", "equal", "item", "nonzero"))


def _made(watcher: Watcher, call: Call) -> Any:
    """A new tensor: on meta where it is large and not a table."""
    name = call.op.name
    if name == "normal" and any(isinstance(a, Tensor) for a in call.args):
        return _opaque(watcher, call)
    if call.op.written:  # an out= variant
        return _made_in_place(watcher, call)
    kwargs = {**call.kwargs, "device": "meta"}
    kwargs.pop("pin_memory", None)
    if "generator" in kwargs:  # one of the CPU does not fit; some overloads ask for the argument
        kwargs["generator"] = None
    shape_only: Any = None
    if isinstance(kwargs.get("dtype"), type):  # bool, int, float, complex
        kwargs["dtype"] = torch.empty(0, dtype=kwargs["dtype"]).dtype
    if name in _SIZED:
        numel = math.prod(call.args[0])
        dtype = kwargs.get("dtype") or torch.get_default_dtype()
    elif name == "arange" and len(call.args) < 3 and all(type(n) is int for n in call.args):
        start, end = (0, *call.args)[-2:]  # torch takes its time to tell the size on meta
        numel, dtype = end - start, kwargs.get("dtype") or torch.int64
    else:
        shape_only = call.func(*call.args, **kwargs)
        numel, dtype = shape_only.numel(), shape_only.dtype
    if name in _TABLES:
        room = watcher.computed
    else:
        whole = not (dtype.is_floating_point or dtype.is_complex)
        room = watcher.filled if name in _FILLED or whole else watcher.limit
    if numel <= room:
        if "generator" in kwargs:
            kwargs["generator"] = call.kwargs["generator"]
        result = call.func(*call.args, **{**kwargs, "device": "cpu"})
    else:
        result = call.func(*call.args, **kwargs) if shape_only is None else shape_only
        watcher.unallocated += numel
    real = numel <= room and (name in _FILLED or name in _TABLES)
    piece = Piece(None if real else _law_made(call, numel), watcher.event(name))
    watcher.put(result, Storage(_numel(result), piece, real=real))
    return result


def _law_made(call: Call, numel: int) -> Law | None:
    name = call.op.name
    if name in _EMPTY:
        return uninitialised()
    if name in ("zeros", "zeros_like", "new_zeros"):
        return constant(0.0)
    if name in ("ones", "ones_like", "new_ones"):
        return constant(1.0)
    if name in _FILLED:
        value = call.argument(2 if name == "new_full" else 1, "fill_value")
        return constant(float(value)) if isinstance(value, int | float) else unknown(name)
    if name in ("rand", "rand_like"):
        return uniform(0.0, 1.0)
    if name in ("randn", "randn_like"):
        return normal(0.0, 1.0)
    if name == "normal":
        return normal(float(call.args[0]), float(call.args[1]))
    return unknown(name, Draw())


def _made_in_place(watcher: Watcher, call: Call) -> Any:
    target = call.target
    event = watcher.event(call.op.name, True)
    if call.op.name == "eye" and not watcher.has_elements(target):
        shape = tuple(target.shape)
        law = _diagonal(min(shape), math.prod(shape), "eye")
        watcher.write(target, one(Piece(law, event)))
        return target
    result = watcher.execute(call)
    fixed = call.op.name in _FILLED or call.op.name in _TABLES
    made = None if fixed and watcher.has_elements(target) else _law_made(call, target.numel())
    watcher.write(target, one(Piece(made, event)))
    return result


def _diagonal(ones: int, numel: int, family: Any) -> Law:
    """Ones in ``ones`` of ``numel`` places, which the shape says."""
    share = ones / numel
    return of_moments(family, (share, share, share, share), False, None)


# --------------------------------------------------------------------------- filling


def _fill(watcher: Watcher, call: Call, law: Law, text: str) -> Any:
    """Fill a tensor in place."""
    target = call.target
    storage = watcher.known(target)
    event = watcher.event(text, True)
    if target.is_meta:
        result: Any = target
    elif target.numel() <= max(watcher.limit, SMALL) or law.is_constant:
        # what is not drawn for real has no elements worth looking at
        result = call.func(*call.args, **call.kwargs)
        if target.numel() == storage.numel:
            storage.stale = False
    else:
        storage.stale = True
        storage.real = False
        result = target
    watcher.write(target, one(Piece(law, event)))
    return result


@handles("normal_")
def _normal(watcher: Watcher, call: Call) -> Any:
    mean, std = float(call.argument(1, "mean", 0.0)), float(call.argument(2, "std", 1.0))
    text = f"normal_({calls.literal(mean)}, {calls.literal(std)})"
    return _fill(watcher, call, normal(mean, std), text)


@handles("uniform_")
def _uniform(watcher: Watcher, call: Call) -> Any:
    low, high = float(call.argument(1, "from", 0.0)), float(call.argument(2, "to", 1.0))
    text = f"uniform_({calls.literal(low)}, {calls.literal(high)})"
    return _fill(watcher, call, uniform(low, high), text)


@handles("exponential_")
def _exponential(watcher: Watcher, call: Call) -> Any:
    rate = float(call.argument(1, "lambd", 1.0))
    law = uniform(0.0, 1.0).map(lambda u: -np.log1p(-u) / rate, "exponential")
    return _fill(watcher, call, law, f"exponential_({calls.literal(rate)})")


@handles("log_normal_")
def _log_normal(watcher: Watcher, call: Call) -> Any:
    mean, std = float(call.argument(1, "mean", 1.0)), float(call.argument(2, "std", 2.0))
    raw = tuple(math.exp(k * mean + (k * std) ** 2 / 2) for k in (1, 2, 3, 4))
    law = of_moments("mixture", raw, False, Draw())  # type: ignore[arg-type]
    return _fill(watcher, call, law, f"log_normal_({calls.literal(mean)}, {calls.literal(std)})")


@handles("bernoulli_")
def _bernoulli_in_place(watcher: Watcher, call: Call) -> Any:
    p = call.argument(1, "p", 0.5)
    law = _coin(p) if isinstance(p, float) else unknown("bernoulli", Draw())
    return _fill(watcher, call, law, "bernoulli_()")


def _coin(p: float) -> Law:
    return of_moments("two_point", (p, p, p, p), p == 0.0, Draw())


@handles("random_", "geometric_", "cauchy_")
def _drawn_otherwise(watcher: Watcher, call: Call) -> Any:
    return _fill(watcher, call, unknown(call.op.name, Draw()), call.op.name)


@handles("zero_", "fill_")
def _filled(watcher: Watcher, call: Call) -> Any:
    value: Any = 0.0 if call.op.name == "zero_" else call.argument(1, "value", 0.0)
    text, _ = _filling(call)
    if isinstance(value, Tensor):
        held = watcher.content(value).single
        law = held.law if held is not None and held.law is not None else unknown("fill_")
        if law.draw is not None:
            law = law.part("filled")
        result = watcher.execute(call)
        watcher.write(call.target, one(Piece(law, watcher.event(text, True))))
        return result
    return _fill(watcher, call, constant(float(value)), text)


# --------------------------------------------------------------------------- copies


@handles("copy_")
def _copied(watcher: Watcher, call: Call) -> Any:
    target, source = call.target, call.argument(1, "src")
    assert isinstance(source, Tensor)
    event = watcher.event("copy_", True, named=False)
    if source.numel() == 1 and watcher.is_real(source):
        value = source.detach().to(torch.float64).item()
        return _fill_by_copy(watcher, call, constant(value), f"fill_({calls.literal(value)})")
    shown = source if source.shape == target.shape else source.expand(target.shape)
    content = watcher.content(shown)
    result = watcher.execute(call)
    content = content.mapped(
        lambda p: replace(p, event=replace(event, text=p.event.text or event.text))
    )
    watcher.write(target, content)
    if target.device.type == "meta" and watcher.is_real(source) and _whole(watcher, target):
        watcher.known(target).elements = shown.detach().to(target.dtype).clone()
    return result


def _fill_by_copy(watcher: Watcher, call: Call, law: Law, text: str) -> Any:
    result = watcher.execute(call)
    watcher.write(call.target, one(Piece(law, watcher.event(text, True))))
    return result


@handles("clone", "_to_copy", "contiguous", "_unsafe_view")
def _cloned(watcher: Watcher, call: Call) -> Any:
    source = call.args[0]
    content = watcher.content(source)
    result = watcher.execute(call)
    if call.op.name == "clone" and (site := calls.copying_site(watcher.stop)) is not None:
        content = content.mapped(lambda p: replace(p, event=replace(p.event, site=site)))
    watcher.file(result, lambda: Piece(unknown("clone"), Event()))
    watcher.write(result, content)
    return result


@handles("cat", "concat", "concatenate", "stack")
def _joined(watcher: Watcher, call: Call) -> Any:
    parts = [t for t in call.args[0] if isinstance(t, Tensor)]
    dim = int(call.argument(1, "dim", 0))
    result: Tensor = watcher.execute(call)
    event = watcher.event(call.op.name)
    watcher.file(result, lambda: Piece(unknown(call.op.name), event))
    dim %= max(result.dim(), 1)
    place = 0
    for part in parts:
        if part.numel() == 0:
            continue
        size = 1 if call.op.name == "stack" else part.shape[dim]
        content = watcher.content(part).mapped(
            lambda p: replace(p, event=replace(event, text=p.event.text or event.text))
        )
        watcher.write(result.narrow(dim, place, size), content)
        place += size
    return result


def blend(content: Content) -> Law:
    """The law of an element taken at random from a content."""
    laws = [(share, piece.law or unknown("no law")) for share, piece in content.shares()]
    if len(laws) == 1:
        return laws[0][1]
    bad = next((law for _, law in laws if not law.known), None)
    draws = [law.draw for _, law in laws if law.draw is not None]
    joint = Draw(frozenset(root for draw in draws for root in draw.roots)) if draws else None
    if bad is not None:
        return unknown(bad.why or bad.family, joint)
    raw = [0.0] * 4
    for share, law in laws:
        for i, value in enumerate(law.moments()):
            raw[i] += share * value
    even = all(law.symmetric for _, law in laws)
    exact = all(law.exact for _, law in laws)
    return of_moments("mixture", (raw[0], raw[1], raw[2], raw[3]), even, joint, exact)


@handles("repeat", "roll", "flip", "rot90", "permute_copy", "expand_copy", "repeat_interleave",
         "tile", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle")  # fmt: skip
def _rearranged(watcher: Watcher, call: Call) -> Any:
    law = blend(watcher.content(call.args[0])).part((call.op.name, repr(call.args[1:])))
    result = watcher.execute(call)
    watcher.file(result, lambda: Piece(law, watcher.event(call.op.name)))
    return result


@handles("index", "index_select", "gather", "embedding", "take", "take_along_dim")
def _gathered(watcher: Watcher, call: Call) -> Any:
    held = watcher.content(call.args[0]).single
    law = held.law if held is not None and held.law is not None else unknown(call.op.name)
    chosen = [t for t in tensors_of(call.args[1:], call.kwargs) if not watcher.is_real(t)]
    roots = _roots(watcher, chosen)
    if law.random and not roots.isdisjoint(law.draw.roots if law.draw is not None else ()):
        law = unknown(f"{call.op.name} by what was drawn")  # such as draws within bounds
    law = law.part(object())
    result = watcher.execute(call)
    watcher.file(result, lambda: Piece(law, watcher.event(call.op.name)))
    return result


# --------------------------------------------------------------------------- partial writes


def _whole(watcher: Watcher, tensor: Tensor) -> bool:
    if tensor.numel() != watcher.known(tensor).numel:
        return False
    return tensor.is_contiguous() or geometry(tensor).in_order


def _mark(
    watcher: Watcher, call: Call, places: np.ndarray[Any, Any] | None, run: int, law: Law
) -> Any:
    """Write a law into some runs of a tensor."""
    target = call.target
    storage = watcher.known(target)
    event = watcher.event(call.op.name, True)
    result = watcher.execute(call)
    piece = Piece(law, event)
    if places is None or not _whole(watcher, target) or not storage.label(places, run, piece):
        watcher.write(target, one(Piece(unknown(call.op.name), event)))
    else:
        watcher._settle(target, storage)
    return result


def _value_law(watcher: Watcher, value: Any) -> Law:
    if isinstance(value, int | float):
        return constant(float(value))
    if not isinstance(value, Tensor):
        return unknown("value")
    return blend(watcher.content(value)).part("placed")


@handles("masked_fill_")
def _masked_in_place(watcher: Watcher, call: Call) -> Any:
    mask, value = call.args[1], call.args[2]
    places = None
    if watcher.is_real(mask) and call.target.numel() <= LABELS:
        places = np.flatnonzero(mask.expand(call.target.shape).contiguous().numpy())
    return _mark(watcher, call, places, 1, _value_law(watcher, value))


@handles("index_put_", "_index_put_impl_")
def _indexed_in_place(watcher: Watcher, call: Call) -> Any:
    target, indices, value = call.target, call.args[1], call.args[2]
    accumulate = bool(call.argument(3, "accumulate", False))
    law = unknown("index_put_") if accumulate else _value_law(watcher, value)
    places = None
    run = 1
    if all(i is None or watcher.is_real(i) for i in indices) and indices:
        lead = len(indices)
        if indices[0] is not None and indices[0].dtype in (torch.bool, torch.uint8):
            lead += indices[0].dim() - 1
        run = math.prod(target.shape[lead:])
        if target.numel() // max(run, 1) <= LABELS:
            numbers = np.arange(math.prod(target.shape[:lead])).reshape(target.shape[:lead])
            key = tuple(slice(None) if i is None else i.numpy() for i in indices)
            places = numbers[key].reshape(-1)
    return _mark(watcher, call, places, max(run, 1), law)


@handles("index_fill_", "index_copy_")
def _rows_in_place(watcher: Watcher, call: Call) -> Any:
    target, dim, index, value = call.target, call.args[1], call.args[2], call.args[3]
    places = None
    run = math.prod(target.shape[1:])
    if dim == 0 and watcher.is_real(index):
        places = index.numpy().reshape(-1)
    return _mark(watcher, call, places, max(run, 1), _value_law(watcher, value))


@handles("fill_diagonal_")
def _diagonal_in_place(watcher: Watcher, call: Call) -> Any:
    target = call.target
    places = None
    if target.dim() == 2 and target.numel() <= LABELS:
        places = np.arange(min(target.shape)) * (target.shape[1] + 1)
    return _mark(watcher, call, places, 1, constant(float(call.args[1])))


@handles("tril", "triu")
def _triangle(watcher: Watcher, call: Call) -> Any:
    source = call.args[0]
    held = watcher.content(source).single
    result: Tensor = watcher.execute(call)
    event = watcher.event(call.op.name)
    watcher.file(result, lambda: Piece(unknown(call.op.name), event))
    if held is not None and held.law is not None and source.numel() <= LABELS and source.dim() == 2:
        keep = np.ones(source.shape, bool)
        k = int(call.argument(1, "diagonal", 0))
        keep = np.tril(keep, k) if call.op.name == "tril" else np.triu(keep, k)
        pieces = (Piece(constant(0.0), event), Piece(held.law.part(call.op.name), event))
        watcher.write(result, Content(pieces, keep.reshape(-1).astype(np.int32), 1))
    return result


# --------------------------------------------------------------------------- arithmetic


def _elementwise(watcher: Watcher, call: Call) -> Any:
    """An elementwise operator, replayed on the values of the draws."""
    op = call.op
    operands: list[Tensor] = []

    def collect(value: Tensor) -> Any:
        if value is call.kwargs.get("out"):
            return value
        operands.append(value)
        return _Place(len(operands) - 1)

    kwargs = {k: v for k, v in call.kwargs.items() if k not in ("out", "device", "generator")}
    template, keywords = mapped(call.args, kwargs, collect)
    known = (call.func, _frozen(template), _frozen(keywords))
    contents = [watcher.content(t) for t in operands]
    shape = operands[0].shape
    if len(operands) > 1:
        shape = torch.broadcast_shapes(*(t.shape for t in operands))  # type: ignore[no-untyped-call]
    same_shape = all(t.shape == shape for t in operands)
    in_place = bool(op.written)
    if in_place and _keeps_shape(call, operands):
        result: Any = call.target
    else:
        result = watcher.execute(call)
    event = watcher.event(op.name, in_place)

    def function(*grids: Grid) -> Grid:
        return _replayed(call.func, op, template, keywords)(*grids)

    def combined(laws: Sequence[Law]) -> Law:
        return watcher.combined(known, function, op.name, laws)

    content = _combined(combined, op.name, contents, operands, shape, same_shape)
    text = next((p.event.text for c in contents for p in c.pieces if p.law and p.law.random), "")

    # an initializer that computes in several steps keeps its name
    shown = event if event.text != op.name or not text else replace(event, text=text)

    def label(piece: Piece) -> Piece:
        return Piece(piece.law, shown)

    if in_place:
        watcher.write(call.target, content.mapped(label), derived=True)
        return result
    for tensor in pytree.tree_leaves(result):
        if isinstance(tensor, Tensor):
            watcher.file(tensor, lambda: Piece(unknown(op.name), event))
            watcher.write(tensor, content.mapped(label))
    return result


def _keeps_shape(call: Call, operands: Sequence[Tensor]) -> bool:
    """Whether there is nothing to compute: a tensor on meta and numbers, in place."""
    numbers = [v for v in (*call.args[1:], *call.kwargs.values()) if isinstance(v, int | float)]
    return (
        len(operands) == 1
        and call.target.device.type == "meta"
        and call.target.is_floating_point()
        and len(numbers) == len(call.args) - 1 + len(call.kwargs)
        and (bool(numbers) or not call.func._schema.arguments[1:])
    )


@dataclass(frozen=True)
class _Place:
    index: int


def _frozen(tree: Any) -> Any:
    """Arguments as a key. Numbers of different types compute differently."""
    if isinstance(tree, tuple | list):
        return (type(tree), *[_frozen(part) for part in tree])
    if isinstance(tree, dict):
        return tuple((key, _frozen(part)) for key, part in tree.items())
    return (type(tree), tree)


def _replayed(func: Any, op: Operator, template: Any, keywords: Any) -> Callable[..., Grid]:
    """The operator as a function of arrays."""
    name = op.name[:-1] if op.written and op.name.endswith("_") else op.name
    packet = getattr(torch.ops.aten, name, None)
    target = getattr(packet, op.overload.replace("_out", "").replace("out", "") or "default", None)
    if target is None:
        target = packet

    def function(*grids: Grid) -> Grid:
        if target is None:
            return np.full(1, np.nan)
        given = [torch.from_numpy(np.ascontiguousarray(g)) for g in grids]

        def fill(value: Any) -> Any:
            return given[value.index] if isinstance(value, _Place) else value

        is_place = lambda v: isinstance(v, _Place)  # noqa: E731
        args, kwargs = pytree.tree_map(fill, (template, keywords), is_leaf=is_place)
        try:
            found = target(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError):
            return np.full(max(g.size for g in grids), np.nan)
        if not isinstance(found, Tensor):
            return np.full(max(g.size for g in grids), np.nan)
        array = found.to(torch.float64).numpy()
        return np.broadcast_to(array, (max(g.size for g in grids),)).copy()

    return function


def _combined(
    function: Callable[[Sequence[Law]], Law],
    name: str,
    contents: Sequence[Content],
    operands: Sequence[Tensor],
    shape: torch.Size,
    same_shape: bool,
) -> Content:
    """The content that an elementwise function gives."""
    laws = [c.single.law if c.single is not None else None for c in contents]
    several = [i for i, c in enumerate(contents) if c.single is None]
    draws = [d.roots for law in laws if law is not None and (d := law.draw) is not None]
    shared = len(frozenset().union(*draws)) < sum(len(d) for d in draws)
    if shared and not same_shape:
        return one(Piece(unknown(f"{name} of a tensor with itself"), Event()))
    if not several:
        law = function([law or unknown(name) for law in laws])
        repeated = any(
            law is not None and law.random and tensor.shape != shape
            for law, tensor in zip(laws, operands, strict=True)
        )
        if repeated:  # one number serves several elements
            law = law.part(("expanded", tuple(shape)))
        return one(Piece(law, Event()))
    i = several[0]
    others = [law for law in laws if law is not None]
    fixed = all(law.is_constant or law.random for law in others)
    if len(several) > 1 or operands[i].shape != shape or not fixed:
        return one(Piece(unknown(f"{name} of several parts"), Event()))

    def part(piece: Piece) -> Piece:
        given = [law if law is not None else (piece.law or unknown(name)) for law in laws]
        return replace(piece, law=function(given))

    return contents[i].mapped(part)


@handles("linalg_vector_norm", "norm", "linalg_norm")
def _normed(watcher: Watcher, call: Call) -> Any:
    """The Euclidean norm of n independent elements: E R² = n·E w², Var R² = n·Var w², the mean as
    of a gamma law with these (exact for normal elements)."""
    held = watcher.content(call.args[0]).single
    order = call.argument(1, "ord" if "linalg" in call.op.name else "p", 2)
    result = watcher.execute(call)
    law = unknown(call.op.name, Draw())
    count = call.args[0].numel() // max(result.numel(), 1) if isinstance(result, Tensor) else 0
    if held is not None and held.law is not None and held.law.known and order in (2, 2.0, None):
        _, second, _, fourth = held.law.moments()
        mean, variance = count * second, count * max(fourth - second**2, 0.0)
        if variance > 0 and held.law.draw is not None:
            k = mean * mean / variance
            scale = math.sqrt(variance / mean)
            powers = [scale * math.exp(math.lgamma(k + 0.5) - math.lgamma(k)), mean,
                      scale**3 * math.exp(math.lgamma(k + 1.5) - math.lgamma(k)),
                      mean**2 + variance]  # fmt: skip
            law = of_moments("mixture", (powers[0], powers[1], powers[2], powers[3]), False,
                             held.law.draw.part(("norm", count)))  # fmt: skip
        elif held.law.is_constant:
            law = constant(math.sqrt(mean))
    watcher.file(result, lambda: Piece(law, watcher.event(call.op.name)))
    return result


@handles("bernoulli")
def _bernoulli(watcher: Watcher, call: Call) -> Any:
    p: Any = call.argument(1, "p")
    held = watcher.content(call.args[0]).single
    if p is None and held is not None and held.law is not None and held.law.is_constant:
        p = held.law.location
    law = _coin(float(p)) if isinstance(p, float) else unknown("bernoulli", Draw())
    result = watcher.execute(call)
    watcher.file(result, lambda: Piece(law, watcher.event("bernoulli")))
    return result


@handles("linalg_qr")
def _qr(watcher: Watcher, call: Call) -> Any:
    """Q of independent normal elements is orthogonal, up to signs uniformly so."""
    source = call.args[0]
    held = watcher.content(source).single
    q, r = watcher.execute(call)
    event = watcher.event("qr")
    law = unknown("linalg_qr", Draw())
    drawn = held.law if held is not None else None
    if drawn is not None and drawn.form == "normal" and drawn.location == 0.0:
        law = orthogonal(1.0, *source.shape) if q.shape == source.shape[-2:] else law
    watcher.file(q, lambda: Piece(law, event))
    watcher.file(r, lambda: Piece(unknown("linalg_qr", Draw()), event))
    return q, r


def _roots(watcher: Watcher, tensors: Sequence[Tensor]) -> frozenset[Draw]:
    """The draws that tensors depend on."""
    held = [s for t in tensors if (s := watcher.storage(t)) is not None]
    laws = [piece.law for storage in held for piece in storage.pieces]
    return frozenset(
        root for law in laws if law is not None and law.draw is not None for root in law.draw.roots
    )


def _opaque(watcher: Watcher, call: Call) -> Any:
    """An operator that is not understood."""
    name = call.op.name
    roots = _roots(watcher, call.tensors)
    result = watcher.execute(call)
    event = watcher.event(name, bool(call.op.written))
    piece = Piece(unknown(name, Draw(roots or None)), event)
    if call.op.written:
        for target in watcher._written(call):
            if isinstance(target, Tensor):
                watcher.write(target, one(piece))
        return result
    if not isinstance(result, Tensor | tuple | list) and not all(
        watcher.has_elements(t) for t in pytree.tree_leaves(call.args) if isinstance(t, Tensor)
    ):
        raise NeedsElements(name)
    watcher.file(result, lambda: piece)
    return result


# --------------------------------------------------------------------------- the mode


class Dispatcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The mode that hands every operator to a watcher."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs more than a call

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watcher = watcher

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.watcher.dispatched(func, args, kwargs or {})


@contextmanager
def pause(watcher: Watcher) -> Iterator[None]:
    """Run operators without watching them."""
    before = watcher.paused
    watcher.paused = True
    try:
        yield
    finally:
        watcher.paused = before
