"""What a checkpoint takes over from the checkpoints that it is made of: files, preparation, source."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from radfm_jax.checkpoints import checkpoint
from radfm_jax.inference import stored

KEPT = ("config", "unused")  # keys of `source`: config.json of the language model, tensors that the model does not use


def copy_files(src, directory: Path, names: Iterable[str] = checkpoint.TOKENIZERS) -> None:
    """Copy those of `names` that `src` has and `directory` does not."""
    for name in names:
        if (Path(src) / name).is_file() and not (directory / name).exists():
            shutil.copyfile(Path(src) / name, directory / name)


def source_fields(*descriptions: dict) -> dict[str, Any]:
    """Return the keys `KEPT` of `source` of the first description that has each."""
    sources = [description.get("source", {}) for description in reversed(descriptions)]
    return {key: source[key] for source in sources for key in KEPT if key in source}


def preparation(directory, description: dict, lines: list[str]) -> dict[str, Any]:
    """Return the preparation of scans and texts of a RadFM, as a field of radfm.json; {} for a language model.

    If the checkpoint does not record it, that is added to `lines`, the notes of the report.
    """
    if description["part"] != "radfm":
        return {}
    config = checkpoint.model_config(description, directory)
    try:
        return {stored.KEY: stored.to_record(stored.preparation_of(directory, config))}
    except ValueError as e:
        lines.append(f"the result does not state how scans are prepared: {e}")
        return {}
