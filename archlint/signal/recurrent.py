"""RNN, LSTM, GRU: the covariances of gates and states between steps, and between samples.

A step is an affine map of input and state. With weights that all steps share, the pre-activations
of all steps and samples are jointly normal in the limit of wide states, with the covariance
K_u(t, s) = features·E w²·E[x_t x_s] + hidden·E u²·E[h_{t−1} h_{s−1}] + Var b: that a state depends
on the weights drops out (Yang 2019, "Tensor Programs I"; Chen et al. 2018, "Dynamical isometry and
a mean field theory of RNNs"). Gates and candidate have rows of weights of their own and are
independent of each other. What a state keeps feature by feature, y_t = f_t·y_{t−1} + i_t·v_t,
carries the covariances on, with E[f_t f_s] of the gates; that f_t is correlated with the f's before
it is left out beyond that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from archlint.signal.activations import Activation, activation
from archlint.signal.gaussian import HERMITE_TERMS, Floats, hermite_at
from archlint.signal.moments import Group, Role, Signal
from archlint.signal.transfer import Step, correlated, transfers

MOST_STEPS = 64  # followed one by one: what a state remembers of its start fades long before
_LONGEST = 65536  # steps of which a profile is kept
RECURRENT = {"lstm": ("sigmoid", "tanh", "tanh"), "gru": ("sigmoid", "tanh"), "rnn": ("tanh",)}


@dataclass(frozen=True)
class Law:
    """What drives a recurrent layer: ``drive`` = features·E w²·E x² of each step followed;
    ``alike`` = E[x x′]/E x² of (one sample at two steps, two samples at one, at two);
    ``turn`` = hidden·E u², ``shift`` and ``noise`` = mean and variance of each of the two biases,
    ``start`` and ``start_alike`` = E h², E c² before the first step and what two samples share."""

    op: str
    kind: str
    drive: tuple[float, ...]
    alike: tuple[float, float | None, float | None]
    turn: float
    shift: float
    noise: float
    start: tuple[float, float] = (0.0, 0.0)
    start_alike: tuple[float, float] = (1.0, 1.0)
    reset_after: bool = False
    length: int = 1
    below: Law | None = None  # of the recurrent layer that the input is the states of
    turns: tuple[str, str] = ("forward", "forward")  # its direction and this one's


_POINTS, _SHARES = np.polynomial.hermite_e.hermegauss(5)
_SHARES = _SHARES / _SHARES.sum()
_AT_POINTS = hermite_at(_POINTS)


class Unit:
    """An activation of normal variables, one a step, with variances of their own. E φ(u_t)φ(u_s) =
    Σ_k a_k(t)·a_k(s)·ρ^k by Mehler's formula, where a_{k+1}·√(k+1)/σ are the coefficients of φ′."""

    def __init__(self, phi: Activation, steps: int) -> None:
        self.phi = phi
        self.means, self.seconds, self.slopes = (np.zeros(steps) for _ in range(3))
        self.deviations = np.zeros(steps)
        self._values = np.zeros((steps, HERMITE_TERMS))

    def add(self, t: int, mean: float, variance: float) -> None:
        """The law of step ``t``."""
        variance = float(f"{max(variance, 0.0):.5g}")
        m = self.phi.moments(mean, variance)
        if not math.isfinite(m.second_moment):
            raise OverflowError("the state diverges")
        self.means[t], self.seconds[t], self.slopes[t] = m.mean, m.second_moment, m.slope
        self.deviations[t] = math.sqrt(variance)
        self._values[t] = self.phi.coefficients(mean, variance)

    def row(self, t: int, covariances: Floats, own: bool) -> Floats:
        """E φ(u_t)φ(u_s) for s ≤ t; of two samples unless ``own``."""
        size = self.deviations[t] * self.deviations[: t + 1]
        r = np.clip(covariances / np.where(size > 0, size, 1.0), -1.0, 1.0)
        powers = r[:, None] ** np.arange(HERMITE_TERMS)
        found = (powers * self._values[: t + 1]) @ self._values[t]
        if own:
            found[t] = self.seconds[t]
        return np.asarray(found, np.float64)

    def given(self, t: int, covariances: Floats) -> Floats:
        """E φ(u_t) at a few points of what u_t has in common with the steps before it."""
        size = self.deviations[t] ** 2
        shared = float(covariances[:t].mean()) / size if t and size > 0 else 0.0
        powers = math.sqrt(min(max(shared, 0.0), 1.0)) ** np.arange(HERMITE_TERMS)
        return np.asarray(_AT_POINTS @ (self._values[t] * powers), np.float64)

    def slope_pairs(self, covariances: Floats, own: bool) -> Floats:
        """E φ′(u_t)φ′(u_s) of all steps."""
        size = np.outer(self.deviations, self.deviations)
        r = np.clip(covariances / np.where(size > 0, size, 1.0), -1.0, 1.0)
        scale = np.where(self.deviations > 0, self.deviations, 1.0)
        roots = np.sqrt(np.arange(1, HERMITE_TERMS))
        values = self._values[:, 1:] * roots / scale[:, None]
        found = np.zeros_like(r)
        for k in range(HERMITE_TERMS - 2, -1, -1):
            found = found * r + np.outer(values[:, k], values[:, k])
        still = self.deviations <= 0  # of a number the slope is a number
        if still.any():
            flat = np.sqrt(np.outer(self.slopes, self.slopes))
            found = np.where(still[:, None] | still[None, :], flat, found)
        if own:
            np.fill_diagonal(found, self.slopes)
        return found


class Leak:
    """E[y y′] of y_t = f_t·y_{t−1} + i_t·v_t: ``y[t]`` stands before step t, ``inner[t, s]`` =
    E[y_t v_s]. The gates of all steps have something in common, such as their biases: all is taken
    at a few points of that, between which gates are independent of what came before. The two gates
    of a step may be correlated with each other, not with v."""

    def __init__(self, steps: int, start: float = 0.0) -> None:
        points = len(_POINTS)
        self._y = np.zeros((points, steps + 1, steps + 1))
        self._y[:, 0, 0] = start
        self._inner = np.zeros((points, steps + 1, steps))
        self._kept = np.zeros((points, steps, steps))  # Π E f after s, up to t
        self._f, self._i = np.zeros((points, steps)), np.zeros((points, steps))
        self.y = np.zeros((steps + 1, steps + 1))
        self.y[0, 0] = start
        self.inner = np.zeros((steps + 1, steps))

    def step(self, t: int, f: Floats, pairs: Floats, v: Floats, rest: bool = False) -> None:
        """Step ``t`` from E f at the points, and E f_t f_s and E v_t v_s for every s ≤ t; i = 1, or
        the ``rest`` 1 − f."""
        inner, y, now = self._inner, self._y, slice(0, t + 1)
        inner[:, 1 : t + 1, t] = np.einsum("pab,pb->pa", self._kept[:, :t, :t],
                                           self._i[:, :t] * v[:t])  # fmt: skip
        self._f[:, t] = f
        self._i[:, t] = 1 - f if rest else 1.0
        if t:
            self._kept[:, t, :t] = f[:, None] * self._kept[:, t - 1, :t]
        self._kept[:, t, t] = 1.0
        one, two = f[:, None], self._f[:, now]
        both = one * two
        ff = both + pairs - _SHARES @ both
        given = (one - ff, two - ff, 1 - one - two + ff) if rest else (one, two, 1.0)
        row = (ff * y[:, t, now] + given[0] * inner[:, t, now] + given[1] * inner[:, now, t]
               + given[2] * v)  # fmt: skip
        y[:, t + 1, 1 : t + 2] = row
        y[:, 1 : t + 2, t + 1] = row
        y[:, t + 1, 0] = y[:, 0, t + 1] = f * y[:, t, 0]
        inner[:, t + 1, now] = one * inner[:, t, now] + self._i[:, t, None] * v
        self.y[t + 1, : t + 2] = self.y[: t + 2, t + 1] = _SHARES @ y[:, t + 1, : t + 2]
        self.inner[t + 1, now] = _SHARES @ inner[:, t + 1, now]
        self.inner[: t + 1, t] = _SHARES @ inner[:, : t + 1, t]


def _symmetric(into: Floats, t: int, row: Floats) -> None:
    into[t, : row.size] = row
    into[: row.size, t] = row


@dataclass
class Course:
    """The covariances of a layer's quantities between steps, of one sample or of two. ``h`` and
    ``c`` have the initial state first; ``gate``, ``candidate`` (the tanh of what comes in) and
    ``squashed`` (tanh c) are E of the products, ``pre``, ``candidate_pre`` and ``cells`` the
    covariances of their arguments. ``at_points``: E of a gate at the points of :class:`Leak`."""

    h: Floats
    c: Floats
    gates: Unit
    candidates: Unit
    squashes: Unit
    gate: Floats
    candidate: Floats
    squashed: Floats
    pre: Floats
    candidate_pre: Floats
    cells: Floats
    at_points: Floats
    inner: Floats  # E[h_t n_s] of a GRU


def _unit(name: str) -> Activation:
    found = activation(name, {})
    if found is None:
        raise LookupError(name)
    return found


@lru_cache(maxsize=64)
def course(law: Law) -> tuple[Course, Course | None]:
    """(of one sample, of two samples: None where what two inputs share is not known)."""
    own = _course(law, None)
    if None in law.alike:
        return own, None
    return own, _course(law, own)


def _course(law: Law, of: Course | None) -> Course:
    """``of``: the units with the laws of every step, of which pairs of two samples are wanted."""
    n = len(law.drive)
    own = of is None
    root = np.sqrt(np.array(law.drive))
    one, two, both = law.alike
    drive = np.outer(root, root) * ((one if own else both) or 0.0)
    beneath = _beneath(law, own)
    if beneath is not None:
        drive = beneath * (sum(law.drive) / n)
    np.fill_diagonal(drive, np.array(law.drive) * (1.0 if own else two or 0.0))
    start = [s * (1.0 if own else a) for s, a in zip(law.start, law.start_alike, strict=True)]
    sigmoid = _unit("sigmoid")
    gates = Unit(sigmoid, n) if of is None else of.gates
    candidates = Unit(_unit(law.kind if law.op == "rnn" else "tanh"), n) if of is None else (
        of.candidates)  # fmt: skip
    squashes = Unit(_unit("tanh"), n) if of is None else of.squashes
    h = np.zeros((n + 1, n + 1))
    h[0, 0] = start[0]
    leak = Leak(n, start[1] if law.op == "lstm" else start[0])
    gate, candidate, squashed, pre, inner_pre, all_cells = (np.zeros((n, n)) for _ in range(6))
    points = np.zeros((n, len(_POINTS)))
    cell_means = np.zeros(n + 1)
    for t in range(n):
        now = slice(0, t + 1)
        states = leak.y if law.op == "gru" else h
        u = drive[t, now] + law.turn * states[t, now] + 2 * law.noise
        _symmetric(pre, t, u)
        if law.op == "rnn":
            if own:
                candidates.add(t, 2 * law.shift, float(u[t]))
            _symmetric(candidate, t, candidates.row(t, u, own))
            h[1 + t, 1 : t + 2] = h[1 : t + 2, 1 + t] = candidate[t, now]
            continue
        if own:
            gates.add(t, 2 * law.shift, float(u[t]))
        g = gates.row(t, u, own)
        _symmetric(gate, t, g)
        points[t] = gates.given(t, u)
        if law.op == "lstm":
            if own:
                candidates.add(t, 2 * law.shift, float(u[t]))
            w = candidates.row(t, u, own)
            _symmetric(candidate, t, w)
            _symmetric(inner_pre, t, u)
            leak.step(t, points[t], g, g * w)
            cell_means[t + 1] = gates.means[t] * (cell_means[t] + candidates.means[t])
            cells = leak.y[t + 1, 1 : t + 2] - cell_means[t + 1] * cell_means[1 : t + 2]
            _symmetric(all_cells, t, cells)
            if own:
                squashes.add(t, float(cell_means[t + 1]), float(cells[t]))
            _symmetric(squashed, t, squashes.row(t, cells, own))
            h[1 + t, 1 : t + 2] = h[1 : t + 2, 1 + t] = g * squashed[t, now]
        else:  # h ← (1 − z)·n + z·h
            turned = law.turn * leak.y[t, now]
            if law.reset_after:
                v = drive[t, now] + law.noise + g * (turned + law.noise)
            else:
                v = drive[t, now] + 2 * law.noise + g * turned
            if own:
                candidates.add(t, 2 * law.shift, float(v[t]))
            _symmetric(inner_pre, t, v)
            w = candidates.row(t, v, own)
            _symmetric(candidate, t, w)
            leak.step(t, points[t], g, w, rest=True)
    if law.op == "gru":
        h = leak.y
    return Course(h, leak.y if law.op == "lstm" else h, gates, candidates, squashes, gate,
                  candidate, squashed, pre, inner_pre, all_cells, points, leak.inner)  # fmt: skip


def _beneath(law: Law, own: bool) -> Floats | None:
    """E[x x′]/E x² of an input that is the states of another recurrent layer, which are the more
    alike the closer they are; their means over steps are those of ``alike``."""
    if law.below is None:
        return None
    one, two = course(law.below)
    n = len(law.drive)
    if two is None or len(one.h) != n + 1:
        return None
    pairs = (one if own else two).h[1:, 1:]
    for direction in law.turns:
        back = pairs[::-1, ::-1]
        if direction == "bidirectional":
            pairs = (pairs + back) / 2
        elif direction == "reverse":
            pairs = back
    at_once, apart = (1.0, law.alike[0]) if own else law.alike[1:]
    level, rest, _ = over_steps(pairs, law.length)
    if at_once is None or apart is None or level <= 0:
        return None
    whole = float(np.diag(one.h)[1:].mean())
    near, rest = pairs / whole, rest / whole
    if apart > rest:  # a bias is alike everywhere, noise nowhere
        share = (1 - apart) / max(1 - rest, 1e-9)
        near = share * near + 1 - share
    elif rest > 0:
        near = near * (apart / rest)
    each = np.diag(pairs)
    np.fill_diagonal(near, each * (at_once / each.mean()))
    return near


# What leaves it as it is how alike steps are, or nearly so.
KEPT = frozenset({"reshape", "transpose", "dropout", "identity", "cast", "linear", "layer_norm",
                  "rms_norm"})  # fmt: skip


def _layer_below(step: Step, length: int) -> tuple[Law, str] | None:
    """The law and direction of the recurrent layer whose states all steps are, None of others."""
    value = step.value(0)
    for _ in range(8):
        node = step.graph.producer.get(value or "")
        if node is None or value != node.output:
            return None
        if node.op in RECURRENT:
            before = replace(step, node=node)
            shape = before.shape(0)
            time = 1 if before.attribute("batch_first") else 0
            if shape is None or shape[time] != length:
                return None
            law = law_of(before)
            return None if law is None else (law, str(before.attribute("direction")))
        if node.op not in KEPT:
            return None
        value = node.inputs[0]
    return None


def law_of(step: Step) -> Law | None:
    """What drives a layer, None where something of it is not known."""
    x, shape = step.signal(0), step.shape(0)
    weight, recurrence = step.signal(1), step.signal(2)
    bias = step.signal(3) if step.has(3) else Signal(0.0, 0.0)
    names = step.attribute("activations")
    given = tuple(str(n).lower() for n in names) if isinstance(names, tuple) else ()
    usual = RECURRENT[step.node.op]
    kinds = given[: len(usual)] or usual
    if (step.has(7) or step.attribute("input_forget") or step.attribute("clip") is not None
            or (step.node.op != "rnn" and kinds != usual)):  # fmt: skip
        return None
    time = 1 if step.attribute("batch_first") else 0
    if (shape is None or len(shape) != 3 or shape[-1] is None or (length := shape[time]) is None
            or x.second_moment is None or x.position_correlation is None
            or weight.second_moment is None or recurrence.second_moment is None
            or bias.second_moment is None or bias.mean is None or length < 1):  # fmt: skip
        return None
    starts, alike = [], []
    for i in (5, 6):
        state = step.signal(i) if step.has(i) else Signal(0.0, 0.0, 1.0, 1.0)
        if state.second_moment is None:
            return None
        starts.append(state.second_moment)
        alike.append(1.0 if state.sample_correlation is None else state.sample_correlation)
    steps = min(length, MOST_STEPS)
    level = shape[-1] * weight.second_moment * x.second_moment
    profile = x.profile.get(time)
    each = np.ones(steps)
    if profile is not None and profile.size == length:
        profile = _in_order(step, profile)
        each = profile[:steps].copy()
        if length > steps:
            each[steps // 2 :] *= profile[steps // 2 :].mean() / each[steps // 2 :].mean()
    below = _layer_below(step, length)
    direction = str(step.attribute("direction"))
    if below is not None and length > steps and (below[1], direction) != ("forward", "forward"):
        below = None
    return Law(
        step.node.op, kinds[0], tuple(float(f"{level * p:.5g}") for p in each),
        (x.position_correlation, x.sample_correlation, x.apart),
        int(step.number("hidden")) * recurrence.second_moment, bias.mean,
        max(bias.second_moment - bias.mean**2, 0.0), (starts[0], starts[1]), (alike[0], alike[1]),
        bool(step.attribute("linear_before_reset")), length, below[0] if below else None,
        (below[1] if below else "forward", direction),
    )  # fmt: skip


def _in_order(step: Step, profile: Floats) -> Floats:
    """A profile along the steps in the order in which they are taken, and back."""
    direction = step.attribute("direction")
    if direction == "forward":
        return profile
    return profile[::-1] if direction == "reverse" else (profile + profile[::-1]) / 2


def over_steps(pairs: Floats, length: int) -> tuple[float, float, Floats]:
    """(mean over steps, mean over pairs of different steps, each step) of a covariance between
    steps: those after the ones followed are like the last, and like their neighbours as it is."""
    n = len(pairs)
    each = np.concatenate([np.diag(pairs), np.full(max(length - n, 0), pairs[-1, -1])])
    if length < 2:
        return float(each.mean()), float(each.mean()), each
    total = float(pairs.sum() - np.diag(pairs).sum()) / 2
    if length > n:
        far = float(pairs[-1, n // 2])
        total += (length - n) * float(pairs[-1, :-1][n // 2 :].sum())
        total += far * sum(t - (n - 1 - n // 2) for t in range(n, length))
    return float(each.mean()), total / (length * (length - 1) / 2), each


@transfers("rnn", "lstm", "gru")
def _recurrent(step: Step) -> tuple[Signal, ...]:
    """All steps, the last state and the last cell, of two directions alike."""
    shape = step.shape(0)
    batch_first = bool(step.attribute("batch_first"))
    roles: tuple[Role, ...] = ("position", "feature", "sample", "feature")
    last: tuple[Role, ...] = ("feature", "sample", "feature")
    if batch_first:
        roles, last = ("sample", "position", "feature", "feature"), ("sample", "feature", "feature")
    unknown = [Signal(roles=r) for r in (roles, last, last)]
    law = law_of(step)
    if law is None or shape is None:
        return tuple(unknown[: len(step.node.outputs)])
    time = 1 if batch_first else 0
    length = shape[time] or 1
    try:
        own, other = course(law)
    except (LookupError, OverflowError):
        return tuple(unknown[: len(step.node.outputs)])
    second, apart, each = over_steps(own.h[1:, 1:], length)
    samples = cross = None
    if other is not None:
        samples, cross, _ = over_steps(other.h[1:, 1:], length)
    mean, ends = _means(law, own, length)
    odd: tuple[Group, ...] = ()
    if law.op == "rnn" and own.candidates.phi.odd and law.start[0] == law.noise == law.shift == 0:
        odd = step.signal(0).odd_in + step.signal(1).odd_in
    profile = {}
    if length <= _LONGEST and second > 0 and each.max() - each.min() > 1e-9 * second:
        profile = {time: _in_order(step, each / second)}
    out = Signal(mean, second, correlated(apart, second), correlated(samples, second), odd, 0,
                 roles, profile, cross_correlation=correlated(cross, second))  # fmt: skip
    finals = []
    for state, end in zip((own.h, own.c), ends, strict=True):
        size = float(state[-1, -1])
        pairs = (other.h if state is own.h else other.c)[-1, -1] if other is not None else None
        alike = correlated(None if pairs is None else float(pairs), size)
        finals.append(Signal(end, size, 1.0, alike, odd, 0, last, cross_correlation=alike))
    return (out, *finals)[: len(step.node.outputs)]


def _means(law: Law, own: Course, length: int) -> tuple[float, tuple[float, float]]:
    """(E h over all steps, (E h, E c) after the last): zero but for biases or units that are not
    symmetric. tanh c has the mean of the normal law of c."""
    values = []
    h = c = 0.0
    for t in range(len(law.drive)):
        n = float(own.candidates.means[t])
        if law.op == "rnn":
            h = c = n
        elif law.op == "gru":
            z = float(own.gates.means[t])
            h = c = z * h + (1 - z) * n
        else:
            gate = float(own.gates.means[t])
            c = gate * (c + n)
            h = gate * float(own.squashes.means[t])
        values.append(h)
    return (sum(values) + (length - len(values)) * h) / length, (h, c)
