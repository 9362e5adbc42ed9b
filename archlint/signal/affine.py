"""Affine maps: linear, convolutions, embeddings, products of activations.

For y = Σ w x + b over n terms with independent weights of mean w̄ and variance s²:
E y² = n s² E x² + w̄² E(Σx)² + E b², with E(Σx)² = n E x² + n(n−1)(E x)² for features that are
uncorrelated but for their mean. For symmetric weights only the first term is left: the fan-in
rule of He et al. 2015, exact at finite width (Hanin & Rolnick 2018).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from archlint.graph.model import Parameter
from archlint.initialization.distribution import Distribution
from archlint.signal.moments import UNKNOWN_SIGNAL, Role, Signal
from archlint.signal.transfer import Step, correlated, known_size, product, transfers

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
) -> Signal:
    """The output of an affine map with ``fan_in`` terms of which the share ``taps`` is not padding.

    ``weight`` is the signal of the weight, ``law`` its law where it is a parameter.
    """
    if x.second_moment is None or weight.second_moment is None or weight.mean is None:
        return Signal(roles=roles)
    w_mean = weight.mean
    w_variance = max(weight.second_moment - w_mean * w_mean, 0.0)
    n = fan_in * taps
    noise = n * w_variance  # what one unit of E x² becomes
    second = noise * x.second_moment
    mean: float | None = 0.0
    steady = 0.0  # the part that the mean of the weights makes
    if w_mean != 0.0 and abs(w_mean) > 1e-9 * math.sqrt(weight.second_moment):
        if x.mean is None:
            return Signal(roles=roles)
        mean = n * w_mean * x.mean
        steady = w_mean**2 * (n * x.second_moment + n * (n - 1) * x.mean**2)
        second += steady
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

    def through(correlation: float | None) -> float | None:
        if correlation is None or mean is None:
            return None
        inner = noise * x.second_moment * correlation if x.second_moment is not None else 0.0
        if steady and x.mean is not None and x.second_moment is not None:
            inner += w_mean**2 * (n * x.second_moment * correlation + n * (n - 1) * x.mean**2)
        return correlated(inner + b_second + 2 * (mean - b_mean) * b_mean, second)

    return Signal(
        None if mean is None else mean * scale, total * second,
        through(x.position_correlation), through(x.sample_correlation), x.spread, groups, 0, roles,
        gaussian=n * taps >= 4,
    )  # fmt: skip


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
    return weighted(step, x, step.signal(1), _law(step.parameter(1)), fan_in, 2,
                    feature_last(x, len(shape)), scale=step.number("alpha"))  # fmt: skip


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
    where = start[:, None] + np.arange(kernel) * dilation
    inside = (where >= 0) & (where < size)
    return np.asarray(
        np.where(inside, profile[np.clip(where, 0, size - 1)], 0.0).mean(axis=1), np.float64
    )


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
    taps = 1.0
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
        if share > 0:
            profiles[2 + axis] = after / share
    result = weighted(step, x, step.signal(1), _law(step.parameter(1)), fan_in, 2,
                      _conv_roles(len(shape)), taps)  # fmt: skip
    return result.but(profile=_with_bias(step, profiles, result))


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
    what the border loses: each input element writes k taps, those cropped by padding are lost."""
    shape, weight, out = step.shape(0), step.shape(1), step.out_shape()
    if shape is None or weight is None or out is None or None in (*shape[1:], *weight, *out[1:]):
        return UNKNOWN_SIGNAL
    groups = int(step.number("groups"))
    stride, padding = step.ints("stride"), step.ints("padding")
    dilation = step.ints("dilation")
    dims = len(shape) - 2
    taps = 1.0  # pairs (input position, tap) that land inside, per output position
    for axis in range(dims):
        size, kernel, length = shape[2 + axis], weight[2 + axis], out[2 + axis]
        assert size is not None  # checked above
        assert length is not None
        assert kernel is not None
        where = (np.arange(size)[:, None] * stride[axis]
                 + np.arange(kernel)[None, :] * dilation[axis] - padding[axis])  # fmt: skip
        taps *= float(((where >= 0) & (where < length)).sum()) / max(length, 1)
    channels = (weight[0] or 0) / groups
    return weighted(step, step.signal(0), step.signal(1), _law(step.parameter(1)),
                    channels * taps, 2, _conv_roles(len(shape)))  # fmt: skip


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

    def through(c: float | None, d: float | None) -> float | None:
        return None if c is None or d is None else correlated(second * c * d + bias, second + bias)

    return Signal(0.0, second + bias, through(a.position_correlation, b.position_correlation),
                  through(a.sample_correlation, b.sample_correlation), roles=roles)  # fmt: skip


@transfers("embedding")
def _embedding(step: Step) -> Signal:
    """Rows of a table: E y² is that of the table; two tokens agree with probability 1/rows."""
    table, shape = step.signal(1), step.shape(0)
    rank = len(shape) if shape is not None else 1
    roles: tuple[Role, ...] = ("sample", *_places(rank - 1), "feature")
    rows = known_size(step.shape(1), (0,))
    if table.second_moment is None or table.mean is None or rows is None:
        return Signal(roles=roles)
    fixed = table.mean**2
    known = step.constant(0)
    same = fixed + (table.second_moment - fixed) / max(rows, 1)
    positions = samples = correlated(same, table.second_moment)
    if known is not None and known.size > 1:  # positions, not tokens: the same for every sample
        distinct = np.unique(known).size
        repeated = (known.size / distinct - 1) / max(known.size - 1, 1)
        positions = correlated(fixed + (table.second_moment - fixed) * repeated,
                               table.second_moment)  # fmt: skip
        samples = 1.0
    parameter = step.parameter(1)
    groups = table.odd_in if parameter is not None else ()
    return Signal(table.mean, table.second_moment, positions, samples, 0.0, groups,
                  table.one_sided, roles, gaussian=True)  # fmt: skip


@transfers("embedding_bag")
def _embedding_bag(step: Step) -> Signal:
    """A mean or sum over a bag whose size the graph does not hold: unknown."""
    return UNKNOWN_SIGNAL


@transfers("matmul")
def _matmul(step: Step) -> Signal:
    """Σ_i a_i b_i over the shared axis: n E a² E b² for independent zero-mean factors, plus
    n(n−1)·E[a a′]E[b b′] where neighbouring entries of both are correlated."""
    a, b = step.signal(0), step.signal(1)
    shape, out = step.shape(0), step.out_shape()
    n = known_size(shape, (-1,)) if shape else None
    if (n is None or a.second_moment is None or b.second_moment is None or a.mean is None
            or b.mean is None or out is None):  # fmt: skip
        return UNKNOWN_SIGNAL
    cross_a = _along(a, -1, shape)
    cross_b = _along(b, -2, step.shape(1))
    if cross_a is None or cross_b is None:
        return UNKNOWN_SIGNAL
    second = n * a.second_moment * b.second_moment + n * (n - 1) * cross_a * cross_b
    roles = a.roles if len(a.roles) == len(out) else _linear_roles(len(out))
    samples = None
    if a.sample_correlation is not None and b.sample_correlation is not None:
        inner = n * a.second_moment * b.second_moment * a.sample_correlation * b.sample_correlation
        samples = correlated(inner + n * (n - 1) * cross_a * cross_b, second)
    side = 1 if a.one_sided * b.one_sided > 0 else 0
    return Signal(n * a.mean * b.mean, max(second, 0.0), None, samples, roles=roles,
                  one_sided=side, gaussian=n >= 8)  # fmt: skip


def _along(x: Signal, axis: int, shape: tuple[int | None, ...] | None) -> float | None:
    """E[x x′] for two entries along an axis: by the position correlation, or the mean's square."""
    if x.second_moment is None or x.mean is None:
        return None
    if shape is not None and len(x.roles) == len(shape) and x.roles[axis] == "position":
        return product(x.position_correlation, x.second_moment)
    return x.mean**2


@transfers("einsum")
def _einsum(step: Step) -> Signal:
    """Two operands: a sum over the letters that the output lacks, of independent products."""
    if len(step.node.inputs) != 2 or "." in str(step.attribute("equation")):
        return UNKNOWN_SIGNAL
    left, _, right = str(step.attribute("equation")).replace(" ", "").partition("->")
    terms = left.split(",")
    a, b = step.signal(0), step.signal(1)
    if a.second_moment is None or b.second_moment is None or a.mean is None or b.mean is None:
        return UNKNOWN_SIGNAL
    sizes: dict[str, int] = {}
    for i, letters in enumerate(terms):
        for letter, size in zip(letters, step.shape(i) or (), strict=False):
            if size is None:
                return UNKNOWN_SIGNAL
            sizes[letter] = size
    n = math.prod(sizes[letter] for letter in set(left) - {","} - set(right) if letter in sizes)
    cross = a.mean**2 * b.mean**2
    second = n * a.second_moment * b.second_moment + n * (n - 1) * cross
    samples = None
    if a.sample_correlation is not None and b.sample_correlation is not None:
        inner = n * a.second_moment * b.second_moment * a.sample_correlation * b.sample_correlation
        samples = correlated(inner + n * (n - 1) * cross, second)
    from_a = dict(zip(terms[0], a.roles, strict=False))
    roles: tuple[Role, ...] = tuple(from_a.get(letter, "feature") for letter in right)
    return Signal(n * a.mean * b.mean, second, None, samples, roles=roles, gaussian=n >= 8)
