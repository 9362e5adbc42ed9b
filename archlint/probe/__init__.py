"""Experiments: the only part that computes with weights. ``archlint.probe(target)`` runs them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archlint.config import Config
    from archlint.linter import Report
    from archlint.probe.options import ProbeOptions


def probe(
    target: Any,
    inputs: Mapping[str, Any] | None = None,
    config: Config | None = None,
    kwargs: Mapping[str, Any] | None = None,
    options: ProbeOptions | None = None,
) -> Report:
    """Lint a target as :func:`archlint.check` does, and give every finding a verdict by drawing the
    network many times."""
    from archlint.linter import check
    from archlint.probe.options import ProbeOptions

    return check(target, inputs, config, None, kwargs, options or ProbeOptions())


class _Callable(ModuleType):
    """The package is its own function: it has the name that the public function has."""

    def __call__(self, *args: Any, **kwargs: Any) -> Report:
        return probe(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
