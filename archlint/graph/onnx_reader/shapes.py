"""The shapes and types of an operator's outputs, from concrete inputs.

Elementwise operators are computed here; all others by onnx's own per-node inference, which is
given the values of small inputs (the target of a reshape, the scales of a resize).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

from archlint.graph.model import Array
from archlint.graph.onnx_reader.fold import reshaped
from archlint.graph.onnx_reader.read import DTYPE_NUMBER, ELEMENT

Shape = tuple[int | None, ...] | None
Typed = tuple[Shape, str | None]


class ShapeConflict(Exception):
    """The inputs' shapes do not fit the operator."""


SAME = frozenset(
    {"Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "Tanh", "HardSigmoid", "HardSwish",
     "Softplus", "Softsign", "Gelu", "Mish", "Erf", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan",
     "Sinh", "Cosh", "Asinh", "Acosh", "Atanh", "Neg", "Abs", "Exp", "Log", "Sqrt", "Reciprocal",
     "Floor", "Ceil", "Round", "Sign", "Identity", "Softmax", "LogSoftmax", "Hardmax",
     "LpNormalization", "InstanceNormalization", "GroupNormalization", "RMSNormalization", "Swish",
     "ThresholdedRelu", "Shrink", "Clip", "PRelu", "CumSum", "LRN", "MeanVarianceNormalization",
     "Trilu"}
)  # fmt: skip
BROADCAST = frozenset({"Add", "Sub", "Mul", "Div", "Mod", "Sum", "Mean", "Max", "Min", "Pow"})
COMPARE = frozenset(
    {"Equal", "Less", "Greater", "LessOrEqual", "GreaterOrEqual", "And", "Or", "Xor"}
)
# Attributes that are sizes or counts of something that is there.
_POSITIVE = frozenset(
    {"strides", "dilations", "group", "kernel_shape", "num_groups", "blocksize", "hidden_size"}
)
_INT = onnx.AttributeProto.INT
_REAL = {"MatMulInteger": "MatMul", "ConvInteger": "Conv"}


def infer(
    node: onnx.NodeProto,
    inputs: Sequence[Typed | None],
    array: Callable[[int], Array | None],
    opsets: Mapping[str, int],
) -> list[Typed]:
    """(shape, dtype) of every output, None where it cannot be told.

    ``array(i)`` gives the elements of a known small input. Raises ShapeConflict.
    """
    name = node.op_type
    first = inputs[0] if inputs else None
    if name in _REAL and node.domain in ("", "ai.onnx"):
        # The activations are read as real numbers, which the integer operator's own rule refuses.
        real = onnx.NodeProto()
        real.CopyFrom(node)
        real.op_type = _REAL[name]
        del real.input[2:]
        pair: list[Typed | None] = [t and (t[0], "float32") for t in inputs[:2]]
        return _by_onnx(real, pair, lambda i: None, opsets)
    if node.domain in ("", "ai.onnx") and first is not None and len(node.output) == 1:
        if name in SAME:
            return [first]
        if name in BROADCAST or name in COMPARE:
            shape = broadcast([typed[0] for typed in inputs if typed is not None])
            return [(shape, "bool" if name in COMPARE else first[1])]
    return _by_onnx(node, inputs, array, opsets)


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """numpy's broadcasting with unknown sizes. Raises ShapeConflict."""
    if any(shape is None for shape in shapes):
        return None
    rank = max((len(shape) for shape in shapes if shape is not None), default=0)
    result: list[int | None] = []
    for axis in range(1, rank + 1):
        sizes = {s[-axis] for s in shapes if s is not None and len(s) >= axis} - {1}
        known = {n for n in sizes if n is not None}
        if len(known) > 1:
            raise ShapeConflict(f"shapes {[list(s or ()) for s in shapes]} do not broadcast")
        result.append(known.pop() if known else (None if None in sizes else 1))
    return tuple(reversed(result))


@cache
def schema(op_type: str, opset: int, domain: str) -> onnx.defs.OpSchema | None:
    """What onnx knows of an operator, None where it knows none of the name."""
    try:
        return onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None


@cache
def _form(op_type: str, opset: int, domain: str) -> _Form | None:
    known = schema(op_type, opset, domain)
    if known is None:
        return None
    return _Form(
        range(known.min_input, known.max_input + 1),
        range(known.min_output, known.max_output + 1),
        {name: int(a.type.value) for name, a in known.attributes.items()},  # type: ignore[attr-defined]
        frozenset(name for name, a in known.attributes.items() if a.required),
    )


@dataclass(frozen=True, slots=True)
class _Form:
    inputs: range
    outputs: range
    types: Mapping[str, int]
    required: frozenset[str]


def is_well_formed(node: onnx.NodeProto, opset: int) -> bool:
    """Whether a node has the attributes, of the types, and as many inputs and outputs as its
    operator asks for; True where the operator is not one of onnx's."""
    form = _form(node.op_type, opset, "" if node.domain == "ai.onnx" else node.domain)
    if form is None:
        return True
    if len(node.input) not in form.inputs or len(node.output) not in form.outputs:
        return False
    given = {a.name: a.type for a in node.attribute}
    for a in node.attribute:
        if a.name in _POSITIVE and (a.i < 1 if a.type == _INT else any(n < 1 for n in a.ints)):
            return False
    # An attribute that the operator's version does not know is nothing that it reads; files before
    # IR version 2 name no types.
    return form.required <= given.keys() and all(
        not type or form.types.get(name, type) == type for name, type in given.items()
    )


def _by_onnx(
    node: onnx.NodeProto,
    inputs: Sequence[Typed | None],
    array: Callable[[int], Array | None],
    opsets: Mapping[str, int],
) -> list[Typed]:
    blank: list[Typed] = [(None, None)] * len(node.output)
    domain = "" if node.domain == "ai.onnx" else node.domain
    known_op = schema(node.op_type, opsets.get(domain, 1), domain)
    if known_op is None:
        return blank
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for i, (name, typed) in enumerate(zip(node.input, inputs, strict=True)):
        if not name or typed is None:
            continue
        types[name] = _type(typed)
        known = array(i)
        if known is not None and known.dtype != object and known.dtype.kind in "iufb":
            data[name] = numpy_helper.from_array(np.ascontiguousarray(known), name)
    imports = [onnx.helper.make_opsetid(d, v) for d, v in opsets.items()]
    try:
        found = shape_inference.infer_node_outputs(known_op, node, types, data, None, imports)
    except Exception as error:
        if type(error).__name__ == "InferenceError":
            text = str(error).replace("\n", " ").strip()
            raise ShapeConflict(text.split(") ", 1)[-1] if ") " in text else text) from error
        return blank  # a type that inference does not know
    result = [_typed(found[name]) if name in found else (None, None) for name in node.output]
    if node.op_type == "STFT":
        result[0] = (_stft(result[0][0], inputs, array, node), result[0][1])
    if node.op_type == "Reshape" and (target := array(1)) is not None and inputs[0] is not None:
        result[0] = (
            _reshape(inputs[0][0], [int(n) for n in target.reshape(-1)], node),
            inputs[0][1],
        )
    return result


def _stft(
    shape: Shape,
    inputs: Sequence[Typed | None],
    array: Callable[[int], Array | None],
    node: onnx.NodeProto,
) -> Shape:
    """[sample, frame, frequency, 2]; onnx's rule forgets ``onesided`` where a window is given."""
    if shape is None or len(shape) != 4:
        return shape
    window = inputs[2] if len(inputs) > 2 else None
    length = window[0][0] if window is not None and window[0] else None
    known = array(3) if length is None and len(inputs) > 3 else None
    if known is not None and known.size == 1:
        length = int(known.reshape(-1)[0])
    onesided = next((a.i for a in node.attribute if a.name == "onesided"), 1)
    if length is not None and onesided:
        length = length // 2 + 1
    return (*shape[:2], length, shape[3])


def _reshape(shape: Shape, target: list[int], node: onnx.NodeProto) -> Shape:
    zero = next((a.i for a in node.attribute if a.name == "allowzero"), 0)
    if shape is None or any(n is None for n in shape):
        unknown: list[int | None] = [None if n == -1 else n for n in target]
        for i, n in enumerate(target):
            if n == 0 and not zero:
                unknown[i] = shape[i] if shape is not None and i < len(shape) else None
        return tuple(unknown)
    try:
        return reshaped([n for n in shape if n is not None], target, zero)
    except ValueError as error:
        raise ShapeConflict(str(error)) from error


def _type(typed: Typed) -> onnx.TypeProto:
    shape, dtype = typed
    proto = onnx.TypeProto()
    proto.tensor_type.elem_type = DTYPE_NUMBER.get(dtype or "", 1)
    if shape is not None:
        proto.tensor_type.shape.SetInParent()
        for n in shape:
            dim = proto.tensor_type.shape.dim.add()
            if n is not None:
                dim.dim_value = n
    return proto


def _typed(proto: onnx.TypeProto) -> Typed:
    return declared(proto)


def declared(proto: Any) -> Typed:
    """(shape, dtype) of a type as a file declares it; sizes below zero count as unknown."""
    if not proto.HasField("tensor_type"):
        return None, None
    tensor = proto.tensor_type
    dtype = ELEMENT[tensor.elem_type][0] if tensor.elem_type in ELEMENT else None
    if not tensor.HasField("shape"):
        return None, dtype
    return tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value >= 0 else None
        for d in tensor.shape.dim
    ), dtype
