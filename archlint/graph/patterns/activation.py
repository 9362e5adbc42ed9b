"""Activations that are spelled by their formula.

Most are *gated*: a quantity times an affine function of a squashing of the same quantity,
s·x·(α + β·g(p(x))). Whatever the order of the factors and wherever the constants stand, they are
reduced to that form; which activation it is follows from the numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from archlint.graph.model import AttributeValue, Node
from archlint.graph.patterns.engine import LARGE, Found, New, Rewriter, close, pattern

_SQUASHINGS = ("sigmoid", "tanh", "erf", "hardsigmoid", "relu6", "hardtanh")


# --------------------------------------------------------------------------- x · (α + β·g(p(x)))


@dataclass(frozen=True, slots=True)
class _Gate:
    """α + β·g(argument): ``squashing`` is g's node, None for a spelled 1/(1 + exp(−argument))."""

    offset: float
    slope: float
    op: str
    squashing: Node
    argument: str
    sign: float = 1.0


def _gate(graph: Rewriter, value: str) -> _Gate | None:
    """The value as an affine function of a squashing."""
    offset, slope = 0.0, 1.0
    for _ in range(4):
        node = graph.producer(value)
        if node is None:
            return None
        if node.op in _SQUASHINGS and node.inputs[0] is not None:
            return _Gate(offset, slope, node.op, node, node.inputs[0])
        if (scaled := graph.times(node)) is not None:
            value, slope = scaled[0], slope * scaled[1]
        elif (shifted := graph.plus(node)) is not None:
            value = shifted[0]
            offset, slope = offset + slope * shifted[2], slope * shifted[1]
        else:
            return None
    return None


def _splits(
    graph: Rewriter, node: Node, others: tuple[str, ...], scale: float, depth: int
) -> Iterator[tuple[_Gate, tuple[str, ...], float]]:
    """The ways to read a product as (gate, other factors, number)."""
    if node.op == "div":
        x, below = node.inputs[:2]
        if x is None or below is None:
            return
        if (number := graph.scalar(below)) is not None:
            if number == 0:
                return
            yield from _factor(graph, x, others, scale / number, depth)
            return
        if (u := _one_plus_exp(graph, below)) is not None and not others:
            yield _Gate(0.0, 1.0, "sigmoid", u[0], u[1], -1.0), (x,), scale
        return
    for a, b in graph.operands(node):
        if (number := graph.scalar(b)) is not None:
            yield from _factor(graph, a, others, scale * number, depth)
        elif len(others) == 0:
            yield from _factor(graph, a, (b,), scale, depth)


def _factor(
    graph: Rewriter, value: str, others: tuple[str, ...], scale: float, depth: int
) -> Iterator[tuple[_Gate, tuple[str, ...], float]]:
    if others and (gate := _gate(graph, value)) is not None:
        yield gate, others, scale
    node = graph.made_by(value, "mul", "div")
    if node is not None and depth > 0:
        yield from _splits(graph, node, others, scale, depth - 1)


def _one_plus_exp(graph: Rewriter, value: str) -> tuple[Node, str] | None:
    """(exp node, u) where the value is 1 + exp(u)."""
    node = graph.made_by(value, "add")
    if node is None or (shifted := graph.plus(node)) is None or shifted[1:] != (1.0, 1.0):
        return None
    exp = graph.made_by(shifted[0], "exp")
    return (exp, exp.inputs[0]) if exp is not None and exp.inputs[0] is not None else None


@dataclass(frozen=True, slots=True)
class _Activation:
    """factor · op(κ·x)."""

    op: str
    argument: float
    factor: float
    attributes: dict[str, AttributeValue]


def _classify(gate: _Gate, p: dict[int, float], scale: float) -> _Activation | str:
    """Which activation scale·x·(α + β·g(p(x))) is."""
    p = {d: gate.sign * c for d, c in p.items() if c != 0.0}
    k = p.get(1, 0.0)
    total = scale * gate.slope
    linear = p.keys() == {1}
    if k == 0.0 or total == 0.0:
        return "the gate does not depend on x"
    if gate.op == "sigmoid" and gate.offset == 0.0 and linear:
        if close(k / total, 1.702):
            return _Activation("gelu", total, 1.0, {"approximate": "sigmoid"})
        return _Activation("silu", k, total / k, {})
    if gate.op == "erf" and close(gate.offset, gate.slope) and linear:
        argument = math.sqrt(2.0) * k
        return _Activation("gelu", argument, 2.0 * total / argument, {})
    if gate.op == "tanh" and close(gate.offset, gate.slope):
        if linear:  # (1 + tanh(u/2))/2 is the sigmoid of u
            return _Activation("silu", 2.0 * k, total / k, {})
        argument = k / math.sqrt(2.0 / math.pi)
        cubic = math.sqrt(2.0 / math.pi) * 0.044715 * argument**3
        if p.keys() == {1, 3} and abs(p[3] - cubic) <= 5e-3 * abs(cubic):
            return _Activation("gelu", argument, 2.0 * total / argument, {"approximate": "tanh"})
        return "the polynomial in tanh is not that of GELU"
    return f"{gate.op} with these numbers is no known activation"


def _classify_clipped(
    graph: Rewriter, gate: _Gate, p: dict[int, float], scale: float
) -> _Activation | str:
    """x·relu6(x + 3)/6 and its spellings by clip and hardsigmoid."""
    if gate.offset != 0.0 or not p.keys() <= {0, 1}:
        return "no hardswish"
    k, shift, top = p.get(1, 0.0), p.get(0, 0.0), 1.0
    if gate.op == "hardsigmoid":
        slope = float(graph.attribute(gate.squashing, "alpha"))
        shift = slope * shift + float(graph.attribute(gate.squashing, "beta"))
        k *= slope
    elif gate.op == "relu6":
        top = 6.0
    else:
        top = float(graph.attribute(gate.squashing, "maximum"))
        if float(graph.attribute(gate.squashing, "minimum")) != 0.0:
            return "the clip does not begin at zero"
    if top <= 0 or k == 0.0 or not close(shift / top, 0.5):
        return "the clip is not centred"
    argument = 6.0 * k / top
    return _Activation("hardswish", argument, scale * gate.slope * top / argument, {})


@pattern("mul", "div")
def gated(graph: Rewriter, node: Node) -> Found | str:
    """SiLU, GELU (erf, tanh, sigmoid), hardswish, mish, in any order of the factors."""
    if not graph.is_float(node.output):
        return "integers"
    reason = "no factor is a squashing"
    for gate, (x,), scale in _splits(graph, node, (), 1.0, 3):
        multiples = graph.multiples(x)
        base = list(multiples)[-1]
        deepest = multiples[base]  # x = deepest · base
        if deepest == 0.0:
            continue
        chain = {value: deepest / factor for value, factor in multiples.items()}
        argument = graph.polynomial(gate.argument, chain)
        softplus = graph.made_by(gate.argument, "softplus") if gate.op == "tanh" else None
        if argument is None and softplus is not None:
            inner = graph.polynomial(softplus.inputs[0] or "", chain)
            plain = graph.attribute(softplus, "beta") == 1.0
            if inner is None or inner.keys() != {1} or gate.offset != 0.0 or not plain:
                reason = "tanh of softplus, but not of this factor"
                continue
            k = inner[1]
            found: _Activation | str = _Activation("mish", k, scale * deepest * gate.slope / k, {})
        elif argument is None:
            reason = "the squashing is not one of the other factor"
            continue
        elif gate.op in ("hardsigmoid", "relu6", "hardtanh"):
            found = _classify_clipped(graph, gate, argument, scale * deepest)
        else:
            found = _classify(gate, argument, scale * deepest)
        if isinstance(found, str):
            reason = found
            continue
        if graph.shape(x) != graph.shape(node.output):
            reason = "the factors broadcast"
            continue
        if not close(found.factor, 1.0) and _number_follows(graph, node):
            return "a constant factor is still to come"
        parts = (gate.squashing, *((softplus,) if softplus is not None else ()))
        return _emit(graph, node, found, base, chain, parts)
    return reason


def _number_follows(graph: Rewriter, node: Node) -> bool:
    """Whether all that happens to the product is another multiplication by a number."""
    reader = graph.lone_reader(node.output)
    return (
        reader is not None
        and reader.op in ("mul", "div")
        and any(graph.scalar(v) is not None for v in reader.inputs)
    )


def _emit(
    graph: Rewriter,
    node: Node,
    found: _Activation,
    base: str,
    chain: dict[str, float],
    parts: tuple[Node, ...],
) -> Found:
    """factor · op(κ·base), with an existing value for κ·base where there is one."""
    shape, dtype = graph.shape(node.output), graph.dtype(node.output)
    argument: str | New | None = next(
        (value for value, factor in chain.items() if close(factor, found.argument)), None
    )
    if argument is None:
        argument = New("mul", (base, graph.number(found.argument, dtype)), {}, shape, dtype)
    activation = New(found.op, (argument,), found.attributes, shape, dtype)
    if close(found.factor, 1.0):
        return Found(activation, parts)
    return Found(New("mul", (activation, graph.number(found.factor, dtype))), parts)


# --------------------------------------------------------------------------- squashings spelled


@pattern("div", "reciprocal")
def sigmoid(graph: Rewriter, node: Node) -> Found | str:
    """1/(1 + exp(−x))."""
    below = node.inputs[0]
    if node.op == "div":
        if graph.scalar(node.inputs[0]) != 1.0:
            return "the numerator is not 1"
        below = node.inputs[1]
    found = _one_plus_exp(graph, below) if below is not None else None
    if found is None:
        return "the denominator is not 1 + exp"
    exp, u = found
    minus = graph.made_by(u, "neg", "mul", "div")
    negated = graph.times(minus) if minus is not None else None
    if negated is not None and negated[1] == -1.0:
        return Found(New("sigmoid", (negated[0],)), (exp,))
    if negated is not None:
        shape, dtype = graph.shape(negated[0]), graph.dtype(negated[0])
        scaled = New("mul", (negated[0], graph.number(-negated[1], dtype)), {}, shape, dtype)
        return Found(New("sigmoid", (scaled,)), (exp,))
    return Found(New("sigmoid", (New("neg", (u,), {}, graph.shape(u), graph.dtype(u)),)), (exp,))


@pattern("log", "log1p", "mul", "div")
def softplus(graph: Rewriter, node: Node) -> Found | str:
    """log(1 + exp(x)), and log(1 + exp(β·x))/β."""
    if node.op in ("log", "log1p"):
        value = node.inputs[0] or ""
        if node.op == "log":
            found = _one_plus_exp(graph, value)
        else:
            exp = graph.made_by(value, "exp")
            found = (exp, exp.inputs[0]) if exp is not None and exp.inputs[0] else None
        if found is None:
            return "not the logarithm of 1 + exp"
        return Found(New("softplus", (found[1],)), (found[0],))
    scaled = graph.times(node)
    inner = graph.made_by(scaled[0], "softplus") if scaled is not None else None
    if scaled is None or inner is None or graph.attribute(inner, "beta") != 1.0:
        return "no multiple of a softplus"
    argument = graph.made_by(inner.inputs[0], "mul", "div")
    below = graph.times(argument) if argument is not None else None
    if below is None or not close(below[1] * scaled[1], 1.0):
        return "the factors inside and outside are not reciprocal"
    return Found(New("softplus", (below[0],), {"beta": below[1], "threshold": 20.0}), (inner,))


@pattern("add")
def stable_softplus(graph: Rewriter, node: Node) -> Found | str:
    """max(x, 0) + log(1 + exp(−|x|)), the form that does not overflow."""
    for a, b in graph.operands(node):
        relu, tail = graph.made_by(a, "relu"), graph.made_by(b, "softplus")
        if relu is None or tail is None:
            continue
        minus = graph.made_by(tail.inputs[0], "neg")
        size = graph.made_by(minus.inputs[0], "abs") if minus is not None else None
        if size is not None and graph.same(size.inputs[0], relu.inputs[0]):
            return Found(New("softplus", (relu.inputs[0],)), (relu, tail))
    return "not relu(x) + softplus(−|x|)"


@pattern("log")
def logsigmoid(graph: Rewriter, node: Node) -> Found | str:
    """log(sigmoid(x))."""
    inner = graph.made_by(node.inputs[0], "sigmoid")
    if inner is None:
        return "not the logarithm of a sigmoid"
    return Found(New("logsigmoid", (inner.inputs[0],)), (inner,))


@pattern("neg")
def logsigmoid_by_softplus(graph: Rewriter, node: Node) -> Found | str:
    """−softplus(−x)."""
    outer = graph.made_by(node.inputs[0], "softplus")
    inner = graph.made_by(outer.inputs[0], "neg") if outer is not None else None
    if outer is None or inner is None or graph.attribute(outer, "beta") != 1.0:
        return "not minus the softplus of −x"
    return Found(New("logsigmoid", (inner.inputs[0],)), (outer, inner))


@pattern("div")
def softsign(graph: Rewriter, node: Node) -> Found | str:
    """x/(1 + |x|)."""
    x, below = node.inputs[:2]
    total = graph.made_by(below, "add")
    shifted = graph.plus(total) if total is not None else None
    size = graph.made_by(shifted[0], "abs") if shifted is not None else None
    if total is None or shifted is None or shifted[1:] != (1.0, 1.0) or size is None:
        return "the denominator is not 1 + |x|"
    if not graph.same(size.inputs[0], x):
        return "numerator and denominator hold different values"
    return Found(New("softsign", (x,)), (size, total))


@pattern("sub")
def tanhshrink(graph: Rewriter, node: Node) -> Found | str:
    """x − tanh(x)."""
    inner = graph.made_by(node.inputs[1], "tanh")
    if inner is None or not graph.same(inner.inputs[0], node.inputs[0]):
        return "not x − tanh(x)"
    return Found(New("tanhshrink", (node.inputs[0],)), (inner,))


# --------------------------------------------------------------------------- piecewise linear


@pattern("clip")
def clipped(graph: Rewriter, node: Node) -> Found | str:
    """clip between constants: ReLU, ReLU6, hardtanh."""
    if not graph.is_float(node.output):
        return "integers"
    x, low, high = (*node.inputs, None, None)[:3]
    bounds = [graph.scalar(bound) for bound in (low, high)]
    for given, number in zip((low, high), bounds, strict=True):
        if given is not None and number is None:
            return "a bound is computed"
    minimum, maximum = bounds
    if low is None or minimum is None:
        return "no lower bound"
    if high is None or maximum is None or maximum >= LARGE:
        return Found(New("relu", (x,))) if minimum == 0.0 else "bounded below, not at zero"
    if minimum <= -LARGE:
        return "bounded above only"
    return Found(_clip(x, minimum, maximum))


def _clip(x: str | None, minimum: float, maximum: float) -> New:
    if minimum == 0.0 and maximum == 6.0:
        return New("relu6", (x,))
    return New("hardtanh", (x,), {"minimum": minimum, "maximum": maximum})


@pattern("hardtanh")
def one_sided(graph: Rewriter, node: Node) -> Found | str:
    """hardtanh from zero to infinity, or from zero to six."""
    if float(graph.attribute(node, "minimum")) != 0.0:
        return "does not begin at zero"
    top = float(graph.attribute(node, "maximum"))
    if top >= LARGE:
        return Found(New("relu", (node.inputs[0],)))
    return Found(New("relu6", (node.inputs[0],))) if top == 6.0 else "ends at another number"


@pattern("where")
def guarded_softplus(graph: Rewriter, node: Node) -> Found | str:
    """where(β·x > threshold, x, softplus(x)): torch's guard against overflow."""
    condition, linear, curved = node.inputs
    test = graph.made_by(condition, "greater", "greater_equal")
    softplus = graph.made_by(curved, "softplus")
    if test is None or softplus is None or linear is None:
        return "no choice between x and its softplus"
    x, beta = linear, float(graph.attribute(softplus, "beta"))
    threshold = graph.scalar(test.inputs[1])
    multiples = graph.multiples(test.inputs[0] or "")
    if not graph.same(softplus.inputs[0], x) or threshold is None or threshold < 10.0:
        return "the condition is not that x is large"
    if not any(graph.same(v, x) and close(f, beta) for v, f in multiples.items()):
        return "the condition is on another value"
    attributes: dict[str, AttributeValue] = {"beta": beta, "threshold": threshold}
    return Found(New("softplus", (x,), attributes), (softplus, test))


@pattern("maximum", "minimum")
def extremum(graph: Rewriter, node: Node) -> Found | str:
    """max(x, 0), max(x, s·x) with 0 < s < 1, min(max(x, a), b)."""
    if not graph.is_float(node.output):
        return "integers"
    for a, b in graph.operands(node):
        number = graph.scalar(b)
        if number is not None and not graph.keeps(node, a, b):
            continue
        if node.op == "maximum" and number == 0.0:
            return Found(New("relu", (a,)))
        if number is not None and (clip := _two_sided(graph, node.op, a, number)) is not None:
            return clip
        scaled = graph.times(m) if (m := graph.made_by(b, "mul", "div")) is not None else None
        if (
            node.op == "maximum"
            and scaled is not None
            and 0.0 < scaled[1] < 1.0
            and graph.same(scaled[0], a)
        ):
            return Found(New("leaky_relu", (a,), {"slope": scaled[1]}))
    return "no constant bound and no multiple of the other operand"


def _two_sided(graph: Rewriter, op: str, value: str, number: float) -> Found | None:
    """The other bound, where the value is itself bounded by one."""
    inner = graph.made_by(value, "maximum", "minimum", "relu")
    if inner is None or inner.op == op:
        return None
    if inner.op == "relu":
        if op == "minimum" and number > 0.0:
            return Found(_clip(inner.inputs[0], 0.0, number), (inner,))
        return None
    for x, bound in graph.operands(inner):
        other = graph.scalar(bound)
        if other is None or not graph.keeps(inner, x, bound):
            continue
        low, high = (number, other) if op == "maximum" else (other, number)
        if low < high:
            return Found(_clip(x, low, high), (inner,))
    return None


@pattern("hardtanh", "relu6", "mul", "div")
def hardsigmoid(graph: Rewriter, node: Node) -> Found | str:
    """clip(α·x + β, 0, 1); relu6(x + 3)/6."""
    scale, clip = 1.0, node
    if node.op in ("mul", "div"):
        step = graph.times(node)
        inner = graph.made_by(step[0], "hardtanh", "relu6") if step is not None else None
        if step is None or inner is None:
            return "no multiple of a clip"
        scale, clip = step[1], inner
    top = 6.0 if clip.op == "relu6" else float(graph.attribute(clip, "maximum"))
    bottom = 0.0 if clip.op == "relu6" else float(graph.attribute(clip, "minimum"))
    if bottom != 0.0 or not close(scale * top, 1.0):
        return "the result does not run from 0 to 1"
    value, slope, offset = clip.inputs[0] or "", 1.0, 0.0
    for _ in range(3):
        below = graph.producer(value)
        if below is None:
            break
        if (scaled := graph.times(below)) is not None:
            value, slope = scaled[0], slope * scaled[1]
        elif (shifted := graph.plus(below)) is not None:
            value, slope, offset = shifted[0], slope * shifted[1], offset + slope * shifted[2]
        else:
            break
    alpha, beta = slope * scale, offset * scale
    if alpha == 1.0 and beta == 0.0:
        return "a plain clip"
    if alpha <= 0.0 or not 0.0 < beta < 1.0:
        return "the slope or the offset is not that of a sigmoid"
    return Found(New("hardsigmoid", (value,), {"alpha": alpha, "beta": beta}), (clip,))


@pattern("where")
def piecewise(graph: Rewriter, node: Node) -> Found | str:
    """where(x > 0, x, ·): ReLU, leaky ReLU, ELU."""
    condition, positive, negative = node.inputs
    test = graph.made_by(condition, "greater", "greater_equal", "less", "less_equal")
    if test is None:
        return "the condition is no comparison"
    a, b = test.inputs
    less = test.op.startswith("less")
    if graph.scalar(b) != 0.0:
        a, b, less = b, a, not less
    if graph.scalar(b) != 0.0 or a is None:
        return "not compared with zero"
    if less:
        positive, negative = negative, positive
    if not graph.same(positive, a):
        return "the positive side is not the identity"
    if graph.shape(a) != graph.shape(node.output):
        return "the operands broadcast"
    if graph.scalar(negative) == 0.0:
        return Found(New("relu", (a,)), (test,))
    below = graph.producer(negative)
    if below is None:
        return "the negative side is an input"
    scaled = graph.times(below)
    if scaled is not None and graph.same(scaled[0], a):
        return Found(New("leaky_relu", (a,), {"slope": scaled[1]}), (test, below))
    alpha, inner = 1.0, below
    if scaled is not None and (deeper := graph.producer(scaled[0])) is not None:
        alpha, inner = scaled[1], deeper
    if inner.op == "expm1":
        exponent = inner.inputs[0]
    else:
        shifted = graph.plus(inner)
        exp = graph.made_by(shifted[0], "exp") if shifted is not None else None
        if shifted is None or exp is None or shifted[1:] != (1.0, -1.0):
            return "the negative side is neither linear nor exponential"
        exponent = exp.inputs[0]
    if not graph.same(exponent, a) and not _bounded_above(graph, exponent, a):
        return "the exponent is another value"
    return Found(New("elu", (a,), {"alpha": alpha}), (test, below))


def _bounded_above(graph: Rewriter, value: str | None, x: str) -> bool:
    """Whether the value is min(x, 0), or where(x > 0, 0, x), which guard exp against overflow."""
    node = graph.made_by(value, "minimum", "where")
    if node is None:
        return False
    return any(graph.scalar(v) == 0.0 for v in node.inputs) and any(
        graph.same(v, x) for v in node.inputs
    )


@pattern("mul", "div")
def scaled_elu(graph: Rewriter, node: Node) -> Found | str:
    """λ·elu(x, α) with SELU's constants; α·elu(x/α), which is CELU."""
    step = graph.times(node)
    inner = graph.made_by(step[0], "elu") if step is not None else None
    if step is None or inner is None:
        return "no multiple of an ELU"
    alpha = float(graph.attribute(inner, "alpha"))
    if close(step[1], 1.0507009873554805) and close(alpha, 1.6732632423543772):
        return Found(New("selu", (inner.inputs[0],)), (inner,))
    argument = graph.producer(inner.inputs[0])
    below = graph.times(argument) if argument is not None else None
    if alpha == 1.0 and below is not None and close(below[1] * step[1], 1.0):
        return Found(New("celu", (below[0],), {"alpha": step[1]}), (inner,))
    return "the constants are neither SELU's nor CELU's"


@pattern("add", "sub")
def leaky_by_parts(graph: Rewriter, node: Node) -> Found | str:
    """relu(x) − s·relu(−x): leaky ReLU, or PReLU where s is a parameter."""
    for a, b in graph.operands(node):
        positive = graph.made_by(a, "relu")
        if positive is None:
            continue
        x = positive.inputs[0]
        term = graph.producer(b)
        sign = 1.0 if node.op == "add" else -1.0
        if term is None or x is None:
            continue
        pieces = graph.multiples(b)
        base = list(pieces)[-1]
        factor = sign * pieces[base]
        slope: str | None = None
        product = graph.made_by(base, "mul")
        if product is not None:
            for left, right in graph.operands(product):
                if graph.parameter(right) is not None:
                    slope, base = right, left
                    break
        lower = graph.made_by(base, "relu")
        minus = graph.multiples(lower.inputs[0] or "") if lower is not None else {}
        ratio = next((f for v, f in minus.items() if graph.same(v, x)), None)
        if lower is None or ratio is None or ratio >= 0.0:
            continue
        # factor·relu(ratio·x) = factor·|ratio|·relu(−x), and the slope below zero is minus that
        number = -factor * -ratio
        if slope is None:
            return Found(New("leaky_relu", (x,), {"slope": number}), (positive, lower))
        if close(number, 1.0):
            return Found(New("prelu", (x, slope)), (positive, lower))
    return "not relu(x) − s·relu(−x)"
