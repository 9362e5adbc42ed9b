"""Normalisation spelled by arithmetic, and the learned scale and shift that follow it.

The kernel is a quantity divided by the root of its own mean square over some axes. With the mean
taken out first it is a LayerNorm (or, by its axes, an InstanceNorm or a BatchNorm on batch
statistics); without, an RMSNorm. Scale and shift are taken in one at a time when the next node in
execution order turns out to be one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from archlint.graph.model import AttributeValue, Node
from archlint.graph.patterns.engine import LARGE, Found, New, Rewriter, close, pattern

# --------------------------------------------------------------------------- statistics


def _kept(graph: Rewriter, value: str | None, *ops: str) -> tuple[Node, tuple[int, ...]] | None:
    """(reduction, axes) where a value is a reduction with its axes kept as ones, be it by
    ``keepdims`` or by a reshape or an expansion that comes after."""
    node = graph.producer(value)
    for _ in range(3):
        if node is None or node.op not in ("reshape", "expand"):
            break
        node = graph.producer(node.inputs[0])
    if node is None or node.op not in ops:
        return None
    axes = graph.axes(node)
    inner, outer = graph.shape(node.inputs[0]), graph.shape(value)
    if inner is None or outer is None:
        return (node, axes) if graph.attribute(node, "keepdims") else None
    ones = tuple(1 if i in axes else n for i, n in enumerate(inner))
    # equal, or the ones expanded to the input's sizes
    if len(outer) == len(inner) and all(
        o == k or (k == 1 and o == n) for o, k, n in zip(outer, ones, inner, strict=True)
    ):
        return node, axes
    return None


def _squared(graph: Rewriter, value: str | None) -> str | None:
    """t where the value is t²."""
    node = graph.made_by(value, "square", "pow", "mul")
    if node is None or node.inputs[0] is None:
        return None
    if node.op == "pow" and graph.scalar(node.inputs[1]) != 2.0:
        return None
    if node.op == "mul" and not graph.same(node.inputs[0], node.inputs[1]):
        return None
    t = node.inputs[0]
    inner = graph.made_by(t, "abs")
    return inner.inputs[0] if inner is not None else t


def _centred(graph: Rewriter, value: str | None) -> tuple[str, tuple[int, ...], Node] | None:
    """(x, axes, subtraction) where the value is x minus its mean over axes."""
    node = graph.made_by(value, "sub")
    if node is None or node.inputs[0] is None:
        return None
    mean = _kept(graph, node.inputs[1], "reduce_mean")
    if mean is None or not graph.same(mean[0].inputs[0], node.inputs[0]):
        return None
    return node.inputs[0], mean[1], node


@dataclass(frozen=True, slots=True)
class _Spread:
    """A mean square over axes: of ``of`` itself, or of ``of`` minus its mean."""

    of: str
    axes: tuple[int, ...]
    centred: bool
    factor: float
    parts: tuple[Node, ...]


def _mean_square(graph: Rewriter, value: str | None) -> _Spread | str:
    """The value as a variance or a mean square."""
    factor, outer = 1.0, value
    for _ in range(4):
        node = graph.producer(value)
        if node is None:
            return "the statistic is an input"
        # relu and abs guard a difference of moments against rounding
        if node.op in ("relu", "abs") or (
            node.op == "reshape" and graph.made_by(node.inputs[0], "relu", "abs", "sub")
        ):
            value = node.inputs[0]
        elif (scaled := graph.times(node)) is not None and node.op != "neg":
            value, factor = scaled[0], factor * scaled[1]
        else:
            break
    if (found := _kept(graph, value, "reduce_var")) is not None and found[0].inputs[0] is not None:
        node, axes = found
        count = _count(graph, node.inputs[0], axes)
        correction = int(graph.attribute(node, "correction"))
        if correction:
            if count is None or count <= correction:
                return "the number of elements is not known"
            factor *= count / (count - correction)
        return _Spread(node.inputs[0] or "", axes, True, factor, (node,))
    if (found := _kept(graph, value, "reduce_mean", "reduce_sum")) is not None:
        node, axes = found
        t = _squared(graph, node.inputs[0])
        if t is None:
            return "the statistic is not a mean of squares"
        if node.op == "reduce_sum":
            count = _count(graph, node.inputs[0], axes)
            if count is None:
                return "the number of elements is not known"
            factor *= count
        centred = _centred(graph, t)
        if centred is not None and centred[1] == axes:
            return _Spread(centred[0], axes, True, factor, (node, centred[2]))
        return _Spread(t, axes, False, factor, (node,))
    difference = graph.made_by(value, "sub")
    if difference is not None:  # E x² − (E x)²
        raw = graph.made_by(difference.inputs[0], "reduce_mean")
        mean = graph.made_by(_squared(graph, difference.inputs[1]), "reduce_mean")
        x = _squared(graph, raw.inputs[0]) if raw is not None else None
        if raw is not None and mean is not None and graph.same(x, mean.inputs[0]):
            axes, shape = graph.axes(raw), graph.shape(x)
            ones = tuple(1 if i in axes else n for i, n in enumerate(shape or ()))
            # the axes may be put back as ones only after the subtraction
            if axes == graph.axes(mean) and shape is not None and graph.shape(outer) == ones:
                return _Spread(x or "", axes, True, factor, (difference, raw, mean))
    return "the statistic is neither a variance nor a mean square"


def _count(graph: Rewriter, value: str | None, axes: tuple[int, ...]) -> int | None:
    """How many elements a reduction over axes takes in."""
    shape = graph.shape(value)
    product = 1
    for axis in axes:
        n = shape[axis] if shape is not None and axis < len(shape) else None
        if n is None:
            return None
        product *= n
    return product


# --------------------------------------------------------------------------- the kernel


@dataclass(frozen=True, slots=True)
class _Kernel:
    """numerator / (√(statistic + eps) + outer), times ``scale`` where one was multiplied in."""

    numerator: str
    spread: _Spread
    eps: float
    outer: float
    scale: str | None
    parts: tuple[Node, ...]


def _root(graph: Rewriter, value: str | None) -> tuple[str, Node] | None:
    """(w, node) where the value is √w."""
    node = graph.made_by(value, "sqrt", "pow")
    if node is None or node.inputs[0] is None:
        return None
    if node.op == "pow" and graph.scalar(node.inputs[1]) != 0.5:
        return None
    return node.inputs[0], node


def _inverse_root(graph: Rewriter, value: str | None) -> tuple[str, float, Node] | None:
    """(w, outer, node) where the value is 1/(√w + outer)."""
    node = graph.made_by(value, "rsqrt", "reciprocal", "pow", "div")
    if node is None or node.inputs[0] is None:
        return None
    if node.op == "rsqrt":
        return node.inputs[0], 0.0, node
    if node.op == "pow":
        return (node.inputs[0], 0.0, node) if graph.scalar(node.inputs[1]) == -0.5 else None
    below = node.inputs[0]
    if node.op == "div":
        if graph.scalar(node.inputs[0]) != 1.0 or node.inputs[1] is None:
            return None
        below = node.inputs[1]
    return _root_plus(graph, below)


def _root_plus(graph: Rewriter, value: str) -> tuple[str, float, Node] | None:
    """(w, outer, node) where the value is √w + outer."""
    if (root := _root(graph, value)) is not None:
        return root[0], 0.0, root[1]
    total = graph.made_by(value, "add")
    shifted = graph.plus(total) if total is not None else None
    if shifted is None or shifted[2] < 0.0:
        return None
    if (root := _root(graph, shifted[0])) is not None:
        return root[0], shifted[2], root[1]
    return None


def _statistic(graph: Rewriter, value: str) -> tuple[_Spread, float] | str:
    """(mean square, eps) where the value is mean square + eps."""
    node = graph.made_by(value, "add")
    if node is not None and (shifted := graph.plus(node)) is not None:
        spread = _mean_square(graph, shifted[0])
        return spread if isinstance(spread, str) else (spread, shifted[2])
    spread = _mean_square(graph, value)
    return spread if isinstance(spread, str) else (spread, 0.0)


def _deviation(graph: Rewriter, value: str) -> tuple[_Spread, float, float, Node] | None:
    """(variance, eps, outer, node) where the value is the standard deviation of a reduction,
    plus an outer eps."""
    outer = 0.0
    total = graph.made_by(value, "add")
    if total is not None and (shifted := graph.plus(total)) is not None and shifted[2] >= 0.0:
        value, outer = shifted[0], shifted[2]
    found = _kept(graph, value, "reduce_std")
    if found is None or found[0].inputs[0] is None:
        return None
    node, axes = found
    correction, factor = int(graph.attribute(node, "correction")), 1.0
    if correction:
        count = _count(graph, node.inputs[0], axes)
        if count is None or count <= correction:
            return None
        factor = count / (count - correction)
    return _Spread(node.inputs[0] or "", axes, True, factor, (node,)), 0.0, outer, node


def _kernel(graph: Rewriter, node: Node) -> _Kernel | str:
    """The node as numerator / root, or numerator · inverse root (· scale)."""
    reason = "no factor is the inverse root of a statistic"
    if node.op == "div":
        numerator, below = node.inputs[:2]
        if numerator is None or below is None:
            return "lacks an operand"
        if (deviation := _deviation(graph, below)) is not None:
            spread, eps, outer, part = deviation
            return _Kernel(numerator, spread, eps, outer, None, (*spread.parts, part))
        root = _root_plus(graph, below)
        if root is None:
            return reason
        statistic = _statistic(graph, root[0])
        if isinstance(statistic, str):
            return statistic
        parts = (*statistic[0].parts, root[2])
        return _Kernel(numerator, statistic[0], statistic[1], root[1], None, parts)
    for numerator, inverse in graph.operands(node):
        scale: str | None = None
        found = _inverse_root(graph, inverse)
        if found is None and (product := graph.made_by(inverse, "mul")) is not None:
            for a, b in graph.operands(product):
                if _is_learned(graph, b) and (inner := _inverse_root(graph, a)) is not None:
                    found, scale = inner, b
                    break
        if found is None:
            continue
        statistic = _statistic(graph, found[0])
        if isinstance(statistic, str):
            reason = statistic
            continue
        parts = (*statistic[0].parts, found[2])
        return _Kernel(numerator, statistic[0], statistic[1], found[1], scale, parts)
    return reason


def _is_learned(graph: Rewriter, value: str | None) -> bool:
    """Whether a value may be a learned scale or shift: a parameter, or a constant array."""
    return graph.parameter(value) is not None or (
        graph.constant(value) is not None and graph.scalar(value) is None
    )


@pattern("div", "mul")
def standardised(graph: Rewriter, node: Node) -> Found | str:
    """(x − mean)/√(variance + eps), x/√(mean square + eps), and their unbiased relatives."""
    kernel = _kernel(graph, node)
    if isinstance(kernel, str):
        return kernel
    spread, x = kernel.spread, kernel.numerator
    centred = _centred(graph, x)
    parts = kernel.parts
    if centred is not None and centred[1] == spread.axes and graph.same(centred[0], spread.of):
        if not spread.centred:
            return "the mean is taken out of the numerator but not of the statistic"
        x, parts = centred[0], (centred[2], *parts)
    elif spread.centred or not graph.same(x, spread.of):
        return "numerator and statistic are of different values"
    if graph.shape(x) != graph.shape(node.output):
        return "the operands broadcast"
    shape = graph.shape(x)
    if shape is None:
        return "the rank is not known"
    if not spread.centred and (
        graph.parameter(x) is not None
        or (
            kernel.eps == kernel.outer == 0.0
            and len(spread.axes) == 1
            and spread.factor == _count(graph, x, spread.axes)
        )
    ):
        return "a vector divided by its length"
    return _normalised(graph, node, kernel, x, shape, parts)


def _normalised(
    graph: Rewriter,
    node: Node,
    kernel: _Kernel,
    x: str,
    shape: tuple[int | None, ...],
    parts: tuple[Node, ...],
) -> Found | str:
    """The canonical op for a kernel over its axes."""
    spread = kernel.spread
    axes, rank, factor = spread.axes, len(shape), spread.factor
    count = _count(graph, x, axes)
    attributes: dict[str, AttributeValue]
    if kernel.outer != 0.0 or not close(factor, 1.0):
        unbiased = count is not None and count > 1 and close(factor, count / (count - 1))
        if spread.centred and (unbiased or close(factor, 1.0)):
            if kernel.scale is not None:
                return "a scale inside an unusual standardisation"
            attributes = {"axes": axes, "eps": kernel.eps, "unbiased": not close(factor, 1.0)}
            if kernel.outer:
                attributes["outer_eps"] = kernel.outer
            return Found(New("standardise", (x,), attributes), parts)
        if kernel.outer != 0.0 or factor <= 0.0 or kernel.scale is not None:
            return "no normalisation of the vocabulary"
        # x/√(c·v + eps) = c^(−1/2) · x/√(v + eps/c)
        op = "layer_norm" if spread.centred else "rms_norm"
        inner = New(
            op, (x,), {"axes": axes, "eps": kernel.eps / factor}, shape, graph.dtype(node.output)
        )
        number = graph.number(1.0 / math.sqrt(factor), graph.dtype(node.output))
        return Found(New("mul", (inner, number)), parts)
    attributes = {"axes": axes, "eps": kernel.eps}
    trailing = axes == tuple(range(rank - len(axes), rank))
    if not spread.centred:
        op = "rms_norm"
    elif graph.parameter(x) is not None:  # weight standardisation
        op = "standardise"
    elif rank >= 4 and axes == tuple(range(2, rank)):
        op, attributes = "instance_norm", {"eps": kernel.eps}
    elif rank >= 2 and axes == (0, *range(2, rank)) and graph.graph.mode == "train":
        op, attributes = "batch_norm", {"eps": kernel.eps, "training": True}
    else:
        op = "layer_norm"
    if kernel.scale is None:
        return Found(New(op, (x,), attributes), parts)
    if op in ("layer_norm", "rms_norm") and trailing:
        scale = _affine(graph, kernel.scale, shape, axes)
        if not isinstance(scale, Refusal):
            return Found(New(op, (x, scale), attributes), parts)
    plain = New(op, (x,), attributes, shape, graph.dtype(node.output))
    return Found(New("mul", (plain, kernel.scale)), parts)


# --------------------------------------------------------------------------- scale and shift


class Refusal(str):
    """Why a value cannot be taken in as a scale or shift."""


def _affine(
    graph: Rewriter, value: str, shape: tuple[int | None, ...], axes: tuple[int, ...]
) -> str | Refusal:
    """The value, re-declared without broadcasting dimensions, as a scale over the trailing axes
    of a tensor of this shape; or why it is none."""
    wanted = tuple(shape[axis] for axis in axes)
    if not _is_learned(graph, value) and graph.scalar(value) is None:
        return Refusal("the factor is computed")
    held = graph.shape(value)
    if held is None or None in wanted or len(held) > len(shape):
        return Refusal("a shape is not known")
    if tuple(held[max(len(held) - len(wanted), 0) :]) != wanted or any(
        n != 1 for n in held[: max(len(held) - len(wanted), 0)]
    ):
        return Refusal("the factor is not over the normalised axes")
    declared = graph.declare(value, tuple(n for n in wanted if n is not None))
    return declared if declared is not None else Refusal("the parameter has other readers")


def _per_channel(graph: Rewriter, value: str, shape: tuple[int | None, ...]) -> str | Refusal:
    """The value, re-declared as one number a channel, for a tensor [sample, channel, …]."""
    if not _is_learned(graph, value):
        return Refusal("the factor is computed")
    held, rank = graph.shape(value), len(shape)
    channels = shape[1] if rank > 1 else None
    if held is None or channels is None or len(held) > rank:
        return Refusal("a shape is not known")
    if (1,) * (rank - len(held)) + tuple(held) != (1, channels, *(1,) * (rank - 2)):
        return Refusal("the factor is not one number a channel")
    declared = graph.declare(value, (channels,))
    return declared if declared is not None else Refusal("the parameter has other readers")


_NORMS = ("layer_norm", "rms_norm", "group_norm", "instance_norm", "batch_norm")


def _take_in(graph: Rewriter, node: Node, slot: int) -> Found | str:
    """The norm before a multiplication (slot 1) or addition (slot 2), with it as scale or shift."""
    reason = "no operand is a norm"
    for normed, value in graph.operands(node):
        norm = graph.producer(normed)
        if norm is None or norm.op not in _NORMS or (norm.op == "rms_norm" and slot == 2):
            continue
        inputs = (*norm.inputs, None, None, None)[: max(len(norm.inputs), slot + 1)]
        if inputs[slot] is not None or (slot == 1 and inputs[2:3] not in ((), (None,))):
            reason = "the norm has its scale or shift already"
            continue
        if graph.uses(norm.output) != 1 or graph.uses(normed) != 1:
            reason = "the plain norm has other readers"
            continue
        shape = graph.shape(normed)
        if shape is None or graph.shape(node.output) != shape:
            reason = "the operands broadcast"
            continue
        if norm.op in ("layer_norm", "rms_norm"):
            axes = graph.axes(norm)
            if axes != tuple(range(len(shape) - len(axes), len(shape))):
                reason = "the axes are not the last ones"
                continue
            taken = _affine(graph, value, shape, axes)
        else:
            taken = _per_channel(graph, value, shape)
        if isinstance(taken, Refusal):
            reason = taken
            continue
        full = [*inputs]
        full[slot] = taken
        if graph.dtype(norm.inputs[0]) != graph.dtype(node.output):
            full[0] = _unrounded(graph, norm, node)
        return Found(New(norm.op, tuple(full), norm.attributes), (norm,))
    return reason


def _unrounded(graph: Rewriter, norm: Node, node: Node) -> str | None:
    """The norm's input in the precision of the result, where the norm alone was computed in a
    higher one."""
    before = graph.maker(norm.inputs[0])
    if (
        before is not None
        and before.op == "cast"
        and graph.dtype(before.inputs[0]) == graph.dtype(node.output)
    ):
        return before.inputs[0]
    return norm.inputs[0]


@pattern("mul")
def scale(graph: Rewriter, node: Node) -> Found | str:
    """norm(x)·γ."""
    return _take_in(graph, node, 1)


@pattern("add")
def shift(graph: Rewriter, node: Node) -> Found | str:
    """norm(x)·γ + β."""
    return _take_in(graph, node, 2)


@pattern("add", "sub")
def unfolded_affine(graph: Rewriter, node: Node) -> Found | str:
    """x·r + (β − mean·r) with r = γ/√(variance + eps), as TensorFlow and Keras write it."""
    reason = "no sum of x·r and β − mean·r"
    for a, b in graph.operands(node):
        product = graph.made_by(a, "mul")
        rest = graph.made_by(b, "sub") if node.op == "add" else graph.made_by(b, "mul")
        if product is None or rest is None:
            continue
        beta = rest.inputs[0] if node.op == "add" else None
        if node.op == "add" and not (_is_learned(graph, beta) or graph.scalar(beta) is not None):
            continue
        correction = graph.made_by(rest.inputs[1], "mul") if node.op == "add" else rest
        if correction is None:
            continue
        for x, r in graph.operands(product):
            for m, other in graph.operands(correction):
                mean = _kept(graph, m, "reduce_mean")
                if mean is None or not graph.same(r, other) or not graph.same(mean[0].inputs[0], x):
                    continue
                found = _tensorflow(graph, node, product, x, mean[1], beta)
                if isinstance(found, Found):
                    return found
                reason = found
    return reason


def _tensorflow(
    graph: Rewriter, node: Node, product: Node, x: str, axes: tuple[int, ...], beta: str | None
) -> Found | str:
    kernel = _kernel(graph, product)
    shape = graph.shape(x)
    if isinstance(kernel, str):
        return kernel
    spread = kernel.spread
    if shape is None or shape != graph.shape(node.output):
        return "the rank is not known, or the operands broadcast"
    if not (spread.centred and spread.axes == axes and graph.same(spread.of, x)):
        return "mean and variance are of different values"
    if kernel.outer != 0.0 or not close(spread.factor, 1.0):
        return "the variance is scaled"
    if axes != tuple(range(len(shape) - len(axes), len(shape))):
        return "the axes are not the last ones"
    inputs: list[str | None] = [x]
    for value in (kernel.scale, beta):
        if value is None:
            inputs.append(None)
            continue
        taken = _affine(graph, value, shape, axes)
        if isinstance(taken, Refusal):
            return str(taken)
        inputs.append(taken)
    while inputs[-1] is None:
        inputs.pop()
    attributes: dict[str, AttributeValue] = {"axes": axes, "eps": kernel.eps}
    return Found(New("layer_norm", tuple(inputs), attributes), (product, *kernel.parts))


# --------------------------------------------------------------------------- group norm


@pattern("reshape")
def group_norm(graph: Rewriter, node: Node) -> Found | str:
    """Channels folded into groups, normalised over the rest, unfolded."""
    norm = graph.made_by(node.inputs[0], "instance_norm", "layer_norm")
    if norm is None:
        return "what is reshaped is not normalised"
    fold = graph.made_by(norm.inputs[0], "reshape")
    if fold is None or fold.inputs[0] is None:
        return "the norm is not of a reshaped value"
    x = fold.inputs[0]
    shape, folded = graph.shape(x), graph.shape(norm.inputs[0])
    if shape is None or folded is None or graph.shape(node.output) != shape or len(shape) < 2:
        return "the shapes before and after differ, or are unknown"
    if len(folded) < 3 or None in folded[1:] or None in shape[1:] or folded[0] != shape[0]:
        return "the fold is not [sample, group, …]"
    groups, channels = folded[1], shape[1]
    if not groups or not channels or channels % groups:
        return "the groups do not divide the channels"
    if norm.op == "layer_norm" and graph.axes(norm) != tuple(range(2, len(folded))):
        return "not normalised over all but sample and group"
    numbers = (1.0, 0.0)
    for value, number in zip(norm.inputs[1:3], numbers, strict=False):
        if value is not None and not graph.filled_with(value, number):
            return "scale or shift are learned by group"
    attributes: dict[str, AttributeValue] = {
        "groups": groups,
        "eps": float(graph.attribute(norm, "eps")),
    }
    return Found(New("group_norm", (x,), attributes), (fold, norm))


# --------------------------------------------------------------------------- Lp normalisation


@pattern("div", "mul")
def lp_normalize(graph: Rewriter, node: Node) -> Found | str:
    """x/max(‖x‖, eps) along one axis."""
    x, below = node.inputs[:2]
    if x is None or below is None:
        return "lacks an operand"
    if node.op == "mul":
        for a, b in graph.operands(node):
            inverse = graph.made_by(b, "reciprocal")
            if inverse is not None and inverse.inputs[0] is not None:
                x, below = a, inverse.inputs[0]
                break
        else:
            return "no factor is a reciprocal"
    norm, eps = _norm(graph, below)
    if norm is None:
        return "not divided by a norm"
    of, axes, p, part = norm
    if not graph.same(of, x):
        return "the norm is of another value"
    if len(axes) != 1:
        return "the norm is over several axes"
    if graph.shape(x) != graph.shape(node.output):
        return "the operands broadcast"
    return Found(New("lp_normalize", (x,), {"p": p, "axis": axes[0], "eps": eps}), (part,))


def _norm(
    graph: Rewriter, value: str
) -> tuple[tuple[str, tuple[int, ...], float, Node] | None, float]:
    """((x, axes, p, node), eps) where the value is max(‖x‖_p, eps) with its axes kept."""
    eps = 0.0
    bound = graph.producer(value)
    if bound is not None and bound.op == "expand":
        value = bound.inputs[0] or ""
        bound = graph.producer(value)
    if bound is not None and bound.op == "hardtanh":  # a clip that was lowered to one
        if float(graph.attribute(bound, "maximum")) < LARGE:
            return None, 0.0
        value, eps = bound.inputs[0] or "", float(graph.attribute(bound, "minimum"))
    elif bound is not None and bound.op in ("clip", "maximum"):
        for a, b in [(bound.inputs[0], bound.inputs[1]), (bound.inputs[1], bound.inputs[0])]:
            number = graph.scalar(b)
            if a is not None and number is not None and number >= 0.0:
                value, eps = a, number
                break
        if bound.op == "clip" and len(bound.inputs) > 2 and bound.inputs[2] is not None:
            return None, 0.0
    found = _kept(graph, value, "reduce_l2", "reduce_l1")
    if found is not None and found[0].inputs[0] is not None:
        p = 2.0 if found[0].op == "reduce_l2" else 1.0
        return (found[0].inputs[0], found[1], p, found[0]), eps
    root = _root(graph, value)
    total = _kept(graph, root[0], "reduce_sum") if root is not None else None
    square = _squared(graph, total[0].inputs[0]) if total is not None else None
    if total is None or square is None:
        return None, 0.0
    return (square, total[1], 2.0, total[0]), eps


@pattern("mul", "div")
def weight_norm(graph: Rewriter, node: Node) -> Found | str:
    """g·v/‖v‖ of a parameter v, with the norm over all axes but one, or over all."""
    reason = "no norm of a parameter"
    for v, g, norm in _weight_norms(graph, node):
        parameter = graph.parameter(v)
        found, eps = _norm(graph, norm)
        if parameter is None or found is None or eps != 0.0:
            continue
        of, axes, p, part = found
        rank = len(parameter.shape)
        left = [axis for axis in range(rank) if axis not in axes]
        if not graph.same(of, v) or p != 2.0 or len(left) > 1:
            reason = "the norm is of another value, or leaves more than one axis"
            continue
        if graph.parameter(g) is None or graph.shape(node.output) != parameter.shape:
            reason = "the gain is no parameter"
            continue
        axis = left[0] if left else None
        return Found(New("weight_norm", (v, g), {"axis": axis}), (part,))
    return reason


def _weight_norms(graph: Rewriter, node: Node) -> list[tuple[str, str, str]]:
    """The ways to read a node as (v, g, norm) of g·v/norm."""
    found: list[tuple[str, str, str]] = []
    if node.op == "div":
        product = graph.made_by(node.inputs[0], "mul")
        if product is not None and node.inputs[1] is not None:
            found += [(a, b, node.inputs[1]) for a, b in graph.operands(product)]
        return found
    for a, b in graph.operands(node):
        quotient = graph.made_by(b, "div")
        if quotient is None or quotient.inputs[0] is None or quotient.inputs[1] is None:
            continue
        found += [(a, quotient.inputs[0], quotient.inputs[1])]
        found += [(quotient.inputs[0], a, quotient.inputs[1])]
    return found


@pattern("mul")
def weight_norm_by_axis(graph: Rewriter, node: Node) -> Found | str:
    """g·(v/‖v‖) where the quotient was already recognised."""
    for normed, g in graph.operands(node):
        quotient = graph.made_by(normed, "lp_normalize")
        if quotient is None or graph.parameter(g) is None or quotient.inputs[0] is None:
            continue
        parameter = graph.parameter(quotient.inputs[0])
        if parameter is None or len(parameter.shape) != 2:
            continue
        if graph.attribute(quotient, "p") != 2.0 or graph.shape(node.output) != parameter.shape:
            continue
        axis = 1 - int(graph.attribute(quotient, "axis"))
        return Found(New("weight_norm", (quotient.inputs[0], g), {"axis": axis}), (quotient,))
    return "no normalised parameter times a parameter"
