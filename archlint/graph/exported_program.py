"""Reading ``.pt2`` files (``torch.export.save``) without running what is in them.

``torch.export.load`` unpickles weights, constants and sample inputs where a file says so, evaluates
expressions of symbolic sizes as Python, and resolves operators by attribute access on the module
``torch``, through which all of Python can be reached. So the parts are checked before: no pickled
objects, no expression but arithmetic, no operator but those of torch's dispatcher; and torch is
told to read tensors alone out of what is left. What loads executes nothing of the file's.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archlint.errors import ArchlintError

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# torch.ops has functions besides its namespaces: they load libraries and import modules
_OPERATOR = re.compile(
    r"(torch\.ops\.(?!load_library|import_module|loaded_libraries|__)\w+\.\w+(\.(?!__)\w+)?"
    r"|_operator\.\w+|math\.\w+|torch\._?sym_\w+|torch\.utils\._sympy\.functions\.[A-Z]\w*)\Z"
)


def load_program(path: Path) -> ExportedProgram:
    """The exported program of a file. Raises ArchlintError for what is none or holds pickles."""
    import torch

    _check(path)
    try:
        with _tensors_alone():
            return torch.export.load(path)
    except Exception as error:
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise ArchlintError(
            f"{path}: torch {torch.__version__} cannot load this exported program: {text}",
            "export it again with the torch that is installed here: torch.export.save",
        ) from error


def _check(path: Path) -> None:
    """Refuse a file with parts whose loading would run code."""
    if not path.exists():
        raise ArchlintError(f"{path} does not exist", "check the path")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for name in names:
                if re.search(r"(custom|opaque)_obj_|aotinductor/", name):
                    raise ArchlintError(
                        f"{path} holds pickled objects or compiled code ({name}), which are never "
                        f"loaded, since that runs what is in them",
                        "name the code that builds the model, such as net.py:Net",
                    )
            for name in names:
                if name.endswith(".json"):
                    _check_document(path, json.loads(archive.read(name)))
    except (zipfile.BadZipFile, OSError, ValueError, RecursionError, EOFError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ArchlintError(
            f"{path} is no exported program: {reason}",
            "archlint reads what torch.export.save wrote",
        ) from error


def _check_document(path: Path, document: Any) -> None:
    stack = [document]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack += item
            continue
        if not isinstance(item, dict):
            continue
        stack += item.values()
        target = item.get("target") if "inputs" in item else item.get("as_operator")
        expression = item.get("expr_str")
        if item.get("use_pickle") is True:
            _refuse(path, "a pickled tensor")
        if isinstance(target, str) and not _OPERATOR.match(target):
            _refuse(path, f"a call of {target[:80]!r}, no operator of torch")
        if isinstance(expression, str) and not _is_arithmetic(expression):
            _refuse(path, f"a size that is no arithmetic: {expression[:80]!r}")


_ARITHMETIC = (ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Constant, ast.Load, ast.BinOp,
               ast.UnaryOp, ast.Compare, ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop,
               ast.boolop)  # fmt: skip


def _is_arithmetic(text: str) -> bool:
    """Whether an expression of sizes is one: numbers, symbols, and sympy's functions of them, which
    have capitals. Sympy evaluates the strings it is given, so only a symbol's name may be one."""
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    names: set[int] = set()
    for node in ast.walk(tree):
        if not isinstance(node, _ARITHMETIC):
            return False
        if isinstance(node, ast.Name) and not re.fullmatch(r"[A-Za-z]\w*", node.id):
            return False
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or not node.func.id[:1].isupper():
                return False
            if node.func.id == "Symbol":
                names.update(id(argument) for argument in node.args[:1])
        if isinstance(node, ast.Constant) and isinstance(node.value, str | bytes):
            named = isinstance(node.value, str) and re.fullmatch(r"[A-Za-z]\w*", node.value)
            if id(node) not in names or not named:
                return False
    return True


def _refuse(path: Path, what: str) -> None:
    raise ArchlintError(
        f"{path} holds {what}, which is never loaded, since loading it may run code",
        "name the code that builds the model, such as net.py:Net",
    )


@contextlib.contextmanager
def _tensors_alone() -> Iterator[None]:
    """While this is active, ``torch.load`` reads tensors and refuses other pickled objects."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    other = os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
        if other is not None:
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = other
