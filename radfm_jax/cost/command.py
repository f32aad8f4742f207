"""`python -m radfm_jax.plan`: the command line."""

from __future__ import annotations

import argparse
import dataclasses
import math
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from input_pipeline import command_line, files
from input_pipeline.console import SafeConsole
from input_pipeline.field_rules import errors_of
from input_pipeline.messages import printable
from radfm_jax import terminal
from radfm_jax.cost import candidates, estimate, flops, methods, program, report
from radfm_jax.cost.topology import KNOWN, Topology, parse
from radfm_jax.runtime import faults
from radfm_jax.training.experiment import Experiment

DESCRIPTION = f"""\
Plan a run: does it fit on these devices, how long does a step take, how much does it send and cost, and which remat
policy and micro-batches are best? No accelerator is used and no array is allocated. The train step is compiled from
shapes: for TPU slices by libtpu (pip install "jax[tpu]"), for GPUs on as many simulated CPU devices, as an estimate.

topologies: {KNOWN}
"""
EPILOG = """\
examples:
  python -m radfm_jax.plan --config=configs/pretrain.py --topology v5p:4x4x2
  python -m radfm_jax.plan --config=configs/pretrain.py --topology gpu:32xA100-80GB --price 2.5 --json plan.json
  python -m radfm_jax.plan --config=configs/pretrain.py --topology v6e:4x8 --batch 64 128 256 --compile none
  python -m radfm_jax.plan --config=configs/adapt.py --topology gpu:1xRTX4090-24GB --compile none
  python -m radfm_jax.plan --config=configs/adapt.py --smallest
  python -m radfm_jax.plan --config=configs/quickstart.py --topology cpu:2 --picture plan.png

A candidate is a batch of micro-batches x rows per device. With fewer micro-batches FSDP gathers the weights less often,
but a step needs more memory. A step also needs more memory with less remat. Times are a range, from full to no overlap
of communication and arithmetic. The recommended candidate leaves a tenth of the memory free and is the fastest without
overlap.

For GPUs of one machine, a second table shows which methods fit for which row lengths: full (all parts learn), frozen
language model, LoRA, QLoRA. --smallest shows the smallest GPU, or number of them, for the config and for each method.

exit codes: 0 a plan; 1 nothing fits, or every compilation failed; 2 an error in the arguments.
"""


def main(argv: list[str] | None = None) -> int:
    parser = terminal.parser("python -m radfm_jax.plan", DESCRIPTION, EPILOG)
    command_line.add_config(parser)
    devices = parser.add_mutually_exclusive_group(required=True)
    devices.add_argument("--topology", metavar="T", help="devices, for example v5p:4x4x2")
    devices.add_argument("--smallest", action="store_true", help="find the smallest GPUs, by arithmetic only")
    parser.add_argument(
        "--batch", type=int, nargs="+", metavar="B",
        help="batch sizes in rows (default: the config's, or the next one that the devices can share)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", choices=("best", "all", "none"), default="best", dest="compile_",
        help="best: compile the best candidates until one is confirmed and, for TPUs, the plain program; all: compile "
        "every candidate; none: arithmetic only (default: %(default)s). Takes minutes each; results are cached",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="ignore cached compilations")
    parser.add_argument("--mfu", type=float, metavar="SHARE", help="MFU of a step (default: that of published runs)")
    parser.add_argument("--price", type=float, metavar="P", help="price of a device-hour, in any currency")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="plot memory and time of the candidates, as PNG")
    args, config = command_line.parse(parser, sys.argv[1:] if argv is None else argv)
    console = SafeConsole(width=None if sys.stdout.isatty() else 140)  # rich assumes 80 columns for a file
    try:
        if args.mfu is not None and not 0 < args.mfu <= 1:
            raise ValueError(f"--mfu {args.mfu}: must be above 0 and at most 1")
        if args.price is not None and not 0 <= args.price < math.inf:
            raise ValueError(f"--price {args.price}: must be at least 0")
        for path in filter(None, (args.json, args.picture)):  # fail before minutes of compilation
            if not path.parent.is_dir() or path.is_dir():
                raise ValueError(f"{path} cannot be written: it is a directory, or {path.parent} is not one")
        with errors_of(args.config):
            experiment = Experiment.from_dict(config)
        if args.smallest:
            return show_smallest(experiment, args, console)
        result = plan(experiment, parse(args.topology), args)
    except ValueError as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return faults.MISTAKE
    report.show(result, console)
    for path, write in ((args.json, report.write_json), (args.picture, report.plot)):
        if path is not None:
            write(result, path)
            console.print(f"wrote {path}", highlight=False, markup=False)
    return 0 if result.best is not None else 1


def show_smallest(config: Experiment, args: argparse.Namespace, console: SafeConsole) -> int:
    """Print the smallest GPUs for a config and for each method. Return the exit code."""
    for name in ("batch", "price", "picture"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} needs --topology")
    fits = {method: methods.smallest(config, method) for method in (methods.CONFIG, *methods.METHODS)}
    console.print(report.smallest_table(args.config, fits))
    if args.json is not None:
        smallest = {method: fit and fit.as_dict() for method, fit in fits.items()}
        files.write_json(args.json, {"config": args.config, "smallest": smallest})
        console.print(f"wrote {args.json}", highlight=False, markup=False)
    return 0 if fits[methods.CONFIG] is not None else 1


def plan(config: Experiment, topology: Topology, args: argparse.Namespace) -> report.Plan:
    """Rank the candidates of a config on a topology, and compile those that `--compile` selects."""
    mfu, mfu_source = args.mfu, "the MFU of --mfu"
    if topology.chip is not None:
        mfu = args.mfu or flops.REACHED[topology.chip.name]
        peak = estimate.amount(flops.PEAK[topology.chip.name], "FLOP/s")
        is_published = topology.chip.name in flops.PUBLISHED
        basis = "as in published runs of similar models" if is_published else "assumed: there are no published runs"
        mfu_source = f"{mfu:.0%} of {peak}, {'from --mfu' if args.mfu else basis}"
    batches = args.batch or [candidates.batch_for(config, topology)]
    ranked = candidates.candidates(config, topology, batches, mfu)
    plain = candidates.plain(config, topology, batches[0], mfu)
    compiler = make_compiler(args.again)
    best = next((c for c in ranked if c.fits), None)
    if args.compile_ == "all":
        ranked = sorted((candidates.compiled(c, compiler) for c in ranked), key=candidates.rank)
        best = next((c for c in ranked if c.fits), None)
    elif args.compile_ == "best":
        ranked, best = candidates.compile_best(ranked, compiler)
        if topology.kind == "tpu" and topology.count > 1:
            plain = candidates.compiled(plain, compiler)
    # The report shows the plain candidate once, if it is one of those ranked.
    same = [c for c in ranked if c.config.train == plain.config.train]
    plain = same[0] if same and (same[0].program or not plain.program) else plain
    path = args.config if Path(args.config).is_file() else args.config.rpartition(":")[0]  # FILE or FILE:NAME
    sizes = runpy.run_path(path).get("SIZES")
    by_method = {}
    if topology.kind == "gpu" and topology.count <= topology.chip.node:
        train = dataclasses.replace(config.train, batch=batches[0], accumulation=1)
        by_method = methods.table(dataclasses.replace(config, train=train), topology)
    return report.Plan(args.config, topology, mfu, mfu_source, ranked, best, plain, sizes, args.price, by_method)


def make_compiler(again: bool) -> Callable[[candidates.Candidate], program.Program]:
    """Return a function that compiles a candidate and logs the time to standard error."""
    console = SafeConsole(stderr=True)

    def compiler(candidate: candidates.Candidate) -> program.Program:
        config, topology = candidate.config, candidate.topology
        if not again and program.is_cached(config, topology):
            return program.compiled(config, topology)
        start, title = time.perf_counter(), f"compiling {candidate.name} for {topology.text} (one or more minutes)"
        if not console.is_terminal:  # if no bar is shown
            console.print(f"{title} ...", highlight=False, soft_wrap=True)
        columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
        with Progress(*columns, console=console, transient=True) as bar:
            bar.add_task(title)
            result = program.compiled(config, topology, again=again)
        console.print(
            f"compiled {candidate.name} for {topology.text} in {time.perf_counter() - start:.0f} s "
            f"({result.cpu_seconds:.0f} s of CPU time)",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        return result

    return compiler
