"""What a rule reports: a finding, where it is, and how bad it is."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from archlint.initialization.distribution import Distribution

Verdict = Literal["confirmed", "refuted", "inconclusive"]
Scalar = str | int | float | bool | None


def short_path(path: str) -> str:
    """A path below the working directory relative to it; any other as it is."""
    return path.removeprefix(os.path.join(os.getcwd(), ""))


class Severity(enum.IntEnum):
    """How bad a finding is; ordered, so that ``--fail-on`` is a comparison."""

    INFO = 1  # worth knowing
    WARNING = 2  # predicted to train worse or slower
    ERROR = 3  # predicted not to start training

    @property
    def label(self) -> str:
        """The name as users write it: ``info``, ``warning`` or ``error``."""
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Site:
    """A place a user can go to: a line of source, or else a node of an ONNX file.

    ``line``, ``end_line`` count from 1; ``column``, ``end_column`` count from 1 in characters,
    ``end_column`` is one past the last. ``node`` is the ONNX node's name.
    """

    file: str
    line: int | None = None
    column: int | None = None
    end_line: int | None = None
    end_column: int | None = None
    node: str | None = None

    def __str__(self) -> str:
        file = short_path(self.file)
        if self.line is None:
            return f"{file}#{self.node}" if self.node else file
        return f"{file}:{self.line}" + (f":{self.column}" if self.column else "")


@dataclass(frozen=True, slots=True)
class Remedy:
    """A suggestion as a change of the graph, so that an experiment can be made with it.

    ``words`` complete "with …", such as "the suggested initialization". ``laws``, by the value that
    a parameter is read as, are drawn in place of the present ones. ``factors``, by (node, value),
    multiply what the node reads. ``attributes`` replace those of a node. The nodes of ``wider``
    have ``times`` as many features, and what reads them weights to match, of the same gain.
    """

    words: str
    laws: Mapping[str, Distribution] = field(default_factory=dict)
    factors: Mapping[tuple[str, str], float] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    wider: tuple[str, ...] = ()
    times: float = 1.0


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What to change. ``text`` is one sentence with the computed value in it; ``code``, where
    there is one, is a line to paste; ``values`` holds the computed numbers for machines;
    ``remedy`` is the same for an experiment, None where nothing can be done without the user."""

    text: str
    code: str | None = None
    values: Mapping[str, Scalar] = field(default_factory=dict)
    remedy: Remedy | None = None


Statistic = Literal[
    "length", "typical length", "gradient", "typical gradient", "length spread", "gradient spread",
    "unit difference", "common part", "weight difference", "reach",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Claim:
    """What an experiment can measure of a finding, and from where on the finding stands.

    With M the mean square of a value's elements in one sample and G the squared norm of the
    gradient there, over independent initializations and inputs (theory.md 5.6):

    * ``length``: log10 of E M(end)/E M(start); without ``start`` of E M(end) itself.
    * ``gradient``: log10 of E G(start)/E G(end): what a small difference is multiplied by.
    * ``typical length``, ``typical gradient``: the mean of log10 of these ratios.
    * ``length spread``, ``gradient spread``: the variance of ln of these ratios.
    * ``unit difference``: log10 of the variance between the features of ``end`` over their mean
      square, in a typical draw. ``common part``: log10 of their squared mean over that variance.
    * ``weight difference``: log10 of the mean square of the difference of two parameters, named by
      ``start`` and ``end``, over that of one of them, each time the model is built.
    * ``reach``: the share of the elements of ``end`` that are lost when the parameter ``start``
      holds no numbers.

    ``start`` and ``end`` are value ids of the graph, ``predicted`` is the finding's own figure.
    The finding stands where the statistic lies beyond ``limit``, as seen from zero; where
    ``below``, where it is smaller than ``limit``. ``also`` is a second value whose E M divides the
    length, as that of a product's other factor.
    """

    statistic: Statistic
    end: str
    start: str | None
    predicted: float
    limit: float
    below: bool = False
    also: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """What an experiment found: the figure with its interval (99 % over all looks at the data), in
    the units of the claim. ``draws`` were used, ``lost`` of them had no finite value;
    ``needed`` draws would settle an open question. ``remark`` says why there is no figure.
    """

    figure: float | None = None
    low: float | None = None
    high: float | None = None
    draws: int = 0
    lost: int = 0
    needed: int | None = None
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Training:
    """How many draws of a network start to train: ``started`` of ``draws``, in ``steps`` steps in
    the median of those; ``undecided`` were still under way when time was up, the others failed
    within ``most`` steps at every one of ``rates``. ``task`` is what they learned.
    """

    draws: int
    started: int
    steps: int | None
    undecided: int
    most: int
    task: str
    optimizer: str
    rates: tuple[float, ...]

    @property
    def failed(self) -> int:
        """Draws that did not start."""
        return self.draws - self.started - self.undecided


@dataclass(frozen=True, slots=True)
class Trial:
    """Training as a finding's network is, and as the finding's remedy makes it. ``remark`` says why
    one of them is missing; ``decides``: it gave the finding its verdict, not the figure."""

    found: Training | None
    remedied: Training | None = None
    remark: str = ""
    decides: bool = False


@dataclass(frozen=True, slots=True)
class Finding:
    """One cause, reported once.

    ``message`` is a headline: its first sentence holds the layer and the number.
    ``module`` is the module path with repeated indices collapsed (``blocks.*.mlp``), ``modules``
    all the paths behind it, ``count`` how many places have this cause.
    ``evidence`` maps a name to a predicted value, a threshold or the formula used.
    """

    code: str
    slug: str
    severity: Severity
    message: str
    module: str
    modules: tuple[str, ...] = ()
    count: int = 1
    site: Site | None = None
    label: str = ""  # what is said at the site itself; the module where empty
    related: tuple[tuple[Site, str], ...] = ()  # further places, each with a label
    evidence: Mapping[str, Scalar] = field(default_factory=dict)
    suggestion: Suggestion | None = None
    sketch: tuple[str, ...] = ()  # what the graph looks like there, one line a layer
    claim: Claim | None = None  # what the probe measures of it
    verdict: Verdict | None = None
    measurement: Measurement | None = None
    trial: Trial | None = None  # whether training starts
    cause: str = ""  # what findings of several rules have in common


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """Why a rule stays silent at a place where it looked (``--explain-silence``)."""

    reason: str
    where: str = ""
