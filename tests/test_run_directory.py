"""Run directories: damage detection, which step is used, which steps are kept, and recovery after a kill."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from saved_states import mesh, names, save
from saving_child import abstract, assert_same, saver

from radfm_jax.checkpoints import run_directory
from radfm_jax.checkpoints.run_directory import latest, step_directory, steps
from radfm_jax.checkpoints.train_state import restore

# --- damage -----------------------------------------------------------------------------------------------------------

DAMAGE = ("bit", "truncated", "zeroed page", "deleted", "swapped", "added")


def damage(directory: Path, rng) -> tuple[str, str] | None:
    """Damage one or two files; return (kind, file that must be named), or None if no content changed."""
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
    if name == "manifest.json":  # changed white space or format number is not damage
        with contextlib.suppress(ValueError, KeyError):
            if json.loads(new)["files"] == json.loads(old)["files"]:
                return None
        name = str(directory)  # a damaged manifest may blame any file
    return (kind, name) if new != old else None


@pytest.mark.parametrize("tries", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_all_damage_is_detected(tries, tmp_path, capsys):
    save(tmp_path / "run", 1, 2)
    directory, intact = step_directory(tmp_path / "run", 2), tmp_path / "intact"
    shutil.copytree(directory, intact)
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
        shutil.copytree(intact, directory)
    with capsys.disabled():
        print(f"\nsilent: {len(silent)} of {tries}; {kinds}")
    assert silent == [] and all(kinds.values())
    assert latest(tmp_path / "run") == directory


def test_an_older_step_is_used_only_if_allowed_and_reported(tmp_path):
    assert latest(tmp_path) is None
    save(tmp_path, 1, 2, 3, keep_last=3)
    for step in (3, 2):
        (step_directory(tmp_path, step) / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoints/3 is damaged:\n +size differs: run.json\n.*newest step of"):
        latest(tmp_path)
    warnings = []
    assert latest(tmp_path, allow_older=True, warn=warnings.append) == step_directory(tmp_path, 1)
    (line,) = warnings
    assert "RESUMING FROM STEP 1 INSTEAD OF 3" in line and "checkpoints/2 is damaged" in line
    (step_directory(tmp_path, 1) / "run.json").unlink()
    with pytest.raises(ValueError, match="missing: run.json\nAll steps of .* are damaged"):
        latest(tmp_path, allow_older=True, warn=warnings.append)
    with pytest.raises(ValueError, match="missing: run.json"):
        restore(step_directory(tmp_path, 1), abstract(mesh()))


# --- retention --------------------------------------------------------------------------------------------------------


def test_which_steps_are_kept(tmp_path):
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


def test_a_best_step_selected_on_test_data_is_not_used(tmp_path, caplog):
    """An earlier version evaluated data.test during training. The next stage must not start from its choice."""
    save(tmp_path, 1, 2)
    best = {"step": 1, "metric": "eval/all/loss", "value": 1.0}
    (tmp_path / "checkpoints" / "best.json").write_text(json.dumps(best))
    assert run_directory.select_checkpoint(tmp_path) == step_directory(tmp_path, 2)
    assert "step 1 was selected on test data: using the newest step" in caplog.text
    assert run_directory.select_checkpoint(step_directory(tmp_path, 1)) == step_directory(tmp_path, 1)


def test_best_step_missing_or_damaged(tmp_path):
    save(tmp_path, 1)
    assert run_directory.best(tmp_path) is None
    path = tmp_path / "checkpoints" / "best.json"
    path.write_text('{"step": 9}')
    with pytest.raises(ValueError, match="names step 9, but .*checkpoints/9 does not exist"):
        run_directory.best(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="best.json is damaged"):
        run_directory.best(tmp_path)


def test_later_steps_are_set_aside_when_a_step_is_saved_again(tmp_path):
    """A run resumed from step 1, because 2 and 3 were damaged, and reaches step 2 again."""
    save(tmp_path, 1, 2, 3, keep_last=3)
    warnings = []
    save(tmp_path, 2, where=mesh(), keep_last=1, warn=warnings.append)
    assert steps(tmp_path) == [2] and "3.set-aside-1" in names(tmp_path)
    assert "at step 2 and does not descend from step 3: renamed to" in warnings[0]
    assert json.loads((step_directory(tmp_path, 2) / "run.json").read_text())["mesh"]["fsdp"] == 1
    assert_same(restore(latest(tmp_path), abstract(mesh())), 2)


def test_a_start_cleans_up_after_a_kill(tmp_path):
    """Incomplete and half-deleted steps are removed; a step is recovered if its replacement was not committed."""
    save(tmp_path, 1, 2)
    directory = tmp_path / "checkpoints"
    for name in ("3.11-22.partial", "0.deleted.partial", "1.replaced"):
        shutil.copytree(directory / "1", directory / name)
    (directory / "2").rename(directory / "2.replaced")
    (directory / "best.json.partial").write_text("{")
    assert steps(tmp_path) == [1]
    saver(tmp_path).close()
    assert names(tmp_path) == {"1", "2"}
    assert latest(tmp_path).name == "2"
