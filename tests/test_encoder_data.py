"""The data of an encoder: patches of other sizes and orders, presets, checks against the model, stored preparations."""

import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict

from input_pipeline.batching.collate import ScanPlanes
from input_pipeline.config import DataConfig
from input_pipeline.images.planes import (
    Patches,
    Sizes,
    patch_count,
    patch_positions,
    plane_count,
    planes,
    target_shape,
    to_planes,
)
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.index.index import changed_settings, record_settings
from input_pipeline.inspect.images import volume_of_slot
from radfm_jax.checkpoints import checkpoint
from radfm_jax.inference import inputs, stored
from radfm_jax.inference.inputs import Preparation
from radfm_jax.models.encoders import siglip
from radfm_jax.models.encoders.ctvit import CTViTConfig
from radfm_jax.models.encoders.dinov2 import rad_dino
from radfm_jax.models.encoders.kinds import data_preset, data_problems
from radfm_jax.models.encoders.siglip import SiglipConfig, medsiglip
from radfm_jax.models.radfm import RadFMConfig, tiny
from radfm_jax.models.vit3d import ViTConfig
from radfm_jax.training.experiment import Experiment
from radfm_jax.training.follow import follow_checkpoint

SLICES = Patches((4, 4, 1), (3, 3, 8), "slabs")
SLABS = Patches((4, 4, 3), (3, 3, 4), "slabs")


def sizes(patches: Patches) -> Sizes:
    return Sizes(12, 12, 6, patches)


@pytest.mark.parametrize(
    "step, depths, expected",
    [
        (1, (1, 2, 5, 6, 7, 100), (1, 2, 5, 6, 6, 6)),
        (3, (1, 2, 4, 5, 7, 8, 100), (3, 3, 3, 6, 6, 6, 6)),
    ],
)
def test_depth_is_a_multiple_of_the_patch(step, depths, expected):
    own = sizes(Patches((4, 4, step), (3, 3, 8), "slabs"))
    assert tuple(target_shape((20, 30, d), sizes=own) for d in depths) == tuple((12, 12, d) for d in expected)


def test_patches_of_a_slab_are_neighbours():
    grid, tables = (2, 1, 3), (2, 1, 6)
    np.testing.assert_array_equal(
        patch_positions(grid, tables, "slabs"), [[0, 0, 1], [1, 0, 1], [0, 0, 3], [1, 0, 3], [0, 0, 5], [1, 0, 5]]
    )
    np.testing.assert_array_equal(
        patch_positions(grid, tables), [[0, 0, 1], [0, 0, 3], [0, 0, 5], [1, 0, 1], [1, 0, 3], [1, 0, 5]]
    )


@pytest.mark.parametrize("patches", [SLICES, SLABS, dataclasses.replace(SLABS, order="columns")])
@pytest.mark.parametrize("shape", [(15, 20, 1, 1), (15, 20, 1, 3), (12, 12, 6, 1), (9, 30, 11, 3)])
def test_planes_of_a_scan_expand_to_its_patches(patches, shape):
    voxels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    volume = prepare_volume(voxels, sizes=sizes(patches))
    stored_planes, index = planes(volume)
    expanded = to_planes(volume.values().transpose(3, 0, 1, 2), patches.size, patches.order)
    np.testing.assert_allclose(
        stored_planes[index].reshape(expanded.shape) * np.float32(volume.scale), expanded, atol=1e-6
    )
    assert len(index) == patch_count(shape[:3], sizes=sizes(patches))
    assert len(stored_planes) == plane_count(shape[:3], shape[3], sizes=sizes(patches))
    # A row of the model, and back to the volume that `inspect` shows.
    row = {k: v[0] for k, v in inputs.scan_rows([volume], len(index) + 9, len(stored_planes) + 1, 2).items()}
    assert row["plane_index"].shape[-2:] == (patches.size[2], 3)
    shown = volume_of_slot(row, 0, patches)
    np.testing.assert_array_equal(np.broadcast_to(shown.voxels, volume.voxels.shape), volume.voxels)
    assert shown.shape == volume.shape == (12, 12, target_shape(shape[:3], sizes=sizes(patches))[2])
    np.testing.assert_array_equal(ScanPlanes.of(volume).positions, patches.positions(volume.shape))


# --- presets ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, expected",
    [
        (medsiglip(), {"patch": (14, 14, 1), "position_tables": (32, 32, 64), "size_2d": 448, "fit": "stretch"}),
        (rad_dino(), {"patch": (14, 14, 1), "position_tables": (37, 37, 64), "size_3d": 518, "fit": "pad"}),
        (CTViTConfig(), {"patch": (20, 20, 10), "position_tables": (24, 24, 24), "size_3d": 480, "channels": 1,
                         "intensity": "-1000,1000"}),
    ],
)  # fmt: skip
def test_a_preset_makes_data_that_fit(config, expected):
    preset = data_preset(config)
    assert preset.items() >= expected.items()
    depth = min(config.tables[2], 24) * config.patch[2]
    data = DataConfig(**preset, depth=depth, patch_length=config.slab * 24)
    assert not list(data_problems(config, data))
    assert data.sizes.patches == Patches(config.patch, config.tables, "slabs")
    assert target_shape((512, 512, 1), sizes=data.sizes) == (*[config.image_size] * 2, config.patch[2])
    # The preparation travels with a checkpoint, and comes back.
    preparation = Preparation.from_data(ConfigDict(data.to_dict()).to_dict())
    assert preparation.sizes == data.sizes and not list(data_problems(config, preparation))
    assert stored.from_record(stored.to_record(preparation), "radfm.json") == preparation
    plain = preparation.to_dict()
    assert plain["patch_order"] == "slabs" and plain["patch"] == list(config.patch)


def test_ct_windows_are_channels_of_a_source():
    source = {"family": "jsonl", "table": "t", "root": "/data", "intensity": siglip.CT_CHANNELS}
    data = DataConfig(train={"ct": source}, **data_preset(medsiglip()), patch_length=1024)
    assert Preparation.from_data(data.to_dict()).intensities == ("lung/soft_tissue/bone",)


def test_defaults_are_those_of_radfm_and_leave_no_trace():
    data = DataConfig()
    assert data.own_patches == {} and not list(data_problems(ViTConfig(), data))
    assert {"patch", "position_tables", "patch_order"}.isdisjoint(record_settings(data))
    assert {"patch", "position_tables", "patch_order"}.isdisjoint(Preparation().to_dict())
    other = DataConfig(**data_preset(medsiglip()))
    assert other.own_patches == {"patch": [14, 14, 1], "position_tables": [32, 32, 64], "patch_order": "slabs"}
    changed = changed_settings(record_settings(data), record_settings(other))
    assert "data.patch is [14, 14, 1], was [32, 32, 4]" in changed
    assert "data.patch is [32, 32, 4], was [14, 14, 1]" in changed_settings(
        record_settings(other), record_settings(data)
    )


def test_data_that_do_not_fit_the_encoder_name_field_and_remedy():
    config = SiglipConfig()
    problems = "\n".join(data_problems(config, DataConfig()))
    for line in (
        "data.patch is (32, 32, 4), but model.vision (kind siglip) needs (16, 16, 1): set data.patch=(16, 16, 1)",
        "data.position_tables is (16, 16, 128), but model.vision (kind siglip) needs (14, 14, 64)",
        "data.patch_order is columns, but model.vision (kind siglip) needs slabs",
        "data.size_2d is 512, but model.vision (kind siglip) needs 224",
        "data.size_3d is 256, but model.vision (kind siglip) needs 224",
        "data.patch_length 1024 is not a multiple of 196",
    ):
        assert line in problems
    assert "data.channels is 3, but model.vision.channels is 1" in "\n".join(data_problems(CTViTConfig(), DataConfig()))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"patch": (14, 14, 1)}, "data.patch, .*: .*height 512 is not a multiple of 14"),
        ({"patch": (14, 14, 1), "size_2d": 448, "size_3d": 448}, "height 448 is 32 patches, but there are 16 learned"),
        ({"patch_order": "slices"}, "data.patch_order must be one of columns, slabs"),
        ({"patch": (14, 14)}, "data.patch must have 3 values"),
        (
            {"preprocess": "released", "storage": "float32", "patch_order": "slabs"},
            "cannot be combined with data.patch",
        ),
    ],
)
def test_bad_patches_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**fields)


@pytest.mark.parametrize("part", ["radfm", "vision"])
def test_a_run_follows_the_encoder_of_a_checkpoint(tmp_path, part):
    """Another encoder replaces that of the config, with its patch; other settings of the config stay."""
    vision = dataclasses.replace(medsiglip(), remat="none")
    model = RadFMConfig(vision, dataclasses.replace(RadFMConfig().perceiver, width=vision.width), tiny().llama)
    data = DataConfig(**data_preset(vision), patch_length=1024)
    if part == "radfm":
        preparation = stored.to_record(Preparation.from_data(data.to_dict()))
        checkpoint.write_description(tmp_path, part, model.to_dict(), preparation=preparation)
    else:
        checkpoint.write_description(tmp_path, part, {"vision": model.to_dict()["vision"]})
    config = ConfigDict(Experiment(tiny()).to_dict(), convert_dict=True).lock()
    config.model.vision.remat = "dots"
    config.checkpoint.init_from, config.data.patch_length = str(tmp_path), 1024
    config = follow_checkpoint(config, {"model.perceiver.num_layers"} if part == "radfm" else {"data.depth"})
    if part == "vision":
        config.model.perceiver.width = vision.width
    followed = Experiment.from_dict(config)
    assert followed.model.vision == dataclasses.replace(vision, remat="dots")
    assert followed.model.perceiver.num_layers == tiny().perceiver.num_layers
    assert followed.data.patches == data.patches and (followed.data.size_2d, followed.data.size_3d) == (448, 448)
    assert not list(data_problems(followed.model.vision, followed.data))


# --- the config of the slot -------------------------------------------------------------------------------------------


def test_the_kind_chooses_the_config():
    fields = RadFMConfig().to_dict()
    del fields["vision"]["kind"], fields["perceiver"]["kind"]
    assert RadFMConfig.from_dict(fields) == RadFMConfig()  # stored before there was a kind
    for vision in (medsiglip(), rad_dino(), CTViTConfig()):
        config = RadFMConfig(vision, dataclasses.replace(RadFMConfig().perceiver, width=vision.width))
        group = ConfigDict(config.to_dict(), convert_dict=True)
        assert RadFMConfig.from_dict(group) == config
    with pytest.raises(ValueError, match="model.vision.kind must be one of vit3d, siglip, dinov2, ctvit .*'siglips'"):
        RadFMConfig.from_dict({"vision": {"kind": "siglips"}})
    with pytest.raises(ValueError, match="unknown fields: model.vision.registers"):
        RadFMConfig.from_dict({"vision": {"kind": "siglip", "registers": 4}})
    with pytest.raises(ValueError, match=r"model.perceiver.kind must be one of perceiver, mlp \(got 3\)"):
        RadFMConfig.from_dict({"perceiver": {"kind": 3}})


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SiglipConfig(image_size=225), "model.vision.image_size 225 must be a multiple"),
        (lambda: SiglipConfig(patch=(16, 16, 4)), "model.vision.patch must have a depth of 1"),
        (lambda: SiglipConfig(num_heads=7), "model.vision.width 768 must be a multiple of num_heads 7"),
        (lambda: SiglipConfig(mean=(0.5,)), "model.vision.mean must have 3 values"),
        (lambda: CTViTConfig(patch=(20, 10, 10)), "must be a multiple of the side of the square model.vision.patch"),
        (lambda: RadFMConfig(medsiglip()), "vision width 1152 and perceiver width 768 differ"),
    ],
)
def test_bad_sizes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
