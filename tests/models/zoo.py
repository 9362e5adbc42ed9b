"""Public models by library, built without downloads: what the recorder has to take."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Build = Callable[[], nn.Module]


@dataclass(frozen=True)
class Entry:
    """A model of a library: how it is built and, where it cannot be deduced, its input."""

    library: str
    name: str
    build: Build
    inputs: Mapping[str, Any] | None = field(default=None, compare=False)

    @property
    def id(self) -> str:
        return f"{self.library}:{self.name}"


# --------------------------------------------------------------------------- timm


def timm_models() -> Iterator[Entry]:
    import timm

    for name in timm.list_models():
        yield Entry("timm", name, lambda name=name: timm.create_model(name))


# --------------------------------------------------------------------------- torchvision


def torchvision_models() -> Iterator[Entry]:
    from torchvision import models

    for name in models.list_models():
        kwargs = {"weights": None}
        if "weights_backbone" in _parameters(models.get_model_builder(name)):
            kwargs["weights_backbone"] = None
        yield Entry(
            "torchvision", name, lambda name=name, kwargs=kwargs: models.get_model(name, **kwargs)
        )


def _parameters(function: Any) -> tuple[str, ...]:
    import inspect

    return tuple(inspect.signature(function).parameters)


# --------------------------------------------------------------------------- transformers

# What the attributes of configurations are called, and the size that makes a tiny model.
_TINY: dict[str, int] = {
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "dim": 32,
    "embed_dim": 32,
    "embedding_size": 32,
    "emb_dim": 32,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "d_ff": 64,
    "n_inner": 64,
    "hidden_dim": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "qk_head_dim": 16,
    "v_head_dim": 8,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "vocab_size": 256,
}
_SHALLOW: dict[str, int] = {
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "depth": 2,
    "num_blocks": 2,
}


def shrink(config: Any, sizes: Mapping[str, int]) -> Any:
    """A configuration, and those in it, with smaller sizes.

    Lists that say something about every layer are cut to the number of layers, which is such that
    every kind of layer is left.
    """
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict"):
            shrink(value, sizes)
    depths = {v for n in _SHALLOW if isinstance(v := vars(config).get(n), int)}
    staged = {len(v) for v in vars(config).values() if isinstance(v, list | tuple)}
    lists = {
        name: value
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) in depths and len(value) > 4
    }
    depth = max([2, *(_prefix_of_all_kinds(value) for value in lists.values())])
    for name, size in sizes.items():
        value = vars(config).get(name)
        if not isinstance(value, int) or isinstance(value, bool):
            continue
        if name in _SHALLOW and value in staged and value <= 4:
            continue  # so many stages, each with sizes of its own
        size = depth if name in _SHALLOW else size
        if name == "num_key_value_heads" and "kv_lora_rank" in vars(config):
            size = sizes["num_attention_heads"]  # each head has its own of what is compressed
        if value > size:
            setattr(config, name, size)
    for name, value in lists.items():
        if sizes:
            setattr(config, name, value[:depth])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"):
        vocabulary = vars(config).get("vocab_size")
        value = vars(config).get(name)
        if isinstance(value, int) and isinstance(vocabulary, int) and value >= vocabulary:
            setattr(config, name, 1)
    if "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        _divide_rotary(config)
    return config


def _divide_rotary(config: Any) -> None:
    """Frequencies of a rotary embedding divided among height, width and time, two of them alike.

    What the library assumes where a configuration does not say it fits one width of heads.
    """
    rotary = config.rope_parameters
    if not isinstance(rotary, dict) or "mrope_section" in rotary:
        return
    width = vars(config).get("head_dim") or config.hidden_size // config.num_attention_heads
    half = int(width * rotary.get("partial_rotary_factor", 1.0)) // 2
    side = 3 * half // 8
    rotary["mrope_section"] = [side, side, half - 2 * side]


_MOST_LAYERS = 8


def _prefix_of_all_kinds(layers: list[Any]) -> int:
    """How many of the first layers hold one of every kind that a list tells of."""
    first = {repr(kind): i for i, kind in reversed(list(enumerate(layers)))}
    return 1 + max(i for i in first.values() if i < _MOST_LAYERS)


# A tiny model; else one of few layers; else as published: not every type can be shrunk by rule.
STAGES: tuple[Mapping[str, int], ...] = ({**_TINY, **_SHALLOW}, _SHALLOW, {})


def kinds_of_transformers() -> list[str]:
    """The types whose base model the library knows."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    return list(MODEL_MAPPING_NAMES)


_AHEAD = {"prediction_length": 8, "context_length": 8, "num_time_features": 1}

# What the default configuration of a type lacks to be a whole.
_SETTINGS: dict[str, dict[str, Any]] = {
    "autoformer": _AHEAD,
    "bamba": {"attn_layer_indices": [1]},
    "blip-2": {"image_token_id": 5},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "informer": _AHEAD,
    "instructblip": {"image_token_id": 5},
    "instructblipvideo": {"video_token_id": 5},
    "time_series_transformer": _AHEAD,
    "xmod": {"default_language": "en_XX"},
}


def _of_robots(config: Any) -> dict[str, Any]:
    """A prompt with an image of 16×16 patches, and the actions to be."""
    image = torch.full((2, 256), config.vlm_config.image_token_id)
    words = torch.randint(0, 100, (2, 16))
    return {
        "action_embeds": ((2, config.chunk_size + 1, config.dit_config.hidden_size), "float32"),
        "input_ids": torch.cat([image, words], 1),
        "pixel_values": ((2, 1, 3, 224, 224), "float32"),
        "attention_mask": torch.ones(2, 272, dtype=torch.int64),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    }


def _of_speech(config: Any) -> dict[str, Any]:
    """A text and, as training wants, how long each sound is, how high and how loud."""
    config = getattr(config, "model_config", config)
    return {
        "input_ids": ((2, 8), "int64"),
        "spectrogram_labels": ((2, 24, config.num_mel_bins), "float32"),
        "duration_labels": torch.full((2, 8), 3),
        "pitch_labels": ((2, 8, 1), "float32"),
        "energy_labels": ((2, 8, 1), "float32"),
    }


def _of_packed_patches(config: Any) -> dict[str, Any]:
    """Two images of 4×4 patches in one row."""
    side = config.patch_size
    return {
        "pixel_values": ((1, 3, side, 32 * side), "float32"),
        "target_sizes": torch.full((2, 2), 4),
    }


def _of_classes(config: Any) -> dict[str, Any]:
    """Images, a task for each, and one class to look for in each."""
    ids, mask = ((2, 8), "int64"), torch.ones(2, 8, dtype=torch.int64)
    return {
        "pixel_values": ((2, 3, config.image_size, config.image_size), "float32"),
        "classes_input_ids": ids,
        "classes_attention_mask": mask,
        "tasks_input_ids": ids,
        "tasks_attention_mask": mask,
        "classes_structure": torch.ones(2, dtype=torch.int64),
    }


def _of_sounds(config: Any) -> dict[str, Any]:
    """A spectrogram with no frame masked."""
    return {
        "audio_mel": ((2, 64, config.input_feat_size), "float32"),
        "audio_mel_mask": torch.zeros(2, 64, dtype=torch.bool),
    }


def _of_scales(config: Any) -> dict[str, Any]:
    """Images whose quarter is still a patch."""
    side = int(config.patch_size / min(config.scaled_images_ratios))
    return {"pixel_values": ((2, 3, side, side), "float32")}


def _of_moments(config: Any) -> dict[str, Any]:
    """Videos, and what is to be found in them."""
    side = config.visual_prompter_apply and config.max_img_size
    return {
        "input_ids": ((2, 32), "int64"),
        "pixel_values": ((2, config.num_frames, 3, side, side), "float32"),
        "attention_mask": torch.ones(2, 32, dtype=torch.int64),
    }


def _of_interleaved(config: Any) -> dict[str, Any]:
    """Texts with an image that every token may attend to."""
    side = config.vision_config.image_size
    return {
        "input_ids": ((2, 32), "int64"),
        "pixel_values": ((2, 1, 3, side, side), "float32"),
        "image_attention_mask": torch.ones(2, 32, 1, dtype=torch.int64),
    }


def _of_series(config: Any) -> dict[str, Any]:
    """Values until now, as long as the context and the lags go back, and those to come."""
    past, future = config.context_length + max(config.lags_sequence), config.prediction_length
    return {
        "past_values": ((2, past), "float32"),
        "past_time_features": ((2, past, config.num_time_features), "float32"),
        "past_observed_mask": torch.ones(2, past),
        "future_values": ((2, future), "float32"),
        "future_time_features": ((2, future, config.num_time_features), "float32"),
    }


def _of_many_queries(config: Any) -> dict[str, Any]:
    """An image with as many places as the decoder has queries."""
    return {"pixel_values": ((2, 3, 560, 560), "float32")}


# Inputs that nothing tells, for a configuration.
_INPUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "autoformer": _of_series,
    "depth_pro": _of_scales,
    "fastspeech2_conformer": _of_speech,
    "fastspeech2_conformer_with_hifigan": _of_speech,
    "gemma3n_audio": _of_sounds,
    "idefics": _of_interleaved,
    "informer": _of_series,
    "minicpm_ocr_vision": _of_packed_patches,
    "minicpmv4_7_vision": _of_packed_patches,
    "omdet-turbo": _of_classes,
    "pi0": _of_robots,
    "rf_detr": _of_many_queries,
    "time_series_transformer": _of_series,
    "tvp": _of_moments,
}


def transformers_types(stage: int = 0) -> Iterator[Entry]:
    sizes = STAGES[stage]
    for kind in kinds_of_transformers():
        given = _INPUTS.get(kind)
        yield Entry(
            "transformers",
            kind,
            lambda kind=kind: build_transformer(kind, sizes),
            None if given is None else given(configuration(kind, sizes)),
        )


def configuration(kind: str, sizes: Mapping[str, int]) -> Any:
    """The default configuration of a type of ``transformers``, made smaller."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    settings = _SETTINGS.get(kind, {})
    lists = {name: value for name, value in settings.items() if isinstance(value, list)}
    single = {name: value for name, value in settings.items() if name not in lists}
    config = shrink(CONFIG_MAPPING[kind](**single), sizes)
    for name, value in lists.items():  # of as many as there are layers now
        setattr(config, name, value)
    return config


def build_transformer(kind: str, sizes: Mapping[str, int]) -> nn.Module:
    """The base model of a type of ``transformers``, its default configuration made smaller."""
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    config = configuration(kind, sizes)
    owner = MODEL_MAPPING[type(config)]
    if isinstance(owner, tuple | list):
        owner = owner[0]
    model: nn.Module = owner(config)
    return model


# --------------------------------------------------------------------------- others


def x_transformers_models() -> Iterator[Entry]:
    import x_transformers as x

    def decoder(**kwargs: Any) -> Build:
        layers = {"dim": 64, "depth": 2, "heads": 4, **kwargs}
        return lambda: x.TransformerWrapper(
            num_tokens=256, max_seq_len=64, attn_layers=x.Decoder(**layers)
        )

    def encoder(**kwargs: Any) -> Build:
        layers = {"dim": 64, "depth": 2, "heads": 4, **kwargs}
        return lambda: x.TransformerWrapper(
            num_tokens=256, max_seq_len=64, attn_layers=x.Encoder(**layers)
        )

    variants: dict[str, Build] = {
        "decoder": decoder(),
        "encoder": encoder(),
        "rotary_rmsnorm": decoder(rotary_pos_emb=True, use_rmsnorm=True),
        "glu_swish": decoder(ff_glu=True, ff_swish=True, ff_no_bias=True),
        "alibi": decoder(alibi_pos_bias=True),
        "t5_bias": encoder(rel_pos_bias=True),
        "grouped_queries": decoder(attn_kv_heads=2),
        "qk_norm": decoder(attn_qk_norm=True),
        "sandwich": decoder(sandwich_norm=True),
        "post_norm": encoder(pre_norm=False),
        "residual_attn": encoder(residual_attn=True, pre_norm=False),
        "gate_residual": decoder(gate_residual=True),
        "scale_residual": decoder(scale_residual=True),
        "squared_relu": decoder(ff_relu_squared=True),
        "macaron": encoder(macaron=True),
        "talking_heads": decoder(attn_pre_talking_heads=True),
        "memory_tokens": decoder(attn_num_mem_kv=4),
        "dropout": decoder(attn_dropout=0.1, ff_dropout=0.1, layer_dropout=0.0),
        "vit": lambda: x.ViTransformerWrapper(
            image_size=32,
            patch_size=8,
            num_classes=10,
            attn_layers=x.Encoder(dim=64, depth=2, heads=4),
        ),
        "continuous": lambda: x.ContinuousTransformerWrapper(
            dim_in=16, dim_out=16, max_seq_len=64, attn_layers=x.Encoder(dim=64, depth=2, heads=4)
        ),
    }
    for name, build in variants.items():
        yield Entry("x-transformers", name, build)


def vit_pytorch_models() -> Iterator[Entry]:
    from importlib import import_module

    common = {"image_size": 64, "patch_size": 16, "num_classes": 10, "dim": 64, "depth": 2}
    plain = {**common, "heads": 4, "mlp_dim": 128}
    variants: dict[str, tuple[str, str, dict[str, Any]]] = {
        "vit": ("vit", "ViT", {**plain, "dropout": 0.1, "emb_dropout": 0.1}),
        "simple_vit": ("simple_vit", "SimpleViT", plain),
        "deepvit": ("deepvit", "DeepViT", plain),
        "cait": ("cait", "CaiT", {**plain, "cls_depth": 1}),
        "parallel": ("parallel_vit", "ViT", {**plain, "num_parallel_branches": 2}),
        "vit_for_small_dataset": ("vit_for_small_dataset", "ViT", plain),
        "simple_vit_qk_norm": ("simple_vit_with_qk_norm", "SimpleViT", plain),
        "register_tokens": ("simple_vit_with_register_tokens", "SimpleViT", plain),
        "patch_dropout": ("vit_with_patch_dropout", "ViT", {**plain, "patch_dropout": 0.25}),
        "fft": ("simple_vit_with_fft", "SimpleViT", {**plain, "freq_patch_size": 8}),
        "t2t": (
            "t2t",
            "T2TViT",
            {
                "image_size": 64,
                "num_classes": 10,
                "dim": 64,
                "depth": 2,
                "heads": 4,
                "mlp_dim": 64,
                "t2t_layers": ((7, 4), (3, 2), (3, 2)),
            },
        ),
        "cct": (
            "cct",
            "CCT",
            {
                "img_size": 64,
                "embedding_dim": 64,
                "num_layers": 2,
                "num_heads": 4,
                "mlp_ratio": 2,
                "num_classes": 10,
            },
        ),
        "pit": (
            "pit",
            "PiT",
            {
                "image_size": 64,
                "patch_size": 8,
                "dim": 32,
                "num_classes": 10,
                "depth": (1, 1),
                "heads": 4,
                "mlp_dim": 64,
            },
        ),
        "levit": (
            "levit",
            "LeViT",
            {
                "image_size": 64,
                "num_classes": 10,
                "stages": 2,
                "dim": (32, 64),
                "depth": 1,
                "heads": (2, 4),
                "mlp_mult": 2,
            },
        ),
        "cvt": ("cvt", "CvT", {"num_classes": 10}),
        "twins_svt": ("twins_svt", "TwinsSVT", {"num_classes": 10}),
        "crossformer": ("crossformer", "CrossFormer", {"num_classes": 10}),
        "regionvit": ("regionvit", "RegionViT", {"num_classes": 10}),
        "nest": (
            "nest",
            "NesT",
            {
                "image_size": 64,
                "patch_size": 4,
                "dim": 32,
                "heads": 2,
                "num_hierarchies": 3,
                "block_repeats": (1, 1, 1),
                "num_classes": 10,
            },
        ),
        "mobile_vit": (
            "mobile_vit",
            "MobileViT",
            {
                "image_size": (64, 64),
                "dims": [48, 64, 80],
                "channels": [16, 16, 24, 24, 48, 48, 64, 64, 80, 80, 320],
                "num_classes": 10,
            },
        ),
        "sep_vit": (
            "sep_vit",
            "SepViT",
            {
                "num_classes": 10,
                "dim": 32,
                "dim_head": 16,
                "heads": (1, 2),
                "depth": (1, 1),
                "window_size": 7,
            },
        ),
        "max_vit": (
            "max_vit",
            "MaxViT",
            {
                "num_classes": 10,
                "dim": 32,
                "dim_head": 16,
                "depth": (1, 1),
                "window_size": 7,
                "dim_conv_stem": 16,
            },
        ),
        "xcit": ("xcit", "XCiT", {**plain, "cls_depth": 1}),
        "look_vit": ("look_vit", "LookViT", {**common, "heads": 4, "highres_patch_size": 8}),
        "normalized_vit": ("normalized_vit", "nViT", {**common, "heads": 4, "mlp_dim": 128}),
        "local_vit": ("local_vit", "LocalViT", plain),
        "rvt": ("rvt", "RvT", plain),
        "simple_flash": ("simple_flash_attn_vit", "SimpleViT", plain),
    }
    for name, (module, attribute, kwargs) in variants.items():

        def build(
            module: str = module, attribute: str = attribute, kwargs: dict[str, Any] = kwargs
        ) -> nn.Module:
            made: nn.Module = getattr(import_module(f"vit_pytorch.{module}"), attribute)(**kwargs)
            return made

        yield Entry("vit-pytorch", name, build)


_SEGMENTATION_ENCODERS = (
    "resnet18",
    "efficientnet-b0",
    "mobilenet_v2",
    "mit_b0",
    "timm-regnetx_002",
    "densenet121",
    "tu-convnext_atto",
)


def segmentation_models() -> Iterator[Entry]:
    import segmentation_models_pytorch as smp

    decoders = (
        "Unet UnetPlusPlus MAnet Linknet FPN PSPNet PAN DeepLabV3 DeepLabV3Plus UPerNet Segformer"
    )

    def entry(decoder: str, encoder: str) -> Entry:
        return Entry(
            "segmentation-models-pytorch",
            f"{decoder}-{encoder}",
            lambda: smp.create_model(
                decoder, encoder_name=encoder, encoder_weights=None, classes=3
            ),
        )

    for decoder in decoders.split():
        yield entry(decoder, "resnet18")
    for encoder in _SEGMENTATION_ENCODERS[1:]:
        yield entry("Unet" if encoder != "mit_b0" else "FPN", encoder)
    yield Entry(
        "segmentation-models-pytorch",
        "DPT-vit",
        lambda: smp.DPT(encoder_name="tu-vit_tiny_patch16_224", encoder_weights=None, classes=3),
    )


LIBRARIES: dict[str, Callable[[], Iterable[Entry]]] = {
    "timm": timm_models,
    "torchvision": torchvision_models,
    "transformers": transformers_types,
    "x-transformers": x_transformers_models,
    "vit-pytorch": vit_pytorch_models,
    "segmentation-models-pytorch": segmentation_models,
}


def entry(id: str, stage: int = 0) -> Entry:
    """The model called ``library:name``."""
    library, _, name = id.partition(":")
    entries = transformers_types(stage) if library == "transformers" else LIBRARIES[library]()
    return next(e for e in entries if e.name == name)
