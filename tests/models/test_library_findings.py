"""What the rules say of models of public libraries at their own initialization.

Each was once reported for something that training or draws refute: norms whose epsilon is large but
costs nothing, residual stacks with a norm behind them, sums of branches that hold a norm each,
contractions that a scale and a norm follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

import tests.conftest  # noqa: F401  (torchvision without its compiled operators can be imported)
from archlint.finding import Severity
from archlint.testing import lint_module
from tests.models.zoo import STAGES, build_transformer


def timm_model(name: str, **options: Any) -> Callable[[], nn.Module]:
    import timm

    return lambda: timm.create_model(name, **options)


def torchvision_model(name: str) -> Callable[[], nn.Module]:
    from torchvision import models

    return lambda: models.get_model(name, weights=None)


HEALTHY: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v3_small": torchvision_model("mobilenet_v3_small"),
    "davit": timm_model("davit_tiny", depths=(1, 1, 9, 1)),
    "ghostnetv3": timm_model("ghostnetv3_050"),
    "swiftformer": timm_model("swiftformer_xs"),
    "tinynet": timm_model("tinynet_c"),
    "starnet": timm_model("starnet_s050"),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_healthy(name: str) -> None:
    found = lint_module(HEALTHY[name])
    assert all(f.severity is Severity.INFO for f in found), [f.message for f in found]
    codes = [f.code for f in found if f.code != "ARC901"]
    assert codes in ([], ["ARC403"])  # norms with one epsilon are one remark


def test_weights_of_almost_zero() -> None:
    """BLIP's vision tower is drawn with std 1e-10 (its configuration's initializer_range): no
    normalisation brings that back."""
    found = lint_module(lambda: build_transformer("blip", STAGES[0]))
    (finding,) = [f for f in found if f.code == "ARC403"]
    assert finding.severity is Severity.ERROR
    assert finding.message.startswith("vision_model.post_layernorm (and 5 more norms)")
    assert finding.evidence["share"] < 1e-9
