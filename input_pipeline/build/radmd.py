"""radmd: tables of MedMD -> tables of RadMD, by the rules of the paper's Table 2, each counted and with examples."""

from __future__ import annotations

import csv
import hashlib
import heapq
import json
from pathlib import Path

from input_pipeline.build import console, jobs, radiology
from input_pipeline.build.filters import FILTERS, OF_FAMILY, Settings
from input_pipeline.build.jobs import Report, Result
from input_pipeline.datasets import FAMILIES, diseases, tables
from input_pipeline.datasets.diagnosis import Diagnosis
from input_pipeline.prepare.writing import replacing, write_lines

DESCRIPTION = """\
Filter tables of MedMD into RadMD (paper, Table 2). Give each table with its family; it is written again under its name,
in its own layout, without the rows that a rule drops. Every rule has a name, its counts, and examples to look through.
"""
EPILOG = """\
rules by family (all others keep every row):
  pmc_oa, pmc_inline     dropped_family
  pmc_casereport         radiologic, size_questions, age_questions, cheating_contexts
  rad3d_caption          radiologic, size_phrases
  rad3d_vqa              radiologic, size_questions, age_questions
  rad3d_modality, rad3d_rationale   radiologic
  cxr_mix, vindr_*, diagnosis   balance: of normal and abnormal (open tables), of yes and no a disease (yes/no)

what is written to DIR: the tables; report.json (counts by table and rule); examples.jsonl (rule, what became of the
row, before, after); problems.jsonl (rows that cannot be read)

examples:
  python -m input_pipeline.build radmd --root medmd --out radmd pmc_casereport=case.csv rad3d_vqa=vqa.csv
  python -m input_pipeline.build radmd --root pmc --out r pmc_casereport=case.csv --captions pmc/captions.jsonl
  python -m input_pipeline.build radmd --root d --out r rad3d_vqa=vqa.csv --classifier my.models:radiologic
  python -m input_pipeline.build radmd --root d --out r pmc_casereport=case.csv --without cheating_contexts

A classifier is a function that takes the path of an image and returns the probability that it is radiologic; it is
asked only where neither a label nor the caption says so.
"""


def main(tool: str, argv: list[str]) -> int:
    parser = console.parser(tool, DESCRIPTION, EPILOG)
    parser.add_argument("tables", nargs="+", metavar="FAMILY=TABLE", help="a table below --root and its family")
    parser.add_argument("--root", required=True, metavar="DIR", help="below which the tables and their images lie")
    parser.add_argument("--captions", action="append", default=[], metavar="FILE", help="captions.jsonl of pmc-inline")
    parser.add_argument("--classifier", metavar="MODULE:FUNCTION", help="path of an image -> probability")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the classifier (%(default)s)")
    parser.add_argument(
        "--unknown",
        choices=("keep", "drop"),
        default="",
        help="images of which nothing says what they are (default: drop for pmc_casereport, keep for the others)",
    )
    parser.add_argument(
        "--cheating",
        choices=("drop", "cut"),
        default="drop",
        help="drop a row whose context says the answer, or cut those sentences (%(default)s)",
    )
    parser.add_argument("--without", action="append", default=[], metavar="RULE", help="leave out a rule; repeatable")
    parser.add_argument("--examples", type=int, default=20, metavar="N", help="of each rule and outcome (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the balance (%(default)s)")
    args = parser.parse_args(argv)
    options = {k: v for k, v in vars(args).items() if k not in ("out", "strict", "tables", "root")}
    return console.run(args, lambda out, **more: build(args.tables, args.root, out, options, **more))


def build(specs: list[str], root, directory: Path, options: dict, progress=jobs.silent, said=None) -> dict:
    """Filters every table; returns the report. Raises ValueError."""
    root, directory = Path(root).absolute(), Path(directory).absolute()
    named = [_spec(spec, root) for spec in specs]
    names = [file.name for _, file in named]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"two tables are called {', '.join(twice)}: rename one")
    if directory == root or any(file.parent == directory for _, file in named):
        raise ValueError(f"--out {directory} holds the tables that are to be filtered: choose another")
    unknown = [rule for rule in options.get("without", ()) if rule not in (*FILTERS, "balance")]
    if unknown:
        raise ValueError(f"rule {', '.join(unknown)} is unknown; known: {', '.join((*FILTERS, 'balance'))}")
    settings = Settings(
        root,
        _captions(options.get("captions", ())),
        radiology.open_classifier(options["classifier"]) if options.get("classifier") else None,
        options.get("threshold", 0.5),
        options.get("unknown", ""),
        options.get("cheating", "drop"),
    )
    report = Report(directory, "radmd", {"root": str(root), "tables": specs} | options)
    examples = _Examples(options.get("examples", 20))
    done = progress("radmd", "tables", len(named))
    report.more["tables"] = {}
    for family, file in named:
        result = Result()
        report.more["tables"][file.name] = _table(family, file, directory, settings, options, examples, result)
        report.add(result)
        done(1, bool(result.problems))
    write_lines(directory / "examples.jsonl", examples.all())
    return report.write()


def _spec(spec: str, root: Path) -> tuple[str, Path]:
    family, equals, table = spec.partition("=")
    if not equals or family not in FAMILIES or family in ("tfds", "jsonl"):
        raise ValueError(f"{spec!r}: FAMILY=TABLE is needed, the family being one of {', '.join(FAMILIES)}")
    if not (root / table).is_file():
        raise ValueError(f"{root / table}: there is no such table")
    return family, root / table


def _captions(files) -> dict[tuple[str, str], str]:
    """(paper, picture) -> caption, from captions.jsonl."""
    found = {}
    for file in files:
        rows, problems = tables.read_jsonl(Path(file))
        if problems:
            raise problems[0]
        for _, row in rows:
            found |= {(row["paper"], picture): row["caption"] for picture in row["pictures"]}
    return found


def read_table(family: str, file: Path) -> tuple[list[str] | None, list[tuple[int, dict]], list]:
    """(header or None for JSON, rows with all their columns, problems)."""
    required = FAMILIES[family].required
    if FAMILIES[family].layout == "json":
        return None, *tables.read_json(file, required)
    header, _, _ = tables.read_csv(file, required)
    more = [name for name in dict.fromkeys(header) if name and name not in required and header.count(name) == 1]
    _, rows, problems = tables.read_csv(file, required, more)
    return [name for name in header if name in (*required, *more)], rows, problems


def write_table(file: Path, header: list[str] | None, rows) -> None:
    with replacing(file) as partial, open(partial, "w", encoding="utf-8", newline="") as out:
        if header is None:
            json.dump(list(rows), out, ensure_ascii=False, indent=0)
        else:
            table = csv.DictWriter(out, header)
            table.writeheader()
            table.writerows(rows)


def _table(family, file, directory, settings, options, examples, result: Result) -> dict:
    header, rows, problems = read_table(family, file)
    for problem in problems:
        result.problem(problem.file, problem.row, problem.reason, problem.remedy)
    without = options.get("without", ())
    rules = [rule for rule in OF_FAMILY.get(family, ()) if rule not in without]
    counts: dict[str, dict[str, int]] = {rule: {"dropped": 0, "changed": 0} for rule in rules}
    reasons: dict[str, int] = {}
    kept = []
    for number, row in rows:
        before = row
        for rule in rules:
            try:
                verdict = FILTERS[rule](row, family, settings)
            except (OSError, ValueError, KeyError, TypeError) as error:
                result.problem(
                    file, number, f"the rule {rule} fails: {error}", "correct the row, or leave out the rule"
                )
                row = None
                break
            if verdict.row is None or verdict.reason:
                outcome = "dropped" if verdict.row is None else "changed"
                counts[rule][outcome] += 1
                reasons[verdict.reason] = reasons.get(verdict.reason, 0) + 1
                examples.add(file.name, rule, outcome, verdict.reason, before, verdict.row)
            row = verdict.row
            if row is None:
                break
        if row is not None:
            kept.append((number, row))
            for rule in rules:
                examples.add(file.name, rule, "kept", "", before, row if row != before else None)
    if issubclass(FAMILIES[family], Diagnosis) and "balance" not in without:
        chosen = _balance(kept, options.get("seed", 0))
        counts["balance"] = {"dropped": len(kept) - len(chosen), "changed": 0}
        kept = chosen
    if kept:
        write_table(directory / file.name, header, [row for _, row in kept])
    else:
        (directory / file.name).unlink(missing_ok=True)
    name = file.name
    result.count(f"{name}: rows", len(rows))
    for rule, found in counts.items():
        for outcome, count in found.items():
            if count or outcome == "dropped":
                result.count(f"{name}: {outcome} by {rule}", count)
    result.count(f"{name}: kept", len(kept))
    return {"family": family, "rows": len(rows), "kept": len(kept), "rules": counts, "reasons": reasons}


def _balance(rows: list[tuple[int, dict]], seed: int) -> list[tuple[int, dict]]:
    """As many of one side as of the other, by disease where rows say one; which, a hash decides."""
    sides: dict[str, tuple[list, list]] = {}
    for number, row in rows:
        disease = row.get("disease")
        if disease:
            key, side = diseases.canonical(disease), row["label"].strip() in ("1", "1.0")
        else:
            key, side = "", diseases.is_normal(row["label"].strip("[]' ."))
        sides.setdefault(key, ([], []))[side].append((number, row))
    kept = []
    for both in sides.values():
        count = min(map(len, both))
        for side in both:
            kept += heapq.nsmallest(count, side, key=lambda item: order(seed, item[1]))
    return sorted(kept, key=lambda item: item[0])


def order(seed: int, *values) -> bytes:
    """A place in a shuffled order that depends on the seed and the values alone."""
    return hashlib.blake2b(json.dumps([seed, *values], sort_keys=True).encode(), digest_size=16).digest()


class _Examples:
    """A few rows of each rule and outcome, chosen by hash: the same for the same table, from all over it."""

    def __init__(self, most: int):
        self.most, self.heaps = most, {}

    def add(self, table: str, rule: str, outcome: str, reason: str, before: dict, after: dict | None) -> None:
        heap = self.heaps.setdefault((table, rule, outcome), [])
        if not self.most:
            return
        place = (int.from_bytes(order(0, rule, before), "little"), len(heap))
        said = {"table": table, "rule": rule, "outcome": outcome, "reason": reason, "before": before, "after": after}
        if len(heap) < self.most:
            heapq.heappush(heap, (*place, said))
        elif place[0] < heap[0][0]:
            heapq.heapreplace(heap, (*place, said))

    def all(self):
        for heap in self.heaps.values():
            yield from (said for _, _, said in sorted(heap, key=lambda item: item[0]))
