"""Training step against a PyTorch RadFM of the same sizes and weights, in float32: time, packing, memory, vision.

    python tests/benchmarks/bench_train.py [--only unpacked packed vision memory] [--remat dots] [--chunk 256]

Forward and backward, no optimizer, no dropout. LLaMA with 8 layers, 512 wide, 32,000 words; vision 192 wide, 12 + 6
layers. Ours uses the remat policy `--remat`, and logits of `--chunk` positions at a time. Both sides use the same
threads and run alternately; times are medians, ratios are medians of paired ratios. On one core (taskset -c 0) the
times are CPU time, which other load changes less.

unpacked  2 samples of 512 tokens with a colour scan of 512 x 512 x 4 each; both sides compute the same numbers,
          and their losses must agree
packed    VQA-like samples (scans 1: 80 %, 2: 15 %, 3 to 6: 5 %; 70 % of them 2D; questions log-normal around 25
          tokens, a fifth with a context around 120; answers around 8, a tenth of them around 150), as many as fill a
          row of 2,048 tokens. Ours: that row. PyTorch: each sample alone, padded to 2,048, as in the original;
          `--timed` of them, since each costs almost the same
vision    ViT and perceiver alone, on the unpacked batch
memory    peak (VmHWM) of a process that builds the model, compiles and runs three unpacked steps
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

PARTS = ("unpacked", "packed", "vision", "memory")
ROW = 2048


def sizes():
    import golden

    return golden.Sizes(vocab=32000, hidden=512, inter=1376, layers=8, heads=8, vis_dim=192)


def unpacked() -> dict[str, np.ndarray]:
    """Return ids, vision and labels in the released layout."""
    rng = np.random.default_rng(9000)
    ids = rng.integers(3, 32000, (2, 512))
    ids[:, 0] = 1
    ids[:, 1:35] = [32000, *range(32002, 32034), 32001]
    vision = np.random.default_rng(9001).random((2, 1, 3, 512, 512, 4), np.float32)
    return {"ids": ids, "vision": vision, "labels": np.where(np.arange(512) < 256, -100, ids)}


def vqa_like(seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Return samples in the released layout, as many as fit one row."""
    rng = np.random.default_rng(seed)
    count = lambda centre: int(rng.lognormal(np.log(centre), 0.5)) + 1  # noqa: E731
    samples, used = [], 0
    while True:
        scans = int(rng.choice(6, p=[0.8, 0.15, *[0.0125] * 4])) + 1
        # The original resizes the scans of a sample to one shape.
        shape = (512, 512, 1) if rng.random() < 0.7 else (256, 256, 4 * int(rng.integers(1, 17)))
        question = count(25) + (count(120) if rng.random() < 0.2 else 0)
        answer = count(150 if rng.random() < 0.1 else 8)
        images = [[32000, *range(32002 + 32 * s, 32034 + 32 * s), 32001] for s in range(scans)]
        ids = np.array([1, *sum(images, []), *rng.integers(3, 32000, question + answer), 2])
        if used + len(ids) > ROW:
            return samples
        used += len(ids)
        voxels = rng.integers(0, 256, (scans, *shape), np.uint8)
        labels = np.where(np.arange(len(ids)) < len(ids) - answer - 1, -100, ids)
        samples.append({"ids": ids, "voxels": voxels, "labels": labels})


class Torch:
    def __init__(self):
        import torch
        import torch_radfm

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        self.torch, self.radfm = torch, torch_radfm
        self.model = torch_radfm.build(sizes(), "bench:").train()

    def step(self, ids, vision, labels, mask=None) -> float:
        t = self.torch
        self.model.zero_grad(set_to_none=True)
        ids, labels = t.from_numpy(ids), t.from_numpy(labels)
        logits = self.model(ids, t.from_numpy(vision), None if mask is None else t.from_numpy(mask))["logits"]
        loss, *_ = self.radfm.losses(logits, labels, (labels != -100).float())
        loss.backward()
        return loss.item()

    def padded(self, sample) -> float:
        """Run one sample padded to 2,048 tokens; scans have three float channels, and a 2D scan has four slices."""
        n = len(sample["ids"])
        fill = lambda x, value: np.concatenate([x, np.full(ROW - n, value)])[None]  # noqa: E731
        vision = sample["voxels"].astype(np.float32) / np.float32(255)
        vision = np.repeat(vision, 4, axis=3) if vision.shape[3] == 1 else vision
        vision = np.ascontiguousarray(np.broadcast_to(vision[None, :, None], (1, len(vision), 3, *vision.shape[1:])))
        mask = (np.arange(ROW) < n)[None].astype(np.int64)
        return self.step(fill(sample["ids"], 0), vision, fill(sample["labels"], -100), mask)

    def vision(self, vision) -> None:
        self.model.zero_grad(set_to_none=True)
        self.model.embedding_layer.see(self.torch.from_numpy(vision))["perceiver"].square().sum().backward()


class Ours:
    def __init__(self, remat: str, chunk: int):
        import jax
        import parity

        self.jax = jax
        self.config, self.chunk = parity.config_of(sizes(), remat=remat), chunk
        self.params = jax.tree.map(jax.numpy.asarray, parity.recipe_params(self.config, "bench:"))
        self.targets_of = parity.targets_of

    def step(self, batch: dict) -> Callable[[], float]:
        """Return the compiled step for a batch."""
        from radfm_jax.models.radfm import RadFM
        from radfm_jax.training.losses import radfm_loss

        def loss(params, batch):
            total, weight, _ = radfm_loss(RadFM(self.config), params, batch, chunk=self.chunk)
            return total / weight

        return self._compiled(self.jax.value_and_grad(loss), batch)

    def _compiled(self, function, batch) -> Callable[[], float]:
        from radfm_jax.runtime import host_memory

        batch = self.jax.tree.map(self.jax.numpy.asarray, batch)
        program = self.jax.jit(function).lower(self.params, batch).compile()
        host_memory.release()  # as a training run does
        return lambda: float(self.jax.block_until_ready(program(self.params, batch))[0])

    def plain(self, ids, vision, labels) -> dict:
        from radfm_jax.inference.plain_rows import plain_rows

        targets, weights = self.targets_of(labels)
        return plain_rows(ids, vision, vocab_size=32000) | {"targets": targets, "weights": weights}

    def row(self, samples) -> dict:
        """Pack the samples into one row."""
        from input_pipeline.batching.collate import LoadedRow, ScanPlanes, collate_batch, collate_row
        from input_pipeline.batching.plan import RowLimits, plan_rows
        from input_pipeline.images.planes import Volume
        from input_pipeline.text.tokens import Encoded

        scans, encoded, scan_ids = {}, [], []
        for sample in samples:
            mine = range(len(scans), len(scans) + len(sample["voxels"]))
            for number, voxels in zip(mine, sample["voxels"], strict=True):
                scans[number] = ScanPlanes.of(Volume(voxels[..., None], 1 / 255))
            ids, (targets, weights) = sample["ids"], self.targets_of(sample["labels"][None])
            latent = ids - 32002
            visual = np.where(latent[:, None] >= 0, np.stack([latent // 32, latent % 32], 1), -1)
            text = np.where(latent >= 0, 0, ids).astype(np.int32)
            encoded.append(Encoded(text, targets[0], weights[0], visual.astype(np.int32), np.ones(len(ids), bool), ()))
            scan_ids.append(tuple(mine))
        patches, cuts = ([len(getattr(s, name)) for s in scans.values()] for name in ("plane_index", "planes"))
        # One more vision row than the scans need: real rows have unused room as well.
        limits = RowLimits(ROW, -(-sum(patches) // 1024) + 1, 1024, sum(cuts), len(scans))
        lengths = [len(e.ids) for e in encoded]
        (row,) = plan_rows(lengths, scan_ids, patches, cuts, limits)
        of_slot = {
            slot: scans[scan]
            for i, slots in zip(row.samples, row.slots, strict=True)
            for slot, scan in zip(slots, scan_ids[i], strict=True)
        }
        loaded = LoadedRow([encoded[i] for i in row.samples], row.slots, dict(enumerate(row.vision_rows)), of_slot)
        return collate_batch([(collate_row(loaded, limits, channels=1), None)], limits.planes).arrays

    def vision(self, batch: dict) -> Callable[[], float]:
        from radfm_jax.models.perceiver import Perceiver
        from radfm_jax.models.vit3d import ViT3D

        def loss(params, batch):
            names = ("planes", "plane_index", "patch_segments", "patch_positions", "scan_scale", "scan_offset")
            tokens = ViT3D(self.config.vision).apply({"params": params["vit"]}, *(batch[n] for n in names))
            seen = Perceiver(self.config.perceiver).apply(
                {"params": params["perceiver"]}, tokens, batch["patch_segments"], batch["scan_rows"]
            )
            return self.jax.numpy.square(seen).sum()

        return self._compiled(self.jax.value_and_grad(loss), batch)


def paired(ours: Callable, theirs: Callable, repeats: int) -> tuple[float, float, float]:
    """Return median seconds of both sides and the median of the paired ratios."""
    clock = time.process_time if len(os.sched_getaffinity(0)) == 1 else time.perf_counter
    ours(), theirs()
    times = []
    for _ in range(repeats):
        marks = [clock()]
        for side in (ours, theirs):
            side()
            marks.append(clock())
        times.append((marks[1] - marks[0], marks[2] - marks[1]))
    return *(statistics.median(x) for x in zip(*times, strict=True)), statistics.median(b / a for a, b in times)


def peak(side: str, remat: str, chunk: int) -> int:
    """Run this file in a new process for one side; return its peak memory in bytes.

    For both sides, malloc returns freed blocks of more than 1 MB. Otherwise freed arrays of the previous step count as
    well, depending on the order of allocations.
    """
    command = [sys.executable, __file__, "--peak-of", side, "--remat", remat, "--chunk", str(chunk)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "1000000"}
    return int(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout.split()[-1]
    )


def run_peak(side: str, remat: str, chunk: int) -> None:
    if side == "ours":
        ours = Ours(remat, chunk)
        step = ours.step(ours.plain(**unpacked()))
    else:
        theirs, batch = Torch(), unpacked()
        step = lambda: theirs.step(**batch)  # noqa: E731
    for _ in range(3):
        step()
    with open("/proc/self/status") as status:
        print(next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--timed", type=int, default=4, help="padded samples that PyTorch is timed on (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--remat", default="dots", help="remat policy of ours (%(default)s)")
    parser.add_argument("--chunk", type=int, default=256, help="positions with logits at a time (%(default)s)")
    parser.add_argument("--peak-of", choices=("ours", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        run_peak(args.peak_of, args.remat, args.chunk)
        return
    table = Table(
        "",
        "ours",
        "PyTorch",
        "ratio",
        title=f"{args.repeats} rounds, remat {args.remat}, load {os.getloadavg()[0]:.1f}",
    )
    if "memory" in args.only:
        mine, other = (peak(side, args.remat, args.chunk) for side in ("ours", "torch"))
        shown = f"{mine / 1e9:.2f} GB", f"{other / 1e9:.2f} GB", f"{mine / other:.2f}x"
        table.add_row("peak of the unpacked step", *shown)
    if args.only == ["memory"]:
        Console(width=120).print(table)
        return
    ours, theirs, batch = Ours(args.remat, args.chunk), Torch(), unpacked()
    if "unpacked" in args.only:
        step = ours.step(ours.plain(**batch))
        losses = step(), theirs.step(**batch)
        if abs(losses[0] - losses[1]) > 1e-4 * losses[1]:
            raise SystemExit(f"the losses differ: {losses}")
        a, b, ratio = paired(step, lambda: theirs.step(**batch), args.repeats)
        table.add_row("unpacked, samples/s", f"{2 / a:.2f}", f"{2 / b:.2f}", f"{ratio:.2f}x")
    if "packed" in args.only:
        samples = vqa_like()
        few = samples[: args.timed]
        row = ours.step(ours.row(samples))
        a, b, ratio = paired(row, lambda: [theirs.padded(x) for x in few], args.repeats)
        n, scale = len(samples), len(samples) / len(few)
        shown = f"{n / a:.2f}", f"{len(few) / b:.3f}", f"{ratio * scale:.1f}x"
        table.add_row(f"VQA-like, {n} samples in a row, samples/s", *shown)
    if "vision" in args.only:
        see = ours.vision(ours.plain(**batch))
        a, b, ratio = paired(see, lambda: theirs.vision(batch["vision"]), args.repeats)
        table.add_row("ViT and perceiver, steps/s", f"{1 / a:.2f}", f"{1 / b:.2f}", f"{ratio:.2f}x")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
