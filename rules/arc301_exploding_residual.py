"""ARC301 exploding-residual."""

from __future__ import annotations

import math
from collections.abc import Iterator

from archlint.finding import Finding, NotApplicable, Severity, Suggestion
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.signal.claims import growth_claim
from archlint.signal.remedies import scaled
from archlint.signal.structure import Trunk
from archlint.signal.weights import rescaled_by
from archlint.wording import (
    collapsed,
    factor,
    grade,
    limits,
    number,
    paths,
    plural,
    site,
    sketch,
    stretch,
)


class ExplodingResidual(Rule):
    """A stack of residual blocks without norms multiplies the signal at every add.

    ## What it does
    Follows every residual stream h ← h + η·f(h) whose branches hold no norm and end in a linear
    map, and multiplies the growth of the squared length over its blocks.

    ## Why is this bad
    A branch with squared gain g that is added unscaled multiplies the squared length by 1 + g:
    twenty blocks of two He-initialised layers by 10⁶ and more. The gradient grows alike.

    ## Example
    ```python
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(64, 64)
            self.fc2 = nn.Linear(64, 64)
            for layer in (self.fc1, self.fc2):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

        def forward(self, x):
            return x + self.fc2(torch.relu(self.fc1(x)))  # error: ARC301


    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*[Block() for _ in range(20)])
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            return self.head(self.blocks(x))
    ```

    ## Use instead
    ```python
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1 = nn.Linear(64, 64)
            self.fc2 = nn.Linear(64, 64)
            nn.init.kaiming_normal_(self.fc1.weight, nonlinearity="relu")
            nn.init.zeros_(self.fc1.bias)
            nn.init.zeros_(self.fc2.weight)
            nn.init.zeros_(self.fc2.bias)

        def forward(self, x):
            return x + self.fc2(torch.relu(self.fc1(x)))


    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*[Block() for _ in range(20)])
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            return self.head(self.blocks(x))
    ```

    ## How it is computed
    For a branch that ends in a zero-mean linear map the add has no cross term, and
    E M grows by 1 + η²g per block, g the branch's gain on squared length; an activation after
    the add is part of the growth. Blocks with a norm inside the branch grow linearly and are left
    out. Where a norm follows the last add, the length and the gradient, which grow alike, cancel
    (DaViT's position convolutions), and nothing is reported. The finding is Σ log₁₀ growth ≥ 1
    (info), 2 (warning), 4 (error); with Adam twice as much.

    ## What would confirm it
    The slope of ln M against the block's number is ln(1 + η²g); the gradient has the same slope.

    ## References
    Hanin & Rolnick 2018 (arXiv 1803.01719). De & Smith 2020 (2002.10444). Zhang, Dauphin & Ma
    2019, Fixup (1901.09321).
    """

    code = "ARC301"
    slug = "exploding-residual"
    severity = Severity.ERROR
    since = "0.1.0"
    references = (
        "https://arxiv.org/abs/1803.01719",
        "https://arxiv.org/abs/2002.10444",
        "https://arxiv.org/abs/1901.09321",
    )
    needs_initial_weights = True

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        for trunk in analysis.trunks:
            yield self._judge(analysis, trunk)

    def _judge(self, analysis: Analysis, trunk: Trunk) -> Finding | NotApplicable:
        bare = [block for block in trunk.blocks if not block.normalised]
        modules = paths(block.last or block.add for block in bare or trunk.blocks)
        where = stretch(modules)
        if not bare:
            return NotApplicable("every branch holds a norm: the stream grows linearly", where)
        if len(bare) < 2:
            return NotApplicable("a single block", where)
        if 2 * sum(block.ending == "one-sided" for block in bare) >= len(bare):
            return NotApplicable("its branches end one-sided (ARC302)", where)
        if rescaled_by(analysis.graph, trunk.blocks[-1].add) is not None:
            return NotApplicable("a norm at its end resets the length", where)
        growth = trunk.log10_growth(analysis.signals)
        if growth is None:
            return NotApplicable("the length is not known on all of it", where)
        severity = grade(growth, limits(self.context.optimizer))
        if severity is None:
            return NotApplicable(f"the squared length grows by {factor(growth)} only", where)
        gains = [block.gain for block in bare if block.gain]
        gain = math.exp(sum(math.log(g) for g in gains) / len(gains)) if gains else 1.0
        eta = math.sqrt((10 ** (1 / len(bare)) - 1) / gain)
        scales = {round(block.scale, 6) for block in bare}
        now = number(scales.pop()) if len(scales) == 1 else "various"
        message = (
            f"{plural(len(bare), 'residual block')} without a norm ({where}) multiply the squared "
            f"length of the signal by {factor(growth)}, {number(10 ** (growth / len(bare)))} "
            f"per block."
        )
        return self.finding(
            severity, message, collapsed(modules), modules=modules, count=len(bare),
            site=site(analysis, bare[0].add), cause=trunk.start,
            claim=growth_claim(trunk, growth, limits(self.context.optimizer)[severity]),
            evidence={"log10_growth": growth, "blocks": len(bare), "branch_gain": gain,
                      "threshold": limits(self.context.optimizer)[severity],
                      "formula": "sum of log10(1 + η²·g)"},
            suggestion=Suggestion(
                f"scale every branch by {number(eta)} (now {now}), which keeps the growth below a "
                "factor of ten; or start its last layer at zero; or put a norm in the branch",
                f"x = x + {number(eta)} * branch(x)", {"scale": eta, "branch_gain": gain},
                scaled(bare, eta)),
            sketch=sketch([f"{modules[min(i, len(modules) - 1)]}: growth "
                           f"{number(block.growth or 0)}, η = {number(block.scale)}"
                           for i, block in enumerate(bare)]),
        )  # fmt: skip
