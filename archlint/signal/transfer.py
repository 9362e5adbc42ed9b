"""The registry of transfer functions: op -> what it does to signals, found family by family.

A transfer function gets a :class:`Step` and returns one Signal per output. Adding an op to the
analysis is one function in its family's file. What a function cannot tell it leaves None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from archlint.graph.model import Array, LayerGraph, Node, Parameter
from archlint.graph.ops import attribute
from archlint.signal.dependence import Dependence
from archlint.signal.moments import UNKNOWN_SIGNAL, Factors, Group, Role, Signal

Transfer = Callable[["Step"], "Signal | Sequence[Signal]"]
TRANSFER: dict[str, Transfer] = {}


def transfers(*ops: str) -> Callable[[Transfer], Transfer]:
    """Register the transfer function of ops."""

    def register(function: Transfer) -> Transfer:
        for op in ops:
            if op in TRANSFER:
                raise ValueError(f"op {op!r} has two transfer functions")
            TRANSFER[op] = function
        return function

    return register


@dataclass(frozen=True, slots=True)
class Step:
    """One node with the signals of its inputs, and what these have in common."""

    graph: LayerGraph
    node: Node
    signals: Mapping[str, Signal]
    dependence: Dependence

    def signal(self, i: int) -> Signal:
        """The signal of input ``i``; unknown where it is left out."""
        value = self.value(i)
        return UNKNOWN_SIGNAL if value is None else self.signals.get(value, UNKNOWN_SIGNAL)

    def value(self, i: int) -> str | None:
        """The value id of input ``i``, None where left out."""
        return self.node.inputs[i] if i < len(self.node.inputs) else None

    def has(self, i: int) -> bool:
        """Whether input ``i`` is given."""
        return self.value(i) is not None

    def shape(self, i: int) -> tuple[int | None, ...] | None:
        """The shape of input ``i``."""
        return self.graph.shape(self.value(i))

    def out_shape(self, i: int = 0) -> tuple[int | None, ...] | None:
        """The shape of output ``i``."""
        return self.graph.shape(self.node.outputs[i])

    def parameter(self, i: int) -> Parameter | None:
        """The parameter that input ``i`` is."""
        return self.graph.parameter(self.value(i))

    def constant(self, i: int) -> Array | None:
        """The known elements of input ``i``."""
        return self.graph.constant(self.value(i))

    def attribute(self, name: str) -> object:
        """An attribute or its default."""
        return attribute(self.node.op, self.node.attributes, name)

    def number(self, name: str) -> float:
        """A numeric attribute or its default."""
        value = self.attribute(name)
        if not isinstance(value, int | float):
            raise TypeError(f"{self.node.op}.{name} is {value!r}")
        return float(value)

    def ints(self, name: str) -> tuple[int, ...]:
        """An attribute that is a tuple of integers."""
        value = self.attribute(name)
        if not isinstance(value, tuple):
            raise TypeError(f"{self.node.op}.{name} is {value!r}")
        return tuple(int(n) for n in value if not isinstance(n, str | tuple))

    def depend(self, i: int, j: int) -> bool:
        """Whether two inputs are functions, element by element, of the same random numbers."""
        a, b = self.value(i), self.value(j)
        return a is not None and b is not None and self.dependence.common(a, b)


def factors(x: Signal, shape: tuple[int | None, ...] | None) -> tuple[Factors, ...] | None:
    """What each dimension is made of: one factor unless a reshape has merged several. None where
    roles or sizes are not known."""
    if shape is None or len(x.roles) != len(shape) or None in shape:
        return None
    found: list[Factors] = []
    for axis, (role, n) in enumerate(zip(x.roles, shape, strict=True)):
        parts = x.parts[axis] if len(x.parts) == len(shape) else ()
        known = parts and math.prod(size for _, size in parts) == n
        found.append(parts if known else ((role, n or 0),))
    return tuple(found)


def count_of(
    x: Signal, shape: tuple[int | None, ...] | None, axes: Sequence[int], role: Role
) -> int | None:
    """How many samples, positions or features some dimensions index together."""
    made = factors(x, shape)
    if made is None:
        return None
    return math.prod(n for a in axes for r, n in made[a] if r == role)


def known_size(shape: tuple[int | None, ...] | None, axes: Sequence[int]) -> int | None:
    """The product of some dimensions, None where one is unknown."""
    if shape is None:
        return None
    product = 1
    for axis in axes:
        n = shape[axis]
        if n is None:
            return None
        product *= n
    return product


def of_parameter(parameter: Parameter) -> Signal:
    """A weight read as a tensor: its elements are independent draws, the same for every sample."""
    law = parameter.law
    roles: tuple[Role, ...] = tuple("feature" for _ in parameter.shape)
    if law is None or not math.isfinite(law.second_moment):
        return Signal(roles=roles)
    fixed = 1.0 if law.second_moment == 0 else law.mean**2 / law.second_moment
    odd = (frozenset({parameter.name}),) if law.symmetric and law.random else ()
    side = 0
    if not law.random and law.variance == 0:
        side = (law.mean > 0) - (law.mean < 0)
    if law.family == "deterministic" and len(parameter.shape) > 1:
        fixed = row_correlation(parameter) or fixed
    return Signal(law.mean, law.second_moment, fixed, 1.0, odd, side, roles,
                  gaussian=law.family == "normal", cross_correlation=fixed)  # fmt: skip


_LARGEST_TABLE = 1 << 22  # elements up to which a table is looked at


def row_correlation(parameter: Parameter, rows: Array | None = None) -> float | None:
    """E[v v′]/E v² of one feature at two rows of a table that is not random, such as sinusoids by
    position; features lie along the last axis, or the second of [1, features, height, width].
    ``rows`` picks some. None where the elements are not at hand."""
    size = math.prod(parameter.shape)
    if parameter.load is None or not 0 < size <= _LARGEST_TABLE:
        return None
    return between_rows(np.asarray(parameter.load(), dtype=np.float64), rows)


def between_rows(table: npt.NDArray[np.float64], rows: Array | None = None) -> float | None:
    """The same of its elements."""
    if table.ndim == 4 and table.shape[0] == 1:
        table = np.moveaxis(table, 1, -1)
    table = table.reshape(-1, table.shape[-1])
    if rows is not None:
        table = table[rows.reshape(-1)]
    n, second = table.shape[0], float(np.square(table).mean())
    if n < 2 or second <= 0 or not math.isfinite(second):
        return None
    return float((n * float(np.square(table.mean(axis=0)).mean()) / second - 1) / (n - 1))


def of_constant(array: Array) -> Signal:
    """A known tensor: the same for every sample."""
    roles: tuple[Role, ...] = tuple("feature" for _ in array.shape)
    if array.dtype.kind not in "iufb" and "float" not in array.dtype.name:
        return Signal(roles=roles)
    numbers = array.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    if finite.size == 0:
        return Signal(roles=roles)
    mean, second = float(finite.mean()), float(np.square(finite).mean())
    side = int(finite.min() >= 0) - int(finite.max() <= 0)
    correlation = 1.0 if second == 0 else min(mean * mean / second, 1.0)
    if array.ndim in (2, 3) and array.dtype.kind not in "iub" and (
            finite.size == array.size <= _LARGEST_TABLE):  # fmt: skip
        correlation = between_rows(numbers) or correlation
    return Signal(mean, second, correlation, 1.0, (), side, roles,
                  cross_correlation=correlation)  # fmt: skip


def merged_groups(*groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The flip groups that all tensors have in common, in the first one's order."""
    first, *rest = groups
    return tuple(g for g in first if all(g in other for other in rest))


def correlated(covariance: float | None, second_moment: float | None) -> float | None:
    """covariance/second_moment held to [−1, 1]; 1 for a tensor of zeros."""
    if covariance is None or second_moment is None:
        return None
    if second_moment <= 0:
        return 1.0
    return min(max(covariance / second_moment, -1.0), 1.0)


def paired(x: Signal, f: Callable[[float], float | None]) -> dict[str, object]:
    """The three correlations of an output from those of its input, as fields: ``f`` maps a
    correlation of the input to one of the output. What is not known stays so."""

    def through(correlation: float | None) -> float | None:
        return None if correlation is None else f(correlation)

    return {
        "position_correlation": through(x.position_correlation),
        "sample_correlation": through(x.sample_correlation),
        "cross_correlation": through(x.apart),
    }


def both_paired(
    a: Signal, b: Signal, f: Callable[[float, float], float | None]
) -> dict[str, object]:
    """The same for two inputs."""

    def through(c: float | None, d: float | None) -> float | None:
        return None if c is None or d is None else f(c, d)

    return {
        "position_correlation": through(a.position_correlation, b.position_correlation),
        "sample_correlation": through(a.sample_correlation, b.sample_correlation),
        "cross_correlation": through(a.apart, b.apart),
    }


def product(correlation: float | None, second_moment: float | None) -> float | None:
    """correlation·second_moment, None where either is unknown."""
    if correlation is None or second_moment is None:
        return None
    return correlation * second_moment


def without_positions(x: Signal) -> Signal:
    """What is true of a tensor that has no two positions."""
    return x.but(position_correlation=1.0, cross_correlation=x.sample_correlation)
