"""Sums and products of signals that have no source in common, and numbers times signals."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from archlint.graph.model import Node
from archlint.signal.activations import activation
from archlint.signal.laws import law_of_sum, mirrored
from archlint.signal.moments import UNKNOWN_SIGNAL, Role, Signal
from archlint.signal.transfer import Step, both_paired, correlated, merged_groups


def aligned(step: Step, i: int) -> Signal:
    """Input ``i`` broadcast to the output: along an axis that it lacks all elements are equal."""
    x, shape, out = step.signal(i), step.shape(i), step.out_shape()
    if shape is None or out is None or len(shape) > len(out):
        return x
    other = step.signal(1 - i) if len(step.node.inputs) == 2 else x
    target = other.roles if len(other.roles) == len(out) else ()
    lead = len(out) - len(shape)
    roles = x.roles if len(x.roles) == len(shape) else ()
    if lead == 0 and roles and _knows_better(step, i, roles, target):
        target = roles
    if not target:
        return x
    if i in (0, 1) and len(roles) == len(target) == len(other.roles) and roles != other.roles:
        exchanged = _exchanged(step, i, x, roles, shape, out)
        if exchanged is not None:
            return exchanged
    return broadcast(x, shape, out, target)


def broadcast(
    x: Signal, shape: tuple[int | None, ...], out: tuple[int | None, ...], roles: tuple[Role, ...]
) -> Signal:
    """A tensor broadcast to one of the shape ``out`` and ``roles``."""
    lead = len(out) - len(shape)
    positions, samples, apart = x.position_correlation, x.sample_correlation, x.apart
    own_positions = shared_positions = own_samples = False
    for axis, role in enumerate(roles):
        n = shape[axis - lead] if axis >= lead else 1
        wide = n is None or n > 1 or out[axis] == 1
        if role == "position":
            own_positions |= wide
            shared_positions |= not wide
        if role == "sample":
            own_samples |= axis >= lead and n is not None and n > 1
    if shared_positions and not own_positions:
        positions, apart = 1.0, samples
    has_samples = len(x.roles) == len(shape) and "sample" in x.roles
    if not own_samples and "sample" in roles and not has_samples:
        samples, apart = 1.0, positions
    profile = {axis + lead: values for axis, values in x.profile.items()}
    return x.but(position_correlation=positions, sample_correlation=samples,
                 cross_correlation=apart, roles=roles, profile=profile)  # fmt: skip


def _exchanged(
    step: Step, i: int, x: Signal, roles: tuple[Role, ...], shape: tuple[int | None, ...],
    out: tuple[int | None, ...],
) -> Signal | None:  # fmt: skip
    """Of two tensors of samples whose positions and features changed places in one of them (a map
    over positions, put back), the second in the roles of the first: what it says of positions is
    of the other's features. None where they are not such."""
    first = step.signal(0).roles
    if shape != out or step.shape(1 - i) != out or "sample" not in roles:
        return None
    if sorted(roles) != sorted(step.signal(1 - i).roles):
        return None
    if i == 0:
        return x
    between = x.between_features(roles.index("feature")) if "feature" in roles else None
    return x.but(roles=first, position_correlation=between, cross_correlation=between)


def _knows_better(step: Step, i: int, roles: tuple[Role, ...], other: tuple[Role, ...]) -> bool:
    """Whether an input's own roles tell more than the other's: a weight or table has features
    alone, whatever its dimensions index, and a dimension of one element may have any role."""
    if not other:
        return True
    mine, theirs = (step.value(k) in step.graph.static for k in (i, 1 - i))
    if mine != theirs:
        return theirs
    if ("sample" in roles) == ("sample" in other):
        return step.shape(i) == step.out_shape() != step.shape(1 - i)
    return "sample" in roles


def added(a: Signal, b: Signal, sign: float = 1.0) -> Signal:
    """a ± b for tensors that depend on each other at most through their means:
    E(a+b)² = E a² + E b² + 2 E a E b. The cross term is exactly zero where one of the two is odd
    in weights that the other does not depend on, since its mean is then zero."""
    if a.second_moment is None or b.second_moment is None or a.mean is None or b.mean is None:
        return Signal(roles=a.roles or b.roles)
    cross = 2 * sign * a.mean * b.mean
    second = max(a.second_moment + b.second_moment + cross, 0.0)

    q, r = a.second_moment, b.second_moment

    def joint(c: float, d: float) -> float | None:
        return correlated(c * q + d * r + cross, second)

    profile = dict(a.profile) if a.profile else {}
    if b.profile or profile:
        profile = _mixed_profile(a, b)
    side = a.one_sided if sign > 0 and a.one_sided == b.one_sided else 0
    if b.second_moment == 0:  # such as a branch whose last scale starts at zero
        side = a.one_sided
    elif a.second_moment == 0 and sign > 0:
        side = b.one_sided
    law = law_of_sum([(a.law, a.variance or 0.0),
                      (b.law if sign > 0 else mirrored(b.law), b.variance or 0.0)])  # fmt: skip
    return Signal(a.mean + sign * b.mean, second, None, None,
                  merged_groups(a.odd_in, b.odd_in), side, a.roles or b.roles,
                  profile, a.gaussian or b.gaussian, law=law,
                  ).but(**both_paired(a, b, joint))  # fmt: skip


def _mixed_profile(a: Signal, b: Signal) -> dict[int, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """The profile of a sum: each part's by its share of the second moment."""
    total = (a.second_moment or 0.0) + (b.second_moment or 0.0)
    if total <= 0:
        return {}
    mixed = {}
    for axis in {*a.profile, *b.profile}:
        one, two = a.profile.get(axis), b.profile.get(axis)
        if one is not None and two is not None and one.size != two.size:
            continue
        share = (a.second_moment or 0.0) / total
        size = (one if one is not None else two).size  # type: ignore[union-attr]
        flat = np.ones(size)
        mixed[axis] = share * (one if one is not None else flat) + (1 - share) * (
            two if two is not None else flat
        )
    return mixed


def multiplied(a: Signal, b: Signal) -> Signal:
    """a·b for independent tensors: E(ab)² = E a² E b², and so for every correlation."""
    if a.second_moment is None or b.second_moment is None:
        return Signal(roles=a.roles or b.roles)
    mean = None if a.mean is None or b.mean is None else a.mean * b.mean
    return Signal(mean, a.second_moment * b.second_moment, None, None,
                  _product_groups(a, b), a.one_sided * b.one_sided, a.roles or b.roles,
                  a.profile or b.profile,
                  ).but(**both_paired(a, b, lambda c, d: c * d))  # fmt: skip


def greater(a: Signal, b: Signal) -> Signal:
    """max(a, b) = (a + b + |a − b|)/2 elementwise, of normal tensors that are independent but for
    their means: E max = (μ_a + μ_b + E|d|)/2 with d = a − b, and of pairs, this one included,
    4 E max max′ = E s s′ + E|d||d′| + 2 E s|d′| with s = a + b, where
    E s|d′| = E s E|d| + Cov(s, d′)·E sign d (Clark 1961; exact)."""
    va, vb = a.variance, b.variance
    if va is None or vb is None or a.second_moment is None or b.second_moment is None:
        return Signal(roles=a.roles or b.roles)
    ma, mb, qa, qb = a.mean or 0.0, b.mean or 0.0, a.second_moment, b.second_moment
    size = activation("abs", {})
    assert size is not None
    ahead, spread = ma - mb, va + vb
    apart = size.moments(ahead, spread)
    sign = math.erf(ahead / math.sqrt(2 * spread)) if spread > 0 else float(np.sign(ahead))

    def pair(c: float, d: float) -> float:
        one, two = c * qa - ma * ma, d * qb - mb * mb
        lengths = size.pair(ahead, spread, min(one + two, spread))
        crossed = (ma + mb) * apart.mean + (one - two) * sign
        return (c * qa + d * qb + 2 * ma * mb + lengths + 2 * crossed) / 4

    second = max(pair(1.0, 1.0), 0.0)
    return Signal((ma + mb + apart.mean) / 2, second, roles=a.roles or b.roles).but(
        **both_paired(a, b, lambda c, d: correlated(pair(c, d), second)))  # fmt: skip


def _product_groups(a: Signal, b: Signal) -> tuple[frozenset[str], ...]:
    """A product is odd in what exactly one factor is odd in."""
    return tuple(g for g in (*a.odd_in, *b.odd_in) if (g in a.odd_in) != (g in b.odd_in))


def beside_zeros(signals: Mapping[str, Signal], node: Node) -> str | None:
    """The operand to which zeros are added, such as a correction that starts at zero."""
    for value, other in (node.inputs[:2], node.inputs[1::-1]):
        if signals.get(other or "", UNKNOWN_SIGNAL).second_moment == 0:
            return value
    return None


def scaled(x: Signal, factor: float) -> Signal:
    """factor·x for a number."""
    if not math.isfinite(factor):
        return Signal(roles=x.roles)
    side = x.one_sided * ((factor > 0) - (factor < 0))
    return x.but(
        mean=None if x.mean is None else x.mean * factor,
        second_moment=None if x.second_moment is None else x.second_moment * factor**2,
        one_sided=side, law=x.law if factor > 0 else mirrored(x.law),
    )  # fmt: skip
