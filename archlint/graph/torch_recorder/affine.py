"""Lowerings of maps that contract a weight, and of products of activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from archlint.graph.torch_recorder.lowering import Call, NotModelled, V, lowering


def each(value: Any, count: int) -> tuple[int, ...]:
    """A number or a sequence, as one entry a spatial axis."""
    if isinstance(value, int):
        return (value,) * count
    entries = tuple(int(v) for v in value)
    return entries * count if len(entries) == 1 else entries


def is_weight(c: Call, v: V) -> bool:
    """Whether a value is a trainable parameter itself."""
    parameters = c.lowerer.builder.parameters
    return v.parameter and v.id in parameters and parameters[v.id].trainable


def _weight_behind(c: Call, v: V) -> tuple[V, int] | None:
    """A matrix that x is multiplied with from the right: the parameter, and its input axis."""
    if v.rank != 2:
        return None
    if is_weight(c, v):
        return v, 0
    turned = c.lowerer.turned.get(v.id)
    if turned is not None and is_weight(c, turned):
        return turned, 1
    return None


@lowering("linear")
def linear(c: Call, input: V, weight: V, bias: V | None = None) -> V:
    """y = x·Wᵀ + b."""
    if weight.rank == 1:
        flat = c.emit("matmul", [input, weight], c.shape)
        return flat if bias is None else c.emit("add", [flat, bias])
    return c.emit("linear", [input, weight, bias], input_axis=1)


@lowering("matmul", "mm", "bmm", "mv", "dot", "inner", "__matmul__")
def matmul(c: Call, input: V, mat2: V | None = None, other: V | None = None) -> V:
    """x·W where W is a weight, else a product of activations."""
    right = mat2 if mat2 is not None else other
    if right is None:
        raise NotModelled("no second operand")
    if c.name == "inner" and right.rank > 1:
        right = c.transpose(right, [*range(right.rank - 2), right.rank - 1, right.rank - 2])
    found = _weight_behind(c, right)
    if found is not None:
        return c.emit("linear", [input, found[0]], input_axis=found[1])
    return c.emit("matmul", [input, right])


@lowering("rmatmul")
def rmatmul(c: Call, input: V, other: V) -> V:
    """The operator with its operands exchanged."""
    return matmul(c, other, input)  # type: ignore[no-any-return]


@lowering("baddbmm", "addbmm")
def baddbmm(c: Call, input: V, batch1: V, batch2: V, beta: float = 1, alpha: float = 1) -> V:
    """As addmm, for every matrix of a batch."""
    return addmm(c, input, batch1, batch2, beta, alpha)  # type: ignore[no-any-return]


@lowering("addmv")
def addmv(c: Call, input: V, mat: V, vec: V, beta: float = 1, alpha: float = 1) -> V:
    """As addmm, for a vector."""
    return addmm(c, input, mat, vec, beta, alpha)  # type: ignore[no-any-return]


@lowering("addmm")
def addmm(c: Call, input: V, mat1: V, mat2: V, beta: float = 1, alpha: float = 1) -> V:
    """beta·input + alpha·a·b."""
    found = _weight_behind(c, mat2) if c.name == "addmm" else None
    if found is not None:
        more = {"alpha": float(alpha), "beta": float(beta)}
        return c.emit("linear", [mat1, found[0], input], input_axis=found[1], **more)
    product = c.emit("matmul", [mat1, mat2], c.shape)
    if c.name == "addbmm":
        raise NotModelled("a sum over the batch")
    if alpha != 1:
        product = c.emit("mul", [product, c.number(float(alpha))])
    if beta == 0:
        return product
    if beta != 1:
        input = c.emit("mul", [input, c.number(float(beta))], input.shape)
    return c.emit("add", [input, product])


@lowering("conv1d", "conv2d", "conv3d")
def conv(
    c: Call,
    input: V,
    weight: V,
    bias: V | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> V:
    """Convolution; an input without sample axis gets one for the call."""
    n = weight.rank - 2
    dilations = each(dilation, n)
    if padding == "valid":
        begins = ends = (0,) * n
    elif padding == "same":
        total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
        begins = tuple(t // 2 for t in total)
        ends = tuple(t - b for t, b in zip(total, begins, strict=True))
    else:
        begins = ends = each(padding, n)
    alone = input.rank == n + 1
    x = c.reshape(input, (1, *input.shape)) if alone else input
    made = c.emit(
        "conv",
        [x, weight, bias],
        (1, *c.shape) if alone else c.shape,
        stride=each(stride, n),
        padding=(*begins, *ends),
        dilation=dilations,
        groups=groups,
    )
    return c.reshape(made, c.shape)


@lowering("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def conv_transpose(
    c: Call,
    input: V,
    weight: V,
    bias: V | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> V:
    """Transposed convolution."""
    n = weight.rank - 2
    alone = input.rank == n + 1
    x = c.reshape(input, (1, *input.shape)) if alone else input
    made = c.emit(
        "conv_transpose",
        [x, weight, bias],
        (1, *c.shape) if alone else c.shape,
        stride=each(stride, n),
        padding=each(padding, n) * 2,
        dilation=each(dilation, n),
        output_padding=each(output_padding, n),
        groups=groups,
    )
    return c.reshape(made, c.shape)


@lowering("convolution", "_convolution")
def convolution(
    c: Call,
    input: V,
    weight: V,
    bias: V | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *_: Any,
) -> V:
    """The dispatcher's convolution, of either direction."""
    if transposed:
        return conv_transpose(  # type: ignore[no-any-return]
            c, input, weight, bias, stride, padding, output_padding, groups, dilation
        )
    return conv(c, input, weight, bias, stride, padding, dilation, groups)  # type: ignore[no-any-return]


@lowering("_grouped_mm", "grouped_mm")
def grouped_mm(
    c: Call, input: V, mat2: V, offs: V | None = None, bias: V | None = None, **_: Any
) -> V:
    """Experts: rows of the input that lie together share a matrix."""
    if input.rank != 2 or mat2.rank != 3 or offs is None or bias is not None:
        raise NotModelled("another form of a grouped product")
    weight, axis = mat2, 1
    turned = c.lowerer.turned.get(mat2.id)
    if turned is not None:
        weight, axis = turned, 2
    return c.emit("grouped_linear", [input, weight, offs], input_axis=axis)


@lowering("bilinear")
def bilinear(c: Call, input1: V, input2: V, weight: V, bias: V | None = None) -> V:
    """x₁ᵀ·W·x₂ + b."""
    return c.emit("bilinear", [input1, input2, weight, bias])


@lowering("embedding")
def embedding(
    c: Call,
    input: V,
    weight: V,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> V:
    """Rows of the weight."""
    if max_norm is not None:
        raise NotModelled("renormalised rows")
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    return c.emit(
        "embedding",
        [input, weight],
        padding_index=padding_idx,
        scale_grad_by_freq=scale_grad_by_freq,
    )


@lowering("aten_embedding")
def aten_embedding(
    c: Call,
    weight: V,
    indices: V,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> V:
    """The dispatcher's order of arguments; −1 stands for no padding row."""
    chosen = padding_idx if padding_idx >= 0 else None
    return embedding(c, indices, weight, chosen, None, 2.0, scale_grad_by_freq)  # type: ignore[no-any-return]


@lowering("embedding_bag")
def embedding_bag(
    c: Call,
    input: V,
    weight: V,
    offsets: V | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: V | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> V:
    """Reduced rows of the weight."""
    if max_norm is not None or include_last_offset:
        raise NotModelled("a bag with these options")
    return c.emit("embedding_bag", [input, weight, offsets, per_sample_weights], mode=mode)


@lowering("einsum")
def einsum(c: Call, equation: str, *operands: Any) -> V:
    """A sum of products; one with a weight over the last axes is a linear map."""
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str):
        raise NotModelled("subscripts as lists")
    equation = _spelled_out(equation.replace(" ", ""), [o.rank for o in operands])
    if len(operands) == 2:
        made = _as_linear(c, equation, operands)
        if made is not None:
            return made
    return c.emit("einsum", list(operands), equation=equation)


def _spelled_out(equation: str, ranks: Sequence[int]) -> str:
    """The equation with an output and without dots."""
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    free = [x for x in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if x not in equation]
    if "..." in left:
        most = max(
            rank - len(t.replace("...", ""))
            for t, rank in zip(terms, ranks, strict=True)
            if "..." in t
        )
        dots = free[:most]
        for i, (term, rank) in enumerate(zip(terms, ranks, strict=True)):
            if "..." in term:
                count = rank - len(term.replace("...", ""))
                terms[i] = term.replace("...", "".join(dots[len(dots) - count :]))
        right = right.replace("...", "".join(dots))
    else:
        dots = []
    if not arrow:
        letters = "".join(terms)
        once = sorted(x for x in set(letters) if letters.count(x) == 1 and x not in dots)
        right = "".join(dots) + "".join(once)
    return ",".join(terms) + "->" + right


def _as_linear(c: Call, equation: str, operands: Sequence[V]) -> V | None:
    left, right = equation.split("->")
    terms = left.split(",")
    for i in (0, 1):
        x, w = operands[i], operands[1 - i]
        xs, ws = terms[i], terms[1 - i]
        if not is_weight(c, w) or len(set(xs)) < len(xs) or len(set(ws)) < len(ws):
            continue
        summed = [s for s in ws if s in xs]
        made = [s for s in ws if s not in xs]
        kept = [s for s in xs if s not in ws]
        if any(s in right for s in summed) or not summed or not made:
            continue
        if right != "".join(kept + made) or xs != "".join(kept + summed):
            continue
        inner = math.prod(x.shape[xs.index(s)] for s in summed)
        outer = math.prod(w.shape[ws.index(s)] for s in made)
        if ws == "".join(summed + made):
            matrix, axis = c.reshape(w, (inner, outer)), 0
        elif ws == "".join(made + summed):
            matrix, axis = c.reshape(w, (outer, inner)), 1
        else:
            continue
        lead = x.shape[: len(kept)]
        y = c.emit(
            "linear", [c.reshape(x, (*lead, inner)), matrix], (*lead, outer), input_axis=axis
        )
        return c.reshape(y, c.shape)
    return None


@lowering("tensordot")
def tensordot(c: Call, a: V, b: V, dims: Any = 2) -> V:
    """Contraction of several axes, as an einsum."""
    if isinstance(dims, int):
        first, second = list(range(a.rank - dims, a.rank)), list(range(dims))
    else:
        first, second = ([d] if isinstance(d, int) else list(d) for d in dims)
    first = [d % a.rank for d in first]
    second = [d % b.rank for d in second]
    letters = "abcdefghijklmnopqrstuvwxyz"
    ours = letters[: a.rank]
    theirs = list(letters[a.rank : a.rank + b.rank])
    for p, q in zip(first, second, strict=True):
        theirs[q] = ours[p]
    result = "".join(s for i, s in enumerate(ours) if i not in first)
    result += "".join(s for i, s in enumerate(theirs) if i not in second)
    return einsum(c, f"{ours},{''.join(theirs)}->{result}", a, b)  # type: ignore[no-any-return]


@lowering("outer", "ger")
def outer(c: Call, input: V, vec2: V) -> V:
    """All products of two vectors."""
    column = c.reshape(input, (*input.shape, 1))
    return c.emit("mul", [column, vec2])
