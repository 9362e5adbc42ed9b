"""What to call a PyTorch model with: the user's inputs, the model's own, or deduced ones.

An example is a call of ``forward``. Its tensors are descriptions
(:class:`~archlint.graph.example_input.Spec`) that hold no elements: recording needs shapes and
types only. Where a model has to be run for real, a description becomes random elements.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from archlint.errors import ArchlintError
from archlint.graph.example_input import (
    LENGTH,
    SAMPLES,
    Example,
    Spec,
    layers_of,
    parameters_of,
    required_of,
    vocabulary_of,
)
from archlint.graph.transformers_inputs import input_named, of_transformers

Inputs = Mapping[str, Any] | Sequence[Any] | Tensor


def examples(model: nn.Module, given: Inputs | None = None, owner: Any = None) -> list[Example]:
    """Ways to call a model, likely ones first.

    ``given`` is what the user said: ``{name: (shape, dtype)}``, or tensors (alone, in order, by
    name). Else ``owner`` (the factory) or the model says it with ``example_inputs()``; else it is
    deduced. Raises ArchlintError for names that ``forward`` does not have, and where nothing can
    be deduced.
    """
    precision = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if given is not None and not (isinstance(given, Mapping | Sequence) and len(given) == 0):
        return [_in_precision(e, precision, _Untyped) for e in _from_user(model, given)]
    own = _own(owner) or _own(model)
    if own is not None:
        return [own]
    found = list(_deduced(model))
    if not found:
        raise ArchlintError(
            f"the input of {type(model).__name__} cannot be deduced: forward({_signature(model)})",
            f"say what it is: {flags(model)}",
        )
    return [_in_precision(e, precision, Spec) for e in found]


def _in_precision(example: Example, precision: torch.dtype, kind: type[Spec]) -> Example:
    """Real numbers whose type nobody gave come in the precision of the weights."""

    def convert(spec: Spec) -> Spec:
        if not isinstance(spec, kind) or spec.dtype != torch.float32:
            return spec
        return Spec(spec.shape, precision, spec.high)

    args, kwargs = pytree.tree_map_only(Spec, convert, (example.args, dict(example.kwargs)))
    return Example(args, kwargs, example.assumed, example.completes)


def described(names: Sequence[str], tensors: Sequence[Tensor]) -> Iterator[str]:
    """One remark for every input assumed."""
    for name, tensor in zip(names, tensors, strict=True):
        size = "x".join(str(n) for n in tensor.shape) or "a number"
        kind = "" if tensor.dtype == torch.float32 else f" of {str(tensor.dtype)[6:]}"
        yield f"input {name} assumed to be {size}{kind}"


# --------------------------------------------------------------------------- what the user gave


def _signature(model: nn.Module) -> str:
    return ", ".join(str(p) for p in parameters_of(model))


def flags(model: nn.Module) -> str:
    """The options that would say what a model takes."""
    wanted = [p.name for p in required_of(model)] or ["x"]
    return " ".join(f"--input {name}:2x3x224x224" for name in wanted[:4])


def _from_user(model: nn.Module, given: Inputs) -> Iterator[Example]:
    if isinstance(given, Tensor):
        given = (given,)
    if not isinstance(given, Mapping):
        if hasattr(given, "__array__"):
            given = (given,)
        yield Example(tuple(_from_array(v) for v in given), {}, assumed=False)
        return
    parameters = parameters_of(model)
    names = [p.name for p in parameters]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    in_order = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    positional: list[Any] = []
    kwargs: dict[str, Any] = {}
    for name, value in _nested(given, names).items():
        spec = _specs(model, name, value)
        if name == "" or (name not in names and in_order and not kwargs):
            positional.append(spec)
        elif name in names or takes_any:
            kwargs[name] = spec
        else:
            near = difflib.get_close_matches(name, names, 1)
            raise ArchlintError(
                f"{type(model).__name__}.forward has no parameter {name!r}",
                f"did you mean {near[0]!r}?" if near else f"it takes: {', '.join(names) or 'none'}",
            )
    kwargs = {
        p.name: kwargs.pop(p.name) for p in parameters if p.name in kwargs
    } | kwargs  # the order of forward's signature
    yield Example(tuple(positional), kwargs, assumed=False)
    if any(isinstance(v, _Untyped) for v in pytree.tree_leaves((positional, kwargs))):
        other = pytree.tree_map_only(_Untyped, _Untyped.other, (positional, kwargs))
        yield Example(tuple(other[0]), other[1], assumed=False)


def _nested(given: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """``batch.ids`` and ``batch.mask`` as one dict for ``batch``; ``images.0``, ``images.1`` as one
    list. Names that ``forward`` has as they are stay."""
    found: dict[str, Any] = {}
    for name, value in given.items():
        first, *rest = name.split(".")
        if name in names or not rest or first not in names:
            found[name] = value
            continue
        place = found.setdefault(first, {})
        for part in rest[:-1]:
            place = place.setdefault(part, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict) or rest[-1] in place:
            raise ArchlintError(
                f"the input {name!r} does not fit what was said of {first!r} before",
                "name the entries of a dict, or the whole of it, but not both",
            )
        place[rest[-1]] = _Entry(value)
    return {name: _listed(value) for name, value in found.items()}


@dataclass(frozen=True)
class _Entry:
    """What was said of one entry of a dict or list."""

    value: Any


def _listed(value: Any) -> Any:
    """Dicts whose keys count from 0 as lists."""
    if not isinstance(value, dict) or not any(isinstance(v, _Entry | dict) for v in value.values()):
        return value
    inner = {key: _listed(v) for key, v in value.items()}
    if sorted(inner) == sorted(str(i) for i in range(len(inner))):
        return [inner[str(i)] for i in range(len(inner))]
    return inner


def _specs(model: nn.Module, name: str, value: Any) -> Any:
    """The tensors to make of what was said of one parameter of ``forward``."""
    if isinstance(value, _Entry):
        return _spec(model, name, value.value)
    if isinstance(value, Mapping):
        return {key: _specs(model, f"{name}.{key}", v) for key, v in value.items()}
    if isinstance(value, list) and any(
        isinstance(v, _Entry | Mapping | Spec | Tensor | list | tuple) for v in value
    ):
        return [_specs(model, f"{name}.{i}", v) for i, v in enumerate(value)]
    return _spec(model, name, value)


@dataclass(frozen=True)
class _Untyped(Spec):
    """A shape that was given without a type."""

    def other(self) -> Spec:
        """The other reading: integers for real numbers and the reverse."""
        kind = torch.int64 if self.dtype.is_floating_point else torch.float32
        return Spec(self.shape, kind, self.high)


def _from_array(value: Any) -> Any:
    """An array of numpy as a tensor; anything else as it is."""
    is_array = hasattr(value, "__array__") and not isinstance(value, Tensor)
    return torch.as_tensor(value) if is_array else value


def _spec(model: nn.Module, name: str, value: Any) -> Any:
    """``(shape, dtype)``, or whatever else the user passes, as it is."""
    value = _from_array(value)
    if isinstance(value, Spec | Tensor) or value is None or isinstance(value, bool | int | float):
        return value
    shape, dtype = value, None
    if isinstance(value, tuple | list) and len(value) == 2 and not isinstance(value[0], int):
        shape, dtype = value
    if not isinstance(shape, tuple | list) or not all(isinstance(n, int) for n in shape):
        raise ArchlintError(
            f"the input {name!r} is neither a shape nor a tensor: {value!r}",
            "write NAME:2x3x224x224 or NAME:2x128:int64",
        )
    high = vocabulary_of(model)
    if dtype is not None:
        kind = dtype if isinstance(dtype, torch.dtype) else getattr(torch, str(dtype), None)
        if not isinstance(kind, torch.dtype):
            raise ArchlintError(
                f"the input {name!r} has the unknown type {dtype!r}",
                "types are called as in torch: float32, int64, bool",
            )
        return Spec(tuple(shape), kind, high)
    counted = any(word in name.lower() for word in ("ids", "token", "mask", "label"))
    return _Untyped(tuple(shape), torch.int64 if counted else torch.float32, high)


def _own(owner: Any) -> Example | None:
    """What ``owner.example_inputs()`` gives, or Lightning's ``example_input_array``."""
    made = getattr(owner, "example_inputs", None)
    if callable(made):
        try:
            value = made()
        except TypeError as problem:  # such as a method that wants an instance
            if "argument" not in str(problem):
                raise
            return None
    else:
        value = made if made is not None else getattr(owner, "example_input_array", None)
    if value is None or isinstance(value, nn.Module):
        return None
    if isinstance(value, Mapping):
        return Example((), dict(value), assumed=False)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
        return Example(tuple(value[0]), value[1], assumed=False)
    return Example(tuple(value) if isinstance(value, tuple) else (value,), {}, assumed=False)


# --------------------------------------------------------------------------- deduced


def _deduced(model: nn.Module) -> Iterator[Example]:
    if _takes_nothing(model):
        yield Example()
        return
    seen: set[str] = set()
    told = False  # whether transformers told what the input is called
    for source in (
        _exported,
        _timm,
        of_transformers,
        _detector,
        _images_of_a_known_side,
        _first_layers,
    ):
        found = source(model)
        if source is _first_layers and told:
            found = itertools.islice(found, _FEW)
        for example in found:
            told = told or source is of_transformers
            key = repr((example.args, sorted(example.kwargs.items())))
            if key not in seen:
                seen.add(key)
                yield example
        if source is _detector and seen and _is_detector(model):
            return  # nothing else is a list of images


_FEW = 8  # shapes to try for the first layers of a model that tells what its input is


def _takes_nothing(model: nn.Module) -> bool:
    return bool(parameters_of(model) == [] and type(model).forward is not nn.Module.forward)


def _exported(model: nn.Module) -> Iterator[Example]:
    """The shapes that a traced or exported graph was made with."""
    graph = getattr(model, "graph", None)
    if not isinstance(graph, torch.fx.Graph):
        return
    specs: list[Any] = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        if node.args:  # a default
            break
        value = node.meta.get("val")
        shape: Any = value.shape if isinstance(value, Tensor) else None
        dtype = value.dtype if isinstance(value, Tensor) else None
        if shape is None and (traced := node.meta.get("tensor_meta")) is not None:
            shape, dtype = getattr(traced, "shape", None), getattr(traced, "dtype", None)
        if shape is None or dtype is None:
            return
        specs.append(Spec(tuple(_hint(n) for n in shape), dtype, vocabulary_of(model)))
    if specs:
        yield Example(tuple(specs))


def _hint(size: Any) -> int:
    node = getattr(size, "node", None)
    hint = getattr(node, "hint", None)
    return int(size if hint is None else hint)


def _timm(model: nn.Module) -> Iterator[Example]:
    """timm's configuration of a model; the size it was built for comes first."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if not isinstance(config, Mapping) or "input_size" not in config:
        return
    channels, *sides = config["input_size"]
    channels = _image_channels(model) or channels
    built = _built_side(model)
    if built is not None:
        yield Example((Spec((SAMPLES, channels, *built)),))
    yield Example((Spec((SAMPLES, channels, *sides)),))
    for key in ("test_input_size", "min_input_size"):
        if config.get(key):
            yield Example((Spec((SAMPLES, channels, *config[key][1:])),))


def _built_side(model: nn.Module) -> tuple[int, int] | None:
    for owner in (getattr(model, "patch_embed", None), model):
        for key in ("img_size", "image_size"):
            found = getattr(owner, key, None)
            if isinstance(found, int) and not isinstance(found, bool) and found > 0:
                return found, found
            if not isinstance(found, tuple | list) or len(found) != 2:
                continue
            if all(isinstance(n, int) and n > 0 for n in found):
                return int(found[0]), int(found[1])
    return None


def _image_channels(model: nn.Module) -> int | None:
    for layer in layers_of(model):
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
    return None


# anything else -------------------------------------------------------------------------------


def _detector(model: nn.Module) -> Iterator[Example]:
    """torchvision's detectors: a list of images and, in training, boxes with labels."""
    if not _is_detector(model):
        return
    images = [Spec((3, 320, 320)) for _ in range(SAMPLES)]
    boxes = torch.tensor([[40.0, 40.0, 200.0, 160.0], [100.0, 80.0, 260.0, 300.0]])
    target = {
        "boxes": boxes,
        "labels": torch.ones(2, dtype=torch.int64),
        "masks": torch.ones(2, 320, 320, dtype=torch.uint8),
        "keypoints": torch.cat(
            [boxes.reshape(2, 2, 2).repeat(1, 9, 1)[:, :17], torch.ones(2, 17, 1)], -1
        ),
    }
    yield Example((images, [target] * SAMPLES))


def _is_detector(model: nn.Module) -> bool:
    return [p.name for p in parameters_of(model)][:2] == ["images", "targets"]


_SIDES = (224, 32, 256, 64, 28, 128, 384, 299, 512, 96, 48, 16, 8)


def _images_of_a_known_side(model: nn.Module) -> Iterator[Example]:
    """A model that keeps the side of its images as an attribute."""
    sides = _built_side(model)
    if sides is not None and len(required_of(model)) == 1:
        yield Example((Spec((SAMPLES, _image_channels(model) or 3, *sides)),))


def _first_layers(model: nn.Module) -> Iterator[Example]:
    """What fits the first layers that have parameters; what other parameters' names say."""
    required = required_of(model)
    if not required:
        required = parameters_of(model)[:1]
    named = [_of_name(model, p.name) for p in required]
    named[1:] = [
        n or input_named(model, p.name) for n, p in zip(named[1:], required[1:], strict=True)
    ]
    if not required or sum(spec is None for spec in named) > 2:
        return
    images = any(word in required[0].name.lower() for word in ("image", "img", "pixel", "frame"))
    shapes = list(_for_layers(model))
    if images:  # first what looks like one
        shapes.sort(key=_unlike_an_image)
    for spec in shapes:
        yield Example(tuple(spec if known is None else known for known in named))


def _unlike_an_image(spec: Spec) -> tuple[bool, bool, int]:
    """Order of trial: images first, of the usual side, then from large to small."""
    side = spec.shape[-1]
    return len(spec.shape) != 4, side != 224, -side if side <= 256 else side


def _of_name(model: nn.Module, name: str) -> Spec | None:
    """The tensor that a parameter takes by the convention of its name."""
    if name in ("t", "timestep", "timesteps", "time"):  # of a diffusion
        return Spec((SAMPLES,), torch.int64, vocabulary_of(model))
    if name in ("y", "label", "labels", "classes", "class_labels"):
        return Spec((SAMPLES,), torch.int64, vocabulary_of(model))
    return None


def _for_layers(model: nn.Module) -> Iterator[Spec]:
    """Tensors that the first parametrised layers take, one kind of layer each, once."""
    kinds: list[nn.Module] = []
    for layer in layers_of(model):
        if not any(_same_kind(layer, k) for k in kinds):
            kinds.append(layer)
        if len(kinds) == 4:
            break
    high = vocabulary_of(model)
    for layer in kinds:
        yield from specs_for_layer(layer, high)
    # patches are often cut by a reshape that no layer tells of
    for channels in (3, 1):
        for side in (224, 256, 32, 28, 64, 128):
            yield Spec((SAMPLES, channels, side, side))
    widths = [m.in_features for m in model.modules() if isinstance(m, nn.Linear)]
    for width in list(dict.fromkeys(widths))[:16]:  # the first to run is not the first registered
        yield Spec((SAMPLES, LENGTH, width))
        yield Spec((SAMPLES, width))


def _same_kind(a: nn.Module, b: nn.Module) -> bool:
    return type(a) is type(b)


def specs_for_layer(layer: nn.Module, high: int) -> Iterator[Spec]:
    """Tensors that a layer takes; ``high`` is one past the largest integer in them."""
    match layer:
        case nn.Embedding() | nn.EmbeddingBag():
            for length in (LENGTH, 16, 8, 128):
                yield Spec((SAMPLES, length), torch.int64, high)
            yield Spec((SAMPLES,), torch.int64, high)
        case nn.Conv2d():
            for side in _SIDES:
                yield Spec((SAMPLES, layer.in_channels, side, side))
        case nn.ConvTranspose2d():
            for side in (1, 4, 7, 8, 16):
                yield Spec((SAMPLES, layer.in_channels, side, side))
        case nn.Conv1d():
            for length in (128, 1024, 16000, LENGTH):
                yield Spec((SAMPLES, layer.in_channels, length))
        case nn.Conv3d():
            for frames, side in ((16, 112), (8, 64), (16, 224), (32, 32)):
                yield Spec((SAMPLES, layer.in_channels, frames, side, side))
        case nn.RNNBase():
            yield Spec((SAMPLES, LENGTH, layer.input_size))
            yield Spec((SAMPLES, layer.input_size))
        case nn.RNNCellBase():
            yield Spec((SAMPLES, layer.input_size))
        case nn.Linear():
            yield Spec((SAMPLES, layer.in_features))
            yield Spec((SAMPLES, LENGTH, layer.in_features))
            side = math.isqrt(layer.in_features)
            if side * side == layer.in_features:  # flattened images
                yield Spec((SAMPLES, 1, side, side))
            third = math.isqrt(layer.in_features // 3)
            if 3 * third * third == layer.in_features:
                yield Spec((SAMPLES, 3, third, third))
        case nn.MultiheadAttention():
            yield Spec((SAMPLES, LENGTH, layer.embed_dim))
        case nn.LayerNorm():
            yield Spec((SAMPLES, LENGTH, *layer.normalized_shape))
            yield Spec((SAMPLES, *layer.normalized_shape))
        case nn.BatchNorm2d() | nn.InstanceNorm2d():
            yield Spec((SAMPLES, layer.num_features, 32, 32))
        case nn.BatchNorm1d():
            yield Spec((SAMPLES, layer.num_features))
