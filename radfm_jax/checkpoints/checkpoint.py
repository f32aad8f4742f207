"""Checkpoint directories: Orbax parameters with all that is needed to use them, committed by a manifest.

DIR/radfm.json           what it is: which part, model sizes, dtypes, where it came from, versions
DIR/params/              the parameters, an Orbax PyTree; layers of a stack lie along the first axis
DIR/tokenizer.model      the SentencePiece model, if one is known
DIR/unused.safetensors   tensors of a released file that no part of the model reads (convert --unused keep)
DIR/manifest.json        size and SHA-256 of every other file, written last: it is the commit mark
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path

import absl.logging
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from radfm_jax.models import radfm

DESCRIPTION, MANIFEST, PARAMS, TOKENIZER = "radfm.json", "manifest.json", "params", "tokenizer.model"
UNUSED = "unused.safetensors"
# Tokenizer files of Hugging Face folders, for language models that have no SentencePiece model.
TOKENIZERS = (TOKENIZER, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
BESIDE = (*TOKENIZERS, UNUSED)
FORMAT = 1
CHUNK_BYTES = 32 * 2**20
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


# --- the directory ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def new_directory(path, *, manifest: bool = True) -> Iterator[Path]:
    """A directory that appears whole or not at all: it is filled under a hidden name beside `path`, gets its manifest
    (an export for other programs does without), and is renamed. Whatever interrupts that, nothing of the name `path`
    exists.

    Raises ValueError if `path` exists or cannot be made.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ValueError(f"{path} exists: choose another name or remove it first")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    except OSError as e:
        raise ValueError(f"cannot write beside {path}: {e.strerror or e}") from e
    try:
        yield partial
        if manifest:
            write_manifest(partial)
        os.chmod(partial, 0o777 & ~_umask())  # mkdtemp makes it private
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def absolute(path) -> Path:
    """Also without `..`, which tensorstore refuses."""
    return Path(os.path.abspath(path))


def require_space(path, need: int, what: str) -> None:
    """Raises ValueError if the disk of `path` has less than `need` bytes free."""
    path = Path(path).absolute()
    existing = next(p for p in (path, *path.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < need:
        raise ValueError(f"{what} needs {need / 1e9:.2f} GB, but the disk of {existing} has {free / 1e9:.2f} GB free")


def write_manifest(directory: Path) -> None:
    files = {str(p.relative_to(directory)): p for p in sorted(directory.rglob("*")) if p.is_file()}
    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashlib lets go of the interpreter lock
        hashes = list(pool.map(_sha256, files.values()))
    entries = {
        name: {"bytes": p.stat().st_size, "sha256": h} for (name, p), h in zip(files.items(), hashes, strict=True)
    }
    with open(directory / MANIFEST, "w") as f:
        json.dump({"format": FORMAT, "files": entries}, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def _sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def verify(directory, *, hashes: bool = True, spared: Collection[str] = ()) -> None:
    """Compares a directory with its manifest; ValueError lists every file that is missing, added or changed, and how a
    file can be had again that is made elsewhere.

    `hashes=False` compares names and sizes only (a moment instead of a read of everything). `spared` files may be
    missing.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a directory: expected a checkpoint directory of radfm_jax")
    try:
        listed = json.loads((directory / MANIFEST).read_text())["files"]
        listed = {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in listed.items()}
    except FileNotFoundError:
        raise ValueError(
            f"{directory} has no {MANIFEST}: it is no checkpoint directory of radfm_jax, or its writing was interrupted"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{directory / MANIFEST} is damaged: {e!r}") from None
    found = {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file()}
    # File browsers leave hidden files behind; nothing here reads one.
    found = {n: p for n, p in found.items() if n in listed or not Path(n).name.startswith(".")}
    found.pop(MANIFEST)
    problems = [f"missing: {n}" for n in sorted(listed.keys() - found.keys()) if n not in spared]
    problems += [f"not in the manifest: {n}" for n in sorted(found.keys() - listed.keys())]
    both = sorted(listed.keys() & found.keys())
    sized = [n for n in both if found[n].stat().st_size == listed[n]["bytes"]]
    problems += [f"size differs: {n}" for n in both if n not in set(sized)]
    if hashes:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            actual = zip(sized, pool.map(lambda n: _sha256(found[n]), sized), strict=True)
            problems += [f"content differs: {n}" for n, sha256 in actual if sha256 != listed[n]["sha256"]]
    if problems:
        remedies = _remedies(directory, listed)
        lines = [problem + remedies.get(problem.partition(": ")[2], "") for problem in problems]
        raise ValueError(f"checkpoint {directory} is damaged:\n  " + "\n  ".join(lines))


def digest(directory) -> str:
    """What tells the parameters of a checkpoint from others, wherever they lie: a SHA-256 over those of their files."""
    files = json.loads((Path(directory) / MANIFEST).read_text())["files"]
    of_params = {name: entry["sha256"] for name, entry in sorted(files.items()) if name.startswith(f"{PARAMS}/")}
    return hashlib.sha256(json.dumps(of_params).encode()).hexdigest()


def _remedies(directory: Path, listed: dict[str, dict]) -> dict[str, str]:
    """File -> how it is to be had again, for those that lie elsewhere too."""
    if entry := listed.get(TOKENIZER):
        tokenizer = (
            f": copy the SentencePiece model of {entry['bytes']:,} bytes, SHA-256 {entry['sha256']}, to "
            f"{directory / TOKENIZER}, or name it: --tokenizer FILE, in Python load(..., tokenizer=FILE). Every step "
            "of a run has the same; training was given it as data.tokenizer, conversion as --tokenizer or beside the "
            "weights"
        )
    else:
        tokenizer = (
            ": the checkpoint was made without one. Keep the file elsewhere and name it: --tokenizer FILE, in Python "
            "load(..., tokenizer=FILE)"
        )
    description = (
        f": copy it to {directory / DESCRIPTION} from where the directory came from. Nothing else says how large the "
        "model is; without a copy convert the weights again, or use another step of the run"
    )
    return {TOKENIZER: tokenizer, DESCRIPTION: description}


def write_description(directory: Path, part: str, model: dict, **facts) -> None:
    """`part` is `radfm`, or `llama` for a language model alone; `model` holds that part's sizes, of which only what
    describes the weights is written, not how somebody computed with them."""
    how = ("dtype", "param_dtype", "remat", "attention")
    model = {name: {k: v for k, v in sizes.items() if k not in how} for name, sizes in model.items()}
    versions = {p: importlib.metadata.version(p) for p in ("jax", "flax", "orbax-checkpoint", "numpy")}
    description = {"format": FORMAT, "part": part, "model": model, **facts, "versions": versions}
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=1))


def read_description(directory) -> dict:
    """The contents of radfm.json. Raises ValueError if it is absent, damaged or of a newer format."""
    path = Path(directory) / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        known = description["format"], description["part"], description["model"]
    except FileNotFoundError:
        raise ValueError(f"{directory} has no {DESCRIPTION}: it is not a checkpoint directory of radfm_jax") from None
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged: {e}") from None
    if known[0] != FORMAT:
        raise ValueError(f"{path} has format {known[0]}, this version reads format {FORMAT}: update radfm_jax")
    return description


def model_config(description: dict, directory) -> radfm.RadFMConfig:
    """Sizes of a whole RadFM. Raises ValueError for a checkpoint of the language model alone."""
    if description["part"] != "radfm":
        raise ValueError(
            f"{directory} holds only the part {description['part']!r}; it can initialise a RadFM, but it is not one"
        )
    return radfm.RadFMConfig.from_dict(description["model"])


# --- parameters, whole ------------------------------------------------------------------------------------------------


def save_params(directory: Path, params: dict) -> None:
    """Writes a tree of arrays with Orbax; sharded arrays are written by the processes that hold them."""
    args = jax.tree.map(lambda x: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), params)
    _orbax_save(directory, params, args)


def _orbax_save(directory: Path, params: dict, save_args: dict | None = None) -> None:
    verbosity = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax warns that it skips a merge that there is no need for
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)) as checkpointer:
            checkpointer.save(absolute(directory) / PARAMS, args=ocp.args.PyTreeSave(params, save_args=save_args))
    finally:
        absl.logging.set_verbosity(verbosity)


def restore_params(directory, abstract: dict, shardings: dict | None = None, *, partial: bool = False) -> dict:
    """Reads parameters onto any mesh.

    Args:
      abstract: tree of jax.ShapeDtypeStruct; the dtypes are those wanted, whatever the file holds.
      shardings: tree of shardings, or None for the default device.
      partial: there may be more in the file than is asked for.
    Raises:
      ValueError: lists every parameter that is missing, unexpected or of another shape.
    """
    wanted, found = {k: v.shape for k, v in flatten(abstract).items()}, ParamReader(directory).shapes
    check_shapes(wanted, {k: v for k, v in found.items() if k in wanted or not partial}, directory)
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: one_device, abstract) if shardings is None else shardings
    args = jax.tree.map(
        lambda x, s: ocp.ArrayRestoreArgs(sharding=s, global_shape=x.shape, dtype=x.dtype), abstract, shardings
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        path = absolute(directory) / PARAMS
        asked = ocp.args.PyTreeRestore(item=abstract, restore_args=args, partial_restore=partial)
        return checkpointer.restore(path, args=asked)


def check_shapes(wanted: dict[str, tuple], found: dict[str, tuple], where) -> None:
    """Raises ValueError listing every difference between two {parameter path: shape}."""
    problems = [f"missing: {k} {v}" for k, v in wanted.items() if k not in found]
    problems += [f"unexpected: {k} {v}" for k, v in found.items() if k not in wanted]
    problems += [
        f"shape of {k}: {found[k]}, expected {wanted[k]}" for k in wanted if found.get(k, wanted[k]) != tuple(wanted[k])
    ]
    if problems:
        raise ValueError(f"parameters of {where} do not fit the model:\n  " + "\n  ".join(problems))


def flatten(tree: dict) -> dict:
    """{'llama/blocks/query/kernel': leaf}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(leaves: dict) -> dict:
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


# --- parameters, a slice at a time ------------------------------------------------------------------------------------


class ParamWriter:
    """Writes an Orbax PyTree slice by slice, so that a stack of 40 layers never lies in memory.

    Orbax writes whole arrays only. Here it writes the tree with placeholders; each array is then created anew with its
    real shape through tensorstore, which is what Orbax reads with. Chunks are layers (cut where larger than 32 MiB) and
    carry a CRC32C.
    """

    def __init__(self, directory: Path, shapes: dict[str, tuple[tuple[int, ...], np.dtype]], stacked: set[str]):
        path = absolute(directory) / PARAMS
        placeholders = unflatten({k: np.zeros((1,) * len(shape), dtype) for k, (shape, dtype) in shapes.items()})
        _orbax_save(directory, placeholders)
        self._stores = {}
        for name, (shape, dtype) in shapes.items():
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{path / name.replace('/', '.')}/"},
                "metadata": {
                    "shape": shape,
                    "data_type": np.dtype(dtype).name,
                    "chunk_grid": {
                        "name": "regular",
                        "configuration": {"chunk_shape": _chunk_shape(shape, dtype, name in stacked)},
                    },
                    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
                },
            }
            # Zeros are written too: Orbax takes an absent chunk for a lost one.
            spec["store_data_equal_to_fill_value"] = True
            self._stores[name] = ts.open(spec, create=True, delete_existing=True).result()

    def write(self, name: str, value: np.ndarray, index: tuple = ()) -> None:
        """Writes `value` at parameter[index]; an index is a layer, a slice of rows, or nothing for the whole."""
        store = self._stores[name]
        store[index or ...].write(value).result()


def _chunk_shape(shape, dtype, stacked: bool) -> list[int]:
    chunk = [1, *shape[1:]] if stacked else list(shape)
    while np.prod(chunk, dtype=np.int64) * np.dtype(dtype).itemsize > CHUNK_BYTES:
        axis = int(np.argmax(chunk))
        chunk[axis] = -(-chunk[axis] // 2)
    return chunk


class ParamReader:
    """Reads single parameters, or slices of them, of any Orbax PyTree (zarr or zarr3, OCDBT or not)."""

    def __init__(self, directory):
        path = absolute(directory) / PARAMS
        try:
            metadata = json.loads((path / "_METADATA").read_text())
        except FileNotFoundError:
            raise ValueError(f"{path} holds no Orbax parameters") from None
        self._stores = {}
        for entry in metadata["tree_metadata"].values():
            keys = [k["key"] for k in entry["key_metadata"]]
            file = {"driver": "file", "path": f"{path}/"}
            if metadata["use_ocdbt"]:
                kvstore = {"driver": "ocdbt", "base": file, "path": f"{'.'.join(keys)}/"}
            else:
                kvstore = {**file, "path": f"{path / '.'.join(keys)}/"}
            spec = {"driver": "zarr3" if metadata["use_zarr3"] else "zarr", "kvstore": kvstore}
            spec["fill_missing_data_reads"] = False  # a lost chunk is an error, not zeros
            self._stores["/".join(keys)] = ts.open(spec, open=True, read=True).result()
        self.shapes = {k: tuple(v.shape) for k, v in self._stores.items()}
        self.dtypes = {k: v.dtype.numpy_dtype for k, v in self._stores.items()}

    def read(self, name: str, index: tuple = ()) -> np.ndarray:
        return self._stores[name][index or ...].read().result()


def bytes_of(shapes: dict[str, tuple[tuple[int, ...], np.dtype]]) -> int:
    return sum(int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize for shape, dtype in shapes.values())
