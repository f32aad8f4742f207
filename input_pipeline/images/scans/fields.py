"""The DICOM attributes that a scan needs, parsed from their raw bytes and checked.

pydicom's own conversion is avoided because its warnings quote values: after one flipped bit in a tag, a patient's name
could reach a log. No other attribute of the main data set is kept (`specific_tags`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import struct
import zlib

import numpy as np
import pydicom
from pydicom import uid
from pydicom.datadict import keyword_dict
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from input_pipeline.images.scans import orientation
from input_pipeline.images.scans.access import BoundedFile, as_scan_error
from input_pipeline.images.scans.base import COPY_AGAIN, ScanError, ScanLimits, limit_error
from input_pipeline.images.scans.checks import check_shape
from input_pipeline.images.scans.voi import VOI_KEYWORDS, stated_window

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
KEYWORDS = (
    *("SOPClassUID", "Modality", "SeriesInstanceUID", "FrameOfReferenceUID", "NumberOfFrames", "Rows", "Columns"),
    *("SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"),
    *("ImageOrientationPatient", "ImagePositionPatient", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence"),
    *("PixelPaddingValue", "PixelPaddingRangeLimit", "SharedFunctionalGroupsSequence"),
    *("PerFrameFunctionalGroupsSequence", "ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *VOI_KEYWORDS,
    *PALETTE,
)
tag_of = functools.cache(Tag)  # pydicom first tries to parse a keyword as a number, which dominates the parsing time
EXPORT = "export it again, or convert it with dcm2niix"
DAMAGED_HEADER = "the DICOM header is damaged: " + EXPORT


class Fields:
    """Attributes of a data set or sequence item, parsed from their bytes; None if absent or empty.

    A value of the wrong type raises a ScanError that names the attribute, never the value.
    """

    def __init__(self, path, dataset: pydicom.Dataset):
        self.path, self.dataset = path, dataset

    def raw(self, keyword: str) -> RawDataElement | pydicom.DataElement | None:
        with as_scan_error(self.path, f"reading {keyword}", hide_message=True):
            return self.dataset.get_item(tag_of(keyword))

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PixelFormat:
    """How the pixels of a DICOM file are stored."""

    rows: int
    columns: int
    samples: int  # values per pixel
    photometric: str
    planar: int  # PlanarConfiguration
    bits_allocated: int
    bits_stored: int
    signed: bool

    @property
    def channels(self) -> int:
        return 3 if self.photometric == "PALETTE COLOR" else self.samples

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits_allocated // 8}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instance(PixelFormat):
    """One DICOM file without its pixels, in patient coordinates: mm to the patient's Left, Posterior and Superior."""

    syntax: uid.UID
    modality: str | None
    series: str | None  # UID, as the next one; compared within a directory and never shown
    frame_of_reference: str | None
    frames: int
    spacing: tuple[float, float] | None  # (between rows, between columns) in mm
    orientation: tuple[float, ...] | None  # ImageOrientationPatient: directions of increasing column and row index
    positions: tuple[tuple[float, ...], ...] | None  # of the first voxel of each frame
    slopes: tuple[float, ...]  # one a frame
    intercepts: tuple[float, ...]  # one a frame
    lut: bool  # whether a modality lookup table replaces slopes and intercepts
    padding: tuple[int, int] | None  # stored (low, high)
    window: tuple[float, float] | None  # to display, after rescaling

    @property
    def rescaled(self) -> bool:
        return self.lut or set(self.slopes) != {1.0} or set(self.intercepts) != {0.0}

    @property
    def has_geometry(self) -> bool:
        return None not in (self.orientation, self.positions, self.spacing)


def transfer_syntax(path, file: BoundedFile) -> tuple[uid.UID, int]:
    """Return the transfer syntax of a DICOM file and the offset of its data set, from the meta information alone."""
    file.seek(0)
    if file.read(132)[128:] != b"DICM":
        remedy = "it may lack the 128-byte preamble: rewrite it with dcmconv, or leave it out"
        raise ScanError(path, "is not a DICOM file", remedy, "unsupported")
    syntax, start = None, None
    with as_scan_error(path, "reading the DICOM meta information", hide_message=True):
        elements = pydicom.filereader.data_element_generator(
            file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, vr, length: tag.group != 2
        )
        for element in elements:
            if element.tag == 0x00020000:
                start = element.value_tell + 4 + struct.unpack("<L", element.value)[0]
            if element.tag == 0x00020010 and element.value is not None:
                syntax = bytes(element.value).decode("ascii").strip(" \0")
    if syntax is None:
        raise ScanError(path, "states no transfer syntax", "rewrite it with dcmconv", "ambiguous")
    if syntax not in PLUGINS:
        name = uid.UID(syntax).name if syntax in uid.UID_dictionary else "an unknown one"
        reason = f"is encoded in an unsupported transfer syntax ({name})"
        raise ScanError(path, reason, "transcode it to Explicit VR Little Endian", "unsupported")
    if start is None and syntax == uid.DeflatedExplicitVRLittleEndian:
        raise ScanError(path, "does not state the length of its meta information", EXPORT)
    return uid.UID(syntax), start or 0


def check_deflated(path, file: BoundedFile, limits: ScanLimits) -> None:
    """Raise if a deflated data set exceeds the limit when unpacked (pydicom unpacks it in one piece)."""
    unpacker, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with as_scan_error(path, "unpacking the deflated data set"):
        while (chunk := file.read(1 << 16)) or unpacker.unconsumed_tail:
            size += len(unpacker.decompress(unpacker.unconsumed_tail + chunk, 1 << 20))
            if size > limits.max_bytes:
                raise limit_error(path, f"unpacks to more than the limit of {limits.max_bytes:,} bytes", "max_bytes")
            if unpacker.eof:
                break
    if not unpacker.eof:
        raise ScanError(path, "is truncated within its deflated data set", COPY_AGAIN)


def check_trailing(path, file: BoundedFile, dataset: pydicom.Dataset) -> None:
    """Raise unless native pixel data is the last element, or only elements of higher tags follow to the last byte.

    Inserted bytes (a text-mode transfer turns every newline into two bytes) shift the image and push its end out of the
    element, which other readers do not notice.
    """
    element = Fields(path, dataset).raw("PixelData")
    if not isinstance(element, RawDataElement) or element.length == 0xFFFFFFFF:
        return  # absent, empty or encapsulated pixel data is checked where the frames are read
    file.seek(element.value_tell + element.length)
    last, valid = element.tag, True
    with as_scan_error(path, "reading the data after the pixels", hide_message=True):
        trailing = pydicom.filereader.data_element_generator(file, element.is_implicit_VR, element.is_little_endian)
        for other in trailing:
            short = isinstance(other, RawDataElement) and other.length not in (0xFFFFFFFF, len(other.value or b""))
            valid = valid and other.tag > last and not short
            last = other.tag
    if not valid or file.tell() < file.size:
        reason = "has data after its pixels that is not DICOM"
        raise ScanError(path, reason, "bytes were inserted: copy it again, or rewrite it with dcmconv")


def load(path, file: BoundedFile, limits: ScanLimits, *, pixels: bool) -> tuple[Instance, pydicom.Dataset]:
    """Read a DICOM file. Returns its instance and a data set of KEYWORDS, plus the encoded pixels if requested."""
    syntax, start = transfer_syntax(path, file)
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        file.seek(start)
        check_deflated(path, file, limits)
    file.seek(0)
    with as_scan_error(path, "reading the DICOM header", hide_message=True):
        tags = [tag_of(keyword) for keyword in (*KEYWORDS, *(PIXELS if pixels else ()))]
        dataset = pydicom.dcmread(file, stop_before_pixels=not pixels, specific_tags=tags)
    if pixels and syntax != uid.DeflatedExplicitVRLittleEndian and not syntax.is_encapsulated:
        check_trailing(path, file, dataset)
    instance = interpret(path, Fields(path, dataset), syntax)
    size = (instance.rows, instance.columns, instance.frames, instance.channels)
    check_shape(path, size, instance.bits_allocated // 8, limits)
    return instance, dataset


def interpret(path, fields: Fields, syntax: uid.UID) -> Instance:
    """Check the attributes of a data set and return its instance."""
    modality = fields.code("Modality")
    if modality in NOT_SCANS:
        raise ScanError(path, f"is {NOT_SCANS[modality]} ({modality}), not a scan", "leave it out", "unsupported")
    if fields.raw("Rows") is None and fields.raw("Columns") is None:
        reason = "contains no image, or is truncated before it"
        raise ScanError(path, reason, "leave it out, or copy it again", "unsupported")
    pixel_format = read_pixel_format(path, fields)
    frames = FrameFields(path, fields)
    spacing, direction, positions = read_geometry(path, fields, frames)
    slopes, intercepts = read_rescale(path, frames)
    pad = fields.integer("PixelPaddingValue", signed=pixel_format.signed)
    limit = fields.integer("PixelPaddingRangeLimit", signed=pixel_format.signed)
    limit = pad if limit is None else limit
    return Instance(
        **vars(pixel_format),
        syntax=syntax,
        modality=modality,
        series=fields.text("SeriesInstanceUID"),
        frame_of_reference=fields.text("FrameOfReferenceUID"),
        frames=frames.count,
        spacing=spacing,
        orientation=direction,
        positions=positions,
        slopes=slopes,
        intercepts=intercepts,
        lut=bool(fields.items("ModalityLUTSequence")),
        padding=None if pad is None else (min(pad, limit), max(pad, limit)),
        window=stated_window(fields, frames),
    )


def read_pixel_format(path, fields: Fields) -> PixelFormat:
    high, signed = fields.integer("HighBit"), fields.required("PixelRepresentation")
    form = PixelFormat(
        rows=fields.required("Rows"),
        columns=fields.required("Columns"),
        samples=fields.integer("SamplesPerPixel") or 1,
        photometric=fields.code("PhotometricInterpretation"),
        planar=fields.integer("PlanarConfiguration") or 0,
        bits_allocated=fields.required("BitsAllocated"),
        bits_stored=fields.required("BitsStored"),
        signed=bool(signed),
    )
    samples = {**dict.fromkeys(GRAY, 1), **dict.fromkeys(COLOUR, 3), "PALETTE COLOR": 1}
    if samples.get(form.photometric) != form.samples:
        reason = f"has {form.samples} samples per pixel with the photometric interpretation {form.photometric}"
        raise ScanError(path, reason, "export it as gray, RGB, YBR or palette", "unsupported")
    allocated, stored = form.bits_allocated, form.bits_stored
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or signed > 1 or high not in (None, stored - 1):
        reason = f"has {stored} bits stored of {allocated} allocated, high bit {high}, pixel representation {signed}"
        raise ScanError(path, reason, "export it again with 8 or 16 bits", "unsupported")
    if form.planar > 1:
        raise fields.unreadable("PlanarConfiguration")
    return form


class FrameFields:
    """Attributes that a multi-frame file stores per frame, once for all frames, or in its main data set."""

    def __init__(self, path, fields: Fields):
        count = fields.numbers("NumberOfFrames", 1) or (1.0,)
        if count[0] < 1 or count[0] != int(count[0]):
            raise fields.unreadable("NumberOfFrames")
        self.count, self.fields = int(count[0]), fields
        self.shared = (fields.items("SharedFunctionalGroupsSequence") or [None])[0]
        self.per_frame = fields.items("PerFrameFunctionalGroupsSequence")
        if self.per_frame and len(self.per_frame) != self.count:
            raise ScanError(path, f"describes {len(self.per_frame)} frames but has {self.count}", DAMAGED_HEADER)

    def numbers(self, sequence: str, keyword: str, count: int) -> list[tuple[float, ...]] | None:
        """Return an attribute of every frame; None unless all frames have it."""
        own = [group.items(sequence) for group in self.per_frame]
        common = self.shared.items(sequence) if self.shared is not None else []
        values = []
        for i in range(self.count):
            items = (own[i] if own else []) or common
            values.append((items[0] if items else self.fields).numbers(keyword, count))
        return None if None in values else values


def read_geometry(path, fields: Fields, frames: FrameFields):
    """Return (spacing, orientation, positions) of an instance."""

    def positive(values) -> tuple[float, float] | None:
        return tuple(values) if values is not None and min(values) > 0 else None

    spacings = frames.numbers("PixelMeasuresSequence", "PixelSpacing", 2)
    orientations = frames.numbers("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    positions = frames.numbers("PlanePositionSequence", "ImagePositionPatient", 3)
    if positions is not None and frames.count > 1 and not frames.per_frame:
        positions = None  # one position for all frames of a cine loop does not locate the frames
    for name, values in (("spacings", spacings), ("orientations", orientations)):
        if values and np.ptp(np.array(values), axis=0).max() > orientation.TOLERANCE:
            raise ScanError(path, f"has frames of different {name}", "split it into series", "series")
    spacing = positive(spacings[0]) if spacings else None
    if frames.count == 1:
        spacing = spacing or positive(fields.numbers("ImagerPixelSpacing", 2))
        spacing = spacing or positive(fields.numbers("NominalScannedPixelSpacing", 2))
    return spacing, orientations[0] if orientations else None, tuple(positions) if positions else None


def read_rescale(path, frames: FrameFields) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the rescale slope and intercept of every frame."""
    slopes = frames.numbers("PixelValueTransformationSequence", "RescaleSlope", 1)
    intercepts = frames.numbers("PixelValueTransformationSequence", "RescaleIntercept", 1)
    if (slopes is None) != (intercepts is None):
        raise ScanError(path, "has only one of RescaleSlope and RescaleIntercept", "add the other", "ambiguous")
    slopes = tuple(s[0] for s in slopes) if slopes else (1.0,) * frames.count
    intercepts = tuple(b[0] for b in intercepts) if intercepts else (0.0,) * frames.count
    if 0.0 in slopes:
        raise ScanError(path, "has the RescaleSlope 0, which makes every voxel equal", EXPORT)
    return slopes, intercepts
