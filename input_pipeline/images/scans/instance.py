"""One DICOM file without its pixels: the checked attributes that a scan needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from pydicom import uid

from input_pipeline.images.scans.base import ScanError
from input_pipeline.images.scans.fields import (
    COLOUR,
    DAMAGED_HEADER,
    EXPORT,
    FRAME_VECTORS,
    GRAY,
    GRID_COUNT,
    MOSAIC_COUNT,
    NOT_SCANS,
    Fields,
    tag_of,
)
from input_pipeline.images.scans.mixtures import (
    ATTRIBUTES,
    INVERTED_LUT,
    ORIENTATION,
    REAL_WORLD_VALUES,
    SPACING,
    Attribute,
    Columns,
    Value,
    check_one_kind,
)
from input_pipeline.images.scans.voi import stated_window

UNASSIGNED = (  # where converted multi-frame files keep attributes that have no functional group
    "UnassignedPerFrameConvertedAttributesSequence",
    "UnassignedSharedConvertedAttributesSequence",
)
TILED = "convert it with a pathology tool, or leave it out"


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

    @property
    def stored_range(self) -> tuple[int, int]:
        """The smallest and the largest value of BitsStored."""
        low = -(1 << self.bits_stored - 1) if self.signed else 0
        return low, low + (1 << self.bits_stored) - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instance(PixelFormat):
    """One DICOM file without its pixels, in patient coordinates: mm to the patient's Left, Posterior and Superior."""

    syntax: uid.UID
    modality: str | None
    frames: int
    number: int | None  # InstanceNumber
    spacing: tuple[float, float] | None  # (between rows, between columns) in mm
    orientation: tuple[float, ...] | None  # ImageOrientationPatient: directions of increasing column and row index
    positions: tuple[tuple[float, ...], ...] | None  # position of the first voxel of each frame
    slopes: tuple[float, ...]  # one a frame
    intercepts: tuple[float, ...]  # one a frame
    lut: bool  # whether a modality lookup table replaces slopes and intercepts
    padding: tuple[int, int] | None  # (low, high) as stored, in BitsAllocated
    window: tuple[float, float] | None  # (low, high) to display, after rescaling
    burned_in: bool  # whether the file states that names or dates may be drawn into the pixels
    kinds: Columns  # one value a frame of every attribute of `mixtures`

    @property
    def rescaled(self) -> bool:
        return self.lut or set(self.slopes) != {1.0} or set(self.intercepts) != {0.0}

    @property
    def padding_beyond(self) -> bool:
        """Whether padding has bits above BitsStored, which distinguish it from voxels with the same lower bits."""
        low, high = self.stored_range
        return self.padding is not None and (self.padding[0] < low or self.padding[1] > high)

    @property
    def frame_dtype(self) -> np.dtype:
        """The dtype of decoded frames before a lookup table: signed if only a sign can distinguish the padding."""
        return np.dtype(f"i{self.bits_allocated // 8}") if self.padding_beyond else self.dtype

    @property
    def frame_padding(self) -> tuple[int, int] | None:
        """(low, high) of padding in decoded frames. Padding beyond BitsStored is one value, of the signed dtype."""
        if self.padding is None or not self.padding_beyond:
            return self.padding
        first, top = self.padding[0], self.stored_range[1]
        if first >= 1 << self.bits_allocated - 1:
            first -= 1 << self.bits_allocated
        return first, first if self.padding[0] > top else min(self.padding[1], top)

    @property
    def absent_geometry(self) -> list[str]:
        """The absent attributes that sorting the slices needs."""
        stated = {
            "ImagePositionPatient": self.positions,
            "ImageOrientationPatient": self.orientation,
            "PixelSpacing": self.spacing,
        }
        return [keyword for keyword, value in stated.items() if value is None]


def interpret(path, fields: Fields, syntax: uid.UID, *, mixed: bool = False) -> Instance:
    """Check the attributes of a data set and return its instance.

    With `mixed`, its frames may belong to several volumes: then only `kinds` has the spacing and orientation of each
    frame, and `select_frames` must follow.
    """
    modality = fields.soft("code", "Modality")
    if modality in NOT_SCANS:
        raise ScanError(path, f"is {NOT_SCANS[modality]} ({modality}), not a scan", "leave it out", "unsupported")
    if fields.raw("DirectoryRecordSequence") is not None:
        remedy = "name one of those files, or the directory of a series"
        raise ScanError(path, "is a DICOMDIR, a list of files", remedy, "unsupported")
    if fields.raw("Rows") is None and fields.raw("Columns") is None:
        reason = "contains no image, or is truncated before it"
        raise ScanError(path, reason, "leave it out, or copy it again", "unsupported")
    pixel_format = read_pixel_format(path, fields)
    frames = FrameFields(path, fields)
    kinds = {attribute: frames.column(attribute) for attribute in ATTRIBUTES}
    check_not_tiled(path, fields, frames.count, kinds)
    spacings, directions, positions = read_geometry(path, fields, frames)
    slopes, intercepts, stated = read_rescale(path, frames)
    if stated:  # the rescaled values are comparable, even if the real-world values differ
        kinds |= {attribute: [None] * frames.count for attribute in REAL_WORLD_VALUES}
    kinds |= {SPACING: spacings, ORIENTATION: directions}
    vectors = frame_vectors(fields, frames.count)
    if mixed:
        kinds |= vectors
    else:
        check_one_kind(path, kinds | vectors, [f"frame {i + 1}" for i in range(frames.count)], "frame")
    tables = [item.soft("comparable", Attribute("LUTData")) for item in fields.items("ModalityLUTSequence")[:1]]
    inverted = tables[0] if tables and pixel_format.photometric == "MONOCHROME1" else None
    kinds[INVERTED_LUT] = [inverted] * frames.count
    number = fields.soft("numbers", "InstanceNumber", 1)
    return Instance(
        **vars(pixel_format),
        syntax=syntax,
        modality=modality,
        frames=frames.count,
        number=int(number[0]) if number else None,
        spacing=spacings[0],
        orientation=directions[0],
        positions=positions,
        slopes=slopes,
        intercepts=intercepts,
        lut=bool(fields.items("ModalityLUTSequence")),
        padding=read_padding(fields, pixel_format),
        window=stated_window(fields, frames),
        burned_in=fields.soft("code", "BurnedInAnnotation") == "YES",
        kinds=kinds,
    )


def check_not_tiled(path, fields: Fields, count: int, kinds: Columns) -> None:
    """Raise if one image contains several slices, or if the frames are tiles of one image."""
    types = {str(value) for a, values in kinds.items() if a.keyword in ("ImageType", "FrameType") for value in values}
    # A file that is not a mosaic may state 1 image.
    images, grid = fields.comparable(MOSAIC_COUNT), fields.comparable(GRID_COUNT)
    several = isinstance(images, bytes) and int.from_bytes(images[:2], "little") > 1
    united = isinstance(grid, bytes) and grid.strip(b" \0").isdigit() and int(grid.strip(b" \0")) > 1
    if several or united or any("MOSAIC" in text.split("\\") for text in types):
        maker = "United Imaging" if united else "Siemens"
        reason = f"is a {maker} mosaic: its image shows all slices of a volume next to each other"
        raise ScanError(path, reason, "convert it with dcm2niix, which separates the slices", "unsupported")
    if count > 1 and fields.raw("TotalPixelMatrixColumns") is not None:
        raise ScanError(path, f"has {count} frames that are tiles of one image, not slices", TILED, "unsupported")


def select_frames(instance: Instance, frames: Sequence[int]) -> Instance:
    """Return the instance as if it had only these frames."""
    kinds = {attribute: [values[i] for i in frames] for attribute, values in instance.kinds.items()}
    return dataclasses.replace(
        instance,
        frames=len(frames),
        spacing=kinds[SPACING][0],
        orientation=kinds[ORIENTATION][0],
        positions=None if instance.positions is None else tuple(instance.positions[i] for i in frames),
        slopes=tuple(instance.slopes[i] for i in frames),
        intercepts=tuple(instance.intercepts[i] for i in frames),
        kinds=kinds,
    )


def frame_vectors(fields: Fields, count: int) -> dict[Attribute, list[Value]]:
    """Return the energy window, detector, phase, ... of each frame of nuclear medicine, where the file states them."""
    vectors: dict[Attribute, list[Value]] = {}
    for keyword in FRAME_VECTORS:
        values = fields.comparable(Attribute(keyword))
        if isinstance(values, tuple) and len(values) == count:
            vectors[Attribute(keyword)] = [(value,) for value in values]
    return vectors


def read_padding(fields: Fields, form: PixelFormat) -> tuple[int, int] | None:
    """Return (low, high) of padding values as stored; None without padding or if it is unreadable."""
    pad = fields.soft("integer", "PixelPaddingValue", signed=form.signed)
    limit = fields.soft("integer", "PixelPaddingRangeLimit", signed=form.signed)
    if pad is None:
        return None
    return min(pad, pad if limit is None else limit), max(pad, pad if limit is None else limit)


def read_pixel_format(path, fields: Fields) -> PixelFormat:
    high, signed = fields.soft("integer", "HighBit"), fields.required("PixelRepresentation")
    form = PixelFormat(
        rows=fields.required("Rows"),
        columns=fields.required("Columns"),
        samples=fields.integer("SamplesPerPixel") or 1,
        photometric=fields.code("PhotometricInterpretation"),
        planar=fields.soft("integer", "PlanarConfiguration") or 0,
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
        self.path, self.count, self.fields = path, int(count[0]), fields
        self.shared = (fields.items("SharedFunctionalGroupsSequence") or [None])[0]
        self.per_frame = fields.items("PerFrameFunctionalGroupsSequence")
        if self.per_frame and len(self.per_frame) != self.count:
            raise ScanError(path, f"describes {len(self.per_frame)} frames but has {self.count}", DAMAGED_HEADER)
        self.plain = self.shared is None and not self.per_frame  # no functional groups
        self.found: dict[str, list[list[Fields | None]]] = {}

    def sources(self, sequence: str) -> list[list[Fields | None]]:
        """Return where the items of a sequence are, for every frame: own items first, then shared ones, then main ones.

        None where a frame has no item. Nested sequences have a dot.
        """

        def item(group: Fields | None) -> Fields | None:
            for keyword in sequence.split("."):
                group = next(iter(group.items(keyword)), None) if group is not None else None
            return group

        if sequence not in self.found:
            if self.plain and tag_of(sequence.partition(".")[0]) not in self.fields.dataset:
                return self.found.setdefault(sequence, [])
            own = [item(group) for group in self.per_frame]
            candidates = [own, [item(self.shared)] * self.count, [item(self.fields)] * self.count]
            self.found[sequence] = [items for items in candidates if any(items)]
        return self.found[sequence]

    def each(self, sequence: str, keyword: str, count: int) -> list[tuple[float, ...]] | None:
        """Return `count` numbers of every frame, or None if no frame has them. Raises if only some frames do."""
        for items in (*self.sources(sequence), [self.fields] * self.count):
            values = [item.numbers(keyword, count) if item is not None else None for item in items]
            absent = [i + 1 for i, value in enumerate(values) if value is None]
            if len(absent) == self.count:
                continue
            if absent:
                reason = f"states {keyword} for {self.count - len(absent)} of {self.count} frames, not for frame "
                remedy = "restore the attribute, or split the file into frames of one kind"
                raise ScanError(self.path, reason + ", ".join(map(str, absent[:10])), remedy, "series")
            return values
        return None

    def column(self, attribute: Attribute) -> Sequence[Value]:
        """Return the value of an attribute for every frame."""
        unassigned = () if self.plain else UNASSIGNED
        for sequence in (*attribute.sequences, *unassigned):
            for items in self.sources(sequence):
                values = [item.comparable(attribute) if item is not None else None for item in items]
                if any(value is not None for value in values):
                    return values
        return [self.fields.comparable(attribute)] * self.count


def read_geometry(path, fields: Fields, frames: FrameFields) -> tuple[list[Value], list[Value], tuple | None]:
    """Return the spacing and the orientation of every frame (None where they are absent), and all positions or None."""

    def positive(values) -> tuple[float, float] | None:
        return tuple(values) if values is not None and min(values) > 0 else None

    try:
        spacings = frames.each("PixelMeasuresSequence", "PixelSpacing", 2)
    except ScanError:
        if frames.count > 1:
            raise
        spacings = None  # optional for a single image
    orientations = frames.each("PlaneOrientationSequence", "ImageOrientationPatient", 6)
    positions = frames.each("PlanePositionSequence", "ImagePositionPatient", 3)
    if positions is not None and frames.count > 1 and not frames.per_frame:
        positions = None  # one position for all frames of a cine loop does not locate the frames
    absent = [None] * frames.count
    measured = [positive(spacing) for spacing in spacings or absent]
    if frames.count == 1 and measured[0] is None:
        stated = (fields.soft("numbers", f"{kind}PixelSpacing", 2) for kind in ("Imager", "NominalScanned"))
        measured = [next(filter(None, map(positive, stated)), None)]
    return measured, list(orientations or absent), tuple(positions) if positions else None


def read_rescale(path, frames: FrameFields) -> tuple[tuple[float, ...], tuple[float, ...], bool]:
    """Return the rescale slope and intercept of every frame, and whether the file states them."""
    slopes = frames.each("PixelValueTransformationSequence", "RescaleSlope", 1)
    intercepts = frames.each("PixelValueTransformationSequence", "RescaleIntercept", 1)
    if (slopes is None) != (intercepts is None):
        raise ScanError(path, "has only one of RescaleSlope and RescaleIntercept", "add the other", "ambiguous")
    stated = slopes is not None
    slopes = tuple(s[0] for s in slopes) if slopes else (1.0,) * frames.count
    intercepts = tuple(b[0] for b in intercepts) if intercepts else (0.0,) * frames.count
    if 0.0 in slopes:
        raise ScanError(path, "has the RescaleSlope 0, which makes every voxel equal", EXPORT)
    return slopes, intercepts, stated
