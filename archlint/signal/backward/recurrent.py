"""Gradients through RNN, LSTM and GRU, step by step from the last to the first.

The forward moments of gates and states are those of signal.recurrent. A step's pre-activations get
Σ over gates of what each passes on; the input gets that times fan-out·E w², the state before it the
same by the recurrent weights, and a cell also by its forget gate (Chen et al. 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from archlint.signal.activations import Activation, activation
from archlint.signal.gradient import UNKNOWN_GRADIENT, Back, Gradient, backwards, no_gradient
from archlint.signal.moments import Signal

_MOST_STEPS = 256


def _unit(name: str) -> Activation | None:
    return activation(name, {})


@dataclass(frozen=True, slots=True)
class _Law:
    """What drives a cell: variance of the input's part, bias mean, gain of the state's part."""

    noise: float
    shift: float
    turn: float


@backwards("rnn", "lstm", "gru")
def _recurrent(step: Back) -> list[Gradient | None]:
    x, shape = step.signal(0), step.shape(0)
    weight, recurrence = step.signal(1), step.signal(2)
    bias = step.signal(3) if step.has(3) else Signal(0.0, 0.0)
    rest: list[Gradient | None] = [None] * (len(step.node.inputs) - 1)
    names = step.attribute("activations")
    given = tuple(str(n).lower() for n in names) if isinstance(names, tuple) else ()
    usual = {"lstm": ("sigmoid", "tanh", "tanh"), "gru": ("sigmoid", "tanh"),
             "rnn": ("tanh",)}[step.node.op]  # fmt: skip
    kinds = given[: len(usual)] or usual
    time = 1 if step.attribute("batch_first") else 0
    if (shape is None or shape[-1] is None or (length := shape[time]) is None
            or x.second_moment is None or weight.second_moment is None
            or recurrence.second_moment is None or bias.second_moment is None
            or bias.mean is None or (step.node.op != "rnn" and kinds != usual)):  # fmt: skip
        return [UNKNOWN_GRADIENT, *rest]
    seconds = [g.second_moment for g in step.arriving]
    if any(s is None for s in seconds):
        return [UNKNOWN_GRADIENT, *rest]
    out, last, cell = ((s or 0.0) for s in (*seconds, 0.0, 0.0)[:3])
    hidden = int(step.number("hidden"))
    law = _Law(
        shape[-1] * weight.second_moment * x.second_moment
        + 2 * max(bias.second_moment - bias.mean**2, 0.0),
        2 * bias.mean, hidden * recurrence.second_moment,
    )  # fmt: skip
    steps = min(length, _MOST_STEPS)
    run = {"rnn": _rnn, "lstm": _lstm, "gru": _gru}[step.node.op]
    each = run(law, str(kinds[0]), steps, out, last, cell)
    if each is None or not all(math.isfinite(s) for s in each):
        return [UNKNOWN_GRADIENT, *rest]
    mean = (sum(each) + each[0] * (length - steps)) / length
    directions = step.shape(1)
    both = directions[0] if directions is not None and directions[0] is not None else 1
    second = mean * hidden * weight.second_moment * both
    if second == 0.0:
        return [no_gradient(step.rank(0)), *rest]
    return [Gradient(second, (0.0,) * len(shape), origin=step.source(0)), *rest]


def _rnn(law: _Law, kind: str, steps: int, out: float, last: float, cell: float
         ) -> list[float] | None:  # fmt: skip
    """Σ over gates of E δ² per step: δ = φ′·(what arrives at the state)."""
    phi = _unit(kind)
    if phi is None:
        return None
    h, slopes = 0.0, []
    for _ in range(steps):
        m = phi.moments(law.shift, law.noise + law.turn * h)
        slopes.append(m.slope)
        h = m.second_moment
    found, back = [], last
    for slope in reversed(slopes):
        delta = (out + back) * slope
        back = law.turn * delta
        found.append(delta)
    return found[::-1]


def _lstm(law: _Law, kind: str, steps: int, out: float, last: float, cell: float
          ) -> list[float] | None:  # fmt: skip
    """c ← f·c + i·g, h = o·tanh c."""
    sigmoid, tanh = _unit("sigmoid"), _unit("tanh")
    assert sigmoid is not None
    assert tanh is not None
    h = c = 0.0
    states = []
    for _ in range(steps):
        q = law.noise + law.turn * h
        gate, g = sigmoid.moments(law.shift, q), tanh.moments(law.shift, q)
        before = c
        c = gate.second_moment * (c + g.second_moment)
        squashed = tanh.moments(0.0, c)
        h = gate.second_moment * squashed.second_moment
        states.append((gate, g, before, squashed))
    found, at_state, at_cell = [], last, cell
    for gate, g, before, squashed in reversed(states):
        dh = out + at_state
        dc = dh * gate.second_moment * squashed.slope + at_cell
        delta = (dh * squashed.second_moment * gate.slope  # output gate
                 + dc * before * gate.slope  # forget gate
                 + dc * g.second_moment * gate.slope  # input gate
                 + dc * gate.second_moment * g.slope)  # fmt: skip
        at_state, at_cell = law.turn * delta, dc * gate.second_moment
        found.append(delta)
    return found[::-1]


def _gru(law: _Law, kind: str, steps: int, out: float, last: float, cell: float
         ) -> list[float] | None:  # fmt: skip
    """h ← (1 − z)·n + z·h, n = tanh(W x + r·U h)."""
    sigmoid, tanh = _unit("sigmoid"), _unit("tanh")
    assert sigmoid is not None
    assert tanh is not None
    h = 0.0
    states = []
    for _ in range(steps):
        z = sigmoid.moments(law.shift, law.noise + law.turn * h)
        n = tanh.moments(law.shift, law.noise + law.turn * z.second_moment * h)
        before = h
        rest = 1 - 2 * z.mean + z.second_moment
        h = rest * n.second_moment + z.second_moment * h
        states.append((z, n, before, rest))
    found, back = [], last
    for z, n, before, rest in reversed(states):
        dh = out + back
        dn = dh * rest * n.slope
        dz = dh * (before + n.second_moment) * z.slope
        dr = dn * law.turn * before * z.slope
        found.append(dz + dr + dn)
        back = dh * z.second_moment + law.turn * (dz + dr + dn * z.second_moment)
    return found[::-1]
