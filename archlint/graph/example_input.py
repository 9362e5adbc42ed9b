"""One way to call a model: what its tensors are, without their elements."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

SAMPLES = 2  # more than one: a correlation between samples exists, and batch statistics are defined
LENGTH = 32


@dataclass(frozen=True)
class Spec:
    """A tensor to make: shape, dtype, and one past the largest integer it may hold.

    ``elements`` says what it holds where that is no matter of data: a mask, sizes of images.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    high: int = 2
    elements: Tensor | None = field(default=None, compare=False, repr=False)

    def on_meta(self) -> Tensor:
        """Without elements, or with those that are known kept beside it."""
        made = torch.empty(self.shape, dtype=self.dtype, device="meta")
        if self.elements is not None:
            made._archlint_elements = self.elements  # type: ignore[attr-defined]
        return made

    def drawn(self, generator: torch.Generator) -> Tensor:
        """Standard normal numbers, or integers below ``high``."""
        if self.elements is not None:
            return self.elements.clone()
        if self.dtype == torch.bool:
            return torch.ones(self.shape, dtype=torch.bool)
        if self.dtype.is_floating_point or self.dtype.is_complex:
            return torch.randn(self.shape, generator=generator).to(self.dtype)
        return torch.randint(0, max(self.high, 1), self.shape, generator=generator).to(self.dtype)


@dataclass(frozen=True)
class Example:
    """One way to call a model. ``assumed`` says whether it was deduced, not given.

    ``completes`` says that it is the one before with what may be left out, such as masks: for
    models that look at their data to see whether they need them.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    assumed: bool = True
    completes: bool = False

    def on_meta(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, without elements where none were given."""
        return self._made(Spec.on_meta)

    def drawn(self, seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with random elements."""
        generator = torch.Generator().manual_seed(seed)
        return self._made(lambda spec: spec.drawn(generator))

    def _made(self, make: Callable[[Spec], Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = pytree.tree_map_only(Spec, make, (self.args, dict(self.kwargs)))
        return args, kwargs


def parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of ``forward``, without ``self``."""
    schema = (
        attribute(model.forward, "schema") if isinstance(model, torch.jit.ScriptModule) else None
    )
    if schema is not None:  # a traced forward has no other signature
        return [
            inspect.Parameter(
                argument.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value
                if argument.has_default_value()
                else inspect.Parameter.empty,
            )
            for argument in schema.arguments[1:]
            if not argument.kwarg_only
        ]
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return []


def required_of(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of ``forward`` that must be given."""
    fixed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p for p in parameters_of(model) if p.default is p.empty and p.kind not in fixed]


def names_of(model: nn.Module) -> frozenset[str]:
    """The names of the parameters of ``forward``."""
    return frozenset(p.name for p in parameters_of(model))


def attribute(owner: Any, name: str) -> Any:
    """An attribute of a model or of its configuration, None where it has none or refuses to tell:
    some are computed, and some configurations have other values for every layer."""
    try:
        return getattr(owner, name, None)
    except Exception:  # whatever a property raises
        return None


def known(elements: Tensor) -> Spec:
    """A tensor whose elements are no matter of data."""
    return Spec(tuple(elements.shape), elements.dtype, 1, elements)


def layers_of(model: nn.Module) -> Iterator[nn.Module]:
    """The modules with parameters of their own, in the order they were registered."""
    for module in model.modules():
        if (
            "parametrizations" in module._modules
            or isinstance(module, nn.RNNBase)
            or (
                next(module.parameters(recurse=False), None) is not None
                and not isinstance(module, ParametrizationList)
            )
        ):  # weights that are computed from others
            yield module


def vocabulary_of(model: nn.Module) -> int:
    """An integer that every embedding has a row for is below this."""
    counts = [
        m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)
    ]
    return max(min(counts, default=2), 1)
