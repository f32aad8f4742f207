"""The files of a report: report.html (see report_page.py), report.md, report.json and scores.csv.

Rows of the paper's Table 4 are shown next to the results, marked as published; `results.caveats` lists the differences.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
from pathlib import Path

from input_pipeline.files import write_json, write_text
from input_pipeline.inspect.escaping import visible
from input_pipeline.messages import spreadsheet_cell
from radfm_jax.evaluate import figures, published, report_page
from radfm_jax.evaluate.radbench import TASKS
from radfm_jax.evaluate.results import Results, caveats, grouped_tables, method, not_scored, task_table, warnings_of


def write(results: Results, out: Path) -> None:
    """Write all files of the report."""
    out.mkdir(parents=True, exist_ok=True)
    folder = out / "pictures"
    figures.radar(results.rows, folder / "radar.png", results.comparable)
    figures.bars(results.rows, folder / "bars.png", results.comparable)
    figures.lengths(results.scored, folder / "lengths.png")
    calibrated = figures.calibration(results.scored, folder / "calibration.png")
    write_json(out / "report.json", as_json(results))
    write_text(out / "scores.csv", as_csv(results))
    write_text(out / "report.md", as_markdown(results))
    write_text(out / "report.html", "".join(f"{line}\n" for line in report_page.page(results, folder, calibrated)))


def as_json(results: Results) -> dict:
    finite = lambda i: {k: v if math.isfinite(v) else None for k, v in dataclasses.asdict(i).items()}  # noqa: E731
    return {
        "warnings": warnings_of(results),
        "caveats": caveats(results),
        "intervals": method(results),
        "benchmark": results.benchmark.to_dict(),
        "models": dict(results.sources),
        "scores": [
            dataclasses.asdict(row) | {"metrics": {name: finite(i) for name, i in row.metrics.items()}}
            for row in results.rows
        ],
        "published": {
            f"{name}, published": {task: published.values(name, task) for task in published.TABLE}
            for name in published.MODELS
        },
        "clinical": results.clinical,
        "not_scored": results.built.missing,
        "left_out": results.built.skipped,
        "leaks": None if results.leaks is None else len(results.leaks),
        "failed": {
            model: {a.question.row_id: a.error for a in answers if a.error} for model, answers in results.scored.items()
        },
    }


def as_csv(results: Results) -> str:
    """Return a line per model, part and metric; values are fractions of 1."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("model source task grouping group metric value low high questions failed refused studies".split())
    number = lambda x: f"{x:.6f}" if math.isfinite(x) else ""  # noqa: E731
    for row in results.rows:
        for name, i in row.metrics.items():
            values = map(number, (i.value, i.low, i.high))
            counts = row.questions, row.failed, row.refused, row.studies
            names = row.model, "ours", row.task, row.grouping, row.group, name
            writer.writerow((*map(spreadsheet_cell, names), *values, *counts))
    for model in published.MODELS:
        for task in published.TABLE:
            for name, values in published.values(model, task).items():
                counts = published.CASES[task], "", "", ""
                writer.writerow((model, "published", task, "task", "", name, *map(number, values), *counts))
    return text.getvalue()


def as_markdown(results: Results) -> str:
    lines = ["# RadBench", "", "Research only, not for clinical use.", ""]
    lines += [f"- {_markdown(line)}" for line in (*warnings_of(results), *caveats(results))]
    lines += [f"- {method(results)}", ""]
    tables = {title: task_table(results, task) for task, title in TASKS.items()}
    for grouping in ("data set", "modality", "anatomy"):
        tables |= {f"{title} by {grouping}": table for title, table in grouped_tables(results, grouping).items()}
    row = lambda cells: f"| {' | '.join(map(_markdown, cells))} |"  # noqa: E731
    for title, table in tables.items():
        if table:
            head, rows = table
            lines += [f"## {title}", "", row(head), "|" + "---|" * len(head), *map(row, rows), ""]
    lines += ["## Not scored", "", *(f"- {_markdown(line)}" for line in not_scored(results))]
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """Escape any text for a table cell or a list item, on one line."""
    escaped = visible(" ".join(text.split())).replace("&#x27;", "'").replace("&quot;", '"')
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", escaped)
    return re.sub(r"^([\d#]*)([-+#.)])(?= |$)", r"\1\\\2", escaped)  # would start a list or a heading
