"""How far one draw's length lies from the mean length, value by value.

M is the mean square of a value's elements for one sample, its input given. Every op adds to ln M
what its own weights or masks let vary, and carries on what varied before with its elasticity
e = d ln M_out/d ln M_in; the parts are independent (theory.md 5.2):

* an affine map with independent weights: the elements of z are alike and nearly normal given its
  input, so that M_z/E M_z is a χ²_n/n for n features; of an orthogonal one only what a change of
  width leaves out of the length;
* an activation: what it leaves of the length, which is independent of the length itself. By the
  regression of φ² on z², κ_φ = 2e² + κ_⊥: the first part is that of z, the second is new.

A convolution's positions share their weights: they average out what they do not have in common,
so that the new part is the mean over pairs of positions of Cov(φ(u)², φ(v)²)/(E φ²)² over the
number of channels (theory.md 6).

Where paths meet again what they have in common counts once: a value is followed to the last value
that was read more than once (its *root*), and two paths to the root that they share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from archlint.graph.fans import fans
from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import OPS, attribute
from archlint.initialization.distribution import Distribution
from archlint.registering import registering
from archlint.signal.activations import IDENTITY, Activation, activation
from archlint.signal.dominators import carriers
from archlint.signal.gaussian import (
    Floats,
    Function,
    hermite_coefficients,
    nodes_and_weights,
)
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.offsets import Pairs, Window, around, convolved
from archlint.signal.spread import (
    CERTAIN,
    LogLaw,
    binomial,
    norm_law,
    normal_law,
    part_law,
    rectified_law,
    skewed_law,
)

Signals = Mapping[str, Signal]


_UNMASKED = (math.inf, 1.0)


@dataclass(frozen=True, slots=True)
class Fluctuation:
    """ln M = ln E M + e·(that of the root) + ``law`` + the χ² of ``fresh``.

    ``fresh`` is the number of independent elements that the length of the last affine map's output
    is the mean of (0 for none): of a part of the features there are fewer. ``mask`` = (elements,
    chance) of the masks that were laid on it since. ``kurtosis`` = E v⁴/(E v²)² of an element given
    the length; ``peak`` = E Σv⁴/(Σv²)² over the features, which decides how normal a sum of
    weights that are not normal is. ``centred``: the sum of all elements is zero. ``root`` is the
    value that is followed, None where nothing is; ``elasticity`` e.
    """

    root: str | None = None
    elasticity: float = 1.0
    law: LogLaw = CERTAIN
    fresh: float = 0.0
    kurtosis: float = 3.0
    peak: float = 0.0
    mask: tuple[float, float] = _UNMASKED
    centred: bool = False

    @property
    def own(self) -> LogLaw:
        """All that is new since the root."""
        law = self.law
        if self.fresh:
            law += normal_law(self.fresh, self.kurtosis * self.mask[1] - 3)
        if self.mask[1] < 1:
            width, chance = self.mask
            law += rectified_law(width, 0.0, self.kurtosis * chance - 3, chance)
        return law

    def masked(self, width: float, chance: float) -> Fluctuation:
        """Behind a mask that keeps each of ``width`` elements with a chance: one mask with those
        that went before."""
        kurtosis = self.kurtosis / chance
        width = min(width, self.mask[0])
        chance *= self.mask[1]
        return replace(self, kurtosis=kurtosis, peak=peak_of_masked(width, kurtosis, chance),
                       mask=(width, chance))  # fmt: skip

    def settled(self) -> Fluctuation:
        """With all that is new written into the law."""
        if not self.fresh and self.mask is _UNMASKED:
            return self
        return Fluctuation(self.root, self.elasticity, self.own, 0.0, self.kurtosis, self.peak,
                           centred=self.centred)  # fmt: skip


Known = Fluctuation | None


@dataclass(frozen=True, slots=True)
class Coherence:
    """Of ln c, with c the mean correlation of a map's positions in one draw: its ``variance`` and
    its ``covariance`` with ln M.

    What is propagated as a mean is E Σ v v′ over E Σ v², in which draws of great length count
    more: a draw's own c has the mean logarithm ln c − Cov(ln M, ln c) − Var ln c/2.
    """

    variance: float = 0.0
    covariance: float = 0.0

    @property
    def typical(self) -> float:
        """A draw's own c over that of the means."""
        return math.exp(-max(self.covariance + self.variance / 2, 0.0))


@dataclass(frozen=True, slots=True)
class Chain:
    """The values that are roots, each with what it follows in turn."""

    above: dict[str, Fluctuation]
    level: dict[str, int]
    total: dict[str, LogLaw]

    def add(self, value: str, f: Fluctuation) -> None:
        """Make a value a root."""
        self.above[value] = f.settled()
        self.level[value] = 1 + (self.level[f.root] if f.root is not None else 0)
        self.total[value] = self.whole(f)

    def whole(self, f: Fluctuation) -> LogLaw:
        """All that varies, back to the inputs or a reset."""
        if f.root is None:
            return f.own
        return f.own + self.total[f.root].raised(f.elasticity)

    def up(self, f: Fluctuation) -> Fluctuation:
        """The same, told from the root's root."""
        assert f.root is not None
        above = self.above[f.root]
        return replace(
            f.settled(), root=above.root, elasticity=f.elasticity * above.elasticity,
            law=f.own + above.law.raised(f.elasticity),
        )  # fmt: skip

    def since(self, f: Fluctuation, root: str) -> LogLaw | None:
        """What is new since a root; None where it does not lie on the way."""
        while f.root != root:
            if f.root is None or root not in self.level or self.level[f.root] <= self.level[root]:
                return None
            f = self.up(f)
        return f.own

    def meet(self, a: Fluctuation, b: Fluctuation) -> tuple[Fluctuation, Fluctuation]:
        """The two told from the last root that both follow, or from none."""
        while a.root != b.root:
            height = [self.level[f.root] if f.root is not None else 0 for f in (a, b)]
            if height[0] >= height[1]:
                a = self.up(a)
            else:
                b = self.up(b)
        return a, b


@dataclass(slots=True)
class Lengths:
    """The fluctuation of the length of every value of which it is known.

    ``state`` as told from the root, ``total`` the law of ln M − ln E M. One pass; cost linear in
    the nodes, but for what lies between a value and the root that it shares with another.
    """

    graph: LayerGraph
    signals: Signals
    chain: Chain = field(default_factory=lambda: Chain({}, {}, {}))
    state: dict[str, Fluctuation] = field(default_factory=dict)
    total: dict[str, LogLaw] = field(default_factory=dict)
    pairs: dict[str, Pairs] = field(default_factory=dict)
    coherence: dict[str, Coherence] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for value in self.graph.inputs:
            if self.signal(value).known:
                size = self.features(value) or 1
                self._settle(value, Fluctuation(peak=3 / (size + 2)))
        for node in self.graph.nodes:
            rule = _RULES.get(node.op) or (activated if activation(node.op, node.attributes)
                                           is not None else None)  # fmt: skip
            if rule is None:
                continue
            inputs = [self.state.get(v) if v is not None else None for v in node.inputs]
            for i, out in enumerate(node.outputs):
                if (pairs := self._pairs_of(node, out)) is not None:
                    self.pairs[out] = pairs
                    self.coherence[out] = self._coherence_of(node, pairs)
                if self.signal(out).known and (i == 0 or node.op == "split"):
                    self._settle(out, rule(self, node, inputs, out))

    def since(self, value: str, root: str) -> LogLaw | None:
        """The law of ln M of a value over that of an earlier one that is read more than once."""
        f = self.chain.above.get(value) or self.state.get(value)
        return None if f is None else self.chain.since(f, root)

    def _settle(self, value: str, f: Known) -> None:
        if f is None:
            return
        self.total[value] = self.chain.whole(f)
        readers = [n for n in self.graph.consumers.get(value, ()) if n.op != "shape"]
        several = len(readers) > 1 or any(n.inputs.count(value) > 1 for n in readers)
        if several and f.fresh and self._divided(value):
            several = False
        elif len(readers) == 1 and readers[0].op in ("linear", "conv"):
            several = self._divided(readers[0].output)
        if several:
            self.chain.add(value, f)
            f = Fluctuation(value, 1.0, CERTAIN, 0.0, f.kurtosis, f.peak, centred=f.centred)
        self.state[value] = f

    def _divided(self, value: str) -> bool:
        """Whether the features of an affine map's output are divided among several values, such as
        queries and keys: each has its own weights, and what they share is what the map reads."""
        readers = [n for n in self.graph.consumers.get(value, ()) if n.op != "shape"]
        while len(readers) == 1 and readers[0].op in _KEEP:
            value = readers[0].output
            readers = [n for n in self.graph.consumers.get(value, ()) if n.op != "shape"]
        outputs = sum(len(n.outputs) for n in readers)
        return outputs > 1 and all(n.op in ("split", "slice", "select_index") for n in readers)

    def signal(self, value: str | None) -> Signal:
        """What is known of a value."""
        return self.signals.get(value or "", UNKNOWN_SIGNAL)

    def size(self, value: str | None, role: str) -> int | None:
        """The number of features or positions of a value; None where its roles are not known."""
        shape, roles = self.graph.shape(value), self.signal(value).roles
        if shape is None or len(shape) != len(roles) or None in shape:
            return None
        return math.prod(n or 1 for n, r in zip(shape, roles, strict=True) if r == role)

    def features(self, value: str | None) -> int | None:
        """The number of features of a value."""
        return self.size(value, "feature")

    def spots(self, value: str | None) -> tuple[int, ...] | None:
        """The sizes of the axes of positions."""
        shape, roles = self.graph.shape(value), self.signal(value).roles
        if shape is None or len(shape) != len(roles) or None in shape:
            return None
        return tuple(n or 1 for n, r in zip(shape, roles, strict=True) if r == "position")

    def axes(self, value: str | None, profile: Mapping[int, Floats]) -> list[Floats | None]:
        """Of a profile by axis, those of the axes of positions in order."""
        roles = self.signal(value).roles
        return [profile.get(a) for a, role in enumerate(roles) if role == "position"]

    def alike(self, value: str | None) -> Pairs | None:
        """How alike a value's positions are; None where that is not known."""
        found = self.pairs.get(value or "")
        if found is not None:
            return found
        sizes = self.spots(value)
        if sizes is None or math.prod(sizes) <= 1:
            return None if sizes is None else Pairs(sizes)
        c = self.signal(value).position_correlation
        return None if c is None else Pairs(sizes, None, c)

    def typical(self, value: str | None) -> Pairs | None:
        """How alike a value's positions are in one draw."""
        found = self.alike(value)
        if found is not None and found.places > 1:
            found = found.profiled(self.axes(value, self.signal(value).profile))
        coherence = self.coherence.get(value or "")
        if found is None or coherence is None or coherence == Coherence():
            return found
        deviation = min(math.sqrt(coherence.variance), 1.0)
        return replace(found.lowered(coherence.typical), deviation=deviation)

    def _coherence_of(self, node: Node, out: Pairs) -> Coherence:
        """With z = √c·u + √(1 − c)·e and u what all positions share: of the means A of φ(z)² and Y
        of φ(z)φ(z′), one feature has E_e φ² and (E_e φ)², functions of u. That of z itself is
        A = cu² + 1 − c, Y = cu²; an activation adds what is independent of u² − 1, and multiplies
        what was by d ln f/d ln c, f the correlation that it makes of c."""
        value = node.inputs[0]
        before, x = self.coherence.get(value or "", Coherence()), self.alike(value)
        width, signal = self.features(value), self.signal(value)
        phi = activation(node.op, node.attributes)
        if x is None:
            return Coherence()
        c, after = x.different, out.different
        if min(c, after) < _FAINT:
            return Coherence()
        if node.op in ("conv", "linear") and (n := self.features(node.output)) and after > 0:
            bias = bias_share(self.graph, self.signals, node) or 0.0
            e = max((after - bias) / after, 0.0)
            own = 2 * (1 - bias) ** 2 / n
            return Coherence(
                e * e * before.variance + own * (1 - after) ** 2,
                e * (1 - bias) * before.covariance + own * after * (1 - after),
            )
        if phi is None or width is None or signal.mean is None or not signal.variance:
            norm = OPS[node.op].kind == "normalisation"
            return Coherence(before.variance, 0.0 if norm else before.covariance)
        slope, new, both = _coherence(phi, signal.mean, signal.variance, round(c, 4))
        e = length_elasticity(phi, signal.mean, signal.variance)
        return Coherence(slope**2 * before.variance + new / width,
                         slope * e * before.covariance + both / width)  # fmt: skip

    def _pairs_of(self, node: Node, out: str) -> Pairs | None:
        """How alike the positions of an output are: a convolution and an activation by offset; what
        else keeps the positions keeps the order among the offsets."""
        x, sizes = self.alike(node.inputs[0] if node.inputs else None), self.spots(out)
        if x is None or sizes is None or math.prod(sizes) <= 1:
            return None
        signal = self.signal(node.inputs[0])
        if is_wrapped(node) and len(x.sizes) == len(sizes):
            return Pairs(sizes, around(x.full(), x.sizes, sizes))
        if node.op == "conv" and (windows := windows_of(self.graph, node)) is not None:
            bias = bias_share(self.graph, self.signals, node)
            if bias is None or abs(self.signal(node.inputs[1]).mean or 0.0) > 1e-12:
                return None
            return convolved(x, windows).map(lambda c: (1 - bias) * c + bias)
        phi = activation(node.op, node.attributes)
        if phi is not None and signal.mean is not None and signal.variance:
            return x.map(pair_function(phi, signal.mean, signal.variance))
        c = self.signal(out).position_correlation
        if c is None or x.sizes != sizes:
            return None
        return x.towards(c)


_FAINT = 0.02  # a mean correlation below has no logarithm worth following

Rule = Callable[[Lengths, Node, list[Known], str], Known]
_RULES: dict[str, Rule] = {}
_rule = registering(_RULES)


def is_wrapped(node: Node) -> bool:
    """Whether a node pads a map with its other side."""
    return node.op == "pad" and node.attributes.get("mode") == "circular"


def windows_of(graph: LayerGraph, node: Node) -> tuple[Window, ...] | None:
    """The windows of a convolution, axis by axis; None where a size is unknown."""
    before, kernel = graph.shape(node.inputs[0]), graph.shape(node.inputs[1])
    after = graph.shape(node.output)
    if before is None or kernel is None or after is None:
        return None
    sizes = (*before[2:], *kernel[2:], *after[2:])
    dims = len(before) - 2
    if None in sizes or len(sizes) != 3 * dims:
        return None
    known = [n or 0 for n in sizes]
    ints = {name: tuple(int(str(n)) for n in values) for name in ("stride", "dilation", "padding")
            if isinstance(values := node.attributes[name], tuple)}  # fmt: skip
    return tuple(
        Window(known[a], known[2 * dims + a], known[dims + a], ints["stride"][a],
               ints["dilation"][a], ints["padding"][a])
        for a in range(dims)
    )  # fmt: skip


def chance(c: Floats, terms: float) -> Floats:
    """E of the square of the correlation of two vectors of that many elements whose mean is c:
    that of independent ones is not zero but one over the number of elements."""
    return np.asarray(c * c + (1 - c * c) ** 2 / max(terms, 1.0), np.float64)


def pair_function(phi: Activation, mean: float, variance: float) -> Callable[[Floats], Floats]:
    """c ↦ E φ(u)φ(v)/E φ² for two pre-activations with E[u v]/E u² = c (Mehler's formula)."""
    second = phi.moments(mean, variance).second_moment
    deviation = math.sqrt(variance)
    series = hermite_coefficients(
        lambda z: phi.function(mean + deviation * z), phi.standard_kinks(mean, deviation)
    )
    coefficients = completed(series * series, second) / second if second > 0 else np.ones(1)
    return lambda c: polyval(normal_correlations(c, mean, variance), coefficients)


def completed(coefficients: Floats, total: float) -> Floats:
    """With what a truncated series lacks of its value at one put at the first order left out."""
    return np.append(coefficients, max(total - float(coefficients.sum()), 0.0))


def polyval(c: Floats, coefficients: Floats) -> Floats:
    """Σ a_k c^k."""
    return np.asarray(np.polynomial.polynomial.polyval(c, coefficients), np.float64)


def normal_correlations(c: Floats, mean: float, variance: float) -> Floats:
    """The correlation coefficients from E[x x′]/E x²."""
    q = variance + mean * mean
    return np.clip((c * q - mean * mean) / variance, -1.0, 1.0)


# --------------------------------------------------------------------------- affine maps


@_rule("linear", "conv", "conv_transpose")
def affine(at: Lengths, node: Node, inputs: list[Known], out: str) -> Known:
    """χ²_n of the outputs given the input; the part of the biases does not follow the input."""
    f, z = inputs[0], at.signal(out)
    count = fans(node, at.graph)
    alike = at.typical(out)
    if f is None or count is None or alike is None or not z.second_moment:
        return None
    bias = bias_share(at.graph, at.signals, node)
    weight = at.graph.parameter(node.inputs[1])
    law = weight.law if weight is not None else None
    if bias is None or (law is None and node.inputs[1] not in at.graph.static):
        return None
    taps = count.fan_in / max(at.features(node.inputs[0]) or count.fan_in, 1)
    shift = at.graph.parameter(node.inputs[2]) if len(node.inputs) > 2 else None
    kurtosis = 3 + (1 - bias) ** 2 * excess_of(law) * f.peak / max(taps, 1.0)
    kurtosis += bias**2 * excess_of(shift.law if shift is not None else None)
    same = 1.0 if alike.places <= 1 else alike.over(lambda c: chance(c, count.fan_in))
    fresh, more = count.width / same, CERTAIN
    if law is not None and law.family == "orthogonal":
        whole = max(count.width, count.fan_in)
        fresh = 0.0
        more = part_law(count.width, whole) if alike.places <= 1 else norm_law(
            2 * same * (1 / count.width - 1 / whole))  # fmt: skip
        more = more.mixed(1 - bias)
    elif law is not None and not law.random:
        fresh = 0.0
    return Fluctuation(
        f.root, f.elasticity * (1 - bias), f.own.mixed(1 - bias) + more, fresh, kurtosis,
        kurtosis / (count.width + kurtosis - 1),
    )  # fmt: skip


def excess_of(law: Distribution | None) -> float:
    """Kurtosis less that of a normal law; 0 where none is known, and of orthogonal weights, whose
    elements are those of a normal law given their length."""
    if law is None or law.family == "orthogonal" or not math.isfinite(law.kurtosis):
        return 0.0
    return law.kurtosis - 3


def bias_share(graph: LayerGraph, signals: Signals, node: Node) -> float | None:
    """The share of a layer's squared length that its bias makes; None where unknown."""
    position = 3 if node.op == "bilinear" else 2
    q = signals.get(node.output, UNKNOWN_SIGNAL).second_moment
    if len(node.inputs) <= position or (value := node.inputs[position]) is None:
        return 0.0
    bias = signals.get(value, UNKNOWN_SIGNAL).second_moment
    return None if bias is None or not q else min(bias / q, 1.0)


# --------------------------------------------------------------------------- activations


def activated(at: Lengths, node: Node, inputs: list[Known], out: str) -> Known:
    """What is left of the length, beyond what follows the length that comes in."""
    f, x = inputs[0], at.signal(node.inputs[0])
    phi = activation(node.op, node.attributes)
    alike, width = at.typical(node.inputs[0]), at.features(node.inputs[0])
    if f is None or phi is None or alike is None or width is None or x.mean is None:
        return None
    variance = x.variance or 0.0
    if variance <= 0:
        return None
    e = length_elasticity(phi, x.mean, variance)
    m = phi.moments(x.mean, variance)
    if not m.second_moment > _LEAST:
        return None
    kurtosis = m.fourth_moment / m.second_moment / m.second_moment * f.kurtosis / 3
    if not math.isfinite(kurtosis):  # lengths beyond what numbers hold
        return None
    if negative_slope(phi) == 0.0 and x.mean == 0.0 and not f.centred:
        width_left = effective_width(phi, x.mean, variance, width, alike)
        return None if width_left is None else f.masked(width_left, 0.5)
    law = kept(phi, x.mean, variance, width, alike, f.kurtosis, f.centred)
    if law is None:
        return None
    before = f.own
    if phi.homogeneous or before.variance < CURVED:
        passed = before.raised(e)
    else:  # by the curve itself: far from the mean the length grows otherwise
        passed, e = before.through(length_curve(phi, x.mean, variance))
        law = _over_draws(phi, x.mean, variance, width, alike, before) or law
    return Fluctuation(f.root, f.elasticity * e, passed + law, 0.0, kurtosis,
                       kurtosis / (width + kurtosis - 1))  # fmt: skip


_LEAST = 1e-140  # a second moment below has no square
CURVED = 0.02  # Var ln M from which on the curvature of ln E φ² in ln M matters


def length_curve(phi: Activation, mean: float, variance: float) -> Callable[[Floats], Floats]:
    """x ↦ ln E φ(z)²/E φ(z₀)² for z = z₀·e^(x/2)."""
    return lambda x: _curve(phi.function, phi, mean, variance, x)


def slope_curve(phi: Activation, mean: float, variance: float) -> Callable[[Floats], Floats]:
    """x ↦ ln E φ′(z)²/E φ′(z₀)² for z = z₀·e^(x/2)."""
    return lambda x: _curve(phi.derivative, phi, mean, variance, x)


def _curve(f: Function, phi: Activation, mean: float, variance: float, x: Floats) -> Floats:
    deviation = math.sqrt(variance)
    z, w = nodes_and_weights(phi.standard_kinks(mean, deviation))
    scale = np.exp(np.minimum(np.append(x, 0.0), 60.0) / 2)
    values = np.square(f(scale[:, None] * (mean + deviation * z))) @ w
    return np.asarray(np.log(np.maximum(values[:-1] / values[-1], 1e-300)), np.float64)


def _over_draws(
    phi: Activation, mean: float, variance: float, width: int, alike: Pairs, law: LogLaw
) -> LogLaw | None:
    """The mean law of what φ leaves, over lengths a standard deviation off either way."""
    parts = []
    for x in (-1.0, 1.0):
        r = math.exp(x * math.sqrt(law.variance) - law.deficit)
        part = kept(phi, mean * math.sqrt(r), variance * r, width, alike)
        if part is None:
            return None
        parts.append(part)
    one, two = parts
    return LogLaw((one.variance + two.variance) / 2, (one.deficit + two.deficit) / 2,
                  (one.third + two.third) / 2)  # fmt: skip


@lru_cache(maxsize=1)
def _normal_nodes() -> tuple[Floats, Floats]:
    """Points and weights of E f(e), e ~ N(0, 1), for f that need not be known to the last digit."""
    e, v = np.polynomial.hermite_e.hermegauss(48)
    return e, v / v.sum()


@lru_cache(maxsize=4096)
def _coherence(
    phi: Activation, mean: float, variance: float, c: float
) -> tuple[float, float, float]:
    """(d ln f/d ln c, Var r, Cov(r, a)) of one feature's relative deviations a of A and r + a of Y
    that are independent of u² − 1."""
    q = variance + mean * mean
    rho = min(max((c * q - mean * mean) / variance, 0.0), 1.0)
    z, w = nodes_and_weights(())
    e, v = _normal_nodes()
    x = math.sqrt(rho) * z[:, None] + math.sqrt(1 - rho) * e
    x = phi.function(mean + math.sqrt(variance) * x)
    value, square = x @ v, (x * x) @ v
    one, two = float(w @ square), float(w @ value**2)
    if one <= 0 or two <= 0:
        return 0.0, 0.0, 0.0
    length = square / one - 1
    ratio = value**2 / two - 1 - length
    even = (z * z - 1) / math.sqrt(2)
    length, ratio = (v - (w @ (v * even)) * even for v in (length, ratio))
    f, h = pair_function(phi, mean, variance), 1e-3
    near = f(np.array([c * (1 - h), c * (1 + h)])) if c > 0 else np.array([1.0, 1.0])
    slope = math.log(near[1] / near[0]) / (2 * h) if near.min() > 0 else 0.0
    return slope, float(w @ ratio**2), float(w @ (ratio * length))


def length_elasticity(phi: Activation, mean: float, variance: float) -> float:
    """d ln E φ(z)²/d ln E z² for z ~ N(mean, variance) that is scaled as a whole."""
    if phi.homogeneous:
        return 1.0
    h = 1e-3
    up = phi.moments(mean * math.exp(h / 2), variance * math.exp(h)).second_moment
    down = phi.moments(mean * math.exp(-h / 2), variance * math.exp(-h)).second_moment
    return math.log(up / down) / (2 * h) if up > 0 and down > 0 else 0.0


def kept(
    phi: Activation, mean: float, variance: float, width: int, alike: Pairs, kurtosis: float = 3.0,
    centred: bool = False,
) -> LogLaw | None:  # fmt: skip
    """The law of what φ leaves of the squared length of ``width`` features at positions that are
    ``alike``, given that length and, of what is ``centred``, their sum."""
    left = effective_width(phi, mean, variance, width, alike, centred)
    series = _squares(phi, mean, variance, centred)
    if left is None or series is None:
        return None
    if math.isinf(left):
        return CERTAIN
    slope = negative_slope(phi)
    if slope is not None and mean == 0.0 and not centred:
        return rectified_law(left, slope, kurtosis - 3)
    return norm_law(float(series.sum()) / left)


def effective_width(
    phi: Activation, mean: float, variance: float, width: int, alike: Pairs, centred: bool = False
) -> float | None:
    """How many independent features average as well as ``width`` at positions that are ``alike``:
    width·V(1)/mean V(c), V(c) the part of Cov(φ(u)², φ(v)²) that the length does not explain."""
    series = _squares(phi, mean, variance, centred)
    if series is None:
        return None
    one = float(series.sum())
    if alike.places <= 1:
        return float(width) if one > 0 else math.inf
    pair = alike.over(lambda c: polyval(normal_correlations(c, mean, variance), series))
    return width * one / pair if one > 0 and pair > 1e-12 * one else math.inf


@lru_cache(maxsize=4096)
def _squares(phi: Activation, mean: float, variance: float, centred: bool = False) -> Floats | None:
    """Coefficients of c ↦ Cov(φ(u)², φ(v)²)/(E φ²)² of two pre-activations with the correlation c,
    less the part that the length itself explains (2e²c² for a mean of zero): the squares of the
    Hermite coefficients of φ² but for what lies along those of z², and along z where the sum over
    all elements is given."""
    deviation = math.sqrt(variance)
    m = phi.moments(mean, variance)
    if not (m.second_moment > _LEAST and math.isfinite(m.fourth_moment)):
        return None
    series = hermite_coefficients(
        lambda z: phi.function(mean + deviation * z) ** 2, phi.standard_kinks(mean, deviation)
    ) / m.second_moment  # fmt: skip
    total = m.fourth_moment / m.second_moment**2 - float(series[1:3] @ series[1:3])
    q = variance + mean * mean
    square = np.array([2 * mean * deviation, math.sqrt(2) * variance]) / q  # of z², likewise
    series[1:3] -= square * float(series[1:3] @ square) / float(square @ square)
    if centred:
        series[1] = 0.0
    squares = completed(series * series, total + float(series[1:3] @ series[1:3]))
    squares[0] = 0.0
    return squares


def negative_slope(phi: Activation) -> float | None:
    """The slope below zero of a piecewise linear φ with slope 1 above; None for another φ."""
    if not phi.homogeneous or phi is IDENTITY:
        return None
    above, below = phi.function(np.array([1.0, -1.0]))
    return -float(below) if above == 1.0 and abs(below) <= 1.0 else None


@lru_cache(maxsize=4096)
def peak_of_masked(width: float, kurtosis: float, chance: float) -> float:
    """E Σv⁴/(Σv²)² of B ~ Bin(n, p) elements, not zero, of the kurtosis k·p: E[kp/(B + kp − 1)],
    with squares that are gamma variables."""
    k = kurtosis * chance
    n = max(round(min(width, 1e6)), 1)
    if n > 2000:
        return k / max(n * chance, 1.0)
    b = np.arange(1, n + 1, dtype=np.float64)
    return float(binomial(n, 1, n, chance) @ (k / (b + k - 1)))


@_rule("glu")
def _glu(at: Lengths, node: Node, inputs: list[Known], out: str) -> Known:
    """a·σ(b) of the two halves of one affine map's features."""
    f = inputs[0]
    width = at.features(out)
    x = at.signal(node.inputs[0])
    sigmoid = activation("sigmoid", {})
    alike = at.alike(node.inputs[0])
    if f is None or width is None or not x.second_moment or sigmoid is None or alike is None:
        return None
    m = sigmoid.moments(0.0, x.second_moment)
    e = length_elasticity(sigmoid, 0.0, x.second_moment)
    kurtosis = m.fourth_moment / m.second_moment**2
    half = normal_law(f.fresh / 2) if f.fresh else part_law(width, 2 * width)
    own = kept(sigmoid, 0.0, x.second_moment, width, alike)
    if own is None:
        return None
    law = f.law.raised(1 + e) + half + half.raised(e) + own
    law += norm_law((f.kurtosis - 1) * (kurtosis - 1) / width)
    return Fluctuation(f.root, f.elasticity * (1 + e), law, 0.0, f.kurtosis * kurtosis,
                       f.kurtosis * kurtosis / width)  # fmt: skip


# --------------------------------------------------------------------------- resets


@_rule("layer_norm", "rms_norm", "group_norm", "instance_norm", "lp_normalize", "standardise",
       "batch_norm")  # fmt: skip
def _norm(at: Lengths, node: Node, inputs: list[Known], out: str) -> Known:
    """The length is set anew: nothing of what varied before is left."""
    if node.op == "batch_norm" and not attribute("batch_norm", node.attributes, "training"):
        return inputs[0]
    width = at.features(out)
    centred = node.op in ("layer_norm", "group_norm", "instance_norm", "standardise")
    return Fluctuation(None, 1.0, CERTAIN, 0.0, 3.0, 3 / ((width or 1) + 2), centred=centred)


@_rule("embedding")
def _embedding(at: Lengths, node: Node, inputs: list[Known], out: str) -> Known:
    """Rows of a table: n elements of its law, one row a token."""
    width, alike = at.features(out), at.alike(out)
    table = at.graph.parameter(node.inputs[1])
    if width is None or alike is None or table is None or table.law is None:
        return None
    kurtosis = 3 + excess_of(table.law)
    fresh = width / alike.over(lambda c: c * c) if table.law.random else 0.0
    return Fluctuation(None, 1.0, CERTAIN, fresh, kurtosis, kurtosis / width)


# --------------------------------------------------------------------------- what passes it on

_KEEP = ("identity", "cast", "reshape", "transpose", "flip", "roll", "expand", "neg", "tile",
         "channel_shuffle", "depth_to_space", "space_to_depth", "pad", "resize", "quantize",
         "dequantize", "contiguous")  # fmt: skip


@_rule(*_KEEP)
def _passed(at: Lengths, node: Node, inputs: list[Known], out: str) -> Known:
    """The same elements."""
    return inputs[0]


@_rule("split", "slice", "select_index")
def _part(at: Lengths, node: Node, inputs: list[Known], out: str) -> Known:
    """Of fewer features the length varies more: by that of the affine map that made them, or
    where that is no longer known by how an isotropic direction divides."""
    f = inputs[0]
    before, after = at.features(node.inputs[0]), at.features(out)
    if f is None or before is None or after is None:
        return None
    if after >= before:
        return f
    peak = f.peak * before / after
    if f.fresh > 0 and f.mask == _UNMASKED:
        return replace(f, fresh=f.fresh * after / before, peak=peak)
    return replace(f.settled(), law=f.own + part_law(after, before), peak=peak)


@_rule("attention")
def _attention(at: Lengths, node: Node, inputs: list[Known], out: str) -> Known:
    """Means of tokens' values: given the shares, features as independent as those of a token, at
    positions that are more alike."""
    f, alike = inputs[2], at.alike(out)
    width, before = at.features(out), at.features(node.inputs[2])
    if f is None or alike is None or width is None or before is None:
        return None
    if not f.fresh or f.mask != _UNMASKED:
        return replace(f.settled(), centred=False)
    same = 1.0 if alike.places <= 1 else alike.over(lambda c: c * c)
    return replace(f, fresh=before / same, kurtosis=3.0, peak=3 / (width + 2))


@_rule("dropout")
def _dropout(at: Lengths, node: Node, inputs: list[Known], out: str) -> Known:
    """A mask of each element, compensated: (k/p − k)/n, with p kept and k the kurtosis."""
    f, width = inputs[0], at.features(out)
    places = at.size(out, "position")
    p = attribute("dropout", node.attributes, "p")
    if f is None or width is None or places is None or not isinstance(p, float | int):
        return None
    keep = 1 - float(p)
    if not attribute("dropout", node.attributes, "training") or not 0 < keep < 1:
        return f
    if places <= 1:
        return f.masked(width, keep)
    r = f.kurtosis * (1 / keep - 1) / (width * places)
    return replace(f.settled(), law=f.own + norm_law(r), kurtosis=f.kurtosis / keep,
                   peak=f.peak / keep)  # fmt: skip


@_rule("avg_pool", "adaptive_avg_pool", "max_pool", "adaptive_max_pool", "reduce_mean",
       "reduce_sum", "reduce_max")  # fmt: skip
def _pool(at: Lengths, node: Node, inputs: list[Known], out: str) -> Known:
    """A mean over m positions has M·(1 + (m − 1)c)/m, and so varies with c too; a maximum is taken
    to follow the length of the map."""
    f, x = inputs[0], at.alike(node.inputs[0])
    before, after = at.features(node.inputs[0]), at.features(out)
    if f is None or x is None or before is None or before != after:
        return None
    coherence = at.coherence.get(node.inputs[0] or "")
    if coherence is None or "max" in node.op or x.places <= 1:
        return f
    left = math.prod(at.spots(out) or ())
    m = x.places / max(left, 1)
    w = (m - 1) * x.different / (1 + (m - 1) * x.different)
    more = 2 * w * coherence.covariance + w * w * coherence.variance
    return replace(f.settled(), law=f.own + norm_law(max(more, 0.0)))


# --------------------------------------------------------------------------- sums and products


@_rule("add", "sub")
def _add(at: Lengths, node: Node, inputs: list[Known], out: str) -> Known:
    """ln M of a + b: each part by its share s of E(a + b)² (half of the cross term each); the
    scalar product of two independent tensors adds 4(E a² E b² − (E a E b)²)/(n (E(a + b)²)²)."""
    a, b = (at.signal(v) for v in node.inputs[:2])
    second = at.signal(out).second_moment
    live = carriers(at.graph, node)
    if node.inputs[0] == node.inputs[1]:
        return inputs[0]
    if not second or a.second_moment is None or b.second_moment is None:
        return None
    cross = (second - a.second_moment - b.second_moment) / 2
    weights = [(s.second_moment + cross) / second for s in (a, b) if s.second_moment is not None]
    parts = [f if v in live else CONSTANT for f, v in zip(inputs, node.inputs, strict=False)]
    if len(live) == 1:
        f = parts[0 if node.inputs[0] in live else 1]
        e = weights[0 if node.inputs[0] in live else 1]
        if f is None:
            return None
        return replace(f.settled(), elasticity=f.elasticity * e, law=f.own.mixed(e))
    width = at.features(out)
    if parts[0] is None or parts[1] is None or width is None:
        return None
    one, two = at.chain.meet(parts[0], parts[1])
    same = _together(at, node)
    if same is None or a.mean is None or b.mean is None:
        return None
    r = 4 * max(a.second_moment * b.second_moment - (a.mean * b.mean) ** 2, 0.0) * same
    law = one.own.mixed(weights[0]) + two.own.mixed(weights[1])
    law += norm_law(r / (width * second**2))
    e = weights[0] * one.elasticity + weights[1] * two.elasticity
    return Fluctuation(one.root, e, law, 0.0, 3.0, 3 / (width + 2))


CONSTANT = Fluctuation()


def _together(at: Lengths, node: Node) -> float | None:
    """The mean over pairs of positions of the product of both inputs' correlations."""
    one, two = (at.alike(v) for v in node.inputs[:2])
    if one is None or two is None:
        return None
    if one.places <= 1 or two.places <= 1:
        return max(one.mean, two.mean) if max(one.places, two.places) <= 1 else min(
            one.mean, two.mean)  # fmt: skip
    if one.sizes != two.sizes:
        return None
    return Pairs(one.sizes, one.full() * two.full()).mean


@_rule("mul", "div")
def _mul(at: Lengths, node: Node, inputs: list[Known], out: str) -> Known:
    """ln M of a·b is the sum of both; their elements' squares, of kurtosis k and l, add
    (k − 1)(l − 1)/n."""
    live = carriers(at.graph, node)
    if len(live) == 1 and node.inputs.count(live[0]) == 1:
        return inputs[0 if node.inputs[0] in live else 1]
    if node.op == "div" or len(live) != 2:
        return None
    width, same = at.features(out), _together(at, node)
    f, g = inputs[0], inputs[1]
    if f is None or g is None or width is None or same is None:
        return None
    one, two = at.chain.meet(f, g)
    law = one.own + two.own
    r = (f.kurtosis - 1) * (g.kurtosis - 1) * same / width
    law += skewed_law(r, _third(f.kurtosis) * _third(g.kurtosis) * (same / width) ** 2)
    kurtosis = f.kurtosis * g.kurtosis
    return Fluctuation(one.root, one.elasticity + two.elasticity, law, 0.0, kurtosis,
                       kurtosis / (width + kurtosis - 1))  # fmt: skip


def _third(kurtosis: float) -> float:
    """E (v²/E v² − 1)³ of a normal element that is zero but for a share 3/k of the places."""
    return 15 * (kurtosis / 3) ** 2 - 3 * kurtosis + 2


@_rule("concat")
def _concat(at: Lengths, node: Node, inputs: list[Known], out: str) -> Known:
    """Each part by its share of the squared length."""
    sizes = [(at.graph.values[v].size or 0) * (at.signal(v).second_moment or 0.0)
             if v is not None else 0.0 for v in node.inputs]  # fmt: skip
    total = sum(sizes)
    if total <= 0 or any(f is None for f in inputs):
        return None
    parts = [f for f in inputs if f is not None]
    whole = parts[0]
    share = sizes[0] / total
    done = Fluctuation(whole.root, whole.elasticity * share, whole.own.mixed(share))
    for f, size in zip(parts[1:], sizes[1:], strict=True):
        one, two = at.chain.meet(done, f)
        share = size / total
        done = Fluctuation(one.root, one.elasticity + share * two.elasticity,
                           one.own + two.own.mixed(share))  # fmt: skip
    width = at.features(out) or 1
    kurtosis = sum(f.kurtosis * s / total for f, s in zip(parts, sizes, strict=True))
    return replace(done, kurtosis=kurtosis, peak=kurtosis / (width + kurtosis - 1))
