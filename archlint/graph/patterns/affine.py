"""Affine maps: the product with a weight, and the bias added after it."""

from __future__ import annotations

from archlint.graph.model import Node
from archlint.graph.patterns.engine import Found, New, Rewriter, pattern


@pattern("matmul")
def linear(graph: Rewriter, node: Node) -> Found | str:
    """x·W, or x·Wᵀ through a transpose, with a matrix W that is a parameter."""
    x, weight = node.inputs[:2]
    axis = 0
    held = graph.parameter(weight)
    if held is None:
        turned = graph.made_by(weight, "transpose")
        if turned is None or tuple(graph.attribute(turned, "permutation")) != (1, 0):
            return "the right operand is no parameter"
        weight, axis = turned.inputs[0], 1
        held = graph.parameter(weight)
    if held is None or len(held.shape) != 2:
        return "the right operand is no matrix of weights"
    if graph.parameter(x) is not None:
        return "both operands are parameters"
    if graph.shape(x) is None or len(graph.shape(x) or ()) < 1:
        return "the rank of x is not known"
    return Found(New("linear", (x, weight), {"input_axis": axis}))


@pattern("add")
def bias(graph: Rewriter, node: Node) -> Found | str:
    """The parameter added after a linear map or a convolution without bias."""
    reason = "no operand is an affine map"
    for product, value in graph.operands(node):
        affine = graph.producer(product)
        if affine is None or affine.op not in ("linear", "conv", "conv_transpose"):
            continue
        if len(affine.inputs) > 2 and affine.inputs[2] is not None:
            reason = "the map has its bias already"
            continue
        if graph.parameter(value) is None and graph.constant(value) is None:
            reason = "what is added is computed"
            continue
        if graph.uses(affine.output) != 1 or graph.uses(product) != 1:
            reason = "the product has other readers"
            continue
        shape, held = graph.shape(product), graph.shape(value)
        if shape is None or held is None or graph.shape(node.output) != shape:
            reason = "the operands broadcast, or a shape is not known"
            continue
        axis = len(shape) - 1 if affine.op == "linear" else 1
        channels = shape[axis]
        wanted = tuple(channels if i == axis else 1 for i in range(len(shape)))
        if channels is None or (1,) * (len(shape) - len(held)) + tuple(held) != wanted:
            reason = "what is added is not one number a feature"
            continue
        declared = graph.declare(value, (channels,))
        if declared is None:
            reason = "the parameter has other readers"
            continue
        return Found(
            New(affine.op, (affine.inputs[0], affine.inputs[1], declared), affine.attributes),
            (affine,),
        )
    return reason


@pattern("linear", "conv", "conv_transpose")
def zero_bias(graph: Rewriter, node: Node) -> Found | str:
    """A bias that is the constant zero, which an exporter puts where there is none."""
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return "has no bias"
    spread = graph.made_by(node.inputs[2], "expand", "reshape")
    value = spread.inputs[0] if spread is not None else node.inputs[2]
    if graph.scalar(value) != 0.0:
        return "the bias is not the constant zero"
    return Found(New(node.op, node.inputs[:2], node.attributes))


@pattern("gather")
def embedding(graph: Rewriter, node: Node) -> Found | str:
    """Rows of a parameter picked by integers that are computed."""
    weight, ids = node.inputs[:2]
    held = graph.parameter(weight)
    if held is None or len(held.shape) != 2:
        return "what is gathered from is no matrix of weights"
    if int(graph.attribute(node, "axis")) != 0:
        return "not rows"
    if graph.constant(ids) is not None:
        return "the rows are the same for every input"
    return Found(New("embedding", (ids, weight)))
