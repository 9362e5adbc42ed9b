"""Module paths: the name that a user knows a layer by, whatever wrote the file.

Four sources, best first: the scopes that torch's dynamo exporter writes into ``metadata_props``;
node names that are paths (torch's tracing exporter, tf2onnx, keras2onnx); the names of the
initializers that a node reads. The two torch exporters give the same path for the same layer.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple, Protocol

from archlint.finding import Site
from archlint.graph.model import LayerGraph, Node
from archlint.graph.ops import OPS


class StringEntry(Protocol):
    """onnx's StringStringEntryProto, as far as it is read here."""

    @property
    def key(self) -> str:
        """The key."""

    @property
    def value(self) -> str:
        """The value."""


class SourceNode(Protocol):
    """onnx's NodeProto, as far as it is read here."""

    @property
    def name(self) -> str:
        """The node's name, possibly empty."""

    @property
    def op_type(self) -> str:
        """The operator."""

    @property
    def input(self) -> Sequence[str]:
        """The names of the inputs, empty for one left out."""

    @property
    def doc_string(self) -> str:
        """Free text; older torch exporters write the Python frames here."""

    @property
    def metadata_props(self) -> Iterable[StringEntry]:
        """Key-value remarks."""


class Origin(NamedTuple):
    """Where a node comes from: module path, class name of that module, line of source."""

    module: str = ""
    module_type: str = ""
    site: Site | None = None


def module_names(nodes: Sequence[SourceNode], parameters: Iterable[str] = ()) -> list[Origin]:
    """The origin of every node, in the same order.

    ``nodes`` are onnx NodeProtos (of one graph, or of a graph and its subgraphs together);
    ``parameters`` are all names by which initializers can be read, *including* the output names of
    ``Identity`` nodes over initializers: torch's exporter shares equal initializers that way, and
    the alias is the name that tells the layer. What has no name is the root, ``""``.
    """
    owners = {name: owner for name in parameters if (owner := parameter_module(name))}
    legacy = _LegacyPaths(nodes, owners)
    return [_origin(node, owners, legacy) for node in nodes]


def _origin(node: SourceNode, owners: Mapping[str, str], legacy: _LegacyPaths) -> Origin:
    metadata = {entry.key: entry.value for entry in node.metadata_props}
    site = site_from_trace(metadata.get("pkg.torch.onnx.stack_trace", "")) or site_from_trace(
        node.doc_string
    )
    if scopes := _strings(metadata.get("pkg.torch.onnx.name_scopes", "")):
        classes = _strings(metadata.get("pkg.torch.onnx.class_hierarchy", ""))
        # The last entry is the operator itself; the one before it the innermost module.
        module = _without_call_counts(scopes[-2]) if len(scopes) > 1 else ""
        known = len(classes) == len(scopes) > 1
        return Origin(module, classes[-2].rsplit(".", 1)[-1] if known else "", site)
    if (scope := _torch_scope(node.name)) is not None:
        return Origin(legacy.path(scope), "", site)
    if "/" in node.name:
        return Origin(_keras_module(node.name, node.op_type), "", site)
    return Origin(next((owners[v] for v in node.input if v in owners), ""), "", site)


@lru_cache(maxsize=4096)
def _strings(literal: str) -> tuple[str, ...]:
    """A tuple of strings from the Python literal of a list of strings, else nothing."""
    if not literal.startswith("[") or len(literal) > 65536:
        return ()
    try:
        found = ast.literal_eval(literal)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ()
    return tuple(found) if all(isinstance(item, str) for item in found) else ()


def _without_call_counts(path: str) -> str:
    """``torch.export`` marks the second call of a shared module by ``@1``; it is one layer."""
    return re.sub(r"@\d+", "", path)


# --------------------------------------------------------------------------- lines of source

_FRAME = re.compile(r'File "([^"\n]+)", line (\d+)')
_OLD_FRAME = re.compile(r"^\s*(?:#\s*)?([^\s():][^():\n]*\.py)[(:](\d+)\)?:?", re.MULTILINE)
_LIBRARY = re.compile(r"[/\\](?:site-packages|dist-packages|lib[/\\]python\d[\d.]*)[/\\]|^<")


def site_from_trace(text: str) -> Site | None:
    """The user's line in a stack trace: the innermost frame outside installed packages,
    or else the innermost frame; None where the text holds no frame."""
    if not isinstance(text, str) or ".py" not in text:  # protobuf gives bytes for no UTF-8
        return None
    frames = [(file, int(line)) for file, line in _FRAME.findall(text)]
    if not frames:  # written innermost first
        frames = [(file, int(line)) for file, line in _OLD_FRAME.findall(text)][::-1]
    own = [frame for frame in frames if not _LIBRARY.search(frame[0])]
    for file, line in reversed(own or frames):
        return Site(file, line)
    return None


# --------------------------------------------------------------------------- initializers

# What may stand for "the weight itself" at the end of a dotted name, besides any single component:
# torch's parametrizations keep theirs two levels deeper.
_PARAMETRIZED = re.compile(r"\.parametrizations\.[^.]+(\.original\d*|\.\d+\..*)?$")
_CAFFE2 = re.compile(r"_(?:w|b|s|g|rm|riv|scale|bias|mean|var)_0(?:__SHAPE)?$")
_ANONYMOUS = re.compile(
    r"(onnx::\w+|val_\d+\w*|v?\d+|const\w*__\d+|\w+__\d+|/.*_output_\d+)(:[\dx]+)?$"
)
_VARIABLE_TAIL = re.compile(
    r"(ReadVariableOp|resource|kernel|bias|gamma|beta|moving_mean|moving_variance|embeddings"
    r"|recurrent_kernel|depthwise_kernel|pointwise_kernel|BiasAdd|MatMul|Conv[123]D|Conv2DTranspose"
    r"|conv2d_transpose|depthwise|Tensordot|batchnorm|FusedBatchNormV3|embedding_lookup"
    r"|(Const|Cast)(_\d+)?)$"
)


def parameter_module(name: str) -> str:
    """The module that a parameter belongs to: ``layer1.0.conv1.weight`` -> ``layer1.0.conv1``.

    Empty for a parameter of the root and for a name that an exporter made up.
    """
    if _ANONYMOUS.match(name):
        return ""
    if "/" in name or name.endswith(":0"):
        return _variable_module(name)
    if caffe2 := _CAFFE2.search(name):
        return name[: caffe2.start()]
    name = _PARAMETRIZED.sub(".weight", name)
    return name.rpartition(".")[0]


def _variable_module(name: str) -> str:
    if caffe2 := _CAFFE2.search(name):
        return ".".join(_components(name[: caffe2.start()]))
    parts = _components(name.removesuffix(":0"))
    while parts and _VARIABLE_TAIL.match(parts[-1]):
        parts.pop()
    return ".".join(parts)


def _components(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    while parts and re.match(r"(Stateful)?PartitionedCall(_\d+)?$|gpu_\d+$", parts[0]):
        parts.pop(0)
    return parts


# What torch calls the inputs of a layer that are parameters.
_ROLES = {
    "weight": "weight",
    "bias": "bias",
    "scale": "weight",
    "shift": "bias",
    "recurrence": "weight_hh",
    "mean": "running_mean",
    "variance": "running_var",
}


def restore_parameter_names(graph: LayerGraph) -> LayerGraph:
    """The graph with the parameters that an exporter stored under a made-up name (``val_6``,
    ``onnx::MatMul_476``) called after the layer that alone reads them: ``blocks.0.fc1.weight``.
    """
    if graph.source != "onnx":
        return graph
    wanted: dict[str, set[str]] = {}
    for node in graph.nodes:
        for position, value in enumerate(node.inputs):
            name = graph.values[value].parameter if value is not None else None
            if name is not None and not parameter_module(name):
                wanted.setdefault(name, set()).add(_restored(graph, node, position))
    new: dict[str, str] = {}
    for old, names in wanted.items():
        name = names.pop()
        if names or not name:
            continue
        base, layer = name, 1
        while name in graph.parameters or name in new.values():
            name, layer = f"{base}_l{layer}", layer + 1
        new[old] = name
    if not new:
        return graph
    return replace(
        graph,
        parameters={
            new.get(key, key): replace(p, name=new.get(key, key))
            for key, p in graph.parameters.items()
        },
        values={
            key: replace(v, parameter=new[v.parameter]) if v.parameter in new else v
            for key, v in graph.values.items()
        },
    )


def _restored(graph: LayerGraph, node: Node, position: int) -> str:
    """What the parameter at an input of a node would be called; empty where that is not known."""
    if node.op not in OPS or not node.module or position >= len(OPS[node.op].inputs):
        return ""
    kind = OPS[node.op].kind
    role = _ROLES.get(OPS[node.op].inputs[position].rstrip("?"), "")
    if not role or kind not in ("affine", "normalisation", "recurrent"):
        return ""
    if kind == "recurrent" and role == "weight":
        role = "weight_ih"
    for value in node.inputs:  # ``in_proj_bias`` tells of ``in_proj_weight``
        name = graph.values[value].parameter if value is not None else None
        owner, _, leaf = (name or "").rpartition(".")
        if role == "weight" and owner == node.module and leaf.endswith("bias"):
            return f"{owner}.{leaf.removesuffix('bias')}weight"
    return f"{node.module}.{role}"


# --------------------------------------------------------------------------- path-like node names

_INLINED = re.compile(r"^.*__Inline_\d+__(?=/)")
_INDEX = re.compile(r"(\.\d+)+$")


def _torch_scope(name: str) -> tuple[str, ...] | None:
    """The scopes of a node name of torch's tracing exporter, ``/layer1/layer1.0/conv1/Conv`` ->
    ``("layer1", "layer1.0", "conv1")``; None where the name is not of that kind."""
    head, slash, rest = _INLINED.sub("", name).partition("/")
    if not slash or (head and not head.endswith(("_", "-"))):  # a prefix from onnx.compose
        return None
    parts = [part for part in rest.split("/")[:-1] if part]
    if head:  # that prefix is written before initializers' names without a slash: do as there
        parts[:1] = [head + parts[0]] if parts else [head.rstrip("_-")]
    return tuple(parts)


class _LegacyPaths:
    """Full module paths from the shortened ones of torch's tracing exporter.

    That exporter writes, for every module *that was called*, the last part of its path that is no
    number together with the numbers after it: ``layer1.0`` inside ``layer1``, ``h.0`` inside
    ``transformer``. A component therefore repeats its parent's name (a Sequential's child), or
    continues the parent, or skips containers that were never called. The names of the
    initializers decide between these.
    """

    def __init__(self, nodes: Sequence[SourceNode], owners: Mapping[str, str]) -> None:
        self._known: set[str] = set()
        self._by_tail: dict[str, list[str]] = {}
        for owner in owners.values():
            parts = owner.split(".")
            for end in range(len(parts), 0, -1):
                path = ".".join(parts[:end])
                if path in self._known:
                    break
                self._known.add(path)
                self._by_tail.setdefault(_unqualified(path), []).append(path)
        self._witnesses: dict[tuple[str, ...], set[str]] = {}
        for node in nodes:
            scope = _torch_scope(node.name) or ()
            witness = next((owners[v] for v in node.input if v in owners), None)
            if witness is not None:
                for end in range(1, len(scope) + 1):
                    self._witnesses.setdefault(scope[:end], set()).add(witness)
        self._paths: dict[tuple[str, ...], str] = {(): ""}

    def path(self, scope: tuple[str, ...]) -> str:
        """The full path of a scope."""
        missing = len(scope)
        while scope[:missing] not in self._paths:
            missing -= 1
        for end in range(missing + 1, len(scope) + 1):
            self._paths[scope[:end]] = self._extend(self._paths[scope[: end - 1]], scope[:end])
        return self._paths[scope]

    def _extend(self, parent: str, scope: tuple[str, ...]) -> str:
        name = scope[-1]
        stem = _unqualified(parent) if parent else ""
        child = f"{parent}.{name}" if parent else name
        continued = (
            parent + name[len(stem) :]
            if stem and name.startswith(stem + ".") and _INDEX.fullmatch(name[len(stem) :])
            else None
        )
        witnesses = self._witnesses.get(scope, ())
        candidates = [c for c in (continued, child) if c is not None and c in self._known]
        inside = parent + "." if parent else ""
        hidden = [p for p in self._by_tail.get(name, ()) if p.startswith(inside) and p != child]
        candidates += sorted((p for p in hidden if p not in candidates), key=lambda p: p.count("."))
        for candidate in candidates:
            if any((w + ".").startswith(candidate + ".") for w in witnesses):
                return candidate
        if continued is not None and (continued in self._known or child not in self._known):
            return continued
        return child


def _unqualified(path: str) -> str:
    """The last component that is no number, with the numbers after it: ``a.b.0.1`` -> ``b.0.1``."""
    numbers = _INDEX.search(path)
    body = path[: numbers.start()] if numbers else path
    return body.rpartition(".")[2] + (numbers.group() if numbers else "")


def _keras_module(name: str, op_type: str) -> str:
    """The layer in a node name of tf2onnx or keras2onnx: ``model/dense/MatMul`` -> ``model.dense``.

    A fused node carries the names of all its parts, joined by ``;``: the part that names the
    operator is the one that holds the weight.
    """
    names = name.split(";")
    wanted = op_type.lower()
    chosen = next(
        (n for n in names if n.rpartition("/")[2].lower().startswith(wanted)),
        names[0],
    )
    parts = _components(chosen.removesuffix(":0"))[:-1]
    while parts and _VARIABLE_TAIL.match(parts[-1]):
        parts.pop()
    return ".".join(parts)


# --------------------------------------------------------------------------- paths for people


def common_path(paths: Iterable[str]) -> str:
    """The deepest module that contains all the paths: ``a.b.c``, ``a.b.d`` -> ``a.b``."""
    distinct = list(dict.fromkeys(paths))
    if len(distinct) == 1:
        return distinct[0]
    split = [path.split(".") if path else [] for path in distinct]
    shared = 0
    for column in zip(*split, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    return ".".join(split[0][:shared]) if split else ""


def collapse(paths: Collection[str]) -> str:
    """One name for several module paths, repeated indices as ``*``.

    ``blocks.0.mlp``, ``blocks.1.mlp`` -> ``blocks.*.mlp``; ``fc1``, ``fc2`` -> ``fc*``;
    ``h.0.q``, ``h.0.k`` -> ``h.0.{q,k}``; what has no more in common is named by the deepest
    common module, ``features.*``. A single path stays as it is.
    """
    distinct = list(dict.fromkeys(paths))
    if len(distinct) <= 1:
        return distinct[0] if distinct else ""
    split = [path.split(".") for path in distinct]
    lengths = {len(parts) for parts in split}
    if len(lengths) == 1:
        merged = [_merge(list(dict.fromkeys(column))) for column in zip(*split, strict=True)]
        if all(part is not None for part in merged):
            return ".".join(part for part in merged if part is not None)
    shared = common_path(distinct)
    return f"{shared}.*" if shared else "*"


def _merge(names: list[str]) -> str | None:
    if len(names) == 1:
        return names[0]
    if all(name.isdigit() for name in names):
        return "*"
    stems = {re.sub(r"\d+$", "", name) for name in names}
    if len(stems) == 1 and all(name[-1:].isdigit() for name in names):
        return f"{stems.pop()}*"
    return "{" + ",".join(names) + "}" if len(names) <= 3 and "" not in names else None
