"""The weights by which a resized axis is made from what was there."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@lru_cache(maxsize=256)
def weights(
    before: int, after: int, mode: str, coordinates: str = "half_pixel", cubic: float = -0.75,
    antialias: bool = False,
) -> Floats | None:  # fmt: skip
    """[after, before], rows that sum to one. ``mode`` is nearest, linear or cubic (Keys 1981); None
    for another one."""
    if mode not in ("nearest", "linear", "cubic") or before < 1 or after < 1:
        return None
    if before == after:
        return np.eye(after)
    scale = before / after
    i = np.arange(after, dtype=np.float64)
    found = np.zeros((after, before))
    rows = np.arange(after)
    if mode == "nearest":
        found[rows, np.minimum(rows * before // after, before - 1)] = 1.0
        return found
    reach = 1 if mode == "linear" else 2
    stretch = max(scale, 1.0) if antialias else 1.0  # a kernel as wide as what it stands for
    if coordinates == "align_corners":
        at = i * (before - 1) / max(after - 1, 1)
    elif coordinates == "asymmetric":
        at = i * scale
    else:
        at = (i + 0.5) * scale - 0.5
    if mode == "linear":
        at = np.clip(at, 0, before - 1)
    wide = int(np.ceil(reach * stretch))
    taps = np.floor(at)[:, None] + np.arange(-wide, wide + 2)
    distance = np.abs(taps - at[:, None]) / stretch
    share = np.maximum(1 - distance, 0.0) if mode == "linear" else _cubic(distance, cubic)
    index = np.clip(taps, 0, before - 1).astype(int)  # the border is repeated
    if antialias:
        share = np.where((taps >= 0) & (taps < before), share, 0.0)
    share = share / share.sum(axis=1, keepdims=True)
    np.add.at(found, (rows[:, None], index), share)  # taps on one element of the border add up
    return found


def _cubic(x: Floats, a: float) -> Floats:
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
