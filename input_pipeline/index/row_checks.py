"""Worker tasks for rows: open the tables, list each row's scans, and encode each row as tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from input_pipeline.config import DataConfig
from input_pipeline.datasets import Dataset
from input_pipeline.datasets.base import study_key
from input_pipeline.index.index import scan_key
from input_pipeline.index.scan_checks import Key
from input_pipeline.parallel import workers
from input_pipeline.samples import RowError, Sample
from input_pipeline.sources import encode_row, open_sources, terms_of, tokenizer_of
from input_pipeline.text.alternatives import Pair
from input_pipeline.text.terms import TERM_WEIGHT

Row = tuple[str, int]  # source, row number in the opened data set


class Problem(NamedTuple):
    """Why a row cannot be used."""

    file: str
    row: str
    reason: str
    remedy: str


@dataclasses.dataclass
class SourceCheck:
    """Summary of a source's opened table."""

    root: str
    file: str
    rows: int  # number of rows in the opened data set
    problems: list[Problem]  # rows of the table that could not be opened
    left_out: dict[str, int]  # reason -> number of good rows that the family does not use
    duplicates: list[tuple[int, int]]  # (row, earlier row with equal content), as numbers in the table
    sides: tuple[str, str] | None = None  # names of the even and the odd sides of a balanced source


class RowCheck(NamedTuple):
    """A row as encoded at epoch 0."""

    row_id: str
    task: str = ""
    study: str = ""
    tokens: int = 0
    trained: int = 0  # tokens with a weight
    terms: int = 0  # tokens with the weight of a medical term
    instruction: int = 0  # text tokens without a weight (contexts, instructions, chat template), BOS not counted
    used: tuple[int, ...] = ()  # indices of the row's scans that are used
    # (study_key, study): the studies that must not be in two splits, the sample's own first.
    studies: tuple[tuple[str, str], ...] = ()
    cut: tuple[int, int, int, int] = (0, 0, 0, 0)  # tokens of context, instruction and response; dropped scans
    problem: Problem | None = None  # why the row cannot be used; the other fields may then be empty
    number: int = -1  # row number in the table
    side: int = -1  # side as in Dataset.sides; -1 without sides
    windows: int = 1  # windows as in Dataset.window_count


class Tables:
    """Tables, tokenizer and medical terms, opened once for all workers. `fields` is DataConfig.to_dict()."""

    def __init__(self, fields: dict):
        self.config = config = DataConfig.from_dict(fields)
        self.tokenizer = tokenizer_of(config)
        self.datasets: dict[str, Dataset] = open_sources(config)
        self.terms = terms_of(config.terms, config.umls_types)


def check_sources(tables: Tables) -> dict[str, SourceCheck]:
    """Return the summary of each source's table."""
    checks = {}
    for name, dataset in tables.datasets.items():
        file = str(dataset.file)
        problems = [Problem(file, str(p.row), p.reason, p.remedy) for p in dataset.problems]
        checks[name] = SourceCheck(
            str(dataset.root), file, len(dataset), problems, dict(dataset.skipped), list(dataset.duplicates),
            dataset.side_names(),
        )  # fmt: skip
    return checks


def row_label(row: Row) -> str:
    return f"source {row[0]}, row number {row[1]}"


def list_scans(tables: Tables, rows: Sequence[Row]) -> list[tuple[Key, ...]]:
    """Return the scans that each row can use in any epoch; none for a bad row, which `encode_rows` reports."""
    scans = []
    for name, row in rows:
        workers.heartbeat(row_label((name, row)))
        dataset = tables.datasets[name]
        try:
            scans.append(tuple(dict.fromkeys(scan_key(dataset.root, scan) for scan in dataset.scans(row))))
        except RowError:
            scans.append(())
    return scans


def encode_rows(tables: Tables, rows: Sequence[Row]) -> list[RowCheck]:
    """Encode rows at epoch 0 and check them. The files of their scans are not read."""
    checks = []
    for name, row in rows:
        workers.heartbeat(row_label((name, row)))
        dataset = tables.datasets[name]
        row_id = dataset.row_id(row)
        try:
            check = _encode_windows(tables, name, dataset, row, row_id)
        except RowError as error:
            check = RowCheck(row_id, problem=_problem(dataset, row_id, error))
        sides = dataset.sides()
        side = -1 if sides is None else int(sides[row])
        checks.append(check._replace(number=dataset.number(row), side=side))
    return checks


def _encode_windows(tables: Tables, name: str, dataset: Dataset, row: int, row_id: str) -> RowCheck:
    """Check the windows of a row, and return the largest of them."""
    if not dataset.has_windows or tables.config.epoch != "all":
        return _encode_row(tables, name, dataset, row, row_id, None)
    count = dataset.window_count(row)
    checks = [_encode_row(tables, name, dataset, row, row_id, window) for window in range(count)]
    return max(checks, key=lambda check: (len(check.used), check.tokens))._replace(windows=count)


def _encode_row(tables: Tables, name: str, dataset: Dataset, row: int, row_id: str, window: int | None) -> RowCheck:
    config = tables.config
    encode_form = functools.partial(
        encode_row, config, name, dataset, row, 0, tables.tokenizer, tables.terms, window=window
    )
    sample, encoded = encode_form()
    if sample.rejected is not None:
        encode_form(form=Pair())  # raises RowError if the two answers do not fit one row
    keys = {key: i for i, key in enumerate(dict.fromkeys(scan_key(dataset.root, s) for s in dataset.scans(row)))}
    latents = int((encoded.visual[:, 0] >= 0).sum())
    marks = 2 * latents // config.num_latents
    trained = int((encoded.weights > 0).sum())
    return RowCheck(
        row_id,
        task=sample.task,
        study=sample.study_id or "",
        tokens=len(encoded.ids),
        trained=trained,
        terms=int((encoded.weights == TERM_WEIGHT).sum()),
        instruction=len(encoded.ids) - int(encoded.ids[0] == tables.tokenizer.bos_id) - latents - marks - trained,
        used=tuple(keys[scan_key(dataset.root, scan)] for scan in encoded.scans),
        studies=_studies(dataset, sample, keys),
        cut=(encoded.cut_context, encoded.cut_instruction, encoded.cut_response, encoded.dropped_scans),
    )


def _studies(dataset: Dataset, sample: Sample, keys) -> tuple[tuple[str, str], ...]:
    """Return (key, study) of the sample, and of other scans that the row may show in other epochs."""
    studies = [sample.study_id] if sample.study_id else []
    if studies and len(keys) > len(set(sample.scans)) and hasattr(dataset, "study_of"):
        studies += [dataset.study_of(path) for _, path, *_ in keys]
    return tuple(dict.fromkeys((study_key(study, dataset.root), study) for study in studies))


def _problem(dataset: Dataset, row_id: str, error: RowError) -> Problem:
    """Return the problem of a row. If a file other than the table is at fault, the reason starts with its name."""
    other_file = error.file not in (str(dataset.file), dataset.name)
    reason = f"{error.file}: {error.reason}" if other_file else error.reason
    return Problem(str(dataset.file), row_id, reason, error.remedy)
