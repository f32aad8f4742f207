"""Which series of a study a scan is: the only one, or the one that words select.

Words are separated by white space or commas; case does not matter. A series is selected if every word matches it:

    3, 3.2      its number; "3" also matches "3.1" and "3.2", the parts of a split series
    s1          a series without a SeriesNumber
    CT, MRI     its modality
    axial, ...  its plane; also ax, tra, transverse, transaxial, cor, sag
    lung        a word of its description or label starts with it
    largest     of the series that match the other words, the one with the most slices

A word that is a modality or a plane also matches a word of the description. Series that were set aside (localizers,
secondary captures, derived reformats) match by their number only, and are the only series if there is no other.
"""

from __future__ import annotations

import re

from input_pipeline.images.scans.base import MAX_LISTED, ScanError
from input_pipeline.images.scans.study.survey import Series, Study

NUMBER = re.compile(r"(\d+(\.\d+)?|s\d+)")
PLANE_WORDS = {
    "axial": ("axial", "ax", "tra", "transverse", "transaxial"),
    "coronal": ("coronal", "cor"),
    "sagittal": ("sagittal", "sag"),
}
MODALITY_WORDS = {"mri": "mr", "pet": "pt", "xray": "cr", "ultrasound": "us"}


def select(path, study: Study, text: str | None) -> Series:
    """Return the series that the words select; without words, the only series. Raises ScanError that lists them."""
    candidates = [series for series in study.series if not series.aside] or list(study.series)
    if not candidates:
        remedy = "name a study of DICOM images; unpack an archive of other scans, and save .npz arrays as .npy"
        raise ScanError(path, nothing(study), remedy, "unsupported")
    words = re.split(r"[\s,]+", text.strip().lower()) if text is not None else []
    if text is not None and not any(words):
        raise ScanError(path, "the series selector is empty", "name a number, or words of a series", "ambiguous")
    matching = candidates if not words else matches(study, candidates, words)
    if len(matching) == 1:
        return matching[0]
    several = f"has {len(matching)} series" if text is None else f"series {text!r} matches {len(matching)} series"
    reason = f"{several}: {listed(matching)}" if matching else f"no series matches {text!r}: {listed(study.series)}"
    raise ScanError(path, reason, f'select one, for example series="{(matching or candidates)[0].key}"', "series")


def matches(study: Study, candidates: list[Series], words: list[str]) -> list[Series]:
    """Return the series that match all words."""
    numbers = [word for word in words if NUMBER.fullmatch(word)]
    pool = study.series if numbers else candidates
    found = [s for s in pool if all(word_matches(s, word) for word in words if word != "largest")]
    if "largest" in words and found:
        most = max(s.slices for s in found)
        found = [s for s in found if s.slices == most]
    return found


def word_matches(series: Series, word: str) -> bool:
    if NUMBER.fullmatch(word):
        return word in (series.key, series.key.partition(".")[0])
    if MODALITY_WORDS.get(word, word) == series.modality.lower() or word in PLANE_WORDS.get(series.plane, ()):
        return True
    described = re.split(r"[^0-9a-z]+", f"{series.description} {series.label}".lower())
    parts = [part for part in re.split(r"[^0-9a-z]+", word) if part]
    return bool(parts) and all(any(entry.startswith(part) for entry in described) for part in parts)


def listed(series) -> str:
    shown = "; ".join(str(s) for s in series[:MAX_LISTED])
    return shown + (f"; and {len(series) - MAX_LISTED} more" if len(series) > MAX_LISTED else "")


def nothing(study: Study) -> str:
    """Return the reason of the error for a study without images."""
    counts = [f"{entry.files} file{'s' * (entry.files != 1)}: {entry.reason}" for entry in study.set_aside]
    counts += [f"{name} {reason}" for name, reason in study.refused[:MAX_LISTED]]
    return "contains no DICOM image" + (f" ({'; '.join(counts[:MAX_LISTED])})" if counts else "")
