"""Inputs as a model's documentation states them, and what the names of dimensions mean.

The docstring of a forward says ``x (`torch.LongTensor` of shape `(batch_size, num_patches)`)``, in
``transformers`` for nearly every parameter; code says ``batch, channels, height, width = x.shape``.
"""

from __future__ import annotations

import ast
import inspect
import math
import operator
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from archlint.graph.example_input import LENGTH, SAMPLES, Spec, attribute, known, vocabulary_of

GRID = 4  # patches along a side of an image whose patches are given one by one
WAVEFORM = 16000  # samples of audio: a second
FRAMES = 4  # of a video whose length no configuration tells

_PARAMETER = re.compile(r"^[ \t]*(\w+) ?\((.*?)\):(?=\s|$)", re.MULTILINE)
_SHAPE = re.compile(r"shape:?\s*[`'\"]*[(\[]([^`'\"]*)[)\]]")


@dataclass(frozen=True)
class Stated:
    """What documentation says of one tensor: the names of its dimensions, the name of its type."""

    dimensions: tuple[str, ...]
    kind: str


def stated_inputs(model: nn.Module) -> dict[str, Stated]:
    """The parameters of forward whose shape its docstring states, or its code by unpacking it."""
    text = inspect.getdoc(model.forward) or ""
    text = re.split(r"^\s*Returns?:", text, maxsplit=1, flags=re.MULTILINE)[0]
    found: dict[str, Stated] = {}
    for match in _PARAMETER.finditer(text):
        name, said = match[1], match[2] or ""
        shape = _SHAPE.search(said)
        if shape is not None and name not in found:
            found[name] = Stated(_split(shape[1]), said[: shape.start()])
    for name, dimensions in _unpacked(model).items():  # code is never out of date
        found[name] = Stated(dimensions, found[name].kind if name in found else "")
    return found


def _unpacked(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameters of forward that it takes apart: ``batch, steps, bins = features.shape``."""
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(model.forward)))
        body = ast.parse(source).body[0]
    except (OSError, TypeError, SyntaxError, IndexError, ValueError):
        return {}
    found: dict[str, tuple[str, ...]] = {}
    names = {a.arg for a in getattr(getattr(body, "args", None), "args", [])}
    for node in getattr(body, "body", []):
        if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Tuple):
            continue
        value = node.value.func if isinstance(node.value, ast.Call) else node.value
        if isinstance(value, ast.Attribute) and value.attr in ("shape", "size"):
            parts = [t.id for t in node.targets[0].elts if isinstance(t, ast.Name)]
            owner = value.value
            whole = len(parts) == len(node.targets[0].elts) and "_" not in parts
            if isinstance(owner, ast.Name) and owner.id in names and whole:
                found.setdefault(owner.id, tuple(parts))
    return found


def _split(text: str) -> tuple[str, ...]:
    """The dimensions of a shape; of alternatives the first."""
    first = re.split(r"\)\s*(?:or|,)\s*\(|\)`", text)[0]
    return tuple(part.strip() for part in first.split(",") if part.strip())


def spec_of(model: nn.Module, name: str, stated: Stated, length: int = LENGTH) -> Spec | None:
    """The tensor that was stated, None where a dimension has no known size."""
    sizes = Sizes(model, WAVEFORM if _is_waveform(name) else length, _is_waveform(name))
    shape = tuple(sizes.of(d) for d in stated.dimensions)
    if not shape or any(n is None for n in shape):
        return None
    return spec_named(model, name, tuple(n for n in shape if n is not None), stated.kind)


def _is_waveform(name: str) -> bool:
    return name in ("input_values", "audio_values", "waveform", "raw_speech", "speech")


def spec_named(model: nn.Module, name: str, shape: tuple[int, ...], kind: str = "") -> Spec:
    """A tensor of a shape, its type and elements by the convention of its name."""
    if name.endswith("grid_thw") and shape[-1:] == (3,):
        return known(torch.tensor([[1, GRID, GRID]]).expand(*shape).contiguous())
    if name.endswith("_sizes") and len(shape) == 1:  # such as how many patches are merged into one
        return known(torch.ones(shape, dtype=torch.int64))
    if name.endswith(("_sizes", "_shapes")) and shape[-1:] == (2,):  # in patches, as of grids
        return known(torch.full(shape, GRID, dtype=torch.int64))
    if name.endswith("position_ids") and len(shape) == 2:
        return known(torch.arange(shape[-1]).expand(shape).contiguous())
    if "mask" in name and "Float" not in kind and len(shape) <= 3:
        masked = "masked_pos" in name  # what is to be hidden: nothing
        kept = torch.zeros(shape) if masked else torch.ones(shape)
        return known(kept.to(torch.bool if masked or "Bool" in kind else torch.int64))
    if "Bool" in kind:
        return Spec(shape, torch.bool)
    counts = ("Long", "Int", "int64", "int32")
    if any(word in kind for word in counts) or ("Float" not in kind and name.endswith("_ids")):
        return Spec(shape, torch.int64, vocabulary_of(model))
    return Spec(shape)


# --------------------------------------------------------------------------- sizes by name

_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Pow: operator.pow,
}
_SAME = {  # what several libraries call one attribute of a configuration
    "mel": ("num_mel_bins", "feature_size", "input_feat_per_channel", "num_mels", "n_mels"),
    "channels": ("num_channels", "in_channels", "in_chans", "input_channels", "image_channels"),
    "frames": ("num_frames", "crop_size", "temporal_patch_size"),
}


@dataclass(frozen=True)
class Sizes:
    """The sizes that the names of dimensions stand for, in a model."""

    model: nn.Module
    length: int = LENGTH
    waveform: bool = False

    def of(self, dimension: str) -> int | None:
        """The size that a name or a small formula of names stands for, None where unknown."""
        text = re.sub(r"(?<=\w) (?=\w)", "_", dimension.strip("`' \"*"))
        try:
            tree = ast.parse(text, mode="eval").body
        except SyntaxError:
            return None
        found = self._value(tree)
        return found if found is not None and 0 < found < 2**31 else None

    def _value(self, tree: ast.expr) -> int | None:
        match tree:
            case ast.Constant(value=int(value)):
                return value
            case ast.Attribute(value=ast.Name(id="config" | "self"), attr=name):
                return self.configured(name)
            case ast.Name(id=name):
                return self._named(name)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                a, b = self._value(left), self._value(right)
                if a is None or b is None or (isinstance(op, ast.Pow) and b > 4):
                    return None
                return _OPERATORS[type(op)](a, b) if b else None
        return None

    def _named(self, name: str) -> int | None:
        low = name.lower()
        words = set(low.split("_"))
        if low.startswith("batch") or low in ("bs", "bsz", "b"):
            return SAMPLES
        if "channels" in words or "channel" in words or low in ("c", "chans", "ch"):
            if self.waveform or "audio" in words:
                return self.configured("audio_channels") or 1
            return self.configured(*_SAME["channels"]) or 3
        if words & {"height", "h", "width", "w"} or low in ("image_size", "frame_size"):
            side = self.side(low in ("width", "w"))
            grid = side is not None and "patch" in words and "patch_size" not in low
            return GRID if grid else side
        if words & {"mel", "mels", "banks"} or low in ("feature_dim", "feature_size", "n_freqs"):
            return self.configured(*_SAME["mel"]) or 80
        if "tokens" in words and words & {"image", "images"}:
            return GRID * GRID
        if "frames" in words or "frame" in words:
            return self.configured(*_SAME["frames"]) or FRAMES
        if low.startswith(("num_", "n_", "max_num_", "total_", "point_")) and words & {
            "images", "image", "videos", "video", "audio", "audios", "clips", "tiles", "boxes",
            "points", "choices", "chunks", "batch", "banks",
        }:  # fmt: skip
            return 1
        if "patches" in words or low == "patch_sequence_length":
            return self._patches()
        if (
            low.startswith(("num_", "n_"))
            and words & {"features", "regions", "objects"}
            and (low != "num_features")
        ):
            return self.length
        if low in ("num_input_channels", "num_features", "input_size"):
            return self.configured("num_input_channels", "input_size") or 1
        if (found := self.configured(name)) is not None:
            return found
        if words & {"seq", "seqlen", "length", "len", "tokens", "steps", "samples", "t", "time"}:
            return self.length
        if low.endswith(("dim", "size")) and (width := self.configured("hidden_size", "d_model")):
            return width
        return None

    def side(self, wide: bool = False) -> int | None:
        """The side of an image, in pixels."""
        for config in self.configurations():
            found = attribute(config, "image_size") or attribute(config, "img_size")
            if isinstance(found, Mapping):
                found = (found.get("height"), found.get("width"))
            if isinstance(found, Sequence) and len(found) >= 2:
                found = found[-1] if wide else found[-2]
            if isinstance(found, int) and found > 0:
                return found
        return 224

    def _patches(self) -> int:
        side, patch = self.side(), self.configured("patch_size")
        image = any(hasattr(c, "image_size") for c in self.configurations())
        return math.prod([side // patch] * 2) if image and side and patch else GRID * GRID

    def configured(self, *names: str) -> int | None:
        """The first positive integer that a configuration of the model has under these names."""
        for config in self.configurations():
            for name in names:
                found = attribute(config, name)
                if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                    return found
        return None

    def configurations(self) -> Iterator[Any]:
        """The configuration, the model itself where it has none, and those that are in it."""
        queue = [attribute(self.model, "config") or self.model]
        for config in queue:
            yield config
            if not isinstance(config, nn.Module):
                queue += [v for v in vars(config).values() if hasattr(v, "to_dict")]
