"""Static evaluation of operators whose inputs are known: shape plumbing and computed weights.

The common ones are written here with numpy, so that a small file needs no import of the reference
implementation; all others are computed by ``onnx.reference``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from archlint.graph.model import Array
from archlint.graph.onnx_reader.read import ELEMENT, numpy_dtype
from archlint.registering import registering

Attributes = Mapping[str, Any]
Inputs = Sequence[Array | None]
Evaluate = Callable[[Inputs, Attributes, int], Sequence[Any]]

MOST_ELEMENTS = 1 << 22  # nothing larger is ever made by folding
RANDOM = frozenset(
    {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial",
     "Bernoulli", "Dropout"}
)  # fmt: skip


class CannotFold(ValueError):
    """The value is not worth, or not possible, to compute statically."""


def evaluate(
    node: onnx.NodeProto,
    inputs: Inputs,
    attributes: Attributes,
    opset: int,
    most: int = MOST_ELEMENTS,
) -> Sequence[Array]:
    """The outputs of a node whose inputs are all known, of at most ``most`` elements each.

    Raises CannotFold.
    """
    if node.op_type in RANDOM:
        raise CannotFold(node.op_type)
    if node.domain not in ("", "ai.onnx"):
        raise CannotFold(f"{node.domain}.{node.op_type}")
    function = _TABLE.get(node.op_type)
    try:
        with np.errstate(all="ignore"):
            found = (
                function(inputs, attributes, opset)
                if function is not None
                else _reference(node, inputs, opset, most)
            )
    except CannotFold:
        raise
    except Exception as error:  # whatever numpy says of odd operands
        raise CannotFold(f"{node.op_type}: {error}") from error
    arrays = [np.asarray(array) for array in found]
    if any(array.size > most for array in arrays):
        raise CannotFold("too large")
    return arrays


def _reference(node: onnx.NodeProto, inputs: Inputs, opset: int, most: int) -> Sequence[Any]:
    """The operator as onnx's own reference implementation computes it."""
    if sum(0 if array is None else array.size for array in inputs) > 2 * most:
        raise CannotFold("too large")
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(node, opsets={"": opset})
    feeds = {name: array for name, array in zip(node.input, inputs, strict=False) if name}
    found = evaluator.run(None, feeds)
    return found if isinstance(found, list) else [found]


_TABLE: dict[str, Evaluate] = {}
_fold = registering(_TABLE)


def _elementwise(name: str, function: Callable[..., Any]) -> None:
    def apply(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
        result = function(*[array for array in inputs if array is not None])
        first = inputs[0]
        if first is not None and result.dtype != bool and first.dtype != result.dtype:
            result = result.astype(first.dtype)
        return [result]

    _TABLE[name] = apply


def _divide(a: Array, b: Array) -> Any:
    if np.issubdtype(a.dtype, np.integer):  # ONNX truncates towards zero
        return np.trunc(np.divide(a.astype(np.float64), b)).astype(a.dtype)
    return np.divide(a, b)


_NUMPY: dict[str, Callable[..., Any]] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": _divide, "Pow": np.power,
    "Neg": np.negative, "Abs": np.abs, "Sqrt": np.sqrt, "Exp": np.exp, "Log": np.log,
    "Floor": np.floor, "Ceil": np.ceil, "Round": np.round, "Sign": np.sign, "Sin": np.sin,
    "Cos": np.cos, "Tanh": np.tanh, "Reciprocal": np.reciprocal,
    "Relu": lambda x: np.maximum(x, x.dtype.type(0)),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Equal": np.equal, "Less": np.less, "Greater": np.greater, "LessOrEqual": np.less_equal,
    "GreaterOrEqual": np.greater_equal, "And": np.logical_and, "Or": np.logical_or,
    "Xor": np.logical_xor, "Not": np.logical_not, "IsNaN": np.isnan, "Identity": lambda x: x,
}  # fmt: skip
for _name, _function in _NUMPY.items():
    _elementwise(_name, _function)


@_fold("Constant")
def _constant(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    for key, dtype in (("value_float", "float32"), ("value_int", "int64"),
                       ("value_floats", "float32"), ("value_ints", "int64")):  # fmt: skip
        if key in attributes:
            return [np.array(attributes[key], dtype)]
    for key in ("value_string", "value_strings"):
        if key in attributes:
            return [np.array(attributes[key], object)]
    raise CannotFold("a sparse or empty constant")


@_fold("ConstantOfShape")
def _constant_of_shape(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    shape = _ints(inputs[0])
    if any(n < 0 for n in shape) or math.prod(shape) > MOST_ELEMENTS:
        raise CannotFold("too large")
    value = attributes.get("value")
    return [np.full(shape, np.float32(0) if value is None else value.reshape(-1)[0])]


@_fold("Cast")
def _cast(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    name = ELEMENT[attributes["to"]][0]
    if name == "str" or inputs[0] is None or inputs[0].dtype == object:
        raise CannotFold("text")
    return [inputs[0].astype(numpy_dtype(name))]


@_fold("CastLike")
def _cast_like(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    return [_given(inputs[0]).astype(_given(inputs[1]).dtype)]


@_fold("Shape")
def _shape(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    shape = _given(inputs[0]).shape
    return [np.array(shape[attributes.get("start", 0) : attributes.get("end")], np.int64)]


@_fold("Size")
def _size(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    return [np.array(_given(inputs[0]).size, np.int64)]


@_fold("Gather")
def _gather(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    data, indices = _given(inputs[0]), _given(inputs[1])
    size = data.size // max(data.shape[attributes.get("axis", 0)], 1) * indices.size
    if size > MOST_ELEMENTS:
        raise CannotFold("too large")
    return [np.take(data, indices.astype(np.int64), axis=attributes.get("axis", 0))]


def axes_of(inputs: Inputs, attributes: Attributes, position: int = 1) -> list[int] | None:
    """The axes of an operator that moved them from an attribute to an input; None if left out."""
    if "axes" in attributes:
        return list(attributes["axes"])
    given = inputs[position] if len(inputs) > position else None
    return None if given is None else _ints(given)


@_fold("Unsqueeze")
def _unsqueeze(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    data = _given(inputs[0])
    axes = axes_of(inputs, attributes) or []
    return [np.expand_dims(data, tuple(axis % (data.ndim + len(axes)) for axis in axes))]


@_fold("Squeeze")
def _squeeze(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    axes = axes_of(inputs, attributes)
    return [np.squeeze(_given(inputs[0]), None if axes is None else tuple(axes))]


@_fold("Concat")
def _concat(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    return [np.concatenate([_given(array) for array in inputs], attributes["axis"])]


@_fold("Slice")
def _slice(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    data = _given(inputs[0])
    if opset < 10:
        starts, ends = attributes["starts"], attributes["ends"]
        axes, steps = attributes.get("axes"), None
    else:
        starts, ends = _ints(inputs[1]), _ints(inputs[2])
        axes = _ints(inputs[3]) if len(inputs) > 3 and inputs[3] is not None else None
        steps = _ints(inputs[4]) if len(inputs) > 4 and inputs[4] is not None else None
    where = [slice(None)] * data.ndim
    for i, axis in enumerate(range(len(starts)) if axes is None else axes):
        step = steps[i] if steps is not None else 1
        end: int | None = ends[i]
        if step < 0 and ends[i] < -data.shape[axis]:
            end = None
        where[axis] = slice(starts[i], end, step)
    return [data[tuple(where)]]


@_fold("Range")
def _range(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    start, limit, step = (_given(array).reshape(-1)[0] for array in inputs)
    count = max(math.ceil((float(limit) - float(start)) / float(step)), 0)
    if count > MOST_ELEMENTS:
        raise CannotFold("too large")
    return [(start + np.arange(count) * step).astype(_given(inputs[0]).dtype)]


@_fold("Reshape")
def _reshape(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    data = _given(inputs[0])
    return [data.reshape(reshaped(data.shape, _ints(inputs[1]), attributes.get("allowzero", 0)))]


def reshaped(shape: Sequence[int], target: Sequence[int], allowzero: int = 0) -> tuple[int, ...]:
    """The shape that a reshape makes; 0 copies a dimension, −1 takes what is left over.

    Raises ValueError where the number of elements does not fit.
    """
    sizes = [
        shape[i] if n == 0 and not allowzero and i < len(shape) else n for i, n in enumerate(target)
    ]
    total = math.prod(shape)
    if -1 in sizes:
        rest = math.prod(n for n in sizes if n != -1)
        if rest == 0 or total % rest:
            raise ValueError(f"cannot reshape {list(shape)} to {list(target)}")
        sizes[sizes.index(-1)] = total // rest
    if math.prod(sizes) != total or any(n < 0 for n in sizes):
        raise ValueError(f"cannot reshape {list(shape)} to {list(target)}")
    return tuple(sizes)


@_fold("Transpose")
def _transpose(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    return [np.transpose(_given(inputs[0]), attributes.get("perm"))]


@_fold("Flatten")
def _flatten(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    data, axis = _given(inputs[0]), attributes.get("axis", 1)
    axis = axis + data.ndim if axis < 0 else axis
    return [data.reshape(math.prod(data.shape[:axis]), -1)]


@_fold("Expand")
def _expand(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    data = _given(inputs[0])
    shape = np.broadcast_shapes(data.shape, tuple(_ints(inputs[1])))
    if math.prod(shape) > MOST_ELEMENTS:
        raise CannotFold("too large")
    return [np.broadcast_to(data, shape)]


@_fold("Tile")
def _tile(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    data, repeats = _given(inputs[0]), _ints(inputs[1])
    if data.size * math.prod(repeats) > MOST_ELEMENTS or any(n < 0 for n in repeats):
        raise CannotFold("too large")
    return [np.tile(data, repeats)]


@_fold("Where")
def _where(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    condition, a, b = (_given(array) for array in inputs)
    shape = np.broadcast_shapes(condition.shape, a.shape, b.shape)
    if math.prod(shape) > MOST_ELEMENTS:
        raise CannotFold("too large")
    return [np.where(condition, a, b).astype(a.dtype)]


def _chain(name: str, function: Callable[[Any, Any], Any]) -> None:
    def apply(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
        result = _given(inputs[0])
        for array in inputs[1:]:
            result = function(result, _given(array))
        return [result]

    _TABLE[name] = apply


_chain("Min", np.minimum)
_chain("Max", np.maximum)
_chain("Sum", np.add)


@_fold("Split")
def _split(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    data, axis = _given(inputs[0]), attributes.get("axis", 0)
    sizes = attributes.get("split")
    if sizes is None and len(inputs) > 1 and inputs[1] is not None:
        sizes = _ints(inputs[1])
    if sizes is None:
        raise CannotFold("equal parts")
    return np.split(data, np.cumsum(sizes)[:-1], axis)


@_fold("DequantizeLinear")
def _dequantize(inputs: Inputs, attributes: Attributes, opset: int) -> Sequence[Any]:
    return [dequantized(_given(inputs[0]), _given(inputs[1]),
                        inputs[2] if len(inputs) > 2 else None,
                        attributes.get("axis", 1), attributes.get("block_size", 0))]  # fmt: skip


def dequantized(x: Array, scale: Array, zero: Array | None, axis: int = 1, block: int = 0) -> Array:
    """(x − zero)·scale, per tensor, per slice along ``axis``, or per block of ``block`` entries."""

    def fit(parameter: Array) -> Array:
        if parameter.size == 1:
            return parameter.reshape(())
        if block:
            repeated = np.repeat(parameter, block, axis)
            return np.take(repeated, np.arange(x.shape[axis]), axis)
        shape = [1] * x.ndim
        shape[axis] = parameter.size
        return parameter.reshape(shape)

    target = scale.dtype if scale.dtype.kind == "f" else np.dtype(np.float32)
    centred = x.astype(np.float32)
    if zero is not None:
        centred = centred - fit(zero).astype(np.float32)
    result: Array = (centred * fit(scale).astype(np.float32)).astype(target)
    return result


def _given(array: Array | None) -> Any:
    if array is None:
        raise CannotFold("an input is left out")
    return array


def _ints(array: Array | None) -> list[int]:
    return [int(n) for n in _given(array).reshape(-1)]
