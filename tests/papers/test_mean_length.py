"""Hanin & Rolnick 2018, How to start training: mean length by initializer, its variance over
layers, and residual networks (arXiv 1803.01719)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from archlint.signal.analysis import analyse
from archlint.signal.propagate import propagate
from tests.papers.networks import (
    HE_NORMAL,
    INITIALIZERS,
    Floats,
    Initializer,
    lengths,
    residual_graph,
    stack_graph,
)

INPUTS = 16

# log10 E[M_d/M_0] of a network of width = depth = d over n₀ inputs (theory.md 1.3).
EXACT: dict[str, Callable[[int, int], float]] = {
    "he_normal": lambda n, d: 0.0,
    "he_uniform": lambda n, d: 0.0,
    "he_truncated": lambda n, d: d * math.log10(0.7737413),
    "glorot_normal": lambda n, d: math.log10(n / (n + d)) + (d - 1) * math.log10(0.5),
    "glorot_uniform": lambda n, d: math.log10(n / (n + d)) + (d - 1) * math.log10(0.5),
    "lecun_normal": lambda n, d: d * math.log10(0.5),
    "twice_he": lambda n, d: d * math.log10(2.0),
}


def _engine(depth: int, initializer: Initializer) -> float:
    graph = stack_graph([INPUTS, *[depth] * depth], initializer)
    second = propagate(graph)[graph.outputs[0]].second_moment
    assert second is not None
    return math.log10(second)


def _mean_by_ratios(found: list[Floats], start: Floats) -> tuple[float, float]:
    """ln E M_d and its standard error, from the mean ratio M_j/M_{j−1} of every layer.

    E[M_j | layer j−1] = (c/2)·M_{j−1}, so the product of the mean ratios has the expectation
    E M_d/M_0; each ratio varies by 5/n only, while M_d itself is log-normal with β = 5·d/n: the
    plain mean of width = depth would need e⁵ draws to see its tail.
    """
    total = variance = 0.0
    before = start
    for after in found:
        alive = before > 0
        ratio = after[alive] / before[alive]
        total += math.log(float(ratio.mean()))
        variance += float(ratio.var(ddof=1)) / float(ratio.mean()) ** 2 / ratio.size
        before = after
    return total, math.sqrt(variance)


@pytest.mark.parametrize("depth", [10, 20, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("initializer", INITIALIZERS, ids=lambda i: i.name)
def test_mean_length_against_depth(initializer: Initializer, depth: int) -> None:
    """Figure 1(a): formula, engine and networks of width = depth."""
    exact = EXACT[initializer.name](INPUTS, depth)
    assert _engine(depth, initializer) == pytest.approx(exact, abs=1e-6)
    rng = np.random.default_rng(depth)
    draws = 600
    x = rng.standard_normal((draws, INPUTS))
    found = list(lengths(rng, x, [INPUTS, *[depth] * depth], draws, initializer))
    log_mean, error = _mean_by_ratios(found, np.square(x).mean(axis=1))
    assert abs(log_mean - exact * math.log(10)) <= 4 * error
    assert error < 0.3


@pytest.mark.parametrize("depth", [10, 20])
def test_typical_length_falls(depth: int) -> None:
    """At the critical variance the mean stays and the median falls by β/2 in ln (theory.md 5.2):
    in logarithms, where 600 draws tell. The engine's β is that of the segment."""
    graph = stack_graph([INPUTS, *[depth] * depth], output=1)
    analysis = analyse(graph)
    (segment,) = analysis.segments
    law, _ = analysis.laws(segment)
    assert law is not None
    beta = law.variance
    rng = np.random.default_rng(depth + 1)
    x = rng.standard_normal(INPUTS)
    *_, last = lengths(rng, x, [INPUTS, *[depth] * depth], 600)
    logs = np.log(last[last > 0] / np.square(x).mean())
    assert abs(logs.var() - beta) <= 4 * beta * math.sqrt(2 / logs.size)
    # Leading order −β/2 and −2.5 Σ1/n bracket what the conditional law gives.
    assert logs.mean() < -2.0


def _variance_over_layers(widths: list[int]) -> float:
    """E V̂ar[M_1 … M_d]/M_0² = (1/d²) Σ P_i (2i − d − 1), P_i = Π_{k≤i}(1 + 5/n_k)."""
    d = len(widths)
    product, total = 1.0, 0.0
    for i, n in enumerate(widths, 1):
        product *= 1 + 5 / n
        total += product * (2 * i - d - 1)
    return total / d**2


@pytest.mark.parametrize(
    ("widths", "table"),
    [([20] * 10, 1.416), ([10] * 5, 1.200), ([40, 10, 40, 10, 40, 10], 0.664), ([50] * 20, 0.943)],
)
def test_empirical_variance_over_layers(widths: list[int], table: float) -> None:
    """The statistic of the second failure mode: its exact mean against the law of a layer, and
    that law against networks.

    Given layer j−1, n·M_j/(2·M_{j−1}) is χ² of Bin(n, ½) degrees of freedom (exact for Gaussian
    weights); drawing that is cheap enough for the heavy tail of M².
    """
    exact = _variance_over_layers(widths)
    assert exact == pytest.approx(table, abs=2e-3)
    rng = np.random.default_rng(len(widths))
    draws = 150_000
    m = np.ones(draws)
    layers = []
    for n in widths:
        freedom = rng.binomial(n, 0.5, draws)
        m = m * np.where(freedom > 0, 2 * rng.chisquare(np.maximum(freedom, 1)), 0.0) / n
        layers.append(m)
    variance = np.var(np.stack(layers), axis=0)
    error = variance.std(ddof=1) / math.sqrt(draws)
    # The standard error of a heavy tail is itself underestimated: it may be half the true one.
    assert abs(variance.mean() - exact) <= 8 * error
    assert error < 0.1 * exact
    real = list(lengths(rng, np.ones(widths[0]), [widths[0], *widths], 500))
    one, other = np.log(real[-1][real[-1] > 0]), np.log(layers[-1][layers[-1] > 0])
    error = math.sqrt(one.var() / one.size)
    assert abs(one.mean() - other.mean()) <= 4 * error
    assert abs(one.var() - other.var()) <= 4 * one.var() * math.sqrt(2.5 / one.size)


# --------------------------------------------------------------------------- residual networks

SCALES: dict[str, Callable[[int], list[float]]] = {
    "one": lambda depth: [1.0] * depth,
    "half": lambda depth: [0.5] * depth,
    "geometric": lambda depth: [0.9**k for k in range(1, depth + 1)],
    "root": lambda depth: [depth**-0.5] * depth,
    "linear": lambda depth: [1 / depth] * depth,
}


def _recursion(scales: list[float]) -> float:
    """E M_L of h ← h + η·relu(W h) from a zero-mean input of length 1 (theory.md 7.1):
    s ← s + η√(q/π), q ← q(1 + η²) + 2ηs√(q/π), with s the mean entry."""
    s, q = 0.0, 1.0
    for eta in scales:
        step = eta * math.sqrt(q / math.pi)
        s, q = s + step, q * (1 + eta * eta) + 2 * s * step
    return q


def _residual_lengths(rng: np.random.Generator, width: int, scales: list[float], draws: int
                      ) -> Floats:  # fmt: skip
    h = rng.standard_normal((draws, width))
    for eta in scales:
        weight = HE_NORMAL.draw(rng, draws, width, width)
        h = h + eta * np.maximum(np.matmul(weight, h[:, :, None])[:, :, 0], 0.0)
    return np.square(h).mean(axis=1)


@pytest.mark.parametrize("depth", [10, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCALES)
def test_residual_scales(name: str, depth: int) -> None:
    """Figure 2: the length of a residual network whose modules end in a ReLU."""
    scales = SCALES[name](depth)
    exact = _recursion(scales)
    graph = residual_graph(5, scales)
    second = propagate(graph)[graph.outputs[0]].second_moment
    assert second == pytest.approx(exact, rel=1e-6)
    rng = np.random.default_rng(depth)
    wide = _residual_lengths(rng, 64, scales, 300)
    error = wide.std(ddof=1) / math.sqrt(wide.size)
    # √M is below its wide limit √(E M) by Var M/(8 (E M)²): a percent or two at width 64.
    assert abs(wide.mean() - exact) <= 4 * error + 0.03 * exact


@pytest.mark.parametrize("depth", [10, 20])
def test_residual_modules_of_width_five(depth: int) -> None:
    """As the paper has it: single-layer modules of width 5. There length and alignment with the
    vector of ones go together, so that E M is above the recursion, by a share of the growth; the
    sum of the scales still decides which network explodes, not the sum of their squares."""
    rng = np.random.default_rng(5)
    means, sums = {}, {}
    for name, make in SCALES.items():
        scales = make(depth)
        found = _residual_lengths(rng, 5, scales, 8000)
        sums[name] = sum(scales)
        means[name] = float(np.log(found).mean())
        if name == "one":  # Var ln M of 4 to 7: no plain mean of 8000 draws holds
            continue
        error = found.std(ddof=1) / math.sqrt(found.size)
        exact = _recursion(scales)
        assert exact - 4 * error <= found.mean() <= 1.4 * exact + 4 * error
    assert sorted(means, key=lambda k: means[k]) == sorted(sums, key=lambda k: sums[k])
    assert means["linear"] < math.log(2)


def test_root_scales_grow_with_depth() -> None:
    """η = 1/√L has Σ η² = 1 and still explodes: the criterion is Σ η (theory.md 7.1)."""
    found = [_recursion([length**-0.5] * length) for length in (25, 100, 400)]
    assert found[0] == pytest.approx(85.8, rel=2e-3)
    assert found[1] > 10 * found[0]
    assert found[2] > 100 * found[1]
    assert _recursion([0.3] * 20) == pytest.approx(282.1, rel=1e-3)
    flat = [_recursion([1 / length] * length) for length in (20, 100, 400)]
    assert flat[0] == pytest.approx(1.395, rel=1e-3)
    assert max(flat) < 1.5


@pytest.mark.parametrize(
    ("width", "depth", "eta"), [(16, 20, 20**-0.5), (16, 10, 1.0), (8, 10, 0.5)]
)
def test_spread_of_residual_networks(width: int, depth: int, eta: float) -> None:
    """Linear-ended modules W₂ relu(W₁ h): with Σ η² bounded the spread is about 4/n whatever the
    depth: β = Σ [4η² + κη⁴]/(n(1 + η²)²), κ = 2 + 5 (theory.md 7.2)."""
    rng = np.random.default_rng(width)
    draws = 3000
    h = np.broadcast_to(rng.standard_normal(width), (draws, width))
    for _ in range(depth):
        inner = np.matmul(HE_NORMAL.draw(rng, draws, width, width), h[:, :, None])
        outer = rng.standard_normal((draws, width, width)) / math.sqrt(width)
        h = h + eta * np.matmul(outer, np.maximum(inner, 0.0))[:, :, 0]
    logs = np.log(np.square(h).mean(axis=1))
    e2 = eta * eta
    beta = depth * (4 * e2 + 7 * e2 * e2) / (width * (1 + e2) ** 2)
    # First order in 1/n: the next one is a third at n = 8.
    assert abs(logs.var() - beta) <= 4 * beta * math.sqrt(2.5 / draws) + 3 * beta / width
