"""Kernels that an installation may lack: torchvision without its C++ part, shape functions.

Detectors call ``torchvision.ops.nms``, which refuses to run where the compiled operators are
missing, and ``roi_align``, which then takes tens of gigabytes. Recording a model should not need
them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of boxes [n, 4] kept, best score first, none overlapping a better one by more.

    Overlap is the area of the intersection over that of the union.
    """
    if has_torch_function((boxes, scores)):
        found: Tensor = handle_torch_function(nms, (boxes, scores), boxes, scores, iou_threshold)
        return found
    left = scores.argsort(descending=True)
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept: list[Tensor] = []
    while left.numel():
        best, left = left[0], left[1:]
        kept.append(best)
        first = torch.maximum(boxes[left, :2], boxes[best, :2])
        last = torch.minimum(boxes[left, 2:], boxes[best, 2:])
        shared = (last - first).clamp(min=0).prod(-1)
        left = left[shared <= iou_threshold * (areas[left] + areas[best] - shared)]
    return torch.stack(kept) if kept else left


def roi_align(
    input: Tensor,
    boxes: Any,
    output_size: Any,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Averages over regions [k, channels, rows, columns] of maps [n, channels, height, width].

    ``boxes`` are [k, 5], the sample first, or a list of [k, 4] for each sample. Every bin averages
    bilinear interpolations on a grid, which is a product of what is done along the height and along
    the width; what lies more than a point outside counts as zero.
    """
    listed = (input, *boxes) if isinstance(boxes, list | tuple) else (input, boxes)
    if has_torch_function(listed):
        found: Tensor = handle_torch_function(
            roi_align, listed, input, boxes, output_size, spatial_scale, sampling_ratio, aligned
        )
        return found
    whole: Any = sys.modules["torchvision.ops.roi_align"]
    regions = boxes if isinstance(boxes, Tensor) else whole.convert_boxes_to_roi_format(boxes)
    rows, columns = (output_size, output_size) if isinstance(output_size, int) else output_size
    shift = 0.5 if aligned else 0.0
    left, top, right, bottom = (regions[:, 1:] * spatial_scale - shift).unbind(1)
    least = 0.0 if aligned else 1.0
    down = _weights(top, bottom, rows, input.shape[2], sampling_ratio, least).to(input.dtype)
    across = _weights(left, right, columns, input.shape[3], sampling_ratio, least).to(input.dtype)
    pooled = []
    for k in range(len(regions)):
        high, wide = _counted(down[k]), _counted(across[k])
        part = input[int(regions[k, 0]), :, high, wide]
        pooled.append(torch.einsum("yh,chw,xw->cyx", down[k][:, high], part, across[k][:, wide]))
    return torch.stack(pooled) if pooled else input.new_empty(0, input.shape[1], rows, columns)


def _counted(weights: Tensor) -> slice:
    """The places that count in any bin."""
    places = weights.any(0).nonzero().flatten().tolist()
    return slice(places[0], places[-1] + 1) if places else slice(0, 1)


def _weights(
    first: Tensor, last: Tensor, bins: int, size: int, sampled: int, least: float
) -> Tensor:
    """What every place [size] counts in the average of every bin, [regions, bins, size].

    ``sampled`` is the number of samples in a bin; 0 and less for one a point."""
    if not len(first):
        return first.new_zeros(0, bins, size)
    length = (last - first).clamp(min=least)
    samples = (length / bins).ceil() if sampled <= 0 else torch.full_like(length, sampled)
    index = torch.arange(max(int(samples.max()), 1))
    step = length / bins / samples.clamp(min=1)
    start = first[:, None] + torch.arange(bins) * (length / bins)[:, None]
    at = start[:, :, None] + (index + 0.5) * step[:, None, None]  # [regions, bins, samples]
    counts = (at >= -1) & (at <= size) & (index < samples[:, None, None])
    at = at.clamp(0, size - 1)
    low = at.floor().long()
    part = at - low
    share = counts / samples.clamp(min=1)[:, None, None]
    found = torch.zeros(*at.shape[:2], size, dtype=at.dtype)
    found.scatter_add_(2, low, share * (1 - part))
    return found.scatter_add_(2, (low + 1).clamp(max=size - 1), share * part)


def grouped_mm_shape(input: Tensor, mat2: Tensor, offs: Tensor | None = None, **_: Any) -> Tensor:
    """What ``torch._grouped_mm`` gives, on meta: torch's own shape function wants bfloat16.

    [rows, k]·[groups, k, n] gives [rows, n]; [k, …]·[…, n] with both ragged gives [groups, k, n].
    """
    shape: tuple[int, ...] = (*input.shape[:-1], mat2.shape[-1])
    if input.dim() == mat2.dim() == 2 and offs is not None:
        shape = (offs.shape[0], *shape)
    return input.new_empty(shape)


# Shape functions to use on meta instead of torch's own, by the name of the function.
SHAPES = {"_grouped_mm": grouped_mm_shape}


@contextlib.contextmanager
def spare_kernels() -> Iterator[None]:
    """Stand in for torchvision's operators where torchvision is loaded without them."""
    boxes: Any = sys.modules.get("torchvision.ops.boxes")
    extension: Any = sys.modules.get("torchvision.extension")
    if boxes is None or extension is None or extension._has_ops():
        yield
        return
    with contextlib.ExitStack() as stack:
        users = ("torchvision.ops.poolers", "torchvision.models.detection.roi_heads")
        replaced: list[tuple[Any, str, Any]] = [(boxes, "nms", nms)]
        replaced += [(sys.modules[u], "roi_align", roi_align) for u in users if u in sys.modules]
        for owner, name, stand_in in replaced:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, stand_in)
        yield
