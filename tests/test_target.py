"""What a target's text means; nothing of it is ever evaluated."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archlint.config import load_config
from archlint.errors import ArchlintError
from archlint.target import (
    Configured,
    Reference,
    expand,
    parse_input,
    parse_inputs,
    parse_kwargs,
    parse_reference,
    resolve,
)

# --------------------------------------------------------------------------- references


@pytest.mark.parametrize(
    ("text", "module", "attribute"),
    [
        ("net.py:Net", "net.py", "Net"),
        ("src/models/net.py:Net", "src/models/net.py", "Net"),
        ("package.module:factory", "package.module", "factory"),
        ("package:Outer.Inner.build", "package", "Outer.Inner.build"),
        ("modèle:Réseau", "modèle", "Réseau"),
        ("a b/net.py:Net", "a b/net.py", "Net"),
        ("/tmp/x:y/net.py:Net", "/tmp/x:y/net.py", "Net"),
        ("net.py: Net ", "net.py", "Net"),
    ],
)
def test_names(text: str, module: str, attribute: str) -> None:
    assert parse_reference(text) == Reference(module, attribute)


def test_calls() -> None:
    found = parse_reference('timm:create_model("hf-hub:timm/x", pretrained=False, size=(2, -3))')
    assert found == Reference(
        "timm", "create_model", ("hf-hub:timm/x",), {"pretrained": False, "size": (2, -3)}
    )
    assert parse_reference("net.py:Net()") == Reference("net.py", "Net", (), {})
    assert str(found) == "timm:create_model('hf-hub:timm/x', pretrained=False, size=(2, -3))"


@pytest.mark.parametrize("text", ["model.onnx", "a/b.onnx", "net.py", "C:\\m\\net", "http://x/y"])
def test_other_forms(text: str) -> None:
    assert parse_reference(text) is None


@pytest.mark.parametrize(
    "expression",
    [
        "Net(x)", "Net(depth=n)", "Net(__import__('os'))", "Net(open('x'))", "Net(*[1])",
        "Net(**{'a': 1})", "Net(lambda: 0)", "Net([i for i in (1,)])", "Net(f'{1}')", "Net(1 + 1)",
        "Net(nn.ReLU)", "Net(1)(2)", "Net[0]", "(Net)()()", "Net; import os", "import os", "",
        ":Net",
        "Net(", "Net)", "1", "'Net'", "Net(a=1, a=2)", "Net(\x00)", "Net" + "(" * 5000, "a b",
        "Net(" + "[" * 300 + "]" * 300 + ")", "not Net", "Net if 1 else 2", "(yield)", "Net.1",
        "Net(...=1)", "Net\n(", "await x", "a := 1",
    ],
)  # fmt: skip
def test_what_is_no_name_and_no_call_with_literals(expression: str) -> None:
    with pytest.raises(ArchlintError) as error:
        parse_reference(f"net.py:{expression}")
    assert error.value.hint


literals = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner)
    | st.dictionaries(st.text() | st.integers(), inner, max_size=4)
    | st.sets(st.integers(), min_size=1, max_size=1),
    max_leaves=12,
)  # fmt: skip
names = st.text("abcdefgh_", min_size=1, max_size=8).map(lambda name: f"x{name}")


@settings(deadline=None)
@given(st.lists(literals, max_size=4), st.dictionaries(names, literals, max_size=4))
def test_every_literal_is_read_as_it_is_written(args: list[Any], kwargs: dict[str, Any]) -> None:
    reference = Reference("package.module", "Net.build", tuple(args), kwargs)
    found = parse_reference(str(reference))
    assert found == reference
    assert repr(found) == repr(reference)  # 1, 1.0 and True are equal and yet not the same


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_a_reference_or_an_error(text: str) -> None:
    with contextlib.suppress(ArchlintError):
        parse_reference(f"m:{text}")


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_text_resolves_or_is_an_error(text: str) -> None:
    with contextlib.suppress(ArchlintError):
        assert resolve(text).name == text


# --------------------------------------------------------------------------- inputs, kwargs


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("x:2x3x224x224", ("x", ((2, 3, 224, 224), None))),
        ("ids:2x128:int64", ("ids", ((2, 128), "int64"))),
        ("2x3", ("", ((2, 3), None))),
        ("2x3:int64", ("", ((2, 3), "int64"))),
        ("t:scalar", ("t", ((), None))),
        ("batch.ids:2X8", ("batch.ids", ((2, 8), None))),
        ("x:5", ("x", ((5,), None))),
    ],
)
def test_input(text: str, meant: Any) -> None:
    assert parse_input(text) == meant


@pytest.mark.parametrize(
    "text",
    ["", ":", "x", "x:", ":2x3", "x:2x", "x:axb", "x:0x3", "x:-1x3", "x:2x3:", "x:2x3:int65",
     "x:²", "x:" + "9" * 5000, "x:2x3:int64:int64"],
)  # fmt: skip
def test_wrong_input(text: str) -> None:
    if text == "x:2x3:":
        assert parse_input(text) == ("x", ((2, 3), None))
        return
    with pytest.raises(ArchlintError):
        parse_input(text)


def test_an_input_given_twice() -> None:
    assert parse_inputs(["x:2", "y:3", "x:2"]) == {"x": ((2,), None), "y": ((3,), None)}
    with pytest.raises(ArchlintError, match="x twice"):
        parse_inputs(["x:2", "x:3"])


def test_kwargs() -> None:
    assert parse_kwargs('{"depth": 3, "act": null}') == {"depth": 3, "act": None}
    for text in ("[1]", "3", "{", "", "{'depth': 3}", "[" * 100_000):
        with pytest.raises(ArchlintError, match="--kwargs"):
            parse_kwargs(text)
    target = resolve("net.py:Net(2)", kwargs={"width": 8})
    assert target.name == "net.py:Net(2, width=8)"
    with pytest.raises(ArchlintError, match="width is given"):
        resolve("net.py:Net(width=4)", kwargs={"width": 8})
    with pytest.raises(ArchlintError, match="nothing to hand --kwargs to"):
        resolve("model.onnx", kwargs={"width": 8})


# --------------------------------------------------------------------------- files


def test_files(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.pt", "net.py", "weights.safetensors"):
        (tmp_path / name).write_bytes(b"")
    assert resolve(tmp_path / "model.onnx").is_onnx
    whole = resolve(tmp_path / "net.py")
    assert whole.reference == Reference(str(tmp_path / "net.py"))
    for name, said in [
        ("model.pt", "never loaded"),
        ("weights.safetensors", "without a network"),
        ("nett.py", "does not exist"),
        ("", "is a folder"),
    ]:
        with pytest.raises(ArchlintError, match=said):
            resolve(tmp_path / name)
    with pytest.raises(ArchlintError) as error:
        resolve(tmp_path / "nett.py")
    assert error.value.hint == f"did you mean {tmp_path / 'net.py'}?"


def test_a_folder_means_the_onnx_files_in_it(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("b.onnx", "sub/a.onnx", "net.py"):
        (tmp_path / name).write_bytes(b"")
    assert expand([".", "b.onnx", "x:y", "x:y"]) == ["b.onnx", "sub/a.onnx", "x:y"]


# --------------------------------------------------------------------------- configuration


def config(path: Path, text: str) -> Any:
    file = path / "pyproject.toml"
    file.write_text(text, encoding="utf-8")
    return load_config(file)


def test_targets_of_the_configuration(tmp_path: Path, monkeypatch: Any) -> None:
    found = config(
        tmp_path,
        """
        [tool.archlint]
        targets = [
            "net.py:Net",
            {target = "pkg.mod:build", kwargs = {depth = 3}, inputs = ["x:2x8", "ids:2x4:int64"]},
            {target = "model.onnx", inputs = {x = "2x8"}},
        ]
        timeout = 20
        ignore = ["ARC403", {rules = ["ARC1"], reason = "known", path = "blocks.*"}]
        """,
    )
    plain, table, file = found.targets
    assert table == Configured(
        "pkg.mod:build", tmp_path, {"x": ((2, 8), None), "ids": ((2, 4), "int64")}, {"depth": 3}
    )
    assert found.timeout == 20
    assert found.ignore == ("ARC403",)
    assert [(i.rules, i.reason, i.path, i.target) for i in found.ignores] == [
        (("ARC1",), "known", "blocks.*", "*")
    ]
    (tmp_path / "model.onnx").write_bytes(b"")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert resolve(file).path == tmp_path / "model.onnx"
    assert resolve(plain).reference == Reference(str(tmp_path / "net.py"), "Net", folder=tmp_path)
    monkeypatch.chdir(tmp_path)
    assert resolve(table).name == "pkg.mod:build(depth=3)"
    assert resolve(plain).reference == Reference("net.py", "Net", folder=tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "targets = 'x'",
        "targets = [3]",
        "targets = [{kwargs = {}}]",
        "targets = [{target = 'x', depth = 3}]",
        "targets = [{target = 'x', inputs = [3]}]",
        "targets = [{target = 'x', inputs = ['y']}]",
        "targets = [{target = 'x', kwargs = 3}]",
        "timeout = 'x'",
        "timeout = true",
        "timeout = -1",
        f"timeout = {math.inf}",
        "ignore = [{rules = ['ARC1']}]",
        "ignore = [{rules = ['ARC1'], reason = ' '}]",
        "ignore = [{rules = 'ARC1', reason = 'x'}]",
        "ignore = [{rules = ['ARC1'], reason = 'x', lines = 3}]",
        "ignores = []",
        "select = ['ARC1', 3]",
        "rules = 3",
    ],
)
def test_wrong_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(ArchlintError, match=r"pyproject\.toml"):
        config(tmp_path, f"[tool.archlint]\n{text}\n")
