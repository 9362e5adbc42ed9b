"""Tensors with a common source: predicted exactly or called unknown, never taken as independent."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import archlint

Function = Callable[[Tensor], Tensor]

EXACT: dict[str, Function] = {
    "a sum three times": lambda x: (x + x) + x,
    "numbers times one tensor": lambda x: 2 * x + x - x / 4,
    "the same activation twice": lambda x: torch.tanh(x) + torch.tanh(x),
    "the same features twice": lambda x: x.chunk(2, -1)[0] + x.chunk(2, -1)[0],
    "other features": lambda x: x[:, :4] + x[:, 4:],
    "the same slice": lambda x: x[:, 1:] + x[:, 1:],
    "the same pooling": lambda x: F.avg_pool1d(x, 2) + F.avg_pool1d(x, 2),
    "less its mean": lambda x: x - x.mean(-1, keepdim=True),
    "a sum times its part": lambda x: (x + x) * x,
    "a cube": lambda x: x * x * x,
    "an activation and its argument": lambda x: (x + F.relu(x)) + torch.sigmoid(x),
    "a stack of one tensor": lambda x: torch.stack([x, x, x]).sum(0),
    "a stack of functions": lambda x: torch.stack([x, torch.tanh(x)], 1).mean(1),
    "copies": lambda x: x.repeat(1, 3).sum(1, keepdim=True),
    "copies on an axis of their own": lambda x: x[:, None].expand(-1, 3, -1).sum(1),
    "beside its mean": lambda x: (lambda h: h + h.mean(1, keepdim=True))(x.reshape(-1, 4, 2)),
    "times its mean": lambda x: x * x.mean(1, keepdim=True),
    "the variance of few": lambda x: x[:, :3].var(1, keepdim=True),
    "the length of few": lambda x: x.norm(dim=1, keepdim=True),
    "beside its own parts": lambda x: x + torch.cat([torch.tanh(x[:, :2]), x[:, 2:]], 1),
    "a part put into zeros": lambda x: torch.zeros_like(x).index_copy(
        1, torch.tensor([0, 2, 5]), 3 * x[:, :3]
    ),
    "a part added to zeros": lambda x: torch.zeros_like(x).index_add(
        1, torch.tensor([0, 2, 5]), x[:, :3]
    ),
    "every second element": lambda x: torch.ones_like(x).scatter(
        1, torch.arange(0, 8, 2).expand(x.shape[0], 4), 2 * x[:, :4]
    ),
    "a triangle": lambda x: x[:, :, None].expand(-1, 8, 8).tril(),
    "an upper triangle": lambda x: x[:, :, None].expand(-1, 8, 8).triu(2),
}
UNKNOWN: dict[str, Function] = {
    "the greatest": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    "products of all pairs": lambda x: x @ x.T,
    "copies moved among others": lambda x: x.repeat(1, 3).reshape(-1, 3, 8).sum(1),
    "a product with what is one place on": lambda x: x * x.roll(1, 1),
    "an inverse that has no mean": lambda x: x / (x + 0.5 * x),
    "elements chosen by their sign": lambda x: x.index_put((x < 0,), torch.tensor(5.0)),
    "sums where data says": lambda x: torch.zeros_like(x).scatter_add(1, x.abs().argsort(1), x),
    "whole numbers": lambda x: (4 * x).long().float(),
}


class Net(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.function(x) + self.shift
        return made


def _predicted(function: Function) -> float | None:
    return archlint.profile(Net(function), inputs={"x": (2, 8)}).values[-1].rms


@pytest.mark.parametrize("name", EXACT)
def test_what_is_known_is_exact(name: str) -> None:
    torch.manual_seed(0)
    squares = EXACT[name](torch.randn(20_000, 8)).double().square().flatten(1).mean(1)
    found = _predicted(EXACT[name])
    assert found is not None
    error = squares.std().item() / math.sqrt(squares.numel())
    assert found**2 == pytest.approx(squares.mean().item(), abs=5 * error)


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_unknown(name: str) -> None:
    assert _predicted(UNKNOWN[name]) is None


class Nested(nn.Module):
    """Residual blocks in a residual block: the input is in the sum twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for layer in self.inner:
            h = h + 0.5 * layer(h)
        return 0.2 * h + x


class Recurrent(nn.Module):
    """A gated step written out: both parts of the sum contain the gate, and one new weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.new, self.read = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.read(x))
        z = torch.sigmoid(self.gate(x))
        return z * h + (1 - z) * torch.tanh(self.new(x))


class Twice(nn.Module):
    """One layer called twice on one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.fc(x) + self.fc(x)
        return made


@pytest.mark.parametrize("net", [Nested, Recurrent, Twice])
def test_sums_of_layers(net: type[nn.Module]) -> None:
    torch.manual_seed(0)
    found = archlint.profile(net, inputs={"x": (2, 64)}).values[-1].rms
    assert found is not None
    with torch.no_grad():
        squares = torch.stack([net()(torch.randn(64, 64)).square().mean() for _ in range(60)])
    error = squares.std().item() / math.sqrt(60)
    assert found**2 == pytest.approx(squares.mean().item(), abs=5 * error)


class Mixer(nn.Module):
    """Positions are mixed like features, and back: what is left of them is averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(4)
        )
        self.norm = nn.LayerNorm(64)

    def forward(self, x: Tensor) -> Tensor:
        for mix in self.tokens:
            x = x + mix(self.norm(x).transpose(1, 2)).transpose(1, 2)
        made: Tensor = self.norm(x).mean(1)
        return made


def test_positions_that_were_mixed_are_not_alike() -> None:
    torch.manual_seed(0)
    found = archlint.profile(Mixer, inputs={"x": (2, 16, 64)}).values[-1].rms
    assert found is not None
    with torch.no_grad():
        squares = torch.stack([Mixer()(torch.randn(16, 16, 64)).square().mean() for _ in range(60)])
    error = squares.std().item() / math.sqrt(60)
    assert found**2 == pytest.approx(squares.mean().item(), abs=5 * error)


class Recurrence(nn.Module):
    """What a step picks is picked from by the next, in more ways than can be counted."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = x
        for _ in range(40):
            left, right = state.chunk(2, -1)
            turned = torch.cat([right, left], -1)
            state = self.a(x) * turned + torch.roll(state, 1, -1) * self.b(x)
        return state


@pytest.mark.timeout(60)
def test_a_recurrence_over_many_steps_comes_to_an_end() -> None:
    assert archlint.profile(Recurrence, inputs={"x": (2, 8)}).values
