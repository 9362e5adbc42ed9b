"""Hanin & Nica 2018, Products of many large random matrices and gradients in deep neural networks
(arXiv 1812.05994): ln ‖…u‖² is asymptotically N(−β/2, β), β = (3/p − 1) Σ 1/n_j."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

from archlint.signal.analysis import analyse
from archlint.signal.spread import variance_of_log
from tests.papers.networks import Floats, stack_graph


def _log_norms(rng: np.random.Generator, width: int, depth: int, keep: float, draws: int) -> Floats:
    """ln of the squared norm of Π D_j W_j u over real draws of the matrices, D Bernoulli(p),
    Var W = 1/(p n)."""
    u = np.zeros((draws, width))
    u[:, 0] = 1.0
    total = np.zeros(draws)
    for _ in range(depth):
        weight = rng.standard_normal((draws, width, width)) / math.sqrt(keep * width)
        mask = rng.random((draws, width)) < keep
        u = np.matmul(weight, u[:, :, None])[:, :, 0] * mask
        size = np.square(u).sum(axis=1)
        total += np.log(size)
        u /= np.sqrt(size)[:, None]
    return total


def _exact_law(width: int, keep: float) -> tuple[float, float]:
    """Mean and variance of ln χ²_B/(p n), B ~ Bin(n, p) given B ≥ 1 (theory.md 5.2)."""
    b = np.arange(1, width + 1)
    weight = stats.binom.pmf(b, width, keep)
    weight /= weight.sum()
    logs = special.digamma(b / 2) + math.log(2 / (keep * width))
    mean = float(weight @ logs)
    inner = special.polygamma(1, b / 2)
    return mean, float(weight @ inner + weight @ (logs - mean) ** 2)


@pytest.mark.parametrize(
    ("width", "depth", "keep", "draws"),
    [(32, 10, 0.5, 700), (64, 16, 0.5, 400), (32, 20, 1.0, 500),
     pytest.param(100, 20, 0.5, 2000, marks=pytest.mark.slow)],
)  # fmt: skip
def test_log_normal_law(width: int, depth: int, keep: float, draws: int) -> None:
    """Mean −β/2 and variance β to first order in 1/n, exactly by the law of a layer, and the
    Kolmogorov-Smirnov distance to the normal law."""
    logs = _log_norms(np.random.default_rng(width), width, depth, keep, draws)
    beta = (3 / keep - 1) * depth / width
    one_mean, one_variance = _exact_law(width, keep)
    mean, variance = depth * one_mean, depth * one_variance
    assert abs(logs.mean() - mean) <= 4 * math.sqrt(variance / draws)
    assert abs(logs.var(ddof=1) - variance) <= 4 * variance * math.sqrt(2.2 / draws)
    # the leading order is below the exact figures by 4.1/n² and 18.5/n² a layer at p = ½
    assert mean == pytest.approx(-beta / 2, abs=6 * depth / width**2)
    assert variance == pytest.approx(beta, abs=25 * depth / width**2)
    distance = stats.kstest(logs, "norm", args=(mean, math.sqrt(variance))).statistic
    # 1.95/√N is met in 999 of 1000 samples of the law itself; a sum of d logarithms of χ² is
    # skewed by about 1/√(d·n/2), which moves its distribution function by a sixth of that.
    assert distance <= 1.95 / math.sqrt(draws) + 1 / math.sqrt(depth * width / 2) / 6
    off = stats.kstest(logs, "norm", args=(0.0, math.sqrt(variance))).statistic
    assert off > distance  # the mean is −β/2, not 0: E is kept, the median is not


@pytest.mark.parametrize(("width", "depth"), [(32, 10), (64, 16), (100, 20), (10, 10)])
def test_engine(width: int, depth: int) -> None:
    """The spread of the engine, forward and backward, is the exact variance of the law."""
    analysis = analyse(stack_graph([width] * (depth + 1), output=1))
    (segment,) = analysis.segments
    _, one = _exact_law(width, 0.5)
    for law in analysis.laws(segment):
        assert law is not None
        assert law.variance == pytest.approx(depth * one, rel=1e-9)
    assert variance_of_log(width, 1.0) == pytest.approx(_exact_law(width, 1.0)[1], rel=1e-9)


def test_first_layer_of_other_weights() -> None:
    """(μ₄ − 3)/(p n₁)·‖u‖₄⁴/‖u‖₂⁴ is the only place where the kurtosis enters at order 1/n: for a
    one-hot input E M² = 1 + (5 + 2(μ₄ − 3))/n, for a spread one 1 + 5/n + O(1/n²)."""
    rng = np.random.default_rng(2)
    n, draws = 12, 60_000
    for one_hot in (True, False):
        u = np.eye(n)[0] if one_hot else np.full(n, 1 / math.sqrt(n))
        weight = rng.uniform(-1, 1, (draws, n, n)) * math.sqrt(6 / n)
        m = np.square(np.maximum(weight @ u, 0.0)).sum(axis=1)
        sparse = 1.0 if one_hot else 1 / n
        exact = 1 + (5 + 2 * (1.8 - 3) * sparse) / n
        squares = np.square(m)
        error = squares.std(ddof=1) / math.sqrt(draws)
        assert abs(squares.mean() - exact) <= 4 * error
