"""Data sets -> questions with fixed wording.

    benchmark = Benchmark(sets={"vqa_rad": {"family": "vqa_rad", "root": "data/vqa_rad", "table": "test.csv"}})
    built = build(benchmark)            # built.questions, built.missing, built.skipped

The wording of a question and the positions of its scans are drawn once, by a generator seeded with (seed, data set,
row), and recorded in questions.jsonl, which every model answers.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from input_pipeline.batching.mixture import Mixture, by_side
from input_pipeline.datasets import Dataset, open_dataset, sample_rng
from input_pipeline.datasets.json_tables import text_lines
from input_pipeline.datasets.modalities import modalities
from input_pipeline.files import parse_json, write_json, write_json_lines
from input_pipeline.images import scans
from input_pipeline.index.categories import MODALITIES
from input_pipeline.reasons import Reasons
from input_pipeline.samples import RowError, Sample, Scan, Text
from input_pipeline.text.chat import to_messages
from radfm_jax.evaluate.radbench import CLOSED, DATASETS, MODALITY_CHOICES, SET_FIELDS, Benchmark, Question
from radfm_jax.inference.batch_files import ROOTS, read_roots


@dataclasses.dataclass
class BuiltBenchmark:
    """The questions of a benchmark."""

    questions: list[Question]
    missing: dict[str, str]  # data set -> why it has no questions
    skipped: dict[str, dict[str, int]]  # data set -> reason -> number of rows


class Skipped(ValueError):
    """Raised for a valid row that is not a question of this benchmark."""


def build(benchmark: Benchmark) -> BuiltBenchmark:
    """Build the questions of all data sets that exist, in the paper's order.

    Data sets of the paper that are not in the config are reported as missing.
    """
    built = BuiltBenchmark([], {}, {})
    for name in [*(n for n in DATASETS if n in benchmark.sets), *sorted(benchmark.sets.keys() - DATASETS.keys())]:
        try:
            questions, skipped = questions_of_set(benchmark, name)
        except (ValueError, OSError) as error:
            root = Path(benchmark.sets[name]["root"])
            file = root if not root.exists() else root / benchmark.sets[name]["table"]
            built.missing[name] = f"{file} is missing" if not file.exists() else str(error)
            continue
        built.questions += questions
        built.skipped[name] = skipped
        if not questions:
            built.missing[name] = f"all rows were skipped: {', '.join(skipped)}"
    built.missing |= {name: "not in the config" for name in DATASETS if name not in benchmark.sets}
    return built


def questions_of_set(benchmark: Benchmark, name: str) -> tuple[list[Question], dict[str, int]]:
    """Return the questions of one data set in row order, and the number of skipped rows by reason.

    Raises ValueError or RowError if a table or a file of facts cannot be read.
    """
    fields, task, known = dict(benchmark.sets[name]), benchmark.task(name), DATASETS.get(name)
    own = {key: fields.pop(key) for key in SET_FIELDS if key in fields}
    family = fields.pop("family")
    plain = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k != "fraction"}
    dataset = open_dataset(family, **plain | {"quarantine": True})
    dataset.defer_stack_errors()  # keep these rows as questions: like other unreadable scans, they fail for every model
    root = Path(dataset.root)
    facts = _read_facts(root / own["facts"]) if own.get("facts") else {}
    defaults = {key: own.get(key) or (getattr(known, key) if known else "") for key in ("modality", "anatomy")}
    skipped = collections.Counter({f"skipped by the reader: {why}": n for why, n in dataset.skipped.items()})
    bad = Reasons()
    for problem in dataset.problems:
        bad.add(problem.reason, f"row {problem.row}")
    questions = []
    rows = _balanced_rows(dataset, name, benchmark.seed)
    if unused := len(dataset) - len(rows):
        skipped["more rows of one side than of the other (balance)"] = unused
    for i in rows.tolist():
        row_id = dataset.row_id(i)
        try:
            sample = dataset.sample(i, sample_rng(benchmark.seed, 0, name, row_id))
            question = question_of(sample, name, task, f"{name}/{row_id}", root)
        except RowError as error:
            bad.add(error.reason, f"row {row_id}")
        except Skipped as reason:
            skipped[str(reason)] += 1
        else:
            scan_facts = next((facts[s.path] for s in sample.scans if s.path in facts), {})
            labels = {key: scan_facts.get(key) or value for key, value in defaults.items()}
            if task == "modality":
                labels["modality"] = labels["modality"] or question.references[0]
            questions.append(dataclasses.replace(question, **labels))
    skipped.update({f"bad row: {reason}": count for reason, count in bad.counts().items()})
    limit = own.get("limit") or benchmark.limit
    if limit and len(questions) > limit:
        chosen = sample_rng(benchmark.seed, 0, name, "limit").permutation(len(questions))[:limit]
        skipped[f"more than limit={limit}"] = len(questions) - limit
        questions = [questions[i] for i in np.sort(chosen)]
    return questions, {reason: n for reason, n in skipped.items() if n}


def _balanced_rows(dataset: Dataset, name: str, seed: int) -> np.ndarray:
    """Return the rows of a data set. For a balanced one, the seed chooses equally many rows of both sides."""
    sides = dataset.sides()
    if sides is None:
        return np.arange(len(dataset))
    order, sizes = by_side(sides)
    source = {"rows": len(dataset), "fraction": 1.0, "sides": sizes}
    return np.sort(order[Mixture({name: source}, seed=seed, weights=False).epoch(0)])


def question_of(
    sample: Sample, dataset: str, task: str, row_id: str, root: Path, *, own_reference: bool = False
) -> Question:
    """Return the question of a sample.

    The text up to its last context is the context, the rest without the response is the prompt. Scans become marks,
    and the response is the reference. Raises Skipped for another task, a reference outside the closed list, text that
    contains a mark, and a scan path outside the root.

    own_reference: keep the reference of the data set. Otherwise it is mapped to RadBench's closed list, or skipped.
    """
    if sample.task != task:
        raise Skipped(f"task is {sample.task}")
    if sum(message.role == "assistant" for message in to_messages(sample.parts)) > 1:
        raise Skipped("a conversation of several questions")
    response = [p.text for p in sample.parts if isinstance(p, Text) and p.role == "response"]
    parts = [p for p in sample.parts if isinstance(p, Scan) or p.role != "response"]
    if any("<image-" in p.text for p in parts if isinstance(p, Text)):
        raise Skipped("its text contains the mark of a scan")
    reference = " ".join(text.strip() for text in response)
    if own_reference:
        pass
    elif task == "modality":
        choices = {MODALITY_CHOICES[name] for name in modalities(reference) if name in MODALITY_CHOICES}
        if len(choices) != 1:
            raise Skipped("its modality is not one of the six" if not choices else "it has several modalities")
        reference = choices.pop()
    elif task in CLOSED and reference not in CLOSED[task]:
        raise Skipped("an open question, not yes or no")
    numbers = {scan: i for i, scan in enumerate(dict.fromkeys(sample.scans), 1)}
    known = ("context", "system")
    last_context = max((k for k, p in enumerate(parts) if isinstance(p, Text) and p.role in known), default=-1)
    join = lambda parts: " ".join(  # noqa: E731
        f"<image-{numbers[p]}>" if isinstance(p, Scan) else p.text.strip() for p in parts
    )
    return Question(
        row_id, task, dataset, join(parts[last_context + 1 :]), (reference,), join(parts[: last_context + 1]),
        tuple(dataclasses.replace(scan, path=_absolute_path(root, scan)) for scan in numbers), str(root.resolve()),
        sample.study_id, closed=CLOSED.get(task, ()),
    )  # fmt: skip


def _absolute_path(root: Path, scan: Scan) -> str:
    """Return the absolute path of a scan. A missing file stays a question, which fails for every model."""
    try:
        return str(scans.resolve(root, scan.path))
    except scans.ScanError as error:
        if error.fault == "missing":
            return str(root.resolve() / scan.path)
        raise Skipped(f"a scan cannot be used: {error}") from None


def _read_facts(file: Path) -> dict[str, dict[str, str]]:
    """Return path -> modality and anatomy, with DICOM codes spelled out."""
    facts = {}
    for number, line in enumerate(text_lines(file), 1):
        try:
            cells = parse_json(line)
            labels = {key: str(cells[key]) for key in ("modality", "anatomy") if cells.get(key)}
            if "modality" in labels:
                labels["modality"] = MODALITIES.get(labels["modality"], labels["modality"])
            facts[cells["path"]] = labels
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number}: {error!r}; expected an object with `path`") from None
    return facts


def write_questions(questions: Iterable[Question], file: Path) -> None:
    """Write questions.jsonl, with scan paths relative to the roots of the data sets (`write_roots`)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json_lines(file, (question.to_dict() for question in questions))


def roots_of(questions: Iterable[Question]) -> dict[str, Path]:
    """Return data set -> directory of its relative scan paths."""
    return {q.dataset: Path(q.root) for q in questions if q.root}


def write_roots(questions: Iterable[Question], directory: Path) -> None:
    """Write roots.json next to questions.jsonl. Edit it if the data move; the next run rewrites it."""
    if roots := roots_of(questions):
        write_json(directory / ROOTS, {dataset: str(root) for dataset, root in roots.items()})


def read_questions(file: Path) -> list[Question]:
    """Read a file of `write_questions` or `--export`. Raises ValueError for invalid lines and duplicate ids."""
    questions: dict[str, Question] = {}
    roots = read_roots(file)
    for number, line in enumerate(text_lines(file), 1):
        try:
            question = Question.from_dict(parse_json(line), roots)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}, line {number} is not a question of a benchmark: {error!r}") from None
        if question.row_id in questions:
            raise ValueError(f"{file}, line {number}: duplicate id {question.row_id!r}")
        questions[question.row_id] = question
    return list(questions.values())
