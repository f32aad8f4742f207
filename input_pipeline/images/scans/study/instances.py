"""The header of one file of a study: what it is, which series it belongs to, and its instance if it is an image."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from pydicom import charset, uid

from input_pipeline.images.scans.access import Member
from input_pipeline.images.scans.base import ScanError, ScanLimits, printable
from input_pipeline.images.scans.dicom_file import SNIFFED, check_syntax, open_data_set, sniff, to_instance
from input_pipeline.images.scans.fields import NOT_SCANS, Fields
from input_pipeline.images.scans.instance import Instance

MAX_DESCRIPTION = 64  # characters, as the standard limits a SeriesDescription
LABELS = ("SpecificCharacterSet", "SOPInstanceUID", "SeriesNumber", "SeriesDescription")
# Words of the names of SOP classes without images (PS3.6), and what their files are.
NO_IMAGES = {
    "Radiation Dose SR": "a dose report",
    " SR Storage": "a structured report",
    "Report Storage": "a report",
    "Presentation State": "a presentation state",
    "Key Object": "a key object selection",
    "Segmentation": "a segmentation",
    "RT Structure Set": "a set of contours",
    "RT Dose": "a dose distribution",
    "RT ": "an object of radiotherapy",
    "Waveform": "a waveform",
    "ECG": "a waveform",
    "Encapsulated": "a document",
    "Raw Data": "raw data",
    "Spectroscopy": "a spectroscopy",
    "Registration": "a registration",
    "Fiducials": "a set of fiducials",
    "Real World Value": "a mapping of values",
    "Procedure Log": "a log",
}
RT_IMAGE = "1.2.840.10008.5.1.4.1.1.481.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
NOT_DICOM = "is not DICOM"
LOCALIZER = "localizer"
LOCALIZER_WORDS = re.compile(r"\b(locali[sz]ers?|scouts?|scanogram|topogram|surview|pilot)\b", re.IGNORECASE)
DOSE_WORDS = re.compile(r"\b(dose|patient protocol|exam protocol)\b", re.IGNORECASE)
DERIVED_WORDS = ("MPR", "MIP", "MINIP", "MNIP", "REFORMATTED", "PROJECTION IMAGE", "VOLREN", "VRT", "3D RENDERING")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """The header of one member.

    Either `instance` is an image, or `reason` says why the file is none or cannot be read.
    """

    member: Member
    reason: str = ""
    refused: bool = False  # whether `reason` is a fault of a file that may be a slice
    instance: Instance | None = None
    sop: str | None = None  # SOPInstanceUID and SeriesInstanceUID, never shown
    series: str | None = None
    sop_class: str = ""
    number: int | None = None
    description: str = ""
    image_type: tuple[str, ...] = ()


def read_entry(path, member: Member, limits: ScanLimits) -> Entry:
    """Return the entry of a member, without reading its pixels."""
    try:
        with member.open(limits, False) as file:
            if not sniff(file.read(SNIFFED)):
                return Entry(member=member, reason=NOT_DICOM)
            options = {"pixels": False, "more": LABELS, "any_syntax": True}
            dataset, syntax = open_data_set(path, file, limits, **options)
    except ScanError as error:
        return Entry(member=member, reason=error.reason, refused=error.reason != "is not a DICOM file")
    fields = Fields(path, dataset)
    entry = Entry(
        member=member,
        sop=fields.soft("text", "SOPInstanceUID"),
        series=fields.soft("text", "SeriesInstanceUID"),
        sop_class=fields.soft("text", "SOPClassUID") or "",
        number=series_number(fields),
        description=description(fields),
        image_type=tuple(part.strip() for part in (fields.soft("text", "ImageType") or "").upper().split("\\")),
    )
    if kind := no_image(fields, entry.sop_class):
        return dataclasses.replace(entry, reason=f"is {kind}")
    try:
        check_syntax(path, syntax)
        instance = to_instance(path, dataset, syntax, limits, mixed=True)
    except ScanError as error:
        return dataclasses.replace(entry, reason=error.reason, refused=True)
    return dataclasses.replace(entry, instance=instance)


def series_number(fields: Fields) -> int | None:
    numbers = fields.soft("numbers", "SeriesNumber", 1)
    return int(numbers[0]) if numbers else None


def description(fields: Fields) -> str:
    """Return the SeriesDescription, decoded by the character set that the file states."""
    element, stated = fields.raw("SeriesDescription"), fields.soft("text", "SpecificCharacterSet") or ""
    data = getattr(element, "value", None)
    if not isinstance(data, bytes):
        return ""
    # With several character sets, the last one is a Python codec that understands the escape sequences of all.
    codec = charset.python_encoding.get(stated.split("\\")[-1].strip(), "ascii")
    for candidate in (codec, "utf-8", "latin-1"):
        try:
            return printable(" ".join(data.decode(candidate).strip(" \0").split()))[:MAX_DESCRIPTION]
        except (UnicodeDecodeError, LookupError):
            continue
    return ""


def no_image(fields: Fields, sop_class: str) -> str:
    """Return what a file without an image is, or ""."""
    name = uid.UID(sop_class).name if sop_class in uid.UID_dictionary else ""
    if sop_class != RT_IMAGE and (kind := next((kind for words, kind in NO_IMAGES.items() if words in name), "")):
        return kind
    if (modality := fields.soft("code", "Modality")) in NOT_SCANS:
        return NOT_SCANS[modality]
    if fields.raw("DirectoryRecordSequence") is not None:
        return "a DICOMDIR, a list of files"
    absent = fields.raw("Rows") is None and fields.raw("Columns") is None
    # Without them, an image is truncated. `interpret` refuses it.
    return "an object without an image" if absent and name and "Image Storage" not in name else ""


def aside(entries: Sequence[Entry]) -> str:
    """Return why an image series is not the scan that a study is about, or "": from the header of its first image."""
    first = entries[0]
    text = f"{first.description} {' '.join(first.image_type)}"
    if "LOCALIZER" in first.image_type or LOCALIZER_WORDS.search(first.description):
        return LOCALIZER
    if first.sop_class.startswith(SECONDARY_CAPTURE):
        return "dose report" if DOSE_WORDS.search(text.replace("_", " ")) else "secondary capture"
    if "SCREEN SAVE" in first.image_type or "DOSE_INFO" in first.image_type:
        return "secondary capture"
    words = {word for part in first.image_type for word in (part, *part.replace("_", " ").split())}
    if first.image_type[0].startswith("DERIVED") and words & set(DERIVED_WORDS):
        return "derived reformat"
    return ""
