"""ARC901 unmodelled-op."""

from __future__ import annotations

from collections.abc import Iterator

from archlint.finding import Finding, NotApplicable, Severity, Suggestion
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.wording import plural, site


class UnmodelledOp(Rule):
    """Operators that the analysis did not understand, and how much they cut off.

    ## What it does
    Counts the nodes whose operator is outside archlint's vocabulary or whose result it cannot
    predict, and the nodes downstream of which nothing is known for that reason.

    ## Why is this bad
    It is not: it says what the other rules could not look at. No finding there does not mean that
    there is nothing to find.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(33, 10)

        def forward(self, x):
            return self.head(torch.fft.rfft(x).abs())  # error: ARC901
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            return self.head(x)
    ```

    ## How it is computed
    Nodes whose value is unknown although all that goes into them is known, over all nodes, those
    that were computed statically included.

    ## What would confirm it
    `archlint graph TARGET` shows each node as it was understood.
    """

    code = "ARC901"
    slug = "unmodelled-op"
    severity = Severity.INFO
    since = "0.1.0"

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        coverage = analysis.coverage
        if not coverage.unmodelled:
            yield NotApplicable("every operator was understood")
            return
        count = sum(coverage.unmodelled.values())
        names = ", ".join(f"{op} ×{n}" if n > 1 else op for op, n in coverage.unmodelled.items())
        share = coverage.cut_off / max(coverage.nodes, 1)
        message = f"{plural(count, 'node')} not understood: {names}."
        if coverage.cut_off:
            message += (
                f" {plural(coverage.cut_off, 'node')} after them ({share:.0%}) have no prediction."
            )
        yield self.finding(
            Severity.INFO, message, "model", count=count,
            site=site(analysis, coverage.first) if coverage.first is not None else None,
            evidence={"nodes": coverage.nodes, "modelled": coverage.modelled,
                      "cut_off": coverage.cut_off},
            suggestion=Suggestion("report it with the output of `archlint graph TARGET`"),
        )  # fmt: skip
