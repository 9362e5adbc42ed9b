"""The law of a weight, judged from its elements; and whether a file holds trained weights.

An initializer draws elements independently from one law (or sets them by a formula). Training
leaves traces of which none is left by chance: rows of unequal norm, rows that resemble each other,
heavy tails. A tensor is *trained* where a test against independent draws fails beyond a z-score of
``REJECT``; where none fails, its family is the likeliest of those that fit, and its moments are an
initializer's exact ones where exactly one known initializer lies within the sampling error.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from archlint.graph.model import LayerGraph, Node, Parameter, WeightState
from archlint.graph.ops import attribute
from archlint.initialization.distribution import Distribution, Family, constant
from archlint.initialization.initializers import (
    TRUNCATED_STD,
    Fans,
    Known,
    Role,
    bias_initializers,
    fans_of,
    known_initializers,
)
from archlint.initialization.likeness import (
    as_matrix,
    block,
    kolmogorov_smirnov,
    normal_cdf,
    orthogonality,
    sample,
    scores,
)
from archlint.initialization.moments import Moments, distinct, moments

__all__ = ["Fitted", "Moments", "examine", "fit", "fit_graph", "moments"]

Array = npt.NDArray[Any]

REJECT = 5.5  # z-score, two in 10⁸: a thousand tensors with eight tests fail in 1 file of 6,000
_ENOUGH = 256  # elements below which a tensor's shape of law cannot be told
_SNAP = 3.5  # standard errors between a tensor's variance and a known initializer's
_WORST_SNAP = 0.12  # relative error of the variance above which nothing is told apart


@dataclass(frozen=True, slots=True)
class Fitted:
    """What was found out about one array.

    ``scores`` maps a test to its z-score against independent draws. ``candidates`` are the known
    initializers within the sampling error, likelier ones first. ``informative``: large enough for
    the tests to mean something.
    """

    law: Distribution
    moments: Moments
    scores: Mapping[str, float] = field(default_factory=dict)
    candidates: tuple[Known, ...] = ()
    informative: bool = False

    @property
    def worst(self) -> tuple[str, float]:
        """The test that fails worst, and its z-score."""
        if not self.scores:
            return "", 0.0
        return max(self.scores.items(), key=lambda item: item[1])

    @property
    def rejected(self) -> bool:
        """Whether no draw of independent elements looks like this."""
        return self.law.family == "trained"


def fit(array: Array, fans: Fans | None = None) -> Distribution:
    """The law of an array's elements; ``fans`` lets it recognise initializers that scale.

    The family is ``trained`` where the elements are no independent draws of a usual law.
    ``exact`` is set only where the law is constant or one known initializer's.
    """
    return examine(array, known_initializers(fans)).law


# --------------------------------------------------------------------------- one array


def examine(array: Array, known: Sequence[Known] = (), leading: int = 1, depth: int = 1) -> Fitted:
    """Judge one array, whose first ``leading`` axes are rows.

    ``depth``: whether an array that is no draw as a whole may be one part by part.
    """
    m = moments(array)
    if m.count == 0:
        return Fitted(Distribution("unknown", math.nan, math.nan, exact=False), m)
    if m.low == m.high:
        return Fitted(constant(m.low), m)
    if array.ndim == 0:
        array = array.reshape(1)
    structured = _structured(array, m, leading)
    if structured is not None:
        return Fitted(structured, m, informative=False)
    values = sample(array)
    families = _families(values, m)
    tests: dict[str, float] = {}
    informative = m.count >= _ENOUGH
    if array.ndim > 1 and m.count >= 32:
        matrix = as_matrix(array, leading)
        part = block(matrix)
        taps = math.prod(array.shape[2:]) if leading == 1 and array.ndim > 2 else 1
        whole = part.shape[1] == matrix.shape[1]
        tests = scores(part, m.mean, math.sqrt(m.variance), taps if whole else 1)
    best = families[0]
    if m.count >= 64:
        tests["shape"] = best.score
    if informative and tests and max(tests.values()) > REJECT:
        if _is_table(array, values):
            return Fitted(_measured("deterministic", m, values), m, tests)
        if (
            depth
            and _may_be_parts(tests)
            and (mixed := _in_parts(array, m, known, leading, depth)) is not None
        ):
            return mixed
        return Fitted(_measured("trained", m, values), m, tests, (), True)
    law = _measured(best.family, m, values, best)
    fitting = [f for f in families if f.score <= max(3.5, best.score + 1.0)]
    candidates = _candidates(fitting if m.count < 4096 else [best], m, known)
    return Fitted(_snapped(law, candidates, m), m, tests, candidates, informative)


_PARTS = (2, 3, 4)  # fused projections: key-value, query-key-value, gates
_PIECE = 4096  # elements of a part that is to be judged alone


def _may_be_parts(tests: Mapping[str, float]) -> bool:
    """Whether only unequal norms speak against draws: joined blocks show no resemblance."""
    return all(z <= REJECT for name, z in tests.items() if "norm" not in name and name != "shape")


def _in_parts(
    array: Array, m: Moments, known: Sequence[Known], leading: int, depth: int
) -> Fitted | None:
    """A mixture, where each of a few equal blocks of rows or columns is a draw of its own.

    Exporters and users join projections that were drawn separately; a trained matrix does not
    become independent draws by being cut in a few pieces.
    """
    for axis in range(min(array.ndim, 2) if array.ndim < 4 else 1):
        for parts in _PARTS:
            size = array.shape[axis]
            if size % parts or array.size // parts < _PIECE or size // parts < 4:
                continue
            pieces = [
                examine(piece, known, leading, depth - 1) for piece in np.split(array, parts, axis)
            ]
            if any(p.rejected or p.law.family in ("laplace", "deterministic") for p in pieces):
                continue
            if not any(p.law.random for p in pieces):
                continue
            sums: Counter[str] = Counter()
            for piece in pieces:
                sums.update(piece.scores)
            sums.pop("shape", None)
            if max(sums.values(), default=0.0) > 4.5 * math.sqrt(parts):
                continue  # each part is a little off: a gradient over the whole, not parts
            kurtosis = _kurtosis(m)
            law = Distribution(
                "mixture", 0.0, m.second_moment, kurtosis, True, False, m.count,
                " | ".join(dict.fromkeys(p.law.initializer or p.law.family for p in pieces)),
            )  # fmt: skip
            tests = {name: max(p.scores.get(name, 0.0) for p in pieces)
                     for name in {k for p in pieces for k in p.scores}}  # fmt: skip
            return Fitted(law, m, tests, (), True)
    return None


def _is_table(array: Array, values: npt.NDArray[np.float64]) -> bool:
    """Whether an array is a formula's table: Fourier or cosine matrix, filter bank, sinusoids.

    Such a table repeats its numbers far more often than draws or trained weights in single
    precision do, and not on the even grid of quantised ones; or all its rows have the norm √(n/2)
    of paired sines and cosines.
    """
    if array.dtype.itemsize < 4:
        return False
    nonzero = np.abs(values[values != 0.0])
    if nonzero.size >= 32:
        some = distinct(nonzero)
        if some.size <= nonzero.size // 2 and not _is_quantised(array):
            return True
        # A filter bank: no negative element, and most are exactly zero.
        if nonzero.size < 0.2 * values.size and values[0] >= 0.0:
            return True
    if array.ndim == 2 and array.shape[1] % 2 == 0 and array.shape[1] >= 8:
        some = np.asarray(array[:: max(array.shape[0] // 64, 1)], np.float64)
        if np.allclose((some**2).sum(axis=1), array.shape[1] / 2, rtol=1e-4):
            return True
    return False


def _is_quantised(array: Array) -> bool:
    """Whether the elements, or those of single rows or columns, lie on an even grid."""
    if array.ndim < 2:
        lines = [array.reshape(-1)[:4096]]
    else:
        matrix = as_matrix(array)
        last = array.reshape(-1, array.shape[-1])
        lines = [array.reshape(-1)[:4096]]
        for i in range(4):
            lines += [matrix[i * len(matrix) // 4][:4096], last[:4096, i * last.shape[1] // 4]]
            lines.append(last[i * len(last) // 4][:4096])
    return any(_on_a_grid(np.asarray(line, np.float64)) for line in lines)


def _on_a_grid(line: npt.NDArray[np.float64]) -> bool:
    values = distinct(line)
    if values.size < 4:
        return False
    steps = np.diff(values)
    step = float(steps[steps > 1e-6 * float(np.abs(values).max())].min(initial=math.inf))
    if not math.isfinite(step):
        return False
    places = steps / step
    return bool(np.abs(places - np.round(places)).max() < 0.02)


@dataclass(frozen=True, slots=True)
class _Family:
    """A family fitted to an array: its z-score and log-likelihood, low and high of its support."""

    family: Family
    score: float
    likelihood: float
    kurtosis: float
    cdf: Any = field(compare=False, repr=False)
    low: float = -math.inf
    high: float = math.inf


def _structured(array: Array, m: Moments, leading: int) -> Distribution | None:
    """The law of an array that no independent draws gave: two values, eye, dirac, orthogonal."""
    common = {"exact": True, "count": m.count, "symmetric": False}
    if m.count >= 4 and _few_values(array, 2):
        zero = m.low == 0.0 or m.high == 0.0
        ones = round(m.squares / m.largest**2) if zero else 0
        if zero and array.ndim >= 2 and ones == min(array.shape[0], array.shape[1]):
            family: Family = "eye" if array.ndim == 2 else "dirac"
            if _on_the_diagonal(array):
                return Distribution(family, m.mean, m.second_moment, _kurtosis(m), **common)  # type: ignore[arg-type]
        symmetric = m.low == -m.high
        return Distribution(
            "two_point", 0.0 if symmetric else m.mean, m.second_moment,
            1.0 if symmetric else _kurtosis(m), symmetric, exact=symmetric, count=m.count,
        )  # fmt: skip
    if array.ndim >= 2 and m.count >= 16:
        for lead in dict.fromkeys((leading, array.ndim - 1)):
            matrix = as_matrix(array, lead)
            norm = orthogonality(matrix)
            if norm is not None:
                second = norm / max(matrix.shape)
                gain = math.sqrt(norm)
                text = "orthogonal_()" if abs(gain - 1) < 1e-3 else f"orthogonal_(gain={gain:.6g})"
                # Columns of a random orthogonal matrix are uniform on a sphere of n dimensions.
                kurtosis = 3.0 * max(matrix.shape) / (max(matrix.shape) + 2.0)
                return Distribution("orthogonal", 0.0, second, kurtosis, True, True, m.count, text)
    return None


def _few_values(array: Array, most: int) -> bool:
    head = array.reshape(-1)[: 4 * most + 64]
    if distinct(head).size > most:
        return False
    return bool(distinct(array).size <= most) if array.size < 1 << 20 else False


def _on_the_diagonal(array: Array) -> bool:
    n = min(array.shape[0], array.shape[1])
    centre = tuple(k // 2 for k in array.shape[2:])
    index = np.arange(n)
    return bool(np.all(array[(index, index, *centre)] != 0.0))


def _kurtosis(m: Moments, values: npt.NDArray[np.float64] | None = None) -> float:
    """E(w−mean)⁴/Var²: from all elements where the mean is small, else from a sample of them."""
    if m.variance <= 0.0:
        return math.nan
    if values is not None and m.mean**2 > 1e-3 * m.variance and values.size > 3:
        centred = values - values.mean()
        return float(np.mean(centred**4) / max(np.mean(centred**2), 1e-300) ** 2)
    return m.fourths / m.count / m.variance**2


def _measured(
    family: Family, m: Moments, values: npt.NDArray[np.float64], best: _Family | None = None
) -> Distribution:
    """The law with the array's own moments."""
    kurtosis = best.kurtosis if best is not None else _kurtosis(m, values)
    centred = abs(m.mean) <= 4.0 * math.sqrt(m.variance / m.count)
    mean = 0.0 if centred and family != "trained" else m.mean
    second = m.variance + mean * mean if family != "trained" else m.second_moment
    if best is not None and family == "uniform" and m.count >= 8:
        half = (m.high - m.low) / 2 * (m.count + 1) / (m.count - 1)  # unbiased half-width
        if centred:
            half = m.largest * (m.count + 1) / m.count
        second = half * half / 3 + mean * mean
    return Distribution(family, mean, second, kurtosis, mean == 0.0, False, m.count)


# --------------------------------------------------------------------------- families


def _families(values: npt.NDArray[np.float64], m: Moments) -> list[_Family]:
    """Normal, uniform, truncated normal, Laplace and sparse fits, likeliest fitting one first."""
    std = math.sqrt(m.variance)
    kurtosis = _kurtosis(m, values)
    exact = m.mean**2 <= 1e-3 * m.variance
    n = m.count if exact else max(values.size, 2)
    distinct = int(np.count_nonzero(np.diff(values))) + 1
    coarse = distinct < min(values.size, 4096) // 2  # 8-bit or half-precision grid
    found = [
        _normal(values, m, std, kurtosis, n, coarse),
        _uniform(values, m, kurtosis, n, coarse),
    ]
    if m.count >= 64 and (cut := _truncated(values, m, std, kurtosis, n, coarse)) is not None:
        found.append(cut)
    if m.count >= _ENOUGH:
        found.append(_laplace(values, m, std, kurtosis, n))
        zeros = float(np.mean(values == 0.0))
        if 0.02 < zeros < 0.98 and (sparse := _sparse(values, m, zeros)) is not None:
            found.append(sparse)
    return sorted(
        found, key=lambda f: (f.score > 4.5, -f.likelihood if f.score <= 4.5 else f.score)
    )


def _shape_score(
    kurtosis: float, expected: float, variance: float, n: int, ks: float, coarse: bool
) -> float:
    """The worse of the kurtosis test and Kolmogorov and Smirnov's, as a z-score."""
    tolerance = (4e-3 if coarse else 1e-5) * expected
    by_kurtosis = max(abs(kurtosis - expected) - tolerance, 0.0) / math.sqrt(variance / n)
    # P(√n·D > x) ≈ 2·exp(−2x²), a normal deviate of about 2x; small samples skew the kurtosis.
    skew = 1.0 + 20.0 / math.sqrt(n) * (kurtosis > expected)
    return max(by_kurtosis / skew, 2.0 * ks)


def _normal(
    values: npt.NDArray[np.float64], m: Moments, std: float, kurtosis: float, n: int, coarse: bool
) -> _Family:
    def cdf(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return normal_cdf((x - m.mean) / std)

    score = _shape_score(kurtosis, 3.0, 24.0, n, kolmogorov_smirnov(values, cdf), coarse)
    likelihood = -m.count * (math.log(std) + 0.5 * math.log(2 * math.pi * math.e))
    return _Family("normal", score, likelihood, 3.0, cdf)


def _uniform(
    values: npt.NDArray[np.float64], m: Moments, kurtosis: float, n: int, coarse: bool
) -> _Family:
    width = m.high - m.low

    def cdf(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.clip((x - m.low) / width, 0.0, 1.0)

    # Var of the sample kurtosis: μ8 − μ4² − 4μ4(μ6 − μ4) + 4μ4²(μ4 − 1) with μ4, μ6, μ8 =
    # 9/5, 27/7, 9.
    score = _shape_score(kurtosis, 1.8, 1.317, n, kolmogorov_smirnov(values, cdf), coarse)
    likelihood = -m.count * math.log(width)
    return _Family("uniform", score, likelihood, 1.8, cdf, m.low, m.high)


def _truncated(
    values: npt.NDArray[np.float64],
    m: Moments,
    std: float,
    kurtosis: float,
    n: int,
    coarse: bool,
) -> _Family | None:
    """N(mean, σ²) cut at ±cσ; c follows from max|w|/std, which grows with c from √3."""
    reach = max(m.high - m.mean, m.mean - m.low) / std
    if not 1.75 < reach < 4.0:
        return None
    low, high = 0.05, 6.0
    for _ in range(50):
        c = (low + high) / 2
        if c / _cut_moments(c)[0] < reach:
            low = c
        else:
            high = c
    spread, fourth, noise = _cut_moments(c)
    sigma = std / spread
    tail = 0.5 * math.erfc(c / math.sqrt(2))

    def cdf(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        inside = (normal_cdf(np.clip((x - m.mean) / sigma, -c, c)) - tail) / (1 - 2 * tail)
        return np.asarray(inside)

    score = _shape_score(kurtosis, fourth, noise, n, kolmogorov_smirnov(values, cdf), coarse)
    likelihood = -m.count * (
        math.log(sigma * math.sqrt(2 * math.pi) * (1 - 2 * tail)) + spread**2 / 2
    ) - 0.5 * math.log(max(m.count, 2))
    return _Family(
        "truncated_normal", score, likelihood, fourth, cdf, m.mean - c * sigma, m.mean + c * sigma
    )


def _cut_moments(c: float) -> tuple[float, float, float]:
    """Of N(0, 1) cut at ±c: standard deviation, kurtosis, N times the variance of the kurtosis."""
    density = math.exp(-c * c / 2) / math.sqrt(2 * math.pi)
    mass = math.erf(c / math.sqrt(2))
    raw = [1.0]
    for order in (2, 4, 6, 8):  # E x^k = (k − 1)·E x^(k−2) − 2·c^(k−1)·φ(c)/mass
        raw.append((order - 1) * raw[-1] - 2 * c ** (order - 1) * density / mass)
    second = max(raw[1], 1e-12)
    k4, k6, k8 = raw[2] / second**2, raw[3] / second**3, raw[4] / second**4
    noise = k8 - k4**2 - 4 * k4 * (k6 - k4) + 4 * k4**2 * (k4 - 1)
    return math.sqrt(second), k4, max(noise, 0.5)


def _laplace(
    values: npt.NDArray[np.float64], m: Moments, std: float, kurtosis: float, n: int
) -> _Family:
    scale = std / math.sqrt(2)

    def cdf(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        z = (x - m.mean) / scale
        tail = 0.5 * np.exp(-np.abs(z))
        return np.where(z < 0, tail, 1 - tail)

    # μ4, μ6, μ8 = 6, 90, 2520: the sample kurtosis has variance 1188/N.
    score = _shape_score(kurtosis, 6.0, 1188.0, n, kolmogorov_smirnov(values, cdf), False)
    # No framework draws weights from it: it must explain the array far better than a normal law.
    likelihood = -m.count * (1 + math.log(2 * scale)) - 12.0
    return _Family("laplace", score, likelihood, 6.0, cdf)


def _sparse(values: npt.NDArray[np.float64], m: Moments, zeros: float) -> _Family | None:
    """Zero with some probability, else normal (torch's ``sparse_``)."""
    rest = values[values != 0.0]
    if rest.size < 64:
        return None
    keep = 1.0 - zeros
    std = math.sqrt(m.second_moment / keep)

    def cdf(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return normal_cdf(x / std)

    kurtosis = float(np.mean(rest**4) / np.mean(rest**2) ** 2)
    score = _shape_score(kurtosis, 3.0, 24.0, rest.size, kolmogorov_smirnov(rest, cdf), False)
    likelihood = math.inf if score <= 4.5 else -math.inf  # an atom beats every density
    return _Family("sparse", score, likelihood, 3.0 / keep, cdf)


# --------------------------------------------------------------------------- snapping


def _candidates(
    families: Sequence[_Family], m: Moments, known: Sequence[Known]
) -> tuple[Known, ...]:
    """The known initializers that agree with an array within its sampling error."""
    if m.count < 2:
        return ()
    by_name = {f.family: f for f in families}
    found = []
    for initializer in known:
        fitted = by_name.get(initializer.shape)
        if fitted is None:
            continue
        variance = initializer.std**2
        if abs(m.mean - initializer.mean) > 4.5 * initializer.std / math.sqrt(m.count):
            continue
        if initializer.shape == "uniform":
            # The largest of N uniform |w| misses the bound by b/N on average; rounding to half
            # precision moves it by up to 1/2048.
            reach = max(m.high - initializer.mean, initializer.mean - m.low)
            short = 1.0 - reach / initializer.bound
            if not -1e-3 * (m.count < 1000) - 1e-5 <= short <= 12.0 / m.count + 1e-3:
                continue
        if initializer.shape == "truncated_normal":  # all of these cut at ±2σ
            reach = max(m.high - initializer.mean, initializer.mean - m.low)
            _, fourth, noise = _cut_moments(2.0)
            if reach > 2.002 * initializer.std / TRUNCATED_STD:
                continue
            if abs(_kurtosis(m) - fourth) > 4.5 * math.sqrt(noise / m.count) + 0.01:
                continue
        error = math.sqrt((fitted.kurtosis - 1.0) / m.count)
        if abs(m.variance / variance - 1.0) <= _SNAP * error + 1e-3:
            found.append(initializer)
    return tuple(found)


_TIERS = 8.0  # how much likelier an initializer of one rank of ``common`` is than of the next


def _snapped(
    law: Distribution,
    candidates: Sequence[Known],
    m: Moments,
    others: Mapping[str, tuple[float, int]] = {},
) -> Distribution:
    """The exact law of the one initializer that fits, else the law as it is.

    Initializers that give the same number (fan_in = fan_out) count as one. Different numbers within
    the sampling error are weighed by how usual the initializers are and by the deviations, in
    standard errors: this tensor's own and that of all tensors together (``others``: a text's pooled
    deviation and the number of tensors). One must be twenty times likelier than the rest together.
    """
    if not candidates or law.family not in ("normal", "uniform", "truncated_normal"):
        return law
    error = math.sqrt(max(law.kurtosis - 1.0, 0.0) / max(m.count, 1))
    weights: dict[tuple[str, float, float], float] = defaultdict(float)
    best: dict[tuple[str, float, float], Known] = {}
    for k in candidates:
        pooled, count = others.get(k.text, (0.0, 0))
        if k.shape == "uniform":  # the likelihood of a bound b is b^(−N) from max|w| on
            reach = max(m.high - k.mean, k.mean - m.low)
            worse = min(2.0 * m.count * max(math.log(k.bound / reach), 0.0), 60.0)
        else:
            own = (m.variance / k.std**2 - 1.0) / error
            worse = max(own * own, pooled * pooled)
        key = (k.shape, float(f"{k.std:.4g}"), k.mean)
        weights[key] += _TIERS**-k.common * math.exp(-worse / 2) * max(count, 1)
        if key not in best or (count, -k.common) > (
            others.get(best[key].text, (0.0, 0))[1], -best[key].common
        ):  # fmt: skip
            best[key] = k
    likeliest = max(weights, key=lambda name: weights[name])
    found = best[likeliest]
    if weights[likeliest] < 0.95 * sum(weights.values()):
        return law
    agreed = others.get(found.text, (0.0, 0))[1] >= 2
    if error > _WORST_SNAP and found.shape != "uniform" and not agreed:
        return law
    if found.shape == "uniform" and m.count < 12 and not agreed:
        return law
    kurtosis = {"normal": 3.0, "uniform": 1.8}.get(found.shape, _cut_moments(2.0)[1])
    return Distribution(
        found.shape,
        found.mean,
        found.std**2 + found.mean**2,
        kurtosis,
        found.mean == 0.0,
        True,
        m.count,
        found.text,
    )


def _pooled(every: Iterable[_Judged]) -> dict[str, tuple[float, int]]:
    """For each initializer's text: deviation of all tensors it may explain, in standard errors."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for j in every:
        m = j.fitted.moments
        for k in j.fitted.candidates:
            noise = {"normal": 2.0, "uniform": 0.8}.get(k.shape, 1.4) / m.count
            total = sums[k.text]
            total[0] += (m.variance / k.std**2 - 1.0) / noise
            total[1] += 1.0 / noise
            total[2] += 1
    return {text: (a / math.sqrt(b), int(n)) for text, (a, b, n) in sums.items()}


# --------------------------------------------------------------------------- what a weight is for


@dataclass(frozen=True, slots=True)
class _Use:
    """What a parameter is used as. ``role`` is None for one that is no weight of a layer."""

    kind: str  # "weight", "bias", "scale", "shift", "mean", "variance", "other"
    fans: Fans | None = None
    leading: int = 1
    fan_in: float | None = None  # of the weight beside a bias
    last: bool = False  # no other weight lies between this one and the outputs


_WEIGHTS = {
    "linear": (1,), "conv": (1,), "conv_transpose": (1,), "bilinear": (2,), "embedding": (1,),
    "embedding_bag": (1,), "rnn": (1, 2), "gru": (1, 2), "lstm": (1, 2), "matmul": (0, 1),
    "weight_norm": (0,), "spectral_norm": (0,),
}  # fmt: skip
_BIASES = {
    "linear": 2,
    "conv": 2,
    "conv_transpose": 2,
    "bilinear": 3,
    "rnn": 3,
    "gru": 3,
    "lstm": 3,
}
_NORM_PARTS = {1: "scale", 2: "shift", 3: "mean", 4: "variance"}
_MOVES = ("identity", "reshape", "transpose", "cast", "expand")


def _uses(graph: LayerGraph, outside: Mapping[str, str] = {}) -> dict[str, _Use]:
    """What each parameter that a graph reads is used as: the weightiest of its uses.

    ``outside`` maps inputs of a loop's body to the parameters that the loop hands in.
    """
    rank = ("weight", "scale", "shift", "mean", "variance", "bias", "other")
    found: dict[str, _Use] = {}

    def keep(name: str, use: _Use) -> None:
        if name not in found or rank.index(use.kind) < rank.index(found[name].kind):
            found[name] = use

    heads = _heads(graph)
    stands_for = dict(outside)
    stands_for.update({v.id: v.parameter for v in graph.values.values() if v.parameter is not None})
    for node in graph.nodes:
        first = node.inputs[0] if node.inputs else None
        if node.op in _MOVES and first in stands_for:
            stands_for[node.output] = stands_for[str(first)]
        if node.body is not None:
            handed = {
                inner: stands_for[outer]
                for inner, outer in zip(node.body.inputs, node.inputs, strict=False)
                if outer in stands_for
            }
            for name, use in _uses(node.body, handed).items():
                keep(name, replace(use, last=use.last and node.id in heads))
            continue
        for position, value in enumerate(node.inputs):
            shape = graph.shape(value)
            if value in stands_for and shape is not None and None not in shape:
                use = _use(graph, node, position, tuple(n for n in shape if n is not None))
                keep(stands_for[value], replace(use, last=node.id in heads))
    return found


def _heads(graph: LayerGraph) -> set[str]:
    """The ids of the nodes with a weight behind which no other weight follows."""
    behind: dict[str, bool] = {}  # value -> whether a weight follows
    heads: set[str] = set()
    for node in reversed(graph.nodes):
        followed = any(behind.get(out, False) for out in node.outputs)
        weighted = node.body is not None or any(
            graph.parameter(node.inputs[i]) is not None
            for i in _WEIGHTS.get(node.op, ()) if i < len(node.inputs)
        )  # fmt: skip
        if weighted and not followed:
            heads.add(node.id)
        for value in node.inputs:
            if value is not None and (weighted or followed):
                behind[value] = True
    return heads


def _use(graph: LayerGraph, node: Node, position: int, shape: tuple[int, ...]) -> _Use:
    op = node.op
    if position in _WEIGHTS.get(op, ()) and len(shape) >= 2:
        if op in ("rnn", "gru", "lstm"):
            hidden = attribute(op, node.attributes, "hidden")
            fans = fans_of(shape, "recurrent", hidden=hidden if isinstance(hidden, int) else None)
            return _Use("weight", fans, leading=2 if len(shape) == 3 else 1)
        if op.startswith("embedding"):
            return _Use("weight", fans_of(shape, "embedding"))
        axis = 0 if op == "matmul" else 1
        if op == "linear":
            axis = 1 if attribute("linear", node.attributes, "input_axis") == 1 else 0
        groups = node.attributes.get("groups", 1)
        role: Role = "conv" if op == "conv" else "conv_transpose" if "transpose" in op else "linear"
        leading = max(len(shape) - 1, 1) if op == "matmul" else 1
        fans = fans_of(shape, role, axis, groups if isinstance(groups, int) else 1)
        return _Use("weight", fans, leading)
    if _BIASES.get(op) == position:
        weight = graph.shape(
            node.inputs[position - 1] if op in ("linear", "conv") else node.inputs[1]
        )
        fan_in: float | None = None
        if op in ("rnn", "gru", "lstm"):
            hidden = attribute(op, node.attributes, "hidden")
            fan_in = float(hidden) if isinstance(hidden, int) else None
        elif weight is not None and all(n is not None for n in weight):
            sizes = tuple(n for n in weight if n is not None)
            axis = 0 if attribute("linear", node.attributes, "input_axis") != 1 else 1
            fans_here = fans_of(sizes, "linear", axis if op == "linear" else 1)
            fan_in = float(fans_here.fan_in) if fans_here is not None else None
        return _Use("bias", fan_in=fan_in)
    if op.endswith("_norm") and op not in ("weight_norm", "spectral_norm"):
        return _Use(_NORM_PARTS.get(position, "other"))
    return _Use("other")


# --------------------------------------------------------------------------- a whole graph


@dataclass(frozen=True, slots=True)
class _Judged:
    """A parameter with its use and what its array looks like."""

    parameter: Parameter
    use: _Use
    fitted: Fitted

    @property
    def known(self) -> tuple[Known, ...]:
        return _known(self.use)


def _known(use: _Use) -> tuple[Known, ...]:
    if use.kind == "weight":
        return known_initializers(use.fans)
    if use.kind == "bias":
        return bias_initializers(use.fan_in)
    return known_initializers(None)


def fit_graph(graph: LayerGraph) -> LayerGraph:
    """The graph with the law of every parameter whose array can be read, and the verdict.

    ``weights`` says whether the weights are as an initializer left them, ``weights_evidence`` why.
    Elements that are NaN or infinite are left out and noted.
    """
    judged: dict[int, dict[str, _Judged]] = {}
    notes: list[str] = []
    for part in _parts(graph):
        judged[id(part)] = {
            name: _judge(part.parameters[name], use, notes)
            for name, use in _all_uses(part).items()
            if _readable(part.parameters[name], use)
        }
    every = [j for found in judged.values() for j in found.values()]
    if not every:
        return graph
    clones = _clones(every)
    state, evidence = _verdict(every)
    laws = _settled([j for j in every if id(j) not in clones], state)
    first = {j.parameter.name: laws[id(j)] for j in every if id(j) in laws}
    for j in every:
        if id(j) in clones:
            laws[id(j)] = first[clones[id(j)]]
    result = _with_laws(graph, judged, laws, clones)
    return replace(result, weights=state, weights_evidence=evidence, notes=(*graph.notes, *notes))


def _parts(graph: LayerGraph) -> Iterator[LayerGraph]:
    """The graph and the bodies of its loops."""
    yield graph
    for node in graph.nodes:
        if node.body is not None:
            yield from _parts(node.body)


def _all_uses(graph: LayerGraph) -> dict[str, _Use]:
    uses = _uses(graph)
    return {name: uses.get(name, _Use("other")) for name in graph.parameters}


def _readable(parameter: Parameter, use: _Use) -> bool:
    """Whether there is an array of real numbers: integers are, as a quantised weight or bias."""
    if parameter.load is None:
        return False
    whole = parameter.dtype.startswith(("int", "uint")) and use.kind in ("weight", "bias")
    return whole or "float" in parameter.dtype or parameter.dtype in ("double", "half")


def _judge(parameter: Parameter, use: _Use, notes: list[str]) -> _Judged:
    assert parameter.load is not None
    try:
        array = np.asarray(parameter.load())
    except (ArithmeticError, LookupError, MemoryError, TypeError, ValueError) as error:
        # A weight that the file computes from others in a way that cannot be followed.
        notes.append(f"parameter {parameter.name} cannot be computed: {error}")
        nothing = Moments(0, 0.0, 0.0, 0.0, math.nan, math.nan)
        unknown = Distribution("unknown", math.nan, math.nan, exact=False)
        return _Judged(parameter, use, Fitted(unknown, nothing))
    fitted = examine(array, _known(use), use.leading if use.leading < max(array.ndim, 1) else 1)
    m = fitted.moments
    if m.bad and not _is_mask(array, use, m):
        what = [f"{n} {name}" for n, name in ((m.nans, "NaN"), (m.positive_infinities, "+Inf"),
                (m.negative_infinities, "-Inf")) if n]  # fmt: skip
        place = list(m.first_bad or ())
        flaw = f"{' and '.join(what)} among {array.size} elements, the first at {place}"
        notes.append(f"parameter {parameter.name} holds {flaw}; they are left out")
        parameter = replace(parameter, flaw=flaw)
    return _Judged(parameter, use, fitted)


def _is_mask(array: Array, use: _Use, m: Moments) -> bool:
    """Whether the infinite elements are a mask: −inf only, and in a table by whole rows."""
    if m.nans or m.positive_infinities:
        return False
    if use.kind == "other":
        return True
    if use.kind != "weight" or use.fans is None or use.fans.role != "embedding":
        return False
    return bool(np.all(np.isneginf(array).sum(axis=1) % array.shape[1] == 0))


def _with_laws(
    graph: LayerGraph,
    judged: Mapping[int, Mapping[str, _Judged]],
    laws: Mapping[int, Distribution],
    clones: Mapping[int, str],
) -> LayerGraph:
    found = judged.get(id(graph), {})
    parameters = {
        name: replace(p, law=laws[id(found[name])], flaw=found[name].parameter.flaw,
                      clone_of=p.clone_of or clones.get(id(found[name])))
        if name in found else p
        for name, p in graph.parameters.items()
    }  # fmt: skip
    nodes = tuple(
        n if n.body is None else replace(n, body=_with_laws(n.body, judged, laws, clones))
        for n in graph.nodes
    )
    return replace(graph, parameters=parameters, nodes=nodes)


# --------------------------------------------------------------------------- the verdict

_WHAT = {
    "row norms": "rows of unequal norm",
    "row means": "rows of unequal mean",
    "row correlations": "rows that resemble each other",
    "column norms": "columns of unequal norm",
    "column means": "columns of unequal mean",
    "column correlations": "columns that resemble each other",
    "kernel taps": "kernel positions of unequal size",
    "shape": "no initializer's distribution",
}
_TOGETHER = 8.0  # z-score of one test over all tensors, none of which fails alone
_FEW = 3  # names in a sentence


def _verdict(every: Sequence[_Judged]) -> tuple[WeightState, str]:
    """Initial, trained or mixed, and the evidence in one sentence.

    A weight counts as trained where it is no independent draw, as fresh where it agrees with a
    known initializer. Trained weights with a fresh head are mixed; a weight inside a trained
    network that no gradient reached (a recurrence over one step) does not make it so.
    """
    weights = [j for j in every if j.use.kind == "weight"]
    trained = [j for j in weights if j.fitted.rejected]
    drawn = [j for j in weights if _is_drawn(j.fitted)]
    fresh = [j for j in drawn if j.fitted.candidates or j.fitted.law.exact]
    total = len(trained) + len(drawn)
    norms = [j for j in every if j.use.kind == "scale"]
    learned = [j for j in norms if _is_learned(j.fitted)]
    if not total:
        return _without_large_weights(every, weights, learned, norms)
    by_norms = len(learned) * 2 >= len(norms) > 0
    together = _stouffer([j for j in weights if not j.fitted.rejected])
    if not trained:
        if by_norms:
            text = f"{len(learned)} of {len(norms)} norm scales differ from channel to channel"
            if len(fresh) * 2 >= len(drawn):
                return "mixed", f"{text}, but the weights look freshly drawn"
            return "trained", text
        if together[1] > _TOGETHER:
            return "trained", f"taken together the weights show {_WHAT[together[0]]}"
        return "initial", _initial_evidence(drawn, len(weights))
    heads = [j for j in weights if j.use.last]
    fresh_heads = [j for j in heads if any(j is f for f in fresh)]
    evidence = _trained_evidence(trained, total, learned, norms)
    most = len(trained) * 2 >= total
    if (most or by_norms or len(fresh) * 2 < len(drawn)) and not (
        heads and len(fresh_heads) == len(heads)
    ):
        return "trained", evidence
    if most or by_norms:
        return "mixed", f"{evidence}; freshly drawn: {_names(fresh)}"
    return "mixed", f"{_initial_evidence(drawn, len(weights))}; trained: {_names(trained)}"


def _is_drawn(fitted: Fitted) -> bool:
    """Whether an array was large enough to be found out as trained and was not."""
    law = fitted.law
    if law.family in ("orthogonal", "mixture", "sparse"):
        return True
    if not fitted.informative or fitted.rejected or not law.random:
        return False
    # Moderately heavy tails are no initializer's, but small tensors may show them by chance.
    return law.family != "laplace" or fitted.moments.count >= 4096


def _is_learned(fitted: Fitted) -> bool:
    """Whether a norm's scale differs from channel to channel as no initializer makes it."""
    if not fitted.law.random or fitted.law.family in ("two_point", "deterministic"):
        return False
    return not any(k.mean == 1.0 for k in fitted.candidates) and fitted.moments.count >= 4


def _without_large_weights(
    every: Sequence[_Judged],
    weights: Sequence[_Judged],
    learned: Sequence[_Judged],
    norms: Sequence[_Judged],
) -> tuple[WeightState, str]:
    """The verdict on a file without a weight that is large enough to be judged alone."""
    random = [j for j in weights if j.fitted.law.random]
    if not random:
        tables = [j for j in weights if j.fitted.law.family == "deterministic"]
        if tables:
            return "initial", f"all {len(weights)} weights are constants or tables of a formula"
        if weights:
            return "initial", (
                f"all {len(weights)} weights are constant: no initializer drew them, and no "
                "training changed them"
            )
        return "initial", "the file holds no weights"
    if len(learned) * 2 >= len(norms) > 0:
        return "trained", f"{len(learned)} of {len(norms)} norm scales differ between channels"
    name, score = _stouffer(random)
    if score > _TOGETHER:
        return "trained", f"taken together the weights show {_WHAT[name]}"
    return "initial", f"all {len(weights)} weights are too small to show any training"


def _stouffer(some: Sequence[_Judged]) -> tuple[str, float]:
    """The test with the largest sum of z-scores over √n, over tensors none of which fails alone."""
    sums: dict[str, list[float]] = defaultdict(list)
    for j in some:
        if j.fitted.law.random and j.fitted.law.family not in ("orthogonal", "two_point"):
            for name, score in j.fitted.scores.items():
                if name != "shape":
                    # One tensor cannot make the sum alone, whatever its score.
                    sums[name].append(max(min(score, 4.0), -4.0))
    found = {name: sum(z) / math.sqrt(len(z)) for name, z in sums.items()}
    return max(found.items(), key=lambda item: item[1]) if found else ("", 0.0)


def _trained_evidence(
    trained: Sequence[_Judged], total: int, learned: Sequence[_Judged], norms: Sequence[_Judged]
) -> str:
    reasons = Counter(j.fitted.worst[0] for j in trained)
    reason = reasons.most_common(1)[0][0]
    text = (
        f"{len(trained)} of {total} weight matrices are no independent draws: mostly "
        f"{_WHAT[reason]}"
    )
    if learned:
        text += f"; {len(learned)} of {len(norms)} norm scales differ from channel to channel"
    return text


def _initial_evidence(drawn: Sequence[_Judged], weights: int) -> str:
    known = Counter(j.fitted.law.initializer for j in drawn if j.fitted.law.initializer)
    text = f"{len(drawn)} of {weights} weight matrices look like independent draws"
    if known:
        text += ", most often " + known.most_common(1)[0][0]
    return text


def _names(some: Sequence[_Judged]) -> str:
    names = [j.parameter.name for j in some]
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more


# --------------------------------------------------------------------------- laws, all together


def _settled(every: Sequence[_Judged], state: WeightState) -> dict[int, Distribution]:
    """The law of every parameter, with what the other tensors tell about it.

    In a trained network what varies and matches no initializer is called trained. Estimates of
    tensors of equal shape and use, and of equal variance within their errors, are pooled.
    """
    weights = _pooled(j for j in every if j.use.kind == "weight")
    biases = _pooled(j for j in every if j.use.kind == "bias")
    laws: dict[int, Distribution] = {}
    alike: dict[tuple[Any, ...], list[_Judged]] = defaultdict(list)
    for j in every:
        law = j.fitted.law
        if law.family in ("normal", "uniform", "truncated_normal") and not j.fitted.rejected:
            measured = replace(law) if not law.exact else _unsnapped(j)
            others = biases if j.use.kind == "bias" else weights
            law = _snapped(measured, j.fitted.candidates, j.fitted.moments, others)
            if state == "trained" and not law.exact and j.use.kind != "other":
                law = replace(
                    law,
                    family="trained",
                    mean=j.fitted.moments.mean,
                    second_moment=j.fitted.moments.second_moment,
                    symmetric=False,
                )
            elif not law.exact:
                alike[(j.use.kind, j.parameter.shape, law.family, j.use.fans)].append(j)
        laws[id(j)] = law
    for group in alike.values():
        for members in _same_variance(group):
            count = sum(j.fitted.moments.count for j in members)
            second = sum(laws[id(j)].second_moment * j.fitted.moments.count for j in members)
            for j in members:
                laws[id(j)] = replace(laws[id(j)], second_moment=second / count, count=count)
    return laws


def _unsnapped(j: _Judged) -> Distribution:
    """The measured law behind one that was snapped on its own."""
    law, m = j.fitted.law, j.fitted.moments
    mean = law.mean if law.mean == 0.0 else m.mean
    return replace(law, mean=mean, second_moment=m.variance + mean * mean, exact=False,
                   initializer="")  # fmt: skip


def _same_variance(group: Sequence[_Judged]) -> Iterator[list[_Judged]]:
    """Runs of tensors, sorted by variance, that agree with the first of the run."""
    run: list[_Judged] = []
    for j in sorted(group, key=lambda j: j.fitted.moments.variance):
        if run:
            a, b = run[0].fitted.moments, j.fitted.moments
            error = math.sqrt(2.0 / a.count + 2.0 / b.count)
            close = math.log(max(b.variance, 1e-300) / max(a.variance, 1e-300)) < 3.0 * error
            same_mean = (run[0].fitted.law.mean == 0.0) == (j.fitted.law.mean == 0.0)
            if not (close and same_mean):
                yield run
                run = []
        run.append(j)
    if run:
        yield run


def _clones(every: Sequence[_Judged]) -> dict[int, str]:
    """Parameters whose elements equal another one's exactly: the name of the first such one. A copy
    that is not trained is a target network's, and meant."""
    alike: dict[tuple[Any, ...], list[_Judged]] = defaultdict(list)
    for j in every:
        m = j.fitted.moments
        if j.fitted.law.random and m.count >= 8:
            key = (j.parameter.shape, j.parameter.dtype, m.squares, m.fourths, m.low, m.high)
            alike[key].append(j)
    found: dict[int, str] = {}
    for group in alike.values():
        first = group[0]
        for j in group[1:]:
            if j.parameter.name == first.parameter.name or j.parameter.frozen:
                continue
            assert first.parameter.load is not None
            assert j.parameter.load is not None
            if np.array_equal(first.parameter.load(), j.parameter.load()):
                found[id(j)] = first.parameter.name
    return found
