"""What goes wrong in an experiment is a clear line, and what is decided stays decided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from archlint.errors import ArchlintError
from archlint.finding import Claim, Finding, Severity
from archlint.graph.from_torch import load_torch
from archlint.probe import ensemble as ensembles
from archlint.probe.experiment import device_of, run
from archlint.probe.options import ProbeOptions, options_of, parse_size
from archlint.signal.analysis import Analysis, analyse
from tests.rules import models


def claim(analysis: Analysis, statistic: Any = "length", limit: float = 2.0) -> Finding:
    """A finding about all from the input to the output."""
    graph = analysis.graph
    made = Claim(statistic, graph.outputs[0], graph.inputs[0], 4.0, limit)
    return Finding("ARC000", "planted", Severity.ERROR, "planted.", "", claim=made)


def analysed(module: nn.Module, *shape: int) -> Analysis:
    return analyse(load_torch(module, {"": (shape, None)} if shape else None))


@pytest.fixture
def plain() -> Analysis:
    return analysed(models.mlp(3, 64), 2, 64)


@pytest.mark.parametrize(
    ("array", "text"),
    [(np.zeros((9, 63)), "its samples are 63, the input"),
     (np.full((9, 64), np.nan), "576 elements that are NaN or infinite"),
     (np.zeros((0, 64)), "holds no rows"),
     (np.array([["a"] * 64]), "not numbers")],
    ids=["shape", "nan", "empty", "text"],
)  # fmt: skip
def test_data_that_does_not_fit(plain: Analysis, tmp_path: Path, array: Any, text: str) -> None:
    path = tmp_path / "data.npy"
    np.save(path, array)
    with pytest.raises(ArchlintError, match=text):
        run(plain, [claim(plain)], ProbeOptions(data=str(path)))


@pytest.mark.parametrize(
    ("source", "text"),
    [("missing.npy", "does not exist"), ("nothing", "neither a .npy file nor a loader"),
     ("no.such.module:loader", "cannot be read")],
)  # fmt: skip
def test_data_that_is_not_there(plain: Analysis, source: str, text: str) -> None:
    with pytest.raises(ArchlintError, match=text):
        run(plain, [claim(plain)], ProbeOptions(data=source))


def test_broken_data(plain: Analysis, tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    path.write_bytes(b"\x93NUMPY")
    with pytest.raises(ArchlintError, match="no array of numbers"):
        run(plain, [claim(plain)], ProbeOptions(data=str(path)))


def test_real_data_is_used(plain: Analysis, tmp_path: Path) -> None:
    path = tmp_path / "data.npy"
    np.save(path, np.full((40, 64), 1e-3))
    zero = claim(plain)
    outcome = run(plain, [zero], ProbeOptions(data=str(path), draws=64))
    normal = run(plain, [zero], ProbeOptions(draws=64))
    a, b = (o.findings[0].measurement for o in (outcome, normal))
    assert a is not None
    assert b is not None
    assert a.figure is not None
    assert b.figure is not None
    assert a.figure > b.figure + 1  # biases are much of what little comes in


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(ArchlintError, match="no CUDA device"):
        device_of("cuda:1")
    with pytest.raises(ArchlintError, match="no device"):
        device_of("abacus")


@pytest.mark.parametrize(("text", "size"), [("2GB", 2e9), ("512MiB", 2**29), ("3e7", 3e7)])
def test_sizes(text: str, size: float) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["much", "2XB", "1kB", "-1GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ArchlintError, match="--memory"):
        options_of({"memory": text})


class Overflowing(nn.Module):
    """Infinite in some draws."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        nn.init.normal_(self.layer.weight, std=400.0)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(self.layer(x))


def test_values_that_are_not_finite_are_counted() -> None:
    analysis = analysed(Overflowing(), 1, 8)
    found = run(analysis, [claim(analysis)], ProbeOptions(draws=64)).findings[0]
    assert found.measurement is not None
    assert found.measurement.lost > 0
    assert found.measurement.lost + found.measurement.draws <= 64


class Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).argmax(-1)


def test_integer_outputs() -> None:
    analysis = analysed(Integers(), 2, 8)
    made = Claim("gradient", analysis.graph.nodes[0].output, analysis.graph.inputs[0], 4.0, 2.0)
    finding = Finding("ARC000", "planted", Severity.ERROR, "planted.", "", claim=made)
    found = run(analysis, [finding], ProbeOptions(draws=16)).findings[0]
    assert found.verdict == "inconclusive"
    assert found.measurement is not None
    assert "integers" in found.measurement.remark


def test_random_numbers_of_forward_are_told() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + torch.randn(2, 8)

    analysis = analysed(Noisy(), 2, 8)
    outcome = run(analysis, [claim(analysis)], ProbeOptions(draws=64))
    assert any("draws random numbers itself" in remark for remark in outcome.remarks)
    assert outcome.findings[0].verdict == "refuted"


def test_out_of_memory_halves_the_chunk(plain: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    take = ensembles.Ensemble._take
    seen = []

    def limited(self: ensembles.Ensemble, first: int, count: int) -> None:
        seen.append(count)
        if count > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        take(self, first, count)

    monkeypatch.setattr(ensembles.Ensemble, "_take", limited)
    found = run(plain, [claim(plain)], ProbeOptions(draws=64)).findings[0]
    assert found.verdict == "refuted"
    assert seen[:4] == [32, 16, 8, 4]


def test_out_of_memory_with_a_single_draw(plain: Analysis, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ensembles.Ensemble, first: int, count: int) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(ensembles.Ensemble, "_take", full)
    outcome = run(plain, [claim(plain)], ProbeOptions(draws=64))
    assert outcome.findings[0].verdict == "inconclusive"
    assert "a single draw does not fit into the memory" in outcome.remarks


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), RuntimeError("CUDA error: device lost")])
def test_what_is_decided_stays_decided(
    plain: Analysis, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    take = ensembles.Ensemble._take

    def breaks(self: ensembles.Ensemble, first: int, count: int) -> None:
        if first >= 32:
            raise problem
        take(self, first, count)

    monkeypatch.setattr(ensembles.Ensemble, "_take", breaks)
    clear = claim(plain)
    measured = run(plain, [clear], ProbeOptions(draws=32)).findings[0].measurement
    assert measured is not None
    assert measured.figure is not None
    close = claim(plain, limit=measured.figure + 0.05) if measured.figure > 0 else Finding(
        "ARC000", "planted", Severity.ERROR, "planted.", "",
        claim=Claim("length", plain.graph.outputs[0], plain.graph.inputs[0], -4.0,
                    -measured.figure + 0.05))  # fmt: skip
    outcome = run(plain, [clear, close], ProbeOptions(draws=512))
    assert [f.verdict for f in outcome.findings] == ["refuted", "inconclusive"]
    assert outcome.findings[1].measurement is not None
    assert outcome.findings[1].measurement.needed is not None
    assert outcome.interrupted == isinstance(problem, KeyboardInterrupt)


def test_nodes_that_are_not_understood(plain: Analysis) -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.special.bessel_j0(self.layer(x))

    analysis = analysed(Strange(), 2, 8)
    outcome = run(analysis, [claim(analysis)])
    assert outcome.findings[0].verdict == "inconclusive"
    assert "cannot be executed" in outcome.remarks[0]
