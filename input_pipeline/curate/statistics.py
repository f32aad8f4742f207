"""statistics: what tables hold, as the paper's Figure 4 shows it (2D and 3D, modality, task), and a data card."""

from __future__ import annotations

import collections
import datetime
import json
from pathlib import Path

from input_pipeline.curate import console, jobs, layouts
from input_pipeline.curate.cases import _CODES
from input_pipeline.curate.jobs import Report, Result
from input_pipeline.curate.splits import opened
from input_pipeline.datasets import modalities, sample_rng
from input_pipeline.files import atomic_write, write_text
from input_pipeline.images import scans
from input_pipeline.samples import RowError, Text

DESCRIPTION = """\
Count what tables hold: 2D and 3D scans, modalities, tasks (the paper's Figure 4), splits and lengths; draw it, and
write a data card.
"""
EPILOG = """\
what is written to DIR:
  statistics.json, figure4.png, card.md, report.json, problems.jsonl

A scan's modality is that of its DICOM header, else the label of a modality row about it, else what the family always
shows (X-rays, mammograms); otherwise it is "not stated": nothing is read into captions. The card takes over the reports
of the builders that are named with --report, and says of each source's licence what --licence gives.

examples:
  python -m input_pipeline.curate statistics --root data --out stats pmc_vqa=vqa.csv rad3d_modality=modality.csv
  python -m input_pipeline.curate statistics --root data --out stats --name "RadMD, rebuilt" \\
      --report radmd/report.json --licence vqa.csv="CC BY-SA" pmc_vqa=vqa.csv
"""
_ALWAYS = {"mimic_cxr": "X-ray", "cxr_mix": "X-ray", "vindr_pcxr": "X-ray", "vindr_spinexr": "X-ray",
           "vindr_mammo": "mammography"}  # fmt: skip
NOT_STATED = "not stated"


def main(tool: str, argv: list[str]) -> int:
    parser = console.parser(tool, DESCRIPTION, EPILOG)
    layouts.add_tables(parser)
    parser.add_argument("--name", default="A data set for RadFM", help="title of the card")
    parser.add_argument("--report", action="append", default=[], metavar="FILE", help="report.json of a builder")
    parser.add_argument("--licence", action="append", default=[], metavar="TABLE=TEXT", help="for the card; repeatable")
    args = parser.parse_args(argv)
    options = {"name": args.name, "report": args.report, "licence": args.licence}
    return console.run(args, lambda out, **more: build(args.tables, args.root, out, options, **more))


def build(specs, root, directory, options: dict, progress=jobs.silent, said=None) -> dict:
    """Counts, draws, and writes the card; returns the report. Raises ValueError."""
    root, directory = Path(root).absolute(), Path(directory).absolute()
    result, report = Result(), Report(directory, "statistics", {"root": str(root), "tables": specs} | options)
    licences = dict(text.partition("=")[::2] for text in options["licence"])
    reports = [json.loads(Path(file).read_text(encoding="utf-8")) for file in options["report"]]
    named = layouts.all_named(specs, root)
    labels: dict[str, str] = {}
    where: dict[str, str] = {}
    tables: dict[str, dict] = {}
    tasks: collections.Counter[str] = collections.Counter()
    for table, dataset in opened(named, result):
        name, family = table.name, table.family
        done = progress(name, "rows", len(dataset))
        counted = tables[name] = {"family": family, "rows": len(dataset), "scans": 0, "studies": 0, "tasks": {}}
        shown, studies, words, most = set(), set(), 0, 0
        own: collections.Counter[str] = collections.Counter()
        for i in range(len(dataset)):
            try:
                sample = dataset.sample(i, sample_rng(0, 0, dataset.name, dataset.row_id(i)))
                found = dataset.scans(i)
            except RowError as error:
                result.problem(error.file, error.row, error.reason, error.remedy)
                continue
            own[sample.task] += 1
            studies.add(sample.study_id)
            said_here = sum(len(p.text.split()) for p in sample.parts if isinstance(p, Text))
            words, most = words + said_here, max(most, said_here)
            for scan in found:
                shown.add(scan.path)
                where.setdefault(table.below(scan.path), family)
            label = _label(family, dataset._rows[i])
            if label:
                labels.update(dict.fromkeys((table.below(scan.path) for scan in found), label))
            done(1, 0)
        tasks.update(own)
        counted |= {"scans": len(shown), "studies": len(studies), "tasks": dict(own.most_common())}
        counted["words"] = {"mean": round(words / max(sum(own.values()), 1), 1), "most": most}
    dimensions, found = _scans(root, where, labels, result, progress)
    statistics = {
        "dimensions": dict(dimensions.most_common()),
        "modalities": dict(found.most_common()),
        "tasks": dict(tasks.most_common()),
        "tables": tables,
    }
    write_text(directory / "statistics.json", json.dumps(statistics, indent=1, ensure_ascii=False) + "\n")
    _draw(directory / "figure4.png", statistics)
    write_text(directory / "card.md", card(options["name"], statistics, licences, reports))
    for kind in ("dimensions", "modalities", "tasks"):
        result.counts |= {f"{kind}: {value}": count for value, count in statistics[kind].items()}
    report.add(result)
    return report.write()


def _label(family: str, value) -> str:
    """The modality that a row's label names."""
    if family == "rad3d_modality" or (family == "mpx_single" and value[1] == "modality"):
        return " and ".join(sorted(value[-1]))
    return ""


def _scans(root: Path, where: dict[str, str], labels, result: Result, progress):
    dimensions: collections.Counter[str] = collections.Counter()
    found: collections.Counter[str] = collections.Counter()
    done = progress("reading headers", "scans", len(where))
    for path, family in where.items():
        try:
            header = scans.header(scans.resolve(root, path))
        except scans.ScanError as error:
            result.count("scans that cannot be read")
            result.problem(error.path, path, error.reason, error.remedy)
        else:
            dimensions[header.kind.upper()] += 1
            said = _CODES.get(header.modality or "") or labels.get(path) or _ALWAYS.get(family) or NOT_STATED
            assert said == NOT_STATED or all(part in modalities.WORDS for part in said.split(" and ")), said
            found[said] += 1
        done(1, 0)
    return dimensions, found


def _draw(file: Path, statistics: dict) -> None:
    """The three pies of Figure 4; slices below 2 % together."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, kind in zip(axes, ("dimensions", "modalities", "tasks"), strict=True):
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


def card(name: str, statistics: dict, licences: dict[str, str], reports: list[dict]) -> str:
    """A data card in Markdown: what is in it, where it comes from, how it was made, what it is not for."""
    lines = [
        f"# {name}",
        "",
        "Research only. Built from the sources below, each under its own terms; nothing here replaces them.",
        f"Card written on {datetime.date.today().isoformat()} by `python -m input_pipeline.curate statistics`.",
        "",
        "## Tables",
        "",
        "| table | family | rows | scans | studies | words a row | licence |",
        "|---|---|---|---|---|---|---|",
    ]
    for table, found in statistics["tables"].items():
        said = licences.get(table, "not stated: ask the source")
        lines.append(
            f"| {table} | {found['family']} | {found['rows']:,} | {found['scans']:,} | {found['studies']:,} | "
            f"{found['words']['mean']} | {said} |"
        )
    for kind in ("dimensions", "modalities", "tasks"):
        counts = statistics[kind]
        total = max(sum(counts.values()), 1)
        lines += ["", f"## {kind.capitalize()}", "", "| | count | share |", "|---|---|---|"]
        lines += [f"| {value} | {count:,} | {100 * count / total:.1f} % |" for value, count in counts.items()]
    lines += ["", "![2D and 3D, modalities, tasks](figure4.png)"]
    if reports:
        lines += ["", "## How it was made"]
    for report in reports:
        lines += [
            "",
            f"### {report['tool']}",
            "",
            "```json",
            json.dumps(report["options"], ensure_ascii=False),
            "```",
            "",
        ]
        lines += [f"- {what}: {count:,}" if isinstance(count, int) else f"- {what}: {count}"
                  for what, count in report["counts"].items()]  # fmt: skip
        if report.get("problems"):
            lines.append(f"- could not be used: {report['problems']:,}")
    lines += [
        "",
        "## ScanLimits",
        "",
        "- Labels and reports are as good as their sources; mined labels and answers of a language model hold errors.",
        "- The shares above are those of the sources, not of any population.",
        "- Not for clinical use.",
        "",
    ]
    return "\n".join(lines)
