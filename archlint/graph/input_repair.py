"""What an exception of ``forward`` says about the input that was assumed.

A deduced input may lack a tensor, or have a size, a number of dimensions or a type that the model
does not take. Its exception tells: by the names and numbers in its message, by the line of the
model's code that raised it, by the layer it was raised in. From these follow other inputs to try.
They are guesses that the model itself judges; what is assumed in the end is told to the user.
"""

from __future__ import annotations

import ast
import linecache
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from types import FrameType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from archlint.graph.documented_inputs import Sizes
from archlint.graph.example_input import Example, Spec, attribute, names_of, parameters_of
from archlint.graph.sites import is_standard, origin_of

MOST = 32  # repaired inputs that are tried
_LARGEST = 2**26  # elements of a tensor that is suggested
Layer = Callable[[nn.Module, int], Iterator[Spec]]


def repaired(
    model: nn.Module,
    example: Example,
    problem: BaseException,
    named: Callable[[nn.Module, str], Spec | None],
    for_layer: Layer,
) -> Iterator[Example]:
    """Inputs that an exception suggests instead of ``example``, likely ones first.

    ``named`` gives the tensor for a parameter of forward, ``for_layer`` those that a layer takes.
    """
    frames = list(_frames(problem))
    text = str(problem)
    yield from _with_missing(model, example, frames, text, named)
    yield from _without_surplus(example, text)
    yield from _as_told(model, example, text)
    yield from _unpacked(model, example, frames, text)
    yield from _retyped(example, text)
    yield from _fitting(example, problem, for_layer)
    yield from _of_multiples(example, frames, text)
    yield from _with_masks(example)
    yield from _with_numbers(example, frames, text)


# --------------------------------------------------------------------------- where it was raised


def _frames(problem: BaseException) -> Iterator[tuple[FrameType, int]]:
    """The frames of the model's own code, outermost first, each with the line it was at."""
    trace = problem.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        origin = origin_of(file)
        if origin == "user" or (origin == "library" and not is_standard(file)):
            yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


@lru_cache(maxsize=8)
def _parsed(file: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):
        return None


def _statements(frame: FrameType, line: int) -> list[ast.stmt]:
    """The statements that hold a line, outermost first, from those of its function on."""
    tree = _parsed(frame.f_code.co_filename)
    found = [
        node
        for node in (ast.walk(tree) if tree is not None else ())
        if isinstance(node, ast.stmt)
        and node.lineno <= line <= (node.end_lineno or node.lineno)
        and node.lineno >= frame.f_code.co_firstlineno
    ]
    return sorted(found, key=lambda node: (node.lineno, -(node.end_lineno or 0)))


def _read(frame: FrameType, line: int) -> list[ast.expr]:
    """What a line reads: its statement, or a compound one's head; of a raise, the conditions."""
    found: list[ast.expr] = []
    statements = _statements(frame, line)
    if not statements:
        return found
    last = statements[-1]
    if isinstance(last, ast.If | ast.While):
        return [last.test]
    if isinstance(last, ast.For):
        return [last.iter]
    if isinstance(last, ast.Raise):
        return [s.test for s in reversed(statements) if isinstance(s, ast.If)]
    if isinstance(last, ast.Assert):
        return [last.test]
    return [node for node in ast.walk(last) if isinstance(node, ast.expr)][:1] if isinstance(
        last, ast.Expr | ast.Return
    ) else [v for v in (getattr(last, "value", None),) if v is not None]  # fmt: skip


# --------------------------------------------------------------------------- tensors missing


def _with_missing(
    model: nn.Module,
    example: Example,
    frames: Sequence[tuple[FrameType, int]],
    text: str,
    named: Callable[[nn.Module, str], Spec | None],
) -> Iterator[Example]:
    """With the tensors that are named in the message, or whose absence raised it."""
    given = {p.name for p in parameters_of(model)[: len(example.args)]} | example.kwargs.keys()
    free = names_of(model) - given
    for group in _absent(frames, text):
        wanted = [name for name in group if name in free]
        specs = {name: spec for name in wanted if (spec := named(model, name)) is not None}
        if "required positional" in text:  # they must be there, even if nothing says what they are
            same = next((s for s in pytree.tree_leaves(example.kwargs) if _real(s)), None)
            specs |= {name: same for name in wanted if name not in specs and same is not None}
        for name in specs:
            specs[name] = _as_long(example, name, specs[name])
        for some in [specs, *({name: spec} for name, spec in specs.items() if len(specs) > 1)]:
            if some:
                yield replace(example, kwargs={**example.kwargs, **some})


def _as_long(example: Example, name: str, spec: Spec) -> Spec:
    """A mask as long as what it masks."""
    masked = example.kwargs.get(name.removesuffix("_mask"))
    if name.endswith("_mask") and isinstance(masked, Spec) and len(spec.shape) == 2:
        return _reshaped(spec, masked.shape[:2]) or spec
    return spec


def _real(value: Any) -> bool:
    return isinstance(value, Spec) and value.dtype.is_floating_point


def _absent(frames: Sequence[tuple[FrameType, int]], text: str) -> Iterator[list[str]]:
    """Groups of names that may stand for what is missing: of the message, then frame by frame from
    the innermost outwards the variables that are None and were read."""
    yield list(dict.fromkeys(re.findall(r"[A-Za-z_]\w*", text)))
    for frame, line in reversed(frames):
        names = [node for tree in _read(frame, line) for node in ast.walk(tree)]
        flags = [n.id for n in names if isinstance(n, ast.Name)
                 and isinstance(frame.f_locals.get(n.id), bool)]  # fmt: skip
        names += [node for flag in flags for node in _assigned(frame, line, flag)]
        inner = [n.value for n in names if isinstance(n, ast.Attribute | ast.Subscript)]
        for nodes in (inner, names):  # what was looked into, then what was read at all
            found = [n.id for n in nodes if isinstance(n, ast.Name) and _is_none(frame, n.id)]
            if found:
                yield list(dict.fromkeys(found))
                break


def _assigned(frame: FrameType, line: int, name: str) -> Iterator[ast.AST]:
    """What a variable was last computed from, before a line of its function."""
    tree = _parsed(frame.f_code.co_filename)
    first = frame.f_code.co_firstlineno
    found = [
        node
        for node in (ast.walk(tree) if tree is not None else ())
        if isinstance(node, ast.Assign)
        and first < node.lineno < line
        and any(isinstance(t, ast.Name) and t.id == name for t in node.targets)
    ]
    if found:
        yield from ast.walk(max(found, key=lambda node: node.lineno).value)


def _is_none(frame: FrameType, name: str) -> bool:
    return name in frame.f_locals and frame.f_locals[name] is None


def _without_surplus(example: Example, text: str) -> Iterator[Example]:
    """Without one of the tensors that must not be given together."""
    words = set(re.findall(r"[A-Za-z_]\w*", text))
    named = [name for name in example.kwargs if name in words]
    if len(named) > 1 and re.search(r"both|same time|cannot|not be (given|provided|passed)", text):
        for name in reversed(named):
            yield replace(example, kwargs={k: v for k, v in example.kwargs.items() if k != name})


# --------------------------------------------------------------------------- shapes


def _changed(example: Example, change: Callable[[Spec], Spec | None]) -> Example | None:
    """The example with some tensors changed; None where nothing changes."""
    any_change = False

    def one(spec: Spec) -> Spec:
        nonlocal any_change
        new = change(spec)
        if new is None or (new.shape == spec.shape and new.dtype == spec.dtype):
            return spec
        any_change = True
        return new

    args, kwargs = pytree.tree_map_only(Spec, one, (example.args, dict(example.kwargs)))
    return replace(example, args=args, kwargs=kwargs) if any_change else None


def _reshaped(spec: Spec, shape: Sequence[int]) -> Spec | None:
    """A tensor in another shape. Known elements stay what they are: only ones or zeros can."""
    if math.prod(shape) > _LARGEST:
        return None
    if spec.elements is None:
        return Spec(tuple(shape), spec.dtype, spec.high)
    first = spec.elements.flatten()[:1]
    if first.numel() == 0 or not bool((spec.elements == first).all()):
        return None
    elements = torch.full(tuple(shape), first.item(), dtype=spec.dtype, device="cpu")
    return Spec(tuple(shape), spec.dtype, 1, elements)


def _specs(example: Example) -> list[Spec]:
    leaves = pytree.tree_leaves((example.args, dict(example.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, Spec)]


def _as_told(model: nn.Module, example: Example, text: str) -> Iterator[Example]:
    """In the shape that the message asks for: ``a 5D tensor of shape (batch, 2, channels, …)``."""
    sizes = Sizes(model)
    for told in re.findall(r"shape:? [(\[]([^)\]]*)[)\]]", text)[:2]:
        shape = [n for part in told.split(",") if (n := sizes.of(part)) is not None]
        if len(shape) < 2 or len(shape) != told.count(",") + 1:
            continue
        for one in _specs(example):

            def reshaped(spec: Spec, one: Spec = one, shape: list[int] = shape) -> Spec | None:
                return _reshaped(spec, shape) if spec is one else None

            changed = _changed(example, reshaped)
            if changed is not None:
                yield changed


def _unpacked(
    model: nn.Module, example: Example, frames: Sequence[tuple[FrameType, int]], text: str
) -> Iterator[Example]:
    """With as many dimensions as the names that the shape was to be unpacked into."""
    if "values to unpack" not in text or not frames:
        return
    frame, line = frames[-1]
    statements = _statements(frame, line)
    last = statements[-1] if statements else None
    if not isinstance(last, ast.Assign) or not isinstance(last.targets[0], ast.Tuple):
        return
    shapes = {
        tuple(value.shape)
        for node in ast.walk(last.value)
        if isinstance(node, ast.Name) and isinstance(value := frame.f_locals.get(node.id), Tensor)
    }
    sizes = Sizes(model)
    wanted = [sizes.of(ast.unparse(t)) for t in last.targets[0].elts]

    def named(spec: Spec) -> Spec | None:
        if spec.shape not in shapes or any(n is None for n in wanted):
            return None
        return _reshaped(spec, [n for n in wanted if n is not None])

    def longer(spec: Spec) -> Spec | None:
        more = len(wanted) - len(spec.shape)
        if spec.shape not in shapes or more <= 0:
            return None
        return _reshaped(spec, (*spec.shape[:1], *[1] * more, *spec.shape[1:]))

    missing = re.search(r"expected (\d+), got (\d+)", text)

    def nested(spec: Spec) -> Spec | None:
        """What was taken apart had lost dimensions before: such as those of several images."""
        if missing is None or len(spec.shape) < 3:
            return None
        return _reshaped(spec, (*spec.shape[:1], *[1] * (int(missing[1]) - int(missing[2])),
                                *spec.shape[1:]))  # fmt: skip

    for change in (named, longer, nested):
        found = _changed(example, change)
        if found is not None:
            yield found


_INTEGERS = re.compile(
    r"Long, Int|must be (an )?integ|integral|index tensor|must be (long|int)", re.I
)
_NUMBERS = re.compile(r"got (Long|Int) and|but found (Long|Int)|not implemented for '(Long|Int)'")


def _retyped(example: Example, text: str) -> Iterator[Example]:
    """With integers where real numbers were given, or the reverse."""

    def integers(spec: Spec) -> Spec | None:
        return Spec(spec.shape, torch.int64, 2) if spec.dtype.is_floating_point else None

    def real(spec: Spec) -> Spec | None:
        free = not spec.dtype.is_floating_point and spec.elements is None
        return Spec(spec.shape) if free else None

    change = integers if _INTEGERS.search(text) else real if _NUMBERS.search(text) else None
    if change is None:
        return
    for one in _specs(example):

        def change_one(spec: Spec, one: Spec = one) -> Spec | None:
            return change(spec) if spec is one else None

        changed = _changed(example, change_one)
        if changed is not None:
            yield changed


def _fitting(example: Example, problem: BaseException, for_layer: Layer) -> Iterator[Example]:
    """With a tensor that the layer takes that was given an input it does not take."""
    trace = problem.__traceback__
    layer: nn.Module | None = None
    given: Tensor | None = None
    while trace is not None:
        held = trace.tb_frame.f_locals
        owner = held.get("self")
        if isinstance(owner, nn.Module) and trace.tb_frame.f_code.co_name == "forward":
            names = trace.tb_frame.f_code.co_varnames[1:2]
            value = held.get(names[0]) if names else None
            layer, given = owner, value if isinstance(value, Tensor) else None
        trace = trace.tb_next
    if layer is None or given is None:
        return
    shape = tuple(given.shape)
    high = getattr(layer, "num_embeddings", 2)
    beside = [s.shape[1] for s in _specs(example) if s.shape != shape and len(s.shape) > 1]
    fits = [*_same_but_features(layer, shape, beside), *for_layer(layer, high)]
    if isinstance(layer, nn.Embedding) and given.is_floating_point():
        fits.insert(0, Spec(shape, torch.int64, high))
    for fit in fits[:4]:
        found = _changed(example, lambda spec, fit=fit: fit if spec.shape == shape else None)  # type: ignore[misc]
        if found is not None:
            yield found


def _same_but_features(
    layer: nn.Module, shape: tuple[int, ...], beside: Sequence[int]
) -> Iterator[Spec]:
    """What a layer was given, with its number of features; images as rows of patches, as many as
    the tensors ``beside`` it tell."""
    kernel = getattr(layer, "kernel_size", None)
    channels = getattr(layer, "in_channels", None)
    if isinstance(channels, int) and isinstance(kernel, tuple):
        rank = len(kernel)
        if len(shape) == rank + 2:
            yield Spec((shape[0], channels, *shape[2:]))
        elif len(shape) == rank + 1:
            yield Spec((shape[0], channels, *shape[1:]))
        elif len(shape) == 2 and shape[1] == channels * math.prod(kernel):  # patches as rows
            yield Spec((shape[0], channels, *kernel))
        return
    features = getattr(layer, "in_features", getattr(layer, "normalized_shape", None))
    if isinstance(features, int):
        features = (features,)
    if not isinstance(features, tuple) or not features:
        return
    if len(shape) == 4 and len(features) == 1:
        for rows in dict.fromkeys(beside):
            yield Spec((shape[0], rows, *features))
    if len(shape) > len(features):
        yield Spec((*shape[: -len(features)], *features))


_MULTIPLE = re.compile(r"multiple of|divisible|divide|chunks of|evenly", re.IGNORECASE)


def _of_multiples(
    example: Example, frames: Sequence[tuple[FrameType, int]], text: str
) -> Iterator[Example]:
    """With sizes that are multiples of what they have to be."""
    sizes = {n for spec in _specs(example) for n in spec.shape[1:]}
    divisors: list[int] = []
    found = _MULTIPLE.search(text)
    if found is not None:
        divisors += [int(n) for n in re.findall(r"\d+", text[found.start() :])]
    if frames and (found is not None or not text):
        frame, line = frames[-1]
        for tree in _read(frame, line):
            for node in ast.walk(tree):
                if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
                    value = _number(node.right, frame)
                    divisors += [] if value is None else [value]
    if re.search(r"[Ss]izes? .*must match|must match the size|shape mismatch", text):
        divisors += [32, 128]  # what goes down and up again meets itself at such sizes
    told = {int(n) for n in re.findall(r"\d+", text)} & sizes or sizes
    for divisor in dict.fromkeys(n for n in divisors if 1 < n <= 65536):

        def rounded(spec: Spec, divisor: int = divisor) -> Spec | None:
            first = 2 if len(spec.shape) >= 4 else 1
            tail = [n if n not in told else math.ceil(n / divisor) * divisor
                    for n in spec.shape[first:]]  # fmt: skip
            return _reshaped(spec, (*spec.shape[:first], *tail))

        changed = _changed(example, rounded)
        if changed is not None:
            yield changed


def _with_numbers(
    example: Example, frames: Sequence[tuple[FrameType, int]], text: str
) -> Iterator[Example]:
    """With a size that the message tells, in place of one that the input has."""
    numbers = [int(n) for n in re.findall(r"(?<![\w.])\d+", text.replace("x", " ")) if len(n) < 7]
    if frames:
        numbers += _compared(*frames[-1])
    specs = _specs(example)
    yield from _in_proportion(example, text)
    given = [n for n in dict.fromkeys(numbers) if any(n in s.shape[1:] for s in specs)]
    others = [n for n in dict.fromkeys(numbers) if n > 1 and n not in given]
    for old in given[:3]:
        for new in [*others[:4], *(n for n in given if n != old)]:

            def swapped(spec: Spec, old: int = old, new: int = new) -> Spec | None:
                tail = [new if n == old else n for n in spec.shape[1:]]
                return _reshaped(spec, (*spec.shape[:1], *tail))

            changed = _changed(example, swapped)
            if changed is not None:
                yield changed
    whole = {
        tuple(int(n) for n in re.findall(r"\d+", s)) for s in re.findall(r"\[([\d, ]+)\]", text)
    }
    for new in others[:2]:  # one dimension more

        def appended(spec: Spec, new: int = new) -> Spec | None:
            return _reshaped(spec, (*spec.shape, new)) if spec.shape in whole else None

        changed = _changed(example, appended)
        if changed is not None:
            yield changed


_PRODUCT = re.compile(r"\[?\d+(?:, |x)(\d+)\]?\)? (?:X|and) \[?(\d+)(?:, |x)\d+")


def _in_proportion(example: Example, text: str) -> Iterator[Example]:
    """With a last dimension such that a product of matrices fits that came to other features: what
    is made of it before, such as rows of a strided map, is in proportion to it."""
    found = _PRODUCT.search(text)
    if found is None:
        return
    given, wanted = int(found[1]), int(found[2])
    for size in dict.fromkeys(s.shape[-1] for s in _specs(example) if len(s.shape) > 2):
        if given % size or wanted % (given // size) or given == wanted:
            continue

        def scaled(spec: Spec, size: int = size) -> Spec | None:
            if len(spec.shape) < 3 or spec.shape[-1] != size:
                return None
            return _reshaped(spec, (*spec.shape[:-1], wanted * size // given))

        changed = _changed(example, scaled)
        if changed is not None:
            yield changed


def _with_masks(example: Example) -> Iterator[Example]:
    """With masks as long as what they mask, which may be along another dimension."""
    for axis in (1, -1):
        kwargs = dict(example.kwargs)
        for name, spec in example.kwargs.items():
            masked = example.kwargs.get(name.removesuffix("_mask"))
            if not name.endswith("_mask") or not isinstance(masked, Spec):
                continue
            if isinstance(spec, Spec) and len(spec.shape) == 2 and len(masked.shape) > 1:
                kwargs[name] = _reshaped(spec, (masked.shape[0], masked.shape[axis])) or spec
        if any(kwargs[name] is not example.kwargs[name] for name in kwargs):
            yield replace(example, kwargs=kwargs)


def _compared(frame: FrameType, line: int) -> list[int]:
    """The numbers that the condition compared that was not met."""
    found: list[int] = []
    for tree in _read(frame, line):
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare):
                for side in (node.left, *node.comparators):
                    value = _number(side, frame)
                    found += [] if value is None else [value]
    return found


def _number(tree: ast.expr, frame: FrameType) -> int | None:
    """What an expression of names, attributes and indices is, where that is an integer."""
    value = _value(tree, frame)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _value(tree: ast.expr, frame: FrameType) -> Any:
    match tree:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return frame.f_locals.get(name)
        case ast.Attribute(value=inner, attr=name):
            owner = _value(inner, frame)
            if isinstance(owner, Tensor) and name != "shape":
                return None
            return attribute(owner, name)
        case ast.Subscript(value=inner, slice=index):
            owner, at = _value(inner, frame), _value(index, frame)
            if isinstance(owner, tuple | list) and isinstance(at, int) and -len(owner) <= at:
                return owner[at] if at < len(owner) else None
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            value = _value(inner, frame)
            return -value if isinstance(value, int) else None
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            a, b = _value(left, frame), _value(right, frame)
            return a * b if isinstance(a, int) and isinstance(b, int) else None
    return None
