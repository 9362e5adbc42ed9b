"""Lowerings of attention."""

from __future__ import annotations

from typing import Any

from archlint.graph.torch_recorder.lowering import Call, V, lowering


@lowering("scaled_dot_product_attention")
def attention(
    c: Call,
    query: V,
    key: V,
    value: V,
    attn_mask: V | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> V:
    """softmax(scale·q·kᵀ + mask)·v; other ranks than four are brought to four."""
    q, k, v = (_four(c, x) for x in (query, key, value))
    mask = attn_mask
    if mask is not None and query.rank > 4 and mask.rank > 4:
        mask = _four(c, c.expand(mask, (*query.shape[:-2], *mask.shape[-2:])))
    elif mask is not None and query.rank == 3 and mask.rank == 3:
        mask = c.reshape(mask, (mask.shape[0], 1, *mask.shape[1:]))
    shape = (*q.shape[:-1], v.shape[-1])
    made = c.emit(
        "attention",
        [q, k, v, mask],
        shape,
        scale=None if scale is None else float(scale),
        causal=bool(is_causal),
        dropout=float(dropout_p),
    )
    return c.reshape(made, c.shape)


def _four(c: Call, x: V) -> V:
    if x.rank == 3:
        return c.reshape(x, (x.shape[0], 1, *x.shape[1:]))
    if x.rank == 2:
        return c.reshape(x, (1, 1, *x.shape))
    if x.rank > 4:
        lead = 1
        for n in x.shape[:-3]:
            lead *= n
        return c.reshape(x, (lead, *x.shape[-3:]))
    return x


@lowering("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention")
def flash(
    c: Call,
    query: V,
    key: V,
    value: V,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *_: Any,
    attn_mask: V | None = None,
    scale: float | None = None,
    **__: Any,
) -> Any:
    """The dispatcher's kernel, with statistics as second result."""
    made = c.emit(
        "attention",
        [query, key, value, attn_mask],
        scale=scale,
        causal=bool(is_causal),
        dropout=float(dropout_p),
    )
    return made, None
