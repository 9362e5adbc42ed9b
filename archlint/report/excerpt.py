"""Lines of source with marks under the columns that are meant."""

from __future__ import annotations

import linecache
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.text import Text

from archlint.finding import Site

_TAB = 4
_MOST_LINES = 5  # of one place that goes over several
_GUTTER = "blue"


@dataclass(frozen=True)
class Mark:
    """A place with what is to be said of it. The first mark of an excerpt is what it is about."""

    site: Site
    label: str
    style: str = _GUTTER
    sign: str = "-"


def excerpt(marks: Sequence[Mark], width: int, head: Text | None = None) -> list[Text]:
    """The lines of source of some marks, file by file, none where they cannot be read.

    ``head`` follows the place of the first mark on its line. ``width`` is that of the screen; what
    is wider is cut around the mark.
    """
    files: dict[str, list[tuple[Mark, list[str]]]] = {}
    for mark in marks:
        lines = _lines(mark.site)
        if lines:
            files.setdefault(mark.site.file, []).append((mark, lines))
    if not marks or marks[0].site.file not in files:
        return []
    last = max(_last(mark.site) for found in files.values() for mark, _ in found)
    gutter = max(2, len(str(last)))
    rows: list[Text] = []
    for i, found in enumerate(files.values()):
        place = str(found[0][0].site)
        arrow = "-->" if i == 0 else ":::"
        rows.append(Text.assemble((" " * gutter + arrow + " ", _GUTTER), place))
        if i == 0 and head is not None:
            rows[-1].append_text(head)
        rows.append(_row(gutter))
        rows += _file(found, gutter, width - gutter - 3)
    rows.append(_row(gutter))
    return rows


def _row(gutter: int, number: int | None = None, body: Text | None = None) -> Text:
    row = Text("" if number is None else str(number), style=_GUTTER)
    row.pad_left(gutter - len(row))
    row = Text.assemble(row, (" |", _GUTTER))
    if body is not None and body.plain:
        row.append(" ")
        row.append_text(body)
    return row


def _last(site: Site) -> int:
    line = site.line or 0
    return line if site.end_line is None else max(site.end_line, line)


def _lines(site: Site) -> list[str]:
    """The lines that a site goes over, empty where the file cannot be read or is another by now."""
    if site.line is None:
        return []
    linecache.checkcache(site.file)
    lines = [linecache.getline(site.file, n) for n in range(site.line, _last(site) + 1)]
    return [line.rstrip("\r\n") for line in lines] if all(lines) else []


def _file(found: Sequence[tuple[Mark, list[str]]], gutter: int, width: int) -> Iterator[Text]:
    """The marked lines of one file in order, what is between them left out."""
    spans: dict[int, list[tuple[Mark, int | None, int | None, bool]]] = {}
    text: dict[int, str] = {}
    for mark, lines in found:
        first = mark.site.line or 0
        numbers = list(range(first, first + len(lines)))
        shown = numbers
        if len(numbers) > _MOST_LINES:
            shown = [*numbers[: _MOST_LINES - 2], numbers[-1]]
        for n in shown:
            text[n] = lines[n - first]
            start = mark.site.column if n == first else None
            end = mark.site.end_column if n == numbers[-1] else None
            spans.setdefault(n, []).append((mark, start, end, n == numbers[-1]))
    before: int | None = None
    for n in sorted(text):
        if before is not None and n > before + 1:
            yield Text(" " * gutter + " …", style=_GUTTER)
        before = n
        line = _Line(text[n])
        starts = [line.span(start, end)[0] for _, start, end, _ in spans[n]]
        offset = line.offset(min(starts), width)
        yield _row(gutter, n, Text(line.cut(offset, width)))
        for mark, start, end, ends in spans[n]:
            for body in _marked(line, mark, (start, end), ends, (offset, width)):
                yield _row(gutter, None, body)


def _marked(
    line: _Line,
    mark: Mark,
    columns: tuple[int | None, int | None],
    ends: bool,
    window: tuple[int, int],
) -> Iterator[Text]:
    """The row of signs under a line and the label behind it, or below where there is no room."""
    offset, width = window
    start, end = line.span(*columns)
    left = max(start - offset, 0)
    right = min(max(end - offset, left + 1), width)
    signs = Text(" " * left + mark.sign * (right - left), style=mark.style)
    if not ends or not mark.label:
        yield signs
        return
    if right + 1 + cell_len(mark.label) <= width:
        signs.append(" " + mark.label)
        yield signs
        return
    yield signs
    indent = min(left, max(width - min(cell_len(mark.label), 40), 0))
    for part in textwrap.wrap(mark.label, max(width - indent, 20)):
        yield Text(" " * indent + part, style=mark.style)


class _Line:
    """A line of source as it shows on the screen: tabs expanded, nothing that moves the cursor."""

    def __init__(self, text: str) -> None:
        self.source = text
        self.cells: list[tuple[str, int]] = []  # what each character shows as, and its first cell
        at = 0
        for character in text:
            shown = character
            if character == "\t":
                shown = " " * (_TAB - at % _TAB)
            elif unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp"):
                shown = "" if character == "\u200d" else "\ufffd"
            self.cells.append((shown, at))
            at += cell_len(shown)
        self.width = at

    def span(self, column: int | None, end: int | None) -> tuple[int, int]:
        """First cell and one past the last of the columns, which count from 1 in characters."""
        stripped = len(self.source) - len(self.source.lstrip())
        first = stripped if column is None else column - 1
        last = len(self.source.rstrip()) if end is None else end - 1
        start = self._cell(first)
        return start, max(self._cell(last), start + 1)

    def _cell(self, index: int) -> int:
        return self.cells[index][1] if 0 <= index < len(self.cells) else self.width

    def offset(self, start: int, width: int) -> int:
        """The first cell to show, so that ``start`` is seen with what is before and behind it."""
        return 0 if self.width <= width else max(min(start - width // 3, self.width - width), 0)

    def cut(self, offset: int, width: int) -> str:
        """The cells from ``offset`` on, with an ellipsis where something is left out."""
        cells: list[str] = []  # a character of two cells and the empty rest of it, and so on
        for shown, _ in self.cells:
            for part in shown if shown.isspace() else [shown]:
                size = cell_len(part)
                if size == 0 and cells:
                    cells[-1] += part
                else:
                    cells += [part, *[""] * (size - 1)][: max(size, 1)]
        window = cells[offset : offset + width]
        if offset > 0 and window:
            window[0] = "…"
            if len(window) > 1 and window[1] == "":
                window[1] = " "
        if len(cells) > offset + width:
            if window[-1] == "" and len(window) > 1:
                window[-2] = " "
            window[-1] = "…"
        return "".join(window).rstrip()
