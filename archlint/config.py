"""``[tool.archlint]`` of pyproject.toml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from archlint.errors import ArchlintError
from archlint.target import Configured, parse_inputs


@dataclass(frozen=True)
class Ignore:
    """One ``[[tool.archlint.ignore]]``: findings that are known and accepted.

    ``rules`` are codes, prefixes or slugs; ``target`` and ``path`` are globs that the target's name
    and the finding's module paths have to match.
    """

    rules: tuple[str, ...]
    reason: str
    target: str = "*"
    path: str = "*"


@dataclass(frozen=True)
class Config:
    """What may be configured; the command line overrides it.

    ``targets``: what a bare ``archlint`` lints. ``select``, ``ignore``: rule codes, prefixes or
    slugs; ``ignores``: those that are ignored in some places. ``timeout``: seconds that a Python
    target's code may take. ``rules``: options of a rule by its slug. ``rule_paths``: folders of
    further rules.
    """

    targets: tuple[Configured, ...] = ()
    select: tuple[str, ...] = ("ALL",)
    ignore: tuple[str, ...] = ()
    ignores: tuple[Ignore, ...] = ()
    timeout: float = 300.0
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
    import tomllib

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
    known = {f.name.replace("_", "-"): f.name for f in fields(Config) if f.name != "ignores"}
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            import difflib

            near = difflib.get_close_matches(key, known, 1)
            raise ArchlintError(
                f"{path}: [tool.archlint] has no setting {key!r}",
                f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(sorted(known))}",
            )
        values[known[key]] = _setting(path, key, value)
    if "ignore" in values:
        codes = tuple(item for item in values["ignore"] if isinstance(item, str))
        values["ignores"] = tuple(i for i in values["ignore"] if not isinstance(i, str))
        values["ignore"] = codes
    if "rule_paths" in values:
        values["rule_paths"] = tuple(str(path.parent / p) for p in values["rule_paths"])
    return Config(**values)


def _setting(path: Path, key: str, value: Any) -> Any:
    """One setting, checked."""
    if key == "targets":
        return tuple(_target(path, item) for item in _list_of(path, key, value, str | dict))
    if key == "ignore":
        items = _list_of(path, key, value, str | dict)
        return tuple(item if isinstance(item, str) else _ignore(path, item) for item in items)
    if key in ("select", "rule-paths"):
        return tuple(_list_of(path, key, value, str))
    if key == "timeout":
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise ArchlintError(f"{path}: timeout is {value!r}", "it takes a number of seconds")
        return float(value)
    if not isinstance(value, dict if key == "rules" else str):
        kind = "a table" if key == "rules" else "a string"
        raise ArchlintError(f"{path}: {key} is {value!r}", f"it takes {kind}")
    if key in _CHOICES and value not in _CHOICES[key]:
        raise ArchlintError(
            f"{path}: {key} is {value!r}", f"it is one of {', '.join(_CHOICES[key])}"
        )
    return value


def _list_of(path: Path, key: str, value: Any, kind: Any) -> list[Any]:
    if not isinstance(value, list) or not all(isinstance(item, kind) for item in value):
        items = "strings" if kind is str else "strings or tables"
        raise ArchlintError(f"{path}: {key} is {value!r}", f"it takes a list of {items}")
    return value


def _target(path: Path, item: str | dict[str, Any]) -> Configured:
    """A target that is a string, or a table with ``target``, ``inputs``, ``kwargs``."""
    table: dict[str, Any] = {"target": item} if isinstance(item, str) else item
    _check_table(path, "targets", table, {"target": str, "inputs": dict | list, "kwargs": dict},
                 ("target",))  # fmt: skip
    given: Any = table.get("inputs", [])
    if isinstance(given, dict):
        given = [f"{name}:{value}" for name, value in given.items()]
    if not all(isinstance(text, str) for text in given):
        raise ArchlintError(f"{path}: inputs is {given!r}", 'write ["x:2x3x32x32"]')
    try:
        inputs = parse_inputs(given)
    except ArchlintError as error:
        raise ArchlintError(f"{path}: {error.message}", error.hint) from error
    return Configured(table["target"], path.parent, inputs, table.get("kwargs", {}))


def _ignore(path: Path, table: dict[str, Any]) -> Ignore:
    _check_table(path, "ignore", table,
                 {"rules": list, "reason": str, "target": str, "path": str},
                 ("rules", "reason"))  # fmt: skip
    rules = tuple(_list_of(path, "rules", table["rules"], str))
    if not table["reason"].strip() or not rules:
        raise ArchlintError(
            f"{path}: [[tool.archlint.ignore]] without rules or reason", "say why it is accepted"
        )
    return Ignore(rules, table["reason"], table.get("target", "*"), table.get("path", "*"))


def _check_table(
    path: Path, key: str, table: dict[str, Any], kinds: dict[str, Any], needed: tuple[str, ...]
) -> None:
    for name in needed:
        if name not in table:
            raise ArchlintError(
                f"{path}: a table of {key} has no {name!r}", f"it takes {', '.join(kinds)}"
            )
    for name, value in table.items():
        if name not in kinds or not isinstance(value, kinds[name]):
            raise ArchlintError(
                f"{path}: a table of {key} has {name} = {value!r}", f"it takes {', '.join(kinds)}"
            )
