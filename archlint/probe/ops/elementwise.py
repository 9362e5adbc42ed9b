"""Elementwise ops: arithmetic, activations, comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archlint.probe.ops.frame import Call, computes


def _plain(op: str, function: Callable[..., Any]) -> None:
    """Register torch's function of the same inputs."""
    computes(op)(lambda c, *inputs: function(*inputs))


for _op, _function in {
    "relu": torch.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh, "silu": F.silu,
    "mish": F.mish, "softsign": F.softsign, "erf": torch.erf, "sin": torch.sin, "cos": torch.cos,
    "hardswish": F.hardswish, "relu6": F.relu6, "tanhshrink": F.tanhshrink,
    "logsigmoid": F.logsigmoid,
    "maximum": torch.maximum, "minimum": torch.minimum,
    "atan2": torch.atan2, "abs": torch.abs, "exp": torch.exp, "log": torch.log,
    "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal,
    "square": torch.square, "expm1": torch.expm1, "log1p": torch.log1p, "floor": torch.floor,
    "ceil": torch.ceil, "round": torch.round, "sign": torch.sign, "tan": torch.tan,
    "asin": torch.asin, "acos": torch.acos, "atan": torch.atan, "sinh": torch.sinh,
    "cosh": torch.cosh, "asinh": torch.asinh, "acosh": torch.acosh, "atanh": torch.atanh,
    "trunc": torch.trunc, "where": torch.where,
    "equal": torch.eq, "less": torch.lt, "less_equal": torch.le, "greater": torch.gt,
    "greater_equal": torch.ge, "not_equal": torch.ne, "logical_and": torch.logical_and,
    "logical_or": torch.logical_or, "logical_xor": torch.logical_xor,
    "bitwise_and": torch.bitwise_and, "bitwise_or": torch.bitwise_or,
    "bitwise_xor": torch.bitwise_xor, "logical_not": torch.logical_not,
    "isnan": torch.isnan, "isfinite": torch.isfinite,
}.items():  # fmt: skip
    _plain(_op, _function)  # type: ignore[arg-type]


def _real(c: Call, x: Tensor) -> Tensor:
    """An integer as a real number where the result is one: 8 bits do not overflow."""
    real = c.dtype is not None and c.dtype.is_floating_point
    return x.to(c.dtype) if real and not x.is_floating_point() and not x.is_complex() else x


@computes("add")
def add(c: Call, a: Tensor, b: Tensor) -> Tensor:
    """a + b."""
    return _real(c, a) + _real(c, b)


@computes("sub")
def sub(c: Call, a: Tensor, b: Tensor) -> Tensor:
    """a − b."""
    return _real(c, a) - _real(c, b)


@computes("mul")
def mul(c: Call, a: Tensor, b: Tensor) -> Tensor:
    """a·b."""
    return _real(c, a) * _real(c, b)


@computes("neg")
def neg(c: Call, x: Tensor) -> Tensor:
    """−x."""
    return -x


_UNSIGNED = {"uint16": 0xFFFF, "uint32": 0xFFFFFFFF}  # held in a wider signed type


@computes("bitwise_not")
def bitwise_not(c: Call, x: Tensor) -> Tensor:
    """All bits the other way."""
    bits = _UNSIGNED.get(c.values[0].dtype or "")
    return ~x if bits is None else ~x & bits


@computes("div")
def div(c: Call, a: Tensor, b: Tensor) -> Tensor:
    """a/b; integers are divided towards zero where the result is one."""
    if c.dtype is not None and not c.dtype.is_floating_point and not c.dtype.is_complex:
        return torch.div(a, b, rounding_mode="trunc")
    return a / b


@computes("floor_divide")
def floor_divide(c: Call, a: Tensor, b: Tensor) -> Tensor:
    """⌊a/b⌋."""
    return torch.div(a, b, rounding_mode="floor")


@computes("remainder")
def remainder(c: Call, a: Tensor, b: Tensor) -> Tensor:
    """a − b·⌊a/b⌋, of the sign of b; truncated: of the sign of a."""
    return torch.fmod(a, b) if c["truncated"] else torch.remainder(a, b)


@computes("pow")
def power(c: Call, a: Tensor, b: Tensor) -> Tensor:
    """aᵇ; a real exponent makes an integer base real."""
    if b.is_floating_point() and not a.is_floating_point():
        a = a.to(b.dtype)
    return torch.pow(a, b)


@computes("isinf")
def isinf(c: Call, x: Tensor) -> Tensor:
    """Which elements are infinite, of the wanted signs."""
    found = torch.isinf(x)
    if not c["positive"]:
        found = found & (x < 0)
    return found if c["negative"] else found & (x > 0)


@computes("clip")
def clip(
    c: Call, x: Tensor, minimum: Tensor | None = None, maximum: Tensor | None = None
) -> Tensor:
    """x between bounds; where they cross, the upper one."""
    if minimum is not None:
        x = torch.maximum(x, minimum.to(x.dtype))
    return x if maximum is None else torch.minimum(x, maximum.to(x.dtype))


@computes("masked_fill")
def masked_fill(c: Call, x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    """The value where the mask is true."""
    return torch.where(mask, value.to(x.dtype), x)


# --------------------------------------------------------------------------- activations


@computes("leaky_relu")
def leaky_relu(c: Call, x: Tensor) -> Tensor:
    """x above zero, slope·x below."""
    return F.leaky_relu(x, c["slope"])


@computes("prelu")
def prelu(c: Call, x: Tensor, slope: Tensor) -> Tensor:
    """Leaky ReLU with learned slopes: one, one a channel (axis 1), or of any shape that fits x."""
    if slope.ndim == 1 and slope.shape[0] > 1 and x.ndim > 2 and slope.shape[0] == x.shape[1]:
        slope = slope.reshape(-1, *(1,) * (x.ndim - 2))
    return torch.where(x >= 0, x, slope * x)


@computes("rrelu")
def rrelu(c: Call, x: Tensor) -> Tensor:
    """A slope drawn for every element in training, their mean otherwise."""
    low, high = c["lower"], c["upper"]
    slope: Any = (low + high) / 2
    if c.mode == "train":
        slope = low + (high - low) * torch.rand_like(x)
    return torch.where(x >= 0, x, slope * x)


@computes("elu")
def elu(c: Call, x: Tensor) -> Tensor:
    """x above zero, α(eˣ − 1) below."""
    return F.elu(x, c["alpha"])


@computes("selu")
def selu(c: Call, x: Tensor) -> Tensor:
    """scale·elu(x)."""
    found: Tensor = c["scale"] * F.elu(x, c["alpha"])
    return found


@computes("celu")
def celu(c: Call, x: Tensor) -> Tensor:
    """max(0, x) + min(0, α(exp(x/α) − 1))."""
    return F.celu(x, c["alpha"])


@computes("gelu")
def gelu(c: Call, x: Tensor) -> Tensor:
    """x·Φ(x), exact or by one of its approximations."""
    if c["approximate"] == "sigmoid":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate=c["approximate"])


@computes("softplus")
def softplus(c: Call, x: Tensor) -> Tensor:
    """ln(1 + exp(βx))/β, x itself beyond the threshold."""
    return F.softplus(x, c["beta"], c["threshold"])


@computes("hardsigmoid")
def hardsigmoid(c: Call, x: Tensor) -> Tensor:
    """αx + β between 0 and 1."""
    return torch.clamp(c["alpha"] * x + c["beta"], 0.0, 1.0)


@computes("hardtanh")
def hardtanh(c: Call, x: Tensor) -> Tensor:
    """x between two bounds, either of which may be infinite."""
    low, high = c["minimum"], c["maximum"]
    if not x.is_floating_point():
        low = None if math.isinf(low) else int(low)
        high = None if math.isinf(high) else int(high)
    return torch.clamp(x, low, high)


@computes("threshold")
def threshold(c: Call, x: Tensor) -> Tensor:
    """x above the threshold, else the value."""
    return F.threshold(x, c["threshold"], c["value"])


@computes("hardshrink")
def hardshrink(c: Call, x: Tensor) -> Tensor:
    """Zero between −λ and λ."""
    return F.hardshrink(x, c["lambd"])


@computes("softshrink")
def softshrink(c: Call, x: Tensor) -> Tensor:
    """x moved towards zero by the bias beyond ±λ, zero between."""
    size = c["bias"]
    zero = torch.zeros_like(x)
    return torch.where(x > c["lambd"], x - size, torch.where(x < -c["lambd"], x + size, zero))


@computes("glu")
def glu(c: Call, x: Tensor) -> Tensor:
    """a·σ(b) of the two halves."""
    return F.glu(x, c["axis"])


# --------------------------------------------------------------------------- running


@computes("cumsum")
def cumsum(c: Call, x: Tensor) -> Tensor:
    """Partial sums, from the end where reversed, without the element itself where exclusive."""
    axis = c["axis"]
    y = x.flip(axis) if c["reverse"] else x
    total = torch.cumsum(y, axis)
    if c["exclusive"]:
        total = total - y
    return total.flip(axis) if c["reverse"] else total


@computes("cumprod")
def cumprod(c: Call, x: Tensor) -> Tensor:
    """Partial products."""
    return torch.cumprod(x, c["axis"])
