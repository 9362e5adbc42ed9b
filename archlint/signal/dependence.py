"""What two tensors have in common beyond their means.

Every tensor that a layer with weights, a reduction or a pooling gives is a *source*, and so is
every input. What is made of it element by element depends on it, and a sum or product of several
depends on all of theirs. Two tensors without a common source are independent but for their means;
so are, in a sum, two of which one changes its sign with weights that the other does not contain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import OPS
from archlint.signal.moments import UNKNOWN_SIGNAL, Group, Signal

Floats = npt.NDArray[np.float64]

# Ops after which an element is still a function of one element (up to its place) of its inputs.
_ELEMENTWISE = frozenset(
    {"activation", "arithmetic", "layout", "random", "normalisation", "softmax"}
)
# Ops that give means, or sums, of which an element is one of the terms.
MEANS = frozenset({"reduce_mean", "reduce_sum", "avg_pool", "adaptive_avg_pool"})
_FAINT = 0.02  # the share of a mean's square in the square of an element that is left out
_EQUAL = 1e-9  # relative variance of elements that are all the same number
_MOST_WAYS = 2000  # in which the features of sources are picked on their way to one value
_FEW = 24  # sets that are compared before their names are
AFFINE = frozenset({"linear", "conv", "conv_transpose"})
_MOST_USES = 32  # of one layer that are told from each other


class Sources:
    """A set of sources, kept as the union of others so that one of a long sum costs no more than
    one of a short: a single ``name``, or ``parts``, of which ``picked`` tells which features are
    meant. All are made between the nodes ``first`` and ``last``."""

    __slots__ = ("first", "last", "name", "parts", "picked")

    def __init__(
        self, name: str, parts: tuple[Sources, ...], first: int, last: int, picked: str = ""
    ) -> None:
        self.name, self.parts, self.picked = name, parts, picked
        self.first, self.last = first, last

    @staticmethod
    def union(sets: Iterable[Sources], picked: str = "") -> Sources:
        """All of some sets."""
        parts = tuple(dict.fromkeys(sets))
        if len(parts) == 1 and not picked:
            return parts[0]
        return Sources("", parts, min(p.first for p in parts), max(p.last for p in parts), picked)

    def meets(self, other: Sources, whole: bool = False) -> bool:
        """Whether two sets have a source in common; ``whole``: whichever its features."""
        if self is other:
            return True
        first, last = max(self.first, other.first), min(self.last, other.last)
        if first > last:
            return False
        if not self._greatest().isdisjoint(other._greatest()):
            return True
        one, two = self._names(first, last, whole), other._names(first, last, whole)
        if one is None or two is None:  # whichever the features: nothing is missed
            return self.meets(other, whole=True)
        return _any_within(one, two) or _any_within(two, one)

    def _greatest(self) -> set[Sources]:
        """The greatest of the sets that this one is the union of."""
        found = [self]
        for at in found:
            if len(found) > _FEW:
                break
            if not at.picked:
                found += at.parts
        return set(found)

    def _names(self, first: int, last: int, whole: bool) -> set[tuple[str, ...]] | None:
        """The sources that are made between two nodes, each with the picks of its features that
        led here, first ones first, or ``whole``. None where ways to pick are too many, as in a
        recurrence over many steps."""
        names: set[tuple[str, ...]] = set()
        seen: set[tuple[Sources, tuple[str, ...]]] = {(self, ())}
        left = list(seen)
        while left:
            at, picked = left.pop()
            if at.first > last or at.last < first:
                continue
            if not at.parts:
                names.add((at.name, *picked))
            if at.picked and not whole:
                picked = (at.picked, *picked)
            more = {(part, picked) for part in at.parts} - seen
            seen |= more
            left += more
            if len(seen) > _MOST_WAYS and not whole:
                return None
        return names


def _any_within(one: set[tuple[str, ...]], two: set[tuple[str, ...]]) -> bool:
    """Whether any of the first is the same features as one of the second, or some of them."""
    return any(name[:n] in two for name in one for n in range(1, len(name) + 1))


class Dependence:
    """The sources of every value of a graph, filled in execution order by :meth:`follow`."""

    def __init__(self, graph: LayerGraph) -> None:
        self.graph = graph
        self._sources: dict[str, Sources] = {}
        self._means: dict[str, Sources] = {}  # what a value's elements are functions of means of
        self._seen: dict[object, Node] = {}
        self.remembered: dict[object, object] = {}  # what is worked out of values once
        self._same: dict[str, str] = {}  # value -> the first that is computed in the same way
        self.pairs: dict[tuple[str, str], Floats | None] = {}  # (signal.reuse)

    def sources(self, value: str) -> Sources:
        """What the elements of a value are functions of; itself where nothing else is known."""
        found = self._sources.get(value)
        if found is None:
            at = self.place(value)
            found = self._sources[value] = Sources(value, (), at, at)
        return found

    def common(self, a: str, b: str, whole: bool = False) -> bool:
        """Whether two values have a source in common; ``whole``: whichever its features."""
        return self.sources(a).meets(self.sources(b), whole)

    def by_means(self, a: str, b: str) -> bool:
        """Whether one of two values is made of means of what the other is made of, or of means
        of the same."""
        one, two = self._means.get(a), self._means.get(b)
        return (
            (one is not None and one.meets(self.sources(b)))
            or (two is not None and two.meets(self.sources(a)))
        )  # fmt: skip

    def chosen_by(self, value: str, index: str) -> bool:
        """Whether places in a value are told by what it is a function of, as by its own maximum."""
        seen, left = {index}, [index]
        while left:
            at = left.pop()
            node = self.graph.producer.get(at)
            if "float" in (self.graph.values[at].dtype or ""):
                if at not in self.graph.static and self.common(at, value, whole=True):
                    return True
                continue
            more = {v for v in (node.inputs if node is not None else ()) if v is not None} - seen
            seen |= more
            left += more
        return False

    def place(self, value: str) -> int:
        """Where in execution order a value is made; −1 before all."""
        node = self.graph.producer.get(value)
        return -1 if node is None else self.graph.index[node.id]

    def follow(self, node: Node, signals: Mapping[str, Signal]) -> None:
        """Learn the sources of a node's outputs."""
        kind = OPS[node.op].kind if node.op in OPS else ""
        before = self._repeats(node, signals) if kind != "random" else None
        if before is not None:  # the same once more
            for out, other in zip(node.outputs, before.outputs, strict=True):
                self._sources[out] = self.sources(other)
                self._same[out] = other
                if other in self._means:
                    self._means[out] = self._means[other]
            return
        if node.op in MEANS:
            self._follow_mean(node, signals)
        first = node.inputs[0] if node.inputs else None
        if first is None or kind not in _ELEMENTWISE:
            return
        found = [self.sources(v) for v in _computed(self.graph, node)]
        if not found:
            return
        means = [self._means[v] for v in _computed(self.graph, node) if v in self._means]
        if means:
            self._means.update((out, Sources.union(means)) for out in node.outputs)
        axes = _picked(node, signals.get(first, UNKNOWN_SIGNAL))
        for i, out in enumerate(node.outputs):
            if axes:  # parts that differ are different elements, equal ones the same
                part = f" {(*sorted(node.attributes.items()), i)}"
                self._sources[out] = Sources.union(found, part)
            else:
                self._sources[out] = Sources.union(found)

    def _follow_mean(self, node: Node, signals: Mapping[str, Signal]) -> None:
        """Remember what a mean is of, where an element counts for something in it."""
        value = node.inputs[0]
        x, y = (signals.get(v or "", UNKNOWN_SIGNAL) for v in (value, node.output))
        if value is None or not x.variance or y.variance is None or value in self.graph.static:
            return
        count = _size(self.graph, value) / max(_size(self.graph, node.output), 1)
        size = y.variance / count**2 if node.op == "reduce_sum" else y.variance
        if size > _FAINT * x.variance:
            means = [self.sources(value), *([self._means[value]] if value in self._means else [])]
            self._means[node.output] = Sources.union(means)

    def _repeats(self, node: Node, signals: Mapping[str, Signal]) -> Node | None:
        """An earlier node that computes the same of the same."""
        if node.guard or node.body is not None or not _computed(self.graph, node):
            return None
        inputs = tuple(self._key(v, signals) if v is not None else None for v in node.inputs)
        key = (node.op, inputs, tuple(sorted(node.attributes.items())), len(node.outputs))
        try:
            before = self._seen.setdefault(key, node)
        except TypeError:  # an attribute that is no key
            return None
        return None if before is node else before

    def _key(self, value: str, signals: Mapping[str, Signal]) -> object:
        """What a value is computed as: equal for two weights that start at one number."""
        number = self.number(value, signals)
        return self.first(value) if number is None else (number, self.graph.shape(value))

    def first(self, value: str) -> str:
        """The first value that is computed in the same way, such as a layer called once more."""
        return self._same.get(value, value)

    def separated(self, a: str, b: str, signals: Mapping[str, Signal]) -> bool:
        """Whether E[ab] = 0 since flipping the signs of some weights flips one of the two alone."""
        for one, other in ((a, b), (b, a)):
            groups = signals.get(one, UNKNOWN_SIGNAL).odd_in
            if any(not self._contains(other, group) for group in reversed(groups)):
                return True
        return False

    def _contains(self, value: str, group: Group) -> bool:
        """Whether a value is made of any of some parameters."""
        bits, made = self._made_of
        wanted = 0
        for parameter in group:
            wanted |= bits.get(parameter, 0)
        return bool(made.get(value, 0) & wanted)

    @cached_property
    def _made_of(self) -> tuple[dict[str, int], dict[str, int]]:
        """A bit for each parameter, and of each value those of the parameters it is made of."""
        bits: dict[str, int] = {}
        made: dict[str, int] = {}
        for node in self.graph.nodes:
            whole = 0
            for v in node.inputs:
                if v is None:
                    continue
                parameter = self.graph.values[v].parameter
                if parameter is not None:
                    copied = self.original(v) or parameter
                    made[v] = bits[parameter] = bits.setdefault(copied, 1 << len(bits))
                own = made.get(v, 0)
                joint = whole | own
                whole = own if joint == own else joint  # one number for all of a stream's values
            for v in node.outputs:
                made[v] = whole
        return bits, made

    @cached_property
    def reused(self) -> bool:
        """Whether a layer's random weights are used for several tensors, few enough that every two
        of them can be looked at."""
        return 1 < max(self._uses.values(), default=0) <= _MOST_USES

    @cached_property
    def _uses(self) -> Counter[str]:
        """How many layers read each random weight; one for all copies of it."""
        found: Counter[str] = Counter()
        for value in self.graph.values.values():
            parameter = self.graph.parameter(value.id)
            if parameter is None or (parameter.law is not None and not parameter.law.random):
                continue
            readers = self.graph.consumers.get(value.id, ())
            layers = sum(n.op in AFFINE for n in readers)
            found[parameter.clone_of or parameter.name] += layers
        return found

    def uses(self, weight: str | None) -> int:
        """How many layers read a random weight or a copy of it."""
        return self._uses[self.original(weight) or ""]

    def original(self, weight: str | None) -> str | None:
        """The weight that one was copied from, or itself: their elements are equal."""
        parameter = self.graph.parameter(weight)
        return weight if parameter is None else parameter.clone_of or parameter.name

    def equal(
        self, a: Sequence[str | None], b: Sequence[str | None], signals: Mapping[str, Signal]
    ) -> bool:
        """Whether weights have equal elements, one by one: copies, or such as start at a number."""

        def keys(values: Sequence[str | None]) -> list[object]:
            numbers = [None if v is None else self.number(v, signals) for v in values]
            return [self.original(v) if n is None else n
                    for v, n in zip(values, numbers, strict=True)]  # fmt: skip

        return keys(a) == keys(b)

    def number(self, value: str, signals: Mapping[str, Signal]) -> float | None:
        """What all elements of a value are, such as a weight's that starts at one number."""
        if value not in self.graph.static:
            return None
        constant = self.graph.constant(value)
        if constant is not None:
            return float(constant.reshape(-1)[0]) if constant.size == 1 else None
        s = signals.get(value, UNKNOWN_SIGNAL)
        if s.mean is None or s.second_moment is None:
            return None
        return s.mean if s.second_moment - s.mean**2 <= _EQUAL * s.second_moment else None


def _size(graph: LayerGraph, value: str) -> int:
    """The number of elements; 1 where it is not known."""
    return graph.values[value].size or 1


def _computed(graph: LayerGraph, node: Node) -> list[str]:
    """The inputs of a node that are no known numbers, each once: weights that are drawn, and what
    is computed of them, are such too."""
    return [v for v in dict.fromkeys(node.inputs) if v is not None and not _is_fixed(graph, v)]


def _is_fixed(graph: LayerGraph, value: str) -> bool:
    """Whether a value is known numbers or a weight that is not drawn."""
    parameter = graph.parameter(value)
    if parameter is None:
        return graph.constant(value) is not None
    return parameter.law is not None and not parameter.law.random


def _picked(node: Node, x: Signal) -> bool:
    """Whether a node takes some features: two such parts are different elements."""
    if node.op == "split" or node.op == "select_index":
        axes: object = (node.attributes["axis"],)
    elif node.op == "slice":
        axes = node.attributes["axes"]
    else:
        return False
    if not isinstance(axes, tuple):
        return False
    return any(a < len(x.roles) and x.roles[a] == "feature" for a in axes if isinstance(a, int))
