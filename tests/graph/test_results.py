"""What calls give on meta, remembered or told by a rule, against torch's own shape functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from archlint.graph.torch_recorder import results
from archlint.graph.torch_recorder.results import Results


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _told(value: Any) -> Any:
    """Shape, strides and type of what came out, or the exception's text."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.storage_offset()
    if isinstance(value, tuple | list):
        return type(value), [_told(part) for part in value]
    return value


def _of(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    try:
        return _told(function(*args, **kwargs))
    except (RuntimeError, ValueError, TypeError, IndexError) as problem:
        return type(problem)


_UNARY: list[Callable[..., Any]] = [
    torch.relu, F.relu, F.relu6, F.gelu, F.silu, F.mish, torch.sigmoid, Tensor.tanh, F.hardswish,
    F.hardsigmoid, F.hardtanh, F.elu, F.leaky_relu, torch.exp, torch.sqrt, torch.rsqrt, Tensor.abs,
    torch.neg, torch.erf, Tensor.sin, torch.cos, F.dropout, torch.softmax,
]  # fmt: skip
_BINARY: list[Callable[..., Any]] = [
    torch.add, Tensor.__add__, Tensor.__radd__, Tensor.__sub__, Tensor.__rsub__, Tensor.mul,
    Tensor.__truediv__, Tensor.__rtruediv__, torch.maximum, Tensor.add_, torch.matmul,
]  # fmt: skip
_TENSORS: dict[str, Callable[[], Tensor]] = {
    "vector": lambda: _meta(6),
    "matrix": lambda: _meta(4, 6),
    "image": lambda: _meta(2, 6, 4, 4),
    "ones": lambda: _meta(2, 1, 4, 1),
    "channels last": lambda: _meta(2, 6, 4, 4).to(memory_format=torch.channels_last),
    "transposed": lambda: _meta(6, 4).t(),
    "strided": lambda: _meta(4, 12)[:, ::2],
    "half": lambda: _meta(4, 6, dtype=torch.float16),
    "double": lambda: _meta(6, dtype=torch.float64),
    "whole": lambda: _meta(4, 6, dtype=torch.int64),
    "mask": lambda: _meta(4, 6, dtype=torch.bool),
    "single": lambda: _meta(),
    "none": lambda: _meta(0, 6),
}


def _cases() -> list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]]:
    made: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
    for function, make in itertools.product(_UNARY, _TENSORS.values()):
        made += [
            (function, (make(),), {}),
            (function, (make(), 1.5), {}),
            (function, (make(), -1), {}),
        ]
        made += [(function, (make(),), {"inplace": value}) for value in (True, False)]
    for make in _TENSORS.values():
        made += [
            (F.gelu, (make(),), {"approximate": "tanh"}),
            (F.gelu, (make(),), {"approximate": "no such"}),
            (F.hardtanh, (make(),), {"min_val": -2.0, "max_val": 1, "inplace": True}),
            (F.hardtanh, (make(),), {"min_val": 2, "max_val": 1, "inplace": False}),
            (F.leaky_relu, (make(),), {"negative_slope": 0.2, "inplace": True}),
        ]
    for function, one, two in itertools.product(_BINARY, _TENSORS.values(), _TENSORS.values()):
        made.append((function, (one(), two()), {}))
    for function, make in itertools.product(_BINARY, _TENSORS.values()):
        made += [
            (function, (make(), 2), {}),
            (function, (make(), 2.0), {}),
            (function, (make(), True), {}),
        ]
        made += [(function, (make(), 2), {"alpha": 2}), (function, (make(), 1j), {})]
    v, x = _TENSORS["vector"], _TENSORS["image"]
    for image, mean, var, weight, bias, training in itertools.product(
        (x(), _meta(1, 6), _meta(3, 6), _TENSORS["channels last"](), _TENSORS["half"](), _meta(6)),
        (v(), None), (v(), None), (v(), None, _meta(5)), (v(), None), (True, False),
    ):  # fmt: skip
        made.append((F.batch_norm, (image, mean, var, weight, bias, training, 0.1, 1e-5), {}))
        made.append((F.batch_norm, (image, mean, var), {"weight": weight, "training": training}))
    for make, over, weight in itertools.product(
        (_TENSORS["matrix"], x, _TENSORS["half"]),
        ((6,), [4, 4], (4, 6), (), 6),
        (v(), None, _meta(4, 6)),
    ):
        made.append((F.layer_norm, (make(), over, weight), {}))
        made.append((F.layer_norm, (make(), over), {"bias": weight}))
    for make, weight, bias in itertools.product(
        _TENSORS.values(), (_meta(5, 6), _meta(6, 5).t(), _meta(6)), (None, _meta(5), _meta(6))
    ):
        made.append((F.linear, (make(), weight, bias), {}))
    for p, training, inplace in itertools.product(
        (0.0, 0.1, 1.0, 2.0, 1), (True, False), (True, False)
    ):
        made.append((F.dropout, (x(), p, training, inplace), {}))
    made += [(F.gelu, (x(),), {"approximate": kind}) for kind in ("none", "tanh", "sin")]
    made += [
        (Tensor.chunk, (x(), 2, 1), {}),
        (Tensor.contiguous, (x(),), {}),
        (torch.var_mean, (x(),), {}),
        (torch.max, (x(), 1), {}),
        (Tensor.reshape, (x(), 2, -1), {}),
        (torch.cat, ([x(), x()], 1), {}),
        (Tensor.resize_, (v(), 3), {}),
        (F.max_pool2d, (x(), 2), {"return_indices": True}),
        (Tensor.expand, (v(), 3, 6), {}),
        (torch.split, (x(), [2, 4], 1), {}),
    ]
    return made


@torch.no_grad()
def test_results_are_torchs_own() -> None:
    """A call gives what torch gives, the first time and when it is remembered; errors pass. Kernels
    refuse products of two precisions, which shape functions let pass."""
    memory = Results(modes=1)
    told = 0
    for function, args, kwargs in _cases():
        for _ in range(2):
            expected = _of(function, _fresh(args), kwargs)
            kinds = {a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()}
            if function in (torch.matmul, F.linear) and len(kinds) > 1:
                expected = RuntimeError
            found = _of(memory.of, (function, _fresh(args), kwargs), {})
            assert found == expected, (function, args, kwargs)
        told += isinstance(expected, tuple)
    assert told > 1000  # most of the calls are right ones


def _fresh(args: Any) -> Any:
    """The same arguments as new tensors, which calls may write to."""

    def fresh(a: Any) -> Any:
        if isinstance(a, Tensor):
            return torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device="meta")
        return [fresh(part) for part in a] if isinstance(a, list) else a

    return tuple(fresh(a) for a in args)


@torch.no_grad()
def test_what_is_remembered_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Results(modes=1)
    calls: list[int] = []

    def sort(x: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(x.dim())
        return tuple(torch.sort(x))

    first = memory.of(sort, (_meta(4, 6),), {})
    second = memory.of(sort, (_meta(4, 6),), {})
    memory.of(sort, (_meta(4, 7),), {})
    assert len(calls) == 2
    assert _told(first) == _told(second)
    assert first[0] is not second[0]
    # the frequent ones are never asked for
    monkeypatch.setattr(results, "_plan_of", pytest.fail)
    memory.of(F.batch_norm, (_meta(2, 6, 4), None, None, None, None, True), {})
    memory.of(F.linear, (_meta(2, 6), _meta(3, 6)), {})


@torch.no_grad()
def test_aliases_are_kept() -> None:
    """What is written in place is its argument, and a view shares its elements."""
    memory = Results(modes=1)
    for _ in range(2):
        x = _meta(4, 6)
        assert memory.of(Tensor.relu_, (x,), {}) is x
        assert memory.of(F.silu, (x,), {"inplace": True}) is x
        assert memory.of(Tensor.contiguous, (x,), {}) is x
        view = memory.of(Tensor.view, (x, 24), {})
        assert view.untyped_storage()._cdata == x.untyped_storage()._cdata


@torch.no_grad()
def test_which_argument_is_handed_back() -> None:
    """Arguments that are the same tensor are told from equal ones."""
    memory = Results(modes=1)
    for _ in range(2):
        x, y, z = _meta(4, 6), _meta(4, 6), _meta(4, 6)
        assert memory.of(torch.add, (x, y), {"out": x}) is x
        assert memory.of(torch.add, (x, y), {"out": z}) is z
        assert memory.of(torch.add, (x, x), {"out": z}) is z
        assert memory.of(torch.add, (x, x), {"out": x}) is x


@torch.no_grad()
def test_what_else_a_result_depends_on() -> None:
    memory = Results(modes=1)
    x, y = _meta(4, 4), _meta(4, 4)
    assert memory.of(torch.full, ((2,), 1.0), {"device": "meta"}).dtype is torch.float32
    torch.set_default_dtype(torch.float64)
    try:
        assert memory.of(torch.full, ((2,), 1.0), {"device": "meta"}).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    plain = _told(memory.of(torch.matmul, (x, y), {}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _told(memory.of(torch.matmul, (x, y), {})) == _told(torch.matmul(x, y))
    assert _told(memory.of(torch.matmul, (x, y), {})) == plain
    whole = _meta(4, dtype=torch.int64)
    found = [memory.of(torch.mul, (whole, n), {}).dtype for n in (2, 2.0, 2, 2.0, True)]
    assert found == [torch.int64, torch.float32, torch.int64, torch.float32, torch.int64]
