"""published: data sets as downloaded from their owners -> JSON Lines in the schema of input_pipeline.datasets.jsonl."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path

from input_pipeline.curate import console, jobs, layouts
from input_pipeline.curate.jobs import Report, Result
from input_pipeline.curate.labels import reject
from input_pipeline.curate.m3d import m3d_cap, m3d_vqa
from input_pipeline.curate.published_pairs import PAIRS
from input_pipeline.curate.published_reports import REPORTS
from input_pipeline.curate.source_files import Case, SourceFiles
from input_pipeline.datasets import prompts, sample_rng
from input_pipeline.datasets.rows import bad_path

SPLITS = ("train", "validation", "test", "")
# set -> read(files, with_choices=...)
SETS: dict[str, Callable[..., Iterator[Case]]] = {name: pairs.cases for name, pairs in PAIRS.items()}
SETS |= {name: (lambda files, with_choices, reader=reader: reader(files)) for name, reader in REPORTS.items()}
SETS |= {"m3d_cap": lambda files, with_choices: m3d_cap(files), "m3d_vqa": m3d_vqa}

DESCRIPTION = """\
Write data sets, as downloaded from their owners, as JSON Lines for the family `jsonl`, one file per official split.
Scans stay where they are, except volumes of M3D, which are written to SET/unpacked.
"""
EPILOG = f"""\
sets: {", ".join(SETS)}
(docs/data_layouts.md lists the files, licence and access of each. VQA-RAD, ROCOv2, MedTrinity-25M and others in Parquet
files need no conversion: use the family `hf`.)

output in DIR:
  SET_train.jsonl, SET_validation.jsonl, SET_test.jsonl   the splits of the owners
  SET.jsonl                                               a set without official splits: use the tool `splits`
  report.json, problems.jsonl                             counts (also of headings of reports), rows that are not used

Paths start with the name of the set's folder, so the root is --root:
`{{"family": "jsonl", "root": ROOT, "table": "DIR/slake_train.jsonl"}}`.

examples:
  python -m input_pipeline.curate published --root data --out data/tables slake=Slake1.0 vqa_rad=VQA-RAD
  python -m input_pipeline.curate published --root data --out data/tables mimic_cxr_jpg=mimic-cxr-jpg-2.1.0
"""


def _add_options(parser) -> None:
    parser.add_argument("tables", nargs="+", metavar="SET=FOLDER", help="a set and its folder below --root")
    parser.add_argument("--root", required=True, metavar="DIR", help="directory of all folders")
    text = "add the choices of PMC-VQA and M3D-VQA to the question, and the letter to the answer"
    parser.add_argument("--choices", action="store_true", help=text)


def curate(specs: list[str], root, directory, options: dict, progress=jobs.no_progress, log=jobs.no_log) -> dict:
    """Write the tables of the sets. Returns the report. Raises ValueError."""
    root, directory = Path(root).absolute(), Path(directory).absolute()
    report = Report(directory, "published", {"root": str(root), "sets": specs} | options)
    sets = [_named(spec, root) for spec in specs]
    if len({name for name, _ in sets}) < len(sets):
        raise ValueError(f"{', '.join(specs)}: a set is repeated")
    done = progress("published", "sets", len(sets))
    headers = {_file(name, split): None for name, _ in sets for split in SPLITS}
    with layouts.Tables(directory, headers) as out:
        for name, folder in sets:
            result = Result()
            _write(name, SourceFiles(root, folder, result), options["choices"], out)
            report.add(result)
            done(1, bool(result.problems))
        if not any(out.rows.values()):
            report.write()
            raise ValueError(f"no row can be used: see {report.problems_file}")
    report.counts |= {f"{name}: rows": count for name, count in out.rows.items() if count}
    return report.write()


def _named(spec: str, root: Path) -> tuple[str, str]:
    name, equals, folder = spec.partition("=")
    if not equals or name not in SETS:
        raise ValueError(f"{spec!r}: write SET=FOLDER, with one of the sets {', '.join(SETS)}")
    folder = posixpath.normpath(folder.strip("/"))
    if folder != "." and bad_path(folder):
        raise ValueError(f"{spec!r}: the folder must be below --root: {bad_path(folder)}")
    if not (root / folder).is_dir():
        raise ValueError(f"{spec!r}: {root / folder} is not a directory")
    return name, folder


def _file(name: str, split: str) -> str:
    return f"{name}_{split}.jsonl" if split else f"{name}.jsonl"


def _write(name: str, files: SourceFiles, with_choices: bool, out: layouts.Tables) -> None:
    seen: set[str] = set()
    for case in SETS[name](files, with_choices=with_choices):
        bad = next(filter(None, map(bad_path, case.scans)), None)
        if bad or not case.scans or case.id in seen:
            reason = f"the path cannot be used: {bad}" if bad else "it has no scan, or its id is repeated"
            reject(files.result, files.root, case.id, reason)
            continue
        seen.add(case.id)
        out.write(_file(name, case.split), _row(name, files.folder, case))
    files.check()


def _row(name: str, folder: str, case: Case) -> dict:
    question = case.question or prompts.draw(case.prompts, sample_rng(0, 0, name, case.id))
    row = {
        "id": f"{name}-{case.id}",
        "task": case.task,
        "scans": [posixpath.normpath(f"{folder}/{s}") for s in case.scans],
    }
    row |= {"context": case.context} if case.context else {}
    row |= {"instruction": question, "response": case.answer}
    return row | ({"study": case.study} if case.study else {})


_run = console.run_on_tables(curate, "choices")
TOOLS = {"published": console.Tool(DESCRIPTION, EPILOG, _add_options, _run)}
