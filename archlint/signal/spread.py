"""Spread: how much the squared length and the squared gradient vary from one draw to the next.

β = Var ln M over initializations. A layer of n neurons multiplies M by a random factor whose
variance of the logarithm is about κ/n, κ = E φ⁴/(E φ²)² − 1: 5 for ReLU, 2 for a linear map
(Hanin & Rolnick 2018; Hanin & Nica 2018: ln M ~ N(−β/2, β), β = 5 Σ 1/n). For narrow layers the
law is computed exactly: of n Gaussian pre-activations B ~ Bin(n, ½) are positive, and n·M/2 is a χ²
of B degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from archlint.initialization.distribution import Distribution
from archlint.signal.activations import IDENTITY, Activation, Moments
from archlint.signal.gaussian import hermite_coefficients, nodes_and_weights, pair_expectation

_STEPS = 4000  # of the midpoint rule over θ

Floats = npt.NDArray[np.float64]

_EXACT_BELOW = 512  # neurons up to which the sum over the number of positive ones is written out


@dataclass(frozen=True, slots=True)
class Shares:
    """What one layer adds: Var ln of its factor on the squared length (``forward``) and on the
    squared gradient, the elasticity d ln M_after/d ln M_before that carries on what was, the
    elasticity d ln E φ′²/d ln M_before by which the length moves the gradient, and the covariance
    of the logarithms of the layer's two factors, which come from the same neurons."""

    forward: float
    gradient: float | None
    elasticity: float
    slope_elasticity: float = 0.0
    covariance: float = 0.0


def layer_spread(
    phi: Activation | None,
    q: float,
    mean: float,
    width: int,
    bias_share: float,
    law: Distribution | None,
    fan_in: float,
    correlation: float | None = 1.0,
    positions: int = 1,
    grad_correlation: float | None = 1.0,
) -> Shares | None:
    """The spread that one layer adds; None where that is not known.

    ``phi`` follows the layer (None: nothing does), ``q`` = E z² and ``mean`` = E z of the
    pre-activation, ``bias_share`` of q is the bias's. ``width`` is the number of channels.
    ``correlation`` of the layer's input between positions, over ``positions`` outputs, decides how
    many independent places a convolution averages over (theory: patch angles); of the gradient it
    is ``grad_correlation`` too, that of the gradient which arrives behind φ.
    """
    phi = phi or IDENTITY
    if q <= 0 or width < 1 or correlation is None or (law is not None and not law.random):
        return None
    m = phi.moments(mean, max(q - mean * mean, 0.0))
    if not (m.second_moment > 0 and math.isfinite(m.kappa)):
        return None
    elasticity = 1.0
    if not phi.homogeneous or bias_share:
        elasticity = q * phi.map_slope(q) / phi.map(q) * (1 - min(bias_share, 1.0))
    slope = _negative_slope(phi)
    same = _shared(phi, correlation, positions)
    orthogonal = law is not None and law.family == "orthogonal"
    if slope is not None:
        own = variance_of_log(width, slope)
        if orthogonal:
            own *= _orthogonal_share(m.kappa, width, fan_in)
        alike = _shared_gradient(
            phi, m, mean, q - mean**2, correlation, grad_correlation, positions
        )
        return Shares(own * same, None if alike is None else own * alike, elasticity, 0.0,
                      own * min(same, alike or 0.0))  # fmt: skip
    forward = trigamma(width / max(m.kappa, 1e-9)) if m.kappa > 0 else 0.0
    kappa = m.kappa_gradient
    backward = trigamma(width / kappa) if math.isfinite(kappa) and kappa > 0 else 0.0
    variance = max(q - mean * mean, 0.0)
    moved = slope_elasticity(phi, mean, variance) * (1 - min(bias_share, 1.0))
    common = joint_moment(phi, mean, variance) / width
    limit = math.sqrt(forward * backward)
    alike = _shared_gradient(phi, m, mean, variance, correlation, grad_correlation, positions)
    return Shares(forward * same, None if alike is None else backward * alike, elasticity, moved,
                  min(max(common, -limit), limit) * min(same, alike or 0.0))  # fmt: skip


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


def gradient_spread(layers: Sequence[Shares]) -> float | None:
    """Var ln of the squared gradient over layers in forward order.

    ln g² = Σ_j η_j + Σ_j c_j δ_{j−1}: a layer's own noise η, and c = d ln E φ′²/d ln M times the
    fluctuation of the length that enters it, δ_j = e_j δ_{j−1} + ε_j. What ε_i does to all later
    layers is A_i = c_{i+1} + e_{i+1} A_{i+1}, so that the variance is
    Σ (Var η_i + 2 A_i Cov(ε_i, η_i) + A_i² Var ε_i). Without it a GELU or SiLU stack at its
    critical point is predicted a third too low.
    """
    total = later = 0.0
    for share in reversed(layers):
        if share.gradient is None:
            return None
        total += share.gradient + 2 * later * share.covariance + later**2 * share.forward
        later = share.slope_elasticity + share.elasticity * later
    return max(total, 0.0)


def _negative_slope(phi: Activation) -> float | None:
    """The slope below zero of a piecewise linear φ with slope 1 above; None for another φ."""
    if not phi.homogeneous:
        return None
    above, below = phi.function(np.array([1.0, -1.0]))
    return -float(below) if above == 1.0 and abs(below) <= 1.0 else None


def _orthogonal_share(kappa: float, width: int, fan_in: float) -> float:
    """Orthogonal over independent weights: the factor N/(N+2)·(1 + κ/n) − 1 over κ/n, with N the
    greater side: (3/(n + 2))/(5/n) for a square ReLU layer."""
    n, greater = width, max(width, fan_in)
    return max((greater / (greater + 2) * (1 + kappa / n) - 1) / (kappa / n), 0.0)


def _shared(phi: Activation, correlation: float, positions: int) -> float:
    """V/κ of a convolution: the mean over pairs of positions of [(2/π)J₂(θ) − 1]/5 for ReLU, with
    J₂(θ) = 3 sin θ cos θ + (π − θ)(1 + 2cos²θ) (Cho & Saul 2009) and cos θ the correlation of
    the patches; cos²θ for a linear map."""
    if positions <= 1:
        return 1.0
    c = min(max(correlation, -1.0), 1.0)
    if phi.odd and phi.homogeneous:
        pair = c * c
    else:
        theta = math.acos(c)
        j2 = 3 * math.sin(theta) * c + (math.pi - theta) * (1 + 2 * c * c)
        pair = max((2 / math.pi * j2 - 1) / 5, 0.0)
    return 1 / positions + (1 - 1 / positions) * pair


def _shared_gradient(
    phi: Activation, m: Moments, mean: float, variance: float, correlation: float,
    grad_correlation: float | None, positions: int,
) -> float | None:  # fmt: skip
    """The same of the gradient: the mean over pairs of positions of (1 + 2c²)·μ − 1 over its value
    for one position, with c the gradient's correlation and μ = E φ′²φ′²/(E φ′²)² of the pair. A
    map whose outputs are read independently has c = 0: the masks alone are shared."""
    if positions <= 1:
        return 1.0
    kappa = m.kappa_gradient
    if grad_correlation is None or not math.isfinite(kappa) or kappa <= 0 or m.slope <= 0:
        return None
    c = min(max(grad_correlation, -1.0), 1.0)
    if variance <= 0:
        pair = 1.0
    else:
        deviation = math.sqrt(variance)
        series = hermite_coefficients(
            lambda z: phi.derivative(mean + deviation * z) ** 2,
            phi.standard_kinks(mean, deviation),
        )
        pair = pair_expectation(series, m.slope_fourth, correlation) / m.slope**2
    shared = max(((1 + 2 * c * c) * pair - 1) / kappa, 0.0)
    return 1 / positions + (1 - 1 / positions) * min(shared, 1.0)


@lru_cache(maxsize=4096)
def variance_of_log(width: int, slope: float = 0.0) -> float:
    """Var ln of (1/n)Σφ(z_i)², z_i ~ N(0, 1) independent, φ with a slope below zero; given that
    not all are zero.

    Given B positive ones the sum is χ²_B + s²χ²_{n−B}. For s = 0 the total variance is
    E ψ₁(B/2) + Var ψ(B/2); else the sum is χ²_n·(s² + (1 − s²)u) with u ~ Beta(B/2, (n − B)/2)
    independent of χ²_n, so that it is ψ₁(n/2) + Var ln(s² + (1 − s²)u). Both are exact.
    """
    s2 = slope * slope
    if s2 == 1.0:
        return trigamma(width / 2)
    if width > _EXACT_BELOW:  # the expansion's next term is below a hundredth of this
        kappa = 6 * (1 + s2 * s2) / (1 + s2) ** 2 - 1
        return kappa / width * (1 + 3.7 * kappa / 5 / width)
    b = np.arange(width + 1, dtype=np.float64)
    choose = np.array([math.lgamma(width + 1) - math.lgamma(k + 1) - math.lgamma(width - k + 1)
                       for k in b])  # fmt: skip
    weight = np.exp(choose - width * math.log(2))
    if s2 == 0.0:
        weight = weight[1:] / weight[1:].sum()
        expected, inner = digamma_of(b[1:] / 2), trigamma_of(b[1:] / 2)
    else:
        expected, inner = _logs_of_mixtures(width, s2)
        inner = inner + trigamma(width / 2)
    centre = float(weight @ expected)
    return float(weight @ inner) + float(weight @ (expected - centre) ** 2)


def _logs_of_mixtures(width: int, s2: float) -> tuple[Floats, Floats]:
    """Mean and variance of ln(s² + (1 − s²)u), u ~ Beta(B/2, (n − B)/2), for B = 0 … n.

    With u = sin²θ the density is sin^(B−1)θ·cos^(n−B−1)θ, without a singularity."""
    theta = (np.arange(_STEPS) + 0.5) * (math.pi / 2 / _STEPS)
    value = np.log(s2 + (1 - s2) * np.sin(theta) ** 2)
    b = np.arange(1, width)[:, None]
    log_density = (b - 1) * np.log(np.sin(theta)) + (width - b - 1) * np.log(np.cos(theta))
    density = np.exp(log_density - log_density.max(axis=1, keepdims=True))
    density /= density.sum(axis=1, keepdims=True)
    mean = density @ value
    variance = density @ value**2 - mean**2
    return (np.concatenate([[math.log(s2)], mean, [0.0]]),
            np.concatenate([[0.0], np.maximum(variance, 0.0), [0.0]]))  # fmt: skip


def median_loss(beta: float) -> float:
    """How many decades of squared length a typical draw loses against the mean: β/2 in ln."""
    return beta / 2 / math.log(10)


def chance_of_loss(beta: float, factor: float = 10.0) -> float:
    """P(M < E M/factor) for ln M ~ N(−β/2, β)."""
    if beta <= 0:
        return 0.0
    return math.erfc((math.log(factor) - beta / 2) / math.sqrt(2 * beta)) / 2


def dead_probability(widths: tuple[int, ...]) -> float:
    """P(some ReLU layer without bias is off as a whole) = 1 − Π(1 − 2^−n)."""
    alive = 1.0
    for n in widths:
        alive *= 1 - 2.0 ** -min(n, 1000)
    return 1 - alive


# --------------------------------------------------------------------------- ψ and ψ₁

_SHIFT = 8  # arguments are raised past this by ψ(x) = ψ(x + 1) − 1/x before the expansion


def digamma_of(x: Floats) -> Floats:
    """ψ for positive arguments, to 1e-12."""
    low = sum((1 / (x + k) for k in range(_SHIFT)), np.zeros_like(x))
    y = x + _SHIFT
    r = 1 / (y * y)
    return np.asarray(
        np.log(y) - 0.5 / y - r * (1 / 12 - r * (1 / 120 - r * (1 / 252 - r * (1 / 240 - r / 132))))
        - low, np.float64)  # fmt: skip


def trigamma_of(x: Floats) -> Floats:
    """ψ₁ for positive arguments, to 1e-12."""
    low = sum((1 / (x + k) ** 2 for k in range(_SHIFT)), np.zeros_like(x))
    y = x + _SHIFT
    r = 1 / (y * y)
    return np.asarray(
        (1 + 0.5 / y + r * (1 / 6 - r * (1 / 30 - r * (1 / 42 - r * (1 / 30 - r * 5 / 66))))) / y
        + low, np.float64)  # fmt: skip


def trigamma(x: float) -> float:
    """ψ₁ of a positive number."""
    return float(trigamma_of(np.array([x]))[0])
