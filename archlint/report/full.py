"""The format for people: headline, place, what the graph looks like there, what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.text import Text

from archlint.finding import Finding, Severity
from archlint.report.concise import summary
from archlint.report.excerpt import Mark, excerpt
from archlint.wording import probed, setting, trained, tried

if TYPE_CHECKING:
    from archlint.linter import Report, TargetReport

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "bold yellow", Severity.INFO: "bold cyan"}


def write(report: Report, console: Console, explain_silence: bool = False) -> None:
    """Print a report to a console, which decides about colour and width."""
    for target in report.targets:
        if target.error is None:
            _target(target, console, explain_silence)
    console.print(Text(summary(report), style="bold"))


def _target(target: TargetReport, console: Console, explain_silence: bool) -> None:
    for finding in target.findings:
        _finding(finding, target, console)
    if target.findings or target.training or explain_silence:
        console.print(Text(about(target), style="dim"))
        if target.training is not None:
            text = f"training: {trained(target.training)} ({setting(target.training)})"
            console.print(Text(text, style="dim"))
    if target.findings or target.probe_remarks or explain_silence:
        for remark in target.probe_remarks:
            console.print(Text(f"probe: {remark}", style="dim"))
    if explain_silence:
        for silence in target.silences:
            where = f" at {silence.where}" if silence.where else ""
            console.print(Text(f"  {silence.code} is silent{where}: {silence.reason}", "dim"))
    if target.findings or target.training or explain_silence:
        console.print()


def about(target: TargetReport) -> str:
    """One line on what was assumed and how much was understood."""
    inputs = ", ".join(f"{name} {shape}" for name, shape in target.input.items())
    share = f"{target.modelled} of {target.nodes} nodes understood"
    return f"{target.target}: input {inputs or 'none'}; weights {target.weights}; {share}"


def _finding(finding: Finding, target: TargetReport, console: Console) -> None:
    style = _STYLES[finding.severity]
    head = Text.assemble((finding.code, style), " ", (f"[{finding.slug}]", "dim"), " ")
    headline, _, rest = finding.message.partition(". ")
    head.append(headline + ("." if rest else ""), style="bold")
    console.print(head)
    rows = _source(finding, style, console.width)
    for row in rows:
        console.print(row, no_wrap=True, overflow="crop", soft_wrap=False)
    if not rows:
        site = finding.site
        place = str(site) if site is not None and site.line else target.target
        where = Text.assemble(("  --> ", "blue"), place, ("  module ", "dim"), finding.module)
        if finding.count > 1:
            where.append(f" ({finding.count} layers)", style="dim")
        console.print(where)
    if finding.severity is Severity.INFO:
        _labelled(console, "note", rest)
        _labelled(console, "probe", probed(finding))
        _labelled(console, "training", tried(finding))
        console.print()
        return
    for line in finding.sketch:
        console.print(Text.assemble(("   | ", "blue"), line), no_wrap=True, overflow="ellipsis")
    _labelled(console, "note", rest)
    _labelled(console, "probe", probed(finding))
    _labelled(console, "training", tried(finding))
    if finding.suggestion is not None:
        _labelled(console, "help", finding.suggestion.text)
        if finding.suggestion.code:
            _padded(console, Text(finding.suggestion.code, style="green"), 8)
    console.print()


def _source(finding: Finding, style: str, width: int) -> list[Text]:
    """The lines of source of a finding; none for an ONNX file."""
    if finding.site is None or finding.site.line is None:
        return []
    label = finding.label or finding.module
    if finding.count > 1 and not finding.label:
        label += f" ({finding.count} layers)"
    head = Text.assemble(("  module ", "dim"), finding.module) if finding.label else None
    marks = [Mark(finding.site, label, style, "^")]
    marks += [Mark(site, label) for site, label in finding.related]
    return excerpt(marks, width, head)


def _labelled(console: Console, label: str, text: str) -> None:
    if text:
        body = Text.assemble((f"{label}: ", "bold"), text)
        _padded(console, body, 2)


def _padded(console: Console, body: RenderableType, left: int) -> None:
    console.print(Padding(body, (0, 0, 0, left), expand=False))
