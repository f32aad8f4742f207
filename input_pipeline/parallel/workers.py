"""Process pool: forked workers share one state, and every error names the task and the file.

    with Pool(make, workers=4) as pool:               # make() -> state, called once, in a separate process
        future = pool.submit("row 17", function, arg)  # runs function(state, arg) in a worker
        future.result()

    caller ------ pipes ------+--------------+
       |                      |              |
       +-- keeper: make() -- fork: worker 0  worker 1 ...

The keeper is a spawned process without the caller's threads and accelerators. It calls `make` once and forks the
workers, which share its memory and its open files.

A task's exception is raised again by `result()`. A worker that dies, or sends no heartbeat for `timeout` seconds,
breaks the pool: every unfinished task gets a WorkerError. The keeper and the workers exit when the caller dies.
`resilient_pool.ResilientPool` continues after such a failure.
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

START_TIMEOUT = 600.0  # seconds for make(), which reads all tables, or between its heartbeats

_send_item: Callable[[str], None] | None = None  # set in a worker, and in the keeper during make()


def heartbeat(item: str) -> None:
    """Report the current item from inside a task or make(): errors name it, and the timeout starts again."""
    if _send_item is not None:
        _send_item(item)


def available_cpus() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class WorkerError(RuntimeError):
    """A worker process died or hung. Tasks that had not started get the same error."""

    def __init__(self, message: str, task: str = "", item: str = "", hung: bool = False):
        self.task = task  # name of its task, or ""
        self.item = item  # the last item the worker reported with `heartbeat`, or ""
        self.hung = hung  # whether the worker was killed because it sent no heartbeat
        super().__init__(message)


class Pool(contextlib.AbstractContextManager):
    """A pool of worker processes over one shared state (see the module docstring).

    Args:
      make: returns the state. Must be picklable: a module-level function, or a functools.partial of one.
      workers: 0 runs each task in the calling thread, inside `result()`.
      timeout: seconds that a busy worker may go without a heartbeat.
    Raises:
      Exception: the exception that `make` raised.
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
        self._control, keeper_control = context.Pipe()
        self._keeper = context.Process(
            target=_run_keeper, args=(make, [worker_end for _, worker_end in pipes], keeper_control), name="keeper"
        )
        self._keeper.start()
        self._pids: list[int] = []
        self._stop = weakref.finalize(self, _stop_processes, self._control, self._keeper, self._pids)  # also at exit
        keeper_control.close()
        for _, worker_end in pipes:
            worker_end.close()
        try:
            self._wait_for_start()
        except BaseException:
            self._stop()
            raise
        self._threads = [
            threading.Thread(target=self._feed, args=(pipe, pid), daemon=True, name=f"feed {pid}")
            for (pipe, _), pid in zip(pipes, self._pids, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def _wait_for_start(self) -> None:
        kind, value = "item", ""
        try:
            while kind == "item":
                if not self._control.poll(START_TIMEOUT):
                    raise WorkerError(f"opening the data took more than {START_TIMEOUT:.0f} s{_at_item(value)}")
                kind, value = self._control.recv()
        except EOFError:
            self._keeper.join(10)
            raise WorkerError(f"the process that opens the data {_describe_exit(self._keeper.exitcode)}") from None
        if kind == "error":
            raise _restore_error(value)
        self._pids += value

    def submit(self, task: str, function: Callable, *args) -> Future:
        """Run function(state, *args) in a worker. `task` is its name in errors."""
        if self._closed:
            raise RuntimeError("the pool is closed")
        if self.workers == 0:
            return _LazyFuture(lambda: function(self._state, *args))
        future: Future = Future()
        if self._broken is not None:
            future.set_exception(self._broken)
        else:
            self._tasks.put((task, pickle.dumps((function, args)), future))
        return future

    def _feed(self, pipe: connection.Connection, pid: int) -> None:
        """Send tasks to one worker, one at a time."""
        while (queued := self._tasks.get()) is not None:
            task, message, future = queued
            if self._broken is not None:
                future.set_exception(self._broken)
                continue
            if not future.set_running_or_notify_cancel():
                continue
            item = ""
            try:
                pipe.send_bytes(message)
                while True:
                    if not pipe.poll(self._timeout):
                        os.kill(pid, signal.SIGKILL)
                        error = f"{task}: worker sent no heartbeat for {self._timeout:g} s{_at_item(item)}"
                        raise WorkerError(error, task, item, hung=True)
                    kind, value = pipe.recv()
                    if kind != "item":
                        break
                    item = value
            except (EOFError, OSError):
                error = f"{task}: worker died{_at_item(item)} (killed, out of memory, or crashed)"
                self._break(future, WorkerError(error, task, item))
            except BaseException as error:  # the caller waits for this future, so any error must reach it
                self._break(future, error)
            else:
                if kind == "result":
                    future.set_result(value)
                else:
                    future.set_exception(_restore_error(value))
        with contextlib.suppress(OSError):
            pipe.send_bytes(b"")

    def _break(self, future: Future, error: BaseException) -> None:
        self._broken = self._broken or error
        future.set_exception(error)

    def close(self) -> None:
        """Stop the keeper and the workers. Tasks that have not started are cancelled."""
        already_closed, self._closed = self._closed, True
        if already_closed or self.workers == 0:
            return
        with contextlib.suppress(queue.Empty):
            while True:
                self._tasks.get_nowait()[2].cancel()
        for _ in self._threads:
            self._tasks.put(None)
        self._stop()
        for thread in self._threads:
            thread.join()

    def __exit__(self, *_) -> None:
        self.close()


def _stop_processes(control: connection.Connection, keeper, pids: list[int]) -> None:
    control.close()  # the keeper kills its workers when this pipe closes
    keeper.join(5)
    if keeper.is_alive():
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        keeper.kill()
        keeper.join()


class _LazyFuture(Future):
    """A future that runs its task when `result` is called."""

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


def _at_item(item: str) -> str:
    return f" at {item}" if item else ""


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "does not answer"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"


def _picklable_error(error: BaseException) -> tuple[BaseException, list[str]]:
    """Return a picklable copy of an error, and its notes. The last note is the worker's traceback.

    RowError and ScanError describe the data, so they need no traceback.
    """
    text = "".join(traceback.format_exception(error)).rstrip()
    # Notes travel separately: an exception with its own `__reduce__` loses them.
    notes = getattr(error, "__notes__", [])
    if not isinstance(error, (RowError, ScanError)):
        notes = [*notes, f"in a worker:\n{text}"]
    try:
        pickle.loads(pickle.dumps(error))  # some exceptions can be pickled but not rebuilt
        return error, notes
    except Exception:
        return RuntimeError(text), []


def _restore_error(pickled: tuple[BaseException, list[str]]) -> BaseException:
    error, notes = pickled
    if notes:
        error.__notes__ = notes
    return error


# --- in the keeper and the workers ------------------------------------------------------------------------------------


def _run_keeper(make, pipes: list[connection.Connection], control: connection.Connection) -> None:
    """Make the state, fork the workers, wait until the caller closes `control`, then kill the workers."""
    global _send_item
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller handles Ctrl-C
    _send_item = lambda item: control.send(("item", item))  # noqa: E731
    try:
        state = make()
    except BaseException as error:
        control.send(("error", _picklable_error(error)))
        return
    _send_item = None
    pids = []
    for own_pipe in pipes:
        pid = os.fork()
        if pid == 0:
            control.close()
            for pipe in pipes:
                if pipe is not own_pipe:
                    pipe.close()
            _run_worker(state, own_pipe)
        pids.append(pid)
    for pipe in pipes:  # so that the caller gets EOF when a worker dies
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


def _run_worker(state, pipe: connection.Connection) -> None:
    global _send_item
    _send_item = lambda item: pipe.send(("item", item))  # noqa: E731
    with contextlib.suppress(EOFError, OSError):  # raised when the caller is gone
        while message := pipe.recv_bytes():
            try:
                function, args = pickle.loads(message)
                answer = ("result", function(state, *args))
            except BaseException as error:
                answer = ("error", _picklable_error(error))
            pipe.send(answer)
    os._exit(0)  # skip the exit handlers that the keeper registered
