"""Positions that are put together more than once: pools of pools, resizing chains, pools beside
skip connections, against Monte Carlo; lengths, correlations and gradients."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import archlint
from archlint.graph.from_torch import load_torch
from archlint.signal.backpropagate import backpropagate
from archlint.signal.neighbours import Axis, Field, Mixing, passed
from archlint.signal.propagate import propagate

CHANNELS = 16
MAP = (2, CHANNELS, 16, 16)
DRAWS = 40


class Net(nn.Module):
    """A function of a map, with convolutions and a norm that it may use."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, CHANNELS), nn.Conv2d(CHANNELS, 48, 1), nn.ReLU(),
                          nn.Conv2d(48, CHANNELS, 1)) for _ in range(3)
        )  # fmt: skip
        self.norm = nn.GroupNorm(1, CHANNELS)
        self.down = nn.Conv2d(CHANNELS, CHANNELS, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def _pool(x: Tensor, size: int = 3) -> Tensor:
    return F.avg_pool2d(x, size, 1, size // 2, count_include_pad=False)


def _mixer(net: Net, x: Tensor) -> Tensor:
    """x + (pool(norm x) − norm x), then a perceptron at each place, three times."""
    for mlp in net.mlp:
        y = net.norm(x)
        x = x + (_pool(y) - y)
        x = x + mlp(x)
    return x


def _pools(net: Net, x: Tensor) -> Tensor:
    return F.avg_pool2d(_pool(_pool(x, 5)), 2)


def _behind_a_layer(net: Net, x: Tensor) -> Tensor:
    """The pool of what a ReLU and a strided convolution left of a pool."""
    return _pool(net.down(F.relu(_pool(x, 7))))


def _beside_itself(net: Net, x: Tensor) -> Tensor:
    x = _pool(x)
    return x - 0.6 * _pool(x) + 0.3 * _pool(_pool(x))


def _resized(net: Net, x: Tensor) -> Tensor:
    for size, mode in ((8, "bilinear"), (24, "bicubic"), (12, "bilinear"), (36, "nearest")):
        x = F.interpolate(x, size=size, mode=mode)
    return _pool(x, 5)


def _adaptive(net: Net, x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(F.interpolate(x, scale_factor=2, mode="bilinear"), 5)


def _padded(net: Net, x: Tensor) -> Tensor:
    for _ in range(3):
        x = F.avg_pool2d(x, 3, 1, 1)
    return x


def _merged(net: Net, x: Tensor) -> Tensor:
    """Maps of two resolutions, brought to one, summed and resized again."""
    low = F.interpolate(net.down(x), size=16, mode="bilinear")
    x = torch.stack([low, _pool(net.mlp[0](x))]).sum(0)
    return F.interpolate(torch.cat([x, net.mlp[1](x)], 1), scale_factor=2, mode="bilinear")


def _windows(net: Net, x: Tensor) -> Tensor:
    """Maxima of overlapping windows, and what means make of them."""
    return F.adaptive_avg_pool2d(_pool(F.max_pool2d(x, 3, 2, 1)), 4)


def _windows_beside(net: Net, x: Tensor) -> Tensor:
    """The same over maps side by side, one of which tells neighbours apart itself."""
    x = torch.cat([F.relu(x), F.relu(_pool(net.mlp[0](x)))], 1)
    return F.adaptive_avg_pool2d(F.max_pool2d(x, 3, 2, 1), 3)


def _channels(net: Net, x: Tensor) -> Tensor:
    """Channels that attend to channels by their elements at all places."""
    q, k, v = (mlp(x).flatten(2) for mlp in net.mlp)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    y = F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return y.reshape(x.shape)


CASES: dict[str, Callable[[Net, Tensor], Tensor]] = {
    f.__name__[1:]: f
    for f in (
        _mixer,
        _pools,
        _behind_a_layer,
        _beside_itself,
        _resized,
        _adaptive,
        _padded,
        _merged,
        _windows,
        _windows_beside,
        _channels,
    )
}


def _correlation(y: Tensor) -> float:
    """E[y y′]/E y² over pairs of positions."""
    n = y.shape[2] * y.shape[3]
    total = float(y.sum((2, 3)).square().mean())
    square = float(y.square().mean())
    return (total / n - square) / ((n - 1) * square)


def _within(found: float, logs: list[float], slack: float) -> None:
    """½ ln of a mean square against draws of it, to three standard errors and the slack."""
    mean = math.log(statistics.fmean(math.exp(v) for v in logs))
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    assert abs(found - mean) / 2 <= slack + 1.5 * error


@pytest.mark.parametrize("name", CASES)
def test_against_monte_carlo(name: str) -> None:
    function = CASES[name]
    graph = load_torch(lambda: Net(function), (torch.randn(MAP),))
    found = backpropagate(graph, propagate(graph))
    y, x = found[graph.outputs[0]], found[graph.inputs[0]]
    lengths, gradients, correlations = [], [], []
    for draw in range(DRAWS):
        torch.manual_seed(draw)
        start = torch.randn(MAP, requires_grad=True)
        end = Net(function)(start)
        (end * torch.randn_like(end)).sum().backward()
        lengths.append(math.log(float(end.detach().square().mean())))
        gradients.append(math.log(float(start.grad.square().mean())))  # type: ignore[union-attr]
        correlations.append(_correlation(end.detach()))
    assert y.second_moment is not None
    assert x.grad_second_moment is not None
    assert y.position_correlation is not None
    # a pool behind a map that is not the same at every place is told by a mean over places
    _within(math.log(y.second_moment), lengths, 0.025)
    _within(math.log(x.grad_second_moment), gradients, 0.04)
    error = 3 * statistics.stdev(correlations) / math.sqrt(DRAWS)
    assert abs(y.position_correlation - statistics.fmean(correlations)) <= error + 0.02


@pytest.mark.parametrize("sizes", [(7,), (6, 9)])
def test_pairs_by_displacement(sizes: tuple[int, ...]) -> None:
    """T·K against the covariances of a field written out."""
    draws = np.random.default_rng(0)
    maps = [(Axis(draws.normal(size=(n + 2, n))), Axis(draws.normal(size=(n + 2, n))))
            for n in sizes]  # fmt: skip
    axes = tuple(range(2, 2 + len(sizes)))
    one, two = (Mixing(axes, tuple(m[i] for m in maps)) for i in (0, 1))
    values = draws.uniform(0.2, 0.6, size=(3,) * len(sizes))
    values = (values + np.flip(values)) / 2
    values[(1,) * len(sizes)] = 1.0
    field = Field(sizes, values, 0.1)
    places = list(np.ndindex(*sizes))
    covariance = np.full((len(places), len(places)), 0.1)
    for i, p in enumerate(places):
        for j, q in enumerate(places):
            shift = tuple(b - a + 1 for a, b in zip(p, q, strict=True))
            if all(0 <= d < 3 for d in shift):
                covariance[i, j] = values[shift]
    a, b = (np.array([[1.0]]), np.array([[1.0]]))
    for m, w in maps:
        a, b = np.kron(a, m.weights), np.kron(b, w.weights)
    whole = a @ covariance @ b.T
    found = passed(field, one, two)
    assert found.second == pytest.approx(float(np.trace(whole)) / len(whole))
    n = len(whole)
    assert found.mean == pytest.approx((float(whole.sum()) - float(np.trace(whole))) / n / (n - 1))
    middle = tuple(w // 2 for w in found.values.shape)
    beside = (*middle[:-1], middle[-1] + 1)
    out = list(np.ndindex(*(n + 2 for n in sizes)))
    pairs = [(whole[i, j] + whole[j, i]) / 2 for i, p in enumerate(out) for j, q in enumerate(out)
             if p[:-1] == q[:-1] and q[-1] == p[-1] + 1]  # fmt: skip
    assert found.values[beside] == pytest.approx(statistics.fmean(pairs))


class Placed(nn.Module):
    """Patches beside a table by place, resized to their number as vision transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, 8, 6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.resized()

    def resized(self) -> Tensor:
        return F.interpolate(self.table, (9, 9), mode="bilinear", antialias=True)


def test_a_table_is_resized() -> None:
    found = archlint.profile(Placed, inputs={"x": (2, 8, 9, 9)}).values[-1].rms
    draws = [float(Placed().resized().detach().square().mean()) for _ in range(200)]
    assert found is not None
    error = statistics.stdev(draws) / math.sqrt(len(draws))
    assert abs(found**2 - statistics.fmean(draws)) <= 4 * error
