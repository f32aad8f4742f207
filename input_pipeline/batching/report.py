"""Contents of rows: statistics for logs and reports, and ids to locate a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from input_pipeline.batching.plan import PADDING


@dataclasses.dataclass(frozen=True)
class SampleInfo:
    """A sample that is packed in a row."""

    source: str
    row_id: str
    task: str
    study: str | None
    tokens: int
    cut: int  # text tokens that were dropped because the sample was too long
    dropped_scans: int  # scans that were dropped because the sample had too many or was too long
    reference: str = ""  # the answer of the row, for a group of answers (text/alternatives.py)


@dataclasses.dataclass(frozen=True)
class ScanInfo:
    """The scan in a slot of a row."""

    slot: int
    key: int  # index.key_hash of its path, volume, window and series
    shape: tuple[int, int, int]  # (H, W, D) before it was resized


@dataclasses.dataclass(frozen=True)
class RowInfo:
    """A row: its position in the data, and its contents as planned and loaded."""

    epoch: int
    window: int
    row: int
    # In the order of their segments, segment 1 first; a sample may have several (text/alternatives.py).
    samples: tuple[SampleInfo, ...]
    tokens: int
    padding: str  # cause of the padding, as in PlannedRow
    scans: int  # number of slots in use
    left_out: tuple[str, ...] = ()  # an error for each scan that could not be loaded, within `data.allowed_loss`
    slots: tuple[ScanInfo, ...] = ()


@dataclasses.dataclass
class PackingReport:
    """Fill statistics of rows. Call `add` with the rows of each batch."""

    text_length: int
    rows: int = 0
    samples: int = 0
    tokens: int = 0
    scans: int = 0
    cut_tokens: int = 0
    dropped_scans: int = 0
    left_out: int = 0
    padding: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys((*PADDING, "empty row"), 0))

    def add(self, rows: Sequence[RowInfo | None]) -> None:
        """Count the rows of a batch."""
        for info in rows:
            self.rows += 1
            if info is None:
                self.padding["empty row"] += self.text_length
                continue
            self.samples += len(info.samples)
            self.tokens += info.tokens
            self.scans += info.scans
            self.cut_tokens += sum(s.cut for s in info.samples)
            self.dropped_scans += sum(s.dropped_scans for s in info.samples)
            self.left_out += len(info.left_out)
            if info.padding:
                self.padding[info.padding] += self.text_length - info.tokens

    def as_dict(self) -> dict[str, float]:
        """Return shares of all text positions, samples and scans per row, and counts of dropped tokens and scans."""
        positions, rows = max(self.rows * self.text_length, 1), max(self.rows, 1)
        return {
            "real tokens": self.tokens / positions,
            **{f"padding: {cause}": count / positions for cause, count in self.padding.items()},
            "samples per row": self.samples / rows,
            "scans per row": self.scans / rows,
            "cut tokens": self.cut_tokens,
            "dropped scans": self.dropped_scans,
            "skipped scans": self.left_out,
        }
