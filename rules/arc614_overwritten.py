"""ARC614 overwritten-initialisation."""

from __future__ import annotations

from collections.abc import Iterator

from archlint.finding import Finding, NotApplicable, Severity, Site, Suggestion
from archlint.graph.model import Overwritten, Parameter
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.wording import collapsed, plural, stretch


class OverwrittenInitialisation(Rule):
    """An initializer has no effect because a later one overwrites it.

    ## What it does
    Finds calls that fill a parameter which another call fills again.

    ## Why is this bad
    One of the two is not what its author meant: often `model.apply(...)` undoes what a layer's own
    constructor chose, such as a small last layer or a bias for rare classes.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(64, 64)
            self.head = nn.Linear(64, 10)
            nn.init.normal_(self.head.weight, std=0.01)  # error: ARC614
            for layer in (self.body, self.head):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

        def forward(self, x):
            return self.head(torch.relu(self.body(x)))
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(64, 64)
            self.head = nn.Linear(64, 10)
            nn.init.kaiming_normal_(self.body.weight, nonlinearity="relu")
            nn.init.normal_(self.head.weight, std=0.01)

        def forward(self, x):
            return self.head(torch.relu(self.body(x)))
    ```

    ## How it is computed
    The record of initialization knows which call wrote each element last. A call in the user's
    source of whose numbers nothing is left is reported, with the call that replaced them. What
    layers of torch do in their own constructors is not: to replace that is the usual way. Nor is a
    call that draws from the same law as the later one.

    ## What would confirm it
    Remove the call: with the same random state for the rest nothing changes.

    ## References
    torch.nn.init.
    """

    code = "ARC614"
    slug = "overwritten-initialisation"
    severity = Severity.INFO
    since = "0.1.0"
    references = ("https://pytorch.org/docs/stable/nn.init.html",)

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        from archlint.graph.sites import origin_of

        groups: dict[tuple[Overwritten, Site], list[Parameter]] = {}
        for parameter in analysis.graph.parameters.values():
            for gone in parameter.overwritten:
                if gone.site is None or parameter.site is None or gone.site == parameter.site:
                    continue
                same = parameter.law is not None and parameter.law.initializer == gone.initializer
                if origin_of(gone.site.file) == "user" and not same:
                    groups.setdefault((gone, parameter.site), []).append(parameter)
        if not groups:
            yield NotApplicable("no initializer of the user's was overwritten")
        for (gone, by), members in groups.items():
            names = tuple(p.name for p in members)
            later = members[0].law.initializer if members[0].law is not None else ""
            yield self.finding(
                Severity.INFO,
                f"{gone.initializer} of {plural(len(names), 'parameter')} ({stretch(names)}) has "
                f"no effect: {later or 'a later call'} overwrites it.",
                collapsed(names), modules=names, count=len(names), site=gone.site,
                related=((by, "overwritten here"),),
                evidence={"initializer": gone.initializer, "by": later},
                suggestion=Suggestion("remove the call, or move it after the other one"),
            )  # fmt: skip
