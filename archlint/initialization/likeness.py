"""Does an array look like independent draws? Tests on a bounded part of it, with their z-scores.

Every score is about N(0, 1) for independent draws of one symmetric law, whatever the law, and
grows with the deviation: a trained matrix has rows of unequal norm, rows that resemble each other,
means that differ from row to row. All tests look at one *block*, at most 128 × 1024 elements.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Matrix = npt.NDArray[np.float32]

_ROWS, _COLUMNS = 128, 1024
_CORRELATED = 128  # rows whose mutual correlations are looked at
_SAMPLE = 1 << 14  # elements for tests of the law's shape


def as_matrix(array: Array, leading: int = 1) -> Array:
    """The array as [rows, columns]: the first ``leading`` axes are rows."""
    rows = math.prod(array.shape[:leading])
    return array.reshape(rows, -1)


def block(matrix: Array) -> Matrix:
    """Evenly spaced rows and columns of a matrix, at most 128 × 1024, in single precision."""
    rows, columns = matrix.shape
    if rows < _ROWS < columns:  # a flat matrix gives more columns, a tall one more rows
        most = (rows, _ROWS * _COLUMNS // max(rows, 1))
    elif columns < _COLUMNS < rows:
        most = (_ROWS * _COLUMNS // max(columns, 1), columns)
    else:
        most = (_ROWS, _COLUMNS)
    part = matrix[_spread(rows, most[0])][:, _spread(columns, most[1])]
    copied = np.ascontiguousarray(part, dtype=np.float32)
    finite = np.isfinite(copied)
    return copied if finite.all() else np.where(finite, copied, np.float32(0.0))


def _spread(n: int, most: int) -> slice:
    step = max(-(-n // most), 1)
    return slice(0, None, step)


def sample(array: Array) -> npt.NDArray[np.float64]:
    """At most 16,384 elements, evenly spaced, sorted, in double precision; finite ones only."""
    flat = array.reshape(-1) if array.flags.c_contiguous else None
    if flat is None:
        flat = block(as_matrix(array)).reshape(-1)
    # An odd step is coprime to the usual powers of two, so that all columns are visited.
    step = max(-(-flat.size // _SAMPLE), 1) | 1
    picked = np.asarray(flat[::step], np.float64)
    picked = picked[np.isfinite(picked)]
    picked.sort()
    return picked


def gamma_score(value: float, mean: float, variance: float) -> float:
    """z-score of a sum of squares with the given moments (Wilson & Hilferty 1931, cube root)."""
    if mean <= 0.0 or variance <= 0.0:
        return 0.0
    shape = mean * mean / variance
    spread = 1.0 / (9.0 * shape)
    return (math.pow(max(value, 0.0) / mean, 1.0 / 3.0) - (1.0 - spread)) / math.sqrt(spread)


def scores(part: Matrix, mean: float, std: float, taps: int = 1) -> dict[str, float]:
    """z-scores of a block against independent draws with the given mean and standard deviation.

    ``taps`` is how many neighbouring columns belong to one input channel. Rows and columns that
    are zero throughout (padding rows, pruned channels) are left out.
    """
    if std <= 0.0 or part.size < 16:
        return {}
    rows, columns = np.any(part, axis=1), np.any(part, axis=0)
    if not (rows.all() and columns.all()):
        part = part[rows][:, columns]
    if part.shape[0] < 2 or part.shape[1] < 2:
        return {}
    # Left-out zeros change mean and spread of the rest: take those of the block itself.
    centre = mean if abs(mean) > 4.0 * std / math.sqrt(part.size) else 0.0
    z = part - np.float32(centre)
    z /= math.sqrt(_mean_square(z)) or 1.0
    squares = np.square(z)
    deviations = squares - np.float32(1.0)
    noise = _mean_square(deviations)
    fourth = _mean_square(np.square(deviations))
    excess = fourth / noise**2 - 3.0 if noise > 0.0 else 0.0
    found: dict[str, float] = {}
    for name, axis in (("row", 1), ("column", 0)):
        if part.shape[1 - axis] < 3:
            continue
        found[f"{name} norms"] = _unequal(squares.mean(axis), part.shape[axis], noise, excess)
        found[f"{name} means"] = _unequal(z.mean(axis) + 1.0, part.shape[axis], 1.0, 0.0)
        found[f"{name} correlations"] = _correlated(z if axis == 1 else z.T)
    if taps > 1 and part.shape[1] % taps == 0 and part.shape[1] > taps:
        by_tap = squares.reshape(part.shape[0], -1, taps).mean((0, 1))
        found["kernel taps"] = _unequal(by_tap, part.size // taps, noise, excess)
    return found


def _mean_square(x: Matrix) -> float:
    return float(np.vdot(x, x)) / x.size


def _unequal(averages: Array, terms: int, noise: float, excess: float) -> float:
    """How much averages over ``terms`` draws with variance ``noise`` differ more than by chance."""
    n = averages.size
    if n < 3 or noise <= 1e-9:
        return 0.0
    centred = averages - averages.mean()
    value = float(np.sum(np.square(centred, dtype=np.float64))) * terms / noise
    return gamma_score(value, n - 1.0, 2.0 * (n - 1.0) + n * max(excess, 0.0) / terms)


def _correlated(z: Matrix) -> float:
    """How much more rows resemble each other than independent ones do.

    For unit vectors u, v with exchangeable symmetric entries in C dimensions E (u·v)² = 1/C.
    """
    rows = z[_spread(z.shape[0], _CORRELATED)]
    columns = rows.shape[1]
    norms = np.sqrt(np.sum(np.square(rows), axis=1, keepdims=True))
    rows = (rows / np.where(norms > 0.0, norms, 1.0)).astype(np.float32)
    gram = rows @ rows.T
    n = rows.shape[0]
    pairs = n * (n - 1) / 2
    if pairs < 3 or columns < 3:
        return 0.0
    value = (float(np.sum(np.square(gram, dtype=np.float64))) - n) / 2.0 * columns
    # Pairs share rows, and squares are skew: for few columns the sum varies more than a χ².
    return gamma_score(value, pairs, 2.0 * pairs * (1.0 + 8.0 / columns))


def orthogonality(matrix: Array) -> float | None:
    """g² where rows, or columns, are orthogonal with the common squared norm g²; None otherwise."""
    rows, columns = matrix.shape
    if min(rows, columns) < 2:
        return None
    short = matrix if rows <= columns else matrix.T
    if short.shape[1] < 3 or short.shape[1] > 1 << 17:
        return None
    few = np.asarray(short[_spread(short.shape[0], 16)], np.float64)
    gram = few @ few.T
    norms = np.diag(gram)
    norm = float(norms.mean())
    if norm <= 0.0 or not math.isfinite(norm):
        return None
    # QR in single precision leaves some 1e-6. Rounding to half precision moves each entry by up to
    # 2^-9 of itself, so products of rows by far less than the 1/√n of independent rows.
    single = matrix.dtype.itemsize >= 4
    if not single and len(few) < 4:
        return None
    rounding = 1e-5 if single else 0.05 / math.sqrt(few.shape[1])
    cosines = gram / norm - np.diag(norms / norm)
    if float(np.max(np.abs(cosines))) > rounding:
        return None
    if float(np.max(np.abs(norms / norm - 1.0))) > (1e-5 if single else 2e-3):
        return None
    # Sparse rows are orthogonal by accident: eye and dirac have laws of their own.
    if float(np.mean(few == 0.0)) > 0.5:
        return None
    return norm


def kolmogorov_smirnov(sorted_sample: npt.NDArray[np.float64], cdf: Any) -> float:
    """√n·sup|F_n − F|, compared halfway between neighbouring values.

    Halfway, so that values on a grid (8-bit weights) are compared at the edges of their cells.
    """
    n = sorted_sample.size
    (steps,) = np.nonzero(sorted_sample[1:] != sorted_sample[:-1])
    if not steps.size:
        return 0.0
    below = (steps + 1) / n
    between = (sorted_sample[steps] + sorted_sample[steps + 1]) / 2.0
    return float(np.max(np.abs(below - cdf(between)))) * math.sqrt(n)


def normal_cdf(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Φ(x) to 1e-7 by interpolation in a table made with math.erf."""
    return np.asarray(np.interp(x, _GRID, _PHI), np.float64)


_GRID = np.linspace(-8.0, 8.0, 4097)
_PHI = np.array([0.5 * math.erfc(-x / math.sqrt(2.0)) for x in _GRID.tolist()])
