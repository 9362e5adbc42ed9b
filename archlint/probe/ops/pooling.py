"""Pooling. Windows that reach beyond the padded input (``ceil``) count no elements there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archlint.probe.ops.affine import CONVOLUTIONS, symmetric, torch_padding
from archlint.probe.ops.frame import Call, Outputs, computes

_MAX: tuple[Any, ...] = (None, F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVG: tuple[Any, ...] = (None, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _counts(c: Call, sizes: Sequence[int], reach: Sequence[int]) -> list[int]:
    """How many windows each axis has; one that begins beyond the input and its first padding does
    not count."""
    padding, n = c["padding"], len(sizes)
    found = []
    for i, (size, stride) in enumerate(zip(sizes, c["stride"], strict=True)):
        room = size + padding[i] + padding[n + i] - reach[i]
        count = (-(-room // stride) if c["ceil"] else room // stride) + 1
        if c["ceil"] and (count - 1) * stride >= size + padding[i]:
            count -= 1
        found.append(count)
    declared = (c.shape or ())[2:]
    return [n if d is None else d for n, d in zip(found, declared or found, strict=True)]


def _filled(c: Call, x: Tensor, reach: Sequence[int], value: float) -> Tensor:
    """x padded so that the windows end where it ends."""
    padding, n = c["padding"], len(reach)
    counts = _counts(c, x.shape[2:], reach)
    ends = [
        (count - 1) * stride + r - size - padding[i]
        for i, (count, stride, r, size) in enumerate(
            zip(counts, c["stride"], reach, x.shape[2:], strict=True)
        )
    ]
    return F.pad(x, torch_padding([*padding[:n], *ends]), value=value)


def _fits(padding: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether torch takes the padding: at most half a window."""
    return all(2 * p <= k for p, k in zip(padding, kernel, strict=True))


@computes("max_pool")
def max_pool(c: Call, x: Tensor) -> Outputs:
    """Maximum over windows; second output: its place in the flat plane of x."""
    n, kernel = len(c["kernel"]), c["kernel"]
    even, twice = symmetric(c["padding"]), len(c.values) > 1
    pool = _MAX[n]
    if even is not None and not c["ceil"] and _fits(even, kernel):
        found: Outputs = pool(x, kernel, c["stride"], even, c["dilation"], return_indices=twice)
        return found
    reach = [d * (k - 1) + 1 for d, k in zip(c["dilation"], kernel, strict=True)]
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    wide = _filled(c, x, reach, lowest)
    if not twice:
        y: Tensor = pool(wide, kernel, c["stride"], 0, c["dilation"])
        return y
    y, place = pool(wide, kernel, c["stride"], 0, c["dilation"], return_indices=True)
    return y, _place_in(x.shape[2:], wide.shape[2:], c["padding"], place)


def _place_in(
    inner: Sequence[int], outer: Sequence[int], padding: Sequence[int], place: Tensor
) -> Tensor:
    """Places in a padded plane as places in the plane within."""
    total = torch.zeros_like(place)
    step = 1
    for axis in reversed(range(len(inner))):
        total = total + (place % outer[axis] - padding[axis]) * step
        place = torch.div(place, outer[axis], rounding_mode="floor")
        step *= inner[axis]
    return total


def _window_sum(c: Call, x: Tensor) -> Tensor:
    """Sums over windows, what lies outside counting as zero."""
    kernel, dilation = c["kernel"], c["dilation"]
    if dilation is not None:
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        wide = _filled(c, x, reach, 0.0).flatten(0, 1)[:, None]
        ones = torch.ones((1, 1, *kernel), dtype=x.dtype, device=x.device)
        y = CONVOLUTIONS[len(kernel)](wide, ones, None, c["stride"], 0, dilation)
        return torch.as_tensor(y.reshape(*x.shape[:2], *y.shape[2:]))
    wide = _filled(c, x, kernel, 0.0)
    return torch.as_tensor(_AVG[len(kernel)](wide, kernel, c["stride"]) * math.prod(kernel))


@computes("avg_pool")
def avg_pool(c: Call, x: Tensor) -> Tensor:
    """Mean over windows, over the elements that count."""
    kernel, even = c["kernel"], symmetric(c["padding"])
    n = len(kernel)
    if (
        even is not None
        and _fits(even, kernel)
        and not c["ceil"]
        and c["divisor"] is None
        and c["dilation"] is None
    ):
        y: Tensor = _AVG[n](x, kernel, c["stride"], even, False, c["count_padding"])
        return y
    total = _window_sum(c, x)
    if c["divisor"] is not None:
        return torch.div(total, c["divisor"])
    key = ("count", tuple(x.shape[2:]), x.dtype)
    return torch.div(total, c.remembered(key, lambda: _sizes(c, x)))


def _sizes(c: Call, x: Tensor) -> Tensor:
    """How many elements of each window count, as a product over the axes: [*windows]."""
    kernel, padding = c["kernel"], c["padding"]
    n = len(kernel)
    dilation = c["dilation"] or (1,) * n
    found = torch.ones((), dtype=x.dtype, device=x.device)
    counts = _counts(c, x.shape[2:], [d * (k - 1) + 1 for d, k in zip(dilation, kernel,
                                                                      strict=True)])  # fmt: skip
    for i, size in enumerate(x.shape[2:]):
        first = torch.arange(counts[i], device=x.device) * c["stride"][i] - padding[i]
        low, high = (-padding[i], size + padding[n + i]) if c["count_padding"] else (0, size)
        taps = first[:, None] + torch.arange(kernel[i], device=x.device) * dilation[i]
        along = ((taps >= low) & (taps < high)).sum(1)
        found = found[..., None] * along.to(x.dtype)
    return found


@computes("lp_pool")
def lp_pool(c: Call, x: Tensor) -> Tensor:
    """The p-norm over windows."""
    p = c["p"]
    return torch.pow(_window_sum(c, x.abs() ** p), 1 / p)


_ADAPTIVE_AVG: tuple[Any, ...] = (
    None, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
)  # fmt: skip
_ADAPTIVE_MAX: tuple[Any, ...] = (
    None, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
)  # fmt: skip


@computes("adaptive_avg_pool")
def adaptive_avg_pool(c: Call, x: Tensor) -> Tensor:
    """Mean over as many windows as asked for."""
    size = c["size"]
    if all(n == 1 for n in size):
        return x.mean(tuple(range(2, x.ndim)), keepdim=True)
    y: Tensor = _ADAPTIVE_AVG[len(size)](x, size)
    return y


@computes("adaptive_max_pool")
def adaptive_max_pool(c: Call, x: Tensor) -> Outputs:
    """Maximum over as many windows as asked for, with its place in the flat plane."""
    size = c["size"]
    if all(n == 1 for n in size) and len(c.values) == 1:
        return x.amax(tuple(range(2, x.ndim)), keepdim=True)
    found: Outputs = _ADAPTIVE_MAX[len(size)](x, size, return_indices=len(c.values) > 1)
    return found


@computes("max_unpool")
def max_unpool(c: Call, x: Tensor, indices: Tensor) -> Tensor:
    """Elements back at their places in a plane of zeros."""
    n = len(c["kernel"])
    sizes = [
        (size - 1) * c["stride"][i] + c["kernel"][i] - c["padding"][i] - c["padding"][n + i]
        for i, size in enumerate(x.shape[2:])
    ]
    declared = (c.shape or ())[2:]
    sizes = [m if d is None else d for m, d in zip(sizes, declared or sizes, strict=True)]
    plane = torch.zeros((*x.shape[:2], math.prod(sizes)), dtype=x.dtype, device=x.device)
    y = plane.scatter(2, indices.flatten(2), x.flatten(2))
    return y.reshape(*x.shape[:2], *sizes)
