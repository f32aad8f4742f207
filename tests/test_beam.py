"""--runner: parts made by other processes than the one that merges them give what one machine gives, byte for byte.

Tests that need Apache Beam say so; the others stand in for the runner and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from input_pipeline import phantoms
from input_pipeline.curate import cases
from input_pipeline.curate.__main__ import main as build_main
from input_pipeline.index import summary_figure
from input_pipeline.index.command import main as prepare_main
from input_pipeline.parallel import beam, chunk_files
from input_pipeline.parallel.resilient_pool import ResilientPool, no_state
from input_pipeline.parallel.workers import WorkerError
from tests import jats_papers

PICTURES = 150  # more than two chunks
CONFIG = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({{"data": {{
        "train": {{"own": {{"family": "jsonl", "table": "train.jsonl", "root": {root!r}}}}},
        "tokenizer": {root!r} + "/tokenizer.model", "terms": "none", "size_2d": 64, "size_3d": 64, "depth": 16,
        "text_length": 256, "vision_rows": 2, "patch_length": 32, "planes": 200, "scans": 4,
    }}}})
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures, one of them broken, one missing, two of the same bytes; a table, a config; the same as cases."""
    place = tmp_path_factory.mktemp("beam")
    phantoms.write(place / "practice", train=4, test=2, size=64, workers=1)
    (place / "practice" / "tokenizer.model").rename(place / "tokenizer.model")
    rng, rows = np.random.default_rng(0), []
    for k in range(PICTURES):
        case = place / "cases" / f"{k:03d}"
        case.mkdir(parents=True)
        file = case / "a.png"
        Image.fromarray(rng.integers(0, 255, (20, 20), np.uint8)).save(file)
        said = {"findings": f"Finding {k}.", "title": f"Disease {k}", "scans": [{"path": "a.png", "modality": "CT"}]}
        (case / "case.json").write_text(json.dumps(said))
        rows.append({"id": str(k), "task": "vqa", "scans": [f"cases/{k:03d}/a.png"], "response": "yes",
                     "instruction": "<image-1> Any effusion?"})  # fmt: skip
    (place / "cases/003/a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (place / "cases/070/a.png").unlink()
    (place / "cases/149/a.png").write_bytes((place / "cases/000/a.png").read_bytes())
    (place / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "config.py").write_text(CONFIG.format(root=str(place)))
    return place


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    monkeypatch.setattr(summary_figure, "draw", lambda report, file: file.touch())


def run_prepare(root: Path, out: Path, *more: str) -> int:
    return prepare_main([f"--config={root / 'config.py'}", "--out", str(out), *more])


def tree(directory: Path) -> dict[str, bytes]:
    """Every file but those that hold times, and what of these is no time."""
    found = {f.relative_to(directory).as_posix(): f.read_bytes() for f in directory.rglob("*") if f.is_file()}
    for name in ("summary.png", "summary.txt", ".lock", "report.json"):
        found.pop(name, None)
    for name, timed in (("index.json", "created"), ("summary.json", "reading")):
        if name in found:
            value = json.loads(found[name])
            del value[timed]
            found[name] = json.dumps(value).encode()
    return found


@pytest.fixture
def runner(monkeypatch):
    """In the place of Beam: makes the parts here, each chunk as a worker of its own would, the last one first."""
    made = []

    def make_parts(directory, items, chunks, work, timeout, runner, options=(), progress=None, log=None):
        import pickle

        for chunk in reversed(list(chunks)):
            with ResilientPool(no_state, 0, timeout) as pool:
                pickle.loads(pickle.dumps(work))(pool, chunk)
            made.append(chunk)
            if len(made) == stop["after"]:
                raise WorkerError("the job failed")

    stop = {"after": 0}
    monkeypatch.setattr(beam, "make_parts", make_parts)
    return stop


@pytest.mark.parametrize("records", [(), ("--records",)], ids=["index", "records"])
def test_prepare_by_parts_is_prepare(root, tmp_path, runner, records):
    assert run_prepare(root, tmp_path / "local", "--workers", "0", *records) == 0
    assert run_prepare(root, tmp_path / "spread", "--runner", "direct", *records) == 0
    local, spread = tree(tmp_path / "local"), tree(tmp_path / "spread")
    assert local == spread and not (tmp_path / "spread" / "parts").exists()
    quarantine = local["quarantine.jsonl"].decode()
    assert "003/a.png" in quarantine and "070/a.png" in quarantine, "both are there to be found"
    if records:
        lengths = json.loads(local["records/dataset_info.json"])["splits"][0]["shardLengths"]
        assert sum(map(int, lengths)) == PICTURES - 3, "two scans of the same bytes share a record"


def test_a_run_that_failed_goes_on(root, tmp_path, runner, capsys):
    """Parts of the run that failed are used while their files are the same; a picture that changed is read again."""
    runner["after"] = 2
    assert run_prepare(root, tmp_path / "a", "--runner", "direct", "--records") == 2
    assert "the job failed" in capsys.readouterr().err
    there = {f: f.stat().st_mtime_ns for f in (tmp_path / "a" / "parts").glob("*.jsonl")}
    assert len(there) == 2
    changed = root / "cases" / "080" / "a.png"
    before = changed.read_bytes()
    try:
        Image.fromarray(np.full((20, 20), np.arange(20), np.uint8)).save(changed)
        seen = {}
        original = chunk_files.remove_parts
        clean = lambda directory: (seen.update({f: f.stat().st_mtime_ns for f in there}), original(directory))  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunk_files, "remove_parts", clean)
            assert run_prepare(root, tmp_path / "a", "--runner", "direct", "--records") == 0
        assert [f.name for f in there if seen[f] == there[f]] == ["00000002.jsonl"]
        assert run_prepare(root, tmp_path / "b", "--workers", "0", "--records") == 0
        assert tree(tmp_path / "a") == tree(tmp_path / "b")
    finally:
        changed.write_bytes(before)


def test_parts_that_a_runner_put_elsewhere_are_missed(root, tmp_path, monkeypatch, capsys):
    """Workers that do not mount --out: the parts here are none, or those of an earlier run."""
    assert run_prepare(root, tmp_path, "--workers", "0") == 0
    monkeypatch.setattr(beam, "make_parts", lambda directory, items, chunks, *_, **__: [
        chunk_files.write_part(directory, k, ['{"of": "another", "deaths": []}']) for k in chunks
    ])  # fmt: skip
    assert run_prepare(root, tmp_path, "--runner", "flink", "--recheck") == 2
    assert "must see --out under the same path" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("wrong, words", [
    (["--runner-option=--x=1"], "needs a --runner"),
    (["--runner", "direct", "--workers", "2"], "--workers is for --runner local"),
])  # fmt: skip
def test_options_that_would_do_nothing(root, tmp_path, capsys, wrong, words):
    assert run_prepare(root, tmp_path / "a", *wrong) == 2 and words in " ".join(capsys.readouterr().err.split())
    assert build_main(["rad3d", str(root / "cases"), "--out", str(tmp_path / "b"), *wrong]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_without_beam(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert run_prepare(root, tmp_path, "--runner", "direct") == 2
    assert "pip install apache-beam" in " ".join(capsys.readouterr().err.split())


# --- with Beam --------------------------------------------------------------------------------------------------------


def on_beam(*command) -> None:
    """In a process of its own: Beam brings modules and threads of its own."""
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install apache-beam")
    subprocess.run([sys.executable, *map(str, command)], check=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})


@pytest.mark.slow
@pytest.mark.parametrize("records", [(), ("--records",)], ids=["index", "records"])
def test_prepare_on_beam(root, tmp_path, records):
    on_beam("-m", "input_pipeline.prepare", f"--config={root / 'config.py'}", "--out", tmp_path / "beam",
            "--runner", "direct", *records)  # fmt: skip
    assert run_prepare(root, tmp_path / "local", "--workers", "0", *records) == 0
    assert tree(tmp_path / "beam") == tree(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--direct_running_mode=multi_processing", "--direct_num_workers=2")])
def test_builders_on_beam(root, tmp_path, options):
    """Several chunks, and workers that are processes of their own."""
    on_beam("-m", "input_pipeline.curate", "rad3d", root / "cases", "--out", tmp_path / "out", "--runner", "direct",
            *(f"--runner-option={option}" for option in options))  # fmt: skip
    there = tree(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "beam")
    cases.build("rad3d", root / "cases", tmp_path / "out", {"first": False}, workers=0)
    assert there == tree(tmp_path / "out") and len(json.loads(there["caption.json"])) == PICTURES - 2


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["pmc-inline", "pmc-oa"])
def test_papers_on_beam(tmp_path, tool):
    """140 packages, three chunks: the annotated papers under ten numbers each, and one that is broken."""
    jats_papers.packages(tmp_path / "base", archives=False)
    for k, paper in enumerate(sorted((tmp_path / "base").iterdir()) * 10):
        new = f"PMC{9_100_000 + k}"
        shutil.copytree(paper, tmp_path / "oa" / new)
        xml = tmp_path / "oa" / new / f"{paper.name.lower()}.nxml"
        xml.write_bytes(
            xml.read_bytes().replace(paper.name[3:].encode(), new[3:].encode()) if k != 77 else b"<article>"
        )
    more = ["--cases"] if tool == "pmc-inline" else []
    on_beam(
        "-m", "input_pipeline.curate", tool, tmp_path / "oa", "--out", tmp_path / "out", "--runner", "direct", *more
    )
    there = tree(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "beam")
    assert build_main([tool, str(tmp_path / "oa"), "--out", str(tmp_path / "out"), "--workers", "2", *more]) == 0
    assert there == tree(tmp_path / "out") and "PMC9100077" in there["problems.jsonl"].decode()
    assert sum(name.startswith("figures/") for name in there) > 140


@pytest.mark.slow
def test_what_fails_on_beam_is_told(root, tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install apache-beam")
    items = chunk_files.Items.write(tmp_path, map(str, range(3)))
    with pytest.raises(ValueError, match="Unexpected pipeline runner: Nonsense"):
        beam.make_parts(tmp_path, items, [0], _fails, 5, "Nonsense")
    with pytest.raises(WorkerError, match="job on direct failed: .*chunk 0 is bad"):
        beam.make_parts(tmp_path, items, [0], _fails, 5, "direct")
    said = []
    with pytest.raises(WorkerError, match="1 of 1 parts are not in"):
        beam.make_parts(tmp_path, items, [0], _does_nothing, 5, "direct", ["--flink_mster=x"], log=said.append)
    assert "does not know the option --flink_mster" in said[0]


def _fails(team, chunk):
    raise RuntimeError(f"chunk {chunk} is bad")


def _does_nothing(team, chunk):
    pass
