"""Share of real tokens in packed rows, against one sample per row padded to its length, and the speed of planning.

    taskset -c 0 python tests/benchmarks/bench_packing.py [--samples 16384] [--tokenizer tokenizer.model]

The pipeline plans a window of a seeded mixture: tables, prompts, tokens, terms, packing. It reads no voxel, so the
index is written with made-up sizes. Scans: 1 (80 %), 2 (15 %), 3 to 6 (5 %), 70 % of them 2D, depths uniform over 4
to 64. Questions are log-normal around 25 tokens, a fifth with a context around 120; answers are around 8, a tenth of
them reports around 150. One row in five is a modality question with one of our prompts instead. Text is drawn from
the words of the project's prompts and of its list of radiology terms. The tokenizer has 32,000 pieces, by default
that of mistral-common."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib.util
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from input_pipeline.batching.load import RowLoader
from input_pipeline.batching.pipeline import Rows
from input_pipeline.batching.plan import RowLimits, plan_rows
from input_pipeline.batching.report import PackingReport
from input_pipeline.config import DataConfig
from input_pipeline.datasets import prompts
from input_pipeline.files import write_json
from input_pipeline.index import index
from input_pipeline.text import terms
from input_pipeline.text.tokenizer import Tokenizer, load_tokenizer

LIMITS = {
    "14 vision rows, 57,344 planes": {},
    "14 vision rows, 32,768 planes": {"planes": 32768},
    "10 vision rows, 24,576 planes, 40 scans": {"vision_rows": 10, "planes": 24576, "scans": 40},
    "8 vision rows, 32,768 planes, 32 scans": {"vision_rows": 8, "planes": 32768, "scans": 32},
}
MODALITIES = ("CT", "MRI", "X-ray", "Ultrasound", "Mammography")


class Writer:
    """Write text with a log-normal number of tokens."""

    def __init__(self, tokenizer: Tokenizer, rng: np.random.Generator):
        sentences = [s for group in prompts.load().values() for s in group if "{" not in s]
        words = " ".join(sentences).split() + terms.read_list(terms.HERE / "radiology_terms.txt")
        self.words, self.rng = words, rng
        self.lengths = np.array([len(tokenizer.encode(word)) for word in words])

    def __call__(self, centre: float) -> str:
        length = self.rng.lognormal(np.log(centre), 0.5)
        chosen = self.rng.integers(len(self.words), size=int(length) + 1)
        count = max(int(np.searchsorted(np.cumsum(self.lengths[chosen]), length)), 1)
        return " ".join(self.words[i] for i in chosen[:count])


def write_data(folder: Path, tokenizer: Tokenizer, samples: int, seed: int) -> dict[str, dict]:
    """Write tables with that many samples, and an index of scans that do not exist; return the sources of a config."""
    rng = np.random.default_rng(seed)
    text = Writer(tokenizer, rng)
    facts, rows = [], []

    def new_scan() -> str:
        path = f"scans/{len(facts)}.nii.gz"
        depth = 1 if rng.random() < 0.7 else int(rng.integers(4, 65))
        key = index.key_hash(path, -1, "")
        facts.append({"path": path, "key": key, "height": 512, "width": 512, "depth": depth, "channels": 1})
        return path

    with open(folder / "vqa.jsonl", "w") as vqa, open(folder / "modality.csv", "w", newline="") as modality:
        table = csv.writer(modality)
        table.writerow(["image_path", "answer"])
        counts = {"vqa": 0, "modality": 0}
        for i in range(samples):
            if rng.random() < 0.2:
                table.writerow([new_scan(), MODALITIES[int(rng.integers(len(MODALITIES)))]])
                counts["modality"] += 1
                continue
            scans = [new_scan() for _ in range(int(rng.choice(6, p=[0.8, 0.15, *[0.0125] * 4])) + 1)]
            marks = "".join(f"<image-{k + 1}>" for k in range(len(scans)))
            line = {"id": str(i), "task": "vqa", "scans": scans, "instruction": f"{marks} {text(25)}?"}
            line["response"] = text(150 if rng.random() < 0.1 else 8) + "."
            if rng.random() < 0.2:
                line["context"] = text(120) + "."
            vqa.write(json.dumps(line) + "\n")
            counts["vqa"] += 1
    sources = {
        "vqa": {"family": "jsonl", "table": "vqa.jsonl", "root": str(folder)},
        "modality": {"family": "rad3d_modality", "table": "modality.csv", "root": str(folder)},
    }
    for name, count in counts.items():
        rows += [{"source": name, "row": i, "row_id": str(i), "state": "good"} for i in range(count)]
    fill = lambda lines, schema: pa.Table.from_pylist(  # noqa: E731
        [{f.name: line.get(f.name) for f in schema} for line in lines], schema=schema
    )
    common = {"root": str(folder), "volume": -1, "window": "", "fault": "", "record": -1, "bytes": 0}
    pq.write_table(fill([common | fact for fact in facts], index.SCANS), folder / "scans.parquet")
    pq.write_table(fill(rows, index.ROWS), folder / "rows.parquet")
    described = {
        name: {
            "family": fields["family"],
            "fields": fields,
            "root": str(folder),
            "rows": counts[name],
            "sha256": index.table_checksum(folder / fields["table"]),
        }
        for name, fields in sources.items()
    }
    description = {"version": index.VERSION, "sources": described, "identity": "sizes made up for a benchmark"}
    write_json(folder / "index.json", index.sealed(folder, description))
    return sources


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", help="a SentencePiece model (default: that of mistral-common)")
    args = parser.parse_args()
    if args.tokenizer is None:
        spec = importlib.util.find_spec("mistral_common")
        if spec is None:
            parser.error("mistral-common is not installed: pass a SentencePiece model with --tokenizer")
        args.tokenizer = str(Path(spec.origin).parent / "data" / "tokenizer.model.v1")
    with tempfile.TemporaryDirectory() as folder:
        sources = write_data(Path(folder), load_tokenizer(args.tokenizer), args.samples, args.seed)
        config = DataConfig(
            train=sources, index=folder, tokenizer=args.tokenizer, workers=0, window=args.samples, seed=args.seed
        )
        filling = Table(
            "rows of 2,048 tokens with", "real tokens", "rows", "fewer rows", "samples per row", title="packing"
        )
        for what, limits in LIMITS.items():
            filling.add_row(what, *fill_rows(dataclasses.replace(config, **limits)))
        Console(width=120).print(filling)
        Console(width=120).print(speeds(config, args.repeats))


def fill_rows(config: DataConfig) -> list[str]:
    with Rows(config, batch=1) as rows:
        planned = rows.plan(0, 0)
        samples = len(rows.mixture)
    report = PackingReport(config.text_length, rows=len(planned), samples=samples)
    report.tokens = sum(row.tokens for row in planned)
    share = report.as_dict()
    return [
        f"{share['real tokens']:.1%}",
        f"{len(planned):,}",
        f"{samples / len(planned):.1f}x",
        f"{share['samples per row']:.1f}",
    ]


def speeds(config: DataConfig, repeats: int) -> Table:
    """Return a table of samples per second of CPU time (medians)."""
    loader = RowLoader(config, "train", training=True)
    numbers = np.arange(int(loader.starts[-1]))
    measuring, packing, planner = [], [], []
    limits: RowLimits = config.limits
    for epoch in range(repeats):
        start = time.process_time()
        measured = loader.measure(epoch, numbers)
        middle = time.process_time()
        loader.plan(numbers, [measured], (0, epoch))
        end = time.process_time()
        ends = np.cumsum(measured.counts)
        of_sample = [tuple(range(end - n, end)) for end, n in zip(ends, measured.counts, strict=True)]
        before = time.process_time()
        plan_rows(measured.tokens.tolist(), of_sample, measured.patches, measured.planes, limits)
        planner.append(len(numbers) / (time.process_time() - before))
        measuring.append(len(numbers) / (middle - start))
        packing.append(len(numbers) / (end - start))
    table = Table("samples/s on one core", "median", "goal", title="planning")
    table.add_row("prompts, tokens, medical terms", f"{np.median(measuring):,.0f}", "")
    table.add_row("planning a window, all included", f"{np.median(packing):,.0f}", "2,000")
    table.add_row("packing alone", f"{np.median(planner):,.0f}", "20,000")
    return table


if __name__ == "__main__":
    main()
