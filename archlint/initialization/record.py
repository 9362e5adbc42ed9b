"""The record of initialization: build a model without its weights and know what they would hold.

The constructor runs as it is. What it draws is not drawn: each parameter's storage is on meta, and
:mod:`~archlint.initialization.watch` follows which law its elements would have, down to the call in
the source that decided it. What follows from literals is computed, so that constructors may read
numbers from tensors. Where one reads a number that was drawn, or a law is not understood, the model
is built for real, watched all the same, and only the laws that are still unknown are fitted.
"""

from __future__ import annotations

import contextlib
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from archlint.finding import Site
from archlint.graph.model import Overwritten
from archlint.initialization import laws
from archlint.initialization.contents import Content, Event, Piece, Storage, one
from archlint.initialization.direct import initializers_entered, watched
from archlint.initialization.distribution import Distribution
from archlint.initialization.laws import Law
from archlint.initialization.replaced import replaced
from archlint.initialization.unreached import Listings
from archlint.initialization.watch import Dispatcher, Watcher, geometry, law_of_elements

# Elements of a model up to which it is built for real: 1.6 GB in single precision.
FOR_REAL = 400_000_000
TABLE = 1 << 22  # elements up to which those of a table are kept


@dataclass(frozen=True)
class Recorded:
    """What the record says about one parameter or buffer.

    ``law`` is None where it is not known. ``site`` is the call that decided it. ``clone_of`` names
    the parameter whose random numbers it repeats, ``shared`` says that other parameters depend on
    the same numbers. ``overwritten`` are initializers of which nothing is left. ``elements`` are
    those of a table that follows from literals, where they are at hand. ``flaw`` says which
    elements are NaN or infinite, where the law had to be read off them.
    """

    law: Distribution | None
    site: Site | None = None
    clone_of: str | None = None
    shared: bool = False
    overwritten: tuple[Overwritten, ...] = ()
    elements: Tensor | None = field(default=None, repr=False, compare=False)
    flaw: str = ""


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """What a model's own code draws is the same in every run; whoever draws outside goes on."""
    python, old = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(old)


@dataclass
class Record:
    """Watches constructors. Use :func:`build`, then :meth:`laws`; :meth:`watching` goes on watching
    (a lazy module's first forward, say)."""

    watcher: Watcher
    notes: list[str] = field(default_factory=list)
    listings: Listings = field(default_factory=Listings)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While this is active, what is done to tensors is watched."""
        with (seeded(), warnings.catch_warnings(), self.listings.watching(),
              replaced(self.watcher), initializers_entered(), Dispatcher(self.watcher),
              _Functions(self.watcher)):  # fmt: skip
            # load_state_dict finds weights on meta; what it copies there is seen
            warnings.filterwarnings("ignore", ".*copying from a non-meta parameter")
            yield

    def laws(self, model: nn.Module) -> dict[str, Recorded]:
        """What became of every parameter and buffer of a model, by name."""
        found: dict[str, Recorded] = {}
        drawn: list[tuple[str, Tensor, Content]] = []
        tensors = [*model.named_parameters(), *model.named_buffers()]
        for name, tensor in tensors:
            if is_lazy(tensor) or tensor.layout is not torch.strided:
                found[name] = Recorded(None)
                continue
            content = self.watcher.content(tensor.detach())
            found[name] = self._recorded(tensor, content)
            if any(p.law is not None and p.law.random for p in content.pieces):
                drawn.append((name, tensor, content))
        for name, (original, shared) in _copies(drawn).items():
            # a copy that is not trained is a target network's, and meant
            fixed = not dict(tensors)[name].requires_grad
            found[name] = replace(found[name], clone_of=None if fixed else original, shared=shared)
        return found

    def _recorded(self, tensor: Tensor, content: Content) -> Recorded:
        storage = self.watcher.storage(tensor)
        shares = sorted(
            content.shares(), key=lambda s: (s[1].law is not None and s[1].law.family != "zeros",
                                             s[0]), reverse=True
        )  # fmt: skip
        event = shares[0][1].event
        parts = [(share, piece.law or laws.unknown("")) for share, piece in shares]
        texts = dict.fromkeys(p.event.text for _, p in shares if p.event.text and not _is_zero(p))
        law: Distribution | None = laws.distribution(
            parts, " | ".join([*texts][:3]) or event.text)  # fmt: skip
        if law is not None and law.family == "deterministic":
            law = self._table(tensor, law, parts)
        flaw = ""
        if law is not None and law.family == "unknown":
            flaw = self._flaw(tensor)
            law = self._estimated(tensor)
        gone = () if storage is None else tuple(
            Overwritten(e.text, e.site) for e in dict.fromkeys(storage.overwritten)
            if not e.default and e.site is not None
        )  # fmt: skip
        table = law is not None and law.family == "deterministic"
        return Recorded(law, event.site, overwritten=gone,
                        elements=self._elements(tensor) if table else None,
                        flaw=flaw)  # fmt: skip

    def _elements(self, tensor: Tensor) -> Tensor | None:
        """What stands in a table of a moderate size."""
        storage = self.watcher.storage(tensor)
        if tensor.numel() > TABLE:
            return None
        if storage is not None and storage.elements is not None:
            held: Tensor = storage.elements
            return held.detach().reshape(tensor.shape) if held.numel() == tensor.numel() else None
        return tensor.detach() if self.watcher.is_real(tensor) else None

    def _table(
        self, tensor: Tensor, law: Distribution, parts: Sequence[tuple[float, Law]]
    ) -> Distribution:
        """A table of numbers that came from outside of torch may have been drawn there."""
        storage = self.watcher.storage(tensor)
        if storage is not None and storage.elements is not None:
            tensor = storage.elements
        elif not self.watcher.has_elements(tensor):
            return law
        fitted = _fit(tensor)
        if fitted is None:
            return law
        if fitted.family in ("eye", "dirac", "orthogonal", "two_point"):
            return replace(law, family=fitted.family, initializer=law.initializer)
        drawn = fitted.family in ("normal", "uniform", "truncated_normal")
        if drawn and tensor.numel() >= 256 and not _is_smooth(tensor):
            return replace(fitted, exact=False)
        return law

    def _flaw(self, tensor: Tensor) -> str:
        """Which elements of a weight are not finite; rows of −∞ are a mask."""
        if tensor.device.type == "meta" or not self.watcher.has_elements(tensor):
            return ""
        if not tensor.requires_grad or not tensor.is_floating_point():
            return ""
        elements = tensor.detach()
        below = elements.isneginf()
        rows = below.reshape(len(below), -1) if tensor.dim() else below
        if tensor.dim() > 1 and not rows.all() and bool((rows == rows[:, :1]).all()):
            below = torch.zeros_like(below)
        counts = ((elements.isnan(), "NaN"), (elements.isposinf(), "+Inf"), (below, "-Inf"))
        what = [f"{int(found.sum())} {name}" for found, name in counts if found.any()]
        return f"{' and '.join(what)} among {tensor.numel()} elements" if what else ""

    def _estimated(self, tensor: Tensor) -> Distribution | None:
        """The law of elements that are there, by their looks."""
        if tensor.device.type == "meta" or not self.watcher.has_elements(tensor):
            return None
        fitted = _fit(tensor)
        return None if fitted is None else replace(fitted, exact=False)


def _is_zero(piece: Piece) -> bool:
    return piece.law is not None and piece.law.family == "zeros"


def _fit(tensor: Tensor) -> Distribution | None:
    from archlint.initialization.fit import fit

    if not tensor.is_floating_point() or tensor.numel() == 0:
        return None
    fitted = fit(tensor.detach().to(torch.float32).numpy())
    return None if fitted.family == "unknown" else fitted


def _is_smooth(tensor: Tensor) -> bool:
    """Whether neighbouring elements are close, as in a table and not in draws."""
    flat = tensor.detach().to(torch.float64).reshape(-1).numpy()
    centred = flat - flat.mean()
    correlation = float(centred[1:] @ centred[:-1]) / float(centred @ centred)
    return abs(correlation) * math.sqrt(flat.size) > 6.0


def _copies(
    drawn: Sequence[tuple[str, Tensor, Content]],
) -> dict[str, tuple[str | None, bool]]:
    """Which parameters repeat the numbers of another, and which depend on the same ones."""
    users: dict[Any, set[str]] = {}
    first: dict[Any, list[tuple[str, Tensor, Content]]] = {}
    found: dict[str, tuple[str | None, bool]] = {}
    for name, tensor, content in drawn:
        random_ones = [p.law for p in content.pieces if p.law is not None and p.law.random]
        for law in random_ones:
            for root in law.draw.roots if law.draw is not None else ():
                users.setdefault(root, set()).add(name)
        key = (tuple(tensor.shape), tuple(id(law.draw) for law in random_ones))
        before = first.setdefault(key, [])
        original = next((n for n, _, c in before if _equal(c, content)), None)
        before.append((name, tensor, content))
        found[name] = (original, False)
    for name, _, content in drawn:
        roots = {root for p in content.pieces if p.law is not None and p.law.draw is not None
                 for root in p.law.draw.roots}  # fmt: skip
        found[name] = (found[name][0], any(len(users[root]) > 1 for root in roots))
    return {name: value for name, value in found.items() if value[0] is not None or value[1]}


def _equal(one: Content, two: Content) -> bool:
    """Whether two contents hold the same numbers at the same places."""
    if len(one.pieces) != len(two.pieces):
        return False
    if (one.labels is None) != (two.labels is None) or one.run != two.run:
        return False
    if one.labels is not None and not np.array_equal(one.labels, two.labels):  # type: ignore[arg-type]
        return False
    return all(
        a.law is not None and b.law is not None and (
            a.law.same_as(b.law) or (a.law.is_constant and b.law.is_constant
                                     and a.law.location == b.law.location))
        for a, b in zip(one.pieces, two.pieces, strict=True)
    )  # fmt: skip


# --------------------------------------------------------------------------- building


def build(factory: Callable[[], Any], stop: FrameType | None = None) -> tuple[Any, Record]:
    """What a factory makes, without its weights, and the record of what it did to them.

    ``stop`` is the frame outside of which no source line is the user's. An exception of the
    factory's own passes through.
    """
    stop = stop if stop is not None else sys._getframe(1)
    record = Record(Watcher(stop=stop))
    problem: Exception | None = None
    try:
        with record.watching():
            made = factory()
    except Exception as error:  # of the constructor, which may need elements
        problem = error
    else:
        if not isinstance(made, nn.Module) or not _has_unknown(record, made):
            return cleaned(made, record), record
    if record.watcher.unallocated > FOR_REAL:
        if problem is not None:
            raise problem
        return cleaned(made, record), record
    real = Record(Watcher(1 << 62, stop))
    with real.watching():
        made = factory()
    if problem is not None:
        said = " ".join(str(problem).split())[:120]
        real.notes.append(f"the constructor needs its weights ({said}): the model was built")
    return made, real


def _has_unknown(record: Record, model: nn.Module) -> bool:
    """Whether a parameter's law was not understood, which elements could help with."""
    for parameter in model.parameters():
        if is_lazy(parameter) or parameter.layout is not torch.strided:
            continue
        pieces = record.watcher.content(parameter.detach()).pieces
        if any(p.law is not None and p.law.family == "unknown" for p in pieces):
            return True
    return False


def cleaned(model: Any, record: Record) -> Any:
    """Tensors that hold draws, or memory that was left as it is, go to meta: nothing may depend on
    them."""
    if not isinstance(model, nn.Module):
        return model
    seen: dict[int, Tensor] = {}
    for module in model.modules():
        kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for kind in kinds:
            for name, tensor in kind.items():
                if tensor is None or is_lazy(tensor) or record.watcher.is_real(tensor):
                    continue
                if (table := _table(record.watcher, tensor)) is not None:
                    kind[name] = seen.setdefault(id(tensor), table)
                    continue
                if tensor.device.type == "meta" or (
                    isinstance(tensor, nn.Parameter) and record.watcher.has_elements(tensor)
                ):
                    continue
                kind[name] = seen.setdefault(id(tensor), _moved(record.watcher, tensor))
    return model


def _table(watcher: Watcher, tensor: Tensor) -> Tensor | None:
    """A buffer on meta that was filled with a table, with its elements."""
    storage = watcher.storage(tensor)
    if storage is None or storage.elements is None or isinstance(tensor, nn.Parameter):
        return None
    table: Tensor = storage.elements.reshape(tensor.shape)
    watcher.put(table, Storage(table.numel(), storage.pieces[0], real=True))
    return table


def _moved(watcher: Watcher, tensor: Tensor) -> Tensor:
    """The same tensor on meta."""
    content = watcher.content(tensor.detach())
    data = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    storage = Storage(data.untyped_storage().nbytes() // data.element_size(), Piece(None, Event()))
    watcher.put(data, storage)
    storage.write(geometry(data), content)
    old = watcher.storage(tensor)
    if old is not None:
        storage.overwritten = old.overwritten
        storage.elements = (
            old.elements
            if old.elements is not None
            else (tensor.detach() if old.real and tensor.device.type != "meta" else None)
        )
    if not isinstance(tensor, nn.Parameter):
        return data
    return nn.Parameter(data, requires_grad=tensor.requires_grad)


# --------------------------------------------------------------------------- torch's functions

_MOVES = frozenset(("cuda", "cpu", "xpu", "npu", "pin_memory", "share_memory_"))


class _Functions(TorchFunctionMode):
    """The program believes that it runs on the CPU, wherever its tensors are."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()
        self.watcher = watcher

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _QUESTIONS:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            owner = getattr(func, "__self__", None)
            if owner is _DEVICE:
                return torch.device("cpu")
            if owner is _IS_META:
                return False
            return func(*args, **kwargs)
        if name == "__set__" and getattr(func, "__self__", None) is _DATA:
            return func(args[0], self.watcher.compatible(args[0], args[1]))
        if kwargs.get("device") is not None:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        direct = watched(self.watcher, func, args, kwargs)
        if direct is not None:
            return direct
        if name in _MOVES and args and isinstance(args[0], Tensor):
            return args[0]
        if name == "to":
            args, kwargs = _without_device(args, kwargs)
            if len(args) == 1 and not kwargs.keys() - {"non_blocking", "copy", "memory_format"}:
                return args[0].clone() if kwargs.get("copy") else args[0]
        if name == "__deepcopy__" and type(args[0]) is Tensor and not args[0].requires_grad:
            return self._deepcopied(*args)
        return func(*args, **kwargs)

    @staticmethod
    def _deepcopied(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        if id(tensor) in memo:
            found = memo[id(tensor)]
            assert isinstance(found, Tensor)
            return found
        copy = memo[id(tensor)] = tensor.clone()
        return copy


_QUESTIONS = frozenset((torch._C._set_grad_enabled, Tensor.dim, Tensor.size, Tensor.numel))
_DEVICE: Any = Tensor.device
_IS_META: Any = Tensor.is_meta
_DATA: Any = Tensor.data


def _without_device(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """``x.to(…)`` without what it says about devices."""
    kwargs = {k: v for k, v in kwargs.items() if k != "device"}
    kept = [args[0]]
    for value in args[1:]:
        if isinstance(value, torch.device | str | int) or value is None:
            continue
        kept.append(value.dtype if isinstance(value, Tensor) else value)
    if kwargs.get("dtype", ...) is None:
        kwargs.pop("dtype")
    wanted = next((v for v in [*kept[1:], kwargs.get("dtype")] if isinstance(v, torch.dtype)), None)
    if wanted is not None and wanted == args[0].dtype:
        kept = [v for v in kept if not isinstance(v, torch.dtype)]
        kwargs.pop("dtype", None)
    return tuple(kept), kwargs


__all__ = ["Record", "Recorded", "build", "law_of_elements", "one"]
