"""1,000 probes with other seeds, 50 on each of 20 networks whose true figures lie at the limit but
for a thousandth, on its one side and the other in turn: how many verdicts are false.

All of them is the slow test; a part, with a line of JSON for every probe, is
``python -m tests.probe.false_verdicts --part 3/16 [--device cuda]``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from archlint.finding import Claim, Finding, Severity
from archlint.graph.from_torch import load_torch
from archlint.probe.experiment import run
from archlint.probe.options import ProbeOptions
from archlint.signal.analysis import Analysis, analyse
from tests.rules import models

BORDERLINE = [(width, depth) for width in (16, 20, 32, 64, 128) for depth in (5, 10, 20, 30)]
REPETITIONS = 50  # of each network
STATISTICS = ("length", "typical length", "length spread")
_MARGIN = 1e-3


def plain(width: int, depth: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [models.he(nn.Linear(width, width)), nn.ReLU()]
        return nn.Sequential(*layers)

    return build


def truth(width: int, depth: int) -> dict[str, float]:
    """The figures of a ReLU network of critical variance, exactly, given that it is alive: a
    layer's factor is 2/n·χ²(B), B ~ Bin(n, ½) and positive (theory.md 5.2)."""
    b = torch.arange(1, width + 1, dtype=torch.float64)
    n = torch.tensor(float(width), dtype=torch.float64)
    weight = (torch.lgamma(n + 1) - torch.lgamma(b + 1) - torch.lgamma(n - b + 1)).exp()
    weight = weight / weight.sum()
    means = torch.digamma(b / 2)
    mean = float((weight * means).sum())
    variance = float((weight * (torch.polygamma(1, b / 2) + (means - mean) ** 2)).sum())
    moment = float((weight * b).sum()) * 2 / width
    return {"length": depth * math.log10(moment),
            "typical length": depth * (mean + math.log(4 / width)) / math.log(10),
            "length spread": depth * variance}  # fmt: skip


@cache
def _analysed(width: int, depth: int) -> Analysis:
    return analyse(load_torch(plain(width, depth), {"": ((1, width), None)}))


def claims(analysis: Analysis, true: dict[str, float], stands: bool) -> list[Claim]:
    """A claim of each statistic whose limit the true figure passes by a thousandth, or fails to."""
    start, end = analysis.graph.inputs[0], analysis.graph.outputs[0]
    side = _MARGIN if stands else -_MARGIN
    return [
        Claim("length", end, start, 0.0, true["length"] + side, below=True),
        Claim("typical length", end, start, 0.0, true["typical length"] + side, below=True),
        Claim("length spread", end, start, 0.0, true["length spread"] * (1 - side)),
    ]


def probes(
    numbers: Iterable[int], draws: int = 512, device: str = "cpu"
) -> Iterator[dict[str, Any]]:
    """Run some of the 1,000: the network, and of each claim its verdict and whether it is false."""
    for number in numbers:
        width, depth = BORDERLINE[number // REPETITIONS]
        repetition = number % REPETITIONS
        stands = repetition % 2 == 1
        analysis = _analysed(width, depth)
        findings = [
            Finding("ARC000", "planted", Severity.ERROR, ".", "", claim=c)
            for c in claims(analysis, truth(width, depth), stands)
        ]
        options = ProbeOptions(
            draws=draws, time=600, seed=1_000 * width + depth + 7 * repetition, device=device
        )
        verdicts = [f.verdict for f in run(analysis, findings, options).findings]
        yield {
            "number": number, "width": width, "depth": depth, "stands": stands,
            "verdicts": dict(zip(STATISTICS, verdicts, strict=True)),
            "false": [s for s, v in zip(STATISTICS, verdicts, strict=True)
                      if v == ("refuted" if stands else "confirmed")],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every Nth probe from the Ith")
    parser.add_argument("--draws", type=int, default=512)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    part, parts = (int(n) for n in given.part.split("/"))
    every = range(part - 1, len(BORDERLINE) * REPETITIONS, parts)
    for line in probes(every, given.draws, given.device):
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
