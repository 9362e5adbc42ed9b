"""ARC101 length-drift."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from archlint.finding import Finding, NotApplicable, Severity
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.signal.claims import drift_claim
from archlint.signal.structure import Segment
from archlint.wording import (
    collapsed,
    factor,
    grade,
    initializer_for,
    is_trained,
    layer_line,
    limits,
    number,
    paths,
    plural,
    present_initializer,
    site,
    sketch,
    stretch,
)


@dataclass(frozen=True)
class Options:
    """``least-layers``: shorter stretches are never reported. ``decades``: the drift of the
    squared length from which it is worth a remark; a warning is at twice, an error at four
    times as much."""

    least_layers: int = 3
    decades: float = 1.0


class LengthDrift(Rule):
    """The squared length of the signal grows or shrinks exponentially along a plain stack.

    ## What it does
    Follows every stretch of linear and convolutional layers without a norm or a residual add, and
    multiplies the factors by which each layer changes the squared length of the signal.

    ## Why is this bad
    A factor that is not one is raised to the power of the depth. PyTorch's default weights keep a
    sixth of the squared length through Linear and ReLU: after 30 layers 10⁻²³ is left of what
    depends on the input, and of the gradient. SGD stops starting near 10⁻⁵.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                *[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(20)]  # error: ARC101
            )
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            return self.head(self.layers(x))
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                *[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(20)]
            )
            self.head = nn.Linear(64, 10)
            for layer in self.layers:
                nn.init.kaiming_normal_(layer[0].weight, nonlinearity="relu")
                nn.init.zeros_(layer[0].bias)

        def forward(self, x):
            return self.head(self.layers(x))
    ```

    ## How it is computed
    Layer j with weight variance v and true fan-in n multiplies the squared length by
    g = v·n·V(q)/q, where q is the variance of its pre-activation and V(q) = E φ(√q Z)² (½q for
    ReLU). Zero padding, pooling and dropout are part of g; the biases' own length is not, since it
    carries no signal. The finding is |Σ log₁₀ g| ≥ 1 (info), 2 (warning), 4 (error); with Adam
    twice as much. The last linear layer is left out: a head may be small on purpose.

    ## What would confirm it
    Draw the network many times: the mean of ln M at the end of the stretch plus half its variance
    is Σ ln g within three standard errors, and the squared gradient has the same factor.

    ## Options
    `least-layers` (3), `decades` (1.0).

    ## References
    Hanin & Rolnick 2018, How to Start Training (arXiv 1803.01719). He et al. 2015 (1502.01852).
    """

    code = "ARC101"
    slug = "length-drift"
    severity = Severity.ERROR
    since = "0.1.0"
    references = ("https://arxiv.org/abs/1803.01719", "https://arxiv.org/abs/1502.01852")
    needs_initial_weights = True
    yields_to = ("ARC606", "ARC607", "ARC609", "ARC610")  # which know the reason
    Options = Options

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        for segment in analysis.segments:
            yield self._judge(analysis, segment)

    def _judge(self, analysis: Analysis, segment: Segment) -> Finding | NotApplicable:
        layers = segment.layers
        modules = paths(layer.node for layer in layers)
        where = stretch(modules)
        if len(layers) < self.options.least_layers:
            return NotApplicable(f"only {plural(len(layers), 'layer')}", where)
        if segment.ends == "norm":
            return NotApplicable("a norm at its end resets the length", where)
        if segment.ends in ("add", "softmax", "recurrent", "merge"):
            return NotApplicable(f"it ends in a {segment.ends}, which bounds what it passes", where)
        if is_trained(layers):
            return NotApplicable("its weights are trained", where)
        drift = segment.log10_drift
        if drift is None:
            return NotApplicable("the length is not known on all of it", where)
        severity = grade(abs(drift), limits(self.context.optimizer, self.options.decades))
        if severity is None:
            return NotApplicable(f"the squared length changes by {factor(drift)} only", where)
        verb = "shrinks" if drift < 0 else "grows"
        each = drift / len(layers)
        message = (
            f"the squared length of the signal {verb} by a factor of {factor(drift)} over "
            f"{plural(len(layers), 'layer')} ({where}), {number(10**each)} per layer."
        )
        known = present_initializer(layers)
        if known:
            message += f" The weights look like {known}."
        total = segment.log10_length_gain
        if drift < 0 and total is not None and total - drift >= 2:
            message += (
                f" What is left at the end, {factor(total)} of the squared length, are the biases: "
                "the output hardly depends on the input any more."
            )
        return self.finding(
            severity, message, collapsed(modules), modules=modules,
            count=len(layers), site=site(analysis, layers[0].node), cause=segment.start,
            evidence={"log10_gain": drift, "gain_per_layer": 10**each, "layers": len(layers),
                      "log10_length_gain": total,
                      "threshold": limits(self.context.optimizer, self.options.decades)[severity],
                      "formula": "sum of log10(Var(w)·fan_in·V(q)/q)"},
            suggestion=initializer_for(layers),
            claim=drift_claim(segment, drift,
                              limits(self.context.optimizer, self.options.decades)[severity]),
            sketch=sketch([layer_line(analysis, layer) for layer in layers]),
        )  # fmt: skip
