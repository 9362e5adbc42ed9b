"""Run a graph of ``torch.fx`` node by node, so that calls get the module path their node tells.

A traced or exported graph has no modules to call: where a call comes from stands in its node's
``nn_module_stack`` and ``stack_trace``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx

from archlint.finding import Site
from archlint.graph.sites import origin_of

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_ROOT = re.compile(r"^(L\['self'\]|L__self__|self)\.?")


class Place(NamedTuple):
    """Module path, class name and line of a node."""

    module: str
    module_type: str
    site: Site | None


def tells_places(model: object) -> bool:
    """Whether a module is an fx graph whose nodes say which module they come from."""
    return isinstance(model, fx.GraphModule) and any(
        node.meta.get("nn_module_stack") for node in model.graph.nodes
    )


def place_of(node: fx.Node) -> Place:
    """Where a node of a traced graph comes from."""
    path, kind = "", ""
    stack = node.meta.get("nn_module_stack")
    if isinstance(stack, Mapping) and stack:
        path, owner = list(stack.values())[-1]
        kind = owner if isinstance(owner, str) else getattr(owner, "__name__", "")
    path = _ROOT.sub("", path).split("@")[0]
    path = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", path.replace("slice(None, ", "")).strip(
        "."
    )
    return Place(path, kind.rpartition(".")[2], _site(node.meta.get("stack_trace")))


def _site(trace: Any) -> Site | None:
    frames = _FRAME.findall(trace) if isinstance(trace, str) else []
    spare: Site | None = None
    for file, line in reversed(frames):
        origin = origin_of(file)
        if origin == "user":
            return Site(file, int(line))
        if origin == "library" and spare is None:
            spare = Site(file, int(line))
    return spare


class Replay(fx.Interpreter):
    """Executes a graph and says before each node where it comes from."""

    def __init__(self, model: fx.GraphModule, at: Callable[[Place | None], None]) -> None:
        super().__init__(model, garbage_collect_values=False)
        self.at = at
        # an exception keeps torch's own message: the layer is told by us
        self.extra_traceback = False

    def run_node(self, n: fx.Node) -> Any:
        """Execute one node."""
        self.at(place_of(n) if n.op != "call_module" else None)
        return super().run_node(n)


def replay(
    model: fx.GraphModule,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    at: Callable[[Place | None], None],
) -> Any:
    """What ``model(*args, **kwargs)`` gives, node by node."""
    names = [node.target for node in model.graph.nodes if node.op == "placeholder"]
    by_name = dict(kwargs)
    rest = [by_name.pop(n) for n in names[len(args) :] if n in by_name]
    try:
        return Replay(model, at).run(*args, *rest, *by_name.values())
    finally:
        at(None)
