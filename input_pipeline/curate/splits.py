"""splits: tables -> the same tables with a column `split`; no study, scan or near duplicate is in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from input_pipeline.curate import console, duplicates, jobs, layouts
from input_pipeline.curate.jobs import Report, Result
from input_pipeline.curate.layouts import NamedTable
from input_pipeline.datasets import FAMILIES, Dataset, open_dataset, sample_rng
from input_pipeline.datasets.diagnosis import Diagnosis
from input_pipeline.datasets.rows import present
from input_pipeline.files import write_json_lines
from input_pipeline.images import scans
from input_pipeline.samples import RowError, Text

DESCRIPTION = """\
Split tables into train and test by patient, study and paper, over all tables at once. Find near duplicates, and leaks
between existing splits.
"""
EPILOG = """\
Rows form a group if they belong to one study (from the paths, or the column `study`), show one scan, or, with --near,
have near-duplicate images or answers. A hash of the seed and the name of the group's first study (else scan) decides
whether the group goes to test, with probability --test. So adding rows and tables does not move other groups, unless it
joins two groups or adds a study with an earlier name.

An existing split of a table is kept, and applies to the whole group. If a group is in several splits, its test rows
stay in test. Its other rows get no split and are listed. So the test set does not change, and nothing leaks into it.
--anew ignores existing splits and decides every group by hash.

output in DIR:
  the tables with their column `split`        used with split="train" or split="test" and the same root as before
  near.jsonl      with --near: pairs of near images or texts, with distance or similarity
  leaks.jsonl     groups that are in several of the existing splits
  report.json, problems.jsonl

Use FAMILY=FOLDER:TABLE for a table whose paths are relative to a folder below --root, as the other tools write them.
TABLE is relative to that folder, and may be outside it: rad3d_caption=rad3d:../split/caption.json.

examples:
  python -m input_pipeline.curate splits --root data --out data/split pmc_vqa=vqa.csv rad3d_caption=rad3d:caption.json
  python -m input_pipeline.curate splits --root data --out s --near --test 0.05 vqa_rad=vqa.csv
  python -m input_pipeline.curate splits --root data --out s --check --near cxr_mix=open.csv     # changes no split
"""


def _add_options(parser) -> None:
    layouts.add_tables(parser)
    share = console.number_that_is("between 0 and 1", lambda value: 0 < value < 1)
    parser.add_argument("--test", type=share, default=0.1, metavar="SHARE", help="test share of groups (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--near", action="store_true", help="find near duplicates (needs imagehash and datasketch)")
    exclusive = parser.add_mutually_exclusive_group()
    exclusive.add_argument("--anew", action="store_true", help="ignore existing splits of the tables")
    exclusive.add_argument("--check", action="store_true", help="write no table, only list leaks")


_KINDS = ("study", "scan", "row")  # what names refer to, by precedence


class _Groups:
    """Union-find over names. A group has the name of its first study, else its first scan, else its first row."""

    def __init__(self):
        self.parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        while (parent := self.parent.setdefault(name, name)) != name:
            self.parent[name] = name = self.parent[parent]  # halves the path
        return name

    def join(self, a: str, b: str) -> None:
        # Sorting makes the name independent of the order of rows and tables.
        a, b = sorted((self.find(a), self.find(b)), key=lambda name: (_KINDS.index(name.split(" ", 1)[0]), name))
        self.parent[b] = a


def opened(tables: list[NamedTable], result: Result) -> Iterator[tuple[NamedTable, Dataset]]:
    """Yield each table with its data set, one at a time; bad rows become problems."""
    for table in tables:
        fields = {"balance": False} if issubclass(FAMILIES[table.family], Diagnosis) else {}
        dataset = open_dataset(table.family, table=table.file, root=table.root, quarantine=True, **fields)
        for problem in dataset.problems:
            result.error(problem)
        for reason, count in dataset.skipped.items():
            result.count(f"{table.name}: left out, {reason}", count)
        yield table, dataset


def curate(specs, root, directory, options: dict, progress=jobs.no_progress, log=jobs.no_log) -> dict:
    """Write the tables with their splits. Returns the report. Raises ValueError.

    The names of studies, scans and rows, and hashes, are kept in memory.
    """
    root, directory = Path(root).absolute(), Path(directory).absolute()
    result, report = Result(), Report(directory, "splits", {"root": str(root), "tables": specs} | options)
    tables = layouts.named_tables(specs, root, directory)
    groups, rows, images = _Groups(), {}, {}
    texts = duplicates.Texts() if options["near"] else None
    near: list[dict] = []
    for table, dataset in opened(tables, result):
        _add_rows(table, dataset, groups, rows, images, texts, near, result, progress)
    if options["near"]:
        _add_near_images(root, groups, images, near, result, progress)
        write_json_lines(directory / "near.jsonl", near)
    result.count("rows", len(rows))
    result.count("groups", len({groups.find(row) for row in rows}))
    (directory / "leaks.jsonl").unlink(missing_ok=True)
    existing: dict[str, dict[str, list[str]]] = {}  # group -> split -> rows
    for row, split in rows.items():
        if split and not options["anew"]:
            existing.setdefault(groups.find(row), {}).setdefault(split, []).append(row)
    leaks = [{"group": group, "rows": splits} for group, splits in sorted(existing.items()) if len(splits) > 1]
    if not options["anew"]:
        write_json_lines(directory / "leaks.jsonl", leaks)
        result.count("groups on several sides (leaks)", len(leaks))
    if options["check"]:
        result.count("rows without a split", sum(not split for split in rows.values()))
        for leak in leaks:
            result.problem(directory / "leaks.jsonl", leak["group"], "a group is in several splits", "split it again")
    else:
        _write(tables, groups, rows, existing, directory, options, result)
    report.add(result)
    return report.write()


def _add_rows(table, dataset, groups, rows, images, texts, near: list[dict], result: Result, progress) -> None:
    """Add the rows and scans of a table to the groups. With near duplicates, also add its answers."""
    done = progress(table.name, "rows", len(dataset))
    cells = layouts.read(table.family, table.file, Result())[1]
    for i in range(len(dataset)):
        done(1, 0)
        number = int(dataset.row_id(i))
        row = next(row for other, row in cells if other == number)
        key = f"row {table.name} {number}"
        try:
            sample = dataset.sample(i, sample_rng(0, 0, dataset.name, str(number)))
            shown = dataset.scans(i)
        except RowError as error:
            result.problem(error.file, number, error.reason, error.remedy)
            continue
        study = sample.study_id or ""
        # Without a study, study_id is the path of a scan, which is unique below its folder only.
        study = table.below(study) if study in {scan.path for scan in shown} else study
        study = _cell(row, "study") or study
        if study:
            groups.join(key, f"study {study}")
        for scan in shown:
            path = table.below(scan.path)
            groups.join(key, f"scan {path}")
            images[path if scan.volume is None else f"{path}, volume {scan.volume}"] = path, scan.volume
        rows[key] = _cell(row, "split")
        if texts is not None:
            text = " ".join(p.text for p in sample.parts if isinstance(p, Text) and p.role == "response")
            for other, similarity in texts.add(key, text):
                groups.join(other, key)
                near.append({"kind": "texts", "a": other, "b": key, "similarity": similarity})


def _cell(row: dict, column: str) -> str:
    return present(str(row.get(column) or ""))


def _add_near_images(root, groups, images, near: list[dict], result: Result, progress) -> None:
    """Join the groups of near-duplicate images, and append the pairs of images to `near`."""
    hashes = {}
    done = progress("hashing images", "images", len(images))
    for name, (path, volume) in images.items():
        try:
            hashes[name] = duplicates.image_hash(scans.resolve(root, path), volume)
        except scans.ScanError as error:
            result.problem(error.path, path, error.reason, error.remedy)
        done(1, 0)
    for a, b, distance in duplicates.near_images(hashes):
        if images[a][0] != images[b][0]:  # volumes of one stack are in one group already
            groups.join(f"scan {images[a][0]}", f"scan {images[b][0]}")
            near.append({"kind": "pictures", "a": a, "b": b, "distance": distance})
    near.sort(key=lambda pair: pair["kind"])
    for kind in ("pictures", "texts"):
        result.count(f"near duplicates of {kind}", sum(p["kind"] == kind for p in near))


def hash_split(seed: int, group: str, test: float) -> str:
    """Return train or test, decided by a hash alone."""
    digest = hashlib.blake2b(f"{seed}\x1f{group}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") < test * 2**64 else "train"


def _write(tables, groups, rows, existing, directory, options, result: Result) -> None:
    for table in tables:
        header, cells = layouts.read(table.family, table.file, Result())
        if header is not None and "split" not in header:
            header = [*header, "split"]
        with layouts.Tables(directory, {table.name: header}) as out:
            for number, row in cells:
                key = f"row {table.name} {number}"
                if key not in rows:
                    continue
                group = groups.find(key)
                # The test rows of a leaking group stay in test. Its other rows get no split.
                order = lambda split: (split != "test", split == "train", split)  # noqa: E731
                kept = min(existing.get(group, ()), key=order, default="")
                split = kept or hash_split(options["seed"], group, options["test"])
                if kept and rows[key] not in ("", split):
                    reason = f"the row is in {rows[key]}, but its group is in {kept}"
                    result.problem(table.file, number, reason, f"it has no split now: see {directory}/leaks.jsonl")
                    split = ""
                out.write(table.name, row | {"split": split})
                result.count(f"{table.name}: {split or 'in no split, because it leaks'}")


_run = console.run_on_tables(curate, "test seed near anew check")
TOOLS = {"splits": console.Tool(DESCRIPTION, EPILOG, _add_options, _run)}
