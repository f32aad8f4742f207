"""Shared code of the commands: parsers, progress bars, one-line errors, and tables on standard output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

from rich import progress
from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment
from rich.text import Text

from input_pipeline.messages import printable


class RateColumn(progress.ProgressColumn):
    """Speed in units of the task, such as scans/s."""

    def render(self, task) -> Text:
        speed = task.finished_speed or task.speed
        known = speed is not None and task.total is not None
        return Text(f"{speed:,.0f} {task.fields['unit']}/s" if known else "", style="cyan")


class SafeConsole(Console):
    """A console that escapes control characters, so that a name in a file cannot send commands to a terminal."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text, keep="\n"))


def argument_parser(module: str, description: str, epilog: str, **options) -> argparse.ArgumentParser:
    """Return the argparse parser of `python -m input_pipeline.MODULE`. Its help keeps line breaks."""
    options |= {"description": description, "epilog": epilog, "formatter_class": argparse.RawDescriptionHelpFormatter}
    return argparse.ArgumentParser(f"python -m input_pipeline.{module}", **options)


def progress_bars(console: Console) -> progress.Progress:
    """Return an empty set of progress bars for `add_bar`."""
    counts = progress.BarColumn(), progress.MofNCompleteColumn(), RateColumn(), progress.TimeRemainingColumn()
    name, bad = (progress.TextColumn(text) for text in ("{task.description:<24}", "[red]{task.fields[bad]}"))
    return progress.Progress(progress.SpinnerColumn(), name, *counts, bad, console=console)


def add_bar(bars: progress.Progress, description: str, unit: str, total: int | None) -> Callable[[int, int], None]:
    """Add a bar. Returns advance(count, bad), which adds to the finished and to the bad items."""
    task = bars.add_task(description, total=total, unit=unit, bad="")
    bad_total = 0

    def advance(count: int, bad: int) -> None:
        nonlocal bad_total
        bad_total += bad
        text = f"{bad_total:,} bad" if bad_total else ""
        if total is None:
            bars.update(task, total=count, completed=count, bad=text)
        else:
            bars.update(task, advance=count, bad=text)

    return advance


def error_line(error: BaseException) -> str:
    """Return an error's message in one line, with its one-line notes and without tracebacks of workers."""
    if isinstance(error, OSError) and error.filename:
        message = f"{error.filename}: {error.strerror}"
    else:
        message = str(error).strip() or type(error).__name__
    notes = [f"({note})" for note in getattr(error, "__notes__", []) if "\n" not in note]
    return " ".join(" ".join([message, *notes]).split())


def print_error(console: Console, message: str | BaseException) -> None:
    """Print "error: ..." in one line."""
    text = message if isinstance(message, str) else error_line(message)
    console.print(f"[red]error:[/red] {escape(text)}", soft_wrap=True, highlight=False)


def stdout_console() -> Console:
    """Return a console for tables on standard output. Outside a terminal it is 120 characters wide."""
    return SafeConsole(width=None if sys.stdout.isatty() else 120)
