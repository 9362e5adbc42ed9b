"""Softmax and attention: averaging with the softmax's participation ratio.

For logits of variance s² over T keys Σp² ≈ e^{s²}/T (s² ≲ ½ ln T), never above one. Two queries
whose logits have correlation r share Σ p p′ ≈ e^{r s²}/T.
"""

from __future__ import annotations

import math

from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.transfer import Step, correlated, known_size, transfers


def participation(variance: float, keys: int) -> float:
    """E Σp² of a softmax over ``keys`` normal logits of a variance: e^{s²}/T for weak logits; with
    strong ones the largest takes all. The mean of the first two terms of the self-normalised sum,
    1/(1 + (T − 1)·e^{−s²}), is exact in both limits."""
    if keys <= 1:
        return 1.0
    return 1.0 / (1.0 + (keys - 1) * math.exp(-min(variance, 700.0)))


@transfers("softmax")
def _softmax(step: Step) -> Signal:
    """Entries have mean 1/T and second moment Σp²/T."""
    x, shape = step.signal(0), step.shape(0)
    axis = int(step.number("axis"))
    keys = known_size(shape, (axis,))
    if keys is None or x.second_moment is None or x.mean is None:
        return Signal(roles=x.roles, one_sided=1)
    variance = max(x.second_moment - x.mean**2, 0.0)
    return _probabilities(x, keys, variance)


def _probabilities(x: Signal, keys: int, variance: float) -> Signal:
    mean = 1 / keys
    second = max(participation(variance, keys) / keys, mean * mean)
    fixed = correlated(mean * mean, second)
    weak = variance < 1e-9
    return Signal(mean, second, 1.0 if weak else fixed, 1.0 if weak else fixed, None, (), 1,
                  x.roles)  # fmt: skip


@transfers("log_softmax")
def _log_softmax(step: Step) -> Signal:
    """x − ln Σ e^x: the mean of the logarithm is ln T + s²/2 for normal logits."""
    x, shape = step.signal(0), step.shape(0)
    keys = known_size(shape, (int(step.number("axis")),))
    if keys is None or x.second_moment is None or x.mean is None:
        return Signal(roles=x.roles)
    variance = max(x.second_moment - x.mean**2, 0.0)
    if variance > math.log(max(keys, 2)):
        return Signal(roles=x.roles, one_sided=-1)
    mean = -math.log(keys) - variance / 2
    return Signal(mean, mean * mean + variance, None, None, None, (), -1, x.roles)


@transfers("attention")
def _attention(step: Step) -> Signal:
    """E out² = E v²·(Σp²·(1 − ρ_v) + ρ_v): the part of v that all positions share passes, the rest
    is averaged. The logits' variance over the keys of one query is scale²·d·E q²·E k²·(1 − ρ_k);
    what all keys share cancels in the softmax."""
    q, k, v = step.signal(0), step.signal(1), step.signal(2)
    shape, keys_shape = step.shape(0), step.shape(1)
    features = known_size(shape, (-1,)) if shape else None
    keys = known_size(keys_shape, (-2,)) if keys_shape else None
    if features is None or keys is None or v.second_moment is None or v.mean is None:
        return Signal(roles=q.roles)
    if q.second_moment is None or k.second_moment is None:
        return Signal(roles=q.roles)
    shared_k, shared_q, shared_v = (s.position_correlation for s in (k, q, v))
    if shared_k is None or shared_v is None:
        return Signal(roles=q.roles)
    given = step.attribute("scale")
    scale = float(given) if isinstance(given, int | float) else 1 / math.sqrt(features)
    logits = scale**2 * features * q.second_moment * k.second_moment * max(1 - shared_k, 0.0)
    softcap = step.number("softcap")
    if softcap:
        logits = softcap**2 * math.tanh(math.sqrt(logits) / softcap) ** 2
    alike = logits * max(shared_q if shared_q is not None else 0.0, 0.0)
    if step.attribute("causal"):
        own = sum(participation(logits, t) for t in range(1, keys + 1)) / keys
        other = sum(participation(alike, t) * (2 * (keys - t) + 1)
                    for t in range(1, keys + 1)) / keys**2  # fmt: skip
    else:
        own, other = participation(logits, keys), participation(alike, keys)
    free = v.second_moment * (1 - shared_v)
    second = v.second_moment * shared_v + free * own
    positions = correlated(v.second_moment * shared_v + free * min(other, own), second)
    samples = None
    if v.sample_correlation is not None:
        between = v.sample_correlation * v.second_moment
        # Tokens of two samples at equal positions agree by the sample correlation, at different
        # ones by no more than by either correlation.
        apart = min(v.sample_correlation, shared_v) * v.second_moment
        samples = correlated(apart + max(between - apart, 0.0) / keys, second)
    p = step.number("dropout")
    if p and step.graph.mode == "train":
        second += free * own * (1 / (1 - p) - 1)
    return Signal(v.mean, second, positions, samples, None, v.odd_in, v.one_sided,
                  q.roles if len(q.roles) == len(shape or ()) else v.roles)  # fmt: skip


@transfers("rotary")
def _rotary(step: Step) -> Signal:
    """A rotation of pairs keeps E x²; it turns different positions by different angles, so what
    they share of the mean is kept only in slow pairs: unknown."""
    x = step.signal(0)
    return x.but(mean=x.mean if x.mean == 0.0 else None)


@transfers("gumbel_softmax")
def _gumbel(step: Step) -> Signal:
    return UNKNOWN_SIGNAL
