"""Gradients through pooling, reductions and resizing: shared out among what was averaged, or sent
to what was picked."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from archlint.signal.gradient import (
    LONGEST_PROFILE,
    UNKNOWN_GRADIENT,
    Back,
    Correlation,
    Gradient,
    along_of,
    as_profile,
    backwards,
    no_gradient,
    times,
    together,
    unfolded,
)

Floats = npt.NDArray[np.float64]
Taps = tuple[npt.NDArray[np.int64], Floats]  # where[o, t] and weight[o, t] along one axis


def spread_out(step: Back, g: Gradient, first: int, taps: Sequence[Taps]) -> Gradient:
    """The transpose of y_o = Σ_t w_ot x_{where[o, t]} along the axes from ``first`` on.

    With one correlation c between positions E g_x² = E g²·((1 − c)·Π mean_i Σ_o A_oi²
    + c·Π mean_i (Σ_o A_oi)²). Where every row sums to one the sum over positions stays, which gives
    the correlation afterwards. ``same`` is the coefficient of an element in itself, where in and
    out have one shape.
    """
    shape, square = step.shape(0), step.shape(0) == step.out_shape()
    if g.second_moment is None or shape is None or len(g.along) < first + len(taps):
        return UNKNOWN_GRADIENT
    spots = [g.along[first + a] for a, (w, _) in enumerate(taps) if w.shape[0] > 1]
    if any(c is None for c in spots):
        return UNKNOWN_GRADIENT
    c = max((c for c in spots if c is not None), default=0.0)
    alone = joint = same = 1.0
    before = after = 1
    profile = {a: p for a, p in g.profile.items() if not first <= a < first + len(taps)}
    for a, (where, weight) in enumerate(taps):
        size = shape[first + a] or 0
        inside = (where >= 0) & (where < size)
        values = g.profile.get(first + a)
        if values is None or values.size != where.shape[0]:
            values = np.ones(where.shape[0])
        share = np.broadcast_to(values[:, None], where.shape)
        squares = np.bincount(where[inside], (weight**2 * share)[inside], size)
        sums = np.bincount(where[inside], weight[inside], size)
        level, relative = as_profile(squares)
        alone *= level
        joint *= float((sums * sums).mean())
        if square:
            itself = where == np.arange(where.shape[0])[:, None]
            same *= float((weight * itself).sum()) / where.shape[0]
        if size <= LONGEST_PROFILE and relative.max() - relative.min() > 1e-9:
            profile[first + a] = relative
        before *= size
        after *= where.shape[0]
    second = g.second_moment * ((1 - c) * alone + c * joint)
    if second <= 0:
        return no_gradient(step.rank(0))
    whole = after * g.second_moment * (1 + (after - 1) * c)
    between = (whole / (before * second) - 1) / (before - 1) if before > 1 else 0.0
    between = min(max(between, -1.0), 1.0)
    along = tuple(between if first <= a < first + len(taps) else d for a, d in enumerate(g.along))
    origin = step.source(0)
    if square:
        origin |= {s: v * same for s, v in g.origin.items()}
    return Gradient(second, along, profile, origin=origin)


@backwards("avg_pool")
def _avg_pool(step: Back) -> list[Gradient | None]:
    shape, out, g = step.shape(0), step.out_shape(), step.gradient
    if g.zero:
        return [no_gradient(step.rank(0))]
    if shape is None or out is None or None in (*shape[2:], *out[2:]):
        return [UNKNOWN_GRADIENT]
    kernel, stride, padding = step.ints("kernel"), step.ints("stride"), step.ints("padding")
    taps: list[Taps] = []
    dims = len(shape) - 2
    for a in range(dims):
        size, length = shape[2 + a] or 0, out[2 + a] or 0
        where = np.arange(length)[:, None] * stride[a] + np.arange(kernel[a]) - padding[a]
        inside = (where >= 0) & (where < size)
        if step.attribute("count_padding"):
            counted = (where >= 0) & (where < size + padding[dims + a]) | (where < 0)
            count = counted.sum(axis=1, keepdims=True)
        else:
            count = inside.sum(axis=1, keepdims=True)
        taps.append((where, np.broadcast_to(1 / np.maximum(count, 1), where.shape)))
    divisor = step.attribute("divisor")
    found = spread_out(step, g, 2, taps)
    if isinstance(divisor, int) and divisor and found.second_moment is not None:
        ratio = math.prod(kernel) / divisor
        found = found.but(second_moment=found.second_moment * ratio**2)
    return [found]


@backwards("adaptive_avg_pool")
def _adaptive_avg_pool(step: Back) -> list[Gradient | None]:
    """Output o averages the places from ⌊o·n/m⌋ up to ⌈(o+1)·n/m⌉."""
    shape, sizes, g = step.shape(0), step.ints("size"), step.gradient
    if g.zero:
        return [no_gradient(step.rank(0))]
    if shape is None or None in shape[len(shape) - len(sizes) :]:
        return [UNKNOWN_GRADIENT]
    first = len(shape) - len(sizes)
    taps: list[Taps] = []
    for a, length in enumerate(sizes):
        size = shape[first + a] or 0
        o = np.arange(length)
        begin, end = o * size // length, -((-(o + 1) * size) // length)
        where = begin[:, None] + np.arange(int((end - begin).max()))
        where = np.where(where < end[:, None], where, -1)
        taps.append((where, np.broadcast_to(1 / (end - begin)[:, None], where.shape)))
    return [spread_out(step, g, first, taps)]


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
    shared = 1 + c * _same_pick(kernel, stride, [n or 1 for n in out[first:]])
    second = g.second_moment * after / before * shared
    whole = after * g.second_moment * (1 + (after - 1) * c)
    between = (whole / (before * second) - 1) / (before - 1) if before > 1 else 0.0
    along = (*g.along[:first], *(min(max(between, -1.0), 1.0) for _ in shape[first:]))
    count = math.prod(kernel)
    origin = ({s: v / count for s, v in g.origin.items()} if shape == out and count > 1
              else step.source(0))  # fmt: skip
    profile = {a: p for a, p in g.profile.items() if a < first}
    return Gradient(second, along, profile, chosen=1.0, window=count, origin=origin)


def _same_pick(kernel: Sequence[int], stride: Sequence[int], out: Sequence[int]) -> float:
    """The expected number of other windows that pick the element that one window picks: two that
    share m of k elements agree with probability m/(2k − m)."""
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
        total += common / (2 * size - common) * there
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


def _merged(where: npt.NDArray[np.int64], weight: Floats) -> Taps:
    """Taps that the border pushed onto one place, as one."""
    weight = weight.copy()
    for t in range(where.shape[1] - 1, 0, -1):
        again = where[:, t] == where[:, t - 1]
        weight[:, t - 1] += weight[:, t] * again
        weight[:, t] *= ~again
    return where, weight


def _linear_taps(size: int, length: int, align: bool) -> Taps:
    o = np.arange(length, dtype=np.float64)
    if align:
        at = o * ((size - 1) / max(length - 1, 1))
    else:
        at = np.maximum((o + 0.5) * size / length - 0.5, 0.0)
    low = np.minimum(np.floor(at).astype(np.int64), size - 1)
    t = np.clip(at - low, 0.0, 1.0)
    where = np.stack([low, np.minimum(low + 1, size - 1)], axis=1)
    return _merged(where, np.stack([1 - t, t], axis=1))


def _cubic_taps(size: int, length: int, align: bool) -> Taps:
    """Keys' kernel with a = −3/4, as torch and ONNX have it."""
    o = np.arange(length, dtype=np.float64)
    at = o * ((size - 1) / max(length - 1, 1)) if align else (o + 0.5) * size / length - 0.5
    low = np.floor(at).astype(np.int64)
    offsets = np.arange(-1, 3)
    d = np.abs(at[:, None] - (low[:, None] + offsets))
    a = -0.75
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    weight = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
    return _merged(np.clip(low[:, None] + offsets, 0, size - 1), weight)


def _nearest_taps(size: int, length: int) -> Taps:
    where = np.minimum(np.arange(length) * size // max(length, 1), size - 1)[:, None]
    return where, np.ones((length, 1))


@backwards("resize")
def _resize(step: Back) -> list[Gradient | None]:
    """By the weights of the interpolation itself, axis by axis."""
    shape, out, g = step.shape(0), step.out_shape(), step.gradient
    mode, align = str(step.attribute("mode")), bool(step.attribute("align_corners"))
    if g.zero:
        return [no_gradient(step.rank(0))]
    if shape is None or out is None or None in (*shape[2:], *out[2:]):
        return [UNKNOWN_GRADIENT]
    taps: list[Taps] = []
    for size, length in zip(shape[2:], out[2:], strict=True):
        assert size is not None  # checked above
        assert length is not None
        if mode.startswith("nearest"):
            taps.append(_nearest_taps(size, length))
        elif mode in ("linear", "bilinear", "trilinear"):
            taps.append(_linear_taps(size, length, align))
        elif mode in ("cubic", "bicubic"):
            taps.append(_cubic_taps(size, length, align))
        else:
            return [UNKNOWN_GRADIENT]
    return [spread_out(step, g, 2, taps)]


@backwards("grid_sample")
def _grid_sample(step: Back) -> list[Gradient | None]:
    """Where it samples depends on activations: unknown."""
    return [UNKNOWN_GRADIENT, UNKNOWN_GRADIENT]
