"""The abstract interpreter: signals from the inputs to the outputs, and gradients back."""

from __future__ import annotations

from collections.abc import Mapping

from archlint.graph.model import LayerGraph
from archlint.signal.moments import Signal


def propagate(graph: LayerGraph) -> Mapping[str, Signal]:
    """The signal of every value of a graph, unknown where an op is not understood."""
    raise NotImplementedError
