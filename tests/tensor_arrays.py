"""Arrays of every dtype, files of them written by torch and safetensors, and exact comparisons."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from radfm_jax.convert.tensor_files import TensorInfo, open_tensors

TORCH_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
ALL_DTYPES = (*TORCH_DTYPES, "uint16", "uint32", "uint64")
Usage = namedtuple("Usage", "total used free")


def random_arrays(dtypes=TORCH_DTYPES) -> dict[str, np.ndarray]:
    """Return one array per dtype with random bits (including NaN payloads), a scalar and an empty array."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name in dtypes:
        dtype = np.dtype(name)
        bits = rng.integers(0, 2 if name == "bool" else 256, (3, 5 * dtype.itemsize), np.uint8)
        arrays[f"block.{name}"] = bits.view(dtype)
    return arrays | {"scalar": np.array(7, np.int64), "empty": np.zeros((0, 4), np.float32)}


def infos_of(arrays: dict[str, np.ndarray]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}


def tensor_of(array: np.ndarray) -> torch.Tensor:
    tensor = torch.empty(array.shape, dtype=getattr(torch, array.dtype.name))
    if array.size:
        tensor.view(-1).view(torch.uint8)[:] = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return tensor


def state_of(arrays: dict[str, np.ndarray]) -> OrderedDict:
    return OrderedDict((name, tensor_of(array)) for name, array in arrays.items())


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def assert_holds(path: Path, arrays: dict[str, np.ndarray], **options) -> None:
    with open_tensors(path, **options) as reader:
        assert reader.infos.keys() == arrays.keys()
        for name, array in arrays.items():
            values = reader.read(name)
            assert same_bits(values, array), name
            assert values.flags.c_contiguous and values.flags.writeable
            assert reader.infos[name] == TensorInfo(array.shape, array.dtype)
            assert reader.infos[name].nbytes == array.nbytes


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return random_arrays()


@pytest.fixture
def saved(tmp_path, arrays) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save(state_of(arrays), path)
    return path


def write_shards(folder: Path, arrays: dict[str, np.ndarray], form: str) -> Path:
    """Write arrays alternately to two shards and return the path of the index."""
    stem, weight_map = ("model", {}) if form == "safetensors" else ("pytorch_model", {})
    for part in range(2):
        shard = {name: array for i, (name, array) in enumerate(arrays.items()) if i % 2 == part}
        file = f"{stem}-0000{part + 1}-of-00002.{form}"
        weight_map |= dict.fromkeys(shard, file)
        if form == "safetensors":
            safetensors.numpy.save_file(shard, folder / file)
        else:
            torch.save(state_of(shard), folder / file)
    index = folder / f"{stem}.{form}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index
