"""Steps on disk: exactly what was saved, on other meshes, as a beginning; verified; which of them stay."""

import contextlib
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_states import MESHES, mesh, names, save
from saving_child import CONFIG, abstract, assert_same, data_state, saver, state, values

import radfm_jax
from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.checkpoints.run_directory import latest, restore, step_directory, steps
from radfm_jax.models import radfm
from radfm_jax.training import optimizer, train_step

# --- what is saved comes back -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", MESHES)
def test_restored_bit_by_bit_on_every_mesh(saved, tmp_path):
    """float32 of random bits (NaN payloads included), bfloat16, uint32 keys, counters."""
    save(tmp_path, 3, where=mesh(**MESHES[saved]))
    directory = latest(tmp_path)
    assert directory == step_directory(tmp_path, 3)
    for sizes in MESHES.values():
        where = abstract(mesh(**sizes))
        found = restore(directory, where)
        assert_same(found, 3)
        assert jax.tree.map(lambda x: x.sharding, found) == train_step.shardings_of(where)


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
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == CONFIG
    assert (directory / "tokenizer.model").read_bytes() == b"pieces"
    assert run_directory.data_state(directory) == data_state(3)
    with pytest.raises(ValueError, match="no_pieces does not exist"):
        saver(tmp_path / "run", tokenizer=tmp_path / "no_pieces")


def test_the_real_state_and_its_parameters_for_everybody_else(tmp_path):
    """The state of configs/tiny.py with its real optimizer; radfm_jax.load reads the step as any checkpoint."""
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
    stored = checkpoint.ParamReader(latest(tmp_path)).read("vit/latents")
    assert (stored == 3).all()


def test_arrays_that_do_not_fit_are_all_named(tmp_path):
    save(tmp_path, 1)
    wanted = abstract(mesh())
    one = wanted["step"].sharding
    wanted["params"]["new"] = jax.ShapeDtypeStruct((3,), jnp.float32, sharding=one)
    wanted["frozen"]["llama"]["norm"] = jax.ShapeDtypeStruct((25,), jnp.float32, sharding=one)
    wanted["params"]["vit"]["kernel"] = jax.ShapeDtypeStruct((2, 16, 8), jnp.float32, sharding=one)
    del wanted["key"], wanted["params"]["vit"]["latents"]
    with pytest.raises(ValueError) as e:
        restore(latest(tmp_path), wanted)
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


def test_the_place_in_the_data(tmp_path):
    save(tmp_path, 4)
    directory = latest(tmp_path)
    assert run_directory.data_state(directory, process=3) == data_state(4)  # more processes than there were
    run = json.loads((directory / "run.json").read_text())
    (directory / "run.json").write_text(json.dumps(run | {"processes": 2}))
    (directory / "data" / "1.json").write_text(json.dumps(data_state(4) | {"lost": 7}))
    assert run_directory.data_state(directory) == data_state(4) | {"lost": 7}
    (directory / "data" / "1.json").write_text(json.dumps(data_state(4) | {"row": 1}))
    with pytest.raises(ValueError, match=r"different places \(row\).*same number of processes \(2\)"):
        run_directory.data_state(directory)
    (directory / "data" / "0.json").unlink()
    with pytest.raises(ValueError, match="data/0.json does not exist"):
        run_directory.data_state(directory)


# --- other checkpoints as a beginning ---------------------------------------------------------------------------------


def test_initialised_from_a_step_with_other_frozen_parts(tmp_path):
    save(tmp_path, 1, where=mesh(2, 2, 2))
    now = state(9, mesh(fsdp=8))
    now["params"] |= now.pop("frozen")  # nothing is frozen any more
    now["frozen"] = {}
    now["params"]["vit"]["new"] = now["skipped"]
    now["params"]["vit"]["latents"] = now["params"]["vit"]["latents"].astype(jnp.bfloat16)
    params, report = run_directory.init_from(latest(tmp_path), now)
    old = values(1)
    assert report.new == ("vit/new",) and len(report.loaded) == 4 and report.unused == ()
    assert report.cast == {"vit/latents": "float32 -> bfloat16"}
    assert "vit: 2 loaded, 1 new" in str(report) and "float32 -> bfloat16: 1 arrays" in str(report)
    assert set(params) == set(report.loaded)
    assert np.asarray(params["llama/kernel"]).tobytes() == old["frozen"]["llama"]["kernel"].tobytes()
    assert params["llama/kernel"].sharding == now["params"]["llama"]["kernel"].sharding
    assert params["llama/kernel"].addressable_shards[0].data.shape == (8, 96)
    numbers = np.isfinite(old["params"]["vit"]["latents"])  # among random bits are NaN
    cast = old["params"]["vit"]["latents"][numbers].astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(params["vit/latents"])[numbers], cast)
    assert numbers.sum() > 70


def test_initialised_from_a_language_model(tmp_path):
    """A checkpoint of the part `llama` alone; its settings that no shape shows are compared."""
    llama = {"llama": {"kernel": jnp.ones((64, 96), jnp.bfloat16), "other": jnp.ones(2)}}
    sizes = radfm.tiny().to_dict()["llama"]
    with checkpoint.new_directory(tmp_path / "llama") as partial:
        checkpoint.save_params(partial, llama)
        checkpoint.write_description(partial, "llama", {"llama": sizes | {"rope_theta": 5e5}})
    params, report = run_directory.init_from(tmp_path / "llama", state(1, mesh(fsdp=2)), radfm.tiny())
    assert report.loaded == ("llama/kernel",) and report.unused == ("llama/other",)
    assert report.new == ("llama/norm", "vit/kernel", "vit/latents")
    assert report.sizes == (f"llama.rope_theta is {sizes['rope_theta']!r}, was 500000.0 in the checkpoint",)
    assert params["llama/kernel"].dtype == jnp.float32 and (params["llama/kernel"] == 1).all()
    now = state(1, mesh())
    now["frozen"]["llama"]["kernel"] = now["frozen"]["llama"]["norm"]
    with pytest.raises(ValueError, match=r"llama/kernel is \(64, 96\), expected \(24,\)"):
        run_directory.init_from(tmp_path / "llama", now)
    with pytest.raises(ValueError, match="no parameter of this model: it has llama/kernel, llama/other"):
        run_directory.init_from(tmp_path / "llama", {**now, "frozen": {}})
    (tmp_path / "llama" / "params" / "llama.other" / "zarr.json").unlink()
    with pytest.raises(ValueError, match="missing: params/llama.other/zarr.json"):
        run_directory.init_from(tmp_path / "llama", now)


# --- damage -----------------------------------------------------------------------------------------------------------

DAMAGE = ("bit", "truncated", "zeroed page", "deleted", "swapped", "added")


def damage(directory: Path, rng) -> tuple[str, str] | None:
    """Hurts one file, or two: (kind, name of a file that has to be named); None if nothing has changed by that."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    kind = DAMAGE[rng.integers(len(DAMAGE))]
    path = files[rng.integers(len(files))]
    name, old = str(path.relative_to(directory)), path.read_bytes()
    if kind == "deleted":
        path.unlink()
        return kind, name
    if kind == "added":
        path = path.with_name(f"{path.name}0")
        path.write_bytes(old)
        return kind, str(path.relative_to(directory))
    if kind == "swapped":
        other = files[rng.integers(len(files))]
        path.write_bytes(other.read_bytes())
        other.write_bytes(old)
        return (kind, name) if path.read_bytes() != old and "manifest.json" not in (name, other.name) else None
    new = bytearray(old)
    if kind == "bit":
        bit = int(rng.integers(8 * len(old)))
        new[bit // 8] ^= 1 << bit % 8
    elif kind == "truncated":
        del new[int(rng.integers(len(old))) :]
    else:
        page = int(rng.integers(-(-len(old) // 4096)))
        new[page * 4096 : (page + 1) * 4096] = bytes(len(old[page * 4096 : (page + 1) * 4096]))
    path.write_bytes(new)
    if name == "manifest.json":  # white space and the format's number say nothing of the files
        with contextlib.suppress(ValueError, KeyError):
            if json.loads(new)["files"] == json.loads(old)["files"]:
                return None
        name = str(directory)  # what a broken list accuses may be any file of it
    return (kind, name) if new != old else None


@pytest.mark.parametrize("tries", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_every_damage_is_found(tries, tmp_path, capsys):
    save(tmp_path / "run", 1, 2)
    directory, whole = step_directory(tmp_path / "run", 2), tmp_path / "whole"
    shutil.copytree(directory, whole)
    rng = np.random.default_rng(7)
    kinds, silent = dict.fromkeys(DAMAGE, 0), []
    while sum(kinds.values()) < tries:
        if (hurt := damage(directory, rng)) is not None:
            kinds[hurt[0]] += 1
            try:
                latest(tmp_path / "run")
                silent.append(hurt)
            except ValueError as e:
                if hurt[1] not in str(e):
                    silent.append((*hurt, str(e)))
        shutil.rmtree(directory)
        shutil.copytree(whole, directory)
    with capsys.disabled():
        print(f"\nsilent: {len(silent)} of {tries}; {kinds}")
    assert silent == [] and all(kinds.values())
    assert latest(tmp_path / "run") == directory


def test_an_older_step_is_used_only_when_allowed_and_said(tmp_path):
    assert latest(tmp_path) is None
    save(tmp_path, 1, 2, 3, keep_last=3)
    for step in (3, 2):
        (step_directory(tmp_path, step) / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoints/3 is damaged:\n +size differs: run.json\n.*newest step of"):
        latest(tmp_path)
    said = []
    assert latest(tmp_path, allow_older=True, warn=said.append) == step_directory(tmp_path, 1)
    (line,) = said
    assert "GOING ON FROM STEP 1 INSTEAD OF 3" in line and "checkpoints/2 is damaged" in line
    (step_directory(tmp_path, 1) / "run.json").unlink()
    with pytest.raises(ValueError, match="missing: run.json\nNo step of"):
        latest(tmp_path, allow_older=True, warn=said.append)
    with pytest.raises(ValueError, match="missing: run.json"):
        restore(step_directory(tmp_path, 1), abstract(mesh()))


# --- which steps stay -------------------------------------------------------------------------------------------------


def test_which_steps_stay(tmp_path):
    losses = {1: 3.0, 2: 1.0, 4: 2.0, 5: float("nan"), 6: 1.0}
    metrics = {n: {"loss": loss} for n, loss in losses.items()} | {3: {"other": 0.0}}
    save(tmp_path, 1, 2, 3, 4, 5, 6, metrics=metrics, keep_last=2, keep_every=3, best="loss")
    assert steps(tmp_path) == [2, 3, 5, 6]  # best, every third, the last two
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {
        "step": 2, "metric": "loss", "value": 1.0
    }  # fmt: skip
    assert run_directory.best(tmp_path) == step_directory(tmp_path, 2)
    save(tmp_path, 7, metrics={7: {"loss": 0.5}}, keep_last=1, best="loss")
    assert steps(tmp_path) == [7] and run_directory.best(tmp_path) == step_directory(tmp_path, 7)
    assert names(tmp_path) == {"7", "best.json"}
    with pytest.raises(ValueError, match="keep_last is 0"):
        saver(tmp_path, keep_last=0)


def test_best_when_there_is_none_or_it_is_gone(tmp_path):
    save(tmp_path, 1)
    assert run_directory.best(tmp_path) is None
    path = tmp_path / "checkpoints" / "best.json"
    path.write_text('{"step": 9}')
    with pytest.raises(ValueError, match="step 9 is best, but .*checkpoints/9 does not exist"):
        run_directory.best(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="best.json is damaged"):
        run_directory.best(tmp_path)


def test_a_step_can_be_saved_again_and_newer_ones_are_set_aside(tmp_path):
    """A run that went on from step 1 because 2 and 3 were damaged comes to 2 again."""
    save(tmp_path, 1, 2, 3, keep_last=3)
    said = []
    save(tmp_path, 2, where=mesh(), keep_last=1, warn=said.append)
    assert steps(tmp_path) == [2] and "3.set-aside-1" in names(tmp_path)
    assert "step 3 is not of this run" in said[0]
    assert json.loads((step_directory(tmp_path, 2) / "run.json").read_text())["mesh"]["fsdp"] == 1
    assert_same(restore(latest(tmp_path), abstract(mesh())), 2)


def test_a_start_tidies_up_after_a_kill(tmp_path):
    """Half-written and half-deleted steps go; a step that was about to be replaced comes back if it was not."""
    save(tmp_path, 1, 2)
    directory = tmp_path / "checkpoints"
    for name in ("3.11-22.partial", "0.deleted.partial", "1.replaced"):
        shutil.copytree(directory / "1", directory / name)
    (directory / "2").rename(directory / "2.replaced")
    (directory / ".best.json.new").write_text("{")
    assert steps(tmp_path) == [1]
    saver(tmp_path).close()
    assert names(tmp_path) - {".best.json.new"} == {"1", "2"}
    assert latest(tmp_path).name == "2"
