"""A rule, the registry, and the loader of a folder of rule modules.

A rule is one class in one file, found without being listed anywhere: the loader imports every
``*.py`` of a folder and registers each :class:`Rule` subclass that the file defines.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from archlint.errors import ArchlintError
from archlint.finding import Finding, NotApplicable, Severity

if TYPE_CHECKING:  # a rule's page must load without numpy
    from archlint.signal.analysis import Analysis

Stability = Literal["preview", "stable"]
Optimizer = Literal["sgd", "adam"]


@dataclass(frozen=True)
class NoOptions:
    """For rules without options."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a rule is told besides the analysis: the optimizer that training will use."""

    optimizer: Optimizer = "sgd"


class Rule(ABC):
    """One check. The docstring is its page (``archlint rule CODE``).

    Class attributes: ``code`` (ARC101), ``slug`` (length-drift), ``severity`` (the greatest it can
    report), ``stability``, ``since`` (version), ``references``. ``Options`` is a frozen dataclass
    whose fields become ``[tool.archlint.rules.<slug>]``.
    """

    code: ClassVar[str]
    slug: ClassVar[str]
    severity: ClassVar[Severity]
    stability: ClassVar[Stability] = "stable"
    since: ClassVar[str]
    references: ClassVar[tuple[str, ...]] = ()
    needs_initial_weights: ClassVar[bool] = False  # off for trained files
    yields_to: ClassVar[tuple[str, ...]] = ()  # codes whose finding of the same cause says it all
    Options: ClassVar[type[Any]] = NoOptions

    def __init__(self, options: Any = None, context: Context | None = None) -> None:
        self.options: Any = self.Options() if options is None else options
        self.context = context or Context()

    @abstractmethod
    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        """Yield findings, or say why the rule does not apply."""

    def finding(self, severity: Severity, message: str, module: str, **rest: Any) -> Finding:
        """A finding of this rule."""
        return Finding(self.code, self.slug, severity, message, module, **rest)

    @classmethod
    def title(cls) -> str:
        """The first line of the page."""
        return (inspect.getdoc(cls) or "").split("\n", 1)[0].strip()

    @classmethod
    def page(cls) -> str:
        """The whole page, markdown."""
        return inspect.getdoc(cls) or ""


@dataclass(frozen=True)
class Registry:
    """The rules at hand, by code."""

    rules: Mapping[str, type[Rule]] = field(default_factory=dict)

    def __iter__(self) -> Iterator[type[Rule]]:
        return iter(self.rules.values())

    def get(self, code_or_slug: str) -> type[Rule] | None:
        """A rule by its code or slug, in any case."""
        wanted = code_or_slug.strip().lower()
        for rule in self:
            if wanted in (rule.code.lower(), rule.slug):
                return rule
        return None

    def select(self, prefixes: Iterable[str]) -> list[type[Rule]]:
        """The rules whose code starts with, or slug equals, one of the prefixes; ``ALL`` is all.

        Raises ArchlintError for a prefix that fits no rule.
        """
        chosen: dict[str, type[Rule]] = {}
        for prefix in prefixes:
            wanted = prefix.strip()
            hits = [
                r
                for r in self
                if wanted.upper() == "ALL"
                or r.code.startswith(wanted.upper())
                or r.slug == wanted.lower()
            ]
            if not hits or not wanted:
                raise ArchlintError(
                    f"no rule is called {prefix!r}",
                    "`archlint rule --all` lists the rules; a prefix such as ARC1 selects a family",
                )
            chosen.update((r.code, r) for r in hits)
        return [r for r in self if r.code in chosen]


def options_from(rule: type[Rule], table: Mapping[str, object]) -> Any:
    """A rule's options from a configuration table; ArchlintError names what does not fit."""
    known = (
        {f.name.replace("_", "-"): f for f in fields(rule.Options)}
        if is_dataclass(rule.Options)
        else {}
    )
    values: dict[str, object] = {}
    for key, value in table.items():
        if key not in known:
            raise ArchlintError(
                f"rule {rule.slug} has no option {key!r}",
                f"its options are: {', '.join(known) or 'none'}",
            )
        default = known[key].default
        wanted = (float, int) if type(default) is float else (type(default),)
        if not isinstance(value, wanted) or (isinstance(value, bool) and type(default) is not bool):
            raise ArchlintError(
                f"option {key!r} of rule {rule.slug} is {value!r}",
                f"it takes a value like {default!r}",
            )
        values[known[key].name] = float(value) if type(default) is float else value  # type: ignore[arg-type]
    return rule.Options(**values)


def rules_folder() -> Path:
    """The folder of archlint's own rules: beside the package in a checkout, else inside it."""
    package = Path(__file__).resolve().parent
    installed = package / "rules"
    return installed if installed.is_dir() else package.parent / "rules"


def _load(path: Path) -> ModuleType:
    name = f"_archlint_rules_{abs(hash(str(path.parent)))}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ArchlintError(f"cannot load the rule file {path}", "it must be a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ArchlintError(
            f"the rule file {path} cannot be loaded: {type(error).__name__}: {error}",
            "fix the file or take its folder out of `rule-paths`",
        ) from error
    return module


def load_folder(folder: Path) -> list[type[Rule]]:
    """The rules that the files of a folder define, sorted by code."""
    if not folder.is_dir():
        raise ArchlintError(f"the rules folder {folder} does not exist", "check `rule-paths`")
    found: list[type[Rule]] = []
    for path in sorted(folder.glob("*.py")):
        if path.name.startswith("_"):
            continue
        module = _load(path)
        found += [
            item
            for item in vars(module).values()
            if isinstance(item, type)
            and issubclass(item, Rule)
            and item.__module__ == module.__name__
            and not inspect.isabstract(item)
        ]
    return sorted(found, key=lambda rule: rule.code)


def registry(extra: Iterable[Path] = ()) -> Registry:
    """All rules: archlint's own, those of installed packages (entry point group
    ``archlint.rules``, each naming a package or module whose folder is loaded), those of ``extra``.

    Raises ArchlintError when two rules share a code or slug.
    """
    folders = [rules_folder()]
    for point in entry_points(group="archlint.rules"):
        spec = importlib.util.find_spec(point.value)
        if spec is not None and spec.submodule_search_locations:
            folders += [Path(location) for location in spec.submodule_search_locations]
    rules: dict[str, type[Rule]] = {}
    for folder in dict.fromkeys(f.resolve() for f in (*folders, *extra)):
        for rule in load_folder(folder):
            other = next(
                (r for r in rules.values() if rule.code == r.code or rule.slug == r.slug), None
            )
            if other is not None:
                raise ArchlintError(
                    f"two rules are called {rule.code} ({rule.slug}): in {inspect.getfile(other)} "
                    f"and in {inspect.getfile(rule)}",
                    "give one of them another code and slug",
                )
            rules[rule.code] = rule
    return Registry(dict(sorted(rules.items())))
