"""Refused weight files: damaged, foreign, hostile, or with shards that disagree with their index."""

# ruff: noqa: F811 (fixtures that are imported)

import json
import os
import pickle
import shutil
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from tensor_arrays import Usage, arrays, assert_holds, same_bits, saved, state_of, write_shards  # noqa: F401

from radfm_jax.convert.tensor_files import open_tensors

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
    data = path.read_bytes()
    for length in [0, 1, 4, 7, 60, len(data) // 3, len(data) // 2, len(data) - 30, len(data) - 1]:
        path.write_bytes(data[:length])
        for verify in (True, False):
            with pytest.raises(ValueError, match=f"x.{form} .*(download|copy)"):
                open_tensors(path, verify=verify)


def test_flipped_bits_are_never_silent(tmp_path, saved, arrays):
    """Flip a bit in every seventh byte of the records and at 300 random positions: an error, or unchanged tensors."""
    content = saved.read_bytes()
    with zipfile.ZipFile(saved) as archive:
        records = {entry.filename: (entry.header_offset, archive.read(entry)) for entry in archive.infolist()}
    starts = {name: content.index(data, offset) for name, (offset, data) in records.items() if data}
    inside = [start + i for name, start in starts.items() for i in range(0, len(records[name][1]), 7)]
    rng = np.random.default_rng(0)
    refused, path = 0, tmp_path / "x.bin"
    for position in [*inside, *rng.integers(0, len(content), 300)]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            with open_tensors(path) as reader:
                assert int(position) not in inside
                assert reader.infos.keys() == arrays.keys()
                assert all(same_bits(reader.read(name), array) for name, array in arrays.items())
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
        torch.save(state_of(arrays), saved)
    finally:
        torch.serialization.set_crc32_options(True)
    with pytest.raises(ValueError, match="without checksums.*verify=False"):
        open_tensors(saved)
    assert_holds(saved, arrays, verify=False)


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


def test_foreign_files(tmp_path, arrays):
    cases = {
        "legacy.bin": "legacy pickle format.*save it again",
        "pointer.bin": "neither a torch file nor safetensors but starts with b'version https",
        "page.safetensors": "not a complete safetensors file",
        "other.zip": "not a torch state dict and has 0 files named pytorch_model.bin",
        "missing.bin": "is not a file",
        "list.bin": "has a list, not a state dict",
        "script.bin": "refused by torch's safe loader|not laid out",
    }
    torch.save(state_of(arrays), tmp_path / "legacy.bin", _use_new_zipfile_serialization=False)
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
        ("do not match a record", zipfile.ZIP_STORED, records),
        ("is outside 'pytorch_model/'", zipfile.ZIP_STORED, records | {"other/data/0": b""}),
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


def test_all_values_that_are_not_plain_tensors_are_listed(tmp_path):
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
    with pytest.raises(ValueError, match="not plain tensors") as caught:
        open_tensors(tmp_path / "x.bin")
    for name in state:
        assert (f"\n  {name!r}: " in str(caught.value)) == (name != "fine")


def test_tensor_reaching_beyond_its_record(tmp_path):
    """A pickle that requests more bytes than its record has, and bytes of another record."""
    torch.save({"a": torch.zeros(4, dtype=torch.uint8), "b": torch.ones(200)}, tmp_path / "good.bin")
    with zipfile.ZipFile(tmp_path / "good.bin") as archive:
        pickled = archive.read("good/data.pkl")
    data = (tmp_path / "good.bin").read_bytes()
    shape = pickled.index(b"K\x04\x85")  # the shape (4,) of "a"
    offset = shape - 2  # its storage offset 0
    assert pickled[offset : offset + 2] == b"K\x00"
    for position, value in ((shape + 1, 200), (offset + 1, 200)):
        changed = bytearray(pickled)
        changed[position] = value
        (tmp_path / "x.bin").write_bytes(data.replace(pickled, bytes(changed)))
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
    with pytest.raises(ValueError, match=f"needs {saved.stat().st_size:,} bytes, but found 999 bytes free in"):
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
    index = write_shards(tmp_path, arrays, "safetensors")
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


def test_invalid_indices(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for text in ("", "[" * 100_000, "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": []}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="index.json has no weight_map|index.json is not valid JSON"):
            open_tensors(tmp_path)
    (tmp_path / "other.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="several sets of weights"):
        open_tensors(tmp_path)


def test_safetensors_of_unsupported_dtypes(tmp_path):
    state = {"a": torch.zeros(2, dtype=torch.float8_e4m3fn), "b": torch.zeros(2)}
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="'a': dtype F8_E4M3"):
        open_tensors(tmp_path / "x.safetensors")
