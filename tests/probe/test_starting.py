"""Whether training starts: tasks, runs, trials with what findings suggest."""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy import stats
from torch import Tensor, nn

import archlint
from archlint import wording
from archlint.cli import cli
from archlint.errors import ArchlintError
from archlint.finding import Training
from archlint.graph.from_torch import load_torch
from archlint.linter import TargetReport
from archlint.probe import starting
from archlint.probe.options import ProbeOptions, bar
from archlint.probe.starting import fewer, share
from archlint.probe.task import NoTask, fitted, readout, task_for
from archlint.probe.training import REAL, Runs
from archlint.signal.analysis import Analysis, analyse
from archlint.wording import trained, tried
from tests.rules import models

CPU = torch.device("cpu")


def analysed(build: Any, *shape: int, dtype: str | None = None) -> Analysis:
    return analyse(load_torch(build, {"": (shape, dtype)} if shape else None))


def probed(build: Any, inputs: Any = None, **options: Any) -> TargetReport:
    chosen = ProbeOptions(train=True, **{"draws": 10, "steps": 60, "time": 600.0, **options})
    return archlint.probe(build, inputs, options=chosen).targets[0]


# --------------------------------------------------------------------------- does it start?


def test_a_vanishing_network_fails_and_its_suggestion_starts() -> None:
    report = probed(lambda: models.mlp(12, 64))
    finding = report.findings[0]
    assert finding.code == "ARC101"
    assert finding.verdict == "confirmed"
    trial = finding.trial
    assert trial is not None
    assert trial.found is not None
    assert trial.remedied is not None
    assert (trial.found.started, trial.found.failed) == (0, 10)
    assert trial.remedied.started == 10
    assert trial.remedied.steps is not None
    assert trial.remedied.steps <= 100
    assert tried(finding) == (
        f"10 of 10 draws fail to start; with the suggested initialization 10 of 10 draws start "
        f"after {trial.remedied.steps} steps")  # fmt: skip


def test_a_healthy_network_starts() -> None:
    report = probed(lambda: models.mlp(8, 128, models.he))
    assert not report.findings
    training = report.training
    assert training is not None
    assert training.started == training.draws == 10
    assert training.task == "scikit-learn's digits"
    assert trained(training).startswith("10 of 10 draws start after ")


def test_an_exploding_residual_network_fails_and_a_scale_starts_it() -> None:
    report = probed(lambda: models.Residual(16, 64, 1.0, "linear"), steps=60)
    trial = next(f.trial for f in report.findings if f.code == "ARC301")
    assert trial is not None
    assert trial.found is not None
    assert trial.remedied is not None
    assert trial.found.failed > 5
    assert trial.remedied.started == 10


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            models.he(nn.Conv2d(1, 8, 3, padding=1)), nn.ReLU(),
            models.he(nn.Conv2d(8, 8, 3, stride=2, padding=1)), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


def test_images() -> None:
    training = probed(Images, {"x": (2, 1, 8, 8)}).training
    assert training is not None
    assert training.started == 10


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, 0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 50)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.embedding(ids)))


def test_token_ids() -> None:
    training = probed(Tokens, {"ids": ((64, 8), "int64")}, draws=8).training
    assert training is not None
    assert training.task == "a batch of 64 random inputs to remember"
    assert training.started >= 7


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = models.he(nn.Linear(16, 32)), models.he(nn.Linear(8, 32))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.softmax(self.head(torch.relu(self.a(x) + self.b(y))), -1)


def test_several_inputs_and_a_softmax() -> None:
    training = probed(Pair, {"x": (4, 16), "y": (4, 8)}, draws=8).training
    assert training is not None
    assert "to remember" in training.task
    assert training.started == 8


def test_an_onnx_file(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    torch.onnx.export(models.mlp(12, 64), (torch.randn(2, 64),), path, dynamo=False)
    report = probed(str(path))
    trial = report.findings[0].trial
    assert trial is not None
    assert trial.found is not None
    assert trial.remedied is not None
    assert trial.found.started == 0
    assert trial.remedied.started == 10


@pytest.mark.slow
def test_a_deep_narrow_network_fails_and_a_wider_one_starts() -> None:
    report = probed(lambda: models.mlp(50, 15, models.he), steps=400, time=600.0)
    finding = next(f for f in report.findings if f.code == "ARC201")
    print(tried(finding))
    assert finding.verdict == "confirmed"
    assert finding.trial is not None
    assert finding.trial.found is not None
    assert finding.trial.remedied is not None
    assert finding.trial.found.failed >= 3  # 6 of 10 measured
    assert finding.trial.remedied.started == 10


def test_same_seed_same_steps_whatever_the_memory() -> None:
    build = lambda: models.mlp(6, 64, models.he)  # noqa: E731
    found = [probed(build, memory=memory, seed=3, steps=60).training for memory in (3e6, 2e9)]
    assert found[0] == found[1]
    assert probed(build, seed=4, steps=60).training is not None


# --------------------------------------------------------------------------- the user's data


def clusters(rows: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, rows)
    centres = 2 * random.standard_normal((3, 16))
    return centres[labels] + random.standard_normal((rows, 16)), labels


def net16() -> nn.Module:
    return nn.Sequential(models.he(nn.Linear(16, 32)), nn.ReLU(), nn.Linear(32, 3))


def test_data_with_classes(tmp_path: Path) -> None:
    x, y = clusters(300)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    report = probed(net16, {"": (2, 16)}, data=str(tmp_path / "data.npz"))
    assert report.training is not None
    assert report.training.task == "300 samples of the data"
    assert report.training.started == 10


def test_data_without_classes(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", clusters(40)[0])
    report = probed(net16, {"": (2, 16)}, data=str(tmp_path / "data.npy"))
    assert report.training is not None
    assert report.training.task == "a batch of 40 samples of the data to remember"


def test_few_samples_are_learned_and_looked_at(tmp_path: Path) -> None:
    """Of ten that are held back a guess gets half right now and then."""
    x, y = clusters(50)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    report = probed(net16, {"": (2, 16)}, data=str(tmp_path / "data.npz"))
    assert report.training is not None
    assert report.training.task == "50 samples of the data to remember"
    assert report.training.started == 10


@pytest.mark.parametrize(
    ("rows", "change", "text"),
    [(300, lambda y: np.zeros_like(y), "100% of the labels are the same"),
     (300, lambda y: np.where(np.arange(len(y)) < 3, 1, 0), "of the labels are the same"),
     (10, lambda y: y, "10 samples are too few to learn from")],
)  # fmt: skip
def test_classes_that_nothing_can_be_learned_from(
    tmp_path: Path, rows: int, change: Callable[[np.ndarray], np.ndarray], text: str
) -> None:
    """Else an error is refuted since training starts at once."""
    x, y = clusters(rows)
    np.savez(tmp_path / "data.npz", x=x, y=change(y))
    data = str(tmp_path / "data.npz")
    report = probed(lambda: models.mlp(12, 16), {"": (2, 16)}, data=data, draws=64)
    assert report.training is None
    assert any(text in remark for remark in report.probe_remarks)
    assert [f.verdict for f in report.findings if f.code == "ARC101"] == ["confirmed"]


def test_what_is_no_class_is_told(tmp_path: Path) -> None:
    x, y = clusters(300)
    np.savez(tmp_path / "data.npz", x=x, y=y + 0.5)
    report = probed(net16, {"": (2, 16)}, data=str(tmp_path / "data.npz"), steps=20)
    assert "300 of float64, is not a class for each" in report.probe_remarks[0]
    np.savez(tmp_path / "data.npz", x=x, y=y[1:])
    report = probed(net16, {"": (2, 16)}, data=str(tmp_path / "data.npz"))
    assert report.error is not None
    assert "holds 300 samples and 299 classes" in str(report.error)


def test_classes_that_the_output_has_not(tmp_path: Path) -> None:
    x, y = clusters(300)
    np.savez(tmp_path / "data.npz", x=x, y=y + 5)
    report = probed(net16, {"": (2, 16)}, data=str(tmp_path / "data.npz"))
    assert report.training is None
    assert (
        "the labels of the data go from 5 to 7, the output has 3 classes"
        in (report.probe_remarks[0])
    )


def test_too_few_samples(tmp_path: Path) -> None:
    np.save(tmp_path / "data.npy", clusters(3)[0])
    report = probed(net16, {"": (8, 16)}, data=str(tmp_path / "data.npy"))
    assert "3 samples are too few" in report.probe_remarks[0]


@pytest.mark.parametrize("shape", [(2,), (64,), (100,), (8, 8), (3, 16, 16), (5, 1, 4, 12)])
def test_digits_of_any_shape(shape: tuple[int, ...]) -> None:
    images = torch.randn(50, 8, 8)
    made = fitted(images, shape)
    assert made.shape == (50, *shape)
    assert float(made.std()) == pytest.approx(1.0, rel=1e-4)
    if shape == (8, 8):
        torch.testing.assert_close(made, (images - images.mean()) / images.std())


# --------------------------------------------------------------------------- what goes wrong


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    load = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
        return load(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    report = probed(lambda: models.mlp(3, 64, models.he), steps=40)
    assert report.training is not None
    assert "to remember" in report.training.task
    assert any("scikit-learn is not installed" in remark for remark in report.probe_remarks)


def make(forward: Callable[[Tensor], Tensor]) -> type[nn.Module]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return forward(self.layer(x))

    return Net


@pytest.mark.parametrize(
    ("build", "text"),
    [(make(lambda h: h.argmax(-1)), "the outputs are integers"),
     (make(lambda h: h.square().mean()), "the output is a single number"),
     (make(lambda h: (h > 0).float()), "no gradient reaches a parameter"),
     (lambda: nn.Sequential(nn.ReLU()), "no parameters to train"),
     (make(torch.special.bessel_j0), "it cannot be executed")],
    ids=["integers", "scalar", "no gradient", "no parameters", "unknown"],
)  # fmt: skip
def test_what_cannot_be_trained(build: Any, text: str) -> None:
    report = probed(build, {"": (2, 8)}, steps=20)
    assert report.training is None or report.training.started == 0
    assert any(text in remark for remark in report.probe_remarks), report.probe_remarks
    assert report.error is None


def test_draws_that_diverge_have_failed() -> None:
    def large(layer: Any) -> Any:
        nn.init.normal_(layer.weight)
        return layer

    analysis = analysed(lambda: models.mlp(6, 64, large), 2, 64)
    where = readout(analysis)
    task, _ = task_for(analysis, where, 0, REAL, CPU)
    runs = Runs(analysis.graph, where, task, 4, rates=(1.0,), steps=300)
    seen: list[int] = []
    runs.run(lambda step, draws: seen.append(step) is None)
    assert runs.failed == {0, 1, 2, 3}
    assert seen[-1] < 300  # nothing is left to train


def test_time_is_kept() -> None:
    report = probed(lambda: models.mlp(12, 64), time=2.0, steps=100_000)
    training = report.training
    assert training is not None
    assert training.undecided > 0
    assert "still under way at the end" in trained(training)
    assert report.findings[0].verdict == "confirmed"  # by its figure


def test_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Runs._step
    seen: list[int] = []

    def limited(self: Runs, batch: Any, weights: Any, *rest: Any) -> None:
        count = len(next(iter(weights.values())))
        seen.append(count)
        if count > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(self, batch, weights, *rest)

    monkeypatch.setattr(Runs, "_step", limited)
    report = probed(lambda: models.mlp(3, 64, models.he), steps=60)
    assert report.training is not None
    assert report.training.started == 10
    assert seen[:3] == [10, 5, 2]

    def full(self: Runs, *rest: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Runs, "_step", full)
    report = probed(lambda: models.mlp(3, 64, models.he), steps=60)
    assert "not trained: a single draw does not fit into the memory" in report.probe_remarks


@pytest.mark.parametrize("problem", [KeyboardInterrupt(), RuntimeError("CUDA error: device lost")])
def test_what_is_decided_stays_decided(
    monkeypatch: pytest.MonkeyPatch, problem: BaseException
) -> None:
    train = Runs._train

    def breaks(self: Runs, *args: Any) -> None:
        if self.graph.parameters["0.bias"].law is not None and any(
            p.law is not None and p.law.family == "zeros" for p in self.graph.parameters.values()
        ):
            raise problem  # in the remedied network
        train(self, *args)

    monkeypatch.setattr(Runs, "_train", breaks)
    chosen = ProbeOptions(train=True, draws=10, steps=30)
    report = archlint.probe(lambda: models.mlp(12, 64), options=chosen)
    target = report.targets[0]
    assert target.training is not None
    assert target.training.failed == 10
    assert target.findings[0].verdict == "confirmed"
    interrupted = isinstance(problem, KeyboardInterrupt)
    assert target.interrupted == interrupted
    assert report.exit_code() == (130 if interrupted else 1)


def test_one_by_one_where_vmap_does_not_go(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = torch.func.vmap

    def refuses(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("vmap: it looks like you're calling .item() on a Tensor")

    monkeypatch.setattr(torch.func, "vmap", refuses)
    report = probed(net16, {"": (8, 16)}, draws=8, steps=20)
    assert report.training is not None
    assert any("trained one by one" in remark for remark in report.probe_remarks)
    monkeypatch.setattr(torch.func, "vmap", calls)
    assert probed(net16, {"": (8, 16)}, draws=8, steps=20).training == report.training


# --------------------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.ReLU()) "
        "for _ in range(12)], nn.Linear(64, 10))\n"
    )
    arguments = ["probe", "net.py:net", "--train", "--steps", "40", "--seed", "1", "--time", "600"]
    one, two = (CliRunner().invoke(cli, [*arguments, "--format", "json"]) for _ in range(2))
    assert one.exit_code == 1
    assert one.stdout == two.stdout
    found = json.loads(one.stdout)["targets"][0]
    assert found["training"]["failed"] == 10
    assert found["findings"][0]["trial"]["remedied"]["draws"] == 10
    text = CliRunner().invoke(cli, arguments).stdout
    assert "10 of 10 draws fail to start" in " ".join(text.split())
    assert "scikit-learn's digits, SGD at 0.05, 0.2 and 0.01, 40 steps each" in (
        " ".join(text.split())
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["check", "net.py:net", "--train"], "--train is for the probe"),
     (["probe", "net.py:net", "--steps", "50"], "--steps is for training")],
)  # fmt: skip
def test_options_that_need_another(arguments: list[str], text: str) -> None:
    found = CliRunner().invoke(cli, arguments)
    assert isinstance(found.exception, ArchlintError)
    assert text in found.exception.message


def test_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    clock = iter([0.0, 2.0, 4.0, 6.0, 7.0])
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr("sys.stderr.write", shown.append)
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    show = bar()
    assert show is not None
    show(64, 2048, "draws", "1 of 1 findings open")
    show(128, 2048, "draws", "1 of 1 findings open")
    show(10, 300, "steps", "10 of 10 draws train")
    show(20, 300, "steps", "9 of 10 draws train")
    assert "64/2048 draws, 32/s, at most 62 s more, 1 of 1 findings open" in shown[0]
    assert "128/2048 draws, 32/s, at most 60 s more" in shown[1]
    assert "10/300 steps, 5/s, at most 58 s more, 10 of 10 draws train" in shown[2]
    assert "20/300 steps, 7/s, at most 42 s more, 9 of 10 draws train" in shown[3]


# --------------------------------------------------------------------------- verdicts


def test_exact_tests() -> None:
    for a, n, b, m in [(3, 10, 10, 10), (0, 10, 4, 10), (5, 8, 6, 9), (10, 10, 2, 10)]:
        expected = stats.fisher_exact([[a, n - a], [b, m - b]], alternative="less").pvalue
        assert fewer(a, n, b, m) == pytest.approx(expected, rel=1e-9)
    for hits, count in [(0, 10), (3, 10), (10, 10), (5, 64)]:
        interval = stats.binomtest(hits, count).proportion_ci(0.99, "exact")
        assert share(hits, count) == pytest.approx((interval.low, interval.high), abs=1e-9)


def ran(started: int, steps: int | None, undecided: int = 0) -> Training:
    return Training(10, started, steps, undecided, 300, "digits", "sgd", (0.02,))


@pytest.mark.parametrize(
    ("severity", "claim", "found", "remedied", "verdict"),
    [("ERROR", True, ran(0, None), ran(10, 50), "confirmed"),
     ("ERROR", True, ran(10, 60), ran(10, 50), "refuted"),  # whatever its figure
     ("ERROR", True, ran(10, 150), ran(10, 50), "inconclusive"),  # it starts late
     ("ERROR", True, ran(7, 60), ran(10, 50), "inconclusive"),
     ("ERROR", True, ran(0, None, 10), ran(10, 50), "inconclusive"),  # time was up
     ("WARNING", True, ran(0, None), ran(10, 50), "inconclusive"),  # its figure decides
     ("WARNING", False, ran(0, None), ran(10, 50), "confirmed"),
     ("WARNING", False, ran(9, 50), ran(10, 50), "inconclusive")],
)  # fmt: skip
def test_verdicts_of_trials(
    severity: str, claim: bool, found: Training, remedied: Training, verdict: str
) -> None:
    from archlint.finding import Claim, Finding, Severity, Trial

    finding = Finding(
        "ARC000", "planted", Severity[severity], "planted.", "", verdict="inconclusive",
        claim=Claim("length", "b", "a", 5.0, 4.0) if claim else None,
        trial=Trial(found, remedied),
    )  # fmt: skip
    assert starting.verdict(finding) == verdict


def test_what_training_decides_is_said() -> None:
    from archlint.finding import Claim, Finding, Measurement, Severity, Trial

    finding = Finding(
        "ARC000", "planted", Severity.ERROR, "planted.", "", verdict="refuted",
        claim=Claim("length spread", "b", "a", 5.0, 4.0),
        measurement=Measurement(4.5, 3.5, 5.5, 64, needed=200),
        trial=Trial(ran(10, 60), ran(10, 50), decides=True),
    )  # fmt: skip
    assert wording.probed(finding) == (
        "refuted by training; measured: 4.5 (99 %: 3.5 … 5.5) in 64 draws; predicted 5"
    )


def test_a_threshold_that_no_constant_answer_reaches() -> None:
    for build, shape in [(lambda: models.mlp(2, 64, models.he), (2, 64)), (net16, (2, 16))]:
        analysis = analysed(build, *shape)
        where = readout(analysis)
        task, _ = task_for(analysis, where, 0, REAL, CPU)
        assert where.classes == min(10, math.prod(analysis.graph.shape(where.value) or ()) // 2)  # type: ignore[arg-type]
        counts = torch.bincount(task.held.labels.flatten()) / task.held.labels.numel()
        assert float(counts.max()) < 0.8 * task.threshold


def test_readouts() -> None:
    both = load_torch(Pair, {"x": ((4, 16), None), "y": ((4, 8), None)})
    softmax = readout(analyse(both))
    assert softmax.classes == 3
    y = torch.randn(4, 3)
    torch.testing.assert_close(softmax(y), y)
    tokens = readout(analysed(Tokens, 4, 8, dtype="int64"))
    y = torch.randn(4, 8, 50)
    torch.testing.assert_close(tokens(y), y.mean(1))
    dense = readout(analysed(lambda: nn.Conv2d(3, 5, 3), 2, 3, 8, 8))
    y = torch.randn(2, 5, 6, 6)
    torch.testing.assert_close(dense(y), y.mean((2, 3)))
    single = readout(analysed(lambda: nn.Linear(8, 1), 2, 8))
    torch.testing.assert_close(single(torch.ones(2, 1)), torch.tensor([[1.0, 0.0]] * 2))
    with pytest.raises(NoTask, match="single number"):
        readout(analysed(make(lambda h: h.sum()), 2, 8))
