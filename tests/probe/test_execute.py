"""The layer graph means what its source means: what it computes equals what onnxruntime computes,
what onnx's own operator tests expect, and what a recorded model gives."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from archlint.errors import ArchlintError
from archlint.graph import from_torch
from archlint.graph.from_onnx import load_onnx
from archlint.graph.from_torch import load_torch
from archlint.graph.torch_recorder.recorder import tensors_in
from archlint.probe.execute import Program, load_parameters, unknown_nodes
from tests.exported import CASES, EXPORTERS, Exporter, export
from tests.graph.test_odd_models import Tables
from tests.onnx_nodes import test_backend_nodes as node_tests
from tests.probe.running import error, run_graph, run_onnxruntime
from tests.rules import models
from tests.test_real_files import FILES, _feeds

TOLERANCE = 1e-4  # of the greatest difference, in units of the greatest output

cases = [
    pytest.param(name, exporter, marks=[pytest.mark.slow] if case.slow else [])
    for name, case in CASES.items()
    for exporter in EXPORTERS
]


@pytest.mark.parametrize(("name", "exporter"), cases)
def test_exported_twins(name: str, exporter: Exporter) -> None:
    path = export(name, exporter)
    graph = load_onnx(path, mode="eval")
    random = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for id in graph.inputs:
        value = graph.values[id]
        shape = [n or 1 for n in value.shape or ()]
        floating = "float" in (value.dtype or "")
        draw = random.standard_normal(shape) if floating else random.integers(0, 50, shape)
        feeds[id] = draw.astype(value.dtype)
    for ours, theirs in zip(run_graph(graph, feeds), run_onnxruntime(path, feeds), strict=True):
        assert error(ours, theirs) < TOLERANCE


large = ("vgg19.onnx", "sig.onnx", "bak_ovr.onnx", "zfnet512.onnx")  # seconds each
files = [
    pytest.param(name, marks=[pytest.mark.slow] if name.endswith(large) else []) for name in FILES
]


@pytest.mark.parametrize("name", files)
def test_real_files(name: str, real_files: Mapping[str, Path]) -> None:
    graph = load_onnx(real_files[name], mode="eval")
    assert not unknown_nodes(graph)
    feeds = _feeds(graph)
    expected = run_onnxruntime(real_files[name], feeds)
    for ours, theirs in zip(run_graph(graph, feeds), expected, strict=True):
        assert error(ours, theirs) < TOLERANCE


# --------------------------------------------------------------------------- single operators

# Why the result of a node test is no reference, by a part of the test's name.
OTHERWISE = {
    "bernoulli": "random", "training_dropout": "random",
    "batchnorm_example_training_mode": "evaluated with the running statistics",
    "batchnorm_epsilon_training_mode": "evaluated with the running statistics",
    "dynamicquantizelinear": "activations are not rounded",
    "convinteger_with_padding": "activations are not shifted where the padding is",
    "FLOAT8": "kept as real numbers", "FLOAT4": "kept as real numbers",
    "float4": "kept as real numbers", "_e4m3fn": "kept as real numbers",
    "_e5m2": "kept as real numbers", "_e8m0": "kept as real numbers",
    "UINT4": "held in 8 bits", "INT4": "held in 8 bits", "INT2": "held in 8 bits",
    "quantizelinear_uint2": "held in 8 bits", "quantizelinear_int2": "held in 8 bits",
    "equal_string": "text",
    "align_corners": "factors that no size has: onnxruntime takes the sizes",
}  # fmt: skip


def _array(value: Any) -> Any:
    return onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value


def _tolerance(case: node_tests.Case) -> float:
    """Sixteen bits are less exact; some expected results are written with four digits."""
    types = {t.type.tensor_type.elem_type for t in (*case.model.graph.input,
                                                    *case.model.graph.output)}  # fmt: skip
    if onnx.TensorProto.BFLOAT16 in types or "bf16" in case.name:
        return 1e-2
    if onnx.TensorProto.FLOAT16 in types or "fp16" in case.name:
        return 2e-3
    return 1e-3 if "ceil_last_window" in case.name else TOLERANCE


def _outcome(case: node_tests.Case, steered: bool, path: Path) -> str:
    """``equal``, ``outside`` of the vocabulary, ``no reference``, or what is wrong."""
    inputs, outputs = ([_array(v) for v in values] for values in (case.inputs, case.outputs))
    if any(v is None or isinstance(v, list | dict) for v in (*inputs, *outputs)):
        return "no reference"
    if node_tests._has_an_empty_input(case) or any(np.asarray(v).size == 0 for v in inputs):
        return "no reference"
    model = node_tests._steered(case) if steered else case.model
    path.write_bytes(model.SerializeToString())
    try:
        graph = load_onnx(path, mode="eval")
    except ArchlintError:
        return "no reference"
    if unknown_nodes(graph):
        return "outside"
    if any(part in case.name for part in OTHERWISE):
        return "no reference"
    given = {info.name: v for info, v in zip(case.model.graph.input, inputs, strict=False)}
    try:
        found = run_graph(graph, {id: given[id] for id in graph.inputs})
    except Exception as problem:  # every failure is wanted, not the first one
        return f"{type(problem).__name__}: {problem}"
    worst = max((error(a, b) for a, b in zip(found, outputs, strict=False)), default=0.0)
    return "equal" if worst <= _tolerance(case) else f"differs by {worst:.1e}"


@pytest.mark.parametrize("steered", [False, True], ids=["as-is", "steered"])
@pytest.mark.parametrize("chunk", range(4))
def test_node_tests_give_what_they_expect(chunk: int, steered: bool, tmp_path: Path) -> None:
    every = node_tests._cases() if steered else [*node_tests._cases(), *node_tests._stored()]
    outcomes = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in every[chunk::4]:
            outcomes[case.name] = _outcome(case, steered, tmp_path / "model.onnx")
    counted = Counter(outcomes.values())
    print(counted["equal"], "equal,", counted["outside"], "outside,", counted["no reference"],
          "without reference")  # fmt: skip
    assert counted["equal"] > 250
    wrong = {k: v for k, v in outcomes.items() if v not in ("equal", "outside", "no reference")}
    assert not wrong


# --------------------------------------------------------------------------- recorded models


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: models.timm_model(name, pretrained=False)


_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
          "intermediate_size": 128, "vocab_size": 100}  # fmt: skip
FAST: dict[str, Callable[[], nn.Module]] = {
    "mobilenetv2_050": _timm("mobilenetv2_050"),
    "convnext_atto": _timm("convnext_atto"),
    "levit_128s": _timm("levit_128s"),
    "mobilevit_xxs": _timm("mobilevit_xxs"),
    "ghostnet_050": _timm("ghostnet_050"),
    "gpt2": lambda: models.hf("GPT2", "LMHeadModel", n_embd=64, n_layer=2, n_head=4,
                              vocab_size=100),
    "llama": lambda: models.hf("Llama", "ForCausalLM", num_key_value_heads=2, **_SMALL),
    "bert": lambda: models.hf("Bert", "Model", **_SMALL),
    "t5": lambda: models.hf("T5", "Model", d_model=64, d_kv=16, d_ff=128, num_layers=2,
                            num_heads=4, vocab_size=100),
    "deberta": lambda: models.hf("DebertaV2", "Model", **_SMALL),
    "mamba": lambda: models.hf("Mamba", "Model", hidden_size=32, num_hidden_layers=2,
                               vocab_size=100),
    "bloom": lambda: models.hf("Bloom", "Model", hidden_size=64, n_layer=2, n_head=4,
                               vocab_size=100),
    "lstm": models.Recurrent, "siren": models.Siren, "nerf": models.Nerf, "unet": models.unet,
    "dcgan": models.dcgan, "lora": models.Lora,
    "written tables": lambda: Tables(),
}  # fmt: skip
SLOW = (
    "resnet18 densenet121 swin_tiny_patch4_window7_224 mixer_s32_224 maxvit_rmlp_pico_rw_256 "
    "coatnet_pico_rw_224 cait_xxs24_224 xcit_nano_12_p16_224 beit_base_patch16_224 "
    "eva02_tiny_patch14_224 nf_regnet_b0 skresnet18 hrnet_w18_small inception_v3 poolformer_s12 "
    "pvt_v2_b0 twins_pcpvt_small davit_tiny gcvit_xxtiny focalnet_tiny_srf halonet26t "
    "botnet26t_256 lambda_resnet26t repvgg_a0 volo_d1_224 visformer_tiny crossvit_tiny_240 "
    "efficientformer_l1 fastvit_t8 hiera_tiny_224 nextvit_small convit_tiny dla34 dpn48b "
    "tnt_s_patch16_224 resnest14d tresnet_m inception_next_tiny"
)
EVERY = [pytest.param(build, id=name) for name, build in FAST.items()]
EVERY += [pytest.param(_timm(name), id=name, marks=pytest.mark.slow) for name in SLOW.split()]


@pytest.mark.parametrize("build", EVERY)
def test_recorded_models(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model, twin = build().eval(), build().eval()
    twin.load_state_dict(model.state_dict())
    graph = load_torch(model, None, "eval")
    assert not unknown_nodes(graph)
    _, example = from_torch.record(model, None, "eval")
    torch.manual_seed(1)
    args, kwargs = example.drawn()
    leaves = [t for _, t in tensors_in([args, kwargs])]
    with torch.no_grad():
        expected = [t for _, t in tensors_in(twin(*args, **kwargs))]
        program = Program(graph, torch.float32)
        found = program.run(load_parameters(program.parameters, torch.float32), leaves)
    assert len(expected) == len(graph.outputs)
    for id, theirs in zip(graph.outputs, expected, strict=True):
        assert error(found[id].numpy(), theirs.numpy()) < TOLERANCE


# --------------------------------------------------------------------------- many at once


MANY: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: models.mlp(4, 16, models.he),
    "batchnorm": lambda: models.mlp(3, 16, norm=nn.BatchNorm1d),
    "residual": lambda: models.Residual(3, 16, 0.5, "relu"),
    "lstm": models.Recurrent,
    "gpt2": FAST["gpt2"],
    "llama": FAST["llama"],
}


@pytest.mark.parametrize("name", MANY)
def test_many_networks_at_once_are_those_one_by_one(name: str) -> None:
    torch.manual_seed(0)
    model = MANY[name]()
    graph = load_torch(model, None, "eval")
    program = Program(graph, torch.float64)
    one = load_parameters(program.parameters)
    stacked = {k: 0.2 * torch.rand(3, *p.shape, dtype=p.dtype) - 0.1 for k, p in one.items()}
    stacked = {k: p.abs() if "running" in k else p for k, p in stacked.items()}
    _, example = from_torch.record(model, None, "eval")
    args, kwargs = example.drawn()
    leaves = [t.double() if t.is_floating_point() else t for _, t in tensors_in([args, kwargs])]
    first = graph.outputs[0]

    def output(parameters: dict[str, Tensor]) -> Tensor:
        return program.run(parameters, leaves)[first]

    for parameter in stacked.values():
        parameter.requires_grad_()
    together = torch.func.vmap(output)(stacked)
    apart = torch.stack([output({k: p[i] for k, p in stacked.items()}) for i in range(3)])
    torch.testing.assert_close(together, apart)
    gradients = [
        torch.autograd.grad(y.square().sum(), list(stacked.values()), allow_unused=True)
        for y in (together, apart)
    ]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)
