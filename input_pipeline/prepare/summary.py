"""Counts of everything that was found: as plain values, and as text."""

from __future__ import annotations

import collections
import io
import re
import textwrap

import numpy as np
from rich import box
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from input_pipeline.config import SPLITS
from input_pipeline.prepare import findings
from input_pipeline.prepare.findings import GOOD, Findings
from input_pipeline.samples import TASKS

# DICOM's codes, and the families whose name says it, in the words of figure 4 of the paper.
MODALITIES = {
    "CT": "CT", "MR": "MRI", "CR": "X-ray", "DX": "X-ray", "RG": "X-ray", "PX": "X-ray", "IO": "X-ray",
    "MG": "mammography", "US": "ultrasound", "IVUS": "ultrasound", "PT": "PET", "NM": "nuclear medicine",
    "XA": "angiography", "RF": "fluoroscopy", "OT": "other", "SC": "other",
}  # fmt: skip
FAMILY_MODALITIES = {
    "mimic_cxr": "X-ray", "cxr_mix": "X-ray", "vindr_pcxr": "X-ray", "vindr_spinexr": "X-ray",
    "vindr_mammo": "mammography",
}  # fmt: skip
UNKNOWN = "not stated"
SHOWN = 12  # lines of a list of reasons
CUT = ("context", "instruction", "response", "scans")


def modality(code: str, family: str) -> str:
    """What a scan is, by its file or by the data set that names it."""
    return MODALITIES.get(code, code) if code else FAMILY_MODALITIES.get(family, UNKNOWN)


def kind(reason: str) -> str:
    """A reason without what differs from row to row: names, numbers, paths."""
    reason = re.sub(r"""(["'])(?:(?!\1).)*\1""", "...", reason)
    reason = re.sub(r"(?:\S*/\S*)+", "...", reason)
    return textwrap.shorten(re.sub(r"-?\d[\d,.]*", "N", reason), 160, placeholder=" ...")


def report(found: Findings) -> dict:
    """Plain values, as summary.json has them. Lengths, tasks and scans are those of good rows."""
    sources = {name: _source(found, name) for name in found.tables}
    splits = {split: _split(found, split) for split in SPLITS if found.config.sources(split)}
    reasons = {"rows": collections.Counter(), "scans": collections.Counter()}
    for line in findings.quarantine(found):
        if line["kind"] == "scan":
            reasons["scans"][f"{line['fault']}: {kind(line['reason'])}"] += 1
        elif line["reason"].startswith("scan "):
            reasons["rows"]["a scan of it cannot be used"] += 1
        else:
            reasons["rows"][kind(line["reason"])] += 1
    same = collections.Counter(line["kind"] for line in findings.duplicates(found))
    good = sum(s["good"] for s in sources.values())
    bad_scans = sum(bool(scan.fault) for scan in found.scans)
    return {
        "rows": {
            "good": good,
            "bad": sum(s["bad"] for s in sources.values()),
            "not_opened": sum(s["not_opened"] for s in sources.values()),
        },
        "scans": {"good": len(found.scans) - bad_scans, "bad": bad_scans},
        "sources": sources,
        "splits": splits,
        "reasons": {which: dict(counts.most_common()) for which, counts in reasons.items()},
        "duplicates": {"rows": same["row"], "scans": same["scan"]},
    }


def _source(found: Findings, name: str) -> dict:
    table, states, rows = found.tables[name], found.states[name], found.rows[name]
    good = [row for row, state in zip(rows, states, strict=True) if state == GOOD]
    numbers = {k for numbers in found.row_scans[name] for k in numbers}
    shapes = [found.scans[k] for k in numbers if not found.scans[k].fault]
    trained = sum(row.trained for row in good)
    return {
        "split": found.split[name],
        "family": found.config.sources()[name]["family"],
        "good": len(good),
        "bad": len(rows) - len(good),
        "not_opened": len(table.problems),
        "left_out": table.left_out,
        "scans": len(numbers),
        "scans_2d": sum(scan.depth == 1 for scan in shapes),
        "scans_3d": sum(scan.depth > 1 for scan in shapes),
        "tokens_a_row": round(sum(row.tokens for row in good) / max(len(good), 1), 1),
        "trained_a_row": round(trained / max(len(good), 1), 1),
        "term_share": round(sum(row.terms for row in good) / max(trained, 1), 4),
    }


def _split(found: Findings, split: str) -> dict:
    tasks, used, rows = collections.Counter(), {}, []
    for name, i, row, numbers in found.each_row():
        if found.split[name] == split and found.states[name][i] == GOOD:
            rows.append(row)
            tasks[row.task] += 1
            used |= dict.fromkeys(numbers)
    shapes = [found.scans[k] for k in used]
    family = {k: found.config.sources()[found.owners[k]]["family"] for k in used}
    modalities = collections.Counter(modality(found.scans[k].modality, family[k]) for k in used)
    depths = collections.Counter(scan.depth for scan in shapes if scan.depth > 1)
    trained, terms = sum(row.trained for row in rows), sum(row.terms for row in rows)
    cut = np.array([row.cut for row in rows], np.int64).reshape(-1, len(CUT))
    return {
        "rows": len(rows),
        "tasks": {task: tasks[task] for task in TASKS if tasks[task]},
        "scans": {"2d": sum(scan.depth == 1 for scan in shapes), "3d": sum(depths.values())},
        "modalities": dict(modalities.most_common()),
        "depths": {str(depth): depths[depth] for depth in sorted(depths)},
        "instruction": _lengths([row.instruction for row in rows]),
        "response": _lengths([row.trained for row in rows]),
        "tokens": {"all": sum(row.tokens for row in rows), "trained": trained, "terms": terms},
        "cut": dict(zip(CUT, cut.sum(axis=0).tolist(), strict=True)),
        "cut_rows": int((cut[:, :3] > 0).any(axis=1).sum()),
        "rows_without_some_scans": int((cut[:, 3] > 0).sum()),
    }


def _lengths(values: list[int]) -> dict:
    """How many rows have 0, 1, 2 to 3, 4 to 7, 8 to 15, ... tokens."""
    values = np.array(values or [0][:0], np.int64)
    if not len(values):
        return {"counts": [], "median": 0, "mean": 0.0, "most": 0}
    bins = np.ceil(np.log2(values + 1)).astype(int)
    return {
        "counts": np.bincount(bins).tolist(),
        "median": int(np.median(values)),
        "mean": round(float(values.mean()), 1),
        "most": int(values.max()),
    }


def edges(count: int) -> list[str]:
    """Where the bins of `_lengths` begin."""
    return [str(2**i // 2) for i in range(count)]


# --- as text ----------------------------------------------------------------------------------------------------------


def render(report: dict) -> Group:
    """Tables for a terminal."""
    parts = [_sources(report), _contents(report)]
    for which, title in (("rows", "Rows left out"), ("scans", "Scans that cannot be used")):
        if report["reasons"][which]:
            parts.append(_reasons(title, report["reasons"][which]))
    return Group(*parts, *(Text(line) for line in _lines(report)))


def text(report: dict) -> str:
    """The same without colour."""
    console = Console(file=io.StringIO(), width=120, no_color=True, force_terminal=False, emoji=False, highlight=False)
    console.print(render(report))
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def _sources(report: dict) -> Table:
    table = Table(
        title="Rows, their distinct scans, and mean tokens a row", title_justify="left", box=box.SIMPLE,
        caption="bad: left out; unread: lines of the table that are no row (both are in quarantine.jsonl); trained: "
        "tokens of answers, terms: the share of them that are medical terms", caption_justify="left",
    )  # fmt: skip
    table.add_column("source", overflow="fold")
    table.add_column("split")
    for heading in ("good", "bad", "unread", "2D", "3D", "tokens", "trained", "terms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, s in report["sources"].items():
        counts = (s[k] for k in ("good", "bad", "not_opened", "scans_2d", "scans_3d"))
        lengths = f"{s['tokens_a_row']:,.1f}", f"{s['trained_a_row']:,.1f}", f"{s['term_share']:.1%}"
        table.add_row(escape(name), s["split"], *(f"{n:,}" for n in counts), *lengths)
    return table


def _contents(report: dict) -> Table:
    table = Table(title="What the good rows hold", title_justify="left", box=box.SIMPLE)
    table.add_column("")
    table.add_column("")
    for split in report["splits"]:
        table.add_column(split, justify="right")
    splits = list(report["splits"].values())

    def group(title: str, of, names=None) -> None:
        values = names or dict.fromkeys(name for split in splits for name in of(split))
        if title == "slices":
            values = sorted(values, key=lambda name: int(name.split()[0]))
        for i, name in enumerate(values):
            cells = (f"{of(split).get(name, 0):,}" for split in splits)
            table.add_row(title if i == 0 else "", str(name), *cells, end_section=i == len(values) - 1)

    group("rows", lambda s: s["tasks"])
    group("scans", lambda s: {"2D": s["scans"]["2d"], "3D": s["scans"]["3d"]})
    group("", lambda s: s["modalities"])
    group("slices", lambda s: _ranges(s["depths"]))
    for part in ("instruction", "response"):
        group(
            f"{part} tokens",
            lambda s, part=part: {"median": s[part]["median"], "mean": s[part]["mean"], "most": s[part]["most"]},
        )
    group("tokens", lambda s: s["tokens"])
    group("cut tokens", lambda s: {k: v for k, v in s["cut"].items() if k != "scans"} | {"rows": s["cut_rows"]})
    group("scans too many", lambda s: {"scans": s["cut"]["scans"], "rows": s["rows_without_some_scans"]})
    return table


DEPTHS = ((2, 4), (5, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 256), (257, 512), (513, 1 << 30))


def _ranges(depths: dict[str, int]) -> dict[str, int]:
    counts = {}
    for low, high in DEPTHS:
        count = sum(n for depth, n in depths.items() if low <= int(depth) <= high)
        if count:
            counts[f"{low} to {high}" if high < 1 << 30 else f"{low} and more"] = count
    return counts


def _reasons(title: str, reasons: dict[str, int]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=False)
    table.add_column("", justify="right")
    table.add_column("", overflow="fold")
    for reason, count in list(reasons.items())[:SHOWN]:
        table.add_row(f"{count:,}", escape(reason))
    if len(reasons) > SHOWN:
        table.add_row(f"{sum(list(reasons.values())[SHOWN:]):,}", f"for {len(reasons) - SHOWN} more reasons")
    return table


def _lines(report: dict) -> list[str]:
    rows, scans, same, leaks = (report[k] for k in ("rows", "scans", "duplicates", "leaks"))
    reading = report["reading"]
    lines = [
        f"{rows['good']:,} rows are good, {rows['bad']:,} are left out; {rows['not_opened']:,} more of the tables are "
        "no samples.",
        f"{scans['good']:,} scans are good, {scans['bad']:,} are not; {reading['scans_read']:,} were read, "
        f"{reading['scans_unchanged']:,} had not changed.",
        f"Equal content: {same['rows']:,} rows, {same['scans']:,} groups of scans. In train and in test: "
        f"{leaks['study']:,} studies, {leaks['scan']:,} scans.",
    ]
    if reading["workers_ended"]:
        lines.append(f"{reading['workers_ended']} files or rows ended the process that read them.")
    if records := report.get("records"):
        unused = f", {records['unused']:,} of them no longer used (--recheck frees them)" if records["unused"] else ""
        lines.append(
            f"{records['records']:,} records in {records['shards']:,} shards, {records['bytes'] / 1e6:,.1f} MB{unused}."
        )
    return lines
