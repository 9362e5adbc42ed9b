"""The formats of ``archlint profile``: tables for people, JSON and CSV for machines."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len

from archlint import __version__
from archlint.finding import Site, short_path
from archlint.graph.ops import OPS
from archlint.report.json import coverage as coverage_document
from archlint.report.json import site as site_document
from archlint.wording import number

if TYPE_CHECKING:
    from archlint.profiling import ParameterRow, Profile, ValueRow

_BARS = "▁▂▃▄▅▆▇█"
_UNKNOWN = "·"
_VALUE_HEAD = ("depth", "module", "op", "shape", "rms", "spread", "grad rms", "corr pos", "sample")
_PARAMETER_HEAD = ("parameter", "shape", "family", "variance", "× fan-in", "", "set at")
_PLUMBING = ("layout", "index", "constant", "control")  # kinds of ops that change no element


def tables(profile: Profile, width: int, parameters_only: bool = False) -> str:
    """Sparklines over depth, a row for every value that was computed, a row a parameter."""
    lines = list(_head(profile))
    if not parameters_only:
        lines += ["", *_sparklines(profile, width)]
        rows: list[tuple[str, ...]] = [_VALUE_HEAD]
        rows += [_value_cells(row) for row in profile.values if _shows(row)]
        lines += ["", *_table(rows, width, stretch=1, right=(0, 4, 5, 6, 7, 8), spare=(7, 3))]
    cells: list[tuple[str, ...]] = [
        ("parameter", "shape", "family", "variance", "× fan-in", "", "set at")
    ]
    cells += [_parameter_cells(row) for row in profile.parameters]
    if profile.parameters:
        lines += ["", *_table(cells, width, stretch=0, right=(3, 4), spare=(6, 1))]
    return "".join(line.rstrip() + "\n" for line in lines)


def _head(profile: Profile) -> list[str]:
    inputs = ", ".join(f"{name} {shape}" for name, shape in profile.input.items())
    coverage = profile.coverage
    lines = [
        f"{profile.target}: input {inputs or 'none'}; {profile.mode} mode; "
        f"weights {profile.weights}; {coverage.modelled} of {coverage.nodes} nodes understood"
    ]
    return lines + [f"note: {note}" for note in profile.notes]


def _shows(row: ValueRow) -> bool:
    return row.real and (row.op not in OPS or OPS[row.op].kind not in _PLUMBING)


def _value_cells(row: ValueRow) -> tuple[str, ...]:
    return (
        str(row.depth), _name(row), row.op, _size(row.shape), _cell(row.rms),
        _cell(row.spread), _cell(row.grad_rms), _fraction(row.position_correlation),
        _fraction(row.sample_correlation),
    )  # fmt: skip


def _name(row: ValueRow) -> str:
    return row.id if row.op == "input" else row.module or "(model)"


def _parameter_cells(row: ParameterRow) -> tuple[str, ...]:
    known = row.second_moment is not None
    return (
        row.name, _size(row.shape), row.family or "unknown", _cell(row.variance),
        "" if row.fan_in is None else _cell(row.gain),
        ("exact" if row.exact else "estimated") if known else "", _place(row.site),
    )  # fmt: skip


def _place(site: Site | None) -> str:
    if site is None:
        return ""
    if site.line is None:
        return str(site)
    file = short_path(site.file)
    if len(file) > 32:
        file = "…" + file[-31:]
    return f"{file}:{site.line}"


def _size(shape: Sequence[int | None] | None) -> str:
    if shape is None:
        return "?"
    return "x".join("?" if n is None else str(n) for n in shape) or "scalar"


def _cell(x: float | None) -> str:
    return "?" if x is None else number(x)


def _fraction(x: float | None) -> str:
    return "?" if x is None else f"{x:.2f}"


_LEAST = 20  # cells of the column that gives way


def _table(
    rows: Sequence[tuple[str, ...]],
    width: int,
    stretch: int,
    right: Sequence[int],
    spare: Sequence[int],
) -> list[str]:
    """Columns side by side. Where the screen is narrow, the one at ``stretch`` gives way, then the
    ``spare`` ones are left out, in their order."""
    widths = [max(cell_len(row[i]) for row in rows) for i in range(len(rows[0]))]
    columns = list(range(len(widths)))

    def room() -> int:
        return width - 2 * (len(columns) - 1) - sum(widths[i] for i in columns if i != stretch)

    for column in spare:
        if room() < min(widths[stretch], _LEAST):
            columns.remove(column)
    widths[stretch] = min(widths[stretch], max(room(), 8))
    lines = []
    for row in rows:
        cells = []
        for i in columns:
            text = _shortened(row[i], widths[i])
            padding = " " * (widths[i] - cell_len(text))
            cells.append(padding + text if i in right else text + padding)
        lines.append("  ".join(cells).rstrip())
    return lines


def _shortened(text: str, size: int) -> str:
    """A text with its middle left out where it is too long."""
    if cell_len(text) <= size:
        return text
    head = (size - 1) // 3
    return text[:head] + "…" + text[len(text) - (size - 1 - head) :]


# --------------------------------------------------------------------------- sparklines


def _sparklines(profile: Profile, width: int) -> list[str]:
    by_depth: dict[int, ValueRow] = {}
    for row in profile.values:
        if _shows(row):
            by_depth[row.depth] = row  # the last value of a depth
    rows = [by_depth[depth] for depth in sorted(by_depth)]
    lines = []
    for label, numbers in (
        ("rms", [row.rms for row in rows]),
        ("grad rms", [row.grad_rms for row in rows]),
    ):
        known = [x for x in numbers if x is not None]
        extent = f"{number(min(known))} … {number(max(known))}" if known else "unknown"
        bars = sparkline(numbers, max(width - 12 - len(extent), 8))
        lines.append(f"{label:<8}  {bars}  {extent}")
    lines.append(f"{'':<8}  depth {rows[0].depth if rows else 0} to {rows[-1].depth if rows else 0}"
                 f", logarithmic")  # fmt: skip
    return lines


def sparkline(numbers: Sequence[float | None], width: int) -> str:
    """The logarithms of positive numbers as bars, at least a decade from the lowest to the highest.

    More numbers than ``width`` are averaged in groups; unknown ones are dots, a zero is lowest.
    """
    if not numbers:
        return ""
    width = min(width, len(numbers))
    logs = [None if x is None else math.log10(x) if x > 0 else -math.inf for x in numbers]
    groups = []
    for i in range(width):
        part = logs[i * len(logs) // width : (i + 1) * len(logs) // width]
        known = [x for x in part if x is not None]
        groups.append(sum(known) / len(known) if known else None)
    finite = [x for x in groups if x is not None and math.isfinite(x)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    missing = max(1.0 - (high - low), 0.0)
    low, high = low - missing / 2, high + missing / 2
    return "".join(_bar(x, low, high) for x in groups)


def _bar(x: float | None, low: float, high: float) -> str:
    if x is None:
        return _UNKNOWN
    if not math.isfinite(x):
        return _BARS[0] if x < 0 else _BARS[-1]
    return _BARS[min(int((x - low) / (high - low) * len(_BARS)), len(_BARS) - 1)]


# --------------------------------------------------------------------------- for machines


def as_json(profile: Profile) -> str:
    """One JSON object, schema version 1. Same input, same bytes."""
    target = {
        "target": profile.target,
        "input": dict(profile.input),
        "mode": profile.mode,
        "coverage": coverage_document(profile.coverage),
        "weights": profile.weights,
        "weights_evidence": profile.weights_evidence,
        "notes": list(profile.notes),
        "parameters": [_parameter(row) for row in profile.parameters],
        "values": [_value(row) for row in profile.values],
    }
    document = {
        "schema_version": 1,
        "archlint": __version__,
        "targets": [target],
        "summary": {
            "targets": 1,
            "failed": 0,
            "parameters": len(profile.parameters),
            "values": len(profile.values),
            "unknown": sum(row.real and row.rms is None for row in profile.values),
        },
    }
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _parameter(row: ParameterRow) -> dict[str, Any]:
    return {
        "name": row.name,
        "shape": list(row.shape),
        "family": row.family,
        "mean": row.mean,
        "second_moment": row.second_moment,
        "kurtosis": row.kurtosis,
        "exact": row.exact,
        "site": site_document(row.site),
    }


def _value(row: ValueRow) -> dict[str, Any]:
    return {
        "id": row.id,
        "op": row.op,
        "module": row.module,
        "module_type": row.module_type,
        "shape": None if row.shape is None else list(row.shape),
        "rms": row.rms,
        "mean": row.mean,
        "spread": row.spread,
        "position_correlation": row.position_correlation,
        "sample_correlation": row.sample_correlation,
        "grad_rms": row.grad_rms,
        "site": site_document(row.site),
    }


def as_csv(profile: Profile, parameters: bool = False) -> str:
    """The table of values, or that of parameters, a row a line; unknown is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if parameters:
        writer.writerow(["name", "shape", "family", "mean", "second_moment", "variance", "kurtosis",
                         "fan_in", "exact", "site"])  # fmt: skip
        for p in profile.parameters:
            writer.writerow([p.name, _size(p.shape), p.family, p.mean, p.second_moment, p.variance,
                             p.kurtosis, p.fan_in, str(p.exact).lower(),
                             p.site or ""])  # fmt: skip
        return text.getvalue()
    writer.writerow(["id", "depth", "op", "module", "module_type", "shape", "rms", "mean", "spread",
                     "position_correlation", "sample_correlation", "grad_rms",
                     "site"])  # fmt: skip
    for v in profile.values:
        writer.writerow([v.id, v.depth, v.op, v.module, v.module_type,
                         "" if v.shape is None else _size(v.shape), v.rms, v.mean, v.spread,
                         v.position_correlation, v.sample_correlation, v.grad_rms,
                         v.site or ""])  # fmt: skip
    return text.getvalue()
