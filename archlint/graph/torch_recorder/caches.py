"""What functions of a program remember from one call to the next (``functools.lru_cache``).

Tables of positions and of anchors are often kept by a decorated function, for every model of the
process. A recording would leave tensors there that have no elements, and the next forward, of the
user's training, would get them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from torch import nn

from archlint.graph.sites import origin_of


@contextlib.contextmanager
def caches_emptied(model: nn.Module) -> Iterator[None]:
    """What the model's code puts into caches meanwhile is forgotten afterwards.

    They are looked for in the classes of its modules and in what their files define or import.
    """
    before = [(cache, cache.cache_info().misses) for cache in _caches(model)]
    try:
        yield
    finally:
        for cache, misses in before:
            if cache.cache_info().misses != misses:
                cache.cache_clear()


def _caches(model: nn.Module) -> Iterator[Any]:
    classes = {base for module in model.modules() for base in type(module).__mro__}
    files = {c.__module__ for c in classes}
    scopes: list[Mapping[str, Any]] = [vars(c) for c in classes if c.__module__ in sys.modules]
    scopes += [vars(sys.modules[name]) for name in files if name in sys.modules]
    seen: set[int] = set()
    for scope in scopes:
        if origin_of(_file_of(scope)) == "torch":
            continue
        for value in list(scope.values()):
            cache = _cache_of(value)
            if cache is not None and id(cache) not in seen:
                seen.add(id(cache))
                yield cache


def _file_of(scope: Mapping[str, Any]) -> str:
    owner = sys.modules.get(scope.get("__module__") or scope.get("__name__") or "")
    return getattr(owner, "__file__", None) or ""


def _cache_of(value: Any) -> Any:
    """The cache behind a function: itself, or what its decorators closed over."""
    while True:
        if isinstance(value, functools._lru_cache_wrapper):
            return value
        if isinstance(value, staticmethod | classmethod):
            value = value.__func__
            continue
        if not isinstance(value, FunctionType) or value.__closure__ is None:
            return None
        held = [c.cell_contents for c in value.__closure__ if _is_filled(c)]
        inner = [h for h in held if isinstance(h, functools._lru_cache_wrapper)]
        if inner:
            return inner[0]
        value = getattr(value, "__wrapped__", None)


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
