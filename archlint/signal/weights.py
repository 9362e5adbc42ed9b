"""The weights of affine maps, and what follows them; shared by the rules about initialization."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from archlint.finding import NotApplicable
from archlint.graph.fans import Fans, fans
from archlint.graph.model import LayerGraph, Node, Parameter
from archlint.graph.ops import OPS
from archlint.signal.structure import Layer, Segment
from archlint.wording import paths, stretch

_POSITION = {"linear": 1, "conv": 1, "conv_transpose": 1, "bilinear": 2}
_STEPS = 8  # nodes looked at between an affine map and what rescales its output


class Weighted(NamedTuple):
    """An affine map whose weight is a parameter of the network, with its true fans."""

    node: Node
    weight: Parameter
    fans: Fans


def weighted(graph: LayerGraph) -> Iterator[Weighted]:
    """Every affine map with a parameter for its weight, in execution order."""
    for node in graph.nodes:
        position = _POSITION.get(node.op)
        if position is None or position >= len(node.inputs):
            continue
        weight = graph.parameter(node.inputs[position])
        found = fans(node, graph) if weight is not None else None
        if weight is not None and found is not None:
            yield Weighted(node, weight, found)


def rescaled_by(graph: LayerGraph, node: Node) -> Node | None:
    """The normalisation or softmax that an affine map's output reaches before anything else that
    mixes features or adds; None where its scale matters."""
    for _ in range(_STEPS):
        after = graph.consumers.get(node.output, ())
        if len(after) != 1:
            return None
        node = after[0]
        kind = OPS[node.op].kind if node.op in OPS else ""
        if kind in ("normalisation", "softmax"):
            return node
        fixed = any(v in graph.static for v in node.inputs if v is not None)
        shifts = node.op in ("add", "sub", "mul", "div") and fixed  # or scales
        if kind not in ("layout", "activation", "random", "pooling") and not shifts:
            return None
    return None


class OffScale(NamedTuple):
    """Layers of a stretch whose weights are off by a known factor, and log10 of the factors'
    product on the squared length."""

    layers: tuple[Layer, ...]
    decades: float


def off_scale(
    segment: Segment, factor: Callable[[Layer], float | None], least: float, what: str
) -> OffScale | NotApplicable:
    """Judge a stretch by the log10 factors that its layers are off by (None for one that is not).

    ``least`` is the size in decades from which on the product counts; ``what`` names the layers.
    """
    where = stretch(paths(layer.node for layer in segment.layers))
    if segment.ends in ("norm", "softmax"):
        return NotApplicable(f"it ends in a {segment.ends}: its scale does not matter", where)
    found = [(layer, off) for layer in segment.layers if (off := factor(layer)) is not None]
    total = sum(off for _, off in found)
    if not found or abs(total) < least:
        return NotApplicable(f"its {what}s have the right scale", where)
    return OffScale(tuple(layer for layer, _ in found), total)
