"""Small padded maps behind a batch's norm, against Monte Carlo: lengths by place, what activations
make of them, and gradients that know the kernel they pass."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

import numpy as np
import pytest
import torch
from timm.layers import ScaledStdConv2d
from torch import Tensor, nn

from archlint.graph.from_torch import load_torch
from archlint.signal.backpropagate import backpropagate
from archlint.signal.propagate import propagate

C, S = 48, 7
SHAPE = (2, C, S, S)


def _mapped(kernel: int, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(C, C, kernel, padding=kernel // 2, groups=groups, bias=False),
            nn.BatchNorm2d(C)]  # fmt: skip


def _rectified() -> nn.Module:
    return nn.Sequential(*_mapped(3), nn.ReLU(), *_mapped(3))


def _smooth() -> nn.Module:
    return nn.Sequential(*_mapped(5), nn.Hardswish(), *_mapped(5)[:1])


def _depthwise() -> nn.Module:
    return nn.Sequential(*_mapped(5, C), nn.ReLU(), nn.AdaptiveAvgPool2d(1))


def _standardised() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(3) for layer in (
        nn.ReLU(), ScaledStdConv2d(C, C, 3, padding=1, groups=C // 8, bias=False))))  # fmt: skip


def _measured(build: Callable[[], nn.Module], draws: int) -> tuple[list[Tensor], list[float]]:
    torch.manual_seed(0)
    outputs, gradients = [], []
    for _ in range(draws):
        x = torch.randn(SHAPE, requires_grad=True)
        y = build()(x)
        (g,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
        outputs.append(y.detach().double())
        gradients.append(g.double().square().mean().item())
    return outputs, gradients


def test_lengths_by_place_behind_the_mean_of_a_batch() -> None:
    """Where padding leaves less of what the convolution makes of ReLU's mean, that much is missing
    of the mean that is subtracted: the border is longer than before the norm."""
    graph = load_torch(_rectified, {"input": SHAPE})
    signals = propagate(graph)
    outputs, _ = _measured(_rectified, 40)
    by_place = np.mean([y.square().mean((0, 1, 2)).numpy() for y in outputs], axis=0)
    found = signals[graph.outputs[0]].profile[3]
    before = next(signals[n.inputs[0] or ""].profile[3] for n in reversed(graph.nodes)
                  if n.op == "batch_norm")  # fmt: skip
    assert found == pytest.approx(by_place / by_place.mean(), abs=0.06)
    assert before[0] < found[0] - 0.05


def test_standardised_weights_at_a_border() -> None:
    """They cancel what the inputs have in common but where padding takes some of them: the border
    is longer than its share of the terms, and so are the positions less alike."""
    graph = load_torch(_standardised, {"input": SHAPE})
    out = propagate(graph)[graph.outputs[0]]
    outputs, _ = _measured(_standardised, 60)
    _close(out.second_moment, [y.square().mean().item() for y in outputs], 0.02)
    by_place = np.mean([y.square().mean((0, 1, 2)).numpy() for y in outputs], axis=0)
    assert out.profile[3] == pytest.approx(by_place / by_place.mean(), abs=0.06)
    pairs = S * S * (S * S - 1)
    alike = [((y.sum((2, 3)) ** 2).mean() / pairs - y.square().sum((2, 3)).mean() / pairs)
             / y.square().mean() for y in outputs]  # fmt: skip
    assert out.position_correlation == pytest.approx(statistics.mean(map(float, alike)), abs=0.02)


def test_an_activation_of_uneven_lengths() -> None:
    """E φ² is not that of the mean length, and what is left at the border is read less often."""
    graph = load_torch(_smooth, {"input": SHAPE})
    out = propagate(graph)[graph.outputs[0]]
    outputs, _ = _measured(_smooth, 60)
    _close(out.second_moment, [y.square().mean().item() for y in outputs], 0.02)


@pytest.mark.parametrize("build", [_rectified, _smooth, _depthwise])
def test_gradients(build: Callable[[], nn.Module]) -> None:
    """Two outputs that read one input by the same kernel have more of their slopes in common than
    others, by which the gradient behind a depthwise convolution is a seventh stronger."""
    graph = load_torch(build, {"input": SHAPE})
    inside = backpropagate(graph, propagate(graph))[graph.inputs[0]]
    _, gradients = _measured(build, 120)
    _close(inside.grad_second_moment, gradients, 0.06)


def _close(predicted: float | None, measured: list[float], rest: float) -> None:
    """Within three standard errors and a share of the mean."""
    mean = statistics.mean(measured)
    error = statistics.stdev(measured) / math.sqrt(len(measured))
    assert predicted == pytest.approx(mean, abs=3 * error + rest * abs(mean))
