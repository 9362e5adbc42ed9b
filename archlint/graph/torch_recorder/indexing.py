"""Lowerings of ``x[…]``, ``x[…] = y``, gathers and scatters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from archlint.graph.torch_recorder.layout import bounds, inverse_of, replaced
from archlint.graph.torch_recorder.lowering import (
    Call,
    NotModelled,
    V,
    broadcast_shape,
    lowering,
)


def _entries(c: Call, index: Any, rank: int) -> list[Any]:
    """An index as one entry an axis, ``None`` for new axes; lists become constants."""
    given = list(index) if isinstance(index, tuple) else [index]
    given = [_listed(c, e) for e in given]
    used = 0
    for e in given:
        if e is None or e is Ellipsis:
            continue
        used += e.rank if isinstance(e, V) and e.dtype == "bool" else 1
    if Ellipsis not in [e for e in given if not isinstance(e, V)]:
        given.append(Ellipsis)
    place = next(i for i, e in enumerate(given) if e is Ellipsis)
    fill = [slice(None)] * (rank - used)
    return [*given[:place], *fill, *given[place + 1 :]]


def _listed(c: Call, entry: Any) -> Any:
    if isinstance(entry, list | tuple | range):
        if any(isinstance(e, V) for e in entry):
            raise NotModelled("an index list of tensors")
        return c.array(list(entry))
    if isinstance(entry, V) and entry.rank == 0 and entry.elements is not None:
        return int(entry.elements) if entry.dtype != "bool" else bool(entry.elements)
    return entry


@lowering("getitem")
def getitem(c: Call, input: V, index: Any) -> V:
    """``x[index]``."""
    entries = _entries(c, index, input.rank)
    x, axis = input, 0
    tensors: list[tuple[int, V]] = []
    for entry in entries:  # integers and slices first, they leave the rest as it is
        if entry is None:
            shape = (*x.shape[:axis], 1, *x.shape[axis:])
            x = c.reshape(x, shape)
            axis += 1
        elif isinstance(entry, bool):
            raise NotModelled("a single truth value as an index")
        elif isinstance(entry, int):
            shape = (*x.shape[:axis], *x.shape[axis + 1 :])
            if tensors:  # torch broadcasts an integer with index tensors: the axes move
                raise NotModelled("an integer after an index tensor")
            x = c.emit("select_index", [x], shape, axis=axis, index=entry % x.shape[axis])
        elif isinstance(entry, slice):
            first, last, by = bounds(x.shape[axis], entry.start, entry.stop, entry.step)
            x = c.slice(x, axis, first, max(last, first), by)
            axis += 1
        elif isinstance(entry, V):
            tensors.append((axis, entry))
            axis += entry.rank if entry.dtype == "bool" else 1
        else:
            raise NotModelled("this index")
    if tensors:
        return _gathered(c, x, tensors)
    if x is input:
        return c.emit("identity", [x])
    return x


def _gathered(c: Call, x: V, tensors: Sequence[tuple[int, V]]) -> V:
    if len(tensors) == 1:
        axis, index = tensors[0]
        if index.dtype == "bool":
            return _masked(c, x, index, axis)
        return c.emit("gather", [x, index], axis=axis)
    axes = [axis for axis, _ in tensors]
    if any(i.dtype == "bool" for _, i in tensors):
        raise NotModelled("masks among index tensors")
    adjacent = axes == list(range(axes[0], axes[0] + len(axes)))
    lead = tuple(broadcast_shape(*(i.shape for _, i in tensors)))
    parts = []
    for _, index in tensors:
        wide = c.expand(c.cast(index, "int64"), lead)
        parts.append(wide)
    stacked = c.emit("stack", parts, (*lead, len(parts)), "int64", axis=len(lead))
    rest = [a for a in range(x.rank) if a not in axes]
    turned = c.transpose(x, [*axes, *rest])
    shape = (*lead, *(x.shape[a] for a in rest))
    made = c.emit("gather_nd", [turned, stacked], shape, x.dtype)
    if not adjacent or axes[0] == 0:
        return made
    before = axes[0]  # the axes before the indices stay before them
    order = [
        *range(len(lead), len(lead) + before),
        *range(len(lead)),
        *range(len(lead) + before, len(shape)),
    ]
    return c.transpose(made, order)


def _masked(c: Call, x: V, mask: V, axis: int) -> V:
    count = math.prod(mask.shape)
    shape = (*x.shape[:axis], count, *x.shape[axis + mask.rank :])
    flat = c.reshape(x, shape)
    return c.emit("compress", [flat, c.reshape(mask, (count,))], axis=axis)


@inverse_of("getitem")
def _put_item(c: Call, base: V, value: V) -> V:
    index = c.node.args[1]
    if isinstance(index, torch.fx.Node) or (
        isinstance(index, tuple) and any(isinstance(i, torch.fx.Node) for i in index)
    ):
        return base  # an index tensor copies: what is written there is not seen here
    return assigned(c, base, index, value)


@lowering("setitem")
def setitem(c: Call, input: V, index: Any, value: Any) -> V:
    """``x[index] = value`` as the new x."""
    return assigned(c, input, index, c.value(value, input))


def assigned(c: Call, x: V, index: Any, value: V) -> V:
    """x with the elements at an index exchanged."""
    entries = _entries(c, index, x.rank)
    value = c.cast(value, x.dtype)
    tensors = [e for e in entries if isinstance(e, V)]
    if tensors:
        return _put_at(c, x, entries, value)
    kept = [e for e in entries if e is not None]
    shape: list[int] = []  # of what is written, before new axes
    places: list[tuple[int, int]] = []
    for axis, entry in enumerate(kept):
        if isinstance(entry, slice):
            first, last, by = bounds(x.shape[axis], entry.start, entry.stop, entry.step)
            if by != 1:
                return _put_steps(c, x, kept, value)
            places.append((first, max(last, first)))
            shape.append(max(last - first, 0))
        elif isinstance(entry, int) and not isinstance(entry, bool):
            first = entry % x.shape[axis]
            places.append((first, first + 1))
        else:
            raise NotModelled("this index")
    wanted = tuple(e - s for s, e in places)
    if value.rank > len(shape):  # leading ones are allowed
        value = c.reshape(value, value.shape[value.rank - len(shape) :])
    value = c.reshape(c.expand(value, tuple(shape)), wanted)
    return _placed(c, x, value, places, 0)


def _placed(c: Call, x: V, value: V, places: Sequence[tuple[int, int]], axis: int) -> V:
    """Exchange a box, one axis after the other."""
    while axis < len(places) and places[axis] == (0, x.shape[axis]):
        axis += 1
    if axis == len(places):
        return value
    start, end = places[axis]
    inner = _placed(c, c.slice(x, axis, start, end), value, places, axis + 1)
    return replaced(c, x, axis, start, end, inner)


def _put_steps(c: Call, x: V, entries: Sequence[Any], value: V) -> V:
    indices = []
    for axis, entry in enumerate(entries):
        if isinstance(entry, int):
            numbers, count = torch.tensor([entry % x.shape[axis]]), 1
        else:
            numbers = torch.arange(x.shape[axis])[entry]
            count = len(numbers)
        lead = [1] * len(entries)
        lead[axis] = count
        indices.append(c.array(numbers.reshape(lead)))
    wanted = tuple(
        1 if isinstance(e, int) else len(range(*e.indices(x.shape[a])))
        for a, e in enumerate(entries)
    )
    shape = tuple(n for n, e in zip(wanted, entries, strict=True) if not isinstance(e, int))
    value = c.reshape(c.expand(value, shape), wanted)
    return c.emit("index_put", [x, value, *indices], x.shape, x.dtype)


def _put_at(c: Call, x: V, entries: Sequence[Any], value: V) -> V:
    entries = [e for e in entries if e is not None]
    only = [e for e in entries if isinstance(e, V)]
    if len(only) == 1 and only[0].dtype == "bool":
        mask = only[0]
        place = next(i for i, e in enumerate(entries) if isinstance(e, V))
        full = all(e == slice(None) for e in entries if not isinstance(e, V))
        if full and math.prod(value.shape) == 1:
            after = x.rank - place - mask.rank
            wide = c.reshape(mask, (*mask.shape, *[1] * after))
            return c.emit("masked_fill", [x, wide, c.reshape(value, ())], x.shape, x.dtype)
    lead = [i for i, e in enumerate(entries) if isinstance(e, V)]
    rest = entries[len(lead) :]
    if lead != list(range(len(lead))) or any(e != slice(None) for e in rest):
        raise NotModelled("index tensors among slices")
    return c.emit("index_put", [x, value, *only], x.shape, x.dtype)


@lowering("index_put", "_index_put_impl")
def index_put(
    c: Call, input: V, indices: Sequence[V | None], values: V, accumulate: bool = False, *_: Any
) -> V:
    """The dispatcher's assignment."""
    if any(i is None for i in indices):
        raise NotModelled("index tensors among slices")
    return c.emit("index_put", [input, values, *indices], accumulate=accumulate)


@lowering("index")
def index(c: Call, input: V, indices: Sequence[V | None]) -> V:
    """The dispatcher's indexing: None for an axis taken whole."""
    entries = tuple(slice(None) if i is None else i for i in indices)
    return getitem(c, input, entries)  # type: ignore[no-any-return]


@lowering("index_select")
def index_select(c: Call, input: V, dim: int, index: V) -> V:
    """Some indices of an axis."""
    return c.emit("gather", [input, index], axis=dim % input.rank)


@lowering("gather", "take_along_dim")
def gather(
    c: Call,
    input: V,
    dim: Any = None,
    index: Any = None,
    indices: Any = None,
    sparse_grad: bool = False,
) -> V:
    """One element an index."""
    if c.name == "take_along_dim":
        index, dim = (dim, index) if isinstance(dim, V) else (indices, dim)
        if not isinstance(dim, int):
            raise NotModelled("flat indices")
    axis = dim % input.rank
    if c.name == "take_along_dim":
        lead = tuple(c.shape)
        index = c.expand(index, lead)
        input = c.expand(
            input, tuple(n if i == axis else lead[i] for i, n in enumerate(input.shape))
        )
    return c.emit("gather_elements", [input, index], axis=axis)


@lowering("scatter", "scatter_add", "scatter_reduce")
def scatter(
    c: Call,
    input: V,
    dim: int,
    index: V,
    src: Any = None,
    reduce: str | None = None,
    value: Any = None,
    include_self: bool = True,
) -> V:
    """Elements put (or added) where an index says."""
    source = src if src is not None else value
    updates = c.value(source, input)
    if updates.rank == 0:
        updates = c.expand(updates, index.shape)
    elif updates.shape != index.shape:
        for axis, n in enumerate(index.shape):
            updates = c.slice(updates, axis, 0, n)
    names = {
        "sum": "add",
        "prod": "mul",
        "amax": "max",
        "amin": "min",
        "add": "add",
        "multiply": "mul",
        None: "none",
    }
    reduction = "add" if c.name == "scatter_add" else names.get(reduce, "")
    if not reduction or not include_self:
        raise NotModelled("this reduction")
    return c.emit(
        "scatter_elements",
        [input, index, updates],
        input.shape,
        axis=dim % input.rank,
        reduction=reduction,
    )


@lowering("index_add", "index_copy", "index_fill")
def index_add(c: Call, input: V, dim: int, index: V, source: Any, alpha: float = 1) -> V:
    """Slices added (or put) where an index says."""
    axis = dim % input.rank
    shape = tuple(index.shape[0] if i == axis else n for i, n in enumerate(input.shape))
    updates = c.expand(c.value(source, input), shape)
    if alpha != 1:
        updates = c.emit("mul", [updates, c.number(alpha)], shape)
    lead = tuple(index.shape[0] if i == axis else 1 for i in range(input.rank))
    if index.elements is not None:
        places = c.array(index.elements.reshape(lead).expand(shape))
    else:
        places = c.expand(c.reshape(index, lead), shape)
    return c.emit(
        "scatter_elements",
        [input, places, updates],
        axis=axis,
        reduction="add" if c.name == "index_add" else "none",
    )


@lowering("masked_select")
def masked_select(c: Call, input: V, mask: V) -> V:
    """The elements where a mask is true."""
    shape = tuple(broadcast_shape(input.shape, mask.shape))
    return _masked(c, c.expand(input, shape), c.expand(mask, shape), 0)


@lowering("one_hot")
def one_hot(c: Call, input: V, num_classes: int = -1) -> V:
    """A one at the index."""
    return c.emit("one_hot", [input], depth=c.shape[-1], axis=len(c.shape) - 1, on=1.0, off=0.0)
