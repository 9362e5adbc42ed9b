"""Pattern recognition: what exporters and users spread over several nodes becomes one.

Every module of this package but the engine holds the patterns of one family and is found by being
here.
"""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from archlint.graph.model import LayerGraph
from archlint.graph.names import restore_parameter_names
from archlint.graph.patterns.engine import Rewriter, explain

__all__ = ["explain", "recognise"]

for _module in sorted(found.name for found in iter_modules(__path__)):
    import_module(f"{__name__}.{_module}")


def recognise(graph: LayerGraph) -> LayerGraph:
    """The graph with spread-out operations replaced by the vocabulary's own.

    LayerNorm, RMSNorm, GroupNorm, L2 normalisation, GELU, SiLU and the other activations,
    softmax, attention, linear maps with bias, weight normalisation; no-ops are taken out. The
    result computes the same values, passes ``verify``, and counts what left it in ``folded``.
    """
    return restore_parameter_names(Rewriter(graph).run())
