"""Maps that contract a weight, and products of two activations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from archlint.probe.ops.frame import Call, CannotExecute, computes
from archlint.probe.ops.indexing import wrapped


@computes("linear")
def linear(c: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """alpha·x·W + beta·b over the last axis of x."""
    x = x.to(weight.dtype)  # what stands for 8-bit integers
    matrix = weight if c["input_axis"] == 1 else weight.transpose(-1, -2)
    if c["alpha"] == 1.0 and (bias is None or (c["beta"] == 1.0 and bias.ndim == 1)):
        return F.linear(x, matrix, bias)
    y = F.linear(x, matrix)
    if c["alpha"] != 1.0:
        y = y * c["alpha"]
    if bias is None:
        return y
    return y + (bias if c["beta"] == 1.0 else bias * c["beta"])


def symmetric(padding: Sequence[int]) -> tuple[int, ...] | None:
    """The padding of each axis where its begin and end are equal, else None."""
    n = len(padding) // 2
    return tuple(padding[:n]) if tuple(padding[:n]) == tuple(padding[n:]) else None


def torch_padding(padding: Sequence[int]) -> list[int]:
    """(begins, ends) of spatial axes in the order of ``F.pad``: last axis first, in pairs."""
    n = len(padding) // 2
    return [p for axis in reversed(range(n)) for p in (padding[axis], padding[n + axis])]


CONVOLUTIONS: tuple[Any, ...] = (None, F.conv1d, F.conv2d, F.conv3d)
_TURNED: tuple[Any, ...] = (None, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@computes("conv")
def conv(c: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Cross-correlation with padding at begins and ends."""
    x = x.to(weight.dtype)
    even = symmetric(c["padding"])
    if even is None or c["padding_mode"] != "zeros":
        mode = {"zeros": "constant"}.get(c["padding_mode"], c["padding_mode"])
        x, even = F.pad(x, torch_padding(c["padding"]), mode), (0,) * len(c["stride"])
    return torch.as_tensor(
        CONVOLUTIONS[weight.ndim - 2](
            x, weight, bias, c["stride"], even, c["dilation"], c["groups"]
        )
    )


@computes("conv_transpose")
def conv_transpose(c: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The transpose of a convolution: computed whole, then cut by the padding."""
    n = weight.ndim - 2
    even, extra = symmetric(c["padding"]), tuple(c["output_padding"])
    runs = _TURNED[n]
    fits = all(e < max(s, d) for e, s, d in zip(extra, c["stride"], c["dilation"], strict=True))
    if even is not None and fits:
        y: Tensor = runs(x, weight, bias, c["stride"], even, extra, c["groups"], c["dilation"])
        return y
    y = runs(x, weight, None, c["stride"], 0, 0, c["groups"], c["dilation"])
    ends = [e - p for e, p in zip(extra, c["padding"][n:], strict=True)]
    y = F.pad(y, torch_padding([*(-p for p in c["padding"][:n]), *ends]))
    return y if bias is None else y + bias.reshape(-1, *(1,) * n)


@computes("grouped_linear")
def grouped_linear(c: Call, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Each row times the matrix of its group; zeros past the last group."""
    matrices = weight if c["input_axis"] == 1 else weight.transpose(1, 2)
    made = x.new_zeros(x.shape[0], matrices.shape[2])
    start = 0
    for matrix, end in zip(matrices, offsets.tolist(), strict=True):
        made[start:end] = x[start:end] @ matrix
        start = end
    return made


@computes("bilinear")
def bilinear(c: Call, x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x₁ᵀ·W·x₂ + b with W [out, in1, in2]."""
    y = torch.einsum("...i,oij,...j->...o", x1, weight, x2)
    return y if bias is None else y + bias


@computes("embedding")
def embedding(c: Call, ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of the weight; a negative id counts from the end."""
    return F.embedding(wrapped(ids, weight.shape[0]), weight)


@computes("embedding_bag")
def embedding_bag(
    c: Call,
    ids: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Rows of each bag reduced; a row of 2-D ids is a bag."""
    if ids.ndim != 2:
        return F.embedding_bag(ids, weight, offsets, mode=c["mode"],
                               per_sample_weights=per_sample_weights)  # fmt: skip
    rows = F.embedding(ids, weight)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    if c["mode"] == "max":
        return rows.amax(1)
    return rows.mean(1) if c["mode"] == "mean" else rows.sum(1)


@computes("matmul")
def matmul(c: Call, a: Tensor, b: Tensor) -> Tensor:
    """numpy's matmul; integers are exact."""
    if a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    return torch.matmul(a, b)


@computes("einsum")
def einsum(c: Call, *operands: Tensor) -> Tensor:
    """A sum of products."""
    if any(o is None for o in operands):
        raise CannotExecute("einsum: an operand is left out")
    return torch.einsum(c["equation"], *operands)


# --------------------------------------------------------------------------- windows as columns


def _taps(kernel: Sequence[int], like: Tensor) -> Tensor:
    """One filter for every place of a window: [taps, 1, *kernel]."""
    taps = math.prod(kernel)
    return torch.eye(taps, dtype=like.dtype, device=like.device).reshape(taps, 1, *kernel)


@computes("unfold")
def unfold(c: Call, x: Tensor) -> Tensor:
    """Windows as columns: [sample, channel·taps, windows], for any number of spatial axes."""
    samples, channels = x.shape[:2]
    n = len(c["kernel"])
    x = F.pad(x, torch_padding(c["padding"]))
    x = x.reshape(samples * channels, 1, *x.shape[2:])
    y = CONVOLUTIONS[n](x, _taps(c["kernel"], x), None, c["stride"], 0, c["dilation"])
    return torch.as_tensor(y.reshape(samples, channels * y.shape[1], -1))


def _padded(sizes: Sequence[int], padding: Sequence[int]) -> list[int]:
    n = len(sizes)
    return [size + padding[i] + padding[n + i] for i, size in enumerate(sizes)]


@computes("fold")
def fold(c: Call, x: Tensor) -> Tensor:
    """Columns added up in their windows: the transpose of ``unfold``."""
    n, kernel = len(c["kernel"]), c["kernel"]
    taps, padding = math.prod(kernel), c["padding"]
    sizes = _padded(c["size"], padding)
    counts = [
        (size - d * (k - 1) - 1) // s + 1
        for size, d, k, s in zip(sizes, c["dilation"], kernel, c["stride"], strict=True)
    ]
    samples, channels = x.shape[0], x.shape[1] // taps
    x = x.reshape(samples * channels, taps, *counts)
    y = _TURNED[n](x, _taps(kernel, x), None, c["stride"], 0, 0, 1, c["dilation"])
    lacking = [size - made for size, made in zip(sizes, y.shape[2:], strict=True)]
    ends = [e - p for e, p in zip(lacking, padding[n:], strict=True)]
    y = F.pad(y, torch_padding([*(-p for p in padding[:n]), *ends]))
    return torch.as_tensor(y.reshape(samples, channels, *c["size"]))
