"""No prediction is NaN: what comes out as ∞ − ∞ is not known."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archlint.graph.from_torch import load_torch
from archlint.signal.analysis import analyse
from archlint.signal.spread import CERTAIN, rectified_law


class Pooled(nn.Module):
    """Lowest numbers around an image: the maximum does not see them, the mean does."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.stem, self.pool, self.head = nn.Conv2d(3, 8, 3), pool, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(F.pad(self.stem(x), (0, 1, 0, 1), value=-math.inf)))


def test_padding_by_the_lowest_number() -> None:
    torch.manual_seed(0)
    for pool, known in ((nn.MaxPool2d(3, 2), True), (nn.AvgPool2d(3, 2), False)):
        analysis = analyse(load_torch(Pooled(pool), {"x": ((2, 3, 17, 17), "float32")}))
        for s in map(analysis.prediction, analysis.signals):
            assert not any(isinstance(x, float) and math.isnan(x) for x in vars(s).values())
        assert (analysis.signals[analysis.graph.outputs[0]].second_moment is not None) is known


def test_a_mask_over_no_end_of_elements_leaves_nothing_to_chance() -> None:
    assert rectified_law(math.inf, 0.0, 0.0, 0.9) == CERTAIN
