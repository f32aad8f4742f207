"""DICOM attributes that must not be mixed within a volume, and the messages about mixtures.

Two echoes, magnitude and phase, or slices with and without a rescale can have one SeriesInstanceUID and consistent
positions. An attribute that some slices lack is a mixture too, because the absent value is unknown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from pydicom import uid

from input_pipeline.images.scans.base import ScanError
from input_pipeline.images.scans.orientation import TOLERANCE

Value = tuple[float, ...] | str | bytes | bool | None  # value of an attribute in one slice; None if it is absent
SHOWN_NAMES, SHOWN_GROUPS = 3, 3  # slices per value, and values, named in a message
CLOSE = 0.01  # relative tolerance of times and angles that scanners round


@dataclasses.dataclass(frozen=True)
class Attribute:
    """An attribute that decides which slices belong to one volume.

    Attributes:
      sequences: the sequences that contain it in functional groups or in the main data set, nested ones after a dot.
      rule: what the values must satisfy.
        "equal": all slices have the same value.
        "presence": all slices have the attribute, or none.
        "runs": slices with the same value are adjacent, as at table positions. Interleaved acquisitions are not.
        "times": one value for all slices, or a different one for (nearly) every slice, as in sequential acquisition.
      shown: whether messages may contain the values.
      private: (creator, tag in the first private block) of a private attribute.
    """

    keyword: str
    sequences: tuple[str, ...] = ()
    rule: Literal["equal", "presence", "runs", "times"] = "equal"
    relative: float = 0.0
    absolute: float = 0.0
    shown: bool = True
    private: tuple[str, int] | None = None


TRANSFORMATION = ("PixelValueTransformationSequence",)
REAL_WORLD = ("RealWorldValueMappingSequence",)
CONTENT = ("FrameContentSequence",)
CARDIAC = ("CardiacSynchronizationSequence",)
FRAME_TYPE = tuple(f"{kind}FrameTypeSequence" for kind in ("MRImage", "CTImage", "PET", "XRay3D"))
SPACING = Attribute("PixelSpacing", absolute=TOLERANCE)
ORIENTATION = Attribute("ImageOrientationPatient", absolute=TOLERANCE)
INVERTED_LUT = Attribute("modality lookup table of MONOCHROME1", shown=False)  # it states the range to invert within
REAL_WORLD_VALUES = (Attribute("RealWorldValueSlope", REAL_WORLD), Attribute("RealWorldValueIntercept", REAL_WORLD))
ATTRIBUTES = (
    # What the pixels are
    Attribute("StudyInstanceUID", shown=False),
    Attribute("SeriesInstanceUID", shown=False),
    Attribute("SOPClassUID"),
    Attribute("Modality"),
    Attribute("FrameOfReferenceUID", shown=False),
    Attribute("Rows"),
    Attribute("Columns"),
    Attribute("SamplesPerPixel"),
    Attribute("PhotometricInterpretation"),
    Attribute("ImageType"),
    Attribute("FrameType", FRAME_TYPE),
    Attribute("ComplexImageComponent", FRAME_TYPE),
    Attribute("AcquisitionContrast", FRAME_TYPE),
    Attribute("image type of GE", private=("GEMS_PARM_01", 0x0043102F)),
    # Their units
    Attribute("RescaleSlope", TRANSFORMATION, rule="presence"),
    Attribute("RescaleIntercept", TRANSFORMATION, rule="presence"),
    Attribute("ModalityLUTSequence", rule="presence"),
    Attribute("ModalityLUTType", ("ModalityLUTSequence",)),
    Attribute("RescaleType", TRANSFORMATION),
    Attribute("Units"),
    Attribute("SUVType"),
    *REAL_WORLD_VALUES,
    # How they were acquired
    Attribute("EchoTime", relative=CLOSE),
    Attribute("EffectiveEchoTime", ("MREchoSequence",), relative=CLOSE),
    Attribute("EchoNumbers"),
    Attribute("InversionTime", relative=CLOSE),
    Attribute("InversionTimes", ("MRModifierSequence",), relative=CLOSE),
    Attribute("FlipAngle", ("MRTimingAndRelatedParametersSequence",), relative=CLOSE),
    Attribute("ScanningSequence"),
    Attribute("SequenceName", shown=False),
    Attribute("DiffusionBValue", ("MRDiffusionSequence",)),
    Attribute("DiffusionGradientOrientation", ("MRDiffusionSequence.DiffusionGradientDirectionSequence",)),
    Attribute("b-value of Siemens", private=("SIEMENS MR HEADER", 0x0019100C)),
    Attribute("b-value of GE", private=("GEMS_PARM_01", 0x00431039)),
    Attribute("b-value of Philips", private=("Philips Imaging DD 001", 0x20011003)),
    Attribute("b-value of United Imaging", private=("Image Private Header", 0x00651009)),
    Attribute("KVP", ("CTXRayDetailsSequence",)),
    Attribute("ConvolutionKernel", ("CTReconstructionSequence",), shown=False),
    Attribute("ContrastBolusAgent", shown=False),
    Attribute("CorrectedImage", shown=False),
    # When they were acquired
    Attribute("TemporalPositionIdentifier"),
    Attribute("TemporalPositionIndex", CONTENT),
    Attribute("NominalPercentageOfCardiacPhase", CARDIAC),
    Attribute("TriggerTime", rule="times"),
    Attribute("NominalCardiacTriggerDelayTime", CARDIAC, rule="times"),
    Attribute("AcquisitionNumber", rule="runs"),
    Attribute("FrameAcquisitionNumber", CONTENT, rule="runs"),
    Attribute("StackID", CONTENT, shown=False),
    Attribute("SliceThickness", ("PixelMeasuresSequence",), rule="runs", relative=CLOSE),
)
Columns = Mapping[Attribute, Sequence[Value]]  # a value for each slice


def close(a: Value, b: Value, attribute: Attribute) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        limits = (attribute.absolute + attribute.relative * max(abs(x), abs(y)) for x, y in zip(a, b, strict=True))
        return all(abs(x - y) <= limit for x, y, limit in zip(a, b, limits, strict=True))
    return a == b


def group(values: Sequence[Value], attribute: Attribute) -> list[tuple[Value, list[int]]]:
    """Return (value, indices of its slices) for each distinct value, most frequent first."""
    groups: list[tuple[Value, list[int]]] = []
    for index, value in enumerate(values):
        members = next((m for v, m in groups if close(v, value, attribute)), None)
        if members is None:
            groups.append((value, [index]))
        else:
            members.append(index)
    return sorted(groups, key=lambda entry: -len(entry[1]))


def is_mixture(values: Sequence[Value], attribute: Attribute) -> bool:
    """Return whether values break the attribute's rule. Always False for "runs", which needs the slice order."""
    if attribute.rule == "runs":
        return False
    groups = group(values, attribute)
    partly = len(groups) > 1 and any(value is None for value, _ in groups)
    return partly or (len(groups) > 1 and (attribute.rule == "equal" or 2 * len(groups) <= len(values)))


def without_times(columns: Columns) -> Columns:
    """Return the attributes that all slices of one time of a dynamic series share."""
    return {attribute: values for attribute, values in columns.items() if attribute.rule != "times"}


def show(value: Value, attribute: Attribute, position: int) -> str:
    """Return a value as text. Identifiers and free text are replaced by "one value" and "another value"."""
    if value is None:
        return "absent"
    if value is True:
        return "present"
    if isinstance(value, bytes) and attribute.private is None and attribute.shown:
        return "unreadable"
    if attribute.keyword == "SOPClassUID" and value in uid.UID_dictionary:
        return uid.UID(value).name
    if attribute.shown and isinstance(value, tuple):
        return "\\".join(f"{number:.6g}" for number in value)
    if attribute.shown and isinstance(value, str) and attribute.keyword != "SOPClassUID":
        if all(
            len(part) <= 16 and all(c.isupper() or c.isdigit() or c in "_ " for c in part) for part in value.split("\\")
        ):
            return value
    return "another value" if position else "one value"


def describe(values: Sequence[Value], attribute: Attribute, names: Sequence[str], noun: str) -> str:
    """Return e.g. "EchoTime is 4.92 in 34 slices and 7.38 in 30 slices (a.dcm, b.dcm, c.dcm, ...)"."""
    groups, parts = group(values, attribute), []
    for position, (value, members) in enumerate(groups[:SHOWN_GROUPS]):
        text = f"{show(value, attribute, position)} in {len(members)} {noun}{'s' * (len(members) != 1)}"
        if position:
            more = ", ..." if len(members) > SHOWN_NAMES else ""
            text += f" ({', '.join(names[i] for i in members[:SHOWN_NAMES])}{more})"
        parts.append(text)
    others = len(groups) - SHOWN_GROUPS
    more = f", and has {others} more value{'s' * (others > 1)}" if others > 0 else ""
    return f"{attribute.keyword} is {' and '.join(parts)}{more}"


def check_one_kind(path, columns: Columns, names: Sequence[str], noun: str) -> None:
    """Raise ScanError unless all slices have the attributes of one volume.

    Args:
      names: of the slices.
      noun: "slice" or "frame".
    """
    mixed = {a: values for a, values in columns.items() if is_mixture(values, a)}
    if not mixed:
        return
    absent = any(value is None for values in mixed.values() for value in values)
    reason = f"mixes {noun}s that are not one volume: "
    reason += "; ".join(describe(values, attribute, names, noun) for attribute, values in mixed.items())
    remedy = "give each kind its own directory" if noun == "slice" else "split the file into one file per kind"
    remedy += ", or restore the attribute where it is absent" if absent else ""
    raise ScanError(path, reason, remedy, "series")


def interleaved(values: Sequence[Value], attribute: Attribute, order: Sequence[int]) -> bool:
    """Return whether different values alternate along the slice axis."""
    kind = {i: number for number, (_, members) in enumerate(group(values, attribute)) for i in members}
    starts = [kind[i] for k, i in enumerate(order) if k == 0 or kind[i] != kind[order[k - 1]]]
    return len(starts) > len(set(starts))


def check_runs(path, columns: Columns, order: Sequence[int], names: Sequence[str], noun: str) -> None:
    """Raise ScanError if slices of different acquisitions or thickness alternate along the slice axis."""
    for attribute, values in columns.items():
        if attribute.rule == "runs" and interleaved(values, attribute, order):
            reason = f"interleaves {noun}s of several acquisitions: {describe(values, attribute, names, noun)}"
            raise ScanError(path, reason, "give each kind its own directory or file", "series")
