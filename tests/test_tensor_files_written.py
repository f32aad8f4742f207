"""Written files are read exactly by torch and safetensors; a failed write leaves no files."""

# ruff: noqa: F811 (fixtures that are imported)

import json
import os
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from tensor_arrays import ALL_DTYPES, Usage, arrays, assert_holds, infos_of, random_arrays, same_bits, saved  # noqa: F401

from radfm_jax.convert.tensor_files import TensorInfo, open_tensors, write_safetensors, write_torch_bin


def test_torch_reads_a_written_torch_file(tmp_path, arrays):
    path, done, calls = tmp_path / "x.bin", [], []
    arrays = {"head": arrays["block.bfloat16"]} | arrays
    ties = {"head": "block.bfloat16"}

    def read(name):
        calls.append(name)
        return arrays[name]

    write_torch_bin(path, infos_of(arrays), read, ties=ties, progress=done.append)
    assert calls == [name for name in arrays if name != "head"]
    assert sum(done) == sum(arrays[name].nbytes for name in calls)
    assert sorted(tmp_path.iterdir()) == [path]
    for mmap in (False, True):
        state = torch.load(path, weights_only=True, mmap=mmap)
        assert type(state) is OrderedDict and list(state) == list(arrays)
        for name, array in arrays.items():
            assert state[name].device.type == "cpu" and state[name].shape == array.shape
            assert state[name].dtype == getattr(torch, array.dtype.name)
            assert bytes(state[name].untyped_storage()) == array.tobytes()
        assert state["head"].data_ptr() == state["block.bfloat16"].data_ptr()
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    assert_holds(path, arrays)
    with open_tensors(path) as reader:
        assert reader.ties == {"block.bfloat16": "head"}
        positions = [reader._readers[name].args[2] for name in calls if arrays[name].nbytes]
    assert all(position % 64 == 0 for position in positions)


def test_written_torch_file_loads_into_a_module(tmp_path):
    module, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    arrays = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    write_torch_bin(tmp_path / "x.bin", infos_of(arrays), arrays.__getitem__)
    other.load_state_dict(torch.load(tmp_path / "x.bin", weights_only=True))
    assert torch.equal(module.weight, other.weight) and torch.equal(module.bias, other.bias)


def test_the_library_reads_written_safetensors(tmp_path):
    arrays, done = random_arrays(ALL_DTYPES), []
    arrays = {"Grüße": np.ones(3, np.float16)} | arrays
    write_safetensors(
        tmp_path / "new", infos_of(arrays), arrays.__getitem__, metadata={"by": "us"}, progress=done.append
    )
    path = tmp_path / "new" / "model.safetensors"
    assert sorted((tmp_path / "new").iterdir()) == [path]
    loaded = safetensors.numpy.load_file(path)
    assert loaded.keys() == arrays.keys() and all(same_bits(loaded[name], arrays[name]) for name in arrays)
    assert safetensors.torch.load_file(path)["block.bfloat16"].dtype == torch.bfloat16
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt", "by": "us"}
    assert sum(done) == sum(array.nbytes for array in arrays.values())
    with open_tensors(path) as reader:
        assert all(same_bits(reader.read(name), arrays[name]) for name in arrays)


def test_written_shards(tmp_path, arrays):
    write_safetensors(tmp_path, infos_of(arrays), arrays.__getitem__, max_shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 2
    assert files[-1] == f"model-{len(files):05}-of-{len(files):05}.safetensors"
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in arrays.values())
    assert list(index["weight_map"]) == list(arrays)
    sizes = {file: sum(a.nbytes for a in safetensors.numpy.load_file(tmp_path / file).values()) for file in files}
    assert all(size <= 100 or size == 120 for size in sizes.values()), "only float64 and int64 are larger than a shard"
    with open_tensors(tmp_path) as reader:
        assert reader.infos.keys() == arrays.keys()
        assert all(same_bits(reader.read(name), array) for name, array in arrays.items())


def test_round_trip_between_formats(tmp_path, saved, arrays):
    with open_tensors(saved) as reader:
        write_safetensors(tmp_path / "st", reader.infos, reader.read, max_shard_bytes=150)
    with open_tensors(tmp_path / "st") as reader:
        write_torch_bin(tmp_path / "back.bin", reader.infos, reader.read)
    with open_tensors(tmp_path / "back.bin") as reader:
        assert all(same_bits(reader.read(name), array) for name, array in arrays.items())


def _writers(folder: Path):
    return {
        "bin": lambda *args, **options: write_torch_bin(folder / "x.bin", *args, **options),
        "one": lambda *args, **options: write_safetensors(folder, *args, **options),
        "shards": lambda *args, **options: write_safetensors(folder, *args, max_shard_bytes=50, **options),
    }


@pytest.mark.parametrize("writer", ["bin", "one", "shards"])
@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_interrupted_write_leaves_nothing(tmp_path, arrays, writer, error):
    def read(name):
        if name == "block.float16":
            assert list(tmp_path.iterdir()), "the write must have started"
            raise error
        return arrays[name]

    with pytest.raises(type(error)):
        _writers(tmp_path)[writer](infos_of(arrays), read)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", ["bin", "one", "shards"])
def test_failing_rename_leaves_nothing(tmp_path, arrays, writer, monkeypatch):
    def replace(source, target, real=os.replace):
        if Path(target).name in ("x.bin", "model.safetensors", "model.safetensors.index.json"):
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no"):
        _writers(tmp_path)[writer](infos_of(arrays), arrays.__getitem__)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", ["bin", "one", "shards"])
@pytest.mark.parametrize("wrong", [np.zeros((2, 5), np.float16), np.zeros((3, 5), ml_dtypes.bfloat16)])
def test_values_must_match_the_announced_info(tmp_path, arrays, writer, wrong):
    with pytest.raises(ValueError, match="'block.float16' is float16"):
        _writers(tmp_path)[writer](infos_of(arrays), lambda name: wrong if name == "block.float16" else arrays[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "writer, existing",
    [
        ("bin", "x.bin"),
        ("one", "model.safetensors"),
        ("one", "model.safetensors.index.json"),
        ("shards", "model-00002-of-00009.safetensors"),
        ("shards", "model.safetensors"),
    ],
)
def test_existing_destination_is_refused(tmp_path, arrays, writer, existing):
    (tmp_path / existing).write_text("precious")
    with pytest.raises(ValueError, match=f"{existing} already exist"):
        _writers(tmp_path)[writer](infos_of(arrays), arrays.__getitem__)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(existing, "precious")]


@pytest.mark.parametrize("writer", ["bin", "one", "shards"])
def test_no_room_to_write(tmp_path, arrays, writer, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(9999, 9000, 999))
    with pytest.raises(ValueError, match=r"has 999 bytes free but [\d,]+ are needed"):
        _writers(tmp_path)[writer](infos_of(arrays), arrays.__getitem__)
    assert not list(tmp_path.iterdir())


def test_unsupported_dtypes_and_ties_are_refused(tmp_path):
    arrays = {"a": np.zeros(2, np.uint16), "b": np.zeros(2, np.complex64), "c": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match="'a': dtype uint16\n.*'b': dtype complex64"):
        write_torch_bin(tmp_path / "x.bin", infos_of(arrays), arrays.__getitem__)
    with pytest.raises(ValueError, match="cannot hold these tensors:\n  'b': dtype complex64\n"):
        write_safetensors(tmp_path, infos_of(arrays), arrays.__getitem__)
    infos = {name: TensorInfo((2,), np.dtype(np.float32)) for name in "abc"} | {"d": TensorInfo((), np.dtype(bool))}
    with pytest.raises(ValueError, match="'a' is tied to 'b'.*\n.*'b' is tied to 'd'.*\n.*'x' is tied to 'c'"):
        ties = {"a": "b", "b": "d", "x": "c"}
        write_torch_bin(tmp_path / "x.bin", infos, arrays.__getitem__, ties=ties)
    assert not list(tmp_path.iterdir())
