"""No-ops: what copies its input, for a graph that says what it computes and nothing else."""

from __future__ import annotations

from archlint.graph.model import Node
from archlint.graph.patterns.engine import EXPONENT, MANTISSA, Found, New, Rewriter, pattern


def _drop(graph: Rewriter, node: Node, value: str | None) -> Found | str:
    if value is None:
        return "has no input"
    if graph.shape(value) != graph.shape(node.output) or graph.dtype(value) != graph.dtype(
        node.output
    ):
        return "changes the shape or the dtype"
    if graph.graph.source != "onnx" and node.module and graph.siblings(node) == 1:
        return f"is all that stands for the module {node.module}"
    return Found(None, alias=value)


@pattern("identity")
def identity(graph: Rewriter, node: Node) -> Found | str:
    """x -> x."""
    if graph.attribute(node, "stops_gradient"):
        return "stops the gradient"
    return _drop(graph, node, node.inputs[0])


@pattern("dropout", "drop_path")
def no_dropout(graph: Rewriter, node: Node) -> Found | str:
    """Dropout that drops nothing."""
    if graph.attribute(node, "p") != 0:
        return "drops something in training"
    return _drop(graph, node, node.inputs[0])


@pattern("cast")
def no_cast(graph: Rewriter, node: Node) -> Found | str:
    """A cast to the dtype the value has, or back from a dtype that holds all its numbers."""
    source = node.inputs[0]
    dropped = _drop(graph, node, source)
    if isinstance(dropped, Found) or source is None:
        return dropped
    inner = graph.maker(source)
    if inner is None or inner.op != "cast" or inner.inputs[0] is None:
        return dropped
    narrow, wide = graph.dtype(inner.inputs[0]), graph.dtype(source)
    if (
        narrow in MANTISSA
        and wide in MANTISSA
        and MANTISSA[narrow] <= MANTISSA[wide]
        and EXPONENT[narrow] <= EXPONENT[wide]
    ):
        return _drop(graph, node, inner.inputs[0])
    return f"the way over {wide} loses digits"


@pattern("reshape", "expand")
def no_reshape(graph: Rewriter, node: Node) -> Found | str:
    """A reshape to the shape the value has."""
    shape = graph.shape(node.output)
    if shape is None or None in shape:
        return "the shape is not known"
    return _drop(graph, node, node.inputs[0])


@pattern("slice")
def no_slice(graph: Rewriter, node: Node) -> Found | str:
    """A slice that takes everything."""
    shape = graph.shape(node.output)
    if shape is None or None in shape or any(s != 1 for s in graph.attribute(node, "steps")):
        return "the shape is not known, or elements are skipped"
    return _drop(graph, node, node.inputs[0])


@pattern("transpose")
def no_transpose(graph: Rewriter, node: Node) -> Found | str:
    """A transpose that leaves every axis in place, or undoes the one before it."""
    permutation = tuple(graph.attribute(node, "permutation"))
    if permutation == tuple(range(len(permutation))):
        return _drop(graph, node, node.inputs[0])
    inner = graph.maker(node.inputs[0])
    if inner is None or inner.op != "transpose":
        return "moves axes"
    first = tuple(graph.attribute(inner, "permutation"))
    if len(first) == len(permutation) and all(first[p] == i for i, p in enumerate(permutation)):
        return _drop(graph, node, inner.inputs[0])
    return "moves axes"


@pattern("add", "sub", "mul", "div", "pow")
def neutral(graph: Rewriter, node: Node) -> Found | str:
    """x + 0, x − 0, x·1, x/1, x¹."""
    neutral_number = 0.0 if node.op in ("add", "sub") else 1.0
    for x, other in graph.operands(node):
        if graph.scalar(other) == neutral_number and graph.keeps(node, x, other):
            return _drop(graph, node, x)
    return "no neutral operand"


@pattern("reshape")
def batched_transpose(graph: Rewriter, node: Node) -> Found | str:
    """The last two axes swapped while the ones before them are folded into one."""
    swap = graph.maker(node.inputs[0])
    fold = graph.maker(swap.inputs[0]) if swap is not None and swap.op == "transpose" else None
    if swap is None or fold is None or fold.op != "reshape" or fold.inputs[0] is None:
        return "no transpose between two reshapes"
    if tuple(graph.attribute(swap, "permutation")) != (0, 2, 1):
        return "other axes are swapped"
    before, after = graph.shape(fold.inputs[0]), graph.shape(node.output)
    folded = graph.shape(swap.inputs[0])
    if before is None or after is None or folded is None or None in before:
        return "a shape is not known"
    if len(before) < 3 or before[-2:] != folded[-2:]:
        return "the fold takes in the axes that are swapped"
    if len(after) < 3 or after[-2:] != (before[-1], before[-2]):
        return "the unfolded axes are others"
    order = (*range(len(after) - 2), len(after) - 1, len(after) - 2)
    unfolded = tuple(n or 0 for n in (*after[:-2], after[-1], after[-2]))
    source: str | New = fold.inputs[0]
    if unfolded != before:
        dtype = graph.dtype(fold.inputs[0])
        source = New("reshape", (source,), {"shape": unfolded}, unfolded, dtype)
    return Found(New("transpose", (source,), {"permutation": order}), (fold, swap))
