"""The spread of narrow layers and of stacks, the growth of residual streams, against draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import nn

from archlint.graph.from_torch import load_torch
from archlint.initialization.distribution import normal
from archlint.signal.activations import activation
from archlint.signal.analysis import analyse
from archlint.signal.criticality import critical
from archlint.signal.predictions import predict
from archlint.signal.propagate import propagate
from archlint.signal.spread import (
    CERTAIN,
    LogLaw,
    chance_of_loss,
    digamma_of,
    norm_law,
    normal_law,
    rectified_law,
    skewed_law,
    tetragamma_of,
    trigamma_of,
    variance_of_log,
)
from tests.papers.networks import Initializer, stack_graph
from tests.rules.models import Residual, he, mlp


def test_polygamma() -> None:
    x = np.concatenate([np.linspace(0.01, 5, 200), np.geomspace(5, 1e6, 100)])
    assert np.allclose(digamma_of(x), special.digamma(x), rtol=1e-10, atol=1e-10)
    assert np.allclose(trigamma_of(x), special.polygamma(1, x), rtol=1e-10)
    assert np.allclose(tetragamma_of(x), special.polygamma(2, x), rtol=1e-10)


@pytest.mark.parametrize("width", [4, 8, 15, 32, 200, 700])
@pytest.mark.parametrize("slope", [0.0, 0.1, 0.5, 1.0])
def test_variance_of_log(width: int, slope: float) -> None:
    rng = np.random.default_rng(width)
    z = rng.standard_normal((40_000 if width < 100 else 8_000, width))
    m = np.where(z > 0, z, slope * z) ** 2
    logs = np.log(m.mean(1)[m.mean(1) > 0])
    error = logs.var() * math.sqrt((stats.kurtosis(logs, fisher=False) - 1) / logs.size)
    assert abs(variance_of_log(width, slope) - logs.var()) <= 4 * error


def test_chances() -> None:
    rng = np.random.default_rng(0)
    for beta in (1.0, 2.5, 10.0):
        m = rng.normal(-beta / 2, math.sqrt(beta), 200_000)
        share = float((m < -math.log(10)).mean())
        law = LogLaw(beta, beta / 2)
        assert chance_of_loss(law) == pytest.approx(share, abs=5 * math.sqrt(share / 200_000))
    five = sum((rectified_law(10) for _ in range(5)), CERTAIN)
    assert five.dead == pytest.approx(0.0049, abs=1e-4)


def _lengths(
    build: Callable[[], nn.Module], width: int, draws: int, samples: int = 1
) -> np.ndarray:
    """The mean square that enters the head, a number a draw; fresh N(0,1) inputs for each where
    there are many, else one input for all."""
    torch.manual_seed(3)
    x = torch.randn(samples, width, dtype=torch.float64)
    found: list[float] = []
    with torch.no_grad():
        for _ in range(draws):
            network = build().double()
            head = network[-1] if isinstance(network, nn.Sequential) else network.head
            head.register_forward_pre_hook(lambda _m, i: found.append(float(i[0].square().mean())))
            network(x if samples == 1 else torch.randn_like(x))
    return np.array([m for m in found if m > 0])


@pytest.mark.parametrize(("depth", "width"), [(10, 15), (30, 15), (20, 64)])
def test_beta_of_a_stack(depth: int, width: int) -> None:
    """β against the variance of ln M over 400 draws: three standard errors or 20 %."""
    graph = load_torch(mlp(depth, width, he))
    analysis = analyse(graph)
    (segment,) = analysis.segments
    logs = np.log(_lengths(lambda: mlp(depth, width, he), width, 400))
    law, _ = analysis.laws(segment)
    assert law is not None
    beta = law.variance
    error = logs.var() * math.sqrt(2 / logs.size)
    assert abs(beta - logs.var()) <= max(3 * error, 0.2 * logs.var())


@pytest.mark.parametrize("ending", ["linear", "relu"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_growth_of_a_residual_stream(ending: str, scale: float) -> None:
    blocks, width = 8, 256

    def build() -> nn.Module:
        return Residual(blocks, width, scale, ending)

    analysis = analyse(load_torch(build()))
    (trunk,) = analysis.trunks
    growth = trunk.log10_growth(analysis.signals)
    assert growth is not None
    lengths = _lengths(build, width, 120, samples=64)
    error = float(lengths.std(ddof=1) / lengths.size**0.5 / lengths.mean())
    # Finite width: a stream of 256 elements is a few percent off the wide limit when one-sided.
    assert abs(10**growth / lengths.mean() - 1) <= 4 * error + 0.03


@pytest.mark.parametrize(
    ("op", "gain", "bias"),
    [("relu", 2.0, 0.0), ("gelu", 1.98306, 0.17292), ("silu", 1.98801, 0.55514),
     ("selu", 1.0, 0.0), ("tanh", 1.0, 0.0), ("elu", 1.5505, 0.0), ("relu6", 2.0, 0.0)],
)  # fmt: skip
def test_critical_initialization(op: str, gain: float, bias: float) -> None:
    phi = activation(op, {})
    assert phi is not None
    found = critical(phi)
    assert found is not None
    assert found.weight_gain == pytest.approx(gain, rel=1e-4)
    assert found.bias_variance == pytest.approx(bias, abs=1e-4)


@pytest.mark.parametrize("op", ["sigmoid", "softplus", "hardsigmoid"])
def test_no_scale_rescues_a_squashing_stack(op: str) -> None:
    phi = activation(op, {})
    assert phi is not None
    assert critical(phi) is None


@pytest.mark.parametrize("op", ["relu", "gelu", "tanh"])
def test_lengths_that_all_but_vanish(op: str) -> None:
    """What underflows when squared has no spread, and ends nothing."""
    tiny = Initializer("tiny", lambda i, o: normal(1e-60))
    graph = stack_graph([8] * 9, tiny, output=1, activation=op)
    signals, _ = predict(graph, propagate(graph))
    assert signals["z0"].spread == pytest.approx(normal_law(8).variance, rel=0.2)
    assert all(s.spread is None or math.isfinite(s.spread) for s in signals.values())


@pytest.mark.parametrize("n", [32, 64, 256])
def test_sums_of_products_of_squares(n: int) -> None:
    """ln Σ u²v² over n features less what the two lengths explain: (k − 1)² = 4 over n, and the
    third moment 8² over n²."""
    rng = np.random.default_rng(0)
    u, v = rng.standard_normal((2, 20_000, n)) ** 2
    u, v = u / u.mean(1, keepdims=True), v / v.mean(1, keepdims=True)
    logs = np.log((u * v).mean(1))
    law = skewed_law(4 / n, 64 / n**2)
    assert law.variance == pytest.approx(float(logs.var()), rel=0.12)
    assert law.variance < norm_law(4 / n).variance


def test_a_gamma_law_is_not_skewed() -> None:
    """But for the fourth cumulant, of order r³."""
    for r in (0.01, 0.05, 0.2):
        one, two = skewed_law(r, 2 * r * r), norm_law(r)
        assert one.variance == pytest.approx(two.variance, rel=1.5 * r * r + 1e-3)
        assert one.deficit == pytest.approx(two.deficit, rel=1.5 * r * r + 1e-3)
