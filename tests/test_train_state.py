"""The training state in a step: bit-exact on other meshes, self-describing, and as the start of another training."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_states import MESHES, mesh, save
from saving_child import CONFIG, abstract, assert_same, data_state, saver, state, values

import radfm_jax
from radfm_jax.checkpoints import checkpoint, train_state
from radfm_jax.checkpoints.run_directory import latest, step_directory
from radfm_jax.checkpoints.train_state import restore
from radfm_jax.models import radfm
from radfm_jax.training import optimizer, train_step

# --- restore ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", MESHES)
def test_restore_is_bit_exact_on_every_mesh(saved, tmp_path):
    """float32 of random bits (NaN payloads included), bfloat16, uint32 keys, counters."""
    save(tmp_path, 3, where=mesh(**MESHES[saved]))
    directory = latest(tmp_path)
    assert directory == step_directory(tmp_path, 3)
    for sizes in MESHES.values():
        shapes = abstract(mesh(**sizes))
        restored = restore(directory, shapes)
        assert_same(restored, 3)
        assert jax.tree.map(lambda x: x.sharding, restored) == train_step.shardings_of(shapes)


def test_a_step_describes_itself(tmp_path):
    (tmp_path / "pieces").write_bytes(b"pieces")
    save(tmp_path / "run", 3, metrics={3: {"loss": 1.5}}, tokenizer=tmp_path / "pieces", where=mesh(2, 2, 2))
    directory = latest(tmp_path / "run")
    assert {p.name for p in directory.iterdir()} == {
        "radfm.json", "params", "tokenizer.model", "manifest.json", "training", "data", "run.json"
    }  # fmt: skip
    run = json.loads((directory / "run.json").read_text())
    assert (run["step"], run["metrics"], run["config"], run["processes"]) == (3, {"loss": 1.5}, CONFIG, 1)
    assert run["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2} and run["versions"]["jax"] == jax.__version__
    with saver(tmp_path / "run") as s:
        assert not (tmp_path / "run" / "config.json").exists()
        s.begin(directory)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == CONFIG
    assert (directory / "tokenizer.model").read_bytes() == b"pieces"
    assert train_state.data_state(directory) == data_state(3)
    with pytest.raises(ValueError, match="no_pieces cannot be read"):
        saver(tmp_path / "run", tokenizer=tmp_path / "no_pieces")


def test_a_real_state_and_loading_its_parameters(tmp_path):
    """The state of configs/tiny.py with its real optimizer; radfm_jax.load reads the step like any checkpoint."""
    config = optimizer.OptimizerConfig(warmup_steps=1, frozen=("llama",), mu_dtype="bfloat16")
    where, *_ = train_step.abstract_state(radfm.tiny(), config, mesh(fsdp=4, tensor=2))
    rng = np.random.default_rng(0)
    numbers = jax.tree.map(lambda x: rng.integers(1, 100, x.shape).astype(x.dtype), where)
    full = jax.device_put(numbers, train_step.shardings_of(where))
    with saver(tmp_path) as s:
        s.save(full, data_state(1), wait=True)
    directory = latest(tmp_path)
    same = lambda a, b: jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), y), a, b)  # noqa: E731
    same(restore(directory, where), numbers)
    loaded = radfm_jax.load(directory)
    same(loaded.params, train_step.params_of(numbers))
    assert loaded.config.llama.width == radfm.tiny().llama.width


def test_a_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    """The arrays are overwritten while they are being written to disk."""
    where = mesh(fsdp=8)
    big = jax.ShapeDtypeStruct((512, 8192), jnp.float32, sharding=abstract(where)["params"]["vit"]["latents"].sharding)
    change = jax.jit(lambda x: x * 0 - 1, donate_argnums=0).lower(big).compile()
    full = state(1, where)
    full["params"]["vit"]["latents"] = array = jax.device_put(np.full(big.shape, 3, np.float32), big.sharding)
    with saver(tmp_path) as s:
        s.save(full, data_state(1))
        assert (change(array) == -1).all()
    stored = checkpoint.StoredParams(latest(tmp_path)).read("vit/latents")
    assert (stored == 3).all()


def test_all_mismatched_arrays_are_named(tmp_path):
    save(tmp_path, 1)
    shapes = abstract(mesh())
    sharding = shapes["step"].sharding
    shapes["params"]["new"] = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=sharding)
    shapes["frozen"]["llama"]["norm"] = jax.ShapeDtypeStruct((25,), jnp.float32, sharding=sharding)
    shapes["params"]["vit"]["kernel"] = jax.ShapeDtypeStruct((2, 16, 8), jnp.float32, sharding=sharding)
    del shapes["key"], shapes["params"]["vit"]["latents"]
    with pytest.raises(ValueError) as e:
        restore(latest(tmp_path), shapes)
    for line in (
        "missing: params/new float32[3]",
        "params/llama/norm is float32[24], expected float32[25]",
        "params/vit/kernel is bfloat16[2, 16, 8], expected float32[2, 16, 8]",
        "unexpected: params/vit/latents float32[8, 10]",
        "unexpected: training/key uint32[2]",
        "use init_from",
    ):
        assert line in str(e.value)
    assert "opt/" not in str(e.value)


def test_data_state(tmp_path):
    save(tmp_path, 4)
    directory = latest(tmp_path)
    assert train_state.data_state(directory, process=3) == data_state(4)  # resumed with more processes
    run = json.loads((directory / "run.json").read_text())
    (directory / "run.json").write_text(json.dumps(run | {"processes": 2}))
    (directory / "data" / "1.json").write_text(json.dumps(data_state(4) | {"lost": 7}))
    assert train_state.data_state(directory) == data_state(4) | {"lost": 7}
    (directory / "data" / "1.json").write_text(json.dumps(data_state(4) | {"row": 1}))
    with pytest.raises(ValueError, match=r"different positions \(row\).*same number of processes \(2\)"):
        train_state.data_state(directory)
    (directory / "data" / "0.json").unlink()
    with pytest.raises(ValueError, match="data/0.json does not exist"):
        train_state.data_state(directory)


# --- init_from --------------------------------------------------------------------------------------------------------


def test_init_from_a_step_with_other_frozen_parts(tmp_path):
    save(tmp_path, 1, where=mesh(2, 2, 2))
    now = state(9, mesh(fsdp=8))
    now["params"] |= now.pop("frozen")  # no part is frozen any more
    now["frozen"] = {}
    now["params"]["bridge"] = {"new": now["skipped"]}
    now["params"]["vit"]["latents"] = now["params"]["vit"]["latents"].astype(jnp.bfloat16)
    params, report = train_state.init_from(latest(tmp_path), now)
    old = values(1)
    assert report.new == ("bridge/new",) and len(report.loaded) == 4 and report.unused == ()
    assert report.cast == {"vit/latents": "float32 -> bfloat16"}
    assert "bridge: 0 loaded, 1 new" in str(report) and "vit: 2 loaded, 0 new" in str(report)
    assert "float32 -> bfloat16: 1 arrays" in str(report)
    assert set(params) == set(report.loaded)
    assert np.asarray(params["llama/kernel"]).tobytes() == old["frozen"]["llama"]["kernel"].tobytes()
    assert params["llama/kernel"].sharding == now["params"]["llama"]["kernel"].sharding
    assert params["llama/kernel"].addressable_shards[0].data.shape == (8, 96)
    numbers = np.isfinite(old["params"]["vit"]["latents"])  # random bits contain NaN
    cast = old["params"]["vit"]["latents"][numbers].astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(params["vit/latents"])[numbers], cast)
    assert numbers.sum() > 70


def write_parts(folder, params: dict, part: str = "llama", **fields):
    sizes = {"llama": radfm.tiny().to_dict()["llama"] | {"rope_theta": 5e5}}
    with checkpoint.new_directory(folder) as partial:
        checkpoint.save_params(partial, params)
        checkpoint.write_description(partial, part, sizes, **fields)
    return folder


def test_init_from_a_language_model(tmp_path):
    """A checkpoint of the part `llama` alone; settings that change no shape are compared."""
    llama = {"llama": {"kernel": jnp.ones((64, 96), jnp.bfloat16), "norm": jnp.ones(24)}}
    folder = write_parts(tmp_path / "llama", llama)
    params, report = train_state.init_from(folder, state(1, mesh(fsdp=2)), radfm.tiny())
    assert report.loaded == ("llama/kernel", "llama/norm") and report.unused == ()
    assert report.new == ("vit/kernel", "vit/latents")
    assert report.sizes == ("llama.rope_theta is 10000.0, was 500000.0 in the checkpoint",)
    assert params["llama/kernel"].dtype == jnp.float32 and (params["llama/kernel"] == 1).all()
    now = state(1, mesh())
    now["frozen"]["llama"]["kernel"] = now["frozen"]["llama"]["norm"]
    with pytest.raises(ValueError, match=r"llama/kernel is \(64, 96\), expected \(24,\)"):
        train_state.init_from(folder, now)
    with pytest.raises(ValueError, match="no parameter of this model: it has llama/kernel, llama/norm"):
        train_state.init_from(folder, {**now, "frozen": {}})
    (folder / "params" / "llama.norm" / "zarr.json").unlink()
    with pytest.raises(ValueError, match="missing: params/llama.norm/zarr.json"):
        train_state.init_from(folder, now)


def test_init_from_parts_that_differ(tmp_path):
    """A part that both have must have the same parameters, except those that no source of the checkpoint has."""
    llama = {"llama": {"kernel": jnp.ones((64, 96)), "bias": jnp.ones(2)}}
    folder = write_parts(tmp_path / "llama", llama)
    for check in (train_state.init_from, train_state.check_init):
        with pytest.raises(ValueError) as e:
            check(folder, state(1, mesh()), radfm.tiny())
        for line in (
            "missing: llama/norm (24,)",
            "unexpected: llama/bias (2,)",
            "model.llama.rope_theta is 10000.0, was 500000.0 in the checkpoint",
        ):
            assert line in str(e.value)
        assert "vit/" not in str(e.value)
    vision = {"vit": {"kernel": jnp.ones((2, 16, 8), jnp.bfloat16)}}
    folder = write_parts(tmp_path / "vision", vision, "vision", absent=["vit/latents"])
    params, report = train_state.init_from(folder, state(1, mesh()))
    assert report.loaded == ("vit/kernel",) and "vit/latents" in report.new
