"""A training step with adapters against full training, at the sizes of bench_train.py, in float32.

    python tests/benchmarks/bench_lora.py [--repeats 7] [--rank 16] [--remat none]

A step has forward and backward pass and the update (AdamW). The batch has two samples of 512 tokens with a scan each,
as in `unpacked` of bench_train.py. The methods run alternately; times are medians, ratios are medians of paired ratios
to full training.
State is what the arrays of a method take: parameters and moments.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import statistics
import time

import bench_train
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from radfm_jax.checkpoints.checkpoint import flatten
from radfm_jax.models import quantised
from radfm_jax.models.lora import LoraConfig
from radfm_jax.runtime import sharding
from radfm_jax.training import train_step
from radfm_jax.training.optimizer import OptimizerConfig

METHODS = {  # adapters, base, frozen parts
    "full": (False, "float32", ()),
    "frozen": (False, "float32", ("llama",)),
    "LoRA, float32 base": (True, "float32", ("llama",)),
    "LoRA, vision encoder frozen": (True, "float32", ("llama", "vit")),
    "LoRA, bfloat16 base": (True, "bfloat16", ("llama",)),
    "LoRA, int8 base": (True, "int8", ("llama",)),
    "QLoRA (nf4 base)": (True, "nf4", ("llama",)),
}


def program(ours: bench_train.Ours, batch: dict, method: str, rank: int):
    """Return (a function that runs a step and returns its seconds, bytes of the state)."""
    adapters, base, frozen = METHODS[method]
    lora = LoraConfig(rank=rank) if adapters else None
    config = dataclasses.replace(ours.config, lora=lora, base=base)
    optimizer = OptimizerConfig(learning_rate=1e-4, warmup_steps=1, frozen=frozen)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    abstract, transform, _ = train_step.abstract_state(config, optimizer, mesh)
    leaves = flatten(quantised.quantise_params(ours.params, base) if base in ("int8", "nf4") else ours.params)
    paths = flatten(train_step.params_of(abstract))
    loaded = {path: jnp.array(leaves[path], x.dtype, copy=True) for path, x in paths.items() if path in leaves}
    state = train_step.init_state(abstract, config, optimizer, transform, 0, loaded)
    step = train_step.make_train_step(config, transform, train_step.StepConfig(chunk=ours.chunk, dropout=False))
    arrays = train_step.put_batch(batch, mesh, 1)
    rate = np.float32(1e-4)
    compiled = jax.jit(step, donate_argnums=0).lower(state, arrays, rate).compile()
    size, held = sum(x.nbytes for x in jax.tree.leaves(state)), [state]

    def run() -> float:
        start = time.perf_counter()
        held[0], metrics = compiled(held[0], arrays, rate)
        jax.block_until_ready(metrics)
        return time.perf_counter() - start

    return run, size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--remat", default="none", help="remat policy (%(default)s)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    ours = bench_train.Ours(args.remat, 256)
    batch = ours.plain(**bench_train.unpacked())
    batch = batch | {"tasks": np.minimum(batch["segments"], 1)}
    make = functools.partial(program, ours, batch, rank=args.rank)
    programs = {name: make(name) for name in args.methods}
    times: dict[str, list[float]] = {name: [] for name in programs}
    for round_number in range(args.repeats + 1):
        for name, (run, _) in programs.items():
            seconds = run()
            if round_number:
                times[name].append(seconds)
    title = f"{args.repeats} rounds, rank {args.rank}, remat {args.remat}, load {os.getloadavg()[0]:.1f}"
    table = Table("", "seconds", "of full", "state", title=title)
    for name, (_, size) in programs.items():
        ratio = statistics.median(a / b for a, b in zip(times[name], times["full"], strict=True))
        table.add_row(name, f"{statistics.median(times[name]):.2f}", f"{ratio:.2f}", f"{size / 1e6:.0f} MB")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
