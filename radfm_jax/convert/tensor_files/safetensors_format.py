"""safetensors, read and written by position."""

import functools
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors

from radfm_jax.convert.tensor_files.base import DTYPES, Contents, Progress, TensorInfo, read_strided, refuse, row_major
from radfm_jax.convert.tensor_files.writing import all_or_nothing, check_room, refuse_existing, values


def open_safetensors(path: Path, file: BinaryIO) -> Contents:
    """Lets the library check the header and reads the values by position.

    The library itself either maps the file, whose resident pages then grow with every tensor, or reads a whole tensor
    for every part of one. The format has no gaps, so positions follow from sizes and order.
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
                readers[name] = functools.partial(read_strided, path, file, position, info.dtype, strides)
                position += info.nbytes
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): download or copy it again") from error
    refuse(path, "holds tensors of other dtypes", problems, f"convert them to one of {', '.join(DTYPES)}")
    assert position == path.stat().st_size, (position, path)
    return infos, {}, readers


def write_safetensors(
    directory: str | os.PathLike[str],
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int = 2**31,
    metadata: Mapping[str, str] | None = None,
    basename: str = "model",
    progress: Progress | None = None,
) -> None:
    """Writes `model.safetensors` or, beyond one shard, numbered shards and their index, in the memory of one tensor.

    The files appear under their names only when all are complete and on disk, the index last.

    Args:
      directory: the folder, made when missing.
      infos: name -> shape and dtype; shards are filled in this order.
      read: returns the values of a name; called once for each.
      max_shard_bytes: size of the tensors in a shard, which only a single larger tensor exceeds.
      metadata: texts to add to the header, beside {"format": "pt"}, without which transformers refuses the file.
      basename: "model" in `model-00001-of-00002.safetensors`.
      progress: called with the number of bytes just written.

    Raises:
      ValueError: files of this basename exist, the disk is too small, safetensors has no such dtype, or `read` returns
        another shape or dtype than announced.
    """
    directory = Path(directory)
    problems = [f"{name!r}: dtype {info.dtype}" for name, info in infos.items() if info.dtype.name not in DTYPES]
    refuse(directory, "cannot hold these tensors", problems, "convert them first")
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in infos.items():
        if shards[-1] and sum(i.nbytes for i in shards[-1].values()) + info.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = info
    index_path = directory / f"{basename}.safetensors.index.json"
    if len(shards) == 1:
        paths = [directory / f"{basename}.safetensors"]
    else:
        paths = [directory / f"{basename}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    # One kind beside the other would leave two sets of weights in the folder.
    rivals = [index_path, directory / f"{basename}.safetensors", *directory.glob(f"{basename}-?????-of-*.safetensors")]
    refuse_existing(rivals)
    total = sum(info.nbytes for info in infos.values())
    check_room(directory, total + sum(512 + 2 * len(name) for name in infos) + 4096 * len(shards))
    targets = paths if len(shards) == 1 else [*paths, index_path]
    with all_or_nothing(targets) as files:
        # The library writes a file from tensors that are all in memory; the format is short enough to stream.
        for path, file, shard in zip(paths, files, shards, strict=False):
            shard = dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize))  # keeps all values aligned
            file.write(_safetensors_header(shard, {"format": "pt", **(metadata or {})}))
            for name, info in shard.items():
                file.write(values(path, name, info, read))
                if progress:
                    progress(info.nbytes)
        if len(shards) > 1:
            weight_map = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            files[-1].write(json.dumps(index, indent=2).encode())


def _safetensors_header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length of the header (uint64, little-endian), then the header: JSON filled with spaces to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, info in infos.items():
        begin, end = end, end + info.nbytes
        header[name] = {"dtype": DTYPES[info.dtype.name][0], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
