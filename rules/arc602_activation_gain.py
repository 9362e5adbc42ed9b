"""ARC602 activation-gain-mismatch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from archlint.finding import Finding, NotApplicable, Severity, Site
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.signal.claims import drift_claim
from archlint.signal.criticality import critical
from archlint.signal.structure import Layer, Segment
from archlint.wording import (
    collapsed,
    factor,
    initializer_for,
    is_trained,
    layer_line,
    number,
    paths,
    plural,
    present_initializer,
    site,
    sketch,
    stretch,
)

_PERIODIC = ("sin", "cos")  # their scale is a frequency, chosen for the data (SIREN)


@dataclass(frozen=True)
class Options:
    """``least-layers``: shorter stretches are never reported. ``mismatch``: |log10| of the ratio of
    gains below which a layer counts as right. ``decades``: the drift that the stretch must show."""

    least_layers: int = 3
    mismatch: float = 0.05
    decades: float = 1.0


class ActivationGainMismatch(Rule):
    """The weights' scale belongs to another activation than the one that follows.

    ## What it does
    Compares fan-in · Var w of every layer with the value that keeps the length through the
    activation after it, counted on the fan-in that the graph shows.

    ## Why is this bad
    He's 2/fan-in is right for ReLU, 1/fan-in for SELU and tanh, and wrong for each other's. GELU
    and SiLU keep no length at all in a plain stack: with 2/fan-in the signal finally halves at
    every layer.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(
                *[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(5)]  # error: ARC602
            )
            self.head = nn.Linear(64, 10)
            for layer in self.layers:
                nn.init.xavier_normal_(layer[0].weight)
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
                *[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(5)]
            )
            self.head = nn.Linear(64, 10)
            for layer in self.layers:
                nn.init.kaiming_normal_(layer[0].weight, nonlinearity="relu")
                nn.init.zeros_(layer[0].bias)

        def forward(self, x):
            return self.head(self.layers(x))
    ```

    ## How it is computed
    r = fan-in · Var w / σ_w², with σ_w² the critical gain of the activation (2 for ReLU,
    2/(1 + s²) for a leaky one, 1 for tanh and SELU). A finding needs |log₁₀ r| > 0.05 beyond the
    sampling error in most layers of a stretch that drifts by a factor of ten or more. Where the
    drift alone is bad enough, ARC101 reports it and this rule stays silent.

    ## What would confirm it
    ln M at every layer of the stretch follows Σ ln g.

    ## Options
    `least-layers` (3), `mismatch` (0.05), `decades` (1.0).

    ## References
    He et al. 2015 (arXiv 1502.01852). Schoenholz et al. 2017 (1611.01232). Hanin & Rolnick 2018
    (1803.01719).
    """

    code = "ARC602"
    slug = "activation-gain-mismatch"
    severity = Severity.WARNING
    since = "0.1.0"
    references = (
        "https://arxiv.org/abs/1502.01852",
        "https://arxiv.org/abs/1611.01232",
        "https://arxiv.org/abs/1803.01719",
    )
    needs_initial_weights = True
    yields_to = ("ARC101",)
    Options = Options

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        for segment in analysis.segments:
            yield self._judge(analysis, segment)

    def _judge(self, analysis: Analysis, segment: Segment) -> Finding | NotApplicable:
        layers = segment.layers
        where = stretch(paths(layer.node for layer in layers))
        if len(layers) < self.options.least_layers:
            return NotApplicable(f"only {plural(len(layers), 'layer')}", where)
        if segment.ends in ("norm", "add", "softmax", "recurrent", "merge"):
            return NotApplicable(f"it ends in a {segment.ends}: its scale does not matter", where)
        if is_trained(layers):
            return NotApplicable("its weights are trained", where)
        drift = segment.log10_drift
        if drift is None:
            return NotApplicable("the length is not known on all of it", where)
        if abs(drift) < self.options.decades:
            return NotApplicable(f"the squared length changes by {factor(drift)} only", where)
        wrong = [(layer, r) for layer in layers if (r := self._ratio(layer)) is not None]
        if 2 * len(wrong) <= len(layers):
            return NotApplicable("most of its weights have the right scale", where)
        modules = paths(layer.node for layer, _ in wrong)
        layer, ratio = wrong[0]
        op = layer.activation.op if layer.activation is not None else "a linear map"
        known = present_initializer(layers)
        message = (
            f"the weights of {plural(len(wrong), 'layer')} ({stretch(modules)}) have "
            f"{_between([r for _, r in wrong])} times the variance that {op} needs: the squared "
            f"length changes by {factor(drift)} over the stretch."
        ) + (f" They look like {known}." if known else "")
        return self.finding(
            Severity.WARNING, message, collapsed(modules), modules=modules, count=len(wrong),
            site=site(analysis, layer.node), cause=segment.start,
            related=_initialised(analysis, layer),
            evidence={"ratio": ratio, "weight_gain": layer.weight_gain, "log10_gain": drift,
                      "threshold": self.options.decades,
                      "formula": "fan_in·Var(w)/σ_w² of the activation"},
            claim=drift_claim(segment, drift, self.options.decades),
            suggestion=initializer_for([layer for layer, _ in wrong]),
            sketch=sketch([layer_line(analysis, layer) for layer in layers]),
        )  # fmt: skip

    def _ratio(self, layer: Layer) -> float | None:
        """The layer's gain over the critical one where the two differ, else None."""
        phi = layer.nonlinearity
        gain = layer.weight_gain
        if phi is None or not gain or layer.weight is None or phi.name in _PERIODIC:
            return None
        best = critical(phi)
        if best is None:
            return None
        ratio = gain / best.weight_gain
        law = layer.weight.law
        if law is not None and law.family == "orthogonal" and layer.fans is not None:
            # the gain that was asked for; what a wider layer loses is ARC610's
            ratio *= max(layer.fans.width / layer.fans.fan_in, 1.0)
        error = 4 * law.relative_error if law is not None else 0.0
        if abs(math.log10(ratio)) <= self.options.mismatch + error / math.log(10):
            # The right scale, and yet no stable length (GELU, SiLU): the scale is not the cause.
            return None
        return ratio


def _between(ratios: Sequence[float]) -> str:
    """One number where all are alike, else the least and the largest."""
    least, most = min(ratios), max(ratios)
    return number(least) if most <= 1.02 * least else f"{number(least)} to {number(most)}"


def _initialised(analysis: Analysis, layer: Layer) -> tuple[tuple[Site, str], ...]:
    """The call that decided the weights, where it is another one than the layer's."""
    weight = layer.weight
    if weight is None or weight.site in (None, site(analysis, layer.node)):
        return ()
    assert weight.site is not None
    law = weight.law
    if law is None or not law.exact:
        return ((weight.site, "initialised here"),)
    name = law.initializer or law.family
    return ((weight.site, f"{name}: std {number(law.std)}, exactly"),)
