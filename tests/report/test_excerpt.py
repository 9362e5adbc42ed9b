"""Marks stand under what they mean, whatever is on the line before it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from archlint.finding import Site
from archlint.report.excerpt import Mark, excerpt
from tests.terminal import write


def site(file: Path, line: int, text: str) -> Site:
    source = file.read_text(encoding="utf-8").split("\n")[line - 1]
    column = source.index(text) + 1
    return Site(str(file), line, column, line, column + len(text))


def rows(*marks: Mark, width: int = 80) -> list[str]:
    return [row.plain.rstrip() for row in excerpt(marks, width)]


def under(lines: list[str], sign: str = "^") -> str:
    """What the signs are under, cell by cell."""
    marked = next(line for line in lines if sign in line)
    start = cell_len(marked[: marked.index(sign)])
    length = marked.count(sign)
    above = lines[lines.index(marked) - 1]
    found, at = "", 0
    for character in above:
        if start <= at < start + length:
            found += character
        at += cell_len(character)
    return found


LINES = {
    "plain": "    self.fc = nn.Linear(3, 4)  # here",
    "tabs": "\t\tself.fc =\tnn.Linear(3, 4)",
    "wide": '    名前 = "層", nn.Linear(3, 4)  # 線形',
    "emoji": '    x = "🔥👨\u200d👩\u200d👧", nn.Linear(3, 4)',
    "combining": '    x = "e\u0301", nn.Linear(3, 4)',
    "long": "    x = " + "a + " * 60 + "nn.Linear(3, 4)" + " + b" * 60,
    "long_and_wide": "    x = " + "層 + " * 60 + "nn.Linear(3, 4)" + " + 線" * 60,
    "no_indent": "nn.Linear(3, 4)",
}


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", LINES)
def test_the_marks_stand_under_what_they_mean(tmp_path: Path, name: str, width: int) -> None:
    file = write(tmp_path, "net.py", f"import torch\n{LINES[name]}\n")
    lines = rows(Mark(site(file, 2, "nn.Linear(3, 4)"), "30 layers", sign="^"), width=width)
    assert under(lines) == "nn.Linear(3, 4)"
    assert any(line.endswith("^ 30 layers") for line in lines)
    assert max(map(cell_len, lines[1:])) <= width


characters = st.text(
    st.one_of(st.characters(blacklist_categories=["Cs", "Cc", "Zl", "Zp"]), st.just("\t")),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(characters, characters)
def test_nothing_on_the_line_moves_the_marks(before: str, after: str) -> None:
    import linecache

    line = f"{before}nn.Linear(3){after}"
    column = len(before) + 1
    linecache.cache["<ipython-input-1>"] = (len(line), None, [line + "\n"], "<ipython-input-1>")
    place = Site("<ipython-input-1>", 1, column, 1, column + 12)
    _, _, shown, marked, _ = rows(Mark(place, "", sign="^"), width=400)
    start = len(marked) - 12
    assert marked == "   " + "|" + " " * (start - 4) + "^" * 12
    at = 0
    for i in range(len(shown)):
        if at == start and shown[i:].startswith("nn.Linear(3)"):
            return
        at += cell_len(shown[i])
    raise AssertionError(shown)


def test_control_characters_do_not_reach_the_screen(tmp_path: Path) -> None:
    file = write(tmp_path, "net.py", "x = '\x1b[31m\x07\u202e', nn.Linear(3)\n")
    lines = rows(Mark(site(file, 1, "nn.Linear(3)"), "here", sign="^"))
    assert under(lines) == "nn.Linear(3)"
    assert not {"\x1b", "\x07", "\u202e"} & set("".join(lines))


def test_several_places(tmp_path: Path) -> None:
    file = write(tmp_path, "net.py", "a = f(x)\n\n\n\nb = a + g(a)\n")
    other = write(tmp_path, "parts.py", "def g(x):\n    return 2 * x\n")
    lines = rows(
        Mark(site(file, 5, "a + g(a)"), "this add", sign="^"),
        Mark(site(file, 5, "g(a)"), "its branch"),
        Mark(site(file, 1, "f(x)"), "where it begins"),
        Mark(site(other, 2, "2 * x"), "its scale"),
    )
    assert lines == [
        f"  --> {file}:5:5",
        "   |",
        " 1 | a = f(x)",
        "   |     ---- where it begins",
        "   …",
        " 5 | b = a + g(a)",
        "   |     ^^^^^^^^ this add",
        "   |         ---- its branch",
        f"  ::: {other}:2:12",
        "   |",
        " 2 |     return 2 * x",
        "   |            ----- its scale",
        "   |",
    ]


def test_a_place_of_several_lines(tmp_path: Path) -> None:
    source = "net = nn.Sequential(\n" + "    nn.ReLU(),\n" * 6 + ")\nlast\n"
    file = write(tmp_path, "net.py", source)
    lines = rows(Mark(Site(str(file), 1, 7, 8, 2), "six layers", sign="^"))
    assert lines[2:] == [
        " 1 | net = nn.Sequential(",
        "   |       ^^^^^^^^^^^^^^",
        " 2 |     nn.ReLU(),",
        "   |     ^^^^^^^^^^",
        " 3 |     nn.ReLU(),",
        "   |     ^^^^^^^^^^",
        "   …",
        " 8 | )",
        "   | ^ six layers",
        "   |",
    ]


def test_a_label_without_room_goes_below(tmp_path: Path) -> None:
    file = write(tmp_path, "net.py", "x = nn.Linear(3)\n")
    label = "a label that says more than there is room for on what is left of the line"
    lines = rows(Mark(site(file, 1, "nn.Linear(3)"), label, sign="^"), width=50)
    assert lines[3].endswith("^" * 12)
    assert " ".join(line.removeprefix("   |").strip() for line in lines[4:]).strip() == label
    assert max(map(len, lines[1:])) <= 50


def test_places_that_cannot_be_read(tmp_path: Path) -> None:
    file = write(tmp_path, "net.py", "x = 1\n")
    assert rows(Mark(Site(str(tmp_path / "gone.py"), 1, 1, 1, 2), "")) == []
    assert rows(Mark(Site(str(file), 7, 1, 7, 2), "")) == []
    assert rows(Mark(Site("model.onnx", node="conv"), "")) == []
    both = rows(Mark(Site(str(file), 1, 1, 1, 2), "", sign="^"), Mark(Site("gone.py", 1), ""))
    assert both == [f"  --> {file}:1:1", "   |", " 1 | x = 1", "   | ^", "   |"]
    assert under(rows(Mark(Site(str(file), 1), "no column", sign="^"))) == "x = 1"
