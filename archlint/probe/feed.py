"""What goes into a network under test: normal numbers, token ids, or rows of the user's data."""

from __future__ import annotations

import importlib
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archlint.errors import ArchlintError
from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import OPS
from archlint.probe.draws import Blocks
from archlint.probe.ops.frame import torch_dtype
from archlint.user_code import call

_MOST_ROWS = 4096  # batches are drawn from these
_MOST_ELEMENTS = 2**27


@dataclass(frozen=True)
class Data:
    """The user's samples by input, first axis the rows, and their classes where they have some;
    else, where something comes with the samples, a ``note`` on why these are no classes."""

    rows: Mapping[str, Tensor]
    labels: Tensor | None = None
    note: str = ""

    def to(self, device: torch.device, real: torch.dtype) -> Data:
        """The same on a device, its real numbers in a type. Raises ArchlintError."""
        try:
            rows = {
                id: x.to(device, real if x.is_floating_point() else x.dtype)
                for id, x in self.rows.items()
            }
            labels = None if self.labels is None else self.labels.to(device)
            return Data(rows, labels, self.note)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise ArchlintError(
                f"--data: its samples do not fit into the memory of {device}", "give fewer"
            ) from error


@dataclass(frozen=True)
class Feed:
    """Draws the inputs of a graph. ``rows`` holds the user's data by input, first axis the rows."""

    graph: LayerGraph
    seed: int
    real: torch.dtype
    device: torch.device
    rows: Mapping[str, Tensor]

    def draw(self, first: int, count: int) -> dict[str, Tensor]:
        """The inputs of draws ``first`` … ``first + count − 1``: value id -> [count, *shape]."""
        found = {}
        for k, id in enumerate(self.graph.inputs):
            size = math.prod(n or 1 for n in self.graph.shape(id) or ())
            blocks = Blocks(self.seed, 16 + k, size, self.device)
            found[id] = blocks.draw(first, count, partial(self._block, id))
        return found

    def _block(self, id: str, generator: torch.Generator, draws: int) -> Tensor:
        value = self.graph.values[id]
        shape = (draws, *(n or 1 for n in value.shape or ()))
        dtype = torch_dtype(value.dtype, self.real) or self.real
        if id in self.rows:
            rows = self.rows[id]
            chosen = torch.randint(rows.shape[0], shape[:2], generator=generator,
                                   device=self.device)  # fmt: skip
            return rows[chosen].to(dtype)
        if dtype.is_floating_point:
            x = torch.empty(shape, dtype=torch.float32, device=self.device)
            return x.normal_(generator=generator).to(dtype)
        bound = rows_read(self.graph, id)
        if bound is None or dtype == torch.bool:
            return torch.ones(shape, dtype=dtype, device=self.device)
        return torch.randint(bound, shape, generator=generator, device=self.device).to(dtype)


def rows_read(graph: LayerGraph, value: str) -> int | None:
    """How many rows the smallest table has that an integer value is an index of, else None."""
    found: list[int] = []
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        for node in graph.consumers.get(current, ()):
            size = _table(graph, node, current)
            if size is not None:
                found.append(size)
            elif node.op in OPS and OPS[node.op].kind == "layout":
                pending += [out for out in node.outputs if out not in seen]
                seen.update(node.outputs)
    return min(found, default=None)


def _table(graph: LayerGraph, node: Node, value: str) -> int | None:
    if node.op in ("embedding", "embedding_bag") and node.inputs[0] == value:
        shape = graph.shape(node.inputs[1])
        return shape[0] if shape else None
    if node.op == "gather" and node.inputs[1] == value:
        shape, axis = graph.shape(node.inputs[0]), node.attributes["axis"]
        return shape[axis] if shape and isinstance(axis, int) else None
    return None


# --------------------------------------------------------------------------- the user's data


def read_data(source: str, graph: LayerGraph) -> Data:
    """Rows for the first input of a graph from ``FILE.npy``, ``FILE.npz`` (the first array; the
    second holds the classes) or an importable loader ``package.module:loader``, whose batches may
    be pairs with classes. Of many rows some that are spread evenly. Raises ArchlintError for what
    does not fit."""
    try:
        array, classes = _arrays(source)
    except MemoryError as error:
        raise ArchlintError(
            f"{source} does not fit into the memory", "save fewer samples, or give a loader"
        ) from error
    if not graph.inputs:
        raise ArchlintError("--data is given, and the model has no input", "leave it out")
    id = graph.inputs[0]
    value = graph.values[id]
    wanted = tuple(value.shape or ())
    if array.ndim == 0 or len(array) == 0:
        raise ArchlintError(f"{source} holds no rows", "its first axis counts the samples")
    fits = len(wanted) == array.ndim and all(
        n in (None, m) for n, m in zip(wanted[1:], array.shape[1:], strict=True)
    )
    if not fits:
        sizes = "x".join(str(n) for n in array.shape[1:]) or "single numbers"
        expected = "x".join("?" if n is None else str(n) for n in wanted[1:]) or "single numbers"
        raise ArchlintError(
            f"{source}: its samples are {sizes}, the input {id} takes {expected}",
            f"save an array of [samples, {expected.replace('x', ', ')}], or give --input",
        )
    note = ""
    if classes is not None and classes.dtype.kind in "iu" and classes.ndim == 1:
        if len(classes) != len(array):
            raise ArchlintError(
                f"{source} holds {len(array)} samples and {len(classes)} classes",
                "save one class for each sample",
            )
    elif classes is not None:
        sizes = "x".join(str(n) for n in classes.shape) or "a single number"
        note = f"what comes with the samples, {sizes} of {classes.dtype}, is not a class for each"
        classes = None
    most = max(1, min(_MOST_ROWS, _MOST_ELEMENTS // max(math.prod(array.shape[1:]), 1)))
    if len(array) > most:
        every = np.linspace(0, len(array) - 1, most).round().astype(np.int64)
        array, classes = array[every], classes if classes is None else classes[every]
    floating = "float" in (value.dtype or "")
    if floating:
        if array.dtype.kind not in "fiub":
            raise ArchlintError(f"{source} holds {array.dtype}, not numbers", "save floats")
        bad = int((~np.isfinite(array.astype(np.float64))).sum())
        if bad:
            raise ArchlintError(
                f"{source} holds {bad} elements that are NaN or infinite", "clean the data first"
            )
    elif array.dtype.kind not in "iub":
        raise ArchlintError(
            f"{source} holds {array.dtype}, the input {id} takes {value.dtype}", "save integers"
        )
    else:
        bound = rows_read(graph, id)
        if bound is not None and (array.min() < 0 or array.max() >= bound):
            raise ArchlintError(
                f"{source} holds ids from {array.min()} to {array.max()}, the table has {bound} "
                "rows", "use the model's own tokenizer")  # fmt: skip
    wide = np.float64 if floating else np.int64
    rows = {id: torch.from_numpy(np.array(array, wide))}
    labels = None if classes is None else torch.as_tensor(classes.astype(np.int64))
    return Data(rows, labels, note)


def _arrays(source: str) -> tuple[Any, Any]:
    """Samples, and what comes with them or None."""
    path = Path(source)
    if path.suffix in (".npy", ".npz") or path.exists():
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)
            if not isinstance(found, np.lib.npyio.NpzFile):
                return found, None
            with found:
                arrays = [found[name] for name in found.files[:2]]
            if not arrays:
                raise ValueError("it is empty")
            return arrays[0], arrays[1] if len(arrays) > 1 else None
        except FileNotFoundError as error:
            raise ArchlintError(f"{source} does not exist", "check --data") from error
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            text = " ".join(str(error).split())[:120]
            if "pickle" in text or "Python objects" in text:
                text = "it is not of numpy's format, or holds objects"
            raise ArchlintError(
                f"{source} is no array of numbers: {text}", "save one with numpy.save"
            ) from error
    module, _, name = source.partition(":")
    if not name:
        raise ArchlintError(
            f"--data {source!r} is neither a .npy file nor a loader",
            "give FILE.npy, FILE.npz or package.module:loader",
        )

    def read() -> list[tuple[Any, Any]]:
        loader = getattr(importlib.import_module(module), name)
        return list(_batches(source, loader() if callable(loader) else loader))

    batches: list[tuple[Any, Any]] = call(f"reading {source}", read)
    if not batches:
        raise ArchlintError(f"{source} gives no batch", "check the loader")
    shapes = {first.shape[1:] for first, _ in batches}
    if len(shapes) > 1:
        some = ", ".join(sorted("x".join(map(str, s)) or "single numbers" for s in shapes)[:3])
        raise ArchlintError(
            f"{source} gives samples of several shapes: {some}", "let it pad or crop them"
        )
    samples = np.concatenate([first for first, _ in batches])[:_MOST_ROWS]
    seconds = [second for _, second in batches if second is not None]
    if len(seconds) < len(batches) or len({s.shape[1:] for s in seconds if s.ndim}) != 1:
        return samples, None
    return samples, np.concatenate(seconds)[:_MOST_ROWS]


def _batches(source: str, loader: Any) -> Iterator[tuple[Any, Any]]:
    """The first two tensors of each batch, None for one that is not there, until there are rows
    enough."""
    rows = 0
    for batch in loader:
        parts = [_array(x) for x in _leaves(batch)][:2]
        if not parts or parts[0].ndim == 0:
            raise ArchlintError(
                f"{source} gives a batch that is no array of samples: {type(batch).__name__}",
                "let it give tensors, or pairs of samples and classes",
            )
        yield parts[0], parts[1] if len(parts) > 1 else None
        rows += len(parts[0])
        if rows >= _MOST_ROWS:
            return


def _array(x: Any) -> Any:
    if isinstance(x, Tensor):
        x = x.detach().cpu()
        return (x.float() if x.dtype == torch.bfloat16 else x).numpy()
    return np.asarray(x)


def _leaves(batch: Any) -> Iterator[Any]:
    if isinstance(batch, list | tuple | dict):
        for part in batch.values() if isinstance(batch, dict) else batch:
            yield from _leaves(part)
    else:
        yield batch
