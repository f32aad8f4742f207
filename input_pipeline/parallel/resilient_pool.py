"""Ordered map over a process pool (workers.py) that skips items which kill or hang their worker."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from input_pipeline.parallel.workers import Pool, WorkerError

MAX_DEATHS = 20


@dataclasses.dataclass
class _Chunk:
    items: list
    task: str
    failed: dict[int, str] = dataclasses.field(default_factory=dict)  # item that ended its worker -> reason
    future: Future | None = None

    @property
    def remaining(self) -> list:
        return [item for i, item in enumerate(self.items) if i not in self.failed]


class ResilientPool(contextlib.AbstractContextManager):
    """A pool of workers that is restarted when one of them dies or hangs.

    Args:
      make, workers, timeout: as for `workers.Pool`.
      log: called with a message for each worker that died or hung; `deaths` has these messages.
    """

    def __init__(self, make: Callable, workers: int, timeout: float, log: Callable[[str], None] = lambda _: None):
        self._arguments, self._log = (make, workers, timeout), log
        self.workers, self.deaths = workers, []
        self.pool = Pool(*self._arguments)

    def __exit__(self, *_) -> None:
        self.pool.close()

    def call(self, task: str, function: Callable, *args):
        """Return function(state, *args), computed in a worker."""
        return self.pool.submit(task, function, *args).result()

    def map(
        self,
        function: Callable,
        items: Iterable,
        size: int,
        *args,
        label: Callable[[Any], str],
        failed: Callable[[Any, str], Any],
    ) -> Iterator[tuple[list, list]]:
        """Yield chunks of items and their results, in order.

        Args:
          function: function(state, items, *args) -> one result per item. It calls heartbeat(label(item)) before each.
          size: number of items per chunk.
          failed: failed(item, reason) -> the result of an item that killed or hung its worker.
        Raises:
          WorkerError: more than MAX_DEATHS workers died or hung, or a worker died or hung outside any item.
          Exception: the exception that `function` raised.
        """
        waiting: collections.deque[_Chunk] = collections.deque()
        items, submitted, window = iter(items), 0, 2 * max(self.workers, 1)
        while True:
            while len(waiting) < window and (chunk_items := list(itertools.islice(items, size))):
                name = f"items {submitted + 1} to {submitted + len(chunk_items)}"
                submitted += len(chunk_items)
                waiting.append(_Chunk(chunk_items, name))
                self._submit(waiting[-1], function, args)
            if not waiting:
                return
            chunk = waiting[0]
            try:
                results = iter(chunk.future.result())
            except WorkerError:
                self._restart(waiting, label)
                for unfinished in waiting:
                    if unfinished.future is None:
                        self._submit(unfinished, function, args)
                continue
            waiting.popleft()
            faults = ((item, chunk.failed.get(i)) for i, item in enumerate(chunk.items))
            yield chunk.items, [next(results) if why is None else failed(item, why) for item, why in faults]

    def _submit(self, chunk: _Chunk, function: Callable, args: tuple) -> None:
        if chunk.remaining:
            chunk.future = self.pool.submit(chunk.task, function, chunk.remaining, *args)
        else:
            chunk.future = Future()
            chunk.future.set_result([])

    def _restart(self, waiting: Sequence[_Chunk], label: Callable[[Any], str]) -> None:
        """Mark the items that ended their workers, reset unfinished chunks, and start a new pool."""
        for chunk in waiting:
            error = chunk.future.exception()  # every future ends: running tasks finish, the others get the error
            if not isinstance(error, WorkerError):
                continue
            chunk.future = None
            if error.task != chunk.task:
                continue
            self.deaths.append(str(error))
            matches = [i for i, item in enumerate(chunk.items) if i not in chunk.failed and label(item) == error.item]
            if not matches or len(self.deaths) > MAX_DEATHS:
                if matches:
                    error.add_note(f"more than {MAX_DEATHS} items ended their worker: check the free memory")
                raise error
            self._log(str(error))
            ending = "hung" if error.hung else "was ended (the decoder crashed, or memory ran out)"
            chunk.failed[matches[0]] = f"the process that read it {ending}"
        self.pool.close()
        self.pool = Pool(*self._arguments)


def no_state() -> None:
    """State factory for workers that need no state."""
