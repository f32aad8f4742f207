"""The database of a `prepare` run: constant memory, errors, and checks that survive a round trip."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path

import pytest

from input_pipeline.config import DataConfig
from input_pipeline.files import write_json_lines
from input_pipeline.index import database, index_writer, reports, summary
from input_pipeline.index.results import Results
from input_pipeline.index.resume_state import ResumeState
from input_pipeline.index.row_checks import RowCheck, SourceCheck
from input_pipeline.index.scan_checks import ScanCheck

ROOT = "/data"
CONFIG = DataConfig.from_dict(
    {
        split: {split: {"family": "jsonl", "root": ROOT, "table": f"{split}.jsonl"}} for split in ("train", "test")
    } | {"tokenizer": "none"}
)  # fmt: skip


def process(directory: Path, rows: int) -> dict:
    """Process the results of a run over so many rows, each with its own scan. Returns the report."""
    with database.open_database() as db:
        tables = {name: SourceCheck(ROOT, name, rows // 2, [], {}, []) for name in ("train", "test")}
        results = Results(CONFIG, tables, dict.fromkeys(tables, ""), db)
        all_rows = ((name, i) for name in tables for i in range(rows // 2))
        while chunk := list(itertools.islice(all_rows, 100)):
            keys = [(ROOT, f"{name}/study{i:08d}/image.png", -1, "", "") for name, i in chunk]
            results.add_mentions(chunk, [(key,) for key in keys])
            # Every scan of a split is a different file; every tenth file of train is also in test.
            contents = [i if i % 10 == 0 else f"{name} {i}" for name, i in chunk]
            results.add_scans(
                ScanCheck.of(key, format="png", height=32, width=32, depth=1, channels=1, sha256=str(n), stamp="1")
                for key, n in zip(keys, contents, strict=True)
            )
            results.add_rows(
                chunk, [RowCheck(f"{name}{i}", "vqa", f"s{n}", 40, 10, 2, 20, (0,), ((f"s{n}", f"s{n}"),), number=i)
                        for (name, i), n in zip(chunk, contents, strict=True)]
            )  # fmt: skip
        report = summary.summarize(results)
        index_writer.write_scans(directory / "scans.parquet", results, {})
        index_writer.write_rows(directory / "rows.parquet", results)
        report["leaks"] = write_json_lines(directory / "leaks.jsonl", reports.leaks(results))
        report["duplicates"] = write_json_lines(directory / "duplicates.jsonl", reports.duplicates(results))
        assert write_json_lines(directory / "quarantine.jsonl", reports.quarantine(results)) == 0
    return report


def test_memory_does_not_grow_with_the_rows(tmp_path, monkeypatch):
    """Measured on Python objects, without SQLite's fixed cache: fewer than 200 bytes per row."""
    monkeypatch.setattr(index_writer, "BATCH", 200)
    peaks = []
    for rows in (400, 400, 4000):  # the first run includes imports
        tracemalloc.start()
        report = process(tmp_path, rows)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert report["rows"]["good"] == report["scans"]["good"] == rows
        assert report["leaks"] == 2 * rows // 20 and report["duplicates"] == rows // 20
        assert report["splits"]["train"]["instruction"]["median"] == 20
    assert peaks[2] - peaks[1] < 200 * 3600


def test_a_full_disk_names_tmpdir(monkeypatch):
    monkeypatch.setattr(database, "CACHE", 1)
    with pytest.raises(OSError, match="TMPDIR") as caught, database.open_database() as db:
        db.execute("PRAGMA max_page_count = 50")
        db.executemany("INSERT INTO sources VALUES (?, ?, ?, ?)", ((i, "x" * 1000, "", "") for i in range(1000)))
    assert "full" in str(caught.value)


def test_other_database_errors_are_raised():
    with pytest.raises(database.sqlite3.OperationalError, match="no such table"), database.open_database() as db:
        db.execute("SELECT * FROM nowhere")


def test_known_checks_survive_a_round_trip(tmp_path):
    """Only checks with a stamp are known, and a later line replaces an earlier one."""
    key = (ROOT, "ct.nii.gz", 1, '"lung"', "axial lung")
    first = ScanCheck.of(key, spacing=(0.5, None, 2.0), low=-1024.5, high=3071.0, stamp="1")
    other = ScanCheck(ROOT, "ä.png", -1, "", fault="damaged", reason="it is truncated", stamp="2")
    with database.open_database() as db:
        state = ResumeState(tmp_path, db)
        state.start(None)
        state.append([first._replace(low=0.0), other, ScanCheck(ROOT, "b.png", -1, "")])
        state.append([first])
        state.close()
    with database.open_database() as db:
        resumed = ResumeState(tmp_path, db)
        assert resumed.known(first.key)._replace(spacing=tuple(resumed.known(first.key).spacing)) == first
        assert resumed.known(other.key)._replace(spacing=()) == other
        assert db.execute("SELECT COUNT(*) FROM known").fetchone() == (2,)
