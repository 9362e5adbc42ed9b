"""The layer graph: what both frontends produce and everything else reads. Torch-free, frozen.

A graph is a list of nodes in execution order over named values. A value is produced by one node,
is an input of the graph, or stands for a parameter or a constant. Nodes of branches whose
condition is not known statically are part of the same flat list and carry a *guard*; a node
``select`` joins the branches. Loops keep their body as a graph of its own (``Node.body``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy.typing as npt

from archlint.finding import Site
from archlint.graph.ops import OPS, UNKNOWN, check_node
from archlint.initialization.distribution import Distribution

Array = npt.NDArray[Any]
AttributeValue = (
    int
    | float
    | str
    | bool
    | None
    | tuple[int, ...]
    | tuple[float, ...]
    | tuple[str, ...]
    | tuple[bool, ...]
    | tuple[tuple[int, ...], ...]
)
WeightState = Literal["initial", "trained", "mixed"]
Mode = Literal["train", "eval"]


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor in the graph.

    ``shape`` is None where the rank is unknown; a dimension is None where its size is.
    ``dtype`` is numpy's name (``float32``, ``int64``, ``bfloat16``, ``bool``) or None.
    ``constant`` holds the elements of a small or shape-like constant (never a weight);
    ``parameter`` names the Parameter that this value stands for.
    """

    id: str
    shape: tuple[int | None, ...] | None = None
    dtype: str | None = None
    constant: Array | None = field(default=None, compare=False)
    parameter: str | None = None

    @property
    def size(self) -> int | None:
        """Number of elements, or None where a dimension is unknown."""
        if self.shape is None:
            return None
        product = 1
        for n in self.shape:
            if n is None:
                return None
            product *= n
        return product


@dataclass(frozen=True, slots=True)
class Overwritten:
    """An initializer of whose effect nothing is left: what it was, and its place."""

    initializer: str
    site: Site | None = None


@dataclass(frozen=True, slots=True)
class Unreached:
    """An initializer in a loop over names that ran for none of them.

    ``test`` is what it depends on, ``names`` how many names were tested, ``call`` the initializer,
    both as written. ``parameters`` hold what was tested for as a part of their names; ``instead``
    is a test that holds for them, empty where there is none.
    """

    test: str
    call: str
    names: int
    parameters: tuple[str, ...]
    site: Site
    call_site: Site
    instead: str = ""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A weight: its shape and the law it is drawn from.

    ``law`` is None where it is unknown. ``load`` reads the array where there is one (an ONNX
    file); a recorded PyTorch model has none. ``fan_axes`` is how the layout maps to fans:
    see :func:`archlint.graph.fans.fans`. ``site`` is the line that decided the law.
    ``clone_of`` names the parameter that this one was copied from (equal values, own storage);
    ``shared`` says that other parameters were made of the same random numbers. ``overwritten`` are
    initializers that a later one made useless. ``flaw`` says which elements are NaN or infinite
    where an array holds some that are no mask. ``frozen``: it is a parameter that training leaves
    as it is.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    law: Distribution | None = None
    trainable: bool = True
    site: Site | None = None
    clone_of: str | None = None
    load: Callable[[], Array] | None = field(default=None, compare=False, repr=False)
    shared: bool = False
    overwritten: tuple[Overwritten, ...] = ()
    flaw: str = ""
    frozen: bool = False


@dataclass(frozen=True, slots=True)
class Node:
    """One operation. ``inputs`` holds value ids, None for an optional input left out.

    ``name`` is what the source calls it (ONNX node name, fx node name), ``source_op`` the source's
    own operator name; ``module`` is the module path (``layers.3.mlp.fc1``), ``module_type`` the
    class name where known. ``guard`` lists (value id of a boolean, wanted truth).
    """

    id: str
    op: str
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    name: str = ""
    source_op: str = ""
    module: str = ""
    module_type: str = ""
    site: Site | None = None
    guard: tuple[tuple[str, bool], ...] = ()
    body: LayerGraph | None = None

    @property
    def known(self) -> bool:
        """Whether the op is in the vocabulary."""
        return self.op != UNKNOWN

    @property
    def output(self) -> str:
        """The first output's value id."""
        return self.outputs[0]


@dataclass(frozen=True)
class LayerGraph:
    """A network as a static list of operations.

    ``nodes`` are in execution order. ``folded`` counts source nodes that were computed statically
    (shape plumbing) and left the graph. ``mode`` says how BatchNorm and dropout are meant.
    ``notes`` are remarks for the report, such as a fallback that was taken. ``unreached`` are
    initializers of the constructor that never ran.
    """

    name: str
    nodes: tuple[Node, ...]
    values: Mapping[str, Value]
    parameters: Mapping[str, Parameter]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    mode: Mode = "train"
    source: Literal["onnx", "torch", "builder"] = "builder"
    weights: WeightState = "initial"
    weights_evidence: str = ""
    folded: int = 0
    notes: tuple[str, ...] = ()
    unreached: tuple[Unreached, ...] = ()

    @cached_property
    def producer(self) -> Mapping[str, Node]:
        """Value id -> the node that produces it."""
        return {out: node for node in self.nodes for out in node.outputs}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Node, ...]]:
        """Value id -> the nodes that read it, in execution order, each once."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(v for v in node.inputs if v is not None):
                found.setdefault(value, []).append(node)
        return {value: tuple(nodes) for value, nodes in found.items()}

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Node id -> position in execution order."""
        return {node.id: i for i, node in enumerate(self.nodes)}

    @cached_property
    def static(self) -> frozenset[str]:
        """The values that depend on no input: parameters, constants, what is made of them alone."""
        found = {
            v.id for v in self.values.values() if v.constant is not None or v.parameter is not None
        }
        for node in self.nodes:
            inputs = [v for v in node.inputs if v is not None]
            random = node.op in OPS and OPS[node.op].kind == "random"
            if inputs and not random and all(v in found for v in inputs):
                found.update(node.outputs)
        return frozenset(found)

    def shape(self, value: str | None) -> tuple[int | None, ...] | None:
        """The shape of a value, or None where unknown."""
        return self.values[value].shape if value is not None else None

    def constant(self, value: str | None) -> Array | None:
        """The elements of a value that is statically known and small, else None."""
        return self.values[value].constant if value is not None else None

    def parameter(self, value: str | None) -> Parameter | None:
        """The parameter that a value stands for, else None."""
        if value is None or (name := self.values[value].parameter) is None:
            return None
        return self.parameters[name]

    def walk(self) -> Iterator[Node]:
        """All nodes, those of loop bodies included."""
        for node in self.nodes:
            yield node
            if node.body is not None:
                yield from node.body.walk()


# --------------------------------------------------------------------------- invariants


def _ids_are_unique(g: LayerGraph) -> Iterator[str]:
    if len({n.id for n in g.nodes}) != len(g.nodes):
        yield "two nodes share an id"
    seen: set[str] = set()
    for node in g.nodes:
        for out in node.outputs:
            if out in seen:
                yield f"value {out!r} is produced twice"
            seen.add(out)


def _values_are_declared(g: LayerGraph) -> Iterator[str]:
    for node in g.nodes:
        for value in (*node.inputs, *node.outputs, *(v for v, _ in node.guard)):
            if value is not None and value not in g.values:
                yield f"node {node.id!r} names the undeclared value {value!r}"
    for value in (*g.inputs, *g.outputs):
        if value not in g.values:
            yield f"the graph names the undeclared value {value!r}"
    for key, declared in g.values.items():
        if key != declared.id:
            yield f"value {declared.id!r} is filed under {key!r}"


def _order_is_topological(g: LayerGraph) -> Iterator[str]:
    ready = {v.id for v in g.values.values() if v.constant is not None or v.parameter is not None}
    ready.update(g.inputs)
    for node in g.nodes:
        for value in (*node.inputs, *(v for v, _ in node.guard)):
            if value is not None and value not in ready:
                yield f"node {node.id!r} reads {value!r} before it is produced"
        ready.update(node.outputs)
    for value in g.outputs:
        if value not in ready:
            yield f"output {value!r} is never produced"


def _parameters_exist(g: LayerGraph) -> Iterator[str]:
    for value in g.values.values():
        if value.parameter is not None:
            if value.parameter not in g.parameters:
                yield f"value {value.id!r} stands for the missing parameter {value.parameter!r}"
            elif value.shape != g.parameters[value.parameter].shape:
                yield f"value {value.id!r} and its parameter differ in shape"
            if value.constant is not None:
                yield f"value {value.id!r} is both a parameter and a constant"
    for key, parameter in g.parameters.items():
        if key != parameter.name:
            yield f"parameter {parameter.name!r} is filed under {key!r}"


def _shapes_are_sizes(g: LayerGraph) -> Iterator[str]:
    for value in g.values.values():
        for n in value.shape or ():
            if n is not None and n < 0:
                yield f"value {value.id!r} has the negative dimension {n}"
        if value.constant is not None and value.constant.shape != value.shape:
            yield f"constant {value.id!r} has another shape than declared"


def _nodes_fit_the_vocabulary(g: LayerGraph) -> Iterator[str]:
    for node in g.nodes:
        for problem in check_node(
            node.op,
            len(node.inputs),
            [i for i, v in enumerate(node.inputs) if v is None],
            len(node.outputs),
            node.attributes,
        ):
            yield f"node {node.id!r} ({node.op}): {problem}"
        if node.op == UNKNOWN and not node.source_op:
            yield f"unknown node {node.id!r} does not say what it really is"
        if (node.body is not None) != (node.op in OPS and OPS[node.op].has_body):
            yield f"node {node.id!r} ({node.op}): body and op do not fit"


def _bodies_hold(g: LayerGraph) -> Iterator[str]:
    for node in g.nodes:
        if node.body is not None:
            for problem in problems(node.body):
                yield f"in the body of {node.id!r}: {problem}"


INVARIANTS: tuple[Callable[[LayerGraph], Iterator[str]], ...] = (
    _ids_are_unique,
    _values_are_declared,
    _order_is_topological,
    _parameters_exist,
    _shapes_are_sizes,
    _nodes_fit_the_vocabulary,
    _bodies_hold,
)


def problems(graph: LayerGraph) -> list[str]:
    """Every violated invariant of a graph, one sentence each."""
    return [problem for invariant in INVARIANTS for problem in invariant(graph)]


def verify(graph: LayerGraph) -> LayerGraph:
    """Return the graph unchanged; raise AssertionError with every violated invariant."""
    if found := problems(graph):
        raise AssertionError(f"{graph.name}: " + "; ".join(found[:20]))
    return graph
