"""A failed save is reported and harms no other step: full disks, deleted directories, exceptions; one writer."""

import errno
import gc
import os
import re
import shutil
import socket
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from saved_states import mesh, names
from saving_child import abstract, assert_same, data_state, saver, state

from radfm_jax.checkpoints import checkpoint
from radfm_jax.checkpoints.run_directory import latest, step_directory, steps
from radfm_jax.checkpoints.step_writer import SaveError, StepWriter
from radfm_jax.checkpoints.train_state import restore

# --- a save that fails ------------------------------------------------------------------------------------------------


def unraised(test):
    """Ignore a warning of Orbax, which closes its event loop after one failed array while it still writes others."""
    test = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")(test)
    return pytest.mark.usefixtures("collected")(test)


@pytest.fixture
def collected():
    """Collect the garbage of such a test here, not in the next test."""
    yield
    gc.collect()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB; skips the test if this user may not mount one."""
    path = tmp_path / "small"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def filled(n: int) -> dict:
    """A state that is 4 MB larger."""
    full = state(n, mesh())
    full["params"]["vit"]["large"] = jnp.ones((1024, 1024))
    return full


def test_a_start_frees_space(tmp_path):
    """A lower `keep_last` deletes steps at the start, before the next save needs the space; later steps stay."""
    with saver(tmp_path, keep_last=9) as s:
        for step in range(1, 6):
            s.save(state(step, mesh()), data_state(step))
    with saver(tmp_path, keep_last=2) as s:
        assert steps(tmp_path) == [1, 2, 3, 4, 5]  # nothing is deleted until the run is accepted
        s.begin(step_directory(tmp_path, 4))
        assert steps(tmp_path) == [3, 4, 5]


@unraised
@pytest.mark.parametrize("tries", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_a_full_disk(tries, small_disk, monkeypatch):
    with saver(small_disk) as s:
        s.save(state(1, mesh()), data_state(1), wait=True)
        with pytest.raises(SaveError, match=r"step 2 was not saved at .*small/checkpoints/2 \(4.2 MB; 1.. MB are"):
            s.save(filled(2), data_state(2))
        monkeypatch.setattr(checkpoint, "require_space", lambda *_: None)  # another program fills it later
        rng = np.random.default_rng(0)
        for _ in range(tries):
            rest = shutil.disk_usage(small_disk).free
            (small_disk / "filler").write_bytes(bytes(int(rng.integers(rest - 40_000, rest))))
            with pytest.raises(SaveError, match=r"step 2 was not saved at .*No space left on device"):
                s.save(filled(2), data_state(2), wait=True)
            (small_disk / "filler").unlink()
            assert steps(small_disk) == [1]
            assert_same(restore(latest(small_disk), abstract(mesh())), 1)
        s.save(state(2, mesh()), data_state(2), wait=True)  # with enough space again
        assert names(small_disk) == {"1", "2"}


@unraised
@pytest.mark.parametrize("tries", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_a_disk_that_becomes_read_only(tries, small_disk):
    remount = lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)  # noqa: E731
    s = saver(small_disk)
    s.save(state(1, mesh()), data_state(1), wait=True)
    s.close()  # the open lock file would prevent the remount
    with pytest.raises(ValueError, match=f"{small_disk}.* cannot be written: Read-only file system"):
        remount("ro")
        saver(small_disk)
    for _ in range(tries):
        remount("rw")
        s = saver(small_disk)
        s._lock.close()
        remount("ro")
        with pytest.raises(SaveError, match="step 2 was not saved at .*small/checkpoints/2 .*Read-only file system"):
            s.save(state(2, mesh()), data_state(2))
        s.close()
        assert_same(restore(latest(small_disk), abstract(mesh())), 1)


@pytest.mark.parametrize("where", ["hash_files", "_commit"])
@pytest.mark.parametrize("raised_by", ["wait", "save", "close", "with"])
def test_background_failures_are_raised(raised_by, where, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    workdir = tmp_path / "run"
    s = saver(workdir)
    s.save(state(1, mesh()), data_state(1), wait=True)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint if where == "hash_files" else StepWriter, where, full)
        s.save(state(2, mesh()), data_state(2))
        s._thread.join()
    match = r"step 2 was not saved at .*run/checkpoints/2 \(.* kB; .* GB are free\): OSError: .*No space left"
    with pytest.raises(SaveError, match=match) as e:
        if raised_by == "wait":
            s.wait()
        elif raised_by == "save":
            s.save(state(3, mesh()), data_state(3))
        elif raised_by == "close":
            s.close()
        else:
            with s:
                pass
    assert isinstance(e.value.__cause__, OSError)
    assert names(workdir) == {"1"}
    assert_same(restore(latest(workdir), abstract(mesh())), 1)
    with saver(workdir) if raised_by in ("close", "with") else s as s:  # raised once; later saves work
        s.save(state(4, mesh()), data_state(4))
    assert steps(workdir) == [1, 4]


def test_a_failed_save_does_not_hide_another_exception(tmp_path, monkeypatch):
    with pytest.raises(KeyError) as e, monkeypatch.context() as patch, saver(tmp_path) as s:
        patch.setattr(checkpoint, "hash_files", lambda *_, **__: 1 / 0)
        s.save(state(1, mesh()), data_state(1))
        s._thread.join()
        raise KeyError("first")
    assert "step 1 was not saved" in e.value.__notes__[0]


def test_failed_clean_up_after_the_commit(tmp_path, monkeypatch):
    with saver(tmp_path, keep_last=1) as s:
        s.save(state(1, mesh()), data_state(1), wait=True)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "rmtree", lambda *_: 1 / 0)
            with pytest.raises(SaveError, match="step 2 is saved at .*checkpoints/2, but cleaning up failed: Zero"):
                s.save(state(2, mesh()), data_state(2), wait=True)
    assert steps(tmp_path) == [2]


@unraised
@pytest.mark.parametrize("phase", ["write", "list", "hash"])
@pytest.mark.parametrize("deleted", ["*.partial", "*.partial/params", "*.partial/training/key/c", ".", ".."])
def test_a_directory_deleted_during_a_save(deleted, phase, tmp_path, monkeypatch):
    """tensorstore recreates deleted directories without an error: the rest must not be committed as a step."""
    workdir, barrier = tmp_path / "run", StepWriter.barrier
    checkpoints = workdir / "checkpoints"

    def delete(self, name, work):
        if name == phase and self.step == 2:
            glob = "*" in deleted
            for path in list(checkpoints.glob(deleted)) if glob else [(checkpoints / deleted).resolve()]:
                for _ in range(1000):  # Orbax may still write to it
                    shutil.rmtree(path, ignore_errors=True)
                    if not path.exists():
                        break
        return barrier(self, name, work)

    s = saver(workdir)
    s.save(state(1, mesh()), data_state(1), wait=True)
    monkeypatch.setattr(StepWriter, "barrier", delete)
    s.save(state(2, mesh()), data_state(2))
    try:
        s.wait()
    except SaveError as e:
        assert re.search(r"step 2 was not saved at .*run/checkpoints/2 .*(disappeared|No such file)", str(e)), e
        assert 2 not in steps(workdir)
    else:  # deleted before it was written
        assert phase == "write"
        assert_same(restore(step_directory(workdir, 2), abstract(mesh())), 2)
    if deleted.startswith("*"):
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
