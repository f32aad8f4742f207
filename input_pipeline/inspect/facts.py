"""The arrays of a row -> what a person wants to know of it, taken from the arrays and from nothing else.

Letters: T text tokens, R vision rows of P patches, S scan slots, L latents of a scan.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from input_pipeline.batching.rows import RowInfo, SampleInRow
from input_pipeline.inspect.pictures import ScanView, scan_facts, volume_of_slot
from input_pipeline.inspect.texts import TEXT, Speller, Token, sample_tokens
from input_pipeline.text.terms import TERM_WEIGHT
from input_pipeline.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SampleView:
    """A sample of a row.

    Attributes:
      number: its segment.
      study_known: whether its source says which study it belongs to (which one is kept out of the page).
      place, places: where it stands in the row.
      visual, trained, terms: places of latents, of targets with a weight, of those with the weight of a term.
      cut, dropped_scans: tokens and scans that were left out, the sample being too long.
      slots: where image 1, 2, ... lie.
    """

    number: int
    source: str
    row_id: str
    task: str
    study_known: bool
    place: int
    places: int
    visual: int
    trained: int
    terms: int
    cut: int
    dropped_scans: int
    slots: tuple[int, ...]
    tokens: tuple[Token, ...]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RowView:
    """A row.

    Attributes:
      length: T. tokens: places in use. padding: why the others are empty.
      latents: (place, places) of each run of latents.
      vision: for each vision row the (slot, first patch, patches) in it; vision_length: P.
      warnings: of the row itself and of its scans; samples have their own.
    """

    epoch: int
    window: int
    row: int
    length: int
    tokens: int
    padding: str
    latents: tuple[tuple[int, int], ...]
    vision: tuple[tuple[tuple[int, int, int], ...], ...]
    vision_length: int
    samples: tuple[SampleView, ...]
    scans: tuple[ScanView, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict:
        """Plain values: no pictures, tokens as columns."""
        plain = dataclasses.asdict(self)
        for scan in plain["scans"]:
            del scan["pictures"], scan["thumbnail"]
        for sample in plain["samples"]:
            columns = [f.name for f in dataclasses.fields(Token)]
            sample["tokens"] = {name: [token[name] for token in sample["tokens"]] for name in columns}
        return plain


def row_facts(arrays: Mapping[str, np.ndarray], info: RowInfo, tokenizer: Tokenizer, num_latents: int) -> RowView:
    """Everything about one row.

    Args:
      arrays: of the row, without the batch axis.
    """
    segments, speller = arrays["segments"], Speller(tokenizer)
    samples = []
    for number, stands in enumerate(info.samples, 1):
        samples.append(_sample_facts(arrays, number, stands, speller, num_latents))
    scans, warnings = [], [f"left out: {line}" for line in info.left_out]
    unknown = sorted(set(np.unique(segments).tolist()) - set(range(len(samples) + 1)))
    if unknown:
        warnings.append(f"segments {unknown} belong to no sample of the row")
    for slot in np.flatnonzero(arrays["scan_rows"] >= 0).tolist():
        shown_by = tuple(s.number for s in samples if slot in s.slots)
        try:
            volume = volume_of_slot(arrays, slot)
        except ValueError as error:
            warnings.append(str(error))
            continue
        scan, said = scan_facts(arrays, slot, volume, shown_by)
        scans.append(scan)
        warnings += said
    return RowView(
        info.epoch,
        info.window,
        info.row,
        len(segments),
        int((segments > 0).sum()),
        info.padding,
        _runs(arrays["visual_index"] >= 0),
        tuple(_scan_runs(row) for row in arrays["patch_segments"]),
        arrays["patch_segments"].shape[1],
        tuple(samples),
        tuple(scans),
        info.left_out,
        tuple(warnings),
    )


def _sample_facts(arrays, number: int, stands: SampleInRow, speller: Speller, num_latents: int) -> SampleView:
    here = np.flatnonzero(arrays["segments"] == number)
    first, end = (int(here[0]), int(here[-1]) + 1) if len(here) else (0, 0)
    part = slice(first, end)
    tokens, slots, warnings = sample_tokens({k: arrays[k][part] for k in TEXT}, speller, num_latents, first)
    weights = arrays["weights"][part]
    if len(here) != stands.tokens or len(here) != end - first:
        warnings.append(f"stands in {len(here)} places, {stands.tokens} were planned")
    if not weights.any():
        warnings.append("nothing is trained on: every weight is zero")
    return SampleView(
        number,
        stands.source,
        stands.row_id,
        stands.task,
        stands.study is not None,
        first,
        end - first,
        int((arrays["visual_index"][part] >= 0).sum()),
        int((weights > 0).sum()),
        int((weights == TERM_WEIGHT).sum()),
        stands.cut,
        stands.dropped_scans,
        slots,
        tuple(tokens),
        tuple(warnings),
    )


def _runs(mask: np.ndarray) -> tuple[tuple[int, int], ...]:
    """(first, length) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return tuple((int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True))


def _scan_runs(patch_segments: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    found = [
        (int(s) - 1, *run) for s in np.unique(patch_segments[patch_segments > 0]) for run in _runs(patch_segments == s)
    ]
    return tuple(sorted(found, key=lambda run: run[1]))
