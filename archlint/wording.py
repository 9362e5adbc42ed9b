"""How findings put numbers, places and layers into words; shared by the rules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from archlint.finding import Severity, Site, Suggestion

if TYPE_CHECKING:
    from archlint.finding import Finding, Training
    from archlint.graph.model import Node
    from archlint.rule import Optimizer
    from archlint.signal.analysis import Analysis
    from archlint.signal.structure import Layer


def number(x: float) -> str:
    """Three significant digits."""
    return f"{x:.3g}"


def factor(log10: float) -> str:
    """A factor given by its decimal logarithm: ``4.6e-10``, ``250``."""
    if log10 == -math.inf:
        return "0"
    if abs(log10) < 3:
        return number(10**log10)
    exponent = math.floor(log10)
    return f"{10 ** (log10 - exponent):.1f}e{exponent:+03d}"


_NOTHING = -20.0  # decades of a relative difference that is rounding, if anything


def probed(finding: Finding) -> str:
    """``confirmed: 3.1e-16 (99 %: 1.9e-16 … 5.3e-16) in 32 draws; predicted 2.7e-16``; empty
    where no experiment was made."""
    found, claim = finding.measurement, finding.claim
    if finding.verdict is None or found is None or claim is None:
        return ": ".join(t for t in (finding.verdict, found.remark if found else "") if t)
    said = f"{finding.verdict}"
    decides = finding.trial is not None and finding.trial.decides
    if decides:
        said += " by training; measured"
    form = number if "spread" in claim.statistic or claim.statistic == "reach" else factor
    if found.high is not None and "difference" in claim.statistic and found.high < _NOTHING:
        return f"{finding.verdict}: there is none in {plural(found.draws, 'draw')}"
    if found.figure is None or found.low is None or found.high is None:
        text = f"{said}: {found.remark or 'not measured'}"
    else:
        text = (f"{said}: {form(found.figure)} (99 %: {form(found.low)} … "
                f"{form(found.high)}) in {plural(found.draws, 'draw')}; predicted "
                f"{form(claim.predicted)}")  # fmt: skip
    if found.lost:
        text += f"; in {found.lost} of {found.lost + found.draws} draws it is zero or not finite"
    if found.needed is not None and not decides:
        text += f"; about {found.needed} draws would settle it"
    return text


def trained(training: Training) -> str:
    """``7 of 16 draws fail to start``, ``16 of 16 draws start after 90 steps``, and what was not
    decided."""
    text = f"{training.started} of {training.draws} draws start"
    if training.failed:
        text = f"{training.failed} of {training.draws} draws fail to start"
    elif training.steps is not None:
        text += f" after {training.steps} steps"
    if training.failed and training.started:
        text += f", the others start after {training.steps} steps"
    if training.undecided:
        text += f", {training.undecided} were still under way at the end"
    return text


def setting(training: Training) -> str:
    """``scikit-learn's digits, SGD at 0.02, 0.1 and 0.004, 400 steps each``."""
    rates = [f"{rate:g}" for rate in training.rates]
    at = " and ".join([", ".join(rates[:-1]), rates[-1]] if len(rates) > 1 else rates)
    each = " each" if len(rates) > 1 else ""
    name = {"sgd": "SGD", "adam": "Adam"}[training.optimizer]
    return f"{training.task}, {name} at {at}, {training.most} steps{each}"


def tried(finding: Finding) -> str:
    """``7 of 16 draws fail to start; with the suggested initialization 16 of 16 draws start after
    90 steps``; empty where nothing was trained."""
    trial = finding.trial
    if trial is None or trial.found is None:
        return ""
    text = trained(trial.found)
    if trial.remedied is not None and finding.suggestion and finding.suggestion.remedy:
        text += f"; with {finding.suggestion.remedy.words} {trained(trial.remedied)}"
    elif trial.remark:
        text += f" ({trial.remark})"
    return text


def plural(count: int, noun: str) -> str:
    """``1 layer``, ``30 layers``."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def paths(nodes: Iterable[Node]) -> tuple[str, ...]:
    """The module paths of nodes, else their names, each once."""
    return tuple(dict.fromkeys(node.module or node.name or node.id for node in nodes))


def collapsed(modules: Sequence[str]) -> str:
    """One name for several module paths: ``layers.0`` … ``layers.29`` -> ``layers.*``."""
    from archlint.graph.names import collapse

    return collapse(modules) or "model"


def stretch(modules: Sequence[str]) -> str:
    """``layers.0 … layers.28``."""
    return modules[0] if len(modules) == 1 else f"{modules[0]} … {modules[-1]}"


def site(analysis: Analysis, node: Node) -> Site:
    """Where a user finds a node: its source line, else its name in the file."""
    return node.site or Site(analysis.graph.name, node=node.name or node.id)


def limits(optimizer: Optimizer, scale: float = 1.0) -> dict[Severity, float]:
    """|log10| of a squared length beyond which a drift is info, warning, error. SGD stops starting
    near 4.7 decades and Adam near 9 (measured on scikit-learn's digits)."""
    scale *= 2.0 if optimizer == "adam" else 1.0
    return {Severity.INFO: scale, Severity.WARNING: 2 * scale, Severity.ERROR: 4 * scale}


def grade(value: float, bounds: dict[Severity, float]) -> Severity | None:
    """The greatest severity whose bound a value reaches."""
    reached = [severity for severity, bound in bounds.items() if value >= bound]
    return max(reached) if reached else None


def layer_line(analysis: Analysis, layer: Layer) -> str:
    """``layers.0  linear 64→64, relu  rms 1 → 0.41``."""
    node = layer.node
    name = node.module or node.name or node.id
    sizes = ""
    if layer.fans is not None:
        sizes = f" fan-in {layer.fans.fan_in:g}, {layer.fans.width} wide"
    phi = f", {layer.activation.op}" if layer.activation is not None else ""
    before = analysis.signal(layer.before).rms
    after = analysis.signal(layer.after).rms
    rms = ""
    if before is not None and after is not None:
        rms = f"  rms {number(before)} → {number(after)}"
    gain = f"  gain {number(layer.gain)}" if layer.gain is not None else ""
    return f"{name}: {node.op}{sizes}{phi}{rms}{gain}"


def sketch(lines: Sequence[str], ends: int = 2) -> tuple[str, ...]:
    """The first and last lines with a count of those left out."""
    if len(lines) <= 2 * ends + 1:
        return tuple(lines)
    left_out = f"… {len(lines) - 2 * ends} more …"
    return (*lines[:ends], left_out, *lines[-ends:])


# What to write for the critical gain of an activation; the name torch gives its nonlinearity.
_NONLINEARITIES = {"relu": "relu", "relu6": "relu"}


def initializer_for(layers: Sequence[Layer]) -> Suggestion | None:
    """The initializer that keeps the length through these layers, with the value of the standard
    deviation for the commonest of them; None where no scale does."""
    from archlint.signal.activations import IDENTITY
    from archlint.signal.criticality import critical
    from archlint.signal.remedies import initialised

    weighted = [layer for layer in layers if layer.fans is not None]
    if not weighted:
        return None
    layer = max(weighted, key=lambda one: sum(_alike(one, other) for other in weighted))
    assert layer.fans is not None  # chosen above
    if layer.activation is not None and layer.nonlinearity is None:
        return None
    phi = layer.nonlinearity or IDENTITY
    op = layer.activation.op if layer.activation is not None else "linear"
    best = critical(phi)
    fan_in = layer.fans.fan_in
    if best is None:
        return Suggestion(
            f"no weight scale keeps both the signal and the gradient of {op} in range over many "
            f"layers: put a normalisation between them, or use another activation"
        )
    std = math.sqrt(best.weight_gain / fan_in)
    now = math.sqrt(layer.weight_second_moment or 0.0)
    values = {"gain": best.weight_gain, "std": std, "std_now": now, "fan_in": fan_in,
              "bias_variance": best.bias_variance}  # fmt: skip
    remedy = initialised(weighted)
    if not best.stable:
        return Suggestion(
            f"{op} has no stable length in a plain stack: put a normalisation between the layers "
            f"or residual connections around them; the nearest choice is std "
            f"{number(std)} (= √({number(best.weight_gain)}/fan-in), fan-in {fan_in:g}; now "
            f"{number(now)}) with biases of std {number(math.sqrt(best.bias_variance))}",
            f"nn.init.normal_(layer.weight, std={number(std)})", values, remedy)  # fmt: skip
    if op in _NONLINEARITIES:
        code = f'nn.init.kaiming_normal_(layer.weight, nonlinearity="{_NONLINEARITIES[op]}")'
    elif op == "leaky_relu":
        slope = layer.activation.attributes.get("slope", 0.01) if layer.activation else 0.01
        code = f'nn.init.kaiming_normal_(layer.weight, a={slope}, nonlinearity="leaky_relu")'
    else:
        code = f"nn.init.normal_(layer.weight, std={number(std)})"
    return Suggestion(
        f"initialise the weights of {plural(len(weighted), 'layer')} with std {number(std)} "
        f"(= √({number(best.weight_gain)}/fan-in), fan-in {fan_in:g}; now {number(now)}) "
        f"and the biases with zeros, or put a normalisation between the layers",
        code, values, remedy)  # fmt: skip


def _alike(one: Layer, other: Layer) -> bool:
    def key(layer: Layer) -> tuple[object, object]:
        return (layer.activation.op if layer.activation is not None else None,
                layer.fans.fan_in if layer.fans is not None else None)  # fmt: skip

    return key(one) == key(other)


def present_initializer(layers: Sequence[Layer]) -> str:
    """The initializer that most of the layers' weights look like, empty where it is not known."""
    names = [layer.weight.law.initializer for layer in layers
             if layer.weight is not None and layer.weight.law is not None]  # fmt: skip
    names = [name for name in names if name]
    return max(names, key=names.count) if names else ""


def is_trained(layers: Sequence[Layer]) -> bool:
    """Whether one of the weights is no draw of an initializer."""
    return any(
        layer.weight is not None
        and layer.weight.law is not None
        and layer.weight.law.family == "trained"
        for layer in layers
    )
