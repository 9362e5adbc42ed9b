"""ARC403 epsilon-dominated-norm."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from archlint.finding import Claim, Finding, NotApplicable, Remedy, Severity, Suggestion
from archlint.graph.model import LayerGraph, Node
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.signal.dominators import Dominators
from archlint.wording import collapsed, limits, number, paths, plural, site

_NORMS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm", "standardise")


@dataclass(frozen=True)
class Options:
    """``share``: v/(v + ε), the part of the output's variance that is there, below which a norm is
    reported."""

    share: float = 0.9


@dataclass(frozen=True)
class _Dominated:
    """A norm with its share v/(v + ε). ``through``: all of the signal goes through it."""

    node: Node
    share: float
    eps: float
    through: bool

    @property
    def decades(self) -> float:
        """What is missing of the variance, if no skip connection carries the signal past it."""
        return -math.log10(self.share) if self.through else 0.0


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
    v is the predicted variance before the norm, over what the norm averages; a share v/(v + ε)
    below 0.9 (v < 9 ε) is reported, norms with one ε together. It is a warning where all of the
    signal goes through a norm that keeps less than 1 % of it, an error where the last such norm
    before the output keeps less than 10⁻⁴ (with Adam 10⁻⁴ and 10⁻⁸), else a remark: in six layers
    on scikit-learn's digits a last share of 0.14 cost nothing, 0.004 twice the steps, and with
    2·10⁻⁶ SGD did not start at any learning rate. An input that is exactly zero, as after a branch
    that starts at zero, is no finding.

    ## What would confirm it
    The second moment after the norm, without its scale and shift, is v/(v + ε).

    ## Options
    `share` (0.9).

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
        norms = [node for node in analysis.graph.nodes if node.op in _NORMS]
        low: list[tuple[Node, float]] = []
        for node in norms:
            share = _share(analysis, node)
            if share is not None and 0.0 < share < self.options.share:
                low.append((node, share))
            else:
                yield NotApplicable(_why_not(share), paths([node])[0])
        if not low:
            return
        through, last = _through(analysis.graph)
        found: dict[float, list[_Dominated]] = defaultdict(list)
        for node, share in low:
            eps = float(str(node.attributes.get("eps", 1e-5)))
            found[eps].append(_Dominated(node, share, eps, node.output in through))
        for group in found.values():
            yield self._report(analysis, group, last)

    def _report(self, analysis: Analysis, group: list[_Dominated], last: frozenset[str]) -> Finding:
        bounds = limits(self.context.optimizer)
        worst = max(group, key=lambda one: (one.through, -one.share))
        ends = [one for one in group if one.node.output in last]
        end = max(ends, key=lambda one: one.decades, default=None)
        if end is not None and end.decades >= bounds[Severity.ERROR]:
            worst, severity = end, Severity.ERROR
        elif worst.decades >= bounds[Severity.WARNING]:
            severity = Severity.WARNING
        else:
            severity = Severity.INFO
        limit = self.options.share if severity is Severity.INFO else 10 ** -bounds[severity]
        node, share, eps = worst.node, worst.share, worst.eps
        variance = eps * share / (1 - share)
        modules = paths(one.node for one in group)
        smallest = min(one.eps * one.share / (1 - one.share) for one in group)
        wanted = smallest / 99
        also = f" (and {plural(len(group) - 1, 'more norm')})" if group[1:] else ""
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
                f"{number((99 * eps / smallest) ** 0.5)} times larger", f"eps={wanted:.0e}",
                {"eps": wanted},
                Remedy("the suggested epsilon",
                       attributes={item.node.id: {"eps": wanted} for item in group})),
        )  # fmt: skip


def _through(graph: LayerGraph) -> tuple[frozenset[str], frozenset[str]]:
    """The values on all paths to an output, and those of them that are the last norm's."""
    tree = Dominators(graph)
    through: set[str] = set()
    last: set[str] = set()
    for output in graph.outputs:
        path = list(tree.path(output))
        through.update(path)
        last.update([v for v in path if v in graph.producer and graph.producer[v].op in _NORMS][:1])
    return frozenset(through), frozenset(last)


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
