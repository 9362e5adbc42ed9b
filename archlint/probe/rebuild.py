"""Draws of a network by its own constructor: where the laws of its weights are only estimates.

Slower than a :class:`~archlint.probe.draws.Drawer` by the time that building takes, and what the
constructor does is drawn exactly, whatever it is.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from archlint.graph.model import Parameter
from archlint.probe.draws import Room
from archlint.probe.ops.frame import torch_dtype

MOST = 256  # draws by building


class CannotRebuild(Exception):
    """The constructor does not give the graph's parameters: one line that says why."""


@dataclass(frozen=True)
class Plan:
    """What the constructor draws is drawn each time."""

    kind: str = "built"


@dataclass
class Rebuilder:
    """Draws by building: same seed and number, same network. Raises CannotRebuild where the
    constructor fails, makes other parameters than the graph has, or the same ones each time."""

    build: Callable[[], Any]
    parameters: Mapping[str, Parameter]
    seed: int
    real: torch.dtype
    device: torch.device
    remarks: tuple[str, ...] = ("drawn by building the model anew",)
    plans: dict[str, Plan] = field(init=False)

    def __post_init__(self) -> None:
        self.plans = {name: Plan() for name in self.parameters}
        one, other = self._built(0), self._built(1)
        if one and all(torch.equal(t, other[name]) for name, t in one.items()):
            raise CannotRebuild("the constructor makes the same weights each time it is called")

    @property
    def elements(self) -> int:
        """Numbers of one draw."""
        return sum(int(np.prod(p.shape)) for p in self.parameters.values())

    def draw(self, first: int, count: int, room: Room | None = None) -> dict[str, Tensor]:
        """Draws ``first`` … ``first + count − 1``: name -> [count, *shape]."""
        each = [self._built(i) for i in range(first, first + count)]
        return {
            name: torch.stack([built[name] for built in each]).to(
                device=self.device, dtype=torch_dtype(p.dtype, self.real)
            )
            for name, p in self.parameters.items()
        }

    def _built(self, draw: int) -> dict[str, Tensor]:
        states = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
        seed = (self.seed * 1_000_003 + draw) % 2**32
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        try:
            model = self.build()
        except Exception as problem:  # whatever the user's code raises
            text = " ".join(str(problem).split())[:100]
            raise CannotRebuild(f"{type(problem).__name__}: {text}") from problem
        finally:
            torch.random.set_rng_state(states[0])
            np.random.set_state(states[1])
            random.setstate(states[2])
        own = {name: t.detach() for name, t in _named(model)}
        found: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            if name not in own or tuple(own[name].shape) != parameter.shape:
                raise CannotRebuild(f"{name} is made otherwise when the model is built again")
            found[name] = own[name]
        return found


def _named(model: Any) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False)]  # fmt: skip
