"""Initializers in a constructor's loop over names that a test on the name keeps from running.

``for name, p in model.named_parameters(): if name == "proj.weight": …`` fills nothing where every
name is a whole path, such as ``blocks.0.proj.weight``. While a model is built, the names that loops
list are noted; afterwards the tests in these loops are read from the source and evaluated on them.
What a test says of anything but the name is left open, and an open test is never called dead.
"""

from __future__ import annotations

import ast
import functools
import inspect
import linecache
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType, FrameType
from typing import Any

from torch import nn

from archlint.finding import Site
from archlint.graph.model import Unreached
from archlint.graph.sites import characters, origin_of, site_of

_LISTINGS = ("named_parameters", "named_modules", "named_buffers", "named_children")
_WRAPPERS = frozenset(("list", "tuple", "sorted", "reversed", "enumerate", "dict", "iter"))
_NO_INITIALISERS = frozenset(("requires_grad_", "detach_", "share_memory_", "rename_"))


@dataclass
class _Listing:
    """What one call in the source listed: by which function, and the names."""

    code: CodeType
    names: dict[str, None] = field(default_factory=dict)


class Listings:
    """Notes the names that constructors loop over, by the place of the call that lists them."""

    def __init__(self) -> None:
        self._found: dict[Site, _Listing] = {}
        self._concerned: dict[int, tuple[CodeType, bool]] = {}  # by id: to hash code is slow

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While this is active, the names that modules list are noted."""
        originals = {name: getattr(nn.Module, name) for name in _LISTINGS}
        for name, original in originals.items():
            setattr(nn.Module, name, self._watched(original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(nn.Module, name, original)

    def _watched(self, original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        @functools.wraps(original)
        def method(*args: Any, **kwargs: Any) -> Iterator[Any]:
            listed = original(*args, **kwargs)
            frame = sys._getframe(1)
            return self._noted(frame, listed) if self._concerns(frame.f_code) else listed

        return method

    def _concerns(self, code: CodeType) -> bool:
        """Whether a function may loop over names to fill some of them."""
        known = self._concerned.get(id(code))
        if known is None:
            fills = any(_is_initialiser(name) for name in code.co_names)
            known = code, fills and origin_of(code.co_filename) in ("user", "library")
            self._concerned[id(code)] = known
        return known[1]

    def _noted(self, frame: FrameType, listed: Iterator[Any]) -> Iterator[Any]:
        names = self._found.setdefault(site_of(frame), _Listing(frame.f_code)).names

        def noting() -> Iterator[Any]:
            for item in listed:
                names[item[0]] = None
                yield item

        return noting()

    def unreached(self, parameters: Collection[str]) -> tuple[Unreached, ...]:
        """The initializers that ran for none of the names, though names of these parameters hold
        what was tested for as a part."""
        index = _Index(parameters)
        found: list[Unreached] = []
        for site, listing in self._found.items():
            if listing.names:
                found += _of_listing(site, listing, index)
        return tuple(found)


def _is_initialiser(name: str) -> bool:
    """Whether a function is called like one that fills a tensor in place."""
    return name.endswith("_") and not name.startswith("_") and name not in _NO_INITIALISERS


class _Index:
    """Parameters by every ending of their path, or of their module's, that begins at a dot."""

    def __init__(self, parameters: Collection[str]) -> None:
        self._names = parameters

    @cached_property
    def parameters(self) -> Mapping[str, Sequence[str]]:
        """By the endings of their own path."""
        return _by_ending((name, name) for name in self._names)

    @cached_property
    def modules(self) -> Mapping[str, Sequence[str]]:
        """By the endings of the path of the module that holds them."""
        return _by_ending((name.rpartition(".")[0], name) for name in self._names)


def _by_ending(paths: Iterable[tuple[str, str]]) -> Mapping[str, Sequence[str]]:
    found: dict[str, list[str]] = {}
    for path, name in paths:
        parts = path.split(".")
        for i in range(len(parts)):
            found.setdefault(".".join(parts[i:]), []).append(name)
    return found


# --------------------------------------------------------------------------- the source


@dataclass(frozen=True)
class _Loop:
    """A loop over names: its body, the variables of the name and of what has it."""

    body: Sequence[ast.stmt]
    name: str
    thing: str


def _of_listing(site: Site, listing: _Listing, index: _Index) -> Iterator[Unreached]:
    tree, text, above = _source(listing.code)
    if tree is None:
        return
    place = _Places(site.file, above)

    def written(node: ast.expr) -> str:
        return " ".join((ast.get_source_segment(text, node) or ast.unparse(node)).split())

    for node in ast.walk(tree):
        if not isinstance(node, ast.For):
            continue
        call = _listed(node.iter)
        if call is None or (place.end(call) != (site.end_line, site.end_column)):
            continue
        loop = _loop(node)
        if loop is None:
            continue
        of_modules = getattr(call.func, "attr", "") in ("named_modules", "named_children")
        for tests, body in _branches(loop.body, ()):
            filling = _filling(body, loop.thing)
            if filling is None or any(_holds(tests, loop.name, n) is not False
                                      for n in listing.names):  # fmt: skip
                continue
            near = [n for n in listing.names if _holds(tests, loop.name, n, near=True) is not False]
            if not near:
                continue
            ends = index.modules if of_modules else index.parameters
            names = [p for n in near for p in ends.get(n, ())]
            if names:
                yield Unreached(
                    written(tests[-1]), written(filling), len(listing.names),
                    tuple(dict.fromkeys(names)), place.site(tests[-1]), place.site(filling),
                    _instead(tests[-1], loop.name, near),
                )  # fmt: skip


def _source(code: CodeType) -> tuple[ast.Module | None, str, int]:
    """The syntax tree of a function, its text, and how many lines of the file lie above it."""
    lines = linecache.getlines(code.co_filename)
    first = code.co_firstlineno
    block = lines if code.co_name == "<module>" else inspect.getblock(lines[first - 1 :])
    text, above = "".join(block), first - 1
    if text[:1].isspace():  # columns stay what they are
        text, above = "if True:\n" + text, above - 1
    try:
        return ast.parse(text), text, above
    except SyntaxError:  # the file is another by now
        return None, "", 0


@dataclass(frozen=True)
class _Places:
    """From the places of a tree to those of its file."""

    file: str
    above: int

    def end(self, node: ast.expr) -> tuple[int | None, int | None]:
        """The end of an expression."""
        line = (node.end_lineno or 0) + self.above
        return line, characters(self.file, line, node.end_col_offset)

    def site(self, node: ast.expr) -> Site:
        """Where an expression is."""
        line = node.lineno + self.above
        return Site(self.file, line, characters(self.file, line, node.col_offset), *self.end(node))


def _listed(iterated: ast.expr) -> ast.Call | None:
    """The call that lists the names, out of ``list(…)``, ``enumerate(…)`` and the like."""
    while isinstance(iterated, ast.Call):
        function = iterated.func
        if isinstance(function, ast.Name) and function.id in _WRAPPERS and iterated.args:
            iterated = iterated.args[0]
        elif isinstance(function, ast.Attribute) and function.attr == "items":
            iterated = function.value
        else:
            return iterated
    return None


def _loop(node: ast.For) -> _Loop | None:
    target = node.target
    while isinstance(target, ast.Tuple) and isinstance(target.elts[-1], ast.Tuple):
        target = target.elts[-1]
    if not isinstance(target, ast.Tuple) or len(target.elts) != 2:
        return None
    name, thing = target.elts
    if not isinstance(name, ast.Name) or not isinstance(thing, ast.Name):
        return None
    stored = (n for part in node.body for n in ast.walk(part) if isinstance(n, ast.Name))
    if any(n.id in (name.id, thing.id) and isinstance(n.ctx, ast.Store) for n in stored):
        return None  # it is not what was listed any more
    return _Loop(node.body, name.id, thing.id)


_Tests = tuple[ast.expr, ...]


def _branches(
    body: Sequence[ast.stmt], tests: _Tests
) -> Iterator[tuple[_Tests, Sequence[ast.stmt]]]:
    """Every branch of a body with the tests that lead to it."""
    for statement in body:
        if isinstance(statement, ast.If):
            yield (*tests, statement.test), statement.body
            yield from _branches(statement.body, (*tests, statement.test))
            yield from _branches(statement.orelse, tests)
        elif isinstance(statement, ast.With | ast.Try):
            yield from _branches(statement.body, tests)


def _filling(body: Sequence[ast.stmt], thing: str) -> ast.Call | None:
    """The first call of a branch that fills what the loop is at."""
    for statement in body:
        for node in ast.walk(statement):
            if not isinstance(node, ast.Call):
                continue
            function = node.func
            called = getattr(function, "attr", getattr(function, "id", ""))
            used = (n.id for n in ast.walk(node) if isinstance(n, ast.Name))
            if _is_initialiser(called) and thing in used:
                return node
    return None


def _instead(test: ast.expr, name: str, near: Sequence[str]) -> str:
    """A test that holds for the names that are meant; empty where one cannot be told."""
    texts = [n.value for n in ast.walk(test) if isinstance(n, ast.Constant)
             and isinstance(n.value, str)]  # fmt: skip
    if len(texts) != 1:
        return ""
    text = texts[0].strip(".")
    if all(n.endswith(f".{text}") for n in near):
        return f'{name}.endswith(".{text}")'
    return f'"{text}" in {name}'


# --------------------------------------------------------------------------- tests of a name


def _holds(test: ast.expr | _Tests, variable: str, name: str, near: bool = False) -> bool | None:
    """Whether a test, or all of several, hold where the variable has this name; None where that
    depends on something else. ``near``: whether it would if only a part of the name were compared,
    from one dot to another."""

    def of(inner: ast.expr) -> bool | None:
        return _holds(inner, variable, name, near)

    match test:
        case tuple():
            return _every([of(one) for one in test])
        case ast.BoolOp(op=ast.And(), values=values):
            return _every([of(one) for one in values])
        case ast.BoolOp(op=ast.Or(), values=values):
            return _negated(_every([_negated(of(one)) for one in values]))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return _negated(_holds(operand, variable, name))
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _compared(left, op, right, variable, name, near)
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id=of_name), attr=("startswith" | "endswith") as end),
            args=[argument],
        ) if of_name == variable:
            texts = _texts(argument)
            if texts is None:
                return None
            if near:
                return any(_is_part(text, name) for text in texts)
            return name.startswith(texts) if end == "startswith" else name.endswith(texts)
    return None


def _compared(
    left: ast.expr, op: ast.cmpop, right: ast.expr, variable: str, name: str, near: bool
) -> bool | None:
    if isinstance(op, ast.NotEq | ast.NotIn):
        positive = ast.Eq() if isinstance(op, ast.NotEq) else ast.In()
        return _negated(_compared(left, positive, right, variable, name, near=False))
    if _is_variable(right, variable) and isinstance(op, ast.In):
        texts = _texts(left)
        return None if texts is None or len(texts) != 1 else texts[0] in name
    if isinstance(op, ast.Eq) and _is_variable(right, variable):
        left, right = right, left
    if not _is_variable(left, variable) or not isinstance(op, ast.Eq | ast.In):
        return None
    if isinstance(op, ast.In) and isinstance(right, ast.Constant):
        return name in right.value if isinstance(right.value, str) else None
    texts = _texts(right)
    if texts is None:
        return None
    return any(_is_part(text, name) if near else text == name for text in texts)


def _is_variable(node: ast.expr, variable: str) -> bool:
    return isinstance(node, ast.Name) and node.id == variable


def _texts(node: ast.expr) -> tuple[str, ...] | None:
    """The strings of a literal or of a display of literals."""
    parts = node.elts if isinstance(node, ast.Tuple | ast.List | ast.Set) else [node]
    found = [p.value for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str)]
    return tuple(found) if len(found) == len(parts) else None


def _is_part(text: str, name: str) -> bool:
    text = text.strip(".")
    return bool(text) and f".{text}." in f".{name}."


def _every(values: Sequence[bool | None]) -> bool | None:
    if any(value is False for value in values):
        return False
    return None if any(value is None for value in values) else True


def _negated(value: bool | None) -> bool | None:
    return None if value is None else not value
