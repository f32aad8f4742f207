"""The mesh, and the one table that says on which mesh axis each logical axis lies.

Mesh axes: `data` holds replicas (it may cross the slow network between slices), `fsdp` shards every parameter and the
batch, `tensor` splits heads, MLP and vocabulary. Parameters name their logical axes where they are made.
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
    "embed": "fsdp",
    "patch": "fsdp",
    "bias": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
    "head_dim": None,
    "layers": None,
}


def make_mesh(data: int = 1, fsdp: int = -1, tensor: int = 1, *, slices: int = 1, devices=None) -> Mesh:
    """A named mesh over all devices, in the order that suits their network.

    Args:
      data, fsdp, tensor: sizes; at most one may be -1, it takes what is left.
      slices: TPU slices (or groups of GPU nodes) joined by a slow network; they lie along `data`, whose size is a
        multiple of them. `data=2, fsdp=256, slices=2` is two slices of 256 chips.
    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    wanted = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ValueError(f"mesh {wanted}: sizes are at least 1, and one of them may be -1 for what is left")
    known = int(np.prod([size for size in sizes if size != -1]))
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if int(np.prod(sizes)) != len(devices):
        raise ValueError(f"mesh {wanted} does not fit {len(devices)} devices: their product must be that number")
    if slices < 1 or sizes[0] % slices:
        raise ValueError(f"mesh {wanted}: data must be a multiple of the {slices} slices, which lie along it")
    if slices == 1:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    else:
        inner = [sizes[0] // slices, *sizes[1:]]
        if hasattr(devices[0], "slice_index"):
            grid = mesh_utils.create_hybrid_device_mesh(inner, [slices, 1, 1], devices, allow_split_physical_axes=True)
        else:  # no topology to read: take the devices in their order, a slice after the other
            grid = np.asarray(devices).reshape(sizes)
    # Auto: XLA propagates shardings. (jax.make_mesh's Explicit default fails on Linen's boxed parameters.)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


# --- from names to shardings ------------------------------------------------------------------------------------------


def spec(names: tuple[str | None, ...], what: str = "array") -> PartitionSpec:
    """PartitionSpec of logical axis names. Linen would leave an unknown name unsharded and drop the second axis of a
    collision without a word; both raise ValueError here, naming `what`."""
    unknown = [n for n in names if n is not None and n not in RULES]
    if unknown:
        raise ValueError(
            f"{what}: logical axis {unknown} is not in radfm_jax.runtime.sharding.RULES ({', '.join(RULES)})"
        )
    axes = [RULES[n] if n is not None else None for n in names]
    used = [a for axis in axes if axis is not None for a in ((axis,) if isinstance(axis, str) else axis)]
    twice = {a for a in used if used.count(a) > 1}
    if twice:
        raise ValueError(f"{what}: axes {names} put mesh axis {sorted(twice)} on two dimensions of one array")
    return PartitionSpec(*axes)


def param_specs(boxed) -> dict:
    """The tree of PartitionSpecs of a boxed (Linen) parameter tree, e.g. of `jax.eval_shape(model.init, ...)`."""

    def one(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if not isinstance(leaf, nn.Partitioned):
            raise ValueError(f"parameter {name} names no logical axes: make it with nn.with_logical_partitioning")
        return spec(leaf.names, name)

    return jax.tree_util.tree_map_with_path(one, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def param_shardings(boxed, mesh: Mesh | AbstractMesh) -> tuple[dict, dict[str, str]]:
    """NamedShardings of a boxed parameter tree, and why a parameter is not sharded as the table says. An AbstractMesh
    does, so that a layout can be seen without its devices.

    A dimension that the mesh axis does not divide is replicated (a GPU mesh of 5 cannot split 768): never an error,
    always in the returned notes {parameter path: reason}.
    """
    notes: dict[str, str] = {}

    def one(path, leaf, wanted):
        name, axes, reasons = jax.tree_util.keystr(path, simple=True, separator="/"), [], []
        for dim, axis in zip(leaf.value.shape, wanted, strict=True):
            ways = mesh.shape[axis] if axis is not None else 1
            if dim % ways:
                reasons.append(f"dimension {dim} of {leaf.value.shape} is not divisible by {axis}={ways}: replicated")
                axis = None
            axes.append(axis)
        if "fsdp" not in axes and not reasons:
            reasons.append(f"axes {leaf.names} have none on fsdp")
        if reasons:
            notes[name] = "; ".join(reasons)
        return NamedSharding(mesh, PartitionSpec(*axes))

    is_box = lambda x: isinstance(x, nn.Partitioned)  # noqa: E731
    shardings = jax.tree_util.tree_map_with_path(one, boxed, param_specs(boxed), is_leaf=is_box)
    return shardings, notes


# --- activations and batches ------------------------------------------------------------------------------------------


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation to its logical axes under `jax.set_mesh(mesh)`; without a mesh, x itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or any(mesh._name_to_type[a] == AxisType.Manual for a in mesh.axis_names):
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over `data` and `fsdp`, everything else of a row on one device."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a global batch -> global arrays. Raises ValueError if rows do not divide the devices."""
    ways = int(np.prod([mesh.shape[a] for a in BATCH]))
    rows = {len(v) for v in batch.values()}
    # With several processes the share of one depends on how the mesh lies over them, which JAX checks itself.
    if len(rows) != 1 or (jax.process_count() == 1 and rows.pop() % ways):
        counts = {k: len(v) for k, v in batch.items()}
        raise ValueError(f"rows of the batch {counts} do not divide over {ways} devices")
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
