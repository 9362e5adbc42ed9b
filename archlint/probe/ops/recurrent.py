"""Recurrent layers, step by step (ONNX's operators RNN, GRU, LSTM)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from archlint.probe.ops.frame import Call, CannotExecute, Outputs, computes

Function = Callable[[Tensor], Tensor]
_FUNCTIONS: dict[str, Function] = {
    "relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "leakyrelu": lambda x: F.leaky_relu(x, 0.01),
    "thresholdedrelu": lambda x: F.threshold(x, 1.0, 0.0), "elu": F.elu,
    "hardsigmoid": lambda x: torch.clamp(0.2 * x + 0.5, 0.0, 1.0), "softsign": F.softsign,
    "softplus": F.softplus,
}  # fmt: skip
_DEFAULTS = {"rnn": ("tanh",), "gru": ("sigmoid", "tanh"), "lstm": ("sigmoid", "tanh", "tanh")}


def _functions(c: Call, direction: int) -> list[Function]:
    count = len(_DEFAULTS[c.node.op])
    names = c["activations"][direction * count : (direction + 1) * count]
    found = []
    for name in names or _DEFAULTS[c.node.op]:
        if name.lower() not in _FUNCTIONS:
            raise CannotExecute(f"{c.node.op}: activation {name!r}")
        found.append(_FUNCTIONS[name.lower()])
    return found


def _clipped(c: Call, function: Function) -> Function:
    bound = c["clip"]
    return function if not bound else lambda x: function(x.clamp(-bound, bound))


@computes("rnn", "gru", "lstm")
def recurrent(
    c: Call,
    x: Tensor,
    weight: Tensor,
    recurrence: Tensor,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_h: Tensor | None = None,
    initial_c: Tensor | None = None,
    peephole: Tensor | None = None,
) -> Outputs:
    """All steps [length, directions, sample, hidden], the last hidden state and cell of each
    direction. Beyond its length a sample keeps its state and gives zero."""
    first = c["batch_first"]
    if first:
        x = x.transpose(0, 1)
        initial_h, initial_c = (
            None if s is None else s.transpose(0, 1) for s in (initial_h, initial_c)
        )
    shape = (x.shape[1], c["hidden"])
    steps: list[Tensor] = []
    hidden: list[Tensor] = []
    cells: list[Tensor] = []
    for d in range(weight.shape[0]):
        backwards = d == 1 or c["direction"] == "reverse"
        h = x.new_zeros(shape) if initial_h is None else initial_h[d]
        cell = x.new_zeros(shape) if initial_c is None else initial_c[d]
        one = _STEPS[c.node.op](
            c, [_clipped(c, f) for f in _functions(c, d)], recurrence[d],
            None if bias is None else bias[d], None if peephole is None else peephole[d],
        )  # fmt: skip
        inputs = F.linear(x, weight[d]).unbind(0)
        found: list[Tensor] = []
        order = range(len(inputs))
        for t in reversed(order) if backwards else order:
            new_h, new_cell = one(inputs[t], h, cell)
            out = new_h
            if lengths is not None:
                alive = (lengths > t).reshape(-1, 1)
                new_h, new_cell = torch.where(alive, new_h, h), torch.where(alive, new_cell, cell)
                out = torch.where(alive, out, torch.zeros_like(out))
            h, cell = new_h, new_cell
            found.append(out)
        steps.append(torch.stack(found[::-1] if backwards else found))
        hidden.append(h)
        cells.append(cell)
    every = torch.stack(steps, 1)
    last, last_cell = torch.stack(hidden), torch.stack(cells)
    if first:
        every = every.permute(2, 0, 1, 3)
        last, last_cell = last.transpose(0, 1), last_cell.transpose(0, 1)
    return (every, last, last_cell)[: len(c.values)]


Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _halves(bias: Tensor | None, recurrence: Tensor) -> tuple[Tensor, Tensor]:
    """The bias of the input and the one of the recurrence."""
    if bias is None:
        zero = recurrence.new_zeros(recurrence.shape[0])
        return zero, zero
    n = bias.shape[0] // 2
    return bias[:n], bias[n:]


def _rnn(
    c: Call, f: Sequence[Function], r: Tensor, bias: Tensor | None, peephole: Tensor | None
) -> Step:
    total = sum(_halves(bias, r))

    def step(x: Tensor, h: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        return f[0](x + F.linear(h, r) + total), cell

    return step


def _gru(
    c: Call, f: Sequence[Function], r: Tensor, bias: Tensor | None, peephole: Tensor | None
) -> Step:
    n = c["hidden"]
    of_input, of_state = _halves(bias, r)

    def step(x: Tensor, h: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        x = x + of_input
        gates = x[:, : 2 * n] + F.linear(h, r[: 2 * n]) + of_state[: 2 * n]
        update, reset = f[0](gates).chunk(2, 1)
        if c["linear_before_reset"]:
            inner = reset * (F.linear(h, r[2 * n :]) + of_state[2 * n :])
        else:
            inner = F.linear(reset * h, r[2 * n :]) + of_state[2 * n :]
        new = f[1](x[:, 2 * n :] + inner)
        return (1 - update) * new + update * h, cell

    return step


def _lstm(
    c: Call, f: Sequence[Function], r: Tensor, bias: Tensor | None, peephole: Tensor | None
) -> Step:
    total = sum(_halves(bias, r))
    zero = r.new_zeros(3 * c["hidden"])
    of_i, of_o, of_f = (zero if peephole is None else peephole).chunk(3)

    def step(x: Tensor, h: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        i, o, forget, new = (x + F.linear(h, r) + total).chunk(4, 1)
        entering = f[0](i + of_i * cell)
        kept = 1 - entering if c["input_forget"] else f[0](forget + of_f * cell)
        cell = kept * cell + entering * f[1](new)
        return f[0](o + of_o * cell) * f[2](cell), cell

    return step


_STEPS: dict[str, Callable[..., Step]] = {"rnn": _rnn, "gru": _gru, "lstm": _lstm}
