"""What the command line writes, and where: results to stdout or a file, the rest to stderr."""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from archlint.errors import ArchlintError

if TYPE_CHECKING:
    from rich.console import Console


def put(text: str, output_file: str | None = None, out: TextIO | None = None) -> None:
    """To standard output, or to a file: whole or not at all."""
    if output_file is None:
        stream = out or sys.stdout
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no arrows still shows text
        try:
            stream.write(text)
            stream.flush()
        except BrokenPipeError:  # nothing may be tried again when the stream is closed
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise
        return
    path = Path(output_file)
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except OSError as error:
        raise ArchlintError(
            f"{output_file} cannot be written: {error.strerror}", "choose another --output-file"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def console(out: TextIO | None = None, to_file: bool = False) -> Console:
    """A console for what is written to ``out``: colour and width as the terminal has them."""
    from rich.console import Console

    stream = out or sys.stdout
    if to_file or not stream.isatty():
        return Console(file=stream, width=100, highlight=False, no_color=True,
                       force_terminal=False, legacy_windows=False)  # fmt: skip
    return Console(file=stream, highlight=False)


def complain(error: ArchlintError) -> None:
    """Print a user's mistake: one line, the traceback of their code where there is one, a hint."""
    line = " ".join(error.message.split())
    _label("error", "red")
    click.echo(f": {line}", err=True)
    for text in error.details.splitlines():
        click.echo(f"  {text}".rstrip(), err=True)
    if error.hint:
        _label("  hint", "cyan", bold=False)
        click.echo(f": {error.hint}", err=True)


def _label(text: str, colour: str, bold: bool = True) -> None:
    """What kind of line it is, in colour where the terminal has it and nobody objects."""
    wanted = False if os.environ.get("NO_COLOR") else None
    click.secho(text, fg=colour, bold=bold or None, nl=False, err=True, color=wanted)


def warn(text: str) -> None:
    """Print a remark on what was not looked at."""
    _label("warning", "yellow")
    click.echo(f": {text}", err=True)


def progress(count: int, quiet: bool) -> Callable[[str], None] | None:
    """A line on stderr that names the target at hand, where somebody looks and there are many."""
    if quiet or count < 2 or not sys.stderr.isatty():
        return None
    seen = 0

    def show(target: str) -> None:
        nonlocal seen
        seen += 1
        sys.stderr.write(f"\r\x1b[2K[{seen}/{count}] {target[-60:]}")
        sys.stderr.flush()

    return show


def clear_progress() -> None:
    """Take the line of :func:`progress` away."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[2K")
