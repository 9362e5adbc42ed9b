"""Every family of transfer functions against Monte Carlo, and the laws that all of them obey."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from archlint.graph.from_torch import load_torch
from archlint.signal.activations import activation
from archlint.signal.arithmetic import added, multiplied, scaled
from archlint.signal.attention import participation
from archlint.signal.elementwise import through
from archlint.signal.gaussian import maxima_of_pairs
from archlint.signal.interpolation import weights
from archlint.signal.moments import Signal
from archlint.signal.pooling import averaged
from archlint.signal.propagate import propagate
from tests.accuracy.monte_carlo import pair_correlations

DRAWS = 60


class Net(nn.Module):
    """Modules, and what is done with them to one input."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@dataclass(frozen=True)
class Case:
    """``slack``: relative error of the rms allowed beyond four standard errors; ``pairs``: absolute
    error allowed of correlations."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    slack: float = 0.01
    pairs: float = 0.04


def _case(name: str, shape: tuple[int, ...], run: Callable[..., Any], slack: float = 0.01,
          pairs: float = 0.04, **parts: Callable[[], nn.Module]) -> Case:  # fmt: skip
    return Case(name, lambda: Net(run, **{k: make() for k, make in parts.items()}), shape, slack,
                pairs)  # fmt: skip


def zeros(layer: nn.Linear) -> nn.Linear:
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


def _relu_conv(**options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(),
                                 nn.Conv2d(24, 24, 3, **options))  # fmt: skip


def _conv() -> nn.Conv2d:
    return nn.Conv2d(3, 24, 3, padding=1)


def biased(layer: nn.Conv2d, number: float) -> nn.Conv2d:
    """A layer whose biases are one number."""
    assert layer.bias is not None
    nn.init.constant_(layer.bias, number)
    return layer


def _stem() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())


def _tokens() -> nn.Module:
    return nn.Sequential(nn.Linear(48, 96), nn.LayerNorm(96))


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(n: Any, x: Tensor, **options: Any) -> Tensor:
    h = n.stem(x)
    q, k, v = n.qkv(h).chunk(3, -1)
    out = F.scaled_dot_product_attention(_heads(q, 4), _heads(k, 4), _heads(v, 4), **options)
    return out.transpose(1, 2).flatten(2)


def _windowed(n: Any, x: Tensor) -> Tensor:
    """Attention in four windows of a map, which stand beside each other again."""
    cut = n.stem(x).reshape(2, 2, 4, 2, 4, 24).transpose(2, 3).reshape(8, 16, 24)
    q, k, v = n.qkv(cut).chunk(3, -1)
    out = F.scaled_dot_product_attention(_heads(q, 2), _heads(k, 2), _heads(v, 2))
    out = out.transpose(1, 2).reshape(2, 2, 2, 4, 4, 24)
    return out.transpose(2, 3).reshape(2, 8, 8, 24)


def _spelled(n: Any, x: Tensor) -> Tensor:
    """Logits by a product of two maps of the tokens, under a causal mask."""
    q, k = n.a(x).chunk(2, -1)
    hidden = torch.full((24, 24), -1e9).triu(1)
    return n.norm((q @ k.mT / 48**0.5 + hidden).softmax(-1) @ n.b(x))


def _distances(heads: int, size: int) -> Tensor:
    """A bias that falls with the distance, in every head faster."""
    places = torch.arange(size)
    slopes = 2.0 ** -torch.arange(1, heads + 1)
    return -slopes[:, None, None] * (places[:, None] - places[None, :]).abs()


def _sloped(n: Any, x: Tensor) -> Tensor:
    """Logits with such a bias, under a causal mask, by a softmax."""
    h = n.stem(x)
    q, k, v = (_heads(y, 4) for y in n.qkv(h).chunk(3, -1))
    flat = torch.baddbmm(_distances(4, 24).repeat(len(x), 1, 1), q.flatten(0, 1),
                         k.flatten(0, 1).mT, alpha=0.2)  # fmt: skip
    hidden = torch.full((1, 1, 24, 24), torch.finfo(x.dtype).min).triu(1)
    p = (flat.unflatten(0, (len(x), 4)) + hidden).softmax(-1)
    return (p @ v).transpose(1, 2).flatten(2)


class _Bias(nn.Module):
    """A learned bias of every pair, beside windows that hide each other."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 24, 24) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        part = torch.arange(24) // 8
        hidden = torch.where(part[:, None] == part[None, :], 0.0, -100.0)
        return self.table[None] + hidden[None, None].expand(len(x), 1, -1, -1)


def _linear_attention(n: Any, x: Tensor) -> Tensor:
    """With the denominator as a column of ones beside the values."""
    q, k, v = n.qkv(n.stem(x)).chunk(3, -1)
    q, k = torch.relu(_heads(q, 3)), torch.relu(_heads(k, 3))
    both = q @ (k.transpose(-1, -2) @ F.pad(_heads(v, 3), (0, 1), value=1.0))
    return (both[..., :-1] / both[..., -1:]).transpose(1, 2).flatten(2)


def _gate(n: Any, x: Tensor) -> Tensor:
    return _excited(n, n.stem(x))


class _Share(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.full((1,), -1.0))

    def forward(self) -> Tensor:
        return torch.sigmoid(self.level)


def _two_gates(n: Any, x: Tensor) -> Tensor:
    h, z = n.a(x), n.b(x)
    return h * F.silu(z) + h * 0.7


def _excited(n: Any, h: Tensor) -> Tensor:
    return h * torch.sigmoid(n.b(torch.relu(n.a(h.mean((2, 3), keepdim=True)))))


def _recurrent(
    kind: Callable[..., nn.Module],
) -> list[tuple[str, Callable[[], nn.Module], Callable[..., Tensor]]]:
    """All steps of one layer and of two in both directions, and the last state, of an input whose
    steps have a mean in common."""

    def layers(**options: Any) -> Callable[[], nn.Module]:
        return lambda: kind(48, 64, batch_first=True, **options)

    def last(n: Any, x: Tensor) -> Tensor:
        h = n.a(torch.relu(x))[1]
        return h[0] if isinstance(h, tuple) else h

    return [("steps of", layers(), lambda n, x: n.a(torch.relu(x))[0]),
            ("two of", layers(num_layers=2, bidirectional=True),
             lambda n, x: n.a(torch.relu(x))[0]),
            ("last of", layers(), last)]  # fmt: skip


IMAGE, ROW, TOKENS = (4, 3, 16, 16), (4, 48), (4, 24, 48)
STEPS = torch.arange(96).reshape(4, 24) % 7 < torch.tensor([2, 3, 2, 4])[:, None]  # of TOKENS
CASES = [
    _case("linear", ROW, lambda n, x: n.a(x), a=lambda: nn.Linear(48, 64)),
    _case("two linear", ROW, lambda n, x: n.b(torch.relu(n.a(x))), a=lambda: nn.Linear(48, 64),
          b=lambda: nn.Linear(64, 64)),
    _case("maximum", IMAGE, lambda n, x: torch.maximum(n.a(x), n.b(x)), slack=0.02,
          a=lambda: biased(_conv(), 0.3), b=lambda: nn.Conv2d(3, 24, 5, padding=2)),
    _case("minimum", IMAGE, lambda n, x: n.b(torch.min(n.a(x), x[:, :1])), slack=0.02,
          a=lambda: biased(_conv(), -0.5), b=lambda: nn.Conv2d(24, 24, 1)),
    _case("conv padding", IMAGE, lambda n, x: n.a(x), a=_relu_conv(padding=1)),
    _case("conv stride", IMAGE, lambda n, x: n.a(x), a=_relu_conv(stride=2, padding=1)),
    _case("conv dilation", IMAGE, lambda n, x: n.a(x), a=_relu_conv(dilation=2, padding=2)),
    _case("conv depthwise", IMAGE, lambda n, x: n.a(x), a=_relu_conv(groups=24, padding=1)),
    _case("conv circular", IMAGE, lambda n, x: n.a(x),
          a=_relu_conv(padding=1, padding_mode="circular")),
    _case("conv 1d", (4, 6, 40), lambda n, x: n.a(x), a=lambda: nn.Conv1d(6, 24, 5, padding=2)),
    _case("conv transposed", IMAGE, lambda n, x: n.b(torch.relu(n.a(x))),
          a=lambda: nn.Conv2d(3, 24, 3, padding=1),
          b=lambda: nn.ConvTranspose2d(24, 16, 4, stride=2, padding=1)),
    _case("bilinear", ROW, lambda n, x: n.c(n.a(x), n.b(x)), a=lambda: nn.Linear(48, 32),
          b=lambda: nn.Linear(48, 24), c=lambda: nn.Bilinear(32, 24, 32), slack=0.03),
    *(_case(f"activation {name}", ROW, lambda n, x: n.f(2 * n.a(x)), a=lambda: nn.Linear(48, 64),
            f=make)
      for name, make in {
          "relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.2), "gelu": nn.GELU, "silu": nn.SiLU,
          "mish": nn.Mish, "elu": nn.ELU, "selu": nn.SELU, "tanh": nn.Tanh, "prelu": nn.PReLU,
          "sigmoid": nn.Sigmoid, "hardswish": nn.Hardswish, "softplus": nn.Softplus,
          "relu6": nn.ReLU6, "hardsigmoid": nn.Hardsigmoid}.items()),
    _case("sum of branches", ROW, lambda n, x: n.a(x) + torch.relu(n.b(x)),
          a=lambda: nn.Linear(48, 64), b=lambda: nn.Linear(48, 64)),
    _case("relu of a sum that stays positive", ROW,
          lambda n, x: torch.relu(torch.relu(n.a(x)) + torch.relu(n.b(x))),
          a=lambda: nn.Linear(48, 64), b=lambda: nn.Linear(48, 64)),
    _case("residual", ROW, lambda n, x: x + n.b(torch.relu(n.a(x))), a=lambda: nn.Linear(48, 64),
          b=lambda: nn.Linear(64, 48)),
    _case("glu", ROW, lambda n, x: F.glu(n.a(x)), a=lambda: nn.Linear(48, 128)),
    _case("swiglu", ROW, lambda n, x: F.silu(n.a(x)) * n.b(x), a=lambda: nn.Linear(48, 96),
          b=lambda: nn.Linear(48, 96), slack=0.02),
    _case("squeeze and excite", IMAGE, _gate, stem=_stem, a=lambda: nn.Conv2d(32, 8, 1),
          b=lambda: nn.Conv2d(8, 32, 1), slack=0.02),
    _case("squeeze and excite added", IMAGE, lambda n, x: (h := n.stem(x)) + _excited(n, h),
          stem=_stem, a=lambda: nn.Conv2d(32, 8, 1), b=lambda: nn.Conv2d(8, 32, 1), slack=0.02),
    _case("a tensor times two gates", TOKENS, _two_gates, a=lambda: nn.Linear(48, 96),
          b=lambda: nn.Linear(48, 96), slack=0.02),
    _case("small branch of a norm", TOKENS,
          lambda n, x: (h := n.a(x)) + 2e-3 * F.layer_norm(h, (96,)), a=lambda: nn.Linear(48, 96),
          slack=0.005),
    _case("towards another by a share", TOKENS,
          lambda n, x: (h := n.a(x)) + n.share() * (n.b(h) - h), a=lambda: nn.Linear(48, 96),
          b=lambda: nn.Linear(96, 96), share=_Share),
    _case("gate taken off", IMAGE, lambda n, x: _excited(n, (h := n.stem(x))) - h, stem=_stem,
          a=lambda: nn.Conv2d(32, 8, 1), b=lambda: nn.Conv2d(8, 32, 1), slack=0.02),
    _case("dropout", ROW, lambda n, x: n.d(torch.relu(n.a(x))), a=lambda: nn.Linear(48, 256),
          d=lambda: nn.Dropout(0.3)),
    _case("batch norm", IMAGE, lambda n, x: n.a(x), a=_stem),
    _case("batch norm of few", (4, 48), lambda n, x: n.b(n.a(x)), a=lambda: nn.Linear(48, 64),
          b=lambda: nn.BatchNorm1d(64)),
    _case("layer norm", TOKENS, lambda n, x: n.b(torch.relu(n.a(x))), a=lambda: nn.Linear(48, 96),
          b=lambda: nn.LayerNorm(96)),
    _case("rms norm", TOKENS, lambda n, x: n.b(torch.relu(n.a(x))), a=lambda: nn.Linear(48, 96),
          b=lambda: nn.RMSNorm(96)),
    _case("group norm", IMAGE, lambda n, x: n.b(n.a(x)), a=_relu_conv(padding=1),
          b=lambda: nn.GroupNorm(4, 24)),
    _case("instance norm", IMAGE, lambda n, x: n.b(n.a(x)), a=_relu_conv(padding=1),
          b=lambda: nn.InstanceNorm2d(24)),
    _case("l2 norm", ROW, lambda n, x: F.normalize(n.a(x), dim=-1), a=lambda: nn.Linear(48, 64)),
    _case("average pool", IMAGE, lambda n, x: F.avg_pool2d(n.a(x), 2), a=_stem, slack=0.02),
    _case("average pool with padding", IMAGE, lambda n, x: F.avg_pool2d(n.a(x), 3, 2, 1), a=_stem,
          slack=0.02),
    _case("global pool", IMAGE, lambda n, x: F.adaptive_avg_pool2d(n.a(x), 1), a=_stem,
          slack=0.02),
    _case("max pool", IMAGE, lambda n, x: F.max_pool2d(n.a(x), 3, 2, 1), a=_stem, slack=0.02),
    _case("max pool of silu", IMAGE, lambda n, x: F.max_pool2d(F.silu(n.a(x)), 2),
          a=lambda: nn.Conv2d(3, 32, 3, padding=1), slack=0.02),
    _case("bilinear resize", IMAGE, lambda n, x: F.interpolate(
        n.a(x), scale_factor=2, mode="bilinear"), a=_stem, slack=0.02),
    _case("bicubic resize", IMAGE, lambda n, x: F.interpolate(
        n.a(x), size=(11, 11), mode="bicubic"), a=_stem, slack=0.02),
    _case("nearest resize", IMAGE, lambda n, x: F.interpolate(n.a(x), scale_factor=2), a=_stem),
    _case("pixel shuffle", IMAGE, lambda n, x: F.pixel_shuffle(n.a(x), 2), a=_stem),
    _case("concat and split", IMAGE, lambda n, x: torch.cat([n.a(x), 3 * x], 1)[:, :32], a=_stem),
    _case("merged and back", TOKENS, lambda n, x: n.b(torch.relu(n.a(x)).flatten(0, 1)).unflatten(
        0, (4, 24)).mean(1), a=lambda: nn.Linear(48, 64), b=lambda: nn.Linear(64, 32),
          slack=0.02),
    _case("patches", IMAGE, lambda n, x: n.a(x.unfold(2, 4, 4).unfold(3, 4, 4).permute(
        0, 2, 3, 1, 4, 5).reshape(4, 16, 48)), a=lambda: nn.Linear(48, 64)),
    _case("patches by reshape", IMAGE, lambda n, x: n.a(x.reshape(4, 3, 4, 4, 4, 4).permute(
        0, 2, 4, 3, 5, 1).reshape(4, 16, 48)), a=lambda: nn.Linear(48, 64)),
    _case("flattened map", IMAGE, lambda n, x: n.b(n.a(x).flatten(1)), a=_stem,
          b=lambda: nn.Linear(32 * 256, 20)),
    _case("pad", IMAGE, lambda n, x: F.pad(n.a(x), (1, 2, 1, 2)), a=_stem),
    _case("pad with a number", TOKENS, lambda n, x: F.pad(
        torch.relu(n.a(x)), (1, 0, 0, 6), value=2.0), a=lambda: nn.Linear(48, 16), slack=0.02),
    _case("patches overlap and add", IMAGE, lambda n, x: F.fold(
        F.unfold(n.a(x), 3, padding=1, stride=2), (16, 16), 3, padding=1, stride=2), a=_relu_conv(
            padding=1), slack=0.03),
    _case("mixed patches that add", IMAGE, lambda n, x: F.fold(n.b(F.unfold(
        n.a(x), 3, padding=1, stride=2).mT).mT, (16, 16), 3, padding=1, stride=2),
          a=_relu_conv(padding=1), b=lambda: nn.Linear(216, 90), slack=0.03),
    _case("fold of independent patches", (4, 90, 64), lambda n, x: F.fold(
        x, (16, 16), 3, padding=1, stride=2)),
    _case("whole samples dropped", TOKENS, lambda n, x: n.a(x) * x.new_empty(4, 1, 1).bernoulli_(
        0.8).div_(0.8), a=lambda: nn.Linear(48, 64), slack=0.05),
    _case("divided by the root of a variance", IMAGE, lambda n, x: n.a(x) * torch.rsqrt(
        torch.relu(n.a(x)).var((1, 2, 3), keepdim=True) + 1e-5), a=_relu_conv(padding=1),
          slack=0.02),
    _case("greatest of features", ROW, lambda n, x: n.a(x).amax(-1), a=lambda: nn.Linear(48, 64),
          slack=0.02),
    _case("least of all", TOKENS, lambda n, x: n.a(x).amin((0, 1, 2)), a=lambda: nn.Linear(48, 64),
          slack=0.04),
    _case("linear attention", TOKENS, _linear_attention, stem=_tokens,
          qkv=lambda: nn.Linear(96, 288), slack=0.12),
    _case("heads of different lengths", TOKENS, lambda n, x: _heads(torch.cat([n.a(x), 4 * n.b(
        x), n.c(x)], -1), 3) @ _heads(torch.cat([n.d(x), 3 * n.e(x), n.f(x)], -1), 3).mT,
          slack=0.03, **{k: lambda: nn.Linear(48, 16) for k in "abcdef"}),
    _case("attention within windows", (2, 8, 8, 24), _windowed, stem=lambda: nn.Linear(24, 24),
          qkv=lambda: nn.Linear(24, 72), slack=0.03),
    _case("map over tokens", TOKENS, lambda n, x: n.a(x) + n.b(torch.relu(n.a(x)).mT).mT,
          a=lambda: nn.Linear(48, 64), b=lambda: nn.Linear(24, 24), slack=0.02),
    _case("windows there and back", (2, 8, 8, 24), lambda n, x: n.c(n.b(n.a(x).reshape(
        2, 2, 4, 2, 4, 24).transpose(2, 3).reshape(8, 16, 24)).reshape(2, 2, 2, 4, 4, 24).transpose(
            2, 3).reshape(2, 4, 2, 4, 2, 24).transpose(2, 3).reshape(2, 16, 96)),
          a=lambda: nn.Linear(24, 24), b=lambda: nn.Linear(24, 24),
          c=lambda: nn.Linear(96, 20)),
    _case("attention", TOKENS, _attend, stem=_tokens, qkv=lambda: nn.Linear(96, 288), slack=0.02),
    _case("attention causal", TOKENS, lambda n, x: _attend(n, x, is_causal=True), stem=_tokens,
          qkv=lambda: nn.Linear(96, 288), slack=0.02),
    _case("attention causal and norm", TOKENS, lambda n, x: n.norm(n.out(_attend(
        n, x, is_causal=True))), stem=_tokens, qkv=lambda: nn.Linear(96, 288, bias=False),
          out=lambda: nn.Linear(96, 96, bias=False), norm=lambda: nn.LayerNorm(96), slack=0.02,
          pairs=0.08),
    _case("attention causal, spelled, and norm", TOKENS, _spelled, a=lambda: nn.Linear(48, 96),
          b=lambda: nn.Linear(48, 64, bias=False), norm=lambda: nn.RMSNorm(64), slack=0.02,
          pairs=0.05),
    _case("attention sharp", TOKENS, lambda n, x: _attend(n, x, scale=1.2), stem=_tokens,
          qkv=lambda: nn.Linear(96, 288), slack=0.04),
    _case("square of relu", ROW, lambda n, x: torch.relu(n.a(x)).square(),
          a=lambda: nn.Linear(48, 64), slack=0.02),
    _case("silu of silu beside zeros", ROW, lambda n, x: F.silu(F.silu(n.a(x)) + n.b(x)),
          a=lambda: nn.Linear(48, 64), b=lambda: zeros(nn.Linear(48, 64))),
    _case("steps masked by one vector", TOKENS, lambda n, x: torch.relu(n.a(x)).index_put(
        (STEPS,), n.b.bias), a=lambda: nn.Linear(48, 64), b=lambda: nn.Linear(1, 64), slack=0.02),
    _case("maximum side by side", IMAGE, lambda n, x: F.max_pool2d(torch.cat([torch.relu(n.a(
        x)), torch.tanh(n.b(x))], 1), 3, 1, 1), a=lambda: nn.Conv2d(3, 12, 1),
          b=lambda: nn.Conv2d(3, 20, 1), slack=0.04, pairs=0.06),
    _case("maximum of maxima", IMAGE, lambda n, x: F.max_pool2d(F.max_pool2d(torch.relu(n.a(
        x)), 3, 2, 1), 3, 1, 1), a=lambda: nn.Conv2d(3, 24, 1), slack=0.04, pairs=0.08),
    _case("softmax spelled", TOKENS, lambda n, x: n.a(x).softmax(-1) @ n.b(x),
          a=lambda: nn.Linear(48, 24), b=lambda: nn.Linear(48, 64), slack=0.02),
    _case("einsum", TOKENS, lambda n, x: torch.einsum("btc,bsc->bts", n.a(x), n.b(x)),
          a=lambda: nn.Linear(48, 64), b=lambda: nn.Linear(48, 64), slack=0.02),
    _case("attention by distance", TOKENS,
          lambda n, x: _attend(n, x, attn_mask=_distances(4, 24), is_causal=False), 0.02,
          stem=_tokens, qkv=lambda: nn.Linear(96, 288)),
    _case("attention by distance, causal", TOKENS, _sloped, 0.03, 0.05,
          stem=_tokens, qkv=lambda: nn.Linear(96, 288)),
    _case("attention of windows", TOKENS, lambda n, x: _attend(n, x, attn_mask=n.bias(x)), 0.02,
          stem=_tokens, qkv=lambda: nn.Linear(96, 288), bias=_Bias),
    _case("rnn", TOKENS, lambda n, x: n.a(x)[0], 0.02, a=lambda: nn.RNN(48, 64, batch_first=True)),
    *(_case(f"{name} {kind.__name__}", TOKENS, run, 0.03, a=make)
      for kind in (nn.LSTM, nn.GRU) for name, make, run in _recurrent(kind)),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_against_draws(case: Case) -> None:
    """E v² within four standard errors over fresh weights and inputs and ``slack``; the mean by the
    same error; correlations within ``pairs``."""
    torch.manual_seed(0)
    graph = load_torch(case.build(), {"x": (case.shape, "float32")})
    predicted = propagate(graph)[graph.outputs[0]]
    assert predicted.second_moment is not None
    squares, means, pairs = [], [], []
    for _ in range(DRAWS):
        with torch.no_grad():
            y = case.build().train()(torch.randn(case.shape)).double()
        squares.append(float(y.square().mean()))
        means.append(float(y.mean()))
        pairs.append(pair_correlations(y))
    measured = float(np.mean(squares))
    error = float(np.std(squares, ddof=1)) / math.sqrt(DRAWS)
    # the laws of one drawn model's weights are known up to their own sampling error
    limit = 4 * error + 2 * case.slack * measured
    assert abs(predicted.second_moment - measured) <= limit, (predicted.rms, measured**0.5)
    assert predicted.mean is not None
    deviation = float(np.std(means, ddof=1)) / math.sqrt(DRAWS)
    assert abs(predicted.mean - np.mean(means)) <= 4 * deviation + case.slack * measured**0.5
    if len(predicted.roles) != y.ndim:
        return
    for role, value in (("sample", predicted.sample_correlation),
                        ("position", predicted.position_correlation)):  # fmt: skip
        axes = [a for a, r in enumerate(predicted.roles) if r == role and y.shape[a] > 1]
        if axes and value is not None:
            key = "".join(map(str, axes))
            assert abs(value - np.mean([p[key] for p in pairs])) <= case.pairs, role


# --------------------------------------------------------------------------- laws of the algebra

unit = st.floats(-1.0, 1.0)
positive = st.floats(1e-3, 1e3)


@st.composite
def signals(draw: st.DrawFn) -> Signal:
    """Moments that a tensor can have: |mean| ≤ rms, correlations from (mean/rms)² to 1."""
    second = draw(positive)
    mean = draw(unit) * math.sqrt(second)
    floor = mean * mean / second
    p, s, x = (min(floor + (1 - floor) * draw(st.floats(0, 1)), 1.0) for _ in range(3))
    return Signal(mean, second, p, s, roles=("sample", "position", "feature"),
                  cross_correlation=min(p, s, x))  # fmt: skip


def _holds(x: Signal) -> None:
    assert x.second_moment is not None
    assert x.second_moment >= 0
    if x.mean is not None:
        assert x.mean**2 <= x.second_moment * (1 + 1e-6) + 1e-12
    for c in (x.position_correlation, x.sample_correlation, x.cross_correlation):
        assert c is None or -1 <= c <= 1


@given(signals(), signals(), st.sampled_from([1.0, -1.0]))
def test_sums_and_products_hold(a: Signal, b: Signal, sign: float) -> None:
    _holds(added(a, b, sign))
    _holds(multiplied(a, b))
    whole = added(a, b)
    assert whole.mean == pytest.approx((a.mean or 0) + (b.mean or 0), abs=1e-9)


@given(signals(), st.floats(-50, 50))
def test_scale(x: Signal, factor: float) -> None:
    y = scaled(x, factor)
    _holds(y)
    assert y.second_moment == pytest.approx((x.second_moment or 0) * factor**2)
    assert y.position_correlation == x.position_correlation


@settings(max_examples=40, deadline=None)
@given(signals(), st.sampled_from(["relu", "gelu", "tanh", "silu", "sigmoid", "elu", "abs"]))
def test_activations_hold(x: Signal, name: str) -> None:
    phi = activation(name, {})
    assert phi is not None
    _holds(through(x, phi))


@settings(max_examples=40, deadline=None)
@given(signals(), st.floats(0.01, 100))
def test_homogeneous_activations_are_equivariant(x: Signal, factor: float) -> None:
    phi = activation("relu", {})
    assert phi is not None
    a, b = through(scaled(x, factor), phi), scaled(through(x, phi), factor)
    assert a.second_moment == pytest.approx(b.second_moment, rel=1e-6)
    assert a.sample_correlation == pytest.approx(b.sample_correlation, abs=1e-6)


@given(signals(), st.integers(1, 500))
def test_averages_hold(x: Signal, count: int) -> None:
    y = averaged(x, count, x.position_correlation)
    _holds(y)
    assert (y.second_moment or 0) <= (x.second_moment or 0) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 200), st.integers(1, 5000))
def test_participation_holds(variance: float, keys: int) -> None:
    found = participation(variance, keys)
    assert 1 / keys <= found * (1 + 1e-9)
    assert found <= 1
    assert participation(variance * 1.5 + 0.1, keys) >= found * (1 - 5e-3)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize(("before", "after"), [(7, 14), (14, 7), (10, 13), (30, 28)])
@pytest.mark.parametrize("corners", [False, True])
def test_weights_of_resizing(mode: str, before: int, after: int, corners: bool) -> None:
    """Against the weights that torch interpolates with."""
    x = torch.eye(before, dtype=torch.float64)[:, None, :, None].expand(-1, 1, -1, before)
    torch_mode = "bilinear" if mode == "linear" else "bicubic"
    y = F.interpolate(x, size=(after, before), mode=torch_mode, align_corners=corners)
    coordinates = "align_corners" if corners else "half_pixel"
    found = weights(before, after, mode, coordinates)
    assert found == pytest.approx(y[:, 0, :, 0].T.numpy(), abs=1e-6)


def test_one_pass_is_linear_in_the_nodes() -> None:
    """Ten times the layers take about ten times as long, not a hundred."""

    def seconds(depth: int) -> float:
        layers = [m for _ in range(depth) for m in (nn.Linear(16, 16), nn.LayerNorm(16), nn.ReLU())]
        graph = load_torch(nn.Sequential(*layers))
        propagate(graph)
        gc.disable()  # whatever other tests have left
        start = time.process_time()
        propagate(graph)
        taken = time.process_time() - start
        gc.enable()
        return taken

    assert seconds(400) <= 40 * max(seconds(40), 1e-3)


@pytest.mark.parametrize(("count", "correlation"), [(4, 0.5), (32, 0.3), (32, 0.95)])
def test_maxima_of_pairs(count: int, correlation: float) -> None:
    rng = np.random.default_rng(0)
    z, e = rng.standard_normal((2, 100_000, count))
    u = correlation * z + math.sqrt(1 - correlation**2) * e
    products = z.max(1) * u.max(1)
    error = products.std() / math.sqrt(products.size)
    assert maxima_of_pairs(count, correlation) == pytest.approx(products.mean(), abs=4 * error)


class _Embedded(nn.Module):
    """Tokens, their places counted without the padding, and one segment for all."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(5000, 24, 1), nn.Embedding(40, 24, 1)
        self.segments = nn.Embedding(2, 24)
        self.register_buffer("segment", torch.zeros(1, 40, dtype=torch.int64))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        seen = ids.ne(1).int()
        places = (torch.cumsum(seen, 1).type_as(seen) * seen).long() + 1
        segment = torch.gather(self.segment.expand(len(ids), -1), 1, places)
        return self.places(places), self.tokens(ids) + self.segments(segment)


def test_indices_that_hardly_depend_on_the_input() -> None:
    graph = load_torch(_Embedded, {"ids": ((4, 32), "int64")})
    signals = propagate(graph)
    torch.manual_seed(0)
    ids = torch.randint(2, 5000, (4, 32))
    drawn = [_Embedded()(ids) for _ in range(60)]
    for i, out in enumerate(graph.outputs):
        s = signals[out]
        pairs = [pair_correlations(d[i].double()) for d in drawn]
        for found, axes in ((s.sample_correlation, "0"), (s.position_correlation, "1"),
                            (s.cross_correlation, "01")):  # fmt: skip
            assert found == pytest.approx(np.mean([p[axes] for p in pairs]), abs=0.04)
