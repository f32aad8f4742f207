"""Reading of files written by torch and safetensors is exact; reading and writing need little memory."""

# ruff: noqa: F811 (fixtures that are imported)

import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from tensor_arrays import ALL_DTYPES, arrays, assert_holds, random_arrays, same_bits, saved, tensor_of, write_shards  # noqa: F401

from radfm_jax.convert.tensor_files import open_tensors

# ---- reading ---------------------------------------------------------------------------------------------------------


def test_reads_torch_file(saved, arrays):
    done = []
    assert_holds(saved, arrays, progress=done.append)
    assert sum(array.nbytes for array in arrays.values()) < sum(done) < saved.stat().st_size
    assert_holds(saved.parent, arrays)
    assert_holds(saved, arrays, verify=False)


def test_reads_every_dtype_of_safetensors(tmp_path):
    arrays = random_arrays(ALL_DTYPES)
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    assert_holds(tmp_path / "model.safetensors", arrays)
    assert_holds(tmp_path, arrays)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_reads_parts(tmp_path, form):
    array = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    if form == "bin":
        torch.save({"a": tensor_of(array), "t": tensor_of(array).permute(2, 0, 1)}, tmp_path / "x.bin")
    else:
        transposed = np.ascontiguousarray(array.transpose(2, 0, 1))
        safetensors.numpy.save_file({"a": array, "t": transposed}, tmp_path / "x.safetensors")
    indices = [(), (slice(1, 3),), (slice(None), slice(-2, None)), (slice(3, 1),), (slice(0, 9), slice(2, 3), slice(1))]
    with open_tensors(tmp_path / f"x.{form}") as reader:
        for index in indices:
            for name, full in (("a", array), ("t", array.transpose(2, 0, 1))):
                part = reader.read(name, index)
                assert same_bits(part, full[index]) and part.flags.c_contiguous
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
            assert same_bits(reader.read(name), tensor.contiguous().numpy())


def test_reads_parameters_and_metadata_of_a_module(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(OrderedDict(module.state_dict(keep_vars=True)), tmp_path / "x.bin")
    assert_holds(tmp_path / "x.bin", {name: t.detach().numpy() for name, t in module.state_dict().items()})


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
        assert same_bits(reader.read("block.float32"), arrays["block.float32"])
        assert sorted(tmp_path.rglob("*")) == before, "the unpacked file must be unnamed"
    assert_holds(tmp_path / "release.zip", arrays)


@pytest.mark.parametrize("form", ["bin", "safetensors"])
def test_reads_shards(tmp_path, arrays, form):
    index = write_shards(tmp_path, arrays, form)
    assert_holds(index, arrays)
    assert_holds(tmp_path, arrays)


def test_torch_is_optional_and_old_torch_refused(tmp_path, saved, arrays, monkeypatch):
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ImportError, match="torch 2.9.1.cpu is too old.*2.10"):
        open_tensors(saved)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="pip install 'torch>=2.10'"):
        open_tensors(saved)
    with open_tensors(tmp_path / "x.safetensors") as reader:
        assert same_bits(reader.read("scalar"), arrays["scalar"])


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
    """Reading and writing twenty tensors of 16 MB keep at most three in memory."""
    size, count = 16_000_000, 20
    command = [sys.executable, "-c", MEMORY_PROBE, str(tmp_path), str(count), str(size)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    growth = [int(line) for line in result.stdout.split()]
    # A later step shows no growth if it stays below the high-water mark of an earlier one.
    assert len(growth) == 4 and growth[0] > 0 and max(growth) < 3 * size, growth
