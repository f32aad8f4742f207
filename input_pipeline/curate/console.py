"""What all builders share on the command line: options of a run, bars, the report at the end, exit codes."""

from __future__ import annotations

import argparse
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
exit codes: 0 done (problems, if any, are counted and listed in problems.jsonl); 1 done, but --strict and there are
problems; 2 nothing usable: a wrong option, a file that is not there, a table that cannot be read; 130 interrupted.
"""


def parser(tool: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """With the options that every builder has."""
    made = argparse.ArgumentParser(
        prog=f"python -m input_pipeline.curate {tool}",
        description=description,
        epilog=epilog.rstrip() + "\n" + EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--out", required=True, metavar="DIR", help="directory to write to")
    made.add_argument("--strict", action="store_true", help="exit 1 if anything at all could not be used")
    return made


def add_job_options(made: argparse.ArgumentParser) -> None:
    """For builders that work item by item (jobs.py)."""
    made.add_argument("--workers", type=int, metavar="N", help="processes (default: all cores; 0: none of its own)")
    beam.add_options(made)
    made.add_argument("--restart", action="store_true", help="begin anew, whatever an earlier run had finished")


def job_options(args: argparse.Namespace) -> dict:
    """Of `jobs.run`, from `add_job_options`."""
    if args.workers is not None and args.workers < 0:
        raise ValueError(f"--workers {args.workers}: 0 or more are needed")
    return {"workers": args.workers, "restart": args.restart} | beam.runner_arguments(args)


def run(args: argparse.Namespace, build: Callable[..., dict]) -> int:
    """build(directory, progress=, said=) -> report, with bars, errors in one line, and the report printed."""
    console = Console(stderr=True)
    bars = Progress(
        SpinnerColumn(), TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), RateColumn(),
        TimeRemainingColumn(), TextColumn("[red]{task.fields[bad]}"), console=console,
    )  # fmt: skip
    directory = Path(args.out)
    try:
        with locked_directory(directory, "build"), bars:
            report = build(
                directory,
                progress=lambda what, unit, total: add_bar(bars, what, unit, total),
                said=lambda what: console.print(f"[yellow]note:[/yellow] {escape(what)}", soft_wrap=True),
            )
    except KeyboardInterrupt:
        console.print("interrupted: the same command goes on where it was")
        return 130
    except (ValueError, OSError, WorkerError) as error:
        console.print(f"[red]error:[/red] {escape(error_line(error))}", soft_wrap=True, highlight=False)
        return 2
    show(report)
    said, listed = report["files"]
    print(f"{args.out}: {said}" + (f", {listed}" if report.get("problems") else ""))
    return 1 if args.strict and report.get("problems") else 0


def show(report: dict) -> None:
    table = Table(title=report["tool"])
    table.add_column("")
    table.add_column("", justify="right")
    for what, count in report["counts"].items():
        table.add_row(escape(what), f"{count:,}" if isinstance(count, int) else str(count))
    table.add_section()
    for reason, count in report.get("reasons", {}).items():
        table.add_row(f"[red]{escape(reason)}", f"{count:,}")
    Console(width=None if sys.stdout.isatty() else 120).print(table)
