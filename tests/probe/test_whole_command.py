"""Verdicts through the whole command: laws, draws, execution, statistics, looks."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from torch import nn

from archlint.cli import cli
from archlint.finding import Claim, Finding, Severity
from archlint.graph.from_torch import load_torch
from archlint.probe.experiment import run
from archlint.probe.options import ProbeOptions
from archlint.signal.analysis import analyse
from tests.probe.test_verdicts import BORDERLINE, HEALTHY, MUST_CONFIRM, relu
from tests.rules import models

TARGETS = """
from tests.probe.test_verdicts import HEALTHY
from tests.rules import models

def must_fire(name):
    return models.MUST_FIRE[name][0]()

def healthy(name):
    return HEALTHY[name]()
"""

# A pack of one rule that says of every network what is not so.
PACK = """
from archlint.rule import Rule
from archlint.finding import Severity
from tests.probe.test_verdicts import planted

class Planted(Rule):
    \"\"\"A false finding.\"\"\"
    code = "PLT001"
    slug = "planted"
    severity = Severity.ERROR
    since = "0"

    def check(self, analysis):
        for i, finding in enumerate(planted(analysis)):
            yield self.finding(Severity.ERROR, f"planted {i}.", f"part{i}", claim=finding.claim)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(TARGETS)
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "planted.py").write_text(PACK)
    (tmp_path / "pyproject.toml").write_text('[tool.archlint]\nrule-paths = ["pack"]\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    return tmp_path


def verdicts(arguments: list[str]) -> dict[str, list[dict[str, Any]]]:
    found = CliRunner().invoke(cli, ["probe", *arguments, "--format", "json"])
    assert found.exit_code in (0, 1), found.stderr
    return {t["target"]: t["findings"] for t in json.loads(found.stdout)["targets"]}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_findings_that_must_fire(folder: Path) -> None:
    """Every must-fire case of the rules on signal and spread is confirmed."""
    names = {f"nets.py:must_fire(name='{name}')": name for name in MUST_CONFIRM}
    found = verdicts([*names, "--select", "ARC1,ARC2,ARC3"])
    assert found.keys() == names.keys()
    for target, findings in found.items():
        code = models.MUST_FIRE[names[target]][1]
        assert [f["verdict"] for f in findings if f["code"] == code] == ["confirmed"], target


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_false_findings_on_healthy_networks(folder: Path) -> None:
    """Four false findings or more on each of forty healthy networks; none is confirmed."""
    names = [f"nets.py:healthy(name='{name}')" for name in HEALTHY]
    arguments = [*names, "--select", "PLT001", "--draws", "128", "--time", "60"]
    counts = Counter(f["verdict"] for findings in verdicts(arguments).values() for f in findings)
    print(dict(counts))
    assert counts.total() >= 160
    assert counts["confirmed"] == 0
    assert counts["refuted"] > 3 * counts["inconclusive"]


def plain(width: int, depth: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [models.he(nn.Linear(width, width)), nn.ReLU()]
        return nn.Sequential(*layers)

    return build


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_false_verdicts_of_whole_probes() -> None:
    """1,000 probes with other seeds, 50 on each of 20 networks: claims of the mean length, the
    typical length and the spread whose true figures lie at the limit but for a thousandth, true
    and false in turn."""
    random = np.random.default_rng(11)
    false: Counter[str] = Counter()
    decided: Counter[str] = Counter()
    for width, depth in BORDERLINE:
        graph = load_torch(plain(width, depth), {"": ((1, width), None)})
        analysis = analyse(graph)
        start, end = graph.inputs[0], graph.outputs[0]
        sample = relu(width, depth, 2_000_000, random)
        true = {"length": 0.0, "typical length": float(sample.mean()) / math.log(10),
                "length spread": float(sample.var())}  # fmt: skip
        for repetition in range(50):
            side = 1 if repetition % 2 else -1
            claims = [
                Claim("length", end, start, 0.0, side * 1e-3, below=True),
                Claim("typical length", end, start, 0.0, true["typical length"] + side * 1e-3,
                      below=True),
                Claim("length spread", end, start, 0.0, true["length spread"] * (1 - side * 1e-3)),
            ]  # fmt: skip
            findings = [Finding("ARC000", "planted", Severity.ERROR, ".", "", claim=c)
                        for c in claims]  # fmt: skip
            options = ProbeOptions(draws=512, time=600, seed=1_000 * width + depth + 7 * repetition)
            for finding, statistic in zip(
                run(analysis, findings, options).findings, true, strict=True
            ):
                wrong = "refuted" if side > 0 else "confirmed"
                false[statistic] += finding.verdict == wrong
                decided[statistic] += finding.verdict != "inconclusive"
        print(width, depth, dict(false), dict(decided), flush=True)
    assert max(false.values()) <= 10
