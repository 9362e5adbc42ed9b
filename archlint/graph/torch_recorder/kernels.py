"""Kernels that an installation may lack: torchvision without its C++ part, shape functions.

Detectors call ``torchvision.ops.nms``, which refuses to run where the compiled operators are
missing. Recording a model should not need them.
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
    original = boxes.nms
    boxes.nms = nms
    try:
        yield
    finally:
        boxes.nms = original
