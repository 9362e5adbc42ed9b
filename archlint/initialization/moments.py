"""Moments of an array in one pass: chunks that stay in the cache, sums in double precision."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_CHUNK = 1 << 15  # elements: 128 kB in single precision, with one square buffer inside L2
_SAFE = (1e-8, 1e8)  # between them neither w⁴ nor its sums leave single precision's range


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over the finite elements of an array, and where the others are.

    ``count`` counts the finite elements; ``total``, ``squares``, ``fourths`` are Σw, Σw², Σw⁴ over
    them and ``low``, ``high`` their extremes (nan where there are none). ``first_bad`` is the index
    of the first element that is NaN or infinite.
    """

    count: int
    total: float
    squares: float
    fourths: float
    low: float
    high: float
    nans: int = 0
    positive_infinities: int = 0
    negative_infinities: int = 0
    first_bad: tuple[int, ...] | None = None

    @property
    def bad(self) -> int:
        """How many elements are NaN or infinite."""
        return self.nans + self.positive_infinities + self.negative_infinities

    @property
    def mean(self) -> float:
        """The mean of the finite elements."""
        return self.total / self.count if self.count else math.nan

    @property
    def second_moment(self) -> float:
        """The mean square."""
        return self.squares / self.count if self.count else math.nan

    @property
    def variance(self) -> float:
        """The variance, with 1/N."""
        return max(self.second_moment - self.mean**2, 0.0) if self.count else math.nan

    @property
    def flatness(self) -> float:
        """E w⁴/(E w²)², the kurtosis about zero; nan where all elements are zero."""
        if not self.count or self.squares <= 0.0:
            return math.nan
        return self.fourths / self.count / self.second_moment**2

    def repeated(self, times: int) -> Moments:
        """The moments of an array that holds every element so many times."""
        return replace(
            self,
            count=self.count * times,
            total=self.total * times,
            squares=self.squares * times,
            fourths=self.fourths * times,
            nans=self.nans * times,
            positive_infinities=self.positive_infinities * times,
            negative_infinities=self.negative_infinities * times,
        )

    @property
    def largest(self) -> float:
        """max |w|."""
        return max(abs(self.low), abs(self.high)) if self.count else math.nan


def moments(array: Array) -> Moments:
    """Σw, Σw², Σw⁴ and the extremes of an array of any real type, any shape, any size.

    A chunk's sums are taken in single precision by pairwise summation (relative error about 1e-7),
    the sums over chunks in double; a chunk whose powers overflow or underflow is summed in double.
    Nothing of the array's size is allocated, and an axis that repeats the same elements (stride 0,
    as np.broadcast_to makes it) is read once.
    """
    once = tuple(slice(1) if s == 0 and n > 1 else slice(None)
                 for s, n in zip(array.strides, array.shape, strict=True))  # fmt: skip
    held = array[once]
    if held.size < array.size and held.size:
        return moments(held).repeated(array.size // held.size)
    order = np.argsort([-abs(n) for n in array.strides], kind="stable")
    laid_out = array.transpose(order)  # as it lies in memory: a transposed view reads in order
    count, total, squares, fourths = 0, 0.0, 0.0, 0.0
    low, high = math.inf, -math.inf
    nans = plus = minus = 0
    first_bad: int | None = None
    position = 0
    buffer = np.empty(_CHUNK, np.float32)
    for raw in _chunks(laid_out):
        chunk = raw if raw.dtype in (np.float32, np.float64) else raw.astype(_wide(raw.dtype))
        n = chunk.size
        square = buffer[:n] if chunk.dtype == np.float32 else np.empty(n)
        with np.errstate(all="ignore"):
            least, most = float(chunk.min()), float(chunk.max())
            if not (math.isfinite(least) and math.isfinite(most)):
                finite = np.isfinite(chunk)
                if first_bad is None:
                    first_bad = position + int(np.argmin(finite))
                nans += int(np.isnan(chunk).sum())
                plus += int((chunk == math.inf).sum())
                minus += int((chunk == -math.inf).sum())
                chunk = chunk[finite]
                square = square[: chunk.size]
                if chunk.size:
                    least, most = float(chunk.min()), float(chunk.max())
            if chunk.size:
                reach = max(-least, most)
                safe = reach == 0.0 or _SAFE[0] < reach < _SAFE[1]
                if chunk.dtype == np.float32 and not safe:
                    chunk = chunk.astype(np.float64)
                    square = np.empty(chunk.size)
                np.multiply(chunk, chunk, out=square)
                total += float(chunk.sum())
                squares += float(square.sum())
                fourths += float(np.dot(square, square))
                low, high = min(low, least), max(high, most)
                count += chunk.size
        position += n
    return Moments(
        count,
        total,
        squares,
        fourths,
        low if count else math.nan,
        high if count else math.nan,
        nans,
        plus,
        minus,
        None if first_bad is None else _place(first_bad, laid_out.shape, order),
    )


def distinct(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The different finite numbers among ``values``, sorted (np.unique loads numpy.ma for it)."""
    ordered = np.sort(values, axis=None)
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: ordered.size]
    return np.asarray(ordered[first])


def _place(flat: int, shape: tuple[int, ...], order: npt.NDArray[np.intp]) -> tuple[int, ...]:
    """The index in the original array of an element found in a transposed one."""
    found = np.empty(len(shape), int)
    found[order] = np.unravel_index(flat, shape)
    return tuple(int(i) for i in found)


def _wide(dtype: np.dtype[Any]) -> type[np.float32] | type[np.float64]:
    """The type to sum in: double for integers that single precision would round."""
    wide = dtype.kind in "iu" and dtype.itemsize > 2
    return np.float64 if wide else np.float32


def _chunks(array: Array) -> Iterator[Array]:
    """Flat pieces of an array in C order, without a copy of the whole."""
    if array.flags.c_contiguous:
        flat = array.reshape(-1)
        for at in range(0, flat.size, _CHUNK):
            yield flat[at : at + _CHUNK]
        return
    if array.size <= _CHUNK:
        yield array.reshape(-1)
    elif array.ndim == 1:
        for at in range(0, array.size, _CHUNK):
            yield array[at : at + _CHUNK]
    else:
        for part in array:
            yield from _chunks(part)
