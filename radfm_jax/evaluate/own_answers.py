"""Readable answers to test rows of a config: `python -m radfm_jax.evaluate --answers N`.

    OUT/answers.jsonl   an answer per line: id, source, study, task, question, reference, answer, correct
    OUT/generated/      the model's questions and answers, from which an interrupted run resumes

An answer is correct if it has the words of the reference, in order (metrics.exact). If the reference is yes or no, the
answer is correct if the first of the two that it names is the reference (metrics.named_choice). A refusal or a failure
is not correct.
"""

from __future__ import annotations

import collections
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from input_pipeline import files
from input_pipeline.config import DataConfig
from input_pipeline.datasets import sample_rng
from input_pipeline.samples import RowError, Sample
from input_pipeline.sources import open_sources, terms_of, tokenizer_of
from radfm_jax.evaluate import model_answers, scoring
from radfm_jax.evaluate.plausibility import REMEDY, GivenAnswer, implausible
from radfm_jax.evaluate.radbench import CLOSED, Question
from radfm_jax.evaluate.radbench_build import Skipped, question_of
from radfm_jax.evaluate.scoring import ScoredAnswer
from radfm_jax.inference import Generator, inputs
from radfm_jax.training.experiment import Experiment

Skips = dict[str, dict[str, int]]  # source -> reason -> number of rows without a question


def questions_of(data: DataConfig, per_source: int | None) -> tuple[list[Question], Skips]:
    """Draw up to `per_source` questions of each test source (None: all) by the seed. Also return the skipped rows."""
    questions: list[Question] = []
    skips: Skips = {}
    for source, dataset in open_sources(data, "test").items():
        reasons: collections.Counter[str] = collections.Counter()
        chosen: list[Question] = []
        for row in sample_rng(data.seed, 0, source, "answers").permutation(len(dataset)).tolist():
            if per_source is not None and len(chosen) == per_source:
                break
            row_id = dataset.row_id(row)
            try:
                sample = dataset.sample(row, sample_rng(data.seed, 0, source, row_id))
                chosen.append(_question(sample, source, row_id, Path(dataset.root)))
            except (RowError, Skipped) as error:
                reasons[error.reason if isinstance(error, RowError) else str(error)] += 1
        questions += chosen
        if reasons:
            skips[source] = dict(reasons)
    return questions, skips


def _question(sample: Sample, source: str, row_id: str, root: Path) -> Question:
    question = question_of(sample, source, sample.task, f"{source}/{row_id}", root, own_reference=True)
    (reference,) = question.references
    if not reference.strip():
        raise Skipped("it has no reference answer")
    if (choice := reference.strip(" .").casefold()) in CLOSED["diagnosis"]:
        return dataclasses.replace(question, closed=CLOSED["diagnosis"], references=(choice,))
    return dataclasses.replace(question, closed=())


def answer(
    config: Experiment,
    params: dict,
    out: Path,
    *,
    per_source: int | None,
    model: str,
    checkpoint: str = "",
    progress: Callable[[int, int, int], None] = lambda answered, failed, total: None,
) -> tuple[list[ScoredAnswer], Skips]:
    """Answer questions of the test sources greedily, and write answers.jsonl. An interrupted run resumes.

    model, checkpoint: see batch_run.answer_file. Raises ValueError if the data are invalid.
    """
    questions, skips = questions_of(config.data, per_source)
    if not questions:
        return [], skips
    generator = Generator(
        config.compute, params, tokenizer=tokenizer_of(config.data),
        preparation=inputs.Preparation.from_config(config.data), length=config.data.text_length,
    )  # fmt: skip
    file = _generated(out, questions, checkpoint or model) / "answers.jsonl"
    model_answers.generate_answers(
        generator, questions, file, file.with_name("questions.jsonl"), model=model, checkpoint=checkpoint,
        batch=config.train.batch, progress=progress,
    )  # fmt: skip
    scored = scoring.score(questions, model_answers.read_answers(file, questions), terms_of("none"))
    files.write_json_lines(out / "answers.jsonl", map(line, scored))
    return scored, skips


def _generated(out: Path, questions: Sequence[Question], weights: str) -> Path:
    """Return the directory of the answers of these weights to these questions, and remove other answers.

    Each run replaces the other files of OUT, so it replaces the answers too.
    """
    name = files.fingerprint([weights, [question.to_dict() for question in questions]])[:16]
    for other in (out / "generated").glob("*"):
        if other.is_dir() and other.name != name:
            shutil.rmtree(other)
    return out / "generated" / name


def is_correct(scored: ScoredAnswer) -> bool:
    return scored.values["named" if scored.question.closed else "exact"] == 1


def line(scored: ScoredAnswer) -> dict:
    """Return a line of answers.jsonl."""
    q = scored.question
    fields = {"id": q.row_id, "source": q.dataset, "study": q.study, "task": q.task, "question": q.prompt}
    fields |= {"context": q.context} if q.context else {}
    fields |= {"reference": q.references[0], "answer": scored.answer.text, "correct": is_correct(scored)}
    fields |= {"refused": True} if scored.refused else {}
    return fields | ({"error": scored.error} if scored.error else {})


def by_source(scored: Sequence[ScoredAnswer]) -> list[tuple[str, int, int, int, int]]:
    """Return (source, answers, correct, refused, failed) for each source."""
    rows = []
    for source in dict.fromkeys(one.question.dataset for one in scored):
        part = [one for one in scored if one.question.dataset == source]
        counts = map(sum, ((is_correct(x) for x in part), (x.refused for x in part), (bool(x.error) for x in part)))
        rows.append((source, len(part), *counts))
    return rows


def warnings_of(scored: Sequence[ScoredAnswer]) -> list[str]:
    """Return why the answers to a source are implausible."""
    lines = []
    for source, *_ in by_source(scored):
        part = [one for one in scored if one.question.dataset == source and not one.error]
        given = [GivenAnswer(x.answer.text, x.question.references[0], x.answer.ended == "length") for x in part]
        lines += [f"{source}: {reason}; {REMEDY}" for reason in implausible(given)]
    return lines
