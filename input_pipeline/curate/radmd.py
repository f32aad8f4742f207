"""radmd: tables of MedMD -> tables of RadMD, by the rules of the paper's Table 2, with counts and examples."""

from __future__ import annotations

import array
import hashlib
import heapq
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from input_pipeline.curate import console, filters, jobs, layouts, radiology
from input_pipeline.curate.filters import FILTERS, RULES, Settings
from input_pipeline.curate.jobs import Report, Result
from input_pipeline.datasets import FAMILIES, diagnosis, diseases
from input_pipeline.datasets.json_tables import stream_jsonl
from input_pipeline.datasets.rows import present
from input_pipeline.files import write_json_lines

DESCRIPTION = """\
Filter tables of MedMD into RadMD (paper, Table 2). Each table is written again under its name, in its layout, without
the rows that a rule drops. The report has the counts of every rule, and examples to review.
"""
EPILOG = """\
rules by family (other families keep every row):
  pmc_oa, pmc_inline     dropped_family
  pmc_casereport         radiologic, size_questions, age_questions, cheating_contexts
  rad3d_caption          radiologic, size_phrases
  rad3d_vqa              radiologic, size_questions, age_questions
  rad3d_modality, rad3d_rationale   radiologic
  cxr_mix, vindr_*, diagnosis   balance, within each value of the column `split`: equally many normal and abnormal rows
                                (open tables, over all sets), or yes and no rows per disease (yes/no tables, within
                                each set of the column `source`, so that the look of a set does not predict the answer)

output in DIR: the tables; report.json (counts by table and rule); examples.jsonl (rule, outcome, row before and after);
problems.jsonl (rows that cannot be read)

examples:
  python -m input_pipeline.curate radmd --root medmd --out radmd pmc_casereport=case.csv rad3d_vqa=vqa.csv
  python -m input_pipeline.curate radmd --root pmc --out r pmc_casereport=case.csv --captions pmc/captions.jsonl
  python -m input_pipeline.curate radmd --root d --out r rad3d_vqa=vqa.csv --classifier my.models:radiologic
  python -m input_pipeline.curate radmd --root d --out r pmc_casereport=case.csv --without cheating_contexts

A classifier is a function that takes the path of an image and returns the probability that it is radiologic. It is
called only if neither a label nor the caption decides.
"""


def _add_options(parser) -> None:
    layouts.add_tables(parser)
    parser.add_argument("--captions", action="append", default=[], metavar="FILE", help="captions.jsonl of pmc-inline")
    parser.add_argument("--classifier", metavar="MODULE:FUNCTION", help="function: image path -> probability")
    probability = console.number_that_is("between 0 and 1", lambda value: 0 <= value <= 1)
    parser.add_argument("--threshold", type=probability, default=0.5, help="of the classifier (%(default)s)")
    text = "what to do with undecided images (default: drop for pmc_casereport, keep for other families)"
    parser.add_argument("--unknown", choices=("keep", "drop"), default="", help=text)
    text = "drop a row whose context contains the answer, or cut those sentences (%(default)s)"
    parser.add_argument("--cheating", choices=("drop", "cut"), default="drop", help=text)
    parser.add_argument("--without", action="append", default=[], metavar="RULE", help="skip a rule; repeatable")
    count, text = console.at_least(0), "examples per rule and outcome (%(default)s)"
    parser.add_argument("--examples", type=count, default=20, metavar="N", help=text)
    parser.add_argument("--seed", type=int, default=0, help="seed of the balance (%(default)s)")


def curate(specs: list[str], root, directory: Path, options: dict, progress=jobs.no_progress, log=jobs.no_log) -> dict:
    """Filter every table. Returns the report. Raises ValueError."""
    root, directory = Path(root).absolute(), Path(directory).absolute()
    tables = layouts.named_tables(specs, root, directory)
    unknown = [rule for rule in options.get("without", ()) if rule not in (*FILTERS, "balance")]
    if unknown:
        raise ValueError(f"rule {', '.join(unknown)} is unknown; known: {', '.join((*FILTERS, 'balance'))}")
    result = Result()
    settings = Settings(root, _captions(options.get("captions", ()), tables, result))
    for name in ("threshold", "unknown", "cheating"):
        setattr(settings, name, options.get(name, getattr(settings, name)))
    if options.get("classifier"):
        settings.classifier = radiology.open_classifier(options["classifier"])
    report = Report(directory, "radmd", {"root": str(root), "tables": specs} | options)
    report.add(result)
    if not options.get("captions") and any(table.family == "pmc_casereport" for table in tables):
        log("without --captions, figures are judged by their questions and answers alone, and many stay undecided")
    examples = _Examples(options.get("examples", 20))
    done = progress("radmd", "tables", len(tables))
    report.more["tables"] = {}
    for table in tables:
        result, settings.root = Result(), table.root
        report.more["tables"][table.name] = _filter_table(table, settings, options, examples, directory, result)
        report.add(result)
        done(1, bool(result.problems))
    write_json_lines(directory / "examples.jsonl", examples.all())
    return report.write()


def _captions(files, tables, result: Result) -> filters.Captions:
    """Read captions from `files`, and return a verdict for each figure of the tables."""
    captions = filters.Captions()
    for table in tables if files else ():
        if table.family == "pmc_casereport":
            for _, row in layouts.read(table.family, table.file, Result())[1]:
                for paper, figure in filters.figures(row, table.family):
                    captions.register(paper, figure)
    for file in files:
        for number, row in layouts.good_rows(stream_jsonl(Path(file)), result):
            try:
                for figure in row["pictures"]:
                    captions.add(row["paper"], figure, row["caption"])
            except (KeyError, TypeError, AttributeError) as error:
                result.problem(file, number, f"not a line of captions.jsonl: {error}", "run pmc-inline again")
    return captions


def _filter_table(table, settings: Settings, options: dict, examples, directory: Path, result: Result) -> dict:
    """Write the filtered table. Returns its counts, also of each rule."""
    family, name, without = table.family, table.name, options.get("without", ())
    rules = [rule for rule in RULES.get(family, ()) if rule not in without]
    header, rows = layouts.read(family, table.file, result)
    kept_rows = None
    if issubclass(FAMILIES[family], diagnosis.Diagnosis) and "balance" not in without:
        assert not rules, family
        kept_rows = _balance(layouts.read(family, table.file, Result())[1], options.get("seed", 0), table.file, result)
    counts = {rule: {"dropped": 0, "changed": 0} for rule in (rules if kept_rows is None else ["balance"])}
    reasons: dict[str, int] = {}

    def filtered(number: int, before: dict) -> dict | None:
        if kept_rows is not None and number not in kept_rows:
            if _side(before) is not None:  # else it is already listed as a problem
                counts["balance"]["dropped"] += 1
                examples.add(name, "balance", "dropped", "more rows of this side than of the other", before, None)
            return None
        row = before
        for rule in rules:
            try:
                verdict = FILTERS[rule](row, family, settings)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                reason = f"the rule {rule} fails: {type(error).__name__}: {error}"
                result.problem(table.file, number, reason, f"correct the row, or add --without {rule}")
                return None
            if verdict.row is None or verdict.reason:
                outcome = "dropped" if verdict.row is None else "changed"
                counts[rule][outcome] += 1
                reasons[verdict.reason] = reasons.get(verdict.reason, 0) + 1
                examples.add(name, rule, outcome, verdict.reason, before, verdict.row)
            row = verdict.row
            if row is None:
                return None
        return row

    total = 0
    with layouts.Tables(directory, {name: header}) as out:
        for number, before in rows:
            total += 1
            row = filtered(number, before)
            if row is not None:
                out.write(name, row)
                for rule in counts:
                    examples.add(name, rule, "kept", "", before, row if row != before else None)
    result.count(f"{name}: rows", total)
    for rule, outcomes in counts.items():
        for outcome, count in outcomes.items():
            if count or outcome == "dropped":
                result.count(f"{name}: {outcome} by {rule}", count)
    result.count(f"{name}: kept", out.rows[name])
    return {"family": family, "rows": total, "kept": out.rows[name], "rules": counts, "reasons": reasons}


def _side(row: dict) -> bool | None:
    """Return present or absent in a yes/no table, normal or abnormal in an open one; None for an invalid label."""
    label = row["label"].strip()
    if "disease" in row:
        return diagnosis.FLAGS.get(label) if row["disease"] else None
    return diseases.is_normal(label.strip("[]' .")) if label else None


def _balance(rows: Iterator[tuple[int, dict]], seed: int, file: Path, result: Result) -> set[int]:
    """Return the numbers of the rows to keep: as many yes as no, or as many normal as abnormal, chosen by hash.

    Rows are balanced within each split, and in yes/no tables also within each disease and set (`source`), so that the
    appearance of a set does not predict the answer. Takes 16 bytes of memory per row, plus the result.
    """
    # (split, set, disease) -> hashes and row numbers of both sides.
    sides: dict[tuple[str, str, str], tuple[array.array, ...]] = {}
    for number, row in rows:
        side = _side(row)
        if side is None:
            label = row["label"][:40]
            reason = f"the label {label!r} is neither yes nor no" if row.get("disease") else "a cell is blank"
            remedy = "write 1 (present) or 0 (absent) of a disease; in an open table a disease, or 'No finding'"
            result.problem(file, number, reason, remedy)
            continue
        source, split = (present(row.get(column) or "") for column in ("source", "split"))
        group = (source, diseases.canonical(row["disease"])) if "disease" in row else ("", "")
        both = sides.setdefault((split, *group), tuple(array.array("Q") for _ in range(4)))
        both[2 * side].append(int.from_bytes(order(seed, row)[:8], "big"))
        both[2 * side + 1].append(number)
    kept: set[int] = set()
    for both in sides.values():
        arrays = [np.asarray(values) for values in both]
        count = min(len(arrays[1]), len(arrays[3]))
        for hashes, numbers in (arrays[:2], arrays[2:]):
            kept.update(numbers[np.lexsort((numbers, hashes))[:count]].tolist())
    return kept


def order(seed: int, *values) -> bytes:
    """Return a sort key for a shuffled order that depends on the seed and the values alone."""
    return hashlib.blake2b(json.dumps([seed, *values], sort_keys=True).encode(), digest_size=16).digest()


class _Examples:
    """A few rows of each rule and outcome. Choosing them by hash makes them reproducible, from the whole table."""

    def __init__(self, most: int):
        self.most, self.heaps = most, {}

    def add(self, table: str, rule: str, outcome: str, reason: str, before: dict, after: dict | None) -> None:
        heap = self.heaps.setdefault((table, rule, outcome), [])
        if not self.most:
            return
        key = (int.from_bytes(order(0, rule, before), "little"), len(heap))
        example = {"table": table, "rule": rule, "outcome": outcome, "reason": reason, "before": before, "after": after}
        if len(heap) < self.most:
            heapq.heappush(heap, (*key, example))
        elif key[0] < heap[0][0]:
            heapq.heapreplace(heap, (*key, example))

    def all(self):
        for heap in self.heaps.values():
            yield from (example for _, _, example in sorted(heap, key=lambda item: item[0]))


_run = console.run_on_tables(curate, "captions classifier threshold unknown cheating without examples seed")
TOOLS = {"radmd": console.Tool(DESCRIPTION, EPILOG, _add_options, _run)}
