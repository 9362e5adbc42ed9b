"""Branches and loops. Guards, and which branch a ``select`` reads, are the program's own."""

from __future__ import annotations

import torch
from torch import Tensor

from archlint.probe.ops.frame import Call, CannotExecute, Outputs, computes

MOST_TRIPS = 100_000  # of a loop: one that has no end is a mistake


@computes("select")
def select(c: Call, condition: Tensor, then: Tensor | None, otherwise: Tensor | None) -> Outputs:
    """The branch that ran; the other one may have no value."""
    return (then if bool(condition) else otherwise,)


@computes("loop")
def loop(
    c: Call, trips: Tensor | None = None, condition: Tensor | None = None, *state: Tensor
) -> Outputs:
    """Runs the body until its condition fails or the trips are done: (carried, stacked)."""
    assert c.body is not None
    carried = c["carried"]
    now, captured = list(state[:carried]), state[carried:]
    most = MOST_TRIPS if trips is None else int(trips)
    going = True if condition is None else bool(condition)
    rows: list[list[Tensor]] = [[] for _ in range(len(c.body.graph.outputs) - 1 - carried)]
    trip = 0
    while going and trip < most:
        number = torch.tensor(trip, dtype=torch.int64, device=c.device)
        flag = torch.tensor(going, device=c.device)
        results = c.body.inner(number, flag, *now, *captured)
        going, now = bool(results[0]), results[1 : 1 + carried]
        for row, value in zip(rows, results[1 + carried :], strict=True):
            row.append(value)
        trip += 1
    if trip >= MOST_TRIPS:
        raise CannotExecute("a loop has no end")
    return (*now, *(_stacked(c, row, carried + i) for i, row in enumerate(rows)))[: len(c.values)]


def _stacked(c: Call, rows: list[Tensor], i: int) -> Tensor:
    if rows:
        return torch.stack(rows)
    from archlint.probe.ops.frame import torch_dtype

    value = c.values[i]
    return torch.zeros((0, *(n or 0 for n in (value.shape or (0,))[1:])),
                       dtype=torch_dtype(value.dtype, c.real), device=c.device)  # fmt: skip


@computes("scan")
def scan(c: Call, *state: Tensor) -> Outputs:
    """Runs the body over the slices of its scanned inputs: (carried, stacked along axes)."""
    assert c.body is not None
    carried, count = c["carried"], len(c["input_axes"])
    now, given = list(state[:carried]), state[carried : carried + count]
    captured = state[carried + count :]
    reverse = c["input_reverse"] or (0,) * count
    slices = []
    for x, axis, back in zip(given, c["input_axes"], reverse, strict=True):
        parts = x.unbind(axis)
        slices.append(parts[::-1] if back else parts)
    produced = len(c.body.graph.outputs) - carried
    rows: list[list[Tensor]] = [[] for _ in range(produced)]
    for parts in zip(*slices, strict=True):
        results = c.body.inner(*now, *parts, *captured)
        now = results[:carried]
        for row, value in zip(rows, results[carried:], strict=True):
            row.append(value)
    axes, back = c["output_axes"] or (0,) * produced, c["output_reverse"] or (0,) * produced
    stacked = [
        torch.stack(row[::-1] if turned else row, axis)
        for row, axis, turned in zip(rows, axes, back, strict=True)
    ]
    return (*now, *stacked)[: len(c.values)]
