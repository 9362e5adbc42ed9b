"""Images at other sizes: resizing axis by axis, and sampling at real positions."""

from __future__ import annotations

from functools import partial

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from archlint.probe.ops.frame import Call, CannotExecute, computes

Floats = npt.NDArray[np.float64]


def positions(c: Call, size: int, wanted: int, scale: float) -> Floats:
    """Where each element of a resized axis lies in the original one, in units of its elements."""
    places = np.arange(wanted, dtype=np.float64)
    kind = "align_corners" if c["align_corners"] else c["coordinates"]
    if kind == "align_corners":
        return places * ((size - 1) / (wanted - 1)) if wanted > 1 else np.zeros(1)
    if kind == "asymmetric":
        return places / scale
    if kind == "half_pixel":
        return (places + 0.5) / scale - 0.5
    if kind == "pytorch_half_pixel":
        return (places + 0.5) / scale - 0.5 if wanted > 1 else np.zeros(1)
    if kind == "half_pixel_symmetric":
        adjustment = wanted / (scale * size)
        return size / 2 * (1 - adjustment) + (places + 0.5) / scale - 0.5
    raise CannotExecute(f"resize: coordinates {kind!r}")


def _nearest(x: Floats, rounding: str) -> Floats:
    if rounding == "floor":
        return np.floor(x)
    if rounding == "ceil":
        return np.ceil(x)
    if rounding == "round_prefer_floor":
        return np.ceil(x - 0.5)
    return np.floor(x + 0.5)


def _kernel(mode: str, x: Floats, a: float) -> Floats:
    """The weight of an element at distance x."""
    x = np.abs(x)
    if mode == "linear":
        return np.maximum(1 - x, 0.0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def weights(c: Call, size: int, wanted: int, scale: float) -> Floats:
    """What each element of the original axis counts in each of the resized one: [wanted, size]."""
    mode = {"bilinear": "linear", "trilinear": "linear", "bicubic": "cubic"}.get(
        c["mode"], c["mode"]
    )
    x = positions(c, size, wanted, scale)
    found = np.zeros((wanted, size))
    rows = np.arange(wanted)
    if mode == "nearest":
        np.add.at(found, (rows, np.clip(_nearest(x, c["rounding"]), 0, size - 1).astype(int)), 1.0)
        return found
    if mode not in ("linear", "cubic"):
        raise CannotExecute(f"resize: mode {c['mode']!r}")
    shrink = min(scale, 1.0) if c["antialias"] else 1.0
    reach = int(np.ceil((1 if mode == "linear" else 2) / shrink))
    first = np.floor(x).astype(int)
    taps = first[:, None] + np.arange(1 - reach, reach + 1)
    value = _kernel(mode, (taps - x[:, None]) * shrink, c["cubic"])
    outside = (taps < 0) | (taps >= size)
    if c["exclude_outside"]:
        value = np.where(outside, 0.0, value)
    value = value / value.sum(1, keepdims=True)
    np.add.at(found, (rows[:, None], np.clip(taps, 0, size - 1)), value)
    return found


@computes("resize")
def resize(c: Call, x: Tensor) -> Tensor:
    """Another spatial size, one axis after the other."""
    for axis, wanted in enumerate(c["size"], 2):
        size = x.shape[axis]
        scale = wanted / size if c["scales"] is None else c["scales"][axis - 2]
        if size == wanted and scale == 1.0:
            continue
        key = (axis, size, x.dtype)
        make = partial(_planned, c, size, wanted, scale, x)
        plan = c.remembered(key, make)
        x = _resized(x, axis, plan)
    return x


def _planned(c: Call, size: int, wanted: int, scale: float, like: Tensor) -> Plan:
    return _plan(weights(c, size, wanted, scale), like)


Plan = tuple[Tensor, list[tuple[Tensor, Tensor]]]


def _plan(matrix: Floats, like: Tensor) -> Plan:
    """The weights as a matrix, and as few taps where there are few: (indices, weights) each."""
    most = int((matrix != 0).sum(1).max())
    whole = torch.tensor(matrix, dtype=like.dtype, device=like.device)
    if most > 4:
        return whole, []
    order = np.argsort(matrix == 0, axis=1, kind="stable")[:, :most]
    taps = []
    for tap in range(most):
        index = order[:, tap]
        value = matrix[np.arange(len(index)), index]
        taps.append(
            (
                torch.tensor(index, device=like.device),
                torch.tensor(value, dtype=like.dtype, device=like.device),
            )
        )
    return whole, taps


def _resized(x: Tensor, axis: int, plan: Plan) -> Tensor:
    whole, taps = plan
    if not taps:
        return torch.movedim(torch.movedim(x, axis, -1) @ whole.T, -1, axis)
    along = (-1, *(1,) * (x.ndim - axis - 1))
    if len(taps) == 1:
        return x.index_select(axis, taps[0][0])
    parts = [x.index_select(axis, index) * weight.reshape(along) for index, weight in taps]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


_SAMPLING = {"linear": "bilinear", "cubic": "bicubic"}


@computes("grid_sample")
def grid_sample(c: Call, x: Tensor, grid: Tensor) -> Tensor:
    """Elements at real positions in [−1, 1], last axis first."""
    mode = _SAMPLING.get(c["mode"], c["mode"])
    return F.grid_sample(x, grid.to(x.dtype), mode, c["padding_mode"], c["align_corners"])
