"""Reductions over axes, orderings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from archlint.probe.ops.frame import Call, Outputs, computes


def _over(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel of a reduction that takes axes; a number stays what it is."""

    def kernel(c: Call, x: Tensor) -> Tensor:
        return function(x, tuple(c["axes"]), keepdim=c["keepdims"])

    return kernel


def _prod(x: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


def _extremum(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
        if x.dtype == torch.bool:
            return function(x.to(torch.uint8), axes, keepdim=keepdim).bool()
        return function(x, axes, keepdim=keepdim)

    return reduce


def _norm(order: int) -> Callable[..., Tensor]:
    def reduce(x: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
        if not x.is_floating_point():
            x = x.to(torch.float64)
        found: Tensor = torch.linalg.vector_norm(x, order, axes, keepdim=keepdim)
        return found

    return reduce


def _logsumexp(x: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    if not x.is_floating_point():
        x = x.to(torch.float64)
    return torch.logsumexp(x, axes, keepdim=keepdim)


for _op, _function in {
    "reduce_sum": torch.sum, "reduce_mean": torch.mean, "reduce_prod": _prod,
    "reduce_max": _extremum(torch.amax), "reduce_min": _extremum(torch.amin),
    "reduce_l1": _norm(1), "reduce_l2": _norm(2), "reduce_logsumexp": _logsumexp,
    "reduce_any": torch.any, "reduce_all": torch.all,
}.items():  # fmt: skip
    _register: Callable[..., Tensor] = _function  # type: ignore[assignment]
    computes(_op)(_over(_register))


@computes("reduce_var")
def reduce_var(c: Call, x: Tensor) -> Tensor:
    """Variance with n − correction in the denominator."""
    return torch.var(x, c["axes"], correction=c["correction"], keepdim=c["keepdims"])


@computes("reduce_std")
def reduce_std(c: Call, x: Tensor) -> Tensor:
    """Standard deviation."""
    return torch.std(x, c["axes"], correction=c["correction"], keepdim=c["keepdims"])


@computes("argmax")
def argmax(c: Call, x: Tensor) -> Tensor:
    """Where the largest element is, the first or last of several."""
    return _place(c, x, torch.argmax)


@computes("argmin")
def argmin(c: Call, x: Tensor) -> Tensor:
    """Where the smallest element is, the first or last of several."""
    return _place(c, x, torch.argmin)


def _place(c: Call, x: Tensor, function: Callable[..., Tensor]) -> Tensor:
    axis = c["axis"]
    if not c["last"]:
        return function(x, axis, c["keepdims"])
    from_the_end: Tensor = function(x.flip(axis), axis, c["keepdims"])
    last: int = x.shape[axis] - 1
    return last - from_the_end


@computes("sort")
def sort(c: Call, x: Tensor) -> Outputs:
    """Sorted, with positions; equal elements keep their order."""
    found = torch.sort(x, dim=c["axis"], descending=c["descending"], stable=True)
    return found.values, found.indices


@computes("topk")
def topk(c: Call, x: Tensor, k: Tensor | None = None) -> Outputs:
    """The largest or smallest, in order, with positions; of equal ones the first."""
    count: Any = c["k"] if k is None else int(k)
    found = torch.sort(x, dim=c["axis"], descending=c["largest"], stable=True)
    return (
        found.values.narrow(c["axis"], 0, count),
        found.indices.narrow(c["axis"], 0, count),
    )


@computes("unique")
def unique(c: Call, x: Tensor) -> Outputs:
    """Distinct elements in order, where each first occurs, which one each is, and how often."""
    values, inverse, counts = torch.unique(
        x, sorted=True, return_inverse=True, return_counts=True, dim=c["axis"]
    )
    flat = inverse.reshape(-1)
    first = torch.full((counts.shape[0],), flat.shape[0], dtype=torch.int64, device=x.device)
    places = torch.arange(flat.shape[0], device=x.device)
    first = first.scatter_reduce(0, flat, places, "amin")
    if not c["sorted"]:
        order = first.argsort()
        values = values.index_select(0 if c["axis"] is None else c["axis"], order)
        first, counts, flat = first[order], counts[order], order.argsort()[flat]
    return (values, first, flat, counts)[: len(c.values)]
