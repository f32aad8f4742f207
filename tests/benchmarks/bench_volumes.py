"""Scan files to model-ready planes, against the steps of the released code. One core; read the ratios.

    taskset -c 0 python tests/benchmarks/bench_volumes.py --repeats 7

Volumes: an int16 CT of 512 x 512 x 200 with noise of 12 HU inside the body, drawn from a seed, and the same mapped to
0..255, as in Rad3D. The released steps, each with the fastest library of its kind: SimpleITK reads; torch
interpolates to the size of the stack (512 x 512 x 64) in float32; three equal channels; min-max in numpy over all of
them; nearest neighbour to the stack and then to 256 x 256 x 64. Ours: `scans.read` with all its checks,
`prepare_volume`, `planes`; and a prepared uint8 record read and cut. Images: the released steps are Pillow's decoder,
RGB, bicubic resize, float tensor, nearest neighbour to four slices, and again in the collator. Ours: `scans.read`,
`prepare_volume`, `planes`.

Both sides run alternately on the same files with one thread each, in CPU time; a ratio is the median of the paired
ratios. Needs SimpleITK and torch (requirements-test.txt)."""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from input_pipeline.images import scans
from input_pipeline.images.planes import Volume, planes
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.index import records

DEPTH = 64


def phantom(shape, seed: int) -> np.ndarray:
    """Return float32[H, W, D] in Hounsfield units: a body of smooth tissue with noise, in air."""
    rng = np.random.default_rng(seed)
    y, x, z = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    y, x, z = y[:, None, None], x[None, :, None], z[None, None, :]
    body = (x**2 / 0.8 + y**2 / 0.5 < 1) & (z < 2)
    tissue = 40 + 60 * np.sin(9 * x) * np.cos(7 * y) + 20 * z + 12 * rng.standard_normal(shape, np.float32)
    return np.where(body, tissue, -1000).astype(np.float32)


def to_bytes(hu: np.ndarray) -> np.ndarray:
    return np.clip((hu + 1000) * (255 / 1400), 0, 255).astype(np.uint8)


def ours_from_file(path: Path):
    voxels, header = scans.read(path)
    return planes(prepare_volume(voxels, padding=header.padding, value_range=header.value_range))


def ours_from_record(path: Path):
    """Read the first record of a directory as training does: opened once per process."""
    return planes(_records(path)[0])


@functools.cache
def _records(path: Path) -> records.Records:
    return records.Records(path)


def write_record(directory: Path, volume: Volume) -> None:
    writer = records.Writer(directory, [])
    writer.add(records.serialize(volume, "0" * 64))
    writer.commit()
    records.write_description(directory, writer.lengths, "one volume")


def nearest(x: torch.Tensor, size) -> torch.Tensor:
    return torch.nn.functional.interpolate(x, size)


def released_volume(path: Path) -> torch.Tensor:
    array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).astype(np.float32)
    x = torch.from_numpy(array)[None, None]  # [1, 1, D, H, W]
    x = torch.nn.functional.interpolate(x, (DEPTH, 512, 512), mode="trilinear")[0, 0]
    image = np.repeat(x.permute(1, 2, 0).numpy()[None], 3, axis=0)  # [3, H, W, D]
    image = (image - image.min()) / (image.max() - image.min())
    stack = nearest(torch.from_numpy(image)[None], (512, 512, DEPTH))
    return nearest(stack, (256, 256, DEPTH))


def released_picture(path: Path) -> torch.Tensor:
    image = Image.open(path).convert("RGB").resize((512, 512), Image.Resampling.BICUBIC)
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    stack = nearest(x[None, ..., None], (512, 512, 4))
    return nearest(stack, (512, 512, 4))  # the collator resizes again, even to the same size


def measure(ours: Callable, theirs: Callable, repeats: int) -> tuple[float, float, float]:
    """Return median CPU seconds of each side and the median of the paired ratios, after one unmeasured round."""
    pairs = []
    for _ in range(repeats + 1):
        pair = []
        for side in (ours, theirs):
            start = time.process_time()
            side()
            pair.append(time.process_time() - start)
        pairs.append(pair)
    a, b = zip(*pairs[1:], strict=True)
    return statistics.median(a), statistics.median(b), statistics.median(y / x for x, y in zip(a, b, strict=True))


def write_inputs(folder: Path) -> dict[str, Path]:
    hu = phantom((512, 512, 200), seed=1)
    files = {n: folder / n for n in ("ct.nii.gz", "bytes.nii.gz", "gray.png", "gray.jpg", "colour.jpg", "records")}
    nibabel.save(nibabel.Nifti1Image(hu.astype(np.int16), np.eye(4)), files["ct.nii.gz"])
    nibabel.save(nibabel.Nifti1Image(to_bytes(hu), np.eye(4)), files["bytes.nii.gz"])
    write_record(files["records"], prepare_volume(scans.read(files["ct.nii.gz"])[0]))
    film = to_bytes(phantom((1200, 1000, 1), seed=2))[..., 0]
    Image.fromarray(film).save(files["gray.png"])
    Image.fromarray(film).save(files["gray.jpg"], quality=95)
    figure = np.stack([film, film[::-1], film[:, ::-1]], -1)[:700, :900]
    Image.fromarray(np.ascontiguousarray(figure)).save(files["colour.jpg"], quality=95)
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        files = write_inputs(Path(folder))
        volume, picture, n = released_volume, released_picture, repeats
        cases = [
            ("CT int16 .nii.gz -> uint8 planes", ours_from_file, volume, "ct.nii.gz", "ct.nii.gz", n, "5x (6x)"),
            ("8-bit .nii.gz -> uint8 planes", ours_from_file, volume, "bytes.nii.gz", "bytes.nii.gz", n, "5x (6x)"),
            ("prepared uint8 -> planes", ours_from_record, volume, "records", "ct.nii.gz", n, "100x (300x)"),
            ("gray PNG 1200 x 1000", ours_from_file, picture, "gray.png", "gray.png", 3 * n, "3x (4x)"),
            ("gray JPEG 1200 x 1000", ours_from_file, picture, "gray.jpg", "gray.jpg", 3 * n, "3x (4x)"),
            ("colour JPEG 700 x 900", ours_from_file, picture, "colour.jpg", "colour.jpg", 3 * n, "3x (4x)"),
        ]
        table = Table("input", "ours ms", "released ms", "ratio", "goal (aim)", "bytes to the device")
        for name, ours, theirs, mine, other, times, goal in cases:
            a, b, ratio = measure(lambda f=ours, p=files[mine]: f(p), lambda f=theirs, p=files[other]: f(p), times)
            sent, index = ours(files[mine])
            full = theirs(files[other]).nbytes
            size = f"{full / sent.nbytes:.0f}x fewer ({full / (sent.nbytes + index.nbytes):.0f}x with plane_index)"
            table.add_row(name, f"{1e3 * a:.1f}", f"{1e3 * b:.1f}", f"{ratio:.1f}x", goal, size)
        Console(width=150).print(table)


if __name__ == "__main__":
    main()
