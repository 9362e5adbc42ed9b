"""Normalisation: what is centred and divided by what, from correlations.

With K(u, v) = E[v v′] for a pair of elements, a norm's output has (K(u, v) − E[m m′])/v̄ where m, m′
are the two means that are subtracted and v̄ = E v² − E m² is the variance that it divides by. The
mean over N elements of which two agree with E[v v′] = c·E v² has E m² = E v²·(1 + (N − 1)c)/N.
That the variance itself fluctuates is left out: of order 1/N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from archlint.signal.gaussian import Floats
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.transfer import Step, correlated, count_of, known_size, paired, transfers

_ONE = Signal(1.0, 1.0, 1.0, 1.0, cross_correlation=1.0)
_ZERO = Signal(0.0, 0.0, 1.0, 1.0, cross_correlation=1.0)
_PAIRS = ("position_correlation", "sample_correlation", "cross_correlation")


def normalised(
    step: Step, x: Signal, mean_square: float, centres: Mapping[str, float | None], eps: float,
) -> Signal:  # fmt: skip
    """γ·(x − m)/√(v̄ + eps) + β with E m² = ``mean_square``; ``centres`` holds E[m m′] for the two
    means of a pair, by the name of the correlation. Weights 1 and 2 of the node are γ and β."""
    gamma = step.signal(1) if step.has(1) else _ONE
    beta = step.signal(2) if step.has(2) else _ZERO
    if gamma.second_moment is None or beta.second_moment is None or x.second_moment is None:
        return Signal(roles=x.roles)
    q = x.second_moment
    variance = max(q - mean_square, 0.0)
    share = variance / (variance + eps) if variance + eps > 0 else 0.0
    g, b = gamma.second_moment, beta.second_moment
    total = g * share + b

    def through(name: str) -> float | None:
        c = x.apart if name == "cross_correlation" else getattr(x, name)
        centre = centres.get(name)
        if variance <= 0:
            return correlated(b, total)
        if c is None or centre is None:
            return None
        after = (c * q - centre) / variance
        return correlated(g * share * min(max(after, -1.0), 1.0) + b, total)

    groups = x.odd_in if b == 0 else ()
    return Signal(beta.mean, total, None, None, groups, 0, x.roles, gaussian=x.gaussian,
                  ).but(**{name: through(name) for name in _PAIRS})  # fmt: skip


@transfers("batch_norm")
def _batch_norm(step: Step) -> Signal:
    """Training: each channel's mean and variance over samples and positions of the batch, the
    same for every pair. In evaluation the running statistics of a fresh network, 0 and 1, change
    nothing. Where the batch's size is not known it is taken to be large."""
    x, shape = step.signal(0), step.shape(0)
    eps = step.number("eps")
    if x.second_moment is None or shape is None:
        return Signal(roles=x.roles)
    if not step.attribute("training"):
        return _with_running_statistics(step, x, eps)
    positions = known_size(shape, range(2, len(shape)))
    samples = shape[0]
    merged = count_of(x, shape, (0,), "position")
    if merged is not None and merged > 1 and samples is not None and positions is not None:
        positions, samples = positions * merged, samples // merged
    between, within, apart = x.sample_correlation, x.position_correlation, x.apart
    if between is None or (positions != 1 and (within is None or apart is None)):
        return Signal(roles=x.roles)
    if positions is None or samples is None:
        mean_share = apart if positions != 1 and apart is not None else between
        if positions is None and samples == 1:
            mean_share = within or 0.0
    elif positions * samples == 1:
        return UNKNOWN_SIGNAL
    else:
        mean_share = (
            1 + (positions - 1) * (within or 0.0)
            + (samples - 1) * (between + (positions - 1) * (apart or 0.0))
        ) / (positions * samples)  # fmt: skip
    square = mean_share * x.second_moment
    result = normalised(step, x, square, dict.fromkeys(_PAIRS, square), eps)
    # Every channel has its own statistics: what differs between channels is evened out.
    profile = {a: _less_mean(p, mean_share) for a, p in x.profile.items() if a != 1}
    fixed = all(not step.has(i) or step.signal(i).variance == 0.0 for i in (1, 2))
    return result.but(profile=profile, law=x.law if fixed else None)


def _less_mean(profile: Floats, share: float) -> Floats:
    """E(v − m)² by place of a v with E v² = q·r, that has E m² = c·q in common with its mean m:
    r − 2c·k/k̄ + c, over 1 − c. Where padding leaves less of v it leaves less of what a convolution
    makes of the mean before it, and that much is then missing of m: two places share by the lesser
    of their two r, the mean of which over all others is k."""
    c = min(max(share, 0.0), 0.5)
    ordered = np.sort(profile)
    below = np.cumsum(ordered)
    rank = np.searchsorted(ordered, profile, "right")
    k = (below[rank - 1] + profile * (profile.size - rank)) / profile.size
    found = (profile - 2 * c * k / k.mean() + c) / (1 - c)
    return np.asarray(np.maximum(found, 0.0), np.float64)


def _with_running_statistics(step: Step, x: Signal, eps: float) -> Signal:
    running = step.signal(4) if step.has(4) else _ONE
    centre = step.signal(3) if step.has(3) else _ZERO
    gamma = step.signal(1) if step.has(1) else _ONE
    beta = step.signal(2) if step.has(2) else _ZERO
    if (running.mean is None or centre.second_moment is None or gamma.second_moment is None
            or beta.second_moment is None or beta.mean is None or x.mean is None
            or x.second_moment is None or centre.mean is None or gamma.mean is None
            or running.mean + eps <= 0):  # fmt: skip
        return Signal(roles=x.roles)
    q, c = x.second_moment, centre.second_moment - 2 * x.mean * centre.mean
    scale = gamma.second_moment / (running.mean + eps)
    mean = gamma.mean * (x.mean - centre.mean) / (running.mean + eps) ** 0.5
    shift = beta.second_moment + 2 * mean * beta.mean
    second = max(scale * (q + c) + shift, 0.0)
    return Signal(mean + beta.mean, second, None, None,
                  x.odd_in if centre.second_moment == beta.second_moment == 0 else (), 0, x.roles,
                  x.profile, x.gaussian).but(
                      **paired(x, lambda r: correlated(scale * (r * q + c) + shift, second))
                  )  # fmt: skip


def feature_mean_square(x: Signal, features: int, positions: int) -> float | None:
    """E of the squared mean over ``features`` × ``positions`` elements of one sample."""
    if x.second_moment is None or x.mean is None:
        return None
    inside = x.position_correlation if positions > 1 else 1.0
    if inside is None:
        return None
    one = x.second_moment * (1 + (positions - 1) * inside) / positions
    return one / features + (1 - 1 / features) * x.mean**2


def _centres(x: Signal, features: int, positions: int, square: float) -> dict[str, float | None]:
    """E[m m′] of the means over ``features`` × ``positions`` elements. Where positions are part of
    the set, two positions of one sample have the same mean."""
    if x.second_moment is None or x.mean is None:
        return {}
    q, fixed = x.second_moment, x.mean**2

    def of(c: float | None) -> float | None:
        return None if c is None else c * q / features + (1 - 1 / features) * fixed

    if positions == 1:
        return {"position_correlation": of(x.position_correlation),
                "sample_correlation": of(x.sample_correlation),
                "cross_correlation": of(x.apart)}  # fmt: skip
    between, apart = x.sample_correlation, x.apart
    if between is None or apart is None:
        return {"position_correlation": square}
    other = of((between + (positions - 1) * apart) / positions)
    return {"position_correlation": square, "sample_correlation": other,
            "cross_correlation": other}  # fmt: skip


def _axes_count(step: Step, axes: tuple[int, ...]) -> tuple[int, int] | None:
    """(features, positions) that a norm over some axes of input 0 runs over."""
    x, shape = step.signal(0), step.shape(0)
    if shape is None:
        return None
    roles = x.roles if len(x.roles) == len(shape) else ()
    spots = [a for a in axes if roles and roles[a] == "position"]
    features = known_size(shape, [a for a in axes if a not in spots])
    positions = known_size(shape, spots)
    return None if features is None or positions is None else (features, positions)


def evened(x: Signal, axes: Sequence[int]) -> Signal:
    """The correlations that positions have once each is divided by its own length, by what is
    known of the lengths along axes that are not normalised over. Two positions are taken to share
    κ times the lesser of their two second moments, as two queries of a causal attention do."""
    factor = 1.0
    for axis, values in x.profile.items():
        if axis in axes or axis >= len(x.roles) or x.roles[axis] != "position":
            continue
        if not (values > 0).all() or values.size < 2:
            continue
        q = np.sort(values)
        n = q.size
        more = np.arange(n - 1, -1, -1)  # how many are greater
        least = float((q * more).sum()) / (n * (n - 1) / 2)
        root = np.sqrt(q)
        above = np.cumsum((1 / root)[::-1])[::-1] - 1 / root
        even = float((root * above).sum()) / (n * (n - 1) / 2)
        factor *= even / least
    if factor == 1.0:
        return x

    def through(c: float | None) -> float | None:
        return None if c is None else min(max(c * factor, -1.0), 1.0)

    return x.but(position_correlation=through(x.position_correlation),
                 cross_correlation=through(x.apart))  # fmt: skip


def _over(step: Step, features: int, positions: int, axes: Sequence[int]) -> Signal:
    """A norm per sample over a set of features and positions; of a weight over a set of its
    elements, which then sum to zero."""
    x = evened(step.signal(0), axes)
    if step.value(0) in step.graph.static:
        features, positions = 1, features * positions
    square = feature_mean_square(x, features, positions)
    if square is None:
        return Signal(roles=x.roles)
    centres = _centres(x, features, positions, square)
    return normalised(step, x, square, centres, step.number("eps"))


@transfers("layer_norm", "standardise")
def _layer_norm(step: Step) -> Signal:
    """Per sample (and position): the length is reset to γ²·v/(v + eps) + β² (Ba et al. 2016)."""
    x, count = step.signal(0), _axes_count(step, step.ints("axes"))
    if count is None or x.second_moment is None:
        return Signal(roles=x.roles)
    return _over(step, *count, step.ints("axes"))


@transfers("rms_norm")
def _rms_norm(step: Step) -> Signal:
    """Divides by the root mean square: the mean stays, relative to the length."""
    x = evened(step.signal(0), step.ints("axes"))
    if x.second_moment is None:
        return Signal(roles=x.roles)
    result = normalised(step, x, 0.0, dict.fromkeys(_PAIRS, 0.0), step.number("eps"))
    gamma = step.signal(1) if step.has(1) else _ONE
    if x.mean is None or gamma.mean is None or x.second_moment <= 0:
        return result.but(mean=None if x.second_moment > 0 else 0.0)
    size = (x.second_moment + step.number("eps")) ** 0.5
    return result.but(mean=gamma.mean * x.mean / size, one_sided=x.one_sided)


@transfers("group_norm")
def _group_norm(step: Step) -> Signal:
    """Per sample and group of channels, over positions too."""
    return _grouped(step, int(step.number("groups")))


@transfers("instance_norm")
def _instance_norm(step: Step) -> Signal:
    """Per sample and channel, over positions."""
    shape = step.shape(0)
    if shape is None or shape[1] is None:
        return UNKNOWN_SIGNAL
    return _grouped(step, shape[1])


def _grouped(step: Step, groups: int) -> Signal:
    x, shape = step.signal(0), step.shape(0)
    if x.second_moment is None or shape is None or shape[1] is None:
        return Signal(roles=x.roles)
    positions = known_size(shape, range(2, len(shape)))
    if positions is None:
        return Signal(roles=x.roles)
    every = range(1, len(shape))
    return _over(step, max(shape[1] // groups, 1), positions, every).but(
        profile={a: p for a, p in x.profile.items() if a != 1})  # fmt: skip


@transfers("lp_normalize")
def _lp_normalize(step: Step) -> Signal:
    """Unit Euclidean length along an axis: E x² = 1/n."""
    x, shape = evened(step.signal(0), (int(step.number("axis")),)), step.shape(0)
    n = known_size(shape, (int(step.number("axis")),))
    if step.number("p") != 2 or n is None or x.second_moment is None:
        return UNKNOWN_SIGNAL
    mean = None if x.mean is None else x.mean / max(n * x.second_moment, 1e-300) ** 0.5
    return x.but(mean=mean, second_moment=1 / n if x.second_moment > 0 else 0.0, profile={})


@transfers("local_response_norm")
def _local_response_norm(step: Step) -> Signal:
    """x/(k + α·mean of x² over neighbouring channels)^β, at the mean of the denominator."""
    x = step.signal(0)
    if x.second_moment is None:
        return x
    divisor = (step.number("k") + step.number("alpha") * x.second_moment) ** step.number("beta")
    return x.but(
        mean=None if x.mean is None else x.mean / divisor,
        second_moment=x.second_moment / divisor**2,
    )
