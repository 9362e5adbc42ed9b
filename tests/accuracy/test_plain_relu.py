"""Predicted lengths of plain ReLU networks, read from an exported file, against Monte Carlo."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from archlint.graph.from_onnx import load_onnx
from archlint.signal.propagate import propagate
from tests.exported import CASES, INITIALIZERS, MLP, ConvNet, export, initialise

DRAWS = 200
HE = INITIALIZERS["he_normal"]
BUILDERS: dict[str, Callable[[], nn.Module]] = {
    **{f"mlp_{name}": lambda f=f: initialise(MLP(), f) for name, f in INITIALIZERS.items()},
    "convnet": lambda: initialise(ConvNet(), HE),
    "convnet_valid": lambda: initialise(ConvNet(depth=4, padding=0), HE),
}


def measured(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> dict[str, list[float]]:
    """Mean square of every weight layer's output, a number a draw, on a fresh N(0,1) input."""
    found: dict[str, list[float]] = defaultdict(list)

    def watch(path: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, out: found[path].append(float(out.square().mean()))

    torch.manual_seed(1)
    for _ in range(DRAWS):
        network = build()
        for path, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(watch(path))
        with torch.no_grad():
            network(torch.randn(shape))
    return found


@pytest.mark.parametrize("name", BUILDERS)
def test_every_layer(name: str) -> None:
    """Within four standard errors of E M over 200 draws of the same law, or 3 % of the rms."""
    graph = load_onnx(export(name, "legacy"))
    assert graph.weights == "initial", graph.weights_evidence
    signals = propagate(graph)
    (value,) = graph.inputs
    shape = graph.shape(value)
    assert shape is not None
    assert shape == tuple(CASES[name].inputs()[0].shape)
    runs = measured(BUILDERS[name], tuple(n for n in shape if n is not None))
    predicted = {n.module: signals[n.output].rms for n in graph.nodes if n.module in runs
                 and n.op in ("linear", "conv")}  # fmt: skip
    assert set(predicted) == set(runs)
    for path, draws in runs.items():
        rms = predicted[path]
        assert rms is not None, path
        mean, error = float(np.mean(draws)), float(np.std(draws, ddof=1)) / DRAWS**0.5
        near = abs(rms**2 - mean) <= 4 * error or abs(rms / mean**0.5 - 1) <= 0.03
        assert near, f"{path}: predicted {rms:.4g}, measured {mean**0.5:.4g} ± {error / mean:.1%}"
