"""How alike two positions are, by how far apart they lie.

A convolution sums over the same weights at every position, so that two of its outputs are as alike
as its inputs at the same offset; an activation maps every correlation by itself. What is near stays
more alike than what is far, and the mean of a convex function over pairs of positions, such as the
mean of c², is more than that of the mean correlation.

Along each axis the offsets 0 … R stand for themselves and R + 1 for all that are farther, so that a
table has at most R + 2 entries an axis whatever the size of the map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from archlint.signal.gaussian import Floats

REACH = 7  # R
Profile = tuple[float, ...]  # hashable, so that what follows from it is found again


@dataclass(frozen=True, slots=True)
class Pairs:
    """Correlations of two positions by their offset, 1 where it is zero. ``sizes`` is the map's
    shape; ``table`` has an axis for each. Without a table all different positions have the
    correlation ``rest``. ``deviation``: that of ln c from draw to draw.
    ``profile``: along each axis the second moment over its mean (zero padding leaves less near the
    border): a pair counts by both."""

    sizes: tuple[int, ...]
    table: Floats | None = None
    rest: float = 1.0
    deviation: float = 0.0
    profile: tuple[Profile, ...] = ()

    @property
    def places(self) -> int:
        """The number of positions."""
        return math.prod(self.sizes)

    def over(self, f: Callable[[Floats], Floats]) -> float:
        """The mean of f(c) over all pairs of positions, equal ones included, and over draws: at ln
        c plus and minus its deviation."""
        if self.places <= 1:
            return float(f(_ONE)[0])
        if self.deviation > 0:
            return sum(end.over(f) for end in self.draws()) / 2
        if self.table is None:
            two = f(np.array([1.0, self.rest]))
            return float(two[0] + (self.places - 1) * two[1]) / self.places
        return float((f(self.table) * self.weights()).sum())

    def weights(self) -> Floats:
        """The share of pairs of positions that each entry of a table stands for."""
        if not self.profile:
            return weights(self.sizes)
        found = np.ones(())
        for axis in self.profile:
            found = np.multiply.outer(found, _weighted(axis))
        return found

    def draws(self) -> tuple[Pairs, ...]:
        """At ln c plus and minus its deviation; itself where that is zero."""
        if self.deviation <= 0:
            return (self,)
        return tuple(self.lowered(math.exp(sign * self.deviation)) for sign in (1.0, -1.0))

    @property
    def mean(self) -> float:
        """The mean correlation over all pairs, equal ones included."""
        return self.over(lambda c: c)

    def map(self, f: Callable[[Floats], Floats]) -> Pairs:
        """f of every correlation, over f(1)."""
        if self.places <= 1:
            return self
        if self.table is None:
            two = f(np.array([1.0, self.rest]))
            return Pairs(self.sizes, None, float(two[1] / two[0]) if two[0] else 1.0)
        values = f(self.table)
        one = float(values.flat[0])
        return Pairs(self.sizes, values / one if one else np.ones_like(values))

    def lowered(self, factor: float) -> Pairs:
        """With the correlation of different positions times a factor."""
        if self.places <= 1:
            return self
        if self.table is None:
            return replace(self, rest=min(self.rest * factor, 1.0), deviation=0.0)
        values = np.minimum(self.table * factor, 1.0)
        values.flat[0] = 1.0
        return replace(self, table=values, deviation=0.0)

    def profiled(self, axes: Sequence[Floats | None]) -> Pairs:
        """With a profile along each axis, None for a flat one."""
        if self.table is None or len(axes) != len(self.sizes) or all(a is None for a in axes):
            return self
        flat = (np.ones(n) if a is None or a.size != n else a
                for a, n in zip(axes, self.sizes, strict=True))  # fmt: skip
        return replace(self, profile=tuple(tuple(a.tolist()) for a in flat))

    @property
    def different(self) -> float:
        """The mean correlation of two different positions; 1 where there is only one."""
        return (self.mean * self.places - 1) / (self.places - 1) if self.places > 1 else 1.0

    def towards(self, mean: float) -> Pairs:
        """With the mean correlation of different positions brought to ``mean``: 1 − c scaled."""
        if self.places <= 1:
            return self
        own = self.different
        if self.table is None or 1 - own < 1e-9:
            return Pairs(self.sizes, None, mean)
        scale = (1 - mean) / (1 - own)
        return Pairs(self.sizes, np.clip(1 - (1 - self.table) * scale, -1.0, 1.0))

    def full(self) -> Floats:
        """The table, written out where all different positions are alike."""
        if self.table is not None:
            return self.table
        found = np.full(tuple(_length(n) for n in self.sizes), self.rest)
        found.flat[0] = 1.0
        return found


_ONE = np.array([1.0])
POINT = Pairs(())


def apart(sizes: Sequence[int]) -> Pairs:
    """Positions that have nothing in common."""
    return Pairs(tuple(sizes), None, 0.0)


def alike(sizes: Sequence[int]) -> Pairs:
    """Positions that are all the same."""
    return Pairs(tuple(sizes), None, 1.0)


def fitting(table: Floats | None, sizes: Sequence[int]) -> Floats | None:
    """A table by offset if it is one of a map of these sizes; a map of one position may have lost
    or gained axes."""
    shape = tuple(map(_length, sizes))
    if table is None or table.shape == shape:
        return table
    return table.reshape(shape) if table.size == math.prod(shape) == 1 else None


def _length(size: int) -> int:
    return min(size, REACH + 2)


@lru_cache(maxsize=512)
def _axis_weights(size: int) -> Floats:
    """The share of pairs along an axis that have each offset."""
    offset = np.arange(size)
    share = np.where(offset == 0, size, 2.0 * (size - offset)) / size**2
    if size > REACH + 2:
        share = np.append(share[: REACH + 1], share[REACH + 1 :].sum())
    return share


@lru_cache(maxsize=512)
def _weighted(profile: Profile) -> Floats:
    """The same where a pair counts by the product of both second moments."""
    q = np.array(profile)
    size = q.size
    share = np.correlate(q, q, "full")[size - 1 :] / size**2
    share[1:] *= 2
    if size > REACH + 2:
        share = np.append(share[: REACH + 1], share[REACH + 1 :].sum())
    return share


@lru_cache(maxsize=512)
def weights(sizes: tuple[int, ...]) -> Floats:
    """The share of pairs of positions that each entry of a table stands for."""
    found = np.ones(())
    for size in sizes:
        found = np.multiply.outer(found, _axis_weights(size))
    return found


def mixed(parts: Sequence[tuple[Pairs, float]]) -> Pairs:
    """Of a sum of uncorrelated parts with those shares of the second moment."""
    sizes = parts[0][0].sizes
    total = sum(w for _, w in parts)
    if total <= 0 or any(p.sizes != sizes for p, _ in parts):
        return parts[0][0]
    if all(p.table is None for p, _ in parts):
        return Pairs(sizes, None, sum(p.rest * w for p, w in parts) / total)
    return Pairs(sizes, sum((p.full() * (w / total) for p, w in parts), np.zeros(())))


@dataclass(frozen=True, slots=True)
class Window:
    """A convolution's or pool's window along one axis: input size, output size, taps, and where
    tap t of output o lies, o·stride + t·dilation − begin."""

    size: int
    out: int
    taps: int
    stride: int
    dilation: int
    begin: int

    def where(self) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
        """Input positions [out, taps]."""
        return (np.arange(self.out)[:, None] * self.stride
                + np.arange(self.taps)[None, :] * self.dilation - self.begin)  # fmt: skip


@lru_cache(maxsize=1024)
def _shared(window: Window) -> Floats:
    """For each offset of the output the share of taps that both positions have inside the map,
    over that of one position with itself."""
    where = window.where()
    inside = ((where >= 0) & (where < window.size)).astype(np.float64)
    found = np.empty(_length(window.out))
    for d in range(found.size):
        both = inside[: window.out - d] * inside[d:]
        found[d] = both.mean()
    return found / found[0] if found[0] > 0 else np.ones_like(found)


@lru_cache(maxsize=1024)
def _met(window: Window) -> Floats:
    """For each offset of the input the share of pairs that one tap can reach from two outputs,
    over the share of one position with itself: nothing between positions whose offset is no
    multiple of the stride."""
    where = window.where()
    inside = (where >= 0) & (where < window.size)
    counts = np.zeros(_length(window.size))
    reached = np.zeros((window.taps, window.size))
    for t in range(window.taps):
        np.add.at(reached[t], where[inside[:, t], t], 1.0)
    for d in range(counts.size):
        counts[d] = (reached[:, : window.size - d] * reached[:, d:]).sum() / (window.size - d)
    return counts / counts[0] if counts[0] > 0 else np.ones_like(counts)


def _spaced(table: Floats, axis: int, size: int, stride: int) -> Floats:
    """The entries at the offsets 0, s, 2s … for an output of ``size``."""
    at = np.minimum(np.arange(_length(size)) * stride, table.shape[axis] - 1)
    return np.asarray(np.take(table, at, axis), np.float64)


def convolved(x: Pairs, windows: Sequence[Window]) -> Pairs:
    """Of the outputs of a convolution with independent weights."""
    sizes = tuple(w.out for w in windows)
    if x.sizes != tuple(w.size for w in windows):
        return apart(sizes)
    table = x.full()
    for axis, w in enumerate(windows):
        table = _along(_spaced(table, axis, w.out, w.stride), axis, _shared(w))
    return Pairs(sizes, table)


def scattered(g: Pairs, windows: Sequence[Window]) -> Pairs:
    """Of the gradient of a convolution's input; ``g`` of its output's."""
    sizes = tuple(w.size for w in windows)
    if g.sizes != tuple(w.out for w in windows):
        return apart(sizes)
    table = g.full()
    for axis, w in enumerate(windows):
        offset = np.arange(_length(w.size))
        at = np.minimum(offset // w.stride, table.shape[axis] - 1)
        table = _along(np.take(table, at, axis), axis, _met(w))
    return Pairs(sizes, table)


def _along(table: Floats, axis: int, factor: Floats) -> Floats:
    shape = [1] * table.ndim
    shape[axis] = factor.size
    return np.asarray(table * factor.reshape(shape), np.float64)


def pooled(x: Pairs, windows: Sequence[Window]) -> Pairs:
    """Of the means over windows: every pair of their elements by its offset."""
    sizes = tuple(w.out for w in windows)
    if x.sizes != tuple(w.size for w in windows):
        return apart(sizes)
    table = x.full()
    for axis, w in enumerate(windows):
        last = table.shape[axis] - 1
        total = np.zeros(())
        for s in range(w.taps):
            for t in range(w.taps):
                at = np.abs(np.arange(_length(w.out)) * w.stride + (s - t) * w.dilation)
                total = total + np.take(table, np.minimum(at, last), axis)
        table = np.asarray(total / w.taps**2, np.float64)
    one = float(table.flat[0])
    return Pairs(sizes, table / one if one > 0 else np.ones_like(table))


def around(table: Floats, sizes: Sequence[int], after: Sequence[int]) -> Floats:
    """By offset on maps of the sizes ``after`` what holds by offset on a torus of ``sizes``: of a
    map that is padded with its other side, or of one that is cut out of such a map."""
    for axis, (size, wide) in enumerate(zip(sizes, after, strict=True)):
        offset = np.arange(_length(wide)) % size
        at = np.minimum(offset, size - offset)
        table = np.take(table, np.minimum(at, table.shape[axis] - 1), axis)
    return np.asarray(table, np.float64)


@lru_cache(maxsize=1024)
def _gathering(window: Window) -> Floats:
    """[offset of the input, offset of the output]: the mean over input positions x, x′ at an offset
    of how many pairs of outputs that read them lie at each offset, over the taps and the mean
    number of outputs that read one position."""
    where = window.where()
    readers: list[list[int]] = [[] for _ in range(window.size)]
    for o, t in zip(*np.nonzero((where >= 0) & (where < window.size)), strict=True):
        readers[int(where[o, t])].append(int(o))
    mean = sum(map(len, readers)) / window.size
    found = np.zeros((_length(window.size), _length(window.out)))
    last = found.shape[1] - 1
    step = max(window.size // 64, 1)  # of a long axis some positions stand for all
    for d in range(found.shape[0]):
        starts = range(0, window.size - d, step)
        for x in starts:
            for o in readers[x]:
                for other in readers[x + d]:
                    found[d, min(abs(o - other), last)] += 1 / len(starts)
    return found / (window.taps * mean) if mean > 0 else found


def gathered(table: Floats, windows: Sequence[Window]) -> Floats:
    """Of a field over a convolution's outputs with that covariance by offset, the covariance of its
    means over the outputs that read each input, times the share of taps that there are."""
    for axis, w in enumerate(windows):
        moved = np.tensordot(_gathering(w), table, (1, axis))
        table = np.moveaxis(moved, 0, axis)
    return np.asarray(table, np.float64)
