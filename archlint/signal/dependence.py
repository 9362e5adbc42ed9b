"""What two tensors have in common beyond their means.

Every tensor that a layer with weights, a reduction or a pooling gives is a *source*, and so is
every input. What is made of it element by element depends on it, and a sum or product of several
depends on all of theirs. Two tensors without a common source are independent but for their means;
so are, in a sum, two of which one changes its sign with weights that the other does not contain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations

from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import OPS
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal

Sources = frozenset[str]

# Ops after which an element is still a function of one element (up to its place) of its inputs.
_ELEMENTWISE = frozenset(
    {"activation", "arithmetic", "layout", "random", "normalisation", "softmax"}
)
_MOST_TERMS = 64  # of a sum that is taken apart
_EQUAL = 1e-9  # relative variance of elements that are all the same number
_MOST_STEPS = 2_000_000  # in all, back from sums to their weights


class Dependence:
    """The sources of every value of a graph, filled in execution order by :meth:`follow`."""

    def __init__(self, graph: LayerGraph) -> None:
        self.graph = graph
        self._sources: dict[str, Sources] = {}
        self._seen: dict[object, Node] = {}
        self._steps = 0
        self._same: dict[str, str] = {}  # value -> the first that is computed in the same way

    def sources(self, value: str) -> Sources:
        """What the elements of a value are functions of; itself where nothing else is known."""
        return self._sources.get(value) or frozenset((value,))

    def common(self, a: str, b: str) -> bool:
        """Whether two values have a source in common."""
        return not self.sources(a).isdisjoint(self.sources(b))

    def follow(self, node: Node, signals: Mapping[str, Signal]) -> None:
        """Learn the sources of a node's outputs."""
        kind = OPS[node.op].kind if node.op in OPS else ""
        before = self._repeats(node) if kind != "random" else None
        if before is not None:  # the same once more
            for out, other in zip(node.outputs, before.outputs, strict=True):
                self._sources[out] = self.sources(other)
                self._same[out] = other
            return
        first = node.inputs[0] if node.inputs else None
        if first is None or kind not in _ELEMENTWISE:
            return
        found = [self.sources(v) for v in _computed(self.graph, node)]
        if not found:
            return
        axes = _picked(node, signals.get(first, UNKNOWN_SIGNAL))
        for i, out in enumerate(node.outputs):
            if axes:  # parts that differ are different elements, equal ones the same
                part = (*sorted(node.attributes.items()), i)
                self._sources[out] = frozenset(f"{s} {part}" for s in frozenset().union(*found))
            else:
                self._sources[out] = found[0] if len(found) == 1 else frozenset().union(*found)

    def _repeats(self, node: Node) -> Node | None:
        """An earlier node that computes the same of the same."""
        if node.guard or node.body is not None or not _computed(self.graph, node):
            return None
        inputs = tuple(self._same.get(v, v) if v is not None else None for v in node.inputs)
        key = (node.op, inputs, tuple(sorted(node.attributes.items())), len(node.outputs))
        try:
            before = self._seen.setdefault(key, node)
        except TypeError:  # an attribute that is no key
            return None
        return None if before is node else before

    # ------------------------------------------------------------------ sums

    def separated(self, a: str, b: str, signals: Mapping[str, Signal]) -> bool:
        """Whether E[ab] = 0 since flipping the signs of some weights flips one of the two alone."""
        for one, other in ((a, b), (b, a)):
            groups = signals.get(one, UNKNOWN_SIGNAL).odd_in
            if not groups or self._steps > _MOST_STEPS:
                continue
            if any(map(self._weights(other).isdisjoint, groups)):
                return True
        return False

    def _weights(self, value: str) -> set[str]:
        """The parameters that a value is made of."""
        found: set[str] = set()
        seen = {value}
        left = [value]
        while left:
            at = left.pop()
            self._steps += 1
            parameter = self.graph.values[at].parameter
            if parameter is not None:
                found.add(parameter)
            node = self.graph.producer.get(at)
            for v in node.inputs if node is not None else ():
                if v is not None and v not in seen:
                    seen.add(v)
                    left.append(v)
        return found

    def terms(
        self, node: Node, signals: Mapping[str, Signal]
    ) -> tuple[tuple[str, float], ...] | None:
        """A sum of two dependent values as numbers times values that are uncorrelated but for
        their means: ``(x + f(x)) + x`` is 2·x + f(x). None where it cannot be taken apart so."""
        total: dict[str, float] = {}
        left = [(v, c) for v, c in self._summands(node, signals) or ()]
        for _ in range(8 * _MOST_TERMS):
            if not left:
                break
            value, factor = left.pop()
            value = self._same.get(value, value)
            producer = self.graph.producer.get(value)
            parts = None if producer is None else self._summands(producer, signals)
            if parts is None:
                total[value] = total.get(value, 0.0) + factor
            else:
                left += [(v, c * factor) for v, c in parts]
        total = {v: c for v, c in total.items() if c != 0.0}
        if left or not 0 < len(total) <= _MOST_TERMS:
            return None
        for a, b in combinations(total, 2):
            if self.common(a, b) and not self.separated(a, b, signals):
                return None
        return tuple(total.items())

    def _number(self, value: str, signals: Mapping[str, Signal]) -> float | None:
        """What all elements of a value are, such as a weight's that starts at one number."""
        constant = self.graph.constant(value)
        if constant is not None:
            return float(constant.reshape(-1)[0]) if constant.size == 1 else None
        s = signals.get(value, UNKNOWN_SIGNAL)
        if s.mean is None or s.second_moment is None or value not in self.graph.static:
            return None
        return s.mean if s.second_moment - s.mean**2 <= _EQUAL * s.second_moment else None

    def _summands(
        self, node: Node, signals: Mapping[str, Signal]
    ) -> list[tuple[str, float]] | None:
        """A node as a sum of numbers times values of its own shape, None where it is none."""
        shape = self.graph.shape(node.outputs[0])
        inputs = [v for v in node.inputs if v is not None]
        if node.op in ("add", "sub") and len(inputs) == 2:
            found = [(inputs[0], 1.0), (inputs[1], 1.0 if node.op == "add" else -1.0)]
        elif node.op in ("identity", "neg") and inputs:
            found = [(inputs[0], 1.0 if node.op == "identity" else -1.0)]
        elif node.op in ("mul", "div") and len(inputs) == 2:
            numbers = [self._number(v, signals) for v in inputs]
            i = next((i for i in (0, 1) if numbers[i] is not None), None)
            factor = math.nan if i is None else numbers[i] or 0.0
            if i is None or (node.op == "div" and i == 0):
                return None
            if not math.isfinite(factor) or (node.op == "div" and factor == 0.0):
                return None
            found = [(inputs[1 - i], factor if node.op == "mul" else 1 / factor)]
        else:
            return None
        fit = shape is not None and all(self.graph.shape(v) == shape for v, _ in found)
        return found if fit else None


def _computed(graph: LayerGraph, node: Node) -> list[str]:
    """The inputs of a node that are neither weights nor known numbers, each once; what is computed
    of weights alone is one too, since it is drawn with them."""
    return [
        v for v in dict.fromkeys(node.inputs)
        if v is not None and graph.values[v].parameter is None and graph.values[v].constant is None
    ]  # fmt: skip


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
