"""A static linter for neural-network architectures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archlint.errors import ArchlintError
    from archlint.finding import Finding
    from archlint.linter import Report, check

__version__ = "0.1.0"
__all__ = ["ArchlintError", "Finding", "Report", "__version__", "check"]

_HOMES = {"ArchlintError": "errors", "Finding": "finding", "Report": "linter", "check": "linter"}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: ``archlint --help`` must not load onnx."""
    if name not in _HOMES:
        raise AttributeError(f"module 'archlint' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"archlint.{_HOMES[name]}"), name)
