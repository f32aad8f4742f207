"""A vision encoder in a Hugging Face folder: SigLIP, DINOv2, or the encoder of a vision-language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from input_pipeline.files import read_json
from radfm_jax.convert import vision_config, vision_tables
from radfm_jax.convert.report import NO_PROGRESS, Progress
from radfm_jax.convert.weights import Weights
from radfm_jax.models.encoders.kinds import VisionConfig
from radfm_jax.models.encoders.slices import SliceConfig

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"


class VisionWeights(Weights):
    """The vision encoder of a folder, below `vit/`. Other tensors of the folder are not read."""

    part = "vision"

    def __init__(
        self,
        src,
        *,
        image_size: int | None = None,  # side of a scan in pixels; positions are interpolated. None: as in the file
        dtype: str | None = None,
        verify: bool = True,
        progress: Progress = NO_PROGRESS,
    ):
        super().__init__(src, verify=verify, progress=progress)
        try:
            self.stored = self._read_config()  # with the image size of the file
            self.config = self._resized(image_size)
            self.sizes = {"vision": self.config.to_dict()}
            names = {name: vision_tables.local_name(self.config.kind, name) for name in self.reader.infos}
            local = {plain: name for name, plain in names.items() if plain is not None}
            self.entries = vision_tables.vision_entries(self.stored)
            self.sources = {e.name: local.get(e.name, e.name) for e in self.entries}
            read = {e.path for e in self.entries}
            shapes = vision_tables.vision_shapes(self.config)
            self.absent = [path for path in shapes if path not in read]
            others = {name for name, plain in names.items() if plain is None}
            self.match({path: x for path, x in shapes.items() if path in read}, dtype, others)
        except BaseException:
            self.reader.close()
            raise
        if self.unused:
            modules = ", ".join(sorted({name.partition(".")[0] for name in self.unused}))
            self.notes.append(f"{len(self.unused)} tensors of {self.src} are not of its vision encoder: {modules}")
        if self.absent:
            self.notes.append(f"{self.src} has no {', '.join(self.absent)}: they start fresh in a training")

    def _read_config(self) -> VisionConfig:
        path, preprocessor = self.folder / CONFIG, self.folder / PREPROCESSOR
        if not path.is_file():
            raise ValueError(f"{self.folder} has no {CONFIG}, which states the sizes of the vision encoder")
        stated = read_json(preprocessor, kind=dict) if preprocessor.is_file() else None
        return vision_config.read_config(read_json(path, kind=dict), path, stated)

    def _resized(self, image_size: int | None) -> VisionConfig:
        if image_size is None:
            return self.stored
        if not isinstance(self.stored, SliceConfig):
            raise ValueError(f"{self.src}: --image-size is for encoders of slices, not for {self.stored.kind}")
        self.notes.append(f"positions interpolated from {self.stored.image_size} to {image_size} pixels")
        return dataclasses.replace(self.stored, image_size=image_size)

    def slices(self, progress: Progress = NO_PROGRESS) -> Iterator[tuple[str, tuple, np.ndarray]]:
        for path, index, value in super().slices(progress):
            if path == "vit/positions" and self.config != self.stored:
                _, positions = vision_config.resized(self.stored, value, self.config.image_size, interpolate=True)
                yield path, (), positions.astype(value.dtype)
            else:
                yield path, index, value
