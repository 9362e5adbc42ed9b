"""Softmax and attention: averaging with the softmax's participation Σp².

The logits l_ij = scale·q_i·k_j are normal over the weights that make q and k. With Cov over the
weights = scale²·d·K_q(i, i′)·K_k(j, j′), what the keys have in common cancels in the softmax, so
that over the keys of one query their variance is s² = scale²·d·E q²·E k²·(1 − ρ_k). Since a logit
is linear in its own token, the softmax also leans towards the tokens along one direction of their
space: that adds s² times their overlap to the average, 1/n of n-dimensional ones (theory.md 9,
signal.overlap), and less the fewer tokens it takes (:func:`leaning`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from archlint.graph.model import LayerGraph
from archlint.signal.gaussian import Floats, nodes_and_weights
from archlint.signal.masks import Seen, causal, everything, of_array, seen
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.overlap import overlap
from archlint.signal.rotation import turned
from archlint.signal.transfer import Step, correlated, known_size, paired, transfers

_GRID = 100  # points of the outer integral at least


def participation(variance: float, keys: float) -> float:
    """E Σp² of a softmax over ``keys`` independent normal logits of a variance: T at zero
    variance gives 1/T, weak logits e^{s²}/T, strong ones 1."""
    if keys <= 1:
        return 1.0
    if variance <= 0 or not math.isfinite(variance):
        return 1.0 / keys if variance <= 0 else 1.0
    return _participation(float(f"{min(variance, 1e4):.3g}"), keys)


@lru_cache(maxsize=16384)
def _participation(variance: float, keys: float) -> float:
    """T·E[e^{2l}/(Σe^l)²] = T ∫ λ E[e^{2l − λe^l}]·(E e^{−λe^l})^{T−1} dλ, λ = e^t."""
    s = math.sqrt(variance)
    if s > 12:  # the largest takes all but a share of order 1/s
        return float(1 - (1 - _participation(144.0, keys)) * 12 / s)
    # Equidistant points: both integrands are smooth and vanish at the ends.
    z = np.linspace(-7.0, 7.0, 113)
    w = np.exp(-z * z / 2) * (z[1] - z[0]) / math.sqrt(2 * math.pi)
    reach = s * math.sqrt(2 * math.log(keys) + 1) + 2 * s
    low, high = -math.log(keys) - variance / 2 - 12 - reach, reach + 4
    t = np.linspace(low, high, max(int((high - low) / 0.25), _GRID))
    x = t[:, None] + s * z[None, :]
    with np.errstate(over="ignore", under="ignore"):
        e = np.exp(np.minimum(x, 700))
        gone = np.exp(-np.minimum(e, 745))
        a = (e * e * gone) @ w
        b = gone @ w
        values = a * np.exp((keys - 1) * np.log(np.maximum(b, 1e-300)))
    total = keys * float(np.sum(values) * (t[1] - t[0]))
    return float(min(max(total, 1 / keys), 1.0))


def shared_participation(own: float, keys: float, correlation: float) -> float:
    """Σ p p′ of two softmaxes over the same keys whose logits have a correlation r: e^{r s²}/T for
    weak logits, which is (1/T)·(T Σp²)^r."""
    if keys <= 1:
        return 1.0
    return float((keys * own) ** min(max(correlation, 0.0), 1.0) / keys)


def differing(variance: float, keys: float) -> float:
    """E Σ_j p_j²·(1 − 2p_j + Σp²) of a softmax over independent normal logits: the mean square of
    p∘(a − Σ p a) for a of unit variance."""
    if keys <= 1:
        return 0.0
    if variance <= 0:
        return (1 - 1 / keys) / keys
    if keys < 2:  # in proportion to what it is without a variance
        return 4 * (1 - 1 / keys) / keys * differing(variance, 2.0)
    return _differing(float(f"{min(variance, 144.0):.3g}"), keys)


@lru_cache(maxsize=16384)
def _differing(variance: float, keys: float) -> float:
    """By E[f/(Σe^l)^k] = ∫ λ^{k−1}/Γ(k) E[f e^{−λΣe^l}] dλ with λ = e^t, term by term."""
    step, rest, _, second, third, fourth = _laplace(
        variance, max(1 << (math.ceil(keys) - 1).bit_length(), 64)
    )
    with np.errstate(under="ignore"):
        one, two = np.exp((keys - 1) * rest), np.exp((keys - 2) * rest)
    values = keys * one * (second - third + fourth / 6) + keys * (keys - 1) * two * second**2 / 6
    return float(max(np.sum(values) * step, 0.0))


@lru_cache(maxsize=1024)
def _laplace(variance: float, most: int) -> tuple[float, Floats, Floats, Floats, Floats, Floats]:
    """The step of t, ln E e^{−λe^l} and E (λe^l)^k e^{−λe^l}, k = 1, 2, 3, 4, for λ = e^t at
    equidistant t that are enough for up to ``most`` keys. A causal mask asks for every number."""
    s = math.sqrt(variance)
    z, w = nodes_and_weights(())
    reach = s * math.sqrt(2 * math.log(most) + 1) + 2 * s
    t = np.linspace(-math.log(most) - variance / 2 - 12 - reach, reach + 4, 400)
    with np.errstate(over="ignore", under="ignore"):
        e = np.exp(np.minimum(t[:, None] + s * z[None, :], 700))
        gone = np.exp(-np.minimum(e, 745))
        rest = np.log(np.maximum(gone @ w, 1e-300))
        first, second, third, fourth = ((np.minimum(e, 1e3) ** k * gone) @ w for k in (1, 2, 3, 4))
    return float(t[1] - t[0]), rest, first, second, third, fourth


def leaning(variance: float, keys: float) -> tuple[float, float]:
    """What tokens add that overlap, with inner products ε of mean square o between them: s²o times
    the first number to Σp² of what is averaged, o times the second to the gradient of the query.

    E p_j p_k grows with the covariance s²ε of two logits by ∂²(p_j p_k)/∂l_j∂l_k =
    p_j p_k((1 − 2p_j)(1 − 2p_k) + 2p_j p_k); in Σ p_j a_j(k_j − k̄) the pair has
    p_j p_k(1 − p_j − p_k + 2p_j p_k).
    """
    if keys <= 1:
        return 0.0, 0.0
    if keys < 2:
        one, two = leaning(variance, 2.0)
        return (keys - 1) * one, (keys - 1) * two
    return _leaning(float(f"{min(max(variance, 1e-6), 144.0):.3g}"), keys)


@lru_cache(maxsize=16384)
def _leaning(variance: float, keys: float) -> tuple[float, float]:
    """As :func:`_differing` does: E p_j^a p_k^b is ∫ F_a F_b R^{T−2} dt/Γ(a + b)."""
    most = max(1 << (math.ceil(keys) - 1).bit_length(), 64)
    step, rest, first, second, _, _ = _laplace(variance, most)
    with np.errstate(under="ignore"):
        pairs = keys * (keys - 1) * step * np.exp((keys - 2) * rest)
    tilt = float((pairs * (first - second) ** 2).sum())
    flat = float((pairs * (first * first - first * second + second * second / 3)).sum())
    return max(tilt, 0.0), max(flat, 0.0)


def logits_of(step: Step) -> tuple[Signal, Seen, float] | None:
    """Of a softmax: the logits without the constants that are added to them, what these let it
    see, and the logits' variance over the keys; None where something is not known."""
    x, shape = step.signal(0), step.shape(0)
    axis = int(step.number("axis"))
    keys = known_size(shape, (axis,))
    if keys is None or shape is None:
        return None
    rank = len(shape)
    look = everything(keys)
    queries = known_size(shape, (rank - 2,)) if rank > 1 else None
    if axis == rank - 1 and queries is not None:
        look, rest = seen(step, step.value(0), queries, keys)
        if rest is not None and rest != step.value(0):
            inner = step.signals.get(rest, UNKNOWN_SIGNAL)
            of_rest = step.graph.shape(rest)
            if inner.known and of_rest is not None:
                more = rank - len(of_rest)
                x = inner.but(roles=x.roles, profile={}, parts=(),
                              shared={a + more: c for a, c in inner.shared.items()})  # fmt: skip
    if x.second_moment is None or x.mean is None:
        return None
    variance = max(x.second_moment - x.mean**2, 0.0)
    if is_spot(x, rank, axis) and x.position_correlation is not None:  # what keys share cancels
        variance = min(variance, x.second_moment * max(1 - x.position_correlation, 0.0))
    return x, look, variance


def is_spot(x: Signal, rank: int, axis: int) -> bool:
    """Whether an axis is one of positions."""
    return len(x.roles) == rank and x.roles[axis] == "position"


@transfers("softmax")
def _softmax(step: Step) -> Signal:
    """Entries have mean 1/T and second moment Σp²/T. That a row sums to one fixes what two entries
    of it share: E[p p′] = (1 − Σp²)/(T(T − 1)), which stands as the position correlation."""
    shape, made = step.shape(0), logits_of(step)
    axis = int(step.number("axis"))
    keys = known_size(shape, (axis,))
    if keys is None or shape is None or made is None:
        return Signal(roles=step.signal(0).roles, one_sided=1)
    x, look, variance = made
    level, fixed_part = x.second_moment or 0.0, (x.mean or 0.0) ** 2
    spot = is_spot(x, len(shape), axis)
    each = [participation(variance, n) for n, _, _ in look.groups]
    own = sum(p * share for p, (_, share, _) in zip(each, look.groups, strict=True))
    second = own / keys
    fixed = 1 / keys**2
    between = level * (x.sample_correlation or 0.0) - fixed_part
    r = min(max(between / variance, 0.0), 1.0) if variance > 0 else 1.0
    same = sum(shared_participation(p, n, r) * share
               for p, (n, share, _) in zip(each, look.groups, strict=True))  # fmt: skip
    apart = correlated(fixed, second)
    side = (1 - own) / (keys * (keys - 1)) if keys > 1 else 1.0
    rank = len(shape)
    queries = known_size(shape, (rank - 2,)) if axis == rank - 1 and rank > 1 else None
    profile: dict[int, npt.NDArray[np.float64]] = {}
    shared: dict[int, float] = {}
    if queries and queries > 1:
        profile = _by_query(look, each, rank, 0.0, 1.0)
        alike = x.shared.get(rank - 2)
        if spot and x.roles[rank - 2] == "position" and alike is not None:
            alike = (alike * level - fixed_part) / variance if variance > 0 else 1.0
            joint = sum(shared_participation(p, n, alike) * pairs
                        for p, (n, _, pairs) in zip(each, look.groups, strict=True))  # fmt: skip
            shared = {rank - 2: min(look.pairs * joint / own, 1.0)}
    return Signal(1 / keys, second, correlated(side, second) if spot else apart,
                  correlated(same / keys, second), (), 1,
                  x.roles, profile, cross_correlation=apart, shared=shared)  # fmt: skip


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
    q, fixed, second = x.second_moment, x.mean**2, mean * mean + variance
    return Signal(mean, second, None, None, (), -1, x.roles).but(
        **paired(x, lambda c: correlated(mean * mean + c * q - fixed, second))
    )


_MOVES = frozenset({"reshape", "transpose", "split", "slice", "select_index", "rotary", "identity",
                    "cast", "expand", "layer_norm", "rms_norm", "lp_normalize", "mul", "concat",
                    "batch_norm"})  # fmt: skip
_MOST = 24  # nodes looked back over


def token_overlap(step: Step) -> float:
    """How much the tokens that keys and values are made of point in the same directions
    (signal.overlap); 0 where these are not known."""
    for i in (2, 1):
        made = token_features(step.graph, step.value(i))
        if made is not None:
            size, tokens = made
            found = overlap(step.graph, step.signals, step.dependence, tokens) if tokens else None
            return 1 / size if found is None else found.whole
    return 0.0


def token_features(graph: LayerGraph, value: str | None) -> tuple[int, str | None] | None:
    """The number of features of the tokens that a key or value is made of, the fan-in of the affine
    map behind it, and these tokens where it is one of each by itself."""
    for _ in range(_MOST):
        node = graph.producer.get(value) if value is not None else None
        if node is None:
            return None
        if node.op in ("linear", "conv"):
            weight = graph.shape(node.inputs[1])
            axis = 1 if node.op == "conv" else int(str(node.attributes.get("input_axis", 1)))
            if weight is None:
                return None
            size = known_size(weight, range(1, len(weight)) if node.op == "conv" else (axis,))
            if node.op == "conv" and node.attributes.get("groups", 1) != 1:
                value = node.inputs[0]  # a depthwise map keeps the features apart
                continue
            return None if size is None else (size, node.inputs[0] if node.op == "linear" else None)
        if node.op not in _MOVES:
            return None
        value = node.inputs[0]
    return None


def seen_by(step: Step, queries: int, keys: int) -> tuple[Seen, Signal | None]:
    """What an attention sees, and the signal of what else than constants its mask adds."""
    if not step.has(3):
        return causal(queries, keys) if step.attribute("causal") else everything(keys), None
    look, rest = seen(step, step.value(3), queries, keys)
    if step.attribute("causal"):
        known = step.constant(3)
        hidden = np.triu(np.full((queries, keys), -np.inf), keys - queries + 1)
        if known is not None and known.dtype.kind == "f":
            with np.errstate(over="ignore"):
                look = of_array(known.astype(np.float64) + hidden, queries, keys)
        elif rest is not None:
            look = causal(queries, keys)
    return look, None if rest is None else step.signals.get(rest, UNKNOWN_SIGNAL)


def bias_variance(mask: Signal | None) -> tuple[float, float]:
    """(variance over the keys, what samples share of it) that a mask adds to the logits beside
    constants: a learned bias by position. A number that stands for minus infinity adds none."""
    if mask is None or mask.second_moment is None or mask.mean is None:
        return 0.0, 1.0
    if mask.mean < 0 and mask.second_moment / -mask.mean > 30:  # some minus infinity, else zero
        return 0.0, 1.0
    own = mask.second_moment - mask.mean**2
    samples = mask.sample_correlation if mask.sample_correlation is not None else 1.0
    return max(own, 0.0), min(max(samples, 0.0), 1.0)


def _of_channels(step: Step) -> Signal:
    """Channels that attend to channels by what they are at all N positions: the logits have
    E l² = scale²·N·E q²·E k²·(1 + (N − 1)ρ_q ρ_k), and what is averaged are features, which share
    their means alone; two positions are averaged with the same weights."""
    q, k, v = step.signal(0), step.signal(1), step.signal(2)
    places, keys = known_size(step.shape(0), (-1,)), known_size(step.shape(1), (-2,))
    f_k, f_v = k.between_features(len(k.roles) - 2), v.between_features(len(v.roles) - 2)
    blank = Signal(roles=v.roles)
    if (places is None or keys is None or f_k is None or f_v is None or step.has(3)
            or q.second_moment is None or k.second_moment is None or v.second_moment is None
            or q.position_correlation is None or k.position_correlation is None
            or step.number("softcap") or step.number("dropout")):  # fmt: skip
        return blank
    given = step.attribute("scale")
    scale = float(given) if isinstance(given, int | float) else 1 / math.sqrt(places)
    whole = 1 + (places - 1) * q.position_correlation * k.position_correlation
    logits = scale**2 * places * q.second_moment * k.second_moment * max(whole, 0.0)
    logits *= max(1 - f_k, 0.0)
    own = participation(logits, keys)
    alike = 0.0
    if q.apart is not None and k.apart is not None and whole > 0:
        alike = max(((q.sample_correlation or 0.0) * (k.sample_correlation or 0.0)
                     + (places - 1) * q.apart * k.apart) / whole, 0.0)  # fmt: skip
    other = shared_participation(own, keys, alike)
    level, fixed = v.second_moment, v.second_moment * f_v
    second = fixed + level * (1 - f_v) * own

    def through(c: float | None, weights: float) -> float | None:
        return None if c is None else correlated(fixed + (c - f_v) * level * weights, second)

    return Signal(v.mean, second, through(v.position_correlation, own),
                  through(v.sample_correlation, other), v.odd_in, v.one_sided, v.roles,
                  cross_correlation=through(v.apart, other))  # fmt: skip


@transfers("attention")
def _attention(step: Step) -> Signal:
    """E out² = E v²·(ρ_v + (1 − ρ_v)·(Σp² + s²·o·L)): the part of v that all positions share
    passes, the rest is averaged with weights that lean towards the query's direction, by the
    tokens' overlap o and by L of :func:`leaning`.

    Two queries of one sample share Σ p p′ with logits correlated by ρ_q; of two samples a token's
    part by position alone is averaged like v, with K_v = X + (S − X)·Σ p p′.
    """
    q, k, v = step.signal(0), step.signal(1), step.signal(2)
    shape, keys_shape = step.shape(0), step.shape(1)
    roles = q.roles if len(q.roles) == len(shape or ()) else v.roles
    if shape is None or keys_shape is None:
        return Signal(roles=roles)
    if v.roles[-2:] == k.roles[-2:] == q.roles[-2:] == ("feature", "position"):
        return _of_channels(step)
    features, queries = known_size(shape, (-1,)), known_size(shape, (-2,))
    keys = known_size(keys_shape, (-2,))
    p_k, p_v = k.position_correlation, v.position_correlation
    if keys == 1:
        p_k = p_v = 1.0
    if (features is None or keys is None or queries is None or v.second_moment is None
            or q.second_moment is None or k.second_moment is None or v.mean is None
            or p_k is None or p_v is None):  # fmt: skip
        return Signal(roles=roles)
    given = step.attribute("scale")
    scale = float(given) if isinstance(given, int | float) else 1 / math.sqrt(features)
    content = scale**2 * features * q.second_moment * k.second_moment * max(1 - p_k, 0.0)
    softcap = step.number("softcap")
    if softcap:
        content = softcap**2 * math.tanh(math.sqrt(content) / softcap) ** 2
    look, added = seen_by(step, queries, keys)
    bias, bias_shared = bias_variance(added)
    logits = content + bias
    alike = token_overlap(step)
    # q² averages over the features of a head: two points that have its variance 2/d.
    swing = min(math.sqrt(2 / features), 1.0)

    def share(correlation: float | None, keyed: float) -> float:
        """The correlation of two queries' logits."""
        return 0.0 if logits <= 0 else content / logits * (correlation or 0.0) * keyed

    s_k = k.sample_correlation if k.sample_correlation is not None else 0.0
    x_k = k.apart if k.apart is not None else 0.0
    keyed = min(max((s_k - x_k) / max(1 - p_k, 1e-9), 0.0), 1.0)
    fixed = bias * bias_shared / logits if logits > 0 else 0.0
    r_p = share(q.position_correlation, 1.0)
    r_s, r_x = share(q.sample_correlation, keyed) + fixed, share(q.apart, keyed)
    mean = {"own": 0.0, "tilt": 0.0, "p": 0.0, "s": 0.0, "x": 0.0}
    uneven = []
    for n, rows, pairs in look.groups:
        own = sum(participation(content * (1 + d) + bias, n) for d in (swing, -swing)) / 2
        tilt = content * alike * sum(
            leaning(content * (1 + d) + bias, n)[0] for d in (swing, -swing)) / 2  # fmt: skip
        uneven.append(own + tilt)
        mean["own"] += own * rows
        mean["tilt"] += tilt * rows
        mean["s"] += shared_participation(own, n, r_s) * rows
        mean["p"] += shared_participation(own, n, r_p) * pairs * look.pairs
        mean["x"] += shared_participation(own, n, r_x) * pairs * look.pairs
    own, tilt = mean["own"], mean["tilt"]
    free = v.second_moment * max(1 - p_v, 0.0)
    second = v.second_moment * p_v + free * (own + tilt)
    p = step.number("dropout")
    if p and step.graph.mode == "train":
        second += v.second_moment * own * (1 / (1 - p) - 1)

    def leant(correlation: float | None) -> float:
        return free * tilt * min(max(correlation or 0.0, 0.0), 1.0)

    positions = correlated(
        v.second_moment * p_v + free * mean["p"] + leant(q.position_correlation), second
    )
    samples = apart = None
    if v.sample_correlation is not None and v.apart is not None:
        x_v = v.apart * v.second_moment
        more = max(v.sample_correlation * v.second_moment - x_v, 0.0)
        samples = correlated(x_v + more * mean["s"] + leant(q.sample_correlation), second)
        apart = correlated(x_v + more * mean["x"] + leant(q.apart), second)
    return Signal(v.mean, second, positions, samples, v.odd_in, v.one_sided, roles,
                  _by_query(look, uneven, len(shape), second - free * (own + tilt), free),
                  cross_correlation=apart)  # fmt: skip


def _by_query(
    look: Seen, each: Sequence[float], rank: int, fixed: float, free: float
) -> dict[int, npt.NDArray[np.float64]]:
    """E out² along the queries where they see different numbers of keys: ``fixed`` + ``free``·Σp²,
    with Σp² and its tilt of each group."""
    if look.rows is None:
        return {}
    values = fixed + free * over_rows(look, each)
    level = float(values.mean())
    return {rank - 2: values / level} if level > 0 else {}


def over_rows(look: Seen, each: Sequence[float]) -> npt.NDArray[np.float64]:
    """What each group has, along the queries."""
    assert look.rows is not None
    numbers = np.array([n for n, _, _ in look.groups])
    order = np.argsort(numbers)
    values = np.log(np.maximum(np.array(each)[order], 1e-9 * max(each) or 1e-300))
    return np.asarray(np.exp(np.interp(np.log(look.rows), np.log(numbers[order]), values)))


@transfers("rotary")
def _rotary(step: Step) -> Signal:
    """A rotation of pairs (signal.rotation)."""
    x, shape = step.signal(0), step.shape(0)
    if shape is None or len(shape) < 2 or shape[-1] is None or shape[-2] is None:
        return x.but(mean=0.0 if x.mean == 0.0 else None, position_correlation=None,
                     cross_correlation=None)  # fmt: skip
    return turned(x, shape[-2], shape[-1])


@transfers("gumbel_softmax")
def _gumbel(step: Step) -> Signal:
    return UNKNOWN_SIGNAL
