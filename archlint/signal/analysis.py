"""What the analysis hands to the rules: signals, structure, coverage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from archlint.graph.model import LayerGraph
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.propagate import propagate
from archlint.signal.structure import Segment, Trunk, find_segments, find_trunks


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much was understood. ``nodes`` counts those that carry or shape a signal or were
    folded; ``unmodelled`` maps a source op to how often it was not understood; ``cut_off`` counts
    the nodes whose signal is unknown because of one upstream."""

    nodes: int
    modelled: int
    unmodelled: Mapping[str, int] = field(default_factory=dict)
    cut_off: int = 0


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
    signals = propagate(graph)
    return Analysis(
        graph,
        signals,
        find_segments(graph, signals),
        find_trunks(graph, signals),
        coverage(graph, signals),
    )


def coverage(graph: LayerGraph, signals: Mapping[str, Signal]) -> Coverage:
    """Count the nodes that were understood."""
    raise NotImplementedError
