"""Many draws of one network at once: its parameters stacked, its forward pass vectorised over them.

What is looked at is one sample. Its input is a draw of N(0,1) brought to the mean square one, and
ξ at the output likewise, so that what varies from draw to draw is the initialization alone (a
vector of eight normal elements has a mean square of 1 ± ½).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

Floats = npt.NDArray[np.float64]
Build = Callable[[], nn.Module]
OUTPUT = "output"
INPUT = "input"


@dataclass(frozen=True)
class Logs:
    """ln of the mean square of one value, over the draws in which it is not zero. ``dead`` counts
    the others."""

    values: Floats
    dead: int

    @property
    def mean(self) -> float:
        """E ln M."""
        return float(self.values.mean())

    @property
    def variance(self) -> float:
        """Var ln M."""
        return float(self.values.var(ddof=1))

    @property
    def error_of_mean(self) -> float:
        """Standard error of ``mean``."""
        return math.sqrt(self.variance / self.values.size)

    @property
    def error_of_variance(self) -> float:
        """Standard error of ``variance``, from the fourth moment of what was drawn."""
        centred = self.values - self.values.mean()
        variance = float(np.square(centred).mean())
        if variance <= 0:
            return 0.0
        kurtosis = float((centred**4).mean()) / variance**2
        return variance * math.sqrt(max(kurtosis - 1, 0.0) / self.values.size)


@dataclass(frozen=True)
class Drawn:
    """By module path, ``input`` and ``output``: the values' logs and those of the gradients of
    ⟨output, ξ⟩."""

    forward: Mapping[str, Logs]
    gradient: Mapping[str, Logs]


def _unit(shape: tuple[int, ...]) -> Tensor:
    """Draws [draws, 1, …] of N(0,1), each of the mean square one."""
    x = torch.randn(shape, dtype=torch.float64)
    axes = tuple(range(1, x.ndim))
    return x / x.square().mean(axes, keepdim=True).sqrt()


def draw(
    build: Build, shape: tuple[int, ...], draws: int, seed: int = 0, chunk: int = 500,
    paths: Callable[[str, nn.Module], bool] | None = None,
) -> Drawn:  # fmt: skip
    """Draw a network and an input of a shape (without the samples' axis) ``draws`` times.

    ``paths`` chooses the modules that are looked at; by default those without children.
    """
    forward: dict[str, list[Floats]] = {}
    gradient: dict[str, list[Floats]] = {}
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        done = 0
        while done < draws:
            count = min(chunk, draws - done)
            done += count
            for into, found in zip((forward, gradient), _chunk(build, shape, count, paths),
                                   strict=True):  # fmt: skip
                for path, squares in found.items():
                    into.setdefault(path, []).append(squares)
    finally:
        torch.random.set_rng_state(state)
    return Drawn(_logs(forward), _logs(gradient))


def _logs(found: Mapping[str, list[Floats]]) -> dict[str, Logs]:
    result = {}
    for path, parts in found.items():
        squares = np.concatenate(parts)
        alive = squares[squares > 0]
        result[path] = Logs(np.log(alive), squares.size - alive.size)
    return result


def _chunk(
    build: Build, shape: tuple[int, ...], count: int,
    paths: Callable[[str, nn.Module], bool] | None,
) -> tuple[dict[str, Floats], dict[str, Floats]]:  # fmt: skip
    models = [build() for _ in range(count)]
    model = models[0].train()
    stacked = {
        name: torch.stack([dict(m.named_parameters())[name].detach() for m in models]).double()
        for name, _ in model.named_parameters()
    }
    buffers = {name: b.double() if b.is_floating_point() else b
               for name, b in model.named_buffers()}  # fmt: skip
    chosen = [
        path
        for path, module in model.named_modules()
        if path and (paths(path, module) if paths else not any(module.children()))
    ]
    sizes = _shapes(model.double(), shape, chosen)
    probes = {path: torch.zeros(count, *size, dtype=torch.float64, requires_grad=True)
              for path, size in sizes.items()}  # fmt: skip
    x = _unit((count, 1, *shape)).requires_grad_()

    def run(p: dict[str, Tensor], x: Tensor, added: dict[str, Tensor]
            ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        seen: dict[str, Tensor] = {}
        handles = []
        for path in chosen:

            def after(_m: nn.Module, _i: object, out: Tensor, path: str = path) -> Tensor:
                seen[path] = out
                return out + added[path]

            handles.append(model.get_submodule(path).register_forward_hook(after))
        out = functional_call(model, {**p, **buffers}, (x,))
        for handle in handles:
            handle.remove()
        return out, seen

    out, seen = vmap(run, randomness="different")(stacked, x, probes)
    xi = _unit(tuple(out.shape))
    leaves = [x, *probes.values()]
    grads = torch.autograd.grad((out * xi).sum(), leaves, allow_unused=True)
    forward = {path: _squares(t) for path, t in {**seen, OUTPUT: out}.items()}
    gradient = {path: _squares(g) for path, g in zip([INPUT, *probes], grads, strict=True)
                if g is not None}  # fmt: skip
    return forward, gradient


def _squares(t: Tensor) -> Floats:
    return np.asarray(t.detach().square().flatten(1).mean(1).numpy(), np.float64)


def _shapes(model: nn.Module, shape: tuple[int, ...], chosen: list[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _m, _i, out, path=path: found.update({path: list(out.shape)})
        )
        for path in chosen
    ]
    with torch.no_grad():
        model(torch.randn(1, *shape, dtype=torch.float64))
    for handle in handles:
        handle.remove()
    return found
