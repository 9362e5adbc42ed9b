"""Run any layer graph in torch: what it computes, node by node, from parameters and inputs.

The program is pure: parameters and inputs go in, outputs come out, nothing is written in place. So
``torch.func.vmap`` runs many networks at once and autograd differentiates it, except through what
has a size that depends on the elements. Random ops draw from torch's global generator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archlint.graph.model import LayerGraph, Node, Parameter
from archlint.graph.ops import OPS
from archlint.probe.ops.frame import KERNELS, Call, CannotExecute, Kernel, torch_dtype

for _family in ("affine", "attention", "control", "elementwise", "indexing", "layout",
                "normalisation", "pooling", "quantised", "random", "recurrent", "reductions",
                "resize"):  # fmt: skip
    import_module(f"archlint.probe.ops.{_family}")

# Elements whose number or place depends on the data: not under vmap.
DATA_SIZED = frozenset({"nonzero", "compress", "unique", "nms", "loop", "dynamic_slice"})

Watch = Callable[[str, Tensor], Tensor]


def as_tensor(array: Any, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> Tensor:
    """An array of a graph as a tensor; types that torch lacks are widened."""
    elements = np.asarray(array)
    if elements.dtype.kind not in "fciub":  # bfloat16, float8, int4 of ml_dtypes
        wide = np.float32 if "float" in elements.dtype.name else np.int64
        elements = elements.astype(wide)
    elif elements.dtype.kind == "u" and elements.dtype.itemsize > 1:
        elements = elements.astype(np.int64)
    if elements.dtype.byteorder == ">":
        elements = elements.astype(elements.dtype.newbyteorder("="))
    tensor = torch.from_numpy(np.array(elements, copy=True))
    return tensor.to(device=device, dtype=dtype if dtype is not None else tensor.dtype)


@dataclass(frozen=True)
class Step:
    """One node, ready to run. ``free`` lists the values that nothing reads afterwards."""

    kernel: Kernel
    call: Call
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    dtypes: tuple[torch.dtype | None, ...]
    guard: tuple[tuple[str, bool], ...]
    free: tuple[str, ...] = ()


@dataclass
class Program:
    """A layer graph ready to run.

    ``real`` is the dtype of all floats (None: each value's own). ``kept`` are values that
    :meth:`run` gives besides the outputs; where ``alone``, in place of them, and nothing is run
    that they do not need.

    Raises CannotExecute where a node is unknown to archlint, or a value has no elements.
    """

    graph: LayerGraph
    real: torch.dtype | None = torch.float64
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kept: frozenset[str] = frozenset()
    alone: bool = False
    constants: dict[str, Tensor] = field(init=False)
    steps: list[Step] = field(init=False)
    held: Mapping[str, Tensor] = field(init=False)  # parameters of an inner program

    def __post_init__(self) -> None:
        graph = self.graph
        self.held = {}
        self.constants = {
            v.id: as_tensor(v.constant, torch_dtype(v.dtype, self.real), self.device)
            for v in graph.values.values()
            if v.constant is not None and v.constant.dtype.kind != "O"
        }
        self.bodies: list[Program] = []
        self.uses = {v.id: v.parameter for v in graph.values.values() if v.parameter is not None}
        self.given = tuple(self.kept) if self.alone else (*graph.outputs, *self.kept)
        nodes = graph.nodes
        if self.alone:
            needed = needed_for(graph, self.kept)
            nodes = tuple(n for n in nodes if needed.intersection(n.outputs))
        self.steps = self._freed([self._step(node) for node in nodes])

    def _step(self, node: Node) -> Step:
        kernel = KERNELS.get(node.op)
        if kernel is None or not node.known:
            raise CannotExecute(f"{node.source_op or node.op} ({node.name or node.id})")
        body: Program | None = None
        if node.body is not None:
            body = Program(node.body, self.real, self.device)
            self.bodies.append(body)
        values = tuple(self.graph.values[out] for out in node.outputs)
        attributes = {**OPS[node.op].attributes, **node.attributes}
        call = Call(node, attributes, values, self.graph.mode, self.real, self.device, body)
        dtypes = tuple(torch_dtype(v.dtype, self.real) for v in values)
        return Step(kernel, call, node.inputs, node.outputs, dtypes, node.guard)

    def _freed(self, steps: Sequence[Step]) -> list[Step]:
        """The steps, each told which values it is the last to read."""
        from dataclasses import replace

        spared = {*self.given, *self.constants, *self.uses}
        last: dict[str, int] = {}
        for i, step in enumerate(steps):
            for value in (*step.inputs, *step.outputs, *(v for v, _ in step.guard)):
                if value is not None:
                    last[value] = i
        free: dict[int, list[str]] = {}
        for value, i in last.items():
            if value not in spared:
                free.setdefault(i, []).append(value)
        return [replace(step, free=tuple(free.get(i, ()))) for i, step in enumerate(steps)]

    @property
    def parameters(self) -> dict[str, Parameter]:
        """The parameters that the graph or a body of it reads, by name."""
        found = dict(self.graph.parameters)
        for body in self.bodies:
            found = {**body.parameters, **found}
        return found

    def run(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Sequence[Tensor] | Mapping[str, Tensor],
        watch: Watch | None = None,
    ) -> dict[str, Tensor]:
        """The outputs, and the kept values, by value id.

        ``parameters`` by name; ``inputs`` in the graph's order or by value id. ``watch`` sees every
        real-valued value as it is made, and gives the tensor to go on with.
        """
        held: dict[str, Tensor] = dict(self.constants)
        for value, name in self.uses.items():
            if name in parameters:
                held[value] = parameters[name]
        for body in self.bodies:
            body.held = parameters
        given = inputs if isinstance(inputs, Mapping) else dict(
            zip(self.graph.inputs, inputs, strict=True)
        )  # fmt: skip
        for value, tensor in given.items():
            held[value] = watch(value, tensor) if watch is not None else tensor
        for step in self.steps:
            if step.guard and not all(
                v in held and bool(held[v]) == truth for v, truth in step.guard
            ):
                continue
            self._take(step, held, watch)
        return {v: held[v] for v in self.given if v in held}

    def _take(self, step: Step, held: dict[str, Tensor], watch: Watch | None) -> None:
        branches = step.call.node.op == "select"
        try:
            arguments = [
                None if v is None else held.get(v) if branches else held[v] for v in step.inputs
            ]
        except KeyError as missing:
            raise CannotExecute(f"the value {missing} has no elements") from None
        result = step.kernel(step.call, *arguments)
        results: tuple[Any, ...] = result if isinstance(result, tuple | list) else (result,)
        for out, dtype, result in zip(step.outputs, step.dtypes, results, strict=False):
            if result is None:
                continue
            if dtype is not None and result.dtype != dtype:
                result = result.to(dtype)
            if watch is not None and result.is_floating_point():
                result = watch(out, result)
            held[out] = result
        for value in step.free:
            held.pop(value, None)

    def inner(self, *inputs: Tensor) -> list[Tensor]:
        """The outputs of a loop's body, in order."""
        found = self.run(self.held, inputs)
        return [found[v] for v in self.graph.outputs]


def needed_for(graph: LayerGraph, values: Iterable[str]) -> set[str]:
    """Values and all that they are computed from."""
    found: set[str] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if value in found:
            continue
        found.add(value)
        node = graph.producer.get(value)
        if node is not None:
            pending += [v for v in node.inputs if v is not None]
            pending += [v for v, _ in node.guard]
    return found


def load_parameters(
    parameters: Mapping[str, Parameter],
    real: torch.dtype | None = torch.float64,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """The elements of parameters that have some (an ONNX file, a model with real weights)."""
    return {
        name: as_tensor(p.load(), torch_dtype(p.dtype, real), device)
        for name, p in parameters.items()
        if p.load is not None
    }


def unknown_nodes(graph: LayerGraph, values: Iterable[str] | None = None) -> Counter[str]:
    """The source operators of a graph that cannot be executed, with how often each occurs; of those
    alone that some values need."""
    needed = None if values is None else needed_for(graph, values)
    found: Counter[str] = Counter()
    for node in graph.nodes:
        if needed is None or needed.intersection(node.outputs):
            every = [node, *(node.body.walk() if node.body is not None else ())]
            found.update(n.source_op or n.op for n in every if n.op not in KERNELS or not n.known)
    return found
