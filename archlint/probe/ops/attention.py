"""Attention and rotary positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from archlint.probe.ops.frame import Call, computes


@computes("attention")
def attention(c: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(scale·q·kᵀ + mask)·v; a boolean mask says what is seen, a row that sees nothing is
    zero. Queries of a group share keys and values. A mask too short hides the last keys."""
    scale = c["scale"] if c["scale"] is not None else 1 / math.sqrt(q.shape[-1])
    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    logits = (q * scale) @ k.transpose(-1, -2)
    if c["softcap"]:
        logits = c["softcap"] * torch.tanh(logits / c["softcap"])
    seen: Tensor | None = None
    if mask is not None and 1 < mask.shape[-1] < logits.shape[-1]:
        lacking = logits.shape[-1] - mask.shape[-1]
        unseen = False if mask.dtype == torch.bool else -math.inf
        mask = F.pad(mask, (0, lacking), value=unseen)
    if mask is not None and mask.dtype == torch.bool:
        seen = mask
    elif mask is not None:
        logits = logits + mask
    if c["causal"]:
        rows, columns = logits.shape[-2:]
        past = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(c["offset"])
        seen = past if seen is None else seen & past
    if seen is not None:
        logits = torch.where(seen, logits, -math.inf)
    probabilities = torch.softmax(logits, -1)
    if seen is not None and mask is not None:
        probabilities = torch.where(seen.any(-1, keepdim=True), probabilities, 0.0)
    if c["dropout"] > 0 and c.mode == "train":
        kept = torch.rand_like(probabilities) >= c["dropout"]
        probabilities = probabilities * kept / (1 - c["dropout"])
    return probabilities @ v


@computes("rotary")
def rotary(c: Call, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Pairs of features of x [sample, heads, length, features] turned by an angle.

    ``cos`` and ``sin`` are tables [positions, pairs] to be looked up, or [sample, length, pairs].
    """
    features = c["rotary_features"] or x.shape[-1]
    turned, rest = x[..., :features], x[..., features:]
    pairs = features // 2
    if positions is not None:
        if positions.numel() == 1 and x.shape[2] > 1:  # where the first one is
            positions = positions.reshape(1, 1) + torch.arange(x.shape[2], device=x.device)
        cos, sin = cos[positions.to(torch.int64)], sin[positions.to(torch.int64)]
    elif cos.ndim == 2:
        cos, sin = cos[: x.shape[2]], sin[: x.shape[2]]
    cos, sin = (t[..., :pairs].unsqueeze(-3) for t in (cos, sin))
    if c["interleaved"]:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :pairs], turned[..., pairs:]
    real, imaginary = first * cos - second * sin, first * sin + second * cos
    if c["interleaved"]:
        y = torch.stack([real, imaginary], -1).flatten(-2)
    else:
        y = torch.cat([real, imaginary], -1)
    return torch.cat([y, rest], -1) if rest.shape[-1] else y
