"""Checkpoint directories: complete or absent, damage always detected, restored onto any mesh."""

import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest

import radfm_jax
from radfm_jax.checkpoints import checkpoint
from radfm_jax.models import radfm
from radfm_jax.runtime import sharding


@pytest.fixture(scope="module")
def model() -> radfm_jax.Model:
    config = radfm.tiny()
    return radfm_jax.Model(config, jax.device_put(parity.recipe_params(config)))


@pytest.fixture
def directory(model, tmp_path):
    radfm_jax.save(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


def test_save_and_load_are_bit_equal(model, directory):
    again = radfm_jax.load(directory)
    assert again.config == model.config and again.directory == directory
    assert_equal(model.params, again.params)
    assert not (directory / "tokenizer.model").exists()


def test_paths_with_parent_references(model, directory, tmp_path):
    """tensorstore refuses `..`."""
    (tmp_path / "x").mkdir()
    assert_equal(model.params, radfm_jax.load(tmp_path / "x" / ".." / directory.name).params)
    radfm_jax.save(model, tmp_path / "x" / ".." / "second")
    assert_equal(model.params, radfm_jax.load(tmp_path / "second").params)


def test_load_in_another_dtype(model, directory):
    again = radfm_jax.load(directory, dtype="bfloat16", param_dtype="bfloat16")
    assert again.config.llama.dtype == "bfloat16"
    assert_equal(jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params), again.params)


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=4, tensor=2), dict(data=2, fsdp=2, tensor=2)])
def test_load_onto_a_mesh(sizes, model, directory):
    mesh = sharding.make_mesh(**sizes)
    again = radfm_jax.load(directory, mesh=mesh)
    assert_equal(model.params, again.params)
    kernel = again.params["llama"]["blocks"]["gate"]["kernel"]  # (layers, embed, mlp)
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert kernel.addressable_shards[0].data.shape == (2, 32 // mesh.shape["fsdp"], 64 // mesh.shape["tensor"])


def test_saved_from_a_mesh(model, tmp_path):
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    shardings, _ = sharding.param_shardings(radfm.abstract_params(model.config), mesh)
    spread = radfm_jax.Model(model.config, jax.device_put(model.params, shardings))
    radfm_jax.save(spread, tmp_path / "checkpoint")
    assert_equal(model.params, radfm_jax.load(tmp_path / "checkpoint").params)


def test_extra_files_are_copied(model, tmp_path):
    """tokenizer.model and unused tensors of a released file survive load and save."""
    with checkpoint.new_directory(tmp_path / "with") as partial:
        checkpoint.save_params(partial, model.params)
        (partial / "tokenizer.model").write_bytes(b"pieces")
        (partial / "unused.safetensors").write_bytes(b"tensors")
        checkpoint.write_description(partial, "radfm", model.config.to_dict(), source={"file": "x.bin"})
    radfm_jax.save(radfm_jax.load(tmp_path / "with"), tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.model").read_bytes() == b"pieces"
    assert (tmp_path / "again" / "unused.safetensors").read_bytes() == b"tensors"
    assert checkpoint.read_description(tmp_path / "again")["source"] == {"file": "x.bin"}


# --- damage -----------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_detected(directory):
    """60 random bits in all files, including the manifest."""
    rng = np.random.default_rng(0)
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    silent = []
    for _ in range(60):
        path = files[rng.integers(len(files))]
        data = path.read_bytes()
        bit = int(rng.integers(8 * len(data)))
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            checkpoint.verify(directory)
            silent.append((path.name, bit))
        except ValueError:
            continue
        finally:
            path.write_bytes(data)
    # A flip in the white space or the format number of the manifest changes nothing that is read.
    manifest = json.loads((directory / "manifest.json").read_text())
    assert [s for s in silent if s[0] != "manifest.json"] == []
    assert manifest["files"].keys() == {str(p.relative_to(directory)) for p in files} - {"manifest.json"}


@pytest.mark.parametrize("damage", ["truncate", "delete", "add", "swap", "no manifest", "broken manifest"])
def test_damaged_directories_are_refused(damage, directory):
    chunks = sorted(p for p in (directory / "params").rglob("*") if p.is_file() and p.parent.name != "params")
    large = [p for p in chunks if p.stat().st_size > 100 and p.name != "zarr.json"]
    if damage == "truncate":
        large[0].write_bytes(large[0].read_bytes()[:-1])
    elif damage == "delete":  # zarr reads a missing chunk as zeros
        large[0].unlink()
    elif damage == "add":
        (directory / "params" / "stray").write_text("")
    elif damage == "swap":
        a, b = large[0].read_bytes(), large[1].read_bytes()
        large[0].write_bytes(b), large[1].write_bytes(a)
    elif damage == "no manifest":
        (directory / "manifest.json").unlink()
    else:
        (directory / "manifest.json").write_text('{"files": ')
    with pytest.raises(ValueError, match=str(directory)) as e:
        radfm_jax.load(directory)
    words = {"truncate": "size differs", "delete": "missing", "add": "not in the manifest", "swap": "differs: "}
    assert words.get(damage, "manifest.json") in str(e.value)


def test_lost_files_have_a_remedy(model, directory, tmp_path):
    """A lost tokenizer or description: the error says which file to copy where, and following it works."""
    pieces = tmp_path / "copy.model"
    pieces.write_bytes(b"pieces")
    complete = tmp_path / "complete"
    with checkpoint.new_directory(complete) as partial:
        checkpoint.save_params(partial, model.params)
        checkpoint.write_description(partial, "radfm", model.config.to_dict())
        (partial / "tokenizer.model").write_bytes(pieces.read_bytes())
    destination, sha256 = complete / "tokenizer.model", hashlib.sha256(b"pieces").hexdigest()
    remedy = (
        rf"tokenizer.model: copy the SentencePiece model of 6 bytes, SHA-256 {sha256}, to {destination}, or pass it as "
    )
    remedy += r"--tokenizer FILE.*conversion from --tokenizer"
    for kind, content in (("missing", None), ("size differs", b"others"[:5]), ("content differs", b"others")):
        destination.unlink() if content is None else destination.write_bytes(content)
        with pytest.raises(ValueError, match=f"{kind}: {remedy}"):
            radfm_jax.load(complete)
    shutil.copy(pieces, destination)
    radfm_jax.load(complete)
    description = (complete / "radfm.json").read_bytes()
    (complete / "radfm.json").unlink()
    with pytest.raises(
        ValueError, match=f"missing: radfm.json: copy it to {complete}/radfm.json .*convert the weights"
    ):
        radfm_jax.load(complete)
    (complete / "radfm.json").write_bytes(description)
    radfm_jax.load(complete)
    shutil.copy(pieces, directory / "tokenizer.model")  # made without one, so not in the manifest
    with pytest.raises(ValueError, match="not in the manifest: tokenizer.model: .* elsewhere .*--tokenizer FILE"):
        radfm_jax.load(directory)
    (directory / "tokenizer.model").unlink()
    assert radfm_jax.load(directory, tokenizer=pieces).tokenizer_file == pieces


def test_all_mismatched_parameters_are_listed(model, tmp_path):
    params = jax.tree.map(lambda x: x, model.params)
    params["llama"]["norm"]["scale"] = jnp.ones(7)
    params["extra"] = jnp.ones(2)
    del params["image_marks"]
    with checkpoint.new_directory(tmp_path / "wrong") as partial:
        checkpoint.save_params(partial, params)
        checkpoint.write_description(partial, "radfm", model.config.to_dict())
    with pytest.raises(ValueError) as e:
        radfm_jax.load(tmp_path / "wrong")
    for line in (
        "missing: image_marks (2, 32)",
        "unexpected: extra (2,)",
        "llama/norm/scale is (7,), expected (32,)",
    ):
        assert line in str(e.value)


def test_unreadable_descriptions(directory):
    path = directory / "radfm.json"
    description = json.loads(path.read_text())
    for text, words in (
        (json.dumps({**description, "format": 99}), "format 99.*update"),
        ("{", "radfm.json is not valid JSON"),
        (json.dumps({"format": 1}), "is damaged"),
        (json.dumps({"format": 1, "part": "radfm", "model": {"vision": 1}}), "is damaged: .*vision must have fields"),
        (json.dumps({"format": 1, "part": "radfm", "model": {}, "source": []}), "is damaged: .*source must have"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            checkpoint.read_description(directory)
    with pytest.raises(ValueError, match="not a directory"):
        radfm_jax.load(directory / "nothing")


def test_a_failed_save_leaves_nothing(model, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_params", full)
    with pytest.raises(OSError, match="No space left"):
        radfm_jax.save(model, tmp_path / "checkpoint")
    assert list(tmp_path.iterdir()) == []


# --- slices -----------------------------------------------------------------------------------------------------------


def test_params_written_slice_by_slice(model, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 1000)  # split every layer into several chunks
    flat = checkpoint.flatten(model.params)
    stacked = {k for k in flat if "/blocks/" in k}
    with checkpoint.new_directory(tmp_path / "sliced") as partial:
        writer = checkpoint.ParamWriter(partial, {k: (v.shape, v.dtype) for k, v in flat.items()}, stacked)
        for name, value in flat.items():
            for layer in range(len(value)) if name in stacked else [None]:
                index = () if layer is None else (layer,)
                writer.write(name, np.asarray(value)[index or ...], index)
        checkpoint.write_description(partial, "radfm", model.config.to_dict())
    assert_equal(model.params, radfm_jax.load(tmp_path / "sliced").params)
    reader = checkpoint.StoredParams(tmp_path / "sliced")
    np.testing.assert_array_equal(reader.read("llama/blocks/up/kernel", (1,)), flat["llama/blocks/up/kernel"][1])


def test_the_digest_depends_on_the_parameters_alone(tmp_path):
    def digest_of(name: str, weights: str, other: str) -> str:
        (tmp_path / name / "params").mkdir(parents=True)
        (tmp_path / name / "params" / "w").write_text(weights)
        (tmp_path / name / "run.json").write_text(other)
        checkpoint.write_manifest(tmp_path / name)
        return checkpoint.digest(tmp_path / name)

    assert digest_of("a", "one", "x") == digest_of("b", "one", "y") != digest_of("c", "two", "x")
    for name in ("d", "e"):  # Orbax writes the time to files of its own
        with checkpoint.new_directory(tmp_path / name) as partial:
            checkpoint.save_params(partial, {"w": np.arange(3)})
    assert checkpoint.digest(tmp_path / "d") == checkpoint.digest(tmp_path / "e")
