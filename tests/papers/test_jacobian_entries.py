"""Hanin 2018, Which neural net architectures give rise to exploding and vanishing gradients?
(arXiv 1801.03744): moments of the entries of the input-output Jacobian."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

from archlint.signal.analysis import analyse
from archlint.signal.spread import variance_of_log
from tests.papers.networks import HE_NORMAL, Floats, stack_graph

INPUTS, OUTPUTS = 8, 6
ARCHITECTURES = {
    "mixed": [12, 20, 10, 15, 9],
    "constant": [20] * 6,
    "alternating": [30, 10, 30, 10],
    "narrowing": [40, 20, 10],
    "widening": [10, 20, 40],
}


def _jacobians(rng: np.random.Generator, widths: list[int], bias: float, draws: int) -> Floats:
    """[draws, OUTPUTS, INPUTS] at one input; the last layer is linear with variance 2/fan-in."""
    sizes = [INPUTS, *widths]
    x = np.broadcast_to(rng.standard_normal(INPUTS), (draws, INPUTS))
    jacobian = np.broadcast_to(np.eye(INPUTS), (draws, INPUTS, INPUTS))
    for n, m in zip(sizes, widths, strict=False):
        weight = HE_NORMAL.draw(rng, draws, n, m)
        z = np.matmul(weight, x[:, :, None])[:, :, 0] + bias * rng.standard_normal((draws, m))
        x = np.maximum(z, 0.0)
        jacobian = np.matmul(weight, jacobian) * (z > 0)[:, :, None]
    return np.matmul(HE_NORMAL.draw(rng, draws, widths[-1], OUTPUTS), jacobian)


def _growth(widths: list[int]) -> float:
    """Π(1 + 5/n_j) over the hidden widths."""
    return math.prod(1 + 5 / n for n in widths)


@pytest.mark.parametrize("bias", [0.0, 0.5])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_moments_of_entries(name: str, bias: float) -> None:
    """E Z² = c/n₀ and E Z⁴ = 3·(E Z²)²·Π(1 + 5/n_j), whatever the biases (theory.md 2); and the
    engine's squared gradient of the input is Σ over outputs of E Z²."""
    widths = ARCHITECTURES[name]
    rng = np.random.default_rng(len(widths))
    z = _jacobians(rng, widths, bias, 6_000)
    squares = np.square(z).mean(axis=(1, 2))
    error = squares.std(ddof=1) / math.sqrt(squares.size)
    assert abs(squares.mean() - 2 / INPUTS) <= 4 * error
    # Given the layers before, an entry is normal with variance 2|u|²/n, u the column before the
    # last layer: the mean of 3·(that variance)² has less noise than that of Z⁴ itself.
    columns = np.square(z).mean(axis=1)  # over outputs: 2|u|²/n times χ²_m/m, E = 1 + 2/m
    fourths = 3 * np.square(columns).mean(axis=1) / (1 + 2 / OUTPUTS)
    exact = 3 * (2 / INPUTS) ** 2 * _growth(widths)
    error = fourths.std(ddof=1) / math.sqrt(fourths.size)
    # A heavy tail: the standard error is underestimated, at worst by half.
    assert abs(fourths.mean() - exact) <= 6 * error
    assert error < 0.15 * exact
    graph = stack_graph([INPUTS, *widths], bias=bias, output=OUTPUTS)
    analysis = analyse(graph)
    gradient = analysis.prediction(graph.inputs[0]).grad_second_moment
    assert gradient == pytest.approx(OUTPUTS * 2 / INPUTS, rel=1e-9)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_columns_and_rows(name: str) -> None:
    """Columns: (1 + 2/n_d)·Π(1 + 5/n_j); rows: (1 + 2/n₀)·Π(1 + 5/n_j)."""
    widths = ARCHITECTURES[name]
    z = _jacobians(np.random.default_rng(9), widths, 0.0, 6_000)
    for axis, size in ((1, OUTPUTS), (2, INPUTS)):
        norms = np.square(z).sum(axis=axis)
        ratios = np.square(norms).mean(axis=1) / float(norms.mean()) ** 2
        exact = (1 + 2 / size) * _growth(widths)
        error = ratios.std(ddof=1) / math.sqrt(ratios.size)
        assert abs(ratios.mean() - exact) <= 6 * error


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_spread_of_the_gradient(name: str) -> None:
    """Var ln of a row's squared norm, the gradient of one output: ψ₁(n₀/2) and every hidden
    layer's exact share; the engine's at the input."""
    widths = ARCHITECTURES[name]
    rng = np.random.default_rng(3)
    draws = 3000
    z = _jacobians(rng, widths, 0.0, draws)
    squares = np.square(z[:, 0]).sum(axis=1)
    logs = np.log(squares[squares > 0])
    graph = stack_graph([INPUTS, *widths], output=1)
    beta = analyse(graph).prediction(graph.inputs[0]).grad_spread
    assert beta is not None
    exact = float(special.polygamma(1, INPUTS / 2)) + sum(variance_of_log(n) for n in widths)
    assert beta == pytest.approx(exact, rel=1e-9)
    error = logs.var() * math.sqrt((stats.kurtosis(logs, fisher=False) - 1) / logs.size)
    assert abs(logs.var() - beta) <= 4 * error
