"""The law of one element while a constructor works on it, and what arithmetic makes of it.

A *draw* is a set of independent random numbers, one an element of what was filled. A law is a
function of one number of its draw: normal, uniform and truncated normal laws keep their form
under affine maps; whatever else happens to them is replayed on a grid of 6,000 points of the
draw, so that moments and symmetry follow from what was computed and not from a sample. Laws of the
same draw are functions of the same number (x·tanh x, say); laws of different draws are independent,
and sums and products of them keep their four moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from archlint.initialization.distribution import Distribution, Family

Grid = npt.NDArray[np.float64]
Form = Literal["normal", "uniform", "truncated_normal", "other"]
Moments4 = tuple[float, float, float, float]

# Beyond 7.5 standard deviations lies a mass of 6e-14. Two thousand cells of three Gauss-Legendre
# points integrate a kink (clamp, abs) to a few 1e-6 and what is smooth to rounding.
_REACH, _CELLS = 7.5, 2000


@lru_cache(maxsize=1)
def _nodes() -> tuple[Grid, Grid, Grid]:
    """z, Φ(z) and the weights of the integral over a standard normal z."""
    points, weights = np.polynomial.legendre.leggauss(3)
    edges = np.linspace(-_REACH, _REACH, _CELLS + 1)
    half = (edges[1] - edges[0]) / 2
    z = ((edges[:-1] + edges[1:]) / 2)[:, None] + half * points
    mass = half * weights * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    below = np.array([0.5 * math.erfc(-x / math.sqrt(2)) for x in z.ravel().tolist()])
    flat = mass.ravel()
    return z.ravel(), below, flat / flat.sum()


class Draw:
    """Independent random numbers. ``part`` gives the draw behind some of them, the same object for
    the same elements, so that equal copies stay equal. ``roots`` are the draws it was made from."""

    __slots__ = ("_parts", "roots")

    def __init__(self, roots: frozenset[Draw] | None = None) -> None:
        self.roots: frozenset[Draw] = roots if roots is not None else frozenset((self,))
        self._parts: dict[Hashable, Draw] = {}

    def part(self, key: Hashable) -> Draw:
        """The draw of the elements that ``key`` selects."""
        if key not in self._parts:
            self._parts[key] = Draw(self.roots)
        return self._parts[key]


@dataclass(frozen=True, eq=False, slots=True)
class Law:
    """The law of one element.

    ``family`` is what reports call it. A random law has a ``draw``. ``form`` says which closed form
    it has: location + scale·q with q standard normal, uniform on (0, 1), or standard normal cut to
    ``cut``; ``grid`` holds its values on the nodes where it has none but is a function of its draw.
    ``raw`` are E w … E w⁴ where only moments are known. ``why`` says what was not understood.
    """

    family: Family
    form: Form = "other"
    location: float = 0.0
    scale: float = 0.0
    cut: tuple[float, float] = (-math.inf, math.inf)
    draw: Draw | None = None
    grid: Grid | None = field(default=None, repr=False)
    raw: Moments4 | None = None
    symmetric: bool = False
    exact: bool = True
    count: int = 0
    why: str = ""

    @property
    def known(self) -> bool:
        """Whether its moments are known."""
        return self.family not in ("unknown", "uninitialised")

    @property
    def random(self) -> bool:
        """Whether two builds of the model differ in it."""
        return self.draw is not None

    @property
    def is_constant(self) -> bool:
        """Whether it is one known number."""
        return self.family in ("constant", "zeros", "ones")

    @property
    def apart_from_draw(self) -> Hashable:
        """What tells it from other laws, but for the numbers drawn."""
        return (self.family, self.form, self.location, self.scale, self.cut, id(self.grid),
                self.raw, self.symmetric, self.exact, self.count, self.why)  # fmt: skip

    def values(self) -> Grid | None:
        """The values on the nodes of the draw; None where it is no function of one number."""
        if self.grid is not None or self.draw is None or self.form == "other":
            return self.grid
        z, below, _ = _nodes()
        if self.form == "normal":
            return self.location + self.scale * z
        if self.form == "uniform":
            return self.location + self.scale * below
        return self.location + self.scale * _cut_values(*self.cut)

    def moments(self) -> Moments4:
        """E w, E w², E w³, E w⁴; nan where unknown."""
        if self.raw is not None:
            return self.raw
        if self.grid is not None:
            _, _, weights = _nodes()
            powers = [self.grid]
            for _ in range(3):
                powers.append(powers[-1] * self.grid)
            return tuple(float(weights @ p) for p in powers)  # type: ignore[return-value]
        if self.is_constant:
            c = self.location
            return (c, c**2, c**3, c**4)
        if self.form == "normal":
            return _affine((0.0, 1.0, 0.0, 3.0), self.scale, self.location)
        if self.form == "uniform":
            return _affine((1 / 2, 1 / 3, 1 / 4, 1 / 5), self.scale, self.location)
        if self.form == "truncated_normal":
            return _affine(_cut_moments(*self.cut), self.scale, self.location)
        return (math.nan,) * 4

    def same_as(self, other: Law) -> bool:
        """Whether it is the very same random numbers, not only equal in law."""
        if self is other:
            return self.draw is not None
        if self.draw is None or self.draw is not other.draw:
            return False
        mine, its = self.values(), other.values()
        if mine is None or its is None:
            return False
        return bool(np.array_equal(mine, its))

    # ------------------------------------------------------------------ arithmetic

    def part(self, key: Hashable) -> Law:
        """The law of some of the elements: the same law, other numbers."""
        return self if self.draw is None else replace(self, draw=self.draw.part(key))

    def map(self, function: Callable[[Grid], Grid], name: str) -> Law:
        """The law of function(w), elementwise."""
        if self.is_constant:
            value = function(np.array([self.location], np.float64))
            return constant(float(value[0]))
        if not self.known:
            return self
        before = self.values()
        if before is not None:
            if (cut := self._erfinv(name)) is not None:
                return cut
            with np.errstate(all="ignore"):
                after = np.asarray(function(before), np.float64)
            line = _line(before, after) if self.form != "other" else None
            if line is not None:
                return self._scaled(*line)
            return _from_grid(after, self.draw)
        line = _line(_PROBES, function(_PROBES))
        if line is None:
            return unknown(name, self.draw)
        return self._scaled(*line)

    def _erfinv(self, name: str) -> Law | None:
        """The truncated normal law that the inverse error function makes of a uniform one."""
        if (
            name.rstrip("_") not in ("erfinv", "special_erfinv")
            or self.form != "uniform"
            or self.scale <= 0
        ):
            return None
        low, high = self.location, self.location + self.scale
        if low < -1 - 1e-12 or high > 1 + 1e-12:
            return None
        cut = (_quantile_of((low + 1) / 2), _quantile_of((high + 1) / 2))
        return truncated(0.0, math.sqrt(0.5), cut, self.draw)

    def _scaled(self, slope: float, shift: float) -> Law:
        """The law of slope·w + shift."""
        if slope == 0.0:
            return constant(shift)
        if self.form == "other":
            raw = _affine(self.moments(), slope, shift)
            grid = None if self.grid is None else slope * self.grid + shift
            even = self.symmetric and shift == 0.0
            return replace(
                self, family=_after_scaling(self.family, shift), raw=raw, grid=grid, symmetric=even
            )
        # a negative scale is kept: the values must stay the same function of the draw
        location = slope * self.location + shift
        return _named(replace(self, location=location, scale=slope * self.scale))

    def distribution(self, initializer: str = "") -> Distribution:
        """The law as reports and the signal engine know it."""
        return distribution(((1.0, self),), initializer)


_PROBES = np.array([0.0, 1.0, -1.0, 0.5, 2.0, -3.0, 1e3, -1e3, 1e-3])


def _after_scaling(family: Family, shift: float) -> Family:
    if family in ("orthogonal", "sparse", "dirac", "eye") and shift != 0.0:
        return "mixture"
    return "deterministic" if family in ("dirac", "eye") else family


def _named(law: Law) -> Law:
    """The same law under the name of its form, its symmetry found."""
    if law.form == "uniform":
        even = abs(2 * law.location + law.scale) <= 1e-9 * abs(law.scale)
    elif law.form == "normal":
        even = law.location == 0.0
    else:
        even = law.location == 0.0 and abs(sum(law.cut)) < 1e-9
    family: Family = law.form if law.form != "other" else law.family
    return replace(law, family=family, symmetric=even)


def _line(before: Grid, after: Grid) -> tuple[float, float] | None:
    """slope and shift where after = slope·before + shift, else None."""
    if after.shape != before.shape or not np.isfinite(after).all():
        return None
    i, j = int(before.argmin()), int(before.argmax())
    width = float(before[j] - before[i])
    if width <= 0:
        return None
    slope = float(after[j] - after[i]) / width
    shift = float(after[i]) - slope * float(before[i])
    size = float(np.abs(after).max())
    if float(np.abs(after - (slope * before + shift)).max()) > 1e-9 * size:
        return None
    # what is left of a cancelled location is rounding
    if abs(shift) < 1e-13 * size:
        shift = 0.0
    return slope, shift


def _affine(raw: Moments4, slope: float, shift: float) -> Moments4:
    """Raw moments of slope·x + shift."""
    powers = (1.0, *raw)
    found = []
    for n in range(1, 5):
        found.append(
            sum(math.comb(n, k) * slope**k * powers[k] * shift ** (n - k) for k in range(n + 1))
        )
    return tuple(found)  # type: ignore[return-value]


@lru_cache(maxsize=256)
def _cut_values(low: float, high: float) -> Grid:
    """Standard normal numbers cut to (low, high), on the nodes."""
    _, below, _ = _nodes()
    first, last = _cdf(low), _cdf(high)
    return _quantile(first + (last - first) * below)


def _cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _quantile(p: Grid) -> Grid:
    """Φ⁻¹, by Newton's method from interpolation in the nodes."""
    z, below, _ = _nodes()
    p = np.clip(p, 1e-14, 1 - 1e-14)
    x = np.interp(p, below, z)
    for _ in range(3):
        value = np.array([_cdf(v) for v in x.tolist()])
        x = np.clip(x - (value - p) * math.sqrt(2 * math.pi) * np.exp(x * x / 2), -_REACH, _REACH)
    return np.asarray(x, np.float64)


def _quantile_of(p: float) -> float:
    if p <= 0.0:
        return -math.inf
    if p >= 1.0:
        return math.inf
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def _cut_moments(low: float, high: float) -> Moments4:
    """Raw moments of a standard normal number cut to (low, high): E x^k = (k−1)·E x^(k−2) −
    [x^(k−1)·φ(x)]/mass."""

    def edge(x: float, k: int) -> float:
        if not math.isfinite(x):
            return 0.0
        return x ** (k - 1) * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)

    mass = 0.5 * (math.erfc(low / math.sqrt(2)) - math.erfc(high / math.sqrt(2)))
    raw = [1.0]
    for k in range(1, 5):
        before = (k - 1) * raw[k - 2] if k > 1 else 0.0
        raw.append(before - (edge(high, k) - edge(low, k)) / mass)
    if low == -high:
        raw[1] = raw[3] = 0.0
    return raw[1], raw[2], raw[3], raw[4]


# --------------------------------------------------------------------------- making laws


@lru_cache(maxsize=1024)
def constant(value: float) -> Law:
    """One number everywhere."""
    family: Family = "zeros" if value == 0 else "ones" if value == 1 else "constant"
    return Law(family, location=value, symmetric=value == 0)


def normal(mean: float, std: float, draw: Draw | None = None) -> Law:
    """N(mean, std²)."""
    if std == 0.0:
        return constant(mean)
    return Law("normal", "normal", mean, std, draw=draw or Draw(), symmetric=mean == 0.0)


def uniform(low: float, high: float, draw: Draw | None = None) -> Law:
    """U(low, high)."""
    if low == high:
        return constant(low)
    even = abs(low + high) <= 1e-9 * abs(high - low)
    return Law("uniform", "uniform", low, high - low, draw=draw or Draw(), symmetric=even)


def truncated(mean: float, std: float, cut: tuple[float, float], draw: Draw | None = None) -> Law:
    """mean + std·z with z standard normal inside of ``cut``."""
    if cut[0] < -_REACH and cut[1] > _REACH:
        return normal(mean, std, draw)
    law = Law("truncated_normal", "truncated_normal", mean, std, cut, draw or Draw())
    return _named(law)


def of_moments(
    family: Family, raw: Moments4, symmetric: bool, draw: Draw | None, exact: bool = True
) -> Law:
    """A law of which only the moments matter."""
    return Law(family, raw=raw, symmetric=symmetric, draw=draw, exact=exact)


def unknown(why: str, draw: Draw | None = None) -> Law:
    """What was not understood, and why."""
    return Law("unknown", draw=draw, exact=False, why=why)


@lru_cache(maxsize=1)
def uninitialised() -> Law:
    """Memory that nobody filled."""
    return Law("uninitialised", exact=False)


def orthogonal(gain: float, rows: int, columns: int) -> Law:
    """An element of a random orthogonal matrix: a coordinate of a point on a sphere of
    max(rows, columns) dimensions, E w² = g²/n, kurtosis 3n/(n + 2)."""
    n = max(rows, columns)
    second = gain * gain / n
    raw = (0.0, second, 0.0, 3.0 * n / (n + 2.0) * second * second)
    return of_moments("orthogonal", raw, True, Draw())


def sparse(zeros: float, std: float) -> Law:
    """N(0, std²), or zero with probability ``zeros``."""
    left = 1.0 - zeros
    raw = (0.0, left * std**2, 0.0, 3.0 * left * std**4)
    return of_moments("sparse", raw, True, Draw())


def _from_grid(values: Grid, draw: Draw | None) -> Law:
    if not np.isfinite(values).all():
        return unknown("values that are not finite", draw)
    low, high = float(values.min()), float(values.max())
    if low == high:
        return constant(low)
    # Even where the values are an odd function of the draw, the only form that happens.
    even = bool(np.abs(values + values[::-1]).max() <= 1e-9 * max(abs(low), abs(high)))
    return Law("mixture", draw=draw, grid=values, symmetric=even)


def _independent(laws: Sequence[Law]) -> bool:
    seen: set[Draw] = set()
    for law in laws:
        roots = law.draw.roots if law.draw is not None else frozenset()
        if seen & roots:
            return False
        seen |= roots
    return True


def combine(function: Callable[..., Grid], name: str, operands: Sequence[Law]) -> Law:
    """The law of an elementwise function of several tensors' elements."""
    draws = [law.draw for law in operands if law.draw is not None]
    joint = Draw(frozenset(root for draw in draws for root in draw.roots)) if draws else None
    if any(law.family == "uninitialised" for law in operands):
        return uninitialised()
    if any(not law.known for law in operands):
        return unknown(next(law.why for law in operands if not law.known), joint)
    varying = [i for i, law in enumerate(operands) if not law.is_constant]
    numbers = [np.array([law.location], np.float64) for law in operands]

    def placed(values: Sequence[Grid]) -> Grid:
        filled = list(numbers)
        for i, value in zip(varying, values, strict=True):
            filled[i] = value
        return function(*filled)

    if not varying:
        return constant(float(function(*numbers)[0]))
    if len(varying) == 1:
        return operands[varying[0]].map(lambda grid: placed([grid]), name)
    some = [operands[i] for i in varying]
    grids = [law.values() for law in some]
    if all(law.draw is some[0].draw for law in some) and all(g is not None for g in grids):
        with np.errstate(all="ignore"):
            return _from_grid(placed([g for g in grids if g is not None]), some[0].draw)
    if len(some) == 2 and _independent(some):
        return _of_two(placed, name, some[0], some[1], joint)
    return unknown(name, joint)


def _of_two(
    placed: Callable[[Sequence[Grid]], Grid], name: str, one: Law, two: Law, joint: Draw | None
) -> Law:
    """A bilinear function of two independent numbers, by its values at the corners."""
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, -3.0], [-5.0, 0.5]])
    with np.errstate(all="ignore"):
        found = np.asarray(placed([points[:, 0], points[:, 1]]), np.float64)
    if found.shape != (6,) or not np.isfinite(found).all():
        return unknown(name, joint)
    c0 = float(found[0])
    a, b = float(found[1]) - c0, float(found[2]) - c0
    ab = float(found[3]) - a - b - c0
    fitted = c0 + a * points[:, 0] + b * points[:, 1] + ab * points[:, 0] * points[:, 1]
    if not np.allclose(fitted, found, rtol=1e-9):
        return unknown(name, joint)
    x, y = (1.0, *one.moments()), (1.0, *two.moments())
    raw = []
    for n in range(1, 5):  # E (c0 + a·x + b·y + ab·x·y)^n by the multinomial theorem
        total = 0.0
        for i in range(n + 1):
            for j in range(n + 1 - i):
                for k in range(n + 1 - i - j):
                    rest = n - i - j - k
                    ways = math.factorial(n) / (
                        math.factorial(i) * math.factorial(j) * math.factorial(k)
                        * math.factorial(rest)
                    )  # fmt: skip
                    term = a**i * b**j * ab**k * c0**rest
                    if term:
                        total += ways * term * x[i + k] * y[j + k]
        raw.append(total)
    if c0 == 0.0 and a == b == 0.0:
        even = one.symmetric or two.symmetric
    else:
        even = c0 == ab == 0.0 and (one.symmetric or not a) and (two.symmetric or not b)
    exact = one.exact and two.exact
    normal_sum = ab == 0.0 and one.form == two.form == "normal"
    if normal_sum:
        spread = math.hypot(a * one.scale, b * two.scale)
        return normal(c0 + a * one.location + b * two.location, spread, joint)
    return of_moments("mixture", (raw[0], raw[1], raw[2], raw[3]), even, joint, exact)


def distribution(parts: Sequence[tuple[float, Law]], initializer: str = "") -> Distribution:
    """The law of an element taken at random from parts with the given shares of the elements."""
    laws = [law for _, law in parts]
    bad = next((law for law in laws if not law.known), None)
    if bad is not None:
        return Distribution(
            bad.family, math.nan, math.nan, math.nan, False, False, initializer=initializer
        )
    raw = [0.0] * 4
    for share, law in parts:
        for n, value in enumerate(law.moments()):
            raw[n] += share * value
    mean, second = raw[0] or 0.0, raw[1]  # no negative zero
    variance = max(second - mean * mean, 0.0)
    if variance <= 1e-14 * second or (all(law.is_constant for law in laws) and len(laws) == 1):
        family: Family = laws[0].family if len(laws) == 1 else "constant"
        return Distribution(
            family, mean, second, math.nan, mean == 0.0, all(law.exact for law in laws),
            initializer=initializer,
        )  # fmt: skip
    kurtosis = _KURTOSIS.get(laws[0].form) if len(laws) == 1 else None
    fourth = raw[3] - 4 * mean * raw[2] + 6 * mean**2 * second - 3 * mean**4
    return Distribution(
        _family(parts), mean, second, kurtosis or fourth / variance**2,
        all(law.symmetric for law in laws), all(law.exact for law in laws),
        max(law.count for law in laws), initializer,
    )  # fmt: skip


_KURTOSIS: dict[Form, float] = {"normal": 3.0, "uniform": 1.8}

# A padding row or a few zero positions do not make a mixture of a table drawn from one law.
_FEW = 0.05


def _family(parts: Sequence[tuple[float, Law]]) -> Family:
    main = [(share, law) for share, law in parts if law.family != "zeros" or share > _FEW]
    names = {law.family for _, law in main}
    if len(main) == 1 or (len(names) == 1 and _alike([law for _, law in main])):
        return main[0][1].family
    if not any(law.random for _, law in main):
        return "deterministic"
    return "mixture"


def _alike(laws: Sequence[Law]) -> bool:
    first = laws[0].moments()
    return all(np.allclose(law.moments()[:2], first[:2], rtol=1e-9, atol=0) for law in laws)
