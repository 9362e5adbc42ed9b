"""Hanin & Rolnick 2018, How to Start Training, on scikit-learn's digits: epochs to 20 % test
accuracy of narrow networks and of initializers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
from torch import nn

from archlint.graph.from_torch import load_torch
from archlint.probe.training import Starts, digits, train
from tests.rules.models import glorot, he, lecun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
DEPTHS = (4, 10, 20, 30, 40)
ARCHITECTURES: dict[str, Callable[[int], list[int]]] = {
    "alternating 30/10": lambda d: [30, 10] * (d // 2),
    "30 then 10": lambda d: [30] * (d // 2) + [10] * (d // 2),
    "10 then 30": lambda d: [10] * (d // 2) + [30] * (d // 2),
    "constant 15": lambda d: [15] * d,
    "constant 20": lambda d: [20] * d,
}


def mlp(widths: list[int], init: Callable[[nn.Linear], nn.Linear] = he) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in pairwise([64, *widths]):
        layers += [init(nn.Linear(a, b)), nn.ReLU()]
    return nn.Sequential(*layers, init(nn.Linear(widths[-1], 10)))


def starts(build: Callable[[], nn.Module], epochs: int = 30, draws: int = 10,
           optimizer: str = "sgd", rate: float = 0.02) -> Starts:  # fmt: skip
    graph = load_torch(build, {"": ((50, 64), None)})
    return train(graph, digits(), draws, rate, epochs, optimizer=optimizer)  # type: ignore[arg-type]


@cache
def cell(name: str, depth: int) -> Starts:
    return starts(lambda: mlp(ARCHITECTURES[name](depth)))


def test_epochs_collapse_on_the_sum_of_inverse_widths() -> None:
    table = {(name, d): cell(name, d) for name in ARCHITECTURES for d in DEPTHS}
    for name in ARCHITECTURES:
        print(f"{name:>18}", *(f"{table[name, d].mean:5.1f} ({table[name, d].failures})"
                               for d in DEPTHS))  # fmt: skip
    first_four = list(ARCHITECTURES)[:4]
    means = {d: sum(table[n, d].mean for n in first_four) / 4 for d in DEPTHS}
    # Deeper at the same widths is slower, and the four with one Σ 1/n go together.
    assert all(means[a] < means[b] for a, b in pairwise(DEPTHS))
    assert means[40] > 4 * means[4]
    for d in (4, 10, 20, 30):
        values = [table[n, d].mean for n in first_four]
        # Means of ten runs: the extremes of four differ by chance by a factor of two.
        assert max(values) < 2.8 * min(values), (d, values)
    # Width 20 is faster than width 15 at equal depth, and equal to it at equal Σ 1/n (2.0).
    assert all(table["constant 20", d].mean < means[d] for d in (20, 30, 40))
    assert 0.5 < table["constant 20", 40].mean / table["constant 15", 30].mean < 2.0
    # Failures come where Σ 1/n is 2 and more, and hardly ever.
    assert not any(table[n, d].failures for n in ARCHITECTURES for d in (4, 10))
    assert sum(table[n, 40].failures for n in ARCHITECTURES) <= 12


def test_adam_tolerates_more() -> None:
    sgd = cell("constant 15", 40)
    adam = starts(lambda: mlp([15] * 40), optimizer="adam", rate=1e-3)
    print(f"SGD {sgd.mean:.1f} ({sgd.failures}), Adam {adam.mean:.1f} ({adam.failures})")
    assert adam.failures == 0
    assert adam.mean < 0.75 * sgd.mean


@pytest.mark.parametrize(
    ("init", "depth", "begins"),
    [(he, 10, True), (lecun, 6, True), (glorot, 6, True), (lecun, 30, False),
     (glorot, 30, False), (lambda layer: layer, 12, False)],
    ids=["he 10", "lecun 6", "glorot 6", "lecun 30", "glorot 30", "torch 12"],
)  # fmt: skip
def test_mean_length_decides(
    init: Callable[[nn.Linear], nn.Linear], depth: int, begins: bool
) -> None:
    """SGD does not start once E M has lost nine decades, and starts at two."""
    found = starts(lambda: mlp([64] * depth, init), epochs=20, draws=5)
    assert found.failures == (0 if begins else 5), found.epochs
