"""An experiment for every finding: draw the network until each is decided."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archlint.errors import ArchlintError
from archlint.finding import Claim, Finding, Measurement, Training, Verdict
from archlint.graph.model import LayerGraph
from archlint.probe.draws import Drawer
from archlint.probe.ensemble import (
    Ensemble,
    OutOfMemory,
    bounded,
    free_memory,
    in_a_line,
    is_out_of_memory,
)
from archlint.probe.execute import Program, unknown_nodes
from archlint.probe.feed import Data, Feed, read_data
from archlint.probe.ops.frame import CannotExecute
from archlint.probe.options import ProbeOptions
from archlint.probe.rebuild import MOST, CannotRebuild, Rebuilder
from archlint.probe.sequential import FIRST_LOOK, Lost, judge
from archlint.probe.starting import start
from archlint.probe.task import kinds
from archlint.signal.analysis import Analysis


@dataclass(frozen=True)
class Outcome:
    """Findings with their verdicts. ``training``: how the network itself starts, where that was
    asked. ``interrupted``: somebody pressed Ctrl-C before the end."""

    findings: tuple[Finding, ...]
    remarks: tuple[str, ...] = ()
    draws: int = 0
    seconds: float = 0.0
    interrupted: bool = False
    training: Training | None = None


def device_of(name: str) -> torch.device:
    """The device that a name means. Raises ArchlintError where it is not there."""
    hint = "leave --device out to take what is there, or say --device cpu"
    if name == "auto":
        if torch.cuda.is_available():
            with suppress(RuntimeError):  # it is there, and in no state to compute
                return _working(torch.device("cuda", torch.cuda.current_device()))
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArchlintError(f"{name!r} is no device", "one of auto, cpu, cuda, cuda:1, mps") from (
            error
        )
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ArchlintError(f"--device {name}: torch finds no CUDA device here", hint)
        if (device.index or 0) >= count:
            raise ArchlintError(
                f"--device {name}: there {'is' if count == 1 else 'are'} {count} CUDA "
                f"device{'s' if count > 1 else ''}, the first is cuda:0", hint)  # fmt: skip
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ArchlintError(f"--device {name}: torch finds no Metal device here", hint)
    elif device.type != "cpu":
        raise ArchlintError(f"{name!r} is no device", "one of auto, cpu, cuda, cuda:1, mps")
    try:
        return _working(device)
    except RuntimeError as error:
        why = in_a_line(error)
        raise ArchlintError(f"--device {name}: torch cannot compute there: {why}", hint) from error


def _working(device: torch.device) -> torch.device:
    """The device, once it has computed something. Raises RuntimeError."""
    torch.zeros(1, device=device).cpu()
    return device


def run(
    analysis: Analysis,
    findings: Sequence[Finding],
    options: ProbeOptions | None = None,
    build: Callable[[], Any] | None = None,
) -> Outcome:
    """Give every finding with a claim its verdict; with ``options.train`` see whether training
    starts, with what each finding suggests too.

    ``build`` makes the model anew, by which it is drawn where the laws of its weights are only
    estimates. Stops as soon as all are decided, at the limits, or on KeyboardInterrupt; what is
    decided then stays decided. Raises ArchlintError for a device or data that cannot be used.
    """
    options = options or ProbeOptions()
    options = replace(options, seed=options.seed % 2**63)
    device = device_of(options.device)
    data = read_data(options.data, analysis.graph) if options.data else None
    narrow = device.type == "mps" or _fits_single(analysis, data)
    real = torch.float32 if narrow else torch.float64
    data = data.to(device, real) if data is not None else None
    memory = options.memory if options.memory is not None else free_memory(device) / 4
    started = time.monotonic()
    outcome = Outcome(tuple(findings))
    with bounded(device, memory):
        if any(f.claim is not None for f in findings):
            # Half of the time is for training, where that is asked.
            share = replace(options, time=options.time / 2) if options.train else options
            setting = _Setting(analysis, share, device, real, memory, data, build)
            outcome = _measured(setting, findings)
        outcome = replace(outcome, findings=tuple(_unmeasured(f) for f in outcome.findings))
        if options.train and not outcome.interrupted:
            made = start(analysis, outcome.findings, options, device, data, memory,
                         started + options.time)  # fmt: skip
            outcome = replace(outcome, findings=made.findings, training=made.training,
                              remarks=(*outcome.remarks, *made.remarks),
                              interrupted=made.interrupted)  # fmt: skip
    return replace(outcome, seconds=time.monotonic() - started)


@dataclass(frozen=True)
class _Setting:
    """What experiments are made on and with: ``real`` numbers on a ``device`` with so many bytes of
    ``memory``; ``build`` makes the model anew."""

    analysis: Analysis
    options: ProbeOptions
    device: torch.device
    real: torch.dtype
    memory: float
    data: Data | None
    build: Callable[[], Any] | None

    @property
    def graph(self) -> LayerGraph:
        return self.analysis.graph

    def feed(self, rows: Mapping[str, Tensor]) -> Feed:
        """The inputs of draws."""
        return Feed(self.graph, self.options.seed, self.real, self.device, rows)


def _measured(setting: _Setting, findings: Sequence[Finding]) -> Outcome:
    """The findings with the verdicts of their claims."""
    made = _Looking(findings)
    interrupted, why = False, ""
    before = torch.random.get_rng_state()
    torch.manual_seed(setting.options.seed)
    try:
        why = _look(setting, made)
    except KeyboardInterrupt:
        interrupted, why = True, "interrupted"
    except OutOfMemory as problem:
        why = str(problem)
    except CannotExecute as problem:
        why = f"it cannot be executed: {problem}"
    except CannotRebuild as problem:
        why = f"not built again: {problem}"
    except Exception as problem:  # a device that is lost, a kernel that refuses
        why = ("it does not fit into the memory" if is_out_of_memory(problem)
               else f"torch gave up: {in_a_line(problem)}")  # fmt: skip
    finally:
        torch.random.set_rng_state(before)
    ensemble, done = made.ensemble, made.done
    remarks = list(made.remarks)
    if ensemble is not None:
        for k, i in enumerate(made.places):
            if i not in done and ensemble.done >= 8:
                done[i] = _judged(ensemble, findings[i], k, ensemble.looks + 1)[0]
        remarks += ensemble.remarks
    remarks += [why] if why else []
    if ensemble is not None and ensemble.no_path:
        remarks.append("no gradient reaches " + ", ".join(sorted(ensemble.no_path)))
    return Outcome(_left_open(findings, done, why), tuple(remarks),
                   ensemble.done if ensemble is not None else 0,
                   interrupted=interrupted)  # fmt: skip


@dataclass
class _Looking:
    """What there is of the verdicts at any time. ``places`` are the findings that need draws."""

    findings: Sequence[Finding]
    done: dict[int, Finding] = field(default_factory=dict)
    places: list[int] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    ensemble: Ensemble | None = None


def _look(setting: _Setting, made: _Looking) -> str:
    """Draw until every finding has its verdict; why it stopped before, if it did."""
    graph, options, findings = setting.graph, setting.options, made.findings
    started = time.monotonic()
    for i, finding in enumerate(findings):
        if unknown := unknown_nodes(graph, _values(finding.claim)):
            why = f"it cannot be executed: {', '.join(sorted(unknown))}"
            made.done[i] = replace(finding, verdict="inconclusive", measurement=Measurement(
                remark=why))  # fmt: skip
            made.remarks += [why] if why not in made.remarks else []
    kept = frozenset(v for i, f in enumerate(findings) if i not in made.done
                     for v in _values(f.claim))  # fmt: skip
    program = Program(graph, setting.real, setting.device, kept, alone=True)
    drawer, remarks = _drawer(setting, program)
    made.remarks += remarks
    if isinstance(drawer, Rebuilder):
        options = replace(options, draws=min(options.draws, MOST))
    for i, finding in enumerate(findings):
        if i in made.done:
            continue
        found = _once(setting, finding, program)
        if found is None:
            made.places.append(i)
        else:
            made.done[i] = found
    if not made.places:
        return ""
    claims = [f.claim for i in made.places if (f := findings[i]).claim is not None]
    feed = setting.feed(setting.data.rows if setting.data else {})
    made.ensemble = Ensemble(setting.analysis, claims, drawer, feed, setting.real, setting.device,
                             setting.memory)  # fmt: skip
    return _until_decided(made.ensemble, findings, made.places, made.done, options, started)


def _values(claim: Claim | None) -> list[str]:
    """The values that a claim is about."""
    if claim is None or claim.statistic == "weight difference":
        return []
    every = (claim.start, claim.end, claim.also)
    return [v for v in every if v is not None]


def _drawer(setting: _Setting, program: Program) -> tuple[Drawer | Rebuilder, list[str]]:
    """Draws from the laws; by the constructor where a law is no more than an estimate."""
    how = setting.options.seed, setting.real, setting.device
    drawer = Drawer(program.parameters, *how)
    if not drawer.remarks or setting.build is None:
        return drawer, []
    try:
        return Rebuilder(setting.build, program.parameters, *how), []
    except CannotRebuild as problem:
        return drawer, [f"not drawn by building the model: {problem}"]


def _unmeasured(finding: Finding) -> Finding:
    """A finding that no experiment was made for says so."""
    if finding.claim is not None or finding.measurement is not None:
        return finding
    return replace(finding, measurement=Measurement(remark="no experiment for this finding"))


_BUILDS = 8  # of the constructor, where copies are compared


def _once(setting: _Setting, finding: Finding, program: Program) -> Finding | None:
    """A finding that needs no ensemble, with its verdict; None for one that does."""
    claim = finding.claim
    if claim is None:
        return finding
    if claim.statistic == "weight difference":
        return _compared(setting, finding, claim, program)
    if claim.statistic == "reach":
        return _reached(setting, finding, claim)
    return None


def _compared(setting: _Setting, finding: Finding, claim: Claim, program: Program) -> Finding:
    """Whether two parameters are equal each time the model is built."""
    names = claim.end, claim.start or claim.end
    why = "only building the model again could tell, and there is nothing that builds it"
    if setting.build is not None:
        try:
            some = {name: program.parameters[name] for name in names}
            rebuilder = Rebuilder(setting.build, some, setting.options.seed, setting.real,
                                  setting.device)  # fmt: skip
            drawn = rebuilder.draw(0, _BUILDS)
        except (CannotRebuild, KeyError) as problem:
            why = f"not built again: {problem}"
        else:
            one, other = (drawn[name].double().flatten(1) for name in names)
            squared = one.square().mean(1)
            apart = (one - other).square().mean(1).maximum(1e-30 * squared) / squared
            x: Any = apart.log().cpu().numpy()[:, None]
            finite = np.isfinite(x).all(1)
            found = judge(claim, x[finite], 1, Lost(others=int((~finite).sum())))
            return replace(finding, verdict=found.verdict, measurement=found.measurement)
    return replace(finding, verdict="inconclusive", measurement=Measurement(remark=why))


def _reached(setting: _Setting, finding: Finding, claim: Claim) -> Finding:
    """What share of a value is lost where a parameter holds no numbers: one draw tells."""
    real, device = setting.real, setting.device
    try:
        program = Program(setting.graph, real, device, frozenset({claim.end}), alone=True)
        drawn = Drawer(program.parameters, setting.options.seed, real, device).draw(0, 1)
        single = {n: p if p.shape == program.parameters[n].shape else p[0]
                  for n, p in drawn.items()}  # fmt: skip
        name = claim.start or ""
        single[name] = torch.full_like(single[name], torch.nan)
        inputs = setting.feed({}).draw(0, 1)
        with torch.no_grad():
            end = program.run(single, {id: x[0] for id, x in inputs.items()})[claim.end]
    except Exception as problem:  # whatever torch makes of somebody's network
        why = f"not run: {in_a_line(problem)}"
        return replace(finding, verdict="inconclusive", measurement=Measurement(remark=why))
    share = float((~end.isfinite()).double().mean())
    verdict: Verdict = "confirmed" if share > claim.limit else "refuted"
    return replace(finding, verdict=verdict, measurement=Measurement(share, share, share, 1))


def _fits_single(analysis: Analysis, data: Data | None = None) -> bool:
    """Whether every second moment is known and so far from the ends of single precision that no
    draw comes near them: its rounding is then far below the scatter of draws, and it is faster.

    Data are within a factor of a hundred of the size that is assumed without them.
    """
    low, high = 1e-12, 1e12
    for x in data.rows.values() if data is not None else ():
        if x.is_floating_point() and not 1e-4 < float(x.double().square().mean()) < 1e4:
            return False
    for id, value in analysis.graph.values.items():
        if "float" not in (value.dtype or "") or id in analysis.graph.static:
            continue
        signal = analysis.prediction(id)
        for moment in (signal.second_moment, signal.grad_second_moment):
            if moment is None or not (moment == 0.0 or low < moment < high):
                return False
    return True


def _until_decided(
    ensemble: Ensemble,
    findings: Sequence[Finding],
    places: Sequence[int],
    done: dict[int, Finding],
    options: ProbeOptions,
    started: float,
) -> str:
    """Draw and look until nothing is open; why it stopped before, if it did."""
    look, until = 0, min(FIRST_LOOK, options.draws)
    while True:
        while ensemble.done < until:
            ensemble.extend(min(until, ensemble.done + ensemble.chunk))
            if options.progress is not None:
                left = sum(i not in done for i in places)
                options.progress(ensemble.done, options.draws, "draws",
                                 f"{left} of {len(places)} findings open")  # fmt: skip
            if time.monotonic() - started > options.time:
                break
        late = time.monotonic() - started > options.time
        last = ensemble.done >= options.draws or late
        look += 1
        ensemble.looks = look
        for k, i in enumerate(places):
            if i in done:
                continue
            finding, is_open = _judged(ensemble, findings[i], k, look)
            if not is_open:
                done[i] = finding
        if all(i in done for i in places):
            return ""
        if last:
            for k, i in enumerate(places):
                if i not in done:
                    done[i] = _judged(ensemble, findings[i], k, look)[0]
            return f"stopped after {options.time:g} s" if late else ""
        until = min(2 * until, options.draws)


def _judged(ensemble: Ensemble, finding: Finding, k: int, look: int) -> tuple[Finding, bool]:
    """A finding with its verdict after a look, and whether it is still open."""
    claim = finding.claim
    assert claim is not None
    x, lost = ensemble.ratios(k)
    if "gradient" in claim.statistic and {claim.start, claim.end} & ensemble.no_path:
        why = "no gradient reaches it"
        if not ensemble.outputs:
            why = f"the outputs are {kinds(ensemble.analysis.graph)}: there is no gradient"
        return replace(finding, verdict="inconclusive", measurement=Measurement(
            draws=ensemble.done, remark=why)), False  # fmt: skip
    found = judge(claim, x, look, lost)
    return replace(finding, verdict=found.verdict, measurement=found.measurement), found.open


def _left_open(
    findings: Sequence[Finding], done: dict[int, Finding], why: str
) -> tuple[Finding, ...]:
    return tuple(
        done.get(i)
        or (
            replace(f, verdict="inconclusive", measurement=Measurement(remark=why))
            if f.claim is not None
            else f
        )
        for i, f in enumerate(findings)
    )
