"""Importing this registers the lowerings of every family."""

from archlint.graph.torch_recorder import (  # noqa: F401
    affine,
    attention,
    creation,
    elementwise,
    indexing,
    layout,
    losses,
    norms,
    pooling,
    recurrent,
    reductions,
)
