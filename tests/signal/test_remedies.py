"""What findings suggest, made to the graph, takes the findings away."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from archlint.config import Config
from archlint.graph.from_torch import load_torch
from archlint.graph.model import problems
from archlint.linter import chosen_rules, lint
from archlint.probe.draws import Drawer
from archlint.probe.execute import Program
from archlint.signal.analysis import Analysis, analyse
from archlint.signal.remedies import remedied
from tests.rules import models

RULES = chosen_rules(Config())


def found(analysis: Analysis, code: str) -> list[object]:
    return [f for f in lint(analysis, RULES)[0] if f.code == code]


# Of these the change is the user's own: to fill a parameter, one that no scale makes.
WITHOUT = {"never_filled"}


@pytest.mark.parametrize("name", [n for n in models.MUST_FIRE if n not in WITHOUT])
def test_a_remedy_takes_its_finding_away(name: str) -> None:
    build, code, _ = models.MUST_FIRE[name]
    graph = load_torch(build)
    findings, _ = lint(analyse(graph), RULES)
    finding = next(f for f in findings if f.code == code)
    assert finding.suggestion is not None
    remedy = finding.suggestion.remedy
    assert remedy is not None
    assert remedy.words
    changed = remedied(graph, remedy)
    assert changed is not None
    assert not problems(changed)
    after, _ = lint(analyse(changed), RULES)
    graver = [f for f in after if f.code == code and f.severity >= finding.severity]
    assert not graver, [f.message for f in graver]


def test_wider_layers_run_and_keep_their_gain() -> None:
    graph = load_torch(lambda: models.mlp(12, 10, models.he), {"": ((2, 10), None)})
    findings, _ = lint(analyse(graph), RULES)
    finding = next(f for f in findings if f.code == "ARC201")
    assert finding.suggestion is not None
    assert finding.suggestion.remedy is not None
    changed = remedied(graph, finding.suggestion.remedy)
    assert changed is not None
    width = finding.suggestion.values["width"]
    shapes = {p.name: p.shape for p in changed.parameters.values()}
    assert shapes["0.weight"][1] == 10  # what comes in is what it was
    assert abs(shapes["2.weight"][0] - int(str(width))) <= 1
    assert shapes["24.weight"][0] == 10
    program = Program(changed)
    drawer = Drawer(program.parameters, 0, torch.float64, torch.device("cpu"))
    draws = drawer.draw(0, 400)
    x = torch.randn(2, 10, dtype=torch.float64)

    def run(varied: dict[str, Tensor]) -> Tensor:
        return program.run({**draws, **varied}, [x])[changed.outputs[0]]

    random = {k: v for k, v in draws.items() if drawer.plans[k].kind}
    y = torch.func.vmap(run)(random)
    before, after = (analyse(g).signal(g.outputs[0]).second_moment for g in (graph, changed))
    assert before == pytest.approx(after, rel=1e-6)
    assert float(y.square().mean()) == pytest.approx(after, rel=0.5)


def test_what_cannot_be_widened_is_left_alone() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([models.he(nn.Linear(8, 8)) for _ in range(40)])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.relu(layer(x)).flip(-1).cumsum(-1) / 4
            return x

    graph = load_torch(Sum, {"x": ((2, 8), None)})
    findings, _ = lint(analyse(graph), RULES)
    for finding in findings:
        if finding.suggestion is not None and (remedy := finding.suggestion.remedy) is not None:
            changed = remedied(graph, remedy)
            assert changed is None or not problems(changed)
