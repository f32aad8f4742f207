"""The temporary SQLite database of a `prepare` run, which keeps memory use independent of the number of rows.

    known      checks of scans from earlier runs (resume_state.py)
    records    content of a record -> its number and digest
    sources    sources of the config
    keys       distinct scans, numbered in the order in which rows name them; `source` names it first
    facts      the check of each scan
    scans      view: keys and facts
    mentions   the scans that each row can use, in order
    rows       the check of each row, and its state; `file` and `remedy` belong to the state; `study_group` and `held`
               are set at the end (study_groups.py)
    studies    the studies of each row that must not be in two splits; equal studies have equal keys
    good       view: the usable rows; the split of a row that is held out of a training source is `validation`

The database file is anonymous and disappears with the process. SQLite writes it to SQLITE_TMPDIR or TMPDIR when it
exceeds the cache: about 1 kB per scan and per row.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
from collections.abc import Iterator

from input_pipeline.files import parse_json
from input_pipeline.index.scan_checks import ScanCheck

CACHE = 64 << 10  # KiB
KEY = ("root", "path", "volume", "window", "series")
FACTS = tuple(field for field in ScanCheck._fields if field not in KEY)
SCAN = ", ".join(ScanCheck._fields)
SAME_KEY = " AND ".join(f"{column} = ?" for column in KEY)
ROW = (
    "source row row_id number task study tokens trained terms instruction cut_context cut_instruction cut_response "
    "cut_scans scans state file remedy side windows study_group held"
).split()

_SCHEMA = f"""
CREATE TABLE known ({SCAN}, PRIMARY KEY ({", ".join(KEY)})) WITHOUT ROWID;
CREATE TABLE records (sha256, volume, window, series, record, digest,
    PRIMARY KEY (sha256, volume, window, series)) WITHOUT ROWID;
CREATE TABLE sources (source INTEGER PRIMARY KEY, name, split, root);
CREATE TABLE keys (scan INTEGER PRIMARY KEY, source, {", ".join(KEY)}, UNIQUE ({", ".join(KEY)}));
CREATE TABLE facts (scan INTEGER PRIMARY KEY, {", ".join(FACTS)});
CREATE VIEW scans AS SELECT scan, source, {SCAN} FROM keys JOIN facts USING (scan);
CREATE TABLE mentions (source, row, position, scan, PRIMARY KEY (source, row, position)) WITHOUT ROWID;
CREATE TABLE rows ({", ".join(ROW)}, PRIMARY KEY (source, row)) WITHOUT ROWID;
CREATE TABLE studies (position INTEGER PRIMARY KEY, source, row, key, study);
CREATE VIEW good AS SELECT rows.*, name, root, CASE WHEN held THEN 'validation' ELSE split END AS split
    FROM rows JOIN sources USING (source) WHERE state = 'good';
"""


@contextlib.contextmanager
def open_database() -> Iterator[sqlite3.Connection]:
    """Open an empty database. Raises OSError if its disk is full."""
    database = sqlite3.connect("", isolation_level=None)
    try:
        database.execute(f"PRAGMA cache_size = -{CACHE}")
        database.execute("PRAGMA journal_mode = OFF")
        database.executescript(_SCHEMA)
        database.execute("BEGIN")  # never committed, because the database is temporary
        yield database
    except sqlite3.OperationalError as error:
        if "full" in str(error) or "I/O" in str(error):
            directory = os.environ.get("SQLITE_TMPDIR") or os.environ.get("TMPDIR") or "/var/tmp"
            message = f"no space for the temporary database ({error}): set TMPDIR to a larger directory"
            raise OSError(errno.ENOSPC, message, directory) from error
        raise
    finally:
        database.close()


def to_columns(check: ScanCheck) -> ScanCheck:
    """Return the values of the columns SCAN."""
    return check._replace(spacing=json.dumps(check.spacing), notices=json.dumps(check.notices))


def to_facts(check: ScanCheck) -> tuple:
    """Return the values of the columns FACTS."""
    columns = to_columns(check)._asdict()
    return tuple(columns[field] for field in FACTS)


def from_columns(row: tuple) -> ScanCheck:
    """Return the scan check of the columns SCAN (the inverse of `to_columns`)."""
    check = ScanCheck(*row)
    return check._replace(spacing=parse_json(check.spacing), notices=tuple(parse_json(check.notices)))


def placeholders(count: int) -> str:
    """Return "?, ?, ..." for an SQL statement."""
    return ", ".join("?" * count)
