"""Convert a synthetic checkpoint to the released names and for transformers, and back; print time and peak memory.

    python tests/benchmarks/bench_convert.py --layers 40 --dtype bfloat16 --dir /scratch

The file has the released names and sizes with `--layers` LLaMA layers (40: all 13.27 billion parameters, 26.5 GB in
bfloat16). Its values are random, generated once per shape. Each direction runs in its own process, as a user would
run it, so the peak is that of the whole process. At most two copies are on disk at a time."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import table
from radfm_jax.convert.tensor_files import TensorInfo, open_tensors, write_torch_bin
from radfm_jax.models import radfm

PARAMETER = re.compile(rf"{checkpoint.PARAMS}/(llama|vit|perceiver|projection|image_marks)")  # files of arrays


def synthetic(path: Path, layers: int, dtype: str) -> int:
    """Write the file; return its number of parameters, with tied ones counted once."""
    config = radfm.radfm_14b()
    config = dataclasses.replace(config, llama=dataclasses.replace(config.llama, num_layers=layers))
    kind = np.dtype(checkpoint.DTYPES[dtype])
    infos = {e.name: TensorInfo(e.torch_shape, kind) for e in table.entries(config)}
    infos[table.EMBEDDING_ALIAS] = infos[table.EMBEDDING]
    for name, (shape, unused_dtype) in table.unused_shapes(config).items():
        infos[name] = TensorInfo(shape, kind if unused_dtype == "float32" else np.dtype(unused_dtype))
    buffers = table.buffers(config)
    infos |= {n: TensorInfo(v.shape, v.dtype) for n, v in buffers.items()}
    rng, pools = np.random.default_rng(0), {}

    def read(name: str) -> np.ndarray:
        if name in buffers:
            return buffers[name]
        info = infos[name]
        if info not in pools:
            pools.clear()
            pools[info] = rng.standard_normal(info.shape, np.float32).astype(info.dtype)
        return pools[info]

    path.with_suffix(".config.json").write_text(json.dumps({"model": config.to_dict()}))
    write_torch_bin(path, infos, read, ties={table.EMBEDDING_ALIAS: table.EMBEDDING})
    return sum(int(np.prod(i.shape)) for n, i in infos.items() if n != table.EMBEDDING_ALIAS and n not in buffers)


def digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every tensor's bytes."""
    with open_tensors(path, verify=False) as reader:
        return {n: hashlib.sha256(reader.read(n).reshape(-1).view(np.uint8)).hexdigest() for n in reader.infos}


def convert(*args: str) -> tuple[float, float, float, float]:
    """Run the command; return GB, seconds, MB/s and peak GB from its report."""
    done = subprocess.run([sys.executable, "-m", "radfm_jax.convert", *args], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    match = re.search(r"([\d.]+) GB in ([\d.]+) s \((\d+) MB/s\), peak memory ([\d.]+) GB", done.stdout)
    return tuple(map(float, match.groups()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="LLaMA layers of 317M parameters each (default: 4)")
    parser.add_argument("--dtype", choices=tuple(checkpoint.DTYPES), default="bfloat16")
    parser.add_argument(
        "--dir", type=Path, default=Path("convert_benchmark"), help="scratch folder, created and removed"
    )
    args = parser.parse_args()
    args.dir.mkdir(parents=True)
    console = Console()
    try:
        source, ours, back = args.dir / "pytorch_model.bin", args.dir / "checkpoint", args.dir / "back.bin"
        parameters = synthetic(source, args.layers, args.dtype)
        before = digests(source)
        rows = [("from-torch --unused keep", convert("from-torch", str(source), str(ours), "--unused", "keep"))]
        source.unlink()
        rows.append(("to-torch", convert("to-torch", str(ours), str(back))))
        after = digests(back)
        back.unlink()
        export, again = args.dir / "export", args.dir / "again"
        rows.append(("to-hf", convert("to-hf", str(ours), str(export))))
        shutil.rmtree(ours / checkpoint.PARAMS)  # its manifest stays
        rows.append(("from-hf", convert("from-hf", str(export), str(again))))
        title = f"{parameters:,} parameters in {args.dtype}"
        report = Table("direction", "GB", "seconds", "MB/s", "peak memory, GB", title=title)
        for name, (size, seconds, speed, peak) in rows:
            report.add_row(name, f"{size:.2f}", f"{seconds:.0f}", f"{speed:.0f}", f"{peak:.2f}")
        console.print(report)
        different = [n for n in {*before, *after} if before.get(n) != after.get(n)]
        console.print(f"tensors that differ after the round trip: {len(different)} of {len(before)} {different[:5]}")
        stored = [
            {name: x for name, x in checkpoint.read_manifest(folder).items() if PARAMETER.match(name)}
            for folder in (ours, again)
        ]
        different = [name for name in {*stored[0], *stored[1]} if stored[0].get(name) != stored[1].get(name)]
        console.print(f"parameter files that differ after to-hf and from-hf: {len(different)} of {len(stored[0])}")
    finally:
        shutil.rmtree(args.dir)


if __name__ == "__main__":
    main()
