"""Initializers of torch that draw until they are content, or element by element: their laws.

``trunc_normal_``, ``orthogonal_``, ``sparse_``, ``dirac_`` and the parametrization by orthogonal
matrices do nothing on meta tensors, or fail there, and loop on elements otherwise. While a model is
watched their code is exchanged (the functions stay the same objects, so that names imported earlier
are covered) for code that tells the watcher the law.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from archlint.initialization import calls
from archlint.initialization.contents import Piece, Storage, one
from archlint.initialization.laws import Law, of_moments, orthogonal, sparse, truncated
from archlint.initialization.watch import Watcher, pause

_watchers: list[Watcher] = []
_originals: dict[str, FunctionType] = {}
_signatures: dict[str, inspect.Signature] = {}


def _truncated(tensor: Tensor, values: dict[str, Any]) -> Law:
    mean, std = float(values["mean"]), float(values["std"])
    cut = ((float(values["a"]) - mean) / std, (float(values["b"]) - mean) / std)
    return truncated(mean, std, cut)


def _orthogonal(tensor: Tensor, values: dict[str, Any]) -> Law:
    rows = tensor.shape[0]
    return orthogonal(float(values["gain"]), rows, tensor.numel() // rows)


def _sparse(tensor: Tensor, values: dict[str, Any]) -> Law:
    rows = tensor.shape[0]
    return sparse(math.ceil(values["sparsity"] * rows) / rows, float(values["std"]))


def _dirac(tensor: Tensor, values: dict[str, Any]) -> Law:
    groups = int(values["groups"])
    ones = groups * min(tensor.shape[0] // groups, tensor.shape[1])
    share = ones / tensor.numel()
    return of_moments("dirac", (share, share, share, share), False, None)


_LAWS: dict[str, Callable[[Tensor, dict[str, Any]], Law]] = {
    "_no_grad_trunc_normal_": _truncated,
    "orthogonal_": _orthogonal,
    "sparse_": _sparse,
    "dirac_": _dirac,
}
_SHOWN = {"_no_grad_trunc_normal_": "trunc_normal_"}


def told(name: str, args: Any, kwargs: Any) -> Any:
    """What the exchanged code does: check as the original does, and tell the law."""
    original = _originals[name]
    watcher = _watchers[-1]
    bound = _signatures[name].bind(*args, **kwargs)
    bound.apply_defaults()
    tensor: Tensor = bound.arguments["tensor"]
    if watcher.paused or tensor.numel() == 0:
        return original(*args, **kwargs)
    if tensor.numel() <= watcher.limit and watcher.has_elements(tensor):
        with pause(watcher):
            original(*args, **kwargs)
    else:
        # the original refuses wrong arguments before it finds that there is nothing to do
        with pause(watcher), torch._C.DisableTorchFunction():
            original(torch.empty_like(tensor, device="meta"), *args[1:], **_without(kwargs))
        if tensor.device.type != "meta":
            watcher.known(tensor).stale = True
    values = dict(bound.arguments)
    law = _LAWS[name](tensor, values)
    shown = _SHOWN.get(name, name)
    values.pop("tensor")
    text = calls.call_text(shown, values, _originals.get(shown) or getattr(nn.init, shown))
    watcher.write(tensor.detach(), one(Piece(law, watcher.event(text, True, named=False))))
    return tensor


def _without(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k not in ("tensor", "generator")}


def _trunc_normal_code(*args, **kwargs):  # type: ignore[no-untyped-def]
    from archlint.initialization.replaced import told

    return told("_no_grad_trunc_normal_", args, kwargs)


def _orthogonal_code(*args, **kwargs):  # type: ignore[no-untyped-def]
    from archlint.initialization.replaced import told

    return told("orthogonal_", args, kwargs)


def _sparse_code(*args, **kwargs):  # type: ignore[no-untyped-def]
    from archlint.initialization.replaced import told

    return told("sparse_", args, kwargs)


def _dirac_code(*args, **kwargs):  # type: ignore[no-untyped-def]
    from archlint.initialization.replaced import told

    return told("dirac_", args, kwargs)


def is_orthogonal(args: Any, kwargs: Any) -> Any:
    """Whether the columns of a matrix that was drawn are orthonormal, which its law says."""
    watcher, matrix = _watchers[-1], args[0]
    with torch._C.DisableTorchFunction():  # devices are as they are
        real = watcher.is_real(matrix)
    if watcher.paused or real:
        return _originals["_is_orthogonal"](*args, **kwargs)
    with torch._C.DisableTorchFunction():
        held = watcher.content(matrix.detach()).single
    law = held.law if held is not None else None
    if law is None or law.family != "orthogonal":
        return False
    return abs(law.moments()[1] * matrix.shape[-2] - 1.0) < 1e-9


def make_orthogonal(args: Any, kwargs: Any) -> Any:
    """The orthogonal factor of a matrix that was drawn, with R's diagonal positive."""
    original = _originals["_make_orthogonal"]
    watcher, matrix = _watchers[-1], args[0]
    with torch._C.DisableTorchFunction():  # devices are as they are
        real, drawn = watcher.is_real(matrix), watcher.has_elements(matrix)
    if watcher.paused or real:
        return original(*args, **kwargs)
    with pause(watcher):
        result = original(*args, **kwargs) if drawn else matrix.new_empty(matrix.shape)
    event = watcher.event("orthogonal", True, named=False)
    piece = Piece(orthogonal(1.0, *matrix.shape[-2:]), event)
    with torch._C.DisableTorchFunction():
        watcher.put(result, Storage(result.numel(), piece))
    return result


def _is_orthogonal_code(*args, **kwargs):  # type: ignore[no-untyped-def]
    from archlint.initialization.replaced import is_orthogonal

    return is_orthogonal(args, kwargs)


def _make_orthogonal_code(*args, **kwargs):  # type: ignore[no-untyped-def]
    from archlint.initialization.replaced import make_orthogonal

    return make_orthogonal(args, kwargs)


_CODES = {
    "_no_grad_trunc_normal_": _trunc_normal_code,
    "orthogonal_": _orthogonal_code,
    "sparse_": _sparse_code,
    "dirac_": _dirac_code,
    "_is_orthogonal": _is_orthogonal_code,
    "_make_orthogonal": _make_orthogonal_code,
}


def _function(name: str) -> Any:
    """A function of torch whose code is exchanged; None where this version has none such."""
    return getattr(nn.init, name, None) or getattr(parametrizations, name, None)


@contextmanager
def replaced(watcher: Watcher) -> Iterator[None]:
    """Exchange the code while a watcher is at work."""
    _watchers.append(watcher)
    found = {name: _function(name) for name in _CODES}
    functions = {name: function for name, function in found.items() if function is not None}
    if len(_watchers) == 1:
        for name, function in functions.items():
            _signatures[name] = inspect.signature(function)
            copy = FunctionType(
                function.__code__, function.__globals__, name, function.__defaults__
            )
            copy.__kwdefaults__ = function.__kwdefaults__
            _originals[name] = copy
            # the new code takes any arguments: defaults would be looked for past its end
            function.__defaults__ = None
            function.__kwdefaults__ = None
            function.__code__ = _CODES[name].__code__
    try:
        yield
    finally:
        _watchers.pop()
        if not _watchers:
            for name, function in functions.items():
                function.__code__ = _originals[name].__code__
                function.__defaults__ = _originals[name].__defaults__
                function.__kwdefaults__ = _originals[name].__kwdefaults__
