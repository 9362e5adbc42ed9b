"""The networks of the must-fire and must-not-fire lists, small where size does not matter."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def he(layer: Any, nonlinearity: str = "relu") -> Any:
    nn.init.kaiming_normal_(layer.weight, nonlinearity=nonlinearity)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def glorot(layer: Any) -> Any:
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(
    depth: int, width: int, init: Callable[[Any], Any] = lambda layer: layer,
    act: Callable[[], nn.Module] = nn.ReLU, norm: Callable[[int], nn.Module] | None = None,
) -> nn.Module:  # fmt: skip
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers.append(init(nn.Linear(width, width)))
        if norm is not None:
            layers.append(norm(width))
        layers.append(act())
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Residual(nn.Module):
    """x + scale·branch(x), ``blocks`` times; the branch ends in ReLU or in a linear layer."""

    def __init__(self, blocks: int, width: int, scale: float, ending: str) -> None:
        super().__init__()
        self.scale, self.ending = scale, ending
        self.first = nn.ModuleList([he(nn.Linear(width, width)) for _ in range(blocks)])
        self.second = nn.ModuleList([he(nn.Linear(width, width)) for _ in range(blocks)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=True):
            if self.ending == "relu":
                x = x + self.scale * torch.relu(first(x))
            else:
                x = x + self.scale * second(torch.relu(first(x)))
        return self.head(x)


class Normed(nn.Module):
    """An exploding residual stack with a norm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = Residual(20, 64, 1.0, "linear")
        self.stack.head = nn.Identity()  # type: ignore[assignment]
        self.norm = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stack(x)))


class ReZero(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([he(nn.Linear(64, 64)) for _ in range(20)])
        self.alpha = nn.Parameter(torch.zeros(20))

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + self.alpha[i] * torch.relu(layer(x))
        return x


class Fixup(nn.Module):
    def __init__(self, blocks: int = 20) -> None:
        super().__init__()
        self.first = nn.ModuleList([he(nn.Linear(64, 64)) for _ in range(blocks)])
        self.second = nn.ModuleList([nn.Linear(64, 64) for _ in range(blocks)])
        for first, second in zip(self.first, self.second, strict=True):
            first.weight.data.mul_(blocks**-0.5)  # type: ignore[operator]
            nn.init.zeros_(second.weight)  # type: ignore[arg-type]
            nn.init.zeros_(second.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.first, self.second, strict=True):
            x = x + second(torch.relu(first(x)))
        return x


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(30 * x)


class Siren(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = [2, *[width] * 5]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(sizes)):
            layer = nn.Linear(a, b)
            bound = 1 / a if i == 0 else math.sqrt(6 / a) / 30
            nn.init.uniform_(layer.weight, -bound, bound)
            layers += [layer, Sine()]
        self.net = nn.Sequential(*layers, nn.Linear(width, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Nerf(nn.Module):
    """Eight layers, the input again at the fifth, Glorot weights as in the published code."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        sizes = [63, width, width, width, width, width + 63, width, width]
        self.layers = nn.ModuleList([glorot(nn.Linear(n, width)) for n in sizes])
        self.head = glorot(nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for i, layer in enumerate(self.layers):
            if i == 5:
                h = torch.cat([h, x], -1)
            h = torch.relu(layer(h))
        return self.head(h)


class Lora(nn.Module):
    """A normalised MLP whose linear layers carry an adapter that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(64) for _ in range(6)])
        self.base = nn.ModuleList([nn.Linear(64, 64) for _ in range(6)])
        self.down = nn.ModuleList([nn.Linear(64, 4, bias=False) for _ in range(6)])
        self.up = nn.ModuleList([nn.Linear(4, 64, bias=False) for _ in range(6)])
        for up in self.up:
            nn.init.zeros_(up.weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        parts = zip(self.norms, self.base, self.down, self.up, strict=True)
        for norm, base, down, up in parts:
            h = norm(x)
            x = x + torch.relu(base(h) + up(down(h))) * 0.2
        return x


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        self.lstm = nn.LSTM(32, 64, 2, batch_first=True)
        self.head = nn.Linear(64, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(ids))[0])


def unet() -> nn.Module:
    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()

            def block(a: int, b: int) -> nn.Module:
                return nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(),
                                     nn.Conv2d(b, b, 3, padding=1), nn.BatchNorm2d(b),
                                     nn.ReLU())  # fmt: skip

            self.a, self.b, self.c = block(3, 16), block(16, 32), block(32, 64)
            self.up1 = nn.ConvTranspose2d(64, 32, 2, 2)
            self.up2 = nn.ConvTranspose2d(32, 16, 2, 2)
            self.d, self.e = block(64, 32), block(32, 16)
            self.head = nn.Conv2d(16, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            a = self.a(x)
            b = self.b(nn.functional.max_pool2d(a, 2))
            c = self.c(nn.functional.max_pool2d(b, 2))
            d = self.d(torch.cat([self.up1(c), b], 1))
            return self.head(self.e(torch.cat([self.up2(d), a], 1)))

    return UNet()


def dcgan() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in [(100, 256), (256, 128), (128, 64)]:
        conv = nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)
        nn.init.normal_(conv.weight, std=0.02)
        layers += [conv, nn.BatchNorm2d(b), nn.ReLU()]
    last = nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False)
    nn.init.normal_(last.weight, std=0.02)
    return nn.Sequential(*layers, last, nn.Tanh())


def autoencoder() -> nn.Module:
    sizes = [64, 48, 24, 2, 24, 48]
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers.append(he(nn.Linear(a, b)))
        if b != 2:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(48, 64))


def lecun(layer: Any) -> Any:
    return he(layer, "linear")


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **options)


def hf(kind: str, model: str, **options: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, kind + "Config")(**options)
    return getattr(transformers, kind + model)(config)


def encoder(redrawn: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    made = nn.TransformerEncoder(layer, 6)
    for parameter in made.parameters():
        if redrawn and parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    return made


def constants(*values: float) -> nn.Module:
    """An MLP whose first layers have constant weights."""
    made = mlp(3, 64, he)
    for layer, value in zip((made[0], made[2]), values, strict=False):  # type: ignore[index]
        nn.init.constant_(layer.weight, value)
    return made


def upsampler(std: float | None, norm: bool) -> nn.Module:
    """Transposed convolutions that get wider, scaled as Kaiming's or by the true fan."""
    layers: list[nn.Module] = []
    for a, b in [(8, 32), (32, 64), (64, 128)]:
        conv = nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False)
        if std is None:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        else:
            nn.init.normal_(conv.weight, std=math.sqrt(std / (4 * a)))
        layers += [conv, *([nn.BatchNorm2d(b)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(128, 3, 1))


def depthwise(mode: str, norm: bool) -> nn.Module:
    """Depthwise and pointwise convolutions in turn."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(2):
        for groups, kernel in ((32, 3), (1, 1)):
            conv = nn.Conv2d(32, 32, kernel, padding=kernel // 2, groups=groups, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode=mode, nonlinearity="relu")  # type: ignore[arg-type]
            layers += [conv, *([nn.BatchNorm2d(32)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(32, 10, 1))


def positive(low: float, norm: bool = False) -> nn.Module:
    """Uniform weights that are centred, or not."""
    made = mlp(3, 64, he, norm=nn.LayerNorm if norm else None)
    with torch.no_grad():
        made[3 if norm else 2].weight.uniform_(low, 0.1)  # type: ignore[index, operator]
    return made


class Pooled(nn.Module):
    """Learned queries and positions of unit scale, which are attended with or added."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 64)
        self.position = nn.Parameter(torch.randn(20, 64))
        self.query = nn.Parameter(torch.randn(4, 64))
        self.norm = nn.LayerNorm(64)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.embed(x)[:, None] + self.position)
        return self.head(self.attention(self.query.expand(len(h), -1, -1), h, h)[0])


def pooled() -> nn.Module:
    return Pooled()


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 80), nn.Linear(64, 80)
        self.mix = nn.Bilinear(80, 80, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.a(x), self.b(x))))


class Siamese(nn.Module):
    """One encoder used twice, and a copy of it that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        self.target = copy.deepcopy(self.encoder).requires_grad_(False)
        self.head = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.encoder(x), self.encoder(x.flip(0))
        return self.head(a) - self.target(x) + b


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.w = nn.Parameter(torch.Tensor(64, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.first(x)) @ self.w


class NoRegisters(nn.Module):
    """Tokens that an option asks for none of, as in DINOv3 of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.empty(1, 0, 64))
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.registers.expand(x.shape[0], -1, -1), x[:, None]], 1)
        return self.head(tokens.mean(1))


X64 = {"input": ((4, 64), None)}

MUST_FIRE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "default_mlp_20": (lambda: mlp(20, 64), "ARC101", "error"),
    "default_mlp_30": (lambda: mlp(30, 128), "ARC101", "error"),
    "glorot_mlp_20": (lambda: mlp(20, 64, glorot), "ARC101", "error"),
    "gelu_he_30": (lambda: mlp(30, 256, he, nn.GELU), "ARC101", "error"),
    "he_50x15": (lambda: mlp(50, 15, he), "ARC201", "error"),
    "he_residual_20": (lambda: Residual(20, 64, 1.0, "linear"), "ARC301", "error"),
    "relu_ended_root": (lambda: Residual(40, 64, 40**-0.5, "relu"), "ARC302", "warning"),
    "encoder_of_one_layer": (encoder, "ARC601", "error"),
    "one_constant_layer": (lambda: constants(0.05), "ARC605", "warning"),
    "two_constant_layers": (lambda: constants(0.05, 0.05), "ARC605", "error"),
    "kaiming_upsampler": (lambda: upsampler(None, False), "ARC606", "warning"),
    "fan_out_depthwise": (lambda: depthwise("fan_out", False), "ARC607", "warning"),
    "positive_weights": (lambda: positive(0.0), "ARC611", "error"),
    "bilinear": (Bilinear, "ARC612", "warning"),
    "never_filled": (Empty, "ARC613", "error"),
}

MUST_NOT_FIRE: dict[str, Callable[[], nn.Module]] = {
    "he_mlp_20": lambda: mlp(20, 256, he),
    "default_mlp_3": lambda: mlp(2, 64),
    "selu_mlp_20": lambda: mlp(20, 128, lecun, nn.SELU),
    "batchnorm_mlp_10": lambda: mlp(10, 64, norm=nn.BatchNorm1d),
    "layernorm_mlp_10": lambda: mlp(10, 64, norm=nn.LayerNorm),
    "residual_1_over_l": lambda: Residual(40, 64, 1 / 40, "relu"),
    "residual_root": lambda: Residual(40, 64, 40**-0.5, "linear"),
    "residual_before_a_norm": Normed,
    "rezero": ReZero,
    "fixup": Fixup,
    "siren": Siren,
    "encoder_redrawn": lambda: encoder(redrawn=True),
    "siamese": Siamese,
    "upsampler": lambda: upsampler(2.0, False),
    "kaiming_upsampler_bn": lambda: upsampler(None, True),
    "depthwise": lambda: depthwise("fan_in", False),
    "fan_out_depthwise_bn": lambda: depthwise("fan_out", True),
    "centred_weights": lambda: positive(-0.1),
    "positive_weights_before_layernorm": lambda: positive(0.0, norm=True),
    "pooled": pooled,
    "nerf": Nerf,
    "lora": Lora,
    "no_registers": NoRegisters,
    "lstm": Recurrent,
    "unet": unet,
    "dcgan": dcgan,
    "autoencoder": autoencoder,
    "resnet18": lambda: timm_model("resnet18", zero_init_last=False),
    "resnet18_zero_gamma": lambda: timm_model("resnet18"),
    "vgg11_bn": lambda: timm_model("vgg11_bn", num_classes=10),
    "mobilenetv2": lambda: timm_model("mobilenetv2_050"),
    "efficientnet": lambda: timm_model("efficientnet_b0"),
    "convnext": lambda: timm_model("convnext_atto"),
    "densenet": lambda: timm_model("densenet121"),
    "nf_resnet": lambda: timm_model("nf_regnet_b0"),
    "vit": lambda: timm_model("vit_tiny_patch16_224"),
    "deit": lambda: timm_model("deit_tiny_patch16_224"),
    "cait": lambda: timm_model("cait_xxs24_224"),
    "gpt2": lambda: hf("GPT2", "LMHeadModel", n_embd=256, n_layer=12, n_head=4, vocab_size=500),
    "llama": lambda: hf("Llama", "ForCausalLM", hidden_size=256, intermediate_size=512,
                        num_hidden_layers=8, num_attention_heads=4, vocab_size=500),
    "bert": lambda: hf("Bert", "Model", hidden_size=256, num_hidden_layers=12,
                       num_attention_heads=4, intermediate_size=1024, vocab_size=500),
    "t5": lambda: hf("T5", "EncoderModel", d_model=128, d_kv=32, d_ff=256, num_layers=6,
                     num_heads=4, vocab_size=500),
}  # fmt: skip
