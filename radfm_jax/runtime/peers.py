"""The processes of a run while it goes on: that all live, stop at the same step, and end together.

Two threads in every process speak to the others through the coordination service, and never through the devices.

    roll call       who has died, or is stopped, or cut off         -> the others end with 75: start again
    news/stop       a process was told to end (SIGTERM, Ctrl-C)     -> all agree on the step after which they do
    news/failed/P   a process ends with an exception                -> all end with its exit code

The service knows who lives by the heartbeats that JAX sends from C++, which a library that holds the interpreter lock
for a while (loading a large extension, starting accelerators) does not silence. The roll call waits for such a process.

A collective waits for ever for a process that is gone, and so does clean-up; so what ends here ends by os._exit.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from typing import TextIO

import jax
from jax._src import distributed

from radfm_jax.runtime import faults

POLL = 1.0  # seconds
TOGETHER = 5.0  # seconds in which all must have failed to count as having failed of the same cause
FAREWELL = 30.0  # seconds that process 0 waits for the others to have left
ROOT = "radfm_jax/peers"


class Peers:
    """The other processes; without any, nothing is started and nothing is asked.

    with peers:
        with peers.guard():      # innermost: an exception of one process ends all, before clean-up waits for them
            ... if peers.stopping(): ...

    Args:
      stop: what signals set.
      limit: seconds without a sign of life until a process counts as lost; the service has it too.
      service: of coordination.py, in process 0.
      log: of this process; what ends a run is written there too.
    """

    def __init__(
        self,
        stop: faults.Stop,
        process: int = 0,
        processes: int = 1,
        limit: float = 15.0,
        *,
        service: subprocess.Popen | None = None,
        log: TextIO | None = None,
    ):
        self.stop, self.process, self.processes, self.limit = stop, process, processes, limit
        self.stopped_by = ""
        self._service, self._log = service, log
        self._turn = threading.Lock()  # held while the step to stop after is being agreed on
        self._agreeing, self._asked, self._stop_after = False, 0, None
        self._failure: str | None = None  # None, "unclear" (a collective failed: whose fault is it?), "told"
        self._leaving, self._done = threading.Event(), threading.Event()
        self._client = distributed.global_state.client
        self._threads = [
            threading.Thread(target=work, daemon=True, name=name)
            for work, name in ((self._watch, "news of peers"), (self._call_the_roll, "roll call"))
        ]
        for thread in self._threads if processes > 1 else ():
            thread.start()

    # --- for the loop -------------------------------------------------------------------------------------------------

    def stopping(self) -> bool:
        """Whether any process was told to end: the same answer in all, which must all ask equally often.

        This costs a lock. Once there are news of a signal it waits, for about a second, until every process has said
        how often it has asked; then all say yes from the next time on which none has asked for yet.
        """
        if self.processes == 1:
            if self.stop:
                self.stopped_by = self.stop.signal.name
            return bool(self.stop)
        with self._turn:
            self._asked += 1
            return self._stop_after is not None and self._asked > self._stop_after

    @contextlib.contextmanager
    def guard(self):
        """An exception inside ends all processes. It goes on as an exception only if all of them have one."""
        try:
            yield
        except BaseException as e:
            if self.processes > 1:
                self._failed(e)
            raise

    def leave(self, code: int, why: str) -> None:
        """Tells the others, and ends the process without clean-up. The others end with this code too."""
        if self.processes > 1:
            # In a thread: the service may be what is stuck.
            telling = threading.Thread(target=self._tell, args=(code, why), daemon=True)
            telling.start()
            telling.join(3)
        self._exit(code)

    @property
    def files(self) -> list[TextIO]:
        """Where this process says why it ends: its console, and the log, which the others have for a console."""
        return [sys.stderr, *([self._log] if self._log is not None and self.process == 0 else [])]

    # --- the end ------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Peers:
        return self

    def __exit__(self, _, exception: BaseException | None, __) -> None:
        """All leave together, or this process ends at once."""
        if self.processes == 1:
            return
        if exception is not None:
            self._write("".join(traceback.format_exception(exception)), console=False)
        self._leaving.set()  # who is missing from now on may have left before
        try:
            self._client.wait_at_barrier("radfm_jax/end", int(1000 * (10 if exception else 60)))
        except jax.errors.JaxRuntimeError as e:
            self._say(f"the other processes did not come to the end of the run: {e}")
            if exception is not None:
                self._say("".join(traceback.format_exception(exception)))
            self._exit(faults.code_of(exception) if exception else 1)
        self._done.set()  # and not before: somebody may still have been agreeing on where to stop
        self._threads[0].join(5)
        alone = threading.Event()
        if self._service is not None:
            threading.Thread(target=self._until_alone, args=(alone,), daemon=True, name="farewell").start()
            alone.wait(FAREWELL)
        jax.distributed.shutdown()
        # The service's end before theirs would have JAX abort the others. It outlives this process by a while anyway.
        if alone.is_set():
            self._service.kill()
            self._service.communicate()

    def _until_alone(self, alone: threading.Event) -> None:
        """The roll, once all that live have asked for it: here nobody else does any more, but leaves."""
        until = time.monotonic() + FAREWELL
        while time.monotonic() < until:
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # that of somebody who leaves meanwhile
                if len(self._client.get_live_nodes(list(range(self.processes)))) == 1:
                    alone.set()
                    return
            time.sleep(0.05)

    # --- this process fails -------------------------------------------------------------------------------------------

    def _failed(self, e: BaseException) -> None:
        code, told = faults.code_of(e), "".join(traceback.format_exception(e))
        if _collective(e):
            # The cause is probably another process, and the thread learns which, and ends this one.
            self._failure = "unclear"
            self._write(told, console=False)
            time.sleep(self.limit + 5 * POLL)
        self._failure = "told"
        self._tell(code, f"{type(e).__name__}: {e}".splitlines()[0])
        until = time.monotonic() + TOGETHER
        while time.monotonic() < until:
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                if len(self._client.key_value_dir_get(f"{ROOT}/news/failed/")) == self.processes:
                    return
            time.sleep(0.1)
        notes = getattr(e, "__notes__", [])
        self._say("\n".join([f"error: {e}", *notes]) if code == faults.MISTAKE else told)
        self._exit(code)

    def _tell(self, code: int, why: str) -> None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service is gone: so the others know
            self._set(f"news/failed/{self.process}", {"code": code, "why": why})

    def _say(self, text: str) -> None:
        self._write(text, console=True)

    def _write(self, text: str, console: bool) -> None:
        show_cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""  # the bar hides it
        for file in self.files if console else self.files[-1:]:
            print((show_cursor if file is sys.stderr else "") + text.rstrip(), file=file, flush=True)

    def _exit(self, code: int) -> None:
        for stream in (sys.stdout, sys.stderr, self._log):
            if stream is not None:
                stream.flush()
        os._exit(code)

    # --- the threads --------------------------------------------------------------------------------------------------

    def _call_the_roll(self) -> None:
        everybody, reached = list(range(self.processes)), time.monotonic()
        while not self._leaving.wait(POLL):
            try:
                there = self._client.get_live_nodes(everybody)
            except jax.errors.JaxRuntimeError as e:
                if time.monotonic() - reached > self.limit:
                    self._lost(f"process {self.process} does not reach the coordination service any more: {e}")
                continue
            reached = time.monotonic()
            if lost := [p for p in everybody if p not in there]:
                which = f"process {lost[0]} gives" if len(lost) == 1 else f"processes {', '.join(map(str, lost))} give"
                self._lost(f"{which} no sign of life (--peer-timeout {self.limit:g}): killed, stopped, or cut off")

    def _watch(self) -> None:
        pause = 0.0
        while not self._done.wait(pause):
            pause = POLL
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # the roll call says whether that lasts
                if self.stop:
                    self._set("news/stop", {"process": self.process, "signal": self.stop.signal.name})
                pause = self._news()

    def _news(self) -> float:
        """Acts on what there is; seconds until the next look."""
        prefix = f"{ROOT}/news/"
        news = {k.partition(prefix)[2]: json.loads(v) for k, v in self._client.key_value_dir_get(prefix)}
        for name, of in news.items():
            kind, _, number = name.partition("/")
            if kind == "failed" and int(number) != self.process:
                self._other_failed(int(number), of)
        if "stop" in news and self._stop_after is None:
            self.stopped_by = f"process {news['stop']['process']} got {news['stop']['signal']}"
            return self._agree()
        return POLL

    def _agree(self) -> float:
        if not self._agreeing:
            self._turn.acquire()
            self._agreeing = True
            self._set(f"asked/{self.process}", self._asked)
        asked = self._client.key_value_dir_get(f"{ROOT}/asked/")
        if len(asked) < self.processes:
            return 0.05
        self._stop_after = max(int(v) for _, v in asked)
        self._turn.release()
        return POLL

    def _other_failed(self, number: int, of: dict) -> None:
        """If this process fails of the same cause, that is told by its main thread."""
        until = time.monotonic() + TOGETHER
        while time.monotonic() < until and self._failure is None:
            time.sleep(0.1)
        if self._failure != "told":
            self._say(f"process {number} ends with code {of['code']}: {of['why']} (its log: logs/{number}.log)")
            if of["code"] == faults.STUCK:
                faults.stacks(*self.files)
            self._exit(of["code"])

    def _lost(self, why: str) -> None:
        if self._leaving.is_set():
            return
        self._say(
            f"{why}. The run ends with code {faults.REQUEUE}: started again with the same command, it goes on from "
            "the step that was saved last. Where this process was:"
        )
        faults.stacks(*self.files)
        self._exit(faults.REQUEUE)

    def _set(self, key: str, value) -> None:
        self._client.key_value_set(f"{ROOT}/{key}", json.dumps(value), allow_overwrite=True)


def _collective(e: BaseException | None) -> bool:
    """Whether an exception comes from JAX's run time, or was caused by one that does: in a collective or a meeting,
    the error of one process is felt by all."""
    while e is not None:
        if isinstance(e, jax.errors.JaxRuntimeError):
            return "RESOURCE_EXHAUSTED" not in str(e)
        e = e.__cause__ or e.__context__
    return False
