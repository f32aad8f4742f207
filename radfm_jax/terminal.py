"""Parsers, exit codes, messages and progress bars of the commands."""

from __future__ import annotations

import argparse
import contextlib
import time
import warnings
from collections.abc import Callable, Iterator

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from input_pipeline.samples import ScanNotice
from radfm_jax.runtime import console


def parser(prog: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """Return an argparse parser whose help keeps line breaks."""
    return argparse.ArgumentParser(
        prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run(command: Callable[[], int]) -> int:
    """Run a command and return its exit code: 2 after a ValueError or OSError, 130 after an interrupt."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns about merges that it skips on purpose
    try:
        with scan_notices():
            return command()
    except KeyboardInterrupt:
        message("interrupted", style="red")
        return 130
    except (ValueError, OSError) as error:
        message(f"error: {error}", style="red")
        return 2


@contextlib.contextmanager
def scan_notices() -> Iterator[None]:
    """Print each ScanNotice as a message, without its file and line in the code."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def show_notice(text, category, *place, **options) -> None:
            if issubclass(category, ScanNotice):
                message(f"notice: {text}", style="yellow")
            else:
                show(text, category, *place, **options)

        warnings.simplefilter("default", ScanNotice)
        warnings.showwarning = show_notice
        yield


def message(text: str, style: str = "") -> None:
    """Print a line without interpreting markup."""
    console.log(Text(text, style=style))


def progress_bar(title: str) -> Progress:
    """Return a progress bar on standard error. It is disabled outside a terminal."""
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    return Progress(*columns, console=console.stderr, transient=True, disable=not console.stderr.is_terminal)


@contextlib.contextmanager
def answer_progress(every: int = 1) -> Iterator[Callable[[int, int, int], None]]:
    """Yield a callback (answered, failed, total) that updates a progress bar.

    Args:
      every: outside a terminal, print a line every `every` calls instead.
    """
    calls, start_time = 0, time.perf_counter()
    with progress_bar("answers") as bar:
        task = bar.add_task("", total=None)

        def update(answered: int, failed: int, total: int) -> None:
            nonlocal calls
            calls += 1
            completed = answered + failed
            status = f"{failed} failed, {answered / (time.perf_counter() - start_time):.2f} samples/s"
            bar.update(task, completed=completed, total=total, description=status)
            if bar.disable and (calls % every == 0 or completed == total):
                message(f"{completed}/{total}, {status}")

        yield update
