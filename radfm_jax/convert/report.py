"""Progress callbacks and the report of a conversion."""

from __future__ import annotations

import dataclasses


class Progress:
    """No-op progress callback; the command line overrides it with a bar."""

    def stage(self, name: str, total: int | None) -> None:
        """Start a stage of `total` bytes, or None if the size is unknown."""

    def advance(self, done: int) -> None:
        """Report that another `done` bytes have been processed."""


NO_PROGRESS = Progress()


@dataclasses.dataclass
class Report:
    """Size of the converted parameters, and `lines` for the user."""

    parameters: int
    bytes: int
    dtypes: tuple[str, ...]
    lines: list[str]
