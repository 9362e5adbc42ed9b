"""What the analysis hands to the rules: signals, structure, coverage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import OPS, UNKNOWN
from archlint.signal.moments import UNKNOWN_PREDICTION, UNKNOWN_SIGNAL, Prediction, Signal
from archlint.signal.propagate import propagate
from archlint.signal.structure import Segment, Structure, Trunk, find_structure

if TYPE_CHECKING:
    from archlint.signal.backward.fluctuation import Gradients
    from archlint.signal.spread import LogLaw


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much was understood. ``nodes`` counts those that carry or shape a signal or were
    folded; ``unmodelled`` maps a source op to how often it was not understood; ``cut_off`` counts
    the nodes whose signal is unknown because of one upstream. ``first`` is the first node that was
    not understood."""

    nodes: int
    modelled: int
    unmodelled: Mapping[str, int] = field(default_factory=dict)
    cut_off: int = 0
    first: Node | None = None


@dataclass(frozen=True)
class Analysis:
    """Everything a rule may read. One direction: nothing here is changed by a rule.

    ``signals`` are what is known on the way forward. The rest is worked out, and the code for it
    imported, when it is asked for: of a healthy network few rules look at gradients or at how far
    single draws lie apart.
    """

    graph: LayerGraph
    signals: Mapping[str, Signal]

    def signal(self, value: str | None) -> Signal:
        """The signal of a value id; unknown where there is none."""
        return self.signals.get(value, UNKNOWN_SIGNAL) if value is not None else UNKNOWN_SIGNAL

    @cached_property
    def coverage(self) -> Coverage:
        """How much of the graph was understood."""
        return coverage(self.graph, self.signals)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Stretches of layers without a length reset."""
        return self._structure.segments

    @property
    def trunks(self) -> tuple[Trunk, ...]:
        """Chains of residual blocks."""
        return self._structure.trunks

    def laws(self, part: Segment | Trunk) -> tuple[LogLaw | None, LogLaw | None]:
        """Of ln M at the end of a part over that at its start, over initializations, and of ln of
        the squared gradient the other way round; None where not known."""
        from archlint.signal.predictions import laws

        return laws(part, self.signals, self._predicted[1])

    def prediction(self, value: str | None) -> Prediction:
        """The signal of a value id, with its gradient and spreads; unknown where there is none."""
        return self._predicted[0].get(value or "", UNKNOWN_PREDICTION)

    @cached_property
    def _structure(self) -> Structure:
        return find_structure(self.graph, self.signals)

    @cached_property
    def _predicted(self) -> tuple[Mapping[str, Prediction], Gradients]:
        from archlint.signal.predictions import predict

        return predict(self.graph, self.signals)


def analyse(graph: LayerGraph) -> Analysis:
    """Propagate signals through a graph (design: the signal engine)."""
    return Analysis(graph, propagate(graph))


def coverage(graph: LayerGraph, signals: Mapping[str, Signal]) -> Coverage:
    """Count the nodes that were understood, those computed statically included.

    A node is *unmodelled* where its op is unknown, or where its inputs are known and yet nothing
    can be said of what it computes; nodes downstream of such a one are *cut off*.
    """
    unmodelled: Counter[str] = Counter()
    cut_off = 0
    first: Node | None = None
    for node in graph.walk():
        if node.op == UNKNOWN:
            unmodelled[node.source_op] += 1
            first = first or node
    for node in graph.nodes:
        if node.op == UNKNOWN or not _carries_signal(graph, node):
            continue
        if any(signals.get(out, UNKNOWN_SIGNAL).known for out in node.outputs):
            continue
        carriers = [v for v in node.inputs if v and "float" in (graph.values[v].dtype or "")]
        if carriers and all(signals.get(v, UNKNOWN_SIGNAL).known for v in carriers):
            unmodelled[node.source_op] += 1
            first = first or node
        else:  # downstream of an unknown, or made from integers, which carry no signal
            cut_off += 1
    nodes = graph.folded + sum(1 for _ in graph.walk())
    return Coverage(nodes, nodes - sum(unmodelled.values()), dict(sorted(unmodelled.items())),
                    cut_off, first)  # fmt: skip


def _carries_signal(graph: LayerGraph, node: Node) -> bool:
    """Whether a node computes real numbers, rather than integers or truth values.

    Below an unknown op the type may be unknown too: it is taken for a real one.
    """
    if node.op in OPS and OPS[node.op].kind == "index":
        return False
    return any("float" in (graph.values[out].dtype or "float") for out in node.outputs)
