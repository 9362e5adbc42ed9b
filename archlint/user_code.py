"""Running code that is not archlint's: its exceptions shown as its own, its time limited."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO

from archlint.errors import ArchlintError
from archlint.finding import short_path
from archlint.graph.sites import is_standard, origin_of, site_of


class OutOfTime(BaseException):
    """The limit passed. No Exception, so that ``except Exception`` does not swallow it."""


_AGAIN = 0.25  # seconds until it is raised once more, should it have been swallowed all the same
_SWALLOWED = 4  # times that this is taken for chance
_OFTEN = 0.02  # seconds from then on: what swallows it lets it through at few of its instructions
_GRACE = 3.0  # seconds that a call into compiled code may still take before the process is ended
_PATIENCE = 20  # times as long that code may take in which something is raised, and swallowed

# What ends the process, told of what was running and of the error: the command line sets it.
LastResort = Callable[[str, ArchlintError], None]
_last_resort: list[LastResort] = []


@contextlib.contextmanager
def last_resort(end: LastResort) -> Iterator[None]:
    """While this is active, ``end`` is called, in another thread, where the limit passed and the
    code does not come back to Python, so that nothing can be raised in it. It must not return."""
    _last_resort.append(end)
    try:
        yield
    finally:
        _last_resort.remove(end)


class limited:
    """Raise ArchlintError in what takes longer than ``seconds``, naming the line it was at.

    Works where signals can be had (the main thread), between two instructions of Python. A call
    into compiled code that does not end is left to :func:`last_resort`; one that also keeps
    Python's lock cannot be stopped. 0 and None are no limit.
    """

    def __init__(self, seconds: float | None, what: str) -> None:
        self.seconds, self.what, self.place = seconds or 0.0, what, ""
        self.active = (
            self.seconds > 0
            and hasattr(signal, "setitimer")
            and threading.current_thread() is threading.main_thread()
        )

    def __enter__(self) -> None:
        if self.active:
            self.before = signal.signal(signal.SIGALRM, self._stop)
            self.started = time.monotonic()
            self.left = signal.setitimer(signal.ITIMER_REAL, self.seconds, _AGAIN)[0]
            self.ended, self.heard = threading.Event(), 0
            if _last_resort:
                threading.Thread(target=self._watch, args=_last_resort[-1:], daemon=True).start()

    def _stop(self, _: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_code is limited.__exit__.__code__:
            return  # what was limited has ended
        self.place = self.place or _place(frame)
        self.heard += 1
        if self.heard == _SWALLOWED:
            signal.setitimer(signal.ITIMER_REAL, _OFTEN, _OFTEN)
        raise OutOfTime

    def _watch(self, end: LastResort) -> None:
        """End the process where the limit passed and no signal gets through to Python.

        Code that swallows what is raised in it has longer: it may be raised at a better moment."""
        wait = self.seconds
        for _ in range(_PATIENCE):
            heard, wait = self.heard, wait + _GRACE
            if self.ended.wait(wait):
                return
            if self.heard == heard:
                break
            wait = 0.0
        main = threading.main_thread().ident
        place = self.place or _place(sys._current_frames().get(main or 0))
        end(self.what, self._error(f"{place}, in a call that cannot be interrupted"))

    def _error(self, place: str) -> ArchlintError:
        return ArchlintError(
            f"{self.what} did not finish within {self.seconds:g} s{place}",
            "raise the limit with --timeout",
        )

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.active:
            self.ended.set()
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.before)
            if self.left:  # somebody else's alarm goes on
                left = max(self.left - time.monotonic() + self.started, 1e-3)
                signal.setitimer(signal.ITIMER_REAL, left)
        if kind is OutOfTime:
            raise self._error(self.place) from None


def _place(frame: FrameType | None) -> str:
    """Where the user's code is at, of the frames from ``frame`` outwards."""
    while frame is not None:
        if origin_of(frame.f_code.co_filename) == "user":
            return f": it was at {site_of(frame)}, in {frame.f_code.co_qualname}"
        frame = frame.f_back
    return ""


def call(what: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function of the user's. What it raises becomes an ArchlintError that shows it as
    theirs; ``what`` says what was being done: ``importing net.py``."""
    try:
        return function(*args, **kwargs)
    except (ArchlintError, OutOfTime, KeyboardInterrupt):
        raise
    except BaseException as problem:
        raise raised(what, problem) from problem


def raised(what: str, problem: BaseException) -> ArchlintError:
    """The error that tells of an exception of the user's code."""
    if isinstance(problem, SystemExit):
        return ArchlintError(
            f"{what} ended the program: sys.exit({'' if problem.code is None else problem.code!r})",
            'put what only a script should do under `if __name__ == "__main__":`',
            shown(problem),
        )
    return ArchlintError(f"{what} raised {said(problem)}", None, shown(problem))


def said(problem: BaseException) -> str:
    """``ValueError: what it says``, on one line."""
    try:
        text = " ".join(str(problem).split())
    except Exception:  # a __str__ of the user's
        text = "(its __str__ raises)"
    name = type(problem).__name__
    return f"{name}: {_printable(text)[:300]}" if text else name


def _printable(text: str) -> str:
    """A text without characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def shown(problem: BaseException) -> str:
    """An exception the way Python prints it, with the frames of the user's code alone.

    Where there are none, such as in a library's own constructor, the library's innermost one.
    """
    told = traceback.TracebackException.from_exception(problem)
    seen: set[int] = set()
    _keep_theirs(told, seen)
    try:
        text = "".join(told.format())
    except Exception:  # a __str__ of the user's, or a file that went away
        return ""
    lines = [line[:_LONGEST] for line in _printable(text).splitlines() if line != _HEADING]
    if len(lines) > _MOST_LINES:
        half = _MOST_LINES // 2
        lines = [*lines[:half], f"  … {len(lines) - 2 * half} more lines …", *lines[-half:]]
    return "\n".join(lines)


_HEADING = "Traceback (most recent call last):"
_LONGEST, _MOST_LINES = 300, 60  # of what an exception shows


def _keep_theirs(told: traceback.TracebackException, seen: set[int]) -> None:
    if id(told) in seen:
        return
    seen.add(id(told))
    frames = list(told.stack)
    kept = [f for f in frames if origin_of(f.filename) == "user"]
    if not kept:
        library = [f for f in frames if origin_of(f.filename) == "library"]
        kept = [f for f in library if not is_standard(f.filename)][-1:]
    for frame in kept:
        frame.filename = short_path(frame.filename)
    told.stack[:] = kept
    for inner in (told.__cause__, told.__context__, *(told.exceptions or ())):
        if inner is not None:
            _keep_theirs(inner, seen)
    if told.__context__ is not None and not told.__context__.stack:
        told.__context__ = None  # what went on inside of archlint or torch


@contextlib.contextmanager
def stdout_as_stderr() -> Iterator[TextIO]:
    """What is printed while this is active goes to stderr, that of child processes and of C code
    included; the stream given is the real standard output."""
    real = sys.stdout
    try:
        own = real.fileno() == 1
    except (OSError, ValueError, AttributeError):
        own = False
    real.flush()
    if not own:  # captured by a test or a notebook
        sys.stdout = sys.stderr
        try:
            yield real
        finally:
            sys.stdout = real
        return
    out = os.fdopen(os.dup(1), "w", encoding=real.encoding, errors=real.errors, closefd=False)
    os.dup2(2, 1)
    # a stream of its own: code that closes or replaces it must not take the errors with it
    sys.stdout = os.fdopen(os.dup(2), "w", 1, sys.stderr.encoding, "replace", closefd=False)
    # never undone: what a program prints when it ends must not follow a JSON document
    yield out
