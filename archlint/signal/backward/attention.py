"""Gradients through softmax and attention.

out_i = Σ_j p_ij v_j. v gets pᵀg; the logit (i, j) gets p_ij(a_ij − Σ_j p a) with a_ij = g_i·v_j, so
that what all keys share is lost; q gets the logits' gradient times k, k times q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from archlint.signal.attention import (
    bias_variance,
    differing,
    leaning,
    logits_of,
    over_rows,
    participation,
    seen_by,
    shared_participation,
    token_overlap,
)
from archlint.signal.gaussian import Floats
from archlint.signal.gradient import (
    UNKNOWN_GRADIENT,
    Back,
    Gradient,
    Profile,
    backwards,
    no_gradient,
    times,
)
from archlint.signal.moments import Signal


@backwards("softmax")
def _softmax(step: Back) -> list[Gradient | None]:
    """p∘(g − Σ p g) over T keys: E g²·E p²(1 − 2p + Σp²), whose sum over the keys is zero."""
    g, shape, y = step.gradient, step.shape(0), step.out_signal()
    axis = int(step.number("axis"))
    keys = shape[axis] if shape is not None else None
    if g.zero:
        return [no_gradient(step.rank(0))]
    if keys is None or y.second_moment is None or g.second_moment is None or not g.along:
        return [UNKNOWN_GRADIENT]
    c = g.along[axis]
    if c is None:
        return [UNKNOWN_GRADIENT]
    made = logits_of(step)
    own = min(y.second_moment * keys, 1.0)  # Σp²
    left = own * (1 - own)
    if made is not None:
        _, look, variance = made
        left = sum(differing(variance, n) * share for n, share, _ in look.groups)
    free = max(1 - c, 0.0) * left
    along = tuple(-1 / max(keys - 1, 1) if a == axis else d for a, d in enumerate(g.along))
    profile = {a: p for a, p in g.profile.items() if a != axis}
    return [Gradient(g.second_moment * free / keys, along, profile,
                     origin=step.source(0))]  # fmt: skip


@backwards("log_softmax")
def _log_softmax(step: Back) -> list[Gradient | None]:
    """g − p·Σg: for many classes g itself, less p²·T."""
    g, shape = step.gradient, step.shape(0)
    axis = int(step.number("axis"))
    keys = shape[axis] if shape is not None else None
    x = step.signal(0)
    if keys is None or x.variance is None or g.second_moment is None or not g.along:
        return [UNKNOWN_GRADIENT]
    own = participation(x.variance, keys)
    c = g.along[axis]
    if c is None:
        return [UNKNOWN_GRADIENT]
    # E(g − p Σg)²/E g² = 1 − 2p(1 + (T−1)c) + p²T(1 + (T−1)c), averaged over the keys
    whole = 1 + (keys - 1) * c
    factor = max(1 - 2 * whole / keys + own * whole, 0.0)
    return [times(g, factor, None, 1 - 1 / keys)]


@backwards("attention")
def _attention(step: Back) -> list[Gradient | None]:
    g = step.gradient
    q, k, v = step.signal(0), step.signal(1), step.signal(2)
    shape, keys_shape = step.shape(0), step.shape(1)
    unknown: list[Gradient | None] = [UNKNOWN_GRADIENT] * 3
    rest: list[Gradient | None] = [
        None if value is None or value in step.graph.static else UNKNOWN_GRADIENT
        for value in step.node.inputs[3:]
    ]
    if shape is None or keys_shape is None:
        return [*unknown, *rest]
    if g.zero:
        return [no_gradient(step.rank(i)) for i in range(len(step.node.inputs))]
    queries, features, keys = shape[-2], shape[-1], keys_shape[-2]
    if queries is None or features is None or keys is None or g.second_moment is None:
        return [*unknown, *rest]
    heads = _heads(shape, keys_shape)
    if heads is None or len(g.along) < 2 or q.second_moment is None or k.second_moment is None:
        return [*unknown, *rest]
    c, shared_k, shared_v = g.along[-2], k.position_correlation, v.position_correlation
    if v.second_moment is None or c is None or shared_k is None or shared_v is None:
        return [*unknown, *rest]
    given = step.attribute("scale")
    scale = float(given) if isinstance(given, int | float) else 1 / math.sqrt(features)
    content = scale**2 * features * q.second_moment * k.second_moment * max(1 - shared_k, 0.0)
    softcap = step.number("softcap")
    if softcap:
        content = softcap**2 * math.tanh(math.sqrt(content) / softcap) ** 2
    p = _weights(step, content, queries, keys)
    p_keep = 1 - step.number("dropout") if step.graph.mode == "train" else 1.0
    values = _to_values(step, g, c, p, queries, keys, heads, p_keep)
    spread = features * g.second_moment * v.second_moment * max(1 - shared_v, 0.0)
    to_q = _to_queries(step, g, p, spread, k, shared_k, scale)
    to_k = _to_keys(step, g, c, p, spread, q, scale, queries, keys, heads)
    if step.has(3):
        rest[0] = _to_bias(step, g, p, spread, keys)
    return [to_q, to_k, values, *rest]


def _to_bias(step: Back, g: Gradient, p: _Weights, spread: float, keys: int) -> Gradient:
    """What is added to the logits gets their gradient, summed over what it was copied along."""
    shape, out = step.shape(3), step.out_shape()
    if shape is None or out is None or None in (*shape, *out) or len(shape) > len(out):
        return UNKNOWN_GRADIENT
    whole = (*out[:-1], keys)
    lead = whole[: len(whole) - len(shape)]
    copies = math.prod(n or 1 for n in lead)
    for n, m in zip(whole[len(lead) :], shape, strict=True):
        copies *= (n or 1) if m == 1 else 1
    second = spread * p.free / keys * copies
    along = (*((0.0,) * (len(shape) - 1)), -1 / max(keys - 1, 1))
    return Gradient(second, along, origin=step.source(3))


def _heads(shape: tuple[int | None, ...], keys_shape: tuple[int | None, ...]) -> float | None:
    """How many query heads share one head of keys and values."""
    if len(shape) != len(keys_shape) or len(shape) < 3:
        return 1.0
    if None in (*shape[:-2], *keys_shape[:-2]):
        return 1.0 if shape[:-2] == keys_shape[:-2] else None
    many = math.prod(n or 1 for n in shape[:-2])
    few = math.prod(n or 1 for n in keys_shape[:-2])
    return many / max(few, 1)


@dataclass(frozen=True, slots=True)
class _Weights:
    """Of the softmax over queries: Σ_j p² (``own``), Σ_j p p′ of two queries (``other``),
    Σ_j p²·(1 − 2p + Σp²) (``free``: what is left of it for differences between keys), what counts
    of tokens that overlap (``flat``), each as the gradient weighs the queries; the gradient of the
    queries along them (``rows``), and p² by query and key as mask and gradient alone would have it,
    for values and for keys."""

    own: float
    other: float
    free: float
    flat: float
    rows: Profile | None
    squares: Floats | None
    squares_free: Floats | None


def _weights(step: Back, content: float, queries: int, keys: int) -> _Weights:
    q, shape = step.signal(0), step.shape(0)
    features = shape[-1] if shape else None
    swing = min(math.sqrt(2 / features), 1.0) if features else 0.0
    look, added = seen_by(step, queries, keys)
    bias = bias_variance(added)[0]
    logits = content + bias
    alike = content / logits * min(max(q.position_correlation or 0.0, 0.0), 1.0) if logits else 0.0
    each: list[tuple[float, float, float]] = []
    other = 0.0
    for n, _, pairs in look.groups:
        levels = [content * (1 + d) + bias for d in (swing, -swing)]
        here = sum(participation(v, n) for v in levels) / 2
        each.append((here, sum(differing(v, n) for v in levels) / 2,
                     sum(leaning(v, n)[1] for v in levels) / 2))  # fmt: skip
        other += shared_participation(here, n, alike) * pairs * look.pairs
    g = step.gradient
    size = g.profile.get(len(g.along) - 2)
    weight = size if size is not None and size.size == queries else np.ones(queries)
    squares = look.squares * weight[:, None] if look.squares is not None else None
    if look.rows is None:
        own, free, flat = (
            sum(e[i] * rows for e, (_, rows, _) in zip(each, look.groups, strict=True))
            for i in range(3)
        )
        return _Weights(own, other, free, flat, size, squares, squares)
    owns, frees, flats = (over_rows(look, [e[i] for e in each]) for i in range(3))
    level = float((frees * weight).mean())
    return _Weights(
        float((owns * weight).mean()), other, level, float((flats * weight).mean()),
        frees * weight / level if level > 0 else size, squares,
        None if squares is None else squares * (frees / np.maximum(owns, 1e-12))[:, None],
    )  # fmt: skip


def _to_values(
    step: Back, g: Gradient, c: float, p: _Weights, queries: int, keys: int, heads: float,
    keep: float,
) -> Gradient:  # fmt: skip
    """Key j gets Σ_i p_ij g_i; Σ_j p = 1 keeps the sum over positions, which gives the correlation
    of two keys."""
    if g.second_moment is None:
        return UNKNOWN_GRADIENT
    size = (queries / keys) * (p.own / keep + (queries - 1) * p.other * c)
    size = max(size, 0.0)
    second = g.second_moment * size * heads
    whole = queries * (1 + (queries - 1) * c)
    between = (whole / (keys * size) - 1) / (keys - 1) if keys > 1 and size > 0 else 0.0
    rank = step.rank(2)
    along = _like(g, rank, min(max(between, -1.0), 1.0))
    profile = _by_key(p.squares, rank, keys)
    return Gradient(second, along, profile, origin=step.source(2))


def _by_key(squares: Floats | None, rank: int, keys: int) -> dict[int, Profile]:
    """What keys get of all queries: under a causal mask the early ones are met by all."""
    met = squares.sum(axis=0) if squares is not None else np.ones(1)
    if met.size != keys or met.mean() <= 0 or met.max() <= met.min() * (1 + 1e-6):
        return {}
    return {rank - 2: met / met.mean()}


def _like(g: Gradient, rank: int, positions: float) -> tuple[float | None, ...]:
    """The correlations of a tensor [sample, heads, positions, features]."""
    lead = g.along[:-2][: rank - 2] if rank <= len(g.along) else (0.0,) * (rank - 2)
    return (*lead, positions, 0.0)


def _to_queries(
    step: Back, g: Gradient, p: _Weights, spread: float, k: Signal, shared_k: float, scale: float
) -> Gradient:
    """scale·Σ_j p_j(a_j − ā)k_j. Keys and values of the same tokens are correlated through them:
    ‖Cov_p(tokens)‖² is d²/T-like plus d-like, which adds 1/d to Σp²."""
    if k.second_moment is None:
        return UNKNOWN_GRADIENT
    free = p.free + p.flat * token_overlap(step)
    second = scale**2 * spread * k.second_moment * max(1 - shared_k, 0.0) * free
    along = (*(c if c is None else 0.0 for c in g.along[:-1]), 0.0)
    profile = dict(g.profile)
    if p.rows is not None:
        profile[len(g.along) - 2] = p.rows
    return Gradient(second, along, profile, origin=step.source(0))


def _to_keys(
    step: Back, g: Gradient, c: float, p: _Weights, spread: float, q: Signal, scale: float,
    queries: int, keys: int, heads: float,
) -> Gradient:  # fmt: skip
    """scale·Σ_i p_ij(a_ij − ā_i)q_i, where queries that share gradient and direction add up."""
    if q.second_moment is None:
        return UNKNOWN_GRADIENT
    shared = q.position_correlation
    if shared is None and c != 0.0:
        return UNKNOWN_GRADIENT
    flat = p.other * max(1 - p.own, 0.0)
    size = (queries / keys) * (p.free + (queries - 1) * flat * c * (shared or 0.0))
    second = scale**2 * spread * q.second_moment * max(size, 0.0) * heads
    rank = step.rank(1)
    along = (*((0.0,) * (rank - 2)), -1 / max(keys - 1, 1), 0.0)
    return Gradient(second, along, _by_key(p.squares_free, rank, keys), origin=step.source(1))


@backwards("rotary")
def _rotary(step: Back) -> list[Gradient | None]:
    """A rotation back."""
    return [step.gradient.but(origin=step.source(0), aligned=None)]
