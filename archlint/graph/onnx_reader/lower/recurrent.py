"""LSTM, GRU, RNN: ONNX's own layout is the canonical one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from archlint.graph.model import Array
from archlint.graph.onnx_reader.reader import Call, lowers
from archlint.graph.onnx_reader.shapes import Typed


@lowers("LSTM", "GRU", "RNN")
def _recurrent(c: Call) -> None:
    emit(c, [c.value(0), *(c.weight(i) for i in (1, 2, 3)), *(c.optional(i) for i in (4, 5, 6)),
             c.weight(7)])  # fmt: skip


def emit(c: Call, inputs: list[str | None]) -> None:
    """A recurrent op over ``inputs`` in ONNX's order, with the node's attributes."""
    op = c.node.op_type.removeprefix("DynamicQuantize").lower()
    hidden = c.get("hidden_size")
    if hidden is None:
        shape = c.reader.builder.values[inputs[2] or ""].shape
        if shape is None or shape[-1] is None:
            raise LookupError("the hidden size is unknown")
        hidden = shape[-1]
    _check_states(c, inputs, int(hidden))
    if op != "lstm":
        inputs = inputs[:6]
    clip = c.get("clip")
    c.emit_all(
        op, inputs, hidden=int(hidden), direction=str(c.get("direction", "forward")),
        activations=tuple(name.lower() for name in c.get("activations", ())),
        clip=None if clip is None else float(clip), batch_first=bool(c.get("layout", 0)),
        linear_before_reset=bool(c.get("linear_before_reset", 0)),
        input_forget=bool(c.get("input_forget", 0)),
    )  # fmt: skip


def _check_states(c: Call, inputs: list[str | None], hidden: int) -> None:
    """Initial states [directions, sample, hidden] have as many samples as the input."""
    values = c.reader.builder.values
    x = values[inputs[0] or ""].shape
    if x is None or len(x) != 3:
        return
    first = bool(c.get("layout", 0))
    samples = x[0 if first else 1]
    directions = 2 if c.get("direction", "forward") == "bidirectional" else 1
    wanted = (samples, directions, hidden) if first else (directions, samples, hidden)
    for state in inputs[5:7]:
        shape = values[state].shape if state is not None else None
        if shape is not None and (
            len(shape) != 3
            or any(None not in (n, m) and n != m for n, m in zip(shape, wanted, strict=True))
        ):
            c.conflict(f"an initial state is {list(shape)}, the input wants {list(wanted)}")


@lowers("DynamicQuantizeLSTM", domain="com.microsoft")
def _quantized_lstm(c: Call) -> None:
    """Weights are stored as [directions, in, 4·hidden] in 8 bits, a scale a direction or row."""

    def weight(i: int, scale: int, zero: int) -> str:
        directions, rows, gates = c.sizes(i)

        def compute(arrays: Sequence[Array]) -> Array:
            data, *rest = arrays
            factor, shift = (np.reshape(a, (directions, 1, -1)).astype(np.float32) for a in rest)
            real = (data.astype(np.float32) - shift) * factor
            return np.swapaxes(real, 1, 2)

        sources = [c.value(i), c.value(scale), c.value(zero)]
        return c.reader.derived(f"{c.value(i)}:float", sources, (directions, gates, rows),
                                "float32", compute)  # fmt: skip

    sizes = c.sizes(0)
    directions, hidden = c.sizes(2)[0], c.sizes(2)[1]
    steps, samples = sizes[0], sizes[1]
    state: Typed = ((directions, samples, hidden), "float32")
    every: list[Typed] = [((steps, directions, samples, hidden), "float32"), state, state]
    c.outs = every[: len(c.node.output)]
    emit(c, [c.value(0), weight(1, 8, 9), weight(2, 10, 11), c.weight(3),
             *(c.optional(i) for i in (4, 5, 6)), c.weight(7)])  # fmt: skip
