"""Gradients through pooling, reductions and resizing: shared out among what was averaged, or sent
to what was picked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from archlint.signal.gradient import (
    LONGEST_PROFILE,
    UNKNOWN_GRADIENT,
    Back,
    Correlation,
    Gradient,
    Mixed,
    along_of,
    as_profile,
    backwards,
    field_of,
    no_gradient,
    times,
    together,
    unfolded,
)
from archlint.signal.mixing import adaptive_averaging, averaging, resampling
from archlint.signal.moments import Nearby
from archlint.signal.neighbours import Mixing, evened, passed


def spread_out(step: Back, mixing: Mixing | None) -> Gradient:
    """Through a map over positions y = A x: g_x = Aᵀ g (signal.neighbours)."""
    g, shape = step.gradient, step.shape(0)
    if g.zero:
        return no_gradient(step.rank(0))
    if mixing is None or shape is None or len(g.along) != len(shape):
        return UNKNOWN_GRADIENT
    back = mixing.transposed
    before = field_of(g, back)
    if before is None:
        return UNKNOWN_GRADIENT
    field = passed(before, back)
    second, own = field.second, before.second - before.far
    profile = {a: p for a, p in g.profile.items() if a not in mixing.axes}
    alone = uneven = 1.0
    for a, m in zip(mixing.axes, mixing.maps, strict=True):
        squares = np.square(m.weights)
        alone *= float(squares.sum(axis=0).mean())
        values = g.profile.get(a)
        if values is not None and values.size == squares.shape[0]:
            squares = squares * values[:, None]
        level, relative = as_profile(squares.sum(axis=0))
        uneven *= level
        if relative.size <= LONGEST_PROFILE and relative.max() - relative.min() > 1e-9:
            profile[a] = relative
    second += own * (uneven - alone)
    if second <= 0:
        return no_gradient(step.rank(0))
    between = min(max(field.mean / second, -1.0), 1.0)
    along = tuple(between if a in mixing.axes else c for a, c in enumerate(g.along))
    origin = step.source(0)
    for key, v in g.origin.items():
        if isinstance(key, str):
            origin[Mixed(key, back)] = v
        elif isinstance(key, Mixed) and (whole := back.after(key.mixing)) is not None:
            origin[Mixed(key.source, whole)] = v
    even = [profile.get(a, np.ones(n)) for a, n in zip(mixing.axes, field.sizes, strict=True)]
    nearby = evened(field, even).nearby(mixing.axes)
    return Gradient(second, along, profile, origin=origin, nearby=nearby)


@backwards("avg_pool")
def _avg_pool(step: Back) -> list[Gradient | None]:
    """A window's gradient is shared out among what it is the mean of."""
    return [spread_out(step, averaging(step))]


@backwards("adaptive_avg_pool")
def _adaptive_avg_pool(step: Back) -> list[Gradient | None]:
    return [spread_out(step, adaptive_averaging(step))]


def _routed(step: Back, g: Gradient, first: int, kernel: Sequence[int], stride: Sequence[int]
            ) -> Gradient:  # fmt: skip
    """Each window sends its gradient to its greatest element. Two overlapping windows pick the same
    one with the share of what they hold in common, and then what they send adds up."""
    shape, out = step.shape(0), step.out_shape()
    if g.zero:
        return no_gradient(step.rank(0))
    if (shape is None or out is None or g.second_moment is None or None in shape[first:]
            or None in out[first:] or len(g.along) != len(out)):  # fmt: skip
        return UNKNOWN_GRADIENT
    spots = [c for c, n in zip(g.along[first:], out[first:], strict=True) if n != 1]
    if any(c is None for c in spots):
        return UNKNOWN_GRADIENT
    c = max((c for c in spots if c is not None), default=0.0)
    before = math.prod(n or 1 for n in shape[first:])
    after = math.prod(n or 1 for n in out[first:])
    nearby = g.nearby if g.nearby is not None and g.nearby.axes == tuple(
        range(first, len(out))) else None  # fmt: skip
    shared = 1 + _same_pick(kernel, stride, [n or 1 for n in out[first:]], c, nearby)
    second = g.second_moment * after / before * shared
    whole = after * g.second_moment * (1 + (after - 1) * c)
    between = (whole / (before * second) - 1) / (before - 1) if before > 1 else 0.0
    along = (*g.along[:first], *(min(max(between, -1.0), 1.0) for _ in shape[first:]))
    count = math.prod(kernel)
    origin = ({s: v / count for s, v in g.origin.items()} if shape == out and count > 1
              else step.source(0))  # fmt: skip
    profile = {a: p for a, p in g.profile.items() if a < first}
    return Gradient(second, along, profile, chosen=1.0, window=count, origin=origin)


def _same_pick(
    kernel: Sequence[int], stride: Sequence[int], out: Sequence[int], c: float,
    nearby: Nearby | None,
) -> float:  # fmt: skip
    """Over the other windows, the probability that they pick the element that one window picks
    times what the two gradients have in common: two that share m of k elements agree with
    probability m/(2k − m)."""
    reach = [range(-((k - 1) // s), (k - 1) // s + 1) for k, s in zip(kernel, stride, strict=True)]
    size = math.prod(kernel)
    if math.prod(len(r) for r in reach) > 4096:
        return 0.0
    total = 0.0
    for shift in np.array(np.meshgrid(*reach, indexing="ij")).reshape(len(kernel), -1).T:
        if not shift.any():
            continue
        common = math.prod(max(k - abs(int(d)) * s, 0)
                           for k, s, d in zip(kernel, stride, shift, strict=True))  # fmt: skip
        there = math.prod(max(n - abs(int(d)), 0) / n for n, d in zip(out, shift, strict=True))
        alike = c if nearby is None else nearby.at(tuple(int(d) for d in shift))
        total += common / (2 * size - common) * there * alike
    return total


@backwards("max_pool")
def _max_pool(step: Back) -> list[Gradient | None]:
    kernel = step.ints("kernel")
    if math.prod(kernel) == 1 and step.shape(0) == step.out_shape():
        return [step.gradient]
    return [_routed(step, step.gradient, 2, kernel, step.ints("stride"))]


@backwards("adaptive_max_pool")
def _adaptive_max_pool(step: Back) -> list[Gradient | None]:
    shape, sizes = step.shape(0), step.ints("size")
    if shape is None or None in shape[len(shape) - len(sizes) :]:
        return [UNKNOWN_GRADIENT]
    first = len(shape) - len(sizes)
    kernel = [max(round((shape[first + a] or 0) / n), 1) for a, n in enumerate(sizes)]
    return [_routed(step, step.gradient, first, kernel, kernel)]


# --------------------------------------------------------------------------- reductions


def _widened(step: Back, g: Gradient, same: Correlation) -> Gradient | None:
    """The gradient of a reduction's result as a tensor of its input's rank, ``same`` along the
    axes that were reduced."""
    shape, axes = step.shape(0), step.ints("axes")
    if shape is None or any(shape[a] is None for a in axes):
        return None
    keep = bool(step.attribute("keepdims"))
    kept = [a for a in range(len(shape)) if a not in axes]
    if keep:
        along = tuple(same if a in axes else c for a, c in enumerate(g.along))
        profile = {a: p for a, p in g.profile.items() if a not in axes}
    else:
        if len(g.along) != len(kept):
            return None
        place = dict(zip(kept, g.along, strict=True))
        along = tuple(place.get(a, same) for a in range(len(shape)))
        profile = {kept[a]: p for a, p in g.profile.items()}
    return g.but(along=along, profile=profile, aligned=None)


def _count(step: Back) -> int:
    shape = step.shape(0) or ()
    return math.prod(shape[a] or 1 for a in step.ints("axes"))


@backwards("reduce_mean", "reduce_sum")
def _reduce(step: Back) -> list[Gradient | None]:
    """Every element gets the same: g/n of a mean, g of a sum."""
    g = step.gradient
    if g.zero:
        return [no_gradient(step.rank(0))]
    found = _widened(step, g, 1.0)
    if found is None or found.second_moment is None:
        return [UNKNOWN_GRADIENT]
    n = _count(step) if step.node.op == "reduce_mean" else 1
    origin = g.origin if _count(step) == 1 else unfolded(step, step.ints("axes"), 1 / n)
    return [found.but(second_moment=found.second_moment / n**2, origin=origin, chosen=0.0)]


@backwards("reduce_max", "reduce_min")
def _reduce_max(step: Back) -> list[Gradient | None]:
    """To the greatest: 1/n of the elements."""
    g, shape = step.gradient, step.shape(0)
    if g.zero:
        return [no_gradient(step.rank(0))]
    found = _widened(step, g, 0.0)
    if found is None or found.second_moment is None or shape is None:
        return [UNKNOWN_GRADIENT]
    n = _count(step)
    positive = step.node.op == "reduce_max"
    return [found.but(second_moment=found.second_moment / n, origin=step.source(0),
                      chosen=1.0 if positive else 0.0, window=n)]  # fmt: skip


@backwards("reduce_var", "reduce_std", "reduce_l2")
def _reduce_size(step: Back) -> list[Gradient | None]:
    """∂var = 2(x − m)/n, ∂std = (x − m)/(n·std), ∂‖x‖ = x/‖x‖: along the centred element."""
    g, x, shape = step.gradient, step.signal(0), step.shape(0)
    if g.zero:
        return [no_gradient(step.rank(0))]
    found = _widened(step, g, 1.0)
    if found is None or not x.second_moment or shape is None:
        return [UNKNOWN_GRADIENT]
    n = _count(step)
    outer = along_of(x, shape)
    axes = step.ints("axes")
    whole = together([shape[a] or 1 for a in axes], [outer[a] for a in axes])
    if whole is None:
        return [UNKNOWN_GRADIENT]
    share = 0.0 if step.node.op == "reduce_l2" else min(whole / n, 1.0)
    variance = x.second_moment * (1 - share)
    if variance <= 0:
        return [UNKNOWN_GRADIENT]
    factor = {"reduce_var": 4 * variance / n**2, "reduce_std": 1 / n**2,
              "reduce_l2": 1 / n}[step.node.op]  # fmt: skip
    centred = tuple(None if c is None else (c - share) / (1 - share) if share < 1 else 1.0
                    for c in outer)  # fmt: skip
    return [times(found, factor, centred).but(origin=step.source(0))]


@backwards("reduce_logsumexp")
def _logsumexp(step: Back) -> list[Gradient | None]:
    """Σ of the softmax: p·g, between 1/n² and 1/n; known for weak logits."""
    g, x = step.gradient, step.signal(0)
    found = _widened(step, g, 1.0)
    if found is None or x.variance is None or x.variance > 1 or found.second_moment is None:
        return [UNKNOWN_GRADIENT]
    n = _count(step)
    return [found.but(second_moment=found.second_moment * math.exp(x.variance) / n**2,
                      origin=step.source(0))]  # fmt: skip


# --------------------------------------------------------------------------- resizing


@backwards("resize")
def _resize(step: Back) -> list[Gradient | None]:
    """By the weights of the interpolation itself, axis by axis."""
    return [spread_out(step, resampling(step))]


@backwards("grid_sample")
def _grid_sample(step: Back) -> list[Gradient | None]:
    """Where it samples depends on activations: unknown."""
    return [UNKNOWN_GRADIENT, UNKNOWN_GRADIENT]
