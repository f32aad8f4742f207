"""Loss head, forward and backward: logits only where a target has weight, against full logits with optax's
cross-entropy.

    python tests/benchmarks/bench_loss.py [--chunk 512 ...] [--labelled 0.1] [--width 512] [--tokens 4096]

Both sides get the same float32 hidden states, kernel, targets and weights. They return the weighted mean and its
gradients with respect to hidden states and kernel. Times are medians of alternating runs. `temporaries` is what XLA
allocates for the compiled function in addition to arguments and results. `process` is the growth of VmHWM in a
separate process during three steps."""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from rich.table import Table

from radfm_jax.training.losses import token_losses

FULL = "full logits"


def full(hidden, kernel, targets, weights):
    logits = jnp.matmul(hidden, kernel, precision=jax.lax.Precision.HIGHEST)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return (losses * weights).sum() / weights.sum()


def chunked(hidden, kernel, targets, weights, *, chunk):
    losses, _ = token_losses(hidden, kernel, targets, weights > 0, chunk=chunk)
    return (losses * weights).sum() / weights.sum()


def problem(args) -> tuple:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((1, args.tokens, args.width), np.float32)
    kernel = rng.standard_normal((args.width, args.vocab), np.float32) / np.float32(args.width) ** 0.5
    targets = rng.integers(0, args.vocab, (1, args.tokens), np.int32)
    weights = np.where(rng.random((1, args.tokens)) < args.labelled, 1, 0).astype(np.float32)
    return tuple(map(jnp.asarray, (hidden, kernel, targets, weights)))


def compiled(name: str, inputs):
    loss = full if name == FULL else functools.partial(chunked, chunk=int(name.removeprefix("chunks of ")))
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*inputs).compile()


def vm_hwm() -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM"))


def process_peak(name: str, args) -> int:
    """Run this file in a new process for one side; return the growth of its memory in bytes."""
    sizes = [f"--{k}={getattr(args, k)}" for k in ("tokens", "width", "vocab", "labelled")]
    command = [sys.executable, __file__, *sizes, "--peak-of", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--labelled", type=float, default=0.1, help="share of tokens with weight")
    parser.add_argument("--chunk", type=int, nargs="+", default=[256], help="positions per chunk")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    inputs = problem(args)
    if args.peak_of:
        step = compiled(args.peak_of, inputs)
        before = vm_hwm()
        for _ in range(3):
            jax.block_until_ready(step(*inputs))
        print(vm_hwm() - before)
        return

    names = [FULL, *(f"chunks of {c}" for c in args.chunk)]
    steps = {name: compiled(name, inputs) for name in names}
    times = {name: [] for name in names}
    results = {name: jax.block_until_ready(step(*inputs)) for name, step in steps.items()}  # warm-up
    for _ in range(args.repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step(*inputs))
            times[name].append(time.perf_counter() - start)
    temporaries = {name: step.memory_analysis().temp_size_in_bytes for name, step in steps.items()}
    peaks = {name: process_peak(name, args) for name in names}

    table = Table(
        "loss head", "ms", "times faster", "temporaries MB", "of full", "process MB", "of full", "difference",
        title=f"{int(inputs[3].sum())} of {args.tokens} tokens labelled, V={args.vocab}, E={args.width}, float32, "
        f"{jax.default_backend()}",
    )  # fmt: skip
    median = {name: statistics.median(t) for name, t in times.items()}
    for name in names:
        pairs = zip(*map(jax.tree.leaves, (results[name], results[FULL])), strict=True)
        difference = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)
        table.add_row(
            name,
            f"{median[name] * 1e3:.0f}",
            f"{median[FULL] / median[name]:.1f}",
            f"{temporaries[name] / 1e6:.0f}",
            f"{temporaries[name] / temporaries[FULL]:.2f}",
            f"{peaks[name] / 1e6:.0f}",
            f"{peaks[name] / peaks[FULL]:.2f}",
            f"{difference:.0e}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
