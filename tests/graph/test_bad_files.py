"""What users hand in by mistake, and what nobody should: one clear line, nothing else."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from archlint.errors import ArchlintError
from archlint.graph.from_onnx import load_onnx
from archlint.graph.model import verify
from archlint.graph.onnx_reader.wire import field
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


def test_attributes_without_a_type_are_read_by_what_is_filled(tmp_path: Path) -> None:
    """As files before IR version 2 have them; an empty one is left to the default."""
    kernel = numpy_helper.from_array(np.ones((4, 2, 3, 3), np.float32), "w")
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=2, strides=[2, 2], pads=[1, 1, 1, 1])
    for a in node.attribute:
        a.ClearField("type")
    node.attribute.add(name="dilations")
    graph = verify(load_onnx(raw(tmp_path / "m.onnx", graph_of([node], [kernel], [1, 4, 8, 8]))))
    (conv,) = graph.nodes
    assert conv.op == "conv"
    assert (conv.attributes["groups"], conv.attributes["stride"]) == (2, (2, 2))
    assert conv.attributes["dilation"] == (1, 1)


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
    assert analysis.coverage.unmodelled == {"org.example.Frobnicate": 1}
    assert analysis.coverage.cut_off == 1


def test_weights_of_repeated_numbers_take_no_memory(tmp_path: Path) -> None:
    """A few bytes promise half a terabyte of ones, and as much again computed from them."""
    sizes = numpy_helper.from_array(np.array([4, 1 << 35], np.int64), "sizes")
    ones = numpy_helper.from_array(np.ones(1, np.float32))
    nodes = [
        helper.make_node("ConstantOfShape", ["sizes"], ["w"], value=ones),
        helper.make_node("Exp", ["w"], ["e"]),
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("MatMul", ["x", "e"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["y"]),
    ]
    graph = verify(load_onnx(raw(tmp_path / "m.onnx", graph_of(nodes, [sizes]))))
    laws = {p.name: p.law for p in graph.parameters.values()}
    assert laws["w"] is not None
    assert laws["w"].mean == 1
    assert laws["e"] is not None
    assert laws["e"].family == "unknown"


@pytest.mark.parametrize("indices", [[16], [-1], [0, 1]])
def test_sparse_tensors_with_positions_outside(tmp_path: Path, indices: list[int]) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "w")
    where = numpy_helper.from_array(np.array(indices, np.int64), "where")
    model = graph_of(MATMUL, [])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, where, [4, 4]))
    assert "outside" in refusal(raw(tmp_path / "m.onnx", model)).message


def nested(depth: int, known: bool) -> bytes:
    """A model of ``depth`` conditions within each other, written without protobuf's own limit."""
    leaf = helper.make_graph([helper.make_node("Tanh", ["x"], ["o"])], "b", [],
                             [helper.make_tensor_value_info("o", TensorProto.FLOAT, None)],
                             )  # fmt: skip
    flat = helper.make_node("If", ["c"], ["o"], else_branch=leaf).SerializeToString()
    shell = helper.make_graph([], "b", [], leaf.output).SerializeToString()
    graph = leaf.SerializeToString()
    for _ in range(depth):
        branch = onnx.AttributeProto(name="then_branch", type=onnx.AttributeProto.GRAPH)
        node = flat + field(5, branch.SerializeToString() + field(6, graph))
        graph = shell + field(1, node)
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    outer = graph_of([], [numpy_helper.from_array(np.array(True), "c")] if known else [])
    del outer.graph.output[:]
    if not known:
        outer.graph.input.append(condition)
    whole = field(7, outer.graph.SerializeToString() + graph)
    outer.ClearField("graph")
    return outer.SerializeToString() + whole


@pytest.mark.parametrize("known", [True, False])
def test_nested_branches(tmp_path: Path, known: bool) -> None:
    """protobuf reads a hundred messages within each other, three to a branch."""
    path = tmp_path / "deep.onnx"
    path.write_bytes(nested(31, known))
    graph = verify(load_onnx(path))
    assert sum(node.op == "tanh" for node in graph.nodes) == (1 if known else 32)
    for depth in (33, 500):
        path.write_bytes(nested(depth, known))
        assert "nests bodies" in refusal(path).message


def test_a_long_chain_whose_length_underflows(tmp_path: Path) -> None:
    analysis = analyse(load_onnx(chain(4000, tmp_path / "chain.onnx")))
    assert analysis.coverage.unmodelled == {}


def mutations(count: int, seed: int, files: list[Path], seconds: float) -> None:
    """In a process of its own: a crash, a hang and a flood of memory are failures as well."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.graph.mutate", "0", str(count), str(seed), *map(str, files)],
        capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-4000:]}\nthe last: {done.stderr[-200:]}"


def test_random_bytes_never_escape(real_files: Mapping[str, Path]) -> None:
    """A sample of what the study below does, of small files."""
    files = [path for path in real_files.values() if path.stat().st_size < 300_000]
    mutations(40, 1, [FIXTURE, *files], 250)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_two_thousand_mutations_of_real_files(real_files: Mapping[str, Path]) -> None:
    mutations(2000, 2, [FIXTURE, *real_files.values()], 7000)


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        (helper.make_node("Transpose", ["x"], ["y"], perm=[0, 5]), [2, 4]),
        (helper.make_node("Concat", ["x", "x"], ["y"], axis=9), [2, 4]),
        (helper.make_node("LRN", ["x"], ["y"]), [1, 4, 8, 8]),
        (helper.make_node("LRN", ["x"], ["y"], size=2.5), [1, 4, 8, 8]),
        (helper.make_node("Conv", ["x", "w"], ["y"], strides=[0, 0]), [1, 4, 8, 8]),
        (helper.make_node("Conv", ["x", "w"], ["y"], group=0), [1, 4, 8, 8]),
        (helper.make_node("Einsum", ["x", "x"], ["y"], equation="ab->c->"), [2, 4]),
        (helper.make_node("Relu", [], ["y"]), [2, 4]),
        (helper.make_node("Relu", [""], ["y"]), [2, 4]),
    ],
)
def test_nodes_that_cannot_be_are_unknown(
    tmp_path: Path, node: onnx.NodeProto, shape: list[int]
) -> None:
    kernel = numpy_helper.from_array(np.ones((4, 4, 3, 3), np.float32), "w")
    model = graph_of([node], [kernel] if "w" in node.input else [], shape)
    analysis = analyse(verify(load_onnx(raw(tmp_path / "m.onnx", model))))
    assert analysis.coverage.unmodelled == {node.op_type: 1}
