"""How much tokens point in the same directions, against what is measured of drawn networks."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archlint.graph.from_torch import load_torch
from archlint.signal.attention import leaning
from archlint.signal.dependence import Dependence
from archlint.signal.overlap import overlap
from archlint.signal.propagate import propagate

TOKENS = (4, 48, 12)


def sinusoids(count: int, width: int) -> Tensor:
    rates = torch.exp(-math.log(1e4) * torch.arange(width // 2) / (width // 2))
    angles = torch.arange(count)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class Places(nn.Module):
    """Tokens and a table of waves by place."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(12, 64), nn.LayerNorm(64)
        self.register_buffer("table", scale * sinusoids(48, 64))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.stem(x) + self.table)


class Rows(nn.Module):
    """The same with a learned table, of which some rows are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.table = nn.Linear(12, 64), nn.Embedding(60, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(x) + self.table(torch.arange(48))


class Windows(nn.Module):
    """Windows that cover the same places, each with other weights."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(12, 64, kernel)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT).mT


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(12, 64), nn.Linear(64, 96), nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return h + 3 * self.down(F.gelu(2 * self.up(h)))


class Patches(nn.Module):
    """Four places become one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.stem = nn.LayerNorm(48), nn.Linear(48, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.stem(self.norm(x.unflatten(1, (12, 4)).transpose(2, 3).flatten(2)))


CASES: dict[str, Callable[[], nn.Module]] = {
    "narrow": lambda: nn.Linear(12, 64),
    "two": lambda: nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 64)),
    "waves": lambda: Places(1.0),
    "faint waves": lambda: Places(0.3),
    "rows": Rows,
    "windows": lambda: Windows(9),
    "residual": Residual,
    "patches": Patches,
}


def measured(tokens: Tensor) -> float:
    """Of tokens [sample, position, feature]."""
    free = tokens - tokens.mean((0, 1))
    inner = free @ free.mT
    sizes = inner.diagonal(0, 1, 2)
    n = tokens.shape[1]
    pairs = (inner.square().sum((1, 2)) - sizes.square().sum(1)) / (n * (n - 1))
    return float(pairs.mean() / sizes.mean() ** 2)


@pytest.mark.parametrize("name", CASES)
def test_overlap(name: str) -> None:
    """Within a fifth: what features have in common to higher orders in 1/n is left out."""
    build = CASES[name]
    graph = load_torch(build, {"x" if name not in ("narrow", "two") else "input":
                               (TOKENS, "float32")})  # fmt: skip
    signals = propagate(graph)
    dependence = Dependence(graph)
    for node in graph.nodes:
        dependence.follow(node, signals)
    found = overlap(graph, signals, dependence, graph.outputs[0])
    assert found is not None
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = [measured(build()(torch.randn(16, *TOKENS[1:]))) for _ in range(30)]
    assert found.whole == pytest.approx(np.mean(drawn), rel=0.2)


@pytest.mark.parametrize(("variance", "keys"), [(0.25, 8), (2.0, 8), (2.0, 40), (6.0, 40)])
def test_leaning(variance: float, keys: int) -> None:
    """Both factors by drawing logits."""
    generator = np.random.default_rng(0)
    logits = generator.normal(0, math.sqrt(variance), (40_000, keys))
    p = np.exp(logits)
    p /= p.sum(1, keepdims=True)
    two, three, four = ((p**k).sum(1) for k in (2, 3, 4))
    tilt = 1 - 5 * two + 4 * three + 6 * two**2 - 6 * four
    flat = 1 - two - 2 * (two - three) + 2 * (two**2 - four)
    for found, values in zip(leaning(variance, keys), (tilt, flat), strict=True):
        assert found == pytest.approx(values.mean(), abs=4 * values.std() / 200 + 1e-3)
