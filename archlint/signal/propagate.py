"""The abstract interpreter: signals from the inputs to the outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import import_module

from archlint.graph.model import LayerGraph, Node, Value
from archlint.graph.ops import OPS
from archlint.signal.dependence import Dependence
from archlint.signal.moments import UNKNOWN_SIGNAL, Role, Signal
from archlint.signal.neighbourhood import with_neighbours
from archlint.signal.ranking import slots
from archlint.signal.transfer import TRANSFER, Step, of_constant, of_parameter

_FAMILIES = ("affine", "attention", "elementwise", "layout", "normalisation", "pooling",
             "recurrent")  # fmt: skip
for _family in _FAMILIES:
    import_module(f"archlint.signal.{_family}")

# Ops whose output has the input's axes, so that what two features share stays as it is.
_KEEP_AXES = frozenset({"matmul", "einsum", "transpose", "identity", "cast", "neg", "mul", "div",
                        "slice", "split", "dropout", "softmax", "add", "masked_fill",
                        "where", "expand", "tile"})  # fmt: skip

# Ops after which an element has the law that is told of it.
_KEEP_LAW = frozenset({"add", "sub", "mul", "div", "neg", "reshape", "transpose", "identity",
                       "cast", "expand", "slice", "split", "batch_norm",
                       *(name for name, op in OPS.items() if op.kind == "activation")})  # fmt: skip

_TELL_PARTS = frozenset({"reshape", "transpose", "unfold"})  # what dimensions are made of


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
    return Signal(0.0, 1.0, 0.0, 0.0, (), 0, roles, gaussian=True, cross_correlation=0.0)


def propagate(graph: LayerGraph) -> Mapping[str, Signal]:
    """The signal of every value of a graph, unknown where an op is not understood.

    One pass in execution order; cost linear in the number of nodes.
    """
    signals: dict[str, Signal] = {}
    dependence = Dependence(graph)
    for value in graph.values.values():
        if value.parameter is not None:
            signals[value.id] = of_parameter(graph.parameters[value.parameter])
        elif value.constant is not None:
            signals[value.id] = of_constant(value.constant)
    for id in graph.inputs:
        signals[id] = of_input(graph.values[id])
    for node in graph.nodes:
        _follow(graph, node, signals, dependence)
    return signals


def _follow(
    graph: LayerGraph, node: Node, signals: dict[str, Signal], dependence: Dependence
) -> None:
    """Add the signals of a node's outputs."""
    transfer = TRANSFER.get(node.op)
    results: tuple[Signal, ...] = ()
    if transfer is not None:
        found = transfer(Step(graph, node, signals, dependence))
        results = (found,) if isinstance(found, Signal) else tuple(found)
    for i, out in enumerate(node.outputs):
        result = results[i] if i < len(results) else UNKNOWN_SIGNAL
        if node.op not in _TELL_PARTS and not (node.op == "gather" and slots(graph, node)):
            result = _with_parts(graph, node, signals, out, result)
        if result.shared and node.op not in _KEEP_AXES:
            result = result.but(shared={})
        if result.law is not None and node.op not in _KEEP_LAW:
            result = result.but(law=None)
        if i == 0 or node.op == "split":
            result = with_neighbours(graph, node, signals, dependence, result)
        signals[out] = _of_numbers(result)
    dependence.follow(node, signals)


def _of_numbers(s: Signal) -> Signal:
    """What came out as ∞ − ∞ or 0·∞ is not known."""
    if _is_nan(s.mean) or _is_nan(s.second_moment):
        return Signal(roles=s.roles)
    for name in ("position_correlation", "sample_correlation", "cross_correlation"):
        if _is_nan(getattr(s, name)):
            s = s.but(**{name: None})
    return s


def _is_nan(x: float | None) -> bool:
    return x is not None and math.isnan(x)


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
