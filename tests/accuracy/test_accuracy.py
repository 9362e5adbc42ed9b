"""Predictions against Monte Carlo: a sample by default, whole sets behind ``-m slow``."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.accuracy.comparison import compare, quantile
from tests.accuracy.measure import collect
from tests.accuracy.models import HE, Case, plain_conv, plain_fc
from tests.accuracy.monte_carlo import log_normal_mean, measured, pair_correlations


def test_pair_correlations() -> None:
    """Against the sum over pairs, written out."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4).double() + torch.randn(2, 1, 4).double()
    found = pair_correlations(x)
    square = float(x.square().mean())
    for axes in ((1,), (0,), (1, 2)):
        total, count = 0.0, 0
        places = list(product(*(range(n) for n in x.shape)))
        for p, q in product(places, places):
            fixed = all(p[a] == q[a] for a in range(3) if a not in axes)
            if fixed and p != q:
                total += float(x[p] * x[q])
                count += 1
        name = "".join(map(str, axes))
        assert found[name] == pytest.approx(total / count / square, abs=1e-9)


def test_log_normal_mean() -> None:
    assert log_normal_mean([math.exp(-1), math.exp(1)]) == pytest.approx(math.exp(1))
    assert log_normal_mean([0.0, 2.0]) == 1.0
    assert log_normal_mean([]) is None
    assert log_normal_mean([math.nan]) is None


def _small_timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        timm = pytest.importorskip("timm")
        return timm.create_model(name)

    return build


SAMPLE = [
    Case("plain", "fc", "torch", lambda: plain_fc(64, 8, HE), {"input": ((2, 64), "float32")}, 40),
    Case("plain", "conv", "torch", lambda: plain_conv(32, 5, HE, 12),
         {"input": ((2, 3, 12, 12), "float32")}, 40),
    *(Case("timm", name, "timm", _small_timm(name))
      for name in ("test_byobnet", "test_vit_relpos")),
]  # fmt: skip


@pytest.mark.parametrize("case", SAMPLE, ids=lambda c: c.name)
def test_sample(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCHLINT_CACHE", str(tmp_path))
    monkeypatch.delenv("ARCHLINT_MEASURE", raising=False)
    figures = measured(case)
    assert figures
    assert measured(case) == figures  # from the disk
    comparison = compare(case, figures)
    errors = [max(abs(r.forward) - 2 * r.measured.standard_error, 0.0)
              for r in comparison.rows if r.measured.leaf and r.forward is not None]  # fmt: skip
    assert len(errors) >= 8
    assert quantile(errors, 0.5) <= 0.05
    assert quantile(errors, 0.95) <= 0.30
    assert comparison.unknown_gradients == []
    gradients = comparison.errors("gradient")
    assert len(gradients) >= 8
    assert quantile(gradients, 0.5) <= 0.16  # twice the bars: few draws
    assert quantile(gradients, 0.95) <= 0.6


# (set, forward median, forward 95 %): medians over the models of the set. Plain networks are
# compared in logarithms: test_plain.
BARS = [
    ("timm", 0.02, 0.12),
    ("transformers", 0.02, 0.12),
    ("others", 0.03, 0.15),
]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("name", "median", "high"), BARS)
def test_set(name: str, median: float, high: float) -> None:
    comparisons = collect([name])
    assert comparisons
    rows = [c.errors("forward") for c in comparisons]
    assert quantile([quantile(r, 0.5) for r in rows], 0.5) <= median
    assert quantile([quantile(r, 0.95) for r in rows], 0.5) <= high
    for which in ("sample correlation", "position correlation"):
        rows = [e for c in comparisons if (e := c.errors(which))]
        if rows:
            assert quantile([quantile(r, 0.5) for r in rows], 0.5) <= 0.05
            assert quantile([quantile(r, 0.95) for r in rows], 0.5) <= 0.15
    unknown = sum(c.unknown_values for c in comparisons) / sum(c.values for c in comparisons)
    assert unknown <= 0.01


# (set, gradient median, gradient 95 %): medians over the models of the set.
GRADIENT_BARS = [
    ("timm", 0.08, 0.35),
    ("transformers", 0.10, 0.40),
    ("others", 0.12, 0.45),
]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("name", "median", "high"), GRADIENT_BARS)
def test_gradients_of_a_set(name: str, median: float, high: float) -> None:
    rows = [e for c in collect([name]) if (e := c.errors("gradient"))]
    assert rows
    assert quantile([quantile(r, 0.5) for r in rows], 0.5) <= median
    assert quantile([quantile(r, 0.95) for r in rows], 0.5) <= high
