"""Lowerings of pooling, resizing and what cuts images into patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from archlint.graph.torch_recorder.affine import each
from archlint.graph.torch_recorder.lowering import Call, NotModelled, V, lowering


def _with_samples(c: Call, input: V, n: int) -> tuple[V, bool]:
    """The input with a sample axis, and whether it had none."""
    if input.rank == n + 1:
        return c.reshape(input, (1, *input.shape)), True
    return input, False


def _spatial(name: str) -> int:
    return int(name.split("pool")[1][0])


@lowering(
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "max_pool2d_with_indices",
    "max_pool3d_with_indices",
    "max_pool1d_with_indices",
)
def max_pool(
    c: Call,
    input: V,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Any:
    """Maximum over windows."""
    n = _spatial(c.name)
    x, alone = _with_samples(c, input, n)
    kernel = each(kernel_size, n)
    pair = isinstance(c.out, tuple)
    shape = (1, *c.shape) if alone else c.shape
    attributes = {
        "kernel": kernel,
        "stride": kernel if stride is None or stride == [] else each(stride, n),
        "padding": each(padding, n) * 2,
        "dilation": each(dilation, n),
        "ceil": ceil_mode,
    }
    if not pair:
        return c.reshape(c.emit("max_pool", [x], shape, **attributes), c.shape)
    made = c.emit_many("max_pool", [x], [(shape, c.dtype), (shape, "int64")], **attributes)
    return tuple(c.reshape(v, c.shape) for v in made)


@lowering("avg_pool1d", "avg_pool2d", "avg_pool3d")
def avg_pool(
    c: Call,
    input: V,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> V:
    """Mean over windows."""
    n = _spatial(c.name)
    x, alone = _with_samples(c, input, n)
    kernel = each(kernel_size, n)
    made = c.emit(
        "avg_pool",
        [x],
        (1, *c.shape) if alone else c.shape,
        kernel=kernel,
        stride=kernel if stride is None or stride == [] else each(stride, n),
        padding=each(padding, n) * 2,
        ceil=ceil_mode,
        count_padding=count_include_pad,
        divisor=divisor_override,
    )
    return c.reshape(made, c.shape)


@lowering("lp_pool1d", "lp_pool2d", "lp_pool3d")
def lp_pool(
    c: Call,
    input: V,
    norm_type: float,
    kernel_size: Any,
    stride: Any = None,
    ceil_mode: bool = False,
) -> V:
    """A norm over windows."""
    n = _spatial(c.name)
    kernel = each(kernel_size, n)
    return c.emit(
        "lp_pool",
        [input],
        kernel=kernel,
        stride=kernel if stride is None else each(stride, n),
        padding=(0,) * 2 * n,
        p=float(norm_type),
        ceil=ceil_mode,
    )


@lowering(
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "_adaptive_avg_pool2d",
    "_adaptive_avg_pool3d",
)
def adaptive_avg_pool(c: Call, input: V, output_size: Any) -> V:
    """Mean over as many windows as asked for."""
    n = _spatial(c.name)
    x, alone = _with_samples(c, input, n)
    shape = (1, *c.shape) if alone else c.shape
    return c.reshape(c.emit("adaptive_avg_pool", [x], shape, size=shape[-n:]), c.shape)


@lowering(
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "adaptive_max_pool1d_with_indices",
    "adaptive_max_pool2d_with_indices",
    "adaptive_max_pool3d_with_indices",
)
def adaptive_max_pool(c: Call, input: V, output_size: Any, return_indices: bool = False) -> Any:
    """Maximum over as many windows as asked for."""
    n = _spatial(c.name)
    x, alone = _with_samples(c, input, n)
    shape = (1, *c.shape) if alone else c.shape
    if not isinstance(c.out, tuple):
        return c.reshape(c.emit("adaptive_max_pool", [x], shape, size=shape[-n:]), c.shape)
    made = c.emit_many(
        "adaptive_max_pool", [x], [(shape, c.dtype), (shape, "int64")], size=shape[-n:]
    )
    return tuple(c.reshape(v, c.shape) for v in made)


@lowering("max_unpool1d", "max_unpool2d", "max_unpool3d")
def max_unpool(
    c: Call,
    input: V,
    indices: V,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    output_size: Any = None,
) -> V:
    """Back to where the maxima were."""
    n = _spatial(c.name)
    kernel = each(kernel_size, n)
    return c.emit(
        "max_unpool",
        [input, indices],
        kernel=kernel,
        stride=kernel if stride is None else each(stride, n),
        padding=each(padding, n) * 2,
    )


@lowering("interpolate", "upsample", "upsample_nearest", "upsample_bilinear")
def interpolate(
    c: Call,
    input: V,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> V:
    """Another spatial size."""
    if c.name == "upsample_bilinear":
        mode, align_corners = "bilinear", True
    if mode == "area":
        return c.emit("adaptive_avg_pool", [input], size=c.shape[2:])
    # a factor that is given counts as it is, unless the sizes that it led to are to count
    scales = None
    if scale_factor is not None and not recompute_scale_factor:
        n = input.rank - 2
        scales = tuple(
            float(s)
            for s in (
                scale_factor if isinstance(scale_factor, list | tuple) else [scale_factor] * n
            )
        )
    return _resized(c, input, mode, bool(align_corners), antialias, scales)


def _resized(
    c: Call,
    input: V,
    mode: str,
    align_corners: bool = False,
    antialias: bool = False,
    scales: tuple[float, ...] | None = None,
) -> V:
    """torch's conventions: nearest takes the element at or below i/scale."""
    exact = mode == "nearest-exact"
    plain = mode == "nearest"
    return c.emit(
        "resize",
        [input],
        size=c.shape[2:],
        mode="nearest" if exact else mode,
        align_corners=align_corners,
        coordinates="asymmetric" if plain else "half_pixel",
        rounding="floor" if plain else "round_prefer_ceil",
        scales=scales,
        cubic=-0.5 if antialias else -0.75,
        antialias=antialias,
        exclude_outside=antialias,
    )


@lowering(
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d",
    "_upsample_nearest_exact3d",
)
def upsample_nearest(c: Call, input: V, *_: Any, **__: Any) -> V:
    """The dispatcher's nearest neighbour."""
    return _resized(c, input, "nearest-exact" if "exact" in c.name else "nearest")


@lowering(
    "upsample_bilinear2d",
    "upsample_bicubic2d",
    "upsample_linear1d",
    "upsample_trilinear3d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
def upsample(c: Call, input: V, output_size: Any, align_corners: bool, *_: Any, **__: Any) -> V:
    """The dispatcher's interpolation."""
    antialias = c.name.endswith("_aa")
    mode = c.name.removeprefix("_").removesuffix("_aa").removeprefix("upsample_")
    return _resized(c, input, mode[:-2], bool(align_corners), antialias)


@lowering("grid_sample", "grid_sampler", "grid_sampler_2d")
def grid_sample(
    c: Call,
    input: V,
    grid: V,
    mode: Any = "bilinear",
    padding_mode: Any = "zeros",
    align_corners: bool | None = None,
) -> V:
    """Elements at real positions."""
    if isinstance(mode, int):
        mode = ("bilinear", "nearest", "bicubic")[mode]
    if isinstance(padding_mode, int):
        padding_mode = ("zeros", "border", "reflection")[padding_mode]
    return c.emit(
        "grid_sample",
        [input, grid],
        mode=mode,
        padding_mode=padding_mode,
        align_corners=bool(align_corners),
    )


@lowering("im2col")
def im2col(
    c: Call, input: V, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> V:
    """Windows as columns."""
    if input.rank != 4:
        raise NotModelled("no sample axis")
    return c.emit(
        "unfold",
        [input],
        kernel=each(kernel_size, 2),
        stride=each(stride, 2),
        padding=each(padding, 2) * 2,
        dilation=each(dilation, 2),
    )


@lowering("col2im")
def col2im(
    c: Call,
    input: V,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> V:
    """Columns added up in their windows."""
    if input.rank != 3:
        raise NotModelled("no sample axis")
    return c.emit(
        "fold",
        [input],
        size=each(output_size, 2),
        kernel=each(kernel_size, 2),
        stride=each(stride, 2),
        padding=each(padding, 2) * 2,
        dilation=each(dilation, 2),
    )


@lowering("pixel_shuffle")
def pixel_shuffle(c: Call, input: V, upscale_factor: int) -> V:
    """Channels into space."""
    return c.emit("depth_to_space", [input], block=upscale_factor, mode="CRD")


@lowering("pixel_unshuffle")
def pixel_unshuffle(c: Call, input: V, downscale_factor: int) -> V:
    """Space into channels, torch's order: the channel is the slowest."""
    return c.emit("space_to_depth", [input], block=downscale_factor, mode="CRD")


@lowering("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(c: Call, input: V, groups: int) -> V:
    """Channels of the groups interleaved."""
    return c.emit("channel_shuffle", [input], groups=groups)


@lowering(
    "pad",
    "constant_pad_nd",
    "reflection_pad1d",
    "reflection_pad2d",
    "reflection_pad3d",
    "replication_pad1d",
    "replication_pad2d",
    "replication_pad3d",
)
def pad(
    c: Call, input: V, pad: Sequence[int], mode: Any = "constant", value: float | None = None
) -> V:
    """More elements at the ends of axes; negative amounts cut."""
    if c.name == "constant_pad_nd":
        mode, value = "constant", mode if value is None else value
    elif c.name != "pad":
        mode = "reflect" if c.name.startswith("reflection") else "replicate"
    if isinstance(value, str) or isinstance(mode, int | float):
        value = 0.0 if isinstance(value, str) else float(mode)
        mode = "constant"
    pads = [int(p) for p in pad]
    begins, ends = [0] * input.rank, [0] * input.rank
    for i in range(len(pads) // 2):
        begins[input.rank - 1 - i], ends[input.rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    for axis in range(input.rank):
        cut_first, cut_last = max(-begins[axis], 0), max(-ends[axis], 0)
        input = c.slice(input, axis, cut_first, input.shape[axis] - cut_last)
        begins[axis], ends[axis] = max(begins[axis], 0), max(ends[axis], 0)
    if not any(begins) and not any(ends):
        return c.emit("identity", [input])
    fill = None if not value else c.number(value, input)
    return c.emit("pad", [input, fill], padding=(*begins, *ends), mode=mode)
