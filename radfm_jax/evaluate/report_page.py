"""report.html: one page with embedded figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from input_pipeline.images.slices import slices
from input_pipeline.inspect.escaping import visible, visible_lines
from input_pipeline.samples import Scan
from radfm_jax import html_page
from radfm_jax.evaluate import figures, scoring
from radfm_jax.evaluate.radbench import TASKS
from radfm_jax.evaluate.results import Results, caveats, grouped_tables, method, not_scored, task_table, warnings_of
from radfm_jax.evaluate.scoring import TITLES, ScoredAnswer, ScoreRow

STYLE = Path(__file__).with_name("style.css")
LISTED = 50  # failures and leaks on the page; report.json and leaks.jsonl have all
EXAMPLES = 3  # good and bad ones of each task
EXAMPLE_PIXELS = 256  # longer side of an example's scan


def page(results: Results, folder: Path, calibrated: bool) -> Iterator[str]:
    """Yield the lines of the page. `folder` contains the figures, with calibration.png if `calibrated`."""
    title = f"RadBench: {', '.join(results.scored)}"
    yield from html_page.head(title, STYLE.read_text())
    yield f"<h1>{visible(title)}</h1>"
    yield '<p class="warn">Research only. Not for clinical use.</p>'
    yield f"<p>{len(results.built.questions):,} questions. {visible(method(results).capitalize())}.</p>"
    yield from (f'<p class="warn">{visible(line)}</p>' for line in warnings_of(results))
    yield _list(caveats(results))
    yield html_page.table(("model", "answers"), [(visible(m), visible(w)) for m, w in results.sources.items()])
    yield from _tasks(results)
    yield "<h2>Figures</h2>"
    yield _figure(folder / "radar.png", "radar: mean of each task's metrics, by model")
    means = figures.averages(results.rows, results.comparable)
    if missing := [f"{m}, {t}" for m in results.scored for task, t in TASKS.items() if task not in means.get(m, {})]:
        yield '<p class="faint">Without questions, or without a value for one of the metrics: '
        yield f"{visible('; '.join(missing))}.</p>"
    yield _figure(folder / "bars.png", "bars: metrics of each task, by model")
    for grouping in ("data set", "modality", "anatomy"):
        if tables := grouped_tables(results, grouping):
            yield f"<h2>By {grouping}</h2>"
            for task_title, table in tables.items():
                yield f"<h3>{task_title}</h3>{_table(*table)}"
    yield from _calibration(results, folder, calibrated)
    yield "<h2>Answer lengths</h2>"
    yield _figure(folder / "lengths.png", "words of answers and references by task")
    yield from _lengths(results)
    yield "<h2>Examples</h2><p>Sampled by the seed; for open questions from the best and the worst third by BLEU-1 and "
    yield "ROUGE-1.</p>"
    yield from _examples(results)
    yield from _failures(results)
    yield from _leaks(results)
    yield f"<h2>Not scored</h2>{_list(not_scored(results))}</body></html>"


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{visible(line)}</li>' for line in lines)}</ul>"


def _figure(file: Path, description: str) -> str:
    return f"<p>{html_page.image(file.read_bytes(), description, 'wide')}</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[visible(cell) for cell in row] for row in rows]
    is_published = [any(cell.endswith("(published)") for cell in row) for row in rows]
    return html_page.table(head, cells, ["published" if p else "" for p in is_published])


def _tasks(results: Results) -> Iterator[str]:
    yield "<h2>Tasks</h2>"
    for task, title in TASKS.items():
        yield f"<h3>{title}</h3>"
        if table := task_table(results, task):
            yield _table(*table)
            yield from _without(results.rows_of("task", task))
            yield from _clinical(results, task)
        else:
            yield "<p>Not scored: no data set of this task is available.</p>"


def _without(rows: Sequence[ScoreRow]) -> Iterator[str]:
    counts = [f"{r.model}, {TITLES[m]}: {n:,} of {r.questions:,}" for r in rows for m, n in r.without.items()]
    if counts:
        yield '<p class="faint">Without medical terms to compare (0 in the average over all samples): '
        yield f"{visible('; '.join(counts))}.</p>"


def _clinical(results: Results, task: str) -> Iterator[str]:
    rows = [
        (visible(model), visible(name), f"{value:.4f}" if isinstance(value, float) else visible(value))
        for model, tasks in results.clinical.items()
        for name, value in tasks.get(task, {}).items()
    ]
    if rows:
        yield "<p>Clinical metrics, by RadEval:</p>" + html_page.table(("model", "metric", "value"), rows)


def _calibration(results: Results, folder: Path, calibrated: bool) -> Iterator[str]:
    yield "<h2>Yes and no</h2>"
    if calibrated:
        yield "<p>From the probability of the first token of the answer; the paper has no such results. AUC and "
        yield "calibration error (ECE) are in the table of disease diagnosis. A failed answer counts as one half.</p>"
        yield _figure(folder / "calibration.png", "calibration, probabilities, ROC")
    else:
        yield "<p>No model has probabilities for all its yes/no answers.</p>"
    for model, answers in results.scored.items():
        answers = [a for a in answers if a.question.task == "diagnosis"]
        if missing := scoring.without_probability(answers):
            why = f"no AUC, as {missing:,} of {len(answers):,} answers have no p_yes"
            yield f'<p class="faint">{visible(model)}: {why}.</p>'


def _by_task(results: Results) -> Iterator[tuple[str, str, list[ScoredAnswer]]]:
    """Yield (model, title of the task, its answers) where there are answers."""
    for model, answers in results.scored.items():
        for task, title in TASKS.items():
            if task_answers := [a for a in answers if a.question.task == task]:
                yield model, title, task_answers


def _lengths(results: Results) -> Iterator[str]:
    mean = lambda texts: f"{sum(len(t.split()) for t in texts) / len(texts):.1f}"  # noqa: E731
    rows = []
    for model, title, answers in _by_task(results):
        words = mean([a.answer.text for a in answers]), mean([a.question.references[0] for a in answers])
        truncated = sum(a.answer.ended == "length" for a in answers) / len(answers)
        recorded = any(a.answer.ended for a in answers)
        rows.append((visible(model), title, *words, f"{truncated:.1%}" if recorded else ""))
    yield html_page.table(("model", "task", "words per answer", "words per reference", "cut at the length limit"), rows)


def _examples(results: Results) -> Iterator[str]:
    for model, title, answers in _by_task(results):
        rng = np.random.default_rng(results.benchmark.seed)
        shuffled = [answers[i] for i in rng.permutation(len(answers))]
        if answers[0].question.closed:
            good, bad = ([a for a in shuffled if a.quality == value] for value in (1.0, 0.0))
        else:
            ranked = sorted(shuffled, key=lambda a: -a.quality)
            third = max(len(ranked) // 3, 1)
            best, worst = ({id(a) for a in part} for part in (ranked[:third], ranked[third:][-third:]))
            good, bad = ([a for a in shuffled if id(a) in part] for part in (best, worst))
        yield f"<h3>{visible(model)}: {title}</h3>"
        for css_class, part in (("right", good), ("wrong", bad)):
            yield from (example(answer, css_class) for answer in part[:EXAMPLES])


def example(scored: ScoredAnswer, css_class: str) -> str:
    """Return the HTML of a question with its scans, answer, reference and scores."""
    q, values = scored.question, ", ".join(
        f"{TITLES[name]} {100 * v:.0f} %" for name, v in scored.values.items() if math.isfinite(v)
    )  # fmt: skip
    answer = f"<b>{visible_lines(scored.answer.text) or '(empty)'}</b>"
    if scored.error:
        answer += f' <span class="bad">{visible(scored.error)}</span>'
    elif scored.refused:
        answer += " (a refusal)"
    elif q.closed:
        answer += f" (matched to {visible(scored.predicted or 'no choice')})"
    p_yes = "" if scored.answer.p_yes is None else f", probability of yes {scored.answer.p_yes:.2f}"
    context = f'<span class="faint">{visible_lines(q.context)}</span><br>' if q.context else ""
    return (
        f'<div class="asked {css_class}"><div class="scans">{"".join(map(scan_images, q.scans[:4]))}</div><div>'
        f'<span class="faint">{visible(q.row_id)}</span><br>{context}{visible_lines(q.prompt)}<br>answer: {answer}<br>'
        f"reference: <b>{visible_lines(' / '.join(q.references))}</b><br>"
        f'<span class="faint">{values}{p_yes}</span></div></div>'
    )


def scan_images(scan: Scan, count: int = 1, pixels: int = EXAMPLE_PIXELS) -> str:
    """Return the HTML of up to `count` slices of a scan (1: the middle slice), or of the error if it is unreadable.

    CT is shown in its window (slices.slices, `for_people`).
    """
    try:
        scan_slices = slices(scan, count, for_people=True)
    except ValueError as error:
        return f'<span class="bad">{visible(str(error)[:200])}</span>'
    shown = []
    for s in scan_slices:
        s.image.thumbnail((pixels, pixels))
        label = f"slice {s.number} of {s.count}" if s.count > 1 else "2D"
        label += f", {s.window}" if s.window else ""
        shown.append(f"<figure>{html_page.image(s.image, label)}<figcaption>{visible(label)}</figcaption></figure>")
    return "".join(shown)


def _failures(results: Results) -> Iterator[str]:
    yield "<h2>Failed answers, counted as wrong</h2>"
    for model, answers in results.scored.items():
        failed = [f"{a.question.row_id}: {a.error}" for a in answers if a.error]
        yield f"<p>{visible(model)}: {len(failed):,} of {len(answers):,}.</p>"
        if failed:
            yield _list(failed[:LISTED])
            yield f"<p>{f'The first {LISTED}; all' if len(failed) > LISTED else 'All'} are in report.json.</p>"


def _leaks(results: Results) -> Iterator[str]:
    yield "<h2>Test studies in the training data</h2>"
    if results.leaks is None:
        yield "<p>Not searched: the config has no `index` of the training data.</p>"
    elif not results.leaks:
        yield "<p>None: no study by its name, and no scan by the SHA-256 of its file.</p>"
    else:
        leaked = len({leak["id"] for leak in results.leaks})
        yield f'<p class="warn">{leaked:,} questions are about training data. All: leaks.jsonl.</p>'
        yield _list([f"{x['id']}: {x['kind']} {x['what']}, in {x['in']}" for x in results.leaks[:LISTED]])
