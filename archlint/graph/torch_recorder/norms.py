"""Lowerings of normalisations and softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from archlint.graph.torch_recorder.elementwise import dtype_argument
from archlint.graph.torch_recorder.lowering import Call, NotModelled, V, lowering


@lowering("batch_norm")
def batch_norm(
    c: Call,
    input: V,
    running_mean: V | None = None,
    running_var: V | None = None,
    weight: V | None = None,
    bias: V | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> V:
    """Normalised over samples and positions by the batch's statistics, or the running ones."""
    return c.emit(
        "batch_norm",
        [input, weight, bias, running_mean, running_var],
        eps=float(eps),
        momentum=float(momentum or 0.0),
        training=bool(training) or c.lowerer.assume_training,
    )


@lowering("aten_batch_norm")
def aten_batch_norm(
    c: Call,
    input: V,
    weight: V | None,
    bias: V | None,
    running_mean: V | None,
    running_var: V | None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    """The dispatcher's order of arguments."""
    return batch_norm(c, input, running_mean, running_var, weight, bias, training, momentum, eps)


@lowering("native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm")
def native_batch_norm(
    c: Call,
    input: V,
    weight: V | None,
    bias: V | None,
    running_mean: V | None,
    running_var: V | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """As above, with statistics as further results."""
    made = batch_norm(c, input, running_mean, running_var, weight, bias, training, momentum, eps)
    return made, None, None


@lowering("_native_batch_norm_legit_no_training")
def batch_norm_of_running_statistics(
    c: Call,
    input: V,
    weight: V | None,
    bias: V | None,
    running_mean: V,
    running_var: V,
    momentum: float,
    eps: float,
) -> Any:
    """As above, never in training."""
    made = batch_norm(c, input, running_mean, running_var, weight, bias, False, momentum, eps)
    return made, None, None


@lowering("layer_norm")
def layer_norm(
    c: Call,
    input: V,
    normalized_shape: Sequence[int],
    weight: V | None = None,
    bias: V | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> V:
    """Standardised over the last axes."""
    count = 1 if isinstance(normalized_shape, int) else len(normalized_shape)
    axes = tuple(range(input.rank - count, input.rank))
    return c.emit("layer_norm", [input, weight, bias], axes=axes, eps=float(eps))


@lowering("native_layer_norm")
def native_layer_norm(
    c: Call,
    input: V,
    normalized_shape: Sequence[int],
    weight: V | None,
    bias: V | None,
    eps: float,
) -> Any:
    """With statistics as further results."""
    return layer_norm(c, input, normalized_shape, weight, bias, eps), None, None


@lowering("rms_norm")
def rms_norm(
    c: Call,
    input: V,
    normalized_shape: Sequence[int],
    weight: V | None = None,
    eps: float | None = None,
) -> V:
    """Divided by the root mean square of the last axes."""
    axes = tuple(range(input.rank - len(normalized_shape), input.rank))
    if eps is None:
        import torch

        eps = torch.finfo(getattr(torch, input.dtype)).eps
    return c.emit("rms_norm", [input, weight], axes=axes, eps=float(eps))


@lowering("group_norm")
def group_norm(
    c: Call,
    input: V,
    num_groups: int,
    weight: V | None = None,
    bias: V | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> V:
    """Standardised over each group of channels."""
    return c.emit("group_norm", [input, weight, bias], groups=num_groups, eps=float(eps))


@lowering("native_group_norm")
def native_group_norm(
    c: Call,
    input: V,
    weight: V | None,
    bias: V | None,
    n: int,
    channels: int,
    positions: int,
    group: int,
    eps: float,
) -> Any:
    """With statistics as further results."""
    return group_norm(c, input, group, weight, bias, eps), None, None


@lowering("instance_norm")
def instance_norm(
    c: Call,
    input: V,
    running_mean: V | None = None,
    running_var: V | None = None,
    weight: V | None = None,
    bias: V | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> V:
    """Each channel of each sample standardised over its positions."""
    if not use_input_stats:
        return batch_norm(  # type: ignore[no-any-return]
            c, input, running_mean, running_var, weight, bias, False, momentum, eps
        )
    return c.emit("instance_norm", [input, weight, bias], eps=float(eps))


@lowering("aten_instance_norm")
def aten_instance_norm(
    c: Call,
    input: V,
    weight: V | None,
    bias: V | None,
    running_mean: V | None,
    running_var: V | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    """The dispatcher's order of arguments."""
    return instance_norm(
        c, input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


@lowering("normalize")
def normalize(
    c: Call, input: V, p: float = 2.0, dim: Any = 1, eps: float = 1e-12, out: Any = None
) -> V:
    """Divided by a norm along an axis."""
    if not isinstance(dim, int):
        if len(dim) != 1:
            raise NotModelled("a norm over several axes")
        dim = dim[0]
    return c.emit("lp_normalize", [input], p=float(p), axis=dim % input.rank, eps=float(eps))


@lowering("local_response_norm")
def local_response_norm(
    c: Call, input: V, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> V:
    """Divided by a power of the neighbouring channels' mean square."""
    return c.emit(
        "local_response_norm", [input], size=size, alpha=float(alpha), beta=float(beta), k=float(k)
    )


@lowering("_weight_norm")
def weight_norm(c: Call, v: V, g: V, dim: int | None = 0) -> V:
    """g·v/‖v‖."""
    return c.emit("weight_norm", [v, g], axis=None if dim is None or dim == -1 else dim)


@lowering("_weight_norm_interface")
def weight_norm_interface(c: Call, v: V, g: V, dim: int = 0) -> Any:
    """As above, with the norm as second result."""
    return weight_norm(c, v, g, dim), None


@lowering("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(c: Call, input: V, dim: int | None = None, *_: Any, dtype: Any = None) -> V:
    """exp x over its sum along an axis."""
    if dim is None:
        dim = 0 if input.rank in (0, 1, 3) else 1
    wanted = dtype_argument(dtype) or c.dtype
    input = c.cast(input, wanted)
    return c.emit(c.name.removeprefix("_"), [input], axis=dim % max(input.rank, 1))


@lowering("softmin")
def softmin(c: Call, input: V, dim: int = -1, *_: Any, dtype: Any = None) -> V:
    """Softmax of −x."""
    return c.emit("softmax", [c.emit("neg", [input])], axis=dim % input.rank)


@lowering("gumbel_softmax")
def gumbel_softmax(
    c: Call, logits: V, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> V:
    """Softmax of noisy logits."""
    return c.emit("gumbel_softmax", [logits], axis=dim % logits.rank, tau=float(tau), hard=hard)
