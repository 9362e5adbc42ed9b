"""The command line: ``archlint check``, ``rule``, ``graph``. Heavy imports wait for the command."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from archlint import __version__
from archlint.errors import ArchlintError

if TYPE_CHECKING:
    from rich.console import Console

    from archlint.config import Config
    from archlint.linter import Report

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
SEVERITIES = ("error", "warning", "info", "never")


class _DefaultsToCheck(click.Group):
    """``archlint model.onnx`` is ``archlint check model.onnx``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {"-h", "--help", "--version"}
        if not args or (args[0] not in self.commands and args[0] not in own):
            args = ["check", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_DefaultsToCheck, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="archlint")
def cli() -> None:
    """Whether a neural network can start training, and which line to change.

    `archlint model.onnx` is short for `archlint check model.onnx`.
    """


@cli.command()
@click.argument("targets", nargs=-1)
@click.option("--select", multiple=True, metavar="CODES", help="Rules to run, such as ARC1,ARC301.")
@click.option("--ignore", multiple=True, metavar="CODES", help="Rules not to run.")
@click.option("--fail-on", type=click.Choice(SEVERITIES), help="Severity that makes exit code 1.")
@click.option("--format", "form", type=click.Choice(["full", "concise", "json"]), default="full",
              show_default=True, help="How to print findings.")  # fmt: skip
@click.option("--output-file", "-o", type=click.Path(dir_okay=False), metavar="FILE",
              help="Write findings to a file.")  # fmt: skip
@click.option("--optimizer", type=click.Choice(["sgd", "adam"]),
              help="Adam tolerates twice the drift in decades.")  # fmt: skip
@click.option("--input", "inputs", multiple=True, metavar="NAME:SHAPE[:TYPE]",
              help="Shape of an input, such as x:2x3x224x224 or ids:2x128:int64.")  # fmt: skip
@click.option("--mode", type=click.Choice(["train", "eval"]),
              help="How BatchNorm and dropout are meant.")  # fmt: skip
@click.option("--statistics", is_flag=True, help="Print how often each rule fired.")
@click.option("--explain-silence", is_flag=True, help="Say why rules found nothing to report.")
@click.option("--config", "config_file", type=click.Path(dir_okay=False), metavar="FILE",
              help="A pyproject.toml to use.")  # fmt: skip
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but findings and errors.")
def check(
    targets: tuple[str, ...],
    select: tuple[str, ...],
    ignore: tuple[str, ...],
    fail_on: str | None,
    form: str,
    output_file: str | None,
    optimizer: str | None,
    inputs: tuple[str, ...],
    mode: str | None,
    statistics: bool,
    explain_silence: bool,
    config_file: str | None,
    quiet: bool,
) -> None:
    """Lint models: TARGETS are ONNX files or folders of them.

    Exit code: 0 clean, 1 findings at or above --fail-on, 2 something could not be linted.
    """
    from dataclasses import replace

    from archlint.config import load_config
    from archlint.linter import check as lint_targets
    from archlint.target import expand, parse_input

    config = load_config(Path(config_file) if config_file else None)
    given: dict[str, Any] = {
        "select": _codes(select), "ignore": _codes(ignore), "fail_on": fail_on,
        "optimizer": optimizer, "mode": mode,
    }  # fmt: skip
    config = replace(config, **{key: value for key, value in given.items() if value})
    wanted = expand(targets or config.targets)
    if not wanted:
        raise ArchlintError(
            "nothing to lint: no target is named and [tool.archlint] lists none",
            "archlint model.onnx",
        )
    report = lint_targets(
        wanted, dict(parse_input(text) for text in inputs), config, _progress(len(wanted), quiet)
    )
    _clear_progress()
    for error in report.errors:
        complain(error)
    _put(_rendered(report, config, form, statistics, explain_silence, quiet, output_file),
         output_file)  # fmt: skip
    raise SystemExit(report.exit_code(config.fail_on))


def _codes(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(code for value in values for code in value.replace(",", " ").split())


def _progress(count: int, quiet: bool) -> Any:
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


def _clear_progress() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[2K")


def _rendered(
    report: Report,
    config: Config,
    form: str,
    statistics: bool,
    explain_silence: bool,
    quiet: bool,
    output_file: str | None,
) -> str:
    if form == "json":
        from archlint.report.json import render

        return render(report)
    from archlint.report import concise

    if statistics:
        return concise.statistics(report)
    if not any(target.error is None for target in report.targets):
        return ""
    if quiet and not report.findings:
        return ""
    if form == "concise":
        return concise.render(report)
    from archlint.report import full

    console = _console(output_file is not None)
    with console.capture() as capture:
        full.write(report, console, explain_silence)
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


def _console(to_file: bool = False) -> Console:
    from rich.console import Console

    if to_file or not sys.stdout.isatty():
        return Console(file=sys.stdout, width=100, highlight=False, no_color=True,
                       force_terminal=False, legacy_windows=False)  # fmt: skip
    return Console(highlight=False)


def _put(text: str, output_file: str | None) -> None:
    """To standard output, or to a file: whole or not at all."""
    if output_file is None:
        sys.stdout.write(text)
        sys.stdout.flush()
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


@cli.command()
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="List all rules.")
def rule(name: str | None, every: bool) -> None:
    """Explain a rule, by its code or slug; or list all rules."""
    from archlint.rule import registry

    known = registry()
    if name is None or every:
        lines = [
            f"{r.code}  {r.slug:<26} {r.severity.label:<8} {r.title()}\n" for r in known
        ]  # fmt: skip
        _put("".join(lines), None)
        return
    found = known.get(name)
    if found is None:
        import difflib

        names = [text for r in known for text in (r.code, r.slug)]
        close = difflib.get_close_matches(name, names, 1, 0.4)
        hint = f"did you mean {close[0]}?" if close else "`archlint rule --all` lists the rules"
        raise ArchlintError(f"no rule is called {name!r}", hint)
    page = f"# {found.code} {found.slug}\n\n{found.page()}\n"
    if sys.stdout.isatty():
        from rich.markdown import Markdown

        console = _console()
        with console.capture() as capture:
            console.print(Markdown(page))
        page = capture.get()
    _put(page, None)


@cli.command()
@click.argument("target")
@click.option("--input", "inputs", multiple=True, metavar="NAME:SHAPE[:TYPE]",
              help="Shape of an input.")  # fmt: skip
@click.option("--mode", type=click.Choice(["train", "eval"]), default="train", show_default=True,
              help="How BatchNorm and dropout are meant.")  # fmt: skip
def graph(target: str, inputs: tuple[str, ...], mode: str) -> None:
    """Show how a model was understood, node by node: what a bug report needs."""
    from archlint.linter import load
    from archlint.report.graph import render
    from archlint.signal.analysis import analyse
    from archlint.target import parse_input, resolve

    resolved = resolve(target, dict(parse_input(text) for text in inputs))
    _put(render(analyse(load(resolved, mode))), None)


def complain(error: ArchlintError) -> None:
    """Print a user's mistake: one line and a hint."""
    line = " ".join(error.message.split())
    click.secho("error", fg="red", bold=True, nl=False, err=True)
    click.echo(f": {line}", err=True)
    if error.hint:
        click.secho("  hint", fg="cyan", nl=False, err=True)
        click.echo(f": {error.hint}", err=True)


def main() -> None:
    """The entry point: no traceback for a user's mistake, a quiet end behind ``| head``."""
    gc.set_threshold(100_000, 20, 20)  # imports make many objects and no garbage
    try:
        cli.main(standalone_mode=False)
    except ArchlintError as error:
        complain(error)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
