"""What a router picks and what its experts give, against drawn networks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from archlint.graph.from_torch import load_torch
from archlint.signal.analysis import analyse

N, WIDTH, TOKENS, DRAWS = 16, 64, 64, 60


def _softmax(z: Tensor) -> Tensor:
    return z.softmax(-1)


class Router(nn.Module):
    """The weights of the greatest ``k`` of ``N`` scores; their logits have variance ½."""

    def __init__(
        self, score: Callable[[Tensor], Tensor], k: int, share: bool, gather: bool
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, N, bias=False)
        nn.init.normal_(self.gate.weight, std=(0.5 / WIDTH) ** 0.5)
        self.register_buffer("correction", torch.zeros(N))
        self.score, self.k, self.share, self.gather = score, k, share, gather

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(self.gate(x))
        weights, at = torch.topk(scores + self.correction if self.gather else scores, self.k, -1)
        if self.gather:
            weights = scores.gather(1, at)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) if self.share else weights


@pytest.mark.parametrize("k", [1, 2, 6])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    "score", [_softmax, torch.sigmoid, lambda z: z], ids=["softmax", "sigmoid", "logits"]
)
def test_weights_of_a_router(
    score: Callable[[Tensor], Tensor], share: bool, gather: bool, k: int
) -> None:
    if share and score not in (_softmax, torch.sigmoid):
        pytest.skip("logits have no share of a sum")
    _agrees(lambda: Router(score, k, share, gather))


def _agrees(build: Callable[[], nn.Module]) -> None:
    graph = load_torch(build, {"x": ((TOKENS, WIDTH), None)})
    signal = analyse(graph).signal(graph.outputs[0])
    means, squares = [], []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        w = build()(torch.randn(TOKENS, WIDTH)).detach()
        means.append(float(w.mean()))
        squares.append(float(w.square().mean()))
    for predicted, drawn in ((signal.mean, means), (signal.second_moment, squares)):
        assert predicted is not None
        centre = torch.tensor(drawn, dtype=torch.float64)
        noise = float(centre.std()) / math.sqrt(DRAWS)
        assert abs(predicted - float(centre.mean())) <= 4 * noise + 0.01 * float(centre.mean())


class Grouped(Router):
    """From two of four groups, by the sum of the two best scores of each, as DeepSeek-V3 picks."""

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(self.gate(x))
        best = scores.view(-1, 4, N // 4).topk(2, -1)[0].sum(-1)
        mask = torch.zeros_like(best).scatter_(1, best.topk(2, -1, sorted=False)[1], 1)
        mask = mask.unsqueeze(-1).expand(-1, 4, N // 4).reshape(-1, N)
        at = scores.masked_fill(~mask.bool(), 0.0).topk(self.k, -1, sorted=False)[1]
        weights = scores.gather(1, at)
        return weights / weights.sum(-1, keepdim=True) if self.share else weights


@pytest.mark.parametrize("k", [3, 6])
@pytest.mark.parametrize("share", [False, True])
def test_weights_within_groups(share: bool, k: int) -> None:
    _agrees(lambda: Grouped(torch.sigmoid, k, share, True))


class Unequal(Router):
    """A share of more than the sum."""

    def forward(self, x: Tensor) -> Tensor:
        weights = self.score(self.gate(x)).topk(self.k, -1)[0]
        return weights / (weights.sum(-1, keepdim=True) + 1.0)


class Masked(Grouped):
    """The best groups are those that are masked, or the fill is above some scores."""

    def __init__(self, inverted: bool, fill: float) -> None:
        super().__init__(torch.sigmoid, 3, False, True)
        self.inverted, self.fill = inverted, fill

    def forward(self, x: Tensor) -> Tensor:
        scores = self.score(self.gate(x))
        best = scores.view(-1, 4, N // 4).topk(2, -1)[0].sum(-1)
        mask = torch.zeros_like(best).scatter_(1, best.topk(2, -1)[1], 1).bool()
        mask = mask.unsqueeze(-1).expand(-1, 4, N // 4).reshape(-1, N)
        filled = scores.masked_fill(~mask if self.inverted else mask, self.fill)
        return scores.gather(1, filled.topk(self.k, -1)[1])


def test_a_share_of_more_than_the_sum_is_no_share() -> None:
    graph = load_torch(lambda: Unequal(_softmax, 2, True, False), {"x": ((TOKENS, WIDTH), None)})
    mean = analyse(graph).signal(graph.outputs[0]).mean
    assert mean is None or mean < 0.25


@pytest.mark.parametrize(("inverted", "fill"), [(False, 0.0), (True, 0.5)])
def test_groups_that_are_not_those_picked_from(inverted: bool, fill: float) -> None:
    graph = load_torch(lambda: Masked(inverted, fill), {"x": ((TOKENS, WIDTH), None)})
    assert analyse(graph).signal(graph.outputs[0]).second_moment is None


def test_picking_at_the_places_of_other_scores_is_not_known() -> None:
    class Other(Router):
        def forward(self, x: Tensor) -> Tensor:
            return self.gate(x).gather(1, torch.topk(-self.gate(x).abs(), 2, -1)[1])

    graph = load_torch(lambda: Other(_softmax, 2, False, True), {"x": ((TOKENS, WIDTH), None)})
    assert analyse(graph).signal(graph.outputs[0]).second_moment is None


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralModel

    return MixtralModel(
        MixtralConfig(
            vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, num_local_experts=8,
            num_experts_per_tok=2, initializer_range=0.12, pad_token_id=None,
        )
    )  # fmt: skip


def test_experts_of_mixtral() -> None:
    pytest.importorskip("transformers")
    from tests.accuracy.comparison import compare
    from tests.accuracy.models import Case
    from tests.accuracy.monte_carlo import measure

    inputs = {"input_ids": ((2, 32), "int64")}
    figures = measure(_mixtral, inputs, 12)
    result = compare(Case("transformers", "mixtral", "transformers", _mixtral, inputs), figures)
    rows = [r for r in result.rows if "mlp.gate" not in r.module]  # it returns several tensors
    assert any("layers.1.mlp" in r.module for r in rows)
    for row in rows:
        noise = 4 * row.measured.standard_error
        assert row.forward is not None
        assert abs(row.forward) <= 0.06 + noise, row.module
        assert row.gradient is not None
        assert abs(row.gradient) <= 0.3 + noise, row.module
        assert row.position is None or abs(row.position) <= 0.12, row.module
