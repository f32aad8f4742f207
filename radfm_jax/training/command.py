"""`python -m radfm_jax.train --config=configs/x.py --workdir=DIR`: train, or go on where the last start was saved."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from input_pipeline import command_line
from radfm_jax.runtime import cluster, distributed, faults
from radfm_jax.training.experiment import Experiment
from radfm_jax.training.loop import train

DESCRIPTION = """\
Trains RadFM as a config says. Started again with the same directory, it goes on bit by bit where it was saved last.
"""
EPILOG = """\
examples:
  python -m radfm_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
  python -m radfm_jax.train --config=configs/quickstart.py --workdir=runs/slow --config.optimizer.learning_rate=1e-4
  python -m radfm_jax.train --config=configs/x.py --workdir=runs/b --config.checkpoint.init_from=runs/a/checkpoints/500

several processes: the same command in each of them; launch/local.sh N -- ARGUMENTS starts N on this machine.

exit codes: 0 done; 75 ended early, start again with the same command and it goes on (saved after SIGTERM or Ctrl-C to
any process; or another process was lost: then from the step that was saved last); 70 a step was stuck; 2 a mistake in
the config or the data, a checkpoint that cannot be used, or processes that would not run the same; 1 anything else,
also processes that do not find each other. With several processes, that of the one that failed is the code of all.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m radfm_jax.train",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_config(parser)
    cluster.add_arguments(parser)
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="where the run is kept")
    args, config = command_line.parse(parser, sys.argv[1:] if argv is None else argv)
    try:
        experiment = Experiment.from_dict(config)
        with faults.Stop() as stop, distributed.start(args, args.workdir, experiment.to_dict(), stop) as peers:
            return train(experiment, args.workdir, peers)
    except InterruptedError:
        print("told to stop before all processes were there", file=sys.stderr)
        return faults.REQUEUE
    except (ValueError, distributed.StartError) as error:
        print(f"error: {error}", *getattr(error, "__notes__", []), sep="\n", file=sys.stderr)
        return faults.exit_code(error)
