"""The formats of check and profile: JSON as promised, tables that fit, the same bytes each time."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from rich.cells import cell_len
from torch import Tensor, nn

import archlint
from archlint.report.profile import as_csv, as_json, sparkline, tables
from tests.report import schemas
from tests.terminal import ROOT, run, run_here, write

FIXTURE = ROOT / "fixtures" / "arc101_length_drift" / "bad_mlp30.onnx"
NET = '''\
import torch
from torch import nn


class Net(nn.Module):
    """A convolution, a norm, an operation without a word, a head."""

    def __init__(self, odd: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)
        self.odd = odd

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = self.head(x.mean((2, 3)))
        return torch.special.bessel_j0(x) + 1 if self.odd else x


net = Net()
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write(folder, "net.py", NET)
    (folder / "empty.onnx").write_bytes(b"")
    return folder


def document(folder: Path, *args: object) -> Any:
    return json.loads(run_here(folder, *args, "--format", "json").out)


def test_check_as_json(project: Path) -> None:
    found = document(project, FIXTURE, "net.py:net", "empty.onnx", "net.py:Nett", "net.py:Net")
    jsonschema.validate(found, schemas.CHECK)
    assert [len(t["findings"]) for t in found["targets"]] == [1, 1, 0, 0, 1]
    assert found["summary"] == {
        "targets": 5, "failed": 2, "findings": 3, "error": 1, "warning": 0, "info": 2
    }  # fmt: skip


@pytest.mark.parametrize("target", [FIXTURE, "net.py:net", "net.py:Net(odd=False)"])
def test_profile_as_json(project: Path, target: Any) -> None:
    found = document(project, "profile", target)
    jsonschema.validate(found, schemas.PROFILE)
    (one,) = found["targets"]
    assert one["values"][0]["op"] == "input"
    assert one["values"][0]["rms"] == 1
    assert len(one["parameters"]) == found["summary"]["parameters"]


def test_what_is_unknown_is_null(project: Path) -> None:
    found = document(project, "profile", "net.py:net")
    values = found["targets"][0]["values"]
    unknown = [v["op"] for v in values if v["rms"] is None and v["shape"] != []]
    assert unknown == ["bessel_j0", "add"]  # a norm's counter is an integer
    assert found["summary"]["unknown"] == 2
    for value in values:
        if value["rms"] is None:
            assert value["mean"] is value["spread"] is value["sample_correlation"] is None


def test_the_same_bytes_from_a_factory(project: Path) -> None:
    for args in (("net.py:Net",), ("profile", "net.py:Net")):
        first = run(project, *args, "--format", "json", PYTHONHASHSEED="1")
        second = run(project, *args, "--format", "json", PYTHONHASHSEED="2")
        assert first.out == second.out
        assert first.err == ""


# --------------------------------------------------------------------------- from Python


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def test_profile_from_python() -> None:
    torch.manual_seed(0)
    found = archlint.profile(Small())
    assert found.target == "Small"
    assert found.input == {"x": "2x16"}
    rows = {p.name: p for p in found.parameters}
    # torch's Linear: U(±1/√fan-in) has variance 1/(3·fan-in)
    assert rows["first.weight"].gain == pytest.approx(1 / 3, rel=0.1)
    assert rows["first.weight"].fan_in == 16
    assert rows["second.weight"].fan_in == 64
    assert rows["first.bias"].fan_in is None
    assert [v.depth for v in found.values] == [0, 1, 1, 2]
    first = found.module("first")
    assert first.rms == pytest.approx(math.sqrt(1 / 3 + 1 / 48), rel=0.1)
    with pytest.raises(KeyError):
        found.module("third")
    assert str(found) == tables(found, 100)
    assert found._repr_html_().startswith("<pre>Small: input x 2x16")


def test_check_from_python(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)
    x = torch.randn(5, 16)
    for target, inputs in (
        (Small(), None), (Small(), {"x": x}), (Small(), {"x": (5, 16)}), (Small(), (x,)),
        (Small(), {"x": ((5, 16), "float32")}), (Small(), {"x": "5x16"}), (Small, None),
        (torch.fx.symbolic_trace(Small()), {"x": x}),
        (torch.export.export(Small(), (x,)), None),
        (Path("net.py"), None), ("net.py:Net", None), ([Small(), FIXTURE], None),
    ):  # fmt: skip
        report = archlint.check(target, inputs)
        assert not report.errors, (target, report.errors)
    assert [t.target for t in archlint.check([Small(), FIXTURE]).targets] == ["Small", str(FIXTURE)]
    for wrong in (3, None, lambda: 3):
        (error,) = archlint.check(wrong).errors
        assert error.hint
    assert "Found 1 finding" in str(archlint.check(str(FIXTURE)))


# --------------------------------------------------------------------------- tables


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit(width: int) -> None:
    timm = pytest.importorskip("timm")
    found = archlint.profile(timm.create_model("resnet18"))
    lines = tables(found, width).splitlines()
    wide = [line for line in lines if cell_len(line) > width]
    assert [line.partition(":")[0] for line in wide] in ([], ["ResNet"])  # the headline
    assert sum(line.strip().startswith("rms ") for line in lines) == 1
    assert len(lines) < 250


def test_csv(project: Path) -> None:
    found = archlint.profile(Small())
    rows = list(csv.DictReader(io.StringIO(as_csv(found))))
    assert [row["module"] for row in rows] == ["", "first", "", "second"]
    assert float(rows[1]["rms"]) == found.values[1].rms
    assert rows[0]["grad_rms"] in ("", str(found.values[0].grad_rms))
    rows = list(csv.DictReader(io.StringIO(as_csv(found, parameters=True))))
    assert [row["name"] for row in rows] == [p.name for p in found.parameters]
    done = run_here(project, "profile", "net.py:net", "--format", "csv", "-o", "out.csv")
    assert done.out == ""
    text = (project / "out.csv").read_text(encoding="utf-8")
    unknown = [
        row
        for row in csv.DictReader(io.StringIO(text))
        if row["rms"] == "" and row["shape"] != "scalar"
    ]
    assert [row["op"] for row in unknown] == ["bessel_j0", "add"]
    assert json.loads(as_json(found))["targets"][0]["target"] == "Small"


def test_sparkline() -> None:
    assert sparkline([], 10) == ""
    assert sparkline([1.0], 10) == sparkline([1e5], 10)
    assert sparkline([10.0**-i for i in range(8)], 10) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, 1.1, 0.9], 10) in ("▅▅▅", "▅▅▄", "▄▅▄")
    assert sparkline([1.0, None, 0.0, 1e-9, 1.0], 10) == "█·▁▁█"
    assert len(sparkline([1.0] * 1000, 40)) == 40
    assert sparkline([1e300, math.inf], 10)[1] == "█"


def test_a_narrow_encoding_is_no_mistake(project: Path) -> None:
    done = run(project, "profile", "net.py:net", PYTHONIOENCODING="ascii")
    assert done.code == 0
    assert done.err == ""
    done = run(project, FIXTURE, PYTHONIOENCODING="latin-1")
    assert done.code == 1


def test_no_colour_in_a_file_or_pipe(project: Path) -> None:
    for env in ({}, {"NO_COLOR": "1"}, {"FORCE_COLOR": "1", "NO_COLOR": "1"}):
        done = run(project, "profile", "net.py:net", **env)
        assert "\x1b" not in done.out
