"""``[tool.archlint]`` of pyproject.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from archlint.errors import ArchlintError


@dataclass(frozen=True)
class Config:
    """What may be configured; the command line overrides it.

    ``targets``: what a bare ``archlint`` lints. ``select``, ``ignore``: rule codes, prefixes or
    slugs. ``rules``: options of a rule by its slug. ``rule_paths``: folders of further rules.
    """

    targets: tuple[str, ...] = ()
    select: tuple[str, ...] = ("ALL",)
    ignore: tuple[str, ...] = ()
    fail_on: str = "error"
    optimizer: str = "sgd"
    mode: str = "train"
    rule_paths: tuple[str, ...] = ()
    rules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_CHOICES = {
    "fail-on": ("error", "warning", "info", "never"),
    "optimizer": ("sgd", "adam"),
    "mode": ("train", "eval"),
}


def find_config(start: Path | None = None) -> Path | None:
    """The nearest pyproject.toml with a ``[tool.archlint]`` table, upwards from a folder."""
    folder = (start or Path.cwd()).resolve()
    for candidate in (folder, *folder.parents):
        path = candidate / "pyproject.toml"
        if path.is_file() and "archlint" in _read(path).get("tool", {}):
            return path
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ArchlintError(f"{path} cannot be read: {error}", "fix the file") from error


def load_config(path: Path | None = None) -> Config:
    """The configuration of a file, else of the nearest pyproject.toml, else the default."""
    path = path or find_config()
    if path is None:
        return Config()
    table = _read(path).get("tool", {}).get("archlint", {})
    known = {f.name.replace("_", "-"): f for f in fields(Config)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            raise ArchlintError(
                f"{path}: [tool.archlint] has no setting {key!r}",
                f"it has: {', '.join(sorted(known))}",
            )
        default = getattr(Config(), known[key].name)
        wanted = list if isinstance(default, tuple) else dict if key == "rules" else str
        if not isinstance(value, wanted) or (
            wanted is list and not all(isinstance(item, str) for item in value)
        ):
            raise ArchlintError(
                f"{path}: {key} is {value!r}",
                "it takes a list of strings" if wanted is list else f"it takes a {wanted.__name__}",
            )
        if key in _CHOICES and value not in _CHOICES[key]:
            raise ArchlintError(
                f"{path}: {key} is {value!r}", f"it is one of {', '.join(_CHOICES[key])}"
            )
        values[known[key].name] = tuple(value) if wanted is list else value
    if "rule_paths" in values:
        values["rule_paths"] = tuple(str(path.parent / p) for p in values["rule_paths"])
    return Config(**values)
