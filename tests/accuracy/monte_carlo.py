"""Measure real models at random initializations: lengths, correlations, gradients by module.

Figures are filed on disk under ``$ARCHLINT_CACHE`` or ``~/.cache/archlint``, in ``measured``.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from archlint.graph.example_input import Example
from archlint.graph.torch_inputs import examples
from tests.accuracy.models import Case

VERSION = 1  # of what is measured; another one makes old files void
_MOST_AXES = 5


@dataclass
class Figures:
    """What was measured of a module's output.

    ``lengths``: the mean square, ``means``: the mean, ``gradients``: the mean square of
    ∂⟨output, ξ⟩/∂v, a number a draw. ``correlations``: for each set of axes (written "1", "23") the
    mean over draws of E[v v′]/E v² for v, v′ that differ in their place along these axes only.
    ``gradient_correlations``: the same of the gradient.
    """

    kind: str
    leaf: bool
    shape: list[int]
    lengths: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    gradients: list[float] = field(default_factory=list)
    correlations: dict[str, float] = field(default_factory=dict)
    gradient_correlations: dict[str, float] = field(default_factory=dict)

    @property
    def second_moment(self) -> float | None:
        """E v² over initializations."""
        return log_normal_mean(self.lengths)

    @property
    def gradient(self) -> float | None:
        """E of the squared gradient."""
        return log_normal_mean(self.gradients)

    @property
    def spread(self) -> float | None:
        """Var ln M."""
        logs = [math.log(m) for m in self.lengths if m > 0]
        if len(logs) < 2 or len(logs) < len(self.lengths):
            return None
        centre = sum(logs) / len(logs)
        return sum((x - centre) ** 2 for x in logs) / (len(logs) - 1)

    @property
    def standard_error(self) -> float:
        """Of ½ ln of ``second_moment``, of a log-normal law: ½√(β/S·(1 + β/2))."""
        beta = self.spread or 0.0
        return 0.5 * math.sqrt(beta / max(len(self.lengths), 1) * (1 + beta / 2))


def log_normal_mean(values: list[float]) -> float | None:
    """exp(mean ln M + var ln M/2): sees the heavy tail that few draws miss (theory.md 5.6); the
    plain mean where some are zero. None where one is no number, or there are none."""
    if not values or any(not math.isfinite(v) for v in values):
        return None
    if min(values) <= 0:
        return sum(values) / len(values)
    logs = [math.log(v) for v in values]
    centre = sum(logs) / len(logs)
    spread = sum((x - centre) ** 2 for x in logs) / max(len(logs) - 1, 1)
    return math.exp(centre + spread / 2)


def subsets(rank: int) -> Iterator[tuple[int, ...]]:
    """Every set of axes, none but the empty one left out."""
    axes = range(rank)
    yield from chain.from_iterable(combinations(axes, n) for n in range(1, rank + 1))


def pair_correlations(x: Tensor) -> dict[str, float]:
    """E[v v′]/E v² over pairs that differ along a set of axes, for every set."""
    if x.ndim > _MOST_AXES or x.ndim == 0:
        return {}
    square = float(x.square().mean())
    found: dict[str, float] = {}
    for axes in subsets(x.ndim):
        n = math.prod(x.shape[a] for a in axes)
        if n < 2 or square <= 0:
            continue
        together = float(x.mean(axes).square().mean()) / square
        found["".join(map(str, axes))] = (n * together - 1) / (n - 1)
    return found


def cache_folder() -> Path:
    """Where measurements are filed."""
    base = os.environ.get("ARCHLINT_CACHE")
    return (Path(base) if base else Path.home() / ".cache" / "archlint") / "measured"


def measured(case: Case, gradients: bool = True) -> dict[str, Figures] | None:
    """The figures of every module with a path; from the disk where they are filed there. None where
    they are not and ``$ARCHLINT_MEASURE`` is 0."""
    path = cache_folder() / f"{case.key}.json"
    stamp = {"version": VERSION, "library": case.version, "torch": torch.__version__,
             "draws": case.draws, "inputs": str(case.inputs)}  # fmt: skip
    if path.exists():
        filed = json.loads(path.read_text(encoding="utf-8"))
        if filed["stamp"] == stamp:
            return {k: Figures(**v) for k, v in filed["modules"].items()}
    if os.environ.get("ARCHLINT_MEASURE") == "0":
        return None
    figures = measure(case.build, case.inputs, case.draws, gradients)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"stamp": stamp, "modules": {k: asdict(v) for k, v in figures.items()}})
    path.write_text(text, encoding="utf-8")
    return figures


def measure(
    build: Callable[[], nn.Module], inputs: Any, draws: int, gradients: bool = True
) -> dict[str, Figures]:
    """Draw a model ``draws`` times in training mode, with fresh inputs, and look at each module."""
    found: dict[str, Figures] = {}
    state = torch.random.get_rng_state()
    example: Example | None = None
    try:
        for draw in range(draws):
            torch.manual_seed(1000 + draw)
            model = build().train()
            if example is None:
                example = _fitting(model, inputs)
            _one_draw(model, example, draw, gradients, found)
    finally:
        torch.random.set_rng_state(state)
    for figures in found.values():
        for which in (figures.correlations, figures.gradient_correlations):
            for key in which:
                which[key] /= max(sum(1 for m in figures.lengths if m > 0), 1)
    return found


def _fitting(model: nn.Module, inputs: Any) -> Example:
    """The first example that the model accepts."""
    problem: Exception | None = None
    for example in examples(model, inputs):
        args, kwargs = drawn(example, 0)
        try:
            with torch.no_grad():
                model(*args, **kwargs)
            return example
        except Exception as error:  # whatever the model's code raises
            problem = error
    assert problem is not None
    raise problem


def drawn(example: Example, seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """N(0,1) numbers, uniform token ids, masks that hide nothing."""
    args, kwargs = example.drawn(seed)
    for name, value in kwargs.items():
        if "mask" in name and isinstance(value, Tensor) and "bool_masked" not in name:
            kwargs[name] = torch.ones_like(value)
    return args, kwargs


def _one_draw(
    model: nn.Module, example: Example, draw: int, gradients: bool, found: dict[str, Figures]
) -> None:
    seen: dict[str, dict[str, Any]] = {}
    handles = []

    def watch(path: str, module: nn.Module) -> None:
        leaf = not any(True for _ in module.children())

        def after(_module: nn.Module, _args: Any, _kwargs: Any, out: Any) -> None:
            first = next((t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)), None)
            if first is None or not first.is_floating_point() or first.numel() == 0:
                return
            x = first.detach().double() if first.numel() < 1e6 else first.detach().float()
            record = {
                "kind": type(module).__name__, "leaf": leaf, "shape": list(x.shape),
                "length": float(x.square().mean()), "mean": float(x.mean()),
                "pairs": pair_correlations(x), "gradient": None, "gradient_pairs": {},
            }  # fmt: skip
            seen[path] = record  # the last call counts
            if gradients and first.requires_grad:

                def back(g: Tensor, record: dict[str, Any] = record) -> None:
                    record["gradient"] = float(g.double().square().mean())
                    record["gradient_pairs"] = pair_correlations(g)

                first.register_hook(back)

        handles.append(module.register_forward_hook(after, with_kwargs=True))

    for path, module in model.named_modules():
        if path:
            watch(path, module)
    args, kwargs = drawn(example, draw)
    with torch.set_grad_enabled(gradients):
        out = model(*args, **kwargs)
    if gradients:
        total: Tensor | None = None
        for t in _tensors(out):
            if t.is_floating_point() and t.requires_grad:
                part = (t * torch.randn_like(t)).sum()
                total = part if total is None else total + part
        if total is not None:
            total.backward()
    for handle in handles:
        handle.remove()
    for path, record in seen.items():
        figures = found.setdefault(path, Figures(record["kind"], record["leaf"], record["shape"]))
        figures.lengths.append(record["length"])
        figures.means.append(record["mean"])
        if record["gradient"] is not None:
            figures.gradients.append(record["gradient"])
        for key, c in record["pairs"].items():
            figures.correlations[key] = figures.correlations.get(key, 0.0) + c
        for key, c in record["gradient_pairs"].items():
            which = figures.gradient_correlations
            which[key] = which.get(key, 0.0) + c


def _tensors(out: Any) -> list[Tensor]:
    """The tensors of an output, dataclass-like ones too, each storage once."""
    found: list[Tensor] = []
    stack = [out]
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            if not any(value is t for t in found):
                found.append(value)
        elif isinstance(value, dict):
            stack += list(value.values())
        elif isinstance(value, tuple | list):
            stack += list(value)
    return found


def main(names: list[str]) -> None:
    """Measure cases in this process, for the disk."""
    import tests.conftest  # noqa: F401  (torchvision's operators)
    from tests.accuracy.models import cases

    for case in cases():
        if case.set in names or case.name in names:
            try:
                figures = measured(case)
                print(case.set, case.name, len(figures or {}), flush=True)
            except Exception as error:  # one model must not end the others
                text = str(error)[:120].replace("\n", " ")
                print(case.set, case.name, "FAILED", type(error).__name__, text, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
