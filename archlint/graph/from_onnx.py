"""From an ONNX file to the layer graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import onnx

from archlint.errors import ArchlintError
from archlint.graph.model import LayerGraph, Mode
from archlint.graph.onnx_reader import lower  # noqa: F401  (registers the operators)
from archlint.graph.onnx_reader.read import ModelFile, read_model
from archlint.graph.onnx_reader.reader import Reader
from archlint.graph.onnx_reader.shapes import Shape, ShapeConflict, Typed, declared
from archlint.graph.patterns import recognise

Inputs = Mapping[str, tuple[Shape, str | None]]

# Sizes to try for a free dimension, by what its place in the input makes it. The first that fits
# every operator is taken; a file says nowhere what it was made for.
_Kind = tuple[int, int, int, int]  # samples, side, length, middle
_SAMPLES = (2, 1, 128)
_LENGTHS = (32, 512, 128, 16000, 16, 80)
_SIDES = (224, 640, 48, 32)


def load_onnx(path: Path, inputs: Inputs | None = None, mode: Mode = "train") -> LayerGraph:
    """The layer graph of an ONNX file, with concrete shapes, laws of weights and module paths.

    ``inputs`` maps an input's name to a shape (and type) that binds its free dimensions; those
    left free are bound to sizes that fit the operators, which the graph's notes tell. ``mode``
    says how BatchNorm and dropout are meant. Raises ArchlintError for what is no neural network.
    """
    file = read_model(path)
    _refuse_what_is_no_network(file)
    file = _inlined(file)
    graph = _bound(file, inputs or {}, mode)
    return _fitted(recognise(graph))


def _fitted(graph: LayerGraph) -> LayerGraph:
    from archlint.initialization.fit import fit_graph

    return fit_graph(graph)


_CLASSICAL = frozenset(
    {"TreeEnsembleClassifier", "TreeEnsembleRegressor", "TreeEnsemble", "LinearClassifier",
     "LinearRegressor", "SVMClassifier", "SVMRegressor", "ZipMap", "Scaler", "Normalizer",
     "LabelEncoder", "OneHotEncoder", "Imputer", "FeatureVectorizer", "DictVectorizer",
     "CategoryMapper", "ArrayFeatureExtractor", "Binarizer", "CastMap"}
)  # fmt: skip
_NEURAL = frozenset(
    {"MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU", "RNN", "Attention", "Einsum",
     "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul"}
)  # fmt: skip


def _refuse_what_is_no_network(file: ModelFile) -> None:
    """Trees, linear classifiers and other classical models have nothing that archlint judges."""
    ops = {node.op_type for node in file.proto.graph.node}
    classical = sorted(
        {n.op_type for n in file.proto.graph.node if n.domain == "ai.onnx.ml"} & _CLASSICAL
    )
    if classical and not ops & _NEURAL:
        raise ArchlintError(
            f"{file.path} is no neural network: it is made of {', '.join(classical[:3])}",
            "archlint judges networks of weight layers; leave this file out",
        )


def _inlined(file: ModelFile) -> ModelFile:
    """The model with the bodies of its local functions in place of the calls."""
    if not file.proto.functions:
        return file
    from onnx.inliner import inline_local_functions

    try:
        return replace(file, proto=inline_local_functions(file.proto))
    except Exception as error:  # onnx raises plain RuntimeError and its own errors here
        text = str(error).split("\n")[0][:120]
        raise ArchlintError(
            f"{file.path}: its functions cannot be inlined: {text}", "export the model again"
        ) from error


# --------------------------------------------------------------------------- free dimensions


def _bound(file: ModelFile, given: Inputs, mode: Mode) -> LayerGraph:
    """Read with the first choice of sizes that fits; as far as shapes go where none does."""
    free = _free_inputs(file.proto)
    declared_names = [info.name for info in free]
    for name in given:
        if name not in declared_names:
            raise ArchlintError(
                f"{file.path} has no input {name!r}",
                f"its inputs are: {', '.join(declared_names) or 'none'}",
            )
    conflict: ShapeConflict | None = None
    branches = any(node.op_type == "If" for node in file.proto.graph.node)
    every = list(_choices(free, given, _needed(file.proto, free)))
    for alternatives in ((), [sizes for _, sizes in every]) if branches else ((),):
        said: dict[_Kind, str] = {}
        for kind, sizes in every:
            if _is_hopeless(kind, said):
                continue
            try:
                graph = Reader(file, sizes, mode, alternatives=alternatives).read()
            except ShapeConflict as error:
                conflict = conflict or error
                said[kind] = str(error)
                continue
            notes = (*graph.notes, *_assumed(free, sizes, given))
            if alternatives:
                notes = (*notes, f"no input size was found that fits both branches ({conflict})")
            return replace(graph, notes=notes)
    first = every[0][1]
    if given:
        raise ArchlintError(
            f"{file.path}: the input does not fit: {conflict}",
            "give shapes that fit together: --input NAME:2x3x224x224",
        )
    reader = Reader(file, first, mode, strict=False)
    graph = reader.read()
    remark = f"no input size was found that fits every operator ({conflict}); use --input"
    return replace(graph, notes=(*graph.notes, *_assumed(free, first, given), remark))


def _free_inputs(proto: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that are not initializers (which IR version 3 lists as inputs too)."""
    known = {tensor.name for tensor in proto.graph.initializer}
    return [info for info in proto.graph.input if info.name not in known]


def _names(info: onnx.ValueInfoProto) -> list[str]:
    return [d.dim_param for d in info.type.tensor_type.shape.dim]


def _choices(
    free: list[onnx.ValueInfoProto], given: Inputs, needed: Mapping[tuple[str, int], int]
) -> Iterator[tuple[_Kind, dict[str, Typed]]]:
    """Bindings of every free dimension, likely ones first; equal names get equal sizes."""
    tried: set[tuple[tuple[str, Typed], ...]] = set()
    for samples in _SAMPLES:
        for side in _SIDES:
            for length in _LENGTHS:
                for middle in (length, samples):
                    sizes = _binding(free, given, needed, samples, length, side, middle)
                    key = tuple(sorted(sizes.items()))
                    if key not in tried:
                        tried.add(key)
                        yield (samples, side, length, middle), sizes


def _is_hopeless(kind: _Kind, said: Mapping[_Kind, str]) -> bool:
    """Whether one and the same conflict, sizes and all, came for three lengths of such samples and
    sides, or for three sides of such samples: another length, or side, will not help."""
    for known in (2, 1):
        told: dict[int, str] = {}
        for other, text in said.items():
            if other[:known] == kind[:known]:
                told.setdefault(other[known], text)
        if len(told) >= 3 and len(set(told.values())) == 1:
            return True
    return False


def _needed(proto: onnx.ModelProto, free: list[onnx.ValueInfoProto]) -> dict[tuple[str, int], int]:
    """(input, axis) -> the size that a weight which the input meets at once asks for."""
    shapes = {t.name: tuple(t.dims) for t in proto.graph.initializer}
    ranks = {i.name: len(i.type.tensor_type.shape.dim) for i in free}
    source = {name: name for name in ranks}
    found: dict[tuple[str, int], int] = {}
    for node in proto.graph.node:
        op = node.op_type
        if op in ("Identity", "Cast", "Dropout", "Relu", "Tanh", "Sigmoid") and node.output:
            if node.input and node.input[0] in source:
                source[node.output[0]] = source[node.input[0]]
            continue
        met = [(i, source[name]) for i, name in enumerate(node.input) if name in source]
        if not met or len(node.input) < 2:
            continue
        place, name = met[0]
        weight = shapes.get(node.input[1 - place] if place < 2 else "")
        rank = ranks[name]
        if weight is None or not rank:
            continue
        if op in ("Add", "Sub", "Mul", "Div"):
            sizes = {rank - k: n for k, n in enumerate(reversed(weight), 1) if n > 1 and k <= rank}
        elif op in ("MatMul", "Gemm") and place == 0 and len(weight) == 2:
            turned = any(a.name == "transB" and a.i for a in node.attribute)
            sizes = {rank - 1: weight[1 if turned else 0]}
        elif op == "Conv" and place == 0 and len(weight) == rank > 2:
            sizes = {1: weight[1] * next((a.i for a in node.attribute if a.name == "group"), 1)}
        else:
            continue
        for axis, n in sizes.items():
            found.setdefault((name, axis), n)
    return found


def _binding(
    free: list[onnx.ValueInfoProto], given: Inputs, needed: Mapping[tuple[str, int], int],
    samples: int, length: int, side: int, middle: int,
) -> dict[str, Typed]:  # fmt: skip
    """Every input's shape. ``middle`` is the size of an unnamed second of three dimensions whose
    first is fixed: a length, or the samples of a recurrent state [layers, sample, features]."""
    named: dict[str, int] = {}
    for info in free:  # what the user fixed binds equal names elsewhere
        if info.name in given and (shape := given[info.name][0]) is not None:
            for name, n in zip(_names(info), shape, strict=False):
                if name and n is not None:
                    named[name] = n
    bound: dict[str, Typed] = {}
    for info in free:
        shape, dtype = declared(info.type)
        if info.name in given:
            wanted, kind = given[info.name]
            if shape is not None and wanted is not None and len(wanted) != len(shape):
                raise ArchlintError(
                    f"input {info.name!r} has {len(shape)} dimensions, not {len(wanted)}",
                    f"the file declares {[n if n is not None else '?' for n in shape]}",
                )
            bound[info.name] = (wanted, kind or dtype)
            continue
        if shape is None:
            bound[info.name] = (None, dtype)
            continue
        names = _names(info)
        sizes = []
        for axis, n in enumerate(shape):
            if n is None or (n == 0 and len(shape) > 1):
                n = named.get(names[axis]) if names[axis] else None
                n = n or needed.get((info.name, axis))
                if n is None:
                    state = len(shape) == 3 and axis == 1 and not names[axis] and shape[0]
                    n = middle if state else _guess(
                        axis, len(shape), shape, names[axis], samples, length, side)  # fmt: skip
                if names[axis]:
                    named[names[axis]] = n
            sizes.append(n)
        bound[info.name] = (tuple(sizes), dtype)
    return bound


def _guess(
    axis: int, rank: int, shape: tuple[int | None, ...], name: str, samples: int, length: int,
    side: int,
) -> int:  # fmt: skip
    label = name.lower()
    if any(word in label for word in ("past", "cache")):
        return 8
    if any(word in label for word in ("seq", "len", "time", "frame", "sample", "token", "step")):
        return length
    if axis == 0 or "batch" in label:
        return samples
    channels_last = rank == 4 and shape[1] is None and shape[3] is not None and shape[3] <= 4
    spatial = rank == 4 and (axis < 3 if channels_last else axis >= 2)
    if spatial or any(word in label for word in ("height", "width")):
        return side
    if rank == 4 and axis == 1:
        return 3
    return length


def _assumed(
    free: list[onnx.ValueInfoProto], sizes: Mapping[str, Typed], given: Inputs
) -> Iterator[str]:
    """One remark for every input whose free dimensions were bound by assumption."""
    for info in free:
        shape, _ = declared(info.type)
        bound, _ = sizes[info.name]
        if info.name not in given and shape != bound and bound is not None:
            yield f"input {info.name} assumed to be {'x'.join(str(n) for n in bound)}"
