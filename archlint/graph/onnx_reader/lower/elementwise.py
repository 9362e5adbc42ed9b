"""Elementwise operators: arithmetic, activations, comparisons."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from archlint.graph.onnx_reader.read import ELEMENT
from archlint.graph.onnx_reader.reader import Call, Lower, lowers

_SAME_NAME = {
    "Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "Mish": "mish", "Softsign": "softsign",
    "Erf": "erf", "Sin": "sin", "Cos": "cos", "HardSwish": "hardswish", "Neg": "neg", "Abs": "abs",
    "Exp": "exp", "Log": "log", "Sqrt": "sqrt", "Reciprocal": "reciprocal", "Floor": "floor",
    "Ceil": "ceil", "Round": "round", "Sign": "sign", "Tan": "tan", "Asin": "asin", "Acos": "acos",
    "Atan": "atan", "Sinh": "sinh", "Cosh": "cosh", "Asinh": "asinh", "Acosh": "acosh",
    "Atanh": "atanh", "Not": "logical_not", "BitwiseNot": "bitwise_not", "IsNaN": "isnan",
    "NonZero": "nonzero",
}  # fmt: skip
_BINARY = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Pow": "pow", "Equal": "equal",
    "Less": "less", "LessOrEqual": "less_equal", "Greater": "greater",
    "GreaterOrEqual": "greater_equal", "And": "logical_and", "Or": "logical_or",
    "Xor": "logical_xor", "BitwiseAnd": "bitwise_and", "BitwiseOr": "bitwise_or",
    "BitwiseXor": "bitwise_xor",
}  # fmt: skip


def _unary(op: str) -> Lower:
    return lambda c: void(c.emit(op, [c.value(0)]))


def _binary(op: str) -> Lower:
    return lambda c: void(c.emit(op, [c.value(0), c.value(1)]))


def void(_: object) -> None:
    """Drop a result."""


for _name, _op in _SAME_NAME.items():
    lowers(_name)(_unary(_op))
for _name, _op in _BINARY.items():
    lowers(_name)(_binary(_op))


def _with(op: str, **defaults: tuple[str, float]) -> Lower:
    """``op`` with float attributes: canonical name = (ONNX name, ONNX default)."""

    def lower(c: Call) -> None:
        given: dict[str, Any] = {k: float(c.get(n, d)) for k, (n, d) in defaults.items()}
        c.emit(op, [c.value(0)], **given)

    return lower


lowers("LeakyRelu")(_with("leaky_relu", slope=("alpha", 0.01)))
lowers("Elu")(_with("elu", alpha=("alpha", 1.0)))
lowers("Celu")(_with("celu", alpha=("alpha", 1.0)))
lowers("Selu")(_with("selu", alpha=("alpha", 1.6732632423543772),
                     scale=("gamma", 1.0507009873554805)))  # fmt: skip
lowers("HardSigmoid")(_with("hardsigmoid", alpha=("alpha", 0.2), beta=("beta", 0.5)))
lowers("Softplus")(_unary("softplus"))
lowers("Shrink")(_with("softshrink", lambd=("lambd", 0.5), bias=("bias", 0.0)))


@lowers("ThresholdedRelu")
def _thresholded(c: Call) -> None:
    c.emit("threshold", [c.value(0)], threshold=float(c.get("alpha", 1.0)), value=0.0)


@lowers("Gelu")
def _gelu(c: Call) -> None:
    c.emit("gelu", [c.value(0)], approximate=str(c.get("approximate", "none")))


@lowers("Swish")
def _swish(c: Call) -> None:
    """x·σ(alpha·x) = silu(alpha·x)/alpha."""
    alpha = float(c.get("alpha", 1.0))
    if alpha == 1.0:
        c.emit("silu", [c.value(0)])
        return
    c.emit("mul", [_silu(c, alpha), c.constant(np.float32(1 / alpha))])


def _silu(c: Call, alpha: float) -> str:
    shape, dtype = c.shape(0), c.dtype(0)
    if alpha == 0.0:
        raise LookupError("no gate")
    x = c.value(0)
    if alpha != 1.0:
        x = c.temp("mul", [x, c.constant(np.float32(alpha))], shape, dtype)
    return c.temp("silu", [x], shape, dtype)


@lowers("SwiGLU")
def _swiglu(c: Call) -> None:
    """The first input through Swish, times the second one."""
    alpha = float(c.get("alpha", 1.0))
    gate = _silu(c, alpha)
    if alpha != 1.0:
        gate = c.temp("mul", [gate, c.constant(np.float32(1 / alpha))], c.shape(0), c.dtype(0))
    c.emit("mul", [gate, c.value(1)], typed=(c.shape(0), c.dtype(0)))


@lowers("PRelu")
def _prelu(c: Call) -> None:
    c.emit("prelu", [c.value(0), c.weight(1)])


@lowers("Clip")
def _clip(c: Call) -> None:
    low = c.get("min") if c.opset < 11 else c.scalar(1)
    high = c.get("max") if c.opset < 11 else c.scalar(2)
    if c.opset >= 11 and any(c.has(i) and c.scalar(i) is None for i in (1, 2)):
        c.emit("clip", [c.value(0), c.optional(1), c.optional(2)])
    elif low is None and high is None:
        c.alias(0, c.value(0))
    else:
        c.emit("hardtanh", [c.value(0)], minimum=-np.inf if low is None else float(low),
               maximum=np.inf if high is None else float(high))  # fmt: skip


def _fold_left(op: str) -> Callable[[Call], None]:
    """A variadic operator as a chain of binary ones."""

    def lower(c: Call) -> None:
        total = c.value(0)
        if len(c.ins) == 1:
            c.alias(0, total)
        shape, dtype = c.outs[0]
        for i in range(1, len(c.ins)):
            last = i == len(c.ins) - 1
            pair = [total, c.value(i)]
            total = c.emit(op, pair) if last else c.temp(op, pair, shape, dtype)

    return lower


for _name, _op in {"Sum": "add", "Max": "maximum", "Min": "minimum"}.items():
    lowers(_name)(_fold_left(_op))


@lowers("Mean")
def _mean(c: Call) -> None:
    shape, dtype = c.outs[0]
    total = c.value(0)
    for i in range(1, len(c.ins)):
        total = c.temp("add", [total, c.value(i)], shape, dtype)
    c.emit("div", [total, c.constant(np.float32(len(c.ins)))])


@lowers("Mod")
def _mod(c: Call) -> None:
    c.emit("remainder", [c.value(0), c.value(1)], truncated=bool(c.get("fmod", 0)))


@lowers("Where")
def _where(c: Call) -> None:
    c.emit("where", [c.value(0), c.value(1), c.value(2)])


@lowers("Cast")
def _cast(c: Call) -> None:
    c.emit("cast", [c.value(0)], dtype=ELEMENT[int(c.get("to", 1))][0])


@lowers("CastLike")
def _cast_like(c: Call) -> None:
    c.emit("cast", [c.value(0)], dtype=c.dtype(1) or "float32")


@lowers("IsInf")
def _isinf(c: Call) -> None:
    c.emit("isinf", [c.value(0)], positive=bool(c.get("detect_positive", 1)),
           negative=bool(c.get("detect_negative", 1)))  # fmt: skip


@lowers("CumSum")
def _cumsum(c: Call) -> None:
    axis = c.scalar(1)
    if axis is None:
        raise LookupError("the axis is not known")
    c.emit("cumsum", [c.value(0)], axis=int(axis) % c.rank(0),
           exclusive=bool(c.get("exclusive", 0)), reverse=bool(c.get("reverse", 0)))  # fmt: skip


@lowers("CumProd")
def _cumprod(c: Call) -> None:
    axis = c.scalar(1)
    if axis is None or c.get("exclusive", 0) or c.get("reverse", 0):
        raise LookupError("the axis is not known, or the product runs another way")
    c.emit("cumprod", [c.value(0)], axis=int(axis) % c.rank(0))


@lowers("Identity")
def _identity(c: Call) -> None:
    c.alias(0, c.value(0))


@lowers("Dropout")
def _dropout(c: Call) -> None:
    if c.opset >= 12:
        p = c.scalar(1)
        p = 0.5 if p is None else p
        training = bool(c.scalar(2) or 0.0)
    else:
        p, training = float(c.get("ratio", 0.5)), c.reader.mode == "train"
    count = 2 if len(c.node.output) > 1 and c.node.output[1] else 1
    if count == 1 and (p == 0.0 or (c.opset >= 12 and not training)):
        c.alias(0, c.value(0))  # exported for inference: the file says that nothing is dropped
        return
    c.emit_all("dropout", [c.value(0)], p=float(p), training=training)


@lowers("RandomNormalLike", "RandomUniformLike", "RandomNormal", "RandomUniform")
def _random(c: Call) -> None:
    like = c.optional(0)
    shape = c.get("shape")
    if c.node.op_type.startswith("RandomNormal"):
        c.emit("random_normal", [like], shape=None if shape is None else tuple(shape),
               mean=float(c.get("mean", 0.0)), std=float(c.get("scale", 1.0)))  # fmt: skip
    else:
        c.emit("random_uniform", [like], shape=None if shape is None else tuple(shape),
               low=float(c.get("low", 0.0)), high=float(c.get("high", 1.0)))  # fmt: skip


@lowers("Bernoulli")
def _bernoulli(c: Call) -> None:
    c.emit("bernoulli", [c.value(0)])
