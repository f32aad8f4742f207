"""`python -m radfm_jax.plan`: the command."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from input_pipeline import command_line
from radfm_jax.cost import estimate, flops, ladder, program, show
from radfm_jax.cost.topology import KNOWN, Topology, parse
from radfm_jax.runtime import faults
from radfm_jax.training.experiment import Experiment

DESCRIPTION = f"""\
Does a run fit on these devices, how long does it take, what does it send and cost, and with which remat policy and
micro-batches? No accelerator is touched and no array is made: the train step itself is compiled from shapes, for TPU
slices by libtpu (pip install "jax[tpu]"), for GPUs on as many simulated devices, which is an estimate.

topologies: {KNOWN}
"""
EPILOG = """\
examples:
  python -m radfm_jax.plan --config=configs/pretrain.py --topology v5p:4x4x2
  python -m radfm_jax.plan --config=configs/pretrain.py --topology gpu:32xA100-80GB --price 2.5 --json plan.json
  python -m radfm_jax.plan --config=configs/pretrain.py --topology v6e:4x8 --batch 64 128 256 --compile none
  python -m radfm_jax.plan --config=configs/quickstart.py --topology cpu:2 --picture plan.png

A rung is batch = micro-batches x rows a device in each. Fewer micro-batches gather the weights less often (FSDP), and
need more memory; so does less remat. Times are a range: all that is sent hidden behind the arithmetic, to nothing
hidden. Taken is what fits with a tenth of the memory free and is quickest with nothing hidden.

exit codes: 0 a plan; 1 nothing fits, or the compiler refused whatever was tried; 2 a mistake in the arguments.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m radfm_jax.plan",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_config(parser)
    parser.add_argument("--topology", required=True, metavar="T", help="which devices, for example v5p:4x4x2")
    parser.add_argument(
        "--batch", type=int, nargs="+", metavar="B",
        help="rows of a step to consider (default: the config's, or the next that the devices can share)",
    )  # fmt: skip
    parser.add_argument(
        "--compile", choices=("best", "all", "none"), default="best", dest="compile_",
        help="best: the best rungs until one is confirmed, and for TPUs the plain program; all: every rung; none: "
        "arithmetic only (default %(default)s). Minutes each, and kept for the next time",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="compile anew what is kept")
    parser.add_argument(
        "--mfu", type=float, metavar="SHARE", help="of the peak that a step reaches (default: published)"
    )
    parser.add_argument("--price", type=float, metavar="P", help="of a device-hour, in any currency")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, as JSON")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="memory and time of the rungs, as PNG")
    args, config = command_line.parse(parser, sys.argv[1:] if argv is None else argv)
    console = Console(width=None if sys.stdout.isatty() else 140)  # a file is no narrow terminal
    try:
        if args.mfu is not None and not 0 < args.mfu <= 1:
            raise ValueError(f"--mfu {args.mfu}: a share above 0 and not above 1 is needed")
        if args.price is not None and not 0 <= args.price < math.inf:
            raise ValueError(f"--price {args.price}: 0 or more is needed")
        for path in filter(None, (args.json, args.picture)):  # before the minutes that a compiler takes
            if not path.parent.is_dir() or path.is_dir():
                raise ValueError(f"{path} cannot be written: {path.parent} is no directory, or {path.name} is one")
        made = plan(Experiment.from_dict(config), parse(args.topology), args, sizes(args.config))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return faults.MISTAKE
    show.show(made, console)
    for path, write in ((args.json, show.write_json), (args.picture, show.picture)):
        if path is not None:
            write(made, path)
            console.print(f"wrote {path}", highlight=False, markup=False)
    return 0 if made.best is not None else 1


def plan(
    config: Experiment, topology: Topology, args: argparse.Namespace, sources: Mapping[str, estimate.Source] | None
) -> show.Plan:
    """The ladder of a config on a topology, compiled as far as was asked for. Raises ValueError for mistakes."""
    mfu, said = args.mfu, "the MFU that was given"
    if topology.chip is not None:
        mfu = args.mfu or flops.REACHED[topology.chip.name]
        peak = estimate.amount(flops.PEAK[topology.chip.name], "FLOP/s")
        said = f"{mfu:.0%} of {peak}, " + (
            "as given" if args.mfu else "which published runs of this kind of model reach"
        )
    batches = args.batch or [ladder.batch_for(config, topology)]
    rungs = ladder.ladder(config, topology, batches, mfu)
    plain = ladder.plain(config, topology, batches[0], mfu)
    compile_ = compiler(args.again)
    best = next((rung for rung in rungs if rung.fits), None)
    if args.compile_ == "all":
        rungs = sorted((ladder.told(rung, compile_) for rung in rungs), key=ladder.order)
        best = next((rung for rung in rungs if rung.fits), None)
    elif args.compile_ == "best":
        rungs, best = ladder.asked(rungs, compile_)
        if topology.kind == "tpu" and topology.count > 1:
            plain = ladder.told(plain, compile_)
    same = [r for r in rungs if r.config.train == plain.config.train]
    plain = same[0] if same and (same[0].program or not plain.program) else plain
    return show.Plan(args.config, topology, mfu, said, rungs, best, plain, sources, args.price)


def compiler(again: bool):
    """Rung -> Program, saying on standard error what it does and how long that took."""
    console = Console(stderr=True)

    def compile_(rung: ladder.Rung) -> program.Program:
        if not again and program.is_kept(rung.config, rung.topology):
            return program.compiled(rung.config, rung.topology)
        began = time.perf_counter()
        with console.status(f"compiling {rung.name} for {rung.topology.text} (a minute or several)"):
            found = program.compiled(rung.config, rung.topology, again=again)
        took = time.perf_counter() - began
        console.print(
            f"compiled {rung.name} for {rung.topology.text} in {took:.0f} s ({found.cpu_seconds:.0f} s of processors)",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        return found

    return compile_


def sizes(given: str) -> Mapping[str, estimate.Source] | None:
    """SIZES of a config's file, None if it has none."""
    path = given if Path(given).is_file() else given.rpartition(":")[0]
    spec = importlib.util.spec_from_file_location("planned_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, "SIZES", None)
