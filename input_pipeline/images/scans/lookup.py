"""The modality lookup table of DICOM (PS3.3 C.11.1)."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np

from input_pipeline.images.scans.base import ScanError
from input_pipeline.images.scans.fields import EXPORT, Fields
from input_pipeline.images.scans.instance import Instance

PADDING = -1  # marks padding in the result; lower than every entry


@dataclasses.dataclass(frozen=True)
class Lut:
    """A table from stored values to output values.

    Attributes:
      first: the stored value of the first entry. Values below it map to the first entry, values above the table to the
        last.
      entries: uint16[N].
    """

    first: int
    entries: np.ndarray

    def apply(self, frame: np.ndarray, instance: Instance) -> np.ndarray:
        """Return the output values of a frame. MONOCHROME1 is inverted within the table; padding becomes PADDING."""
        output = self.entries[np.clip(frame.astype(np.int64) - self.first, 0, len(self.entries) - 1)]
        if instance.photometric == "MONOCHROME1":
            output = self.entries.min() + self.entries.max() - output
        if instance.frame_padding is None:
            return output
        low, high = instance.frame_padding
        return np.where((frame >= low) & (frame <= high), PADDING, output.astype(np.int32))


def read_lut(path, fields: Fields, instance: Instance) -> Lut | None:
    """Return the modality lookup table of a file, or None. Raises ScanError if it is unreadable."""
    item = next(iter(fields.items("ModalityLUTSequence")), None)
    if item is None:
        return None
    descriptor, data = item.raw("LUTDescriptor"), item.raw("LUTData")
    if not all(element is not None and isinstance(element.value, bytes) for element in (descriptor, data)):
        raise item.unreadable("ModalityLUTSequence")
    if len(descriptor.value) != 6:
        raise item.unreadable("LUTDescriptor")
    order = "<" if descriptor.is_little_endian else ">"
    count, first, _ = struct.unpack(f"{order}H{'h' if instance.signed else 'H'}H", descriptor.value)
    count = count or 1 << 16
    if len(data.value) == 2 * count:
        entries = np.frombuffer(data.value, f"{order}u2")
    elif len(data.value) in (count, count + 1) and order == "<":
        entries = np.frombuffer(data.value, np.uint8)[:count]
    else:
        reason = f"has a modality lookup table of {len(data.value):,} bytes, but states {count:,} entries"
        raise ScanError(path, reason, EXPORT)
    return Lut(first, entries.astype(np.uint16))
