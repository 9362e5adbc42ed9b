"""Pools by means and resizing as maps over positions, a product over axes (signal.neighbours)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np

from archlint.signal.interpolation import weights
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.neighbours import Axis, Mixing, sizes_of
from archlint.signal.transfer import Step

_LONGEST = 2048  # places along an axis up to which the weights of each are looked at


def chain(step: Step, mixing: Mixing) -> tuple[Signal, Mixing]:
    """A map over the positions of a node's input as one of what that was made of by such maps: from
    place to place what these leave is not the same, which the one map knows."""
    value = step.value(0)
    for _ in range(_MOST_MAPS):
        node = step.graph.producer.get(value or "")
        make = MAPS.get(node.op) if node is not None else None
        if node is None or make is None:
            break
        first = make(replace(step, node=node))
        whole = None if first is None else mixing.after(first)
        if whole is None:
            break
        value, mixing = node.inputs[0], whole
    return step.signals.get(value or "", UNKNOWN_SIGNAL), mixing


_MOST_MAPS = 8


@lru_cache(maxsize=512)
def _windows(
    size: int, length: int, kernel: int, stride: int, begin: int, end: int, count_padding: bool
) -> Axis:
    """The means of windows along one axis."""
    where = np.arange(length)[:, None] * stride + np.arange(kernel) - begin
    inside = (where >= 0) & (where < size)
    counted = where < size + end if count_padding else inside
    share = inside / np.maximum(counted.sum(axis=1, keepdims=True), 1)
    found = np.zeros((length, size))
    np.add.at(found, (np.arange(length)[:, None], np.clip(where, 0, size - 1)), share)
    return Axis(found)


def averaging(step: Step) -> Mixing | None:
    """A pool by means as a map over positions, None where sizes are not known."""
    shape, out = step.shape(0), step.out_shape()
    if shape is None or out is None:
        return None
    axes = tuple(range(2, len(shape)))
    before, after = sizes_of(shape, axes), sizes_of(out, axes)
    if before is None or after is None or max(before, default=0) > _LONGEST:
        return None
    kernel, stride, padding = step.ints("kernel"), step.ints("stride"), step.ints("padding")
    counted, dims = bool(step.attribute("count_padding")), len(axes)
    maps = [_windows(n, m, kernel[a], stride[a], padding[a], padding[dims + a], counted)
            for a, (n, m) in enumerate(zip(before, after, strict=True))]  # fmt: skip
    divisor = step.attribute("divisor")
    if isinstance(divisor, int) and divisor and maps:
        maps[0] = Axis(maps[0].weights * (math.prod(kernel) / divisor))
    return Mixing(axes, tuple(maps))


@lru_cache(maxsize=512)
def _parts(size: int, length: int) -> Axis:
    """Output o averages the places from ⌊o·n/m⌋ up to ⌈(o+1)·n/m⌉."""
    o = np.arange(length)
    begin, end = o * size // length, -(-(o + 1) * size // length)
    place = np.arange(size)
    inside = (place >= begin[:, None]) & (place < end[:, None])
    return Axis(inside / inside.sum(axis=1, keepdims=True))


def adaptive_averaging(step: Step) -> Mixing | None:
    """The same of one that is told the size of its output."""
    shape, after = step.shape(0), step.ints("size")
    if shape is None:
        return None
    axes = tuple(range(len(shape) - len(after), len(shape)))
    before = sizes_of(shape, axes)
    if before is None or max(before, default=0) > _LONGEST:
        return None
    return Mixing(axes, tuple(map(_parts, before, after)))


@lru_cache(maxsize=512)
def _resampled(before: int, after: int, mode: str, coordinates: str, cubic: float,
               antialias: bool) -> Axis | None:  # fmt: skip
    found = weights(before, after, mode, coordinates, cubic, antialias)
    return None if found is None else Axis(found)


def resampling(step: Step) -> Mixing | None:
    """A resizing as a map over positions, None where sizes or the mode are not known."""
    shape, out = step.shape(0), step.out_shape()
    mode = str(step.attribute("mode"))
    mode = {"bilinear": "linear", "trilinear": "linear", "bicubic": "cubic",
            "nearest-exact": "nearest"}.get(mode, mode)  # fmt: skip
    if shape is None or out is None:
        return None
    axes = tuple(range(2, len(shape)))
    before, after = sizes_of(shape, axes), sizes_of(out, axes)
    if before is None or after is None or max(*before, *after, 0) > _LONGEST:
        return None
    coordinates = str(step.attribute("coordinates"))
    if step.attribute("align_corners"):
        coordinates = "align_corners"
    found = [_resampled(n, m, mode, coordinates, step.number("cubic"),
                        bool(step.attribute("antialias")))
             for n, m in zip(before, after, strict=True)]  # fmt: skip
    maps = tuple(m for m in found if m is not None)
    return Mixing(axes, maps) if len(maps) == len(found) else None


MAPS: dict[str, Callable[[Step], Mixing | None]] = {
    "avg_pool": averaging, "adaptive_avg_pool": adaptive_averaging, "resize": resampling
}  # fmt: skip
