"""Grades that people give, as in the journal version of the paper: a blinded page, and what came back of it.

`--rating-sheet FILE.html` writes one page that needs nothing else: scans as pictures, the question, the answers of all
models under letters whose order differs from case to case, grades 0 to 5, and a button that saves them as JSON.
FILE.key.json says which letter was whose: it stays with whoever runs the study.

`python -m radfm_jax.evaluate ratings --key FILE.key.json ratings-*.json --out DIR` reads the grades back.
"""

from __future__ import annotations

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

from input_pipeline.inspect.escaping import visible_lines
from radfm_jax.evaluate import metrics
from radfm_jax.evaluate.metrics import Interval
from radfm_jax.evaluate.radbench import CLOSED, TASKS
from radfm_jax.evaluate.report import STYLE, scan_picture
from radfm_jax.evaluate.scoring import ScoredAnswer

GRADES = 6  # 0 .. 5
SCALE = (
    "0 wrong or nothing said, 1 mostly wrong, 2 more wrong than right, 3 more right than wrong, 4 nearly right, 5 right"
)
SLICES, PIXELS = 8, 384
SCRIPT = Path(__file__).with_name("rating.js")


# --- the sheet --------------------------------------------------------------------------------------------------------


def write_sheet(
    scored: Mapping[str, Sequence[ScoredAnswer]], file: Path, *, cases: int = 40, seed: int = 0, references: bool = True
) -> Path:
    """FILE.html and FILE.key.json beside it, whose path is returned.

    Args:
      scored: model -> all questions, in the same order.
      cases: how many questions, drawn evenly from the open tasks (from all if there are no others).
      references: show the data set's own answer.
    Raises ValueError: the key of another sheet lies there.
    """
    models, every = list(scored), next(iter(scored.values()))
    rng = np.random.default_rng(seed)
    chosen = _drawn(every, cases, rng)
    key = {"cases": []}
    for number, i in enumerate(chosen, 1):
        letters = {chr(65 + k): models[m] for k, m in enumerate(rng.permutation(len(models)))}
        question = every[i].question
        key["cases"].append({"case": number, "id": question.row_id, "task": question.task, "letters": letters})
    texts = [[scored[model][i].given.text for model in models] for i in chosen]
    key["sheet"] = hashlib.sha256(json.dumps([key, texts]).encode()).hexdigest()[:16]
    beside = file.with_suffix(".key.json")
    if beside.exists() and json.loads(beside.read_text()).get("sheet") != key["sheet"]:
        raise ValueError(f"{beside} is the key of another sheet, whose grades it alone can read: name another file")
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as page:
        page.writelines(f"{line}\n" for line in _page(scored, chosen, key, references))
    beside.write_text(json.dumps(key, indent=1) + "\n")
    return beside


def _drawn(every: Sequence[ScoredAnswer], cases: int, rng: np.random.Generator) -> list[int]:
    """Questions of each task in turn until there are enough."""
    by_task: dict[str, list[int]] = {}
    for i in rng.permutation(len(every)):
        by_task.setdefault(every[i].question.task, []).append(int(i))
    kept = {task: of for task, of in by_task.items() if task not in CLOSED} or by_task
    turns = itertools.zip_longest(*(kept[task] for task in TASKS if task in kept))
    return [i for turn in turns for i in turn if i is not None][:cases]


def _page(scored, chosen: Sequence[int], key: dict, references: bool) -> Iterator[str]:
    script = SCRIPT.read_text()
    # The one script that may run is ours, by its hash: whatever an answer says, it stays text.
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    answers = sum(len(case["letters"]) for case in key["cases"])
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>Rating sheet</title><style>\n{STYLE.read_text()}</style></head><body>"
    yield "<h1>How good are these answers?</h1>"
    yield f"<p>Grade every answer by itself: {SCALE}. The order of the answers says nothing about where they are from. "
    yield "Grades stay in this browser until you save them; send the saved file back.</p>"
    yield '<div class="bar"><label>Your name <input id="rater" autocomplete="off"></label> '
    yield '<button id="save" type="button">Save the grades</button> <span id="done"></span></div>'
    yield f'<form id="form" data-sheet="{key["sheet"]}" data-answers="{answers}">'
    for case, i in zip(key["cases"], chosen, strict=True):
        question = next(iter(scored.values()))[i].question
        yield f'<section class="case"><h2>Case {case["case"]}</h2><div class="scans" style="max-width:100%">'
        yield from (scan_picture(scan, SLICES, PIXELS) for scan in question.scans)
        yield "</div>"
        if question.context:
            yield f"<p>{visible_lines(question.context)}</p>"
        yield f"<p><b>{visible_lines(question.prompt)}</b></p>"
        if references:
            yield f'<p class="faint">The data set says: {visible_lines(" / ".join(question.references))}</p>'
        for letter, model in case["letters"].items():
            name, text = f"{case['case']}/{letter}", scored[model][i].given.text
            yield f'<div class="answer"><b>{letter}</b> {visible_lines(text) or "<i>(no answer)</i>"}<fieldset>'
            for grade in range(GRADES):
                yield f'<label><input type="radio" name="{name}" value="{grade}"> {grade}</label>'
            yield "</fieldset></div>"
        yield "</section>"
    yield f"</form><script>\n{script}</script></body></html>"


# --- what came back ---------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rated:
    """One grade."""

    rater: str
    case: int
    task: str
    model: str
    grade: int


def read(key_file: Path, files: Sequence[Path]) -> list[Rated]:
    """Every grade of every rater.

    Raises:
      ValueError: a file of another sheet, grades that are none, answers that the sheet has not, a rater who stands
        twice; all of them.
    """
    key = _json(key_file)
    try:
        cases = {f"{c['case']}/{letter}": (c, model) for c in key["cases"] for letter, model in c["letters"].items()}
        sheet = key["sheet"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{key_file} is no key of a rating sheet ({error!r})") from None
    found, raters, problems = [], {}, []
    for file in files:
        given = _json(file)
        if not isinstance(given, dict) or not isinstance(given.get("ratings"), dict) or not given.get("rater"):
            problems.append(f"{file}: `sheet`, `rater` and `ratings` are expected")
            continue
        if given.get("sheet") != sheet:
            problems.append(f"{file} is of another sheet ({given.get('sheet')}, the key is of {sheet})")
            continue
        rater = str(given["rater"])
        if rater in raters:
            problems.append(f"{file}: rater {rater!r} stands in {raters[rater]} already")
            continue
        raters[rater] = file
        for name, grade in given["ratings"].items():
            if name not in cases or type(grade) is not int or not 0 <= grade < GRADES:
                problems.append(
                    f"{file}: {name!r} has the grade {grade!r}; 0 to {GRADES - 1} for an answer of the sheet"
                )
                continue
            case, model = cases[name]
            found.append(Rated(rater, case["case"], case["task"], model, grade))
    if problems:
        raise ValueError("; ".join(problems[:10]) + (" ..." if len(problems) > 10 else ""))
    if not found:
        raise ValueError("no file holds a grade")
    return found


def _json(file: Path):
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def summary(rated: Sequence[Rated], *, resamples: int = 1000, seed: int = 0) -> dict:
    """Means by model and task with 95 % intervals (cases are resampled, with all their grades), and the agreement of
    each two raters: quadratically weighted kappa over the answers that both graded."""
    means = []
    for task in ("", *TASKS):
        for model in sorted({one.model for one in rated}):
            some = [one for one in rated if one.model == model and task in ("", one.task)]
            if some:
                grades = np.array([one.grade for one in some], float)
                found = metrics.bootstrap({"mean": metrics.mean(grades)}, [one.case for one in some], resamples, seed)
                means.append({"model": model, "task": task, "grades": len(some), **dataclasses.asdict(found["mean"])})
    of: dict[str, dict[tuple[int, str], int]] = {}
    for one in rated:
        of.setdefault(one.rater, {})[one.case, one.model] = one.grade
    agreement = []
    for a, b in itertools.combinations(sorted(of), 2):
        both = sorted(of[a].keys() & of[b].keys())
        kappa = metrics.weighted_kappa([of[a][x] for x in both], [of[b][x] for x in both], GRADES) if both else math.nan
        agreement.append({"raters": [a, b], "both": len(both), "kappa": None if math.isnan(kappa) else kappa})
    return {"raters": {rater: len(grades) for rater, grades in of.items()}, "means": means, "agreement": agreement}


def tables(found: dict) -> list[Table]:
    means = Table("model", "task", "grades", "mean", "95 % interval", title="grades, 0 to 5")
    for line in found["means"]:
        i = Interval(line["value"], line["low"], line["high"])
        interval = f"{i.low:.2f} to {i.high:.2f}"
        means.add_row(Text(line["model"]), line["task"] or "all", str(line["grades"]), f"{i.value:.2f}", interval)
    agreement = Table("raters", "answers both graded", "weighted kappa", title="agreement")
    for line in found["agreement"]:
        kappa = "none" if line["kappa"] is None else f"{line['kappa']:.3f}"
        agreement.add_row(Text(" and ".join(line["raters"])), str(line["both"]), kappa)
    return [means, agreement]
