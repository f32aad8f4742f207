"""Early ends of a run: signals, hangs, exit codes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from input_pipeline.messages import printable

# Exit codes. Schedulers start the same command again after 75 (EX_TEMPFAIL); all other codes are final.
REQUEUE = 75
STUCK = 70
MISTAKE = 2
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class Explained(Exception):
    """An error whose message is sufficient for the user, so it is shown without a traceback."""


def message(e: BaseException) -> str | None:
    """Return the text to show for an error that needs no traceback; None for all others."""
    if isinstance(e, OSError) and e.errno in DISK_ERRORS:
        return f"{e.filename or 'a file of the run'} cannot be written: {e.strerror}"
    if isinstance(e, ValueError | Explained):
        # JAX and Grain note that they shortened the traceback; a worker of the data notes its own traceback.
        hidden = ("has removed its internal frames", "Traceback (most recent call last)")
        notes = [note for note in getattr(e, "__notes__", []) if not any(words in note for words in hidden)]
        return "\n".join([str(e), *notes])
    return None


def exit_code(e: BaseException) -> int:
    """Return the exit code of a program that ends with this exception."""
    if isinstance(e, SystemExit) and isinstance(e.code, int):
        return e.code
    return MISTAKE if isinstance(e, ValueError) else 1


def dump_stacks(*files: TextIO) -> None:
    """Write the stack of every thread of this process to `files`."""
    for file in files:
        faulthandler.dump_traceback(file, all_threads=True)
        file.flush()


class Stop:
    """A flag that SIGTERM and SIGINT set and the training loop polls; a second signal exits immediately."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._previous = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._set)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _set(self, number, _) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def calling(self, leave: Callable[[signal.Signals], None]) -> Iterator[None]:
        """Within the block, call `leave` in a thread as soon as a signal arrives.

        Python calls signal handlers between instructions of the main thread, so during a long compilation the flag is
        not set. The file descriptor of `signal.set_wakeup_fd` is written at once. Main thread only.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        previous = signal.set_wakeup_fd(writing)

        def watch() -> None:
            while numbers := os.read(reading, 1):
                if (number := signal.Signals(numbers[0])) in self._previous:
                    leave(number)

        thread = threading.Thread(target=watch, daemon=True, name="signals")
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)
            os.close(writing)
            thread.join()
            os.close(reading)


@dataclasses.dataclass(eq=False)
class Watchdog:
    """End the process and dump the stacks of all threads when `alive` was not called for `seconds`.

    This catches a peer that is alive but stuck: a collective would wait for it forever. The process exits without
    clean-up, which would also block.
    """

    seconds: float
    files: Sequence[TextIO] = ()  # receive the stacks; default: standard error
    leave: Callable[[int, str], None] = lambda code, _: os._exit(code)  # called with the reason; must end the process

    def __post_init__(self):
        self._last, self._task = time.monotonic(), "starting"
        self._done = threading.Event()

    def alive(self, task: str) -> None:
        """Reset the timer; `task` is what the process does next."""
        self._last, self._task = time.monotonic(), task

    def _watch(self) -> None:
        while not self._done.wait(min(self.seconds / 4, 5.0)):
            silent = time.monotonic() - self._last
            if silent > self.seconds:
                reason = f"stuck: {self._task} has taken {silent:.0f} s (train.step_timeout is {self.seconds:g})"
                files = self.files or [sys.stderr]
                for file in files:
                    print(printable(f"{reason}; stacks:"), file=file, flush=True)
                dump_stacks(*files)
                self.leave(STUCK, reason)
                return

    def __enter__(self) -> Watchdog:
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
