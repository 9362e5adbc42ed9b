"""Compare predictions with measurements, module by module, and find which ops bring the errors in.

The error of a module is |ln(predicted rms/measured rms)| at its output. What an op *introduces* is
the signed error at a value less that at the measured values it is computed from.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from archlint.graph.from_torch import load_torch
from archlint.graph.model import LayerGraph, Node
from archlint.signal.moments import UNKNOWN_PREDICTION, Prediction
from archlint.signal.predictions import predict
from archlint.signal.propagate import propagate
from tests.accuracy.models import Case
from tests.accuracy.monte_carlo import Figures

WORST = 5.0  # what an error counts at most, such as a zero predicted where there is none
_ZERO = 1e-24
NAMES = ("forward", "gradient", "sample correlation", "position correlation")


@dataclass(frozen=True)
class Row:
    """One module: signed errors in ln rms and ln gradient rms, errors of the correlations; None
    where nothing was predicted or nothing can be compared."""

    module: str
    kind: str
    op: str
    forward: float | None
    gradient: float | None
    sample: float | None
    position: float | None
    predicted: Prediction
    measured: Figures


@dataclass
class Comparison:
    """All modules of a model. ``introduced`` lists (ops since the last measured values, signed
    error in ln rms that they bring in, module)."""

    case: Case
    rows: list[Row] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    unknown_gradients: list[str] = field(default_factory=list)
    values: int = 0  # real-valued values of the graph
    unknown_values: int = 0
    first_unknown: Counter[str] = field(default_factory=Counter)
    introduced: list[tuple[str, float, str]] = field(default_factory=list)
    introduced_gradient: list[tuple[str, float, str]] = field(default_factory=list)

    def errors(self, which: str) -> list[float]:
        """Absolute errors of one kind of prediction over leaf modules."""
        attribute = which.split()[0]
        values = [getattr(r, attribute) for r in self.rows if r.measured.leaf]
        return [abs(v) for v in values if v is not None]


def quantile(values: Sequence[float], q: float) -> float:
    """A quantile, nan of nothing."""
    if not values:
        return math.nan
    ordered = sorted(values)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def predicted_graph(case: Case) -> LayerGraph:
    """The graph with laws from the record of its construction; from a drawn model where the record
    does not tell."""
    graph = load_torch(case.build, case.inputs)
    if any(p.law is None for p in graph.parameters.values()):
        import torch

        torch.manual_seed(0)
        graph = load_torch(case.build(), case.inputs)
    return graph


def log_ratio(predicted: float | None, measured: float | None) -> float | None:
    """½ ln(predicted/measured) of squares, at most WORST in size; 0 where both vanish."""
    if predicted is None or measured is None:
        return None
    if predicted < _ZERO and measured < _ZERO:
        return 0.0
    if predicted < _ZERO or measured < _ZERO:
        return WORST if predicted > measured else -WORST
    return min(max(0.5 * math.log(predicted / measured), -WORST), WORST)


def compare(case: Case, figures: Mapping[str, Figures], graph: LayerGraph | None = None
            ) -> Comparison:  # fmt: skip
    """Predict and compare."""
    graph = graph or predicted_graph(case)
    signals, _ = predict(graph, propagate(graph))
    result = Comparison(case)
    last: dict[tuple[str, tuple[int | None, ...] | None], Node] = {}
    for node in graph.nodes:
        for path in _paths(node.module):
            if _leaves(graph, node, path):
                last[path, graph.shape(node.output)] = node
    at: dict[str, tuple[float | None, float | None]] = {}
    for path, figure in figures.items():
        # a module's output is the last value of its shape that is read elsewhere; none is where it
        # became part of another op, such as a bias that is added to the logits of a fused attention
        made = last.get((path, tuple(figure.shape)))
        if made is None or figure.second_moment is None:
            continue
        s = signals.get(made.output, UNKNOWN_PREDICTION)
        forward = log_ratio(s.second_moment, figure.second_moment)
        gradient = log_ratio(s.grad_second_moment, figure.gradient)
        at[made.output] = (forward, gradient)
        if figure.leaf:
            if s.second_moment is None:
                result.unknown.append(f"{path} {made.op}")
            if figure.gradient is not None and s.grad_second_moment is None:
                result.unknown_gradients.append(f"{path} {made.op}")
        sample = _correlation_error(s, figure, "sample")
        position = _correlation_error(s, figure, "position")
        result.rows.append(Row(path, figure.kind, made.op, forward, gradient, sample, position, s,
                               figure))  # fmt: skip
    result.introduced = list(_introduced(graph, {k: v[0] for k, v in at.items()}))
    result.introduced_gradient = list(_introduced_back(graph, {k: v[1] for k, v in at.items()}))
    for node in graph.nodes:
        for out in node.outputs[:1]:
            if "float" in (graph.values[out].dtype or "") and node.op not in ("shape", "size"):
                result.values += 1
                if not signals.get(out, UNKNOWN_PREDICTION).known:
                    result.unknown_values += 1
                    carriers = [v for v in node.inputs if v is not None
                                and "float" in (graph.values[v].dtype or "")]  # fmt: skip
                    if all(signals.get(v, UNKNOWN_PREDICTION).known for v in carriers):
                        result.first_unknown[node.op if node.known else node.source_op] += 1
    return result


def _leaves(graph: LayerGraph, node: Node, path: str) -> bool:
    """Whether what a node of a module makes is read outside, or by nothing else at all: statistics
    that a module keeps of what it hands on are not its output."""
    readers = [r.module for v in node.outputs for r in graph.consumers.get(v, ())]
    outside = any(m != path and not m.startswith(f"{path}.") for m in readers)
    return outside or not readers or any(v in graph.outputs for v in node.outputs)


def _paths(module: str) -> Iterator[str]:
    """A module's path and those of the modules around it."""
    while module:
        yield module
        module = module.rpartition(".")[0]


def _correlation_error(s: Prediction, figure: Figures, role: str) -> float | None:
    """Predicted less measured correlation, None where the roles are not known or none is there."""
    if len(s.roles) != len(figure.shape):
        return None
    axes = [a for a, r in enumerate(s.roles) if r == role and figure.shape[a] > 1]
    value = figure.correlations.get("".join(map(str, axes))) if axes else None
    predicted = s.sample_correlation if role == "sample" else s.position_correlation
    return None if value is None or predicted is None else predicted - value


_DEPTH = 40


def _introduced(
    graph: LayerGraph, errors: Mapping[str, float | None]
) -> Iterator[tuple[str, float, str]]:
    """What is added between measured values, going back from each to the nearest ones."""
    for value, error in errors.items():
        if error is None:
            continue
        ops: list[str] = []
        before: list[float] = []
        node = graph.producer.get(value)
        assert node is not None
        stack, seen = [node], {node.id}
        blocked = False
        while stack and len(ops) < _DEPTH:
            here = stack.pop(0)
            ops.append(here.op)
            for v in here.inputs:
                if v is None or v in graph.static:
                    continue
                if v in errors:
                    known = errors[v]
                    if known is None:
                        blocked = True
                    else:
                        before.append(known)
                    continue
                above = graph.producer.get(v)
                if above is None:
                    before.append(0.0)
                elif above.id not in seen:
                    seen.add(above.id)
                    stack.append(above)
        if blocked or not before:
            continue
        # the input whose error explains most is taken to be the one that was carried on
        carried = min(before, key=lambda e: abs(error - e))
        if len(before) > 1:
            carried = statistics.fmean(before) if "add" in ops or "concat" in ops else carried
        yield "←".join(dict.fromkeys(ops[:6])), error - carried, node.module


def _introduced_back(
    graph: LayerGraph, errors: Mapping[str, float | None]
) -> Iterator[tuple[str, float, str]]:
    """The same for gradients, from each value on to the nearest measured ones."""
    for value, error in errors.items():
        if error is None:
            continue
        ops: list[str] = []
        after: list[float] = []
        stack, seen, blocked = [value], {value}, False
        while stack and len(ops) < _DEPTH:
            here = stack.pop(0)
            if here in graph.outputs:
                after.append(0.0)
            for node in graph.consumers.get(here, ()):
                ops.append(node.op)
                for out in node.outputs:
                    if out in errors:
                        known = errors[out]
                        if known is None:
                            blocked = True
                        else:
                            after.append(known)
                    elif out not in seen:
                        seen.add(out)
                        stack.append(out)
        if blocked or not after:
            continue
        carried = min(after, key=lambda e: abs(error - e))
        if len(after) > 1:
            carried = statistics.fmean(after)
        made = graph.producer.get(value)
        yield "→".join(dict.fromkeys(ops[:6])), error - carried, made.module if made else ""


def ranking(
    comparisons: Sequence[Comparison], gradient: bool = False
) -> list[tuple[str, float, float, int, str]]:
    """(ops, summed |error| introduced, median signed error, count, worst place), worst first."""
    by_op: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for c in comparisons:
        total = max(len(c.rows), 1)
        for ops, error, module in c.introduced_gradient if gradient else c.introduced:
            if math.isfinite(error):
                by_op[ops].append((error / total, f"{c.case.name}:{module} {error:+.2f}"))
    rows = []
    for ops, found in by_op.items():
        worst = max(found, key=lambda f: abs(f[0]))
        signed = [float(f[1].rpartition(" ")[2]) for f in found]
        rows.append((ops, sum(abs(f[0]) for f in found), statistics.median(signed), len(found),
                     worst[1]))  # fmt: skip
    return sorted(rows, key=lambda r: -r[1])
