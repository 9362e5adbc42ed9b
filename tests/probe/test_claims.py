"""What the rules about initialization claim, and draws by the model's own constructor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import archlint
from archlint.finding import Claim, Finding, Severity
from archlint.graph.from_torch import load_torch
from archlint.linter import TargetReport
from archlint.probe.execute import Program
from archlint.probe.experiment import run
from archlint.probe.options import ProbeOptions
from archlint.probe.rebuild import CannotRebuild, Rebuilder
from archlint.rule import registry, rules_folder
from archlint.signal.analysis import analyse
from archlint.wording import probed
from tests.rules import models

OPTIONS = ProbeOptions(draws=256, time=60)
ABOUT_WEIGHTS = [n for n, (_, code, _) in models.MUST_FIRE.items() if code.startswith("ARC6")]


def report(build: Any, inputs: Any = None) -> TargetReport:
    return archlint.probe(build, inputs, options=OPTIONS).targets[0]


@pytest.mark.parametrize("name", ABOUT_WEIGHTS)
def test_what_is_claimed_of_weights_is_confirmed(name: str) -> None:
    build, code, _ = models.MUST_FIRE[name]
    small = {"": ((2, 3, 32, 32), None)} if "depthwise" in name else None
    findings = [f for f in report(build, small).findings if f.code == code]
    assert [f.verdict for f in findings] == ["confirmed"] * len(findings)
    assert findings
    assert probed(findings[0]).startswith("confirmed: ")


def test_what_has_no_experiment_says_so() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            nn.init.normal_(self.layer.weight)
            nn.init.zeros_(self.layer.weight)
            nn.init.xavier_normal_(self.layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.layer(x))

    for finding in report(Net, {"x": (2, 8)}).findings:
        assert finding.code in ("ARC614", "ARC901")
        assert finding.verdict is None
        assert probed(finding) == "no experiment for this finding"


def test_every_rule_is_measured_or_is_known_not_to_be() -> None:
    """A rule that comes new says what would confirm it, or is added here with the reason."""
    without = {
        "ARC614": "the call's absence is what would tell",
        "ARC615": "the test on names is what decides",
        "ARC901": "it is about archlint",
    }
    for rule in registry():
        (file,) = rules_folder().glob(f"{rule.code.lower()}_*.py")
        text = file.read_text(encoding="utf-8")
        assert ("claim=" in text) != (rule.code in without), rule.code


# --------------------------------------------------------------------------- refuted


def planted(claim: Claim) -> Finding:
    return Finding("ARC000", "planted", Severity.ERROR, "planted.", "", claim=claim)


def test_units_that_differ() -> None:
    analysis = analyse(load_torch(lambda: models.mlp(3, 32, models.he), {"": ((4, 32), None)}))
    first = analysis.graph.nodes[0].output
    claims = [Claim("unit difference", first, None, -9.0, -6.0, below=True),
              Claim("common part", first, None, 1.0, 0.0)]  # fmt: skip
    outcome = run(analysis, [planted(c) for c in claims], ProbeOptions(draws=64))
    assert [f.verdict for f in outcome.findings] == ["refuted", "refuted"]
    alike, common = (f.measurement for f in outcome.findings)
    assert alike is not None
    assert alike.figure == pytest.approx(0.0, abs=0.05)  # variance and mean square agree
    assert common is not None
    assert common.figure is not None
    assert common.figure == pytest.approx(-np.log10(32) - 0.35, abs=0.35)  # a mean of 32 units


def test_weights_that_differ_and_parameters_without_reach() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 1e9, self.a(x), self.b(x))

    analysis = analyse(load_torch(Net, {"x": ((2, 8), None)}))
    out = analysis.graph.outputs[0]
    claims = [Claim("weight difference", "a.weight", "b.weight", -9.0, -6.0, below=True),
              Claim("reach", out, "a.weight", 1.0, 0.0),
              Claim("reach", out, "b.weight", 1.0, 0.0)]  # fmt: skip
    findings = [planted(c) for c in claims]
    built = run(analysis, findings, ProbeOptions(draws=64), Net)
    assert [f.verdict for f in built.findings] == ["refuted", "refuted", "confirmed"]
    drawn = run(analysis, findings[:1], ProbeOptions(draws=64))  # from laws that say it themselves
    assert drawn.findings[0].verdict == "inconclusive"
    assert "nothing that builds it" in probed(drawn.findings[0])


def test_a_value_that_no_gradient_reaches() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b((self.a(x) > 0).float())

    analysis = analyse(load_torch(Net, {"x": ((2, 8), None)}))
    claim = Claim("gradient", analysis.graph.outputs[0], analysis.graph.inputs[0], 4.0, 2.0)
    outcome = run(analysis, [planted(claim)], ProbeOptions(draws=32))
    assert outcome.findings[0].verdict == "inconclusive"
    assert probed(outcome.findings[0]) == "inconclusive: no gradient reaches it"


# --------------------------------------------------------------------------- the constructor


class Numpys(nn.Module):
    """Weights of a law that nobody knows, from numpy's random numbers."""

    def __init__(self, fixed: bool = False) -> None:
        super().__init__()
        random = np.random.default_rng(0) if fixed else np.random
        if fixed:
            torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(8)])
        for layer in self.layers:
            with torch.no_grad():
                w = random.standard_t(9, (32, 32)) / 40  # variance 9/7/1600: a third of He's
                layer.weight.copy_(torch.from_numpy(w))  # type: ignore[operator]
                layer.bias.zero_()  # type: ignore[operator, union-attr]
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


def test_laws_that_are_estimates_are_drawn_by_building() -> None:
    found = report(Numpys, {"x": (2, 32)})
    assert any("drawn by building the model anew" in remark for remark in found.probe_remarks)
    finding = next(f for f in found.findings if f.code == "ARC101")
    assert finding.verdict == "confirmed"
    measured = finding.measurement
    assert measured is not None
    assert measured.low is not None
    assert measured.high is not None
    true = 8 * np.log10(0.5 * 32 * 9 / 7 / 1600)
    assert measured.low <= true <= measured.high


def test_a_constructor_with_a_seed_of_its_own() -> None:
    found = report(lambda: Numpys(fixed=True), {"x": (2, 32)})
    text = " ".join(found.probe_remarks)
    assert "the constructor makes the same weights each time it is called" in text
    assert all(f.verdict is not None for f in found.findings if f.claim is not None)


def test_a_model_that_is_there_has_nothing_to_build_it() -> None:
    found = report(Numpys(), {"x": (2, 32)})
    assert any("estimated from the weights themselves" in r for r in found.probe_remarks)


@pytest.mark.parametrize(
    ("build", "text"),
    [(lambda: nn.Linear(9, 8), "made otherwise when the model is built again"),
     (lambda: 1 / 0, "ZeroDivisionError: division by zero")],
)  # fmt: skip
def test_constructors_that_do_not_fit(build: Callable[[], Any], text: str) -> None:
    program = Program(load_torch(lambda: nn.Linear(8, 8), {"": ((2, 8), None)}))
    with pytest.raises(CannotRebuild, match=text):
        Rebuilder(build, program.parameters, 0, torch.float64, torch.device("cpu"))


def test_building_is_reproducible_and_leaves_no_trace() -> None:
    program = Program(load_torch(Numpys, {"x": ((2, 32), None)}))
    make = lambda: Rebuilder(Numpys, program.parameters, 5, torch.float64, torch.device("cpu"))  # noqa: E731
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.rand(1), np.random.rand()
    torch.manual_seed(1)
    np.random.seed(1)
    one = make().draw(0, 3)
    assert (torch.rand(1), np.random.rand()) == before
    other = make().draw(2, 1)
    name = "layers.0.weight"
    assert torch.equal(one[name][2:], other[name])
    assert not torch.equal(one[name][0], one[name][1])


def test_copies_are_seen_by_building() -> None:
    layer = nn.Linear(16, 16)
    build = lambda: nn.Sequential(*(copy.deepcopy(layer) for _ in range(4)), nn.Linear(16, 2))  # noqa: E731
    analysis = analyse(load_torch(build, {"": ((2, 16), None)}))
    claim = Claim("weight difference", "1.weight", "0.weight", -9.0, -6.0, below=True)
    outcome = run(analysis, [planted(claim)], OPTIONS, build)
    assert "constructor makes the same weights" in probed(outcome.findings[0])
