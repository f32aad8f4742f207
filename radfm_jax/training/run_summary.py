"""The command `python -m radfm_jax.summary --runs DIR... --out page.html`: one HTML page about consecutive runs.

Images are embedded, so the page is one file.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from input_pipeline import files
from input_pipeline.datasets import jsonl
from input_pipeline.datasets.rows import Row
from input_pipeline.field_rules import from_mapping
from input_pipeline.images.scans import resolve
from input_pipeline.inspect.escaping import visible
from input_pipeline.messages import printable
from input_pipeline.samples import Scan, ScanNotice
from radfm_jax import html_page
from radfm_jax.checkpoints import run_directory
from radfm_jax.inference import inputs
from radfm_jax.training import display

DESCRIPTION = """\
Write one HTML page about consecutive training runs: their curves and speed, the accuracy from `radfm_jax.evaluate`,
answers from `radfm_jax.generate --jsonl` next to their scans, and the paths of all files.
"""
STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b1f24}
table{border-collapse:collapse;margin:.6rem 0}td,th{border:1px solid #d0d7de;padding:.2rem .6rem;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums}img{max-width:100%}code{background:#f3f4f6;padding:0 .2rem}
.warn{background:#fff3cd;border:1px solid #e0c766;padding:.5rem .8rem}
.asked{display:flex;gap:1rem;margin:.8rem 0;align-items:flex-start}
.asked div{white-space:pre-line;flex:1;min-width:14rem}.asked img{max-height:11rem;max-width:65%;object-fit:contain}
"""


def main(argv: list[str] | None = None) -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m radfm_jax.summary", description=DESCRIPTION, formatter_class=layout)
    parser.add_argument("--runs", nargs="+", required=True, type=Path, metavar="DIR", help="run directories in order")
    parser.add_argument("--scores", type=Path, metavar="DIR", help="output directory of `radfm_jax.evaluate`")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="JSON Lines file of questions")
    parser.add_argument("--answers", type=Path, metavar="FILE", help="their answers from `radfm_jax.generate --jsonl`")
    scans = "directory of the scan paths in the questions"
    parser.add_argument("--root", type=Path, default=Path(), metavar="DIR", help=scans)
    parser.add_argument("--note", action="append", default=[], metavar="TEXT", help="line at the top of the page")
    paths = "additional line of the table of paths"
    parser.add_argument("--place", action="append", default=[], metavar="WHAT=PATH", help=paths)
    parser.add_argument("--out", required=True, type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        page = "\n".join(_page(args))
    except (OSError, ValueError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    args.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(args.out, page)
    print(f"summary: {args.out}")
    return 0


def _page(args: argparse.Namespace) -> Iterator[str]:
    title = f"Training of {args.runs[-1].name}"
    yield from html_page.head(title, STYLE)
    yield f"<h1>{visible(title)}</h1>"
    yield "<p class='warn'>For research only. Not for clinical use.</p>"
    yield from (f"<p>{visible(note)}</p>" for note in args.note)
    yield "<h2>Training</h2>"
    yield from _stages(args.runs)
    for run in args.runs:
        yield f"<h3>{visible(run.name)}</h3>"
        yield html_page.image((run / "curves.png").read_bytes(), f"curves of {run.name}")
    if args.scores:
        yield "<h2>Test answers</h2>"
        yield from _scores(files.read_json(args.scores / "accuracy.json", kind=dict))
    if args.answers:
        yield "<h2>Answers</h2>"
        yield from _answers(args)
    yield "<h2>Files</h2>"
    paths = [["run " + run.name, str(run)] for run in args.runs] + [entry.split("=", 1) for entry in args.place]
    yield html_page.table(("item", "path"), [(visible(item), f"<code>{visible(path)}</code>") for item, path in paths])


def _stages(runs: Sequence[Path]) -> Iterator[str]:
    rows = []
    for run in runs:
        if not (lines := display.read_metrics(run)):
            raise ValueError(f"{run} has no metrics.jsonl with a step: give the --workdir of a run")
        last = {key: value for line in lines for key, value in line.items()}
        speed = [line for line in lines if "speed/step_s" in line][1:]  # the first includes warm-up
        real_tokens = [line["data/real_tokens"] for line in lines if "data/real_tokens" in line]
        mean = lambda name: statistics.fmean(x[name] for x in speed) if speed else math.nan  # noqa: B023, E731
        newest = run_directory.latest(run)
        rows.append(
            (
                visible(run.name), f"{last['step']:,}", f"{last['train/loss']:.3f}",
                f"{last['validation/all/loss']:.3f}" if "validation/all/loss" in last else "",
                f"{mean('speed/step_s'):.3f}", f"{mean('speed/samples_s'):.0f}", f"{mean('speed/data_wait'):.1%}",
                f"{statistics.fmean(real_tokens):.1%}", f"<code>{visible(newest or '')}</code>",
            )
        )  # fmt: skip
    yield html_page.table(
        (
            "run",
            "steps",
            "loss",
            "validation loss",
            "s per step",
            "samples/s",
            "data wait",
            "real tokens",
            "checkpoint",
        ),
        rows,
    )


def _scores(accuracy: dict[str, list[dict]]) -> Iterator[str]:
    control = {line["kind"]: line for line in accuracy.get("another", ())}
    rows = [
        (
            visible(x["kind"]), f"{x['samples']:,}", f"{x['exact']:.1%}", f"{x['low']:.1%} to {x['high']:.1%}",
            "" if x["balanced"] is None else f"{x['balanced']:.1%}",
            f"{control[x['kind']]['exact']:.1%}" if x["kind"] in control else "",
        )
        for x in accuracy["own"]
    ]  # fmt: skip
    yield "<p>Correct: greedy decoding gives every token of the reference. Scans exchanged: the same questions with "
    yield "another patient's scans; accuracy that remains does not come from the scan.</p>"
    yield html_page.table(("question", "samples", "correct", "95 % interval", "balanced", "scans exchanged"), rows)


def _answers(args: argparse.Namespace) -> Iterator[str]:
    answers = {_field(line, "id", args.answers): line for line in _lines(args.answers)}
    for question in _lines(args.questions):
        answer = answers.get(_field(question, "id", args.questions))
        answer_text = "no answer" if answer is None else _field(answer, "answer", args.answers)
        scans = jsonl.scans_of_row(Row(args.questions, 0, question, args.root.absolute()))
        image = _scan_image(args.root, scans, answer)
        reference = f"<br>reference: <b>{visible(question['response'])}</b>" if question.get("response") else ""
        yield (
            f"<div class='asked'>{image}<div><code>{visible(', '.join(scan.path for scan in scans))}</code>"
            f"<br>{visible(question.get('prompt') or question.get('instruction'))}"
            f"<br>answer: <b>{visible(answer_text)}</b>{reference}</div></div>"
        )


def _scan_image(root: Path, scans: Sequence[Scan], answer: dict | None) -> str:
    """Return the middle slice of each scan as the model saw it, as an HTML image."""
    prepared = (answer or {}).get("made_with", {}).get("prepared")
    if not prepared:
        return ""
    paths = [dataclasses.replace(scan, path=str(resolve(root, scan.path))) for scan in scans]
    with warnings.catch_warnings(action="ignore", category=ScanNotice):  # `generate` has shown them
        volumes = inputs.read_scans(paths, from_mapping(inputs.Preparation, prepared, "prepared"))
    preview = inputs.preview_image(volumes, [Path(scan.path).name for scan in scans])
    return html_page.image(preview, "the scan as the model saw it")


def _field(line: dict, name: str, file: Path) -> str:
    if not isinstance(line.get(name), str):
        raise ValueError(f"{file}: a line has no text `{name}`: {str(line)[:80]}")
    return line[name]


def _lines(file: Path) -> list[dict]:
    return files.read_json_lines(file)
