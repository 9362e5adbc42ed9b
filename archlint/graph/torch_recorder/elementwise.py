"""Lowerings of activations, arithmetic, comparisons and casts."""

from __future__ import annotations

from typing import Any

import torch

from archlint.graph.torch_recorder.lowering import Call, NotModelled, V, dtype_name, lowering

# torch's name -> ours, for one input and nothing else
_ONE: dict[str, str] = {
    "absolute": "abs",
    "negative": "neg",
    "expit": "sigmoid",
    "fix": "trunc",
    "arcsin": "asin",
    "arccos": "acos",
    "arctan": "atan",
    "arcsinh": "asinh",
    "arccosh": "acosh",
    "arctanh": "atanh",
    "sgn": "sign",
    "invert": "bitwise_not",
}
_ONE |= {
    name: name
    for name in [
        "relu",
        "sigmoid",
        "tanh",
        "silu",
        "mish",
        "softsign",
        "erf",
        "sin",
        "cos",
        "hardswish",
        "relu6",
        "tanhshrink",
        "logsigmoid",
        "neg",
        "abs",
        "exp",
        "log",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "square",
        "expm1",
        "log1p",
        "floor",
        "ceil",
        "round",
        "sign",
        "tan",
        "asin",
        "acos",
        "atan",
        "sinh",
        "cosh",
        "asinh",
        "acosh",
        "atanh",
        "trunc",
        "isnan",
        "isfinite",
        "logical_not",
        "bitwise_not",
    ]
}

# (ours, whether the operands are exchanged)
_TWO: dict[str, tuple[str, bool]] = {
    "subtract": ("sub", False),
    "multiply": ("mul", False),
    "divide": ("div", False),
    "true_divide": ("div", False),
    "rdiv": ("div", True),
    "rpow": ("pow", True),
    "rremainder": ("remainder", True),
    "rfloor_divide": ("floor_divide", True),
    "eq": ("equal", False),
    "ne": ("not_equal", False),
    "lt": ("less", False),
    "le": ("less_equal", False),
    "gt": ("greater", False),
    "ge": ("greater_equal", False),
    "fmax": ("maximum", False),
    "fmin": ("minimum", False),
    "arctan2": ("atan2", False),
    "float_power": ("pow", False),
    "greater": ("greater", False),
    "less": ("less", False),
    "not_equal": ("not_equal", False),
    "less_equal": ("less_equal", False),
    "greater_equal": ("greater_equal", False),
}
_TWO |= {
    name: (name, False)
    for name in [
        "mul",
        "pow",
        "maximum",
        "minimum",
        "remainder",
        "atan2",
        "logical_and",
        "logical_or",
        "logical_xor",
        "bitwise_and",
        "bitwise_or",
        "bitwise_xor",
    ]
}


def _one(name: str, op: str) -> None:
    @lowering(name)
    def lower(c: Call, input: Any, inplace: bool = False) -> V:
        return c.emit(op, [c.value(input)])


def _two(name: str, op: str, exchanged: bool) -> None:
    @lowering(name)
    def lower(c: Call, input: Any, other: Any = None, exponent: Any = None) -> V:
        second = exponent if other is None else other
        a, b = pair(c, input, second)
        return c.emit(op, [b, a] if exchanged else [a, b])


def pair(c: Call, a: Any, b: Any) -> tuple[V, V]:
    """Two operands of which one may be a number."""
    x = a if isinstance(a, V) else None
    y = b if isinstance(b, V) else None
    return c.value(a, y), c.value(b, x)


for _name, _op in _ONE.items():
    _one(_name, _op)
for _name, (_op, _exchanged) in _TWO.items():
    _two(_name, _op, _exchanged)


@lowering("add", "sub")
def add(c: Call, input: Any, other: Any, alpha: Any = 1) -> V:
    """x ± alpha·y."""
    a, b = pair(c, input, other)
    if c.dtype == "bool":
        return c.emit("logical_or" if c.name == "add" else "logical_xor", [a, b])
    if alpha != 1:
        b = c.emit("mul", [b, c.number(alpha, b)], b.shape, b.dtype)
    return c.emit(c.name, [a, b])


@lowering("rsub")
def rsub(c: Call, input: Any, other: Any, alpha: Any = 1) -> V:
    """y − alpha·x."""
    a, b = pair(c, input, other)
    if alpha != 1:
        a = c.emit("mul", [a, c.number(alpha, a)], a.shape, a.dtype)
    return c.emit("sub", [b, a])


@lowering("div", "floor_divide")
def div(c: Call, input: Any, other: Any, rounding_mode: str | None = None) -> V:
    """x/y, rounded or not."""
    a, b = pair(c, input, other)
    if c.name == "floor_divide" or rounding_mode == "floor":
        return c.emit("floor_divide", [a, b])
    quotient = c.emit("div", [a, b])
    return quotient if rounding_mode is None else c.emit("trunc", [quotient])


@lowering("addcmul", "addcdiv")
def addcmul(c: Call, input: V, tensor1: V, tensor2: V, value: float = 1) -> V:
    """x + value·a∘b."""
    op = "mul" if c.name == "addcmul" else "div"
    product = c.emit(op, [tensor1, tensor2])
    if value != 1:
        product = c.emit("mul", [product, c.number(value, product)])
    return c.emit("add", [input, product])


@lowering("lerp")
def lerp(c: Call, input: V, end: V, weight: Any) -> V:
    """x + w·(y − x)."""
    step = c.emit("sub", [end, input])
    return c.emit("add", [input, c.emit("mul", [step, c.value(weight, step)])])


@lowering("leaky_relu")
def leaky_relu(c: Call, input: V, negative_slope: float = 0.01, inplace: bool = False) -> V:
    """max(x, slope·x)."""
    return c.emit("leaky_relu", [input], slope=float(negative_slope))


@lowering("prelu", "_prelu_kernel")
def prelu(c: Call, input: V, weight: V) -> V:
    """A learned slope, one a channel."""
    slope = weight
    if weight.rank == 1 and weight.shape[0] > 1 and input.rank > 2:
        slope = c.reshape(weight, (weight.shape[0], *[1] * (input.rank - 2)))
    return c.emit("prelu", [input, slope])


@lowering("rrelu")
def rrelu(
    c: Call,
    input: V,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> V:
    """A random slope in training, its mean otherwise."""
    if not training:
        return c.emit("leaky_relu", [input], slope=(lower + upper) / 2)
    return c.emit("rrelu", [input], lower=float(lower), upper=float(upper))


@lowering("elu", "celu")
def elu(
    c: Call, input: V, alpha: float = 1.0, scale: Any = 1, input_scale: Any = 1, inplace: Any = None
) -> V:
    """α(exp x − 1) below zero."""
    if not isinstance(scale, bool) and (scale != 1 or input_scale != 1):
        raise NotModelled("scaled elu")
    return c.emit(c.name, [input], alpha=float(alpha))


@lowering("selu")
def selu(c: Call, input: V, inplace: bool = False) -> V:
    """The self-normalising elu."""
    return c.emit("selu", [input])


@lowering("gelu")
def gelu(c: Call, input: V, approximate: str = "none") -> V:
    """x·Φ(x)."""
    return c.emit("gelu", [input], approximate=approximate)


@lowering("softplus")
def softplus(c: Call, input: V, beta: float = 1.0, threshold: float = 20.0) -> V:
    """ln(1 + exp(βx))/β."""
    return c.emit("softplus", [input], beta=float(beta), threshold=float(threshold))


@lowering("log_sigmoid", "log_sigmoid_forward")
def log_sigmoid(c: Call, input: V) -> V:
    """ln σ(x)."""
    return c.emit("logsigmoid", [input])


@lowering("hardsigmoid")
def hardsigmoid(c: Call, input: V, inplace: bool = False) -> V:
    """x/6 + 1/2 between 0 and 1."""
    return c.emit("hardsigmoid", [input])


@lowering("hardtanh")
def hardtanh(
    c: Call, input: V, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> V:
    """x between two bounds."""
    return c.emit("hardtanh", [input], minimum=float(min_val), maximum=float(max_val))


@lowering("threshold")
def threshold(c: Call, input: V, threshold: float, value: float, inplace: bool = False) -> V:
    """x above the threshold, else the value."""
    return c.emit("threshold", [input], threshold=float(threshold), value=float(value))


@lowering("hardshrink", "softshrink")
def shrink(c: Call, input: V, lambd: float = 0.5) -> V:
    """Zero near zero; softshrink moves the rest there too."""
    more = {"bias": float(lambd)} if c.name == "softshrink" else {}
    return c.emit(c.name, [input], lambd=float(lambd), **more)


@lowering("glu")
def glu(c: Call, input: V, dim: int = -1) -> V:
    """a·σ(b) of the two halves."""
    return c.emit("glu", [input], axis=dim % input.rank)


@lowering("clamp", "clip", "clamp_min", "clamp_max")
def clamp(c: Call, input: V, min: Any = None, max: Any = None) -> V:
    """x between bounds, either of which may be missing."""
    if c.name == "clamp_max":
        min, max = None, min if max is None else max
    bounds = [None if b is None else c.value(b, input) for b in (min, max)]
    return c.emit("clip", [input, *bounds])


@lowering("where")
def where(c: Call, condition: V, input: Any = None, other: Any = None) -> Any:
    """Elements of one or the other; alone, the places where the condition holds."""
    if input is None:
        return nonzero(c, condition, as_tuple=True)
    a, b = pair(c, input, other)
    return c.emit("where", [condition, a, b])


@lowering("nonzero", "argwhere")
def nonzero(c: Call, input: V, as_tuple: bool = False) -> Any:
    """The places of what is not zero: [count, axes], or one vector an axis."""
    count = c.shape[0]
    places = c.emit("nonzero", [input], (input.rank, count), "int64")
    if not as_tuple:
        return c.emit("transpose", [places], (count, input.rank), "int64", permutation=(1, 0))
    return tuple(
        c.emit("select_index", [places], (count,), "int64", axis=0, index=i)
        for i in range(input.rank)
    )


@lowering("nms")
def nms(c: Call, *_: Any) -> V:
    """Detections that no better one overlaps: integers, for which there is no word."""
    raise NotModelled("non-maximum suppression")


@lowering("roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool")
def pooled_regions(c: Call, *_: Any, **__: Any) -> V:
    """Averages over regions that the network proposes itself: their places have no law."""
    raise NotModelled("pooling over regions")


@lowering("masked_fill")
def masked_fill(c: Call, input: V, mask: V, value: Any) -> V:
    """A number where the mask is true."""
    return c.emit("masked_fill", [input, mask, c.value(value, input)])


@lowering("exp2")
def exp2(c: Call, input: V) -> V:
    """2ˣ."""
    return c.emit("pow", [c.number(2.0), input])


@lowering("log2", "log10")
def log_of_base(c: Call, input: V) -> V:
    """A logarithm of another base."""
    import math

    base = math.log(2.0 if c.name == "log2" else 10.0)
    return c.emit("div", [c.emit("log", [input]), c.number(base)])


@lowering("erfc")
def erfc(c: Call, input: V) -> V:
    """1 − erf x."""
    return c.emit("sub", [c.number(1.0), c.emit("erf", [input])])


@lowering(
    "positive",
    "real",
    "conj",
    "resolve_conj",
    "resolve_neg",
    "requires_grad",
    "clone",
    "contiguous",
    "alias",
    "lift_fresh",
    "lift_fresh_copy",
    "copy_to",
    "deepcopy",
    "retain_grad",
)
def identity(c: Call, input: V, *_: Any, **__: Any) -> V:
    """The same elements."""
    if input.dtype.startswith("complex"):
        raise NotModelled("complex numbers")
    return c.emit("identity", [input], input.shape, input.dtype)


@lowering("detach", "data")
def detach(c: Call, input: V, *_: Any, **__: Any) -> V:
    """The same elements, from which no gradient comes back; weights and numbers stay what they
    are, since none is asked for there."""
    if input.parameter or input.elements is not None or "float" not in input.dtype:
        stays: V = identity(c, input)
        return stays
    return c.emit("identity", [input], input.shape, input.dtype, stops_gradient=True)


@lowering("nan_to_num")
def nan_to_num(c: Call, input: V, *_: Any, **__: Any) -> V:
    """The same elements where they are finite."""
    return c.emit("identity", [input])


@lowering(
    "float",
    "half",
    "bfloat16",
    "double",
    "int",
    "long",
    "bool",
    "short",
    "char",
    "byte",
    "type",
    "to",
    "type_as",
    "_to_copy",
    "to_dtype",
)
def cast(c: Call, input: V, *_: Any, **__: Any) -> V:
    """Another dtype."""
    if c.dtype == input.dtype:
        return c.emit("identity", [input])
    return c.emit("cast", [input], dtype=c.dtype)


@lowering("isinf")
def isinf(c: Call, input: V) -> V:
    """Which elements are infinite."""
    return c.emit("isinf", [input])


@lowering("isposinf", "isneginf")
def one_infinity(c: Call, input: V) -> V:
    """Which elements are infinite, of one sign."""
    positive = c.name == "isposinf"
    return c.emit("isinf", [input], positive=positive, negative=not positive)


@lowering(
    "dropout",
    "alpha_dropout",
    "feature_alpha_dropout",
    "native_dropout",
    "feature_dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
)
def dropout(
    c: Call,
    input: V,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    train: bool | None = None,
) -> Any:
    """Elements (or channels) dropped at random, the rest rescaled."""
    if "alpha" in c.name:
        raise NotModelled("dropout to a negative value")
    active = bool(training if train is None else train)
    made = c.emit("dropout", [input], p=float(p), training=active)
    if c.name == "native_dropout":
        return made, None
    return made


@lowering("copy")
def copy(c: Call, input: V, src: Any, non_blocking: bool = False) -> V:
    """The elements of another tensor, in the shape and dtype of the first."""
    source = c.cast(c.value(src, input), input.dtype)
    return c.expand(source, input.shape)


@lowering("fill", "zero")
def fill(c: Call, input: V, value: Any = 0) -> V:
    """One number everywhere."""
    if isinstance(value, V):
        return c.expand(c.cast(value, input.dtype), input.shape)
    return c.emit(
        "full",
        [None, None],
        input.shape,
        input.dtype,
        shape=input.shape,
        value=float(value),
        dtype=input.dtype,
    )


@lowering("logit")
def logit(c: Call, input: V, eps: float | None = None) -> V:
    """ln(x/(1 − x))."""
    if eps is not None:
        bounds = [c.number(eps), c.number(1 - eps)]
        input = c.emit("clip", [input, *bounds])
    rest = c.emit("sub", [c.number(1.0), input])
    return c.emit("log", [c.emit("div", [input, rest])])


def dtype_argument(dtype: Any) -> str | None:
    """An argument ``dtype`` of torch as numpy's name."""
    return dtype_name(dtype) if isinstance(dtype, torch.dtype) else None
