"""Watch the other processes of a run: liveness, a common stop, a common end.

Two threads in every process talk to the others through the coordination service, never through the devices:

    liveness check      a process died, is stopped, or is cut off    -> the others exit with 75: start again
    news/stop           a process got SIGTERM or Ctrl-C              -> all agree on the step after which they stop
    news/failed/P       process P ends with an exception             -> all exit with its code

JAX sends the heartbeats from C++. A Python thread would miss them while a library holds the interpreter lock (loading
a large extension, initialising accelerators).

A collective waits forever for a process that is gone, and so does clean-up. So a failing process exits with os._exit.
JAX alone reports a lost process only through a failing collective. It never reports signals or exceptions of other
processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from typing import TextIO

import jax

from input_pipeline.messages import printable
from radfm_jax.runtime import compat, faults

POLL = 1.0  # seconds between checks
SAME_CAUSE = 5.0  # seconds within which all processes must fail to count as having failed for the same reason
SHUTDOWN_TIMEOUT = 30.0  # seconds that process 0 waits for the others to disconnect
ROOT = "radfm_jax/peers"


@dataclasses.dataclass(eq=False)
class Peers:
    """The other processes of a run. Without any, this class starts no thread and never waits.

    with peers:
        with peers.abort_on_error():      # innermost, so that an exception ends all before clean-up waits for them
            ... if peers.stopping(): ...
    """

    stop: faults.Stop  # set by signals
    process: int = 0
    processes: int = 1
    timeout: float = 15.0  # seconds without a heartbeat until a process is considered lost; the service uses the same
    service: subprocess.Popen | None = None  # the coordination service, in process 0
    log: TextIO | None = None  # log of this process; the reason for an early end is written to it too

    def __post_init__(self):
        self.stopped_by = ""
        self._count_lock = threading.Lock()  # held while the processes agree on the step after which they stop
        self._agreeing, self._count, self._stop_after = False, 0, None
        # None, "published", or "unclear": a collective failed, probably because of another process.
        self._failure: str | None = None
        self._leaving, self._done = threading.Event(), threading.Event()
        self._client = compat.coordination_client()
        self._threads = [
            threading.Thread(target=target, daemon=True, name=name)
            for target, name in ((self._watch_news, "news of peers"), (self._watch_liveness, "liveness of peers"))
        ]
        for thread in self._threads if self.processes > 1 else ():
            thread.start()

    def stopping(self) -> bool:
        """Return whether any process got a signal to stop. All processes must call this the same number of times.

        The n-th call returns the same value in all processes. Normally it only takes a lock. After a signal it waits
        for about a second until all processes have published their number of calls. Calls after the maximum of these
        numbers return True.
        """
        if self.processes == 1:
            if self.stop:
                self.stopped_by = self.stop.signal.name
            return bool(self.stop)
        with self._count_lock:
            self._count += 1
            return self._stop_after is not None and self._count > self._stop_after

    def leaving_on_signal(self) -> contextlib.AbstractContextManager:
        """Within the block, a signal ends all processes at once, without saving, with the exit code for a restart."""

        def leave(number: signal.Signals) -> None:
            reason = f"{number.name} before the first step: there is nothing to save"
            self._write(f"{reason}. Exiting with code {faults.REQUEUE}: run the same command again")
            self.abort(faults.REQUEUE, reason)

        if self.stop:
            leave(self.stop.signal)
        return self.stop.calling(leave)

    @contextlib.contextmanager
    def abort_on_error(self):
        """Exit all processes if only some of them raise an exception. If all raise one, let it propagate."""
        try:
            yield
        except BaseException as e:
            if self.processes > 1:
                self._abort_unless_common(e)
            raise

    def abort(self, code: int, reason: str) -> None:
        """Exit all processes with this code. This process exits without clean-up."""
        if self.processes > 1:
            # Publish in a thread, because the service itself may be stuck.
            thread = threading.Thread(target=self._publish_failure, args=(code, reason), daemon=True)
            thread.start()
            thread.join(3)
        self._exit(code)

    @property
    def files(self) -> list[TextIO]:
        """Files that the reason for an early exit is written to: the console, and in process 0 also its log."""
        return [sys.stderr, *([self.log] if self.log is not None and self.process == 0 else [])]

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, _, exception: BaseException | None, __) -> None:
        """Wait for all processes and disconnect; exit immediately if the others do not arrive."""
        if self.processes == 1:
            return
        if exception is not None:
            self._write("".join(traceback.format_exception(exception)), console=False)
        self._leaving.set()  # from now on a missing process may have finished
        try:
            self._client.wait_at_barrier("radfm_jax/end", int(1000 * (10 if exception else 60)))
        except jax.errors.JaxRuntimeError as e:
            self._write(f"the other processes did not reach the end of the run: {e}")
            if exception is not None:
                self._write("".join(traceback.format_exception(exception)))
            self._exit(faults.exit_code(exception) if exception else 1)
        self._done.set()  # only after the barrier: until then another process may wait for this one's count
        self._threads[0].join(5)
        alone = threading.Event()
        if self.service is not None:
            threading.Thread(target=self._await_disconnects, args=(alone,), daemon=True, name="disconnects").start()
            alone.wait(SHUTDOWN_TIMEOUT)
        jax.distributed.shutdown()
        # If other processes are still connected, ending the service would abort them. It exits by itself later.
        if alone.is_set():
            self.service.kill()
            self.service.communicate()

    def _await_disconnects(self, alone: threading.Event) -> None:
        """Set `alone` when this is the only connected process."""
        deadline = time.monotonic() + SHUTDOWN_TIMEOUT
        while time.monotonic() < deadline:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # raised when a process disconnects meanwhile
                if len(self._client.get_live_nodes(list(range(self.processes)))) == 1:
                    alone.set()
                    return
            time.sleep(0.05)

    def _abort_unless_common(self, e: BaseException) -> None:
        code, trace = faults.exit_code(e), "".join(traceback.format_exception(e))
        if _is_runtime_error(e):
            # Another process is probably the cause; if so, a thread finds out and exits meanwhile.
            self._failure = "unclear"
            self._write(trace, console=False)
            time.sleep(self.timeout + 5 * POLL)
        self._failure = "published"
        self._publish_failure(code, f"{type(e).__name__}: {e}".splitlines()[0])
        deadline = time.monotonic() + SAME_CAUSE
        while time.monotonic() < deadline:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                if len(self._client.key_value_dir_get(f"{ROOT}/news/failed/")) == self.processes:
                    return
            time.sleep(0.1)
        message = faults.message(e)
        self._write(trace if message is None else f"error: {message}")
        self._exit(code)

    def _publish_failure(self, code: int, reason: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone, so the others end anyway
            self._publish(f"news/failed/{self.process}", {"code": code, "reason": reason})

    def _publish(self, key: str, value) -> None:
        self._client.key_value_set(f"{ROOT}/{key}", json.dumps(value), allow_overwrite=True)

    def _write(self, text: str, console: bool = True) -> None:
        show_cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # the progress bar hides it
        text = printable(text.rstrip(), keep="\n\t")
        for file in self.files if console else self.files[-1:]:
            print((show_cursor if file is sys.stderr else "") + text, file=file, flush=True)

    def _exit(self, code: int) -> None:
        for stream in (sys.stdout, sys.stderr, self.log):
            if stream is not None:
                stream.flush()
        os._exit(code)

    def _watch_liveness(self) -> None:
        everyone, last_reached = list(range(self.processes)), time.monotonic()
        while not self._leaving.wait(POLL):
            try:
                live = self._client.get_live_nodes(everyone)
            except jax.errors.JaxRuntimeError as e:
                if time.monotonic() - last_reached > self.timeout:
                    self._exit_for_restart(f"process {self.process} cannot reach the coordination service: {e}")
                continue
            last_reached = time.monotonic()
            if lost := [p for p in everyone if p not in live]:
                names = f"process {lost[0]} sends" if len(lost) == 1 else f"processes {', '.join(map(str, lost))} send"
                self._exit_for_restart(
                    f"{names} no heartbeat (--peer-timeout {self.timeout:g}): killed, stopped, or disconnected"
                )

    def _exit_for_restart(self, reason: str) -> None:
        if self._leaving.is_set():
            return
        self._write(
            f"{reason}. Exiting with code {faults.REQUEUE}: the same command resumes from the last saved step. Stacks "
            "of this process:"
        )
        faults.dump_stacks(*self.files)
        self._exit(faults.REQUEUE)

    def _watch_news(self) -> None:
        pause = 0.0
        while not self._done.wait(pause):
            pause = POLL
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # if it persists, the liveness check exits
                if self.stop:
                    self._publish("news/stop", {"process": self.process, "signal": self.stop.signal.name})
                pause = self._handle_news()

    def _handle_news(self) -> float:
        """React to failures and signals of other processes; return the seconds until the next check."""
        prefix = f"{ROOT}/news/"
        news = {k.partition(prefix)[2]: json.loads(v) for k, v in self._client.key_value_dir_get(prefix)}
        for name, value in news.items():
            kind, _, number = name.partition("/")
            if kind == "failed" and int(number) != self.process:
                self._handle_failure(int(number), value["code"], value["reason"])
        if "stop" in news and self._stop_after is None:
            self.stopped_by = f"process {news['stop']['process']} got {news['stop']['signal']}"
            return self._agree_on_stop()
        return POLL

    def _agree_on_stop(self) -> float:
        if not self._agreeing:
            self._count_lock.acquire()  # the training loop waits in `stopping` until the agreement
            self._agreeing = True
            self._publish(f"count/{self.process}", self._count)
        counts = self._client.key_value_dir_get(f"{ROOT}/count/")
        if len(counts) < self.processes:
            return 0.05
        self._stop_after = max(int(v) for _, v in counts)
        self._count_lock.release()
        return POLL

    def _handle_failure(self, number: int, code: int, reason: str) -> None:
        """Exit with the code of process `number`. Do nothing if this process has published its own failure."""
        deadline = time.monotonic() + SAME_CAUSE
        while time.monotonic() < deadline and self._failure is None:
            time.sleep(0.1)
        if self._failure != "published":
            self._write(f"process {number} exits with code {code}: {reason} (see logs/{number}.log)")
            if code == faults.STUCK:
                faults.dump_stacks(*self.files)
            self._exit(code)


def _is_runtime_error(e: BaseException | None) -> bool:
    """Return whether an exception is, or was caused by, an error of JAX's runtime other than out of memory.

    In a collective or a barrier every process gets such an error when one process fails.
    """
    while e is not None:
        if isinstance(e, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(e)
        e = e.__cause__ or e.__context__
    return False
