"""The options of `python -m radfm_jax.evaluate radbench`."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ml_collections import ConfigDict

from input_pipeline import command_line
from radfm_jax import terminal
from radfm_jax.evaluate import clinical, endpoint_command
from radfm_jax.inference.command import add_model_options

DESCRIPTION = """\
Score a checkpoint, a model behind an OpenAI-compatible endpoint, and other models from files of their answers, on the
questions of a benchmark, next to the published results of the paper. docs/evaluate.md has the protocol. Research only,
not for clinical use.
"""
EPILOG = """\
examples:
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --checkpoint=radfm/ --out=scores
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --endpoint=http://localhost:8000/v1 \\
      --model=google/medgemma-4b-it --out=scores
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --export=for_others
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --lmms-eval=radbench_task
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --checkpoint=radfm/ --out=scores \\
      --answers MedVInT=medvint.jsonl --answers GPT-4V=gpt4v.jsonl --rating-sheet=scores/rating.html
  python -m radfm_jax.evaluate radbench --config=configs/radbench.py --config.limit=200 --config.index=data/index ...

--out receives questions.jsonl, answers/, scores/, report.html, report.md, report.json, scores.csv, pictures/ and
leaks.jsonl. Existing answers are kept: run the same command again to resume, or to score without generation when all
questions are answered. The report lists missing data sets, and failed questions, which count as wrong.

exit codes:
  0    success
  1    some questions have no answer (the same command retries failed questions, but not empty answers), are about
       training data (see --allow-leaks), or were left for the next run by --limit
  2    invalid arguments or files, or an endpoint that rejects all requests
  130  interrupted
"""


def parse(argv: list[str]) -> tuple[argparse.Namespace, ConfigDict]:
    parser = terminal.parser("python -m radfm_jax.evaluate radbench", DESCRIPTION, EPILOG)
    command_line.add_config(parser)
    parser.add_argument("--out", type=Path, metavar="DIR", help="output directory of answers, scores and report")
    model = parser.add_argument_group("checkpoint")
    add_model_options(model)
    model.add_argument("--name", help="name in the report (default: that of the directory)")
    others = parser.add_argument_group("other models")
    others.add_argument("--export", type=Path, metavar="DIR", help="write the questions, and a slice of each scan")
    others.add_argument("--lmms-eval", type=Path, metavar="DIR", help="write the questions as a task of lmms-eval")
    others.add_argument(
        "--answers", action="append", default=[], metavar="NAME=FILE", help="score these answers; repeat for more"
    )
    endpoint_command.add_options(parser)
    extras = parser.add_argument_group("in addition to the scores")
    extras.add_argument(
        "--clinical", default="", metavar="A,B", help=f"metrics by RadEval, if installed: {', '.join(clinical.NAMES)}"
    )
    extras.add_argument("--rating-sheet", type=Path, metavar="FILE.html", help="write a blinded page for human raters")
    extras.add_argument("--rating-cases", type=int, default=40, help="questions on the page (default: 40)")
    extras.add_argument("--no-reference", action="store_true", help="omit the reference answers from the page")
    extras.add_argument(
        "--rexrank", nargs="?", const="", metavar="TEST.json", help="write the reports as ReXrank submissions, "
        "OUT/rexrank/NAME.json; with a test file of ReXrank, for its studies"
    )  # fmt: skip
    extras.add_argument("--allow-leaks", action="store_true", help="no exit code 1 for test studies in training data")
    args, config = command_line.parse(parser, argv)
    _check(parser, args)
    return args, config


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    endpoint_command.check(parser, args)
    scored = args.checkpoint or args.endpoint or args.answers
    if not (scored or args.export or args.lmms_eval or args.montages):
        parser.error("one of --checkpoint, --endpoint, --answers, --export, --lmms-eval and --montages is required")
    if scored and not args.out:
        parser.error("--checkpoint, --endpoint and --answers need --out DIR")
    for name in ("rating_sheet", "rexrank"):
        if getattr(args, name) is not None and not scored:
            parser.error(f"--{name.replace('_', '-')} needs --checkpoint, --endpoint or --answers")
    if args.batch < 1 or args.rating_cases < 1:
        parser.error(f"--batch (got {args.batch}) and --rating-cases (got {args.rating_cases}) must be at least 1")
    args.endpoint_name = (not args.checkpoint and args.name) or args.model
    if args.checkpoint:
        args.name = args.name or args.checkpoint.resolve().name


def answer_files(args: argparse.Namespace) -> dict[str, Path]:
    """Return {name: file} of --answers. Raises ValueError if two models share a name or a file of scores."""
    answer_files: dict[str, Path] = {}
    names = [args.name] if args.checkpoint else []
    if args.endpoint:
        names.append(args.endpoint_name)
        if args.checkpoint and stem(args.name) == stem(args.endpoint_name):
            raise ValueError(f"the checkpoint and the model at the endpoint are both called {args.name}: add --name")
    for option in args.answers:
        name, _, file = option.partition("=")
        if not name or not file:
            raise ValueError(f"--answers {option}: write NAME=FILE")
        if name in names:
            raise ValueError(f"--answers {option}: two models are called {name}")
        if other := [n for n in names if stem(n) == stem(name)]:
            raise ValueError(f"the scores of {other[0]} and {name} would share {stem(name)}.jsonl: rename one")
        names.append(name)
        answer_files[name] = Path(file)
    return answer_files


def stem(name: str) -> str:
    """Return the stem of a model's file names."""
    return re.sub(r"[^\w.-]+", "_", name)
