"""Plain ReLU networks in logarithms: ``python -m tests.accuracy.plain``.

The length of a narrow network is a lottery: at width 8 and depth 6 Var ln M is 7.5, and the mean of
200 draws of M is mostly below E M by half. So the comparison is of E ln rms, what a draw typically
has: the engine's is ½(ln E M − shortfall), the measured one the mean over the draws in which the
value is not zero, which is what the engine means too (a ReLU layer of eight units without biases
is off as a whole once in 256 draws). Every draw has an input of mean square one, and ξ likewise:
what varies is the initialization. There are as many draws as bring the standard error of E ln rms
to 0.01 by the predicted spread, 200 to 6,000.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

from archlint.graph.from_torch import load_torch
from archlint.signal.moments import Prediction
from archlint.signal.predictions import predict
from archlint.signal.propagate import propagate
from tests.accuracy.comparison import quantile
from tests.accuracy.ensemble import INPUT, Drawn, Logs, draw
from tests.accuracy.models import Case, cases

LEAST, MOST = 200, 6000
AIM = 0.01  # standard error of E ln rms


@dataclass(frozen=True)
class Compared:
    """One value: predicted less measured E ln rms, its standard error, β predicted and measured;
    ``what`` is "forward" or "gradient"."""

    module: str
    what: str
    error: float
    noise: float
    spread: float
    measured: Logs


def shape_of(case: Case) -> tuple[int, ...]:
    """Of one sample of a plain case's input."""
    assert case.inputs is not None
    return tuple(case.inputs["input"][0][1:])


def compared(case: Case, draws: int | None = None) -> list[Compared]:
    """Every leaf module's output and its gradient."""
    shape = shape_of(case)
    graph = load_torch(case.build, {"input": ((1, *shape), "float32")})
    signals, _ = predict(graph, propagate(graph))
    if draws is None:
        widest = max(max(s.spread or 0.0, s.grad_spread or 0.0) for s in signals.values())
        draws = min(max(math.ceil(widest / (2 * AIM) ** 2), LEAST), MOST)
    found = draw(case.build, shape, draws, chunk=250 if len(shape) > 1 else 1000)
    at = {node.module: node.output for node in graph.nodes} | {INPUT: graph.inputs[0]}
    return list(_rows(found, {path: signals[v] for path, v in at.items()}))


def _rows(found: Drawn, signals: dict[str, Prediction]) -> Iterator[Compared]:
    for what, logs_by_path in (("forward", found.forward), ("gradient", found.gradient)):
        for path, logs in logs_by_path.items():
            signal = signals.get(path)
            if signal is None:
                continue
            second, less, spread = (
                (signal.second_moment, signal.shortfall, signal.spread) if what == "forward" else
                (signal.grad_second_moment, signal.grad_shortfall, signal.grad_spread)
            )  # fmt: skip
            assert second, path
            assert less is not None, path
            error = (math.log(second) - less - logs.mean) / 2
            yield Compared(path, what, error, logs.error_of_mean / 2, spread or 0.0, logs)


def summary(rows: list[Compared], what: str) -> tuple[float, float, float]:
    """Median and 95th percentile of |error|, median standard error."""
    part = [r for r in rows if r.what == what]
    errors = [abs(r.error) for r in part]
    return quantile(errors, 0.5), quantile(errors, 0.95), quantile([r.noise for r in part], 0.5)


def main() -> None:
    """Print a row a network, and the whole."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int)
    parser.add_argument("--model", default="")
    parser.add_argument("--rows", action="store_true", help="every module")
    options = parser.parse_args()
    every: list[Compared] = []
    for case in cases("plain"):
        if options.model not in case.name:
            continue
        rows = compared(case, options.draws)
        every += rows
        cells = [f"{what} {a:.3f} {b:.3f} ± {c:.3f}" for what in ("forward", "gradient")
                 for a, b, c in (summary(rows, what),)]  # fmt: skip
        print(f"{case.name:24s} {rows[0].measured.values.size:5d} draws  {'  '.join(cells)}",
              flush=True)  # fmt: skip
        if options.rows:
            for r in rows:
                print(f"  {r.what:8s} {r.module:8s} {r.error:+.3f} ± {r.noise:.3f}"
                      f"  β {r.spread:.3f} {r.measured.variance:.3f}")  # fmt: skip
    for what in ("forward", "gradient"):
        median, high, noise = summary(every, what)
        print(f"all: {what} median {median:.4f}, 95 % {high:.4f}, standard error {noise:.4f}")


if __name__ == "__main__":
    main()
