"""Control flow: If, Loop, Scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

import numpy as np
import onnx

from archlint.graph.builder import GraphBuilder
from archlint.graph.model import LayerGraph
from archlint.graph.names import Origin
from archlint.graph.onnx_reader.reader import Call, Guard, Reader, Scope, pruned
from archlint.graph.onnx_reader.shapes import Shape, ShapeConflict, Typed, is_well_formed

MOST_UNROLLED = 16  # trips of a loop that are written out


def _body(node: onnx.NodeProto, name: str) -> onnx.GraphProto:
    for attribute in node.attribute:
        if attribute.name == name:
            graph: onnx.GraphProto = attribute.g
            return graph
    raise LookupError(name)


def _call(reader: Reader, node: onnx.NodeProto, scope: Scope, guard: Guard) -> Call:
    ins = [scope[name] if name else None for name in node.input]
    origin = reader.origins.get(id(node), Origin())
    blank: list[Typed] = [(None, None)] * len(node.output)
    return Call(reader, node, reader.attributes(node), ins, blank, scope, guard, origin)


def _if(reader: Reader, node: onnx.NodeProto, scope: Scope, guard: Guard) -> None:
    """A branch whose condition is known is taken; else both are kept under guards and joined."""
    call = _call(reader, node, scope, guard)
    condition = call.value(0)
    known = reader.known(condition, 1)
    if known is not None:
        reader.folded += 1
        body = _body(node, "then_branch" if known.reshape(-1)[0] else "else_branch")
        inner = dict(scope)
        reader.run_body(body, inner, guard)
        for name, output in zip(node.output, body.output, strict=True):
            scope[name] = inner[output.name]
        return
    results, misfits = [], []
    for truth in (True, False):
        body = _body(node, "then_branch" if truth else "else_branch")
        values, misfit = _branch(reader, body, scope, (*guard, (condition, truth)))
        results.append(values)
        misfits.append(misfit)
    if misfits[0] is not None and misfits[1] is not None:
        raise misfits[0]
    for i, name in enumerate(node.output):
        then, otherwise = results[0][i], results[1][i]
        a, b = reader.builder.values[then], reader.builder.values[otherwise]
        shape = _join(a.shape, b.shape)
        if misfits[0] is not None or misfits[1] is not None:
            shape = b.shape if misfits[0] is not None else a.shape  # the one that can run
        if name:
            call.emit("select", [condition, then, otherwise], out=i, typed=(shape, a.dtype))


def _branch(reader: Reader, body: onnx.GraphProto, scope: Scope, guard: Guard
            ) -> tuple[list[str], ShapeConflict | None]:  # fmt: skip
    """The outputs of a branch that may be taken, and why it does not fit as it is, if so.

    Where the reader has alternatives, a branch that the sizes of the graph's inputs do not fit
    reads these inputs at other sizes (a network for 8 and for 16 kHz wants windows of two
    lengths); where none fits, the shapes in it that cannot be told are unknown.
    """
    nodes, folded = len(reader.builder.nodes), reader.folded
    misfit: ShapeConflict | None = None
    for inner in chain([dict(scope)], _resized(reader, body, scope, guard)):
        try:
            reader.run_body(body, inner, guard)
            return [inner[output.name] for output in body.output], misfit
        except ShapeConflict as conflict:
            if not reader.alternatives:
                raise
            misfit = misfit or conflict
            del reader.builder.nodes[nodes:]
            reader.folded = folded
    inner = dict(scope)
    strict, reader.strict = reader.strict, False
    try:
        reader.run_body(body, inner, guard)
    finally:
        reader.strict = strict
    return [inner[output.name] for output in body.output], misfit


def _resized(reader: Reader, body: onnx.GraphProto, scope: Scope, guard: Guard) -> Iterator[Scope]:
    """Scopes in which the graph's inputs that a body reads have other sizes, each once."""
    builder = reader.builder
    read = [name for name in _captured(body) if scope.get(name) in builder.inputs]
    tried = {tuple(builder.values[scope[name]].shape for name in read)}
    for sizes in reader.alternatives:
        shapes = tuple(sizes[name][0] if name in sizes else None for name in read)
        if shapes in tried:
            continue
        tried.add(shapes)
        inner = dict(scope)
        for name, shape in zip(read, shapes, strict=True):
            value = builder.values[scope[name]]
            if shape is not None and shape != value.shape:
                inner[name] = builder.node("identity", [value.id], shape, value.dtype, guard=guard,
                                           name=f"{name}:resized", source_op="If")  # fmt: skip
        yield inner


def _join(a: Shape, b: Shape) -> Shape:
    if a is None or b is None or len(a) != len(b):
        return None
    return tuple(m if m == n else None for m, n in zip(a, b, strict=True))


def _loop(reader: Reader, node: onnx.NodeProto, scope: Scope, guard: Guard) -> None:
    call = _call(reader, node, scope, guard)
    body = _body(node, "body")
    trips = call.scalar(0) if call.has(0) else None
    condition = call.scalar(1) if call.has(1) else 1.0
    keeps_going = _condition_never_changes(body)
    if trips is not None and condition == 1.0 and keeps_going and trips <= MOST_UNROLLED:
        _unrolled(reader, call, body, int(trips))
        return
    carried = len(node.input) - 2
    inputs: list[Typed] = [((), "int64"), ((), "bool")]
    for i in range(carried):
        value = reader.builder.values[call.value(2 + i)]
        inputs.append((value.shape, value.dtype))
    graph, captured = _body_graph(reader, body, scope, inputs)
    scanned = len(body.output) - 1 - carried
    count = int(trips) if trips is not None and condition == 1.0 and keeps_going else None
    outs: list[Typed] = []
    for i in range(carried):
        value = graph.values[graph.outputs[1 + i]]
        before = inputs[2 + i][0]
        outs.append((_join(value.shape, before), value.dtype))
    for i in range(scanned):
        value = graph.values[graph.outputs[1 + carried + i]]
        outs.append((None if value.shape is None else (count, *value.shape), value.dtype))
    _emit_with_body(call, "loop", [call.optional(0), call.optional(1), *call.ins[2:], *captured],
                    outs, graph, carried=carried)  # fmt: skip


def _condition_never_changes(body: onnx.GraphProto) -> bool:
    """Whether the body's condition output is its condition input, or a constant true."""
    name = body.output[0].name
    for node in body.node:
        if name in node.output:
            if node.op_type in ("Identity", "Cast"):
                return bool(node.input[0] == body.input[1].name) or any(
                    t.name == node.input[0] for t in body.initializer
                )
            return bool(node.op_type == "Constant")
    return bool(name == body.input[1].name) or any(t.name == name for t in body.initializer)


def _unrolled(reader: Reader, call: Call, body: onnx.GraphProto, trips: int) -> None:
    state = [value for value in call.ins[2:] if value is not None]
    carried = len(state)
    scanned: list[list[str]] = [[] for _ in range(len(body.output) - 1 - carried)]
    for trip in range(trips):
        inner = dict(call.scope)
        inner[body.input[0].name] = reader.builder.constant(np.array(trip, np.int64), "trip")
        inner[body.input[1].name] = reader.builder.constant(np.array(True), "condition")
        inner.update((body.input[2 + i].name, value) for i, value in enumerate(state))
        reader.run_body(body, inner, call.guard)
        results = [inner[output.name] for output in body.output][1:]
        state = results[:carried]
        for rows, value in zip(scanned, results[carried:], strict=True):
            rows.append(value)
    for name, value in zip(call.node.output, state, strict=False):
        if name:
            call.scope[name] = value
    for i, rows in enumerate(scanned):
        if carried + i >= len(call.node.output) or not call.node.output[carried + i]:
            continue
        if not rows:
            raise LookupError("a loop that never runs")
        first = reader.builder.values[rows[0]]
        shape = None if first.shape is None else (len(rows), *first.shape)
        call.emit("stack", rows, out=carried + i, typed=(shape, first.dtype), axis=0)


def _scan(reader: Reader, node: onnx.NodeProto, scope: Scope, guard: Guard) -> None:
    call = _call(reader, node, scope, guard)
    body = _body(node, "body")
    if call.opset < 9:
        raise LookupError("Scan before opset 9")
    count = int(call.get("num_scan_inputs"))
    carried = len(node.input) - count
    axes_in = list(call.get("scan_input_axes") or [0] * count)
    inputs: list[Typed] = []
    length: int | None = None
    for i in range(len(node.input)):
        value = reader.builder.values[call.value(i)]
        shape = value.shape
        if i >= carried and shape is not None:
            axis = axes_in[i - carried] % len(shape)
            length = shape[axis] if length is None else length
            shape = (*shape[:axis], *shape[axis + 1 :])
        inputs.append((shape, value.dtype))
    graph, captured = _body_graph(reader, body, scope, inputs)
    produced = len(body.output) - carried
    axes_out = list(call.get("scan_output_axes") or [0] * produced)
    outs: list[Typed] = []
    for i, id in enumerate(graph.outputs):
        value = graph.values[id]
        shape = value.shape
        if i >= carried and shape is not None:
            axis = axes_out[i - carried] % (len(shape) + 1)
            shape = (*shape[:axis], length, *shape[axis:])
        outs.append((shape, value.dtype))
    _emit_with_body(
        call, "scan", [*call.ins, *captured], outs, graph, carried=carried,
        input_axes=tuple(axes_in), output_axes=tuple(axes_out),
        input_reverse=tuple(call.get("scan_input_directions") or [0] * count),
        output_reverse=tuple(call.get("scan_output_directions") or [0] * produced),
    )  # fmt: skip


def _emit_with_body(call: Call, op: str, ins: list[str | None], outs: list[Typed],
                    body: LayerGraph, **attributes: object) -> None:  # fmt: skip
    call.outs = outs
    builder = call.reader.builder
    while len(call.node.output) < len(call.outs):
        call.outs.pop()
    call.emit_all(op, ins, **attributes)
    builder.nodes[-1] = replace(builder.nodes[-1], body=body, inputs=tuple(ins))


def _body_graph(
    reader: Reader, body: onnx.GraphProto, scope: Scope, inputs: list[Typed]
) -> tuple[LayerGraph, list[str | None]]:
    """The body as a graph of its own, and the outer values that it takes besides its inputs.

    Known outer values are copied into the body; all others become further inputs, in the order in
    which they follow the loop's own inputs.
    """
    outer = reader.builder
    inner = GraphBuilder(f"{outer.name}:body", reader.mode, "onnx")
    names: Scope = {}
    for info, (shape, dtype) in zip(body.input, inputs, strict=False):
        names[info.name] = inner.input(inner.fresh(info.name), shape, dtype)
    captured: list[str | None] = []
    taken = _captured(body)
    for name in taken:
        if name in names or name not in scope:
            continue
        value = outer.values[scope[name]]
        if value.parameter is not None:
            parameter = outer.parameters[value.parameter]
            names[name] = inner.parameter(
                parameter.name, parameter.shape, dtype=parameter.dtype, load=parameter.load
            )
        elif value.constant is not None:
            names[name] = inner.value(inner.fresh(value.id), value.shape, value.dtype,
                                      constant=value.constant)  # fmt: skip
        else:
            names[name] = inner.input(inner.fresh(value.id), value.shape, value.dtype)
            captured.append(value.id)
    reader.builder, strict, reader.strict = inner, reader.strict, False
    try:
        reader.run_body(body, names, ())
        graph = pruned(inner.finish([names[output.name] for output in body.output]))
    finally:
        reader.builder, reader.strict = outer, strict
    return graph, captured


def _captured(body: onnx.GraphProto) -> list[str]:
    found: dict[str, None] = {}
    pending = [(body, frozenset[str]())]
    while pending:
        graph, hidden = pending.pop()
        own = {name for node in graph.node for name in node.output}
        own.update(info.name for info in graph.input)
        own.update(tensor.name for tensor in graph.initializer)
        hidden = hidden | own
        for node in graph.node:
            found.update((name, None) for name in node.input if name and name not in hidden)
            for a in node.attribute:
                pending.extend((g, hidden) for g in ([a.g] if a.HasField("g") else a.graphs))
        found.update((o.name, None) for o in graph.output if o.name not in hidden)
    return list(found)


def _guarded(function: Callable[[Reader, onnx.NodeProto, Scope, Guard], None]
             ) -> Callable[[Reader, onnx.NodeProto, Scope, Guard], None]:  # fmt: skip
    """Keep the node as unknown where its form is not understood."""

    def lower(reader: Reader, node: onnx.NodeProto, scope: Scope, guard: Guard) -> None:
        before = len(reader.builder.nodes)
        try:
            if not is_well_formed(node, reader.opsets.get("", 1)):
                raise LookupError("a part is missing")
            function(reader, node, scope, guard)
        except (LookupError, ArithmeticError, ValueError):
            del reader.builder.nodes[before:]
            _call(reader, node, scope, guard).unknown()

    return lower


CONTROL = {"If": _guarded(_if), "Loop": _guarded(_loop), "Scan": _guarded(_scan)}
