"""Slices and frames that are not one volume are refused, with the attribute, its values and their counts."""

from __future__ import annotations

import numpy as np
import pydicom
import pytest
from dicom_files import edit, item, make_dicom, make_frames, make_series, slices
from scan_files import axial_display, fails

from input_pipeline.images import scans


def series(tmp_path, count: int = 8, **attributes):
    """Return the directory of a series and its files in slice order."""
    folder = make_series(tmp_path / "series", slices(count), **attributes)
    return folder, sorted(folder.iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_slice_without_rescale_is_refused(tmp_path, place):
    folder, files = series(tmp_path, RescaleIntercept=-1024)
    edit(files[place], RescaleSlope=None, RescaleIntercept=None)
    absent = f"is present in 7 slices and absent in 1 slice ({files[place].name})"
    fails(folder, "series", f"RescaleSlope {absent}", f"RescaleIntercept {absent}", "restore the attribute")


MIXED = {
    "EchoTime": ([4.92], [7.38], "EchoTime is 4.92 in 5 slices and 7.38 in 3 slices"),
    "EchoNumbers": (1, 2, "EchoNumbers is 1 in 5 slices and 2 in 3 slices"),
    "ImageType": (["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"], r"ORIGINAL\PRIMARY\M in 5 slices and"),
    "ComplexImageComponent": ("REAL", "IMAGINARY", "ComplexImageComponent is REAL in 5 slices and IMAGINARY in 3"),
    "SOPClassUID": (
        "1.2.840.10008.5.1.4.1.1.2",
        "1.2.840.10008.5.1.4.1.1.7",
        "CT Image Storage in 5 slices and Secondary Capture",
    ),
    "RescaleType": ("HU", "US", "RescaleType is HU in 5 slices and US in 3 slices"),
    "Units": ("BQML", "GML", "Units is BQML in 5 slices and GML in 3 slices"),
    "TemporalPositionIdentifier": (1, 2, "TemporalPositionIdentifier is 1 in 5 slices and 2 in 3"),
    "TriggerTime": (0, 400, "TriggerTime is 0 in 5 slices and 400 in 3 slices"),
    "DiffusionBValue": (0.0, 1000.0, "DiffusionBValue is 0 in 5 slices and 1000 in 3 slices"),
    "NominalPercentageOfCardiacPhase": (30.0, 75.0, "is 30 in 5 slices and 75 in 3 slices"),
    "InversionTime": (100, 900, "InversionTime is 100 in 5"),
    "FlipAngle": (5, 15, "FlipAngle is 5 in 5"),
    "KVP": (80, 140, "KVP is 80 in 5 slices and 140 in 3 slices"),
    "ConvolutionKernel": ("B30f", "B70f", "ConvolutionKernel is one value in 5 slices and another value in 3 slices"),
    "ContrastBolusAgent": ("none", "Iodine", "ContrastBolusAgent is one value in 5"),
    "PhotometricInterpretation": ("MONOCHROME2", "MONOCHROME1", "MONOCHROME2 in 5 slices and MONOCHROME1 in 3"),
    "SequenceName": ("*ep_b0", "*ep_b1000#1", "SequenceName is one value in 5"),
}


ABSENT = ("EchoTime", "ImageType", "RescaleType", "TriggerTime", "DiffusionBValue", "ContrastBolusAgent", "SOPClassUID")


@pytest.mark.parametrize(("keyword", "absent"), [(k, False) for k in MIXED] + [(k, True) for k in ABSENT])
def test_mixed_attributes_of_a_series(tmp_path, keyword, absent):
    """Positions are consistent; three of eight slices have another value, or none."""
    usual, other, message = MIXED[keyword]
    lps, odd = slices(8), (1, 4, 6)
    for k in range(8):
        value = (None if absent else other) if k in odd else usual
        picture = np.ascontiguousarray(lps[:, :, k].T)
        make_dicom(tmp_path / f"{k}.dcm", picture, **{"ImagePositionPatient": [0, 0, k], keyword: value})
    names = "(1.dcm, 4.dcm, 6.dcm)"
    if absent:
        fails(tmp_path, "series", f"{keyword} is ", f" and absent in 3 slices {names}")
    else:
        fails(tmp_path, "series", message, names)


def test_mixed_echoes_at_the_same_positions_name_the_echoes(tmp_path):
    folder, files = series(tmp_path, 3, EchoTime=5)
    for k, path in enumerate(files):
        dataset = pydicom.dcmread(path)
        dataset.EchoTime = 10
        dataset.save_as(folder / f"second{k}.dcm")
    fails(folder, "series", "EchoTime is 5 in 3 slices and 10 in 3 slices")


def test_private_attributes_of_vendors(tmp_path):
    """Only the creator's name identifies a private attribute."""
    for name, creator, group, element, vr, values in [
        ("GE", "GEMS_PARM_01", 0x0043, 0x2F, "SS", (0, 1)),
        ("Siemens", "SIEMENS MR HEADER", 0x0019, 0x0C, "IS", ("0", "1000")),
        ("United Imaging", "Image Private Header", 0x0065, 0x09, "FD", (0.0, 1000.0)),
        ("other", "SOMEBODY", 0x0019, 0x0C, "IS", ("0", "1000")),
    ]:
        (tmp_path / name).mkdir()
        folder, files = series(tmp_path / name)
        for k, path in enumerate(files):
            dataset = pydicom.dcmread(path)
            if name == "Siemens":  # the creator takes the second block
                dataset.private_block(group, "SOMEBODY ELSE", create=True).add_new(1, "IS", "1")
            dataset.private_block(group, creator, create=True).add_new(element, vr, values[k % 2])
            dataset.save_as(path)
        if name == "other":
            assert scans.read(folder)[1].shape == (3, 4, 8, 1)
        else:
            fails(folder, "series", f"of {name} is one value in 4 slices and another value in 4 slices")


def test_attributes_that_vary_between_the_slices_of_one_volume(tmp_path):
    """PET slopes, times and numbers of slices, table positions, windows, the tube current, rounded echo times."""
    folder, files = series(tmp_path, EchoTime=30, RescaleType="HU")
    for k, path in enumerate(files):
        varying = {"AcquisitionNumber": 1 + k // 3, "InstanceNumber": 8 - k, "TriggerTime": 40 * k}
        varying |= {"WindowCenter": 30 + k, "XRayTubeCurrent": 100 + k, "SliceLocation": k, "EchoTime": 30 + 0.01 * k}
        edit(path, **varying, RescaleSlope=0.5 * (k + 1), AcquisitionTime=f"1200{k:02}")
    voxels, _ = scans.read(folder)
    slopes = 0.5 * np.arange(1, 9, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(voxels, axial_display(slices(8)) * slopes)


def test_acquisitions_may_follow_each_other_but_not_alternate(tmp_path):
    folder, files = series(tmp_path)
    for k, path in enumerate(files):
        edit(path, AcquisitionNumber=1 + k // 4)
    assert scans.read(folder)[1].shape[2] == 8
    for k, path in enumerate(files):
        edit(path, AcquisitionNumber=1 + k % 2)
    fails(folder, "series", "interleaves slices", "AcquisitionNumber is 1 in 4 slices and 2 in 4 slices")


# Functional groups of frames: {sequence: attribute and two values that must not be mixed}.
FRAMES = {
    "MREchoSequence": ("EffectiveEchoTime", 4.92, 7.38),
    "MRImageFrameTypeSequence": ("ComplexImageComponent", "MAGNITUDE", "PHASE"),
    "MRDiffusionSequence": ("DiffusionBValue", 0.0, 1000.0),
    "MRTimingAndRelatedParametersSequence": ("FlipAngle", 5, 15),
    "FrameContentSequence": ("TemporalPositionIndex", 1, 2),
    "CardiacSynchronizationSequence": ("NominalCardiacTriggerDelayTime", 0.0, 300.0),
    "UnassignedPerFrameConvertedAttributesSequence": ("EchoTime", 5, 10),
    "RealWorldValueMappingSequence": ("RealWorldValueSlope", 1.0, 2.0),
}


@pytest.mark.parametrize("sequence", FRAMES)
def test_mixed_attributes_of_frames(tmp_path, sequence):
    keyword, usual, other = FRAMES[sequence]
    lps, groups = slices(8), [{sequence: item(**{keyword: usual})} for _ in range(8)]
    path = make_frames(tmp_path / "a.dcm", lps, groups)
    np.testing.assert_array_equal(scans.read(path)[0], axial_display(lps))
    np.testing.assert_array_equal(
        scans.read(make_frames(path, lps, [{}] * 8, {sequence: item(**{keyword: usual})}))[0], axial_display(lps)
    )
    odd = [group if k not in (0, 5) else {sequence: item(**{keyword: other})} for k, group in enumerate(groups)]
    shown = f"{usual:.6g} in 6 frames and {other:.6g}" if not isinstance(usual, str) else f"{usual} in 6 frames"
    fails(make_frames(path, lps, odd), "series", f"{keyword} is {shown}", "(frame 1, frame 6)")
    for shared in ({}, {sequence: item(**{keyword: other})}):  # a shared value does not fill the gap
        partly = [group if k != 7 else {} for k, group in enumerate(groups)]
        fails(
            make_frames(path, lps, partly, shared),
            "series",
            f"{keyword} is ",
            "7 frames",
            "absent in 1 frame (frame 8)",
        )


@pytest.mark.parametrize("place", [0, 4, 7])
@pytest.mark.parametrize("keyword", ["RescaleSlope", "RescaleIntercept"])
def test_a_frame_without_rescale_is_refused(tmp_path, place, keyword):
    """Neither the missing group nor the missing attribute is filled from the shared group or the main data set."""
    lps, rescale = slices(8), {"RescaleSlope": 2, "RescaleIntercept": -5}
    groups = [{"PixelValueTransformationSequence": item(**rescale)} for _ in range(8)]
    path = make_frames(tmp_path / "a.dcm", lps, groups)
    np.testing.assert_array_equal(scans.read(path)[0], axial_display(lps) * 2 - 5)
    words = f"for 7 of 8 frames, not for frame {place + 1}"
    for shared, main in (({}, {}), ({"PixelValueTransformationSequence": item(**rescale)}, {}), ({}, rescale)):
        groups[place] = {}
        fails(make_frames(path, lps, groups, shared, **main), "series", f"RescaleSlope {words}")
        groups[place] = {"PixelValueTransformationSequence": item(**{k: v for k, v in rescale.items() if k != keyword})}
        fails(make_frames(path, lps, groups, shared, **main), "series", f"{keyword} {words}")


def test_a_frame_without_position_or_spacing_is_refused(tmp_path):
    lps = slices(4)
    path = make_frames(tmp_path / "a.dcm", lps, [{}] * 4)
    dataset = pydicom.dcmread(path)
    del dataset.PerFrameFunctionalGroupsSequence[3].PlanePositionSequence
    dataset.save_as(path)
    fails(path, "series", "ImagePositionPatient for 3 of 4 frames, not for frame 4")
    groups = [{"PixelMeasuresSequence": item(PixelSpacing=[1, 1])} for _ in range(3)] + [{}]
    fails(make_frames(path, lps, groups), "series", "PixelSpacing for 3 of 4 frames, not for frame 4")
    groups[3] = {"PixelMeasuresSequence": item(PixelSpacing=[2, 2])}
    fails(make_frames(path, lps, groups), "series", r"PixelSpacing is 1\1 in 3 frames and 2\2 in 1 frame (frame 4)")


def test_real_world_values_matter_only_without_a_rescale(tmp_path):
    """Philips and PET store a display rescale and real-world values with other slopes."""
    lps = slices(3)
    groups = [
        {
            "PixelValueTransformationSequence": item(RescaleSlope=2, RescaleIntercept=0),
            "RealWorldValueMappingSequence": item(RealWorldValueSlope=0.5 * (k + 1), RealWorldValueIntercept=0.0),
        }
        for k in range(3)
    ]
    path = make_frames(tmp_path / "a.dcm", lps, groups)
    np.testing.assert_array_equal(scans.read(path)[0], axial_display(lps) * 2)
    (tmp_path / "classic").mkdir()
    folder, files = series(tmp_path / "classic", 4, RescaleSlope=None, RescaleIntercept=None)
    for k, file in enumerate(files):
        edit(file, RealWorldValueMappingSequence=item(RealWorldValueSlope=1.0 + k, RealWorldValueIntercept=0.0))
    fails(folder, "series", "RealWorldValueSlope is 1 in 1 slice and ", "and has 1 more value")


def test_frames_of_several_energy_windows_or_tiles_are_refused(tmp_path):
    lps = slices(4)
    path = make_frames(tmp_path / "a.dcm", lps, [{}] * 4, Modality="NM", EnergyWindowVector=[1, 1, 2, 2])
    fails(path, "series", "EnergyWindowVector is 1 in 2 frames and 2 in 2 frames")
    path = make_frames(path, lps, [{}] * 4, Modality="NM", EnergyWindowVector=[1, 1, 1, 1])
    assert scans.read(path)[1].shape == (3, 4, 4, 1)
    fails(make_frames(path, lps, [{}] * 4, TotalPixelMatrixColumns=12), "unsupported", "tiles of one image")


def test_mosaics_are_refused(tmp_path):
    """By ImageType, by the frame type of enhanced files, or by Siemens' private number of images."""
    picture, remedy = slices(1)[..., 0], "dcm2niix"
    path = make_dicom(tmp_path / "a.dcm", picture, ImageType=["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"])
    fails(path, "unsupported", "Siemens mosaic", remedy)
    groups = [{"MRImageFrameTypeSequence": item(FrameType=["ORIGINAL", "PRIMARY", "FMRI", "MOSAIC"])}]
    fails(make_frames(path, slices(1), groups), "unsupported", "Siemens mosaic", remedy)
    dataset = pydicom.dcmread(make_dicom(path, picture, ImageType=["ORIGINAL", "PRIMARY"]))
    dataset.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", 36)
    dataset.save_as(path)
    fails(path, "unsupported", "Siemens mosaic", remedy)
    dataset.private_block(0x0019, "SIEMENS MR HEADER")[0x0A].value = 1
    dataset.save_as(path)
    np.testing.assert_array_equal(scans.read(path)[0][:, :, 0, 0], picture)
    dataset.private_block(0x0065, "Image Private Header", create=True).add_new(0x50, "DS", "25")
    dataset.save_as(path)
    fails(path, "unsupported", "United Imaging mosaic", remedy)
    folder, _ = series(tmp_path, ImageType=["ORIGINAL", "PRIMARY", "MOSAIC"])
    fails(folder, "unsupported", "none of its 8 files", "Siemens mosaic", remedy)


def test_messages_contain_no_identity(tmp_path):
    """Free text and identifiers are compared but not shown."""
    folder, files = series(tmp_path)
    edit(files[0], SequenceName="Secret", SeriesInstanceUID="1.2.99", EchoTime=3)
    edit(files[1], ContrastBolusAgent="Secret")
    said = str(fails(folder, "series", "SequenceName is absent in 7 slices and another value"))
    assert not any(word in said for word in ("Secret", "4711", "1.2.99", "1.2.3"))


def test_thickness_may_change_once_but_not_alternate(tmp_path):
    folder, files = series(tmp_path)
    for k, path in enumerate(files):
        edit(path, SliceThickness=2.5 if k < 4 else 5)
    assert scans.read(folder)[1].shape[2] == 8
    edit(files[6], SliceThickness=2.5)
    fails(folder, "series", "interleaves slices", "SliceThickness is 2.5 in 5 slices and 5 in 3 slices")
