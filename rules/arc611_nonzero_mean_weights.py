"""ARC611 nonzero-mean-weights."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from archlint.finding import Claim, Finding, NotApplicable, Remedy, Severity, Suggestion
from archlint.initialization.distribution import Distribution, uniform
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.signal.remedies import INITIALIZATION, redrawn
from archlint.signal.weights import Weighted, rescaled_by, weighted
from archlint.wording import collapsed, grade, number, paths, plural, site, stretch


@dataclass(frozen=True)
class Options:
    """``warning``, ``error``: variance of the pre-activations' common part over the rest."""

    warning: float = 0.5
    error: float = 10.0


class NonzeroMeanWeights(Rule):
    """Weights with a mean add the same number to all units.

    ## What it does
    Compares what the mean of a layer's weights adds to its pre-activations with what their spread
    does.

    ## Why is this bad
    After a ReLU the inputs have a mean, and weights with a mean m add m times their sum to every
    unit alike: fan-in·(m/σ)²·(E a)²/E a² times the variance that the random part makes. Units
    become copies of one another, and the length grows with the fan-in.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.second = nn.Linear(64, 64)
            self.head = nn.Linear(64, 10)
            nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu")
            nn.init.uniform_(self.second.weight, 0.0, 0.05)  # error: ARC611

        def forward(self, x):
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))))
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.second = nn.Linear(64, 64)
            self.head = nn.Linear(64, 10)
            nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu")
            nn.init.kaiming_uniform_(self.second.weight, nonlinearity="relu")

        def forward(self, x):
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))))
    ```

    ## How it is computed
    fan-in·(m/σ)²·(E a)²/E a² with the predicted mean and second moment of the layer's input: a
    warning above 0.5, an error above 10. Inputs without a mean add nothing. A mean that was
    estimated must exceed four standard errors. Before a layer norm the common part is taken out.

    ## What would confirm it
    The share of the pre-activations' variance that is common to all units.

    ## Options
    `warning` (0.5), `error` (10.0).

    ## References
    Hanin & Rolnick 2018 (arXiv 1803.01719), whose weights are symmetric about zero.
    """

    code = "ARC611"
    slug = "nonzero-mean-weights"
    severity = Severity.ERROR
    since = "0.1.0"
    references = ("https://arxiv.org/abs/1803.01719",)
    needs_initial_weights = True
    Options = Options

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        found: list[tuple[Weighted, float]] = []
        for w in weighted(analysis.graph):
            law = w.weight.law
            if law is None or not law.random or not _has_mean(law):
                continue
            share = _share(analysis, w, law)
            where = paths([w.node])[0]
            after = rescaled_by(analysis.graph, w.node)
            if share is None:
                yield NotApplicable("its input's mean is not known", where)
            elif after is not None and after.op == "layer_norm":
                yield NotApplicable("the norm after it takes the common part out", where)
            elif share <= self.options.warning:
                yield NotApplicable(f"its mean adds {number(share)} times its spread", where)
            else:
                found.append((w, share))
        if found:
            yield self._report(analysis, found)

    def _report(self, analysis: Analysis, found: list[tuple[Weighted, float]]) -> Finding:
        first, share = max(found, key=lambda item: item[1])
        law = first.weight.law
        assert law is not None  # of a layer that was found
        modules = paths(w.node for w, _ in found)
        severity = grade(share, {Severity.WARNING: self.options.warning,
                                 Severity.ERROR: self.options.error})  # fmt: skip
        bound = math.sqrt(3 * law.second_moment)
        return self.finding(
            severity or Severity.WARNING,
            f"the weights of {plural(len(found), 'layer')} ({stretch(modules)}) have mean "
            f"{number(law.mean)} and standard deviation {number(law.std)}: what all units have in "
            f"common is {number(share)} times what tells them apart.",
            collapsed(modules), modules=modules, count=len(found),
            site=first.weight.site or site(analysis, first.node),
            evidence={"mean": law.mean, "std": law.std, "share": share,
                      "fan_in": first.fans.fan_in, "threshold": self.options.warning,
                      "formula": "fan_in·(m/σ)²·(E a)²/E a²"},
            suggestion=Suggestion(
                "draw them symmetrically about zero",
                f"nn.init.uniform_(layer.weight, {number(-bound)}, {number(bound)})",
                {"bound": bound},
                Remedy(INITIALIZATION, {
                    value: law for w, _ in found if w.weight.law is not None
                    for value, law in redrawn(w.node, _centred(w.weight.law)).items()
                })),
            claim=Claim("common part", first.node.output, None, math.log10(share), math.log10(
                self.options.error if severity is Severity.ERROR else self.options.warning)),
        )  # fmt: skip


def _has_mean(law: Distribution) -> bool:
    """Whether a law's mean is no sampling error."""
    if law.mean == 0.0 or law.variance <= 0.0:
        return False
    return law.exact or abs(law.mean) > 4 * law.std / math.sqrt(max(law.count, 1))


def _centred(law: Distribution) -> Distribution:
    bound = math.sqrt(3 * law.second_moment)
    return uniform(-bound, bound)


def _share(analysis: Analysis, w: Weighted, law: Distribution) -> float | None:
    signal = analysis.signal(w.node.inputs[0])
    if signal.mean is None or not signal.second_moment or w.node.op == "bilinear":
        return None
    return w.fans.fan_in * law.mean**2 / law.variance * signal.mean**2 / signal.second_moment
