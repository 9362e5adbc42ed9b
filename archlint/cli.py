"""The command line: ``archlint check``, ``profile``, ``rule``, ``graph``. Heavy imports wait for
the command."""

from __future__ import annotations

import gc
import os
import sys
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from archlint import __version__
from archlint.errors import ArchlintError
from archlint.probe.options import options_of, probe_options
from archlint.terminal import clear_progress, complain, console, progress, put, warn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


def _model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that say how a target is built and called."""
    for option in (
        click.option("--config", "config_file", type=click.Path(dir_okay=False), metavar="FILE",
                     help="A pyproject.toml to use."),
        click.option("--timeout", type=click.FloatRange(0), metavar="SECONDS",
                     help="How long importing, building and running a Python target may take; "
                          "0 is no limit.  [default: 300]"),
        click.option("--mode", type=click.Choice(["train", "eval"]),
                     help="How BatchNorm and dropout are meant.  [default: train]"),
        click.option("--kwargs", metavar="JSON",
                     help="Keyword arguments of the class or function, such as "
                          "'{\"depth\": 3}'."),
        click.option("--input", "inputs", multiple=True, metavar="NAME:SHAPE[:TYPE]",
                     help="Shape of an input, such as x:2x3x224x224 or ids:2x128:int64; "
                          "batch.ids:2x128:int64 is the entry of a dict."),
    ):  # fmt: skip
        command = option(command)
    return command


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
@_model_options
@click.option("--statistics", is_flag=True, help="Print how often each rule fired.")
@click.option("--explain-silence", is_flag=True, help="Say why rules found nothing to report.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but findings and errors.")
@click.option("--probe", "probed", is_flag=True,
              help="Draw the network many times and give every finding a verdict.")  # fmt: skip
@probe_options
def check(
    targets: tuple[str, ...],
    select: tuple[str, ...],
    ignore: tuple[str, ...],
    fail_on: str | None,
    form: str,
    output_file: str | None,
    optimizer: str | None,
    inputs: tuple[str, ...],
    kwargs: str | None,
    mode: str | None,
    timeout: float | None,
    statistics: bool,
    explain_silence: bool,
    config_file: str | None,
    quiet: bool,
    probed: bool,
    probing: dict[str, Any],
) -> None:
    """Lint models.

    \b
    TARGETS are
      model.onnx, model.pt2                 files (of a folder: the .onnx files in it)
      net.py:Net, package.module:build      classes, functions or instances in Python code
      'timm:create_model("resnet50")'       calls with literal arguments
      net.py                                every nn.Module class defined in the file that needs
                                            no arguments and is no part of another one

    Python code is imported from the working directory, and its models are built without
    allocating their weights.

    Exit code: 0 clean, 1 findings at or above --fail-on, 2 something could not be linted.
    """
    from archlint.linter import Report, TargetReport
    from archlint.linter import check as lint_targets
    from archlint.target import expand, parse_inputs, parse_kwargs
    from archlint.user_code import last_resort, stdout_as_stderr

    if probing and not probed:
        raise ArchlintError(f"--{next(iter(probing))} is for the probe", "add --probe")
    config = _config(config_file, select=_codes(select), ignore=_codes(ignore), fail_on=fail_on,
                     optimizer=optimizer, mode=mode, timeout=timeout)  # fmt: skip
    wanted = expand(targets or config.targets)
    if not wanted:
        raise ArchlintError(
            "nothing to lint: no target is named and [tool.archlint] lists none",
            "archlint model.onnx, or archlint net.py:Net",
        )
    finished: list[TargetReport] = []
    with stdout_as_stderr() as out:

        def tell(report: Report) -> None:
            clear_progress()
            for error in report.errors:
                complain(error)
            for remark in () if quiet else report.remarks:
                warn(remark)
            text = _rendered(report, config, form, statistics, explain_silence, quiet,
                             None if output_file else out)  # fmt: skip
            put(text, output_file, out)

        def give_up(name: str, error: ArchlintError) -> None:
            with _ending():
                tell(Report((*finished, TargetReport(name, error=error))))

        with last_resort(give_up):
            report = lint_targets(
                wanted, parse_inputs(inputs), config, progress(len(wanted), quiet),
                parse_kwargs(kwargs) if kwargs is not None else None,
                options_of(probing, quiet) if probed else None, finished,
            )  # fmt: skip
        tell(report)
    raise SystemExit(report.exit_code(config.fail_on))


@contextmanager
def _ending() -> Iterator[None]:
    """End the process afterwards, whatever its other threads are at."""
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):
                stream.flush()
        os._exit(2)


def _give_up(_: str, error: ArchlintError) -> None:
    with _ending():
        complain(error)


def _config(file: str | None, **given: Any) -> Config:
    """The configuration with what the command line says instead."""
    from dataclasses import replace

    from archlint.config import load_config

    config = load_config(Path(file) if file else None)
    return replace(config, **{k: v for k, v in given.items() if v is not None and v != ()})


def _codes(values: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(code for value in values for code in value.replace(",", " ").split())


def _rendered(
    report: Report,
    config: Config,
    form: str,
    statistics: bool,
    explain_silence: bool,
    quiet: bool,
    out: TextIO | None,
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
    plain = out is None or not out.isatty()
    if form == "concise" or (plain and not report.findings and not explain_silence):
        return concise.render(report)  # nothing to lay out: no need to load rich
    from archlint.report import full

    screen = console(out, to_file=out is None)
    with screen.capture() as capture:
        full.write(report, screen, explain_silence)
    return "".join(line.rstrip() + "\n" for line in capture.get().splitlines())


@cli.command(
    "probe",
    params=[option for option in check.params if option.name != "probed"],
    help="Lint models and give every finding a verdict: what `archlint check --probe` does.\n\n"
    "Draws the network many times, on a GPU where there is one, measures what each finding "
    "predicts, and stops when all are confirmed or refuted at 99 %.",
)
@click.pass_context
def probe_command(context: click.Context, /, **given: Any) -> None:
    """``check`` with ``--probe``."""
    context.invoke(check, probed=True, **given)


@cli.command()
@click.argument("target")
@click.option("--format", "form", type=click.Choice(["table", "json", "csv"]), default="table",
              show_default=True, help="How to print the predictions.")  # fmt: skip
@click.option("--parameters", is_flag=True, help="In a table or CSV, the parameters alone.")
@click.option("--output-file", "-o", type=click.Path(dir_okay=False), metavar="FILE",
              help="Write to a file.")  # fmt: skip
@_model_options
def profile(
    target: str,
    form: str,
    parameters: bool,
    output_file: str | None,
    inputs: tuple[str, ...],
    kwargs: str | None,
    mode: str | None,
    timeout: float | None,
    config_file: str | None,
) -> None:
    """Print what is predicted of every value and known of every parameter.

    \b
    rms       root mean square of a value's elements over random weights and inputs
    spread    variance of the logarithm of its square from one initialization to the next
    grad rms  the same of the gradient, for a random direction at the output
    corr      correlation of two positions, and of two samples
    × fan-in  variance of a weight times the number of products that its layer sums
    """
    from archlint.profiling import profile as profile_target
    from archlint.report import profile as formats
    from archlint.target import parse_inputs, parse_kwargs
    from archlint.user_code import last_resort, stdout_as_stderr

    config = _config(config_file, mode=mode, timeout=timeout)
    with stdout_as_stderr() as out, last_resort(_give_up):
        found = profile_target(
            target, parse_inputs(inputs), config, parse_kwargs(kwargs) if kwargs else None
        )
        if form == "json":
            text = formats.as_json(found)
        elif form == "csv":
            text = formats.as_csv(found, parameters)
        else:
            width = console(out, to_file=output_file is not None).width
            text = formats.tables(found, width, parameters)
        put(text, output_file, out)


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
        put("".join(lines))
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

        screen = console()
        with screen.capture() as capture:
            screen.print(Markdown(page))
        page = capture.get()
    put(page)


@cli.command()
@click.argument("target")
@_model_options
def graph(
    target: str,
    inputs: tuple[str, ...],
    kwargs: str | None,
    mode: str | None,
    timeout: float | None,
    config_file: str | None,
) -> None:
    """Show how a model was understood, node by node: what a bug report needs."""
    from archlint.linter import load, one_model
    from archlint.report.graph import render
    from archlint.signal.analysis import analyse
    from archlint.target import parse_inputs, parse_kwargs, resolve
    from archlint.user_code import last_resort, stdout_as_stderr

    config = _config(config_file, mode=mode, timeout=timeout)
    with stdout_as_stderr() as out, last_resort(_give_up):
        resolved = resolve(target, parse_inputs(inputs), parse_kwargs(kwargs) if kwargs else None)
        model = one_model(resolved, config.timeout)
        put(render(analyse(load(model, config.mode, config.timeout))), out=out)


def main() -> None:
    """The entry point: no traceback for a user's mistake, a quiet end behind ``| head``."""
    gc.set_threshold(100_000, 20, 20)  # imports make many objects and no garbage
    before = threading.enumerate()
    code: str | int | None = 0
    try:
        _run()
    except SystemExit as end:
        code = end.code
    if any(not thread.daemon for thread in threading.enumerate() if thread not in before):
        # threads that a target's code started would keep the process, perhaps for ever
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)
    sys.exit(code)


def _run() -> None:
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
        sys.exit(0)
