"""Does training start? Many draws of one network are trained at once.

Every draw sees the same batches in the same order; ``torch.func.vmap`` evaluates them together, and
each has its own weights, gradient and optimizer state. Draws that do not start at the first
learning rate are trained at the others, side by side, and have started where they have at one of
them. What has started is left out of what follows, and so is a run whose numbers are no longer
finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from archlint.finding import Training
from archlint.graph.model import LayerGraph
from archlint.probe.draws import Drawer
from archlint.probe.ensemble import (
    exact_convolutions,
    in_a_line,
    is_out_of_memory,
    threads_for,
)
from archlint.probe.execute import DATA_SIZED, Program
from archlint.probe.ops.frame import CannotExecute
from archlint.probe.task import Batch, NoTask, Readout, Task

Optimizer = Literal["sgd", "adam"]
Tick = Callable[[int, int], bool]  # steps made, draws that train: whether to go on

RATES: dict[Optimizer, tuple[float, ...]] = {"sgd": (0.05, 0.2, 0.01), "adam": (1e-3, 1e-2, 1e-4)}
CHECK = 10  # steps between two looks
REAL = torch.float32  # what networks are trained in


class OutOfTime(Exception):
    """The limit of time is reached; what has started has."""


@dataclass
class Runs:
    """Draws of a network in training. What :meth:`run` has found so far is there at any time, also
    when it is interrupted.

    Raises CannotExecute for a graph that cannot be run, NoTask for one with nothing to train.
    """

    graph: LayerGraph
    readout: Readout
    task: Task
    draws: int
    optimizer: Optimizer = "sgd"
    rates: Sequence[float] = ()
    steps: int = 300
    check: int = CHECK
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory: float = math.inf  # bytes
    threshold: float | None = None  # of accuracy; the task's where None
    started: dict[int, int] = field(default_factory=dict)  # draw -> steps
    failed: set[int] = field(default_factory=set)
    together: bool = True
    remarks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rates = self.rates or RATES[self.optimizer]
        self.program = Program(self.graph, REAL, self.device, frozenset({self.readout.value}))
        self.drawer = Drawer(self.program.parameters, self.seed, REAL, self.device)
        self.remarks += [f"for training, {remark}" for remark in self.drawer.remarks]
        self.together = not any(node.op in DATA_SIZED for node in self.graph.walk())
        self.trained = [
            name for name, p in self.program.parameters.items()
            if p.trainable and not p.frozen and "float" in p.dtype
        ]  # fmt: skip
        if not self.trained:
            raise NoTask("the model has no parameters to train")

    def run(self, tick: Tick = lambda steps, draws: True) -> None:
        """Train every draw until it starts. Raises OutOfTime where ``tick`` says so."""
        self._train_all(list(range(self.draws)), self.rates[:1], tick)
        left = [i for i in range(self.draws) if i not in self.started]
        self._train_all(left, self.rates[1:], tick)

    def _train_all(self, draws: list[int], rates: Sequence[float], tick: Tick) -> None:
        """Train draws at some rates, as many together as the memory holds."""
        chunk = self._chunk(len(draws), len(rates)) if rates else 0
        last = not rates or rates[-1] == self.rates[-1]
        while draws and rates:
            some = draws[:chunk]
            try:
                self._train(some, rates, tick)
            except (CannotExecute, NoTask, OutOfTime):
                raise
            except Exception as problem:  # whatever torch makes of somebody's network
                if is_out_of_memory(problem) and len(some) > 1:
                    chunk = len(some) // 2
                    continue
                if not self.together or is_out_of_memory(problem):
                    raise
                torch.zeros(1, device=self.device).cpu()  # raises where the device is lost
                self.together = False
                self.remarks.append(
                    f"trained one by one, since vmap does not take it: {in_a_line(problem)}"
                )
                continue
            if last:
                self.failed.update(i for i in some if i not in self.started)
            draws = draws[chunk:]

    def result(self) -> Training:
        """What has been found so far."""
        steps = sorted(self.started.values())
        undecided = self.draws - len(self.started) - len(self.failed)
        return Training(
            self.draws, len(steps), int(median(steps)) if steps else None, undecided, self.steps,
            self.task.name, self.optimizer, tuple(self.rates),
        )  # fmt: skip

    # ------------------------------------------------------------------ one learning rate

    def _chunk(self, draws: int, rates: int) -> int:
        """How many draws fit the memory: weights, gradients and the optimizer's state, and all
        values of a batch."""
        weights = sum(math.prod(p.shape) for p in self.program.parameters.values())
        groups = len(self.task.held.labels) if not self.task.rows else 1
        values = sum(
            v.size or 0 for v in self.graph.values.values()
            if v.parameter is None and v.constant is None
        )  # fmt: skip
        batch = max(groups, math.ceil(32 / self.task.samples))
        one = rates * REAL.itemsize * ((5 if self.optimizer == "adam" else 3) * weights
                               + 2.0 * batch * values)  # fmt: skip
        if one / 2 > self.memory:
            raise MemoryError
        return max(1, int(min(draws, self.memory / (one + 1))))

    def _train(self, draws: Sequence[int], each: Sequence[float], tick: Tick) -> None:
        """Train some draws at each of some rates."""
        active = [(i, rate) for i in draws for rate in each]
        rates = torch.tensor([rate for _, rate in active], dtype=REAL, device=self.device)
        weights, others, fixed = self._drawn(draws, len(each))
        state: dict[str, tuple[Tensor, Tensor]] = {}
        if self.optimizer == "adam":
            state = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in weights.items()}
        with threads_for(self._work(len(active))), exact_convolutions(self.device):
            self._go_on(active, rates, weights, others, fixed, state, tick)

    def _work(self, runs: int) -> float:
        """Elements that a step computes on average."""
        made = [
            self.graph.values[out].size or 0
            for step in self.program.steps for out in step.outputs
        ]  # fmt: skip
        samples = max(self.task.samples, 32)
        return runs * samples / self.task.samples * sum(made) / max(len(made), 1)

    def _go_on(
        self,
        active: list[tuple[int, float]],
        rates: Tensor,
        weights: dict[str, Tensor],
        others: dict[str, Tensor],
        fixed: Mapping[str, Tensor],
        state: dict[str, tuple[Tensor, Tensor]],
        tick: Tick,
    ) -> None:
        threshold = self.threshold if self.threshold is not None else self.task.threshold
        batches = self.task.batches(self.seed)
        torch.manual_seed(self.seed)  # of dropout
        for step in range(1, self.steps + 1):
            self._step(next(batches), weights, others, fixed, state, rates, step)
            if not tick(step, len({i for i, _ in active})):
                raise OutOfTime
            if step % self.check and step != self.steps:
                continue
            accuracy, sound = self._look(weights, others, fixed)
            for k, (i, _) in enumerate(active):
                if accuracy[k] >= threshold:
                    self.started.setdefault(i, step)
            keep = [k for k, (i, _) in enumerate(active) if sound[k] and i not in self.started]
            if not keep:
                return
            if len(keep) < len(active):
                place = torch.tensor(keep, dtype=torch.int64, device=self.device)
                active = [active[k] for k in keep]
                rates = rates[place]
                weights = {n: p[place] for n, p in weights.items()}
                others = {n: p[place] for n, p in others.items()}
                state = {n: (a[place], b[place]) for n, (a, b) in state.items()}

    def _drawn(
        self, draws: Sequence[int], copies: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Weights to train [draw × rate, *shape], random ones that stay, and what all share."""
        each = [self.drawer.draw(i, 1) for i in draws]
        weights: dict[str, Tensor] = {}
        others: dict[str, Tensor] = {}
        fixed: dict[str, Tensor] = {}
        for name, plan in self.drawer.plans.items():
            if plan.kind:
                p = torch.cat([drawn[name] for drawn in each])
                p = p.repeat_interleave(copies, 0)
            elif name in self.trained:
                p = each[0][name]
                p = p.expand(len(draws) * copies, *p.shape).clone()
            else:
                fixed[name] = each[0][name]
                continue
            (weights if name in self.trained else others)[name] = p
        return weights, others, fixed

    def _logits(
        self,
        weights: Mapping[str, Tensor],
        others: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        batch: Batch,
    ) -> Tensor:
        """[draw, group, sample, class]."""

        def group(
            weights: Mapping[str, Tensor], others: Mapping[str, Tensor], x: Mapping[str, Tensor]
        ) -> Tensor:
            found = self.program.run({**fixed, **others, **weights}, x)
            return self.readout(found[self.readout.value])

        count = len(batch.labels)
        if self.together:
            if count == 1:
                x = {id: t[0] for id, t in batch.inputs.items()}
                one = torch.func.vmap(group, in_dims=(0, 0, None), randomness="different")
                found: Tensor = one(weights, others, x)
                return found[:, None]
            inner = torch.func.vmap(group, in_dims=(None, None, 0), randomness="different")
            outer = torch.func.vmap(inner, in_dims=(0, 0, None), randomness="different")
            found = outer(weights, others, dict(batch.inputs))
            return found
        draws = len(next(iter(weights.values())))
        return torch.stack([
            torch.stack([
                group({n: p[i] for n, p in weights.items()}, {n: p[i] for n, p in others.items()},
                      {id: t[g] for id, t in batch.inputs.items()})
                for g in range(count)
            ])
            for i in range(draws)
        ])  # fmt: skip

    def _step(
        self,
        batch: Batch,
        weights: dict[str, Tensor],
        others: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
        state: Mapping[str, tuple[Tensor, Tensor]],
        rates: Tensor,
        step: int,
    ) -> None:
        for p in weights.values():
            p.requires_grad_()
        logits = self._logits(weights, others, fixed, batch)
        if not logits.requires_grad:
            raise NoTask("no gradient reaches a parameter from the output")
        labels = batch.labels.expand(logits.shape[:-1]).flatten()
        total = F.cross_entropy(logits.flatten(0, 2), labels, reduction="sum")
        loss = total / batch.labels.numel()
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        with torch.no_grad():
            for (name, p), g in zip(weights.items(), gradients, strict=True):
                p.requires_grad_(False)
                if g is not None:
                    rate = rates.reshape(-1, *[1] * (p.dim() - 1))
                    p -= rate * (g if self.optimizer == "sgd" else _adam(state[name], g, step))

    def _look(
        self, weights: Mapping[str, Tensor], others: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor],
    ) -> tuple[list[float], list[bool]]:  # fmt: skip
        """The accuracy of each draw on the samples to look at, and whether it is finite."""
        held = self.task.held
        right = torch.zeros(0)
        sound = torch.zeros(0)
        count = len(held.labels)
        part = max(1, min(count, math.ceil(64 / self.task.samples)))  # groups that fit as a step's
        with torch.no_grad():
            for g in range(0, count, part):
                some = Batch({id: t[g : g + part] for id, t in held.inputs.items()},
                             held.labels[g : g + part])  # fmt: skip
                logits = self._logits(weights, others, fixed, some)
                hits = (logits.argmax(-1) == some.labels).flatten(1).sum(1).double()
                fine = logits.isfinite().flatten(1).all(1)
                right = hits if g == 0 else right + hits
                sound = fine if g == 0 else sound & fine
        accuracy = torch.where(sound, right / held.labels.numel(), 0.0)
        return accuracy.tolist(), [bool(b) for b in sound.tolist()]


def _adam(state: tuple[Tensor, Tensor], g: Tensor, step: int) -> Tensor:
    """Adam's direction (Kingma & Ba 2015) with its usual constants."""
    first, second = state
    first.mul_(0.9).add_(g, alpha=0.1)
    second.mul_(0.999).addcmul_(g, g, value=0.001)
    mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
    return mean / (square.sqrt() + 1e-8)
