"""What users hand in by mistake, and what nobody should: one clear line, nothing else."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from archlint.errors import ArchlintError
from archlint.graph.from_onnx import load_onnx
from archlint.graph.model import verify
from archlint.signal.analysis import analyse
from archlint.target import resolve
from tests.benchmarks.bench_chain import chain
from tests.conftest import ROOT

FIXTURE = ROOT / "fixtures" / "arc101_length_drift" / "bad_mlp30.onnx"


def refusal(path: Path) -> ArchlintError:
    with pytest.raises(ArchlintError) as caught:
        load_onnx(resolve(path).path)
    error = caught.value
    assert "\n" not in error.message
    assert error.hint
    return error


def graph_of(
    nodes: list[onnx.NodeProto], weights: list[onnx.TensorProto], shape: list[int] | None = None
) -> onnx.ModelProto:
    last = nodes[-1].output[0] if nodes else "x"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape or [2, 4])]
    outputs = [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)]
    return helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, weights))


def raw(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def matrix(name: str = "w", **changes: object) -> onnx.TensorProto:
    values = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    tensor = numpy_helper.from_array(values, name)
    for key, value in changes.items():
        setattr(tensor, key, value)
    return tensor


MATMUL = [helper.make_node("MatMul", ["x", "w"], ["y"])]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.onnx", b"", "empty"),
        ("text.onnx", b"hello, this is a text file\n" * 20, ""),
        ("pointer.onnx", b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64
         + b"\nsize 1234\n", "LFS"),
        ("pickled.onnx", pickle.dumps({"weight": [1.0] * 50}), ""),
        ("model.pt", b"PK\x03\x04", "pickled"),
        ("model.pth", pickle.dumps([1]), "pickled"),
        ("zero.onnx", b"\0" * 4096, ""),
    ],
)  # fmt: skip
def test_files_that_are_no_model(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert said.lower() in refusal(path).message.lower()


def test_missing_file_and_folder(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing.onnx").message
    assert "folder" in refusal(tmp_path).message


def test_truncated_at_fifty_places(tmp_path: Path) -> None:
    whole = FIXTURE.read_bytes()
    path = tmp_path / "cut.onnx"
    for i in range(1, 51):
        path.write_bytes(whole[: len(whole) * i // 51])
        refusal(path)


@pytest.mark.parametrize(
    ("location", "offset", "length"),
    [
        ("missing.bin", 0, 64),
        ("/etc/passwd", 0, 64),
        ("../outside.bin", 0, 64),
        ("link.bin", 0, 64),
        ("short.bin", 0, 64),
        ("short.bin", -8, 64),
        ("short.bin", 0, 1 << 60),
    ],
)
def test_external_data(tmp_path: Path, location: str, offset: int, length: int) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside.bin").write_bytes(b"\0" * 64)
    (folder / "short.bin").write_bytes(b"\0" * 10)
    os.symlink(tmp_path / "outside.bin", folder / "link.bin")
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 4])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))
    refusal(raw(folder / "model.onnx", graph_of(MATMUL, [tensor])))


@pytest.mark.parametrize("dims", [[1 << 40, 1 << 40], [1 << 62, 4], [-1, 4], [4, 1 << 31]])
def test_sizes_that_promise_too_much(tmp_path: Path, dims: list[int]) -> None:
    tensor = matrix()
    del tensor.dims[:]
    tensor.dims.extend(dims)
    refusal(raw(tmp_path / "m.onnx", graph_of(MATMUL, [tensor])))


def test_cycles_duplicates_missing_inputs(tmp_path: Path) -> None:
    cases: dict[str, list[onnx.NodeProto]] = {
        "cycle": [
            helper.make_node("Add", ["x", "b"], ["a"]),
            helper.make_node("Relu", ["a"], ["b"]),
        ],
        "twice": [helper.make_node("Relu", ["x"], ["a"]), helper.make_node("Tanh", ["x"], ["a"])],
        "missing": [helper.make_node("MatMul", ["x", "nowhere"], ["y"])],
    }  # fmt: skip
    for name, nodes in cases.items():
        refusal(raw(tmp_path / f"{name}.onnx", graph_of(nodes, [])))


def test_classical_models_are_named(tmp_path: Path) -> None:
    node = helper.make_node("TreeEnsembleRegressor", ["x"], ["y"], domain="ai.onnx.ml")
    assert "no neural network" in refusal(raw(tmp_path / "t.onnx", graph_of([node], []))).message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float) -> None:
    """They are reported where they are; the rest is analysed."""
    values = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    values[3, 5] = value
    weights = [numpy_helper.from_array(values, "broken")]
    model = graph_of([helper.make_node("MatMul", ["x", "broken"], ["y"])], weights, [2, 64])
    graph = verify(load_onnx(raw(tmp_path / "m.onnx", model)))
    assert any("broken" in note for note in graph.notes), graph.notes


def test_unknown_operators_are_counted(tmp_path: Path) -> None:
    nodes = [helper.make_node("Frobnicate", ["x"], ["a"], domain="org.example"),
             helper.make_node("Relu", ["a"], ["y"])]  # fmt: skip
    analysis = analyse(verify(load_onnx(raw(tmp_path / "m.onnx", graph_of(nodes, [])))))
    assert analysis.coverage.unmodelled == {"Frobnicate": 1}
    assert analysis.coverage.cut_off == 1


def test_nested_branches_500_deep(tmp_path: Path) -> None:
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["o"])], "b", [],
                             [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
                             )  # fmt: skip
    for i in range(500):
        node = helper.make_node("If", ["c"], ["o"], then_branch=body, else_branch=body)
        if i > 12:  # both branches alike would double the file at every level
            node = helper.make_node("If", ["c"], ["o"], then_branch=body, else_branch=_leaf())
        body = helper.make_graph([node], "b", [], body.output)
        if i > 90:
            break  # protobuf itself reads no more than a hundred levels
    model = graph_of(list(body.node), [numpy_helper.from_array(np.array(True), "c")])
    _works_or_refuses(lambda: raw(tmp_path / "deep.onnx", model))


def _leaf() -> onnx.GraphProto:
    return helper.make_graph([helper.make_node("Tanh", ["x"], ["o"])], "l", [],
                             [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
                             )  # fmt: skip


def _works_or_refuses(make: Callable[[], Path]) -> None:
    try:
        verify(load_onnx(make()))
    except ArchlintError as error:
        assert error.hint  # noqa: PT017


def test_a_long_chain_whose_length_underflows(tmp_path: Path) -> None:
    analysis = analyse(load_onnx(chain(4000, tmp_path / "chain.onnx")))
    assert analysis.coverage.unmodelled == {}


def test_random_bytes_never_escape(tmp_path: Path) -> None:
    """Mutated files end in a graph that holds or in one clear line."""
    rng = np.random.default_rng(7)
    whole = np.frombuffer(
        raw(tmp_path / "s.onnx", graph_of(MATMUL, [matrix()])).read_bytes(), np.uint8
    )
    path = tmp_path / "m.onnx"
    for _ in range(300):
        data = whole.copy()
        kind, at = rng.integers(4), int(rng.integers(data.size))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            n = int(rng.integers(1, 16))
            data[at : at + n] = rng.integers(0, 256, data[at : at + n].size, dtype=np.uint8)
        elif kind == 2:
            data = np.delete(data, slice(at, at + int(rng.integers(1, 8))))
        else:
            data = np.insert(
                data, at, rng.integers(0, 256, int(rng.integers(1, 8)), dtype=np.uint8)
            )
        path.write_bytes(data.tobytes())
        try:
            analyse(verify(load_onnx(path)))
        except ArchlintError as error:
            assert "\n" not in error.message  # noqa: PT017
