"""Does training start? Many draws of one network are trained at once.

Every draw sees the same batches in the same order; ``torch.func.vmap`` evaluates them together, and
each has its own weights, gradient and optimizer state. A draw that diverges stays by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from archlint.graph.model import LayerGraph
from archlint.probe.draws import Drawer
from archlint.probe.execute import Program

Optimizer = Literal["sgd", "adam"]


@dataclass(frozen=True)
class Task:
    """Samples and classes to learn, and others to test on: inputs [sample, …], labels [sample]."""

    inputs: Tensor
    labels: Tensor
    test_inputs: Tensor
    test_labels: Tensor


def digits(seed: int = 0, flat: bool = True) -> Task:
    """scikit-learn's digits: 1,400 images of 8×8 to learn and 397 to test on, each pixel
    standardised by the mean and variance of all. Needs scikit-learn."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    found = load_digits()
    x = torch.tensor(found.data, dtype=torch.float32)
    x = (x - x.mean()) / x.std()
    y = torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    if not flat:
        x = x.reshape(-1, 1, 8, 8)
    return Task(x[:1400], y[:1400], x[1400:], y[1400:])


@dataclass(frozen=True)
class Starts:
    """When each draw began to learn: in epochs, None where it did not before the last one."""

    epochs: tuple[int | None, ...]
    most: int

    @property
    def failures(self) -> int:
        """Draws that did not start."""
        return sum(e is None for e in self.epochs)

    @property
    def mean(self) -> float:
        """Mean epochs to the start; a draw that did not start counts with the last epoch."""
        return sum(self.most if e is None else e for e in self.epochs) / len(self.epochs)


def train(
    graph: LayerGraph,
    task: Task,
    draws: int = 10,
    rate: float = 0.02,
    epochs: int = 30,
    batch: int = 50,
    optimizer: Optimizer = "sgd",
    threshold: float = 0.2,
    seed: int = 0,
) -> Starts:
    """Train draws of a classifier until each has the ``threshold`` of test accuracy.

    The graph takes the task's inputs and its first output holds the logits. ``rate`` is the
    learning rate. Raises CannotExecute for a graph that cannot be run, RuntimeError where vmap
    does not take it.
    """
    real, device = torch.float32, torch.device("cpu")
    program = Program(graph, real, device)
    drawer = Drawer(program.parameters, seed, real, device)
    drawn = drawer.draw(0, draws)
    weights = {
        name: (p.clone() if drawer.plans[name].kind else p.expand(draws, *p.shape).clone())
        for name, p in drawn.items()
        if program.parameters[name].trainable
    }
    fixed = {name: p for name, p in drawn.items() if name not in weights}
    first = graph.outputs[0]

    def logits(weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return program.run({**fixed, **weights}, [x])[first]

    every = torch.func.vmap(logits, in_dims=(0, None), randomness="different")
    state = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in weights.items()}
    order = torch.Generator().manual_seed(seed)
    started: list[int | None] = [None] * draws
    step = 0
    for epoch in range(1, epochs + 1):
        shuffled = torch.randperm(len(task.inputs), generator=order)
        for at in range(0, len(shuffled), batch):
            rows = shuffled[at : at + batch]
            step += 1
            for p in weights.values():
                p.requires_grad_()
            out = every(weights, task.inputs[rows])
            labels = task.labels[rows].repeat(draws)
            loss = F.cross_entropy(out.flatten(0, 1), labels, reduction="sum") / len(rows)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            with torch.no_grad():
                for (name, p), g in zip(weights.items(), gradients, strict=True):
                    p.requires_grad_(False)
                    if g is not None:
                        p -= rate * (g if optimizer == "sgd" else _adam(state[name], g, step))
        with torch.no_grad():
            best = every(weights, task.test_inputs).argmax(-1)
        accuracy = (best == task.test_labels).float().mean(1)
        for i, value in enumerate(accuracy.tolist()):
            if started[i] is None and value >= threshold:
                started[i] = epoch
        if None not in started:
            break
    return Starts(tuple(started), epochs)


def _adam(state: tuple[Tensor, Tensor], g: Tensor, step: int) -> Tensor:
    """Adam's direction (Kingma & Ba 2015) with its usual constants."""
    first, second = state
    first.mul_(0.9).add_(g, alpha=0.1)
    second.mul_(0.999).addcmul_(g, g, value=0.001)
    mean, square = first / (1 - 0.9**step), second / (1 - 0.999**step)
    return mean / (square.sqrt() + 1e-8)
