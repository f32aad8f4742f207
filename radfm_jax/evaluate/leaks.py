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
    test_studies = {question.study for question in questions if question.study}
    studies: dict[str, dict[str, str]] = {}  # study -> root -> source
    for row in _rows(index.directory / "rows.parquet", "source", "study"):
        if row["source"] in training and row["study"] in test_studies:
            studies.setdefault(row["study"], {})[index.tables[row["source"]]["root"]] = row["source"]
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
        if source := _training_source(question, studies):
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


def _training_source(question: Question, studies: dict[str, dict[str, str]]) -> str:
    """Return the training source that has the study, or "".

    A study name that is just the path of its scan matches only below the same root: many data sets have an
    `images/1.png`.
    """
    roots = studies.get(question.study or "", {})
    suffix = f"/{question.study}"
    own_roots = [s.path.removesuffix(suffix) for s in question.scans if s.path.endswith(suffix)]
    if own_roots:
        return next((roots[root] for root in own_roots if root in roots), "")
    return next(iter(roots.values()), "")
