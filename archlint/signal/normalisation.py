"""Normalisation: what is centred and divided by what, from correlations.

The variance that a norm sees is E x² less the mean square of the mean over the normalised set.
For a set of N elements of which two agree with E[x x′] = c·E x² the mean's square is
E x²·(1 + (N−1)c)/N.
"""

from __future__ import annotations

from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.transfer import Step, correlated, known_size, product, transfers


def normalised(
    step: Step, x: Signal, mean_square: float, second: float, eps: float, scale: int, shift: int,
    position: float | None, sample: float | None,
) -> Signal:  # fmt: skip
    """γ·(x − mean)/√(var + eps) + β, with var = E x² − mean_square, and E[x x′] − mean_square
    as the numerators of both correlations (already divided by E x² where given)."""
    variance = max(second - mean_square, 0.0)
    share = variance / (variance + eps) if variance + eps > 0 else 0.0
    gamma = step.signal(scale) if step.has(scale) else Signal(1.0, 1.0, 1.0, 1.0, 0.0)
    beta = step.signal(shift) if step.has(shift) else Signal(0.0, 0.0, 1.0, 1.0, 0.0)
    if gamma.second_moment is None or beta.second_moment is None:
        return Signal(roles=x.roles)
    inner = gamma.second_moment * share
    total = inner + beta.second_moment
    g, b = gamma.second_moment, beta.second_moment

    def through(correlation: float | None) -> float | None:
        if correlation is None or variance <= 0:
            return None if correlation is None else correlated(b, total)
        after = (correlation * second - mean_square) / variance
        return correlated(g * share * min(max(after, -1.0), 1.0) + b, total)

    groups = x.odd_in if beta.second_moment == 0 else ()
    return Signal(beta.mean, total, through(position), through(sample), None, groups, 0, x.roles,
                  gaussian=x.gaussian)  # fmt: skip


@transfers("batch_norm")
def _batch_norm(step: Step) -> Signal:
    """Training: each channel's mean and variance over samples and positions of the batch. In
    evaluation the running statistics of a fresh network, 0 and 1, change nothing."""
    x, shape = step.signal(0), step.shape(0)
    eps = step.number("eps")
    if x.second_moment is None or shape is None:
        return Signal(roles=x.roles)
    if not step.attribute("training"):
        return _with_running_statistics(step, x, eps)
    positions = known_size(shape, range(2, len(shape)))
    samples = shape[0]
    between, within = x.sample_correlation, x.position_correlation
    if positions is None or samples is None or between is None:
        return Signal(roles=x.roles)
    if positions > 1 and within is None:
        return Signal(roles=x.roles)
    count = positions * samples
    if count == 1:
        return UNKNOWN_SIGNAL
    # Pairs of elements of a channel: equal, same sample, other sample.
    inside = within if within is not None and positions > 1 else 1.0
    apart = min(between, inside) if positions > 1 else between
    mean_share = (
        1 + (positions - 1) * inside
        + (samples - 1) * (between + (positions - 1) * apart)
    ) / count  # fmt: skip
    result = normalised(step, x, mean_share * x.second_moment, x.second_moment, eps, 1, 2, within,
                        between)  # fmt: skip
    return result.but(profile=x.profile)


def _with_running_statistics(step: Step, x: Signal, eps: float) -> Signal:
    running = step.signal(4) if step.has(4) else Signal(1.0, 1.0)
    centre = step.signal(3) if step.has(3) else Signal(0.0, 0.0)
    gamma = step.signal(1) if step.has(1) else Signal(1.0, 1.0)
    beta = step.signal(2) if step.has(2) else Signal(0.0, 0.0)
    if (running.mean is None or centre.second_moment is None or gamma.second_moment is None
            or beta.second_moment is None or beta.mean is None or x.mean is None
            or x.second_moment is None or centre.mean is None or gamma.mean is None
            or running.mean + eps <= 0):  # fmt: skip
        return Signal(roles=x.roles)
    inner = x.second_moment + centre.second_moment - 2 * x.mean * centre.mean
    scale = gamma.second_moment / (running.mean + eps)
    mean = gamma.mean * (x.mean - centre.mean) / (running.mean + eps) ** 0.5
    second = scale * inner + beta.second_moment + 2 * mean * beta.mean

    def through(correlation: float | None) -> float | None:
        signal = product(correlation, x.second_moment)
        return None if signal is None else correlated(
            scale * (signal + centre.second_moment) + beta.second_moment  # type: ignore[operator]
            + 2 * mean * (beta.mean or 0.0), second)  # fmt: skip

    return Signal(mean + beta.mean, second, through(x.position_correlation),
                  through(x.sample_correlation), x.spread,
                  x.odd_in if centre.second_moment == beta.second_moment == 0 else (), 0, x.roles,
                  x.profile, x.gaussian)  # fmt: skip


def _feature_mean_square(x: Signal, features: int, positions: int) -> float | None:
    """E of the squared mean over ``features`` × ``positions`` elements of one sample."""
    if x.second_moment is None or x.mean is None:
        return None
    inside = x.position_correlation if positions > 1 else 1.0
    if inside is None:
        return None
    one = x.second_moment * (1 + (positions - 1) * inside) / positions
    return one / features + (1 - 1 / features) * x.mean**2


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


@transfers("layer_norm", "standardise")
def _layer_norm(step: Step) -> Signal:
    """Per sample (and position): the length is reset to γ²·v/(v + eps) + β² (Ba et al. 2016)."""
    x, count = step.signal(0), _axes_count(step, step.ints("axes"))
    if count is None or x.second_moment is None:
        return Signal(roles=x.roles)
    square = _feature_mean_square(x, *count)
    if square is None:
        return Signal(roles=x.roles)
    return normalised(step, x, square, x.second_moment, step.number("eps"), 1, 2,
                      x.position_correlation, x.sample_correlation).but(spread=0.0)  # fmt: skip


@transfers("rms_norm")
def _rms_norm(step: Step) -> Signal:
    """Divides by the root mean square: the mean stays, relative to the length."""
    x = step.signal(0)
    if x.second_moment is None:
        return Signal(roles=x.roles)
    result = normalised(step, x, 0.0, x.second_moment, step.number("eps"), 1, 2,
                        x.position_correlation, x.sample_correlation)  # fmt: skip
    gamma = step.signal(1) if step.has(1) else Signal(1.0, 1.0)
    if x.mean is None or gamma.mean is None or x.second_moment <= 0:
        return result.but(mean=None if x.second_moment > 0 else 0.0, spread=0.0)
    size = (x.second_moment + step.number("eps")) ** 0.5
    return result.but(mean=gamma.mean * x.mean / size, spread=0.0, one_sided=x.one_sided)


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
    square = _feature_mean_square(x, max(shape[1] // groups, 1), positions)
    if square is None:
        return Signal(roles=x.roles)
    result = normalised(step, x, square, x.second_moment, step.number("eps"), 1, 2,
                        x.position_correlation, x.sample_correlation)  # fmt: skip
    return result.but(spread=0.0, profile=x.profile)


@transfers("lp_normalize")
def _lp_normalize(step: Step) -> Signal:
    """Unit Euclidean length along an axis: E x² = 1/n."""
    x, shape = step.signal(0), step.shape(0)
    n = known_size(shape, (int(step.number("axis")),))
    if step.number("p") != 2 or n is None or x.second_moment is None:
        return UNKNOWN_SIGNAL
    mean = None if x.mean is None else x.mean / max(n * x.second_moment, 1e-300) ** 0.5
    return x.but(mean=mean, second_moment=1 / n if x.second_moment > 0 else 0.0, spread=0.0)


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
