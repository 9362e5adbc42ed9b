"""Gradients, and how far single draws lie from the means: of values, segments and trunks."""

from __future__ import annotations

from collections.abc import Mapping

from archlint.graph.model import LayerGraph
from archlint.signal.backpropagate import Edges, backpropagate
from archlint.signal.backward.fluctuation import Gradients, layer_shares
from archlint.signal.fluctuation import Lengths
from archlint.signal.moments import UNKNOWN_SIGNAL, Prediction, Signal
from archlint.signal.spread import LogLaw, Shares, gradient_law, length_law
from archlint.signal.structure import Layer, Segment, Trunk, bias_second_moment

Signals = Mapping[str, Signal]


def predict(graph: LayerGraph, signals: Signals) -> tuple[dict[str, Prediction], Gradients]:
    """The signals of a graph with their gradients and spreads, and the laws that these are of."""
    edges = Edges()
    predictions = backpropagate(graph, signals, edges)
    lengths = Lengths(graph, predictions)
    gradients = Gradients(lengths, edges, predictions)
    for value, signal in predictions.items():
        law, back = lengths.total.get(value), gradients.total.get(value)
        predictions[value] = signal.but(
            spread=law.variance if law else None, shortfall=law.deficit if law else None,
            grad_second_moment=_times(signal.grad_second_moment, gradients.excess.get(value)),
            grad_spread=back.variance if back else None,
            grad_shortfall=back.deficit if back else None,
        )  # fmt: skip
    return predictions, gradients


def _times(second: float | None, factor: float | None) -> float | None:
    return second if second is None or factor is None else second * factor


def laws(
    part: Segment | Trunk, signals: Signals, gradients: Gradients
) -> tuple[LogLaw | None, LogLaw | None]:
    """Of ln M at the end of a part over that at its start, over initializations, and of ln of the
    squared gradient the other way round: over a segment the layers' own shares, and what the
    fluctuation of the length does to E φ′² (signal.spread). None where not known."""
    if isinstance(part, Trunk):
        forward = gradients.lengths.since(part.end, part.start)
        return forward, gradients.since(part.start, part.end)
    shares = [_shares(layer, signals, gradients) for layer in part.layers]
    known = [share for share in shares if share is not None]
    if len(known) < len(shares):
        return None, None
    return length_law(known), gradient_law(known)


def _shares(layer: Layer, signals: Signals, gradients: Gradients) -> Shares | None:
    """What a layer adds to the spread; None where that is not known."""
    bend = layer.activation
    if layer.fans is None or layer.pre_activation is None:
        return None
    if bias_second_moment(signals, layer.node) is None:
        return None
    if bend is not None and (layer.nonlinearity is None or not _known(signals, bend.inputs[0])):
        return None
    return layer_shares(gradients, layer.node, bend)


def _known(signals: Signals, value: str | None) -> bool:
    return signals.get(value or "", UNKNOWN_SIGNAL).known
