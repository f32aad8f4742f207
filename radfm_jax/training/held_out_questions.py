"""Answers in words to held-out questions while a model learns, scored as RadBench scores them.

    WORKDIR/answers/STEP/questions.jsonl   what is asked, the same after every evaluation
    WORKDIR/answers/STEP/answers.jsonl     what was said (answers.failed.jsonl: why not)
    WORKDIR/answers/STEP/scores.jsonl      each answer beside its references, and what it is worth

These files hold texts of the data; nothing of them is shown in the log.
"""

from __future__ import annotations

import collections
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from input_pipeline.config import DataConfig
from input_pipeline.datasets import sample_rng
from input_pipeline.files import write_json_lines
from input_pipeline.index.index import Index
from input_pipeline.samples import RowError
from input_pipeline.sources import open_sources, terms_of
from input_pipeline.text.tokenizer import Tokenizer
from radfm_jax.evaluate import model_answers, radbench, radbench_build, scoring
from radfm_jax.inference import Generator, inputs
from radfm_jax.training.experiment import Experiment

TRIES = 50  # rows that are looked at for each question wanted


class HeldOutAnswers:
    """Asks the same questions whenever it is called.

    Args:
      config: `train.eval_answers` questions of each source of `data.test`.
    Raises:
      ValueError: no source has a question; several processes, of which none has all parameters.

    Attributes:
      description: what is asked, and which source has fewer questions than are wanted.
    """

    def __init__(self, config: Experiment, workdir: Path, mesh: jax.sharding.Mesh):
        if jax.process_count() > 1:
            raise ValueError(
                f"train.eval_answers is {config.train.eval_answers}: one process alone can answer, and there are "
                f"{jax.process_count()}; set it to 0, and score what is saved with `python -m radfm_jax.evaluate "
                "radbench`"
            )
        self.config, self.directory, self.mesh = config, workdir / "answers", mesh
        self.questions, lacking = questions_of(config.data, config.train.eval_answers)
        fewer = "; ".join(f"{name}: {why}" for name, why in lacking.items())
        if not self.questions:
            why = fewer or "data.test names none"
            raise ValueError(f"train.eval_answers: no test source has a question with an answer to compare ({why})")
        self.description = f"asked at every evaluation: {len(self.questions)} held-out questions"
        self.description += f" ({fewer})" if fewer else ""
        self.tokenizer, self.terms = Tokenizer(config.data.tokenizer), terms_of(config.data.terms)

    def __call__(self, params: dict, step: int, alive: Callable[[], None] = lambda: None) -> dict[str, float]:
        """task/metric (scoring.TITLES) -> value, and task/failed, the share of questions without a usable answer.

        Args:
          params: on the mesh of the run.
          alive: called after every few answers; what it raises ends the asking.
        """
        directory = self.directory / str(step)
        if directory.exists():  # of a start that was cut short, or went on from an earlier step
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
        given = model_answers.read_answers(directory / "answers.jsonl", self.questions)
        scored = scoring.score(self.questions, given, self.terms)
        write_json_lines(directory / "scores.jsonl", (one.to_dict() for one in scored))
        found = {}
        for task in radbench.TASKS:
            if some := [one for one in scored if one.question.task == task]:
                values = scoring.intervals(some, resamples=0, seed=0, by_study=False)
                found |= {f"{task}/{name}": of.value for name, of in values.items() if np.isfinite(of.value)}
                found[f"{task}/failed"] = sum(bool(one.error) for one in some) / len(some)
        return found


def questions_of(config: DataConfig, count: int) -> tuple[list[radbench.Question], dict[str, str]]:
    """`count` questions of each test source, drawn by the data's seed among the rows that `prepare` found good; and
    source -> why it has fewer. Their wording is the one that the evaluation's loss is about."""
    index = Index(config.index)
    questions, lacking = [], {}
    for name, dataset in open_sources(config, "test").items():
        rows = np.flatnonzero(~index.bad_rows(name))
        order = sample_rng(config.seed, 0, name, "answers").permutation(rows)[: TRIES * count]
        found, left_out = [], collections.Counter()
        for row in order.tolist():
            row_id = dataset.row_id(row)
            try:
                sample = dataset.sample(row, sample_rng(config.seed, 0, name, row_id))
                if sample.task not in radbench.TASKS:
                    raise radbench_build.Skipped(f"{sample.task} is no question")
                question = radbench_build.question_of(sample, name, sample.task, f"{name}/{row_id}", Path(dataset.root))
            except (RowError, radbench_build.Skipped) as error:
                left_out[error.reason if isinstance(error, RowError) else str(error)] += 1
                continue
            found.append(question)
            if len(found) == count:
                break
        if len(found) < count:
            reasons = [f"{n} x {why}" for why, n in left_out.most_common(3)] or ["it has no more good rows"]
            lacking[name] = f"{len(found)} of {count} questions, {', '.join(reasons)}"
        questions += found
    return questions, lacking


def line(found: dict[str, float]) -> str:
    """What the log says of them."""
    chosen = {"modality": "accuracy", "diagnosis": "accuracy"}
    parts = []
    for task in radbench.TASKS:
        name = chosen.get(task, "bleu")
        if f"{task}/{name}" in found:
            part = f"{task} {scoring.TITLES[name]} {found[f'{task}/{name}']:.1%}"
            parts.append(part + (f" ({failed:.0%} failed)" if (failed := found[f"{task}/failed"]) else ""))
    return ", ".join(parts)
