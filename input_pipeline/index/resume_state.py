"""State saved by earlier runs of `prepare`: the checks of scans, and the finished shards of the records.

scans.parquet   from the last complete run; its metadata describes the records
.progress       JSON Lines, appended while scans are read:
                  {"version": 2}                  format of the file
                  {"records": {...}}              settings of the records
                  {"shard": 3, "length": 64}      a complete shard
                  ["/data", "ct.nii.gz", ...]     a scan_checks.ScanCheck
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from input_pipeline.files import parse_json
from input_pipeline.index import database, index
from input_pipeline.index.scan_checks import Key, ScanCheck

VERSION = 2  # increase it when scans are read or converted differently
METADATA = b"prepare"


class ResumeState:
    """Checks of scans from earlier runs (table `known` of the database), and the shards of the records.

    Without `read`, earlier runs are ignored. Raises ValueError if scans.parquet is damaged.
    """

    def __init__(self, directory: Path, db: sqlite3.Connection, *, read: bool = True):
        self.file, self.db = directory / ".progress", db
        self.shards: list[int] = []  # number of records in each complete shard
        self.settings: dict | None = None  # `data.storage` and the sizes of the records; None without records
        self._opened = None
        if read:
            self._read_last_index(directory / "scans.parquet")
            self._read_progress()

    def _read_last_index(self, file: Path) -> None:
        if not file.is_file():
            return
        try:
            description = index.read_description(file.parent)
        except ValueError:  # missing, or damaged: this run replaces it, and the table has checksums of its own
            description = {}
        try:
            index.verify(file.parent, description, [file.name])
            self._read_checks(file)
        except (OSError, ValueError) as error:
            raise ValueError(f"{error}; to read all scans again, add --recheck") from None

    def _read_checks(self, file: Path) -> None:
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            last = parse_json((table.schema_arrow.metadata or {}).get(METADATA, b"{}"))
            if last.get("version") != VERSION:
                return
            self.shards, self.settings = list(last["shards"]), last["records"]
            fields = [name for name in ScanCheck._fields if name in table.schema_arrow.names]  # older tables lack some
            for batch in table.iter_batches(4096, columns=fields, use_threads=False):
                columns = [batch[name].to_pylist() for name in fields]
                # Bad scans are read again: a new decoder may be the reason for this run.
                checks = (ScanCheck(**dict(zip(fields, line, strict=True))) for line in zip(*columns, strict=True))
                self._add(check for check in checks if not check.fault)

    def _read_progress(self) -> None:
        if not self.file.is_file():
            return
        valid_bytes = 0
        with open(self.file, "rb") as lines:
            for number, line in enumerate(lines):
                try:
                    value = parse_json(line) if line.endswith(b"\n") else None
                    if value is None or (number == 0 and value["version"] != VERSION):
                        break
                    if isinstance(value, dict) and "shard" in value:
                        del self.shards[value["shard"] :]
                        self.shards.append(value["length"])
                    elif isinstance(value, dict):
                        self.settings = value.get("records", self.settings)
                    else:
                        self._add([ScanCheck(*value)])
                except (ValueError, TypeError, LookupError, sqlite3.Error):
                    break
                valid_bytes += len(line)
        os.truncate(self.file, valid_bytes)  # a killed run may leave half a line; new lines must not join it

    def _add(self, checks: Iterable[ScanCheck]) -> None:
        self.db.executemany(
            f"INSERT OR REPLACE INTO known VALUES ({database.placeholders(len(ScanCheck._fields))})",
            (database.to_columns(check) for check in checks if check.stamp),
        )

    def known(self, key: Key) -> ScanCheck:
        """Return the check of a known scan."""
        select = f"SELECT {database.SCAN} FROM known WHERE {database.SAME_KEY}"
        return database.from_columns(self.db.execute(select, key).fetchone())

    def start(self, settings: dict | None) -> None:
        """Open the progress file for `append`."""
        self.settings = settings
        empty = not self.file.is_file() or not self.file.stat().st_size
        self._opened = open(self.file, "a", encoding="utf-8")
        if empty:
            self._write({"version": VERSION})
        if settings is not None:
            self._write({"records": settings})

    def append(self, checks: Sequence[ScanCheck], shards: Sequence[int] = ()) -> None:
        """Save finished checks. `shards` are the lengths of all complete shards."""
        new = [{"shard": n, "length": shards[n]} for n in range(len(self.shards), len(shards))]
        self.shards += shards[len(self.shards) :]
        self._write(*new, *checks)

    def _write(self, *values) -> None:
        try:
            self._opened.write("".join(json.dumps(value, separators=(",", ":")) + "\n" for value in values))
            self._opened.flush()
        except OSError as error:  # a full disk does not name the file
            raise OSError(error.errno, error.strerror, str(self.file)) from error

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def metadata(self) -> dict[bytes, bytes]:
        """Return the metadata for the schema of scans.parquet."""
        return {METADATA: json.dumps({"version": VERSION, "records": self.settings, "shards": self.shards}).encode()}

    def reset(self) -> None:
        """Forget all earlier runs, and delete the index that refers to them."""
        for name in ("index.json", ".progress", "scans.parquet"):
            self.file.with_name(name).unlink(missing_ok=True)
        self.db.execute("DELETE FROM known")
        self.shards, self.settings = [], None
