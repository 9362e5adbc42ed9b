"""What an experiment can measure of a stretch of layers."""

from __future__ import annotations

from archlint.finding import Claim
from archlint.signal.structure import Segment, Trunk

_HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu", "rrelu", "abs"})


def drift_claim(segment: Segment, drift: float, limit: float) -> Claim:
    """The claim that a segment's signal changes by ``drift`` decades.

    Where biases are no part of the length it is the length itself; elsewhere only what becomes of
    a small difference can be told from them, which is what the gradient is multiplied by.
    """
    gain, whole, slope = (
        segment.log10_gain, segment.log10_length_gain, segment.log10_slope_gain,
    )  # fmt: skip
    plain = gain is not None and whole is not None and abs(gain - whole) < 0.1
    # The recursion of moments is exact for the mean where the length that goes in only scales what
    # an activation gives; elsewhere it follows the length of a typical draw.
    scales = all(
        layer.activation is None or layer.activation.op in _HOMOGENEOUS for layer in segment.layers
    )
    if plain or slope is None:
        return Claim("length" if scales else "typical length", segment.end, segment.start, drift,
                     limit)  # fmt: skip
    return Claim("gradient" if scales else "typical gradient", segment.end, segment.start, slope,
                 limit)  # fmt: skip


def stretch_claim(segment: Segment, off: float, limit: float) -> Claim | None:
    """The claim behind a part ``off`` of a segment's drift, in decades: that of the whole segment,
    None where that is no such drift, the rest making up for the part."""
    drift = segment.log10_drift
    if drift is None or drift * off <= 0 or abs(drift) < limit:
        return None
    return drift_claim(segment, drift, limit)


def growth_claim(trunk: Trunk, growth: float, limit: float) -> Claim | None:
    """The claim that a residual stream grows by ``growth`` decades; None where blocks with a norm
    lie between, whose growth is no part of it."""
    if any(block.normalised for block in trunk.blocks):
        return None
    return Claim("length", trunk.end, trunk.start, growth, limit)
