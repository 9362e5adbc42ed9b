"""ARC609 truncated-normal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from archlint.finding import Finding, NotApplicable, Remedy, Severity, Suggestion
from archlint.initialization.distribution import rescaled
from archlint.rule import Rule
from archlint.signal.activations import IDENTITY
from archlint.signal.analysis import Analysis
from archlint.signal.claims import stretch_claim
from archlint.signal.criticality import critical
from archlint.signal.remedies import INITIALIZATION, redrawn
from archlint.signal.structure import Layer, Segment
from archlint.wording import collapsed, factor, grade, number, paths, plural, site, stretch

# Var of N(0, 1) cut at ±2, 1 − 4φ(2)/(2Φ(2) − 1), and its root.
_VARIANCE, _STD = 0.7737413, 0.8796257


@dataclass(frozen=True)
class Options:
    """``information``, ``warning``: |log10| of the squared length that a stretch loses."""

    information: float = 1.0
    warning: float = 2.0


class TruncatedNormal(Rule):
    """A truncated normal law has less variance than its `std` says.

    ## What it does
    Finds stretches of layers whose weights have 0.774 of the right variance because a normal law
    was cut at two standard deviations and not corrected for it.

    ## Why is this bad
    Cutting at ±2σ leaves 77.4 % of the variance: a factor 0.774 on the squared length of every
    layer, 100 after eighteen. Keras and Flax divide the standard deviation by 0.8796 before they
    draw; `trunc_normal_` of torch does not, and its bounds are absolute numbers.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                *[nn.Sequential(nn.Linear(128, 128), nn.ReLU()) for _ in range(20)]  # error: ARC609
            )
            self.head = nn.Linear(128, 10)
            std = (2 / 128) ** 0.5
            for layer in self.layers:
                nn.init.trunc_normal_(layer[0].weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(layer[0].bias)

        def forward(self, x):
            return self.head(self.layers(x))
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                *[nn.Sequential(nn.Linear(128, 128), nn.ReLU()) for _ in range(20)]
            )
            self.head = nn.Linear(128, 10)
            std = (2 / 128) ** 0.5 / 0.8796
            for layer in self.layers:
                nn.init.trunc_normal_(layer[0].weight, std=std, a=-2 * std, b=2 * std)
                nn.init.zeros_(layer[0].bias)

        def forward(self, x):
            return self.head(self.layers(x))
    ```

    ## How it is computed
    fan-in · Var w is 0.7737 times what the activation needs, within 2 %, and the law is a truncated
    normal one; 0.1114 decades a layer are added up over the stretch.

    ## What would confirm it
    The variance of the weights, and ln M at every layer.

    ## Options
    `information` (1.0), `warning` (2.0).

    ## References
    Hanin & Rolnick 2018 (arXiv 1803.01719), figure 1.
    """

    code = "ARC609"
    slug = "truncated-normal"
    severity = Severity.WARNING
    since = "0.1.0"
    references = ("https://arxiv.org/abs/1803.01719",)
    needs_initial_weights = True
    Options = Options

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        for segment in analysis.segments:
            if any(_is_cut(layer) for layer in segment.layers):
                yield self._judge(analysis, segment)

    def _judge(self, analysis: Analysis, segment: Segment) -> Finding | NotApplicable:
        where = stretch(paths(layer.node for layer in segment.layers))
        if segment.ends in ("norm", "softmax"):
            return NotApplicable(f"it ends in a {segment.ends}: its scale does not matter", where)
        short = [layer for layer in segment.layers if _is_short(layer)]
        total = -len(short) * math.log10(_VARIANCE)
        severity = grade(total, {Severity.INFO: self.options.information,
                                 Severity.WARNING: self.options.warning})  # fmt: skip
        if severity is None:
            return NotApplicable("no variance that matters was cut off", where)
        layer = short[0]
        modules = paths(one.node for one in short)
        now = math.sqrt(layer.weight_second_moment or 0.0)
        return self.finding(
            severity,
            f"the weights of {plural(len(short), 'layer')} ({stretch(modules)}) are cut at two "
            f"standard deviations, which leaves 0.774 of the variance: the squared length changes "
            f"by {factor(-total)} over the stretch.",
            collapsed(modules), modules=modules, count=len(short),
            site=site(analysis, layer.node), cause=segment.start,
            evidence={"variance_left": _VARIANCE, "log10_gain": -total,
                      "threshold": self.options.warning, "formula": "0.7737^layers"},
            suggestion=Suggestion(
                f"divide std by {_STD:.4f}: {number(now / _STD / _STD)} in place of "
                f"{number(now / _STD)}",
                f"std / {_STD:.4f}", {"std": now / _STD / _STD},
                Remedy(INITIALIZATION, {
                    value: law for one in short if one.weight is not None and one.weight.law
                    for value, law in redrawn(
                        one.node, rescaled(one.weight.law, 1 / _VARIANCE)).items()
                })),
            claim=stretch_claim(segment, -total, self.options.warning
                                if severity is Severity.WARNING else self.options.information),
        )  # fmt: skip


def _is_cut(layer: Layer) -> bool:
    law = layer.weight.law if layer.weight is not None else None
    return law is not None and law.family == "truncated_normal" and law.kurtosis < 2.45


def _is_short(layer: Layer) -> bool:
    gain = layer.weight_gain
    best = critical(layer.nonlinearity or IDENTITY)
    if not _is_cut(layer) or not gain or best is None or layer.weight is None:
        return False
    law = layer.weight.law
    error = 0.02 + (4 * law.relative_error if law is not None else 0.0)
    return abs(gain / best.weight_gain / _VARIANCE - 1) <= error
