"""Damaged scan files give an exact read or a ScanError, never a hang, and no wrong voxels if a checksum covers them.

Every case is a pure function of (kind of file, seed), so it can be reproduced. The kinds of damage:

    flip      1 to 3 bits anywhere
    cut       the file ends early
    splice    a byte range is copied over another one
    header    a byte of the first part, or of the compressed stream's own header, gets another value
    zeros     a range of up to 512 bytes becomes 0
    grow      a byte range is inserted
"""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import time
import warnings
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.data import get_testdata_file

from input_pipeline.images import scans

QUICK, SLOW = 50, 1000  # cases of each kind; several kinds of each format
NIBABEL = Path(nibabel.__file__).parent / "tests" / "data"
DAMAGES = ("flip", "cut", "splice", "header", "zeros", "grow")
SECONDS, MEGABYTES = 5.0, 30  # for one read; measured at most 0.7 s and 3 MB over the 20,000 slow cases


@dataclasses.dataclass(frozen=True)
class Kind:
    """A family of files.

    Attributes:
      checked: a checksum covers the voxels, so wrong voxels are a failure.
      complete: truncation is always detected.
      head: number of bytes that `header` damages, from the start of the file or from `mark`.
    """

    name: str
    file: str
    checked: bool
    head: int
    mark: bytes = b""
    volume: int | None = None
    complete: bool = True


def installed(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert path is not None, name
    return Path(path).read_bytes()


def pixels(channels: int) -> np.ndarray:
    """A smooth image with some noise, uint8[40, 48(, 3)]."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:40, :48]
    planes = [128 + 80 * np.sin(x / (5 + c)) * np.cos(y / 7) + rng.normal(0, 5, x.shape) for c in range(channels)]
    picture = np.clip(np.stack(planes, axis=-1), 0, 255).astype(np.uint8)
    return picture[..., 0] if channels == 1 else picture


def content(kind: Kind) -> bytes:
    """Return the undamaged file: real DICOM and NIfTI, synthetic images and arrays."""
    if kind.file.endswith(".dcm"):
        return installed(kind.file)
    if kind.name == "nii":
        return (NIBABEL / "anatomical.nii").read_bytes()
    if kind.name.startswith("nii.gz"):
        return (NIBABEL / ("standard.nii.gz" if "small" in kind.name else "example4d.nii.gz")).read_bytes()
    buffer = io.BytesIO()
    if kind.name.startswith("png"):
        picture = pixels(3 if "colour" in kind.name else 1)
        Image.fromarray(picture.astype(np.uint16) * 200 if "16" in kind.name else picture).save(buffer, "PNG")
    elif kind.name.startswith("jpeg"):
        Image.fromarray(pixels(3)).save(buffer, "JPEG", progressive="progressive" in kind.name)
    elif kind.name.startswith("tiff"):
        stack = np.stack([pixels(1)] * 3).astype(np.uint16) * np.array([1, 2, 3], np.uint16)[:, None, None]
        tifffile.imwrite(
            buffer, stack, photometric="minisblack", compression="zlib" if "deflate" in kind.name else None
        )
    else:
        np.save(buffer, np.stack([pixels(3)] * 4, axis=2).astype(np.int16))
    return buffer.getvalue()


KINDS = [
    Kind("nii.gz 4D", "a.nii.gz", True, 64, volume=1),
    Kind("nii.gz small", "a.nii.gz", True, 64),
    Kind("nii", "a.nii", False, 352),
    Kind("png gray", "a.png", True, 64),
    Kind("png gray16", "a.png", True, 64),
    Kind("png colour", "a.png", True, 64),
    Kind("jpeg", "a.jpg", False, 700),
    Kind("jpeg progressive", "a.jpg", False, 700),
    Kind("tiff", "a.tif", False, 300),
    Kind("tiff deflate", "a.tif", False, 300),
    Kind("npy", "a.npy", False, 128),
    Kind("dicom native", "CT_small.dcm", False, 6000),
    Kind("dicom implicit", "MR_small_implicit.dcm", False, 1500),
    Kind("dicom RLE", "MR_small_RLE.dcm", False, 1700),
    Kind("dicom JPEG 2000", "MR_small_jp2klossless.dcm", False, 150, b"\xff\x4f\xff\x51"),
    Kind("dicom JPEG-LS", "MR_small_jpeg_ls_lossless.dcm", False, 60, b"\xff\xd8"),
    Kind("dicom JPEG lossless", "SC_rgb_jpeg_gdcm.dcm", False, 200, b"\xff\xd8"),
    Kind("dicom JPEG", "SC_rgb_dcmtk_+eb+cr.dcm", False, 300, b"\xff\xd8"),
    Kind("dicom frames", "emri_small_jpeg_2k_lossless.dcm", False, 150, b"\xff\x4f\xff\x51"),
    Kind("dicom deflated", "image_dfl.dcm", False, 400),
]


def damaged(kind: Kind, data: bytes, case: int) -> tuple[str, bytes]:
    """Return (kind of damage, damaged file) of one case."""
    rng = np.random.default_rng([KINDS.index(kind), case])
    how = DAMAGES[case % len(DAMAGES)]
    out, size = bytearray(data), len(data)
    if how == "flip":
        for bit in rng.integers(8 * size, size=rng.integers(1, 4)):
            out[bit // 8] ^= 1 << int(bit % 8)
    elif how == "cut":
        out = out[: rng.integers(1, size)]
    elif how == "splice":
        source, target, run = rng.integers(size), rng.integers(size), rng.integers(1, 1 + min(2000, size // 4))
        chunk = data[source : source + run]
        out[target : target + len(chunk)] = chunk
    elif how == "header":
        start = max(data.find(kind.mark), 0) if kind.mark else 0
        out[start + int(rng.integers(min(kind.head, size - start)))] = int(rng.integers(256))
    elif how == "zeros":
        at, run = rng.integers(size), rng.integers(1, 513)
        out[at : at + run] = bytes(len(out[at : at + run]))
    else:
        at, run = rng.integers(size), rng.integers(1, 100)
        out[at:at] = rng.bytes(int(run))
    return how, bytes(out)


def peak() -> float:
    """Return the peak memory since the last reset, in MB."""
    return (
        next(int(x.split()[1]) for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        / 1024
    )


def run(kind: Kind, path: Path, cases) -> Counter:
    """Read every case and count the results: `exact`, `error`, or `silent <damage>`.

    Fails on any exception but ScanError, on slow reads and on high memory use.
    """
    data = content(kind)
    path.write_bytes(data)
    good, head = scans.read(path, volume=kind.volume)
    assert scans.header(path) == head
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current use
    before, counts, slowest = peak(), Counter(), 0.0
    for case in cases:
        how, bad = damaged(kind, data, case)
        path.write_bytes(bad)
        start = time.monotonic()
        try:
            voxels, found = scans.read(path, volume=kind.volume)
        except scans.ScanError as error:
            assert error.fault in scans.FAULTS and error.remedy and str(path) in str(error)
            assert "while reading the file" not in error.reason, (kind.name, case, error.reason)  # the fallback
            counts["error"] += 1
        else:
            assert voxels.shape == found.shape and np.isfinite(voxels).all()
            same = voxels.dtype == good.dtype and np.array_equal(voxels, good)
            counts["exact" if same and (found == head or not kind.checked) else f"silent {how}"] += 1
        slowest = max(slowest, time.monotonic() - start)
        assert slowest < SECONDS, (kind.name, case)
    grown = peak() - before
    print(f"\n{kind.name}: slowest {slowest:.2f} s, memory + {grown:.0f} MB")
    assert grown < MEGABYTES, (kind.name, grown)
    assert counts["error"] > len(cases) / 10, counts  # the damage has an effect
    return counts


def check(kind: Kind, counts: Counter) -> None:
    silent = {name: n for name, n in counts.items() if name.startswith("silent")}
    if kind.checked:
        assert not silent, (kind.name, silent)
    if kind.complete:
        assert "silent cut" not in silent, (kind.name, silent)


@pytest.fixture(autouse=True)
def libraries_may_warn():
    """Keep warnings of libraries from becoming errors, which these tests would count."""
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_damaged_files(tmp_path, kind):
    check(kind, run(kind, tmp_path / kind.file, range(QUICK)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_damaged_files_extended(tmp_path, kind):
    counts = run(kind, tmp_path / kind.file, range(QUICK, QUICK + SLOW))
    print(f"\n{kind.name}: {dict(sorted(counts.items()))} of {SLOW}")
    check(kind, counts)


# --- series ---


def series() -> list[pydicom.Dataset]:
    """Eight slices 2.5 mm apart, made from a real one with different noise."""
    source, rng = pydicom.dcmread(get_testdata_file("CT_small.dcm", download=False)), np.random.default_rng(5)
    stored = source.pixel_array
    for element in list(source):
        if element.tag.group not in (0x0008, 0x0020, 0x0028, 0x7FE0) or element.VR == "SQ":
            del source[element.tag]  # smaller files, faster tests
    made = []
    for k in range(8):
        dataset = copy.deepcopy(source)
        cut = stored[::4, ::4] + rng.integers(-20, 20, (32, 32))
        dataset.Rows = dataset.Columns = 32
        dataset.PixelData = cut.astype(np.int16).tobytes()
        dataset.ImagePositionPatient = [0, 0, 2.5 * k]
        dataset.file_meta = source.file_meta
        made.append(dataset)
    return made


def damage_series(made: list[pydicom.Dataset], rng) -> tuple[str, list[pydicom.Dataset], bool]:
    """Return (kind of damage, damaged series, whether it is detectable)."""
    k = int(rng.integers(1, len(made) - 1))
    made = [*made[:k], copy.deepcopy(made[k]), *made[k + 1 :]]
    damage = ("order", "missing", "twice", "moved", "size", "series", "turned", "spacing", "ends")[rng.integers(9)]
    if damage == "order":
        rng.shuffle(made)
    elif damage == "missing":
        del made[k]
    elif damage == "twice":
        made.append(copy.deepcopy(made[k]))
    elif damage == "moved":
        sign = 1 if rng.random() < 0.5 else -1
        made[k].ImagePositionPatient = [0, 0, 2.5 * k + sign * rng.uniform(0.7, 6)]
    elif damage == "size":
        made[k].Rows, made[k].PixelData = 16, made[k].PixelData[: 16 * 32 * 2]
    elif damage == "series":
        made[k].SeriesInstanceUID = "1.2.3.4"
    elif damage == "turned":
        made[k].ImageOrientationPatient = [1, 0, 0, 0, 0.996, 0.087]
    elif damage == "spacing":
        made[k].PixelSpacing = [0.7, 0.7]
    else:
        del made[0 if rng.random() < 0.5 else -1]
    return damage, made, damage not in ("order", "ends")


def run_series(folder: Path, cases) -> Counter:
    made = series()
    expected = np.stack([d.pixel_array.astype(int) - 1024 for d in made], axis=-1)[..., None]
    counts = Counter()
    for case in cases:
        rng = np.random.default_rng([77, case])
        damage, bad, detectable = damage_series(made, rng)
        target = folder / str(case)
        target.mkdir()
        names = rng.permutation(len(bad))
        for name, dataset in zip(names, bad, strict=True):
            dataset.save_as(target / f"{name}.dcm")
        try:
            voxels, _ = scans.read(target)
        except scans.ScanError as error:
            assert error.fault == "series" and ".dcm" in str(error), str(error)
            assert detectable, damage
            counts["error"] += 1
        else:
            counts["exact" if np.array_equal(voxels, expected) else f"silent {damage}"] += 1
            assert not detectable, (damage, case)
    return counts


def test_damaged_series(tmp_path):
    """Only a missing first or last slice cannot be detected from positions."""
    counts = run_series(tmp_path, range(QUICK))
    assert set(counts) == {"exact", "error", "silent ends"}


@pytest.mark.slow
def test_damaged_series_extended(tmp_path):
    counts = run_series(tmp_path, range(QUICK, QUICK + SLOW))
    print(f"\nseries: {dict(sorted(counts.items()))} of {SLOW}")
    assert set(counts) == {"exact", "error", "silent ends"}
