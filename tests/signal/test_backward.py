"""The gradient that every kind of op hands back, against Monte Carlo in float64."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archlint.config import Config
from archlint.graph.from_torch import load_torch
from archlint.graph.model import LayerGraph
from archlint.linter import chosen_rules, lint
from archlint.signal.activations import activation
from archlint.signal.analysis import analyse
from archlint.signal.backpropagate import gradients
from archlint.signal.backward.normalisation import channel_variations
from archlint.signal.gradient import BACKWARD, together
from archlint.signal.propagate import propagate
from archlint.signal.slopes import aligned_pair, slope_at_greatest, slope_pair
from archlint.signal.transfer import TRANSFER

FLAT, MAP, TOKENS = (4, 24), (2, 12, 10, 10), (2, 20, 24)


class On(nn.Module):
    """A function of the input, with layers that it may use."""

    def __init__(self, f: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x, *self.layers)


def on(f: Callable[..., Tensor], *make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: On(f, *(m() for m in make))


def seq(*make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*(m() for m in make))


def linear(n: int = 24, m: int = 24) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(n, m)


def conv(n: int = 12, m: int = 12, k: int = 3, **kw: int) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(n, m, k, **{"padding": k // 2, **kw})


class Lstm(nn.Module):
    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.cell = kind(24, 32, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


def _handed_on(x: Tensor, encoder: nn.Module, f: nn.Module, decoder: nn.Module) -> Tensor:
    """The last state of one layer is the first of another, which reads something else."""
    return decoder(f(x), encoder(x)[1])[0][:, :3]


def _distances(size: int) -> Tensor:
    places = torch.arange(size, dtype=torch.float32)
    slopes = torch.tensor([0.5, 0.1])[:, None, None]
    sloped = -slopes * (places[:, None] - places[None, :]).abs()
    return sloped + torch.full((size, size), -torch.inf).triu(1)


def attention(
    causal: bool = False, scale: float = 1.0, distances: bool = False
) -> Callable[[], nn.Module]:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(24, 72)
            nn.init.normal_(self.qkv.weight, std=scale / math.sqrt(24))
            nn.init.zeros_(self.qkv.bias)

        def forward(self, x: Tensor) -> Tensor:
            b, t, d = x.shape
            q, k, v = self.qkv(x).reshape(b, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
            mask = _distances(t).to(x.dtype) if distances else None
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)

    return Attention


class Experts(nn.Module):
    """Rows in pairs, a matrix for each pair; in double precision, which the grouped kernel refuses,
    by a product for each."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 24, 40) / 24**0.5)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return torch.cat([x[2 * i : 2 * i + 2] @ w for i, w in enumerate(self.weight)])
        ends = torch.tensor([2, 4, 6, 8], dtype=torch.int32)
        return torch._grouped_mm(x, self.weight, offs=ends)


# name: (network, input shape, share of E g² that the approximation may be off)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "linear": (linear(24, 40), FLAT, 0.0),
    "linear_tokens": (linear(24, 40), TOKENS, 0.0),
    "experts": (Experts, (8, 24), 0.0),
    "conv": (conv(12, 20), MAP, 0.0),
    "conv_strided": (conv(12, 20, 3, stride=2), MAP, 0.0),
    "conv_dilated": (conv(12, 8, 3, dilation=2, padding=0), MAP, 0.0),
    "conv_grouped": (conv(12, 24, 5, groups=3), MAP, 0.0),
    "conv_depthwise": (conv(12, 12, 3, groups=12), MAP, 0.0),
    "conv_transpose": (lambda: nn.ConvTranspose2d(12, 6, 3, stride=2, padding=1), MAP, 0.0),
    "conv_then_conv": (seq(conv(12, 16, 3, padding=0), nn.ReLU, conv(16, 8)), MAP, 0.01),
    "bilinear": (on(lambda x, f, g, b: b(f(x), g(x)), linear(24, 8), linear(24, 8),
                    lambda: nn.Bilinear(8, 8, 12)), FLAT, 0.05),
    **{name: (seq(kind), FLAT, 0.0) for name, kind in {
        "relu": nn.ReLU, "leaky": lambda: nn.LeakyReLU(0.2), "gelu": nn.GELU, "silu": nn.SiLU,
        "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "elu": nn.ELU, "mish": nn.Mish,
        "hardswish": nn.Hardswish, "relu6": nn.ReLU6, "softplus": nn.Softplus,
        "prelu": nn.PReLU, "hardtanh": nn.Hardtanh, "softsign": nn.Softsign}.items()},
    "square": (on(lambda x: x * x), FLAT, 0.0),
    "power": (on(lambda x: x**3), FLAT, 0.0),
    "square_of_relu": (on(lambda x: F.relu(x).square()), FLAT, 0.0),
    "silu_of_silu": (on(lambda x: F.silu(F.silu(x))), FLAT, 0.0),
    "cube_of_tanh": (on(lambda x: torch.tanh(x) ** 3), FLAT, 0.0),
    "clip": (on(lambda x: x.clamp(-0.5, 1.0)), FLAT, 0.0),
    "maximum": (on(lambda x, f: torch.maximum(x, f(x)), linear()), FLAT, 0.1),
    "glu": (on(lambda x: F.glu(x, -1)), FLAT, 0.0),
    "add": (on(lambda x, f: x + f(x), linear()), FLAT, 0.0),
    "add_broadcast": (on(lambda x, f: x + f(x.mean(1, keepdim=True)), linear()), TOKENS, 0.0),
    "twice": (on(lambda x: x + x), FLAT, 0.0),
    "less_pool": (on(lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) - x), MAP, 0.02),
    "residual_pool": (on(lambda x: F.avg_pool2d(x, 3, 1, 1) + x), MAP, 0.02),
    "detached_part": (on(lambda x, f, g: f(x) + g(x.detach()), linear(), linear()), FLAT, 0.0),
    "detached_gate": (on(lambda x, f, g: f(x) * torch.sigmoid(g(x).detach()), linear(), linear()),
                      FLAT, 0.02),
    "no_grad_part": (on(lambda x, f, g: f(x) + torch.no_grad()(g)(x), linear(), linear()),
                     FLAT, 0.0),
    "straight_through": (on(lambda x, f: f(x + (x.sign() - x).detach()), linear()), FLAT, 0.0),
    "three_paths": (on(lambda x: 0.5 * x + x.reshape(4, -1) - 2 * x), FLAT, 0.0),
    "mul": (on(lambda x, f: x * f(x), linear()), FLAT, 0.02),
    "gate": (on(lambda x, f, g: f(x) * torch.sigmoid(g(x)), linear(), linear()), FLAT, 0.02),
    "squeeze": (on(lambda x, f: x * torch.sigmoid(f(x.mean((2, 3), keepdim=True))),
                   conv(12, 12, 1)), MAP, 0.02),
    "squeeze_added": (on(lambda x, f: x + x * torch.sigmoid(f(x.mean((2, 3), keepdim=True))),
                         conv(12, 12, 1)), MAP, 0.02),
    "layer_scale": (on(lambda x, f: f(x) * 0.1, linear()), FLAT, 0.0),
    "div": (on(lambda x, f: f(x) / 8.0, linear()), FLAT, 0.0),
    "dropout": (seq(linear(), lambda: nn.Dropout(0.4)), FLAT, 0.0),
    "concat": (on(lambda x, f: torch.cat([f(x), x], -1), linear()), FLAT, 0.0),
    "chunk": (on(lambda x, f: f(x.chunk(2, -1)[0]), linear(12, 24)), FLAT, 0.0),
    "stack": (on(lambda x, f: torch.stack([x, f(x)], 1), linear()), FLAT, 0.0),
    "class_token": (on(lambda x, f: f(x[:, 0]), linear()), TOKENS, 0.0),
    "slice": (on(lambda x, f: f(x)[:, 2:9:3], linear()), TOKENS, 0.0),
    "transpose": (on(lambda x, f: f(x.transpose(1, 2)), linear(20, 20)), TOKENS, 0.0),
    "uneven_parts": (on(lambda x: F.layer_norm(torch.cat([0.05 * x[:, :1], x[:, 1:]], 1), (24,))
                        [:, 0]), TOKENS, 0.02),
    "uneven_channels": (on(lambda x, n: n(torch.cat([0.1 * x[:, :4], x[:, 4:]], 1)),
                           lambda: nn.BatchNorm2d(12)), MAP, 0.02),
    "windows": (on(lambda x, f: f(x.reshape(2, 12, 2, 5, 2, 5).permute(0, 2, 4, 3, 5, 1)
                                  .reshape(8, 25, 12)).mean(1), linear(12, 16)), MAP, 0.0),
    "expand": (on(lambda x, f: f(x[:, None].expand(-1, 7, -1)), linear()), FLAT, 0.0),
    "gather": (on(lambda x: x[:, torch.tensor([3, 1, 3, 7])]), FLAT, 0.01),
    "unfold": (on(lambda x, f: f(F.unfold(x, 3, padding=1)).mean(1), linear(100, 20)), MAP, 0.02),
    "fold": (on(lambda x, f: F.fold(f(x), (10, 10), 3, padding=1, stride=2), linear(25, 25)),
             (2, 108, 25), 0.02),
    "fold_of_mean": (on(lambda x: F.fold(x, (10, 10), 3, padding=1, stride=2).mean((2, 3))),
                     (2, 108, 25), 0.02),
    "unfold_of_mean": (on(lambda x: F.unfold(x, 3, padding=1, stride=2).mean((1, 2))), MAP, 0.02),
    "window_of_windows": (on(lambda x, f: f(x.reshape(2, 4, 5, 24).sum(2)), linear()),
                          (2, 20, 24), 0.0),
    "root": (on(lambda x: (x.square().mean((1, 2)) + 1).sqrt()), TOKENS, 0.02),
    "inverse_root": (on(lambda x: (x.square().mean((1, 2)) + 1).rsqrt()), TOKENS, 0.03),
    "inverse": (on(lambda x: (x.square().mean((1, 2)) + 2).reciprocal()), TOKENS, 0.03),
    "whole_samples_dropped": (on(lambda x, f: f(x) * x.new_empty(4, 1).bernoulli_(0.8).div_(0.8),
                                 linear()), FLAT, 0.03),
    "pad": (on(lambda x: F.pad(x, (1, 2, 0, 3))), MAP, 0.0),
    "crop": (on(lambda x: F.pad(x, (-1, -2, 0, -3))), MAP, 0.0),
    "pixel_shuffle": (on(lambda x: F.pixel_shuffle(x, 2).mean((2, 3))), MAP, 0.0),
    "roll": (on(lambda x: torch.roll(x, (3, 2), (2, 3))), MAP, 0.0),
    "cumsum": (on(lambda x: x.cumsum(1)), TOKENS, 0.0),
    "mean_all": (on(lambda x, f: f(x.mean((2, 3))), linear(12, 30)), MAP, 0.0),
    "sum_features": (on(lambda x: x.sum(-1, keepdim=True)), TOKENS, 0.0),
    "amax": (on(lambda x: x.amax((2, 3))), MAP, 0.0),
    "norm_of": (on(lambda x: x.norm(dim=-1)), TOKENS, 0.03),
    "std": (on(lambda x: x.std(-1)), TOKENS, 0.08),
    "variance": (on(lambda x: x.var(-1)), TOKENS, 0.1),
    "logsumexp": (on(lambda x: torch.logsumexp(0.3 * x, -1)), TOKENS, 0.05),
    "avg_pool": (on(lambda x: F.avg_pool2d(x, 2)), MAP, 0.0),
    "avg_pool_overlap": (on(lambda x: F.avg_pool2d(x, 3, 2, 1)), MAP, 0.0),
    "avg_pool_of_mean": (on(lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False)
                            .mean((2, 3))), MAP, 0.0),
    "adaptive": (on(lambda x: F.adaptive_avg_pool2d(x, 3)), MAP, 0.0),
    "max_pool": (on(lambda x: F.max_pool2d(x, 2)), MAP, 0.0),
    "max_pool_overlap": (on(lambda x: F.max_pool2d(x, 3, 2, 1)), MAP, 0.0),
    "max_pool_of_mean": (on(lambda x: F.max_pool2d(x, 3, 1).mean((2, 3))), MAP, 0.08),
    "relu_max_pool": (on(lambda x: F.max_pool2d(F.relu(x), 2)), MAP, 0.0),
    "relu_max_pool_conv": (on(lambda x, f, g: g(F.max_pool2d(F.relu(f(x)), 3, 2, 1)),
                              conv(), conv()), MAP, 0.03),
    "nearest": (on(lambda x: F.interpolate(x, scale_factor=2)), MAP, 0.0),
    "nearest_of_mean": (on(lambda x: F.interpolate(x, scale_factor=2).mean((2, 3))), MAP, 0.0),
    "bilinear_up": (on(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear")), MAP, 0.0),
    "bicubic_up": (on(lambda x, f: F.interpolate(f(x), size=(13, 17), mode="bicubic"), conv()),
                   MAP, 0.01),
    "bilinear_down": (on(lambda x: F.interpolate(x, size=(6, 7), mode="bilinear")), MAP, 0.0),
    "aligned_up": (on(lambda x: F.interpolate(x, size=(19, 19), mode="bilinear",
                                              align_corners=True)), MAP, 0.0),
    "batch_norm": (seq(lambda: nn.BatchNorm1d(24), nn.ReLU, linear()), (64, 24), 0.01),
    "batch_norm_small": (seq(lambda: nn.BatchNorm1d(24), linear()), (8, 24), 0.02),
    "batch_norm_of_two": (seq(lambda: nn.BatchNorm1d(24), linear()), (2, 24), 0.02),
    "batch_norm_map": (seq(conv(), lambda: nn.BatchNorm2d(12), nn.ReLU, conv()), MAP, 0.02),
    "batch_norm_depthwise": (seq(conv(12, 12, 3, groups=12), lambda: nn.BatchNorm2d(12),
                                 nn.ReLU6, conv()), (8, 12, 10, 10), 0.03),
    "batch_norm_transposed": (seq(lambda: nn.ConvTranspose2d(12, 12, 4, 2, 1),
                                  lambda: nn.BatchNorm2d(12), nn.ReLU, conv()), MAP, 0.02),
    "batch_norm_of_mean": (on(lambda x, f, n: F.relu(n(f(x))).mean((2, 3)), conv(12, 48),
                              lambda: nn.BatchNorm2d(48)), MAP, 0.03),
    "group_norm": (seq(lambda: nn.GroupNorm(3, 12), nn.SiLU, conv()), MAP, 0.01),
    "instance_norm": (on(lambda x: F.gelu(F.instance_norm(x)).mean((2, 3))), MAP, 0.02),
    "layer_norm": (seq(lambda: nn.LayerNorm(24), linear()), TOKENS, 0.01),
    "layer_norm_narrow": (seq(lambda: nn.LayerNorm(6), linear(6, 6)), (8, 6), 0.02),
    "rms_norm": (seq(lambda: nn.RMSNorm(24), linear()), TOKENS, 0.01),
    "normalize": (on(lambda x: F.normalize(x, dim=-1)), TOKENS, 0.02),
    "softmax": (on(lambda x: (0.5 * x).softmax(-1)), TOKENS, 0.05),
    "log_softmax": (on(lambda x: (0.5 * x).log_softmax(-1)), TOKENS, 0.02),
    "attention": (attention(), TOKENS, 0.1),
    "attention_weak": (attention(scale=0.3), TOKENS, 0.05),
    "attention_causal": (attention(causal=True, scale=0.5), TOKENS, 0.1),
    "attention_by_distance": (attention(scale=0.5, distances=True), TOKENS, 0.1),
    "matmul": (on(lambda x, f, g: f(x) @ g(x).transpose(1, 2), linear(), linear()), TOKENS, 0.05),
    "einsum": (on(lambda x, f: torch.einsum("btd,bsd->bts", f(x), x), linear()), TOKENS, 0.05),
    "rnn": (lambda: Lstm(nn.RNN), TOKENS, 0.05),
    "lstm": (lambda: Lstm(nn.LSTM), TOKENS, 0.05),
    "gru": (lambda: Lstm(nn.GRU), TOKENS, 0.05),
    "lstm_stacked": (lambda: Lstm(nn.LSTM, num_layers=2, bidirectional=True), TOKENS, 0.06),
    "gru_stacked": (lambda: Lstm(nn.GRU, num_layers=2), TOKENS, 0.06),
    "lstm_averaged": (on(lambda x, f: f(x)[0].mean(1), lambda: nn.LSTM(24, 32, batch_first=True)),
                      TOKENS, 0.05),
    "gru_states": (on(_handed_on, lambda: nn.GRU(24, 32, batch_first=True), linear(),
                      lambda: nn.GRU(24, 32, batch_first=True)), TOKENS, 0.06),
}  # fmt: skip


def measured(build: Callable[[], nn.Module], shape: tuple[int, ...], draws: int) -> np.ndarray:
    """The mean square of ∂⟨output, ξ⟩/∂input, a number a draw of weights, input and ξ."""
    torch.manual_seed(11)
    found = []
    for _ in range(draws):
        network = build().double().train()
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        out = network(x)
        out.backward(torch.randn_like(out))
        assert x.grad is not None
        found.append(float(x.grad.square().mean()))
    return np.array(found)


def graph_of(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> LayerGraph:
    """The graph with every weight's second moment taken over many draws, so that no sampling
    error of the one network that was fitted is left."""
    torch.manual_seed(5)
    (name, *_) = inspect.signature(build().forward).parameters
    graph = load_torch(build(), {name: (shape, "float32")})
    states = [dict(build().named_parameters()) for _ in range(60)]
    parameters = {}
    for key, parameter in graph.parameters.items():
        law = parameter.law
        if law is not None and law.random and key in states[0]:
            second = float(
                np.mean([float(s[key].detach().double().square().mean()) for s in states])
            )
            law = replace(law, mean=0.0, second_moment=second, symmetric=True)
        parameters[key] = replace(parameter, law=law)
    return replace(graph, parameters=parameters)


def predicted(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> float | None:
    graph = graph_of(build, shape)
    return gradients(graph, propagate(graph))[graph.inputs[0]].second_moment


@pytest.mark.parametrize("name", CASES)
def test_gradient_of_the_input(name: str) -> None:
    """Within four standard errors over the draws and the stated share for the approximation."""
    build, shape, share = CASES[name]
    found = predicted(build, shape)
    assert found is not None
    draws = measured(build, shape, 120)
    mean, error = float(draws.mean()), float(draws.std(ddof=1)) / draws.size**0.5
    assert abs(found - mean) <= 4 * error + share * mean + 1e-12, (found, mean, error)


def test_every_op_with_a_forward_function_has_a_backward_one() -> None:
    """But for those whose gradient is known to be unknown, or whose inputs are no real numbers."""
    without = {"random_normal", "random_uniform", "full", "gumbel_softmax"}
    assert set(TRANSFER) - set(BACKWARD) <= without


def test_gradient_of_a_computed_weight() -> None:
    """A weight that is standardised before it is used: of the raw one, by Monte Carlo."""

    class Standardised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.raw = nn.Parameter(torch.randn(20, 12, 3, 3))
            self.shift = nn.Parameter(torch.zeros(8))
            self.more = nn.Parameter(torch.zeros(12))
            self.before = nn.Conv2d(12, 12, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            w = self.raw - self.raw.mean((1, 2, 3), keepdim=True)
            y = F.conv2d(
                torch.relu(self.before(x)), 0.1 * w, torch.cat([self.shift, self.more]), padding=1
            )
            return torch.tanh(y)

    graph = load_torch(Standardised, {"x": (MAP, "float32")})
    found = gradients(graph, propagate(graph))
    node = next(n for n in graph.nodes if n.op == "conv" and n.inputs[1] in graph.producer)
    weights, biases = [], []
    for seed in range(80):
        torch.manual_seed(seed)
        network = Standardised()
        h = torch.relu(network.before(torch.randn(MAP))).detach()
        w = 0.1 * (network.raw - network.raw.mean((1, 2, 3), keepdim=True)).detach()
        w.requires_grad_(True)
        b = torch.zeros(20, requires_grad=True)
        out = torch.tanh(F.conv2d(h, w, b, padding=1))
        out.backward(torch.randn_like(out))
        assert w.grad is not None
        assert b.grad is not None
        weights.append(float(w.grad.square().mean()))
        biases.append(float(b.grad.square().mean()))
    for value, drawn in ((node.inputs[1], weights), (node.inputs[2], biases)):
        assert value is not None
        second = found[value].second_moment
        assert second is not None
        error = float(np.std(drawn, ddof=1)) / len(drawn) ** 0.5
        assert abs(second - np.mean(drawn)) <= 4 * error + 0.03 * second


def test_together() -> None:
    """Σ of correlations where pairs that differ along several axes have the least of theirs."""
    sizes, cs = (3, 4, 1), (0.9, 0.2, 0.5)
    total = 0.0
    for i in range(3):
        for j in range(4):
            total += 1.0 if i == j == 0 else 0.2 if j else 0.9
    assert together(sizes, cs) == pytest.approx(total)
    assert together((2, 2), (None, 0.0)) is None
    assert together((5,), (-0.25,)) == pytest.approx(0.0)


@pytest.mark.parametrize("op", ["relu", "gelu", "tanh", "hardswish"])
def test_slopes_of_pairs(op: str) -> None:
    phi = activation(op, {})
    assert phi is not None
    rng = np.random.default_rng(3)
    n, c, mean, variance = 400_000, 0.6, 0.3, 1.7
    u = rng.standard_normal(n)
    v = c * u + math.sqrt(1 - c * c) * rng.standard_normal(n)
    a, b = phi.derivative(mean + math.sqrt(variance) * u), phi.derivative(
        mean + math.sqrt(variance) * v)  # fmt: skip
    for found, sample in (
        (slope_pair(phi, mean, variance, c), a * b),
        (aligned_pair(phi, mean, variance, c), u * a * v * b),
    ):
        # The Hermite series of a step is cut off: 0.002 at this correlation.
        assert abs(found - sample.mean()) <= 4 * sample.std() / math.sqrt(n) + 0.002
    z = math.sqrt(0.4) * rng.standard_normal((n // 8, 1)) + math.sqrt(0.6) * rng.standard_normal(
        (n // 8, 9))  # fmt: skip
    slope = phi.derivative(mean + math.sqrt(variance) * z.max(axis=1)) ** 2
    found = slope_at_greatest(phi, mean, variance, 0.4, 9)
    assert abs(found - slope.mean()) <= 4 * slope.std() / math.sqrt(slope.size) + 0.002


@pytest.mark.parametrize("normal", [False, True])
def test_what_channels_are_divided_by_varies_by_the_law_of_weights(normal: bool) -> None:
    """Two fifths as much for PyTorch's uniform weights as for normal ones; and so the gradient
    that arrives in front of the norm behind a depthwise convolution."""

    def build() -> nn.Sequential:
        net = nn.Sequential(nn.Conv2d(64, 64, (1, 5), groups=64, bias=False), nn.BatchNorm2d(64))
        if normal:
            nn.init.normal_(net[0].weight, 0.0, 0.5)  # type: ignore[arg-type]
        return net

    graph = load_torch(build, {"input": (8, 64, 8, 12)})
    signals = propagate(graph)
    made = next(n.output for n in graph.nodes if n.op == "conv")
    squares = torch.stack([build()[0].weight.detach().square().sum((1, 2, 3)) for _ in range(300)])
    measured = float(squares.var() / squares.mean() ** 2)
    assert channel_variations(graph, signals)[made] == pytest.approx(measured, rel=0.06)
    logs = []
    for _ in range(40):
        net = build()
        inside = net[0](torch.randn(8, 64, 8, 12)).detach().requires_grad_()
        y = net[1](inside)
        (g,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), inside)
        logs.append(float(g.square().mean()))
    predicted = gradients(graph, signals)[made].second_moment
    error = float(np.std(logs)) / math.sqrt(len(logs))
    assert predicted == pytest.approx(np.mean(logs), rel=0.05, abs=3 * error)


def test_zero_and_unknown() -> None:
    """What no output depends on has the gradient 0; what is behind an op without a backward
    function is unknown."""
    graph = load_torch(lambda: On(lambda x, f, g: f(x) if g(x).shape[0] else x, nn.Linear(8, 8),
                                  nn.Linear(8, 4)), {"x": ((2, 8), "float32")})  # fmt: skip
    found = gradients(graph, propagate(graph))
    dead = [n for n in graph.nodes if n.op == "linear" and graph.shape(n.output) == (2, 4)]
    assert [found[n.output].second_moment for n in dead] == [0.0]
    graph = load_torch(lambda: On(lambda x, f: torch.linalg.qr(f(x))[0], nn.Linear(8, 8)),
                       {"x": ((8, 8), "float32")})  # fmt: skip
    assert gradients(graph, propagate(graph))[graph.inputs[0]].second_moment is None


def test_a_healthy_network_is_linted_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """No rule asks for them where every layer is followed by a norm."""
    analysis = analyse(load_torch(
        lambda: nn.Sequential(*[layer for _ in range(6) for layer in (
            nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.ReLU())]),
        {"input": ((2, 3, 32, 32), "float32")}))  # fmt: skip
    monkeypatch.setattr("archlint.signal.predictions.predict", None)
    findings, silences = lint(analysis, chosen_rules(Config()))
    assert not findings
    assert silences


def test_analysis_carries_the_gradient() -> None:
    graph = load_torch(lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)),
                       {"input": ((2, 16), "float32")})  # fmt: skip
    analysis = analyse(graph)
    assert analysis.prediction(graph.outputs[0]).grad_second_moment == 1.0
    first = graph.nodes[0].output
    found = gradients(graph, propagate(graph))[first].second_moment
    assert analysis.prediction(first).grad_second_moment == found
