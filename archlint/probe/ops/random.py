"""Random ops: dropout in training, noise. They draw from torch's generator of the device."""

from __future__ import annotations

import torch
from torch import Tensor

from archlint.probe.ops.frame import Call, Outputs, computes


@computes("dropout")
def dropout(c: Call, x: Tensor) -> Outputs:
    """Elements dropped with probability p, the rest divided by 1 − p; second output: the mask."""
    if not c["training"] or c.mode != "train" or c["p"] == 0.0:
        kept = torch.ones(x.shape, dtype=torch.bool, device=x.device)
        return (x, kept)[: len(c.values)]
    kept = torch.rand_like(x) >= c["p"]
    if c["p"] >= 1.0:
        return (torch.zeros_like(x), kept)[: len(c.values)]
    return (torch.where(kept, x / (1 - c["p"]), torch.zeros_like(x)), kept)[: len(c.values)]


@computes("drop_path")
def drop_path(c: Call, x: Tensor) -> Tensor:
    """Whole samples dropped with probability p, the rest divided by 1 − p."""
    if not c["training"] or c.mode != "train" or c["p"] == 0.0:
        return x
    kept = torch.rand_like(x[(slice(None), *(slice(0, 1),) * (x.ndim - 1))]) >= c["p"]
    return torch.where(kept, x / (1 - c["p"]), torch.zeros_like(x))


def _like(c: Call, like: Tensor | None) -> Tensor:
    if like is not None:
        return torch.empty_like(like, dtype=c.dtype)
    return torch.empty(c["shape"], dtype=c.dtype, device=c.device)


@computes("random_normal")
def random_normal(c: Call, like: Tensor | None = None) -> Tensor:
    """N(mean, std²)."""
    found: Tensor = c["mean"] + c["std"] * torch.randn_like(_like(c, like))
    return found


@computes("random_uniform")
def random_uniform(c: Call, like: Tensor | None = None) -> Tensor:
    """U(low, high)."""
    found: Tensor = c["low"] + (c["high"] - c["low"]) * torch.rand_like(_like(c, like))
    return found


@computes("bernoulli")
def bernoulli(c: Call, p: Tensor) -> Tensor:
    """One with probability p."""
    return (torch.rand_like(p) < p).to(c.dtype or p.dtype)
