"""The backward sweep: the gradient of every value, from the outputs to the inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from itertools import combinations

import numpy as np

from archlint.graph.model import LayerGraph
from archlint.signal.backward.neighbours import with_neighbours
from archlint.signal.backward.normalisation import channel_variations
from archlint.signal.backward.reuse import Ties
from archlint.signal.dependence import Dependence
from archlint.signal.dominators import Dominators
from archlint.signal.elementwise import cross_terms, dependent
from archlint.signal.gradient import (
    BACKWARD,
    MOST_ORIGINS,
    UNKNOWN_GRADIENT,
    Back,
    Correlation,
    Gradient,
    Key,
    Mixed,
    Profile,
    Stretch,
    along_of,
    energy,
    field_of,
    no_gradient,
    shared,
    times,
    unbroadcast,
)
from archlint.signal.joint import Slopes, slopes
from archlint.signal.laws import NODES
from archlint.signal.moments import Prediction, Signal
from archlint.signal.neighbours import Field, Mixing, sizes_of

for _family in ("affine", "attention", "elementwise", "layout", "normalisation", "pooling",
                "recurrent"):  # fmt: skip
    import_module(f"archlint.signal.backward.{_family}")

_Sources = dict[str, Gradient]


@dataclass(slots=True)
class Edges:
    """What the backward sweep leaves: E g² of what each input (node id, place) sends ``back``, and
    the gradients' ``profiles`` along the axes of each value."""

    back: dict[tuple[str, int], float] = field(default_factory=dict)
    profiles: dict[str, Mapping[int, Profile]] = field(default_factory=dict)


def gradients(
    graph: LayerGraph, signals: Mapping[str, Signal], edges: Edges | None = None
) -> dict[str, Gradient]:
    """The gradient ∂⟨output, ξ⟩/∂v of every value v that a node makes, and of the inputs.

    ξ ~ N(0,1) is independent for every element of every output of real numbers. A value that no
    output depends on has the gradient 0; unknown is what an op without a backward function, or one
    whose signal is unknown, hands on. ``edges`` is filled in. One pass; cost linear in the number
    of nodes.
    """
    arriving: dict[str, list[Gradient]] = {}
    sources: _Sources = {}
    for out in dict.fromkeys(graph.outputs):
        if not _is_real(graph, out):
            continue
        rank = len(graph.shape(out) or ())
        sources[f"output:{out}"] = Gradient(1.0, (0.0,) * rank)
        arriving.setdefault(out, []).append(
            Gradient(1.0, (0.0,) * rank, origin={f"output:{out}": 1.0})
        )
    found: dict[str, Gradient] = {}
    variations = channel_variations(graph, signals)
    dependence = Dependence(graph)
    for node in graph.nodes:
        dependence.follow(node, signals)
    paths = _Paths(graph, signals, dependence)
    passes = _Passes(graph)
    ties = Ties(graph, signals, dependence)
    for node in reversed(graph.nodes):
        for out in node.outputs:
            g = _sum(graph, out, arriving.pop(out, []), sources, ties)
            if any(isinstance(key, Mixed) for key in g.origin) and out in passes.values:
                sources[f"value:{out}"] = g  # what is before gets all of its gradient from here
                g = g.but(origin={f"value:{out}": 1.0})
            found[out] = g
        step = Back(graph, node, signals, dependence, tuple(found[out] for out in node.outputs),
                    variations)  # fmt: skip
        _hand_on(step, arriving, sources, edges, paths, ties)
    for value in graph.inputs:
        found[value] = _sum(graph, value, arriving.pop(value, []), sources, ties)
    if edges is not None:
        edges.profiles.update((value, g.profile) for value, g in found.items() if g.profile)
    return found


def backpropagate(
    graph: LayerGraph, signals: Mapping[str, Signal], edges: Edges | None = None
) -> dict[str, Prediction]:
    """The signals with their gradients' second moment and position correlation filled in."""
    result = {value: Prediction(**vars(signal)) for value, signal in signals.items()}
    for value, g in gradients(graph, signals, edges).items():
        if value not in result or not _is_real(graph, value):
            continue
        result[value] = result[value].but(
            grad_second_moment=g.second_moment,
            grad_position_correlation=_of_positions(g, result[value], graph.shape(value)),
        )
    return result


def _is_real(graph: LayerGraph, value: str) -> bool:
    dtype = graph.values[value].dtype
    return dtype is None or "float" in dtype or "complex" in dtype


def _of_positions(g: Gradient, x: Signal, shape: Sequence[int | None] | None) -> Correlation:
    if g.second_moment is None or len(x.roles) != len(g.along):
        return None
    spots = [c for a, c in enumerate(g.along)
             if x.roles[a] == "position" and (shape is None or shape[a] != 1)]  # fmt: skip
    return None if not spots or any(c is None for c in spots) else min(c or 0.0 for c in spots)


def _hand_on(
    step: Back, arriving: dict[str, list[Gradient]], sources: _Sources, edges: Edges | None,
    paths: _Paths, ties: Ties,
) -> None:  # fmt: skip
    """Add what a node's inputs get from it."""
    graph, node = step.graph, step.node
    wanted = [
        v is not None and (v in graph.producer or v in graph.inputs) and _is_real(graph, v)
        for v in node.inputs
    ]
    if not any(wanted):
        return
    results: Sequence[Gradient | None]
    if all(g.zero for g in step.arriving):
        results = [no_gradient(len(graph.shape(v) or ())) for v in node.inputs]
    elif (all(g.second_moment is None for g in step.arriving) or node.op not in BACKWARD
          or paths.meet(step)):  # fmt: skip
        results = [UNKNOWN_GRADIENT] * len(node.inputs)
    else:
        results = with_neighbours(step, BACKWARD[node.op](step))
    for i, (value, want) in enumerate(zip(node.inputs, wanted, strict=True)):
        g = results[i] if i < len(results) else None
        if not want or value is None or (node.id, i) in paths.edges:
            continue
        if g is None:
            if value not in graph.static:
                continue
            g = UNKNOWN_GRADIENT  # a weight that was computed from weights: not followed
        own = f"{node.id}:{i}"
        if own in g.origin:
            sources[own] = _beside(g, own, sources)
            ties.follow(step, i, g, sources)
        if edges is not None and g.second_moment is not None:
            edges.back[node.id, i] = g.second_moment
        arriving.setdefault(value, []).append(g)
    for value, g in paths.together(step):
        for key in g.origin:
            if isinstance(key, str):
                sources.setdefault(key, g)
        arriving.setdefault(value, []).append(g)


@dataclass
class _Passes:
    """The values that every path from the inputs to the outputs passes through."""

    graph: LayerGraph

    @cached_property
    def values(self) -> frozenset[str]:
        """Found when asked for: few networks have pools beside a skip connection."""
        tree = Dominators(self.graph)
        at: str | None = self.graph.outputs[0] if self.graph.outputs else None
        for out in self.graph.outputs[1:]:
            at = None if at is None else tree.common(at, out)
        return frozenset(tree.path(at)) if at is not None else frozenset()


@dataclass(slots=True)
class _Paths:
    """Sums and products to which several paths lead from one value: that value gets what they come
    to together (signal.joint), and nothing on each alone."""

    graph: LayerGraph
    signals: Mapping[str, Signal]
    dependence: Dependence
    slopes: dict[str, Slopes] = field(default_factory=dict)  # by the sum's node
    opened: set[str] = field(default_factory=set)
    edges: set[tuple[str, int]] = field(default_factory=set)

    def meet(self, step: Back) -> bool:
        """Whether paths meet in a node in a way that cannot be followed; finds those that can."""
        node = step.node
        if node.op in ("matmul", "einsum") and len(node.inputs) == 2:
            return step.depend(0, 1)
        if node.op not in ("add", "sub", "mul") or not self.opened.isdisjoint(node.outputs):
            return False
        if len(node.inputs) != 2 or node.inputs[0] == node.inputs[1]:
            return False
        if not dependent(step) or not step.depend(0, 1):  # of a mean each gets next to nothing
            return False
        if node.op != "mul" and not cross_terms(step):
            return False
        found = slopes(step)
        if found is not None:
            self.slopes[node.id] = found
            self.opened |= found.opened
            self.edges |= found.edges
        return found is None and node.op == "mul"

    def together(self, step: Back) -> Iterator[tuple[str, Gradient]]:
        """What the roots of a node get of all paths."""
        found = self.slopes.get(step.node.id)
        for value, slope in found.roots.items() if found is not None else ():
            if value in self.graph.static or step.gradient.second_moment is None:
                continue
            along = along_of(slope, step.out_shape())
            g = times(step.gradient, slope.second_moment, along, slope.mean, slope.profile)
            node = replace(step.node, id=f"{step.node.id}<{value}", inputs=(value,))
            yield value, unbroadcast(replace(step, node=node), g, 0)


def _sum(
    graph: LayerGraph, value: str, parts: Sequence[Gradient], sources: _Sources, ties: Ties
) -> Gradient:  # fmt: skip
    """What several readers of a value send back. E(Σg)² = Σ E g² + Σ_{i≠j} E g_i g_j, and two of
    them have in common what comes from one source by a_i and a_j: Σ_s a_is a_js E g_s²."""
    parts = [g for g in parts if not g.zero]
    rank = len(graph.shape(value) or ())
    if not parts:
        return no_gradient(rank)
    if any(g.second_moment is None or math.isnan(g.second_moment) for g in parts):
        return UNKNOWN_GRADIENT
    if len(parts) == 1:
        return parts[0]
    weights = [g.second_moment or 0.0 for g in parts]
    total = sum(weights)
    origin: dict[Key, float] = {}
    for g in parts:
        for s, a in g.origin.items():
            origin[s] = origin.get(s, 0.0) + a
    by_place = any(g.nearby is not None for g in parts) or any(
        isinstance(key, Mixed) for key in origin
    )
    cross = 0.0
    common: list[tuple[Gradient, float]] = []
    for s, a in origin.items():
        own = energy(s, sources)
        if own is None:
            continue
        alone = sum(g.origin.get(s, 0.0) ** 2 for g in parts)
        both = (a * a - alone) * own
        both += _mixed_overlaps(s, parts, sources) if isinstance(s, Mixed) else _overlaps(
            s, parts, sources)  # fmt: skip
        if both:
            cross += both
            common.append((sources[s if isinstance(s, str) else s.source], both))
    second = max(total + cross + ties.between(parts, sources), 0.0)
    if len({len(g.along) for g in parts}) > 1 or second <= 0:
        return Gradient(second, (None,) * rank, origin=_strongest(origin, sources))
    along = tuple(
        _mean_correlation([(g.along[a], w) for g, w in zip(parts, weights, strict=True)]
                          + [(s.along[a] if a < len(s.along) else 0.0, w) for s, w in common],
                          second)
        for a in range(len(parts[0].along))
    )  # fmt: skip
    aligned = _mean_correlation(
        [(g.aligned, w) for g, w in zip(parts, weights, strict=True)], total
    )
    chosen = sum(g.chosen * w for g, w in zip(parts, weights, strict=True)) / total
    window = max(g.window for g in parts)
    excess = sum(g.excess * w for g, w in zip(parts, weights, strict=True)) / total
    given: Profile | None = None
    if any(g.given is not None for g in parts):
        given = np.zeros_like(NODES)
        for g, w in zip(parts, weights, strict=True):
            given = given + w / total * (1.0 if g.given is None else g.given)
    found = Gradient(second, along, _mean_profile(parts, weights), aligned, chosen, window, excess,
                     _strongest(origin, sources), given)  # fmt: skip
    return _of_neighbours(graph, value, found, parts, sources, origin) if by_place else found


def _mixed_overlaps(key: Mixed, parts: Sequence[Gradient], sources: _Sources) -> float:
    """What a source after a map over positions in one part has in common with the source itself,
    or with it after another map, in the others."""
    total = 0.0
    for other in {k for g in parts for k in g.origin}:
        if other == key or (other if isinstance(other, str) else other.source) != key.source:
            continue
        weight = _crossed(key, other, parts)
        # of two maps each is met as the key once
        weight *= 0.5 if isinstance(other, Mixed) else 1.0
        field = shared(key, other, sources) if weight else None
        total += weight * field.second if field is not None else 0.0
    return total


def _crossed(one: Key, two: Key, parts: Sequence[Gradient]) -> float:
    """2 Σ_{i≠j} a_i b_j of the coefficients of two keys."""
    a, b = ([g.origin.get(k, 0.0) for g in parts] for k in (one, two))
    both = sum(x * y for x, y in zip(a, b, strict=True))
    return 2 * (sum(a) * sum(b) - both)


def _of_neighbours(
    graph: LayerGraph, value: str, found: Gradient, parts: Sequence[Gradient], sources: _Sources,
    origin: Mapping[Key, float],
) -> Gradient:  # fmt: skip
    """A sum with what its neighbours have in common: E[g g′] of the parts and between them."""
    axes = next((k.mixing.axes for k in origin if isinstance(k, Mixed)), None) or next(
        (g.nearby.axes for g in parts if g.nearby is not None), ()
    )
    sizes = sizes_of(graph.shape(value), axes)
    if sizes is None or not found.second_moment:
        return found
    plain = Mixing.none(axes, sizes)
    whole = Field(sizes, np.zeros((1,) * len(axes)), 0.0)
    for g in parts:
        own = field_of(g, plain)
        if own is None:
            return found
        whole = whole.plus(own)
    for key, a in origin.items():
        alone = a * a - sum(g.origin.get(key, 0.0) ** 2 for g in parts)
        source = sources.get(key) if isinstance(key, str) else None
        if isinstance(key, Mixed):
            own = shared(key, key, sources)
        else:
            own = field_of(source, plain) if source is not None else None
        if alone and own is not None:
            whole = whole.plus(own, alone)
    mixed = [k for k in origin if isinstance(k, Mixed)]
    pairs: list[tuple[Mixed, Key]] = [(k, k.source) for k in mixed]
    pairs += combinations(mixed, 2)
    for key, other in pairs:
        if other not in origin or (isinstance(other, Mixed) and other.source != key.source):
            continue
        weight = _crossed(key, other, parts)
        own = shared(key, other, sources) if weight else None
        if own is not None:
            whole = whole.plus(own, weight)
    second = found.second_moment
    if whole.second <= 0:
        return found
    ratio = second / whole.second
    between = min(max(whole.mean * ratio / second, -1.0), 1.0)
    along = tuple(between if a in axes else c for a, c in enumerate(found.along))
    return found.but(along=along, nearby=whole.nearby(axes))


def _overlaps(key: Key, parts: Sequence[Gradient], sources: _Sources) -> float:
    """What a stretch in one part has in common with the whole of its source in another, or with a
    longer stretch."""
    if not isinstance(key, Stretch) or not key.placed:
        return 0.0
    own = energy(key, sources) or 0.0
    total = 0.0
    for i, g in enumerate(parts):
        a = g.origin.get(key, 0.0)
        if not a:
            continue
        for j, h in enumerate(parts):
            for other, b in h.origin.items() if i != j else ():
                if other == key.source or (
                    isinstance(other, Stretch) and other != key and other.placed
                    and other[:3] == key[:3]
                    and other.start <= key.start and key.stop <= other.stop
                ):  # fmt: skip
                    total += 2 * a * b * own
    return total


def _beside(g: Gradient, own: str, sources: _Sources) -> Gradient:
    """What of a gradient its own source stands for: all that other sources do not."""
    if g.second_moment is None or len(g.origin) == 1:
        return g
    known = sum(a * a * (energy(s, sources) or 0.0) for s, a in g.origin.items() if s != own)
    return g.but(second_moment=max(g.second_moment - known, 0.0))


def _mean_correlation(parts: Sequence[tuple[Correlation, float]], total: float) -> Correlation:
    mean = 0.0
    for c, w in parts:
        if c is None:
            return None
        mean += c * w
    return min(max(mean / total, -1.0), 1.0) if total > 0 else 0.0


def _mean_profile(parts: Sequence[Gradient], weights: Sequence[float]) -> dict[int, Profile]:
    total = sum(weights)
    found: dict[int, Profile] = {}
    for axis in {a for g in parts for a in g.profile}:
        sizes = {g.profile[axis].size for g in parts if axis in g.profile}
        if len(sizes) != 1:
            continue
        mix = np.zeros(sizes.pop())
        for g, w in zip(parts, weights, strict=True):
            mix = mix + w / total * g.profile.get(axis, 1.0)
        found[axis] = mix
    return found


def _strongest(origin: Mapping[Key, float], sources: _Sources) -> dict[Key, float]:
    """The sources that matter most, at most MOST_ORIGINS."""
    if len(origin) <= MOST_ORIGINS:
        return dict(origin)

    def share(s: Key) -> float:
        return origin[s] ** 2 * (energy(s, sources) or 0.0)

    return {s: origin[s] for s in sorted(origin, key=share, reverse=True)[:MOST_ORIGINS]}
