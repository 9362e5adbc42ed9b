"""The accuracy table: ``python -m tests.accuracy.measure --set timm``.

Prints for every model the median and 95th percentile over its leaf modules of
|ln(predicted rms/measured rms)|, the same of gradients and correlations, then a table of the sets
and the ops that introduce the most error.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence

from tests.accuracy.comparison import NAMES, Comparison, compare, quantile, ranking
from tests.accuracy.models import SETS, cases
from tests.accuracy.monte_carlo import measured


def collect(
    chosen: Sequence[str], models: Sequence[str] = (), quiet: bool = False
) -> list[Comparison]:
    """Compare every model of some sets; a model that fails is named on stderr."""
    import tests.conftest  # noqa: F401  (torchvision's operators)

    found: list[Comparison] = []
    for case in cases():
        if case.set not in chosen or (models and not any(m in case.name for m in models)):
            continue
        try:
            figures = measured(case)
            if figures is None:
                continue
            start = time.perf_counter()
            comparison = compare(case, figures)
        except Exception as error:  # one model must not end the others
            text = str(error)[:160].replace("\n", " ")
            print(f"{case.set} {case.name}: {type(error).__name__}: {text}", file=sys.stderr)
            continue
        found.append(comparison)
        if not quiet:
            print(line(comparison), f"{time.perf_counter() - start:5.1f} s", flush=True)
    return found


def line(c: Comparison) -> str:
    """One model's row."""
    cells = [f"{c.case.set[:6]:6s} {c.case.name:32.32s} {len(c.errors('forward')):4d}"]
    for which in NAMES:
        errors = c.errors(which)
        cells.append(f"{_number(quantile(errors, 0.5))} {_number(quantile(errors, 0.95))}")
    share = 100 * c.unknown_values / max(c.values, 1)
    cells.append(f"{share:5.1f}% ?{len(c.unknown):3d} ?g{len(c.unknown_gradients):3d}")
    return " | ".join(cells)


def _number(x: float) -> str:
    return "  –  " if math.isnan(x) else f"{x:5.3f}"


def summary(comparisons: Sequence[Comparison]) -> str:
    """The median over models of each model's median and 95th percentile, set by set; and the share
    of models whose 95th percentile is within the worst of them is not hidden: the worst is shown.
    """
    lines = [f"{'set':14s} models  " + "  ".join(f"{n:>21s}" for n in NAMES) + "  unknown"]
    for name in SETS:
        part = [c for c in comparisons if c.case.set == name]
        if not part:
            continue
        cells = []
        for which in NAMES:
            rows = [c.errors(which) for c in part]
            rows = [r for r in rows if r]
            median = quantile([quantile(r, 0.5) for r in rows], 0.5)
            high = quantile([quantile(r, 0.95) for r in rows], 0.5)
            every = [e for r in rows for e in r]
            cells.append(f"{median:.3f}/{high:.3f} ({quantile(every, 0.5):.3f}/"
                         f"{quantile(every, 0.95):.3f})")  # fmt: skip
        unknown = sum(c.unknown_values for c in part) / max(sum(c.values for c in part), 1)
        lines.append(f"{name:14s} {len(part):6d}  " + "  ".join(f"{c:>21s}" for c in cells)
                     + f"  {100 * unknown:.2f} %")  # fmt: skip
    lines.append("each cell: median over models of the median / 95th percentile within a model, "
                 "in brackets the same over all modules together")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Parse the command line and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", action="append", choices=SETS)
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--rows", action="store_true", help="every module of every model")
    parser.add_argument("--top", type=int, default=25)
    parser.add_argument("--gradient", action="store_true", help="rank by gradients")
    options = parser.parse_args()
    comparisons = collect(options.set or SETS, options.model)
    if options.rows:
        for c in comparisons:
            for r in c.rows:
                print(f"{r.module:48.48s} {r.kind:18.18s} {r.op:14.14s} "
                      + " ".join("   –   " if v is None else f"{v:+7.3f}"
                                 for v in (r.forward, r.gradient, r.sample, r.position))
                      + f"  rms {r.predicted.rms if r.predicted.rms is not None else math.nan:9.4g}"
                      f" {math.sqrt(r.measured.second_moment or 0):9.4g}")  # fmt: skip
    print()
    print(summary(comparisons))
    print(
        "\nerror introduced (summed share of a model's modules), by ops since the last measurement"
    )
    for ops, total, signed, count, place in ranking(comparisons, options.gradient)[: options.top]:
        print(f"{total:8.3f} {signed:+7.3f} ×{count:4d}  {ops:60.60s} {place}")
    firsts: Counter[str] = Counter()
    for c in comparisons:
        firsts.update(c.first_unknown)
    print("\nfirst unknown ops:", ", ".join(f"{op} ×{n}" for op, n in firsts.most_common(30)))


if __name__ == "__main__":
    main()
