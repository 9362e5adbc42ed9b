"""The law of a weight: its family and exact moments."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

Family = Literal[
    "normal",
    "uniform",
    "truncated_normal",
    "constant",
    "zeros",
    "ones",
    "orthogonal",
    "sparse",
    "dirac",
    "eye",
    "two_point",
    "laplace",
    "mixture",
    "deterministic",
    "trained",
    "unknown",
    "uninitialised",
]


@dataclass(frozen=True, slots=True)
class Distribution:
    """The law of one element of a weight, drawn independently unless the family says otherwise.

    ``mean`` = E w, ``second_moment`` = E w², ``kurtosis`` = E(w−mean)⁴/Var² (Gaussian 3, uniform
    9/5; nan for a constant). ``symmetric``: whether w and −w have the same law. ``exact``: whether
    the moments follow from the initializer rather than from a sample of ``count`` elements.
    ``initializer`` is what a user would write, e.g. ``kaiming_normal_(nonlinearity="relu")``.
    """

    family: Family
    mean: float
    second_moment: float
    kurtosis: float = 3.0
    symmetric: bool = True
    exact: bool = True
    count: int = 0
    initializer: str = ""

    @property
    def variance(self) -> float:
        """Var w = E w² − (E w)², never negative."""
        return max(self.second_moment - self.mean * self.mean, 0.0)

    @property
    def std(self) -> float:
        """Standard deviation."""
        return math.sqrt(self.variance)

    @property
    def random(self) -> bool:
        """Whether two draws differ."""
        return self.variance > 0.0 and self.family not in (
            "constant",
            "zeros",
            "ones",
            "dirac",
            "eye",
            "deterministic",
        )

    @property
    def relative_error(self) -> float:
        """Standard error of the variance, relative: √((kurtosis − 1)/count); 0 where exact."""
        if self.exact or self.count == 0:
            return 0.0
        return math.sqrt(max(self.kurtosis - 1.0, 0.0) / self.count)


def normal(std: float, mean: float = 0.0, initializer: str = "") -> Distribution:
    """N(mean, std²)."""
    return Distribution(
        "normal", mean, std * std + mean * mean, 3.0, mean == 0.0, initializer=initializer
    )


def uniform(low: float, high: float, initializer: str = "") -> Distribution:
    """U(low, high): variance (high − low)²/12, kurtosis 9/5."""
    mean = (low + high) / 2
    variance = (high - low) ** 2 / 12
    return Distribution(
        "uniform", mean, variance + mean * mean, 1.8, low == -high, initializer=initializer
    )


def rescaled(law: Distribution, factor: float) -> Distribution:
    """The same law with ``factor`` times the variance, and the mean in proportion."""
    return replace(law, mean=law.mean * math.sqrt(factor),
                   second_moment=law.second_moment * factor)  # fmt: skip


def constant(value: float, initializer: str = "") -> Distribution:
    """The same number everywhere."""
    family: Family = "zeros" if value == 0 else "ones" if value == 1 else "constant"
    return Distribution(
        family, value, value * value, math.nan, value == 0.0, initializer=initializer
    )
