"""Var ln of the squared gradient over initializations: the engine's β against 400 draws."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from archlint.graph.builder import GraphBuilder
from archlint.graph.from_torch import load_torch
from archlint.graph.model import LayerGraph
from archlint.initialization.distribution import normal
from archlint.signal.activations import activation
from archlint.signal.analysis import analyse
from archlint.signal.spread import joint_moment, slope_elasticity
from tests.accuracy.ensemble import INPUT, draw
from tests.papers.networks import Floats, Initializer, stack_graph

DRAWS = 400


def _stack(op: str, width: int, depth: int, gain: float, bias: float) -> Floats:
    """ln of the mean squared gradient of the first layer's input, a number a draw."""
    rng = np.random.default_rng(width + depth)
    phi = activation(op, {})
    assert phi is not None
    a = np.broadcast_to(rng.standard_normal(width), (DRAWS, width))
    kept = []
    for _ in range(depth):
        w = rng.standard_normal((DRAWS, width, width)) * math.sqrt(gain / width)
        z = np.matmul(w, a[:, :, None])[:, :, 0] + bias * rng.standard_normal((DRAWS, width))
        kept.append((w, z))
        a = phi.function(z)
    g = rng.standard_normal((DRAWS, width))
    for w, z in reversed(kept):
        g = np.matmul(w.transpose(0, 2, 1), (g * phi.derivative(z))[:, :, None])[:, :, 0]
    return np.log(np.square(g).mean(axis=1))


@pytest.mark.parametrize(
    ("op", "gain", "bias_variance"),
    [("relu", 2.0, 0.0), ("gelu", 1.98306, 0.17292), ("silu", 1.98801, 0.55514),
     ("tanh", 25 / 9, 0.0), ("tanh", 1.0, 0.0), ("selu", 1.0, 0.0), ("elu", 1.5505, 0.0)],
)  # fmt: skip
@pytest.mark.parametrize(("width", "depth"), [(64, 16), (24, 6)])
def test_stack(op: str, gain: float, bias_variance: float, width: int, depth: int) -> None:
    """Within three standard errors or 25 %; what ignores the length's fluctuation is a third to a
    half too low for GELU and SiLU."""
    bias = math.sqrt(bias_variance)
    initializer = Initializer(op, lambda i, o: normal(math.sqrt(gain / i)))
    graph = stack_graph([width] * (depth + 1), initializer, bias=bias, output=1, activation=op)
    analysis = analyse(graph)
    (segment,) = analysis.segments
    _, law = analysis.laws(segment)
    assert law is not None
    beta = law.variance
    found = _stack(op, width, depth, gain, bias).var(ddof=1)
    assert abs(beta - found) <= max(3 * found * math.sqrt(2 / DRAWS), 0.25 * found)


def _conv_graph(channels: int, depth: int, size: int, pooled: bool) -> LayerGraph:
    b = GraphBuilder("conv")
    value = b.input("x", (1, channels, size, size))
    shape = (1, channels, size, size)
    for j in range(depth):
        law = normal(math.sqrt(2 / (9 * channels)))
        weight = b.parameter(f"w{j}", (channels, channels, 3, 3), law)
        value = b.node("conv", [value, weight, None], shape, stride=(1, 1),
                       padding=(1, 1, 1, 1), dilation=(1, 1))  # fmt: skip
        value = b.node("relu", [value], shape)
    if pooled:
        value = b.node("reduce_mean", [value], (1, channels), axes=(2, 3))
        weight = b.parameter("head", (10, channels), normal(1.0))
        return b.finish([b.node("linear", [value, weight, None], (1, 10))])
    weight = b.parameter("head", (channels, channels, 1, 1), normal(1.0))
    value = b.node("conv", [value, weight, None], shape, stride=(1, 1),
                   padding=(0, 0, 0, 0), dilation=(1, 1))  # fmt: skip
    return b.finish([value])


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize(("channels", "depth", "size"), [(16, 8, 6), (8, 5, 8)])
def test_convolutions(channels: int, depth: int, size: int, pooled: bool) -> None:
    """At the input, by channels and how alike positions are: behind a global pool all have one
    gradient, behind a map of many channels each has its own."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.ReLU()]
        if pooled:
            head = nn.Linear(channels, 10, bias=False)
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), head]
        else:
            layers.append(nn.Conv2d(channels, channels, 1, bias=False))
        network = nn.Sequential(*layers)
        for p in network.parameters():
            nn.init.kaiming_normal_(p, nonlinearity="relu")
        return network

    found = draw(build, (channels, size, size), 1000).gradient[INPUT]
    beta = analyse(_conv_graph(channels, depth, size, pooled)).prediction("x").grad_spread
    assert beta is not None
    # What a gradient owes to weights that its masks at other positions depend on is known for its
    # mean (the lean towards the activations), and for its variance in part: more so with few
    # channels, and behind a pool, where positions have one gradient.
    share = 0.4 if pooled else 0.3
    assert abs(beta - found.variance) <= max(3 * found.error_of_variance, share * found.variance)


@pytest.mark.parametrize("op", ["gelu", "tanh", "relu"])
def test_moments_of_one_neuron(op: str) -> None:
    phi = activation(op, {})
    assert phi is not None
    rng = np.random.default_rng(0)
    z: Callable[[float], Floats] = lambda q: math.sqrt(q) * rng.standard_normal(1_000_000)  # noqa: E731
    x = z(1.5)
    squares, slopes = phi.function(x) ** 2, phi.derivative(x) ** 2
    exact = float((squares * slopes).mean() / squares.mean() / slopes.mean()) - 1
    assert joint_moment(phi, 0.0, 1.5) == pytest.approx(exact, rel=0.02, abs=0.005)
    logs = [math.log(phi.moments(0.0, 1.5 * math.exp(h)).slope) for h in (-0.05, 0.05)]
    assert slope_elasticity(phi, 0.0, 1.5) == pytest.approx((logs[1] - logs[0]) / 0.1, abs=1e-3)


@pytest.mark.parametrize(
    ("width", "inner", "depth", "eta"),
    [(16, 16, 10, 1.0), (16, 16, 20, 0.3), (32, 64, 12, 0.7), (12, 24, 8, 0.5)],
)
def test_residual_networks(width: int, inner: int, depth: int, eta: float) -> None:
    """h ← h + η·W₂ relu(W₁ h): the trunk's β, 4s(1 − s)/n and the branch's share a block."""
    b = GraphBuilder("residual")
    value = b.input("x", (1, width))
    for j in range(depth):
        one = b.parameter(f"a{j}", (inner, width), normal(math.sqrt(2 / width)))
        two = b.parameter(f"b{j}", (width, inner), normal(math.sqrt(1 / inner)))
        h = b.node("relu", [b.node("linear", [value, one, None], (1, inner))], (1, inner))
        h = b.node("linear", [h, two, None], (1, width))
        h = b.node("mul", [h, b.constant(np.float32(eta))], (1, width))
        value = b.node("add", [value, h], (1, width))
    head = b.parameter("head", (1, width), normal(1.0))
    graph = b.finish([b.node("linear", [value, head, None], (1, 1))])
    analysis = analyse(graph)
    (trunk,) = analysis.trunks
    _, law = analysis.laws(trunk)
    assert law is not None
    beta = law.variance
    rng = np.random.default_rng(width + depth)
    h = np.broadcast_to(rng.standard_normal(width), (DRAWS, width))
    kept = []
    for _ in range(depth):
        one = rng.standard_normal((DRAWS, inner, width)) * math.sqrt(2 / width)
        two = rng.standard_normal((DRAWS, width, inner)) * math.sqrt(1 / inner)
        z = np.matmul(one, h[:, :, None])[:, :, 0]
        h = h + eta * np.matmul(two, np.maximum(z, 0.0)[:, :, None])[:, :, 0]
        kept.append((one, two, z))
    g = rng.standard_normal((DRAWS, width))
    start = np.log(np.square(g).mean(axis=1))
    for one, two, z in reversed(kept):
        inside = np.matmul(two.transpose(0, 2, 1), g[:, :, None])[:, :, 0] * (z > 0)
        g = g + eta * np.matmul(one.transpose(0, 2, 1), inside[:, :, None])[:, :, 0]
    found = (np.log(np.square(g).mean(axis=1)) - start).var(ddof=1)
    assert abs(beta - found) <= max(3 * found * math.sqrt(2 / DRAWS), 0.25 * found)


class _Context(nn.Module):
    """A convolution beside one of the mean over positions, which each position gets."""

    def __init__(self) -> None:
        super().__init__()
        self.each, self.all = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.each(x) + self.all(x.mean((2, 3), keepdim=True)))


def test_a_gradient_that_leaves_its_positions() -> None:
    def build() -> nn.Module:
        return nn.Sequential(*[_Context() for _ in range(4)])

    graph = load_torch(build(), {"input": ((1, 16, 6, 6), "float32")})
    found = analyse(graph).prediction(graph.inputs[0])
    logs = draw(build, (16, 6, 6), 200).gradient[INPUT]
    assert found.grad_spread is not None
    off = abs(found.grad_spread - logs.variance)
    assert off <= max(3 * logs.error_of_variance, 0.25 * logs.variance)
