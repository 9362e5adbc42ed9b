"""PyTorch models as layer graphs: shapes, values, paths, inputs, the same graph as from ONNX."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from archlint.errors import ArchlintError
from archlint.graph.from_onnx import load_onnx
from archlint.graph.from_torch import load_torch, record
from archlint.graph.model import LayerGraph, verify
from archlint.graph.torch_recorder.recorder import tensors_in
from archlint.signal.propagate import propagate
from tests import exported

SMALL = [
    "mlp_he_normal",
    "convnet",
    "residual_root_relu",
    "transformer_function_causal",
    "llama_like",
    "old_style",
    "encoder",
    "unet",
    "lstm",
    "normalised",
]
TIMM = [
    "resnet18",
    "vit_tiny_patch16_224",
    "efficientnet_b0",
    "convnext_atto",
    "swin_tiny_patch4_window7_224",
    "mixer_s32_224",
    "regnety_002",
    "densenet121",
    "cait_xxs24_224",
    "levit_128s",
    "coat_tiny",
    "xcit_nano_12_p16_224",
]


def _unknown_share(graph: LayerGraph) -> float:
    nodes = list(graph.walk())
    return sum(not n.known for n in nodes) / max(len(nodes) + graph.folded, 1)


def _executes_equally(model: nn.Module, inputs: Any = None) -> None:
    """The recorded graph and the model give the same, from the same random numbers."""
    model = model.double().train()
    with torch.no_grad():  # a head of zeros would hide a difference
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recording, example = record(model, inputs)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"recording changed {name}"
    args, kwargs = example.drawn()
    torch.manual_seed(1)
    with torch.no_grad():
        wanted = [t for _, t in tensors_in(model(*args, **kwargs))]
    model.load_state_dict(before)
    torch.manual_seed(1)
    with torch.no_grad():
        given = [t for _, t in tensors_in((args, kwargs))]
        found = fx.Interpreter(recording.module()).run(*given)
    shapes = [
        node.meta["val"].shape for node in next(iter(reversed(recording.graph.nodes))).args[0]
    ]
    assert shapes == [t.shape for t in wanted]
    for expected, actual in zip(wanted, found, strict=True):
        if expected.is_floating_point():
            size = expected.abs().max()
            assert size > 0
            assert (expected - actual).abs().max() <= 1e-6 * size
        else:
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_execute_equally(name: str) -> None:
    inputs = tuple(
        t.double() if t.is_floating_point() else t for t in exported.CASES[name].inputs()
    )
    _executes_equally(exported.model(name), inputs)


@pytest.mark.parametrize("name", TIMM[:3])
def test_timm_models_execute_equally(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    _executes_equally(timm.create_model(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM[3:])
def test_more_timm_models_execute_equally(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    _executes_equally(timm.create_model(name))


@pytest.mark.parametrize("name", TIMM)
def test_timm_models_are_recorded(name: str) -> None:
    timm = pytest.importorskip("timm")
    graph = verify(load_torch(lambda: timm.create_model(name)))
    assert _unknown_share(graph) < 0.01
    assert any("assumed" in note for note in graph.notes)


def _transformers() -> dict[str, Callable[[], nn.Module]]:
    t = pytest.importorskip("transformers")
    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    text = {**small, "vocab_size": 128}
    grouped = {**text, "num_key_value_heads": 2}
    image = {**small, "image_size": 32, "patch_size": 8}
    two_stacks = {
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 64,
        "decoder_ffn_dim": 64,
        "vocab_size": 128,
    }
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 128}
    return {
        "gpt2": lambda: t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=128)
        ),
        "bert": lambda: t.BertModel(t.BertConfig(**text)),
        "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**text)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**grouped)),
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**grouped, num_local_experts=4)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**t5, decoder_start_token_id=0)),
        "bart": lambda: t.BartModel(t.BartConfig(**two_stacks)),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**image)),
        "clip": lambda: t.CLIPModel(
            t.CLIPConfig(
                text_config={**text, "max_position_embeddings": 32, "eos_token_id": 1},
                vision_config=image,
            )
        ),
        "mamba": lambda: t.MambaForCausalLM(
            t.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=128)
        ),
        "deberta": lambda: t.DebertaV2Model(t.DebertaV2Config(**text)),
    }


KINDS = ["gpt2", "bert", "roberta", "llama", "t5", "bart", "vit", "clip", "mamba", "deberta"]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_are_recorded(kind: str) -> None:
    graph = verify(load_torch(_transformers()[kind]))
    assert _unknown_share(graph) < 0.01
    assert "" in {n.module for n in graph.nodes} or any("." in n.module for n in graph.nodes)


def test_experts_are_grouped_linear_maps() -> None:
    graph = verify(load_torch(_transformers()["mixtral"]))
    assert all(n.known for n in graph.walk())
    experts = [n for n in graph.nodes if n.op == "grouped_linear"]
    assert len(experts) == 4
    assert all(graph.parameter(n.inputs[1]) is not None for n in experts)
    assert any(n.module.endswith("self_attn.q_proj") for n in graph.nodes)


@pytest.mark.parametrize("kind", ["bert", "llama", "vit", "bart"])
def test_transformers_execute_equally(kind: str) -> None:
    torch.manual_seed(0)
    _executes_equally(_transformers()[kind]())


def _module_outputs(graph: LayerGraph) -> dict[str, float]:
    """Module path -> rms of the last value with this path, for modules called once."""
    signals = propagate(graph)
    found: dict[str, float] = {}
    for node in graph.nodes:
        rms = signals[node.output].rms
        if rms is not None:
            found[node.module] = rms
    return found


# `act` and `relu` are called several times, which the exporter renames; the last value of `lstm`
# is a state in one graph and the output in the other.
REUSED = {"act", "lstm"}


@pytest.mark.parametrize("exporter", exported.EXPORTERS)
@pytest.mark.parametrize("name", [n for n in SMALL if n != "normalised"])
def test_twins(name: str, exporter: exported.Exporter) -> None:
    here = _module_outputs(verify(load_torch(exported.model(name), exported.CASES[name].inputs())))
    there = _module_outputs(load_onnx(exported.export(name, exporter)))
    shared = (here.keys() & there.keys()) - REUSED
    assert len(shared) >= 0.7 * len(here.keys() - REUSED)
    # torch keeps the two biases of a recurrent layer apart: each is fitted from half the numbers
    tolerance = 0.15 if name == "lstm" else 0.01
    assert {path: here[path] for path in shared} == pytest.approx(
        {path: there[path] for path in shared}, rel=tolerance
    )


# --------------------------------------------------------------------------- names and modes


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.25))
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.inner(self.embed(ids)))


def test_tied_parameters_are_one_and_named_as_in_the_state_dict() -> None:
    graph = verify(load_torch(Tied()))
    assert set(graph.parameters) == {"embed.weight", "inner.0.weight", "inner.0.bias"}
    affine = [n for n in graph.nodes if n.op in ("embedding", "linear")]
    assert [(n.module, n.module_type) for n in affine] == [
        ("embed", "Embedding"),
        ("inner.0", "Linear"),
        ("head", "Linear"),
    ]
    assert affine[0].inputs[1] == affine[2].inputs[1] == "embed.weight"


def test_mode_says_whether_dropout_is_on_and_the_model_stays_as_it_was() -> None:
    model = Tied()
    model.inner[1].eval()
    assert [n.op for n in load_torch(model).nodes].count("dropout") == 1
    assert [n.op for n in load_torch(model, mode="eval").nodes].count("dropout") == 0
    assert model.training
    assert not model.inner[1].training


def test_an_exported_program_keeps_paths_and_parameters() -> None:
    model = exported.ResidualMLP(48, 2, 0.5, False)
    x = torch.randn(4, 32)
    program = torch.export.export(model, (x,))
    graph = verify(load_torch(program))
    direct = load_torch(model, (x,))
    assert set(graph.parameters) == set(direct.parameters)
    paths = Counter(n.module for n in graph.nodes if n.op == "linear")
    assert paths == Counter(n.module for n in direct.nodes if n.op == "linear")
    assert _module_outputs(graph)["head"] == pytest.approx(_module_outputs(direct)["head"])


def test_a_traced_module_gives_the_same_operations() -> None:
    model = exported.ConvNet(depth=2)
    traced = load_torch(fx.symbolic_trace(model))
    assert [n.op for n in traced.nodes] == [n.op for n in load_torch(model).nodes]


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(8)
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn(x)
        return self.a(h) if h.sum().item() > -1e9 else self.b(h)


@pytest.mark.parametrize("ready", [True, False])
def test_a_branch_on_data_runs_on_real_tensors(ready: bool) -> None:
    model = Branching()
    before = model.bn.running_mean.clone()
    graph = verify(load_torch(model if ready else Branching))
    assert [n.module for n in graph.nodes if n.op == "linear"] == ["a"]
    assert any("depends on its data" in note for note in graph.notes)
    assert torch.equal(model.bn.running_mean, before)


class Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(self.fc(x))


def test_what_has_no_word_is_unknown_by_its_name() -> None:
    graph = verify(load_torch(Custom()))
    (node,) = [n for n in graph.nodes if not n.known]
    assert node.source_op == "bessel_j0"
    assert graph.shape(graph.outputs[0]) == (2, 4)


# --------------------------------------------------------------------------- inputs


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.words = nn.Conv2d(3, 4, 3), nn.Embedding(9, 4)

    def forward(self, image: Tensor, words: Tensor) -> Tensor:
        return self.image(image).mean((2, 3)) + self.words(words).mean(1)


def test_inputs_by_name() -> None:
    graph = load_torch(Two(), {"words": ((2, 5), "int64"), "image": ((2, 3, 8, 8), None)})
    assert graph.inputs == ("image", "words")
    assert graph.values["words"].dtype == "int64"
    assert not graph.notes


def test_a_wrong_name_is_told() -> None:
    with pytest.raises(ArchlintError, match="no parameter 'imag'") as error:
        load_torch(Two(), {"imag": ((2, 3, 8, 8), None)})
    assert error.value.hint == "did you mean 'image'?"


def test_inputs_that_cannot_be_deduced_are_asked_for() -> None:
    with pytest.raises(ArchlintError) as error:
        load_torch(Two())
    assert "--input" in (error.value.hint or "")


def test_a_shape_that_does_not_fit_tells_the_layer() -> None:
    with pytest.raises(ArchlintError, match=r"inner\.0 \(Linear\) raised RuntimeError") as error:
        load_torch(Wrong())
    assert isinstance(error.value.__cause__, RuntimeError)


class Wrong(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Embedding(5, 8), nn.Sequential(nn.Linear(7, 2))

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(self.first(ids))


def test_a_factory_may_say_its_inputs() -> None:
    def build() -> nn.Module:
        return Two()

    build.example_inputs = lambda: (  # type: ignore[attr-defined]
        torch.randn(3, 3, 8, 8),
        torch.zeros(3, 2, dtype=torch.int64),
    )
    assert load_torch(build).values["image"].shape == (3, 3, 8, 8)


@pytest.mark.parametrize("made", [3, "model", None])
def test_what_is_no_model_is_refused(made: Any) -> None:
    with pytest.raises(ArchlintError):
        load_torch(lambda: made)
    with pytest.raises(ArchlintError):
        load_torch(made)


def test_inputs_are_called_what_forward_calls_them() -> None:
    """Although fx has its own name for what Python knows as ``input``."""
    graph = load_torch(lambda: nn.Sequential(nn.Linear(8, 8)), {"input": ((2, 8), None)})
    assert graph.inputs == ("input",)
    assert any("input input assumed" in note
               for note in load_torch(lambda: nn.Sequential(nn.Linear(8, 8))).notes)  # fmt: skip


def test_what_a_model_draws_for_itself_is_the_same_in_every_run() -> None:
    """As many rows are left as the weights and the numbers drawn in forward say."""

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.last = nn.Linear(8, 40), nn.Linear(40, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.score(x) + torch.randn(len(x), 40)
            return self.last(y[y.sum(-1) > 0])

    shapes = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        graph = load_torch(Kept, {"x": ((50, 8), "float32")})
        assert torch.equal(before, torch.random.get_rng_state())
        shapes.append(graph.shape(graph.outputs[0]))
    assert len(set(shapes)) == 1
    assert shapes[0] is not None
    assert None not in shapes[0]
