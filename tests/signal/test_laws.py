"""Streams that are rectified after each addition: laws, lengths, what samples share and gradients
against Monte Carlo."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archlint.graph.from_torch import load_torch
from archlint.signal.backpropagate import backpropagate
from archlint.signal.laws import NODES, WEIGHTS, Law, law_of_sum
from archlint.signal.propagate import propagate

D, BLOCKS, DRAWS = 256, 6, 24


def test_a_reflected_walk() -> None:
    """Ten steps of max(x + N(0,1), 0): mean and second moment of two million walkers."""
    rng = np.random.default_rng(0)
    walkers = np.maximum(rng.standard_normal(2_000_000), 0.0)
    law, mean, variance = Law(lambda: np.maximum(NODES, 0.0)), 1 / math.sqrt(2 * math.pi), 0.0
    variance = 0.5 - mean**2
    for _ in range(10):
        walkers = np.maximum(walkers + rng.standard_normal(walkers.size), 0.0)
        summed = law_of_sum([(law, variance), (None, 1.0)])
        assert summed is not None
        values = np.maximum(mean + math.sqrt(variance + 1) * summed.values, 0.0)
        mean = float(WEIGHTS @ values)
        variance = float(WEIGHTS @ values**2) - mean**2
        law = Law(lambda values=values: values)  # type: ignore[misc]
        assert mean == pytest.approx(walkers.mean(), rel=0.01)
        assert variance + mean**2 == pytest.approx((walkers**2).mean(), rel=0.01)


def test_correlations_go_and_come_back() -> None:
    """The rectified halves of two normals with a correlation have the one of Cho & Saul 2009."""
    law = Law(lambda: np.maximum(NODES, 0.0))
    for rho in (-0.5, -0.2, 0.0, 0.3, 0.7, 0.95, 1.0):
        angle = math.acos(rho)
        pair = (math.sin(angle) + (math.pi - angle) * rho) / (2 * math.pi)
        own = (pair - 1 / (2 * math.pi)) / (0.5 - 1 / (2 * math.pi))
        assert law.normal_correlation(own) == pytest.approx(rho, abs=0.01)


def test_what_is_added_up_is_normal_again() -> None:
    """A sum of many like terms, and one in which a term hardly counts, have no law of their own."""
    one = Law(lambda: np.maximum(NODES, 0.0))
    total: Law | None = one
    for n in range(1, 2000):
        total = law_of_sum([(total, float(n)), (one, 1.0)])
        if total is None:
            break
    assert total is None
    assert law_of_sum([(one, 0.01), (None, 1.0)]) is None


class Stream(nn.Module):
    """x ← φ(x + W·norm(x))."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.phi = getattr(F, name)
        self.layers = nn.ModuleList(nn.Linear(D, D, bias=False) for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(D)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=D**-0.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = self.phi(x + layer(self.norm(x)))
        return x


@pytest.mark.parametrize("name", ["relu", "silu", "gelu", "hardswish", "leaky_relu"])
def test_a_stream_that_is_rectified_after_each_addition(name: str) -> None:
    """With the normal law for sums ReLU's length would be short by 7 %, and what samples share
    too much by 0.08."""
    graph = load_torch(lambda: Stream(name), {"x": (2, D)})
    signals = backpropagate(graph, propagate(graph))
    out, inside = signals[graph.outputs[0]], signals[graph.inputs[0]]
    torch.manual_seed(0)
    lengths, gradients, shared = [], [], []
    for _ in range(DRAWS):
        x = torch.randn(32, D, requires_grad=True)
        y = Stream(name)(x)
        (g,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
        v = y.detach().double()
        lengths.append(v.square().mean().item())
        gradients.append(g.double().square().mean().item())
        pairs = (v.sum(0).square() - v.square().sum(0)).mean().item()
        shared.append(pairs / (32 * 31) / lengths[-1])
    _close(out.second_moment, lengths, 0.02)
    _close(out.sample_correlation, shared, 0.03)
    _close(inside.grad_second_moment, gradients, 0.05)


def _close(predicted: float | None, measured: list[float], rest: float) -> None:
    """Within four standard errors and what a width of 256 leaves out."""
    mean = statistics.mean(measured)
    error = statistics.stdev(measured) / math.sqrt(len(measured))
    assert predicted == pytest.approx(mean, abs=4 * error + rest * abs(mean))
