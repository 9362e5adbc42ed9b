"""Fans: how many terms an output element sums, and how many outputs an input element feeds."""

from __future__ import annotations

import math
from typing import NamedTuple

from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import attribute


class Fans(NamedTuple):
    """The fans of an affine node, counted on what is computed, not on the weight's shape.

    ``fan_in`` is the mean number of products w·x in one output element away from the border, so
    that the variance of an output is fan_in · Var w · E x² for independent zero-mean weights.
    ``fan_out`` is the mean number of outputs that one input element feeds, the same for the
    gradient. Both are averages and need not be whole: a transposed convolution with kernel 3 and
    stride 2 sums 9/4 products an input channel. ``width`` is the number of features over which
    the output's fluctuation averages: channels, never channels times positions.

    They differ from the fans of ``torch.nn.init`` for transposed convolutions (which torch counts
    on the output side, and without the stride), for the fan-out of grouped convolutions (torch
    ignores the groups) and of strided ones, and for embeddings.
    """

    fan_in: float
    fan_out: float
    width: int


def fans(node: Node, graph: LayerGraph, weight: int = 1) -> Fans | None:
    """The true fans of an affine or recurrent node; None where a size is unknown or it has none.

    ``weight`` is the position of the weight among the inputs; it matters for recurrent nodes,
    whose input weight (1) and recurrent weight (2) have fans of their own.

    With k the kernel's number of taps, s the product of the strides, g the groups:
    linear, grouped or not: in, out. Convolution: k·C_in/g, k·C_out/(g·s). Transposed convolution,
    its mirror image: k·C_in/(g·s), k·C_out/g. Bilinear: in1·in2, out·in2 (for the first input).
    Embedding: 1, features. Recurrent: in (or hidden), gates·hidden.
    """
    position = 2 if node.op == "bilinear" and weight == 1 else weight
    if node.op == "embedding":
        position = 1
    if position >= len(node.inputs):
        return None
    shape = graph.shape(node.inputs[position])
    if shape is None or any(n is None for n in shape):
        return None
    return _of(node, tuple(n for n in shape if n is not None))


def _of(node: Node, shape: tuple[int, ...]) -> Fans | None:
    match node.op, len(shape):
        case "linear", 2:
            axis = attribute("linear", node.attributes, "input_axis")
            inside, outside = (shape[1], shape[0]) if axis == 1 else (shape[0], shape[1])
            return Fans(inside, outside, outside)
        case "grouped_linear", 3:
            axis = attribute("grouped_linear", node.attributes, "input_axis")
            inside, outside = (shape[1], shape[2]) if axis == 1 else (shape[2], shape[1])
            return Fans(inside, outside, outside)
        case "conv", rank if rank > 2:
            groups, stride = _groups(node), _stride(node)
            taps = math.prod(shape[2:])
            return Fans(taps * shape[1], taps * shape[0] / (groups * stride), shape[0])
        case "conv_transpose", rank if rank > 2:
            groups, stride = _groups(node), _stride(node)
            taps = math.prod(shape[2:])
            return Fans(taps * shape[0] / (groups * stride), taps * shape[1], shape[1] * groups)
        case "bilinear", 3:
            out, first, second = shape
            return Fans(first * second, out * second, out)
        case "embedding", 2:
            return Fans(1, shape[1], shape[1])
        case (("rnn" | "gru" | "lstm"), 3):
            hidden = attribute(node.op, node.attributes, "hidden")
            return Fans(shape[2], shape[1], int(str(hidden)))
    return None


def _groups(node: Node) -> int:
    groups = attribute(node.op, node.attributes, "groups")
    return groups if isinstance(groups, int) else 1


def _stride(node: Node) -> int:
    product = 1
    stride = node.attributes["stride"]
    for step in stride if isinstance(stride, tuple) else ():
        product *= step if isinstance(step, int) else 1
    return product
