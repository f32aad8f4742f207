"""Report of RadBench: tables, Markdown, HTML and figures."""

import dataclasses
import io
import math
import re
from pathlib import Path

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from input_pipeline.text.terms import Terms
from radfm_jax.evaluate import (
    figures,
    published,
    radbench,
    report,
    report_page,
    scoring,
)
from radfm_jax.evaluate.metrics import Interval
from radfm_jax.evaluate.model_answers import RecordedAnswer
from radfm_jax.evaluate.radbench import Question
from radfm_jax.evaluate.radbench_build import BuiltBenchmark
from radfm_jax.evaluate.radbench_command import score_table
from radfm_jax.evaluate.results import Results


def run_of(*models: str) -> Results:
    """Return results with one question per task, all correct."""
    asked = {"rad3d_modality": "CT", "cxr_mix": "yes"}
    asked |= dict.fromkeys(("vqa_rad", "rad3d_caption", "rad3d_rationale"), "mass")
    task = {name: radbench.DATASETS[name].task for name in asked}
    questions = [
        Question(f"{name}/1", task[name], name, "Q?", (right,), closed=radbench.CLOSED.get(task[name], ()))
        for name, right in asked.items()
    ]
    answers = {q.row_id: RecordedAnswer(q.references[0]) for q in questions}
    scored = {model: scoring.score(questions, answers, Terms(["mass"])) for model in models}
    of = {model: scoring.score_rows(model, one, resamples=5, seed=0, by_study=False) for model, one in scored.items()}
    found = radbench.Benchmark({name: {"family": "vqa_rad", "root": "x", "table": "y"} for name in asked})
    return Results(found, BuiltBenchmark(questions, {}, {}), scored, [line for lines in of.values() for line in lines])


def test_why_a_model_has_no_auc(tmp_path):
    run = run_of("one", "two")
    (asked,) = [q for q in run.built.questions if q.task == "diagnosis"]
    another = dataclasses.replace(asked, row_id="cxr_mix/2", references=("no",))
    for model, given in (("one", RecordedAnswer("no")), ("two", RecordedAnswer("no", 0.2))):
        some = scoring.score(
            [asked, another], {"cxr_mix/1": RecordedAnswer("yes", 0.9), "cxr_mix/2": given}, Terms(["mass"])
        )
        run.scored[model][:] = [one for one in run.scored[model] if one.question.task != "diagnosis"] + some
    report.write(run, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "one: no AUC, as 1 of 2 answers have no p_yes." in page and "two: no AUC" not in page


def test_the_table_of_the_terminal_is_readable_at_80_columns():
    """Each value is on one line with its interval, for any number of models and any names."""
    models = ("radfm-of-our-own-run-7", "MedVInT-TD", "[/red]a", "a-name-that-no-column-could-ever-hold-in-one-line")
    run, shown = run_of(*models), io.StringIO()
    Console(file=shown, width=80).print(score_table(run), soft_wrap=True)
    text = shown.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    for model in models[:3]:
        figures = [line.split() for line in text.splitlines() if f" {model} " in line]
        assert all(words[-3:] == ["100.00", "(100.00,", "100.00)"] for words in figures)
        assert len(figures) == sum(len(line.metrics) for line in run.rows if (line.model, line.group) == (model, ""))
    assert re.search("BLEU-1 .*(?s:.*)RadFM, published +31.43 +[(]31.20, 31.65[)]", text)
    assert "a-name-that-no-column" in text  # folded


def test_markdown_shows_names_as_they_are():
    """A parser finds the exact texts in cells and list items, and no HTML, link, code or emphasis."""
    names = ["<b>x", "a|b", "`c", "*d* _e_ ~~f~~", "[g](http://h)", "![i](j)", "k\\|l", "&lt;", "2. m", "it's", "n\n|"]
    run = run_of(*names)
    for name, fields in zip(names, run.benchmark.sets.values(), strict=False):
        fields["title"] = f"## {name}"
    run.built.missing |= {name: f"- {name}\n# <i>{name}" for name in names}
    run.built.skipped |= {name: {f"<script>{name}": 1} for name in names}
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(report.as_markdown(run))
    assert {t.type for t in tokens} & {"html_block", "fence", "code_block", "ordered_list_open"} == set()
    inline = [token for token in tokens if token.type == "inline"]
    assert {child.type for token in inline for child in token.children} == {"text"}
    texts = ["".join(child.content for child in token.children) for token in inline]
    spaced = [" ".join(name.split()) for name in names]
    for name in spaced:
        assert texts.count(name) == sum(line.model.split() == name.split() for line in run.rows)  # a cell each
        assert f"{name}: - {name} # <i>{name}" in texts and f"{name}: 1 rows skipped: <script>{name}" in texts
    assert {text for text in texts if text.startswith("## ")} == {f"## {name}" for name in spaced[:5]}
    assert not [token for token in tokens if token.type == "heading_open" and token.tag not in ("h1", "h2")]


def test_bars_are_centred_on_their_metric(monkeypatch):
    """With and without published bars; a task without all its metrics has no mean."""
    values = {m: Interval(0.5, 0.4, 0.6) for m in published.TABLE["diagnosis"]}
    vqa = {m: Interval(0.5 if m == "bleu" else math.nan, math.nan, math.nan) for m in published.TABLE["vqa"]}
    lines = [
        scoring.ScoreRow(model, task, "task", "", 9, 0, 0, 9, of, {})
        for model in ("a", "b") for task, of in (("diagnosis", values), ("vqa", vqa))
    ]  # fmt: skip
    drawn = []
    monkeypatch.setattr(figures, "_save", lambda pyplot, figure, file: drawn.append(figure))
    for comparable, bars in ((), 2), (("diagnosis",), 5):
        figures.bars(lines, Path(), comparable)
        panel = drawn[-1].axes[list(radbench.TASKS).index("diagnosis")]
        centres = sorted(bar.get_x() + bar.get_width() / 2 for bar in panel.patches)
        assert len(centres) == 2 * bars
        assert np.mean(centres[:bars]) == pytest.approx(0) and np.mean(centres[bars:]) == pytest.approx(1)
    assert figures.averages(lines, ()) == {"a": {"diagnosis": 0.5}, "b": {"diagnosis": 0.5}}


def test_reports_keep_their_lines():
    lines_of = "FINDINGS: clear.\r\nNo <effusion>.\n\nIMPRESSION: normal.\x00\n"
    question = Question("x/1", "report", "x", "Write.", ("one\ntwo",))
    (scored,) = scoring.score([question], {"x/1": RecordedAnswer(lines_of)}, Terms(["mass"]))
    shown = report_page.example(scored, "right")
    assert "FINDINGS: clear.<br>No &lt;effusion&gt;.<br><br>IMPRESSION: normal.⟨U+0000⟩</b>" in shown
    assert "<b>one<br>two</b>" in shown
