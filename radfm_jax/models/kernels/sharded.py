"""Run a kernel that XLA cannot partition on the rows and heads of each device."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from radfm_jax.runtime.sharding import BATCH


def by_device(local, q, k, v, q_segments, k_segments) -> jax.Array:
    """XLA cannot partition a hand-written kernel or loop: its rows and heads are handed out here."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = {a for a in mesh.axis_names if a not in mesh.manual_axes}
    if not axes:
        return local(q, k, v, q_segments, k_segments)
    tensor = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
    heads, rows = PartitionSpec(BATCH, None, tensor), PartitionSpec(BATCH)
    return jax.shard_map(
        local, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, axis_names=axes, check_vma=False
    )(q, k, v, q_segments, k_segments)
