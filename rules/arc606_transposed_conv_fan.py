"""ARC606 transposed-conv-fan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from archlint.finding import Finding, NotApplicable, Remedy, Severity, Suggestion
from archlint.initialization.distribution import Distribution, normal
from archlint.rule import Rule
from archlint.signal.activations import IDENTITY
from archlint.signal.analysis import Analysis
from archlint.signal.claims import stretch_claim
from archlint.signal.criticality import critical
from archlint.signal.remedies import INITIALIZATION, redrawn
from archlint.signal.structure import Layer, Segment
from archlint.signal.weights import off_scale, rescaled_by
from archlint.wording import collapsed, factor, number, paths, plural, site, stretch


@dataclass(frozen=True)
class Options:
    """``mismatch``: |log10| of the ratio of fans above which a layer counts; ``decades``: of the
    product over a stretch from which on it is reported."""

    mismatch: float = 0.3
    decades: float = 1.0


class TransposedConvFan(Rule):
    """The weights of a transposed convolution were scaled by the wrong fan.

    ## What it does
    Compares the fan that `torch.nn.init` counts for a transposed convolution with the number of
    products that one of its outputs sums.

    ## Why is this bad
    A transposed convolution's weight is stored input channels first, so that torch's fan-in is its
    output side, and the stride is not counted at all: an output sums k²·C_in/s² products. Default
    and Kaiming initializers are off by C_in/(C_out·s²), layer after layer.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ModuleList(
                [nn.ConvTranspose2d(8, 32, 4, 2, 1),  # error: ARC606
                 nn.ConvTranspose2d(32, 32, 4, 2, 1)]
            )
            self.head = nn.Conv2d(32, 3, 1)
            for layer in self.up:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

        def forward(self, x):
            for layer in self.up:
                x = torch.relu(layer(x))
            return self.head(x)
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ModuleList(
                [nn.ConvTranspose2d(8, 32, 4, 2, 1),
                 nn.ConvTranspose2d(32, 32, 4, 2, 1)]
            )
            self.head = nn.Conv2d(32, 3, 1)
            for layer in self.up:
                fan = 16 * layer.in_channels / 4
                nn.init.normal_(layer.weight, std=(2 / fan) ** 0.5)
                nn.init.zeros_(layer.bias)

        def forward(self, x):
            for layer in self.up:
                x = torch.relu(layer(x))
            return self.head(x)
    ```

    ## How it is computed
    fan = k²·C_in/(g·s²) is the mean number of products away from the border; torch counts
    k²·C_out/g. A layer counts where Var w follows an initializer that is scaled by torch's fan,
    where its gain is off by more than 0.3 decades, and where the ratio of fans explains it. The
    product over the stretch must reach a decade. Before a normalisation the scale does not matter.

    ## What would confirm it
    The variance of the output away from the border.

    ## Options
    `mismatch` (0.3), `decades` (1.0).

    ## References
    torch.nn.init, `_calculate_fan_in_and_fan_out`.
    """

    code = "ARC606"
    slug = "transposed-conv-fan"
    severity = Severity.WARNING
    since = "0.1.0"
    references = ("https://pytorch.org/docs/stable/nn.init.html",)
    needs_initial_weights = True
    Options = Options

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        for segment in analysis.segments:
            if any(layer.node.op == "conv_transpose" for layer in segment.layers):
                yield self._judge(analysis, segment)

    def _judge(self, analysis: Analysis, segment: Segment) -> Finding | NotApplicable:
        def off(layer: Layer) -> float | None:
            fans = self._fans(analysis, layer)
            return math.log10(fans[0] / fans[1]) if fans is not None else None

        wrong = off_scale(segment, off, self.options.decades, "transposed convolution")
        if isinstance(wrong, NotApplicable):
            return wrong
        layer = wrong.layers[0]
        true, counted = self._fans(analysis, layer) or (1.0, 1.0)
        modules = paths(one.node for one in wrong.layers)
        phi = layer.nonlinearity or IDENTITY
        best = critical(phi)
        gain = best.weight_gain if best is not None else 1.0
        laws: dict[str, Distribution] = {}
        for one in wrong.layers:
            products, _ = self._fans(analysis, one) or (1.0, 1.0)
            own = critical(one.nonlinearity or IDENTITY)
            scale = own.weight_gain if own is not None else 1.0
            laws |= redrawn(one.node, normal(math.sqrt(scale / products)))
        std = math.sqrt(gain / true)
        return self.finding(
            Severity.WARNING,
            f"the weights of {plural(len(modules), 'transposed convolution')} ({stretch(modules)}) "
            f"are scaled by a fan of {number(counted)} where an output sums {number(true)} "
            f"products: the squared length is off by {factor(wrong.decades)}.",
            collapsed(modules), modules=modules, count=len(modules),
            site=site(analysis, layer.node), cause=segment.start,
            evidence={"fan": true, "torch_fan": counted, "log10_gain": wrong.decades,
                      "threshold": self.options.decades, "formula": "k²·C_in/(g·s²)"},
            suggestion=Suggestion(
                f"scale by the true fan k²·C_in/s²: std {number(std)} "
                f"(= √({number(gain)}/{number(true)}))",
                f"nn.init.normal_(layer.weight, std={number(std)})", {"std": std, "fan": true},
                Remedy(INITIALIZATION, laws)),
            claim=stretch_claim(segment, wrong.decades, self.options.decades),
        )  # fmt: skip

    def _fans(self, analysis: Analysis, layer: Layer) -> tuple[float, float] | None:
        """True and counted fan of a layer that the difference puts off; None for any other."""
        weight = layer.weight
        if layer.node.op != "conv_transpose" or weight is None or layer.fans is None:
            return None
        law, gain = weight.law, layer.weight_gain
        if law is None or not gain or rescaled_by(analysis.graph, layer.node) is not None:
            return None
        if not law.initializer.startswith(("kaiming", "xavier", "uniform_(±1/sqrt")):
            return None
        counted = float(math.prod(weight.shape[1:]))
        true = layer.fans.fan_in
        best = critical(layer.nonlinearity or IDENTITY)
        if best is None:
            return None
        off = math.log10(gain / best.weight_gain)
        fans_off = math.log10(true / counted)
        if abs(fans_off) <= self.options.mismatch or abs(off) <= self.options.mismatch:
            return None
        return (true, counted) if off * fans_off > 0 else None
