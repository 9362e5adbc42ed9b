"""Rotary embeddings: x·cos θ + (−x₂, x₁)·sin θ turns pairs of features by angles of their position.

A rotation keeps E x² whatever the angles (Su et al. 2021). Two positions p, p′ are turned against
each other by (p − p′)f_k, so that what they share is multiplied by the mean cosine of that.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from archlint.graph.model import Node
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

    return x.but(mean=0.0 if x.mean == 0.0 else None, position_correlation=less(
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
    if set(found) != {"cos", "sin"} or found["cos"][0] != found["sin"][0]:
        return None
    value = found["cos"][1]
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


def _wave(step: Step, value: str | None) -> Node | None:
    """The cosine or sine that a factor is, but for moves."""
    for _ in range(_MOST):
        node = step.graph.producer.get(value or "")
        if node is None:
            return None
        if node.op in ("cos", "sin"):
            return node
        scales = node.op == "mul" and any(step.graph.constant(v) is not None for v in node.inputs)
        if node.op not in _MOVES and not scales:
            return None
        value = next((v for v in node.inputs if step.graph.constant(v) is None), None)
    return None
