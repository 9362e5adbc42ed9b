"""Lowerings of tensors that are made, not computed, and of random ones."""

from __future__ import annotations

from typing import Any

from archlint.graph.torch_recorder.lowering import Call, NotModelled, V, lowering


# `shape` here is both the shape of the result and the attribute that says it.
def _filled(c: Call, value: float) -> V:
    shape, dtype = c.shape, c.dtype
    return c.emit_many(
        "full",
        [None, None],
        [(shape, dtype)],
        **{"shape": shape, "value": float(value), "dtype": dtype},
    )[0]


@lowering("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty", "empty_strided")
def zeros(c: Call, *_: Any, **__: Any) -> V:
    """Zeros; elements left out count as zero, as nothing may read them."""
    return _filled(c, 0.0)


@lowering("ones", "ones_like", "new_ones")
def ones(c: Call, *_: Any, **__: Any) -> V:
    """Ones."""
    return _filled(c, 1.0)


@lowering("full", "new_full", "full_like")
def full(c: Call, *args: Any, fill_value: Any = None, **__: Any) -> V:
    """One number everywhere."""
    value = args[1] if fill_value is None and len(args) > 1 else fill_value
    if c.name == "new_full" and fill_value is None:
        value = args[2]
    if isinstance(value, V):
        return c.expand(c.cast(value, c.dtype), c.shape)
    return _filled(c, value)


@lowering("randn", "randn_like", "normal")
def randn(c: Call, *args: Any, mean: Any = 0.0, std: Any = 1.0, **__: Any) -> V:
    """Normal numbers."""
    if c.name == "normal":
        rest = [a for a in args[1:] if isinstance(a, int | float)] if args else []
        mean = rest[0] if rest else mean
        std = rest[1] if len(rest) > 1 else std
    if not isinstance(mean, int | float) or not isinstance(std, int | float):
        raise NotModelled("moments that are tensors")
    shape = c.shape
    return c.emit_many(
        "random_normal",
        [None],
        [(shape, c.dtype)],
        **{"shape": shape, "mean": float(mean), "std": float(std)},
    )[0]


@lowering("rand", "rand_like", "uniform")
def rand(c: Call, *args: Any, to: Any = None, **more: Any) -> V:
    """Uniform numbers."""
    low, high = 0.0, 1.0
    if c.name == "uniform":
        low = float(args[1] if len(args) > 1 else more.get("from", 0.0))
        high = float(args[2] if len(args) > 2 else 1.0 if to is None else to)
    shape = c.shape
    return c.emit_many(
        "random_uniform",
        [None],
        [(shape, c.dtype)],
        **{"shape": shape, "low": low, "high": high},
    )[0]


@lowering("bernoulli")
def bernoulli(c: Call, input: V, p: Any = None) -> V:
    """Zeros and ones."""
    if p is None:
        return c.emit("bernoulli", [input])
    probability = p if isinstance(p, V) else _constant_like(c, input, float(p))
    return c.emit("bernoulli", [c.expand(probability, input.shape)])


def _constant_like(c: Call, input: V, number: float) -> V:
    return c.emit_many(
        "full",
        [None, None],
        [(input.shape, input.dtype)],
        **{"shape": input.shape, "value": number, "dtype": input.dtype},
    )[0]


@lowering("exponential")
def exponential(c: Call, input: V, lambd: float = 1.0) -> V:
    """−ln(u)/λ of a uniform number u."""
    u = c.emit_many(
        "random_uniform",
        [None],
        [(c.shape, c.dtype)],
        **{"shape": c.shape, "low": 0.0, "high": 1.0},
    )[0]
    made = c.emit("neg", [c.emit("log", [u])])
    return made if lambd == 1 else c.emit("div", [made, c.number(lambd)])


@lowering("arange", "linspace")
def positions(
    c: Call, *args: Any, start: Any = None, end: Any = None, step: Any = 1, **_: Any
) -> V:
    """Evenly spaced numbers: known elements, but for a length beyond what is kept."""
    numbers = [a for a in args if isinstance(a, int | float)]
    if c.name == "linspace" or any(isinstance(a, V) for a in args):
        raise NotModelled("positions that depend on data")
    if len(numbers) == 1:
        numbers = [0, numbers[0]]
    first = numbers[0] if numbers else start or 0
    count = c.shape[0]
    by = numbers[2] if len(numbers) > 2 else step
    return c.emit("range", [c.number(first), c.number(first + count * by), c.number(by)])
