"""Lowerings of reductions, scans, norms and orderings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from archlint.graph.torch_recorder.elementwise import dtype_argument, pair
from archlint.graph.torch_recorder.lowering import (
    Call,
    NotModelled,
    V,
    broadcast_shape,
    lowering,
)


def axes_of(dim: Any, rank: int) -> tuple[int, ...]:
    """torch's ``dim`` as sorted axes; none or an empty list stands for all."""
    if dim is None or (isinstance(dim, list | tuple) and not dim):
        return tuple(range(rank))
    dims = [dim] if isinstance(dim, int) else dim
    return tuple(sorted(int(d) % max(rank, 1) for d in dims)) if rank else ()


def _keepdims_shape(c: Call) -> tuple[int, ...]:
    return c.shape


_SIMPLE = {
    "sum": "reduce_sum",
    "mean": "reduce_mean",
    "amax": "reduce_max",
    "amin": "reduce_min",
    "logsumexp": "reduce_logsumexp",
    "any": "reduce_any",
    "all": "reduce_all",
    "prod": "reduce_prod",
}


@lowering(*_SIMPLE)
def reduce(c: Call, input: V, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> V:
    """A reduction over axes."""
    wanted = dtype_argument(dtype)
    if wanted is not None:
        input = c.cast(input, wanted)
    op = _SIMPLE[c.name]
    return c.emit(op, [input], axes=axes_of(dim, input.rank), keepdims=bool(keepdim))


@lowering("max", "min")
def extremum(c: Call, input: V, dim: Any = None, keepdim: bool = False, other: Any = None) -> Any:
    """Over all, along an axis with positions, or of two tensors."""
    if isinstance(dim, V) or other is not None:
        a, b = pair(c, input, dim if other is None else other)
        return c.emit("maximum" if c.name == "max" else "minimum", [a, b])
    op = "reduce_max" if c.name == "max" else "reduce_min"
    made = c.emit(op, [input], axes=axes_of(dim, input.rank), keepdims=bool(keepdim))
    if not isinstance(c.out, tuple):
        return made
    position = c.emit(
        "argmax" if c.name == "max" else "argmin",
        [input],
        c.shape,
        "int64",
        axis=int(dim) % input.rank,
        keepdims=bool(keepdim),
    )
    return made, position


@lowering("argmax", "argmin")
def arg_extremum(c: Call, input: V, dim: int | None = None, keepdim: bool = False) -> V:
    """Where the extremum is."""
    if dim is None:
        flat = c.reshape(input, (math.prod(input.shape),))
        return c.emit(c.name, [flat], axis=0)
    return c.emit(c.name, [input], axis=dim % input.rank, keepdims=bool(keepdim))


@lowering("var", "std")
def var(
    c: Call,
    input: V,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    correction: float | None = None,
) -> V:
    """Variance or standard deviation; torch divides by n − 1 unless told otherwise."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    return c.emit(
        f"reduce_{c.name}",
        [input],
        axes=axes_of(dim, input.rank),
        keepdims=bool(keepdim),
        correction=int(correction),
    )


@lowering("var_mean", "std_mean")
def var_mean(
    c: Call,
    input: V,
    dim: Any = None,
    unbiased: bool | None = None,
    keepdim: bool = False,
    correction: float | None = None,
) -> Any:
    """Both at once."""
    if correction is None:
        correction = 1 if unbiased is None else int(unbiased)
    axes = axes_of(dim, input.rank)
    shape = c.shape
    first = c.emit(
        f"reduce_{c.name[:3]}",
        [input],
        shape,
        axes=axes,
        keepdims=bool(keepdim),
        correction=int(correction),
    )
    return first, c.emit("reduce_mean", [input], shape, axes=axes, keepdims=bool(keepdim))


@lowering("norm", "linalg_norm", "linalg_vector_norm", "frobenius_norm")
def norm(
    c: Call,
    input: V,
    p: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    dtype: Any = None,
    ord: Any = None,
) -> V:
    """A vector norm over axes."""
    order = ord if p is None else p
    if order in (None, "fro"):
        order = 2
    axes = axes_of(dim, input.rank)
    if c.name == "linalg_norm" and order != 2 and len(axes) == 2:
        raise NotModelled("a matrix norm")
    keep = {"axes": axes, "keepdims": bool(keepdim)}
    if order in (1, 2):
        return c.emit(f"reduce_l{int(order)}", [input], **keep)
    if order in (math.inf, -math.inf):
        sizes = c.emit("abs", [input], input.shape)
        return c.emit("reduce_max" if order > 0 else "reduce_min", [sizes], **keep)
    if not isinstance(order, int | float) or order == 0:
        raise NotModelled("this norm")
    sizes = c.emit("abs", [input], input.shape)
    powers = c.emit("pow", [sizes, c.number(float(order))], input.shape)
    total = c.emit("reduce_sum", [powers], **keep)
    return c.emit("pow", [total, c.number(1.0 / order)])


@lowering("cumsum", "cumprod")
def cumulative(c: Call, input: V, dim: int, dtype: Any = None) -> V:
    """Partial sums or products."""
    input = c.cast(input, c.dtype)
    return c.emit(c.name, [input], axis=dim % max(input.rank, 1))


@lowering("sort")
def sort(c: Call, input: V, dim: Any = -1, descending: bool = False, stable: Any = None) -> Any:
    """Sorted along an axis, with positions."""
    made = c.emit_many(
        "sort",
        [input],
        [(input.shape, input.dtype), (input.shape, "int64")],
        axis=int(dim) % input.rank,
        descending=bool(descending),
    )
    return tuple(made)


@lowering("argsort")
def argsort(c: Call, input: V, dim: int = -1, descending: bool = False, stable: bool = False) -> V:
    """The positions alone."""
    made = c.emit_many(
        "sort",
        [input],
        [(input.shape, input.dtype), (input.shape, "int64")],
        axis=dim % input.rank,
        descending=bool(descending),
    )
    return made[1]


@lowering("topk")
def topk(
    c: Call, input: V, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> Any:
    """The largest along an axis, with positions."""
    shape = c.shape
    made = c.emit_many(
        "topk",
        [input, None],
        [(shape, input.dtype), (shape, "int64")],
        axis=dim % input.rank,
        k=int(k),
        largest=bool(largest),
    )
    return tuple(made)


def _is_whole(c: Call, v: V) -> bool:
    """Whether a value holds integers, of an integer type or cast from one."""
    if v.integral:
        return True
    made = next((n for n in reversed(c.lowerer.builder.nodes) if v.id in n.outputs), None)
    if made is None or made.op != "cast" or made.inputs[0] is None:
        return False
    dtype = c.lowerer.builder.values[made.inputs[0]].dtype
    return dtype is not None and dtype.startswith(("int", "uint", "bool"))


@lowering("bincount", "histc")
def counts(c: Call, input: V, bins: int = 100, min: float = 0, max: float = 0, **_: Any) -> V:
    """How often each integer below ``bins`` occurs, such as the tokens of each expert."""
    if c.name == "bincount" or not _is_whole(c, input) or (min, max) != (0, bins - 1):
        raise NotModelled("counting what are no integers")
    flat = c.cast(c.reshape(input, (math.prod(input.shape),)), "int64")
    shape = (flat.shape[0], bins)
    marks = c.emit("one_hot", [flat], shape, "int64", depth=bins, axis=1)
    return c.cast(c.emit("reduce_sum", [marks], (bins,), "int64", axes=(0,)), c.dtype)


@lowering("cdist")
def cdist(c: Call, x1: V, x2: V, p: float = 2.0, compute_mode: Any = None) -> V:
    """Distances of all pairs of rows."""
    if p not in (1, 2):
        raise NotModelled("this distance")
    a = c.reshape(x1, (*x1.shape[:-1], 1, x1.shape[-1]))
    b = c.reshape(x2, (*x2.shape[:-2], 1, *x2.shape[-2:]))
    shape = (*c.shape, x1.shape[-1])
    difference = c.emit("sub", [a, b], shape)
    return c.emit(f"reduce_l{int(p)}", [difference], axes=(len(shape) - 1,))


@lowering("cosine_similarity")
def cosine_similarity(c: Call, x1: V, x2: V, dim: int = 1, eps: float = 1e-8) -> V:
    """The product of two vectors of length one."""
    parts: Sequence[V] = [
        c.emit("lp_normalize", [v], v.shape, p=2.0, axis=dim % v.rank, eps=float(eps))
        for v in (x1, x2)
    ]
    shape = broadcast_shape(x1.shape, x2.shape)
    product = c.emit("mul", list(parts), shape)
    return c.emit("reduce_sum", [product], axes=(dim % len(shape),))
