"""A vision encoder in a Hugging Face folder: SigLIP, DINOv2, or the encoder of a vision-language model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from input_pipeline.files import read_json
from radfm_jax.convert import vision_tables
from radfm_jax.convert.report import NO_PROGRESS, Progress
from radfm_jax.convert.weights import Weights

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"


class VisionWeights(Weights):
    """The vision encoder of a folder, below `vit/`. Other tensors of the folder are not read."""

    part = "vision"

    def __init__(self, src, *, dtype: str | None = None, verify: bool = True, progress: Progress = NO_PROGRESS):
        super().__init__(src, verify=verify, progress=progress)
        try:
            path = self.folder / CONFIG
            if not path.is_file():
                raise ValueError(f"{self.folder} has no {CONFIG}, which states the sizes of the vision encoder")
            self.config = vision_tables.read_config(read_json(path, kind=dict), str(path), self._preprocessor())
            self.sizes = {"vision": dataclasses.asdict(self.config)}
            names = {name: vision_tables.local_name(self.config.kind, name) for name in self.reader.infos}
            local = {plain: name for name, plain in names.items() if plain is not None}
            self.entries = vision_tables.vision_entries(self.config)
            self.sources = {e.name: local.get(e.name, e.name) for e in self.entries}
            shapes = {path: vision_tables.vision_shapes(self.config)[path] for path in {e.path for e in self.entries}}
            self.match(shapes, dtype, {name for name, plain in names.items() if plain is None})
        except BaseException:
            self.reader.close()
            raise
        if self.unused:
            modules = ", ".join(sorted({name.partition(".")[0] for name in self.unused}))
            self.notes.append(f"{len(self.unused)} tensors of {self.src} are not of its vision encoder: {modules}")
        fresh = ", ".join(f"vit/{name}" for name in vision_tables.FRESH)
        self.notes.append(f"{self.src} is a {self.config.kind}; a training starts with fresh {fresh}")

    def _preprocessor(self) -> dict | None:
        path = Path(self.folder) / PREPROCESSOR
        return read_json(path, kind=dict) if path.is_file() else None
