"""A prompt and scans -> tokens and volumes, without a data set or an index.

    encoded = encode_prompt("<image-1> Compare with <image-2>.", 2, tokenizer, preparation)
    volumes = read_scans(["ct.nii.gz", "old_cxr.png"], preparation)

Text and scans pass through the functions that training uses: `tokens.encode`, `scans.read`, `prepare_volume`,
`collate_row`.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from input_pipeline.batching.collate import LoadedRow, ScanPlanes, collate_batch, collate_row
from input_pipeline.batching.plan import RowLimits
from input_pipeline.config import DataConfig, trained_intensities
from input_pipeline.datasets.rows import clean_text
from input_pipeline.field_rules import Size, as_tuple, check_fields, one_of
from input_pipeline.images import scans
from input_pipeline.images.contrast import contrast_notices
from input_pipeline.images.intensity import Window, one_channel_if_gray, parse_intensity
from input_pipeline.images.planes import (
    CHANNELS,
    FITS,
    MODES,
    ORDERS,
    PATCH,
    POSITION_TABLES,
    STORAGE,
    Patches,
    Sizes,
    Volume,
    source_slice,
)
from input_pipeline.images.released_volumes import released_volumes
from input_pipeline.images.scans.access import as_scan_error
from input_pipeline.images.scans.arrays import layout_of
from input_pipeline.images.scans.checks import check_values, check_volume, to_intensities
from input_pipeline.images.scans.images import pixels_of
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.samples import Sample, ScanNotice, Text
from input_pipeline.samples import Scan as ScanFile
from input_pipeline.sources import NoTerms
from input_pipeline.text.marks import MARK_LIKE, misspelt_marks, place_scans
from input_pipeline.text.tokenizer import Tokenizer
from input_pipeline.text.tokens import TEMPLATES, Encoded, encode

PLACES = ("first", "last")
Scan = str | Path | ScanFile | np.ndarray | Image.Image
"""A scan of a request.

A path; a path with the volume of a 4D file or a window (samples.Scan); a PIL image; or an array: a gray image [H, W],
a volume [H, W, D] or [H, W, D, C] with C = 1 or 3, so that a colour image is [H, W, 1, 3]. The axes are those of the
display: rows from top to bottom, columns from left to right, axial slices from feet to head (images/scans/orientation).
"""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How scans and texts are prepared for a model: the fields of DataConfig that a prompt needs.

    In `released` mode 2D scans become 512 x 512 and volumes `size_3d` x `size_3d`: 256 as in the released training
    program, or 512 as in its test program. It ignores size_2d, depth and storage.
    """

    preprocess: Annotated[str, one_of(MODES)] = "paper"
    storage: Annotated[str, one_of(STORAGE)] = "uint8"
    size_2d: Size = 512
    size_3d: Size = 256
    depth: Size = 64
    num_latents: Size = 32
    text_length: Size = 2048
    # Distinct intensity settings of the training sources. Scans without a window use the only one. If there are
    # several, each scan must have a window.
    intensities: tuple[str, ...] = ("minmax",)
    fit: Annotated[str, one_of(FITS)] = "stretch"
    template: Annotated[str, one_of(TEMPLATES)] = "radfm"  # form of a conversation, as in DataConfig
    patch: tuple[Size, Size, Size] = PATCH
    position_tables: tuple[Size, Size, Size] = POSITION_TABLES
    patch_order: Annotated[str, one_of(ORDERS)] = "columns"

    def __post_init__(self):
        object.__setattr__(self, "intensities", tuple(self.intensities))
        check_fields(self, "", self._conflicts())

    def _conflicts(self) -> Iterator[str]:
        if not self.intensities:
            yield "intensities must have at least one setting"
        for setting in self.intensities:
            try:
                parse_intensity(setting)
            except ValueError as error:
                yield f"intensities: {error}"
        if self.preprocess == "released" and self.size_3d not in (256, 512):
            yield f"size_3d is {self.size_3d}: released mode supports 256 and 512"
        if self.preprocess == "released" and self.template != "radfm":
            yield f"template is {self.template!r}: released mode supports 'radfm'"
        try:
            _ = self.sizes
        except ValueError as error:
            yield f"patch, position_tables, size_2d, size_3d, depth: {error}"

    @property
    def sizes(self) -> Sizes:
        return Sizes(
            self.size_2d, self.size_3d, self.depth, Patches(self.patch, self.position_tables, self.patch_order)
        )

    @classmethod
    def from_config(cls, config: DataConfig) -> Preparation:
        """Return the preparation for scans of the config's sources. Their `window` has the source's intensity."""
        return dataclasses.replace(cls.from_data(config.to_dict()), intensities=(config.intensity,))

    @classmethod
    def from_data(cls, data: Mapping) -> Preparation:
        """Return the preparation of a training run from its `data` group. Another version may have written it."""
        known = {f.name for f in dataclasses.fields(cls)} - {"intensities"}
        fields = {name: as_tuple(value) for name, value in data.items() if name in known}
        return cls(**fields, intensities=trained_intensities(data))

    def to_dict(self) -> dict:
        """Return plain values. Fields that version 0.1 did not have are absent at their defaults."""
        plain = {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(self).items()}
        since = ("intensities", "fit", "template", "patch", "position_tables", "patch_order")
        new = {f.name: f.default for f in dataclasses.fields(self) if f.name in since}
        return {name: value for name, value in plain.items() if name not in new or getattr(self, name) != new[name]}

    def window_of(self, window: Window | None) -> Window | None:
        """Return the intensity setting of a scan: its `window`, or that of the model. ValueError if ambiguous."""
        if window is None and len(self.intensities) > 1:
            settings = " and ".join(self.intensities)
            raise ValueError(
                f"the model was trained with the intensities {settings}: choose one for this scan with its `window` "
                "(command line: --window)"
            )
        return self.intensities[0] if window is None else window


RELEASED = Preparation(preprocess="released", storage="float32")
"""Preparation of the released weights."""


def encode_prompt(
    prompt: str,
    scan_count: int,
    tokenizer: Tokenizer,
    preparation: Preparation,
    *,
    context: str = "",
    place: str = "first",
    system: str = "",
    history: Sequence[tuple[str, str]] = (),
) -> Encoded:
    """Return the tokens of a prompt, at full length.

    Args:
      prompt: text in which `<image-1>` marks set the positions of scans, in any order. If there are marks, here or in
        `context`, each scan needs at least one. Without marks, `place` sets the position of all scans.
      context: known facts; inserted before the prompt. White space around all texts is removed.
      place: `first`, before all questions and the context; or `last`, after the prompt.
      system: how to answer; inserted first.
      history: earlier questions and answers. With the template `radfm` they are part of the context.
    Returns:
      Tokens. In `Encoded.scans`, the path of a scan is its number; `visual` refers to these scans.
    Raises:
      ValueError: the prompt is empty, a mark has no scan or a scan no mark, a mark is misspelt, or text is not valid
        Unicode.
    """
    if place not in PLACES:
        raise ValueError(f"place must be one of {', '.join(PLACES)} (got {place!r})")
    if not all(isinstance(text, str) for text in (prompt, context, system)):
        kinds = [type(text).__name__ for text in (prompt, context, system)]
        raise ValueError(f"prompt, context and system must be str (got {', '.join(kinds)})")
    prompt, context = clean_text(prompt), clean_text(context)
    if not prompt:
        raise ValueError("the prompt is empty: write a question")
    if not all(isinstance(turn, (list, tuple)) and [*map(type, turn)] == [str, str] for turn in history):
        raise ValueError("history must have pairs of texts: (question, answer)")
    turns = [tuple(map(clean_text, turn)) for turn in history]
    if preparation.template == "radfm":
        context = clean_text("\n".join([context, *map(" ".join, turns)]))
        turns = []
    # These are probably typing errors, so they are errors here, although training may read them as text.
    if misspelt := misspelt_marks(context, prompt):
        field, listed = "prompt" if misspelt[-1] in prompt else "context", ", ".join(misspelt)
        raise ValueError(f"the {field} contains {listed}, which is not a valid mark: write <image-1>")
    questions = [context, *(question for question, _ in turns), prompt]
    try:
        placed = place_scans(questions, scan_count, first=place == "first")
    except ValueError as error:
        raise ValueError(f"the prompt does not fit its scans: {error}") from None
    answers = [None, *(answer for _, answer in turns), None]
    parts: list[Text | ScanFile] = [Text(system, "system")] if system.strip() else []
    for i, (pieces, answer) in enumerate(zip(placed, answers, strict=True)):
        role = "instruction" if i else "context"
        parts += [Text(p, role) if isinstance(p, str) else ScanFile(str(p)) for p in pieces]
        parts += [Text(answer, "response")] if answer else []
    if not any(isinstance(p, Text) and p.text.strip() for p in parts):
        raise ValueError("the prompt has scans but no text: write a question")
    sample = Sample("1", "prompt", "vqa", None, tuple(parts))
    return encode(
        sample, tokenizer, NoTerms(), max_scans=max(scan_count, 1), num_latents=preparation.num_latents,
        max_tokens=2**31, mode=preparation.preprocess, template=preparation.template, prompt=True,
    )  # fmt: skip


def without_marks(text: str) -> str:
    """Replace marks and misspelt marks by words: `<image-2>` becomes `scan 2`."""
    return MARK_LIKE.sub(lambda mark: " ".join(["scan", *re.findall("[0-9]+", mark[0])]), text)


def visual_index(encoded: Encoded, num_latents: int) -> np.ndarray:
    """Return int32[t]: slot * L + latent at a visual token, -1 elsewhere; slot i is the i-th scan of the request."""
    slots = np.array([int(scan.path) for scan in encoded.scans] or [0], np.int32)
    scan, latent = encoded.visual.T
    return np.where(scan >= 0, slots[np.maximum(scan, 0)] * num_latents + latent, -1).astype(np.int32)


def read_scans(files: Sequence[Scan], preparation: Preparation) -> list[Volume]:
    """Read and prepare scans, in order.

    In `released` mode all scans of one prompt get the same depth, so pass them together. Doubtful contrast, shape or
    metadata cause a ScanNotice. Raises ValueError (a scans.ScanError) if a scan cannot be used; the message names it.
    """
    read = [_read(scan, number) for number, scan in enumerate(files, 1)]
    if preparation.preprocess == "released":
        if windowed := [name for name, _, _, window in read if parse_intensity(window).kind != "minmax"]:
            raise ValueError(f"{', '.join(windowed)}: released mode has no windows; remove the window")
        if not read:
            return []
        for name, voxels, header, _ in read:
            ends = header.value_range
            _warn(name, (*header.notices, *contrast_notices(voxels, *ends, (ends,), None, header.modality)))
        with as_scan_error(", ".join(name for name, *_ in read), "preparing it"):
            return released_volumes([voxels for _, voxels, _, _ in read], collate=preparation.size_3d == 256)
    volumes = []
    for name, voxels, header, window in read:
        try:
            volume = prepare_volume(
                voxels, window=preparation.window_of(window), storage=preparation.storage, sizes=preparation.sizes,
                fit=preparation.fit, measure=True, **header.facts,
            )  # fmt: skip
        except ValueError as error:
            raise scans.ScanError(name, str(error), fault="unsupported") from error
        _warn(name, (*header.notices, *volume.notices))
        volumes.append(volume)
    return volumes


def _warn(name: str, notices: Sequence[str]) -> None:
    for notice in notices:
        warnings.warn(f"{name}: {notice}", ScanNotice, stacklevel=3)


def scan_name(scan: Scan, number: int) -> str:
    """Return the name of a scan in messages and images; numbers start at 1."""
    if isinstance(scan, np.ndarray | Image.Image):
        return f"scan {number} ({'array' if isinstance(scan, np.ndarray) else 'image'})"
    return str(scan.path if isinstance(scan, ScanFile) else scan)


def _read(scan: Scan, number: int):
    """Return (name, voxels, header, window) of a scan."""
    name, window, selection, metadata = scan_name(scan, number), None, {}, ()
    if isinstance(scan, Image.Image):
        scan, metadata = pixels_of(name, scan)
        scan = scan[:, :, None]  # [H, W, 1] or [H, W, 1, 3]
    if isinstance(scan, np.ndarray):
        scan = scan[..., None] if scan.ndim == 2 else scan
        volumes, shape, axes = layout_of(name, scan.shape)
        check_volume(name, None, volumes, scans.ScanLimits())
        voxels = to_intensities(name, (scan[0] if scan.ndim == 5 else scan.reshape(shape)).transpose(axes))
        voxels, ends, notices = check_values(name, voxels)
        header = scans.Header(
            format="npy", shape=voxels.shape, dtype=scan.dtype.name, value_range=ends, notices=(*metadata, *notices)
        )
        return name, one_channel_if_gray(voxels), header, None
    if isinstance(scan, ScanFile):
        scan, selection, window = scan.path, scan.selection, scan.window
    elif not isinstance(scan, str | Path):
        raise ValueError(f"scan {number} is a {type(scan).__name__}: pass a path, samples.Scan, PIL image or array")
    voxels, header = scans.read(scan, **selection)
    return name, one_channel_if_gray(voxels), header, window


def scan_rows(
    volumes: Sequence[Volume | None], patches: int, plane_count: int, num_latents: int, channels: int = CHANNELS
) -> dict[str, np.ndarray]:
    """Return a batch of rows without text, with one scan in slot 0 of each row; None is an empty row.

    All volumes must have the same dtype and at most `patches` patches and `plane_count` planes. `channels` are those of
    the model.
    """
    limits = RowLimits(text_length=1, vision_rows=1, patch_length=patches, planes=plane_count, scans=1)
    first = next(volume for volume in volumes if volume is not None)
    options = {"plane_dtype": first.voxels.dtype, "channels": channels, "patch": first.patches.size}
    rows = []
    for volume in volumes:
        row = LoadedRow() if volume is None else LoadedRow(vision_rows={0: 0}, scans={0: ScanPlanes.of(volume)})
        rows.append((collate_row(row, limits, num_latents=num_latents, **options), None))
    return collate_batch(rows, plane_count).arrays


TILE, SLICES, CAPTION = 160, 8, 16


def slices_shown(volume: Volume) -> tuple[list[int], str]:
    """Return up to SLICES evenly spaced slices of a volume, and their numbers in the scan's file as text."""
    stored = volume.voxels.shape[2]
    chosen = np.unique(np.rint(np.linspace(0, stored - 1, min(SLICES, stored))).astype(int)).tolist()
    depth = volume.source[2] if volume.source else stored
    numbers = ", ".join(str(source_slice(i, stored, depth)) for i in chosen)
    return chosen, f"slices {numbers} of {depth}" if stored > 1 else "2D"


def preview_image(volumes: Sequence[Volume], names: Sequence[str]) -> Image.Image:
    """Draw the prepared volumes: a row of evenly spaced slices per scan, one slice for a 2D scan."""
    font, shown = ImageFont.load_default(11), [slices_shown(volume) for volume in volumes]
    captions = [
        f"<image-{k}> {name}: {' x '.join(map(str, volume.shape))}, {numbers}"
        for k, (volume, name, (_, numbers)) in enumerate(zip(volumes, names, shown, strict=True), 1)
    ]
    widths = [len(chosen) * (TILE + 4) for chosen, _ in shown] + [int(font.getlength(c)) + 4 for c in captions]
    page = Image.new("RGB", (max(widths, default=TILE), max(len(volumes), 1) * (TILE + CAPTION + 4)), "white")
    pen = ImageDraw.Draw(page)
    for k, (volume, caption, (chosen, _)) in enumerate(zip(volumes, captions, shown, strict=True)):
        top, values = k * (TILE + CAPTION + 4), volume.values()
        pen.text((2, top), caption, "black", font)
        for j, i in enumerate(chosen):
            pixels = np.rint(np.clip(values[:, :, i], 0, 1) * 255).astype(np.uint8)
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BILINEAR)
            page.paste(tile, (j * (TILE + 4), top + CAPTION))
    return page
