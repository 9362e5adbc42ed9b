"""Lowerings of recurrent layers: one node a layer, weights brought to ONNX's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from archlint.graph.torch_recorder.lowering import Call, NotModelled, V, lowering

# where torch's blocks of gates go: torch has i,f,g,o and r,z,n; ours are i,o,f,c and z,r,h
_GATES = {"lstm": (0, 3, 1, 2), "gru": (1, 0, 2), "rnn": (0,)}


@lowering("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(c: Call, input: V, *rest: Any) -> Any:
    """(input, hx, weights, biases, layers, dropout, train, bidirectional, batch_first)."""
    if isinstance(rest[0], V) and isinstance(rest[2], list | tuple):
        raise NotModelled("packed sequences")
    hx, weights, biased, layers, p, train, both, batch_first = rest
    kind = "rnn" if c.name.startswith("rnn") else c.name
    directions = 2 if both else 1
    each = (4 if biased else 2) * directions
    if len(weights) != each * layers:
        raise NotModelled("projected states")
    states = [hx] if isinstance(hx, V) else list(hx)
    x = c.transpose(input, (1, 0, 2)) if batch_first else input
    finals: list[list[V]] = [[] for _ in states]
    for layer in range(layers):
        group = weights[layer * each : (layer + 1) * each]
        first = [c.slice(s, 0, layer * directions, (layer + 1) * directions) for s in states]
        x, last = _layer(c, kind, x, group, directions, bool(biased), first)
        for found, state in zip(finals, last, strict=True):
            found.append(state)
        if train and p and layer < layers - 1:
            x = c.emit("dropout", [x], x.shape, p=float(p), training=True)
    steps = c.transpose(x, (1, 0, 2)) if batch_first else x
    return (steps, *(f[0] if len(f) == 1 else c.concat(f, 0) for f in finals))


def _layer(
    c: Call,
    kind: str,
    x: V,
    weights: Sequence[V],
    directions: int,
    biased: bool,
    states: Sequence[V],
) -> tuple[V, list[V]]:
    each = len(weights) // directions
    runs = [weights[d * each : (d + 1) * each] for d in range(directions)]
    hidden = runs[0][1].shape[1]
    order = _GATES[kind]
    weight = _directions(c, [_blocks(c, run[0], order) for run in runs])
    recurrence = _directions(c, [_blocks(c, run[1], order) for run in runs])
    bias = None
    if biased:
        sums = [c.concat([_blocks(c, run[2], order), _blocks(c, run[3], order)], 0) for run in runs]
        bias = _directions(c, sums)
    length, samples = x.shape[0], x.shape[1]
    all_steps = (length, directions, samples, hidden)
    last = (directions, samples, hidden)
    more: dict[str, Any] = {}
    if kind == "gru":
        more["linear_before_reset"] = True
    if kind == "rnn":
        more["activations"] = ("Relu" if c.name == "rnn_relu" else "Tanh",) * directions
    results = c.emit_many(
        kind,
        [x, weight, recurrence, bias, None, *states],
        [(all_steps, x.dtype), *[(last, x.dtype)] * len(states)],
        hidden=hidden,
        direction="bidirectional" if directions == 2 else "forward",
        **more,
    )
    steps = c.transpose(results[0], (0, 2, 1, 3))
    return c.reshape(steps, (length, samples, directions * hidden)), results[1:]


def _blocks(c: Call, weight: V, order: Sequence[int]) -> V:
    """The blocks of gates in our order."""
    if len(order) == 1:
        return weight
    size = weight.shape[0] // len(order)
    parts = [c.slice(weight, 0, k * size, (k + 1) * size) for k in order]
    return c.concat(parts, 0)


def _directions(c: Call, parts: Sequence[V]) -> V:
    if len(parts) == 1:
        return c.reshape(parts[0], (1, *parts[0].shape))
    return c.emit("stack", list(parts), (len(parts), *parts[0].shape), axis=0)


@lowering("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(
    c: Call, input: V, hx: Any, w_ih: V, w_hh: V, b_ih: V | None = None, b_hh: V | None = None
) -> Any:
    """One step: a layer over a sequence of length one."""
    kind = "rnn" if c.name.startswith("rnn") else c.name[:-5]
    states = [hx] if isinstance(hx, V) else list(hx)
    x = c.reshape(input, (1, *input.shape))
    first = [c.reshape(s, (1, *s.shape)) for s in states]
    weights = [w_ih, w_hh] if b_ih is None or b_hh is None else [w_ih, w_hh, b_ih, b_hh]
    _, last = _layer(c, kind, x, weights, 1, b_ih is not None, first)
    made = tuple(c.reshape(v, v.shape[1:]) for v in last)
    return made[0] if len(made) == 1 else made
