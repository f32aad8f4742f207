"""Store the values of table rows on disk instead of in memory, and find equal ones."""

from __future__ import annotations

import copy
import hashlib
import os
import pickle
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

BLOCK = 1 << 20  # bytes per write, and per read while iterating


class Store(Sequence):
    """A sequence of values pickled into an unnamed file in TMPDIR, which exists as long as a process reads it.

    It takes 8 bytes of memory per value (16 after `select`). Every access unpickles the value again. Threads and forked
    processes may read at the same time, as they share no file position.

    Raises:
      OSError: the file cannot be written; its `filename` is the directory.
    """

    def __init__(self, values: Iterable):
        self._file = tempfile.TemporaryFile(buffering=0)
        weakref.finalize(self, self._file.close)
        ends, block = array("q", [0]), bytearray()
        for value in values:
            data = pickle.dumps(value, 5)
            ends.append(ends[-1] + len(data))
            block += data
            if len(block) >= BLOCK:
                self._write(block)
                block.clear()
        self._write(block)
        offsets = np.frombuffer(ends, np.int64)
        self._starts, self._ends = offsets[:-1], offsets[1:]

    def _write(self, block: bytearray) -> None:
        data = bytes(block)
        while data:
            try:
                data = data[self._file.write(data) :]
            except OSError as error:
                reason = f"{error.strerror}: rows of tables are stored in this directory; set TMPDIR to use another"
                raise OSError(error.errno, reason, tempfile.gettempdir()) from error

    def select(self, kept: list[int] | np.ndarray) -> Store:
        """Return a store of some of the values. `kept` is ascending indices, or a bool for each value."""
        chosen = copy.copy(self)
        chosen._owner = self  # keeps the file open
        chosen._starts, chosen._ends = self._starts[kept], self._ends[kept]
        return chosen

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, i: int):
        return pickle.loads(self._read(int(self._starts[i]), int(self._ends[i])))

    def __iter__(self) -> Iterator:
        first = 0
        while first < len(self):
            start = int(self._starts[first])
            last = max(first + 1, int(np.searchsorted(self._ends, start + BLOCK, "right")))
            ends = self._ends[first:last] - start
            block = memoryview(self._read(start, start + int(ends[-1])))
            for begin, end in zip((self._starts[first:last] - start).tolist(), ends.tolist(), strict=True):
                yield pickle.loads(block[begin:end])
            first = last

    def _read(self, start: int, end: int) -> bytes:
        return os.pread(self._file.fileno(), end - start, start)


def digest(text: str) -> bytes:
    """Return the 128-bit BLAKE2 digest of a text."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def first_equal(digests: bytes | bytearray) -> np.ndarray:
    """Return, for each of n concatenated digests, the index of the first equal one, int64[n]."""
    # numpy treats trailing zeros as padding. All digests have one length, so different ones stay different.
    _, first, group = np.unique(np.frombuffer(digests, "S16"), return_index=True, return_inverse=True)
    return first[group]
