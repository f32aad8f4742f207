"""From a config to an index directory: tables, scans, rows, reports."""

from __future__ import annotations

import bisect
import collections
import contextlib
import functools
import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from input_pipeline.config import DataConfig
from input_pipeline.index import beam_scans, checks, database, findings, index, summary, writing
from input_pipeline.index.checks import Conversion, Key, Problem, RowCheck, ScanCheck
from input_pipeline.index.findings import Findings
from input_pipeline.index.journal import Journal, held
from input_pipeline.parallel import beam, chunk_files
from input_pipeline.parallel.team import Team
from input_pipeline.parallel.workers import WorkerError
from input_pipeline.sources import tokenizer_of

ROW_CHUNK = 128

# (what is done, how many in all) -> a function that is told how many more are done, and the count of bad ones
Progress = Callable[[str, str, int | None], Callable[[int, int], None]]


class Refused(Exception):
    """Everything was read and the reports are written, but not index.json, for these reasons."""

    def __init__(self, reasons: list[str], report: dict):
        self.reasons, self.report = reasons, report
        super().__init__("; ".join(reasons))


def prepare(
    config: DataConfig,
    directory: Path | str,
    *,
    records: bool = False,
    workers: int | None = None,
    runner: str = beam.LOCAL,
    runner_options: Sequence[str] = (),
    recheck: bool = False,
    strict: bool = False,
    allow_leaks: bool = False,
    progress: Progress = lambda *_: lambda *_: None,
    said: Callable[[str], None] = lambda _: None,
) -> dict:
    """Reads everything that `config.train` and `config.test` name and writes the index.

    A run that is ended in the middle goes on where it was; scans whose files have not changed are not read again.
    The result does not depend on `workers` and `runner`, nor on how often the run was ended, except for where shards of
    records end.

    Args:
      records: write the volumes at their final size as well.
      workers: processes; None: the cores this process may use; 0: none beside this one.
      runner, runner_options: what reads the scans: `local`, or Apache Beam's (beam.py). Tables are always read here.
      recheck: read everything again, as if the directory were empty.
      strict: refuse anything in quarantine. allow_leaks: do not refuse leaks.
      progress, said: see `Progress`; told of workers that ended.
    Returns:
      The summary (summary.json).
    Raises:
      Refused: a leak between the splits, or with `strict` anything in quarantine.
      ValueError: a table or tokenizer that cannot be read, a directory that is not ours or in use.
      WorkerError: too many files end the process that reads them.
    """
    directory, started = Path(directory).absolute(), time.monotonic()
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if not config.sources():
        raise ValueError("data.train and data.test name no source")
    if records and config.preprocess == "released":
        raise ValueError("--records holds volumes of data.preprocess='paper'; 'released' reads the scans' files")
    tokenizer = tokenizer_of(config)
    checksums = _checksums(config)
    with held(directory), database.opened() as db:
        journal = Journal(directory, db)
        settings = _record_settings(config) if records else None
        _prepare_records(directory, journal, settings, recheck)
        if recheck:
            journal.forget(directory)
            chunk_files.clean(directory)
        team = functools.partial(_team, config, workers, said)
        done = progress("opening the tables", "tables", None)
        with team(functools.partial(checks.open_tables, config.to_dict())) as tables:
            found = Findings(config, tables.call("the tables", checks.describe), checksums, db)
            rows = _Rows(found)
            done(len(found.tables), 0)
            _list_scans(found, rows, tables, progress)
            journal.start(settings)
            try:
                with contextlib.ExitStack() as stack:
                    if runner == beam.LOCAL:
                        readers = stack.enter_context(team(checks.nothing))
                    else:
                        readers = beam_scans.Readers(directory, config.worker_timeout, runner, runner_options, said)
                    reading = _Reading(found, journal, directory, settings, readers)
                    reading.run(progress)
            finally:
                journal.close()
            chunk_files.clean(directory)
            if colour := found.count("facts WHERE fault = '' AND channels > ?", config.channels):
                said(f"data.channels is {config.channels}, but {colour:,} scans are in colour: training will want it 3")
            _encode(found, rows, tables, progress)
        if _checksums(config) != checksums:
            raise ValueError("a table was changed while it was read: run again")
        report = summary.report(found)
        report["reading"] = {
            "seconds": round(time.monotonic() - started, 1),
            "workers": workers,
            "runner": runner,
            "scans_read": reading.read,
            "scans_unchanged": found.count("facts") - reading.read,
            "workers_ended": len(readers.deaths) + len(tables.deaths),
        }
        return _commit(found, journal, directory, tokenizer.fingerprint, report, strict, allow_leaks)


def _team(config: DataConfig, workers: int, said, make) -> Team:
    return Team(make, workers, config.worker_timeout, said)


def _checksums(config: DataConfig) -> dict[str, str]:
    checksums = {}
    for name, fields in config.sources().items():
        missing = [key for key in ("root", "table") if not fields.get(key)]
        if missing:
            raise ValueError(f"source {name} needs {' and '.join(missing)}")
        table = Path(fields["root"]).absolute() / fields["table"]
        try:
            checksums[name] = index.table_checksum(table)
        except OSError as error:
            raise ValueError(f"source {name}: {table} cannot be read: {error.strerror}") from error
    return checksums


# --- records ----------------------------------------------------------------------------------------------------------


def _record_settings(config: DataConfig) -> dict:
    return {
        "storage": config.storage, "size_2d": config.size_2d, "size_3d": config.size_3d, "depth": config.depth
    }  # fmt: skip


def _prepare_records(directory: Path, journal: Journal, settings: dict | None, recheck: bool) -> None:
    """Refuses to mix records of two kinds; makes room for new ones."""
    place = directory / "records"
    if recheck or not journal.shards:
        if place.exists() and (recheck or settings is not None):
            # The index speaks of what is deleted here.
            (directory / "index.json").unlink(missing_ok=True)
            shutil.rmtree(place)
        return
    # Imported late: TFDS takes half a second, and most runs write no records.
    from input_pipeline.index.records import shard_name

    missing = [name for name in map(shard_name, range(len(journal.shards))) if not (place / name).is_file()]
    if missing:
        raise ValueError(
            f"{place} lacks {', '.join(missing[:5])}: put them back, or write all records anew (--recheck)"
        )
    if settings is None:
        raise ValueError(
            f"{place} holds records, which this run would leave behind the index: add --records, or --recheck to "
            "start anew without them"
        )
    if journal.settings != settings:
        changed = [f"data.{k} is {v}, was {journal.settings.get(k)}" for k, v in settings.items()]
        changed = [text for text, (k, v) in zip(changed, settings.items(), strict=True) if journal.settings.get(k) != v]
        raise ValueError(
            f"{place} holds records of another kind ({'; '.join(changed)}): add --recheck, or change --out"
        )


# --- scans ------------------------------------------------------------------------------------------------------------


class _Rows(Sequence):
    """(source, row) of every row of every table, made when they are asked for."""

    def __init__(self, found: Findings):
        self.names = found.names
        self.ends = list(itertools.accumulate(table.rows for table in found.tables.values()))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, k):
        if isinstance(k, slice):
            return [self[i] for i in range(*k.indices(len(self)))]
        source = bisect.bisect_right(self.ends, k)
        return self.names[source], k - (self.ends[source - 1] if source else 0)


def _list_scans(found: Findings, rows: _Rows, tables: Team, progress: Progress) -> None:
    done = progress("looking through the rows", "rows", len(rows))
    chunks = tables.map(
        checks.list_scans,
        rows,
        8 * ROW_CHUNK,
        label=lambda row: checks.row_label(*row),
        failed=lambda row, reason: (),  # `encode_rows` meets it again, and keeps the reason
    )
    for items, results in chunks:
        found.list_scans(items, results)
        done(len(items), 0)


class _Scans(Sequence):
    """(key, stamp) of every scan: what the files of those that need not be read again were like, "" for the others.

    Args:
      recorded: those without a record have to be read again, as records are to be made.
    """

    def __init__(self, found: Findings, recorded: bool):
        self.db, self.length = found.db, found.count("keys")
        columns = ", ".join(database.KEY)
        usable = "(fault != '' OR record >= 0)" if recorded else "TRUE"
        self.select = (
            f"SELECT {columns}, COALESCE(stamp, '') FROM keys LEFT JOIN (SELECT {columns}, stamp FROM known "
            f"WHERE {usable}) USING ({columns}) WHERE scan > ? AND scan <= ? ORDER BY scan"
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, k):
        if not isinstance(k, slice):
            return self[k : k + 1][0]
        low, high, _ = k.indices(self.length)
        return [(tuple(key), stamp) for *key, stamp in self.db.execute(self.select, (low, high))]

    def __iter__(self):
        for at in range(0, self.length, ROW_CHUNK):
            yield from self[at : at + ROW_CHUNK]


class _Reading:
    """Reads what is not known yet, and writes down what it finds as it goes.

    Attributes:
      read: scans that were read (the others had not changed).
    """

    def __init__(self, found: Findings, journal: Journal, directory: Path, settings: dict | None, readers: Team):
        self.found, self.journal, self.readers = found, journal, readers
        self.conversion = Conversion(found.config.sizes, found.config.storage, settings is not None)
        self.read = 0
        self.finished: list[ScanCheck] = []  # not yet in the journal
        self.writer = None
        if settings is not None:
            from input_pipeline.index import records

            self.shard_bytes = records.SHARD_BYTES
            self.writer = records.Writer(directory / "records", journal.shards)
            found.db.execute(
                "INSERT OR REPLACE INTO records SELECT sha256, volume, window, record FROM known WHERE record >= 0"
            )

    def run(self, progress: Progress) -> None:
        known = _Scans(self.found, recorded=self.writer is not None)
        done = progress("reading the scans", "scans", len(known))
        chunks = self.readers.map(
            checks.check_scans,
            known,
            self.conversion.chunk,
            self.conversion,
            label=checks.item_label,
            failed=checks.ended,
        )
        try:
            for items, results in chunks:
                facts = [self._take(key, *result) for (key, _), result in zip(items, results, strict=True)]
                self.found.add_scans(facts)
                if self.writer is None or self.writer.size >= self.shard_bytes:
                    self._commit()
                done(len(items), sum(bool(f.fault) for f in facts))
        except (KeyboardInterrupt, WorkerError):
            self._commit()
            raise
        self._commit()
        if self.writer is not None:
            from input_pipeline.index import records

            described = "Scans at their final size, for training; written by input_pipeline.prepare."
            if self.writer.lengths:
                records.describe(self.writer.directory, self.writer.lengths, described)

    def _take(self, key: Key, facts: ScanCheck | None, record: bytes | None) -> ScanCheck:
        if facts is None:
            return self.journal.known(key)
        self.read += 1
        if record is not None:
            facts = facts._replace(record=self._number(facts, record))
        self.finished.append(facts)
        return facts

    def _number(self, facts: ScanCheck, record: bytes) -> int:
        """Where its record stands: the same bytes seen through the same window give the same volume."""
        db, content = self.found.db, (facts.sha256, facts.volume, facts.window)
        there = db.execute("SELECT record FROM records WHERE sha256 = ? AND volume = ? AND window = ?", content)
        if (number := there.fetchone()) is not None:
            return number[0]
        number = self.writer.add(record)
        db.execute("INSERT INTO records VALUES (?, ?, ?, ?)", (*content, number))
        return number

    def _commit(self) -> None:
        lengths = ()
        if self.writer is not None:
            self.writer.commit()
            lengths = self.writer.lengths
        self.journal.append(self.finished, lengths)
        self.finished = []


# --- rows -------------------------------------------------------------------------------------------------------------


def _encode(found: Findings, rows: _Rows, tables: Team, progress: Progress) -> None:
    done = progress("encoding the rows", "rows", len(rows))

    def failed(row: tuple[str, int], reason: str) -> RowCheck:
        name, number = row
        problem = Problem(found.tables[name].file, f"number {number}", reason, "remove the row")
        return RowCheck(problem.row, problem=problem)

    label = lambda row: checks.row_label(*row)  # noqa: E731
    for items, results in tables.map(checks.encode_rows, rows, ROW_CHUNK, label=label, failed=failed):
        found.add_rows(items, results)
        done(len(items), sum(facts.problem is not None for facts in results))


# --- the end ----------------------------------------------------------------------------------------------------------


def _commit(
    found: Findings, journal: Journal, directory: Path, tokenizer: str, report: dict, strict: bool, allow_leaks: bool
) -> dict:
    """Writes everything. index.json is deleted before anything it speaks of is replaced, and written last."""
    (directory / "index.json").unlink(missing_ok=True)
    scans = writing.write_scans(directory / "scans.parquet", found, journal.metadata())
    journal.file.unlink(missing_ok=True)
    rows = writing.write_rows(directory / "rows.parquet", found)
    bad = writing.write_lines(directory / "quarantine.jsonl", findings.quarantine(found))
    writing.write_lines(directory / "cut.jsonl", findings.cut(found))
    writing.write_lines(directory / "duplicates.jsonl", findings.duplicates(found))
    leaks = collections.Counter(study=0, scan=0)
    writing.write_lines(directory / "leaks.jsonl", _counted(findings.leaks(found), leaks))
    report["quarantine"] = bad
    report["leaks"] = dict(leaks)
    if journal.settings is not None:
        used = found.count("(SELECT DISTINCT record FROM facts WHERE record >= 0)")
        place = directory / "records"
        report["records"] = journal.settings | {
            "shards": len(journal.shards),
            "records": sum(journal.shards),
            "unused": sum(journal.shards) - used,
            "bytes": sum(f.stat().st_size for f in place.iterdir() if f.is_file()),
        }
    reasons = []
    if leaks.total() and not allow_leaks:
        counted = f"studies: {leaks['study']:,}, scans: {leaks['scan']:,}"
        reasons.append(f"train and test share some ({counted}), see {directory / 'leaks.jsonl'}")
    empty = [name for name, source in report["sources"].items() if not source["good"]]
    if empty:
        reasons.append(f"no row of {', '.join(empty)} can be used, see {directory / 'quarantine.jsonl'}")
    if bad and strict:
        reasons.append(f"--strict, and there is something in {directory / 'quarantine.jsonl'} (lines: {bad:,})")
    report["refused"] = reasons
    writing.write_text(directory / "summary.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    writing.write_text(directory / "summary.txt", summary.text(report))
    with writing.replacing(directory / "summary.png") as partial:
        # Imported late: matplotlib takes a second, which no worker needs to spend.
        from input_pipeline.index import summary_figure

        summary_figure.draw(report, partial)
    if reasons:
        raise Refused(reasons, report)
    counts = {key: report[key] for key in ("rows", "scans", "quarantine", "leaks")}
    good = {name: source["good"] for name, source in report["sources"].items()}
    described = writing.index_json(found, journal, scans, rows, good, tokenizer, counts)
    writing.write_text(
        directory / "index.json", json.dumps(described, indent=1, ensure_ascii=False, default=list) + "\n"
    )
    return report


def _counted(lines: Iterable[dict], kinds: collections.Counter) -> Iterator[dict]:
    for line in lines:
        kinds[line["kind"]] += 1
        yield line
