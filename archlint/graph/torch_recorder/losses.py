"""Lowerings of losses, which models compute in ``forward`` when they are given targets."""

from __future__ import annotations

from typing import Any

from archlint.graph.torch_recorder.lowering import (
    Call,
    NotModelled,
    V,
    broadcast_shape,
    lowering,
)


def _reduced(c: Call, x: V, reduction: str) -> V:
    if reduction == "none":
        return x
    op = {"mean": "reduce_mean", "sum": "reduce_sum"}.get(reduction)
    if op is None:
        raise NotModelled(f"the reduction {reduction!r}")
    return c.emit(op, [x], c.shape, x.dtype, axes=tuple(range(x.rank)))


def _plain(*options: Any) -> None:
    """Refuse options that weigh elements or that torch has deprecated."""
    if any(option is not None for option in options):
        raise NotModelled("a loss with weights")


@lowering("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss")
def distance(
    c: Call,
    input: V,
    target: V,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    weight: Any = None,
    beta: float = 1.0,
    delta: float = 1.0,
) -> V:
    """Squares or absolute values of the difference, or squares near zero."""
    _plain(size_average, reduce, weight)
    shape = broadcast_shape(input.shape, target.shape)
    d = c.emit("sub", [input, target], shape)
    if c.name == "mse_loss":
        return _reduced(c, c.emit("square", [d], shape), reduction)
    size = c.emit("abs", [d], shape)
    bound = float(beta if c.name == "smooth_l1_loss" else delta)
    if c.name == "l1_loss" or (c.name == "smooth_l1_loss" and bound == 0.0):
        return _reduced(c, size, reduction)
    scale = 0.5 / bound if c.name == "smooth_l1_loss" else 0.5
    slope = 1.0 if c.name == "smooth_l1_loss" else bound
    square = c.emit("square", [d], shape)
    near = c.emit("mul", [square, c.number(scale, square)], shape)
    less = c.emit("sub", [size, c.number(bound / 2, size)], shape)
    far = less if slope == 1.0 else c.emit("mul", [less, c.number(slope, less)], shape)
    small = c.emit("less", [size, c.number(bound, size)], shape, "bool")
    return _reduced(c, c.emit("where", [small, near, far], shape), reduction)


@lowering("binary_cross_entropy_with_logits")
def binary_cross_entropy_with_logits(
    c: Call,
    input: V,
    target: V,
    weight: Any = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    pos_weight: Any = None,
) -> V:
    """ln(1 + exp x) − x·y."""
    _plain(weight, size_average, reduce, pos_weight)
    shape = input.shape
    whole = c.emit("softplus", [input], shape)
    part = c.emit("mul", [input, target], shape)
    return _reduced(c, c.emit("sub", [whole, part], shape), reduction)


@lowering("cross_entropy", "nll_loss")
def cross_entropy(
    c: Call,
    input: V,
    target: V,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> V:
    """Minus the logarithm of the probability of the right class.

    Targets that are to be ignored are data: all are counted.
    """
    _plain(weight, size_average, reduce)
    if label_smoothing:
        raise NotModelled("smoothed labels")
    axis = 0 if input.rank == 1 else 1
    logs = input
    if c.name == "cross_entropy":
        logs = c.emit("log_softmax", [input], input.shape, axis=axis)
    if not target.integral:
        product = c.emit("mul", [logs, target], input.shape)
        shape = (*input.shape[:axis], *input.shape[axis + 1 :])
        chosen = c.emit("reduce_sum", [product], shape, axes=(axis,))
    else:
        wide = (*target.shape[:axis], 1, *target.shape[axis:])
        places = c.reshape(target, wide)
        taken = c.emit("gather_elements", [logs, places], wide, axis=axis)
        chosen = c.reshape(taken, target.shape)
    return _reduced(c, c.emit("neg", [chosen], chosen.shape), reduction)
