"""ARC403 epsilon-dominated-norm."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from archlint.finding import Claim, Finding, NotApplicable, Severity, Suggestion
from archlint.graph.model import Node
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.wording import collapsed, number, paths, plural, site

_NORMS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "standardise")


@dataclass(frozen=True)
class Options:
    """``warning``, ``error``: share v/(v + ε) of the output's variance below which a norm is
    reported."""

    warning: float = 0.9
    error: float = 0.5


class EpsilonDominatedNorm(Rule):
    """What enters a norm is so small that its epsilon decides the output.

    ## What it does
    Compares the predicted variance of what a norm normalises with the epsilon it adds.

    ## Why is this bad
    A norm divides by √(v + ε). Where v is not far above ε the output is not normalised: its
    variance is v/(v + ε), and the gradient is multiplied by up to 1/√ε (316 at ε = 10⁻⁵). Tables
    with a small standard deviation and a norm right after are the usual case.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(1000, 64)
            nn.init.normal_(self.embedding.weight, std=0.002)
            self.norm = nn.LayerNorm(64)  # error: ARC403
            self.head = nn.Linear(64, 10)

        def forward(self, ids):
            return self.head(self.norm(self.embedding(ids)))
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(1000, 64)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.norm = nn.LayerNorm(64, eps=1e-6)
            self.head = nn.Linear(64, 10)

        def forward(self, ids):
            return self.head(self.norm(self.embedding(ids)))
    ```

    ## How it is computed
    v is the predicted variance before the norm, over what the norm averages; the share v/(v + ε)
    is a warning below 0.9 (v < 9 ε) and an error below 0.5. An input that is exactly zero, as after
    a branch that starts at zero, is no finding.

    ## What would confirm it
    The second moment after the norm, without its scale and shift, is v/(v + ε).

    ## Options
    `warning` (0.9), `error` (0.5).

    ## References
    Ba, Kiros & Hinton 2016, Layer Normalization (arXiv 1607.06450).
    """

    code = "ARC403"
    slug = "epsilon-dominated-norm"
    severity = Severity.ERROR
    since = "0.1.0"
    references = ("https://arxiv.org/abs/1607.06450",)
    needs_initial_weights = True
    Options = Options

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        graph = analysis.graph
        found: dict[str, list[tuple[float, float, Node]]] = defaultdict(list)
        cause: dict[str, str] = {}  # value -> the first norm too small upstream of it
        for node in graph.nodes:
            upstream = next((cause[v] for v in node.inputs if v in cause), None)
            if node.op in _NORMS:
                where = paths([node])[0]
                share = _share(analysis, node)
                if share is not None and 0.0 < share < self.options.warning:
                    eps = float(str(node.attributes.get("eps", 1e-5)))
                    upstream = upstream or _first_of_stream(analysis, node)
                    found[upstream].append((share, eps, node))
                else:
                    upstream = None  # the length is what it should be again
                    yield NotApplicable(_why_not(share), where)
            if upstream is not None:
                cause.update((out, upstream) for out in node.outputs)
        for group in found.values():
            yield self._report(analysis, group)

    def _report(self, analysis: Analysis, group: list[tuple[float, float, Node]]) -> Finding:
        share, eps, node = group[0]
        variance = eps * share / (1 - share)
        modules = paths(item[2] for item in group)
        severity = Severity.ERROR if share < self.options.error else Severity.WARNING
        wanted = variance / 99
        limit = self.options.error if severity is Severity.ERROR else self.options.warning
        also = f" (and {plural(len(group) - 1, 'more norm')} downstream)" if group[1:] else ""
        return self.finding(
            severity,
            f"{paths([node])[0]}{also} normalises a variance of {number(variance)} with "
            f"ε = {number(eps)}: its output has {number(share)} of the variance it should have.",
            collapsed(modules), modules=modules, count=len(group), site=site(analysis, node),
            cause=node.inputs[0] or "",
            evidence={"variance": variance, "eps": eps, "share": share,
                      "threshold": limit, "formula": "v/(v + ε)"},
            claim=Claim("length", node.output, None, math.log10(share), math.log10(limit), True)
            if _is_plain(analysis, node) else None,
            suggestion=Suggestion(
                f"set eps to {wanted:.0e} or less, or make what comes in "
                f"{number((99 * eps / variance) ** 0.5)} times larger", f"eps={wanted:.0e}",
                {"eps": wanted}),
        )  # fmt: skip


def _is_plain(analysis: Analysis, node: Node) -> bool:
    """Whether scale and shift leave the normalised elements as they are."""
    scale, shift = (
        analysis.signal(v).second_moment if v is not None else None
        for v in (*node.inputs[1:3], None, None)[:2]
    )
    return scale in (None, 1.0) and (shift in (None, 0.0) or node.op == "rms_norm")


def _why_not(share: float | None) -> str:
    if share is None:
        return "the variance before it is not known"
    if share == 0.0:
        return "what it normalises is exactly zero by design"
    return f"v/(v + ε) = {number(share)}"


def _share(analysis: Analysis, node: Node) -> float | None:
    """v/(v + ε) from the signal after the norm, its scale and shift taken out."""
    after = analysis.signal(node.output).second_moment
    has = [i < len(node.inputs) and node.inputs[i] is not None for i in (1, 2)]
    scale = analysis.signal(node.inputs[1]).second_moment if has[0] else 1.0
    shift = 0.0
    if has[1] and node.op != "rms_norm":
        found = analysis.signal(node.inputs[2]).second_moment
        if found is None:
            return None
        shift = found
    if after is None or not scale:
        return None
    return min(max((after - shift) / scale, 0.0), 1.0)


def _first_of_stream(analysis: Analysis, node: Node) -> str:
    """The start of the residual stream that a norm reads, else the value it reads."""
    value = node.inputs[0] or ""
    for trunk in analysis.trunks:
        if value == trunk.start or any(value == block.out for block in trunk.blocks):
            return trunk.start
    return value
