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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

import archlint.signal.predictions  # noqa: F401  (imported where a rule asks; not timed)
import tests.conftest  # noqa: F401  (torchvision without its compiled operators)
from archlint import linter
from archlint.graph import from_torch
from archlint.graph.from_torch import record
from archlint.linter import check
from archlint.signal import analysis

COUNT = 30


# The functions whose time is told apart. What is left of the load is the lowering.
_STAGES = {
    "build": (from_torch, "_built"),
    "record": (from_torch, "record"),
    "load": (linter, "load"),
    "analyse": (analysis, "analyse"),
    "rules": (linter, "lint"),
}


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """The seconds of each stage, filled while targets are linted."""
    spent = dict.fromkeys(_STAGES, 0.0)

    def timed(stage: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent[stage] += time.process_time() - start

        return call

    with ExitStack() as stack:
        for stage, (module, name) in _STAGES.items():
            function = getattr(module, name)
            stack.enter_context(patch.object(module, name, timed(stage, function)))
        yield spent


def _static(build: object) -> tuple[float, dict[str, float]]:
    with _timed() as spent:
        start = time.process_time()
        report = check(build)
        total = time.process_time() - start
    assert not report.errors, report.errors
    lower = spent.pop("load") - spent["build"] - spent["record"]
    rest = total - lower - sum(spent.values())
    return total, {**spent, "lower": lower, "rest": rest}


def _real(build: object, shape: tuple[int, ...]) -> float:
    start = time.process_time()
    model = build()  # type: ignore[operator]
    with torch.no_grad():
        model.train()(torch.randn(shape))
    return time.process_time() - start


def main() -> None:
    """Print a line a model, with the share of each stage, and the geometric mean."""
    if "--llama" in sys.argv:
        _llama()
        return
    import timm

    numbers = [int(a) for a in sys.argv[1:] if a.isdigit()]
    names = random.Random(0).sample(timm.list_models(), numbers[0] if numbers else COUNT)
    check(lambda: timm.create_model("test_vit"))  # what is loaded at the first call
    logs: list[float] = []
    sums: dict[str, float] = {}
    left_out: list[str] = []
    for name in names:

        def build(name: str = name) -> torch.nn.Module:
            return timm.create_model(name)  # type: ignore[no-any-return]

        with torch.device("meta"):
            model = build()
        size = sum(p.numel() for p in model.parameters())
        if size > 300_000_000:  # what does not fit a small machine
            left_out.append(name)
            continue
        static, stages = _static(build)
        recording, _ = record(model)
        val = next(n.meta["val"] for n in recording.graph.nodes if n.op == "placeholder")
        real = _real(build, tuple(val.shape))
        logs.append(math.log(static / real))
        split = " ".join(f"{stage} {1e3 * t:.0f}" for stage, t in stages.items())
        print(f"{name:45} {static:7.2f} s {real:7.2f} s {static / real:6.2f}  {split}", flush=True)
        sums = {stage: sums.get(stage, 0.0) + t for stage, t in stages.items()}
        gc.collect()
    print(" ".join(f"{stage} {t / sum(sums.values()):.0%}" for stage, t in sums.items()))
    print(f"geometric mean of {len(logs)}: {math.exp(sum(logs) / len(logs)):.3f}")
    if left_out:
        print(f"too large to be built: {', '.join(left_out)}")


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
    total, stages = _static(lambda: transformers.LlamaForCausalLM(config))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    split = ", ".join(f"{stage} {t:.2f}" for stage, t in stages.items())
    print(f"lint {total:.1f} s ({split}), whole process {time.process_time():.1f} s of CPU, "
          f"peak {peak:.2f} GB")  # fmt: skip


if __name__ == "__main__":
    main()
