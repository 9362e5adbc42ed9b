"""What a torch callable is called, whatever way it is reached.

``torch.add``, ``Tensor.add``, ``Tensor.__add__``, ``x += y`` and ``aten.add.Tensor`` are one name.
Where two callables of one name take their arguments in different order, they get two names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

# The C++ operators whose Python namesake orders its arguments differently.
_ATEN_ORDER = ("embedding", "batch_norm", "instance_norm", "embedding_bag")
_SPECIAL: dict[Any, str] = {
    F.unfold: "im2col",
    F.fold: "col2im",
    torch.nn.functional.pad: "pad",
}
_SPECIAL.update({getattr(torch, name): f"aten_{name}" for name in _ATEN_ORDER})

_DUNDERS = {
    "truediv": "div",
    "rtruediv": "rdiv",
    "idiv": "div_",
    "itruediv": "div_",
    "floordiv": "floor_divide",
    "rfloordiv": "rfloor_divide",
    "ifloordiv": "floor_divide_",
    "mod": "remainder",
    "rmod": "rremainder",
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "rand": "bitwise_and",
    "ror": "bitwise_or",
    "rxor": "bitwise_xor",
    "iand": "bitwise_and_",
    "ior": "bitwise_or_",
    "ixor": "bitwise_xor_",
    "invert": "bitwise_not",
    "iadd": "add_",
    "isub": "sub_",
    "imul": "mul_",
    "ipow": "pow_",
    "imod": "remainder_",
    "radd": "add",
    "rmul": "mul",
    "div": "div",
    "rdiv": "rdiv",
    "setitem": "setitem_",
}


class Name(NamedTuple):
    """A canonical name, and whether the callable writes into its first argument."""

    name: str
    in_place: bool = False


@lru_cache(maxsize=8192)
def name_of(function: Callable[..., Any]) -> Name:
    """The canonical name of a torch callable; ``T`` for the getter of ``Tensor.T``."""
    if function in _SPECIAL:
        return Name(_SPECIAL[function])
    schema = getattr(function, "_schema", None)
    if schema is not None or hasattr(function, "_qualified_op_name"):
        qualified: str = schema.name if schema is not None else function._qualified_op_name  # type: ignore[attr-defined]
        namespace, _, name = qualified.partition("::")
        if namespace != "aten":
            return Name(qualified)
        if name in _ATEN_ORDER:
            return Name(f"aten_{name}")
        return _plain(name)
    name = getattr(function, "__name__", type(function).__name__)
    if name in ("__get__", "__set__", "__delete__"):
        owner = getattr(getattr(function, "__self__", None), "__name__", "attribute")
        return Name(owner) if name == "__get__" else Name(f"{name}{owner}", True)
    return _plain(name)


def _plain(name: str) -> Name:
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        name = _DUNDERS.get(name, name)
    elif name.startswith("special_"):
        name = name.removeprefix("special_")
    if name.endswith("_") and not name.startswith("_"):
        return Name(name.rstrip("_"), True)
    return Name(name)
