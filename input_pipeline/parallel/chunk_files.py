"""Resumable work in chunks: each chunk of items has one part file, which is complete or absent.

    items      PMC1.tar.gz  PMC2.tar.gz | PMC3.tar.gz  PMC4.tar.gz | PMC5.tar.gz      parts/items.txt
    chunks     0                        | 1                        | 2
    parts      parts/00000000.jsonl       parts/00000001.jsonl       parts/00000002.jsonl

A part depends only on its chunk's items, so any process may write it, and a resumed run skips it. Memory use is
8 bytes per chunk. beam.py runs the same chunks on Apache Beam.
"""

from __future__ import annotations

import array
import functools
import hashlib
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from input_pipeline.files import PARTIAL, atomic_write

CHUNK = 64


class Items(Sequence):
    """The items of a job, one per line of a file. A slice is read from disk; pickling keeps only the path."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Items, (self.file,)

    @functools.cached_property
    def _index(self) -> tuple[array.array, int, str]:
        """The byte offset of each chunk, the number of items, and the SHA-256."""
        offsets, length, position, digest = array.array("Q"), 0, 0, hashlib.sha256()
        with open(self.file, "rb") as lines:
            for line in lines:
                if length % CHUNK == 0:
                    offsets.append(position)
                length += 1
                position += len(line)
                digest.update(line)
        return offsets, length, digest.hexdigest()

    @classmethod
    def write(cls, directory: Path, items: Iterable[str]) -> Items:
        """Write the items to parts/items.txt of a directory. The iterable may be larger than memory."""
        file = directory / "parts" / "items.txt"
        file.parent.mkdir(exist_ok=True)
        with (
            atomic_write(file, unique=True) as partial,
            open(partial, "w", encoding="utf-8", errors="surrogateescape") as out,
        ):
            for item in items:
                if "\n" in item:
                    raise ValueError(f"{item!r}: a name must not contain a line break; rename the file")
                out.write(item + "\n")
        return cls(file)

    @property
    def chunks(self) -> int:
        return len(self._index[0])

    @property
    def checksum(self) -> str:
        return self._index[2]

    def chunk(self, number: int) -> list[str]:
        return self[number * CHUNK : (number + 1) * CHUNK]

    def __len__(self) -> int:
        return self._index[1]

    def __getitem__(self, k):
        if isinstance(k, int):
            if not 0 <= k < len(self):
                raise IndexError(k)
            return self[k : k + 1][0]
        low, high, step = k.indices(len(self))
        assert step == 1, step
        if low >= high:
            return []
        first = low // CHUNK
        with open(self.file, encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            lines.seek(self._index[0][first])
            for _ in range(low - first * CHUNK):
                lines.readline()
            return [lines.readline().rstrip("\n") for _ in range(high - low)]


def part_file(directory: Path, chunk: int, suffix: str = ".jsonl") -> Path:
    """Return the path of a chunk's part."""
    return directory / "parts" / f"{chunk:08d}{suffix}"


def write_part(directory: Path, chunk: int, lines: Iterable[str]) -> None:
    """Write a chunk's part atomically. The temporary name is unique: a runner may execute a chunk twice at once."""
    with atomic_write(part_file(directory, chunk), unique=True) as partial, open(partial, "w", encoding="utf-8") as out:
        out.writelines(line + "\n" for line in lines)


def remove_partial_files(directory: Path, folder: str = "parts") -> None:
    """Remove the incomplete files of killed workers from a subfolder, or from all subfolders that match a pattern."""
    for file in directory.glob(f"{folder}/*{PARTIAL}"):
        file.unlink()


def remove_parts(directory: Path) -> None:
    """Remove the parts, which only a resumed run needs."""
    shutil.rmtree(directory / "parts", ignore_errors=True)
