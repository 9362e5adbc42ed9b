"""Lowerings of what moves elements, with the inverses of views for writes through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from archlint.graph.torch_recorder.lowering import VIEWS, Call, NotModelled, V, lowering


def inverse_of(
    *names: str,
) -> Callable[[Callable[[Call, V, V], V]], Callable[[Call, V, V], V]]:
    """Register how a write through a view reaches the viewed tensor: (call, base, written)."""

    def register(function: Callable[[Call, V, V], V]) -> Callable[[Call, V, V], V]:
        for name in names:
            VIEWS[name] = function
        return function

    return register


def _call_arguments(c: Call) -> tuple[Any, ...]:
    """The arguments after the tensor, dimensions and sizes as numbers."""
    given = list(c.node.args[1:])
    given += [v for k, v in c.node.kwargs.items() if k not in ("input", "self")]
    return tuple(given)


@lowering(
    "view",
    "reshape",
    "flatten",
    "squeeze",
    "unsqueeze",
    "unflatten",
    "view_as",
    "reshape_as",
    "ravel",
    "_unsafe_view",
    "_reshape_alias",
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
)
def reshape(c: Call, input: V, *_: Any, **__: Any) -> V:
    """The elements in order, in another shape."""
    if c.dtype != input.dtype:
        raise NotModelled("a view of the bits")
    return c.emit("reshape", [input], shape=c.shape)


def _permutation(c: Call, rank: int) -> tuple[int, ...]:
    name, rest = c.name, _call_arguments(c)
    order = list(range(rank))
    if name in ("transpose", "swapaxes", "swapdims"):
        a, b = int(rest[0]) % rank, int(rest[1]) % rank
        order[a], order[b] = order[b], order[a]
    elif name == "permute":
        dims = rest[0] if rest and isinstance(rest[0], list | tuple) else rest
        order = [int(d) % rank for d in dims]
    elif name in ("t", "T", "H"):
        order.reverse()
    elif name in ("mT", "adjoint", "mH"):
        order[-1], order[-2] = order[-2], order[-1]
    elif name in ("movedim", "moveaxis"):
        source, target = ([d] if isinstance(d, int) else list(d) for d in rest[:2])
        source, target = [d % rank for d in source], [d % rank for d in target]
        left = iter([d for d in order if d not in source])
        places = dict(zip(target, source, strict=True))
        order = [places[i] if i in places else next(left) for i in range(rank)]
    return tuple(order)


_PERMUTED = (
    "transpose",
    "swapaxes",
    "swapdims",
    "permute",
    "t",
    "T",
    "H",
    "mT",
    "adjoint",
    "mH",
    "movedim",
    "moveaxis",
)


@lowering(*_PERMUTED)
def permute(c: Call, input: V, *_: Any, **__: Any) -> V:
    """Axes in another order."""
    return c.transpose(input, _permutation(c, input.rank))


@inverse_of(*_PERMUTED)
def _unpermute(c: Call, base: V, value: V) -> V:
    order = _permutation(c, base.rank)
    back = [0] * len(order)
    for i, p in enumerate(order):
        back[p] = i
    return c.transpose(value, back)


@lowering("expand", "expand_as", "broadcast_to")
def expand(c: Call, input: V, *_: Any, **__: Any) -> V:
    """Broadcast."""
    return c.emit("expand", [input], shape=c.shape)


@lowering("broadcast_tensors")
def broadcast_tensors(c: Call, *tensors: Any) -> Any:
    """Several tensors to one shape."""
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], list | tuple) else tensors
    return tuple(c.expand(v, c.shape) for v in given)


@lowering("repeat", "tile")
def repeat(c: Call, input: V, *repeats: Any, **more: Any) -> V:
    """Copies side by side."""
    given: Any = repeats[0] if repeats and isinstance(repeats[0], list | tuple) else repeats
    if not repeats:
        given = next(iter(more.values()))
    counts = [int(r) for r in given]
    counts = [1] * (input.rank - len(counts)) + counts
    x = c.reshape(input, (*[1] * (len(counts) - input.rank), *input.shape))
    return c.emit("tile", [x], repeats=tuple(counts))


@lowering("repeat_interleave")
def repeat_interleave(
    c: Call, input: V, repeats: Any = None, dim: int | None = None, output_size: Any = None
) -> V:
    """Each element several times in a row."""
    if isinstance(repeats, V) and repeats.elements is not None and repeats.elements.numel() == 1:
        repeats = int(repeats.elements)
    if not isinstance(repeats, int):
        raise NotModelled("counts that differ")
    if dim is None:
        input, dim = c.reshape(input, (math.prod(input.shape),)), 0
    axis = dim % input.rank
    split = (*input.shape[: axis + 1], 1, *input.shape[axis + 1 :])
    wide = (*input.shape[: axis + 1], repeats, *input.shape[axis + 1 :])
    return c.reshape(c.expand(c.reshape(input, split), wide), c.shape)


@lowering("cat", "concat", "concatenate")
def cat(c: Call, tensors: Sequence[V], dim: int = 0, input: Any = None) -> V:
    """One after another; torch lets empty vectors pass."""
    parts = [c.cast(v, c.dtype) for v in tensors if not (v.rank == 1 and v.shape[0] == 0)]
    if len(parts) == 1:
        return c.emit("identity", parts)
    return c.emit("concat", parts, axis=dim % len(c.shape))


@lowering("hstack", "vstack", "dstack", "column_stack", "row_stack")
def named_stack(c: Call, tensors: Sequence[V]) -> V:
    """Concatenation along an axis of a name."""
    if any(v.rank < 2 for v in tensors) or c.name in ("dstack", "column_stack"):
        raise NotModelled("vectors or the third axis")
    return c.emit("concat", list(tensors), axis=1 if c.name == "hstack" else 0)


@lowering("stack")
def stack(c: Call, tensors: Sequence[V], dim: int = 0) -> V:
    """Side by side along a new axis."""
    return c.emit("stack", [c.cast(v, c.dtype) for v in tensors], axis=dim % len(c.shape))


@lowering(
    "chunk",
    "split",
    "split_with_sizes",
    "tensor_split",
    "unsafe_chunk",
    "unsafe_split",
    "hsplit",
    "vsplit",
)
def split(
    c: Call,
    input: V,
    split_size: Any = None,
    dim: int = 0,
    chunks: Any = None,
    split_size_or_sections: Any = None,
    split_sizes: Any = None,
    sections: Any = None,
    indices: Any = None,
    indices_or_sections: Any = None,
) -> Any:
    """Parts along an axis."""
    shapes = [tuple(part.shape) for part in c.out]
    axis = {"hsplit": 1, "vsplit": 0}.get(c.name, dim % input.rank)
    sizes = tuple(s[axis] for s in shapes)
    return tuple(
        c.emit_many("split", [input], [(s, input.dtype) for s in shapes], axis=axis, sizes=sizes)
    )


@lowering("unbind")
def unbind(c: Call, input: V, dim: int = 0) -> Any:
    """All indices of an axis."""
    axis = dim % input.rank
    shape = (*input.shape[:axis], *input.shape[axis + 1 :])
    return tuple(
        c.emit("select_index", [input], shape, axis=axis, index=i) for i in range(input.shape[axis])
    )


@lowering("iter")
def iterate(c: Call, input: V) -> Any:
    """What a loop over a tensor sees."""
    return unbind(c, input)


@lowering("select")
def select(c: Call, input: V, dim: int, index: Any) -> V:
    """One index of an axis."""
    if not isinstance(index, int):
        raise NotModelled("an index that depends on data")
    axis = dim % input.rank
    return c.emit("select_index", [input], axis=axis, index=index % input.shape[axis])


@inverse_of("select")
def _unselect(c: Call, base: V, value: V) -> V:
    rest = _call_arguments(c)
    axis = int(rest[0]) % base.rank
    start = int(rest[1]) % base.shape[axis]
    shape = (*base.shape[:axis], 1, *base.shape[axis + 1 :])
    return replaced(c, base, axis, start, start + 1, c.reshape(value, shape))


def replaced(c: Call, base: V, axis: int, start: int, end: int, value: V) -> V:
    """The base with a part of an axis exchanged."""
    size = base.shape[axis]
    if start == 0 and end == size:
        return value
    parts = []
    if start > 0:
        parts.append(c.slice(base, axis, 0, start))
    parts.append(value)
    if end < size:
        parts.append(c.slice(base, axis, end, size))
    return c.concat(parts, axis)


@lowering("narrow")
def narrow(c: Call, input: V, dim: int, start: Any, length: int) -> V:
    """A part of an axis."""
    if not isinstance(start, int):
        raise NotModelled("a start that depends on data")
    axis = dim % input.rank
    start = start % input.shape[axis] if start < 0 else start
    return c.emit(
        "slice", [input], axes=(axis,), starts=(start,), ends=(start + length,), steps=(1,)
    )


@inverse_of("narrow")
def _unnarrow(c: Call, base: V, value: V) -> V:
    dim, start, length = (int(a) for a in _call_arguments(c)[:3])
    axis = dim % base.rank
    start = start % base.shape[axis] if start < 0 else start
    return replaced(c, base, axis, start, start + length, value)


def bounds(size: int, start: Any, end: Any, step: Any) -> tuple[int, int, int]:
    """Python's reading of a slice."""
    if any(isinstance(v, V) for v in (start, end, step)):
        raise NotModelled("a slice that depends on data")
    if isinstance(end, int) and end > size:
        end = size
    return slice(start, end, step).indices(size)


@lowering("slice")
def slice_of(
    c: Call, input: V, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> V:
    """The dispatcher's slice of one axis."""
    axis = dim % input.rank
    first, last, by = bounds(input.shape[axis], start, end, step)
    return c.emit(
        "slice", [input], axes=(axis,), starts=(first,), ends=(max(last, first),), steps=(by,)
    )


@inverse_of("slice")
def _unslice(c: Call, base: V, value: V) -> V:
    rest = [*_call_arguments(c), None, None, None][:4]
    axis = int(rest[0] or 0) % base.rank
    first, last, by = bounds(base.shape[axis], rest[1], rest[2], rest[3] or 1)
    if by != 1:
        raise NotModelled("a write in steps")
    return replaced(c, base, axis, first, last, value)


@lowering("flip", "fliplr", "flipud")
def flip(c: Call, input: V, *dims: Any, dim: Any = None) -> V:
    """Axes backwards."""
    given: Any = dims[0] if dims and isinstance(dims[0], list | tuple) else dims
    if dim is not None:
        given = (dim,) if isinstance(dim, int) else dim
    if c.name != "flip":
        given = (1,) if c.name == "fliplr" else (0,)
    return c.emit("flip", [input], axes=tuple(sorted(int(d) % input.rank for d in given)))


@lowering("roll")
def roll(c: Call, input: V, shifts: Any, dim: Any = None) -> V:
    """Axes moved around their end."""
    if dim is None or dim == [] or dim == ():
        flat = c.reshape(input, (math.prod(input.shape),))
        moved = c.emit("roll", [flat], flat.shape, axes=(0,), shifts=(int(shifts),))
        return c.reshape(moved, c.shape)
    axes = [dim] if isinstance(dim, int) else list(dim)
    amounts = [shifts] if isinstance(shifts, int) else list(shifts)
    return c.emit(
        "roll",
        [input],
        axes=tuple(int(d) % input.rank for d in axes),
        shifts=tuple(int(s) for s in amounts),
    )


@lowering("rot90")
def rot90(c: Call, input: V, k: int = 1, dims: Sequence[int] = (0, 1)) -> V:
    """Quarter turns."""
    a, b = (d % input.rank for d in dims)
    order = list(range(input.rank))
    order[a], order[b] = b, a
    k %= 4
    if k == 0:
        return c.emit("identity", [input])
    if k == 2:
        return c.emit("flip", [input], axes=tuple(sorted((a, b))))
    if k == 1:
        flipped = c.emit("flip", [input], input.shape, axes=(b,))
        return c.emit("transpose", [flipped], permutation=tuple(order))
    turned = c.transpose(input, order)
    return c.emit("flip", [turned], axes=(b,))


@lowering("unfold")
def windows(c: Call, input: V, dimension: int, size: int, step: int) -> V:
    """Overlapping windows of an axis, as a new last axis."""
    return c.emit("windows", [input], axis=dimension % input.rank, size=size, step=step)


@lowering("as_strided")
def as_strided(c: Call, input: V, size: Any, stride: Any, storage_offset: int | None = None) -> V:
    """Elements at regular places of a contiguous tensor."""
    source = c.node.args[0].meta["val"]  # type: ignore[union-attr]
    if not source.is_contiguous() or source.storage_offset() or storage_offset:
        raise NotModelled("places in storage that is not the tensor's own, in order")
    size, stride = ([_integer(n) for n in given] for given in (size, stride))
    if math.prod(size) > 1 << 24:
        raise NotModelled("too many places")
    places = torch.zeros((), dtype=torch.int64)
    for count, step in zip(size, stride, strict=True):
        places = places[..., None] + torch.arange(count) * step
    flat = c.reshape(input, (math.prod(input.shape),))
    return c.emit("gather", [flat, c.array(places)], axis=0)


def _integer(value: Any) -> int:
    if isinstance(value, V):
        if value.elements is None:
            raise NotModelled("a size that depends on data")
        return int(value.elements)
    return int(value)


@lowering("tril", "triu")
def triangle(c: Call, input: V, diagonal: int = 0) -> V:
    """One triangle of the last two axes."""
    return c.emit("triangle", [input], upper=c.name == "triu", diagonal=diagonal)


@lowering("diagonal", "diag")
def diagonal(c: Call, input: V, offset: int = 0, dim1: int = 0, dim2: int = 1) -> V:
    """A diagonal as last axis."""
    if input.rank == 1:
        raise NotModelled("a matrix of its diagonal")
    return c.emit(
        "diagonal", [input], offset=offset, axis1=dim1 % input.rank, axis2=dim2 % input.rank
    )


@lowering("meshgrid")
def meshgrid(c: Call, *tensors: Any, indexing: str = "ij") -> Any:
    """Each coordinate over the whole grid."""
    given = tensors[0] if len(tensors) == 1 and isinstance(tensors[0], list | tuple) else tensors
    n = len(given)
    made = []
    for i, v in enumerate(given):
        place = {0: 1, 1: 0}.get(i, i) if indexing == "xy" and n > 1 else i
        shape = tuple(v.shape[0] if j == place else 1 for j in range(n)) if v.rank else (1,) * n
        made.append(c.expand(c.reshape(v, shape), c.shape))
    return tuple(made)
