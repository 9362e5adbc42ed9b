"""What a softmax sees: keys that a mask hides, and what constants add to the logits.

A constant bias, such as one that falls with distance (Press et al. 2022, "ALiBi"), and a mask of
minus infinity give every key a weight w before the logits' own differences do, Σ w = 1. Of these
differences the weights are averages over as many keys as 1/Σw² tells.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from archlint.graph.model import Array, LayerGraph, Node
from archlint.signal.gaussian import Floats
from archlint.signal.indices import usual
from archlint.signal.transfer import Step

MASKED = -1e4  # an added constant below this stands for minus infinity: a softmax leaves it out
_HIDDEN = -1e30
_EACH = 64  # queries under a causal mask up to which each is evaluated
_STEPS = 14  # lengths at which a longer one is, in geometric steps
_LONGEST = 65536  # queries of which a profile is kept
_MOST_ELEMENTS = 1 << 22  # of a mask that is looked at
_FINE = 24  # groups by the number of keys, to a factor of two
_MOST_DEEP = 24


@dataclass(frozen=True, eq=False)
class Seen:
    """``groups``: (number of keys, share of the queries that see so many, share of the pairs of
    queries of which the one that sees more sees so many). ``pairs``: Σ w w′ of two queries over
    what the groups tell, Σ share/number. ``rows``: the number of keys along the queries, where it
    differs; ``squares``: w² by query and key, where it is not all the same."""

    groups: tuple[tuple[float, float, float], ...]
    pairs: float = 1.0
    rows: Floats | None = None
    squares: Floats | None = None


def everything(keys: int) -> Seen:
    """All keys are seen alike."""
    return Seen(((float(keys), 1.0, 1.0),))


def causal(queries: int, keys: int) -> Seen:
    """The last query sees all keys, each before it one less."""
    first = max(keys - queries + 1, 1)
    counts: list[tuple[float, int]]
    if keys - first < _EACH:
        counts = [(float(n), 1) for n in range(first, keys + 1)]
    else:
        edges = np.unique(np.geomspace(first, keys + 1, _STEPS + 1).round().astype(int))
        counts = [((int(a) + int(b)) / 2, int(b) - int(a)) for a, b in itertools.pairwise(edges)]
    rows = np.arange(first, keys + 1, dtype=np.float64)
    known = rows.size == queries <= _LONGEST
    squares = None
    if known and queries * keys <= _MOST_ELEMENTS:
        places = np.arange(keys)
        squares = (places[None, :] < rows[:, None]) / rows[:, None] ** 2
    return Seen(_grouped(counts), 1.0, rows if known else None, squares)


def _grouped(counts: Sequence[tuple[float, int]]) -> tuple[tuple[float, float, float], ...]:
    """Shares of queries and of pairs from (number of keys, how many queries see so many)."""
    rows = sum(n for _, n in counts)
    found, below = [], 0
    for keys, n in counts:
        # of two queries the one that sees more keys gives each the smaller weight
        pairs = (n * (n - 1) + 2 * n * below) / (rows * (rows - 1)) if rows > 1 else 1.0
        found.append((keys, n / rows, pairs))
        below += n
    return tuple(found)


def seen(step: Step, mask: str | None, queries: int, keys: int) -> tuple[Seen, str | None]:
    """What constants in ``mask``, added to logits or such logits themselves, let queries see, and
    the value that is left of it without them: None where nothing is."""
    if mask is None:
        return everything(keys), None
    memory = step.dependence.remembered
    others: list[str] = []
    key = ("mask", _signature(step.graph, mask, others, 0), queries, keys)
    if key not in memory:  # the same in every layer
        fixed, rest = _parts(step.graph, mask, 0)
        look = everything(keys) if fixed is None else of_array(fixed, queries, keys)
        place = -1 if rest is None else others.index(rest) if rest in others else None
        if place is None:
            return look, rest
        memory[key] = look, place
    found = memory[key]
    assert isinstance(found, tuple)
    return found[0], None if found[1] < 0 else others[found[1]]


_FOLLOWED = frozenset({"identity", "cast", "add", "maximum", "mul", "where", "masked_fill",
                       "concat", "reshape", "expand"})  # fmt: skip


def _signature(graph: LayerGraph, value: str, others: list[str], deep: int) -> object:
    """How a value is made of constants and of ``others``, which are listed."""
    known = graph.constant(value)
    if known is not None:  # numbers have names of their own in every layer
        return float(known.reshape(-1)[0]) if known.size == 1 else value
    node = graph.producer.get(value)
    if node is None or node.op not in _FOLLOWED or deep > _MOST_DEEP or value != node.output:
        others.append(value)
        return "other", len(others)
    if node.op in ("add", "mul", "maximum") and not any(
            v is not None and _is_known(graph, v, 2 if node.op == "mul" else 1)
            for v in node.inputs):  # fmt: skip
        others.append(value)
        return "other", len(others)
    made = tuple(None if v is None else _signature(graph, v, others, deep + 1)
                 for v in node.inputs)  # fmt: skip
    return node.op, graph.shape(value), tuple(sorted(node.attributes.items())), made


def _is_known(graph: LayerGraph, value: str, least: int = 1) -> bool:
    """Whether a value is constants of a size, or a sum or layout of such and other things."""
    left, count = [value], 0
    while left and count < _MOST_DEEP:
        at = left.pop()
        count += 1
        known = graph.constant(at)
        if known is not None and known.size >= least:
            return True
        node = graph.producer.get(at)
        if node is not None and node.op in _FOLLOWED and at == node.output:
            left += [v for v in node.inputs if v is not None]
    return False


def of_array(fixed: Array, queries: int, keys: int) -> Seen:
    """What a constant that is added to the logits [..., queries, keys] lets queries see."""
    shape = (*fixed.shape[:-2], queries, keys) if fixed.ndim > 1 else (1, keys)
    logits = np.broadcast_to(fixed, shape)
    choose = np.random.default_rng(0)
    if logits.size > _MOST_ELEMENTS:  # some rows stand for all
        places = choose.integers(0, queries, min(256, queries)) if logits.ndim > 1 else [0]
        logits = logits[..., np.sort(places), :]
    flat = logits.reshape(-1, *logits.shape[-2:])
    most = max(_MOST_ELEMENTS // (flat.shape[1] * flat.shape[2]), 1)
    if len(flat) > most:
        flat = flat[np.sort(choose.choice(len(flat), most, replace=False))]
    flat = flat.astype(np.float64)
    flat = np.maximum(flat, 2 * _HIDDEN)  # minus infinity
    weights = np.exp(flat - flat.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    squares = np.square(weights).sum(-1)  # [others, queries]
    own, count = float(squares.mean()), weights.shape[1]
    groups = _grouped(_counted(1 / squares))
    if count < 2:
        return Seen(groups)
    summed = np.square(weights.sum(axis=1)).sum(-1).mean() / count
    other = float((summed - own) / (count - 1))
    told = sum(p / n for n, _, p in groups)
    whole = count == queries <= _LONGEST
    rows = 1 / squares.mean(axis=0) if whole else None
    uneven = rows is not None and rows.max() > rows.min() * (1 + 1e-6)
    return Seen(groups, other / told if told > 0 else 1.0, rows if uneven else None,
                np.square(weights).mean(axis=0) if whole else None)  # fmt: skip


def _counted(numbers: Floats) -> list[tuple[float, int]]:
    """(number of keys, how many) in groups of nearly equal numbers."""
    bins = np.round(np.log2(numbers) * _FINE).astype(int).reshape(-1)
    found = []
    for b in np.unique(bins):
        inside = numbers.reshape(-1)[bins == b]
        found.append((float(f"{1 / (1 / inside).mean():.4g}"), int(inside.size)))
    return found


def _parts(graph: LayerGraph, value: str, deep: int) -> tuple[Array | None, str | None]:
    """(the constants that a value is a sum with, what else it is made of): they add up to it."""
    known = usual(graph, value)
    if known is not None:
        if known.dtype.kind == "b":  # of booleans those that are true are seen
            return np.where(known, 0.0, _HIDDEN), None
        return known.astype(np.float64), None
    node = graph.producer.get(value)
    if node is None or deep > _MOST_DEEP or value != node.output:
        return None, value
    fixed, rest = _split(graph, node, deep + 1)
    return (None, value) if fixed is None else (fixed, rest)


def _split(graph: LayerGraph, node: Node, deep: int) -> tuple[Array | None, str | None]:
    def parts(i: int) -> tuple[Array | None, str | None]:
        v = node.inputs[i]
        return (None, None) if v is None else _parts(graph, v, deep)

    shape = graph.shape(node.output)
    nothing = None, node.output
    if node.op in ("identity", "cast"):
        return parts(0)
    if node.op == "add":
        (a, x), (b, y) = parts(0), parts(1)
        if x is not None and y is not None:
            return nothing
        return _sum(a, b), x if x is not None else y
    if node.op == "maximum":  # no less than the least number
        (a, x), (b, y) = parts(0), parts(1)
        for one, rest, floor in ((a, x, b), (b, y, a)):
            if floor is not None and floor.size == 1 and float(floor.reshape(-1)[0]) < MASKED:
                return one, rest
        return nothing
    if node.op == "mul":  # what a mask of ones and zeros leaves
        (a, x), (b, y) = parts(0), parts(1)
        for one, rest, chosen in ((a, x, b), (b, y, a)):
            binary = chosen is not None and chosen.size > 1 and np.isin(chosen, (0, 1)).all()
            if binary and rest is not None:
                return np.zeros(1) if one is None else np.asarray(one * chosen), rest
        return nothing
    if node.op in ("where", "masked_fill"):
        return _chosen(graph, node, parts)
    if node.op == "concat" and shape is not None and node.attributes.get("axis") == len(shape) - 1:
        return _beside(graph, node, [parts(i) for i in range(len(node.inputs))])
    if node.op in ("reshape", "expand") and shape is not None and None not in shape:
        fixed, rest = parts(0)
        before = graph.shape(node.inputs[0])
        sizes = [n or 1 for n in shape]
        if fixed is None or before is None or None in before or math.prod(sizes) > _MOST_ELEMENTS:
            return nothing
        if node.op == "expand":
            return np.broadcast_to(fixed, sizes), rest
        if before[-2:] != shape[-2:]:
            return nothing
        return np.broadcast_to(fixed, [n or 1 for n in before]).reshape(sizes), rest
    return nothing


def _beside(
    graph: LayerGraph, node: Node, parts: Sequence[tuple[Array | None, str | None]]
) -> tuple[Array | None, str | None]:
    """Logits beside others that no key has, such as a sink."""
    sizes = [graph.shape(v) for v in node.inputs]
    masked = [i for i, (fixed, rest) in enumerate(parts) if fixed is not None and rest is not None]
    if len(masked) != 1:
        return None, node.output
    arrays = []
    for (fixed, _), shape in zip(parts, sizes, strict=True):
        if shape is None or None in shape:
            return None, node.output
        whole = [n or 1 for n in shape]
        if math.prod(whole) > _MOST_ELEMENTS:
            return None, node.output
        arrays.append(np.zeros(whole) if fixed is None else np.broadcast_to(fixed, whole))
    return np.concatenate(arrays, axis=-1), parts[masked[0]][1]


def _sum(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    with np.errstate(over="ignore"):
        return np.asarray(a + b)


def _chosen(graph: LayerGraph, node: Node, parts: object) -> tuple[Array | None, str | None]:
    """A choice by a known mask between something and minus infinity."""
    assert callable(parts)
    of_mask = usual(graph, node.inputs[0 if node.op == "where" else 1])
    if of_mask is None:
        return None, node.output
    mask = of_mask.astype(bool)
    first, second = (1, 2) if node.op == "where" else (2, 0)
    (a, x), (b, y) = parts(first), parts(second)
    for hidden, one, rest, left in ((a, b, y, ~mask), (b, a, x, mask)):
        if hidden is None or float(hidden.max()) >= MASKED:
            continue
        return np.where(left, 0.0 if one is None else one, _HIDDEN), rest
    return None, node.output
