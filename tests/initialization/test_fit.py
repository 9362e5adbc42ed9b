"""What an array looks like: the family, its scale, the initializer; and what was trained."""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group, truncnorm

from archlint.initialization.fit import fit
from archlint.initialization.initializers import Fans
from archlint.initialization.moments import moments

Array = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, tuple[int, ...]], Array]

FAMILIES: dict[str, Draw] = {
    "normal": lambda rng, shape: rng.normal(0, 0.02, shape),
    "uniform": lambda rng, shape: rng.uniform(-0.1, 0.1, shape),
    "truncated_normal": lambda rng, shape: truncnorm.rvs(-2, 2, scale=0.02, size=shape,
                                                         random_state=rng),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(64, 64), (512, 256), (64, 32, 3, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_families_and_scales(family: str, shape: tuple[int, ...], seed: int) -> None:
    array = FAMILIES[family](np.random.default_rng(seed), shape).astype(np.float32)
    law = fit(array)
    # With a few thousand elements the tails of a truncated normal do not show yet.
    alike = {family, "normal"} if family == "truncated_normal" and array.size < 20_000 else {family}
    assert law.family in alike
    assert law.count == array.size
    # Σw² of n draws is off by √(kurtosis − 1)/√n at most 4 times in 15,000
    error = 4 * math.sqrt((law.kurtosis - 1) / array.size)
    true = {"normal": 0.02**2, "uniform": 0.1**2 / 3, "truncated_normal": 0.02**2 * 0.774}[family]
    assert law.second_moment == pytest.approx(true, rel=error)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.3])
def test_constants_are_exact(value: float) -> None:
    law = fit(np.full((7, 5), value, np.float32))
    assert law.family == {0.0: "zeros", 1.0: "ones"}.get(value, "constant")
    assert law.mean == np.float32(value)
    assert law.exact


def test_orthogonal() -> None:
    matrix = ortho_group.rvs(64, random_state=0).astype(np.float32)
    assert fit(matrix).family == "orthogonal"
    assert fit(2 * matrix[:32]).family == "orthogonal"


@pytest.mark.parametrize(
    ("name", "std"),
    [
        ("kaiming_uniform_(a=sqrt(5))", 1 / math.sqrt(3 * 256)),
        ("xavier_uniform_", math.sqrt(2 / (256 + 128))),
    ],
)
def test_known_initializers_are_named(name: str, std: float) -> None:
    rng = np.random.default_rng(1)
    array = rng.uniform(-1, 1, (128, 256)) * std * math.sqrt(3)
    law = fit(array.astype(np.float32), Fans(256, 128))
    assert name.split("(")[0] in law.initializer
    assert law.second_moment == pytest.approx(std**2, rel=0.02)


def trained() -> dict[str, Array]:
    """What training leaves behind: low rank, heavy tails, rows of unequal size, smooth filters."""
    rng = np.random.default_rng(3)
    start = rng.normal(0, 0.05, (128, 128))
    taps = np.exp(-(np.linspace(-2, 2, 7) ** 2))
    return {
        "low rank": start + 0.02 * rng.normal(size=(128, 4)) @ rng.normal(size=(4, 128)),
        "heavy tails": rng.standard_t(3, (128, 128)) * 0.03,
        "unequal rows": start * np.exp(rng.normal(0, 0.5, (128, 1))),
        "smooth filters": rng.normal(size=(64, 16, 1, 1)) * np.outer(taps, taps)
        + 0.05 * rng.normal(size=(64, 16, 7, 7)),
    }


@pytest.mark.parametrize("kind", trained())
def test_trained_weights_are_no_draw(kind: str) -> None:
    assert fit(trained()[kind].astype(np.float32)).family == "trained"


def test_draws_are_seldom_called_trained() -> None:
    """300 draws of three families and four shapes: a false alarm is a thing of one in hundreds."""
    rng = np.random.default_rng(5)
    shapes = [(32, 32), (16, 8, 3, 3), (200, 100), (10, 500)]
    false = 0
    for i in range(300):
        draw = FAMILIES[list(FAMILIES)[i % 3]]
        false += fit(draw(rng, shapes[i % 4]).astype(np.float32)).family == "trained"
    assert false <= 2


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_precisions(dtype: type[np.generic]) -> None:
    array = np.random.default_rng(0).normal(0, 0.02, (256, 256)).astype(dtype)
    law = fit(array)
    assert law.family == "normal"
    assert law.std == pytest.approx(0.02, rel=0.02)


# --------------------------------------------------------------------------- moments


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 12), min_size=0, max_size=4),
    log_scale=st.floats(-30, 30),
    seed=st.integers(0, 2**31),
    turned=st.booleans(),
    single=st.booleans(),
)
def test_moments_are_those_of_numpy(
    shape: list[int], log_scale: float, seed: int, turned: bool, single: bool
) -> None:
    array = np.random.default_rng(seed).standard_normal(shape) * 10.0**log_scale
    array = array.astype(np.float32) if single else array
    array = np.asarray(array).T if turned else np.asarray(array)
    m, exact = moments(array), array.astype(np.longdouble).reshape(-1)
    assert m.count == array.size
    assert m.total == pytest.approx(
        float(exact.sum()), rel=1e-5, abs=1e-6 * float(abs(exact).sum())
    )
    assert m.squares == pytest.approx(float((exact**2).sum()), rel=1e-5)
    assert m.fourths == pytest.approx(float((exact**4).sum()), rel=1e-5)
    assert (m.low, m.high) == (array.min(), array.max())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6), times=st.integers(1, 9), seed=st.integers(0, 2**31),
    bad=st.sampled_from([None, math.nan, math.inf, -math.inf]),
)  # fmt: skip
def test_repeated_elements_count_as_often(
    rows: int, times: int, seed: int, bad: float | None
) -> None:
    """A broadcast array has the moments of its copy, without being made."""
    one = np.random.default_rng(seed).standard_normal((rows, 1)).astype(np.float32)
    if bad is not None:
        one[-1] = bad
    wide = np.broadcast_to(one, (rows, times))
    found, wanted = moments(wide), moments(wide.copy())
    assert (found.count, found.bad) == (wanted.count, wanted.bad)
    assert found.squares == pytest.approx(wanted.squares, rel=1e-5)
    assert found.first_bad == wanted.first_bad
