"""What tensors have in common because one layer made both.

In a stack of blocks that share their weights, x₂ = x₁ + f(x₁) and x₁ = x₀ + f(x₀), the two branches
are correlated through f. For one affine map with independent weights of mean zero

    E[(W x)(W x′)] = n E w² E[x x′],

so that E[f(x₁)·x₁] follows from E[x₁ x₀], layer by layer: two normal pre-activations of one
activation by Mehler's series, sums term by term, norms at their expected length. ``Shared`` holds
E[u v] for elements at one place, at two positions, in two samples, and at both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import OPS, attribute
from archlint.signal.activations import Activation, activation
from archlint.signal.dependence import AFFINE, Dependence
from archlint.signal.gaussian import hermite_coefficients
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.slopes import slope_mean
from archlint.signal.transfer import Step, correlated

Shared = npt.NDArray[np.float64]

_MOVED = frozenset({"reshape", "transpose", "split", "slice", "select_index", "identity", "cast",
                    "dropout", "drop_path"})  # fmt: skip
_CENTRED = {"layer_norm": True, "group_norm": True, "rms_norm": False}
_MOST_PAIRS = 12_000  # of tensors that are looked at in one graph
_DEEPEST = 150  # pairs that lead from one to the next


def with_reuse(step: Step, y: Signal, factor: float) -> Signal:
    """A sum a + factor·b of which no more than the means was taken to be in common, with what is
    in common through layers that are used twice."""
    a, b = step.value(0), step.value(1)
    if not step.dependence.reused or a is None or b is None or not y.known:
        return y
    if step.graph.shape(a) != step.graph.shape(b):
        return y
    found = Reuse.of(step).beyond_means(a, b)
    return y if found is None else plus(y, 2 * factor * found)


def plus(y: Signal, extra: Shared) -> Signal:
    """A signal with something added to what its elements have in common."""
    if y.second_moment is None or not extra.any():
        return y
    q = y.second_moment
    second = max(q + float(extra[0]), 0.0)

    def moved(c: float | None, more: float) -> float | None:
        return None if c is None else correlated(c * q + more, second)

    return y.but(
        second_moment=second, position_correlation=moved(y.position_correlation, float(extra[1])),
        sample_correlation=moved(y.sample_correlation, float(extra[2])),
        cross_correlation=moved(y.apart, float(extra[3])), nearby=None, law=None,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _series(phi: Activation, mean: float, deviation: float) -> Shared:
    kinks = phi.standard_kinks(mean, deviation)
    return hermite_coefficients(lambda z: phi.function(mean + deviation * z), kinks)


class Reuse:
    """Pairs of tensors of one graph, each worked out once."""

    def __init__(
        self, graph: LayerGraph, signals: Mapping[str, Signal], dependence: Dependence
    ) -> None:
        self.graph, self.signals, self.dependence = graph, signals, dependence
        self._depth = 0

    @staticmethod
    def of(step: Step) -> Reuse:
        """For a node's inputs."""
        return Reuse(step.graph, step.signals, step.dependence)

    def beyond_means(self, u: str, v: str) -> Shared | None:
        """E[u v] − E u·E v, None where it is not known."""
        x, y = self._signal(u), self._signal(v)
        found = self.pair(u, v)
        if found is None or x.mean is None or y.mean is None:
            return None
        return found - x.mean * y.mean

    def pair(self, u: str, v: str) -> Shared | None:
        """E[u v]; of tensors that no layer made both of, the product of the means."""
        u, v = self.dependence.first(u), self.dependence.first(v)
        if u == v:
            return self._own(u)
        known = self.dependence.pairs
        key = (u, v) if u < v else (v, u)
        if key in known:
            return known[key]
        if len(known) > _MOST_PAIRS or self._depth > _DEEPEST:
            self.dependence.reused = False  # a stack too deep to be followed is not followed
            return None
        known[key] = None  # until it is found
        self._depth += 1
        found = self._pair(u, v)
        self._depth -= 1
        known[key] = found
        return found

    def _pair(self, u: str, v: str) -> Shared | None:
        one, two = self.graph.producer.get(u), self.graph.producer.get(v)
        x, y = self._signal(u), self._signal(v)
        if x.mean is None or y.mean is None:
            return None
        if one is not None and two is not None and self._alike(one, two, u, v):
            found = self._of_one_layer(one, two, u, v)
            if found is not None:
                return found
        later, earlier = (u, v) if self.dependence.place(u) > self.dependence.place(v) else (v, u)
        for opened, other in ((later, earlier), (earlier, later)):
            found = self._opened(opened, other)
            if found is not None:
                return found
        return np.full(4, x.mean * y.mean)

    def _signal(self, value: str) -> Signal:
        return self.signals.get(value, UNKNOWN_SIGNAL)

    def _own(self, value: str) -> Shared | None:
        x = self._signal(value)
        if x.second_moment is None or x.position_correlation is None:
            return None
        if x.sample_correlation is None or x.apart is None:
            return None
        return x.second_moment * np.array(
            [1.0, x.position_correlation, x.sample_correlation, x.apart]
        )

    # ------------------------------------------------------------------ two uses of one layer

    def _alike(self, one: Node, two: Node, u: str, v: str) -> bool:
        return (
            one.op == two.op and one.attributes == two.attributes
            and len(one.inputs) == len(two.inputs)
            and one.outputs.index(u) == two.outputs.index(v)
            and self.graph.shape(u) == self.graph.shape(v)
        )  # fmt: skip

    def _of_one_layer(self, one: Node, two: Node, u: str, v: str) -> Shared | None:
        a, b = one.inputs[0], two.inputs[0]
        if a is None or b is None:
            return None
        if one.op in AFFINE:
            return self._of_weights(one, two, a, b)
        if one.op in _CENTRED:
            return self._of_norms(one, two, a, b)
        if one.op in _MOVED:
            return self.pair(a, b)
        if one.op == "attention":
            return self._averaged(one.inputs[2], two.inputs[2])
        if one.op == "matmul" and self._sums_to_one(a) and self._sums_to_one(b):
            return self._averaged(one.inputs[1], two.inputs[1])
        if one.op == "mul" and one.inputs[1] is not None and two.inputs[1] is not None:
            gates = self.pair(one.inputs[1], two.inputs[1])
            found = self.pair(a, b)
            apart = not self.dependence.common(a, one.inputs[1])
            return found * gates if apart and found is not None and gates is not None else None
        phi = activation(one.op, one.attributes) if len(one.inputs) == 1 else None
        return None if phi is None else self._of_activations(phi, a, b)

    def _of_weights(self, one: Node, two: Node, a: str, b: str) -> Shared | None:
        if one.inputs[1] is None or not self._same_weights(one, two):
            return None
        weight = self._signal(one.inputs[1])
        x, y = self._signal(a), self._signal(b)
        left, right = self._signal(one.output), self._signal(two.output)
        bias = self._signal(one.inputs[2]) if len(one.inputs) > 2 and one.inputs[2] else None
        shift = 0.0 if bias is None else bias.second_moment
        found = self.pair(a, b)
        if weight.mean != 0.0 or found is None or shift is None or not weight.second_moment:
            return None
        if not x.second_moment or not y.second_moment:
            return None
        if left.second_moment is None or right.second_moment is None:
            return None
        gains = [max(q - shift, 0.0) for q in (left.second_moment, right.second_moment)]
        gain = math.sqrt(gains[0] / x.second_moment * gains[1] / y.second_moment)
        return gain * found + shift

    def _same_weights(self, one: Node, two: Node) -> bool:
        return self.dependence.equal(one.inputs[1:], two.inputs[1:], self.signals)

    def _of_norms(self, one: Node, two: Node, a: str, b: str) -> Shared | None:
        if not self._same_weights(one, two):
            return None
        x, y, found = self._signal(a), self._signal(b), self.pair(a, b)
        sizes = [self._size(one, x), self._size(two, y)]
        if found is None or sizes[0] is None or sizes[1] is None or x.mean is None:
            return None
        gamma, beta = self._scales(one)
        if gamma is None or beta is None or y.mean is None:
            return None
        centre = x.mean * y.mean if _CENTRED[one.op] else 0.0
        return gamma[1] * (found - centre) / (sizes[0] * sizes[1]) + beta[1]

    def _size(self, node: Node, x: Signal) -> float | None:
        """What a norm divides by."""
        size = x.variance if _CENTRED[node.op] else x.second_moment
        eps = float(str(attribute(node.op, node.attributes, "eps")))
        return math.sqrt(size + eps) if size is not None and size + eps > 0 else None

    def _scales(
        self, node: Node
    ) -> tuple[tuple[float, float] | None, tuple[float, float] | None]:  # fmt: skip
        """(mean, second moment) of γ and of β."""
        found: list[tuple[float, float] | None] = []
        for i, number in ((1, 1.0), (2, 0.0)):
            value = node.inputs[i] if i < len(node.inputs) else None
            s = Signal(number, number) if value is None else self._signal(value)
            known = s.mean is not None and s.second_moment is not None
            found.append((s.mean or 0.0, s.second_moment or 0.0) if known else None)
        return found[0], found[1]

    def _averaged(self, a: str | None, b: str | None) -> Shared | None:
        """Two averages over positions with weights of about 1/T."""
        shape = self.graph.shape(a)
        keys = shape[-2] if shape is not None and len(shape) > 1 else None
        found = self.pair(a, b) if a is not None and b is not None else None
        if found is None or not keys:
            return None
        inside = (found[0] + (keys - 1) * found[1]) / keys
        between = (found[2] + (keys - 1) * found[3]) / keys
        return np.array([inside, inside, between, between])

    def _sums_to_one(self, value: str) -> bool:
        """Whether rows are those of a softmax."""
        node = self.graph.producer.get(value)
        while node is not None and node.op in ("dropout", "identity", "cast"):
            node = self.graph.producer.get(node.inputs[0] or "")
        return node is not None and node.op == "softmax"

    def _of_activations(self, phi: Activation, a: str, b: str) -> Shared | None:
        x, y, found = self._signal(a), self._signal(b), self.pair(a, b)
        if found is None or x.mean is None or y.mean is None or not x.variance or not y.variance:
            return None
        size = math.sqrt(x.variance * y.variance)
        one = _series(phi, round(x.mean, 9), round(math.sqrt(x.variance), 9))
        two = _series(phi, round(y.mean, 9), round(math.sqrt(y.variance), 9))
        rho = np.clip((found - x.mean * y.mean) / size, -1.0, 1.0)
        return np.asarray((one * two) @ rho[None, :] ** np.arange(one.size)[:, None], np.float64)

    # ------------------------------------------------------------------ what one is made of

    def _opened(self, value: str, other: str) -> Shared | None:
        """E[u v] by what u is made of, None where it is a layer of its own."""
        node = self.graph.producer.get(value)
        y = self._signal(other)
        if node is None or y.mean is None or node.inputs[0] is None:
            return None
        if self.graph.shape(node.inputs[0]) != self.graph.shape(value):
            return None
        if node.op in ("add", "sub") and len(node.inputs) == 2:
            sign = 1.0 if node.op == "add" else -1.0
            parts = [self._term(v, other) for v in node.inputs]
            if parts[0] is None or parts[1] is None:
                return None
            return parts[0] + sign * parts[1]
        if node.op in ("identity", "cast", "dropout", "drop_path"):
            return self.pair(node.inputs[0], other)
        if node.op in ("mul", "div") and len(node.inputs) == 2 and node.inputs[1] is not None:
            for v, w in ((0, 1), (1, 0)) if node.op == "mul" else ((0, 1),):
                number = self.dependence.number(node.inputs[w] or "", self.signals)
                if number:
                    found = self._term(node.inputs[v], other)
                    factor = number if node.op == "mul" else 1 / number
                    return None if found is None else factor * found
            return None
        x = self._signal(node.inputs[0])
        if node.op in _CENTRED:
            size, (gamma, beta) = self._size(node, x), self._scales(node)
            found = self.pair(node.inputs[0], other)
            if found is None or size is None or gamma is None or beta is None or x.mean is None:
                return None
            centre = x.mean * y.mean if _CENTRED[node.op] else 0.0
            return gamma[0] * (found - centre) / size + beta[0] * y.mean
        phi = activation(node.op, node.attributes) if len(node.inputs) == 1 else None
        if phi is None or OPS[node.op].kind not in ("activation", "arithmetic"):
            return None
        found = self.pair(node.inputs[0], other)
        if found is None or x.mean is None or not x.variance:
            return None
        slope = slope_mean(phi, round(x.mean, 9), round(x.variance, 9))  # Stein's lemma
        mean = phi.moments(x.mean, x.variance).mean
        return mean * y.mean + slope * (found - x.mean * y.mean)

    def _term(self, value: str | None, other: str) -> Shared | None:
        """E[u v] of a term, which may be a number or be copied along some axes."""
        if value is None:
            return None
        if self.graph.shape(value) == self.graph.shape(other):
            return self.pair(value, other)
        x, y = self._signal(value), self._signal(other)
        return None if x.mean is None or y.mean is None else np.full(4, x.mean * y.mean)
