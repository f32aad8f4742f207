"""The command line that all tools share: common options, progress bars, the report, exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from input_pipeline.console import RateColumn, add_bar, error_line
from input_pipeline.files import locked_directory
from input_pipeline.parallel import beam
from input_pipeline.parallel.workers import WorkerError

EXIT_CODES = """
exit codes: 0 done (problems are counted and listed in problems.jsonl); 1 done, but --strict and there are problems; 2
no result: a wrong option, a missing file, or a table that cannot be read; 130 interrupted.
"""


@dataclasses.dataclass(frozen=True)
class Tool:
    """A command of `python -m input_pipeline.curate`.

    Attributes:
      description, epilog: texts of --help.
      add_options: adds the tool's options to a parser.
      run: run(name, args, directory, progress=, log=) does the work and returns the report. Raises ValueError.
      check: check(args) returns what is wrong with a combination of options, or "".
    """

    description: str
    epilog: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[..., dict]
    check: Callable[[argparse.Namespace], str] = lambda args: ""


def at_least(minimum: float, kind: type = int) -> Callable[[str], float]:
    """Return an argparse type for numbers of at least `minimum`."""

    def number(text: str):
        value = kind(text)
        if not value >= minimum:
            raise argparse.ArgumentTypeError(f"must be at least {minimum} (got {text})")
        return value

    return number


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of tools that work item by item (jobs.py)."""
    parser.add_argument(
        "--workers", type=at_least(0), metavar="N", help="worker processes (default: all cores; 0: none)"
    )
    beam.add_options(parser)
    parser.add_argument("--restart", action="store_true", help="discard the results of an interrupted run")


def job_options(args: argparse.Namespace) -> dict:
    """Return the arguments of `jobs.run` for the options of `add_job_options`."""
    return {"workers": args.workers, "restart": args.restart} | beam.runner_arguments(args)


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
    console = Console(stderr=True)
    bars = Progress(
        SpinnerColumn(), TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), RateColumn(),
        TimeRemainingColumn(), TextColumn("[red]{task.fields[bad]}"), console=console,
    )  # fmt: skip
    directory = Path(args.out)
    try:
        with locked_directory(directory, "curate"), bars:
            report = tool.run(
                name,
                args,
                directory,
                progress=lambda task, unit, total: add_bar(bars, task, unit, total),
                log=lambda text: console.print(f"[yellow]note:[/yellow] {escape(text)}", soft_wrap=True),
            )
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
    table = Table(title=report["tool"])
    table.add_column("")
    table.add_column("", justify="right")
    for label, count in report["counts"].items():
        table.add_row(escape(label), f"{count:,}" if isinstance(count, int) else str(count))
    table.add_section()
    for reason, count in report.get("reasons", {}).items():
        table.add_row(f"[red]{escape(reason)}", f"{count:,}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
