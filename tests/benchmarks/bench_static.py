"""Static lint against building the real model and one forward of a batch of two, same process.

Run ``python -m tests.benchmarks.bench_static [count] [--llama]``; imports are not timed. The bar
is a geometric mean of the ratios of at most 0.4 over 30 models. ``--llama`` lints a Llama of 70
billion parameters instead: at most 12 s and 1 GB for the whole process.
"""

from __future__ import annotations

import gc
import math
import random
import resource
import sys
import time

import torch

import tests.conftest  # noqa: F401  (torchvision without its compiled operators)
from archlint.graph.from_torch import load_torch, record
from archlint.linter import check

COUNT = 30


def _static(build: object) -> float:
    start = time.process_time()
    report = check(build)
    assert not report.errors, report.errors
    return time.process_time() - start


def _real(build: object, shape: tuple[int, ...]) -> float:
    start = time.process_time()
    model = build()  # type: ignore[operator]
    with torch.no_grad():
        model.train()(torch.randn(shape))
    return time.process_time() - start


def main() -> None:
    """Print a line a model and the geometric mean."""
    if "--llama" in sys.argv:
        _llama()
        return
    import timm

    numbers = [int(a) for a in sys.argv[1:] if a.isdigit()]
    names = random.Random(0).sample(timm.list_models(), numbers[0] if numbers else COUNT)
    check(lambda: timm.create_model("test_vit"))  # what is loaded at the first call
    logs: list[float] = []
    for name in names:

        def build(name: str = name) -> torch.nn.Module:
            return timm.create_model(name)  # type: ignore[no-any-return]

        with torch.device("meta"):
            model = build()
        size = sum(p.numel() for p in model.parameters())
        if size > 300_000_000:  # what does not fit a small machine
            continue
        static = _static(build)
        recording, _ = record(model)
        val = next(n.meta["val"] for n in recording.graph.nodes if n.op == "placeholder")
        real = _real(build, tuple(val.shape))
        logs.append(math.log(static / real))
        print(f"{name:45} {static:7.2f} s {real:7.2f} s {static / real:6.2f}", flush=True)
        gc.collect()
    print(f"geometric mean of {len(logs)}: {math.exp(sum(logs) / len(logs)):.3f}")


def _llama() -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    start = time.process_time()
    load_torch(lambda: transformers.LlamaForCausalLM(config))
    recorded = time.process_time() - start
    report = check(lambda: transformers.LlamaForCausalLM(config))
    assert not report.errors, report.errors
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    total = time.process_time() - recorded
    print(f"recorded {recorded:.1f} s, whole process {total:.1f} s of CPU, peak {peak:.2f} GB")


if __name__ == "__main__":
    main()
