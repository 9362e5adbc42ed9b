"""Products with weights: MatMul, Gemm, convolutions, embeddings, einsum."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from archlint.graph.onnx_reader.reader import Call, lowers
from archlint.graph.onnx_reader.shapes import Shape

_EQUATION = re.compile(r"[A-Za-z., ]*(->[A-Za-z. ]*)?")


def linear(c: Call, x: str, weight: int, bias: str | None = None, transposed: bool = False,
           **attributes: Any) -> None:  # fmt: skip
    """``linear`` with the known 2-D input ``weight``; ``transposed``: stored [out, in].

    A weight that the file transposes first is used as it is stored, so that a tied embedding stays
    one parameter.
    """
    id = c.weight(weight)
    axis = 1 if transposed else 0
    if id is not None and id in c.reader.transposed:
        id, axis = c.reader.transposed[id], 1 - axis
    c.emit("linear", [x, id, bias], input_axis=axis, **attributes)


def swapped(shape: Shape) -> Shape:
    """A shape with the last two dimensions exchanged."""
    return None if shape is None else (*shape[:-2], shape[-1], shape[-2])


def swap(c: Call, x: str, shape: Shape) -> str:
    """``x`` with the last two axes exchanged."""
    if shape is None:
        raise LookupError("the rank is unknown")
    rank = len(shape)
    permutation = (*range(rank - 2), rank - 1, rank - 2)
    dtype = c.reader.builder.values[x].dtype
    return c.temp("transpose", [x], swapped(shape), dtype, permutation=permutation)


@lowers("MatMul")
def _matmul(c: Call) -> None:
    matmul(c, 0, 1)


def matmul(c: Call, left: int, right: int) -> None:
    """A product of two inputs; with a known 2-D factor it is a linear map."""
    if c.is_known(right) and c.rank(right) == 2 and not c.is_known(left):
        linear(c, c.value(left), right)
    elif c.is_known(left) and c.rank(left) == 2 and not c.is_known(right) and c.rank(right) >= 2:
        # W·x = (xᵀ·Wᵀ)ᵀ: the weight contracts the second last axis of x.
        x = swap(c, c.value(right), c.shape(right))
        out, dtype = c.outs[0]
        y = c.temp("linear", [x, c.weight(left)], swapped(out), dtype, input_axis=1)
        rank = c.rank(right)
        c.emit("transpose", [y], permutation=(*range(rank - 2), rank - 1, rank - 2))
    else:
        c.emit("matmul", [c.weight(left) if c.is_known(left) else c.value(left),
                          c.weight(right) if c.is_known(right) else c.value(right)])  # fmt: skip


@lowers("Gemm")
def _gemm(c: Call) -> None:
    a, b = c.value(0), c.value(1)
    alpha, beta = float(c.get("alpha", 1.0)), float(c.get("beta", 1.0))
    if c.get("transA", 0):
        a = swap(c, a, c.shape(0))
    if c.is_known(1) and not c.is_known(0):
        bias = c.weight(2)
        linear(c, a, 1, bias, bool(c.get("transB", 0)), alpha=alpha,
               beta=beta if bias is not None else 1.0)  # fmt: skip
        return
    if c.get("transB", 0):
        b = swap(c, b, c.shape(1))
    shape, dtype = c.outs[0]
    if alpha == 1.0 and not c.has(2):
        c.emit("matmul", [a, b])
        return
    y = c.temp("matmul", [a, b], shape, dtype)
    if alpha != 1.0:
        scale = [y, c.constant(np.float32(alpha))]
        y = c.temp("mul", scale, shape, dtype) if c.has(2) else c.emit("mul", scale)
    if c.has(2):
        bias_value = c.value(2)
        if beta != 1.0:
            scaled = [bias_value, c.constant(np.float32(beta))]
            bias_value = c.temp("mul", scaled, c.shape(2), dtype)
        c.emit("add", [y, bias_value])


@lowers("Einsum")
def _einsum(c: Call) -> None:
    inputs = [c.weight(i) if c.is_known(i) else c.value(i) for i in range(len(c.ins))]
    equation = str(c.get("equation"))
    if not _EQUATION.fullmatch(equation) or equation.count(",") != len(inputs) - 1:
        raise LookupError("no equation for these inputs")
    c.emit("einsum", inputs, equation=equation)


# --------------------------------------------------------------------------- convolutions


def window(c: Call, kernel: Sequence[int], spatial: Sequence[int | None]
           ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:  # fmt: skip
    """(stride, padding, dilation) of a sliding window, ``auto_pad`` resolved."""
    n = len(kernel)
    stride = tuple(c.get("strides") or (1,) * n)
    dilation = tuple(c.get("dilations") or (1,) * n)
    padding = tuple(c.get("pads") or (0,) * (2 * n))
    auto = c.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends = [], []
        for size, k, s, d in zip(spatial, kernel, stride, dilation, strict=True):
            if size is None:
                raise LookupError("the padding depends on an unknown size")
            total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
            small, large = total // 2, total - total // 2
            begins.append(small if auto == "SAME_UPPER" else large)
            ends.append(large if auto == "SAME_UPPER" else small)
        padding = (*begins, *ends)
    elif auto == "VALID":
        padding = (0,) * (2 * n)
    for i, size in enumerate(spatial):
        reach = dilation[i] * (kernel[i] - 1) + 1
        if (
            size is not None
            and not c.get("ceil_mode")
            and size + padding[i] + padding[n + i] < reach
        ):
            c.conflict(f"a window of {reach} does not fit into {size} elements")
    return stride, padding, dilation


def convolution(c: Call, x: str, weight: str | None, bias: str | None, shape: Shape) -> None:
    """``conv`` of ``x`` (of the given shape) with the node's attributes."""
    if shape is None or weight is None:
        raise LookupError("the rank is unknown")
    sizes = c.reader.builder.values[weight].shape
    kernel = c.get("kernel_shape") or [n or 1 for n in (sizes or ())[2:]]
    stride, padding, dilation = window(c, kernel, shape[2:])
    c.emit("conv", [x, weight, bias], stride=stride, padding=padding, dilation=dilation,
           groups=int(c.get("group", 1)))  # fmt: skip


@lowers("Conv")
def _conv(c: Call) -> None:
    convolution(c, c.value(0), c.weight(1), c.weight(2), c.shape(0))


@lowers("ConvTranspose")
def _conv_transpose(c: Call) -> None:
    shape, weight = c.sizes(0), c.sizes(1)
    n = len(shape) - 2
    kernel = list(c.get("kernel_shape") or weight[2:])
    stride = tuple(c.get("strides") or (1,) * n)
    dilation = tuple(c.get("dilations") or (1,) * n)
    extra = tuple(c.get("output_padding") or (0,) * n)
    padding = list(c.get("pads") or (0,) * (2 * n))
    wanted = c.get("output_shape")
    auto = c.get("auto_pad", "NOTSET")
    if wanted or auto.startswith("SAME"):
        for i in range(n):
            full = stride[i] * (shape[2 + i] - 1) + extra[i] + (kernel[i] - 1) * dilation[i] + 1
            size = wanted[-n:][i] if wanted else shape[2 + i] * stride[i]
            if size > full:  # more than the transpose reaches: zeros, but for the bias
                extra = (*extra[:i], extra[i] + size - full, *extra[i + 1 :])
            total = max(full - size, 0)
            first = total // 2 if auto == "SAME_UPPER" else total - total // 2
            padding[i], padding[n + i] = first, total - first
    c.emit("conv_transpose", [c.value(0), c.weight(1), c.weight(2)], stride=stride,
           padding=tuple(padding), dilation=dilation, output_padding=extra,
           groups=int(c.get("group", 1)))  # fmt: skip


# --------------------------------------------------------------------------- embeddings


_TABLES = ("float32", "float16", "bfloat16", "float64", "int8", "uint8")


@lowers("Gather")
def _gather(c: Call) -> None:
    axis = int(c.get("axis", 0))
    if c.is_known(0) and axis == 0 and c.rank(0) == 2 and c.dtype(0) in _TABLES:
        c.emit("embedding", [c.value(1), c.weight(0)])
        return
    rank = c.rank(0)
    axis %= rank
    index = c.array(1)
    if index is not None and index.ndim == 0:
        c.emit("select_index", [c.value(0)], axis=axis, index=int(index))
        return
    c.emit("gather", [c.value(0), c.value(1)], axis=axis)
