"""Messages of a command: on standard error, and in the log file of a process that has one."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from input_pipeline.console import SafeConsole

stderr = SafeConsole(stderr=True)
log_file: Console | None = None  # set when a run has several processes; gets the messages, but no progress bar


def log(*items, sep: str = " ", bar: bool = False) -> None:
    """Print strings or rich tables. With `bar`, skip terminals, where a progress bar shows the same.

    Square brackets in strings are printed as they are, not read as markup.
    """
    for console in (stderr, log_file):
        if console is not None and not (bar and console.is_terminal):
            texts = [Text(item) if isinstance(item, str) else item for item in items]
            console.print(*texts, sep=sep, highlight=False, soft_wrap=True)
