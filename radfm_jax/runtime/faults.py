"""What ends a run early, and how it says so: signals, a stuck step, exit codes."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TextIO

# For schedulers: 75 (EX_TEMPFAIL) means "start me again with the same command", everything else is final.
REQUEUE = 75
STUCK = 70
MISTAKE = 2


def code_of(e: BaseException) -> int:
    """The exit code of a program that ends with this exception."""
    if isinstance(e, SystemExit) and isinstance(e.code, int):
        return e.code
    return MISTAKE if isinstance(e, ValueError) else 1


def stacks(*files: TextIO) -> None:
    """Where each thread of this process is."""
    for file in files:
        faulthandler.dump_traceback(file, all_threads=True)
        file.flush()


class Stop:
    """SIGTERM and SIGINT become a wish that the loop asks for; a second one of them ends the process at once."""

    def __init__(self):
        self.signal: signal.Signals | None = None
        self._before = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number, _) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.signal is not None


class Watchdog:
    """Ends the process, with the stacks of all its threads, when nobody has called `alive` for `seconds`.

    A peer that is alive but stuck is noticed by nothing else: a collective waits for ever. The process ends without
    clean-up, since clean-up would wait as well.

    Args:
      files: get the stacks; default: standard error.
      leave: ends the process, given an exit code and the reason.
    """

    def __init__(
        self,
        seconds: float,
        files: Sequence[TextIO] = (),
        leave: Callable[[int, str], None] = lambda code, _: os._exit(code),
    ):
        self.seconds, self._files, self._leave = seconds, files, leave
        self._last, self._what = time.monotonic(), "starting"
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")

    def alive(self, what: str) -> None:
        """Something was finished; `what` comes next."""
        self._last, self._what = time.monotonic(), what

    def _watch(self) -> None:
        while not self._done.wait(min(self.seconds / 4, 5.0)):
            silent = time.monotonic() - self._last
            if silent > self.seconds:
                what = f"stuck: {self._what} has taken {silent:.0f} s (train.step_timeout is {self.seconds:g})"
                files = self._files or [sys.stderr]
                for file in files:
                    print(f"{what}; stacks:", file=file, flush=True)
                stacks(*files)
                self._leave(STUCK, what)
                return

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
