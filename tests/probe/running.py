"""Run a layer graph and onnxruntime on the same file and the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch

from archlint.graph.model import LayerGraph
from archlint.probe.execute import Program, as_tensor, load_parameters


def run_graph(
    graph: LayerGraph, feeds: Mapping[str, Any], real: torch.dtype | None = None
) -> list[Any]:
    """The outputs of a layer graph with the parameters that its file holds."""
    program = Program(graph, real)
    parameters = load_parameters(program.parameters, real)
    inputs = {
        id: as_tensor(feeds[id], real if np.asarray(feeds[id]).dtype.kind == "f" else None)
        for id in graph.inputs
    }
    with torch.no_grad():
        found = program.run(parameters, inputs)
    every = [found[id] for id in graph.outputs]
    return [(t.float() if t.dtype == torch.bfloat16 else t).numpy() for t in every]


def run_onnxruntime(path: Path, feeds: Mapping[str, Any]) -> list[Any]:
    """What onnxruntime computes, without optimizations; BatchNorm as in evaluation."""
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            for a in node.attribute:
                if a.name == "training_mode":
                    a.i = 0
            del node.output[1:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[Any] = session.run(None, dict(feeds))
    return found


def error(ours: Any, theirs: Any) -> float:
    """The greatest difference, relative to the greatest element; infinite where shapes differ.

    Infinities and NaN must be at the same places.
    """
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    if ours.shape != theirs.shape:
        return float("inf")
    if ours.size == 0:
        return 0.0
    a, b = ours.astype(np.complex128), theirs.astype(np.complex128)
    finite = np.isfinite(b)
    if not np.array_equal(finite, np.isfinite(a)) or not np.array_equal(
        a[~finite], b[~finite], equal_nan=True
    ):
        return float("inf")
    if not finite.any():
        return 0.0
    scale = np.abs(b[finite]).max() or 1.0
    return float(np.abs(a[finite] - b[finite]).max() / scale)
