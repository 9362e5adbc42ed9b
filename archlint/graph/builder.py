"""Write a layer graph by hand or from a frontend: shapes as given, ids made unique."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from archlint.finding import Site
from archlint.graph.model import (
    Array,
    AttributeValue,
    LayerGraph,
    Mode,
    Node,
    Overwritten,
    Parameter,
    Value,
    WeightState,
)
from archlint.initialization.distribution import Distribution

Shape = tuple[int | None, ...]


class GraphBuilder:
    """Collects values, parameters and nodes; ``finish`` freezes them into a LayerGraph."""

    def __init__(self, name: str = "graph", mode: Mode = "train", source: Any = "builder") -> None:
        self.name, self.mode, self.source = name, mode, source
        self.nodes: list[Node] = []
        self.values: dict[str, Value] = {}
        self.parameters: dict[str, Parameter] = {}
        self.inputs: list[str] = []
        self._next: dict[str, int] = {}

    def fresh(self, stem: str) -> str:
        """A value id that is not taken."""
        if stem and stem not in self.values:
            return stem
        i = self._next.get(stem, 1)
        while f"{stem or 'value'}_{i}" in self.values:
            i += 1
        self._next[stem] = i  # where the search goes on: a name once taken stays taken
        return f"{stem or 'value'}_{i}"

    def value(
        self, id: str, shape: Shape | None = None, dtype: str | None = "float32", **rest: Any
    ) -> str:
        """Declare a value."""
        self.values[id] = Value(id, shape, dtype, **rest)
        return id

    def input(self, id: str, shape: Shape | None, dtype: str | None = "float32") -> str:
        """Declare a graph input."""
        self.inputs.append(id)
        return self.value(id, shape, dtype)

    def parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        law: Distribution | None = None,
        dtype: str = "float32",
        site: Site | None = None,
        trainable: bool = True,
        load: Callable[[], Array] | None = None,
        clone_of: str | None = None,
        shared: bool = False,
        overwritten: tuple[Overwritten, ...] = (),
        frozen: bool = False,
        flaw: str = "",
    ) -> str:
        """Declare a parameter and the value that stands for it (same name)."""
        self.parameters[name] = Parameter(
            name,
            shape,
            dtype,
            law,
            trainable,
            site,
            clone_of,
            load,
            shared,
            overwritten,
            frozen=frozen,
            flaw=flaw,
        )
        return self.value(name, shape, dtype, parameter=name)

    def constant(self, array: Any, id: str = "constant") -> str:
        """Declare a constant value."""
        elements = np.asarray(array)
        return self.value(
            self.fresh(id), tuple(elements.shape), elements.dtype.name, constant=elements
        )

    def node(
        self,
        op: str,
        inputs: Sequence[str | None],
        shape: Shape | None = None,
        dtype: str | None = "float32",
        *,
        outputs: Sequence[str] | None = None,
        module: str = "",
        module_type: str = "",
        site: Site | None = None,
        name: str = "",
        source_op: str = "",
        guard: tuple[tuple[str, bool], ...] = (),
        body: LayerGraph | None = None,
        given: Mapping[str, AttributeValue] | None = None,
        **attributes: Any,
    ) -> str:
        """Append a node with one output (or the declared ``outputs``); returns the first output.

        Attributes that are called like a parameter of this method (``shape``, ``dtype``) go into
        ``given``.
        """
        attributes.update(given or {})
        if outputs is None:
            outputs = [self.value(self.fresh(name or op), shape, dtype)]
        self.nodes.append(
            Node(
                f"n{len(self.nodes)}",
                op,
                tuple(inputs),
                tuple(outputs),
                attributes,
                name,
                source_op or op,
                module,
                module_type,
                site,
                guard,
                body,
            )
        )
        return outputs[0] if outputs else ""

    def finish(
        self,
        outputs: Sequence[str],
        weights: WeightState = "initial",
        weights_evidence: str = "",
        folded: int = 0,
        notes: tuple[str, ...] = (),
    ) -> LayerGraph:
        """The graph. ``outputs`` are value ids."""
        return LayerGraph(
            self.name,
            tuple(self.nodes),
            self.values,
            self.parameters,
            tuple(self.inputs),
            tuple(outputs),
            self.mode,
            self.source,
            weights,
            weights_evidence,
            folded,
            notes,
        )
