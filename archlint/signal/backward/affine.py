"""Gradients through affine maps: by the true fan-out, padding and stride counted tap by tap."""

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
    along_of,
    as_profile,
    backwards,
    both,
    no_gradient,
    summed,
    together,
)
from archlint.signal.moments import Signal
from archlint.signal.ranking import routed_again, routing


def transposed(
    g: Gradient, weight: Signal, fan_out: float, others: Correlation, deterministic: bool
) -> float | None:
    """E (Wᵀg)² for ``fan_out`` terms: fan_out·E w²·E g² for weights of mean zero, plus
    w̄²·Σ E[g g′] over pairs of terms, whose mean correlation is ``others``. Of fixed weights the
    pairs are Σ w w′ = (n w̄)² − n E w²."""
    if g.second_moment is None or weight.second_moment is None or weight.mean is None:
        return None
    own = fan_out * weight.second_moment / g.excess
    w_mean = weight.mean
    if abs(w_mean) > 1e-9 * math.sqrt(weight.second_moment) and fan_out > 1:
        if others is None:
            return None
        cross = (fan_out * w_mean) ** 2 - (own if deterministic else fan_out * w_mean**2)
        own += cross * others
    return max(own, 0.0) * g.second_moment


def _is_fixed(step: Back, i: int) -> bool:
    parameter = step.parameter(i)
    law = parameter.law if parameter is not None else None
    return step.constant(i) is not None or (law is not None and not law.random)


@backwards("linear")
def _linear(step: Back) -> list[Gradient | None]:
    """Over the last axis: E g² times fan-out·E w²; along the other axes all stays as it was."""
    g, shape, weight = step.gradient, step.shape(0), step.shape(1)
    if g.zero:
        return [no_gradient(step.rank(0)), *_static_rest(step, 1)]
    axis = int(step.number("input_axis"))
    if weight is None or shape is None or (fan_out := weight[1 - axis]) is None:
        return [UNKNOWN_GRADIENT, *_static_rest(step, 1)]
    if len(weight) != 2:
        return [UNKNOWN_GRADIENT, *_static_rest(step, 1)]
    second = transposed(g, step.signal(1), fan_out, g.along[-1] if g.along else None,
                        _is_fixed(step, 1))  # fmt: skip
    second = None if second is None else second * step.number("alpha") ** 2
    last = len(g.along) - 1
    profile = {a: p for a, p in g.profile.items() if a != last}
    found = Gradient(second, (*g.along[:-1], 0.0), profile, origin=step.source(0))
    return [found, *_static_rest(step, 1)]


@backwards("grouped_linear")
def _grouped_linear(step: Back) -> list[Gradient | None]:
    """Experts: each row by one of several matrices of the same law, E g² times fan-out·E w². Rows
    of different experts are independent from the last matrix on."""
    g, weight = step.gradient, step.shape(1)
    rest = [*_static_rest(step, 1)[:1], None]
    if g.zero:
        return [no_gradient(step.rank(0)), *rest]
    if weight is None or (fan_out := weight[3 - int(step.number("input_axis"))]) is None:
        return [UNKNOWN_GRADIENT, *rest]
    second = transposed(g, step.signal(1), fan_out, g.along[-1] if g.along else None,
                        _is_fixed(step, 1))  # fmt: skip
    rows = g.along[0] if g.along else None
    if not routed_again(step):
        route = routing(step, step.value(2))
        rows = both(rows, None if route is None else route.same_row())
    return [Gradient(second, (rows, 0.0), origin=step.source(0)), *rest]


def _static_rest(step: Back, start: int) -> list[Gradient | None]:
    """Weights get none that is followed; one that was computed from others, or from activations,
    gets its own (:func:`_of_weight`)."""
    found: list[Gradient | None] = []
    for i, value in enumerate(step.node.inputs[start:], start):
        if value is None or value not in step.graph.producer:
            found.append(None)
        elif step.node.op not in ("linear", "conv") or i > 2:
            found.append(None if value in step.graph.static else UNKNOWN_GRADIENT)
        else:
            found.append(_of_weight(step, i))
    return found


def _of_weight(step: Back, i: int) -> Gradient:
    """∂W = Σ g xᵀ over samples and positions: E g²·E x²·N·Σ of the products of what two of the N
    places share; ∂b = Σ g. Of a convolution less by the taps that fall on padding."""
    g, x, out, shape = step.gradient, step.signal(0), step.out_shape(), step.shape(0)
    weight = step.shape(i)
    feature = 1 if step.node.op == "conv" else len(out or ()) - 1
    if g.zero:
        return no_gradient(step.rank(i))
    if out is None or shape is None or weight is None or len(g.along) != len(out):
        return UNKNOWN_GRADIENT
    axes = [a for a in range(len(out)) if a != feature]
    if i == 2:
        return summed(g, out, axes, keep=False).but(origin=step.source(i), profile={})
    if g.second_moment is None or x.second_moment is None or None in out:
        return UNKNOWN_GRADIENT
    outer = along_of(x, out if len(out) == len(shape) else shape)
    if len(outer) != len(g.along):
        return UNKNOWN_GRADIENT
    sizes = [out[a] or 1 for a in axes]
    whole = together(sizes, [both(g.along[a], outer[a]) for a in axes])
    if whole is None:
        return UNKNOWN_GRADIENT
    second = g.second_moment * x.second_moment * math.prod(sizes) * whole
    if step.node.op == "linear":
        rows = (g.along[-1], outer[-1])
        swapped = int(step.number("input_axis")) == 0
        along: tuple[Correlation, ...] = rows[::-1] if swapped else rows
    else:
        dims = len(shape) - 2
        stride, dilation = step.ints("stride"), step.ints("dilation")
        padding = step.ints("padding")
        for a in range(dims):
            kernel, size = weight[2 + a] or 1, shape[2 + a] or 1
            where = (np.arange(out[2 + a] or 1)[:, None] * stride[a]
                     + np.arange(kernel) * dilation[a] - padding[a])  # fmt: skip
            second *= float(((where >= 0) & (where < size)).mean())
        along = (g.along[1], outer[1], *outer[2:])
    return Gradient(second, along, origin=step.source(i))


@backwards("conv")
def _conv(step: Back) -> list[Gradient | None]:
    """Input position p of a channel gets the taps t of the outputs o with o·s + t·d − begin = p, of
    C_out/g channels each."""
    g, shape, weight, out = step.gradient, step.shape(0), step.shape(1), step.out_shape()
    rest = _static_rest(step, 1)
    if g.zero:
        return [no_gradient(step.rank(0)), *rest]
    if shape is None or weight is None or out is None or None in (*shape[1:], *weight, *out[1:]):
        return [UNKNOWN_GRADIENT, *rest]
    channels = (weight[0] or 0) / step.number("groups")
    stride, dilation, padding = step.ints("stride"), step.ints("dilation"), step.ints("padding")
    dims = len(shape) - 2
    circular = step.attribute("padding_mode") != "zeros"
    axes = []
    for a in range(dims):
        kernel, size, length = weight[2 + a] or 0, shape[2 + a] or 0, out[2 + a] or 0
        where = (np.arange(length)[:, None] * stride[a] + np.arange(kernel)[None, :] * dilation[a]
                 - padding[a])  # fmt: skip
        axes.append((where, size, length))
    return [_scattered(step, g, axes, channels, 2, circular), *rest]


Axes = Sequence[tuple["np.typing.NDArray[np.int64]", int, int]]


def _scattered(
    step: Back, g: Gradient, axes: Axes, channels: float, first: int, circular: bool
) -> Gradient:
    """The transpose of a map that reads ``where[o, t]`` along each axis, of ``size`` places."""
    profile = {}
    taps = 1.0
    kept = whole = 1.0
    read = pairs_read = all_taps = 1.0
    out_count = in_count = 1
    for a, (where, size, length) in enumerate(axes):
        before = g.profile.get(first + a)
        values = np.ones(length) if before is None or before.size != length else before
        if circular:
            where = np.clip(where, 0, size - 1)
        inside = (where >= 0) & (where < size)
        spread = np.broadcast_to(values[:, None], where.shape)[inside]
        level, shape = as_profile(np.bincount(where[inside], spread, size))
        if not inside.any() or level == 0.0:
            return no_gradient(step.rank(0))
        taps *= level
        if size <= LONGEST_PROFILE and (shape.max() - shape.min()) > 1e-9:
            profile[first + a] = shape
        valid = inside.sum(axis=0).astype(np.float64)  # places that tap t reaches, per t
        readers = np.bincount(where[inside], minlength=size).astype(np.float64)
        read *= float(readers.mean())
        pairs_read *= float((readers**2).mean())
        all_taps *= where.shape[1]
        kept *= float((valid * valid).sum())
        whole *= float(valid.sum())
        out_count *= length
        in_count *= size
    fan_out = taps * channels
    # Two places share a weight where both are met by one tap.
    spots = [g.along[first + a] for a in range(len(axes))] if len(g.along) > first else []
    share = (kept / whole - 1) / (in_count - 1) if in_count > 1 else 0.0
    share = min(max(share, 0.0), 1.0)
    features = g.along[1] if first == 2 and len(g.along) > 1 else None
    pairs = features if channels > 1 else spots[0] if spots else 0.0
    second = transposed(g, step.signal(1), fan_out, pairs, _is_fixed(step, 1))
    if g.bend and second is not None and not _is_fixed(step, 1):
        # Two outputs that read one input by w and w′ have w w′ more in common than others, which
        # shows in what their slopes share: E[w w′ g g′] = bend·(w w′)²/Σ w².
        own = all_taps * ((step.shape(1) or ())[1] or 1)
        second *= 1 + g.bend * max(pairs_read / read - 1, 0.0) / (own + 2)
    along: tuple[Correlation, ...] = (
        g.along[0], 0.0, *(both(c, share) for c in spots)
    ) if len(g.along) > 1 else ()  # fmt: skip
    return Gradient(second, along, profile, origin=step.source(0))


@backwards("conv_transpose")
def _conv_transpose(step: Back) -> list[Gradient | None]:
    """The transpose of a transposed convolution reads k taps an axis, less those that were
    cropped."""
    g, shape, weight, out = step.gradient, step.shape(0), step.shape(1), step.out_shape()
    rest = _static_rest(step, 1)
    if g.zero:
        return [no_gradient(step.rank(0)), *rest]
    if shape is None or weight is None or out is None or None in (*shape[1:], *weight, *out[1:]):
        return [UNKNOWN_GRADIENT, *rest]
    stride, padding = step.ints("stride"), step.ints("padding")
    dilation = step.ints("dilation")
    channels = weight[1] or 0
    profile = {}
    taps = 1.0
    for a in range(len(shape) - 2):
        kernel, size, length = weight[2 + a] or 0, shape[2 + a] or 0, out[2 + a] or 0
        where = (np.arange(size)[:, None] * stride[a] + np.arange(kernel)[None, :] * dilation[a]
                 - padding[a])  # fmt: skip
        before = g.profile.get(2 + a)
        values = np.ones(length) if before is None or before.size != length else before
        inside = (where >= 0) & (where < length)
        read = np.where(inside, values[np.clip(where, 0, length - 1)], 0.0).sum(axis=1)
        level, spread = as_profile(read)
        taps *= level
        if (spread.max() - spread.min()) > 1e-9:
            profile[2 + a] = spread
    second = transposed(g, step.signal(1), taps * channels, g.along[1] if g.along else None,
                        _is_fixed(step, 1))  # fmt: skip
    along = (g.along[0], 0.0, *g.along[2:]) if g.along else ()
    return [Gradient(second, along, profile, origin=step.source(0)), *rest]


@backwards("bilinear")
def _bilinear(step: Back) -> list[Gradient | None]:
    """y_k = Σ w_kij a_i b_j: the gradient of a has out·in2·E w²·E b² times E g²."""
    g, weight, law = step.gradient, step.shape(2), step.signal(2)
    rest = _static_rest(step, 2)
    if weight is None or None in weight or law.second_moment is None or law.mean:
        return [UNKNOWN_GRADIENT, UNKNOWN_GRADIENT, *rest]
    found: list[Gradient | None] = []
    for i in (0, 1):
        other = step.signal(1 - i)
        if g.second_moment is None or other.second_moment is None:
            found.append(UNKNOWN_GRADIENT)
            continue
        terms = (weight[0] or 0) * (weight[2 - i] or 0)
        cs = along_of(other, step.shape(1 - i))
        along = (*map(both, g.along[:-1], cs[:-1]), 0.0)
        found.append(Gradient(g.second_moment * terms * law.second_moment * other.second_moment,
                              along, origin=step.source(i)))  # fmt: skip
    return [*found, *rest]


@backwards("embedding", "embedding_bag")
def _embedding(step: Back) -> list[Gradient | None]:
    """Token ids have no gradient; that of the table is not followed."""
    return [None] * len(step.node.inputs)


# --------------------------------------------------------------------------- contractions


def _contracted(
    g: Gradient, g_letters: str, b: Signal, b_letters: str, letters: str, sizes: dict[str, int],
    origin: dict[Key, float],
) -> Gradient:  # fmt: skip
    """Σ g·b over the letters that the result lacks, for independent g and b."""
    shape_b = [sizes[c] for c in b_letters]
    of_b = dict(zip(b_letters, along_of(b, shape_b), strict=True))
    of_g = dict(zip(g_letters, g.along, strict=True))
    over = [c for c in dict.fromkeys(g_letters + b_letters) if c not in letters]
    counts = [sizes[c] for c in over]
    cs = [both(of_g.get(c, 1.0), of_b.get(c, 1.0)) for c in over]
    whole = together(counts, cs)
    if g.second_moment is None or b.second_moment is None or whole is None:
        return UNKNOWN_GRADIENT
    second = g.second_moment * b.second_moment * math.prod(counts) * whole
    along = tuple(both(of_g.get(c, 1.0), of_b.get(c, 1.0)) for c in letters)
    profile = {letters.index(g_letters[a]): p for a, p in g.profile.items()
               if g_letters[a] in letters}  # fmt: skip
    return Gradient(second, along, profile, origin=origin)


_LETTERS = "abcdefghijklmnopqrstuvw"


@backwards("matmul")
def _matmul(step: Back) -> list[Gradient | None]:
    """∂/∂a = g·bᵀ, ∂/∂b = aᵀ·g, summed over the axes that were broadcast."""
    a, b, out = step.shape(0), step.shape(1), step.out_shape()
    if a is None or b is None or out is None or None in (*a, *b, *out) or len(a) < 2 or len(b) < 2:
        return [UNKNOWN_GRADIENT, UNKNOWN_GRADIENT]
    lead = _LETTERS[: len(out) - 2]
    terms = (lead[len(lead) - (len(a) - 2) :] + "xy", lead[len(lead) - (len(b) - 2) :] + "yz")
    return _two_operands(step, terms, lead + "xz")


@backwards("einsum")
def _einsum(step: Back) -> list[Gradient | None]:
    """Two operands: each gets the sum of g times the other over the letters that it lacks."""
    equation = str(step.attribute("equation")).replace(" ", "")
    left, _, right = equation.partition("->")
    terms = left.split(",")
    unknown: list[Gradient | None] = [UNKNOWN_GRADIENT] * len(step.node.inputs)
    if len(terms) != 2 or "." in equation or any(len(set(t)) != len(t) for t in terms):
        return unknown
    return _two_operands(step, (terms[0], terms[1]), right)


def _two_operands(step: Back, terms: tuple[str, str], right: str) -> list[Gradient | None]:
    sizes: dict[str, int] = {}
    for i, term in enumerate(terms):
        shape = step.shape(i)
        if shape is None or len(shape) != len(term) or None in shape:
            return [UNKNOWN_GRADIENT, UNKNOWN_GRADIENT]
        for c, n in zip(term, shape, strict=True):
            sizes[c] = max(sizes.get(c, 1), n or 0)
    g = step.gradient
    if len(g.along) != len(right):
        return [UNKNOWN_GRADIENT, UNKNOWN_GRADIENT]
    found: list[Gradient | None] = []
    for i in (0, 1):
        shape = step.shape(i) or ()
        if g.zero:
            found.append(no_gradient(len(shape)))
            continue
        # An axis of size one that was broadcast is summed over, and stays.
        letters = "".join(c.upper() if n == 1 and sizes[c] > 1 else c
                          for c, n in zip(terms[i], shape, strict=True))  # fmt: skip
        all_sizes = {**sizes, **{c.upper(): 1 for c in sizes}}
        found.append(_contracted(g, right, step.signal(1 - i), terms[1 - i], letters, all_sizes,
                                 step.source(i)))  # fmt: skip
    return found
