"""How much the tokens of a sequence point in the same directions, beyond what all have in common.

With K the inner products of tokens less their mean, the overlap is E K_ij²/(E K_ii)² over pairs of
different tokens: 1/n for tokens in random directions of n dimensions, more where they lie in fewer,
as sinusoids by position do. Attention leans towards keys that are alike by as much, and so does
the gradient of its queries (theory.md 9).

It has a part by chance, which a window averages over what it covers, and one by place, which it
does not. A layer with n random outputs adds 1/n by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from archlint.graph.model import LayerGraph, Node
from archlint.signal.activations import activation
from archlint.signal.dependence import Dependence
from archlint.signal.gaussian import Floats
from archlint.signal.indices import usual
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal

_LARGEST_TABLE = 1 << 22
_MOST_DEEP = 400
_PASSED = frozenset({"identity", "cast", "layer_norm", "rms_norm", "dropout", "drop_path", "neg",
                     "slice", "expand", "batch_norm", "group_norm", "instance_norm",
                     "pad"})  # fmt: skip


@dataclass(frozen=True)
class Overlap:
    """By ``chance`` and by ``place``; ``fresh``: of a table, which nothing else is made of."""

    chance: float
    place: float = 0.0
    fresh: bool = False

    @property
    def whole(self) -> float:
        """Both."""
        return min(self.chance + self.place, 1.0)


def overlap(
    graph: LayerGraph, signals: Mapping[str, Signal], dependence: Dependence, value: str
) -> Overlap | None:
    """The overlap of a value's tokens; None where its features cannot be told."""
    memory = dependence.remembered
    order, left = [], [value]
    while left:  # what is not yet known of it, in execution order
        v = left.pop()
        if ("overlap", v) in memory:
            continue
        memory["overlap", v] = None
        order.append(v)
        node = graph.producer.get(v)
        if node is not None and len(order) < _MOST_DEEP:
            left += [u for u in _followed(node) if u not in graph.static]
    for v in sorted(order, key=dependence.place):
        memory["overlap", v] = _of(graph, signals, dependence, v)
    found = memory["overlap", value]
    assert found is None or isinstance(found, Overlap)
    return found


def _followed(node: Node) -> list[str]:
    inputs = [v for v in node.inputs if v is not None]
    if node.op in ("add", "sub", "mul", "concat"):
        return inputs
    passed = node.op in _PASSED or node.op in ("linear", "conv", "reshape", "transpose")
    return inputs[:1] if passed or activation(node.op, node.attributes) is not None else []


def _width(graph: LayerGraph, signals: Mapping[str, Signal], value: str) -> int | None:
    x, shape = signals.get(value, UNKNOWN_SIGNAL), graph.shape(value)
    if shape is None or len(x.roles) != len(shape):
        return None
    sizes = [n for n, role in zip(shape, x.roles, strict=True) if role == "feature"]
    width = math.prod(n or 0 for n in sizes)
    return width if width > 1 else None


def _of(
    graph: LayerGraph, signals: Mapping[str, Signal], dependence: Dependence, value: str
) -> Overlap | None:
    width, node = _width(graph, signals, value), graph.producer.get(value)
    by_chance = Overlap(1 / width) if width else None
    if node is None:
        return by_chance

    def of(i: int) -> Overlap | None:
        v = node.inputs[i] if i < len(node.inputs) else None
        found = dependence.remembered.get(("overlap", v))
        return found if isinstance(found, Overlap) else None

    if node.op == "embedding":
        return _of_table(graph, node, width)
    x = of(0)
    if node.op in ("add", "sub"):
        return _summed(graph, signals, node, of(0), of(1), width) or by_chance
    if node.op == "mul":
        rest = [of(i) for i, v in enumerate(node.inputs) if v not in graph.static]
        return rest[0] if len(rest) == 1 and rest[0] is not None else by_chance
    if node.op == "concat" and signals.get(value, UNKNOWN_SIGNAL).roles[
        int(str(node.attributes["axis"])):][:1] == ("position",):  # fmt: skip
        longest = max(range(len(node.inputs)), key=lambda i: _size(graph, node.inputs[i]))
        return of(longest) or by_chance
    if x is None:
        return by_chance
    if node.op == "linear" and width:
        return Overlap(x.chance + 1 / width, x.place)
    if node.op == "conv" and width:
        return Overlap(x.chance / _taps(graph, node) + 1 / width, x.place)
    if node.op == "dropout" and graph.mode == "train" and node.attributes.get("training", True):
        keep = 1 - float(str(node.attributes.get("p", 0.5)))
        return Overlap(x.chance * keep**2, x.place * keep**2, x.fresh)
    phi = activation(node.op, node.attributes)
    if phi is not None:
        before, after = (signals.get(v or "", UNKNOWN_SIGNAL) for v in (node.inputs[0], value))
        kept = _kept(before, after, lambda c: phi.pair(before.mean or 0.0, before.variance or 0.0,
                                                       c))  # fmt: skip
        return by_chance if kept is None or not width else Overlap(
            x.chance * kept + (1 - kept) / width, x.place * kept)  # fmt: skip
    if node.op in _PASSED:
        return x
    old = _width(graph, signals, node.inputs[0] or "")
    if node.op not in ("reshape", "transpose") or not old or not width or width < old:
        return by_chance
    # places that become features of one, as of a patch, differ by chance
    return Overlap(x.chance * old / width, x.place, x.fresh and width == old)


def _size(graph: LayerGraph, value: str | None) -> int:
    return (graph.values[value].size or 0) if value is not None else 0


def _kept(before: Signal, after: Signal, pair: object) -> float | None:
    """The square of how far differences of K come through, over the differences of tokens."""
    assert callable(pair)
    p, p_after = before.position_correlation, after.position_correlation
    if (p is None or p_after is None or before.second_moment is None or before.mean is None
            or after.second_moment is None or not before.variance):  # fmt: skip
        return None
    free, free_after = before.second_moment * (1 - p), after.second_moment * (1 - p_after)
    if free <= 0 or free_after <= 0:
        return None
    at = p * before.second_moment - before.mean**2
    step = 1e-3 * before.variance
    if at + step > before.variance:
        return 1.0
    slope = (pair(at + step) - pair(at - step)) / (2 * step)
    return float(min((slope * free / free_after) ** 2, 1.0))


def _summed(
    graph: LayerGraph, signals: Mapping[str, Signal], node: Node, x: Overlap | None,
    y: Overlap | None, width: int | None,
) -> Overlap | None:  # fmt: skip
    """K of a sum is the sum of both, and what two in random directions have in common by chance.
    What comes of the trunk by a branch is alike where it is."""
    found: list[tuple[Overlap, float]] = []
    for o, v in ((x, node.inputs[0]), (y, node.inputs[1])):
        s = signals.get(v or "", UNKNOWN_SIGNAL)
        if v in graph.static:
            o = _of_rows(graph, v)
            if o is None:
                continue  # a bias: the same everywhere
        if o is None or s.second_moment is None or s.position_correlation is None:
            return None
        found.append((o, s.second_moment * max(1 - s.position_correlation, 0.0)))
    total = sum(e for _, e in found)
    if len(found) < 2 or total <= 0 or not width:
        return found[0][0] if found else None
    (x, a), (y, b) = found
    a, b = a / total, b / total
    related = not (x.fresh or y.fresh)
    inherited = math.sqrt(x.chance * max(y.chance - 1 / width, 0.0)) if related else 0.0
    both = math.sqrt(x.place * y.place) if related else 0.0
    return Overlap(
        a * a * x.chance + b * b * y.chance + 2 * a * b * (1 / width + inherited),
        a * a * x.place + b * b * y.place + 2 * a * b * both,
    )


def _of_table(graph: LayerGraph, node: Node, width: int | None) -> Overlap | None:
    """Rows of a table: of tokens at random, two are the same one in so many; of places, none."""
    rows = graph.shape(node.inputs[1])
    if not width or rows is None or not rows[0]:
        return None
    places = usual(graph, node.inputs[0])
    known = _rows_of(graph, node.output)
    if known is not None:
        return Overlap(0.0, _of_array(known[0] if known.ndim > 2 else known), fresh=True)
    return Overlap(1 / width, 0.0 if places is not None else 1 / rows[0], fresh=True)


def _of_rows(graph: LayerGraph, value: str | None) -> Overlap | None:
    """What is added of a table by place [..., positions, features]; None where no two rows are."""
    shape = graph.shape(value)
    if shape is None or len(shape) < 2 or shape[-1] is None or shape[-2] is None or shape[-2] < 2:
        return None
    if math.prod(n or 1 for n in shape[:-2]) != 1:
        return None
    known = _rows_of(graph, value)
    if known is None:
        return Overlap(1 / shape[-1], fresh=True)
    table = np.broadcast_to(known, [n or 1 for n in shape])
    return Overlap(0.0, _of_array(table.reshape(shape[-2], shape[-1])), fresh=True)


def _rows_of(graph: LayerGraph, value: str | None, deep: int = 0) -> Floats | None:
    """The elements of a table that is not random, or of some of its rows; None of others."""
    node, size = graph.producer.get(value or ""), graph.values[value].size if value else None
    if value is None or size is None or size > _LARGEST_TABLE or deep > 16:
        return None
    known, parameter = graph.constant(value), graph.parameter(value)
    if known is not None:
        return known.astype(np.float64)
    if parameter is not None:
        random = parameter.law is not None and parameter.law.family != "deterministic"
        if random or parameter.load is None:
            return None
        return np.asarray(parameter.load(), np.float64)
    if node is None or node.op not in ("embedding", "slice", "identity", "cast", "reshape",
                                       "expand"):  # fmt: skip
        return None
    shape = graph.shape(value)
    if node.op == "embedding":
        table, places = _rows_of(graph, node.inputs[1], deep + 1), usual(graph, node.inputs[0])
        if table is None or places is None or places.size == 0:
            return None
        inside = 0 <= places.min() <= places.max() < len(table)
        return table[places.astype(np.int64)] if inside else None
    before = _rows_of(graph, node.inputs[0], deep + 1)
    if before is None or shape is None or None in shape:
        return None
    sizes = [n or 1 for n in shape]
    if node.op == "slice":
        cuts = [slice(None)] * before.ndim
        for axis, start, end, step in zip(*(node.attributes[k] for k in (
                "axes", "starts", "ends", "steps")), strict=True):  # fmt: skip
            cuts[axis] = slice(start, end, step)
        before = before[tuple(cuts)]
    if before.size != math.prod(sizes):
        return np.broadcast_to(before, sizes) if node.op == "expand" else None
    return before.reshape(sizes)


def _of_array(rows: Floats) -> float:
    """The overlap of known tokens [tokens, features]."""
    n = len(rows)
    if n < 2 or rows.size > _LARGEST_TABLE:
        return 0.0
    free = rows - rows.mean(axis=0)
    sizes = np.square(free).sum(axis=1)
    between = free.T @ free if n > rows.shape[1] else free @ free.T
    level = float(sizes.mean())
    if level <= 0:
        return 0.0
    return max(float(np.square(between).sum() - np.square(sizes).sum()) / (n * (n - 1)), 0.0) / (
        level * level)  # fmt: skip


def _taps(graph: LayerGraph, node: Node) -> int:
    """How many places a window covers: each by weights of its own, so that two windows have
    nothing in common where they cover the same."""
    weight = graph.shape(node.inputs[1])
    return math.prod(n or 1 for n in weight[2:]) if weight is not None else 1
