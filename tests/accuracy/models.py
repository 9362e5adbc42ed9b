"""The models on which accuracy is measured, by set: real libraries and plain networks.

Families are small ones that fit a CPU, at the input that archlint assumes. A case names how to
build its model; what cannot be imported is left out.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SETS = ("timm", "transformers", "others")  # and "plain", which tests.accuracy.plain compares


@dataclass(frozen=True)
class Case:
    """One model: ``library`` (with its version) is part of what a measurement is filed under."""

    set: str
    name: str
    library: str
    build: Callable[[], nn.Module]
    inputs: dict[str, Any] | None = None
    draws: int = 8

    @property
    def key(self) -> str:
        """A file name."""
        return f"{self.set}-{self.name}".replace("/", "_").replace(" ", "_")

    @property
    def version(self) -> str:
        """Of the library that the model comes from."""
        name = self.library
        return f"{name} {importlib.metadata.version(name)}" if name else ""


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# --------------------------------------------------------------------------- timm, torchvision

TIMM = _names("""
resnetv2_18 resnest14d regnetx_002 regnety_002 mobilenetv3_small_100 lcnet_050 ghostnet_100
ghostnetv2_100 efficientvit_b0 efficientvit_m0 edgenext_xx_small convit_tiny
deit_tiny_patch16_224 deit3_small_patch16_224 pit_ti_224 crossvit_tiny_240 coat_lite_tiny
levit_128s mobilevit_xxs mobilevitv2_050 mambaout_femto starnet_s1 swiftformer_xs repvit_m0_9
hgnetv2_b0 dla34 dla46_c dpn48b skresnet18 legacy_seresnet18 selecsls42b cspnext_tiny
efficientformer_l1 gcvit_xxtiny hiera_tiny_224 nf_regnet_b0 nf_resnet26 eca_nfnet_l0 pvt_v2_b0
tiny_vit_5m_224 tnt_s_patch16_224 twins_svt_small twins_pcpvt_small visformer_tiny
vit_relpos_small_patch16_224 vit_srelpos_small_patch16_224 swinv2_tiny_window8_256
swinv2_cr_tiny_224 xception41 rdnet_tiny resnext26ts gernet_s mobileone_s0 repvgg_a0
mobilenetv4_conv_small iformer_t sequencer2d_s nextvit_small resnetv2_50d_gn eca_resnext26ts
beit_base_patch16_224
resmlp_12_224 tinynet_e repghostnet_050 shvit_s1 fasternet_t0 xcit_nano_12_p16_224 fastvit_t8
inception_next_atto focalnet_tiny_srf mvitv2_tiny coatnet_nano_rw_224 poolformerv2_s12 nest_tiny
cait_xxs24_224 test_efficientnet_gn
""")

TORCHVISION = _names("""
alexnet googlenet mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5
""")


def _timm(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name)

    return build


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision.models

        more = {"init_weights": True} if name == "googlenet" else {}
        return torchvision.models.get_model(name, weights=None, **more)

    return build


# --------------------------------------------------------------------------- transformers

TRANSFORMERS = _names("""
albert bert bloom codegen deberta deit dinov2 distilbert fnet gpt2 gpt_neo
gptj glm helium hubert ibert llama mbart mobilebert modernbert mpt mt5 nystromformer
olmo olmo2 opt persimmon phi phi3 qwen2 qwen3 roberta roformer segformer smollm3 mixtral
starcoder2 swin swinv2 t5 vit wav2vec2 whisper xglm bit regnet mobilevit pvt_v2 hiera
switch_transformers rwkv
electra gemma cohere convbert squeezebert megatron-bert mistral bart xlm openai-gpt ctrl levit
yolos mpnet gemma2
""")
TRANSFORMERS_BASE = _names("""
bert gpt2 vit distilbert
""")  # as the defaults have it


def _transformers(kind: str, layers: int | None) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from transformers import CONFIG_MAPPING, AutoModel

        config = CONFIG_MAPPING[kind]()
        if layers is not None:
            shrink(config, layers)
        return AutoModel.from_config(config)

    return build


def shrink(config: Any, layers: int) -> None:
    """Fewer layers and words, narrower where that is safe; in place."""
    for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers",
                 "decoder_layers", "num_decoder_layers"):  # fmt: skip
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), layers))
    if isinstance(getattr(config, "vocab_size", None), int):
        config.vocab_size = min(config.vocab_size, 1000)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id",
                     "cls_token_id", "sep_token_id", "mask_token_id"):  # fmt: skip
            value = getattr(config, name, None)
            if isinstance(value, int) and value >= config.vocab_size:
                setattr(config, name, 1)
    for name in ("hidden_size", "d_model", "n_embd"):
        width = getattr(config, name, None)
        if isinstance(width, int) and width > 1024:
            _narrow(config, name, width)
    kinds = getattr(config, "layer_types", None)
    if isinstance(kinds, list):
        config.layer_types = kinds[:layers]


def _narrow(config: Any, name: str, width: int) -> None:
    """A width of 512 with heads and hidden width in proportion."""
    by = width // 512
    setattr(config, name, width // by)
    for other in ("intermediate_size", "num_attention_heads", "num_key_value_heads", "n_head",
                  "ffn_dim", "n_inner", "ffn_hidden_size"):  # fmt: skip
        value = getattr(config, other, None)
        if isinstance(value, int):
            setattr(config, other, max(value // by, 1))


# --------------------------------------------------------------------------- other libraries


def _x_transformers(**options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from x_transformers import Decoder, Encoder, TransformerWrapper

        options_ = dict(options)
        causal = options_.pop("causal", False)
        kind = Decoder if causal else Encoder
        return TransformerWrapper(
            num_tokens=500, max_seq_len=64,
            attn_layers=kind(dim=128, depth=4, heads=4, **options_),
        )  # fmt: skip

    return build


_X = {
    "encoder": {},
    "causal": {"causal": True},
    "rmsnorm": {"use_rmsnorm": True},
    "swiglu": {"ff_glu": True, "ff_swish": True},
    "rotary": {"rotary_pos_emb": True},
    "reluSq": {"ff_relu_squared": True},
    "mqa": {"attn_one_kv_head": True},
    "gqa": {"attn_kv_heads": 2},
    "qknorm": {"attn_qk_norm": True},
    "alibi": {"alibi_pos_bias": True, "causal": True},
    "t5_bias": {"rel_pos_bias": True},
    "macaron": {"macaron": True},
    "sandwich": {"sandwich_norm": True},
    "scalenorm": {"use_scalenorm": True},
}


def _vit_pytorch(module: str, name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(**options)

    return build


_VIT = {"image_size": 64, "patch_size": 8, "num_classes": 100, "dim": 128, "depth": 4, "heads": 4,
        "mlp_dim": 256}  # fmt: skip
_VITS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("vit", "ViT", _VIT),
    "deepvit": ("deepvit", "DeepViT", _VIT),
    "vit_for_small_dataset": ("vit_for_small_dataset", "ViT", _VIT),
    "parallel_vit": ("parallel_vit", "ViT", _VIT),
    "vit_with_patch_merger": ("vit_with_patch_merger", "ViT", _VIT),
    "twins_svt": ("twins_svt", "TwinsSVT", {"num_classes": 100}),
    "max_vit": ("max_vit", "MaxViT", {"num_classes": 100, "dim": 64, "dim_head": 32,
                                      "depth": (1, 1, 2, 1), "window_size": 7}),
}  # fmt: skip


def _smp(name: str, encoder: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import segmentation_models_pytorch as smp

        return getattr(smp, name)(encoder_name=encoder, encoder_weights=None)

    return build


_SMP = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3Plus", "PAN")


# --------------------------------------------------------------------------- plain networks

Initializer = Callable[[Tensor], object]


def HE(w: Tensor) -> object:
    """He et al. 2015, normal."""
    return nn.init.kaiming_normal_(w, nonlinearity="relu")


INITIALIZERS: dict[str, Initializer | None] = {
    "he_normal": HE,
    "he_uniform": lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"),
    "he_fan_out": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    "xavier_normal": nn.init.xavier_normal_,
    "xavier_uniform": nn.init.xavier_uniform_,
    "lecun": lambda w: nn.init.kaiming_normal_(w, nonlinearity="linear"),
    "orthogonal": lambda w: nn.init.orthogonal_(w, 2**0.5),
    "trunc": lambda w: nn.init.trunc_normal_(w, std=0.05),
    "default": None,
}


def initialised(model: nn.Module, initializer: Initializer | None) -> nn.Module:
    """Every weight drawn anew, biases cleared; None keeps torch's own."""
    if initializer is not None:
        for p in model.parameters():
            if p.ndim >= 2:
                initializer(p)
            else:
                nn.init.zeros_(p)
    return model


def plain_fc(width: int, depth: int, initializer: Initializer | None) -> nn.Module:
    """Linear, ReLU, … on an input of ``width`` features, ten outputs."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return initialised(nn.Sequential(*layers, nn.Linear(width, 10)), initializer)


def plain_conv(channels: int, depth: int, initializer: Initializer | None, side: int) -> nn.Module:
    """3×3 convolutions with zero padding and ReLU, one of stride two, a mean, ten outputs."""
    layers: list[nn.Module] = []
    before = 3
    for i in range(depth):
        stride = 2 if i == depth // 2 else 1
        layers += [nn.Conv2d(before, channels, 3, stride, 1), nn.ReLU()]
        before = channels
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    return initialised(nn.Sequential(*layers, *head), initializer)


def cases(chosen: str | None = None) -> Iterator[Case]:
    """The cases of one set, or of all."""
    everything = [*_plain(), *_public()]
    yield from (c for c in everything if chosen in (None, c.set))


def _plain() -> Iterator[Case]:
    for name, init in INITIALIZERS.items():
        for width, depth in ((8, 6), (32, 10), (128, 12)):

            def build(w: int = width, d: int = depth, i: Initializer | None = init) -> nn.Module:
                return plain_fc(w, d, i)

            inputs = {"input": ((2, width), "float32")}
            yield Case("plain", f"fc_{name}_{width}x{depth}", "torch", build, inputs, 200)

        def build_conv(i: Initializer | None = init) -> nn.Module:
            return plain_conv(16, 6, i, 12)

        shape = {"input": ((2, 3, 12, 12), "float32")}
        yield Case("plain", f"conv_{name}_16x6", "torch", build_conv, shape, 200)


def _public() -> Iterator[Case]:
    for name in TIMM:
        yield Case("timm", name, "timm", _timm(name))
    for name in TORCHVISION:
        yield Case("timm", f"torchvision/{name}", "torchvision", _torchvision(name))
    for name in TRANSFORMERS:
        yield Case("transformers", f"{name}-tiny", "transformers", _transformers(name, 3))
    for name in TRANSFORMERS_BASE:
        yield Case("transformers", f"{name}-base", "transformers", _transformers(name, None))
    for name, options in _X.items():
        yield Case("others", f"x_transformers/{name}", "x-transformers",
                   _x_transformers(**options), {"x": ((2, 64), "int64")})  # fmt: skip
    for name, (module, kind, options) in _VITS.items():
        size = options.get("image_size", 224)
        yield Case("others", f"vit_pytorch/{name}", "vit-pytorch",
                   _vit_pytorch(module, kind, **options),
                   {"img" if name not in ("twins_svt", "max_vit") else "x":
                    ((2, 3, size, size), "float32")})  # fmt: skip
    for name in _SMP:
        yield Case("others", f"smp/{name}", "segmentation_models_pytorch", _smp(name, "resnet18"),
                   {"x": ((2, 3, 128, 128), "float32")})  # fmt: skip
    yield Case("others", "torch/encoder", "torch", _torch_encoder,
               {"src": ((2, 32, 128), "float32")})  # fmt: skip
    yield Case("others", "torch/lstm", "torch", lambda: _Recurrent(nn.LSTM),
               {"x": ((2, 24, 48), "float32")})  # fmt: skip
    yield Case("others", "torch/gru", "torch", lambda: _Recurrent(nn.GRU),
               {"x": ((2, 24, 48), "float32")})  # fmt: skip


def _torch_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    return nn.TransformerEncoder(layer, 4)


class _Recurrent(nn.Module):
    """Two recurrent layers between linear ones."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Linear(48, 64)
        self.core = kind(64, 96, 2, batch_first=True)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(torch.relu(self.stem(x)))[0])
