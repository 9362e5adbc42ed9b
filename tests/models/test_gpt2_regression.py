"""The GPT-2 regression of transformers 5.0.0 to 5.14.1, seen in the parameter table.

Those versions build GPT-2 without the factor 1/√(2L) of the projections that write into the
residual stream (huggingface/transformers#47458); later ones have it again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LAYERS = 12
NETWORK = f"""
import tests.conftest  # torchvision without its compiled operators can be imported
from transformers import GPT2Config, GPT2Model


def gpt2():
    return GPT2Model(GPT2Config(n_layer={LAYERS}))
"""


def _second_moments(folder: Path, library: Path | None) -> dict[str, dict[str, Any]]:
    """The rows of the parameter table by name; transformers comes from ``library`` if given."""
    file = folder / "net.py"
    file.write_text(NETWORK)
    paths = [str(ROOT), *([str(library)] if library is not None else [])]
    done = subprocess.run(
        [sys.executable, "-m", "archlint", "profile", f"{file}:gpt2", "--format", "json"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    (target,) = json.loads(done.stdout)["targets"]
    return {row["name"]: row for row in target["parameters"]}


def _unscaled(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The projections into the residual stream that are as large as the other weights."""
    usual = rows["h.0.mlp.c_fc.weight"]["second_moment"]
    return [
        name
        for name, row in rows.items()
        if name.endswith("c_proj.weight") and row["second_moment"] == pytest.approx(usual)
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_lost_scaling_is_told_apart(tmp_path: Path) -> None:
    library = tmp_path / "transformers-5.8.0"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(library)]
    subprocess.run([*install, "transformers==5.8.0"], check=True, timeout=600)

    broken = _second_moments(tmp_path, library)
    repaired = _second_moments(tmp_path, None)
    projections = [n for n in repaired if n.endswith("c_proj.weight")]
    assert len(projections) == 2 * LAYERS
    assert _unscaled(broken) == projections
    assert _unscaled(repaired) == []
    for name in projections:
        assert broken[name]["exact"]
        assert repaired[name]["exact"]
        assert broken[name]["second_moment"] == pytest.approx(0.02**2)
        assert repaired[name]["second_moment"] == pytest.approx(0.02**2 / (2 * LAYERS))
