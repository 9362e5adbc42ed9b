"""From a target to its findings: load, analyse, run the rules, one finding for one cause."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archlint.config import Config
from archlint.errors import ArchlintError
from archlint.finding import Finding, NotApplicable, Severity
from archlint.rule import Context, Registry, Rule, options_from, registry
from archlint.target import Target, resolve

if TYPE_CHECKING:
    from archlint.graph.model import LayerGraph
    from archlint.signal.analysis import Analysis


@dataclass(frozen=True)
class Silence:
    """Why a rule said nothing about a place."""

    code: str
    reason: str
    where: str = ""


@dataclass(frozen=True)
class TargetReport:
    """What was found in one target. ``error`` is set where it could not be linted."""

    target: str
    findings: tuple[Finding, ...] = ()
    input: Mapping[str, str] = field(default_factory=dict)
    mode: str = "train"
    weights: str = "initial"
    weights_evidence: str = ""
    nodes: int = 0
    modelled: int = 0
    unmodelled: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    silences: tuple[Silence, ...] = ()
    error: ArchlintError | None = None


@dataclass(frozen=True)
class Report:
    """The result of a run, target by target."""

    targets: tuple[TargetReport, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings of all targets."""
        return tuple(finding for target in self.targets for finding in target.findings)

    @property
    def errors(self) -> tuple[ArchlintError, ...]:
        """What could not be linted."""
        return tuple(target.error for target in self.targets if target.error is not None)

    def exit_code(self, fail_on: str = "error") -> int:
        """0 clean, 1 findings at or above ``fail_on``, 2 a target that could not be linted."""
        if self.errors:
            return 2
        if fail_on == "never":
            return 0
        least = Severity[fail_on.upper()]
        return int(any(finding.severity >= least for finding in self.findings))

    def __str__(self) -> str:
        from archlint.report.concise import render

        return render(self)

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(str(self))}</pre>"


def chosen_rules(config: Config, known: Registry | None = None) -> list[Rule]:
    """The rules that a configuration selects, with their options."""
    known = known or registry(Path(p) for p in config.rule_paths)
    for slug in config.rules:
        if known.get(slug) is None:
            raise ArchlintError(
                f"[tool.archlint.rules] names the rule {slug!r}, which does not exist",
                "`archlint rule --all` lists the rules",
            )
    selected = known.select(config.select)
    ignored = {rule.code for rule in known.select(config.ignore)} if config.ignore else set()
    context = Context("adam" if config.optimizer == "adam" else "sgd")
    return [
        rule(options_from(rule, config.rules.get(rule.slug, {})), context)
        for rule in selected
        if rule.code not in ignored
    ]


def lint(
    analysis: Analysis, rules: Iterable[Rule]
) -> tuple[tuple[Finding, ...], tuple[Silence, ...]]:
    """Run rules over an analysis; a finding whose cause another rule explains is left out."""
    findings: list[Finding] = []
    silences: list[Silence] = []
    off = _no_initialization(analysis.graph)
    yields: dict[str, tuple[str, ...]] = {}
    for rule in rules:
        yields[rule.code] = rule.yields_to
        if off and rule.needs_initial_weights:
            silences.append(Silence(rule.code, off))
            continue
        for result in rule.check(analysis):
            if isinstance(result, NotApplicable):
                silences.append(Silence(rule.code, result.reason, result.where))
            else:
                findings.append(result)
    kept = []
    for finding in findings:
        better = _says_it_better(finding, findings, yields)
        if better is not None:
            silences.append(Silence(finding.code, f"reported as {better.code}", finding.module))
        else:
            kept.append(finding)
    kept.sort(key=lambda finding: (-finding.severity, finding.code, finding.module))
    return tuple(kept), tuple(silences)


def _says_it_better(
    finding: Finding, others: Sequence[Finding], yields: Mapping[str, tuple[str, ...]]
) -> Finding | None:
    """Another rule's finding of the same cause: the graver one, or the one that is yielded to."""
    for other in others:
        if other.cause != finding.cause or not finding.cause or other.code == finding.code:
            continue
        if other.code in yields[finding.code] and other.severity >= finding.severity:
            return other
        if finding.code in yields[other.code] and other.severity > finding.severity:
            return other
    return None


def _no_initialization(graph: LayerGraph) -> str:
    """Why nothing can be said about the initialization of a network; empty where it can."""
    if graph.weights == "trained":
        return "the weights are trained"
    matrices = [p.law for p in graph.parameters.values() if len(p.shape) > 1 and p.law is not None]
    if matrices and 2 * sum(law.random for law in matrices) <= len(matrices):
        return "most weights are constants: the file holds a topology"
    return ""


def load(target: Target, mode: str = "train") -> LayerGraph:
    """The layer graph of a target."""
    from archlint.graph.from_onnx import load_onnx

    return load_onnx(target.path, target.inputs or None, "eval" if mode == "eval" else "train")


def check(
    target: str | Path | Sequence[str | Path],
    inputs: Mapping[str, Any] | None = None,
    config: Config | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Lint one target or several.

    ``inputs`` maps an input's name to (shape, type); ``progress`` is told of each target before it
    is read. Raises ArchlintError for a bad configuration; a target that cannot be read is reported
    in its place.
    """
    config = config or Config()
    rules = chosen_rules(config)
    every = [target] if isinstance(target, str | Path) else list(target)
    reports = []
    for one in every:
        if progress is not None:
            progress(str(one))
        reports.append(_check_one(one, inputs, config, rules))
    return Report(tuple(reports))


def _check_one(
    target: str | Path, inputs: Mapping[str, Any] | None, config: Config, rules: Sequence[Rule]
) -> TargetReport:
    """Lint one target; whatever goes wrong stays with it, so that the others are linted."""
    try:
        return _linted(target, inputs, config, rules)
    except ArchlintError as error:
        return TargetReport(str(target), error=error)
    except Exception as error:  # a mistake of archlint's own
        if "ARCHLINT_DEBUG" in os.environ:
            raise
        return TargetReport(str(target), error=ArchlintError(
            f"{target}: archlint failed on this model: {type(error).__name__}: {error}",
            "this is a mistake of archlint: please report it, with the traceback that "
            "ARCHLINT_DEBUG=1 shows"))  # fmt: skip


def _linted(
    target: str | Path, inputs: Mapping[str, Any] | None, config: Config, rules: Sequence[Rule]
) -> TargetReport:
    graph = load(resolve(target, inputs), config.mode)
    from archlint.signal.analysis import analyse

    analysis = analyse(graph)
    findings, silences = lint(analysis, rules)
    coverage = analysis.coverage
    shapes = {
        value: "x".join("?" if n is None else str(n) for n in graph.shape(value) or ())
        for value in graph.inputs
    }
    return TargetReport(
        str(target), findings, shapes, graph.mode, graph.weights, graph.weights_evidence,
        coverage.nodes, coverage.modelled, coverage.unmodelled, graph.notes, silences,
    )  # fmt: skip
