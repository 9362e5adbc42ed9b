"""A 500 MB float file: time and memory of reading the laws of its weights.

Run by hand: ``python tests/benchmarks/bench_weights.py [megabytes]``. In one process each, for a
file with the weights inside and one with external data: a numpy pass for Σw, Σw², Σw⁴ over the
tensors as onnx reads them, and ``load_onnx``. The bars: load_onnx takes at most 1.5 times the
pass, and its process peaks at the file's size and 250 MB.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

WIDTH = 1024
BARS = {"time": 1.5, "extra_mb": 250}

_PASS = """
import json, sys, time, resource
import numpy as np, onnx, onnx.numpy_helper
from pathlib import Path
path = Path(sys.argv[1])
model = onnx.load(path)
arrays = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer]
for a in arrays: a.max()
best = {"naive": 1e9, "thrifty": 1e9}
for _ in range(2):
    start = time.perf_counter()
    for w in arrays:
        w.sum(), (w * w).sum(), (w**4).sum()
    best["naive"] = min(best["naive"], time.perf_counter() - start)
    start = time.perf_counter()
    for w in arrays:
        square = w * w
        w.sum(), square.sum(), np.vdot(square, square)
    best["thrifty"] = min(best["thrifty"], time.perf_counter() - start)
print(json.dumps(best))
"""

_LOAD = """
import json, sys, time, resource
from pathlib import Path
start = time.perf_counter()
import archlint.graph.from_onnx, archlint.initialization.fit
imported = time.perf_counter() - start
times, graph = [], None
for _ in range(3):
    graph = None  # a graph that is held maps its file, and would be counted with the next
    start = time.perf_counter()
    graph = archlint.graph.from_onnx.load_onnx(Path(sys.argv[1]))
    times.append(time.perf_counter() - start)
# not ru_maxrss, which a process inherits from the one that started it
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps({"imported": imported, "first": times[0], "best": min(times), "peak_mb": peak,
                  "weights": graph.weights, "evidence": graph.weights_evidence}))
"""


def write(path: Path, megabytes: int, external: bool = False, width: int = WIDTH) -> None:
    """A deep MLP with He normal weights of about the given size."""
    import onnx
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    std = np.float32(np.sqrt(2 / width))
    tensors, nodes, value = [], [], "x"
    for i in range(max(megabytes * 1_000_000 // (4 * width * width), 1)):
        tensor = TensorProto(name=f"w{i}", data_type=TensorProto.FLOAT, dims=[width, width])
        tensor.raw_data = (rng.standard_normal((width, width), np.float32) * std).tobytes()
        tensors.append(tensor)
        nodes.append(helper.make_node("MatMul", [value, f"w{i}"], [f"z{i}"]))
        nodes.append(helper.make_node("Relu", [f"z{i}"], [f"a{i}"]))
        value = f"a{i}"
    graph = helper.make_graph(
        nodes,
        "wide",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, width])],
        [helper.make_tensor_value_info(value, TensorProto.FLOAT, [2, width])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    if external:
        onnx.save(
            model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=0
        )
    else:
        onnx.save(model, path)


def _run(script: str, path: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measure(megabytes: int, external: bool, width: int = WIDTH) -> dict[str, float]:
    """Seconds of the passes and of load_onnx, and the peak memory of the latter in MB."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write(path, megabytes, external, width)
        size = sum(f.stat().st_size for f in Path(folder).iterdir()) / 2**20
        return {"size_mb": size, **_run(_PASS, path), **_run(_LOAD, path)}


def main() -> None:
    """Print the figures of both files against the bars."""
    megabytes = int(sys.argv[1]) if len(sys.argv) > 1 else 500
    for external in (False, True):
        for width in (WIDTH, 256):
            m = measure(megabytes, external, width)
            kind = "external data" if external else "one file"
            print(
                f"{kind}, tensors of {width}x{width}, {m['size_mb']:.0f} MB: numpy pass "
                f"{m['naive']:.2f} s (w**4), {m['thrifty']:.2f} s (w*w reused); load_onnx "
                f"{m['first']:.2f} s first, {m['best']:.2f} s best "
                f"({m['best'] / m['naive']:.2f}x, {m['best'] / m['thrifty']:.2f}x); peak "
                f"{m['peak_mb']:.0f} MB (file + {m['peak_mb'] - m['size_mb']:.0f}); {m['weights']}"
            )


if __name__ == "__main__":
    main()
