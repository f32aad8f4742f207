"""Runs of `prepare` that are killed and resumed, files that hang or crash their reader, and files that change."""

# ruff: noqa: F811 (fixtures that are imported)

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_prepare import facts, indexed, mine, no_figure, own, practice, row  # noqa: F401

from input_pipeline.config import DataConfig
from input_pipeline.images import scans
from input_pipeline.index import scan_checks
from input_pipeline.index.index import Index
from input_pipeline.index.prepare import prepare
from input_pipeline.parallel import resilient_pool, workers
from input_pipeline.parallel.workers import WorkerError

# --- interruptions ----------------------------------------------------------------------------------------------------

KILLED = """
import os, pickle, signal, sys
from input_pipeline.index import resume_state
from input_pipeline.index.prepare import prepare

config, out, workers, appends = pickle.load(sys.stdin.buffer)
append = resume_state.ResumeState.append

def append_and_die(self, *args):
    global appends
    append(self, *args)
    appends -= 1
    if not appends:
        os.kill(os.getpid(), signal.SIGKILL)

resume_state.ResumeState.append = append_and_die
if __name__ == "__main__":
    prepare(config, out, workers=workers)
"""


def killed(config: DataConfig, out: Path, workers: int, appends: int) -> None:
    """Run `prepare` in a process that kills itself after so many appends."""
    root = Path(scan_checks.__file__).parents[2]
    ended = subprocess.run(
        [sys.executable, "-c", KILLED], input=pickle.dumps((config, out, workers, appends)), cwd=root, timeout=120
    )
    assert ended.returncode == -signal.SIGKILL


def test_a_killed_run_resumes(indexed, tmp_path, monkeypatch):
    """Killed after two chunks of 16 scans, with half a line written, and again after the third chunk."""
    config, unbroken, _ = indexed
    out = tmp_path / "index"
    finished = [0]
    for processes, appends in ((1, 2), (0, 3)):
        killed(config, out, processes, appends)
        assert not (out / "index.json").exists()
        progress = [json.loads(line) for line in (out / ".progress").read_text().splitlines()]
        names = {line[1] for line in progress if isinstance(line, list)}
        finished.append(len(names))
        if processes:
            with open(out / ".progress", "a") as torn:
                torn.write('["/data", "scans/tr')
    assert finished == [0, 32, 48]

    opened = []
    read = scans.read
    monkeypatch.setattr(scans, "read", lambda path, **choice: opened.append(str(path)) or read(path, **choice))
    report = prepare(config, out, workers=0)
    assert report["reading"]["scans_read"] == len(opened) == 56 - finished[2]
    assert not any(path.endswith(tuple(names)) for path in opened)
    for name in ("scans.parquet", "rows.parquet"):
        assert (out / name).read_bytes() == (unbroken / name).read_bytes()
    assert not (out / ".progress").exists() and Index(out).identity == Index(unbroken).identity


def test_only_changed_scans_are_read_again(mine, tmp_path, monkeypatch):
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(mine / "flat.png")
    rows = [row(str(i), f"p{i}.png") for i in range(6)] + [row("x", "none.png"), row("y", "flat.png")]
    config = own(mine, rows)
    prepare(config, tmp_path / "index", workers=0)
    Image.fromarray(np.eye(40, dtype=np.uint8)).save(mine / "p2.png")
    opened = []
    read = scans.read
    monkeypatch.setattr(scans, "read", lambda path, **choice: opened.append(path.name) or read(path, **choice))
    prepare(config, tmp_path / "index", workers=0)
    assert opened == ["p2.png", "flat.png"]  # bad scans are read again
    assert facts(tmp_path / "index")["p2.png"]["high"] == 1
    shutil.copy(mine / "p0.png", mine / "none.png")
    report = prepare(config, tmp_path / "index", workers=0)
    assert opened[2:] == ["none.png", "flat.png"] and report["rows"]["bad"] == 1
    prepare(config, tmp_path / "index", workers=0, recheck=True)
    assert len(opened) == 4 + 8


def test_a_series_is_read_again_when_one_of_its_files_changes(tmp_path):
    series = tmp_path / "series"
    series.mkdir()
    for name in ("b", "a"):
        (series / name).write_text(name)
    stamp, size = scan_checks.stamp_of(series)
    assert size == 2 and scan_checks.stamp_of(series) == (stamp, size)
    assert scan_checks.scan_sha256(series) == hashlib.sha256(b"ab").hexdigest()
    os.utime(series / "a", (1, 1))
    assert scan_checks.stamp_of(series)[0] != stamp
    (series / "c").touch()
    (series / "a").unlink()
    assert scan_checks.stamp_of(series)[0] != stamp


# --- files that hang their reader -------------------------------------------------------------------------------------


def sabotage() -> None:
    """Runs in the keeper: replace scans.read by one that hangs on p3.png."""
    read = scans.read

    def read_or_hang(path, **choice):
        if path.name == "p3.png":
            signal.pause()
        return read(path, **choice)

    scans.read = read_or_hang


def test_a_file_that_hangs_its_reader_is_in_quarantine(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(scan_checks, "preload", sabotage)
    config = own(mine, [row(str(i), f"p{i}.png") for i in range(6)], worker_timeout=3.0)
    messages = []
    report = prepare(config, tmp_path / "index", workers=1, log=messages.append)
    scan_facts = facts(tmp_path / "index")
    assert {name: line["fault"] for name, line in scan_facts.items() if line["fault"]} == {"p3.png": "damaged"}
    assert "hung" in scan_facts["p3.png"]["reason"] and "data.worker_timeout" in scan_facts["p3.png"]["remedy"]
    assert report["rows"] == {"good": 5, "bad": 1, "not_opened": 0} and report["reading"]["workers_ended"] == 1
    assert len(messages) == 1 and "p3.png" in messages[0]
    monkeypatch.undo()
    again = prepare(
        config, tmp_path / "index", workers=0
    )  # the scan is read again, because the machine may have been at fault
    assert again["rows"]["bad"] == 0 and again["reading"]["scans_read"] == 1


def crash(state, items):
    for item in items:
        workers.heartbeat(item)
        if item.isupper():
            os._exit(1)
    return [item * 2 for item in items]


def test_items_that_crash_their_worker_are_skipped_up_to_a_limit(monkeypatch):
    """The other items have their results, in order."""
    monkeypatch.setattr(resilient_pool, "MAX_DEATHS", 1)
    with (
        resilient_pool.ResilientPool(resilient_pool.no_state, 1, 20.0) as workers,
        pytest.raises(WorkerError, match="at C") as error,
    ):
        results = workers.map(crash, ["a", "B", "b", "c", "C"], 3, label=str, failed=lambda item, reason: reason)
        items, (first, second, third) = next(results)
        assert items == ["a", "B", "b"] and (first, third) == ("aa", "bb") and "was ended" in second
        next(results)
    assert "more than 1 items" in error.value.__notes__[0]
