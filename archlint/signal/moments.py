"""The abstract value: what is known of a tensor over random weights and random inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from archlint.signal.laws import Law

Role = Literal["sample", "position", "feature"]
Factors = tuple[tuple[Role, int], ...]  # what a dimension is made of, outer ones first
Group = frozenset[str]  # parameters whose common sign flip is meant


@dataclass(frozen=True, eq=False)
class Nearby:
    """E[v v′]/E v² of two positions by how far apart they lie along ``axes``: an array with zero
    displacement in its middle; ``far`` for what lies outside it (signal.neighbours)."""

    axes: tuple[int, ...]
    values: npt.NDArray[np.float64]
    far: float

    def at(self, shift: tuple[int, ...] | None) -> float:
        """At a displacement; None is far away."""
        if shift is None:
            return self.far
        place = [n // 2 + d for n, d in zip(self.values.shape, shift, strict=True)]
        inside = all(0 <= i < n for i, n in zip(place, self.values.shape, strict=True))
        return float(self.values[tuple(place)]) if inside else self.far


@dataclass(frozen=True)
class Signal:
    """Moments of a tensor's elements over initializations and inputs; None is *unknown*.

    ``mean`` = E v and ``second_moment`` = E v² per element, averaged over the tensor.
    ``position_correlation`` = E[v v′]/E v² for two positions of one sample and the same feature,
    ``sample_correlation`` the same for one position of two samples, ``cross_correlation`` for
    different positions of different samples; all in [−1, 1]. Where a tensor has no positions (or
    no samples) the pairs that differ there are no pairs: position_correlation is then 1, and
    cross_correlation the sample_correlation.
    ``odd_in``: groups of parameters, newest last; flipping the signs of all parameters of one
    group flips this tensor, so that E[v·u] = 0 exactly for every u that depends on none of them.
    ``one_sided``: no element can be negative (+1) or positive (−1); 0 otherwise.
    ``roles``: what each dimension indexes; ``parts``: where a reshape has merged dimensions, what
    each consists of, outer ones first, as (role, size). ``profile``: the second moment along an
    axis relative to its mean (zero padding), axis -> values, as a product over axes.
    ``shared``: of a product of matrices, axis -> E[v v′]/E v² of two elements that differ along
    it only. Of other tensors that is the mean's square along features
    (:meth:`between_features`), and the correlation above along positions. ``windows_share``: by how
    much position_correlation was above cross_correlation when positions were merged with samples.
    ``law``: of an element that is known not to be normal (signal.laws).
    ``nearby``: where neighbours are more alike than other positions, by how much.
    """

    mean: float | None = None
    second_moment: float | None = None
    position_correlation: float | None = None
    sample_correlation: float | None = None
    odd_in: tuple[Group, ...] = ()
    one_sided: int = 0
    roles: tuple[Role, ...] = ()
    profile: dict[int, npt.NDArray[np.float64]] = field(default_factory=dict, compare=False)
    gaussian: bool = False  # whether the elements are (nearly) normal over initializations
    cross_correlation: float | None = None
    parts: tuple[Factors, ...] = ()
    shared: Mapping[int, float] = field(default_factory=dict, compare=False)
    windows_share: float = 0.0
    law: Law | None = field(default=None, compare=False)
    nearby: Nearby | None = field(default=None, compare=False)

    @property
    def known(self) -> bool:
        """Whether the second moment is known."""
        return self.second_moment is not None

    @property
    def rms(self) -> float | None:
        """√E v², or None where unknown."""
        return None if self.second_moment is None else math.sqrt(max(self.second_moment, 0.0))

    @property
    def variance(self) -> float | None:
        """E v² − (E v)², or None where unknown."""
        if self.second_moment is None or self.mean is None:
            return None
        return max(self.second_moment - self.mean * self.mean, 0.0)

    @property
    def apart(self) -> float | None:
        """The cross correlation; where it is not known, the lesser of the two others."""
        if self.cross_correlation is not None:
            return self.cross_correlation
        if self.position_correlation is None or self.sample_correlation is None:
            return None
        return min(self.position_correlation, self.sample_correlation)

    def between_features(self, axis: int) -> float | None:
        """E[v v′]/E v² of two elements that differ along an axis of features only."""
        if axis in self.shared:
            return self.shared[axis]
        if self.mean is None or self.second_moment is None:
            return None
        return 1.0 if self.second_moment <= 0 else min(self.mean**2 / self.second_moment, 1.0)

    def but(self, **changes: object) -> Self:
        """A copy with some fields replaced."""
        made = object.__new__(type(self))
        made.__dict__.update(self.__dict__, **changes)  # a fraction of what `replace` takes
        if len(made.__dict__) != len(self.__dict__):
            raise TypeError(f"a signal has no {', '.join(changes.keys() - self.__dict__.keys())}")
        return made


UNKNOWN_SIGNAL = Signal()


@dataclass(frozen=True)
class Prediction(Signal):
    """A signal with its gradient, and with how far single draws lie from both.

    ``grad_second_moment``, ``grad_position_correlation``: as of the signal, of ∂⟨output, ξ⟩/∂v,
    ξ ~ N(0,1). ``spread`` = Var ln M over initializations, of the mean square M of one sample's
    elements, its input given; ``shortfall`` = ln E M − E ln M, by which a typical draw is shorter
    (theory.md 5). ``grad_spread``, ``grad_shortfall``: the same of the squared gradient.
    """

    grad_second_moment: float | None = None
    grad_position_correlation: float | None = None
    spread: float | None = None
    shortfall: float | None = None
    grad_spread: float | None = None
    grad_shortfall: float | None = None


UNKNOWN_PREDICTION = Prediction()
