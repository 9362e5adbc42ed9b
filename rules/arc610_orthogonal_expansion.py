"""ARC610 orthogonal-expansion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from archlint.finding import Finding, NotApplicable, Remedy, Severity, Suggestion
from archlint.initialization.distribution import rescaled
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.signal.claims import stretch_claim
from archlint.signal.remedies import INITIALIZATION, redrawn
from archlint.signal.structure import Layer, Segment
from archlint.wording import collapsed, factor, number, paths, plural, site, stretch


@dataclass(frozen=True)
class Options:
    """``decades``: of the product over a stretch from which on it is reported."""

    decades: float = 1.0


class OrthogonalExpansion(Rule):
    """Orthogonal weights shrink the signal where a layer gets wider.

    ## What it does
    Adds up what orthogonal initialization loses in layers with more outputs than inputs.

    ## Why is this bad
    An orthogonal matrix keeps the norm of a vector. Where a layer has more outputs than inputs the
    norm is spread over more units, and the mean square of each is smaller by inputs/outputs.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 64)  # error: ARC610
            self.second = nn.Linear(64, 256)
            self.third = nn.Linear(256, 256)
            self.head = nn.Linear(256, 10)
            for layer in (self.first, self.second, self.third):
                nn.init.orthogonal_(layer.weight, gain=2**0.5)
                nn.init.zeros_(layer.bias)

        def forward(self, x):
            for layer in (self.first, self.second, self.third):
                x = torch.relu(layer(x))
            return self.head(x)
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(16, 64)
            self.second = nn.Linear(64, 256)
            self.third = nn.Linear(256, 256)
            self.head = nn.Linear(256, 10)
            for layer in (self.first, self.second, self.third):
                wider = max(layer.out_features / layer.in_features, 1)
                nn.init.orthogonal_(layer.weight, gain=(2 * wider) ** 0.5)
                nn.init.zeros_(layer.bias)

        def forward(self, x):
            for layer in (self.first, self.second, self.third):
                x = torch.relu(layer(x))
            return self.head(x)
    ```

    ## How it is computed
    E w² = g²/max(n_in, n_out), so the squared length a unit is multiplied by g²·min(1, n_in/n_out).
    The factors below one are added up over a stretch whose gain is below one; square and narrowing
    layers lose nothing. Orthogonal ReLU layers keep 60 % of the spread of independent weights.

    ## What would confirm it
    ln M at every layer.

    ## Options
    `decades` (1.0).

    ## References
    Saxe, McClelland & Ganguli 2014 (arXiv 1312.6120).
    """

    code = "ARC610"
    slug = "orthogonal-expansion"
    severity = Severity.INFO
    since = "0.1.0"
    references = ("https://arxiv.org/abs/1312.6120",)
    needs_initial_weights = True
    Options = Options

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        for segment in analysis.segments:
            if any(_is_orthogonal(layer) for layer in segment.layers):
                yield self._judge(analysis, segment)

    def _judge(self, analysis: Analysis, segment: Segment) -> Finding | NotApplicable:
        where = stretch(paths(layer.node for layer in segment.layers))
        if segment.ends in ("norm", "softmax"):
            return NotApplicable(f"it ends in a {segment.ends}: its scale does not matter", where)
        wider = [(layer, r) for layer in segment.layers if (r := _ratio(layer)) < 1]
        lost = sum(math.log10(r) for _, r in wider)
        gain = segment.log10_gain
        if -lost < self.options.decades or gain is None or gain > -self.options.decades:
            return NotApplicable("its orthogonal layers lose little", where)
        layer, ratio = wider[0]
        modules = paths(one.node for one, _ in wider)
        return self.finding(
            Severity.INFO,
            f"orthogonal weights in {plural(len(wider), 'layer')} that get wider "
            f"({stretch(modules)}) shrink the squared length by {factor(lost)}.",
            collapsed(modules), modules=modules, count=len(wider),
            site=site(analysis, layer.node), cause=segment.start,
            evidence={"log10_gain": lost, "ratio": ratio, "threshold": self.options.decades,
                      "formula": "Π min(1, n_in/n_out)"},
            suggestion=Suggestion(
                f"multiply the gain by √(n_out/n_in), {number(ratio**-0.5)} in the first",
                "nn.init.orthogonal_(w, gain=math.sqrt(2 * max(w.shape[0] / w.shape[1], 1)))",
                {"factor": ratio**-0.5},
                Remedy(INITIALIZATION, {
                    value: law for one, r in wider if one.weight is not None and one.weight.law
                    for value, law in redrawn(one.node, rescaled(one.weight.law, 1 / r)).items()
                })),
            claim=stretch_claim(segment, lost, self.options.decades),
        )  # fmt: skip


def _is_orthogonal(layer: Layer) -> bool:
    law = layer.weight.law if layer.weight is not None else None
    return law is not None and law.family == "orthogonal"


def _ratio(layer: Layer) -> float:
    """n_in/n_out of an orthogonal layer; 1 for any other."""
    if not _is_orthogonal(layer) or layer.fans is None or layer.node.op != "linear":
        return 1.0
    return layer.fans.fan_in / layer.fans.width
