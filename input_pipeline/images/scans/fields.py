"""The few DICOM attributes that a scan needs, taken raw from the file and checked.

Raw, because pydicom's own conversion warns with the value in the message: one flipped bit in a tag and a patient's
name would stand in a log. No other attribute of the main data set is kept (`specific_tags`).
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

from input_pipeline.images.scans import codestream
from input_pipeline.images.scans.base import BoundedFile, ScanError, ScanLimits, blamed, check_shape

# Transfer syntax -> the one plugin that decodes it. One, not pydicom's "any that succeeds": a lenient second decoder
# would make a picture of a stream that the first found damaged.
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
    *PALETTE,
)
tag_of = functools.cache(Tag)  # pydicom tries every keyword as a number first, which takes it longer than all else
EXPORT = "export it again, or convert it with dcm2niix"


class Fields:
    """Attributes of a data set or sequence item, parsed from their bytes.

    Raises:
      ScanError: a value that is not of its kind. The message names the attribute, never the value.
    """

    def __init__(self, path, dataset: pydicom.Dataset):
        self.path, self.dataset = path, dataset

    def raw(self, keyword: str) -> RawDataElement | pydicom.DataElement | None:
        with blamed(self.path, f"reading {keyword}", quiet=True):
            return self.dataset.get_item(tag_of(keyword))

    def wrong(self, keyword: str) -> ScanError:
        return ScanError(self.path, f"has an unreadable {keyword}", "its header is damaged: " + EXPORT)

    def text(self, keyword: str) -> str | None:
        """Text without its padding; None if absent or empty."""
        element = self.raw(keyword)
        if element is None or element.value is None:
            return None
        value = element.value
        if not isinstance(value, bytes):
            raise self.wrong(keyword)
        try:
            return value.decode("ascii").strip(" \0") or None
        except UnicodeDecodeError:
            raise self.wrong(keyword) from None

    def code(self, keyword: str) -> str | None:
        """A code string (capitals, digits, underscore, space)."""
        text = self.text(keyword)
        if text is not None and not (len(text) <= 16 and all(c.isupper() or c.isdigit() or c in "_ " for c in text)):
            raise self.wrong(keyword)
        return text

    def numbers(self, keyword: str, count: int | None = None) -> tuple[float, ...] | None:
        """Decimal or integer text, `count` of them; None if absent or empty."""
        text = self.text(keyword)
        if text is None:
            return None
        try:
            values = tuple(float(part) for part in text.split("\\"))
        except ValueError:
            raise self.wrong(keyword) from None
        if not all(map(math.isfinite, values)) or (count is not None and len(values) != count):
            raise self.wrong(keyword)
        return values

    def integer(self, keyword: str, *, signed: bool = False) -> int | None:
        """A 16-bit binary integer; None if absent or empty."""
        element = self.raw(keyword)
        if element is None or not element.value:
            return None
        if not isinstance(element, RawDataElement) or len(element.value) != 2:
            raise self.wrong(keyword)
        return struct.unpack(("<" if element.is_little_endian else ">") + ("h" if signed else "H"), element.value)[0]

    def items(self, keyword: str) -> list[Fields]:
        """The items of a sequence; none if absent."""
        with blamed(self.path, f"reading {keyword}", quiet=True):
            if tag_of(keyword) not in self.dataset:
                return []
            sequence = self.dataset[tag_of(keyword)].value
            if not isinstance(sequence, pydicom.Sequence):
                raise self.wrong(keyword)
            return [Fields(self.path, item) for item in sequence]


@dataclasses.dataclass(frozen=True)
class Instance:
    """One DICOM file, without its pixels.

    Attributes:
      series, frame_of_reference: compared within a directory, never shown.
      spacing: (between rows, between columns) in mm, or None.
      orientation: six numbers: where columns and where rows run to (ImageOrientationPatient), or None.
      positions: of each frame's first voxel in mm, patient coordinates (x to the Left, y to Posterior, z to Superior),
        or None.
      slopes, intercepts: one a frame.
      lut: whether a modality lookup table replaces them.
      padding: stored (low, high), or None.
    """

    syntax: str
    modality: str | None
    series: str | None
    frame_of_reference: str | None
    frames: int
    rows: int
    columns: int
    samples: int
    photometric: str
    planar: int
    bits_allocated: int
    bits_stored: int
    signed: bool
    spacing: tuple[float, float] | None
    orientation: tuple[float, ...] | None
    positions: tuple[tuple[float, ...], ...] | None
    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]
    lut: bool
    padding: tuple[int, int] | None

    @property
    def channels(self) -> int:
        return 3 if self.photometric == "PALETTE COLOR" else self.samples

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(f"{'i' if self.signed else 'u'}{self.bits_allocated // 8}")

    @property
    def rescaled(self) -> bool:
        return self.lut or set(self.slopes) != {1.0} or set(self.intercepts) != {0.0}

    @property
    def geometry(self) -> bool:
        return None not in (self.orientation, self.positions, self.spacing)


def transfer_syntax(path, file: BoundedFile) -> tuple[str, int]:
    """(the transfer syntax of a DICOM file, where its data set starts), from its meta information alone."""
    file.seek(0)
    if file.read(132)[128:] != b"DICM":
        remedy = "it may lack the 128-byte preamble: rewrite it with dcmconv, or leave it out"
        raise ScanError(path, "is no DICOM file", remedy, "unsupported")
    found, start = None, None
    with blamed(path, "reading the DICOM meta information", quiet=True):
        elements = pydicom.filereader.data_element_generator(
            file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, vr, length: tag.group != 2
        )
        for element in elements:
            if element.tag == 0x00020000:
                start = element.value_tell + 4 + struct.unpack("<L", element.value)[0]
            if element.tag == 0x00020010 and element.value is not None:
                found = bytes(element.value).decode("ascii").strip(" \0")
    if found is None:
        raise ScanError(path, "states no transfer syntax", "rewrite it with dcmconv", "ambiguous")
    if found not in PLUGINS:
        known = uid.UID(found).name if found in uid.UID_dictionary else "an unknown one"
        what = f"is encoded in a transfer syntax that is not read ({known})"
        raise ScanError(path, what, "transcode it to Explicit VR Little Endian", "unsupported")
    if start is None and found == uid.DeflatedExplicitVRLittleEndian:
        raise ScanError(path, "states no length of its meta information", EXPORT)
    return found, start or 0


def check_deflated(path, file: BoundedFile, limits: ScanLimits) -> None:
    """Raise if a deflated data set unpacks to more than the limit (pydicom unpacks it in one piece)."""
    unpacker, size = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with blamed(path, "unpacking the deflated data set"):
        while (chunk := file.read(1 << 16)) or unpacker.unconsumed_tail:
            size += len(unpacker.decompress(unpacker.unconsumed_tail + chunk, 1 << 20))
            if size > limits.max_bytes:
                what = f"unpacks to more than the limit of {limits.max_bytes:,} bytes"
                raise ScanError(path, what, "raise ScanLimits.max_bytes if this is right", "limit")
            if unpacker.eof:
                break
    if not unpacker.eof:
        raise ScanError(path, "is cut short within its deflated data set", "copy it again from its source")


def check_rest(path, file: BoundedFile, dataset: pydicom.Dataset) -> None:
    """Raise unless native pixel data is followed by nothing, or by elements of higher tags to the file's last byte.

    Bytes that came in between (a transfer in text mode turns every newline into two bytes) shift the picture and push
    its end out of the element; no reader looks there.
    """
    element = Fields(path, dataset).raw("PixelData")
    if not isinstance(element, RawDataElement) or element.length == 0xFFFFFFFF:
        return  # absent, empty or encapsulated: told apart where the frames are taken
    file.seek(element.value_tell + element.length)
    last, whole = element.tag, True
    with blamed(path, "reading what follows the pixels", quiet=True):
        rest = pydicom.filereader.data_element_generator(file, element.is_implicit_VR, element.is_little_endian)
        for other in rest:
            short = isinstance(other, RawDataElement) and other.length not in (0xFFFFFFFF, len(other.value or b""))
            whole = whole and other.tag > last and not short
            last = other.tag
    if not whole or file.tell() < file.size:
        what = "goes on after its pixels with something that is no DICOM"
        raise ScanError(path, what, "bytes were inserted: copy it again, or rewrite it with dcmconv")


def load(path, file: BoundedFile, limits: ScanLimits, *, pixels: bool) -> tuple[Instance, pydicom.Dataset]:
    """A DICOM file's instance and the data set of KEYWORDS (and the pixels, still encoded).

    Raises:
      ScanError: no DICOM, no picture, an attribute that is missing, unreadable, contradictory or beyond the limits.
    """
    syntax, start = transfer_syntax(path, file)
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        file.seek(start)
        check_deflated(path, file, limits)
    file.seek(0)
    with blamed(path, "reading the DICOM header", quiet=True):
        tags = [tag_of(keyword) for keyword in (*KEYWORDS, *(PIXELS if pixels else ()))]
        dataset = pydicom.dcmread(file, stop_before_pixels=not pixels, specific_tags=tags)
    if pixels and syntax != uid.DeflatedExplicitVRLittleEndian and not uid.UID(syntax).is_encapsulated:
        check_rest(path, file, dataset)
    fields = Fields(path, dataset)
    instance = interpret(path, fields, syntax)
    size = (instance.rows, instance.columns, instance.frames, instance.channels)
    check_shape(path, size, instance.bits_allocated // 8, limits)
    return instance, dataset


def required(path, fields: Fields, keyword: str) -> int:
    value = fields.integer(keyword)
    if value is None:
        raise ScanError(path, f"has no {keyword}", "it holds no picture, or its header is damaged: leave it out")
    return value


def interpret(path, fields: Fields, syntax: str) -> Instance:
    modality = fields.code("Modality")
    if modality in NOT_SCANS:
        raise ScanError(path, f"is {NOT_SCANS[modality]} ({modality}), not a scan", "leave it out", "unsupported")
    if fields.raw("Rows") is None and fields.raw("Columns") is None:
        raise ScanError(
            path, "holds no picture, or is cut short before it", "leave it out or copy it again", "unsupported"
        )
    rows, columns = required(path, fields, "Rows"), required(path, fields, "Columns")
    samples = fields.integer("SamplesPerPixel") or 1
    photometric = fields.code("PhotometricInterpretation")
    allocated, stored = required(path, fields, "BitsAllocated"), required(path, fields, "BitsStored")
    high, signed = fields.integer("HighBit"), required(path, fields, "PixelRepresentation")
    good = photometric in GRAY and samples == 1 or photometric in COLOUR and samples == 3
    if not (good or photometric == "PALETTE COLOR" and samples == 1):
        what = f"has pixels of {samples} samples as {photometric}"
        raise ScanError(path, what, "gray, RGB, YBR and palette pictures are read", "unsupported")
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or signed > 1 or high not in (None, stored - 1):
        what = f"has pixels of {stored} bits in {allocated}, the highest at {high}, signed {signed}"
        raise ScanError(path, what, "export it again with 8 or 16 bits", "unsupported")
    planar = fields.integer("PlanarConfiguration") or 0
    if planar > 1:
        raise fields.wrong("PlanarConfiguration")

    count = fields.numbers("NumberOfFrames", 1) or (1.0,)
    if count[0] < 1 or count[0] != int(count[0]):
        raise fields.wrong("NumberOfFrames")
    frames = int(count[0])
    shared = (fields.items("SharedFunctionalGroupsSequence") or [None])[0]
    per_frame = fields.items("PerFrameFunctionalGroupsSequence")
    if per_frame and len(per_frame) != frames:
        what = f"describes {len(per_frame)} frames but has {frames}"
        raise ScanError(path, what, "its header is damaged: " + EXPORT)

    def each(sequence: str, keyword: str, count: int) -> list | None:
        """The attribute of every frame: its own, or what all share, or the data set's; None unless all have it."""
        own = [group.items(sequence) for group in per_frame]
        common = shared.items(sequence) if shared is not None else []
        found = []
        for i in range(frames):
            places = (own[i] if own else []) or common
            found.append(places[0].numbers(keyword, count) if places else fields.numbers(keyword, count))
        return None if None in found else found

    def positive(values) -> tuple[float, float] | None:
        return tuple(values) if values is not None and min(values) > 0 else None

    spacings = each("PixelMeasuresSequence", "PixelSpacing", 2)
    orientations = each("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    positions = each("PlanePositionSequence", "ImagePositionPatient", 3)
    if positions is not None and frames > 1 and not per_frame:
        positions = None  # one position for a whole cine or film: it says nothing of the frames
    for name, values, within in (("spacings", spacings, 1e-3), ("orientations", orientations, 1e-3)):
        if values and np.ptp(np.array(values), axis=0).max() > within:
            raise ScanError(path, f"has frames of different {name}", "split it into series", "series")
    spacing = positive(spacings[0]) if spacings else None
    if spacing is None and frames == 1:
        spacing = positive(fields.numbers("ImagerPixelSpacing", 2))
        spacing = spacing or positive(fields.numbers("NominalScannedPixelSpacing", 2))
    slopes = each("PixelValueTransformationSequence", "RescaleSlope", 1)
    intercepts = each("PixelValueTransformationSequence", "RescaleIntercept", 1)
    if (slopes is None) != (intercepts is None):
        raise ScanError(path, "has only one of rescale slope and intercept", "add the other", "ambiguous")
    slopes = tuple(s[0] for s in slopes) if slopes else (1.0,) * frames
    intercepts = tuple(b[0] for b in intercepts) if intercepts else (0.0,) * frames
    if 0.0 in slopes:
        raise ScanError(path, "has the rescale slope 0", "every voxel would be the same: " + EXPORT)
    pad = fields.integer("PixelPaddingValue", signed=bool(signed))
    limit = fields.integer("PixelPaddingRangeLimit", signed=bool(signed))
    limit = pad if limit is None else limit
    return Instance(
        syntax=syntax,
        modality=modality,
        series=fields.text("SeriesInstanceUID"),
        frame_of_reference=fields.text("FrameOfReferenceUID"),
        frames=frames,
        rows=rows,
        columns=columns,
        samples=samples,
        photometric=photometric,
        planar=planar,
        bits_allocated=allocated,
        bits_stored=stored,
        signed=bool(signed),
        spacing=spacing,
        orientation=orientations[0] if orientations else None,
        positions=tuple(positions) if positions else None,
        slopes=slopes,
        intercepts=intercepts,
        lut=bool(fields.items("ModalityLUTSequence")),
        padding=None if pad is None else (min(pad, limit), max(pad, limit)),
    )


def check_frame(path, data: bytes, instance: Instance) -> int:
    """Compare what an encoded frame says of itself with the header; returns its bits a sample.

    Raises:
      ScanError: another size, or a frame that does not parse.
    """
    syntax = instance.syntax
    try:
        if syntax == uid.RLELossless:
            planes = instance.samples * instance.bits_allocated // 8
            codestream.check_rle(data, planes, instance.rows * instance.columns)
            return instance.bits_stored
        jpeg2000 = syntax in (uid.JPEG2000, uid.JPEG2000Lossless)
        size = codestream.jpeg2000(data) if jpeg2000 else codestream.jpeg(data)
    except ValueError as error:
        raise ScanError(path, str(error), "it is damaged: copy or export it again") from None
    if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit) and size.bits != 8:
        what = f"holds JPEG of {size.bits} bits, for which no decoder is at hand"
        raise ScanError(path, what, "transcode it to Explicit VR Little Endian", "unsupported")
    found, stated = (size.rows, size.columns, size.channels), (instance.rows, instance.columns, instance.samples)
    if found != stated or size.bits > instance.bits_allocated:
        what = f"holds a picture of {found} (rows, columns, samples) and {size.bits} bits, its header says {stated}"
        raise ScanError(path, what + f" and {instance.bits_allocated}", "it is damaged: copy or export it again")
    return size.bits
