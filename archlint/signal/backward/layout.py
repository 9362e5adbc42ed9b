"""Gradients through ops that move elements: moved back; parts are put together, copies add up."""

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
    Key,
    Profile,
    Stretch,
    as_profile,
    backwards,
    merged,
    no_gradient,
    summed,
)
from archlint.signal.layout import window_counts, windows_over
from archlint.signal.moments import Role
from archlint.signal.ranking import slots


@backwards("identity", "cast")
def _identity(step: Back) -> list[Gradient | None]:
    if step.node.attributes.get("stops_gradient"):
        return [no_gradient(step.rank(0))]
    return [step.gradient]


@backwards("flip", "roll", "channel_shuffle", "sort", "triangle", "reverse_sequence")
def _moved(step: Back) -> list[Gradient | None]:
    """The elements change places along some axes, or some are zeroed."""
    g = step.gradient
    if step.node.op == "triangle" and g.second_moment is not None:
        g = g.but(second_moment=g.second_moment / 2)
    axes = step.ints("axes") if step.node.op in ("flip", "roll") else range(len(g.along))
    profile = {a: p for a, p in g.profile.items() if a not in axes}
    return [g.but(profile=profile, origin=step.source(0))]


# --------------------------------------------------------------------------- reshapes


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Axes matched from the left in groups of equal size; axes of size one go with the next."""
    found: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        left = before[i] if old else 1
        right = after[j] if new else 1
        i, j = i + len(old), j + len(new)
        while left != right:
            if left < right and i < len(before):
                left *= before[i]
                old.append(i)
                i += 1
            elif right < left and j < len(after):
                right *= after[j]
                new.append(j)
                j += 1
            else:
                return []
        found.append((old, new))
    return found


@backwards("reshape")
def _reshape(step: Back) -> list[Gradient | None]:
    before, after, g = step.shape(0), step.out_shape(), step.gradient
    if g.zero:
        return [no_gradient(step.rank(0)), *([None] * (len(step.node.inputs) - 1))]
    rest: list[Gradient | None] = [None] * (len(step.node.inputs) - 1)
    if before is None or after is None or None in (*before, *after) or g.second_moment is None:
        return [UNKNOWN_GRADIENT, *rest]
    old, new = [n or 0 for n in before], [n or 0 for n in after]
    if len(g.along) != len(new):
        return [UNKNOWN_GRADIENT, *rest]
    roles = step.signal(0).roles
    along: list[Correlation] = [None] * len(old)
    profile: dict[int, Profile] = {}
    for left, right in _groups(old, new) or [(list(range(len(old))), list(range(len(new))))]:
        cs = _split_apart([old[a] for a in left], [roles[a] for a in left] if roles else [],
                          [new[a] for a in right], [g.along[a] for a in right])  # fmt: skip
        for a, c in zip(left, cs, strict=True):
            along[a] = c
        profile.update(_reshaped_profile(old, new, left, right, g.profile))
    return [Gradient(g.second_moment, tuple(along), profile, g.aligned, g.chosen, g.window,
                     g.excess, g.origin), *rest]  # fmt: skip


def _split_apart(
    old: Sequence[int], roles: Sequence[Role], new: Sequence[int], cs: Sequence[Correlation]
) -> list[Correlation]:
    """The correlations along the axes that a group of axes came from. A merged axis of samples and
    positions has the mean over its pairs, of which those of different samples are taken to have
    none."""
    wide = [i for i, n in enumerate(old) if n > 1]
    kept = [i for i, n in enumerate(new) if n > 1]
    if not kept:
        return [0.0] * len(old)
    if len(wide) == len(kept) and all(old[i] == new[j] for i, j in zip(wide, kept, strict=True)):
        place = dict(zip(wide, (cs[j] for j in kept), strict=True))
        return [place.get(i, 0.0) for i in range(len(old))]
    c = merged([new[j] for j in kept], [cs[j] for j in kept])
    samples = [i for i in wide if roles and roles[i] == "sample"]
    others = [i for i in wide if i not in samples]
    if c is None or not samples or not others:
        return [c] * len(old)
    count = math.prod(old[i] for i in others)
    whole = math.prod(old[i] for i in wide)
    inside = min(max(c * (whole - 1) / (count - 1), -1.0), 1.0)
    return [0.0 if i in samples else inside for i in range(len(old))]


def _reshaped_profile(
    old: Sequence[int], new: Sequence[int], left: list[int], right: list[int],
    profile: dict[int, Profile] | object,
) -> dict[int, Profile]:  # fmt: skip
    """The profile of a group: of one wide axis that many are merged into, cut into theirs."""
    assert isinstance(profile, dict)
    given = {a: p for a, p in profile.items() if a in right and new[a] > 1}
    wide = [a for a in left if old[a] > 1]
    if not given or not wide:
        return {}
    sizes = [new[a] for a in right]
    if math.prod(sizes) > LONGEST_PROFILE:
        return {}
    whole = np.ones(())
    for a in right:
        whole = np.multiply.outer(whole, given.get(a, np.ones(new[a])))
    cube = whole.reshape([old[a] for a in wide])
    found = {}
    for i, a in enumerate(wide):
        marginal = cube.mean(axis=tuple(j for j in range(len(wide)) if j != i))
        _, relative = as_profile(marginal)
        if relative.max() - relative.min() > 1e-9:
            found[a] = relative
    return found


@backwards("transpose")
def _transpose(step: Back) -> list[Gradient | None]:
    order, g = step.ints("permutation"), step.gradient
    if len(g.along) != len(order):
        return [UNKNOWN_GRADIENT]
    along: list[Correlation] = [None] * len(order)
    for i, a in enumerate(order):
        along[a] = g.along[i]
    return [g.but(along=tuple(along), profile={order[i]: p for i, p in g.profile.items()})]


# --------------------------------------------------------------------------- copies


@backwards("expand", "tile")
def _expand(step: Back) -> list[Gradient | None]:
    """What was copied gets the sum."""
    before, after, g = step.shape(0), step.out_shape(), step.gradient
    rest: list[Gradient | None] = [None] * (len(step.node.inputs) - 1)
    if g.zero:
        return [no_gradient(step.rank(0)), *rest]
    if before is None or after is None or len(before) > len(after) or None in (*before, *after):
        return [UNKNOWN_GRADIENT, *rest]
    lead = len(after) - len(before)
    wide = [lead + a for a, n in enumerate(before) if n == 1 and after[lead + a] != 1]
    repeated = [a for a, n in enumerate(before) if n not in (1, after[lead + a])]
    if repeated:
        return [UNKNOWN_GRADIENT, *rest]
    found = summed(g, after, wide, keep=True)
    if lead:
        shape = tuple(1 if a in wide else n for a, n in enumerate(after))
        found = summed(found, shape, range(lead), keep=False)
    same = not wide and all(n == 1 for n in after[:lead])
    return [found.but(origin=g.origin if same else step.source(0)), *rest]


# --------------------------------------------------------------------------- parts


@backwards("concat", "stack")
def _concat(step: Back) -> list[Gradient | None]:
    """Each part gets its own stretch of the gradient."""
    g, out, axis = step.gradient, step.out_shape(), int(step.number("axis"))
    found: list[Gradient | None] = []
    start = 0
    stacked = step.node.op == "stack"
    whole = g.profile.get(axis)
    for i in range(len(step.node.inputs)):
        shape = step.shape(i)
        size = 1 if stacked else shape[axis] if shape is not None else None
        if g.second_moment is None or shape is None or size is None or out is None:
            found.append(UNKNOWN_GRADIENT)
            continue
        if g.zero:
            found.append(no_gradient(len(shape)))
            continue
        profile = dict(g.profile)
        level = 1.0
        if whole is not None and whole.size >= start + size:
            level, part = as_profile(whole[start : start + size])
            profile[axis] = part
        along = g.along
        if stacked:
            along = (*along[:axis], *along[axis + 1 :])
            profile = {a - (a > axis): p for a, p in profile.items() if a != axis}
        start += size
        if level == 0.0:
            found.append(no_gradient(len(shape)))
            continue
        origin = step.source(i) if stacked else _cut(step, g, i, axis, start - size, start)
        if stacked and g.along[axis] == 1.0:  # all get the same
            origin = dict(g.origin)
        found.append(g.but(second_moment=g.second_moment * level, along=along, profile=profile,
                           origin=origin))  # fmt: skip
    return found


def _cut(step: Back, g: Gradient, i: int, axis: int, start: int, stop: int) -> dict[Key, float]:
    """The origin of what lies between two places of the gradient of a concatenation."""
    shape = step.out_shape() or ()
    found = step.source(i)
    for key, a in g.origin.items():
        if isinstance(key, str):
            cut = Stretch(key, shape, axis, start, stop)
        elif not isinstance(key, Stretch):
            continue
        elif key.placed and key[1:3] == (shape, axis) and key.start <= start and stop <= key.stop:
            cut = Stretch(key.source, shape, axis, start, stop)
        else:
            continue
        found[cut] = found.get(cut, 0.0) + a
    return found


def _put_back(
    step: Back, g: Gradient, axis: int, places: Sequence[int]
) -> dict[Key, float]:  # fmt: skip
    """The origin of a part that is put back among zeros: known where it was cut out there."""
    found = step.source(0)
    if len(places) == 0 or len(places) != places[-1] - places[0] + 1:
        return found
    where = (step.shape(0), axis, places[0], places[-1] + 1)
    for key, a in g.origin.items():
        if isinstance(key, Stretch) and not key.placed and key[1:5] == where:
            found[key._replace(placed=True)] = a
    return found


def _placed(
    step: Back, g: Gradient, axis: int, size: int, places: Sequence[int], length: int
) -> Gradient:
    """A part of ``length`` along an axis put back among ``size``: nothing elsewhere."""
    if length == 0:
        return no_gradient(step.rank(0))
    if g.second_moment is None:
        return UNKNOWN_GRADIENT
    share = length / size if size else 1.0
    c = g.along[axis] if axis < len(g.along) else None
    pairs = length * (length - 1) / (size * (size - 1)) if size > 1 else 1.0
    inside = None if c is None else c * pairs / share if share else 0.0
    profile = dict(g.profile)
    own = profile.pop(axis, None)
    if size <= LONGEST_PROFILE and share < 1 and places is not None:
        spread = np.zeros(size)
        np.add.at(spread, np.asarray(places, np.intp), own if own is not None and own.size == length
                  else np.ones(length))  # fmt: skip
        profile[axis] = spread / spread.mean() if spread.mean() > 0 else spread
    elif own is not None and share == 1:
        profile[axis] = own
    along = tuple(inside if a == axis else d for a, d in enumerate(g.along))
    return g.but(second_moment=g.second_moment * share, along=along, profile=profile,
                 origin=_put_back(step, g, axis, places))  # fmt: skip


@backwards("split")
def _split(step: Back) -> list[Gradient | None]:
    """The parts side by side."""
    shape, axis = step.shape(0), int(step.number("axis"))
    size = shape[axis] if shape is not None else None
    if shape is None or size is None:
        return [UNKNOWN_GRADIENT]
    second = 0.0
    spread = np.zeros(size) if size <= LONGEST_PROFILE else None
    start = 0
    parts: list[tuple[Gradient, float]] = []
    origin = step.source(0)
    for i, g in enumerate(step.arriving):
        out = step.out_shape(i)
        length = out[axis] if out is not None else None
        if g.second_moment is None or length is None:
            return [UNKNOWN_GRADIENT]
        second += g.second_moment * length / size
        if spread is not None:
            own = g.profile.get(axis)
            spread[start : start + length] = g.second_moment * (
                own if own is not None and own.size == length else 1.0)  # fmt: skip
        origin |= _put_back(step, g, axis, range(start, start + length))
        start += length
        parts.append((g, g.second_moment * length / size))
    if second == 0.0:
        return [no_gradient(len(shape))]
    return [_side_by_side(step, parts, axis, second, spread).but(origin=origin)]


def _side_by_side(
    step: Back, parts: Sequence[tuple[Gradient, float]], axis: int, second: float,
    spread: Profile | None,
) -> Gradient:  # fmt: skip
    along: list[Correlation] = []
    for a in range(step.rank(0)):
        cs = [(g.along[a], w) for g, w in parts if w > 0]
        if any(c is None for c, _ in cs):
            along.append(None)
        elif a == axis:
            n = max(len(parts), 1)
            along.append(sum((c or 0.0) * w for c, w in cs) / second / n)
        else:
            along.append(sum((c or 0.0) * w for c, w in cs) / second)
    profile: dict[int, Profile] = {}
    if spread is not None and spread.max() - spread.min() > 1e-9 * spread.max():
        profile[axis] = spread / spread.mean()
    for a in {a for g, _ in parts for a in g.profile if a != axis}:
        size = next(g.profile[a].size for g, _ in parts if a in g.profile)
        mix = sum((w / second * g.profile.get(a, np.ones(size)) for g, w in parts), np.zeros(size))
        profile[a] = mix
    return Gradient(second, tuple(along), profile)


def _indices(size: int, start: int, end: int, stride: int) -> range:
    return range(*slice(start, end, stride).indices(size))


@backwards("slice")
def _slice(step: Back) -> list[Gradient | None]:
    shape, g = step.shape(0), step.gradient
    if g.zero:
        return [no_gradient(step.rank(0))]
    if shape is None:
        return [UNKNOWN_GRADIENT]
    axes, starts, ends = step.ints("axes"), step.ints("starts"), step.ints("ends")
    steps = step.ints("steps")
    for axis, start, end, stride in zip(axes, starts, ends, steps, strict=True):
        size = shape[axis]
        if size is None:
            return [UNKNOWN_GRADIENT]
        places = _indices(size, start, end, stride)
        if len(places) != size:
            g = _placed(step, g, axis, size, places, len(places))
    return [g]


@backwards("select_index")
def _select_index(step: Back) -> list[Gradient | None]:
    shape, axis, g = step.shape(0), int(step.number("axis")), step.gradient
    if g.zero:
        return [no_gradient(step.rank(0))]
    size = shape[axis] if shape is not None else None
    if size is None or g.second_moment is None:
        return [UNKNOWN_GRADIENT]
    wide = g.but(along=(*g.along[:axis], 0.0, *g.along[axis:]),
                 profile={a + (a >= axis): p for a, p in g.profile.items()})  # fmt: skip
    index = int(step.number("index"))
    return [_placed(step, wide, axis, size, [index % size], 1)]


@backwards("dynamic_slice")
def _dynamic_slice(step: Back) -> list[Gradient | None]:
    """What is not taken gets nothing; where it lies is not known."""
    before, after, g = step.shape(0), step.out_shape(), step.gradient
    if before is None or after is None or None in (*before, *after) or g.second_moment is None:
        return [UNKNOWN_GRADIENT]
    share = math.prod(n or 1 for n in after) / max(math.prod(n or 1 for n in before), 1)
    return [Gradient(g.second_moment * share, g.along, origin=step.source(0))]


@backwards("gather")
def _gather(step: Back) -> list[Gradient | None]:
    """Rows that are picked get theirs; picked twice, twice."""
    shape, g = step.shape(0), step.gradient
    axis = int(step.number("axis"))
    each = slots(step.graph, step.node)
    if each and g.second_moment is not None and g.along:  # independent, of different experts
        rows = None if g.along[0] is None else min(g.along[0] * each, 1.0)
        return [Gradient(g.second_moment * each, (rows, *g.along[1:]), origin=step.source(0)), None]
    picked, indices = step.constant(1), step.shape(1)
    if g.zero:
        return [no_gradient(step.rank(0)), None]
    size = shape[axis] if shape is not None else None
    if size is None or shape is None or indices is None or None in indices or not g.along:
        return [UNKNOWN_GRADIENT, None]
    extra = len(indices)
    if len(g.along) != len(shape) - 1 + extra or g.second_moment is None:
        return [UNKNOWN_GRADIENT, None]
    count = math.prod(n or 1 for n in indices)
    inner = merged([n or 1 for n in indices], g.along[axis : axis + extra]) if extra else 0.0
    flat = Gradient(g.second_moment, (*g.along[:axis], inner, *g.along[axis + extra :]))
    places = [int(i) % size for i in picked.reshape(-1)] if picked is not None else None
    if places is not None and len(set(places)) == len(places):
        return [_placed(step, flat, axis, size, places, count), None]
    repeats = count / size if places is None else 0.0
    if places is not None:
        met = np.bincount(places, minlength=size)
        repeats = float((met * (met - 1)).sum()) / count
    if inner is None:
        return [UNKNOWN_GRADIENT, None]
    second = g.second_moment * count / size * (1 + repeats * inner)
    return [flat.but(second_moment=second, origin=step.source(0)), None]


@backwards("gather_elements", "gather_nd", "topk", "diagonal", "compress")
def _some(step: Back) -> list[Gradient | None]:
    """Distinct elements that are picked get theirs, the others none."""
    before, after, g = step.shape(0), step.out_shape(), step.gradient
    rest: list[Gradient | None] = [None] * (len(step.node.inputs) - 1)
    if g.zero:
        return [no_gradient(step.rank(0)), *rest]
    if before is None or after is None or None in (*before, *after) or g.second_moment is None:
        return [UNKNOWN_GRADIENT, *rest]
    share = math.prod(n or 1 for n in after) / max(math.prod(n or 1 for n in before), 1)
    along = g.along if len(g.along) == len(before) else (0.0,) * len(before)
    return [Gradient(g.second_moment * share, along, origin=step.source(0)), *rest]


@backwards("scatter_elements", "scatter_nd", "index_put")
def _scatter(step: Back) -> list[Gradient | None]:
    """The tensor keeps its gradient but where it was written over; the updates get it there."""
    g, shape = step.gradient, step.shape(0)
    updates = 1 if step.node.op == "index_put" else 2
    found: list[Gradient | None] = [None] * len(step.node.inputs)
    part = step.shape(updates)
    if g.second_moment is None or shape is None or part is None or None in (*shape, *part):
        found[0] = UNKNOWN_GRADIENT
        found[updates] = UNKNOWN_GRADIENT
        return found
    share = math.prod(n or 1 for n in part) / max(math.prod(n or 1 for n in shape), 1)
    adds = bool(step.node.attributes.get("accumulate")) or str(
        step.node.attributes.get("reduction", "none")) == "add"  # fmt: skip
    left = 1.0 if adds else max(1 - share, 0.0)
    found[0] = g.but(second_moment=g.second_moment * left, origin=step.source(0))
    along = g.along if len(part) == len(shape) else (0.0,) * len(part)
    found[updates] = Gradient(g.second_moment, along, origin=step.source(updates))
    return found


# --------------------------------------------------------------------------- blocks and borders


@backwards("depth_to_space", "space_to_depth")
def _blocks(step: Back) -> list[Gradient | None]:
    """A permutation of the elements: what positions of a block share becomes what channels do."""
    g, shape = step.gradient, step.shape(0)
    if shape is None or len(g.along) != len(shape) or len(shape) < 3:
        return [UNKNOWN_GRADIENT]
    c_feature, c_position = g.along[1], g.along[2]
    feature = c_position if step.node.op == "depth_to_space" else c_feature
    position = c_position if step.node.op == "depth_to_space" else c_feature
    if step.node.op == "depth_to_space":
        block = int(step.number("block"))
        channels = max((shape[1] or 1) // block ** (len(shape) - 2), 1)
        feature = merged([block ** (len(shape) - 2), channels], [c_position, c_feature])
    along = (g.along[0], feature, *(position for _ in shape[2:]))
    return [g.but(along=along, profile={}, origin=step.source(0), aligned=None)]


@backwards("windows")
def _windows(step: Back) -> list[Gradient | None]:
    """Every element gets what the windows that hold it get."""
    g, shape, axis = step.gradient, step.shape(0), int(step.number("axis"))
    size, length = int(step.number("size")), step.out_shape()
    if shape is None or length is None or g.second_moment is None or shape[axis] is None:
        return [UNKNOWN_GRADIENT]
    total = (length[axis] or 0) * size / (shape[axis] or 1)
    overlap = max(total - 1, 0.0)
    c = g.along[axis]
    if c is None:
        return [UNKNOWN_GRADIENT]
    second = g.second_moment * total * (1 + overlap * c)
    return [Gradient(second, g.along[:-1], origin=step.source(0))]


@backwards("unfold")
def _unfold(step: Back) -> list[Gradient | None]:
    """Patches [sample, channel·taps, position]: an element gets the sum over the m patches it is
    in, of different taps at different places: E g²·(m + m(m − 1)c)."""
    g, shape, out = step.gradient, step.shape(0), step.out_shape()
    if g.zero:
        return [no_gradient(step.rank(0))]
    if (shape is None or out is None or g.second_moment is None or None in (*shape, *out)
            or len(g.along) != 3):  # fmt: skip
        return [UNKNOWN_GRADIENT]
    size = [n or 0 for n in shape[2:]]
    one, two = windows_over(step, size, window_counts(step, size))
    c = None if None in g.along[1:] else min(c or 0.0 for c in g.along[1:])
    if c is None or one <= 0:
        return [UNKNOWN_GRADIENT]
    second = g.second_moment * (one + max(two - one, 0.0) * c)
    if second <= 0:
        return [no_gradient(step.rank(0))]
    # two places share all pairs of their patches
    apart = min(g.second_moment * one * one * c / second, 1.0)
    along = (g.along[0], g.along[1], *((apart,) * len(size)))
    return [Gradient(second, along, origin=step.source(0))]


@backwards("fold")
def _fold(step: Back) -> list[Gradient | None]:
    """Copies of the map's gradient to every patch that holds the place."""
    g, shape, out = step.gradient, step.shape(0), step.out_shape()
    if g.zero:
        return [no_gradient(step.rank(0))]
    if (shape is None or out is None or None in (*shape, *out) or len(g.along) != 4
            or g.second_moment is None):  # fmt: skip
        return [UNKNOWN_GRADIENT]
    size = [n or 0 for n in out[2:]]
    one, _ = windows_over(step, size, window_counts(step, size))
    taps = math.prod(step.ints("kernel"))
    share = min(one * math.prod(size) / max(taps * (shape[2] or 0), 1), 1.0)
    spots = None if None in g.along[2:] else min(c or 0.0 for c in g.along[2:])
    feature = merged([max((shape[1] or 0) // taps, 1), taps], [g.along[1], spots])
    return [Gradient(g.second_moment * share, (g.along[0], feature, spots),
                     origin=step.source(0))]  # fmt: skip


@backwards("pad")
def _pad(step: Back) -> list[Gradient | None]:
    """Cropped again; what was padded with copies adds up on what was copied."""
    shape, out, g = step.shape(0), step.out_shape(), step.gradient
    rest: list[Gradient | None] = [None] * (len(step.node.inputs) - 1)
    if g.zero:
        return [no_gradient(step.rank(0)), *rest]
    if shape is None or out is None or None in (*shape, *out) or g.second_moment is None:
        return [UNKNOWN_GRADIENT, *rest]
    padding, rank = step.ints("padding"), len(shape)
    constant = str(step.attribute("mode")) == "constant"
    profile = dict(g.profile)
    level = 1.0
    moved = False
    for a in range(rank):
        begin, size = padding[a], shape[a] or 0
        if padding[a] == padding[rank + a] == 0:
            continue
        moved = True
        own = profile.pop(a, None)
        if own is None:
            own = np.ones(out[a] or 0)
        if constant:
            places = np.arange(size) + begin
            inside = (places >= 0) & (places < own.size)
            part = np.where(inside, own[np.clip(places, 0, own.size - 1)], 0.0)
            step_level, relative = as_profile(part)
        else:
            step_level, relative = (out[a] or 0) / max(size, 1), np.ones(size)
        level *= step_level
        if relative.size and relative.max() - relative.min() > 1e-9:
            profile[a] = relative
    if level == 0.0:
        return [no_gradient(rank), *rest]
    return [g.but(second_moment=g.second_moment * level, profile=profile,
                  origin=step.source(0) if moved else g.origin), *rest]  # fmt: skip
