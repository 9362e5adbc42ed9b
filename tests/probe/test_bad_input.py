"""What goes wrong in an experiment is a clear line, and what is decided stays decided."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from archlint.config import Config
from archlint.errors import ArchlintError
from archlint.finding import Claim, Finding, Severity
from archlint.graph.from_torch import load_torch
from archlint.linter import chosen_rules, lint
from archlint.probe import ensemble as ensembles
from archlint.probe.experiment import device_of, run
from archlint.probe.feed import read_data
from archlint.probe.options import ProbeOptions, options_of, parse_size
from archlint.probe.rebuild import CannotRebuild
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
     ("no.such.module:loader", "reading no.such.module:loader raised ModuleNotFoundError")],
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


@pytest.mark.parametrize("text", ["much", "2XB", "1kB", "-1GB", "1e400"])
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


@pytest.mark.parametrize(
    "problem",
    [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
     RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")],
    ids=["torch", "python", "cublas"],
)  # fmt: skip
def test_out_of_memory_halves_the_chunk(
    plain: Analysis, monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    take = ensembles.Ensemble._take
    seen = []

    def limited(self: ensembles.Ensemble, first: int, count: int) -> None:
        seen.append(count)
        if count > 4:
            raise problem
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


def test_a_container_has_less_memory_than_the_machine(tmp_path: Path) -> None:
    free = ensembles._free_of_the_container
    assert free(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("max\n")
    assert free(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("2000000000\n")
    (tmp_path / "memory.current").write_text("800000000\n")
    (tmp_path / "memory.stat").write_text("anon 500000000\ninactive_file 300000000\n")
    assert free(tmp_path) == 1.5e9


def test_a_draw_that_is_larger_than_the_memory() -> None:
    """It is not begun: the system would end the process."""
    build = lambda: nn.Sequential(nn.Embedding(10**9, 64), nn.Linear(64, 64))  # noqa: E731
    analysis = analyse(load_torch(build, {"": ((2, 8), "int64")}))
    made = Claim("length", analysis.graph.outputs[0], None, 4.0, 2.0)
    finding = Finding("ARC000", "planted", Severity.ERROR, "planted.", "", claim=made)
    outcome = run(analysis, [finding], ProbeOptions(memory=1e9, train=True))
    assert outcome.findings[0].verdict == "inconclusive"
    text = "a single draw does not fit into the memory"
    assert f"{text}: it takes 256000 MB at least" in outcome.remarks
    assert f"not trained: {text}" in outcome.remarks


@pytest.mark.parametrize(
    "problem",
    [KeyboardInterrupt(), RuntimeError("CUDA error: device lost"), IndexError("of torch's own"),
     CannotRebuild("ValueError: no")],
)  # fmt: skip
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


class Strange(nn.Module):
    """A function between two layers that archlint does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.special.bessel_j0(self.first(x)))


def test_nodes_that_are_not_understood() -> None:
    analysis = analysed(Strange(), 2, 8)
    outcome = run(analysis, [claim(analysis)])
    assert outcome.findings[0].verdict == "inconclusive"
    assert "cannot be executed" in outcome.remarks[0]


@pytest.mark.parametrize("statistic", ["length", "gradient"])
def test_what_comes_before_them_is_measured(statistic: Any) -> None:
    analysis = analysed(Strange(), 2, 8)
    graph = analysis.graph
    made = Claim(statistic, graph.nodes[0].output, graph.inputs[0], 4.0, 2.0)
    finding = Finding("ARC000", "planted", Severity.ERROR, "planted.", "", claim=made)
    outcome = run(analysis, [finding, claim(analysis)], ProbeOptions(draws=64))
    assert [f.verdict for f in outcome.findings] == ["refuted", "inconclusive"]
    measured = outcome.findings[0].measurement
    assert measured is not None
    assert measured.figure is not None
    # Weights of variance 1/(3·fan-in): forwards the biases add as much again.
    expected = {"length": 1 / 3 + 1 / 24, "gradient": 1 / 3}[statistic]
    assert measured.figure == pytest.approx(np.log10(expected), abs=0.2)


def test_outputs_whose_size_depends_on_the_data() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y[y > 0]

    analysis = analysed(Chosen(), 2, 8)
    graph = analysis.graph
    made = [Claim(s, graph.nodes[0].output, graph.inputs[0], 4.0, 2.0)
            for s in ("length", "gradient")]  # fmt: skip
    findings = [Finding("ARC000", "planted", Severity.ERROR, "planted.", "", claim=c)
                for c in made]  # fmt: skip
    outcome = run(analysis, findings, ProbeOptions(draws=64))
    assert [f.verdict for f in outcome.findings] == ["refuted", "refuted"]
    assert any("depend on the data" in remark for remark in outcome.remarks)


class Routed(nn.Module):
    """Each sample goes through one of two stacks."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 2)
        self.experts = nn.ModuleList([models.mlp(8, 16)[:-1] for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (chosen == k).nonzero()[:, 0]
            out = out.index_add(0, rows, expert(x[rows]) * weight[rows, None])
        return out


def test_experts_that_see_what_the_data_send_them() -> None:
    analysis = analysed(Routed(), 16, 16)
    findings, _ = lint(analysis, chosen_rules(Config()))
    found = [f for f in findings if f.code == "ARC101"]
    assert len(found) == 2
    outcome = run(analysis, found, ProbeOptions(draws=64))
    assert [f.verdict for f in outcome.findings] == ["confirmed", "confirmed"]
    for finding in outcome.findings:
        measured, made = finding.measurement, finding.claim
        assert measured is not None
        assert made is not None
        assert measured.figure == pytest.approx(made.predicted, abs=0.5)


@pytest.mark.parametrize(
    ("body", "text"),
    [("return [torch.zeros(8, 64), torch.zeros(8, 63)]", "samples of several shapes: 63, 64"),
     ("raise RuntimeError('boom')", "raised RuntimeError: boom"),
     ("return ['abc']", "no array of samples"),
     ("return [[]]", "no array of samples"),
     ("raise SystemExit(3)", "ended the program"),
     ("return []", "gives no batch")],
)  # fmt: skip
def test_loaders_that_fail(
    plain: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, text: str
) -> None:
    (tmp_path / "rows_of_mine.py").write_text(f"import torch\ndef loader():\n    {body}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "rows_of_mine", raising=False)
    with pytest.raises(ArchlintError, match=text):
        run(plain, [claim(plain)], ProbeOptions(data="rows_of_mine:loader"))


def test_of_many_rows_some_are_taken(tmp_path: Path, plain: Analysis) -> None:
    rows = np.arange(50_000, dtype=np.float32)[:, None].repeat(64, 1)
    np.savez(tmp_path / "many.npz", rows, np.arange(50_000))
    data = read_data(str(tmp_path / "many.npz"), plain.graph)
    found = data.rows[plain.graph.inputs[0]]
    assert found.shape == (4096, 64)
    assert data.labels is not None
    assert torch.equal(found[:, 0].long(), data.labels)
    assert int(data.labels[0]) == 0
    assert int(data.labels[-1]) == 49_999


def test_data_far_from_one_are_computed_in_double_precision(
    plain: Analysis, tmp_path: Path
) -> None:
    path = tmp_path / "data.npy"
    np.save(path, np.full((40, 64), 1e30))
    found = run(plain, [claim(plain)], ProbeOptions(data=str(path), draws=64)).findings[0]
    assert found.measurement is not None
    assert found.measurement.lost == 0


@pytest.mark.parametrize("seed", [-5, 2**80])
def test_any_integer_is_a_seed(plain: Analysis, seed: int) -> None:
    found = run(plain, [claim(plain)], ProbeOptions(seed=seed, draws=64)).findings[0]
    assert found.verdict == "refuted"


def test_figures_do_not_hang_on_the_memory(plain: Analysis) -> None:
    findings = [claim(plain, s) for s in ("length", "gradient")]
    one, other = (
        [f.measurement for f in run(plain, findings, ProbeOptions(draws=64, memory=m)).findings]
        for m in (1e6, 1e9)
    )
    for a, b in zip(one, other, strict=True):
        assert a is not None
        assert b is not None
        assert a.figure == pytest.approx(b.figure, rel=1e-5)
