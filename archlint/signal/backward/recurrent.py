"""Gradients through RNN, LSTM and GRU, from the last step to the first.

A step's pre-activations get Σ over gates of what each passes on; the input gets that times
fan-out·E w², the state before it the same by the recurrent weights, and a cell also by its forget
gate (Chen et al. 2018). As on the way there (signal.recurrent) all is followed as covariances
between steps: what arrives at several steps alike adds up in the cell.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from archlint.signal.gaussian import Floats
from archlint.signal.gradient import (
    UNKNOWN_GRADIENT,
    Back,
    Correlation,
    Gradient,
    backwards,
    no_gradient,
)
from archlint.signal.recurrent import (
    KEPT,
    MOST_STEPS,
    RECURRENT,
    Course,
    Law,
    Leak,
    course,
    law_of,
    over_steps,
)
from archlint.signal.transfer import correlated


@dataclass(frozen=True)
class _Arriving:
    """E g² at all steps with what two steps share of it, at the last state and at the cell."""

    steps: Floats
    last: float
    cell: float


@backwards("rnn", "lstm", "gru")
def _recurrent(step: Back) -> list[Gradient | None]:
    """Of the input and of the initial states."""
    count = len(step.node.inputs)
    unknown: list[Gradient | None] = [
        UNKNOWN_GRADIENT if i in (0, 5, 6) else None for i in range(count)
    ]
    law, weight, shape = law_of(step), step.signal(1), step.shape(0)
    if law is None or weight.second_moment is None or shape is None:
        return unknown
    batch_first = bool(step.attribute("batch_first"))
    time, sample = (1, 0) if batch_first else (0, 1)
    length = shape[time] or 1
    arriving = [g for g in step.arriving if not g.zero]
    if any(g.second_moment is None for g in arriving):
        return unknown
    try:
        own = course(law)[0]
    except (LookupError, OverflowError):
        return unknown
    g = step.gradient
    alike: Correlation = 0.0 if g.zero else g.along[time] if len(g.along) == 4 else None
    if alike is None:
        return unknown
    levels = [(x.second_moment or 0.0) for x in (*step.arriving, g, g)[:3]]
    sizes = levels[: len(step.arriving)] + [0.0] * (3 - len(step.arriving))
    n = len(law.drive)
    each = np.ones(n)
    profile = g.profile.get(time)
    if profile is not None and profile.size == length:
        ends = profile if step.attribute("direction") != "reverse" else profile[::-1]
        each = ends[length - n :]
    root = np.sqrt(each * sizes[0])
    pairs = np.outer(root, root) * alike
    above = _layer_above(step, length)
    if above is not None:
        pairs = sizes[0] * alike * above
    np.fill_diagonal(pairs, each * sizes[0])
    deltas, state, cell = _deltas(law, own, _Arriving(_turned(pairs), sizes[1], sizes[2]))
    mean, apart, _ = over_steps(deltas, length)
    directions = step.shape(1)
    both = directions[0] if directions is not None and directions[0] is not None else 1
    second = mean * int(step.number("hidden")) * weight.second_moment * both
    found: list[Gradient | None] = [None] * count
    samples: Correlation = 0.0 if all(_apart(x, shape, sample) for x in arriving) else None
    along: list[Correlation] = [0.0, 0.0, 0.0]
    along[time], along[sample] = correlated(apart, mean), samples
    found[0] = no_gradient(3) if second == 0.0 else Gradient(
        second, tuple(along), origin=step.source(0))  # fmt: skip
    for i, size in ((5, state), (6, cell)):
        if i < count:
            spots = (samples, 0.0, 0.0) if batch_first else (0.0, samples, 0.0)
            found[i] = Gradient(size, spots, origin=step.source(i)) if size else no_gradient(3)
    return found


def _apart(g: Gradient, shape: tuple[int | None, ...], sample: int) -> bool:
    """Whether two samples' gradients have nothing in common."""
    if shape[sample] == 1:
        return True
    axis = sample + 1 if len(g.along) == 4 and sample == 1 else sample
    if len(g.along) == 3:
        axis = 0 if sample == 0 else 1
    return len(g.along) > axis and g.along[axis] == 0.0


def _deltas(law: Law, own: Course, g: _Arriving) -> tuple[Floats, float, float]:
    """(E δδ′ between steps from the last to the first of what the pre-activations get, Σ over
    gates; E g² of the initial state; of the initial cell)."""
    return {"rnn": _rnn, "lstm": _lstm, "gru": _gru}[law.op](law, own, g)


def _layer_above(step: Back, length: int) -> Floats | None:
    """How alike what comes back from another recurrent layer is at two steps, the mean over pairs
    being 1: the closer the more."""
    graph, value = step.graph, step.node.outputs[0]
    for _ in range(8):
        readers = graph.consumers.get(value, ())
        if len(readers) != 1 or value in graph.outputs:
            return None
        node = readers[0]
        if node.op in RECURRENT and node.inputs[0] == value:
            break
        if node.op not in KEPT:
            return None
        value = node.output
    else:
        return None
    law = law_of(replace(step, node=node))
    n = min(length, MOST_STEPS)
    ways = (str(node.attributes.get("direction", "forward")), str(step.attribute("direction")))
    if law is None or len(law.drive) != n or (n < length and ways != ("forward", "forward")):
        return None
    try:
        pairs = _of_white(law)
    except (LookupError, OverflowError):
        return None
    for direction in ways:
        if direction == "bidirectional":
            pairs = (pairs + _turned(pairs)) / 2
        elif direction == "reverse":
            pairs = _turned(pairs)
    rest = over_steps(_turned(pairs), length)[1]
    return pairs / rest if rest > 0 else None


@lru_cache(maxsize=64)
def _of_white(law: Law) -> Floats:
    """E δδ′ in the order of the steps, of gradients that no two steps share."""
    n = len(law.drive)
    return _turned(_deltas(law, course(law)[0], _Arriving(np.eye(n), 0.0, 0.0))[0])


def _turned(pairs: Floats) -> Floats:
    """In the order from the last step to the first."""
    return np.ascontiguousarray(pairs[::-1, ::-1])


def _rnn(law: Law, own: Course, g: _Arriving) -> tuple[Floats, float, float]:
    """E δδ′ of the pre-activations' gradient, and what the initial state gets: δ = φ′·(what arrives
    at the state)."""
    n = len(law.drive)
    slopes = _turned(own.candidates.slope_pairs(own.pre, own=True))
    found = np.zeros((n + 1, n + 1))  # found[0] = 0: nothing comes back into the last step
    for t in range(n):
        row = g.steps[t, : t + 1] + law.turn * found[t, : t + 1]
        row[0] += g.last if t == 0 else 0.0
        found[t + 1, 1 : t + 2] = found[1 : t + 2, t + 1] = row * slopes[t, : t + 1]
    return found[1:, 1:], law.turn * float(found[n, n]), 0.0


def _leaked(leak: Leak, t: int, gate: Floats, points: Floats, source: Floats) -> Floats:
    """E[y_t y_s] after step ``t`` back, s ≤ t, of what the gate of the step before let through."""
    if t == 0:
        leak.step(t, np.ones(points.shape[1]), np.ones(1), source)
    else:
        leak.step(t, points[t - 1], np.concatenate([[1.0], gate[t - 1, :t]]), source)
    return leak.y[t + 1, 1 : t + 2]


def _lstm(law: Law, own: Course, g: _Arriving) -> tuple[Floats, float, float]:
    """c ← f·c + i·g, h = o·tanh c."""
    n = len(law.drive)
    gate, candidate, squashed = (_turned(m) for m in (own.gate, own.candidate, own.squashed))
    slopes = _turned(own.gates.slope_pairs(own.pre, own=True))
    slopes_in = _turned(own.candidates.slope_pairs(own.candidate_pre, own=True))
    slopes_out = _turned(own.squashes.slope_pairs(own.cells, own=True))
    before = _turned(own.c[:n, :n])
    points = own.at_points[::-1]
    found = np.zeros((n + 1, n + 1))
    leak = Leak(n)
    for t in range(n):
        now = slice(0, t + 1)
        state = g.steps[t, now] + law.turn * found[t, now]
        if t == 0:
            state[0] += g.last
        source = state * gate[t, now] * slopes_out[t, now]
        if t == 0:
            source[0] += g.cell
        cell = _leaked(leak, t, gate, points, source)
        delta = (state * squashed[t, now] * slopes[t, now]  # output gate
                 + cell * (before[t, now] + candidate[t, now]) * slopes[t, now]  # forget, input
                 + cell * gate[t, now] * slopes_in[t, now])  # fmt: skip
        found[t + 1, 1 : t + 2] = found[1 : t + 2, t + 1] = delta
    return found[1:, 1:], law.turn * float(found[n, n]), float(gate[-1, -1] * leak.y[n, n])


def _gru(law: Law, own: Course, g: _Arriving) -> tuple[Floats, float, float]:
    """h ← (1 − z)·n + z·h, n = tanh(W x + r·U h)."""
    n = len(law.drive)
    gate, candidate = _turned(own.gate), _turned(own.candidate)
    slopes = _turned(own.gates.slope_pairs(own.pre, own=True))
    slopes_in = _turned(own.candidates.slope_pairs(own.candidate_pre, own=True))
    before, inner = _turned(own.h[:n, :n]), _turned(own.inner[:n])
    means = own.gates.means[::-1]
    points = own.at_points[::-1]
    found, by_state = np.zeros((n + 1, n + 1)), np.zeros((n + 1, n + 1))
    leak = Leak(n)
    for t in range(n):
        now = slice(0, t + 1)
        source = g.steps[t, now] + law.turn * by_state[t, now]
        if t == 0:
            source[0] += g.last
        state = _leaked(leak, t, gate, points, source)
        rest = 1 - means[t] - means[now] + gate[t, now]
        d_in = state * rest * slopes_in[t, now]
        apart = before[t, now] + candidate[t, now] - inner[t, now] - inner[now, t]
        d_keep = state * apart * slopes[t, now]
        turned = law.turn * before[t, now] + (law.noise if law.reset_after else 0.0)
        d_reset = d_in * turned * slopes[t, now]
        row, back = d_keep + d_reset + d_in, d_keep + d_reset + d_in * gate[t, now]
        found[t + 1, 1 : t + 2] = found[1 : t + 2, t + 1] = row
        by_state[t + 1, 1 : t + 2] = by_state[1 : t + 2, t + 1] = back
    end = law.turn * float(by_state[n, n]) + float(gate[-1, -1] * leak.y[n, n])
    return found[1:, 1:], end, 0.0
