"""Graphs written by running numpy, and a reference execution of canonical ops by torch.

``Trace`` records elementary ops with the values they have; ``evaluate`` runs any graph that these
tests make. The fused ops are torch's own functions, so that agreement means the fusion is right.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from archlint.graph.builder import GraphBuilder
from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import OPS
from archlint.initialization.distribution import constant as constant_law
from archlint.probe.ops.affine import torch_padding


def _moments(x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    mean = x.mean(axes, keepdim=True)
    return mean, ((x - mean) ** 2).mean(axes, keepdim=True)


def _affine(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    y = y if scale is None else y * scale
    return y if shift is None else y + shift


def _layer_norm(a: Mapping[str, Any], x: Tensor, *rest: Tensor | None) -> Tensor:
    scale, shift = (*rest, None, None)[:2]
    mean, variance = _moments(x, tuple(a["axes"]))
    return _affine((x - mean) / (variance + a["eps"]).sqrt(), scale, shift)


def _rms_norm(a: Mapping[str, Any], x: Tensor, scale: Tensor | None = None) -> Tensor:
    square = (x * x).mean(tuple(a["axes"]), keepdim=True)
    return _affine(x / (square + a["eps"]).sqrt(), scale, None)


def _standardise(a: Mapping[str, Any], x: Tensor) -> Tensor:
    axes = tuple(a["axes"])
    mean = x.mean(axes, keepdim=True)
    variance = x.var(axes, keepdim=True, correction=int(a["unbiased"]))
    return (x - mean) / ((variance + a["eps"]).sqrt() + a["outer_eps"])


def _attention(
    a: Mapping[str, Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
) -> Tensor:
    if q.ndim == 4 and k.shape[1] != q.shape[1]:
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    if a["softcap"]:
        logits = q @ k.transpose(-1, -2) * a["scale"]
        logits = a["softcap"] * torch.tanh(logits / a["softcap"])
        return ((logits if mask is None else logits + mask).softmax(-1)) @ v
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=bool(a["causal"]), scale=a["scale"]
    )


def _linear(a: Mapping[str, Any], x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    y = x @ (w.T if a["input_axis"] == 1 else w) * a["alpha"]
    return y if b is None else y + b * a["beta"]


def _where(a: Mapping[str, Any], c: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(c.bool(), x, y)


def _reduce(name: str) -> Callable[..., Tensor]:
    def apply(a: Mapping[str, Any], x: Tensor) -> Tensor:
        axes, keep = tuple(a["axes"]), bool(a["keepdims"])
        match name:
            case "reduce_var":
                return x.var(axes, keepdim=keep, correction=a["correction"])
            case "reduce_std":
                return x.std(axes, keepdim=keep, correction=a["correction"])
            case "reduce_l2":
                return x.square().sum(axes, keepdim=keep).sqrt()
            case "reduce_l1":
                return x.abs().sum(axes, keepdim=keep)
            case "reduce_logsumexp":
                return x.logsumexp(axes, keepdim=keep)
            case "reduce_max":
                return x.amax(axes, keepdim=keep)
            case "reduce_sum":
                return x.sum(axes, keepdim=keep)
        return x.mean(axes, keepdim=keep)

    return apply


def _clip(a: Mapping[str, Any], x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    return x.clamp(low, high)


_FLOAT = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda attributes, *operands: function(*operands)


EXECUTE: dict[str, Callable[..., Tensor]] = {
    **{
        name: _plain(f)
        for name, f in {
            "add": torch.add,
            "sub": torch.sub,
            "mul": torch.mul,
            "div": torch.div,
            "pow": torch.pow,
            "maximum": torch.maximum,
            "minimum": torch.minimum,
            "neg": torch.neg,
            "abs": torch.abs,
            "exp": torch.exp,
            "expm1": torch.expm1,
            "log": torch.log,
            "log1p": torch.log1p,
            "sqrt": torch.sqrt,
            "rsqrt": torch.rsqrt,
            "reciprocal": torch.reciprocal,
            "square": torch.square,
            "erf": torch.erf,
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
            "relu": torch.relu,
            "relu6": F.relu6,
            "silu": F.silu,
            "mish": F.mish,
            "selu": F.selu,
            "softsign": F.softsign,
            "tanhshrink": F.tanhshrink,
            "logsigmoid": F.logsigmoid,
            "hardswish": F.hardswish,
            "matmul": torch.matmul,
            "greater": torch.gt,
            "greater_equal": torch.ge,
            "less": torch.lt,
            "less_equal": torch.le,
            "isnan": torch.isnan,
            "identity": torch.clone,
            "prelu": lambda x, s: torch.where(x > 0, x, s * x),
        }.items()
    },
    **{name: _reduce(name) for name in OPS if name.startswith("reduce_")},
    "where": _where,
    "clip": _clip,
    "gelu": lambda a, x: (
        x * torch.sigmoid(1.702 * x)
        if a["approximate"] == "sigmoid"
        else F.gelu(x, approximate=a["approximate"])
    ),
    "softplus": lambda a, x: F.softplus(x, a["beta"], a["threshold"]),
    "elu": lambda a, x: F.elu(x, a["alpha"]),
    "celu": lambda a, x: F.celu(x, a["alpha"]),
    "leaky_relu": lambda a, x: F.leaky_relu(x, a["slope"]),
    "hardtanh": lambda a, x: F.hardtanh(x, a["minimum"], a["maximum"]),
    "hardsigmoid": lambda a, x: (x * a["alpha"] + a["beta"]).clamp(0, 1),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "standardise": _standardise,
    "group_norm": lambda a, x, *r: F.group_norm(x, a["groups"], *r, eps=a["eps"]),
    "instance_norm": lambda a, x, *r: F.instance_norm(
        x, weight=(*r, None)[0], bias=(*r, None, None)[1], eps=a["eps"]
    ),
    "batch_norm": lambda a, x, *r: F.batch_norm(
        x, None, None, (*r, None)[0], (*r, None, None)[1], training=True, eps=a["eps"]
    ),
    "lp_normalize": lambda a, x: F.normalize(x, a["p"], a["axis"], a["eps"]),
    "weight_norm": lambda a, v, g: torch._weight_norm(
        v, g, a["axis"] if a["axis"] is not None else -1
    ),
    "softmax": lambda a, x: x.softmax(a["axis"]),
    "log_softmax": lambda a, x: x.log_softmax(a["axis"]),
    "attention": _attention,
    "einsum": lambda a, *x: torch.einsum(a["equation"], *x),
    "linear": _linear,
    "conv": lambda a, x, w, b=None: F.conv2d(
        x, w, b, a["stride"], a["padding"][:2], a["dilation"], a["groups"]
    ),
    "pad": lambda a, x, fill: F.pad(x, torch_padding(a["padding"]), value=float(fill)),
    "max_pool": lambda a, x: F.max_pool2d(
        F.pad(x, torch_padding(a["padding"]), value=-math.inf),
        a["kernel"],
        a["stride"],
        0,
        a["dilation"],
    ),
    "embedding": lambda a, i, w: F.embedding(i, w),
    "gather": lambda a, x, i: torch.index_select(x, a["axis"], i.flatten()).reshape(
        *x.shape[: a["axis"]], *i.shape, *x.shape[a["axis"] + 1 :]
    ),
    "cast": lambda a, x: x.to(_FLOAT[a["dtype"]]),
    "dropout": lambda a, x: x,
    "reshape": lambda a, x: x.reshape(a["shape"]),
    "expand": lambda a, x: x.expand(a["shape"]),
    "transpose": lambda a, x: x.permute(a["permutation"]),
}


def _attributes(op: str, attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {**OPS[op].attributes, **attributes}


@dataclass(frozen=True)
class T:
    """A traced tensor: the value's id and what it holds."""

    id: str
    data: Tensor
    trace: Trace

    def __add__(self, other: Any) -> T:
        return self.trace.op("add", self, other)

    def __radd__(self, other: Any) -> T:
        return self.trace.op("add", other, self)

    def __sub__(self, other: Any) -> T:
        return self.trace.op("sub", self, other)

    def __rsub__(self, other: Any) -> T:
        return self.trace.op("sub", other, self)

    def __mul__(self, other: Any) -> T:
        return self.trace.op("mul", self, other)

    def __rmul__(self, other: Any) -> T:
        return self.trace.op("mul", other, self)

    def __truediv__(self, other: Any) -> T:
        return self.trace.op("div", self, other)

    def __rtruediv__(self, other: Any) -> T:
        return self.trace.op("div", other, self)

    def __pow__(self, other: Any) -> T:
        return self.trace.op("pow", self, other)

    def __neg__(self) -> T:
        return self.trace.op("neg", self)

    def __matmul__(self, other: T) -> T:
        return self.trace.op("matmul", self, other)

    def __getattr__(self, op: str) -> Callable[..., T]:
        if op.startswith("__") or op not in OPS:
            raise AttributeError(op)
        return lambda *more, **attributes: self.trace.op(op, self, *more, **attributes)

    def mean(self, *axes: int, keepdims: bool = True) -> T:
        return self.trace.op("reduce_mean", self, axes=axes, keepdims=keepdims)

    def sum(self, *axes: int, keepdims: bool = True) -> T:
        return self.trace.op("reduce_sum", self, axes=axes, keepdims=keepdims)

    def max(self, *axes: int) -> T:
        return self.trace.op("reduce_max", self, axes=axes, keepdims=True)

    def view(self, *shape: int) -> T:
        return self.trace.op("reshape", self, shape=shape)

    def permute(self, *order: int) -> T:
        return self.trace.op("transpose", self, permutation=order)


class Trace:
    """Records ops while computing them, in float64 unless told otherwise."""

    def __init__(self, seed: int = 0, source: str = "onnx") -> None:
        self.builder = GraphBuilder("spelled", source=source)
        self.random = np.random.default_rng(seed)
        self.held: dict[str, Tensor] = {}
        self.module = ""

    def input(self, *shape: int, dtype: str = "float64", scale: float = 1.0) -> T:
        data = torch.from_numpy(scale * self.random.standard_normal(shape)).to(_FLOAT[dtype])
        id = self.builder.input(self.builder.fresh("x"), shape, dtype)
        self.held[id] = data
        return T(id, data, self)

    def ids(self, *shape: int, count: int) -> T:
        data = torch.from_numpy(self.random.integers(0, count, shape))
        id = self.builder.input(self.builder.fresh("ids"), shape, "int64")
        self.held[id] = data
        return T(id, data, self)

    def parameter(self, *shape: int, name: str = "w", fill: float | None = None) -> T:
        array = self.random.standard_normal(shape) if fill is None else np.full(shape, fill)
        law = constant_law(fill) if fill is not None else None
        id = self.builder.parameter(
            self.builder.fresh(name), shape, law, "float64", load=lambda: array
        )
        self.held[id] = torch.from_numpy(array)
        return T(id, self.held[id], self)

    def constant(self, array: Any, dtype: str = "float64") -> T:
        elements = np.asarray(array)
        if elements.dtype.kind == "f":
            elements = elements.astype(dtype)
        id = self.builder.constant(elements)
        self.held[id] = torch.from_numpy(elements)
        return T(id, self.held[id], self)

    def op(self, op: str, *operands: Any, **attributes: Any) -> T:
        given = [t for t in operands if isinstance(t, T)]
        like = next((t for t in given if t.data.is_floating_point()), given[0])
        dtype = str(like.data.dtype).removeprefix("torch.")
        inputs = [
            t if isinstance(t, T) or t is None else self.constant(np.float64(t), dtype)
            for t in operands
        ]
        data = EXECUTE[op](
            _attributes(op, attributes), *(None if t is None else t.data for t in inputs)
        )
        dtype = str(data.dtype).removeprefix("torch.")
        id = self.builder.node(
            op,
            [None if t is None else t.id for t in inputs],
            tuple(data.shape),
            dtype,
            module=self.module,
            given=attributes,
        )
        return T(id, data, self)

    def finish(self, *outputs: T) -> LayerGraph:
        return self.builder.finish([t.id for t in outputs])


def evaluate(graph: LayerGraph, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All values of a graph."""
    values: dict[str, Tensor] = {}
    for id, value in graph.values.items():
        if value.constant is not None:
            values[id] = torch.from_numpy(np.array(value.constant))
        elif value.parameter is not None:
            load = graph.parameters[value.parameter].load
            assert load is not None
            values[id] = torch.from_numpy(np.asarray(load()))
        elif id in feeds:
            values[id] = feeds[id]
    for node in graph.nodes:
        result = _run(node, values)
        declared = graph.values[node.output]
        assert declared.shape is None or declared.shape == tuple(result.shape), node
        values[node.output] = result
    return values


def _run(node: Node, values: Mapping[str, Tensor]) -> Tensor:
    operands = [None if v is None else values[v] for v in node.inputs]
    return EXECUTE[node.op](_attributes(node.op, node.attributes), *operands)
