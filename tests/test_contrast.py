"""Notices about contrast that is lost, and about CT that is not in Hounsfield units."""

from __future__ import annotations

import numpy as np
import pytest
from test_intensity import SIZES, head_ct
from voxels import draw

from input_pipeline.images.volumes import prepare_volume


def notices(voxels, **options) -> tuple[str, ...]:
    return prepare_volume(voxels, sizes=SIZES, measure=True, **options).notices


def body() -> np.ndarray:
    """Return int16 [64, 64, 8, 1] around 250 without the air of a CT."""
    return np.clip(np.random.default_rng(0).normal(250, 540, (64, 64, 8, 1)), -1000, 1500).astype(np.int16)


def with_outlier(value) -> np.ndarray:
    voxels = body().astype(np.float32) if abs(value) > 32768 else body()
    voxels[3, 4, 5] = value
    return voxels


def with_rim(value) -> np.ndarray:
    voxels = body()
    voxels[:8] = value
    return voxels


@pytest.mark.parametrize(
    ("voxels", "low", "high"),
    [
        (with_outlier(-10000), 40, 60),
        (with_outlier(1e12), 1, 1),
        (with_rim(-32768), 14, 22),
        (with_outlier(20000), 20, 36),
    ],
)
def test_lost_contrast(voxels, low, high):
    (notice,) = notices(voxels)
    assert notice.startswith("contrast is lost: the central 98 % of the voxels (")
    assert low <= int(notice.split(" get ")[1].split()[0]) <= high, notice
    assert "remove the outliers, or choose another intensity" in notice
    assert notices(voxels, window="percentile") == ()


@pytest.mark.parametrize(
    "voxels",
    [
        body(),
        draw((64, 64, 1, 1), np.uint8, 0, 255),
        draw((64, 64, 1, 3), np.uint8, 0, 255),
        (draw((64, 64, 4, 1)) > 0.5).astype(np.uint8),  # a mask has two values and no contrast to lose
        draw((64, 64, 4, 1), np.int16, 0, 800),  # MR
        with_rim(-1000),
    ],
)
def test_good_scans_have_no_notice(voxels):
    assert notices(voxels) == ()


def test_a_window_that_clips_nearly_everything():
    voxels = body()
    (notice,) = notices(voxels, window=(-1400.0, -900.0))
    assert notice.startswith("the window -1400 to -900 clips 9") and "% to white)" in notice
    assert notices(voxels, window="bone") == ()
    (wide,) = notices(voxels, window=(-30000.0, 30000.0))
    assert "leaves 9 of 256 gray levels" in wide or "leaves 8 of 256 gray levels" in wide


def test_soft_tissue_of_a_ct():
    (notice,) = notices(head_ct())  # by its air and its tissue
    assert notice == (
        "soft tissue of this CT (0 to 80 HU) gets 5 of 256 gray levels: set an intensity such as soft_tissue, brain or "
        "lung/soft_tissue/bone"
    )
    assert notices(head_ct(), modality="CT") == (notice,)
    assert notices(head_ct(), modality="MR") == ()
    assert notices(head_ct(), window="bone") == ()  # a window was chosen
    assert notices(head_ct(), window="brain") == ()
    assert notices(head_ct(), window="lung/soft_tissue/bone") == ()


@pytest.mark.parametrize("modality", [None, "CT"])
def test_ct_that_is_not_in_hounsfield_units(modality):
    good = head_ct().astype(np.int32)
    unsigned = lambda shift: (good + shift).astype(np.uint16)  # noqa: E731
    for lost in (unsigned(1024), (good + 1024).astype(np.int16)):
        (notice,) = notices(lost, modality=modality)
        assert "lost its intercept of -1024 (0 to 4095)" in notice, notice
    (notice,) = notices((good - 1024).astype(np.int16), modality=modality)
    assert "rescaled twice (-2048 to 2047)" in notice, notice
    wrapped = notices(good.astype(np.int16).view(np.uint16), modality=modality)
    assert "negative values have wrapped to 16 bits" in wrapped[0], wrapped
    assert notices(unsigned(1024), modality="MR") == ()


def test_stored_values_of_a_ct_without_air_like_tissue():
    scaled = head_ct().astype(np.int32) * 30
    assert any("no soft tissue" in notice for notice in notices(scaled, modality="CT"))


def test_a_twelve_bit_radiograph_is_no_ct():
    film = np.clip(np.random.default_rng(0).normal(1200, 500, (256, 256, 1, 1)), 0, 4095).astype(np.uint16)
    assert notices(film) == ()


def test_few_values_wrapped_to_16_bits():
    """An intercept of 1024 leaves only the noise of air below 0."""
    voxels = (head_ct().astype(np.int32) + 1024).astype(np.int32)
    air = np.argwhere(voxels[..., 0] < 100)[::60]
    voxels[tuple(air.T)] = -1 - np.arange(len(air))[:, None] % 60
    assert notices(voxels.astype(np.uint16))[0].startswith("negative values have wrapped to 16 bits")


def test_window_below_zero_without_negative_voxels():
    """The window of a CT for a scan that is MR or lacks its intercept, if its format states no modality."""
    voxels = draw((64, 64, 4, 1), np.int16, 0, 800)
    assert any("no voxel is negative" in notice for notice in notices(voxels, window="-150,250"))
    assert not notices(voxels, window="header", stated_window=(-50, 450))
    assert not notices(voxels, window="50,450")


@pytest.mark.parametrize("outlier", [1215, 20000])
def test_a_stated_ct_without_its_intercept(outlier):
    """The largest value of a CT may be soft tissue, or metal."""
    voxels = np.clip(head_ct() + 1024, 0, 1200).astype(np.uint16)
    voxels[3, 4, 5] = outlier
    assert "this CT has lost its intercept of -1024" in notices(voxels, modality="CT")[0]
