"""Verdicts by sequential testing: looks at growing numbers of draws, none too often.

A claim is judged when 32, 64, 128 … draws are in. Look k spends α/(k(k+1)) of α = 1 %, which sums
to α over any number of looks, so that the chance of ever giving a false verdict stays below α. An
interval that lies wholly beyond the limit confirms, one wholly within it refutes.

Everything is estimated in log space (theory.md 5.6): averages of M itself miss the few large draws
that make its mean. With x = ln of a ratio, ln E e^x is its mean plus half its variance plus a sixth
of its third cumulant and a rest; the intervals of the three are joined (MOVER: Zou & Donner 2008),
so that the long upper tail of a variance stays one. The rest is a series whose terms alternate
where x is a sum of ln χ², as in narrow networks: it lies between nothing and its first term, a 24th
of the fourth cumulant, by which the interval is longer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from archlint.finding import Claim, Measurement, Verdict
from archlint.wording import plural

ALPHA = 0.01
FIRST_LOOK = 32
_TYPICAL = ("unit difference", "common part", "weight difference")  # what a typical draw has
_DECADE = math.log(10)
Floats = npt.NDArray[np.float64]


def looks(most: int) -> list[int]:
    """The numbers of draws at which claims are judged, the last one ``most``."""
    found = []
    n = FIRST_LOOK
    while n < most:
        found.append(n)
        n *= 2
    return [*found, most]


def spent(look: int) -> float:
    """The part of α that look 1, 2, … spends."""
    return ALPHA / (look * (look + 1))


def quantile(level: float, freedom: int) -> float:
    """The two-sided quantile of Student's t at 1 − level: the normal one with the first three terms
    of its expansion in 1/freedom (Abramowitz & Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(1 - level / 2)
    n = freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval, and how far the interval reaches for one draw: half-width·√n."""

    figure: float
    low: float
    high: float
    scatter: float

    def scaled(self, factor: float) -> Estimate:
        """The same of a multiple."""
        return Estimate(*(factor * v for v in (self.figure, self.low, self.high, self.scatter)))


def log_mean(x: Floats, level: float, dead: float = 0.0) -> Estimate:
    """ln E e^x of draws x, each the mean over the samples (columns) of one draw (rows).

    ``dead`` is the share of all samples in which e^x is zero: they are no part of x, and of the
    mean.
    """
    n = x.shape[0]
    d = x - x.mean(0)
    second = (d**2).sum(0) / (n - 1)
    third = (d**3).sum(0) * n / ((n - 1) * (n - 2))
    fourth = (d**4).mean(0) - 3 * second**2
    skewed = ((d**3 - 3 * second * d) / 6).mean(1)
    peaked = ((d**4 - 6 * second * d**2 - 4 * third * d) / 24).mean(1)
    parts = [mean(x, level), log_variance(x, level).scaled(0.5),
             _interval(float(third.mean()) / 6, skewed, level)]  # fmt: skip
    rest = _interval(float(fourth.mean()) / 24, peaked, level)
    if dead > 0.0:
        half = quantile(level, n - 1) * math.sqrt(dead / (1 - dead) / n)
        alive = math.log1p(-dead)
        parts.append(Estimate(alive, alive - half, min(alive + half, 0.0), half * math.sqrt(n)))
    figure = sum(part.figure for part in parts)
    low = figure - math.sqrt(sum((part.figure - part.low) ** 2 for part in parts))
    high = figure + math.sqrt(sum((part.high - part.figure) ** 2 for part in parts))
    low, high = low + min(rest.figure, 0.0), high + max(rest.high, 0.0)
    return Estimate(figure, low, high, max(high - figure, figure - low) * math.sqrt(n))


def mean(x: Floats, level: float) -> Estimate:
    """E x: what a typical draw has."""
    each = x.mean(1)
    return _interval(float(each.mean()), each, level)


def log_variance(x: Floats, level: float) -> Estimate:
    """Var x between draws, its interval by the logarithm, whose law is closer to normal."""
    n = x.shape[0]
    squares = ((x - x.mean(0)) ** 2).mean(1) * n / (n - 1)
    figure = float(squares.mean())
    if figure <= 0.0:
        return Estimate(0.0, 0.0, 0.0, 0.0)
    # At least the scatter of a normal x: a sample that happens to be flat tells no less.
    relative = max(float(squares.std(ddof=1)) / figure, math.sqrt(2 / x.shape[1]))
    half = quantile(level, n - 1) * relative / math.sqrt(n)
    return Estimate(figure, figure * math.exp(-half), figure * math.exp(half),
                    figure * half * math.sqrt(n))  # fmt: skip


def _interval(figure: float, influence: Floats, level: float) -> Estimate:
    """An interval from the influence of each draw. Where that is skew, the end on the long side
    moves outwards (Johnson 1978): a sample too small has not seen the long tail yet."""
    n = len(influence)
    sd = float(influence.std(ddof=1))
    t = quantile(level, n - 1)
    half = t * sd / math.sqrt(n)
    skew = float(((influence - influence.mean()) ** 3).mean()) / sd**3 if sd > 0 else 0.0
    shift = sd * skew / (6 * n) * (1 + 2 * t * t)
    low, high = figure - half + min(shift, 0.0), figure + half + max(shift, 0.0)
    return Estimate(figure, low, high, max(high - figure, figure - low) * math.sqrt(n))


@dataclass(frozen=True, slots=True)
class Judged:
    """A claim after a look: no verdict while it is open."""

    verdict: Verdict
    measurement: Measurement

    @property
    def open(self) -> bool:
        """Whether more draws may decide it."""
        return self.verdict == "inconclusive"


@dataclass(frozen=True, slots=True)
class Lost:
    """Draws without a finite figure: those that are ``dead``, zero at the end in some sample, and
    the ``share`` of all samples that is; those ``beyond`` numbers, infinite or NaN somewhere;
    ``others``, zero at both ends."""

    dead: int = 0
    beyond: int = 0
    others: int = 0
    share: float = 0.0

    @property
    def every(self) -> int:
        """How many there are."""
        return self.dead + self.beyond + self.others


def judge(claim: Claim, x: Floats, look: int, lost: Lost = Lost()) -> Judged:
    """A claim by its draws: x = ln of the ratio that the claim is about, [draws, samples].

    ``lost`` draws are no part of x. Those that are dead are zeros of a mean; of what is typical and
    of a spread they are no part. Those beyond numbers are taken for large: there is no verdict by
    which the figure is below the limit.
    """
    n = x.shape[0]
    if n < 8:
        why = (f"in {lost.every} of {n + lost.every} draws it is zero or not finite" if lost.every
               else f"{plural(n, 'draw')}: it takes eight at least")  # fmt: skip
        return Judged("inconclusive", Measurement(None, None, None, n, lost.every, None, why))
    level = spent(look)
    if "spread" in claim.statistic:
        found, unit = log_variance(x, level), 1.0
    elif "typical" in claim.statistic or claim.statistic in _TYPICAL:
        found, unit = mean(x, level), _DECADE
    else:
        found, unit = log_mean(x, level, lost.share), _DECADE
    figure, low, high = found.figure / unit, found.low / unit, found.high / unit
    stands, falls = _compare(claim, low, high)
    if lost.beyond and high < _limits(claim)[0]:
        stands = falls = False
    verdict: Verdict = "confirmed" if stands else "refuted" if falls else "inconclusive"
    needed = None
    if verdict == "inconclusive" and not lost.beyond:
        distance = min(abs(figure - limit) for limit in _limits(claim))
        scatter = found.scatter / unit
        needed = math.ceil((scatter / distance) ** 2) if distance > 0 else None
        if needed is not None and needed <= n:
            needed = n + 1
    return Judged(verdict, Measurement(figure, low, high, n, lost.every, needed))


def _is_signed(claim: Claim) -> bool:
    """Whether the limit is meant with its sign, and not as a distance from zero."""
    return "spread" in claim.statistic or claim.statistic in _TYPICAL


def _limits(claim: Claim) -> Sequence[float]:
    if claim.below or _is_signed(claim):
        return (claim.limit,)
    return (math.copysign(claim.limit, claim.predicted),)


def _compare(claim: Claim, low: float, high: float) -> tuple[bool, bool]:
    """Whether an interval lies wholly beyond the limit, and wholly within it."""
    if claim.below:
        return high < claim.limit, low > claim.limit
    if _is_signed(claim):
        return low > claim.limit, high < claim.limit
    limit = math.copysign(claim.limit, claim.predicted)
    return (low > limit, high < limit) if limit > 0 else (high < limit, low > limit)
