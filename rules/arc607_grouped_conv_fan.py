"""ARC607 grouped-conv-fan."""

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
from archlint.signal.weights import off_scale, rescaled_by
from archlint.wording import collapsed, factor, number, paths, plural, site, stretch

_NUMERATORS = (1.0, 2.0)  # of the fan-out initializers: for linear maps and for ReLU


@dataclass(frozen=True)
class Options:
    """``groups``: fewer are never reported; ``decades``: of the product over a stretch from which
    on it is reported."""

    groups: int = 4
    decades: float = 1.0


class GroupedConvFan(Rule):
    """A grouped convolution was scaled by a fan-out that forgets the groups.

    ## What it does
    Finds grouped and depthwise convolutions whose variance is that of `mode="fan_out"` as torch
    counts it, k²·C_out, where one input feeds k²·C_out/groups outputs.

    ## Why is this bad
    The weights are too small by √groups: a depthwise convolution over 64 channels shrinks the
    squared length 64 times.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)  # error: ARC607
            self.pointwise = nn.Conv2d(16, 32, 1)
            self.head = nn.Conv2d(32, 10, 1)
            for layer in (self.depthwise, self.pointwise):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(layer.bias)

        def forward(self, x):
            x = torch.relu(self.depthwise(x))
            return self.head(torch.relu(self.pointwise(x)))
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
            self.pointwise = nn.Conv2d(16, 32, 1)
            self.head = nn.Conv2d(32, 10, 1)
            for layer in (self.depthwise, self.pointwise):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

        def forward(self, x):
            x = torch.relu(self.depthwise(x))
            return self.head(torch.relu(self.pointwise(x)))
    ```

    ## How it is computed
    Var w · k² · C_out is 1 or 2 within the sampling error, in a convolution of four groups or more:
    the deficit is the number of groups. Its product over a stretch must reach a decade. Before a
    normalisation the scale does not matter, and nothing is reported.

    ## What would confirm it
    The variance of the convolution's output.

    ## Options
    `groups` (4), `decades` (1.0).

    ## References
    torch.nn.init, `_calculate_fan_in_and_fan_out`.
    """

    code = "ARC607"
    slug = "grouped-conv-fan"
    severity = Severity.WARNING
    since = "0.1.0"
    references = ("https://pytorch.org/docs/stable/nn.init.html",)
    needs_initial_weights = True
    Options = Options

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        for segment in analysis.segments:
            if any(_groups(layer) >= self.options.groups for layer in segment.layers):
                yield self._judge(analysis, segment)

    def _judge(self, analysis: Analysis, segment: Segment) -> Finding | NotApplicable:
        def off(layer: Layer) -> float | None:
            return -math.log10(_groups(layer)) if self._is_wrong(analysis, layer) else None

        wrong = off_scale(segment, off, self.options.decades, "grouped convolution")
        if isinstance(wrong, NotApplicable):
            return wrong
        layer = wrong.layers[0]
        assert layer.fans is not None  # of what _is_wrong says yes to
        modules = paths(one.node for one in wrong.layers)
        std = math.sqrt((layer.weight_second_moment or 0.0) * _groups(layer))
        return self.finding(
            Severity.WARNING,
            f"the weights of {plural(len(modules), 'grouped convolution')} ({stretch(modules)}) "
            f"are scaled by a fan-out that forgets {_groups(layer)} groups: the squared length is "
            f"too small by {factor(wrong.decades)}.",
            collapsed(modules), modules=modules, count=len(modules),
            site=site(analysis, layer.node), cause=segment.start,
            evidence={"groups": _groups(layer), "fan_out": layer.fans.fan_out,
                      "log10_gain": wrong.decades, "threshold": self.options.decades,
                      "formula": "fan_out = k²·C_out/groups"},
            suggestion=Suggestion(
                f"divide the fan-out by the groups, or use mode='fan_in': std {number(std)}",
                'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")', {"std": std},
                Remedy(INITIALIZATION, {
                    value: law for one in wrong.layers if one.weight is not None and one.weight.law
                    for value, law in redrawn(
                        one.node, rescaled(one.weight.law, float(_groups(one)))).items()
                })),
            claim=stretch_claim(segment, wrong.decades, self.options.decades),
        )  # fmt: skip

    def _is_wrong(self, analysis: Analysis, layer: Layer) -> bool:
        weight = layer.weight
        groups = _groups(layer)
        if weight is None or weight.law is None or layer.fans is None:
            return False
        if groups < self.options.groups or not weight.law.random or not weight.law.variance:
            return False
        # depthwise with one input a channel: fan-in and fan-out agree where groups do not matter
        counted = weight.law.variance * weight.shape[0] * math.prod(weight.shape[2:])
        error = 1e-3 + 4 * weight.law.relative_error
        if not any(abs(counted / n - 1) <= error for n in _NUMERATORS):
            return False
        return rescaled_by(analysis.graph, layer.node) is None


def _groups(layer: Layer) -> int:
    groups = layer.node.attributes.get("groups", 1) if layer.node.op == "conv" else 1
    return groups if isinstance(groups, int) else 1
