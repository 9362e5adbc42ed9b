"""Every pattern: what it makes of a spelled formula, and that the numbers stay the same."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archlint.graph.builder import GraphBuilder
from archlint.graph.model import LayerGraph, Node, verify
from archlint.graph.patterns import explain, recognise
from archlint.graph.patterns.engine import PATTERNS
from tests.graph.spelled import T, Trace, evaluate

Build = Callable[[Trace], T]
X = (2, 5, 8)


def recognised(build: Build, seed: int = 0, source: str = "onnx") -> LayerGraph:
    """The recognised graph of a formula, after checking that it computes the same."""
    trace = Trace(seed, source)
    out = build(trace)
    before = verify(trace.finish(out))
    after = verify(recognise(before))
    assert after.folded == len(before.nodes) - len(after.nodes)
    values = evaluate(after, trace.held)
    torch.testing.assert_close(values[after.outputs[0]], out.data, rtol=1e-9, atol=1e-9)
    assert recognise(after) is after, "a recognised graph holds nothing more to recognise"
    return after


def ops(graph: LayerGraph) -> list[str]:
    return [node.op for node in graph.nodes]


def only(graph: LayerGraph) -> Node:
    assert len(graph.nodes) == 1, ops(graph)
    return graph.nodes[0]


# --------------------------------------------------------------------------- activations

R2, C = math.sqrt(2.0), math.sqrt(2.0 / math.pi)

ACTIVATIONS: dict[str, tuple[Build, str, dict[str, object]]] = {
    "sigmoid": (lambda t: 1.0 / (1.0 + (-_x(t)).exp()), "sigmoid", {}),
    "sigmoid reciprocal": (lambda t: ((-_x(t)).exp() + 1.0).reciprocal(), "sigmoid", {}),
    "silu": (lambda t: _self(t, lambda x: x * x.sigmoid()), "silu", {}),
    "silu swapped": (lambda t: _self(t, lambda x: x.sigmoid() * x), "silu", {}),
    "silu by exp": (lambda t: _self(t, lambda x: x / (1.0 + (-x).exp())), "silu", {}),
    "silu by tanh": (
        lambda t: _self(t, lambda x: 0.5 * x * (1.0 + (0.5 * x).tanh())),
        "silu",
        {},
    ),
    "quick gelu": (
        lambda t: _self(t, lambda x: x * (x * 1.702).sigmoid()),
        "gelu",
        {"approximate": "sigmoid"},
    ),
    "gelu 0.5 first": (
        lambda t: _self(t, lambda x: 0.5 * x * (1.0 + (x / R2).erf())),
        "gelu",
        {"approximate": "none"},
    ),
    "gelu 0.5 last": (
        lambda t: _self(t, lambda x: x * ((x * (1 / R2)).erf() + 1.0) * 0.5),
        "gelu",
        {"approximate": "none"},
    ),
    "gelu by the normal cdf": (
        lambda t: _self(t, lambda x: x * (0.5 * (1.0 + (x / R2).erf()))),
        "gelu",
        {"approximate": "none"},
    ),
    "gelu by the expanded cdf": (
        lambda t: _self(t, lambda x: (0.5 + 0.5 * (x / R2).erf()) * x),
        "gelu",
        {"approximate": "none"},
    ),
    "gelu halved by division": (
        lambda t: _self(t, lambda x: (x * ((x / R2).erf() + 1.0)) / 2.0),
        "gelu",
        {"approximate": "none"},
    ),
    "gelu tanh": (
        lambda t: _self(t, lambda x: 0.5 * x * (1.0 + (C * (x + 0.044715 * x**3.0)).tanh())),
        "gelu",
        {"approximate": "tanh"},
    ),
    "gelu tanh without pow": (
        lambda t: _self(t, lambda x: x * 0.5 * ((x * C * (1.0 + 0.044715 * x * x)).tanh() + 1.0)),
        "gelu",
        {"approximate": "tanh"},
    ),
    "gelu tanh by sigmoid": (
        lambda t: _self(t, lambda x: x * (0.5 + 0.5 * (C * (0.044715 * (x * x * x) + x)).tanh())),
        "gelu",
        {"approximate": "tanh"},
    ),
    "mish": (lambda t: _self(t, lambda x: x * x.softplus().tanh()), "mish", {}),
    "mish by log": (lambda t: _self(t, lambda x: x * (1.0 + x.exp()).log().tanh()), "mish", {}),
    "hardswish by clip": (
        lambda t: _self(t, lambda x: x * (x + 3.0).clip(0.0, 6.0) / 6.0),
        "hardswish",
        {},
    ),
    "hardswish by relu6": (
        lambda t: _self(t, lambda x: x * ((x + 3.0).relu6() / 6.0)),
        "hardswish",
        {},
    ),
    "hardswish by hardsigmoid": (
        lambda t: _self(t, lambda x: x.hardsigmoid() * x),
        "hardswish",
        {},
    ),
    "hardswish by clip to one": (
        lambda t: _self(t, lambda x: x * (x / 6.0 + 0.5).clip(0.0, 1.0)),
        "hardswish",
        {},
    ),
    "hardsigmoid": (
        lambda t: (_x(t) * 0.2 + 0.5).clip(0.0, 1.0),
        "hardsigmoid",
        {"alpha": 0.2, "beta": 0.5},
    ),
    "hardsigmoid by relu6": (lambda t: (_x(t) + 3.0).relu6() / 6.0, "hardsigmoid", {"beta": 0.5}),
    "softplus": (lambda t: (1.0 + _x(t).exp()).log(), "softplus", {}),
    "softplus log1p": (lambda t: _x(t).exp().log1p(), "softplus", {}),
    "softplus beta": (lambda t: (1.0 + (_x(t) * 3.0).exp()).log() / 3.0, "softplus", {"beta": 3.0}),
    "softplus guarded": (
        lambda t: _self(t, lambda x: (2.0 * x).greater(20.0).where(x, x.softplus(beta=2.0))),
        "softplus",
        {"beta": 2.0},
    ),
    "relu by a clip of its own": (
        lambda t: _x(t).hardtanh(minimum=0.0, maximum=math.inf),
        "relu",
        {},
    ),
    "softplus stable": (
        lambda t: _self(t, lambda x: x.maximum(0.0) + (-x.abs()).exp().log1p()),
        "softplus",
        {},
    ),
    "relu by clip": (lambda t: _x(t).clip(0.0, None), "relu", {}),
    "relu by maximum": (lambda t: t.op("maximum", 0.0, _x(t)), "relu", {}),
    "relu by where": (
        lambda t: _self(t, lambda x: (x.greater(0.0)).where(x, 0.0)),
        "relu",
        {},
    ),
    "relu6 by clip": (lambda t: _x(t).clip(0.0, 6.0), "relu6", {}),
    "relu6 by minimum": (lambda t: _x(t).relu().minimum(6.0), "relu6", {}),
    "relu6 by extrema": (lambda t: _x(t).maximum(0.0).minimum(6.0), "relu6", {}),
    "hardtanh": (lambda t: _x(t).clip(-2.0, 1.0), "hardtanh", {"minimum": -2.0, "maximum": 1.0}),
    "hardtanh by extrema": (
        lambda t: _x(t).minimum(1.0).maximum(-1.0),
        "hardtanh",
        {"minimum": -1.0, "maximum": 1.0},
    ),
    "leaky relu": (
        lambda t: _self(t, lambda x: x.maximum(x * 0.1)),
        "leaky_relu",
        {"slope": 0.1},
    ),
    "leaky relu by where": (
        lambda t: _self(t, lambda x: x.less(0.0).where(0.2 * x, x)),
        "leaky_relu",
        {"slope": 0.2},
    ),
    "leaky relu by parts": (
        lambda t: _self(t, lambda x: x.relu() - 0.3 * (-x).relu()),
        "leaky_relu",
        {"slope": 0.3},
    ),
    "elu": (
        lambda t: _self(t, lambda x: x.greater(0.0).where(x, 0.7 * (x.exp() - 1.0))),
        "elu",
        {"alpha": 0.7},
    ),
    "elu by expm1": (
        lambda t: _self(t, lambda x: x.greater_equal(0.0).where(x, x.minimum(0.0).expm1())),
        "elu",
        {"alpha": 1.0},
    ),
    "selu": (
        lambda t: _x(t).elu(alpha=1.6732632423543772) * 1.0507009873554805,
        "selu",
        {},
    ),
    "celu": (lambda t: (_x(t) / 2.0).elu() * 2.0, "celu", {"alpha": 2.0}),
    "softsign": (lambda t: _self(t, lambda x: x / (x.abs() + 1.0)), "softsign", {}),
    "tanhshrink": (lambda t: _self(t, lambda x: x - x.tanh()), "tanhshrink", {}),
    "logsigmoid": (lambda t: _x(t).sigmoid().log(), "logsigmoid", {}),
    "logsigmoid by softplus": (lambda t: -((-_x(t)).softplus()), "logsigmoid", {}),
}


def _x(t: Trace) -> T:
    return t.input(*X, scale=2.0)


def _self(t: Trace, f: Callable[[T], T]) -> T:
    return f(_x(t))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_spelled_activations(name: str) -> None:
    build, op, attributes = ACTIVATIONS[name]
    node = only(recognised(build))
    assert node.op == op
    for key, wanted in attributes.items():
        found = node.attributes.get(key)
        if key == "approximate" and found is None:
            found = "none"
        if key == "alpha" and found is None:
            found = 1.0
        assert found == (pytest.approx(wanted) if isinstance(wanted, float) else wanted)


def test_prelu_with_a_parameter() -> None:
    def build(t: Trace) -> T:
        x = t.input(2, 8)
        return x.relu() - t.parameter(8) * (-x).relu()

    assert only(recognised(build)).op == "prelu"


def test_swish_with_a_factor_inside_is_a_silu_between_two_factors() -> None:
    graph = recognised(lambda t: _self(t, lambda x: x * (x * 3.0).sigmoid()))
    assert ops(graph) == ["mul", "silu", "mul"]


def test_a_gain_after_an_activation_stays_outside() -> None:
    graph = recognised(lambda t: _self(t, lambda x: 0.5 * x * (1.0 + (x / R2).erf()) * 1.7))
    assert ops(graph) == ["gelu", "mul"]


@given(
    st.permutations([0, 1, 2]),
    st.booleans(),
    st.booleans(),
    st.floats(0.2, 4.0),
)
@settings(max_examples=40, deadline=None)
def test_gelu_of_a_multiple_in_any_order(
    order: list[int], left: bool, outside: bool, factor: float
) -> None:
    """½·z·(1 + erf(z/√2)) with z = c·x, the three factors in any order and association."""

    def build(t: Trace) -> T:
        x = t.input(3, 4)
        z = x * factor
        inner = (x * (factor / R2)).erf() if outside else (z / R2).erf()
        factors: list[object] = [0.5, z, 1.0 + inner]
        a, b, c = (factors[i] for i in order)
        if isinstance(a, float) and isinstance(b, float):
            return c * (a * b)  # type: ignore[operator, no-any-return]
        return (a * b) * c if left else a * (b * c)  # type: ignore[operator, no-any-return]

    assert "gelu" in ops(recognised(build))


# --------------------------------------------------------------------------- normalisation


def _variance(x: T, c: T, form: str, *axes: int) -> T:
    match form:
        case "pow":
            return (c**2.0).mean(*axes)
        case "mul":
            return (c * c).mean(*axes)
        case "square":
            return c.square().mean(*axes)
        case "var":
            return x.trace.op("reduce_var", x, axes=axes, keepdims=True)
        case "moments":
            return (x * x).mean(*axes) - x.mean(*axes).square()
        case "guarded moments":
            return ((x * x).mean(*axes) - x.mean(*axes) ** 2.0).maximum(0.0)
    return (c * c).sum(*axes) / float(np.prod([x.data.shape[a] for a in axes]))


def _divided(c: T, v: T, form: str) -> T:
    match form:
        case "div sqrt":
            return c / v.sqrt()
        case "mul rsqrt":
            return c * v.rsqrt()
        case "rsqrt mul":
            return v.rsqrt() * c
        case "mul reciprocal":
            return c * v.sqrt().reciprocal()
        case "pow":
            return c * v**-0.5
        case "one over":
            return c * (1.0 / v.sqrt())
    return c / v**0.5


VARIANCES = ["pow", "mul", "square", "var", "moments", "guarded moments", "sum"]
DIVISIONS = [
    "div sqrt",
    "mul rsqrt",
    "rsqrt mul",
    "mul reciprocal",
    "pow",
    "one over",
    "div pow",
]


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("division", DIVISIONS)
def test_layer_norm_in_every_spelling(variance: str, division: str) -> None:
    def build(t: Trace) -> T:
        x = t.input(*X)
        c = x - x.mean(2)
        y = _divided(c, _variance(x, c, variance, 2) + 1e-5, division)
        return t.parameter(8) * y + t.parameter(8)

    node = only(recognised(build))
    assert node.op == "layer_norm"
    assert node.attributes["axes"] == (2,)
    assert node.attributes["eps"] == pytest.approx(1e-5)
    assert len(node.inputs) == 3


@pytest.mark.parametrize(
    ("shape", "axes", "op"),
    [
        ((2, 5, 8), (1, 2), "layer_norm"),
        ((2, 6, 5, 4), (1,), "layer_norm"),
        ((2, 6, 5, 4), (2, 3), "instance_norm"),
        ((4, 6, 5, 4), (0, 2, 3), "batch_norm"),
        ((4, 6), (0,), "batch_norm"),
    ],
)
def test_the_axes_decide_which_norm(shape: tuple[int, ...], axes: tuple[int, ...], op: str) -> None:
    def build(t: Trace) -> T:
        x = t.input(*shape)
        c = x - x.mean(*axes)
        return c / ((c**2.0).mean(*axes) + 1e-3).sqrt()

    assert only(recognised(build)).op == op


@pytest.mark.parametrize("op", ["instance_norm", "batch_norm", "group_norm"])
def test_scale_and_shift_by_channel_lose_their_broadcasting_axes(op: str) -> None:
    def build(t: Trace) -> T:
        x = t.input(2, 6, 5, 4)
        y = t.op(op, x, **({"groups": 3} if op == "group_norm" else {}))
        return y * t.parameter(6, 1, 1, name="gamma") + t.parameter(1, 6, 1, 1, name="beta")

    graph = recognised(build)
    assert only(graph).op == op
    assert [p.shape for p in graph.parameters.values()] == [(6,), (6,)]


def test_group_norm_by_reshaped_instance_norm() -> None:
    def build(t: Trace) -> T:
        x = t.input(2, 6, 5, 4)
        ones, zeros = t.constant(np.ones(3)), t.constant(np.zeros(3))
        y = x.view(2, 3, 40).instance_norm(ones, zeros).view(2, 6, 5, 4)
        return y * t.parameter(6, 1, 1) + t.parameter(6, 1, 1)

    node = only(recognised(build))
    assert node.op == "group_norm"
    assert node.attributes["groups"] == 3


def test_group_norm_by_arithmetic() -> None:
    def build(t: Trace) -> T:
        x = t.input(2, 6, 5, 4)
        g = x.view(2, 3, 2, 5, 4)
        c = g - g.mean(2, 3, 4)
        y = c / ((c * c).mean(2, 3, 4) + 1e-6).sqrt()
        return y.view(2, 6, 5, 4)

    node = only(recognised(build))
    assert node.op == "group_norm"
    assert node.attributes["groups"] == 3


@pytest.mark.parametrize("division", DIVISIONS)
def test_rms_norm(division: str) -> None:
    def build(t: Trace) -> T:
        x = t.input(*X)
        return t.parameter(8) * _divided(x, (x**2.0).mean(2) + 1e-6, division)

    node = only(recognised(build))
    assert node.op == "rms_norm"
    assert len(node.inputs) == 2


def test_rms_norm_computed_in_a_higher_precision() -> None:
    trace = Trace()
    x = trace.input(*X, dtype="float16")
    w = x.cast(dtype="float32")
    y = (w * ((w**2.0).mean(2) + 1e-6).rsqrt()).cast(dtype="float16")
    out = trace.constant(np.linspace(0.5, 2, 8), "float16") * y
    graph = verify(recognise(trace.finish(out)))
    node = only(graph)
    assert node.op == "rms_norm"
    assert node.inputs[0] == x.id
    # a norm computed in half precision throughout differs by that precision
    got = evaluate(graph, trace.held)[graph.outputs[0]]
    torch.testing.assert_close(got, out.data, rtol=4e-3, atol=4e-3)


def test_norm_with_scale_inside_the_inverse_root() -> None:
    def build(t: Trace) -> T:
        x = t.input(*X)
        r = (_variance(x, x, "guarded moments", 2) + 1e-6).rsqrt() * t.parameter(1, 1, 8)
        return (x - x.mean(2)) * r + t.parameter(8)

    node = only(recognised(build))
    assert node.op == "layer_norm"
    assert len(node.inputs) == 3


def test_layer_norm_of_a_middle_axis_as_flax_spells_it() -> None:
    """Moments without kept axes, put back as ones after the subtraction; the scale first."""

    def build(t: Trace) -> T:
        x = t.input(*X)
        square, mean = (x * x).mean(1, keepdims=False), x.mean(1, keepdims=False)
        v = (square - mean * mean).maximum(0.0).view(2, 1, 8)
        r = (v + 1e-6).sqrt().reciprocal() * t.parameter(1, 5, 1)
        return (x - mean.view(2, 1, 8)) * r + t.parameter(1, 5, 1)

    graph = recognised(build)
    assert ops(graph) == ["layer_norm", "mul", "add"]
    assert graph.nodes[0].attributes["axes"] == (1,)


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_as_keras_unfolds_it(affine: bool) -> None:
    def build(t: Trace) -> T:
        x = t.input(*X)
        m, c = x.mean(2), x - x.mean(2)
        r = ((c * c).mean(2) + 1e-3).rsqrt()
        if not affine:
            return x * r - m * r
        r = r * t.parameter(8)
        return x * r + (t.parameter(8) - m * r)

    node = only(recognised(build))
    assert node.op == "layer_norm"
    assert len(node.inputs) == (3 if affine else 1)


def test_statistics_without_kept_axes() -> None:
    def build(t: Trace) -> T:
        x = t.input(*X)
        c = x - x.mean(2, keepdims=False).view(2, 5, 1)
        v = (c * c).mean(2, keepdims=False).view(2, 5, 1)
        return c / (v + 1e-6).sqrt()

    assert only(recognised(build)).op == "layer_norm"


@pytest.mark.parametrize("unbiased", [0, 1])
def test_standardisation_with_eps_outside_the_root(unbiased: int) -> None:
    def build(t: Trace) -> T:
        x = t.input(*X)
        s = t.op("reduce_std", x, axes=(2,), keepdims=True, correction=unbiased)
        return (x - x.mean(2)) / (s + 1e-6)

    node = only(recognised(build))
    assert node.op == "standardise"
    assert node.attributes["outer_eps"] == pytest.approx(1e-6)
    assert node.attributes["unbiased"] is bool(unbiased)


def test_unbiased_deviation_as_the_tracing_exporter_writes_it() -> None:
    def build(t: Trace) -> T:
        x = t.input(*X)
        c = x - x.mean(2)
        v = (c * c).mean(2) * 8.0 / 7.0
        return c / (v.sqrt() + 1e-6)

    assert only(recognised(build)).op == "standardise"


def test_lengths_by_sum_are_multiples_of_an_rms_norm() -> None:
    def build(t: Trace) -> T:
        x = t.input(*X)
        return x * ((x * x).sum(2) + 1e-3).rsqrt()

    assert ops(recognised(build)) == ["rms_norm", "mul"]


L2: dict[str, Callable[[T], T]] = {
    "clip": lambda x: x / x.reduce_l2(axes=(2,), keepdims=True).clip(1e-12, None).expand(shape=X),
    "lowered clip": lambda x: (
        x / x.reduce_l2(axes=(2,), keepdims=True).hardtanh(minimum=1e-12, maximum=math.inf)
    ),
    "maximum": lambda x: x / (x * x).sum(2).sqrt().maximum(1e-12),
    "plain": lambda x: x / x.reduce_l2(axes=(2,), keepdims=True),
    "reciprocal": lambda x: x * (x**2.0).sum(2).sqrt().reciprocal(),
}


@pytest.mark.parametrize("form", L2)
def test_l2_normalisation(form: str) -> None:
    node = only(recognised(lambda t: L2[form](t.input(*X))))
    assert node.op == "lp_normalize"
    assert node.attributes["axis"] == 2


@pytest.mark.parametrize("form", ["v/n*g", "v*(g/n)", "v*g/n", "two axes"])
def test_weight_norm(form: str) -> None:
    def build(t: Trace) -> T:
        shape = (6, 4) if form == "two axes" else (6, 4, 3, 3)
        axes = tuple(range(1, len(shape)))
        v, g = t.parameter(*shape), t.parameter(6, *(1 for _ in axes))
        n = (v * v).sum(*axes).sqrt()
        if form in ("v/n*g", "two axes"):
            return v / n * g
        return v * (g / n) if form == "v*(g/n)" else v * g / n

    node = only(recognised(build))
    assert node.op == "weight_norm"
    assert node.attributes["axis"] == 0


def test_weight_standardisation() -> None:
    def build(t: Trace) -> T:
        w = t.parameter(6, 4, 3, 3)
        c = w - w.mean(1, 2, 3)
        return c / ((c * c).mean(1, 2, 3) + 1e-5).sqrt()

    assert only(recognised(build)).op == "standardise"


# --------------------------------------------------------------------------- softmax, mean


def _softmax(x: T, shifted: bool) -> tuple[T, T]:
    e = (x - x.max(2) if shifted else x).exp()
    return e, e.sum(2)


@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("log", [True, False])
def test_softmax_by_its_formula(shifted: bool, log: bool) -> None:
    def build(t: Trace) -> T:
        e, total = _softmax(t.input(*X), shifted)
        return (e / total).log() if log else e / total

    node = only(recognised(build))
    assert node.op == ("log_softmax" if log else "softmax")
    assert node.attributes["axis"] == 2


@pytest.mark.parametrize("op", ["softmax", "log_softmax"])
def test_softmax_of_what_the_maximum_was_taken_from(op: str) -> None:
    def build(t: Trace) -> T:
        x = t.input(*X)
        return t.op(op, x - x.max(2), axis=2)

    assert only(recognised(build)).op == op


def test_log_softmax_by_a_difference() -> None:
    def direct(t: Trace) -> T:
        x = t.input(*X)
        return x - x.reduce_logsumexp(axes=(2,), keepdims=True)

    def spelled(t: Trace) -> T:
        x = t.input(*X)
        s = x - x.max(2)
        return s - s.exp().sum(2).log()

    assert only(recognised(direct)).op == "log_softmax"
    assert only(recognised(spelled)).op == "log_softmax"


def test_softmax_between_transposes() -> None:
    def build(t: Trace) -> T:
        return t.input(*X).permute(0, 2, 1).softmax(axis=2).permute(0, 2, 1)

    node = only(recognised(build))
    assert (node.op, node.attributes["axis"]) == ("softmax", 1)


def test_mean_by_a_sum() -> None:
    node = only(recognised(lambda t: t.input(*X).sum(1, 2, keepdims=False) / 40.0))
    assert node.op == "reduce_mean"


# --------------------------------------------------------------------------- affine


def test_linear_with_bias_from_matmul_and_add() -> None:
    def build(t: Trace) -> T:
        return t.parameter(4) + (t.input(*X) @ t.parameter(8, 4))

    node = only(recognised(build))
    assert node.op == "linear"
    assert node.attributes == {"input_axis": 0}
    assert len(node.inputs) == 3


def test_linear_through_a_transposed_weight() -> None:
    def build(t: Trace) -> T:
        return t.input(*X) @ t.parameter(4, 8).permute(1, 0)

    node = only(recognised(build))
    assert (node.op, node.attributes["input_axis"]) == ("linear", 1)


def test_convolution_takes_its_bias() -> None:
    def build(t: Trace) -> T:
        x, w = t.input(2, 3, 6, 6), t.parameter(4, 3, 3, 3)
        y = t.op("conv", x, w, stride=(1, 1), padding=(1, 1, 1, 1), dilation=(1, 1))
        return y + t.parameter(1, 4, 1, 1)

    graph = recognised(build)
    assert only(graph).op == "conv"
    assert graph.parameters["w_1"].shape == (4,)
    load = graph.parameters["w_1"].load
    assert load is not None
    assert load().shape == (4,)


def test_a_bias_of_constant_zeros_leaves() -> None:
    def build(t: Trace) -> T:
        x, w = t.input(2, 3, 6, 6), t.parameter(4, 3, 3, 3)
        zeros = t.constant(0.0).expand(shape=(4,))
        return t.op("conv", x, w, zeros, stride=(1, 1), padding=(1,) * 4, dilation=(1, 1))

    node = only(recognised(build))
    assert len(node.inputs) == 2


def test_a_bias_that_is_a_parameter_of_zeros_stays() -> None:
    def build(t: Trace) -> T:
        return t.op("linear", t.input(*X), t.parameter(4, 8), t.parameter(4, fill=0.0))

    assert len(only(recognised(build)).inputs) == 3


def _same_max_pool(t: Trace, fill: float) -> T:
    x = t.op("pad", t.input(2, 3, 7, 7), t.constant(fill), padding=(0, 0, 0, 0, 0, 0, 1, 1))
    return t.op("max_pool", x, kernel=(3, 3), stride=(2, 2), padding=(0,) * 4, dilation=(1, 1))


def test_max_pool_takes_padding_that_is_never_the_maximum() -> None:
    node = only(recognised(lambda t: _same_max_pool(t, -math.inf)))
    assert node.attributes["padding"] == (0, 0, 1, 1)


def test_max_pool_leaves_padding_of_zeros() -> None:
    assert ops(recognised(lambda t: _same_max_pool(t, 0.0))) == ["pad", "max_pool"]


def test_embedding_by_gather() -> None:
    def build(t: Trace) -> T:
        return t.op("gather", t.parameter(10, 4), t.ids(2, 3, count=10), axis=0)

    assert only(recognised(build)).op == "embedding"


# --------------------------------------------------------------------------- attention

S, H, L, D = 2, 4, 6, 8
CAUSAL = np.where(np.tril(np.ones((L, L), bool)), 0.0, -np.inf)


def _qkv(t: Trace, kv_heads: int = H) -> tuple[T, T, T]:
    return t.input(S, H, L, D), t.input(S, kv_heads, L, D), t.input(S, kv_heads, L, D)


def _kt(k: T) -> T:
    return k.permute(0, 1, 3, 2)


def _attend(t: Trace, logits: T, v: T) -> T:
    return logits.softmax(axis=3) @ v


SCALES: dict[str, Callable[[T, T], T]] = {
    "none": lambda q, k: q @ _kt(k),
    "logits": lambda q, k: (q @ _kt(k)) * 0.125,
    "division": lambda q, k: (q @ _kt(k)) / 8.0,
    "q": lambda q, k: (q * 0.125) @ _kt(k),
    "k": lambda q, k: q @ _kt(k / 8.0),
    "k transposed": lambda q, k: q @ (_kt(k) * 0.125),
    "both": lambda q, k: (q * 0.125**0.5) @ (_kt(k) * 0.125**0.5),
}


@pytest.mark.parametrize("scale", SCALES)
def test_attention_with_the_scale_anywhere(scale: str) -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t)
        return _attend(t, SCALES[scale](q, k), v)

    node = only(recognised(build))
    assert node.op == "attention"
    assert node.attributes["scale"] == pytest.approx(1.0 if scale == "none" else 0.125)
    assert len(node.inputs) == 3


def test_attention_of_batched_matrices() -> None:
    def build(t: Trace) -> T:
        q, k, v = t.input(6, L, D), t.input(6, 7, D), t.input(6, 7, 5)
        return (q @ k.permute(0, 2, 1) * 0.3).softmax(axis=2) @ v

    assert only(recognised(build)).op == "attention"


def test_attention_with_heads_split_on_the_way() -> None:
    """k goes from [sample, length, heads, features] to its transpose in one step."""

    def build(t: Trace) -> T:
        q, v = t.input(S, H, L, D), t.input(S, H, L, D)
        k = t.input(S, L, H, D).permute(0, 2, 3, 1)
        return _attend(t, q @ k, v)

    graph = recognised(build)
    assert ops(graph) == ["transpose", "attention"]
    assert graph.nodes[0].attributes["permutation"] == (0, 2, 1, 3)


def test_attention_with_the_heads_folded_for_the_transpose() -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t)
        kt = k.view(S * H, L, D).permute(0, 2, 1).view(S, H, D, L)
        return _attend(t, (q * 0.5) @ (kt * 0.5), v)

    node = only(recognised(build))
    assert node.attributes["scale"] == pytest.approx(0.25)


def test_grouped_queries_with_the_heads_folded_for_the_transpose() -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t, 2)
        k, v = (h.view(S, 2, 1, L, D).expand(shape=(S, 2, 2, L, D)) for h in (k, v))
        kt = k.view(S * H, L, D).permute(0, 2, 1).view(S, H, D, L)
        return _attend(t, q @ kt, v.view(S, H, L, D))

    graph = recognised(build)
    assert graph.shape(only(graph).inputs[1]) == (S, 2, L, D)


def test_a_mask_that_a_file_holds_as_a_weight() -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t)
        id = t.builder.parameter("mask", (L, L), dtype="float64", load=lambda: CAUSAL)
        t.held[id] = torch.from_numpy(CAUSAL)
        return _attend(t, q @ _kt(k) + T(id, t.held[id], t), v)

    graph = recognised(build)
    assert only(graph).attributes["causal"] is True
    assert not graph.parameters


def test_attention_with_a_key_that_is_transposed_by_nature() -> None:
    def build(t: Trace) -> T:
        return _attend(t, t.input(S, H, L, D) @ t.input(S, H, D, L), t.input(S, H, L, D))

    assert ops(recognised(build)) == ["transpose", "attention"]


def test_causal_attention_by_a_constant() -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t)
        return _attend(t, q @ _kt(k) * 0.2 + t.constant(CAUSAL[None, None]), v)

    node = only(recognised(build))
    assert node.attributes["causal"] is True
    assert len(node.inputs) == 3


@pytest.mark.parametrize("fill", [-np.inf, -1e9, -1e4])
def test_causal_attention_by_a_choice(fill: float) -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t)
        seen = t.constant(np.tril(np.ones((1, 1, L, L), bool)))
        return _attend(t, t.op("where", seen, q @ _kt(k) * 0.2, fill), v)

    node = only(recognised(build))
    assert node.attributes["causal"] is True


def test_mask_filled_in_by_a_computed_condition() -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t)
        condition = t.input(S, 1, 1, L).greater(-1.0)
        return _attend(t, t.op("where", condition, q @ _kt(k) * 0.2, -1e9), v)

    assert ops(recognised(build)) == ["greater", "where", "attention"]


def test_masks_are_added_up_in_the_units_of_the_logits() -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t)
        bias, padding = t.input(1, H, L, L), t.input(S, 1, 1, L)
        return _attend(t, (q @ _kt(k) + bias) * 0.25 + padding, v)

    graph = recognised(build)
    assert ops(graph) == ["mul", "add", "attention"]
    assert graph.nodes[-1].attributes["scale"] == pytest.approx(0.25)


def test_a_causal_mask_beside_another_one() -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t)
        padding = t.input(S, 1, 1, L)
        return _attend(t, (q @ _kt(k) + t.constant(CAUSAL)) + padding, v)

    trace = Trace()
    out = build(trace)
    node = recognise(trace.finish(out)).nodes[-1]
    assert (node.op, node.attributes["causal"], len(node.inputs)) == ("attention", True, 4)


def test_a_mask_that_leaves_out_the_diagonal_is_not_the_causal_one() -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t)
        other = np.where(np.tril(np.ones((L, L), bool), 1), 0.0, -1e9)
        return _attend(t, q @ _kt(k) + t.constant(other), v)

    node = only(recognised(build))
    assert not node.attributes.get("causal")
    assert len(node.inputs) == 4


def test_softcapped_attention() -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t)
        capped = (q @ _kt(k) * 0.2 / 30.0).tanh() * 30.0
        return _attend(t, capped + t.input(S, 1, 1, L), v)

    node = only(recognised(build))
    assert node.attributes["softcap"] == pytest.approx(30.0)
    assert node.attributes["scale"] == pytest.approx(0.2)


def test_a_temperature_by_head_moves_onto_the_queries() -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t)
        return _attend(t, q @ _kt(k) * t.parameter(H, 1, 1), v)

    assert ops(recognised(build)) == ["mul", "attention"]


def test_grouped_queries() -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t, 2)
        k, v = (
            h.view(S, 2, 1, L, D).expand(shape=(S, 2, 2, L, D)).view(S, H, L, D) for h in (k, v)
        )
        return _attend(t, q @ _kt(k) * 0.1, v)

    graph = recognised(build)
    node = only(graph)
    assert graph.shape(node.inputs[1]) == (S, 2, L, D)


def test_dropout_and_the_guard_against_empty_rows() -> None:
    def build(t: Trace) -> T:
        q, k, v = _qkv(t)
        p = (q @ _kt(k)).softmax(axis=3)
        p = p.isnan().where(0.0, p)
        return p.dropout(p=0.1) @ v

    node = only(recognised(build))
    assert node.attributes["dropout"] == 0.1


@pytest.mark.parametrize(
    ("first", "second"),
    [("bthd,bshd->bhts", "bhts,bshd->bthd"), ("bhid,bhjd->bhij", "bhij,bhjd->bhid")],
)
def test_attention_by_einsum(first: str, second: str) -> None:
    def build(t: Trace) -> T:
        shape = (S, L, H, D) if "bthd" in first else (S, H, L, D)
        q, k, v = (t.input(*shape) for _ in range(3))
        p = (t.op("einsum", q, k, equation=first) * 0.3).softmax(axis=3)
        return t.op("einsum", p, v, equation=second)

    graph = recognised(build)
    assert ops(graph).count("attention") == 1
    assert set(ops(graph)) <= {"attention", "transpose"}


def test_attention_with_values_on_the_left() -> None:
    def build(t: Trace) -> T:
        q, k, v = t.input(S, L, D), t.input(S, D, L), t.input(S, D, L)
        p = (q @ k * 0.5).softmax(axis=2)
        return v @ p.permute(0, 2, 1)

    graph = recognised(build)
    assert "attention" in ops(graph)
    assert "softmax" not in ops(graph)


def test_weights_that_are_returned_stay() -> None:
    trace = Trace()
    q, k, v = _qkv(trace)
    p = (q @ _kt(k) * 0.2).softmax(axis=3)
    out = p @ v
    graph = verify(recognise(trace.finish(out, p)))
    assert ops(graph) == ["transpose", "matmul", "mul", "softmax", "attention"]
    values = evaluate(graph, trace.held)
    torch.testing.assert_close(values[graph.outputs[0]], out.data)
    torch.testing.assert_close(values[graph.outputs[1]], p.data)


# --------------------------------------------------------------------------- what is no pattern

NOT: dict[str, tuple[Build, set[str]]] = {
    "a gate by another value": (
        lambda t: t.input(*X) * t.input(*X).sigmoid(),
        {"mul", "sigmoid"},
    ),
    "a gate that broadcasts": (
        lambda t: _self(t, lambda x: x * x.mean(1).sigmoid()),
        {"mul", "sigmoid", "reduce_mean"},
    ),
    "erf with another factor": (
        lambda t: _self(t, lambda x: x * (1.0 + x.erf() * 0.3)),
        {"mul", "erf", "add"},
    ),
    "tanh with another cubic": (
        lambda t: _self(t, lambda x: x * (0.5 + 0.5 * (C * (x + 0.1 * x**3.0)).tanh())),
        {"mul", "tanh", "add", "pow"},
    ),
    "statistics over other axes": (
        lambda t: _self(t, lambda x: (x - x.mean(1)) / ((x - x.mean(2)) ** 2.0).mean(2).sqrt()),
        {"sub", "reduce_mean", "div", "pow", "sqrt"},
    ),
    "centred by the mean, divided by the raw root mean square": (
        lambda t: _self(t, lambda x: (x - x.mean(2)) / ((x * x).mean(2) + 1e-5).sqrt()),
        {"sub", "reduce_mean", "div", "mul", "add", "sqrt"},
    ),
    "a clip below at some other number": (lambda t: _x(t).clip(0.5, None), {"clip"}),
    "leaky with a slope above one": (
        lambda t: _self(t, lambda x: x.maximum(x * 1.5)),
        {"maximum", "mul"},
    ),
    "a choice by another value": (
        lambda t: t.op("where", t.input(*X).greater(0.0), t.input(*X), 0.0),
        {"where", "greater"},
    ),
    "averages over queries": (
        lambda t: (t.input(S, L, D) @ t.input(S, D, L)).softmax(axis=1) @ t.input(S, L, D),
        {"matmul", "softmax"},
    ),
    "logits through an activation": (
        lambda t: (t.input(S, L, D) @ t.input(S, D, L)).relu().softmax(axis=2) @ t.input(S, L, D),
        {"matmul", "softmax", "relu"},
    ),
    "a sum that is not a mean": (lambda t: t.input(*X).sum(2) / 7.0, {"reduce_sum", "div"}),
    "softmax divided by another sum": (
        lambda t: t.input(*X).exp() / t.input(*X).exp().sum(2),
        {"exp", "reduce_sum", "div"},
    ),
    "a plain clip to one": (lambda t: _x(t).clip(0.0, 1.0), {"hardtanh"}),
}


@pytest.mark.parametrize("name", NOT)
def test_what_only_looks_like_a_pattern_stays(name: str) -> None:
    build, left = NOT[name]
    assert set(ops(recognised(build))) == left


def test_a_norm_with_other_readers_keeps_its_plain_form() -> None:
    trace = Trace()
    x = trace.input(*X)
    plain = trace.op("layer_norm", x, axes=(2,), eps=1e-5)
    scaled = plain * trace.parameter(8)
    graph = recognise(trace.finish(scaled, plain))
    assert ops(graph) == ["layer_norm", "mul"]


def test_a_parameter_with_other_readers_is_declared_beside_the_old_one() -> None:
    trace = Trace()
    x = trace.input(2, 6, 5, 4)
    gamma = trace.parameter(6, 1, 1)
    y = trace.op("group_norm", x, groups=3) * gamma + x * gamma
    graph = verify(recognise(trace.finish(y)))
    assert ops(graph) == ["group_norm", "mul", "add"]
    assert {p.shape for p in graph.parameters.values()} == {(6,), (6, 1, 1)}
    torch.testing.assert_close(evaluate(graph, trace.held)[graph.outputs[0]], y.data)


def test_equal_parameters_that_a_file_holds_once() -> None:
    trace = Trace()
    x = trace.input(2, 6, 5, 4)
    gamma, beta = trace.parameter(6, 1, 1), trace.parameter(6, 1, 1)
    for _ in range(2):
        x = trace.op("group_norm", x, groups=3) * gamma + beta
    graph = verify(recognise(trace.finish(x)))
    assert ops(graph) == ["group_norm", "group_norm"]
    assert [p.shape for p in graph.parameters.values()] == [(6,), (6,)]
    torch.testing.assert_close(evaluate(graph, trace.held)[graph.outputs[0]], x.data)


# --------------------------------------------------------------------------- the engine


def test_noops_leave_and_are_counted() -> None:
    def build(t: Trace) -> T:
        x = t.input(*X).identity().view(*X).permute(0, 1, 2).relu()
        return (x.permute(0, 2, 1).permute(0, 2, 1) + 0.0) * 1.0 / 1.0 + t.input(*X)

    assert ops(recognised(build)) == ["relu", "add"]


def test_a_slice_of_everything_leaves_and_a_reversal_stays() -> None:
    b = GraphBuilder()
    x = b.input("x", X)
    whole = b.node("slice", (x,), X, axes=(1,), starts=(0,), ends=(5,), steps=(1,))
    turned = b.node("slice", (whole,), X, axes=(1,), starts=(4,), ends=(-6,), steps=(-1,))
    y = b.node("relu", (turned,), X)
    graph = replace(b.finish([y]), source="onnx")
    assert ops(recognise(graph)) == ["slice", "relu"]


def test_a_noop_that_is_an_output_stays() -> None:
    assert ops(recognised(lambda t: t.input(*X).identity())) == ["identity"]


def test_a_noop_that_is_a_module_of_its_own_stays_in_a_recorded_model() -> None:
    def build(t: Trace) -> T:
        t.module = "drop"
        y = t.input(*X).dropout(p=0.0)
        t.module = ""
        return y.relu()

    assert ops(recognised(build, source="torch")) == ["dropout", "relu"]
    assert ops(recognised(build, source="onnx")) == ["relu"]


def test_a_cast_to_less_precision_stays() -> None:
    trace = Trace()
    x = trace.input(*X, dtype="float32")
    there = x.cast(dtype="float16").cast(dtype="float32").relu()
    back = x.cast(dtype="float64").cast(dtype="float32").relu()
    graph = recognise(trace.finish(there, back))
    assert ops(graph) == ["cast", "cast", "relu", "relu"]


def test_origin_of_a_fused_node() -> None:
    trace = Trace()
    x = trace.input(*X)
    trace.module = "blocks.0.attn.norm"
    c = x - x.mean(2)
    trace.module = "blocks.0.attn"
    y = c / ((c * c).mean(2) + 1e-5).sqrt()
    graph = trace.finish(y)
    graph = replace(
        graph, nodes=tuple(replace(n, source_op=n.op.title(), name=n.id) for n in graph.nodes)
    )
    node = only(recognise(graph))
    assert node.module == "blocks.0.attn"
    assert node.source_op.startswith("Sub")
    assert node.name == graph.nodes[-1].name
    assert node.id == graph.nodes[-1].id


def test_guards_are_kept() -> None:
    b = GraphBuilder()
    x, flag = b.input("x", X), b.input("flag", (), "bool")
    s = b.node("sigmoid", (x,), X, guard=((flag, True),))
    y = b.node("mul", (x, s), X, guard=((flag, True),))
    z = b.node("select", (flag, y, x), X)
    graph = verify(recognise(verify(b.finish([z]))))
    assert ops(graph) == ["silu", "select"]
    assert graph.nodes[0].guard == ((flag, True),)


def test_bodies_of_loops_are_recognised_too() -> None:
    inner = GraphBuilder("body")
    h = inner.input("h", X)
    out = inner.node("mul", (h, inner.node("sigmoid", (h,), X)), X)
    b = GraphBuilder()
    x = b.input("x", X)
    trips = b.constant(np.int64(3))
    y = b.node(
        "loop", (trips, None, x), X, body=inner.finish([out]), carried=1, outputs=[b.value("y", X)]
    )
    graph = recognise(b.finish([y]))
    body = graph.nodes[0].body
    assert body is not None
    assert ops(body) == ["silu"]


def test_a_miss_says_why() -> None:
    trace = Trace()
    x = trace.input(*X)
    y = x * trace.input(*X).sigmoid()
    graph = trace.finish(y)
    reasons = dict(explain(graph, graph.nodes[-1]))
    assert reasons["gated"] == "the squashing is not one of the other factor"
    assert all(reasons.values())
    silu = trace.finish(x * x.sigmoid())
    assert dict(explain(silu, silu.nodes[-1]))["gated"] == "applies"


def test_every_pattern_explains_itself() -> None:
    for patterns in PATTERNS.values():
        for pattern in patterns:
            assert pattern.__doc__, pattern


@pytest.mark.parametrize("op", ["relu", "add", "mul", "identity", "scalar", "cast"])
def test_time_grows_with_the_number_of_nodes_only(op: str) -> None:
    """A chain of 20,000 nodes in well under a second here (100,000 in a few)."""

    def chain(length: int) -> LayerGraph:
        b = GraphBuilder()
        x = y = b.input("x", X)
        half = b.constant(np.float32(0.5))
        for i in range(length):
            match op:
                case "scalar":
                    y = b.node("mul", (y, half), X)
                case "cast":
                    dtype = "float16" if i % 2 else "float32"
                    y = b.node("cast", (y,), X, dtype, given={"dtype": dtype})
                case "add" | "mul":
                    y = b.node(op, (y, x), X)
                case _:
                    y = b.node(op, (y,), X)
        return b.finish([y])

    def seconds(graph: LayerGraph) -> float:
        start = time.process_time()
        recognise(graph)
        return time.process_time() - start

    small, large = chain(2_000), chain(20_000)
    least = min(seconds(small) for _ in range(3))
    assert seconds(large) < 30 * least + 0.2


def test_residual_trunks_of_sums_are_linear_too() -> None:
    """Sums above a softmax and its product: the search for logits is bounded."""
    trace = Trace()
    q, k, v = _qkv(trace)
    logits = q @ _kt(k)
    masks: Sequence[T] = [trace.input(S, H, L, L) for _ in range(40)]
    for mask in masks:
        logits = logits + mask
    start = time.process_time()
    graph = verify(recognise(trace.finish(_attend(trace, logits, v))))
    assert time.process_time() - start < 5.0
    assert ops(graph)[-1] in ("attention", "matmul")
