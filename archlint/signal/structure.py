"""The structure of a network: segments between length resets, residual trunks, widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from archlint.graph.model import LayerGraph, Node, Parameter
from archlint.signal.moments import Signal

Ending = Literal["linear", "one-sided", "normalised", "other", "unknown"]
Boundary = Literal["input", "norm", "add", "merge", "output", "unknown"]


@dataclass(frozen=True, slots=True)
class Layer:
    """An affine map and the activation that follows it, seen as one step of a segment.

    ``fan_in`` is the true number of terms in an output element's sum (k²·C_in/groups; transposed
    convolutions /stride²). ``width`` is the number of features a fluctuation averages over
    (channels, never C·H·W). ``gain`` is the squared-length factor from the layer's input to the
    activation's output, ``affine_gain`` up to the pre-activation. ``wanted_variance`` is the
    weight variance that makes ``gain`` one, 1/(fan_in·V(1)) (theory.md 8); None where no finite
    value does. ``spread`` is the layer's contribution to β = Var ln M (theory.md 5.2).
    ``padding_gain`` is the part of the gain that zero padding takes.
    """

    node: Node
    activation: Node | None
    weight: Parameter | None
    fan_in: int
    fan_out: int
    width: int
    gain: float | None
    affine_gain: float | None
    wanted_variance: float | None
    spread: float | None
    padding_gain: float = 1.0


@dataclass(frozen=True, slots=True)
class Segment:
    """A path of layers between two length resets, without residual adds inside.

    ``start`` and ``end`` are value ids; ``begins``, ``ends`` say what bounds the segment.
    ``log10_gain`` = Σ log10 gain over ``layers``, the linear head excluded (``head`` holds it);
    None where a layer is unknown. ``spread`` = β over the same layers.
    """

    layers: tuple[Layer, ...]
    start: str
    end: str
    begins: Boundary
    ends: Boundary
    log10_gain: float | None
    spread: float | None
    head: Layer | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """One residual add of a trunk: h ← skip + η·f(h).

    ``skip``, ``branch``, ``out`` are value ids, ``nodes`` the ids of the branch's nodes. ``scale``
    is η where the branch ends in a static factor (LayerScale, a scalar), else 1. ``gain`` is g =
    E‖f(h)‖²/E‖h‖² *without* η. ``ending`` is how the branch ends: a zero-mean linear map, a
    one-sided activation, a norm. ``normalised``: a length reset lies inside the branch.
    ``zero``: the branch is zero or tiny at initialization by design. ``identity_skip``: the skip
    path is the trunk itself (no projection). ``post_norm``/``post_activation``: what follows.
    ``last`` is the affine layer that writes into the trunk.
    """

    add: Node
    skip: str
    branch: str
    out: str
    nodes: tuple[str, ...]
    scale: float
    gain: float | None
    ending: Ending
    normalised: bool
    zero: bool
    identity_skip: bool
    post_norm: bool
    post_activation: Node | None
    last: Node | None


@dataclass(frozen=True, slots=True)
class Trunk:
    """The chain of adds of one residual stream, in order; resets on the trunk split trunks."""

    blocks: tuple[Block, ...]
    start: str
    end: str


def find_segments(graph: LayerGraph, signals: Mapping[str, Signal]) -> tuple[Segment, ...]:
    """The segments of a graph, in execution order."""
    raise NotImplementedError


def find_trunks(graph: LayerGraph, signals: Mapping[str, Signal]) -> tuple[Trunk, ...]:
    """The residual trunks of a graph, in execution order."""
    raise NotImplementedError
