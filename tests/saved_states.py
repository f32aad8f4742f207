"""States on meshes of up to eight devices, saved to a run directory, for the tests of checkpoints."""

from __future__ import annotations

from pathlib import Path

import jax
from saving_child import data_state, saver, state

from radfm_jax.runtime import sharding

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
