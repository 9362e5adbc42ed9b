"""Pooling whose padding is spelled as a node of its own."""

from __future__ import annotations

from archlint.graph.model import Node
from archlint.graph.patterns.engine import LARGE, Found, New, Rewriter, pattern


@pattern("max_pool")
def padded_max_pool(graph: Rewriter, node: Node) -> Found | str:
    """max_pool(pad(x, −∞)) -> max_pool with that padding: timm's and TensorFlow's "same"."""
    pad = graph.made_by(node.inputs[0], "pad")
    if pad is None or graph.attribute(pad, "mode") != "constant" or pad.inputs[0] is None:
        return "its input is not padded"
    fill = graph.scalar(pad.inputs[1]) if len(pad.inputs) > 1 else None
    if fill is None or fill > -LARGE:
        return "the padding may be the maximum of a window"
    if graph.attribute(node, "ceil") or len(node.outputs) > 1:
        return "where windows are counted or places told the two differ"
    kernel, around = graph.attribute(node, "kernel"), tuple(graph.attribute(pad, "padding"))
    n, rank = len(kernel), len(around) // 2
    begins, ends = around[:rank], around[rank:]
    if any(begins[: rank - n]) or any(ends[: rank - n]) or min(around) < 0:
        return "other axes are padded, or something is cut off"
    more = (*begins[rank - n :], *ends[rank - n :])
    padding = tuple(a + b for a, b in zip(graph.attribute(node, "padding"), more, strict=True))
    return Found(New("max_pool", (pad.inputs[0],), {**node.attributes, "padding": padding}), (pad,))
