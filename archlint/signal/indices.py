"""Integers that are the same for nearly every input, such as positions counted past padding.

An integer input holds any of many tokens, of which one, such as the padding, is rare: that it is
*not* a given number is taken to be true, and what is computed of that is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from archlint.graph.model import Array, LayerGraph, Node
from archlint.graph.ops import attribute

_MOST_NODES = 64
_MOST_ELEMENTS = 1 << 20


def usual(graph: LayerGraph, value: str | None) -> Array | None:
    """The elements of an integer value for inputs without rare tokens; None where they depend on
    what else is in the input, or on what is not followed."""
    return _Usual(graph).of(value)


class _Usual:
    def __init__(self, graph: LayerGraph) -> None:
        self.graph = graph
        self.found: dict[str, Array | None] = {}

    def of(self, value: str | None) -> Array | None:
        """The elements of a value."""
        if value is None:
            return None
        known = self.graph.constant(value)
        if known is not None:
            return known if known.size <= _MOST_ELEMENTS else None
        if value not in self.found:
            self.found[value] = None  # what a loop would find
            node = self.graph.producer.get(value)
            if node is not None and len(self.found) <= _MOST_NODES and value == node.output:
                self.found[value] = self._computed(node)
        return self.found[value]

    def _computed(self, node: Node) -> Array | None:
        size = self.graph.values[node.output].size
        if size is None or size > _MOST_ELEMENTS:
            return None
        if node.op in ("equal", "not_equal"):
            return self._rarely(node)
        compute = _TABLE.get(node.op)
        if compute is None:
            return None
        inputs = [self.of(v) for v in node.inputs if v is not None]
        if any(a is None for a in inputs):
            return None
        attributes = {n: attribute(node.op, node.attributes, n) for n in node.attributes}
        try:
            made = np.asarray(compute([a for a in inputs if a is not None], attributes))
        except (ValueError, IndexError, TypeError):
            return None
        return made if made.shape == self.graph.shape(node.output) else None

    def _rarely(self, node: Node) -> Array | None:
        """Whether the elements of an input are one number: they are not."""
        for token, number in (node.inputs, node.inputs[::-1]):
            fixed = self.graph.constant(number)
            shape = self.graph.shape(node.output)
            if (token in self.graph.inputs and fixed is not None and fixed.size == 1
                    and shape is not None):  # fmt: skip
                sizes = [n for n in shape if n is not None]
                return np.full(sizes, node.op == "not_equal")
        return None


def _cast(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    return inputs[0].astype(str(attributes["dtype"]))


def _cumsum(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    if attributes.get("exclusive") or attributes.get("reverse"):
        raise ValueError("not followed")
    return np.asarray(np.cumsum(inputs[0], axis=int(attributes["axis"])))


def _taken(inputs: Sequence[Array], attributes: Mapping[str, Any]) -> Array:
    """What all elements of a table are is known wherever it is looked at."""
    table, places = inputs
    return np.asarray(np.take_along_axis(table, places, axis=int(attributes["axis"])))


_TABLE: dict[str, Callable[[Sequence[Array], Mapping[str, Any]], Array]] = {
    "cast": _cast,
    "cumsum": _cumsum,
    "gather_elements": _taken,
    "add": lambda a, _: np.asarray(a[0] + a[1]),
    "sub": lambda a, _: np.asarray(a[0] - a[1]),
    "mul": lambda a, _: np.asarray(a[0] * a[1]),
    "reshape": lambda a, n: a[0].reshape([int(k) for k in n["shape"]]),
    "identity": lambda a, _: a[0],
    "transpose": lambda a, n: np.transpose(a[0], [int(k) for k in n["permutation"]]),
    "expand": lambda a, n: np.broadcast_to(a[0], [int(k) for k in n["shape"]]),
    "where": lambda a, _: np.where(a[0], a[1], a[2]),
    "masked_fill": lambda a, _: np.where(a[1], a[2], a[0]),
    "logical_not": lambda a, _: np.logical_not(a[0]),
    "logical_and": lambda a, _: np.logical_and(a[0], a[1]),
    "neg": lambda a, _: np.asarray(-a[0]),
}
