"""Suggestions as changes of the graph: other laws, scaled branches, wider layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from archlint.finding import Remedy
from archlint.graph.model import LayerGraph, Node, Value
from archlint.graph.ops import OPS
from archlint.initialization.distribution import Distribution, constant, normal, rescaled
from archlint.signal.activations import IDENTITY
from archlint.signal.criticality import critical
from archlint.signal.structure import Block, Layer

INITIALIZATION = "the suggested initialization"


def initialised(layers: Sequence[Layer]) -> Remedy | None:
    """Every layer's weights at the critical scale of the activation that follows, the biases too;
    None where a layer has no such scale or no weight of its own."""
    laws: dict[str, Distribution] = {}
    for layer in layers:
        if layer.fans is None:
            continue
        if layer.weight is None or (layer.activation is not None and layer.nonlinearity is None):
            return None
        best = critical(layer.nonlinearity or IDENTITY)
        if best is None:
            return None
        law = normal(math.sqrt(best.weight_gain / layer.fans.fan_in))
        laws |= redrawn(layer.node, law, best.bias_variance)
    return Remedy(INITIALIZATION, laws) if laws else None


def redrawn(
    node: Node, law: Distribution, bias_variance: float | None = None
) -> dict[str, Distribution]:
    """Another law for the weight of an affine node, and biases of a variance."""
    position = 2 if node.op == "bilinear" else 1
    found: dict[str, Distribution] = {}
    weight, *rest = node.inputs[position:]
    if weight is not None:
        found[weight] = law
    if bias_variance is not None and rest and rest[0] is not None:
        found[rest[0]] = normal(math.sqrt(bias_variance)) if bias_variance else constant(0.0)
    return found


def scaled(blocks: Sequence[Block], scale: float) -> Remedy | None:
    """Every residual branch times what makes its factor ``scale``; None where one is zero."""
    if any(block.scale <= 0.0 for block in blocks):
        return None
    factors = {(block.add.id, block.branch): scale / block.scale for block in blocks}
    return Remedy(f"every branch scaled by {scale:.3g}", factors=factors)


def widened(layers: Sequence[Layer], times: float) -> Remedy:
    """Every layer ``times`` as wide."""
    words = f"layers {times:.3g} times as wide"
    return Remedy(words, wider=tuple(layer.node.id for layer in layers), times=times)


# --------------------------------------------------------------------------- the graph with it


def remedied(graph: LayerGraph, remedy: Remedy) -> LayerGraph | None:
    """The graph as a remedy changes it; None where it does not fit, such as a law for what is no
    parameter by itself."""
    parameters = dict(graph.parameters)
    for value, law in remedy.laws.items():
        parameter = graph.parameter(value)
        if parameter is None:
            return None
        parameters[parameter.name] = replace(parameter, law=law, clone_of=None, load=None)
    changed: LayerGraph | None = replace(graph, parameters=parameters)
    if changed is not None and remedy.wider:
        changed = _wider(changed, frozenset(remedy.wider), remedy.times)
    if changed is not None and (remedy.factors or remedy.attributes):
        changed = _rewired(changed, remedy)
    return changed


def _rewired(graph: LayerGraph, remedy: Remedy) -> LayerGraph | None:
    """Factors put between a value and one node that reads it, and other attributes."""
    values = dict(graph.values)
    nodes: list[Node] = []
    done = 0
    for node in graph.nodes:
        inputs = list(node.inputs)
        for i, value in enumerate(node.inputs):
            factor = remedy.factors.get((node.id, value)) if value is not None else None
            if value is None or factor is None:
                continue
            name, out = (_fresh(values, f"{value}.{end}") for end in ("factor", "scaled"))
            values[name] = Value(name, (), "float32", np.array(factor, np.float32))
            values[out] = replace(values[value], id=out, parameter=None, constant=None)
            nodes.append(Node(_fresh(values, f"{out}.mul"), "mul", (value, name), (out,),
                              source_op="mul", module=node.module))  # fmt: skip
            inputs[i] = out
            done += 1
        extra = remedy.attributes.get(node.id, {})
        done += bool(extra)
        nodes.append(replace(node, inputs=tuple(inputs),
                             attributes={**node.attributes, **extra}))  # fmt: skip
    if done != len(remedy.factors) + len(remedy.attributes):
        return None
    return replace(graph, nodes=tuple(nodes), values=values)


def _fresh(values: Mapping[str, Value], stem: str) -> str:
    name, i = stem, 1
    while name in values:
        name, i = f"{stem}_{i}", i + 1
    return name


def _wider(graph: LayerGraph, nodes: frozenset[str], times: float) -> LayerGraph | None:
    """Layers with more features; None where something reads them that is neither elementwise nor
    a layer, or a weight that is no parameter by itself."""
    values, parameters = dict(graph.values), dict(graph.parameters)
    wide: set[str] = set()  # values with more features

    def more(n: int) -> int:
        return math.ceil(n * times)

    def stretch(value: str, axis: int) -> None:
        shape: list[int | None] = list(values[value].shape or ())
        shape[axis] = more(shape[axis] or 1)
        values[value] = replace(values[value], shape=tuple(shape))

    for node in graph.nodes:
        reads = [v for v in node.inputs if v in wide]
        if not reads and node.id not in nodes:
            continue
        kind = OPS[node.op].kind if node.op in OPS else ""
        rank = len(values[node.output].shape or ())
        if node.op in _WIDE and node.attributes.get("groups", 1) == 1:
            weight = graph.parameter(node.inputs[1])
            if weight is None or node.inputs[1] is None or weight.law is None:
                return None
            inside = int(node.attributes.get("input_axis", 1) == 1) if node.op == "linear" else 1
            if _used_twice(graph, weight.name):
                return None
            law = weight.law
            for axis, applies in ((inside, bool(reads)), (1 - inside, node.id in nodes)):
                if applies:
                    stretch(node.inputs[1], axis)
            if reads:  # the gain stays: the variance goes with the fan-in
                fan = weight.shape[inside]
                law = rescaled(law, fan / more(fan))
            sizes = tuple(n or 1 for n in values[node.inputs[1]].shape or ())
            parameters[weight.name] = replace(weight, law=law, shape=sizes, load=None)
            if node.id in nodes:
                bias = node.inputs[2] if len(node.inputs) > 2 else None
                if bias is not None:
                    own = graph.parameter(bias)
                    if own is None or own.law is None:
                        return None
                    stretch(bias, 0)
                    parameters[own.name] = replace(own, shape=(more(own.shape[0]),), load=None)
                stretch(node.output, rank - 1 if node.op == "linear" else 1)
                wide.add(node.output)
        elif len(node.inputs) == 1 and (kind == "activation" or node.op in _PASSES):
            along = _wide_axis(graph, values, reads[0])
            if along is None:
                return None
            stretch(node.output, along)
            wide.add(node.output)
        else:
            return None
    if wide & set(graph.outputs):
        return None
    return replace(graph, values=values, parameters=parameters)


_WIDE = ("linear", "conv")
_PASSES = ("identity", "dropout", "cast")


def _wide_axis(graph: LayerGraph, values: Mapping[str, Value], value: str) -> int | None:
    """The axis along which a value has more elements than in the graph."""
    before, after = graph.shape(value) or (), values[value].shape or ()
    changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    return changed[0] if len(changed) == 1 else None


def _used_twice(graph: LayerGraph, name: str) -> bool:
    """Whether more than one node reads a parameter."""
    readers = {
        node.id
        for value in graph.values.values() if value.parameter == name
        for node in graph.consumers.get(value.id, ())
    }  # fmt: skip
    return len(readers) > 1
