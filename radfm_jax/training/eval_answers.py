"""Answers to validation questions, generated and scored at each evaluation of a run (`train.eval_answers`).

    WORKDIR/answers/STEP/questions.jsonl   the questions, the same at every evaluation
    WORKDIR/answers/STEP/answers.jsonl     the answers (answers.failed.jsonl: questions without one, and why)
    WORKDIR/answers/STEP/scores.jsonl      each answer with its references and its RadBench scores

These files contain texts of the data; the log does not.
"""

from __future__ import annotations

import collections
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from input_pipeline import files
from input_pipeline.batching.splits import rows_of_split
from input_pipeline.config import DataConfig
from input_pipeline.datasets import sample_rng
from input_pipeline.index.index import Index
from input_pipeline.samples import RowError
from input_pipeline.sources import open_sources, terms_of, tokenizer_of
from radfm_jax.evaluate import model_answers, radbench, radbench_build, scoring
from radfm_jax.inference import Generator, inputs
from radfm_jax.training.experiment import Experiment

ROWS_PER_QUESTION = 50  # rows tried for each question


class EvalAnswers:
    """Answers the same questions at each call and returns their scores. `description` is a line for the log.

    Raises:
      ValueError: no source has a question, or the run has several processes. Generation needs all parameters in one.
    """

    def __init__(self, config: Experiment, workdir: Path, mesh: jax.sharding.Mesh):
        if jax.process_count() > 1:
            raise ValueError(
                f"train.eval_answers is {config.train.eval_answers}, but generation needs a single process and there "
                f"are {jax.process_count()}; set it to 0 and score checkpoints with `python -m radfm_jax.evaluate "
                "radbench`"
            )
        self.config, self.directory, self.mesh = config, workdir / "answers", mesh
        if not config.data.validates:
            raise ValueError(
                "train.eval_answers: there are no validation rows; set data.validation or data.validation_share"
            )
        self.questions, shortages = select_questions(config.data, config.train.eval_answers)
        fewer = "; ".join(f"{name}: {reason}" for name, reason in shortages.items())
        if not self.questions:
            raise ValueError(f"train.eval_answers: no validation row is a question with a reference answer ({fewer})")
        self.description = f"each evaluation generates answers to {len(self.questions)} validation questions"
        self.description += f" ({fewer})" if fewer else ""
        self.tokenizer = tokenizer_of(config.data)
        self.terms = terms_of(config.data.terms, config.data.umls_types)

    def __call__(self, params: dict, step: int, alive: Callable[[], None]) -> dict[str, float]:
        """Return task/metric (scoring.TITLES) -> value, and task/failed, the share of questions without an answer.

        `alive` is called after every few answers. An exception from it ends the generation.
        """
        directory = self.directory / str(step)
        if directory.exists():  # written by an interrupted attempt, or by one that this run does not descend from
            shutil.rmtree(directory)
        directory.mkdir(parents=True)
        data = self.config.data
        generator = Generator(
            self.config.compute, params, mesh=self.mesh, tokenizer=self.tokenizer,
            preparation=inputs.Preparation.from_config(data), length=data.text_length,
        )  # fmt: skip
        model_answers.generate_answers(
            generator, self.questions, directory / "answers.jsonl", directory / "questions.jsonl",
            model=f"step {step}", progress=lambda *_: alive(),
        )  # fmt: skip
        answers = model_answers.read_answers(directory / "answers.jsonl", self.questions)
        scored = scoring.score(self.questions, answers, self.terms)
        files.write_json_lines(directory / "scores.jsonl", (answer.to_dict() for answer in scored))
        metrics: dict[str, float] = {}
        for task in radbench.TASKS:
            if of_task := [answer for answer in scored if answer.question.task == task]:
                intervals = scoring.intervals(of_task, resamples=0, seed=0, by_study=False)
                metrics |= {f"{task}/{name}": x.value for name, x in intervals.items() if np.isfinite(x.value)}
                metrics[f"{task}/failed"] = sum(bool(answer.error) for answer in of_task) / len(of_task)
        return metrics


def select_questions(config: DataConfig, count: int) -> tuple[list[radbench.Question], dict[str, str]]:
    """Draw `count` questions from the validation rows of each source, worded as for the validation loss.

    Return the questions, and source -> reason for each source that has fewer.
    """
    index = Index(config.index)
    questions, shortages = [], {}
    datasets = open_sources(config, "validation")
    for name, (rows, *_) in rows_of_split(config, "validation", index, datasets).items():
        dataset = datasets[name]
        order = sample_rng(config.seed, 0, name, "answers").permutation(rows)[: ROWS_PER_QUESTION * count]
        selected: list[radbench.Question] = []
        skipped: collections.Counter[str] = collections.Counter()
        for row in order.tolist():
            row_id = dataset.row_id(row)
            try:
                sample = dataset.sample(row, sample_rng(config.seed, 0, name, row_id))
                if sample.task not in radbench.TASKS:
                    raise radbench_build.Skipped(f"{sample.task} has no questions")
                question = radbench_build.question_of(sample, name, sample.task, f"{name}/{row_id}", Path(dataset.root))
            except (RowError, radbench_build.Skipped) as error:
                skipped[error.reason if isinstance(error, RowError) else str(error)] += 1
                continue
            selected.append(question)
            if len(selected) == count:
                break
        if len(selected) < count:
            reasons = [f"{n} x {reason}" for reason, n in skipped.most_common(3)] or ["no more good rows"]
            shortages[name] = f"{len(selected)} of {count} questions, {', '.join(reasons)}"
        questions += selected
    return questions, shortages


def summary(scores: dict[str, float]) -> str:
    """Return one score per task, for the log."""
    parts = []
    for task in radbench.TASKS:
        name = "named" if task in ("modality", "diagnosis") else "bleu"
        if f"{task}/{name}" in scores:
            part = f"{task} {scoring.TITLES[name]} {scores[f'{task}/{name}']:.1%}"
            parts.append(part + (f" ({failed:.0%} failed)" if (failed := scores[f"{task}/failed"]) else ""))
    return ", ".join(parts)
