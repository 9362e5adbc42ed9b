"""How far one draw's squared gradient lies from its mean, value by value.

The mirror image of :mod:`archlint.signal.fluctuation`: an affine map's transpose makes elements
that are alike and nearly normal given the gradient that arrives, a χ²_n of the features that go
*in*; a mask φ′ leaves a part of the length. Where φ′ depends on the length (GELU, SiLU, tanh), and
where a norm divides by it, the gradient follows the forward length M: with c = d ln E φ′²/d ln M
and A what the gradient behind the layer follows its own value with, it follows the layer's input
with A·e + c, and the layer's own fluctuation ε is multiplied by A. The variance is then that of
what is new since, Σ (Var η + 2A Cov(ε, η) + A² Var ε), and A² Var ln M of the value itself.

A convolution's gradient passes weights on which its own masks at other positions depend, and is
therefore not independent of them, as it is (at equal signs) in a fully connected layer: it leans
towards the activations. With L(p) = ⟨g(p), a(p)⟩ and Λ(δ) its covariance at an offset, 1 for
independent g and a of |g|²|a|²/C: what is beyond that independence, Λ − c_g c_a, is averaged by a
convolution over the outputs that read a position, since L_a(x) = (1/k²)Σ_t L_z(x − t) + what is
independent; and grows at a ReLU, which keeps L = ⟨g φ′, z⟩ while c_g c_a becomes less, by
c_g·√(1 − c²)/π. One of C directions has then the energy Λ(0) in place of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np

from archlint.graph.fans import fans
from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import attribute
from archlint.initialization.distribution import Distribution
from archlint.registering import registering
from archlint.signal.activations import Activation, activation
from archlint.signal.backpropagate import Edges
from archlint.signal.dominators import carriers
from archlint.signal.fluctuation import (
    CURVED,
    Chain,
    Fluctuation,
    Lengths,
    activated,
    affine,
    bias_share,
    chance,
    completed,
    excess_of,
    is_wrapped,
    length_curve,
    length_elasticity,
    negative_slope,
    normal_correlations,
    polyval,
    slope_curve,
    windows_of,
)
from archlint.signal.gaussian import Floats, hermite_coefficients, nodes_and_weights
from archlint.signal.moments import Prediction
from archlint.signal.offsets import (
    Pairs,
    alike,
    apart,
    around,
    fitting,
    gathered,
    mixed,
    scattered,
)
from archlint.signal.spread import (
    CERTAIN,
    LogLaw,
    Shares,
    influence,
    joint_moment,
    norm_law,
    normal_law,
    part_law,
    rectified_law,
    slope_elasticity,
)


@dataclass(frozen=True, slots=True)
class Back:
    """``gradient`` of a value, with what power its square ``follows`` the value's length, and how
    ``alike`` it is at two positions. ``lean`` = Λ − c_g c_a by offset, None where it is zero;
    ``excess``: E g² over what it were without. ``uneven``: E |g(p)|²|g(p′)|² by offset over its
    mean, None where it is the same for all. ``level``: the energy along (1, 1 …) behind an
    activation, over the mean of all directions, less one. ``beside``: E⟨g, x⟩⟨g, y⟩ with the other
    part y of the sum that the value x is a part of, over what E⟨g, x⟩² were without a lean."""

    gradient: Fluctuation
    alike: Pairs
    follows: float = 0.0
    lean: Floats | None = None
    excess: float = 1.0
    uneven: Floats | None = None
    drawn: Drawn | None = None
    met: Met | None = None
    level: float = 0.0
    beside: float = 0.0

    def mean(self, values: Floats) -> float:
        """The mean over pairs of positions of what is given by offset."""
        uneven = self.uneven
        if uneven is not None and uneven.shape == values.shape:
            values = values * uneven
        return replace(self.alike, table=values).mean

    def weighed(self, more: Floats) -> Back:
        """With pairs of positions that count by ``more`` more by offset."""
        before = np.ones_like(more) if self.uneven is None else self.uneven
        found = np.asarray(before * (1 + more) if before.shape == more.shape else 1 + more)
        level = replace(self.alike, table=found).mean
        return replace(self, uneven=found / level if level > 0 else None)


@dataclass(frozen=True, slots=True)
class Met:
    """What a gradient follows that came through a ``product`` of two functions of ``root``, until
    it is there: the product's length by the power ``arriving``, the same for both factors, and the
    ``other`` factor's by the first, which has an elasticity in the root and the variance ``own``
    beyond."""

    root: str
    product: str
    arriving: float
    other: float
    own: float


@dataclass(frozen=True, slots=True)
class Drawn:
    """What of the squared gradient goes as S² = ⟨y, ξ⟩² of an output of ``size`` elements: the
    share ``whole``, and ``alone`` as if the gradient did not lean. ``tied``: the squared
    correlation of the scalar product here with S. Through a curved φ that becomes another one by
    and by, and the shares stand for what varies as much: ``linked`` is the correlation of its
    square here with all that is due to the former ones."""

    size: int
    whole: float = 0.0
    alone: float = 0.0
    tied: float = 1.0
    linked: float = 1.0

    def moved(
        self, width: float, kappa: float, alone: float, energy: float = 1.0, weight: float = 1.0
    ) -> Drawn:
        """One of ``width`` directions takes the energy of S in it, ``kappa`` of a mean of one and
        ``alone`` without a lean, ``weight`` times; all take ``energy``."""
        if width <= 1:
            return self
        left, more = 1 - weight / width, weight * self.tied / width
        one, two = (
            math.sqrt(max((q * left) ** 2 + 2 * q * left * more * k * self.linked
                          + (more * k) ** 2, 0.0))
            for q, k in ((self.whole, kappa), (self.alone, alone))
        )  # fmt: skip
        linked = (self.whole * left * self.linked + more * kappa) / one if one > 0 else 1.0
        return replace(self, whole=min(one / energy, 1.0), alone=min(two, 1.0),
                       linked=min(max(linked, 0.0), 1.0))  # fmt: skip

    @property
    def law(self) -> LogLaw:
        """What is left to be counted: of the whole less of what is counted layer by layer."""
        if abs(self.whole - self.alone) < 1e-6:
            return CERTAIN
        square = part_law(1.0, float(self.size))
        one, two = square.mixed(self.whole), square.mixed(self.alone)
        return LogLaw(one.variance - two.variance, one.deficit - two.deficit,
                      one.third - two.third)  # fmt: skip


@dataclass(slots=True)
class Gradients:
    """The fluctuation of the squared gradient of every value of which it is known: ``total`` is
    the law of ln g² − ln E g², g = ∂⟨output, ξ⟩/∂v for a ξ of fixed length.
    """

    lengths: Lengths
    edges: Edges
    predictions: Mapping[str, Prediction]
    chain: Chain = field(default_factory=lambda: Chain({}, {}, {}))
    state: dict[str, Fluctuation] = field(default_factory=dict)
    pairs: dict[str, Pairs] = field(default_factory=dict)
    excess: dict[str, float] = field(default_factory=dict)
    total: dict[str, LogLaw] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.graph
        arriving: dict[str, list[tuple[float, Back | None]]] = {}
        for out in dict.fromkeys(graph.outputs):
            width = self.lengths.features(out) or 1
            spots = self.lengths.spots(out) or ()
            start = Back(Fluctuation(peak=3 / (width + 2)), apart(spots),
                         drawn=Drawn(width * max(math.prod(spots), 1)))  # fmt: skip
            arriving[out] = [(1.0, start)]
        for node in reversed(graph.nodes):
            live = carriers(graph, node)
            settled = [self._settle(v, arriving.pop(v, []), len(live)) for v in node.outputs]
            if node.op == "split" and len(node.outputs) > 1:
                settled = [self._joined(node, settled)]
            for i, value in enumerate(node.inputs):
                weight = self.edges.back.get((node.id, i))
                if value not in live or weight == 0.0:
                    continue
                sent: Back | None = None
                if weight is not None and settled and settled[0] is not None:
                    rule = _RULES.get(node.op) or (
                        _activation if activation(node.op, node.attributes) is not None else None
                    )
                    sizes = self.lengths.spots(value)
                    if rule is not None and sizes is not None:
                        sent = self.fitted(rule(self, node, settled[0], i), value, sizes)
                arriving.setdefault(value, []).append((weight or 1.0, sent))
        for value in graph.inputs:
            self._settle(value, arriving.pop(value, []), 1)

    @property
    def graph(self) -> LayerGraph:
        """The graph."""
        return self.lengths.graph

    def fitted(self, g: Back | None, value: str, sizes: tuple[int, ...]) -> Back | None:
        """With tables by offset that are of the value's own positions."""
        if g is not None and g.alike.sizes != sizes:
            g = self.placed(g, value)
        if g is None or (g.lean is None and g.uneven is None):
            return g
        return replace(g, lean=fitting(g.lean, sizes), uneven=fitting(g.uneven, sizes))

    def placed(self, g: Back, value: str) -> Back | None:
        """With the correlation of the gradient's own moments, where positions were moved."""
        sizes = self.lengths.spots(value)
        if sizes is None:
            return None
        c = self.predictions[value].grad_position_correlation
        if math.prod(sizes) <= 1:
            c = 1.0
        # tables by offset are of the positions that were
        return (
            None if c is None else replace(g, alike=Pairs(sizes, None, c), lean=None, uneven=None)
        )

    def _settle(self, value: str, parts: list[tuple[float, Back | None]], readers: int
                ) -> Back | None:  # fmt: skip
        g = self._sum(value, parts)
        if g is None:
            return None
        law = self.chain.whole(g.gradient)
        if g.follows:
            forward = self.lengths.total.get(value)
            if forward is None:
                return None
            a = g.follows
            law += LogLaw(a * a * forward.variance, 0.0, a**3 * forward.third)
        if g.met is not None:
            root, new = self.lengths.total.get(g.met.root), self._new(g.met)
            together = g.met.other + g.met.arriving * new[0]
            law += influence(max(together**2 * (root.variance if root else 0.0)
                                 + g.met.arriving**2 * new[1]
                                 + 2 * g.met.arriving * g.met.own, 0.0))  # fmt: skip
        self.total[value] = law if g.drawn is None else law + g.drawn.law
        profile = self.edges.profiles.get(value)
        if profile:
            g = replace(g, alike=g.alike.profiled(self.lengths.axes(value, profile)))
        self.state[value] = g.gradient
        self.pairs[value] = g.alike
        if g.excess != 1.0:
            self.excess[value] = g.excess
        if readers > 1:
            self.chain.add(value, g.gradient)
            return replace(g, gradient=replace(
                g.gradient.settled(), root=value, elasticity=1.0, law=CERTAIN))  # fmt: skip
        return g

    def _joined(self, node: Node, settled: list[Back | None]) -> Back | None:
        """Of what is divided: each part by its share of the squared gradient."""
        energies = [(self.predictions[v].grad_second_moment, self.graph.values[v].size)
                    for v in node.outputs]  # fmt: skip
        parts = [(q * n, g) for (q, n), g in zip(energies, settled, strict=True) if q and n]
        return self._sum(node.inputs[0] or "", parts)

    def _sum(self, value: str, parts: list[tuple[float, Back | None]]) -> Back | None:
        """What several readers send back: each by its share, and the scalar product of every two,
        4·s_i·s_j/n for n features."""
        if not parts or any(g is None for _, g in parts):
            return None
        first = parts[0][1]
        if len(parts) == 1 and (first is None or first.met is None or first.met.root != value):
            return first
        parts, common = self._met(value, parts)
        met = _one_met(parts)
        width = self.lengths.features(value)
        if width is None:
            return None
        total = sum(w for w, _ in parts)
        done: Fluctuation | None = None
        follows = squared = 0.0
        for w, g in parts:
            assert g is not None
            share = w / total
            follows += share * g.follows
            squared += share * share
            if done is None:
                done = replace(g.gradient.settled(), law=g.gradient.own.mixed(share),
                               elasticity=share * g.gradient.elasticity)  # fmt: skip
                continue
            one, two = self.chain.meet(done, g.gradient)
            done = Fluctuation(one.root, one.elasticity + share * two.elasticity,
                               one.own + two.own.mixed(share))  # fmt: skip
        assert done is not None
        alike = mixed([(g.alike, w) for w, g in parts if g is not None])
        cross = 2 * (1 - squared) * alike.over(lambda c: c * c) / width
        excess = sum(w * g.excess for w, g in parts if g is not None) / total
        lean = _together([(w / total, g.lean) for w, g in parts if g is not None])
        beside = sum(w / total * g.beside for w, g in parts if g is not None)
        forward = self.lengths.alike(value)
        if beside and forward is not None and (forward.places <= 1 or forward.sizes == alike.sizes):
            z, c = _paired(forward, alike)
            lean = beside * z * c + (0.0 if lean is None else lean)
        drawn = _all_drawn([(w / total, g.drawn) for w, g in parts if g])
        if lean is not None:  # of which the parts have theirs
            own = [w * float(g.lean.flat[0]) for w, g in parts if g and g.lean is not None]
            more = (float(lean.flat[0]) - sum(own) / total) / width
            excess *= max(1 + more, 0.0)
            if drawn is not None and more > 0:
                due = min((drawn.whole + drawn.tied * more) / (1 + more), 1.0)
                drawn = replace(drawn, whole=due)
        uneven = [g.uneven for _, g in parts if g is not None and g.uneven is not None]
        even = len(uneven) < len(parts) or any(u.shape != uneven[0].shape for u in uneven)
        mean = (
            None
            if even
            else sum((w / total * u for (w, _), u in zip(parts, uneven, strict=True)), np.zeros(()))
        )
        return Back(replace(done, law=done.law + norm_law(cross) + common, kurtosis=3.0,
                            peak=3 / (width + 2)), alike, follows, lean, excess, mean,
                    drawn, met)  # fmt: skip

    def _met(
        self, value: str, parts: list[tuple[float, Back | None]]
    ) -> tuple[list[tuple[float, Back | None]], LogLaw]:
        """Gradients that come through both factors of a product follow its length together: with
        ln M = E·ln M_root + ν that is a²·Var ν, and 2a·Cov of what each follows of the other."""
        found = [(w, g, g.met) for w, g in parts if g is not None and g.met is not None]
        products = {met.product for _, _, met in found}
        if not found or any(met.root != value for _, _, met in found):
            return parts, CERTAIN
        total = sum(w for w, _ in parts)
        result: list[tuple[float, Back | None]] = []
        more = 0.0
        for w, g in parts:
            if g is None or g.met is None:
                result.append((w, g))
                continue
            e = self._new(g.met)[0]
            more += 2 * w / total * g.met.arriving * g.met.own
            result.append((w, replace(
                g, met=None, follows=g.follows + g.met.other + g.met.arriving * e)))  # fmt: skip
        for product in products:
            share = sum(w for w, _, met in found if met.product == product) / total
            met = next(met for _, _, met in found if met.product == product)
            more += (share * met.arriving) ** 2 * self._new(met)[1]
        return result, influence(max(more, 0.0))

    def _new(self, met: Met) -> tuple[float, float]:
        """The elasticity of a product in its root, and its variance beyond."""
        chain = self.lengths.chain
        state = chain.above.get(met.product) or self.lengths.state.get(met.product)
        law = self.lengths.since(met.product, met.root)
        return (state.elasticity if state is not None else 0.0,
                law.variance if law is not None else 0.0)  # fmt: skip

    def since(self, value: str, root: str) -> LogLaw | None:
        """The law of the squared gradient of a value over that of a later one, the output of a sum
        or a product."""
        f = self.chain.above.get(value) or self.state.get(value)
        return None if f is None else self.chain.since(f, root)


Rule = Callable[[Gradients, Node, Back, int], "Back | None"]
_RULES: dict[str, Rule] = {}
_rule = registering(_RULES)


@_rule("linear", "conv", "conv_transpose")
def _affine(at: Gradients, node: Node, g: Back, i: int) -> Back | None:
    """χ²_n of the features that go in."""
    value = node.inputs[0]
    count, width = fans(node, at.graph), at.lengths.features(value)
    bias = bias_share(at.graph, at.lengths.signals, node)
    if i != 0 or count is None or width is None or bias is None:
        return None
    alike, uneven = g.alike, g.uneven
    lean: Floats | None = None
    excess = 1.0
    windows = windows_of(at.graph, node) if node.op == "conv" else None
    parameter = at.graph.parameter(node.inputs[1])
    law = parameter.law if parameter is not None else None
    if windows is not None:
        alike = scattered(alike, windows)
        if attribute("conv", node.attributes, "groups") == 1:
            uneven = None if uneven is None else gathered(uneven, windows)
            lean = None if g.lean is None else (1 - bias) * gathered(g.lean, windows)
        else:
            uneven = None
    elif node.op != "linear" or alike.sizes != at.lengths.spots(value):
        placed = at.placed(g, value or "")
        if placed is None:
            return None
        alike, uneven = placed.alike, None
    elif g.lean is not None and law is not None and law.random:
        lean = (1 - bias) * g.lean
    if lean is not None:
        free = 1.0
        if law is not None and law.family == "orthogonal" and windows is None:
            free = max(1 - count.fan_in / max(count.width, count.fan_in), 0.0)
        excess = max(1 + free * float(lean.flat[0]) / width, 0.0)
    if law is None and node.inputs[1] not in at.graph.static:
        return None
    taps = max(count.fan_out / count.width, 1.0)
    kurtosis = 3 + excess_of(law) * g.gradient.peak / taps
    sent = replace(g, alike=alike, uneven=uneven, lean=lean)
    squares = chance(alike.full(), count.fan_out) if alike.places > 1 else np.ones(1)
    if uneven is not None:
        sent = sent.weighed(np.zeros_like(squares))
    same = 1.0 if alike.places <= 1 else sent.mean(squares)
    if alike.places > 1:
        sent = sent.weighed(2 * squares / width)
    drawn = _due(at, node, value, sent, width, bias, law)
    if lean is not None:
        alike, same = _leaning(at, value, alike, lean, width, same)
    fresh, more = width / same, CERTAIN
    if law is not None and law.family == "orthogonal":
        whole = max(count.width, count.fan_in)
        more = part_law(count.fan_in, whole) if alike.places <= 1 else norm_law(
            2 * same * (1 / count.fan_in - 1 / whole))  # fmt: skip
        fresh = 0.0
    elif law is not None and not law.random:
        fresh = 0.0
    a, own = g.follows, CERTAIN
    if a:
        forward = at.lengths.alike(node.output)
        if forward is None:
            return None
        z = fresh and normal_law(count.width / forward.over(lambda c: c * c)).variance
        if law is not None and law.family == "orthogonal":
            z = part_law(count.width, max(count.width, count.fan_in)).variance
        own = influence(a * a * z)
    f = g.gradient
    return Back(
        Fluctuation(f.root, f.elasticity, f.own + more + own, fresh, kurtosis,
                    kurtosis / (width + kurtosis - 1)),
        alike, a * (1 - bias), lean, g.excess * excess, sent.uneven, drawn, g.met,
        0.0, g.beside * (1 - bias),
    )  # fmt: skip


def _due(
    at: Gradients, node: Node, value: str | None, g: Back, width: int, bias: float,
    law: Distribution | None,
) -> Drawn | None:  # fmt: skip
    """What of the gradient of an affine map's input is due to S."""
    known = node.op in ("linear", "conv") and law is not None and law.random
    if g.drawn is None or not known or law is None or law.family == "orthogonal":
        return None
    pair = _kappa(at.lengths.alike(value), g)
    if pair is None:
        return None
    drawn = replace(g.drawn, tied=g.drawn.tied * (1 - bias))
    energy = 1.0 if g.lean is None else 1 + float(g.lean.flat[0]) / width
    return drawn.moved(width, *pair, energy)


def _kappa(a: Pairs | None, g: Back) -> tuple[float, float] | None:
    """The mean over pairs of positions of c_g c_a + lean, and of c_g c_a."""
    if a is None:
        return None
    if a.places <= 1 and g.alike.places <= 1:
        return 1.0 if g.lean is None else 1 + float(g.lean.flat[0]), 1.0
    if a.sizes != g.alike.sizes:
        return None
    both = g.alike.full() * a.full()
    alone = replace(g.alike, table=both).mean
    if g.lean is None or g.lean.shape != both.shape:
        return alone, alone
    return replace(g.alike, table=both + g.lean).mean, alone


def _together(parts: list[tuple[float, Floats | None]]) -> Floats | None:
    """The lean of a sum: what the parts have of it they have from one gradient, so that it is their
    amplitudes that add up; what they lack are squares."""
    found = [w * lean for w, lean in parts if lean is not None]
    if not found or any(lean.shape != found[0].shape for lean in found):
        return None
    more = sum((np.sqrt(np.maximum(lean, 0.0)) for lean in found), np.zeros(()))
    return np.asarray(np.square(more) + sum(np.minimum(lean, 0.0) for lean in found))


_MINOR = 0.1  # share of a sum, such as what comes by a gate, up to which its origin is left out


def _one_met(parts: list[tuple[float, Back | None]]) -> Met | None:
    """Of gradients that come through one product and have not come to its root yet."""
    found = [(w, g.met) for w, g in parts if g is not None and g.met is not None]
    total = sum(w for w, _ in found)
    if len(found) < len(parts) or len({met.product for _, met in found}) > 1 or total <= 0:
        return None
    return replace(found[0][1], other=sum(w * met.other for w, met in found) / total,
                   own=sum(w * met.own for w, met in found) / total)  # fmt: skip


def _all_drawn(parts: list[tuple[float, Drawn | None]]) -> Drawn | None:
    """What of a sum is due to S: scalar products with what the parts are of add up."""
    found = [(w, d) for w, d in parts if d is not None]
    if sum(w for w, _ in found) < 1 - _MINOR:
        return None
    linked = sum(w * d.linked for w, d in found) / sum(w for w, _ in found)
    return replace(found[0][1], whole=sum(w * d.whole for w, d in found),
                   alone=sum(w * d.alone for w, d in found),
                   tied=min(sum(d.tied for _, d in found), 1.0), linked=linked)  # fmt: skip


def _leaning(
    at: Gradients, value: str | None, g: Pairs, lean: Floats, width: int, same: float
) -> tuple[Pairs, float]:
    """How alike the gradient is at two positions where one of its ``width`` directions, that of the
    activations, has the covariance c_g c_a + ``lean``; and the mean of the squared correlation
    over pairs, which the relative variance 2·same/width is of."""
    a = at.lengths.alike(value)
    if a is None or a.sizes != g.sizes:
        return g, same
    c, e = g.full(), a.full()
    whole = width + float(lean.flat[0])
    found = replace(g, table=(width * c + lean * e) / whole)
    along = replace(g, table=np.square(c * e + lean)).mean
    return found, ((width - 1) * same + along) * width / whole**2


def _activation(at: Gradients, node: Node, g: Back, i: int) -> Back | None:
    """What the mask φ′ leaves of the squared gradient."""
    phi = activation(node.op, node.attributes)
    x = at.lengths.signal(node.inputs[0])
    width, forward = at.lengths.features(node.inputs[0]), at.lengths.typical(node.inputs[0])
    if phi is None or x.mean is None or width is None or forward is None:
        return None
    variance = x.variance or 0.0
    m = phi.moments(x.mean, variance)
    if variance <= 0 or not m.slope > 1e-140 or not math.isfinite(m.slope_fourth):
        return None
    near = m.slope_fourth / m.slope**2
    each = _shared(phi, x.mean, variance, forward, g.alike)
    if forward.places <= 1:
        share = float(each.flat[0])
    else:
        if g.alike.sizes != forward.sizes:
            g = replace(g, alike=apart(forward.sizes), uneven=None)
        share = g.mean(each)
        g = g.weighed(each * 3 * (near - 1) / width)
    f = g.gradient
    a, e, d = g.follows, length_elasticity(phi, x.mean, variance), 0.0
    less = 0.0
    if not phi.homogeneous:
        d = slope_elasticity(phi, x.mean, variance)
        before = at.lengths.total.get(node.inputs[0] or "")
        if before is not None and before.variance > CURVED:
            e = before.through(length_curve(phi, x.mean, variance))[1]
            steepness, d = before.through(slope_curve(phi, x.mean, variance))
            less = steepness.deficit
    behind = _behind(phi, x.mean, variance, forward, g.alike)
    lean, drawn, excess, level = None, None, g.excess, 0.0
    if x.mean == 0.0:
        lean, energy = _leant(phi, variance, width, forward, g)
        excess *= energy
        if g.lean is not None:
            level = float(g.lean.flat[0]) * _alignment(phi, variance)[3]
        drawn = _drawn_through(at, node, phi, variance, width, forward, energy, g)
    elif negative_slope(phi) is not None:
        lean, energy, passes, drawn = _rectified(at, node, phi, width, g, behind)
        excess *= energy
        near = m.slope_fourth / m.slope / passes if passes > 0 else near
    if negative_slope(phi) == 0.0 and x.mean == 0.0 and share > 0 and not a:
        return Back(f.masked(width / share, 0.5), behind, 0.0, lean, excess, g.uneven, drawn,
                    g.met, level, g.beside)  # fmt: skip
    law = _masked(phi, x.mean, near, width, share, f.kurtosis, d)
    beside = g.beside * math.sqrt(max(_alignment(phi, variance)[1], 0.0))
    kurtosis = f.kurtosis * near
    own = CERTAIN
    if a:
        new = m.kappa - 2 * e * e
        both = joint_moment(phi, x.mean, variance) - 2 * e * d
        own = influence(max((a * a * new + 2 * a * both) / width * share, -law.variance))
    return Back(
        Fluctuation(f.root, f.elasticity, f.own + law + own + LogLaw(0.0, less), 0.0, kurtosis,
                    kurtosis / (width + kurtosis - 1)),
        behind, a * e + d, lean, excess, g.uneven, drawn, g.met, level, beside,
    )  # fmt: skip


def _shared(phi: Activation, mean: float, variance: float, forward: Pairs, g: Pairs) -> Floats:
    """For pairs of positions (1 + 2c²)(μ − 1) over its value 3(μ(1) − 1) for one, with c the
    gradient's correlation and μ = E φ′²φ′²/(E φ′²)² of the pair."""
    if forward.places <= 1:
        m = phi.moments(mean, variance)
        return np.array([1.0 if m.slope_fourth > m.slope**2 * (1 + 1e-12) else 0.0])
    series = _slope_series(phi, mean, variance)[1]
    whole = 3 * (float(series.sum()) - 1)
    found = []
    for end in forward.draws():
        z, c = _paired(end, g)
        mu = polyval(normal_correlations(z, mean, variance), series)
        found.append((1 + 2 * c * c) * np.maximum(mu - 1, 0.0) / whole if whole > 0
                     else np.zeros_like(z))  # fmt: skip
    return sum(found, np.zeros(())) / len(found)


def _behind(phi: Activation, mean: float, variance: float, forward: Pairs, g: Pairs) -> Pairs:
    """How alike φ′·g is at two positions: c·E φ′φ′/E φ′²."""
    if forward.places <= 1:
        return g
    z, c = _paired(forward, g)
    series = _slope_series(phi, mean, variance)[0]
    return Pairs(forward.sizes, c * polyval(normal_correlations(z, mean, variance), series))


def _paired(forward: Pairs, g: Pairs) -> tuple[Floats, Floats]:
    if forward.places <= 1:
        return np.ones(1), np.ones(1)
    return forward.full(), (g if g.sizes == forward.sizes else apart(forward.sizes)).full()


@lru_cache(maxsize=4096)
def _slope_series(phi: Activation, mean: float, variance: float) -> tuple[Floats, Floats]:
    """Coefficients of c ↦ E φ′(u)φ′(v)/E φ′² and of c ↦ E φ′(u)²φ′(v)²/(E φ′²)²."""
    m = phi.moments(mean, variance)
    deviation = math.sqrt(variance)
    kinks = phi.standard_kinks(mean, deviation)
    one = hermite_coefficients(lambda z: phi.derivative(mean + deviation * z), kinks)
    two = hermite_coefficients(lambda z: phi.derivative(mean + deviation * z) ** 2, kinks)
    return (completed(one * one, m.slope) / m.slope,
            completed(two * two, m.slope_fourth) / m.slope**2)  # fmt: skip


def _leant(
    phi: Activation, variance: float, width: int, forward: Pairs, g: Back
) -> tuple[Floats, float]:
    """The lean before φ, and E g² over what it were without one.

    The energy 1 + Λ in the direction a of ``width``: Σ g² φ′² has E φ²φ′²/(E φ² E φ′²) = J of it
    where the mean has one, ⟨g φ′, z⟩² the share ρ = (E z φ φ′)²/(E φ² E z² E φ′²); and of what does
    not lean c_g·Z(c), Z(c) = E zφ′z′φ″/(E z² E φ′²), where c_g·c·μ(c) is none. For ReLU J = 2,
    ρ = 1 and Z − cμ = √(1 − c²)/π.
    """
    whole, kept, series, _ = _alignment(phi, variance)
    slopes = _slope_series(phi, 0.0, variance)[0]
    z, c = _paired(forward, g.alike)
    own = c * polyval(z, series)
    none = c * z * polyval(z, slopes)
    before = _as_wide(g.lean, own)
    first = float(before.flat[0]) / width
    level = max(1 + first * whole, 1e-3)
    energy = max(level / max(1 + first, 1e-3), 1e-3)
    return np.asarray((kept * before + own) / level - none, np.float64), energy


def _drawn_through(
    at: Gradients, node: Node, phi: Activation, variance: float, width: int, forward: Pairs,
    energy: float, g: Back,
) -> Drawn | None:  # fmt: skip
    """What is due to S before φ: of the energy in the direction of the activations J in place of
    one; of ⟨g φ′, z⟩² what goes as ⟨g, a⟩² does is tied as that was."""
    pair = _kappa(at.lengths.alike(node.output), g)
    if g.drawn is None or pair is None:
        return None
    whole, kept, series, _ = _alignment(phi, variance)
    z, c = _paired(forward, g.alike)
    new = float(c.flat[0] * polyval(z, series).flat[0]) if z.size == 1 else replace(
        g.alike, table=c * polyval(z, series)).mean  # fmt: skip
    total = new + kept * (pair[0] - pair[1])
    tied = min(kept * pair[0] / total, 1.0) if total > 0 else 0.0
    moved = g.drawn.moved(width - 1, *pair, energy, whole - 1)
    return replace(moved, linked=moved.linked * tied)


def _as_wide(table: Floats | None, like: Floats) -> Floats:
    """A table by offset in the shape of another; zeros where it is none of its map."""
    return np.zeros_like(like) if table is None or table.size != like.size else table.reshape(
        like.shape)  # fmt: skip


def _rectified(
    at: Gradients, node: Node, phi: Activation, width: int, g: Back, behind: Pairs
) -> tuple[Floats | None, float, float, Drawn | None]:
    """The lean before a piecewise linear φ of what has a mean, E g² over what it were without one,
    E (gφ′)²/E g², and what is due to S: ⟨gφ′, z⟩ = ⟨g, φ(z)⟩ whatever the law of z."""
    x, y = (at.lengths.signal(v).second_moment for v in (node.inputs[0], node.output))
    before, after = (at.predictions[v].grad_second_moment if v in at.predictions else None
                     for v in (node.inputs[0] or "", node.output))  # fmt: skip
    passes = before / after if before and after else 0.0
    one, two = at.lengths.alike(node.inputs[0]), at.lengths.alike(node.output)
    if not x or not y or passes <= 0 or one is None or two is None:
        return None, 1.0, passes, None
    if one.places > 1 and not one.sizes == two.sizes == g.alike.sizes == behind.sizes:
        return None, 1.0, passes, None
    z, c = _paired(one, behind)
    a, d = _paired(two, g.alike)
    lean = _as_wide(g.lean, z)
    whole = 1 / passes  # of the direction of φ(z) all, where φ′ is 0 or 1
    first = float(lean.flat[0]) / width
    level = max(1 + first * whole, 1e-3)
    energy = level / max(1 + first, 1e-3)
    pair = _kappa(two, g)
    drawn = None if g.drawn is None or pair is None else g.drawn.moved(
        width - 1, *pair, energy, whole - 1)  # fmt: skip
    return (lean + a * d) * (y / x / passes / level) - z * c, energy, passes, drawn


@lru_cache(maxsize=4096)
def _alignment(phi: Activation, variance: float) -> tuple[float, float, Floats, float]:
    """J, ρ, the coefficients of Z (:func:`_leant`), and (E φφ′)²/(E φ² E φ′²)."""
    m = phi.moments(0.0, variance)
    deviation = math.sqrt(variance)
    kinks = phi.standard_kinks(0.0, deviation)
    z, w = nodes_and_weights(kinks)
    f, d = phi.function(deviation * z), phi.derivative(deviation * z)
    slant = float(w @ (z * f * d)) ** 2 / (m.second_moment * m.slope)
    series = hermite_coefficients(lambda z: z * phi.derivative(deviation * z), kinks)
    total = float(w @ np.square(z * d))
    return (float(w @ np.square(f * d)) / (m.second_moment * m.slope), slant,
            completed(series * series, total) / m.slope,
            float(w @ (f * d)) ** 2 / (m.second_moment * m.slope))  # fmt: skip


def _masked(
    phi: Activation, mean: float, near: float, width: int, share: float, kurtosis: float, d: float
) -> LogLaw:
    """What φ′ leaves of the squared gradient given its length and that of z: 3(E φ′⁴/(E φ′²)² − 1)
    less 2d², what φ′ owes to the length of z."""
    slope = negative_slope(phi)
    if share <= 0:
        return CERTAIN
    if slope is not None and mean == 0.0:
        return rectified_law(width / share, slope, kurtosis - 3)
    return norm_law(max(3 * (near - 1) - 2 * d * d, 0.0) * share / width)


def layer_shares(at: Gradients, node: Node, bend: Node | None) -> Shares | None:
    """What an affine map and the activation that reads it add to the spread, both ways; None where
    that is not known."""
    lengths = at.lengths
    before = lengths.state.get(node.inputs[0] or "")
    start = Fluctuation(peak=before.peak if before is not None else 0.0)
    z = affine(lengths, node, [start], node.output)
    if z is None:
        return None
    e, moved, common = z.elasticity, 0.0, 0.0
    law = z.own
    arriving = at.pairs.get(bend.output if bend is not None else node.output)
    if arriving is None:
        return Shares(law, None, e)
    back: Back | None = Back(Fluctuation(), arriving)
    if bend is not None:
        after = activated(lengths, bend, [z], bend.output)
        if after is None:
            return None
        e, law = after.elasticity, after.own
        value = bend.inputs[0] or ""
        back = _activation(at, bend, Back(Fluctuation(), arriving), 0)
        if (sizes := lengths.spots(value)) is not None:
            back = at.fitted(back, value, sizes)
        phi = activation(bend.op, bend.attributes)
        x, width = lengths.signal(value), lengths.features(value)
        if phi is not None and width and x.mean is not None and not phi.homogeneous:
            d = slope_elasticity(phi, x.mean, x.variance or 0.0)
            moved = d * z.elasticity
            common = joint_moment(phi, x.mean, x.variance or 0.0) / width
            if back is not None:  # what φ′ owes to the length of z, which is new in this layer
                own = back.gradient.own + influence(2 * d * d / width)
                back = replace(back, gradient=replace(back.gradient.settled(), law=own))
    back = _affine(at, node, replace(back, follows=0.0), 0) if back is not None else None
    gradient = back.gradient.own if back is not None else None
    if gradient is not None and common:
        limit = math.sqrt(law.variance * gradient.variance)
        common = min(max(common, -limit), limit)
    return Shares(law, gradient, e, moved, common)


@_rule("glu")
def _glu(at: Gradients, node: Node, g: Back, i: int) -> Back | None:
    """a·σ(b): the two halves get g·σ(b) and g·a·σ′(b), whose squares sum to g²·S."""
    x, width = at.lengths.signal(node.inputs[0]), at.lengths.features(node.output)
    if width is None or not x.second_moment:
        return None
    ratio, d = _glu_slopes(round(math.log(x.second_moment), 4))
    f = g.gradient
    law = norm_law(3 * (ratio - 1) / width)
    a = g.follows
    sigmoid = activation("sigmoid", {})
    assert sigmoid is not None
    e = 1 + length_elasticity(sigmoid, 0.0, x.second_moment)
    made = Fluctuation(f.root, f.elasticity, f.own + law, 0.0, f.kurtosis * ratio,
                       f.kurtosis * ratio / width)  # fmt: skip
    return Back(made, g.alike, a * e + d, None, g.excess)


@lru_cache(maxsize=1024)
def _glu_slopes(log_q: float) -> tuple[float, float]:
    """(E S²/(E S)², d ln E S/d ln q) of S = σ(b)² + a²σ′(b)², a, b ~ N(0, q)."""

    def moments(q: float) -> tuple[float, float]:
        z, w = nodes_and_weights(())
        s = 1 / (1 + np.exp(-math.sqrt(q) * z))
        one, two = s * s, (s * (1 - s)) ** 2 * q
        first = float(w @ (one + two))
        return first, float(w @ (one**2 + 2 * one * two + 3 * two**2))

    q, h = math.exp(log_q), 1e-3
    first, second = moments(q)
    return second / first**2, math.log(moments(q * math.exp(h))[0]
                                       / moments(q * math.exp(-h))[0]) / (2 * h)  # fmt: skip


@_rule("layer_norm", "rms_norm", "group_norm", "instance_norm", "standardise", "batch_norm")
def _norm(at: Gradients, node: Node, g: Back, i: int) -> Back | None:
    """A division by the length: the squared gradient goes as 1/M of what comes in.

    Its mean holds E 1/M of a χ² (backward.normalisation), of which a typical draw has
    e^(E ln M⁻¹). Nothing is left along x: Λ = 0; of a gradient that leans more is taken."""
    if i != 0:
        return None
    if node.op == "batch_norm" and not attribute("batch_norm", node.attributes, "training"):
        return g
    found = replace(g, follows=-1.0, lean=None, drawn=None, level=0.0)
    x, forward = at.lengths.signal(node.inputs[0]), at.lengths.total.get(node.inputs[0] or "")
    width, a = at.lengths.features(node.inputs[0]), at.lengths.alike(node.inputs[0])
    axes = attribute(node.op, node.attributes, "axes") if node.op in _OVER_AXES else ()
    rank = len(x.roles)
    over = {x.roles[int(str(n)) % rank] for n in axes} if isinstance(axes, tuple) and rank else ()
    if forward is None or width is None or a is None or set(over) != {"feature"}:
        return found
    freedom = width - (node.op == "layer_norm")
    if freedom > 2:
        less = math.log(freedom / (freedom - 2)) - forward.deficit
        found = replace(found, gradient=replace(
            g.gradient.settled(), law=g.gradient.own + LogLaw(0.0, less)))  # fmt: skip
    if g.lean is not None:
        more = float(g.lean.flat[0]) + (g.level if node.op == "layer_norm" else 0.0)
        found = replace(found, excess=g.excess * max(1 - more / width, 0.0))
    if a.places <= 1 or a.sizes == g.alike.sizes:
        found = replace(found, lean=-_paired(a, g.alike)[0] * _paired(a, g.alike)[1])
    return found


_OVER_AXES = frozenset({"layer_norm", "rms_norm"})


@_rule("identity", "cast", "reshape", "transpose", "flip", "roll", "expand", "neg", "tile",
       "channel_shuffle", "depth_to_space", "space_to_depth", "pad", "resize", "avg_pool",
       "max_pool", "adaptive_max_pool")  # fmt: skip
def _passed(at: Gradients, node: Node, g: Back, i: int) -> Back | None:
    """The same elements, or copies of them."""
    if node.op in ("identity", "cast"):
        return g
    sizes = at.lengths.spots(node.inputs[0])
    if is_wrapped(node) and sizes is not None and len(sizes) == len(g.alike.sizes):
        even, lean = (None if t is None or t.shape != g.alike.full().shape
                      else around(t, sizes, sizes) for t in (g.uneven, g.lean))  # fmt: skip
        return replace(g, alike=Pairs(sizes, around(g.alike.full(), sizes, sizes)), lean=lean,
                       uneven=even)  # fmt: skip
    moved = at.lengths.spots(node.inputs[0]) != at.lengths.spots(node.output)
    homogeneous = node.op in ("reshape", "transpose", "avg_pool", "max_pool")
    return replace(g, lean=None, uneven=None if moved else g.uneven,
                   drawn=g.drawn if homogeneous else None)  # fmt: skip


@_rule("add", "sub")
def _add(at: Gradients, node: Node, g: Back, i: int) -> Back | None:
    """The same gradient. With r = E ab, ⟨g, a⟩ has (E a² + r)/E(a + b)² of what ⟨g, a + b⟩ has by
    a lean; without one, E⟨g, a⟩⟨g, b⟩ goes as r."""
    whole = at.lengths.signal(node.output).second_moment
    part, other = (at.lengths.signal(node.inputs[k]).second_moment for k in (i, 1 - i))
    if not whole or not part or other is None:
        return replace(g, lean=None, drawn=None, beside=0.0)
    both = (whole - part - other) / 2
    share = min(part / whole, 1.0)
    along = (part + both) ** 2 / (part * whole)
    drawn = None if g.drawn is None else replace(g.drawn, tied=min(along, 1.0) * g.drawn.tied)
    lean = None if g.lean is None else g.lean * along
    live = len(carriers(at.graph, node)) > 1
    return replace(g, lean=lean, drawn=drawn, level=0.0,
                   beside=g.beside * share + (both / part if live else 0.0))  # fmt: skip


@_rule("reduce_mean", "reduce_sum", "adaptive_avg_pool")
def _reduced(at: Gradients, node: Node, g: Back, i: int) -> Back | None:
    """Every element gets what its mean got; over positions only."""
    before, sizes = at.lengths.features(node.inputs[0]), at.lengths.spots(node.inputs[0])
    if sizes is not None and g.alike.places <= 1:
        lean = None if math.prod(sizes) > 1 else g.lean
        g = replace(g, alike=alike(sizes), lean=lean)
    return g if before is not None and before == at.lengths.features(node.output) else None


@_rule("split", "slice", "select_index")
def _part(at: Gradients, node: Node, g: Back, i: int) -> Back | None:
    """Zero elsewhere."""
    return replace(g, uneven=None, drawn=None)


@_rule("attention")
def _attention(at: Gradients, node: Node, g: Back, i: int) -> Back | None:
    """Sums of tokens' gradients by the shares; queries and keys get scalar products with them."""
    f, width = g.gradient, at.lengths.features(node.inputs[i])
    if i > 2 or width is None:
        return None
    back = Fluctuation(f.root, f.elasticity, f.own, peak=3 / (width + 2))
    return at.placed(Back(back, g.alike, 0.0, None, g.excess), node.inputs[i] or "")


@_rule("concat")
def _concat(at: Gradients, node: Node, g: Back, i: int) -> Back | None:
    """A part of the features."""
    f = g.gradient
    part, whole = at.lengths.features(node.inputs[i]), at.lengths.features(node.output)
    if part is None or whole is None:
        return None
    g = replace(g, drawn=None)
    if part >= whole:
        return g
    same = g.alike.over(lambda c: c * c)
    law = f.own + norm_law(2 * same * (1 / part - 1 / whole))
    return replace(g, gradient=replace(f.settled(), law=law, peak=f.peak * whole / part))


@_rule("dropout")
def _dropout(at: Gradients, node: Node, g: Back, i: int) -> Back | None:
    """The mask of the forward pass."""
    width, places = at.lengths.features(node.output), at.lengths.size(node.output, "position")
    p = attribute("dropout", node.attributes, "p")
    if width is None or places is None or not isinstance(p, float | int):
        return None
    keep = 1 - float(p)
    if not attribute("dropout", node.attributes, "training") or not 0 < keep < 1:
        return g
    f, g = g.gradient, replace(g, drawn=None)
    if places <= 1:
        return replace(g, gradient=f.masked(width, keep))
    law = f.own + norm_law(f.kurtosis * (1 / keep - 1) / (width * places))
    return replace(g, gradient=replace(f.settled(), law=law, kurtosis=f.kurtosis / keep))


@_rule("mul", "div")
def _mul(at: Gradients, node: Node, g: Back, i: int) -> Back | None:
    """g·b for the gradient of a: what varies of b's length, and the two squares' common part."""
    live = carriers(at.graph, node)
    if len(live) == 1 and node.inputs.count(live[0]) == 1:
        number = all(at.graph.values[v].size == 1 for v in node.inputs if v and v not in live)
        return g if number else replace(g, drawn=None)
    if node.op == "div" or len(live) != 2:
        return None
    value, other = node.inputs[i], node.inputs[1 - i]
    width = at.lengths.features(node.output)
    mine, b = (at.lengths.state.get(v or "") for v in (value, other))
    if width is None or mine is None or b is None:
        return None
    mine, b = at.lengths.chain.meet(mine, b)
    f = g.gradient
    same = g.alike.over(lambda c: c * c)
    law = f.own + b.own + norm_law((f.kurtosis - 1) * (b.kurtosis - 1) * same / width)
    gated = at.lengths.size(other, "position") == 1 and at.lengths.size(value, "position") != 1
    of_gate = at.lengths.size(other, "position") != at.lengths.size(value, "position")
    if mine.root is not None and mine.root == b.root and g.met is None and not of_gate:
        kurtosis = f.kurtosis * b.kurtosis
        met = Met(mine.root, node.output, g.follows, b.elasticity, b.own.variance)
        return Back(Fluctuation(f.root, f.elasticity, law, 0.0, kurtosis, kurtosis / width),
                    g.alike, 0.0, None, g.excess, None, None, met)  # fmt: skip
    ratio = b.elasticity / mine.elasticity if abs(mine.elasticity) > 1e-6 else 0.0
    follows = g.follows * (1 + ratio) + ratio  # ln M of the product goes as that of both
    own = (mine.kurtosis - 1) * (b.kurtosis - 1) * same / width
    law += influence(g.follows**2 * (own + b.own.variance))
    kurtosis = f.kurtosis * b.kurtosis
    return Back(Fluctuation(f.root, f.elasticity, law, 0.0, kurtosis, kurtosis / width),
                g.alike, follows, g.lean if gated else None, g.excess,
                g.uneven if gated else None, g.drawn if gated else None)  # fmt: skip
