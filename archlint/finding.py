"""What a rule reports: a finding, where it is, and how bad it is."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

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
class Suggestion:
    """What to change. ``text`` is one sentence with the computed value in it; ``code``, where
    there is one, is a line to paste; ``values`` holds the computed numbers for machines."""

    text: str
    code: str | None = None
    values: Mapping[str, Scalar] = field(default_factory=dict)


Statistic = Literal[
    "length", "typical length", "gradient", "typical gradient", "length spread", "gradient spread"
]


@dataclass(frozen=True, slots=True)
class Claim:
    """What an experiment can measure of a finding, and from where on the finding stands.

    With M the mean square of a value's elements in one sample and G the squared norm of the
    gradient there, over independent initializations and inputs (theory.md 5.6):

    * ``length``: log10 of E M(end)/E M(start); without ``start`` of E M(end) itself.
    * ``gradient``: log10 of E G(start)/E G(end): what a small difference is multiplied by.
    * ``typical length``, ``typical gradient``: the mean of log10 of these ratios.
    * ``length spread``, ``gradient spread``: the variance of ln of these ratios.

    ``start`` and ``end`` are value ids of the graph, ``predicted`` is the finding's own figure.
    The finding stands where the statistic lies beyond ``limit``, as seen from zero; where
    ``below``, where it is smaller than ``limit``.
    """

    statistic: Statistic
    end: str
    start: str | None
    predicted: float
    limit: float
    below: bool = False


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
    cause: str = ""  # what findings of several rules have in common


@dataclass(frozen=True, slots=True)
class NotApplicable:
    """Why a rule stays silent at a place where it looked (``--explain-silence``)."""

    reason: str
    where: str = ""
