"""Whether a network starts to train, and whether it does with what a finding suggests."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from archlint.finding import Finding, Remedy, Severity, Training, Trial, Verdict
from archlint.graph.model import LayerGraph
from archlint.probe.ensemble import in_a_line, is_out_of_memory
from archlint.probe.feed import Data
from archlint.probe.ops.frame import CannotExecute
from archlint.probe.options import ProbeOptions
from archlint.probe.sequential import ALPHA
from archlint.probe.task import NoTask, Readout, Task, readout, task_for
from archlint.probe.training import REAL, OutOfTime, Runs
from archlint.signal.analysis import Analysis
from archlint.signal.remedies import remedied

DRAWS = 10
_NONE = "no change that could be made without you is suggested"


@dataclass
class Starting:
    """The network's own training, and the findings with their trials."""

    findings: tuple[Finding, ...]
    training: Training | None = None
    remarks: list[str] = field(default_factory=list)
    interrupted: bool = False


def start(
    analysis: Analysis,
    findings: Sequence[Finding],
    options: ProbeOptions,
    device: torch.device,
    data: Data | None,
    memory: float,
    until: float,
) -> Starting:
    """Train draws of a network, and of the same network with each finding's remedy.

    ``until`` is the monotonic time at which to stop; half of it is the network's own. What is found
    before an interruption stays.
    """
    found = Starting(tuple(findings))
    before = torch.random.get_rng_state()
    try:
        where = readout(analysis)
        task, remark = task_for(analysis, where, options.seed, REAL, device, data)
        found.remarks += [remark] if remark else []
        _compare(found, analysis.graph, where, task, options, device, memory, until)
    except NoTask as problem:
        found.remarks.append(f"not trained: {problem}")
    except CannotExecute as problem:
        found.remarks.append(f"not trained: it cannot be executed: {problem}")
    except KeyboardInterrupt:
        found.interrupted = True
    except Exception as problem:  # whatever torch makes of somebody's network
        if is_out_of_memory(problem):
            found.remarks.append("not trained: a single draw does not fit into the memory")
        else:
            found.remarks.append(f"not trained: {in_a_line(problem)}")
    finally:
        torch.random.set_rng_state(before)
    return found


def _compare(
    found: Starting,
    graph: LayerGraph,
    where: Readout,
    task: Task,
    options: ProbeOptions,
    device: torch.device,
    memory: float,
    until: float,
) -> None:
    """The network as it is, then with each remedy; findings with one remedy share its training."""
    remedies: list[Remedy] = []
    for finding in found.findings:
        remedy = finding.suggestion.remedy if finding.suggestion is not None else None
        if remedy is not None and remedy not in remedies:
            remedies.append(remedy)
    left = until - time.monotonic()
    limit = time.monotonic() + left / (1 + len(remedies))
    draws = min(DRAWS, options.draws)

    def train(graph: LayerGraph, limit: float, to: list[Training | str]) -> None:
        runs = Runs(graph, where, task, draws, options.optimizer, steps=options.steps,
                    seed=options.seed, device=device, memory=memory)  # fmt: skip

        def tick(step: int, open: int) -> bool:
            if options.progress is not None:
                options.progress(step, runs.steps, "steps", f"{open} of {draws} draws train")
            return time.monotonic() < limit

        try:
            runs.run(tick)
        except OutOfTime:
            pass
        except KeyboardInterrupt:
            to.append(runs.result())
            raise
        finally:
            found.remarks += [r for r in runs.remarks if r not in found.remarks]
        to.append(runs.result())

    own: list[Training | str] = []
    trials: list[Training | str] = []
    try:
        train(graph, limit, own)
        for k, remedy in enumerate(remedies):
            changed = remedied(graph, remedy)
            if changed is None:
                trials.append(f"{remedy.words}: not to be made in this graph by itself")
                continue
            share = (until - time.monotonic()) / (len(remedies) - k)
            try:
                train(changed, time.monotonic() + share, trials)
            except (CannotExecute, RuntimeError, ValueError) as problem:
                trials.append(f"with {remedy.words} it does not run: {in_a_line(problem)}")
    finally:
        for training in own:
            if isinstance(training, Training):
                found.training = training
                found.findings = tuple(
                    _tried(finding, training, remedies, trials) for finding in found.findings
                )


def _tried(
    finding: Finding,
    training: Training,
    remedies: Sequence[Remedy],
    trials: Sequence[Training | str],
) -> Finding:
    remedy = finding.suggestion.remedy if finding.suggestion is not None else None
    if remedy is None:
        return replace(finding, trial=Trial(training, None, _NONE))
    place = remedies.index(remedy)
    if place >= len(trials):
        return replace(finding, trial=Trial(training, None, "interrupted before the remedy"))
    trial = trials[place]
    if isinstance(trial, str):
        return replace(finding, trial=Trial(training, None, trial))
    both = replace(finding, trial=Trial(training, trial))
    found = verdict(both)
    decides = found != finding.verdict and found != "inconclusive"
    return replace(both, verdict=found, trial=Trial(training, trial, decides=decides))


# --------------------------------------------------------------------------- verdicts


def verdict(finding: Finding) -> Verdict | None:
    """What the trial makes of a finding's verdict.

    An error says that training does not start. Where it does start in most draws, and not more
    than twice as late as with the remedy, the error is refuted, whatever its figure; where it
    starts in fewer draws than with the remedy, or in less than half of them, it is confirmed. A
    finding without a figure to measure, of any severity, is confirmed the same way.
    """
    trial = finding.trial
    if trial is None or trial.found is None or trial.remedied is None:
        return finding.verdict
    now, then = trial.found, trial.remedied
    if now.undecided or then.undecided:
        return finding.verdict
    grave = finding.severity is Severity.ERROR
    if not grave and finding.claim is not None:
        return finding.verdict
    low, high = share(now.started, now.draws)
    if fewer(now.started, now.draws, then.started, then.draws) <= ALPHA or (grave and high < 0.5):
        return "confirmed"
    late = (now.steps or math.inf) > 2 * (then.steps or math.inf)
    if grave and low > 0.5 and not late:
        return "refuted"
    return finding.verdict or "inconclusive"


def fewer(a: int, n: int, b: int, m: int) -> float:
    """Fisher's exact test, one-sided: the chance of ``a`` or fewer of ``n`` where all ``a + b``
    starts fall on the ``n + m`` draws at random."""
    every = math.comb(n + m, a + b)
    return sum(math.comb(n, k) * math.comb(m, a + b - k) for k in range(a + 1)
               if 0 <= a + b - k <= m) / every  # fmt: skip


def share(hits: int, count: int, level: float = ALPHA) -> tuple[float, float]:
    """The exact interval of a share (Clopper & Pearson 1934)."""

    def above(p: float) -> float:  # P(X ≥ hits)
        return sum(math.comb(count, k) * p**k * (1 - p) ** (count - k)
                   for k in range(hits, count + 1))  # fmt: skip

    def below(p: float) -> float:  # P(X ≤ hits)
        return sum(math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(hits + 1))

    low = 0.0 if hits == 0 else _root(lambda p: above(p) - level / 2)
    high = 1.0 if hits == count else _root(lambda p: level / 2 - below(p))
    return low, high


def _root(f: Callable[[float], float]) -> float:
    """Where an increasing function on [0, 1] is zero."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2
