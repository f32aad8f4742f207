"""The results of a benchmark: scores of all models, as tables and as statements about them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

from radfm_jax.evaluate import published
from radfm_jax.evaluate.metrics import Interval
from radfm_jax.evaluate.plausibility import REMEDY, GivenAnswer, implausible
from radfm_jax.evaluate.radbench import DATASETS, TASKS, Benchmark
from radfm_jax.evaluate.radbench_build import BuiltBenchmark
from radfm_jax.evaluate.scoring import TITLES, ScoredAnswer, ScoreRow

Table = tuple[list[str], list[list[str]]]
"""Head and rows."""


@dataclasses.dataclass
class Results:
    """Questions, scores and the other contents of a report."""

    benchmark: Benchmark
    built: BuiltBenchmark
    scored: Mapping[str, Sequence[ScoredAnswer]]  # model -> its answers to all questions
    rows: Sequence[ScoreRow]  # rows of the tables, for all models
    leaks: list[dict] | None = None  # leaks.find_leaks; None if the training data were not searched
    # model -> task -> metric -> value, or why it has none
    clinical: Mapping[str, Mapping[str, Mapping[str, float | str]]] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, str] = dataclasses.field(default_factory=dict)  # model -> where its answers come from

    @property
    def comparable(self) -> set[str]:
        """Return the tasks with questions from the paper's data sets. Only these get rows of published results."""
        return {q.task for q in self.built.questions if q.dataset in DATASETS}

    def rows_of(self, grouping: str, task: str) -> list[ScoreRow]:
        return [row for row in self.rows if (row.grouping, row.task) == (grouping, task)]


def warnings_of(results: Results) -> list[str]:
    """Return why the answers of a model are implausible (plausibility.py), by model and task."""
    lines = []
    for model, answers in results.scored.items():
        for task, title in TASKS.items():
            given = [
                GivenAnswer(a.answer.text, a.question.references[0], a.answer.ended == "length")
                for a in answers
                if a.question.task == task and not a.error
            ]
            lines += [f"{model}, {title}: {reason}; {REMEDY}" for reason in implausible(given)]
    return lines


def caveats(results: Results) -> list[str]:
    """Return the differences from Table 4 of the paper."""
    scored_sets = {q.dataset for q in results.built.questions}
    lines = [f"{len(scored_sets & DATASETS.keys())} of RadBench's {len(DATASETS)} data sets were scored"]
    if other := sorted(scored_sets - DATASETS.keys()):
        lines.append(f"other data sets were scored: {', '.join(map(results.benchmark.title, other))}")
    if unpublished := [title for task, title in TASKS.items() if task not in results.comparable]:
        lines.append(f"no published results for {', '.join(unpublished)}: no data set of the paper was scored")
    if any(reason.startswith("more than limit") for reasons in results.built.skipped.values() for reason in reasons):
        lines.append("some data sets were reduced by `limit`")
    if not results.benchmark.terms.startswith("umls:"):
        lines.append(f"medical terms are from `{results.benchmark.terms}`, not from UMLS")
    if results.leaks is None:
        lines.append("the training data were not searched for test studies: the config has no `index`")
    elif results.leaks:
        leaked = len({leak["id"] for leak in results.leaks})
        total = len(results.built.questions)
        lines.append(f"{leaked:,} of {total:,} questions are about studies or scans of the training data")
    lines.append("the authors did not publish their prompts, balance of yes and no, and random splits: ours differ")
    return lines


def method(results: Results) -> str:
    """Return how the intervals were computed."""
    unit = "studies" if results.benchmark.by_study else "samples"
    return (
        f"per cent, with 95 % intervals: percentiles of {results.benchmark.resamples:,} bootstrap resamples of {unit}, "
        f"seed {results.benchmark.seed}; the width is 0 if all answers are correct or none is; the paper does not "
        "state its method"
    )


def not_scored(results: Results) -> list[str]:
    """Return a line per missing data set, and per reason for skipped rows."""
    title = results.benchmark.title
    return [f"{title(name)}: {why}" for name, why in results.built.missing.items()] + [
        f"{title(name)}: {n:,} rows skipped: {why}"
        for name, reasons in results.built.skipped.items()
        for why, n in reasons.items()
    ]


def columns(rows: Sequence[ScoreRow]) -> list[str]:
    return [name for name in TITLES if any(name in row.metrics for row in rows)]


def task_table(results: Results, task: str) -> Table | None:
    """Return the head and rows of a task's table, published rows first; None if the task was not scored."""
    rows = results.rows_of("task", task)
    return _table(rows, task=task if task in results.comparable else "") if rows else None


def grouped_tables(results: Results, grouping: str) -> dict[str, Table]:
    """Return task title -> head and rows of the table by data set, modality or anatomy."""
    group_title = results.benchmark.title if grouping == "data set" else str
    rows = {title: results.rows_of(grouping, task) for task, title in TASKS.items()}
    return {title: _table(task_rows, group_title=group_title) for title, task_rows in rows.items() if task_rows}


def _table(rows: Sequence[ScoreRow], task: str = "", group_title=str) -> Table:
    """Return head and rows, including the published rows of `task`."""
    names = columns(rows)
    if task:
        names = [n for n in TITLES if n in names or n in published.TABLE[task]]
    grouped = any(row.group for row in rows)
    head = [*(["group"] if grouped else []), "model", "questions", "failed", "refused", *(TITLES[n] for n in names)]
    body = []
    for model in published.MODELS if task else ():
        values = published.values(model, task)
        cells = [percent(Interval(*values[n])) if n in values else "" for n in names]
        body.append([f"{model} (published)", f"{published.CASES[task]:,}", "", "", *cells])
    for row in sorted(rows, key=lambda row: row.group):
        group = [group_title(row.group)] if grouped else []
        cells = [percent(row.metrics[n]) if n in row.metrics else "" for n in names]
        body.append([*group, row.model, f"{row.questions:,}", f"{row.failed:,}", f"{row.refused:,}", *cells])
    return head, body


def percent(i: Interval) -> str:
    """Format like Table 4: `31.43 (31.20, 31.65)`."""
    if not math.isfinite(i.value):
        return "none"
    return f"{100 * i.value:.2f} ({100 * i.low:.2f}, {100 * i.high:.2f})"
