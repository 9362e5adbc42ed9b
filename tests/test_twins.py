"""A module and both exporters' files of it: the same findings, by module path."""

from __future__ import annotations

import pytest

from archlint.linter import check
from tests.exported import CASES, export, model


def findings(name: str, exporter: str) -> list[tuple[str, str, str, int]]:
    report = check(str(export(name, exporter)))  # type: ignore[arg-type]
    assert not report.errors, report.errors
    assert report.targets[0].weights == "initial", report.targets[0].weights_evidence
    return [(f.code, f.severity.label, f.module, f.count) for f in report.findings]


@pytest.mark.parametrize("name", CASES)
def test_same_findings_from_both_exporters(name: str) -> None:
    assert findings(name, "dynamo") == findings(name, "legacy")


@pytest.mark.parametrize("name", list(CASES)[:20])
def test_same_findings_from_the_module(name: str) -> None:
    report = check(model(name), inputs=CASES[name].inputs())
    assert not report.errors, report.errors
    found = [(f.code, f.severity.label, f.module, f.count) for f in report.findings
             if f.severity.label != "info"]  # fmt: skip
    there = [f for f in findings(name, "legacy") if f[1] != "info"]
    assert sorted(found) == sorted(there)


EXPECTED = {
    "mlp_he_normal": set(),
    "mlp_he_uniform": set(),
    "mlp_xavier": {("ARC101", "warning")},
    "mlp_lecun": {("ARC101", "warning")},
    "mlp_default": {("ARC101", "error")},
    "residual_one_linear": {("ARC301", "warning")},
    "residual_one_relu": {("ARC302", "warning")},
    "residual_root_linear": set(),
    "residual_linear_relu": set(),
    "residual_tenth_relu": set(),
    "resnet18": set(),
    "vit": set(),
    "gpt2": set(),
    "lstm": set(),
    "convnet": set(),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_findings_of_the_exports(name: str) -> None:
    assert {(code, severity) for code, severity, _, _ in findings(name, "legacy")
            if severity != "info"} == EXPECTED[name]  # fmt: skip
