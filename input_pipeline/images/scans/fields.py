"""The DICOM attributes that a scan needs, parsed from their raw bytes and checked.

pydicom's own conversion is avoided because its warnings quote values: after one flipped bit in a tag, a patient's name
could reach a log. No other attribute of the main data set is kept (`specific_tags`).
"""

from __future__ import annotations

import functools
import math
import struct

import pydicom
from pydicom import uid
from pydicom.datadict import dictionary_VR, keyword_dict
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from input_pipeline.images.scans.access import as_scan_error
from input_pipeline.images.scans.base import ScanError
from input_pipeline.images.scans.mixtures import ATTRIBUTES, REAL_WORLD, Attribute, Value
from input_pipeline.images.scans.voi import VOI_KEYWORDS

# Transfer syntax -> the only plugin that may decode it. By default pydicom tries every plugin, and a lenient one would
# decode a stream that a strict one rejects as damaged.
PLUGINS = {
    uid.ImplicitVRLittleEndian: None,
    uid.ExplicitVRLittleEndian: None,
    uid.ExplicitVRBigEndian: None,
    uid.DeflatedExplicitVRLittleEndian: None,
    uid.RLELossless: "pydicom",
    uid.JPEGBaseline8Bit: "pillow",
    uid.JPEGExtended12Bit: "pillow",
    uid.JPEGLossless: "gdcm",
    uid.JPEGLosslessSV1: "gdcm",
    uid.JPEGLSLossless: "pyjpegls",
    uid.JPEGLSNearLossless: "pyjpegls",
    uid.JPEG2000Lossless: "pylibjpeg",
    uid.JPEG2000: "pylibjpeg",
    uid.HTJ2KLossless: "pylibjpeg",
    uid.HTJ2KLosslessRPCL: "pylibjpeg",
    uid.HTJ2K: "pylibjpeg",
}
COLOUR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT")
GRAY = ("MONOCHROME1", "MONOCHROME2")
NOT_SCANS = {
    "SEG": "a segmentation",
    "RTDOSE": "a dose distribution",
    "RTSTRUCT": "a set of contours",
    "RTPLAN": "a treatment plan",
    "SR": "a structured report",
    "PR": "a presentation state",
    "KO": "a key object selection",
    "DOC": "a document",
    "ECG": "a waveform",
}
PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
PALETTE = tuple(k for k in keyword_dict if "PaletteColorLookupTable" in k)
FRAME_VECTORS = (  # nuclear medicine: which energy window, detector, ... each frame belongs to
    *("EnergyWindowVector", "DetectorVector", "PhaseVector", "RotationVector", "RRIntervalVector", "TimeSlotVector"),
)
KEYWORDS = (
    *("NumberOfFrames", "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
    *("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"),
    *("ImageOrientationPatient", "ImagePositionPatient", "InstanceNumber", "TotalPixelMatrixColumns"),
    *("DirectoryRecordSequence", "BurnedInAnnotation"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "SharedFunctionalGroupsSequence"),
    *("PerFrameFunctionalGroupsSequence", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *(attribute.keyword for attribute in ATTRIBUTES if attribute.private is None),
    *REAL_WORLD,
    *FRAME_VECTORS,
    *VOI_KEYWORDS,
    *PALETTE,
)
MOSAIC_COUNT = Attribute("number of images in the mosaic", private=("SIEMENS MR HEADER", 0x0019100A))
GRID_COUNT = Attribute("number of images in the grid", private=("Image Private Header", 0x00651050))
PRIVATE = {a.private[1] for a in (*ATTRIBUTES, MOSAIC_COUNT, GRID_COUNT) if a.private}
BLOCKS = range(0x10, 0x20)  # a private creator takes the next free block of its group
PRIVATE_TAGS = sorted(  # with the names of their creators
    {tag & 0xFFFF0000 | block for tag in PRIVATE for block in BLOCKS}
    | {tag & 0xFFFF00FF | block << 8 for tag in PRIVATE for block in BLOCKS}
)
BINARY = {"FD": "d", "FL": "f", "US": "H", "SS": "h", "UL": "L", "SL": "l"}
tag_of = functools.cache(Tag)  # pydicom first tries to parse a keyword as a number, which dominates the parsing time
EXPORT = "export it again, or convert it with dcm2niix"
DAMAGED_HEADER = "the DICOM header is damaged: " + EXPORT


class Fields:
    """Attributes of a data set or sequence item, parsed from their bytes; None if absent or empty.

    A value of the wrong type raises a ScanError that names the attribute, never the value.
    """

    def __init__(self, path, dataset: pydicom.Dataset):
        self.path, self.dataset = path, dataset

    @functools.cached_property
    def creators(self) -> dict[tuple[int, str | None], int]:
        """(group, name) of each private creator -> its block; of several blocks the first."""
        tags = sorted((t for t in self.dataset.keys() if t.group % 2 and t.element in BLOCKS), reverse=True)  # noqa: SIM118
        return {(tag.group, self.soft("text", int(tag))): tag.element for tag in tags}

    def raw(self, keyword: str | int) -> RawDataElement | pydicom.DataElement | None:
        if (tag := tag_of(keyword)) not in self.dataset:
            return None
        with as_scan_error(self.path, f"reading {keyword}", hide_message=True):
            return self.dataset.get_item(tag)

    def unreadable(self, keyword: str) -> ScanError:
        return ScanError(self.path, f"has an unreadable {keyword}", DAMAGED_HEADER)

    def text(self, keyword: str) -> str | None:
        """Return text without its padding."""
        element = self.raw(keyword)
        if element is None or element.value is None:
            return None
        try:
            return bytes.decode(element.value, "ascii").strip(" \0") or None
        except (TypeError, UnicodeDecodeError):  # TypeError: not bytes
            raise self.unreadable(keyword) from None

    def code(self, keyword: str) -> str | None:
        """Return a code string (capitals, digits, underscore, space)."""
        text = self.text(keyword)
        if text is not None and not (len(text) <= 16 and all(c.isupper() or c.isdigit() or c in "_ " for c in text)):
            raise self.unreadable(keyword)
        return text

    def numbers(self, keyword: str, count: int | None = None) -> tuple[float, ...] | None:
        """Return decimal or integer strings, `count` of them."""
        text = self.text(keyword)
        if text is None:
            return None
        try:
            values = tuple(float(part) for part in text.split("\\"))
        except ValueError:
            raise self.unreadable(keyword) from None
        if not all(map(math.isfinite, values)) or (count is not None and len(values) != count):
            raise self.unreadable(keyword)
        return values

    def integer(self, keyword: str, *, signed: bool = False) -> int | None:
        """Return a 16-bit binary integer."""
        element = self.raw(keyword)
        if element is None or not element.value:
            return None
        if not isinstance(element, RawDataElement) or len(element.value) != 2:
            raise self.unreadable(keyword)
        return struct.unpack(("<" if element.is_little_endian else ">") + ("h" if signed else "H"), element.value)[0]

    def required(self, keyword: str) -> int:
        """Return a 16-bit binary integer that must be present."""
        value = self.integer(keyword)
        if value is None:
            remedy = "the file has no image, or its header is damaged: leave it out, or export it again"
            raise ScanError(self.path, f"has no {keyword}", remedy)
        return value

    def items(self, keyword: str) -> list[Fields]:
        """Return the items of a sequence, or an empty list if it is absent."""
        with as_scan_error(self.path, f"reading {keyword}", hide_message=True):
            if tag_of(keyword) not in self.dataset:
                return []
            sequence = self.dataset[tag_of(keyword)].value
            if not isinstance(sequence, pydicom.Sequence):
                raise self.unreadable(keyword)
            return [Fields(self.path, item) for item in sequence]

    def soft(self, method: str, keyword: str, *args, **options):
        """Return an optional attribute; None if it is unreadable."""
        try:
            return getattr(self, method)(keyword, *args, **options)
        except ScanError:
            return None

    def comparable(self, attribute: Attribute) -> Value:
        """Return an attribute for comparison with other slices; an unreadable value as its bytes."""
        tag: str | int = attribute.keyword
        if attribute.private is not None:
            creator, tag = attribute.private
            if (block := self.creators.get((tag >> 16, creator))) is None:
                return None
            tag = tag & 0xFFFF00FF | block << 8
        element = self.raw(tag)
        if element is None or not element.value:
            return None
        if attribute.rule == "presence":
            return True
        if not isinstance(element.value, bytes) or attribute.private is not None:
            return bytes(element.value) if isinstance(element.value, bytes) else str(element.value).encode()
        return parse(element, dictionary_VR(tag_of(tag)))


def parse(element: RawDataElement, vr: str) -> Value:
    """Return the numbers or the text of an element, or its bytes if they are unreadable."""
    data = element.value
    try:
        if vr in BINARY:
            count = len(data) // struct.calcsize(f"<{BINARY[vr]}")
            return struct.unpack(f"{'<' if element.is_little_endian else '>'}{count}{BINARY[vr]}", data)
        text = data.decode("ascii").strip(" \0")
        if vr in ("DS", "IS"):
            return tuple(float(part) for part in text.split("\\")) if text else None
        return "\\".join(part.strip() for part in text.split("\\")) or None
    except (ValueError, struct.error):
        return data
