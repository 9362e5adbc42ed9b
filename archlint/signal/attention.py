"""Softmax and attention: averaging with the softmax's participation Σp².

The logits l_ij = scale·q_i·k_j are normal over the weights that make q and k. With Cov over the
weights = scale²·d·K_q(i, i′)·K_k(j, j′), what the keys have in common cancels in the softmax, so
that over the keys of one query their variance is s² = scale²·d·E q²·E k²·(1 − ρ_k). Since a logit
is linear in its own token, the softmax also leans towards the tokens along one direction of their
space: of n-dimensional tokens that adds s²(1 − Σp²)²/n to the average (theory.md 9).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from archlint.graph.model import LayerGraph
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.rotation import turned
from archlint.signal.transfer import Step, correlated, known_size, paired, transfers

_GRID = 100  # points of the outer integral at least
_EACH = 64  # queries under a causal mask up to which each is evaluated
_LONGEST = 65536  # queries of which a profile is kept
_STEPS = 14  # lengths at which a longer one is, in geometric steps


def participation(variance: float, keys: int) -> float:
    """E Σp² of a softmax over ``keys`` independent normal logits of a variance: T at zero
    variance gives 1/T, weak logits e^{s²}/T, strong ones 1."""
    if keys <= 1:
        return 1.0
    if variance <= 0 or not math.isfinite(variance):
        return 1.0 / keys if variance <= 0 else 1.0
    return _participation(float(f"{min(variance, 1e4):.3g}"), keys)


@lru_cache(maxsize=16384)
def _participation(variance: float, keys: int) -> float:
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


def shared_participation(own: float, keys: int, correlation: float) -> float:
    """Σ p p′ of two softmaxes over the same keys whose logits have a correlation r: e^{r s²}/T for
    weak logits, which is (1/T)·(T Σp²)^r."""
    if keys <= 1:
        return 1.0
    return float((keys * own) ** min(max(correlation, 0.0), 1.0) / keys)


@transfers("softmax")
def _softmax(step: Step) -> Signal:
    """Entries have mean 1/T and second moment Σp²/T. That a row sums to one fixes what two entries
    of it share: E[p p′] = (1 − Σp²)/(T(T − 1)), which stands as the position correlation."""
    x, shape = step.signal(0), step.shape(0)
    axis = int(step.number("axis"))
    keys = known_size(shape, (axis,))
    if keys is None or shape is None or x.second_moment is None or x.mean is None:
        return Signal(roles=x.roles, one_sided=1)
    variance = max(x.second_moment - x.mean**2, 0.0)
    spot = len(x.roles) == len(shape) and x.roles[axis] == "position"
    if spot and x.position_correlation is not None:  # what all keys share cancels
        variance = min(variance, x.second_moment * max(1 - x.position_correlation, 0.0))
    counts = _shown(step, keys)
    rows = sum(n for _, n in counts)
    own = sum(participation(variance, seen) * n for seen, n in counts) / rows
    second = own / keys
    fixed = 1 / keys**2
    between = x.second_moment * (x.sample_correlation or 0.0) - x.mean**2
    r = min(max(between / variance, 0.0), 1.0) if variance > 0 else 1.0
    apart = correlated(fixed, second)
    side = (1 - own) / (keys * (keys - 1)) if keys > 1 else 1.0
    rank = len(shape)
    queries = known_size(shape, (rank - 2,)) if axis == rank - 1 and rank > 1 else None
    profile: dict[int, npt.NDArray[np.float64]] = {}
    shared: dict[int, float] = {}
    if queries and queries > 1:
        each = [(participation(variance, seen), n) for seen, n in counts]
        profile = _by_query(each, queries, rank, 0.0, 1.0)
        alike = x.shared.get(rank - 2)
        if spot and x.roles[rank - 2] == "position" and alike is not None:
            # of two queries the one that sees more keys gives each the smaller weight
            alike = (alike * x.second_moment - x.mean**2) / variance if variance > 0 else 1.0
            joint, below = 0.0, 0
            for (one, n), (seen, _) in zip(each, counts, strict=True):
                pairs = (n * (n - 1) + 2 * n * below) / max(rows * (rows - 1), 1)
                joint += shared_participation(one, seen, alike) * pairs
                below += n
            shared = {rank - 2: min(joint / own, 1.0)} if rows > 1 else {}
    return Signal(1 / keys, second, correlated(side, second) if spot else apart,
                  correlated(shared_participation(own, keys, r) / keys, second), (), 1,
                  x.roles, profile, cross_correlation=apart, shared=shared)  # fmt: skip


def _shown(step: Step, keys: int) -> tuple[tuple[int, int], ...]:
    """(number of keys seen, how many rows see so many) of logits under a constant mask."""
    node = step.graph.producer.get(step.value(0) or "")
    extra = 0  # beside the logits under the mask, such as an attention sink
    if node is not None and node.op == "concat":
        made = [step.graph.producer.get(v or "") for v in node.inputs]
        node = next((n for n in made if n is not None and n.op in _MASKS), None)
        inner = known_size(step.graph.shape(node.output), (-1,)) if node is not None else None
        extra, keys = keys - (inner or keys), inner or keys
    for value in node.inputs if node is not None and node.op in _MASKS else ():
        mask = step.graph.constant(value)
        if mask is None or mask.ndim < 2 or mask.shape[-1] != keys:
            continue
        if mask.dtype.kind == "b":
            seen = mask if node is not None and node.op == "where" else ~mask
        else:
            seen = mask.astype(np.float64) > -1e4
        counts, times = np.unique(seen.sum(-1).reshape(-1), return_counts=True)
        pairs = zip(counts, times, strict=True)
        return tuple((max(int(n) + extra, 1), int(k)) for n, k in pairs)
    return ((keys + extra, 1),)


_MASKS = frozenset({"add", "where", "masked_fill"})


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


def token_features(graph: LayerGraph, value: str | None) -> int | None:
    """The number of features of the tokens that a query, key or value is made of: the fan-in of the
    affine map behind it."""
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
            return size
        if node.op not in _MOVES:
            return None
        value = node.inputs[0]
    return None


def seen_by(step: Step, queries: int, keys: int) -> tuple[tuple[int, int], ...]:
    """(number of keys seen, how many queries see so many)."""
    if step.attribute("causal"):
        return _causal(max(keys - queries + 1, 1), keys)
    mask = step.constant(3) if step.has(3) else None
    if mask is None or mask.ndim < 2 or mask.shape[-1] != keys:
        return ((keys, queries),)
    if mask.dtype.kind == "b":
        seen = mask
    else:
        numbers = mask.astype(np.float64)
        seen = numbers > numbers.max(axis=-1, keepdims=True) - 30
    counts, times = np.unique(seen.sum(-1).reshape(-1), return_counts=True)
    return tuple((max(int(n), 1), int(k)) for n, k in zip(counts, times, strict=True))


def _causal(first: int, last: int) -> tuple[tuple[int, int], ...]:
    """Queries that see ``first`` … ``last`` keys, many of them in groups with one number each."""
    if last - first < _EACH:
        return tuple((n, 1) for n in range(first, last + 1))
    edges = np.unique(np.geomspace(first, last + 1, _STEPS + 1).round().astype(int))
    return tuple(((int(a) + int(b)) // 2, int(b) - int(a))
                 for a, b in itertools.pairwise(edges))  # fmt: skip


def bias_variance(step: Step) -> tuple[float, float]:
    """(variance over the keys, what samples share of it) that a mask adds to the logits: a learned
    bias by position. Minus infinity, or a number that stands for it, adds none."""
    if not step.has(3):
        return 0.0, 1.0
    known = step.constant(3)
    if known is not None and known.dtype.kind == "f" and known.ndim >= 1 and known.shape[-1] > 1:
        numbers = known.astype(np.float64)
        numbers = np.where(numbers > numbers.max(-1, keepdims=True) - 30, numbers, np.nan)
        with np.errstate(invalid="ignore"):
            spread = float(np.nan_to_num(np.nanvar(numbers, axis=-1)).mean())
        return spread, 1.0
    mask = step.signal(3)
    if mask.second_moment is None or mask.mean is None:
        return 0.0, 1.0
    if mask.mean < 0 and mask.second_moment / -mask.mean > 30:  # some minus infinity, else zero
        return 0.0, 1.0
    own = mask.second_moment - mask.mean**2
    samples = mask.sample_correlation if mask.sample_correlation is not None else 1.0
    return max(own, 0.0), min(max(samples, 0.0), 1.0)


@transfers("attention")
def _attention(step: Step) -> Signal:
    """E out² = E v²·(ρ_v + (1 − ρ_v)·(Σp² + s²(1 − Σp²)²/n)): the part of v that all positions
    share passes, the rest is averaged with weights that lean towards the query's direction.

    Two queries of one sample share Σ p p′ with logits correlated by ρ_q; of two samples a token's
    part by position alone is averaged like v, with K_v = X + (S − X)·Σ p p′.
    """
    q, k, v = step.signal(0), step.signal(1), step.signal(2)
    shape, keys_shape = step.shape(0), step.shape(1)
    roles = q.roles if len(q.roles) == len(shape or ()) else v.roles
    if shape is None or keys_shape is None:
        return Signal(roles=roles)
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
    bias, bias_shared = bias_variance(step)
    logits = content + bias
    wide = token_features(step.graph, step.value(2)) or token_features(step.graph, step.value(1))
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
    counts = seen_by(step, queries, keys)
    rows = sum(n for _, n in counts)
    below = 0
    uneven: list[tuple[float, int]] = []
    for seen, n in counts:
        own = sum(participation(content * (1 + d) + bias, seen) for d in (swing, -swing)) / 2
        tilt = content * (1 - own) ** 2 / wide if wide else 0.0
        uneven.append((own + tilt, n))
        mean["own"] += own * n / rows
        mean["tilt"] += tilt * n / rows
        mean["s"] += shared_participation(own, seen, r_s) * n / rows
        # of two queries the one that sees more keys gives each the smaller weight
        pairs = (n * (n - 1) + 2 * n * below) / max(rows * (rows - 1), 1)
        mean["p"] += shared_participation(own, seen, r_p) * pairs
        mean["x"] += shared_participation(own, seen, r_x) * pairs
        below += n
    own, tilt = mean["own"], mean["tilt"]
    free = v.second_moment * max(1 - p_v, 0.0)
    second = v.second_moment * p_v + free * (own + tilt)
    p = step.number("dropout")
    if p and step.graph.mode == "train":
        second += v.second_moment * own * (1 / (1 - p) - 1)

    def leaning(correlation: float | None) -> float:
        return free * tilt * min(max(correlation or 0.0, 0.0), 1.0)

    positions = correlated(
        v.second_moment * p_v + free * mean["p"] + leaning(q.position_correlation), second
    )
    samples = apart = None
    if v.sample_correlation is not None and v.apart is not None:
        x_v = v.apart * v.second_moment
        more = max(v.sample_correlation * v.second_moment - x_v, 0.0)
        samples = correlated(x_v + more * mean["s"] + leaning(q.sample_correlation), second)
        apart = correlated(x_v + more * mean["x"] + leaning(q.apart), second)
    return Signal(v.mean, second, positions, samples, v.odd_in, v.one_sided, roles,
                  _by_query(uneven, queries, len(shape), second - free * (own + tilt), free),
                  cross_correlation=apart)  # fmt: skip


def _by_query(
    uneven: Sequence[tuple[float, int]], queries: int, rank: int, fixed: float, free: float
) -> dict[int, npt.NDArray[np.float64]]:
    """E out² along the queries where they see different numbers of keys: ``fixed`` + ``free``·Σp²,
    from (Σp² with its tilt, how many queries)."""
    if len(uneven) < 2 or sum(n for _, n in uneven) != queries or queries > _LONGEST:
        return {}
    each = fixed + free * np.repeat([s for s, _ in uneven], [n for _, n in uneven])
    level = float(each.mean())
    return {rank - 2: each / level} if level > 0 else {}


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
