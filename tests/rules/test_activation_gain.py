"""ARC602: what it says of layers that are wrong by different factors."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archlint.testing import lint_module


class ForgottenArea(nn.Module):
    """std = √(2/(k·C_out)) for kernels of k² taps."""

    def __init__(self) -> None:
        super().__init__()
        widths = [3, 32, 64, 128, 128, 128, 128]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        for conv in self.convs:
            assert isinstance(conv, nn.Conv2d)
            nn.init.normal_(conv.weight, std=(2 / (3 * conv.out_channels)) ** 0.5)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = F.relu(conv(x))
        return x


def test_factors_that_differ_are_told_from_the_least_to_the_largest() -> None:
    found = lint_module(ForgottenArea, {"x": torch.zeros(2, 3, 32, 32)})
    assert [f.code for f in found] == ["ARC602"]
    assert "have 0.281 to 3 times the variance that relu needs" in found[0].message
