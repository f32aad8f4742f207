"""Test studies in the training and validation data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from pyarrow import parquet

from input_pipeline.index.index import Index
from input_pipeline.index.scan_checks import scan_sha256
from radfm_jax.evaluate.radbench import Question


def find_leaks(questions: Iterable[Question], directory: Path | str) -> list[dict]:
    """Return the questions with a study or a scan file that is also in the training or validation data.

    Studies are compared by name and files by SHA-256, so renamed copies are detected, but edited images are not. The
    training and validation data are those of the index (written by `prepare`), including skipped rows. Raises
    ValueError if the directory has no index.
    """
    index, questions = Index(directory), list(questions)
    training = {name for name, source in index.tables.items() if source["split"] != "test"}
    test_studies = {key for question in questions for key in _study_keys(question)}
    studies: dict[tuple[str, str], str] = {}  # key -> source
    for row in _rows(index.directory / "rows.parquet", "source", "study"):
        if row["source"] in training:
            keys = ("", row["study"].casefold()), (index.tables[row["source"]]["root"], row["study"])
            studies |= {key: row["source"] for key in keys if key in test_studies}
    hashes: dict[str, str] = {}
    for path in {scan.path for question in questions for scan in question.scans}:
        with contextlib.suppress(OSError, ValueError):  # scoring reports an unreadable scan
            hashes[path] = scan_sha256(Path(path))
    test_hashes = set(hashes.values())
    training_files = {
        scan["sha256"]: f"{scan['source']}: {scan['path']}"
        for scan in _rows(index.directory / "scans.parquet", "source", "path", "sha256")
        if scan["source"] in training and scan["sha256"] in test_hashes
    }
    leaks = []
    for question in questions:
        if source := next((studies[key] for key in _study_keys(question) if key in studies), ""):
            leaks.append({"id": question.row_id, "kind": "study", "what": question.study, "in": source})
        for scan, relative in zip(question.scans, question.relative_scans(), strict=True):
            if file := training_files.get(hashes.get(scan.path)):
                leaks.append({"id": question.row_id, "kind": "scan", "what": relative.path, "in": file})
    return leaks


def _rows(file: Path, *columns: str) -> Iterator[dict]:
    """Yield the rows of a table, which may be larger than memory."""
    with parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(columns=list(columns), use_threads=False):
            yield from batch.to_pylist()


def _study_keys(question: Question) -> list[tuple[str, str]]:
    """Return the keys of a question's study: ("", folded name), or (root, path) if its name is the path of a scan.

    A path matches only below the same root: many data sets have an `images/1.png`.
    """
    if not question.study:
        return []
    suffix = f"/{question.study}"
    roots = [scan.path.removesuffix(suffix) for scan in question.scans if scan.path.endswith(suffix)]
    return [(root, question.study) for root in roots] or [("", question.study.casefold())]
