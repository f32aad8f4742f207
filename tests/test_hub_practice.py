"""An export of a trained run on all practice data, and the readers on real files. Slow.

RADFM_PRACTICE is the folder of a quickstart: practice/ and runs/quickstart/finetune/ (bash launch/quickstart.sh).
RADFM_VLLM is a Python with vLLM and the plugin of launch/vllm.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import warnings
from pathlib import Path

import pytest
from test_hub_processor import PREPARATIONS, Calls, differences, export_processor, our_voxels

import radfm_jax
from radfm_jax.checkpoints import run_directory
from radfm_jax.convert.to_torch import to_torch
from radfm_jax.inference import Request, Sampling

pytestmark = pytest.mark.slow
QUESTIONS = 50


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """Return the practice data, the checkpoint of the trained run, and its export."""
    root = Path(os.environ.get("RADFM_PRACTICE", ""))
    if not (root / "practice").is_dir() or not (root / "runs/quickstart/finetune").is_dir():
        pytest.skip("RADFM_PRACTICE does not name the folder of a quickstart")
    run = run_directory.select_checkpoint(root / "runs/quickstart/finetune")
    export = tmp_path_factory.mktemp("practice") / "export"
    to_torch(run, export, part="hub")
    return root / "practice", run, export


def test_all_scans_have_our_voxels(quickstart, tmp_path):
    practice, run, export = quickstart
    scans = sorted(path for split in (practice / "scans").iterdir() for path in split.iterdir())
    preparation = radfm_jax.load(run).preparation
    other = export_processor(tmp_path / "pad", practice / "tokenizer.model", PREPARATIONS["float32"])
    calls = Calls(tmp_path / "calls")
    for folder, prepared in ((export, preparation), (other, PREPARATIONS["float32"])):
        for scan in scans:
            calls.add(folder, our_voxels([str(scan)], prepared), text="What?", images=[scan])
    done = calls.run()
    assert differences(done) == []
    assert len(scans) > 1000 and sum(isinstance(ours, dict) for _, ours, _ in done) == 2 * len(scans)


@pytest.fixture(scope="module")
def answers(quickstart):
    """Return requests of practice questions, and our greedy answers."""
    practice, run, _ = quickstart
    rows = [json.loads(line) for line in (practice / "test" / "all.jsonl").read_text().splitlines()]
    rows = rows[:: len(rows) // QUESTIONS][:QUESTIONS]
    requests = [Request(row["instruction"], [str(practice / scan) for scan in row["scans"]]) for row in rows]
    with warnings.catch_warnings(action="ignore"):  # notices on contrast
        ours = radfm_jax.load(run).generator.answers(requests, Sampling(max_new_tokens=60, temperature=0))
    ids = [list(answer.ids) for answer in ours]
    assert len(ids) == QUESTIONS and len(set(map(str, ids))) > 10
    return requests, ids


def test_greedy_answers_are_ours_token_for_token(quickstart, answers, tmp_path):
    calls = Calls(tmp_path / "calls")
    for request, ids in zip(*answers, strict=True):
        calls.add(quickstart[2], ids, "answer", text=request.prompt, images=request.scans)
    assert [(ours, theirs) for _, ours, theirs in calls.run() if ours != theirs] == []


def test_greedy_answers_of_vllm_are_ours_token_for_token(quickstart, answers, tmp_path):
    python = os.environ.get("RADFM_VLLM")
    if not python:
        pytest.skip("RADFM_VLLM does not name a Python with vLLM and launch/vllm")
    requests, ours = answers
    calls, out = tmp_path / "calls.json", tmp_path / "out.json"
    calls.write_text(json.dumps([{"prompt": r.prompt, "scans": list(r.scans)} for r in requests]))
    command = [python, Path(__file__).with_name("vllm_child.py"), quickstart[2], calls, out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(out.read_text()) == ours


def test_real_files_are_equal_or_refused(tmp_path):
    """What the export reads, our pipeline reads, with equal voxels. Files of pydicom and nibabel, and their folders."""
    roots = [Path(importlib.util.find_spec(name).origin).parent for name in ("pydicom.data", "data_store", "nibabel")]
    suffixes = (".dcm", ".nii", ".gz", "")
    files = [file for root in roots for file in root.rglob("*") if file.suffix in suffixes and file.is_file()]
    files = [*sorted(set(files)), *sorted({file.parent for file in files})]
    files = [file for file in files if file.is_dir() or file.stat().st_size < 2e7]
    tokenizer = Path(importlib.util.find_spec("mistral_common").origin).parent / "data" / "tokenizer.model.v1"
    calls = Calls(tmp_path / "calls")
    for name in ("float32", "header"):
        folder = export_processor(tmp_path / name, tokenizer, PREPARATIONS[name])
        for file in files:
            calls.add(folder, our_voxels([str(file)], PREPARATIONS[name]), text="What?", images=[file])
    done = calls.run()
    read = [(call, ours, theirs) for call, ours, theirs in done if not isinstance(theirs, str)]
    assert differences(read) == [] and len(read) > 50
    assert all(theirs.startswith("ValueError: ") for *_, theirs in done if isinstance(theirs, str))
