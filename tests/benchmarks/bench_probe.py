"""The probe against a plain loop: build, forward, backward per draw. Seconds for 256 draws.

Run as ``python tests/benchmarks/bench_probe.py [draws]``. Both do the same work on the same inputs:
fresh weights, one forward, the gradient of ⟨output, ξ⟩, ln of the mean square at the end. The
rounds of both are interleaved, and the ratio is that of the medians, once of the time that passed
and once of the processor's time, which a busy machine leaves alone (the probe draws with all
threads that torch has; the loop cannot). The last line shows the peak of the memory that 4,096
draws take under a limit.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from archlint.finding import Claim
from archlint.graph.from_torch import load_torch
from archlint.probe.draws import Drawer
from archlint.probe.ensemble import Ensemble
from archlint.probe.execute import Program
from archlint.probe.experiment import _fits_single
from archlint.probe.feed import Feed
from archlint.signal.analysis import analyse

ROUNDS = 5


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


def plain(build: Callable[[], nn.Module], shape: tuple[int, ...], draws: int) -> None:
    """What one would write: a new network for every draw."""
    for seed in range(draws):
        torch.manual_seed(seed)
        model = build()
        x = torch.randn(shape, requires_grad=True)
        y = model(x)
        (y * torch.randn_like(y)).sum().backward()
        y.detach().square().mean().log().item()


def ensemble(build: Callable[[], nn.Module], shape: tuple[int, ...], memory: float) -> Ensemble:
    graph = load_torch(build, {"": (shape, None)})
    analysis = analyse(graph)
    first, last = graph.inputs[0], graph.outputs[0]
    claims = [Claim("length", last, None, 0.0, 1.0), Claim("gradient", last, first, 0.0, 1.0)]
    device, real = torch.device("cpu"), torch.float32 if _fits_single(analysis) else torch.float64
    drawer = Drawer(Program(graph).parameters, 0, real, device)
    assert not drawer.remarks, drawer.remarks
    return Ensemble(
        analysis, claims, drawer, Feed(graph, 0, real, device, {}), real, device, memory
    )


def compare(name: str, build: Callable[[], nn.Module], shape: tuple[int, ...], draws: int) -> None:
    probe = ensemble(build, shape, 4e9)
    probe.extend(8)
    assert probe.together, probe.remarks
    times: dict[str, list[tuple[float, float]]] = {"plain": [], "probe": []}

    def timed(kind: str, work: Callable[[], None]) -> None:
        start = time.perf_counter(), time.process_time()
        work()
        times[kind].append((time.perf_counter() - start[0], time.process_time() - start[1]))

    for _ in range(ROUNDS):
        timed("plain", lambda: plain(build, shape, draws))
        timed("probe", lambda: probe.extend(probe.done + draws))
    for i, clock in enumerate(("passed", "of the processor")):
        loop, together = (statistics.median(t[i] for t in times[k]) for k in times)
        print(f"{name}: loop {loop:.2f} s, probe {together:.3f} s {clock}, "
              f"{loop / together:.1f} times faster ({probe.real})")  # fmt: skip


def main() -> None:
    draws = int(sys.argv[1]) if len(sys.argv) > 1 else 256
    for name, (build, shape) in NETS.items():
        compare(name, build, shape, draws)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = 2e8
    probe = ensemble(transformer, (2, 16, 32), memory)
    probe.extend(4096)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"4096 draws under {memory / 1e6:.0f} MB: chunks of {probe.chunk}, the peak grew by "
          f"{(after - before) / 1024:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
