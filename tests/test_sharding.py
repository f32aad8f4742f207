"""The mesh, the table of axes, and the sharding of every parameter of the released model."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from radfm_jax.checkpoints.checkpoint import flatten
from radfm_jax.models import radfm
from radfm_jax.runtime import sharding
from radfm_jax.runtime.sharding import AXES, BATCH, make_mesh, param_shardings, param_specs, place_batch, spec

# --- the table --------------------------------------------------------------------------------------------------------


def boxed(shape, *names):
    return nn.Partitioned(jax.ShapeDtypeStruct(shape, jnp.float32), names)


def test_spec_reads_the_table():
    assert spec(("batch", None, "embed")[:2]) == PartitionSpec(BATCH, None)
    assert spec(("layers", "embed", "heads", "head_dim")) == PartitionSpec(None, "fsdp", "tensor", None)
    assert spec(("vocab", "embed")) == PartitionSpec("tensor", "fsdp")


@pytest.mark.parametrize(
    "names, message",
    [
        (("embed", "mpl"), r"llama/up: logical axis \['mpl'\] is not in .*RULES \(batch, embed"),
        (
            ("embed", "patch"),
            r"llama/up: axes .*'embed', 'patch'.* map two dimensions of one array to .* \['fsdp'\]",
        ),
        (("heads", "vocab"), r"llama/up: .* map two .* \['tensor'\]"),
        (("batch", "embed"), r"llama/up: .* map two .* \['fsdp'\]"),
        (("embed", "embed"), r"llama/up: .* map two .* \['fsdp'\]"),
    ],
)
def test_misspelt_names_and_collisions_name_the_parameter(names, message):
    """Linen would silently leave the first unsharded and drop the second axis of the other."""
    with pytest.raises(ValueError, match=message):
        param_specs({"llama": {"up": boxed((8, 8), *names), "down": boxed((8,), "embed")}})


def test_a_parameter_without_names_is_an_error():
    tree = {"vit": {"scale": jax.ShapeDtypeStruct((8,), jnp.float32)}}
    with pytest.raises(ValueError, match="parameter vit/scale has no logical axes"):
        param_specs(tree)


# --- the released model -----------------------------------------------------------------------------------------------

LARGE = radfm.radfm_14b()


@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 32, 1), (2, 16, 1), (1, 8, 4), (4, 64, 1)], ids=str)
def test_every_parameter_of_the_released_model_is_sharded(sizes):
    """No device has more than its share of the float32 parameters, and there are no notes."""
    mesh = AbstractMesh(sizes, AXES)
    tree = radfm.abstract_params(LARGE)
    shardings, notes = param_shardings(tree, mesh)
    for name, reason in notes.items():
        print(f"{name}: {reason}")
    assert notes == {}
    shapes, shardings = flatten(nn.unbox(tree)), flatten(shardings)
    assert shapes.keys() == shardings.keys()
    share, total = 0, 0
    for name, shape in shapes.items():
        assert shape.dtype == jnp.float32 and "fsdp" in shardings[name].spec, name
        share += np.prod(shardings[name].shard_shape(shape.shape))
        total += np.prod(shape.shape)
    assert total == 13_123_822_336
    ways = sizes[1] * sizes[2]
    # With a tensor axis, norms, biases and the projections around the LLM are sharded over fsdp alone: 0.6 % more.
    assert total / ways <= share <= total / ways * (1 if sizes[2] == 1 else 1.006)


def test_a_mesh_that_does_not_divide_is_replicated_and_noted():
    """Five GPUs divide LLaMA's widths, not the vision encoder's 768."""
    shardings, notes = param_shardings(radfm.abstract_params(LARGE), AbstractMesh((1, 5, 1), AXES))
    assert notes["vit/blocks/qkv/kernel"] == (
        "dimension 768 of (12, 768, 3, 8, 64) is not divisible by fsdp=5: replicated"
    )
    flat = flatten(shardings)
    assert not any(name.startswith("llama/") for name in notes)
    assert all(("fsdp" in flat[name].spec) == (name not in notes) for name in flat)


def test_a_mesh_without_fsdp_axis_use_is_noted():
    _, notes = param_shardings({"marks": boxed((2, 8), None, None)}, AbstractMesh((1, 8, 1), AXES))
    assert notes == {"marks": "no axis of (None, None) maps to fsdp"}


def test_both_dimensions_that_do_not_divide_are_noted():
    _, notes = param_shardings({"up": boxed((9, 7), "embed", "mlp")}, AbstractMesh((1, 2, 2), AXES))
    assert "dimension 9" in notes["up"] and "fsdp=2" in notes["up"]
    assert "dimension 7" in notes["up"] and "tensor=2" in notes["up"]


# --- the mesh ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ({}, (1, 8, 1)),
        ({"data": 2}, (2, 4, 1)),
        ({"data": -1, "fsdp": 2}, (4, 2, 1)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, (2, 2, 2)),
        ({"data": 8, "fsdp": 1}, (8, 1, 1)),
        ({"fsdp": 8}, (1, 8, 1)),
    ],
)
def test_mesh_sizes(sizes, shape):
    mesh = make_mesh(**sizes)
    assert mesh.axis_names == AXES and mesh.devices.shape == shape
    assert {d.id for d in mesh.devices.flat} == {d.id for d in jax.devices()}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"data": 3}, "data=3, fsdp=-1, tensor=1 does not fit 8 devices"),
        ({"fsdp": 4}, "data=1, fsdp=4, tensor=1 does not fit 8 devices"),
        ({"fsdp": 16}, "does not fit 8 devices"),
        ({"data": -1}, "data=-1, fsdp=-1, tensor=1: .* one of them may be -1"),
        ({"tensor": 0}, "tensor=0: sizes must be at least 1"),
        ({"fsdp": -2}, "fsdp=-2.* at least 1"),
        ({"slices": 2}, "data must be a multiple of the 2 slices"),
        ({"data": 4, "slices": 3}, "multiple of the 3 slices"),
        ({"slices": 0}, "multiple of the 0 slices"),
    ],
)
def test_mesh_sizes_that_do_not_fit(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class Device:
    """The attributes of a device that a mesh reads."""

    id: int
    slice_index: int
    platform: str = "stand-in"
    device_kind: str = "stand-in"
    process_index: int = 0


class DeviceWithoutSlices:
    def __init__(self, id):
        self.id, self.platform, self.device_kind, self.process_index = id, "stand-in", "stand-in", 0


@pytest.mark.parametrize("data", [2, 4])
def test_slices_are_along_the_data_axis(data):
    """Only `data` crosses the slow network, in whatever order the devices are listed."""
    devices = [Device(i, i % 2) for i in range(16)]
    grid = make_mesh(data, -1, 2, slices=2, devices=devices).devices
    assert grid.shape == (data, 8 // data, 2)
    slices = np.vectorize(lambda d: d.slice_index)(grid)
    np.testing.assert_array_equal(slices, np.broadcast_to(slices[:, :1, :1], grid.shape))
    np.testing.assert_array_equal(slices[:, 0, 0], np.repeat([0, 1], data // 2))


def test_slices_without_topology_are_runs_of_devices():
    devices = [DeviceWithoutSlices(i) for i in range(8)]
    ids = np.vectorize(lambda d: d.id)(make_mesh(2, 2, 2, slices=2, devices=devices).devices)
    np.testing.assert_array_equal(ids, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])


# --- activations and batches ------------------------------------------------------------------------------------------


def test_constrain_without_a_mesh_is_the_array_itself():
    x = jnp.ones((8, 2))
    assert sharding.constrain(x, "batch", None) is x


def test_constrain_pins_rows_to_devices():
    x = jnp.ones((8, 2))
    with jax.set_mesh(make_mesh(2, 2, 2)):
        pinned = jax.jit(lambda x: sharding.constrain(x * 2, "batch", None))(x)
        with pytest.raises(ValueError, match="'rows'"):
            sharding.constrain(x, "rows", None)
    assert pinned.sharding.spec == PartitionSpec(BATCH, None) or pinned.sharding.spec == PartitionSpec(BATCH)
    assert pinned.addressable_shards[0].data.shape == (2, 2)


def test_constrain_inside_shard_map_is_the_array_itself():
    mesh = make_mesh(2, 4, 1)
    rows = PartitionSpec(BATCH)
    doubled = jax.shard_map(lambda x: sharding.constrain(x * 2, "batch"), mesh=mesh, in_specs=rows, out_specs=rows)
    np.testing.assert_array_equal(doubled(jnp.arange(8.0)), 2 * np.arange(8))


def test_place_batch():
    """Rows over data and fsdp, in order; every array of the row on the same device."""
    batch = {"ids": np.arange(16).reshape(8, 2), "weights": np.arange(8.0)}
    placed = place_batch(batch, make_mesh(2, 2, 2))
    for name, array in placed.items():
        np.testing.assert_array_equal(array, batch[name])
        assert array.sharding.spec == PartitionSpec(BATCH)
    rows_by_device = {s.device: s.index[0] for s in placed["ids"].addressable_shards}
    assert rows_by_device == {s.device: s.index[0] for s in placed["weights"].addressable_shards}
    assert {(rows.start, rows.stop) for rows in rows_by_device.values()} == {(0, 2), (2, 4), (4, 6), (6, 8)}


@pytest.mark.parametrize("rows", [{"ids": 3, "weights": 3}, {"ids": 8, "weights": 4}, {"ids": 12, "weights": 12}])
def test_place_batch_of_rows_that_do_not_divide(rows):
    batch = {name: np.zeros((n, 2)) for name, n in rows.items()}
    with pytest.raises(ValueError, match=re.escape(str(rows)) + " do not divide over 8 devices"):
        place_batch(batch, make_mesh(2, 4, 1))
