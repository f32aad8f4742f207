"""What a training run has on disk, and how it is read again. `saver.py` writes it.

WORKDIR/config.json              the config of the latest start
WORKDIR/lock                     held by the process that writes here; says who that is
WORKDIR/checkpoints/STEP/        a checkpoint directory (checkpoint.py), with beside the parameters:
    training/                    everything else of the state: step, moments, key, counters; an Orbax PyTree
    data/PROCESS.json            where each process stands in its data
    run.json                     step, metrics, config, versions, mesh, number of processes
WORKDIR/checkpoints/best.json    which step is best, and by what

Only names that are numbers are steps. What is being written, replaced or deleted has another name until that is done,
so a step directory is whole from the moment it can be seen until it cannot.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax._src import distributed  # the only way to meet other processes without using their devices

from radfm_jax.checkpoints import checkpoint
from radfm_jax.checkpoints.checkpoint import MANIFEST, PARAMS, flatten, unflatten
from radfm_jax.models import radfm

CONFIG, LOCK, CHECKPOINTS, BEST = "config.json", "lock", "checkpoints", "best.json"
TRAINING, DATA, RUN = "training", "data", "run.json"
# What computes, but is not, the weights; and what may change between stages.
FREE = ("dtype", "param_dtype", "remat", "attention", "dropout")

T = TypeVar("T")
Warn = Callable[[str], None]
warning: Warn = logging.getLogger(__name__).warning


# --- several processes ------------------------------------------------------------------------------------------------


def together(key: str, work: Callable[[], T], timeout: float = 1800) -> list[T]:
    """Runs `work` in every process; the results of all of them, in their order, once the last is done.

    Processes meet through the coordination service and not through a collective of their devices, which a background
    thread must never start: training's own collectives would be met out of order.

    Args:
      key: names this meeting, the same in every process and used once.
      work: its result is a value of JSON.
      timeout: seconds to wait for the others.
    Raises:
      What `work` raises; in the other processes OSError, or ValueError if it was that, with the number and the message
      of those where it failed.
    """
    if jax.process_count() == 1:
        return [work()]
    client, failure = distributed.global_state.client, None
    try:
        answer = {"value": work()}
    except Exception as e:
        answer, failure = {"error": reason(e), "mistake": isinstance(e, ValueError)}, e
    client.key_value_set(f"radfm_jax/{key}/{jax.process_index()}", json.dumps(answer))
    client.wait_at_barrier(f"radfm_jax/{key}", int(timeout * 1000))
    found = {int(k.rpartition("/")[2]): json.loads(v) for k, v in client.key_value_dir_get(f"radfm_jax/{key}/")}
    if failure is not None:
        raise failure
    if failed := [f"process {p}: {found[p]['error']}" for p in sorted(found) if "error" in found[p]]:
        mistakes = all(answer["mistake"] for answer in found.values() if "error" in answer)
        raise (ValueError if mistakes else OSError)("; ".join(failed))
    return [found[p]["value"] for p in range(jax.process_count())]


def reason(e: BaseException) -> str:
    """An exception in words, without the C++ traces that tensorstore adds."""
    text = str(e).partition(" [source locations=")[0].strip()
    return f"{type(e).__name__}: {text}" if text else type(e).__name__


def share(files: dict[str, int]) -> list[str]:
    """This process's share of {name: bytes}: as many bytes as the others have, about."""
    largest_first = sorted(files, key=lambda name: (-files[name], name))
    return largest_first[jax.process_index() :: jax.process_count()]


def settle(paths: dict[str, Path], *, sync: bool) -> dict[str, str]:
    """SHA-256 of files as they are read back, after which, with `sync`, they are on the disk itself."""

    def one(path: Path) -> str:
        with open(path, "rb") as f:
            digest = hashlib.file_digest(f, "sha256").hexdigest()  # lets go of the interpreter lock
            if sync:
                os.fsync(f.fileno())
        return digest

    with concurrent.futures.ThreadPoolExecutor() as pool:
        return dict(zip(paths, pool.map(one, paths.values()), strict=True))


# --- one writer -------------------------------------------------------------------------------------------------------


class Lock:
    """The right to write a run directory, from now until `release` or the death of this process, however it comes.

    The kernel keeps it (flock), so nothing stale remains to be removed by hand. It needs a file system that carries
    locks over to other machines, as NFSv4 and Lustre (mounted with flock) do.

    Raises:
      ValueError: another process holds it, with its pid and host; or the file system has no locks.
    """

    def __init__(self, workdir):
        path = Path(workdir) / LOCK
        self._file = open(path, "a+")  # not "w": it must not empty the file of a process that holds the lock
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._file.seek(0)
            owner = self._file.read().strip() or "a process that has just started"
            self._file.close()
            if not isinstance(e, BlockingIOError):
                raise ValueError(f"{path} cannot be locked ({e.strerror}): use a file system with locks") from e
            raise ValueError(f"{workdir} is being written by {owner}: end that run first, or use another") from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        self._file.flush()
        # A forked child shares the lock, and would keep it after the death of this process.
        os.register_at_fork(after_in_child=self._file.close)

    def release(self) -> None:
        self._file.close()


# --- which steps there are --------------------------------------------------------------------------------------------


def last_config(workdir) -> dict:
    """The config of the latest start; {} before the first one."""
    try:
        return json.loads((Path(workdir) / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a start that was killed wrote it in part: it is written anew by this one
        return {}


def step_directory(workdir, step: int) -> Path:
    return Path(workdir) / CHECKPOINTS / str(step)


def steps(workdir) -> list[int]:
    """Steps in ascending order, verified or not."""
    directory = Path(workdir) / CHECKPOINTS
    names = [p.name for p in directory.iterdir()] if directory.is_dir() else []
    return sorted(int(n) for n in names if n.isascii() and n.isdigit() and str(int(n)) == n)


_meetings = itertools.count()


def verify(directory) -> None:
    """checkpoint.verify, of which each process reads its share of the files. Called by all processes, or one alone.

    Raises ValueError naming every file that is missing, added or changed, in all processes.
    """
    directory = Path(directory)

    def damage() -> list[str]:
        try:
            checkpoint.verify(directory, hashes=jax.process_count() == 1)
        except ValueError as e:
            return [str(e)]
        if jax.process_count() == 1:
            return []
        listed = json.loads((directory / MANIFEST).read_text())["files"]
        mine = share({name: entry["bytes"] for name, entry in listed.items()})
        found = settle({name: directory / name for name in mine}, sync=False)
        changed = [f"content differs: {name}" for name in mine if found[name] != listed[name].get("sha256")]
        return [f"checkpoint {directory} is damaged:\n  " + "\n  ".join(changed)] if changed else []

    # Each process sees what is wrong with its share; names and sizes are seen by all.
    problems = dict.fromkeys(itertools.chain(*together(f"verify/{next(_meetings)}", damage)))
    if problems:
        raise ValueError("\n".join(problems))


def latest(workdir, *, allow_older: bool = False, warn: Warn = warning) -> Path | None:
    """The directory of the newest step, verified; None if there is no step yet. Called by all processes.

    Args:
      allow_older: take the newest step that verifies if the newest is damaged, and say so through `warn`.
    Raises:
      ValueError: the newest step is damaged, or with `allow_older` all are; every damaged file is named.
    """
    (found, *_) = together(f"latest/{next(_meetings)}", lambda: steps(workdir))
    problems = []
    for step in reversed(found):
        directory = step_directory(workdir, step)
        try:
            verify(directory)
        except ValueError as e:
            problems.append(str(e))
            if not allow_older:
                raise ValueError(
                    f"{e}\nThis is the newest step of {workdir}. Bring the files back, or allow an older step to be "
                    "used (checkpoint.allow_older), from which the run repeats what came after it"
                ) from None
            continue
        if problems:
            warn("\n".join([*problems, f"GOING ON FROM STEP {step} INSTEAD OF {found[-1]}: {directory}"]))
        return directory
    if problems:
        raise ValueError("\n".join([*problems, f"No step of {workdir} is whole"]))
    return None


def best(workdir) -> Path | None:
    """The directory of the best step, None if no step was ever compared. It is verified by whoever loads it."""
    path = Path(workdir) / CHECKPOINTS / BEST
    try:
        step = json.loads(path.read_text())["step"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({e}): remove it, or name a step directory") from None
    directory = step_directory(workdir, step)
    if not directory.is_dir():
        raise ValueError(f"{path} says that step {step} is best, but {directory} does not exist: name another step")
    return directory


def chosen(directory) -> Path:
    """`directory` if it is a checkpoint; of a run its best step, or the newest if none was ever compared.

    Raises ValueError: a run that has not saved a step.
    """
    directory = Path(directory)
    if (directory / checkpoint.DESCRIPTION).is_file() or not (directory / CHECKPOINTS).is_dir():
        return directory
    found = best(directory) or next((step_directory(directory, step) for step in reversed(steps(directory))), None)
    if found is None:
        raise ValueError(f"{directory} is a training run without any saved step: let it save one first")
    return found


# --- a state out of a step --------------------------------------------------------------------------------------------


def parts(state: dict) -> dict[str, dict]:
    """A state as it is stored: {"params": {path: leaf}, "training": {path: leaf}}; learning and frozen parameters lie
    together, so that a step is a checkpoint like any other."""
    found: dict[str, dict] = {PARAMS: {}, TRAINING: {}}
    for path, leaf in flatten(state).items():
        part, _, name = path.partition("/")
        if part in ("params", "frozen"):
            found[PARAMS][name] = leaf
        else:
            found[TRAINING][path] = leaf
    return found


def restore(directory, abstract: dict, *, verified: bool = False) -> dict:
    """The state of a step, bit by bit, on whatever mesh and number of processes `abstract` lies.

    Args:
      directory: of the step.
      abstract: train_step.abstract_state's; every device reads the parts of arrays that its sharding gives it.
      verified: the directory comes from `latest` a moment ago and need not be read twice.
    Raises:
      ValueError: the directory is damaged; or lists every array that is missing, unexpected, or of another shape or
        dtype.
    """
    directory = Path(directory)
    if not verified:
        verify(directory)
    wanted = parts(abstract)
    problems = []
    for part, leaves in wanted.items():
        found = _stored(directory / part)
        problems += [f"missing: {part}/{k} {_kind(v)}" for k, v in leaves.items() if k not in found]
        problems += [f"unexpected: {part}/{k} {_kind(v)}" for k, v in found.items() if k not in leaves]
        both = [k for k in leaves if k in found]
        problems += [
            f"{part}/{k} is {_kind(found[k])}, expected {_kind(leaves[k])}"
            for k in both
            if _kind(found[k]) != _kind(leaves[k])
        ]
    if problems:
        raise ValueError(
            f"{directory} is a state of another training:\n  "
            + "\n  ".join(problems)
            + "\nTo go on, use the model and "
            f"optimizer settings of {directory / RUN}; to begin another stage with these parameters, use init_from"
        )
    leaves = {part: _read(directory / part, wanted[part]) for part in wanted}
    order = []
    for path in flatten(abstract):
        part, _, name = path.partition("/")
        order.append(leaves[PARAMS][name] if part in ("params", "frozen") else leaves[TRAINING][path])
    return jax.tree.unflatten(jax.tree.structure(abstract), order)


@dataclasses.dataclass(frozen=True)
class Initialised:
    """What `init_from` did.

    Attributes:
      loaded, new: paths of parameters that were read, and that stayed as they were.
      unused: paths in the checkpoint for which the model has no place.
      cast: path -> "bfloat16 -> float32".
      sizes: settings that no shape shows and that differ: "llama.rope_theta is 1e4, was 5e5 in the checkpoint".
    """

    directory: Path
    loaded: tuple[str, ...]
    new: tuple[str, ...]
    unused: tuple[str, ...]
    cast: dict[str, str]
    sizes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"initialised from {self.directory}: {len(self.loaded)} arrays loaded, {len(self.new)} new"]
        for part in sorted({p.partition("/")[0] for p in (*self.loaded, *self.new)}):
            count = lambda paths, part=part: sum(p.partition("/")[0] == part for p in paths)  # noqa: E731
            lines.append(f"  {part}: {count(self.loaded)} loaded, {count(self.new)} new")
        lines += [f"  not used: {path}" for path in self.unused]
        lines += [
            f"  {kinds}: {sum(k == kinds for k in self.cast.values())} arrays" for kinds in set(self.cast.values())
        ]
        return "\n".join([*lines, *(f"  DIFFERS: {size}" for size in self.sizes)])


def init_from(
    directory, state: dict, model: radfm.RadFMConfig | None = None, *, verified: bool = False
) -> tuple[dict[str, jax.Array], Initialised]:
    """Parameters for a state from a checkpoint of any kind: a run (its best step, or its newest), a step, a converted
    RadFM, or a language model alone.

    Args:
      state: arrays or shapes (train_step.abstract_state): what is read gets the dtypes and shardings of its parameters.
      model: sizes of the model, to be compared with what the checkpoint says of itself.
    Returns:
      path -> array of what the checkpoint has, for `train_step.init_state`, and what was done. No parameter ever exists
      unsharded.
    Raises:
      ValueError: the directory is damaged; lists every shape that differs; or nothing in it fits.
    """
    directory = chosen(directory)
    if not verified:
        verify(directory)
    description = checkpoint.read_description(directory)
    wanted, found = parts(state)[PARAMS], _stored(directory / PARAMS)
    loaded = {k: v for k, v in wanted.items() if k in found}
    problems = [
        f"{k} is {found[k].shape}, expected {v.shape}" for k, v in loaded.items() if found[k].shape != tuple(v.shape)
    ]
    if problems:
        raise ValueError(f"parameters of {directory} do not fit the model:\n  " + "\n  ".join(problems))
    if not loaded:
        raise ValueError(f"{directory} has no parameter of this model: it has {', '.join(sorted(found)[:5])}, ...")
    sizes = []
    if model is not None:
        ours = json.loads(json.dumps(model.to_dict()))  # tuples as JSON has them
        for part, theirs in description["model"].items():
            sizes += [
                f"{part}.{name} is {ours[part].get(name)!r}, was {value!r} in the checkpoint"
                for name, value in theirs.items()
                if name not in FREE and ours.get(part, {}).get(name) != value
            ]
    report = Initialised(
        directory,
        tuple(loaded),
        tuple(k for k in wanted if k not in found),
        tuple(k for k in found if k not in wanted),
        {k: f"{found[k].dtype} -> {v.dtype}" for k, v in loaded.items() if found[k].dtype != v.dtype},
        tuple(sizes),
    )
    return _read(directory / PARAMS, loaded), report


def data_state(directory, process: int | None = None) -> dict:
    """Where a process stood in its data (default: this process).

    Between batches the place is the same in every process, so a run of another number of processes takes it over;
    `lost`, which each counts for itself, then becomes the largest of them.

    Raises ValueError if the directory has no such file, or the places differ.
    """
    directory = Path(directory)
    process = jax.process_index() if process is None else process
    try:
        count = json.loads((directory / RUN).read_text())["processes"]
        states = [json.loads((directory / DATA / f"{p}.json").read_text()) for p in range(count)]
    except FileNotFoundError as e:
        raise ValueError(f"{e.filename} does not exist: {directory} is no step of a training run") from None
    if count == jax.process_count() and process < count:
        return states[process]
    lost = max(s.get("lost", 0) for s in states)
    states = [{**s, "lost": lost} if "lost" in s else s for s in states]
    for other in states[1:]:
        if keys := [k for k in {**states[0], **other} if states[0].get(k) != other.get(k)]:
            raise ValueError(
                f"{directory / DATA}: processes stood at different places ({', '.join(keys)}), which only the same "
                f"number of processes ({count}) can go on from"
            )
    return states[0]


def _kind(x) -> str:
    return f"{x.dtype}{list(x.shape)}"


def _stored(directory: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of an Orbax PyTree of dicts, without its arrays."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        try:
            tree = handler.metadata(epath.Path(checkpoint.absolute(directory))).tree
        except FileNotFoundError:
            raise ValueError(f"{directory} does not exist or holds no Orbax arrays") from None
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flatten(tree).items()}


def _read(directory: Path, wanted: dict) -> dict:
    """{path: array} of a part of an Orbax PyTree, placed and cast as {path: array or ShapeDtypeStruct} says."""
    tree = unflatten({k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in wanted.items()})
    args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype), tree)
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        asked = ocp.args.PyTreeRestore(tree, restore_args=args, partial_restore=True)
        return flatten(handler.restore(epath.Path(checkpoint.absolute(directory)), args=asked))
