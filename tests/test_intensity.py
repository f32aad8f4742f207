"""Intensity settings: what they mean, which scans they refuse, and where they apply."""

from __future__ import annotations

import json
import math
import warnings

import nibabel
import numpy as np
import pytest
from pydicom import dcmread
from scan_files import dicom_file
from voxels import draw, with_values

from input_pipeline.config import DataConfig, trained_intensities
from input_pipeline.datasets import open_dataset
from input_pipeline.images import scans
from input_pipeline.images.intensity import CT_WINDOWS, parse_intensity, sample_voxels, setting_text
from input_pipeline.images.planes import Sizes
from input_pipeline.images.scans.voi import window_ends
from input_pipeline.images.slices import slices
from input_pipeline.images.volumes import padded_size, prepare_volume
from input_pipeline.samples import Scan, ScanNotice
from radfm_jax import terminal
from radfm_jax.inference import inputs

SIZES = Sizes(64, 64, 8)


def head_ct(shape=(64, 64, 8)) -> np.ndarray:
    """Return int16 HU [H, W, D, 1]: air with noise, a skull, brain of 20 to 45 HU, metal of 3071."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: shape[0], : shape[1]] / shape[0] - 0.5
    radius = np.hypot(y, x)[:, :, None]
    voxels = np.where(radius < 0.35, rng.integers(20, 46, shape), rng.integers(-1020, -980, shape))
    voxels = np.where((radius >= 0.35) & (radius < 0.4), 1000, voxels)
    voxels[0, 0, 0] = -1024
    voxels[2, 2, -1] = 3071
    return voxels.astype(np.int16)[..., None]


def test_settings():
    assert parse_intensity(None) == parse_intensity("minmax")
    assert parse_intensity("brain").windows == ((0, 80),)
    assert parse_intensity("-160,240").windows == parse_intensity([-160, 240]).windows == ((-160, 240),)
    three = parse_intensity("lung / soft_tissue / -500,1300")
    assert three.windows == (CT_WINDOWS["lung"], CT_WINDOWS["soft_tissue"], CT_WINDOWS["bone"]) and three.named
    assert parse_intensity("percentile").percentiles == (0.5, 99.5)
    assert parse_intensity("percentile:1,99").percentiles == (1, 99)
    assert setting_text((-160.0, 240.0)) == "-160,240"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("brian", r"'brian' is not one of lung, .*LOW,HIGH, or three windows separated by / \(did you mean brain\?\)"),
        ("lung/bone", "has 2 windows: give 1, or 3"),
        ("percentile:99,1", "0 <= LOW < HIGH <= 100"),
        ("5,5", "the lower one first"),
        ("", "is not one of"),
    ],
)
def test_bad_settings_are_errors(setting, message):
    with pytest.raises(ValueError, match=message):
        parse_intensity(setting)
    with pytest.raises(ValueError, match=f"data.intensity: .*{message}"):
        DataConfig(intensity=setting)
    with pytest.raises(ValueError, match=f"data.train.ct.intensity: .*{message}"):
        DataConfig(train={"ct": {"family": "jsonl", "intensity": setting}})


def test_three_windows_are_three_channels():
    voxels = head_ct((64, 64, 8))
    got = prepare_volume(voxels, window="lung/soft_tissue/bone", storage="float32", sizes=SIZES)
    assert got.voxels.shape == (64, 64, 8, 3)
    for channel, name in enumerate(("lung", "soft_tissue", "bone")):
        want = prepare_volume(voxels, window=name, storage="float32", sizes=SIZES)
        np.testing.assert_array_equal(got.voxels[..., channel], want.voxels[..., 0])
    with pytest.raises(ValueError, match="3 windows need a gray scan, but it has 3 channels"):
        prepare_volume(draw((32, 32, 1, 3), np.uint8, 0, 255), window="lung/soft_tissue/bone", sizes=SIZES)


def test_percentile_ignores_outliers_and_the_background():
    voxels = draw((64, 64, 8, 1), np.float32, 100, 200)
    voxels[:20] = 0  # background
    voxels[40, 40, 4] = 1e6
    volume = prepare_volume(voxels, window="percentile", storage="float32", sizes=SIZES, measure=True)
    foreground = voxels[voxels > 0]
    low, high = np.percentile(foreground, (0.5, 99.5))
    np.testing.assert_allclose(volume.voxels, np.clip((voxels - low) / (high - low), 0, 1), atol=0.01)
    assert volume.notices == ()


def test_header_window():
    voxels = head_ct()
    want = prepare_volume(voxels, window=(0, 80), sizes=SIZES).voxels
    got = prepare_volume(voxels, window="header", stated_window=(0.0, 80.0), sizes=SIZES).voxels
    np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="its header states no window"):
        prepare_volume(voxels, window="header", sizes=SIZES)


def test_window_of_a_file(tmp_path):
    path = dicom_file("CT_small.dcm")
    dataset = dcmread(path)
    assert scans.header(path).window is None
    dataset.WindowCenter, dataset.WindowWidth = ["40", "300"], ["81", "1500"]
    dataset.save_as(tmp_path / "ct.dcm")
    assert scans.header(tmp_path / "ct.dcm").window == (-0.5, 79.5)  # PS3.3 C.11.2.1.2: c - 0.5 -+ (w - 1) / 2
    assert window_ends(40, 80, "LINEAR_EXACT") == (0, 80)
    assert window_ends(40, 80, "SIGMOID") is None and window_ends(40, 0, "LINEAR") is None
    dataset.WindowCenter = "40"
    dataset.WindowWidth = "0"
    dataset.save_as(tmp_path / "empty.dcm")
    assert scans.header(tmp_path / "empty.dcm").window is None  # only a suggestion, so not an error
    image = nibabel.Nifti1Image(head_ct()[..., 0], np.eye(4))
    image.header["cal_min"], image.header["cal_max"] = 0, 80
    nibabel.save(image, tmp_path / "ct.nii")
    assert scans.header(tmp_path / "ct.nii").window == (0, 80)


def test_window_of_monochrome1_is_mirrored_like_its_voxels(tmp_path):
    dataset = dcmread(dicom_file("MR_small.dcm"))
    plain = tmp_path / "plain.dcm"
    dataset.WindowCenter, dataset.WindowWidth, dataset.VOILUTFunction = "600", "800", "LINEAR_EXACT"
    dataset.save_as(plain)
    dataset.PhotometricInterpretation = "MONOCHROME1"
    dataset.save_as(tmp_path / "inverted.dcm")
    shown = []
    for path in (plain, tmp_path / "inverted.dcm"):
        voxels, header = scans.read(path)
        low, high = header.window
        shown.append(np.clip((voxels - low) / (high - low), 0, 1))
    np.testing.assert_allclose(shown[1], 1 - shown[0], atol=1e-6)


@pytest.mark.parametrize(
    ("voxels", "window", "modality", "message"),
    [
        (with_values(-1000, 3000), "brain", "MR", "the modality is MR"),
        (with_values(0, 3000), "brain", None, "none is negative, as air is in Hounsfield units"),
        (with_values(0, 3000), "-160,240", "MR", "is one for CT, but the modality is MR"),
        (with_values(0, 255), "lung", None, "8-bit image"),
    ],
)
def test_ct_windows_refuse_other_scans(voxels, window, modality, message):
    with pytest.raises(ValueError, match=message):
        prepare_volume(voxels, window=window, modality=modality)


def test_a_numeric_window_suits_any_modality():
    prepare_volume(with_values(0, 3000), window=(0, 600), modality="MR")
    prepare_volume(with_values(0, 3000), window=(-160, 1240), modality=None)


def test_a_source_has_its_own_intensity(tmp_path):
    rows = [
        {"id": "a", "task": "vqa", "scans": ["a.nii"], "instruction": "<image-1> Edema?", "response": "no"},
        {
            "id": "b",
            "task": "vqa",
            "scans": [{"path": "a.nii", "window": "lung"}],
            "instruction": "<image-1> ?",
            "response": "no",
        },
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "d.csv").write_text("image_path,disease,label\na.png,edema,1\nb.png,edema,0\n")

    def windows(setting) -> list:
        dataset = open_dataset("jsonl", table="t.jsonl", root=tmp_path, intensity=setting)
        return [dataset.scans(0)[0].window, dataset.sample(0, np.random.default_rng(0)).scans[0].window]

    assert windows(None) == [None, None]
    assert windows("brain") == ["brain", "brain"]
    assert windows("-160,240") == [(-160.0, 240.0)] * 2
    dataset = open_dataset("jsonl", table="t.jsonl", root=tmp_path, intensity="brain")
    assert dataset.scans(1)[0].window == "lung"  # the row states it
    balanced = open_dataset("diagnosis", table="d.csv", root=tmp_path, intensity="percentile", balance=True)
    assert {s.window for i in range(2) for s in balanced.scans(i)} == {"percentile"}
    assert balanced.sample(0, np.random.default_rng(0)).scans[0].window == "percentile"
    with pytest.raises(ValueError, match="jsonl: intensity 'brian' is not one of"):
        open_dataset("jsonl", table="t.jsonl", root=tmp_path, intensity="brian")


def test_the_config_gives_its_intensity_to_its_sources():
    train = {"ct": {"family": "jsonl", "intensity": "brain"}, "xray": {"family": "jsonl"}}
    config = DataConfig(train=train, intensity="percentile")
    assert [fields["intensity"] for fields in config.sources().values()] == ["brain", "percentile"]
    assert "intensity" not in DataConfig(train=train).sources()["xray"]
    assert DataConfig.from_dict(config.to_dict()) == config
    assert trained_intensities(config.to_dict()) == ("brain", "percentile")
    assert trained_intensities({"train": {"a": {}}}) == ("minmax",)  # a run of an earlier version
    with pytest.raises(ValueError, match="has 3 windows, but data.channels is 1"):
        DataConfig(intensity="lung/soft_tissue/bone", channels=1)
    with pytest.raises(ValueError, match="supports only minmax"):
        DataConfig(intensity="brain", preprocess="released", storage="float32")
    with pytest.raises(ValueError, match="data.fit must be one of stretch, pad"):
        DataConfig(fit="crop")


def save_ct(path) -> str:
    nibabel.save(nibabel.Nifti1Image(head_ct()[..., 0], np.diag([1, 1, 5, 1])), path)
    return str(path)


def test_inference_follows_the_training(tmp_path):
    path = save_ct(tmp_path / "ct.nii")
    data = DataConfig(train={"ct": {"family": "jsonl"}}, intensity="brain", fit="pad", size_2d=64, size_3d=64, depth=8)
    preparation = inputs.Preparation.from_config(data)
    assert inputs.Preparation(**json.loads(json.dumps(preparation.to_dict()))) == preparation
    assert not {"intensities", "fit"} & inputs.Preparation().to_dict().keys()  # as in answers of version 0.1
    voxels, header = scans.read(path)
    (got,) = inputs.read_scans([path], preparation)
    np.testing.assert_array_equal(got.voxels, prepare_volume(voxels, window="brain", sizes=SIZES).voxels)
    (got,) = inputs.read_scans([Scan(path, window=(-160.0, 240.0))], preparation)
    np.testing.assert_array_equal(got.voxels, prepare_volume(voxels, window=(-160, 240), sizes=SIZES).voxels)
    both = {"ct": {"family": "jsonl"}, "xray": {"family": "jsonl", "intensity": "minmax"}}
    config = DataConfig(train=both, intensity="brain", size_2d=64, size_3d=64, depth=8)
    assert inputs.Preparation.from_config(config).intensities == ("brain",)  # sources state their own
    mixed = inputs.Preparation.from_data(config.to_dict())
    with pytest.raises(ValueError, match="intensities brain and minmax: choose one"):
        inputs.read_scans([path], mixed)
    inputs.read_scans([Scan(path, window="brain")], mixed)


def test_inference_reports_lost_contrast(tmp_path):
    path = save_ct(tmp_path / "ct.nii")
    preparation = inputs.Preparation(size_2d=64, size_3d=64, depth=8)
    with pytest.warns(ScanNotice, match=r"ct.nii: soft tissue of this CT \(0 to 80 HU\) gets 5 of 256 gray levels"):
        inputs.read_scans([path], preparation)
    with pytest.warns(ScanNotice, match="soft tissue"):
        inputs.read_scans([head_ct()], inputs.Preparation(preprocess="released", storage="float32"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inputs.read_scans([Scan(path, window="brain")], preparation)


def test_commands_print_notices_without_their_place_in_the_code(capsys):
    def command() -> int:
        warnings.warn("head.nii: soft tissue", ScanNotice, stacklevel=1)
        return 0

    assert terminal.run(command) == 0
    printed = capsys.readouterr()
    assert (printed.out + printed.err).strip() == "notice: head.nii: soft tissue"


def test_previews_number_slices_as_the_file_does():
    volume = prepare_volume(head_ct((64, 64, 120)), sizes=SIZES)
    assert inputs.slices_shown(volume) == (list(range(8)), "slices 8, 23, 38, 53, 68, 83, 98, 113 of 120")
    assert inputs.slices_shown(prepare_volume(head_ct((64, 64, 1)), sizes=SIZES)) == ([0], "2D")


def test_pages_for_people_show_ct_in_a_window(tmp_path):
    path = save_ct(tmp_path / "ct.nii")
    (plain,), (shown,) = slices(Scan(path)), slices(Scan(path), for_people=True)
    brain = lambda s: np.ptp(np.asarray(s.image)[28:36, 28:36].astype(int))  # noqa: E731
    assert plain.window == "" and brain(plain) <= 2
    assert shown.window == "soft tissue (-150 to 250)" and brain(shown) >= 14
    assert (shown.number, shown.count) == (5, 8)
    (three,) = slices(Scan(path, window="lung/soft_tissue/bone"))
    assert three.image.mode == "RGB"
    image = nibabel.load(path)
    image.header["cal_min"], image.header["cal_max"] = 0, 80
    nibabel.save(image, tmp_path / "stated.nii")
    (stated,) = slices(Scan(str(tmp_path / "stated.nii")), for_people=True)
    assert stated.window == "header (0 to 80)"
    mr = nibabel.Nifti1Image(draw((32, 32, 4), np.int16, 0, 900), np.eye(4))
    nibabel.save(mr, tmp_path / "mr.nii")
    assert slices(Scan(str(tmp_path / "mr.nii")), for_people=True)[0].window == ""


def test_pad_keeps_the_ratio_of_the_sides():
    assert padded_size((1024, 256), (256, 256), None) == (256, 64)
    assert padded_size((256, 256), (256, 256), (0.5, 2.0)) == (64, 256)  # in mm, not in pixels
    assert padded_size((1, 4000), (64, 64), None) == (1, 64)
    voxels = draw((256, 64, 1, 1), np.uint8, 50, 200)
    volume = prepare_volume(voxels, fit="pad", sizes=SIZES)
    want = prepare_volume(voxels, sizes=SIZES).voxels
    assert volume.voxels.shape == want.shape == (64, 64, 1, 1)
    assert not volume.voxels[:, :24].any() and not volume.voxels[:, 40:].any() and volume.voxels[:, 24:40].any()
    column = prepare_volume(np.repeat(voxels, 4, 1)[:, 96:160], fit="pad", storage="int16", sizes=SIZES)
    assert (column.values()[:, :24] == 0).all()
    turned = prepare_volume(voxels.swapaxes(0, 1), fit="pad", sizes=SIZES)  # the memory order of nibabel's arrays
    np.testing.assert_array_equal(turned.voxels[..., 0, 0], volume.voxels[..., 0, 0].T)


def test_a_stretched_scan_is_reported():
    def notice(shape, **facts) -> tuple[str, ...]:
        return prepare_volume(draw(shape, np.uint8, 0, 255), sizes=SIZES, measure=True, **facts).notices

    assert notice((1024, 256, 1, 1)) == (
        "1024 x 256 pixels are stretched 4.0:1 to a square: keep the shape with data.fit='pad'",
    )
    assert notice((1024, 256, 1, 1), fit="pad") == () == notice((300, 400, 1, 1))
    assert notice((256, 256, 4, 1), spacing=(0.5, 1.0))[0].startswith("256 x 256 pixels are stretched 2.0:1")
    assert notice((512, 256, 4, 1), spacing=(0.5, 1.0)) == ()


def test_the_sample_is_small_and_spread():
    voxels = np.arange(300 * 200 * 50).reshape(300, 200, 50, 1)
    sample = sample_voxels(voxels)
    assert 1 << 15 < sample.size <= 1 << 16
    assert abs(float(np.median(sample)) / voxels.size - 0.5) < 0.02
    assert sample_voxels(voxels[:10, :10]).size == 5000
    assert math.prod(sample_voxels(np.zeros((4000, 3000, 1, 3))).shape) <= 1 << 16
