"""Public real ONNX files: they load, are understood, and have the shapes that onnxruntime finds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from archlint.config import Config
from archlint.finding import Severity
from archlint.graph.from_onnx import load_onnx
from archlint.graph.model import LayerGraph, verify
from archlint.linter import chosen_rules, lint
from archlint.signal.analysis import Coverage, analyse, coverage
from archlint.signal.propagate import propagate

from .conftest import ROOT, load_script

EXPECTED: dict[str, dict[str, Any]] = load_script(ROOT / "fixtures/real/expect.py").expected()
FILES = sorted(EXPECTED)
FLOAT_FILES = [name for name in FILES if "int8" not in name]

# Values of integer inputs that steer a network rather than being its data.
STEERING: Mapping[str, int] = {"sr": 16000}

# Files that onnxruntime refuses to run with the sizes that the loader assumes, with its reason.
NOT_RUN: Mapping[str, str] = {}

MOST_ELEMENTS = 30_000_000  # of all intermediate values that one run is asked for
MOST_BYTES = 6_000_000  # of a file whose intermediate values are compared too

real = pytest.mark.parametrize("name", FILES)


@cache
def _loaded(path: Path) -> LayerGraph:
    return load_onnx(path)


@cache
def _coverage(path: Path) -> Coverage:
    graph = _loaded(path)
    return coverage(graph, propagate(graph))


def test_every_file_has_an_expected_result(real_files: Mapping[str, Path]) -> None:
    assert sorted(real_files) == FILES


@real
def test_loads_and_keeps_the_invariants(name: str, real_files: Mapping[str, Path]) -> None:
    graph = verify(_loaded(real_files[name]))
    assert graph.nodes
    assert graph.outputs


@real
def test_verdict_on_the_weights(name: str, real_files: Mapping[str, Path]) -> None:
    graph = _loaded(real_files[name])
    assert graph.weights == EXPECTED[name]["weights"], graph.weights_evidence
    # onnx ships topologies whose weights are drawn anew; every other package ships trained ones
    assert graph.weights == ("initial" if "/light/" in name else "trained")
    assert graph.weights_evidence


@real
def test_coverage_of_a_file(name: str, real_files: Mapping[str, Path]) -> None:
    found, wanted = _coverage(real_files[name]), EXPECTED[name]
    assert dict(found.unmodelled) == wanted["unmodelled"]
    assert found.cut_off <= wanted["cut_off"]
    # Joining nodes to patterns changes the count a little; a part of the graph lost does more.
    assert found.nodes == pytest.approx(wanted["nodes"], rel=0.05)


def test_coverage_of_all_files(real_files: Mapping[str, Path]) -> None:
    found = {name: _coverage(real_files[name]) for name in FILES}
    nodes = sum(c.nodes for c in found.values())
    modelled = sum(c.modelled for c in found.values())
    assert modelled / nodes >= 0.995
    shares = {name: found[name].modelled / found[name].nodes for name in FLOAT_FILES}
    worst = min(shares, key=lambda name: shares[name])
    assert shares[worst] >= 0.97, worst


@real
def test_no_file_is_said_not_to_train(name: str, real_files: Mapping[str, Path]) -> None:
    """Networks that were trained, and topologies of some that were."""
    findings, _ = lint(analyse(_loaded(real_files[name])), chosen_rules(Config()))
    assert not [f.message for f in findings if f.severity is Severity.ERROR]


# --------------------------------------------------------------------------- a real run


def _feeds(graph: LayerGraph) -> dict[str, Any]:
    """Random numbers of the sizes that the loader assumed; ones for integers."""
    random = np.random.default_rng(0)
    feeds = {}
    for id in graph.inputs:
        value = graph.values[id]
        assert value.shape is not None
        assert value.dtype is not None
        assert None not in value.shape, f"the input {id} has an unbound dimension"
        shape = tuple(n for n in value.shape if n is not None)
        if value.dtype.startswith("float"):
            feeds[id] = random.standard_normal(shape).astype(value.dtype)
        else:
            feeds[id] = np.full(shape, STEERING.get(id, 1), value.dtype)
    return feeds


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    """The names of all values that nodes compute, those in bodies included."""
    for node in graph.node:
        yield from node.output
        for a in node.attribute:
            for body in [a.g] if a.HasField("g") else a.graphs:
                yield from _names(body)


def _intermediate(model: onnx.ModelProto, graph: LayerGraph) -> list[str]:
    """Real-valued intermediate values that the layer graph still has, within reason."""
    count = Counter(_names(model.graph))
    given = {output.name for output in model.graph.output}
    chosen, elements = [], 0
    for node in model.graph.node:
        for name in node.output:
            value = graph.values.get(name)
            # A name that a body uses too may stand for another value in the layer graph.
            if value is None or name in given or count[name] > 1 or name not in graph.producer:
                continue
            if value.shape is None or "float" not in (value.dtype or ""):
                continue
            elements += math.prod(n or 1 for n in value.shape)
            if elements > MOST_ELEMENTS:
                return chosen
            chosen.append(name)
    return chosen


def _run(path: Path, graph: LayerGraph) -> dict[str, Any]:
    """What onnxruntime computes: the outputs, and of small files the values between."""
    model = onnx.load(path)
    outputs = [output.name for output in model.graph.output]
    if path.stat().st_size <= MOST_BYTES:
        for name in _intermediate(model, graph):
            model.graph.output.append(onnx.ValueInfoProto(name=name))
            outputs.append(name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip(outputs, session.run(outputs, _feeds(graph)), strict=True))


@real
def test_shapes_are_those_of_a_real_run(name: str, real_files: Mapping[str, Path]) -> None:
    graph = _loaded(real_files[name])
    if name in NOT_RUN:
        with pytest.raises(Exception, match=NOT_RUN[name]):
            _run(real_files[name], graph)
        return
    found = _run(real_files[name], graph)
    declared = [output.name for output in onnx.load(real_files[name]).graph.output]
    for id, output in zip(graph.outputs, declared, strict=True):
        shape, real_shape = graph.shape(id), found[output].shape
        assert shape is not None, f"the rank of the output {output} is unknown"
        assert shape == real_shape, f"output {output}"
        assert graph.values[id].dtype == found[output].dtype.name, f"output {output}"
    wrong = {
        value: (shape, found[value].shape)
        for value in found
        if value not in declared and (shape := graph.shape(value)) is not None
        and (len(shape) != found[value].ndim
             or any(n not in (None, m) for n, m in zip(shape, found[value].shape, strict=True)))
    }  # fmt: skip
    assert not wrong
