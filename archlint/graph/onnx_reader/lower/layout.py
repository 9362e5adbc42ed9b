"""Operators that move elements, and those on integers and positions."""

from __future__ import annotations

import numpy as np

from archlint.graph.onnx_reader.fold import axes_of
from archlint.graph.onnx_reader.read import numpy_dtype
from archlint.graph.onnx_reader.reader import CONSTANT_ELEMENTS, Call, lowers


def target(c: Call) -> tuple[int, ...] | None:
    """The output's shape where all sizes are known."""
    shape = c.outs[0][0]
    if shape is None or any(n is None for n in shape):
        return None
    return tuple(n for n in shape if n is not None)


@lowers("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(c: Call) -> None:
    shape = target(c)
    if shape is not None:
        c.emit("reshape", [c.value(0)], shape=shape)
    elif c.node.op_type == "Reshape":
        c.emit("reshape", [c.value(0), c.value(1)])
    else:
        out = c.outs[0][0]
        if out is None or sum(n is None for n in out) > 1:
            raise LookupError("more than one size is unknown")
        c.emit("reshape", [c.value(0)], shape=tuple(-1 if n is None else n for n in out))


@lowers("Transpose")
def _transpose(c: Call) -> None:
    permutation = c.get("perm") or list(reversed(range(c.rank(0))))
    c.emit("transpose", [c.value(0)], permutation=tuple(permutation))


@lowers("Expand")
def _expand(c: Call) -> None:
    shape = target(c)
    c.emit("expand", [c.value(0)] if shape is not None else [c.value(0), c.value(1)], shape=shape)


@lowers("Tile")
def _tile(c: Call) -> None:
    repeats = c.ints(1)
    if repeats is None:
        c.emit("tile", [c.value(0), c.value(1)])
    else:
        c.emit("tile", [c.value(0)], repeats=tuple(repeats))


@lowers("Concat")
def _concat(c: Call) -> None:
    parts = [c.weight(i) if "float" in (c.dtype(i) or "") else c.value(i)
             for i in range(len(c.ins))]  # fmt: skip
    c.emit("concat", parts, axis=int(c.get("axis", 1)) % c.rank(0))


@lowers("Split")
def _split(c: Call) -> None:
    axis = int(c.get("axis", 0)) % c.rank(0)
    sizes = []
    for shape, _ in c.outs:
        if shape is None or shape[axis] is None:
            raise LookupError("the sizes of the parts are unknown")
        sizes.append(shape[axis])
    c.emit_all("split", [c.value(0)], axis=axis, sizes=tuple(sizes))


@lowers("Slice")
def _slice(c: Call) -> None:
    shape = c.shape(0)
    if shape is None:
        raise LookupError("the rank is unknown")
    if c.opset < 10:
        starts, ends = list(c.get("starts")), list(c.get("ends"))
        axes, steps = c.get("axes"), None
    else:
        first, last = c.ints(1), c.ints(2)
        if first is None or last is None or (c.has(3) and c.ints(3) is None):
            c.emit("dynamic_slice", [c.value(0), c.value(1), c.value(2), c.optional(3),
                                     c.optional(4)])  # fmt: skip
            return
        starts, ends, axes, steps = first, last, c.ints(3), c.ints(4)
    axes = [a % len(shape) for a in (axes if axes is not None else range(len(starts)))]
    steps = steps or [1] * len(starts)
    for i, axis in enumerate(axes):
        size = shape[axis]
        if size is None:
            if starts[i] < 0 or ends[i] < 0 or steps[i] < 0:
                c.emit("dynamic_slice", [c.value(0), *(c.optional(k) for k in range(1, 5))])
                return
            continue
        starts[i], ends[i], steps[i] = slice(
            starts[i], None if steps[i] < 0 and ends[i] < -size else ends[i], steps[i]
        ).indices(size)
    c.emit("slice", [c.value(0)], axes=tuple(axes), starts=tuple(starts), ends=tuple(ends),
           steps=tuple(steps))  # fmt: skip


@lowers("Pad")
def _pad(c: Call) -> None:
    rank = c.rank(0)
    if c.opset < 11:
        padding = list(c.get("pads", c.get("paddings")))
        value: str | None = None
        if c.get("value", 0.0):
            value = c.constant(np.float32(c.get("value")))
    else:
        given = c.ints(1)
        if given is None:
            raise LookupError("the padding is not known")
        padding, value = given, c.optional(2)
        axes = axes_of([c.array(i) if c.has(i) else None for i in range(len(c.ins))],
                       c.attributes, 3)  # fmt: skip
        if axes is not None:
            full = [0] * (2 * rank)
            for i, axis in enumerate(axes):
                full[axis % rank] = padding[i]
                full[rank + axis % rank] = padding[len(axes) + i]
            padding = full
    mode = {"edge": "replicate", "wrap": "circular"}.get(m := str(c.get("mode", "constant")), m)
    if mode == "reflect":
        for axis, n in enumerate(c.shape(0) or ()):
            most = max(padding[axis], padding[rank + axis])
            if n is not None and most >= max(n, 1):
                c.conflict(f"cannot reflect {most} of {n} elements along axis {axis}")
    c.emit("pad", [c.value(0), value], padding=tuple(padding), mode=mode)


@lowers("GatherElements")
def _gather_elements(c: Call) -> None:
    c.emit("gather_elements", [c.value(0), c.value(1)], axis=int(c.get("axis", 0)) % c.rank(0))


@lowers("GatherND")
def _gather_nd(c: Call) -> None:
    c.emit("gather_nd", [c.value(0), c.value(1)], batch_axes=int(c.get("batch_dims", 0)))


@lowers("ScatterElements", "Scatter")
def _scatter_elements(c: Call) -> None:
    c.emit(
        "scatter_elements",
        [c.value(0), c.value(1), c.value(2)],
        axis=int(c.get("axis", 0)) % c.rank(0),
        reduction=str(c.get("reduction", "none")),
    )


@lowers("ScatterND")
def _scatter_nd(c: Call) -> None:
    c.emit("scatter_nd", [c.value(0), c.value(1), c.value(2)],
           reduction=str(c.get("reduction", "none")))  # fmt: skip


@lowers("DepthToSpace")
def _depth_to_space(c: Call) -> None:
    c.emit("depth_to_space", [c.value(0)], block=int(c.get("blocksize")),
           mode=str(c.get("mode", "DCR")))  # fmt: skip


@lowers("SpaceToDepth")
def _space_to_depth(c: Call) -> None:
    c.emit("space_to_depth", [c.value(0)], block=int(c.get("blocksize")),
           mode=str(c.get("mode", "DCR")))  # fmt: skip


@lowers("Resize", "Upsample")
def _resize(c: Call) -> None:
    out = c.outs[0][0]
    shape = c.sizes(0)
    if out is None or any(n is None for n in out):
        scales = c.array(2 if c.opset >= 11 else 1)
        if scales is None or scales.size != len(shape):
            raise LookupError("the size is not known")
        out = tuple(int(np.floor(n * s)) for n, s in zip(shape, scales, strict=True))
    if tuple(out[:2]) != tuple(shape[:2]):
        raise LookupError("samples or channels are resized")
    old = c.node.op_type == "Upsample" or c.opset < 11
    where = "asymmetric" if old else str(c.get("coordinate_transformation_mode", "half_pixel"))
    if where == "tf_crop_and_resize":
        raise LookupError("a region is cut out")
    c.emit("resize", [c.value(0)], typed=(out, c.dtype(0)), size=tuple(out[2:]),
           mode=str(c.get("mode", "nearest")), align_corners=where == "align_corners",
           coordinates=where, rounding="floor" if old
           else str(c.get("nearest_mode", "round_prefer_floor")),
           scales=_scales(c, shape, [n or 0 for n in out]),
           cubic=float(c.get("cubic_coeff_a", -0.75)), antialias=bool(c.get("antialias", 0)),
           exclude_outside=bool(c.get("exclude_outside", 0)))  # fmt: skip


def _scales(c: Call, shape: tuple[int, ...], out: list[int]) -> tuple[float, ...] | None:
    """The factors of the spatial axes where the file tells them; None: the ratios of the sizes."""
    rank = len(shape)
    axes = [axis % rank for axis in c.get("axes") or range(rank)]
    given = c.get("scales") if c.opset < 9 else None
    which = 2 if c.opset >= 11 and c.node.op_type == "Resize" else 1
    if given is None and c.has(which) and (array := c.array(which)) is not None:
        given = array.reshape(-1).tolist()
    if given is not None and len(given) == len(axes):
        factors = dict(zip(axes, given, strict=True))
        return tuple(float(factors.get(axis, 1.0)) for axis in range(2, rank))
    policy = c.get("keep_aspect_ratio_policy", "stretch")
    wanted = c.ints(3) if c.has(3) else None
    if policy == "stretch" or wanted is None:
        return None
    ratios = [n / shape[axis] for n, axis in zip(wanted, axes, strict=True)]
    factor = min(ratios) if policy == "not_larger" else max(ratios)
    return tuple(factor if axis in axes else 1.0 for axis in range(2, rank))


@lowers("GridSample")
def _grid_sample(c: Call) -> None:
    c.emit("grid_sample", [c.value(0), c.value(1)], mode=str(c.get("mode", "linear")),
           padding_mode=str(c.get("padding_mode", "zeros")),
           align_corners=bool(c.get("align_corners", 0)))  # fmt: skip


@lowers("Trilu")
def _trilu(c: Call) -> None:
    k = c.scalar(1) if c.has(1) else 0.0
    if k is None:
        raise LookupError("the diagonal is not known")
    c.emit("triangle", [c.value(0)], upper=bool(c.get("upper", 1)), diagonal=int(k))


@lowers("TopK")
def _topk(c: Call) -> None:
    axis = int(c.get("axis", -1)) % c.rank(0)
    k = c.get("k") if c.opset < 10 else c.scalar(1)
    given = [c.value(0)] if k is not None else [c.value(0), c.value(1)]
    c.emit_all("topk", given, axis=axis, k=None if k is None else int(k),
               largest=bool(c.get("largest", 1)))  # fmt: skip


@lowers("ArgMax", "ArgMin")
def _argmax(c: Call) -> None:
    c.emit(c.node.op_type.lower(), [c.value(0)], axis=int(c.get("axis", 0)) % c.rank(0),
           keepdims=bool(c.get("keepdims", 1)),
           last=bool(c.get("select_last_index", 0)))  # fmt: skip


@lowers("OneHot")
def _one_hot(c: Call) -> None:
    depth, values = c.scalar(1), c.array(2)
    if depth is None or values is None:
        raise LookupError("the depth is not known")
    out_rank = c.rank(0) + 1
    c.emit("one_hot", [c.value(0)], depth=int(depth), axis=int(c.get("axis", -1)) % out_rank,
           on=float(values[1]), off=float(values[0]))  # fmt: skip


@lowers("Hardmax")
def _hardmax(c: Call) -> None:
    """One where the first largest element is, else zero."""
    shape, dtype = c.shape(0), c.dtype(0)
    if shape is None or c.opset < 13:
        raise LookupError("the rank is unknown, or several axes count as one")
    axis = int(c.get("axis", -1)) % len(shape)
    depth = shape[axis]
    if depth is None:
        raise LookupError("the size of the axis is unknown")
    where = (*shape[:axis], *shape[axis + 1 :])
    largest = c.temp("argmax", [c.value(0)], where, "int64", axis=axis, keepdims=False)
    c.emit("one_hot", [largest], typed=(shape, dtype), depth=depth, axis=axis)


@lowers("Col2Im")
def _fold(c: Call) -> None:
    size, kernel = c.ints(1), c.ints(2)
    if size is None or kernel is None:
        raise LookupError("the size is not known")
    n = len(size)
    c.emit("fold", [c.value(0)], size=tuple(size), kernel=tuple(kernel),
           stride=tuple(c.get("strides") or (1,) * n),
           padding=tuple(c.get("pads") or (0,) * (2 * n)),
           dilation=tuple(c.get("dilations") or (1,) * n))  # fmt: skip


@lowers("EyeLike")
def _eye_like(c: Call) -> None:
    rows, columns = c.sizes(0)
    if rows * columns > CONSTANT_ELEMENTS:
        raise LookupError("too large")
    dtype = c.outs[0][1] or c.dtype(0) or "float32"
    c.alias(0, c.constant(np.eye(rows, columns, int(c.get("k", 0)), numpy_dtype(dtype))))


@lowers("Shape")
def _shape(c: Call) -> None:
    c.emit("shape", [c.value(0)])


@lowers("Size")
def _size(c: Call) -> None:
    c.emit("size", [c.value(0)])


@lowers("Range")
def _range(c: Call) -> None:
    c.emit("range", [c.value(0), c.value(1), c.value(2)])


@lowers("ConstantOfShape")
def _constant_of_shape(c: Call) -> None:
    value = c.get("value")
    number = 0.0 if value is None else float(np.asarray(value).reshape(-1)[0])
    c.emit("full", [c.value(0)], value=number, dtype=c.outs[0][1] or "float32")


@lowers("Compress")
def _compress(c: Call) -> None:
    axis = c.get("axis")
    c.emit("compress", [c.value(0), c.value(1)],
           axis=None if axis is None else int(axis) % c.rank(0))  # fmt: skip


@lowers("Unique")
def _unique(c: Call) -> None:
    c.emit_all("unique", [c.value(0)], axis=c.get("axis"), sorted=bool(c.get("sorted", 1)))


@lowers("NonMaxSuppression")
def _nms(c: Call) -> None:
    c.emit("nms", [c.value(0), c.value(1), *(c.optional(i) for i in (2, 3, 4))],
           center=bool(c.get("center_point_box", 0)))  # fmt: skip


@lowers("ReverseSequence")
def _reverse_sequence(c: Call) -> None:
    c.emit("reverse_sequence", [c.value(0), c.value(1)], time_axis=int(c.get("time_axis", 0)),
           batch_axis=int(c.get("batch_axis", 1)))  # fmt: skip
