"""Back to the user's source: the line of a call, the constructor call of a module. Torch-free.

The frame that counts is the innermost one in the user's own code. Frames of installed packages and
of Python's library are skipped unless nothing else is left; then the innermost frame outside of
torch counts, which is the model's line in a library of models.
"""

from __future__ import annotations

import os
import site as site_module
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from types import CodeType, FrameType
from typing import Any, NamedTuple

from archlint.finding import Site

SITE_ATTRIBUTE = "_archlint_site"  # in a module's __dict__, so that deep copies keep it
# of this environment or of one that a .pth file or PYTHONPATH adds
_PACKAGES = (f"{os.sep}site-packages{os.sep}", f"{os.sep}dist-packages{os.sep}")
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep


@lru_cache(maxsize=1)
def _library_folders() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    folders = {paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    folders.update(site_module.getsitepackages())
    folders.add(os.path.dirname(os.__file__))
    folders.add(site_module.getusersitepackages())
    spellings = {os.path.abspath(f) for f in folders} | {os.path.realpath(f) for f in folders}
    return tuple(sorted(f + os.sep for f in spellings))


@lru_cache(maxsize=4096)
def origin_of(filename: str) -> str:
    """Whose code a file is: ``user``, ``library``, ``torch`` or ``none`` (no file, or archlint)."""
    if filename.startswith(("<ipython-input", "<python-input", "<stdin>")):
        return "user"  # an interactive session, which keeps the lines
    if filename.startswith("<") or not filename:
        return "none"
    path = os.path.abspath(filename)
    if path.startswith(_OURS):
        return "none"
    if not path.startswith(_library_folders()) and not any(part in path for part in _PACKAGES):
        return "user"
    return "torch" if f"{os.sep}torch{os.sep}" in path else "library"


class CodeFacts(NamedTuple):
    """What is known of a code object: whose it is, and whether a frame of it is shown where there
    is none of the user's. ``code`` keeps the object alive, so that its id stays its own."""

    origin: str
    shown: bool
    code: CodeType


# By identity: equality of code compares all constants, and is blind to file and lines.
_FACTS: dict[int, CodeFacts] = {}
_POSITIONS: dict[tuple[int, int], Site] = {}
_MANY = 1 << 16


def facts_of(code: CodeType) -> CodeFacts:
    """What is known of a code object, found out once."""
    found = _FACTS.get(id(code))
    if found is None:
        if len(_FACTS) >= _MANY:  # code that is made anew all the time, in a long session
            _FACTS.clear()
            _POSITIONS.clear()
        file = code.co_filename
        origin = origin_of(file)
        found = CodeFacts(origin, origin == "library" and not is_standard(file), code)
        _FACTS[id(code)] = found
    return found


def _position(code: CodeType, instruction: int) -> Site:
    filename = code.co_filename
    found = next(islice(code.co_positions(), instruction // 2, None), None)
    line, end_line, column, end_column = found if found is not None else (None,) * 4
    if line is None:
        return Site(filename, code.co_firstlineno)
    return Site(
        filename,
        line,
        characters(filename, line, column),
        end_line,
        characters(filename, end_line, end_column),
    )


@lru_cache(maxsize=65536)
def characters(filename: str, line: int | None, byte: int | None) -> int | None:
    """A column that counts from 1 in characters, out of a byte offset in a line of UTF-8."""
    if line is None or byte is None:
        return None
    import linecache

    text = linecache.getline(filename, line)
    if text.isascii():
        return byte + 1
    return len(text.encode()[:byte].decode(errors="ignore")) + 1


def site_of(frame: FrameType) -> Site:
    """The place where a frame is: file, line and columns of the instruction it is at."""
    key = (id(frame.f_code), frame.f_lasti)
    found = _POSITIONS.get(key)
    if found is None:
        code = facts_of(frame.f_code).code  # from now on it is kept alive
        found = _POSITIONS[key] = _position(code, frame.f_lasti)
    return found


def calling_site(frame: FrameType | None, stop: FrameType | None = None) -> Site | None:
    """The site of the innermost frame of the user's code from ``frame`` outwards.

    ``stop`` is the frame at which the search ends (the one that runs the model). Without a frame
    of the user's, the innermost one outside of torch counts. None where there is neither.
    """
    spare: FrameType | None = None
    while frame is not None and frame is not stop:
        code = frame.f_code
        facts = _FACTS.get(id(code)) or facts_of(code)
        if facts.origin == "user":
            return site_of(frame)
        if spare is None and facts.shown:
            spare = frame
        frame = frame.f_back
    return site_of(spare) if spare is not None else None


@lru_cache(maxsize=4096)
def is_standard(filename: str) -> bool:
    """Whether a file is of Python's own library (contextlib, functools, …)."""
    path = os.path.abspath(filename)
    return not any(part in path for part in _PACKAGES)


@contextmanager
def constructor_sites() -> Iterator[None]:
    """While this is active, every ``nn.Module`` remembers the call that constructed it."""
    from torch import nn

    original = nn.Module.__init__
    stop = sys._getframe(2)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if SITE_ATTRIBUTE not in self.__dict__:
            site = calling_site(_outside_constructors(sys._getframe(1), self), stop)
            if site is not None:
                self.__dict__[SITE_ATTRIBUTE] = site
        original(self, *args, **kwargs)

    nn.Module.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.__init__ = original  # type: ignore[method-assign]


def _outside_constructors(frame: FrameType | None, instance: object) -> FrameType | None:
    """The frame that called the class: past the ``__init__``s of this instance."""
    while frame is not None and frame.f_code.co_name == "__init__":
        names = frame.f_code.co_varnames
        if not names or frame.f_locals.get(names[0]) is not instance:
            break
        frame = frame.f_back
    return frame


def constructor_site(module: object) -> Site | None:
    """The call that constructed a module, where it was watched."""
    found = getattr(module, "__dict__", {}).get(SITE_ATTRIBUTE)
    return found if isinstance(found, Site) else None
