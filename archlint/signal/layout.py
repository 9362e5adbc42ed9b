"""Ops that move elements: what they do to roles, and to moments where they mix parts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from archlint.graph.model import LayerGraph
from archlint.signal.affine import multiplied_matrices
from archlint.signal.elementwise import joined
from archlint.signal.moments import UNKNOWN_SIGNAL, Factors, Role, Signal
from archlint.signal.parts import parts_profile, taken, weighted_mean
from archlint.signal.ranking import chooser, of_picked, slots
from archlint.signal.transfer import (
    Step,
    correlated,
    factors,
    known_size,
    product,
    row_correlation,
    transfers,
    without_positions,
)

Shape = tuple[int | None, ...]


@transfers("identity", "flip", "reverse_sequence", "roll", "channel_shuffle", "sort", "compress",
           "dynamic_slice", "weight_norm")  # fmt: skip
def _same(step: Step) -> tuple[Signal, ...]:
    """The elements stay what they are; further outputs hold positions."""
    x = step.signal(0)
    shape, out = step.shape(0), step.out_shape()
    if step.node.op in ("flip", "reverse_sequence", "roll", "triangle", "sort") or shape != out:
        x = x.but(profile={})
    return (x, *(UNKNOWN_SIGNAL for _ in step.node.outputs[1:]))


@transfers("cast")
def _cast(step: Step) -> Signal:
    """Another type of number. Whole numbers are the real ones no longer."""
    values = step.graph.values
    before, after = values[step.value(0) or ""].dtype, values[step.node.outputs[0]].dtype
    x = step.signal(0)
    whole = after is not None and after.startswith(("int", "uint", "bool"))
    if whole and before is not None and "float" in before:
        return Signal(roles=x.roles)
    return x


@transfers("triangle")
def _triangle(step: Step) -> Signal:
    """Zeros above or below a diagonal: the moments of what is left, times its share."""
    x, shape = step.signal(0), step.shape(0)
    if shape is None or len(shape) < 2 or (rows := shape[-2]) is None or (n := shape[-1]) is None:
        return Signal(roles=x.roles)
    shift = int(step.number("diagonal"))
    kept = np.tri(rows, n, shift - 1 if step.attribute("upper") else shift)
    share = float(kept.mean())
    share = 1 - share if step.attribute("upper") else share
    if share == 1.0 or x.second_moment is None:
        return x
    return Signal(product(x.mean, share), x.second_moment * share, odd_in=x.odd_in,
                  one_sided=x.one_sided, roles=x.roles)  # fmt: skip


@transfers("scatter_elements", "scatter_nd", "index_put")
def _written(step: Step) -> Signal:
    """A tensor that is written to at some places, or has something added there.

    Exact by the share of the places where these are known and none is met twice; where they depend
    on data only what holds of the old and the new elements alike is known.
    """
    x = step.signal(0)
    put = step.node.op == "index_put"
    new = step.signal(1 if put else 2)
    reduction = str(step.node.attributes.get("reduction", "none"))
    adds = bool(step.node.attributes.get("accumulate")) or reduction == "add"
    if adds:
        if new.second_moment == 0:
            return x.but(profile={})
        if x.second_moment != 0:
            return Signal(roles=x.roles)
    elif reduction != "none":
        return Signal(roles=x.roles)
    written, once = _places(step)
    if written is None or (adds and not once):
        alike = joined(x, new)
        return Signal(roles=x.roles) if adds else alike.but(roles=x.roles, odd_in=())
    share = float(written.mean())
    if share in (0.0, 1.0):
        return (new if share else x).but(roles=x.roles, profile={}, parts=())
    if None in (x.mean, x.second_moment, new.mean, new.second_moment):
        return Signal(roles=x.roles)
    result = Signal(
        (1 - share) * (x.mean or 0.0) + share * (new.mean or 0.0),
        (1 - share) * (x.second_moment or 0.0) + share * (new.second_moment or 0.0),
        roles=x.roles,
    )
    same = len(step.shape(1 if put else 2) or ()) <= len(x.roles) - written.ndim  # in every place
    return _between_written(x, new, result, written) if put and same else result


def _between_written(
    x: Signal, new: Signal, result: Signal, written: npt.NDArray[np.bool_]
) -> Signal:
    """With what the places of one row that is written to some of them have in common: of two places
    both, one or none is written."""
    roles = x.roles[: written.ndim]
    if not set(roles) <= {"sample", "position"} or {"sample", "position"} & {
        *x.roles[written.ndim :]
    }:
        return result
    order = sorted(range(written.ndim), key=lambda a: roles[a] == "position")
    count = math.prod(n for a, n in enumerate(written.shape) if roles[a] == "sample")
    mask = written.transpose(order).reshape(count, -1).astype(np.float64)
    rows, columns, total = mask.sum(1), mask.sum(0), mask.sum()
    n, p = mask.shape
    both = {  # places that are written both, and pairs, of each kind
        "position_correlation": ((rows**2).sum() - total, n * p * (p - 1), x.position_correlation),
        "sample_correlation": ((columns**2).sum() - total, p * n * (n - 1), x.sample_correlation),
        "cross_correlation": (total**2 - (rows**2).sum() - (columns**2).sum() + total,
                              n * p * (n - 1) * (p - 1), x.apart),
    }  # fmt: skip
    share, found = float(mask.mean()), {}
    for name, (met, pairs, correlation) in both.items():
        if correlation is None or not pairs:
            continue
        two = float(met) / pairs
        joint = ((1 - 2 * share + two) * correlation * (x.second_moment or 0.0)
                 + two * (new.second_moment or 0.0)
                 + 2 * (share - two) * (x.mean or 0.0) * (new.mean or 0.0))  # fmt: skip
        found[name] = correlated(joint, result.second_moment or 0.0)
    return result.but(**found)


def _places(step: Step) -> tuple[npt.NDArray[np.bool_] | None, bool]:
    """Which elements of a tensor's first axes are written, and whether each is at most once; None
    where the places depend on data."""
    shape = step.shape(0)
    if shape is None or None in shape:
        return None, False
    sizes = tuple(n or 0 for n in shape)
    start, end = (2, len(step.node.inputs)) if step.node.op == "index_put" else (1, 2)
    found = [step.constant(i) for i in range(start, end)]
    if not found or math.prod(sizes) == 0:
        return None, False
    indices = [np.asarray(index) for index in found if index is not None]
    if len(indices) < len(found):
        return None, False
    if step.node.op == "scatter_nd":
        indices = list(np.moveaxis(indices[0], -1, 0))
    elif step.node.op == "scatter_elements":
        grid: list[Any] = list(np.indices(indices[0].shape, sparse=True))
        grid[int(step.number("axis")) % len(sizes)] = indices[0]
        indices = grid
    elif any(index.dtype.kind == "b" for index in indices):
        if len(indices) > 1:
            return None, False
        return indices[0].astype(np.bool_), True
    lead = sizes[: len(indices)]
    try:
        places = np.ravel_multi_index(
            tuple(np.broadcast_arrays(*(i % n for i, n in zip(indices, lead, strict=True)))), lead
        ).reshape(-1)
    except ValueError:
        return None, False
    written = np.zeros(math.prod(lead), np.bool_)
    written[places] = True
    return written.reshape(lead), int(written.sum()) == places.size


def regrouped(made: Sequence[Factors], after: Sequence[int]) -> tuple[Factors, ...] | None:
    """What the dimensions of a reshape are made of: factors are taken from the left, several for
    a larger dimension, a part of one for a smaller; neighbours of one role are one factor, which
    any split may cut. None where the sizes do not divide."""
    left: list[tuple[Role, int]] = []
    for role, n in (f for dimension in made for f in dimension if f[1] != 1):
        if left and left[-1][0] == role:
            left[-1] = (role, left[-1][1] * n)
        else:
            left.append((role, n))
    result: list[Factors] = []
    for n in after:
        own: list[tuple[Role, int]] = []
        size = 1
        while size < n and left:
            role, k = left.pop(0)
            need = n // size if n % size == 0 else 0
            if need == 0 or (k > need and k % need != 0) or (k <= need and need % k != 0):
                return None
            if k > need:
                left.insert(0, (role, k // need))
                k = need
            own.append((role, k))
            size *= k
        if size != n:
            return None
        result.append(tuple(own))
    return tuple(result) if not left else None


def _role_of(made: Factors, before: Sequence[Role]) -> Role:
    """The role that a dimension counts as: samples merged with anything count as samples, features
    merged with positions (a flattened map) as features."""
    found = {role for role, _ in made}
    if not found:  # a new dimension of size one
        return before[-1] if before and before[-1] != "sample" else "position"
    return "sample" if "sample" in found else "feature" if "feature" in found else "position"


@transfers("reshape")
def _reshape(step: Step) -> Signal:
    x, before, after = step.signal(0), step.shape(0), step.out_shape()
    made = factors(x, before)
    if made is None or before is None or after is None or None in after:
        return x.but(roles=(), parts=(), profile={})
    kept = [f for f in made if f != ((f[0][0], 1),)]
    grouped = regrouped(kept, [n or 0 for n in after])
    if grouped is None:
        return x.but(roles=(), parts=(), profile={})
    roles: list[Role] = []
    same = dict(zip(before, x.roles, strict=True)) if list(before).count(1) == 1 else {}
    for n, group in zip(after, grouped, strict=True):
        role = _role_of(group, roles)
        if not group and n == 1 and 1 in same and list(after).count(1) == 1:
            role = same[1]
        roles.append(role)
    profile = _kept_profile(x, [n or 0 for n in before], [n or 0 for n in after])
    merged = any(len(g) > 1 for g in grouped)
    made_of = [made[a] for a, role in enumerate(x.roles) if role == "sample"]
    left = [g for g, role in zip(grouped, roles, strict=True) if role == "sample"]
    spots = [g for g, role in zip(grouped, roles, strict=True) if role == "position"]
    x = _windows_joined(x, _spots(made_of) / _spots(left), _spots(spots))
    return x.but(roles=tuple(roles), parts=grouped if merged else (), profile=profile)


def _spots(parts: Sequence[Factors]) -> int:
    """How many positions some dimensions index together."""
    return math.prod(n for factors in parts for role, n in factors if role == "position")


def _windows_joined(x: Signal, windows: float, positions: int) -> Signal:
    """What positions share once windows, which counted as samples of their own, stand beside each
    other: two of one window what they did, two of different ones what two samples do, and as much
    more as it was when the windows were cut. ``windows`` < 1 where they are."""
    p, apart = x.position_correlation, x.apart
    if windows == 1 or p is None or apart is None:
        return x
    if windows < 1:
        return x.but(windows_share=p - apart)
    if positions < 2:
        return x
    between = min(apart + max(x.windows_share, 0.0), p)
    inside = max(positions / windows, 1.0)
    within = ((inside - 1) * p + (positions - inside) * between) / (positions - 1)
    return x.but(position_correlation=within, cross_correlation=apart)


def _merged_profile(
    x: Signal, before: Sequence[int], after: Sequence[int]
) -> dict[int, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Along dimensions that are several samples and positions of before, outer ones first."""
    found: dict[int, np.ndarray[tuple[int], np.dtype[np.float64]]] = {}
    if not x.profile:
        return found
    start = np.cumprod([1, *before])
    first = 1
    for axis, size in enumerate(after):
        inside = [a for a, n in enumerate(before)
                  if n > 1 and first <= start[a] and start[a] * n <= first * size]  # fmt: skip
        first *= size
        sizes = [before[a] for a in inside]
        if (len(inside) < 2 or math.prod(sizes) != size or size > _LONGEST_PROFILE
                or not any(a in x.profile for a in inside)
                or any(x.roles[a] == "feature" for a in inside)):  # fmt: skip
            continue
        whole = np.ones(())
        for a, n in zip(inside, sizes, strict=True):
            whole = np.multiply.outer(whole, x.profile.get(a, np.ones(n)))
        if whole.size == size:
            found[axis] = whole.reshape(-1)
    return found


_LONGEST_PROFILE = 65536


def _kept_profile(
    x: Signal, before: Sequence[int], after: Sequence[int]
) -> dict[int, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """The profiles of dimensions that a reshape leaves as they are, merges where none of them has
    features, or splits where the profile is a product over the parts."""
    found = _merged_profile(x, before, after)
    start = np.cumprod([1, *after])
    for axis, values in x.profile.items():
        size = before[axis]
        first = math.prod(before[:axis])
        inside = [a for a, n in enumerate(after)
                  if n > 1 and first <= start[a] and start[a] * n <= first * size]  # fmt: skip
        sizes = [after[a] for a in inside]
        if size != values.size or math.prod(sizes) != size or not inside:
            continue
        if len(inside) == 1:
            found[inside[0]] = values
            continue
        grid = values.reshape(sizes)
        parts = [grid.mean(axis=tuple(k for k in range(len(sizes)) if k != i))
                 for i in range(len(sizes))]  # fmt: skip
        whole = parts[0]
        for part in parts[1:]:
            whole = np.multiply.outer(whole, part)
        if np.abs(whole - grid).max() <= 0.01 * grid.max():
            found.update({a: part for a, part in zip(inside, parts, strict=True)
                          if part.max() - part.min() > 1e-9})  # fmt: skip
    return found


@transfers("transpose")
def _transpose(step: Step) -> Signal:
    x, order = step.signal(0), step.ints("permutation")
    roles = tuple(x.roles[a] for a in order) if len(x.roles) == len(order) else ()
    back = {a: i for i, a in enumerate(order)}
    parts = tuple(x.parts[a] for a in order) if len(x.parts) == len(order) else ()
    return x.but(roles=roles, parts=parts, profile={back[a]: p for a, p in x.profile.items()},
                 shared={back[a]: c for a, c in x.shared.items()})  # fmt: skip


@transfers("expand", "tile")
def _expand(step: Step) -> Signal:
    """Copies: along a widened axis of positions or samples all elements are equal."""
    x, before, after = step.signal(0), step.shape(0), step.out_shape()
    if before is None or after is None:
        return x.but(roles=(), profile={})
    lead = len(after) - len(before)
    new: tuple[Role, ...] = ("sample", "position") if lead > 1 else ("sample",)
    roles = (*(new[:lead] + ("position",) * max(lead - len(new), 0)), *x.roles)
    positions, samples, apart = x.position_correlation, x.sample_correlation, x.apart
    shared = {}
    if lead and "sample" not in x.roles:
        samples, apart = 1.0, positions
    for axis, role in enumerate(x.roles):
        n, wide = before[axis], after[axis + lead]
        if role == "feature" and n and wide and wide > n:  # of n features each is there k times
            own, k = x.between_features(axis), wide // n
            if own is not None:
                shared[axis + lead] = ((k - 1) + k * (n - 1) * own) / (wide - 1)
        if n == 1 and wide != 1:
            if role == "position" and x.roles.count("position") == 1:
                positions, apart = 1.0, samples
            if role == "sample":
                samples, apart = 1.0, positions
    return x.but(roles=tuple(roles) if len(roles) == len(after) else (), profile={},
                 position_correlation=positions, sample_correlation=samples,
                 cross_correlation=apart, shared=shared)  # fmt: skip


@transfers("concat", "stack")
def _concat(step: Step) -> Signal:
    """The size-weighted mean of the parts' moments."""
    parts = [step.signal(i) for i in range(len(step.node.inputs))]
    axis = int(step.number("axis"))
    sizes: list[int] = []
    for i in range(len(parts)):
        size = known_size(step.shape(i), (axis,)) if step.node.op == "concat" else 1
        if size is None:
            return UNKNOWN_SIGNAL
        sizes.append(size)
    kept = [(p, n) for p, n in zip(parts, sizes, strict=True) if n > 0]
    out = step.out_shape()
    # of a learned token beside those of samples the latter tell what the dimensions are
    lead = max((p for p, _ in kept), key=lambda p: (len(p.roles), "sample" in p.roles),
               default=UNKNOWN_SIGNAL)  # fmt: skip
    roles = lead.roles
    if step.node.op == "stack" or (out is not None and len(roles) != len(out)):
        roles = (*roles[:axis], "position", *roles[axis:]) if out and len(roles) + 1 == len(
            out) else ()  # fmt: skip
    if not kept or any(p.second_moment is None for p, _ in kept):
        return Signal(roles=roles)
    result = weighted_mean(kept, roles, over_positions=bool(roles) and axis < len(roles)
                           and roles[axis] == "position")  # fmt: skip
    return result.but(profile={**result.profile, **parts_profile(kept, axis, result)})


def _part(step: Step, axes: Sequence[int]) -> Signal:
    """A part of a tensor along some axes: the profile of those axes is lost."""
    x = step.signal(0)
    return x.but(profile={a: p for a, p in x.profile.items() if a not in axes})


@transfers("split")
def _split(step: Step) -> tuple[Signal, ...]:
    x, axis = step.signal(0), int(step.number("axis"))
    found, start = [], 0
    for i in range(len(step.node.outputs)):
        length = known_size(step.out_shape(i), (axis,))
        if length is None:
            return tuple(_part(step, [axis]) for _ in step.node.outputs)
        whole = _of_concat(step, axis, start, start + length)
        found.append(whole or taken(x, axis, range(start, start + length)))
        start += length
    return tuple(found)


@transfers("slice")
def _slice(step: Step) -> Signal:
    x, shape = step.signal(0), step.shape(0)
    bounds = zip(step.ints("axes"), step.ints("starts"), step.ints("ends"), step.ints("steps"),
                 strict=True)  # fmt: skip
    for axis, start, end, stride in bounds:
        size = shape[axis] if shape is not None else None
        if size is None:
            return _part(step, step.ints("axes"))
        places = range(*slice(start, end, stride).indices(size))
        whole = None
        if len(step.ints("axes")) == 1 and stride == 1:
            whole = _of_concat(step, axis, places.start, places.stop)
        x = whole or taken(x, axis, places)
    return x


def _of_concat(step: Step, axis: int, start: int, stop: int) -> Signal | None:
    """What lies between two places along the axis of a concatenation, from the parts that do, each
    taken whole; None where a part is cut or the input is no concatenation."""
    producer = step.graph.producer.get(step.value(0) or "")
    if producer is not None and producer.op in ("pad", "matmul"):
        return _columns(step, step.value(0), axis, start, stop, _MOST_NODES)
    if producer is None or producer.op != "concat" or producer.attributes.get("axis") != axis:
        return None
    at = 0
    kept: list[tuple[Signal, int]] = []
    for value in producer.inputs:
        n = known_size(step.graph.shape(value), (axis,))
        if n is None:
            return None
        if at < stop and at + n > start and n > 0:
            if at < start or at + n > stop:
                return None
            kept.append((step.signals.get(value or "", UNKNOWN_SIGNAL), n))
        at += n
    if not kept or any(not p.known for p, _ in kept):
        return None
    x = step.signal(0)
    if len(kept) == 1:
        return kept[0][0].but(roles=x.roles)
    along = bool(x.roles) and axis < len(x.roles) and x.roles[axis] == "position"
    return weighted_mean(kept, x.roles, over_positions=along)


_MOST_NODES = 8  # that are followed back


def _columns(
    step: Step, value: str | None, axis: int, start: int, stop: int, most: int
) -> Signal | None:
    """Some columns of a product A·B are A times those of B; of a padded tensor they are what was
    padded, or what was padded with: so does linear attention carry its denominator along. None
    where the slice mixes both."""
    node = step.graph.producer.get(value or "")
    if node is None or most <= 0:
        return None
    x = step.signals.get(node.inputs[0] or "", UNKNOWN_SIGNAL)
    shape = step.graph.shape(node.inputs[0])
    if shape is None or axis != len(shape) - 1 or (size := shape[axis]) is None:
        return None
    if node.op == "matmul":
        factor = step.graph.shape(node.inputs[1])
        if factor is None or len(factor) != len(shape) or None in factor:
            return None
        part = _columns(step, node.inputs[1], axis, start, stop, most - 1)
        if part is None:
            return None
        cut = (*factor[:-1], stop - start)
        return multiplied_matrices(x, part, shape, cut, len(shape))
    if node.op != "pad" or str(node.attributes.get("mode", "constant")) != "constant":
        return None
    padding = Step(step.graph, node, step.signals, step.dependence).ints("padding")
    begin = padding[axis]
    if any(n for a, n in enumerate(padding) if a % len(shape) != axis) or begin < 0:
        return None
    if begin <= start and stop <= begin + size:
        return x.but(profile={a: p for a, p in x.profile.items() if a != axis})
    number = step.graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if stop <= begin or start >= begin + size:
        filled = float(number.reshape(-1)[0]) if number is not None and number.size else 0.0
        return Signal(filled, filled * filled, 1.0, 1.0, (), (filled > 0) - (filled < 0),
                      x.roles, cross_correlation=1.0)  # fmt: skip
    return None


@transfers("windows")
def _windows(step: Step) -> Signal:
    x = _part(step, [int(step.number("axis"))])
    return x.but(roles=(*x.roles, "position") if x.roles else ())


@transfers("select_index")
def _select_index(step: Step) -> Signal:
    """One entry of an axis. Without a position left, two positions of one sample are one."""
    axis = int(step.number("axis"))
    index, size = int(step.number("index")), known_size(step.shape(0), (axis,))
    x = step.signal(0)
    if size:
        x = taken(x, axis, range(index % size, index % size + 1))
    roles = tuple(r for a, r in enumerate(x.roles) if a != axis)
    profile = {a - (a > axis): p for a, p in x.profile.items() if a != axis}
    gone = "position" in x.roles and "position" not in roles
    x = x.but(roles=roles, profile=profile)
    return without_positions(x) if gone else x


@transfers("gather", "gather_elements", "gather_nd", "diagonal")
def _gather(step: Step) -> Signal:
    """Entries picked by integers that do not depend on the elements keep their moments; the
    greatest k do not."""
    x = step.signal(0)
    if step.node.op == "gather_elements" and chooser(step.graph, step.node) is not None:
        return of_picked(step, step.node.output)
    value, index = step.value(0), step.value(1)
    if (value is not None and index is not None and not _is_order(step.graph, index)
            and step.dependence.chosen_by(value, index)):  # fmt: skip
        return Signal(roles=x.roles)  # such as the greatest
    out = step.out_shape()
    roles = x.roles if out is not None and len(x.roles) == len(out) else ()
    if step.node.op == "gather" and out is not None and not roles and x.roles:
        axis, extra = int(step.number("axis")), len(out) - len(x.roles) + 1
        if extra >= 0:
            roles = (*x.roles[:axis], *((x.roles[axis],) * extra), *x.roles[axis + 1 :])
    parameter, known = step.parameter(0), step.constant(1)
    if (step.node.op == "gather" and parameter is not None and known is not None
            and parameter.law is not None and parameter.law.family == "deterministic"
            and len(parameter.shape) == 2 and int(step.number("axis")) == 0):  # fmt: skip
        rows = row_correlation(parameter, known.astype(np.int64))
        if rows is not None:
            x = x.but(position_correlation=rows, cross_correlation=rows)
    result = x.but(profile={}, roles=roles)
    each, made = slots(step.graph, step.node), factors(x, step.shape(0))
    if step.node.op != "gather" or each is None or made is None:
        return result
    return result.but(parts=((*made[0], ("feature", each)), *made[1:]))


def _is_order(graph: LayerGraph, value: str | None) -> bool:
    """Whether indices name every place once: the order of a sort, or its inverse."""
    for _ in range(_MOST_NODES):
        node = graph.producer.get(value or "")
        if node is None:
            return False
        if node.op == "sort":
            return value == node.outputs[-1] and len(node.outputs) > 1
        if node.op in ("reshape", "cast", "identity"):
            value = node.inputs[0]
        elif node.op == "index_put" and graph.shape(node.outputs[0]) == graph.shape(node.inputs[2]):
            value = node.inputs[2]  # what stands at each place is told where it came from
        else:
            return False
    return False


@transfers("depth_to_space", "space_to_depth")
def _blocks(step: Step) -> Signal:
    """Blocks of positions become channels or back."""
    x, out = step.signal(0), step.out_shape()
    roles = x.roles if out is not None and len(x.roles) == len(out) else ()
    return x.but(profile={}, roles=roles)


def windows_over(step: Step, size: Sequence[int], count: Sequence[int]) -> tuple[float, float]:
    """Of windows over a map (unfold, fold): (E m, E m²) of the number of windows that cover a
    place, as the product over axes of ``size`` places and ``count`` windows."""
    kernel, stride = step.ints("kernel"), step.ints("stride")
    padding, dilation = step.ints("padding"), step.ints("dilation")
    one = two = 1.0
    for a, n in enumerate(size):
        where = (np.arange(count[a])[:, None] * stride[a] + np.arange(kernel[a]) * dilation[a]
                 - padding[a])  # fmt: skip
        met = np.bincount(where[(where >= 0) & (where < n)], minlength=n).astype(np.float64)
        one *= float(met.mean())
        two *= float((met * met).mean())
    return one, two


def window_counts(step: Step, size: Sequence[int]) -> list[int]:
    """How many windows lie along each axis of a map."""
    kernel, stride = step.ints("kernel"), step.ints("stride")
    padding, dilation = step.ints("padding"), step.ints("dilation")
    dims = len(size)
    return [(n + padding[a] + padding[dims + a] - dilation[a] * (kernel[a] - 1) - 1) // stride[a]
            + 1 for a, n in enumerate(size)]  # fmt: skip


@transfers("unfold")
def _unfold(step: Step) -> Signal:
    """Patches [sample, channel·taps, position]; taps that fall on padding are zero."""
    x, shape, out = step.signal(0), step.shape(0), step.out_shape()
    if shape is None or out is None or None in shape or None in out:
        return x.but(roles=("sample", "feature", "position"), profile={}, parts=())
    size = [n or 0 for n in shape[2:]]
    once, _ = windows_over(step, size, window_counts(step, size))
    taps = math.prod(step.ints("kernel"))
    share = min(once * math.prod(size) / max(taps * (out[2] or 0), 1), 1.0)
    made: tuple[Factors, ...] = (
        (("sample", shape[0] or 0),), (("feature", shape[1] or 0), ("position", taps)),
        (("position", out[2] or 0),),
    )  # fmt: skip
    return x.but(mean=product(x.mean, share), second_moment=product(x.second_moment, share),
                 position_correlation=product(x.position_correlation, share),
                 cross_correlation=product(x.apart, share),
                 roles=("sample", "feature", "position"), profile={}, parts=made)  # fmt: skip


@transfers("fold")
def _fold(step: Step) -> Signal:
    """A place is the sum over the m windows that cover it, of different taps of theirs:
    E y² = E x²·(m + m(m − 1)c) with c what two windows share at different taps."""
    x, out = step.signal(0), step.out_shape()
    roles: tuple[Role, ...] = ("sample", "feature", "position", "position")
    if out is None or None in out or x.second_moment is None or x.mean is None:
        return Signal(roles=roles)
    size = [n or 0 for n in out[2:]]
    one, two = windows_over(step, size, window_counts(step, size))
    copied = _is_unfolded(step)
    share = 1.0
    if copied:  # what is zero there does not fall on the map
        taps = math.prod(step.ints("kernel")) * math.prod(window_counts(step, size))
        share = min(one * math.prod(size) / taps, 1.0)
    q, first = x.second_moment / share, x.mean / share
    within, apart = product(x.position_correlation, q), product(x.apart, q)
    within, apart = (None if c is None else c / share for c in (within, apart))
    between = product(x.sample_correlation, q)
    # taps stand for positions where a reshape or unfold tells so, else for features
    spots = len(x.parts) == 3 and any(role == "position" for role, _ in x.parts[1])
    near, far = (within, apart) if spots else (first * first, first * first)
    inner, outer = (q, between) if copied else (near, far)
    more = two - one
    if near is None or inner is None:
        return Signal(roles=roles)
    second = max(q * one + inner * more, 0.0)
    samples = None
    if between is not None and outer is not None:
        samples = correlated(between * one + outer * more, second)
    # of two places' terms one pair in as many as there are taps is of one tap
    alike = 1.0 if spots else 1 / max(math.prod(step.ints("kernel")), 1)

    def places(same: float | None, other: float | None) -> float | None:
        if same is None or other is None:
            return None
        return correlated((alike * same + (1 - alike) * other) * one * one, second)

    return Signal(first * one, second, places(within, near), samples, x.odd_in, x.one_sided,
                  roles, gaussian=x.gaussian, cross_correlation=places(apart, far))  # fmt: skip


def _is_unfolded(step: Step) -> bool:
    """Whether each element is a function of one of an unfolded map: all that add up at a place are
    then one and the same."""
    value = step.value(0)
    for _ in range(_MOST_NODES):
        node = step.graph.producer.get(value or "")
        if node is None or node.op == "unfold":
            return node is not None
        carried = [v for v in node.inputs if v is not None and v not in step.graph.static]
        if node.op in _MIXES or len(carried) != 1:
            return False
        value = carried[0]
    return False


_MIXES = frozenset({"linear", "conv", "conv_transpose", "softmax", "layer_norm", "rms_norm",
                    "reduce_mean", "reduce_sum", "fold", "dropout"})  # fmt: skip


@transfers("pad")
def _pad(step: Step) -> Signal:
    """Zeros take their share of the mean square, and once more where two positions differ; other
    modes repeat what is there."""
    x, shape, out = step.signal(0), step.shape(0), step.out_shape()
    padding = step.ints("padding")
    if shape is None or out is None or None in shape or None in out:
        return UNKNOWN_SIGNAL
    if str(step.attribute("mode")) != "constant":
        return x.but(profile={})
    value = step.constant(1)
    filled = float(value.reshape(-1)[0]) if value is not None and value.size else 0.0
    profile = dict(x.profile)
    share = 1.0
    spots = 1.0  # the share of the pairs of positions that both lie inside
    rank = len(shape)
    for axis in range(rank):
        begin, end = padding[axis], padding[rank + axis]
        size = shape[axis] or 0
        if begin == end == 0:
            continue
        before = profile.get(axis, np.ones(size))
        if begin < 0 or end < 0 or before.size != size or filled:
            profile.pop(axis, None)
        else:
            padded = np.pad(before, (begin, end))
            profile[axis] = padded / padded.mean() if padded.mean() > 0 else padded
        inside = min(size / max(size + begin + end, 1), 1.0)
        share *= inside
        if len(x.roles) != rank or x.roles[axis] == "position":
            spots *= inside
    if filled:
        return _filled(x, filled, share, spots).but(profile=profile)
    return x.but(mean=product(x.mean, share), second_moment=product(x.second_moment, share),
                 profile=profile, position_correlation=product(x.position_correlation, spots),
                 cross_correlation=product(x.apart, spots))  # fmt: skip


def _filled(x: Signal, value: float, share: float, spots: float) -> Signal:
    """Of the elements the share is those of x, the others are a number; of two positions that
    differ both are x's, one or none by the share of positions that are padding."""
    if x.second_moment is None or x.mean is None:
        return Signal(roles=x.roles)
    q, own, fixed = x.second_moment, x.mean, value * value
    mean = share * own + (1 - share) * value
    second = share * q + (1 - share) * fixed
    same = share / spots if spots > 0 else 0.0  # of the features of a position

    def apart(c: float | None) -> float | None:
        if c is None:
            return None
        mixed = same * own * value + (1 - same) * fixed
        both = same * c * q + (1 - same) * fixed
        return correlated(spots**2 * both + 2 * spots * (1 - spots) * mixed
                          + (1 - spots) ** 2 * fixed, second)  # fmt: skip

    side = x.one_sided if x.one_sided * value >= 0 else 0
    between = product(x.sample_correlation, share * q)
    return Signal(mean, second, apart(x.position_correlation), None, (), side, x.roles,
                  cross_correlation=apart(x.apart)).but(
        sample_correlation=None if between is None else correlated(
            between + (1 - share) * fixed, second))  # fmt: skip


@transfers("full")
def _full(step: Step) -> Signal:
    value = step.number("value")
    rank = len(step.out_shape() or ())
    roles: tuple[Role, ...] = tuple("feature" for _ in range(rank))
    if not math.isfinite(value):
        return Signal(roles=roles)
    return Signal(value, value**2, 1.0, 1.0, (), int(value > 0) - int(value < 0), roles,
                  cross_correlation=1.0)  # fmt: skip


@transfers("cumsum")
def _cumsum(step: Step) -> Signal:
    """Over positions with correlation c the n-th sum has E s² = E x²·(n + n(n−1)c)."""
    x, shape, axis = step.signal(0), step.shape(0), int(step.number("axis"))
    n = known_size(shape, (axis,))
    c = x.position_correlation if x.roles and x.roles[axis] == "position" else None
    if n is None or c is None or x.second_moment is None or x.mean is None:
        return Signal(roles=x.roles)
    count = np.arange(1, n + 1, dtype=np.float64)
    second = x.second_moment * float((count + count * (count - 1) * c).mean())
    return x.but(mean=x.mean * (n + 1) / 2, second_moment=second, position_correlation=None,
                 sample_correlation=None, cross_correlation=None, profile={})  # fmt: skip


@transfers("one_hot")
def _one_hot(step: Step) -> Signal:
    """One of n: E v = E v² = 1/n. Two places agree as often as their indices do, which are uniform
    where they are not known."""
    n, on, off = step.number("depth"), step.number("on"), step.number("off")
    axis = int(step.number("axis"))
    roles = step.signal(0).roles
    rank = len(step.out_shape() or ())
    if n < 1 or (on, off) != (1.0, 0.0) or axis % max(rank, 1) != rank - 1:
        return UNKNOWN_SIGNAL
    indices, table = step.constant(0), step.parameter(0)
    if indices is None and table is not None and table.load is not None:
        indices = np.asarray(table.load())
    alike: float | None = 1 / n
    between = 1.0 if step.value(0) in step.graph.static else 1 / n
    if between == 1.0 and n > 1:
        alike = None
    if indices is not None and indices.size > 1:
        met = np.unique(indices, return_counts=True)[1].astype(np.float64)
        alike = float((met * (met - 1)).sum()) / (indices.size * (indices.size - 1))
    return Signal(1 / n, 1 / n, alike, between, (), 1,
                  (*roles, "feature") if len(roles) == rank - 1 else (),
                  cross_correlation=alike, shared={rank - 1: 0.0})  # fmt: skip
