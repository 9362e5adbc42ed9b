"""Public models are recorded, modelled and mean the same: a sample; all of them in a slow study.

``expected.json`` holds the sample, the stage of size at which a type of transformers is built, and
what is known to fail, with the reason.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

from archlint.graph.from_torch import load_torch, record
from archlint.graph.model import LayerGraph, verify
from archlint.graph.torch_recorder.recorder import tensors_in
from archlint.probe.execute import Program, load_parameters
from archlint.user_code import limited
from tests.models import zoo

EXPECTED: dict[str, Any] = json.loads((Path(__file__).parent / "expected.json").read_text())
SAMPLE: list[str] = EXPECTED["sample"]
OPTIONAL = {"x-transformers": "x_transformers", "vit-pytorch": "vit_pytorch",
            "segmentation-models-pytorch": "segmentation_models_pytorch"}  # fmt: skip


def _entry(id: str) -> zoo.Entry:
    library, _, name = id.partition(":")
    pytest.importorskip(OPTIONAL.get(library, library))
    return zoo.entry(id, EXPECTED["transformers_stages"].get(name, 0))


def _modelled(graph: LayerGraph) -> float:
    """Share of the nodes that are in the vocabulary."""
    nodes = list(graph.walk())
    return 1 - sum(not n.known for n in nodes) / max(len(nodes) + graph.folded, 1)


@pytest.mark.parametrize("id", SAMPLE)
def test_sample_is_recorded(id: str) -> None:
    entry = _entry(id)
    graph = verify(load_torch(entry.build, entry.inputs))
    assert _modelled(graph) >= 0.9
    assert graph.outputs


def _in_double(entry: zoo.Entry, mode: Any) -> nn.Module:
    """A drawn model without a parameter of zeros: a head of them would hide a difference."""
    torch.manual_seed(0)
    model: nn.Module = entry.build().double().train(mode == "train")
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.05)
    return model


def _executes_equally(entry: zoo.Entry, mode: Any) -> None:
    """The recorded graph gives what the model gives, in double precision, from the same seed."""
    model = _in_double(entry, mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recording, example = record(model, entry.inputs, mode)
    args, kwargs = example.drawn()
    with torch.no_grad():
        torch.manual_seed(1)
        wanted = [t for _, t in tensors_in(model(*args, **kwargs))]
        model.load_state_dict(before)
        torch.manual_seed(1)
        given = [t for _, t in tensors_in(example.drawn())]
        found = fx.Interpreter(recording.module()).run(*given)
    assert len(found) == len(wanted)
    for expected, actual in zip(wanted, found, strict=True):
        if not expected.is_floating_point():
            assert torch.equal(expected, actual)
            continue
        size = expected.abs().max()
        assert (expected - actual).abs().max() <= 1e-6 * size


def _layer_graph_executes_equally(entry: zoo.Entry, mode: Any) -> None:
    """The layer graph gives what the model gives, in double precision, from the same seed."""
    model = _in_double(entry, mode)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    graph = load_torch(model, entry.inputs, mode)
    _, example = record(model, entry.inputs, mode)
    args, kwargs = example.drawn()
    with torch.no_grad():
        torch.manual_seed(1)
        wanted = [t for _, t in tensors_in(model(*args, **kwargs))]
        model.load_state_dict(before)
        program = Program(graph, torch.float64)
        torch.manual_seed(1)
        given = [t for _, t in tensors_in(example.drawn())]
        found = program.run(load_parameters(program.parameters), given)
    assert len(graph.outputs) == len(wanted)
    for id, expected in zip(graph.outputs, wanted, strict=True):
        if expected.is_floating_point():
            assert (found[id] - expected).abs().max() <= 1e-6 * expected.abs().max()
        else:
            assert torch.equal(found[id].to(expected.dtype), expected)


FAST = ("timm:test_maxvit", "transformers:vit", "x-transformers:decoder", "vit-pytorch:cct")


@pytest.mark.parametrize(
    "id", [pytest.param(id, marks=[] if id in FAST else pytest.mark.slow) for id in SAMPLE]
)
def test_layer_graph_of_sample_executes_equally(id: str) -> None:
    _layer_graph_executes_equally(_entry(id), "eval")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("id", SAMPLE)
def test_sample_executes_equally(id: str, mode: str) -> None:
    _executes_equally(_entry(id), mode)


def _study(library: str) -> Iterator[tuple[str, LayerGraph | Exception]]:
    for entry in zoo.LIBRARIES[library]():
        stage = EXPECTED["transformers_stages"].get(entry.name, 0)
        if stage:
            entry = zoo.entry(entry.id, stage)
        try:
            yield entry.id, verify(load_torch(entry.build, entry.inputs))
        except Exception as problem:
            yield entry.id, problem
        gc.collect()


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize(
    ("library", "least"),
    [
        ("timm", 0.998),
        ("torchvision", 118 / 121),
        ("x-transformers", 1.0),
        ("vit-pytorch", 27 / 28),
        ("segmentation-models-pytorch", 1.0),
    ],
)
def test_all_models_are_recorded(library: str, least: float) -> None:
    pytest.importorskip(OPTIONAL.get(library, library))
    failed: dict[str, str] = {}
    shares: dict[str, float] = {}
    nodes = unknown = 0.0
    for id, found in _study(library):
        if isinstance(found, Exception):
            failed[id] = str(found)
            continue
        shares[id] = _modelled(found)
        count = len(list(found.walk())) + found.folded
        nodes += count
        unknown += count * (1 - shares[id])
    assert len(shares) >= least * (len(shares) + len(failed)), failed
    assert failed.keys() <= EXPECTED["failures"].keys(), failed
    assert unknown <= 0.01 * nodes
    assert min(shares.values()) >= 0.9, min(shares.items(), key=lambda item: item[1])


_PARTS = 48


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(_PARTS))
def test_types_of_transformers_are_recorded(part: int) -> None:
    """Every type that builds without a network, at the first stage of size that is recorded."""
    pytest.importorskip("transformers")
    failed = {}
    for kind in sorted(zoo.kinds_of_transformers())[part::_PARTS]:
        row = _recorded_type(kind)
        print(json.dumps(row))
        if row["stage"] is None and row["built"]:
            failed[f"transformers:{kind}"] = row["errors"][-1]
    assert failed.keys() <= EXPECTED["failures"].keys(), failed


def _recorded_type(kind: str) -> dict[str, Any]:
    """At which stage of size a type is recorded, if at any; whether it could be built."""
    row: dict[str, Any] = {"kind": kind, "stage": None, "built": False, "errors": []}
    started = time.process_time()
    for stage in range(len(zoo.STAGES)):
        entry = zoo.entry(f"transformers:{kind}", stage)

        def built(build: zoo.Build = entry.build) -> nn.Module:
            model = build()
            row["built"] = True
            return model

        try:
            with limited(600, kind):
                graph = verify(load_torch(built, entry.inputs))
        except Exception as problem:
            row["errors"].append(f"{type(problem).__name__}: {problem}"[:300])
            gc.collect()
            continue
        row.update(stage=stage, nodes=len(list(graph.walk())), modelled=_modelled(graph))
        break
    gc.collect()
    row["seconds"] = round(time.process_time() - started, 2)
    return row
