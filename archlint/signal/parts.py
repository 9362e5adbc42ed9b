"""Tensors side by side, and parts of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from archlint.signal.moments import Role, Signal
from archlint.signal.transfer import correlated, merged_groups, product


def weighted_mean(
    parts: Sequence[tuple[Signal, int]], roles: tuple[Role, ...], over_positions: bool = False
) -> Signal:
    """The moments of tensors side by side. Parts side by side along positions are uncorrelated but
    for their means."""
    total = sum(n for _, n in parts)
    shares = [(p, n / total) for p, n in parts]

    def mean(values: Sequence[float | None]) -> float | None:
        if any(v is None for v in values):
            return None
        return sum(v * s for v, (_, s) in zip(values, shares, strict=True) if v is not None)

    second = mean([p.second_moment for p, _ in parts])
    first = mean([p.mean for p, _ in parts])
    inside = mean([product(p.position_correlation, p.second_moment) for p, _ in parts])
    between = mean([product(p.sample_correlation, p.second_moment) for p, _ in parts])
    apart = mean([product(p.apart, p.second_moment) for p, _ in parts])
    if over_positions:
        inside = _between_places(parts, [product(p.position_correlation, p.second_moment)
                                         for p, _ in parts])  # fmt: skip
        apart = _between_places(parts, [product(p.apart, p.second_moment) for p, _ in parts])
    sides = {p.one_sided for p, _ in parts}
    first_part = parts[0][0]
    profile = {
        axis: values for axis, values in first_part.profile.items()
        if not over_positions and all(axis in p.profile and p.profile[axis].size == values.size
                                      for p, _ in parts)
    }  # fmt: skip
    if profile and second:
        profile = {
            axis: sum(((p.second_moment or 0.0) * s / second * p.profile[axis]
                       for p, s in shares), np.zeros(values.size))
            for axis, values in profile.items()
        }  # fmt: skip
    return Signal(first, second, correlated(inside, second), correlated(between, second),
                  merged_groups(*(p.odd_in for p, _ in parts)),
                  sides.pop() if len(sides) == 1 else 0, roles, profile,
                  all(p.gaussian for p, _ in parts),
                  cross_correlation=correlated(apart, second))  # fmt: skip


def _between_places(
    parts: Sequence[tuple[Signal, int]], own: Sequence[float | None]
) -> float | None:
    """The mean of E[v v′] over pairs of different positions of parts that lie side by side along
    positions: ``own`` within a part, the product of the means between two."""
    total = sum(n for _, n in parts)
    if any(k is None or p.mean is None for k, (p, _) in zip(own, parts, strict=True)):
        return None
    if total < 2:
        return own[0]
    means = sum((p.mean or 0.0) * n for p, n in parts)
    summed = means * means
    for k, (p, n) in zip(own, parts, strict=True):
        summed += (k or 0.0) * n * (n - 1) - (p.mean or 0.0) ** 2 * n * n
    return summed / (total * (total - 1))


_LONGEST_PROFILE = 65536


def parts_profile(
    parts: Sequence[tuple[Signal, int]], axis: int, whole: Signal
) -> dict[int, np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Along the axis of a concatenation: each part's own length (a class token beside patches)."""
    seconds = [p.second_moment or 0.0 for p, _ in parts]
    count = sum(n for _, n in parts)
    even = all(axis not in p.profile for p, _ in parts) and max(seconds) - min(seconds) <= 1e-9
    if not whole.second_moment or count > _LONGEST_PROFILE or even:
        return {}
    stretches = []
    for (p, n), second in zip(parts, seconds, strict=True):
        own = p.profile.get(axis)
        stretches.append(second * (own if own is not None and own.size == n else np.ones(n)))
    values = np.concatenate(stretches)
    return {axis: values / values.mean()} if values.mean() > 0 else {}


def taken(x: Signal, axis: int, places: range) -> Signal:
    """Some places along an axis: with their own share of the length where a profile tells."""
    values = x.profile.get(axis)
    if values is None or len(places) == 0 or values.size <= max(places[0], places[-1]):
        return x.but(profile={a: p for a, p in x.profile.items() if a != axis})
    part = values[places.start : places.stop : places.step] if places.step > 0 else values
    level = float(part.mean())
    profile = {a: p for a, p in x.profile.items() if a != axis}
    if level > 0:
        profile[axis] = part / level
    return x.but(profile=profile, second_moment=product(x.second_moment, level),
                 mean=product(x.mean, math.sqrt(level)))  # fmt: skip
