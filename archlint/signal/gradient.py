"""The gradient as an abstract value, and the registry of backward transfer functions.

The gradient of a value v is g = ∂⟨output, ξ⟩/∂v with ξ ~ N(0,1) independent for every element of
every output. Given the weights it is linear in ξ, so it has mean zero, and two gradients that
passed different random weights are uncorrelated. Weights are taken to be independent of the
activations when the gradient passes them (the gradient independence assumption of Schoenholz et
al. 2017, exact in the limit of wide layers: Yang 2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from archlint.signal.moments import UNKNOWN_SIGNAL, Nearby, Role, Signal
from archlint.signal.neighbours import Field, Mixing, passed
from archlint.signal.transfer import Step

Profile = npt.NDArray[np.float64]
Correlation = float | None
LONGEST_PROFILE = 65536
MOST_ORIGINS = 12  # sources that a gradient remembers, the strongest ones


class Stretch(NamedTuple):
    """What of a source's gradient, of a ``shape``, lies between two places along an axis: on its
    own, or ``placed`` where it was among zeros."""

    source: str
    shape: tuple[int | None, ...]
    axis: int
    start: int
    stop: int
    placed: bool = False

    @property
    def share(self) -> float:
        """Of the whole."""
        return (self.stop - self.start) / (self.shape[self.axis] or 1)


class Folded(NamedTuple):
    """The sum of a source's gradient, of a ``shape``, over ``axes``; ``whole`` is 1 + Σ of the
    correlations of an element with the others that are summed."""

    source: str
    shape: tuple[int | None, ...]
    axes: tuple[int, ...]
    whole: float
    placed: bool = False

    @property
    def terms(self) -> int:
        """How many elements are summed."""
        return math.prod(self.shape[a] or 1 for a in self.axes)


class Mixed(NamedTuple):
    """A source's gradient after a map over its positions."""

    source: str
    mixing: Mixing
    placed: bool = False


Key = str | Stretch | Folded | Mixed


@dataclass(frozen=True)
class Gradient:
    """Moments of a gradient's elements over initializations, inputs and ξ; None is *unknown*.

    ``second_moment`` = E g² per element. ``along``: for every axis E[g g′]/E g² of two elements
    that differ in their place along that axis only; of two that differ along several axes the
    smallest of these. ``profile``: E g² along an axis relative to its mean, axis -> values, as a
    product over axes. ``aligned``: E[g ẑ g′ ẑ′]/E g² for two positions, ẑ the standardised value
    that the gradient belongs to; None where nothing ties the two. ``chosen``: the share of E g²
    that lives where the value is the greatest of ``window`` neighbours (max-pooling).
    ``excess``: E g² over what it would be if it were independent of the weights that made the value
    (a norm's 1/v is smallest where those weights are largest): what they take back.
    ``origin``: source, or a stretch of one -> a, where g = Σ a·g_source + what is uncorrelated with
    every source. ``given``: E[g² | v]/E g² at the NODES of the law of the value that it belongs to
    (signal.laws), where a path from there on passes by the value's own size: a stream that is
    rectified twice passes more often where it is great. None where nothing ties the two.
    ``nearby``: where neighbours are more alike than other positions, by how much.
    ``bend``: dE[g g′]/E g² by the correlation of the two values that it belongs to.
    """

    second_moment: float | None = None
    along: tuple[Correlation, ...] = ()
    profile: Mapping[int, Profile] = field(default_factory=dict)
    aligned: Correlation = None
    chosen: float = 0.0
    window: int = 1
    excess: float = 1.0
    origin: Mapping[Key, float] = field(default_factory=dict)
    given: Profile | None = None
    nearby: Nearby | None = None
    bend: float = 0.0

    @property
    def known(self) -> bool:
        """Whether the second moment is known."""
        return self.second_moment is not None

    @property
    def zero(self) -> bool:
        """Whether no gradient arrives at all."""
        return self.second_moment == 0.0

    def but(self, **changes: object) -> Gradient:
        """A copy with some fields replaced."""
        made = object.__new__(Gradient)
        made.__dict__.update(self.__dict__, **changes)  # a fraction of what `replace` takes
        if len(made.__dict__) != len(self.__dict__):
            raise TypeError(f"a gradient has no {', '.join(changes.keys() - self.__dict__.keys())}")
        return made


UNKNOWN_GRADIENT = Gradient()


def no_gradient(rank: int) -> Gradient:
    """The gradient of a value that no output depends on."""
    return Gradient(0.0, (0.0,) * rank)


@dataclass(frozen=True, slots=True)
class Back(Step):
    """One node on the way back: ``arriving`` holds the gradients of its outputs, ``sources`` what
    is known of each source (its gradient), ``name`` makes the sources of this node unique.
    ``variations``: by how much the variances of channels vary (backward.normalisation)."""

    arriving: tuple[Gradient, ...] = ()
    variations: Mapping[str, float] = field(default_factory=dict)

    @property
    def gradient(self) -> Gradient:
        """The gradient of the first output."""
        return self.arriving[0]

    def out_signal(self, i: int = 0) -> Signal:
        """The signal of output ``i``."""
        return self.signals.get(self.node.outputs[i], UNKNOWN_SIGNAL)

    def rank(self, i: int) -> int:
        """The number of axes of input ``i``; 0 where unknown."""
        return len(self.shape(i) or ())

    def source(self, i: int) -> dict[Key, float]:
        """An origin that is all of this node's gradient for input ``i``."""
        return {f"{self.node.id}:{i}": 1.0}


Backward = Callable[[Back], "Sequence[Gradient | None]"]
BACKWARD: dict[str, Backward] = {}


def backwards(*ops: str) -> Callable[[Backward], Backward]:
    """Register the backward function of ops. It returns a Gradient per input; None (or a missing
    entry) where nothing flows, as to integers."""

    def register(function: Backward) -> Backward:
        for op in ops:
            if op in BACKWARD:
                raise ValueError(f"op {op!r} has two backward functions")
            BACKWARD[op] = function
        return function

    return register


# --------------------------------------------------------------------------- correlations


def both(c: Correlation, d: Correlation) -> Correlation:
    """c·d, the correlation of a product of independent factors: 0 where one is 0, else None where
    one is unknown."""
    if c == 0.0 or d == 0.0:
        return 0.0
    return None if c is None or d is None else c * d


def role_correlation(x: Signal, role: Role) -> Correlation:
    """E[x x′]/E x² of two elements that differ along an axis of a role."""
    if role == "position":
        return x.position_correlation
    if role == "sample":
        return x.sample_correlation
    if x.mean is None or x.second_moment is None:
        return None
    return 1.0 if x.second_moment <= 0 else min(x.mean**2 / x.second_moment, 1.0)


def _along(x: Signal, axis: int) -> Correlation:
    """The same along an axis, which may be one of features that share more than their means."""
    return x.shared[axis] if axis in x.shared else role_correlation(x, x.roles[axis])


def along_of(x: Signal, shape: Sequence[int | None] | None) -> tuple[Correlation, ...]:
    """E[x x′]/E x² along every axis of a tensor of that shape; 1 along one of size one."""
    if shape is None:
        return ()
    known = len(x.roles) == len(shape)
    return tuple(1.0 if n == 1 else _along(x, a) if known else None for a, n in enumerate(shape))


def _steps(sizes: Sequence[int], cs: Sequence[Correlation]) -> list[tuple[Correlation, float]]:
    """(c, m): of the elements that differ from a given one along some of several axes, m have the
    correlation c, the smallest of the axes along which they differ."""
    order = sorted(
        ((c, n) for c, n in zip(cs, sizes, strict=True) if n > 1),
        key=lambda pair: -math.inf if pair[0] is None else pair[0], reverse=True,
    )  # fmt: skip
    found: list[tuple[Correlation, float]] = []
    covered = 1.0
    for c, n in order:
        found.append((c, covered * (n - 1)))
        covered *= n
    return found


def together(sizes: Sequence[int], cs: Sequence[Correlation]) -> Correlation:
    """1 + Σ over the other elements of their correlation with a given one, never negative."""
    total = 1.0
    for c, m in _steps(sizes, cs):
        if c is None:
            return None
        total += c * m
    return max(total, 0.0)


def merged(sizes: Sequence[int], cs: Sequence[Correlation]) -> Correlation:
    """The mean correlation of two elements that differ along some of several axes."""
    others = math.prod(sizes) - 1
    if others <= 0:
        return cs[0] if len(cs) == 1 else 0.0 if not cs else cs[0]
    total = together(sizes, cs)
    return None if total is None else (total - 1) / others


def after_sum(c: Correlation, sizes: Sequence[int], cs: Sequence[Correlation]) -> Correlation:
    """The correlation along a kept axis, with c before, once axes with cs are summed over."""
    if c is None:
        return None
    steps = _steps(sizes, cs)
    above, below = c, 1.0
    for d, m in steps:
        if d is None:
            return None
        above += min(c, d) * m
        below += d * m
    return above / below if below > 1e-12 else 0.0


# --------------------------------------------------------------------------- operations


def strength(g: Gradient, factor: float | None) -> float | None:
    """E g²·factor, None where either is unknown."""
    return None if g.second_moment is None or factor is None else g.second_moment * factor


def energy(key: Key, sources: Mapping[str, Gradient]) -> float | None:
    """E g² per element of a source or of a stretch of it; None where it is not known."""
    name = key if isinstance(key, str) else key.source
    source = sources.get(name)
    if source is None or source.second_moment is None or isinstance(key, str):
        return None if source is None else source.second_moment
    if isinstance(key, Mixed):
        found = shared(key, key, sources)
        return None if found is None else found.second
    if isinstance(key, Folded):
        return source.second_moment * key.terms * key.whole
    own = source.profile.get(key.axis)
    level = 1.0 if own is None or own.size < key.stop else float(own[key.start : key.stop].mean())
    return source.second_moment * level * (key.share if key.placed else 1.0)


def field_of(g: Gradient, mixing: Mixing) -> Field | None:
    """E[g g′] by displacement along the axes of a map over positions."""
    if g.second_moment is None or len(g.along) <= max(mixing.axes):
        return None
    cs = [g.along[a] for a, n in zip(mixing.axes, mixing.sizes, strict=True) if n > 1]
    if any(c is None for c in cs):
        return None
    c = max((c for c in cs if c is not None), default=0.0)
    nearby = g.nearby if g.nearby is not None and g.nearby.axes == mixing.axes else None
    return Field.of(g.second_moment, c, nearby, mixing.sizes)


def shared(one: Key, two: Key, sources: Mapping[str, Gradient]) -> Field | None:
    """What two gradients that maps over positions made of one source have in common, by
    displacement; None where that is not known or the two do not fit."""
    mixing = next((k.mixing for k in (one, two) if isinstance(k, Mixed)), None)
    source = sources.get(one if isinstance(one, str) else one.source)
    if mixing is None or source is None or (field := field_of(source, mixing)) is None:
        return None
    maps = [k.mixing if isinstance(k, Mixed) else Mixing.none(mixing.axes, mixing.sizes)
            for k in (one, two)]  # fmt: skip
    sizes = [[m.weights.shape for m in mixing.maps] for mixing in maps]
    return passed(field, maps[0], maps[1] if one != two else None) if sizes[0] == sizes[1] else None


def scaled_origin(g: Gradient, a: float | None) -> dict[Key, float]:
    """The origin of a·g; empty where a is not known or 0."""
    return {s: v * a for s, v in g.origin.items()} if a else {}


def times(
    g: Gradient,
    factor: float | None,
    along: Sequence[Correlation] | None = None,
    mean: float | None = None,
    profile: Mapping[int, Profile] | None = None,
) -> Gradient:
    """g·m for an independent m with E m² = ``factor``, E m = ``mean``, correlations ``along`` the
    axes (all 1 where left out) and a profile of its own."""
    if g.second_moment is None or factor is None or not math.isfinite(factor):
        return Gradient(along=g.along)
    cs = g.along if along is None else tuple(map(both, g.along, along))
    shapes = dict(g.profile)
    share = 1.0
    for axis, values in (profile or {}).items():
        own = shapes.get(axis)
        if own is None:
            shapes[axis] = values
        elif own.size == values.size:
            joint = own * values
            level = float(joint.mean())
            share *= level
            if level > 0:
                shapes[axis] = joint / level
    return g.but(
        second_moment=g.second_moment * factor * share, along=cs, profile=shapes, aligned=None,
        origin=scaled_origin(g, mean), given=None, bend=0.0,
    )  # fmt: skip


def summed(g: Gradient, shape: Sequence[int | None], axes: Sequence[int], keep: bool) -> Gradient:
    """Σ of the gradient over axes: what a value gets that was copied along them. ``keep`` leaves
    axes of size one."""
    axes = [a for a in axes if shape[a] != 1 or not keep]
    sizes = [shape[a] for a in axes]
    if not axes:
        return g
    if any(n is None for n in sizes) or len(g.along) != len(shape):
        return UNKNOWN_GRADIENT
    counts = [n for n in sizes if n is not None]
    cs = [g.along[a] for a in axes]
    whole = together(counts, cs)
    second = None if g.second_moment is None or whole is None else (
        g.second_moment * math.prod(counts) * whole)  # fmt: skip
    if second == 0.0:
        rank = len(shape) if keep else len(shape) - len(axes)
        return no_gradient(rank)
    rest = [after_sum(c, counts, cs) for c in g.along]
    if keep:
        along = tuple(0.0 if a in axes else c for a, c in enumerate(rest))
        profile = {a: p for a, p in g.profile.items() if a not in axes}
    else:
        along = tuple(c for a, c in enumerate(rest) if a not in axes)
        place = {a: i for i, a in enumerate(a for a in range(len(shape)) if a not in axes)}
        profile = {place[a]: p for a, p in g.profile.items() if a in place}
    return Gradient(second, along, profile)


def unbroadcast(step: Back, g: Gradient, i: int) -> Gradient:
    """The gradient of input ``i`` that was broadcast to the output: summed over what was copied."""
    shape, out = step.shape(i), step.out_shape()
    if g.zero:
        return no_gradient(step.rank(i))
    if shape is None or out is None or len(shape) > len(out):
        return UNKNOWN_GRADIENT
    lead = len(out) - len(shape)
    if lead == 0 and shape == out:
        return g
    inner = [lead + a for a, n in enumerate(shape) if n == 1 and out[lead + a] != 1]
    found = summed(g, out, inner, keep=True)
    if lead:
        after = tuple(1 if a in inner else n for a, n in enumerate(out))
        found = summed(found, after, range(lead), keep=False)
    if not inner and all(n == 1 for n in out[:lead]):
        return found.but(origin=g.origin)
    origin = step.source(i)
    if not lead and len(g.along) == len(out):
        whole = together([out[a] or 1 for a in inner], [g.along[a] for a in inner])
        for key, a in g.origin.items() if whole is not None else ():
            if isinstance(key, str):
                origin[Folded(key, out, tuple(inner), whole or 0.0)] = a
    return found.but(origin=origin)


def unfolded(step: Back, axes: Sequence[int], factor: float) -> dict[Key, float]:
    """The origin of ``factor`` times a sum over axes that every element of input 0 gets: of a
    source's own elements each is in the sum, and explains of it what all have in common with it."""
    found = step.source(0)
    for key, a in step.gradient.origin.items():
        if isinstance(key, Folded) and key.shape == step.shape(0) and key.axes == tuple(axes):
            found[key.source] = found.get(key.source, 0.0) + a * factor * key.whole
    return found


def as_profile(values: npt.NDArray[Any]) -> tuple[float, Profile]:
    """(mean, values/mean)."""
    level = float(values.mean()) if values.size else 0.0
    return level, np.asarray(values / level if level > 0 else values, np.float64)
