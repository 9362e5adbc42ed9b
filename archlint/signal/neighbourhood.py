"""What neighbours have in common in what a node makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import OPS
from archlint.signal.dependence import Dependence
from archlint.signal.joint import stacked
from archlint.signal.mixing import MAPS
from archlint.signal.moments import UNKNOWN_SIGNAL, Nearby, Signal
from archlint.signal.neighbours import (
    Displaced,
    along_line,
    of_each,
    side_by_side,
    sizes_of,
    summed,
    transposed,
)
from archlint.signal.transfer import TRANSFER, Step

_TELL_THEMSELVES = frozenset({*MAPS, "max_pool"})


def with_neighbours(
    graph: LayerGraph, node: Node, signals: Mapping[str, Signal], dependence: Dependence, y: Signal
) -> Signal:  # fmt: skip
    """The output with what its neighbours have in common, from those of its inputs."""
    if node.op in _TELL_THEMSELVES:
        return y
    if y.nearby is not None and node.op in ("add", "sub"):  # found with the sum (signal.joint)
        return y
    if stacked(graph, node) and y.second_moment is not None:
        return y.but(nearby=_of_stack(graph, node, signals, y))
    inputs = [signals.get(v or "", UNKNOWN_SIGNAL) for v in node.inputs]
    fields = [x.nearby for x in inputs if x.nearby is not None]
    if not fields or not y.known:
        return y if y.nearby is None else y.but(nearby=None)
    return y.but(nearby=_neighbours(graph, node, signals, dependence, y, inputs[0], fields))


def _neighbours(
    graph: LayerGraph, node: Node, signals: Mapping[str, Signal], dependence: Dependence,
    y: Signal, x: Signal, fields: Sequence[Nearby],
) -> Nearby | None:  # fmt: skip
    kind = OPS[node.op].kind if node.op in OPS else ""
    axes = fields[0].axes
    if node.op == "transpose" and x.nearby is not None:
        return transposed(x.nearby, node.attributes["permutation"])
    if node.op in ("identity", "cast"):
        return x.nearby
    if node.op in ("slice", "split") and x.nearby is not None:
        along = node.attributes["axes"] if node.op == "slice" else (node.attributes["axis"],)
        return x.nearby if isinstance(along, tuple) and set(axes).isdisjoint(along) else None
    if any(a >= len(y.roles) or y.roles[a] != "position" for a in axes):
        return None
    if kind in ("activation", "arithmetic", "random") and not node.op.startswith("cum"):
        transfer = TRANSFER[node.op]

        def evaluate(shift: tuple[int, ...] | None) -> float | None:
            found = transfer(Step(graph, node, Displaced(signals, axes, shift), dependence))
            return (found if isinstance(found, Signal) else found[0]).position_correlation

        return of_each(fields, evaluate)
    if node.op == "concat":
        return _side_by_side(graph, node, signals, y, axes)
    line = node.op in ("linear", "conv") or kind == "normalisation"
    if not line or x.nearby is None or x.position_correlation is None:
        return None
    if y.position_correlation is None:
        return None
    stride = node.attributes.get("stride") if node.op == "conv" else None
    steps = [int(str(n)) for n in stride] if isinstance(stride, tuple) else None
    return along_line(x.nearby, x.position_correlation, y.position_correlation, steps)


def _of_stack(
    graph: LayerGraph, node: Node, signals: Mapping[str, Signal], y: Signal
) -> Nearby | None:  # fmt: skip
    """Of a sum or mean over tensors of a stack: what each tells, and beside it what all positions
    have in common."""
    made = graph.producer[node.inputs[0] or ""]
    parts = [signals.get(v or "", UNKNOWN_SIGNAL) for v in made.inputs]
    axes = next((x.nearby.axes for x in parts if x.nearby is not None), None)
    sizes = None if axes is None else sizes_of(graph.shape(node.output), axes)
    if axes is None or sizes is None or y.second_moment is None:
        return None
    share = 1 / len(parts) ** 2 if node.op == "reduce_mean" else 1.0
    whole = summed([(x, share) for x in parts], axes, sizes)
    return None if whole is None else (
        whole.shifted(y.second_moment - whole.second).nearby(axes))  # fmt: skip


def _side_by_side(
    graph: LayerGraph, node: Node, signals: Mapping[str, Signal], y: Signal, axes: tuple[int, ...]
) -> Nearby | None:
    """Of features side by side, by their share of the second moment."""
    at, sizes = int(str(node.attributes["axis"])), sizes_of(graph.shape(node.output), axes)
    if sizes is None or at >= len(y.roles) or y.roles[at] != "feature":
        return None
    parts = [signals.get(v or "", UNKNOWN_SIGNAL) for v in node.inputs]
    counts = [(graph.shape(v) or (None,) * 9)[at] for v in node.inputs]
    known = [n for n in counts if n is not None]
    if len(known) < len(parts):
        return None
    return side_by_side(list(zip(parts, known, strict=True)), axes, sizes)
