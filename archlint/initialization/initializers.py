"""The initializers that people use, and what they give for a weight of a given shape.

Standard deviations follow the sources of torch.nn.init, Keras, Flax, timm and transformers.
Truncation at ±2σ multiplies the standard deviation by 0.87963 (variance by 0.7737); Keras and Flax
divide it out again, older Keras and plain truncated_normal do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Role = Literal["linear", "conv", "conv_transpose", "embedding", "recurrent", "bias", "other"]
Shape = Literal["normal", "uniform", "truncated_normal"]

TRUNCATED_STD = 0.8796256610342398
"""Standard deviation of N(0, 1) cut at ±2: √(1 − 4φ(2)/(2Φ(2) − 1))."""

_LAYERS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 18, 20, 22, 24, 28, 30, 32, 36, 40, 48, 64, 80, 96)


@dataclass(frozen=True, slots=True)
class Fans:
    """What initializers are computed from: torch's fans of a weight, hidden size, row length.

    These are the fans as the *initializer* counts them (torch.nn.init counts a transposed
    convolution on the output side and ignores groups in fan_out), not the true ones.
    """

    fan_in: int
    fan_out: int
    role: Role = "linear"
    groups: int = 1
    hidden: int | None = None
    features: int | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """A known initializer: its law's shape, mean and standard deviation, and how to write it.

    ``common`` orders initializers that give the same number: lower is likelier meant.
    """

    shape: Shape
    std: float
    text: str
    mean: float = 0.0
    common: int = 1

    @property
    def bound(self) -> float:
        """Half the width of a uniform law."""
        return self.std * math.sqrt(3.0)


def fans_of(
    shape: Sequence[int],
    role: Role = "linear",
    input_axis: int = 1,
    groups: int = 1,
    hidden: int | None = None,
) -> Fans | None:
    """The fans that initializers compute from a weight of this shape; None for vectors.

    ``input_axis`` is the contracted axis of a 2-D weight: 1 for [out, in], 0 for [in, out].
    A recurrent weight is [directions, gates·hidden, in].
    """
    if any(n <= 0 for n in shape):
        return None
    if role == "embedding" and len(shape) == 2:
        return Fans(shape[1], shape[0], role, features=shape[1])
    if role == "recurrent" and len(shape) == 3:
        return Fans(shape[2], shape[1], role, hidden=hidden)
    if len(shape) < 2:
        return None
    if len(shape) == 2:
        inside, outside = (shape[1], shape[0]) if input_axis == 1 else (shape[0], shape[1])
        return Fans(inside, outside, role, groups)
    taps = math.prod(shape[2:])
    return Fans(shape[1] * taps, shape[0] * taps, role, groups)


def known_initializers(fans: Fans | None) -> tuple[Known, ...]:
    """All known initializers for a weight with these fans, likelier ones first."""
    found = list(_fixed())
    if fans is not None:
        found += list(_scaled(fans))
    return tuple(sorted(found, key=lambda k: k.common))


def _uniform(bound: float, text: str, common: int = 1) -> Known:
    return Known("uniform", bound / math.sqrt(3.0), text, common=common)


def _fixed() -> Iterator[Known]:
    """Initializers that do not look at the shape."""
    yield Known("normal", 1.0, "normal_(0, 1)")
    for std in (0.02, 0.01, 0.1, 0.05, 0.001, 0.5, 0.2, 0.03, 0.04, 0.006, 0.002, 0.005, 1e-4):
        yield Known("normal", std, f"normal_(0, {std:g})", common=2)
        yield Known(
            "truncated_normal", std * TRUNCATED_STD, f"truncated_normal(std={std:g})", common=2
        )
        yield Known("truncated_normal", std, f"truncated_normal(std={std:g}), corrected", common=4)
    yield Known("truncated_normal", TRUNCATED_STD, "trunc_normal_(0, 1, -2, 2)")
    yield Known("normal", 0.02, "normal_(1, 0.02)", mean=1.0)
    for layers in _LAYERS:
        std = 0.02 / math.sqrt(2 * layers)
        yield Known("normal", std, f"normal_(0, 0.02/sqrt(2*{layers}))", common=5)
    for bound in (0.05, 0.1, 0.08, 1.0, 0.01, 3e-3, 0.5, 0.02, 1e-3):
        yield _uniform(bound, f"uniform_(-{bound:g}, {bound:g})", 2)
    yield Known("uniform", math.sqrt(1 / 12), "uniform_(0, 1)", mean=0.5)


_RELU, _TANH = math.sqrt(2.0), 5.0 / 3.0


def _scaled(fans: Fans) -> Iterator[Known]:
    """Initializers that scale with the fans."""
    into, out = fans.fan_in, fans.fan_out
    both = (into + out) / 2
    yield _uniform(1 / math.sqrt(into), "kaiming_uniform_(a=sqrt(5))", 0)
    if fans.hidden:
        yield _uniform(1 / math.sqrt(fans.hidden), "uniform_(±1/sqrt(hidden))", 0)
    if fans.features:
        yield Known("normal", fans.features**-0.5, "normal_(0, 1/sqrt(features))")
        yield _uniform(fans.features**-0.5, "uniform_(±1/sqrt(features))")
        yield _uniform(1 / fans.fan_out, "uniform_(±1/count)")
    relu, plain = "nonlinearity='relu'", "nonlinearity='linear'"
    yield from _pair("kaiming", relu, _RELU / math.sqrt(into))
    yield from _pair("kaiming", f"mode='fan_out', {relu}", _RELU / math.sqrt(out), 2)
    yield from _pair("xavier", "", 1 / math.sqrt(both))
    yield from _pair("xavier", "gain=5/3", _TANH / math.sqrt(both), 3)
    yield from _pair("xavier", "gain=sqrt(2)", _RELU / math.sqrt(both), 3)
    yield from _pair("kaiming", plain, 1 / math.sqrt(into), 2)
    yield from _pair("kaiming", f"mode='fan_out', {plain}", 1 / math.sqrt(out), 3)
    yield from _pair("kaiming", "nonlinearity='tanh'", _TANH / math.sqrt(into), 4)
    yield from _pair("kaiming", "nonlinearity='selu'", 0.75 / math.sqrt(into), 4)
    for slope in (0.2, 0.1, 0.3, 0.25, 0.01):
        gain = math.sqrt(2 / (1 + slope * slope))
        yield from _pair("kaiming", f"a={slope:g}", gain / math.sqrt(into), 3)
    yield Known("normal", math.sqrt(1 / 3 / into), "kaiming_normal_(a=sqrt(5))", common=4)
    if fans.groups > 1:
        std = math.sqrt(2 * fans.groups / out)
        yield Known("normal", std, "normal_(0, sqrt(2/(k²·C_out/groups)))", common=2)
    if into == out:  # one third of a joint q, k, v projection
        yield _uniform(math.sqrt(6 / (4 * into)), "xavier_uniform_ of a joint (3·E, E)", 1)
        yield Known("normal", math.sqrt(2 / (5 * into)), "normal_(0, sqrt(2/(5·d)))", common=4)
    yield _uniform(1 / into, "uniform_(±1/fan_in)", 4)
    yield _uniform(math.sqrt(6 / into) / 30, "uniform_(±sqrt(6/fan_in)/30)", 4)
    for name, std, common in (
        ("he_normal", math.sqrt(2 / into), 1),
        ("glorot_normal", math.sqrt(1 / both), 1),
        ("lecun_normal", math.sqrt(1 / into), 1),
        ("variance_scaling(2, 'fan_out')", math.sqrt(2 / out), 2),
        ("variance_scaling(1, 'fan_out')", math.sqrt(1 / out), 3),
    ):
        yield Known("truncated_normal", std, f"{name} (truncated, corrected)", common=common)
        yield Known(
            "truncated_normal", std * TRUNCATED_STD, f"{name} (truncated)", common=common + 2
        )


def _pair(name: str, arguments: str, std: float, common: int = 1) -> Iterator[Known]:
    """The normal and the uniform form of one initializer."""
    yield Known("normal", std, f"{name}_normal_({arguments})", common=common)
    yield Known("uniform", std, f"{name}_uniform_({arguments})", common=common)


def bias_initializers(fan_in: float | None) -> tuple[Known, ...]:
    """Random initializers of a bias: torch's default, and the fixed ones."""
    found = list(_fixed())
    if fan_in:
        found.insert(0, _uniform(1 / math.sqrt(fan_in), "uniform_(±1/sqrt(fan_in))", 0))
    return tuple(sorted(found, key=lambda k: k.common))
