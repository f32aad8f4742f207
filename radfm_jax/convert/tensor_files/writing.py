"""Files that are whole or not there."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from radfm_jax.convert.tensor_files.base import TensorInfo


def values(path: Path, name: str, info: TensorInfo, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The values of a tensor as uint8[nbytes]: bfloat16 arrays have no buffer interface of their own."""
    array = np.asarray(read(name), order="C")
    if array.shape != info.shape or array.dtype != info.dtype:
        raise ValueError(
            f"{path}: {name!r} was announced as {info.dtype}{list(info.shape)} but read as "
            f"{array.dtype}{list(array.shape)}: correct the one or the other"
        )
    return array.reshape(-1).view(np.uint8)


def check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder} has {free:,} bytes free but {needed:,} are needed: free some or write elsewhere")


def refuse_existing(paths: Sequence[Path]) -> None:
    existing = [str(path) for path in paths if os.path.lexists(path)]
    if existing:
        raise ValueError(f"{', '.join(existing)} already exist(s): remove what is there or write elsewhere")


@contextlib.contextmanager
def all_or_nothing(paths: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Opens a temporary file beside each path; gives them their names, in order, when the block ends well."""
    refuse_existing(paths)
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    named: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "xb")) for path in temporary]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for source, path in zip(temporary, paths, strict=True):
            os.replace(source, path)
            named.append(path)
        folder = os.open(paths[0].parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        for path in (*temporary, *named):
            path.unlink(missing_ok=True)
        raise
