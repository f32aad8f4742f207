"""Common to all formats: descriptions of unread tensors, reading a part of one, and checks before writing."""

import contextlib
import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy and, through it, with safetensors)
import numpy as np

# dtype in numpy and torch -> (code in safetensors, storage class in torch).
DTYPES = {
    "bool": ("BOOL", "BoolStorage"), "uint8": ("U8", "ByteStorage"), "int8": ("I8", "CharStorage"),
    "int16": ("I16", "ShortStorage"), "int32": ("I32", "IntStorage"), "int64": ("I64", "LongStorage"),
    "uint16": ("U16", None), "uint32": ("U32", None), "uint64": ("U64", None),
    "float16": ("F16", "HalfStorage"), "bfloat16": ("BF16", "BFloat16Storage"),
    "float32": ("F32", "FloatStorage"), "float64": ("F64", "DoubleStorage"),
}  # fmt: skip

Index = tuple[slice, ...]
Progress = Callable[[int], object]  # called with a number of bytes just processed


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of an unread tensor; bfloat16 is the dtype of ml_dtypes."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# Content of a file: infos, ties, and for each name a function that reads a part of the tensor.
Contents = tuple[dict[str, TensorInfo], dict[str, str], dict[str, Callable[[Index], np.ndarray]]]


@dataclasses.dataclass(eq=False)
class TensorReader(contextlib.AbstractContextManager["TensorReader"]):
    """The tensors of a file or folder, read one at a time. Not thread-safe."""

    path: Path  # the opened file; for a sharded folder, its index
    infos: dict[str, TensorInfo]  # every tensor by name, in file order, tied ones included
    ties: dict[str, str]  # name -> first name with the same storage, offset and shape, in torch's format
    _readers: dict[str, Callable[[Index], np.ndarray]]
    _resources: contextlib.ExitStack

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Return a tensor, or the part selected by `index`, as a contiguous array with its own memory.

        Args:
          index: slices of step 1 for the leading axes, as `jax.make_array_from_callback` passes them; None for all.
        Raises:
          ValueError: no such tensor, or an unsupported index.
        """
        if name not in self.infos:
            raise ValueError(f"{self.path} has no tensor {name!r}: `infos` lists its {len(self.infos)} tensors")
        shape, index = self.infos[name].shape, index or ()
        if len(index) > len(shape) or not all(isinstance(part, slice) and part.step in (None, 1) for part in index):
            raise ValueError(f"{self.path}: {name} of shape {shape} cannot be read at {index}: pass slices of step 1")
        bounds = [part.indices(size) for part, size in zip(index, shape, strict=False)]
        bounds += [(0, size, 1) for size in shape[len(index) :]]
        return self._readers[name](tuple(slice(start, max(start, stop)) for start, stop, _ in bounds))

    def rename(self, names: Mapping[str, str]) -> None:
        """Replace the names of all tensors: {name in the file: new name}, with different new names."""
        self.infos = {names[name]: info for name, info in self.infos.items()}
        self.ties = {names[name]: names[owner] for name, owner in self.ties.items()}
        self._readers = {names[name]: read for name, read in self._readers.items()}

    def close(self) -> None:
        self._resources.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_strided(
    path: Path, file: BinaryIO, position: int, dtype: np.dtype, strides: tuple[int, ...], index: Index
) -> np.ndarray:
    """Read a part of a (possibly strided) tensor; `position` in the file and `strides` are in bytes."""
    shape = tuple(part.stop - part.start for part in index)
    if 0 in shape:
        return np.empty(shape, dtype)
    start = position + sum(part.start * stride for part, stride in zip(index, strides, strict=True))
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + dtype.itemsize
    buffer = np.empty(span, np.uint8)
    file.seek(start)
    if file.readinto(buffer) != span:
        raise ValueError(f"{path} ended before byte {start + span:,}: it was cut since it was opened; copy it again")
    return np.asarray(np.ndarray(shape, dtype, buffer, strides=strides), order="C")


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the strides of a contiguous array, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def reject(path: Path, summary: str, problems: Sequence[str], remedy: str) -> None:
    """Raise one ValueError that lists all problems, if there are any."""
    if problems:
        raise ValueError(f"{path} {summary}:\n  " + "\n  ".join(problems) + f"\nRemedy: {remedy}.")


def values(path: Path, name: str, info: TensorInfo, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return the values of a tensor as uint8[nbytes], because bfloat16 arrays have no buffer interface."""
    array = np.asarray(read(name), order="C")
    if array.shape != info.shape or array.dtype != info.dtype:
        raise ValueError(
            f"{path}: {name!r} is {info.dtype}{list(info.shape)} in `infos`, but `read` returned "
            f"{array.dtype}{list(array.shape)}: make them agree"
        )
    return array.reshape(-1).view(np.uint8)


def check_room(folder: Path, needed: int) -> None:
    """Raise ValueError if the disk of a folder has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder} has {free:,} bytes free but {needed:,} are needed: free some or write elsewhere")


def refuse_existing(paths: Sequence[Path]) -> None:
    """Raise ValueError if any of the paths exists."""
    if existing := [str(path) for path in paths if os.path.lexists(path)]:
        raise ValueError(f"{', '.join(existing)} already exist: remove them, or write elsewhere")
