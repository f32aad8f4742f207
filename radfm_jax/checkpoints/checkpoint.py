"""Checkpoint directories: Orbax parameters, everything needed to use them, and a manifest that commits them.

DIR/radfm.json           description: part, model sizes, source, versions
DIR/params/              the parameters, an Orbax PyTree; the layers of a stack are along the first axis
DIR/tokenizer.model      the SentencePiece model, or tokenizer.json and the files of HUGGING_FACE_FILES that go with it
DIR/unused.safetensors   tensors of a released file that the model does not use (convert --unused keep)
DIR/manifest.json        size and SHA-256 of every other file; written last, it marks the directory as complete
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path

import absl.logging
import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from rich import filesize

from input_pipeline.field_rules import errors_of
from input_pipeline.files import fsync, read_json, sha256_of_file, write_json
from input_pipeline.text.tokenizer import HUGGING_FACE, HUGGING_FACE_FILES, SENTENCEPIECE
from radfm_jax.models import quantised, radfm
from radfm_jax.models.computation import COMPUTE
from radfm_jax.runtime import host_memory

DESCRIPTION, MANIFEST, PARAMS, TOKENIZER = "radfm.json", "manifest.json", "params", SENTENCEPIECE
UNUSED = "unused.safetensors"
TOKENIZERS = (TOKENIZER, *HUGGING_FACE_FILES)
EXTRA_FILES = (*TOKENIZERS, UNUSED)
OPTIONS = ("lora", "base")  # keys of the model in radfm.json that are not parts
BASE = "base"  # key of radfm.json: directory and digest of the checkpoint that has the frozen parameters
ABSENT = "absent"  # key of radfm.json: parameters of its parts that a checkpoint does not have
FORMAT = 1
CHUNK_BYTES = 32 * 2**20
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@contextlib.contextmanager
def new_directory(path, *, manifest: bool = True) -> Iterator[Path]:
    """Create a directory that is complete or absent, even if the process is killed.

    Yields a hidden directory next to `path` to fill. At the end it gets a manifest (unless it is an export for other
    programs) and is renamed. Raises ValueError if `path` exists or cannot be created.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists: choose another name or remove it first")
    partial = path.with_name(f".{path.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
    except OSError as e:
        raise ValueError(f"cannot create {path}: {e.strerror or e}") from e
    try:
        yield partial
        if manifest:
            write_manifest(partial)
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial)
        raise


def absolute(path) -> Path:
    """Return an absolute path without `..`, which tensorstore rejects."""
    return Path(os.path.abspath(path))


def require_space(path, required: int, task: str) -> None:
    """Raise ValueError if the disk of `path` has fewer than `required` bytes free."""
    existing = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
    if (free := shutil.disk_usage(existing).free) < required:
        raise ValueError(
            f"{task} needs {filesize.decimal(required)}, but the disk of {existing} has {filesize.decimal(free)} free"
        )


def list_files(directory: Path) -> dict[str, Path]:
    """Return all files below a directory by their relative names, sorted."""
    return {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*")) if p.is_file()}


def hash_files(directory: Path, names: Iterable[str], *, sync: bool = False) -> dict[str, str]:
    """Return the SHA-256 of files as read back from disk; with `sync`, flush each of them to the disk first."""

    def hash_file(name: str) -> str:
        if sync:
            fsync(directory / name)
        return sha256_of_file(directory / name)

    names = list(names)
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashlib releases the interpreter lock
        return dict(zip(names, pool.map(hash_file, names), strict=True))


def manifest_of(sizes: Mapping[str, int], hashes: Mapping[str, str]) -> dict:
    """Return the contents of manifest.json."""
    return {"format": FORMAT, "files": {n: {"bytes": size, "sha256": hashes[n]} for n, size in sizes.items()}}


def write_manifest(directory: Path) -> None:
    """Hash all files of a directory and write its manifest."""
    sizes = {name: p.stat().st_size for name, p in list_files(directory).items()}
    write_json(directory / MANIFEST, manifest_of(sizes, hash_files(directory, sizes)))


def read_manifest(directory: Path) -> dict[str, dict]:
    """Return {file name: {"bytes", "sha256"}}. Raises ValueError if the manifest is missing or damaged."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: expected a checkpoint directory of radfm_jax")
    try:
        files = read_json(directory / MANIFEST, kind=dict)["files"]
        return {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in files.items()}
    except FileNotFoundError:
        raise ValueError(f"{directory} has no {MANIFEST}: it is not a checkpoint, or it is incomplete") from None
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{directory / MANIFEST} is damaged: {e!r}") from None


def find_damage(
    directory, *, hashes: bool = True, allow_missing: Collection[str] = (), select: Callable = iter
) -> list[str]:
    """Return one line per file that differs from the manifest, with a remedy if the file also exists elsewhere.

    Args:
      hashes: also compare contents, which reads every file; otherwise names and sizes only.
      allow_missing: names of files that may be missing.
      select: takes {name: bytes} and returns the names of the files to hash; default: all.
    """
    directory = Path(directory)
    listed, existing = read_manifest(directory), list_files(directory)
    # File browsers create hidden files; ignore them.
    added = [n for n in existing if n not in listed and n != MANIFEST and not Path(n).name.startswith(".")]
    problems = [f"missing: {n}" for n in sorted(listed) if n not in existing and n not in allow_missing]
    problems += [f"not in the manifest: {n}" for n in added]
    sizes = {n: existing[n].stat().st_size for n in sorted(listed) if n in existing}
    problems += [f"size differs: {n}" for n, size in sizes.items() if size != listed[n]["bytes"]]
    if hashes:
        same_size = select({n: size for n, size in sizes.items() if size == listed[n]["bytes"]})
        actual = hash_files(directory, same_size)
        problems += [f"content differs: {n}" for n, sha256 in actual.items() if sha256 != listed[n]["sha256"]]
    remedies = _remedies(directory, listed)
    return [problem + remedies.get(problem.partition(": ")[2], "") for problem in problems]


def verify(directory, *, hashes: bool = True, allow_missing: Collection[str] = ()) -> None:
    """Raise ValueError that lists all damage; the arguments are those of `find_damage`."""
    raise_damage(directory, find_damage(directory, hashes=hashes, allow_missing=allow_missing))


def raise_damage(directory, problems: Iterable[str]) -> None:
    """Raise ValueError if there are problems."""
    if lines := list(problems):
        raise ValueError(f"checkpoint {directory} is damaged:\n  " + "\n  ".join(lines))


def digest(directory) -> str:
    """Return a SHA-256 that identifies the parameters of a checkpoint and its base, whatever their path and time."""
    files = sorted(read_manifest(Path(directory)).items())
    times = {f"{PARAMS}/{name}" for name in ("_CHECKPOINT_METADATA", "commit_success.txt")}  # written by Orbax
    params = {name: entry["sha256"] for name, entry in files if name.startswith(f"{PARAMS}/") and name not in times}
    if (Path(directory) / DESCRIPTION).is_file() and (base := read_description(directory).get(BASE)):
        params[BASE] = base["sha256"]
    return hashlib.sha256(json.dumps(params).encode()).hexdigest()


def tokenizer_path(directory) -> Path | None:
    """Return what `load_tokenizer` opens for a checkpoint: its SentencePiece model, the directory itself, or None."""
    paths = {TOKENIZER: Path(directory) / TOKENIZER, HUGGING_FACE: Path(directory)}
    return next((path for name, path in paths.items() if (Path(directory) / name).is_file()), None)


def _remedies(directory: Path, listed: dict[str, dict]) -> dict[str, str]:
    """Return how to recover each file that may also exist elsewhere."""
    use = "pass it as --tokenizer FILE, in Python load(..., tokenizer=FILE)"
    remedies = {TOKENIZER: f": the checkpoint was made without a tokenizer. Keep the file elsewhere and {use}"}
    for name in TOKENIZERS:
        if entry := listed.get(name):
            remedies[name] = (
                f": copy the {'SentencePiece model' if name == TOKENIZER else 'file'} of {entry['bytes']:,} bytes, "
                f"SHA-256 {entry['sha256']}, to {directory / name}, or {use}. All steps of a run have the same one: "
                "training read it from data.tokenizer, conversion from --tokenizer or from the folder of the weights"
            )
    remedies[DESCRIPTION] = (
        f": copy it to {directory / DESCRIPTION} from the source of this directory. No other file has the model sizes; "
        "without a copy, convert the weights again or use another step of the run"
    )
    return remedies


def write_description(directory: Path, part: str, model: dict, **fields) -> None:
    """Write radfm.json, with the sizes of a RadFM (part `radfm`), or of the parts that `part` names.

    These are `llama` (a language model), `vision` (a vision encoder) or `llama+vision`.

    Settings of the computation (dtype, remat, ...) are not written, nor are `lora` and `base` without adapters.
    """
    sizes = {name: {k: v for k, v in model[name].items() if k not in COMPUTE} for name in model if name in radfm.PARTS}
    model = sizes | {name: x for name, x in model.items() if name in OPTIONS and x not in (None, "float32")}
    versions = {p: importlib.metadata.version(p) for p in ("jax", "flax", "orbax-checkpoint", "numpy")}
    description = {"format": FORMAT, "part": part, "model": model, **fields, "versions": versions}
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=1))


def read_description(directory) -> dict:
    """Return the contents of radfm.json. Raises ValueError if it is missing, damaged or in another format."""
    path = Path(directory) / DESCRIPTION
    try:
        description = read_json(path, kind=dict)
        file_format, *_ = description["format"], description["part"]
        sizes = {name: x for name, x in description["model"].items() if name != "base"}
        others = {name: description.get(name, {}) for name in ("source", BASE)}
        parts = {"model": description["model"], **sizes, **others}
        if wrong := [name for name, value in parts.items() if not isinstance(value, dict)]:
            raise TypeError(f"{', '.join(wrong)} must have fields")
        if BASE in description and not all(isinstance(parts[BASE].get(k), str) for k in ("directory", "sha256")):
            raise TypeError(f"{BASE} must have the texts directory and sha256")
    except FileNotFoundError:
        raise ValueError(f"{directory} has no {DESCRIPTION}: it is not a checkpoint directory of radfm_jax") from None
    except (KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged: {e!r}") from None
    if file_format != FORMAT:
        raise ValueError(f"{path} has format {file_format}, this version reads format {FORMAT}: update radfm_jax")
    return description


def model_config(description: dict, directory) -> radfm.RadFMConfig:
    """Return the sizes of a complete RadFM. Raises ValueError for a checkpoint of single parts."""
    if (part := description["part"]) != "radfm":
        raise ValueError(f"{directory} has only the part {part!r}: it can initialise a RadFM, but is not one")
    with errors_of(Path(directory) / DESCRIPTION):
        return radfm.RadFMConfig.from_dict(description["model"])


# --- parameters as a tree ---------------------------------------------------------------------------------------------


def save_params(directory: Path, params: dict) -> None:
    """Write a tree of arrays with Orbax; each process writes the shards that it has."""
    save_args = jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns about a merge that is not needed here
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)) as checkpointer:
            checkpointer.save(absolute(directory) / PARAMS, args=ocp.args.PyTreeSave(params, save_args=save_args))
    finally:
        absl.logging.set_verbosity(verbosity)


def restore_params(directory, abstract: dict, shardings: dict | None = None, base=None) -> dict:
    """Read parameters onto any mesh (default: one device), and cast or quantise them to the leaves of `abstract`.

    `base` is as in StoredParams. Raises ValueError that lists every parameter that is missing, unexpected or of another
    shape, or for weights that cannot be quantised.
    """
    leaves, stored = with_shardings(abstract, shardings), StoredParams(directory, base)
    check_shapes(quantised.source_shapes(leaves), stored.shapes, directory)
    return unflatten(stored.read_leaves(leaves))


def with_shardings(abstract: dict, shardings: dict | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Return {parameter path: shape, dtype and sharding}; without shardings, on the default device."""
    leaves = flatten(abstract)
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    by_path = dict.fromkeys(leaves, one_device) if shardings is None else flatten(shardings)
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=by_path[k]) for k, v in leaves.items()}


def stored_arrays(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shapes and dtypes of an Orbax PyTree of dicts without reading its arrays. Raises ValueError if absent."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        try:
            tree = handler.metadata(epath.Path(absolute(path))).tree
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist or contains no Orbax arrays") from None
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in flatten(tree).items()}


def read_arrays(path: Path, leaves: dict) -> dict:
    """Read arrays of an Orbax PyTree, cast and sharded like `leaves`: {parameter path: array or ShapeDtypeStruct}."""
    tree = unflatten({k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in leaves.items()})
    args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype), tree)
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        restore = ocp.args.PyTreeRestore(tree, restore_args=args, partial_restore=True)
        return flatten(handler.restore(epath.Path(absolute(path)), args=restore))


def check_shapes(expected: Mapping, actual: Mapping, source) -> None:
    """Raise ValueError that lists every difference in shape between two {parameter path: array or shape}."""
    shapes = [{k: tuple(getattr(v, "shape", v)) for k, v in arrays.items()} for arrays in (expected, actual)]
    if problems := mismatches(*shapes):
        raise ValueError("\n  ".join([f"parameters of {source} do not fit the model:", *problems]))


def mismatches(expected: Mapping, actual: Mapping) -> list[str]:
    """Return one line per parameter that is missing, unexpected or different."""
    lines = [f"missing: {k} {v}" for k, v in expected.items() if k not in actual]
    lines += [f"unexpected: {k} {v}" for k, v in actual.items() if k not in expected]
    return lines + [f"{k} is {actual[k]}, expected {v}" for k, v in expected.items() if actual.get(k, v) != v]


def flatten(tree: dict) -> dict:
    """Return {'llama/blocks/query/kernel': leaf}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(leaves: dict) -> dict:
    """Return the nested dict of {'llama/blocks/query/kernel': leaf}."""
    return flax.traverse_util.unflatten_dict(leaves, sep="/")


def bytes_of(shapes: dict[str, tuple[tuple[int, ...], np.dtype]]) -> int:
    """Return the total size of {parameter path: (shape, dtype)} in bytes."""
    return sum(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())


# --- parameters by slices ---------------------------------------------------------------------------------------------


class ParamWriter:
    """Write an Orbax PyTree slice by slice, so that a stack of 40 layers never has to fit in memory.

    Orbax writes complete arrays only. It writes the tree with placeholders here; tensorstore, with which Orbax reads,
    then creates each array with its real shape. A chunk is a layer (split above 32 MiB) and has a CRC32C.
    """

    def __init__(self, directory: Path, shapes: dict[str, tuple[tuple[int, ...], np.dtype]], stacked: set[str]):
        placeholders = {k: np.zeros((1,) * len(shape), dtype) for k, (shape, dtype) in shapes.items()}
        save_params(directory, unflatten(placeholders))
        self._stores = {}
        for name, (shape, dtype) in shapes.items():
            chunks = {"chunk_shape": _chunk_shape(shape, dtype, name in stacked)}
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{absolute(directory) / PARAMS / name.replace('/', '.')}/"},
                "metadata": {
                    "shape": shape,
                    "data_type": np.dtype(dtype).name,
                    "chunk_grid": {"name": "regular", "configuration": chunks},
                    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                },
                "store_data_equal_to_fill_value": True,  # Orbax treats an absent chunk as lost
            }
            self._stores[name] = ts.open(spec, create=True, delete_existing=True).result()

    def write(self, name: str, value: np.ndarray, index: tuple = ()) -> None:
        """Write `value` to parameter[index]; the index is a layer, a slice of rows, or () for the complete array."""
        self._stores[name][index or ...].write(value).result()


def _chunk_shape(shape, dtype, stacked: bool) -> list[int]:
    chunk = [1, *shape[1:]] if stacked else list(shape)
    while np.prod(chunk, dtype=np.int64) * np.dtype(dtype).itemsize > CHUNK_BYTES:
        axis = int(np.argmax(chunk))
        chunk[axis] = -(-chunk[axis] // 2)
    return chunk


def base_of(directory, base=None) -> Path | None:
    """Return the checkpoint that has the frozen parameters of this one; None if this one is complete.

    A run that trains adapters records its base. `base` is another place of it, or a run that has it as a step. Raises
    ValueError if the base does not exist, was not the one in training, or is passed but not needed.
    """
    if (record := read_description(directory).get(BASE)) is None:
        if base is not None:
            raise ValueError(f"{directory} has all its parameters and needs no base: do not pass {base}")
        return None
    path, remedy = Path(base or record["directory"]), "pass its directory as base=DIR (command line: --base DIR)"
    digests = {p: digest(p) for p in (path, *path.glob("checkpoints/*")) if (p / MANIFEST).is_file()}
    problem = f"{directory} has only what it learned; its base {path} does not exist or is not a checkpoint"
    for found, actual in digests.items():
        if actual == record["sha256"]:
            return found
        problem = f"{directory} was trained on another base than {found}, whose digest is {actual}"
    raise ValueError(f"{problem}: {remedy}; its digest is {record['sha256']}")


class StoredParams:
    """The parameters of a checkpoint directory, and those of its base (`base_of`) that it does not have itself."""

    def __init__(self, directory, base=None):
        is_checkpoint = (Path(directory) / DESCRIPTION).is_file()
        self.base = base_of(directory, base) if is_checkpoint else None
        self._stores, self.origins = {}, {}
        for source in filter(None, (self.base, Path(directory))):
            stores = _open_stores(source)
            self._stores |= stores
            self.origins |= dict.fromkeys(stores, source)
        self.shapes = {k: tuple(v.shape) for k, v in self._stores.items()}
        self.dtypes = {k: v.dtype.numpy_dtype for k, v in self._stores.items()}

    def read(self, name: str, index: tuple = ()) -> np.ndarray:
        """Return parameter[index]."""
        return self._stores[name][index or ...].read().result()

    @host_memory.freed_at_once()
    def read_leaves(self, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Return arrays cast and sharded like `leaves`. Quantised ones are made layer by layer."""
        shapes = quantised.quantised_shapes(leaves)
        arrays: dict[str, jax.Array] = {}
        for source in set(self.origins.values()):
            whole = {k: leaf for k, leaf in leaves.items() if self.origins.get(k) == source and k not in shapes}
            if whole:
                arrays |= read_arrays(source / PARAMS, whole)
        for path, shape in shapes.items():
            leaf, scale = leaves[path], str(quantised.companion(path, leaves[path].dtype))
            try:
                pair = quantised.quantise(path, shape, leaf.dtype, lambda index, path=path: self.read(path, index))
            except ValueError as error:
                raise ValueError(f"{self.origins[path]}: {path}: {error}") from None
            arrays[path], arrays[scale] = jax.device_put(pair, (leaf.sharding, leaves[scale].sharding))
        return arrays


def _open_stores(directory) -> dict[str, ts.TensorStore]:
    """Return the arrays of any Orbax PyTree of parameters (zarr or zarr3, OCDBT or not), by parameter path."""
    path = absolute(directory) / PARAMS
    try:
        metadata = read_json(path / "_METADATA", kind=dict)
    except FileNotFoundError:
        raise ValueError(f"{path} contains no Orbax parameters") from None
    stores = {}
    for entry in metadata["tree_metadata"].values():
        keys = [k["key"] for k in entry["key_metadata"]]
        kvstore = {"driver": "file", "path": f"{path / '.'.join(keys)}/"}
        if metadata["use_ocdbt"]:
            base = {"driver": "file", "path": f"{path}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{'.'.join(keys)}/"}
        spec = {
            "driver": "zarr3" if metadata["use_zarr3"] else "zarr",
            "kvstore": kvstore,
            "fill_missing_data_reads": False,  # a lost chunk is an error, not zeros
        }
        stores["/".join(keys)] = ts.open(spec, open=True, read=True).result()
    return stores
