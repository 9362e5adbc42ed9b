"""ARC615 unreached-initialisation."""

from __future__ import annotations

from collections.abc import Iterator

from archlint.finding import Finding, NotApplicable, Severity, Suggestion
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.wording import collapsed, plural, stretch


class UnreachedInitialisation(Rule):
    """An initializer never runs, since the names that are tested are whole paths.

    ## What it does
    Finds loops over `named_parameters()` and the like that fill a parameter if its name equals,
    begins or ends with a text, where no name does and some hold that text as a part.

    ## Why is this bad
    Nothing fails: the parameters keep what they had. GPT-2 in transformers 5.0.0 to 5.14.1 lost the
    factor 1/√(2L) of its projections into the residual stream in this way.

    ## Example
    ```python
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(64)
            self.fc = nn.Linear(64, 256)
            self.proj = nn.Linear(256, 64)

        def forward(self, x):
            return x + self.proj(torch.relu(self.fc(self.norm(x))))


    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*[Block() for _ in range(8)])
            for name, p in self.named_parameters():
                if name == "proj.weight":  # error: ARC615
                    nn.init.normal_(p, std=0.02 / 4)

        def forward(self, x):
            return self.blocks(x)
    ```

    ## Use instead
    ```python
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(64)
            self.fc = nn.Linear(64, 256)
            self.proj = nn.Linear(256, 64)

        def forward(self, x):
            return x + self.proj(torch.relu(self.fc(self.norm(x))))


    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*[Block() for _ in range(8)])
            for name, p in self.named_parameters():
                if name.endswith(".proj.weight"):
                    nn.init.normal_(p, std=0.02 / 4)

        def forward(self, x):
            return self.blocks(x)
    ```

    ## How it is computed
    While the model is built, the names that its constructor loops over are noted. The tests on them
    are read from the source and evaluated on every name: what compares the name with texts decides,
    anything else (a configuration, the type of a module) leaves a branch open. A branch that fills
    what the loop is at is reported where its test held for no name in the whole construction, and
    would have for a part of one, from one dot to another. A text that occurs in no name is not
    reported: it may be meant for another model.

    ## What would confirm it
    Print in the branch.

    ## References
    huggingface/transformers#47458.
    """

    code = "ARC615"
    slug = "unreached-initialisation"
    severity = Severity.WARNING
    since = "0.1.0"
    references = ("https://github.com/huggingface/transformers/issues/47458",)
    needs_initial_weights = True

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        graph = analysis.graph
        if not graph.unreached:
            yield NotApplicable("no initializer waits for a name that no parameter has")
        for dead in graph.unreached:
            names = dead.parameters
            law = graph.parameters[names[0]].law
            kept = law.initializer if law is not None else ""
            verb = "keeps" if len(names) == 1 else "keep"
            yield self.finding(
                Severity.WARNING,
                f"{plural(len(names), 'parameter')} ({stretch(names)}) {verb} "
                f"{kept or 'the former law'}: {dead.test} is true of none of "
                f"{plural(dead.names, 'name')}, so that {dead.call} never runs.",
                collapsed(names), modules=names, count=len(names), site=dead.site,
                related=((dead.call_site, "never runs"),),
                evidence={"test": dead.test, "names": dead.names, "initializer": dead.call,
                          "present": kept, "formula": "the test, evaluated on every name"},
                suggestion=Suggestion(
                    "names are paths from the module that lists them: test the part that is meant",
                    f"if {dead.instead}:" if dead.instead else None),
            )  # fmt: skip
