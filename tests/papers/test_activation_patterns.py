"""Hanin & Rolnick 2019, Deep ReLU networks have surprisingly few activation patterns
(arXiv 1906.00904) and Complexity of linear regions (1901.09021): counts of regions at
initialization, in one and two dimensions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from tests.papers.networks import Floats

Layers = list[tuple[Floats, Floats]]


def _network(rng: np.random.Generator, inputs: int, widths: list[int], bias: float) -> Layers:
    """He weights, N(0, bias²) biases."""
    layers = []
    for n, m in zip([inputs, *widths], widths, strict=False):
        layers.append((rng.standard_normal((m, n)) * math.sqrt(2 / n),
                       bias * rng.standard_normal(m)))  # fmt: skip
    return layers


def _breakpoints(layers: Layers) -> list[np.ndarray]:
    """The places on the infinite line where a neuron switches, neuron layer by neuron layer.

    Between two breakpoints of the layers before, a pre-activation is α·x + β.
    """
    edges = np.array([-np.inf, np.inf])
    slope, offset = np.ones((1, 1)), np.zeros((1, 1))  # of every segment: [segments, features]
    found = []
    for j, (weight, bias) in enumerate(layers):
        alpha, beta = slope @ weight.T, offset @ weight.T + bias
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = -beta / alpha
        inside = (zero > edges[:-1, None]) & (zero < edges[1:, None])
        new = zero[inside]
        found.append(new)
        if j == len(layers) - 1:
            break
        cuts = np.sort(new)
        before = np.searchsorted(edges[1:-1], cuts, side="right")
        order = np.argsort(np.concatenate([edges[:-1], cuts]), kind="stable")
        segment = np.concatenate([np.arange(len(edges) - 1), before])[order]
        edges = np.concatenate([np.sort(np.concatenate([edges[:-1], cuts])), [np.inf]])
        alpha, beta = alpha[segment], beta[segment]
        middle = _middles(edges)
        on = alpha * middle[:, None] + beta > 0
        slope, offset = alpha * on, beta * on
    return found


def _middles(edges: Floats) -> Floats:
    """A point within each segment, far out in the unbounded ones."""
    left, right = edges[:-1], edges[1:]
    far = 1.0 + 2 * float(np.abs(edges[np.isfinite(edges)]).max(initial=0.0))
    low = np.where(np.isfinite(left), left, np.minimum(right, far) - far)
    high = np.where(np.isfinite(right), right, np.maximum(left, -far) + far)
    low = np.where(np.isfinite(left), left, np.where(np.isfinite(right), right - far, -far))
    return (low + high) / 2


def _mean(values: list[float]) -> tuple[float, float]:
    found = np.array(values)
    return float(found.mean()), float(found.std(ddof=1) / math.sqrt(found.size))


@pytest.mark.parametrize(
    "widths", [[10] + [20] * 4, [10] * 8, [30, 30], pytest.param([10] + [10] * 16,
                                                              marks=pytest.mark.slow)],
)  # fmt: skip
def test_one_breakpoint_a_neuron(widths: list[int]) -> None:
    """Along a line the mean number of breakpoints is one a neuron, in every layer at every depth:
    linear in the number of neurons, not exponential in the depth."""
    rng = np.random.default_rng(len(widths))
    layers: list[list[float]] = [[] for _ in widths]
    totals = []
    for _ in range(150):
        counts = [len(b) for b in _breakpoints(_network(rng, 1, widths, 1.0))]
        totals.append(float(sum(counts)))
        for store, count, n in zip(layers, counts, widths, strict=True):
            store.append(count / n)
    mean, error = _mean(totals)
    assert abs(mean - sum(widths)) <= 4 * error
    assert error < 0.05 * sum(widths)
    for store in layers:
        mean, error = _mean(store)
        assert abs(mean - 1.0) <= 4.5 * error  # one of up to 17 layers


def test_zero_biases_leave_one_breakpoint() -> None:
    """Without biases the network is positively homogeneous: all breakpoints are at zero."""
    rng = np.random.default_rng(0)
    for widths in ([10, 10, 10], [20] * 6):
        layers = [(w, 1e-12 * b) for w, b in _network(rng, 1, widths, 1.0)]
        places = np.concatenate(_breakpoints(layers))
        assert np.abs(places).max() < 1e-6


@pytest.mark.parametrize("scale", [0.01, 0.1, 1.0])
def test_breakpoints_near_the_data(scale: float) -> None:
    """A first neuron w·x + b, w ~ N(0, 2), b ~ N(0, s²), switches in [−1, 1] with probability
    (2/π)·atan(√2/s) (theory.md 4)."""
    rng = np.random.default_rng(1)
    (places,) = _breakpoints(_network(rng, 1, [40_000], scale))
    share = float((np.abs(places) <= 1).mean())
    exact = 2 / math.pi * math.atan(math.sqrt(2) / scale)
    assert abs(share - exact) <= 4 * math.sqrt(exact * (1 - exact) / 40_000) + 1e-6


# --------------------------------------------------------------------------- the plane


def _split(polygon: Floats, a: Floats, b: float) -> list[Floats]:
    """The parts of a convex polygon on both sides of a·x + b = 0."""
    value = polygon @ a + b
    if (value >= 0).all() or (value <= 0).all():
        return [polygon]
    parts: tuple[list[Floats], list[Floats]] = ([], [])
    for i in range(len(polygon)):
        j = (i + 1) % len(polygon)
        p, q, u, v = polygon[i], polygon[j], value[i], value[j]
        parts[0 if u >= 0 else 1].append(p)
        if u * v < 0:
            cut = p + (q - p) * (u / (u - v))
            parts[0].append(cut)
            parts[1].append(cut)
    return [np.array(part) for part in parts if len(part) >= 3]


def _regions(layers: Layers, size: float = 1e5) -> int:
    """The number of linear regions in a square that holds all but the last few crossings."""
    corners = size * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])
    pieces = [(corners, np.eye(2), np.zeros(2))]
    for weight, bias in layers:
        following = []
        for polygon, a, b in pieces:
            slope, offset = weight @ a, weight @ b + bias
            parts = [polygon]
            for row, shift in zip(slope, offset, strict=True):
                parts = [piece for part in parts for piece in _split(part, row, shift)]
            for part in parts:
                on = slope @ part.mean(axis=0) + offset > 0
                following.append((part, slope * on[:, None], offset * on))
        pieces = following
    return len(pieces)


def test_regions_of_one_layer_are_exact() -> None:
    """N lines in general position: 1 + N + N(N − 1)/2."""
    rng = np.random.default_rng(4)
    for n in (5, 12, 24):
        assert _regions(_network(rng, 2, [n], 1.0), 1e7) == 1 + n + n * (n - 1) // 2


@pytest.mark.parametrize(
    ("widths", "table", "error", "nets"),
    [([12, 12], 312, 9, 12), ([8, 8, 8], 310, 17, 12), ([6] * 4, 246, 16, 12),
     pytest.param([16, 16, 16], 1080, 47, 12, marks=pytest.mark.slow)],
)  # fmt: skip
def test_regions_are_about_half_the_square_of_neurons(
    widths: list[int], table: int, error: float, nets: int
) -> None:
    """In the plane about N²/2!, whatever the depth, and far below 2^N (theory.md 4)."""
    rng = np.random.default_rng(len(widths))
    mean, own = _mean([float(_regions(_network(rng, 2, widths, 1.0))) for _ in range(nets)])
    n = sum(widths)
    assert abs(mean - table) <= 4 * math.hypot(own, error)
    assert 0.5 * n * n / 2 <= mean <= 1.5 * n * n / 2


def _cones(layers: Layers) -> int:
    """The linear regions of a network without biases: arcs of the unit circle."""
    edges = np.array([0.0, 2 * math.pi])
    maps = [np.eye(2)]
    for weight, _ in layers:
        new_edges, new_maps = [0.0], []
        for low, high, a in zip(edges, edges[1:], maps, strict=False):
            slope = weight @ a
            angle = np.arctan2(slope[:, 1], slope[:, 0])
            cuts = np.concatenate([angle + math.pi / 2, angle - math.pi / 2]) % (2 * math.pi)
            live = np.abs(slope).sum(axis=1) > 0
            inside = sorted(c for c, alive in zip(cuts, np.tile(live, 2), strict=True)
                            if alive and low < c < high)  # fmt: skip
            bounds = [low, *inside, high]
            for left, right in itertools.pairwise(bounds):
                middle = (left + right) / 2
                on = slope @ np.array([math.cos(middle), math.sin(middle)]) > 0
                new_maps.append(slope * on[:, None])
                new_edges.append(right)
        edges, maps = np.array(new_edges), new_maps
    return len(maps) - 1  # angle 0 is no boundary


def test_zero_biases_leave_cones() -> None:
    """2-D inputs without biases: about 2N cones instead of N²/2 regions (measured 96.7 ± 0.9 for
    three layers of 16; an empirical rule)."""
    rng = np.random.default_rng(6)
    mean, error = _mean([float(_cones(_network(rng, 2, [16, 16, 16], 0.0))) for _ in range(120)])
    assert abs(mean - 96.7) <= 4 * math.hypot(error, 0.9)
    assert mean < 0.1 * 48**2 / 2
