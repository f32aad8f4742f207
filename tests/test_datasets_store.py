"""Rows on disk: the same values in the same order, for concurrent readers, in little memory."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from dataset_tables import own, write_csv

from input_pipeline.datasets import open_dataset, store
from input_pipeline.datasets.store import Store, digest, first_equal
from input_pipeline.parallel.workers import Pool
from input_pipeline.samples import RowError, Scan, Text


def values(n: int) -> list:
    """Return values of many sizes, some larger than a block."""
    parts = (Scan("a.nii", 1, (-160.0, 240.0)), Scan("b.png", None, "lung"), Text("ü\n", "context"))
    return [(f"row {k}", parts[k % 3 :], "x" * (k % 7 * 50), frozenset({"CT"}), None) for k in range(n)]


@pytest.mark.parametrize("block", [1, 500, 1 << 20])
def test_values_come_back(monkeypatch, block):
    monkeypatch.setattr(store, "BLOCK", block)
    whole = values(100)
    kept = Store(iter(whole))
    assert len(kept) == 100 and list(kept) == whole and [kept[k] for k in range(-100, 100)] == whole * 2
    with pytest.raises(IndexError):
        kept[100]
    some = [0, 1, 7, 50, 51, 99]
    chosen = kept.select(some)
    again = chosen.select(np.array([1, 3, 5]))
    assert list(chosen) == [chosen[k] for k in range(6)] == [whole[k] for k in some]
    del kept, chosen  # the file stays as long as anything reads it
    assert list(again) == [whole[k] for k in (1, 50, 99)] and len(again) == 3
    assert list(again.select(np.array([True, False, True]))) == [whole[1], whole[99]]
    assert not Store([]) and list(Store([])) == [] == list(again.select([]))


def test_the_file_has_no_name_and_is_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = Store(values(10))
    chosen, file = kept.select([1]), kept._file
    assert os.fstat(file.fileno()).st_size and not list(tmp_path.iterdir())
    del kept
    assert not file.closed
    del chosen
    assert file.closed


def _store() -> Store:
    return Store(values(3000))


def _read(kept: Store, seed: int) -> bool:
    whole = values(len(kept))
    order = np.random.default_rng(seed).permutation(len(whole)).tolist()
    return all(kept[k] == whole[k] for k in order) and list(kept) == whole


def test_forked_workers_and_threads_read_at_once():
    with Pool(_store, workers=4) as pool:
        assert all(future.result() for future in [pool.submit(f"{seed}", _read, seed) for seed in range(8)])
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(_read, [_store()] * 8, range(8)))


def test_a_full_disk_names_its_directory(tmp_path):
    """Run in a subprocess whose files may not exceed 2 MB."""
    write_csv(tmp_path / "t.csv", ("image_path", "label"), *((f"{k}.png", f"Report {k} " * 100) for k in range(4000)))
    child = (
        "import resource, sys; from input_pipeline.datasets import open_dataset\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))\n"
        "open_dataset('mimic_cxr', table='t.csv', root=sys.argv[1])"
    )
    (tmp_path / "small").mkdir()
    environment = os.environ | {"TMPDIR": str(tmp_path / "small")}
    done = subprocess.run([sys.executable, "-c", child, str(tmp_path)], capture_output=True, text=True, env=environment)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"OSError: [Errno {errno.EFBIG}]") and "TMPDIR" in last and str(tmp_path / "small") in last


def test_first_equal():
    texts = ["a", "b", "a", "c", "b", "a", "\ud83d\ude00", ""]
    assert first_equal(b"".join(digest(repr(t)) for t in texts)).tolist() == [0, 1, 0, 3, 1, 0, 6, 7]
    assert first_equal(bytearray()).tolist() == []
    zeros = [b"\0" * 16, b"a" + b"\0" * 15, b"\0" * 15 + b"a", b"a" + b"\0" * 14 + b" ", b"a" + b"\0" * 15, b"\0" * 16]
    assert first_equal(b"".join(zeros)).tolist() == [0, 1, 2, 3, 1, 0]


def test_numbers_are_plain_after_rows_were_dropped(tmp_path):
    row = {"task": "vqa", "scans": [], "instruction": "Q?", "response": "A."}
    fields = own(tmp_path, *(row | {"id": i} for i in ("a", "b", "a", "c", "b", "a")))
    dataset = open_dataset("jsonl", **fields, quarantine=True)
    assert [(dataset.row_id(i), dataset.number(i)) for i in range(3)] == [("a", 1), ("b", 2), ("c", 4)]
    assert json.dumps([dataset.number(2), dataset.duplicates]) == "[4, [[2, 1], [3, 1], [4, 1], [5, 1], [6, 1]]]"
    said = [(p.row, p.reason) for p in dataset.problems]
    assert said == [(3, "id 'a' is already used in row 1"), (5, "id 'b' is already used in row 2"),
                    (6, "id 'a' is already used in row 1")]  # fmt: skip


def test_headers_of_scans_are_read_once_but_not_all_kept(tmp_path):
    np.save(tmp_path / "v.npy", np.zeros((2, 3, 4, 4, 2), np.uint8))
    rows = [("v.npy", "Where?", f"{k}") for k in range(3)]
    write_csv(tmp_path / "t.csv", ("image_path", "question", "answer"), *rows)
    dataset = open_dataset("rad3d_vqa", table="t.csv", root=tmp_path)
    assert [dataset.scans(i) for i in range(3)] == [(Scan("v.npy", 0), Scan("v.npy", 1))] * 3
    (tmp_path / "v.npy").unlink()
    assert len(dataset.scans(0)) == 2 and dataset.npy_scans.cache_info().maxsize
    with pytest.raises(RowError, match="cannot be read"):
        open_dataset("rad3d_vqa", table="t.csv", root=tmp_path).scans(0)


PEAK = """
import sys
from input_pipeline.datasets import open_dataset
from input_pipeline.datasets.json_tables import json_lines_cache
family, table = sys.argv[1:]
with json_lines_cache():
    opened = [open_dataset(family, table=table, root="/", quarantine=True) for _ in range(2)]
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(len(opened[0]) + len(opened[0].problems), peak)
"""


@pytest.mark.parametrize(
    "kind", ["bad rows", *(pytest.param(k, marks=pytest.mark.slow) for k in ("jsonl", "csv", "json"))]
)
def test_memory_does_not_grow_with_the_text_of_a_table(tmp_path, kind):
    """Two sources of one table with 2 kB of text per row: 28 MB more text may take at most 12 MB more memory.

    Measured: 1 to 4 MB. One row in eight is bad. Its problem must not keep the row in memory (19 MB if it did).
    """
    family = {"csv": "pmc_oa", "json": "rad3d_caption"}.get(kind, "jsonl")

    def peak(n: int) -> float:
        text = lambda k: f"Finding {k} " * 160  # noqa: E731
        file = tmp_path / f"{n}"
        if kind == "csv":
            write_csv(file, ("Figure_path", "Caption"), *((f"{k}.png", text(k)) for k in range(n)))
        elif kind == "json":
            rows = ({"npy_path": f"{k}.nii", "finding": text(k), "impression": "None."} for k in range(n))
            file.write_text(json.dumps(list(rows)))
        else:
            row = {"task": "vqa", "scans": [], "instruction": "What?"}
            bad = {"task": "vqaa"} if kind == "bad rows" else {}
            rows = (json.dumps(row | {"id": f"{k}", "response": text(k)} | ({} if k % 8 else bad)) for k in range(n))
            file.write_text("\n".join(rows))
        done = subprocess.run([sys.executable, "-c", PEAK, family, str(file)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows, peak = done.stdout.split()
        assert int(rows) == n and file.stat().st_size > 2000 * n
        return int(peak) / 1024

    small, large = peak(2000), peak(16_000)
    assert large - small < 12, f"{small:.1f} MB with 2,000 rows, {large:.1f} with 16,000"
