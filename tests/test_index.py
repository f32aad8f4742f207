"""The index compared with its data: every difference is named, and a moved root is no difference."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from input_pipeline.index import index
from input_pipeline.index.index import Index, IndexedScan, Scans, key_hash, scan_key, table_checksum
from input_pipeline.samples import Scan

SCANS = [  # path, volume, window, fault, shape, record
    ("a.png", -1, "", "", (40, 50, 1, 1), 0),
    ("ct.nii.gz", -1, "", "", (64, 64, 30, 1), 1),
    ("ct.nii.gz", -1, "[-100.0, 300.0]", "", (64, 64, 30, 1), 2),
    ("ct.nii.gz", 1, '"lung"', "", (64, 64, 30, 1), -1),
    ("none.png", -1, "", "missing", (0, 0, 0, 0), -1),
]


@pytest.fixture
def written(tmp_path) -> tuple[Path, dict]:
    """Write the index of two sources by hand. Returns its directory and the sources."""
    root, directory = tmp_path / "data", tmp_path / "index"
    root.mkdir()
    directory.mkdir()
    for name in ("train.csv", "more.csv"):
        (root / name).write_text(name)
    fields = {
        "vqa": {"family": "vqa_rad", "table": "train.csv", "root": str(root), "split": "train"},
        "more": {"family": "diagnosis", "table": "more.csv", "root": str(root), "vocabulary": ["edema", "nodule"]},
    }
    sources = {
        name: {
            "family": f["family"],
            "fields": f,
            "table": f["table"],
            "root": str(root),
            "split": "train",
            "sha256": table_checksum(root / f["table"]),
            "rows": rows,
        }
        for (name, f), rows in zip(fields.items(), (4, 2), strict=True)
    }
    lines = [
        {"source": "vqa", "root": str(root), "path": path, "volume": volume, "window": window, "fault": fault,
         "key": key_hash(path, volume, window), "record": record, "bytes": 7,
         **dict(zip(("height", "width", "depth", "channels"), shape, strict=True))}
        for path, volume, window, fault, shape, record in SCANS
    ]  # fmt: skip
    rows = [
        {"source": "vqa", "row": i, "row_id": str(i), "state": s} for i, s in enumerate(["good", "bad", "good", "x"])
    ]
    rows += [{"source": "more", "row": i, "row_id": str(i), "state": "good"} for i in range(2)]
    pq.write_table(pa.Table.from_pylist(lines, index.SCANS), directory / "scans.parquet")
    pq.write_table(pa.Table.from_pylist(rows, index.ROWS), directory / "rows.parquet")
    description = {"version": index.VERSION, "sources": sources, "identity": "abc"}
    (directory / "index.json").write_text(json.dumps(index.sealed(directory, description)))
    return directory, fields


def test_unchanged_data_passes(written):
    directory, sources = written
    opened = Index(directory)
    opened.check(sources)
    assert opened.identity == "abc" and set(opened.tables) == {"vqa", "more"}
    assert opened.bad_rows("vqa").tolist() == [False, True, False, True]
    assert opened.bad_rows("more").tolist() == [False, False]


def known(scans: Scans, root) -> dict[Scan, IndexedScan]:
    """Return the scans of SCANS that are known."""
    listed = [Scan(path, None if volume < 0 else volume, _window(window)) for path, volume, window, *_ in SCANS]
    numbers = {scan: scans.number(scan_key(root, scan)) for scan in listed}
    return {scan: scans[number] for scan, number in numbers.items() if number is not None}


def test_scans_by_key(written):
    directory, sources = written
    indexed = Index(directory).scans({"vqa": sources["vqa"]})
    assert known(indexed, sources["vqa"]["root"]) == {
        Scan("a.png"): IndexedScan((40, 50, 1, 1), 7, 0),
        Scan("ct.nii.gz"): IndexedScan((64, 64, 30, 1), 7, 1),
        Scan("ct.nii.gz", window=(-100.0, 300.0)): IndexedScan((64, 64, 30, 1), 7, 2),
        Scan("ct.nii.gz", 1, "lung"): IndexedScan((64, 64, 30, 1), 7, -1),
    }  # without the bad scan
    assert len(indexed) == 4 and indexed.number(scan_key(sources["vqa"]["root"], Scan("b.png"))) is None
    assert not known(indexed, "/elsewhere")


def test_a_root_may_move(written, tmp_path):
    directory, sources = written
    moved = tmp_path / "elsewhere"
    shutil.move(sources["vqa"]["root"], moved)
    moved_sources = {name: fields | {"root": str(moved)} for name, fields in sources.items()}
    opened = Index(directory)
    opened.check(moved_sources)
    indexed = opened.scans(moved_sources)
    assert len(indexed) == len(known(indexed, moved)) == 4 and not known(indexed, sources["vqa"]["root"])


def test_a_root_may_become_two(written, tmp_path):
    """The sources of one root are now under two: each scan is known under both, with different numbers."""
    directory, sources = written
    split_sources = sources | {"more": sources["more"] | {"root": str(tmp_path / "second")}}
    indexed = Index(directory).scans(split_sources)
    both = [known(indexed, split_sources[name]["root"]) for name in ("vqa", "more")]
    assert both[0] == both[1] and len(both[0]) == 4 and len(indexed) == 8
    names = [indexed.number(scan_key(split_sources[name]["root"], Scan("a.png"))) for name in ("vqa", "more")]
    assert names[0] != names[1]


def test_two_scans_with_one_key():
    """Equal values are one scan; different values are an error, because one scan would replace the other."""
    keys, sizes, records = np.array([5, 9, 5], np.uint64), np.array([7, 8, 7]), np.array([0, 1, 0])
    columns = (keys, sizes, records, np.array([3, 4, 3]), np.ones((3, 4), np.int32))
    assert len(Scans(*columns)) == 2
    columns[2][2] = 3
    with pytest.raises(ValueError, match="two scans with one key"):
        Scans(*columns)


def _window(text: str):
    value = json.loads(text) if text else None
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize(
    "change",
    [
        {"weight": 3.0},
        {"fraction": 0.2},
        {"quarantine": True},
        {"vocabulary": ("edema", "nodule")},
        {"balance": None},
    ],
)
def test_fields_that_may_change(written, change):
    directory, sources = written
    Index(directory).check(sources | {"more": sources["more"] | change})


def test_every_difference_is_named(written):
    directory, sources = written
    root = Path(sources["vqa"]["root"])
    (root / "train.csv").write_text("edited")
    (root / "more.csv").unlink()
    changed = {
        "vqa": sources["vqa"] | {"split": "test", "family": "slake"},
        "more": sources["more"] | {"vocabulary": ["edema"]},
        "mor": sources["more"],
    }
    with pytest.raises(ValueError) as error:
        Index(directory).check(changed)
    for message in (
        "source vqa: split is 'test', was 'train'",
        "source vqa: family is 'slake', was 'vqa_rad'",
        f"source vqa: {root / 'train.csv'} has changed since",
        "source more: vocabulary is ['edema'], was ['edema', 'nodule']",
        f"source more: {root / 'more.csv'} is missing",
        "source mor is not in it (did you mean more?)",
        "run prepare again",
    ):
        assert message in str(error.value)


def test_a_subset_of_the_sources_passes(written):
    directory, sources = written
    Index(directory).check({"vqa": sources["vqa"]})


def test_no_index(tmp_path, written):
    with pytest.raises(ValueError, match="index.json is missing; create it with"):
        Index(tmp_path)
    directory, _ = written
    description = json.loads((directory / "index.json").read_text())
    (directory / "index.json").write_text(json.dumps(description | {"version": 0}))
    with pytest.raises(ValueError, match=f"has version 0, not {index.VERSION}: run prepare again"):
        Index(directory)


def test_checksum_of_a_prepared_data_set(tmp_path):
    """The checksum of a directory covers file names, sizes, and the content of JSON files."""
    (tmp_path / "a.json").write_text('{"n": 1}')
    (tmp_path / "data-00000").write_bytes(b"12345")
    first = table_checksum(tmp_path)
    (tmp_path / "a.json").write_text('{"n": 2}')
    second = table_checksum(tmp_path)
    (tmp_path / "data-00000").write_bytes(b"123456")
    third = table_checksum(tmp_path)
    (tmp_path / "data-00000").rename(tmp_path / "data-00001")
    assert len({first, second, third, table_checksum(tmp_path)}) == 4
