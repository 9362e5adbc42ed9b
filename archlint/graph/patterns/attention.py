"""Softmax attention: softmax(scale·q·kᵀ + mask)·v, however it is laid out.

Logits and result are read as products with named axes, whether they were written by MatMul or by
Einsum, so that any order of axes is understood; transposes are taken off or put on as needed.
Constant factors may stand on q, on k, on both (exporters split the scale into two roots) or on
the logits. Masks are added, or filled in by a condition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from archlint.graph.model import AttributeValue, Node
from archlint.graph.patterns.engine import Found, New, Rewriter, Shape, pattern

# A number that makes exp vanish whatever the logits are: half precision's least is −65504, and
# implementations use −1e4 at the least.
_MASKED = -1e3


# --------------------------------------------------------------------------- products by axis names


@dataclass(frozen=True, slots=True)
class _Contraction:
    """A product of two values: the letters of each operand's axes and of the result's."""

    a: str
    b: str
    letters_a: str
    letters_b: str
    result: str


def _contraction(graph: Rewriter, node: Node) -> _Contraction | str:
    """A matmul or an einsum of two operands by the names of its axes."""
    if len(node.inputs) != 2 or node.inputs[0] is None or node.inputs[1] is None:
        return "not a product of two"
    a, b = node.inputs[0], node.inputs[1]
    shape_a, shape_b = graph.shape(a), graph.shape(b)
    if shape_a is None or shape_b is None:
        return "a rank is not known"
    if node.op == "matmul":
        rank = len(shape_a)
        if rank != len(shape_b) or not 3 <= rank <= 12:
            return "the ranks differ, or are below 3"
        batch = "abcdefghij"[: rank - 2]
        return _Contraction(a, b, batch + "xy", batch + "yz", batch + "xz")
    equation = str(graph.attribute(node, "equation")).replace(" ", "")
    left, arrow, result = equation.partition("->")
    letters_a, _, letters_b = left.partition(",")
    for letters, shape in ((letters_a, shape_a), (letters_b, shape_b)):
        if not letters.isalpha() or len(set(letters)) != len(letters) or len(letters) != len(shape):
            return "the equation is not a plain product"
    if not arrow or not result.isalpha() or set(result) - set(letters_a + letters_b):
        return "the equation is not a plain product"
    return _Contraction(a, b, letters_a, letters_b, result)


def _arrange(graph: Rewriter, value: str, letters: str, wanted: str) -> str | New:
    """The value with its axes in the wanted order: itself, what a transpose was made from, or a
    new transpose."""
    if letters == wanted:
        return value
    node = graph.made_by(value, "transpose")
    if node is not None and node.inputs[0] is not None:
        permutation = tuple(graph.attribute(node, "permutation"))
        before = [""] * len(letters)
        for axis, letter in zip(permutation, letters, strict=True):
            before[axis] = letter
        if (source := "".join(before)) == wanted:
            return node.inputs[0]
        value, letters = node.inputs[0], source
    shape = graph.shape(value)
    order = tuple(letters.index(letter) for letter in wanted)
    turned: Shape | None = tuple(shape[i] for i in order) if shape is not None else None
    return New("transpose", (value,), {"permutation": order}, turned, graph.dtype(value))


def _unscaled(graph: Rewriter, value: str, letters: str) -> tuple[str, str, float]:
    """(base, its letters, factor) where the value is factor·base, looking through transposes only
    to reach a factor."""
    total = 1.0
    for _ in range(3):
        multiples = graph.multiples(value)
        factor = list(multiples.values())[-1]
        if factor != 1.0:
            value = next(v for v, f in multiples.items() if f == factor)
            total *= factor
        node = graph.made_by(value, "transpose")
        if node is None or node.inputs[0] is None:
            break
        if list(graph.multiples(node.inputs[0]).values())[-1] == 1.0:
            break
        permutation = tuple(graph.attribute(node, "permutation"))
        before = [""] * len(letters)
        for axis, letter in zip(permutation, letters, strict=True):
            before[axis] = letter
        value, letters = node.inputs[0], "".join(before)
    return value, letters, total


# --------------------------------------------------------------------------- probabilities


@dataclass(frozen=True, slots=True)
class _Probabilities:
    softmax: Node
    dropout: float
    parts: tuple[Node, ...]


def _probabilities(graph: Rewriter, value: str | None) -> _Probabilities | str:
    """The softmax behind attention weights, through dropout and a guard against empty rows."""
    dropout = 0.0
    parts: tuple[Node, ...] = ()
    for _ in range(4):
        node = graph.producer(value)
        if node is None:
            return "the left operand is an input"
        if node.op == "softmax":
            return _Probabilities(node, dropout, parts)
        if node.op == "dropout" and dropout == 0.0:
            if graph.attribute(node, "training"):
                dropout = float(graph.attribute(node, "p"))
            value = node.inputs[0]
        elif node.op == "where" and (guarded := _without_nan(graph, node)) is not None:
            value = guarded
        else:
            return "the left operand is no softmax"
        parts = (*parts, node)
    return "the left operand is no softmax"


def _without_nan(graph: Rewriter, node: Node) -> str | None:
    """x where the node replaces the NaNs of x by zeros."""
    condition, then, otherwise = node.inputs
    test = graph.made_by(condition, "isnan")
    if test is None or graph.scalar(then) != 0.0 or not graph.same(test.inputs[0], otherwise):
        return None
    return otherwise


# --------------------------------------------------------------------------- logits


@dataclass(frozen=True, slots=True)
class _Logits:
    """scale·factors·(q·kᵀ), capped, plus masks."""

    product: Node
    scale: float
    softcap: float = 0.0
    masks: tuple[str | New, ...] = ()
    factors: tuple[tuple[str, str], ...] = ()  # (mul or div, value)
    parts: tuple[Node, ...] = ()


def _logits(
    graph: Rewriter, value: str | None, scale: float = 1.0, depth: int = 10
) -> _Logits | str:
    """What the softmax is taken of; ``scale`` multiplies the value."""
    node = graph.producer(value)
    if node is None or depth == 0:
        return "the logits are an input"
    if node.op in ("matmul", "einsum"):
        return _Logits(node, scale)
    if node.op != "neg" and (step := graph.times(node)) is not None:
        return _with(_logits(graph, step[0], scale * step[1], depth - 1), node)
    if node.op == "tanh":
        if scale <= 0.0:
            return "the cap is not positive"
        inner = _logits(graph, node.inputs[0], scale, depth - 1)
        if isinstance(inner, str):
            return inner
        if inner.masks or inner.softcap:
            return "a mask or another cap inside the cap"
        return replace(inner, softcap=scale, parts=(*inner.parts, node))
    if node.op in ("add", "sub"):
        return _masked_by_sum(graph, node, scale, depth)
    if node.op in ("where", "masked_fill"):
        return _masked_by_choice(graph, node, scale, depth)
    if node.op in ("mul", "div"):
        return _by_head(graph, node, scale, depth)
    return f"the logits end in {node.op}"


def _with(found: _Logits | str, node: Node) -> _Logits | str:
    return found if isinstance(found, str) else replace(found, parts=(*found.parts, node))


def _masked_by_sum(graph: Rewriter, node: Node, scale: float, depth: int) -> _Logits | str:
    shifted = graph.plus(node)
    if shifted is not None and shifted[1] == 1.0:  # the softmax does not see a common number
        return _with(_logits(graph, shifted[0], scale, depth - 1), node)
    reason = "no term of the logits is a product"
    for term, mask in graph.operands(node):
        inner = _logits(graph, term, scale, depth - 1)
        if isinstance(inner, str):
            reason = inner
            continue
        if graph.shape(term) != graph.shape(node.output):
            reason = "the mask has more axes than the logits"
            continue
        factor = scale if node.op == "add" else -scale
        added: str | New = mask
        known = graph.constant(mask)
        if factor != 1.0 and known is not None:
            added = graph.array(known * factor, graph.dtype(mask))
        elif factor != 1.0:
            number = graph.number(factor, graph.dtype(mask))
            added = New("mul", (mask, number), {}, graph.shape(mask), graph.dtype(mask))
        return replace(inner, masks=(*inner.masks, added), parts=(*inner.parts, node))
    return reason


def _masked_by_choice(graph: Rewriter, node: Node, scale: float, depth: int) -> _Logits | str:
    if node.op == "where":
        condition, then, otherwise = node.inputs
        sides = [(otherwise, then, True), (then, otherwise, False)]
    else:
        condition = node.inputs[1]
        sides = [(node.inputs[0], node.inputs[2], True)]
    if scale <= 0.0:
        return "a mask times a number that is not positive"
    for term, fill, masked_if in sides:
        number = graph.scalar(fill)
        if number is None or number > _MASKED or condition is None:
            continue
        inner = _logits(graph, term, scale, depth - 1)
        if isinstance(inner, str):
            return inner
        if graph.shape(term) != graph.shape(node.output):
            return "the mask has more axes than the logits"
        number *= scale
        dtype = graph.dtype(node.output)
        known = graph.constant(condition)
        lowest = graph.number(number, dtype)
        zero = graph.number(0.0, dtype)
        mask: str | New
        if known is not None:
            masked = known.astype(bool) if masked_if else ~known.astype(bool)
            mask = graph.array(np.where(masked, number, 0.0), dtype)
        else:
            choice = (lowest, zero) if masked_if else (zero, lowest)
            mask = New("where", (condition, *choice), {}, graph.shape(condition), dtype)
        return replace(inner, masks=(*inner.masks, mask), parts=(*inner.parts, node))
    return "no side of the choice is a mask"


def _by_head(graph: Rewriter, node: Node, scale: float, depth: int) -> _Logits | str:
    """Logits times a factor that is the same for all queries and keys of a head."""
    for term, factor in graph.operands(node):
        shape, whole = graph.shape(factor), graph.shape(node.output)
        if shape is None or whole is None or graph.shape(term) != whole:
            continue
        if len(shape) > len(whole) or any(n != 1 for n in shape[-2:]):
            continue
        inner = _logits(graph, term, scale, depth - 1)
        if isinstance(inner, str):
            return inner
        if inner.masks or inner.softcap:
            return "a mask or a cap before a factor by head"
        return replace(
            inner, factors=(*inner.factors, (node.op, factor)), parts=(*inner.parts, node)
        )
    return "the logits are multiplied by what depends on query and key"


# --------------------------------------------------------------------------- the whole


@pattern("matmul", "einsum")
def attention(graph: Rewriter, node: Node) -> Found | str:
    """softmax(scale·q·kᵀ + mask)·v."""
    outer = _contraction(graph, node)
    if isinstance(outer, str):
        return outer
    reason = "no operand is a softmax"
    for turned in (False, True):
        weights, letters_p = (outer.b, outer.letters_b) if turned else (outer.a, outer.letters_a)
        values, letters_v = (outer.a, outer.letters_a) if turned else (outer.b, outer.letters_b)
        move = graph.made_by(weights, "transpose")
        if move is not None and move.inputs[0] is not None:
            before = [""] * len(letters_p)
            for axis, letter in zip(graph.attribute(move, "permutation"), letters_p, strict=True):
                before[axis] = letter
            weights, letters_p = move.inputs[0], "".join(before)
        found = _probabilities(graph, weights)
        if isinstance(found, str):
            continue
        result = _assemble(graph, node, found, letters_p, values, letters_v, outer.result)
        if isinstance(result, Found):
            return result
        reason = result
    return reason


def _assemble(
    graph: Rewriter,
    node: Node,
    weights: _Probabilities,
    letters_p: str,
    values: str,
    letters_v: str,
    result: str,
) -> Found | str:
    axis = int(graph.attribute(weights.softmax, "axis"))
    key = letters_p[axis]
    features = [c for c in letters_v if c not in letters_p]
    queries = [c for c in letters_p if c not in letters_v]
    if key not in letters_v or key in result or len(features) != 1 or len(queries) != 1:
        return "the result is not an average over the softmax's axis"
    query, feature = queries[0], features[0]
    batch = "".join(c for c in letters_p if c not in (key, query))
    if sorted(result) != sorted(batch + query + feature):
        return "the result does not keep the other axes"
    logits = _logits(graph, weights.softmax.inputs[0])
    if isinstance(logits, str):
        return logits
    product = _contraction(graph, logits.product)
    if isinstance(product, str):
        return product
    if len(product.result) != len(letters_p):
        return "the logits have another rank"
    # the same axes, by the names they have in the logits' own product
    name = dict(zip(letters_p, product.result, strict=True))
    sides: list[tuple[str, str]] = []
    for value, letters, other in (
        (product.a, product.letters_a, product.letters_b),
        (product.b, product.letters_b, product.letters_a),
    ):
        if name[query] in letters and name[query] not in other and name[key] not in letters:
            sides.insert(0, (value, letters))
        elif name[key] in letters and name[key] not in other:
            sides.append((value, letters))
    inner = [c for c in product.letters_a if c in product.letters_b and c not in product.result]
    if len(sides) != 2 or len(inner) != 1:
        return "the logits are not a product of queries and keys"
    if any(name[c] not in letters for c in batch for _, letters in sides):
        return "queries and keys do not share the other axes"
    total = logits.scale
    arranged: list[str | New] = []
    order = "".join(name[c] for c in batch)
    for (value, letters), last in zip(sides, (query, key), strict=True):
        value, letters, factor = _unscaled(graph, value, letters)
        total *= factor
        arranged.append(_arrange(graph, value, letters, order + name[last] + inner[0]))
    q, k = arranged
    v = _arrange(graph, values, letters_v, batch + key + feature)
    for op, factor_value in logits.factors:
        moved = _factor(graph, factor_value, letters_p, batch, q)
        if moved is None:
            return "a factor by head in an unusual place"
        q = New(op, (q, moved), {}, _shape(graph, q), _dtype(graph, q))
    k, v = _ungrouped(graph, q, k, v)
    masks, causal = _masks(graph, logits.masks)
    if masks and letters_p != batch + query + key:
        return "a mask in an unusual order of axes"
    attributes: dict[str, AttributeValue] = {"scale": float(total)}
    if causal:
        attributes["causal"] = True
    if weights.dropout:
        attributes["dropout"] = weights.dropout
    if logits.softcap:
        attributes["softcap"] = float(logits.softcap)
    mask = _total(graph, masks)
    inputs: tuple[str | New | None, ...] = (q, k, v) if mask is None else (q, k, v, mask)
    parts = (logits.product, *logits.parts, weights.softmax, *weights.parts)
    canonical = batch + query + feature
    if result == canonical:
        return Found(New("attention", inputs, attributes), parts)
    out = graph.shape(node.output)
    shape = tuple(out[result.index(c)] for c in canonical) if out is not None else None
    inside = New("attention", inputs, attributes, shape, graph.dtype(node.output))
    permutation = tuple(canonical.index(c) for c in result)
    return Found(New("transpose", (inside,), {"permutation": permutation}), parts)


def _shape(graph: Rewriter, value: str | New) -> Shape | None:
    return value.shape if isinstance(value, New) else graph.shape(value)


def _dtype(graph: Rewriter, value: str | New) -> str | None:
    return value.dtype if isinstance(value, New) else graph.dtype(value)


def _factor(graph: Rewriter, value: str, letters_p: str, batch: str, q: str | New) -> str | None:
    """A factor of the logits as a factor of q: its last two axes are ones in both."""
    if letters_p[: len(batch)] != batch:
        return None
    shape, whole = graph.shape(value), _shape(graph, q)
    return value if shape is not None and whole is not None and len(shape) <= len(whole) else None


def _total(graph: Rewriter, masks: Sequence[str | New]) -> str | New | None:
    """The sum of the masks."""
    total: str | New | None = None
    for mask in masks:
        if total is None:
            total = mask
            continue
        shapes = _shape(graph, total), _shape(graph, mask)
        total = New("add", (total, mask), {}, _broadcast(*shapes), _dtype(graph, mask))
    return total


def _broadcast(a: Shape | None, b: Shape | None) -> Shape | None:
    if a is None or b is None:
        return None
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + tuple(a), (1,) * (rank - len(b)) + tuple(b)
    return tuple(
        y if x == 1 else x if y == 1 or x == y else (x if y is None else y)
        for x, y in zip(a, b, strict=True)
    )


def _masks(graph: Rewriter, masks: Sequence[str | New]) -> tuple[list[str | New], bool]:
    """The masks that remain when the causal one and those of zeros are taken out."""
    left: list[str | New] = []
    causal = False
    for mask in masks:
        elements = graph.elements(mask) if isinstance(mask, str) else None
        if elements is None or elements.dtype.kind not in "fi":
            left.append(mask)
        elif elements.ndim >= 2 and _is_causal(elements):
            causal = True
        elif bool((elements != 0).any()):
            left.append(mask)
    return left, causal


def _is_causal(mask: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bool:
    """Zero where the key is not after the query, and −∞ (or so) elsewhere."""
    length, keys = mask.shape[-2:]
    if length < 2 or keys < 2 or length != keys:
        return False
    flat = np.asarray(mask, np.float64).reshape(-1, length, keys)
    seen = np.tril(np.ones((length, keys), bool))
    return bool((flat[:, seen] == 0.0).all() and (flat[:, ~seen] <= _MASKED).all())


def _ungrouped(
    graph: Rewriter, q: str | New, k: str | New, v: str | New
) -> tuple[str | New, str | New]:
    """Keys and values before they were repeated for the queries of a group."""
    before_k, before_v = _repeated(graph, k), _repeated(graph, v)
    shape = _shape(graph, q)
    if before_k is None or before_v is None or before_k[1] != before_v[1] or shape is None:
        return k, v
    return before_k[0], before_v[0]


def _repeated(graph: Rewriter, value: str | New) -> tuple[str, int] | None:
    """(x, n) where each head of x [sample, heads, length, features] appears n times in a row."""
    if isinstance(value, New):
        return None
    join = graph.made_by(value, "reshape")
    grow = graph.made_by(join.inputs[0], "expand", "tile") if join is not None else None
    split = graph.made_by(grow.inputs[0], "reshape") if grow is not None else None
    if join is None or grow is None or split is None or split.inputs[0] is None:
        return None
    before, thin = graph.shape(split.inputs[0]), graph.shape(grow.inputs[0])
    wide, after = graph.shape(grow.output), graph.shape(value)
    if before is None or thin is None or wide is None or after is None or len(before) != 4:
        return None
    sample, heads, length, features = before
    if thin != (sample, heads, 1, length, features) or len(wide) != 5 or heads is None:
        return None
    times = wide[2]
    if times is None or wide != (sample, heads, times, length, features):
        return None
    if after != (sample, heads * times, length, features):
        return None
    return split.inputs[0], times
