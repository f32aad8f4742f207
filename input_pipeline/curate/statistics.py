"""statistics: contents of tables as in the paper's Figure 4 (2D and 3D, modality, task), and a data card."""

from __future__ import annotations

import collections
import datetime
import json
from pathlib import Path

from input_pipeline.curate import console, jobs, layouts
from input_pipeline.curate.cases import DICOM_MODALITIES
from input_pipeline.curate.jobs import Report, Result
from input_pipeline.curate.splits import opened
from input_pipeline.datasets import modalities, sample_rng
from input_pipeline.files import atomic_write, read_json, write_json, write_text
from input_pipeline.images import scans
from input_pipeline.samples import RowError, Text

DESCRIPTION = """\
Count the contents of tables: 2D and 3D scans, modalities, tasks (the paper's Figure 4) and lengths. Draw a figure and
write a data card.
"""
EPILOG = """\
output in DIR:
  statistics.json, figure4.png, card.md, report.json, problems.jsonl

The modality of a scan is that of its DICOM header, else its label in a modality table, else that of its family (X-rays,
mammograms), else "not stated"; captions are not interpreted. The card includes the reports of tools named with --report
and the licences given with --licence.

examples:
  python -m input_pipeline.curate statistics --root data --out stats pmc_vqa=vqa.csv rad3d_modality=modality.csv
  python -m input_pipeline.curate statistics --root data --out stats --name "RadMD, rebuilt" \\
      --report radmd/report.json --licence vqa.csv="CC BY-SA" pmc_vqa=vqa.csv
"""
_FAMILY_MODALITIES = dict.fromkeys(("mimic_cxr", "cxr_mix", "vindr_pcxr", "vindr_spinexr"), "X-ray")
_FAMILY_MODALITIES |= {"vindr_mammo": "mammography"}
NOT_STATED = "not stated"


def _add_options(parser) -> None:
    layouts.add_tables(parser)
    parser.add_argument("--name", default="A data set for RadFM", help="title of the card")
    parser.add_argument("--report", action="append", default=[], metavar="FILE", help="report.json of a tool")
    parser.add_argument("--licence", action="append", default=[], metavar="TABLE=TEXT", help="licence of a table")


def curate(specs, root, directory, options: dict, progress=jobs.no_progress, log=jobs.no_log) -> dict:
    """Write the statistics, the figure and the card. Returns the report. Raises ValueError."""
    root, directory = Path(root).absolute(), Path(directory).absolute()
    result, report = Result(), Report(directory, "statistics", {"root": str(root), "tables": specs} | options)
    licences = dict(text.partition("=")[::2] for text in options["licence"])
    reports = [read_json(file, kind=dict) for file in options["report"]]
    labels: dict[tuple[str, int | None], str] = {}  # path and volume of a scan -> label of its modality
    families: dict[tuple[str, int | None], str] = {}  # path and volume of a scan -> family
    tables: dict[str, dict] = {}
    tasks: collections.Counter[str] = collections.Counter()
    for table, dataset in opened(layouts.named_tables(specs, root), result):
        tables[table.name] = _count_table(table, dataset, labels, families, result, progress)
        tasks.update(tables[table.name]["tasks"])
    dimensions, found = _count_scans(root, families, labels, result, progress)
    counters = {"dimensions": dimensions, "modalities": found, "tasks": tasks}
    statistics = {kind: dict(counter.most_common()) for kind, counter in counters.items()} | {"tables": tables}
    write_json(directory / "statistics.json", statistics)
    _draw(directory / "figure4.png", statistics)
    write_text(directory / "card.md", card(options["name"], statistics, licences, reports))
    for kind in counters:
        result.counts |= {f"{kind}: {value}": count for value, count in statistics[kind].items()}
    report.add(result)
    return report.write()


def _count_table(table, dataset, labels: dict, families: dict, result: Result, progress) -> dict:
    """Return the counts of a table, and add its scans to `labels` and `families`."""
    done = progress(table.name, "rows", len(dataset))
    scan_keys, studies, lengths = set(), set(), []
    tasks: collections.Counter[str] = collections.Counter()
    for i in range(len(dataset)):
        try:
            sample = dataset.sample(i, sample_rng(0, 0, dataset.name, dataset.row_id(i)))
            shown = dataset.scans(i)
        except RowError as error:
            result.error(error)
            continue
        tasks[sample.task] += 1
        studies.add(sample.study_id)
        lengths.append(sum(len(p.text.split()) for p in sample.parts if isinstance(p, Text)))
        below = [(table.below(scan.path), scan.volume) for scan in shown]
        scan_keys.update(below)
        for key in below:
            families.setdefault(key, table.family)
        if label := _label(table.family, dataset._rows[i]):
            labels.update(dict.fromkeys(below, label))
        done(1, 0)
    words = {"mean": round(sum(lengths) / max(len(lengths), 1), 1), "most": max(lengths, default=0)}
    counts = {"family": table.family, "rows": len(dataset), "scans": len(scan_keys), "studies": len(studies)}
    return counts | {"tasks": dict(tasks.most_common()), "words": words}


def _label(family: str, value) -> str:
    """Return the modality named by the label of a row, or ""."""
    if family == "rad3d_modality" or (family == "mpx_single" and value[1] == "modality"):
        return " and ".join(sorted(value[-1]))
    return ""


def _count_scans(root: Path, families: dict[tuple[str, int | None], str], labels, result: Result, progress):
    """Return the numbers of scans by dimension and by modality, from their headers. A stack of S scans counts S."""
    dimensions: collections.Counter[str] = collections.Counter()
    counts: collections.Counter[str] = collections.Counter()
    done = progress("reading headers", "scans", len(families))
    for (path, volume), family in families.items():
        try:
            header = scans.header(scans.resolve(root, path))
        except scans.ScanError as error:
            result.count("scans that cannot be read")
            result.problem(error.path, path, error.reason, error.remedy)
        else:
            dimensions[header.kind.upper()] += 1
            modality = DICOM_MODALITIES.get(header.modality or "") or labels.get((path, volume))
            modality = modality or _FAMILY_MODALITIES.get(family) or NOT_STATED
            assert modality == NOT_STATED or all(part in modalities.WORDS for part in modality.split(" and ")), modality
            counts[modality] += 1
        done(1, 0)
    return dimensions, counts


def _draw(file: Path, statistics: dict) -> None:
    """Draw the three pie charts of Figure 4; slices below 2 % are merged."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    for axis, kind in zip(figure.subplots(1, 3), ("dimensions", "modalities", "tasks"), strict=True):
        counts = statistics[kind]
        total = sum(counts.values())
        shown = {k: v for k, v in counts.items() if v >= 0.02 * total}
        rest = total - sum(shown.values())
        shown |= {"others": rest} if rest else {}
        axis.set_title(f"{kind} ({total:,})")
        if total:
            axis.pie(list(shown.values()), labels=[f"{k} {100 * v / total:.0f} %" for k, v in shown.items()])
    with atomic_write(file) as partial:
        figure.savefig(partial, format="png", dpi=110)


_CARD_START = """\
# {name}

Research only. Built from the sources below; the terms of each source apply.
Written on {today} by `python -m input_pipeline.curate statistics`.

## Tables

| table | family | rows | scans | studies | words per row | licence |
|---|---|---|---|---|---|---|"""
_CARD_END = """
## Limits

- Labels and reports are as good as their sources. Mined labels and answers of a language model have errors.
- The shares above describe the sources, not a population.
- Not for clinical use.
"""


def card(name: str, statistics: dict, licences: dict[str, str], reports: list[dict]) -> str:
    """Return a data card in Markdown: contents, sources, how the tables were made, and limits."""
    lines = [_CARD_START.format(name=name, today=datetime.date.today().isoformat())]
    for table, counts in statistics["tables"].items():
        licence = licences.get(table, "not stated: ask the source")
        numbers = " | ".join(f"{counts[kind]:,}" for kind in ("rows", "scans", "studies"))
        lines.append(f"| {table} | {counts['family']} | {numbers} | {counts['words']['mean']} | {licence} |")
    for kind in ("dimensions", "modalities", "tasks"):
        counts = statistics[kind]
        total = max(sum(counts.values()), 1)
        lines += ["", f"## {kind.capitalize()}", "", "| | count | share |", "|---|---|---|"]
        lines += [f"| {value} | {count:,} | {100 * count / total:.1f} % |" for value, count in counts.items()]
    lines += ["", "![2D and 3D, modalities, tasks](figure4.png)"]
    if reports:
        lines += ["", "## How it was made"]
    for report in reports:
        options = json.dumps(report["options"], ensure_ascii=False)
        lines += ["", f"### {report['tool']}", "", "```json", options, "```", ""]
        lines += [f"- {label}: {count:,}" if isinstance(count, int) else f"- {label}: {count}"
                  for label, count in report["counts"].items()]  # fmt: skip
        if report.get("problems"):
            lines.append(f"- problems: {report['problems']:,}")
    return "\n".join([*lines, _CARD_END])


_run = console.run_on_tables(curate, "name report licence")
TOOLS = {"statistics": console.Tool(DESCRIPTION, EPILOG, _add_options, _run)}
