"""What came of a benchmark: report.html (one page, pictures inside), report.md, report.json, scores.csv.

Rows of the paper's Table 4 stand beside ours, marked as published; `caveats` says why they are not quite comparable.
"""

from __future__ import annotations

import base64
import csv
import dataclasses
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from input_pipeline.images.slices import slices
from input_pipeline.inspect.escaping import POLICY, visible, visible_lines
from input_pipeline.samples import Scan
from radfm_jax.evaluate import figures, published, scoring
from radfm_jax.evaluate.metrics import Interval
from radfm_jax.evaluate.radbench import DATASETS, TASKS, Bench, Benchmark
from radfm_jax.evaluate.scoring import TITLES, Line, ScoredAnswer

STYLE = Path(__file__).with_name("style.css")
SHOWN = 50  # failures and leaks that the page lists; the files beside it have all
EXAMPLES = 3  # right ones and wrong ones of each task
PICTURE = 256  # pixels of an example's longer side


@dataclasses.dataclass
class Run:
    """All that a report tells.

    Attributes:
      scored: model -> every question of the benchmark.
      lines: the tables of all models.
      leaks: questions that the training data know (radbench.leaks); None if nobody looked.
      clinical: model -> task -> metric -> value, or why there is none.
      made: model -> where its answers come from.
    """

    benchmark: Benchmark
    bench: Bench
    scored: Mapping[str, Sequence[ScoredAnswer]]
    lines: Sequence[Line]
    leaks: list[dict] | None = None
    clinical: Mapping[str, Mapping[str, Mapping[str, float | str]]] = dataclasses.field(default_factory=dict)
    made: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def comparable(self) -> set[str]:
        """Tasks beside which published rows may stand: some of the paper's own data sets are asked for them."""
        return {q.task for q in self.bench.questions if q.dataset in DATASETS}


def write(run: Run, out: Path) -> None:
    """Every file of the report."""
    out.mkdir(parents=True, exist_ok=True)
    folder = out / "pictures"
    figures.radar(run.lines, folder / "radar.png", run.comparable)
    figures.bars(run.lines, folder / "bars.png", run.comparable)
    figures.lengths(run.scored, folder / "lengths.png")
    calibrated = figures.calibration(run.scored, folder / "calibration.png")
    (out / "report.json").write_text(json.dumps(as_json(run), indent=1) + "\n")
    (out / "scores.csv").write_text(as_csv(run))
    (out / "report.md").write_text(as_markdown(run))
    (out / "report.html").write_text("".join(f"{line}\n" for line in _page(run, folder, calibrated)))


def caveats(run: Run) -> list[str]:
    """Why these figures are not those of Table 4, even where everything else is equal."""
    asked = {q.dataset for q in run.bench.questions}
    said = [f"{len(asked & DATASETS.keys())} of RadBench's {len(DATASETS)} data sets were scored"]
    if foreign := sorted(asked - DATASETS.keys()):
        said.append(f"other data were scored: {', '.join(map(run.benchmark.title, foreign))}")
    if hidden := [title for task, title in TASKS.items() if task not in run.comparable]:
        said.append(f"none of the paper's own data: {', '.join(hidden)}; so its figures do not stand beside ours there")
    if any(reason.startswith("more than limit") for of in run.bench.left_out.values() for reason in of):
        said.append("some data sets were cut by `limit`")
    if not run.benchmark.terms.startswith("umls:"):
        said.append(f"medical words come from the terms `{run.benchmark.terms}`, not from UMLS")
    if run.leaks is None:
        said.append("no index of the training data was given, so nobody looked for test studies in them")
    elif run.leaks:
        known = len({leak["id"] for leak in run.leaks})
        said.append(
            f"{known:,} of {len(run.bench.questions):,} questions are about studies or scans of the training data"
        )
    said.append("prompts, the balance of yes and no, and random splits are ours: the authors published none of them")
    return said


def of_lines(run: Run, grouping: str, task: str) -> list[Line]:
    return [line for line in run.lines if (line.grouping, line.task) == (grouping, task)]


def columns(lines: Sequence[Line]) -> list[str]:
    return [name for name in TITLES if any(name in line.metrics for line in lines)]


# --- JSON, CSV, Markdown ----------------------------------------------------------------------------------------------


def as_json(run: Run) -> dict:
    return {
        "caveats": caveats(run),
        "intervals": _method(run),
        "benchmark": run.benchmark.to_dict(),
        "models": dict(run.made),
        "scores": [
            dataclasses.asdict(line)
            | {"metrics": {name: _plain(i) for name, i in line.metrics.items()}, "without": dict(line.without)}
            for line in run.lines
        ],
        "published": {
            f"{name}, published": {task: published.values(name, task) for task in published.TABLE}
            for name in published.MODELS
        },
        "clinical": run.clinical,
        "not_scored": run.bench.missing,
        "left_out": run.bench.left_out,
        "leaks": None if run.leaks is None else len(run.leaks),
        "failed": {m: {one.question.row_id: one.error for one in of if one.error} for m, of in run.scored.items()},
    }


def _plain(interval: Interval) -> dict[str, float | None]:
    return {k: v if math.isfinite(v) else None for k, v in dataclasses.asdict(interval).items()}


def as_csv(run: Run) -> str:
    """A line a figure, shares of 1."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("model source task grouping group metric value low high questions failed studies".split())
    number = lambda x: f"{x:.6f}" if math.isfinite(x) else ""  # noqa: E731
    for line in run.lines:
        for name, i in line.metrics.items():
            figures = map(number, (i.value, i.low, i.high))
            counts = line.questions, line.failed, line.studies
            writer.writerow((line.model, "ours", line.task, line.grouping, line.group, name, *figures, *counts))
    for model in published.MODELS:
        for task in published.TABLE:
            for name, figures in published.values(model, task).items():
                row = (model, "published", task, "task", "", name, *map(number, figures), published.CASES[task], "", "")
                writer.writerow(row)
    return text.getvalue()


def as_markdown(run: Run) -> str:
    said = ["# RadBench", "", "Research only, not for clinical use.", ""]
    said += [f"- {_plainly(line)}" for line in caveats(run)] + [f"- {_method(run)}", ""]
    for task, title in TASKS.items():
        if lines := of_lines(run, "task", task):
            head, rows = table(lines, task, task in run.comparable)
            said += [f"## {title}", "", *_pipes(head, rows), ""]
    for grouping in ("data set", "modality", "anatomy"):
        for task, title in TASKS.items():
            if lines := of_lines(run, grouping, task):
                head, rows = table(lines, named=run.benchmark if grouping == "data set" else None)
                said += [f"## {title} by {grouping}", "", *_pipes(head, rows), ""]
    said += ["## Not scored", ""]
    said += [f"- {_plainly(f'{run.benchmark.title(k)}: {why}')}" for k, why in run.bench.missing.items()]
    said += [f"- {_plainly(line)}" for line in _left_out(run)]
    return "\n".join(said) + "\n"


def _pipes(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    line = lambda cells: f"| {' | '.join(map(_plainly, cells))} |"  # noqa: E731
    return [line(head), "|" + "---|" * len(head), *map(line, rows)]


def _plainly(text: str) -> str:
    """Markdown of any text, for a cell or an item of a list: it is seen as it is, in one line."""
    shown = visible(" ".join(text.split())).replace("&#x27;", "'").replace("&quot;", '"')
    shown = re.sub(r"([\\`*_\[\]|~])", r"\\\1", shown)
    return re.sub(r"^([\d#]*)([-+#.)])(?= |$)", r"\1\\\2", shown)  # would begin a list or a heading


def table(
    lines: Sequence[Line], task: str = "", theirs: bool = False, named: Benchmark | None = None
) -> tuple[list[str], list[list[str]]]:
    """Head and rows of lines of one task; with `theirs` the published rows stand first. named: says what groups are
    called."""
    names = columns(lines)
    if theirs:
        names = [n for n in TITLES if n in names or n in published.TABLE[task]]
    grouped = any(line.group for line in lines)
    head = [*(["group"] if grouped else []), "model", "questions", "failed", *(TITLES[n] for n in names)]
    rows = []
    for model in published.MODELS if theirs else ():
        values = published.values(model, task)
        cells = [percent(Interval(*values[n])) if n in values else "" for n in names]
        rows.append([f"{model} (published)", f"{published.CASES[task]:,}", "", *cells])
    for line in sorted(lines, key=lambda one: one.group):
        group = [named.title(line.group) if named else line.group] if grouped else []
        cells = [percent(line.metrics[n]) if n in line.metrics else "" for n in names]
        rows.append([*group, line.model, f"{line.questions:,}", f"{line.failed:,}" if line.failed else "0", *cells])
    return head, rows


def percent(i: Interval) -> str:
    """`31.43 (31.20, 31.65)`, as Table 4 has it."""
    if not math.isfinite(i.value):
        return "none"
    return f"{100 * i.value:.2f} ({100 * i.low:.2f}, {100 * i.high:.2f})"


def _method(run: Run) -> str:
    what = "studies" if run.benchmark.by_study else "samples"
    return (
        f"per cent, with 95 % intervals: percentiles of {run.benchmark.resamples:,} bootstrap resamples of the {what}, "
        f"seed {run.benchmark.seed}, without width where all are right or none; the paper does not say how its own came"
    )


def _left_out(run: Run) -> list[str]:
    of = run.bench.left_out.items()
    return [f"{run.benchmark.title(k)}: {n:,} rows left out: {why}" for k, reasons in of for why, n in reasons.items()]


# --- the page ---------------------------------------------------------------------------------------------------------


def _page(run: Run, folder: Path, calibrated: bool) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>RadBench: {visible(', '.join(run.scored))}</title><style>\n{STYLE.read_text()}</style></head><body>"
    yield f"<h1>RadBench: {visible(', '.join(run.scored))}</h1>"
    yield '<p class="warn">Research only. Not for clinical use.</p>'
    yield f"<p>{len(run.bench.questions):,} questions. {visible(_method(run).capitalize())}.</p><ul>"
    yield from (f"<li>{visible(line)}</li>" for line in caveats(run))
    yield "</ul>"
    yield _html_table(("model", "answers"), [(visible(m), visible(w)) for m, w in run.made.items()])
    yield "<h2>Tasks</h2>"
    for task, title in TASKS.items():
        yield f"<h3>{title}</h3>"
        if lines := of_lines(run, "task", task):
            yield _scores(*table(lines, task, task in run.comparable))
            yield from _without(lines)
            yield from _clinical(run, task)
        else:
            yield "<p>Not scored: no data set of this task is there.</p>"
    yield "<h2>Pictures</h2>"
    yield _image(folder / "radar.png", "radar: mean of each task's metrics, by model")
    found = figures.averages(run.lines, run.comparable)
    if lacking := [f"{m}, {t}" for m in run.scored for task, t in TASKS.items() if task not in found.get(m, {})]:
        said = "No corner, as there are no questions or a metric of the paper has no value"
        yield f'<p class="faint">{said}: {visible("; ".join(lacking))}.</p>'
    yield _image(folder / "bars.png", "bars: metrics of each task, by model")
    for grouping in ("data set", "modality", "anatomy"):
        parts = [(title, of_lines(run, grouping, task)) for task, title in TASKS.items()]
        if any(lines for _, lines in parts):
            yield f"<h2>By {grouping}</h2>"
            for title, lines in parts:
                if lines:
                    yield f"<h3>{title}</h3>"
                    yield _scores(*table(lines, named=run.benchmark if grouping == "data set" else None))
    yield "<h2>Yes and no</h2>"
    if calibrated:
        yield "<p>From the probability of the answer's first token; the paper could not give it. AUC and calibration "
        yield "error (ECE) stand in the table of disease diagnosis. A failed answer counts as one half.</p>"
        yield _image(folder / "calibration.png", "calibration, probabilities, ROC")
    else:
        yield "<p>No model gave probabilities for all its yes/no answers.</p>"
    for model, all_of in run.scored.items():
        some = [one for one in all_of if one.question.task == "diagnosis"]
        if lacking := scoring.without_probability(some):
            why = f"no AUC, as {lacking:,} of {len(some):,} answers have no p_yes"
            yield f'<p class="faint">{visible(model)}: {why}.</p>'
    yield "<h2>Lengths of answers</h2>"
    yield _image(folder / "lengths.png", "words of answers and references by task")
    yield from _endings(run)
    yield "<h2>Examples</h2><p>Drawn by the seed; of open answers the better and the worse third by BLEU-1 and ROUGE-1."
    yield from _examples(run)
    yield from _failures(run)
    yield from _leaks(run)
    yield "<h2>What was not scored</h2><ul>"
    yield from (f"<li>{visible(run.benchmark.title(k))}: {visible(why)}</li>" for k, why in run.bench.missing.items())
    yield from (f"<li>{visible(line)}</li>" for line in _left_out(run))
    yield "</ul></body></html>"


def _scores(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[visible(cell) for cell in row] for row in rows]
    return _html_table(head, cells, ["published" if any(c.endswith("(published)") for c in r) else "" for r in rows])


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]], looks: Sequence[str] = ()) -> str:
    """Cells are HTML already."""
    looks = looks or [""] * len(rows)
    number = lambda cell: cell[:1].isdigit() or cell == "none"  # noqa: E731
    body = "".join(
        f'<tr class="{look}">'
        + "".join(f'<td class="n">{c}</td>' if number(c) else f"<td>{c}</td>" for c in row)
        + "</tr>"
        for row, look in zip(rows, looks, strict=True)
    )
    return f"<table><tr>{''.join(f'<th>{visible(cell)}</th>' for cell in head)}</tr>{body}</table>"


def _without(lines: Sequence[Line]) -> Iterator[str]:
    said = [
        f"{line.model}, {TITLES[name]}: {count:,} of {line.questions:,}"
        for line in lines for name, count in line.without.items()
    ]  # fmt: skip
    if said:
        yield f'<p class="faint">Without a word that could count: {visible("; ".join(said))}.</p>'


def _clinical(run: Run, task: str) -> Iterator[str]:
    rows = []
    for model, tasks in run.clinical.items():
        for name, value in tasks.get(task, {}).items():
            rows.append((visible(model), visible(name), f"{value:.4f}" if isinstance(value, float) else visible(value)))
    if rows:
        yield "<p>Clinical metrics, by RadEval:</p>" + _html_table(("model", "metric", "value"), rows)


def _endings(run: Run) -> Iterator[str]:
    rows = []
    for model, all_of in run.scored.items():
        for task, title in TASKS.items():
            some = [one for one in all_of if one.question.task == task]
            if some:
                mean = lambda texts: f"{sum(len(t.split()) for t in texts) / len(texts):.1f}"  # noqa: E731
                said, wanted = mean([o.given.text for o in some]), mean([o.question.references[0] for o in some])
                cut = sum(one.given.ended == "length" for one in some)
                known = any(one.given.ended for one in some)
                rows.append((visible(model), title, said, wanted, f"{cut / len(some):.1%}" if known else ""))
    yield _html_table(("model", "task", "words an answer", "words a reference", "cut off at the longest"), rows)


def _examples(run: Run) -> Iterator[str]:
    import numpy as np

    for model, all_of in run.scored.items():
        for task, title in TASKS.items():
            some = [one for one in all_of if one.question.task == task]
            if not some:
                continue
            rng = np.random.default_rng(run.benchmark.seed)
            order = [some[i] for i in rng.permutation(len(some))]
            if some[0].question.closed:
                right, wrong = ([one for one in order if one.right == side] for side in (1.0, 0.0))
            else:
                ranked = sorted(order, key=lambda one: -one.right)
                third = max(len(ranked) // 3, 1)
                best, worst = ({id(one) for one in part} for part in (ranked[:third], ranked[third:][-third:]))
                right, wrong = ([one for one in order if id(one) in part] for part in (best, worst))
            yield f"<h3>{visible(model)}: {title}</h3>"
            for look, part in (("right", right), ("wrong", wrong)):
                for one in part[:EXAMPLES]:
                    yield _example(one, look)


def _example(one: ScoredAnswer, look: str) -> str:
    q, values = one.question, ", ".join(
        f"{TITLES[name]} {100 * v:.0f} %" for name, v in one.values.items() if math.isfinite(v)
    )  # fmt: skip
    said = f"<b>{visible_lines(one.given.text) or '(nothing)'}</b>"
    if one.error:
        said += f' <span class="bad">{visible(one.error)}</span>'
    elif q.closed:
        said += f" (taken for {visible(one.predicted or 'none of the list')})"
    p_yes = "" if one.given.p_yes is None else f", probability of yes {one.given.p_yes:.2f}"
    context = f'<span class="faint">{visible_lines(q.context)}</span><br>' if q.context else ""
    return (
        f'<div class="asked {look}"><div class="scans">{"".join(map(scan_picture, q.scans[:4]))}</div><div>'
        f'<span class="faint">{visible(q.row_id)}</span><br>{context}{visible_lines(q.prompt)}<br>answer: {said}<br>'
        f"reference: <b>{visible_lines(' / '.join(q.references))}</b><br>"
        f'<span class="faint">{values}{p_yes}</span></div></div>'
    )


def scan_picture(scan: Scan, most: int = 1, size: int = PICTURE) -> str:
    """HTML of a scan: its middle slice, or up to `most` slices; or why there is none."""
    try:
        found = slices(scan, most)
    except ValueError as error:
        return f'<span class="bad">{visible(str(error)[:200])}</span>'
    shown = []
    for one in found:
        one.image.thumbnail((size, size))
        file = io.BytesIO()
        one.image.save(file, format="PNG")
        label = f"slice {one.number} of {one.count}" if one.count > 1 else "2D"
        shown.append(
            f'<figure><img alt="{label}" src="{_uri(file.getvalue())}"><figcaption>{label}</figcaption></figure>'
        )
    return "".join(shown)


def _failures(run: Run) -> Iterator[str]:
    yield "<h2>Failed, and counted as wrong</h2>"
    for model, all_of in run.scored.items():
        failed = [one for one in all_of if one.error]
        yield f"<p>{visible(model)}: {len(failed):,} of {len(all_of):,}.</p>"
        if failed:
            yield "<ul>" + "".join(
                f"<li>{visible(one.question.row_id)}: {visible(one.error)}</li>" for one in failed[:SHOWN]
            )
            yield f"</ul><p>{f'The first {SHOWN}; all' if len(failed) > SHOWN else 'All'} stand in report.json.</p>"


def _leaks(run: Run) -> Iterator[str]:
    yield "<h2>Test studies in the training data</h2>"
    if run.leaks is None:
        yield "<p>Nobody looked: `index` names no index of training data.</p>"
    elif not run.leaks:
        yield "<p>None: no study by its name, and no scan by the SHA-256 of its file.</p>"
    else:
        known = len({leak["id"] for leak in run.leaks})
        yield f'<p class="warn">{known:,} questions are about what the model was trained on. All: leaks.jsonl.</p><ul>'
        for leak in run.leaks[:SHOWN]:
            yield f"<li>{visible(leak['id'])}: {leak['kind']} {visible(leak['what'])}, in {visible(leak['in'])}</li>"
        yield "</ul>"


def _image(file: Path, what: str) -> str:
    return f'<p><img class="wide" alt="{visible(what)}" src="{_uri(file.read_bytes())}"></p>'


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
