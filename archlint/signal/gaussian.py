"""Expectations of functions of Gaussian variables: quadrature split at kinks, Hermite series.

For z ~ N(0,1): E f(z) by Gauss–Legendre on panels of [−12, 12] that end at the kinks of f, so that
piecewise smooth functions converge like smooth ones (mass outside: 4·10⁻³³). For a pair with
correlation c, Mehler's formula E f(u)f(v) = Σ_k a_k² c^k with a_k = E f(z) He_k(z)/√k!.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Function = Callable[[Floats], Floats]

_EDGE = 12.0
_POINTS = 16  # per panel of length ≤ 1: exact to 1e-14 for functions that are smooth on the panel
HERMITE_TERMS = 40


@lru_cache(maxsize=1)
def _legendre() -> tuple[Floats, Floats]:
    nodes, weights = np.polynomial.legendre.leggauss(_POINTS)
    return nodes, weights


@lru_cache(maxsize=512)
def nodes_and_weights(kinks: tuple[float, ...]) -> tuple[Floats, Floats]:
    """Points z and weights w with E f(z) ≈ Σ w f(z) for f smooth between the kinks."""
    inner = {k for k in kinks if -_EDGE < k < _EDGE}
    edges = np.array(sorted(inner | set(np.arange(-_EDGE, _EDGE + 1.0))))
    x, w = _legendre()
    half = np.diff(edges) / 2
    middle = (edges[1:] + edges[:-1]) / 2
    z = (middle[:, None] + half[:, None] * x).ravel()
    weight = (half[:, None] * w).ravel() * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    return z, weight


def expectation(f: Function, kinks: tuple[float, ...] = ()) -> float:
    """E f(z), z ~ N(0,1); f is smooth between ``kinks``."""
    z, w = nodes_and_weights(kinks)
    return float(np.dot(w, f(z)))


@lru_cache(maxsize=512)
def hermite(kinks: tuple[float, ...]) -> Floats:
    """Rows He_k(z)·w(z)/√k! on the quadrature points, k < HERMITE_TERMS."""
    z, w = nodes_and_weights(kinks)
    return hermite_at(z).T * w


def hermite_at(z: Floats) -> Floats:
    """He_k(z)/√k!, a row a point, k < HERMITE_TERMS."""
    rows = np.empty((HERMITE_TERMS, z.size))
    rows[0] = 1.0
    rows[1] = z
    for k in range(1, HERMITE_TERMS - 1):  # normalised three-term recursion
        rows[k + 1] = (z * rows[k] - math.sqrt(k) * rows[k - 1]) / math.sqrt(k + 1)
    return rows.T


def hermite_coefficients(f: Function, kinks: tuple[float, ...] = ()) -> Floats:
    """a_k = E f(z) He_k(z)/√k! for k < HERMITE_TERMS."""
    z, _ = nodes_and_weights(kinks)
    return hermite(kinks) @ f(z)


def pair_expectation(coefficients: Floats, second_moment: float, correlation: float) -> float:
    """E f(u)f(v) for standard normal u, v with a correlation, from the Hermite coefficients of f.

    What the truncated series leaves of E f² is put at the first order left out, so that the value
    is exact at correlation 1 and in error by at most that remainder times c^HERMITE_TERMS.
    """
    c = min(max(correlation, -1.0), 1.0)
    squares = coefficients * coefficients
    rest = max(second_moment - float(squares.sum()), 0.0)
    return float(np.dot(squares, c ** np.arange(squares.size))) + rest * c**squares.size


def phi(x: float) -> float:
    """The standard normal density."""
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def cdf(x: float) -> float:
    """The standard normal distribution function."""
    return math.erfc(-x / math.sqrt(2)) / 2


_erfc = np.frompyfunc(math.erfc, 1, 1)


def cdf_of(x: Floats) -> Floats:
    """The standard normal distribution function of an array."""
    return np.asarray(_erfc(-x / math.sqrt(2)), np.float64) / 2


@lru_cache(maxsize=4096)
def max_of_correlated(
    count: int, correlation: float, floor: float = -math.inf
) -> tuple[float, float, float]:
    """(E y, E y², E y y′) of y = the maximum of ``count`` standard normals with a common pairwise
    correlation c and of ``floor``; y′ belongs to another window with that same correlation to this
    one. Given the common part √c·u the maxima are independent: z_i = √c·u + √(1−c)·e_i.
    """
    c = min(max(correlation, 0.0), 1.0)
    x, w = nodes_and_weights(())
    density = w * count * cdf_of(x) ** (count - 1)  # of the maximum of independent e_i
    u, v = nodes_and_weights(())
    y = math.sqrt(c) * u[:, None] + math.sqrt(1 - c) * x[None, :]
    if floor > -math.inf:
        y = np.maximum(y, floor)
    given = y @ density
    first = float(np.dot(v, given))
    second = float(np.dot(v, (y * y) @ density))
    return first, second, float(np.dot(v, given * given))


@lru_cache(maxsize=4096)
def overlapping_maxima(count: int, common: float) -> float:
    """The covariance of the maxima of two sets of ``count`` independent standard normals that have
    ``common`` of them in both: given the greatest t of these, each is max(t, the rest)."""
    if common <= 0:
        return 0.0
    x, w = nodes_and_weights(())
    f = cdf_of(x)
    mean = float((w * count * f ** (count - 1)) @ x)
    shared = w * common * f ** (common - 1)
    rest = count - common
    if rest <= 1e-9:
        return float(shared @ (x * x)) - mean * mean
    beyond = w * rest * f ** (rest - 1)
    above = np.cumsum((beyond * x)[::-1])[::-1] - beyond * x
    at = np.concatenate([[0.0], np.cumsum(beyond)[:-1]]) + beyond / 2  # F^rest at the points
    given = x * at + above + beyond * x / 2
    return float(shared @ (given * given)) - mean * mean


@lru_cache(maxsize=4096)
def moments_of_maximum(
    f: Function, count: int, correlation: float, mean: float, variance: float
) -> tuple[float, float]:
    """(E f(y), E f(y)²) of y = the maximum of ``count`` normals of a mean and variance with a
    common pairwise correlation."""
    c = min(max(correlation, 0.0), 1.0)
    x, w = nodes_and_weights(())
    density = w * count * cdf_of(x) ** (count - 1)
    y = math.sqrt(c) * x[:, None] + math.sqrt(1 - c) * x[None, :]
    value = f(mean + math.sqrt(variance) * y)
    return float(w @ (value @ density)), float(w @ ((value * value) @ density))


@lru_cache(maxsize=4096)
def maxima_of_pairs(count: int, correlation: float) -> float:
    """E y y′ of the maxima of ``count`` independent pairs of standard normals with a correlation.

    Cov(y, y′) = ∫∫ [Φ₂(a, b)^n − Φ(a)^n Φ(b)^n] da db (Hoeffding 1940), with Φ₂ from its derivative
    by the correlation sin θ (Drezner 1978).
    """
    first, second, _ = max_of_correlated(count, 0.0)
    top = math.asin(min(max(correlation, -0.999), 0.999))
    step = 0.1
    a = np.arange(-8.0, 8.0, step) + step / 2
    x, w = _legendre()
    angle = top / 2 * (1 + x)
    one, two = a[:, None, None], a[None, :, None]
    inner = np.exp(-(one**2 + two**2 - 2 * one * two * np.sin(angle)) / (2 * np.cos(angle) ** 2))
    apart = np.multiply.outer(cdf_of(a), cdf_of(a))
    joint = np.clip(apart + inner @ (w * top / 2) / (2 * math.pi), 0.0, 1.0)
    covariance = float((joint**count - apart**count).sum()) * step * step
    return min(first * first + covariance, second)
