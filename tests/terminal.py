"""Running the command line: in this process, which is quick, or as a user does."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from archlint.cli import main

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Done:
    """What a run left."""

    code: int
    out: str
    err: str


def run_here(folder: Path, *args: object) -> Done:
    """``archlint args`` in this process, in a folder, with the modules that it imports forgotten
    afterwards."""
    out, err = io.StringIO(), io.StringIO()
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["archlint", *map(str, args)])
    patch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        patch.undo()
        for name in set(sys.modules) - before:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).is_relative_to(folder):
                del sys.modules[name]
    return Done(code, out.getvalue(), err.getvalue())


def run(folder: Path, *args: object, **env: str) -> Done:
    """``archlint args`` as a process of its own, in a folder."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "archlint", *map(str, args)],
        capture_output=True, text=True, cwd=folder, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": path, **env},
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def write(folder: Path, name: str, text: str) -> Path:
    """A file of a project, its folders made."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
