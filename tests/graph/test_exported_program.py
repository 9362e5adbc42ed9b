"""Exported programs: read as they are, and nothing in a file is ever run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from archlint.errors import ArchlintError
from archlint.graph.exported_program import _is_arithmetic, load_program
from archlint.graph.from_torch import load_torch


class Branchy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.table = nn.Linear(8, 8), nn.Embedding(20, 8)
        self.register_buffer("steps", torch.arange(8.0))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.fc(x).reshape(x.shape[0] * x.shape[1], 8) + self.steps


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "m.pt2"
    ids = torch.randint(0, 20, (4, 6))
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", max=128)}
    torch.export.save(torch.export.export(Branchy(), (ids,), dynamic_shapes=(sizes,)), path)
    return path


def test_a_program_with_symbolic_sizes(program: Path) -> None:
    graph = load_torch(load_program(program))
    assert set(graph.parameters) >= {"fc.weight", "table.weight"}
    assert [n.op for n in graph.nodes if n.module in ("fc", "table")] == ["embedding", "linear"]


class Evil:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, (f"touch {self.path}",)


def changed(program: Path, into: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """The archive with its parts changed."""
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(into, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return into


def edited(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.mark.parametrize(
    "kind", ["weights", "inputs", "legacy", "size", "symbol", "operator", "argument", "opaque"]
)
def test_nothing_in_a_file_is_run(program: Path, tmp_path: Path, kind: str) -> None:
    trace = tmp_path / "trace"
    evil = pickle.dumps(Evil(trace))
    call = f"__import__('os').system('touch {trace}')"

    def change(name: str, data: bytes) -> bytes:
        text = data.decode(errors="replace")
        if kind == "inputs" and name.endswith("sample_inputs/model.pt"):
            return evil
        if kind == "weights" and name.endswith("weights_config.json"):
            return edited(text, '"use_pickle": false', '"use_pickle": true').encode()
        if kind == "weights" and name.endswith("weight_0"):
            return evil
        if name.endswith("models/model.json"):
            document = json.dumps(json.loads(text))
            if kind == "size":
                start = document.index('"expr_str": "') + len('"expr_str": "')
                end = document.index('"', start)
                return (document[:start] + call + document[end:]).encode()
            if kind == "symbol":
                return edited(document, "Symbol('s", f'Symbol(\\"{call}\\"+\'s').encode()
            if kind == "operator":
                return edited(document, "torch.ops.aten.linear.default", "torch.os.system").encode()
            if kind == "argument":
                return edited(document, '{"as_tensor":', '{"as_operator": "torch.os.system", "x":'
                              ).encode()  # fmt: skip
        return data

    file = changed(program, tmp_path / "m.pt2", change)
    if kind in ("legacy", "opaque"):
        with zipfile.ZipFile(file, "a") as archive:
            root = archive.namelist()[0].partition("/")[0]
            where = "weights/model.pt" if kind == "legacy" else "constants/opaque_obj_0"
            archive.writestr(f"{root}/data/{where}", evil)
    with pytest.raises(ArchlintError) as error:
        load_torch(load_program(file))
    assert "\n" not in error.value.message
    assert error.value.hint
    assert not trace.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x03\x04",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"\x80\x02.",
        b"x" * 4096,
    ],
)
def test_files_that_are_no_program(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "m.pt2"
    file.write_bytes(content)
    with pytest.raises(ArchlintError, match="is no exported program"):
        load_program(file)


def test_files_cut_short(program: Path, tmp_path: Path) -> None:
    data = program.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.99):
        file = tmp_path / "m.pt2"
        file.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ArchlintError):
            load_program(file)
    with zipfile.ZipFile(tmp_path / "z.pt2", "w") as archive:
        archive.writestr("a.txt", "no program")
    with pytest.raises(ArchlintError):
        load_program(tmp_path / "z.pt2")
    with pytest.raises(ArchlintError, match="does not exist"):
        load_program(tmp_path / "gone.pt2")


def test_expressions_of_sizes() -> None:
    for text in ("s0", "2*s0 + 1", "Mul(Integer(2), Symbol('s77', positive=True, integer=True))",
                 "FloorDiv(s0, 2)", "Eq(Mod(s0, 8), 0)", "s0 >= 2", "-int_oo"):  # fmt: skip
        assert _is_arithmetic(text), text
    for text in ("__import__('os')", "open('x')", "s0.__class__", "(lambda: 0)()", "Symbol('a b')",
                 "S('x')", "Integer('3')", "f(1)", "[s0]", "s0[0]", "Symbol('a')('b')",
                 "a if b else c",
                 "Symbol(Symbol('x') + 'y')", "", "(" * 500):  # fmt: skip
        assert not _is_arithmetic(text), text
