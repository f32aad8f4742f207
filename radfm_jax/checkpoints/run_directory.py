"""The directory of a training run: its steps, the selection of one of them, and its write lock.

WORKDIR/config.json              the config of the latest start
WORKDIR/lock                     locked by the process that writes here; contains its pid and host
WORKDIR/checkpoints/STEP/        a checkpoint directory (checkpoint.py), with the parameters and in addition:
    training/                    the rest of the state: step, moments, key, counters; an Orbax PyTree
    data/PROCESS.json            position of each process in its data
    run.json                     step, metrics, config, versions, mesh, number of processes
WORKDIR/checkpoints/best.json    the best step, its metric and value

Only a directory whose name is a number is a step. It has another name while it is written, replaced or deleted, so a
step is complete whenever it is visible.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import jax

from input_pipeline.files import read_json, try_lock
from radfm_jax.checkpoints import checkpoint
from radfm_jax.runtime.barrier import barrier

CONFIG, LOCK, CHECKPOINTS, BEST = "config.json", "lock", "checkpoints", "best.json"
TRAINING, DATA, RUN = "training", "data", "run.json"
TEST_METRIC = "eval/all/loss"  # in best.json of earlier versions: the loss on data.test

Warn = Callable[[str], None]
warning: Warn = logging.getLogger(__name__).warning

_barriers = itertools.count()


def lock(workdir) -> TextIO:
    """Lock a run directory exclusively until the returned file is closed or this process ends.

    The kernel releases the lock, so a killed process leaves no stale one. Several machines need a file system that
    shares locks, as NFSv4 and Lustre (mounted with flock) do. Raises ValueError if there are no locks, or if another
    process has the lock; names its pid and host.
    """
    path = Path(workdir) / LOCK
    file = open(path, "a+")  # "w" would empty the file of the process that has the lock
    try:
        locked = try_lock(file)
    except OSError as e:
        file.close()
        raise ValueError(f"{path} cannot be locked ({e.strerror}): use a file system with locks") from e
    if not locked:
        file.seek(0)
        owner = file.read().strip() or "a process that has just started"
        file.close()
        raise ValueError(f"{workdir} is being written by {owner}: end that run first, or use another directory")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    # A forked child shares the lock, and would keep it after this process was killed.
    os.register_at_fork(after_in_child=file.close)
    return file


def last_config(workdir) -> dict:
    """Return the config of the latest start; {} if there was none."""
    try:
        return read_json(Path(workdir) / CONFIG, kind=dict)
    except (OSError, ValueError):  # a damaged file is not fatal: this start rewrites it
        return {}


def read_run(directory) -> dict:
    """Return the contents of a step's run.json. Raises FileNotFoundError, or ValueError if it is damaged."""
    return read_json(Path(directory) / RUN, nan=True, kind=dict)  # a metric may be NaN


def step_directory(workdir, step: int) -> Path:
    """Return the directory of a step, whether or not it exists."""
    return Path(workdir) / CHECKPOINTS / str(step)


def steps(workdir) -> list[int]:
    """Return all steps in ascending order, without verifying them."""
    directory = Path(workdir) / CHECKPOINTS
    names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(n) for n in names if n.isascii() and n.isdigit() and str(int(n)) == n)


def own_share(sizes: dict[str, int]) -> list[str]:
    """Return the share of {name: bytes} that this process hashes. All shares have about the same number of bytes."""
    largest_first = sorted(sizes, key=lambda name: (-sizes[name], name))
    return largest_first[jax.process_index() :: jax.process_count()]


def verify(directory) -> None:
    """Verify a checkpoint directory; each process reads its share of the files. All processes must call this.

    Raises ValueError in all processes, with the name of every file that is missing, added or changed.
    """
    damage = lambda: checkpoint.find_damage(directory, select=own_share)  # noqa: E731
    problems = dict.fromkeys(itertools.chain(*barrier(f"verify/{next(_barriers)}", damage)))
    checkpoint.raise_damage(directory, problems)


def latest(workdir, *, allow_older: bool = False, warn: Warn = warning) -> Path | None:
    """Return the directory of the newest verified step, or None if there is no step. All processes must call this.

    With `allow_older`, a damaged step is reported through `warn`, and the newest one that is not damaged is used.
    Raises ValueError with the name of every damaged file if the newest step is damaged (`allow_older`: if all are).
    """
    existing, *_ = barrier(f"latest/{next(_barriers)}", lambda: steps(workdir))
    problems = []
    for step in reversed(existing):
        directory = step_directory(workdir, step)
        try:
            verify(directory)
        except ValueError as e:
            problems.append(str(e))
            if not allow_older:
                raise ValueError(
                    f"{e}\nThis is the newest step of {workdir}. Restore the files, or set checkpoint.allow_older to "
                    "resume from an older step and repeat the later ones"
                ) from None
            continue
        if problems:
            warn("\n".join([*problems, f"RESUMING FROM STEP {step} INSTEAD OF {existing[-1]}: {directory}"]))
        return directory
    if problems:
        raise ValueError("\n".join([*problems, f"All steps of {workdir} are damaged"]))
    return None


def best(workdir) -> Path | None:
    """Return the directory of the best step, not verified; None if best.json does not exist.

    A best step that an earlier version selected on data.test is ignored, with a warning.
    """
    path = Path(workdir) / CHECKPOINTS / BEST
    try:
        content = read_json(path, kind=dict)
        step = content["step"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError) as e:
        raise ValueError(f"{path} is damaged ({e}): remove it, or pass the directory of a step") from None
    directory = step_directory(workdir, step)
    if content.get("metric") == TEST_METRIC:
        warning(f"{path}: step {step} was selected on test data: using the newest step (pass {directory} to use it)")
        return None
    if not directory.is_dir():
        raise ValueError(f"{path} names step {step}, but {directory} does not exist: pass another step's directory")
    return directory


def select_checkpoint(directory) -> Path:
    """Return `directory` if it is a checkpoint. Of a run, return the best step, or without best.json the newest.

    Raises ValueError if the run has no step.
    """
    directory = Path(directory)
    if (directory / checkpoint.DESCRIPTION).is_file() or not (directory / CHECKPOINTS).is_dir():
        return directory
    if step := best(directory):
        return step
    if existing := steps(directory):
        return step_directory(directory, existing[-1])
    raise ValueError(f"{directory} is a training run without any saved step: wait until it has saved one")
