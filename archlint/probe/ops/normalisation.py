"""Norms and softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from archlint.probe.ops.frame import Call, computes


def _along(x: Tensor, weight: Tensor, axes: Sequence[int]) -> Tensor:
    """A learned weight so that it broadcasts over x: by its own axes where they are the last ones
    or where it has as many as x, else with its elements along the normalised axes."""
    trailing = tuple(axes) == tuple(range(x.ndim - len(axes), x.ndim))
    if trailing or weight.ndim in (0, x.ndim) or weight.ndim != len(axes):
        return weight
    sizes = [1] * x.ndim
    for axis, n in zip(axes, weight.shape, strict=True):
        sizes[axis] = n
    return weight.reshape(sizes)


def _scaled(x: Tensor, scale: Tensor | None, shift: Tensor | None, axes: Sequence[int]) -> Tensor:
    if scale is not None:
        x = x * _along(x, scale, axes)
    return x if shift is None else x + _along(x, shift, axes)


def _channels(x: Tensor, weight: Tensor) -> Tensor:
    return weight.reshape(-1, *(1,) * (x.ndim - 2))


@computes("batch_norm")
def batch_norm(
    c: Call,
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> Tensor:
    """By the statistics of the batch in training, by the running ones otherwise."""
    if c["training"] or mean is None or variance is None:
        return F.batch_norm(x, None, None, scale, shift, training=True, eps=c["eps"])
    factor = torch.rsqrt(variance + c["eps"])
    if scale is not None:
        factor = factor * scale
    y = (x - _channels(x, mean)) * _channels(x, factor)
    return y if shift is None else y + _channels(x, shift)


@computes("layer_norm")
def layer_norm(
    c: Call, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """Standardised over axes."""
    axes = c["axes"]
    if tuple(axes) == tuple(range(x.ndim - len(axes), x.ndim)):
        sizes = x.shape[x.ndim - len(axes) :]
        fits = all(w is None or w.shape == sizes for w in (scale, shift))
        if fits:
            return F.layer_norm(x, sizes, scale, shift, c["eps"])
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return _scaled((x - mean) * torch.rsqrt(variance + c["eps"]), scale, shift, axes)


@computes("rms_norm")
def rms_norm(c: Call, x: Tensor, scale: Tensor | None = None) -> Tensor:
    """Divided by the root mean square over axes."""
    mean = x.square().mean(c["axes"], keepdim=True)
    return _scaled(x * torch.rsqrt(mean + c["eps"]), scale, None, c["axes"])


@computes("group_norm")
def group_norm(
    c: Call, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """Standardised over each group of channels."""
    return F.group_norm(x, c["groups"], scale, shift, c["eps"])


@computes("instance_norm")
def instance_norm(
    c: Call, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None
) -> Tensor:
    """Each channel of each sample standardised over its positions."""
    axes = tuple(range(2, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    y = (x - mean) * torch.rsqrt(variance + c["eps"])
    if scale is not None:
        y = y * _channels(x, scale)
    return y if shift is None else y + _channels(x, shift)


@computes("lp_normalize")
def lp_normalize(c: Call, x: Tensor) -> Tensor:
    """Divided by the norm along an axis, which counts as eps (zero: as one) where smaller."""
    size = torch.linalg.vector_norm(x, c["p"], c["axis"], keepdim=True)
    if c["eps"] > 0:
        size = size.clamp_min(c["eps"])
        return torch.div(x, size)
    return x / torch.where(size == 0, torch.ones_like(size), size)


@computes("local_response_norm")
def local_response_norm(c: Call, x: Tensor) -> Tensor:
    """x over (k + alpha/size·sum of squares of neighbouring channels)^beta."""
    size = c["size"]
    square = x.square()
    square = F.pad(square, [0] * (2 * (x.ndim - 2)) + [(size - 1) // 2, size // 2])
    total = square.unfold(1, size, 1).sum(-1)
    return torch.div(x, (c["k"] + c["alpha"] / size * total) ** c["beta"])


@computes("standardise")
def standardise(c: Call, x: Tensor) -> Tensor:
    """(x − mean)/(sqrt(variance + eps) + outer_eps)."""
    axes = c["axes"]
    variance, mean = torch.var_mean(x, axes, correction=int(c["unbiased"]), keepdim=True)
    return torch.div(x - mean, torch.sqrt(variance + c["eps"]) + c["outer_eps"])


@computes("weight_norm")
def weight_norm(c: Call, v: Tensor, g: Tensor) -> Tensor:
    """g·v/‖v‖ with the norm over all axes but one, or over all."""
    axes = tuple(i for i in range(v.ndim) if c["axis"] is None or i != c["axis"] % v.ndim)
    size = torch.linalg.vector_norm(v, 2, axes, keepdim=True) if axes else v.abs()
    if c["axis"] is not None and g.ndim == 1:
        g = g.reshape([-1 if i == c["axis"] % v.ndim else 1 for i in range(v.ndim)])
    return v * (g / size)


@computes("spectral_norm")
def spectral_norm(c: Call, weight: Tensor) -> Tensor:
    """The weight, as a matrix of rows along an axis, over its largest singular value."""
    matrix = weight.movedim(c["axis"], 0).flatten(1)
    return torch.div(weight, torch.linalg.matrix_norm(matrix, 2))


@computes("softmax")
def softmax(c: Call, x: Tensor) -> Tensor:
    """exp x over its sum along an axis."""
    return torch.softmax(x, c["axis"])


@computes("log_softmax")
def log_softmax(c: Call, x: Tensor) -> Tensor:
    """The logarithm of the softmax."""
    return torch.log_softmax(x, c["axis"])


@computes("gumbel_softmax")
def gumbel_softmax(c: Call, x: Tensor) -> Tensor:
    """Softmax of logits with Gumbel noise; hard: a one at the largest, the soft gradient."""
    noise = -torch.log(-torch.log(torch.rand_like(x).clamp_min(torch.finfo(x.dtype).tiny)))
    soft = torch.softmax((x + noise) / c["tau"], c["axis"])
    if not c["hard"]:
        return soft
    best = soft.amax(c["axis"], keepdim=True)
    return (soft == best).to(soft.dtype) - soft.detach() + soft
