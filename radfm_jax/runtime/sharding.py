"""The device mesh, and the one table from logical axes to mesh axes.

Mesh axes: `data` replicates (it may cross the slow network between slices), `fsdp` shards every parameter and the
batch, `tensor` splits heads, MLP and vocabulary. Parameters name their logical axes where they are created.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

RULES: dict[str, str | tuple[str, ...] | None] = {
    "batch": BATCH,
    "embed": "fsdp", "patch": "fsdp", "bias": "fsdp",
    "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "vocab": "tensor",
    "head_dim": None, "layers": None,
}  # fmt: skip


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, *, slices: int = 1, devices=None) -> Mesh:
    """Return a named mesh of all devices, ordered to suit their network.

    Args:
      data, fsdp, tensor: axis sizes; at most one may be -1, which takes the remaining devices.
      slices: number of TPU slices (or groups of GPU nodes) joined by a slow network. It must divide `data`.
        `data=2, fsdp=256, slices=2` is two slices of 256 chips.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    requested = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {requested}: sizes must be at least 1; one of them may be -1 for the remaining devices")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(f"mesh {requested} does not fit {len(devices)} devices: its sizes must multiply to that")
    if slices < 1 or sizes[0] % slices:
        raise ValueError(f"mesh {requested}: data must be a multiple of the {slices} slices")
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        inner = [sizes[0] // slices, *sizes[1:]]
        if hasattr(devices[0], "slice_index"):
            grid = mesh_utils.create_hybrid_device_mesh(inner, [slices, 1, 1], devices, allow_split_physical_axes=True)
        else:  # the devices report no slice: assume that they are listed slice by slice
            grid = np.asarray(devices).reshape(sizes)
    # Auto: XLA propagates shardings. (jax.make_mesh's Explicit default fails on Linen's boxed parameters.)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(names: tuple[str | None, ...], what: str = "array") -> PartitionSpec:
    """Return the PartitionSpec of logical axis names.

    Raises ValueError, with `what` in the message, for an unknown name, or if two dimensions use one mesh axis. Linen
    would silently leave unknown names unsharded, and drop the second dimension's axis.
    """
    unknown = [n for n in names if n is not None and n not in RULES]
    if unknown:
        raise ValueError(f"{what}: logical axis {unknown} is not in runtime.sharding.RULES ({', '.join(RULES)})")
    axes = [RULES[n] if n is not None else None for n in names]
    used = [a for axis in axes if axis is not None for a in ((axis,) if isinstance(axis, str) else axis)]
    if twice := {a for a in used if used.count(a) > 1}:
        raise ValueError(f"{what}: axes {names} map two dimensions of one array to mesh axis {sorted(twice)}")
    return PartitionSpec(*axes)


def param_specs(boxed) -> dict:
    """Return the PartitionSpecs of a boxed (Linen) parameter tree, e.g. of `jax.eval_shape(model.init, ...)`."""

    def spec_of(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not _is_box(leaf):
            raise ValueError(f"parameter {name} has no logical axes: create it with nn.with_logical_partitioning")
        return spec(leaf.names, name)

    return jax.tree_util.tree_map_with_path(spec_of, boxed, is_leaf=_is_box)


def param_shardings(boxed, mesh: Mesh | AbstractMesh) -> tuple[dict, dict[str, str]]:
    """Return the NamedShardings of a boxed parameter tree, and notes on the parameters that are not fully sharded.

    A dimension that is not divisible by its mesh axis is replicated (5 GPUs cannot split 768). This is not an error; it
    is reported in the notes {parameter path: reason}. With an AbstractMesh, no devices are needed.
    """
    notes: dict[str, str] = {}

    def sharding_of(path, leaf, leaf_spec):
        name, axes, reasons = jax.tree_util.keystr(path, simple=True, separator="/"), [], []
        for dim, axis in zip(leaf.value.shape, leaf_spec, strict=True):
            ways = mesh.shape[axis] if axis is not None else 1
            if dim % ways:
                reasons.append(f"dimension {dim} of {leaf.value.shape} is not divisible by {axis}={ways}: replicated")
                axis = None
            axes.append(axis)
        if "fsdp" not in axes and not reasons:
            reasons.append(f"no axis of {leaf.names} maps to fsdp")
        if reasons:
            notes[name] = "; ".join(reasons)
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree_util.tree_map_with_path(sharding_of, boxed, param_specs(boxed), is_leaf=_is_box), notes


def _is_box(x) -> bool:
    return isinstance(x, nn.Partitioned)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain an activation to its logical axes under `jax.set_mesh(mesh)`; return `x` itself without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: rows over `data` and `fsdp`, each row on one device."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Return global arrays from this process's rows of a batch. Raises ValueError if the devices do not divide them."""
    ways = int(np.prod([mesh.shape[a] for a in BATCH]))
    rows = {len(v) for v in batch.values()}
    # With several processes, a process's share depends on its position in the mesh. JAX checks that itself.
    if len(rows) != 1 or (jax.process_count() == 1 and rows.pop() % ways):
        counts = {k: len(v) for k, v in batch.items()}
        raise ValueError(f"rows of the batch {counts} do not divide over {ways} devices")
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
