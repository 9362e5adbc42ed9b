"""Every rule's page: its headings, and its examples, built and linted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from archlint.rule import Rule, registry
from archlint.testing import check_examples

RULES = list(registry())
HEADINGS = ["What it does", "Why is this bad", "Example", "Use instead", "How it is computed",
            "What would confirm it"]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_examples_keep_their_word(rule: type[Rule], tmp_path: Path) -> None:
    check_examples(rule, tmp_path)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.code)
def test_page_is_complete(rule: type[Rule]) -> None:
    found = re.findall(r"^## (.*)$", rule.page(), re.M)
    assert [heading for heading in found if heading in HEADINGS] == HEADINGS
    assert re.fullmatch(r"ARC\d{3}", rule.code)
    assert rule.title().endswith(".")
    if rule.Options.__dataclass_fields__:
        for name in rule.Options.__dataclass_fields__:
            assert f"`{name.replace('_', '-')}`" in rule.page()


def test_codes_and_slugs_are_unique() -> None:
    assert len({rule.code for rule in RULES}) == len({rule.slug for rule in RULES}) == len(RULES)
