"""The tests of single operators that ship with onnx: each file loads and has the right shapes.

Every node test is read twice: as it is, and with the inputs that steer an operator (axes, sizes,
scales) as initializers, which is how exporters write them.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import pytest
from onnx.backend.test.loader import load_model_tests

from archlint.errors import ArchlintError
from archlint.graph.from_onnx import load_onnx
from archlint.graph.model import LayerGraph, verify

CHUNKS = 8

# Operators without a counterpart in the vocabulary, by why they have none.
OUTSIDE = {
    # losses and steps of an optimizer: no part of the network
    "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss",
    "ai.onnx.preview.training.Adagrad", "ai.onnx.preview.training.Adam",
    "ai.onnx.preview.training.Momentum",
    # signal processing and images
    "DFT", "STFT", "MelWeightMatrix", "ImageDecoder", "AffineGrid", "RoiAlign", "CenterCropPad",
    "HannWindow", "HammingWindow", "BlackmanWindow",
    # bits, text, sequences, optional values
    "BitCast", "BitShift", "TfIdfVectorizer", "StringConcat", "StringSplit", "StringNormalizer",
    "RegexFullMatch", "SequenceAt", "SequenceInsert", "SequenceLength", "SequenceMap",
    "SplitToSequence", "OptionalGetElement", "OptionalHasElement",
    # seldom seen in networks, or newer than any exporter
    "DeformConv", "Det", "LinearAttention", "CausalConvWithState", "TensorScatter",
    "ai.onnx.preview.FlexAttention",
}  # fmt: skip

# Operators of the vocabulary that stay unknown in one form only.
PARTLY = {
    "Attention",  # with its logits as an output, or over a window or keys of given lengths
    "Cast",  # to 2-bit integers and to bare exponents
    "CumProd",  # exclusive or backwards
    "MaxPool",  # with indices that count down the columns
    "Resize",  # of samples or channels, or of a region
    "MaxUnpool",  # with an output size of its own
    "Scan",  # of opset 8
    "Unsqueeze", "Squeeze", "Split", "Concat",  # of the rank that AffineGrid's size decides
}  # fmt: skip

STEERING = ("scales", "roi", "values", "depth", "sizes")


class Case(NamedTuple):
    name: str
    model: onnx.ModelProto
    inputs: list[Any]
    outputs: list[Any]


@cache
def _cases() -> list[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # casts and divisions that overflow on purpose
        tests = load_model_tests(kind="node")
    return [Case(t.name, t.model, *(t.data_sets[0] if t.data_sets else ([], []))) for t in tests]


@cache
def _stored() -> list[Case]:
    """Tests that onnx ships as files: operators as PyTorch once exported them."""
    found = []
    for kind in ("pytorch-converted", "pytorch-operator", "simple"):
        for test in load_model_tests(kind=kind):
            folder = Path(test.model_dir)
            data = folder / "test_data_set_0"
            model = onnx.load(folder / "model.onnx")
            inputs, outputs = (list(_tensors(data, stem)) for stem in ("input", "output"))
            found.append(Case(f"{kind}/{test.name}", model, inputs, outputs))
    return found


def _tensors(folder: Path, stem: str) -> Iterator[Any]:
    for i in range(len(list(folder.glob(f"{stem}_*.pb")))):
        tensor = onnx.TensorProto()
        try:
            tensor.ParseFromString((folder / f"{stem}_{i}.pb").read_bytes())
            yield onnx.numpy_helper.to_array(tensor)
        except Exception:  # a sequence or a map
            yield None


def _steered(case: Case) -> onnx.ModelProto:
    """The model with integers and other steering inputs as initializers, but for the first one."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    kept = []
    for info, given in zip(model.graph.input, case.inputs, strict=False):
        array = None if given is None or isinstance(given, list | dict) else np.asarray(given)
        named = info.name in STEERING or info.name.endswith("_scale")
        if kept and array is not None and (array.dtype.kind in "iub" or named):
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, info.name))
        else:
            kept.append(info)
    del model.graph.input[:]
    model.graph.input.extend(kept)
    return model


def _has_an_empty_input(case: Case) -> bool:
    """A declared size of 0 counts as free: exporters write it for an unknown size."""
    return any(
        d.HasField("dim_value") and d.dim_value == 0
        for info in case.model.graph.input
        for d in info.type.tensor_type.shape.dim
    )


def _load(model: onnx.ModelProto, folder: Path) -> LayerGraph | None:
    """The verified graph; None where the file is refused as one of classical models."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    try:
        return verify(load_onnx(path))
    except ArchlintError:
        if all(node.domain == "ai.onnx.ml" for node in model.graph.node):
            return None
        raise


def _misfit(graph: LayerGraph, case: Case) -> str | None:
    """How an output's static shape contradicts the expected output; None where it fits."""
    for id, output in zip(graph.outputs, case.outputs, strict=False):
        if not isinstance(output, np.ndarray | np.generic):
            continue
        shape, wanted = graph.shape(id), output.shape
        if shape is None:
            continue
        if len(shape) != len(wanted) or any(
            n not in (None, m) for n, m in zip(shape, wanted, strict=True)
        ):
            return f"{case.name}: {shape} instead of {wanted}"
    return None


def _problems(cases: list[Case], folder: Path, steered: bool) -> list[str]:
    found = []
    for case in cases:
        try:
            graph = _load(_steered(case) if steered else case.model, folder)
        except Exception as error:  # every failure is wanted, not the first one
            found.append(f"{case.name}: {type(error).__name__}: {error}")
            continue
        if graph is None or _has_an_empty_input(case):
            continue
        if problem := _misfit(graph, case):
            found.append(problem)
    return found


@pytest.mark.parametrize("steered", [False, True], ids=["as-is", "steered"])
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_node_tests_load_with_the_right_shapes(chunk: int, steered: bool, tmp_path: Path) -> None:
    cases = _cases()[chunk::CHUNKS]
    assert len(cases) > 200
    assert not _problems(cases, tmp_path, steered)


def test_stored_operators_load_with_the_right_shapes(tmp_path: Path) -> None:
    assert len(_stored()) > 100
    assert not _problems(_stored(), tmp_path, steered=False)


def _is_floating(case: Case) -> bool:
    """Whether a test computes floats from floats."""
    pair = [values[0] for values in (case.inputs, case.outputs) if values]
    return len(pair) == 2 and all(
        isinstance(v, np.ndarray) and v.dtype.kind == "f" for v in pair
    )  # fmt: skip


def test_share_of_node_tests_in_the_vocabulary(tmp_path: Path) -> None:
    unknown: Counter[str] = Counter()
    known = floating = static = 0
    for case in _cases():
        graph = _load(_steered(case), tmp_path)
        if graph is None:
            continue
        ops = {node.source_op for node in graph.walk() if not node.known}
        unknown.update(ops)
        if not _is_floating(case):
            continue
        floating += 1
        known += not ops
        shape = graph.shape(graph.outputs[0])
        static += shape is not None and None not in shape
    print(f"{known} of {floating} float node tests in the vocabulary: {known / floating:.1%}")
    print(f"{static} of {floating} first outputs with a static shape: {static / floating:.1%}")
    print("not in the vocabulary:", ", ".join(f"{op} {n}" for op, n in unknown.most_common()))
    assert set(unknown) <= OUTSIDE | PARTLY
    assert floating > 900
    assert known / floating >= 0.87
    assert static / floating >= 0.97
