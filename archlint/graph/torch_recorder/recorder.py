"""Record one forward of a model as a ``torch.fx`` graph, on meta tensors.

Every call of torch is one node: its target and arguments, in ``meta`` the value it had (``val``,
shape and dtype), the module it was called in (``module``, ``module_type``) and the place in the
source (``site``). Python functions of torch that the lowering does not know as a whole are entered.
What reaches torch's dispatcher without a Python call (scripted functions, custom C++ code) is
recorded there, as the operator of the dispatcher.

The program under recording believes that it runs on the CPU. What follows from literals alone
(positions, masks, sizes) is computed at once and kept as ``meta["constant"]``, so that ``.item()``
and branches on it work; what depends on data raises :class:`DataDependent`.

The graph executes: ``fx.Interpreter(fx.GraphModule(model, graph)).run(*tensors)`` gives the
model's output tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import eq, is_
from types import FunctionType
from typing import Any, Literal

import torch
import torch.overrides
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from archlint.finding import Site
from archlint.graph.sites import calling_site, constructor_site, origin_of
from archlint.graph.torch_recorder.caches import caches_emptied
from archlint.graph.torch_recorder.kernels import SHAPES, spare_kernels
from archlint.graph.torch_recorder.names import Name, name_of
from archlint.graph.torch_recorder.replay import Place, replay, tells_places
from archlint.graph.torch_recorder.results import Results, mapped, tensors_of

Device = Literal["meta", "cpu"]

# Elements up to which what follows from literals is computed and kept: the mask of a large window.
CONSTANT_LIMIT = 1 << 22


class DataDependent(RuntimeError):
    """The program asked for a number that depends on the data."""


@dataclasses.dataclass(frozen=True)
class Recording:
    """A recorded forward. ``names`` are the names of the inputs, in the order of placeholders."""

    graph: fx.Graph
    model: nn.Module
    names: tuple[str, ...]
    constants: Mapping[str, Tensor]  # tensors of the program that are no parameter or buffer
    attributes: Mapping[str, Tensor]  # state_dict name -> parameter or buffer, as read
    notes: tuple[str, ...] = ()

    def module(self, model: nn.Module | None = None) -> fx.GraphModule:
        """The graph over the parameters of ``model``, to be executed."""
        owner = self.model if model is None else model
        attributes: dict[str, Any] = {}
        for node in self.graph.nodes:
            if node.op == "get_attr":
                attributes[node.target] = self._attribute(owner, str(node.target))
        return fx.GraphModule(attributes, self.graph)

    def _attribute(self, owner: nn.Module, name: str) -> Any:
        if name in self.constants:
            return self.constants[name]
        found: Any = owner
        for part in name.split("."):
            found = getattr(found, part)
        return found


_RANDOM = frozenset(
    [
        "rand",
        "randn",
        "randint",
        "randperm",
        "bernoulli",
        "multinomial",
        "normal",
        "uniform",
        "exponential",
        "random",
        "geometric",
        "cauchy",
        "log_normal",
        "poisson",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "alpha_dropout",
        "feature_dropout",
        "feature_alpha_dropout",
        "rand_like",
        "randn_like",
        "randint_like",
        "rrelu",
        "gumbel_softmax",
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "native_dropout",
        "_standard_gamma",
        "binomial",
        "fractional_max_pool2d",
        "fractional_max_pool3d",
    ]
)
_FACTORIES = frozenset(
    [
        "arange",
        "range",
        "zeros",
        "ones",
        "full",
        "empty",
        "empty_strided",
        "rand",
        "randn",
        "randint",
        "randperm",
        "eye",
        "linspace",
        "logspace",
        "tril_indices",
        "triu_indices",
        "hann_window",
        "hamming_window",
        "blackman_window",
        "bartlett_window",
        "kaiser_window",
        "fft_fftfreq",
        "fft_rfftfreq",
        "normal",
        "complex",
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "rand_like",
        "randn_like",
        "randint_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "new_tensor",
        "tensor",
        "as_tensor",
        "asarray",
        "scalar_tensor",
        "sparse_coo_tensor",
        "from_file",
    ]
)
_FOLLOW = frozenset(  # factories that take the device of their first argument
    [
        "zeros_like",
        "ones_like",
        "full_like",
        "empty_like",
        "rand_like",
        "randn_like",
        "randint_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "complex",
    ]
)
_FILLED = frozenset(  # of them, what takes no more than the shape and type of its first argument
    ["zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"]
)
_SHAPED = frozenset(("expand_as", "view_as", "reshape_as", "type_as"))  # of the second, no more
_FROM_DATA = frozenset(("tensor", "as_tensor", "asarray", "new_tensor"))
_TO_PYTHON = frozenset(
    [
        "item",
        "tolist",
        "bool",
        "int",
        "float",
        "index",
        "complex",
        "numpy",
        "__bool__",
        "array",
        "len",
        "contains",
        "_local_scalar_dense",
        "equal",
        "allclose",
        "is_nonzero",
        "long",
        "format",
        "repr",
        "iter",
        "reversed",
    ]
)
_READ_DATA = frozenset(
    [
        "item",
        "tolist",
        "bool",
        "int",
        "float",
        "index",
        "complex",
        "numpy",
        "array",
        "contains",
        "_local_scalar_dense",
        "equal",
        "allclose",
        "is_nonzero",
    ]
)
_SIZED = frozenset(  # functions of a tensor and of sizes
    [
        "pad",
        "interpolate",
        "view",
        "reshape",
        "expand",
        "repeat",
        "tile",
        "unflatten",
        "narrow",
        "roll",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "adaptive_avg_pool1d",
        "adaptive_avg_pool2d",
        "avg_pool1d",
        "avg_pool2d",
    ]
)
_INDEXED = frozenset(("getitem", "setitem", "__getitem__", "__setitem__"))
_MOVES = frozenset(("cuda", "cpu", "xpu", "npu", "pin_memory", "share_memory"))


def tensors_in(tree: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested sequences, mappings and dataclasses, each with its path."""
    yield from _walk("", tree, set())


def _walk(path: str, tree: Any, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        yield path, tree
        return
    if tree is None or isinstance(tree, str | int | float | bool | nn.Module) or id(tree) in seen:
        return
    seen.add(id(tree))
    parts: Any
    if isinstance(tree, Mapping):
        parts = tree.items()
    elif isinstance(tree, tuple) and hasattr(tree, "_fields"):
        parts = zip(tree._fields, tree, strict=False)
    elif isinstance(tree, list | tuple):
        parts = enumerate(tree)
    elif dataclasses.is_dataclass(tree):
        parts = ((f.name, getattr(tree, f.name)) for f in dataclasses.fields(tree))
    else:
        return
    for key, part in parts:
        yield from _walk(f"{path}.{key}" if path else str(key), part, seen)


def _is_name(text: str) -> bool:
    return text.isidentifier()


class Recorder(TorchFunctionMode):
    """The mode that records. Use :func:`record_forward`."""

    def __init__(
        self,
        model: nn.Module,
        device: Device,
        leaf: Callable[[str], bool],
        trains: bool = False,
        stop: Any = None,
    ) -> None:
        super().__init__()
        self.model, self.device, self.leaf, self.stop = model, device, leaf, stop
        self.graph = fx.Graph()
        self.node_of: dict[int, fx.Node] = {}
        self.kept: list[Any] = []  # tensors are known by identity: none may be freed
        self.known: dict[int, Tensor] = {}  # id -> elements that follow from literals
        self.holders: dict[int, list[fx.Node]] = {}  # storage of elements -> nodes of them
        self.supposed: dict[int, Tensor] = {}  # what is taken to be so, should it be asked for
        self.reasons: dict[int, str] = {}  # why, for each of these
        self.twins: dict[int, Tensor] = {}  # id of a real tensor -> its meta tensor
        self.constants: dict[str, Tensor] = {}
        self.attributes: dict[str, Tensor] = {}
        self.notes: dict[str, None] = {}
        self.inside = False  # whether a recorded call is being executed
        self.stack: list[tuple[str, nn.Module]] = []
        self.place: Place | None = None  # where a traced graph's call comes from
        self.paths = {id(m): name for name, m in model.named_modules()}
        self.state: dict[int, tuple[str, bool]] = {}
        for name, parameter in model.named_parameters():
            self.state.setdefault(id(parameter), (name, True))
        for name, buffer in model.named_buffers():
            self.state.setdefault(id(buffer), (name, False))
        self.trains = trains
        self.grad = False  # whether gradients are to be had in forward
        self.within = False  # whether a call is being recorded
        self.enabled = True  # torch.is_grad_enabled(), as the program sees it
        self.wanted = True  # what the program last asked for
        self.differentiated = 0  # calls being made of functions that bring their own gradient
        self.detached: dict[fx.Node, fx.Node] = {}
        self.bodies: dict[int, dict[str, Any]] = {}
        self.entered: list[Any] = []
        self.unhooked: dict[Any, Callable[..., Any]] = {}
        self.results = Results(modes=1)

    # ------------------------------------------------------------------ tensors and nodes

    def keep(self, tensor: Tensor, node: fx.Node) -> None:
        """Say that a tensor is what a node gives."""
        self.kept.append(tensor)
        self.node_of[id(tensor)] = node

    def twin(self, tensor: Tensor) -> Tensor:
        """The tensor to compute with: on meta, whatever the program holds."""
        if self.device == "cpu" or tensor.is_meta:
            return tensor
        found = self.twins.get(id(tensor))
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            with torch._C._DisableTorchDispatch():  # no call of the program
                found = torch.empty_strided(
                    tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta"
                )
            self.twins[id(tensor)] = found
            self.kept += [tensor, found]
        return found

    def node(self, tensor: Tensor) -> fx.Node:
        """The node that gives a tensor; a new ``get_attr`` for one not seen before."""
        found = self.node_of.get(id(tensor))
        if found is not None:
            return found
        known = self.state.get(id(tensor))
        if known is None:
            base = getattr(tensor, "_base", None)
            if base is not None and id(base) in self.state and base.shape == tensor.shape:
                known = self.state[id(base)]
        name = known[0] if known is not None else f"_tensor_constant{len(self.constants)}"
        node = self.graph.create_node("get_attr", name, (), {})
        node.meta["val"] = self.twin(tensor)
        node.meta["trainable"] = known is not None and known[1]
        node.meta["frozen"] = node.meta["trainable"] and not tensor.requires_grad
        node.meta["gradient"] = node.meta["trainable"] and not node.meta["frozen"]
        node.meta["module"], node.meta["module_type"] = self.where()
        if known is None:
            self.constants[name] = tensor
        else:
            self.attributes[name] = tensor
        self._learn_constant(tensor, node, known)
        self.keep(tensor, node)
        if self.device == "meta":
            self.node_of[id(self.twin(tensor))] = node
        return node

    def _learn_constant(
        self, tensor: Tensor, node: fx.Node, known: tuple[str, bool] | None
    ) -> None:
        """Elements of buffers and of tensors of the program that no training changes."""
        if known is not None and (known[1] or known[0].rpartition(".")[2] in _CHANGING):
            return
        elements = getattr(tensor, "_archlint_elements", None)
        if elements is None and tensor.device.type != "meta" and not tensor.is_sparse:
            before, self.inside = self.inside, True  # no call of the program
            elements = tensor.detach()
            if elements.numel() <= CONSTANT_LIMIT:
                elements = elements.clone()  # a write of the program must not reach the model
            self.inside = before
        if elements is not None and elements.numel() <= CONSTANT_LIMIT:
            self.known[id(tensor)] = elements
            if self.device == "meta":
                self.known[id(self.twin(tensor))] = elements
            self._remember(node, elements)

    def _remember(self, node: fx.Node, elements: Tensor) -> None:
        """File the elements that a node's tensor has now."""
        node.meta["constant"] = elements
        self.holders.setdefault(elements.untyped_storage().data_ptr(), []).append(node)

    def _before_write(self, tensor: Tensor) -> None:
        """Let the nodes so far keep the elements that a write is about to change."""
        elements = self.known.get(id(tensor))
        if elements is None:
            return
        before, self.inside = self.inside, True  # no call of the program
        for node in self.holders.pop(elements.untyped_storage().data_ptr(), ()):
            node.meta["constant"] = node.meta["constant"].clone()
        self.inside = before

    def at(self, place: Place | None) -> None:
        """Say where the next calls come from, if a traced graph is run that tells."""
        self.place = place

    def where(self) -> tuple[str, str]:
        """Path and class name of the module being called."""
        if self.place is not None:
            return self.place.module, self.place.module_type
        if not self.stack:
            return "", ""
        path, module = self.stack[-1]
        return path, type(module).__name__

    def site(self) -> Site | None:
        """The place to show for a call: the user's line, or a layer's constructor call."""
        if self.place is not None:
            return self.place.site
        module = self.stack[-1][1] if self.stack else None
        if module is not None:
            owner = origin_of(
                getattr(sys.modules.get(type(module).__module__), "__file__", "") or ""
            )
            made = constructor_site(module) if owner in ("torch", "library") else None
            if made is not None and (owner == "torch" or origin_of(made.file) == "user"):
                return made
        return calling_site(sys._getframe(1), self.stop)

    def argument(self, value: Any) -> Any:
        """A call's argument as fx holds it."""
        if isinstance(value, Tensor):
            return self._with_gradient(self.node(value))
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return tuple(self.argument(v) for v in value)
        if isinstance(value, tuple | torch.Size):
            return tuple(self.argument(v) for v in value)
        if isinstance(value, list):
            return [self.argument(v) for v in value]
        if isinstance(value, dict):
            return {k: self.argument(v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self.argument(v) for v in (value.start, value.stop, value.step)))
        return value

    def append(self, target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> fx.Node:
        """A new node at the end of the graph."""
        node = self.graph.create_node(
            "call_function",
            target,
            tuple(self.argument(a) for a in args),
            {k: self.argument(v) for k, v in kwargs.items()},
        )
        node.meta["module"], node.meta["module_type"] = self.where()
        if self.stack:
            node.meta["module_call"] = id(self.stack[-1][1])
        node.meta["site"] = self.site()
        of = {n.meta.get("gradient", False) for n in node.all_input_nodes}
        if of - {False}:
            node.meta["gradient"] = True if self.keeps_gradients() else None
        return node

    # What a gradient reaches is marked in ``meta["gradient"]``: True, or None where it would but
    # for ``torch.no_grad()``. What is computed from that later takes it detached.

    def keeps_gradients(self) -> bool:
        """Whether the program is outside of ``torch.no_grad()`` and its like."""
        if not self.trains or self.differentiated:
            return True
        # the forward of an autograd.Function runs without, which the program did not ask for
        return (self.enabled or self.wanted) and not torch.is_inference_mode_enabled()

    def _with_gradient(self, node: fx.Node) -> fx.Node:
        """A node as an argument: detached where it was computed without gradients, unless this is
        too."""
        if node.meta.get("gradient", False) is not None or not self.keeps_gradients():
            return node
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return node
        found = self.detached.get(node)
        if found is None:
            found = self.graph.create_node("call_function", Tensor.detach, (node,), {})
            found.meta.update({k: v for k, v in node.meta.items() if k in _DESCRIBING})
            if "constant" in node.meta:
                self._remember(found, node.meta["constant"])
            found.meta["module"], found.meta["module_type"] = self.where()
            self.detached[node] = found
        return found

    def enter_results(self, node: fx.Node, result: Any, known: Any, arguments: set[int]) -> None:
        """File the tensors of a result under their nodes."""
        if isinstance(result, Tensor):
            node.meta["val"] = _shape_only(result)
            if isinstance(known, Tensor):
                self.known[id(result)] = known
                self._remember(node, known)
            if id(result) not in arguments or node.meta.get("in_place"):
                self.keep(result, node)
        elif isinstance(result, list | tuple):
            for i, part in enumerate(result):
                if isinstance(part, Tensor | list | tuple):
                    item = self.graph.create_node("call_function", _getitem, (node, i), {})
                    item.meta.update(
                        {
                            k: node.meta[k]
                            for k in ("module", "module_type", "site", "gradient")
                            if k in node.meta
                        }
                    )
                    item.meta["part"] = True
                    inner = known[i] if isinstance(known, list | tuple) else None
                    self.enter_results(item, part, inner, arguments)
            node.meta["val"] = tuple(
                _shape_only(p) if isinstance(p, Tensor) else None for p in result
            )

    # ------------------------------------------------------------------ the two modes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every call of its API."""
        kwargs = kwargs or {}
        if func is torch._C._set_grad_enabled:
            self.wanted = args[0]
            return func(*args, **kwargs)
        if self.inside or (func in _QUESTIONS and len(args) and id(args[0]) in self.node_of):
            return func(*args, **kwargs)
        if torch._C._functorch.maybe_current_level() is not None:
            # under vmap and the like tensors are wrapped: the dispatcher sees what they hold
            return func(*args, **kwargs)
        name = name_of(func)
        if (
            isinstance(func, FunctionType)
            and func not in self.entered  # a body that hands itself back is no body
            and not self.leaf(name.name)
        ):
            return self._enter(func, args, kwargs)
        return self._without_gradients(self.call, func, name, args, kwargs)

    def _without_gradients(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call without torch keeping what it would take to differentiate, which nothing needs."""
        if self.within:
            return function(*args)
        self.within, self.enabled = True, torch.is_grad_enabled()
        switched = self.enabled and not self.grad
        if switched:
            torch._C._set_grad_enabled(False)
        try:
            return function(*args)
        finally:
            self.within = False
            if switched:
                torch._C._set_grad_enabled(True)

    def _enter(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the body of a Python function of torch with its calls recorded."""
        body = self.unhooked.get(func)
        if body is None:
            scope = self.bodies.get(id(func.__globals__))
            if scope is None:
                scope = dict(func.__globals__)
                for check in _CHECKS:
                    if check in scope:
                        scope[check] = _never
                self.bodies[id(func.__globals__)] = scope
            body = FunctionType(
                func.__code__, scope, func.__name__, func.__defaults__, func.__closure__
            )
            body.__kwdefaults__ = func.__kwdefaults__
            self.unhooked[func] = body
        self.entered.append(func)
        try:
            with self:
                return body(*args, **kwargs)
        finally:
            self.entered.pop()

    def call(self, func: Any, name: Name, args: Any, kwargs: Any) -> Any:
        """Execute a call, and record it where it gives or changes a tensor."""
        short = name.name
        if short in _ANSWERS and args and isinstance(args[0], Tensor):
            return _ANSWERS[short](self, args[0])
        if short in _MOVES:
            return args[0]
        if short == "to":
            args, kwargs = _without_device(args, kwargs)
            if len(args) == 1 and not kwargs.keys() - {"non_blocking", "copy"}:
                return args[0]
        if short in _READ_DATA:
            return self._read(func, short, args, kwargs)
        if short in ("set_", "__set__data") or short.startswith("__set__"):
            return self._execute(func, args, kwargs)
        if short in _SIZED and self.device == "meta":
            args, kwargs = self._sizes(args, kwargs)
        if short in _INDEXED and self.device == "meta" and len(args) > 1:
            args = (args[0], self._bounds(args[1]), *args[2:])
        leaves = tensors_of(args, kwargs)
        if short in _FROM_DATA:
            return self._from_data(func, short, args, kwargs, leaves)
        result, known = self._compute(func, name, args, kwargs, leaves)
        in_place = _in_place(name, kwargs)
        own = self._own(leaves)
        if not in_place and not self._is_new(result, own):
            return result  # a size, a flag, or the argument itself
        self._record(func, name, args, kwargs, result, known, in_place, own)
        return result

    def _own(self, leaves: list[Tensor]) -> set[int]:
        """The identities of a call's arguments, and of what stands for them on meta."""
        own = {id(t) for t in leaves}
        if self.device == "meta":
            own.update([id(self.twin(t)) for t in leaves if not t.is_meta])
        return own

    @staticmethod
    def _is_new(result: Any, own: set[int]) -> bool:
        """Whether a result holds a tensor that is no argument."""
        if isinstance(result, Tensor):
            return id(result) not in own
        return any(id(t) not in own for _, t in tensors_in(result))

    def _record(
        self,
        func: Any,
        name: Name,
        args: Any,
        kwargs: Any,
        result: Any,
        known: Any,
        in_place: bool,
        own: set[int],
    ) -> None:
        if "generator" in kwargs:
            kwargs = {k: v for k, v in kwargs.items() if k != "generator"}
        target = _written(args, kwargs)
        before = self.node_of.get(id(target)) if in_place else None
        if getattr(func, "__name__", "") == "__get__":
            node = self.append(getattr, (args[0], name.name), {})
        else:
            node = self.append(func, args, kwargs)
        if in_place:
            node.meta["in_place"] = True
            if result is None and isinstance(known, Tensor):
                self._remember(node, known)
            if before is not None and before.meta.get("gradient", False):
                node.meta["gradient"] = True  # what is written without gradients leaves it so
        self.enter_results(node, result, known, own)
        if in_place and isinstance(result, Tensor) and isinstance(target, Tensor):
            # the program goes on with the tensor it wrote into, which may be a real parameter
            self.keep(target, node)

    def _execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self.device == "cpu":
            return self._execute_plain(func, args, kwargs)
        if any(not t.is_meta for t in tensors_of(args, kwargs)):
            args, kwargs = mapped(args, kwargs, self.twin)
        func = SHAPES.get(getattr(func, "__name__", ""), func)
        self.inside = True
        try:
            return self.results.of(func, args, kwargs)
        finally:
            self.inside = False

    def _compute(
        self, func: Any, name: Name, args: Any, kwargs: Any, leaves: list[Tensor]
    ) -> tuple[Any, Any]:
        """The result, and the same from known elements where all arguments are known."""
        short = name.name
        made = dict(kwargs)
        factory = short in _FACTORIES
        if factory or "device" in made:
            made.pop("device", None)
            made.pop("pin_memory", None)
            if self.device == "meta":
                made.pop("generator", None)
                if short not in _FOLLOW and factory:
                    made["device"] = "meta"
        elif self.device == "meta":
            made.pop("generator", None)
        filled = short in _FILLED and bool(args)
        of = leaves[:1] if short in _SHAPED else leaves[filled:]
        knowable = short not in _RANDOM and (factory or bool(leaves)) and all(map(self._knows, of))
        known = None
        written = list(tensors_in(_written(args, kwargs))) if _in_place(name, kwargs) else []
        if knowable:
            for _, target in written:
                self._before_write(target)
            known = self._known_result(
                func, args, {k: v for k, v in made.items() if k != "device"}, filled
            )
        if known is None:
            for _, target in written:
                self._forget(target)
        try:
            result = self._execute(func, args, made)
            if known is None and self.device == "meta" and isinstance(result, Tensor):
                self._suppose(func, short, args, kwargs, leaves, result)
        except (RuntimeError, NotImplementedError) as problem:
            if known is None and self.device == "meta" and _WANTS_ELEMENTS.search(str(problem)):
                raise DataDependent(f"{short} needs elements") from problem
            if known is None or self.device == "cpu":
                raise
            # such as nonzero: the shape follows from the elements
            if not _all_tensors(known):
                raise problem
            result = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), known)
        return result, known

    def _sizes(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The arguments with known integers, where sizes are wanted, as the numbers they are."""

        def number(value: Tensor) -> Any:
            one = value.numel() == 1 and not value.is_floating_point()
            return self.known[id(value)].item() if one and self._knows(value) else value

        rest: Any = (args[1:], kwargs)
        if tensors_of(*rest):
            rest = pytree.tree_map_only(Tensor, number, rest)
        return (*args[:1], *rest[0]), rest[1]

    def _bounds(self, index: Any) -> Any:
        """An index whose slices are bounded by numbers, not by tensors that hold one."""
        if isinstance(index, tuple):
            return tuple(self._bounds(part) for part in index)
        if not isinstance(index, slice):
            return index
        parts = [index.start, index.stop, index.step]
        if any(isinstance(part, Tensor) and not self._knows(part) for part in parts):
            raise DataDependent("a slice is bounded by what depends on the data")
        return slice(*(self.known[id(p)].item() if isinstance(p, Tensor) else p for p in parts))

    def _suppose(
        self, func: Any, short: str, args: Any, kwargs: Any, leaves: list[Tensor], result: Tensor
    ) -> None:
        """What to take a result for, should the program branch on it.

        A single random number is its median: whole layers are skipped by ``torch.rand([]) < p``,
        and the likelier case is seen. Numbers are finite, which some programs look after.
        """
        found: Tensor | None = None
        why = ""
        if result.numel() == 1 and short in _MEDIANS and not leaves:
            found = torch.full((), _MEDIANS[short], dtype=result.dtype, device="cpu")
            why = "forward branches on a random number: taken to be its median"
        elif short in _IF_FINITE and leaves:
            found = torch.full((), _IF_FINITE[short], device="cpu")
            why = "forward asks whether numbers are finite: taken to be so"
        elif (
            short not in _RANDOM
            and (reason := next((self.reasons[id(t)] for t in leaves if id(t) in self.reasons), ""))
            and all(id(t) in self.supposed or self._knows(t) for t in leaves)
        ):
            args, kwargs = pytree.tree_map_only(
                Tensor,
                lambda t: self.supposed.get(id(t), self.known.get(id(t))),
                (args, kwargs),
            )
            with contextlib.suppress(RuntimeError, TypeError, ValueError):
                found, why = self._execute_plain(func, args, kwargs), reason
        if found is not None and result.numel() <= _SUPPOSED_LIMIT:
            self.supposed[id(result)] = found.expand(result.shape)
            self.reasons[id(result)] = why

    def _knows(self, tensor: Tensor) -> bool:
        if id(tensor) in self.known:
            return True
        if id(tensor) in self.node_of:
            return False
        self.node(tensor)
        return id(tensor) in self.known

    def _known_result(self, func: Any, args: Any, kwargs: Any, filled: bool = False) -> Any:
        short = name_of(func).name
        if filled and isinstance(args[0], Tensor) and not self._knows(args[0]):
            like = args[0]
            shape = (0,) if short.startswith("new_") else like.shape
            if math.prod(shape) > CONSTANT_LIMIT or like.layout != torch.strided:
                return None
            self.inside = True
            like = torch.empty(shape, dtype=like.dtype, device="cpu")
            self.inside = False
            args = (like, *args[1:])
            self.known[id(like)] = like
            self.kept.append(like)
        args, kwargs = mapped(args, kwargs, self._known_or_shaped)
        if _asks_for_many(func, args):
            return None
        self.inside = True
        try:
            found = func(*args, **kwargs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
            return None
        finally:
            self.inside = False
        if found is None and name_of(func).in_place:
            found = args[0]  # an assignment by index gives nothing
        if any(t.numel() > CONSTANT_LIMIT or t.is_sparse for _, t in tensors_in(found)):
            return None
        return found

    def _known_or_shaped(self, tensor: Tensor) -> Tensor:
        """The known elements; of other tensors no more than shape and type."""
        known = self.known.get(id(tensor))
        if known is None:
            self.inside = True
            known = torch.empty((), dtype=tensor.dtype, device="cpu").expand(tensor.shape)
            self.inside = False
        return known

    def _forget(self, tensor: Tensor) -> None:
        """What shares elements with a tensor that was written to is known no longer."""
        elements = self.known.get(id(tensor))
        if elements is None:
            return
        start = elements.untyped_storage().data_ptr()
        for key in [k for k, t in self.known.items() if t.untyped_storage().data_ptr() == start]:
            del self.known[key]

    def _read(self, func: Any, short: str, args: Any, kwargs: Any) -> Any:
        """A number out of tensors: known, or dependent on data."""
        leaves = tensors_of(args, kwargs)
        if self.device == "cpu":
            return self._execute(func, args, kwargs)
        if short in ("float", "int", "bool", "long") and func in _CASTS:
            return self.call_plain(func, Name(short), args, kwargs)
        if not all(id(t) in self.supposed or self._knows(t) for t in leaves):
            raise DataDependent(f"Tensor.{short} depends on the data")
        self.notes.update({self.reasons[id(t)]: None for t in leaves if id(t) in self.reasons})
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: self.supposed.get(id(t), self.known.get(id(t))), (args, kwargs)
        )
        self.inside = True
        try:
            return func(*args, **kwargs)
        finally:
            self.inside = False

    def call_plain(self, func: Any, name: Name, args: Any, kwargs: Any) -> Any:
        """A call without any special meaning."""
        leaves = tensors_of(args, kwargs)
        result, known = self._compute(func, name, args, kwargs, leaves)
        own = self._own(leaves)
        if isinstance(result, Tensor) and id(result) not in own:
            self._record(func, name, args, kwargs, result, known, False, own)
        return result

    def _from_data(
        self, func: Any, short: str, args: Any, kwargs: Any, leaves: list[Tensor]
    ) -> Any:
        """``torch.tensor`` and its like: the elements are there."""
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "pin_memory")}
        start = 1 if short == "new_tensor" else 0
        data = args[start] if len(args) > start else kwargs.get("data")
        if isinstance(data, Tensor):
            dtype = kwargs.get("dtype")
            return data if dtype is None else data.to(dtype)
        inner = [v for v in pytree.tree_leaves(data) if isinstance(v, Tensor)]
        if not all(self._knows(t) for t in inner) and self.device == "meta":
            raise DataDependent("torch.tensor of numbers that depend on the data")
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda t: self.known.get(id(t), t), (args, kwargs)
        )
        self.inside = True
        try:
            elements: Tensor = func(*args, **kwargs)
            result = elements.to("meta") if self.device == "meta" else elements
        finally:
            self.inside = False
        name = f"_tensor_constant{len(self.constants)}"
        self.constants[name] = elements
        node = self.graph.create_node("get_attr", name, (), {})
        node.meta.update(val=_shape_only(result), trainable=False)
        self._remember(node, elements)
        node.meta["module"], node.meta["module_type"] = self.where()
        self.keep(result, node)
        if elements.numel() <= CONSTANT_LIMIT:
            self.known[id(result)] = elements
        return result

    def dispatched(self, func: Any, args: Any, kwargs: Any) -> Any:
        """A call of the dispatcher that no Python call of torch stands for."""
        name = name_of(func)
        if name.name in ("_local_scalar_dense", "is_nonzero", "item"):
            return self._read(func, name.name, args, kwargs)
        if name.name in ("detach", "alias", "lift_fresh"):
            result = self._execute(func, args, kwargs)
            if args and isinstance(args[0], Tensor):
                source = args[0]
                if id(source) in self.node_of or id(source) in self.state:
                    self.keep(result, self.node(source))
                    if id(source) in self.known:
                        self.known[id(result)] = self.known[id(source)]
            return result
        return self.call_plain_tree(func, name, args, kwargs)

    def call_plain_tree(self, func: Any, name: Name, args: Any, kwargs: Any) -> Any:
        """As :meth:`call_plain` for results of any form."""
        leaves = tensors_of(args, kwargs)
        if not leaves:
            return self._execute(func, args, kwargs)
        if self.device == "meta" and not any(t.device.type == "meta" for t in leaves):
            # arithmetic of the program on its own real tensors (numpy, tables): it keeps them
            return self._execute_plain(func, args, kwargs)
        result, known = self._compute(func, name, args, kwargs, leaves)
        own = self._own(leaves)
        produced = next(tensors_in(result), None) is not None
        if produced and (name.in_place or self._is_new(result, own)):
            self._record(func, name, args, kwargs, result, known, name.in_place, own)
        return result

    def _execute_plain(self, func: Any, args: Any, kwargs: Any) -> Any:
        self.inside = True
        try:
            return func(*args, **kwargs)
        finally:
            self.inside = False

    # ------------------------------------------------------------------ modules

    @contextlib.contextmanager
    def modules(self) -> Iterator[None]:
        """Follow the calls of modules."""
        original = nn.Module.__call__
        recorder = self

        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            if type(module).__name__ == "OptimizedModule":  # what torch.compile returned
                return module._orig_mod(*args, **kwargs)
            path = recorder.paths.get(id(module))
            if path is None:
                outer = recorder.stack[-1][0] if recorder.stack else ""
                path = f"{outer}.{type(module).__name__}" if outer else type(module).__name__
            recorder.stack.append((path, module))
            try:
                return original(module, *args, **kwargs)
            except Exception as problem:
                if not hasattr(problem, "_archlint_module"):
                    with contextlib.suppress(AttributeError):
                        problem._archlint_module = (path, type(module).__name__)  # type: ignore[attr-defined]
                raise
            finally:
                recorder.stack.pop()

        nn.Module.__call__ = call  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.__call__ = original  # type: ignore[method-assign]

    @contextlib.contextmanager
    def functions(self) -> Iterator[None]:
        """Follow the calls of functions that bring their own gradient (``autograd.Function``)."""
        original = vars(torch.autograd.Function)["apply"]
        recorder = self

        def apply(owner: Any, *args: Any, **kwargs: Any) -> Any:
            kept = torch.is_grad_enabled()
            recorder.differentiated += kept
            try:
                return original.__func__(owner, *args, **kwargs)
            finally:
                recorder.differentiated -= kept

        torch.autograd.Function.apply = classmethod(apply)  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            torch.autograd.Function.apply = original  # type: ignore[method-assign]

    def outputs(self, tensors: Sequence[Tensor]) -> tuple[fx.Node, ...]:
        """The nodes of the results."""
        nodes = [self.node(t) for t in tensors]
        reached = [n.meta.get("gradient", False) for n in nodes]
        self.enabled = True
        if True in reached:
            return tuple(self._with_gradient(n) for n in nodes)
        if None in reached:
            self.notes["forward keeps no gradients: they are those that it would have"] = None
        return tuple(nodes)


class _Dispatcher(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Catches what reaches the dispatcher without a call of torch's Python API."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard against it costs more than a call

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.recorder.inside:
            return func(*args, **(kwargs or {}))
        # code in C++ gets here while the other mode is on, which would answer for tensors
        with torch._C.DisableTorchFunction():
            recorder = self.recorder
            return recorder._without_gradients(recorder.dispatched, func, args, kwargs or {})


# What is asked of a tensor and needs no recording. Methods and the getters of properties.
_QUESTIONS = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "layout")),
        *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.stride, Tensor.is_floating_point),
    )
)

# What torch says of operators that have no shape function, most because data decides the shape.
_WANTS_ELEMENTS = re.compile(
    r"with Meta tensors|register_meta function|a meta tensor without|'Meta' backend"
)
_MEDIANS = {"rand": 0.5, "randn": 0.0}
_IF_FINITE = {"isfinite": True, "isnan": False, "isinf": False}  # what they say of finite numbers
_SUPPOSED_LIMIT = 2**26  # elements up to which something is supposed
_DESCRIBING = frozenset(("val", "site"))
_CHANGING = frozenset(("running_mean", "running_var", "num_batches_tracked"))
_CHECKS = (
    "has_torch_function",
    "has_torch_function_unary",
    "has_torch_function_variadic",
    "_has_torch_function",
    "_has_torch_function_unary",
    "_has_torch_function_variadic",
)
_CASTS = frozenset((Tensor.float, Tensor.int, Tensor.bool, Tensor.long))


def _written(args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What a call in place writes into."""
    out = kwargs.get("out")
    return out if out is not None else args[0] if args else None


def _in_place(name: Name, kwargs: Mapping[str, Any]) -> bool:
    """Whether a call writes into a tensor that it is given."""
    return name.in_place or kwargs.get("out") is not None or kwargs.get("inplace") is True


def _never(*_: Any) -> bool:
    return False


def _getitem(sequence: Any, index: int) -> Any:
    return sequence[index]


def _all_tensors(tree: Any) -> bool:
    return all(isinstance(v, Tensor) for v in pytree.tree_leaves(tree))


def _shape_only(tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta":
        return tensor
    if tensor.is_sparse or tensor.is_nested:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _without_device(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """``x.to(…)`` without what it says about devices."""
    kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "memory_format")}
    kept = [args[0]]
    for value in args[1:]:
        if isinstance(value, torch.device | str | None.__class__) or type(value) is bool:
            continue
        if isinstance(value, int):
            continue
        kept.append(value.dtype if isinstance(value, Tensor) else value)
    if kwargs.get("dtype", ...) is None:
        kwargs.pop("dtype")
    other = kwargs.pop("other", None)
    if isinstance(other, Tensor):
        kept.append(other.dtype)
    target = next((v for v in [*kept[1:], kwargs.get("dtype")] if isinstance(v, torch.dtype)), None)
    if target is None or target == args[0].dtype:
        return (args[0],), {}
    return (args[0], target), {}


_MANY = frozenset(
    (
        "zeros",
        "ones",
        "full",
        "eye",
        "empty",
        "arange",
        "linspace",
        "new_zeros",
        "new_ones",
        "new_full",
    )
)


def _asks_for_many(func: Any, args: Any) -> bool:
    """Whether a factory was asked for more elements than are kept."""
    if name_of(func).name not in _MANY:
        return False
    numbers = [v for v in pytree.tree_leaves(args) if isinstance(v, int) and v > 0]
    product = 1
    for n in numbers:
        product *= n
    return product > CONSTANT_LIMIT * 64


_ANSWERS: dict[str, Callable[[Recorder, Tensor], Any]] = {
    "device": lambda recorder, tensor: torch.device("cpu"),
    "is_meta": lambda recorder, tensor: False,
    "is_cpu": lambda recorder, tensor: True,
    "is_cuda": lambda recorder, tensor: False,
    "get_device": lambda recorder, tensor: -1,
}


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """What forward stores in modules (caches, buffers it registers) is taken away again."""
    tables = ("_buffers", "_parameters", "_modules")
    saved = [
        (m, dict(m.__dict__), [(m.__dict__[t], dict(m.__dict__[t])) for t in tables])
        for m in model.modules()
        if all(t in m.__dict__ for t in tables)  # a scripted module keeps its tensors elsewhere
    ]
    try:
        yield
    finally:
        for module, attributes, contents in saved:
            for table, content in [(module.__dict__, attributes), *contents]:
                if not _same(table, content):
                    table.clear()
                    table.update(content)


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    alike = len(a) == len(b) and all(map(eq, a.keys(), b.keys()))
    return alike and all(map(is_, a.values(), b.values()))


@contextlib.contextmanager
def _eager() -> Iterator[None]:
    """Switch off what computes past Python: fused fast paths and compilers."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with contextlib.ExitStack() as stack:
            if hasattr(torch.compiler, "set_stance"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(spare_kernels())
            # what looks it up by its full name (nn.init) would hand itself back when entered
            stack.enter_context(_replaced(torch.overrides, "has_torch_function_variadic", _never))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def record_forward(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    leaf: Callable[[str], bool],
    device: Device = "meta",
    grad: bool = False,
) -> Recording:
    """Run ``model(*args, **kwargs)`` once and return what it called.

    ``leaf`` says which Python functions of torch are one node, by canonical name. On ``meta`` no
    weight is read and none has to exist; the model's exceptions pass through. ``grad``: whether
    gradients can be taken in ``forward``.
    """
    recorder = Recorder(model, device, leaf, model.training, sys._getframe(0))
    recorder.grad = grad
    names: list[str] = []

    def enter(name: str, tensor: Tensor) -> Tensor:
        name = name.replace(".", "_")
        node = recorder.graph.placeholder(name if _is_name(name) else f"input_{name}")
        given = recorder.twin(tensor)
        if given is tensor:
            given = tensor.clone() if device == "cpu" else torch.empty_like(tensor)
        node.meta["val"] = _shape_only(given)
        recorder.keep(given, node)
        elements = getattr(tensor, "_archlint_elements", None)
        if elements is not None:
            recorder.known[id(given)] = elements
        # fx avoids names such as `input` that Python has taken; the user's flag says `input`
        wanted = str(node.target)
        names.append(node.name if wanted in names else wanted)
        return given

    position_names = _parameter_names(model, len(args))
    with torch.set_grad_enabled(grad or recorder.trains):
        args = tuple(_replace(position_names[i], a, enter) for i, a in enumerate(args))
        kwargs = {k: _replace(k, v, enter) for k, v in kwargs.items()}
        with (
            _attributes_kept(model),
            caches_emptied(model),
            _eager(),
            recorder.modules(),
            recorder.functions(),
            _Dispatcher(recorder),
            recorder,
        ):
            try:
                if isinstance(model, fx.GraphModule) and tells_places(model):
                    result = replay(model, args, kwargs, recorder.at)
                else:
                    result = model(*args, **kwargs)
            except Exception as problem:
                with contextlib.suppress(AttributeError):
                    problem._archlint_progress = len(recorder.graph.nodes)  # type: ignore[attr-defined]
                raise
        outputs = [tensor for _, tensor in tensors_in(result)]
        recorder.graph.output(recorder.outputs(outputs))
    return Recording(
        recorder.graph,
        model,
        tuple(names),
        recorder.constants,
        recorder.attributes,
        tuple(recorder.notes),
    )


def _parameter_names(model: nn.Module, count: int) -> list[str]:
    import inspect

    try:
        names = [
            p.name
            for p in inspect.signature(model.forward).parameters.values()
            if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        names = []
    return [names[i] if i < len(names) else f"input_{i}" for i in range(count)]


def _replace(path: str, tree: Any, enter: Callable[[str, Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return enter(path, tree)
    if isinstance(tree, dict):
        return {k: _replace(f"{path}_{k}", v, enter) for k, v in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(_replace(f"{path}_{i}", v, enter) for i, v in enumerate(tree)))
    if isinstance(tree, list | tuple):
        return type(tree)(_replace(f"{path}_{i}", v, enter) for i, v in enumerate(tree))
    return tree
