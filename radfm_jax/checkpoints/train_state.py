"""The training state in a step directory: its layout, and how to restore it or initialise another run from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax

from input_pipeline.field_rules import Size, field_problems, raise_problems
from input_pipeline.files import read_json
from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.checkpoints.checkpoint import PARAMS, flatten, mismatches, read_arrays, stored_arrays
from radfm_jax.checkpoints.run_directory import DATA, RUN, TRAINING
from radfm_jax.models import radfm

# Settings of the computation, which do not change the meaning of the weights.
COMPUTATION = ("dtype", "param_dtype", "remat", "attention", "dropout")


def _locations(state: dict) -> Iterator[tuple[str, str, jax.Array]]:
    """Yield (part, name, leaf) of every leaf, in order. Trained and frozen parameters share the part `params`."""
    for path, leaf in flatten(state).items():
        group, _, name = path.partition("/")
        yield (PARAMS, name, leaf) if group in ("params", "frozen") else (TRAINING, path, leaf)


def split_state(state: dict) -> dict[str, dict]:
    """Return a state as it is stored: {"params": {path: leaf}, "training": {path: leaf}}."""
    parts: dict[str, dict] = {PARAMS: {}, TRAINING: {}}
    for part, name, leaf in _locations(state):
        parts[part][name] = leaf
    return parts


def restore(directory, abstract: dict, *, verified: bool = False) -> dict:
    """Restore the state of a step bit-exactly onto any mesh and number of processes.

    `abstract` is the result of train_step.abstract_state. Every device reads only its own shards. Pass `verified` if
    `run_directory.latest` has just verified the files. Raises ValueError if the directory is damaged, or with a list
    of all arrays that are missing, unexpected or different.
    """
    directory = Path(directory)
    if not verified:
        run_directory.verify(directory)
    check(directory, abstract)
    parts = split_state(abstract)
    arrays = {part: read_arrays(directory / part, leaves) for part, leaves in parts.items()}
    leaves = [arrays[part][name] for part, name, _ in _locations(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def check(directory: Path, abstract: dict) -> None:
    """Check that `restore` can read a step. Raises ValueError with all missing, unexpected and different arrays."""
    parts = split_state(abstract)
    stored = {part: stored_arrays(directory / part) for part in parts}
    if problems := mismatches(_kinds(parts), _kinds(stored)):
        raise ValueError(
            "\n  ".join([f"{directory} does not match this model and optimizer:", *problems])
            + f"\nTo resume, use the model and optimizer settings of {directory / RUN}; to start another stage from "
            "these parameters, use init_from"
        )


@dataclasses.dataclass(frozen=True)
class Initialised:
    """The effect of `init_from`, by parameter path."""

    directory: Path
    loaded: tuple[str, ...]
    new: tuple[str, ...]  # not in the checkpoint
    unused: tuple[str, ...]  # in the checkpoint, but not in the model
    cast: dict[str, str]  # path -> "bfloat16 -> float32"
    sizes: tuple[str, ...]  # differ but change no shape: "llama.rope_theta is 1e4, was 5e5 in the checkpoint"

    def __str__(self) -> str:
        lines = [f"initialised from {self.directory}: {len(self.loaded)} arrays loaded, {len(self.new)} new"]
        for part in sorted({p.partition("/")[0] for p in (*self.loaded, *self.new)}):
            count = lambda paths, part=part: sum(p.partition("/")[0] == part for p in paths)  # noqa: E731
            lines.append(f"  {part}: {count(self.loaded)} loaded, {count(self.new)} new")
        lines += [f"  not used: {path}" for path in self.unused]
        casts = list(self.cast.values())
        lines += [f"  {kind}: {casts.count(kind)} arrays" for kind in dict.fromkeys(casts)]
        return "\n".join([*lines, *(f"  DIFFERS: {size}" for size in self.sizes)])


def init_from(directory, state: dict, model: radfm.RadFMConfig | None = None) -> tuple[dict, Initialised]:
    """Read parameters from a run (its best or newest step), a step, a converted RadFM, or converted parts of one.

    Parts of the model that the checkpoint does not have, such as the perceiver of a language model with a vision
    encoder, are new. A part that both have must have the same parameters.

    Args:
      state: arrays or shapes (train_step.abstract_state); their dtypes and shardings apply to what is read.
      model: sizes to compare with those of the checkpoint.
    Returns:
      ({path: array} for `train_step.init_state`, a report). No parameter ever exists unsharded.
    Raises:
      ValueError: the directory is damaged, parameters differ (lists all of them), or no parameter matches.
    """
    directory = run_directory.select_checkpoint(directory)
    run_directory.verify(directory)
    sizes = _differing_sizes(checkpoint.read_description(directory), model)
    params, stored, loaded = _shared_parameters(directory, state, sizes)
    new, unused = (tuple(k for k in a if k not in b) for a, b in ((params, stored), (stored, params)))
    cast = {k: f"{stored[k].dtype} -> {v.dtype}" for k, v in loaded.items() if stored[k].dtype != v.dtype}
    report = Initialised(directory, tuple(loaded), new, unused, cast, tuple(sizes))
    return read_arrays(directory / PARAMS, loaded), report


def check_init(directory, state: dict, model: radfm.RadFMConfig | None = None) -> None:
    """Check what `init_from` checks, except the bytes of the files."""
    directory = run_directory.select_checkpoint(directory)
    checkpoint.verify(directory, hashes=False)
    _shared_parameters(directory, state, _differing_sizes(checkpoint.read_description(directory), model))


def _differing_sizes(description: dict, model: radfm.RadFMConfig | None) -> list[str]:
    """Return one line per field of the model that differs from the checkpoint."""
    if model is None:
        return []
    expected = json.loads(json.dumps(model.to_dict()))  # tuples become lists, as in the checkpoint
    return [
        f"{part}.{name} is {expected[part].get(name)!r}, was {value!r} in the checkpoint"
        for part, stored_sizes in description["model"].items()
        for name, value in stored_sizes.items()
        if name not in COMPUTATION and expected.get(part, {}).get(name) != value
    ]


def _shared_parameters(directory: Path, state: dict, sizes: list[str]) -> tuple[dict, dict, dict]:
    """Return three dicts {path: leaf}: parameters of the state, of the checkpoint, and the state's that are in both.

    `sizes` are the fields that differ, for the error.
    """
    params, stored = split_state(state)[PARAMS], stored_arrays(directory / PARAMS)
    shared = {path: x for path, x in params.items() if path in stored}
    if not shared:
        raise ValueError(f"{directory} has no parameter of this model: it has {', '.join(sorted(stored)[:5])}, ...")
    absent = checkpoint.read_description(directory).get(checkpoint.ABSENT, [])
    parts = {_part(path) for path in params} & {_part(path) for path in stored}
    expected = {path: tuple(x.shape) for path, x in params.items() if _part(path) in parts and path not in absent}
    actual = {path: tuple(x.shape) for path, x in stored.items() if _part(path) in parts}
    if problems := mismatches(expected, actual):
        lines = [f"parameters of {directory} do not fit the model:", *problems, *(f"model.{size}" for size in sizes)]
        raise ValueError("\n  ".join(lines))
    return params, stored, shared


def _part(path: str) -> str:
    return path.partition("/")[0]


def data_state(directory, process: int | None = None) -> dict:
    """Return the position of a process (default: this one) in its data.

    Between batches the position is equal in all processes, so a run with another number of processes can resume from
    it. Only `lost`, the number of scans that could not be loaded, differs; the new run gets the maximum.

    Raises ValueError if the directory has no such file, or the positions differ.
    """
    directory = Path(directory)
    process = jax.process_index() if process is None else process
    try:
        count = run_directory.read_run(directory)["processes"]
        raise_problems(f"{directory / RUN}: {problem}" for problem in field_problems(count, Size, "processes"))
        states = [read_json(directory / DATA / f"{p}.json", kind=dict) for p in range(count)]
    except FileNotFoundError as e:
        raise ValueError(f"{e.filename} does not exist: {directory} is not a step of a training run") from None
    except KeyError as e:
        raise ValueError(f"{directory / RUN} has no {e}: it is damaged") from None
    if count == jax.process_count() and process < count:
        return states[process]
    lost = max(s.get("lost", 0) for s in states)
    states = [{**s, "lost": lost} if "lost" in s else s for s in states]
    for other in states[1:]:
        if keys := [k for k in {**states[0], **other} if states[0].get(k) != other.get(k)]:
            raise ValueError(
                f"{directory / DATA}: the processes have different positions ({', '.join(keys)}): resume with the same "
                f"number of processes ({count})"
            )
    return states[0]


def _kinds(parts: dict[str, dict]) -> dict[str, str]:
    return {f"{part}/{k}": f"{x.dtype}{list(x.shape)}" for part, leaves in parts.items() for k, x in leaves.items()}
