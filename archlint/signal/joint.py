"""Sums and products of tensors that are functions of the same elements.

Such a value is written as Σ c·Π f(r) over *roots* r without a source in common, each a normal
variable with a signal's moments: x + LN(x), z·h + (1 − z)·x, x·sigmoid(x). Products of functions of
different roots have products of expectations; two functions of one root have E f(r)g(r), and at two
positions or samples Mehler's Σ a_k b_k ρ^k (signal.gaussian). What is added side by side, such as
tokens that pass beside a class token, is taken part by part. A root may have been through a pool,
x + pool(x): such terms are linear in it, and what two of them share is worked out by displacement
(signal.neighbours).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import combinations, pairwise
from typing import NamedTuple

import numpy as np

from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import attribute
from archlint.signal.activations import activation
from archlint.signal.arithmetic import added, broadcast, scaled
from archlint.signal.dependence import MEANS
from archlint.signal.gaussian import Floats, Function, hermite, nodes_and_weights
from archlint.signal.mixing import averaging
from archlint.signal.moments import UNKNOWN_SIGNAL, Group, Role, Signal
from archlint.signal.neighbours import Field, Mixing, passed
from archlint.signal.normalisation import feature_mean_square
from archlint.signal.parts import parts_profile, taken, weighted_mean
from archlint.signal.reuse import Reuse, plus
from archlint.signal.transfer import Step, correlated

_MOST_OPENED = 64  # nodes that are taken apart
_MOST_TERMS = 48
_FEWEST = 16  # elements over which a norm's mean and variance are what they are expected to be
_FAINT = 0.1  # the share of its mean's square in the variance up to which a norm is such
_CLOSE = 5e-3  # relative error up to which a mean may seem greater than what it is the mean of
_NORMS = frozenset({"layer_norm", "rms_norm", "group_norm"})
_PAIRS = ("position_correlation", "sample_correlation", "cross_correlation")
Shape = tuple[int | None, ...]


class Place(NamedTuple):
    """A value, or what lies between two places along one of its axes."""

    value: str
    axis: int = -1
    start: int = 0
    stop: int = 0


@dataclass(frozen=True, slots=True)
class Term:
    """number·Π f(r): of every root [f, f′] at its quadrature points; None where f(r) = r.
    ``mixing``: what a term of a single root has been through."""

    number: float
    factors: Mapping[Place, Floats | None]
    mixing: Mixing | None = None


Expression = tuple[Term, ...]


def together(step: Step) -> Signal | None:
    """A sum or product whose operands have sources in common; None where it cannot be told."""
    out = step.node.outputs[0]
    found = _Algebra(step, Place(out), pools=True).signal() or _Algebra(step, Place(out)).signal()
    return found or _part_by_part(step, out)


def stacked(graph: LayerGraph, node: Node) -> bool:
    """Whether a sum or mean is over the tensors of a stack."""
    made = graph.producer.get(node.inputs[0] or "") if node.inputs else None
    axes = _ints(node.attributes.get("axes"))
    return (
        node.op in ("reduce_sum", "reduce_mean") and made is not None and made.op == "stack"
        and axes == (made.attributes["axis"],) and len(made.inputs) <= _MOST_TERMS
        and not node.attributes.get("keepdims")
    )  # fmt: skip


def _part_by_part(step: Step, out: str) -> Signal | None:
    """The sum of concatenations, each stretch of its own."""
    shape = step.graph.shape(out)
    axis, edges = _edges(step, out)
    if shape is None or axis < 0:
        return None
    parts: list[tuple[Signal, int]] = []
    for start, stop in pairwise(edges):
        part = _Algebra(step, Place(out, axis, start, stop)).signal()
        if part is None:
            return None
        parts.append((part, stop - start))
    roles = parts[0][0].roles
    along = axis < len(roles) and roles[axis] == "position"
    whole = weighted_mean(parts, roles, over_positions=along)
    return whole.but(profile={**whole.profile, **parts_profile(parts, axis, whole)})


def _edges(step: Step, out: str) -> tuple[int, list[int]]:
    """The axis along which concatenations enter a sum, and where their parts end; −1 without."""
    algebra = _Algebra(step, Place(out))
    shape = step.graph.shape(out) or ()
    axis, edges = -1, {0}
    left = [algebra.place]
    for place in left:
        if len(left) > _MOST_OPENED:
            break
        place = algebra.resolved(place)
        value = place.value
        node = step.graph.producer.get(value)
        if node is None or step.graph.shape(value) != shape:
            continue
        if node.op != "concat":
            left += algebra.children(place) or ()
            continue
        at = int(str(node.attributes["axis"]))
        sizes = [(step.graph.shape(v) or (None,) * len(shape))[at] for v in node.inputs]
        if axis not in (-1, at) or None in sizes:
            continue
        axis = at
        edges.update(int(n) for n in np.cumsum([n or 0 for n in sizes]))
    return axis, sorted(edges)


@dataclass(frozen=True, slots=True)
class Slopes:
    """∂y/∂r of a sum or product y by its ``roots``, each as a signal of y's shape. ``opened`` are
    the values between the two, ``edges`` (node id, place of the input) where a root enters."""

    roots: Mapping[str, Signal]
    opened: frozenset[str]
    edges: frozenset[tuple[str, int]]


def slopes(step: Step) -> Slopes | None:
    """Where several paths lead from a root to a sum or product, what they come to together. None
    where the sum is linear, where a value between the two is read elsewhere or not all is known."""
    algebra = _Algebra(step, Place(step.node.outputs[0]))
    expression = algebra.settled()
    if expression is None or _is_linear(expression):
        return None
    found = algebra.edges()
    if found is None or algebra.virtual:
        return None
    roots = {root for t in expression for root in t.factors}
    by_root = {r.value: algebra.slope(expression, r) for r in roots}
    known = {value: x for value, x in by_root.items() if x is not None}
    return Slopes(known, *found) if len(known) == len(roots) else None


class _Algebra:
    """One sum or product as an expression of roots: nodes are opened until no two have a source in
    common."""

    def __init__(self, step: Step, place: Place, pools: bool = False) -> None:
        self.step, self.place, self.pools = step, place, pools
        self.graph, self.dependence = step.graph, step.dependence
        self.opened = {place}
        self.means: dict[Place, Expression] = {}  # what stands for a mean, and for what it is of
        self.virtual: dict[Place, tuple[str, Signal]] = {}  # roots that are no value of the graph
        self.fresh: set[Place] = set()  # those of them that nothing else has a part in
        self.several: tuple[Place, ...] = ()  # roots of a function that can have but one

    def signal(self) -> Signal | None:
        """What is known of the expression, None where nothing is."""
        expression = self.settled()
        return None if expression is None else self._moments(expression)

    def settled(self) -> Expression | None:
        """The expression by roots of which no two have a source in common."""
        if self.children(self.place) is None:
            return None
        for _ in range(_MOST_OPENED):
            self.several = ()
            expression = self.expression(self.place)
            if expression is not None and len(expression) > _MOST_TERMS:
                return None
            tied = self.several if expression is None else self._tied(expression)
            if expression is not None and not tied:
                return expression
            if len(tied) == 2 and self._told_apart(*tied):
                continue
            # the later one is made of the other, if either is
            more = next((p for p in tied if self.children(p) is not None), None)
            if more is None:
                return None
            self.opened.add(more)
        return None

    def slope(self, expression: Expression, root: Place) -> Signal | None:
        """The derivative by a root."""
        made = []
        for term in expression:
            factors = dict(term.factors)
            if root in factors:
                own = factors.pop(root)
                if own is not None:
                    factors[root] = own[::-1]
                made.append(Term(term.number, factors))
        return self._moments(tuple(made))

    def edges(self) -> tuple[frozenset[str], frozenset[tuple[str, int]]] | None:
        """The values that are opened below the whole, and where roots enter; None where what is
        between is read elsewhere or moved."""
        inside = {p.value for p in self.opened}
        found: set[tuple[str, int]] = set()
        for place in self.opened:
            node = self.graph.producer.get(place.value)
            children = self.children(place)
            if node is None or children is None:
                return None
            if place != self.place and (
                place.value in self.graph.outputs
                or any(inside.isdisjoint(n.outputs)
                       for n in self.graph.consumers.get(place.value, ()))
            ):  # fmt: skip
                return None
            for i, child in enumerate(children):
                if child.value in self.graph.static:
                    continue
                if self.resolved(child) != child or child.axis >= 0:
                    return None
                if child.value not in inside:
                    found.add((node.id, i))
        return frozenset(inside - {self.place.value}), frozenset(found)

    # ------------------------------------------------------------------ places

    def resolved(self, place: Place) -> Place:
        """Where the elements of a place come from: the part of a concatenation, what was sliced."""
        while True:
            value, axis, start, stop = place
            value = self.dependence.first(value)
            shape = self.graph.shape(value)
            if axis >= 0 and shape is not None and (start, stop) == (0, shape[axis]):
                axis, start, stop = -1, 0, 0
            place = Place(value, axis, start, stop)
            node = self.graph.producer.get(value)
            before = None if node is None else self._before(node, place)
            if before is None:
                return place
            place = before

    def _before(self, node: Node, place: Place) -> Place | None:
        value, axis, start, stop = place
        if node.op == "expand" and axis < 0 and node.inputs[0] is not None:
            return Place(node.inputs[0])
        if node.op in ("identity", "cast"):
            kinds = {self.graph.values[v].dtype for v in (value, node.inputs[0] or value)}
            real = all(k is not None and "float" in k for k in kinds)
            return Place(node.inputs[0] or value, axis, start, stop) if real else None
        if node.op in ("slice", "split"):
            found = self._stretch(node, value)
            if found is None or axis not in (-1, found[0]):
                return None
            at, whole = found
            inside = whole[start:stop] if axis == at else whole
            return Place(node.inputs[0] or value, at, inside.start, inside.stop)
        if node.op == "concat" and node.attributes["axis"] == axis:
            for part in node.inputs:
                n = (self.graph.shape(part) or (None,) * (axis + 1))[axis]
                if part is None or n is None:
                    return None
                if start >= 0 and stop <= n:
                    return Place(part, axis, start, stop)
                start, stop = start - n, stop - n
        return None

    def _stretch(self, node: Node, value: str) -> tuple[int, range] | None:
        """The axis that a slice or split is of, and what it takes; None where it takes several."""
        shape = self.graph.shape(node.inputs[0])
        if shape is None:
            return None
        if node.op == "split":
            at, k = int(str(node.attributes["axis"])), node.outputs.index(value)
            sizes = [(self.graph.shape(v) or (None,) * len(shape))[at] for v in node.outputs]
            if None in sizes:
                return None
            edges = np.cumsum([0, *(n or 0 for n in sizes)])
            return at, range(int(edges[k]), int(edges[k + 1]))
        axes, steps = node.attributes["axes"], node.attributes["steps"]
        starts, ends = node.attributes["starts"], node.attributes["ends"]
        if not isinstance(axes, tuple) or len(axes) != 1 or steps != (1,):
            return None
        if not isinstance(starts, tuple) or not isinstance(ends, tuple):
            return None
        at = int(str(axes[0]))
        size = shape[at]
        return None if size is None else (
            at, range(size)[int(str(starts[0])) : int(str(ends[0]))])  # fmt: skip

    def children(self, place: Place) -> tuple[Place, ...] | None:
        """The operands of what makes a place, None where it is no function of single elements."""
        node = self.graph.producer.get(place.value)
        if node is None or node.guard or not self._opens(node, place):
            return None
        out = self.graph.shape(place.value)
        if out is None:
            return None
        found = []
        inputs = list(node.inputs)
        if stacked(self.graph, node):
            inputs = list(self.graph.producer[node.inputs[0] or ""].inputs)
        while inputs and inputs[-1] is None:  # such as a shift that is left out
            inputs.pop()
        for value in inputs:
            shape = self.graph.shape(value)
            if value is None or shape is None or len(shape) > len(out):
                return None
            axis = place.axis - (len(out) - len(shape))
            if place.axis < 0 or axis < 0 or (shape[axis] == 1 and out[place.axis] != 1):
                found.append(Place(value))
            else:
                found.append(Place(value, axis, place.start, place.stop))
        return tuple(found)

    def _opens(self, node: Node, place: Place) -> bool:
        if node.op in _NORMS:
            return self._is_steady(node, place)
        if node.op in ("mul", "div", "add", "sub"):
            return len(node.inputs) == 2
        if node.op == "avg_pool":
            return self.pools and place.axis < 0 and self._mixing(node) is not None
        return (
            node.op in ("neg", "pow", "square")
            or stacked(self.graph, node)
            or (len(node.inputs) == 1 and activation(node.op, node.attributes) is not None)
        )

    def _mixing(self, node: Node) -> Mixing | None:
        """A pool that leaves as many places as there were and keeps the mean."""
        mixing = averaging(replace(self.step, node=node))
        keeps = mixing is not None and all(
            np.allclose(m.weights.sum(axis=1), 1.0) for m in mixing.maps
        )
        return mixing if mixing is not None and keeps and mixing.square else None

    def _is_steady(self, node: Node, place: Place) -> bool:
        """Whether a norm's mean and length are nearly what they are expected to be."""
        x = self.step.signals.get(node.inputs[0] or "", UNKNOWN_SIGNAL)
        shape = self.graph.shape(node.inputs[0])
        if shape is None or len(x.roles) != len(shape) or None in shape or not x.variance:
            return False
        if node.op == "group_norm":
            over = list(range(1, len(shape)))
            groups = int(str(attribute(node.op, node.attributes, "groups")))
        else:
            over, groups = list(_ints(attribute(node.op, node.attributes, "axes"))), 1
        counts = [math.prod(shape[a] or 1 for a in over if x.roles[a] == role)
                  for role in ("feature", "position", "sample")]  # fmt: skip
        features, positions = counts[0] // groups, counts[1]
        square = feature_mean_square(x, features, positions)
        return (
            place.axis not in over and counts[2] == 1 and features * positions >= _FEWEST
            and square is not None and x.mean is not None
            and square - x.mean**2 <= _FAINT * x.variance
        )  # fmt: skip

    # ------------------------------------------------------------------ expressions

    def expression(self, place: Place) -> Expression | None:
        """A place by the roots below what is opened."""
        place = self.resolved(place)
        if place in self.means:
            return self.means[place]
        number = self.dependence.number(place.value, self.step.signals)
        if number is not None:
            return (Term(number, {}),)
        children = self.children(place) if place in self.opened else None
        node = self.graph.producer.get(place.value)
        if children is None or node is None:
            return (Term(1.0, {place: None}),)
        parts = [self.expression(child) for child in children]
        known = [p for p in parts if p is not None]
        return self._made(node, children, known) if len(known) == len(parts) else None

    def _made(
        self, node: Node, children: Sequence[Place], parts: Sequence[Expression]
    ) -> Expression | None:
        first = parts[0]
        if stacked(self.graph, node):
            whole = self._sum(*parts)
            return _times(whole, 1 / len(parts)) if node.op == "reduce_mean" else whole
        if node.op in ("add", "sub"):
            return self._sum(first, _times(parts[1], 1.0 if node.op == "add" else -1.0))
        if node.op == "neg":
            return _times(first, -1.0)
        if node.op == "avg_pool":
            return self._pooled(node, first)
        if any(t.mixing is not None for part in parts for t in part):
            return self._of_pooled(node, children, parts)
        if node.op == "mul":
            return self._product(first, parts[1])
        if node.op == "div":
            below = self._of_one(parts[1], lambda x: 1 / x, lambda x: -1 / x**2, away=True)
            return None if below is None else self._product(first, below)
        if node.op == "square":
            return self._product(first, first)
        if node.op == "pow":
            power = _constant(parts[1])
            if power is None or power != int(power) or not 0 < power <= 4:
                return None
            found: Expression | None = first
            for _ in range(int(power) - 1):
                found = None if found is None else self._product(found, first)
            return found
        if node.op in _NORMS:
            return self._normalised(node, children[0], parts)
        phi = activation(node.op, node.attributes)
        return None if phi is None else self._of_one(first, phi.function, phi.derivative)

    def _pooled(self, node: Node, x: Expression) -> Expression | None:
        """A pool of what is linear in its roots."""
        mixing = self._mixing(node)
        if mixing is None or not _is_linear(x):
            return None
        made = []
        for t in x:
            m = mixing if t.mixing is None else mixing.after(t.mixing)
            if m is None:
                return None
            made.append(Term(t.number, t.factors, m) if t.factors else t)
        return tuple(made)

    def _of_pooled(
        self, node: Node, children: Sequence[Place], parts: Sequence[Expression]
    ) -> Expression | None:
        """Of what has been through a pool: products with numbers and norms."""
        if node.op in _NORMS and all(_constant(p) is not None for p in parts[1:]):
            return self._normalised(node, children[0], parts)
        if node.op in ("mul", "div") and (number := _constant(parts[1])):
            return _times(parts[0], number if node.op == "mul" else 1 / number)
        if node.op == "mul" and (number := _constant(parts[0])) is not None:
            return _times(parts[1], number)
        return None

    def _sum(self, *expressions: Expression) -> Expression:
        """With what is alike put together: numbers, multiples of a product of elements, functions
        of a single root."""
        found: dict[object, Term] = {}
        for term in (t for e in expressions for t in e):
            arrays = [f for f in term.factors.values() if f is not None]
            key: object = (frozenset(term.factors), term.mixing)
            if arrays:
                key = (key, "function") if len(term.factors) == 1 else (key, id(term))
            before = found.get(key)
            if before is None:
                found[key] = term
            elif not arrays:
                found[key] = Term(before.number + term.number, term.factors, term.mixing)
            else:
                (root, one), (two,) = next(iter(before.factors.items())), arrays
                assert one is not None
                found[key] = Term(1.0, {root: before.number * one + term.number * two})
        return tuple(t for t in found.values() if t.number != 0.0)

    def _product(self, a: Expression, b: Expression) -> Expression | None:
        if len(a) * len(b) > _MOST_TERMS:
            return None
        made = []
        for s in a:
            for t in b:
                mixing = s.mixing or t.mixing
                if mixing is not None and s.factors and t.factors:
                    return None
                if mixing is not None:
                    made.append(Term(s.number * t.number, {**s.factors, **t.factors}, mixing))
                    continue
                factors = {**s.factors, **t.factors}
                for root in s.factors.keys() & t.factors.keys():
                    f, g = self._values(root, s), self._values(root, t)
                    factors[root] = np.stack([f[0] * g[0], f[1] * g[0] + f[0] * g[1]])
                made.append(Term(s.number * t.number, factors))
        return self._sum(tuple(made))

    def _of_one(
        self, x: Expression, function: Function, derivative: Function, away: bool = False
    ) -> Expression | None:
        """A function of an expression of one root; of one that stays ``away`` from zero."""
        roots = {root for term in x for root in term.factors}
        if len(roots) > 1:
            self.several = self._latest_first(roots)
            return None
        if not roots:
            number = function(np.array([_constant(x) or 0.0]))
            return (Term(float(number[0]), {}),) if np.isfinite(number).all() else None
        root = roots.pop()
        value, slope = np.zeros_like(self._points(root)[0])
        for t in x:
            value += t.number * (self._values(root, t)[0] if t.factors else 1.0)
            slope += t.number * (self._values(root, t)[1] if t.factors else 0.0)
        if away and (value.min() <= 0 <= value.max() or np.abs(value).min() < 1e-3):
            return None
        with np.errstate(all="ignore"):
            made = np.stack([function(value), derivative(value) * slope])
        return (Term(1.0, {root: made}),) if np.isfinite(made).all() else None

    def _normalised(
        self, node: Node, below: Place, parts: Sequence[Expression]
    ) -> Expression | None:
        """γ·(x − E x)/√(Var x + ε) + β over many features."""
        x = self.signal_at(self.resolved(below))
        if x.second_moment is None or x.mean is None or x.variance is None:
            return None
        eps = float(str(attribute(node.op, node.attributes, "eps")))
        centred = node.op != "rms_norm"
        size = x.variance if centred else x.second_moment
        if size + eps <= 0:
            return None
        y = self._sum(parts[0], (Term(-x.mean if centred else 0.0, {}),))
        # a set of n elements is divided by its own length s: E[x y] = E s, which is less than √E s²
        n = self._freedom(node, below) - (1 if centred else 0)
        tie = math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2)) / math.sqrt(n / 2)
        tie *= math.sqrt(n / (n + 1)) if centred else 1.0
        rest = Place(f"{below.value} beside its norm at {node.id}")
        self.fresh.add(rest)
        left = max(1 - tie * tie, 0.0) * size / (size + eps)
        self.virtual[rest] = (below.value, Signal(
            0.0, left, x.position_correlation, x.sample_correlation, x.odd_in, 0, x.roles,
            gaussian=True, cross_correlation=x.cross_correlation, nearby=x.nearby))  # fmt: skip
        scaled_down: Expression | None = self._sum(
            _times(y, tie / math.sqrt(size + eps)), (Term(1.0, {rest: None}),)
        )
        if len(parts) > 1 and scaled_down is not None:
            scaled_down = self._product(scaled_down, parts[1])
        if len(parts) > 2 and scaled_down is not None:
            scaled_down = self._sum(scaled_down, parts[2])
        return scaled_down

    def _freedom(self, node: Node, below: Place) -> float:
        """How many independent elements a norm runs over."""
        x, shape = self.signal_at(self.resolved(below)), self.graph.shape(node.output) or ()
        over = range(1, len(shape)) if node.op == "group_norm" else _ints(
            attribute(node.op, node.attributes, "axes"))  # fmt: skip
        groups = attribute(node.op, node.attributes, "groups") if node.op == "group_norm" else 1
        sizes = {role: math.prod(shape[a] or 1 for a in over if x.roles[a] == role)
                 for role in ("feature", "position")}  # fmt: skip
        c = max(x.position_correlation or 0.0, 0.0)
        spots = sizes["position"] / (1 + (sizes["position"] - 1) * c * c)
        return max(sizes["feature"] / int(str(groups)) * spots, 2.0)

    # ------------------------------------------------------------------ roots

    def signal_at(self, place: Place) -> Signal:
        """The signal of a place, broadcast to the shape of the whole."""
        value, x = self.virtual.get(place, (place.value, None))
        x = self.step.signals.get(value, UNKNOWN_SIGNAL) if x is None else x
        shape, out = self.graph.shape(value), self.graph.shape(self.place.value)
        if place.axis >= 0:
            x = taken(x, place.axis, range(place.start, place.stop))
        if shape is None or out is None:
            return Signal()
        roles = self._roles(len(out))
        if len(shape) == len(out) and (x.roles == roles or not roles):
            own = [n for a, n in enumerate(shape) if a != place.axis]
            if own == [n for a, n in enumerate(out) if a != self.place.axis]:
                return x
        if not roles:
            return Signal()
        return broadcast(x, shape, out, roles)

    def _roles(self, rank: int) -> tuple[Role, ...]:
        """The roles of the whole: those of an operand that has samples."""
        found: tuple[Role, ...] = ()
        for value in self.step.node.inputs:
            x = self.step.signals.get(value or "", UNKNOWN_SIGNAL)
            if len(x.roles) == rank and ("sample" in x.roles or not found):
                found = x.roles
        return found

    def _points(self, root: Place) -> tuple[Floats, Floats, tuple[float, ...]]:
        """[r, 1] at the quadrature points, their weights, and where r is zero."""
        x = self.signal_at(root)
        mean, deviation = x.mean or 0.0, math.sqrt(x.variance or 0.0)
        kinks = (round(-mean / deviation, 12),) if deviation > 0 else ()
        z, w = nodes_and_weights(kinks)
        return np.stack([mean + deviation * z, np.ones_like(z)]), w, kinks

    def _values(self, root: Place, term: Term) -> Floats:
        own = term.factors[root]
        return self._points(root)[0] if own is None else own

    def _latest_first(self, roots: Iterable[Place]) -> tuple[Place, ...]:
        return tuple(sorted(roots, key=lambda r: (-self.dependence.place(self._base(r)), r)))

    def _base(self, root: Place) -> str:
        return self.virtual[root][0] if root in self.virtual else root.value

    # ------------------------------------------------------------------ means

    def _mean_of(self, place: Place) -> tuple[Place, float] | None:
        """What a place is the mean of, times a number: elements of its own shape or copies."""
        node = self.graph.producer.get(place.value)
        if place.axis >= 0 or node is None or node.op not in MEANS or node.inputs[0] is None:
            return None
        value = node.inputs[0]
        shape, out = self.graph.shape(value), self.graph.shape(place.value)
        if shape is None or out is None or len(shape) != len(out) or None in shape:
            return None
        same = all(n in (1, m) for n, m in zip(out, shape, strict=True))
        whole = node.op in ("reduce_mean", "reduce_sum") or (
            node.op == "adaptive_avg_pool" and math.prod(n or 1 for n in out[2:]) == 1)  # fmt: skip
        if node.op == "avg_pool" and not self.pools:
            whole = out == shape and not (
                attribute("avg_pool", node.attributes, "count_padding")
                and any(_ints(node.attributes["padding"]))
            )
        if not same or not whole:
            return None
        count = math.prod(n or 1 for n in shape) / max(math.prod(n or 1 for n in out), 1)
        return Place(value), count if node.op == "reduce_sum" else 1.0

    def _told_apart(self, a: Place, b: Place) -> bool:
        """Write a root x as its mean m and what is left of it, x = m + (x − m) with E m(x − m) = 0
        (independent for a normal x), and a mean of c·x + t as c·m + t."""
        for one, mean in ((a, b), (b, a)):
            found = self._mean_of(mean)
            if found is None or one in self.virtual or mean in self.virtual or one in self.means:
                continue
            line = self._line(found[0], one)
            x, m = self.signal_at(one), self.signal_at(mean)
            if line is None or x.second_moment is None or m.second_moment is None:
                continue
            slope, shift = line[0] * found[1], line[1] * found[1]
            if slope == 0.0 or x.mean is None or m.mean is None:
                continue
            inner = added(m, Signal(shift, shift**2, 1.0, 1.0, cross_correlation=1.0), -1.0)
            inner = scaled(inner, 1 / slope).but(gaussian=x.gaussian, odd_in=x.odd_in)
            rest = self._rest(x, inner)
            if rest is None:
                continue
            centre = Place(f"{one.value} in the mean {mean.value}")
            beside = Place(f"{one.value} beside the mean {mean.value}")
            self.virtual[centre] = (mean.value, inner)
            self.virtual[beside] = (one.value, rest)
            self.means[one] = (Term(1.0, {centre: None}), Term(1.0, {beside: None}))
            self.means[mean] = (Term(slope, {centre: None}), Term(shift, {}))
            return True
        return False

    def _line(self, place: Place, root: Place) -> tuple[float, float] | None:
        """(c, t) of what is c·root + t, opening what is between; None for anything else."""
        before = set(self.opened)
        for _ in range(_MOST_OPENED):
            expression = self.expression(place)
            roots = {r for t in expression or () for r in t.factors}
            if expression is not None and roots - self.fresh == {root} and _is_linear(expression):
                slope = sum(t.number for t in expression if root in t.factors)
                return slope, sum(t.number for t in expression if not t.factors)
            more = next(
                (
                    p
                    for p in self._latest_first(roots)
                    if p != root and p not in self.opened and self.children(p)
                ),
                None,
            )
            if more is None:
                break
            self.opened.add(more)
        self.opened = before
        return None

    def _rest(self, x: Signal, m: Signal) -> Signal | None:
        """x − m: what two elements have in common is what those of x have less those of m."""
        q = (x.second_moment or 0.0) - (m.second_moment or 0.0)
        if q < -_CLOSE * (x.second_moment or 0.0):
            return None
        q = max(q, 0.0)

        def less(name: str) -> float | None:
            c, d = (y.apart if name == "cross_correlation" else getattr(y, name) for y in (x, m))
            if c is None or d is None:
                return None
            return correlated(c * (x.second_moment or 0.0) - d * (m.second_moment or 0.0), q)

        return Signal(0.0, q, None, None, x.odd_in, 0, x.roles, gaussian=x.gaussian).but(
            **{name: less(name) for name in _PAIRS})  # fmt: skip

    def _is_maximum(self, root: Place) -> bool:
        """Whether a root is a maximum of normals: skewed, but not so that it matters here."""
        node = self.graph.producer.get(root.value)
        before = None if node is None else self.step.signals.get(node.inputs[0] or "")
        return node is not None and "max_pool" in node.op and before is not None and before.gaussian

    def _share(self, a: Place, b: Place, by_means: bool) -> bool:
        """Whether two roots have a source in common, or one a mean of a source of the other."""
        one, two = self._base(a), self._base(b)
        if {a, b} & self.fresh or (a in self.virtual and b in self.virtual):  # told apart
            return False
        if by_means:
            return one != two and self.dependence.by_means(one, two)
        if one == two:
            return not self._other_features(a, b)
        return self.dependence.common(one, two, a.axis >= 0 or b.axis >= 0)

    def _tied(self, expression: Expression) -> tuple[Place, ...]:
        """Roots, latest first, that the expression does not stand for as long as they are not
        opened: two with a source in common, or one that is not normal in a function; none."""
        roots = self._latest_first({r for t in expression for r in t.factors})
        alone = {r for t in expression for r, f in t.factors.items()
                 if len(t.factors) == 1 and f is None}  # fmt: skip
        other = {r for t in expression for r, f in t.factors.items()
                 if len(t.factors) > 1 or f is not None}  # fmt: skip
        for by_means in (
            False,
            True,
        ):  # what a mean is of is told from it once no two else are tied
            for a, b in combinations(roots, 2):
                one, two = self._base(a), self._base(b)
                if not self._share(a, b, by_means):
                    continue
                linear = {a, b} <= alone and not {a, b} & other
                if not linear or not self.dependence.separated(one, two, self.step.signals):
                    return a, b
        for root in roots:
            inside = any(t.factors.get(root) is not None for t in expression)
            if inside and not self.signal_at(root).gaussian and not self._is_maximum(root):
                return (root,)
        return ()

    def _other_features(self, a: Place, b: Place) -> bool:
        """Whether two places of one value are different features of it."""
        roles = self.step.signals.get(a.value, UNKNOWN_SIGNAL).roles
        apart = a.stop <= b.start or b.stop <= a.start
        return (a.axis == b.axis >= 0 and apart and a.axis < len(roles)
                and roles[a.axis] == "feature")  # fmt: skip

    # ------------------------------------------------------------------ moments

    def _moments(self, expression: Expression) -> Signal | None:
        signals = {r: self.signal_at(r) for t in expression for r in t.factors}
        if any(x.second_moment is None or x.mean is None for x in signals.values()):
            return None
        if _is_linear(expression):
            return self._linear(expression, signals)
        mean = sum(t.number * math.prod(self._mean(r, t) for r in t.factors) for t in expression)
        second = max(self._pairs(expression, signals, None) or 0.0, 0.0)
        if not math.isfinite(second) or not math.isfinite(mean):
            return None
        found = {
            name: correlated(self._pairs(expression, signals, name), second) for name in _PAIRS
        }
        side = 0
        if len(expression) == 1 and len(signals) == 1:
            value = self._values(next(iter(signals)), expression[0])[0] * expression[0].number
            side = int(value.min() >= 0) - int(value.max() <= 0)
        roles = next(iter(signals.values())).roles
        return Signal(mean, second, None, None, self._odd(expression, signals), side,
                      roles).but(**found)  # fmt: skip

    def _linear(self, expression: Expression, signals: Mapping[Place, Signal]) -> Signal:
        """Numbers times values that are uncorrelated but for their means."""
        if any(t.mixing is not None for t in expression):
            return self._after_pools(expression, signals)
        terms = []
        for term in sorted(expression, key=lambda t: not t.factors):  # numbers last
            n = term.number
            x = next((signals[r] for r in term.factors), None)
            terms.append(Signal(n, n * n, 1.0, 1.0, one_sided=(n > 0) - (n < 0),
                                cross_correlation=1.0) if x is None else scaled(x, n))  # fmt: skip
        whole = reduce(added, terms, Signal(0.0, 0.0, 1.0, 1.0, cross_correlation=1.0))
        if not self.dependence.reused:
            return whole
        reuse = Reuse.of(self.step)
        single = [(t.number, next(iter(t.factors))) for t in expression if t.factors]
        for (m, a), (n, b) in combinations(single, 2):
            if {a, b} & self.virtual.keys() or a.axis >= 0 or b.axis >= 0:
                continue
            found = reuse.beyond_means(a.value, b.value)
            whole = whole if found is None else plus(whole, 2 * m * n * found)
        return whole

    def _after_pools(self, expression: Expression, signals: Mapping[Place, Signal]) -> Signal:
        """The same where some have been through pools, root by root: Σ n_i n_j E[(M_i r)(M_j r)′]
        by displacement, and of the means, which pools keep, what is left."""
        axes, sizes = next((t.mixing.axes, t.mixing.sizes) for t in expression if t.mixing)
        plain = Mixing.none(axes, sizes)
        total = dict.fromkeys(("position_correlation", "sample_correlation"),
                              Field(sizes, np.zeros((1,) * len(axes)), 0.0))  # fmt: skip
        mean = sum(t.number for t in expression if not t.factors)
        total = {name: field.shifted(mean * mean) for name, field in total.items()}
        for root in {r: None for t in expression for r in t.factors}:
            x = signals[root]
            terms = [t for t in expression if root in t.factors]
            own = sum(t.number for t in terms) * (x.mean or 0.0)
            for name, field in total.items():
                inside = _field_of(x, name, sizes)
                if inside is None or x.roles[axes[0]] != "position":
                    return Signal(roles=x.roles)
                for i, s in enumerate(terms):
                    for t in terms[i:]:
                        factor = s.number * t.number * (1.0 if s is t else 2.0)
                        part = passed(inside, s.mixing or plain, t.mixing or plain)
                        field = field.plus(part, factor)
                total[name] = field
            total = {name: field.shifted(2 * mean * own) for name, field in total.items()}
            mean += own
        position, sample = total.values()
        second = max(position.second, 0.0)
        first = next(signals[r] for t in expression for r in t.factors)
        return Signal(
            mean, second, correlated(position.mean, second), correlated(sample.second, second),
            self._odd(tuple(replace(t, mixing=None) for t in expression), signals), 0, first.roles,
            gaussian=True, cross_correlation=correlated(sample.mean, second),
            nearby=position.nearby(axes),
        )  # fmt: skip

    def _mean(self, root: Place, term: Term) -> float:
        own = term.factors.get(root)
        if own is None:
            return self.signal_at(root).mean or 0.0
        return float(self._points(root)[1] @ own[0])

    def _pairs(
        self, expression: Expression, signals: Mapping[Place, Signal], name: str | None
    ) -> float | None:
        """E y², or E[y y′] of the pair of elements that a correlation is of."""
        total = 0.0
        for i, s in enumerate(expression):
            for j in range(i, len(expression)):
                t = expression[j]
                product = s.number * t.number * (1 if i == j else 2)
                for root in s.factors.keys() | t.factors.keys():
                    if product == 0.0:
                        break
                    both = self._pair(root, s, t, signals[root], name)
                    if both is None:
                        return None
                    product *= both
                total += product
        return total

    def _pair(
        self, root: Place, s: Term, t: Term, x: Signal, name: str | None
    ) -> float | None:  # fmt: skip
        """E f(r)g(r′) of one root: r′ = r, or another element of it."""
        if root not in s.factors or root not in t.factors:
            return self._mean(root, s if root in s.factors else t)
        q, mean, variance = x.second_moment or 0.0, x.mean or 0.0, x.variance or 0.0
        c = 1.0
        if name is not None:
            known = x.apart if name == "cross_correlation" else getattr(x, name)
            if known is None:
                return None
            c = known
        f, g = s.factors[root], t.factors[root]
        if f is None and g is None:
            return c * q
        points, weights, kinks = self._points(root)
        f, g = (points if h is None else h for h in (f, g))
        f, g = f[0], g[0]
        same = float(weights @ (f * g))
        if name is None or variance <= 0:
            return same
        rho = min(max((c * q - mean * mean) / variance, -1.0), 1.0)
        rows = hermite(kinks)
        series = (rows @ f) * (rows @ g)
        rest = same - float(series.sum())
        return float(series @ rho ** np.arange(series.size) + rest * rho**series.size)

    def _odd(
        self, expression: Expression, signals: Mapping[Place, Signal]
    ) -> tuple[Group, ...]:  # fmt: skip
        """The groups of weights whose flip flips the whole."""
        groups = dict.fromkeys(g for x in signals.values() for g in x.odd_in)
        return tuple(
            g for g in groups
            if all(self._parity(t, {r for r in t.factors if g in signals[r].odd_in}) == -1
                   for t in expression)
        )  # fmt: skip

    def _parity(self, term: Term, flipped: Iterable[Place]) -> int:
        """−1 where a term changes sign with some roots, 1 where it stays, 0 for neither."""
        sign = 1
        for root in flipped:
            own = self._values(root, term)[0]
            turned = own[::-1]
            scale = float(np.abs(own).max()) * 1e-9
            if np.abs(own + turned).max() <= scale:
                sign = -sign
            elif np.abs(own - turned).max() > scale:
                return 0
        return sign


def _field_of(x: Signal, name: str, sizes: tuple[int, ...]) -> Field | None:
    """K by displacement, of one sample or of two."""
    q, far = x.second_moment, x.position_correlation
    if name == "position_correlation":
        return None if q is None or far is None else Field.of(q, far, x.nearby, sizes)
    if q is None or x.sample_correlation is None or x.apart is None:
        return None
    return Field(sizes, np.full((1,) * len(sizes), q * x.sample_correlation), q * x.apart)


def _times(x: Expression, number: float) -> Expression:
    return tuple(replace(t, number=t.number * number) for t in x if t.number * number != 0.0)


def _is_linear(x: Expression) -> bool:
    """Whether an expression is a sum of numbers times roots."""
    return all(len(t.factors) <= 1 and all(f is None for f in t.factors.values()) for t in x)


def _ints(value: object) -> tuple[int, ...]:
    return tuple(int(str(n)) for n in value) if isinstance(value, tuple) else ()


def _constant(x: Expression) -> float | None:
    """What an expression without a root is."""
    return None if any(t.factors for t in x) else sum(t.number for t in x)
