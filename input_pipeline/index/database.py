"""Where `prepare` keeps what it finds: an SQLite database in temporary files, so that memory does not grow with it.

    known      facts of scans from earlier runs (journal.py)
    records    what stands in the records -> its number there
    sources    of the config
    keys       every distinct scan, numbered in the order in which rows name them; `source`: the one that does first
    facts      what was found out about each of them
    scans      both together
    mentions   the scans that each row can use, in its order
    rows       what each row is, and its state; `file` and `remedy` are of what stands against it
    studies    what must not stand in both splits, by the rows that have it
    good       the rows that can be used

The database has no name and is gone with the process. SQLite puts it below SQLITE_TMPDIR or TMPDIR once it is larger
than its cache: some 1 kB for each scan and each row.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sqlite3
from collections.abc import Iterator

from input_pipeline.index.checks import Key, ScanCheck

CACHE = 64 << 10  # KiB
KEY = ScanCheck._fields[: len(Key.__args__)]
FACTS = ScanCheck._fields[len(KEY) :]
SCAN = ", ".join(ScanCheck._fields)

_SCHEMA = f"""
CREATE TABLE known ({SCAN}, PRIMARY KEY ({", ".join(KEY)})) WITHOUT ROWID;
CREATE TABLE records (sha256, volume, window, record, PRIMARY KEY (sha256, volume, window)) WITHOUT ROWID;
CREATE TABLE sources (source INTEGER PRIMARY KEY, name, split, root);
CREATE TABLE keys (scan INTEGER PRIMARY KEY, source, {", ".join(KEY)}, UNIQUE ({", ".join(KEY)}));
CREATE TABLE facts (scan INTEGER PRIMARY KEY, {", ".join(FACTS)});
CREATE VIEW scans AS SELECT scan, source, {SCAN} FROM keys JOIN facts USING (scan);
CREATE TABLE mentions (source, row, place, scan, PRIMARY KEY (source, row, place)) WITHOUT ROWID;
CREATE TABLE rows (
    source, row, row_id, number, task, study, tokens, trained, terms, instruction,
    cut_context, cut_instruction, cut_response, cut_scans, scans, state, file, remedy, PRIMARY KEY (source, row)
) WITHOUT ROWID;
CREATE TABLE studies (place INTEGER PRIMARY KEY, source, row, study);
CREATE VIEW good AS SELECT * FROM rows JOIN sources USING (source) WHERE state = 'good';
"""


@contextlib.contextmanager
def opened() -> Iterator[sqlite3.Connection]:
    """An empty database. Raises OSError when there is no room for it."""
    database = sqlite3.connect("", isolation_level=None)
    try:
        database.execute(f"PRAGMA cache_size = -{CACHE}")
        database.execute("PRAGMA journal_mode = OFF")
        database.executescript(_SCHEMA)
        database.execute("BEGIN")  # and never COMMIT: nobody reads it afterwards
        yield database
    except sqlite3.OperationalError as error:
        if "full" in str(error) or "I/O" in str(error):
            place = os.environ.get("SQLITE_TMPDIR") or os.environ.get("TMPDIR") or "/var/tmp"
            said = f"no room for what is found ({error}): set TMPDIR to a directory with more"
            raise OSError(errno.ENOSPC, said, place) from error
        raise
    finally:
        database.close()


def values(facts: ScanCheck) -> tuple:
    """Of the columns SCAN."""
    return facts._replace(spacing=json.dumps(facts.spacing))


def scan_facts(row: tuple) -> ScanCheck:
    """The inverse."""
    facts = ScanCheck(*row)
    return facts._replace(spacing=json.loads(facts.spacing))


def marks(count: int) -> str:
    """The places of so many values in a statement."""
    return ", ".join("?" * count)
