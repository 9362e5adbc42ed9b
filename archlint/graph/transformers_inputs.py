"""What a model of ``transformers`` takes: its main input, in the size of its configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from archlint.graph.documented_inputs import FRAMES, GRID, WAVEFORM, spec_of, stated_inputs
from archlint.graph.example_input import (
    LENGTH,
    SAMPLES,
    Example,
    Spec,
    attribute,
    known,
    names_of,
    parameters_of,
    required_of,
    vocabulary_of,
)


def of_transformers(model: nn.Module) -> Iterator[Example]:
    """What ``transformers`` calls the input of a model, in the size of its configuration.

    By the meaning of the names first, then as the docstring of forward states the shapes.
    """
    config = attribute(model, "config")
    main = attribute(model, "main_input_name")
    if config is None or not isinstance(main, str):
        return
    names = [p.name for p in parameters_of(model)]
    required = [p.name for p in required_of(model)]
    wanted = [*dict.fromkeys([main, *_companions(config, main, names), *required])]
    if not all(p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in parameters_of(model)):
        wanted = [n for n in wanted if n in names]
    lengths = list(_lengths(config))
    stated = stated_inputs(model)

    def gathered(wanted: Sequence[str], length: int, by_name: bool = True) -> Iterator[Example]:
        kwargs: dict[str, Any] = {}
        for name in wanted:
            spec = _of_config(model, config, name, length) if by_name else None
            if spec is None and name in stated:
                spec = spec_of(model, name, stated[name], length)
            if spec is not None:
                kwargs[name] = spec
        if kwargs and all(name in kwargs for name in required):
            yield Example((), kwargs)
            if "input_ids" in kwargs and "attention_mask" in names:
                mask = _of_config(model, config, "attention_mask", length)
                yield Example((), {**kwargs, "attention_mask": mask}, completes=True)

    yield from gathered(wanted, lengths[0])
    yield from gathered(wanted, lengths[0], by_name=False)
    for length in lengths[1:]:
        yield from gathered(wanted, length)
    yield from gathered([*wanted, *(n for n in _CONTENT if n in names)], lengths[0])
    dummy = attribute(model, "dummy_inputs")
    if not isinstance(dummy, Mapping) or not all(isinstance(v, Tensor) for v in dummy.values()):
        return
    if all(name in dummy for name in required) and all(name in names for name in dummy):
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
    both = attribute(config, "is_encoder_decoder")
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
    axial = attribute(config, "axial_pos_shape")
    if axial:
        yield math.prod(axial)
    for length in (64, 128, 512, 16, 8):
        if limit is None or length <= limit:
            yield length


def _part(config: Any, *names: str) -> Any:
    for name in names:
        found = attribute(config, name)
        if found is not None and not isinstance(found, str | int | float | bool | Mapping):
            return found
    return config


def _first_of(config: Any, *names: str) -> int | None:
    for name in names:
        found = attribute(config, name)
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


def input_named(model: nn.Module, name: str) -> Spec | None:
    """The tensor that a parameter of forward takes, None where neither its name nor the docstring
    tells."""
    config = attribute(model, "config")
    if config is not None and hasattr(model, "main_input_name"):
        found: Spec | None = _of_config(model, config, name, next(_lengths(config)))
        if found is not None:
            return found
    stated = stated_inputs(model).get(name)
    return None if stated is None else spec_of(model, name, stated)


def _of_config(model: nn.Module, config: Any, name: str, length: int) -> Any:
    """The tensor that a parameter of this name takes, None where that is not known."""
    text = _part(config, "text_config", "text", "decoder", "llm_config")
    vocabulary = _first_of(text, "vocab_size") or vocabulary_of(model)
    if name in ("input_ids", "decoder_input_ids", "query_tokens_ids"):
        return Spec((SAMPLES, length), torch.int64, vocabulary)
    if name in ("attention_mask", "decoder_attention_mask"):
        return known(torch.ones(SAMPLES, length, dtype=torch.int64))
    if name == "token_type_ids":
        return known(torch.zeros(SAMPLES, length, dtype=torch.int64))
    if name in ("grid_thw", "image_grid_thw"):
        return known(torch.tensor([[1, GRID, GRID]]))
    if name in ("hidden_states", "pixel_values") and "grid_thw" in names_of(model):
        return _patches(config)
    if name == "pixel_values" and "image_grid_thw" in names_of(model):
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
        return known(torch.ones(SAMPLES, *found.shape[-2:], dtype=torch.int64))
    if name in ("input_features", "audio_features"):
        return _spectrogram(config)
    if name == "input_features_mask":
        spectrogram = _spectrogram(config)
        one, two = spectrogram.shape[-2:]  # steps and bins, or the reverse
        audio = _part(config, "audio_config", "audio", "speech_encoder")
        steps = two if one == _first_of(audio, "num_mel_bins", "feature_size") else one
        return known(torch.ones(SAMPLES, steps, dtype=torch.int64))
    if name == "input_values":
        bins = _first_of(config, "num_mel_bins")
        frames = _first_of(config, "max_length", "spectrogram_length")
        if bins is not None and frames is not None:
            return Spec((SAMPLES, frames, bins))
        channels = _first_of(config, "audio_channels")
        return Spec((SAMPLES, WAVEFORM) if channels is None else (SAMPLES, channels, WAVEFORM))
    if name in ("decoder_input_values", "labels"):
        bins = _first_of(config, "num_mel_bins")
        return None if bins is None else Spec((SAMPLES, length, bins))
    if name == "past_values":
        steps = _first_of(config, "context_length") or length
        lags = attribute(config, "lags_sequence") or (0,)
        width = _first_of(config, "num_input_channels", "input_size") or 1
        whole = steps + max(lags)
        return Spec((SAMPLES, whole, width) if width > 1 or not max(lags) else (SAMPLES, whole))
    return None


def _patches(config: Any) -> Spec | None:
    """All patches of an image as rows of numbers."""
    vision = _part(config, "vision_config", "vision")
    side = _first_of(vision, "patch_size", "spatial_patch_size")
    if side is None:
        return None
    channels = _first_of(vision, "in_channels", "num_channels", "in_chans") or 3
    frames = _first_of(vision, "temporal_patch_size") or 1
    return Spec((GRID * GRID, channels * frames * side * side))


def _of_decisions(config: Any, name: str, length: int) -> Spec | None:
    """A sequence of states, actions and rewards."""
    if name == "timesteps":
        return known(torch.arange(length).expand(SAMPLES, -1).contiguous())
    width = {"states": "state_dim", "actions": "act_dim"}.get(name)
    size: int | None = 1 if width is None else _first_of(config, width)
    return None if size is None else Spec((SAMPLES, length, size))


def _pixels(config: Any, video: bool = False) -> Spec | None:
    vision = _part(config, "vision_config", "vision", "backbone_config", "encoder")
    for owner in (vision, config):
        sides = _pair_of(attribute(owner, "image_size") or attribute(owner, "img_size"))
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
    if video and frames is None:
        frames = FRAMES
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
