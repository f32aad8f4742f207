"""`python -m radfm_jax.evaluate`: held-out rows to the letter; RadBench; grades of people."""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import absl.logging
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from input_pipeline import command_line
from input_pipeline.index.index import Index
from input_pipeline.sources import terms_of
from radfm_jax.checkpoints import checkpoint
from radfm_jax.evaluate import clinical, exact_match, model_answers, published, radbench, ratings, report, scoring
from radfm_jax.evaluate.export import export
from radfm_jax.evaluate.metrics import Interval

COMMANDS = """\
commands:
  radbench  RadBench: questions, answers, scores, report
  ratings   reads the grades of a rating sheet back
`python -m radfm_jax.evaluate radbench --help` and `... ratings --help` say more. Without a command:
"""
RADBENCH = """\
Asks a checkpoint the questions of a benchmark and scores it, and any other model whose answers lie in a file, beside
the published rows of the paper. docs/evaluation.md has the protocol. Research only, not for clinical use.
"""
RADBENCH_EPILOG = """\
examples:
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --checkpoint=radfm/ --out=scores
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --export=for_others
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --checkpoint=radfm/ --out=scores \\
      --answers MedVInT=medvint.jsonl --answers GPT-4V=gpt4v.jsonl --rating-sheet=scores/rating.html
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --config.limit=200 --config.index=data/index ...

--out holds questions.jsonl, answers/, scores/, report.html, report.md, report.json, scores.csv, pictures/, leaks.jsonl.
Answers that are there are kept: the same command goes on where it was stopped, and scores without asking when all is
answered. A data set that is not there is named in the report, and so is whatever failed, which counts as wrong.

exit codes: 0 done; 1 scored, but some questions have no answer (the same command asks those again that failed, not
those answered with nothing) or are known to the training data (--allow-leaks); 2 a mistake in what was given; 130
interrupted.
"""


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["radbench"]:
        return _guarded(_radbench, argv[1:])
    if argv[:1] == ["ratings"]:
        return _guarded(_ratings, argv[1:])
    if argv and not argv[0].startswith("-"):
        print(f"error: {argv[0]!r} is no command: radbench, ratings, or none of them", file=sys.stderr)
        return 2
    if {"-h", "--help"} & set(argv):
        print(COMMANDS)
    return exact_match.main(argv)


def _guarded(command, argv: list[str]) -> int:
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns about merges that it rightly skips
    try:
        return command(argv)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


# --- RadBench ---------------------------------------------------------------------------------------------------------


def _radbench(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m radfm_jax.evaluate radbench",
        description=RADBENCH,
        epilog=RADBENCH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_config(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where answers, scores and the report are written")
    ours = parser.add_argument_group("a checkpoint")
    ours.add_argument("--checkpoint", type=Path, metavar="DIR", help="a run, one of its steps, or converted weights")
    ours.add_argument("--name", help="what the report calls it (default: the directory's name)")
    ours.add_argument("--batch", type=int, default=8, help="questions at a time (default: 8)")
    ours.add_argument("--max-new-tokens", type=int, help="of an answer; default: 200, as the released model's")
    ours.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32")
    ours.add_argument("--int8", action="store_true", help="the language model's matrices as int8")
    ours.add_argument("--devices", type=int, help="how many share the model (default: as many as its heads divide)")
    ours.add_argument("--tokenizer", type=Path, metavar="FILE", help="SentencePiece model of a checkpoint without one")
    others = parser.add_argument_group("other models")
    others.add_argument("--export", type=Path, metavar="DIR", help="write the questions, and a slice of every scan")
    others.add_argument(
        "--answers", action="append", default=[], metavar="NAME=FILE", help="score these answers; repeat it for more"
    )
    more = parser.add_argument_group("beside the scores")
    more.add_argument(
        "--clinical", default="", metavar="A,B", help=f"by RadEval, if it is there: {', '.join(clinical.NAMES)}"
    )
    more.add_argument(
        "--rating-sheet", type=Path, metavar="FILE.html", help="a blinded page for people to grade answers"
    )
    more.add_argument("--rating-cases", type=int, default=40, help="questions on it (default: 40)")
    more.add_argument("--no-reference", action="store_true", help="do not show the data set's answer on it")
    more.add_argument("--allow-leaks", action="store_true", help="no exit code 1 for test studies in the training data")
    args, config = command_line.parse(parser, argv)
    if not (args.checkpoint or args.answers or args.export):
        parser.error("nothing to do: give --checkpoint, --answers or --export")
    if (args.checkpoint or args.answers) and not args.out:
        parser.error("--out DIR is needed: where the scores are written")
    if args.rating_sheet and not (args.checkpoint or args.answers):
        parser.error("--rating-sheet needs answers: --checkpoint or --answers")
    if args.batch < 1 or args.rating_cases < 1:
        parser.error(f"--batch is {args.batch}, --rating-cases {args.rating_cases}: at least 1")
    wanted = [name for name in args.clinical.split(",") if name]
    clinical.check(wanted)
    files = _named(args)
    benchmark = radbench.Benchmark.from_dict(config)
    console = Console(stderr=True)
    bench = radbench.build(benchmark)
    for name, why in bench.missing.items():
        console.print(f"not scored: {benchmark.title(name)}: {why}", highlight=False, markup=False, soft_wrap=True)
    if not bench.questions:
        raise ValueError(
            "no data set of the config can be asked: " + "; ".join(bench.missing[s] for s in benchmark.sets)
        )
    sets = len({q.dataset for q in bench.questions})
    console.print(f"{len(bench.questions):,} questions of {sets} data sets", highlight=False)
    if args.export:
        _export(bench.questions, args.export, console)
    if not files and not args.checkpoint:
        return 0
    # Whatever scoring would refuse is refused before hours of answering.
    terms = terms_of(benchmark.terms)
    if benchmark.index:
        Index(benchmark.index)
    for file in files.values():
        model_answers.read_answers(file, bench.questions)
    made = {name: f"given in {file}" for name, file in files.items()}
    if args.checkpoint:
        name = args.name or args.checkpoint.resolve().name
        made = {name: _answer(args, name, bench.questions, console)} | made
        files = {name: _answer_file(args.out, name)} | files
    else:
        _write_questions(bench.questions, args.out)
    return _score(args, benchmark, bench, files, made, wanted, terms, console)


def _write_questions(questions: Sequence[radbench.Question], out: Path) -> None:
    """questions.jsonl, unless it belongs to answers that lie beside it."""
    file, fresh = out / "questions.jsonl", out / "questions.new.jsonl"
    radbench.write_questions(questions, fresh)
    answered = sorted((out / "answers").glob("*.jsonl"))
    if file.exists() and answered and file.read_bytes() != fresh.read_bytes():
        fresh.unlink()
        raise ValueError(f"{file} holds other questions, to which {answered[0]} answers: write elsewhere")
    fresh.replace(file)


def _named(args: argparse.Namespace) -> dict[str, Path]:
    """name -> file of --answers."""
    found: dict[str, Path] = {}
    names = [args.name or args.checkpoint.resolve().name] if args.checkpoint else []
    for given in args.answers:
        name, _, file = given.partition("=")
        if not name or not file:
            raise ValueError(f"--answers {given}: write NAME=FILE")
        if name in names:
            raise ValueError(f"--answers {given}: there are two models called {name}")
        if other := [n for n in names if _stem(n) == _stem(name)]:
            raise ValueError(
                f"the scores of {other[0]} and {name} would lie in one file, {_stem(name)}.jsonl: rename one"
            )
        names.append(name)
        found[name] = Path(file)
    return found


def _stem(name: str) -> str:
    """What the files of a model are called."""
    return re.sub(r"[^\w.-]+", "_", name)


def _answer_file(out: Path, name: str) -> Path:
    return out / "answers" / f"{_stem(name)}.jsonl"


def _bar(console: Console, what: str) -> Progress:
    said = TextColumn("{task.fields[said]}")
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), said)
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _export(questions, directory: Path, console: Console) -> None:
    with _bar(console, "slices") as bar:
        task = bar.add_task("", total=None, said="")
        failed = export(questions, directory, lambda done, total: bar.update(task, completed=done, total=total))
    console.print(f"exported: {directory}, {len(failed)} scans without a picture", highlight=False, markup=False)
    for path, why in list(failed.items())[:10]:
        console.print(f"  {path}: {why}", style="red", highlight=False, markup=False, soft_wrap=True)


def _answer(args: argparse.Namespace, name: str, questions, console: Console) -> str:
    """Answers what is not answered yet. Returns what the report says of where the answers come from."""
    from radfm_jax.inference import Sampling
    from radfm_jax.inference.command import load

    options = {"preprocess": None, "size_2d": None, "size_3d": None, "depth": None, "no_verify": False}
    given = {k: getattr(args, k) for k in ("checkpoint", "dtype", "int8", "devices", "tokenizer")}
    model = load(argparse.Namespace(**options, **given))
    sampling = Sampling(args.max_new_tokens)
    with _bar(console, "answers") as bar:
        task, began = bar.add_task("", total=None, said=""), time.perf_counter()

        def progress(done: int, failed: int, total: int) -> None:
            said = f"{failed} failed, {done / (time.perf_counter() - began):.2f} samples/s"
            bar.update(task, completed=done + failed, total=total, said=said)
            if not console.is_terminal and ((done + failed) // args.batch) % 50 == 0:
                console.print(f"{done + failed}/{total}, {said}", highlight=False)

        outcome = model_answers.answer_all(
            model.generator, questions, _answer_file(args.out, name), args.out / "questions.jsonl",
            model=str(model.directory.resolve()), checkpoint=checkpoint.digest(model.directory), sampling=sampling,
            batch=args.batch, progress=progress,
        )  # fmt: skip
    rate = outcome.answered / max(outcome.seconds, 1e-9)
    console.print(
        f"{outcome.answered} answers in {outcome.seconds:.1f} s ({rate:.2f} samples/s), {outcome.before} were there, "
        f"{len(outcome.failed)} failed",
        highlight=False,
    )
    how = f"greedy, {args.dtype}, weights in {model.generator.weights}, at most {args.max_new_tokens or 200} tokens"
    return f"checkpoint {model.directory}, {how}"


def _score(
    args, benchmark, bench, files: dict[str, Path], made: dict[str, str], wanted, terms, console: Console
) -> int:
    answers = {name: model_answers.read_answers(file, bench.questions) for name, file in files.items()}
    if benchmark.index:
        said = f"looking for test studies and scans in {benchmark.index}, reading every scan for its SHA-256"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    leaks = radbench.leaks(bench.questions, benchmark.index) if benchmark.index else None
    if leaks is not None:
        radbench.write_lines(args.out / "leaks.jsonl", leaks)
    scored, lines = {}, []
    for name, given in answers.items():
        console.print(f"scoring {name}", highlight=False, markup=False)
        scored[name] = scoring.score(bench.questions, given, terms)
        file = args.out / "scores" / _answer_file(args.out, name).name
        radbench.write_lines(file, (one.to_dict() for one in scored[name]))
        lines += scoring.tables(
            name, scored[name], resamples=benchmark.resamples, seed=benchmark.seed, by_study=benchmark.by_study
        )
    found = {name: _clinical(of, wanted, console) for name, of in scored.items()} if wanted else {}
    run = report.Run(benchmark, bench, scored, lines, leaks, found, made)
    report.write(run, args.out)
    console.print(_table(run), highlight=False, soft_wrap=True)
    for name, of in scored.items():
        failed = [one for one in of if one.error]
        for one in failed[:3]:
            said = f"{name} failed at {one.question.row_id}: {one.error}"
            console.print(said, style="red", highlight=False, markup=False, soft_wrap=True)
        if len(failed) > 3:
            console.print(f"... and {len(failed) - 3:,} more, see report.json", style="red", highlight=False)
    for line in report.caveats(run):
        console.print(f"- {line}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {args.out / 'report.html'}", highlight=False, markup=False)
    if args.rating_sheet:
        key = ratings.write_sheet(
            scored, args.rating_sheet, cases=args.rating_cases, seed=benchmark.seed, references=not args.no_reference
        )
        said = f"rating sheet: {args.rating_sheet}; who is who: {key}"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    failed = sum(bool(one.error) for of in scored.values() for one in of)
    return 1 if failed or (leaks and not args.allow_leaks) else 0


def _clinical(scored, wanted: Sequence[str], console: Console) -> dict:
    """task -> metric -> value, or why there is none."""
    found: dict[str, dict] = {}
    for task in clinical.TASKS:
        some = [one for one in scored if one.question.task == task]
        for name in wanted if some else ():
            try:
                pairs = [one.given.text for one in some], [one.question.references[0] for one in some]
                found.setdefault(task, {}).update(clinical.clinical(name, *pairs))
            except clinical.Unavailable as why:
                found.setdefault(task, {})[name] = f"not scored: {why}"
                console.print(f"{name} not scored: {why}", style="red", highlight=False, markup=False, soft_wrap=True)
    return found


def _table(run: report.Run) -> Table:
    """A line a metric and model, below their task, so that any number of models fits; and what the paper has for
    RadFM."""
    table = Table("task, metric", "model", Column("per cent", justify="right"), "95 % interval", box=box.SIMPLE_HEAD)
    for task, title in radbench.TASKS.items():
        lines = report.of_lines(run, "task", task)
        theirs = published.values("RadFM", task) if task in run.comparable else {}
        if lines:
            table.add_section()
            table.add_row(Text(title, style="bold"))
        for name in report.columns(lines):
            found = [(line.model, line.metrics[name]) for line in lines if name in line.metrics]
            found += [("RadFM, published", Interval(*theirs[name]))] if name in theirs else []
            for k, (model, interval) in enumerate(found):
                value, _, around = report.percent(interval).partition(" ")
                table.add_row("" if k else f"  {scoring.TITLES[name]}", Text(model, overflow="fold"), value, around)
    return table


# --- grades -----------------------------------------------------------------------------------------------------------


def _ratings(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m radfm_jax.evaluate ratings",
        description="Means of the grades that people gave on a rating sheet, their 95 % intervals, and agreement.",
        epilog="exit codes: 0 done; 2 a file that is no grades of this sheet.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="what raters saved: ratings-*.json")
    parser.add_argument("--key", required=True, type=Path, metavar="FILE", help="SHEET.key.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write DIR/ratings.json")
    args = parser.parse_args(argv)
    found = ratings.summary(ratings.read(args.key, args.files))
    for table in ratings.tables(found):
        Console().print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "ratings.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
