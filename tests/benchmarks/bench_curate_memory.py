"""Peak memory of the curation tools and of `prepare` with N and 10 N generated items: does it grow with them?

    PYTHONPATH=. python tests/benchmarks/bench_curate_memory.py [TOOL ...]

Every run is a separate process that reads its own VmHWM at the end. Rows hold about 3 kB of text each, so a table
kept in memory would show. `findings` is the part of `prepare` after reading scans, with more items than a disk holds
scans. Linux only."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from input_pipeline import phantoms
from tests.chat_server import FailingServer

CHILD = """
import sys
if sys.argv[1] == "prepare":
    from input_pipeline.index.command import main
    code = main(sys.argv[2:])
elif sys.argv[1] == "findings":
    sys.path.insert(0, "tests")
    from test_prepare_results import Path, process
    code = int(not process(Path(sys.argv[2]), int(sys.argv[3]))["leaks"])
else:
    from input_pipeline.curate.__main__ import main
    code = main(sys.argv[1:])
print("peak", next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), code)
"""
SIZES = {"rad3d": 200, "mpx": 200, "diagnosis": 10_000, "radmd": 500, "radmd (balance)": 5000, "splits": 1000,
         "splits --near": 200, "statistics": 200, "pmc-casereport": 100, "vqa": 400, "prepare": 2000,
         "findings": 100_000}  # fmt: skip


def text(k: int, words: int = 500) -> str:
    """Return about 3 kB of text that no other row has."""
    rng = np.random.default_rng(k)
    return f"Finding {k} on the CT: " + " ".join(f"word{n}" for n in rng.integers(0, 100, words))


def picture(file: Path, k: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(k).integers(0, 255, (6, 6)).astype(np.uint8)
    Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC).save(file)


def table(file: Path, header, rows) -> None:
    with open(file, "w", newline="") as out:
        lines = csv.writer(out)
        lines.writerow(header)
        lines.writerows(rows)


def source(root: Path) -> str:
    return json.dumps({"own": {"family": "jsonl", "root": str(root), "table": "train.jsonl"}})


def make(tool: str, root: Path, n: int) -> list[str]:
    """Write n items; return the options of the command."""
    if tool in ("rad3d", "mpx"):
        for k in range(n):
            picture(root / "cases" / f"{k:06d}" / "a.png", k)
            said = {"findings": text(k), "discussion": text(k + n), "title": f"Cyst {k}", "features": [text(k + 2 * n)],
                    "scans": [{"path": "a.png", "modality": "CT", "caption": text(k)}]}  # fmt: skip
            (root / "cases" / f"{k:06d}" / "case.json").write_text(json.dumps(said))
        return [str(root / "cases"), "--workers", "0"]
    if tool == "diagnosis":
        (root / "NIH").mkdir()
        labels = ("No Finding", "Mass", "Nodule", "Mass|Nodule", "Edema")
        table(root / "NIH" / "Data_Entry_2017.csv", ("Image Index", "Finding Labels", "Patient ID"),
              ((f"{k:08d}.png", labels[k % 5], k // 3) for k in range(n)))  # fmt: skip
        return ["--root", str(root), "chestxray14=NIH"]
    if tool == "radmd":
        table(root / "case.csv", ("PMC_id", "img_ref", "context", "question", "answer"),
              ((f"PMC{k}", "['F1']", text(k), "Q: What is seen?", f"A: Lesion {k}") for k in range(n)))  # fmt: skip
        with open(root / "captions.jsonl", "w") as out:
            for k in range(n):
                out.write(json.dumps({"paper": f"PMC{k}", "pictures": ["F1"], "caption": text(k, 20)}) + "\n")
        return ["--root", str(root), "--captions", str(root / "captions.jsonl"), "pmc_casereport=case.csv"]
    if tool == "radmd (balance)":
        table(root / "open.csv", ("image_path", "label"),
              ((f"images/of/a/set/{k:08d}.png", "Edema" if k % 3 else "No finding") for k in range(n)))  # fmt: skip
        return ["--root", str(root), "cxr_mix=open.csv"]
    if tool == "findings":
        return [str(root), str(n)]
    if tool == "prepare":
        phantoms.write(root / "practice", train=8, test=0, size=64, workers=0)
        with open(root / "train.jsonl", "w") as out:
            for k in range(n):
                picture(root / f"study{k:08d}" / "image.png", k)
                row = {"id": f"row{k:08d}", "task": "vqa", "study": f"s{k}", "scans": [f"study{k:08d}/image.png"]}
                row |= {"instruction": f"<image-1> What is seen in {k}?", "response": f"Lesion {k}."}
                out.write(json.dumps(row) + "\n")
        return ["--config=configs/quickstart.py", f"--config.data.train={source(root)}", "--config.data.test={}",
                f"--config.data.tokenizer={root}/practice/tokenizer.model", "--workers", "0"]  # fmt: skip
    if tool in ("splits", "splits --near", "statistics"):
        for k in range(n if tool != "splits" else 0):
            picture(root / f"{k}.png", k)
        table(root / "vqa.csv", ("img_root_dir", "Figure_path", "Question", "Answer"),
              (("", f"{k}.png", f"What is seen in {k}?", text(k)) for k in range(n)))  # fmt: skip
        return ["--root", str(root), "vqa_rad=vqa.csv", *tool.split()[1:]]
    if tool == "vqa":
        (root / "caption.json").write_text(
            json.dumps([{"npy_path": f"{k}.nii.gz", "finding": text(k), "impression": text(k + n)} for k in range(n)])
        )
        return [str(root / "caption.json")]
    with open(root / "cases.jsonl", "w") as out:
        for k in range(n):
            told = [{"text": text(k), "section": "Case", "img_ref": []}]
            told += [{"text": f"The CT of {k} shows it.", "section": "Case", "img_ref": ["F1"]}]
            out.write(json.dumps({"paper": f"PMC{k}", "sentences": told, "captions": {"F1": text(k)}}) + "\n")
    return [str(root / "cases.jsonl")]


def peak(tool: str, n: int, url: str) -> float:
    """Return the peak memory in MB of a process that runs the tool on n items."""
    with tempfile.TemporaryDirectory() as folder:
        (root := Path(folder) / "in").mkdir()
        options = [tool.split()[0], *make(tool, root, n)]
        if tool != "findings":
            options += ["--out", str(Path(folder) / "out")]
        if tool in ("pmc-casereport", "vqa"):
            options += ["--model", "m", "--base-url", url, "--key-variable", "", "--concurrency", "8"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, "-c", CHILD, *options], capture_output=True, text=True, env=environment)
        said = [line.split() for line in done.stdout.splitlines() if line.startswith("peak")]
        if done.returncode or not said or said[-1][2] != "0":
            raise SystemExit(f"{tool} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
        return int(said[-1][1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tools", nargs="*", metavar="TOOL", choices=[[], *SIZES], help=", ".join(SIZES))
    tools = parser.parse_args().tools or SIZES
    print(f"{'tool':<18}{'N':>8}{'MB at N':>10}{'MB at 10 N':>12}{'kB an item':>12}", flush=True)
    with FailingServer() as server:
        for tool in tools:
            n = SIZES[tool]
            small, large = peak(tool, n, server.url), peak(tool, 10 * n, server.url)
            print(f"{tool:<18}{n:>8,}{small:>10.1f}{large:>12.1f}{(large - small) * 1024 / (9 * n):>12.2f}", flush=True)


if __name__ == "__main__":
    main()
