"""Quantised operators, read as the real-valued network they stand for.

Weights are dequantised. A dynamically quantised activation is read as the activation itself with
scale one and zero point zero, so that the scale of the weight, which the file multiplies in later,
is all that remains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from archlint.graph.model import Array
from archlint.graph.onnx_reader.fold import dequantized
from archlint.graph.onnx_reader.lower.affine import convolution, linear, matmul
from archlint.graph.onnx_reader.reader import Call, lowers
from archlint.graph.onnx_reader.shapes import broadcast


def real_weight(c: Call, i: int, scale: int | None, zero: int | None, axis: int) -> str:
    """Input ``i``, a known 8-bit tensor, as the numbers it stands for (without scale: unscaled)."""
    sources = [c.value(i)]
    if scale is not None:
        sources.append(c.value(scale))
    if zero is not None and c.has(zero):
        if not c.is_known(zero):
            raise LookupError("the zero point is not known")
        sources.append(c.value(zero))
    if scale is not None and not c.is_known(scale):
        raise LookupError("the scale is not known")

    def compute(arrays: Sequence[Array]) -> Array:
        given = list(arrays)
        data = given.pop(0)
        factor = given.pop(0) if scale is not None else np.ones(1, np.float32)
        return dequantized(data, factor, given[0] if given else None, axis)

    return c.reader.derived(f"{c.value(i)}:float", sources, c.sizes(i), "float32", compute)


@lowers("DynamicQuantizeLinear")
def _dynamic_quantize(c: Call) -> None:
    c.alias(0, c.value(0))
    c.alias(1, c.constant(np.float32(1)))
    c.alias(2, c.constant(np.float32(0)))


def _shifted(c: Call, i: int, zero: int) -> str:
    """An activation minus its zero point, where that is not zero."""
    if not c.has(zero) or c.scalar(zero) == 0.0:
        return c.value(i)
    return c.temp("sub", [c.value(i), c.value(zero)], c.shape(i))


@lowers("MatMulInteger")
def _matmul_integer(c: Call) -> None:
    c.outs = [(c.outs[0][0], "float32")]
    a = _shifted(c, 0, 2)
    c.ins = [a, c.value(1), *c.ins[2:]]
    if c.is_known(1):
        c.ins[1] = real_weight(c, 1, None, 3, axis=c.rank(1) - 1)
    matmul(c, 0, 1)


@lowers("ConvInteger")
def _conv_integer(c: Call) -> None:
    c.outs = [(c.outs[0][0], "float32")]
    x = _shifted(c, 0, 2)
    weight = real_weight(c, 1, None, 3, axis=0) if c.is_known(1) else c.value(1)
    convolution(c, x, weight, None, c.shape(0))


@lowers("QuantizeLinear")
@lowers("QuantizeLinear", domain="com.microsoft")
def _quantize(c: Call) -> None:
    axis = c.get("axis", 1)
    dtype = c.outs[0][1] or (c.dtype(2) if c.has(2) else "uint8") or "uint8"
    c.emit("quantize", [c.value(0), c.value(1), c.optional(2)], typed=(c.shape(0), dtype),
           axis=int(axis), dtype=dtype)  # fmt: skip


@lowers("DequantizeLinear")
@lowers("DequantizeLinear", domain="com.microsoft")
def _dequantize(c: Call) -> None:
    if c.is_known(0) and c.is_known(1):
        c.alias(0, real_weight(c, 0, 1, 2, int(c.get("axis", 1))))
        return
    if c.scalar(1) is not None and _dequantized_table(c):
        return
    c.emit("dequantize", [c.value(0), c.value(1), c.optional(2)], typed=(c.shape(0), "float32"),
           axis=int(c.get("axis", 1)))  # fmt: skip


_MOVES = frozenset({"transpose", "reshape", "slice", "select_index", "flip", "identity"})
_NEAR = 16  # nodes between a table of 8 bits and where its rows become real numbers


def _dequantized_table(c: Call) -> bool:
    """Rows of a table of 8 bits, perhaps moved: dequantise the table instead of its rows."""
    builder = c.reader.builder
    producer = {out: node for node in builder.nodes[-_NEAR:] for out in node.outputs}
    moves = []
    node = producer.get(c.value(0))
    while node is not None and node.op in _MOVES and len(node.inputs) == 1:
        moves.append(node)
        node = producer.get(node.inputs[0] or "")
    if node is None or node.op != "embedding" or not c.reader.is_known(node.inputs[1] or ""):
        return False
    ids, table = node.inputs
    inner = replace(c, ins=[table, *c.ins[1:]])
    y = builder.values[node.output].shape, "float32"
    inputs = [ids, real_weight(inner, 0, 1, 2, 1)]
    if not moves:
        c.emit("embedding", inputs, typed=y)
        return True
    id = c.temp("embedding", inputs, *y)
    for move in reversed(moves[1:]):
        id = c.temp(move.op, [id], builder.values[move.output].shape, "float32", "",
                    **move.attributes)  # fmt: skip
    last: dict[str, Any] = dict(moves[0].attributes)
    c.emit(moves[0].op, [id], typed=(c.outs[0][0], "float32"), **last)
    return True


def _real(c: Call, i: int, scale: int, zero: int, axis: int = 0) -> str:
    """A quantised input as real numbers, whether weight or activation."""
    if c.is_known(i):
        return real_weight(c, i, scale, zero, axis)
    return c.temp("dequantize", [c.value(i), c.value(scale), c.optional(zero)], c.shape(i), axis=1)


def _requantized(c: Call, y: str, scale: int, zero: int) -> None:
    dtype = c.dtype(zero) if c.has(zero) else "uint8"
    shape = c.reader.builder.values[y].shape
    c.emit("quantize", [y, c.value(scale), c.optional(zero)], typed=(shape, dtype), axis=1,
           dtype=dtype)  # fmt: skip


@lowers("QLinearConv")
def _qlinear_conv(c: Call) -> None:
    x, weight = _real(c, 0, 1, 2), _real(c, 3, 4, 5)
    bias = None
    if c.has(8):  # int32 in units of x_scale·w_scale
        sources = [c.value(8), c.value(1), c.value(4)]

        def unscaled(arrays: Sequence[Array]) -> Array:
            units = arrays[1].reshape(-1) * arrays[2].reshape(-1)
            return np.asarray(arrays[0] * units, np.float32)

        bias = c.reader.derived(f"{sources[0]}:float", sources, c.sizes(8), "float32", unscaled)
    c.outs = [(c.outs[0][0], "float32")]
    name = c.node.output[0]
    convolution(c, x, weight, bias, c.shape(0))
    _requantized(c, c.scope[name], 6, 7)


@lowers("QLinearMatMul")
def _qlinear_matmul(c: Call) -> None:
    ins = [_real(c, 0, 1, 2), _real(c, 3, 4, 5, axis=-1)]
    shape, name = c.outs[0][0], c.node.output[0]
    known, c.ins = c.ins, [*ins]
    c.outs = [(shape, "float32")]
    matmul(c, 0, 1)
    c.ins = known
    _requantized(c, c.scope[name], 6, 7)


@lowers("QLinearAdd", "QLinearMul", domain="com.microsoft")
def _qlinear_binary(c: Call) -> None:
    a, b = _real(c, 0, 1, 2), _real(c, 3, 4, 5)
    op = "add" if c.node.op_type == "QLinearAdd" else "mul"
    y = c.temp(op, [a, b], broadcast([c.shape(0), c.shape(3)]))
    _requantized(c, y, 6, 7)


@lowers("QLinearSigmoid", "QLinearLeakyRelu", "QLinearGlobalAveragePool", domain="com.microsoft")
def _qlinear_unary(c: Call) -> None:
    x, shape = _real(c, 0, 1, 2), c.sizes(0)
    if c.node.op_type == "QLinearSigmoid":
        y = c.temp("sigmoid", [x], shape)
    elif c.node.op_type == "QLinearLeakyRelu":
        y = c.temp("leaky_relu", [x], shape, slope=float(c.get("alpha", 0.01)))
    else:
        ones = (1,) * (len(shape) - 2)
        y = c.temp("adaptive_avg_pool", [x], (*shape[:2], *ones), size=ones)
    _requantized(c, y, 3, 4)


@lowers("QLinearConcat", domain="com.microsoft")
def _qlinear_concat(c: Call) -> None:
    parts = [_real(c, i, i + 1, i + 2) for i in range(2, len(c.ins), 3)]
    axis = int(c.get("axis", 1)) % c.rank(2)
    sizes = [list(c.sizes(i)) for i in range(2, len(c.ins), 3)]
    sizes[0][axis] = sum(size[axis] for size in sizes)
    _requantized(c, c.temp("concat", parts, tuple(sizes[0]), axis=axis), 0, 1)


@lowers("DynamicQuantizeMatMul", "MatMulIntegerToFloat", domain="com.microsoft")
def _dynamic_matmul(c: Call) -> None:
    dynamic = c.node.op_type == "DynamicQuantizeMatMul"
    scale, zero, bias = (2, 3, 4) if dynamic else (3, 5, 6)
    if not c.is_known(1):
        raise LookupError("the second factor is no weight")
    x = c.value(0)
    if not dynamic:
        x = _real(c, 0, 2, 4)
    shape = c.shape(0)
    out = None if shape is None else (*shape[:-1], c.sizes(1)[-1])
    c.outs = [(out, "float32")]
    c.ins[1] = real_weight(c, 1, scale, zero, axis=1)
    linear(c, x, 1, c.weight(bias))


@lowers("MatMulNBits", domain="com.microsoft")
def _matmul_nbits(c: Call) -> None:
    """Weights in blocks of few bits: [out, blocks, bytes], a scale and zero point a block."""
    n, k, bits = int(c.get("N")), int(c.get("K")), int(c.get("bits", 4))
    block = int(c.get("block_size"))
    if not c.is_known(1) or not c.is_known(2) or bits not in (4, 8):
        raise LookupError("the weight is not known")
    has_zero = c.has(3)

    def compute(arrays: Sequence[Array]) -> Array:
        data, scale, *rest = list(arrays)
        blocks = -(-k // block)

        def wide(a: Array, columns: int) -> Array:
            flat = np.asarray(a, np.uint8).reshape(n, -1)
            if bits == 4:
                flat = np.stack([flat & 15, flat >> 4], -1).reshape(n, -1)
            return flat[:, :columns].astype(np.float32)

        values = wide(data, blocks * block).reshape(n, blocks, block)
        if rest and rest[0].dtype == np.uint8:
            zero = wide(rest[0], blocks)
        else:
            zero = (rest[0].astype(np.float32).reshape(n, blocks) if rest
                    else np.full((n, blocks), 2.0 ** (bits - 1), np.float32))  # fmt: skip
        real = (values - zero[..., None]) * scale.astype(np.float32).reshape(n, blocks, 1)
        return np.asarray(real.reshape(n, -1)[:, :k])

    sources = [c.value(1), c.value(2)] + ([c.value(3)] if has_zero else [])
    weight = c.reader.derived(f"{c.value(1)}:float", sources, (n, k), "float32", compute)
    shape = c.shape(0)
    out = None if shape is None else (*shape[:-1], n)
    c.emit("linear", [c.value(0), weight, c.weight(5)], typed=(out, c.dtype(0)), input_axis=1)
