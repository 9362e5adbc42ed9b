"""From a target to its findings: load, analyse, run the rules, one finding for one cause."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archlint.config import Config
from archlint.errors import ArchlintError
from archlint.finding import Finding, NotApplicable, Severity, Training
from archlint.rule import Context, Registry, Rule, options_from, registry
from archlint.silence import Silence, Suppressions
from archlint.target import Configured, Target, resolve

if TYPE_CHECKING:
    from archlint.graph.model import LayerGraph, Mode
    from archlint.probe.options import ProbeOptions
    from archlint.signal.analysis import Analysis


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
    probe_remarks: tuple[str, ...] = ()
    training: Training | None = None  # whether the network starts, where the probe trained it
    interrupted: bool = False  # the probe, by the user: what is decided is there


@dataclass(frozen=True)
class Report:
    """The result of a run, target by target. ``remarks`` are on what was not looked at."""

    targets: tuple[TargetReport, ...]
    remarks: tuple[str, ...] = ()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The findings of all targets."""
        return tuple(finding for target in self.targets for finding in target.findings)

    @property
    def errors(self) -> tuple[ArchlintError, ...]:
        """What could not be linted."""
        return tuple(target.error for target in self.targets if target.error is not None)

    def exit_code(self, fail_on: str = "error") -> int:
        """0 clean, 1 findings at or above ``fail_on`` that no experiment refuted, 2 a target that
        could not be linted, 130 a probe that was interrupted."""
        if any(target.interrupted for target in self.targets):
            return 130
        if self.errors:
            return 2
        if fail_on == "never":
            return 0
        least = Severity[fail_on.upper()]
        return int(any(finding.severity >= least and finding.verdict != "refuted"
                       for finding in self.findings))  # fmt: skip

    def __str__(self) -> str:
        from archlint.report.concise import render

        failed = "".join(f"error: {error}\n" for error in self.errors)
        return failed + render(self)

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
    # layers that are used several times, as a head on every level of a pyramid, are found each time
    first: dict[object, Finding] = {}
    for finding in kept:
        first.setdefault((finding.code, finding.modules or finding.module, finding.site), finding)
    return tuple(first.values()), tuple(silences)


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
    if graph.source != "onnx":
        return ""
    matrices = [p.law for p in graph.parameters.values() if len(p.shape) > 1 and p.law is not None]
    if matrices and 2 * sum(law.random for law in matrices) <= len(matrices):
        return "most weights are constants: the file holds a topology"
    return ""


def load(target: Target, mode: str = "train", timeout: float | None = None) -> LayerGraph:
    """The layer graph of a target. ``timeout`` limits the seconds that Python code may take."""
    how: Mode = "eval" if mode == "eval" else "train"
    if target.is_onnx:
        from archlint.graph.from_onnx import load_onnx

        assert target.path is not None  # a file
        return load_onnx(target.path, onnx_inputs(target), how)
    from archlint.python_target import load_python

    return load_python(target, how, timeout)


def onnx_inputs(target: Target) -> Mapping[str, Any] | None:
    """Shapes and types by name: what an ONNX file is told, whatever form they were given in."""
    if not target.inputs:
        return None
    if not isinstance(target.inputs, Mapping):
        raise ArchlintError(f"{target.name}: inputs have no names", "give {name: shape}")
    return {name: _described(value) for name, value in target.inputs.items()}


def _described(value: Any) -> tuple[tuple[int | None, ...], str | None]:
    if hasattr(value, "shape"):  # a tensor or an array
        return tuple(value.shape), str(value.dtype).removeprefix("torch.")
    if len(value) == 2 and not isinstance(value[0], int | None):
        return value[0], value[1]
    return tuple(value), None


def check(
    target: Any,
    inputs: Mapping[str, Any] | None = None,
    config: Config | None = None,
    progress: Callable[[str], None] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    probe: ProbeOptions | None = None,
    finished: list[TargetReport] | None = None,
) -> Report:
    """Lint one target or several (a list).

    A target is a string as on the command line, a path, an ``nn.Module``, an exported program, or
    a callable that builds the model. ``inputs`` maps an input's name to a shape, to (shape, type)
    or to a tensor; ``kwargs`` are handed to what a string names; ``progress`` is told of each
    target before it is read; ``probe`` asks for an experiment on every finding; ``finished`` is
    filled with the reports as they are made.
    Raises ArchlintError for a bad configuration; a target that cannot be
    read is reported in its place.
    """
    config = config or Config()
    known = registry(Path(p) for p in config.rule_paths)
    rules = chosen_rules(config, known)
    suppressions = Suppressions(config, known)
    reports: list[TargetReport] = finished if finished is not None else []
    remarks: list[str] = []
    for one in target if isinstance(target, list | tuple) else [target]:
        name = str(one) if isinstance(one, str | Path | Configured) else ""
        if progress is not None:
            progress(name)
        try:
            models, remark = models_of(resolve(one, inputs, kwargs), config.timeout)
        except ArchlintError as error:
            reports.append(TargetReport(name or type(one).__name__, error=error))
            continue
        remarks += remark
        for model in models:
            reports.append(_check_one(model, config, rules, suppressions, probe))
            if reports[-1].interrupted:
                return Report(tuple(reports), tuple(remarks))
    return Report(tuple(reports), tuple(remarks))


def models_of(target: Target, timeout: float | None) -> tuple[list[Target], list[str]]:
    """A target as it is; one that names a whole Python file as the models in it, with remarks on
    what was left out."""
    if target.reference is None or target.reference.attribute:
        return [target], []
    from archlint.python_target import targets_in

    found, needy = targets_in(target, timeout)
    left_out = f"{target.name}: not linted, since they need arguments: {', '.join(needy)}"
    return found, [left_out] if needy else []


def one_model(target: Target, timeout: float | None) -> Target:
    """The only model of a target. Raises ArchlintError where a file holds several."""
    models, _ = models_of(target, timeout)
    if len(models) > 1:
        names = ", ".join(model.name for model in models[:8])
        raise ArchlintError(f"{target.name} holds {len(models)} models", f"name one: {names}")
    return models[0]


def _check_one(
    target: Target,
    config: Config,
    rules: Sequence[Rule],
    suppressions: Suppressions,
    probe: ProbeOptions | None = None,
) -> TargetReport:
    """Lint one target; whatever goes wrong stays with it, so that the others are linted."""
    try:
        return _linted(target, config, rules, suppressions, probe)
    except ArchlintError as error:
        return TargetReport(target.name, error=error)
    except Exception as error:  # a mistake of archlint's own
        if "ARCHLINT_DEBUG" in os.environ:
            raise
        return TargetReport(target.name, error=ArchlintError(
            f"{target.name}: archlint failed on this model: {type(error).__name__}: {error}",
            "this is a mistake of archlint: please report it, with the traceback that "
            "ARCHLINT_DEBUG=1 shows"))  # fmt: skip


def _linted(
    target: Target,
    config: Config,
    rules: Sequence[Rule],
    suppressions: Suppressions,
    probe: ProbeOptions | None = None,
) -> TargetReport:
    with _spared_collections():
        graph = load(target, config.mode, config.timeout)
        if probe is not None:
            graph = _with_a_batch(target, graph, config)
        from archlint.signal.analysis import analyse

        analysis = analyse(graph)
        findings, silences = lint(analysis, rules)
    findings, suppressed = suppressions.apply(target.name, findings)
    coverage = analysis.coverage
    report = TargetReport(
        target.name, findings, shown_inputs(graph), graph.mode, graph.weights,
        graph.weights_evidence, coverage.nodes, coverage.modelled, coverage.unmodelled, graph.notes,
        (*silences, *suppressed),
    )  # fmt: skip
    if probe is None:
        return report
    from archlint.python_target import rebuilding, require_torch

    require_torch(f"{target.name}: --probe computes with PyTorch; the model")
    from archlint.probe.experiment import run

    optimizer: Any = config.optimizer
    outcome = run(
        analysis, findings, replace(probe, optimizer=optimizer), rebuilding(target, config.timeout)
    )
    return replace(report, findings=outcome.findings, probe_remarks=outcome.remarks,
                   training=outcome.training, interrupted=outcome.interrupted)  # fmt: skip


@contextmanager
def _spared_collections() -> Iterator[None]:
    """Let the garbage collector pass by what exists already: libraries' objects by the million,
    which a full collection visits one by one. What is made meanwhile is collected as ever."""
    if gc.get_freeze_count():  # somebody else keeps objects apart
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


_BATCH = 32  # samples that a norm over the batch is probed with


def _with_a_batch(target: Target, graph: LayerGraph, config: Config) -> LayerGraph:
    """The graph with enough samples where a norm mixes them; as it is where it takes no more."""
    if target.inputs or not any(
        node.op == "batch_norm" and node.attributes.get("training", True) for node in graph.walk()
    ):
        return graph
    values = [graph.values[id] for id in graph.inputs]
    if not all(v.shape and v.shape[0] and v.shape[0] < _BATCH for v in values):
        return graph
    alone = len(values) == 1 and not target.is_onnx  # torch renames some inputs
    larger = {"" if alone else v.id: ((_BATCH, *(v.shape or ())[1:]), v.dtype) for v in values}
    try:
        return load(replace(target, inputs=larger), config.mode, config.timeout)
    except ArchlintError:
        return graph


def shown_inputs(graph: LayerGraph) -> dict[str, str]:
    """The inputs of a graph with their shapes, as ``--input`` takes them."""
    return {
        value: "x".join("?" if n is None else str(n) for n in graph.shape(value) or ())
        for value in graph.inputs
    }
