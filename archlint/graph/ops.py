"""The vocabulary of the layer graph: every canonical op with what is needed to execute it.

An op is one :class:`Op` entry. Its attributes are complete: a node can be executed from its inputs
and attributes alone. What a source op means that none of these does becomes a node of kind
``unknown`` with the source's own name.

Conventions. Axes are non-negative. Spatial attributes have one entry per spatial axis; ``padding``
has the begins of all spatial axes, then the ends. Tensors of convolutions and norms are channels
first, ``[sample, channel, *spatial]``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

UNKNOWN = "unknown"

Kind = Literal[
    "affine",  # contracts a weight: fans, a law, the place where a gain is decided
    "contraction",  # contracts two activations
    "activation",  # elementwise, nonlinear, one input
    "arithmetic",  # elementwise, differentiable, not an activation
    "normalisation",
    "pooling",
    "reduction",
    "softmax",
    "attention",
    "recurrent",
    "layout",  # moves elements, changes none
    "index",  # integers, booleans, positions: carries no signal
    "random",
    "control",
    "constant",
]


class _Required:
    def __repr__(self) -> str:
        return "required"


REQUIRED = _Required()


@dataclass(frozen=True, slots=True)
class Op:
    """One canonical op.

    ``inputs`` names the inputs; a trailing ``?`` marks an optional one, a trailing ``*`` on the
    last one any number. ``attributes`` maps a name to its default, or REQUIRED. ``outputs`` is the
    (least, greatest) number of outputs, None for no limit.
    """

    name: str
    kind: Kind
    inputs: tuple[str, ...]
    attributes: Mapping[str, object] = field(default_factory=dict)
    outputs: tuple[int, int | None] = (1, 1)
    has_body: bool = False

    @property
    def least_inputs(self) -> int:
        """How many inputs must be given."""
        return sum(1 for name in self.inputs if not name.endswith(("?", "*")))

    @property
    def most_inputs(self) -> int | None:
        """How many inputs may be given, None for any number."""
        return None if self.inputs and self.inputs[-1].endswith("*") else len(self.inputs)


OPS: dict[str, Op] = {}


def define(
    kind: Kind,
    name: str,
    inputs: str,
    outputs: tuple[int, int | None] = (1, 1),
    has_body: bool = False,
    **attributes: object,
) -> None:
    """Add an op to the vocabulary; ``inputs`` is a blank-separated list of names."""
    if name in OPS:
        raise ValueError(f"op {name!r} is defined twice")
    OPS[name] = Op(name, kind, tuple(inputs.split()), attributes, outputs, has_body)


# --- affine: `weight` is a parameter (or what was computed from one)
# linear: y = alpha·x·W + beta·b over the last axis of x; `input_axis` is the axis of W that is
# contracted: 1 for torch's [out, in], 0 for ONNX MatMul's [in, out].
define("affine", "linear", "x weight bias?", input_axis=1, alpha=1.0, beta=1.0)
# grouped_linear: experts. Row r of x [rows, in] meets matrix g of weight [groups, in, out] (or
# [groups, out, in] for input_axis 2), the first g with r < offsets[g]; later rows give zeros.
define("affine", "grouped_linear", "x weight offsets", input_axis=1)
define(
    "affine",
    "conv",
    "x weight bias?",
    stride=REQUIRED,
    padding=REQUIRED,
    dilation=REQUIRED,
    groups=1,
    padding_mode="zeros",
)
define(
    "affine",
    "conv_transpose",
    "x weight bias?",
    stride=REQUIRED,
    padding=REQUIRED,
    dilation=REQUIRED,
    output_padding=REQUIRED,
    groups=1,
)
define("affine", "bilinear", "x1 x2 weight bias?")
# embedding: rows of weight [count, features] picked by integer ids.
define("affine", "embedding", "ids weight", padding_index=None, scale_grad_by_freq=False)
# embedding_bag: the rows of each bag reduced by sum, mean or max.
define("affine", "embedding_bag", "ids weight offsets? per_sample_weights?", mode="mean")

# --- contractions of two activations
define("contraction", "matmul", "a b")
define("contraction", "einsum", "operands*", equation=REQUIRED)

# --- activations
for _name in (
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
):
    define("activation", _name, "x")
define("activation", "leaky_relu", "x", slope=0.01)
define("activation", "prelu", "x slope")
define("activation", "rrelu", "x", lower=1 / 8, upper=1 / 3)
define("activation", "elu", "x", alpha=1.0)
define("activation", "selu", "x", alpha=1.6732632423543772, scale=1.0507009873554805)
define("activation", "celu", "x", alpha=1.0)
define("activation", "gelu", "x", approximate="none")  # "none" (erf), "tanh", "sigmoid" (1.702)
define("activation", "softplus", "x", beta=1.0, threshold=20.0)
define("activation", "hardsigmoid", "x", alpha=1 / 6, beta=0.5)
define("activation", "hardtanh", "x", minimum=-1.0, maximum=1.0)
define("activation", "threshold", "x", threshold=REQUIRED, value=REQUIRED)
define("activation", "hardshrink", "x", lambd=0.5)
define("activation", "softshrink", "x", lambd=0.5, bias=0.0)
define("activation", "glu", "x", axis=REQUIRED)

# --- arithmetic, with numpy broadcasting
for _name in (
    "add",
    "sub",
    "mul",
    "div",
    "pow",
    "maximum",
    "minimum",
    "floor_divide",
    "atan2",
):
    define("arithmetic", _name, "a b")
# remainder: of the sign of b, or of the sign of a where the quotient is truncated.
define("arithmetic", "remainder", "a b", truncated=False)
for _name in (
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
):
    define("arithmetic", _name, "x")
define("arithmetic", "clip", "x minimum? maximum?")
define("arithmetic", "where", "condition a b")
define("arithmetic", "masked_fill", "x mask value")
define("arithmetic", "cumsum", "x", axis=REQUIRED, exclusive=False, reverse=False)
define("arithmetic", "cumprod", "x", axis=REQUIRED)

# --- normalisation; `scale` and `shift` are the learned affine part
# batch_norm: mean and variance are running statistics; training uses those of the batch.
define(
    "normalisation",
    "batch_norm",
    "x scale? shift? mean? variance?",
    eps=1e-5,
    momentum=0.1,
    training=True,
)
define("normalisation", "layer_norm", "x scale? shift?", axes=REQUIRED, eps=1e-5)
define("normalisation", "rms_norm", "x scale?", axes=REQUIRED, eps=1e-6)
define("normalisation", "group_norm", "x scale? shift?", groups=REQUIRED, eps=1e-5)
define("normalisation", "instance_norm", "x scale? shift?", eps=1e-5)
define("normalisation", "lp_normalize", "x", p=2.0, axis=REQUIRED, eps=1e-12)
# local_response_norm: over a window of `size` channels, alpha/size times the sum of squares.
define("normalisation", "local_response_norm", "x", size=REQUIRED, alpha=1e-4, beta=0.75, k=1.0)
# standardise: (x − mean over axes)/(sqrt(variance + eps) + outer_eps).
define("normalisation", "standardise", "x", axes=REQUIRED, eps=0.0, unbiased=False, outer_eps=0.0)
# weight_norm: g·v/‖v‖ with the norm over all axes but `axis` (None: over all).
define("normalisation", "weight_norm", "v g", axis=0)
define("normalisation", "spectral_norm", "weight", axis=0)

# --- pooling; `ceil` rounds the output size up. Indices of maxima count in the flat plane of one
# sample's channel.
define(
    "pooling",
    "max_pool",
    "x",
    kernel=REQUIRED,
    stride=REQUIRED,
    padding=REQUIRED,
    dilation=REQUIRED,
    ceil=False,
    outputs=(1, 2),
)
define(
    "pooling",
    "avg_pool",
    "x",
    kernel=REQUIRED,
    stride=REQUIRED,
    padding=REQUIRED,
    ceil=False,
    count_padding=True,
    divisor=None,
    dilation=None,
)
define(
    "pooling",
    "lp_pool",
    "x",
    kernel=REQUIRED,
    stride=REQUIRED,
    padding=REQUIRED,
    p=2.0,
    ceil=False,
    dilation=None,
)
define("pooling", "adaptive_avg_pool", "x", size=REQUIRED)
define("pooling", "adaptive_max_pool", "x", size=REQUIRED, outputs=(1, 2))
define("pooling", "max_unpool", "x indices", kernel=REQUIRED, stride=REQUIRED, padding=REQUIRED)

# --- reductions over `axes`
for _name in (
    "reduce_sum",
    "reduce_mean",
    "reduce_prod",
    "reduce_max",
    "reduce_min",
    "reduce_l1",
    "reduce_l2",
    "reduce_logsumexp",
    "reduce_any",
    "reduce_all",
):
    define("reduction", _name, "x", axes=REQUIRED, keepdims=False)
define("reduction", "reduce_var", "x", axes=REQUIRED, keepdims=False, correction=0)
define("reduction", "reduce_std", "x", axes=REQUIRED, keepdims=False, correction=0)

define("softmax", "softmax", "x", axis=REQUIRED)
define("softmax", "log_softmax", "x", axis=REQUIRED)
define("softmax", "gumbel_softmax", "x", axis=REQUIRED, tau=1.0, hard=False)

# attention: softmax(scale·q·kᵀ + mask)·v with q [sample, heads, length, features]; `scale` None
# means 1/sqrt(features); k, v may have fewer heads (grouped-query); `softcap` c: c·tanh(logits/c);
# causal: query i sees the keys up to i + `offset`, the number of those from earlier calls.
define(
    "attention",
    "attention",
    "q k v mask?",
    scale=None,
    causal=False,
    dropout=0.0,
    softcap=0.0,
    offset=0,
)
# rotary: q·cos + rotate(q)·sin, positions mixed pairwise; `interleaved` says which pairs.
define("attention", "rotary", "x cos sin positions?", interleaved=False, rotary_features=None)

# --- recurrent, ONNX's layout: x [length, sample, features], weight [directions, gates·hidden, in],
# recurrence [directions, gates·hidden, hidden], bias [directions, 2·gates·hidden] (input, then
# recurrent); gates i,o,f,c (lstm), z,r,h (gru). Outputs: all steps, last hidden, last cell.
for _name, _more in (("rnn", ""), ("gru", ""), ("lstm", " initial_c? peephole?")):
    define(
        "recurrent",
        _name,
        "x weight recurrence bias? lengths? initial_h?" + _more,
        outputs=(1, 3),
        hidden=REQUIRED,
        direction="forward",
        activations=(),
        clip=None,
        batch_first=False,
        linear_before_reset=False,
        input_forget=False,
    )

# --- layout
define("layout", "identity", "x", stops_gradient=False)  # as detach does
define("layout", "cast", "x", dtype=REQUIRED)
define("layout", "reshape", "x shape?", shape=None)  # the shape as attribute, or a value if dynamic
define("layout", "transpose", "x", permutation=REQUIRED)
define("layout", "expand", "x shape?", shape=None)
define("layout", "tile", "x repeats?", repeats=None)
define("layout", "concat", "parts*", axis=REQUIRED)
define("layout", "stack", "parts*", axis=REQUIRED)
define("layout", "split", "x", outputs=(1, None), axis=REQUIRED, sizes=REQUIRED)
define("layout", "slice", "x", axes=REQUIRED, starts=REQUIRED, ends=REQUIRED, steps=REQUIRED)
define("layout", "dynamic_slice", "x starts ends axes? steps?")
define("layout", "select_index", "x", axis=REQUIRED, index=REQUIRED)
define("layout", "pad", "x value?", padding=REQUIRED, mode="constant")  # begins of all axes, ends
define("layout", "flip", "x", axes=REQUIRED)
# reverse_sequence: the first `lengths` steps of each sample backwards.
define("layout", "reverse_sequence", "x lengths", time_axis=REQUIRED, batch_axis=REQUIRED)
define("layout", "roll", "x", axes=REQUIRED, shifts=REQUIRED)
define("layout", "depth_to_space", "x", block=REQUIRED, mode="CRD")
define("layout", "space_to_depth", "x", block=REQUIRED, mode="DCR")
define("layout", "channel_shuffle", "x", groups=REQUIRED)
define(
    "layout", "unfold", "x", kernel=REQUIRED, stride=REQUIRED, padding=REQUIRED, dilation=REQUIRED
)
define(
    "layout",
    "fold",
    "x",
    size=REQUIRED,
    kernel=REQUIRED,
    stride=REQUIRED,
    padding=REQUIRED,
    dilation=REQUIRED,
)
# windows: overlapping slices of `size` every `step` along `axis`, appended as last axis.
define("layout", "windows", "x", axis=REQUIRED, size=REQUIRED, step=REQUIRED)
define("layout", "gather", "x indices", axis=REQUIRED)
define("layout", "gather_elements", "x indices", axis=REQUIRED)
define("layout", "gather_nd", "x indices", batch_axes=0)
define("layout", "scatter_elements", "x indices updates", axis=REQUIRED, reduction="none")
define("layout", "scatter_nd", "x indices updates", reduction="none")
define("layout", "index_put", "x value indices*", accumulate=False)
define("layout", "triangle", "x", upper=REQUIRED, diagonal=0)
define("layout", "diagonal", "x", offset=0, axis1=0, axis2=1)
# resize: where element i of a resized axis lies in the original one follows from `coordinates`
# (ONNX's names) and the factors `scales` (None: the ratio of the sizes); `rounding` picks the
# nearest element; `cubic` is the cubic kernel's coefficient.
define(
    "layout",
    "resize",
    "x",
    size=REQUIRED,
    mode="nearest",
    align_corners=False,
    coordinates="half_pixel",
    rounding="round_prefer_floor",
    scales=None,
    cubic=-0.75,
    antialias=False,
    exclude_outside=False,
)
define(
    "layout", "grid_sample", "x grid", mode="bilinear", padding_mode="zeros", align_corners=False
)
define("layout", "sort", "x", axis=REQUIRED, descending=False, outputs=(1, 2))
define("layout", "topk", "x k?", axis=REQUIRED, k=None, largest=True, outputs=(1, 2))
define("layout", "compress", "x condition", axis=None)

# --- integers, booleans, positions
for _name in (
    "equal",
    "less",
    "less_equal",
    "greater",
    "greater_equal",
    "not_equal",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
):
    define("index", _name, "a b")
for _name in ("logical_not", "bitwise_not", "isnan", "isfinite", "shape", "size", "nonzero"):
    define("index", _name, "x")
define("index", "isinf", "x", positive=True, negative=True)
# argmax: of equal elements the first, or the last.
define("index", "argmax", "x", axis=REQUIRED, keepdims=False, last=False)
define("index", "argmin", "x", axis=REQUIRED, keepdims=False, last=False)
define("index", "one_hot", "indices", depth=REQUIRED, axis=-1, on=1.0, off=0.0)
define("index", "range", "start limit step")
define("index", "full", "shape? value?", shape=None, value=0.0, dtype="float32")
# unique: sorted, or in the order of their first occurrence.
define("index", "unique", "x", axis=None, sorted=True, outputs=(1, 4))
# nms: (sample, class, box) of boxes [sample, box, 4] kept by scores [sample, class, box].
define("index", "nms", "boxes scores most? overlap? least?", center=False)

# --- random
define("random", "dropout", "x", p=0.5, training=True, outputs=(1, 2))
# drop_path (stochastic depth): whole samples dropped with probability p, the rest rescaled.
define("random", "drop_path", "x", p=REQUIRED, training=True)
define("random", "random_normal", "like?", shape=None, mean=0.0, std=1.0)
define("random", "random_uniform", "like?", shape=None, low=0.0, high=1.0)
define("random", "bernoulli", "p")

# --- control: `select` joins branches that carry a guard; loops run their body
define("control", "select", "condition then otherwise")
define(
    "control",
    "loop",
    "trip_count? condition? state*",
    outputs=(0, None),
    has_body=True,
    carried=REQUIRED,
)
define(
    "control",
    "scan",
    "state*",
    outputs=(0, None),
    has_body=True,
    carried=REQUIRED,
    input_axes=(),
    output_axes=(),
    input_reverse=(),
    output_reverse=(),
)

define("constant", "quantize", "x scale zero_point?", axis=None, dtype="uint8")
define("constant", "dequantize", "x scale zero_point?", axis=None)


def check_node(
    op: str,
    inputs: int,
    left_out: Sequence[int],
    outputs: int,
    attributes: Mapping[str, object],
) -> Iterator[str]:
    """What is wrong with a node against the vocabulary, one clause each."""
    if op == UNKNOWN:
        return
    spec = OPS.get(op)
    if spec is None:
        yield "not in the vocabulary"
        return
    most = spec.most_inputs
    if inputs < spec.least_inputs or (most is not None and inputs > most):
        yield f"has {inputs} inputs"
    for i in left_out:
        if i < len(spec.inputs) and not spec.inputs[i].endswith(("?", "*")):
            yield f"lacks its input {spec.inputs[i]!r}"
    least, greatest = spec.outputs
    if outputs < least or (greatest is not None and outputs > greatest):
        yield f"has {outputs} outputs"
    for name, default in spec.attributes.items():
        if default is REQUIRED and name not in attributes:
            yield f"lacks its attribute {name!r}"
    for name in attributes:
        if name not in spec.attributes:
            yield f"has the undeclared attribute {name!r}"


def attribute(op: str, attributes: Mapping[str, object], name: str) -> object:
    """An attribute's value, or its default."""
    return attributes[name] if name in attributes else OPS[op].attributes[name]
