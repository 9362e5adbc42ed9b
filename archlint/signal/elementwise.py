"""Elementwise ops: activations, sums, products, and the rest of arithmetic."""

from __future__ import annotations

import math

import numpy as np

from archlint.signal.activations import Activation, activation, composed, leaky_relu
from archlint.signal.arithmetic import added, aligned, beside_zeros, greater, multiplied, scaled
from archlint.signal.gaussian import Floats
from archlint.signal.joint import together
from archlint.signal.laws import NODES, WEIGHTS, Law, Series
from archlint.signal.masks import MASKED
from archlint.signal.moments import UNKNOWN_SIGNAL, Role, Signal
from archlint.signal.ranking import normalised
from archlint.signal.reuse import with_reuse
from archlint.signal.rotation import rotated
from archlint.signal.squares import (
    before_root,
    is_above,
    is_sum_of_squares,
    log_of_gamma,
    root_of_gamma,
    squared_root,
)
from archlint.signal.transfer import (
    Step,
    correlated,
    merged_groups,
    of_constant,
    paired,
    product,
    transfers,
)


def through(x: Signal, phi: Activation) -> Signal:
    """φ of a tensor whose elements are normal with the signal's mean and variance, or have the law
    that is known of them.

    The normal law is exact for pre-activations of Gaussian weights given the layer before, and the
    limit for others; covariances map by Mehler's formula.
    """
    if x.second_moment is None or x.mean is None:
        return Signal(roles=x.roles)
    if x.one_sided > 0 and keeps_positive(phi):
        return x
    variance = max(x.second_moment - x.mean * x.mean, 0.0)
    if x.law is not None and variance > 0:
        return _through_law(x, x.law, phi)
    m = phi.moments(x.mean, variance)
    if not math.isfinite(m.second_moment):
        return Signal(roles=x.roles)

    mean, second = x.mean, x.second_moment
    profile, first, level = _uneven(x, phi)

    def pair(correlation: float) -> float | None:
        covariance = correlation * second - mean * mean
        return correlated(phi.pair(mean, variance, covariance), m.second_moment)

    law = Law(lambda: phi.function(mean + math.sqrt(variance) * NODES)) if variance > 0 else None
    return Signal(
        m.mean * first, m.second_moment * level, None, None, x.odd_in if phi.odd else (),
        phi.one_sided, x.roles, profile=profile, law=law,
    ).but(**paired(x, pair))  # fmt: skip


EVEN = 0.05  # range of a profile that is taken to be flat
LENGTHS = 7  # lengths at which an activation is looked at


def _uneven(x: Signal, phi: Activation) -> tuple[dict[int, Floats], float, float]:
    """(profile, mean, second moment) of φ over those of even lengths, along each axis of an x whose
    length differs by place, such as at a padded border. One that is homogeneous changes nothing
    of the profile and the second moment."""
    found: dict[int, Floats] = {}
    if phi.homogeneous or x.second_moment is None or x.mean is None:
        return dict(x.profile), 1.0, 1.0
    first = level = 1.0
    fixed, q = x.mean**2, x.second_moment
    middle = phi.moments(x.mean, max(q - fixed, 0.0))
    for axis, values in x.profile.items():
        low, high = float(values.min()), float(values.max())
        if high - low < EVEN or middle.second_moment <= 0:
            continue
        at = np.linspace(low, high, LENGTHS)
        made = [phi.moments(x.mean, max(q * float(p) - fixed, 0.0)) for p in at]
        own = np.interp(values, at, [m.second_moment for m in made])
        share = float(own.mean()) / middle.second_moment
        if not math.isfinite(share) or share <= 0:
            return {}, 1.0, 1.0
        if middle.mean:
            first *= float(np.interp(values, at, [m.mean for m in made]).mean()) / middle.mean
        level *= share
        found[axis] = own / float(own.mean())
    return found, first, level


def _through_law(x: Signal, law: Law, phi: Activation) -> Signal:
    """φ(m + σ·h(z)): two elements by the normals that they are made of (signal.laws)."""
    assert x.mean is not None
    assert x.variance is not None
    fixed, q, variance = x.mean**2, x.second_moment or 0.0, x.variance
    values = phi.function(x.mean + math.sqrt(variance) * law.values)
    mean, second = float(WEIGHTS @ values), float(WEIGHTS @ (values * values))
    if not math.isfinite(second):
        return Signal(roles=x.roles)
    series = Series(values)

    def pair(c: float) -> float | None:
        own = min(max((c * q - fixed) / variance, -1.0), 1.0)
        return correlated(series.at(law.normal_correlation(own)), second)

    return Signal(
        mean, second, None, None, x.odd_in if phi.odd else (), phi.one_sided, x.roles,
        profile=x.profile if phi.homogeneous else {}, law=Law(lambda: values),
    ).but(**paired(x, pair))  # fmt: skip


def applied(step: Step, phi: Activation) -> Signal:
    """φ of the first input: where that is a function ψ of a normal variable, φ∘ψ of this one."""
    x = step.signal(0)
    if x.one_sided > 0 and keeps_positive(phi):
        return x
    before, inner = nested(step)
    if inner is None:
        return through(x, phi)
    return through(before, composed(phi, inner)).but(roles=x.roles)


def nested(step: Step) -> tuple[Signal, Activation | None]:
    """The first input as a function of a normal variable, None where it is taken for one itself.
    Zeros that are added change nothing, such as a residual branch that begins at zero."""
    value, inner = step.value(0), None
    for _ in range(_MOST_NESTED):
        node = step.graph.producer.get(value or "")
        psi = activation(node.op, node.attributes) if node is not None else None
        if node is not None and psi is not None:
            inner = psi if inner is None else composed(inner, psi)
            value = node.inputs[0]
        elif node is None or node.op != "add":
            break
        elif (left := beside_zeros(step.signals, node)) is not None:
            value = left
        else:
            break
    x = step.signals.get(value or "", UNKNOWN_SIGNAL)
    if not x.known or len(x.roles) != len(step.signal(0).roles):
        return step.signal(0), None
    return x, inner


_MOST_NESTED = 32


def keeps_positive(phi: Activation) -> bool:
    """Whether φ(x) = x for x ≥ 0, as of ReLU and its leaky kin: a second one changes nothing."""
    return phi.homogeneous and float(phi.function(np.ones(1))[0]) == 1.0


def _squared(step: Step) -> Signal:
    """x², exactly for x = √X, else of the normal law."""
    exact = squared_root(step)
    phi = activation("square", {})
    if exact is not None or phi is None:
        return exact or UNKNOWN_SIGNAL
    return applied(step, phi)


def _activation(step: Step) -> Signal:
    """A nonlinearity of the vocabulary (signal.activations)."""
    phi = activation(step.node.op, step.node.attributes)
    return UNKNOWN_SIGNAL if phi is None else applied(step, phi)


transfers(
    "relu", "sigmoid", "tanh", "silu", "mish", "softsign", "erf", "sin", "cos", "hardswish",
    "relu6",
    "tanhshrink", "logsigmoid", "leaky_relu", "rrelu", "elu", "selu", "celu", "gelu", "softplus",
    "hardsigmoid", "hardtanh", "threshold", "hardshrink", "softshrink", "abs", "exp",
    "expm1", "atan", "sinh", "asinh", "sign",
)(_activation)  # fmt: skip
transfers("square")(_squared)


@transfers("prelu")
def _prelu(step: Step) -> Signal:
    """Leaky ReLU with a learned slope, at the slope's root mean square."""
    slope = step.signal(1)
    if slope.second_moment is None or slope.mean is None:
        return UNKNOWN_SIGNAL
    return through(step.signal(0), leaky_relu(math.copysign(slope.rms or 0.0, slope.mean)))


@transfers("glu")
def _glu(step: Step) -> Signal:
    """a·σ(b) of the two halves, which are independent: the product of their second moments."""
    x = step.signal(0)
    sigmoid = activation("sigmoid", {})
    if x.second_moment is None or sigmoid is None:
        return UNKNOWN_SIGNAL
    return multiplied(x, through(x, sigmoid)).but(odd_in=())


# --------------------------------------------------------------------------- sums and products


def dependent(step: Step) -> bool:
    """Whether the two inputs are functions, element by element, of one random tensor, or one is
    made of means of the other."""
    a, b = step.value(0), step.value(1)
    if a is None or b is None:
        return False
    if step.dependence.number(a, step.signals) is not None:
        return False
    if step.dependence.number(b, step.signals) is not None:
        return False
    return step.dependence.common(a, b) or step.dependence.by_means(a, b)


def cross_terms(step: Step) -> bool:
    """Whether in a sum of dependent tensors what they have in common counts: not where weights
    that only one contains decide its sign, or where one is small."""
    a, b = step.value(0), step.value(1)
    return not (
        a is None or b is None or a == b
        or step.dependence.separated(a, b, step.signals) or _one_is_small(step)
    )  # fmt: skip


@transfers("add", "sub")
def _add(step: Step) -> Signal:
    sign = 1.0 if step.node.op == "add" else -1.0
    if step.value(0) == step.value(1):
        return scaled(step.signal(0), 1.0 + sign)
    if step.node.op == "add" and (whole := rotated(step)) is not None:
        return whole
    if dependent(step):
        return _of_dependent(step)
    if (centred := _centred(step)) is not None:
        return centred
    a, b = aligned(step, 0), aligned(step, 1)
    for i in (0, 1):
        number = step.constant(i)
        if number is not None and number.size > 1 and float(number.min()) < MASKED:
            rest = np.where(number < MASKED, 0.0, number.astype(np.float64))
            shown = of_constant(rest)
            shown = (a if i == 0 else b).but(mean=shown.mean, second_moment=shown.second_moment)
            a, b = (shown, b) if i == 0 else (a, shown)
            if not shown.second_moment:  # a mask alone
                return added(a, b, sign).but(shared=step.signal(1 - i).shared)
    return with_reuse(step, added(a, b, sign), sign)


def _of_dependent(step: Step) -> Signal:
    """a ± b of tensors with a common source: exact where weights that only one contains decide its
    sign, else as functions of what they have in common (signal.joint)."""
    if not cross_terms(step):
        sign = 1.0 if step.node.op == "add" else -1.0
        return with_reuse(step, added(aligned(step, 0), aligned(step, 1), sign), sign)
    return together(step) or Signal(roles=step.signal(0).roles)


_SMALL = 2.5e-5


def _one_is_small(step: Step) -> bool:
    """Whether one summand, such as a branch whose layer scale starts small, is below √2.5e-5 of the
    other: what they have in common then moves the rms of the sum by at most 0.5 % (Cauchy–Schwarz).
    """
    p, q = (step.signal(i).second_moment for i in (0, 1))
    return p is not None and q is not None and min(p, q) <= _SMALL * max(p, q)


def _centred(step: Step) -> Signal | None:
    """x − m with m the mean of x over some axes: E(x − m)² = E x² − E m², since x·m averages to m².
    None for anything else."""
    mean = step.graph.producer.get(step.value(1) or "")
    if step.node.op != "sub" or mean is None or mean.op != "reduce_mean":
        return None
    x, m = step.signal(0), step.signal(1)
    if mean.inputs[0] != step.value(0) or not mean.attributes.get("keepdims"):
        return None
    if x.second_moment is None or m.second_moment is None or x.mean is None:
        return Signal(roles=x.roles)
    return Signal(0.0, max(x.second_moment - m.second_moment, 0.0), odd_in=x.odd_in, roles=x.roles)


@transfers("mul")
def _mul(step: Step) -> Signal:
    if step.value(0) == step.value(1):
        return _squared(step)
    for i in (0, 1):
        number = step.constant(i)
        if number is not None and number.size == 1:
            return scaled(step.signal(1 - i), float(number.reshape(-1)[0]))
    if dependent(step):
        return together(step) or Signal(roles=step.signal(0).roles)
    return multiplied(aligned(step, 0), aligned(step, 1))


@transfers("div")
def _div(step: Step) -> Signal:
    number = step.constant(1)
    if number is not None and number.size == 1 and float(number.reshape(-1)[0]) != 0:
        return scaled(step.signal(0), 1 / float(number.reshape(-1)[0]))
    if number is not None:
        finite = number.astype(np.float64)
        if finite.size and (finite != 0).all():
            ones = 1 / finite
            divisor = Signal(float(ones.mean()), float((ones**2).mean()), 1.0, 1.0,
                             cross_correlation=1.0)  # fmt: skip
            return multiplied(aligned(step, 0), divisor)
    share = normalised(step)
    if share is not None:
        return share
    below = aligned(step, 1)
    if below.second_moment and below.mean and _of_one_product(step):
        # the length of the row that both were multiplied with cancels: E(a/b)² = E a²/E b²
        size = math.copysign(math.sqrt(below.second_moment), below.mean)
        return scaled(aligned(step, 0), 1 / size)
    return multiplied(aligned(step, 0), inverse(below))


_SLICES = frozenset({"slice", "split", "select_index", "reshape", "add", "clip", "maximum", "cast"})


def _of_one_product(step: Step) -> bool:
    """Whether both inputs are parts of one product of matrices, but for numbers added."""
    found = []
    for value in (step.value(0), step.value(1)):
        node = step.graph.producer.get(value or "")
        while node is not None and node.op in _SLICES:
            carried = [v for v in node.inputs if v is not None and v not in step.graph.static]
            node = step.graph.producer.get(carried[0]) if len(carried) == 1 else None
        found.append(node)
    return found[0] is not None and found[0] is found[1] and found[0].op == "matmul"


_STEADY = 0.35  # relative variance up to which a divisor is taken at the first terms of its inverse


def inverse(y: Signal) -> Signal:
    """1/y for a y that stays away from zero (:func:`steady_power`), of either sign."""
    if y.mean is None or y.mean >= 0:
        return steady_power(y, -1.0)
    return scaled(steady_power(scaled(y, -1.0), -1.0), -1.0)


def steady_power(y: Signal, p: float) -> Signal:
    """y^p for a positive y that stays away from zero: with relative variance r = Var y/(E y)² and
    a log-normal law E y^p = (E y)^p·(1 + r)^{p(p−1)/2}, and E[y^p y′^p] = (E y^p)²·(E[y y′]/(E y)²)
    to the power p². Unknown for a wide y."""
    if y.second_moment is None or y.mean is None or y.mean <= 0:
        return Signal(roles=y.roles)
    r = max(y.second_moment / y.mean**2 - 1, 0.0)
    if r > _STEADY:
        return Signal(roles=y.roles)
    mean = y.mean**p * (1 + r) ** (p * (p - 1) / 2)
    second = y.mean ** (2 * p) * (1 + r) ** (p * (2 * p - 1))
    q, fixed = y.second_moment, y.mean**2

    def pair(c: float) -> float | None:
        joint = max(c * q / fixed, 0.1)  # E[y y′]/(E y)²
        return correlated(mean * mean * joint ** (p * p), second)

    return Signal(mean, second, None, None, (), 1, y.roles,
                  ).but(**paired(y, pair))  # fmt: skip


@transfers("rsqrt", "reciprocal")
def _power(step: Step) -> Signal:
    """x^−½ and x^−1 of what stays away from zero."""
    if step.node.op == "reciprocal":
        return inverse(step.signal(0))
    return steady_power(step.signal(0), -0.5)


@transfers("neg")
def _neg(step: Step) -> Signal:
    return scaled(step.signal(0), -1.0)


@transfers("pow")
def _pow(step: Step) -> Signal:
    """x^p for a fixed p, as an activation on the normal law."""
    number = step.constant(1)
    if number is None or number.size != 1:
        return UNKNOWN_SIGNAL
    p = float(number.reshape(-1)[0])
    if p == 1.0:
        return step.signal(0)
    if p == 2.0:
        return _squared(step)
    if p == int(p) and 0 < p <= 8:
        power = int(p)
        phi = Activation(f"pow{power}", lambda x: x**power, lambda x: power * x ** (power - 1),
                         one_sided=1 if power % 2 == 0 else 0, odd=power % 2 == 1)  # fmt: skip
        return applied(step, phi)
    return steady_power(step.signal(0), p) if step.signal(0).one_sided > 0 else UNKNOWN_SIGNAL


@transfers("sqrt")
def _sqrt(step: Step) -> Signal:
    """E (√x)² = E x exactly; the mean of √x is known of a sum of squares, and of what hardly
    varies, not from moments."""
    x = step.signal(0)
    if x.one_sided <= 0 or x.mean is None:
        return Signal(roles=x.roles)
    if is_sum_of_squares(step, step.value(0)):
        return root_of_gamma(x)
    steady = steady_power(x, 0.5)
    if steady.known:
        return steady
    return Signal(None, x.mean, None, None, (), 1, x.roles)


@transfers("log")
def _log(step: Step) -> Signal:
    """Known of a sum of squares and of its root; else the mean of ln x does not follow from
    moments."""
    x, power = before_root(step, step.value(0))
    if x is None:
        return Signal(roles=step.signal(0).roles)
    return scaled(log_of_gamma(x), power).but(roles=step.signal(0).roles)


@transfers("clip")
def _clip(step: Step) -> Signal:
    low, high = step.constant(1), step.constant(2)
    if (step.has(1) and low is None) or (step.has(2) and high is None):
        return UNKNOWN_SIGNAL
    if low is not None and high is None and is_above(step.signal(0), float(low.reshape(-1)[0])):
        return step.signal(0)
    phi = activation("hardtanh", {
        "minimum": -math.inf if low is None else float(low.reshape(-1)[0]),
        "maximum": math.inf if high is None else float(high.reshape(-1)[0])})  # fmt: skip
    return UNKNOWN_SIGNAL if phi is None else through(step.signal(0), phi)


@transfers("maximum", "minimum")
def _extreme(step: Step) -> Signal:
    """Against a number it clips. Of two normal tensors of which neither tells of the other; else
    unknown."""
    for i in (0, 1):
        edge = step.dependence.number(step.value(i) or "", step.signals)
        if edge is not None:
            if step.node.op == "maximum" and is_above(step.signal(1 - i), edge):
                return step.signal(1 - i)
            bounds = (edge, math.inf) if step.node.op == "maximum" else (-math.inf, edge)
            phi = activation("hardtanh", {"minimum": bounds[0], "maximum": bounds[1]})
            return UNKNOWN_SIGNAL if phi is None else through(step.signal(1 - i), phi)
    a, b = aligned(step, 0), aligned(step, 1)
    if not (a.gaussian and b.gaussian) or (dependent(step) and cross_terms(step)):
        return UNKNOWN_SIGNAL
    if step.node.op == "maximum":
        return greater(a, b)
    return scaled(greater(scaled(a, -1.0), scaled(b, -1.0)), -1.0)


@transfers("where", "masked_fill")
def _choice(step: Step) -> Signal:
    """A choice by a mask: known where both alternatives have the same moments, or the mask is
    known; a mask of −inf or of the dtype's least number leaves the other one, as softmax does."""
    if step.node.op == "where":
        mask, a, b = step.constant(0), step.signal(1), step.signal(2)
        numbers = (step.constant(1), step.constant(2))
    else:
        mask, a, b = step.constant(1), step.signal(2), step.signal(0)
        numbers = (step.constant(2), None)
    for number, other in zip(numbers, (b, a), strict=True):
        if number is not None and number.size == 1 and float(number.reshape(-1)[0]) < MASKED:
            return other
    if mask is not None and a.second_moment is not None and b.second_moment is not None:
        share = float(mask.astype(np.float64).mean())
        if share in (0.0, 1.0):
            return a if share else b
        if a.mean is None or b.mean is None:
            return UNKNOWN_SIGNAL
        return Signal(share * a.mean + (1 - share) * b.mean,
                      share * a.second_moment + (1 - share) * b.second_moment,
                      roles=a.roles or b.roles)  # fmt: skip
    return joined(a, b)


def joined(a: Signal, b: Signal) -> Signal:
    """What is true of both tensors: equal moments stay, different ones are unknown."""

    def same(x: float | None, y: float | None) -> float | None:
        if x is None or y is None or not math.isclose(x, y, rel_tol=0.02, abs_tol=1e-12):
            return None
        return (x + y) / 2

    roles: tuple[Role, ...] = a.roles if a.roles == b.roles else ()
    return Signal(same(a.mean, b.mean), same(a.second_moment, b.second_moment),
                  same(a.position_correlation, b.position_correlation),
                  same(a.sample_correlation, b.sample_correlation), 
                  merged_groups(a.odd_in, b.odd_in),
                  a.one_sided if a.one_sided == b.one_sided else 0, roles,
                  cross_correlation=same(a.apart, b.apart))  # fmt: skip


@transfers("select")
def _select(step: Step) -> Signal:
    return joined(step.signal(1), step.signal(2))


# --------------------------------------------------------------------------- noise


@transfers("dropout", "drop_path")
def _dropout(step: Step) -> tuple[Signal, Signal]:
    """Inverted dropout keeps the mean and divides E x² by the share that is kept."""
    x = step.signal(0)
    p = step.number("p")
    keep = 1 - p
    if not step.attribute("training") or p == 0.0 or step.graph.mode == "eval":
        return x, UNKNOWN_SIGNAL
    if keep <= 0:
        zeros = Signal(0.0, 0.0, 1.0, 1.0, (), 0, x.roles, cross_correlation=1.0)
        return zeros, UNKNOWN_SIGNAL
    whole = step.node.op == "drop_path"  # whole samples: positions of one sample stay together
    return x.but(
        second_moment=None if x.second_moment is None else x.second_moment / keep,
        position_correlation=x.position_correlation if whole
        else product(x.position_correlation, keep),
        sample_correlation=product(x.sample_correlation, keep),
        cross_correlation=product(x.apart, keep),
        gaussian=False,
    ), UNKNOWN_SIGNAL  # fmt: skip


def _noise_roles(step: Step) -> tuple[Role, ...]:
    return step.signal(0).roles


@transfers("random_normal")
def _random_normal(step: Step) -> Signal:
    mean, std = step.number("mean"), step.number("std")
    second = mean**2 + std**2
    c = correlated(mean**2, second)
    return Signal(mean, second, c, c, (), 0, _noise_roles(step), gaussian=True,
                  cross_correlation=c)  # fmt: skip


@transfers("random_uniform")
def _random_uniform(step: Step) -> Signal:
    low, high = step.number("low"), step.number("high")
    mean = (low + high) / 2
    second = mean**2 + (high - low) ** 2 / 12
    c = correlated(mean**2, second)
    return Signal(mean, second, c, c, (), int(low >= 0), _noise_roles(step),
                  cross_correlation=c)  # fmt: skip


@transfers("bernoulli")
def _bernoulli(step: Step) -> Signal:
    """One with the probability p, else zero: E x² = E x = E p, and two draws E[x x′] = E[p p′]."""
    p = step.signal(0)
    if p.mean is None or p.second_moment is None:
        return Signal(roles=p.roles)
    mean, q = p.mean, p.second_moment
    roles = () if step.value(0) in step.graph.static else p.roles
    found = Signal(mean, mean, None, None, (), 1, roles)
    return found.but(**paired(p, lambda c: correlated(c * q, mean)))


@transfers("floor")
def _floor(step: Step) -> Signal:
    """⌊c + U⌋ with U uniform: each whole number with the share of the interval it takes, as the
    mask of stochastic depth is often spelled. Else unknown."""
    producer = step.graph.producer.get(step.value(0) or "")
    shift, source = 0.0, producer
    if producer is not None and producer.op in ("add", "sub") and len(producer.inputs) == 2:
        for number, other in (producer.inputs, producer.inputs[::-1]):
            known = step.graph.constant(number)
            if known is not None and known.size == 1:
                sign = -1.0 if producer.op == "sub" and number == producer.inputs[1] else 1.0
                shift = sign * float(known.reshape(-1)[0])
                source = step.graph.producer.get(other or "")
    if source is None or source.op != "random_uniform":
        return Signal(roles=step.signal(0).roles)
    low = float(str(source.attributes.get("low", 0.0))) + shift
    high = float(str(source.attributes.get("high", 1.0))) + shift
    if not high > low:
        return Signal(roles=step.signal(0).roles)
    whole = np.arange(math.floor(low), math.ceil(high), dtype=np.float64)
    share = np.clip(np.minimum(whole + 1, high) - np.maximum(whole, low), 0, None) / (high - low)
    mean, second = float(share @ whole), float(share @ whole**2)
    c = correlated(mean * mean, second)
    return Signal(mean, second, c, c, (), int(low >= 0), step.signal(0).roles,
                  cross_correlation=c)  # fmt: skip


@transfers("quantize", "dequantize")
def _requantize(step: Step) -> Signal:
    """v/scale + zero point and back; rounding noise is left out."""
    x, scale, zero = step.signal(0), step.constant(1), step.constant(2)
    if scale is None or scale.size != 1 or (step.has(2) and zero is None):
        return UNKNOWN_SIGNAL
    factor = float(scale.reshape(-1)[0])
    shift = 0.0 if zero is None else float(zero.reshape(-1)[0])
    offset = Signal(shift, shift * shift, 1.0, 1.0, cross_correlation=1.0)
    if step.node.op == "quantize":
        return added(scaled(x, 1 / factor), offset)
    return scaled(added(x, offset, -1.0), factor)
