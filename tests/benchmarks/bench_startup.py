"""Whole processes, interleaved: ``archlint small.onnx`` against the imports it cannot do without.

Run as ``python tests/benchmarks/bench_startup.py [ROUNDS]``; prints the ratio of the medians.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def small(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) / 3, name)
               for name, shape in (("w1", (8, 16)), ("w2", (16, 2)))]  # fmt: skip
    nodes = [helper.make_node("MatMul", ["x", "w1"], ["a"]), helper.make_node("Relu", ["a"], ["b"]),
             helper.make_node("MatMul", ["b", "w2"], ["y"])]  # fmt: skip
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 8])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 2])]
    path = folder / "small.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "small", inputs, outputs, weights)), path)
    return path


# As users have it: compiled modules are kept from one run to the next.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True, env=ENVIRONMENT)
    return time.perf_counter() - start


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as folder:
        ours = [sys.executable, "-m", "archlint", str(small(Path(folder)))]
        bare = [sys.executable, "-c", "import numpy, onnx, click, rich"]
        pairs = [(seconds(bare), seconds(ours)) for _ in range(rounds)]
    base, full = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"imports {base:.3f} s, archlint {full:.3f} s, ratio {full / base:.2f}")


if __name__ == "__main__":
    main()
