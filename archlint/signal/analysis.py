"""What the analysis hands to the rules: signals, structure, coverage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import OPS, UNKNOWN
from archlint.signal.backpropagate import Edges, backpropagate
from archlint.signal.backward.fluctuation import Gradients
from archlint.signal.fluctuation import Lengths
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.propagate import propagate
from archlint.signal.structure import Segment, Trunk, find_structure


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


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything a rule may read. One direction: nothing here is changed by a rule."""

    graph: LayerGraph
    signals: Mapping[str, Signal]
    segments: tuple[Segment, ...]
    trunks: tuple[Trunk, ...]
    coverage: Coverage

    def signal(self, value: str | None) -> Signal:
        """The signal of a value id; unknown where there is none."""
        return self.signals.get(value, UNKNOWN_SIGNAL) if value is not None else UNKNOWN_SIGNAL


def analyse(graph: LayerGraph) -> Analysis:
    """Propagate signals through a graph and find its structure (design: the signal engine)."""
    signals, lengths, gradients = predict(graph)
    structure = find_structure(graph, signals, lengths, gradients)
    return Analysis(graph, signals, structure.segments, structure.trunks, coverage(graph, signals))


def predict(graph: LayerGraph) -> tuple[dict[str, Signal], Lengths, Gradients]:
    """The signals of a graph with their gradients and spreads, and the laws that these are of."""
    edges = Edges()
    signals = backpropagate(graph, propagate(graph), edges)
    lengths = Lengths(graph, signals)
    gradients = Gradients(lengths, edges)
    for value, signal in signals.items():
        law, back = lengths.total.get(value), gradients.total.get(value)
        signals[value] = signal.but(
            spread=law.variance if law else None, shortfall=law.deficit if law else None,
            grad_second_moment=_times(signal.grad_second_moment, gradients.excess.get(value)),
            grad_spread=back.variance if back else None,
            grad_shortfall=back.deficit if back else None,
        )  # fmt: skip
    return signals, lengths, gradients


def _times(second: float | None, factor: float | None) -> float | None:
    return second if second is None or factor is None else second * factor


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
