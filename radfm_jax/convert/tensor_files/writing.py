"""Checks before and during the writing of tensors."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from radfm_jax.convert.tensor_files.base import TensorInfo


def values(path: Path, name: str, info: TensorInfo, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """Return the values of a tensor as uint8[nbytes], because bfloat16 arrays have no buffer interface."""
    array = np.asarray(read(name), order="C")
    if array.shape != info.shape or array.dtype != info.dtype:
        raise ValueError(
            f"{path}: {name!r} was announced as {info.dtype}{list(info.shape)} but read as "
            f"{array.dtype}{list(array.shape)}: `infos` and `read` must agree"
        )
    return array.reshape(-1).view(np.uint8)


def check_room(folder: Path, needed: int) -> None:
    """Raise ValueError if the disk of a folder has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder} has {free:,} bytes free but {needed:,} are needed: free some or write elsewhere")


def refuse_existing(paths: Sequence[Path]) -> None:
    """Raise ValueError if any of the paths exists."""
    existing = [str(path) for path in paths if os.path.lexists(path)]
    if existing:
        raise ValueError(f"{', '.join(existing)} already exist(s): remove what is there or write elsewhere")
