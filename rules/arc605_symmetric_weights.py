"""ARC605 symmetric-weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

from archlint.finding import Claim, Finding, NotApplicable, Remedy, Severity, Suggestion
from archlint.graph.model import LayerGraph, Node, Parameter
from archlint.initialization.distribution import normal
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.signal.remedies import INITIALIZATION, redrawn
from archlint.signal.weights import Weighted, weighted
from archlint.wording import collapsed, number, paths, plural, site, stretch

_CONSTANT = ("constant", "ones")
_ALIKE = -6.0  # log10 of the variance between units, relative, that rounding may make


class SymmetricWeights(Rule):
    """All units of a layer start with the same weights.

    ## What it does
    Finds hidden layers whose weights are one number other than zero.

    ## Why is this bad
    Units with equal weights compute the same, so the layer is one unit wide however many it has:
    only the sum of its inputs passes. Where the weights of the next layer are equal too, the
    gradients of the units are equal as well, and no training tells them apart.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 32)
            self.second = nn.Linear(32, 32)
            self.head = nn.Linear(32, 10)
            nn.init.constant_(self.first.weight, 0.02)  # error: ARC605
            nn.init.constant_(self.second.weight, 0.03)

        def forward(self, x):
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))))
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(64, 32)
            self.second = nn.Linear(32, 32)
            self.head = nn.Linear(32, 10)
            nn.init.kaiming_normal_(self.first.weight, nonlinearity="relu")
            nn.init.kaiming_normal_(self.second.weight, nonlinearity="relu")

        def forward(self, x):
            return self.head(torch.relu(self.second(torch.relu(self.first(x)))))
    ```

    ## How it is computed
    The law of a weight is constant and not zero, its layer has more than one unit a group and
    another affine map reads what it makes. Zeros, which switch a branch off by design, are no
    finding here, nor are identity weights, scales, fixed filters and output layers. An error where
    the next layer is symmetric too, else a warning: then the next layer's random weights do tell
    the units apart.

    ## What would confirm it
    The rows of the weight's gradient are equal.

    ## References
    Goodfellow, Bengio & Courville 2016, Deep Learning, section 8.4 (breaking symmetry).
    """

    code = "ARC605"
    slug = "symmetric-weights"
    severity = Severity.ERROR
    since = "0.1.0"
    references = ("https://www.deeplearningbook.org/contents/optimization.html",)
    needs_initial_weights = True

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        graph = analysis.graph
        every = list(weighted(graph))
        flat = {w.node.id: w for w in every if _is_flat(w)}
        if not flat:
            yield NotApplicable("no weight is constant")
        chains: list[list[Weighted]] = []
        taken: set[str] = set()
        for w in flat.values():
            if w.node.id in taken:
                continue
            if not _is_read(graph, w.node):
                yield NotApplicable("it is an output layer", paths([w.node])[0])
                continue
            chain = [w]
            while (after := _next(graph, chain[-1].node)) is not None and after.id in flat:
                if any(after.id == one.node.id for one in chain):
                    break
                chain.append(flat[after.id])
                taken.add(after.id)
            chains.append(chain)
        for chain in chains:
            yield self._report(analysis, chain)

    def _report(self, analysis: Analysis, chain: list[Weighted]) -> Finding:
        first = chain[0]
        law = first.weight.law
        value = law.mean if law is not None else 0.0
        modules = paths(w.node for w in chain)
        severity = Severity.ERROR if len(chain) > 1 else Severity.WARNING
        what = f"all weights of {stretch(modules)} are {number(value)}: its {first.fans.width} " \
               "units compute the same"  # fmt: skip
        if len(chain) > 1:
            what = (
                f"the weights of {plural(len(chain), 'layer')} in a row ({stretch(modules)}) are "
                f"constants: their units compute the same and get the same gradients"
            )
        return self.finding(
            severity, f"{what}.", collapsed(modules), modules=modules, count=len(chain),
            site=first.weight.site or site(analysis, first.node),
            evidence={"value": value, "width": first.fans.width, "layers": len(chain),
                      "formula": "Var w = 0, E w ≠ 0"},
            suggestion=Suggestion(
                "draw the weights at random",
                'nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")',
                remedy=Remedy(INITIALIZATION, {
                    value: law for w in chain
                    for value, law in redrawn(w.node, normal(math.sqrt(2 / w.fans.fan_in))).items()
                })),
            claim=Claim("unit difference", first.node.output, None, -math.inf, _ALIKE, below=True),
        )  # fmt: skip


def _is_flat(w: Weighted) -> bool:
    law = w.weight.law
    if law is None or law.family not in _CONSTANT or not law.exact or law.mean == 0.0:
        return False
    groups = w.node.attributes.get("groups", 1)
    width = w.fans.width // (groups if isinstance(groups, int) else 1)
    return w.weight.trainable and width > 1 and _is_matrix(w.weight)


def _is_matrix(weight: Parameter) -> bool:
    return len(weight.shape) > 1 and min(weight.shape[:2]) > 1


def _is_read(graph: LayerGraph, node: Node) -> bool:
    """Whether another affine map is downstream."""
    return _next(graph, node) is not None


def _next(graph: LayerGraph, node: Node) -> Node | None:
    """The first affine map that reads what a node makes."""
    seen: set[str] = set()
    queue = [node.output]
    while queue:
        value = queue.pop(0)
        for after in graph.consumers.get(value, ()):
            if after.op in ("linear", "conv", "conv_transpose", "bilinear"):
                return after
            if after.id not in seen:
                seen.add(after.id)
                queue += after.outputs
    return None
