"""What calls give on meta, each kind of call worked out once.

On meta a result follows from the arguments' shapes, strides and types alone, and most models
repeat their blocks. Results are remembered by what a call was given; what is new tensors is made
anew from shape, strides and type. A few frequent operators, whose shape functions in torch are
whole decompositions in Python, are told from their arguments at once, where these lie in memory in
row-major order and fit one another; whatever does not goes to torch, with torch's own errors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor, nn

from archlint.graph.torch_recorder.names import name_of

Spec = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
_NUMBERS = (int, float, bool, str, type(None))
_WORDS = (torch.dtype, torch.device, torch.memory_format, torch.layout, type(...))
_FLOATS = frozenset((torch.float32, torch.float64, torch.float16, torch.bfloat16))
_COMPLEX = frozenset((torch.complex32, torch.complex64, torch.complex128))
_PLAIN = (Tensor, nn.Parameter)


class _Unfit(Exception):
    """A call whose arguments do not say all."""


class Results:
    """The results of calls on meta. ``modes`` dispatch modes are the caller's own and are passed
    by: none where it is called by one."""

    def __init__(self, modes: int) -> None:
        self._modes = modes
        self._plans: dict[Any, Any] = {}

    def of(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What ``func(*args, **kwargs)`` gives; all tensors are on meta."""
        if (
            torch._C._len_torch_dispatch_stack() > self._modes
            or (self._modes and torch.is_grad_enabled())
            or torch._C._is_any_autocast_enabled()
            or torch.is_inference_mode_enabled()
        ):  # what else the result depends on
            return func(*args, **kwargs)
        tensors: list[Tensor] = []
        try:
            key = (
                func,
                _key(args, tensors),
                _key(kwargs, tensors) if kwargs else None,
                torch.get_default_dtype(),
            )
            plan = self._plans.get(key)
        except (_Unfit, TypeError):
            return func(*args, **kwargs)
        with torch._C._DisableTorchDispatch():  # no tensor here has one of its own
            if plan is not None:
                return _carried_out(plan, tensors)
            _refuse_mixed(func, tensors)
            spec = _told(func, args, kwargs, tensors)
            if spec is not None:
                self._plans[key] = spec
                return _carried_out(spec, tensors)
            before = [_spec(t) for t in tensors]
            result = func(*args, **kwargs)
            if all(_spec(t) == s for t, s in zip(tensors, before, strict=True)):
                plan = _plan_of(result, tensors)
                if plan is not None:
                    self._plans[key] = plan
            return result


_PRODUCTS = frozenset(
    [
        "linear",
        "matmul",
        "mm",
        "addmm",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
    ]
)


def _refuse_mixed(func: Callable[..., Any], tensors: list[Tensor]) -> None:
    """Raise as kernels do where factors differ in precision, which shape functions let pass."""
    kinds = {t.dtype for t in tensors}
    if len(kinds) > 1 and kinds <= _FLOATS and name_of(func).name in _PRODUCTS:
        names = " and ".join(sorted(str(k).removeprefix("torch.") for k in kinds))
        raise RuntimeError(f"expected factors to have the same dtype, but got {names}")


def tensors_of(args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors among a call's arguments, in order."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif type(value) is tuple or type(value) is list:
            found += tensors_of(value, None)
        elif not isinstance(value, _SCALARS):
            found += [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
    return found


def mapped(args: Any, kwargs: Any, function: Callable[[Tensor], Any]) -> tuple[Any, Any]:
    """A call's arguments with every tensor exchanged."""

    def of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return function(value)
        if type(value) is tuple or type(value) is list:
            return type(value)([of(part) for part in value])
        if isinstance(value, _SCALARS):
            return value
        return pytree.tree_map_only(Tensor, function, value)

    return tuple([of(a) for a in args]), {k: of(v) for k, v in kwargs.items()}


_SCALARS = (*_NUMBERS, *_WORDS, torch.Size, slice)


def _spec(tensor: Tensor) -> Spec:
    return (tensor.shape, tensor.stride(), tensor.dtype)


def _key(tree: Any, tensors: list[Tensor]) -> Any:
    """What a result may depend on, hashable; the tensors are gathered in order."""
    kind = type(tree)
    if kind in _PLAIN:
        dtype = tree.dtype
        if tree.layout is not torch.strided or dtype in _COMPLEX or not tree.is_meta:
            raise _Unfit
        for i, before in enumerate(tensors):
            if before is tree:  # which argument is handed back depends on which are the same
                return i
        tensors.append(tree)
        return (tree.shape, tree.stride(), dtype)
    if kind is tuple or kind is list or kind is torch.Size:
        return (kind, *[_key(part, tensors) for part in tree])
    if kind in _NUMBERS:
        return (kind, tree)
    if kind is dict:
        return (kind, *[(name, _key(part, tensors)) for name, part in tree.items()])
    if kind is slice:
        return (kind, *[_key(part, tensors) for part in (tree.start, tree.stop, tree.step)])
    if kind in _WORDS:
        return tree
    raise _Unfit


def _plan_of(result: Any, tensors: list[Tensor]) -> Any:
    """How to make a result again: the number of an argument, the form of a new tensor, or several
    of them; None for views and for what is no tensor."""
    for i, tensor in enumerate(tensors):
        if tensor is result:
            return i
    kind = type(result)
    if kind is Tensor:
        if not result.is_meta or result.layout is not torch.strided:
            return None
        if result.dtype in _COMPLEX or result.storage_offset() or result._is_view():
            return None
        storage = result.untyped_storage()._cdata
        if any(t.untyped_storage()._cdata == storage for t in tensors):
            return None
        return _spec(result)
    if kind is tuple or kind is list:
        plans = [_plan_of(part, tensors) for part in result]
        if any(type(plan) is not tuple or plan[0] in (tuple, list) for plan in plans):
            return None
        storages = {part.untyped_storage()._cdata for part in result}
        return (kind, plans) if len(storages) == len(plans) else None
    return None


def _carried_out(plan: Any, tensors: list[Tensor]) -> Any:
    if type(plan) is int:
        return tensors[plan]
    if plan[0] is tuple or plan[0] is list:
        return plan[0](_carried_out(part, tensors) for part in plan[1])
    return torch.empty_strided(plan[0], plan[1], dtype=plan[2], device="meta")


# --------------------------------------------------------------------------- told at once


def _told(
    func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], tensors: list[Tensor]
) -> Spec | int | None:
    """The result's form where one of the rules below tells it, or which argument it is."""
    rule = _FUNCTIONS.get(func)
    if rule is None:
        name = name_of(func)
        rule = None if name.in_place else _RULES.get(name.name)
    if rule is None or not tensors or not args or type(args[0]) not in (*_PLAIN, int, float):
        return None
    dtype = tensors[0].dtype
    if dtype not in _FLOATS:
        return None
    for tensor in tensors:
        if tensor.dtype is not dtype or not tensor.numel() or not _is_row_major(tensor):
            return None
    shape = rule(args, kwargs)
    if shape is None or isinstance(shape, int):
        return shape
    return shape, _row_major(shape), dtype


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = []
    step = 1
    for n in reversed(shape):
        strides.append(step)
        step *= n
    return tuple(reversed(strides))


def _is_row_major(tensor: Tensor) -> bool:
    return tensor.stride() == _row_major(tensor.shape)


Shape = tuple[int, ...]
Rule = Callable[[Any, Mapping[str, Any]], "Shape | int | None"]  # a shape, or which argument


def _same(args: Any, kwargs: Mapping[str, Any]) -> Shape | None:
    """An elementwise function of one tensor."""
    return None if kwargs or len(args) > 1 else tuple(args[0].shape)


def _activation(*names: str) -> Rule:
    """The same with numbers by name, as a new tensor or in the place of the given one."""
    known = frozenset(("inplace", *names))

    def rule(args: Any, kwargs: Mapping[str, Any]) -> Shape | int | None:
        in_place = kwargs.get("inplace", False)
        numbers = [v for k, v in kwargs.items() if k != "inplace"]
        if len(args) > 1 or type(in_place) is not bool or kwargs.keys() - known:
            return None
        if any(type(v) not in (int, float) for v in numbers) or numbers != sorted(numbers):
            return None  # a lower bound above the upper one is refused
        return 0 if in_place else tuple(args[0].shape)

    return rule


def _gelu(args: Any, kwargs: Mapping[str, Any]) -> Shape | None:
    known = kwargs.keys() <= {"approximate"} and kwargs.get("approximate") in (None, "none", "tanh")
    return _same(args, {}) if known else None


def _two(args: Any, kwargs: Mapping[str, Any]) -> Shape | None:
    """An arithmetic operation on tensors and numbers."""
    if kwargs or len(args) != 2:
        return None
    one, two = args
    if type(one) in (int, float):
        return tuple(two.shape)
    if type(two) in (int, float):
        return tuple(one.shape)
    if type(two) not in _PLAIN:
        return None
    a, b = one.shape, two.shape
    if len(a) < len(b):
        a, b = b, a
    shape = list(a)
    for i in range(1, len(b) + 1):
        n, m = a[-i], b[-i]
        if n != m:
            if n != 1 and m != 1:
                return None
            shape[-i] = n * m
    return tuple(shape)


def _batch_norm(args: Any, kwargs: Mapping[str, Any]) -> Shape | None:
    names = ("running_mean", "running_var", "weight", "bias", "training")
    given = dict(zip(names, args[1:], strict=False)) | dict(kwargs)
    x = args[0]
    if x.dim() < 2 or x.numel() <= x.shape[1]:  # torch refuses to normalise a single number
        return None
    parts = [given.get(name) for name in names[:4]]
    if given.get("training", False) is not True and (parts[0] is None or parts[1] is None):
        return None
    return tuple(x.shape) if _fit(parts, (x.shape[1],)) else None


def _layer_norm(args: Any, kwargs: Mapping[str, Any]) -> Shape | None:
    given = dict(zip(("normalized_shape", "weight", "bias"), args[1:], strict=False)) | dict(kwargs)
    x, over = args[0], given.get("normalized_shape")
    if not isinstance(over, tuple | list) or not over or x.shape[-len(over) :] != tuple(over):
        return None
    return tuple(x.shape) if _fit((given.get("weight"), given.get("bias")), tuple(over)) else None


def _fit(parts: Any, shape: Shape) -> bool:
    """Whether parameters that may be left out have a shape."""
    return all(p is None or (type(p) in _PLAIN and p.shape == shape) for p in parts)


def _linear(args: Any, kwargs: Mapping[str, Any]) -> Shape | None:
    if len(args) < 2 or kwargs.keys() - {"bias"}:
        return None
    x, weight = args[0], args[1]
    bias = args[2] if len(args) > 2 else kwargs.get("bias")
    if type(weight) not in _PLAIN or x.dim() < 2 or weight.dim() != 2:
        return None
    if x.shape[-1] != weight.shape[1] or not _fit((bias,), weight.shape[:1]):
        return None
    return (*x.shape[:-1], weight.shape[0])


def _dropout(args: Any, kwargs: Mapping[str, Any]) -> Shape | None:
    given = dict(zip(("p", "training", "inplace"), args[1:], strict=False)) | dict(kwargs)
    p = given.get("p", 0.5)
    if type(p) is not float or not 0.0 < p < 1.0 or given.get("inplace", False) is not False:
        return None
    return tuple(args[0].shape) if given.get("training", True) is True else None


_RULES: dict[str, Rule] = {
    **dict.fromkeys(
        ("relu", "sigmoid", "tanh", "exp", "sqrt", "rsqrt", "abs", "neg", "erf", "sin",
         "cos"), _same),
    **dict.fromkeys(("add", "sub", "mul", "div"), _two),
    "gelu": _gelu,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "linear": _linear,
    "dropout": _dropout,
}  # fmt: skip
_FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys((F.relu, F.relu6, F.silu, F.mish, F.hardswish, F.hardsigmoid), _activation()),
    F.elu: _activation("alpha"),
    F.leaky_relu: _activation("negative_slope"),
    F.hardtanh: _activation("min_val", "max_val"),
}
