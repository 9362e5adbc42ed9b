"""The most frequent calls of a constructor, watched where they are made.

Creating a tensor, filling it, scaling what was drawn: on its way through torch's dispatcher such a
call takes several times as long as what is done about it there. All that is out of the ordinary is
left to the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from archlint.initialization.contents import Piece
from archlint.initialization.watch import Call, Watcher, operator

_aten = torch.ops.aten
_MADE: dict[Callable[..., Any], Any] = {
    torch.empty: _aten.empty.memory_format,
    torch.zeros: _aten.zeros.default,
    torch.ones: _aten.ones.default,
}
_FILLED: dict[Callable[..., Any], Any] = {
    Tensor.zero_: _aten.zero_.default,
    Tensor.fill_: _aten.fill_.Scalar,
    Tensor.normal_: _aten.normal_.default,
    Tensor.uniform_: _aten.uniform_.default,
}
_SCALED: dict[Callable[..., Any], Any] = {
    Tensor.erfinv_: _aten.erfinv_.default,
    Tensor.mul_: _aten.mul_.Tensor,
    Tensor.add_: _aten.add_.Tensor,
    Tensor.clamp_: _aten.clamp_.default,
}
_FUNCTIONS = frozenset((*_MADE, *_FILLED, *_SCALED, torch.tensor))
_OPTIONS = frozenset(("dtype", "device"))
_PLAIN = (Tensor, nn.Parameter)
_NUMBERS = (int, float)


def watched(watcher: Watcher, func: Any, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """What a call of torch's API gives, if it is one of these; None where it was not made."""
    if func not in _FUNCTIONS or watcher.paused or not args:
        return None
    if (
        torch._C._len_torch_dispatch_stack() != 1  # somebody else is watching, too
        or torch._C._functorch.maybe_current_level() is not None
        or torch.is_inference_mode_enabled()
    ):
        return None
    if func in _FILLED:
        call = _changing(func, _FILLED[func], args, kwargs)
    elif func in _SCALED:  # whose operator is looked at
        call = _changing(_SCALED[func], _SCALED[func], args, kwargs)
    elif kwargs.keys() - _OPTIONS:
        return None
    elif func is torch.tensor:
        return _number(watcher, args, kwargs)
    else:
        call = _making(func, _MADE[func], args, kwargs)
    if call is None:
        return None
    with torch._C._DisableTorchDispatch():
        result: Tensor = watcher.handled(call)
    return result


def _changing(func: Any, overload: Any, args: Any, kwargs: dict[str, Any]) -> Call | None:
    """A call in place with numbers alone."""
    target = args[0]
    if type(target) not in _PLAIN or target.layout is not torch.strided:
        return None
    if target.requires_grad and torch.is_grad_enabled():  # torch refuses
        return None
    if "generator" in kwargs:
        kwargs = {k: v for k, v in kwargs.items() if k != "generator" or v is not None}
    for value in (*args[1:], *kwargs.values()):
        if type(value) not in _NUMBERS:
            return None
    return Call(func, operator(overload), args, kwargs)


def _making(func: Any, overload: Any, args: Any, kwargs: dict[str, Any]) -> Call | None:
    """A new tensor of a size."""
    size = args[0] if len(args) == 1 and type(args[0]) is not int else args
    if not isinstance(size, tuple | list):
        return None
    for n in size:
        if type(n) is not int:
            return None
    return Call(func, operator(overload), (size,), kwargs)


def _number(watcher: Watcher, args: Any, kwargs: dict[str, Any]) -> Tensor | None:
    """A tensor that holds one number."""
    if len(args) > 1 or type(args[0]) not in _NUMBERS:
        return None
    with torch._C._DisableTorchDispatch():
        made = torch.tensor(*args, **kwargs)
        watcher.file(made, lambda: Piece(None, watcher.event("tensor")))
    return made


@contextmanager
def initializers_entered() -> Iterator[None]:
    """Let the calls that ``torch.nn.init`` makes be seen, where it would hand itself over whole."""
    overrides: Any = torch.overrides
    original = overrides.has_torch_function_variadic

    def overridden(*tensors: Any) -> bool:
        plain = all(type(t) in _PLAIN for t in tensors)
        return False if plain else bool(original(*tensors))

    overrides.has_torch_function_variadic = overridden
    try:
        yield
    finally:
        overrides.has_torch_function_variadic = original
