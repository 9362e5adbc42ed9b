"""How much a resized axis averages: the sum of squared interpolation weights of its elements."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@lru_cache(maxsize=1024)
def concentration(
    before: int, after: int, mode: str, coordinates: str = "half_pixel", cubic: float = -0.75,
    antialias: bool = False,
) -> float | None:  # fmt: skip
    """The mean over the elements of a resized axis of Σw², where w are the weights of the elements
    it is interpolated from (Σw = 1): 1 where it copies, 1/n where it averages n. ``mode`` is
    nearest, linear or cubic (Keys 1981); None for another one.
    """
    if mode == "nearest" or before == after:
        return 1.0
    if mode not in ("linear", "cubic") or before < 1 or after < 1:
        return None
    reach = 1 if mode == "linear" else 2
    scale = before / after
    stretch = max(scale, 1.0) if antialias else 1.0  # a kernel as wide as what it stands for
    i = np.arange(after, dtype=np.float64)
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
    weights = np.maximum(1 - distance, 0.0) if mode == "linear" else _cubic(distance, cubic)
    index = np.clip(taps, 0, before - 1).astype(int)  # the border is repeated
    if antialias:
        weights = np.where((taps >= 0) & (taps < before), weights, 0.0)
    weights = weights / weights.sum(axis=1, keepdims=True)
    square = np.zeros(after)
    for shift in range(weights.shape[1]):  # taps that fall on one element of the border add up
        same = index == index[:, shift : shift + 1]
        square += weights[:, shift] * (weights * same).sum(axis=1)
    return float(square.mean())


def _cubic(x: Floats, a: float) -> Floats:
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
