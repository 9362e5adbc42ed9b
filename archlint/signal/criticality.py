"""The initialization that keeps signals and gradients in scale through many layers of one
activation: where χ₁ = σ_w² E φ′² is one and the length has a stable fixed point.

Poole et al. 2016, Schoenholz et al. 2017; for homogeneous activations He et al. 2015.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from archlint.signal.activations import Activation

_TOLERANCE = 0.12  # |χ₁ − 1| up to which a stable fixed point counts as critical (SELU: 0.072)
_SMALL = 1e-6


@dataclass(frozen=True, slots=True)
class Critical:
    """σ_w² = fan-in·Var w and σ_b² = Var b. ``stable``: whether the length comes back to its fixed
    point after a disturbance; where it does not, no choice holds for many layers."""

    weight_gain: float
    bias_variance: float
    stable: bool


@lru_cache(maxsize=256)
def critical(phi: Activation) -> Critical | None:
    """The critical initialization of an activation; None where scale alone cannot reach it
    (sigmoid, softplus: χ₁ stays far below one wherever the length is stable).
    """
    if phi.homogeneous:
        return Critical(1 / phi.map(1.0), 0.0, True)
    at_one = phi.map(1.0)
    gain = 1 / at_one
    chi = gain * phi.moments(0.0, 1.0).slope
    if gain * phi.map_slope(1.0) < 1 and abs(chi - 1) <= _TOLERANCE:
        return Critical(gain, 0.0, True)
    origin = phi.moments(0.0, _SMALL)
    if origin.slope > 0 and abs(origin.second_moment / _SMALL / origin.slope - 1) < 1e-2:
        start = 1 / origin.slope  # V(q) = q φ′(0)² near zero
        if all(start * phi.map(q) <= q * (1 + 1e-2) for q in (0.01, 0.1, 1.0, 4.0)):
            return Critical(start, 0.0, True)  # tanh and its like: q → 0 only as 1/depth
    return _with_biases(phi)


def _with_biases(phi: Activation) -> Critical | None:
    """The point where χ₁ = χ_∥ = 1: σ_w² = 1/E φ′², V′(q) = E φ′², σ_b² = q − σ_w² V(q) > 0.

    For GELU (1.983, 0.173), for SiLU (1.988, 0.555) (Roberts, Yaida & Hanin 2022).
    """

    def excess(q: float) -> float:
        return phi.map_slope(q) / phi.moments(0.0, q).slope - 1

    low = 0.05
    while low < 1e3:
        high = low * 1.3
        if excess(low) > 0 >= excess(high):
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (middle, high) if excess(middle) > 0 else (low, middle)
            gain = 1 / phi.moments(0.0, low).slope
            bias = low - gain * phi.map(low)
            return Critical(gain, bias, False) if bias > 0 else None
        low = high
    return None
