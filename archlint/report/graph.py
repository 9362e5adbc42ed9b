"""The table of a graph: what each node was understood as, with the signal after it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from archlint.wording import number

if TYPE_CHECKING:
    from archlint.graph.model import LayerGraph, Node
    from archlint.signal.analysis import Analysis

_HEAD = ("node", "op", "inputs", "shape", "rms", "mean")


def render(analysis: Analysis) -> str:
    """A plain text table, a node a line, after the inputs, parameters and notes."""
    graph, coverage = analysis.graph, analysis.coverage
    lines = [f"{graph.name}: weights {graph.weights} ({graph.weights_evidence or 'no evidence'})"]
    lines += [f"input {value}: {_shape(graph, value)}" for value in graph.inputs]
    lines += [f"note: {note}" for note in graph.notes]
    lines.append(
        f"{coverage.nodes} nodes, {coverage.nodes - coverage.modelled} not understood, "
        f"{coverage.cut_off} after them without prediction, {graph.folded} computed statically"
    )
    for parameter in graph.parameters.values():
        law = parameter.law
        size = "x".join(map(str, parameter.shape)) or "scalar"
        told = "unknown" if law is None else f"{law.family} std {number(law.std)}" + (
            f" ({law.initializer})" if law.initializer else ""
        )  # fmt: skip
        lines.append(f"parameter {parameter.name}: {size} {told}")
    rows = [_HEAD, *(_row(analysis, node) for node in graph.nodes)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    widths = [min(width, 44) for width in widths]
    lines += [
        "  ".join(cell[:44].ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _shape(graph: LayerGraph, value: str) -> str:
    shape = graph.shape(value)
    if shape is None:
        return "?"
    return "x".join("?" if n is None else str(n) for n in shape) or "scalar"


def _row(analysis: Analysis, node: Node) -> tuple[str, ...]:
    graph = analysis.graph
    op = node.op if node.known else f"unknown ({node.source_op})"
    inputs = " ".join("-" if v is None else v.rpartition("/")[2] for v in node.inputs)
    signal = analysis.signal(node.output) if node.outputs else analysis.signal(None)
    rms = "?" if signal.rms is None else number(signal.rms)
    mean = "?" if signal.mean is None else number(signal.mean)
    shape = _shape(graph, node.output) if node.outputs else ""
    return (node.module or node.name or node.id, op, inputs, shape, rms, mean)
