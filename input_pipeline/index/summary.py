"""The summary of a `prepare` run: counts as plain values (summary.json), and as tables (summary.txt)."""

from __future__ import annotations

import collections
import io

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from input_pipeline.batching.mixture import Mixture
from input_pipeline.config import SPLITS
from input_pipeline.index import reports
from input_pipeline.index.categories import modality_name
from input_pipeline.index.results import Results
from input_pipeline.reasons import Reasons, pattern
from input_pipeline.samples import TASKS

MAX_REASONS = 12  # lines in a table of reasons
CUT = ("context", "instruction", "response", "scans")


def summarize(results: Results) -> dict:
    """Return the counts for summary.json. Lengths, tasks and scans are those of good rows."""
    sources = _sources(results)
    reasons = {"rows": Reasons(), "scans": Reasons()}
    for line in reports.quarantine(results):
        if line["kind"] == "scan":
            reasons["scans"].add(f"{line['fault']}: {line['reason']}", line["scan"])
        else:
            reason = "one of its scans cannot be used" if line["reason"].startswith("scan ") else line["reason"]
            row = f"row {line['row']}" if "row" in line else f"id {line['id']}"
            reasons["rows"].add(reason, f"{row} of {line['source']}")
    notices: dict[str, dict] = {}  # grouped by pattern; each group shows the notice of its first scan, with its numbers
    for line in reports.notices(results):
        notice = notices.setdefault(pattern(line["notice"]), {"scans": 0, "example": line["notice"]})
        notice["scans"] += 1
    equal = collections.Counter(line["kind"] for line in reports.duplicates(results))
    bad_scans = results.count("facts WHERE fault != ''")
    return {
        "rows": {state: sum(s[state] for s in sources.values()) for state in ("good", "bad", "not_opened")},
        "scans": {"good": results.count("facts") - bad_scans, "bad": bad_scans},
        "sources": sources,
        "splits": {split: _split(results, split) for split in SPLITS if results.config.sources_with_rows(split)},
        "notices": sorted(notices.values(), key=lambda notice: -notice["scans"]),
        "reasons": {which: grouped.counts() for which, grouped in reasons.items()},
        "duplicates": {"rows": equal["row"], "scans": equal["scan"]},
    }


def _sources(results: Results) -> dict:
    def by_source(columns: str, table: str) -> dict[int, list]:
        lines = results.db.execute(f"SELECT source, COUNT(*), {columns} FROM {table} GROUP BY source")
        return {source: counts for source, *counts in lines}

    good = by_source("SUM(tokens), SUM(trained), SUM(terms), SUM(held)", "good")
    used = "(SELECT DISTINCT source, scan FROM mentions) JOIN facts USING (scan)"
    scan_counts = by_source("SUM(fault = '' AND depth = 1), SUM(fault = '' AND depth > 1)", used)
    summaries = {}
    for source, (name, table) in enumerate(results.tables.items()):
        count, tokens, trained, terms, held_out = good.get(source, (0, 0, 0, 0, 0))
        all_scans, scans_2d, scans_3d = scan_counts.get(source, (0, 0, 0))
        summaries[name] = {
            "split": results.split[name],
            "family": results.config.sources()[name]["family"],
            "good": count,
            "held_out": held_out,
            "bad": table.rows - count,
            "not_opened": len(table.problems),
            "left_out": table.left_out,
            "scans": all_scans,
            "scans_2d": scans_2d,
            "scans_3d": scans_3d,
            "tokens_a_row": round(tokens / max(count, 1), 1),
            "trained_a_row": round(trained / max(count, 1), 1),
            "term_share": round(terms / max(trained, 1), 4),
            "answers": _answers(results, name, source),
        }
    return summaries


def _answers(results: Results, name: str, source: int) -> dict[str, dict[str, int]]:
    """Return class -> {"rows": training rows, "epoch": rows used per epoch}; {} if the source is not balanced."""
    condition = "source = ? AND side >= 0 AND NOT held"
    lines = results.db.execute(f"SELECT side, COUNT(*) FROM good WHERE {condition} GROUP BY side", (source,))
    counts = dict(lines)
    if not counts:
        return {}
    sizes = [counts.get(side, 0) for side in range(2 * (max(counts) // 2 + 1))]
    fraction = results.config.sources()[name].get("fraction", 1.0)
    try:
        parts = Mixture({name: {"rows": sum(sizes), "fraction": fraction, "sides": sizes}}, seed=0, weights=False).parts
    except ValueError:  # one side only, because the other is in quarantine: training rejects the source
        parts = []
    used = [part.count for part in parts] or [0] * len(sizes)
    classes = zip(results.tables[name].sides, (0, 1), strict=True)
    return {title: {"rows": sum(sizes[parity::2]), "epoch": sum(used[parity::2])} for title, parity in classes}


def _split(results: Results, split: str) -> dict:
    def count_by(column: str) -> dict:
        groups = f"SELECT {column}, COUNT(*) FROM good WHERE split = ? GROUP BY {column} ORDER BY {column}"
        return dict(results.db.execute(groups, (split,)))

    def sums(*expressions: str) -> list[int]:
        columns = ", ".join(f"COALESCE(SUM({expression}), 0)" for expression in expressions)
        return list(results.db.execute(f"SELECT {columns} FROM good WHERE split = ?", (split,)).fetchone())

    tasks, tokens = count_by("task"), sums("tokens", "trained", "terms")
    modalities, depths = collections.Counter(), collections.Counter()
    scans = results.db.execute(
        "SELECT owner, modality, depth, COUNT(*) "
        "FROM (SELECT DISTINCT scan FROM mentions JOIN good USING (source, row) WHERE split = ?) "
        "JOIN (SELECT scan, source AS owner, modality, depth FROM scans) USING (scan) "
        "GROUP BY owner, modality, depth ORDER BY owner, modality, depth",
        (split,),
    )
    for owner, code, depth, count in scans:
        modalities[modality_name(code, results.config.sources()[results.names[owner]]["family"])] += count
        depths[depth] += count
    return {
        "rows": sum(tasks.values()),
        "tasks": {task: tasks[task] for task in TASKS if task in tasks},
        "scans": {"2d": depths.pop(1, 0), "3d": depths.total()},
        "modalities": dict(modalities.most_common()),
        "depths": {str(depth): depths[depth] for depth in sorted(depths)},
        "instruction": _lengths(count_by("instruction")),
        "response": _lengths(count_by("trained")),
        "tokens": dict(zip(("all", "trained", "terms"), tokens, strict=True)),
        "cut": dict(zip(CUT, sums(*(f"cut_{part}" for part in CUT)), strict=True)),
        "cut_rows": sums("cut_context + cut_instruction + cut_response > 0")[0],
        "rows_without_some_scans": sums("cut_scans > 0")[0],
    }


def _lengths(rows: dict[int, int]) -> dict:
    """Return statistics of row lengths, and a histogram with the bins 0, 1, 2 to 3, 4 to 7, 8 to 15, ... tokens.

    `rows` is {tokens: number of rows}, in ascending order.
    """
    if not rows:
        return {"counts": [], "median": 0, "mean": 0.0, "most": 0}
    tokens, counts = np.array(list(rows.items()), np.int64).T
    until = np.cumsum(counts)
    middle = tokens[np.searchsorted(until, [(until[-1] - 1) // 2, until[-1] // 2], side="right")]
    bins = np.ceil(np.log2(tokens + 1)).astype(int)
    return {
        "counts": np.bincount(bins, counts).astype(int).tolist(),
        "median": int(middle.mean()),
        "mean": round(float((tokens * counts).sum() / until[-1]), 1),
        "most": int(tokens[-1]),
    }


def edges(count: int) -> list[str]:
    """Return the lower edges of the bins of `_lengths`."""
    return [str(2**i // 2) for i in range(count)]


def render(report: dict) -> Group:
    """Return the summary as tables for a terminal."""
    parts = [_sources_table(report), _contents_table(report)]
    if any(source["answers"] for source in report["sources"].values()):
        parts.append(_answers_table(report))
    for which, title in (("rows", "Skipped rows"), ("scans", "Unusable scans")):
        if report["reasons"][which]:
            parts.append(_reasons_table(title, report["reasons"][which]))
    if report.get("notices"):
        examples = {notice["example"]: notice["scans"] for notice in report["notices"]}
        parts.append(_reasons_table("Doubtful scans: an example of each kind; all are in notices.jsonl", examples))
    return Group(*parts, *(Text(line) for line in _lines(report)))


def text(report: dict) -> str:
    """Return the summary as plain text."""
    console = Console(file=io.StringIO(), width=120, no_color=True, force_terminal=False, emoji=False, highlight=False)
    console.print(render(report))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _sources_table(report: dict) -> Table:
    table = Table(
        title="Rows, their distinct scans, and mean tokens per row", title_justify="left", box=box.SIMPLE,
        caption="bad: skipped; unread: lines of the table that could not be opened (both are in quarantine.jsonl); "
        "trained: tokens of answers; terms: the share of these that are medical terms; held out: good rows for "
        "validation (data.validation_share)", caption_justify="left",
    )  # fmt: skip
    table.add_column("source", overflow="fold")
    table.add_column("split")
    held_out = ["held_out"] if any(s["held_out"] for s in report["sources"].values()) else []
    for heading in ("good", *("held out" for _ in held_out), "bad", "unread", "2D", "3D", "tokens", "trained", "terms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, s in report["sources"].items():
        counts = (s[k] for k in ("good", *held_out, "bad", "not_opened", "scans_2d", "scans_3d"))
        lengths = f"{s['tokens_a_row']:,.1f}", f"{s['trained_a_row']:,.1f}", f"{s['term_share']:.1%}"
        table.add_row(escape(name), s["split"], *(f"{n:,}" for n in counts), *lengths)
    return table


def _answers_table(report: dict) -> Table:
    title = "Balanced sources: rows of each class, and how many an epoch uses"
    table = Table(title=title, title_justify="left", box=box.SIMPLE)
    for heading, justify in (("source", "left"), ("class", "left"), ("rows", "right"), ("per epoch", "right")):
        table.add_column(heading, justify=justify)
    for name, source in report["sources"].items():
        for k, (title, counts) in enumerate(source["answers"].items()):
            cells = f"{counts['rows']:,}", f"{counts['epoch']:,}"
            table.add_row("" if k else escape(name), title, *cells, end_section=k == len(source["answers"]) - 1)
    return table


def _contents_table(report: dict) -> Table:
    table = Table(title="Contents of the good rows", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    table.add_column("")
    for split in report["splits"]:
        table.add_column(split, justify="right")
    splits = list(report["splits"].values())

    def group(title: str, counts_of) -> None:
        values = dict.fromkeys(name for split in splits for name in counts_of(split))
        if title == "slices":
            values = sorted(values, key=lambda name: int(name.split()[0]))
        for i, name in enumerate(values):
            cells = (f"{counts_of(split).get(name, 0):,}" for split in splits)
            table.add_row(title if i == 0 else "", str(name), *cells, end_section=i == len(values) - 1)

    group("rows", lambda s: s["tasks"])
    group("scans", lambda s: {"2D": s["scans"]["2d"], "3D": s["scans"]["3d"]})
    group("", lambda s: s["modalities"])
    group("slices", lambda s: _ranges(s["depths"]))
    for part in ("instruction", "response"):
        group(f"{part} tokens", lambda s, part=part: {k: s[part][k] for k in ("median", "mean", "most")})
    group("tokens", lambda s: s["tokens"])
    group("cut tokens", lambda s: {k: v for k, v in s["cut"].items() if k != "scans"} | {"rows": s["cut_rows"]})
    group("dropped scans", lambda s: {"scans": s["cut"]["scans"], "rows": s["rows_without_some_scans"]})
    return table


DEPTHS = ((2, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 256), (257, 512), (513, 1 << 30))


def _ranges(depths: dict[str, int]) -> dict[str, int]:
    counts = {}
    for low, high in DEPTHS:
        count = sum(n for depth, n in depths.items() if low <= int(depth) <= high)
        if count:
            counts[f"{low} to {high}" if high < 1 << 30 else f"{low} and more"] = count
    return counts


def _reasons_table(title: str, reasons: dict[str, int]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column("", justify="right")
    table.add_column("", overflow="fold")
    for reason, count in list(reasons.items())[:MAX_REASONS]:
        table.add_row(f"{count:,}", escape(reason))
    if (more := len(reasons) - MAX_REASONS) > 0:
        table.add_row(f"{sum(list(reasons.values())[MAX_REASONS:]):,}", f"with {more} other reasons")
    return table


def _lines(report: dict) -> list[str]:
    rows, scans, same, leaks = (report[k] for k in ("rows", "scans", "duplicates", "leaks"))
    reading = report["reading"]
    lines = [
        f"{rows['good']:,} rows are good, {rows['bad']:,} are skipped; {rows['not_opened']:,} more lines of the tables "
        "could not be opened.",
        f"{scans['good']:,} scans are good, {scans['bad']:,} are unusable; {reading['scans_read']:,} were read, "
        f"{reading['scans_unchanged']:,} had not changed.",
        f"Equal content: {same['rows']:,} rows, {same['scans']:,} groups of scans. In several splits: "
        f"{leaks['study']:,} studies, {leaks['scan']:,} scans.",
    ]
    if reading["workers_ended"]:
        lines.append(f"{reading['workers_ended']} files or rows killed or hung the process that read them.")
    if records := report.get("records"):
        unused = f", {records['unused']:,} of them no longer used (--recheck frees them)" if records["unused"] else ""
        lines.append(
            f"{records['records']:,} records in {records['shards']:,} shards, {records['bytes'] / 1e6:,.1f} MB{unused}."
        )
    return lines
