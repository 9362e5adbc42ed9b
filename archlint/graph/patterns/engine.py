"""The rewriting engine: patterns over canonical ops, tried once on every node in execution order.

A pattern is a function that looks upwards from the *last* node of what it recognises and either
says what to put there (:class:`Found`) or why it does not apply (a sentence). The function names
the ops of that last node in its decorator; that is all there is to adding one. Nodes that lose
their last reader by a rewrite leave the graph; those that something else still reads stay. So a
rewrite is sound whenever the new nodes compute the same value as the last node did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from archlint.graph.model import AttributeValue, LayerGraph, Node, Parameter, Value
from archlint.graph.names import common_path
from archlint.graph.ops import attribute

Shape = tuple[int | None, ...]
FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
_MANTISSA = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}
_EXPONENT = {"float16": 5, "bfloat16": 8, "float32": 8, "float64": 11}
# How far a constant that a file holds in half precision may be from the number it stands for.
TOLERANCE = 2e-3


@dataclass(frozen=True, slots=True)
class New:
    """A node to be made. ``inputs`` are value ids, or earlier :class:`New` nodes.

    ``shape`` and ``dtype`` are those of its output; the last node of a rewrite takes over the
    output of the node it replaces and needs neither.
    """

    op: str
    inputs: tuple[str | New | None, ...]
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    shape: Shape | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A match: ``last`` (with the New nodes it reads) replaces the node the pattern began at.

    ``parts`` are the matched nodes, the replaced one included or not. ``alias`` instead of
    ``last``: the node is a no-op and its readers read this value. ``reshaped`` re-declares
    parameters that a file holds with broadcasting dimensions: value id -> shape.
    """

    last: New | None
    parts: tuple[Node, ...] = ()
    alias: str | None = None
    reshaped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


Pattern = Callable[["Rewriter", Node], "Found | str"]
PATTERNS: dict[str, list[Pattern]] = {}


def pattern(*ops: str) -> Callable[[Pattern], Pattern]:
    """Register a pattern that ends in one of the given ops."""

    def register(function: Pattern) -> Pattern:
        for op in ops:
            PATTERNS.setdefault(op, []).append(function)
        return function

    return register
