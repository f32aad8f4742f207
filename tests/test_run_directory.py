"""Steps on disk: whole, verified, exactly what was saved; through kills, full disks, and on other meshes."""

import contextlib
import errno
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saving_child import CONFIG, abstract, assert_same, data_state, saver, state, values

import radfm_jax
from radfm_jax import checkpoint, optimizer, run_directory, sharding, train_step
from radfm_jax import saver as saver_module
from radfm_jax.models import radfm
from radfm_jax.run_directory import latest, restore, step_directory, steps
from radfm_jax.saver import SaveError

CHILD = Path(__file__).with_name("saving_child.py")
# A script finds what lies beside it, not the package, unless that is installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(CHILD.parents[1])}
MESHES = {
    "1": dict(devices=1),
    "8 fsdp": dict(fsdp=8, devices=8),
    "2, 2, 2": dict(data=2, fsdp=2, tensor=2, devices=8),
}


def mesh(data=1, fsdp=1, tensor=1, devices=None):
    return sharding.make_mesh(data, fsdp, tensor, devices=jax.devices()[: devices or data * fsdp * tensor])


def save(workdir, *numbers, where=None, metrics=None, **options) -> None:
    where = where or mesh(fsdp=2)
    with saver(workdir, **options) as s:
        for n in numbers:
            s.save(state(n, where), data_state(n), metrics=(metrics or {}).get(n))


def names(workdir) -> set[str]:
    return {p.name for p in (Path(workdir) / "checkpoints").iterdir()}


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


# --- a save that fails ------------------------------------------------------------------------------------------------


def unraised(test):
    """When one array cannot be written, Orbax closes the event loop to which the writers of the others still report."""
    test = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")(test)
    return pytest.mark.usefixtures("collected")(test)


@pytest.fixture
def collected():
    """What such a test leaves behind is found to be garbage here, and not in another test."""
    yield
    gc.collect()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB, if this user may mount one."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def filled(n: int) -> dict:
    """A state of 4 MB more."""
    full = state(n, mesh())
    full["params"]["vit"]["large"] = jnp.ones((1024, 1024))
    return full


@unraised
@pytest.mark.parametrize("tries", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_full_disk(tries, small_disk, monkeypatch):
    with saver(small_disk) as s:
        s.save(state(1, mesh()), data_state(1), wait=True)
        with pytest.raises(SaveError, match=r"step 2 was not saved at .*small/checkpoints/2 \(0.004 GB; 0.00. GB are"):
            s.save(filled(2), data_state(2))
        monkeypatch.setattr(checkpoint, "require_space", lambda *_: None)  # somebody else fills it meanwhile
        rng = np.random.default_rng(0)
        for _ in range(tries):
            rest = shutil.disk_usage(small_disk).free
            (small_disk / "filler").write_bytes(bytes(int(rng.integers(rest - 40_000, rest))))
            with pytest.raises(SaveError, match=r"step 2 was not saved at .*No space left on device"):
                s.save(filled(2), data_state(2), wait=True)
            (small_disk / "filler").unlink()
            assert steps(small_disk) == [1]
            assert_same(restore(latest(small_disk), abstract(mesh())), 1)
        s.save(state(2, mesh()), data_state(2), wait=True)  # and when there is room again
        assert names(small_disk) == {"1", "2"}


@unraised
@pytest.mark.parametrize("tries", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_a_disk_that_becomes_read_only(tries, small_disk):
    remount = lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)  # noqa: E731
    s = saver(small_disk)
    s.save(state(1, mesh()), data_state(1), wait=True)
    s.close()  # its lock is an open file, with which nothing can be remounted
    with pytest.raises(ValueError, match=f"{small_disk}.* cannot be written: Read-only file system"):
        remount("ro")
        saver(small_disk)
    for _ in range(tries):
        remount("rw")
        s = saver(small_disk)
        s._lock.release()
        remount("ro")
        with pytest.raises(SaveError, match="step 2 was not saved at .*small/checkpoints/2 .*Read-only file system"):
            s.save(state(2, mesh()), data_state(2))
        s.close()
        assert_same(restore(latest(small_disk), abstract(mesh())), 1)


@pytest.mark.parametrize("where", ["settle", "_commit"])  # while files are hashed, and while the step gets its name
@pytest.mark.parametrize("told_by", ["wait", "save", "close", "with"])
def test_whatever_fails_in_the_background_is_told(told_by, where, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    workdir = tmp_path / "run"
    s = saver(workdir)
    s.save(state(1, mesh()), data_state(1), wait=True)
    with monkeypatch.context() as patch:
        patch.setattr(run_directory if where == "settle" else saver_module._Save, where, full)
        s.save(state(2, mesh()), data_state(2))
        s._thread.join()
    match = r"step 2 was not saved at .*run/checkpoints/2 \(0.000 GB; .* GB are free\): OSError: .*No space left"
    with pytest.raises(SaveError, match=match) as e:
        if told_by == "wait":
            s.wait()
        elif told_by == "save":
            s.save(state(3, mesh()), data_state(3))
        elif told_by == "close":
            s.close()
        else:
            with s:
                pass
    assert isinstance(e.value.__cause__, OSError)
    assert names(workdir) == {"1"}
    assert_same(restore(latest(workdir), abstract(mesh())), 1)
    with saver(workdir) if told_by in ("close", "with") else s as s:  # told once, and then it goes on
        s.save(state(4, mesh()), data_state(4))
    assert steps(workdir) == [1, 4]


def test_a_failed_save_does_not_hide_another_exception(tmp_path, monkeypatch):
    with pytest.raises(KeyError) as e, monkeypatch.context() as patch, saver(tmp_path) as s:
        patch.setattr(run_directory, "settle", lambda *_, **__: 1 / 0)
        s.save(state(1, mesh()), data_state(1))
        s._thread.join()
        raise KeyError("first")
    assert "step 1 was not saved" in e.value.__notes__[0]


def test_trouble_after_the_step_has_its_name(tmp_path, monkeypatch):
    with saver(tmp_path, keep_last=1) as s:
        s.save(state(1, mesh()), data_state(1), wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_: 1 / 0)
            with pytest.raises(SaveError, match="step 2 is saved at .*checkpoints/2, but beside it: ZeroDivisionError"):
                s.save(state(2, mesh()), data_state(2), wait=True)
    assert steps(tmp_path) == [2]


@unraised
@pytest.mark.parametrize("phase", ["write", "list", "hash"])
@pytest.mark.parametrize("what", ["*.partial", "*.partial/params", "*.partial/training/key/c", ".", ".."])
def test_a_directory_that_is_deleted_while_it_is_written(what, phase, tmp_path, monkeypatch):
    """tensorstore makes deleted directories anew and goes on: what is left must not be taken for a whole step."""
    workdir, meet = tmp_path / "run", saver_module._Save.meet
    checkpoints = workdir / "checkpoints"

    def delete(self, at, work):
        if at == phase and self.step == 2:
            doomed = list(checkpoints.glob(what)) if "*" in what else [(checkpoints / what).resolve()]
            for path in doomed:
                for _ in range(1000):  # it may still be filled
                    shutil.rmtree(path, ignore_errors=True)
                    if not path.exists():
                        break
        return meet(self, at, work)

    s = saver(workdir)
    s.save(state(1, mesh()), data_state(1), wait=True)
    monkeypatch.setattr(saver_module._Save, "meet", delete)
    s.save(state(2, mesh()), data_state(2))
    try:
        s.wait()
    except SaveError as e:
        assert re.search(r"step 2 was not saved at .*run/checkpoints/2 .*(disappeared|No such file)", str(e)), e
        assert 2 not in steps(workdir)
    else:  # it was deleted before it was written
        assert phase == "write"
        assert_same(restore(step_directory(workdir, 2), abstract(mesh())), 2)
    if what.startswith("*"):
        assert_same(restore(step_directory(workdir, 1), abstract(mesh())), 1)
        s.save(state(3, mesh()), data_state(3), wait=True)
        assert latest(workdir).name == "3"
    s.close()


# --- one writer -------------------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused(tmp_path):
    first = saver(tmp_path)
    with pytest.raises(ValueError, match=rf"written by process {os.getpid()} on {socket.gethostname()}, since 20"):
        saver(tmp_path)
    first.close()
    saver(tmp_path).close()
    with pytest.raises(ValueError, match="this Saver is closed"):
        first.save(state(1, mesh()), data_state(1))


@pytest.mark.parametrize("forked", [False, True])
def test_the_lock_ends_with_its_process(forked, children, tmp_path):
    """Even if a process that it forked, as data workers are, lives on."""
    with children.run(job="hold", workdir=str(tmp_path), forked=forked) as child:
        grandchild = int(child.read().removeprefix("held "))
        with pytest.raises(ValueError, match=rf"written by process {child.pid} on "):
            saver(tmp_path)
        child.kill()
    try:
        saver(tmp_path).close()
    finally:
        if forked:
            os.kill(grandchild, signal.SIGKILL)  # it was alive, or this raises


# --- kills and ends ---------------------------------------------------------------------------------------------------


class Children:
    """Jobs of saving_child.py."""

    def __init__(self, errors: Path):
        self.errors = errors
        command = [sys.executable, str(CHILD), "serve"]
        with errors.open("a") as f:
            self.server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=f, text=True, env=ENVIRONMENT
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.__exit__(None, None, None)  # closes its pipes, which ends it, and waits

    @contextlib.contextmanager
    def run(self, **job):
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        self.pid, self.code, self.said = int(self._line().removeprefix("pid ")), None, []
        try:
            yield self
        except BaseException:
            if self.code is None:
                os.kill(self.pid, signal.SIGKILL)
            raise
        finally:
            self.wait()

    def read(self) -> str:
        """The next line that the child says. It may not end before."""
        line = self._line()
        if line.startswith("ended "):
            self.code = int(line.removeprefix("ended "))
            raise AssertionError(f"the child ended: {self.errors.read_text()}")
        return line

    def _line(self) -> str:
        line = self.server.stdout.readline().strip()
        assert line, self.errors.read_text()
        return line

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        self.wait()
        assert self.code == -signal.SIGKILL, "the kill did not fire"

    def wait(self) -> None:
        """Until the child has ended; `said` then holds what it still said."""
        while self.code is None:
            line = self._line()
            if line.startswith("ended "):
                self.code = int(line.removeprefix("ended "))
            else:
                self.said.append(line)


@pytest.fixture(scope="module")
def children(tmp_path_factory):
    with Children(tmp_path_factory.mktemp("children") / "errors") as found:
        yield found


@pytest.mark.parametrize("tries", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment(tries, children, tmp_path, capsys):
    """A process that saves without pause is killed, and started again in the same directory, over and over."""
    rng = np.random.default_rng(int(os.environ.get("SEED", 0)))
    last, halves, wrong = 0, 0, []
    for _ in range(tries):
        with children.run(job="loop", workdir=str(tmp_path)) as child:
            assert child.read() == f"from {last}"
            said = [child.read() for _ in range(int(rng.integers(1, 4)))]
            time.sleep(float(rng.uniform(0, 0.3)))
            child.kill()
        begun = int((said + child.said)[-1].removeprefix("begun "))
        visible = steps(tmp_path)
        halves += any(n.endswith((".partial", ".replaced")) for n in names(tmp_path))
        for step in visible:
            try:
                assert_same(restore(step_directory(tmp_path, step), abstract(mesh())), step)
            except (ValueError, AssertionError) as e:
                wrong.append((step, str(e)))
        # The save before the one that was begun last is done (what was begun after that, nobody may have read); steps
        # are kept by twos.
        if visible[-1] < begun - 1 or len(visible) > 3:
            wrong.append((begun, visible))
        last = int(latest(tmp_path).name)
    with capsys.disabled():
        print(f"\nwrong: {len(wrong)} of {tries} kills, {halves} of them in the middle of a save; last step {last}")
    assert wrong == [] and halves
    saver(tmp_path).close()
    assert not [n for n in names(tmp_path) if n.endswith(".partial")]
    assert_same(restore(latest(tmp_path), abstract(mesh())), last)


# How the program ends, whether the save fails, whether the end is inside `with Saver`.
ENDS = [(how, broken, closed) for how in ("return", "sys.exit", "exception") for broken in (0, 1) for closed in (0, 1)]
ENDS += [("os._exit", 0, 0)] * 4


@pytest.mark.parametrize("tries", [0, pytest.param(13, marks=pytest.mark.slow)])
def test_ends_right_after_a_save(tries, children, tmp_path, capsys):
    """Committed, or an exit code that is not 0 and a line with the step that is lost."""
    some = [("return", 0, 0), ("return", 1, 0), ("sys.exit", 1, 1), ("exception", 1, 1), ("exception", 0, 0)]
    counts = {}
    for number, (how, broken, closed) in enumerate(ENDS * tries or [*some, ENDS[-1]]):
        workdir = tmp_path / str(number)
        children.errors.write_text("")
        with children.run(job="end", workdir=str(workdir), how=how, broken=broken, closed=closed) as child:
            child.wait()
        told = f"step 2 was not saved at {workdir}/checkpoints/2" in children.errors.read_text()
        what = number, how, broken, closed
        if how == "os._exit":
            assert child.code == 0 and steps(workdir) in ([1], [1, 2]), what
        elif broken:
            assert child.code != 0 and told and steps(workdir) == [1], what
        else:
            assert child.code == (how == "exception") and not told and steps(workdir) == [1, 2], what
        for step in steps(workdir):
            assert_same(restore(step_directory(workdir, step), abstract(mesh())), step)
        counts[how] = counts.get(how, 0) + 1
        shutil.rmtree(workdir)
    with capsys.disabled():
        print(f"\nsilent: 0 of {counts}")


# --- several processes ------------------------------------------------------------------------------------------------


def test_two_processes_and_one(tmp_path):
    """Saved by one process and restored by two, saved by two and restored by two and by one; a disk that is full for
    one process only; damage that lies in the other process's share. saving_child.pair is their side."""
    save(tmp_path / "alone", 5, where=mesh(fsdp=8))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    command = [sys.executable, str(CHILD), "pair", str(tmp_path / "run"), str(tmp_path / "alone"), port]
    pair = [
        subprocess.Popen([*command, str(p)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
        for p in range(2)
    ]
    told = [p.communicate(timeout=120) for p in pair]
    assert [(p.returncode, out) for p, (out, _) in zip(pair, told, strict=True)] == [(0, "done\n")] * 2, told
    directory = latest(tmp_path / "run")
    run = json.loads((directory / "run.json").read_text())
    assert (run["processes"], run["mesh"]["fsdp"], steps(tmp_path / "run")) == (2, 4, [2, 4])
    for sizes in MESHES.values():
        assert_same(restore(directory, abstract(mesh(**sizes))), 4)
    assert run_directory.data_state(directory) == data_state(4) | {"lost": 1}
