"""Fans against the count of products, made by running the layer on ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from archlint.graph.builder import GraphBuilder
from archlint.graph.fans import Fans, fans


def _conv(module: nn.Conv2d | nn.ConvTranspose2d) -> Fans | None:
    g = GraphBuilder()
    x = g.input("x", (1, module.in_channels, 24, 24))
    w = g.parameter("w", tuple(module.weight.shape))
    attributes: dict[str, object] = {
        "stride": module.stride,
        "padding": (0, 0, 0, 0),
        "dilation": module.dilation,
        "groups": module.groups,
    }
    op = "conv"
    if isinstance(module, nn.ConvTranspose2d):
        op, attributes["output_padding"] = "conv_transpose", (0, 0)
    y = g.node(op, (x, w), (1, module.out_channels, None, None), **attributes)
    graph = g.finish([y])
    return fans(graph.nodes[-1], graph)


@pytest.mark.parametrize(
    ("transposed", "channels", "kernel", "stride", "groups", "dilation"),
    [
        (t, c, k, s, g, d)
        for t, c, k, s, (g, d) in itertools.product(
            (False, True),
            ((4, 8), (8, 4)),
            ((3, 3), (4, 2)),
            ((1, 1), (2, 2), (3, 1)),
            ((1, 1), (4, 1), (2, 2)),
        )
        if all(a >= b for a, b in zip(k, s, strict=True)) or not t
    ],
)
def test_convolutions_count_products(
    transposed: bool,
    channels: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    groups: int,
    dilation: int,
) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    module = kind(
        *channels, kernel, stride=stride, groups=groups, dilation=dilation, bias=False
    ).double()
    with torch.no_grad():
        module.weight.fill_(1.0)
    found = _conv(module)
    assert found is not None
    # Each output counts its products; the interior has no border effects, and a whole number of
    # periods of the stride gives the mean.
    x = torch.ones(1, channels[0], 24, 24, dtype=torch.float64, requires_grad=True)
    y = module(x)
    y.sum().backward()
    period = (6, 6)

    def interior(t: torch.Tensor) -> float:
        h, w = (n // 2 - p // 2 for n, p in zip(t.shape[-2:], period, strict=True))
        return float(t[..., h : h + period[0], w : w + period[1]].mean())

    assert found.fan_in == pytest.approx(interior(y.detach()))
    assert x.grad is not None
    assert found.fan_out == pytest.approx(interior(x.grad))
    assert found.width == channels[1]


@pytest.mark.parametrize(("axis", "shape"), [(1, (7, 3)), (0, (3, 7))])
def test_linear_in_both_layouts(axis: int, shape: tuple[int, int]) -> None:
    g = GraphBuilder()
    x, w = g.input("x", (2, 3)), g.parameter("w", shape)
    y = g.node("linear", (x, w), (2, 7), input_axis=axis)
    graph = g.finish([y])
    assert fans(graph.nodes[0], graph) == Fans(3, 7, 7)


def test_bilinear_counts_pairs() -> None:
    g = GraphBuilder()
    a, b, w = g.input("a", (2, 3)), g.input("b", (2, 5)), g.parameter("w", (7, 3, 5))
    y = g.node("bilinear", (a, b, w), (2, 7))
    graph = g.finish([y])
    module = nn.Bilinear(3, 5, 7, bias=False)
    with torch.no_grad():
        module.weight.fill_(1.0)
    one, other = torch.ones(1, 3, requires_grad=True), torch.ones(1, 5)
    out = module(one, other)
    out.sum().backward()
    assert one.grad is not None
    assert fans(graph.nodes[0], graph) == Fans(
        float(out.detach().mean()), float(one.grad.mean()), 7
    )


def test_embedding_sums_one_term() -> None:
    g = GraphBuilder()
    y = g.node("embedding", (g.input("ids", (2, 9), "int64"), g.parameter("w", (100, 16))), (2, 9))
    graph = g.finish([y])
    assert fans(graph.nodes[0], graph) == Fans(1, 16, 16)


@pytest.mark.parametrize(("op", "gates"), [("rnn", 1), ("gru", 3), ("lstm", 4)])
def test_recurrent_weights_have_fans_of_their_own(op: str, gates: int) -> None:
    g = GraphBuilder()
    x = g.input("x", (9, 2, 5))
    w, r = g.parameter("w", (1, gates * 8, 5)), g.parameter("r", (1, gates * 8, 8))
    y = g.node(op, (x, w, r), (9, 1, 2, 8), hidden=8)
    graph = g.finish([y])
    assert fans(graph.nodes[0], graph) == Fans(5, gates * 8, 8)
    assert fans(graph.nodes[0], graph, weight=2) == Fans(8, gates * 8, 8)


def test_unknown_is_none() -> None:
    g = GraphBuilder()
    x = g.input("x", (2, 3))
    computed = g.node("relu", (g.input("w", (3, None)),), (3, None))
    y = g.node("linear", (x, computed), (2, None), input_axis=0)
    graph = g.finish([y])
    assert fans(graph.nodes[1], graph) is None
    assert fans(graph.nodes[0], graph) is None
