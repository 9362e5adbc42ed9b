"""Tests on names in a constructor's loops, evaluated on the names that it listed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from archlint.graph.model import Unreached
from archlint.initialization.record import build
from archlint.testing import load_source

NET = """
import re

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Module()
        self.attn.proj = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)


class Net(nn.Module):
    scaled, other = True, "attn.proj.weight"

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        self.head = nn.Linear(8, 2)
        for {target} in {listed}:
            if {test}:
                {fill}
"""
PROJECTIONS = [f"blocks.{i}.attn.proj.weight" for i in range(3)]


def found(folder: Path, test: str, listed: str = "self.named_parameters()",
          target: str = "name, p", fill: str = "nn.init.zeros_(p)") -> list[Unreached]:  # fmt: skip
    file = folder / "net.py"
    file.write_text(NET.format(test=test, listed=listed, target=target, fill=fill))
    model, record = build(load_source(file).Net)
    return list(record.listings.unreached([name for name, _ in model.named_parameters()]))


DEAD = [
    ('name == "attn.proj.weight"', 'name.endswith(".attn.proj.weight")'),
    ('"proj.weight" == name', 'name.endswith(".proj.weight")'),
    ('name in ("proj.weight", "fc2.weight")', ""),
    ('name.startswith("attn.proj") and p.dim() > 1', '"attn.proj" in name'),
    ('name.endswith("attn.proj")', '"attn.proj" in name'),
    ('name == "proj.weight" or name == "fc2.weight"', ""),
    ('name == "proj.weight" and "norm" not in name', ""),
    ('not (name != "proj.weight")', None),
]


@pytest.mark.parametrize(("test", "instead"), DEAD)
def test_a_test_of_whole_paths(tmp_path: Path, test: str, instead: str | None) -> None:
    dead = found(tmp_path, test)
    if instead is None:  # a denial is not told by its parts
        assert not dead
        return
    (one,) = dead
    assert one.test == test
    assert one.instead == instead
    assert one.call == "nn.init.zeros_(p)"
    assert one.names == 14
    assert [p for p in one.parameters if p.endswith("weight")] == PROJECTIONS
    lines = Path(one.site.file).read_text().splitlines()
    assert one.site.line is not None
    assert one.site.column is not None
    assert one.site.end_column is not None
    assert lines[one.site.line - 1][one.site.column - 1 : one.site.end_column - 1] == test


@pytest.mark.parametrize("test", [
    'name.endswith("proj.weight")',  # holds
    'name == "head.weight"',
    '"proj" in name',
    'name == "classifier.weight"',  # of another model
    'name.startswith("encoder.")',
    'self.scaled and name == self.other',  # depends on what is not a text
    'name == "proj.weight" or self.scaled',
    'name.split(".", 2)[-1] == "attn.proj.weight"',
    're.search("proj.weight$", name)',
    'isinstance(p, nn.Conv2d)',
])  # fmt: skip
def test_what_holds_or_may_hold(tmp_path: Path, test: str) -> None:
    assert not found(tmp_path, test)


@pytest.mark.parametrize(("listed", "target"), [
    ("list(self.named_parameters())", "name, p"),
    ("enumerate(self.named_parameters())", "i, (name, p)"),
    ("dict(self.named_parameters()).items()", "name, p"),
    ("sorted(\n            self.named_parameters(),\n        )", "name, p"),
])  # fmt: skip
def test_ways_to_loop(tmp_path: Path, listed: str, target: str) -> None:
    (one,) = found(tmp_path, 'name == "attn.proj.weight"', listed, target)
    assert list(one.parameters) == PROJECTIONS


def test_modules_by_name(tmp_path: Path) -> None:
    fill = "m.weight.data.mul_(0.1)"
    (one,) = found(tmp_path, 'n == "attn.proj"', "self.named_modules()", "n, m", fill)
    assert [p for p in one.parameters if p.endswith("weight")] == PROJECTIONS
    assert one.call == fill
    assert not found(tmp_path, 'n == "head"', "self.named_children()", "n, m", fill)


@pytest.mark.parametrize("fill", [
    "p.requires_grad_(False)",  # no initializer
    "self.frozen = p",
    "nn.init.zeros_(self.head.bias)",  # not of what the loop is at
])  # fmt: skip
def test_branches_that_fill_nothing(tmp_path: Path, fill: str) -> None:
    assert not found(tmp_path, 'name == "attn.proj.weight"', fill=fill)


def test_a_test_that_held_for_another_module(tmp_path: Path) -> None:
    """The same loop runs for every module: what it fills in one is no mistake in the others."""
    file = tmp_path / "net.py"
    file.write_text("""
from torch import nn


class Net(nn.Module):
    def __init__(self, only_root):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.apply(lambda m: fill(m) if m is self or not only_root else None)


def fill(module):
    for name, p in module.named_parameters():
        if name == "bias":
            nn.init.zeros_(p)
""")
    net = load_source(file).Net
    for only_root in (True, False):
        model, record = build(lambda only_root=only_root: net(only_root))
        dead = record.listings.unreached([name for name, _ in model.named_parameters()])
        assert bool(dead) == only_root


def test_listing_is_as_before() -> None:
    """Modules list what they list, generators stay lazy, and afterwards nothing is watched."""
    before = {name: getattr(nn.Module, name) for name in ("named_parameters", "named_modules")}
    seen: dict[str, Any] = {}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
            nn.init.zeros_(self.a[0].bias)  # type: ignore[arg-type]
            listed: Iterator[tuple[str, nn.Module]] = self.named_modules(prefix="p")
            seen["first"] = next(listed)[0]
            seen["rest"] = [name for name, _ in listed]
            seen["own"] = [name for name, _ in self.named_parameters(recurse=False)]

    build(Net)
    assert seen == {"first": "p", "rest": ["p.a", "p.a.0", "p.a.1"], "own": []}
    assert before == {name: getattr(nn.Module, name) for name in before}
