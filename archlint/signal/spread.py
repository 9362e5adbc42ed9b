"""Spread: how much the squared length and the squared gradient vary from one draw to the next.

β = Var ln M over initializations. A layer of n neurons multiplies M by a random factor whose
variance of the logarithm is about κ/n, κ = E φ⁴/(E φ²)² − 1: 5 for ReLU, 2 for a linear map
(Hanin & Rolnick 2018; Hanin & Nica 2018: ln M ~ N(−β/2, β), β = 5 Σ 1/n). For narrow layers the
law is computed exactly: of n Gaussian pre-activations B ~ Bin(n, ½) are positive, and n·M/2 is a χ²
of B degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from archlint.signal.activations import Activation
from archlint.signal.gaussian import nodes_and_weights

_STEPS = 4000  # of the midpoint rule over θ

Floats = npt.NDArray[np.float64]
Number = TypeVar("Number", float, Floats)

_EXACT_BELOW = 512  # neurons up to which the sum over the number of positive ones is written out


@dataclass(frozen=True, slots=True)
class LogLaw:
    """The logarithm of a random factor R with E R = 1: ``variance`` = Var ln R, ``deficit`` =
    −E ln R (half the variance where R is log-normal), ``third`` its third central moment, all
    three given that R is not zero; ``dead`` = P(R = 0). They add up over independent factors."""

    variance: float = 0.0
    deficit: float = 0.0
    third: float = 0.0
    dead: float = 0.0

    def __add__(self, other: LogLaw) -> LogLaw:
        return LogLaw(self.variance + other.variance, self.deficit + other.deficit,
                      self.third + other.third, self.dead + other.dead - self.dead * other.dead,
                      )  # fmt: skip

    def raised(self, power: float) -> LogLaw:
        """Of what goes as that power of R, over what it is at R = 1."""
        e = power
        return LogLaw(e * e * self.variance, e * self.deficit, e**3 * self.third, self.dead)

    def through(self, f: Callable[[Floats], Floats]) -> tuple[LogLaw, float]:
        """The law of e^f(ln R) over what it is at R = 1, f(0) = 0, and the slope of f by its
        regression on ln R: what f makes of small further fluctuations on the mean over draws."""
        grid, weight = _grid(self, _FEW)
        value = f(grid)
        mean = float(weight @ value)
        off, x = value - mean, grid + self.deficit
        law = LogLaw(float(weight @ off**2), -mean, float(weight @ off**3), self.dead)
        return law, float(weight @ (off * x)) / self.variance

    def mixed(self, share: float) -> LogLaw:
        """Of 1 − share + share·R: what is left of R beside something that does not vary, such as
        the biases' part of a length."""
        if share >= 1.0:
            return self
        if self.variance * share * share < _SMALL:
            return LogLaw(share**2 * self.variance, share**2 * self.deficit, share**3 * self.third)
        return _mixed(self, round(share, 6))

    def below(self, x: float) -> float:
        """P(ln R < x), ln R taken for a scaled and shifted ln Γ of its three moments."""
        return self.dead + (1 - self.dead) * self._below(x)

    def _below(self, x: float) -> float:
        if self.variance <= 0:
            return float(x > -self.deficit)
        grid, weight = _grid(self)
        order = np.argsort(grid)
        total = np.cumsum(weight[order])
        middle = total - weight[order] / 2
        return float(np.interp(x, grid[order], middle, left=0.0, right=1.0))


CERTAIN = LogLaw()
_SMALL = 1e-3  # variance up to which ln(1 − s + sR) is s·ln R to well below a percent


def _grid(law: LogLaw, points: int = 0) -> tuple[Floats, Floats]:
    """Points and weights of ln R = m ± s·ln Γ(a), with a from the skewness ψ₂(a)/ψ₁(a)^{3/2},
    which goes from −2 (a → 0) to 0 (a normal law)."""
    skew = law.third / law.variance**1.5
    a = _shape_of(-abs(skew))
    centre, deviation = digamma(a), math.sqrt(trigamma(a))
    reach = (14, 8) if not points else (6, 5)
    x = np.linspace(centre - reach[0] * deviation, centre + reach[1] * deviation,
                    points or _POINTS)  # fmt: skip
    density = np.exp(a * (x - centre) - np.exp(np.minimum(x, 700.0)) + math.exp(centre))
    weight = density / density.sum()
    x = (x - float(weight @ x)) / deviation
    x /= math.sqrt(float(weight @ x**2))
    return -law.deficit + math.sqrt(law.variance) * (x if skew <= 0 else -x), weight


_LEAST, _MOST, _POINTS = 0.02, 1e4, 801


@lru_cache(maxsize=1)
def _skewnesses() -> tuple[Floats, Floats]:
    """ψ₂(a)/ψ₁(a)^{3/2} at equidistant ln a, rising."""
    at = np.linspace(math.log(_LEAST), math.log(_MOST), 257)
    return at, tetragamma_of(np.exp(at)) / trigamma_of(np.exp(at)) ** 1.5


def _shape_of(skew: float) -> float:
    """The a with ψ₂(a)/ψ₁(a)^{3/2} = skew, or the end of the range that is nearest."""
    at, known = _skewnesses()
    i = int(np.searchsorted(known, skew))
    if i in (0, known.size):
        return _LEAST if i == 0 else _MOST
    low, high = float(at[i - 1]), float(at[i])
    below, above = float(known[i - 1]) - skew, float(known[i]) - skew
    middle, side = high, 0
    for _ in range(40):  # false position; an end that stays again counts half
        if high - low < 1e-14 or not above:
            break
        middle = (low * above - high * below) / (above - below)
        a = math.exp(middle)
        off = tetragamma(a) / trigamma(a) ** 1.5 - skew
        if abs(off) < 4e-15:
            break
        if off < 0:
            low, below, above = middle, off, above / 2 if side < 0 else above
        else:
            high, above, below = middle, off, below / 2 if side > 0 else below
        side = -1 if off < 0 else 1
    return math.exp(middle)


_FEW = 25  # where every point costs an integral


@lru_cache(maxsize=16384)
def _mixed(law: LogLaw, share: float) -> LogLaw:
    grid, weight = _grid(law)
    grid, weight = grid[weight > 0], weight[weight > 0]
    top = float(grid.max())  # R itself may be beyond what numbers hold
    level = top + math.log(float(weight @ np.exp(grid - top)))  # ln E R, zero but for what three
    with np.errstate(invalid="ignore"):  # moments miss
        value = np.log1p(share * np.expm1(np.minimum(grid - level, 700.0)))
    mean = float(weight @ value)
    off = value - mean
    return LogLaw(float(weight @ off**2), -mean, float(weight @ off**3))


@lru_cache(maxsize=16384)
def norm_law(relative_variance: float) -> LogLaw:
    """Of a mean of squares with that relative variance r, taken for a Γ(1/r) variable over its
    mean: ψ₁(1/r), ln(1/r) − ψ(1/r), ψ₂(1/r). Exact for n normal elements (χ², r = 2/n)."""
    if not relative_variance > 1e-12:
        return CERTAIN
    shape = 1 / relative_variance
    return LogLaw(trigamma(shape), math.log(shape) - digamma(shape), tetragamma(shape))


def skewed_law(relative_variance: float, third: float) -> LogLaw:
    """Of a positive mean with that relative variance r and relative third moment m: from
    ln E S²/(E S)² = κ₂ + κ₃ = ln(1 + r) and ln E S³/(E S)³ = 3κ₂ + 4κ₃ = ln(1 + 3r + m), the first
    cumulants of ln S. A Γ variable has m = 2r²; the sum of few products has more."""
    r = relative_variance
    if not r > 1e-12:
        return CERTAIN
    two, three = math.log1p(r), math.log1p(3 * r + max(third, 2 * r * r))
    skew = three - 3 * two
    variance = two - skew
    if variance < two / 2:  # so skewed that three cumulants do not tell
        return norm_law(r)
    return LogLaw(variance, variance / 2 + skew / 6, skew)


@lru_cache(maxsize=16384)
def normal_law(count: float, excess: float = 0.0) -> LogLaw:
    """Of the mean square of n independent elements that are normal but for an excess kurtosis x:
    ψ₁(n/2), ln(n/2) − ψ(n/2), ψ₂(n/2), exact for x = 0 (χ²_n).

    For x > 0 to the first order: with the density φ(z)(1 + x·He₄(z)/24) and S = Σz²,
    E[He₄(z₁) | S] = 3S²/(n(n + 2)) − 6S/n + 3, so that E ln S changes by (xn/8)·Δ²ψ(n/2) =
    −x/(2(n + 2)), and Var ln S by x/(n + 2) likewise. For x < 0, as of a sum of a uniform and a
    normal variable, times what the cumulants from E S² and E S³ change by (:func:`skewed_law`).
    """
    mean, variance, third = (float(m[0]) for m in _sums_of_squares(np.array([count]), excess))
    return LogLaw(variance, math.log(count / 2) - mean, third)


_UNIFORM = 6.857142857 / 1.2**2  # κ₆/κ₄² of a uniform variable


def _sums_of_squares(n: Floats, excess: float) -> tuple[Floats, Floats, Floats]:
    """E ln(Σz²/2), Var and the third central moment of ln Σz², Σ over n elements."""
    a = n / 2
    mean, variance, third = digamma_of(a), trigamma_of(a), tetragamma_of(a)
    if excess >= 0:
        more = excess / (n + 2)
        return mean - more / 2, variance + more, third
    level = np.log(a)
    now = _cumulants((2 + excess) / n, (8 + 12 * excess + _UNIFORM * excess**2) / n**2)
    normal = _cumulants(2 / n, 8 / n**2)
    deficit, wide, skew = (x / y for x, y in zip(now, normal, strict=True))
    return level - (level - mean) * deficit, variance * wide, third * np.maximum(skew, 0.0)


def _cumulants(r: Floats, third: Floats) -> tuple[Floats, Floats, Floats]:
    """−κ₁, κ₂ and κ₃ of ln S from ln E S²/(E S)² = κ₂ + κ₃ and ln E S³/(E S)³ = 3κ₂ + 4κ₃."""
    two, three = np.log1p(r), np.log1p(3 * r + third)
    skew = three - 3 * two
    return (two - skew) / 2 + skew / 6, two - skew, skew


def part_law(part: float, whole: float) -> LogLaw:
    """Of the share that ``part`` of ``whole`` elements of an isotropic direction have of its
    squared length: Beta(part/2, (whole − part)/2) over its mean."""
    if not 0 < part < whole:
        return CERTAIN
    a, b = part / 2, whole / 2
    return LogLaw(
        trigamma(a) - trigamma(b),
        math.log(part / whole) - (digamma(a) - digamma(b)),
        tetragamma(a) - tetragamma(b),
    )


def rectified_law(
    width: float, slope: float = 0.0, excess: float = 0.0, chance: float = 0.5
) -> LogLaw:
    """Of what φ(z) = z, or slope·z below zero, leaves of the squared length of z, over its mean;
    given that it is not zero.

    Of ``width`` elements B ~ Bin(n, ½) are positive. Their share of the squared length has the law
    Beta(B/2, (n − B)/2) and is independent of the length: exact for normal elements. An ``excess``
    kurtosis enters as in :func:`normal_law`. A mask that keeps elements with another ``chance``,
    such as dropout, is the same (without a slope). For widths between two whole numbers the mean
    of the two.
    """
    if math.isinf(width):
        return CERTAIN
    low = math.floor(width)
    if low < 1:
        low, width = 1, 1.0
    if low >= _WIDEST:
        ratio = 2 * (1 + slope**4) / (1 + slope**2) ** 2 if slope else 1 / chance
        return norm_law(3 * (ratio - 1) / width)
    over = width - low
    first = _rectified(low, slope, excess, chance)
    if over < 1e-9:
        return first
    second = _rectified(low + 1, slope, excess, chance)
    return LogLaw(
        first.variance + over * (second.variance - first.variance),
        first.deficit + over * (second.deficit - first.deficit),
        first.third + over * (second.third - first.third),
        first.dead + over * (second.dead - first.dead),
    )


_WIDEST = 20_000  # above, a sum over the number of positive elements gains nothing


@lru_cache(maxsize=4096)
def _rectified(n: int, slope: float, excess: float, chance: float) -> LogLaw:
    s2 = slope * slope
    if s2 >= 1.0 or chance >= 1.0:
        return CERTAIN
    if s2 > 0.0:
        if n > _EXACT_BELOW:
            return norm_law((6 * (1 + s2 * s2) / (1 + s2) ** 2 - 3) / n)
        weight = binomial(n, 0, n, 0.5)
        mean, inner, third = _logs_of_mixtures(n, s2)
        level = math.log((1 + s2) / 2)
    else:
        centre = n * chance
        reach = 10 * math.sqrt(centre * (1 - chance)) + 2  # in standard deviations of B
        low, high = max(int(centre - reach), 1), min(int(centre + reach) + 1, n)
        weight = binomial(n, low, high, chance)
        b = np.append(np.arange(low, high + 1, dtype=np.float64), n)
        mean, inner, third = (m[:-1] - m[-1] for m in _sums_of_squares(b, excess))
        level = math.log(chance)
    centre = float(weight @ mean)
    off = mean - centre
    return LogLaw(
        float(weight @ (inner + off**2)), level - centre,
        float(weight @ (third + 3 * off * inner + off**3)),
        (1 - chance) ** n if s2 == 0.0 else 0.0,
    )  # fmt: skip


@lru_cache(maxsize=32)
def _log_factorials(count: int) -> Floats:
    """ln k! for k below ``count``."""
    return np.array([math.lgamma(k + 1) for k in range(count)])


def binomial(n: int, low: int, high: int, p: float) -> Floats:
    """P(B = b) for b = low … high, B ~ Bin(n, p), scaled to the sum one."""
    table = _log_factorials(1 << n.bit_length())
    logs = -table[low : high + 1] - table[n - high : n - low + 1][::-1]
    logs += np.arange(low, high + 1) * (math.log(p) - math.log1p(-p))
    weight = np.exp(logs - logs.max())
    return np.asarray(weight / weight.sum(), np.float64)


@dataclass(frozen=True, slots=True)
class Shares:
    """What one layer adds: the law of its factor on the squared length (``forward``) and on the
    squared gradient, the elasticity d ln M_after/d ln M_before that carries on what was, the
    elasticity d ln E φ′²/d ln M_before by which the length moves the gradient, and the covariance
    of the logarithms of the layer's two factors, which come from the same neurons."""

    forward: LogLaw
    gradient: LogLaw | None
    elasticity: float
    slope_elasticity: float = 0.0
    covariance: float = 0.0


def slope_elasticity(phi: Activation, mean: float, variance: float) -> float:
    """d ln E φ′²/d ln q at a pre-activation N(mean, variance), by a central difference."""
    h = 1e-3
    above = phi.moments(mean, variance * math.exp(h)).slope
    below = phi.moments(mean, variance * math.exp(-h)).slope
    return math.log(above / below) / (2 * h) if above > 0 and below > 0 else 0.0


def joint_moment(phi: Activation, mean: float, variance: float) -> float:
    """E φ²φ′²/(E φ²·E φ′²) − 1: what one neuron's shares of length and gradient have in common."""
    if variance <= 0:
        return 0.0
    deviation = math.sqrt(variance)
    z, w = nodes_and_weights(phi.standard_kinks(mean, deviation))
    x = mean + deviation * z
    m = phi.moments(mean, variance)
    both = float(w @ (phi.function(x) * phi.derivative(x)) ** 2)
    return both / (m.second_moment * m.slope) - 1 if m.second_moment * m.slope > 0 else 0.0


def length_law(layers: Sequence[Shares]) -> LogLaw:
    """The law of ln M at the end over layers in forward order: each layer's own factor, and what
    was before it to the power of its elasticity."""
    total = CERTAIN
    for share in layers:
        total = total.raised(share.elasticity) + share.forward
    return total


def gradient_law(layers: Sequence[Shares]) -> LogLaw | None:
    """The law of ln of the squared gradient over layers in forward order.

    ln g² = Σ_j η_j + Σ_j c_j δ_{j−1}: a layer's own noise η, and c = d ln E φ′²/d ln M times the
    fluctuation of the length that enters it, δ_j = e_j δ_{j−1} + ε_j. What ε_i does to all later
    layers is A_i = c_{i+1} + e_{i+1} A_{i+1}, so that the variance is
    Σ (Var η_i + 2 A_i Cov(ε_i, η_i) + A_i² Var ε_i). Without it a GELU or SiLU stack at its
    critical point is predicted a third too low.
    """
    total = CERTAIN
    later = 0.0
    for share in reversed(layers):
        if share.gradient is None:
            return None
        total += share.gradient
        moved = 2 * later * share.covariance + later**2 * share.forward.variance
        total += influence(max(moved, -share.gradient.variance))
        later = share.slope_elasticity + share.elasticity * later
    return total


def influence(variance: float) -> LogLaw:
    """Of what is added to a logarithm without moving its mean."""
    return LogLaw(variance)


@lru_cache(maxsize=4096)
def variance_of_log(width: int, slope: float = 0.0) -> float:
    """Var ln of (1/n)Σφ(z_i)², z_i ~ N(0, 1) independent, φ with a slope below zero; given that
    not all are zero: that of a χ²_n and of what φ leaves of it."""
    return (normal_law(width) + rectified_law(width, slope)).variance


def _logs_of_mixtures(n: int, s2: float) -> tuple[Floats, Floats, Floats]:
    """Mean, variance and third central moment of ln(s² + (1 − s²)u), u ~ Beta(B/2, (n − B)/2), for
    B = 0 … n.

    With u = sin²θ the density is sin^(B−1)θ·cos^(n−B−1)θ, without a singularity."""
    theta = (np.arange(_STEPS) + 0.5) * (math.pi / 2 / _STEPS)
    value = np.log(s2 + (1 - s2) * np.sin(theta) ** 2)
    b = np.arange(1, n)[:, None]
    log_density = (b - 1) * np.log(np.sin(theta)) + (n - b - 1) * np.log(np.cos(theta))
    density = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    density /= density.sum(axis=1, keepdims=True)
    mean = density @ value
    off = value[None, :] - mean[:, None]
    moments = [(density * off**k).sum(axis=1) for k in (2, 3)]
    ends = ([math.log(s2)], [0.0]), ([0.0], [0.0]), ([0.0], [0.0])
    found = [np.concatenate([first, inner, last])
             for (first, last), inner in zip(ends, (mean, *moments), strict=True)]  # fmt: skip
    return found[0], found[1], found[2]


def typical_loss(law: LogLaw) -> float:
    """How many decades of squared length a typical draw loses against the mean: −E ln R/ln 10."""
    return law.deficit / math.log(10)


def chance_of_loss(law: LogLaw, factor: float = 10.0) -> float:
    """P(M < E M/factor)."""
    return law.below(-math.log(factor))


# --------------------------------------------------------------------------- ψ and ψ₁

_SHIFT = 8  # arguments are raised past this by ψ(x) = ψ(x + 1) − 1/x before the expansion


def digamma_of(x: Floats) -> Floats:
    """ψ for positive arguments, to 1e-12."""
    return np.asarray(_digamma(x, np.log(x + _SHIFT)), np.float64)


def trigamma_of(x: Floats) -> Floats:
    """ψ₁ for positive arguments, to 1e-12."""
    return np.asarray(_trigamma(x), np.float64)


def tetragamma_of(x: Floats) -> Floats:
    """ψ₂ for positive arguments, to 1e-11."""
    return np.asarray(_tetragamma(x), np.float64)


def digamma(x: float) -> float:
    """ψ of a positive number."""
    return _digamma(x, math.log(x + _SHIFT))


def trigamma(x: float) -> float:
    """ψ₁ of a positive number."""
    return _trigamma(x)


def tetragamma(x: float) -> float:
    """ψ₂ of a positive number."""
    return _tetragamma(x)


# The same arithmetic for numbers and for arrays: with numbers alone it takes a fiftieth.


def _digamma(x: Number, log: Number) -> Number:
    y = x + _SHIFT
    r = 1 / (y * y)
    tail = r * (1 / 12 - r * (1 / 120 - r * (1 / 252 - r * (1 / 240 - r / 132))))
    return log - 0.5 / y - tail - sum(1 / (x + k) for k in range(_SHIFT))


def _trigamma(x: Number) -> Number:
    y = x + _SHIFT
    r = 1 / (y * y)
    tail = r * (1 / 6 - r * (1 / 30 - r * (1 / 42 - r * (1 / 30 - r * 5 / 66))))
    return (1 + 0.5 / y + tail) / y + sum(1 / (x + k) ** 2 for k in range(_SHIFT))


def _tetragamma(x: Number) -> Number:
    y = x + _SHIFT
    r = 1 / (y * y)
    tail = r * (1 / 2 - r * (1 / 6 - r * (1 / 6 - r * (3 / 10 - r * 5 / 6))))
    return -r * (1 + 1 / y + tail) - sum(2 / (x + k) ** 3 for k in range(_SHIFT))
