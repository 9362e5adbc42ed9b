"""What the user named -> what to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from archlint.errors import ArchlintError

InputShapes = Mapping[str, tuple[tuple[int | None, ...] | None, str | None]]

_PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".bin")
_OTHER = {
    ".safetensors": "holds weights without a network",
    ".h5": "is a Keras file; export it to ONNX",
    ".keras": "is a Keras file; export it to ONNX",
    ".tflite": "is a TensorFlow Lite file; convert it to ONNX",
    ".pb": "is a TensorFlow file; convert it to ONNX",
}


@dataclass(frozen=True)
class Target:
    """One thing to lint. ``path`` is the ONNX file, ``name`` what the report calls it."""

    name: str
    path: Path
    inputs: InputShapes = field(default_factory=dict)


def resolve(spec: str | Path, inputs: InputShapes | None = None) -> Target:
    """The target that a command-line argument names. Raises ArchlintError for what is none."""
    path = Path(spec)
    name = str(spec)
    suffix = path.suffix.lower()
    if suffix in _PICKLED:
        raise ArchlintError(
            f"{name}: a pickled file is never loaded, since loading one runs its code",
            "export the model: torch.onnx.export(model, inputs, 'model.onnx')",
        )
    if suffix in _OTHER:
        raise ArchlintError(f"{name} {_OTHER[suffix]}", "archlint reads .onnx files")
    if path.is_dir():
        raise ArchlintError(f"{name} is a folder", "name the model files in it, such as *.onnx")
    if not path.exists() and (":" in name or suffix == ".py"):
        raise ArchlintError(
            f"{name}: Python targets are not supported yet",
            "export the model: torch.onnx.export(model, inputs, 'model.onnx')",
        )
    return Target(name, path, inputs or {})


def expand(specs: tuple[str, ...]) -> list[str]:
    """The targets with folders replaced by the ONNX files below them, in order of names."""
    found: list[str] = []
    for spec in specs:
        path = Path(spec)
        files = sorted(str(p) for p in path.rglob("*.onnx")) if path.is_dir() else []
        found += files or [spec]
    return list(dict.fromkeys(found))


def parse_input(text: str) -> tuple[str, tuple[tuple[int, ...], str | None]]:
    """``x:2x3x224x224`` or ``ids:2x128:int64`` -> name, (shape, type). Raises ArchlintError."""
    name, _, rest = text.partition(":")
    sizes, _, dtype = rest.partition(":")
    hint = "write NAME:2x3x224x224, or NAME:2x128:int64"
    if not name or not sizes:
        raise ArchlintError(f"--input {text!r} names no input with a shape", hint)
    parts = sizes.lower().split("x")
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ArchlintError(f"--input {text!r}: {sizes!r} is no shape", hint)
    if dtype and dtype not in _TYPES:
        raise ArchlintError(
            f"--input {text!r}: {dtype!r} is no type", f"one of {', '.join(sorted(_TYPES))}"
        )
    return name, (tuple(int(part) for part in parts), dtype or None)


_TYPES = {"float16", "bfloat16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8",
          "bool"}  # fmt: skip
