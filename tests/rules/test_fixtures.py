"""The models of fixtures/: a bad one raises its folder's code, a good one does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from archlint.rule import registry
from archlint.testing import lint_module, load_source
from tests.conftest import ROOT

MODELS = sorted((ROOT / "fixtures").glob("arc*/*.py"))


@pytest.mark.parametrize("path", MODELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_fixture(path: Path) -> None:
    code = path.parent.name[:6].upper()
    rule = registry().get(code)
    assert rule is not None
    found = lint_module(load_source(path).Net, rules=[rule()])
    if path.stem.startswith("bad_"):
        assert [finding.code for finding in found] == [code]
        site = found[0].site
        assert site is not None
        assert site.file == str(path)
    else:
        assert not found, [finding.message for finding in found]
