"""Softmax and log-softmax by their formulas, and with their axis moved out of the way."""

from __future__ import annotations

from archlint.graph.model import Node
from archlint.graph.patterns.engine import Found, New, Rewriter, close, pattern
from archlint.graph.patterns.normalisation import _kept


def _shifted(graph: Rewriter, value: str, axis: int) -> tuple[str, tuple[Node, ...]]:
    """(x, nodes) where the value is x minus its maximum over the axis; else the value itself."""
    node = graph.made_by(value, "sub")
    if node is not None and node.inputs[0] is not None:
        top = _kept(graph, node.inputs[1], "reduce_max")
        if top is not None and top[1] == (axis,) and graph.same(top[0].inputs[0], node.inputs[0]):
            return node.inputs[0], (node, top[0])
    return value, ()


def _sum_of_exp(graph: Rewriter, value: str | None) -> tuple[str, int, tuple[Node, ...]] | None:
    """(t, axis, nodes) where the value is Σ exp(t) over an axis, kept as one."""
    total = _kept(graph, value, "reduce_sum")
    exp = graph.made_by(total[0].inputs[0], "exp") if total is not None else None
    if total is None or exp is None or len(total[1]) != 1 or exp.inputs[0] is None:
        return None
    return exp.inputs[0], total[1][0], (total[0], exp)


@pattern("div", "mul")
def softmax(graph: Rewriter, node: Node) -> Found | str:
    """exp(x)/Σ exp(x), with or without the maximum taken out first."""
    for a, b in graph.operands(node):
        below = b
        if node.op == "mul":
            inverse = graph.made_by(b, "reciprocal")
            if inverse is None or inverse.inputs[0] is None:
                continue
            below = inverse.inputs[0]
        exp, total = graph.made_by(a, "exp"), _sum_of_exp(graph, below)
        if exp is None or total is None or not graph.same(exp.inputs[0], total[0]):
            continue
        if graph.shape(a) != graph.shape(node.output):
            continue
        x, nodes = _shifted(graph, total[0], total[1])
        return Found(New("softmax", (x,), {"axis": total[1]}), (*nodes, *total[2]))
    return "not exp(x) over the sum of the same"


@pattern("softmax", "log_softmax")
def shifted_softmax(graph: Rewriter, node: Node) -> Found | str:
    """softmax(x − max x)."""
    x = node.inputs[0]
    inner, nodes = _shifted(graph, x, int(graph.attribute(node, "axis"))) if x else (x, ())
    if not nodes:
        return "no maximum is taken out"
    return Found(New(node.op, (inner,), node.attributes), nodes)


@pattern("log")
def log_softmax(graph: Rewriter, node: Node) -> Found | str:
    """log(softmax(x))."""
    inner = graph.made_by(node.inputs[0], "softmax")
    if inner is None:
        return "not the logarithm of a softmax"
    return Found(New("log_softmax", (inner.inputs[0],), inner.attributes), (inner,))


@pattern("sub")
def log_softmax_by_difference(graph: Rewriter, node: Node) -> Found | str:
    """x − logsumexp(x), or t − log Σ exp(t)."""
    x, below = node.inputs[:2]
    if x is None or graph.shape(x) != graph.shape(node.output):
        return "the operands broadcast"
    whole = _kept(graph, below, "reduce_logsumexp")
    if whole is not None and len(whole[1]) == 1 and graph.same(whole[0].inputs[0], x):
        inner, nodes = _shifted(graph, x, whole[1][0])
        return Found(New("log_softmax", (inner,), {"axis": whole[1][0]}), (*nodes, whole[0]))
    log = graph.made_by(below, "log")
    total = _sum_of_exp(graph, log.inputs[0]) if log is not None else None
    if log is None or total is None or not graph.same(total[0], x):
        return "the subtrahend is not the log-sum-exp of the minuend"
    inner, nodes = _shifted(graph, total[0], total[1])
    return Found(New("log_softmax", (inner,), {"axis": total[1]}), (*nodes, log, *total[2]))


@pattern("transpose")
def moved_axis(graph: Rewriter, node: Node) -> Found | str:
    """An axis moved to the end for a softmax that could work on no other, and back."""
    inner = graph.made_by(node.inputs[0], "softmax", "log_softmax")
    before = graph.made_by(inner.inputs[0], "transpose") if inner is not None else None
    if inner is None or before is None:
        return "no softmax between two transposes"
    there = tuple(graph.attribute(before, "permutation"))
    back = tuple(graph.attribute(node, "permutation"))
    if len(there) != len(back) or any(there[b] != i for i, b in enumerate(back)):
        return "the transposes do not undo each other"
    if graph.uses(inner.output) != 1:
        return "the transposed softmax has other readers"
    axis = there[int(graph.attribute(inner, "axis"))]
    return Found(New(inner.op, (before.inputs[0],), {"axis": axis}), (inner, before))


@pattern("div", "mul")
def mean_by_sum(graph: Rewriter, node: Node) -> Found | str:
    """A sum over axes divided by their number of elements."""
    step = graph.times(node)
    total = graph.made_by(step[0], "reduce_sum") if step is not None else None
    if step is None or total is None:
        return "no multiple of a sum"
    shape, count = graph.shape(total.inputs[0]), 1
    for axis in graph.axes(total):
        n = shape[axis] if shape is not None else None
        if n is None:
            return "the number of elements is not known"
        count *= n
    if count == 0 or not close(step[1] * count, 1.0) or abs(step[1] * count - 1.0) > 1e-5:
        return "the number is not that of the elements"
    return Found(New("reduce_mean", (total.inputs[0],), total.attributes), (total,))
