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


# Numbers that roi_align holds at a time: torchvision's own stand-in takes all regions at once.
_AT_ONCE = 2**24


def roi_align(
    input: Tensor,
    boxes: Any,
    output_size: Any,
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Averages over regions [k, channels, rows, columns] of maps [n, channels, height, width].

    ``boxes`` are [k, 5], the sample first, or a list of [k, 4] for each sample. As torchvision
    computes it where its compiled operator is missing, some regions at a time.
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
    samples = sampling_ratio**2 if sampling_ratio > 0 else input.shape[-1] * input.shape[-2]
    each = max(input.shape[1] * rows * columns * samples, 1)
    parts = [
        whole._roi_align(input, part, spatial_scale, rows, columns, sampling_ratio, aligned)
        for part in regions.split(max(_AT_ONCE // each, 1))
    ]
    return torch.cat(parts) if parts else input.new_empty(0, input.shape[1], rows, columns)


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
    poolers: Any = sys.modules.get("torchvision.ops.poolers")
    extension: Any = sys.modules.get("torchvision.extension")
    if boxes is None or poolers is None or extension is None or extension._has_ops():
        yield
        return
    before = boxes.nms, poolers.roi_align
    boxes.nms, poolers.roi_align = nms, roi_align
    try:
        yield
    finally:
        boxes.nms, poolers.roi_align = before
