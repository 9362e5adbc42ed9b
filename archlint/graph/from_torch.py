"""From a PyTorch model to the layer graph: build on meta, record one forward, lower it."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from archlint.errors import ArchlintError
from archlint.graph.example_input import Example
from archlint.graph.input_repair import MOST, repaired
from archlint.graph.model import LayerGraph, Mode
from archlint.graph.patterns import recognise
from archlint.graph.sites import constructor_sites
from archlint.graph.torch_inputs import Inputs, described, examples, flags, specs_for_layer
from archlint.graph.torch_recorder import tables  # noqa: F401  (registers the lowerings)
from archlint.graph.torch_recorder.lowering import known, lower
from archlint.graph.torch_recorder.recorder import (
    DataDependent,
    Recording,
    record_forward,
)
from archlint.graph.transformers_inputs import input_named
from archlint.initialization.record import Record, Recorded, build, cleaned, seeded

Factory = Callable[[], Any]


def load_torch(
    target: Any,
    inputs: Inputs | None = None,
    mode: Mode = "train",
    name: str | None = None,
) -> LayerGraph:
    """The layer graph of a PyTorch model.

    ``target`` is an ``nn.Module``, a callable that builds one (it is called with parameters on the
    meta device, and what it does to them is watched), a ``torch.fx.GraphModule`` or an exported
    program. ``inputs`` maps a parameter of ``forward`` to ``(shape, dtype)``, or holds tensors;
    without it the input is deduced, which the graph's notes tell. ``mode`` says how BatchNorm and
    dropout are meant.

    Raises ArchlintError where the target is no model, its input cannot be deduced, or its
    ``forward`` raises; the exception of the user's code is the ``__cause__``.
    """
    model, watched, factory = _built(target)
    title = name or type(model).__name__
    recording, example = record(model, inputs, mode, factory, watched)
    laws = watched.laws(model) if watched is not None else None
    if laws is not None and _is_loaded(laws, model):
        model, watched, laws = _module(target(), target), None, None
        recording, example = record(model, inputs, mode, factory)
    graph = lower(recording, title, mode, laws, mode == "train" and _is_exported(model))
    graph = recognise(graph)
    if laws is None:
        graph = _fitted(graph)
    notes = (*graph.notes, *_doubles(graph))
    if watched is not None and laws is not None:
        notes = (*notes, *watched.notes, *_estimates(laws, graph))
        graph = replace(graph, unreached=watched.listings.unreached(graph.parameters))
    if example.assumed:
        values = [node.meta["val"] for node in recording.graph.nodes if node.op == "placeholder"]
        notes = (*notes, *described(recording.names, values))
    return replace(graph, notes=notes)


def record(
    model: nn.Module,
    inputs: Inputs | None = None,
    mode: Mode = "train",
    factory: Factory | None = None,
    watched: Record | None = None,
) -> tuple[Recording, Example]:
    """Record one forward with the first example input that fits.

    On meta tensors; where ``forward`` depends on data, on real ones of a small batch. ``watched``
    is the record of the construction, which goes on while lazy layers learn their shapes.
    """
    tried = examples(model, inputs, factory)
    _initialise_lazily(model, tried, watched)
    failures: list[tuple[Exception, Example]] = []
    real = _Real(model, factory, mode)
    with _mode_of(model, mode):
        for i, example in enumerate(tried):
            more = tried[i + 1] if i + 1 < len(tried) and tried[i + 1].completes else None
            try:
                with seeded():
                    return _attempt(model, example, more, real)
            except ArchlintError:
                raise
            except Exception as raised:  # whatever the user's forward raises
                failures.append((raised, example))
        if example.assumed and (found := _repaired(model, tried, failures, real)):
            return found
        problem, example = max(failures, key=lambda f: _progress(f[0]))  # that got furthest
        if not isinstance(problem, DataDependent) and _is_small(model):
            # some kernels have no shape function, or one that asks for more than they need
            note = f"forward does not run without elements ({_line(problem)}): it was run on them"
            with contextlib.suppress(Exception):
                return real.run(example, note), example
    raise _refusal(model, problem, example, len(tried)) from problem


def _attempt(
    model: nn.Module,
    example: Example,
    more: Example | None,
    real: _Real,
    suggested: bool = False,
) -> tuple[Recording, Example]:
    """Record on meta; where that depends on data, with ``more`` of the input, then for real.

    Models that are not small are not built for an input that is merely ``suggested``.
    """
    try:
        return _on_meta(model, example), example
    except DataDependent as dependent:
        if more is not None:
            with contextlib.suppress(Exception):
                return _on_meta(model, more), more
        if suggested and not _is_small(model):
            raise
        note = f"forward depends on its data ({dependent}): it was run on real tensors"
        return real.run(example, note, dependent), example


_MOST_NODES = 20_000  # recorded in all for inputs that are repaired


def _repaired(
    model: nn.Module,
    tried: Sequence[Example],
    failures: list[tuple[Exception, Example]],
    real: _Real,
) -> tuple[Recording, Example] | None:
    """Record with an input that the failures of those tried suggest, best first; what fails again
    is added to them."""
    order = itertools.count()
    seen = {_key(example) for example in tried}
    left, nodes = MOST, 0
    # what got furthest first, and the others too where its first suggestions lead nowhere
    waiting: list[tuple[int, int, int, int, Iterator[Example]]] = []

    def follow(problem: Exception, example: Example) -> None:
        found = repaired(model, example, problem, input_named, specs_for_layer)
        heapq.heappush(waiting, (0, -_progress(problem), next(order), 0, found))

    for failure in list(failures):
        follow(*failure)
    while waiting and left and nodes <= _MOST_NODES:
        _, progress, number, taken, candidates = heapq.heappop(waiting)
        candidate = next((e for e in candidates if _key(e) not in seen), None)
        if candidate is None:
            continue
        taken += 1
        heapq.heappush(waiting, (taken // _AT_ONCE, progress, number, taken, candidates))
        seen.add(_key(candidate))
        left -= 1
        try:
            return _attempt(model, candidate, None, real, suggested=True)
        except Exception as raised:
            if _progress(raised) > max(_progress(problem) for problem, _ in failures):
                failures.append((raised, candidate))
            nodes += _progress(raised)
            if _progress(raised) >= -progress:
                follow(raised, candidate)
    return None


_AT_ONCE = 4  # suggestions of one failure that are tried before those of others


def _key(example: Example) -> str:
    return repr((example.args, sorted(example.kwargs.items())))


def _progress(problem: Exception) -> int:
    """How many calls were recorded before an exception."""
    return getattr(problem, "_archlint_progress", 0)


def _on_meta(model: nn.Module, example: Example) -> Recording:
    args, kwargs = example.on_meta()
    try:
        return record_forward(model, args, kwargs, known, "meta")
    except RuntimeError as problem:
        if "does not require grad" not in str(problem):
            raise
    args, kwargs = example.on_meta()  # forward takes gradients
    return record_forward(model, args, kwargs, known, "meta", grad=True)


# Parameters up to which a model is built and run for real without having been asked to.
_SMALL = 100_000_000


def _is_small(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) <= _SMALL


def _line(problem: BaseException) -> str:
    return " ".join(str(problem).split())[:120]


@dataclass
class _Real:
    """The model with elements, built when one is first wanted."""

    model: nn.Module
    factory: Factory | None
    mode: Mode
    built: nn.Module | None = None

    def run(self, example: Example, note: str, cause: Exception | None = None) -> Recording:
        """Record on real tensors; the model's own state is as it was afterwards."""
        if self.built is None:
            self.built = _with_elements(self.model, self.factory)
        if self.built is None:
            raise cause or DataDependent("the model has no elements")
        args, kwargs = example.drawn()
        with _mode_of(self.built, self.mode), _unchanged(self.built), seeded():
            recording = record_forward(self.built, args, kwargs, known, "cpu")
        return replace(recording, notes=(*recording.notes, note))


# --------------------------------------------------------------------------- building


def _built(target: Any) -> tuple[nn.Module, Record | None, Factory | None]:
    """The model, the record of its construction where it was watched, its factory."""
    if isinstance(target, torch.export.ExportedProgram):
        return target.module(), None, None
    if isinstance(target, nn.Module):
        return unwrapped(target), None, None
    if not callable(target):
        raise ArchlintError(
            f"{type(target).__name__} is neither a model nor something that builds one",
            "give an nn.Module, or a class or function that returns one",
        )
    try:
        with constructor_sites():
            made, watched = build(target, sys._getframe(0))
    except Exception as problem:
        if not _exports(problem):
            raise
        return _module(target(), target), None, target
    if isinstance(made, torch.export.ExportedProgram):  # its weights are there already
        return _module(target(), target), None, target
    return _module(made, target), watched, target


def _exports(problem: BaseException) -> bool:
    """Whether an exception comes out of ``torch.export``, which wants weights to be there."""
    trace = problem.__traceback__
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").startswith("torch.export"):
            return True
        trace = trace.tb_next
    return False


def _is_loaded(laws: Mapping[str, Recorded], model: nn.Module) -> bool:
    """Whether the constructor filled most weights with numbers from elsewhere: trained ones."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    families = {name: law.family for name in sizes if (law := laws[name].law) is not None}
    fixed = sum(sizes[name] for name, family in families.items() if family == "deterministic")
    return 2 * fixed > sum(sizes.values())


_NAMED = 3  # parameters that a note names


def _estimates(laws: Mapping[str, Recorded], graph: LayerGraph) -> Iterator[str]:
    """Which laws are not exact."""
    every = [(name, laws[name].law) for name in graph.parameters if name in laws]
    inexact = [name for name, law in every if law is not None and not law.exact
               and law.family != "uninitialised"]  # fmt: skip
    missing = [name for name, law in every if law is None]
    for names, what in ((inexact, "estimated from elements"), (missing, "not known")):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            yield f"the law of {', '.join(names[:_NAMED])}{more} is {what}"


def _doubles(graph: LayerGraph) -> Iterator[str]:
    """Weights in double precision among others that are not: an array of numpy, mostly."""
    kinds = {n: p.dtype for n, p in graph.parameters.items() if p.trainable and "float" in p.dtype}
    doubles = [name for name, kind in kinds.items() if kind == "float64"]
    if doubles and len(doubles) < len(kinds):
        more = f" and {len(doubles) - _NAMED} more" if len(doubles) > _NAMED else ""
        left = len(kinds) - len(doubles)
        yield f"double precision: {', '.join(doubles[:_NAMED])}{more}, unlike {left} other weights"


def _module(made: Any, factory: Factory) -> nn.Module:
    if isinstance(made, torch.export.ExportedProgram):
        return made.module()
    if not isinstance(made, nn.Module):
        name = getattr(factory, "__name__", type(factory).__name__)
        raise ArchlintError(
            f"{name} returned {type(made).__name__}, not an nn.Module",
            "name a class or function that builds the model",
        )
    return unwrapped(made)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of ``torch.compile`` and ``DataParallel``."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := dict(model.named_children()).get("_orig_mod"), nn.Module):
            model = inner
        else:
            return model


def _is_exported(model: nn.Module) -> bool:
    """Whether a model is a graph of operators whose mode was fixed when it was exported."""
    return isinstance(model, torch.fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in model.graph.nodes
    )


def _fitted(graph: LayerGraph) -> LayerGraph:
    from archlint.initialization.fit import fit_graph

    return fit_graph(graph)


# --------------------------------------------------------------------------- running


@contextlib.contextmanager
def _mode_of(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Every module in training mode or out of it, and as it was afterwards."""
    before = [
        (m, m.training)
        for m in model.modules()
        if "training" in m.__dict__ or isinstance(m, torch.jit.ScriptModule)
    ]
    try:
        model.train(mode == "train")
    except NotImplementedError:
        pass  # exported graphs refuse to be switched: their mode is written into them
    except RecursionError:  # modules that hold one another
        for module in model.modules():
            module.training = mode == "train"
    try:
        yield
    finally:
        for module, training in before:
            if "training" in module.__dict__:
                module.__dict__["training"] = training
            else:
                module.training = training


@contextlib.contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers keep their elements, whatever forward writes."""
    state = [t for t in [*model.parameters(), *model.buffers()] if t.device.type != "meta"]
    saved = [t.detach().clone() for t in state]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, elements in zip(state, saved, strict=True):
                if tensor.shape == elements.shape:
                    tensor.copy_(elements)


def _initialise_lazily(model: nn.Module, tried: Sequence[Example], watched: Record | None) -> None:
    """Run lazy modules once, so that they know their shapes and draw their weights."""
    if not any(is_lazy(p) for p in [*model.parameters(), *model.buffers()]):
        return
    if watched is None:
        raise ArchlintError(
            f"{type(model).__name__} has lazy layers whose shapes are not known yet",
            "run one forward before, or give a factory that does",
        )
    for example in tried:
        args, kwargs = example.on_meta()
        with contextlib.suppress(Exception), watched.watching(), torch.no_grad():
            model(*args, **kwargs)
            break
    cleaned(model, watched)


def _with_elements(model: nn.Module, factory: Factory | None) -> nn.Module | None:
    """A model with real weights: the one given, or one built for real."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(t.device.type != "meta" for t in tensors):
        return model
    if factory is None:
        return None
    with constructor_sites(), seeded():
        return _module(factory(), factory)


def _refusal(model: nn.Module, problem: Exception, example: Example, tried: int) -> ArchlintError:
    """What the user is told about an exception of forward."""
    where, kind = getattr(problem, "_archlint_module", ("", type(model).__name__))
    place = f"{where} ({kind})" if where else kind
    text = " ".join(str(problem).split()) or type(problem).__name__
    inputs = ", ".join(_sizes(example))
    if isinstance(problem, DataDependent):
        return ArchlintError(
            f"forward of {place} depends on its data: {text}",
            "give a model with real weights, or a factory that builds one",
        )
    said = "with the assumed input" if example.assumed else "with the input"
    hint = f"say what it takes: {flags(model)}" if example.assumed else None
    if tried > 1 and example.assumed:
        hint = f"{tried} inputs were tried; {hint}"
    return ArchlintError(f"{place} raised {type(problem).__name__} {said} {inputs}: {text}", hint)


def _sizes(example: Example) -> Iterator[str]:
    args, kwargs = example.on_meta()
    for key, value in [*enumerate(args), *kwargs.items()]:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                size = "x".join(str(n) for n in leaf.shape) or "()"
                yield size if isinstance(key, int) else f"{key}:{size}"
