"""ARC302 one-sided-residual."""

from __future__ import annotations

from collections.abc import Iterator

from archlint.finding import Finding, NotApplicable, Severity, Suggestion
from archlint.rule import Rule
from archlint.signal.analysis import Analysis
from archlint.signal.claims import growth_claim
from archlint.signal.remedies import scaled
from archlint.signal.structure import Trunk
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


class OneSidedResidual(Rule):
    """Residual branches that end in a ReLU add up with the same sign and blow up the stream.

    ## What it does
    Follows every residual stream h ← h + η·f(h) whose branches end in values of one sign (ReLU,
    softplus, sigmoid, a square, an absolute value) and computes how the squared length grows.

    ## Why is this bad
    Values of one sign have a mean, and the means of all branches add up: the stream grows like
    exp(1.13 Σ η), with the first power of η. The usual 1/√depth, right for branches that end in a
    linear layer, is then not enough.

    ## Example
    ```python
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)
            nn.init.kaiming_normal_(self.fc.weight, nonlinearity="relu")
            nn.init.zeros_(self.fc.bias)

        def forward(self, x):
            return x + torch.relu(self.fc(x)) / 40**0.5  # error: ARC302


    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*[Block() for _ in range(40)])
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            return self.head(self.blocks(x))
    ```

    ## Use instead
    ```python
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)
            nn.init.kaiming_normal_(self.fc.weight, nonlinearity="relu")
            nn.init.zeros_(self.fc.bias)

        def forward(self, x):
            return x + torch.relu(self.fc(x)) / 40


    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(*[Block() for _ in range(40)])
            self.head = nn.Linear(64, 10)

        def forward(self, x):
            return self.head(self.blocks(x))
    ```

    ## How it is computed
    With s the mean of the stream's elements and q their second moment, a branch of mean m√q and
    second moment vq gives s' = s + ηm√q and q' = q + η²vq + 2ηsm√q (m = 1/√π and v = 1 for a
    He-initialised layer with ReLU). The finding is Σ log₁₀(q'/q) ≥ 1 (info), 2 (warning),
    4 (error); with Adam twice as much. Blocks with a norm in the branch are left out.

    ## What would confirm it
    The mean of the stream's elements grows along depth together with its length.

    ## References
    Hanin & Rolnick 2018, the theorem on residual networks (arXiv 1803.01719).
    """

    code = "ARC302"
    slug = "one-sided-residual"
    severity = Severity.ERROR
    since = "0.1.0"
    references = ("https://arxiv.org/abs/1803.01719",)
    needs_initial_weights = True

    def check(self, analysis: Analysis) -> Iterator[Finding | NotApplicable]:
        for trunk in analysis.trunks:
            yield self._judge(analysis, trunk)

    def _judge(self, analysis: Analysis, trunk: Trunk) -> Finding | NotApplicable:
        bare = [block for block in trunk.blocks if not block.normalised]
        modules = paths(block.last or block.add for block in bare or trunk.blocks)
        where = stretch(modules)
        if len(bare) < 2:
            return NotApplicable("fewer than two blocks without a norm in the branch", where)
        sided = [block for block in bare if block.ending == "one-sided"]
        if 2 * len(sided) < len(bare):
            return NotApplicable("its branches do not end one-sided", where)
        growth = trunk.log10_growth(analysis.signals)
        if growth is None:
            return NotApplicable("the length is not known on all of it", where)
        severity = grade(growth, limits(self.context.optimizer))
        if severity is None:
            return NotApplicable(f"the squared length grows by {factor(growth)} only", where)
        scales = [block.scale for block in bare]
        squares = sum(scale**2 for scale in scales)
        target = 1 / len(bare)
        message = (
            f"{plural(len(bare), 'residual block')} whose branches end one-sided ({where}) "
            f"multiply the squared length of the signal by {factor(growth)}: their means add up."
        )
        if squares <= 1.5:
            message += " A scale of 1/√depth is not enough here."
        return self.finding(
            severity, message, collapsed(modules), modules=modules, count=len(bare),
            site=site(analysis, bare[0].add), cause=trunk.start,
            claim=growth_claim(trunk, growth, limits(self.context.optimizer)[severity]),
            evidence={"log10_growth": growth, "blocks": len(bare), "sum_of_scales": sum(scales),
                      "sum_of_squared_scales": squares,
                      "threshold": limits(self.context.optimizer)[severity],
                      "formula": "s' = s + ηm√q, q' = q + η²vq + 2ηsm√q"},
            suggestion=Suggestion(
                f"end each branch in a linear layer, or scale it by 1/{len(bare)} = "
                f"{number(target)} (now {number(scales[0])})",
                f"x = x + branch(x) / {len(bare)}", {"scale": target}, scaled(bare, target)),
            sketch=sketch([f"{modules[min(i, len(modules) - 1)]}: growth "
                           f"{number(block.growth or 0)}, η = {number(block.scale)}"
                           for i, block in enumerate(bare)]),
        )  # fmt: skip
