"""Many items through a pool, in order, past those that end their worker."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from input_pipeline.parallel.workers import Pool, WorkerError

MAX_DEATHS = 20


@dataclasses.dataclass
class _Chunk:
    items: list
    what: str
    dead: dict[int, str] = dataclasses.field(default_factory=dict)  # which items ended their worker, and how
    future: Future | None = None

    @property
    def alive(self) -> list:
        return [item for i, item in enumerate(self.items) if i not in self.dead]


class Team:
    """A pool that is replaced when a worker dies or hangs.

    Args:
      make, workers, timeout: of the pool.
      said: is told of each worker that ended.
    """

    def __init__(self, make: Callable, workers: int, timeout: float, said: Callable[[str], None] = lambda _: None):
        self._arguments, self._said = (make, workers, timeout), said
        self.workers, self.deaths = workers, []
        self.pool = Pool(*self._arguments)

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *_) -> None:
        self.pool.close()

    def call(self, what: str, function: Callable, *args):
        """function(state, *args) in a worker."""
        return self.pool.submit(what, function, *args).result()

    def map(
        self,
        function: Callable,
        items: Sequence,
        size: int,
        *args,
        label: Callable[[Any], str],
        failed: Callable[[Any, str], Any],
    ) -> Iterator[tuple[list, list]]:
        """Chunks of items and their results, in order.

        Args:
          function: function(state, items, *args) -> a result for each; says `workers.at(label(item))` before each.
          size: items of a chunk.
          failed: the result of an item that ended its worker, from the item and the reason.
        Raises:
          WorkerError: more than MAX_DEATHS workers ended, or one that was at no item.
          Exception: what `function` raised.
        """
        waiting: collections.deque[_Chunk] = collections.deque()
        at, most = 0, 2 * max(self.workers, 1)
        while at < len(items) or waiting:
            while at < len(items) and len(waiting) < most:
                waiting.append(_Chunk(list(items[at : at + size]), f"items {at + 1} to {min(at + size, len(items))}"))
                at += size
                self._submit(waiting[-1], function, args)
            chunk = waiting[0]
            try:
                results = iter(chunk.future.result())
            except WorkerError:
                self._bury(waiting, label)
                for again in waiting:
                    if again.future is None:
                        self._submit(again, function, args)
                continue
            waiting.popleft()
            yield (
                chunk.items,
                [
                    failed(item, chunk.dead[i]) if i in chunk.dead else next(results)
                    for i, item in enumerate(chunk.items)
                ],
            )

    def _submit(self, chunk: _Chunk, function: Callable, args: tuple) -> None:
        if chunk.alive:
            chunk.future = self.pool.submit(chunk.what, function, chunk.alive, *args)
        else:
            chunk.future = Future()
            chunk.future.set_result([])

    def _bury(self, waiting: Sequence[_Chunk], label: Callable[[Any], str]) -> None:
        """Marks what the dead workers were at, takes chunks without a result back, and starts a new pool."""
        for chunk in waiting:
            error = chunk.future.exception()  # every one ends: the workers alive finish theirs, the others do not begin
            if not isinstance(error, WorkerError):
                continue
            chunk.future = None
            if error.task != chunk.what:
                continue
            self.deaths.append(str(error))
            at = [i for i, item in enumerate(chunk.items) if i not in chunk.dead and label(item) == error.place]
            if not at or len(self.deaths) > MAX_DEATHS:
                if at:
                    error.add_note(f"more than {MAX_DEATHS} items ended their worker: is memory short?")
                raise error
            self._said(str(error))
            how = "hung" if "no word" in str(error) else "was ended (a crash of a decoder, or memory was short)"
            chunk.dead[at[0]] = f"the process that read it {how}"
        self.pool.close()
        self.pool = Pool(*self._arguments)


def nothing() -> None:
    """The state of workers that need none."""
