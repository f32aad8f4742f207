"""All installed files of pydicom: the reader gives the voxels that pydicom's own pixels and rescale give, or a reason.

python -m pytest tests/test_scans_survey.py -m slow -s
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections import Counter
from pathlib import Path

import data_store
import numpy as np
import pydicom
import pytest
from pydicom.pixels import apply_color_lut, apply_modality_lut

from input_pipeline.images import scans

FOLDERS = [Path(module.__file__).parent / "data" for module in (pydicom, data_store)]
OTHER = (".py", ".pyc", ".json", ".txt", ".md", ".dump", ".icc")


def reference(path: Path) -> np.ndarray:
    """Return float64[D, H, W, C] by pydicom alone, in stored order. Raises what pydicom raises."""
    dataset = pydicom.dcmread(path, force=True)
    pixels, groups = dataset.pixel_array, dataset.get("SharedFunctionalGroupsSequence")
    gray = dataset.SamplesPerPixel == 1 and dataset.PhotometricInterpretation != "PALETTE COLOR"
    if not gray:
        pixels = apply_color_lut(pixels, dataset) if dataset.SamplesPerPixel == 1 else pixels
        return pixels.reshape(-1, dataset.Rows, dataset.Columns, 3).astype(float)
    if dataset.PhotometricInterpretation == "MONOCHROME1":  # before a linear rescale is the same as after it
        assert "ModalityLUTSequence" not in dataset
        total = -1 if dataset.PixelRepresentation else (1 << dataset.BitsStored) - 1
        pixels = total - pixels.astype(np.int64)
    if groups and "PixelValueTransformationSequence" in groups[0]:
        rescale = groups[0].PixelValueTransformationSequence[0]
        pixels = pixels * float(rescale.RescaleSlope) + float(rescale.RescaleIntercept)
    else:
        pixels = apply_modality_lut(pixels, dataset)
    return pixels.reshape(-1, dataset.Rows, dataset.Columns, 1).astype(float)


def equal(voxels: np.ndarray, expected: np.ndarray) -> bool:
    """Return whether voxels [H, W, D, C] are equal to [D, H, W, C], up to flips and exchanged rows and columns."""
    frames, expected = voxels.transpose(2, 0, 1, 3).astype(np.float32), expected.astype(np.float32)
    for axes, flips in itertools.product([(0, 1, 2, 3), (0, 2, 1, 3)], itertools.product([1, -1], repeat=3)):
        turned = frames.transpose(axes)[:: flips[0], :: flips[1], :: flips[2]]
        if turned.shape == expected.shape and np.allclose(turned, expected, rtol=1e-6, atol=1e-3):
            return True
    return False


def compare(path: Path) -> str:
    try:
        expected = reference(path)
    except Exception:  # pydicom raises nearly every type
        expected = None
    try:
        voxels = scans.read(path)[0]
    except scans.ScanError as error:
        assert "while reading the file" not in error.reason and error.remedy, str(error)
        if expected is None:
            return "refused by both"
        return f"refused: {error.reason}"
    if expected is None:
        return f"only read here: {path.name}"
    return "equal" if equal(voxels, expected) else f"different: {path.name}"


@pytest.mark.slow
def test_all_files_of_pydicom():
    files = [path for folder in FOLDERS for path in sorted(folder.rglob("*")) if path.is_file()]
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = Counter(compare(path) for path in files if path.suffix not in OTHER)
    logging.disable(logging.NOTSET)
    print("\n", dict(counts))
    not_scans = {f"refused: is {what}, not a scan" for what in ("a segmentation (SEG)", "a dose distribution (RTDOSE)")}
    only_here = "only read here: OT-PAL-8-face.dcm"  # without meta information
    assert set(counts) == {"equal", "refused by both", only_here} | not_scans, counts
    assert counts["equal"] > 150
