"""Ratings by human raters, as in the journal version of the paper: a blinded page, and the grades.

`--rating-sheet FILE.html` writes one self-contained page: scans, questions, and the answers of all models. Letters
replace the names of the models, in a different order for each case. Raters grade from 0 to 5 and save their grades as
JSON. FILE.key.json maps letters to models; do not show it to the raters.

`python -m radfm_jax.evaluate ratings --key FILE.key.json ratings-*.json --out DIR` reads the grades.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from input_pipeline.console import SafeConsole
from input_pipeline.files import read_json, write_json, write_text
from input_pipeline.inspect.escaping import visible_lines
from radfm_jax import html_page, terminal
from radfm_jax.evaluate import metrics
from radfm_jax.evaluate.radbench import CLOSED, TASKS
from radfm_jax.evaluate.report_page import STYLE, scan_images
from radfm_jax.evaluate.scoring import ScoredAnswer
from radfm_jax.inference.batch_files import raise_problems

GRADES = 6  # 0 .. 5
SCALE = "0 wrong or empty, 1 mostly wrong, 2 more wrong than right, 3 more right than wrong, 4 nearly right, 5 right"
SLICES, PIXELS = 8, 384
SCRIPT = Path(__file__).with_name("rating.js")


def write_sheet(
    scored: Mapping[str, Sequence[ScoredAnswer]], file: Path, *, cases: int = 40, seed: int = 0, references: bool = True
) -> Path:
    """Write FILE.html and FILE.key.json, and return the path of the key.

    Args:
      scored: model -> its answers to all questions, in the same order.
      cases: number of questions, sampled evenly from the open tasks (from all tasks if none is open).
    Raises:
      ValueError: FILE.key.json is the key of another sheet.
    """
    models, answers = list(scored), next(iter(scored.values()))
    rng = np.random.default_rng(seed)
    chosen = _sample_cases(answers, cases, rng)
    key = {"cases": []}
    for number, i in enumerate(chosen, 1):
        letters = {chr(65 + k): models[m] for k, m in enumerate(rng.permutation(len(models)))}
        question = answers[i].question
        key["cases"].append({"case": number, "id": question.row_id, "task": question.task, "letters": letters})
    texts = [[scored[model][i].answer.text for model in models] for i in chosen]
    key["sheet"] = hashlib.sha256(json.dumps([key, texts]).encode()).hexdigest()[:16]
    key_file = file.with_suffix(".key.json")
    if key_file.exists() and read_json(key_file, kind=dict).get("sheet") != key["sheet"]:
        raise ValueError(f"{key_file} is the key of another sheet, which needs it for grading: use another file name")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(f"{line}\n" for line in _page(scored, chosen, key, references)))
    write_json(key_file, key)
    return key_file


def _sample_cases(answers: Sequence[ScoredAnswer], cases: int, rng: np.random.Generator) -> list[int]:
    """Return question indices, drawn round-robin over the tasks."""
    by_task: dict[str, list[int]] = {}
    for i in rng.permutation(len(answers)):
        by_task.setdefault(answers[i].question.task, []).append(int(i))
    used = {task: indices for task, indices in by_task.items() if task not in CLOSED} or by_task
    rounds = itertools.zip_longest(*(used[task] for task in TASKS if task in used))
    return [i for indices in rounds for i in indices if i is not None][:cases]


def _page(scored, chosen: Sequence[int], key: dict, references: bool) -> Iterator[str]:
    script = SCRIPT.read_text()
    # The policy permits only the script with this hash, so no text of an answer can run.
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    answers = sum(len(case["letters"]) for case in key["cases"])
    yield from html_page.head("Rating sheet", STYLE.read_text(), policy)
    yield "<h1>How good are these answers?</h1>"
    yield f"<p>Grade each answer independently: {SCALE}. The order of the answers is random. "
    yield "Grades stay in this browser until you save them; send the saved file back.</p>"
    yield '<div class="bar"><label>Your name <input id="rater" autocomplete="off"></label> '
    yield '<button id="save" type="button">Save the grades</button> <span id="done"></span></div>'
    yield f'<form id="form" data-sheet="{key["sheet"]}" data-answers="{answers}">'
    for case, i in zip(key["cases"], chosen, strict=True):
        question = next(iter(scored.values()))[i].question
        yield f'<section class="case"><h2>Case {case["case"]}</h2><div class="scans" style="max-width:100%">'
        yield from (scan_images(scan, SLICES, PIXELS) for scan in question.scans)
        yield "</div>"
        if question.context:
            yield f"<p>{visible_lines(question.context)}</p>"
        yield f"<p><b>{visible_lines(question.prompt)}</b></p>"
        if references:
            yield f'<p class="faint">Reference: {visible_lines(" / ".join(question.references))}</p>'
        for letter, model in case["letters"].items():
            name, text = f"{case['case']}/{letter}", scored[model][i].answer.text
            yield f'<div class="answer"><b>{letter}</b> {visible_lines(text) or "<i>(no answer)</i>"}<fieldset>'
            for grade in range(GRADES):
                yield f'<label><input type="radio" name="{name}" value="{grade}"> {grade}</label>'
            yield "</fieldset></div>"
        yield "</section>"
    yield f"</form><script>\n{script}</script></body></html>"


@dataclasses.dataclass(frozen=True)
class Rating:
    """One grade of one rater."""

    rater: str
    case: int
    task: str
    model: str
    grade: int


def read_ratings(key_file: Path, files: Sequence[Path]) -> list[Rating]:
    """Return the grades of all raters.

    Raises ValueError for invalid files or grades, files of another sheet, answers that are not on the sheet, and a
    rater with two files; lists the first ten.
    """
    key = _read_json(key_file)
    try:
        cases = {
            f"{c['case']}/{letter}": (c["case"], c["task"], model)
            for c in key["cases"]
            for letter, model in c["letters"].items()
        }
        sheet = key["sheet"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{key_file} is not a key of a rating sheet ({error!r})") from None
    ratings, raters, problems = [], {}, []
    for file in files:
        content = _read_json(file)
        if not isinstance(content, dict) or not isinstance(content.get("ratings"), dict) or not content.get("rater"):
            problems.append(f"{file}: expected `sheet`, `rater` and `ratings`")
            continue
        if content.get("sheet") != sheet:
            problems.append(f"{file} is of another sheet ({content.get('sheet')}, the key is of {sheet})")
            continue
        rater = str(content["rater"])
        if rater in raters:
            problems.append(f"{file}: rater {rater!r} is already in {raters[rater]}")
            continue
        raters[rater] = file
        for name, grade in content["ratings"].items():
            if name not in cases:
                problems.append(f"{file}: {name!r} is not an answer of the sheet")
            elif type(grade) is not int or not 0 <= grade < GRADES:
                problems.append(f"{file}: {name!r} has the grade {grade!r}; valid are 0 to {GRADES - 1}")
            else:
                ratings.append(Rating(rater, *cases[name], grade))
    raise_problems(problems)
    if not ratings:
        raise ValueError("the files contain no grades")
    return ratings


def _read_json(file: Path):
    try:
        return read_json(file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def summary(ratings: Sequence[Rating], *, resamples: int = 1000, seed: int = 0) -> dict:
    """Return the means by model and task with 95 % intervals, and the agreement of each pair of raters.

    Intervals resample cases with all their grades. Agreement is quadratically weighted kappa over the answers that both
    raters graded.
    """
    means = []
    for task in ("", *TASKS):
        for model in sorted({rating.model for rating in ratings}):
            group = [rating for rating in ratings if rating.model == model and task in ("", rating.task)]
            if group:
                mean = {"mean": metrics.mean(np.array([rating.grade for rating in group], float))}
                interval = metrics.bootstrap(mean, [rating.case for rating in group], resamples, seed)["mean"]
                means.append({"model": model, "task": task, "grades": len(group), **dataclasses.asdict(interval)})
    by_rater: dict[str, dict[tuple[int, str], int]] = {}
    for rating in ratings:
        by_rater.setdefault(rating.rater, {})[rating.case, rating.model] = rating.grade
    agreement = []
    for a, b in itertools.combinations(sorted(by_rater), 2):
        both = sorted(by_rater[a].keys() & by_rater[b].keys())
        grades = ([by_rater[rater][answer] for answer in both] for rater in (a, b))
        kappa = metrics.weighted_kappa(*grades, GRADES) if both else math.nan
        agreement.append({"raters": [a, b], "both": len(both), "kappa": None if math.isnan(kappa) else kappa})
    counts = {rater: len(grades) for rater, grades in by_rater.items()}
    return {"raters": counts, "means": means, "agreement": agreement}


def tables(result: dict) -> list[Table]:
    """Return the tables of the terminal."""
    means = Table("model", "task", "grades", "mean", "95 % interval", title="grades, 0 to 5")
    for line in result["means"]:
        interval = f"{line['low']:.2f} to {line['high']:.2f}"
        means.add_row(Text(line["model"]), line["task"] or "all", str(line["grades"]), f"{line['value']:.2f}", interval)
    agreement = Table("raters", "answers both graded", "weighted kappa", title="agreement")
    for line in result["agreement"]:
        kappa = "none" if line["kappa"] is None else f"{line['kappa']:.3f}"
        agreement.add_row(Text(" and ".join(line["raters"])), str(line["both"]), kappa)
    return [means, agreement]


def main(argv: list[str]) -> int:
    parser = terminal.parser(
        "python -m radfm_jax.evaluate ratings",
        "Mean grades of a rating sheet with 95 % intervals, and the agreement of the raters.",
        "exit codes: 0 success; 2 invalid files, or files of another sheet.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="saved grades: ratings-*.json")
    parser.add_argument("--key", required=True, type=Path, metavar="FILE", help="SHEET.key.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write DIR/ratings.json as well")
    args = parser.parse_args(argv)
    return terminal.run(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    result = summary(read_ratings(args.key, args.files))
    for table in tables(result):
        SafeConsole().print(table)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "ratings.json", result)
    return 0
