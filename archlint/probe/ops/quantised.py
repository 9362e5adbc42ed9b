"""Real numbers to integers of a scale, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from archlint.probe.ops.frame import Call, computes

_RANGES = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-(2**15), 2**15 - 1),
           "uint16": (0, 2**16 - 1), "int32": (-(2**31), 2**31 - 1), "int4": (-8, 7),
           "uint4": (0, 15), "int2": (-2, 1), "uint2": (0, 3)}  # fmt: skip


def _along(x: Tensor, factor: Tensor, axis: int | None) -> Tensor:
    """A scale: one number, one along an axis, or one a block of an axis."""
    if factor.numel() == 1:
        return factor.reshape(())
    if axis is None or factor.ndim == 0:
        return factor
    axis %= x.ndim
    if factor.ndim == 1:
        return factor.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    if factor.shape[axis] != x.shape[axis]:
        return factor.repeat_interleave(-(-x.shape[axis] // factor.shape[axis]), axis).narrow(
            axis, 0, x.shape[axis]
        )
    return factor


@computes("quantize")
def quantize(c: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """x/scale rounded to even, plus the zero point, within the integer's range."""
    y = torch.round(x / _along(x, scale, c["axis"]).to(x.dtype))
    if zero_point is not None:
        y = y + _along(x, zero_point, c["axis"]).to(x.dtype)
    bounds = _RANGES.get(c["dtype"])
    return y if bounds is None else y.clamp(*bounds)


@computes("dequantize")
def dequantize(c: Call, x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    """(x − zero point)·scale."""
    y = x.to(scale.dtype)
    if zero_point is not None:
        y = y - _along(x, zero_point, c["axis"]).to(scale.dtype)
    return y * _along(x, scale, c["axis"])
