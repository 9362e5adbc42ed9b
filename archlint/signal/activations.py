"""Activations as functions of a Gaussian pre-activation: every moment the analysis needs.

V(q) = E φ(√q Z)² is the mean-field map of Poole et al. 2016; χ = σ_w² E φ′² decides the growth of
gradients (Schoenholz et al. 2017). κ_φ = E φ⁴/(E φ²)² − 1 is the relative variance that one neuron
adds to the length (Hanin & Rolnick 2018 for ReLU, where it is 5). Closed forms stand where the
literature has them and are checked against quadrature; everything else is quadrature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from archlint.graph.ops import OPS, attribute
from archlint.signal.gaussian import (
    HERMITE_TERMS,
    Floats,
    Function,
    cdf_of,
    hermite_coefficients,
    nodes_and_weights,
    pair_expectation,
)


@dataclass(frozen=True, slots=True)
class Moments:
    """Of φ(z), z ~ N(μ, σ²): E φ, E φ², E φ⁴, E φ′², E φ′⁴."""

    mean: float
    second_moment: float
    fourth_moment: float
    slope: float
    slope_fourth: float

    @property
    def kappa(self) -> float:
        """κ_φ = E φ⁴/(E φ²)² − 1, nan where φ is zero."""
        return _ratio(self.fourth_moment, self.second_moment) - 1

    @property
    def kappa_gradient(self) -> float:
        """3 E φ′⁴/(E φ′²)² − 1: the relative variance a layer adds to the squared gradient."""
        return 3 * _ratio(self.slope_fourth, self.slope) - 1


def _ratio(fourth: float, second: float) -> float:
    return fourth / second / second if second > 1e-150 else math.nan


@dataclass(frozen=True)
class Activation:
    """An elementwise nonlinearity.

    ``function`` and ``derivative`` act on arrays; both are smooth between ``kinks``. ``one_sided``:
    +1 where φ is never negative, −1 where never positive, else 0. ``homogeneous``: φ(ax) = aφ(x)
    for a > 0. ``saturating``: bounded on both sides.
    """

    name: str
    function: Function
    derivative: Function
    kinks: tuple[float, ...] = ()
    one_sided: int = 0
    homogeneous: bool = False
    saturating: bool = False
    odd: bool = False

    def moments(self, mean: float, variance: float) -> Moments:
        """The moments of φ(z) for z ~ N(mean, variance)."""
        return _moments(self, float(mean), max(float(variance), 0.0))

    def map(self, q: float) -> float:
        """V(q) = E φ(√q Z)²."""
        return self.moments(0.0, q).second_moment

    def map_slope(self, q: float) -> float:
        """V′(q) = (E φ′² + E φ φ″)/1, by a central difference of V in ln q."""
        if q <= 0:
            return self.moments(0.0, 1e-12).slope
        h = 1e-3
        return (self.map(q * math.exp(h)) - self.map(q * math.exp(-h))) / (2 * h * q)

    def pair(self, mean: float, variance: float, covariance: float) -> float:
        """E φ(u)φ(v) for jointly normal u, v of equal mean and variance."""
        if variance <= 0:
            return self.moments(mean, 0.0).second_moment
        coefficients = _hermite(self, float(mean), float(variance))
        second = self.moments(mean, variance).second_moment
        return pair_expectation(coefficients, second, covariance / variance)

    def coefficients(self, mean: float, variance: float) -> Floats:
        """E φ(z) He_k(Z)/√k! of z = mean + σ·Z, for k < HERMITE_TERMS (signal.gaussian)."""
        if variance <= 0:
            only = np.zeros(HERMITE_TERMS)
            only[0] = self.moments(mean, 0.0).mean
            return only
        return _hermite(self, float(mean), float(variance))

    def standard_kinks(self, mean: float, deviation: float) -> tuple[float, ...]:
        """The kinks in units of the standard normal that z = mean + deviation·Z is made of."""
        return tuple(round((kink - mean) / deviation, 12) for kink in self.kinks)


@lru_cache(maxsize=1024)
def composed(outer: Activation, inner: Activation) -> Activation:
    """x ↦ outer(inner(x))."""
    f, g = outer.function, inner.function
    return Activation(
        f"{outer.name} of {inner.name}", lambda x: f(g(x)),
        lambda x: outer.derivative(g(x)) * inner.derivative(x),
        inner.kinks, outer.one_sided, outer.homogeneous and inner.homogeneous,
        outer.saturating or inner.saturating, outer.odd and inner.odd,
    )  # fmt: skip


@lru_cache(maxsize=65536)
def _moments(activation: Activation, mean: float, variance: float) -> Moments:
    deviation = math.sqrt(variance)
    if deviation == 0.0 or not math.isfinite(deviation) or deviation > 1e150:
        point = np.array([mean])
        value = float(activation.function(point)[0])
        slope = float(activation.derivative(point)[0]) ** 2
        if deviation == 0.0:
            return Moments(value, value**2, value**4, slope, slope**2)
        return Moments(math.nan, math.nan, math.nan, math.nan, math.nan)
    z, w = nodes_and_weights(activation.standard_kinks(mean, deviation))
    x = mean + deviation * z
    with np.errstate(over="ignore", under="ignore"):
        f = activation.function(x)
        d = activation.derivative(x)
        f2, d2 = f * f, d * d
        return Moments(float(w @ f), float(w @ f2), float(w @ (f2 * f2)), float(w @ d2),
                       float(w @ (d2 * d2)))  # fmt: skip


@lru_cache(maxsize=65536)
def _hermite(activation: Activation, mean: float, variance: float) -> Floats:
    deviation = math.sqrt(variance)
    kinks = activation.standard_kinks(mean, deviation)
    return hermite_coefficients(lambda z: activation.function(mean + deviation * z), kinks)


# --------------------------------------------------------------------------- the functions


def _sigmoid(x: Floats) -> Floats:
    return 0.5 * (1 + np.tanh(x / 2))


def _sech2(x: Floats) -> Floats:
    t = np.tanh(x)
    return 1 - t * t


def _softplus(x: Floats) -> Floats:
    return np.logaddexp(0.0, x)


def _density(x: Floats) -> Floats:
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _step(x: Floats) -> Floats:
    return (x > 0).astype(np.float64)


def _relu(x: Floats) -> Floats:
    return np.maximum(x, 0.0)


def _hardswish(x: Floats) -> Floats:
    return np.asarray(x * np.clip(x + 3, 0, 6) / 6)


def _hardswish_slope(x: Floats) -> Floats:
    return np.asarray(np.where(x < -3, 0.0, np.where(x > 3, 1.0, (2 * x + 3) / 6)))


def _leaky(slope: float) -> tuple[Function, Function]:
    return (lambda x: np.where(x > 0, x, slope * x),
            lambda x: np.where(x > 0, 1.0, slope))  # fmt: skip


def _exponential(alpha: float, scale: float, width: float = 1.0) -> tuple[Function, Function]:
    """scale·x above zero, scale·alpha·(e^{x/width} − 1) below (ELU, SELU, CELU)."""
    return (
        lambda x: scale * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0) / width)),
        lambda x: scale * np.where(x > 0, 1.0, alpha / width * np.exp(np.minimum(x, 0) / width)),
    )


def _gelu(approximate: str) -> tuple[Function, Function]:
    if approximate == "sigmoid":
        a = 1.702

        def slope(x: Floats) -> Floats:
            s = _sigmoid(a * x)
            return s + a * x * s * (1 - s)

        return lambda x: x * _sigmoid(a * x), slope
    if approximate == "tanh":
        c = math.sqrt(2 / math.pi)

        def inner(x: Floats) -> Floats:
            return c * (x + 0.044715 * x**3)

        return (
            lambda x: 0.5 * x * (1 + np.tanh(inner(x))),
            lambda x: (
                0.5 * (1 + np.tanh(inner(x)))
                + 0.5 * x * _sech2(inner(x)) * c * (1 + 3 * 0.044715 * x**2)
            ),
        )
    return lambda x: x * cdf_of(x), lambda x: cdf_of(x) + x * _density(x)


def _silu_slope(x: Floats) -> Floats:
    s = _sigmoid(x)
    return s * (1 + x * (1 - s))


def _mish(x: Floats) -> Floats:
    return np.asarray(x * np.tanh(_softplus(x)))


def _mish_slope(x: Floats) -> Floats:
    t = np.tanh(_softplus(x))
    return np.asarray(t + x * (1 - t * t) * _sigmoid(x))


def _clipped(low: float, high: float) -> tuple[Function, Function]:
    return (lambda x: np.clip(x, low, high),
            lambda x: ((x > low) & (x < high)).astype(np.float64))  # fmt: skip


_Attributes = Mapping[str, object]
_MAKERS: dict[str, Callable[[Callable[[str], float], _Attributes], Activation]] = {}


def _simple(
    name: str, function: Function, derivative: Function, *kinks: float, **flags: Any
) -> None:
    made = Activation(name, function, derivative, kinks, **flags)
    _MAKERS[name] = lambda get, attributes: made


_simple("relu", _relu, _step, 0.0, one_sided=1, homogeneous=True)
_simple("sigmoid", _sigmoid, lambda x: _sigmoid(x) * (1 - _sigmoid(x)), one_sided=1,
        saturating=True)  # fmt: skip
_simple("tanh", np.tanh, _sech2, saturating=True, odd=True)
_simple("silu", lambda x: x * _sigmoid(x), _silu_slope)
_simple("mish", _mish, _mish_slope)
_simple("softsign", lambda x: x / (1 + np.abs(x)), lambda x: 1 / (1 + np.abs(x)) ** 2, 0.0,
        saturating=True, odd=True)  # fmt: skip
_simple("erf", lambda x: 2 * cdf_of(x * math.sqrt(2)) - 1,
        lambda x: 2 / math.sqrt(math.pi) * np.exp(-x * x), saturating=True, odd=True)  # fmt: skip
_simple("sin", np.sin, np.cos, odd=True)
_simple("cos", np.cos, lambda x: -np.sin(x))
_simple("hardswish", _hardswish, _hardswish_slope, -3.0, 3.0)
_simple("relu6", *_clipped(0.0, 6.0), 0.0, 6.0, one_sided=1, saturating=True)
_simple("tanhshrink", lambda x: x - np.tanh(x), lambda x: np.tanh(x) ** 2, odd=True)
_simple("logsigmoid", lambda x: -_softplus(-x), lambda x: _sigmoid(-x), one_sided=-1)
# Arithmetic that acts on one Gaussian tensor as an activation does.
_simple("abs", np.abs, np.sign, 0.0, one_sided=1, homogeneous=True)
_simple("square", lambda x: x * x, lambda x: 2 * x, one_sided=1)
_simple("exp", lambda x: np.exp(np.minimum(x, 300)), lambda x: np.exp(np.minimum(x, 300)),
        one_sided=1)  # fmt: skip
_simple("expm1", lambda x: np.expm1(np.minimum(x, 300)), lambda x: np.exp(np.minimum(x, 300)))
_simple("atan", np.arctan, lambda x: 1 / (1 + x * x), saturating=True, odd=True)
_simple("sinh", lambda x: np.sinh(np.clip(x, -300, 300)),
        lambda x: np.cosh(np.clip(x, -300, 300)), odd=True)  # fmt: skip
_simple("asinh", np.arcsinh, lambda x: 1 / np.sqrt(1 + x * x), odd=True)
_simple("sign", np.sign, lambda x: 0 * x, 0.0, saturating=True, odd=True)


def _maker(name: str) -> Callable[
    [Callable[[Callable[[str], float], _Attributes], Activation]],
    Callable[[Callable[[str], float], _Attributes], Activation],
]:  # fmt: skip
    def register(
        make: Callable[[Callable[[str], float], _Attributes], Activation],
    ) -> Callable[[Callable[[str], float], _Attributes], Activation]:
        _MAKERS[name] = make
        return make

    return register


@_maker("leaky_relu")
def _make_leaky(get: Callable[[str], float], attributes: _Attributes) -> Activation:
    return leaky_relu(get("slope"))


@lru_cache(maxsize=256)
def leaky_relu(slope: float) -> Activation:
    """Leaky ReLU, PReLU: slope below zero."""
    side = 1 if slope == 0 else 0
    return Activation("leaky_relu", *_leaky(slope), (0.0,), side, True, odd=slope == 1)


@_maker("rrelu")
def _make_rrelu(get: Callable[[str], float], attributes: _Attributes) -> Activation:
    return leaky_relu((get("lower") + get("upper")) / 2)


@_maker("elu")
def _make_elu(get: Callable[[str], float], attributes: _Attributes) -> Activation:
    return Activation("elu", *_exponential(get("alpha"), 1.0), (0.0,))


@_maker("selu")
def _make_selu(get: Callable[[str], float], attributes: _Attributes) -> Activation:
    return Activation("selu", *_exponential(get("alpha"), get("scale")), (0.0,))


@_maker("celu")
def _make_celu(get: Callable[[str], float], attributes: _Attributes) -> Activation:
    alpha = get("alpha")
    return Activation("celu", *_exponential(alpha, 1.0, alpha), (0.0,))


@_maker("gelu")
def _make_gelu(get: Callable[[str], float], attributes: _Attributes) -> Activation:
    return Activation("gelu", *_gelu(str(attribute("gelu", attributes, "approximate"))))


@_maker("softplus")
def _make_softplus(get: Callable[[str], float], attributes: _Attributes) -> Activation:
    beta = get("beta")
    return Activation("softplus", lambda x: _softplus(beta * x) / beta,
                      lambda x: _sigmoid(beta * x), (), 1)  # fmt: skip


@_maker("hardsigmoid")
def _make_hardsigmoid(get: Callable[[str], float], attributes: _Attributes) -> Activation:
    a, b = get("alpha"), get("beta")
    return Activation("hardsigmoid", lambda x: np.clip(a * x + b, 0, 1),
                      lambda x: np.where((a * x + b > 0) & (a * x + b < 1), a, 0.0),
                      (-b / a, (1 - b) / a), 1, saturating=True)  # fmt: skip


@_maker("hardtanh")
def _make_hardtanh(get: Callable[[str], float], attributes: _Attributes) -> Activation:
    low, high = get("minimum"), get("maximum")
    kinks = tuple(k for k in (low, high) if math.isfinite(k))
    side = 1 if low >= 0 else -1 if high <= 0 else 0
    relu_like = (low, high) in ((0.0, math.inf), (-math.inf, 0.0))
    return Activation("hardtanh", *_clipped(low, high), kinks, side, relu_like,
                      saturating=len(kinks) == 2, odd=low == -high)  # fmt: skip


@_maker("threshold")
def _make_threshold(get: Callable[[str], float], attributes: _Attributes) -> Activation:
    t, value = get("threshold"), get("value")
    return Activation("threshold", lambda x: np.where(x > t, x, value),
                      lambda x: (x > t).astype(np.float64), (t,),
                      int(t >= 0 and value >= 0), t == value == 0)  # fmt: skip


@_maker("hardshrink")
def _make_hardshrink(get: Callable[[str], float], attributes: _Attributes) -> Activation:
    t = get("lambd")
    return Activation("hardshrink", lambda x: np.where(np.abs(x) > t, x, 0.0),
                      lambda x: (np.abs(x) > t).astype(np.float64), (-t, t), odd=True)  # fmt: skip


@_maker("softshrink")
def _make_softshrink(get: Callable[[str], float], attributes: _Attributes) -> Activation:
    t, b = get("lambd"), get("bias")
    b = b if b else t  # torch subtracts the threshold itself; ONNX has a bias of its own
    return Activation("softshrink", lambda x: np.where(np.abs(x) > t, x - np.sign(x) * b, 0.0),
                      lambda x: (np.abs(x) > t).astype(np.float64), (-t, t), odd=True)  # fmt: skip


IDENTITY = Activation(
    "identity", lambda x: x, lambda x: np.ones_like(x), homogeneous=True, odd=True
)


@lru_cache(maxsize=1024)
def _cached(op: str, attributes: tuple[tuple[str, object], ...]) -> Activation | None:
    given = dict(attributes)

    def get(name: str) -> float:
        value = attribute(op, given, name)
        assert isinstance(value, int | float)
        return float(value)

    make = _MAKERS.get(op)
    return make(get, given) if make is not None else None


def activation(op: str, attributes: Mapping[str, object]) -> Activation | None:
    """The activation that a node is, or None where the op is none (or mixes features, as GLU)."""
    if op not in _MAKERS:
        return None
    names = OPS[op].attributes
    return _cached(op, tuple((n, attributes[n]) for n in names if n in attributes))
