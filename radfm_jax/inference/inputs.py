"""A prompt and scans -> tokens and volumes, without a data set and without an index: what a user asks a trained model.

    question = encode_prompt("<image-1> Compare with <image-2>.", 2, tokenizer, preparation)
    volumes = read_scans(["ct.nii.gz", "old_cxr.png"], preparation)
    batch = one_row(question, volumes)               # as training sees it: one sample, alone in its row

Text and scans go the way that training's go (`tokens.encode`, `scans.read`, `volumes`, `packing.assemble`).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from input_pipeline.batching import packing
from input_pipeline.config import DataConfig
from input_pipeline.images import scans
from input_pipeline.images.intensity import one_channel_if_gray
from input_pipeline.images.planes import MODES, STORAGE, Sizes, Volume, patch_grid, patch_positions, planes
from input_pipeline.images.released_volumes import released_volumes
from input_pipeline.images.scans.access import as_scan_error
from input_pipeline.images.scans.arrays import layout_of
from input_pipeline.images.scans.checks import check_values, check_volume, to_intensities
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.samples import Sample, Text
from input_pipeline.samples import Scan as ScanFile
from input_pipeline.sources import NoTerms
from input_pipeline.text.marks import parse_marks
from input_pipeline.text.tokenizer import Tokenizer
from input_pipeline.text.tokens import Encoded, encode

PLACES = ("first", "last")
# What somebody wrote who meant a mark: `<image>`, `<image1>`, `<Image-1>`, `<image 1>`.
_NEARLY_A_MARK = re.compile(r"<\s*image[\s_-]*[0-9]*\s*>", re.IGNORECASE)
Scan = str | Path | ScanFile | np.ndarray
"""A path, a path with the volume of a 4D file or a window (samples.Scan), or voxels: [H, W, D], [H, W, D, C]."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How scans and texts were prepared for a model: the fields of DataConfig that a question needs.

    In `released` mode pictures become 512 x 512 and volumes `size_3d` x `size_3d`: 256 as in the released training, or
    512 as in its test program. size_2d, depth and storage have no meaning there.
    """

    preprocess: str = "paper"
    storage: str = "uint8"
    size_2d: int = 512
    size_3d: int = 256
    depth: int = 64
    num_latents: int = 32
    text_length: int = 2048

    def __post_init__(self):
        problems = []
        for field, known in (("preprocess", MODES), ("storage", STORAGE)):
            if getattr(self, field) not in known:
                problems.append(f"{field} is {getattr(self, field)!r}; known: {', '.join(known)}")
        if self.preprocess == "released" and self.size_3d not in (256, 512):
            problems.append(f"size_3d is {self.size_3d}: released volumes have 256 or 512 pixels a side")
        if not problems:
            try:
                _ = self.sizes
            except ValueError as error:
                problems.append(f"size_2d, size_3d, depth: {error}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def sizes(self) -> Sizes:
        return Sizes(self.size_2d, self.size_3d, self.depth)

    @classmethod
    def of(cls, config: DataConfig) -> Preparation:
        """That of a training run."""
        return cls(**{f.name: getattr(config, f.name) for f in dataclasses.fields(cls)})


RELEASED = Preparation(preprocess="released", storage="float32")
"""What the released weights were trained with."""


# --- text -------------------------------------------------------------------------------------------------------------


def encode_prompt(
    prompt: str,
    n_scans: int,
    tokenizer: Tokenizer,
    preparation: Preparation,
    *,
    context: str = "",
    place: str = "first",
) -> Encoded:
    """Tokens of a prompt that a model is to continue; nothing is cut, however long it is.

    Args:
      prompt: the question. `<image-1>` marks say where scans stand, in any order and as often as wanted, each at least
        once, here or in `context`. Without any mark the scans stand where `place` says.
      context: what is known of the patient, or was said before; it stands before the prompt.
      place: `first`, before the context; or `last`, behind the prompt.
    Returns:
      Tokens whose `visual` numbers are those of the scans in `Encoded.scans`, which hold their number as path.
    Raises:
      ValueError: an empty prompt, a mark without scan, a scan without mark, what is nearly a mark, text that is not
        valid Unicode.
    """
    if place not in PLACES:
        raise ValueError(f"place is {place!r}; known: {', '.join(PLACES)}")
    if not isinstance(prompt, str) or not isinstance(context, str):
        raise ValueError(f"prompt and context are texts, got {type(prompt).__name__} and {type(context).__name__}")
    if not prompt.strip():
        raise ValueError("the prompt is empty: write a question")
    found = _NEARLY_A_MARK.findall(f"{context} {prompt}")
    nearly = [mark for mark in found if not re.fullmatch("<image-[0-9]+>", mark)]
    if nearly:  # as text it would be asked with the scan in another place, or with none
        where, said = "prompt" if nearly[-1] in prompt else "context", ", ".join(dict.fromkeys(nearly))
        raise ValueError(f"the {where} holds {said}, which is no mark: write <image-1>")
    texts = [("context", context), ("instruction", prompt)]
    try:
        parsed = parse_marks([text for _, text in texts], 0)
    except ValueError:  # there are marks, so each scan needs one
        try:
            parsed = parse_marks([text for _, text in texts], n_scans)
        except ValueError as error:
            raise ValueError(f"the prompt does not fit its scans: {error}") from None
        leading = trailing = ()
    else:
        marks = tuple(range(n_scans))
        leading, trailing = (marks, ()) if place == "first" else ((), marks)
    parts = [ScanFile(str(i)) for i in leading]
    for (role, _), pieces in zip(texts, parsed, strict=True):
        parts += [Text(p, role) if isinstance(p, str) else ScanFile(str(p)) for p in pieces]
    parts += [ScanFile(str(i)) for i in trailing]
    if not any(isinstance(p, Text) and p.text.strip() for p in parts):
        raise ValueError("the prompt has scans but no words: write a question")
    sample = Sample("1", "prompt", "vqa", None, tuple(parts))
    return encode(
        sample,
        tokenizer,
        NoTerms(),
        max_scans=max(n_scans, 1),
        num_latents=preparation.num_latents,
        max_tokens=2**31,
        mode=preparation.preprocess,
        prompt=True,
    )


def without_marks(text: str) -> str:
    """`<image-2>`, and what is nearly a mark, as words: `scan 2`."""
    return _NEARLY_A_MARK.sub(lambda mark: " ".join(["scan", *re.findall("[0-9]+", mark[0])]), text)


def visual_index(encoded: Encoded, num_latents: int) -> np.ndarray:
    """int32[t]: slot * L + latent of a visual token, -1 elsewhere; slot i is the i-th scan as it was given."""
    numbers = np.array([int(scan.path) for scan in encoded.scans] or [0], np.int32)
    which, latent = encoded.visual.T
    return np.where(which >= 0, numbers[np.maximum(which, 0)] * num_latents + latent, -1).astype(np.int32)


# --- scans ------------------------------------------------------------------------------------------------------------


def read_scans(given: Sequence[Scan], preparation: Preparation) -> list[Volume]:
    """Scans as a model of this preparation reads them, in the order given. In `released` mode the scans of one question
    are brought to one depth, so they must be given together.

    Raises:
      ValueError (scans.ScanError): a scan that cannot be used, by its name.
    """
    read = [_read(scan, number) for number, scan in enumerate(given, 1)]
    if preparation.preprocess == "released":
        if windowed := [name for name, _, _, window in read if window is not None]:
            raise ValueError(f"{', '.join(windowed)}: released mode has no windows; leave the window out")
        if not read:
            return []
        names = ", ".join(name for name, *_ in read)
        with as_scan_error(names, "preparing it"):
            return released_volumes([voxels for _, voxels, _, _ in read], collate=preparation.size_3d == 256)
    volumes = []
    for name, voxels, header, window in read:
        try:
            volumes.append(
                prepare_volume(
                    voxels,
                    window=window,
                    storage=preparation.storage,
                    sizes=preparation.sizes,
                    padding=None if header is None else header.padding,
                    value_range=None if header is None else header.value_range,
                )
            )
        except ValueError as error:
            raise scans.ScanError(name, str(error), fault="unsupported") from error
    return volumes


def scan_name(scan: Scan, number: int) -> str:
    """What messages and pictures call a scan; numbers run from 1."""
    if isinstance(scan, np.ndarray):
        return f"scan {number} (array)"
    return str(scan.path if isinstance(scan, ScanFile) else scan)


def _read(scan: Scan, number: int):
    """(name, voxels, header or None, window) of a scan."""
    name, window, volume = scan_name(scan, number), None, None
    if isinstance(scan, np.ndarray):
        volumes, shape, axes = layout_of(name, scan.shape)
        check_volume(name, None, volumes, scans.ScanLimits())
        voxels = to_intensities(name, (scan[0] if scan.ndim == 5 else scan.reshape(shape)).transpose(axes))
        check_values(name, voxels)
        return name, one_channel_if_gray(voxels), None, None
    if isinstance(scan, ScanFile):
        scan, volume, window = scan.path, scan.volume, scan.window
    elif not isinstance(scan, str | Path):
        raise ValueError(f"scan {number} is a {type(scan).__name__}: give a path, a samples.Scan or an array")
    voxels, header = scans.read(scan, volume=volume)
    return name, one_channel_if_gray(voxels), header, window


# --- rows -------------------------------------------------------------------------------------------------------------


def as_planes(volume: Volume) -> packing.Planes:
    """A volume as it enters a row."""
    cut, index = planes(volume)
    return packing.Planes(cut, index, patch_positions(patch_grid(volume.shape)), volume.scale, volume.offset)


def one_row(encoded: Encoded, volumes: Sequence[Volume], num_latents: int) -> dict[str, np.ndarray]:
    """The batch of one row that holds this prompt and its scans alone (drawn in radfm_jax/models/radfm.py)."""
    numbers = [int(scan.path) for scan in encoded.scans]
    shown = {number: as_planes(volumes[number]) for number in numbers}
    limits = packing.RowLimits(
        text_length=len(encoded.ids),
        vision_rows=max(len(volumes), 1),
        patch_length=max((len(p.plane_index) for p in shown.values()), default=1),
        planes=max(sum(len(p.planes) for p in shown.values()), 1),
        scans=max(len(volumes), 1),
    )
    row = packing.Row([0], {number: (number, number) for number in numbers})
    dtype = volumes[0].voxels.dtype if volumes else np.dtype(np.uint8)
    arrays = packing.assemble(row, [encoded], [numbers], shown, limits, num_latents=num_latents, plane_dtype=dtype)
    return {name: array[None] for name, array in arrays.items()}


def scan_rows(
    volumes: Sequence[Volume | None], patches: int, plane_count: int, num_latents: int
) -> dict[str, np.ndarray]:
    """A batch of rows without text, one scan in slot 0 of each, with room for so many patches and planes. None: an
    empty row. All volumes have one dtype."""
    limits = packing.RowLimits(text_length=1, vision_rows=1, patch_length=patches, planes=plane_count, scans=1)
    dtype = next(volume.voxels.dtype for volume in volumes if volume is not None)
    rows = []
    for volume in volumes:
        shown = {} if volume is None else {0: as_planes(volume)}
        row = packing.Row([], {number: (0, 0) for number in shown})
        rows.append(packing.assemble(row, [], [], shown, limits, num_latents=num_latents, plane_dtype=dtype))
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


# --- what the model saw -----------------------------------------------------------------------------------------------

TILE, SLICES, CAPTION = 160, 8, 16


def picture(volumes: Sequence[Volume], names: Sequence[str]) -> Image.Image:
    """A row of slices for each scan as the model sees it, from the first to the last; 2D scans have one."""
    page = Image.new("RGB", (SLICES * (TILE + 4), max(len(volumes), 1) * (TILE + CAPTION + 4)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)
    for k, (volume, name) in enumerate(zip(volumes, names, strict=True)):
        top, stored = k * (TILE + CAPTION + 4), volume.voxels.shape[2]
        chosen = np.unique(np.rint(np.linspace(0, stored - 1, min(SLICES, stored))).astype(int))
        numbers = f"slices {', '.join(str(i + 1) for i in chosen)} of {stored}" if stored > 1 else "2D"
        pen.text((2, top), f"<image-{k + 1}> {name}: {' x '.join(map(str, volume.shape))}, {numbers}", "black", font)
        values = volume.values()
        for j, i in enumerate(chosen):
            pixels = np.rint(np.clip(values[:, :, i], 0, 1) * 255).astype(np.uint8)
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.BILINEAR)
            page.paste(tile, (j * (TILE + 4), top + CAPTION))
    return page
