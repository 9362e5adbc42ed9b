"""Correlations of neighbours, and what maps over positions without weights do to them.

One number for all pairs of positions (``position_correlation``) is enough until neighbours are
more alike than others *and* are put together once more: a pool of a pool, resizing after resizing.
Then K(Δ) = E[v_p v_{p+Δ}], the mean over places p, is kept for small displacements Δ
(:class:`Nearby`) beside what is left for all others.

A pool, blur or resizing is y_o = Σ_i A_oi x_i with A a product over the axes (:class:`Mixing`), and

    E[(Ax)_o (Bx)_{o+D}] = Σ_Δ T(D, Δ) K(Δ),  T(D, Δ) = Π over axes of mean_o Σ_i A_oi B_{o+D, i+Δ},

borders included: exact where K does not depend on the place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, reduce

import numpy as np
import numpy.typing as npt

from archlint.signal.moments import UNKNOWN_SIGNAL, Nearby, Signal

Floats = npt.NDArray[np.float64]

REACH = 12  # places along an axis up to which neighbours are told from others
_ALIKE = 1e-3  # differences of correlations that are not worth keeping


@dataclass(frozen=True, eq=False)
class Axis:
    """The weights [out, in] of a map along one axis."""

    weights: Floats

    @cached_property
    def transposed(self) -> Axis:
        """The map of gradients."""
        return Axis(np.ascontiguousarray(self.weights.T))

    @cached_property
    def reach(self) -> int:
        """How many places at most an output is made of, less one."""
        found = self.weights != 0
        first = found.argmax(axis=1)
        last = found.shape[1] - 1 - found[:, ::-1].argmax(axis=1)
        return int((last - first)[found.any(axis=1)].max(initial=0))


@lru_cache(maxsize=512)
def same(size: int) -> Axis:
    """The map that changes nothing."""
    return Axis(np.eye(size))


@lru_cache(maxsize=512)
def after(second: Axis, first: Axis) -> Axis:
    """One map after another."""
    return Axis(second.weights @ first.weights)


@dataclass(frozen=True)
class Mixing:
    """A map over the positions of a tensor, as the product of one along each of some ``axes``."""

    axes: tuple[int, ...]
    maps: tuple[Axis, ...]

    @property
    def transposed(self) -> Mixing:
        """The map of gradients."""
        return Mixing(self.axes, tuple(m.transposed for m in self.maps))

    @property
    def sizes(self) -> tuple[int, ...]:
        """What it reads along each axis."""
        return tuple(m.weights.shape[1] for m in self.maps)

    @property
    def square(self) -> bool:
        """Whether it has as many places as it reads."""
        return all(m.weights.shape[0] == m.weights.shape[1] for m in self.maps)

    @property
    def total(self) -> float:
        """Σ_i A_oi, the mean over o."""
        return math.prod(float(m.weights.sum(axis=1).mean()) for m in self.maps)

    def after(self, first: Mixing) -> Mixing | None:
        """This map after another one, None where the two do not fit."""
        if first.axes != self.axes or self.sizes != tuple(m.weights.shape[0] for m in first.maps):
            return None
        return Mixing(self.axes, tuple(map(after, self.maps, first.maps)))

    @staticmethod
    def none(axes: tuple[int, ...], sizes: Sequence[int]) -> Mixing:
        """The map that changes nothing."""
        return Mixing(axes, tuple(same(n) for n in sizes))


@lru_cache(maxsize=1024)
def _pairs(a: Axis, b: Axis, out: int, inside: int) -> tuple[Floats, Floats, float, Floats]:
    """T[D, Δ] for |D| ≤ out, |Δ| ≤ inside; Σ over all Δ of it; Σ over all D too (times the number
    of places, which is the sum over all pairs); and of that sum the part of each Δ."""
    n, m = a.weights.shape
    shape = (n + out, m + inside)
    one, two = np.fft.rfft2(a.weights, shape), np.fft.rfft2(b.weights, shape)
    whole = np.fft.irfft2(np.conj(one) * two, shape)
    shifts = np.arange(-out, out + 1)
    table = whole[np.ix_(shifts, np.arange(-inside, inside + 1))]
    there = n - np.abs(shifts)  # pairs of places at that displacement
    rows = np.correlate(b.weights.sum(axis=1), a.weights.sum(axis=1), "full")
    at = n - 1 + shifts
    columns = np.correlate(b.weights.sum(axis=0), a.weights.sum(axis=0), "full")
    total = float(a.weights.sum() * b.weights.sum())
    return (table / there[:, None], rows[at] / there, total,
            columns[m - 1 - inside : m + inside])  # fmt: skip


@dataclass(frozen=True)
class Field:
    """K(Δ) of a tensor along axes of some ``sizes``: ``values`` for small displacements, zero in
    the middle, and ``far``, the mean over the pairs that lie further apart."""

    sizes: tuple[int, ...]
    values: Floats
    far: float

    @staticmethod
    def of(second: float, correlation: float, nearby: Nearby | None, sizes: tuple[int, ...]
           ) -> Field:  # fmt: skip
        """From E v², the mean correlation of two positions, and those of neighbours."""
        if nearby is not None and len(nearby.values.shape) == len(sizes):
            reach = [min(n // 2, size - 1) for n, size in
                     zip(nearby.values.shape, sizes, strict=True)]  # fmt: skip
            return Field(sizes, second * _cut(nearby.values, reach), second * nearby.far)
        return Field(sizes, np.full((1,) * len(sizes), second), second * correlation)

    @property
    def second(self) -> float:
        """K(0)."""
        return float(self.values[tuple(n // 2 for n in self.values.shape)])

    @cached_property
    def mean(self) -> float:
        """The mean of K over all pairs of two positions; K(0) where there are none."""
        count = math.prod(self.sizes)
        if count < 2:
            return self.second
        there = _there(self.sizes, self.values.shape)
        near = float((there * self.values).sum()) - count * self.second
        rest = count * count - float(there.sum())
        return (near + rest * self.far) / (count * (count - 1))

    def plus(self, other: Field, factor: float = 1.0) -> Field:
        """The sum of two."""
        reach = [max(n, m) // 2 for n, m in
                 zip(self.values.shape, other.values.shape, strict=True)]  # fmt: skip
        return Field(
            self.sizes,
            _widened(self, reach) + factor * _widened(other, reach),
            self.far + factor * other.far,
        )

    def times(self, factor: float) -> Field:
        """All of K times a number."""
        return Field(self.sizes, self.values * factor, self.far * factor)

    def shifted(self, number: float) -> Field:
        """A number added to all of K."""
        return Field(self.sizes, self.values + number, self.far + number)

    def nearby(self, axes: tuple[int, ...]) -> Nearby | None:
        """Relative to K(0), as far as neighbours differ from what lies further apart."""
        second = self.second
        if second <= 0 or not np.isfinite(self.values).all():
            return None
        relative, far = self.values / second, self.far / second
        reach = [n // 2 for n in relative.shape]
        for a in range(relative.ndim):
            while reach[a] > 0:
                inner = _cut(relative, reach)
                shell = np.stack([inner.take(0, axis=a), inner.take(-1, axis=a)])
                if np.abs(shell - far).max() > _ALIKE:
                    break
                reach[a] -= 1
        if not any(reach):
            return None
        return Nearby(axes, np.clip(_cut(relative, reach), -1.0, 1.0), min(max(far, -1.0), 1.0))


def _cut(values: Floats, reach: Sequence[int]) -> Floats:
    """The middle of an array."""
    return values[tuple(slice(n // 2 - r, n // 2 + r + 1)
                        for n, r in zip(values.shape, reach, strict=True))]  # fmt: skip


def _widened(x: Field, reach: Sequence[int]) -> Floats:
    """K as an array that reaches further."""
    shape = x.values.shape
    if all(r == n // 2 for r, n in zip(reach, shape, strict=True)):
        return x.values
    found = np.full([2 * r + 1 for r in reach], x.far)
    inner = tuple(slice(r - n // 2, r + n // 2 + 1) for r, n in zip(reach, shape, strict=True))
    found[inner] = x.values
    return found


@lru_cache(maxsize=512)
def _there(sizes: tuple[int, ...], shape: tuple[int, ...]) -> Floats:
    """How many pairs of places each displacement has."""
    counts = [n - np.abs(np.arange(-(w // 2), w // 2 + 1)).astype(np.float64)
              for n, w in zip(sizes, shape, strict=True)]  # fmt: skip
    return _outer(counts)


def _outer(arrays: Sequence[Floats]) -> Floats:
    return np.asarray(reduce(np.multiply.outer, arrays), np.float64)


def passed(x: Field, one: Mixing, two: Mixing | None = None) -> Field:
    """E[(Ax)_o (Bx)_{o+D}], B = A where left out; of two maps the mean of D and −D."""
    two = one if two is None else two
    tables, rows, totals, columns, sizes = [], [], 1.0, [], []
    for a, (m, w) in enumerate(zip(one.maps, two.maps, strict=True)):
        inside = x.values.shape[a] // 2
        n = m.weights.shape[0]
        step = max(x.sizes[a] / n, 1.0)
        wide = max(m.reach, w.reach) + inside + max(n / x.sizes[a], 1.0)
        table, row, total, column = _pairs(m, w, min(math.ceil(wide / step), n - 1, REACH), inside)
        tables.append(table)
        rows.append(row)
        columns.append(column)
        totals *= total
        sizes.append(n)
    near = x.values - x.far
    beside = near
    for a, table in enumerate(tables):
        beside = np.moveaxis(np.tensordot(table, beside, (1, a)), 0, a)
    values = x.far * _outer(rows) + beside
    whole = x.far * totals + float((_outer(columns) * near).sum())
    there = _there(tuple(sizes), values.shape)
    rest = math.prod(sizes) ** 2 - float(there.sum())
    if two is not one:
        values = (values + np.flip(values)) / 2
    others = there.sum() - math.prod(sizes)  # pairs of two places within reach
    far = (
        (whole - float((there * values).sum())) / rest if rest > 0.5
        else 0.0 if others <= 0
        else (whole / math.prod(sizes) - values[tuple(n // 2 for n in values.shape)])
        / (math.prod(sizes) - 1)
    )  # fmt: skip
    return Field(tuple(sizes), values, far)


def evened(x: Field, profiles: Sequence[Floats]) -> Field:
    """As correlations: with E[v_p v_{p+Δ}] over √(E v_p² E v_{p+Δ}²) by the second moments along
    each axis, relative to their mean."""
    counts, far = [], x.far
    for n, profile in zip(x.values.shape, profiles, strict=True):
        rms = np.sqrt(profile)
        size = rms.size
        shifts = np.abs(np.arange(-(n // 2), n // 2 + 1))
        counts.append(np.array([float((rms[d:] * rms[: size - d]).mean()) for d in shifts]))
        far /= max(float(rms.mean()) ** 2, 1e-9)
    level = _outer(counts)
    return Field(x.sizes, np.minimum(x.values / np.maximum(level, 1e-9), x.second), far)


def sizes_of(
    shape: Sequence[int | None] | None, axes: Sequence[int]
) -> tuple[int, ...] | None:  # fmt: skip
    """How many places there are along some axes, None where one is not known."""
    if shape is None or any(a >= len(shape) or not shape[a] for a in axes):
        return None
    return tuple(shape[a] or 1 for a in axes)


def mixed(x: Signal, mixing: Mixing) -> Signal:
    """A signal through a map over its positions; unknown where these are not all of them."""
    spots = tuple(a for a, role in enumerate(x.roles) if role == "position")
    blank = Signal(roles=x.roles)
    if x.second_moment is None or x.position_correlation is None or spots != mixing.axes:
        return blank
    q, total = x.second_moment, mixing.total
    before = Field.of(q, x.position_correlation, x.nearby, mixing.sizes)
    field = passed(before, mixing)
    second = max(field.second, 0.0)
    shared = min(max(before.far / before.second, 0.0), 1.0) if q > 0 else 0.0
    profiles = [shared * np.square(m.weights.sum(axis=1))
                + (1 - shared) * np.square(m.weights).sum(axis=1) for m in mixing.maps]  # fmt: skip
    profiles = [p / p.mean() if p.mean() > 0 else np.ones(p.size) for p in profiles]
    between = apart = None
    if x.sample_correlation is not None and x.apart is not None:
        own = np.full((1,) * len(spots), q * x.sample_correlation)
        other = passed(Field(mixing.sizes, own, q * x.apart), mixing)
        between, apart = _share(other.second, second), _share(other.mean, second)
    return x.but(
        mean=None if x.mean is None else x.mean * total, second_moment=second,
        position_correlation=_share(field.mean, second), sample_correlation=between,
        cross_correlation=apart, nearby=evened(field, profiles).nearby(spots), shared={},
        profile={a: p for a, p in zip(spots, profiles, strict=True) if np.ptp(p) > _ALIKE},
        one_sided=x.one_sided if all((m.weights >= 0).all() for m in mixing.maps) else 0,
    )  # fmt: skip


def side_by_side(
    parts: Sequence[tuple[Signal, float]], axes: tuple[int, ...], sizes: tuple[int, ...]
) -> Nearby | None:
    """Of features side by side, (signal, number of features) each, by their share of the second
    moment."""
    whole = summed(parts, axes, sizes)
    return None if whole is None else whole.nearby(axes)


def summed(
    parts: Sequence[tuple[Signal, float]], axes: tuple[int, ...], sizes: tuple[int, ...]
) -> Field | None:
    """Σ w·K over (signal, w); None where one is not known."""
    whole = Field(sizes, np.zeros((1,) * len(axes)), 0.0)
    for x, n in parts:
        if x.second_moment is None or x.position_correlation is None:
            return None
        nearby = x.nearby if x.nearby is not None and x.nearby.axes == axes else None
        whole = whole.plus(Field.of(x.second_moment, x.position_correlation, nearby, sizes), n)
    return whole


def _share(covariance: float, second: float) -> float:
    return 1.0 if second <= 0 else min(max(covariance / second, -1.0), 1.0)


# --------------------------------------------------------------------------- element by element


class Displaced(Mapping[str, Signal]):
    """Signals as they are for one displacement: of those that tell neighbours apart along
    ``axes``, the position correlation at it (None: far from each other)."""

    def __init__(
        self, signals: Mapping[str, Signal], axes: tuple[int, ...], shift: tuple[int, ...] | None
    ) -> None:
        self._signals, self._axes, self._shift = signals, axes, shift
        self._found: dict[str, Signal] = {}

    def __getitem__(self, value: str) -> Signal:
        found = self._found.get(value)
        if found is None:
            found = self._signals[value]
            if found.nearby is not None and found.nearby.axes == self._axes:
                found = found.but(position_correlation=found.nearby.at(self._shift), nearby=None)
            self._found[value] = found
        return found

    def get(self, value: str, default: Signal = UNKNOWN_SIGNAL) -> Signal:  # type: ignore[override]
        """The signal of a value."""
        return self[value] if value in self._signals else default

    def __iter__(self) -> Iterator[str]:
        return iter(self._signals)

    def __len__(self) -> int:
        return len(self._signals)


_MOST_NODES = 10  # displacements at which what varies smoothly with them is worked out


def of_each(
    fields: Sequence[Nearby], evaluate: Callable[[tuple[int, ...] | None], float | None]
) -> Nearby | None:
    """What neighbours have in common in a function of tensors that tell them apart: ``evaluate`` at
    the displacements, and far from each other (None). Once where all of them are the same, and
    where many differ at some, which the others lie between."""
    axes = fields[0].axes
    fields = [f for f in fields if f.axes == axes]
    far = evaluate(None)
    if far is None:
        return None
    reach = [max(f.values.shape[a] // 2 for f in fields) for a in range(len(axes))]
    shape = [2 * r + 1 for r in reach]
    level = np.zeros(shape)
    key = np.zeros(shape, np.int64)
    for f in fields:
        wide = _widened(Field((), f.values, f.far), reach)
        level += wide / len(fields)
        key = key * 4003 + np.round(wide * 1000).astype(np.int64)
    middle = key.size // 2
    _, first, place = np.unique(key.ravel()[: middle + 1], return_index=True, return_inverse=True)
    order = np.argsort(level.ravel()[first], kind="stable")
    levels = level.ravel()[first][order]
    chosen = np.arange(levels.size)
    if levels.size > _MOST_NODES:
        at = levels[0] + (levels[-1] - levels[0]) * np.linspace(0, 1, _MOST_NODES)
        chosen = np.unique(np.searchsorted(levels, at).clip(0, levels.size - 1))
    found = np.empty(chosen.size)
    for i, node in enumerate(chosen):
        flat = int(first[order[node]])
        shift = tuple(int(n) - r for n, r in zip(np.unravel_index(flat, shape), reach, strict=True))
        value = 1.0 if flat == middle else evaluate(shift)
        if value is None:
            return None
        found[i] = value
    made = np.empty(levels.size)
    made[order] = found if chosen.size == levels.size else np.interp(levels, levels[chosen], found)
    half = made[place.ravel()]
    half[middle] = 1.0
    values = np.concatenate([half, half[-2::-1]]).reshape(shape)
    return Field((2**30,) * len(axes), values, far).nearby(axes)


def multiplied(a: Nearby, b: Nearby) -> Nearby | None:
    """Of a product of independent factors."""
    reach = [max(n, m) // 2 for n, m in zip(a.values.shape, b.values.shape, strict=True)]
    values = _widened(Field((), a.values, a.far), reach) * _widened(
        Field((), b.values, b.far), reach
    )
    return Field((2**30,) * len(a.axes), values, a.far * b.far).nearby(a.axes)


def transposed(x: Nearby, order: object) -> Nearby | None:
    """After axes changed places: new axis i is the old ``order[i]``."""
    if not isinstance(order, tuple):
        return None
    places = [order.index(a) for a in x.axes]
    by_place = sorted(range(len(places)), key=places.__getitem__)
    return Nearby(tuple(sorted(places)), np.transpose(x.values, by_place), x.far)


def along_line(x: Nearby, before: float, later: float, steps: Sequence[int] | None = None
               ) -> Nearby | None:  # fmt: skip
    """After a map that takes covariances K to a·K + b, known by what it makes of the mean
    correlation of two positions (``before`` to ``later``) and of 1; every ``steps``-th place is
    left."""
    if before >= 1.0:
        return None
    slope = (1 - later) / (1 - before)
    values = x.values
    if steps is not None:
        values = values[tuple(slice((n // 2) % s, None, s)
                              for n, s in zip(values.shape, steps, strict=True))]  # fmt: skip
    field = Field((2**30,) * len(x.axes), 1 - slope * (1 - values), 1 - slope * (1 - x.far))
    return field.nearby(x.axes)
