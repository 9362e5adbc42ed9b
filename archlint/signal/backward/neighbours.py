"""What neighbours have in common in the gradients that a node sends back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from archlint.graph.ops import OPS
from archlint.signal.gradient import BACKWARD, Back, Gradient
from archlint.signal.mixing import MAPS
from archlint.signal.moments import UNKNOWN_SIGNAL, Nearby
from archlint.signal.neighbours import REACH, Displaced, along_line, multiplied, of_each, transposed

_MOVES = frozenset({"concat", "slice", "split", "stack", "reduce_sum", "reduce_mean"})
_BY_ELEMENT = frozenset({"activation", "arithmetic", "random"})


def with_neighbours(step: Back, results: Sequence[Gradient | None]) -> Sequence[Gradient | None]:
    """The gradients of a node's inputs, from what neighbours have in common in what arrives."""
    if step.node.op in MAPS:  # they tell themselves
        return results
    g = step.gradient
    if g.nearby is None or len(step.arriving) != 1:
        return [r if r is None or r.nearby is None else r.but(nearby=None) for r in results]
    return [r if r is None or not r.second_moment else r.but(nearby=_of_input(step, g.nearby, i, r))
            for i, r in enumerate(results)]  # fmt: skip


def _of_input(step: Back, nearby: Nearby, i: int, found: Gradient) -> Nearby | None:
    op, axes, g = step.node.op, nearby.axes, step.gradient
    if op == "transpose":
        order = step.ints("permutation")
        return transposed(nearby, tuple(order.index(a) for a in range(len(order))))
    if op in ("identity", "cast"):
        return nearby
    if op in _MOVES:
        return _moved(step, nearby, found)
    if step.shape(i) is None or len(found.along) != len(g.along):
        return None
    kind = OPS[op].kind if op in OPS else ""
    if kind in _BY_ELEMENT and op != "cumsum" and step.shape(i) == step.out_shape():
        if op in ("add", "sub", "neg"):
            return nearby
        return _by_element(step, nearby, i)
    before, later = g.along[axes[0]], found.along[axes[0]]
    if i or before is None or later is None:
        return None
    if op == "conv":
        return _spaced(nearby, step.ints("stride"))
    if op == "linear" or kind == "normalisation":
        return along_line(nearby, before, later)
    return None


def _moved(step: Back, nearby: Nearby, found: Gradient) -> Nearby | None:
    """Past an op that adds axes to the gradient, takes one away or picks along one, where these are
    none of those that tell neighbours apart."""
    op = step.node.op
    if op in ("concat", "slice", "split"):
        at = step.ints("axes") if op == "slice" else (int(step.number("axis")),)
        return nearby if set(at).isdisjoint(nearby.axes) else None
    if op == "stack":
        at = (int(step.number("axis")),)
        if at[0] in nearby.axes:
            return None
        return Nearby(tuple(a - (a > at[0]) for a in nearby.axes), nearby.values, nearby.far)
    axes = step.ints("axes")
    if step.attribute("keepdims"):
        return nearby if set(axes).isdisjoint(nearby.axes) else None
    kept = [a for a in range(len(found.along)) if a not in axes]
    if len(kept) != len(step.gradient.along):
        return None
    return Nearby(tuple(kept[a] for a in nearby.axes), nearby.values, nearby.far)


def _by_element(step: Back, nearby: Nearby, i: int) -> Nearby | None:
    """Neighbour by neighbour: what two gradients have in common times what two of what they are
    multiplied with do, by the node's own rule."""
    axes, backward = nearby.axes, BACKWARD[step.node.op]
    inputs = [step.signals.get(v or "", UNKNOWN_SIGNAL).nearby for v in step.node.inputs]
    fields = [x for x in inputs if x is not None and x.axes == axes]
    along = tuple(1.0 if a in axes else d for a, d in enumerate(step.gradient.along))
    arriving = (step.gradient.but(along=along, nearby=None),)

    def evaluate(shift: tuple[int, ...] | None) -> float | None:
        signals = Displaced(step.signals, axes, shift)
        found = backward(replace(step, arriving=arriving, signals=signals))[i]
        return None if found is None or len(found.along) <= axes[0] else found.along[axes[0]]

    slopes = of_each(fields, evaluate) if fields else None
    if slopes is None and (factor := evaluate(None)) is not None:
        slopes = Nearby(axes, np.ones((1,) * len(axes)), factor)
    return None if slopes is None else multiplied(nearby, slopes)


def _spaced(nearby: Nearby, steps: Sequence[int]) -> Nearby | None:
    """Through a convolution of that stride: two places share a tap where they are a multiple of it
    apart."""
    if all(s == 1 for s in steps):
        return nearby
    reach = [min(n // 2 * s, REACH) for n, s in zip(nearby.values.shape, steps, strict=True)]
    values = np.zeros([2 * r + 1 for r in reach])
    middle = []
    into = []
    for r, n, s in zip(reach, nearby.values.shape, steps, strict=True):
        kept = r // s
        middle.append(slice(n // 2 - kept, n // 2 + kept + 1))
        into.append(slice(r - kept * s, r + kept * s + 1, s))
    values[tuple(into)] = nearby.values[tuple(middle)]
    return Nearby(nearby.axes, values, nearby.far / math.prod(steps))
