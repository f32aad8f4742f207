"""DICOM files: preamble, meta information, transfer syntax and data set.

Old and research files lack the 128-byte preamble or the meta information. Their encoding is that of the first element
of the data set, as PS3.10 readers of such files assume.
"""

from __future__ import annotations

import functools
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import pydicom
from pydicom import uid
from pydicom.datadict import dictionary_has_tag
from pydicom.dataelem import RawDataElement
from pydicom.tag import BaseTag

from input_pipeline.images.scans.access import BoundedFile, as_scan_error
from input_pipeline.images.scans.base import COPY_AGAIN, ScanError, ScanLimits, limit_error
from input_pipeline.images.scans.checks import check_shape
from input_pipeline.images.scans.fields import EXPORT, KEYWORDS, PIXELS, PLUGINS, PRIVATE_TAGS, Fields, tag_of
from input_pipeline.images.scans.instance import Instance, interpret

SNIFFED = 132  # bytes that `sniff` needs
MAX_FIRST_LENGTH = 1024  # maximum bytes of the first element of a data set without a preamble


def sniff(start: bytes) -> bool:
    """Return whether a file is DICOM, from its first SNIFFED bytes."""
    return start[128:132] == b"DICM" or start[:4] == b"DICM" or encoding_of(start) is not None


def encoding_of(start: bytes) -> uid.UID | None:
    """Return the uncompressed transfer syntax of a data set that starts with group 2 or 8; None if it does not."""
    for order, explicit in (("<", uid.ExplicitVRLittleEndian), (">", uid.ExplicitVRBigEndian)):
        if len(start) < 12:
            return None
        group, element, vr, short = struct.unpack_from(f"{order}HH2sH", start)
        if group not in (2, 8) or not (element == 0 or dictionary_has_tag(group << 16 | element)):
            continue
        if vr in (b"UI", b"UL", b"CS", b"SH", b"LO", b"DA", b"TM", b"DT") and short <= MAX_FIRST_LENGTH:
            return explicit
        if vr == b"OB" and struct.unpack_from(f"{order}L", start, 8)[0] <= MAX_FIRST_LENGTH:
            return explicit
        if order == "<" and struct.unpack_from("<L", start, 4)[0] <= MAX_FIRST_LENGTH:
            return uid.ImplicitVRLittleEndian
    return None


class Layout(NamedTuple):
    """Where the data set of a file starts, and how it is encoded."""

    start: int
    syntax: uid.UID
    stated: bool  # whether the file states the syntax and has a preamble, so that pydicom finds the data set itself


def file_layout(path, file: BoundedFile, *, any_syntax: bool = False) -> Layout:
    """Return the layout of a DICOM file: from its meta information, or if that is absent, from the first element.

    any_syntax: accept transfer syntaxes whose pixels cannot be decoded.
    """
    file.seek(0)
    start = file.read(SNIFFED)
    preamble = start[128:132] == b"DICM"
    begin = 132 if preamble else 4 if start[:4] == b"DICM" else 0
    if not preamble and not sniff(start):
        raise ScanError(path, "is not a DICOM file", "leave it out", "unsupported")
    file.seek(begin)
    syntax, end = None, None
    with as_scan_error(path, "reading the DICOM meta information", hide_message=True):
        if file.read(2) == b"\x02\0":
            file.seek(begin)
            elements = pydicom.filereader.data_element_generator(
                file, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, vr, length: tag.group != 2
            )
            for element in elements:
                if element.tag == 0x00020000:
                    end = element.value_tell + 4 + struct.unpack("<L", element.value)[0]
                if element.tag == 0x00020010 and element.value is not None:
                    syntax = bytes(element.value).decode("ascii").strip(" \0")
            begin = file.tell() if end is None else end
    if syntax is None:
        return Layout(begin, unstated_syntax(path, file, begin), False)
    if not any_syntax:
        check_syntax(path, syntax)
    if end is None and syntax == uid.DeflatedExplicitVRLittleEndian:
        raise ScanError(path, "does not state the length of its meta information", EXPORT)
    return Layout(begin, uid.UID(syntax), preamble)


def check_syntax(path, syntax: str) -> None:
    """Raise unless the pixels of a transfer syntax can be decoded."""
    if syntax not in PLUGINS:
        name = uid.UID(syntax).name if syntax in uid.UID_dictionary else "an unknown one"
        reason = f"is encoded in an unsupported transfer syntax ({name})"
        raise ScanError(path, reason, "transcode it to Explicit VR Little Endian", "unsupported")


def unstated_syntax(path, file: BoundedFile, begin: int) -> uid.UID:
    """Return the transfer syntax that the first element shows, for a file that does not state it."""
    file.seek(begin)
    syntax = encoding_of(file.read(SNIFFED))
    if syntax is None:
        raise ScanError(path, "states no transfer syntax", "rewrite it with dcmconv", "ambiguous")
    return syntax


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
    """Raise if the bytes after native pixel data are not elements of higher tags.

    Inserted bytes (a text-mode transfer turns every newline into two bytes) shift the image, and its last pixels fall
    outside the element. Other readers do not notice this.
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
    if (not valid or file.tell() < file.size) and not is_filled(file, element.value_tell + element.length):
        reason = "has data after its pixels that is not DICOM"
        raise ScanError(path, reason, "bytes were inserted: copy it again, or rewrite it with dcmconv")


def is_filled(file: BoundedFile, end: int) -> bool:
    """Return whether the bytes after the pixels are zeros that are not pixels shifted by a text-mode transfer."""
    file.seek(0)
    data = file.read()
    return not data[end:].strip(b"\0") and data.count(b"\n") > data.count(b"\r\n")


@functools.cache
def tags_of(more: tuple[str, ...]) -> tuple[BaseTag, ...]:
    """Return the tags of the attributes that a scan needs, and `more`."""
    return tuple(tag_of(keyword) for keyword in (*KEYWORDS, *PRIVATE_TAGS, *more))


def read_data_set(
    path, file: BoundedFile, layout: Layout, *, pixels: bool, more: Sequence[str] = ()
) -> pydicom.Dataset:
    """Return the data set with the attributes that a scan needs and `more`, and the encoded pixels if requested."""
    tags = list(tags_of((*more, *(PIXELS if pixels else ()))))
    with as_scan_error(path, "reading the DICOM header", hide_message=True):
        if layout.stated:
            file.seek(0)
            return pydicom.dcmread(file, stop_before_pixels=not pixels, specific_tags=tags)
        file.seek(layout.start)
        implicit, little = layout.syntax.is_implicit_VR, layout.syntax.is_little_endian
        stop = None if pixels else lambda tag, vr, length: tag.group >= 0x7FE0
        dataset = pydicom.filereader.read_dataset(file, implicit, little, stop_when=stop, specific_tags=tags)
        dataset.set_original_encoding(implicit, little)
        return dataset


def open_data_set(
    path, file: BoundedFile, limits: ScanLimits, *, pixels: bool, more: Sequence[str] = (), any_syntax: bool = False
) -> tuple[pydicom.Dataset, uid.UID]:
    """Return the data set of a DICOM file as `read_data_set` does, and its transfer syntax."""
    layout = file_layout(path, file, any_syntax=any_syntax)
    deflated = layout.syntax == uid.DeflatedExplicitVRLittleEndian
    if deflated:
        if not layout.stated:
            raise ScanError(path, "is deflated and has no preamble", "rewrite it with dcmconv", "unsupported")
        file.seek(layout.start)
        check_deflated(path, file, limits)
    dataset = read_data_set(path, file, layout, pixels=pixels, more=more)
    if pixels and not deflated and not layout.syntax.is_encapsulated:
        check_trailing(path, file, dataset)
    return dataset, layout.syntax


def load(
    path, file: BoundedFile, limits: ScanLimits, *, pixels: bool, mixed: bool = False
) -> tuple[Instance, pydicom.Dataset]:
    """Read a DICOM file. Returns its instance and a data set of KEYWORDS, plus the encoded pixels if requested.

    mixed: its frames may belong to several volumes (`interpret`).
    """
    dataset, syntax = open_data_set(path, file, limits, pixels=pixels)
    return to_instance(path, dataset, syntax, limits, mixed=mixed), dataset


def to_instance(path, dataset: pydicom.Dataset, syntax: uid.UID, limits: ScanLimits, *, mixed: bool) -> Instance:
    """Return the checked instance of a data set of KEYWORDS."""
    instance = interpret(path, Fields(path, dataset), syntax, mixed=mixed)
    size = (instance.rows, instance.columns, instance.frames, instance.channels)
    check_shape(path, size, instance.bits_allocated // 8, limits)
    return instance
