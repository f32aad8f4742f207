"""Views of a row: everything that the page shows, from its arrays, its RowInfo, and the notices of `prepare`.

Letters: T text tokens, R vision rows of P patches, S scan slots, L latents of a scan.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping, Sequence

import numpy as np

from input_pipeline.batching.report import RowInfo, SampleInfo
from input_pipeline.images.planes import RADFM_PATCHES, Patches
from input_pipeline.inspect.images import ScanView, scan_view, volume_of_slot
from input_pipeline.inspect.tokens import TEXT, Token, TokenDecoder, sample_tokens
from input_pipeline.text.terms import TERM_WEIGHT
from input_pipeline.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class SampleView:
    """What the page shows about a sample."""

    number: int  # number of its segment
    source: str
    row_id: str
    task: str
    study_known: bool  # whether its source names its study; the page does not show the name
    place: int  # first position in the row
    places: int  # number of positions
    visual: int  # number of latents
    trained: int  # number of targets with a weight
    terms: int  # number of targets with the weight of a term
    cut: int  # tokens that were dropped because the sample was too long
    dropped_scans: int
    slots: tuple[int, ...]  # slots of image 1, 2, ...
    tokens: tuple[Token, ...]
    warnings: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class RowView:
    """What the page shows about a row."""

    epoch: int
    window: int
    row: int
    length: int  # T
    tokens: int  # positions in use
    padding: str  # why the others are empty
    latents: tuple[tuple[int, int], ...]  # (first position, length) of each run of latents
    vision: tuple[tuple[tuple[int, int, int], ...], ...]  # for each vision row the (slot, first patch, patches) in it
    vision_length: int  # P
    samples: tuple[SampleView, ...]
    scans: tuple[ScanView, ...]
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]  # warnings about the row and its scans; samples have their own

    def as_dict(self) -> dict:
        """Return plain values, without images and with tokens as columns."""
        plain = dataclasses.asdict(self)
        for scan in plain["scans"]:
            del scan["images"], scan["thumbnail"]
        for sample in plain["samples"]:
            columns = [f.name for f in dataclasses.fields(Token)]
            sample["tokens"] = {name: [token[name] for token in sample["tokens"]] for name in columns}
        return plain


def row_view(
    arrays: Mapping[str, np.ndarray],
    info: RowInfo,
    tokenizer: Tokenizer,
    num_latents: int,
    notices: Mapping[int, Sequence[str]] = types.MappingProxyType({}),
    patches: Patches = RADFM_PATCHES,
) -> RowView:
    """Return the view of one row. Its arrays have no batch axis. `notices` are those of `prepare`, by ScanInfo.key."""
    segments, decoder = arrays["segments"], TokenDecoder(tokenizer)
    samples = tuple(
        _sample_view(arrays, number, sample, decoder, num_latents) for number, sample in enumerate(info.samples, 1)
    )
    scans, warnings = [], [f"left out: {line}" for line in info.left_out]
    unknown = sorted(set(np.unique(segments).tolist()) - set(range(len(samples) + 1)))
    if unknown:
        warnings.append(f"segments {unknown} belong to no sample of the row")
    sources = {scan.slot: scan for scan in info.slots}
    for slot in np.flatnonzero(arrays["scan_rows"] >= 0).tolist():
        try:
            volume = volume_of_slot(arrays, slot, patches)
        except ValueError as error:
            warnings.append(str(error))
            continue
        known = sources.get(slot)
        shown_by = tuple(s.number for s in samples if slot in s.slots)
        scan, scan_warnings = scan_view(arrays, slot, volume, shown_by, known and known.shape)
        scans.append(scan)
        warnings += scan_warnings
        warnings += [f"the scan in slot {slot}: {notice}" for notice in notices.get(known.key if known else -1, ())]
    same = {name: getattr(info, name) for name in ("epoch", "window", "row", "padding", "left_out")}
    return RowView(
        **same,
        length=len(segments),
        tokens=int((segments > 0).sum()),
        latents=_runs(arrays["visual_index"] >= 0),
        vision=tuple(_scan_runs(row) for row in arrays["patch_segments"]),
        vision_length=arrays["patch_segments"].shape[1],
        samples=samples,
        scans=tuple(scans),
        warnings=tuple(warnings),
    )


def _sample_view(arrays, number: int, info: SampleInfo, decoder: TokenDecoder, num_latents: int) -> SampleView:
    positions = np.flatnonzero(arrays["segments"] == number)
    first, end = (int(positions[0]), int(positions[-1]) + 1) if len(positions) else (0, 0)
    span = slice(first, end)
    tokens, slots, warnings = sample_tokens({name: arrays[name][span] for name in TEXT}, decoder, num_latents, first)
    weights = arrays["weights"][span]
    if len(positions) != info.tokens or len(positions) != end - first:
        warnings.append(f"it has {len(positions)} positions, {info.tokens} were planned")
    if not weights.any():
        warnings.append("no token is trained on: every weight is zero")
    same = {name: getattr(info, name) for name in ("source", "row_id", "task", "cut", "dropped_scans")}
    return SampleView(
        **same,
        number=number,
        study_known=info.study is not None,
        place=first,
        places=end - first,
        visual=int((arrays["visual_index"][span] >= 0).sum()),
        trained=int((weights > 0).sum()),
        terms=int((weights == TERM_WEIGHT).sum()),
        slots=slots,
        tokens=tuple(tokens),
        warnings=tuple(warnings),
    )


def _runs(mask: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Return (first, length) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return tuple((int(a), int(b - a)) for a, b in zip(edges[::2], edges[1::2], strict=True))


def _scan_runs(patch_segments: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    segments = np.unique(patch_segments[patch_segments > 0])
    runs = [(int(s) - 1, *run) for s in segments for run in _runs(patch_segments == s)]
    return tuple(sorted(runs, key=lambda run: run[1]))
