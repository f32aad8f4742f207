"""splits: tables -> the same tables with a column `split`, no patient, study, scan or near duplicate on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from input_pipeline.curate import console, duplicates, jobs, layouts
from input_pipeline.curate.jobs import Report, Result
from input_pipeline.curate.layouts import Named
from input_pipeline.datasets import FAMILIES, Dataset, open_dataset, sample_rng
from input_pipeline.datasets.diagnosis import Diagnosis
from input_pipeline.files import write_json_lines
from input_pipeline.images import scans
from input_pipeline.samples import RowError, Text

DESCRIPTION = """\
Split tables into train and test by patient, study and paper, over all tables at once; find near duplicates, and leaks
between splits that tables have already.
"""
EPILOG = """\
What belongs together stays together: rows of one study (as the readers find it; the column `study` if there is one),
rows that show one scan, and with --near rows with near-duplicate pictures or, in their answers, texts. Each such group
goes to test with the given share, decided by a hash of the seed and the name of its first study (else scan): adding
rows and tables moves no other group, unless it joins two or brings a study whose name comes before.

A split that a table has already, as its owner published it, is kept, and what belongs to it goes with it. Where rows of
one group stand on two sides, those in test stay, and the others get no split and are listed: the test set stays
comparable, and nothing leaks into it. --anew decides every split by hash instead.

what is written to DIR:
  the tables with their column `split`        read with split="train" or split="test", and the root that they had
  near.jsonl      with --near: pairs of pictures or texts, and how near they are
  leaks.jsonl     groups that stand on both sides of the column `split` that tables have already
  report.json, problems.jsonl

FAMILY=FOLDER:TABLE is for a table whose paths begin in a folder below --root, as the other builders write; TABLE is
below that folder, too, or leads out of it: rad3d_caption=rad3d:../split/caption.json.

examples:
  python -m input_pipeline.curate splits --root data --out data/split pmc_vqa=vqa.csv rad3d_caption=rad3d:caption.json
  python -m input_pipeline.curate splits --root data --out s --near --test 0.05 vqa_rad=vqa.csv
  python -m input_pipeline.curate splits --root data --out s --check --near cxr_mix=open.csv     # changes no split
"""


def main(tool: str, argv: list[str]) -> int:
    parser = console.parser(tool, DESCRIPTION, EPILOG)
    layouts.add_tables(parser)
    parser.add_argument("--test", type=float, default=0.1, metavar="SHARE", help="of the groups (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--near", action="store_true", help="look for near duplicates (imagehash and datasketch)")
    parser.add_argument("--anew", action="store_true", help="take no notice of splits that the tables have already")
    parser.add_argument("--check", action="store_true", help="write no table, only list what leaks")
    args = parser.parse_args(argv)
    if not 0 < args.test < 1:
        parser.error(f"--test {args.test}: a share between 0 and 1 is needed")
    if args.check and args.anew:
        parser.error("--check looks at the splits that --anew takes no notice of: give one of them")
    options = {name: getattr(args, name) for name in ("test", "seed", "near", "anew", "check")}
    return console.run(args, lambda out, **more: build(args.tables, args.root, out, options, **more))


class _Groups:
    """Union-find over names. A group is called after its first study, else its first scan, else its first row."""

    def __init__(self):
        self.parent: dict[str, str] = {}

    def find(self, name: str) -> str:
        root = name
        while self.parent.setdefault(root, root) != root:
            root = self.parent[root]
        while self.parent[name] != root:
            self.parent[name], name = root, self.parent[name]
        return root

    def join(self, a: str, b: str) -> None:
        a, b = sorted((self.find(a), self.find(b)), key=lambda name: (_KINDS.index(name.split(" ", 1)[0]), name))
        self.parent[b] = a  # not the order of the rows decides, nor where in a table they stand


_KINDS = ("study", "scan", "row")


def opened(named: list[Named], result: Result) -> Iterator[tuple[Named, Dataset]]:
    """Each table with its data set, one at a time; bad rows are reported."""
    for table in named:
        fields = {"balance": False} if issubclass(FAMILIES[table.family], Diagnosis) else {}
        dataset = open_dataset(table.family, table=table.file, root=table.root, quarantine=True, **fields)
        for problem in dataset.problems:
            result.problem(problem.file, problem.row, problem.reason, problem.remedy)
        for why, count in dataset.left_out.items():
            result.count(f"{table.name}: left out, {why}", count)
        yield table, dataset


def build(specs, root, directory, options: dict, progress=jobs.silent, said=None) -> dict:
    """Writes the tables with their splits; returns the report. Raises ValueError.

    In memory are the names of studies, scans and rows, and hashes.
    """
    root, directory = Path(root).absolute(), Path(directory).absolute()
    result, report = Result(), Report(directory, "splits", {"root": str(root), "tables": specs} | options)
    named = layouts.all_named(specs, root, directory)
    groups, rows, pictures = _Groups(), {}, {}
    texts = duplicates.Texts() if options["near"] else None
    near: list[dict] = []
    for table, dataset in opened(named, result):
        name = table.name
        done = progress(name, "rows", len(dataset))
        cells = layouts.read(table.family, table.file, Result())[1]
        for i in range(len(dataset)):
            done(1, 0)
            number = int(dataset.row_id(i))
            given = next(row for at, row in cells if at == number)
            key = f"row {name} {number}"
            try:
                sample = dataset.sample(i, sample_rng(0, 0, dataset.name, str(number)))
                shown = dataset.scans(i)
            except RowError as error:
                result.problem(error.file, number, error.reason, error.remedy)
                continue
            study = sample.study_id or ""
            # A study that is no more than the path of a scan is one of this folder.
            study = table.below(study) if study in {scan.path for scan in shown} else study
            study = str(given.get("study") or study)
            if study:
                groups.join(key, f"study {study}")
            for scan in shown:
                groups.join(key, f"scan {table.below(scan.path)}")
                pictures.setdefault(table.below(scan.path), None)
            rows[name, number] = str(given.get("split") or "")
            if texts is not None:
                text = " ".join(p.text for p in sample.parts if isinstance(p, Text) and p.role == "response")
                for other, similarity in texts.add(key, text):
                    groups.join(other, key)
                    near.append({"kind": "texts", "a": other, "b": key, "similarity": similarity})
    if options["near"]:
        _near(root, directory, groups, pictures, near, result, progress)
    result.count("rows", len(rows))
    result.count("groups", len({groups.find(f"row {name} {number}") for name, number in rows}))
    (directory / "leaks.jsonl").unlink(missing_ok=True)
    if not options["anew"]:
        given = _given(groups, rows)
        leaks = [{"group": group, "rows": found} for group, found in sorted(given.items()) if len(found) > 1]
        write_json_lines(directory / "leaks.jsonl", leaks)
        result.count("groups on several sides (leaks)", len(leaks))
    if options["check"]:
        _check(directory, leaks, rows, result)
    else:
        _write(named, groups, rows, {} if options["anew"] else given, directory, options, result)
    report.add(result)
    return report.write()


def _near(root, directory, groups, pictures, pairs: list[dict], result: Result, progress) -> None:
    hashes = {}
    done = progress("hashing pictures", "pictures", len(pictures))
    for path in pictures:
        try:
            hashes[path] = duplicates.picture_hash(scans.resolve(root, path))
        except scans.ScanError as error:
            result.problem(error.path, path, error.reason, error.remedy)
        done(1, 0)
    for a, b, distance in duplicates.near_pictures(hashes):
        groups.join(f"scan {a}", f"scan {b}")
        pairs.append({"kind": "pictures", "a": a, "b": b, "distance": distance})
    pairs.sort(key=lambda pair: pair["kind"])
    write_json_lines(directory / "near.jsonl", pairs)
    for kind in ("pictures", "texts"):
        result.count(f"near duplicates of {kind}", sum(p["kind"] == kind for p in pairs))


def _given(groups, rows) -> dict[str, dict[str, list[str]]]:
    """Groups some of whose rows have a split already: group -> split -> rows."""
    sides: dict[str, dict[str, list[str]]] = {}
    for (name, number), split in rows.items():
        if split:
            key = f"row {name} {number}"
            sides.setdefault(groups.find(key), {}).setdefault(split, []).append(key)
    return sides


def _check(directory, leaks: list[dict], rows, result: Result) -> None:
    result.count("rows without a split", sum(not split for split in rows.values()))
    for leak in leaks:
        result.problem(directory / "leaks.jsonl", leak["group"], "a group stands on several sides", "split it anew")


def side(seed: int, group: str, test: float) -> str:
    """train or test, by hash alone."""
    digest = hashlib.blake2b(f"{seed}\x1f{group}".encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") < test * 2**64 else "train"


def _write(named, groups, rows, given, directory, options, result: Result) -> None:
    for table in named:
        header, cells = layouts.read(table.family, table.file, Result())
        if header is not None and "split" not in header:
            header = [*header, "split"]
        with layouts.Tables(directory, {table.name: header}) as out:
            for number, row in cells:
                if (table.name, number) in rows:
                    group = groups.find(f"row {table.name} {number}")
                    # What stands in several sides stays in the one that nothing may leak into.
                    own = min(given.get(group, ()), key=lambda split: (split != "test", split == "train", split),
                              default="")  # fmt: skip
                    split = own or side(options["seed"], group, options["test"])
                    if rows[table.name, number] not in ("", split) and own:
                        reason = f"the row is in {rows[table.name, number]}, but what belongs to it is in {own}"
                        result.problem(table.file, number, reason, f"it has no split now: see {directory}/leaks.jsonl")
                        split = ""
                    out.write(table.name, row | {"split": split})
                    result.count(f"{table.name}: {split or 'in no split, as it leaks'}")
