"""`--rexrank [TEST.json]`: generated reports as a submission to ReXrank, a leaderboard of chest X-ray reports.

    {"50051329": {..., "model_prediction": "Findings: ... Impression: ..."}}

A submission is one JSON object that maps each study to its fields and to the generated report, `model_prediction`, as
in the sample prediction file of https://github.com/rajpurkarlab/ReXrank. The other fields of a study are copied from
TEST.json. Without TEST.json, they are the report, the context and the image paths of the benchmark.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from input_pipeline.files import read_json, write_json
from radfm_jax.evaluate.scoring import ScoredAnswer
from radfm_jax.inference.batch_files import raise_problems

PREDICTION = "model_prediction"


def write_submission(answers: Sequence[ScoredAnswer], file: Path, test_file: Path | None = None) -> str:
    """Write the reports of one model. Returns a summary.

    Raises ValueError if there are no reports, a question has no study or a study has two reports, or the test file
    cannot be read or shares no study with the benchmark.
    """
    by_study: dict[str, ScoredAnswer] = {}
    problems = []
    for answer in answers:
        question = answer.question
        if question.task != "report":
            continue
        if not question.study:
            problems.append(f"{question.row_id} has no study: set `study` of its data set")
        elif question.study in by_study:
            first = by_study[question.study].question.row_id
            problems.append(f"study {question.study} has two reports, {first} and {question.row_id}: keep one question")
        else:
            by_study[question.study] = answer
    raise_problems(problems, "--rexrank: ")
    if not by_study:
        raise ValueError("--rexrank: the benchmark has no questions about reports")
    studies = _read(test_file) if test_file else {study: _fields(answer) for study, answer in by_study.items()}
    asked = {study: fields for study, fields in studies.items() if study in by_study}
    entries = {study: fields | {PREDICTION: by_study[study].answer.text} for study, fields in asked.items()}
    if not entries:
        example = f"{next(iter(studies), '')!r} in the file, {next(iter(by_study))!r} in the benchmark"
        raise ValueError(f"--rexrank: {test_file} shares no study with the benchmark ({example}): compare the names")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, entries)
    empty = sum(not entry[PREDICTION].strip() for entry in entries.values())
    missing = len(studies) - len(entries)
    counts = f"{len(entries):,} studies, {empty:,} without a report, {missing:,} not in the benchmark"
    return f"submission to ReXrank: {file}, {counts}"


def _fields(answer: ScoredAnswer) -> dict:
    question = answer.question
    return {
        "image_path": [scan.path for scan in question.relative_scans()],
        "report": question.references[0],
        "context": question.context,
    }


def _read(file: Path) -> dict[str, dict]:
    try:
        studies = read_json(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"--rexrank {file} cannot be read ({error}): pass a test file of ReXrank") from None
    if not isinstance(studies, dict) or not all(isinstance(fields, dict) for fields in studies.values()):
        raise ValueError(f"--rexrank {file}: expected an object of studies, as in the test files of ReXrank")
    return studies
