"""What gradients have in common because they passed one layer twice.

For one affine map with independent weights of mean zero, E[(Wᵀg)(Wᵀg′)] is E[g g′] times what it
makes of E g²: gradients that come back through two uses of it add up where what arrived there did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

from archlint.graph.model import LayerGraph, Node
from archlint.signal.activations import activation
from archlint.signal.dependence import AFFINE, Dependence
from archlint.signal.gradient import Back, Gradient, Key, energy
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.reuse import Reuse
from archlint.signal.slopes import slope_mean, slope_pair

_Use = tuple[str, Gradient, float, Node]  # source, what arrived, gain on E g², the layer
_PICKS = frozenset({"select_index", "slice", "split"})
_MOST_MOVES = 8  # from values back to what made them


class Ties:
    """E[g g′] per element of two sources that uses of one layer are."""

    def __init__(
        self, graph: LayerGraph, signals: Mapping[str, Signal], dependence: Dependence
    ) -> None:
        self.graph, self.signals = graph, signals
        self._reuse = Reuse(graph, signals, dependence)
        self._dependence = dependence
        self._uses: dict[str, list[_Use]] = {}
        self._shared: dict[tuple[str, str], float] = {}

    def follow(
        self, step: Back, i: int, found: Gradient, sources: Mapping[str, Gradient]
    ) -> None:  # fmt: skip
        """Learn of a layer's use what it shares with others of it: of input ``i``."""
        node = step.node
        weight = self._weight(node, i) if self._dependence.reused else None
        if weight is None or step.gradient.zero or not found.second_moment:
            return
        own, g = f"{node.id}:{i}", step.gradient
        gain = found.second_moment / (g.second_moment or math.inf)
        uses = self._uses.setdefault(weight, [])
        for other, h, least, layer in uses:
            if self.graph.shape(layer.output) != self.graph.shape(node.output):
                continue
            both = sum(
                a * b * self._pair(s, t, sources)
                for s, a in g.origin.items()
                for t, b in h.origin.items()
            )
            both *= math.sqrt(gain * least) * self._bends(node.output, layer.output)
            most = math.sqrt(found.second_moment * (energy(other, sources) or 0.0))
            self._shared[own, other] = self._shared[other, own] = max(min(both, most), -most)
        uses.append((own, g, gain, node))

    def _weight(self, node: Node, i: int) -> str | None:
        """What a node is a use of: the weight of a layer; of what is picked from what a layer made,
        or averaged over positions, the pick and the layer's weight."""
        name = ""
        if node.op in _PICKS or (node.op == "attention" and i == 2):
            name = f"{node.op} {i} {sorted(node.attributes.items())} of "
        for _ in range(_MOST_MOVES if name else 1):
            value = node.inputs[i]
            if node.op in AFFINE and i == 0:
                weight = node.inputs[1]
                law = self.signals.get(weight or "", UNKNOWN_SIGNAL)
                used = self._dependence.uses(weight) > 1
                original = self._dependence.original(weight)
                return f"{name}{original}" if used and law.mean == 0.0 else None
            before = self.graph.producer.get(value or "")
            if before is None:
                return None
            node, i = before, 0
        return None

    def _pair(self, s: Key, t: Key, sources: Mapping[str, Gradient]) -> float:
        """E[g g′] of two sources, or of the same parts of them."""
        if s == t:
            return energy(s, sources) or 0.0
        if isinstance(s, str) or isinstance(t, str):
            return self._shared.get((s, t), 0.0) if isinstance(s, str) and isinstance(t, str) else 0
        if type(s) is not type(t) or s[1:] != t[1:]:
            return 0.0
        both = self._shared.get((s.source, t.source), 0.0)
        wholes = [energy(s.source, sources), energy(t.source, sources)]
        parts = [energy(s, sources), energy(t, sources)]
        if not both or not wholes[0] or not wholes[1]:
            return 0.0
        return both * math.sqrt((parts[0] or 0.0) * (parts[1] or 0.0) / (wholes[0] * wholes[1]))

    def _bends(self, u: str, v: str) -> float:
        """E φ′(u)φ′(v)/(E φ′(u)·E φ′(v)), where both pre-activations went into one activation."""
        nodes = [self.graph.consumers.get(z, ()) for z in (u, v)]
        if any(len(n) != 1 for n in nodes):
            return 1.0
        one, two = nodes[0][0], nodes[1][0]
        phi = activation(one.op, one.attributes) if len(one.inputs) == 1 else None
        x, y = self.signals.get(u, UNKNOWN_SIGNAL), self.signals.get(v, UNKNOWN_SIGNAL)
        if phi is None or one.op != two.op or one.attributes != two.attributes:
            return 1.0
        found = self._reuse.beyond_means(u, v)
        if found is None or x.mean is None or y.mean is None or not x.variance or not y.variance:
            return 1.0
        rho = float(found[0]) / math.sqrt(x.variance * y.variance)
        mean, variance = (x.mean + y.mean) / 2, math.sqrt(x.variance * y.variance)
        level = slope_mean(phi, mean, variance) ** 2
        pair = slope_pair(phi, mean, variance, min(max(rho, -1.0), 1.0))
        return pair / level if level > 1e-12 else 1.0

    def between(self, parts: Sequence[Gradient], sources: Mapping[str, Gradient]) -> float:
        """2 Σ_{i<j} E[g_i g_j] by sources that are uses of one layer."""
        if not self._shared:
            return 0.0
        return sum(
            2 * a * b * self._pair(s, t, sources)
            for g, h in combinations(parts, 2)
            for s, a in g.origin.items()
            for t, b in h.origin.items()
            if s != t
        )
