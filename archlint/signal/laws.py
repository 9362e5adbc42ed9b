"""The law of an element that is not normal, and what functions of such elements have in common.

x = m + σ·h(z) with z ~ N(0,1) and h of mean 0 and variance 1: after ReLU h is the rectifier itself,
and of a sum of independent terms the quantile function of their convolution. A residual stream that
is rectified after each addition is a reflected walk, far from normal. Two elements of such a tensor
are taken to be h of two normals with the correlation that gives theirs (a Gaussian copula): by
Mehler's formula E h(z)h(z′) = Σ h_k² ρ^k, which is solved for ρ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from archlint.signal.gaussian import Floats, cdf_of, hermite_at

_EDGE, _PANEL, _POINTS = 6.0, 0.5, 3  # quadrature on [−6, 6]; kinks inside cost 1e-3
_TERMS = 24  # of Hermite series
_FAINT = 0.02  # the share of a sum's variance below which a term's law does not matter
_DEEPEST = 8  # sums of sums that are kept to be worked out when they are asked for
_NORMAL = 0.03  # the rms of h(z) − z up to which a law is as good as normal


def _nodes() -> tuple[Floats, Floats]:
    x, w = np.polynomial.legendre.leggauss(_POINTS)
    left = np.arange(-_EDGE, _EDGE, _PANEL)[:, None]
    z = (left + _PANEL / 2 * (x + 1)).ravel()
    weight = np.tile(w * _PANEL / 2, left.size) * np.exp(-z * z / 2)
    return z, weight / weight.sum()


NODES, WEIGHTS = _nodes()
_PLACES = cdf_of(NODES)
_GRID = np.linspace(-1.0, 1.0, 201)
_POWERS = _GRID[:, None] ** np.arange(_TERMS + 1)


_HERMITE = hermite_at(NODES)[:, :_TERMS].T * WEIGHTS


class Series:
    """E f(z)f(z′) by the correlation of z and z′, for an f given at the NODES."""

    __slots__ = ("second", "squares")

    def __init__(self, f: Floats) -> None:
        squares = (_HERMITE @ f) ** 2
        self.second = float(WEIGHTS @ (f * f))
        self.squares = np.append(squares, max(self.second - float(squares.sum()), 0.0))

    def at(self, rho: float) -> float:
        """E f(z)f(z′) for that correlation."""
        return float(self.squares @ rho ** np.arange(_TERMS + 1))


class Law:
    """The law of (x − E x)/σ: ``values`` are h at the NODES, worked out when they are asked for."""

    __slots__ = ("_copula", "_make", "_values", "depth")

    def __init__(self, make: Callable[[], Floats], depth: int = 0) -> None:
        self._make: Callable[[], Floats] | None = make
        self._values: Floats | None = None
        self._copula: Floats | None = None
        self.depth = depth

    @property
    def values(self) -> Floats:
        """h at the NODES, of mean 0 and variance 1."""
        if self._values is None:
            assert self._make is not None
            self._values, self._make = standard(self._make()), None
        return self._values

    def normal_correlation(self, correlation: float) -> float:
        """The correlation ρ of the normals whose h have that correlation coefficient."""
        if self._copula is None:
            series = Series(self.values)
            series.squares[0] = 0.0
            self._copula = _POWERS @ series.squares / max(series.second, 1e-300)
        if correlation >= 0:
            half = slice(_GRID.size // 2, None)
            return float(np.interp(correlation, self._copula[half], _GRID[half]))
        lower = self._copula[: _GRID.size // 2 + 1]  # of a skewed law not below some −c
        return float(np.interp(correlation, np.maximum.accumulate(lower), _GRID[: lower.size]))


def standard(values: Floats) -> Floats:
    """Of mean 0 and variance 1; zeros where it does not vary."""
    centred = values - float(WEIGHTS @ values)
    size = math.sqrt(float(WEIGHTS @ (centred * centred)))
    return centred / size if size > 1e-12 else np.zeros_like(centred)


def mirrored(law: Law | None) -> Law | None:
    """Of −x."""
    return None if law is None else Law(lambda: -law.values[::-1], law.depth)


def law_of_sum(terms: Sequence[tuple[Law | None, float]]) -> Law | None:
    """Of a sum of independent terms with those variances; None where it is as good as normal."""
    total = sum(variance for _, variance in terms)
    odd = [(law, v) for law, v in terms if law is not None and v > _FAINT * total]
    if not odd or not math.isfinite(total):
        return None
    if len(odd) == 1 and odd[0][1] >= total * (1 - 1e-12):
        return odd[0][0]
    rest = total - sum(v for _, v in odd)

    def made() -> Floats:
        found = np.zeros(1), np.ones(1)
        for values, variance in (*((law.values, v) for law, v in odd), (NODES, rest)):
            if variance > 0:
                found = _convolved(found, math.sqrt(variance) * values)
        return found[0]

    found = Law(made, max(law.depth for law, _ in odd) + 1)
    if found.depth > _DEEPEST:
        off = found.values - NODES
        found.depth = 0
        if float(WEIGHTS @ (off * off)) < _NORMAL**2:
            return None
    return found


def _convolved(a: tuple[Floats, Floats], b: Floats) -> tuple[Floats, Floats]:
    """The quantile function at the NODES of x + y, x at places with weights, y at the NODES."""
    places, index = np.unique(a[0], return_inverse=True)
    weights = np.bincount(index.ravel(), a[1])
    total = (places[:, None] + b[None, :]).ravel()
    order = np.argsort(total)
    weight = (weights[:, None] * WEIGHTS[None, :]).ravel()[order]
    below = np.cumsum(weight) - weight / 2
    return np.interp(_PLACES, below, total[order]), WEIGHTS


def expected(f: Floats, places: Floats, at: Floats, beside: Floats) -> Floats:
    """E f(x + y) for every x of ``at``, with y at the NODES ``beside``, of an f that is known at
    ascending ``places``."""
    found = np.interp((at[:, None] + beside[None, :]).ravel(), places, f)
    return np.asarray(found.reshape(at.size, beside.size) @ WEIGHTS, np.float64)
