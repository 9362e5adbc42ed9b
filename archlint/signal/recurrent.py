"""RNN, LSTM, GRU: the second moments of gates and state, step by step.

One step is an affine map of input and state with independent weights, so pre-activations are
normal given the step before; gates and candidate of one step are independent given that. The state
of later steps depends on the weights again, which is left out (as in Chen et al. 2018,
"Dynamical isometry and a mean field theory of RNNs").
"""

from __future__ import annotations

import math

from archlint.signal.activations import Activation, Moments, activation
from archlint.signal.moments import UNKNOWN_SIGNAL, Role, Signal
from archlint.signal.transfer import Step, known_size, transfers

_MOST_STEPS = 256


def _unit(name: str) -> Activation:
    found = activation(name, {})
    if found is None:
        raise LookupError(name)
    return found


def _gate(mean: float, variance: float) -> Moments:
    return _unit("sigmoid").moments(mean, variance)


@transfers("rnn", "lstm", "gru")
def _recurrent(step: Step) -> tuple[Signal, ...]:
    blank = tuple(UNKNOWN_SIGNAL for _ in step.node.outputs)
    x, shape = step.signal(0), step.shape(0)
    weight, recurrence = step.signal(1), step.signal(2)
    features = known_size(shape, (-1,)) if shape else None
    batch_first = bool(step.attribute("batch_first"))
    length = known_size(shape, (1 if batch_first else 0,)) if shape else None
    hidden = int(step.number("hidden"))
    bias = step.signal(3) if step.has(3) else Signal(0.0, 0.0)
    names = step.attribute("activations")
    usual = {"lstm": ("sigmoid", "tanh", "tanh"), "gru": ("sigmoid", "tanh"),
             "rnn": ("tanh",), }[step.node.op]  # fmt: skip
    given = tuple(names)[: len(usual)] if isinstance(names, tuple) and names else usual
    if step.node.op != "rnn" and given != usual:
        return blank
    if (features is None or length is None or x.second_moment is None
            or weight.second_moment is None or recurrence.second_moment is None
            or bias.second_moment is None or bias.mean is None):  # fmt: skip
        return blank
    driven = features * weight.second_moment * x.second_moment
    shift = 2 * bias.mean  # input and recurrent bias add up
    noise = driven + 2 * max(bias.second_moment - bias.mean**2, 0.0)
    turn = hidden * recurrence.second_moment
    try:
        states = _run(step.node.op, str(given[0]), noise, turn, shift, min(length, _MOST_STEPS))
    except LookupError:
        return blank
    seconds = [h for h, _ in states]
    seconds += seconds[-1:] * (length - len(seconds))
    roles: tuple[Role, ...] = ("position", "sample", "feature", "feature")
    whole = sum(seconds) / len(seconds)
    odd = () if shift or bias.second_moment else x.odd_in
    out = Signal(0.0, whole, None, None, odd, 0, roles)
    last: tuple[Role, ...] = ("feature", "sample", "feature")
    final = Signal(0.0, states[-1][0], 1.0, None, odd, 0, last)
    cell = Signal(0.0, states[-1][1], 1.0, None, odd, 0, last)
    if batch_first:
        out = out.but(roles=("sample", "position", "feature", "feature"))
    return (out, final, cell)[: len(step.node.outputs)]


def _run(op: str, kind: str, noise: float, turn: float, shift: float, steps: int
         ) -> list[tuple[float, float]]:  # fmt: skip
    """(E h², E c²) after each step, from a zero state."""
    h = c = 0.0
    states = []
    for _ in range(steps):
        q = noise + turn * h
        if op == "rnn":
            h = _unit(kind).moments(shift, q).second_moment
            c = h
        elif op == "lstm":
            gate = _gate(shift, q)
            g = _unit("tanh").moments(shift, q)
            c = gate.second_moment * (c + g.second_moment)
            h = gate.second_moment * _unit("tanh").moments(0.0, c).second_moment
        else:  # h ← (1 − z)·n + z·h
            z = _gate(shift, q)
            n = _unit("tanh").moments(shift, noise + turn * z.second_moment * h)
            rest = 1 - 2 * z.mean + z.second_moment
            h = rest * n.second_moment + z.second_moment * h
            c = h
        if not math.isfinite(h):
            raise LookupError("the state diverges")
        states.append((h, c))
    return states
