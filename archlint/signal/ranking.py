"""The greatest k of n: what a router picks, and the weights that it gives to experts.

The scores of one token over the experts are rising functions of normal logits that are independent
from expert to expert, of which softmax needs all. Order statistics of normals have no closed form:
expectations are means over a sample of sorted normals that is the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, reduce
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import attribute
from archlint.signal.activations import activation
from archlint.signal.arithmetic import beside_zeros
from archlint.signal.gaussian import Floats
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal
from archlint.signal.squares import held_above, is_tiny
from archlint.signal.transfer import Step, correlated, known_size, paired, transfers

_NUMBERS = 1 << 19  # in a sample
_RISING = frozenset({"sigmoid", "tanh", "softplus", "hardsigmoid"})


@lru_cache(maxsize=8)
def _sorted_normals(n: int) -> Floats:
    """Rows of n standard normals, the greatest first."""
    rows = max(_NUMBERS // n, 64)
    z = np.random.default_rng(n).standard_normal((rows, n))
    z -= z.mean()
    return np.asarray(-np.sort(-z / z.std(), axis=1), np.float64)


class Groups(NamedTuple):
    """Only the ``chosen`` of ``total`` groups may be picked from, those whose ``best`` scores have
    the greatest sum (DeepSeek-V2 and V3). The scores of the others become ``fill``."""

    total: int
    chosen: int
    best: int
    fill: float

    def hold(self, k: int, n: int, scores: Floats) -> bool:
        """Whether the k greatest of n are all picked from the chosen groups."""
        return k <= self.chosen * (n // self.total) and self.fill <= float(scores.min())


@lru_cache(maxsize=64)
def _places(n: int, k: int, groups: Groups | None) -> npt.NDArray[np.int64]:
    """Where the k greatest that may be picked stand in rows of sorted normals."""
    z = _sorted_normals(n)
    if groups is None or groups.chosen == groups.total:
        return np.broadcast_to(np.arange(k), (len(z), k))
    group = np.random.default_rng(n).permuted(
        np.broadcast_to(np.arange(n) % groups.total, z.shape), axis=1
    )
    member = group[:, :, None] == np.arange(groups.total)
    among_best = member & (member.cumsum(1) <= groups.best)
    sums = (among_best * z[:, :, None]).sum(1)
    allowed = np.zeros(sums.shape, bool)
    greatest = np.argpartition(-sums, groups.chosen - 1, axis=1)[:, : groups.chosen]
    np.put_along_axis(allowed, greatest, True, axis=1)
    free = np.take_along_axis(allowed, group, axis=1)
    return np.argsort(~free, axis=1, kind="stable")[:, :k]


class Scores(NamedTuple):
    """A value as a rising function of normal ``logits``, row by row over n of them."""

    logits: str
    function: Callable[[Floats], Floats]
    groups: Groups | None


def _maker(graph: LayerGraph, value: str | None) -> Node | None:
    """The node that makes a value, behind those that hand it on."""
    node = graph.producer.get(value or "")
    while node is not None and node.op in ("identity", "cast"):
        node = graph.producer.get(node.inputs[0] or "")
    return node


class Picked(NamedTuple):
    """The scores that a router picks: [sample, k], greatest first, and their logits."""

    values: Floats
    logits: Signal


def picked(step: Step, value: str | None) -> Picked | None:
    """The scores that are picked from a value's row, where it holds the greatest k of one: as they
    come out of a top-k, or gathered at the places that one tells."""
    node = _maker(step.graph, value)
    chosen = chooser(step.graph, node) if node is not None else None
    if node is None or chosen is None:
        return None
    axis, k = int(str(chosen.attributes["axis"])), _count(step.graph, chosen)
    scores = _scores(step.graph, step.signals, node.inputs[0], axis)
    order = _scores(step.graph, step.signals, chosen.inputs[0], axis)
    n = known_size(step.graph.shape(node.inputs[0]), (axis,))
    if scores is None or order is None or scores.logits != order.logits or not n or not k:
        return None
    logits = step.signals.get(scores.logits, UNKNOWN_SIGNAL)
    rank = len(logits.roles)
    if not logits.gaussian or rank == 0 or logits.roles[axis % rank] != "feature":
        return None
    if logits.mean is None or logits.second_moment is None:
        return None
    deviation = math.sqrt(max(logits.second_moment - logits.mean**2, 0.0))
    z = logits.mean + deviation * _sorted_normals(n)
    values, groups = scores.function(z), order.groups
    greatest = bool(attribute(chosen.op, chosen.attributes, "largest"))
    if groups is not None and not (greatest and groups.hold(k, n, order.function(z))):
        return None
    if not greatest:
        return Picked(values[:, -k:], logits)
    return Picked(np.take_along_axis(values, _places(n, k, groups), 1), logits)


def chooser(graph: LayerGraph, node: Node) -> Node | None:
    """The top-k that a node is, or whose places it gathers elements at."""
    if node.op == "topk":
        return node
    if node.op not in ("gather_elements", "scatter_elements"):
        return None
    before = _maker(graph, node.inputs[1])
    return before if before is not None and before.op == "topk" else None


def _count(graph: LayerGraph, topk: Node) -> int | None:
    return known_size(graph.shape(topk.outputs[0]), (int(str(topk.attributes["axis"])),))


def _scores(
    graph: LayerGraph, signals: Mapping[str, Signal], value: str | None, axis: int
) -> Scores | None:
    """A value as a rising function of what was not made by such a one."""
    functions: list[Callable[[Floats], Floats]] = []
    groups: Groups | None = None
    while (node := graph.producer.get(value or "")) is not None:
        if node.op in ("identity", "cast"):
            value = node.inputs[0]
        elif node.op == "softmax" and int(str(node.attributes["axis"])) == axis:
            functions.append(_softmax)
            value = node.inputs[0]
        elif node.op in _RISING and (phi := activation(node.op, node.attributes)) is not None:
            functions.append(phi.function)
            value = node.inputs[0]
        elif node.op == "masked_fill" and (found := _groups(graph, signals, node)) is not None:
            groups, value = found, node.inputs[0]
        elif node.op == "add" and (left := beside_zeros(signals, node)) is not None:
            value = left
        else:
            break
    if value is None:
        return None
    return Scores(value, lambda z: reduce(_applied, functions[::-1], z), groups)


_NOT = frozenset({"bitwise_not", "logical_not"})
_FOLDS = _NOT | {"cast", "reshape", "expand", "identity"}


def _groups(graph: LayerGraph, signals: Mapping[str, Signal], filled: Node) -> Groups | None:
    """The groups that a fill leaves: its mask is what was not written over zeros at the places of a
    top-k over groups."""
    node, inverted = graph.producer.get(filled.inputs[1] or ""), False
    while node is not None and node.op in _FOLDS:
        inverted ^= node.op in _NOT
        node = graph.producer.get(node.inputs[0] or "")
    if node is None or node.op != "scatter_elements" or not inverted:
        return None
    chosen, fill = chooser(graph, node), graph.constant(filled.inputs[2])
    score = graph.producer.get(chosen.inputs[0] or "") if chosen is not None else None
    zeros = signals.get(node.inputs[0] or "", UNKNOWN_SIGNAL).second_moment == 0
    if chosen is None or score is None or fill is None or fill.size != 1 or not zeros:
        return None
    total, k = known_size(graph.shape(chosen.inputs[0]), (-1,)), _count(graph, chosen)
    inner = graph.producer.get(score.inputs[0] or "") if score.op == "reduce_sum" else None
    best = 1 if score.op == "reduce_max" else _count(graph, inner) if inner is not None else None
    if total is None or k is None or best is None or (inner is not None and inner.op != "topk"):
        return None
    return Groups(total, k, best, float(fill.reshape(-1)[0]))


def _applied(z: Floats, f: Callable[[Floats], Floats]) -> Floats:
    return f(z)


def _softmax(z: Floats) -> Floats:
    e = np.exp(z - z[:, :1])
    return np.asarray(e / e.sum(axis=1, keepdims=True), np.float64)


@transfers("topk")
def _topk(step: Step) -> tuple[Signal, Signal]:
    """The greatest k of independent normals, or of rising functions of them."""
    return of_picked(step, step.node.outputs[0]), UNKNOWN_SIGNAL


def of_picked(step: Step, value: str) -> Signal:
    """The signal of what was picked. Two rows whose logits do not agree have the means of the
    ranks in common; from there to rows that do agree it goes as the logits do."""
    found = picked(step, value)
    roles = step.signal(0).roles
    if found is None:
        return Signal(roles=roles)
    return _signal(found.values, found.logits).but(roles=roles)


def _signal(values: Floats, logits: Signal) -> Signal:
    mean, second = float(values.mean()), float((values * values).mean())
    apart = float((values.mean(0) ** 2).mean())
    q, centre = logits.second_moment or 0.0, (logits.mean or 0.0) ** 2

    def pair(c: float) -> float | None:
        alike = (c * q - centre) / (q - centre) if q > centre else 1.0
        return correlated(apart + min(max(alike, 0.0), 1.0) * (second - apart), second)

    side = 1 if values.min() >= 0 else -1 if values.max() <= 0 else 0
    return Signal(mean, second, None, None, (), side).but(**paired(logits, pair))


def normalised(step: Step) -> Signal | None:
    """What was picked over its own sum, which makes the weights of a token's experts sum to one."""
    below = _summed(step, step.value(1))
    if below is None or below.op != "reduce_sum" or below.inputs[0] != step.value(0):
        return None
    found = picked(step, step.value(0))
    if found is None or not bool(attribute(below.op, below.attributes, "keepdims")):
        return None
    roles = step.signal(0).roles
    axes = below.attributes["axes"]
    rank = len(roles)
    if not isinstance(axes, tuple) or [roles[int(str(a)) % rank] for a in axes] != ["feature"]:
        return None
    total = found.values.sum(axis=1, keepdims=True)
    return _signal(found.values / total, found.logits).but(roles=roles)


def _summed(step: Step, value: str | None) -> Node | None:
    """What makes a divisor, but for what keeps it from zero."""
    node = _maker(step.graph, value)
    while node is not None and node.op in ("add", "clip", "maximum"):
        total = step.signals.get(node.output, UNKNOWN_SIGNAL).mean or 0.0
        if node.op == "add":
            rest = [v for v in node.inputs if v is not None and not is_tiny(step, v, total)]
            held = rest[0] if len(rest) == 1 else None
        else:
            held = held_above(step, node)
        node = _maker(step.graph, held)
    return node


# --------------------------------------------------------------------------- routing


class Routing(NamedTuple):
    """Every token's k of n experts, by the greatest of their ``logits``."""

    n: int
    k: int
    logits: Signal

    def shared(self, correlation: float | None) -> float | None:
        """Of the k experts of a token, the share that another token has too, whose logits have
        E[z z′]/E z² in common with the first one's."""
        if correlation is None or not self.logits.second_moment or self.logits.mean is None:
            return None
        q, centre = self.logits.second_moment, self.logits.mean**2
        alike = (correlation * q - centre) / (q - centre) if q > centre else 1.0
        return _shared(self.n, self.k, round(min(max(alike, 0.0), 1.0), 3))

    def same_row(self) -> float | None:
        """P(two rows of two tokens meet the same expert)."""
        z = self.logits
        known = [c for c in (z.position_correlation, z.sample_correlation) if c is not None]
        shared = self.shared(known[0] if known else None)
        return None if shared is None else shared / self.k


@lru_cache(maxsize=1024)
def _shared(n: int, k: int, alike: float) -> float:
    """E|S ∩ S′|/k of the places of the greatest k of n normals, and of n with a correlation."""
    if alike in (0.0, 1.0) or k == n:
        return k / n if alike == 0.0 else 1.0
    random = np.random.default_rng(n)
    rows = max(_NUMBERS // (8 * n), 64)
    z, other = random.standard_normal((2, rows, n))
    other = alike * z + math.sqrt(1 - alike * alike) * other
    found = np.zeros((2, rows, n), bool)
    for mine, x in zip(found, (z, other), strict=True):
        np.put_along_axis(mine, np.argpartition(-x, k - 1, axis=1)[:, :k], True, axis=1)
    return float(found.all(0).sum() / (rows * k))


def routing(step: Step, groups: str | None) -> Routing | None:
    """What was picked by whom, from where the rows of every expert end."""
    graph, left, seen = step.graph, [groups], 0
    while left and seen < _MOST_NODES:
        node = graph.producer.get(left.pop(0) or "")
        seen += 1
        if node is None:
            continue
        if node.op != "topk":
            left += node.inputs
            continue
        axis, k = int(str(node.attributes["axis"])), _count(graph, node)
        scores = _scores(graph, step.signals, node.inputs[0], axis)
        n = known_size(graph.shape(node.inputs[0]), (axis,))
        if scores is None or n is None or k is None:
            return None
        return Routing(n, k, step.signals.get(scores.logits, UNKNOWN_SIGNAL))
    return None


_MOST_NODES = 32


def routed_before(step: Step) -> bool:
    """Whether the rows come out of the same experts already."""
    graph = step.graph
    return _of_same_experts(step, lambda node: [graph.producer.get(v or "") for v in node.inputs])


def routed_again(step: Step) -> bool:
    """Whether the rows go through the same experts again."""
    graph = step.graph
    return _of_same_experts(step, lambda node: graph.consumers.get(node.output, ()))


def _of_same_experts(step: Step, following: Callable[[Node], Iterable[Node | None]]) -> bool:
    """Whether there is another matrix of the experts this way, before rows change places."""
    left, seen = list(following(step.node)), 0
    while left and seen < _MOST_NODES:
        node = left.pop(0)
        seen += 1
        if node is None or node.op in ("gather", "reduce_sum", "topk", "sort"):
            continue
        if node.op == "grouped_linear":
            return node.inputs[2] == step.value(2)
        left += following(node)
    return False


def slots(graph: LayerGraph, gather: Node) -> int | None:
    """How often a gather takes every row of its input, where it takes row ⌊i/k⌋ for every i < nk:
    once for each expert of a token."""
    shape, places = graph.shape(gather.inputs[0]), graph.shape(gather.inputs[1])
    node = graph.producer.get(gather.inputs[1] or "")
    order = graph.producer.get(node.inputs[0] or "") if node is not None else None
    if order is None or order.op != "sort" or node is None or node.inputs[0] != order.outputs[1]:
        return None  # it takes another i, or some twice
    if node.op != "floor_divide" or not shape or not places or len(places) != 1:
        return None
    k = graph.constant(node.inputs[1])
    if k is None or k.size != 1 or gather.attributes["axis"] != 0 or shape[0] is None:
        return None
    times = int(k.reshape(-1)[0])
    return times if places[0] == times * shape[0] else None
