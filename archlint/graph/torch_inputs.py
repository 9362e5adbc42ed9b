"""What to call a PyTorch model with: the user's inputs, the model's own, or deduced ones.

An example is a call of ``forward``. Its tensors are descriptions (:class:`Spec`) that hold no
elements: recording needs shapes and types only. Where a model has to be run for real, a
description becomes random elements.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from archlint.errors import ArchlintError

Inputs = Mapping[str, Any] | Sequence[Any] | Tensor
SAMPLES = 2  # more than one: a correlation between samples exists, and batch statistics are defined
LENGTH = 32


@dataclass(frozen=True)
class Spec:
    """A tensor to make: shape, dtype, and one past the largest integer it may hold.

    ``elements`` says what it holds where that is no matter of data: a mask, sizes of images.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    high: int = 2
    elements: Tensor | None = field(default=None, compare=False, repr=False)

    def on_meta(self) -> Tensor:
        """Without elements, or with those that are known kept beside it."""
        made = torch.empty(self.shape, dtype=self.dtype, device="meta")
        if self.elements is not None:
            made._archlint_elements = self.elements  # type: ignore[attr-defined]
        return made

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Standard normal numbers, or integers below ``high``."""
        if self.elements is not None:
            return self.elements.clone()
        if self.dtype == torch.bool:
            return torch.ones(self.shape, dtype=torch.bool)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(self.shape, generator=generator).to(self.dtype)
        return torch.randint(0, max(self.high, 1), self.shape, generator=generator).to(self.dtype)


@dataclass(frozen=True)
class Example:
    """One way to call a model. ``assumed`` says whether it was deduced, not given.

    ``completes`` says that it is the one before with what may be left out, such as masks: for
    models that look at their data to see whether they need them.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    assumed: bool = True
    completes: bool = False

    def on_meta(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, without elements where none were given."""
        return self._made(Spec.on_meta)

    def drawn(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with random elements."""
        generator = torch.Generator().manual_seed(seed)
        return self._made(lambda spec: spec.drawn(generator))

    def _made(self, make: Callable[[Spec], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = pytree.tree_map_only(Spec, make, (self.args, dict(self.kwargs)))
        return args, kwargs


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


def parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of ``forward``, without ``self``."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return []


def required_of(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of ``forward`` that must be given."""
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in parameters_of(model) if p.default is p.empty and p.kind not in fixed]


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
        yield Example(tuple(given), {}, assumed=False)
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


def _spec(model: nn.Module, name: str, value: Any) -> Any:
    """``(shape, dtype)``, or whatever else the user passes, as it is."""
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
    high = _vocabulary(model)
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
    for source in (
        _exported,
        _timm,
        _huggingface,
        _detector,
        _images_of_a_known_side,
        _first_layers,
    ):
        for example in source(model):
            key = repr((example.args, sorted(example.kwargs.items())))
            if key not in seen:
                seen.add(key)
                yield example


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
        specs.append(Spec(tuple(_hint(n) for n in shape), dtype, _vocabulary(model)))
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
    for layer in _leaves(model):
        if isinstance(layer, nn.Conv2d):
            return layer.in_channels
    return None


def _leaves(model: nn.Module) -> Iterator[nn.Module]:
    """The modules with parameters of their own, in the order they were registered."""
    for module in model.modules():
        if (
            "parametrizations" in module._modules
            or isinstance(module, nn.RNNBase)
            or (
                next(module.parameters(recurse=False), None) is not None
                and not isinstance(module, ParametrizationList)
            )
        ):  # weights that are computed from others
            yield module


def _vocabulary(model: nn.Module) -> int:
    """An integer that every embedding has a row for is below this."""
    counts = [
        m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    ]
    return max(min(counts, default=2), 1)


# transformers: what forward's parameters mean -------------------------------------------------


def _huggingface(model: nn.Module) -> Iterator[Example]:
    """What ``transformers`` calls the input of a model, in the size of its configuration."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or not isinstance(main, str):
        return
    names = [p.name for p in parameters_of(model)]
    required = [p.name for p in required_of(model)]
    for everything in (False, True):
        more = [n for n in _CONTENT if n in names] if everything else []
        for length in _lengths(config):
            kwargs: dict[str, Any] = {}
            for name in dict.fromkeys([main, *_companions(config, main, names), *required, *more]):
                if name not in names and "kwargs" not in names:
                    continue
                spec = _of_config(model, config, name, length)
                if spec is not None:
                    kwargs[name] = spec
            if kwargs and all(name in kwargs for name in required):
                yield Example((), kwargs)
                if "input_ids" in kwargs and "attention_mask" in names:
                    mask = _of_config(model, config, "attention_mask", length)
                    yield Example((), {**kwargs, "attention_mask": mask}, completes=True)
            if everything:
                break
    dummy = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping) and all(isinstance(v, Tensor) for v in dummy.values()):
        yield Example((), dict(dummy))


# What a model may want beside its main input, although the signature has a default for it.
_CONTENT = (
    "input_ids",
    "bbox",
    "pixel_values",
    "image_grid_thw",
    "input_features",
    "input_features_mask",
    "input_values",
    "decoder_input_ids",
    "query_embeds",
    "states",
    "actions",
    "rewards",
    "returns_to_go",
    "timesteps",
    "attention_mask",
)


def _companions(config: Any, main: str, names: Sequence[str]) -> Iterator[str]:
    """Parameters that have a default and yet must be there."""
    both = getattr(config, "is_encoder_decoder", False)
    if both:
        for stem in ("decoder_input_ids", "decoder_input_values"):
            if stem in names:
                yield stem
    towers = [k for k in ("text_config", "vision_config", "audio_config") if hasattr(config, k)]
    if len(towers) >= 2 and "logit_scale_init_value" in _keys(config):  # contrastive: both sides
        for name in ("input_ids", "pixel_values", "input_features"):
            if name in names:
                yield name


def _keys(config: Any) -> frozenset[str]:
    return frozenset(getattr(config, "to_dict", dict)())


def _lengths(config: Any) -> Iterator[int]:
    text = _part(config, "text_config", "text", "decoder")
    limit = _first_of(text, "max_position_embeddings", "n_positions", "max_seq_len", "block_size")
    best = LENGTH
    if limit is not None:
        best = max(1, min(LENGTH, limit - 2))
    yield best
    axial = getattr(config, "axial_pos_shape", None)
    if axial:
        yield math.prod(axial)
    for length in (64, 128, 512, 16, 8):
        if limit is None or length <= limit:
            yield length


def _part(config: Any, *names: str) -> Any:
    for name in names:
        found = getattr(config, name, None)
        if found is not None and not isinstance(found, str | int | float | bool | Mapping):
            return found
    return config


def _first_of(config: Any, *names: str) -> int | None:
    for name in names:
        found = getattr(config, name, None)
        if isinstance(found, int) and not isinstance(found, bool) and found > 0:
            return found
    return None


def _pair_of(value: Any) -> tuple[int, int] | None:
    if isinstance(value, Mapping):
        value = (value.get("height", 0), value.get("width", 0))
    if isinstance(value, int) and not isinstance(value, bool):
        return value, value
    if isinstance(value, tuple | list) and len(value) >= 2:
        return int(value[-2]), int(value[-1])
    return None


def _of_config(model: nn.Module, config: Any, name: str, length: int) -> Any:
    """The tensor that a parameter of this name takes, None where that is not known."""
    text = _part(config, "text_config", "text", "decoder", "llm_config")
    vocabulary = _first_of(text, "vocab_size") or _vocabulary(model)
    if name in ("input_ids", "decoder_input_ids", "query_tokens_ids"):
        return Spec((SAMPLES, length), torch.int64, vocabulary)
    if name in ("attention_mask", "decoder_attention_mask"):
        return _known(torch.ones(SAMPLES, length, dtype=torch.int64))
    if name == "token_type_ids":
        return _known(torch.zeros(SAMPLES, length, dtype=torch.int64))
    if name in ("grid_thw", "image_grid_thw"):
        return _known(torch.tensor([[1, _GRID, _GRID]]))
    if name in ("hidden_states", "pixel_values") and "grid_thw" in _names(model):
        return _patches(config)
    if name == "pixel_values" and "image_grid_thw" in _names(model):
        return None  # images stand where the text has their tokens
    if name == "query_embeds":
        width = _first_of(config, "hidden_size")
        return None if width is None else Spec((SAMPLES, length, width))
    if name in ("states", "actions", "rewards", "returns_to_go", "timesteps"):
        return _of_decisions(config, name, length)
    if name in ("inputs_embeds", "hidden_states", "encoder_hidden_states"):
        width = _first_of(text, "hidden_size", "d_model", "n_embd")
        return None if width is None else Spec((SAMPLES, length, width))
    if name == "bbox":
        return Spec((SAMPLES, length, 4), torch.int64, 1)
    if name == "pixel_values":
        return _pixels(config)
    if name in ("pixel_values_videos", "video_values"):
        return _pixels(config, video=True)
    if name == "pixel_mask":
        found = _pixels(config)
        if found is None:
            return None
        return _known(torch.ones(SAMPLES, *found.shape[-2:], dtype=torch.int64))
    if name in ("input_features", "audio_features"):
        return _spectrogram(config)
    if name == "input_features_mask":
        steps = max(_spectrogram(config).shape[1:])
        return _known(torch.ones(SAMPLES, steps, dtype=torch.int64))
    if name == "input_values":
        bins = _first_of(config, "num_mel_bins")
        frames = _first_of(config, "max_length", "spectrogram_length")
        if bins is not None and frames is not None:
            return Spec((SAMPLES, frames, bins))
        channels = _first_of(config, "audio_channels")
        return Spec((SAMPLES, 16000) if channels is None else (SAMPLES, channels, 16000))
    if name in ("decoder_input_values", "labels"):
        bins = _first_of(config, "num_mel_bins")
        return None if bins is None else Spec((SAMPLES, length, bins))
    if name == "past_values":
        steps = _first_of(config, "context_length") or length
        lags = getattr(config, "lags_sequence", None) or (0,)
        width = _first_of(config, "num_input_channels", "input_size") or 1
        whole = steps + max(lags)
        return Spec((SAMPLES, whole, width) if width > 1 or not max(lags) else (SAMPLES, whole))
    return None


_GRID = 4  # patches along a side of an image whose patches are given one by one


def _names(model: nn.Module) -> frozenset[str]:
    return frozenset(p.name for p in parameters_of(model))


def _known(elements: Tensor) -> Spec:
    return Spec(tuple(elements.shape), elements.dtype, 1, elements)


def _patches(config: Any) -> Spec | None:
    """All patches of an image as rows of numbers."""
    vision = _part(config, "vision_config", "vision")
    side = _first_of(vision, "patch_size", "spatial_patch_size")
    if side is None:
        return None
    channels = _first_of(vision, "in_channels", "num_channels", "in_chans") or 3
    frames = _first_of(vision, "temporal_patch_size") or 1
    return Spec((_GRID * _GRID, channels * frames * side * side))


def _of_decisions(config: Any, name: str, length: int) -> Spec | None:
    """A sequence of states, actions and rewards."""
    if name == "timesteps":
        return _known(torch.arange(length).expand(SAMPLES, -1).contiguous())
    width = {"states": "state_dim", "actions": "act_dim"}.get(name)
    size: int | None = 1 if width is None else _first_of(config, width)
    return None if size is None else Spec((SAMPLES, length, size))


def _pixels(config: Any, video: bool = False) -> Spec | None:
    vision = _part(config, "vision_config", "vision", "backbone_config", "encoder")
    for owner in (vision, config):
        sides = _pair_of(getattr(owner, "image_size", None) or getattr(owner, "img_size", None))
        if sides is not None and min(sides) > 0:
            break
    else:
        sides = (224, 224)
    channels = (
        _first_of(vision, "num_channels", "in_channels", "in_chans", "input_channels")
        or _first_of(config, "num_channels", "in_channels")
        or 3
    )
    frames = _first_of(vision, "num_frames", "crop_size") if _of_frames(vision, video) else None
    if frames is not None:
        return Spec((SAMPLES, frames, channels, *sides))
    return Spec((SAMPLES, channels, *sides))


def _of_frames(config: Any, video: bool) -> bool:
    return (
        video
        or (hasattr(config, "num_frames") and hasattr(config, "tubelet_size"))
        or (hasattr(config, "num_frames") and "timesformer" in type(config).__name__.lower())
    )


def _spectrogram(config: Any) -> Spec:
    audio = _part(config, "audio_config", "audio", "speech_encoder")
    bins = _first_of(audio, "num_mel_bins", "feature_size", "input_feat_per_channel") or 80
    positions = _first_of(audio, "max_source_positions")
    kind = type(config).__name__.lower()
    if "clap" in kind:
        side = _first_of(audio, "spec_size") or 256
        return Spec((SAMPLES, 1, 4 * side, bins))
    if "whisper" in kind or (positions is not None and "speech2text" not in kind):
        return Spec((SAMPLES, bins, 2 * (positions or 1500)))
    width = _first_of(audio, "feature_projection_input_dim") or bins
    return Spec((SAMPLES, 64, width))


# anything else -------------------------------------------------------------------------------


def _detector(model: nn.Module) -> Iterator[Example]:
    """torchvision's detectors: a list of images and, in training, boxes with labels."""
    names = [p.name for p in parameters_of(model)]
    if names[:2] != ["images", "targets"]:
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
        return Spec((SAMPLES,), torch.int64, _vocabulary(model))
    if name in ("y", "label", "labels", "classes", "class_labels"):
        return Spec((SAMPLES,), torch.int64, _vocabulary(model))
    return None


def _for_layers(model: nn.Module) -> Iterator[Spec]:
    """Tensors that the first parametrised layers take, one kind of layer each, once."""
    kinds: list[nn.Module] = []
    for layer in _leaves(model):
        if not any(_same_kind(layer, k) for k in kinds):
            kinds.append(layer)
        if len(kinds) == 4:
            break
    high = _vocabulary(model)
    for layer in kinds:
        yield from _for_layer(layer, high)
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


def _for_layer(layer: nn.Module, high: int) -> Iterator[Spec]:
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
