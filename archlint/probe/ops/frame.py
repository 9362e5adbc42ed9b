"""What the families share: the table of kernels and what a kernel is told of its node.

A kernel takes the node's inputs as tensors (None for one left out) and gives its outputs. It keeps
to what ``torch.func.vmap`` and autograd understand: no writing in place, no branch on elements,
unless the op's result has a size that depends on the elements.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from archlint.graph.model import Mode, Node, Value
from archlint.graph.ops import OPS

if TYPE_CHECKING:
    from archlint.probe.execute import Program

Outputs = Tensor | tuple[Tensor | None, ...]
Kernel = Callable[..., Outputs]
KERNELS: dict[str, Kernel] = {}


class CannotExecute(Exception):
    """A node, or a form of it, that cannot be computed; the text says which and why."""


@dataclass(frozen=True)
class Call:
    """One node as its kernel sees it. ``values`` are its declared outputs, ``real`` is the dtype
    of floats (None: each value's own)."""

    node: Node
    attributes: Mapping[str, Any]
    values: tuple[Value, ...]
    mode: Mode
    real: torch.dtype | None
    device: torch.device
    body: Program | None = None
    memory: dict[Any, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        return self.attributes[name]

    @property
    def shape(self) -> tuple[int | None, ...] | None:
        """The declared shape of the first output."""
        return self.values[0].shape

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the first output as it is computed."""
        return torch_dtype(self.values[0].dtype, self.real)

    def remembered(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once a node: index arrays and weights of taps."""
        if key not in self.memory:
            self.memory[key] = make()
        return self.memory[key]


def computes(*ops: str) -> Callable[[Kernel], Kernel]:
    """Register a kernel for ops of the vocabulary."""

    def register(kernel: Kernel) -> Kernel:
        for op in ops:
            if op not in OPS:
                raise ValueError(f"{op} is not in the vocabulary")
            if op in KERNELS:
                raise ValueError(f"{op} has two kernels")
            KERNELS[op] = kernel
        return kernel

    return register


_FLOATS = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32,
           "float64": torch.float64}  # fmt: skip
# Unsigned integers that torch hardly computes with are held in the next larger signed type.
_OTHERS = {"int8": torch.int8, "int16": torch.int16, "int32": torch.int32, "int64": torch.int64,
           "uint8": torch.uint8, "uint16": torch.int32, "uint32": torch.int64,
           "uint64": torch.int64, "bool": torch.bool, "int4": torch.int8, "uint4": torch.uint8,
           "int2": torch.int8, "uint2": torch.uint8}  # fmt: skip


def torch_dtype(name: str | None, real: torch.dtype | None) -> torch.dtype | None:
    """The dtype in which a value is held; None where it is not told."""
    if name is None:
        return None
    if name.startswith("complex"):
        wide = real == torch.float64 or (real is None and name == "complex128")
        return torch.complex128 if wide else torch.complex64
    if "float" in name:
        return real if real is not None else _FLOATS.get(name, torch.float32)
    return _OTHERS.get(name)
