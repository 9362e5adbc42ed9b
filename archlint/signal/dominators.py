"""The dominator tree of the values that carry a signal: where paths that meet came apart."""

from __future__ import annotations

from collections.abc import Iterator

from archlint.graph.model import LayerGraph, Node

_ROOT = 0


def carriers(graph: LayerGraph, node: Node) -> list[str]:
    """The inputs of a node that carry a signal: real numbers that are no weight or constant."""
    found = []
    for value in dict.fromkeys(node.inputs):
        if value is None or value in graph.static:
            continue
        dtype = graph.values[value].dtype
        if dtype is None or "float" in dtype or "complex" in dtype:
            found.append(value)
    return found


class Dominators:
    """For every value the last value that all paths from the inputs to it pass through.

    Nodes come in topological order, so that one sweep suffices; common ancestors are found over
    jump pointers (each to an ancestor at a distance that grows with the depth), in O(log n).
    """

    def __init__(self, graph: LayerGraph) -> None:
        self._number: dict[str, int] = {}
        self._value: list[str | None] = [None]
        self._parent = [_ROOT]
        self._jump = [_ROOT]
        self._depth = [0]
        for value in graph.inputs:
            self._add(value, _ROOT)
        for node in graph.nodes:
            above: int | None = None
            for value in carriers(graph, node):
                number = self._number.get(value, _ROOT)
                above = number if above is None else self._meet(above, number)
            for out in node.outputs:
                self._add(out, _ROOT if above is None else above)

    def _add(self, value: str, parent: int) -> None:
        jump = self._jump[parent]
        equal = (
            self._depth[parent] - self._depth[jump]
            == self._depth[jump] - self._depth[self._jump[jump]]
        )
        self._number[value] = len(self._value)
        self._value.append(value)
        self._parent.append(parent)
        self._jump.append(self._jump[jump] if equal else parent)
        self._depth.append(self._depth[parent] + 1)

    def _meet(self, a: int, b: int) -> int:
        depth, parent, jump = self._depth, self._parent, self._jump
        if depth[a] < depth[b]:
            a, b = b, a
        while depth[a] > depth[b]:
            a = jump[a] if depth[jump[a]] >= depth[b] else parent[a]
        while a != b:
            a, b = (jump[a], jump[b]) if jump[a] != jump[b] else (parent[a], parent[b])
        return a

    def common(self, a: str, b: str) -> str | None:
        """The nearest value that dominates both; None where only the inputs' root does."""
        return self._value[self._meet(self._number.get(a, _ROOT), self._number.get(b, _ROOT))]

    def path(self, below: str) -> Iterator[str]:
        """The dominators of a value, from itself up."""
        at = self._number.get(below, _ROOT)
        while at != _ROOT:
            value = self._value[at]
            assert value is not None  # only the root has none
            yield value
            at = self._parent[at]
