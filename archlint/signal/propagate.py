"""The abstract interpreter: signals from the inputs to the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

from archlint.graph.model import LayerGraph, Node, Value
from archlint.graph.ops import OPS
from archlint.signal.moments import UNKNOWN_SIGNAL, Role, Signal
from archlint.signal.transfer import TRANSFER, Step, of_constant, of_parameter

_FAMILIES = ("affine", "attention", "elementwise", "layout", "normalisation", "pooling",
             "recurrent")  # fmt: skip
for _family in _FAMILIES:
    import_module(f"archlint.signal.{_family}")

# Ops after which an element is still a function of one element (up to its place) of the same
# random tensor: two such tensors depend on each other beyond their means.
_ELEMENTWISE = frozenset(
    {"activation", "arithmetic", "layout", "random", "normalisation", "softmax"}
)
# Ops whose output has the input's axes, so that what two features share stays as it is.
_KEEP_AXES = frozenset({"matmul", "einsum", "transpose", "identity", "cast", "neg", "mul", "div",
                        "slice", "split", "dropout", "softmax", "add", "masked_fill",
                        "where"})  # fmt: skip
_MIXING = frozenset({"concat", "stack", "where", "index_put", "scatter_nd", "scatter_elements"})


def of_input(value: Value) -> Signal:
    """What is assumed of an input: independent N(0,1) elements, or integers that carry nothing."""
    if value.dtype is None or "float" not in value.dtype:
        return UNKNOWN_SIGNAL
    rank = len(value.shape) if value.shape is not None else 0
    roles: tuple[Role, ...] = ()
    if rank >= 1:
        middle: tuple[Role, ...] = tuple("position" for _ in range(rank - 2))
        roles = ("sample", "feature", *middle) if rank != 3 else ("sample", "position", "feature")
        roles = roles[:rank]
    return Signal(0.0, 1.0, 0.0, 0.0, 0.0, (), 0, roles, gaussian=True, cross_correlation=0.0)


def propagate(graph: LayerGraph) -> Mapping[str, Signal]:
    """The signal of every value of a graph, unknown where an op is not understood.

    One pass in execution order; cost linear in the number of nodes.
    """
    signals: dict[str, Signal] = {}
    basis: dict[str, str] = {}
    for value in graph.values.values():
        if value.parameter is not None:
            signals[value.id] = of_parameter(graph.parameters[value.parameter])
        elif value.constant is not None:
            signals[value.id] = of_constant(value.constant)
    for id in graph.inputs:
        signals[id] = of_input(graph.values[id])
    for node in graph.nodes:
        _follow(graph, node, signals, basis)
    return signals


def _follow(
    graph: LayerGraph, node: Node, signals: dict[str, Signal], basis: dict[str, str]
) -> None:
    """Add the signals of a node's outputs."""
    transfer = TRANSFER.get(node.op)
    results: tuple[Signal, ...] = ()
    if transfer is not None:
        found = transfer(Step(graph, node, signals, basis))
        results = (found,) if isinstance(found, Signal) else tuple(found)
    for i, out in enumerate(node.outputs):
        result = results[i] if i < len(results) else UNKNOWN_SIGNAL
        if node.op not in ("reshape", "transpose", "unfold"):
            result = _with_parts(graph, node, signals, out, result)
        if result.shared and node.op not in _KEEP_AXES:
            result = result.but(shared={})
        signals[out] = result
    first = node.inputs[0] if node.inputs else None
    known = node.op in OPS and OPS[node.op].kind in _ELEMENTWISE and node.op not in _MIXING
    if first is None or not known or _picks_features(node, signals.get(first, UNKNOWN_SIGNAL)):
        return
    source = _source(graph, node, signals)
    if source is not None:
        basis.update((out, basis.get(source, source)) for out in node.outputs)


def _with_parts(
    graph: LayerGraph, node: Node, signals: Mapping[str, Signal], out: str, result: Signal
) -> Signal:
    """The output's dimensions are made of what the input's of the same size and place are."""
    shape = graph.shape(out)
    if shape is None:
        return result
    for value in node.inputs:
        x = signals.get(value or "", UNKNOWN_SIGNAL)
        before = graph.shape(value)
        if not x.parts or before is None or len(before) != len(x.parts):
            continue
        gone = _gone(node)
        left = [(n, p) for a, (n, p) in enumerate(zip(before, x.parts, strict=True))
                if a not in gone]  # fmt: skip
        left = [(None, ())] * (len(shape) - len(left)) + left if node.op == "expand" else left
        if len(left) == len(shape):
            parts = tuple(p if n == shape[a] else () for a, (n, p) in enumerate(left))
            return result.but(parts=parts, windows_share=x.windows_share)
    return result.but(parts=()) if result.parts else result


def _gone(node: Node) -> tuple[int, ...]:
    """The axes of the first input that a node does away with."""
    if node.op == "select_index":
        return (int(str(node.attributes["axis"])),)
    axes = node.attributes.get("axes")
    kept = node.attributes.get("keepdims", False)
    if node.op.startswith("reduce_") and not kept and isinstance(axes, tuple):
        return tuple(a for a in axes if isinstance(a, int))
    return ()


def _picks_features(node: Node, x: Signal) -> bool:
    """Whether a node takes some features: two such parts are different elements."""
    if node.op == "split" or node.op == "select_index":
        axes: object = (node.attributes["axis"],)
    elif node.op == "slice":
        axes = node.attributes["axes"]
    else:
        return False
    if not isinstance(axes, tuple):
        return False
    return any(a < len(x.roles) and x.roles[a] == "feature" for a in axes if isinstance(a, int))


def _source(graph: LayerGraph, node: Node, signals: Mapping[str, Signal]) -> str | None:
    """The one input that an elementwise node's output is a function of; None where it mixes two."""
    carriers = [
        v for v in node.inputs
        if v is not None and graph.values[v].parameter is None and graph.values[v].constant is None
    ]  # fmt: skip
    return carriers[0] if len(carriers) == 1 else None
