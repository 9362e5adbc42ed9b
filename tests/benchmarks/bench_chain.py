"""Chains of 1,000 to 100,000 nodes: seconds to read and to analyse, and per node.

Run as ``python tests/benchmarks/bench_chain.py``; the cost a node must not grow. With
``--propagation``: residual blocks of 100 to 100,000 nodes, processor seconds of the signals alone,
forward and backward; 5,000 nodes must not take more than 1.5 s.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from archlint.graph.from_onnx import load_onnx
from archlint.signal.analysis import analyse
from archlint.signal.backpropagate import gradients
from archlint.signal.propagate import propagate

LIMIT = 1.5  # processor seconds for 5,000 nodes


def chain(length: int, path: Path) -> Path:
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.standard_normal((8, 8)).astype(np.float32) / 2, "w")
    bias = numpy_helper.from_array(np.zeros(8, np.float32), "b")
    nodes, at = [], "x"
    for i in range(length):
        op, more = [("MatMul", ["w"]), ("Relu", []), ("Add", ["b"]), ("Tanh", [])][i % 4]
        nodes.append(helper.make_node(op, [at, *more], [f"v{i}"]))
        at = f"v{i}"
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])]
    outputs = [helper.make_tensor_value_info(at, TensorProto.FLOAT, [2, 8])]
    graph = helper.make_graph(nodes, "chain", inputs, outputs, [weight, bias])
    onnx.save(helper.make_model(graph), path)
    return path


def residual(length: int, path: Path) -> Path:
    """Blocks x + tanh(W₂·GELU(W₁·norm(x))) with biases: six nodes each once read."""
    rng = np.random.default_rng(0)
    held = {name: rng.standard_normal((16, 16)).astype(np.float32) / 4 for name in ("w1", "w2")}
    held |= {name: np.zeros(16, np.float32) for name in ("b1", "b2", "shift")}
    held["scale"] = np.ones(16, np.float32)
    nodes, at = [], "x"
    for i in range(length // 6):
        start = at
        for op, more in (("LayerNormalization", ["scale", "shift"]), ("MatMul", ["w1"]),
                         ("Add", ["b1"]), ("Gelu", []), ("MatMul", ["w2"]), ("Add", ["b2"]),
                         ("Tanh", []), ("Add", [start])):  # fmt: skip
            nodes.append(helper.make_node(op, [at, *more], [f"v{len(nodes)}"], name=f"n{i}"))
            at = nodes[-1].output[0]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8, 16])]
    outputs = [helper.make_tensor_value_info(at, TensorProto.FLOAT, [2, 8, 16])]
    weights = [numpy_helper.from_array(array, name) for name, array in held.items()]
    graph = helper.make_graph(nodes, "residual", inputs, outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def propagation() -> None:
    """Signals and gradients of residual chains, in processor seconds."""
    with tempfile.TemporaryDirectory() as folder:
        for length in (100, 1_000, 5_000, 10_000, 100_000):
            graph = load_onnx(residual(length, Path(folder) / "residual.onnx"))
            start = time.process_time()
            signals = propagate(graph)
            forward = time.process_time()
            gradients(graph, signals)
            done = time.process_time()
            count = len(graph.nodes)
            late = " TOO SLOW" if length == 5_000 and done - start > LIMIT else ""
            print(
                f"{count:>7} nodes: forward {forward - start:.2f} s, backward "
                f"{done - forward:.2f} s, {(done - start) / count * 1e6:.0f} µs a node{late}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--propagation", action="store_true", help="the signals alone")
    if parser.parse_args().propagation:
        propagation()
        return
    with tempfile.TemporaryDirectory() as folder:
        for length in (1_000, 10_000, 100_000):
            path = chain(length, Path(folder) / "chain.onnx")
            start = time.perf_counter()
            graph = load_onnx(path)
            read = time.perf_counter()
            analyse(graph)
            done = time.perf_counter()
            each = (done - start) / length * 1e6
            print(f"{length:>7} nodes: read {read - start:.2f} s, analyse {done - read:.2f} s, "
                  f"{each:.0f} µs a node")  # fmt: skip


if __name__ == "__main__":
    main()
