"""The training state in a step directory: its layout, and how to restore it or initialise another run from it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from input_pipeline.field_rules import Size, as_tuple, field_problems, from_mapping, raise_problems
from input_pipeline.files import read_json
from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.checkpoints.checkpoint import PARAMS, flatten, mismatches, read_arrays, stored_arrays
from radfm_jax.checkpoints.run_directory import DATA, RUN, TRAINING
from radfm_jax.models import lora, quantised, radfm
from radfm_jax.models.computation import COMPUTE
from radfm_jax.models.lora import LoraConfig

# Settings that do not change the meaning of the weights.
COMPUTATION = (*COMPUTE, "dropout")

QUANTISED = {"int8": "int8", "uint8": "nf4"}


def _locations(state: dict) -> Iterator[tuple[str, str, jax.Array]]:
    """Yield (part, name, leaf) of every leaf, in order. Trained and frozen parameters share the part `params`."""
    for path, leaf in flatten(state).items():
        group, _, name = path.partition("/")
        yield (PARAMS, name, leaf) if group in ("params", "frozen") else (TRAINING, path, leaf)


@dataclasses.dataclass(frozen=True)
class Base:
    """The checkpoint with the frozen parameters of a run that trains adapters; its steps do not repeat them."""

    directory: Path
    sha256: str  # checkpoint.digest
    paths: frozenset[str]  # the parameters that steps leave out

    @property
    def record(self) -> dict:
        """The entry in radfm.json of a step."""
        return {"directory": str(checkpoint.absolute(self.directory)), "sha256": self.sha256}


def find_base(source, abstract: dict, model: radfm.RadFMConfig, base=None) -> Base | None:
    """Return the base of a run; None if its steps are complete, since it has no adapters and no `model.base`.

    Args:
      source: the step to resume from, or the checkpoint to start from (`init_from`).
      base: another place of the base that `source` records.
    Raises:
      ValueError: there is no such checkpoint, or its base is missing or another one.
    """
    if model.lora is None and model.base == "float32":
        return None
    source = run_directory.select_checkpoint(source)
    stored = checkpoint.StoredParams(source, base)
    directory = stored.base or source
    frozen = flatten(abstract["frozen"])
    left_out = {path for path in quantised.source_shapes(frozen) if stored.origins.get(path) == directory}
    left_out |= {str(quantised.companion(path, frozen[path].dtype)) for path in left_out} & frozen.keys()
    return Base(directory, checkpoint.digest(directory), frozenset(left_out))


def split_state(state: dict, base: Base | None = None) -> dict[str, dict]:
    """Return a state as it is stored: {"params": {path: leaf}, "training": {path: leaf}}, without those of the base."""
    parts: dict[str, dict] = {PARAMS: {}, TRAINING: {}}
    for part, name, leaf in _locations(state):
        if part == TRAINING or base is None or name not in base.paths:
            parts[part][name] = leaf
    return parts


def restore(directory, abstract: dict, *, base: Base | None = None, verified: bool = False) -> dict:
    """Restore the state of a step bit-exactly onto any mesh and number of processes.

    `abstract` is the result of train_step.abstract_state, `base` that of `find_base`. Every device reads only its own
    shards. Pass `verified` if `run_directory.latest` has just verified the files. Raises ValueError if the directory
    or the base is damaged, or with a list of all arrays that are missing, unexpected or different.
    """
    directory = Path(directory)
    if not verified:
        run_directory.verify(directory)
    if base is not None:
        run_directory.verify(base.directory)
    check(directory, abstract, base)
    parts = split_state(abstract)
    stored = checkpoint.StoredParams(directory, base and base.directory)
    arrays = {PARAMS: stored.read_leaves(parts[PARAMS])}
    arrays[TRAINING] = read_arrays(directory / TRAINING, parts[TRAINING])
    leaves = [arrays[part][name] for part, name, _ in _locations(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def check(directory: Path, abstract: dict, base: Base | None = None) -> None:
    """Check that `restore` can read a step. Raises ValueError with all missing, unexpected and different arrays."""
    parts = split_state(abstract, base)
    stored = {part: stored_arrays(directory / part) for part in parts}
    if base is not None:
        left_out = {path: x for path, x in flatten(abstract["frozen"]).items() if path in base.paths}
        shapes = stored_arrays(base.directory / PARAMS)
        expected = quantised.source_shapes(left_out)
        checkpoint.check_shapes(expected, {path: shapes[path] for path in expected if path in shapes}, base.directory)
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
    if (base := checkpoint.base_of(directory)) is not None:
        run_directory.verify(base)
    sizes = _differing_sizes(checkpoint.read_description(directory), model)
    stored = checkpoint.StoredParams(directory)
    params = split_state(state)[PARAMS]
    shared = _shared_parameters(directory, params, stored, sizes)
    sources = quantised.source_shapes(params)
    new, unused = (tuple(k for k in a if k not in b) for a, b in ((sources, stored.shapes), (stored.shapes, sources)))
    kinds = {path: QUANTISED.get(params[path].dtype.name, params[path].dtype.name) for path in shared}
    cast = {k: f"{stored.dtypes[k]} -> {kind}" for k, kind in kinds.items() if stored.dtypes[k] != kind}
    report = Initialised(directory, tuple(shared), new, unused, cast, tuple(sizes))
    scales = {scale for path in shared if (scale := quantised.companion(path, params[path].dtype)) in params}
    return stored.read_leaves({path: params[path] for path in (*shared, *scales)}), report


def check_init(directory, state: dict, model: radfm.RadFMConfig | None = None) -> None:
    """Check what `init_from` checks, except the bytes of the files."""
    directory = run_directory.select_checkpoint(directory)
    checkpoint.verify(directory, hashes=False)
    sizes = _differing_sizes(checkpoint.read_description(directory), model)
    params = split_state(state)[PARAMS]
    shared = _shared_parameters(directory, params, checkpoint.StoredParams(directory), sizes)
    fresh = [path for path in quantised.source_shapes(flatten(state["frozen"])) if path not in shared]
    if fresh and model is not None and (model.lora is not None or model.base != "float32"):
        raise ValueError(f"optimizer.frozen freezes parameters that {directory} does not have: {', '.join(fresh[:3])}")


def _differing_sizes(description: dict, model: radfm.RadFMConfig | None) -> list[str]:
    """Return one line per field of the model that differs from the checkpoint."""
    if model is None:
        return []
    lines = _differing_options(description["model"], model)
    for part in (name for name in radfm.PARTS if name in description["model"]):
        config, stored = getattr(model, part), description["model"][part]
        with contextlib.suppress(ValueError):  # raised for the sizes of another network, which are compared as they are
            stored = from_mapping(type(config), stored, part).to_dict()  # adds fields that older files do not have
        expected = config.to_dict()
        lines += [
            f"{part}.{name} is {expected.get(name)!r}, was {value!r} in the checkpoint"
            for name, value in stored.items()
            if name not in COMPUTATION and as_tuple(expected.get(name)) != as_tuple(value)
        ]
    return lines


def _differing_options(stored: Mapping, model: radfm.RadFMConfig) -> list[str]:
    """Return one line per option that changes what the stored adapters compute: their config, and the type of the base.

    `stored` is `model` of radfm.json. It has no adapters: no lines, since those of the model are fresh.
    """
    if stored.get("lora") is None or model.lora is None:
        return []
    ours, theirs = dataclasses.asdict(model.lora), dataclasses.asdict(from_mapping(LoraConfig, stored["lora"], "lora"))
    pairs = {f"lora.{name}": (ours[name], theirs[name]) for name in ours if name not in COMPUTATION}
    pairs["base"] = model.base, stored.get("base", "float32")
    return [f"{name} is {a!r}, was {b!r} in the checkpoint" for name, (a, b) in pairs.items() if a != b]


def _shared_parameters(directory: Path, params: dict, stored: checkpoint.StoredParams, sizes: list[str]) -> list[str]:
    """Return the paths of the parameters of a state that a checkpoint has, without the scales of quantised ones.

    Adapters may be new. `sizes` are the fields that differ, for the error.
    """
    sources = quantised.source_shapes(params)
    shared = [path for path in sources if path in stored.shapes]
    if not shared:
        paths = ", ".join(sorted(stored.shapes)[:5])
        raise ValueError(f"{directory} has no parameter of this model: it has {paths}, ...")
    adapters = [path for path in stored.shapes if lora.is_adapter(path)]
    if adapters and not any(lora.is_adapter(path) for path in sources):
        raise ValueError(
            f"{directory} has adapters ({adapters[0]}, ...): set model.lora as in its {checkpoint.DESCRIPTION}, or "
            "start from its merged weights (python -m radfm_jax.convert merge)"
        )
    absent = checkpoint.read_description(directory).get(checkpoint.ABSENT, [])
    may_be_new = {*absent, *(path for path in sources if lora.is_adapter(path) and not adapters)}
    parts = {_part(path) for path in sources} & {_part(path) for path in stored.shapes}
    expected = {path: x for path, x in sources.items() if _part(path) in parts and path not in may_be_new}
    actual = {path: x for path, x in stored.shapes.items() if _part(path) in parts}
    if problems := mismatches(expected, actual):
        lines = [f"parameters of {directory} do not fit the model:", *problems, *(f"model.{size}" for size in sizes)]
        raise ValueError("\n  ".join(lines))
    return shared


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
