"""Plain ReLU networks: E ln rms of every value, forward and gradient, against draws."""

from __future__ import annotations

import pytest

from tests.accuracy.comparison import quantile
from tests.accuracy.models import Case, cases
from tests.accuracy.plain import compared, summary

BARS = {"forward": (0.01, 0.05), "gradient": (0.02, 0.08)}
PLAIN = list(cases("plain"))
SAMPLE = ("fc_he_normal_8x6", "fc_default_32x10", "fc_orthogonal_8x6", "conv_xavier_normal_16x6")


@pytest.mark.parametrize("case", [c for c in PLAIN if c.name in SAMPLE], ids=lambda c: c.name)
def test_sample(case: Case) -> None:
    """Beyond two standard errors of 400 draws."""
    rows = compared(case, 400)
    for what, (median, high) in BARS.items():
        errors = [max(abs(r.error) - 2 * r.noise, 0.0) for r in rows if r.what == what]
        assert len(errors) >= 13
        assert quantile(errors, 0.5) <= median
        assert quantile(errors, 0.95) <= high


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_all() -> None:
    """Over all values of all networks, with a standard error of at most half the bar."""
    rows = [row for case in PLAIN for row in compared(case)]
    assert len(PLAIN) == 36
    for what, (median, high) in BARS.items():
        middle, upper, noise = summary(rows, what)
        assert noise <= 0.01
        assert middle <= median
        assert upper <= high
