"""The drawing of phantoms: lesions, labels and contrast."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import itertools

import numpy as np
import pytest
from test_phantoms import ARGUMENTS, studies  # noqa: F401

from input_pipeline import phantoms
from input_pipeline.phantoms import drawing, tables
from input_pipeline.phantoms.plan import MODALITIES


def test_a_phantom_is_a_pure_function_of_its_arguments():
    first = [phantoms.draw(3, "test", i, size=64) for i in range(12)]
    again = [phantoms.draw(3, "test", i, size=64) for i in reversed(range(12))][::-1]
    for (voxels, labels), (voxels_again, labels_again) in zip(first, again, strict=True):
        assert labels == labels_again
        assert voxels.dtype == voxels_again.dtype and np.array_equal(voxels, voxels_again)
        assert voxels.ndim == 4 and voxels.shape[:2] == (64, 64) and voxels.shape[3] == 1


def test_phantoms_of_splits_and_seeds_are_all_different():
    images, bodies, names = set(), set(), set()
    for seed, split, index in itertools.product((0, 1), ("train", "test"), range(60)):
        study = phantoms.describe(seed, split, index, size=64)
        images.add(hashlib.sha256(np.ascontiguousarray(phantoms.paint(study))).digest())
        bodies.add(study.body)
        names.add(study.study_id)
    assert len(images) == len(bodies) == len(names) == 240


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, "train", 0), "seed -1"),
        ((0, "held_out", 0), "split 'held_out'"),
        ((0, "train", 0, 32), "size 32"),
        ((0, "train", 0, 128, 0.7), "volumes 0.7"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        phantoms.draw(*arguments)


def test_lesions_are_where_the_labels_say():
    """The patient's left is on the right of the image, measured on the voxels that a lesion changes."""
    counts = collections.Counter()
    for study in studies(count=300, volumes=0.1):
        if study.labels.count != 1:
            continue
        balanced = drawing._noiseless(study)[1]
        change = phantoms.paint(study) - phantoms.paint(dataclasses.replace(balanced, lesions=()))
        rows, columns, _ = np.nonzero(np.abs(change) > 0.15)
        middle = (study.size - 1) / 2
        labels = study.labels
        assert (columns.mean() > middle) == (labels.side == "left"), study
        assert (rows.mean() > middle) == (labels.level == "lower"), study
        # Radii of 0.14-0.19 and 0.26-0.33 half-widths are 9 to 12 and 17 to 21 rows of 64.
        width = np.ptp(rows) + 1
        assert (width > 14.5) == (labels.size == "big"), (width, study)
        if study.depth > 1:
            slices = np.nonzero(np.abs(change) > 0.15)[2]
            assert len(np.unique(slices)) >= 3
        counts[labels.side, labels.level, labels.size] += 1
    assert len(counts) == 8 and counts.total() > 60


def test_lesion_counts_and_modalities_have_their_shares():
    sample = studies(count=2000)
    n = len(sample)
    shares = [np.mean([s.labels.count == k for s in sample]) for k in range(3)]
    # Four standard errors of a share of 2,000.
    np.testing.assert_allclose(shares, (0.5, 0.3, 0.2), atol=4 * np.sqrt(0.25 / n))
    for modality in MODALITIES:
        assert abs(np.mean([s.labels.modality == modality for s in sample]) - 0.25) < 4 * np.sqrt(0.19 / n)
    assert abs(np.mean([s.depth > 1 for s in sample]) - ARGUMENTS["volumes"]) < 4 * np.sqrt(0.21 / n)
    # Each format has every modality that has its number of dimensions.
    kinds = {(s.file_format, s.depth > 1, s.labels.modality) for s in sample}
    assert kinds == {*itertools.product(("png8", "png16", "jpeg", "dicom"), [False], MODALITIES)} | {
        *itertools.product(("nifti", "dicom"), [True], ("CT", "MRI"))
    }
    assert {s.depth for s in sample if s.depth > 1} == set(range(8, 33))


def test_lesions_do_not_change_mean_and_deviation():
    """Measured with noise. Between phantoms their standard deviations are 0.016 to 0.04."""
    differences = []
    for study in studies(count=250, volumes=0.1):
        if study.lesions:
            image, bare = phantoms.paint(study), phantoms.paint(dataclasses.replace(study, lesions=()))
            differences.append((image.mean() - bare.mean(), image.std() - bare.std()))
    mean, deviation = np.abs(differences).mean(axis=0)
    # Measured 0.0004 and 0.0014 (128 pixels: 0.0003 and 0.0009); without balancing 0.008 and 0.012.
    assert mean < 0.001 and deviation < 0.003, (mean, deviation)


def test_contrast_to_noise_matches_the_documentation():
    ratios = collections.defaultdict(list)
    for study in studies(count=200, size=128, volumes=0.0):
        ratios[study.labels.modality] += phantoms.contrast_to_noise(study)
    for modality, minimum, median in (
        ("X-ray", 7.4, 11.2),
        ("CT", 4.8, 6.9),
        ("MRI", 3.9, 6.6),
        ("ultrasound", 1.8, 3.0),
    ):
        assert min(ratios[modality]) > minimum, modality
        assert np.median(ratios[modality]) == pytest.approx(median, rel=0.12), modality


def test_a_lesion_is_brighter_or_darker_as_its_rationale_says():
    counts = collections.Counter()
    for study in (s for s in studies(count=120, volumes=0.1) if s.lesions):
        change = phantoms.paint(study) - phantoms.paint(dataclasses.replace(study, lesions=()))
        for lesion in study.lesions:
            (z, y, x), cover = drawing.lesion_cover(study, lesion)
            inside = np.moveaxis(change, -1, 0)[z, y, x][cover == 1].mean()
            assert ("brighter" if inside > 0 else "darker") in tables.features(study.labels), study.study_id
            counts[study.labels.modality] += 1
    assert set(counts) == set(MODALITIES) and min(counts.values()) > 5
