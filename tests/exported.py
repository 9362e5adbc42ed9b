"""Networks at initialization, as ONNX files from both torch exporters.

``CASES`` names them; ``export`` writes a file once a session. All are small: what matters is how
exporters spell an architecture. Weights are freshly drawn with a fixed seed; dropout is off, and
BatchNorm stays in training mode, so that no exporter folds it into a convolution.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import itertools
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Exporter = Literal["dynamo", "legacy"]
EXPORTERS: tuple[Exporter, ...] = ("dynamo", "legacy")
Initializer = Callable[[Tensor], Any]

INITIALIZERS: dict[str, Initializer | None] = {
    "he_normal": lambda w: nn.init.kaiming_normal_(w, nonlinearity="relu"),
    "he_uniform": lambda w: nn.init.kaiming_uniform_(w, nonlinearity="relu"),
    "xavier": nn.init.xavier_normal_,
    "lecun": lambda w: nn.init.kaiming_normal_(w, nonlinearity="linear"),
    "default": None,
}


def initialise(module: nn.Module, initializer: Initializer | None) -> nn.Module:
    """Draw every weight of rank 2 or more anew and clear the biases; None keeps torch's own."""
    if initializer is not None:
        for parameter in module.parameters():
            if parameter.ndim >= 2:
                initializer(parameter)
            else:
                nn.init.zeros_(parameter)
    return module


class MLP(nn.Module):
    """Linear, activation, …, linear head."""

    def __init__(
        self,
        width: int = 64,
        depth: int = 12,
        activation: Callable[[], nn.Module] = nn.ReLU,
        inputs: int = 32,
        outputs: int = 10,
    ) -> None:
        super().__init__()
        widths = [inputs] + [width] * depth
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Linear(a, b), activation()) for a, b in itertools.pairwise(widths))
        )
        self.head = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


class ConvNet(nn.Module):
    """Convolutions with zero padding, ReLU, mean over positions, linear head."""

    def __init__(self, channels: int = 32, depth: int = 10, padding: int = 1) -> None:
        super().__init__()
        self.features = nn.ModuleList(
            nn.Conv2d(3 if i == 0 else channels, channels, 3, padding=padding) for i in range(depth)
        )
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.features:
            x = conv(x).relu()
        return self.head(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    """scale · f(h) with f ending in a linear map or in a ReLU."""

    def __init__(self, width: int, scale: float, relu_ended: bool) -> None:
        super().__init__()
        self.scale = scale
        self.fc1 = nn.Linear(width, width)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(width, width)
        self.relu_ended = relu_ended

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc2(self.act(self.fc1(x)))
        if self.relu_ended:
            y = F.relu(y)
        return y if self.scale == 1.0 else self.scale * y


class ResidualMLP(nn.Module):
    """h ← h + η·f(h)."""

    def __init__(self, width: int, depth: int, scale: float, relu_ended: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(32, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, scale, relu_ended) for _ in range(depth))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


class RMSNorm(nn.Module):
    """As in Llama, computed in float32 whatever comes in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        held = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * x.to(held)


class OldLayerNorm(nn.Module):
    """LayerNorm by arithmetic, as many repositories carry it along."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.gamma * ((x - mean) / torch.sqrt(variance + 1e-6)) + self.beta


def old_gelu(x: Tensor) -> Tensor:
    """GELU by the tanh approximation, spelled."""
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x.pow(3.0))))


class Attention(nn.Module):
    """Self-attention: spelled, by torch's function, causal or grouped."""

    def __init__(self, width: int, heads: int, form: str, groups: int | None = None) -> None:
        super().__init__()
        self.heads, self.form, self.groups = heads, form, groups or heads
        self.features = width // heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, self.groups * self.features)
        self.v = nn.Linear(width, self.groups * self.features)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        sample, length, _ = x.shape
        q = self.q(x).view(sample, length, self.heads, self.features).transpose(1, 2)
        k = self.k(x).view(sample, length, self.groups, self.features).transpose(1, 2)
        v = self.v(x).view(sample, length, self.groups, self.features).transpose(1, 2)
        if self.groups != self.heads:
            shape = (sample, self.groups, self.heads // self.groups, length, self.features)
            k = k[:, :, None].expand(shape).reshape(q.shape)
            v = v[:, :, None].expand(shape).reshape(q.shape)
        if self.form == "function":
            y = F.scaled_dot_product_attention(q, k, v)
        elif self.form == "function causal":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            logits = q @ k.transpose(-2, -1) / math.sqrt(self.features)
            if self.form == "spelled causal":
                seen = torch.ones(length, length, dtype=torch.bool).tril()
                logits = logits.masked_fill(~seen, float("-inf"))
            y = logits.softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(sample, length, -1))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        width: int,
        attention: nn.Module,
        norm: Callable[[int], nn.Module],
        activation: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = attention
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    """Token ids to logits through pre-norm blocks."""

    def __init__(
        self,
        form: str,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        activation: Callable[[Tensor], Tensor] = F.gelu,
        groups: int | None = None,
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        self.blocks = nn.ModuleList(
            Block(32, Attention(32, 4, form, groups), norm, activation) for _ in range(depth)
        )
        self.norm = norm(32)
        self.head = nn.Linear(32, 100, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a skip; GroupNorm and SiLU."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        c = channels
        self.stem = nn.Conv2d(3, c, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, c)
        self.down = nn.Conv2d(c, 2 * c, 3, stride=2, padding=1)
        self.norm2 = nn.GroupNorm(4, 2 * c)
        self.middle = nn.Conv2d(2 * c, 2 * c, 3, padding=1)
        self.up = nn.ConvTranspose2d(2 * c, c, 4, stride=2, padding=1)
        self.out = nn.Conv2d(2 * c, 3, 3, padding=1)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        skip = self.act(self.norm1(self.stem(x)))
        h = self.act(self.norm2(self.down(skip)))
        h = self.up(self.act(self.middle(h)))
        return self.out(torch.cat([h, skip], 1))


class Recurrent(nn.Module):
    """Embedding, two LSTM layers, head on the last step."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0][:, -1])


class Normalised(nn.Module):
    """One of each norm and of the rarer activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.instance = nn.InstanceNorm2d(8, affine=True)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.batch = nn.BatchNorm2d(8)
        self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.mish, self.hardswish, self.softplus = nn.Mish(), nn.Hardswish(), nn.Softplus()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hardswish(self.instance(self.conv(x)))
        x = self.mish(self.batch(self.conv2(x))).mean((2, 3))
        return self.head(F.normalize(self.softplus(self.fc(x)), dim=-1))


def _resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return resnet18(weights=None)


def _vit() -> nn.Module:
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=64, depth=3, num_classes=10, pretrained=False
    )


class Logits(nn.Module):
    """A language model of transformers from token ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, attention_mask=torch.ones_like(ids), use_cache=False).logits


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=128,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return Logits(GPT2LMHeadModel(config))


def _images(n: int = 2, side: int = 16) -> tuple[Tensor, ...]:
    return (torch.randn(n, 3, side, side),)


def _vectors() -> tuple[Tensor, ...]:
    return (torch.randn(4, 32),)


def _ids(count: int = 50, length: int = 12) -> tuple[Tensor, ...]:
    return (torch.randint(0, count, (2, length)),)


@dataclass(frozen=True)
class Case:
    """A network and its example inputs."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    slow: bool = False
    optimize: bool = True  # dynamo's optimizer folds BatchNorm into convolutions


def _cases() -> list[Case]:
    found = [
        Case(f"mlp_{name}", lambda f=f: initialise(MLP(), f), _vectors, slow=name != "he_normal")
        for name, f in INITIALIZERS.items()
    ]
    found += [
        Case(f"mlp_{name}", lambda a=a: MLP(depth=4, activation=a), _vectors)
        for name, a in {"gelu": nn.GELU, "silu": nn.SiLU}.items()
    ]
    he = INITIALIZERS["he_normal"]
    found += [
        Case("convnet", lambda: initialise(ConvNet(), he), _images),
        Case("convnet_valid", lambda: initialise(ConvNet(depth=4, padding=0), he), _images, True),
    ]
    depth = 8
    scales = {"one": 1.0, "root": depth**-0.5, "linear": 1 / depth, "tenth": 0.1}
    found += [
        Case(
            f"residual_{name}_{'relu' if relu else 'linear'}",
            lambda s=scale, r=relu: initialise(ResidualMLP(48, depth, s, r), he),
            _vectors,
            slow=name != "root",
        )
        for name, scale in scales.items()
        for relu in (True, False)
    ]
    forms = ("function", "function causal", "spelled", "spelled causal")
    found += [
        Case(f"transformer_{f.replace(' ', '_')}", lambda f=f: Transformer(f), _ids, f != forms[1])
        for f in forms
    ]
    found += [
        Case("llama_like", lambda: Transformer("function causal", RMSNorm, F.silu, 2), _ids),
        Case("old_style", lambda: Transformer("spelled causal", OldLayerNorm, old_gelu), _ids),
        Case(
            "encoder",
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(32, 4, 64, 0.0, "gelu", batch_first=True),
                2,
                enable_nested_tensor=False,
            ),
            lambda: (torch.randn(2, 9, 32),),
        ),
        Case("unet", UNet, _images),
        Case("lstm", Recurrent, _ids),
        Case("normalised", Normalised, lambda: _images(4), optimize=False),
        Case("resnet18", _resnet18, lambda: _images(2, 64), slow=True, optimize=False),
        Case("vit", _vit, lambda: _images(2, 64), slow=True),
        Case("gpt2", _gpt2, lambda: _ids(128, 16), slow=True),
    ]
    return found


CASES: dict[str, Case] = {case.name: case for case in _cases()}


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="archlint-exports-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def model(name: str) -> nn.Module:
    """The network of a case, drawn with its seed, in the mode it is exported in."""
    torch.manual_seed(0)
    return CASES[name].build().train()


@cache
def export(name: str, exporter: Exporter) -> Path:
    """The ONNX file of a case by one of torch's exporters; written once a session."""
    case = CASES[name]
    network, inputs = model(name), case.inputs()
    path = _folder() / f"{name}-{exporter}.onnx"
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        if exporter == "legacy":
            training = torch.onnx.TrainingMode.PRESERVE
            torch.onnx.export(network, inputs, str(path), dynamo=False, training=training)
        else:
            torch.onnx.export(network, inputs, str(path), dynamo=True, optimize=case.optimize)
    return path
