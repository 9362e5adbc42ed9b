"""Gradients through activations, sums, products, dropout and the rest of arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from archlint.signal.activations import Activation, activation, composed, leaky_relu
from archlint.signal.arithmetic import added
from archlint.signal.elementwise import EVEN, LENGTHS, nested, steady_power
from archlint.signal.gradient import (
    UNKNOWN_GRADIENT,
    Back,
    Correlation,
    Gradient,
    Profile,
    along_of,
    backwards,
    both,
    no_gradient,
    role_correlation,
    scaled_origin,
    strength,
    times,
    unbroadcast,
)
from archlint.signal.laws import NODES, WEIGHTS, Series, expected
from archlint.signal.moments import Signal
from archlint.signal.slopes import aligned_pair, slope_at_greatest, slope_mean, slope_pair


def through(g: Gradient, x: Signal, phi: Activation, shape: Sequence[int | None] | None
            ) -> Gradient:  # fmt: skip
    """φ′(z)·g for z normal with the signal's moments, or of the law that is known of it,
    independent of g but for what g tells of it: E g² times E φ′² (Schoenholz et al. 2017);
    correlations by Mehler's formula for φ′."""
    if g.zero:
        return g
    if x.second_moment is None or x.mean is None or g.second_moment is None:
        return Gradient(along=g.along)
    variance = max(x.second_moment - x.mean**2, 0.0)
    if variance > 0 and not g.chosen and (x.law is not None or g.given is not None):
        return _through_law(g, x, phi, shape)
    slope = phi.moments(x.mean, variance).slope
    if not math.isfinite(slope):
        return Gradient(along=g.along)
    factor = slope
    if g.chosen > 0 and x.position_correlation is not None:
        c = _centred(x, x.position_correlation)
        greatest = slope_at_greatest(phi, x.mean, variance, round(c, 3), g.window)
        factor = (1 - g.chosen) * slope + g.chosen * greatest
    pairs: dict[float, float] = {}

    def pair(c: Correlation) -> Correlation:
        if c is None:
            return None
        if c not in pairs:
            found = slope_pair(phi, x.mean or 0.0, variance, _centred(x, c))
            pairs[c] = min(found / slope, 1.0) if slope > 0 else 1.0
        return pairs[c]

    outer = along_of(x, shape) if shape is not None else ()
    if len(outer) != len(g.along):
        outer = (None,) * len(g.along)
    along = tuple(
        0.0 if c == 0.0 else both(c, pair(d)) for c, d in zip(g.along, outer, strict=True)
    )
    level = slope_mean(phi, x.mean, variance)
    profile, uneven = _uneven(g, x, phi)
    return Gradient(
        g.second_moment * factor * uneven, along, profile,
        _aligned(g, x, phi, variance, slope, shape),
        g.chosen, g.window, g.excess, scaled_origin(g, level),
        bend=_bend(g, x, phi, variance, slope, shape),
    )  # fmt: skip


_STEP = 0.1  # of a correlation, for a difference


def _bend(
    g: Gradient, x: Signal, phi: Activation, variance: float, slope: float,
    shape: Sequence[int | None] | None,
) -> float:  # fmt: skip
    """d E[φ′φ′′]/dρ·E[g g′]/E[φ′²]E g² of two positions, at what they have in common."""
    c = position_of(g, x, shape)
    if not c or x.position_correlation is None or slope <= 0 or variance <= 0:
        return 0.0
    rho = min(max(_centred(x, x.position_correlation), _STEP - 1), 1 - _STEP)
    above, below = (slope_pair(phi, x.mean or 0.0, variance, rho + d) for d in (_STEP, -_STEP))
    return c * (above - below) / (2 * _STEP * slope)


def _uneven(g: Gradient, x: Signal, phi: Activation) -> tuple[Mapping[int, Profile], float]:
    """(the gradient's profile, E g² over that of even lengths) behind a φ whose slope depends on
    x's length, which differs by place."""
    if phi.homogeneous or x.second_moment is None or x.mean is None:
        return g.profile, 1.0
    found, level = dict(g.profile), 1.0
    fixed, q = x.mean**2, x.second_moment
    middle = phi.moments(x.mean, max(q - fixed, 0.0)).slope
    for axis, values in x.profile.items():
        low, high = float(values.min()), float(values.max())
        if high - low < EVEN or middle <= 0:
            continue
        at = np.linspace(low, high, LENGTHS)
        slopes = [phi.moments(x.mean, max(q * float(p) - fixed, 0.0)).slope for p in at]
        own = np.interp(values, at, slopes) / middle
        before = found.get(axis)
        joint = own if before is None or before.size != own.size else own * before
        share = float(joint.mean())
        if not math.isfinite(share) or share <= 0:
            return g.profile, 1.0
        level *= share
        found[axis] = joint / share
    return found, level


def _through_law(
    g: Gradient, x: Signal, phi: Activation, shape: Sequence[int | None] | None
) -> Gradient:
    """The same at the NODES of x's law. What g depends on x by, s = E[g² | x]/E g², is a chance to
    get on: of two positions, given theirs, the product of both."""
    assert x.mean is not None
    assert x.variance is not None
    assert g.second_moment is not None
    z = NODES if x.law is None else x.law.values
    derivative = phi.derivative(x.mean + math.sqrt(x.variance) * z)
    before = np.ones_like(NODES) if g.given is None else g.given
    weighed = before * derivative**2
    factor = float(WEIGHTS @ weighed)
    if not math.isfinite(factor):
        return Gradient(along=g.along)
    if factor <= 0:
        return no_gradient(len(g.along))
    level, after = Series(before), Series(before * derivative)
    pairs: dict[float, float] = {}

    def pair(c: Correlation) -> Correlation:
        if c is None:
            return None
        if c not in pairs:
            rho = _centred(x, c)
            rho = rho if x.law is None else x.law.normal_correlation(rho)
            below = level.at(rho)
            pairs[c] = 1.0 if rho >= 1.0 else after.at(rho) / below / factor if below > 0 else 0.0
        return pairs[c]

    outer = along_of(x, shape) if shape is not None else ()
    if len(outer) != len(g.along):
        outer = (None,) * len(g.along)
    along = tuple(0.0 if c == 0.0 else _held(both(c, pair(d)))
                  for c, d in zip(g.along, outer, strict=True))  # fmt: skip
    slope = float(WEIGHTS @ derivative**2)
    return Gradient(
        g.second_moment * factor, along, g.profile,
        _aligned(g, x, phi, x.variance, slope, shape), g.chosen, g.window, g.excess,
        scaled_origin(g, float(WEIGHTS @ (before * derivative))), weighed / factor,
    )  # fmt: skip


def _held(c: Correlation) -> Correlation:
    return None if c is None else min(max(c, -1.0), 1.0)


def applied(step: Back, g: Gradient, phi: Activation) -> Gradient:
    """φ′·g at the first input. Where that is ψ(z) of a normal z, which ψ′(z) comes after, φ′ counts
    by ψ′²: E (φ∘ψ)′²/E ψ′² of E g², and the like of pairs."""
    x, shape = step.signal(0), step.shape(0)
    found = through(g, x, phi, shape)
    before, inner = nested(step)
    if inner is None or g.zero or not found.second_moment or x.law is not None:
        return found
    whole = through(g, before, composed(phi, inner), shape)
    after = through(g, before, inner, shape)
    if not whole.second_moment or not after.second_moment or not g.second_moment:
        return found
    along = tuple(
        c if c is None or w is None or not a else min(c * w / a, 1.0)
        for c, w, a in zip(g.along, whole.along, after.along, strict=True)
    )
    second = g.second_moment * whole.second_moment / after.second_moment
    return replace(found, second_moment=second, along=along)


def _centred(x: Signal, c: float) -> float:
    """The correlation coefficient from E[x x′]/E x²."""
    variance = x.variance or 0.0
    if variance <= 1e-12 * (x.second_moment or 0.0) or x.mean is None or x.second_moment is None:
        return 1.0
    return min(max((c * x.second_moment - x.mean**2) / variance, -1.0), 1.0)


def _aligned(
    g: Gradient, x: Signal, phi: Activation, variance: float, slope: float,
    shape: Sequence[int | None] | None,
) -> Correlation:  # fmt: skip
    """E[ẑ φ′ ẑ′ φ′′]/E φ′² for two positions, times the arriving gradient's correlation there."""
    c = position_of(g, x, shape)
    if c is None or x.position_correlation is None or slope <= 0:
        return None
    if c == 0.0:
        return 0.0
    return c * aligned_pair(phi, x.mean or 0.0, variance,
                            _centred(x, x.position_correlation)) / slope  # fmt: skip


def position_of(g: Gradient, x: Signal, shape: Sequence[int | None] | None) -> Correlation:
    """The gradient's correlation along the longest axis of positions; 0 without one."""
    if shape is None or len(x.roles) != len(g.along) or len(shape) != len(g.along):
        return None
    spots = [a for a, role in enumerate(x.roles) if role == "position" and shape[a] != 1]
    return g.along[max(spots, key=lambda a: shape[a] or 0)] if spots else 0.0


def _activation(step: Back) -> list[Gradient]:
    phi = activation(step.node.op, step.node.attributes)
    if phi is None:
        return [UNKNOWN_GRADIENT]
    return [_selected(step, 0, phi)]


def _selected(step: Back, i: int, phi: Activation) -> Gradient:
    """φ′ on input ``i``; one that is nowhere negative passes a rectifier unchanged where it is a
    sum or a maximum of such."""
    x, g = step.signal(i), step.gradient
    if phi.name == "relu" and x.one_sided > 0 and not _has_zeros(step, i):
        return g
    return applied(step, g, phi) if i == 0 else through(g, x, phi, step.shape(i))


def _has_zeros(step: Back, i: int) -> bool:
    """Whether a nowhere negative tensor is exactly zero at many places."""
    node = step.graph.producer.get(step.value(i) or "")
    return node is None or node.op in ("relu", "relu6", "clip", "threshold", "hardsigmoid")


backwards(
    "relu", "sigmoid", "tanh", "silu", "mish", "softsign", "erf", "sin", "cos", "hardswish",
    "relu6", "tanhshrink", "logsigmoid", "leaky_relu", "rrelu", "elu", "selu", "celu", "gelu",
    "softplus", "hardsigmoid", "hardtanh", "threshold", "hardshrink", "softshrink", "abs", "exp",
    "expm1", "atan", "sinh", "asinh", "sign",
)(_activation)  # fmt: skip


@backwards("square")
def _square(step: Back) -> list[Gradient]:
    phi = activation("square", {})
    return [UNKNOWN_GRADIENT if phi is None else applied(step, step.gradient, phi)]


@backwards("pow")
def _pow(step: Back) -> list[Gradient]:
    number = step.constant(1)
    if number is None or number.size != 1:
        return [UNKNOWN_GRADIENT, UNKNOWN_GRADIENT]
    p = float(number.reshape(-1)[0])
    if p == 1.0:
        return [step.gradient]
    if p != int(p) or not 0 < p <= 8:
        x = step.signal(0)
        return [_of_power(step, step.gradient, x, p) if x.one_sided > 0 else UNKNOWN_GRADIENT]
    power = int(p)
    phi = Activation(f"pow{power}", lambda x: x**power, lambda x: power * x ** (power - 1))
    return [applied(step, step.gradient, phi)]


@backwards("prelu")
def _prelu(step: Back) -> list[Gradient]:
    slope = step.signal(1)
    if slope.second_moment is None or slope.mean is None:
        return [UNKNOWN_GRADIENT]
    phi = leaky_relu(math.copysign(slope.rms or 0.0, slope.mean))
    return [through(step.gradient, step.signal(0), phi, step.shape(0))]


@backwards("glu")
def _glu(step: Back) -> list[Gradient]:
    """a·σ(b): E g² times E σ² for the first half, times E a²·E σ′² for the second."""
    x, g, sigmoid = step.signal(0), step.gradient, activation("sigmoid", {})
    if x.second_moment is None or x.mean is None or sigmoid is None or g.second_moment is None:
        return [UNKNOWN_GRADIENT]
    m = sigmoid.moments(x.mean, max(x.second_moment - x.mean**2, 0.0))
    axis = int(step.number("axis"))
    factor = (m.second_moment + x.second_moment * m.slope) / 2
    along = tuple(0.0 if a == axis else both(c, d) for a, (c, d) in enumerate(
        zip(g.along, along_of(x, step.shape(0)), strict=True)))  # fmt: skip
    profile = {a: p for a, p in g.profile.items() if a != axis}
    return [Gradient(g.second_moment * factor, along, profile, origin=step.source(0))]


# --------------------------------------------------------------------------- sums and products


@backwards("add", "sub")
def _add(step: Back) -> list[Gradient | None]:
    """Each term gets the gradient as it is, summed over the axes that it was copied along."""
    signs = (1.0, 1.0 if step.node.op == "add" else -1.0)
    if step.value(0) == step.value(1):
        total = 1.0 + signs[1]
        return [times(step.gradient, total**2, mean=total), None]
    found: list[Gradient | None] = []
    for i in (0, 1):
        g = unbroadcast(step, step.gradient, i)
        g = g.but(aligned=_share_aligned(step, i), excess=_share_excess(step, i),
                  origin=scaled_origin(g, signs[i]), given=_share_given(step, i),
                  bend=g.bend * _share(step, i))  # fmt: skip
        found.append(g)
    return found


def _share_aligned(step: Back, i: int) -> Correlation:
    """A sum is aligned with a term by the term's share s of the variance; the rest of the term is
    independent of the gradient: s·aligned + (1 − s)·c·c_term."""
    g, x, out = step.gradient, step.signal(i), step.out_signal()
    if g.aligned is None or x.variance is None or not out.variance:
        return None
    share = min(x.variance / out.variance, 1.0)
    c = position_of(g, out, step.out_shape())
    own = None if x.position_correlation is None else _centred(x, x.position_correlation)
    rest = both(c, own)
    return None if rest is None else share * g.aligned + (1 - share) * rest


def _share(step: Back, i: int) -> float:
    """A term's share of a sum's variance."""
    x, total = step.signal(i).variance, step.out_signal().variance
    return min(x / total, 1.0) if x is not None and total else 0.0


def _share_given(step: Back, i: int) -> Profile | None:
    """E[g² | x] = E[s(x + y)] of one term x of a sum, over the other one y."""
    g, x, y, out = step.gradient, step.signal(i), step.signal(1 - i), step.out_signal()
    if (g.given is None or x.law is None or step.shape(i) != step.out_shape()
            or not x.variance or not out.variance or y.variance is None):  # fmt: skip
        return None
    sign = 1.0 if step.node.op == "add" else -1.0
    total = NODES if out.law is None else out.law.values
    own, other = x.law.values, NODES if y.law is None else y.law.values
    signs = (1.0, sign) if i == 0 else (sign, 1.0)
    return expected(g.given, math.sqrt(out.variance) * total,
                    signs[0] * math.sqrt(x.variance) * own,
                    signs[1] * math.sqrt(y.variance) * other)  # fmt: skip


def _share_excess(step: Back, i: int) -> float:
    """Of a sum's variance Σ s_j v_j a term's weights explain s_i·r_i of the r = Σ s_j² r_j that it
    varies by (see channel_variations)."""
    excess, total = step.gradient.excess, step.out_signal().variance
    x = step.signal(i).variance
    if excess == 1.0 or not total or x is None:
        return 1.0
    whole = step.variations.get(step.node.outputs[0], 0.0)
    own = min(x / total, 1.0) * step.variations.get(step.value(i) or "", 0.0)
    return 1 + (excess - 1) * min(own / whole, 1.0) if whole > 0 else 1.0


def broadcast_along(step: Back, i: int) -> tuple[Correlation, ...]:
    """E[x x′]/E x² of input ``i`` along the output's axes: 1 along those that it lacks."""
    x, shape, out = step.signal(i), step.shape(i), step.out_shape()
    if shape is None or out is None or len(shape) > len(out):
        return ()
    lead = len(out) - len(shape)
    roles = x.roles if len(x.roles) == len(shape) else ()
    found: list[Correlation] = [1.0] * lead
    for a, n in enumerate(shape):
        same = n == 1 and out[lead + a] != 1
        c = None if not roles else role_correlation(x, roles[a])
        if c is None and x.second_moment and x.mean is not None and not roles:
            c = min(x.mean**2 / x.second_moment, 1.0)
        found.append(1.0 if same else c)
    return tuple(found)


def _number(step: Back, i: int) -> float | None:
    array = step.constant(i)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def scaled(g: Gradient, factor: float) -> Gradient:
    """factor·g for a number, what is known of its place kept."""
    return g.but(second_moment=strength(g, factor**2), origin=scaled_origin(g, factor))


@backwards("mul")
def _mul(step: Back) -> list[Gradient | None]:
    """A factor gets the gradient times the other factor: E g²·E b² for independent ones, summed
    over the axes that it was copied along (a channel's gate: over its positions)."""
    if step.value(0) == step.value(1):
        return [*_square(step), None]
    found: list[Gradient | None] = []
    for i in (0, 1):
        number = _number(step, 1 - i)
        if number is not None and _number(step, i) is None:
            found.append(unbroadcast(step, scaled(step.gradient, number), i))
            continue
        found.append(multiplied(step, step.gradient, i, 1 - i))
    return found


def multiplied(step: Back, g: Gradient, i: int, other: int) -> Gradient:
    """The gradient of input ``i`` of a product whose other factor is input ``other``."""
    b = step.signal(other)
    along = broadcast_along(step, other)
    if g.zero:
        return no_gradient(step.rank(i))
    if b.second_moment is None or len(along) != len(g.along):
        return UNKNOWN_GRADIENT
    if not step.out_signal().known and step.signal(i).known:  # factors that depend on each other
        return UNKNOWN_GRADIENT
    lead = len(g.along) - step.rank(other)
    profile = {a + lead: p for a, p in b.profile.items()}
    kept = g.aligned if all(c == 1.0 or a < 2 for a, c in enumerate(along)) else None
    return unbroadcast(step, times(g, b.second_moment, along, b.mean, profile).but(aligned=kept), i)


@backwards("div")
def _div(step: Back) -> list[Gradient | None]:
    """a/b: the divisor's E 1/b² is what the forward pass took it to be, E y²/E a²; b itself gets
    −g·y/b, of second moment E g²·E y²·E 1/b²."""
    g = step.gradient
    number = _number(step, 1)
    if number:
        return [unbroadcast(step, scaled(g, 1 / number), 0)]
    a, y = step.signal(0), step.out_signal()
    start = step.dependence.number(step.value(1) or "", step.signals)  # such as a temperature's
    if y.second_moment is None or not (start or a.second_moment):
        return [UNKNOWN_GRADIENT, UNKNOWN_GRADIENT]
    inverse = 1 / start**2 if start else y.second_moment / (a.second_moment or math.nan)
    above = times(g, inverse, broadcast_along(step, 1) or None, math.sqrt(inverse))
    below = times(g, inverse * y.second_moment, along_of(y, step.out_shape()))
    return [unbroadcast(step, above, 0), unbroadcast(step, below, 1)]


@backwards("neg")
def _neg(step: Back) -> list[Gradient]:
    return [scaled(step.gradient, -1.0)]


@backwards("clip")
def _clip(step: Back) -> list[Gradient]:
    low, high = _number(step, 1), _number(step, 2)
    if (step.has(1) and low is None) or (step.has(2) and high is None):
        return [UNKNOWN_GRADIENT]
    x, y = step.signal(0), step.out_signal()
    if high is None and x.one_sided > 0 and y.second_moment == x.second_moment:
        return [step.gradient]
    return [_hard(step, 0, -math.inf if low is None else low, math.inf if high is None else high)]


def _hard(step: Back, i: int, low: float, high: float) -> Gradient:
    phi = activation("hardtanh", {"minimum": low, "maximum": high})
    return UNKNOWN_GRADIENT if phi is None else through(step.gradient, step.signal(i), phi,
                                                        step.shape(i))  # fmt: skip


@backwards("maximum", "minimum")
def _extreme(step: Back) -> list[Gradient | None]:
    """Against a number it clips. Of two tensors of one law each is chosen half the time."""
    greatest = step.node.op == "maximum"
    for i in (0, 1):
        edge = step.dependence.number(step.value(i) or "", step.signals)
        if edge is None:
            continue
        x, y = step.signal(1 - i), step.out_signal()
        whole = x.one_sided > 0 and greatest and y.second_moment == x.second_moment
        bounds = (edge, math.inf) if greatest else (-math.inf, edge)
        g = step.gradient if whole else _hard(step, 1 - i, *bounds)
        rest = None if step.constant(i) is not None else _less(step, g, i)
        return [g, rest] if i == 1 else [rest, g]
    a, b = step.signal(0), step.signal(1)
    if a.second_moment is None or b.second_moment is None or a.mean is None or b.mean is None:
        return [UNKNOWN_GRADIENT, UNKNOWN_GRADIENT]
    spread = math.sqrt((a.variance or 0.0) + (b.variance or 0.0))
    ahead = (a.mean - b.mean) / spread if spread > 0 else 0.0
    share = math.erfc(-ahead / math.sqrt(2)) / 2
    share = share if greatest else 1 - share
    half = (0.5,) * len(step.gradient.along)
    return [unbroadcast(step, times(step.gradient, share, half, share), 0),
            unbroadcast(step, times(step.gradient, 1 - share, half, 1 - share), 1)]  # fmt: skip


def _less(step: Back, g: Gradient, i: int) -> Gradient:
    """What a weight that all start at one number gets of a maximum: where it is chosen."""
    arriving, chosen = step.gradient, g.second_moment
    if arriving.second_moment is None or chosen is None:
        return UNKNOWN_GRADIENT
    share = max(1 - chosen / arriving.second_moment, 0.0) if arriving.second_moment else 0.0
    return unbroadcast(step, times(arriving, share, (share,) * len(arriving.along), share), i)


@backwards("where", "masked_fill")
def _choice(step: Back) -> list[Gradient | None]:
    """Each alternative gets the gradient where it was chosen. Behind a fill of −inf the softmax
    has no gradient already, so that what arrives is all of it."""
    g = step.gradient
    if step.node.op == "where":
        mask, places = step.constant(0), (1, 2)
    else:
        mask, places = step.constant(1), (2, 0)
    found: list[Gradient | None] = [None] * len(step.node.inputs)
    numbers = [_number(step, i) for i in places]
    static = [step.value(i) in step.graph.static for i in places]
    share = None if mask is None else float(mask.astype(float).mean())
    parts = (share, None if share is None else 1 - share)
    for place, other, part, fixed in zip(places, numbers[::-1], parts, static, strict=True):
        if fixed:
            continue
        if other is not None and other < -1e4:
            found[place] = unbroadcast(step, g, place)
        elif part is not None:
            along = (min(part, 1.0),) * len(g.along)
            found[place] = unbroadcast(step, times(g, part, along, part), place)
        else:
            found[place] = UNKNOWN_GRADIENT
    return found


@backwards("select")
def _select(step: Back) -> list[Gradient | None]:
    """Only one branch runs: each is told what it gets when it does."""
    return [None, step.gradient, step.gradient]


_POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}


@backwards("sqrt", "log", "rsqrt", "reciprocal", "log1p")
def _root(step: Back) -> list[Gradient]:
    """Of what stays away from zero, p·y^{p−1} by the law of :func:`steady_power`."""
    x, g = step.signal(0), step.gradient
    if step.node.op == "log1p":
        x = added(x, Signal(1.0, 1.0, 1.0, 1.0, cross_correlation=1.0))
    return [_of_power(step, g, x, _POWERS.get(step.node.op, 0.0))]


def _of_power(step: Back, g: Gradient, x: Signal, p: float) -> Gradient:
    """Through y^p; through ln y for p = 0."""
    slope = steady_power(x, p - 1)
    factor = p if p else 1.0
    if slope.second_moment is None or slope.mean is None:
        return UNKNOWN_GRADIENT
    along = along_of(slope.but(roles=x.roles), step.shape(0))
    return times(g, factor**2 * slope.second_moment, along, factor * slope.mean)


# --------------------------------------------------------------------------- noise


@backwards("dropout", "drop_path")
def _dropout(step: Back) -> list[Gradient]:
    """The mask of the forward pass, 1/keep with probability keep."""
    g, p = step.gradient, step.number("p")
    if not step.attribute("training") or p == 0.0 or step.graph.mode == "eval":
        return [g]
    keep = 1 - p
    if keep <= 0:
        return [no_gradient(step.rank(0))]
    whole = step.node.op == "drop_path"
    along = tuple(keep if not whole or a == 0 else 1.0 for a in range(len(g.along)))
    found = times(g, 1 / keep, along, 1.0)
    kept = None if g.aligned is None else g.aligned * (1.0 if whole else keep)
    return [replace(found, aligned=kept)]


@backwards("quantize", "dequantize")
def _requantize(step: Back) -> list[Gradient]:
    number = _number(step, 1)
    if not number:
        return [UNKNOWN_GRADIENT]
    return [scaled(step.gradient, 1 / number if step.node.op == "quantize" else number)]


@backwards("cumsum")
def _cumsum(step: Back) -> list[Gradient]:
    """Element i enters n − i sums: (n + 1)/2 on average, pairs of them by the correlation."""
    g, shape, axis = step.gradient, step.shape(0), int(step.number("axis"))
    n = shape[axis] if shape is not None else None
    if n is None or g.second_moment is None or not g.along or g.along[axis] is None:
        return [UNKNOWN_GRADIENT]
    c = g.along[axis] or 0.0
    pairs = sum(k * (k - 1) for k in range(1, n + 1)) / n
    second = g.second_moment * ((n + 1) / 2 + pairs * c)
    along = tuple(None if a == axis else d for a, d in enumerate(g.along))
    return [Gradient(second, along, {a: p for a, p in g.profile.items() if a != axis})]


@backwards("floor", "ceil", "round", "trunc", "equal", "less", "greater", "one_hot", "argmax",
           "argmin", "bernoulli")  # fmt: skip
def _steps(step: Back) -> list[Gradient | None]:
    """Piecewise constant: no gradient."""
    return [no_gradient(step.rank(i)) for i in range(len(step.node.inputs))]
