"""Draws the contact sheet: one row of scans per modality, with their labels as captions."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from input_pipeline.phantoms.drawing import paint
from input_pipeline.phantoms.plan import MODALITIES, SIDES, SIZES, Study, describe

TILE, CAPTION = 128, 28
COLUMNS = ((0, None, None), *((1, side, size) for side in SIDES for size in SIZES), (2, None, None))


def contact_sheet(seed: int, split: str = "train", size: int = 128, volumes: float = 0.12) -> bytes:
    """Return a PNG with the first phantom of each modality and (lesions, side, size). Volumes show the middle slice."""
    tiles = [(modality, *column) for modality in MODALITIES for column in COLUMNS]
    studies: dict[tuple, Study] = {}
    index = 0
    while len(studies) < len(tiles):
        study = describe(seed, split, index, size, volumes)
        labels = study.labels
        studies.setdefault((labels.modality, labels.count, labels.side, labels.size), study)
        index += 1

    height = TILE + CAPTION
    page = Image.new("L", (len(COLUMNS) * (TILE + 4), len(MODALITIES) * height), 255)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for k, key in enumerate(tiles):
        study = studies[key]
        x, y = k % len(COLUMNS) * (TILE + 4), k // len(COLUMNS) * height
        # 32 gray levels, because noise in 256 levels makes the file three times as large.
        tile = (np.rint(paint(study)[:, :, study.depth // 2] * 31) * 8).astype(np.uint8)
        page.paste(Image.fromarray(tile).resize((TILE, TILE), Image.Resampling.BILINEAR), (x, y))
        pen.text((x + 2, y + TILE + 1), _caption(study), fill=0, font=font, spacing=1)
    stream = io.BytesIO()
    page.save(stream, format="PNG")
    return stream.getvalue()


def _caption(study: Study) -> str:
    labels = study.labels
    kind = labels.modality if study.depth == 1 else f"{labels.modality}, {study.depth} slices"
    if labels.count != 1:
        return f"{kind}\n{('no lesion', '', 'two lesions')[labels.count]}"
    return f"{kind}\n{labels.size}, {labels.side}, {labels.level}"
