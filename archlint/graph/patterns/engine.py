"""The rewriting engine: patterns over canonical ops, tried once on every node in execution order.

A pattern is a function that looks upwards from the *last* node of what it recognises and either
says what to put there (:class:`Found`) or why it does not apply (a sentence). The function names
the ops of that last node in its decorator; that is all there is to adding one. Nodes that lose
their last reader by a rewrite leave the graph; those that something else still reads stay. So a
rewrite is sound whenever the new nodes compute the same value as the last node did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from archlint.graph.model import AttributeValue, LayerGraph, Node, Parameter, Value
from archlint.graph.names import common_path
from archlint.graph.ops import attribute

Shape = tuple[int | None, ...]
FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
MANTISSA = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}
EXPONENT = {"float16": 5, "bfloat16": 8, "float32": 8, "float64": 11}
# How far a constant that a file holds in half precision may be from the number it stands for.
TOLERANCE = 2e-3
# A bound that no float32 value exceeds to any effect.
LARGE = 1e30
# How many elements of a parameter are read to see whether it is a mask: 2048² positions.
_MOST_READ = 1 << 22


@dataclass(frozen=True, slots=True)
class New:
    """A node to be made. ``inputs`` are value ids, or earlier :class:`New` nodes.

    ``shape`` and ``dtype`` are those of its output; the last node of a rewrite takes over the
    output of the node it replaces and needs neither.
    """

    op: str
    inputs: tuple[str | New | None, ...]
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    shape: Shape | None = None
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A match: ``last`` (with the New nodes it reads) replaces the node the pattern began at.

    ``parts`` are the matched nodes, the replaced one included or not. ``alias`` instead of
    ``last``: the node is a no-op and its readers read this value. ``reshaped`` re-declares
    parameters that a file holds with broadcasting dimensions: value id -> shape.
    """

    last: New | None
    parts: tuple[Node, ...] = ()
    alias: str | None = None
    reshaped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


Pattern = Callable[["Rewriter", Node], "Found | str"]
PATTERNS: dict[str, list[Pattern]] = {}


def pattern(*ops: str) -> Callable[[Pattern], Pattern]:
    """Register a pattern that ends in one of the given ops."""

    def register(function: Pattern) -> Pattern:
        for op in ops:
            PATTERNS.setdefault(op, []).append(function)
        return function

    return register


class Rewriter:
    """A graph being rewritten, and the questions that patterns ask about it.

    Every node is looked at once, in execution order, so that what lies upstream of a node has its
    final form. Each question costs a bounded number of steps.
    """

    def __init__(self, graph: LayerGraph) -> None:
        self.graph = graph
        self.values: dict[str, Value] = dict(graph.values)
        self.parameters: dict[str, Parameter] = dict(graph.parameters)
        self._slots: list[list[Node]] = [[node] for node in graph.nodes]
        self._slot: dict[str, int] = {node.id: i for i, node in enumerate(graph.nodes)}
        self._producer: dict[str, Node] = {}
        self._renamed: dict[str, str] = {}
        self._uses: dict[str, int] = {}
        self._readers: dict[str, dict[str, None]] = {}
        self._scalars: dict[str, float | None] = {}
        self._outputs = frozenset(graph.outputs)
        self._modules: dict[str, int] = {}
        for value in graph.outputs:
            self._uses[value] = self._uses.get(value, 0) + 1
        for node in graph.nodes:
            self._count(node, +1)
            self._modules[node.module] = self._modules.get(node.module, 0) + 1
        self._ids = set(self._slot)

    # ----------------------------------------------------------------- questions

    def producer(self, value: str | None) -> Node | None:
        """The node that makes a value; no-ops and changes of float precision are looked through."""
        for _ in range(8):
            if value is None or (node := self._producer.get(value)) is None:
                return None
            if not self._transparent(node):
                return node
            value = node.inputs[0]
        return None

    def origin(self, value: str) -> str:
        """The value behind no-ops and changes of float precision."""
        for _ in range(8):
            node = self._producer.get(value)
            if node is None or not self._transparent(node) or node.inputs[0] is None:
                return value
            value = node.inputs[0]
        return value

    def made_by(self, value: str | None, *ops: str) -> Node | None:
        """The node that makes a value if it is one of ``ops``, else None."""
        node = self.producer(value)
        return node if node is not None and node.op in ops else None

    def same(self, a: str | None, b: str | None) -> bool:
        """Whether two values hold the same numbers up to precision."""
        return a is not None and b is not None and (a == b or self.origin(a) == self.origin(b))

    def operands(self, node: Node) -> Iterator[tuple[str, str]]:
        """The two inputs of a binary node; for a commutative one both orders."""
        a, b = node.inputs[:2]
        if a is None or b is None:
            return
        yield a, b
        if node.op in ("add", "mul", "maximum", "minimum"):
            yield b, a

    def attribute(self, node: Node, name: str) -> Any:
        """An attribute, or its default."""
        return attribute(node.op, node.attributes, name)

    def axes(self, node: Node) -> tuple[int, ...]:
        """The axes of a reduction, ascending."""
        found = self.attribute(node, "axes")
        return tuple(sorted(found)) if isinstance(found, tuple) else (int(found),)

    def shape(self, value: str | None) -> Shape | None:
        """A value's shape."""
        return self.values[value].shape if value is not None else None

    def dtype(self, value: str | None) -> str | None:
        """A value's dtype."""
        return self.values[value].dtype if value is not None else None

    def is_float(self, value: str | None) -> bool:
        """Whether a value holds floating-point numbers, as far as is known."""
        dtype = self.dtype(value)
        return dtype is None or dtype in FLOATS or dtype.startswith("float8")

    def uses(self, value: str) -> int:
        """How many inputs read a value; being an output of the graph counts as one."""
        return self._uses.get(value, 0)

    def is_output(self, value: str) -> bool:
        """Whether a value is an output of the graph."""
        return value in self._outputs

    def lone_reader(self, value: str) -> Node | None:
        """The one node that reads a value, None where there are several or it is an output."""
        readers = self._readers.get(value)
        if self.uses(value) != 1 or self.is_output(value) or not readers:
            return None
        reader = next(iter(readers))
        return next((n for n in self._slots[self._slot[reader]] if n.id == reader), None)

    def maker(self, value: str | None) -> Node | None:
        """The node that makes a value, nothing looked through."""
        return self._producer.get(value) if value is not None else None

    def siblings(self, node: Node) -> int:
        """How many nodes share the node's module path, itself included."""
        return self._modules.get(node.module, 0)

    def constant(self, value: str | None) -> np.ndarray[Any, Any] | None:
        """The elements of a known constant, behind no-ops and changes of precision."""
        return self.values[self.origin(value)].constant if value is not None else None

    def scalar(self, value: str | None) -> float | None:
        """The number that a constant holds everywhere, else None."""
        if value is None:
            return None
        value = self.origin(value)
        if value not in self._scalars:
            elements = self.values[value].constant
            number = None
            if elements is not None and elements.size and elements.dtype.kind in "fiub":
                first = elements.flat[0]
                if elements.size == 1 or bool((elements == first).all()):
                    number = float(first)
            self._scalars[value] = number
        return self._scalars[value]

    def parameter(self, value: str | None) -> Parameter | None:
        """The parameter that a value stands for, behind no-ops and changes of precision."""
        name = self.values[self.origin(value)].parameter if value is not None else None
        return self.parameters[name] if name is not None else None

    def elements(self, value: str | None) -> np.ndarray[Any, Any] | None:
        """The elements of a constant, or of a parameter that is not too large to be a mask."""
        held = self.constant(value)
        parameter = self.parameter(value)
        if held is not None or parameter is None or parameter.load is None:
            return held
        if int(np.prod(parameter.shape, dtype=np.int64)) > _MOST_READ:
            return None
        return np.asarray(parameter.load())

    def filled_with(self, value: str | None, number: float) -> bool:
        """Whether every element of a constant or of a small parameter is the given number."""
        if (held := self.scalar(value)) is not None:
            return held == number
        parameter = self.parameter(value)
        if parameter is None:
            return False
        if parameter.law is not None and parameter.law.exact and not parameter.law.random:
            return parameter.law.mean == number and parameter.law.second_moment == number * number
        if parameter.load is None or int(np.prod(parameter.shape)) > 65536:
            return False
        return bool((np.asarray(parameter.load()) == number).all())

    def times(self, node: Node) -> tuple[str, float] | None:
        """(x, c) where the node computes c·x for a number c and keeps x's shape, else None."""
        if node.op == "neg" and node.inputs[0] is not None:
            return node.inputs[0], -1.0
        if node.op not in ("mul", "div"):
            return None
        for x, other in self.operands(node):
            number = self.scalar(other)
            if number is None or self.scalar(x) is not None or not self.keeps(node, x, other):
                continue
            if node.op == "mul":
                return x, number
            return (x, 1.0 / number) if number != 0 else None
        return None

    def plus(self, node: Node) -> tuple[str, float, float] | None:
        """(x, sign, c) where the node computes sign·x + c and keeps x's shape, else None."""
        if node.op not in ("add", "sub") or node.inputs[0] is None or node.inputs[1] is None:
            return None
        a, b = node.inputs[0], node.inputs[1]
        if (number := self.scalar(b)) is not None and self.keeps(node, a, b):
            return a, 1.0, number if node.op == "add" else -number
        if (number := self.scalar(a)) is not None and self.keeps(node, b, a):
            return b, 1.0 if node.op == "add" else -1.0, number
        return None

    def multiples(self, value: str) -> dict[str, float]:
        """The values that this one is a multiple of, with the factor, itself (1) first."""
        found = {value: 1.0}
        factor = 1.0
        for _ in range(6):
            node = self._producer.get(value)
            if node is None:
                break
            if self._transparent(node) and node.inputs[0] is not None:
                value = node.inputs[0]
            elif (step := self.times(node)) is not None:
                value, factor = step[0], factor * step[1]
            else:
                break
            found.setdefault(value, factor)
        return found

    def polynomial(
        self, value: str, base: Mapping[str, float], depth: int = 8
    ) -> dict[int, float] | None:
        """The value as a polynomial, degree -> coefficient, in the quantity of which ``base``
        lists multiples; None where it is none of degree at most 3."""
        if (factor := base.get(value)) is not None:
            return {1: factor}
        if (number := self.scalar(value)) is not None:
            return {0: number}
        node = self._producer.get(value)
        if node is None or depth == 0 or node.inputs[0] is None:
            return None
        below = [
            self.polynomial(v, base, depth - 1) if v is not None else None
            for v in node.inputs[:2]
            if self._transparent(node) or node.op in _RING
        ]
        if not below or (first := below[0]) is None:
            return None
        if self._transparent(node):
            return first
        if node.op == "neg":
            return {d: -c for d, c in first.items()}
        if node.op == "square":
            return _product(first, first)
        if len(below) < 2 or (second := below[1]) is None:
            return None
        if node.op in ("add", "sub"):
            sign = 1.0 if node.op == "add" else -1.0
            return {d: first.get(d, 0.0) + sign * second.get(d, 0.0) for d in {**first, **second}}
        if node.op == "mul":
            return _product(first, second)
        if second.keys() != {0}:
            return None
        number = second[0]
        if node.op == "div":
            return {d: c / number for d, c in first.items()} if number else None
        if number in (1.0, 2.0, 3.0):  # pow
            result: dict[int, float] | None = first
            for _ in range(int(number) - 1):
                result = _product(result, first) if result is not None else None
            return result
        return None

    # ----------------------------------------------------------------- changes

    def declare(self, value: str, shape: tuple[int, ...]) -> str | None:
        """A value like this parameter or constant, of the given shape and as many elements.

        A parameter is re-declared in place, which undoes an exporter's broadcasting dimensions, or
        beside the old one if something else reads that; None for a computed value.
        """
        value = self.origin(value)
        held = self.values[value]
        if held.shape == shape:
            return value
        if held.constant is not None:
            fresh = self._fresh_value(value)
            array = held.constant.reshape(shape)
            self.values[fresh] = Value(fresh, shape, held.dtype, array)
            return fresh
        if held.parameter is None:
            return None
        old = self.parameters[held.parameter]
        load = old.load
        new = replace(
            old, shape=shape, load=(lambda: load().reshape(shape)) if load is not None else None
        )
        # Exporters store equal arrays once, whoever they belong to.
        name = f"{old.name}:{'x'.join(map(str, shape))}"
        if self.uses(value) == 1 and name not in self.parameters:
            self.parameters[old.name] = new
            self.values[value] = replace(held, shape=shape)
            return value
        if name not in self.parameters:
            self.parameters[name] = replace(new, name=name)
            self.values[name] = replace(held, id=name, shape=shape, parameter=name)
        return name

    def number(self, value: float, dtype: str | None) -> str:
        """A constant value that holds one number."""
        return self.array(np.asarray(value), dtype, f"{value:.7g}")

    def array(self, elements: Any, dtype: str | None, name: str = "constant") -> str:
        """A constant value that holds an array (in bfloat16 by name, in float32 in memory)."""
        kind = dtype if dtype in ("float16", "float32", "float64") else "float32"
        held = np.asarray(elements, kind)
        fresh = self._fresh_value(name)
        self.values[fresh] = Value(fresh, held.shape, dtype or kind, held)
        return fresh

    def run(self) -> LayerGraph:
        """Try every pattern on every node; the rewritten graph."""
        for i in range(len(self._slots)):
            for node in tuple(self._slots[i]):
                self._visit(i, node)
        return self._finish()

    def _visit(self, slot: int, node: Node) -> None:
        node = self._resolve(slot, node)
        if node.body is not None:
            body = Rewriter(node.body).run()
            if body is not node.body:
                node = self._swap(slot, node, replace(node, body=body))
        for out in node.outputs:
            self._producer[out] = node
        for _ in range(4):  # what a pattern makes may begin another one
            found = next(
                (
                    f
                    for p in PATTERNS.get(node.op, ())
                    if not isinstance(f := p(self, node), str) and self._allowed(node, f)
                ),
                None,
            )
            if found is None:
                return
            replaced = self._apply(slot, node, found)
            if replaced is None:
                return
            node = replaced

    def _allowed(self, node: Node, found: Found) -> bool:
        """Only the first output of a node can be taken over, and outputs keep their names."""
        if any(self.uses(out) for out in node.outputs[1:]) or not self.uses(node.output):
            return False
        return found.alias is None or not self.is_output(node.output)

    def _apply(self, slot: int, node: Node, found: Found) -> Node | None:
        if found.alias is not None:
            target = found.alias
            self._renamed[node.output] = target
            self._uses[target] = self.uses(target) + self.uses(node.output)
            self._readers.setdefault(target, {}).update(self._readers.pop(node.output, {}))
            self._uses[node.output] = 0
            self._drop(node)
            return None
        if found.last is None:
            raise AssertionError("a match has either a last node or an alias")
        made: dict[int, Node] = {}
        like = _lineage(node, found.parts)
        created = [self._make(new, like, made) for new in _in_order(found.last)[:-1]]
        last = replace(
            like,
            id=node.id,
            op=found.last.op,
            inputs=self._inputs(found.last, made),
            outputs=(node.output,),
            attributes=dict(found.last.attributes),
            body=None,
        )
        self._count(node, -1)
        for new in (*created, last):
            self._count(new, +1)
        at = self._slots[slot].index(node)
        self._slots[slot][at : at + 1] = [*created, last]
        for new in created:
            self._slot[new.id] = slot
            for out in new.outputs:
                self._producer[out] = new
        self._producer[last.output] = last
        for value in node.inputs:
            self._prune(value)
        self._modules[last.module] = self._modules.get(last.module, 0) + 1
        return last

    def _make(self, new: New, like: Node, made: dict[int, Node]) -> Node:
        out = self._fresh_value(f"{like.output}/{new.op}")
        self.values[out] = Value(out, new.shape, new.dtype or self.dtype(like.output))
        identity = f"{like.id}/{new.op}"
        while identity in self._ids:
            identity += "'"
        self._ids.add(identity)
        node = replace(
            like,
            id=identity,
            op=new.op,
            inputs=self._inputs(new, made),
            outputs=(out,),
            attributes=dict(new.attributes),
            body=None,
        )
        made[id(new)] = node
        return node

    def _inputs(self, new: New, made: Mapping[int, Node]) -> tuple[str | None, ...]:
        return tuple(made[id(v)].output if isinstance(v, New) else v for v in new.inputs)

    def _fresh_value(self, stem: str) -> str:
        while stem in self.values:
            stem += "'"
        return stem

    def _resolve(self, slot: int, node: Node) -> Node:
        if not self._renamed or not any(
            v in self._renamed for v in (*node.inputs, *(g for g, _ in node.guard))
        ):
            return node
        return self._swap(
            slot,
            node,
            replace(
                node,
                inputs=tuple(
                    self._renamed.get(v, v) if v is not None else None for v in node.inputs
                ),
                guard=tuple((self._renamed.get(v, v), truth) for v, truth in node.guard),
            ),
        )

    def _swap(self, slot: int, old: Node, new: Node) -> Node:
        nodes = self._slots[slot]
        nodes[nodes.index(old)] = new
        return new

    def _count(self, node: Node, sign: int) -> None:
        for value in (*node.inputs, *(v for v, _ in node.guard)):
            if value is not None:
                self._uses[value] = self._uses.get(value, 0) + sign
                if sign > 0:
                    self._readers.setdefault(value, {})[node.id] = None
                else:
                    self._readers.get(value, {}).pop(node.id, None)

    def _drop(self, node: Node) -> None:
        self._slots[self._slot[node.id]].remove(node)
        self._count(node, -1)
        for value in (*node.inputs, *(v for v, _ in node.guard)):
            self._prune(value)

    def _prune(self, value: str | None) -> None:
        """Take out the node behind a value if nothing reads any of its outputs any more."""
        pending = [value]
        while pending:
            value = pending.pop()
            node = self._producer.get(value) if value is not None else None
            if node is None or any(self.uses(out) for out in node.outputs):
                continue
            for out in node.outputs:
                self._producer.pop(out, None)
            self._slots[self._slot[node.id]].remove(node)
            self._count(node, -1)
            pending += [*node.inputs, *(v for v, _ in node.guard)]

    def _transparent(self, node: Node) -> bool:
        if node.op == "identity":
            return True
        if node.op == "cast":
            return node.attributes.get("dtype") in FLOATS and self.dtype(node.inputs[0]) in FLOATS
        return node.op == "dropout" and self.attribute(node, "p") == 0

    def keeps(self, node: Node, x: str, number: str) -> bool:
        """Whether a number held by a constant of some shape leaves x's shape as it is."""
        out, shape, other = self.shape(node.output), self.shape(x), self.shape(number)
        if other is not None and set(other) <= {1}:
            return shape is None or len(other) <= len(shape)
        return out is not None and out == shape and None not in out

    def _finish(self) -> LayerGraph:
        nodes = tuple(node for slot in self._slots for node in slot)
        if len(nodes) == len(self.graph.nodes) and all(
            a is b for a, b in zip(nodes, self.graph.nodes, strict=True)
        ):
            return self.graph
        before, after = _referenced(self.graph.nodes), _referenced(nodes)
        kept = {*after, *self.graph.inputs, *self.graph.outputs}
        gone = {
            v for v in self.values if v not in kept and (v in before or v not in self.graph.values)
        }
        lost = {name for v in gone if (name := self.values[v].parameter) is not None} - {
            name for v in kept if (name := self.values[v].parameter) is not None
        }
        return replace(
            self.graph,
            nodes=nodes,
            values={k: v for k, v in self.values.items() if k not in gone},
            parameters={k: v for k, v in self.parameters.items() if k not in lost},
            folded=self.graph.folded + len(self.graph.nodes) - len(nodes),
        )


_RING = frozenset({"add", "sub", "mul", "div", "pow", "square", "neg"})


def _product(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float] | None:
    result: dict[int, float] = {}
    for i, x in a.items():
        for j, y in b.items():
            if i + j > 3:
                return None
            result[i + j] = result.get(i + j, 0.0) + x * y
    return result


def _in_order(new: New) -> list[New]:
    """The new nodes below one and itself, inputs first, each once."""
    found: list[New] = []
    for value in new.inputs:
        if isinstance(value, New):
            found += [n for n in _in_order(value) if all(n is not m for m in found)]
    return [*found, new]


def _lineage(node: Node, parts: Iterable[Node]) -> Node:
    """The node with the origin that all matched parts have in common."""
    everything = [p for p in parts if p.id != node.id] + [node]
    module = common_path(p.module for p in everything)
    owner = next((p for p in reversed(everything) if p.module == module), None)
    sources = dict.fromkeys(s for p in everything for s in p.source_op.split("+"))
    return replace(
        node,
        module=module,
        module_type=owner.module_type if owner is not None else "",
        site=node.site or next((p.site for p in everything if p.site is not None), None),
        source_op="+".join(sources),
    )


def _referenced(nodes: Iterable[Node]) -> set[str]:
    return {
        v
        for node in nodes
        for v in (*node.inputs, *node.outputs, *(g for g, _ in node.guard))
        if v is not None
    }


def close(a: float, b: float) -> bool:
    """Whether two numbers are the same up to the precision in which files hold constants."""
    return abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) or abs(a - b) < 1e-12


def explain(graph: LayerGraph, node: Node) -> list[tuple[str, str]]:
    """Why each pattern that could end at a node did not apply: (pattern, reason).

    ``graph`` is a recognised graph; a pattern that does apply says ``applies``.
    """
    rewriter = Rewriter(graph)
    for other in graph.nodes:
        for out in other.outputs:
            rewriter._producer[out] = other
    reasons: list[tuple[str, str]] = []
    for candidate in PATTERNS.get(node.op, ()):
        result = candidate(rewriter, node)
        reasons.append((candidate.__name__, result if isinstance(result, str) else "applies"))
    return reasons
