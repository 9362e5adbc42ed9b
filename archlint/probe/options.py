"""How an experiment is run: the options of the command line, and the bar that shows it going."""

from __future__ import annotations

import functools
import math
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import click

from archlint.errors import ArchlintError

Progress = Callable[[int, int, str, str], None]  # made, most, of what, what is open


@dataclass(frozen=True)
class ProbeOptions:
    """How an experiment is run. ``draws`` and ``time`` (seconds) are upper limits; ``memory`` is in
    bytes, None for a quarter of what is free; ``data`` is FILE.npy, FILE.npz or ``module:loader``;
    ``train`` asks whether training starts in ``steps`` steps of ``optimizer``; ``progress`` is told
    of draws (or steps) made, the most, and what is open."""

    draws: int = 2048
    time: float = 120.0
    seed: int = 0
    device: str = "auto"
    memory: float | None = None
    data: str | None = None
    train: bool = False
    steps: int = 300
    optimizer: Literal["sgd", "adam"] = "sgd"
    progress: Progress | None = None


_NAMES = ("draws", "time", "seed", "device", "memory", "data", "train", "steps")


def probe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of an experiment, handed to the command as one dict ``probing`` of those that
    were given."""

    @functools.wraps(command)
    def collected(**given: Any) -> Any:
        found = {name: given.pop(name) for name in _NAMES}
        found = {name: value for name, value in found.items() if value not in (None, False)}
        return command(probing=found, **given)

    wrapped: Callable[..., Any] = collected
    default = ProbeOptions()
    for option in (
        click.option("--train", is_flag=True,
                     help="Also train some draws for a few hundred steps: do they start, and do "
                          "they with what is suggested?"),
        click.option("--steps", type=click.IntRange(10), metavar="COUNT",
                     help="How long --train trains at each learning rate.  "
                          f"[default: {default.steps}]"),
        click.option("--data", metavar="FILE.npy|MODULE:LOADER",
                     help="Real inputs for the probe, [samples, …]; else normal numbers. With "
                          "classes beside them (FILE.npz, pairs of a loader) --train learns them."),
        click.option("--memory", metavar="SIZE",
                     help="What the probe may use, such as 2GB.  [default: a quarter of what is "
                          "free]"),
        click.option("--device", metavar="DEVICE",
                     help="Where the probe computes: auto, cpu, cuda, cuda:1 or mps."),
        click.option("--seed", type=int, help="Of the probe: same seed, same figures."),
        click.option("--time", type=click.FloatRange(0, min_open=True), metavar="SECONDS",
                     help=f"How long the probe may take.  [default: {default.time:g}]"),
        click.option("--draws", type=click.IntRange(8), metavar="COUNT",
                     help=f"How often the probe may draw the network.  [default: {default.draws}]"),
    ):  # fmt: skip
        wrapped = option(wrapped)
    return wrapped


def options_of(probing: dict[str, Any], quiet: bool = False) -> ProbeOptions:
    """The options that were given, the rest as it is by default. Raises ArchlintError."""
    given = dict(probing)
    if "steps" in given and "train" not in given:
        raise ArchlintError("--steps is for training", "add --train")
    if "memory" in given:
        given["memory"] = parse_size(given["memory"])
    if math.isnan(given.get("time", 0.0)):
        raise ArchlintError("--time nan is no time", "give seconds")
    return ProbeOptions(**given, progress=None if quiet else bar())


def parse_size(text: str) -> float:
    """``2GB``, ``512MiB``, ``1e9`` as bytes. Raises ArchlintError."""
    found = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*(?:([kmgt])(i?)b?|b?)\s*", text.lower())
    units = "kmgt"
    try:
        if found is None:
            raise ValueError
        size = float(found.group(1))
    except ValueError:
        raise ArchlintError(f"--memory {text!r} is no size", "write 2GB or 512MiB") from None
    if found.group(2):
        size *= (1024 if found.group(3) else 1000) ** (units.index(found.group(2)) + 1)
    if math.isinf(size):
        raise ArchlintError(f"--memory {text} is more than there is", "write 2GB or 512MiB")
    if size < 1e6:
        raise ArchlintError(f"--memory {text} is less than a megabyte", "write 2GB or 512MiB")
    return size


def bar() -> Progress | None:
    """A line on stderr with draws (or steps) made, their rate, the time left and what is open; None
    where stderr is no terminal. Shown from one second on."""
    if not sys.stderr.isatty():
        return None
    started = time.monotonic()
    state: dict[str, float] = {"done": 0, "since": started, "last": started}

    def show(done: int, most: int, unit: str, left: str) -> None:
        now = time.monotonic()
        if done < state["done"]:
            state["since"] = state["last"]  # another run, of steps
        state["done"], state["last"] = done, now
        if now - started < 1.0:
            return
        rate = done / max(now - state["since"], 1e-9)
        filled = round(20 * done / most)
        remaining = (most - done) / rate if rate > 0 else 0.0
        text = (f"probe [{'#' * filled}{'.' * (20 - filled)}] {done}/{most} {unit}, {rate:.0f}/s, "
                f"at most {remaining:.0f} s more, {left}")  # fmt: skip
        sys.stderr.write(f"\r\x1b[2K{text[:110]}")
        sys.stderr.flush()

    return show
