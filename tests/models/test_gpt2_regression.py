"""The GPT-2 regression of transformers 5.0.0 to 5.14.1, told by a finding and by the laws.

Those versions build GPT-2 without the factor 1/√(2L) of the projections that write into the
residual stream (huggingface/transformers#47458): a loop asks for a parameter called
``c_proj.weight`` where names are whole paths. Later ones have the factor again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
import transformers

ROOT = Path(__file__).parents[2]
LAYERS = 12
NETWORK = f"""
import tests.conftest  # torchvision without its compiled operators can be imported
from transformers import GPT2Config, GPT2Model


def gpt2():
    return GPT2Model(GPT2Config(n_layer={LAYERS}))
"""
PROJECTIONS = [f"h.{i}.{part}.c_proj.weight" for i in range(LAYERS) for part in ("attn", "mlp")]


def _environment(folder: Path, version: str) -> Path:
    """The Python of a new environment with this version of transformers; what else is needed comes
    from the present one."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    (site_packages,) = folder.glob("lib/python*/site-packages")
    (site_packages / "present.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, f"transformers=={version}"], check=True, timeout=600)
    said = [str(python), "-c", "import transformers as t; print(t.__version__, t.__path__[0])"]
    found = subprocess.run(said, capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.split()[0] == version
    return python


def _run(python: Path, folder: Path, command: str) -> dict[str, Any]:
    """The JSON of a command of archlint in an environment, of its only target."""
    file = folder / "net.py"
    file.write_text(NETWORK)
    done = subprocess.run(
        [str(python), "-m", "archlint", command, f"{file}:gpt2", "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    (target,) = json.loads(done.stdout)["targets"]
    assert isinstance(target, dict)
    return target


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_lost_scaling_is_told_apart(tmp_path: Path) -> None:
    broken = _environment(tmp_path / "broken", "5.8.0")
    repaired = _environment(tmp_path / "repaired", transformers.__version__)

    (finding,) = _run(broken, tmp_path, "check")["findings"]
    assert (finding["code"], finding["severity"]) == ("ARC615", "warning")
    assert finding["modules"] == PROJECTIONS
    assert finding["message"].startswith(
        f"{2 * LAYERS} parameters (h.0.attn.c_proj.weight … h.{LAYERS - 1}.mlp.c_proj.weight) keep "
        'normal_(std=0.02): name == "c_proj.weight" is true of none of '
    )
    assert finding["site"]["file"].endswith("transformers/models/gpt2/modeling_gpt2.py")
    line = Path(finding["site"]["file"]).read_text().splitlines()[finding["site"]["line"] - 1]
    assert line.strip() == 'if name == "c_proj.weight":'
    assert _run(repaired, tmp_path, "check")["findings"] == []

    for python, scale in ((broken, 1), (repaired, 2 * LAYERS)):
        rows = {row["name"]: row for row in _run(python, tmp_path, "profile")["parameters"]}
        assert [name for name in rows if name.endswith("c_proj.weight")] == PROJECTIONS
        assert rows["h.0.mlp.c_fc.weight"]["second_moment"] == pytest.approx(0.02**2)
        for name in PROJECTIONS:
            assert rows[name]["exact"]
            assert rows[name]["second_moment"] == pytest.approx(0.02**2 / scale)
