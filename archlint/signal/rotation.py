"""Rotary embeddings: x·cos θ + (−x₂, x₁)·sin θ turns pairs of features by angles of their position.

A rotation keeps E x² whatever the angles (Su et al. 2021). Two positions p, p′ are turned against
each other by (p − p′)f_k, so that what they share is multiplied by the mean cosine of that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from archlint.graph.model import Array, Node
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.transfer import Step, known_size

_MOVES = frozenset({"reshape", "expand", "cast", "identity", "transpose", "tile", "slice",
                    "select_index", "gather"})  # fmt: skip
_MOST = 10  # nodes looked back over
_BASE = 10_000.0  # f_k = base^(−k/n): the usual choice


def turned(x: Signal, positions: int, features: int) -> Signal:
    """A rotated tensor. The frequencies are taken to be the usual geometric ones, which matters
    for what positions share and for nothing else."""
    rest = turning(positions, features)

    def less(c: float | None) -> float | None:
        return None if c is None else c * rest

    centred = x.mean is not None and abs(x.mean) <= 1e-9 * (x.rms or 0.0)
    return x.but(mean=0.0 if centred else None, position_correlation=less(
        x.position_correlation), cross_correlation=less(x.apart), one_sided=0)  # fmt: skip


@lru_cache(maxsize=256)
def turning(positions: int, features: int) -> float:
    """The mean of cos((p − p′)·f_k) over pairs of positions and over frequencies."""
    if positions < 2:
        return 1.0
    n = max(features // 2, 1)
    f = _BASE ** (-np.arange(n) / n)
    distance = np.arange(1, positions)
    weight = (positions - distance) / (positions * (positions - 1) / 2)
    return float((np.cos(distance[:, None] * f).mean(axis=1) * weight).sum())


def rotated(step: Step) -> Signal | None:
    """What a node adds where that is a product with cos θ and one with sin θ of the same θ:
    the tensor that stands beside cos θ, turned. None otherwise."""
    found: dict[str, tuple[str, str]] = {}  # function -> (angle, the other factor)
    for value in step.node.inputs:
        node = step.graph.producer.get(value or "")
        if node is None or node.op != "mul":
            return None
        for mine, other in (node.inputs, node.inputs[::-1]):
            wave = _wave(step, mine)
            if wave is not None and wave.inputs[0] is not None and other is not None:
                found[wave.op] = (wave.inputs[0], other)
    if set(found) == {"cos", "sin"} and found["cos"][0] == found["sin"][0]:
        value = found["cos"][1]
    elif (value := _beside_tables(step)) is None:
        return None
    shape = step.graph.shape(value)
    x = step.signals.get(value, UNKNOWN_SIGNAL)
    if shape is None or not x.known or len(shape) < 2:
        return None
    spots = [a for a, role in enumerate(x.roles) if role == "position"]
    positions = known_size(shape, spots[-1:]) if spots else 1
    features = shape[-1]
    if positions is None or features is None:
        return None
    return turned(x, positions, features)


def _beside_tables(step: Step) -> str | None:
    """The first tensor of x·C + y·S where y is made of x and the tables have C² + S² = 1 all over:
    cosines and sines that were worked out beforehand."""
    tensors, tables = [], []
    for value in step.node.inputs:
        node = step.graph.producer[value or ""]
        static = [v for v in node.inputs if v in step.graph.static]
        moving = [v for v in node.inputs if v is not None and v not in step.graph.static]
        table = _table(step, static[0]) if len(static) == 1 else None
        if table is None or len(moving) != 1:
            return None
        tensors.append(moving[0])
        tables.append(table)
    if len(tables) != 2 or tables[0].shape != tables[1].shape:
        return None
    x, y = (step.signals.get(v, UNKNOWN_SIGNAL) for v in tensors)
    alike = x.second_moment and math.isclose(x.second_moment, y.second_moment or 0.0, rel_tol=1e-6)
    squares = tables[0].astype(np.float64) ** 2 + tables[1].astype(np.float64) ** 2
    turns = alike and step.dependence.common(tensors[0], tensors[1], whole=True)
    return tensors[0] if turns and np.abs(squares - 1).max() < 1e-4 else None


def _table(step: Step, value: str | None) -> Array | None:
    """The known numbers that a factor is, but for moves."""
    for _ in range(_MOST):
        array = step.graph.constant(value)
        node = step.graph.producer.get(value or "")
        if array is not None or node is None:
            return array
        if node.op == "split":
            value = _part(step, node, value)
        elif node.op in _MOVES:
            value = node.inputs[0]
        else:
            return None
    return None


def _wave(step: Step, value: str | None) -> Node | None:
    """The cosine or sine that a factor is, but for moves."""
    for _ in range(_MOST):
        node = step.graph.producer.get(value or "")
        if node is None:
            return None
        if node.op in ("cos", "sin"):
            return node
        if node.op == "split":  # such as what turns rows and what turns columns
            value = _part(step, node, value)
            continue
        if node.op == "concat" and len(set(node.inputs)) == 1:  # both halves of the features
            value = node.inputs[0]
            continue
        scales = node.op == "mul" and any(step.graph.constant(v) is not None for v in node.inputs)
        if node.op not in _MOVES and not scales:
            return None
        value = next((v for v in node.inputs if step.graph.constant(v) is None), None)
    return None


def _part(step: Step, split: Node, value: str | None) -> str | None:
    """The part of a concatenation that is split off again, perhaps of one entry along another
    axis; None where it is none."""
    axis = int(str(split.attributes["axis"]))
    whole = step.graph.producer.get(split.inputs[0] or "")
    while whole is not None and whole.op == "select_index":
        axis += int(str(whole.attributes["axis"])) <= axis
        whole = step.graph.producer.get(whole.inputs[0] or "")
    if whole is None or whole.op != "concat" or whole.attributes["axis"] != axis:
        return None

    def edges(values: Sequence[str | None], at: int) -> list[tuple[int, int]]:
        sizes = [known_size(step.graph.shape(v), (at,)) or 0 for v in values]
        return [(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]

    own = edges(split.outputs, int(str(split.attributes["axis"])))
    mine = own[split.outputs.index(value or "")]
    return next((part for part, edge in zip(whole.inputs, edges(whole.inputs, axis), strict=True)
                 if edge == mine), None)  # fmt: skip
