"""What is known of scans from before: the last index in a directory, and what a run that was ended had finished.

scans.parquet   of the last complete run; its metadata has what its records are
.progress       JSON Lines, appended and flushed while scans are read:
                  {"version": 1}                  how to read the rest
                  {"shard": 3, "length": 64}      a shard of the records that is complete
                  ["/data", "ct.nii.gz", ...]     checking.ScanCheck
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from input_pipeline.index import database
from input_pipeline.index.checks import Key, ScanCheck
from input_pipeline.parallel import chunk_files

VERSION = 1  # raise it when scans are read or converted otherwise than before
METADATA = b"prepare"
OURS = frozenset(
    "index.json scans.parquet rows.parquet quarantine.jsonl cut.jsonl duplicates.jsonl leaks.jsonl summary.txt "
    "summary.json summary.png records parts .progress .lock".split()
)


@contextlib.contextmanager
def held(directory: Path) -> Iterator[None]:
    """Makes the directory and keeps other writers out of it; the operating system ends that with the process.

    Raises:
      ValueError: another process writes to it, or something else lies there.
    """
    chunk_files.make_directory(directory)
    foreign = sorted(f.name for f in directory.iterdir() if f.name.removesuffix(".partial") not in OURS)
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise ValueError(f"{directory} holds what is no index ({shown}): choose a directory of its own for --out")
    with chunk_files.held(directory, "prepare"):
        yield


class Journal:
    """Facts of scans, as far as they are known, and the lengths of the records' shards.

    `known` of the database has the facts that need not be found again while their stamp holds.

    Attributes:
      shards: lengths of the complete shards.
      settings: what the records are (`data.storage` and the sizes); None where there are none.
    """

    def __init__(self, directory: Path, db: sqlite3.Connection):
        self.file, self.db = directory / ".progress", db
        self.shards: list[int] = []
        self.settings: dict | None = None
        self._read_last(directory / "scans.parquet")
        self._read_progress()
        self._opened = None

    def _read_last(self, file: Path) -> None:
        if not file.is_file():
            return
        with pq.ParquetFile(file) as table:
            last = json.loads((table.schema_arrow.metadata or {}).get(METADATA, b"{}"))
            if last.get("version") != VERSION:
                return
            self.shards, self.settings = list(last["shards"]), last["records"]
            for batch in table.iter_batches(4096, columns=list(ScanCheck._fields), use_threads=False):
                columns = [batch[name].to_pylist() for name in ScanCheck._fields]
                # A bad one is looked at again: it is a new decoder, perhaps, that this run is about.
                self._know(f for f in itertools.starmap(ScanCheck, zip(*columns, strict=True)) if not f.fault)

    def _read_progress(self) -> None:
        if not self.file.is_file():
            return
        whole = 0
        with open(self.file, "rb") as lines:
            for number, line in enumerate(lines):
                try:
                    value = json.loads(line) if line.endswith(b"\n") else None
                    if value is None or (number == 0 and value["version"] != VERSION):
                        break
                    if isinstance(value, dict) and "shard" in value:
                        del self.shards[value["shard"] :]
                        self.shards.append(value["length"])
                    elif isinstance(value, dict):
                        self.settings = value.get("records", self.settings)
                    else:
                        self._know([ScanCheck(*value)])
                except (ValueError, TypeError, LookupError, sqlite3.Error):
                    break
                whole += len(line)
        os.truncate(self.file, whole)  # a kill in the middle of a line: what follows would be glued to it

    def _know(self, facts: Iterable[ScanCheck]) -> None:
        self.db.executemany(
            f"INSERT OR REPLACE INTO known VALUES ({database.marks(len(ScanCheck._fields))})",
            (database.values(f) for f in facts if f.stamp),
        )

    def known(self, key: Key) -> ScanCheck:
        """What is known of this scan, which must be."""
        same = " AND ".join(f"{column} = ?" for column in database.KEY)
        return database.scan_facts(self.db.execute(f"SELECT {database.SCAN} FROM known WHERE {same}", key).fetchone())

    def start(self, settings: dict | None) -> None:
        """Opens the file to append to."""
        self.settings = settings
        empty = not self.file.is_file() or not self.file.stat().st_size
        self._opened = open(self.file, "a", encoding="utf-8")
        if empty:
            self._write({"version": VERSION})
        if settings is not None:
            self._write({"records": settings})

    def append(self, facts: Sequence[ScanCheck], shards: Sequence[int] = ()) -> None:
        """Notes what is finished; `shards` are all that are complete now."""
        values: list = [{"shard": n, "length": shards[n]} for n in range(len(self.shards), len(shards))]
        self.shards += shards[len(self.shards) :]
        self._write(*values, *facts)

    def _write(self, *values) -> None:
        try:
            self._opened.write("".join(json.dumps(value, separators=(",", ":")) + "\n" for value in values))
            self._opened.flush()
        except OSError as error:  # which does not say where the disk is full
            raise OSError(error.errno, error.strerror, str(self.file)) from error

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def metadata(self) -> dict[bytes, bytes]:
        """For the schema of scans.parquet."""
        last = {"version": VERSION, "records": self.settings, "shards": self.shards}
        return {METADATA: json.dumps(last).encode()}

    def forget(self, directory: Path) -> None:
        """As if nothing had ever been read."""
        for name in ("index.json", ".progress", "scans.parquet"):
            (directory / name).unlink(missing_ok=True)
        self.db.execute("DELETE FROM known")
        self.shards, self.settings = [], None
