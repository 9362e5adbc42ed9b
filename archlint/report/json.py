"""The JSON format, schema version 1. Same input, same bytes."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from archlint import __version__
from archlint.finding import Finding, Severity, Site, Training, short_path

if TYPE_CHECKING:
    from archlint.linter import Report, TargetReport
    from archlint.signal.analysis import Coverage


def render(report: Report) -> str:
    """The whole report as one JSON object."""
    counts = {s.label: sum(f.severity is s for f in report.findings) for s in Severity}
    document = {
        "schema_version": 1,
        "archlint": __version__,
        "targets": [_target(target) for target in report.targets],
        "summary": {
            "targets": len(report.targets),
            "failed": len(report.errors),
            "findings": len(report.findings),
            **counts,
        },
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _target(target: TargetReport) -> dict[str, Any]:
    error = target.error
    if error is not None:
        return {"target": target.target, "error": {"message": error.message, "hint": error.hint,
                          "details": error.details},
                "findings": []}  # fmt: skip
    return {
        "target": target.target,
        "input": dict(target.input),
        "mode": target.mode,
        "coverage": coverage(target),
        "weights": target.weights,
        "weights_evidence": target.weights_evidence,
        "notes": [*target.notes, *(f"probe: {remark}" for remark in target.probe_remarks)],
        "findings": [_finding(finding) for finding in target.findings],
        "training": _training(target.training),
    }  # fmt: skip


def _finding(finding: Finding) -> dict[str, Any]:
    suggestion = finding.suggestion
    return {
        "code": finding.code,
        "slug": finding.slug,
        "severity": finding.severity.label,
        "message": finding.message,
        "module": finding.module,
        "modules": list(finding.modules),
        "count": finding.count,
        "site": site(finding.site),
        "evidence": {key: _plain(value) for key, value in finding.evidence.items()},
        "suggestion": None
        if suggestion is None
        else {
            "text": suggestion.text,
            "code": suggestion.code,
            "values": {key: _plain(value) for key, value in suggestion.values.items()},
        },
        "verdict": finding.verdict,
        "measurement": _measurement(finding),
        "trial": _trial(finding),
    }


def _trial(finding: Finding) -> dict[str, Any] | None:
    """Training as the network is and with what is suggested; null where nothing was trained."""
    trial, suggestion = finding.trial, finding.suggestion
    if trial is None:
        return None
    return {
        "found": _training(trial.found),
        "remedied": _training(trial.remedied),
        "remedy": suggestion.remedy.words if suggestion and suggestion.remedy else None,
        "remark": trial.remark,
        "decides": trial.decides,
    }


def _training(training: Training | None) -> dict[str, Any] | None:
    if training is None:
        return None
    return {
        "draws": training.draws,
        "started": training.started,
        "failed": training.failed,
        "undecided": training.undecided,
        "steps": training.steps,
        "most": training.most,
        "task": training.task,
        "optimizer": training.optimizer,
        "rates": list(training.rates),
    }


def _measurement(finding: Finding) -> dict[str, Any] | None:
    """What the probe measured, beside what was claimed; null where it was not asked."""
    found, claim = finding.measurement, finding.claim
    if found is None:
        return None
    return {
        "statistic": claim.statistic if claim is not None else None,
        "predicted": _plain(claim.predicted) if claim is not None else None,
        "limit": _plain(claim.limit) if claim is not None else None,
        "figure": _plain(found.figure),
        "low": _plain(found.low),
        "high": _plain(found.high),
        "draws": found.draws,
        "lost": found.lost,
        "needed": found.needed,
        "remark": found.remark,
    }


def coverage(read: TargetReport | Coverage) -> dict[str, Any]:
    """How much was understood."""
    return {"nodes": read.nodes, "modelled": read.modelled, "unmodelled": dict(read.unmodelled)}


def site(site: Site | None) -> dict[str, Any] | None:
    """A place, as far as it is known."""
    if site is None:
        return None
    return {
        "file": short_path(site.file),
        "line": site.line,
        "column": site.column,
        "node": site.node,
    }


def _plain(value: object) -> object:
    """A number that JSON can hold: an infinite one becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
