"""The command line that all tools share: common options, progress bars, the report, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from input_pipeline.console import RateColumn, SafeConsole, add_bar, error_line, stdout_console
from input_pipeline.files import locked_directory
from input_pipeline.parallel import beam
from input_pipeline.parallel.workers import WorkerError

EXIT_CODES = """
exit codes:
  0    done; problems are counted and listed in problems.jsonl
  1    done, but there are problems and --strict is set
  2    no result: a wrong option, a missing file, or a table that cannot be read
  130  interrupted
"""


@dataclasses.dataclass(frozen=True)
class Tool:
    """A command of `python -m input_pipeline.curate`."""

    description: str
    epilog: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[..., dict]  # run(name, args, directory, progress=, log=) -> the report; raises ValueError
    check: Callable[[argparse.Namespace], str] = lambda args: ""  # what is wrong with a combination of options


def _options(args: argparse.Namespace, names: str) -> dict:
    return {name: getattr(args, name) for name in names.split()}


def run_on_tables(curate: Callable[..., dict], names: str) -> Callable[..., dict]:
    """Return the `Tool.run` of a tool that reads tables below --root. `names` are its options."""
    return lambda tool, args, directory, **running: curate(
        args.tables, args.root, directory, _options(args, names), **running
    )


def run_on_source(curate: Callable[..., dict], names: str) -> Callable[..., dict]:
    """Return the `Tool.run` of a tool that works item by item. `names` are its options."""
    return lambda tool, args, directory, **running: curate(
        tool, args.source, directory, _options(args, names),
        workers=args.workers, restart=args.restart, **beam.runner_arguments(args), **running,
    )  # fmt: skip


def number_that_is(condition: str, is_met: Callable[[float], bool], kind: type = float) -> Callable[[str], float]:
    """Return an argparse type for numbers that meet a condition. The error message states the condition."""

    def number(text: str):
        value = kind(text)
        if not is_met(value):
            raise argparse.ArgumentTypeError(f"must be {condition} (got {text})")
        return value

    return number


def at_least(minimum: float, kind: type = int) -> Callable[[str], float]:
    """Return an argparse type for numbers of at least `minimum`."""
    return number_that_is(f"at least {minimum}", lambda value: value >= minimum, kind)


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of tools that work item by item (jobs.py)."""
    text = "worker processes (default: all cores; 0: none)"
    parser.add_argument("--workers", type=at_least(0), metavar="N", help=text)
    beam.add_options(parser)
    parser.add_argument("--restart", action="store_true", help="discard the results of an interrupted run")


def main(tool: Tool, name: str, argv: list[str]) -> int:
    """Parse the options, run the tool with progress bars, and print its report. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m input_pipeline.curate {name}",
        description=tool.description,
        epilog=tool.epilog.rstrip() + "\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="output directory")
    parser.add_argument("--strict", action="store_true", help="exit 1 if there is any problem")
    tool.add_options(parser)
    args = parser.parse_args(argv)
    if problem := tool.check(args):
        parser.error(problem)
    console = SafeConsole(stderr=True)
    bars = Progress(
        SpinnerColumn(), TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), RateColumn(),
        TimeRemainingColumn(), TextColumn("[red]{task.fields[bad]}"), console=console,
    )  # fmt: skip
    directory = Path(args.out)
    try:
        with locked_directory(directory, "curate"), bars:
            log = lambda text: console.print(f"[yellow]note:[/yellow] {escape(text)}", soft_wrap=True)  # noqa: E731
            report = tool.run(name, args, directory, progress=functools.partial(add_bar, bars), log=log)
    except KeyboardInterrupt:
        console.print("interrupted: run the same command again to resume")
        return 130
    except (ValueError, OSError, WorkerError) as error:
        console.print(f"[red]error:[/red] {escape(error_line(error))}", soft_wrap=True, highlight=False)
        return 2
    show(report)
    report_file, problems_file = report["files"]
    print(f"{args.out}: {report_file}" + (f", {problems_file}" if report.get("problems") else ""))
    return 1 if report.get("incomplete") or (args.strict and report.get("problems")) else 0


def show(report: dict) -> None:
    """Print the counts of a report and the reasons of its problems."""
    table = Table("", Column(justify="right"), title=report["tool"])
    for label, count in report["counts"].items():
        table.add_row(escape(label), f"{count:,}" if isinstance(count, int) else str(count))
    table.add_section()
    for reason, count in report.get("reasons", {}).items():
        table.add_row(f"[red]{escape(reason)}", f"{count:,}")
    stdout_console().print(table)
