"""From a recorded torch.fx graph to the layer graph: the frame; the families are the tables.

A lowering takes the arguments of the torch call (tensors as :class:`V`) and emits nodes of the
vocabulary. What none covers becomes a node ``unknown`` with torch's own name.

torch writes in place, through views too; the layer graph does not. A write gives its tensor a new
value, the tensors it is a view of get theirs (the inverse of the view), and other views of them
are made anew when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from archlint.graph.builder import GraphBuilder
from archlint.graph.model import LayerGraph, Mode, Node
from archlint.graph.ops import OPS, UNKNOWN
from archlint.graph.torch_recorder.names import Name, name_of
from archlint.graph.torch_recorder.recorder import CONSTANT_LIMIT, Recording
from archlint.initialization.distribution import Distribution, constant
from archlint.initialization.record import Recorded


class NotModelled(Exception):
    """A form of a call that the lowering has no words for."""


@dataclass(frozen=True)
class V:
    """A value as a lowering sees it. ``id`` is empty until a constant is first read."""

    id: str
    shape: tuple[int, ...]
    dtype: str
    elements: Tensor | None = None
    parameter: bool = False

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def integral(self) -> bool:
        """Whether it holds integers or booleans."""
        return self.dtype.startswith(("int", "uint", "bool"))


Lower = Callable[..., Any]
TABLE: dict[str, Lower] = {}
VIEWS: dict[str, Callable[[Call, V, V], V]] = {}


def lowering(*names: str) -> Callable[[Lower], Lower]:
    """Register a lowering under the canonical names of torch's calls."""

    def register(function: Lower) -> Lower:
        for name in names:
            if name in TABLE:
                raise ValueError(f"{name} is lowered twice")
            TABLE[name] = function
        return function

    return register


def dtype_name(dtype: torch.dtype) -> str:
    """numpy's name of a dtype."""
    return str(dtype).removeprefix("torch.")


def broadcast_shape(*shapes: Sequence[int]) -> tuple[int, ...]:
    """The shape that several broadcast to."""
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


@lru_cache(maxsize=1024)
def _names_of(function: Lower) -> frozenset[str]:
    return frozenset(
        p.name
        for p in signature(function).parameters.values()
        if p.kind is not p.VAR_POSITIONAL and p.kind is not p.VAR_KEYWORD
    )


_ALIASES = {"self": "input", "axis": "dim", "x": "input", "keepdims": "keepdim", "dims": "dim",
            "batch1": "mat1", "batch2": "mat2"}  # fmt: skip
_DROPPED = frozenset(
    (
        "out",
        "device",
        "layout",
        "pin_memory",
        "memory_format",
        "non_blocking",
        "requires_grad",
        "copy",
        "_stacklevel",
        "generator",
    )
)


@dataclass
class Call:
    """One fx node being lowered: emits nodes on its behalf."""

    lowerer: Lowerer
    node: fx.Node
    name: str

    @property
    def out(self) -> Any:
        """The recorded result: a meta tensor, or a tuple of them and None."""
        return self.node.meta.get("val")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the (first) result."""
        return tuple(self._first().shape)

    @property
    def dtype(self) -> str:
        """dtype of the (first) result."""
        return dtype_name(self._first().dtype)

    def _first(self) -> Tensor:
        found = self.out
        while isinstance(found, tuple | list):
            found = found[0]
        if not isinstance(found, Tensor):
            raise NotModelled("no tensor results")
        return found

    def emit(
        self,
        op: str,
        inputs: Sequence[V | None],
        shape: Sequence[int] | None = None,
        dtype: str | None = None,
        /,
        **attributes: Any,
    ) -> V:
        """A node with one output, by default of the call's own result shape and dtype."""
        made = tuple(self.shape if shape is None else shape)
        kind = self.dtype if dtype is None else dtype
        return self.emit_many(op, inputs, [(made, kind)], **attributes)[0]

    def emit_many(
        self,
        op: str,
        inputs: Sequence[V | None],
        results: Sequence[tuple[Sequence[int], str]],
        /,
        **attributes: Any,
    ) -> list[V]:
        """A node with several outputs."""
        low = self.lowerer
        ids = []
        stem = self.node.name
        for shape, kind in results:
            ids.append(low.builder.value(low.builder.fresh(stem), tuple(shape), kind))
        low.builder.nodes.append(
            Node(
                id=f"n{low.count}",
                op=op,
                inputs=tuple(None if v is None else low.id_of(v) for v in inputs),
                outputs=tuple(ids),
                attributes=attributes,
                name=self.node.name,
                source_op=self.name,
                module=self.node.meta.get("module", ""),
                module_type=self.node.meta.get("module_type", ""),
                site=self.node.meta.get("site"),
            )
        )
        low.count += 1
        return [V(i, tuple(s), k) for i, (s, k) in zip(ids, results, strict=True)]

    def number(self, value: complex | bool, like: V | None = None) -> V:
        """A Python number as a constant."""
        dtype = like.dtype if like is not None else self.dtype
        if like is not None and like.integral and isinstance(value, float):
            dtype = "float32"
        kind: Any = getattr(torch, dtype) if not dtype.startswith(("uint1", "uint3")) else None
        if dtype == "bool" and not isinstance(value, bool):
            kind = torch.int64
        return V("", (), dtype_name(kind or torch.int64), torch.tensor(value, dtype=kind))

    def array(self, values: Any) -> V:
        """A small integer constant."""
        elements = torch.as_tensor(values)
        return V("", tuple(elements.shape), dtype_name(elements.dtype), elements)

    def value(self, value: Any, like: V | None = None) -> V:
        """A tensor argument, or a number where torch takes either."""
        if isinstance(value, V):
            return value
        if isinstance(value, int | float | bool | complex):
            return self.number(value, like)
        raise NotModelled(f"an argument of type {type(value).__name__}")

    def reshape(self, x: V, shape: Sequence[int]) -> V:
        """x in another shape; nothing where it has it."""
        if tuple(shape) == x.shape:
            return x
        return self.emit("reshape", [x], shape, x.dtype, shape=tuple(shape))

    def transpose(self, x: V, permutation: Sequence[int]) -> V:
        """x with its axes permuted."""
        order = tuple(permutation)
        if order == tuple(range(x.rank)):
            return x
        shape = tuple(x.shape[p] for p in order)
        if x.rank == 2:
            made = self.emit("transpose", [x], shape, x.dtype, permutation=order)
            self.lowerer.turned[made.id] = x
            return made
        if x.rank == 3 and order == (0, 2, 1):  # a matrix for every expert
            made = self.emit("transpose", [x], shape, x.dtype, permutation=order)
            self.lowerer.turned[made.id] = x
            return made
        return self.emit("transpose", [x], shape, x.dtype, permutation=order)

    def expand(self, x: V, shape: Sequence[int]) -> V:
        """x broadcast to a shape."""
        if tuple(shape) == x.shape:
            return x
        return self.emit("expand", [x], shape, x.dtype, shape=tuple(shape))

    def cast(self, x: V, dtype: str) -> V:
        """x in another dtype."""
        if x.dtype == dtype:
            return x
        return self.emit("cast", [x], x.shape, dtype, dtype=dtype)

    def slice(self, x: V, axis: int, start: int, end: int, step: int = 1) -> V:
        """A part of an axis; nothing where it is all of it."""
        if start == 0 and end == x.shape[axis] and step == 1:
            return x
        shape = list(x.shape)
        shape[axis] = len(range(start, end, step))
        return self.emit(
            "slice", [x], shape, x.dtype, axes=(axis,), starts=(start,), ends=(end,), steps=(step,)
        )

    def concat(self, parts: Sequence[V], axis: int) -> V:
        """Parts one after another along an axis."""
        shape = list(parts[0].shape)
        shape[axis] = sum(p.shape[axis] for p in parts)
        return self.emit("concat", list(parts), shape, parts[0].dtype, axis=axis)


class Lowerer:
    """Walks the fx graph once."""

    def __init__(
        self,
        recording: Recording,
        name: str,
        mode: Mode,
        laws: Mapping[str, Recorded] | None,
        assume_training: bool = False,
    ) -> None:
        self.recording, self.laws = recording, laws or {}
        self.assume_training = assume_training
        self.builder = GraphBuilder(name, mode, "torch")
        self.env: dict[fx.Node, Any] = {}
        self.version: dict[fx.Node, int] = {}
        self.views: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.materialised: dict[int, str] = {}
        self.turned: dict[str, V] = {}  # value id of a transposed matrix -> the matrix
        self.written: set[fx.Node] = set()
        self.folded = 0
        self.count = 0
        self._alive: list[Tensor] = []  # constants are known by identity

    # ------------------------------------------------------------------ values

    def id_of(self, v: V) -> str:
        """The id of a value; a constant is declared when it is first read."""
        if v.id:
            return v.id
        elements = v.elements
        if elements is None:
            raise NotModelled("a value without elements")
        key = id(elements)
        found = self.materialised.get(key)
        if found is None:
            found = self._declare(elements)
            self.materialised[key] = found
            self._alive.append(elements)
        return found

    def _declare(self, elements: Tensor) -> str:
        if elements.is_meta:  # a buffer of a model that was built without elements
            return self.builder.parameter(
                self.builder.fresh("buffer"),
                tuple(elements.shape),
                dtype=dtype_name(elements.dtype),
                trainable=False,
            )
        array = _as_numpy(elements)
        if array.size <= CONSTANT_LIMIT:
            return self.builder.constant(array)
        name = self.builder.fresh("constant")  # of a larger one the moments are enough
        return self.builder.parameter(
            name,
            tuple(array.shape),
            _law_of_elements(array),
            dtype_name(elements.dtype),
            trainable=False,
        )

    def read(self, node: fx.Node) -> Any:
        """The current value of an fx node."""
        found = self.views.get(node)
        if found is not None:
            base, seen = found
            self.read(base)
            if self.version.get(base, 0) != seen:
                self.views[node] = (base, self.version.get(base, 0))
                self.env[node] = self._seen_again(node, self.env[base])
                self.version[node] = self.version.get(node, 0) + 1
        return self.env[node]

    def _seen_again(self, node: fx.Node, base: Any) -> Any:
        """What a view shows once its base was written to."""
        elements = getattr(base, "elements", None)
        if elements is not None:
            view = self._view_of(node, elements)
            if view is not None:
                return V("", tuple(view.shape), dtype_name(view.dtype), view)
        return self.lower(node)

    def write(self, node: fx.Node, value: V) -> None:
        """A call wrote into an fx node's tensor."""
        self.env[node] = value
        self.version[node] = self.version.get(node, 0) + 1
        found = self.views.get(node)
        if found is None:
            return
        base = found[0]
        whole = self.env[base]
        if isinstance(whole, V):
            self.write(base, self._put_back(node, whole, value))
            self.views[node] = (base, self.version[base])

    def _put_back(self, node: fx.Node, base: V, value: V) -> V:
        name = _view_name(node)
        if base.elements is not None and value.elements is not None:
            whole = base.elements.clone()
            view = self._view_of(node, whole)
            if view is not None:
                view.copy_(value.elements.expand_as(view))
                return V("", base.shape, base.dtype, whole)
        call = Call(self, node, name)
        if name in _SAME_ELEMENTS:
            return call.reshape(value, base.shape)
        inverse = VIEWS.get(name)
        try:
            if inverse is None:
                raise NotModelled("a write through this view")
            return inverse(call, base, value)
        except NotModelled:
            return call.emit(UNKNOWN, [base, value], base.shape, base.dtype)

    def _view_of(self, node: fx.Node, whole: Tensor) -> Tensor | None:
        """The view that a node makes, of other elements of its base."""
        if _view_name(node) == "alias":
            return whole
        args, kwargs = fx.node.map_arg(
            (node.args[1:], node.kwargs), lambda n: getattr(self.read(n), "elements", None)
        )
        try:
            view = node.target(whole, *args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError, IndexError, ValueError):
            return None
        return view if isinstance(view, Tensor) else None

    # ------------------------------------------------------------------ nodes

    def run(self) -> LayerGraph:
        """The layer graph."""
        outputs: list[str] = []
        names = iter(self.recording.names)
        for node in self.recording.graph.nodes:
            if node.op == "placeholder":
                val = node.meta["val"]
                shape, dtype = tuple(val.shape), dtype_name(val.dtype)
                self.env[node] = V(self.builder.input(next(names), shape, dtype), shape, dtype)
            elif node.op == "get_attr":
                self.env[node] = self._attribute(node)
            elif node.op == "output":
                outputs = self._outputs(node)
            else:
                self._call(node)
        return self.builder.finish(outputs, folded=self.folded, notes=self.recording.notes)

    def _outputs(self, node: fx.Node) -> list[str]:
        found: list[str] = []
        parts: Any = fx.node.map_arg(node.args[0], self.read)
        for part in parts:
            if isinstance(part, V):
                found.append(self.id_of(part))
        return list(dict.fromkeys(found))

    def _attribute(self, node: fx.Node) -> V:
        val = node.meta["val"]
        elements = node.meta.get("constant")
        name = str(node.target)
        shape, dtype = tuple(val.shape), dtype_name(val.dtype)
        if elements is not None and not node.meta.get("trainable"):
            return V("", shape, dtype, elements)
        if name not in self.builder.parameters:
            found = self.laws.get(name, Recorded(None))
            law = found.law
            if law is None and not node.meta.get("trainable"):
                law = _LAW_OF_STATISTICS.get(name.rpartition(".")[2])
            self.builder.parameter(
                name,
                shape,
                law,
                dtype,
                found.site,
                trainable=bool(node.meta.get("trainable")),
                load=self._loader(name) if name not in self.laws else _of_table(found.elements),
                clone_of=found.clone_of,
                shared=found.shared,
                overwritten=found.overwritten,
                frozen=bool(node.meta.get("frozen")),
                flaw=found.flaw,
            )
        return V(name, shape, dtype, parameter=True)

    def _loader(self, name: str) -> Callable[[], Any] | None:
        tensor = self.recording.attributes.get(name, self.recording.constants.get(name))
        if tensor is None or tensor.device.type == "meta":
            return None

        def load(tensor: Tensor = tensor) -> Any:
            return _as_numpy(tensor.detach())

        return load

    def _call(self, node: fx.Node) -> None:
        elements = node.meta.get("constant")
        in_place = bool(node.meta.get("in_place"))
        target = _target(node)
        if isinstance(elements, Tensor):
            value: Any = V("", tuple(elements.shape), dtype_name(elements.dtype), elements)
            self.folded += 1
        else:
            value = self.lower(node)
        self.env[node] = value
        if in_place and target is not None and isinstance(value, V):
            self.write(target, self._of_shape(node, value, target))
            self.env[node] = self.env[target]
            self.views[node] = (target, self.version[target])
        elif target is not None and (
            (name := _call_name(node).name) in VIEWS or name in _SAME_ELEMENTS
        ):
            self.views[node] = (target, self.version.get(target, 0))

    def _of_shape(self, node: fx.Node, value: V, target: fx.Node) -> V:
        old = self.env[target]
        if (
            isinstance(old, V)
            and _call_name(node).name not in _SAME_ELEMENTS
            and (value.shape != old.shape)
        ):
            return Call(self, node, "expand").expand(value, old.shape)
        return value

    def lower(self, node: fx.Node) -> Any:
        """Emit the nodes of a call; the value, or tuple of values, it gives."""
        if node.meta.get("part"):
            return self._part(node)
        name = _call_name(node)
        call = Call(self, node, name.name)
        function = TABLE.get(name.name)
        mark = len(self.builder.nodes)
        args, kwargs = self._arguments(node, node.args, node.kwargs)
        if node.target is getattr:
            args = (args[0],)
        try:
            if function is None:
                raise NotModelled("no lowering")
            return function(call, *args, **_renamed(function, kwargs))
        except (
            NotModelled,
            TypeError,
            IndexError,
            ValueError,
            AttributeError,
            KeyError,
        ) as problem:
            if not isinstance(problem, NotModelled) and STRICT:
                raise
            del self.builder.nodes[mark:]
            return self._unknown(call, args, kwargs)

    def _part(self, node: fx.Node) -> Any:
        whole = self.read(node.args[0])  # type: ignore[arg-type]
        index: Any = node.args[1]
        if isinstance(whole, tuple | list):
            return whole[index]
        if index == 0 and isinstance(whole, V):
            return whole
        raise AssertionError(f"{node} takes a part of one value")

    def _arguments(self, node: fx.Node, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], Any]:
        args, kwargs = fx.node.map_arg((args, kwargs), self.read)
        return tuple(args), dict(kwargs)

    def _unknown(self, call: Call, args: Any, kwargs: Any) -> Any:
        inputs = [v for v in _flat((args, kwargs)) if isinstance(v, V)]
        results: list[tuple[Sequence[int], str]] = []
        tree = _results(call.out, results)
        if call.node.meta.get("in_place") and not results and inputs:
            return call.emit(UNKNOWN, inputs, inputs[0].shape, inputs[0].dtype)
        if not results:
            return None
        made = iter(call.emit_many(UNKNOWN, inputs, results))
        return _fill(tree, made)


def _target(node: fx.Node) -> fx.Node | None:
    """What a call writes into or is a view of: its first argument, or what ``out`` names."""
    out = node.kwargs.get("out")
    first = out if out is not None else node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


STRICT = False  # tests set this: a lowering that trips over its arguments is a defect

_SAME_ELEMENTS = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "squeeze",
        "unsqueeze",
        "unflatten",
        "contiguous",
        "view_as",
        "reshape_as",
        "detach",
        "data",
        "alias",
        "ravel",
        "_unsafe_view",
        "_reshape_alias",
    ]
)
_LAW_OF_STATISTICS = {
    "running_mean": constant(0.0, "BatchNorm"),
    "running_var": constant(1.0, "BatchNorm"),
}


def _results(tree: Any, results: list[tuple[Sequence[int], str]]) -> Any:
    if isinstance(tree, Tensor):
        results.append((tuple(tree.shape), dtype_name(tree.dtype)))
        return True
    if isinstance(tree, tuple | list):
        return tuple(_results(t, results) for t in tree)
    return None


def _fill(tree: Any, made: Any) -> Any:
    if tree is True:
        return next(made)
    if isinstance(tree, tuple):
        return tuple(_fill(t, made) for t in tree)
    return None


def _flat(tree: Any) -> list[Any]:
    if isinstance(tree, tuple | list):
        return [leaf for part in tree for leaf in _flat(part)]
    if isinstance(tree, dict):
        return [leaf for part in tree.values() for leaf in _flat(part)]
    if isinstance(tree, slice):
        return _flat((tree.start, tree.stop, tree.step))
    return [tree]


def _renamed(function: Lower, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    known = _names_of(function)
    found = {}
    for key, value in kwargs.items():
        if key not in known:
            key = _ALIASES.get(key, key)
        if key not in known and key in _DROPPED:
            continue
        found[key] = value
    return found


def _call_name(node: fx.Node) -> Name:
    if node.target is getattr:
        return Name(str(node.args[1]))
    target: Any = node.target
    return name_of(target)


def _view_name(node: fx.Node) -> str:
    """How a node sees its base; a call in place gives what it wrote into."""
    return "alias" if node.meta.get("in_place") else _call_name(node).name


def _as_numpy(elements: Tensor) -> Any:
    elements = elements.detach().cpu()
    if elements.dtype == torch.bfloat16:
        elements = elements.float()
    return np.array(elements.resolve_conj().resolve_neg().numpy())


def _law_of_elements(array: Any) -> Distribution | None:
    if array.dtype.kind not in "fiu":
        return None
    numbers = array.astype(np.float64)
    if not np.isfinite(numbers).all():
        return None
    mean = float(numbers.mean())
    centred = numbers - mean
    variance = float((centred**2).mean())
    fourth = float((centred**4).mean())
    return Distribution(
        "deterministic",
        mean,
        variance + mean * mean,
        fourth / variance**2 if variance > 0 else float("nan"),
        symmetric=False,
        count=array.size,
    )


def lower(
    recording: Recording,
    name: str = "model",
    mode: Mode = "train",
    laws: Mapping[str, Recorded] | None = None,
    assume_training: bool = False,
) -> LayerGraph:
    """The layer graph of a recording. ``laws`` maps a parameter's name to law, site, clone.

    ``assume_training`` is for graphs that were exported in evaluation: their norms are meant as
    training runs them where ``mode`` is ``train``.
    """
    return Lowerer(recording, name, mode, laws, assume_training).run()


def known(name: str) -> bool:
    """Whether a Python function of torch is one node of the recorded graph."""
    return name in TABLE and name not in ENTERED


# These have a lowering for what exported programs call them, but say more when they are entered.
ENTERED = frozenset[str](())

assert UNKNOWN not in OPS


def _of_table(elements: Tensor | None) -> Callable[[], Any] | None:
    """What loads a table that the record holds."""
    if elements is None or elements.device.type == "meta":
        return None
    return lambda: _as_numpy(elements)
