"""An experiment for every finding: draw the network until each is decided."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from archlint.errors import ArchlintError
from archlint.finding import Finding, Measurement
from archlint.probe.draws import Drawer
from archlint.probe.ensemble import Ensemble, OutOfMemory, free_memory
from archlint.probe.execute import Program, unknown_nodes
from archlint.probe.feed import Feed, read_data
from archlint.probe.ops.frame import CannotExecute
from archlint.probe.options import ProbeOptions
from archlint.probe.sequential import FIRST_LOOK, judge
from archlint.signal.analysis import Analysis


@dataclass(frozen=True)
class Outcome:
    """Findings with their verdicts. ``interrupted``: somebody pressed Ctrl-C before the end."""

    findings: tuple[Finding, ...]
    remarks: tuple[str, ...] = ()
    draws: int = 0
    seconds: float = 0.0
    interrupted: bool = False


def device_of(name: str) -> torch.device:
    """The device that a name means. Raises ArchlintError where it is not there."""
    hint = "leave --device out to take what is there, or say --device cpu"
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
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
            raise ArchlintError(f"--device {name}: there are {count} CUDA devices", hint)
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ArchlintError(f"--device {name}: torch finds no Metal device here", hint)
    elif device.type != "cpu":
        raise ArchlintError(f"{name!r} is no device", "one of auto, cpu, cuda, cuda:1, mps")
    return device


def run(
    analysis: Analysis,
    findings: Sequence[Finding],
    options: ProbeOptions | None = None,
) -> Outcome:
    """Give every finding with a claim its verdict.

    Stops as soon as all are decided, at the limits, or on KeyboardInterrupt; what is decided then
    stays decided. Raises ArchlintError for a device or data that cannot be used.
    """
    options = options or ProbeOptions()
    device = device_of(options.device)
    narrow = device.type == "mps" or _fits_single(analysis)
    real = torch.float32 if narrow else torch.float64
    graph = analysis.graph
    rows = read_data(options.data, graph, real, device) if options.data else {}
    places = [i for i, f in enumerate(findings) if f.claim is not None]
    if not places:
        return Outcome(tuple(findings))
    done = {i: f for i, f in enumerate(findings) if f.claim is None}
    started = time.monotonic()
    try:
        if unknown := unknown_nodes(graph):
            raise CannotExecute(", ".join(sorted(unknown)))
        claims = [f.claim for i in places if (f := findings[i]).claim is not None]
        program = Program(graph, real, device)
        memory = options.memory if options.memory is not None else free_memory(device) / 4
        ensemble = Ensemble(
            analysis, [c for c in claims if c is not None],
            Drawer(program.parameters, options.seed, real, device),
            Feed(graph, options.seed, real, device, rows), real, device, memory,
        )  # fmt: skip
    except CannotExecute as problem:
        why = f"it cannot be executed: {problem}"
        return Outcome(_left_open(findings, done, why), (why,))
    interrupted, why = False, ""
    before = torch.random.get_rng_state()
    torch.manual_seed(options.seed)
    try:
        why = _until_decided(ensemble, findings, places, done, options, started)
    except KeyboardInterrupt:
        interrupted, why = True, "interrupted"
    except OutOfMemory:
        why = "a single draw does not fit into the memory"
    except CannotExecute as problem:
        why = f"it cannot be executed: {problem}"
    except RuntimeError as problem:  # a device that is lost, a kernel that refuses
        why = f"torch gave up: {' '.join(str(problem).split())[:160]}"
    finally:
        torch.random.set_rng_state(before)
    for k, i in enumerate(places):
        if i not in done:
            done[i] = (
                _judged(ensemble, findings[i], k, ensemble.looks + 1)[0]
                if ensemble.done >= 8
                else (
                    replace(
                        findings[i], verdict="inconclusive", measurement=Measurement(remark=why)
                    )
                )
            )
    remarks = [*ensemble.remarks, *([why] if why else [])]
    if ensemble.no_path:
        remarks.append("no gradient reaches " + ", ".join(sorted(ensemble.no_path)))
    return Outcome(tuple(done[i] for i in range(len(findings))), tuple(remarks), ensemble.done,
                   time.monotonic() - started, interrupted)  # fmt: skip


def _fits_single(analysis: Analysis) -> bool:
    """Whether every second moment is known and so far from the ends of single precision that no
    draw comes near them: its rounding is then far below the scatter of draws, and it is faster."""
    low, high = 1e-12, 1e12
    for id, value in analysis.graph.values.items():
        if "float" not in (value.dtype or "") or id in analysis.graph.static:
            continue
        signal = analysis.signal(id)
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
                options.progress(ensemble.done, options.draws, left, len(places))
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
            why = "the outputs are integers: there is no gradient"
        return replace(finding, verdict="inconclusive", measurement=Measurement(
            draws=ensemble.done, remark=why)), False  # fmt: skip
    found = judge(claim, x, look, lost)
    return replace(finding, verdict=found.verdict, measurement=found.measurement), found.open


def _left_open(
    findings: Sequence[Finding], done: dict[int, Finding], why: str
) -> tuple[Finding, ...]:
    return tuple(
        done.get(i) or replace(f, verdict="inconclusive", measurement=Measurement(remark=why))
        for i, f in enumerate(findings)
    )
