"""The probe against a plain loop: build, forward, backward per draw. Seconds for 256 draws.

Run as ``python -m tests.benchmarks.bench_probe [--draws N] [--device cuda] [--memory-test]``. All
do the same work on the same inputs: fresh weights, one forward, the gradient of ⟨output, ξ⟩, ln of
the mean square at the end. The loop runs on two threads of the processor, and on the device too
where that is another. Rounds are interleaved; the ratio is that of the medians, on the processor
once of the time that passed and once of the processor's time, which a busy machine leaves alone.

On CUDA the arithmetic of the probe is compared with the products of large matrices that the card
makes in the same type and in bfloat16. ``--memory-test`` shows the peak of the memory that 4,096
draws take under a limit.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from archlint.finding import Claim
from archlint.graph.from_torch import load_torch
from archlint.probe.draws import Drawer
from archlint.probe.ensemble import Ensemble, bounded
from archlint.probe.execute import Program
from archlint.probe.experiment import _fits_single, device_of
from archlint.probe.feed import Feed
from archlint.signal.analysis import analyse

ROUNDS = 3
LIMIT = {"cpu": 2e8, "cuda": 1e9}  # bytes, of the test of memory


class ConvNet(nn.Module):
    """Six convolutions of 16 channels on 16×16 images."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(3 if i == 0 else 16, 16, 3, padding=1), nn.ReLU())
                for i in range(6)
            )
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def mlp() -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(30):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def transformer() -> nn.Module:
    layer = lambda: nn.TransformerEncoderLayer(  # noqa: E731
        32, 4, 64, 0.0, batch_first=True, norm_first=True
    )
    return nn.Sequential(*(layer() for _ in range(6)), nn.Linear(32, 10))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 30x64": (mlp, (2, 64)),
    "small conv net": (ConvNet, (2, 3, 16, 16)),
    "6-block transformer": (transformer, (2, 16, 32)),
}


def plain(
    build: Callable[[], nn.Module], shape: tuple[int, ...], draws: int, device: torch.device
) -> None:
    """What one would write: a new network for every draw."""
    for seed in range(draws):
        torch.manual_seed(seed)
        with device:
            model = build()
            x = torch.randn(shape, requires_grad=True)
        y = model(x)
        (y * torch.randn_like(y)).sum().backward()
        y.detach().square().mean().log().item()


def ensemble(
    build: Callable[[], nn.Module], shape: tuple[int, ...], memory: float, device: torch.device
) -> Ensemble:
    graph = load_torch(build, {"": (shape, None)})
    analysis = analyse(graph)
    first, last = graph.inputs[0], graph.outputs[0]
    claims = [Claim("length", last, None, 0.0, 1.0), Claim("gradient", last, first, 0.0, 1.0)]
    real = torch.float32 if _fits_single(analysis) else torch.float64
    drawer = Drawer(Program(graph).parameters, 0, real, device)
    assert not drawer.remarks, drawer.remarks
    return Ensemble(
        analysis, claims, drawer, Feed(graph, 0, real, device, {}), real, device, memory
    )


def compare(
    name: str,
    build: Callable[[], nn.Module],
    shape: tuple[int, ...],
    draws: int,
    device: torch.device,
) -> None:
    probe = ensemble(build, shape, 4e9, device)
    probe.extend(draws)
    assert probe.together, probe.remarks
    processor = torch.device("cpu")
    works: dict[str, Callable[[], None]] = {
        "loop": lambda: plain(build, shape, draws, processor),
        "probe": lambda: probe.extend(probe.done + draws),
    }
    if device.type != "cpu":
        works["loop there"] = lambda: plain(build, shape, draws, device)
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in works}
    plain(build, shape, 2, device)
    for _ in range(ROUNDS):
        for kind, work in works.items():
            start = time.perf_counter(), time.process_time()
            work()
            times[kind].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    for i, clock in enumerate(("passed", "of the processor")[: 2 if device.type == "cpu" else 1]):
        median = {kind: statistics.median(t[i] for t in every) for kind, every in times.items()}
        others = ", ".join(
            f"{kind} {median[kind]:.2f} s ({median[kind] / median['probe']:.1f} times slower)"
            for kind in times if kind != "probe"
        )  # fmt: skip
        print(f"{name}: {draws} draws, probe {median['probe']:.4f} s {clock} ({probe.real}), "
              f"{others}", flush=True)  # fmt: skip
    if device.type == "cuda":
        for some in (draws, 16 * draws):
            share(name, probe, some)


def share(name: str, probe: Ensemble, draws: int) -> None:
    """What the card computes, of what it can."""
    with FlopCounterMode(display=False) as counted:
        probe.extend(probe.done + draws)
    torch.cuda.synchronize()
    start = time.perf_counter()
    probe.extend(probe.done + draws)
    passed = time.perf_counter() - start
    rate = counted.get_total_flops() / passed
    own, best = (peak(dtype, probe.device) for dtype in (probe.real, torch.bfloat16))
    print(f"{name}: {draws} draws in {passed:.4f} s, {counted.get_total_flops() / 1e9:.2f} GFLOP: "
          f"{rate / 1e12:.3f} TFLOP/s, {rate / own:.2%} of {own / 1e12:.0f} in {probe.real}, "
          f"{rate / best:.3%} of {best / 1e12:.0f} in bfloat16", flush=True)  # fmt: skip


def peak(dtype: torch.dtype, device: torch.device, size: int = 8192) -> float:
    """FLOP/s of a product of large matrices."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return 10 * 2 * size**3 / (time.perf_counter() - start)


def memory_test(device: torch.device) -> None:
    limit = LIMIT[device.type]
    for name, (build, shape) in NETS.items():
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_reserved(device)
        with bounded(device, limit) if device.type == "cuda" else nullcontext():
            probe = ensemble(build, shape, limit, device)
            probe.extend(4096)
        if device.type == "cuda":
            grown = torch.cuda.max_memory_reserved(device) - before
            used = f", {torch.cuda.max_memory_allocated(device) / 1e6:.0f} MB in use at most"
        else:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
            used = ""
        print(f"{name}: 4096 draws under {limit / 1e6:.0f} MB: chunks of {probe.chunk}, the peak "
              f"grew by {grown / 1e6:.0f} MB{used}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-test", action="store_true")
    parser.add_argument("--only", default="", help="a part of a network's name")
    given = parser.parse_args()
    device = device_of(given.device)
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "no card"
    print(f"{device} ({card}), {torch.get_num_threads()} threads, torch {torch.__version__}")
    if given.memory_test:
        memory_test(device)
        return
    for name, (build, shape) in NETS.items():
        if given.only in name:
            compare(name, build, shape, given.draws, device)


if __name__ == "__main__":
    main()
