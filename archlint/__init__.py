"""A static linter for neural-network architectures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from archlint.config import Config
    from archlint.errors import ArchlintError
    from archlint.finding import Finding
    from archlint.linter import Report, check
    from archlint.probe import probe
    from archlint.profiling import Profile, profile

__version__ = "0.1.0"
__all__ = [
    "ArchlintError",
    "Config",
    "Finding",
    "Profile",
    "Report",
    "__version__",
    "check",
    "probe",
    "profile",
]

_HOMES = {
    "ArchlintError": "errors",
    "Config": "config",
    "Finding": "finding",
    "Profile": "profiling",
    "Report": "linter",
    "check": "linter",
    "probe": "probe",
    "profile": "profiling",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used: ``archlint --help`` must not load onnx."""
    if name not in _HOMES:
        raise AttributeError(f"module 'archlint' has no attribute {name!r}")
    from importlib import import_module

    found = import_module(f"archlint.{_HOMES[name]}")
    return found if name == "probe" else getattr(found, name)  # the package is its function
