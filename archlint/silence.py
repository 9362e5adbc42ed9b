"""Findings that are not reported, and why: by a comment at the line, by the configuration."""

from __future__ import annotations

import io
import linecache
import re
import tokenize
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from archlint.config import Config, Ignore
from archlint.finding import Finding, Site
from archlint.rule import Registry


@dataclass(frozen=True)
class Silence:
    """Why a rule said nothing about a place."""

    code: str
    reason: str
    where: str = ""


_COMMENT = re.compile(r"#\s*archlint:\s*ignore\[([^\]]*)\]\s*(.*)")


@dataclass
class Suppressions:
    """What a run is told to be quiet about."""

    config: Config
    known: Registry
    _files: dict[str, dict[int, tuple[str, str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for ignore in self.config.ignores:
            self.known.select(ignore.rules)  # a rule that does not exist is a mistake

    def apply(
        self, target: str, findings: Iterable[Finding]
    ) -> tuple[tuple[Finding, ...], tuple[Silence, ...]]:
        """The findings that are to be reported, and the others with the reason."""
        kept: list[Finding] = []
        silent: list[Silence] = []
        for finding in findings:
            reason = self._commented(finding) or self._configured(target, finding)
            if reason:
                silent.append(Silence(finding.code, reason, finding.module))
            else:
                kept.append(finding)
        return tuple(kept), tuple(silent)

    def _configured(self, target: str, finding: Finding) -> str:
        for ignore in self.config.ignores:
            if fnmatchcase(target, ignore.target) and self._meant(ignore, finding):
                return f"ignored by the configuration: {ignore.reason}"
        return ""

    def _meant(self, ignore: Ignore, finding: Finding) -> bool:
        if finding.code not in {rule.code for rule in self.known.select(ignore.rules)}:
            return False
        return fnmatchcase(finding.module, ignore.path) or (
            bool(finding.modules) and all(fnmatchcase(m, ignore.path) for m in finding.modules)
        )

    def _commented(self, finding: Finding) -> str:
        site = finding.site
        if site is None or site.line is None:
            return ""
        comments = self._comments(site)
        for line in range(site.line, (site.end_line or site.line) + 1):
            codes, reason = comments.get(line, ("", ""))
            if {finding.code.lower(), finding.slug} & set(re.split(r"[\s,]+", codes.lower())):
                why = f": {reason.strip()}" if reason.strip() else ""
                return f"ignored by a comment at {Site(site.file, line)}{why}"
        return ""

    def _comments(self, site: Site) -> dict[int, tuple[str, str]]:
        """Line -> codes and reason of the comments in a file, read once."""
        if site.file not in self._files:
            linecache.checkcache(site.file)
            self._files[site.file] = comments("".join(linecache.getlines(site.file)))
        return self._files[site.file]


def comments(source: str) -> dict[int, tuple[str, str]]:
    """Line -> codes and reason of each ``# archlint: ignore[CODE] reason`` in Python source."""
    if "archlint:" not in source:
        return {}
    found: dict[int, tuple[str, str]] = {}
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and (match := _COMMENT.search(token.string)):
                found[token.start[0]] = (match.group(1), match.group(2))
    except (tokenize.TokenError, SyntaxError):
        pass  # what came before counts
    return found
