"""Sums of squares, their roots and logarithms: the magnitudes and powers of a spectrum.

A sum of k squares of centred normal variables of one variance is σ²χ²_k, a gamma law. With unequal
variances the gamma law with the same two moments stands for it (Satterthwaite 1946): for two terms
of variances 1 : 2 the rms of the logarithm is 5 % off, that of the root exact. Two such sums with
correlation ρ follow Kibble's bivariate gamma law (Kibble 1941; Nakagami 1960).
"""

from __future__ import annotations

import math

from archlint.graph.model import LayerGraph, Node
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.transfer import Step, correlated

_MOVES = frozenset({"transpose", "reshape", "identity", "slice", "select_index", "cast"})
_MOST = 12  # nodes that are looked back over
_TINY = 1e-4  # an added constant below this share of the sum is there against log 0 and √0


def _before_moves(graph: LayerGraph, value: str | None) -> tuple[str | None, Node | None]:
    """What a value was before its elements were only moved, and the node that made it."""
    for _ in range(_MOST):
        node = graph.producer.get(value) if value is not None else None
        if node is None or node.op not in _MOVES:
            return value, node
        value = node.inputs[0]
    return value, None


def is_sum_of_squares(step: Step, value: str | None, most: int = _MOST) -> bool:
    """Whether a value is a sum or mean of squares of centred normal tensors, but for a tiny
    constant."""
    value, node = _before_moves(step.graph, value)
    if node is None or value is None or most <= 0:
        return False
    below = [v for v in node.inputs if v is not None]
    twice = node.op == "mul" and len(below) == 2 and below[0] == below[1]
    if node.op == "square" or twice or (node.op == "pow" and _number(step, below[1]) == 2.0):
        _, root = _before_moves(step.graph, below[0])
        if root is not None and root.op == "sqrt":
            return is_sum_of_squares(step, root.inputs[0], most - 1)
        return _is_centred_normal(step, below[0])
    if node.op in ("reduce_sum", "reduce_mean"):
        return is_sum_of_squares(step, below[0], most - 1)
    if node.op == "add":
        total = step.signals.get(value, UNKNOWN_SIGNAL).mean or 0.0
        return all(is_tiny(step, v, total) or is_sum_of_squares(step, v, most - 1) for v in below)
    if node.op in ("clip", "maximum"):
        held = held_above(step, node)
        return held is not None and is_sum_of_squares(step, held, most - 1)
    return False


def held_above(step: Step, node: Node) -> str | None:
    """What a clip or maximum holds above a number that it hardly ever reaches; None otherwise."""
    pair = node.inputs if node.op == "maximum" else node.inputs[:2]
    if len(pair) != 2 or (node.op == "clip" and any(v is not None for v in node.inputs[2:])):
        return None
    for value, edge in (pair, pair[::-1]) if node.op == "maximum" else (pair,):
        number = _number(step, edge) if edge is not None else None
        x = step.signals.get(value or "", UNKNOWN_SIGNAL)
        if number is not None and x.mean is not None and is_above(x, number):
            return value
    return None


def is_above(x: Signal, edge: float) -> bool:
    """Whether a tensor that is nowhere negative hardly ever falls below ``edge``."""
    return x.one_sided > 0 and (edge <= 0 or (x.mean is not None and edge <= _TINY * x.mean))


def _number(step: Step, value: str) -> float | None:
    array = step.graph.constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def is_tiny(step: Step, value: str, total: float) -> bool:
    """Whether a value is a number that is there against a division by zero, beside a total."""
    number = _number(step, value)
    return number is not None and 0 <= number <= _TINY * total


def _is_centred_normal(step: Step, value: str) -> bool:
    value = _before_moves(step.graph, value)[0] or value
    x = step.signals.get(value, UNKNOWN_SIGNAL)
    if not x.gaussian or x.mean is None or x.second_moment is None:
        return False
    return abs(x.mean) <= 1e-6 * math.sqrt(x.second_moment)


def before_root(step: Step, value: str | None) -> tuple[Signal | None, float]:
    """(X, p) for a value X^p where X is a sum of squares and p is 1 or ½; (None, 1) otherwise."""
    value, node = _before_moves(step.graph, value)
    power = 1.0
    if node is not None and node.op == "sqrt":
        value, power = node.inputs[0], 0.5
    if value is None or not is_sum_of_squares(step, value):
        return None, 1.0
    return step.signals.get(value, UNKNOWN_SIGNAL), power


def squared_root(step: Step) -> Signal | None:
    """(√X)² = X with X's own moments; None where the first input is no root."""
    _, node = _before_moves(step.graph, step.value(0))
    if node is None or node.op != "sqrt":
        return None
    x = step.signals.get(node.inputs[0] or "", UNKNOWN_SIGNAL)
    return x.but(roles=step.signal(0).roles, profile={}) if x.one_sided > 0 else None


def _shape(x: Signal) -> tuple[float, float] | None:
    """(m, a) of the gamma law Γ(a, m/a) with the signal's moments: m = E X, a = m²/Var X."""
    if x.mean is None or x.variance is None or x.mean <= 0:
        return None
    return x.mean, x.mean**2 / max(x.variance, 1e-12 * x.mean**2)


def _power_correlation(x: Signal, c: float | None) -> float | None:
    """The correlation coefficient of X and X′ from c = E[X X′]/E X²; at least 0."""
    if c is None or x.second_moment is None or not x.variance or x.mean is None:
        return None
    return min(max((c * x.second_moment - x.mean**2) / x.variance, 0.0), 1.0)


def root_of_gamma(x: Signal) -> Signal:
    """√X: E √X = √(m/a)·Γ(a+½)/Γ(a), E[√X √X′] = (E √X)²·₂F₁(−½, −½; a; ρ) (Nakagami 1960)."""
    law = _shape(x)
    if law is None:
        return Signal(roles=x.roles)
    m, a = law
    mean = math.sqrt(m / a) * math.exp(math.lgamma(a + 0.5) - math.lgamma(a))

    def pair(c: float | None) -> float | None:
        rho = _power_correlation(x, c)
        return None if rho is None else correlated(mean * mean * root_series(a, rho), m)

    return Signal(mean, m, pair(x.position_correlation), pair(x.sample_correlation),
                  (), 1, x.roles, cross_correlation=pair(x.apart))  # fmt: skip


def log_of_gamma(x: Signal) -> Signal:
    """ln X: mean ψ(a) + ln(m/a), variance ψ′(a), Cov(ln X, ln X′) = Σ_n ρⁿ (n−1)!/(n·(a)_n), the
    Laguerre series of Kibble's law, which is ψ′(a) at ρ = 1."""
    law = _shape(x)
    if law is None:
        return Signal(roles=x.roles)
    m, a = law
    mean = digamma(a) + math.log(m / a)
    second = trigamma(a) + mean * mean

    def pair(c: float | None) -> float | None:
        rho = _power_correlation(x, c)
        return None if rho is None else correlated(log_series(a, rho) + mean * mean, second)

    return Signal(mean, second, pair(x.position_correlation), pair(x.sample_correlation),
                  (), 0, x.roles, cross_correlation=pair(x.apart))  # fmt: skip


# --------------------------------------------------------------------------- special functions


def root_series(a: float, rho: float) -> float:
    """₂F₁(−½, −½; a; ρ) for 0 ≤ ρ ≤ 1; at ρ = 1 Gauss' Γ(a)Γ(a+1)/Γ(a+½)²."""
    if rho >= 1.0:
        return math.exp(math.lgamma(a) + math.lgamma(a + 1) - 2 * math.lgamma(a + 0.5))
    term = total = 1.0
    for n in range(2000):
        term *= (n - 0.5) ** 2 / ((a + n) * (n + 1)) * rho
        total += term
        if term < 1e-12 * total:
            break
    return total


def log_series(a: float, rho: float) -> float:
    """Σ_{n≥1} ρⁿ (n−1)!/(n·(a)_n) for 0 ≤ ρ ≤ 1; ψ′(a) at ρ = 1."""
    if rho >= 1.0:
        return trigamma(a)
    factor = rho / a  # ρⁿ (n−1)!/(a)_n
    total = 0.0
    for n in range(1, 5000):
        total += factor / n
        if factor < 1e-12:
            break
        factor *= rho * n / (a + n)
    return total


def digamma(a: float) -> float:
    """ψ(a) for a > 0: ψ(a) = ψ(a+1) − 1/a up to a ≥ 8, then the asymptotic series."""
    shift = 0.0
    while a < 8:
        shift -= 1 / a
        a += 1
    b = 1 / (a * a)
    return shift + math.log(a) - 0.5 / a - b * (1 / 12 - b * (1 / 120 - b * (1 / 252 - b / 240)))


def trigamma(a: float) -> float:
    """ψ′(a) for a > 0: ψ′(a) = ψ′(a+1) + 1/a² up to a ≥ 8, then the asymptotic series."""
    shift = 0.0
    while a < 8:
        shift += 1 / (a * a)
        a += 1
    b = 1 / (a * a)
    series = 1 / 6 - b * (1 / 30 - b * (1 / 42 - b / 30))
    return shift + 1 / a + b / 2 + series * b / a
