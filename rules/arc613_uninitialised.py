"""ARC613 uninitialised-parameter."""

from __future__ import annotations

import math
from collections.abc import Iterator

from archlint.finding import Claim, Finding, NotApplicable, Severity, Site, Suggestion
from archlint.graph.model import Node, Parameter
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.wording import collapsed, plural, site, stretch


class UninitialisedParameter(Rule):
    """A parameter was allocated and never filled.

    ## What it does
    Finds parameters and buffers that `forward` reads and whose memory no initializer wrote to.

    ## Why is this bad
    `torch.empty`, `new_empty` and `torch.Tensor(n, m)` give memory as it happens to be: zeros in
    one run, 10³⁸ or NaN in the next. What trains in a test may not on the cluster.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.empty(64))  # error: ARC613
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            return self.head(x * self.scale)
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(64))
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            return self.head(x * self.scale)
    ```

    ## How it is computed
    The record of initialization follows every write to a parameter's storage, through views too: a
    parameter of which any element was never written is reported. Arrays of files always are. A
    parameter is an error, a buffer a warning.

    ## What would confirm it
    Build the model in memory that was filled with NaN, and run it.

    ## References
    torch.empty.
    """

    code = "ARC613"
    slug = "uninitialised-parameter"
    severity = Severity.ERROR
    since = "0.1.0"
    references = ("https://pytorch.org/docs/stable/generated/torch.empty.html",)

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        graph = analysis.graph
        groups: dict[tuple[Site | None, bool], list[Parameter]] = {}
        for parameter in graph.parameters.values():
            law = parameter.law
            if law is not None and law.family == "uninitialised" and 0 not in parameter.shape:
                groups.setdefault((parameter.site, parameter.trainable), []).append(parameter)
        if not groups:
            yield NotApplicable("all parameters were filled")
        for (where, trainable), members in groups.items():
            names = tuple(p.name for p in members)
            readers: tuple[Node, ...] = graph.consumers.get(names[0], ())
            what = "parameter" if trainable else "buffer"
            verb = "was" if len(names) == 1 else "were"
            yield self.finding(
                Severity.ERROR if trainable else Severity.WARNING,
                f"{plural(len(names), what)} ({stretch(names)}) {verb} allocated and never filled.",
                collapsed(names), modules=names, count=len(names),
                site=where or (site(analysis, readers[0]) if readers else None),
                evidence={"elements": sum(math.prod(p.shape) for p in members),
                          "formula": "no write to its storage"},
                suggestion=Suggestion(
                    "fill it when it is made", "nn.init.zeros_(parameter)"),
                claim=Claim("reach", graph.outputs[0], names[0], 1.0, 0.0)
                if graph.outputs else None,
            )  # fmt: skip
