"""NRRD, MetaImage and FreeSurfer volumes, compared with SimpleITK and nibabel."""

from __future__ import annotations

import gzip
import sys

import nibabel
import numpy as np
import pytest
import SimpleITK
from scan_files import NIBABEL, fails, nifti

from input_pipeline.images import scans

LPS = np.random.default_rng(0).integers(-900, 900, (6, 5, 4)).astype(np.int16)  # right to left, front to back, feet up


def image_of(array: np.ndarray, spacing=(0.5, 0.75, 3.0)) -> SimpleITK.Image:
    """Return [x, y, z] in SimpleITK's patient coordinates."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing[: array.ndim])
    return image


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.mhd"])
@pytest.mark.parametrize("compressed", [False, True])
def test_oriented_volumes_equal_simpleitk_and_nifti(tmp_path, name, compressed):
    SimpleITK.WriteImage(image_of(LPS), tmp_path / name, compressed)
    voxels, header = scans.read(tmp_path / name)
    np.testing.assert_array_equal(voxels[..., 0], LPS.transpose(1, 0, 2))
    again, head = scans.read(nifti(tmp_path / "a.nii.gz", LPS, np.diag([-0.5, -0.75, 3.0, 1.0])))
    np.testing.assert_array_equal(voxels, again)
    assert (header.spacing_mm, header.orientation, header.dtype) == (head.spacing_mm, "PLS", "int16")
    assert header == scans.header(tmp_path / name) and voxels.dtype == np.int16
    flipped = SimpleITK.DICOMOrient(image_of(LPS), "RSA")  # the same voxels in another order
    SimpleITK.WriteImage(flipped, tmp_path / name, compressed)
    np.testing.assert_array_equal(scans.read(tmp_path / name)[0], voxels)


def test_types_dimensions_and_colours(tmp_path):
    for dtype in (np.uint8, np.uint16, np.int32, np.float32, np.float64):
        SimpleITK.WriteImage(image_of((np.abs(LPS) % 251).astype(dtype)), tmp_path / "a.nrrd")
        voxels, header = scans.read(tmp_path / "a.nrrd")
        np.testing.assert_array_equal(voxels[..., 0], (np.abs(LPS) % 251).transpose(1, 0, 2))
        assert header.dtype == np.dtype(dtype).name
    SimpleITK.WriteImage(image_of(LPS[:, :, 0]), tmp_path / "flat.mha")
    voxels, header = scans.read(tmp_path / "flat.mha")
    np.testing.assert_array_equal(voxels[:, :, 0, 0], LPS[:, :, 0].T)
    assert header.orientation is None and header.spacing_mm == (0.75, 0.5, None)
    colour = np.random.default_rng(1).integers(0, 255, (5, 6, 3), np.uint8)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(colour, isVector=True), tmp_path / "c.mha")
    np.testing.assert_array_equal(scans.read(tmp_path / "c.mha")[0][:, :, 0], colour)
    times = SimpleITK.JoinSeries([image_of(LPS), image_of(LPS + 1)])
    SimpleITK.WriteImage(times, tmp_path / "t.nrrd")
    fails(tmp_path / "t.nrrd", "ambiguous", "has 2 volumes")
    np.testing.assert_array_equal(scans.read(tmp_path / "t.nrrd", volume=1)[0][..., 0], LPS.transpose(1, 0, 2) + 1)


def test_files_that_are_refused(tmp_path, monkeypatch):
    SimpleITK.WriteImage(image_of(LPS), tmp_path / "a.mhd")
    assert [name.rpartition("/")[2] for name in scans.files_of(tmp_path / "a.mhd")] == ["a.mhd", "a.raw"]
    text = (tmp_path / "a.mhd").read_text()
    for name in ("/etc/passwd", "../a.raw", "LIST", "a%d.raw 1 2 1"):
        (tmp_path / "b.mhd").write_text(text.replace("a.raw", name))
        fails(tmp_path / "b.mhd", "unsupported", "has its voxels in other files")
    (tmp_path / "link.raw").symlink_to(tmp_path / "a.raw")
    (tmp_path / "b.mhd").write_text(text.replace("a.raw", "link.raw"))
    fails(tmp_path / "b.mhd", "refused", "a file that is a link")
    fails(tmp_path / "a.mhd", "limit", "5 rows or columns", limits=scans.ScanLimits(max_side=5))
    for name, compressed in (("a.nrrd", False), ("b.nrrd", True), ("a.mha", False), ("b.mha", True)):
        SimpleITK.WriteImage(image_of(LPS), tmp_path / name, compressed)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
        fails(tmp_path / name, "damaged")
    (tmp_path / "a.nii.gz").write_bytes((tmp_path / "a.nrrd").read_bytes())
    fails(tmp_path / "a.nii.gz", "ambiguous", "is NRRD or MetaImage, which does not match its file name")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    fails(tmp_path / "a.mhd", "unsupported", "needs SimpleITK", 'pip install "radfm_jax[itk]"')


def test_freesurfer_volumes_equal_nibabel(tmp_path):
    affine = np.diag([-0.5, -0.75, 3.0, 1.0])
    for dtype in (np.uint8, np.int16, np.int32, np.float32):
        array = (np.abs(LPS) % 251).astype(dtype)
        for name in ("a.mgz", "a.mgh"):
            nibabel.save(nibabel.MGHImage(array, affine), tmp_path / name)
            voxels, header = scans.read(tmp_path / name)
            np.testing.assert_array_equal(voxels[..., 0], array.transpose(1, 0, 2))
            assert (header.orientation, header.spacing_mm, header.dtype) == (
                "PLS",
                (0.75, 0.5, 3),
                np.dtype(dtype).name,
            )
            assert header == scans.header(tmp_path / name)
    data = bytearray((tmp_path / "a.mgz").read_bytes())
    (tmp_path / "b.mgz").write_bytes(data[:-30])
    fails(tmp_path / "b.mgz", "damaged", "gzip stream is damaged")
    plain = bytearray(gzip.decompress(data))
    plain[400] ^= 1
    (tmp_path / "c.mgz").write_bytes(gzip.compress(plain)[:-8] + data[-8:])  # the checksum of the unchanged data
    fails(tmp_path / "c.mgz", "damaged", "gzip stream is damaged")
    real = nibabel.load(NIBABEL / "test.mgz")
    fails(NIBABEL / "test.mgz", "ambiguous", "has 2 volumes")
    for volume in range(2):
        voxels, header = scans.read(NIBABEL / "test.mgz", volume=volume)
        canonical = nibabel.as_closest_canonical(real.slicer[..., volume]).get_fdata()
        assert sorted(voxels.ravel().tolist()) == sorted(canonical.ravel().tolist())
        if header.orientation == "PLS":
            np.testing.assert_array_equal(voxels[..., 0], canonical[::-1, ::-1].transpose(1, 0, 2))
