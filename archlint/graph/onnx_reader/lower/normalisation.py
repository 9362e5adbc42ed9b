"""Norms, softmax, pooling and reductions."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from archlint.graph.onnx_reader.fold import axes_of
from archlint.graph.onnx_reader.lower.affine import window
from archlint.graph.onnx_reader.reader import Call, Lower, lowers


@lowers("BatchNormalization")
def _batch_norm(c: Call) -> None:
    c.emit("batch_norm", [c.value(0), *(c.weight(i) for i in range(1, 5))],
           eps=float(c.get("epsilon", 1e-5)), momentum=1 - float(c.get("momentum", 0.9)),
           training=c.reader.mode == "train")  # fmt: skip
    # A training export also puts out the statistics after this step; the step changes them by a
    # fraction, and nothing but the next step reads them.
    for name, held in zip(c.node.output[1:3], (3, 4), strict=False):
        if name:
            c.scope[name] = c.value(held)


@lowers("InstanceNormalization")
def _instance_norm(c: Call) -> None:
    c.emit("instance_norm", [c.value(0), c.weight(1), c.weight(2)],
           eps=float(c.get("epsilon", 1e-5)))  # fmt: skip


@lowers("LayerNormalization")
def _layer_norm(c: Call) -> None:
    layer_norm(c, c.value(0), c.weight(1), c.weight(2))
    # An export of training also puts out the mean and 1/sqrt(variance + epsilon), for backward.
    rank, names = c.rank(0), [*c.node.output, "", ""]
    axes = tuple(range(int(c.get("axis", -1)) % rank, rank))
    if names[1]:
        c.emit("reduce_mean", [c.value(0)], out=1, axes=axes, keepdims=True)
    if names[2]:
        shape, dtype = c.outs[2]
        variance = c.temp("reduce_var", [c.value(0)], shape, dtype, axes=axes, keepdims=True)
        eps = c.constant(np.float32(c.get("epsilon", 1e-5)))
        c.emit("rsqrt", [c.temp("add", [variance, eps], shape, dtype)], out=2)


def layer_norm(c: Call, x: str, scale: str | None, shift: str | None, out: int = 0) -> None:
    """``layer_norm`` over the axes from the node's ``axis`` on."""
    shape = c.reader.builder.values[x].shape
    if shape is None:
        raise LookupError("the rank is unknown")
    axis = int(c.get("axis", -1)) % len(shape)
    c.emit("layer_norm", [x, scale, shift], out=out, typed=(shape, c.dtype(0)),
           axes=tuple(range(axis, len(shape))), eps=float(c.get("epsilon", 1e-5)))  # fmt: skip


@lowers("RMSNormalization")
def _rms_norm(c: Call) -> None:
    rms_norm(c, c.value(0), c.weight(1))


def rms_norm(c: Call, x: str, scale: str | None, out: int = 0) -> None:
    """``rms_norm`` over the axes from the node's ``axis`` on."""
    shape = c.reader.builder.values[x].shape
    if shape is None:
        raise LookupError("the rank is unknown")
    axis = int(c.get("axis", -1)) % len(shape)
    c.emit("rms_norm", [x, scale], out=out, typed=(shape, c.dtype(0)),
           axes=tuple(range(axis, len(shape))), eps=float(c.get("epsilon", 1e-5)))  # fmt: skip


@lowers("GroupNormalization")
def _group_norm(c: Call) -> None:
    groups = int(c.get("num_groups"))
    channels = c.sizes(0)[1]
    scale, shift = c.weight(1), c.weight(2)
    if c.opset < 21 and c.sizes(1)[0] == groups != channels:  # one number a group
        each = channels // groups
        scale, shift = (
            c.derived(f"{id}:channels", id, (channels,), lambda a: np.repeat(a, each))
            for id in (scale, shift)
            if id is not None
        )
    c.emit("group_norm", [c.value(0), scale, shift], groups=groups,
           eps=float(c.get("epsilon", 1e-5)))  # fmt: skip


@lowers("LpNormalization")
def _lp_normalize(c: Call) -> None:
    c.emit("lp_normalize", [c.value(0)], p=float(c.get("p", 2)), eps=0.0,
           axis=int(c.get("axis", -1)) % c.rank(0))  # fmt: skip


@lowers("MeanVarianceNormalization")
def _standardise(c: Call) -> None:
    axes = c.get("axes") or [0, 2, 3]
    c.emit("standardise", [c.value(0)], axes=tuple(axis % c.rank(0) for axis in axes), eps=1e-9)


@lowers("LRN")
def _lrn(c: Call) -> None:
    c.emit("local_response_norm", [c.value(0)], size=int(c.get("size")),
           alpha=float(c.get("alpha", 1e-4)), beta=float(c.get("beta", 0.75)),
           k=float(c.get("bias", 1.0)))  # fmt: skip


@lowers("Softmax", "LogSoftmax")
def _softmax(c: Call) -> None:
    op = "softmax" if c.node.op_type == "Softmax" else "log_softmax"
    rank = c.rank(0)
    if c.opset >= 13:
        c.emit(op, [c.value(0)], axis=int(c.get("axis", -1)) % rank)
        return
    axis = int(c.get("axis", 1)) % rank
    if axis == rank - 1:
        c.emit(op, [c.value(0)], axis=axis)
        return
    # Before opset 13 the softmax runs over all axes from `axis` on at once.
    shape, dtype = c.sizes(0), c.dtype(0)
    flat = (*shape[:axis], math.prod(shape[axis:]))
    x = c.temp("reshape", [c.value(0)], flat, dtype, shape=flat)
    y = c.temp(op, [x], flat, dtype, axis=axis)
    c.emit("reshape", [y], shape=shape)


# --------------------------------------------------------------------------- pooling


@lowers("MaxPool")
def _max_pool(c: Call) -> None:
    shape = c.shape(0)
    if shape is None:
        raise LookupError("the rank is unknown")
    kernel = tuple(c.get("kernel_shape"))
    stride, padding, dilation = window(c, kernel, shape[2:])
    c.emit_all("max_pool", [c.value(0)], kernel=kernel, stride=stride, padding=padding,
               dilation=dilation, ceil=bool(c.get("ceil_mode", 0)))  # fmt: skip
    if len(c.node.output) > 1 and (name := c.node.output[1]):
        if c.get("storage_order", 0) or None in shape:
            raise LookupError("indices in the order of columns")
        # ONNX counts through all samples and channels, the vocabulary within one plane.
        plane = math.prod(n or 1 for n in shape[2:])
        first = np.arange(math.prod(n or 1 for n in shape[:2]), dtype=np.int64) * plane
        first = first.reshape(*(n or 1 for n in shape[:2]), *(1,) * (len(shape) - 2))
        c.emit("add", [c.scope[name], c.constant(first)], out=1)


@lowers("AveragePool")
def _avg_pool(c: Call) -> None:
    shape = c.shape(0)
    if shape is None:
        raise LookupError("the rank is unknown")
    kernel = tuple(c.get("kernel_shape"))
    stride, padding, dilation = window(c, kernel, shape[2:])
    c.emit("avg_pool", [c.value(0)], kernel=kernel, stride=stride, padding=padding,
           dilation=dilation if max(dilation) > 1 else None, ceil=bool(c.get("ceil_mode", 0)),
           count_padding=bool(c.get("count_include_pad", 0)))  # fmt: skip


@lowers("LpPool")
def _lp_pool(c: Call) -> None:
    shape = c.shape(0)
    if shape is None:
        raise LookupError("the rank is unknown")
    kernel = tuple(c.get("kernel_shape"))
    stride, padding, dilation = window(c, kernel, shape[2:])
    c.emit("lp_pool", [c.value(0)], kernel=kernel, stride=stride, padding=padding,
           dilation=dilation if max(dilation) > 1 else None,
           p=float(c.get("p", 2)), ceil=bool(c.get("ceil_mode", 0)))  # fmt: skip


@lowers("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(c: Call) -> None:
    op = "adaptive_avg_pool" if c.node.op_type == "GlobalAveragePool" else "adaptive_max_pool"
    c.emit(op, [c.value(0)], size=(1,) * (c.rank(0) - 2))


@lowers("GlobalLpPool")
def _global_lp_pool(c: Call) -> None:
    c.emit("reduce_l2", [c.value(0)], axes=tuple(range(2, c.rank(0))), keepdims=True)


@lowers("MaxUnpool")
def _max_unpool(c: Call) -> None:
    if c.has(2):
        raise LookupError("the output has a size of its own")
    kernel = tuple(c.get("kernel_shape"))
    n = len(kernel)
    plane = math.prod(size or 1 for size in (c.outs[0][0] or ())[2:])
    places = c.temp("remainder", [c.value(1), c.constant(np.int64(plane))], c.shape(1), "int64")
    c.emit("max_unpool", [c.value(0), places], kernel=kernel,
           stride=tuple(c.get("strides") or (1,) * n),
           padding=tuple(c.get("pads") or (0,) * (2 * n)))  # fmt: skip


# --------------------------------------------------------------------------- reductions


def reduction(op: str) -> Lower:
    """A reduction over the node's axes, given as attribute or input."""

    def lower(c: Call) -> None:
        rank = c.rank(0)
        if c.has(1) and c.array(1) is None:
            raise LookupError("the axes are not known")
        axes = axes_of([None, c.array(1) if c.has(1) else None], c.attributes)
        if not axes:
            if c.get("noop_with_empty_axes", 0):
                c.alias(0, c.value(0))
                return
            axes = list(range(rank))
        c.emit(op, [c.value(0)], axes=tuple(sorted(axis % rank for axis in axes)),
               keepdims=bool(c.get("keepdims", 1)))  # fmt: skip

    return lower


for _name, _op in {
    "ReduceMean": "reduce_mean", "ReduceSum": "reduce_sum", "ReduceMax": "reduce_max",
    "ReduceMin": "reduce_min", "ReduceProd": "reduce_prod", "ReduceL1": "reduce_l1",
    "ReduceL2": "reduce_l2", "ReduceLogSumExp": "reduce_logsumexp",
}.items():  # fmt: skip
    lowers(_name)(reduction(_op))


def _composed(first: str | None, reduce: str, last: str | None) -> Lower:
    """A reduction with an elementwise op before or after it."""

    def lower(c: Call) -> None:
        x = c.value(0)
        if first is not None:
            x = c.temp(first, [x], c.shape(0), c.dtype(0))
        inner = replace(c, ins=[x, *c.ins[1:]])
        reduction(reduce)(inner)
        if last is not None:
            c.emit(last, [c.scope[c.node.output[0]]])

    return lower


lowers("ReduceSumSquare")(_composed("square", "reduce_sum", None))
lowers("ReduceLogSum")(_composed(None, "reduce_sum", "log"))
