"""Run rules on models in tests: for archlint's own rules and for authors of rule packs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from archlint.config import Config
from archlint.finding import Finding, Severity
from archlint.linter import chosen_rules, lint
from archlint.rule import Rule

_BLOCK = re.compile(r"## (Example|Use instead)\n```python\n(.*?)```", re.S)
_MARK = re.compile(r"#\s*error:\s*(ARC\d+|[A-Z]+\d+)")


@dataclass(frozen=True)
class Example:
    """A model on a rule's page. ``marks`` are (line, code) of its ``# error: CODE`` comments."""

    heading: str
    source: str
    marks: tuple[tuple[int, str], ...]


def examples(rule: type[Rule]) -> list[Example]:
    """The models on a rule's page, torch and nn imported."""
    found = []
    for heading, body in _BLOCK.findall(rule.page()):
        source = f"import torch\nfrom torch import nn\n\n\n{body}"
        marks = tuple(
            (i, match.group(1))
            for i, line in enumerate(source.splitlines(), 1)
            if (match := _MARK.search(line))
        )
        found.append(Example(heading, source, marks))
    return found


def lint_module(
    build: Callable[[], Any], inputs: Any = None, rules: Sequence[Rule] | None = None
) -> tuple[Finding, ...]:
    """The findings on a model that ``build`` makes; all rules where none are given. Its
    construction is watched: laws and sites are the initializers', and no weight is drawn."""
    from archlint.graph.from_torch import load_torch
    from archlint.signal.analysis import analyse

    graph = load_torch(build, inputs)
    return lint(analyse(graph), chosen_rules(Config()) if rules is None else rules)[0]


def load_source(path: Path) -> ModuleType:
    """A Python file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"archlint_example_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_examples(rule: type[Rule], folder: Path) -> None:
    """Assert that a rule's page keeps its word: the example raises exactly this code on the marked
    line, the repaired model nothing at all above a remark."""
    every = examples(rule)
    assert [example.heading for example in every] == ["Example", "Use instead"], rule.code
    for example in every:
        path = folder / f"{rule.slug.replace('-', '_')}_{example.heading.split()[0].lower()}.py"
        path.write_text(example.source, encoding="utf-8")
        found = lint_module(load_source(path).Net)
        if example.heading == "Example":
            assert {finding.code for finding in found} == {rule.code}, [f.message for f in found]
            lines = [(f.site.line, f.code) for f in found if f.site is not None]
            assert lines == list(example.marks), rule.code
        else:
            loud = [finding for finding in found if finding.severity > Severity.INFO]
            assert not loud, [finding.message for finding in loud]
