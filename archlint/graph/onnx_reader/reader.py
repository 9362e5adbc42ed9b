"""From a parsed ONNX model to the layer graph: one walk over the nodes in execution order.

Every value of the file becomes known (a constant or a parameter), or a value of the graph with a
concrete shape. What is known stays out of the graph; everything else is lowered to canonical ops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx

from archlint.errors import ArchlintError
from archlint.finding import Site
from archlint.graph.builder import GraphBuilder
from archlint.graph.model import Array, LayerGraph, Mode, Parameter, Value
from archlint.graph.names import Origin, module_names
from archlint.graph.onnx_reader.fold import MOST_ELEMENTS, CannotFold, evaluate
from archlint.graph.onnx_reader.read import ModelFile, Tensor
from archlint.graph.onnx_reader.shapes import (
    Shape,
    ShapeConflict,
    Typed,
    infer,
    is_well_formed,
)
from archlint.graph.ops import UNKNOWN

Scope = MutableMapping[str, str]  # ONNX name -> value id
Guard = tuple[tuple[str, bool], ...]

CONSTANT_ELEMENTS = 1 << 16  # integers up to this many are constants, larger ones parameters
MOST_SPARSE = 1 << 28  # elements of a sparse tensor, which is read as a dense one
KNOWN_ELEMENTS = 4096  # known inputs up to this many are shown to shape inference
MOST_DEPTH = 64  # of nested bodies

# Operators that may turn parameters into parameters: what they compute from weights is a weight.
_NEVER_FOLDED = frozenset({"Conv", "ConvTranspose", "LSTM", "GRU", "RNN", "If", "Loop", "Scan"})


@dataclass
class Call:
    """One ONNX node on its way into the graph; what a lowering function sees.

    ``ins`` are value ids (None for an input left out), ``outs`` the inferred (shape, dtype) of
    the outputs. A lowering emits canonical nodes; each output must be emitted or aliased.
    """

    reader: Reader
    node: onnx.NodeProto
    attributes: Mapping[str, Any]
    ins: list[str | None]
    outs: list[Typed]
    scope: Scope
    guard: Guard
    origin: Origin

    # ------------------------------------------------------------ questions

    @property
    def opset(self) -> int:
        """The opset version of the node's domain."""
        return self.reader.opsets.get("" if self.node.domain == "ai.onnx" else self.node.domain, 1)

    def has(self, i: int) -> bool:
        """Whether input ``i`` is given."""
        return i < len(self.ins) and self.ins[i] is not None

    def value(self, i: int) -> str:
        """The value id of a given input."""
        if not self.has(i):
            raise LookupError(f"input {i} is left out")
        found = self.ins[i]
        assert found is not None
        return found

    def optional(self, i: int) -> str | None:
        """The value id of input ``i`` or None."""
        return self.ins[i] if i < len(self.ins) else None

    def shape(self, i: int) -> Shape:
        """The shape of input ``i``."""
        return self.reader.builder.values[self.value(i)].shape

    def rank(self, i: int) -> int:
        """The number of dimensions of input ``i``; LookupError where unknown."""
        shape = self.shape(i)
        if shape is None:
            raise LookupError(f"the rank of input {i} is unknown")
        return len(shape)

    def sizes(self, i: int) -> tuple[int, ...]:
        """The shape of input ``i`` with every size known; LookupError otherwise."""
        shape = self.shape(i)
        if shape is None or any(n is None for n in shape):
            raise LookupError(f"the shape of input {i} is unknown")
        return tuple(n for n in shape if n is not None)

    def dtype(self, i: int) -> str | None:
        """The element type of input ``i``."""
        return self.reader.builder.values[self.value(i)].dtype

    def array(self, i: int) -> Array | None:
        """The elements of input ``i`` where it is known and small."""
        return self.reader.known(self.optional(i), KNOWN_ELEMENTS)

    def ints(self, i: int) -> list[int] | None:
        """The integers of a known input."""
        array = self.array(i)
        return None if array is None else [int(n) for n in array.reshape(-1)]

    def scalar(self, i: int) -> float | None:
        """The number in a known input of one element."""
        array = self.array(i)
        return None if array is None or array.size != 1 else float(array.reshape(-1)[0])

    def is_known(self, i: int) -> bool:
        """Whether input ``i`` is a parameter or a constant."""
        return self.has(i) and self.reader.is_known(self.value(i))

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of the node."""
        return self.attributes.get(name, default)

    # ------------------------------------------------------------ results

    def weight(self, i: int) -> str | None:
        """Input ``i`` as a parameter where it is known, else as it is."""
        return self.reader.as_parameter(self.ins[i]) if self.has(i) else None

    def emit(
        self,
        op: str,
        inputs: Sequence[str | None],
        *,
        out: int = 0,
        typed: Typed | None = None,
        **attributes: Any,
    ) -> str:
        """Append the node that computes output ``out``."""
        shape, dtype = typed if typed is not None else self.outs[out]
        name = self.node.output[out] if out < len(self.node.output) else ""
        id = self.temp(op, inputs, shape, dtype, name, **attributes)
        if name:
            self.scope[name] = id
        return id

    def emit_all(self, op: str, inputs: Sequence[str | None], **attributes: Any) -> None:
        """Append one node that computes all outputs that the file names."""
        builder = self.reader.builder
        count = len(self.node.output)
        while count > 1 and not self.node.output[count - 1]:
            count -= 1
        ids = []
        for name, (shape, dtype) in zip(self.node.output[:count], self.outs, strict=False):
            ids.append(builder.value(builder.fresh(name or f"{op}_unused"), shape, dtype))
            if name:
                self.scope[name] = ids[-1]
        self._append(op, inputs, attributes, outputs=ids)

    def temp(
        self,
        op: str,
        inputs: Sequence[str | None],
        shape: Shape,
        dtype: str | None = "float32",
        name: str = "",
        /,
        **attributes: Any,
    ) -> str:
        """Append a node that computes an intermediate value."""
        builder = self.reader.builder
        stem = name or (self.node.output[0] if self.node.output else op) + ":" + op
        id = builder.value(builder.fresh(stem), shape, dtype)
        self._append(op, inputs, attributes, outputs=[id])
        return id

    def _append(
        self, op: str, inputs: Sequence[str | None], attributes: Mapping[str, Any],
        outputs: Sequence[str],
    ) -> None:  # fmt: skip
        inputs = list(inputs)
        while inputs and inputs[-1] is None:
            inputs.pop()
        source = self.node.op_type
        self.reader.builder.node(
            op, inputs, outputs=outputs, module=self.origin.module,
            module_type=self.origin.module_type,
            site=self.origin.site or Site(str(self.reader.file.path), node=self.node.name or
                                          (self.node.output[0] if self.node.output else source)),
            name=self.node.name, guard=self.guard, given=attributes,
            source_op=source if self.node.domain in ("", "ai.onnx")
            else f"{self.node.domain}.{source}",
        )  # fmt: skip

    def alias(self, out: int, value: str) -> None:
        """Let output ``out`` be an existing value."""
        if out < len(self.node.output) and self.node.output[out]:
            self.scope[self.node.output[out]] = value

    def constant(self, array: Any) -> str:
        """A new constant."""
        return self.reader.builder.constant(array, f"{self.node.output[0]}:constant")

    def derived(
        self, name: str, source: str, shape: tuple[int, ...], change: Callable[[Array], Array],
        dtype: str = "float32",
    ) -> str:  # fmt: skip
        """A parameter that is computed from another one when it is read."""
        return self.reader.derived(name, [source], shape, dtype, lambda arrays: change(arrays[0]))

    def conflict(self, text: str) -> None:
        """Say that the sizes do not fit the operator, where its inference does not tell."""
        if self.reader.strict:
            raise ShapeConflict(f"node {self.node.name or self.node.op_type!r}: {text}")
        self.reader.conflicts += 1

    def unknown(self) -> None:
        """Keep the node as one that is not understood."""
        self.emit_all(UNKNOWN, self.ins)


Lower = Callable[[Call], None]
LOWER: dict[tuple[str, str], Lower] = {}


def lowers(*names: str, domain: str = "") -> Callable[[Lower], Lower]:
    """Register the lowering of ONNX operators."""

    def register(function: Lower) -> Lower:
        for name in names:
            LOWER[domain, name] = function
        return function

    return register


def _untyped(a: onnx.AttributeProto) -> Any:
    """The value of an attribute that names no type, as before IR version 2, by what is filled."""
    if a.HasField("s"):
        return a.s.decode(errors="replace")
    if a.strings:
        return [s.decode(errors="replace") for s in a.strings]
    for name in ("f", "i"):
        if a.HasField(name):
            return getattr(a, name)
    return list(a.ints) or list(a.floats) or None


@dataclass
class Reader:
    """The state of one walk. ``bound`` gives every graph input a concrete shape and type."""

    file: ModelFile
    bound: Mapping[str, Typed]
    mode: Mode = "train"
    strict: bool = True  # a shape that does not fit raises ShapeConflict
    # Other sizes of the inputs: given these, one branch of an If of unknown condition may be read
    # at sizes of its own, or not fit at all.
    alternatives: Sequence[Mapping[str, Typed]] = ()
    builder: GraphBuilder = field(init=False)
    opsets: dict[str, int] = field(init=False)
    folded: int = 0
    conflicts: int = 0
    transposed: dict[str, str] = field(default_factory=dict)  # 2-D parameter -> what it transposes
    depth: int = 0

    def __post_init__(self) -> None:
        proto = self.file.proto
        self.builder = GraphBuilder(self.file.path.name, self.mode, "onnx")
        self.opsets = {
            ("" if o.domain == "ai.onnx" else o.domain): o.version for o in proto.opset_import
        } or {"": 1}
        self.origins: dict[int, Origin] = {}
        self._memory: dict[str, Array] = {}

    # ------------------------------------------------------------ the walk

    def read(self) -> LayerGraph:
        """The layer graph of the file's main graph."""
        graph = self.file.proto.graph
        self._name_nodes(graph)
        scope: Scope = {}
        self._initializers(graph, scope)
        for info in graph.input:
            if info.name not in scope:
                shape, dtype = self.bound[info.name]
                scope[info.name] = self.builder.input(info.name, shape, dtype)
        self.run(graph, scope, ())
        outputs = []
        for info in graph.output:
            if info.name not in scope:
                raise ArchlintError(
                    f"{self.file.path}: output {info.name!r} is produced by no node",
                    "export or download the model again",
                )
            outputs.append(scope[info.name])
        return pruned(self.builder.finish(outputs, folded=self.folded))

    def _name_nodes(self, graph: onnx.GraphProto) -> None:
        nodes: list[onnx.NodeProto] = []
        names: set[str] = set()
        pending = [graph]
        while pending:
            current = pending.pop()
            names.update(tensor.name for tensor in current.initializer)
            for node in current.node:
                nodes.append(node)
                if node.op_type in ("Identity", "Constant") and (
                    node.op_type == "Constant" or node.input[0] in names
                ):
                    names.update(node.output)
                for a in node.attribute:
                    if a.HasField("g"):
                        pending.append(a.g)
                    pending.extend(a.graphs)
        self._nodes = nodes  # keeps the objects behind the ids below alive
        for node, origin in zip(nodes, module_names(nodes, names), strict=True):
            self.origins[id(node)] = origin

    def _initializers(self, graph: onnx.GraphProto, scope: Scope) -> None:
        seen: set[str] = set()
        for proto in graph.initializer:
            if proto.name in seen:
                raise ArchlintError(
                    f"{self.file.path}: two initializers are called {proto.name!r}",
                    "export the model again",
                )
            seen.add(proto.name)
            scope[proto.name] = self.add_tensor(proto.name, self.file.tensor(proto, proto.name))
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            if name in seen:
                raise ArchlintError(
                    f"{self.file.path}: two initializers are called {name!r}",
                    "export the model again",
                )
            seen.add(name)
            scope[name] = self.add_tensor(name, self._sparse(sparse, name))

    def _sparse(self, proto: onnx.SparseTensorProto, name: str) -> Tensor:
        """A sparse tensor, made dense when it is read. Raises ArchlintError."""
        values = self.file.tensor(proto.values, name)
        indices = self.file.tensor(proto.indices, f"{name} (indices)")
        shape = tuple(proto.dims)
        count = values.shape[0] if len(values.shape) == 1 else -1
        fits = (
            all(n >= 0 for n in shape)
            and math.prod(shape) <= MOST_SPARSE
            and indices.dtype == "int64"
            and indices.shape in ((count,), (count, len(shape)))
        )
        if fits:
            where = indices.load()
            limits = np.array([math.prod(shape)] if where.ndim == 1 else shape)
            fits = bool(np.all((where >= 0) & (where < limits)))
        if not fits:
            raise ArchlintError(
                f"{self.file.path}: the sparse tensor {name!r} of shape {list(shape)[:8]} has "
                "positions outside it, or too many elements",
                "export or download the model again",
            )
        return Tensor(shape, values.dtype, partial(_dense, values, indices, shape))

    def run(self, graph: onnx.GraphProto, scope: Scope, guard: Guard) -> None:
        """Walk over the nodes of a graph, the outer scope's names in view."""
        from archlint.graph.onnx_reader import control

        if self.depth > MOST_DEPTH:
            raise ArchlintError(
                f"{self.file.path}: bodies are nested more than {MOST_DEPTH} deep",
                "export the model without so many nested conditions",
            )
        self.depth += 1
        try:
            for node in self._ordered(graph, scope):
                if node.op_type in control.CONTROL and node.domain in ("", "ai.onnx"):
                    control.CONTROL[node.op_type](self, node, scope, guard)
                else:
                    self.step(node, scope, guard)
        finally:
            self.depth -= 1

    def run_body(self, graph: onnx.GraphProto, scope: Scope, guard: Guard) -> None:
        """Walk over a body: its own initializers shadow the outer names."""
        self._initializers(graph, scope)
        own = {name for node in graph.node for name in node.output}
        for name in own & scope.keys():  # a body may reuse an outer name
            del scope[name]
        self.run(graph, scope, guard)

    def _ordered(self, graph: onnx.GraphProto, scope: Scope) -> Iterable[onnx.NodeProto]:
        """The nodes in an order in which every input is produced before it is read."""
        produced: dict[str, int] = {}
        for i, node in enumerate(graph.node):
            for name in node.output:
                if name and (name in produced or (name in scope and name in self._own(graph))):
                    raise ArchlintError(
                        f"{self.file.path}: the value {name!r} is produced twice",
                        "export the model again",
                    )
                if name:
                    produced[name] = i
        seen: set[str] = set()
        in_order = True
        for node in graph.node:
            if any(name in produced and name not in seen for name in _reads(node)):
                in_order = False
                break
            seen.update(node.output)
        nodes = list(graph.node) if in_order else self._sorted(graph, produced)
        for node in nodes:
            for name in node.input:
                if name and name not in produced and name not in scope:
                    raise ArchlintError(
                        f"{self.file.path}: node {node.name or node.op_type!r} reads {name!r}, "
                        "which nothing produces",
                        "export or download the model again",
                    )
        return nodes

    @staticmethod
    def _own(graph: onnx.GraphProto) -> set[str]:
        return {t.name for t in graph.initializer} | {i.name for i in graph.input}

    def _sorted(self, graph: onnx.GraphProto, produced: dict[str, int]) -> list[onnx.NodeProto]:
        waiting = [len({name for name in _reads(node) if name in produced}) for node in graph.node]
        readers: dict[str, list[int]] = {}
        for i, node in enumerate(graph.node):
            for name in {name for name in _reads(node) if name in produced}:
                readers.setdefault(name, []).append(i)
        ready = [i for i, n in enumerate(waiting) if n == 0]
        order: list[onnx.NodeProto] = []
        for i in ready:  # grows while it is walked
            order.append(graph.node[i])
            for name in graph.node[i].output:
                for reader in readers.get(name, ()):
                    waiting[reader] -= 1
                    if waiting[reader] == 0:
                        ready.append(reader)
        if len(order) < len(graph.node):
            stuck = next(i for i, n in enumerate(waiting) if n > 0)
            name = graph.node[stuck].name or graph.node[stuck].op_type
            raise ArchlintError(
                f"{self.file.path}: the graph has a cycle through node {name!r}",
                "export the model again",
            )
        return order

    def step(self, node: onnx.NodeProto, scope: Scope, guard: Guard) -> None:
        """One node that is no control flow: fold it, or infer its shapes and lower it."""
        domain = "" if node.domain == "ai.onnx" else node.domain
        origin = self.origins.get(id(node), Origin())
        attributes = self.attributes(node)
        ins = [scope[name] if name else None for name in node.input]
        if not is_well_formed(node, self.opsets.get(domain, 1)):
            Call(self, node, attributes, ins, [(None, None)] * len(node.output), scope, guard,
                 origin).unknown()  # fmt: skip
            return
        if self._fold(node, attributes, ins, scope):
            self.folded += 1
            return
        call = Call(self, node, attributes, ins, [], scope, guard, origin)
        call.outs = self._infer(node, ins, call)
        misfit = any(shape is None for shape, _ in call.outs) and self._misfits(node, ins, call)
        lower = None if misfit else LOWER.get((domain, node.op_type))
        before = len(self.builder.nodes)
        if lower is not None:
            try:
                lower(call)
            except (LookupError, ArithmeticError, ValueError):
                # something that it needs is not statically known, or no number it can use
                del self.builder.nodes[before:]
                call.unknown()
        else:
            call.unknown()
        missing = [name for name in node.output if name and name not in scope]
        if missing:
            del self.builder.nodes[before:]
            call.unknown()

    def _infer(self, node: onnx.NodeProto, ins: list[str | None], call: Call) -> list[Typed]:
        typed: list[Typed | None] = [
            None if v is None else (self.builder.values[v].shape, self.builder.values[v].dtype)
            for v in ins
        ]
        try:
            return infer(node, typed, call.array, self.opsets)
        except ShapeConflict as conflict:
            if self.strict:
                raise ShapeConflict(f"node {node.name or node.op_type!r}: {conflict}") from conflict
            self.conflicts += 1
        # Without the sizes of what is computed, the operator still tells ranks.
        try:
            return infer(node, self._ranks(ins), call.array, self.opsets)
        except ShapeConflict:
            return [(None, typed[0][1] if typed and typed[0] else None)] * len(node.output)

    def _ranks(self, ins: Sequence[str | None]) -> list[Typed | None]:
        """The types of inputs without the sizes of what is computed."""
        found: list[Typed | None] = []
        for v in ins:
            value = self.builder.values[v] if v is not None else None
            if v is None or value is None:
                found.append(None)
            elif value.shape is None or self.is_known(v):
                found.append((value.shape, value.dtype))
            else:
                found.append(((None,) * len(value.shape), value.dtype))
        return found

    def _misfits(self, node: onnx.NodeProto, ins: list[str | None], call: Call) -> bool:
        """Whether the node's attributes fit no input of these ranks, whatever its sizes."""
        try:
            infer(node, self._ranks(ins), call.array, self.opsets)
        except ShapeConflict:
            return True
        return False

    # ------------------------------------------------------------ known values

    def attributes(self, node: onnx.NodeProto) -> dict[str, Any]:
        """The attributes of a node as Python values; tensors as arrays (large ones stay Tensor)."""
        found: dict[str, Any] = {}
        for a in node.attribute:
            if a.type == onnx.AttributeProto.TENSOR or (not a.type and a.HasField("t")):
                found[a.name] = self.file.tensor(a.t, node.name or node.output[0])
            elif a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
                continue
            elif a.type == onnx.AttributeProto.STRING:
                found[a.name] = a.s.decode(errors="replace")
            elif a.type == onnx.AttributeProto.STRINGS:
                found[a.name] = [s.decode(errors="replace") for s in a.strings]
            elif a.type in (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.TYPE_PROTO):
                continue
            elif not a.type:
                value = _untyped(a)
                if value is not None:  # else the operator's default holds
                    found[a.name] = value
            else:
                try:
                    found[a.name] = onnx.helper.get_attribute_value(a)
                except ValueError as error:
                    raise ArchlintError(
                        f"{self.file.path}: attribute {a.name!r} of node "
                        f"{node.name or node.op_type!r} is malformed",
                        "export or download the model again",
                    ) from error
        return found

    def _fold(
        self, node: onnx.NodeProto, attributes: dict[str, Any], ins: list[str | None], scope: Scope
    ) -> bool:
        """Compute the node now, or as a parameter when it is read, if its inputs are known."""
        name = node.op_type
        if name == "Constant" and isinstance(attributes.get("value"), Tensor):
            scope[node.output[0]] = self.add_tensor(node.output[0], attributes["value"])
            return True
        for key, value in attributes.items():
            if isinstance(value, Tensor):
                attributes[key] = value.load()
        if name in ("Shape", "Size") and ins[0] is not None:
            shape = self.builder.values[ins[0]].shape
            if shape is not None and all(n is not None for n in shape):
                numbers = [n for n in shape if n is not None]
                known = (
                    np.array(numbers[attributes.get("start", 0) : attributes.get("end")], np.int64)
                    if name == "Shape"
                    else np.array(math.prod(numbers), np.int64)
                )
                scope[node.output[0]] = self.builder.constant(known, node.output[0])
                return True
            return False
        if name in _NEVER_FOLDED or any(v is not None and not self.is_known(v) for v in ins):
            return False
        parameters = [v for v in ins if v is not None and self.builder.values[v].parameter]
        opset = self.opsets.get("", 1)
        if name == "ConstantOfShape":
            return self._filled(node, attributes, ins, scope)
        if not parameters:
            try:
                arrays = evaluate(node, [self.builder.values[v].constant if v else None
                                         for v in ins], attributes, opset)  # fmt: skip
            except CannotFold:
                return False
            for output, array in zip(node.output, arrays, strict=False):
                if output:
                    scope[output] = self.add_array(output, array)
            return True
        return self._derive(node, attributes, ins, scope, opset)

    def _filled(
        self, node: onnx.NodeProto, attributes: dict[str, Any], ins: list[str | None], scope: Scope
    ) -> bool:
        """A tensor of one repeated number: no memory, whatever its size."""
        sizes = self.known(ins[0], KNOWN_ELEMENTS)
        if sizes is None or sizes.size > 64 or min(sizes.reshape(-1).tolist(), default=0) < 0:
            return False
        shape = tuple(int(n) for n in sizes.reshape(-1))
        if math.prod(shape) > 2**46:
            raise ArchlintError(
                f"{self.file.path}: node {node.name or 'ConstantOfShape'!r} promises "
                f"{math.prod(shape):.3g} elements", "export the model again")  # fmt: skip
        value = attributes.get("value")
        number = np.float32(0) if value is None else np.asarray(value).reshape(-1)[0]
        load = partial(np.broadcast_to, number, shape)
        scope[node.output[0]] = self.add_tensor(
            node.output[0], Tensor(shape, np.asarray(number).dtype.name, load)
        )
        return True

    def _derive(
        self, node: onnx.NodeProto, attributes: dict[str, Any], ins: list[str | None],
        scope: Scope, opset: int,
    ) -> bool:  # fmt: skip
        """A weight that is computed from weights: a parameter which is computed when it is read."""
        if node.domain not in ("", "ai.onnx"):
            return False
        try:
            typed = infer(
                node,
                [None if v is None else (self.builder.values[v].shape, self.builder.values[v].dtype)
                 for v in ins],
                lambda i: self.known(ins[i] if i < len(ins) else None, KNOWN_ELEMENTS),
                self.opsets,
            )  # fmt: skip
        except ShapeConflict:
            return False
        if node.op_type == "Identity" and ins[0] is not None:
            scope[node.output[0]] = ins[0]
            return True
        if any(shape is None or None in shape or dtype is None for shape, dtype in typed):
            small = [self.known(v, KNOWN_ELEMENTS) for v in ins]
            if any(v is not None and a is None for v, a in zip(ins, small, strict=True)):
                return False
            try:
                arrays = evaluate(node, small, attributes, opset)
            except CannotFold:
                return False
            for output, array in zip(node.output, arrays, strict=False):
                scope[output] = self.add_array(output, array)
            return True

        total = max(math.prod(n or 0 for n in shape or ()) for shape, _ in typed)

        def compute(arrays: Sequence[Array], which: int) -> Array:
            given = iter(arrays)
            # A weight computed from a weight may be as large as the memory that one takes.
            most = max(MOST_ELEMENTS, sum(_stored(array) for array in arrays))
            if total > most:
                raise CannotFold("too large")
            inputs = [next(given) if v is not None else None for v in ins]
            return evaluate(node, inputs, attributes, opset, most)[which]

        sources = [v for v in ins if v is not None]
        for i, (output, (shape, dtype)) in enumerate(zip(node.output, typed, strict=True)):
            if not output or shape is None or dtype is None:
                continue
            sizes = tuple(n for n in shape if n is not None)
            id = self.derived(output, sources, sizes, dtype, partial(compute, which=i))
            scope[output] = id
            perm = attributes.get("perm", [1, 0])
            if node.op_type == "Transpose" and len(sizes) == 2 and list(perm) == [1, 0]:
                self.transposed[id] = sources[0]
        return True

    def is_known(self, value: str) -> bool:
        """Whether a value is a parameter or a constant."""
        found = self.builder.values[value]
        return found.constant is not None or found.parameter is not None

    def known(self, value: str | None, most: int) -> Array | None:
        """The elements of a known value of at most ``most`` elements, else None."""
        if value is None:
            return None
        found = self.builder.values[value]
        if found.constant is not None:
            return found.constant if found.constant.size <= most else None
        if found.parameter is None or (found.size or 0) > most:
            return None
        if value not in self._memory:
            load = self.builder.parameters[found.parameter].load
            if load is None:
                return None
            try:
                self._memory[value] = load()
            except CannotFold:
                return None
        return self._memory[value]

    def add_array(self, name: str, array: Array) -> str:
        """A computed array as a constant, or as a parameter where it is a large float one."""
        return self.add_tensor(name, Tensor(array.shape, array.dtype.name, lambda: array))

    def add_tensor(self, name: str, tensor: Tensor) -> str:
        """A known tensor: numbers that steer are constants, arrays of floats are parameters."""
        id = self.builder.fresh(name)
        floating = "float" in tensor.dtype or tensor.dtype.startswith("complex")
        if tensor.size <= 1 or (not floating and tensor.size <= CONSTANT_ELEMENTS):
            array = tensor.load()
            return self.builder.value(id, tensor.shape, tensor.dtype, constant=array)
        return self.builder.parameter(id, tensor.shape, dtype=tensor.dtype, load=tensor.load)

    def as_parameter(self, value: str | None) -> str | None:
        """A known value as a parameter; any other as it is."""
        if value is None:
            return None
        found = self.builder.values[value]
        if found.constant is None:
            return value
        array = found.constant
        self.builder.values[value] = Value(value, found.shape, found.dtype, parameter=value)
        self.builder.parameters[value] = Parameter(
            value, array.shape, found.dtype or array.dtype.name, load=lambda: array
        )
        return value

    def derived(
        self, name: str, sources: Sequence[str], shape: tuple[int, ...], dtype: str,
        compute: Callable[[Sequence[Array]], Array],
    ) -> str:  # fmt: skip
        """A parameter that is computed from known values when it is read."""
        loads = []
        for source in sources:
            value = self.builder.values[source]
            if value.parameter is not None:
                loads.append(self.builder.parameters[value.parameter].load)
            else:
                loads.append(partial(np.asarray, value.constant))

        def load() -> Array:
            arrays = [load() for load in loads if load is not None]
            return np.asarray(compute(arrays), order="C")

        id = self.builder.fresh(name)
        return self.builder.parameter(id, shape, dtype=dtype, load=load)


def _stored(array: Array) -> int:
    """The number of elements in memory: an axis that repeats them counts once."""
    return math.prod(n for n, step in zip(array.shape, array.strides, strict=True) if step)


def _dense(values: Tensor, indices: Tensor, shape: tuple[int, ...]) -> Array:
    dense = np.zeros(shape, values.load().dtype)
    where = indices.load()
    if where.ndim == 1:
        dense.reshape(-1)[where] = values.load()
    else:
        dense[tuple(where.T)] = values.load()
    return dense


def _reads(node: onnx.NodeProto) -> Iterable[str]:
    """The names that a node reads, those that its bodies take from outside included."""
    yield from (name for name in node.input if name)
    pending = [g for a in node.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]
    while pending:
        graph = pending.pop()
        own = {name for inner in graph.node for name in inner.output}
        own.update(i.name for i in graph.input)
        for inner in graph.node:
            yield from (name for name in inner.input if name and name not in own)
            for a in inner.attribute:
                pending.extend([a.g] if a.HasField("g") else a.graphs)
        yield from (o.name for o in graph.output if o.name not in own)


def pruned(graph: LayerGraph) -> LayerGraph:
    """The graph without nodes, values and parameters that no output depends on."""
    from dataclasses import replace

    needed = set(graph.outputs)
    kept = []
    for node in reversed(graph.nodes):
        if any(out in needed for out in node.outputs):
            kept.append(node)
            needed.update(v for v in node.inputs if v is not None)
            needed.update(v for v, _ in node.guard)
    kept.reverse()
    needed.update(out for node in kept for out in node.outputs)
    needed.update(graph.inputs)
    values = {id: v for id, v in graph.values.items() if id in needed}
    used = {v.parameter for v in values.values() if v.parameter is not None}
    return replace(graph, nodes=tuple(kept), values=values,
                   parameters={k: p for k, p in graph.parameters.items() if k in used})  # fmt: skip
