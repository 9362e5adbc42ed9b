"""Gathers and scatters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from archlint.probe.ops.frame import Call, computes


def wrapped(indices: Tensor, size: int) -> Tensor:
    """Indices with the negative ones counted from the end."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


@computes("gather")
def gather(c: Call, x: Tensor, indices: Tensor) -> Tensor:
    """Some indices of an axis, in the shape of the indices."""
    axis = c["axis"]
    index = wrapped(indices, x.shape[axis])
    y = x.index_select(axis, index.reshape(-1))
    return y.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@computes("gather_elements")
def gather_elements(c: Call, x: Tensor, indices: Tensor) -> Tensor:
    """One element an index; torch lets the indices be smaller along other axes."""
    return torch.gather(x, c["axis"], wrapped(indices, x.shape[c["axis"]]))


def _places(x: Tensor, indices: Tensor, axes: int) -> Tensor:
    """Places in the first axes of x flattened, of index tuples along the last axis."""
    place = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=x.device)
    for i in range(axes):
        place = place * x.shape[i] + wrapped(indices[..., i], x.shape[i])
    return place


@computes("gather_nd")
def gather_nd(c: Call, x: Tensor, indices: Tensor) -> Tensor:
    """Slices at index tuples; the first ``batch_axes`` axes go together."""
    batch = c["batch_axes"]
    count = indices.shape[-1]
    if batch:
        lead = x.shape[:batch]
        rows = torch.arange(math.prod(lead), device=x.device).reshape(
            *lead, *(1,) * (indices.ndim - batch)
        )
        rows = rows.expand(*indices.shape[:-1], 1)
        x = x.reshape(-1, *x.shape[batch:])
        indices, count = torch.cat([rows, indices.to(torch.int64)], -1), count + 1
    place = _places(x, indices, count)
    flat = x.reshape(-1, *x.shape[count:])
    y = flat.index_select(0, place.reshape(-1))
    return y.reshape(*place.shape, *x.shape[count:])


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _scattered(x: Tensor, axis: int, place: Tensor, updates: Tensor, reduction: str) -> Tensor:
    updates = updates.to(x.dtype)
    if reduction == "none":
        return x.scatter(axis, place, updates)
    if reduction == "add":
        return x.scatter_add(axis, place, updates)
    return x.scatter_reduce(axis, place, updates, _REDUCTIONS[reduction])


@computes("scatter_elements")
def scatter_elements(c: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Elements put, or added, where an index says."""
    place = wrapped(indices, x.shape[c["axis"]])
    return _scattered(x, c["axis"], place, updates, c["reduction"])


@computes("scatter_nd")
def scatter_nd(c: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Slices put, or added, at index tuples."""
    count = indices.shape[-1]
    inner = math.prod(x.shape[count:])
    place = _places(x, indices, count).reshape(-1, 1)
    every = place * inner + torch.arange(inner, device=x.device)
    flat = _scattered(x.reshape(-1), 0, every.reshape(-1), updates.reshape(-1), c["reduction"])
    return flat.reshape(x.shape)


@computes("index_put")
def index_put(c: Call, x: Tensor, value: Tensor, *indices: Tensor) -> Tensor:
    """A value at index tensors (or a mask) of the first axes."""
    if any(index.dtype == torch.bool for index in indices):
        return x.index_put(indices, value.to(x.dtype), c["accumulate"])
    every = torch.broadcast_tensors(*indices)  # type: ignore[no-untyped-call]
    places = torch.stack([i.to(torch.int64) for i in every], -1)
    count = len(every)
    shape = (*places.shape[:-1], *x.shape[count:])
    inner = math.prod(x.shape[count:])
    place = _places(x, places, count).reshape(-1, 1)
    flat = place * inner + torch.arange(inner, device=x.device)
    updates = value.expand(shape).reshape(-1)
    reduction = "add" if c["accumulate"] else "none"
    return _scattered(x.reshape(-1), 0, flat.reshape(-1), updates, reduction).reshape(x.shape)


@computes("compress")
def compress(c: Call, x: Tensor, condition: Tensor) -> Tensor:
    """The indices of an axis (of x flattened) where a condition holds."""
    axis = 0 if c["axis"] is None else c["axis"]
    flat = x.reshape(-1) if c["axis"] is None else x
    return flat.index_select(axis, condition.reshape(-1).nonzero().reshape(-1))


@computes("nonzero")
def nonzero(c: Call, x: Tensor) -> Tensor:
    """The places of what is not zero: [axes, count]."""
    return x.nonzero().T if x.ndim else x.reshape(1).nonzero().T[:0]


@computes("one_hot")
def one_hot(c: Call, indices: Tensor) -> Tensor:
    """``on`` at the index along a new axis, ``off`` elsewhere; beyond the depth nothing is on."""
    depth, axis = c["depth"], c["axis"] % (indices.ndim + 1)
    sizes = [1] * (indices.ndim + 1)
    sizes[axis] = depth
    places = torch.arange(depth, device=indices.device).reshape(sizes)
    hot = wrapped(indices, depth).unsqueeze(axis) == places
    dtype = c.dtype or torch.float64
    on, off = (torch.tensor(c[k], device=indices.device).to(dtype) for k in ("on", "off"))
    return torch.where(hot, on, off)


@computes("nms")
def nms(
    c: Call,
    boxes: Tensor,
    scores: Tensor,
    most: Tensor | None = None,
    overlap: Tensor | None = None,
    least: Tensor | None = None,
) -> Tensor:
    """[count, 3] of (sample, class, box) kept: best score first, none that overlaps a better one of
    its class by more than ``overlap`` (area of the intersection over that of the union)."""
    count = 0 if most is None else int(most)
    limit = 0.0 if overlap is None else float(overlap)
    corners = boxes
    if c["center"]:
        half = boxes[..., 2:] / 2
        corners = torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)
    low = torch.minimum(corners[..., :2], corners[..., 2:])
    high = torch.maximum(corners[..., :2], corners[..., 2:])
    area = (high - low).prod(-1)
    kept: list[tuple[int, int, int]] = []
    for sample in range(scores.shape[0]):
        for kind in range(scores.shape[1]):
            score = scores[sample, kind]
            order = score.argsort(descending=True, stable=True)
            if least is not None:
                order = order[score[order] > least.reshape(())]
            chosen: list[int] = []
            for box in order.tolist():
                if len(chosen) >= count:
                    break
                first = torch.maximum(low[sample, chosen], low[sample, box])
                last = torch.minimum(high[sample, chosen], high[sample, box])
                shared = (last - first).clamp(min=0).prod(-1)
                union = area[sample, chosen] + area[sample, box] - shared
                if not bool((shared > limit * union).any()):
                    chosen.append(box)
                    kept.append((sample, kind, box))
    return torch.tensor(kept, dtype=torch.int64, device=scores.device).reshape(-1, 3)
