"""From a path to a parsed model and its tensors, safely: nothing is trusted, nothing is copied.

Large tensors stay in the memory-mapped file until something asks for them. External data is read
only from regular files below the model's own folder.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from archlint.errors import ArchlintError
from archlint.graph.model import Array
from archlint.graph.onnx_reader.wire import WireError, slim

# ONNX element type -> (numpy's name of it, bits per element)
_T = onnx.TensorProto
ELEMENT: dict[int, tuple[str, int]] = {
    _T.FLOAT: ("float32", 32),
    _T.UINT8: ("uint8", 8),
    _T.INT8: ("int8", 8),
    _T.UINT16: ("uint16", 16),
    _T.INT16: ("int16", 16),
    _T.INT32: ("int32", 32),
    _T.INT64: ("int64", 64),
    _T.STRING: ("str", 0),
    _T.BOOL: ("bool", 8),
    _T.FLOAT16: ("float16", 16),
    _T.DOUBLE: ("float64", 64),
    _T.UINT32: ("uint32", 32),
    _T.UINT64: ("uint64", 64),
    _T.COMPLEX64: ("complex64", 64),
    _T.COMPLEX128: ("complex128", 128),
    _T.BFLOAT16: ("bfloat16", 16),
    _T.FLOAT8E4M3FN: ("float8_e4m3fn", 8),
    _T.FLOAT8E4M3FNUZ: ("float8_e4m3fnuz", 8),
    _T.FLOAT8E5M2: ("float8_e5m2", 8),
    _T.FLOAT8E5M2FNUZ: ("float8_e5m2fnuz", 8),
    _T.UINT4: ("uint4", 4),
    _T.INT4: ("int4", 4),
    _T.FLOAT4E2M1: ("float4_e2m1fn", 4),
}
DTYPE_NUMBER = {name: number for number, (name, _) in ELEMENT.items()}
_FOREIGN = {
    ".pt": "a PyTorch pickle",
    ".pth": "a PyTorch pickle",
    ".pkl": "a pickle",
    ".pickle": "a pickle",
    ".ckpt": "a checkpoint",
    ".bin": "a file of weights",
    ".safetensors": "a file of weights",
    ".h5": "a Keras file",
    ".keras": "a Keras file",
    ".pb": "a TensorFlow graph",
    ".tflite": "a TensorFlow Lite file",
}
_LFS = b"version https://git-lfs.github.com"
_MOST_ELEMENTS = 2**46  # more than any file holds; keeps products of dimensions honest
_MOST_DIMENSIONS = 64


def numpy_dtype(name: str) -> np.dtype[np.generic]:
    """numpy's dtype of an element type's name, those of ml_dtypes included."""
    return np.dtype(getattr(ml_dtypes, name) if hasattr(ml_dtypes, name) else name)


@dataclass(frozen=True)
class ModelFile:
    """A parsed ONNX model with its large tensors still in the file.

    ``token`` is the external-data location that means "this very file"; it is drawn at random so
    that no file can name it.
    """

    path: Path
    proto: onnx.ModelProto
    token: str

    @cached_property
    def _mapped(self) -> dict[Path, np.memmap[tuple[int], np.dtype[np.uint8]]]:
        return {}

    def bytes_at(self, path: Path, offset: int, length: int) -> Array:
        """A read-only view of ``length`` bytes of a file."""
        if path not in self._mapped:
            self._mapped[path] = np.memmap(path, np.uint8, "r")
        return self._mapped[path][offset : offset + length]

    def tensor(self, proto: onnx.TensorProto, what: str) -> Tensor:
        """A tensor of the model, checked against the bytes that there are but not read.

        Raises ArchlintError, naming ``what``, where size, type or place of the data are wrong.
        """
        return _tensor(self, proto, what)


@dataclass(frozen=True, slots=True)
class Tensor:
    """An array that is read when it is asked for."""

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], Array]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_model(path: Path) -> ModelFile:
    """Parse an ONNX file. Raises ArchlintError for everything that is none."""
    if not path.exists():
        raise ArchlintError(f"{path}: no such file", "check the path")
    if path.is_dir():
        raise ArchlintError(
            f"{path} is a directory", f"name a file in it, such as {path}/model.onnx"
        )
    if not path.is_file():
        raise ArchlintError(f"{path} is not a regular file", "name an ONNX file")
    if (foreign := _FOREIGN.get(path.suffix.lower())) is not None:
        raise ArchlintError(
            f"{path} is {foreign}; archlint reads no {path.suffix} files",
            "name the Python class that builds the model (file.py:Net), or export it to ONNX",
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(256)
            if size == 0:
                raise ArchlintError(f"{path} is empty", "export or download the model again")
            if head.startswith(_LFS):
                raise ArchlintError(
                    f"{path} is a Git LFS pointer, not the model itself", "run `git lfs pull`"
                )
            if head[:4] == b"PK\x03\x04":
                raise ArchlintError(
                    f"{path} is a zip archive, not an ONNX file",
                    "unpack it, or name the Python class that builds the model (file.py:Net)",
                )
            token = f"self:{os.urandom(8).hex()}"
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
                proto = onnx.ModelProto.FromString(slim(buffer, size, token))
    except (WireError, DecodeError) as error:
        if all(byte < 128 and (byte >= 32 or byte in b"\t\r\n\f") for byte in head):
            raise ArchlintError(
                f"{path} is a text file, not an ONNX file", "name the exported model"
            ) from error
        if "depth" in str(error).lower():
            raise ArchlintError(
                f"{path} nests bodies of If, Loop or Scan more deeply than protobuf reads",
                "export the model without so many nested conditions",
            ) from error
        raise ArchlintError(
            f"{path} is not an ONNX file, or is damaged or cut short",
            "export or download it again",
        ) from error
    except OSError as error:
        raise ArchlintError(
            f"{path} cannot be read: {error.strerror}", "check the file and its permissions"
        ) from error
    if not _is_text(proto):
        raise ArchlintError(
            f"{path} is damaged: a name in it is not UTF-8", "export or download it again"
        )
    if not proto.HasField("graph") or (not proto.graph.node and not proto.graph.output):
        raise ArchlintError(
            f"{path} is not an ONNX file, or is damaged or cut short: it holds no graph",
            "export or download it again",
        )
    if not proto.opset_import and proto.ir_version >= 3:
        raise ArchlintError(f"{path} names no opset", "export or download it again")
    return ModelFile(path, proto, token)


def _is_text(proto: onnx.ModelProto) -> bool:
    """Whether every name that is looked up is text: protobuf hands over what is not UTF-8 as
    bytes, which no table of operators or values holds."""
    pending: list[Any] = [proto.graph, *proto.functions]
    names: list[object] = [o.domain for o in proto.opset_import]
    while pending:
        graph = pending.pop()
        if isinstance(graph, onnx.FunctionProto):
            names += (graph.name, graph.domain, *graph.input, *graph.output, *graph.attribute)
            names += (o.domain for o in graph.opset_import)
        else:
            for info in chain(graph.input, graph.output):
                names.append(info.name)
                names += (d.dim_param for d in info.type.tensor_type.shape.dim)
            for tensor in graph.initializer:
                names.append(tensor.name)
                names += (text for e in tensor.external_data for text in (e.key, e.value))
            names += (text for s in graph.sparse_initializer
                      for text in (s.values.name, s.indices.name))  # fmt: skip
        for node in graph.node:
            names += (node.op_type, node.domain, node.name, *node.input, *node.output)
            names += (text for e in node.metadata_props for text in (e.key, e.value))
            for a in node.attribute:
                names += (a.name, a.ref_attr_name)
                if a.HasField("g"):
                    pending.append(a.g)
                pending.extend(a.graphs)
    return all(type(name) is str for name in names)


# --------------------------------------------------------------------------- tensors

_TYPED_FIELDS = {
    "float32": "float_data",
    "complex64": "float_data",
    "float64": "double_data",
    "complex128": "double_data",
    "int64": "int64_data",
    "uint32": "uint64_data",
    "uint64": "uint64_data",
}


def _tensor(file: ModelFile, proto: onnx.TensorProto, what: str) -> Tensor:
    where = f"{file.path}: tensor {what!r}"
    again = "export or download the model again"
    if proto.data_type not in ELEMENT:
        raise ArchlintError(f"{where} has the unknown element type {proto.data_type}", again)
    dtype, bits = ELEMENT[proto.data_type]
    shape = tuple(proto.dims)
    if len(shape) > _MOST_DIMENSIONS or any(n < 0 for n in shape):
        raise ArchlintError(f"{where} has the impossible shape {list(shape)[:8]}", again)
    count = math.prod(shape)
    if count > _MOST_ELEMENTS:
        raise ArchlintError(f"{where} promises {count:.3g} elements", again)
    needed = (count * bits + 7) // 8
    if dtype == "str":
        if len(proto.string_data) != count:
            raise ArchlintError(f"{where} holds {len(proto.string_data)} of {count} strings", again)
        strings = list(proto.string_data)
        return Tensor(shape, dtype, lambda: np.array(strings, dtype=object).reshape(shape))
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        return Tensor(shape, dtype, _external(file, proto, where, needed, shape, dtype, bits))
    if proto.HasField("raw_data"):
        raw = proto.raw_data
        if len(raw) != needed:
            raise ArchlintError(f"{where} holds {len(raw)} bytes, but needs {needed}", again)
        return Tensor(
            shape, dtype, lambda: _decode(np.frombuffer(raw, np.uint8), shape, dtype, bits)
        )
    return _typed(proto, where, shape, dtype, count, bits)


def _typed(
    proto: onnx.TensorProto, where: str, shape: tuple[int, ...], dtype: str, count: int, bits: int
) -> Tensor:
    """A tensor whose elements are in one of the repeated fields."""
    field = getattr(proto, _TYPED_FIELDS.get(dtype, "int32_data"))
    packed = 2 if dtype.startswith("complex") else 1
    expected = (count * bits + 7) // 8 if bits < 8 else count * packed
    if len(field) != expected:
        raise ArchlintError(
            f"{where} holds {len(field)} of {expected} elements", "export or download it again"
        )

    def load() -> Array:
        if bits < 8:
            return _decode(np.array(field, np.uint8), shape, dtype, bits)
        if dtype.startswith("complex"):
            parts = np.array(field, "float64" if dtype == "complex128" else "float32")
            return parts.view(dtype).reshape(shape)
        if dtype == "float16" or hasattr(ml_dtypes, dtype):  # bit patterns in integers
            unsigned = np.uint16 if bits == 16 else np.uint8
            return (
                np.array(field, np.int64).astype(unsigned).view(numpy_dtype(dtype)).reshape(shape)
            )
        return np.array(field).astype(numpy_dtype(dtype)).reshape(shape)

    return Tensor(shape, dtype, load)


def _decode(data: Array, shape: tuple[int, ...], dtype: str, bits: int) -> Array:
    if bits < 8:  # two to a byte, the low half first
        packed = data.astype(np.uint8)
        nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(-1)[: math.prod(shape)]
        if dtype == "uint4":
            return nibbles.astype(np.uint8).reshape(shape)
        if dtype == "int4":
            return ((nibbles.astype(np.int8) ^ 8) - 8).reshape(shape)
        return nibbles.astype(np.uint8).view(numpy_dtype(dtype)).reshape(shape)
    return data.view(numpy_dtype(dtype)).reshape(shape)


def _external(
    file: ModelFile,
    proto: onnx.TensorProto,
    where: str,
    needed: int,
    shape: tuple[int, ...],
    dtype: str,
    bits: int,
) -> Callable[[], Array]:
    """Check where external data lies and how much of it there is; a loader for it."""
    entries = {entry.key: entry.value for entry in proto.external_data}
    location = entries.get("location", "")
    path = file.path if location == file.token else _external_path(file.path, location, where)
    try:
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", str(needed)))
    except ValueError as error:
        raise ArchlintError(
            f"{where} has no readable offset or length", "export or download the model again"
        ) from error
    size = path.stat().st_size
    if offset < 0 or length != needed:
        raise ArchlintError(
            f"{where} holds {length} bytes, but its shape needs {needed}",
            "export or download the model again",
        )
    if offset + length > size:
        raise ArchlintError(
            f"{where} needs {needed} bytes from {offset} on, but {path.name} ends at {size}",
            "the data file is cut short or belongs to another model: copy it again",
        )
    if needed == 0:
        return lambda: np.zeros(shape, numpy_dtype(dtype))
    return lambda: _decode(file.bytes_at(path, offset, length), shape, dtype, bits)


def _external_path(model: Path, location: str, where: str) -> Path:
    """The data file below the model's folder that a location names; ArchlintError otherwise."""
    folder = model.parent.resolve()
    relative = Path(location.replace("\\", "/"))
    refused = "external data must lie in the model's own folder: move the file there"
    if not location or "\0" in location:
        raise ArchlintError(f"{where} names no external data file", "export the model again")
    if relative.is_absolute() or ":" in location.split("/")[0]:
        raise ArchlintError(f"{where} asks for the absolute path {location}", refused)
    if ".." in relative.parts:
        raise ArchlintError(f"{where} asks for {location}, outside the model's folder", refused)
    path = folder / relative
    try:
        resolved = path.resolve()
        if not resolved.is_relative_to(folder):
            raise ArchlintError(f"{where} follows a link out of the model's folder", refused)
        if not resolved.is_file():
            raise ArchlintError(
                f"{where} is in the file {location}, which is missing",
                f"copy it beside {model.name}",
            )
        if not os.access(resolved, os.R_OK):
            raise ArchlintError(
                f"{where} is in the file {location}, which cannot be read",
                "check the file's permissions",
            )
    except OSError as error:
        raise ArchlintError(
            f"{where}: {location} cannot be read", "check the path of the external data"
        ) from error
    return resolved
