"""Rows of tables on disk instead of in memory, and which of them are equal."""

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

BLOCK = 1 << 20  # bytes written, and read in turn, at once


class Store(Sequence):
    """Values, pickled into a file without a name in TMPDIR, which goes with the last process that reads it.

    In memory are 8 bytes a value (16 after `select`). Every access makes the value anew. Threads and forked processes
    may read at once: no position is shared.

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
        places = np.frombuffer(ends, np.int64)
        self._starts, self._ends = places[:-1], places[1:]

    def _write(self, block: bytearray) -> None:
        data = bytes(block)
        while data:
            try:
                data = data[self._file.write(data) :]
            except OSError as error:
                reason = f"{error.strerror}: rows of tables are kept in this directory, TMPDIR names another"
                raise OSError(error.errno, reason, tempfile.gettempdir()) from error

    def select(self, kept: list[int] | np.ndarray) -> Store:
        """Some of the values, of the same file. `kept` is ascending indices, or a bool for each value."""
        chosen = copy.copy(self)
        chosen._whole = self  # which closes the file
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
    """16 bytes that no other text has."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def first_equal(digests: bytes | bytearray) -> np.ndarray:
    """int64[n]: for each of n digests, one behind the other, the index of the first that is equal to it."""
    # numpy takes zeros at the end for padding: bytes of one length that differ still do.
    _, first, group = np.unique(np.frombuffer(digests, "S16"), return_index=True, return_inverse=True)
    return first[group]
