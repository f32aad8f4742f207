"""Reads the scans that earlier runs have not read, and writes their records."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from input_pipeline.index import database, scan_checks
from input_pipeline.index.index import changed_settings
from input_pipeline.index.results import Results
from input_pipeline.index.resume_state import ResumeState
from input_pipeline.index.scan_checks import Conversion, ScanCheck, ScanTask
from input_pipeline.parallel.resilient_pool import ResilientPool
from input_pipeline.parallel.workers import WorkerError


def check_records(directory: Path, state: ResumeState, settings: dict | None, recheck: bool) -> None:
    """Refuse to mix records with different settings. Delete records that will be replaced."""
    records = directory / "records"
    if recheck or not state.shards:
        if records.exists() and (recheck or settings is not None):
            (directory / "index.json").unlink(missing_ok=True)  # it refers to these records
            shutil.rmtree(records)
        return
    # Imported late: TFDS takes half a second to import, and most runs write no records.
    from input_pipeline.index.records import shard_name

    missing = [name for name in map(shard_name, range(len(state.shards))) if not (records / name).is_file()]
    if missing:
        lost = ", ".join(missing[:5])
        raise ValueError(f"{records} lacks {lost}: restore the files, or rewrite all records with --recheck")
    if settings is None:
        raise ValueError(
            f"{records} contains records, which would no longer match the index: add --records, or --recheck to start "
            "again without them"
        )
    if changed := changed_settings(state.settings, settings):
        raise ValueError(f"{records} has other settings ({changed}): add --recheck, or change --out")


def scan_tasks(results: Results, need_records: bool) -> Iterator[ScanTask]:
    """Yield (key, stamp) of every scan, in order. The stamp is "" for a scan that must be read.

    With `need_records`, good scans without a record must be read too.
    """
    columns = ", ".join(database.KEY)
    usable = "(fault != '' OR record >= 0)" if need_records else "TRUE"
    lines = results.db.execute(
        f"SELECT {columns}, COALESCE(stamp, '') FROM keys LEFT JOIN (SELECT {columns}, stamp FROM known "
        f"WHERE {usable}) USING ({columns}) ORDER BY scan"
    )
    for *key, stamp in lines:
        yield tuple(key), stamp


class ScanReader:
    """Reads new and changed scans, and saves the checks and the records as it proceeds.

    Args:
      settings: settings of the records; None writes no records.
      pool: a pool of `scan_checks` workers, or beam_scans.BeamScanPool.
    """

    def __init__(
        self, results: Results, state: ResumeState, directory: Path, settings: dict | None, pool: ResilientPool
    ):
        self.results, self.state, self.pool = results, state, pool
        config = results.config
        self.conversion = Conversion(config.sizes, config.storage, settings is not None, config.fit)
        self.read = 0  # scans that were read; the others had not changed
        self.unsaved: list[ScanCheck] = []
        self.writer = None
        if settings is not None:
            from input_pipeline.index import records

            self.shard_bytes = records.SHARD_BYTES
            self.writer = records.Writer(directory / "records", state.shards)
            self._add_missing_digests()
            results.db.execute(
                "INSERT OR REPLACE INTO records SELECT sha256, volume, window, series, record, record_digest "
                "FROM known WHERE record >= 0"
            )

    def _add_missing_digests(self) -> None:
        """Compute the digests of records that an older version wrote without them."""
        db = self.results.db
        missing = "FROM known WHERE record >= 0 AND record_digest = 0"
        if not self.results.count(missing.removeprefix("FROM ")):
            return
        from input_pipeline.index import records

        stored = records.Records(self.writer.directory, self.writer.lengths)
        numbers = db.execute(f"SELECT DISTINCT record {missing} ORDER BY record").fetchall()
        db.execute("CREATE TABLE digests (record INTEGER PRIMARY KEY, digest)")
        db.executemany("INSERT INTO digests VALUES (?, ?)", ((n, stored.digest(n)) for (n,) in numbers))
        db.execute(
            "UPDATE known SET record_digest = (SELECT digest FROM digests WHERE digests.record = known.record) "
            "WHERE record >= 0 AND record_digest = 0"
        )

    def run(self, progress) -> None:
        """Read all scans. `progress` is a `prepare.Progress`."""
        advance = progress("reading the scans", "scans", self.results.count("keys"))
        tasks = scan_tasks(self.results, need_records=self.writer is not None)
        try:
            for chunk, returned in scan_checks.map_checks(self.pool, tasks, self.conversion):
                checks = [self._accept(task, *result) for task, result in zip(chunk, returned, strict=True)]
                self.results.add_scans(checks)
                if self.writer is None or self.writer.size >= self.shard_bytes:
                    self._save()
                advance(len(chunk), sum(bool(check.fault) for check in checks))
        except (KeyboardInterrupt, WorkerError):
            self._save()
            raise
        self._save()
        if self.writer is not None and self.writer.lengths:
            from input_pipeline.index import records

            description = "Scans at their final size, for training; written by input_pipeline.prepare."
            records.write_description(self.writer.directory, self.writer.lengths, description)

    def _accept(self, task: ScanTask, check: ScanCheck | None, record: bytes | None) -> ScanCheck:
        if check is None:
            return self.state.known(task[0])
        self.read += 1
        if record is not None:
            number, digest = self._record_number(check, record)
            check = check._replace(record=number, record_digest=digest)
        self.unsaved.append(check)
        return check

    def _record_number(self, check: ScanCheck, record: bytes) -> tuple[int, int]:
        """Return the record's number and digest. The same volume, window and series of equal bytes share a record."""
        db, content = self.results.db, (check.sha256, check.volume, check.window, check.series)
        existing = db.execute(
            "SELECT record, digest FROM records WHERE sha256 = ? AND volume = ? AND window = ? AND series = ?", content
        )
        if (number := existing.fetchone()) is not None:
            return number
        number = self.writer.add(record), check.record_digest
        db.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?)", (*content, *number))
        return number

    def _save(self) -> None:
        if self.writer is not None:
            self.writer.commit()
        self.state.append(self.unsaved, () if self.writer is None else self.writer.lengths)
        self.unsaved = []
