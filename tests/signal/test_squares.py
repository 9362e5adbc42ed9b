"""Roots and logarithms of sums of squares, against scipy and Monte Carlo."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
from scipy import special

from archlint.graph.builder import GraphBuilder
from archlint.graph.model import LayerGraph, verify
from archlint.initialization.distribution import normal
from archlint.signal.moments import Signal
from archlint.signal.propagate import propagate
from archlint.signal.squares import (
    digamma,
    log_of_gamma,
    log_series,
    root_of_gamma,
    root_series,
    trigamma,
)

WIDTH, BINS = 64, 32


@pytest.mark.parametrize("a", [0.05, 0.5, 1.0, 1.7, 9.0, 300.0])
def test_special_functions(a: float) -> None:
    assert digamma(a) == pytest.approx(special.digamma(a), rel=1e-9)
    assert trigamma(a) == pytest.approx(special.polygamma(1, a), rel=1e-9)
    for rho in (0.0, 0.3, 0.9, 1.0):
        assert root_series(a, rho) == pytest.approx(
            float(mpmath.hyp2f1(-0.5, -0.5, a, rho)), rel=1e-6
        )
    n = np.arange(1, 400)
    terms = np.exp(special.gammaln(n) + special.gammaln(a) - special.gammaln(a + n))
    assert log_series(a, 0.9) == pytest.approx(float(np.sum(0.9**n * terms / n)), rel=1e-6)
    assert log_series(a, 0.0) == 0.0


def _pairs(k: int, r: float, scales: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Two sums of k squares whose normal variables correlate by r."""
    random = np.random.default_rng(1)
    x = random.standard_normal((400_000, k))
    y = r * x + math.sqrt(1 - r * r) * random.standard_normal(x.shape)
    weights = np.resize(scales, k)
    return (weights * x**2).sum(1), (weights * y**2).sum(1)


# Exact for equal variances; for variances 1 : 2 the gamma law errs by 5 % in the logarithm's rms.
@pytest.mark.parametrize(
    ("k", "scales", "tolerance"),
    [(1, [3.0], 0.01), (2, [0.5], 0.01), (6, [2.0], 0.01), (2, [1.0, 2.0], 0.05)],
)
@pytest.mark.parametrize("r", [0.0, 0.6, 0.95])
def test_moments_and_correlations(k: int, scales: list[float], tolerance: float, r: float) -> None:
    a, b = _pairs(k, r, scales)
    weights = np.resize(scales, k)
    mean, variance = float(weights.sum()), 2 * float((weights**2).sum())
    second = variance + mean**2
    x = Signal(mean, second, (r * r * variance + mean**2) / second, one_sided=1)
    for found, f in ((root_of_gamma(x), np.sqrt), (log_of_gamma(x), np.log)):
        wanted = float(np.mean(f(a) ** 2))
        assert found.mean is not None
        assert found.second_moment is not None
        assert found.position_correlation is not None
        scale = math.sqrt(wanted)
        assert found.mean == pytest.approx(float(np.mean(f(a))), abs=tolerance * scale)
        assert found.second_moment == pytest.approx(wanted, rel=2 * tolerance)
        assert found.position_correlation == pytest.approx(
            float(np.mean(f(a) * f(b))) / wanted, abs=2 * tolerance
        )


def _spectrum(*tail: str, edge: float = 1e-12) -> tuple[LayerGraph, str]:
    """|re + i·im|² of two linear maps of the input, then the ops of ``tail``."""
    b = GraphBuilder()
    x = b.input("x", (8, WIDTH))
    law = normal(1 / math.sqrt(WIDTH))
    parts = []
    for name in ("re", "im"):
        w = b.parameter(f"{name}.weight", (BINS, WIDTH), law)
        y = b.node("linear", [x, w], (8, BINS), name=name, input_axis=1)
        parts.append(b.node("mul", [y, y], (8, BINS)))
    y = b.node("add", parts, (8, BINS))
    for op in tail:
        if op in ("maximum", "add"):
            y = b.node(op, [b.constant(np.float32(edge)), y], (8, BINS))
        elif op == "pow":
            y = b.node(op, [y, b.constant(np.float32(2))], (8, BINS))
        elif op == "transpose":
            y = b.node(op, [y], (BINS, 8), permutation=(1, 0))
        else:
            y = b.node(op, [y], b.values[y].shape)
    return verify(b.finish([y])), y


def _drawn(apply: object) -> np.ndarray:
    random = np.random.default_rng(2)
    x = random.standard_normal((2, 200_000))
    return apply((x**2).sum(0))  # type: ignore[operator,no-any-return]


@pytest.mark.parametrize(
    ("tail", "apply"),
    [
        (("sqrt",), np.sqrt),
        (("transpose", "sqrt"), np.sqrt),
        (("log",), np.log),
        (("sqrt", "log"), lambda v: np.log(np.sqrt(v))),
        (("sqrt", "pow"), lambda v: v),
        (("sqrt", "pow", "maximum", "log"), np.log),
        (("add", "sqrt"), np.sqrt),
        (("sqrt", "transpose", "pow", "add", "log"), np.log),
    ],
)
def test_magnitudes_of_a_spectrum(tail: tuple[str, ...], apply: object) -> None:
    graph, out = _spectrum(*tail)
    found, wanted = propagate(graph)[out], _drawn(apply)
    assert found.mean == pytest.approx(wanted.mean(), rel=0.01, abs=0.01)
    assert found.second_moment == pytest.approx((wanted**2).mean(), rel=0.02)


def test_a_floor_that_is_no_trifle_is_not_passed_over() -> None:
    graph, out = _spectrum("add", "sqrt", edge=0.5)
    found = propagate(graph)[out]
    assert found.mean is None
    assert found.second_moment == pytest.approx(2.5)


def test_a_root_of_anything_else_has_no_known_mean() -> None:
    b = GraphBuilder()
    x = b.input("x", (8, 4))
    y = b.node("sqrt", [b.node("relu", [x], (8, 4))], (8, 4))
    z = b.node("log", [b.node("relu", [x], (8, 4))], (8, 4))
    signals = propagate(verify(b.finish([y, z])))
    assert signals[y].mean is None
    assert signals[y].second_moment == pytest.approx(1 / math.sqrt(2 * math.pi))
    assert not signals[z].known
