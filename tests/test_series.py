"""Studies as hospitals export them: every series is found, nothing is mixed, and voxels equal those of SimpleITK."""

from __future__ import annotations

import dataclasses
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from scan_files import dicom_file, fails
from studies import plant, reference, stack

from input_pipeline.images import scans
from input_pipeline.images.scans.study.reading import open_study

CT, MR = "CT_small.dcm", "MR_small.dcm"


@dataclasses.dataclass
class Expected:
    """The volumes of each series of a study (files of the slices), and why other files and series are set aside."""

    series: dict[str, list[list[Path]]]
    aside: set[str] = dataclasses.field(default_factory=set)


def chest(folder: Path) -> Expected:
    """One CT series in a nested folder, with localizers, a report, a plan and a text file."""
    files = stack(folder / "ST0" / "SE2", CT, 9, 2, SeriesDescription="Lung 2.5")
    plant(folder / "ST0" / "SE1", "scout", "scout2")
    plant(folder, "report", "plan")
    (folder / "README.txt").write_text("viewer")
    reasons = {"a structured report", "an object of radiotherapy", "not DICOM", "localizer"}
    return Expected({"2": [files]}, reasons)


def two_kernels(folder: Path) -> Expected:
    """Two reconstructions of one scan, with copies of some files in another folder."""
    soft = stack(folder / "a", CT, 6, 3, SeriesDescription="Chest soft", ConvolutionKernel="B30f")
    lung = stack(folder / "b", CT, 8, 4, SeriesDescription="Chest lung", ConvolutionKernel="B70f")
    for number, file in enumerate((*soft[:2], lung[3])):
        (folder / "copies").mkdir(exist_ok=True)
        shutil.copy(file, folder / "copies" / f"z{number}.dcm")
    return Expected({"3": [soft], "4": [lung]}, {"a duplicate"})


def echoes(folder: Path) -> Expected:
    parts = [stack(folder, MR, 5, 3, EchoTime=te, EchoNumbers=n) for n, te in ((1, 5.0), (2, 80.0))]
    return Expected({"3.1": [parts[0]], "3.2": [parts[1]]})


def phase(folder: Path) -> Expected:
    types = [["ORIGINAL", "PRIMARY", kind, "ND"] for kind in "MP"]
    parts = [stack(folder, MR, 4, 7, ImageType=kind, RescaleSlope=1, RescaleIntercept=0) for kind in types]
    return Expected({"7.1": [parts[0]], "7.2": [parts[1]]})


def dynamic(folder: Path) -> Expected:
    times = [stack(folder, MR, 4, 5, TemporalPositionIdentifier=t + 1, AcquisitionNumber=t) for t in range(3)]
    return Expected({"5": times})


def cardiac(folder: Path) -> Expected:
    """The trigger times of a phase differ between the slices, because the heart rate does."""
    times = [stack(folder, MR, 4, 8, TriggerTime=lambda k, t=t: 100.0 * t + (k % 2) * t * 5) for t in range(5)]
    return Expected({"8": times})


def rescale(folder: Path) -> Expected:
    """A part without a rescale, and a part of another size."""
    parts = [stack(folder, CT, 5, 2), stack(folder, CT, 4, 2, 20, RescaleSlope=None, RescaleIntercept=None)]
    small = stack(folder, CT, 3, 2, 40, PixelSpacing=[1.5, 1.5])
    return Expected({"2.1": [parts[0]], "2.2": [parts[1]], "2.3": [small]})


def orientations(folder: Path) -> Expected:
    """Axial and coronal slices under one SeriesInstanceUID."""
    axial = stack(folder, CT, 4, 6)
    coronal = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1], "ImagePositionPatient": lambda k: [-60, 2.0 * k, 60]}
    return Expected({"6.1": [axial], "6.2": [stack(folder, CT, 4, 6, 30, **coronal)]})


def captures(folder: Path) -> Expected:
    """A head CT with a secondary capture, a reformat, a segmentation and a dose distribution."""
    files = stack(folder / "ct", "693_UNCR.dcm", 3, 2)
    plant(folder / "more", "capture", "reformat", "segmentation", "dose")
    reasons = {"a segmentation", "a dose distribution", "secondary capture", "derived reformat"}
    return Expected({"2": [files]}, reasons)


def radiographs(folder: Path) -> Expected:
    """Two views under one SeriesInstanceUID: images without a position are scans of their own."""
    views = []
    for number, name in enumerate(("RG1_UNCR.dcm", "RG3_UNCR.dcm"), 1):
        dataset = pydicom.dcmread(dicom_file(name))
        dataset.SeriesInstanceUID, dataset.SeriesNumber, dataset.InstanceNumber = "1.2.7", 1, number
        dataset.PhotometricInterpretation, dataset.SeriesDescription = "MONOCHROME2", "Chest PA and lateral"
        folder.mkdir(exist_ok=True)
        views.append(folder / f"{9 - number}.dcm")
        dataset.save_as(views[-1])
    return Expected({"1.1": [[views[0]]], "1.2": [[views[1]]]})


def thickness(folder: Path) -> Expected:
    """Thin and thick slices at some of the same positions, and a kind of its own at the end."""
    thick = {"SliceThickness": 5.0, "ImagePositionPatient": lambda k: [-158.135803, -179.035797, 5.0 * k]}
    thin = {"SliceThickness": 2.5, "ImagePositionPatient": lambda k: [-158.135803, -179.035797, 2.5 * k]}
    return Expected({"4.1": [stack(folder, CT, 8, 4, **thin)], "4.2": [stack(folder, CT, 4, 4, 20, **thick)]})


def as_it_is(folder: Path) -> Expected:
    """A study of pydicom's DICOMDIR tests: a gated CT and its scouts."""
    source = Path(dicom_file("dicomdirtests/DICOMDIR")).parent / "98892001"
    shutil.copytree(source, folder)
    return Expected({"5": [sorted((folder / "CT5N").iterdir())]}, {"localizer"})


STUDIES: tuple[Callable[[Path], Expected], ...] = (
    *(chest, two_kernels, echoes, phase, dynamic, cardiac),
    *(rescale, orientations, captures, radiographs, thickness, as_it_is),
)


@pytest.mark.parametrize("build", STUDIES, ids=lambda build: build.__name__)
def test_every_series_is_found_and_equals_simpleitk(tmp_path, build):
    folder = tmp_path / "study"
    expected = build(folder)
    with open_study(folder) as opened:
        study = opened.study
        listed = {s.key: s for s in study.series if not s.aside}
        assert listed.keys() == expected.series.keys() and not study.refused
        reasons = {entry.reason for entry in study.set_aside} | {s.aside for s in study.series if s.aside}
        assert reasons == expected.aside
        for key, volumes in expected.series.items():
            assert len(listed[key].volumes) == len(volumes)
            for number, files in enumerate(volumes):
                slices = [entry.member.path for entry, _ in listed[key].volumes[number]]
                assert sorted(slices) == sorted(files)  # every slice, and no other one
                voxels, header = opened.read(listed[key], number)
                # GDCM computes in double precision and stores what fits; both are exact for these integers.
                np.testing.assert_allclose(voxels[..., 0], reference(files, listed[key].plane), rtol=1e-6, atol=1e-3)
                assert header.shape[:2] == (listed[key].rows, listed[key].columns) or listed[key].plane != "axial"
    key, volumes = next(iter(expected.series.items()))
    options = {"volume": len(volumes) - 1} if len(volumes) > 1 else {}
    options |= {"series": key} if len(expected.series) > 1 else {}
    one = scans.read(folder, **options)[0]
    np.testing.assert_allclose(one[..., 0], reference(volumes[-1], listed[key].plane), rtol=1e-6, atol=1e-3)
    assert scans.header(folder, series=options.get("series")).shape == one.shape


def test_a_study_with_several_series_needs_a_selection(tmp_path):
    two_kernels(tmp_path / "s")
    error = fails(tmp_path / "s", "series", 'has 2 series: 3 "Chest soft" (CT, axial, 128 x 128 x 6); 4 "Chest lung"')
    assert 'select one, for example series="3"' in str(error)
    depth = lambda words: scans.read(tmp_path / "s", series=words)[0].shape[2]  # noqa: E731
    for words in ("3", "soft", "axial soft", "CT, SOFT", "chest so"):
        assert depth(words) == 6, words
    for words in ("4", "lung", "largest", "chest transverse largest"):
        assert depth(words) == 8, words
    for words, message in (
        ("chest", "series 'chest' matches 2 series: 3"), ("coronal", "no series matches 'coronal': 3"),
        ("3 lung", "no series matches"), ("5", "no series matches"), ("ung", "no series matches"),
    ):  # fmt: skip
        fails(tmp_path / "s", "series", message, series=words)
    fails(tmp_path / "s", "ambiguous", "the series selector is empty", series=" ")
    fails(dicom_file(CT), "series", "no series matches '2'", series="2")
    np.save(tmp_path / "a.npy", np.arange(60.0).reshape(3, 4, 5))
    fails(tmp_path / "a.npy", "ambiguous", "is one scan without series", series="2")


def test_a_flat_export_may_have_more_files_than_a_volume(tmp_path):
    """The limits hold for the selected series, not for the folder."""
    stack(tmp_path / "s", CT, 4, 2, SeriesDescription="Lung")
    stack(tmp_path / "s", MR, 2, 3)
    assert scans.read(tmp_path / "s", series="lung", limits=scans.ScanLimits(max_slices=4))[0].shape[2] == 4
    fails(tmp_path / "s", "series", "has 2 series", limits=scans.ScanLimits(max_slices=4))
    fails(tmp_path / "s", "limit", "more than 3 slices", limits=scans.ScanLimits(max_slices=3), series="lung")


def test_series_that_were_set_aside_are_selected_by_number_only(tmp_path):
    chest(tmp_path / "s")
    for words in ("4.1", "4.2"):
        voxels, header = scans.read(tmp_path / "s", series=words)
        assert voxels.shape == (16, 16, 1, 1) and "localizer by its header" in header.notices[0]
    fails(tmp_path / "s", "series", "no series matches 'scout'", '4.1 "Scout"', series="scout")
    only = tmp_path / "only"
    shutil.copytree(tmp_path / "s" / "ST0" / "SE1", only)
    (only / "IM_scout2").unlink()
    assert scans.read(only)[0].shape == (16, 16, 1, 1)


def test_a_dynamic_series_needs_a_volume(tmp_path):
    dynamic(tmp_path / "s")
    fails(tmp_path / "s", "ambiguous", "series 5 has 3 volumes, one per time", "choose one: volume 0 to 2")
    fails(tmp_path / "s", "ambiguous", "series 5 has no volume 3", volume=3)
    assert scans.header(tmp_path / "s").volumes == 3


def test_damaged_and_conflicting_files_prevent_reading(tmp_path):
    """A file that may be a slice is never skipped: a missing last slice would not be noticed."""
    files = stack(tmp_path / "a" / "ct", CT, 5, 2)
    files[4].write_bytes(files[4].read_bytes()[:3000])
    fails(tmp_path / "a", "series", files[4].name)
    files[4].write_bytes(b"\0" * 128 + b"DICM" + b"\xff" * 60)
    fails(tmp_path / "a", "series", "has files that may be slices of the series", files[4].name, series="2")
    files[4].write_bytes(b"not DICOM")
    fails(tmp_path / "a", "series", "is not DICOM, but is named like the images next to it", series="2")
    files[4].rename(tmp_path / "a" / "ct" / "notes.txt")
    assert scans.read(tmp_path / "a")[0].shape[2] == 4
    conflict = stack(tmp_path / "b" / "ct", CT, 5, 2)
    dataset = pydicom.dcmread(conflict[2])
    dataset.PixelData = dataset.PixelData[:-2] + b"\1\1"
    dataset.save_as(tmp_path / "b" / "other.dcm")
    fails(tmp_path / "b", "series", "are different images with one SOP instance UID", "other.dcm")


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar", "dicomdir"])
def test_containers_equal_the_folder(tmp_path, kind):
    source = Path(dicom_file("dicomdirtests/DICOMDIR")).parent
    folder = tmp_path / "study"
    for name in ("98892001", "77654033"):
        shutil.copytree(source / name, folder / name)
    expected = {s: scans.read(folder, series=s) for s in ("5", "lat")}
    if kind == "dicomdir":
        path = source / "DICOMDIR"
        assert len(scans.files_of(path)) == 32
    else:
        path = Path(shutil.make_archive(str(tmp_path / "export"), kind, folder))
        assert scans.files_of(path) == [str(path)]
    for words, (voxels, header) in expected.items():
        read, head = scans.read(path, series=words)
        np.testing.assert_array_equal(read, voxels)
        assert head == header == scans.header(path, series=words)


def test_hostile_archives(tmp_path):
    """Names that leave the archive, links and bombs are not read, and nothing is written."""
    good = Path(dicom_file(CT)).read_bytes()
    with zipfile.ZipFile(tmp_path / "slip.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ct/1.dcm", good)
        archive.writestr("../../evil.dcm", good)
        archive.writestr("/etc/evil.dcm", good)
        link = zipfile.ZipInfo("link.dcm")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("zeros", bytes(5_000_000))
    assert scans.read(tmp_path / "slip.zip")[0].shape == (128, 128, 1, 1)
    with open_study(tmp_path / "slip.zip") as opened:
        found = {entry.reason: entry.files for entry in opened.study.set_aside}
    assert found == {"a link": 1, "not DICOM": 1, "its name leaves the archive": 2}
    limits = scans.ScanLimits(max_file_bytes=1_000_000)
    fails(tmp_path / "slip.zip", "series", "zeros has more than 1,000,000 bytes", limits=limits)
    fails(tmp_path / "slip.zip", "limit", "more than 1 files", limits=scans.ScanLimits(max_instances=1))
    (tmp_path / "bomb").mkdir()
    (tmp_path / "bomb" / "zeros").write_bytes(bytes(5_000_000))
    bomb = shutil.make_archive(str(tmp_path / "bomb"), "gztar", tmp_path / "bomb")
    fails(bomb, "limit", "unpacks to more than 1,000,000 bytes", limits=limits)
    packed = Path(shutil.make_archive(str(tmp_path / "cut"), "tar", Path(dicom_file(CT)).parent, "CT_small.dcm"))
    assert scans.read(packed)[0].shape == (128, 128, 1, 1)
    whole = packed.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for damaged in (whole[:end], whole[:end] + b"\1" * 512 + bytes(1024), whole[:end] + bytes(512) + whole[:512]):
        packed.write_bytes(damaged)
        fails(packed, "damaged", "tar archive")
    data = bytearray((tmp_path / "slip.zip").read_bytes())
    data[data.index(b"ct/1.dcm") + 3000] ^= 1  # in the compressed bytes of the slice
    (tmp_path / "flipped.zip").write_bytes(data)
    with pytest.raises(scans.ScanError):
        scans.read(tmp_path / "flipped.zip")


def test_links_in_folders(tmp_path):
    files = stack(tmp_path / "store", CT, 4, 2)
    study = tmp_path / "study" / "ct"
    study.mkdir(parents=True)
    for file in files:
        (study / file.name).symlink_to(file)
    assert scans.read(tmp_path / "study")[0].shape[2] == 4
    (study / "loop").symlink_to(tmp_path / "study")
    assert scans.read(tmp_path / "study")[0].shape[2] == 4
    with pytest.raises(scans.ScanError, match="outside the root"):
        scans.resolve(tmp_path / "study", "ct")
    files[0].unlink()
    fails(tmp_path / "study", "series", "a link to a file that does not exist")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "gztar", "tar"])
def test_damaged_archives_never_lose_a_slice(tmp_path, kind):
    """Flipped bits, cuts and zeros give an error or the same voxels; only pixels of a plain tar have no checksum."""
    study = tmp_path / "study"
    stack(study, MR, 4, 2)
    stack(study, MR, 3, 3)
    good = {words: scans.read(study, series=words)[0] for words in "23"}
    packed = Path(shutil.make_archive(str(tmp_path / "export"), kind, study))
    data, rng, refused = packed.read_bytes(), np.random.default_rng(0), 0
    for trial in range(200):
        damaged = bytearray(data)
        position = int(rng.integers(len(data)))
        if trial % 4 == 0:
            del damaged[position:]
        elif trial % 4 == 1:
            damaged[position : position + 64] = bytes(len(damaged[position : position + 64]))
        else:
            for place in rng.integers(len(data), size=20 if trial % 4 == 2 else 1).tolist():
                damaged[place] ^= 1 << trial % 8
        packed.write_bytes(damaged)
        words = "23"[trial % 2]
        try:
            voxels = scans.read(packed, series=words)[0]
        except scans.ScanError:
            refused += 1
            continue
        assert voxels.shape == good[words].shape
        assert kind == "tar" or (voxels == good[words]).all()
    assert refused > 60
