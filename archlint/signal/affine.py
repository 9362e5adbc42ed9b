"""Affine maps: linear, convolutions, embeddings, products of activations.

For y = Σ w x + b over n terms with independent weights of mean w̄ and variance s²:
E y² = n s² E x² + w̄² E(Σx)² + E b², with E(Σx)² = n E x² + n(n−1)(E x)² for features that are
uncorrelated but for their mean. For symmetric weights only the first term is left: the fan-in
rule of He et al. 2015, exact at finite width (Hanin & Rolnick 2018).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from archlint.graph.model import Parameter
from archlint.initialization.distribution import Distribution
from archlint.signal.indices import usual
from archlint.signal.moments import UNKNOWN_SIGNAL, Role, Signal
from archlint.signal.ranking import routed_before, routing
from archlint.signal.transfer import (
    Step,
    both_paired,
    correlated,
    count_of,
    known_size,
    product,
    row_correlation,
    transfers,
    without_positions,
)

MOST_GROUPS = 8  # flip groups that a tensor remembers, newest last

Profile = npt.NDArray[np.float64]


def weighted(
    step: Step,
    x: Signal,
    weight: Signal,
    law: Distribution | None,
    fan_in: float,
    bias: int | None,
    roles: tuple[Role, ...],
    taps: float = 1.0,
    scale: float = 1.0,
    both: float | None = None,
    places: float = 1.0,
    pairs: tuple[float, float] = (1.0, 1.0),
) -> Signal:
    """The output of an affine map with ``fan_in`` terms of which the share ``taps`` is not padding.

    ``weight`` is the signal of the weight, ``law`` its law where it is a parameter. Of a
    convolution, ``places`` is the number of positions that the terms come from, and ``both`` the
    share of the terms that two different output positions both have (``taps`` where not given);
    ``pairs`` is what pairs of terms of one position, and of two, add up to, over what they would
    if every position had the same terms of even length.
    """
    if x.second_moment is None or weight.second_moment is None or weight.mean is None:
        return Signal(roles=roles)
    w_mean = weight.mean
    n = fan_in * taps
    noise = n * weight.second_moment  # what one unit of E x² becomes
    second = noise * x.second_moment
    pair = _two_weights(weight, law, fan_in)
    mean: float | None = 0.0
    if pair:
        if x.mean is None:
            return Signal(roles=roles)
        mean = n * w_mean * x.mean
        inside = x.position_correlation if places > 1 else 1.0
        if inside is None:
            return Signal(roles=roles)
        # Pairs of terms: one feature at one place, one feature at two, two features.
        k = max(places * taps, 1.0)
        near, far = n * (k * pairs[0] - 1), n * (n - k) * pairs[0]
        second += pair * (near * inside * x.second_moment + far * x.mean**2)
        second = max(second, 0.0)
    b = step.signal(bias) if bias is not None and step.has(bias) else None
    groups = x.odd_in
    own = frozenset(p.name for i in (1, bias) if i is not None and (p := step.parameter(i)))
    symmetric = law is not None and law.symmetric and law.random and w_mean == 0.0
    b_second = b_mean = 0.0
    if b is not None:
        if b.second_moment is None or b.mean is None:
            return Signal(roles=roles)
        b_second, b_mean = b.second_moment, b.mean
        bias_law = _law(step.parameter(bias)) if bias is not None else None
        if b_second > 0:
            groups = ()
            symmetric = symmetric and bias_law is not None and bias_law.symmetric
        second += b_second + 2 * (mean or 0.0) * b_mean
        mean = None if mean is None else mean + b_mean
    if symmetric and own:
        groups = (*groups, own)[-MOST_GROUPS:]
    total = scale * scale

    q, shift = x.second_moment, b_second + 2 * ((mean or 0.0) - b_mean) * b_mean

    def through(
        correlation: float, apart: float | None, share: float = 1.0, joint: float = 1.0
    ) -> float | None:
        """Of a pair whose terms at one place have a correlation, those at two places ``apart``:
        of the weights that each of the two outputs has, ``joint``·n² pairs, n·``share`` are one
        weight."""
        inner = noise * q * correlation * share
        if pair and x.mean is not None:
            if apart is None:
                return None
            k = max(places * taps, 1.0)
            inner += pair * n * ((k * joint - share) * apart * q + (n - k) * joint * x.mean**2)
        return correlated(inner + shift, second)

    within, between, c = x.position_correlation, x.sample_correlation, x.apart
    less = 1.0 if both is None or taps <= 0 else both / taps
    return Signal(
        None if mean is None else mean * scale, total * second,
        None if within is None else through(within, within, less, pairs[1]),
        None if between is None else through(between, c, 1.0, pairs[0]),
        groups, 0, roles, gaussian=n * taps >= 4,
        cross_correlation=None if c is None else through(c, c, less, pairs[1]),
    )  # fmt: skip


def _two_weights(weight: Signal, law: Distribution | None, fan_in: float) -> float:
    """E[w w′] of two weights of one output: w̄² of independent ones, −E w²/(n − 1) of such as are
    made to sum to zero, which takes what all inputs have in common."""
    second, mean = weight.second_moment or 0.0, weight.mean or 0.0
    pair = product(weight.position_correlation, second) or 0.0
    if law is not None and not law.random and fan_in > 1:  # (Σw)² and Σw² are what they are
        pair = (fan_in * mean**2 - second) / (fan_in - 1)
    return pair if abs(pair) > 1e-18 * second else 0.0


def _law(parameter: Parameter | None) -> Distribution | None:
    return parameter.law if parameter is not None else None


def _places(count: int) -> tuple[Role, ...]:
    """``count`` dimensions that index positions."""
    return tuple("position" for _ in range(count))


def _linear_roles(rank: int) -> tuple[Role, ...]:
    return ("sample", *_places(rank - 2), "feature") if rank > 1 else ("feature",)


def feature_last(x: Signal, rank: int) -> tuple[Role, ...]:
    """Roles after a map over the last axis: what came before keeps its role, features apart."""
    if len(x.roles) != rank:
        return _linear_roles(rank)
    before: tuple[Role, ...] = tuple(
        "position" if role == "feature" else role for role in x.roles[:-1]
    )
    return (*before, "feature")


@transfers("linear")
def _linear(step: Step) -> Signal:
    """y = alpha·x·W + beta·b over the last axis."""
    weight, shape = step.shape(1), step.shape(0)
    axis = int(step.number("input_axis"))
    if weight is None or shape is None or (fan_in := weight[axis]) is None:
        return UNKNOWN_SIGNAL
    x = step.signal(0)
    if x.roles[-1:] == ("position",) and "feature" in x.roles[:-1] and len(x.roles) == len(shape):
        x = _across(x, x.roles.index("feature"))  # over positions: channels take their place
    result = weighted(step, x, step.signal(1), _law(step.parameter(1)), fan_in, 2,
                      feature_last(x, len(shape)), scale=step.number("alpha"))  # fmt: skip
    kept = {a: p for a, p in x.profile.items() if a < len(shape) - 1}
    result = result.but(profile=_with_bias(step, kept, result))
    # Of a flattened map no positions are left; of patches those of the patches are.
    mixed = x.roles[-1:] == ("position",)
    flat = None if mixed else count_of(x, shape, (len(shape) - 1,), "position")
    left = count_of(x, shape, range(len(shape) - 1), "position")
    return without_positions(result) if flat is not None and flat > 1 and left == 1 else result


def _across(x: Signal, axis: int) -> Signal:
    """A tensor whose features count as positions: two of them share their means."""
    between = x.between_features(axis)
    return x.but(position_correlation=between, cross_correlation=between)


@transfers("grouped_linear")
def _grouped_linear(step: Step) -> Signal:
    """Experts: every row is multiplied with one of several matrices of the same law."""
    weight = step.shape(1)
    axis = int(step.number("input_axis"))
    if weight is None or (fan_in := weight[axis]) is None:
        return UNKNOWN_SIGNAL
    x = step.signal(0)
    made = weighted(step, x, step.signal(1), _law(step.parameter(1)), fan_in, None,
                    feature_last(x, 2))  # fmt: skip
    # Rows of different experts are independent. A token's k rows count as features, so that of two
    # tokens' pairs of rows all that share an expert stand for those in the same place.
    route = routing(step, step.value(2))
    if route is None:
        return made.but(position_correlation=None, sample_correlation=None)
    if routed_before(step):
        return made
    z = route.logits
    return made.but(
        position_correlation=product(
            made.position_correlation, route.shared(z.position_correlation)
        ),
        sample_correlation=product(made.sample_correlation, route.shared(z.sample_correlation)),
        cross_correlation=product(made.apart, route.shared(z.apart)),
    )


def _conv_roles(rank: int) -> tuple[Role, ...]:
    return ("sample", "feature", *_places(rank - 2))


def padded_profile(
    profile: Profile, kernel: int, stride: int, dilation: int, begin: int, out: int
) -> Profile:
    """The mean of q over the taps of each output position, q = 0 outside, q = ``profile`` inside.

    Hanin & Rolnick's fan-in argument position by position: q′(p) = (1/k)Σ_t q(p·s + t·d − begin).
    """
    size = profile.size
    start = np.arange(out) * stride - begin
    if dilation == 1:
        total = np.concatenate([[0.0], np.cumsum(profile)])
        low, high = np.clip(start, 0, size), np.clip(start + kernel, 0, size)
        return np.asarray((total[high] - total[low]) / kernel, np.float64)
    where = start[:, None] + _taps_inside(start, kernel, dilation, size) * dilation
    inside = (where >= 0) & (where < size)
    total = np.where(inside, profile[np.clip(where, 0, size - 1)], 0.0).sum(axis=1)
    return np.asarray(total / kernel, np.float64)


def _taps_inside(
    start: npt.NDArray[np.int64], kernel: int, dilation: int, size: int
) -> npt.NDArray[np.int64]:
    """The taps that meet the map at one output position at least; a kernel may be far larger."""
    first = max(-(int(start.max()) // dilation), 0)
    last = min((size - 1 - int(start.min())) // dilation, kernel - 1)
    return np.arange(first, last + 1)


def shared_taps(
    profile: Profile, kernel: int, stride: int, dilation: int, begin: int, out: int
) -> float:
    """The mean over pairs of output positions of the share of taps that both meet inside the map,
    weighted with the rms there: (1/k)Σ_t (mean over p of √q(p·s + t·d − begin))². A tap that
    one of two positions near the border lacks adds nothing to what they share."""
    start = np.arange(out) * stride - begin
    where = start[:, None] + _taps_inside(start, kernel, dilation, profile.size) * dilation
    inside = (where >= 0) & (where < profile.size)
    rms = np.where(inside, np.sqrt(profile)[np.clip(where, 0, profile.size - 1)], 0.0)
    return float(np.square(rms.mean(axis=0)).sum() / kernel)


@transfers("conv")
def _conv(step: Step) -> Signal:
    """Convolution; zero padding shrinks what is near the border, axis by axis."""
    x, shape, weight, out = step.signal(0), step.shape(0), step.shape(1), step.out_shape()
    if shape is None or weight is None or any(n is None for n in weight[1:]):
        return UNKNOWN_SIGNAL
    fan_in = math.prod(n for n in weight[1:] if n is not None)
    stride, dilation, padding = step.ints("stride"), step.ints("dilation"), step.ints("padding")
    dims = len(shape) - 2
    profiles: dict[int, Profile] = {}
    roots: dict[int, Profile] = {}
    taps = both = 1.0
    for axis in range(dims):
        size = shape[2 + axis]
        length = out[2 + axis] if out is not None else None
        kernel = weight[2 + axis]
        before = x.profile.get(2 + axis)
        begin, end = padding[axis], padding[dims + axis]
        if size is None or length is None or kernel is None or length <= 0:
            continue
        if begin == 0 and end == 0 and before is None:
            continue
        if step.attribute("padding_mode") != "zeros" and before is None:
            continue
        if before is None or before.size != size:
            before = np.ones(size)
        after = padded_profile(before, kernel, stride[axis], dilation[axis], begin, length)
        share = float(after.mean())
        taps *= share
        both *= shared_taps(before, kernel, stride[axis], dilation[axis], begin, length)
        if share > 0:
            profiles[2 + axis] = after / share
            root = np.sqrt(before)
            roots[2 + axis] = padded_profile(root / root.mean(), kernel, stride[axis],
                                             dilation[axis], begin, length) / share  # fmt: skip
    places = math.prod(n for n in weight[2:] if n is not None)
    law = _law(step.parameter(1))
    pairs = (math.prod(float(np.square(h).mean()) for h in roots.values()),
             math.prod(float(h.mean()) ** 2 for h in roots.values()))  # fmt: skip
    result = weighted(step, x, step.signal(1), law, fan_in, 2, _conv_roles(len(shape)), taps,
                      both=both, places=places, pairs=pairs)  # fmt: skip
    if pair := _two_weights(step.signal(1), law, fan_in):
        profiles = _of_pairs(x, step.signal(1), pair, fan_in * taps, places * taps, profiles,
                             roots)  # fmt: skip
    return result.but(profile=_with_bias(step, profiles, result))


def _of_pairs(
    x: Signal, weight: Signal, pair: float, terms: float, places: float,
    profiles: dict[int, Profile], roots: dict[int, Profile],
) -> dict[int, Profile]:  # fmt: skip
    """E y² = a·f + b·h² along each axis, where the weights of one output have E w w′ = ``pair``: of
    a place, f is the sum of its terms' second moments and h that of their rms. Standardised weights
    cancel what their inputs have in common inside a map, and less where padding takes some."""
    inside = x.position_correlation if places > 1 else 1.0
    if inside is None or x.mean is None or not x.second_moment or not weight.second_moment:
        return {}
    common = inside * x.second_moment
    single = weight.second_moment * x.second_moment - pair * common
    double = pair * (places * common + (terms - places) * x.mean**2)
    squares = {axis: float(np.square(h).mean()) for axis, h in roots.items()}
    found = {}
    for axis, f in profiles.items():
        others = math.prod(m for a, m in squares.items() if a != axis)
        made = np.maximum(single * f + double * others * np.square(roots[axis]), 0.0)
        if (level := float(made.mean())) > 0:
            found[axis] = made / level
    return found


def _with_bias(step: Step, profiles: dict[int, Profile], result: Signal) -> dict[int, Profile]:
    """A bias is the same everywhere, so it flattens the profile by its share of E y²."""
    b = step.signal(2)
    if not step.has(2) or not b.second_moment or not result.second_moment:
        return profiles
    signal = max(1 - b.second_moment / result.second_moment, 0.0)
    return {axis: signal * profile + (1 - signal) for axis, profile in profiles.items()}


@transfers("conv_transpose")
def _conv_transpose(step: Step) -> Signal:
    """An output element meets Π k/s of the kernel's taps on average: fan-in = C_in/g·Π k/s, less
    what the border loses: each input element writes k taps, those cropped by padding are lost.
    Two positions of the output meet the same weights only if their distance is a multiple of the
    stride; what others share comes from the bias alone."""
    shape, weight, out = step.shape(0), step.shape(1), step.out_shape()
    if shape is None or weight is None or out is None or None in (*shape[1:], *weight, *out[1:]):
        return UNKNOWN_SIGNAL
    groups = int(step.number("groups"))
    stride, padding = step.ints("stride"), step.ints("padding")
    dilation = step.ints("dilation")
    dims = len(shape) - 2
    taps = 1.0  # pairs (input position, tap) that land inside, per output position
    places, alike = 1, 1.0
    for axis in range(dims):
        size, kernel, length = shape[2 + axis], weight[2 + axis], out[2 + axis]
        assert size is not None  # checked above
        assert length is not None
        assert kernel is not None
        where = (np.arange(size)[:, None] * stride[axis]
                 + np.arange(kernel)[None, :] * dilation[axis] - padding[axis])  # fmt: skip
        taps *= float(((where >= 0) & (where < length)).sum()) / max(length, 1)
        residues = np.bincount(np.arange(length) % stride[axis]).astype(np.float64)
        alike *= float((residues * residues).sum()) / max(length, 1)
        places *= length
    channels = (weight[0] or 0) / groups
    y = weighted(step, step.signal(0), step.signal(1), _law(step.parameter(1)),
                 channels * taps, 2, _conv_roles(len(shape)))  # fmt: skip
    bias = step.signal(2).second_moment if step.has(2) else 0.0
    if places < 2 or bias is None or not y.second_moment or step.signal(1).mean != 0.0:
        return y
    share = (alike - 1) / (places - 1)
    floor = (1 - share) * bias / y.second_moment

    def apart(c: float | None) -> float | None:
        return None if c is None else share * c + floor

    return y.but(position_correlation=apart(y.position_correlation),
                 cross_correlation=apart(y.apart))  # fmt: skip


@transfers("bilinear")
def _bilinear(step: Step) -> Signal:
    """y = x1ᵀ W x2: in1·in2 terms of second moment E x1²·E x2²."""
    weight, shape = step.shape(2), step.shape(0)
    a, b = step.signal(0), step.signal(1)
    if weight is None or shape is None or None in weight[1:]:
        return UNKNOWN_SIGNAL
    law = step.signal(2)
    terms = math.prod(n for n in weight[1:] if n is not None)
    if a.second_moment is None or b.second_moment is None or law.second_moment is None or law.mean:
        return UNKNOWN_SIGNAL
    second = terms * law.second_moment * a.second_moment * b.second_moment
    bias = step.signal(3).second_moment if step.has(3) else 0.0
    if bias is None:
        return UNKNOWN_SIGNAL
    roles = feature_last(a, len(shape))

    return Signal(0.0, second + bias, roles=roles).but(
        **both_paired(a, b, lambda c, d: correlated(second * c * d + bias, second + bias))
    )


@transfers("embedding")
def _embedding(step: Step) -> Signal:
    """Rows of a table: E y² is that of the table; two tokens agree with probability 1/rows."""
    table, shape = step.signal(1), step.shape(0)
    rank = len(shape) if shape is not None else 1
    roles: tuple[Role, ...] = ("sample", *_places(rank - 1), "feature")
    rows = known_size(step.shape(1), (0,))
    given = usual(step.graph, step.value(0))
    if given is not None and given.ndim > 1 and len(given) > 1 and (given[:1] != given).any():
        roles = (*_places(rank), "feature")  # a table of offsets, of which there are no samples
    if table.second_moment is None or table.mean is None or rows is None:
        return Signal(roles=roles)
    fixed = table.mean**2
    same = fixed + (table.second_moment - fixed) / max(rows, 1)
    positions = samples = apart = correlated(same, table.second_moment)
    if given is not None and given.size > 1:  # positions, not tokens: the same for every sample
        places = given[0] if given.ndim > 1 and (given[:1] == given).all() else given
        distinct = np.unique(places).size
        repeated = (places.size / distinct - 1) / max(places.size - 1, 1)
        positions = correlated(fixed + (table.second_moment - fixed) * repeated,
                               table.second_moment)  # fmt: skip
        parameter = step.parameter(1)
        if parameter is not None and parameter.law and parameter.law.family == "deterministic":
            positions = row_correlation(parameter, given) or positions
        samples, apart = 1.0, positions
    parameter = step.parameter(1)
    groups = table.odd_in if parameter is not None else ()
    return Signal(table.mean, table.second_moment, positions, samples, groups,
                  table.one_sided, roles, gaussian=True, cross_correlation=apart)  # fmt: skip


@transfers("embedding_bag")
def _embedding_bag(step: Step) -> Signal:
    """A mean or sum over a bag whose size the graph does not hold: unknown."""
    return UNKNOWN_SIGNAL


@transfers("matmul")
def _matmul(step: Step) -> Signal:
    """Σ_i a_i b_i over the last axis of a, the last but one of b (:func:`contracted`)."""
    a, b = step.signal(0), step.signal(1)
    shape, other, out = step.shape(0), step.shape(1), step.out_shape()
    if shape is None or other is None or out is None or not shape or step.depend(0, 1):
        return UNKNOWN_SIGNAL
    return multiplied_matrices(a, b, shape, other, len(out))


def multiplied_matrices(
    a: Signal, b: Signal, shape: Sequence[int | None], other: Sequence[int | None], rank: int
) -> Signal:
    """The product of matrices of two shapes, of ``rank`` dimensions."""
    n = shape[-1]
    if n is None:
        return UNKNOWN_SIGNAL
    over_b = -2 if len(other) > 1 else -1
    kept_a = a.roles[:-1] if len(a.roles) == len(shape) else ()
    last: tuple[Role, ...] = b.roles[-1:] if len(other) > 1 and len(b.roles) == len(other) else ()
    roles: tuple[Role, ...] = (*kept_a, *last)
    if len(kept_a) < len(shape) - 1 or len(roles) != rank:
        kept_b = b.roles if len(b.roles) == len(other) == rank else ()
        roles = kept_b if len(kept_b) == rank else _linear_roles(rank)
    counts = _counts([(n, _role(a, -1, shape), _role(b, over_b, other))])
    moves = ("position" in a.roles[:-1], "position" in last)
    joint = a.shared.get(len(shape) - 1), b.shared.get(len(other) + over_b)
    rows = a.shared.get(len(shape) - 2) if moves[0] else None
    found = contracted(a, b, counts, roles, moves, joint, rows)
    if len(other) < 2 or len(shape) < 2 or not found.second_moment or len(roles) != rank:
        return found
    found = _uneven(found, a, b, shape, other, rank)
    shared = {}
    for axis, mine in ((rank - 2, True), (rank - 1, False)):
        x, own = (a, len(shape) - 2) if mine else (b, len(other) - 1)
        if roles[axis] == "position":
            moved = contracted(a, b, counts, roles, (mine, not mine), joint).position_correlation
            if moved is not None:
                shared[axis] = moved
            continue
        free = x.between_features(own)
        if free is None or roles[axis] != "feature":
            continue
        pair = _contracted_pair(a, b, counts, (free, 1.0) if mine else (1.0, free))
        if pair is not None:
            shared[axis] = min(max(pair / (found.second_moment or 1.0), -1.0), 1.0)
    return found.but(shared=shared)


def _uneven(
    y: Signal, a: Signal, b: Signal, shape: Sequence[int | None], other: Sequence[int | None],
    rank: int,
) -> Signal:  # fmt: skip
    """What is left of the profiles of two matrices in their product. Along an axis that both have,
    such as heads, lengths multiply; along the rows of the first and the columns of the second they
    stay. Of rows that sum to one, such as of a softmax, only E Σp² is uneven."""
    profile: dict[int, Profile] = {}
    level = 1.0
    for axis in range(rank - 2):
        joint: Profile | None = None
        for x, dims in ((a, len(shape)), (b, len(other))):
            own = x.profile.get(axis - rank + dims)
            if own is not None and (joint is None or joint.size == own.size):
                joint = own if joint is None else joint * own
        if joint is not None and joint.size > 1 and (mean := float(joint.mean())) > 0:
            level *= mean
            profile[axis] = joint / mean
    rows, columns = a.profile.get(len(shape) - 2), b.profile.get(len(other) - 1)
    if rows is not None:
        n = shape[-1] or 1
        sums_to_one = a.mean is not None and abs(a.mean * n - 1) < 1e-6 and a.one_sided > 0
        share = 1.0
        if sums_to_one and y.second_moment and a.second_moment and b.second_moment is not None:
            rest = 1 - (b.position_correlation or 0.0)
            share = min(n * a.second_moment * b.second_moment * rest / y.second_moment, 1.0)
        profile[rank - 2] = share * rows + (1 - share)
    if columns is not None:
        profile[rank - 1] = columns
    if level == 1.0 and not profile:
        return y
    return y.but(profile=profile, second_moment=product(y.second_moment, level))


def _contracted_pair(
    a: Signal, b: Signal, counts: tuple[int, int, int], free: tuple[float, float]
) -> float | None:
    """E[y y′] of two elements of a contraction that differ along a free feature axis of one of the
    operands, of which two features share ``free`` at one place, and their means elsewhere."""
    terms, places, _ = counts
    far_a, far_b = _of_means(a), _of_means(b)
    if far_a is None or far_b is None or a.second_moment is None or b.second_moment is None:
        return None
    near_a = far_a if free[0] < 1.0 else a.position_correlation
    near_b = far_b if free[1] < 1.0 else b.position_correlation
    if places > 1 and (near_a is None or near_b is None):
        return None
    one = terms * free[0] * free[1]
    moved = terms * (places - 1) * (near_a or 0.0) * (near_b or 0.0)
    rest = terms * (terms - places) * far_a * far_b
    return a.second_moment * b.second_moment * (one + moved + rest)


def _of_means(x: Signal) -> float | None:
    """(E v)²/E v²: what two elements share that have nothing but their means in common."""
    if x.second_moment is None or x.mean is None:
        return None
    return 1.0 if x.second_moment <= 0 else min(x.mean**2 / x.second_moment, 1.0)


def _role(x: Signal, axis: int, shape: Sequence[int | None]) -> Role:
    return x.roles[axis] if len(x.roles) == len(shape) else "feature"


def _counts(axes: Sequence[tuple[int, Role, Role]]) -> tuple[int, int, int]:
    """(terms, places, samples) of a contraction: how many terms, at how many positions, from how
    many samples. An axis that is positions of either operand counts as positions."""
    terms = places = samples = 1
    for n, one, two in axes:
        terms *= n
        if "position" in (one, two):
            places *= n
        elif one == two == "sample":
            samples *= n
    return terms, places, samples


def contracted(
    a: Signal, b: Signal, counts: tuple[int, int, int], roles: tuple[Role, ...],
    moves: tuple[bool, bool] = (True, True),
    joint: tuple[float | None, float | None] = (None, None),
    rows: float | None = None,
) -> Signal:  # fmt: skip
    """Σ a_i b_i of two tensors that depend on each other through their means at most:
    E(Σ)² = E a² E b² Σ_{i,i′} c_a(i, i′)·c_b(i, i′), with each operand's own correlation between
    two terms: of one feature at two positions, or the mean's square of two features. ``moves``
    tells which operand the positions of the output come from: the other one's terms are the same
    at two positions of the output. ``joint``: E[v v′]/E v² of two features that are summed over,
    where more is known than the means. ``rows``: of two rows of a matrix at one column, where that
    is not what two positions of it share."""
    if a.second_moment is None or b.second_moment is None or a.mean is None or b.mean is None:
        return Signal(roles=roles)
    terms, places, samples = counts
    features = terms // (places * samples)
    square = a.second_moment * b.second_moment
    means = [(x, of, _of_means(x) or 0.0) for x, of in zip((a, b), joint, strict=True)]

    def features_of(kind: str) -> float:
        """Two features' E[a a′]E[b b′], of one place or of a pair of places or samples: of what
        differs in both ways the lesser of the two."""
        total = square
        for x, of, least in means:
            c = 1.0 if kind == "own" else getattr(x, kind)
            total *= least if of is None else max(min(of, c or 0.0), least)
        return total

    def summed(same: float | None, moved: float | None, kind: str = "own") -> float | None:
        """Σ_{i,i′}: ``same`` where i = i′, ``moved`` where the position differs."""
        if same is None or (places > 1 and moved is None):
            return None
        one = terms * same * square
        near = terms * (places - 1) * (moved or 0.0) * square
        return one + near + terms * (terms - places) * features_of(kind)

    def times(c: float | None, d: float | None) -> float | None:
        return None if c is None or d is None else c * d

    within = times(a.position_correlation, b.position_correlation)
    between = times(a.sample_correlation, b.sample_correlation)
    apart = times(a.apart, b.apart)
    in_rows = a.position_correlation if rows is None else rows
    moved = times(in_rows if moves[0] else 1.0,
                  b.position_correlation if moves[1] else 1.0)  # fmt: skip
    moved_apart = times(a.apart if moves[0] else a.sample_correlation,
                        b.apart if moves[1] else b.sample_correlation)  # fmt: skip
    second = summed(1.0, within)
    if second is None:
        return Signal(roles=roles)
    second = max(second, 0.0)
    # Of two outputs at different positions all terms are at different positions, unless positions
    # were summed over and none are left.
    left = "position" in roles
    side = 1 if a.one_sided * b.one_sided > 0 else 0
    return Signal(
        terms * a.mean * b.mean, second,
        correlated(summed(moved, within), second) if left else 1.0,
        correlated(summed(between, apart, "sample_correlation"), second), (), side, roles,
        gaussian=features * places >= 8,
        cross_correlation=correlated(summed(moved_apart if left else between, apart, "apart"),
                                     second),
    )  # fmt: skip


@transfers("einsum")
def _einsum(step: Step) -> Signal:
    """Two operands: a sum over the letters that the output lacks (:func:`contracted`)."""
    if len(step.node.inputs) != 2 or "." in str(step.attribute("equation")) or step.depend(0, 1):
        return UNKNOWN_SIGNAL
    left, _, right = str(step.attribute("equation")).replace(" ", "").partition("->")
    terms = left.split(",")
    a, b = step.signal(0), step.signal(1)
    sizes: dict[str, int] = {}
    role: list[dict[str, Role]] = []
    for i, letters in enumerate(terms):
        shape = step.shape(i) or ()
        for letter, size in zip(letters, shape, strict=False):
            if size is None:
                return UNKNOWN_SIGNAL
            sizes[letter] = size
        own = (a, b)[i].roles
        role.append(dict(zip(letters, own if len(own) == len(letters) else (), strict=False)))
    gone = [x for x in dict.fromkeys(terms[0] + terms[1]) if x not in right and x in sizes]
    default: Role = "feature"
    axes = [(sizes[x], role[0].get(x, role[1].get(x, default)),
             role[1].get(x, role[0].get(x, default))) for x in gone]  # fmt: skip
    found: list[Role] = []
    for letter in right:
        one, two = role[0].get(letter, default), role[1].get(letter, default)
        if letter in terms[0] and letter in terms[1] and two != default:
            one = two if one == default else one
        found.append(one if letter in terms[0] else two)
    kept = [x for x in right if "position" in (role[0].get(x), role[1].get(x))]
    moves = (any(x in terms[0] for x in kept), any(x in terms[1] for x in kept))
    return contracted(a, b, _counts(axes), tuple(found), moves)
