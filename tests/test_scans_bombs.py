"""Files that state or contain far more data than their size are refused at the limit, with little memory and time."""

from __future__ import annotations

import gzip
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import tifffile
from PIL import Image
from scan_files import RAMP, dicom_file, lps_volume

from input_pipeline.images import scans

BOMBS = """
import sys, time
from input_pipeline.images import scans

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024

for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")  # reset the peak to the current use
    before, start = peak(), time.monotonic()
    limits = scans.ScanLimits(max_bytes=1 << 26) if "deflated" in path else scans.ScanLimits()
    try:
        scans.read(path, limits=limits)
        result = "READ"
    except scans.ScanError as error:
        result = error.fault + ": " + error.reason[:90]
    print(result, peak() - before, round(time.monotonic() - start, 2), path, sep="|")
"""


OPTIONAL = ("text.png", "profile.png")  # black images; the data are in chunks that are not read


def bombs(folder: Path) -> list[Path]:
    """Write small files that require much memory."""
    made = []

    def add(name: str, data: bytes) -> None:
        (folder / name).write_bytes(data)
        made.append(folder / name)

    image = nibabel.Nifti1Image(lps_volume(), np.eye(4))
    header = bytearray(image.to_bytes()[:352])
    block = zlib.compressobj(1, zlib.DEFLATED, 31)
    zeros = bytes(1 << 20)
    seventy = zlib.compress(zeros * 70, 1)
    add(
        "trailing.nii.gz",
        block.compress(bytes(header)) + b"".join(block.compress(zeros) for _ in range(70)) + block.flush(),
    )
    for i, n in enumerate((1000, 1000, 1000)):
        struct.pack_into("<h", header, 42 + 2 * i, n)
    add("claims.nii.gz", gzip.compress(bytes(header) + zeros))  # states 2 GB, contains 1 MB
    for i in range(3):
        struct.pack_into("<h", header, 42 + 2 * i, 32767)
    add("huge.nii.gz", gzip.compress(bytes(header) + zeros))
    struct.pack_into("<f", header, 108, 3e9)
    add("extension.nii", bytes(header))

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    def png(w: int, h: int, *extra: bytes) -> bytes:
        start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0))
        return start + b"".join(extra) + chunk(b"IDAT", zlib.compress(zeros)) + chunk(b"IEND", b"")

    add("sides.png", png(60000, 60000))
    add("cut.png", png(9000, 9000))
    add("text.png", png(30, 30, chunk(b"zTXt", b"Raw profile type exif\0\0" + seventy)))
    add("profile.png", png(30, 30, chunk(b"iCCP", b"k\0\0" + seventy)))
    jpeg = io.BytesIO()
    Image.fromarray(np.tile(RAMP, (4, 4))).save(jpeg, "JPEG")
    data = bytearray(jpeg.getvalue())
    at = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, 65000, 65000)
    add("sides.jpg", bytes(data))

    def npy(shape, rest: bytes) -> bytes:
        text = f"{{'descr': '<i2', 'fortran_order': False, 'shape': {shape}, }}".encode()
        text += b" " * (-(10 + len(text) + 1) % 64) + b"\n"
        return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + rest

    add("claims.npy", npy((1000, 1000, 1000), zeros))
    add("huge.npy", npy((10**9, 10**9, 10**9), zeros))
    add("nested.npy", npy("(" * 2000 + ")" * 2000, zeros))
    version2 = b"\x93NUMPY\x02\0" + struct.pack("<I", 1 << 31) + b"{" * 1000
    add("header.npy", version2)

    for name in (
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "SC_rgb_jpeg_gdcm.dcm",
    ):
        dataset = pydicom.dcmread(dicom_file(name))
        raw = dataset.PixelData
        for mark, form, shift in ((b"\xff\x4f\xff\x51", ">II", 8), (b"\xff\xc3", ">HH", 5), (b"\xff\xf7", ">HH", 5)):
            if mark in raw:  # the stream states 16,000 x 16,000, the header 64 x 64
                at = raw.index(mark) + shift
                raw = raw[:at] + struct.pack(form, 16000, 16000) + raw[at + struct.calcsize(form) :]
        if "RLE" in name:  # packets that repeat one byte 128 times
            packets = b"\x81\0" * 500_000
            frame = struct.pack("<16L", 2, 64, 64 + len(packets) // 2, *[0] * 13) + packets
            raw = pydicom.encaps.encapsulate([frame])
        dataset.PixelData = raw
        dataset.save_as(folder / f"bomb_{name}")
        made.append(folder / f"bomb_{name}")
    dataset = pydicom.dcmread(dicom_file("MR_small_jp2klossless.dcm"))
    dataset.Rows = dataset.Columns = 16000
    dataset.save_as(folder / "both.dcm")  # header only: the stream still states 64 x 64
    made.append(folder / "both.dcm")

    source = Path(dicom_file("image_dfl.dcm")).read_bytes()
    inner = zlib.decompressobj(-15)
    start = 132 + 12 + struct.unpack_from("<L", source, 140)[0]
    plain = inner.decompress(source[start:])
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = packer.compress(plain) + b"".join(packer.compress(zeros) for _ in range(70)) + packer.flush()
    add("deflated.dcm", source[:start] + packed)

    tifffile.imwrite(folder / "strip.tif", np.tile(RAMP, (20, 20)), compression="zlib")
    data = bytearray((folder / "strip.tif").read_bytes())
    with tifffile.TiffFile(folder / "strip.tif") as tif:
        page = tif.pages[0]
        count = page.tags["StripByteCounts"].valueoffset
        offset = page.tags["StripOffsets"].valueoffset
    packed = seventy
    struct.pack_into("<I", data, count, len(packed)), struct.pack_into("<I", data, offset, len(data))
    add("strip.tif", bytes(data) + packed)
    return made


def test_bombs_use_little_memory_and_time(tmp_path):
    """Every file is refused within 5 s and 30 MB. Measured maxima: 0.3 s (the deflated zeros) and 5 MB."""
    paths = bombs(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(scans.__file__).parents[3]), "PYTHONWARNINGS": "ignore"}
    warm = dicom_file("MR_small_RLE.dcm"), dicom_file("MR_small_jp2klossless.dcm"), dicom_file("SC_rgb_jpeg_gdcm.dcm")
    command = [sys.executable, "-c", BOMBS, *warm, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split("|") for line in done.stdout.splitlines()]
    assert len(lines) == len(warm) + len(paths) and all(line[0] == "READ" for line in lines[: len(warm)])
    print(done.stdout)
    for result, grown, seconds, path in lines[len(warm) :]:
        expected = ("constant",) if path.endswith(OPTIONAL) else ("limit", "damaged")
        assert result.split(":")[0] in expected, (result, path)
        assert int(grown) < 30 and float(seconds) < 5, (grown, seconds, path)
