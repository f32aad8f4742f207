"""The safetensors format, read and written one tensor at a time."""

import contextlib
import functools
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors

from input_pipeline.files import atomic_write
from radfm_jax.convert.tensor_files import base
from radfm_jax.convert.tensor_files.base import DTYPES, Contents, Progress, TensorInfo, reject, row_major


def open_safetensors(path: Path, file: BinaryIO) -> Contents:
    """Check the header with the library and read the values by position.

    The library either maps the file, so that resident memory grows with every tensor, or reads a whole tensor for each
    of its parts. The format has no gaps, so positions follow from sizes and order.
    """
    codes = {code: np.dtype(name) for name, (code, _) in DTYPES.items()}
    infos, readers, problems = {}, {}, []
    file.seek(0)
    position = 8 + int.from_bytes(file.read(8), "little")
    try:
        with safetensors.safe_open(path, framework="numpy", backend="pread") as header:
            for name in header.offset_keys():
                part = header.get_slice(name)
                if part.get_dtype() not in codes:
                    problems.append(f"{name!r}: dtype {part.get_dtype()}")
                    continue
                infos[name] = info = TensorInfo(tuple(part.get_shape()), codes[part.get_dtype()])
                strides = tuple(step * info.dtype.itemsize for step in row_major(info.shape))
                readers[name] = functools.partial(base.read_strided, path, file, position, info.dtype, strides)
                position += info.nbytes
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}): download or copy it again") from error
    reject(path, "has tensors of unsupported dtypes", problems, f"convert them to one of {', '.join(DTYPES)}")
    assert position == path.stat().st_size, (position, path)
    return infos, {}, readers


def write_safetensors(
    directory: str | os.PathLike[str],  # created if missing
    infos: Mapping[str, TensorInfo],  # shards are filled in this order
    read: Callable[[str], np.ndarray],  # called once per name
    *,
    max_shard_bytes: int = 2**31,  # maximum bytes of the tensors in a shard; a larger tensor gets a separate shard
    metadata: Mapping[str, str] | None = None,  # in addition to {"format": "pt"}, which transformers requires
    basename: str = "model",
    progress: Progress = lambda done: None,
) -> None:
    """Write `model.safetensors`, or numbered shards and their index, with one tensor in memory at a time.

    All files are temporary until the last one is written, then they are synced and renamed.

    Raises:
      ValueError: files of this basename exist, the disk is too small, safetensors does not support a dtype, or `read`
        returns another shape or dtype than `infos`.
    """
    directory = Path(directory)
    problems = [f"{name!r}: dtype {info.dtype}" for name, info in infos.items() if info.dtype.name not in DTYPES]
    reject(directory, "cannot hold these tensors", problems, "convert them first")
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in infos.items():
        if shards[-1] and sum(i.nbytes for i in shards[-1].values()) + info.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = info
    index_path, single = (directory / f"{basename}.safetensors{suffix}" for suffix in (".index.json", ""))
    numbered = [directory / f"{basename}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    paths = numbered if len(shards) > 1 else [single]
    # A folder with both a single file and shards would have two sets of weights.
    base.refuse_existing([index_path, single, *directory.glob(f"{basename}-?????-of-*.safetensors")])
    total = sum(info.nbytes for info in infos.values())
    base.check_room(directory, total + sum(512 + 2 * len(name) for name in infos) + 4096 * len(shards))
    with contextlib.ExitStack() as stack:
        for path, shard in zip(paths, shards, strict=True):
            # Stream the tensors: the library would need all of them in memory. This order keeps all values aligned.
            ordered = dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize))
            with open(stack.enter_context(atomic_write(path)), "wb") as file:
                file.write(_header(ordered, {"format": "pt", **(metadata or {})}))
                for name, info in ordered.items():
                    file.write(base.values(path, name, info, read))
                    progress(info.nbytes)
        if len(shards) > 1:
            weight_map = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            stack.enter_context(atomic_write(index_path)).write_text(json.dumps(index, indent=2))


def _header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Return the length of the header (uint64, little-endian) and the header: JSON, padded to a multiple of 8 bytes."""
    header, end = {"__metadata__": dict(metadata)}, 0
    for name, info in infos.items():
        start, end = end, end + info.nbytes
        header[name] = {"dtype": DTYPES[info.dtype.name][0], "shape": list(info.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
