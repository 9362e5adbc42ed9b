"""ARC601 cloned-weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from archlint.finding import Claim, Finding, NotApplicable, Remedy, Severity, Suggestion
from archlint.graph.model import LayerGraph, Node, Parameter
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.wording import collapsed, plural, site, stretch

_ALIKE = -6.0  # log10 of the mean square of a difference, relative, that rounding may make


@dataclass(frozen=True)
class Options:
    """``error``: equal layers one after another from which on it is an error."""

    error: int = 3


class ClonedWeights(Rule):
    """Several layers start with the same weights.

    ## What it does
    Finds weights that are copies of one another: the same random numbers in storages of their own.

    ## Why is this bad
    `copy.deepcopy` copies the numbers that were drawn. `nn.TransformerEncoder(layer, N)` and
    `nn.TransformerDecoder(layer, N)` do so with their argument, so that all N layers are the same
    function until training tells them apart. Every statement about signals at initialization takes
    the layers to be independent: N equal layers amplify the same directions N times.

    ## Example
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 4)  # error: ARC601

        def forward(self, x):
            return self.layers(x)
    ```

    ## Use instead
    ```python
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 4)
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)

        def forward(self, x):
            return self.layers(x)
    ```

    ## How it is computed
    The record of initialization follows every draw; an array of a file counts as a copy where all
    its elements are equal. Constants and tied weights are no copies, nor is what is not trained.
    Three or more equal layers of which each reads what the one before made are an error; copies
    side by side (the branches of a siamese network, the heads of an ensemble) are a warning.

    ## What would confirm it
    Draw each layer anew, and compare lengths, correlations of positions and gradients.

    ## Options
    `error` (3).

    ## References
    torch.nn.TransformerEncoder, whose page says that all its layers start with the same parameters.
    """

    code = "ARC601"
    slug = "cloned-weights"
    severity = Severity.ERROR
    since = "0.1.0"
    references = ("https://pytorch.org/docs/stable/generated/torch.nn.TransformerEncoder.html",)
    needs_initial_weights = True
    Options = Options

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        graph = analysis.graph
        groups: dict[str, list[Parameter]] = defaultdict(list)
        for parameter in graph.parameters.values():
            if parameter.clone_of is not None and len(parameter.shape) > 1 and _counts(parameter):
                groups[parameter.clone_of].append(parameter)
        if not groups:
            yield NotApplicable("no two weights hold the same numbers")
        # The weights of one layer are copied together: one finding for all of them.
        by_cause: dict[tuple[str, ...], list[list[Parameter]]] = defaultdict(list)
        for first, copies in groups.items():
            original = graph.parameters.get(first)
            members = ([original] if original is not None else []) + copies
            by_cause[_copied([_owner(member) for member in members])].append(members)
        for modules, together in by_cause.items():
            yield self._report(analysis, modules, together)

    def _report(
        self, analysis: Analysis, modules: tuple[str, ...], together: list[list[Parameter]]
    ) -> Finding:
        graph = analysis.graph
        longest = max(together, key=len)
        count = len(longest)
        readers = _readers(graph)
        nodes = [readers.get(parameter.name) for parameter in longest]
        chain = all(
            a is not None and b is not None and _feeds(graph, a, b) for a, b in pairwise(nodes)
        )
        severity = Severity.ERROR if chain and count >= self.options.error else Severity.WARNING
        copy = longest[1] if count > 1 else longest[0]
        where = copy.site or (site(analysis, nodes[-1]) if nodes[-1] is not None else None)
        how = "one after another" if chain else "side by side"
        return self.finding(
            severity,
            f"{plural(count, 'layer')} ({stretch(modules)}) start with the "
            f"same weights, {how}: {plural(len(together), 'weight matrix').replace('xs', 'ces')} "
            f"of each are copies.",
            collapsed(modules), modules=modules, count=count, site=where,
            evidence={"copies": count, "weights": len(together), "chain": chain,
                      "threshold": self.options.error,
                      "formula": "equal elements in storages of their own"},
            suggestion=Suggestion(
                "draw the weights of each layer anew after it was copied",
                "for p in model.parameters():\n    if p.dim() > 1:\n"
                "        nn.init.xavier_uniform_(p)",
                remedy=Remedy("the weights of each layer drawn anew", {
                    value.id: law for members in together for parameter in members[1:]
                    for value in graph.values.values() if value.parameter == parameter.name
                    if (law := parameter.law) is not None
                })),
            claim=Claim("weight difference", copy.name, longest[0].name, -math.inf, _ALIKE,
                        below=True) if count > 1 else None,
        )  # fmt: skip


def _counts(parameter: Parameter) -> bool:
    return parameter.trainable and parameter.law is not None and parameter.law.random


def _owner(parameter: Parameter) -> str:
    return parameter.name.rpartition(".")[0] or parameter.name


def _copied(owners: list[str]) -> tuple[str, ...]:
    """The modules that were copied, out of the owners of one weight of theirs: what is left of the
    paths without the end that all have in common."""
    paths = [owner.split(".") for owner in owners]
    while all(len(path) > 1 for path in paths) and len({path[-1] for path in paths}) == 1:
        paths = [path[:-1] for path in paths]
    return tuple(dict.fromkeys(".".join(path) for path in paths))


def _readers(graph: LayerGraph) -> dict[str, Node]:
    """Parameter name -> the first node that computes with it: past what only rearranges it."""
    found: dict[str, Node] = {}
    for value in graph.values.values():
        if value.parameter is None or not (after := graph.consumers.get(value.id, ())):
            continue
        node = after[0]
        while node.output in graph.static and (after := graph.consumers.get(node.output, ())):
            node = after[0]
        if node.output not in graph.static:
            found.setdefault(value.parameter, node)
    return found


def _feeds(graph: LayerGraph, first: Node, last: Node) -> bool:
    """Whether a node's output reaches another node."""
    end = graph.index[last.id]
    reached = set(first.outputs)
    for node in graph.nodes[graph.index[first.id] + 1 : end + 1]:
        if any(v in reached for v in node.inputs):
            if node is last:
                return True
            reached.update(node.outputs)
    return False
