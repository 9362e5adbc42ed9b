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
    """What onnxruntime computes, without optimizations: BatchNorm as in evaluation, activations
    not rounded to 8 bits on the way."""
    model = real_valued(onnx.load(path))
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


# --------------------------------------------------------------------------- without 8 bits


def real_valued(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its dynamically quantised operators as the real-valued ones they stand for:
    weights of 8 bits, activations as they are."""
    graph = model.graph
    known = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    nodes: list[onnx.NodeProto] = []

    def add(name: str, array: Any) -> str:
        graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def shifted(node: onnx.NodeProto, i: int, zero: int) -> str:
        """Input i as a real number minus its zero point."""
        x = node.input[i]
        if x in known:
            point = known[node.input[zero]] if len(node.input) > zero else 0
            return add(f"{node.output[0]}:{i}", known[x].astype(np.float32) - point)
        return x  # an activation: its zero point is zero

    for node in graph.node:
        out = node.output[0] if node.output else ""
        if node.op_type == "DynamicQuantizeLinear":
            nodes.append(onnx.helper.make_node("Identity", node.input, [out]))
            add(node.output[1], np.float32(1))
            add(node.output[2], np.float32(0))
        elif node.op_type == "MatMulInteger":
            pair = [shifted(node, 0, 2), shifted(node, 1, 3)]
            nodes.append(onnx.helper.make_node("MatMul", pair, [out]))
        elif node.op_type == "DynamicQuantizeLSTM":
            weights = []
            for i, scale, zero in ((1, 8, 9), (2, 10, 11)):
                factor, point = (
                    known[node.input[k]].astype(np.float32).reshape(known[node.input[i]].shape[0],
                                                                    1, -1)
                    for k in (scale, zero)
                )  # fmt: skip
                real = (known[node.input[i]].astype(np.float32) - point) * factor
                weights.append(add(f"{out}:{i}", np.swapaxes(real, 1, 2).copy()))
            inputs = [node.input[0], *weights, *node.input[3:8]]
            lstm = onnx.helper.make_node("LSTM", inputs, node.output)
            lstm.attribute.extend(node.attribute)
            nodes.append(lstm)
        else:
            nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    return model
