"""Tables of functions by name, filled by decorators where the functions are defined."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def registering(table: dict[str, F]) -> Callable[..., Callable[[F], F]]:
    """A decorator that takes names, under each of which it puts the function into ``table``."""

    def names_of(*names: str) -> Callable[[F], F]:
        def register(function: F) -> F:
            table.update(dict.fromkeys(names, function))
            return function

        return register

    return names_of
