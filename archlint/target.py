"""What the user named -> what to load. Nothing is imported or read here."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from archlint.errors import ArchlintError
from archlint.finding import short_path

Inputs = Mapping[str, Any]

_PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin")
_OTHER = {
    ".safetensors": "holds weights without a network",
    ".h5": "is a Keras file; export it to ONNX",
    ".keras": "is a Keras file; export it to ONNX",
    ".tflite": "is a TensorFlow Lite file; convert it to ONNX",
    ".pb": "is a TensorFlow file; convert it to ONNX",
}
FORMS = "model.onnx, net.py:Net, package.module:factory, 'timm:create_model(\"resnet50\")'"


@dataclass(frozen=True)
class Reference:
    """A Python object by its name: ``net.py:Net``, ``package.module:build(depth=3)``.

    ``module`` is a file or a dotted name, ``attribute`` a dotted name in it, empty for the whole
    file. ``args`` and ``kwargs`` are what it is called with, None where the name stands alone.
    ``folder`` is where a dotted name is looked for first, besides the usual places.
    """

    module: str
    attribute: str = ""
    args: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] | None = None
    folder: Path | None = None

    @property
    def is_file(self) -> bool:
        """Whether the module is named by its file."""
        return self.module.endswith(".py")

    def __str__(self) -> str:
        name = f"{self.module}:{self.attribute}" if self.attribute else self.module
        if self.args is None and self.kwargs is None:
            return name
        given = [repr(value) for value in self.args or ()]
        given += [f"{key}={value!r}" for key, value in (self.kwargs or {}).items()]
        return f"{name}({', '.join(given)})"


@dataclass(frozen=True)
class Configured:
    """A target as ``[tool.archlint] targets`` names it, relative to the file's ``folder``."""

    target: str
    folder: Path
    inputs: Inputs = field(default_factory=dict)
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """What it is as a path."""
        here = self.folder.resolve() == Path.cwd().resolve()
        return Path(self.target) if here else self.folder / self.target

    def __str__(self) -> str:
        return self.target


@dataclass(frozen=True)
class Target:
    """One thing to lint. ``name`` is what the report calls it.

    Exactly one of the others is set: ``path`` (an ONNX file or an exported program), ``reference``
    (a Python object by name) or ``model`` (an ``nn.Module``, a program, or what builds one).
    """

    name: str
    path: Path | None = None
    inputs: Inputs = field(default_factory=dict)
    reference: Reference | None = None
    model: Any = None

    @property
    def is_onnx(self) -> bool:
        """Whether this is read without torch."""
        return self.path is not None and self.path.suffix.lower() != ".pt2"


def resolve(
    spec: object, inputs: Inputs | None = None, kwargs: Mapping[str, Any] | None = None
) -> Target:
    """The target that is meant: a string of the command line, a path, a model, what builds one.

    ``kwargs`` are handed to the class or function that a string names. Raises ArchlintError for
    what is no target.
    """
    if isinstance(spec, Target):
        return replace(spec, inputs=inputs) if inputs else spec
    inputs = _named(inputs)
    if isinstance(spec, Configured):
        return _configured(spec, inputs, kwargs)
    if not isinstance(spec, str | Path):
        if kwargs:
            raise ArchlintError("kwargs are for targets that are named", "give a function instead")
        return Target(_name_of(spec), None, inputs, model=spec)
    path, name = Path(spec), str(spec)
    if not path.exists() and (reference := parse_reference(name)) is not None:
        if kwargs:
            reference = _with(reference, kwargs)
            name = str(reference)
        return Target(name, None, inputs, reference)
    suffix = path.suffix.lower()
    if suffix in _PICKLED:
        raise ArchlintError(
            f"{name}: a pickled file is never loaded, since loading one runs its code",
            "name the code that builds the model, such as net.py:Net, or export it: "
            "torch.onnx.export(model, inputs, 'model.onnx')",
        )
    if suffix in _OTHER:
        raise ArchlintError(f"{name} {_OTHER[suffix]}", "archlint reads .onnx files")
    if path.is_dir():
        raise ArchlintError(f"{name} is a folder", "name the model files in it, such as *.onnx")
    if suffix == ".py":
        if not path.exists():
            raise ArchlintError(f"{name} does not exist", _similar(path))
        return Target(name, None, inputs, _with(Reference(name), kwargs))
    if kwargs:
        raise ArchlintError(
            f"{name} is a file: there is nothing to hand --kwargs to", f"targets are {FORMS}"
        )
    if not path.exists() and suffix not in (".onnx", ".pt2") and re.fullmatch(r"[\w.]+", name):
        module, _, last = name.rpartition(".")
        hint = f"for Python code write {module}:{last}" if module else f"targets are {FORMS}"
        raise ArchlintError(f"{name} is neither a file nor a target", hint)
    return Target(name, path, inputs)


def _configured(spec: Configured, inputs: Inputs, kwargs: Mapping[str, Any] | None) -> Target:
    both = {**spec.inputs, **inputs} if isinstance(inputs, Mapping) else inputs
    kwargs = {**spec.kwargs, **(kwargs or {})}
    if spec.path.exists():
        return resolve(short_path(str(spec.path)), both, kwargs)
    target = resolve(spec.target, both, kwargs)
    reference = target.reference
    if reference is None:
        return replace(target, path=spec.path)
    if reference.is_file:
        file = short_path(str(replace(spec, target=reference.module).path))
        reference = replace(reference, module=file)
    return replace(target, reference=replace(reference, folder=spec.folder))


def _with(reference: Reference, kwargs: Mapping[str, Any] | None) -> Reference:
    """The reference called with further keyword arguments."""
    if not kwargs:
        return reference
    twice = sorted(kwargs.keys() & (reference.kwargs or {}).keys())
    if twice:
        raise ArchlintError(
            f"{reference}: {twice[0]} is given in the target and in --kwargs", "give it once"
        )
    return replace(reference, kwargs={**(reference.kwargs or {}), **kwargs})


def _name_of(model: object) -> str:
    """What a report calls an object: a function by its name, an instance by its class."""
    if isinstance(model, partial):
        model = model.func
    name = getattr(model, "__qualname__", None)
    return name.rpartition("<locals>.")[2] if isinstance(name, str) else type(model).__name__


def _similar(path: Path) -> str:
    """A hint: the files whose names are like that of one that does not exist."""
    try:
        beside = [p.name for p in path.parent.iterdir() if p.suffix == path.suffix]
    except OSError:
        return "check the path"
    import difflib

    near = difflib.get_close_matches(path.name, beside, 1)
    return f"did you mean {short_path(str(path.parent / near[0]))}?" if near else "check the path"


# --------------------------------------------------------------------------- Python objects

_FILE = re.compile(r"(.+?\.py):(.*)\Z", re.S)
_MODULE = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):(.*)\Z", re.S)


def parse_reference(text: str) -> Reference | None:
    """``net.py:Net``, ``package.module:Outer.build``, ``timm:create_model("resnet50")``.

    None where the text has another form. What stands behind the colon is read as an expression
    and never evaluated. Raises ArchlintError where it is no dotted name and no call of one with
    literals.
    """
    found = _FILE.match(text) or _MODULE.match(text)
    if found is None or found.group(2).startswith("//"):
        return None
    module, expression = found.groups()
    if re.fullmatch(r"[A-Za-z]", module) and expression[:1] in ("\\", "/"):
        return None  # a path with a drive letter
    return _parsed(module, expression, text)


def _parsed(module: str, expression: str, text: str) -> Reference:
    hint = f"write {module}:name, or a call with literals such as {module}:name(depth=3)"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ArchlintError(
            f"{text}: {expression or 'nothing'!r} is no name of a class or function", hint
        ) from error
    if not isinstance(tree, ast.Call):
        return Reference(module, _dotted(tree, text, hint))
    attribute = _dotted(tree.func, text, hint)
    args = tuple(_literal(node, attribute, text) for node in tree.args)
    kwargs: dict[str, Any] = {}
    for keyword in tree.keywords:
        if keyword.arg is None:
            raise ArchlintError(f"{text}: ** cannot be read in a target", "use --kwargs")
        if keyword.arg in kwargs:
            raise ArchlintError(f"{text}: {keyword.arg} is given twice", "give it once")
        kwargs[keyword.arg] = _literal(keyword.value, attribute, text)
    return Reference(module, attribute, args, kwargs)


def _dotted(node: ast.expr, text: str, hint: str) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise ArchlintError(f"{text}: this is no name and no call of one", hint)
    return ".".join([node.id, *reversed(parts)])


def _literal(node: ast.expr, function: str, text: str) -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        try:
            shown = ast.unparse(node)
        except RecursionError:
            shown = "one of them"
        raise ArchlintError(
            f"{text}: the argument {shown} of {function} is no literal",
            "arguments are numbers, strings, True, False, None and lists, tuples, sets and dicts "
            "of them; for anything else write a function that builds the model and name that",
        ) from error


def parse_kwargs(text: str) -> dict[str, Any]:
    """``{"depth": 3}`` -> keyword arguments. Raises ArchlintError."""
    hint = "write a JSON object, such as --kwargs '{\"depth\": 3}'"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArchlintError(f"--kwargs {text!r} is no JSON: {error}", hint) from error
    if not isinstance(value, dict):
        raise ArchlintError(f"--kwargs {text!r} is no object with names", hint)
    return value


# --------------------------------------------------------------------------- folders and inputs


def expand(specs: Sequence[str | Configured]) -> list[str | Configured]:
    """The targets with folders replaced by the ONNX files below them, in order of names."""
    found: list[str | Configured] = []
    for spec in specs:
        path = spec.path if isinstance(spec, Configured) else Path(spec)
        inside = sorted(short_path(str(p)) for p in path.rglob("*.onnx")) if path.is_dir() else []
        found += inside or [spec]
    once = dict.fromkeys(spec for spec in found if isinstance(spec, str))
    return [spec for spec in found if not isinstance(spec, str) or once.pop(spec, 0) is None]


def parse_inputs(texts: Sequence[str]) -> dict[str, tuple[tuple[int, ...], str | None]]:
    """All ``--input`` options. Raises ArchlintError where two say different things of one name."""
    found: dict[str, tuple[tuple[int, ...], str | None]] = {}
    for text in texts:
        name, value = parse_input(text)
        if found.setdefault(name, value) != value:
            raise ArchlintError(f"--input gives {name or 'the input'} twice", "give it once")
    return found


def parse_input(text: str) -> tuple[str, tuple[tuple[int, ...], str | None]]:
    """``x:2x3x224x224`` or ``ids:2x128:int64`` -> name, (shape, type). Raises ArchlintError.

    A shape alone is for a model of one input and has no name; ``scalar`` is the empty shape.
    ``batch.ids`` names the entry of a dict.
    """
    name, _, rest = text.partition(":")
    hint = "write NAME:2x3x224x224, or NAME:2x128:int64"
    if _shape(name) is not None and (not rest or rest in _TYPES):
        name, rest = "", text
    sizes, _, dtype = rest.partition(":")
    if (not name and rest != text) or not sizes:
        raise ArchlintError(f"--input {text!r} names no input with a shape", hint)
    shape = _shape(sizes)
    if shape is None:
        raise ArchlintError(f"--input {text!r}: {sizes!r} is no shape", hint)
    if dtype and dtype not in _TYPES:
        raise ArchlintError(
            f"--input {text!r}: {dtype!r} is no type", f"one of {', '.join(sorted(_TYPES))}"
        )
    return name, (shape, dtype or None)


def _shape(text: str) -> tuple[int, ...] | None:
    if text == "scalar":
        return ()
    parts = text.lower().split("x")
    if not all(re.fullmatch(r"0*[1-9][0-9]{0,11}", part) for part in parts):
        return None
    return tuple(int(part) for part in parts)


def _named(inputs: Any) -> Any:
    """Inputs from Python: a text such as ``2x3:int64`` by its name is a shape and a type."""
    if not isinstance(inputs, Mapping):
        return {} if inputs is None else inputs
    return {
        name: parse_input(f"{name}:{value}")[1] if isinstance(value, str) else value
        for name, value in inputs.items()
    }


_TYPES = {"float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8",
          "bool", "complex64", "complex128"}  # fmt: skip
