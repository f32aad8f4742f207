"""The command `python -m radfm_jax.train --config=configs/x.py --workdir=DIR`: train a model, or resume a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from input_pipeline import command_line
from radfm_jax.runtime import cluster, distributed, faults
from radfm_jax.training.experiment import Experiment
from radfm_jax.training.loop import train

DESCRIPTION = """\
Train RadFM with a config. The same command with the same directory resumes the run bit-exactly from its last
checkpoint.
"""
EPILOG = """\
examples:
  python -m radfm_jax.train --config=configs/quickstart.py --workdir=runs/quickstart
  python -m radfm_jax.train --config=configs/quickstart.py --workdir=runs/slow --config.optimizer.learning_rate=1e-4
  python -m radfm_jax.train --config=configs/x.py --workdir=runs/b --config.checkpoint.init_from=runs/a/checkpoints/500

several processes: run the same command in each of them; launch/local.sh N -- ARGUMENTS starts N on this machine.

exit codes:
  0   done
  75  ended early: run the same command again to resume. After SIGTERM or Ctrl-C to any process the current step is
      saved; after the loss of a process the run resumes from the last checkpoint
  70  a step was stuck
  2   an error in the config or the data, an unusable checkpoint, or processes with different settings
  1   any other error, for instance processes that do not find each other
With several processes, all exit with the code of the process that failed.
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m radfm_jax.train", description=DESCRIPTION, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    command_line.add_config(parser)
    cluster.add_arguments(parser)
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="directory of the run")
    args, config = command_line.parse(parser, sys.argv[1:] if argv is None else argv)
    try:
        experiment = Experiment.from_dict(config)
        with faults.Stop() as stop, distributed.start(args, args.workdir, experiment.to_dict(), stop) as peers:
            return train(experiment, args.workdir, peers)
    except InterruptedError:
        print("stopped before all processes had connected", file=sys.stderr)
        return faults.REQUEUE
    except Exception as error:
        if (message := faults.message(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return faults.exit_code(error)
