"""ARC201 width-budget-exceeded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from archlint.finding import Claim, Finding, NotApplicable, Severity, Suggestion
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.signal.remedies import widened
from archlint.signal.spread import chance_of_loss, typical_loss
from archlint.signal.structure import Layer, Segment
from archlint.wording import (
    collapsed,
    grade,
    layer_line,
    number,
    paths,
    plural,
    site,
    sketch,
    stretch,
)


@dataclass(frozen=True)
class Options:
    """``least-layers``: shorter stretches are never reported. ``warning``, ``error``: β from which
    a finding has that severity with SGD; with Adam twice as much."""

    least_layers: int = 4
    warning: float = 2.5
    error: float = 10.0


class WidthBudgetExceeded(Rule):
    """A stack is so narrow for its depth that the signal's length is a lottery at every draw.

    ## What it does
    Adds up, over every stretch without a norm or a residual add, how much each layer lets the
    squared length (and the squared gradient) vary from one initialization to the next.

    ## Why is this bad
    Even with the right weight variance the logarithm of the squared length has the variance
    β ≈ 5 Σ 1/width and the mean −β/2: the mean length is kept by few huge draws while the typical
    one loses a factor e^(β/2). At β = 10 eight draws of ten lose ten times or more, and SGD starts
    several times later or not at all.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                *[nn.Sequential(nn.Linear(15, 15), nn.ReLU()) for _ in range(50)]  # error: ARC201
            )
            self.head = nn.Linear(15, 10)
            for layer in self.layers:
                nn.init.kaiming_normal_(layer[0].weight, nonlinearity="relu")
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
                *[nn.Sequential(nn.Linear(128, 128), nn.ReLU()) for _ in range(50)]
            )
            self.head = nn.Linear(128, 10)
            for layer in self.layers:
                nn.init.kaiming_normal_(layer[0].weight, nonlinearity="relu")
                nn.init.zeros_(layer[0].bias)

        def forward(self, x):
            return self.head(self.layers(x))
    ```

    ## How it is computed
    β is the sum over layers of Var ln of the layer's factor: exactly ψ-functions of a binomial
    count for ReLU and its leaky kin, ψ₁(n/κ) with κ = E φ⁴/(E φ²)² − 1 for the rest (5 for ReLU, 2
    for a linear map, 3 for orthogonal weights before ReLU). The width of a convolution is its
    number of channels, less what decorrelated positions average out. A single narrow linear layer
    between wide ones is a bottleneck by design and does not count.

    ## What would confirm it
    The variance of ln M at the end of the stretch over independent draws is β within its error.

    ## Options
    `least-layers` (4), `warning` (2.5), `error` (10.0).

    ## References
    Hanin & Rolnick 2018 (arXiv 1803.01719). Hanin 2018 (1801.03744). Hanin & Nica 2018
    (1812.05994).
    """

    code = "ARC201"
    slug = "width-budget-exceeded"
    severity = Severity.ERROR
    since = "0.1.0"
    references = (
        "https://arxiv.org/abs/1803.01719",
        "https://arxiv.org/abs/1801.03744",
        "https://arxiv.org/abs/1812.05994",
    )
    Options = Options

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        for segment in analysis.segments:
            yield self._judge(analysis, segment)

    def _judge(self, analysis: Analysis, segment: Segment) -> Finding | NotApplicable:
        where = stretch(paths(layer.node for layer in segment.layers))
        layers = _without_bottlenecks(segment.layers)
        if len(layers) < self.options.least_layers:
            return NotApplicable(f"only {plural(len(layers), 'layer')} that count", where)
        if segment.ends == "add":
            return NotApplicable("it is the branch of a residual add", where)
        counted = Segment(tuple(layers), segment.begins, segment.ends, segment.head)
        length, gradient = analysis.laws(counted)
        if length is None or gradient is None:
            return NotApplicable("the spread is not known on all of it", where)
        forward, backward = length.variance, gradient.variance
        law = length if forward >= backward else gradient
        beta = law.variance
        scale = 2.0 if self.context.optimizer == "adam" else 1.0
        bounds = {Severity.WARNING: self.options.warning * scale,
                  Severity.ERROR: self.options.error * scale}  # fmt: skip
        severity = grade(beta, bounds)
        if severity is None:
            return NotApplicable(f"β = {number(beta)} is within the budget", where)
        if analysis.graph.weights != "initial":
            severity = Severity.INFO  # what starts training matters less to what was trained
        what = "squared length" if forward >= backward else "squared gradient"
        modules = paths(layer.node for layer in layers)
        inverse = sum(1 / layer.fans.width for layer in layers if layer.fans is not None)
        limit = bounds[Severity.WARNING]
        times = beta / limit
        widest = max(layer.fans.width for layer in layers if layer.fans is not None)
        wanted = int(widest * times) + 1
        message = (
            f"the {what} has β = {number(beta)} over {plural(len(layers), 'layer')} ({where}), "
            f"Σ 1/width = {number(inverse)}. A typical draw loses {typical_loss(law):.1f} decades "
            f"against the mean; {chance_of_loss(law):.0%} of draws lose a factor of ten or more."
        )
        return self.finding(
            severity, message, collapsed(modules), modules=modules, count=len(layers),
            site=site(analysis, layers[0].node), cause=segment.start,
            evidence={"beta": beta, "forward": forward, "gradient": backward,
                      "sum_of_inverse_widths": inverse, "chance_of_tenfold_loss":
                      chance_of_loss(law), "threshold": bounds.get(severity, limit)},
            claim=Claim("length spread" if forward >= backward else "gradient spread", segment.end,
                        segment.start, beta, bounds.get(severity, limit)),
            suggestion=Suggestion(
                f"make the layers about {number(times)} times wider (width {wanted}), or fewer, or "
                "add residual connections or a layer norm every few layers",
                values={"width": wanted, "times": times},
                remedy=widened(layers, times)),
            sketch=sketch([layer_line(analysis, layer) for layer in layers]),
        )  # fmt: skip


def _without_bottlenecks(layers: Sequence[Layer]) -> list[Layer]:
    """Leave out linear layers a quarter as wide as both neighbours: codes, adapters, low ranks."""
    kept = []
    for i, layer in enumerate(layers):
        after = layers[i + 1].fans if i + 1 < len(layers) else None
        if (layer.activation is None and layer.fans is not None and after is not None
                and 4 * layer.fans.width <= min(layer.fans.fan_in, after.width)):  # fmt: skip
            continue
        kept.append(layer)
    return kept
