"""Random ReLU networks of the papers: as a layer graph with exact laws, and as draws in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from archlint.graph.builder import GraphBuilder
from archlint.graph.model import LayerGraph
from archlint.initialization.distribution import Distribution, normal, uniform

Floats = npt.NDArray[np.float64]
TRUNCATED = 0.7737413035  # variance of N(0, 1) cut at ±2


def truncated_normal(std: float) -> Distribution:
    """N(0, std²) cut at ±2 std, not rescaled: the variance falls to 0.7737·std²."""
    a = 2.0
    density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    mass = math.erf(a / math.sqrt(2))
    second = 1 - 2 * a * density / mass
    fourth = 3 * second - 2 * a**3 * density / mass
    return Distribution("truncated_normal", 0.0, second * std**2, fourth / second**2)


@dataclass(frozen=True)
class Initializer:
    """The law of a weight by its fans, and how to draw it."""

    name: str
    law: Callable[[int, int], Distribution]

    def gain(self, fan_in: int, fan_out: int) -> float:
        """c = fan-in·E w²; 2 keeps the mean length of a ReLU network."""
        return fan_in * self.law(fan_in, fan_out).second_moment

    def draw(self, rng: np.random.Generator, draws: int, fan_in: int, fan_out: int) -> Floats:
        """``draws`` weights [fan_out, fan_in]."""
        law = self.law(fan_in, fan_out)
        shape = (draws, fan_out, fan_in)
        if law.family == "uniform":
            bound = math.sqrt(3 * law.second_moment)
            return rng.uniform(-bound, bound, shape)
        if law.family == "truncated_normal":
            z = rng.standard_normal(shape)
            while (outside := np.abs(z) > 2).any():
                z[outside] = rng.standard_normal(int(outside.sum()))
            return z * math.sqrt(law.second_moment / TRUNCATED)
        return rng.standard_normal(shape) * math.sqrt(law.second_moment)


HE_NORMAL = Initializer("he_normal", lambda i, o: normal(math.sqrt(2 / i)))
INITIALIZERS = (
    HE_NORMAL,
    Initializer("he_uniform", lambda i, o: uniform(-math.sqrt(6 / i), math.sqrt(6 / i))),
    Initializer("he_truncated", lambda i, o: truncated_normal(math.sqrt(2 / i))),
    Initializer("glorot_normal", lambda i, o: normal(math.sqrt(2 / (i + o)))),
    Initializer("glorot_uniform",
                lambda i, o: uniform(-math.sqrt(6 / (i + o)), math.sqrt(6 / (i + o)))),
    Initializer("lecun_normal", lambda i, o: normal(math.sqrt(1 / i))),
    Initializer("twice_he", lambda i, o: normal(math.sqrt(4 / i))),
)  # fmt: skip


def stack_graph(
    widths: Sequence[int], initializer: Initializer = HE_NORMAL, bias: float = 0.0,
    output: int = 0, activation: str = "relu",
) -> LayerGraph:  # fmt: skip
    """Fully connected ReLU layers over ``widths`` = (input, hidden …), then a linear layer to
    ``output`` where that is given; biases N(0, bias²)."""
    b = GraphBuilder("stack")
    value = b.input("x", (1, widths[0]))
    for j, (n, m) in enumerate(zip(widths, [*widths[1:], output], strict=False)):
        if m == 0:
            break
        weight = b.parameter(f"w{j}", (m, n), initializer.law(n, m))
        shift = b.parameter(f"b{j}", (m,), normal(bias)) if bias else None
        value = b.node("linear", [value, weight, shift], (1, m), name=f"z{j}")
        if j < len(widths) - 1 and activation:
            value = b.node(activation, [value], (1, m), name=f"a{j}")
    return b.finish([value])


def residual_graph(width: int, scales: Sequence[float]) -> LayerGraph:
    """h ← h + η·relu(W h) for every η."""
    b = GraphBuilder("residual")
    value = b.input("x", (1, width))
    for j, scale in enumerate(scales):
        weight = b.parameter(f"w{j}", (width, width), HE_NORMAL.law(width, width))
        inner = b.node("linear", [value, weight, None], (1, width), name=f"z{j}")
        inner = b.node("relu", [inner], (1, width), name=f"a{j}")
        inner = b.node("mul", [inner, b.constant(np.float32(scale))], (1, width), name=f"s{j}")
        value = b.node("add", [value, inner], (1, width), name=f"h{j}")
    return b.finish([value])


def lengths(
    rng: np.random.Generator, x: Floats, widths: Sequence[int], draws: int,
    initializer: Initializer = HE_NORMAL,
) -> Iterator[Floats]:  # fmt: skip
    """M_j = ‖a_j‖²/n_j of every layer, a number a draw; ``x`` [draws, n₀] or [n₀]."""
    a = np.broadcast_to(x, (draws, widths[0]))
    for n, m in itertools.pairwise(widths):
        weight = initializer.draw(rng, draws, n, m)
        a = np.maximum(np.matmul(weight, a[:, :, None])[:, :, 0], 0.0)
        yield np.square(a).mean(axis=1)
