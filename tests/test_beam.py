"""--runner: parts written by other processes give the same files as one machine, byte for byte.

The slow tests need Apache Beam; the others replace only the runner.
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

IMAGES = 150  # more than two chunks
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
    """Images (one broken, one missing, two with equal bytes), their table, a config, and the same images as cases."""
    root = tmp_path_factory.mktemp("beam")
    phantoms.write(root / "practice", train=4, test=2, size=64, workers=1)
    (root / "practice" / "tokenizer.model").rename(root / "tokenizer.model")
    rng, rows = np.random.default_rng(0), []
    for k in range(IMAGES):
        case = root / "cases" / f"{k:03d}"
        case.mkdir(parents=True)
        file = case / "a.png"
        Image.fromarray(rng.integers(0, 255, (20, 20), np.uint8)).save(file)
        described = {
            "findings": f"Finding {k}.",
            "title": f"Disease {k}",
            "scans": [{"path": "a.png", "modality": "CT"}],
        }
        (case / "case.json").write_text(json.dumps(described))
        rows.append({"id": str(k), "task": "vqa", "scans": [f"cases/{k:03d}/a.png"], "response": "yes",
                     "instruction": "<image-1> Any effusion?"})  # fmt: skip
    (root / "cases/003/a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (root / "cases/070/a.png").unlink()
    (root / "cases/149/a.png").write_bytes((root / "cases/000/a.png").read_bytes())
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "config.py").write_text(CONFIG.format(root=str(root)))
    return root


@pytest.fixture(autouse=True)
def no_figure(monkeypatch):
    monkeypatch.setattr(summary_figure, "draw", lambda report, file: file.touch())


def run_prepare(root: Path, out: Path, *more: str) -> int:
    return prepare_main([f"--config={root / 'config.py'}", "--out", str(out), *more])


def tree(directory: Path) -> dict[str, bytes]:
    """Return the content of every file, without times."""
    files = {f.relative_to(directory).as_posix(): f.read_bytes() for f in directory.rglob("*") if f.is_file()}
    for name in ("summary.png", "summary.txt", ".lock", "report.json"):
        files.pop(name, None)
    for name, timed in (("index.json", "created"), ("summary.json", "reading")):
        if name in files:
            value = json.loads(files[name])
            del value[timed]
            value.pop("sha256", None)  # of the content with the time
            files[name] = json.dumps(value).encode()
    return files


@pytest.fixture
def runner(monkeypatch):
    """Replace Beam: write the parts here, each chunk as a separate worker would, in reverse order."""
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
def test_prepare_by_parts_equals_prepare(root, tmp_path, runner, records):
    assert run_prepare(root, tmp_path / "local", "--workers", "0", *records) == 0
    assert run_prepare(root, tmp_path / "spread", "--runner", "direct", *records) == 0
    local, spread = tree(tmp_path / "local"), tree(tmp_path / "spread")
    assert local == spread and not (tmp_path / "spread" / "parts").exists()
    quarantine = local["quarantine.jsonl"].decode()
    assert "003/a.png" in quarantine and "070/a.png" in quarantine, "the broken and the missing image are reported"
    if records:
        lengths = json.loads(local["records/dataset_info.json"])["splits"][0]["shardLengths"]
        assert sum(map(int, lengths)) == IMAGES - 3, "two scans with equal bytes share a record"


def test_a_failed_run_resumes(root, tmp_path, runner, capsys):
    """Parts of the failed run are used if their files have not changed; a changed image is read again."""
    runner["after"] = 2
    assert run_prepare(root, tmp_path / "a", "--runner", "direct", "--records") == 2
    assert "the job failed" in capsys.readouterr().err
    parts = {f: f.stat().st_mtime_ns for f in (tmp_path / "a" / "parts").glob("*.jsonl")}
    assert len(parts) == 2
    changed = root / "cases" / "080" / "a.png"
    before = changed.read_bytes()
    try:
        Image.fromarray(np.full((20, 20), np.arange(20), np.uint8)).save(changed)
        before_removal = {}
        remove = chunk_files.remove_parts
        record = lambda directory: (before_removal.update({f: f.stat().st_mtime_ns for f in parts}), remove(directory))  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunk_files, "remove_parts", record)
            assert run_prepare(root, tmp_path / "a", "--runner", "direct", "--records") == 0
        assert [f.name for f in parts if before_removal[f] == parts[f]] == ["00000002.jsonl"]
        assert run_prepare(root, tmp_path / "b", "--workers", "0", "--records") == 0
        assert tree(tmp_path / "a") == tree(tmp_path / "b")
    finally:
        changed.write_bytes(before)


def test_parts_that_a_runner_wrote_elsewhere_are_missed(root, tmp_path, monkeypatch, capsys):
    """Workers that do not mount --out leave no parts here, or those of an earlier run."""
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
def test_options_without_effect_are_refused(root, tmp_path, capsys, wrong, words):
    assert run_prepare(root, tmp_path / "a", *wrong) == 2 and words in " ".join(capsys.readouterr().err.split())
    assert build_main(["rad3d", str(root / "cases"), "--out", str(tmp_path / "b"), *wrong]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_without_beam(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert run_prepare(root, tmp_path, "--runner", "direct") == 2
    assert "pip install apache-beam" in " ".join(capsys.readouterr().err.split())


# --- with Beam --------------------------------------------------------------------------------------------------------


def on_beam(*command) -> None:
    """Run in a separate process, because Beam starts its own threads."""
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
    """Several chunks, and workers in separate processes."""
    on_beam("-m", "input_pipeline.curate", "rad3d", root / "cases", "--out", tmp_path / "out", "--runner", "direct",
            *(f"--runner-option={option}" for option in options))  # fmt: skip
    on_beam_files = tree(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "beam")
    cases.build("rad3d", root / "cases", tmp_path / "out", {"first": False}, workers=0)
    assert on_beam_files == tree(tmp_path / "out") and len(json.loads(on_beam_files["caption.json"])) == IMAGES - 2


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["pmc-inline", "pmc-oa"])
def test_papers_on_beam(tmp_path, tool):
    """140 packages in three chunks: each annotated paper under ten numbers, and one broken paper."""
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
    on_beam_files = tree(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "beam")
    assert build_main([tool, str(tmp_path / "oa"), "--out", str(tmp_path / "out"), "--workers", "2", *more]) == 0
    assert on_beam_files == tree(tmp_path / "out") and "PMC9100077" in on_beam_files["problems.jsonl"].decode()
    assert sum(name.startswith("figures/") for name in on_beam_files) > 140


@pytest.mark.slow
def test_failures_on_beam_are_reported(root, tmp_path):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed: pip install apache-beam")
    items = chunk_files.Items.write(tmp_path, map(str, range(3)))
    with pytest.raises(ValueError, match="Unexpected pipeline runner: Nonsense"):
        beam.make_parts(tmp_path, items, [0], _fails, 5, "Nonsense")
    with pytest.raises(WorkerError, match="job on direct failed: .*chunk 0 is bad"):
        beam.make_parts(tmp_path, items, [0], _fails, 5, "direct")
    messages = []
    with pytest.raises(WorkerError, match="1 of 1 parts are not in"):
        beam.make_parts(tmp_path, items, [0], _does_nothing, 5, "direct", ["--flink_mster=x"], log=messages.append)
    assert "does not know the option --flink_mster" in messages[0]


def _fails(pool, chunk):
    raise RuntimeError(f"chunk {chunk} is bad")


def _does_nothing(pool, chunk):
    pass
