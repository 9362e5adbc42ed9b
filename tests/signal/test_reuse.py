"""Layers that are used more than once along a residual stream, against Monte Carlo: lengths, what
positions and samples share, and gradients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archlint.graph.from_torch import load_torch
from archlint.signal.backpropagate import backpropagate
from archlint.signal.propagate import propagate

D, BLOCKS, DRAWS = 32, 3, 50
TOKENS, MAP = (4, 10, D), (2, D, 9, 9)


class Net(nn.Module):
    """Layers of one width that a function may use as often as it likes."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.up, self.down = nn.Linear(D, D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.qkv, self.out, self.norm = nn.Linear(D, 3 * D), nn.Linear(D, D), nn.LayerNorm(D)
        self.conv = nn.Conv2d(D, D, 3, padding=1)
        layer = nn.TransformerEncoderLayer(D, 4, 2 * D, 0.0, batch_first=True)
        self.copies = nn.TransformerEncoder(layer, BLOCKS)  # whose layers begin equal
        for layer in (self.qkv, self.out, self.up, self.down):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)

    def attention(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(0.3 * q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, t, d))

    def perceptron(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def _linear(net: Net, x: Tensor) -> Tensor:
    for _ in range(BLOCKS):
        x = net.a(x) + x
    return x


def _chain(net: Net, x: Tensor) -> Tensor:
    """Without a sum no two uses meet."""
    return net.a(net.a(x))


def _perceptron(net: Net, x: Tensor) -> Tensor:
    for _ in range(BLOCKS):
        x = x + 0.7 * net.perceptron(net.norm(x))
    return x


def _block(net: Net, x: Tensor) -> Tensor:
    for _ in range(BLOCKS):
        x = x + net.attention(net.norm(x))
        x = x + net.perceptron(net.norm(x))
    return x


def _norm_behind(net: Net, x: Tensor) -> Tensor:
    """As ALBERT has it, and the stream at its end."""
    for _ in range(BLOCKS):
        x = net.norm(x + net.attention(x))
        y = x + net.perceptron(x)
        x = net.norm(y)
    return y


def _difference(net: Net, x: Tensor) -> Tensor:
    return net.a(x) - net.a(x + net.perceptron(x))


def _positions(net: Net, x: Tensor) -> Tensor:
    """A convolution that several blocks share."""
    for _ in range(BLOCKS):
        x = x + net.conv(x)
    return x


def _copies(net: Net, x: Tensor) -> Tensor:
    y: Tensor = net.copies(x)
    return y


# name: (function, input shape, slack of ln rms, of ln gradient rms, of correlations)
CASES: dict[str, tuple[Callable[[Net, Tensor], Tensor], tuple[int, ...], float, float, float]] = {
    "linear": (_linear, TOKENS, 0.02, 0.03, 0.01),
    "chain": (_chain, TOKENS, 0.02, 0.02, 0.01),
    "perceptron": (_perceptron, TOKENS, 0.02, 0.03, 0.03),
    "block": (_block, TOKENS, 0.03, 0.2, 0.06),
    "norm_behind": (_norm_behind, TOKENS, 0.06, 0.25, 0.1),
    "difference": (_difference, TOKENS, 0.03, 0.05, 0.02),
    "copies": (_copies, TOKENS, 0.01, 0.05, 0.04),
    "positions": (_positions, MAP, 0.03, 0.05, 0.02),
}


def _between(y: Tensor, axes: tuple[int, ...]) -> float:
    """E[y y′]/E y² of elements that differ in their place along some axes."""
    n = math.prod(y.shape[a] for a in axes)
    total, square = float(y.sum(axes).square().mean()), float(y.square().mean())
    return (total / n - square) / ((n - 1) * square)


@pytest.mark.parametrize("name", CASES)
def test_against_monte_carlo(name: str) -> None:
    function, shape, slack, back, apart = CASES[name]
    graph = load_torch(lambda: Net(function), (torch.randn(shape),))
    found = backpropagate(graph, propagate(graph))
    y, x = found[graph.outputs[0]], found[graph.inputs[0]]
    spots = (1,) if len(shape) == 3 else (2, 3)
    lengths, gradients = [], []
    positions, samples = [], []
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        start = torch.randn(shape, requires_grad=True)
        end = Net(function)(start)
        (end * torch.randn_like(end)).sum().backward()
        assert start.grad is not None
        lengths.append(float(end.detach().square().mean()))
        gradients.append(float(start.grad.square().mean()))
        positions.append(_between(end.detach(), spots))
        samples.append(_between(end.detach(), (0,)))
    for predicted, drawn, allowed in (
        (y.second_moment, lengths, slack), (x.grad_second_moment, gradients, back)
    ):  # fmt: skip
        assert predicted is not None
        mean = statistics.fmean(drawn)
        error = statistics.stdev(drawn) / math.sqrt(DRAWS) / mean
        assert abs(math.log(predicted / mean)) / 2 <= allowed + 1.5 * error
    for predicted, drawn in ((y.position_correlation, positions), (y.sample_correlation, samples)):
        assert predicted is not None
        error = statistics.stdev(drawn) / math.sqrt(DRAWS)
        assert abs(predicted - statistics.fmean(drawn)) <= apart + 3 * error
