"""Anatomy and intensities of installed real scans."""

from __future__ import annotations

from pathlib import Path

import nibabel
import nilearn
import numpy as np
import pydicom
import pytest
from scan_files import NIBABEL, dicom_file, fails

from input_pipeline.images import scans

ICBM = Path(nilearn.__file__).parent / "datasets" / "data" / "mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"


def test_head_ct():
    """pydicom-data 693: a bone ring, brain near 35 HU, air outside, the frontal sinus at the top."""
    voxels, header = scans.read(dicom_file("693_UNCR.dcm"))
    assert header.modality == "CT" and header.orientation == "PLS" and header.padding == (-3024, -3024)
    ct = voxels[:, :, 0, 0]
    assert ct[5, 5] < -900
    brain = ct[(ct > 0) & (ct < 80)]
    assert 20 < np.median(brain) < 45
    skull = np.argwhere(ct > 700)
    top, left, bottom, right = *skull.min(0), *skull.max(0)
    assert 200 < bottom - top < 360 and 200 < right - left < 480
    # The frontal sinus, air within bone, is anterior: in the upper part of the image.
    middle = slice(230, 290)
    assert ct[top : top + 40, middle].min() < -500 < ct[bottom - 40 : bottom - 8, middle].min()


def test_abdomen_ct_stored_upside_down_is_upright():
    """explicit_VR-UN stores rows from back to front. Displayed: the table at the bottom, the liver at the left."""
    voxels, header = scans.read(dicom_file("explicit_VR-UN.dcm"))
    ct = voxels[:, :, 0, 0]
    np.testing.assert_array_equal(ct, pydicom.dcmread(dicom_file("explicit_VR-UN.dcm")).pixel_array[::-1])
    body = (ct > -200) & (ct < 300)
    assert body[:100].mean() < 0.001 < body[440:].mean()  # nothing at the top, the table at the bottom
    enhanced = (ct > 80) & (ct < 160)
    assert enhanced[150:300, 80:200].mean() > 2 * enhanced[150:300, 312:432].mean()  # liver against stomach and spleen


def test_chest_film_has_bright_bones():
    """RG1 is MONOCHROME1, with bright lungs. Displayed: lungs dark, spine and heart bright, heart at the right."""
    voxels, header = scans.read(dicom_file("RG1_UNCR.dcm"))
    film = voxels[:, :, 0, 0].astype(float)
    assert header.modality == "CR" and header.shape == (1955, 1841, 1, 1)
    lung_right, lung_left, spine = film[500:800, 350:500], film[500:800, 1330:1480], film[500:800, 880:960]
    assert spine.mean() > 1.15 * max(lung_right.mean(), lung_left.mean())
    assert film[1150:1300, 1050:1200].mean() > film[1150:1300, 500:650].mean()


def test_template_brain_is_axial_and_upright():
    """ICBM152 T1: frontal lobes at the top, cerebellum at the bottom of low slices, dark ventricles in the middle."""
    voxels, header = scans.read(ICBM)
    assert header.shape == (233, 197, 189, 1) and header.orientation == "PLS" and header.spacing_mm == (1, 1, 1)
    image = nibabel.load(ICBM)
    # MNI millimetres (RAS): -> row from the front, column from the right, slice from below.
    for x, y, z in [(0, 60, 20), (-40, -60, -40), (30, 20, 50), (-12, -20, 20)]:
        i, j, k = np.round(np.linalg.inv(image.affine) @ [x, y, z, 1]).astype(int)[:3]
        value = np.asarray(image.dataobj[i, j, k])
        x0, y0, z0 = image.affine[:3, 3]
        row, column, height = 232 - (y - y0), 196 - (x - x0), z - z0
        assert voxels[int(row), int(column), int(height), 0] == value
    brain = voxels[..., 0] > 60
    low, high = brain[:, :, 40].mean(axis=1), brain[:, :, 120].mean(axis=1)
    assert low[150:].sum() > low[:60].sum()  # the cerebellum is posterior
    assert abs(high[:116].sum() - high[116:].sum()) < 0.5 * high.sum()
    ventricle, white = voxels[100:120, 100:104, 92, 0].mean(), voxels[100:120, 60:70, 100, 0].mean()
    assert ventricle < white


def test_functional_mr_of_two_volumes():
    path = NIBABEL / "example4d.nii.gz"
    fails(path, "ambiguous", "2 volumes")
    voxels, header = scans.read(path, volume=1)
    stored = nibabel.load(path)
    assert header.shape == (96, 128, 24, 1) and header.orientation == "PLS"
    assert header.spacing_mm == pytest.approx((2, 2, 2.2), abs=1e-4) and header.oblique_degrees > 0.1
    canonical = nibabel.as_closest_canonical(stored.slicer[..., 1:])
    np.testing.assert_array_equal(voxels[..., 0], np.asarray(canonical.dataobj)[::-1, ::-1, :, 0].transpose(1, 0, 2))


def test_real_series():
    folder = Path(dicom_file("CT_small.dcm")).parent / "dicomdirtests" / "98892001" / "CT5N"
    voxels, header = scans.read(folder)
    assert header.shape == (16, 16, 5, 1) and header.spacing_mm[2] == 2.5 and header.modality == "CT"
    files = sorted((pydicom.dcmread(f) for f in folder.iterdir()), key=lambda d: float(d.ImagePositionPatient[2]))
    expected = np.stack([f.pixel_array.astype(int) + int(f.RescaleIntercept) for f in files], axis=-1)
    np.testing.assert_array_equal(voxels[..., 0], expected)
    fails(folder.parent / "CT2N", "series", "ImageOrientationPatient is")
