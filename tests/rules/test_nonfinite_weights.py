"""ARC616 on weights that exist: a module and the file that was exported from it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from archlint.finding import Severity
from archlint.linter import check
from archlint.testing import load_source
from tests.conftest import ROOT

NAN, INF = float("nan"), float("inf")


def _export(network: nn.Module, inputs: torch.Tensor, path: Path) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (inputs,), str(path), dynamo=False)
    return str(path)


@pytest.mark.parametrize("trained", [False, True])
def test_module_and_file(trained: bool, tmp_path: Path) -> None:
    """The same finding on both, whether the other weights look freshly drawn or trained."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    with torch.no_grad():
        if trained:
            network[0].weight.mul_(torch.linspace(0.1, 3.0, 64)[:, None])
        network[0].weight[3, 4] = NAN
        network[2].bias[2:4] = INF
    for target in (network, _export(network, torch.zeros(2, 64), tmp_path / "model.onnx")):
        report = check(target)
        assert [f.code for f in report.findings] == ["ARC616"]
        (finding,) = report.findings
        assert finding.severity is Severity.ERROR
        assert set(finding.modules) == {"0.weight", "2.bias"}
        assert finding.message.startswith(
            "0.weight holds 1 NaN among 4096 elements, the first at [3, 4]: "
        )


class Computed(nn.Module):
    """A constructor whose arithmetic has no law."""

    def __init__(self, after: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 10)
        with torch.no_grad():
            after(self.body.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


@pytest.mark.parametrize(
    ("after", "told"),
    [
        (lambda w: w.sqrt_(), "NaN"),
        (lambda w: w.div_(0), "+Inf and "),
        (lambda w: w.mul_(torch.ones(1).std()), "4096 NaN"),
        (lambda w: w[0].log_(), "NaN among 4096 elements"),
    ],
)
def test_what_a_constructor_computes(after: Callable[[Tensor], object], told: str) -> None:
    (finding,) = check(lambda: Computed(after), inputs={"x": ((2, 64), None)}).findings
    assert finding.code == "ARC616"
    assert finding.message.startswith("body.weight holds")
    assert told in finding.message


def test_a_mask_of_a_file(tmp_path: Path) -> None:
    network = load_source(ROOT / "fixtures/arc616_nonfinite_weights/good_mask.py").Net()
    file = _export(network, torch.zeros(2, 1024), tmp_path / "model.onnx")
    reports = [check(network, inputs={"x": ((2, 1024), None)}), check(file)]
    for report in reports:
        assert "ARC616" not in {finding.code for finding in report.findings}
