"""Behaviour that all scan formats share: values, dtypes, paths, errors."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle

import numpy as np
import pytest
from scan_files import NIBABEL, dicom_file, fails, nifti, save_npy

from input_pipeline.images import scans
from input_pipeline.images.scans.checks import to_intensities


def test_header_equals_read():
    names = ["CT_small.dcm", "examples_ybr_color.dcm", "eCT_Supplemental.dcm", "RG3_J2KI.dcm", "examples_palette.dcm"]
    for path in [*map(dicom_file, names), NIBABEL / "anatomical.nii", NIBABEL / "standard.nii.gz"]:
        voxels, header = scans.read(path)
        assert scans.header(path) == header and voxels.shape == header.shape
        json.dumps(dataclasses.asdict(header))
        assert header.value_range == (voxels.min(), voxels.max()) and scans.header(path).value_range is None


def test_constant_and_non_finite_scans(tmp_path):
    fails(save_npy(tmp_path / "a.npy", np.full((6, 7, 5), 7, np.int16)), "constant", "every voxel is 7")
    flat = np.broadcast_to(np.array([255, 0, 1], np.uint8), (6, 7, 5, 3))
    fails(save_npy(tmp_path / "a.npy", flat), "constant", "(255, 0, 1)")
    almost = np.broadcast_to(flat[0, 0, 0], (40, 50, 35, 3)).copy()
    almost[1, 3, 1, 2] = 2  # not in the coarse sample of check_values
    np.testing.assert_array_equal(scans.read(save_npy(tmp_path / "a.npy", almost))[0], almost)
    array = np.random.default_rng(0).normal(size=(6, 7, 5)).astype(np.float32)
    for bad in (np.nan, np.inf, -np.inf):
        array[1, 2, :3] = bad
        fails(save_npy(tmp_path / "a.npy", array), "non-finite", "3 of 210 voxels")
        fails(nifti(tmp_path / "a.nii.gz", array, np.eye(4)), "non-finite", "3 of 210 voxels")
    fails(save_npy(tmp_path / "a.npy", np.linspace(0, 1e300, 210).reshape(6, 7, 5)), "non-finite", "too large")


def test_to_intensities_dtypes():
    whole = np.array([[0, 40000]], np.uint16)
    assert to_intensities("x", whole).dtype == np.uint16
    assert to_intensities("x", whole, 1, -40000).tolist() == [[-40000, 0]]  # int32
    assert to_intensities("x", whole // 2, 1, -1024).dtype == np.int16
    big = np.array([[0, 2**63]], np.uint64)
    assert to_intensities("x", big).tolist() == [[0, 2.0**63]] and to_intensities("x", big).dtype == np.float32
    assert to_intensities("x", np.array([[-(2**31), 2**31 - 1]], np.int64)).dtype == np.int32
    half = to_intensities("x", whole, 0.5, 0)
    assert half.dtype == np.float32 and half.tolist() == [[0, 20000]]


def test_missing_and_special_files(tmp_path):
    fails(tmp_path / "none.nii.gz", "missing", "no such file")
    os.mkfifo(tmp_path / "fifo.nii.gz")
    fails(tmp_path / "fifo.nii.gz", "refused", "a FIFO")
    fails("/dev/zero", "refused", "a device")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    fails(tmp_path / "loop", "missing", "cannot be opened")
    (tmp_path / "empty.png").touch()
    fails(tmp_path / "empty.png", "damaged", "is empty")
    with pytest.raises(scans.ScanError, match="cannot be opened"):
        scans.read(str(tmp_path / "a\0b.png"))
    with pytest.raises(scans.ScanError, match="cannot be opened"):
        scans.read(tmp_path / ("n" * 300))
    (tmp_path / "a.nii.gz").write_text("plain text, not a scan")
    fails(tmp_path / "a.nii.gz", "unsupported", "unknown format")
    np.savez(tmp_path / "a.npz", x=np.arange(9))
    fails(tmp_path / "a.npz", "unsupported", "npz")


def test_errors_can_be_pickled():
    error = scans.ScanError("a\nb.png", "is empty", "copy it", "damaged")
    back = pickle.loads(pickle.dumps(error))
    assert (back.path, back.reason, back.remedy, back.fault) == ("a\\nb.png", "is empty", "copy it", "damaged")
    assert str(back) == str(error) and "\n" not in str(error)


def test_resolve(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "in").mkdir(parents=True)
    outside.mkdir()
    for folder in (root / "in", outside):
        (folder / "a.png").write_text("x")
    assert scans.resolve(root, "in/a.png") == (root / "in" / "a.png").resolve()
    assert scans.resolve(root, root / "in" / "a.png") == (root / "in" / "a.png").resolve()
    (root / "link.png").symlink_to(root / "in" / "a.png")
    assert scans.resolve(root, "link.png") == (root / "in" / "a.png").resolve()
    (root / "out.png").symlink_to(outside / "a.png")
    (root / "outdir").symlink_to(outside)
    (root / "loop").symlink_to(root / "loop")
    (root / "series").mkdir()
    (root / "series" / "1.dcm").symlink_to(outside / "a.png")
    sibling = tmp_path / "root2"  # has the root as a string prefix
    sibling.mkdir()
    (sibling / "a.png").write_text("x")
    refused = ["../outside/a.png", "in/../in/a.png", "..", "in\\..\\..\\a", str(outside / "a.png"), "out.png"]
    refused += ["outdir/a.png", "/etc/passwd", "a\0.png", "", "series", str(sibling / "a.png"), "loop", "n" * 300]
    for path in refused:
        with pytest.raises(scans.ScanError) as caught:
            scans.resolve(root, path)
        assert caught.value.fault == "refused" and str(root) in str(caught.value), path
    with pytest.raises(scans.ScanError) as caught:
        scans.resolve(root, "none.png")
    assert caught.value.fault == "missing"
    for path in (None, 7):
        with pytest.raises(scans.ScanError):
            scans.resolve(root, path)


@pytest.mark.parametrize(("count", "good"), [(1, True), (10, True), (11, False), (150, False)])
def test_a_few_nan_voxels_are_padding(tmp_path, count, good):
    voxels = np.random.default_rng(0).uniform(-50, 100, (10, 10, 10)).astype(np.float32)
    voxels.flat[7 : 7 + count] = np.nan
    np.save(tmp_path / "a.npy", voxels)
    if not good:
        fails(tmp_path / "a.npy", "non-finite", f"{count} of 1000 voxels are NaN", "up to 1% of NaN")
        return
    got, header = scans.read(tmp_path / "a.npy")
    low = np.nanmin(voxels)
    np.testing.assert_array_equal(got[..., 0], np.where(np.isnan(voxels), low, voxels))
    assert header.value_range == (low, voxels[~np.isnan(voxels)].max())
    assert header.notices[0].startswith(f"{count} of 1000 voxels are NaN, and are read as the minimum")
    voxels.flat[0] = np.inf
    np.save(tmp_path / "a.npy", voxels)
    fails(tmp_path / "a.npy", "non-finite", f"{count + 1} of 1000 voxels")
