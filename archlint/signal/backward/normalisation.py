"""Gradients through norms: divided by the deviation, less what the norm projects out.

y = (x − mean)/√(v + eps) over a set of n elements takes from γg its mean and its part along x̂:
g_x = γ/√(v + eps)·(g − ⟨g⟩ − x̂⟨g x̂⟩). The two parts are E⟨g⟩² and E⟨g x̂⟩², decided by the
correlations within the set.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from archlint.graph.fans import fans
from archlint.graph.model import LayerGraph
from archlint.signal.fluctuation import excess_of
from archlint.signal.gradient import (
    UNKNOWN_GRADIENT,
    Back,
    Correlation,
    Gradient,
    along_of,
    as_profile,
    backwards,
    both,
    no_gradient,
    scaled_origin,
    summed,
    times,
    together,
)
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.transfer import TRANSFER, Step

_LOGS = np.arange(-70.0, 8.0, 0.05)  # ln(v/E v), wide enough for one degree of freedom


@lru_cache(maxsize=65536)
def passed(freedom: float, variance: float, eps: float, lost_mean: float, lost_size: float
           ) -> tuple[float, float, float, float]:  # fmt: skip
    """What a norm lets through, over the law of the variance v that it divides by.

    v·k/E v ~ χ²_k with k = ``freedom``. Returns E[(1 − m − (2κ − κ²)s)/(v + eps)], κ = v/(v + eps),
    the factor on E g² where the mean takes the share m and the part along x̂ the share s, and the
    two shares' weight in it: E[1/(v + eps)] and E[(2κ − κ²)/(v + eps)] over the first; and
    E[1/√(v + eps)], what stands before a gradient of one sign. For a batch
    of two (k = 1, m = s = ½) it is E[eps²/(v + eps)³]/2: next to nothing passes but where two
    samples nearly agree.
    """
    if freedom > 1e6:
        v, weight = np.array([variance]), np.ones(1)
    else:
        density = freedom / 2 * (_LOGS - np.exp(_LOGS))
        weight = np.exp(density - density.max())
        weight /= weight.sum()
        v = variance * np.exp(_LOGS)
    inverse = 1 / (v + eps)
    kept = v * inverse
    size = (2 * kept - kept * kept) * inverse
    both_lost = inverse * (1 - lost_mean) - size * lost_size
    return (max(float(weight @ both_lost), 0.0), float(weight @ inverse), float(weight @ size),
            float(weight @ np.sqrt(inverse)))  # fmt: skip


def channel_variations(graph: LayerGraph, signals: Mapping[str, Signal]) -> dict[str, float]:
    """Var v/(E v)² of a channel's variance v over the draw of the weights that make it, by value:
    (κ − 1)/fan-in behind an affine map (v is a quadratic form in its row, of weights with the
    kurtosis κ), 0 behind BatchNorm, of a sum by the squared shares of its terms. One pass in
    execution order."""
    found: dict[str, float] = {}
    for node in graph.nodes:
        if node.op in ("batch_norm", "instance_norm"):
            continue
        here = 0.0
        carried = [v for v in node.inputs if v is not None and v not in graph.static]
        if node.op in ("linear", "conv", "conv_transpose"):
            count = fans(node, graph)
            weight = graph.parameter(node.inputs[1])
            law = weight.law if weight is not None else None
            if count is not None and count.fan_in:
                here = (2 + (excess_of(law) if law and law.random else 0.0)) / count.fan_in
        elif node.op in ("add", "sub"):
            variances = [signals.get(v, UNKNOWN_SIGNAL).variance or 0.0 for v in carried]
            total = sum(variances)
            here = sum((w / total) ** 2 * found.get(v, 0.0)
                       for v, w in zip(carried, variances, strict=True) if w > 0)  # fmt: skip
        elif node.op == "concat":
            here = max((found.get(v, 0.0) for v in carried), default=0.0)
        elif carried:
            here = found.get(carried[0], 0.0)
        if here:
            found.update((out, here) for out in node.outputs)
    return found


def normalised(
    step: Back, axes: Sequence[int], sizes: Sequence[int], centred: bool, scale: int | None,
    eps: float,
) -> Gradient:  # fmt: skip
    """Through a norm over ``axes`` of input 0, of which ``sizes`` elements stand in one set."""
    g, x, shape = step.gradient, step.signal(0), step.shape(0)
    gamma = step.signal(scale) if scale is not None and step.has(scale) else Signal(1.0, 1.0)
    if g.zero or gamma.second_moment == 0.0:
        return no_gradient(step.rank(0))
    if (shape is None or x.second_moment is None or gamma.second_moment is None
            or g.second_moment is None or len(g.along) != len(shape)):  # fmt: skip
        return UNKNOWN_GRADIENT
    outer = along_of(x, shape)
    n = math.prod(sizes)
    inside = [outer[a] for a in axes]
    share: float | None = 0.0
    if centred:
        whole = together(sizes, inside)
        share = None if whole is None else min(whole / n, 1.0)
    if share is None:
        return UNKNOWN_GRADIENT
    variance = x.second_moment * (1 - share)
    if variance + eps <= 0:
        return no_gradient(step.rank(0)) if n == 1 else UNKNOWN_GRADIENT

    def centre(c: Correlation) -> Correlation:
        if c is None or share is None:
            return None
        return (c - share) / (1 - share) if share < 1 else 1.0

    normal = [centre(c) for c in inside]
    # γ is the same along every axis but its own.
    lost_mean = together(sizes, [g.along[a] for a in axes]) if centred else 0.0
    spots = {a for a, role in enumerate(x.roles) if role == "position"}
    lost_size = _size_share(g, axes, sizes, normal, spots)
    spread = together(sizes, [None if c is None else c * c for c in normal])
    if lost_mean is None or lost_size is None:
        return UNKNOWN_GRADIENT
    features = math.prod(s for a, s in zip(axes, sizes, strict=True) if a not in spots and a)
    varied = step.variations.get(step.value(0) or "", 0.0) / max(features, 1)
    own = max(n / max(spread if spread is not None else 1.0, 1e-9) - 1, 1.0)
    freedom = round(1 / (1 / own + varied / 2), 3)
    through, inverse, size, root = passed(freedom, variance, eps, lost_mean / n, lost_size / n)
    if through <= 0 or inverse <= 0:
        return no_gradient(step.rank(0))
    steady = passed(round(own, 3), variance, eps, lost_mean / n, lost_size / n)[0]
    rest = through / inverse
    m1, m2 = lost_mean / n, lost_size / n * size / inverse
    factor = gamma.second_moment * inverse
    profile, level = _divided(g, x, axes, shape, eps / variance if variance > 0 else 0.0)
    along = tuple(
        _after(c, m1, m2, d, rest, a in axes) for a, (c, d) in enumerate(
            zip(g.along, map(centre, outer), strict=True))
    )  # fmt: skip
    mean = 0.0 if gamma.mean is None else gamma.mean * root
    return Gradient(
        g.second_moment * factor * rest * level, along, profile,
        origin=scaled_origin(g, mean * rest), chosen=g.chosen, window=g.window,
        excess=max(through / steady, 1.0) if steady > 0 else 1.0,
    )  # fmt: skip


def _after(c: Correlation, m1: float, m2: float, normal: Correlation, rest: float, within: bool
           ) -> Correlation:  # fmt: skip
    """The correlation of two elements that lose the same mean and the same multiple of x̂; of two
    in different sets each loses its own."""
    if not within:
        return c
    lost = both(normal, m2)
    return None if c is None or lost is None else max(min((c - m1 - lost) / rest, 1.0), -1.0)


def _size_share(
    g: Gradient, axes: Sequence[int], sizes: Sequence[int], normal: Sequence[Correlation],
    spots: set[int],
) -> Correlation:  # fmt: skip
    """Σ over the set of E[g x̂ g′x̂′]/E g²: by what aligns the two where it is known (positions of
    one sample, and in proportion to the gradient's own correlation those of two), else as if
    independent."""
    cs: list[Correlation] = [both(g.along[a], d) for a, d in zip(axes, normal, strict=True)]
    if g.aligned is not None:
        cs = [g.aligned if a in spots and g.along[a] != 0.0 else c
              for a, c in zip(axes, cs, strict=True)]  # fmt: skip
        own = max((g.along[a] or 0.0 for a in axes if a in spots), default=0.0)
        across = g.along[0] if 0 in axes and 0 not in spots else None
        if across and abs(across) <= own:
            cs[list(axes).index(0)] = g.aligned * across / own
    return together(sizes, cs)


def _divided(
    g: Gradient, x: Signal, axes: Sequence[int], shape: Sequence[int | None], floor: float
) -> tuple[dict[int, np.typing.NDArray[np.float64]], float]:  # fmt: skip
    """What is left of the profile when every set divides by its own v + eps, and its level;
    ``floor`` = eps/E v."""
    profile = dict(g.profile)
    level = 1.0
    for axis, values in x.profile.items():
        if axis in axes or shape[axis] != values.size or not (values > 0).all():
            continue
        own = profile.get(axis)
        joint = (own if own is not None and own.size == values.size else 1.0) * (
            (1 + floor) / (values + floor))  # fmt: skip
        mean, relative = as_profile(np.asarray(joint, np.float64))
        level *= mean
        profile[axis] = relative
    return profile, level


@backwards("batch_norm")
def _batch_norm(step: Back) -> list[Gradient | None]:
    """Training: over samples and positions of a channel, of the finite batch. ReLU behind it lets
    the squared gradient grow by π/(π − 1) a layer (Yang et al. 2019; theory: other layers)."""
    shape, x = step.shape(0), step.signal(0)
    if shape is None or None in shape:
        return [UNKNOWN_GRADIENT]
    if step.attribute("training"):
        axes = [0, *range(2, len(shape))]
        found = normalised(step, axes, [shape[a] or 0 for a in axes], True, 1, step.number("eps"))
        if x.law is not None and x.law is step.out_signal().law:
            found = found.but(given=step.gradient.given)
        found = found.but(bend=step.gradient.bend)
        return [found, *_of_scales(step, axes)]
    running = step.signal(4) if step.has(4) else Signal(1.0, 1.0)
    gamma = step.signal(1) if step.has(1) else Signal(1.0, 1.0)
    if running.mean is None or gamma.second_moment is None or x.second_moment is None:
        return [UNKNOWN_GRADIENT]
    below = running.mean + step.number("eps")
    mean = None if gamma.mean is None else gamma.mean / math.sqrt(below)
    found = times(step.gradient, gamma.second_moment / below, None, mean)
    return [found.but(aligned=step.gradient.aligned)]


def _of_scales(step: Back, axes: Sequence[int]) -> list[Gradient | None]:
    """γ and β that were computed from other weights: ∂γ = Σ g x̂ and ∂β = Σ g over all that share
    them, with E x̂² = v/(v + ε) and what two x̂ have in common as in the output."""
    g, out = step.gradient, step.out_shape()
    found: list[Gradient | None] = []
    for i in (1, 2):
        if not step.has(i) or step.value(i) not in step.graph.producer:
            found.append(None)
            continue
        if out is None or None in out or len(g.along) != len(out):
            found.append(UNKNOWN_GRADIENT)
            continue
        product = g
        if i == 1:
            plain = replace(step.node, inputs=step.node.inputs[:1])
            normal = TRANSFER[step.node.op](Step(step.graph, plain, step.signals, step.dependence))
            if not isinstance(normal, Signal) or normal.second_moment is None:
                found.append(UNKNOWN_GRADIENT)
                continue
            product = times(g, normal.second_moment, along_of(normal, out))
        total = summed(product, out, axes, keep=False)
        found.append(total.but(origin=step.source(i), profile={}))
    return found


@backwards("layer_norm", "standardise")
def _layer_norm(step: Back) -> list[Gradient | None]:
    """Over features (and positions) of one sample."""
    return [_over(step, step.ints("axes"), True, 1 if step.node.op == "layer_norm" else None)]


@backwards("rms_norm")
def _rms_norm(step: Back) -> list[Gradient | None]:
    """Only the part along x̂ is lost."""
    return [_over(step, step.ints("axes"), False, 1)]


def _over(step: Back, axes: Sequence[int], centred: bool, scale: int | None) -> Gradient:
    shape = step.shape(0)
    if shape is None or any(shape[a] is None for a in axes):
        return UNKNOWN_GRADIENT
    eps = step.number("eps")
    return normalised(step, axes, [shape[a] or 0 for a in axes], centred, scale, eps)


@backwards("group_norm", "instance_norm")
def _group_norm(step: Back) -> list[Gradient | None]:
    """Over the channels of a group and all positions of a sample."""
    shape = step.shape(0)
    if shape is None or None in shape[1:]:
        return [UNKNOWN_GRADIENT]
    channels = shape[1] or 1
    groups = int(step.number("groups")) if step.node.op == "group_norm" else channels
    axes = list(range(1, len(shape)))
    sizes = [max(channels // groups, 1), *(shape[a] or 0 for a in axes[1:])]
    return [normalised(step, axes, sizes, True, 1, step.number("eps"))]


@backwards("lp_normalize")
def _lp_normalize(step: Back) -> list[Gradient | None]:
    """x/‖x‖ is RMSNorm over √n."""
    g, shape, axis = step.gradient, step.shape(0), int(step.number("axis"))
    n = shape[axis] if shape is not None else None
    if step.number("p") != 2 or n is None:
        return [UNKNOWN_GRADIENT]
    found = normalised(step, (axis,), (n,), False, None, 0.0)
    if found.second_moment is None or g.zero:
        return [found]
    return [found.but(second_moment=found.second_moment / n,
                      origin=scaled_origin(found, 1 / math.sqrt(n)))]  # fmt: skip


@backwards("local_response_norm")
def _local_response_norm(step: Back) -> list[Gradient | None]:
    """At the mean of the denominator, which hardly moves."""
    x, y, g = step.signal(0), step.out_signal(), step.gradient
    if not x.second_moment or y.second_moment is None:
        return [UNKNOWN_GRADIENT]
    factor = y.second_moment / x.second_moment
    return [times(g, factor, None, math.sqrt(factor)).but(aligned=g.aligned, chosen=g.chosen)]


@backwards("weight_norm", "spectral_norm")
def _weight_norm(step: Back) -> list[Gradient | None]:
    """Weights: not followed."""
    return [None] * len(step.node.inputs)
