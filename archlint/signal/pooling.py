"""Pooling, reductions, resizing: what averages or picks among positions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations

import numpy as np

from archlint.signal.activations import Activation, activation
from archlint.signal.arithmetic import scaled
from archlint.signal.gaussian import (
    Floats,
    max_of_correlated,
    maxima_of_pairs,
    moments_of_maximum,
    overlapping_maxima,
)
from archlint.signal.gradient import merged, role_correlation
from archlint.signal.joint import stacked, together
from archlint.signal.mixing import adaptive_averaging, averaging, chain, resampling
from archlint.signal.moments import UNKNOWN_SIGNAL, Role, Signal
from archlint.signal.neighbours import REACH, Field, mixed, side_by_side
from archlint.signal.parts import weighted_mean
from archlint.signal.squares import root_of_gamma
from archlint.signal.transfer import (
    Step,
    correlated,
    known_size,
    paired,
    product,
    transfers,
    without_positions,
)


def averaged(x: Signal, count: float, correlation: float | None) -> Signal:
    """The mean of ``count`` elements with a common pairwise correlation:
    E ȳ² = E x²·(1 + (count − 1)c)/count."""
    if x.second_moment is None or correlation is None:
        return Signal(x.mean, roles=x.roles, one_sided=x.one_sided, odd_in=x.odd_in)
    second = x.second_moment * (1 + (count - 1) * correlation) / count
    second = max(second, 0.0)
    q, apart = x.second_moment, x.apart
    between = None
    if x.sample_correlation is not None and apart is not None:  # at equal positions and others
        pairs = (x.sample_correlation + (count - 1) * apart) / count
        between = correlated(pairs * q, second)
    # Two windows apart: every pair of their elements agrees by the position correlation.
    return Signal(x.mean, second, correlated(product(x.position_correlation, q), second), between,
                  x.odd_in, x.one_sided, x.roles, gaussian=x.gaussian,
                  cross_correlation=correlated(product(apart, q), second))  # fmt: skip


@transfers("avg_pool")
def _avg_pool(step: Step) -> Signal:
    """A window's mean; padding that is counted takes its share (signal.neighbours)."""
    x = step.signal(0)
    count = math.prod(step.ints("kernel"))
    if count == 1:
        return x
    mixing = averaging(step)
    if mixing is not None and (found := mixed(*chain(step, mixing))).known:
        return found
    return averaged(x, count, x.position_correlation)


@transfers("adaptive_avg_pool")
def _adaptive_avg_pool(step: Step) -> Signal:
    x, shape = step.signal(0), step.shape(0)
    sizes = step.ints("size")
    before = known_size(shape, range(len(shape) - len(sizes), len(shape))) if shape else None
    if before is None:
        return UNKNOWN_SIGNAL
    count = max(round(before / math.prod(sizes)), 1)
    if count == 1 and before == math.prod(sizes):
        return x
    mixing = adaptive_averaging(step) if math.prod(sizes) > 1 else None
    if mixing is not None and (found := mixed(*chain(step, mixing))).known:
        return found
    result = averaged(x, count, x.position_correlation)
    return without_positions(result) if math.prod(sizes) == 1 else result


# Activations that (but for a small dip) never fall, so that they change places with a maximum.
_RISING = frozenset({"relu", "relu6", "silu", "gelu", "mish", "hardswish", "leaky_relu", "elu",
                     "selu", "celu", "tanh", "sigmoid", "hardsigmoid", "hardtanh", "softplus",
                     })  # fmt: skip


def maximum(step: Step, count: int, alike: float | None = None, sign: float = 1.0) -> Signal:
    """The maximum of ``count`` normals with a common correlation. A maximum of activations is the
    activation of the maximum of the pre-activations, which are normal.

    Maxima of two windows whose elements have the covariance k agree by it: Cov(y, y′) = k, exact
    where all pairs have one covariance (a common part of that variance), and to first order else.
    ``alike`` is E[v v′]/E v² of two of the elements, by default that of two positions; a ``sign``
    of −1 gives the minimum of them.
    """
    if sign < 0:
        x = scaled(step.signal(0), -1.0)
        return scaled(_of_normals(x, x, None, count, alike), -1.0)
    return _greatest(step, step.value(0), count, alike)


_Spans = list[list[tuple[int, int]]]  # stretches [begin, end) along every spatial axis


@dataclass(frozen=True, slots=True)
class _Overlap:
    """Windows over the positions of a map: how many elements two have in common on average, along
    each of some axes, by how far they lie apart."""

    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    lengths: tuple[Floats, ...]
    steps: tuple[int, ...]

    def alike(self, x: Signal, shift: Sequence[int]) -> float | None:
        """The mean of E[v v′]/E v² over two different places, of one window and of one that lies
        that many windows from it."""
        if x.nearby is None or x.nearby.axes != self.axes:
            return x.position_correlation
        counts = []
        for n, length, step, d in zip(
            x.nearby.values.shape, self.lengths, self.steps, shift, strict=True
        ):
            wide = max(round(float(length.max())), 1)
            counts.append(np.maximum(wide - np.abs(np.arange(n) - n // 2 - step * d), 0.0))
        pairs = reduce(np.multiply.outer, counts)
        total = math.prod(max(round(float(length.max())), 1) ** 2 for length in self.lengths)
        middle = tuple(n // 2 for n in pairs.shape)
        beyond = total - float(pairs.sum())
        pairs[middle] = 0.0
        whole = float(pairs.sum()) + beyond
        near = float((pairs * x.nearby.values).sum()) + beyond * x.nearby.far
        return near / whole if whole > 0 else x.position_correlation

    @staticmethod
    def of(spans: _Spans) -> _Overlap:
        """From the stretches of each axis."""
        lengths, steps = [], []
        for axis in spans:
            begin, end = np.array(axis).T
            found = [
                np.maximum(np.minimum(end[d:], end[: len(axis) - d])
                           - np.maximum(begin[d:], begin[: len(axis) - d]), 0).mean()
                for d in range(min(REACH + 1, len(axis)))
            ]  # fmt: skip
            kept = np.array(found[: max(int(np.count_nonzero(found)), 1)])
            lengths.append(np.concatenate([kept[:0:-1], kept]))
            steps.append(max(round(float(np.median(np.diff(begin)))), 1) if len(axis) > 1 else 1)
        axes = tuple(range(2, 2 + len(spans)))
        return _Overlap(axes, tuple(len(axis) for axis in spans), tuple(lengths),
                        tuple(steps))  # fmt: skip


def _greatest(
    step: Step, value: str | None, count: int, alike: float | None, overlap: _Overlap | None = None
) -> Signal:  # fmt: skip
    """The maximum of ``count`` elements of a value; of tensors side by side, that of each."""
    x = step.signals.get(value or "", UNKNOWN_SIGNAL)
    producer = step.graph.producer.get(value or "")
    if producer is not None and producer.op == "concat" and alike is None:
        axis = int(str(producer.attributes["axis"]))
        sizes = [known_size(step.graph.shape(v), (axis,)) or 0 for v in producer.inputs]
        if len(x.roles) > axis and x.roles[axis] == "feature" and all(sizes):
            parts = [_greatest(step, v, count, None, overlap) for v in producer.inputs]
            if all(part.known for part in parts):
                whole = list(zip(parts, sizes, strict=True))
                made = weighted_mean(whole, x.roles)
                return made if overlap is None else made.but(
                    nearby=side_by_side(whole, overlap.axes, overlap.sizes))  # fmt: skip
    if producer is not None and producer.op in _RISING:
        before = step.signals.get(producer.inputs[0] or "", UNKNOWN_SIGNAL)
        phi = activation(producer.op, producer.attributes)
        if before.known and phi is not None:
            return _of_normals(x, before.but(roles=x.roles), phi, count, alike, overlap)
    return _of_normals(x, x, None, count, alike, overlap)


def _of_normals(
    value: Signal, x: Signal, phi: Activation | None, count: int, alike: float | None,
    overlap: _Overlap | None = None,
) -> Signal:  # fmt: skip
    """The maximum of elements of a value, which are those of ``x`` or an activation of them."""
    if overlap is not None and x.roles[2:] != ("position",) * len(overlap.axes):
        overlap = None
    if alike is None:
        alike = x.position_correlation if overlap is None else overlap.alike(
            x, (0,) * len(overlap.axes))  # fmt: skip
    if x.second_moment is None or x.mean is None or alike is None:
        return Signal(roles=x.roles)
    centre, q = x.mean, x.second_moment
    variance = q - centre**2
    if variance <= 1e-12 * q:
        return value
    c = min(max((alike * q - centre**2) / variance, 0.0), 1.0)
    first, second, _ = max_of_correlated(count, round(c, 4), -math.inf)
    own = max(second - first * first, 1e-9)  # the variance of the maximum of standard normals
    if phi is None:
        deviation = math.sqrt(variance)
        mean = centre + deviation * first
        total = centre**2 + 2 * centre * deviation * first + variance * second
    else:
        mean, total = moments_of_maximum(phi.function, count, round(c, 4), centre, variance)

    def joint(correlation: float) -> float | None:
        shared = (correlation * q - centre**2) / variance / own
        return correlated(mean * mean + (total - mean * mean) * min(max(shared, 0.0), 1.0), total)

    result = Signal(mean, total, None, None, (), phi.one_sided if phi else 0, x.roles,
                    ).but(**paired(x, joint))  # fmt: skip
    if overlap is not None:
        result = _overlapping(result, overlap, x, count, own)
    if x.sample_correlation is None or x.apart is None:
        return result
    # of two samples' windows one pair in ``count`` is at one place
    both = (x.sample_correlation + (count - 1) * x.apart) / count
    return result.but(sample_correlation=joint(both))


def _overlapping(y: Signal, overlap: _Overlap, x: Signal, count: int, own: float) -> Signal:
    """Maxima of windows that have elements in common, or neighbours that are alike, agree by these
    too."""
    variance, centre = x.variance, x.mean
    if not y.second_moment or y.mean is None or y.position_correlation is None or not variance:
        return y
    q, fixed, far = y.second_moment, y.mean**2, y.position_correlation * y.second_moment
    common = reduce(np.multiply.outer, overlap.lengths)
    common = np.minimum(common / common.max(), 1.0) * count
    reach = [n // 2 for n in common.shape]
    if x.nearby is not None and x.nearby.axes == overlap.axes:
        wider = [
            min((n // 2) // s + r, size - 1, REACH)
            for n, s, r, size in zip(
                x.nearby.values.shape, overlap.steps, reach, overlap.sizes, strict=True
            )
        ]
        common = np.pad(common, [(max(w - r, 0),) * 2 for w, r in zip(wider, reach, strict=True)])
        reach = [n // 2 for n in common.shape]
    values = np.empty(common.shape)
    for place in np.ndindex(*common.shape):
        alike = overlap.alike(x, [i - r for i, r in zip(place, reach, strict=True)]) or 0.0
        c = min(max((alike * (x.second_moment or 0.0) - (centre or 0.0) ** 2) / variance, 0.0), 1.0)
        more = (1 - c) * overlapping_maxima(count, round(float(common[place]), 1))
        values[place] = fixed + (q - fixed) * min((c + more) / own, 1.0)
    values[tuple(reach)] = q
    field = Field(overlap.sizes, values, far)
    return y.but(position_correlation=correlated(field.mean, q), nearby=field.nearby(overlap.axes))


@transfers("max_pool")
def _max_pool(step: Step) -> tuple[Signal, Signal]:
    """A window's maximum; a maximum of maxima over windows that leave nothing out is one over a
    wider window."""
    value, spans = step.value(0), _spans(step)
    count = math.prod(step.ints("kernel")) if spans is None else _elements(spans)
    if count == 1:
        return step.signal(0), UNKNOWN_SIGNAL
    while spans is not None:
        count = _elements(spans)
        pool = step.graph.producer.get(value or "")
        if pool is None or pool.op != "max_pool":
            break
        within = replace(step, node=pool)
        if not _leaves_nothing_out(within) or (wider := _spans(within, spans)) is None:
            break
        value, spans = pool.inputs[0], wider
    overlap = None if spans is None else _Overlap.of(spans)
    return _greatest(step, value, max(round(count), 1), None, overlap), UNKNOWN_SIGNAL


def _spans(step: Step, outputs: _Spans | None = None) -> _Spans | None:
    """The stretches of a pooling's input that those of its output, by default the single places,
    are computed from; None where a size is not known. Windows are cut at the border."""
    shape, out = step.shape(0), step.out_shape()
    if shape is None or out is None or None in (*shape[2:], *out[2:]):
        return None
    kernel, stride, padding = step.ints("kernel"), step.ints("stride"), step.ints("padding")
    outputs = outputs or [[(i, i + 1) for i in range(n or 0)] for n in out[2:]]
    return [
        [(max(a * s - p, 0), min((b - 1) * s - p + k, n or 0)) for a, b in axis]
        for axis, n, k, s, p in zip(outputs, shape[2:], kernel, stride, padding, strict=False)
    ]


def _elements(spans: _Spans) -> float:
    """Of a window, the mean over windows."""
    return math.prod(sum(b - a for a, b in axis) / max(len(axis), 1) for axis in spans)


def _leaves_nothing_out(step: Step) -> bool:
    steps = zip(step.ints("stride"), step.ints("kernel"), strict=True)
    return set(step.ints("dilation")) <= {1} and all(s <= k for s, k in steps)


@transfers("adaptive_max_pool")
def _adaptive_max_pool(step: Step) -> tuple[Signal, Signal]:
    shape, sizes = step.shape(0), step.ints("size")
    before = known_size(shape, range(len(shape) - len(sizes), len(shape))) if shape else None
    if before is None:
        return UNKNOWN_SIGNAL, UNKNOWN_SIGNAL
    count = max(round(before / math.prod(sizes)), 1)
    return (step.signal(0) if count == 1 else maximum(step, count)), UNKNOWN_SIGNAL


# --------------------------------------------------------------------------- reductions


def reduced_roles(step: Step, x: Signal) -> tuple[Role, ...]:
    """The roles that are left after a reduction."""
    axes = step.ints("axes")
    if step.attribute("keepdims"):
        return x.roles
    return tuple(role for axis, role in enumerate(x.roles) if axis not in axes)


def over_features(x: Signal, count: int) -> Signal:
    """The mean over ``count`` features, which agree in their means alone, for each kind of pair:
    K ↦ K/n + (1 − 1/n)·(E v)²."""
    if x.second_moment is None or x.mean is None:
        return Signal(roles=x.roles)
    q, rest = x.second_moment, (1 - 1 / count) * x.mean**2
    second = q / count + rest
    return x.but(
        second_moment=second, **paired(x, lambda c: correlated(c * q / count + rest, second))
    )


def _of_alike(x: Signal, count: int, alike: float) -> Signal:
    """The mean over ``count`` features of which two have E[v v′]/E v² = ``alike``."""
    q = x.second_moment or 0.0
    second = q * (1 + (count - 1) * alike) / count
    return x.but(second_moment=second, **paired(x, lambda c: c))


def _copied(step: Step) -> bool:
    """Whether what is summed over holds copies whose places are no longer known."""
    value, moved = step.value(0), False
    for _ in range(_MOST_MOVES):
        node = step.graph.producer.get(value or "")
        if node is None or node.op not in ("reshape", "transpose", "identity", "expand", "tile",
                                           "concat"):  # fmt: skip
            return False
        if node.op == "concat":  # of a tensor and itself
            parts = [v for v in node.inputs if v is not None]
            return any(
                step.dependence.common(a, b) for a, b in combinations(parts[:_MOST_MOVES], 2)
            )
        if node.op in ("expand", "tile"):
            shapes = step.graph.shape(node.inputs[0]), step.graph.shape(value)
            return moved and shapes[0] != shapes[1]
        moved |= node.op == "reshape"
        value = node.inputs[0]
    return False


_MOST_MOVES = 8


def samples_for_positions(x: Signal) -> Signal:
    """Samples and positions in each other's place."""
    return x.but(position_correlation=x.sample_correlation,
                 sample_correlation=x.position_correlation)  # fmt: skip


@transfers("reduce_mean", "reduce_sum")
def _reduce(step: Step) -> Signal:
    """A mean over positions, features or samples; a sum is the mean times the count."""
    x, shape, axes = step.signal(0), step.shape(0), step.ints("axes")
    count = known_size(shape, axes)
    if (whole := together(step) if stacked(step.graph, step.node) else None) is not None:
        return whole
    if count is None or shape is None or len(x.roles) != len(shape) or x.second_moment is None:
        return UNKNOWN_SIGNAL
    features = [a for a in axes if x.roles[a] == "feature"]
    if features and _copied(step):
        return Signal(roles=reduced_roles(step, x))
    alike = x.shared.get(features[0]) if len(features) == 1 else None
    result = x
    for role in ("position", "feature", "sample"):
        n = known_size(shape, [a for a in axes if x.roles[a] == role])
        if n is None:
            return UNKNOWN_SIGNAL
        if n == 1:
            continue
        if role == "feature":
            if result.mean is None or result.second_moment is None:
                return UNKNOWN_SIGNAL
            result = over_features(result, n) if alike is None else _of_alike(result, n, alike)
        elif role == "position":
            result = averaged(result, n, result.position_correlation)
        else:
            swapped = averaged(samples_for_positions(result), n, result.sample_correlation)
            result = samples_for_positions(swapped).but(roles=result.roles)
    spots = [a for a, r in enumerate(x.roles) if r == "position" and shape[a] != 1]
    if spots and all(a in axes for a in spots):
        result = without_positions(result)
    result = result.but(roles=reduced_roles(step, x), profile={})
    if step.node.op == "reduce_sum":
        result = result.but(
            mean=None if result.mean is None else result.mean * count,
            second_moment=None if result.second_moment is None else result.second_moment * count**2,
        )
    return result


def _maxima(x: Signal, count: int, c: float, greatest: Signal) -> float | None:
    """E[y y′]/E y² of the maxima over features, independent but for their mean, of two places."""
    if x.mean is None or x.second_moment is None or not x.variance or greatest.mean is None:
        return None
    rho = min(max((c * x.second_moment - x.mean**2) / x.variance, -1.0), 1.0)
    centred = x.variance * maxima_of_pairs(count, round(rho, 3))
    shift = 2 * x.mean * (greatest.mean - x.mean) + x.mean**2
    return correlated(centred + shift, greatest.second_moment)


@transfers("reduce_max", "reduce_min")
def _reduce_max(step: Step) -> Signal:
    """The greatest of normals over positions, features or samples, with the mean correlation of
    two of them."""
    x, shape, axes = step.signal(0), step.shape(0), step.ints("axes")
    count = known_size(shape, axes)
    if count is None or shape is None or len(x.roles) != len(shape) or not x.second_moment:
        return UNKNOWN_SIGNAL
    spots = all(x.roles[a] == "position" for a in axes)
    if not spots and not x.gaussian:
        return UNKNOWN_SIGNAL
    cs = [role_correlation(x, x.roles[a]) for a in axes]
    alike = merged([shape[a] or 1 for a in axes], cs)
    sign = -1.0 if step.node.op == "reduce_min" else 1.0
    result = maximum(step, count, alike, sign).but(roles=reduced_roles(step, x))
    left = [a for a, r in enumerate(x.roles) if r == "position" and shape[a] != 1]
    if all(x.roles[a] == "feature" for a in axes):
        result = result.but(**paired(x, lambda c: _maxima(x, count, c, result)))
    elif not spots:  # what is left of the others is alike
        result = result.but(position_correlation=None, sample_correlation=None,
                            cross_correlation=None)  # fmt: skip
        if "sample" in [x.roles[a] for a in axes]:
            result = result.but(sample_correlation=1.0)
    return without_positions(result) if all(a in axes for a in left) else result


@transfers("reduce_var", "reduce_std", "reduce_l2")
def _reduce_size(step: Step) -> Signal:
    """The variance or the Euclidean length of n elements: a sum of squares with the relative
    variance 2/n for normal ones (n − 1 less the mean), and its root."""
    x, shape, axes = step.signal(0), step.shape(0), step.ints("axes")
    count = known_size(shape, axes)
    if count is None or shape is None or x.second_moment is None or x.mean is None:
        return UNKNOWN_SIGNAL
    if count < 8 and not (x.gaussian and len(x.roles) == len(shape) and all(
            x.roles[a] == "feature" for a in axes)):  # fmt: skip
        return UNKNOWN_SIGNAL
    size, free = x.second_moment, float(count)
    if step.node.op != "reduce_l2":
        size, free = max(size - x.mean**2, 0.0), count - 1.0
        if not step.attribute("correction"):
            size *= free / count
    if free < 1:
        return UNKNOWN_SIGNAL
    few = len(x.roles) == len(shape) and all(x.roles[a] == "feature" for a in axes)
    more = 2 / free if few else 0.0  # of positions no more is known than that they are many
    law = Signal(size, size * size * (1 + more), None, None, (), 1, reduced_roles(step, x))

    def pair(c: float) -> float | None:
        rho = c * x.second_moment - x.mean**2 if x.second_moment and x.mean is not None else 0.0
        rho = min(max(rho / (x.variance or 1.0), 0.0), 1.0)
        return correlated(size * size * (1 + more * rho * rho), law.second_moment)

    law = law.but(**paired(x, pair)) if few else law.but(
        position_correlation=1.0, sample_correlation=1.0, cross_correlation=1.0)  # fmt: skip
    if step.node.op == "reduce_var":
        return law
    root = root_of_gamma(law)
    if step.node.op == "reduce_l2":
        return scaled(root, math.sqrt(count))
    return root


# --------------------------------------------------------------------------- resizing


@transfers("resize")
def _resize(step: Step) -> Signal:
    """Interpolation averages with weights that sum to one: E y² = Σ_Δ T(0, Δ)K(Δ)
    (signal.interpolation, signal.neighbours)."""
    x, mixing = step.signal(0), resampling(step)
    if x.second_moment is None or mixing is None:
        return UNKNOWN_SIGNAL
    spots = tuple(a for a, role in enumerate(x.roles) if role == "position")
    if not spots and x.roles and x.position_correlation is not None:  # a table by place
        roles = ["position" if a in mixing.axes else role for a, role in enumerate(x.roles)]
        return mixed(x.but(roles=tuple(roles)), mixing).but(roles=x.roles, nearby=None)
    if x.position_correlation is None or spots != mixing.axes:
        copied = all(((m.weights == 0) | (m.weights == 1)).all() for m in mixing.maps)
        return x.but(profile={}, nearby=None) if copied else UNKNOWN_SIGNAL
    return mixed(*chain(step, mixing))
