"""Run a kernel that XLA cannot partition on each device's rows and heads."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec

from radfm_jax.runtime.sharding import BATCH


def run_per_device(kernel, q, k, v, q_segments, k_segments) -> jax.Array:
    """Apply a hand-written kernel or loop under shard_map: rows over `data` and `fsdp`, heads over `tensor`."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = {a for a in mesh.axis_names if a not in mesh.manual_axes}
    if not axes:
        return kernel(q, k, v, q_segments, k_segments)
    tensor = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
    heads, rows = PartitionSpec(BATCH, None, tensor), PartitionSpec(BATCH)
    return jax.shard_map(
        kernel, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, axis_names=axes, check_vma=False
    )(q, k, v, q_segments, k_segments)
