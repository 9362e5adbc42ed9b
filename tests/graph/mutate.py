"""Random byte mutations of real files, linted one after another under limits.

    python -m tests.graph.mutate FIRST LAST SEED FILE...

Run as a process of its own, since a mutated file may crash the interpreter. A mutation passes
where the file is linted, or refused with ArchlintError. A line tells each mutation that fails; the
last line counts. A mutation that takes over 20 seconds or 2 GB ends the process.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from archlint.errors import ArchlintError
from archlint.graph.model import verify
from archlint.graph.onnx_reader.wire import slim
from archlint.linter import check, load
from archlint.signal.analysis import analyse
from archlint.target import resolve

SECONDS = 20
BYTES = 2 << 30

Bytes = npt.NDArray[np.uint8]


def structure(path: Path) -> Bytes:
    """The positions of a file's bytes that are no elements of a large tensor."""
    data = path.read_bytes()
    model = onnx.ModelProto.FromString(slim(data, len(data), "self"))
    kept = np.ones(len(data), bool)
    pending = [model.graph]
    while pending:
        graph = pending.pop()
        tensors = list(graph.initializer)
        for node in graph.node:
            for a in node.attribute:
                tensors += [a.t, *a.tensors]
                pending += [a.g] if a.HasField("g") else a.graphs
        for tensor in tensors:
            entries = {e.key: e.value for e in tensor.external_data}
            if entries.get("location") == "self":
                at = int(entries["offset"])
                kept[at : at + int(entries["length"])] = False
    return np.flatnonzero(kept)


def mutated(data: Bytes, places: Bytes, rng: np.random.Generator) -> Bytes:
    """A copy with one to three changes: a bit, a run of bytes, bytes taken out or put in.

    Most changes keep the length: any other one breaks the lengths of all messages around it, which
    the parser refuses at once.
    """
    for _ in range(int(rng.choice([1, 1, 1, 2, 3]))):
        anywhere = rng.random() < 0.2
        at = int(rng.integers(data.size)) if anywhere else int(rng.choice(places))
        at = min(at, data.size - 1)
        n = int(rng.choice([1, 1, 1, 2, 4, 8]))
        noise = rng.integers(0, 256, n, dtype=np.uint8)
        kind = rng.integers(10)
        if kind < 4:
            data = data.copy()
            data[at] ^= 1 << int(rng.integers(8))
        elif kind < 8:
            data = data.copy()
            data[at : at + n] = noise[: data[at : at + n].size]
        elif kind == 8:
            data = np.delete(data, slice(at, at + n))
        else:
            data = np.insert(data, at, noise)
    return data


def main() -> int:
    first, last, seed = map(int, sys.argv[1:4])
    files = [Path(name) for name in sys.argv[4:]]
    os.environ["ARCHLINT_DEBUG"] = "1"  # a mistake of archlint's own raises
    # The address space holds the libraries and the mapped files too.
    resource.setrlimit(resource.RLIMIT_AS, (3 * BYTES, 3 * BYTES))
    ends: Counter[str] = Counter()
    slowest = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(first, last):
            source = files[i % len(files)]
            rng = np.random.default_rng([seed, i])
            whole = np.frombuffer(source.read_bytes(), np.uint8)
            path = Path(folder) / "mutated.onnx"
            path.write_bytes(mutated(whole, structure(source), rng).tobytes())
            print(f"{i} {source.name}", file=sys.stderr, flush=True)  # the culprit of a crash
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of work: the machine may be shared
            start = time.process_time()
            try:
                analyse(verify(load(resolve(path))))
                check([path])
                ends["linted"] += 1
            except ArchlintError as error:
                ends["refused"] += 1
                if "\n" in error.message or not error.hint:
                    ends["failed"] += 1
                    print(f"{i} {source.name}: message {error.message!r}, hint {error.hint!r}")
            except Exception as error:
                ends["failed"] += 1
                place = traceback.extract_tb(error.__traceback__)[-1]
                print(f"{i} {source.name}: {type(error).__name__}: {str(error)[:200]} "
                      f"({place.filename}:{place.lineno})", flush=True)  # fmt: skip
            signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, time.process_time() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    if peak > BYTES:
        ends["failed"] += 1
        print(f"the process took {peak >> 20} MB")
    print(f"{dict(ends)}, slowest {slowest:.1f} s, peak {peak >> 20} MB")
    return int(bool(ends["failed"]))


if __name__ == "__main__":
    raise SystemExit(main())
