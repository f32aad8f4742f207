"""Radiological display of voxels, independent of their storage order."""

from __future__ import annotations

import struct

import nibabel
import numpy as np
import pytest
from scan_files import axial_display, fails, lps_volume, nifti

from input_pipeline.images import scans
from input_pipeline.images.scans import orientation


def test_drawn_volume_is_displayed_as_drawn():
    first = axial_display(lps_volume())[:, :, 0, 0]
    assert first.tolist() == [[0, 6, 12, 18], [2, 8, 14, 20], [4, 10, 16, 22]]


@pytest.mark.parametrize("codes", ["RAS", "LPS", "LAS", "PIR", "ASL", "SRP", "IAR", "SLA"])
def test_nifti_display_is_independent_of_storage(tmp_path, codes):
    lps = lps_volume()
    affine = np.diag([-2.0, -2.0, 2.0, 1.0])  # LPS array in RAS millimetres
    stored = nibabel.Nifti1Image(lps, affine)
    to = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("LPS"), nibabel.orientations.axcodes2ornt(codes)
    )
    stored = stored.as_reoriented(to)
    assert "".join(nibabel.aff2axcodes(stored.affine)) == codes
    path = nifti(tmp_path / "a.nii.gz", np.asarray(stored.dataobj), stored.affine)
    voxels, header = scans.read(path)
    np.testing.assert_array_equal(voxels, axial_display(lps))
    assert header.orientation == "PLS" and header.spacing_mm == (2, 2, 2) and header.oblique_degrees == 0
    assert header.shape == (3, 4, 2, 1) and header.kind == "3d" and header.dtype == "int16"


@pytest.mark.parametrize(("degrees", "axis"), [(20, 0), (-35, 1), (40, 2)])
def test_oblique_nifti_takes_the_nearest_axes(tmp_path, degrees, axis):
    a = np.radians(degrees)
    turn = np.eye(3)
    i, j = [k for k in range(3) if k != axis]
    turn[i, i] = turn[j, j] = np.cos(a)
    turn[i, j], turn[j, i] = -np.sin(a), np.sin(a)
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.diag([-1.0, -1.0, 1.0])
    voxels, header = scans.read(nifti(tmp_path / "a.nii", lps_volume(), affine))
    np.testing.assert_array_equal(voxels, axial_display(lps_volume()))
    assert header.oblique_degrees == pytest.approx(abs(degrees), abs=0.01)  # a float32 affine deviates by 1e-5 degrees


@pytest.mark.parametrize(
    ("spacing", "codes", "order"),
    [
        ((1, 1, 5), "PLS", (1, 0, 2)),  # thick axial slices
        ((5, 1, 1), "IPL", (2, 1, 0)),  # thick sagittal slices stay sagittal
        ((1, 5, 1), "ILP", (2, 0, 1)),  # thick coronal slices stay coronal
        ((1.4, 1, 1), "PLS", (1, 0, 2)),  # nearly isotropic: axial
    ],
)
def test_thick_slices_keep_their_plane(tmp_path, spacing, codes, order):
    lps = lps_volume()
    affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
    voxels, header = scans.read(nifti(tmp_path / "a.nii", lps, affine))
    expected = lps.transpose(order)
    if codes != "PLS":
        expected = expected[::-1]  # the head is at the top; the array runs feet to head
    np.testing.assert_array_equal(voxels[..., 0], expected)
    assert header.orientation == codes
    assert header.spacing_mm == tuple(pytest.approx(spacing[a]) for a in order)


def test_one_slice_keeps_its_plane(tmp_path):
    lps = lps_volume()[:, 1:2]
    voxels, header = scans.read(nifti(tmp_path / "a.nii", lps, np.diag([-1.0, -1.0, 1.0, 1.0])))
    assert (header.orientation, header.kind, header.shape) == ("ILP", "2d", (2, 4, 1, 1))
    np.testing.assert_array_equal(voxels[:, :, 0, 0], lps[:, 0].T[::-1])


def test_unstated_orientation_is_none(tmp_path):
    image = nibabel.Nifti1Image(lps_volume(), None)
    nibabel.save(image, tmp_path / "a.nii")
    voxels, header = scans.read(tmp_path / "a.nii")
    assert header.orientation is None and header.oblique_degrees is None
    # ANALYZE order: right to left, back to front, feet to head
    np.testing.assert_array_equal(voxels, axial_display(lps_volume()[:, ::-1]))


def test_sform_and_qform_that_disagree_on_left_and_right(tmp_path):
    image = nibabel.Nifti1Image(lps_volume(), np.diag([-1.0, -1.0, 1.0, 1.0]))
    image.set_sform(np.diag([1.0, -1.0, 1.0, 1.0]), code=1)
    image.set_qform(np.diag([-1.0, -1.0, 1.0, 1.0]), code=1)
    nibabel.save(image, tmp_path / "a.nii")
    fails(tmp_path / "a.nii", "ambiguous", "which side is left")


@pytest.mark.parametrize("column", [(0, 0, 0), (1, 0, 0), (np.nan, 0, 1), (np.inf, 0, 1)])
def test_impossible_affine(tmp_path, column):
    path = nifti(tmp_path / "a.nii", lps_volume(), np.eye(4))
    data = bytearray(path.read_bytes())
    for row, value in enumerate(column):
        struct.pack_into("<f", data, 280 + 16 * row + 8, value)
    path.write_bytes(data)
    fails(path, "damaged", "orientation")


def test_coplanar_axes_are_refused():
    with pytest.raises(ValueError, match="coplanar"):
        orientation.display_layout(np.ones((3, 3)) + np.eye(3) * 1e-3, (2, 2, 2))
