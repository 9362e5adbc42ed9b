"""ARC612 contraction-scale."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from archlint.finding import Claim, Finding, NotApplicable, Remedy, Severity, Suggestion
from archlint.initialization.distribution import Distribution, normal
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.signal.remedies import INITIALIZATION, redrawn
from archlint.signal.weights import Weighted, rescaled_by, weighted
from archlint.wording import collapsed, number, paths, plural, site, stretch


@dataclass(frozen=True)
class Options:
    """``decades``: |log10| of the gain on the squared length from which on it is reported."""

    decades: float = 1.0


class ContractionScale(Rule):
    """A contraction's weights do not shrink with the number of products that it sums.

    ## What it does
    Finds bilinear layers, and products with parameters drawn with unit variance
    (`nn.Parameter(torch.randn(...))`), whose gain is far from one.

    ## Why is this bad
    A sum of n products of unit numbers has variance n. `nn.Bilinear` scales its weights by one of
    its two inputs only, so its output's variance is in2/3 times the product of its inputs'; a
    parameter drawn by `torch.randn` is not scaled at all.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.randn(64, 32))
            self.head = nn.Linear(32, 10)

        def forward(self, x):
            return self.head(torch.tanh(x @ self.mix))  # error: ARC612
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.randn(64, 32) / 64**0.5)
            self.head = nn.Linear(32, 10)

        def forward(self, x):
            return self.head(torch.tanh(x @ self.mix))
    ```

    ## How it is computed
    gain = E w² times the number of products an output sums (in1·in2 for a bilinear layer), on
    inputs of unit second moment. A finding needs |log₁₀ gain| > 1, of a product with a parameter
    also a predicted second moment after it that is as far from one: it may make up for a small
    input. Tables that are looked up or added are no contractions; before a normalisation or a
    softmax the scale is another rule's.

    ## What would confirm it
    The second moment of the output over those of the inputs.

    ## Options
    `decades` (1.0).

    ## References
    torch.nn.Bilinear. He et al. 2015 (arXiv 1502.01852).
    """

    code = "ARC612"
    slug = "contraction-scale"
    severity = Severity.WARNING
    since = "0.1.0"
    references = (
        "https://pytorch.org/docs/stable/generated/torch.nn.Bilinear.html",
        "https://arxiv.org/abs/1502.01852",
    )
    needs_initial_weights = True
    yields_to = ("ARC101",)
    Options = Options

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        found: list[tuple[Weighted, float]] = []
        for w in weighted(analysis.graph):
            law = w.weight.law
            if law is None or not law.random:
                continue
            where = paths([w.node])[0]
            gain = law.second_moment * w.fans.fan_in
            if w.node.op != "bilinear" and not _is_unscaled(law):
                continue
            if rescaled_by(analysis.graph, w.node) is not None:
                yield NotApplicable("what follows takes the scale out", where)
            elif abs(math.log10(gain)) <= self.options.decades:
                yield NotApplicable(f"its gain is {number(gain)}", where)
            elif (made := self._made(analysis, w)) is not None:
                yield NotApplicable(f"the second moment after it is {number(made)}", where)
            else:
                found.append((w, gain))
        if found:
            yield self._report(analysis, found)

    def _made(self, analysis: Analysis, w: Weighted) -> float | None:
        """The second moment of what a product makes, if it is an ordinary one all the same."""
        made = analysis.signal(w.node.output).second_moment
        if w.node.op == "bilinear" or not made or abs(math.log10(made)) > self.options.decades:
            return None
        return made

    def _report(self, analysis: Analysis, found: list[tuple[Weighted, float]]) -> Finding:
        first, gain = max(found, key=lambda item: abs(math.log10(item[1])))
        modules = paths(w.node for w, _ in found)
        law = first.weight.law
        assert law is not None  # of a weight that was found
        std = 1 / math.sqrt(first.fans.fan_in)
        where = site(analysis, first.node)
        made = first.weight.site
        return self.finding(
            Severity.WARNING,
            f"{plural(len(found), 'contraction')} ({stretch(modules)}) of weights with std "
            f"{number(law.std)} over {first.fans.fan_in:g} products multiplies the squared length "
            f"by {number(gain)}.",
            collapsed(modules), modules=modules, count=len(found), site=where,
            related=((made, "its weights are drawn here"),) if made not in (None, where) else (),
            evidence={"gain": gain, "std": law.std, "products": first.fans.fan_in,
                      "threshold": self.options.decades, "formula": "E w²·Π contracted sizes"},
            suggestion=Suggestion(
                f"draw the weights with std {number(std)} (= 1/√{first.fans.fan_in:g})",
                f"nn.init.normal_(weight, std={number(std)})", {"std": std},
                Remedy(INITIALIZATION, {
                    value: law for w, _ in found
                    for value, law in redrawn(w.node, normal(w.fans.fan_in**-0.5)).items()
                })),
            claim=Claim("length", first.node.output, first.node.inputs[0], math.log10(gain),
                        self.options.decades,
                        also=first.node.inputs[1] if first.node.op == "bilinear" else None),
        )  # fmt: skip


def _is_unscaled(law: Distribution) -> bool:
    """Whether a weight is drawn with unit scale, as randn and rand do."""
    return law.family in ("normal", "uniform") and (
        abs(law.second_moment - 1.0) < 0.02 or (law.family == "uniform" and law.mean == 0.5)
    )
