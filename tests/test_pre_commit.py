"""The hook in a real git repository, installed by pre-commit as a user's would be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

FIXTURE = ROOT / "fixtures" / "arc101_length_drift" / "bad_mlp30.onnx"

pytest.importorskip("pre_commit")


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="pre-commit installs from a repository")
def test_the_hook_stops_a_commit(tmp_path: Path) -> None:
    """A file with an error-level finding is refused; other files are none of its business."""
    repository = tmp_path / "repository"
    repository.mkdir()
    environment = {**os.environ, "PRE_COMMIT_HOME": str(tmp_path / "home")}

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=repository, env=environment, capture_output=True,
                              text=True, check=False)  # fmt: skip

    def hook(*files: str) -> subprocess.CompletedProcess[str]:
        return run(sys.executable, "-m", "pre_commit", "try-repo", str(ROOT), "archlint",
                   "--files", *files)  # fmt: skip

    assert run("git", "init", "--quiet").returncode == 0
    shutil.copy(FIXTURE, repository / "model.onnx")
    (repository / "notes.txt").write_text("no model\n")
    assert run("git", "add", ".").returncode == 0
    stopped = hook("model.onnx", "notes.txt")
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    assert "ARC101" in stopped.stdout
    passed = hook("notes.txt")
    assert passed.returncode == 0, passed.stdout + passed.stderr
    assert "Skipped" in passed.stdout
