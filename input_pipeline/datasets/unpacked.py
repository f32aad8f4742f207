"""Scans that are stored inside the records of a table -> files below the root, named by the SHA-256 of their content.

All other code reads files: checks, stamps, the index, records, the pages of `inspect`. Equal images of several records
become one file, so they are one scan: its questions share a slot in a row, and a leak between splits is found. A file
is also read faster at random than a cell of a Parquet row group.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np

from input_pipeline.datasets.json_tables import stream_jsonl
from input_pipeline.files import atomic_write, fingerprint, write_json_lines
from input_pipeline.parallel.workers import heartbeat
from input_pipeline.samples import RowError

AXES = "HWDC"


class ScanFolder:
    """The folder below the root of a data set to which its scans are unpacked."""

    def __init__(self, root: pathlib.Path, folder: str):
        self.root, self.folder = root, folder

    def add(self, content: bytes) -> str:
        """Write the content of a scan file, unless it is there. Returns its path relative to the root."""
        # Imported late: it loads all decoders, and most tables contain no scans.
        from input_pipeline.images.scans import extension

        name = hashlib.sha256(content).hexdigest() + extension(content[:262])
        path = f"{self.folder}/{name[:2]}/{name}"
        file = self.root / path
        if not file.is_file() or file.stat().st_size != len(content):
            file.parent.mkdir(parents=True, exist_ok=True)
            # No fsync, which takes most of the time for small images: `prepare` reads every file afterwards.
            with atomic_write(file, unique=True, sync=False) as partial:
                partial.write_bytes(content)
        return path

    def add_array(self, array: np.ndarray, axes: str = "") -> str:
        """Write voxels as a .npy file. `axes` names the axes of the array; "": those of images/scans/arrays.py.

        Raises ValueError if `axes` does not fit the array.
        """
        if axes:
            array = to_voxels(array, axes)
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
        return self.add(buffer.getvalue())


def to_voxels(array: np.ndarray, axes: str) -> np.ndarray:
    """Return an array with the axes `axes` ("DHW", "HWC") as [H, W, D, C]. Raises ValueError if they do not fit."""
    if len(axes) != array.ndim:
        raise ValueError(f"axes={axes!r} does not fit an array of shape {list(array.shape)}")
    missing = [letter for letter in AXES if letter not in axes]
    array = array.reshape(array.shape + (1,) * len(missing))
    return array.transpose([(axes + "".join(missing)).index(letter) for letter in AXES])


def bad_axes(axes: str) -> str:
    """Return why `axes` cannot name the axes of an array, or ""."""
    if not axes or (set(axes) <= set(AXES) and len(set(axes)) == len(axes) and {"H", "W"} <= set(axes)):
        return ""
    return f"axes must have H and W, and D and C at most once each, for instance 'DHW' (got {axes!r})"


Rows = Iterable[tuple[int, dict] | RowError]


def unpacked_rows(table: pathlib.Path, folder: ScanFolder, files: list[pathlib.Path], identity, rows) -> Rows:
    """Return the rows of a table whose scans are files of `folder`. They are unpacked once, and again after a change.

    The rows are stored in the folder as JSON Lines, so that a later opening need not read the scans.

    Args:
      table: the name of the table in errors.
      files: the files of the table. A change of their sizes or times counts as a change.
      identity: a JSON value: everything else that the rows depend on.
      rows: rows() -> the rows, numbered from 1 without gaps. It adds the scans to the folder.
    Raises:
      RowError: the folder cannot be written.
    """
    stamps = [(file.name, (status := os.stat(file)).st_size, status.st_mtime_ns) for file in files]
    stored = folder.root / folder.folder / f"{fingerprint([identity, stamps])[:32]}.jsonl"
    if not stored.is_file():
        try:
            stored.parent.mkdir(parents=True, exist_ok=True)
            write_json_lines(stored, _lines(table, rows()), unique=True)
        except OSError as error:
            reason = f"its scans cannot be unpacked to {stored.parent}: {error.strerror}"
            raise RowError(table, 0, reason, "make the root writable, or set `unpacked` to another folder") from error
    return _read(table, stored)


def _lines(table: pathlib.Path, rows: Rows) -> Iterator[dict]:
    for number, row in enumerate(rows, 1):
        heartbeat(f"{table}, row {number}")  # unpacking may take hours
        if not isinstance(row, RowError):
            try:
                json.dumps(row[1], ensure_ascii=False, allow_nan=False).encode()
            except (TypeError, ValueError) as error:  # an array, NaN, bytes that are not UTF-8
                row = RowError(table, number, f"a value is not text: {error}", "map other columns, or remove the row")
        yield {"error": [row.reason, row.remedy]} if isinstance(row, RowError) else row[1]


def _read(table: pathlib.Path, stored: pathlib.Path) -> Iterator[tuple[int, dict] | RowError]:
    for row in stream_jsonl(stored):
        if isinstance(row, RowError):
            raise RowError(stored, row.row, row.reason, "delete this file: it is written again")
        number, cells = row
        yield RowError(table, number, *cells["error"]) if "error" in cells else row
