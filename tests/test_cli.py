"""The command line: exit codes, streams, formats, files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

FIXTURE = ROOT / "fixtures" / "arc101_length_drift" / "bad_mlp30.onnx"


def run(*args: object, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "archlint", *map(str, args)],
        capture_output=True, text=True, cwd=cwd, env={**os.environ, **env}, timeout=120,
        check=False,
    )  # fmt: skip


def test_full_report_of_the_shipped_fixture() -> None:
    done = run(FIXTURE)
    assert done.returncode == 1
    assert done.stderr == ""
    assert "ARC101 [length-drift]" in done.stdout
    assert "4.5e-24 over 30 layers" in done.stdout
    assert 'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")' in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


def test_the_readme_shows_what_is_printed() -> None:
    done = run("fixtures/arc101_length_drift/bad_mlp30.onnx")
    shown = done.stdout[: done.stdout.index("\n\nfixtures/")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert shown in readme
    done = run("fixtures/arc101_length_drift/bad_mlp30.py:Net")
    assert done.stdout[: done.stdout.index("   | layers.0.0")] in readme


def test_json_has_the_promised_shape_and_same_bytes() -> None:
    first, second = (run(FIXTURE, "--format", "json").stdout for _ in range(2))
    assert first == second
    document: dict[str, Any] = json.loads(first)
    assert document["schema_version"] == 1
    (target,) = document["targets"]
    assert set(target) >= {"target", "input", "mode", "coverage", "weights", "findings"}
    assert target["weights"] == "initial"
    assert target["coverage"] == {"nodes": 61, "modelled": 61, "unmodelled": {}}
    (finding,) = target["findings"]
    assert finding["code"] == "ARC101"
    assert finding["evidence"]["layers"] == 30


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 1),
        (["--fail-on", "never"], 0),
        (["--ignore", "ARC1"], 0),
        (["--select", "ARC3"], 0),
        (["--select", "length-drift"], 1),
        (["--select", "NOPE"], 2),
        (["--input", "x"], 2),
        (["--input", "nope:2x64"], 2),
        (["--nope"], 2),
    ],
)
def test_exit_codes(options: list[str], code: int) -> None:
    done = run(FIXTURE, *options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert bool(done.stderr) == (code == 2)


def test_a_bad_target_does_not_hide_the_others(tmp_path: Path) -> None:
    empty, pickled = tmp_path / "empty.onnx", tmp_path / "model.pt"
    empty.write_bytes(b"")
    pickled.write_bytes(b"\x80\x02.")
    done = run(empty, FIXTURE, pickled, tmp_path / "missing.onnx", "--format", "concise")
    assert done.returncode == 2
    assert "ARC101" in done.stdout
    assert done.stderr.count("error:") == 3
    assert done.stderr.count("hint:") == 3
    assert "Traceback" not in done.stderr


def test_output_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    done = run(FIXTURE, "--format", "json", "--output-file", target)
    assert done.stdout == ""
    assert json.loads(target.read_text(encoding="utf-8"))["schema_version"] == 1
    assert list(tmp_path.iterdir()) == [target]
    refused = run(FIXTURE, "-o", tmp_path / "no" / "out.txt")
    assert refused.returncode == 2
    assert "cannot be written" in refused.stderr


def test_a_closed_pipe_ends_quietly() -> None:
    command = f"{sys.executable} -m archlint rule ARC101 | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_rule_and_graph() -> None:
    assert len(run("rule", "--all").stdout.splitlines()) >= 7
    assert run("rule", "length-drift").stdout.startswith("# ARC101 length-drift")
    assert "did you mean length-drift" in run("rule", "lenght-drift").stderr
    table = run("graph", FIXTURE).stdout
    assert "parameter layers.0.0.weight: 64x64 uniform" in table
    assert "layers.29.0" in table


def test_configuration(tmp_path: Path) -> None:
    config = tmp_path / "pyproject.toml"
    config.write_text(f'[tool.archlint]\ntargets = ["{FIXTURE}"]\nfail-on = "never"\n')
    assert run(cwd=tmp_path).returncode == 0
    config.write_text("[tool.archlint.rules.length-drift]\nleast-layers = 99\n")
    assert run(FIXTURE, cwd=tmp_path).returncode == 0
    config.write_text("[tool.archlint]\nfail = 1\n")
    done = run(FIXTURE, cwd=tmp_path)
    assert done.returncode == 2
    assert "no setting 'fail'" in done.stderr


@pytest.mark.parametrize("args", [["--help"], ["rule", "--all"]])
def test_light_commands_load_nothing_heavy(args: list[str]) -> None:
    code = (
        "import sys; from archlint.cli import cli\n"
        f"cli.main({args!r}, standalone_mode=False)\n"
        "print([m for m in ('onnx', 'torch', 'numpy.linalg') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    heavy = done.stdout.splitlines()[-1] if done.stdout else ""
    assert "onnx" not in heavy
    assert "torch" not in heavy


def test_an_onnx_target_never_imports_torch() -> None:
    code = (
        "import sys; from archlint import check\n"
        f"check({str(FIXTURE)!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
