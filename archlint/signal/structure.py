"""The structure of a network: plain segments of layers, residual trunks, widths.

A *segment* is a path of affine layers between two places where the length is reset (a norm, a
softmax, a recurrent cell, a residual add). A *block* is one residual add with its branch, a
*trunk* a chain of blocks. Both are read off one sweep over the nodes and the dominator tree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from archlint.graph.fans import Fans, fans
from archlint.graph.model import LayerGraph, Node, Parameter
from archlint.graph.ops import OPS
from archlint.signal.activations import Activation, activation
from archlint.signal.dominators import Dominators, carriers
from archlint.signal.moments import UNKNOWN_SIGNAL, Signal

Signals = Mapping[str, Signal]
Ending = Literal["linear", "one-sided", "norm", "unknown"]
Boundary = Literal[
    "input", "norm", "add", "softmax", "recurrent", "branch", "merge", "output", "unknown"
]

LAYERS = frozenset({"linear", "conv", "conv_transpose", "bilinear"})
_SCALES = frozenset({"mul", "div", "neg"})
# What a skip path may hold and still be the trunk itself.
_CHEAP = frozenset(
    {"identity", "cast", "reshape", "transpose", "expand", "flip", "roll", "slice", "pad",
     "select_index", "dropout", "drop_path", "avg_pool", "max_pool", "adaptive_avg_pool",
     "resize", "quantize", "dequantize", "channel_shuffle", "windows", "triangle", "where"}
)  # fmt: skip
_LONGEST_BRANCH = 4096  # nodes; a longer detour is a long skip, and no block of a trunk


@dataclass(frozen=True, slots=True)
class Layer:
    """An affine map and the activation that follows it: one step of a segment.

    ``gain`` is the factor on the squared length of what comes in, biases left out, up to the next
    layer's input; ``slope_gain`` the factor on a small difference between two inputs, with E φ′² in
    place of V(q)/q; ``length_gain`` the factor on the whole length; ``affine_gain`` is ``gain`` up
    to the pre-activation. None where a signal is unknown. ``before`` and ``after`` are the value
    ids between which ``gain`` is meant.
    """

    node: Node
    activation: Node | None
    weight: Parameter | None
    fans: Fans | None
    before: str
    after: str
    gain: float | None
    slope_gain: float | None
    length_gain: float | None
    affine_gain: float | None
    weight_second_moment: float | None
    pre_activation: float | None  # q = E z²

    @property
    def weight_gain(self) -> float | None:
        """fan-in · E w², what the initializer decides."""
        if self.fans is None or self.weight_second_moment is None:
            return None
        return self.fans.fan_in * self.weight_second_moment

    @property
    def nonlinearity(self) -> Activation | None:
        """The activation as a function, None where there is none or it mixes features."""
        if self.activation is None:
            return None
        return activation(self.activation.op, self.activation.attributes)


@dataclass(frozen=True, slots=True)
class Segment:
    """A path of layers without a length reset; ``head`` is the layer that makes the network's
    output, which is no part of ``layers``. ``start``, ``end`` are value ids."""

    layers: tuple[Layer, ...]
    begins: Boundary
    ends: Boundary
    head: Layer | None = None

    @property
    def start(self) -> str:
        """The value that enters the first layer."""
        return self.layers[0].before

    @property
    def end(self) -> str:
        """The value that leaves the last layer."""
        return self.layers[-1].after

    @property
    def log10_gain(self) -> float | None:
        """Σ log10 of the layers' gains; None where one is unknown, −inf where one is zero."""
        return _sum_of_logs([layer.gain for layer in self.layers])

    @property
    def log10_slope_gain(self) -> float | None:
        """The same of small differences: what the gradient is multiplied by."""
        return _sum_of_logs([layer.slope_gain for layer in self.layers])

    @property
    def log10_drift(self) -> float | None:
        """What becomes of the signal: the smaller in size of the length's gain without biases and
        the slope's. Without biases the length is the signal; with them only the slope tells what
        still depends on the input (a sine layer keeps its slope while its biases make most of its
        length)."""
        gain, slope = self.log10_gain, self.log10_slope_gain
        if gain is None or slope is None or self.log10_length_gain is None:
            return gain
        if abs(gain - self.log10_length_gain) < 0.1:
            return gain
        return min(gain, slope, key=abs)

    @property
    def log10_length_gain(self) -> float | None:
        """The same of the whole length, biases included."""
        return _sum_of_logs([layer.length_gain for layer in self.layers])


def _sum_of_logs(gains: Sequence[float | None]) -> float | None:
    total = 0.0
    for gain in gains:
        if gain is None or not math.isfinite(gain):
            return None
        total += math.log10(gain) if gain > 0 else -math.inf
    return total


@dataclass(frozen=True, slots=True)
class Block:
    """One residual add, h ← skip(h) + η·f(h).

    ``fork`` is h's value id, ``skip`` and ``branch`` the add's inputs, ``out`` its output.
    ``scale`` is η where the branch ends in a static factor, else 1. ``gain`` is g =
    E f(h)²/E h² without η. ``growth`` = E out²/E h². ``ending``: a zero-mean linear map, a norm,
    or something whose elements have a common sign. ``normalised``: a norm lies on every path
    through the branch. ``identity_skip``: the skip is h itself, without a projection.
    ``last`` is the node before the static factors at the branch's end.
    """

    add: Node
    fork: str
    skip: str
    branch: str
    out: str
    scale: float
    gain: float | None
    growth: float | None
    ending: Ending
    normalised: bool
    identity_skip: bool
    last: Node | None
    layers: int


@dataclass(frozen=True, slots=True)
class Trunk:
    """A chain of residual blocks, in order, with no norm on the stream between them."""

    blocks: tuple[Block, ...]

    @property
    def start(self) -> str:
        """The value id of the stream before the first block."""
        return self.blocks[0].fork

    @property
    def end(self) -> str:
        """The value id of the stream after the last block."""
        return self.blocks[-1].out

    def log10_growth(self, signals: Signals) -> float | None:
        """Σ log10 of the stream's growth over its blocks without a norm in the branch, what
        follows each add (an activation, a pool) included; None where a signal is unknown."""
        total = 0.0
        for block, following in zip(self.blocks, [*self.blocks[1:], None], strict=True):
            if block.normalised:
                continue
            before = signals.get(block.fork, UNKNOWN_SIGNAL).second_moment
            end = following.fork if following is not None else block.out
            after = signals.get(end, UNKNOWN_SIGNAL).second_moment
            if not before or not after:
                return None
            total += math.log10(after / before)
        return total


@dataclass(frozen=True, slots=True)
class Structure:
    """Segments and trunks, each in execution order."""

    segments: tuple[Segment, ...]
    trunks: tuple[Trunk, ...]


def find_structure(graph: LayerGraph, signals: Signals) -> Structure:
    """Segments and trunks of a graph; cost linear in the nodes (but for a logarithm)."""
    blocks = list(_blocks(graph, signals, Dominators(graph)))
    segments = _segments(graph, signals, {block.add.id for block in blocks})
    return Structure(tuple(segments), tuple(_trunks(graph, blocks)))


# --------------------------------------------------------------------------- residual blocks


def _blocks(graph: LayerGraph, signals: Signals, tree: Dominators) -> Iterator[Block]:
    for node in graph.nodes:
        if node.op != "add":
            continue
        ends = carriers(graph, node)
        if len(ends) != 2 or ends[0] == ends[1]:
            continue
        fork = tree.common(*ends)
        if fork is None:
            continue
        block = _block(graph, signals, node, fork, ends)
        if block is not None:
            yield block


def _block(
    graph: LayerGraph, signals: Signals, add: Node, fork: str, ends: list[str]
) -> Block | None:
    counts = [_skip_layers(graph, end, fork) for end in ends]
    plain = [i for i in (0, 1) if counts[i] == 0]
    if len(plain) == 2:
        return None
    if plain:
        skip = plain[0]
    else:
        projected = [i for i in (0, 1) if counts[i] == 1]
        if len(projected) != 1:
            return None
        skip = projected[0]
    branch = ends[1 - skip]
    inside = _between(graph, branch, fork)
    if inside is None:
        return None
    layers = sum(1 for n in inside if n.op in LAYERS or n.op in ("attention", "lstm", "gru", "rnn"))
    if not layers:
        return None
    scale, last = _static_scale(graph, signals, branch, fork)
    h, f, out = (signals.get(v, UNKNOWN_SIGNAL) for v in (fork, branch, add.output))
    gain = growth = None
    if h.second_moment and f.second_moment is not None:
        gain = f.second_moment / h.second_moment / scale**2 if scale else None
    if h.second_moment and out.second_moment is not None:
        growth = out.second_moment / h.second_moment
    return Block(add, fork, ends[skip], branch, add.output, scale, gain, growth,
                 _ending(last, f), _is_normalised(graph, branch, fork), counts[skip] == 0, last,
                 layers)  # fmt: skip


def _is_normalised(graph: LayerGraph, branch: str, fork: str) -> bool:
    """Whether a norm lies on every path from the fork to the end of a branch."""
    seen: set[str] = set()
    stack = [branch]
    while stack:
        value = stack.pop()
        if value == fork:
            return False
        node = graph.producer.get(value)
        if value in seen or node is None or _is_norm(node):
            continue
        seen.add(value)
        stack += carriers(graph, node)
    return True


def _is_norm(node: Node) -> bool:
    return node.op in OPS and OPS[node.op].kind == "normalisation" and node.op not in (
        "weight_norm", "spectral_norm", "local_response_norm")  # fmt: skip


def _skip_layers(graph: LayerGraph, end: str, fork: str) -> int | None:
    """How many affine layers lie on a simple path from the fork to an end of the add; None where
    the path is not simple."""
    count = 0
    value = end
    while value != fork:
        node = graph.producer.get(value)
        if node is None:
            return None
        inputs = carriers(graph, node)
        if len(inputs) != 1:
            return None
        value = inputs[0]
        if node.op in LAYERS:
            count += 1
        elif _is_norm(node):  # only that of a projection, as in a ResNet's shortcut
            made = graph.producer.get(value)
            if made is None or made.op not in LAYERS:
                return None
        elif node.op not in _CHEAP and node.op not in _SCALES and node.op != "concat":
            return None
    return count


def _between(graph: LayerGraph, end: str, fork: str) -> list[Node] | None:
    """The nodes on paths from the fork to a value; None where there are too many."""
    found: list[Node] = []
    seen = {fork}
    stack = [end]
    while stack:
        value = stack.pop()
        if value in seen:
            continue
        seen.add(value)
        node = graph.producer.get(value)
        if node is None:
            continue
        found.append(node)
        if len(found) > _LONGEST_BRANCH:
            return None
        stack += carriers(graph, node)
    return found


def _static_scale(
    graph: LayerGraph, signals: Signals, branch: str, fork: str
) -> tuple[float, Node | None]:
    """√(E s²) of the static factors at a branch's end, and the node before them."""
    scale = 1.0
    value = branch
    while value != fork:
        node = graph.producer.get(value)
        if node is None:
            return scale, None
        inputs = carriers(graph, node)
        scales = node.op == "mul" or (node.op in _SCALES and node.inputs[0] in inputs)
        if scales and len(inputs) == 1:
            factor = _factor(graph, signals, node)
        elif node.op in _CHEAP and len(inputs) == 1:
            factor = 1.0
        else:
            return scale, node
        if factor is None:
            return scale, node
        scale *= factor
        value = inputs[0]
    return scale, None


def _factor(graph: LayerGraph, signals: Signals, node: Node) -> float | None:
    if node.op == "neg":
        return 1.0
    static = [v for v in node.inputs if v is not None and v not in carriers(graph, node)]
    rms = signals.get(static[0], UNKNOWN_SIGNAL).rms if static else None
    if rms is None:
        return None
    return rms if node.op == "mul" else 1 / rms if rms > 0 else None


_ONE_SIDED_MEAN = 0.15  # |E v|/rms; GELU's is .43 at q = 1, ReLU's .56, a random mean's 1/√n


def _ending(last: Node | None, branch: Signal) -> Ending:
    if last is None or branch.second_moment is None or branch.mean is None:
        return "unknown"
    if _is_norm(last):
        return "norm"
    if branch.one_sided or branch.mean**2 > _ONE_SIDED_MEAN**2 * branch.second_moment:
        return "one-sided"
    return "linear"


def _trunks(graph: LayerGraph, blocks: Sequence[Block]) -> Iterator[Trunk]:
    made_by = {block.out: i for i, block in enumerate(blocks)}
    chains: list[list[Block]] = []
    chain_of: dict[int, int] = {}
    last_of: dict[int, int] = {}
    for i, block in enumerate(blocks):
        previous = _upstream_block(graph, block.fork, made_by)
        if previous is not None and last_of.get(chain_of[previous]) == previous:
            chain_of[i] = chain_of[previous]
            chains[chain_of[i]].append(block)
        else:
            chain_of[i] = len(chains)
            chains.append([block])
        last_of[chain_of[i]] = i
    for chain in chains:
        yield Trunk(tuple(chain))


def _upstream_block(graph: LayerGraph, fork: str, made_by: Mapping[str, int]) -> int | None:
    """The block whose output the stream still is at a fork: only activations and the like lie
    between."""
    value = fork
    while value not in made_by:
        node = graph.producer.get(value)
        if node is None:
            return None
        inputs = carriers(graph, node)
        is_activation = node.op in OPS and OPS[node.op].kind == "activation"
        if len(inputs) != 1 or not (node.op in _CHEAP or node.op in _SCALES or is_activation):
            return None
        value = inputs[0]
    return made_by[value]


# --------------------------------------------------------------------------- segments


@dataclass(frozen=True, slots=True)
class _Start:
    kind: Boundary


@dataclass(slots=True)
class _Draft:
    """A layer while the sweep is under way."""

    node: Node
    before: str
    previous: int | None
    begins: Boundary
    depth: int
    ends: Boundary = "output"
    continued: bool = False
    after: str = ""


_RESETS: dict[str, Boundary] = {
    "softmax": "softmax", "log_softmax": "softmax", "gumbel_softmax": "softmax",
    "rnn": "recurrent", "lstm": "recurrent", "gru": "recurrent",
    "embedding": "input", "embedding_bag": "input", "one_hot": "input", "full": "input",
    "random_normal": "input", "random_uniform": "input",
    "loop": "unknown", "scan": "unknown", "unknown": "unknown",
}  # fmt: skip
_Tail = _Start | int


def _segments(graph: LayerGraph, signals: Signals, adds: set[str]) -> Iterator[Segment]:
    drafts = _sweep(graph, signals, adds)
    outputs = _reaching_outputs(graph)
    taken: set[int] = set()
    found: list[tuple[int, list[int]]] = []
    leaves = [i for i, draft in enumerate(drafts) if not draft.continued]
    for leaf in sorted(leaves, key=lambda i: (-drafts[i].depth, i)):
        path: list[int] = []
        at: int | None = leaf
        while at is not None and at not in taken:
            taken.add(at)
            path.append(at)
            at = drafts[at].previous
        path.reverse()
        found.append((path[0], path))
    for _, path in sorted(found):
        first, last = drafts[path[0]], drafts[path[-1]]
        begins: Boundary = first.begins if first.previous is None else "branch"
        layers: list[Layer] = []
        for here, following in zip(path, [*path[1:], None], strict=True):
            after = drafts[following].before if following is not None else None
            layers.append(_layer(graph, signals, drafts[here], after))
        head = None
        if last.ends == "output" and last.node.output in outputs and _is_head(layers[-1]):
            head = layers.pop()
        kept = _within_numbers(layers)
        if kept:
            whole = len(kept) == len(layers)
            yield Segment(kept, begins, last.ends if whole else "unknown", head)


_BEYOND = 150.0  # decades of a squared length


def _within_numbers(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The layers up to where the squared length is more, or less, than a number can be."""
    total = 0.0
    for i, layer in enumerate(layers):
        if layer.gain is None or not layer.gain or not math.isfinite(layer.gain):
            return tuple(layers if abs(total) < _BEYOND else layers[:i])
        total += math.log10(layer.gain)
    return tuple(layers)


def _is_head(layer: Layer) -> bool:
    """A layer without a hidden nonlinearity makes the output (a squashing one may follow)."""
    if layer.activation is None:
        return True
    phi = layer.nonlinearity
    return phi is not None and phi.saturating and layer.activation.op not in ("relu6", "hardtanh")


_MINOR = 0.1  # share of the squared length below which a part of a merge does not carry it


def _major(graph: LayerGraph, signals: Signals, values: Sequence[str]) -> list[str]:
    """The inputs of a merge that carry its squared length; all where that is not known."""
    weights = []
    for value in values:
        second = signals.get(value, UNKNOWN_SIGNAL).second_moment
        size = graph.values[value].size
        if second is None or size is None:
            return list(values)
        weights.append(second * size)
    return [v for v, w in zip(values, weights, strict=True) if w >= _MINOR * max(weights)]


def _sweep(graph: LayerGraph, signals: Signals, adds: set[str]) -> list[_Draft]:
    """Every layer with the layer before it on the longest path from a reset."""
    drafts: list[_Draft] = []
    tails: dict[str, _Tail] = {value: _Start("input") for value in graph.inputs}
    gates: set[str] = set()

    def depth(tail: _Tail) -> int:
        return drafts[tail].depth if isinstance(tail, int) else 0

    def close(tail: _Tail | None, boundary: Boundary) -> None:
        if isinstance(tail, int) and drafts[tail].ends == "output":
            drafts[tail].ends = boundary

    for node in graph.nodes:
        inputs = [v for v in carriers(graph, node) if v in tails]
        if node.op == "attention":
            for v in inputs:
                if v in node.inputs[:2]:
                    close(tails[v], "softmax")
            inputs = [v for v in inputs if v == node.inputs[2]]
        elif node.op == "mul" and len(inputs) == 2:
            gated = [v for v in inputs if v not in gates] or inputs
            for v in inputs:
                if v not in gated:  # a gate is bounded, whatever its length before
                    close(tails[v], "merge")
            inputs = gated
        tail: _Tail | None
        if node.op in LAYERS:
            tail = max((tails[v] for v in inputs), key=depth, default=_Start("unknown"))
            previous = tail if isinstance(tail, int) else None
            if previous is not None:
                drafts[previous].continued = True
            begins = tail.kind if isinstance(tail, _Start) else drafts[tail].begins
            before = node.inputs[0] or ""
            drafts.append(_Draft(node, before, previous, begins, depth(tail) + 1))
            tail = len(drafts) - 1
        elif node.op in _RESETS or _is_norm(node) or node.id in adds:
            kind: Boundary = (
                "add" if node.id in adds else "norm" if _is_norm(node) else _RESETS[node.op]
            )
            for v in inputs:
                close(tails[v], kind)
            tail = _Start(kind)
        else:
            if len(inputs) > 1 and node.op in ("add", "sub", "concat", "stack"):
                strong = _major(graph, signals, inputs)
                for v in inputs:
                    if v not in strong:
                        close(tails[v], "merge")
                inputs = strong
            tail = max((tails[v] for v in inputs), key=depth, default=None)
        squashes = node.op in ("sigmoid", "hardsigmoid", "tanh")
        passes = bool(inputs) and inputs[0] in gates and node.op in _CHEAP
        for out in node.outputs:
            if tail is not None:
                tails[out] = tail
            if squashes or passes:
                gates.add(out)
    return drafts


def _reaching_outputs(graph: LayerGraph) -> set[str]:
    """The values from which a graph output is reached without another layer or norm."""
    found = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node.op in LAYERS or _is_norm(node) or node.op in ("lstm", "gru", "rnn"):
            continue
        if any(out in found for out in node.outputs):
            found.update(carriers(graph, node))
    return found


def _following_activation(graph: LayerGraph, output: str) -> tuple[Node | None, str, str]:
    """The nonlinearity after a layer, the value it reads and the value it makes; ops that keep or
    scale the elements are passed. Without one both are the layer's own output."""
    value = output
    while True:
        readers = [n for n in graph.consumers.get(value, ()) if n.op != "shape"]
        for node in readers:
            if node.op in OPS and OPS[node.op].kind == "activation":
                return node, value, node.output
        if len(readers) != 1 or len(carriers(graph, readers[0])) != 1:
            return None, output, output
        if readers[0].op not in _CHEAP - {"where", "triangle"} | _SCALES:
            return None, output, output
        value = readers[0].output


def _layer(graph: LayerGraph, signals: Signals, draft: _Draft, after: str | None) -> Layer:
    node = draft.node
    nonlinear, bend, out = _following_activation(graph, node.output)
    after = after if after is not None else out
    weight_position = 2 if node.op == "bilinear" else 1
    weight_value = node.inputs[weight_position]
    before, pre, post = (signals.get(v, UNKNOWN_SIGNAL) for v in (draft.before, node.output, after))
    weight = signals.get(weight_value or "", UNKNOWN_SIGNAL)
    count = fans(node, graph)
    gain = length = affine = None
    m, q, m_after = before.second_moment, pre.second_moment, post.second_moment
    bias = bias_second_moment(signals, node)
    if m and q is not None and bias is not None:
        affine = max(q - bias, 0.0) / m
        if m_after is not None and q > 0:
            gain, length = affine * m_after / q, m_after / m
        elif q == 0:
            gain = length = 0.0
    parameter = graph.parameter(weight_value)
    layer = Layer(node, nonlinear, parameter, count, draft.before, after, gain, gain, length,
                  affine, weight.second_moment, q)  # fmt: skip
    z = signals.get(bend, UNKNOWN_SIGNAL)
    if count is None or gain is None or z.second_moment is None or z.mean is None:
        return layer
    if layer.nonlinearity is not None:
        moments = layer.nonlinearity.moments(z.mean, max(z.second_moment - z.mean**2, 0.0))
        if moments.second_moment > 0:
            steep = moments.slope * z.second_moment / moments.second_moment
            layer = replace(layer, slope_gain=gain * steep)
    return layer


def bias_second_moment(signals: Signals, node: Node) -> float | None:
    """Of a layer's bias; zero where it has none, None where it is not known."""
    position = 3 if node.op == "bilinear" else 2
    if len(node.inputs) <= position or (value := node.inputs[position]) is None:
        return 0.0
    return signals.get(value, UNKNOWN_SIGNAL).second_moment
