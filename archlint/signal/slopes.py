"""The derivative of an activation on a Gaussian pre-activation: what the gradient is multiplied by.

Beside E φ′² (signal.activations): E φ′, the pair E φ′(u)φ′(v), the aligned pair
E[ũ φ′(u)·ṽ φ′(v)] with ũ the standardised pre-activation, and E φ′² at the greatest of several
pre-activations, which is where max-pooling sends the gradient.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from archlint.signal.activations import Activation
from archlint.signal.gaussian import (
    Floats,
    cdf_of,
    hermite_coefficients,
    nodes_and_weights,
    pair_expectation,
)


@lru_cache(maxsize=16384)
def _slope_series(phi: Activation, mean: float, deviation: float) -> Floats:
    kinks = phi.standard_kinks(mean, deviation)
    return hermite_coefficients(lambda z: phi.derivative(mean + deviation * z), kinks)


@lru_cache(maxsize=16384)
def _aligned_series(phi: Activation, mean: float, deviation: float) -> tuple[Floats, float]:
    kinks = phi.standard_kinks(mean, deviation)
    z, w = nodes_and_weights(kinks)
    second = float(w @ (z * phi.derivative(mean + deviation * z)) ** 2)
    return hermite_coefficients(lambda t: t * phi.derivative(mean + deviation * t), kinks), second


def slope_mean(phi: Activation, mean: float, variance: float) -> float:
    """E φ′(z), z ~ N(mean, variance)."""
    if variance <= 0:
        return float(phi.derivative(np.array([mean]))[0])
    return float(_slope_series(phi, mean, math.sqrt(variance))[0])


def slope_pair(phi: Activation, mean: float, variance: float, correlation: float) -> float:
    """E φ′(u)φ′(v) for jointly normal u, v with a correlation coefficient."""
    second = phi.moments(mean, variance).slope
    if variance <= 0 or correlation >= 1.0:
        return second
    return pair_expectation(_slope_series(phi, mean, math.sqrt(variance)), second, correlation)


def aligned_pair(phi: Activation, mean: float, variance: float, correlation: float) -> float:
    """E[ũ φ′(u) ṽ φ′(v)], ũ = (u − mean)/√variance."""
    if variance <= 0:
        return 0.0
    series, second = _aligned_series(phi, mean, math.sqrt(variance))
    return second if correlation >= 1.0 else pair_expectation(series, second, correlation)


@lru_cache(maxsize=1024)
def slope_at_greatest(
    phi: Activation, mean: float, variance: float, correlation: float, count: int
) -> float:
    """E φ′² at the greatest of ``count`` normals with a common pairwise correlation."""
    if variance <= 0 or count <= 1:
        return phi.moments(mean, max(variance, 0.0)).slope
    c = min(max(correlation, 0.0), 1.0)
    x, w = nodes_and_weights(())
    u, v = nodes_and_weights(())
    density = w * count * cdf_of(x) ** (count - 1)
    z = mean + math.sqrt(variance) * (
        math.sqrt(c) * u[:, None] + math.sqrt(1 - c) * x[None, :]
    )  # fmt: skip
    return float(v @ (phi.derivative(z) ** 2 @ density))
