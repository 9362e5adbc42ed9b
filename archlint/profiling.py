"""What is predicted of every value and known of every parameter: ``archlint profile``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from archlint.config import Config
from archlint.finding import Site
from archlint.graph.ops import OPS
from archlint.linter import load, one_model, shown_inputs
from archlint.target import resolve

if TYPE_CHECKING:
    from archlint.graph.model import LayerGraph, Parameter
    from archlint.signal.analysis import Analysis, Coverage


@dataclass(frozen=True, slots=True)
class ParameterRow:
    """What is known of a parameter. None is *unknown*.

    ``mean`` = E w, ``second_moment`` = E w², ``kurtosis`` = E(w−mean)⁴/Var² (None for a constant);
    ``exact`` where they follow from the initializer, not from a sample. ``fan_in`` counts the
    products in one output element of the layer that the weight belongs to. ``site`` is the line
    that decided the law.
    """

    name: str
    shape: tuple[int, ...]
    family: str | None
    mean: float | None
    second_moment: float | None
    kurtosis: float | None
    exact: bool
    fan_in: float | None = None
    site: Site | None = None

    @property
    def variance(self) -> float | None:
        """E w² − (E w)²."""
        if self.second_moment is None or self.mean is None:
            return None
        return max(self.second_moment - self.mean * self.mean, 0.0)

    @property
    def gain(self) -> float | None:
        """Variance × fan-in: what the layer multiplies the squared length of its input with."""
        if self.variance is None or self.fan_in is None:
            return None
        return self.variance * self.fan_in


@dataclass(frozen=True, slots=True)
class ValueRow:
    """What is predicted of a value over random weights and inputs. None is *unknown*.

    ``rms`` = √E v², ``spread`` = Var ln M over initializations, the correlations are E[v v′]/E v²
    of two positions and of two samples, ``grad_rms`` = √E g² with g = ∂⟨output, ξ⟩/∂v, ξ ~ N(0,1).
    ``depth`` counts the weight layers on the longest path from an input. ``real``: whether the
    elements are real numbers; integers carry no signal.
    """

    id: str
    op: str
    module: str
    module_type: str
    shape: tuple[int | None, ...] | None
    depth: int
    rms: float | None
    mean: float | None
    spread: float | None
    position_correlation: float | None
    sample_correlation: float | None
    grad_rms: float | None
    site: Site | None = None
    real: bool = True


@dataclass(frozen=True)
class Profile:
    """The predictions for one target: ``values`` in execution order, ``parameters`` by name.

    A module's output is the last value with its path. Prints itself as tables.
    """

    target: str
    input: Mapping[str, str]
    mode: str
    weights: str
    weights_evidence: str
    coverage: Coverage
    values: tuple[ValueRow, ...]
    parameters: tuple[ParameterRow, ...]
    notes: tuple[str, ...] = field(default=())

    def module(self, path: str) -> ValueRow:
        """The output of a module: the last value with its path. Raises KeyError."""
        for row in reversed(self.values):
            if row.module == path:
                return row
        raise KeyError(path)

    def __str__(self) -> str:
        from archlint.report.profile import tables

        return tables(self, 100)

    def _repr_html_(self) -> str:
        import html

        return f"<pre>{html.escape(str(self))}</pre>"


def profile(
    target: Any,
    inputs: Mapping[str, Any] | None = None,
    config: Config | None = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Profile:
    """Predict the signal and the gradient at every value of a model, without computing any.

    Takes what :func:`archlint.check` takes, for one model. Raises ArchlintError for what cannot be
    read.
    """
    config = config or Config()
    model = one_model(resolve(target, inputs, kwargs), config.timeout)
    graph = load(model, config.mode, config.timeout)
    from archlint.signal.analysis import analyse

    return profile_of(model.name, analyse(graph))


def profile_of(name: str, analysis: Analysis) -> Profile:
    """The rows of an analysed graph."""
    graph = analysis.graph
    return Profile(
        name, shown_inputs(graph), graph.mode, graph.weights, graph.weights_evidence,
        analysis.coverage, tuple(_values(analysis)), tuple(_parameters(graph)), graph.notes,
    )  # fmt: skip


def _values(analysis: Analysis) -> Iterator[ValueRow]:
    graph = analysis.graph
    depths: dict[str, int] = {}
    for value in graph.inputs:
        yield _value(analysis, value, "input", "", "", 0, None)
    for node in graph.nodes:
        weighted = node.op in OPS and OPS[node.op].kind in ("affine", "recurrent")
        depth = max((depths.get(v, 0) for v in node.inputs if v is not None), default=0) + weighted
        op = node.op if node.known else node.source_op
        for output in node.outputs:
            depths[output] = depth
            yield _value(analysis, output, op, node.module, node.module_type, depth, node.site)


def _value(
    analysis: Analysis,
    value: str,
    op: str,
    module: str,
    module_type: str,
    depth: int,
    site: Site | None,
) -> ValueRow:
    signal = analysis.prediction(value)
    grad = signal.grad_second_moment
    return ValueRow(
        value, op, module, module_type, analysis.graph.shape(value), depth,
        _number(signal.rms), _number(signal.mean), _number(signal.spread),
        _number(signal.position_correlation), _number(signal.sample_correlation),
        None if grad is None else _number(math.sqrt(max(grad, 0.0))), site,
        "float" in (analysis.graph.values[value].dtype or ""),
    )  # fmt: skip


def _number(x: float | None) -> float | None:
    """A number that is one: what overflowed is unknown."""
    return float(x) if x is not None and math.isfinite(x) else None


def _parameters(graph: LayerGraph) -> Iterator[ParameterRow]:
    fans = dict(_fan_ins(graph))
    for name, parameter in graph.parameters.items():
        law = parameter.law
        if law is None or law.family in ("unknown", "uninitialised"):
            family = None if law is None or law.family == "unknown" else law.family
            yield ParameterRow(name, parameter.shape, family, None, None, None, False,
                               fans.get(name), parameter.site)  # fmt: skip
            continue
        yield ParameterRow(
            name, parameter.shape, law.family, _number(law.mean), _number(law.second_moment),
            _number(law.kurtosis), law.exact, fans.get(name), parameter.site,
        )  # fmt: skip


def _fan_ins(graph: LayerGraph) -> Iterator[tuple[str, float]]:
    """The fan-in of each weight, by the layer it is the weight of."""
    from archlint.graph.fans import fans

    for node in graph.nodes:
        kind = OPS[node.op].kind if node.op in OPS else ""
        positions = {"bilinear": (2,)}.get(node.op, (1,)) if kind == "affine" else ()
        for position in (1, 2) if kind == "recurrent" else positions:
            found = fans(node, graph, position)
            parameter = _weight(graph, node.inputs[position]) if found is not None else None
            if found is not None and parameter is not None:
                yield parameter.name, found.fan_in


def _weight(graph: LayerGraph, value: str | None) -> Parameter | None:
    """The parameter that a weight is, seen through transposes and reshapes."""
    while value is not None and (parameter := graph.parameter(value)) is None:
        node = graph.producer.get(value)
        if node is None or node.op not in OPS or OPS[node.op].kind != "layout":
            return None
        value = node.inputs[0]
    return parameter if value is not None else None
