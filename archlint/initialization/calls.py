"""Which call fills a tensor: its place in the source and what a user would write for it."""

from __future__ import annotations

import inspect
import math
import os
import sys
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

from archlint.finding import Site
from archlint.graph.sites import calling_site, facts_of, site_of
from archlint.initialization.contents import Event

_RESETS = frozenset(("reset_parameters", "_reset_parameters"))
_COPY = os.sep + "copy.py"


def event(stop: FrameType | None, text: str, initialiser: bool, named: bool = True) -> Event:
    """The call that runs now. ``text`` is the operation itself; an initializer function above it
    gives its own name, unless ``named`` is off."""
    frame: FrameType | None = sys._getframe(1)
    # the site is calling_site's, found on the same way, but for initializers of libraries
    site: Site | None = None
    spare: FrameType | None = None
    default = False
    function: FrameType | None = None
    telling = _USER | _SHOWN | _DEFAULT | _INITIALIZER
    while frame is not None and frame is not stop:
        code = frame.f_code
        role = _ROLES.get(id(code), _NEW)
        if role & telling:
            if role is _NEW:
                role = _role_of(code)
            if role & _DEFAULT:
                default = True
            if role & _INITIALIZER:
                function = frame
            if role & _USER:
                site = site_of(frame)
                break
            if role & _INITIALIZER:  # a library's is called from where it matters
                spare = None
                telling |= _SHOWN
            elif role & telling & _SHOWN:
                spare = frame
                telling &= ~_SHOWN
        frame = frame.f_back
    spare = spare or function
    if site is None and spare is not None:
        site = site_of(spare)
    if function is not None and named:
        text = _written(function)
    return Event(text, site, default, initialiser)


def copying_site(stop: FrameType | None) -> Site | None:
    """The call of ``copy.deepcopy`` that runs now, if one does."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame is not stop:
        if frame.f_code.co_name == "deepcopy" and frame.f_code.co_filename.endswith(_COPY):
            return calling_site(frame, stop)
        frame = frame.f_back
    return None


# What a frame of some code means for the call at hand: it is the user's, it is shown where there is
# none of the user's, it is a layer's own way to fill its parameters, it is an initializer.
_USER, _SHOWN, _DEFAULT, _INITIALIZER = 1, 2, 4, 8
_NEW = 15  # not looked at yet
_ROLES: dict[int, int] = {}
_MANY = 1 << 16
_kept: list[CodeType] = []  # so that their ids stay their own


def _role_of(code: CodeType) -> int:
    facts = facts_of(code)
    own = code.co_name in _RESETS or (facts.origin == "torch" and code.co_name == "__init__")
    found = (
        _USER * (facts.origin == "user")
        | _SHOWN * facts.shown
        | _DEFAULT * (own and facts.origin in ("torch", "library"))
        | _INITIALIZER * _is_initializer(code)
    )
    if len(_kept) >= _MANY:
        _ROLES.clear()
        _kept.clear()
    _kept.append(code)
    _ROLES[id(code)] = found
    return found


def _is_initializer(code: CodeType) -> bool:
    """Whether a function is called like one of ``torch.nn.init`` and takes a tensor first."""
    name = code.co_name
    return (
        name.endswith("_")
        and not name.startswith("_")
        and code.co_argcount >= 1
        and code.co_varnames[0] in ("tensor", "w", "weight", "x", "t", "p", "param")
    )


def _written(frame: FrameType) -> str:
    """``kaiming_normal_(nonlinearity="relu")``: the call of a frame without its defaults."""
    code = frame.f_code
    function = frame.f_globals.get(code.co_name)
    local = frame.f_locals  # gathered anew at every access
    values = {name: local.get(name) for name in code.co_varnames[1 : code.co_argcount]}
    return call_text(code.co_name, values, function)


def call_text(name: str, values: dict[str, Any], function: Any = None) -> str:
    """A call written out, without the arguments that are the function's defaults."""
    defaults = _defaults(function) if callable(function) else {}
    shown = [
        f"{key}={literal(value)}"
        for key, value in values.items()
        if isinstance(value, int | float | str) and defaults.get(key, ...) != value
    ]
    return f"{name}({', '.join(shown)})"


@lru_cache(maxsize=1024)
def _defaults(function: Any) -> dict[str, Any]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: p.default for p in parameters}


def literal(value: float | str | bool) -> str:
    """A number or string as a user writes it: ``sqrt(5)`` for 2.2360679…."""
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, bool | int) or value == 0:
        return f"{value:g}" if isinstance(value, float) else str(value)
    if not math.isfinite(value):
        return f'float("{value}")'
    square = value * value
    whole = round(square)
    if 1 < whole <= 100 and abs(square - whole) < 1e-9 and math.isqrt(whole) ** 2 != whole:
        return f"{'-' if value < 0 else ''}sqrt({whole})"
    return f"{value:.4g}"
