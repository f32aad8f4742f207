"""radmd: tables of MedMD -> tables of RadMD, by the rules of the paper's Table 2, each counted and with examples."""

from __future__ import annotations

import array
import hashlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from input_pipeline.curate import console, filters, jobs, layouts, radiology
from input_pipeline.curate.filters import FILTERS, OF_FAMILY, Settings
from input_pipeline.curate.jobs import Report, Result
from input_pipeline.datasets import FAMILIES, diagnosis, diseases
from input_pipeline.files import write_json_lines

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
  cxr_mix, vindr_*, diagnosis   balance, in each split of a column `split`: of normal and abnormal (open tables, over
                                all their sets), of yes and no for each disease (yes/no tables, in each set of a
                                column `source`, so that the look of a set says nothing about the answer)

what is written to DIR: the tables; report.json (counts by table and rule); examples.jsonl (rule, what became of the
row, before, after); problems.jsonl (rows that cannot be read)

examples:
  python -m input_pipeline.curate radmd --root medmd --out radmd pmc_casereport=case.csv rad3d_vqa=vqa.csv
  python -m input_pipeline.curate radmd --root pmc --out r pmc_casereport=case.csv --captions pmc/captions.jsonl
  python -m input_pipeline.curate radmd --root d --out r rad3d_vqa=vqa.csv --classifier my.models:radiologic
  python -m input_pipeline.curate radmd --root d --out r pmc_casereport=case.csv --without cheating_contexts

A classifier is a function that takes the path of an image and returns the probability that it is radiologic; it is
asked only where neither a label nor the caption says so.
"""


def main(tool: str, argv: list[str]) -> int:
    parser = console.parser(tool, DESCRIPTION, EPILOG)
    layouts.add_tables(parser)
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
    if args.examples < 0 or not 0 <= args.threshold <= 1:
        parser.error("--examples needs at least 0, --threshold a probability")
    options = {k: v for k, v in vars(args).items() if k not in ("out", "strict", "tables", "root")}
    return console.run(args, lambda out, **more: build(args.tables, args.root, out, options, **more))


def build(specs: list[str], root, directory: Path, options: dict, progress=jobs.silent, said=None) -> dict:
    """Filters every table; returns the report. Raises ValueError."""
    root, directory = Path(root).absolute(), Path(directory).absolute()
    named = layouts.all_named(specs, root, directory)
    unknown = [rule for rule in options.get("without", ()) if rule not in (*FILTERS, "balance")]
    if unknown:
        raise ValueError(f"rule {', '.join(unknown)} is unknown; known: {', '.join((*FILTERS, 'balance'))}")
    of_captions = Result()
    settings = Settings(
        root,
        _captions(options.get("captions", ()), named, of_captions),
        radiology.open_classifier(options["classifier"]) if options.get("classifier") else None,
        options.get("threshold", 0.5),
        options.get("unknown", ""),
        options.get("cheating", "drop"),
    )
    report = Report(directory, "radmd", {"root": str(root), "tables": specs} | options)
    report.add(of_captions)
    if said and not options.get("captions") and any(table.family == "pmc_casereport" for table in named):
        said("no --captions: what figures show is judged by questions and answers alone, which often do not say")
    examples = _Examples(options.get("examples", 20))
    done = progress("radmd", "tables", len(named))
    report.more["tables"] = {}
    for table in named:
        result, settings.root = Result(), table.root
        found = _table(table.family, table.file, directory, settings, options, examples, result)
        report.more["tables"][table.name] = found
        report.add(result)
        done(1, bool(result.problems))
    write_json_lines(directory / "examples.jsonl", examples.all())
    return report.write()


def _captions(files, named, result: Result) -> filters.Captions:
    """What captions.jsonl says of each picture that the tables name."""
    found = filters.Captions()
    for table in named if files else ():
        if table.family == "pmc_casereport":
            for _, row in layouts.read(table.family, table.file, Result())[1]:
                for paper, picture in filters.pictures(row, table.family):
                    found.want(paper, picture)
    for file in files:
        for number, row in layouts.read_lines(Path(file), result):
            try:
                for picture in row["pictures"]:
                    found.add(row["paper"], picture, row["caption"])
            except (KeyError, TypeError, AttributeError) as error:
                result.problem(file, number, f"is no line of captions.jsonl: {error}", "run pmc-inline anew")
    return found


def _table(family, file, directory, settings, options, examples, result: Result) -> dict:
    without = options.get("without", ())
    rules = [rule for rule in OF_FAMILY.get(family, ()) if rule not in without]
    counts: dict[str, dict[str, int]] = {rule: {"dropped": 0, "changed": 0} for rule in rules}
    reasons: dict[str, int] = {}
    header, rows = layouts.read(family, file, result)
    chosen = None
    if issubclass(FAMILIES[family], diagnosis.Diagnosis) and "balance" not in without:
        assert not rules, family
        chosen = _balance(layouts.read(family, file, Result())[1], options.get("seed", 0), file, result)
        counts["balance"] = {"dropped": 0, "changed": 0}
    total = 0
    with layouts.Tables(directory, {file.name: header}) as out:
        for number, before in rows:
            total += 1
            if chosen is not None and number not in chosen:
                if _side(before) is None:
                    continue  # a problem, and listed as one
                counts["balance"]["dropped"] += 1
                examples.add(file.name, "balance", "dropped", "more of this side than of the other", before, None)
                continue
            row = _filtered(family, file, number, before, rules, settings, counts, reasons, examples, result)
            if row is not None:
                out.write(file.name, row)
                for rule in rules or counts:
                    examples.add(file.name, rule, "kept", "", before, row if row != before else None)
    name, kept = file.name, out.rows[file.name]
    result.count(f"{name}: rows", total)
    for rule, found in counts.items():
        for outcome, count in found.items():
            if count or outcome == "dropped":
                result.count(f"{name}: {outcome} by {rule}", count)
    result.count(f"{name}: kept", kept)
    return {"family": family, "rows": total, "kept": kept, "rules": counts, "reasons": reasons}


def _filtered(family, file, number, before, rules, settings, counts, reasons, examples, result) -> dict | None:
    row = before
    for rule in rules:
        try:
            verdict = FILTERS[rule](row, family, settings)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            said = f"{type(error).__name__}: {error}"
            result.problem(file, number, f"the rule {rule} fails: {said}", "correct the row, or leave out the rule")
            return None
        if verdict.row is None or verdict.reason:
            outcome = "dropped" if verdict.row is None else "changed"
            counts[rule][outcome] += 1
            reasons[verdict.reason] = reasons.get(verdict.reason, 0) + 1
            examples.add(file.name, rule, outcome, verdict.reason, before, verdict.row)
        row = verdict.row
        if row is None:
            return None
    return row


def _side(row: dict) -> bool | None:
    """Present or absent in a yes/no table, normal or abnormal in an open one; None: the label says neither."""
    label = row["label"].strip()
    if "disease" in row:
        return diagnosis.FLAGS.get(label) if row["disease"] else None
    return diseases.is_normal(label.strip("[]' .")) if label else None


def _balance(rows: Iterator[tuple[int, dict]], seed: int, file: Path, result: Result) -> set[int]:
    """As many of one side as of the other, in each split; where rows say a disease, for each disease of each set
    (`source`), so that the look of a set still says nothing about the answer. Which rows stay, a hash decides.

    Returns the numbers of the rows that stay. In memory are 16 bytes a row, and these numbers.
    """
    sides: dict[tuple[str, str, str], tuple[array.array, array.array, array.array, array.array]] = {}
    for number, row in rows:
        side = _side(row)
        if side is None:
            said = f"the label {row['label'][:40]!r} is neither yes nor no" if row.get("disease") else "a cell is blank"
            remedy = "1 (present) or 0 (absent) of a disease; in an open table a disease, or 'No finding'"
            result.problem(file, number, said, remedy)
            continue
        of = (row.get("source") or "", diseases.canonical(row["disease"])) if "disease" in row else ("", "")
        both = sides.setdefault((row.get("split") or "", *of), tuple(array.array("Q") for _ in range(4)))
        both[2 * side].append(int.from_bytes(order(seed, row)[:8], "big"))
        both[2 * side + 1].append(number)
    kept: set[int] = set()
    for both in sides.values():
        count = min(len(both[1]), len(both[3]))
        for places, numbers in (both[:2], both[2:]):
            first = np.lexsort((np.array(numbers, np.uint64), np.array(places, np.uint64)))[:count]
            kept.update(np.array(numbers, np.uint64)[first].tolist())
    return kept


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
