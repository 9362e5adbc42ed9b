"""Attention, rotary embeddings and the fused transformer operators of com.microsoft."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from archlint.graph.onnx_reader.lower.affine import convolution, linear, matmul
from archlint.graph.onnx_reader.lower.normalisation import layer_norm, rms_norm
from archlint.graph.onnx_reader.reader import Call, lowers

MS = "com.microsoft"


def heads_first(c: Call, x: str, sizes: tuple[int, ...], heads: int) -> tuple[str, tuple[int, ...]]:
    """[sample, length, heads·features] as [sample, heads, length, features]."""
    samples, length, width = sizes
    split = (samples, length, heads, width // heads)
    dtype = c.reader.builder.values[x].dtype
    y = c.temp("reshape", [x], split, dtype, shape=split)
    order = (samples, heads, length, width // heads)
    return c.temp("transpose", [y], order, dtype, permutation=(0, 2, 1, 3)), order


def merged(c: Call, x: str, sizes: tuple[int, ...]) -> None:
    """Emit output 0: [sample, heads, length, features] as [sample, length, heads·features]."""
    samples, heads, length, features = sizes
    swapped = (samples, length, heads, features)
    dtype = c.reader.builder.values[x].dtype
    y = c.temp("transpose", [x], swapped, dtype, permutation=(0, 2, 1, 3))
    shape = (samples, length, heads * features)
    c.emit("reshape", [y], typed=(shape, dtype), shape=shape)


def _past(c: Call, now: str, sizes: tuple[int, ...], past: int, present: int
          ) -> tuple[str, tuple[int, ...]]:  # fmt: skip
    """Keys or values with those of earlier steps before them; also an output of the node."""
    if c.has(past):
        before = c.sizes(past)
        sizes = (*sizes[:2], before[2] + sizes[2], sizes[3])
        now = c.temp("concat", [c.value(past), now], sizes, c.dtype(0), axis=2)
    if present < len(c.node.output) and c.node.output[present]:
        c.alias(present, now)
    return now, sizes


@lowers("Attention")
def _attention(c: Call) -> None:
    q, k, v = (c.value(i) for i in range(3))
    qs, ks, vs = (c.sizes(i) for i in range(3))
    flat = len(qs) == 3
    if flat:
        heads = int(c.get("q_num_heads"))
        shared = int(c.get("kv_num_heads", heads))
        q, qs = heads_first(c, q, qs, heads)
        k, ks = heads_first(c, k, ks, shared)
        v, vs = heads_first(c, v, vs, shared)
    if c.has(6) or any("window" in name and c.get(name, -1) >= 0 for name in c.attributes):
        raise LookupError("keys of some positions only")
    before = ks[2]
    k, ks = _past(c, k, ks, 4, 1)
    v, vs = _past(c, v, vs, 5, 2)
    scale = c.get("scale")
    given: dict[str, Any] = {
        "scale": None if scale is None else float(scale),
        "causal": bool(c.get("is_causal", 0)),
        "softcap": float(c.get("softcap", 0.0)),
        "offset": ks[2] - before,
    }
    sizes = (*qs[:3], vs[3])
    if len(c.node.output) > 3 and c.node.output[3]:
        raise LookupError("the logits are an output")
    if flat:
        y = c.temp("attention", [q, k, v, c.optional(3)], sizes, c.dtype(0), **given)
        merged(c, y, sizes)
    else:
        c.emit("attention", [q, k, v, c.optional(3)], typed=(sizes, c.dtype(0)), **given)


@lowers("RotaryEmbedding")
def _rotary(c: Call) -> None:
    rotary(c, positions=c.optional(3), cos=c.value(1), sin=c.value(2))


@lowers("RotaryEmbedding", domain=MS)
def _rotary_ms(c: Call) -> None:
    rotary(c, positions=c.value(1), cos=c.value(2), sin=c.value(3))


def rotary(c: Call, positions: str | None, cos: str, sin: str) -> None:
    """``rotary`` on [sample, heads, length, features], or on 3-D input split into heads."""
    sizes = c.sizes(0)
    features = int(c.get("rotary_embedding_dim", 0)) or None
    given: dict[str, Any] = {
        "interleaved": bool(c.get("interleaved", 0)),
        "rotary_features": features,
    }
    if len(sizes) == 4:
        c.emit("rotary", [c.value(0), cos, sin, positions], typed=(sizes, c.dtype(0)), **given)
        return
    heads = int(c.get("num_heads", 0))
    if not heads:
        table = c.reader.builder.values[cos].shape
        if table is None or table[-1] is None:
            raise LookupError("the number of heads is unknown")
        heads = sizes[-1] // (2 * table[-1])
    x, split = heads_first(c, c.value(0), sizes, heads)
    merged(c, c.temp("rotary", [x, cos, sin, positions], split, c.dtype(0), **given), split)


@lowers("MultiHeadAttention", domain=MS)
def _multi_head(c: Call) -> None:
    heads = int(c.get("num_heads"))
    qs = c.sizes(0)
    if not c.has(1) or len(qs) != 3 or len(c.sizes(1)) != 3:
        raise LookupError("packed or cached keys")
    bias = c.sizes(3)[0] if c.has(3) else 0
    parts = []
    start = 0
    for i in range(3):
        x, sizes = c.value(i), c.sizes(i)
        if bias:
            width = sizes[-1]
            piece = c.reader.derived(
                f"{c.value(3)}:{i}", [c.value(3)], (width,), c.dtype(3) or "float32",
                lambda a, start=start, width=width: a[0][start : start + width])  # type: ignore[misc]  # fmt: skip
            x = c.temp("add", [x, piece], sizes, c.dtype(0))
            start += width
        parts.append(heads_first(c, x, sizes, heads))
    (q, qs), (k, ks), (v, vs) = parts
    before = ks[2]
    k, ks = _past(c, k, ks, 6, 1)
    v, vs = _past(c, v, vs, 7, 2)
    scale = c.get("scale")
    sizes = (*qs[:3], vs[3])
    y = c.temp("attention", [q, k, v, c.optional(5)], sizes, c.dtype(0),
               scale=None if scale is None else float(scale),
               causal=bool(c.get("unidirectional", 0)), offset=ks[2] - before)  # fmt: skip
    merged(c, y, sizes)


@lowers("GroupQueryAttention", domain=MS)
def _group_query(c: Call) -> None:
    heads, shared = int(c.get("num_heads")), int(c.get("kv_num_heads"))
    qs = c.sizes(0)
    x, width = c.value(0), qs[-1]
    if c.has(1):
        q, k, v = x, c.value(1), c.value(2)
        widths = (width, c.sizes(1)[-1], c.sizes(2)[-1])
    else:
        each = width // (heads + 2 * shared)
        widths = (heads * each, shared * each, shared * each)
        ids = [c.reader.builder.fresh(f"{c.node.output[0]}:{name}") for name in "qkv"]
        for id, size in zip(ids, widths, strict=True):
            c.reader.builder.value(id, (*qs[:-1], size), c.dtype(0))
        c.reader.builder.node("split", [x], outputs=ids, axis=2, sizes=widths, guard=c.guard,
                              module=c.origin.module, source_op="GroupQueryAttention")  # fmt: skip
        q, k, v = ids
    counts = (heads, shared, shared)
    parts = [heads_first(c, value, (*qs[:-1], size), n)
             for value, size, n in zip((q, k, v), widths, counts, strict=True)]  # fmt: skip
    (q, sizes), (k, ks), (v, vs) = parts
    before = ks[2]
    if int(c.get("do_rotary", 0)):
        given: dict[str, Any] = {
            "interleaved": bool(c.get("rotary_interleaved", 0)),
            "rotary_features": None,
        }
        q = c.temp("rotary", [q, c.value(7), c.value(8)], sizes, c.dtype(0), **given)
        k = c.temp("rotary", [k, c.value(7), c.value(8)], ks, c.dtype(0), **given)
    k, ks = _past(c, k, ks, 3, 1)
    v, _ = _past(c, v, vs, 4, 2)
    scale = float(c.get("scale", 0.0))
    y = c.temp("attention", [q, k, v], sizes, c.dtype(0), scale=scale or None, causal=True,
               offset=ks[2] - before,
               softcap=float(c.get("softcap", 0.0)))  # fmt: skip
    merged(c, y, sizes)


@lowers("Attention", domain=MS)
def _packed_attention(c: Call) -> None:
    """Input times one weight for queries, keys and values, then attention."""
    heads = int(c.get("num_heads"))
    samples, length, _ = c.sizes(0)
    total = c.sizes(1)[-1]
    widths = tuple(c.get("qkv_hidden_sizes") or (total // 3,) * 3)
    packed = c.temp("linear", [c.value(0), c.weight(1), c.weight(2)], (samples, length, total),
                    c.dtype(0), input_axis=0)  # fmt: skip
    builder = c.reader.builder
    ids = [builder.fresh(f"{c.node.output[0]}:{name}") for name in "qkv"]
    for id, size in zip(ids, widths, strict=True):
        builder.value(id, (samples, length, size), c.dtype(0))
    builder.node("split", [packed], outputs=ids, axis=2, sizes=widths, guard=c.guard,
                 module=c.origin.module, source_op="Attention")  # fmt: skip
    parts = [heads_first(c, id, (samples, length, size), heads)
             for id, size in zip(ids, widths, strict=True)]  # fmt: skip
    (q, qs), (k, _), (v, vs) = parts
    if c.has(4) or (len(c.node.output) > 1 and c.node.output[1]):
        raise LookupError("cached keys")
    scale = float(c.get("scale", 0.0)) or 1 / math.sqrt(qs[3])
    sizes = (*qs[:3], vs[3])
    y = c.temp("attention", [q, k, v, c.optional(5)], sizes, c.dtype(0), scale=scale,
               causal=bool(c.get("unidirectional", 0)))  # fmt: skip
    merged(c, y, sizes)


# --------------------------------------------------------------------------- fused norms


def _residual(c: Call, bias: int | None) -> tuple[str, tuple[int, ...]]:
    """input + skip (+ bias), which is also the node's fourth output."""
    shape = c.sizes(0)
    x = c.temp("add", [c.value(0), c.value(1)], shape, c.dtype(0))
    if bias is not None and c.has(bias):
        x = c.temp("add", [x, c.weight(bias)], shape, c.dtype(0))
    c.alias(3, x)
    return x, shape


@lowers("SkipLayerNormalization", domain=MS)
def _skip_layer_norm(c: Call) -> None:
    x, _ = _residual(c, 4)
    layer_norm(c, x, c.weight(2), c.weight(3))


@lowers("SkipSimplifiedLayerNormalization", domain=MS)
def _skip_rms_norm(c: Call) -> None:
    x, _ = _residual(c, 3)
    rms_norm(c, x, c.weight(2))


@lowers("SimplifiedLayerNormalization")
@lowers("SimplifiedLayerNormalization", domain=MS)
def _simplified(c: Call) -> None:
    rms_norm(c, c.value(0), c.weight(1))


@lowers("LayerNormalization", domain=MS)
def _layer_norm_ms(c: Call) -> None:
    layer_norm(c, c.value(0), c.weight(1), c.weight(2))


@lowers("EmbedLayerNormalization", domain=MS)
def _embed_layer_norm(c: Call) -> None:
    samples, length = c.sizes(0)
    shape = (samples, length, c.sizes(2)[-1])
    x = c.temp("embedding", [c.value(0), c.weight(2)], shape)
    positions = c.constant(np.arange(length)[None].repeat(samples, 0))
    where = c.value(8) if c.has(8) else positions
    x = c.temp("add", [x, c.temp("embedding", [where, c.weight(3)], shape)], shape)
    if c.has(1) and c.has(4):
        x = c.temp("add", [x, c.temp("embedding", [c.value(1), c.weight(4)], shape)], shape)
    c.emit("layer_norm", [x, c.weight(5), c.weight(6)], typed=(shape, "float32"), axes=(2,),
           eps=float(c.get("epsilon", 1e-12)))  # fmt: skip
    if len(c.node.output) > 1 and c.node.output[1]:
        c.emit("reduce_sum", [c.value(7)], out=1, typed=((samples,), "int32"), axes=(1,))
    if len(c.node.output) > 2 and c.node.output[2]:
        c.alias(2, x)


# --------------------------------------------------------------------------- fused activations


@lowers("Gelu", "FastGelu", "BiasGelu", "QuickGelu", domain=MS)
def _gelus(c: Call) -> None:
    typed = (c.shape(0), c.dtype(0))
    x = c.value(0)
    if c.has(1):
        x = c.temp("add", [x, c.weight(1)], *typed)
    if c.node.op_type == "QuickGelu" and abs(float(c.get("alpha", 1.702)) - 1.702) > 1e-3:
        scaled = c.temp("mul", [x, c.constant(np.float32(c.get("alpha")))], *typed)
        c.emit("mul", [x, c.temp("sigmoid", [scaled], *typed)], typed=typed)
        return
    form = {"FastGelu": "tanh", "QuickGelu": "sigmoid"}.get(c.node.op_type, "none")
    c.emit("gelu", [x], typed=typed, approximate=form)


_FUSED = {"Relu": "relu", "Sigmoid": "sigmoid", "Tanh": "tanh", "LeakyRelu": "leaky_relu"}


def _activated(c: Call, name: str) -> None:
    """The activation that a fused operator ends with, on its output."""
    kind = c.get("activation", "")
    if not kind:
        return
    if kind not in _FUSED:
        raise LookupError(f"the fused activation {kind}")
    given: dict[str, Any] = {"slope": float(c.get("alpha", 0.01))} if kind == "LeakyRelu" else {}
    y = c.scope[name]
    value = c.reader.builder.values[y]
    c.emit(_FUSED[kind], [y], typed=(value.shape, value.dtype), **given)


@lowers("FusedConv", domain=MS)
def _fused_conv(c: Call) -> None:
    x, weight = c.sizes(0), c.sizes(1)
    from archlint.graph.onnx_reader.lower.affine import window

    stride, padding, dilation = window(c, weight[2:], x[2:])
    n = len(stride)
    out = tuple(
        (x[2 + i] + padding[i] + padding[n + i] - dilation[i] * (weight[2 + i] - 1) - 1)
        // stride[i] + 1
        for i in range(n)
    )  # fmt: skip
    c.outs = [((x[0], weight[0], *out), c.dtype(0))]
    if c.has(3):
        raise LookupError("a fused sum")
    convolution(c, c.value(0), c.weight(1), c.weight(2), x)
    _activated(c, c.node.output[0])


@lowers("FusedMatMul", domain=MS)
def _fused_matmul(c: Call) -> None:
    if c.get("transBatchA", 0) or c.get("transBatchB", 0):
        raise LookupError("transposed batches")
    alpha = float(c.get("alpha", 1.0))
    a, b = c.sizes(0), c.sizes(1)
    trans_a, trans_b = bool(c.get("transA", 0)), bool(c.get("transB", 0))
    rows = a[-1] if trans_a else a[-2]
    columns = b[-2] if trans_b else b[-1]
    batch = np.broadcast_shapes(a[:-2], b[:-2])
    c.outs = [((*batch, rows, columns), c.dtype(0))]
    from archlint.graph.onnx_reader.lower.affine import swap

    x = swap(c, c.value(0), a) if trans_a else c.value(0)
    if c.is_known(1) and len(b) == 2:
        linear(c, x, 1, transposed=trans_b, alpha=alpha)
        return
    c.ins = [x, swap(c, c.value(1), b) if trans_b else c.value(1)]
    name = c.node.output[0]
    matmul(c, 0, 1)
    if alpha != 1.0:
        c.emit("mul", [c.scope[name], c.constant(np.float32(alpha))])


@lowers("FusedGemm", domain=MS)
def _fused_gemm(c: Call) -> None:
    a, b = c.sizes(0), c.sizes(1)
    if c.get("transA", 0) or not c.is_known(1):
        raise LookupError("a transposed left factor")
    columns = b[0] if c.get("transB", 0) else b[1]
    c.outs = [((a[0], columns), c.dtype(0))]
    linear(c, c.value(0), 1, c.weight(2), bool(c.get("transB", 0)),
           alpha=float(c.get("alpha", 1.0)))  # fmt: skip
    _activated(c, c.node.output[0])
