"""Processes that work off tasks over one shared state, and always say on what they failed.

    with Pool(make, workers=4) as pool:               # make() -> state, called once, in a process of its own
        future = pool.submit("row 17", function, arg)  # function(state, arg) in a worker
        future.result()

    caller ------ pipes ------+--------------+
       |                      |              |
       +-- keeper: make() -- fork: worker 0  worker 1 ...

The keeper is a fresh process, free of the caller's threads and accelerators. It makes the state once and forks the
workers, which share its memory and its open files (rows of tables, on disk) instead of holding a copy each.

What a task raises arrives as it was raised. A worker that dies (killed, out of memory, a crash in a decoder) or says
nothing for `timeout` seconds ends every task with WorkerError, which names the task and the file it was at. When the
caller dies, by whatever means, the keeper and the workers end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import connection
from typing import Any

from input_pipeline.images.scans.base import ScanError
from input_pipeline.samples import RowError

START_TIMEOUT = 600.0  # seconds for make(), which reads whole tables

_report: Callable[[str], None] | None = None  # in a worker: says what it is at


def at(what: str) -> None:
    """To be called in a task before each file: an error then names it, and the time-out starts anew."""
    if _report is not None:
        _report(what)


class WorkerError(RuntimeError):
    """A worker died or hung: at which task, at which file, and how.

    Attributes:
      task: what the task was called; "" if it ended before any task. Tasks not begun are given the same error.
      place: what the worker last said it was `at`; "" if nothing.
    """

    def __init__(self, message: str, task: str = "", place: str = ""):
        self.task, self.place = task, place
        super().__init__(message)


class Pool:
    """See the head of this file.

    Args:
      make: called without arguments; picklable with workers, so a function of a module or a functools.partial of one.
      workers: 0 runs every task in the calling thread, when its result is asked for.
      timeout: seconds without a word from a worker that has a task.
    Raises:
      Exception: what `make` raised, at once.
    """

    def __init__(self, make: Callable[[], Any], workers: int, timeout: float = 30.0):
        self.workers, self._timeout = workers, timeout
        self._broken: BaseException | None = None
        self._closed = False
        if workers == 0:
            self._state = make()
            return
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(workers)]
        self._control, keepers_end = context.Pipe()
        self._keeper = context.Process(
            target=_keep, args=(make, [theirs for _, theirs in pipes], keepers_end), name="keeper"
        )
        self._keeper.start()
        self._pids: list[int] = []
        self._kill = weakref.finalize(self, _kill, self._control, self._keeper, self._pids)  # at exit, if not before
        keepers_end.close()
        for _, theirs in pipes:
            theirs.close()
        try:
            self._receive_start()
        except BaseException:
            self._kill()
            raise
        self._threads = [
            threading.Thread(target=self._feed, args=(ours, pid), daemon=True, name=f"feed {pid}")
            for (ours, _), pid in zip(pipes, self._pids, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _receive_start(self) -> None:
        if not self._control.poll(START_TIMEOUT):
            raise WorkerError(f"the data was not opened within {START_TIMEOUT:.0f} s")
        try:
            kind, value = self._control.recv()
        except EOFError:
            self._keeper.join(10)
            raise WorkerError(f"the process that opens the data {_ending(self._keeper.exitcode)}") from None
        if kind == "error":
            raise _unpacked(value)
        self._pids += value

    def submit(self, what: str, function: Callable, *args) -> Future:
        """function(state, *args), in a worker. `what` names the task in errors."""
        if self._closed:
            raise RuntimeError("the pool is closed")
        if self.workers == 0:
            return _Later(lambda: function(self._state, *args))
        future: Future = Future()
        if self._broken is not None:
            future.set_exception(self._broken)
        else:
            self._tasks.put((what, pickle.dumps((function, args)), future))
        return future

    def _feed(self, pipe: connection.Connection, pid: int) -> None:
        """Hands tasks to one worker, one after the other."""
        while (task := self._tasks.get()) is not None:
            what, message, future = task
            if self._broken is not None:
                future.set_exception(self._broken)
                continue
            if not future.set_running_or_notify_cancel():
                continue
            place = ""
            try:
                pipe.send_bytes(message)
                while True:
                    if not pipe.poll(self._timeout):
                        os.kill(pid, signal.SIGKILL)
                        raise WorkerError(
                            f"{what}: no word from its worker for {self._timeout:g} s{_at(place)}", what, place
                        )
                    kind, value = pipe.recv()
                    if kind != "at":
                        break
                    place = value
            except (EOFError, OSError):
                died = f"{what}: its worker died{_at(place)} (killed, out of memory, or a crash)"
                self._break(future, WorkerError(died, what, place))
            except BaseException as error:  # whatever it was, somebody waits for this future
                self._break(future, error)
            else:
                if kind == "result":
                    future.set_result(value)
                else:
                    future.set_exception(_unpacked(value))
        with contextlib.suppress(OSError):
            pipe.send_bytes(b"")

    def _break(self, future: Future, error: BaseException) -> None:
        self._broken = self._broken or error
        future.set_exception(error)

    def close(self) -> None:
        """Ends the workers; tasks not begun are cancelled. Nothing is left behind."""
        if self._closed or self.workers == 0:
            self._closed = True
            return
        self._closed = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()[2].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        self._kill()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _kill(control: connection.Connection, keeper: multiprocessing.process.BaseProcess, pids: list[int]) -> None:
    control.close()  # the keeper takes its workers with it
    keeper.join(5)
    if keeper.is_alive():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        keeper.kill()
        keeper.join()


class _Later(Future):
    """Runs when it is asked for its result."""

    def __init__(self, run: Callable[[], Any]):
        super().__init__()
        self._run = run

    def result(self, timeout=None):
        if not self.done():
            try:
                self.set_result(self._run())
            except BaseException as error:
                self.set_exception(error)
                raise
        return super().result(timeout)


def _at(place: str) -> str:
    return f", at {place}" if place else ""


def _ending(code: int | None) -> str:
    if code is None:
        return "does not answer"
    return f"was ended by signal {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _packed(error: BaseException) -> tuple[BaseException, list[str]]:
    """The error and its notes, the worker's traceback the last; by its text if it does not survive the way.

    What is wrong with the data is said by the error itself, and needs no traceback.
    """
    text = "".join(traceback.format_exception(error)).rstrip()
    # An exception with a `__reduce__` of its own loses its notes when it is pickled.
    notes = getattr(error, "__notes__", [])
    if not isinstance(error, (RowError, ScanError)):
        notes = [*notes, f"in a worker:\n{text}"]
    try:
        # Some exceptions pickle and cannot be built again.
        pickle.loads(pickle.dumps(error))
        return error, notes
    except Exception:
        return RuntimeError(text), []


def _unpacked(packed: tuple[BaseException, list[str]]) -> BaseException:
    error, notes = packed
    if notes:
        error.__notes__ = notes
    return error


# --- in the other processes -------------------------------------------------------------------------------------------


def _keep(make, pipes: list[connection.Connection], control: connection.Connection) -> None:
    """Makes the state, forks the workers, waits for the caller's end of `control` to close, kills the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides when Ctrl-C ends them
    try:
        state = make()
    except BaseException as error:
        control.send(("error", _packed(error)))
        return
    pids = []
    for mine in pipes:
        pid = os.fork()
        if pid == 0:
            control.close()
            for other in pipes:
                if other is not mine:
                    other.close()
            _work(state, mine)
        pids.append(pid)
    for pipe in pipes:  # so that the caller sees the end of a worker as the end of its pipe
        pipe.close()
    with contextlib.suppress(EOFError, OSError):
        control.send(("pids", pids))
        control.recv()
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pid in pids:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def _work(state, pipe: connection.Connection) -> None:
    global _report
    _report = lambda what: pipe.send(("at", what))  # noqa: E731
    with contextlib.suppress(EOFError, OSError):  # the caller is gone
        while message := pipe.recv_bytes():
            try:
                function, args = pickle.loads(message)
                answer = ("result", function(state, *args))
            except BaseException as error:
                answer = ("error", _packed(error))
            pipe.send(answer)
    os._exit(0)  # what the keeper registered to run at exit is the keeper's
