"""β, the spread over initializations, against draws: ``python -m tests.accuracy.spreads``.

For every network: Var ln M of its output and Var ln of the squared gradient at its input over
draws of one input (of mean square one; ξ at the output likewise), beside the engine's; how far a
typical draw is from the mean; and the share of draws that lose a factor of ten against the mean.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import pairwise

import torch
from torch import Tensor, nn

from archlint.graph.from_torch import load_torch
from archlint.signal.predictions import predict
from archlint.signal.propagate import propagate
from archlint.signal.spread import LogLaw, chance_of_loss
from tests.accuracy.ensemble import INPUT, OUTPUT, Build, Logs, draw

DRAWS = 400


@dataclass(frozen=True)
class Network:
    """What is drawn: a constructor, the shape of one input without the samples' axis."""

    family: str
    name: str
    build: Build
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """Predicted and measured, of the output's length or of the gradient at the input."""

    network: Network
    what: str
    law: LogLaw
    mean: float  # ln of the predicted second moment
    measured: Logs

    @property
    def within(self) -> float:
        """|β/measured − 1|, or 0 within three standard errors."""
        off = abs(self.law.variance - self.measured.variance)
        if off <= 3 * self.measured.error_of_variance or off < 1e-9:
            return 0.0
        return off / self.measured.variance

    @property
    def typical_error(self) -> float:
        """Predicted less measured E ln rms."""
        return (self.mean - self.law.deficit - self.measured.mean) / 2

    @property
    def loses(self) -> tuple[float, float]:
        """The predicted and the measured share of draws that lose a factor of ten against the
        mean, those that lose all included."""
        lost = int((self.measured.values < self.mean - math.log(10)).sum()) + self.measured.dead
        return chance_of_loss(self.law), lost / self.draws

    @property
    def draws(self) -> int:
        """How many."""
        return self.measured.values.size + self.measured.dead

    @property
    def error_of_loss(self) -> float:
        """Standard error of the measured share, by the greater of both."""
        p = min(max(*self.loses, 1 / self.draws), 0.5)
        return math.sqrt(p * (1 - p) / self.draws)


Weights = Callable[[Tensor], object]


def gained(gain: float) -> Weights:
    """Normal with that variance over fan-in."""
    return lambda w: nn.init.kaiming_normal_(w, nonlinearity="linear").mul_(gain**0.5)


HE = gained(2.0)


def he_uniform(w: Tensor) -> object:
    """He et al. 2015, uniform."""
    return nn.init.kaiming_uniform_(w, nonlinearity="relu")


def orthogonal(w: Tensor) -> object:
    """Saxe et al. 2014, for ReLU."""
    return nn.init.orthogonal_(w, 2**0.5)


def drawn(model: nn.Module, weights: Weights | None = HE, bias: float = 0.0) -> nn.Module:
    """Weights of a law, biases N(0, bias); None keeps torch's own."""
    if weights is not None:
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim >= 2:
                    weights(p)
                elif bias:
                    nn.init.normal_(p, std=bias**0.5)
                else:
                    nn.init.zeros_(p)
    return model


def stack(
    widths: Sequence[int], weights: Weights | None = HE, act: Build = nn.ReLU,
    bias: float = 0.0, after: Build | None = None,
) -> Build:  # fmt: skip
    """Fully connected layers over (input, hidden …), each with an activation and what comes
    ``after``, and a linear one to ten outputs."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for n, m in pairwise(widths):
            layers += [nn.Linear(n, m), act()]
            if after is not None:
                layers.append(after())
        return drawn(nn.Sequential(*layers, nn.Linear(widths[-1], 10)), weights, bias)

    return build


def convolutions(
    channels: Sequence[int], head: str = "pool", weights: Weights | None = HE,
    stride: int = 1, conv: type[nn.Module] = nn.Conv2d, **options: object,
) -> Build:  # fmt: skip
    """3×3 convolutions with ReLU, the middle one with a stride; then a mean and ten outputs, or a
    map."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for i, (n, m) in enumerate(pairwise(channels)):
            step = stride if i == len(channels) // 2 else 1
            layers += [conv(n, m, 3, step, padding=1, **options), nn.ReLU()]
        if head == "pool":
            layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 10)]
        else:
            layers.append(conv(channels[-1], channels[-1], 1))
        return drawn(nn.Sequential(*layers), weights)

    return build


class Residual(nn.Module):
    """h ← h + η·f(h), f a hidden layer with ReLU (``linear``), a layer with ReLU (``relu``), a ReLU
    after the sum (``post``), or a hidden layer behind a norm (``norm``)."""

    def __init__(self, width: int, blocks: int, eta: float, ending: str, inner: int = 0) -> None:
        super().__init__()
        inner = inner or width
        self.eta, self.ending = eta, ending
        last = width if ending != "relu" else inner
        self.one = nn.ModuleList(nn.Linear(width, inner) for _ in range(blocks))
        self.two = nn.ModuleList(nn.Linear(inner, last) for _ in range(blocks))
        self.head = nn.Linear(width, 10)
        self.norm = nn.ModuleList(nn.LayerNorm(width) for _ in range(blocks))
        drawn(self)
        for norm in self.norm:
            nn.init.ones_(norm.weight)
        if ending != "relu":
            for layer in self.two:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")

    def forward(self, h: Tensor) -> Tensor:
        for one, two, norm in zip(self.one, self.two, self.norm, strict=True):
            if self.ending == "relu":
                h = h + self.eta * torch.relu(one(h))
                continue
            branch = two(torch.relu(one(norm(h) if self.ending == "norm" else h)))
            h = h + self.eta * branch
            if self.ending == "post":
                h = torch.relu(h)
        return self.head(h)


class ConvResidual(nn.Module):
    """h ← h + η·conv(relu(conv(h))) between a stem and a mean."""

    def __init__(self, channels: int, blocks: int, eta: float) -> None:
        super().__init__()
        self.eta = eta
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.one = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(blocks))
        self.two = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(blocks))
        self.head = nn.Linear(channels, 10)
        drawn(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for one, two in zip(self.one, self.two, strict=True):
            h = h + self.eta * two(torch.relu(one(h)))
        return self.head(torch.relu(h).mean((2, 3)))


class Normed(nn.Module):
    """Layers W·φ(h) with a LayerNorm before φ."""

    def __init__(self, width: int, layers: int, act: Build) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.act, self.head = act(), nn.Linear(width, 10)
        drawn(self)
        for norm in self.norms:
            nn.init.ones_(norm.weight)

    def forward(self, h: Tensor) -> Tensor:
        for layer, norm in zip(self.maps, self.norms, strict=True):
            h = self.act(norm(layer(h)))
        return self.head(h)


class Fused(nn.Module):
    """Layers of a·φ(b) with a and b the halves of one linear map, each followed by another."""

    def __init__(self, width: int, layers: int, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.act = act
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        drawn(self, gained(1.0))

    def forward(self, h: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            a, b = up(h).chunk(2, -1)
            h = down(a * self.act(b))
        return h


class Gated(nn.Module):
    """Layers of φ(W₁h)·(W₂h), or of a GLU where φ is None, each followed by a linear map."""

    def __init__(self, width: int, layers: int, act: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.act = act
        self.up = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(layers))
        self.gate = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        drawn(self, gained(1.0))

    def forward(self, h: Tensor) -> Tensor:
        for up, gate, down in zip(self.up, self.gate, self.down, strict=True):
            if self.act is None:
                h = down(nn.functional.glu(up(h), -1))
            else:
                h = down(self.act(gate(h)) * up(h)[..., : h.shape[-1]])
        return h


class Squeezed(nn.Module):
    """Convolutions, each scaled channel by channel by a gate of its own means."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(channels if i else 3, channels, 3, padding=1) for i in range(layers)
        )
        self.gates = nn.ModuleList(nn.Linear(channels, channels) for _ in range(layers))
        self.head = nn.Linear(channels, 10)
        drawn(self)

    def forward(self, h: Tensor) -> Tensor:
        for conv, gate in zip(self.convs, self.gates, strict=True):
            h = torch.relu(conv(h))
            h = h * torch.sigmoid(gate(h.mean((2, 3))))[:, :, None, None]
        return self.head(h.mean((2, 3)))


def networks() -> Iterator[Network]:
    """Every network of the study."""

    def fc(name: str, build: Build, width: int) -> Network:
        return Network("fc", name, build, (width,))

    for n, depth in ((8, 6), (16, 10), (15, 30), (32, 10), (64, 20), (128, 12), (256, 30)):
        yield fc(f"he {n}×{depth}", stack([n] * (depth + 1)), n)
    yield fc("he 20,40,10,40,10,40,10", stack([20, 40, 10, 40, 10, 40, 10]), 20)
    yield fc("he 30/10 ×10", stack([30, *(30, 10) * 5]), 30)
    yield fc("he uniform 16×10", stack([16] * 11, he_uniform), 16)
    yield fc("lecun 32×10", stack([32] * 11, gained(1.0)), 32)
    yield fc("torch 16×6", stack([16] * 7, None), 16)
    yield fc("torch 64×12", stack([64] * 13, None), 64)
    yield fc("biases ½ 32×12", stack([32] * 13, bias=0.5), 32)
    yield fc("leaky 20×10", stack([20] * 11, gained(1.9231), lambda: nn.LeakyReLU(0.2)), 20)
    yield fc("linear 20×10", stack([20] * 11, gained(1.0), nn.Identity), 20)
    yield Network("orthogonal", "relu 16×8", stack([16] * 9, orthogonal), (16,))
    yield Network("orthogonal", "relu 64×20", stack([64] * 21, orthogonal), (64,))
    yield Network("orthogonal", "relu 32,16,32,16", stack([32, 16, 32, 16], orthogonal), (32,))
    yield Network("dropout", "½ 32×8",
                  stack([32] * 9, gained(1.0), after=lambda: nn.Dropout(0.5)), (32,))  # fmt: skip
    yield Network("dropout", "0.1 64×12",
                  stack([64] * 13, after=lambda: nn.Dropout(0.1)), (64,))  # fmt: skip

    def conv(name: str, build: Build, side: int, channels: int) -> Network:
        return Network("conv", name, build, (channels, side, side))

    yield conv("8×5 on 8², map", convolutions([8] * 6, "map"), 8, 8)
    yield conv("16×6 on 12², stride", convolutions([3, *[16] * 6], stride=2), 12, 3)
    yield conv("16×8 on 6²", convolutions([16] * 9), 6, 16)
    yield conv("16×8 on 6², map", convolutions([16] * 9, "map"), 6, 16)
    yield conv("32×6 on 12², map", convolutions([3, *[32] * 6], "map"), 12, 3)
    yield conv("32×5 on 8²", convolutions([3, *[32] * 5]), 8, 3)
    yield conv("64×5 on 8²", convolutions([3, *[64] * 5]), 8, 3)
    yield conv("8,16,32,64 on 16²", convolutions([3, 8, 16, 32, 64], stride=2), 16, 3)
    yield conv("torch 16×5 on 10²", convolutions([3, *[16] * 5], weights=None), 10, 3)
    yield conv("circular 16×6 on 6²",
               convolutions([3, *[16] * 6], padding_mode="circular"), 6, 3)  # fmt: skip
    for eta, blocks, ending, width in (
        (1.0, 10, "linear", 16), (0.3, 20, "linear", 16), (0.25, 16, "linear", 64),
        (0.1, 10, "relu", 32), (0.3, 10, "relu", 16), (1.0, 6, "relu", 64),
        (1.0, 6, "post", 32), (0.5, 8, "post", 64), (1.0, 8, "norm", 32), (0.2, 20, "post", 48),
    ):  # fmt: skip
        yield Network(
            "residual",
            f"{ending} η={eta:g} {width}×{blocks}",
            lambda e=eta, b=blocks, k=ending, w=width: Residual(w, b, e, k),
            (width,),
        )
    yield Network("residual", "conv η=0.5 16×5", lambda: ConvResidual(16, 5, 0.5), (3, 8, 8))
    yield Network("residual", "conv η=1 32×4", lambda: ConvResidual(32, 4, 1.0), (3, 8, 8))
    yield Network("gate", "glu 32×4", lambda: Gated(32, 4, None), (32,))
    yield Network("gate", "swiglu 64×3", lambda: Gated(64, 3, nn.functional.silu), (64,))
    yield Network("gate", "bilinear 64×2", lambda: Gated(64, 2, lambda x: x), (64,))
    yield Network("gate", "fused swiglu 48×3", lambda: Fused(48, 3, nn.functional.silu), (48,))
    yield Network("gate", "squeezed 32×4 on 8²", lambda: Squeezed(32, 4), (3, 8, 8))
    yield Network("norm", "relu 32×10", lambda: Normed(32, 10, nn.ReLU), (32,))
    yield Network("norm", "gelu 64×12", lambda: Normed(64, 12, nn.GELU), (64,))
    yield Network("orthogonal", "tanh 64×20",
                  stack([64] * 21, nn.init.orthogonal_, nn.Tanh), (64,))  # fmt: skip
    gelu, silu = nn.GELU, nn.SiLU
    for name, act, gain, bias, width, depth in (
        ("gelu critical", gelu, 1.98306, 0.17292, 64, 16),
        ("silu critical", silu, 1.98801, 0.55514, 64, 16),
        ("gelu unit gain", gelu, 2.3517, 0.0, 64, 12),
        ("silu unit gain", silu, 2.8108, 0.0, 64, 12),
        ("gelu he", gelu, 2.0, 0.0, 64, 10), ("silu he", silu, 2.0, 0.0, 64, 10),
        ("tanh 5/3", nn.Tanh, 25 / 9, 0.0, 64, 16), ("tanh 1", nn.Tanh, 1.0, 0.0, 64, 16),
        ("selu lecun", nn.SELU, 1.0, 0.0, 64, 16), ("elu", nn.ELU, 1.5505, 0.0, 32, 10),
    ):  # fmt: skip
        yield Network(
            "smooth",
            f"{name} {width}×{depth}",
            stack([width] * (depth + 1), gained(gain), act, bias),
            (width,),
        )


def rows(network: Network, draws: int = DRAWS, seed: int = 0) -> list[Row]:
    """The output's length and the input's gradient; none where the engine does not know."""
    name = next(iter(signature(network.build().forward).parameters))
    graph = load_torch(network.build, {name: ((1, *network.shape), "float32")})
    signals, gradients = predict(graph, propagate(graph))
    lengths = gradients.lengths
    found = draw(network.build, network.shape, draws, seed, chunk=min(draws, 250),
                 paths=lambda _path, _module: False)  # fmt: skip
    out, into = graph.outputs[0], graph.inputs[0]
    result = []
    for what, law, second, logs in (
        ("length", lengths.total.get(out), signals[out].second_moment, found.forward[OUTPUT]),
        ("gradient", gradients.total.get(into), signals[into].grad_second_moment,
         found.gradient[INPUT]),
    ):  # fmt: skip
        if law is not None and second:
            result.append(Row(network, what, law, math.log(second), logs))
    return result


def line(row: Row, limit: float) -> str:
    """One row of the table."""
    p, q = row.loses
    return (
        f"{row.network.family:10s} {row.network.name:26.26s} {row.what:8s} "
        f"β {row.law.variance:7.3f} {row.measured.variance:7.3f} ± "
        f"{row.measured.error_of_variance:5.3f} "
        f"{row.law.variance / max(row.measured.variance, 1e-12):5.2f} "
        f"{'MISS' if row.within > limit else '    '} | ln rms {row.typical_error:+.3f} ± "
        f"{row.measured.error_of_mean / 2:.3f} | P {p:.3f} {q:.3f} ± {row.error_of_loss:.3f} "
        f"{'MISS' if abs(p - q) > 3 * row.error_of_loss else ''}"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    for network in networks():
        if options.only in f"{network.family} {network.name}":
            found = rows(network, options.draws)
            for row in found:
                print(line(row, 0.2 if row.what == "length" else 0.25), flush=True)
            if len(found) < 2:
                print(f"{network.family:10s} {network.name:26.26s} unknown", flush=True)


if __name__ == "__main__":
    main()
