"""What stands in for operators that an installation lacks computes what they compute."""

from __future__ import annotations

import sys

import pytest
import torch

from archlint.graph.torch_recorder.kernels import nms, roi_align, spare_kernels

BOXES = torch.tensor(
    [[0, 1.0, 2, 14, 9], [1, 3, 2, 4, 25], [1, 5, 5, 5, 5], [0, 28, 10, 41, 27]],
    dtype=torch.float64,
)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("sampling", [-1, 2])
def test_pooling_over_regions(aligned: bool, sampling: int) -> None:
    pytest.importorskip("torchvision.ops")
    reference = sys.modules["torchvision.ops.roi_align"]._roi_align
    maps = torch.randn(2, 3, 20, 30, dtype=torch.float64)
    found = roi_align(maps, BOXES, (4, 3), 0.7, sampling, aligned)
    expected = reference(maps, BOXES, 0.7, 4, 3, sampling, aligned)
    torch.testing.assert_close(found, expected)
    listed = [BOXES[BOXES[:, 0] == i][:, 1:] for i in range(2)]
    order = torch.cat([(BOXES[:, 0] == i).nonzero().flatten() for i in range(2)])
    torch.testing.assert_close(roi_align(maps, listed, (4, 3), 0.7, sampling, aligned),
                               expected[order])  # fmt: skip


def test_what_lies_outside_counts_as_zero() -> None:
    maps = torch.ones(1, 1, 8, 8)
    found = roi_align(maps, torch.tensor([[0, -9.0, 0, 7, 7]]), 2, 1.0, 2)
    assert (found[0, 0, :, 0] < 0.6).all()  # of what starts nine points to the left
    assert (found[0, 0, :, 1] == 1).all()
    assert roi_align(maps, torch.zeros(0, 5), 2).shape == (0, 1, 2, 2)


def test_overlapping_boxes_are_suppressed() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]
    assert nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.99).tolist() == [1, 0, 2]


def test_the_library_is_left_as_it_was() -> None:
    pytest.importorskip("torchvision.models.detection")
    modules = [sys.modules[name] for name in ("torchvision.ops.boxes", "torchvision.ops.poolers")]
    before = [vars(m).copy() for m in modules]
    with spare_kernels():
        pass
    assert [vars(m) for m in modules] == before
