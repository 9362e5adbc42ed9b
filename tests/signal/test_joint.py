"""Sums and products of functions of the same elements against Monte Carlo: lengths, what samples
share, and the gradient where several paths meet."""

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

D = 64
DRAWS = 40


class Net(nn.Module):
    """Two linear layers, a norm, and what is done with them."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.norm = nn.Linear(D, D), nn.Linear(D, D), nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _gate(net: Net, x: Tensor) -> Tensor:
    h, z = net.a(x), torch.sigmoid(net.b(x))
    return z * h + (1 - z) * torch.tanh(h)


def _gelu(net: Net, x: Tensor) -> Tensor:
    h = net.a(x)
    return 0.5 * h * (1 + torch.tanh(0.8 * (h + 0.04 * h**3)))


def _blended(net: Net, x: Tensor) -> Tensor:
    for layer in (net.a, net.b):
        x = torch.lerp(x, layer(x), 0.4)
    return x


def _class_attention(net: Net, x: Tensor) -> Tensor:
    x = 2 * x
    x = x + torch.cat([net.a(x[:, :1]), net.norm(x)[:, 1:]], 1)
    return x + torch.cat([net.b(x[:, :1]), x[:, 1:]], 1)


def _own_gate(net: Net, x: Tensor) -> Tensor:
    h: Tensor = net.a(x)
    return h * torch.sigmoid(net.b(h)) + h


def _squares(net: Net, x: Tensor) -> Tensor:
    h = F.relu(net.a(x))
    return h * h + h


def _sign(net: Net, x: Tensor) -> Tensor:
    h: Tensor = net.a(x)
    return h / (1 + h.abs())


def _turned(net: Net, x: Tensor) -> Tensor:
    """Pairs of features turned by angles of which cosines and sines are at hand."""
    angle = torch.arange(5.0)[:, None] * torch.tensor([1.0, 0.2])
    wave = torch.cat([angle, angle], -1).repeat_interleave(8, -1)
    q, rest = net.a(x).split([32, 32], -1)
    half = torch.cat([-q[..., 16:], q[..., :16]], -1)
    return torch.cat([q * wave.cos() + half * wave.sin(), rest], -1)


def _at_least(net: Net, x: Tensor) -> Tensor:
    """A learned threshold that starts at a number."""
    return torch.maximum(net.norm(net.a(x)), net.norm.bias)


def _halves(net: Net, x: Tensor) -> Tensor:
    h: Tensor = net.a(x)
    one, two = h.split([16, 48], -1)
    return h + torch.cat([torch.tanh(one), two], -1)


def _pooled(net: Net, x: Tensor) -> Tensor:
    """A norm's mean over positions less the norm itself, beside what is normalised."""
    y = net.norm(1.5 * x)
    return 1.5 * x + (y.mean(1, keepdim=True) - y)


NETS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "beside its norm": lambda net, x: x + net.norm(x),
    "a gate between a tensor and its function": _gate,
    "GELU spelled out": _gelu,
    "blends": _blended,
    "less its norm, that pooled": _pooled,
    "less its norm": lambda net, x: 1.5 * x - net.norm(1.5 * x),
    "beside its mean": lambda net, x: net.a(x) + x + x.mean(1, keepdim=True),
    "stacked": lambda net, x: torch.stack([x, torch.tanh(net.a(x)), net.b(x)], 1).sum(1),
    "tokens beside a class token": _class_attention,
    "under a gate made of itself": _own_gate,
    "the square of a rectifier": _squares,
    "softsign spelled out": _sign,
    "beside its own parts": _halves,
    "pairs of features turned": _turned,
    "a maximum with a weight": _at_least,
}


@pytest.mark.parametrize("name", NETS)
def test_against_monte_carlo(name: str) -> None:
    def build() -> Net:
        return Net(NETS[name])

    graph = load_torch(build, {"x": (2, 5, D)})
    signals = backpropagate(graph, propagate(graph))
    out, inside = signals[graph.outputs[0]], signals[graph.inputs[0]]
    torch.manual_seed(0)
    lengths, gradients, shared = [], [], []
    for _ in range(DRAWS):
        x = torch.randn(16, 5, D, requires_grad=True)
        y = build()(x)
        (g,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
        v = y.detach().double()
        lengths.append(v.square().mean().item())
        gradients.append(g.double().square().mean().item())
        pairs = (v.sum(0).square() - v.square().sum(0)).mean().item()
        shared.append(pairs / (16 * 15))
    assert out.second_moment is not None
    assert out.sample_correlation is not None
    _close(out.second_moment, lengths)
    _close(out.sample_correlation * out.second_moment, shared, 0.01 * out.second_moment)
    _close(inside.grad_second_moment, gradients)


def _close(predicted: float | None, measured: list[float], more: float = 0.0) -> None:
    """Within four standard errors and what 1/64 leaves out."""
    mean = statistics.mean(measured)
    error = statistics.stdev(measured) / math.sqrt(len(measured))
    assert predicted == pytest.approx(mean, abs=4 * error + 0.015 * abs(mean) + more)
