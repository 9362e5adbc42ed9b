"""ARC616 nonfinite-weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

from archlint.finding import Claim, Finding, NotApplicable, Severity, Suggestion
from archlint.graph.model import Parameter
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.wording import collapsed, plural, site, stretch


class NonfiniteWeights(Rule):
    """A weight holds NaN or an infinite number.

    ## What it does
    Finds parameters with elements that are NaN or infinite: in a file, in a module that exists, or
    by what a constructor does.

    ## Why is this bad
    One such element makes every output NaN that depends on it, and the first step of training all
    weights. A checkpoint of a run that diverged, a division by zero in an initializer and an
    overflow of half precision are the usual causes.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self, extra=0):
            super().__init__()
            self.body = nn.Linear(64, 64)
            self.head = nn.Linear(64, 10)
            nn.init.constant_(self.head.bias, torch.tensor(extra).log().item())  # error: ARC616

        def forward(self, x):
            return self.head(torch.relu(self.body(x)))
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self, extra=0):
            super().__init__()
            self.body = nn.Linear(64, 64)
            self.head = nn.Linear(64, 10)
            nn.init.constant_(self.head.bias, torch.tensor(extra).log1p().item())

        def forward(self, x):
            return self.head(torch.relu(self.body(x)))
    ```

    ## How it is computed
    Arrays are read to the last element. What a constructor does is followed by its law: one whose
    second moment is not finite is reported. Rows of −∞ in an embedding, and −∞ in a tensor that is
    no weight, are masks and no finding. Trained weights are judged too.

    ## What would confirm it
    Run the network on any input.

    ## References
    IEEE 754.
    """

    code = "ARC616"
    slug = "nonfinite-weights"
    severity = Severity.ERROR
    since = "0.1.0"

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        graph = analysis.graph
        found = {p.name: flaw for p in graph.parameters.values() if (flaw := _flaw(p))}
        if not found:
            yield NotApplicable("all weights are finite")
            return
        names = tuple(found)
        first = names[0]
        readers = graph.consumers.get(first, ())
        more = f" So are elements of {plural(len(names) - 1, 'more parameter')} " \
               f"({stretch(names[1:])})." if names[1:] else ""  # fmt: skip
        yield self.finding(
            Severity.ERROR,
            f"{first} holds {found[first]}: what depends on it is not finite.{more}",
            collapsed(names), modules=names, count=len(names),
            site=graph.parameters[first].site
            or (site(analysis, readers[0]) if readers else None),
            evidence={"first": first, "elements": found[first], "formula": "isfinite"},
            claim=Claim("reach", graph.outputs[0], first, 1.0, 0.0) if graph.outputs else None,
            suggestion=Suggestion("take another checkpoint, or find the step that overflowed"),
        )  # fmt: skip


def _flaw(parameter: Parameter) -> str:
    """Which elements of a parameter are not finite; empty where none is known to be."""
    law = parameter.law
    if parameter.flaw or law is None or not parameter.trainable:
        return parameter.flaw
    if law.family in ("unknown", "uninitialised", "trained") or math.isfinite(law.second_moment):
        return ""
    return (
        f"{'NaN' if math.isnan(law.mean) else 'infinite numbers'} by {law.initializer or 'its law'}"
    )
