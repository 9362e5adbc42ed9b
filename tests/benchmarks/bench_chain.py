"""Chains of 1,000 to 100,000 nodes: seconds to read and to analyse, and per node.

Run as ``python tests/benchmarks/bench_chain.py``; the cost a node must not grow.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from archlint.graph.from_onnx import load_onnx
from archlint.signal.analysis import analyse


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


def main() -> None:
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
