"""One line a finding: ``model.onnx#node: ARC101 message``."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from archlint.linter import Report


def render(report: Report) -> str:
    """The findings, one a line, then a line with their number."""
    from archlint.wording import probed, setting, trained, tried

    lines = []
    for target in report.targets:
        for finding in target.findings:
            where = target.target + (f": {finding.module}" if finding.module else "")
            verdict = "".join(f" [{text}]" for text in (probed(finding), tried(finding)) if text)
            lines.append(
                f"{where}: {finding.code} [{finding.severity.label}] {finding.message}{verdict}"
            )
        if target.training is not None:
            lines.append(f"{target.target}: {trained(target.training)} "
                         f"({setting(target.training)})")  # fmt: skip
    lines.append(summary(report))
    return "\n".join(lines) + "\n"


def summary(report: Report) -> str:
    """``Found 2 findings in 1 of 3 models (1 error, 1 warning).``"""
    from archlint.finding import Severity
    from archlint.wording import plural

    read = [target for target in report.targets if target.error is None]
    hit = [target for target in read if target.findings]
    if not read:
        return "No model could be read."
    if not hit:
        return f"All clear: {plural(len(read), 'model')} checked."
    counts = [(severity, sum(f.severity is severity for f in report.findings))
              for severity in sorted(Severity, reverse=True)]  # fmt: skip
    kinds = ", ".join(
        f"{n} {s.label}" if s is Severity.INFO else plural(n, s.label) for s, n in counts if n
    )
    return (
        f"Found {plural(len(report.findings), 'finding')} in {len(hit)} of "
        f"{plural(len(read), 'model')} ({kinds})."
    )


def statistics(report: Report) -> str:
    """How often each rule fired, the commonest first."""
    from collections import Counter

    counts = Counter((finding.code, finding.slug) for finding in report.findings)
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return "".join(f"{n:>5}  {code}  {slug}\n" for (code, slug), n in rows) or "no findings\n"
