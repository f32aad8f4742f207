"""`python -m radfm_jax.evaluate radbench`: questions, answers, scores and report of a benchmark."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from rich import box
from rich.table import Column, Table
from rich.text import Text

from input_pipeline.field_rules import errors_of
from input_pipeline.files import parse_json, read_json_lines, write_json_lines
from input_pipeline.index.index import Index
from input_pipeline.sources import terms_of
from radfm_jax import terminal
from radfm_jax.checkpoints import checkpoint
from radfm_jax.evaluate import (
    clinical,
    endpoint_command,
    lmms_eval,
    model_answers,
    published,
    radbench_options,
    ratings,
    report,
    rexrank,
    scoring,
)
from radfm_jax.evaluate.endpoint import Baseline, save_montages
from radfm_jax.evaluate.export import export
from radfm_jax.evaluate.leaks import find_leaks
from radfm_jax.evaluate.metrics import Interval
from radfm_jax.evaluate.plausibility import few_steps
from radfm_jax.evaluate.radbench import TASKS, Benchmark, Question
from radfm_jax.evaluate.radbench_build import build, write_questions, write_roots
from radfm_jax.evaluate.radbench_options import stem
from radfm_jax.evaluate.results import Results, caveats, columns, percent, warnings_of
from radfm_jax.inference import Sampling
from radfm_jax.inference.batch_run import model_name
from radfm_jax.inference.command import load
from radfm_jax.runtime import console


def main(argv: list[str]) -> int:
    args, config = radbench_options.parse(argv)
    return terminal.run(lambda: _main(args, config))


def _main(args: argparse.Namespace, config: ConfigDict) -> int:
    clinical_metrics = [name for name in args.clinical.split(",") if name]
    clinical.check(clinical_metrics)
    answer_files = radbench_options.answer_files(args)
    baseline = endpoint_command.baseline(args) if args.endpoint else None
    with errors_of(args.config):
        benchmark = Benchmark.from_dict(config)
    built = build(benchmark)
    for name, why in built.missing.items():
        terminal.message(f"not scored: {benchmark.title(name)}: {why}")
    if not built.questions:
        raise ValueError(
            "no data set of the config has questions: " + "; ".join(built.missing[name] for name in benchmark.sets)
        )
    sets = len({q.dataset for q in built.questions})
    terminal.message(f"{len(built.questions):,} questions of {sets} data sets")
    _export(args, built.questions)
    if not (answer_files or args.checkpoint or baseline) or args.montages:
        return 0
    # Check the inputs of scoring now, because generation can take hours.
    terms = terms_of(benchmark.terms, tuple(benchmark.umls_types))
    if benchmark.index:
        Index(benchmark.index)
    for file in answer_files.values():
        model_answers.read_answers(file, built.questions)
    answered = _answer(args, baseline, answer_files, built.questions)
    if answered is None:
        return 1
    sources, answer_files = answered
    leaks = None
    if benchmark.index:
        terminal.message(f"searching {benchmark.index} for test studies and scans; this reads all scans")
        leaks = find_leaks(built.questions, benchmark.index)
        write_json_lines(args.out / "leaks.jsonl", leaks)
    scored, rows = {}, []
    bootstrap = {key: getattr(benchmark, key) for key in ("resamples", "seed", "by_study")}
    (args.out / "scores").mkdir(parents=True, exist_ok=True)
    for name, file in answer_files.items():
        terminal.message(f"scoring {name}")
        scored[name] = scoring.score(built.questions, model_answers.read_answers(file, built.questions), terms)
        write_json_lines(args.out / "scores" / f"{stem(name)}.jsonl", (a.to_dict() for a in scored[name]))
        rows += scoring.score_rows(name, scored[name], **bootstrap)
    by_model = {name: _clinical(answers, clinical_metrics) for name, answers in scored.items()}
    _report(args, Results(benchmark, built, scored, rows, leaks, by_model if clinical_metrics else {}, sources))
    failed = any(a.error for answers in scored.values() for a in answers)
    return 1 if failed or (leaks and not args.allow_leaks) else 0


def _answer(
    args: argparse.Namespace, baseline: Baseline | None, answer_files: dict[str, Path], questions: Sequence[Question]
) -> tuple[dict[str, str], dict[str, Path]] | None:
    """Make the missing answers of the checkpoint and of the endpoint.

    Returns name -> source of the answers, and name -> file; None if --limit left questions for the next run.
    """
    sources, files = {}, {}
    if args.checkpoint:
        files[args.name] = args.out / "answers" / f"{stem(args.name)}.jsonl"
        sources[args.name] = _generate(args, files[args.name], questions)
    else:
        _replace_questions(questions, args.out)
    if baseline:
        name = args.endpoint_name
        files[name] = args.out / "answers" / f"{stem(name)}.jsonl"
        sources[name] = baseline.description()
        if not endpoint_command.answer(args, baseline, questions, files[name]):
            return None
    return sources | {name: f"from {file}" for name, file in answer_files.items()}, files | answer_files


def _replace_questions(questions: Sequence[Question], out: Path) -> None:
    """Write questions.jsonl. Raises ValueError if generated answers belong to other questions."""
    file = out / "questions.jsonl"
    generated = sorted((out / "answers").glob("*.jsonl"))
    if file.exists() and generated and not _same_questions(file, questions):
        raise ValueError(f"{file} has other questions, which {generated[0]} answers: use another --out")
    write_questions(questions, file)
    write_roots(questions, out)


def _same_questions(file: Path, questions: Sequence[Question]) -> bool:
    """Whether a file has these questions. Older versions wrote absolute paths of scans."""
    lines = read_json_lines(file)
    absolute = [dataclasses.replace(question, root="") for question in questions]
    return any(lines == parse_json(json.dumps([q.to_dict() for q in written])) for written in (questions, absolute))


def _export(args: argparse.Namespace, questions: Sequence[Question]) -> None:
    """Write the output of --export, --lmms-eval and --montages."""
    failed = {}
    if args.export:
        with terminal.progress_bar("slices") as bar:
            task = bar.add_task("", total=None)
            failed |= export(questions, args.export, lambda done, total: bar.update(task, completed=done, total=total))
        terminal.message(f"exported: {args.export}")
    if args.lmms_eval:
        failed |= lmms_eval.export_task(questions, args.lmms_eval, endpoint_command.layout(args))
        terminal.message(f"task of lmms-eval: {args.lmms_eval}; its README.txt has the commands")
    if args.montages:
        failed |= save_montages(questions, endpoint_command.layout(args), args.montages)
        terminal.message(f"images: {args.montages}")
    if failed:
        terminal.message(f"{len(failed)} scans have no image:")
    for path, error in list(failed.items())[:10]:
        terminal.message(f"  {path}: {error}", style="red")


def _generate(args: argparse.Namespace, file: Path, questions: Sequence[Question]) -> str:
    """Generate missing answers. Returns the source of the answers, for the report."""
    model = load(args)
    with terminal.answer_progress(every=50) as progress:
        result = model_answers.generate_answers(
            model.generator, questions, file, args.out / "questions.jsonl",
            model=model_name(model.directory), checkpoint=checkpoint.digest(model.directory),
            sampling=Sampling(args.max_new_tokens), batch=args.batch, progress=progress,
        )  # fmt: skip
    terminal.message(result.summary())
    for warning in few_steps(model.directory):
        terminal.message(f"warning: {warning}", style="red")
    weights, limit = model.generator.weights, args.max_new_tokens or 200
    return f"checkpoint {model.directory}, greedy, {args.dtype}, weights in {weights}, at most {limit} tokens"


def _clinical(answers: Sequence[scoring.ScoredAnswer], names: Sequence[str]) -> dict:
    """Return task -> metric -> value, or why it has none."""
    values: dict[str, dict] = {}
    for task in clinical.TASKS:
        task_answers = [a for a in answers if a.question.task == task]
        for name in names if task_answers else ():
            texts = [a.answer.text for a in task_answers], [a.question.references[0] for a in task_answers]
            try:
                values.setdefault(task, {}).update(clinical.clinical(name, *texts))
            except clinical.Unavailable as error:
                values.setdefault(task, {})[name] = f"not scored: {error}"
                terminal.message(f"{name} not scored: {error}", style="red")
    return values


def _report(args: argparse.Namespace, results: Results) -> None:
    """Write the report and the rating sheet, and print the scores and some failures."""
    report.write(results, args.out)
    console.log(score_table(results))
    for name, answers in results.scored.items():
        failed = [a for a in answers if a.error]
        for a in failed[:3]:
            terminal.message(f"{name} failed at {a.question.row_id}: {a.error}", style="red")
        if len(failed) > 3:
            terminal.message(f"... and {len(failed) - 3:,} more failures, see report.json", style="red")
        if refused := sum(a.refused for a in answers):
            terminal.message(f"{name} refused to answer {refused:,} of {len(answers):,} questions")
    for warning in warnings_of(results):
        terminal.message(f"warning: {warning}", style="red")
    for caveat in caveats(results):
        terminal.message(f"- {caveat}")
    if args.rexrank is not None:
        for name, answers in results.scored.items():
            file = args.out / "rexrank" / f"{stem(name)}.json"
            terminal.message(rexrank.write_submission(answers, file, Path(args.rexrank) if args.rexrank else None))
    if args.rating_sheet:
        key = ratings.write_sheet(
            results.scored, args.rating_sheet, cases=args.rating_cases, seed=results.benchmark.seed,
            references=not args.no_reference,
        )  # fmt: skip
        terminal.message(f"rating sheet: {args.rating_sheet}; its key: {key}")
    terminal.message(
        f"results: {args.out / 'report.html'}; every answer with its scores: {args.out / 'scores'}\n"
        "next: open the page and read some wrong answers. To compare another model, run the same command with this "
        "--out and --checkpoint, --endpoint or --answers NAME=FILE"
    )


def score_table(results: Results) -> Table:
    """Return the table of the terminal: a row per task, metric and model, so that any number of models fits."""
    table = Table("task, metric", "model", Column("per cent", justify="right"), "95 % interval", box=box.SIMPLE_HEAD)
    for task, title in TASKS.items():
        rows = results.rows_of("task", task)
        radfm = published.values("RadFM", task) if task in results.comparable else {}
        if rows:
            table.add_section()
            table.add_row(Text(title, style="bold"))
        for name in columns(rows):
            values = [(row.model, row.metrics[name]) for row in rows if name in row.metrics]
            values += [("RadFM, published", Interval(*radfm[name]))] if name in radfm else []
            for k, (model, value) in enumerate(values):
                title = "" if k else f"  {scoring.TITLES[name]}"
                per_cent, _, interval = percent(value).partition(" ")
                table.add_row(title, Text(model, overflow="fold"), per_cent, interval)
    return table
