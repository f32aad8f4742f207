"""`python -m radfm_jax.evaluate radbench`: questions, answers, scores and report of a benchmark."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict
from rich import box
from rich.table import Column, Table
from rich.text import Text

from input_pipeline import command_line
from input_pipeline.files import write_json_lines
from input_pipeline.index.index import Index
from input_pipeline.sources import terms_of
from radfm_jax import terminal
from radfm_jax.checkpoints import checkpoint
from radfm_jax.evaluate import clinical, model_answers, published, ratings, report, scoring
from radfm_jax.evaluate.export import export
from radfm_jax.evaluate.leaks import find_leaks
from radfm_jax.evaluate.metrics import Interval
from radfm_jax.evaluate.radbench import TASKS, Benchmark, Question
from radfm_jax.evaluate.radbench_build import build, write_questions
from radfm_jax.evaluate.results import Results, caveats, columns, percent
from radfm_jax.inference import Sampling
from radfm_jax.inference.command import add_model_options, load
from radfm_jax.runtime import console

DESCRIPTION = """\
Score a checkpoint, and other models from files of their answers, on the questions of a benchmark, next to the published
results of the paper. docs/evaluate.md has the protocol. Research only, not for clinical use.
"""
EPILOG = """\
examples:
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --checkpoint=radfm/ --out=scores
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --export=for_others
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --checkpoint=radfm/ --out=scores \\
      --answers MedVInT=medvint.jsonl --answers GPT-4V=gpt4v.jsonl --rating-sheet=scores/rating.html
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --config.limit=200 --config.index=data/index ...

--out receives questions.jsonl, answers/, scores/, report.html, report.md, report.json, scores.csv, pictures/ and
leaks.jsonl. Existing answers are kept: run the same command again to resume, or to score without generation when all
questions are answered. The report lists missing data sets, and failed questions, which count as wrong.

exit codes: 0 success; 1 scored, but some questions have no answer (the same command retries failed questions, but not
empty answers) or are about training data (see --allow-leaks); 2 invalid arguments or files; 130 interrupted.
"""


def _parse(argv: list[str]) -> tuple[argparse.Namespace, ConfigDict]:
    parser = terminal.parser("python -m radfm_jax.evaluate radbench", DESCRIPTION, EPILOG)
    command_line.add_config(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="output directory of answers, scores and report")
    model = parser.add_argument_group("checkpoint")
    add_model_options(model)
    model.add_argument("--name", help="name in the report (default: that of the directory)")
    others = parser.add_argument_group("other models")
    others.add_argument("--export", type=Path, metavar="DIR", help="write the questions, and a slice of each scan")
    others.add_argument(
        "--answers", action="append", default=[], metavar="NAME=FILE", help="score these answers; repeat for more"
    )
    extras = parser.add_argument_group("in addition to the scores")
    extras.add_argument(
        "--clinical", default="", metavar="A,B", help=f"metrics by RadEval, if installed: {', '.join(clinical.NAMES)}"
    )
    extras.add_argument("--rating-sheet", type=Path, metavar="FILE.html", help="write a blinded page for human raters")
    extras.add_argument("--rating-cases", type=int, default=40, help="questions on the page (default: 40)")
    extras.add_argument("--no-reference", action="store_true", help="omit the reference answers from the page")
    extras.add_argument("--allow-leaks", action="store_true", help="no exit code 1 for test studies in training data")
    args, config = command_line.parse(parser, argv)
    if not (args.checkpoint or args.answers or args.export):
        parser.error("one of --checkpoint, --answers and --export is required")
    if (args.checkpoint or args.answers) and not args.out:
        parser.error("--checkpoint and --answers need --out DIR")
    if args.rating_sheet and not (args.checkpoint or args.answers):
        parser.error("--rating-sheet needs --checkpoint or --answers")
    if args.batch < 1 or args.rating_cases < 1:
        parser.error(f"--batch (got {args.batch}) and --rating-cases (got {args.rating_cases}) must be at least 1")
    if args.checkpoint:
        args.name = args.name or args.checkpoint.resolve().name
    return args, config


def main(argv: list[str]) -> int:
    args, config = _parse(argv)
    return terminal.run(lambda: _main(args, config))


def _main(args: argparse.Namespace, config: ConfigDict) -> int:
    clinical_metrics = [name for name in args.clinical.split(",") if name]
    clinical.check(clinical_metrics)
    answer_files = _answer_files(args)
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
    if args.export:
        _export(built.questions, args.export)
    if not answer_files and not args.checkpoint:
        return 0
    # Check the inputs of scoring before hours of generation.
    terms = terms_of(benchmark.terms, tuple(benchmark.umls_types))
    if benchmark.index:
        Index(benchmark.index)
    for file in answer_files.values():
        model_answers.read_answers(file, built.questions)
    sources = {name: f"from {file}" for name, file in answer_files.items()}
    if args.checkpoint:
        file = args.out / "answers" / f"{_stem(args.name)}.jsonl"
        sources = {args.name: _generate(args, file, built.questions)} | sources
        answer_files = {args.name: file} | answer_files
    else:
        _replace_questions(built.questions, args.out)
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
        write_json_lines(args.out / "scores" / f"{_stem(name)}.jsonl", (a.to_dict() for a in scored[name]))
        rows += scoring.score_rows(name, scored[name], **bootstrap)
    by_model = {name: _clinical(answers, clinical_metrics) for name, answers in scored.items()}
    _report(args, Results(benchmark, built, scored, rows, leaks, by_model if clinical_metrics else {}, sources))
    failed = any(a.error for answers in scored.values() for a in answers)
    return 1 if failed or (leaks and not args.allow_leaks) else 0


def _answer_files(args: argparse.Namespace) -> dict[str, Path]:
    """Return name -> file of --answers. Raises ValueError if two models share a name or a file of scores."""
    answer_files: dict[str, Path] = {}
    names = [args.name] if args.checkpoint else []
    for option in args.answers:
        name, _, file = option.partition("=")
        if not name or not file:
            raise ValueError(f"--answers {option}: write NAME=FILE")
        if name in names:
            raise ValueError(f"--answers {option}: two models are called {name}")
        if other := [n for n in names if _stem(n) == _stem(name)]:
            raise ValueError(f"the scores of {other[0]} and {name} would share {_stem(name)}.jsonl: rename one")
        names.append(name)
        answer_files[name] = Path(file)
    return answer_files


def _stem(name: str) -> str:
    """Return the stem of a model's file names."""
    return re.sub(r"[^\w.-]+", "_", name)


def _replace_questions(questions: Sequence[Question], out: Path) -> None:
    """Write questions.jsonl. Raises ValueError if generated answers belong to other questions."""
    file, new_file = out / "questions.jsonl", out / "questions.new.jsonl"
    write_questions(questions, new_file)
    generated = sorted((out / "answers").glob("*.jsonl"))
    if file.exists() and generated and file.read_bytes() != new_file.read_bytes():
        new_file.unlink()
        raise ValueError(f"{file} has other questions, which {generated[0]} answers: use another --out")
    new_file.replace(file)


def _export(questions: Sequence[Question], directory: Path) -> None:
    with terminal.progress_bar("slices") as bar:
        task = bar.add_task("", total=None)
        failed = export(questions, directory, lambda done, total: bar.update(task, completed=done, total=total))
    terminal.message(f"exported: {directory}, {len(failed)} scans without a slice")
    for path, error in list(failed.items())[:10]:
        terminal.message(f"  {path}: {error}", style="red")


def _generate(args: argparse.Namespace, file: Path, questions: Sequence[Question]) -> str:
    """Generate missing answers. Returns the source of the answers, for the report."""
    model = load(args)
    with terminal.answer_progress(every=50) as progress:
        result = model_answers.generate_answers(
            model.generator, questions, file, args.out / "questions.jsonl",
            model=str(model.directory.resolve()), checkpoint=checkpoint.digest(model.directory),
            sampling=Sampling(args.max_new_tokens), batch=args.batch, progress=progress,
        )  # fmt: skip
    terminal.message(result.summary())
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
    for caveat in caveats(results):
        terminal.message(f"- {caveat}")
    terminal.message(f"report: {args.out / 'report.html'}")
    if args.rating_sheet:
        key = ratings.write_sheet(
            results.scored, args.rating_sheet, cases=args.rating_cases, seed=results.benchmark.seed,
            references=not args.no_reference,
        )  # fmt: skip
        terminal.message(f"rating sheet: {args.rating_sheet}; its key: {key}")


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
