"""The networks on which the rules must speak, and those on which they must be silent."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from archlint.finding import Severity
from archlint.linter import check
from archlint.testing import lint_module
from tests.rules.models import MUST_FIRE, MUST_NOT_FIRE, Siamese, mlp

VECTORS = {"default_mlp_20", "default_mlp_30", "glorot_mlp_20", "gelu_he_30", "he_50x15",
           "he_residual_20", "relu_ended_root"}  # fmt: skip


@pytest.mark.parametrize("name", MUST_FIRE)
def test_fires(name: str) -> None:
    build, code, severity = MUST_FIRE[name]
    found = {finding.code: finding.severity for finding in lint_module(build)}
    assert found.get(code) is Severity[severity.upper()], found


@pytest.mark.parametrize("name", MUST_NOT_FIRE)
def test_stays_silent(name: str) -> None:
    loud = [f for f in lint_module(MUST_NOT_FIRE[name]) if f.severity > Severity.INFO]
    assert not loud, [finding.message for finding in loud]


def test_a_copy_that_is_not_trained_is_meant() -> None:
    """In a module that exists and in an exported program as in one that is built."""
    torch.manual_seed(0)
    network = Siamese()
    for target in (network, torch.export.export(network, (torch.zeros(2, 64),))):
        assert not check(target).findings
    network.target.requires_grad_(True)
    assert [f.code for f in check(network).findings] == ["ARC601"]


@pytest.mark.parametrize("name", sorted(VECTORS))
def test_fires_alike_on_the_exported_file(name: str, tmp_path: Path) -> None:
    """The same codes from the module and from its ONNX export, and one finding of each."""
    build, code, severity = MUST_FIRE[name]
    torch.manual_seed(0)
    network = build().train()
    width = next(iter(network.parameters())).shape[-1]
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.zeros(2, width),), str(path), dynamo=False,
            training=torch.onnx.TrainingMode.PRESERVE,
        )  # fmt: skip
    report = check(str(path))
    assert not report.errors
    found = {finding.code: finding.severity for finding in report.findings}
    assert found.get(code) is Severity[severity.upper()], found
    assert len(found) == len(report.findings)
    assert set(found) == {finding.code for finding in lint_module(build)}


def test_the_same_net_of_thirty_default_layers_has_one_finding() -> None:
    """One cause is one finding: it names the stretch, the product, the gain and the value."""
    found = lint_module(MUST_FIRE["default_mlp_30"][0])
    assert [finding.code for finding in found] == ["ARC101"]
    finding = found[0]
    assert finding.count == 30
    assert finding.evidence["gain_per_layer"] == pytest.approx(1 / 6, rel=1e-3)
    assert finding.evidence["log10_gain"] == pytest.approx(-30 * 0.77815, rel=1e-3)
    assert finding.suggestion is not None
    assert finding.suggestion.values["std"] == pytest.approx((2 / 128) ** 0.5)


@pytest.mark.parametrize("std", [1e-6, 1e6])
def test_a_length_beyond_what_numbers_hold(std: float) -> None:
    def drawn(layer: nn.Linear) -> nn.Linear:
        nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(layer.bias)
        return layer

    found = [f for f in lint_module(lambda: mlp(40, 64, drawn)) if f.code == "ARC101"]
    assert [f.severity for f in found] == [Severity.ERROR]
    gain = found[0].evidence["gain_per_layer"]
    assert gain == pytest.approx(64 * std**2 / 2, rel=0.05)
