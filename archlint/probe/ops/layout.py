"""What moves elements and changes none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from archlint.probe.ops.frame import Call, Outputs, computes


@computes("identity")
def identity(c: Call, x: Tensor) -> Tensor:
    """The same elements."""
    return x.detach() if c["stops_gradient"] else x


@computes("cast")
def cast(c: Call, x: Tensor) -> Tensor:
    """Another type: towards zero for integers, and true is what is not zero."""
    if c.dtype is None or x.dtype == c.dtype:
        return x
    if c.dtype == torch.bool:
        return x != 0
    return x.to(c.dtype)


def sizes_in(shape: Tensor) -> list[int]:
    """The sizes that a computed shape holds."""
    return [int(n) for n in shape.tolist()]


@computes("reshape")
def reshape(c: Call, x: Tensor, shape: Tensor | None = None) -> Tensor:
    """The elements in order; a computed 0 copies a size, −1 is what is left."""
    if shape is None:
        return x.reshape(c["shape"])
    sizes = sizes_in(shape)
    return x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(sizes)])


@computes("transpose")
def transpose(c: Call, x: Tensor) -> Tensor:
    """Axes in another order."""
    return x.permute(c["permutation"])


@computes("expand")
def expand(c: Call, x: Tensor, shape: Tensor | None = None) -> Tensor:
    """Broadcast to a shape, both ways."""
    sizes = c["shape"] if shape is None else sizes_in(shape)
    return x.expand(torch.broadcast_shapes(x.shape, tuple(sizes)))  # type: ignore[no-untyped-call]


@computes("tile")
def tile(c: Call, x: Tensor, repeats: Tensor | None = None) -> Tensor:
    """Copies side by side."""
    return x.repeat(*(c["repeats"] if repeats is None else sizes_in(repeats)))


@computes("concat")
def concat(c: Call, *parts: Tensor) -> Tensor:
    """One after another."""
    return torch.cat(parts, c["axis"])


@computes("stack")
def stack(c: Call, *parts: Tensor) -> Tensor:
    """Side by side along a new axis."""
    return torch.stack(parts, c["axis"])


@computes("split")
def split(c: Call, x: Tensor) -> Outputs:
    """Parts along an axis."""
    return tuple(torch.split(x, list(c["sizes"]), c["axis"]))


def cut(x: Tensor, axis: int, start: int, end: int, step: int) -> Tensor:
    """x[start:end:step] along an axis as numpy has it, with a negative step too."""
    size = x.shape[axis]
    if step > 0:
        index = [slice(None)] * axis + [slice(start, end, step)]
        return x[tuple(index)]
    places = range(size)[slice(start, None if end < 0 else end, step)]
    if len(places) == size:
        return x.flip(axis)
    return x.index_select(axis, torch.tensor(list(places), dtype=torch.int64, device=x.device))


@computes("slice")
def slices(c: Call, x: Tensor) -> Tensor:
    """A part of some axes; starts and ends are within the axis."""
    for axis, start, end, step in zip(c["axes"], c["starts"], c["ends"], c["steps"], strict=True):
        x = cut(x, axis, start, end, step)
    return x


@computes("dynamic_slice")
def dynamic_slice(
    c: Call,
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """A slice whose bounds are computed: negative ones count from the end, all are clamped."""
    first, last = sizes_in(starts), sizes_in(ends)
    along = list(range(len(first))) if axes is None else sizes_in(axes)
    by = [1] * len(first) if steps is None else sizes_in(steps)
    for axis, start, end, step in zip(along, first, last, by, strict=True):
        axis %= x.ndim
        size = x.shape[axis]
        stop = None if step < 0 and end < -size else end
        begin, until, _ = slice(start, stop, step).indices(size)
        x = cut(x, axis, begin, until, step)
    return x


@computes("select_index")
def select_index(c: Call, x: Tensor) -> Tensor:
    """One index of an axis."""
    return x.select(c["axis"], c["index"])


_OUTSIDE = {"edge": "replicate", "wrap": "circular"}


@computes("pad")
def pad(c: Call, x: Tensor, value: Tensor | None = None) -> Tensor:
    """More elements before and after; negative amounts cut."""
    n = x.ndim
    begins, ends = c["padding"][:n], c["padding"][n:]
    mode = _OUTSIDE.get(c["mode"], c["mode"])
    if mode == "constant":
        pairs = [p for i in reversed(range(n)) for p in (begins[i], ends[i])]
        y = F.pad(x, pairs)
        if value is None:
            return y
        ones = F.pad(torch.ones(x.shape, dtype=torch.bool, device=x.device), pairs)
        return torch.where(ones, y, value.reshape(()).to(x.dtype))
    for axis, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        if begin or end:
            x = x.index_select(axis, _mirrored(x.shape[axis], begin, end, mode).to(x.device))
    return x


def _mirrored(size: int, begin: int, end: int, mode: str) -> Tensor:
    """Which elements of an axis a padded one holds."""
    places = torch.arange(-begin, size + end)
    if mode == "replicate":
        return places.clamp(0, size - 1)
    if mode == "circular":
        return places % size
    period = max(2 * (size - 1), 1)
    places = places % period
    return torch.where(places < size, places, period - places)


@computes("flip")
def flip(c: Call, x: Tensor) -> Tensor:
    """Axes backwards."""
    return x.flip(tuple(c["axes"]))


@computes("reverse_sequence")
def reverse_sequence(c: Call, x: Tensor, lengths: Tensor) -> Tensor:
    """The first ``lengths`` steps of each sample backwards, the rest as it is."""
    time, batch = c["time_axis"], c["batch_axis"]
    steps = torch.arange(x.shape[time], device=x.device)
    turned = lengths.reshape(-1, 1) - 1 - steps
    places = torch.where(turned >= 0, turned, steps)  # [sample, step]
    if time < batch:
        places = places.T
    sizes = [n if i in (time, batch) else 1 for i, n in enumerate(x.shape)]
    return torch.gather(x, time, places.reshape(sizes).expand(x.shape))


@computes("roll")
def roll(c: Call, x: Tensor) -> Tensor:
    """Axes turned round."""
    return torch.roll(x, tuple(c["shifts"]), tuple(c["axes"]))


def _blocks(sizes: Sequence[int], block: int) -> list[int]:
    return [n for size in sizes for n in (size // block, block)]


@computes("depth_to_space")
def depth_to_space(c: Call, x: Tensor) -> Tensor:
    """Channels into space; DCR: the block is the slower part of the channel, CRD: the faster."""
    samples, channels, *sizes = x.shape
    block, n = c["block"], len(sizes)
    inner = channels // block**n
    if c["mode"] == "DCR":
        y = x.reshape(samples, *(block,) * n, inner, *sizes)
        order = [n + 1, *(k for i in range(n) for k in (n + 2 + i, 1 + i))]
    else:
        y = x.reshape(samples, inner, *(block,) * n, *sizes)
        order = [1, *(k for i in range(n) for k in (n + 2 + i, 2 + i))]
    return y.permute(0, *order).reshape(samples, inner, *(size * block for size in sizes))


@computes("space_to_depth")
def space_to_depth(c: Call, x: Tensor) -> Tensor:
    """Space into channels, the inverse of ``depth_to_space`` in the same mode."""
    samples, channels, *sizes = x.shape
    block, n = c["block"], len(sizes)
    y = x.reshape(samples, channels, *_blocks(sizes, block))
    space, inside = [2 + 2 * i for i in range(n)], [3 + 2 * i for i in range(n)]
    order = [*inside, 1, *space] if c["mode"] == "DCR" else [1, *inside, *space]
    return y.permute(0, *order).reshape(
        samples, channels * block**n, *(size // block for size in sizes)
    )


@computes("channel_shuffle")
def channel_shuffle(c: Call, x: Tensor) -> Tensor:
    """Channels of the groups interleaved."""
    samples, channels, *sizes = x.shape
    y = x.reshape(samples, c["groups"], channels // c["groups"], *sizes)
    return y.transpose(1, 2).reshape(x.shape)


@computes("windows")
def windows(c: Call, x: Tensor) -> Tensor:
    """Overlapping slices along an axis as a new last axis."""
    return x.unfold(c["axis"], c["size"], c["step"])


@computes("triangle")
def triangle(c: Call, x: Tensor) -> Tensor:
    """The upper or lower triangle, zero elsewhere."""
    return torch.triu(x, c["diagonal"]) if c["upper"] else torch.tril(x, c["diagonal"])


@computes("diagonal")
def diagonal(c: Call, x: Tensor) -> Tensor:
    """A diagonal as last axis."""
    return torch.diagonal(x, c["offset"], c["axis1"], c["axis2"])


@computes("shape")
def shape(c: Call, x: Tensor) -> Tensor:
    """The sizes of x."""
    return torch.tensor(x.shape, dtype=torch.int64, device=x.device)


@computes("size")
def size(c: Call, x: Tensor) -> Tensor:
    """The number of elements."""
    return torch.tensor(math.prod(x.shape), dtype=torch.int64, device=x.device)


@computes("full")
def full(c: Call, shape: Tensor | None = None, value: Tensor | None = None) -> Tensor:
    """One number everywhere."""
    sizes = c["shape"] if shape is None else sizes_in(shape)
    if value is not None:
        return value.reshape(()).expand(tuple(sizes))
    dtype = c.dtype or torch.float64
    return torch.full(tuple(sizes), c["value"], device=c.device).to(dtype)


@computes("range")
def arange(c: Call, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    """Evenly spaced numbers."""
    return torch.arange(start.item(), limit.item(), step.item(), dtype=c.dtype, device=c.device)
