"""What programs do beside calling layers: hooks, compilers, views, numpy, dictionaries, devices.

Every model here is recorded, and the recorded graph gives what the model gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import archlint
from archlint.errors import ArchlintError
from archlint.graph.from_torch import load_torch, record
from archlint.graph.model import verify
from archlint.graph.torch_recorder.recorder import tensors_in


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class Hooked(Base):
    def __init__(self) -> None:
        super().__init__()
        self.fc.register_forward_hook(lambda module, args, output: 2 * output)
        self.fc.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True, dropout=0.25)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x)[0]


class Scripted(Base):
    def __init__(self) -> None:
        super().__init__()
        self.act = torch.jit.script(nn.GELU())

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.fc(x))


class Compiled(Base):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.compile(nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.fc(x))


class Branches(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum().item() < 1e9 else x


class ThroughNumpy(Base):
    def forward(self, x: Tensor) -> Tensor:
        scale = float(x.detach().cpu().numpy().std())
        return self.fc(x) / scale


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class OwnGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(self.fc(x))


class Checkpointed(Base):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.fc, x, use_reentrant=False)


class Mapped(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(lambda row: torch.tanh(row) * row.sum())(self.fc(x))


class Rearranged(Base):
    def forward(self, x: Tensor) -> Tensor:
        einops = pytest.importorskip("einops")
        h = einops.rearrange(self.fc(x), "b (h d) -> b h d", h=2)
        return einops.reduce(h, "b h d -> b d", "max")


class Complex(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(self.fc(x)) * torch.exp(torch.tensor(1j))).real


class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        left, right = h.chunk(2, -1)
        left.mul_(3).add_(right)
        h[:, 0] = 1
        h += 1
        return h.view(-1, 2, 4).transpose(1, 2)


class Into(Base):
    """``out=`` is written into, not the first argument; tables that are written to are none."""

    def forward(self, x: Tensor) -> Tensor:
        table, other = torch.zeros(4, 8), torch.zeros(4, 8)
        torch.mul(x, 2, out=table)
        torch.add(table, x, out=table)
        torch.add(table, x, out=other)
        return self.fc(x) * (table + 1) - other


class Tables(Base):
    """Masks and positions made by writes: known at every step, until an input is written."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        mask = h.new_zeros(6, 8)
        mask[:3, 2:] = 1
        first, row = mask + 0, mask[0]
        mask[1:4] = 5
        mask.masked_fill_(mask == 5, 2.0)
        mask[2:, 0].zero_()
        mask.view(-1)[3] = 9
        twice = row * 2
        mask.view(48)[::2].mul_(3)
        mask[torch.tensor([4, 5])] = mask[:2] - 1
        shared = mask.detach()
        shared[5, 1:] = 7
        steps = torch.ones(8)
        half = steps[:4]
        steps.add_(x[0])
        return h + first[0] + mask[1] + twice + half.sum() + mask[5] - mask[4]


class Gradients(Base):
    """Takes gradients in forward, as where a network solves a differential equation."""

    def forward(self, x: Tensor) -> Tensor:
        y = (2 * x).requires_grad_()
        z = (3 * x).requires_grad_()
        found = torch.autograd.grad((y * y * z).sum(), (y, z), create_graph=True)
        return self.fc(x) + found[0] + found[1]


class Noisy(Base):
    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x)
        return self.fc(x + noise) * torch.bernoulli(torch.full_like(x, 0.5))


class WithoutGradient(Base):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.fc(x)
        return self.fc(x) - target.detach() * 0.5


class OnTheGpu(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) + torch.arange(8, dtype=x.dtype, device="cpu").to(x.device)


class FastPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[:, -1] = True
        return self.encoder(x, src_key_padding_mask=padding)[:, :-1]


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]


class Structured(Base):
    def forward(self, x: Tensor) -> Any:
        h = self.fc(x)
        return {"a": Output(h, (h + 1,)), "b": [h * 2, None]}


class Dictionary(Base):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.fc(batch["x"]) + batch["y"]


class Caching(Base):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.ones(8) * 2)
        self.last = self.fc(x) * self.table
        return self.last


class LayerDrop(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x if torch.rand([]) < 0.1 else self.fc(x)


@lru_cache(maxsize=4)
def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device) / count


def _unless_compiling(function: Any) -> Any:
    """A decorator that keeps the results out of sight, in what it closes over."""
    cached = lru_cache(maxsize=4)(function)
    return lambda *args: cached(*args)


class Remembering(Base):
    @staticmethod
    @_unless_compiling
    def scales(count: int, device: torch.device) -> Tensor:
        return torch.ones(count, device=device) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scales(8, x.device) + _places(8, x.device)


class LooksAfterItself(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if not torch.isfinite(y).all() or torch.isnan(y.mean()):
            y = y.clamp(-1e4, 1e4)
        return y


X, SEQUENCE = torch.randn(4, 8), torch.randn(2, 5, 8)
MODELS: dict[str, tuple[type[nn.Module], tuple[Any, ...]]] = {
    "hooks that return a value": (Hooked, (X,)),
    "multi-head attention": (SelfAttention, (SEQUENCE,)),
    "a scripted module": (Scripted, (X,)),
    "a compiled module": (Compiled, (X,)),
    "item": (Branches, (X,)),
    "numpy": (ThroughNumpy, (X,)),
    "a gradient of its own": (OwnGradient, (X,)),
    "checkpointing": (Checkpointed, (X,)),
    "vmap": (Mapped, (X,)),
    "einops": (Rearranged, (X,)),
    "complex numbers": (Complex, (X,)),
    "writes through views": (InPlace, (X,)),
    "results where out= says": (Into, (X,)),
    "tables that are written": (Tables, (X,)),
    "random numbers": (Noisy, (X,)),
    "no_grad": (WithoutGradient, (X,)),
    "devices": (OnTheGpu, (X,)),
    "encoder with padding": (FastPath, (SEQUENCE,)),
    "outputs in containers": (Structured, (X,)),
    "a dictionary": (Dictionary, ({"x": X, "y": X + 1},)),
    "what it stores in itself": (Caching, (X,)),
    "what functions remember": (Remembering, (X,)),
    "a watch over what is finite": (LooksAfterItself, (X,)),
}


def _attributes(model: nn.Module) -> dict[str, set[str]]:
    return {k: {*m.__dict__, *dict(m.named_buffers())} for k, m in model.named_modules()}


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_recorded_graph_gives_what_the_model_gives(name: str, mode: Any) -> None:
    owner, args = MODELS[name]
    torch.manual_seed(0)
    model = owner()
    before = _attributes(model)
    recording, _ = record(model, args, mode)
    assert _attributes(model) == before
    model.train(mode == "train")
    with torch.no_grad():
        torch.manual_seed(1)
        given = [t.clone() for _, t in tensors_in(args)]
        found = fx.Interpreter(recording.module()).run(*given)
        torch.manual_seed(1)
        if name == "a compiled module":
            with torch.compiler.set_stance("force_eager"):
                wanted = [t for _, t in tensors_in(model(*args))]
        else:
            wanted = [t for _, t in tensors_in(model(*args))]
    assert len(found) == len(wanted)
    for a, b in zip(wanted, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_it_has_a_layer_graph(name: str) -> None:
    owner, args = MODELS[name]
    graph = verify(load_torch(owner(), args))
    assert any(n.op in ("linear", "attention") for n in graph.walk())


def test_gradients_may_be_taken_in_forward() -> None:
    graph = verify(load_torch(Gradients, (X,)))
    assert [n.module for n in graph.nodes if n.op == "linear"] == ["fc"]


class Cuda(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.cuda()).to("cuda:0") + torch.ones(8, device="cuda")


def test_a_gpu_that_is_not_there_is_not_needed() -> None:
    graph = verify(load_torch(Cuda, (X,)))
    assert [n.op for n in graph.nodes] == ["linear", "add"]


def test_data_parallel_is_seen_through() -> None:
    graph = verify(load_torch(nn.DataParallel(Hooked()), (X,)))
    assert "fc" in {n.module for n in graph.nodes}


def test_skipped_layers_are_seen_as_not_skipped() -> None:
    graph = verify(load_torch(LayerDrop, (X,)))
    assert [n.module for n in graph.nodes if n.op == "linear"] == ["fc"]
    assert any("random number" in note for note in graph.notes)


def test_numbers_are_taken_to_be_finite_without_weights() -> None:
    graph = verify(load_torch(LooksAfterItself, (X,)))
    assert all(n.known and n.op != "clamp" for n in graph.nodes)
    assert [note for note in graph.notes if "finite" in note] == list(graph.notes)[:1]


def test_no_tensor_without_elements_is_left_with_the_program() -> None:
    _places.cache_clear()
    load_torch(Remembering, (X,))
    assert not Remembering()(X).is_meta


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)


class FrozenPart(Three):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.a(x).relu()
        return self.b(h) + h


class InferredPart(Three):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            h = self.a(x)
        return self.b(h + self.c(x))


class WrittenWithout(Three):
    def forward(self, x: Tensor) -> Tensor:
        h, t = self.a(x), torch.ones(4, 8)
        with torch.no_grad():
            h.mul_(2)  # has its gradient still
            t.add_(self.b(x))
        return self.c(h) + t


_square: Any = Square.apply


class KeepsGradients(Three):
    """Each switches gradients off inside, and has its own."""

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(self.a, _square(self.b(x)), use_reentrant=True)
        assert torch.is_grad_enabled() == self.training
        return self.c(h) + Square.apply(h)


class OnlyInfers(Three):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


@pytest.mark.parametrize(
    ("owner", "stopped"),
    [(FrozenPart, ["relu"]), (InferredPart, ["linear"]), (WrittenWithout, ["add"]),
     (KeepsGradients, []), (OnlyInfers, [])],
)  # fmt: skip
def test_no_gradient_comes_back_from_where_none_is_kept(
    owner: type[nn.Module], stopped: list[str]
) -> None:
    graph = verify(load_torch(owner, (X,)))
    made = {id: n for n in graph.walk() for id in n.outputs}
    stops = [n for n in graph.walk() if n.attributes.get("stops_gradient")]
    assert [made[str(n.inputs[0])].op for n in stops] == stopped
    # what nothing of a forward keeps is not what it is trained by
    assert any("keeps no gradients" in n for n in graph.notes) == (owner is OnlyInfers)
    evaluated = load_torch(owner, (X,), "eval")
    assert not any(n.attributes.get("stops_gradient") for n in evaluated.walk())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.jit.script(Base()),
        lambda: torch.jit.trace(Base(), X),
        lambda: torch.export.export(Base(), (X,)),
        lambda: torch.compile(Base()),
        lambda: nn.DataParallel(Base()),
    ],
    ids=["scripted", "traced", "exported", "compiled", "parallel"],
)
def test_what_a_factory_may_return(made: Any) -> None:
    for target in (made, made()):
        graph = verify(load_torch(target, {"x": ((4, 8), "float32")}))
        assert [n.op for n in graph.walk()] == ["linear"]


class FromNumpy(Base):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8, dtype=torch.float64))
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.fc(x) * self.scale)


class Cast(FromNumpy):
    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.fc(x) * self.scale).float())


def test_precisions_that_do_not_go_together_are_refused_as_by_the_kernels() -> None:
    with pytest.raises(RuntimeError, match="same dtype"):
        FromNumpy()(X)
    with pytest.raises(ArchlintError, match=r"head \(Linear\) raised .* float32 and float64"):
        load_torch(FromNumpy, (X,))
    assert load_torch(Cast, (X,)).notes == ("double precision: scale, unlike 4 other weights",)


class Raises(Base):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("no such thing")


def test_what_forward_raises_is_told_in_one_line() -> None:
    with pytest.raises(ArchlintError, match=r"Raises raised ValueError .*no such thing"):
        load_torch(Raises, (X,))


@pytest.mark.parametrize(
    "inputs",
    [X, X.numpy(), [X], (X.numpy(),), {"x": X}, {"x": X.numpy()}, {"x": (4, 8)}],
    ids=["tensor", "array", "list", "tuple", "by name", "array by name", "shape"],
)
def test_inputs_from_python(inputs: Any) -> None:
    assert archlint.profile(Base, inputs=inputs).input == {"x": "4x8"}
    report = archlint.check(Base, inputs={"x": (4, 9)})
    assert "4x9" in str(report)  # says why nothing was read
    assert report.exit_code() == 2
