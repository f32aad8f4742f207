"""Weight files are read and written bit for bit, in little memory, and never when damaged or hostile."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict, namedtuple
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from radfm_jax.convert.tensor_files import TensorInfo, open_tensors, write_safetensors, write_torch_bin

TORCH_DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
ALL_DTYPES = (*TORCH_DTYPES, "uint16", "uint32", "uint64")
Usage = namedtuple("Usage", "total used free")


def _arrays(dtypes=TORCH_DTYPES) -> dict[str, np.ndarray]:
    """One array of each dtype with all bits random (NaN payloads included), a scalar and an empty one."""
    rng = np.random.default_rng(0)
    arrays = {}
    for name in dtypes:
        dtype = np.dtype(name)
        bits = rng.integers(0, 2 if name == "bool" else 256, (3, 5 * dtype.itemsize), np.uint8)
        arrays[f"block.{name}"] = bits.view(dtype)
    return arrays | {"scalar": np.array(7, np.int64), "empty": np.zeros((0, 4), np.float32)}


def _infos(arrays: dict[str, np.ndarray]) -> dict[str, TensorInfo]:
    return {name: TensorInfo(array.shape, array.dtype) for name, array in arrays.items()}


def _tensor(array: np.ndarray) -> torch.Tensor:
    tensor = torch.empty(array.shape, dtype=getattr(torch, array.dtype.name))
    if array.size:
        tensor.view(-1).view(torch.uint8)[:] = torch.from_numpy(array.reshape(-1).view(np.uint8))
    return tensor


def _state(arrays: dict[str, np.ndarray]) -> OrderedDict:
    return OrderedDict((name, _tensor(array)) for name, array in arrays.items())


def _same_bits(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes()


def _assert_holds(path: Path, arrays: dict[str, np.ndarray], **options) -> None:
    with open_tensors(path, **options) as reader:
        assert reader.infos.keys() == arrays.keys()
        for name, array in arrays.items():
            values = reader.read(name)
            assert _same_bits(values, array), name
            assert values.flags.c_contiguous and values.flags.writeable
            assert reader.infos[name] == TensorInfo(array.shape, array.dtype)
            assert reader.infos[name].nbytes == array.nbytes


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    return _arrays()


@pytest.fixture
def saved(tmp_path, arrays) -> Path:
    path = tmp_path / "pytorch_model.bin"
    torch.save(_state(arrays), path)
    return path


# ---- reading what others write ---------------------------------------------------------------------------------------


def test_reads_torch_file(saved, arrays):
    done = []
    _assert_holds(saved, arrays, progress=done.append)
    assert sum(array.nbytes for array in arrays.values()) < sum(done) < saved.stat().st_size
    _assert_holds(saved.parent, arrays)
    _assert_holds(saved, arrays, verify=False)


def test_reads_every_dtype_of_safetensors(tmp_path):
    arrays = _arrays(ALL_DTYPES)
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    _assert_holds(tmp_path / "model.safetensors", arrays)
    _assert_holds(tmp_path, arrays)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_reads_parts(tmp_path, form):
    array = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    if form == "bin":
        torch.save({"a": _tensor(array), "t": _tensor(array).permute(2, 0, 1)}, tmp_path / "x.bin")
    else:
        transposed = np.ascontiguousarray(array.transpose(2, 0, 1))
        safetensors.numpy.save_file({"a": array, "t": transposed}, tmp_path / "x.safetensors")
    indices = [(), (slice(1, 3),), (slice(None), slice(-2, None)), (slice(3, 1),), (slice(0, 9), slice(2, 3), slice(1))]
    with open_tensors(tmp_path / f"x.{form}") as reader:
        for index in indices:
            for name, whole in (("a", array), ("t", array.transpose(2, 0, 1))):
                part = reader.read(name, index)
                assert _same_bits(part, whole[index]) and part.flags.c_contiguous
        for index in [(1,), (slice(0, 4, 2),), (slice(None),) * 4]:
            with pytest.raises(ValueError, match="slices of step 1"):
                reader.read("a", index)
        with pytest.raises(ValueError, match="no tensor 'b'"):
            reader.read("b")


def test_reads_ties_and_views_of_one_storage(tmp_path):
    table = torch.randn(6, 4)
    row = table[2]
    state = {"emb": table, "head": table, "same": table.view(6, 4), "row": row, "t": table.t(), "step": table[::2, 1:3]}
    torch.save(state, tmp_path / "x.bin")
    with open_tensors(tmp_path / "x.bin") as reader:
        assert reader.ties == {"head": "emb", "same": "emb"}
        assert list(reader.infos) == list(state)
        for name, tensor in state.items():
            assert _same_bits(reader.read(name), tensor.contiguous().numpy())


def test_reads_parameters_and_metadata_of_a_module(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(OrderedDict(module.state_dict(keep_vars=True)), tmp_path / "x.bin")
    _assert_holds(tmp_path / "x.bin", {name: t.detach().numpy() for name, t in module.state_dict().items()})


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "../RadFM/pytorch_model.bin", "/etc/pytorch_model.bin"])
def test_reads_wrapped_zip(tmp_path, saved, arrays, compression, name):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with zipfile.ZipFile(tmp_path / "release.zip", "w", compression) as archive:
        archive.writestr("README.txt", "weights")
        archive.writestr("__MACOSX/._pytorch_model.bin", "")
        archive.write(saved, name)
    before = sorted(tmp_path.rglob("*"))
    with open_tensors(tmp_path / "release.zip", scratch=scratch) as reader:
        assert _same_bits(reader.read("block.float32"), arrays["block.float32"])
        assert sorted(tmp_path.rglob("*")) == before, "the unpacked file has no name"
    _assert_holds(tmp_path / "release.zip", arrays)


def _shard(folder: Path, arrays: dict[str, np.ndarray], form: str) -> Path:
    """Writes arrays in two shards by turns; returns the index."""
    stem, weight_map = ("model", {}) if form == "safetensors" else ("pytorch_model", {})
    for part in range(2):
        shard = {name: array for i, (name, array) in enumerate(arrays.items()) if i % 2 == part}
        file = f"{stem}-0000{part + 1}-of-00002.{form}"
        weight_map |= dict.fromkeys(shard, file)
        if form == "safetensors":
            safetensors.numpy.save_file(shard, folder / file)
        else:
            torch.save(_state(shard), folder / file)
    index = folder / f"{stem}.{form}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_reads_shards(tmp_path, arrays, form):
    index = _shard(tmp_path, arrays, form)
    _assert_holds(index, arrays)
    _assert_holds(tmp_path, arrays)


# ---- writing ---------------------------------------------------------------------------------------------------------


def test_written_torch_file_is_torchs(tmp_path, arrays):
    path, done, calls = tmp_path / "x.bin", [], []
    arrays = {"head": arrays["block.bfloat16"]} | arrays
    ties = {"head": "block.bfloat16"}

    def read(name):
        calls.append(name)
        return arrays[name]

    write_torch_bin(path, _infos(arrays), read, ties=ties, progress=done.append)
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
    _assert_holds(path, arrays)
    with open_tensors(path) as reader:
        assert reader.ties == {"block.bfloat16": "head"}
        places = [reader._readers[name].args[2] for name in calls if arrays[name].nbytes]
    assert all(place % 64 == 0 for place in places)


def test_written_torch_file_loads_into_a_module(tmp_path):
    module, other = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    arrays = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    write_torch_bin(tmp_path / "x.bin", _infos(arrays), arrays.__getitem__)
    other.load_state_dict(torch.load(tmp_path / "x.bin", weights_only=True))
    assert torch.equal(module.weight, other.weight) and torch.equal(module.bias, other.bias)


def test_written_safetensors_are_the_librarys(tmp_path):
    arrays, done = _arrays(ALL_DTYPES), []
    arrays = {"Grüße": np.ones(3, np.float16)} | arrays
    write_safetensors(tmp_path / "new", _infos(arrays), arrays.__getitem__, metadata={"by": "us"}, progress=done.append)
    path = tmp_path / "new" / "model.safetensors"
    assert sorted((tmp_path / "new").iterdir()) == [path]
    loaded = safetensors.numpy.load_file(path)
    assert loaded.keys() == arrays.keys() and all(_same_bits(loaded[name], arrays[name]) for name in arrays)
    assert safetensors.torch.load_file(path)["block.bfloat16"].dtype == torch.bfloat16
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"format": "pt", "by": "us"}
    assert sum(done) == sum(array.nbytes for array in arrays.values())
    with open_tensors(path) as reader:
        assert all(_same_bits(reader.read(name), arrays[name]) for name in arrays)


def test_written_shards(tmp_path, arrays):
    write_safetensors(tmp_path, _infos(arrays), arrays.__getitem__, max_shard_bytes=100)
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
        assert all(_same_bits(reader.read(name), array) for name, array in arrays.items())


def test_from_one_form_to_the_other_and_back(tmp_path, saved, arrays):
    with open_tensors(saved) as reader:
        write_safetensors(tmp_path / "st", reader.infos, reader.read, max_shard_bytes=150)
    with open_tensors(tmp_path / "st") as reader:
        write_torch_bin(tmp_path / "back.bin", reader.infos, reader.read)
    with open_tensors(tmp_path / "back.bin") as reader:
        assert all(_same_bits(reader.read(name), array) for name, array in arrays.items())


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
            assert list(tmp_path.iterdir()), "the write has begun"
            raise error
        return arrays[name]

    with pytest.raises(type(error)):
        _writers(tmp_path)[writer](_infos(arrays), read)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", ["bin", "one", "shards"])
def test_failing_rename_leaves_nothing(tmp_path, arrays, writer, monkeypatch):
    def replace(source, target, real=os.replace):
        if Path(target).name in ("x.bin", "model.safetensors", "model.safetensors.index.json"):
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="no"):
        _writers(tmp_path)[writer](_infos(arrays), arrays.__getitem__)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writer", ["bin", "one", "shards"])
@pytest.mark.parametrize("wrong", [np.zeros((2, 5), np.float16), np.zeros((3, 5), ml_dtypes.bfloat16)])
def test_values_unlike_announced_are_refused(tmp_path, arrays, writer, wrong):
    with pytest.raises(ValueError, match="'block.float16' was announced as float16"):
        _writers(tmp_path)[writer](_infos(arrays), lambda name: wrong if name == "block.float16" else arrays[name])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "writer, there",
    [
        ("bin", "x.bin"),
        ("one", "model.safetensors"),
        ("one", "model.safetensors.index.json"),
        ("shards", "model-00002-of-00009.safetensors"),
        ("shards", "model.safetensors"),
    ],
)
def test_existing_destination_is_refused(tmp_path, arrays, writer, there):
    (tmp_path / there).write_text("precious")
    with pytest.raises(ValueError, match=f"{there} already exist"):
        _writers(tmp_path)[writer](_infos(arrays), arrays.__getitem__)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [(there, "precious")]


@pytest.mark.parametrize("writer", ["bin", "one", "shards"])
def test_no_room_to_write(tmp_path, arrays, writer, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(9999, 9000, 999))
    with pytest.raises(ValueError, match=r"has 999 bytes free but [\d,]+ are needed"):
        _writers(tmp_path)[writer](_infos(arrays), arrays.__getitem__)
    assert not list(tmp_path.iterdir())


def test_tensors_that_a_form_cannot_hold(tmp_path):
    arrays = {"a": np.zeros(2, np.uint16), "b": np.zeros(2, np.complex64), "c": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match="'a': dtype uint16\n.*'b': dtype complex64"):
        write_torch_bin(tmp_path / "x.bin", _infos(arrays), arrays.__getitem__)
    with pytest.raises(ValueError, match="cannot hold these tensors:\n  'b': dtype complex64\n"):
        write_safetensors(tmp_path, _infos(arrays), arrays.__getitem__)
    infos = {name: TensorInfo((2,), np.dtype(np.float32)) for name in "abc"} | {"d": TensorInfo((), np.dtype(bool))}
    with pytest.raises(ValueError, match="'a' is tied to 'b'.*\n.*'b' is tied to 'd'.*\n.*'x' is tied to 'c'"):
        ties = {"a": "b", "b": "d", "x": "c"}
        write_torch_bin(tmp_path / "x.bin", infos, arrays.__getitem__, ties=ties)
    assert not list(tmp_path.iterdir())


# ---- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bin", "safetensors", "zip"])
def test_truncated_files_are_refused(tmp_path, saved, arrays, form):
    path = tmp_path / f"x.{form}"
    if form == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(saved, "pytorch_model.bin")
    elif form == "bin":
        saved.rename(path)
    else:
        safetensors.numpy.save_file(arrays, path)
    whole = path.read_bytes()
    for length in [0, 1, 4, 7, 60, len(whole) // 3, len(whole) // 2, len(whole) - 30, len(whole) - 1]:
        path.write_bytes(whole[:length])
        for verify in (True, False):
            with pytest.raises(ValueError, match=f"x.{form} .*(download|copy)"):
                open_tensors(path, verify=verify)


def test_flipped_bits_are_never_silent(tmp_path, saved, arrays):
    """Every byte of every record once, and 300 places anywhere: an error, or the very same tensors."""
    whole = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        records = {entry.filename: (entry.header_offset, archive.read(entry)) for entry in archive.infolist()}
    starts = {name: whole.index(data, offset) for name, (offset, data) in records.items() if data}
    inside = [start + i for name, start in starts.items() for i in range(0, len(records[name][1]), 7)]
    rng = np.random.default_rng(0)
    refused, path = 0, tmp_path / "x.bin"
    for place in [*inside, *rng.integers(0, len(whole), 300)]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            with open_tensors(path) as reader:
                assert int(place) not in inside
                assert reader.infos.keys() == arrays.keys()
                assert all(_same_bits(reader.read(name), array) for name, array in arrays.items())
        except ValueError as error:
            assert "x.bin" in str(error)
            refused += 1
    assert refused > len(inside)


def test_flipped_bit_in_wrapped_zip(tmp_path, saved, arrays):
    path = tmp_path / "release.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(saved, "pytorch_model.bin")
    data = bytearray(path.read_bytes())
    data[data.index(arrays["block.float32"].tobytes())] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="release.zip is damaged or incomplete .*CRC-32"):
        open_tensors(path, verify=False)


def test_file_without_checksums(saved, arrays):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(_state(arrays), saved)
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(ValueError, match="without checksums.*verify=False"):
        open_tensors(saved)
    _assert_holds(saved, arrays, verify=False)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_file_cut_while_open(tmp_path, form):
    path = tmp_path / f"model.{form}"
    if form == "bin":
        torch.save({"a": torch.zeros(100_000)}, path)
    else:
        safetensors.numpy.save_file({"a": np.zeros(100_000)}, path)
    with open_tensors(path) as reader:
        os.truncate(path, 50_000)
        with pytest.raises(ValueError, match=f"model.{form} .*cut since it was opened"):
            reader.read("a")


def test_files_of_other_kinds(tmp_path, arrays):
    cases = {
        "legacy.bin": "legacy pickle format.*save it again",
        "pointer.bin": "neither a torch file nor safetensors but starts with b'version https",
        "page.safetensors": "no whole safetensors file",
        "other.zip": "no torch state dict and holds 0 files named pytorch_model.bin",
        "missing.bin": "is not a file",
        "list.bin": "holds a list, not a state dict",
        "script.bin": "refused by torch's safe loader|not laid out",
    }
    torch.save(_state(arrays), tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "pointer.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (tmp_path / "page.safetensors").write_text("<html><body>404</body></html>")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    torch.save([torch.zeros(2)], tmp_path / "list.bin")
    with zipfile.ZipFile(tmp_path / "script.bin", "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps({}, protocol=2))
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            open_tensors(tmp_path / name)
        assert name in str(caught.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no model.safetensors"):
        open_tensors(tmp_path / "empty")


def test_other_zip_layouts(tmp_path, saved):
    with zipfile.ZipFile(saved) as source:
        records = {entry.filename: source.read(entry) for entry in source.infolist()}
    cases = [
        ("compressed", zipfile.ZIP_DEFLATED, records),
        ("not those of a record", zipfile.ZIP_STORED, records),
        ("lies outside 'pytorch_model/'", zipfile.ZIP_STORED, records | {"other/data/0": b""}),
        (r"has 2 records \*/data.pkl", zipfile.ZIP_STORED, records | {"other/data.pkl": b""}),
        ("not little-endian", zipfile.ZIP_STORED, records | {"pytorch_model/byteorder": b"big"}),
    ]
    for message, compression, content in cases:
        with zipfile.ZipFile(tmp_path / "x.bin", "w", compression) as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        with pytest.raises(ValueError, match=message):
            open_tensors(tmp_path / "x.bin")


# ---- hostile files ---------------------------------------------------------------------------------------------------


class _Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "wrapped", "shard"])
def test_payloads_never_run(tmp_path, form):
    mark = tmp_path / "payload-ran"
    payloads = [
        _Call(os.system, f"touch {mark}"),
        _Call(eval, f"open({str(mark)!r}, 'w')"),
        _Call(open, str(mark), "w"),
        _Call(torch.load, str(mark)),
        _Call(subprocess.run, ["touch", str(mark)]),
    ]
    for payload in payloads:
        for state in (payload, {"a": torch.zeros(2), "b": payload}, OrderedDict(a=[payload])):
            path = tmp_path / "x.bin"
            if form == "bare":
                path.write_bytes(pickle.dumps(state))
            else:
                torch.save(state, path, _use_new_zipfile_serialization=form != "legacy")
            if form == "wrapped":
                with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
                    archive.write(path, "pytorch_model.bin")
                path = tmp_path / "x.zip"
            elif form == "shard":
                path = tmp_path / "pytorch_model.bin.index.json"
                path.write_text(json.dumps({"weight_map": {"a": "x.bin"}}))
            with pytest.raises(ValueError, match="refused by torch's safe loader|legacy pickle"):
                open_tensors(path)
            assert not mark.exists()
    mark.touch()
    assert mark.exists()


def test_values_that_are_no_plain_tensors_are_all_listed(tmp_path):
    state = {
        "epoch": 3,
        "nested": {"a": torch.zeros(1)},
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.zeros(2, dtype=torch.complex64),
        "float8": torch.zeros(2, dtype=torch.float8_e4m3fn),
        "expanded": torch.zeros(1).expand(10**6),
        "negated": torch.zeros(2, dtype=torch.complex64).conj().imag,
        "elsewhere": torch.zeros(2, device="meta"),
        7: torch.zeros(1),
        "fine": torch.zeros(1),
    }
    torch.save(state, tmp_path / "x.bin")
    with pytest.raises(ValueError, match="no plain tensors") as caught:
        open_tensors(tmp_path / "x.bin")
    for name in state:
        assert (f"\n  {name!r}: " in str(caught.value)) == (name != "fine")


def test_tensor_reaching_beyond_its_record(tmp_path):
    """A pickle that asks for more than its record holds, and for the bytes of another record."""
    torch.save({"a": torch.zeros(4, dtype=torch.uint8), "b": torch.ones(200)}, tmp_path / "good.bin")
    with zipfile.ZipFile(tmp_path / "good.bin") as archive:
        pickled = archive.read("good/data.pkl")
    whole = (tmp_path / "good.bin").read_bytes()
    shape = pickled.index(b"K\x04\x85")  # the shape (4,) of "a"
    offset = shape - 2  # its storage offset 0
    assert pickled[offset : offset + 2] == b"K\x00"
    for place, value in ((shape + 1, 200), (offset + 1, 200)):
        changed = bytearray(pickled)
        changed[place] = value
        (tmp_path / "x.bin").write_bytes(whole.replace(pickled, bytes(changed)))
        with pytest.raises(ValueError, match="'a': its|refused by torch's safe loader"):
            open_tensors(tmp_path / "x.bin", verify=False)


def _wrap(path: Path, **entries: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for folder, data in entries.items():
            archive.writestr(f"{folder}/pytorch_model.bin", data)
    return path


def test_zip_bombs(tmp_path, saved, monkeypatch):
    path = _wrap(tmp_path / "bomb.zip", a=bytes(20_000_000))
    with pytest.raises(ValueError, match="would grow from .* to 20,000,000 bytes"):
        open_tensors(path)
    data = saved.read_bytes()
    path = _wrap(tmp_path / "liar.zip", a=data)
    for announced in (len(data) - 1, 10, len(data) + 1):
        lying = path.read_bytes().replace(len(data).to_bytes(4, "little"), announced.to_bytes(4, "little"))
        (tmp_path / "lies.zip").write_bytes(lying)
        with pytest.raises(ValueError, match="lies.zip is damaged"):
            open_tensors(tmp_path / "lies.zip")


def test_several_wrapped_files(tmp_path, saved):
    path = _wrap(tmp_path / "two.zip", a=b"1", b=b"2")
    with pytest.raises(ValueError, match="'a/pytorch_model.bin', 'b/pytorch_model.bin'"):
        open_tensors(path)


def test_no_room_to_unpack(tmp_path, saved, monkeypatch):
    path = _wrap(tmp_path / "x.zip", a=saved.read_bytes())
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(9999, 9000, 999))
    with pytest.raises(ValueError, match=f"unpacking needs {saved.stat().st_size:,} bytes, there is 999 bytes free in"):
        open_tensors(path)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/{}/secret.safetensors", "a\0b.safetensors", "link/x", "l"])
def test_shards_outside_the_folder_are_refused(tmp_path, name):
    name = name.format(str(tmp_path).lstrip("/"))
    safetensors.numpy.save_file({"a": np.zeros(2, np.float32)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (folder / "l").symlink_to(tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="names shards outside its folder") as caught:
        open_tensors(folder)
    assert str(folder) in str(caught.value) and repr(name) in str(caught.value)


def test_index_and_shards_that_disagree(tmp_path, arrays):
    index = _shard(tmp_path, arrays, "safetensors")
    content = json.loads(index.read_text())
    first, second = sorted(set(content["weight_map"].values()))
    safetensors.numpy.save_file({"scalar": np.zeros(1), "block.bool": np.zeros(1)}, tmp_path / second)
    content["weight_map"]["ghost"] = first
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="does not agree with its shards") as caught:
        open_tensors(tmp_path)
    missing = [name for name, shard in content["weight_map"].items() if shard == second]
    assert len(missing) == 6
    for line in (f"'ghost' is not in '{first}'", *(f"{name!r} is not in '{second}'" for name in missing)):
        assert line in str(caught.value)
    assert f"'block.bool' is in '{first}' and in '{second}'" in str(caught.value)
    (tmp_path / first).unlink()
    (tmp_path / second).unlink()
    with pytest.raises(ValueError, match=f"do not exist:\n  '{first}'\n  '{second}'"):
        open_tensors(tmp_path)


def test_index_of_other_kinds(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for text in ("", "[" * 100_000, "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="index.json has no weight_map|index.json is no JSON"):
            open_tensors(tmp_path)
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="several sets of weights"):
        open_tensors(tmp_path)


def test_safetensors_of_other_dtypes(tmp_path):
    state = {"a": torch.zeros(2, dtype=torch.float8_e4m3fn), "b": torch.zeros(2)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="'a': dtype F8_E4M3"):
        open_tensors(tmp_path / "x.safetensors")


def test_torch_is_optional_and_old_torch_refused(tmp_path, saved, arrays, monkeypatch):
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ImportError, match="torch 2.9.1.cpu is too old.*2.10"):
        open_tensors(saved)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install 'torch>=2.10'"):
        open_tensors(saved)
    with open_tensors(tmp_path / "x.safetensors") as reader:
        assert _same_bits(reader.read("scalar"), arrays["scalar"])


# ---- memory ----------------------------------------------------------------------------------------------------------

MEMORY_PROBE = """
import sys
import numpy as np
import torch
from radfm_jax.convert.tensor_files import TensorInfo, open_tensors, write_safetensors, write_torch_bin


def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))


folder, count, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
write_torch_bin(folder + "/warm.bin", {"a": TensorInfo((1,), np.dtype("float32"))}, lambda name: np.ones(1, np.float32))
with open_tensors(folder + "/warm.bin") as reader:
    reader.read("a")
infos = {f"t{i}": TensorInfo((size // 4,), np.dtype("float32")) for i in range(count)}


def growth(action):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    action()
    return status("VmHWM") - before


def read_all(path):
    with open_tensors(path) as reader:
        assert all(reader.read(name)[-1] == int(name[1:]) for name in reader.infos)


def fill(name):
    return np.full(size // 4, int(name[1:]), np.float32)


print(growth(lambda: write_torch_bin(folder + "/x.bin", infos, fill)))
print(growth(lambda: read_all(folder + "/x.bin")))
print(growth(lambda: write_safetensors(folder, infos, fill)))
print(growth(lambda: read_all(folder + "/model.safetensors")))
"""


def test_memory_is_bounded_by_a_tensor(tmp_path):
    """Twenty tensors of 16 MB: neither reading nor writing holds more than three at a time."""
    size, count = 16_000_000, 20
    command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path), str(count), str(size)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    grown = [int(line) for line in result.stdout.split()]
    # A later step may stay below the high-water mark of an earlier one: then it shows no growth.
    assert len(grown) == 4 and grown[0] > 0 and max(grown) < 3 * size, grown
