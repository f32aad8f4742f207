"""`prepare`: config -> tables -> scans -> rows -> reports -> index directory."""

from __future__ import annotations

import collections
import contextlib
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from input_pipeline.config import DataConfig
from input_pipeline.files import PARTIAL, atomic_write, locked_directory, write_json, write_json_lines, write_text
from input_pipeline.index import (
    beam_scans,
    database,
    index,
    index_writer,
    reports,
    row_checks,
    scan_checks,
    summary,
    unchanged,
)
from input_pipeline.index.results import Results
from input_pipeline.index.resume_state import ResumeState
from input_pipeline.index.row_checks import Problem, Row, RowCheck
from input_pipeline.index.scan_reader import ScanReader, check_records
from input_pipeline.parallel import beam, chunk_files
from input_pipeline.parallel.resilient_pool import ResilientPool
from input_pipeline.parallel.workers import available_cpus
from input_pipeline.sources import tokenizer_of

ROW_CHUNK = 128
FILES = frozenset(
    "index.json scans.parquet rows.parquet quarantine.jsonl notices.jsonl cut.jsonl duplicates.jsonl leaks.jsonl "
    "summary.txt summary.json summary.png records parts .progress .lock".split()
)

# progress(description, unit, total) -> advance(count, bad), as console.add_bar
Progress = Callable[[str, str, int | None], Callable[[int, int], None]]


class Refused(Exception):
    """All data was read and the reports were written, but index.json was not."""

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
    log: Callable[[str], None] = lambda _: None,
) -> dict:
    """Read all data that a config names, and write the index.

    An interrupted run resumes, and scans whose files have not changed are not read again. The result does not depend
    on `workers`, `runner` or interruptions, except for the boundaries between shards of records.

    Args:
      records: also write the volumes at their final size.
      workers: number of processes; None: all cores; 0: no other process.
      runner, runner_options: how scans are read: `local`, or a Beam runner (beam.py). Tables are always read locally.
      strict: do not write the index if anything is in quarantine.
      allow_leaks: write the index although two splits share studies or scans.
      progress: see `Progress`. log: called with each warning.
    Returns:
      The content of summary.json.
    Raises:
      Refused: two splits share data, a source has no good row, or `strict` and the quarantine is not empty.
      ValueError: a table or tokenizer cannot be read, or the directory is in use or has unrelated files.
      WorkerError: too many files kill or hang the process that reads them.
    """
    directory, start_time = Path(directory).absolute(), time.monotonic()
    workers = available_cpus() if workers is None else workers
    if records and config.preprocess == "released":
        raise ValueError("--records needs data.preprocess='paper' (got 'released'): remove --records")
    checksums = table_checksums(config)
    tokenizer = tokenizer_of(config)
    inputs = unchanged.inputs(
        config, checksums, tokenizer.fingerprint, records=records, strict=strict, allow_leaks=allow_leaks
    )
    with locked_index(directory), database.open_database() as db:
        if not recheck and (report := unchanged.unchanged_report(directory, inputs)) is not None:
            _warn_of_colour(config, unchanged.colour_scans(directory, config.channels), log)
            seconds, count = round(time.monotonic() - start_time, 1), report["scans"]["good"] + report["scans"]["bad"]
            return report | {"reading": _reading(seconds, 0, runner, 0, count, 0)}
        state = ResumeState(directory, db, read=not recheck)
        settings = index.record_settings(config) if records else None
        check_records(directory, state, settings, recheck)
        if recheck:
            state.reset()
            chunk_files.remove_parts(directory)
        new_pool = functools.partial(ResilientPool, workers=workers, timeout=config.worker_timeout, log=log)
        with new_pool(functools.partial(row_checks.Tables, config.to_dict())) as table_pool:
            advance = progress("opening the tables", "tables", None)
            results = Results(config, table_pool.call("the tables", row_checks.check_sources), checksums, db)
            advance(len(results.tables), 0)
            _list_scans(results, table_pool, progress)
            if runner == beam.LOCAL:
                scan_pool = new_pool(scan_checks.preload)
            else:
                scan_pool = beam_scans.BeamScanPool(directory, config.worker_timeout, runner, runner_options, log)
            reader = _read_scans(results, state, directory, settings, scan_pool, progress, log)
            _encode_rows(results, table_pool, progress)
        results.assign_study_groups()
        if table_checksums(config) != checksums:
            raise ValueError("a table changed while it was read: run again")
        seconds, unread = round(time.monotonic() - start_time, 1), results.count("facts") - reader.read
        deaths = len(scan_pool.deaths) + len(table_pool.deaths)
        report = summary.summarize(results) | {
            "reading": _reading(seconds, workers, runner, reader.read, unread, deaths)
        }
        made_from = {"tokenizer": tokenizer.fingerprint, "inputs": inputs}
        return _write_index(results, state, directory, made_from, report, strict, allow_leaks)


def _reading(seconds: float, workers: int, runner: str, read: int, unread: int, deaths: int) -> dict:
    return {
        "seconds": seconds, "workers": workers, "runner": runner, "scans_read": read, "scans_unchanged": unread,
        "workers_ended": deaths,
    }  # fmt: skip


@contextlib.contextmanager
def locked_index(directory: Path) -> Iterator[None]:
    """Create an index directory and lock it. Raises ValueError if it is locked, or has unrelated files."""
    if directory.is_dir():
        unrelated = sorted(f.name for f in directory.iterdir() if f.name.removesuffix(PARTIAL) not in FILES)
        if unrelated:
            names = ", ".join(unrelated[:5]) + (f" and {len(unrelated) - 5} more" if len(unrelated) > 5 else "")
            raise ValueError(f"{directory} has unrelated files ({names}): choose an empty directory for --out")
    with locked_directory(directory, "prepare"):
        yield


def table_checksums(config: DataConfig) -> dict[str, str]:
    """Return source -> checksum of its table. Raises ValueError if one cannot be read."""
    if not config.sources():
        raise ValueError("data.train, data.validation and data.test have no sources")
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


def _all_rows(results: Results) -> Iterator[Row]:
    return ((name, row) for name, table in results.tables.items() for row in range(table.rows))


def _list_scans(results: Results, pool: ResilientPool, progress: Progress) -> None:
    advance = progress("looking through the rows", "rows", results.row_count)
    chunks = pool.map(
        row_checks.list_scans,
        _all_rows(results),
        8 * ROW_CHUNK,
        label=row_checks.row_label,
        failed=lambda row, reason: (),  # `encode_rows` fails on the same row, and keeps the reason
    )
    for chunk, scans in chunks:
        results.add_mentions(chunk, scans)
        advance(len(chunk), 0)


def _read_scans(results, state: ResumeState, directory: Path, settings, pool, progress: Progress, log) -> ScanReader:
    with pool, contextlib.closing(state):
        state.start(settings)
        reader = ScanReader(results, state, directory, settings, pool)
        reader.run(progress)
    chunk_files.remove_parts(directory)
    colour = results.count("facts WHERE fault = '' AND channels > ?", results.config.channels)
    _warn_of_colour(results.config, colour, log)
    return reader


def _warn_of_colour(config: DataConfig, scans: int, log: Callable[[str], None]) -> None:
    if scans:
        log(f"data.channels is {config.channels}, but {scans:,} scans are in colour: set data.channels=3 for training")


def _encode_rows(results: Results, pool: ResilientPool, progress: Progress) -> None:
    advance = progress("encoding the rows", "rows", results.row_count)

    def failed(row: Row, reason: str) -> RowCheck:
        name, number = row
        problem = Problem(results.tables[name].file, f"number {number}", reason, "remove the row")
        return RowCheck(problem.row, problem=problem)

    for chunk, checks in pool.map(
        row_checks.encode_rows, _all_rows(results), ROW_CHUNK, label=row_checks.row_label, failed=failed
    ):
        results.add_rows(chunk, checks)
        advance(len(chunk), sum(check.problem is not None for check in checks))


def _write_index(
    results: Results,
    state: ResumeState,
    directory: Path,
    made_from: dict,
    report: dict,
    strict: bool,
    allow_leaks: bool,
) -> dict:
    """Write all files. index.json is deleted first and written last, so it exists only if all files are complete.

    `made_from` has the fingerprint of the tokenizer and the digest of the inputs.
    """
    (directory / "index.json").unlink(missing_ok=True)
    scans = index_writer.write_scans(directory / "scans.parquet", results, state.metadata())
    state.file.unlink(missing_ok=True)
    rows = index_writer.write_rows(directory / "rows.parquet", results)
    _write_reports(results, state, directory, report, strict, allow_leaks)
    if report["refused"]:
        raise Refused(report["refused"], report)
    description = index_writer.index_description(results, state, scans, rows, report) | made_from
    write_json(directory / "index.json", index.sealed(directory, description))
    return report


def _write_reports(
    results: Results, state: ResumeState, directory: Path, report: dict, strict: bool, allow_leaks: bool
) -> None:
    """Write the reports, and add their counts to the summary. Its `refused` lists the reasons to write no index."""
    report["quarantine"] = write_json_lines(directory / "quarantine.jsonl", reports.quarantine(results))
    write_json_lines(directory / "notices.jsonl", reports.notices(results))
    write_json_lines(directory / "cut.jsonl", reports.cut(results))
    write_json_lines(directory / "duplicates.jsonl", reports.duplicates(results))
    leaks = collections.Counter(study=0, scan=0)
    write_json_lines(directory / "leaks.jsonl", _count_kinds(reports.leaks(results), leaks))
    report["leaks"] = dict(leaks)
    if state.settings is not None:
        used = results.count("(SELECT DISTINCT record FROM facts WHERE record >= 0)")
        report["records"] = state.settings | {
            "shards": len(state.shards),
            "records": sum(state.shards),
            "unused": sum(state.shards) - used,
            "bytes": sum(f.stat().st_size for f in (directory / "records").iterdir() if f.is_file()),
        }
    refused = report["refused"] = []
    if leaks.total() and not allow_leaks:
        counts = f"studies: {leaks['study']:,}, scans: {leaks['scan']:,}"
        refused.append(f"the splits share data ({counts}), see {directory / 'leaks.jsonl'}")
    empty = [name for name, source in report["sources"].items() if not source["good"]]
    if empty:
        refused.append(f"no row of {', '.join(empty)} can be used, see {directory / 'quarantine.jsonl'}")
    if report["quarantine"] and strict:
        refused.append(f"--strict: {directory / 'quarantine.jsonl'} has {report['quarantine']:,} lines")
    write_json(directory / "summary.json", report)
    write_text(directory / "summary.txt", summary.text(report))
    with atomic_write(directory / "summary.png") as partial:
        # Imported late: matplotlib takes a second to import, and the workers do not need it.
        from input_pipeline.index import summary_figure

        summary_figure.draw(report, partial)


def _count_kinds(lines: Iterable[dict], counts: collections.Counter) -> Iterator[dict]:
    for line in lines:
        counts[line["kind"]] += 1
        yield line
