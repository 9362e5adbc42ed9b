"""Gradients through norms: divided by the deviation, less what the norm projects out.

y = (x − mean)/√(v + eps) over a set of n elements takes from γg its mean and its part along x̂:
g_x = γ/√(v + eps)·(g − ⟨g⟩ − x̂⟨g x̂⟩). The two parts are E⟨g⟩² and E⟨g x̂⟩², decided by the
correlations within the set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

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
    times,
    together,
)
from archlint.signal.moments import Signal

_MOST_INVERSE = 3.0  # k/(k − 2) for k = 3 degrees of freedom; with fewer the mean hardly exists


def _inverse(count: float, spread: float) -> float:
    """E[1/v]·E v of a variance over ``count`` elements of which ``spread`` stand together:
    k/(k − 2), v·k ~ χ²_k, k = count/spread − 1."""
    k = count / max(spread, 1e-9) - 1
    return min(k / (k - 2), _MOST_INVERSE) if k > 2 else _MOST_INVERSE


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
    kept = variance / (variance + eps)

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
    m1, m2 = lost_mean / n, kept * lost_size / n
    rest = 1 - m1 - m2
    if rest <= 1e-9:
        return no_gradient(step.rank(0))
    inverse = 1.0 if spread is None else _inverse(n, spread)
    inverse = 1 + (inverse - 1) * kept
    factor = gamma.second_moment * inverse / (variance + eps)
    profile, level = _divided(g, x, axes, shape)
    along = tuple(
        _after(c, m1, m2, d, rest, a in axes) for a, (c, d) in enumerate(
            zip(g.along, map(centre, outer), strict=True))
    )  # fmt: skip
    mean = 0.0 if gamma.mean is None else gamma.mean / math.sqrt(variance + eps)
    return Gradient(
        g.second_moment * factor * rest * level, along, profile,
        origin=scaled_origin(g, mean * rest), chosen=g.chosen, window=g.window,
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
    one sample), else as if independent."""
    cs: list[Correlation] = [both(g.along[a], d) for a, d in zip(axes, normal, strict=True)]
    if g.aligned is not None:
        cs = [g.aligned if a in spots and g.along[a] != 0.0 else c
              for a, c in zip(axes, cs, strict=True)]  # fmt: skip
    return together(sizes, cs)


def _divided(g: Gradient, x: Signal, axes: Sequence[int], shape: Sequence[int | None]
             ) -> tuple[dict[int, np.typing.NDArray[np.float64]], float]:  # fmt: skip
    """What is left of the profile when every set divides by its own variance, and its level."""
    profile = dict(g.profile)
    level = 1.0
    for axis, values in x.profile.items():
        if axis in axes or shape[axis] != values.size or not (values > 0).all():
            continue
        own = profile.get(axis)
        joint = (own if own is not None and own.size == values.size else 1.0) / values
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
        return [normalised(step, axes, [shape[a] or 0 for a in axes], True, 1, step.number("eps"))]
    running = step.signal(4) if step.has(4) else Signal(1.0, 1.0)
    gamma = step.signal(1) if step.has(1) else Signal(1.0, 1.0)
    if running.mean is None or gamma.second_moment is None or x.second_moment is None:
        return [UNKNOWN_GRADIENT]
    below = running.mean + step.number("eps")
    mean = None if gamma.mean is None else gamma.mean / math.sqrt(below)
    found = times(step.gradient, gamma.second_moment / below, None, mean)
    return [found.but(aligned=step.gradient.aligned)]


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
