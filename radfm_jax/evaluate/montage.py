"""Scans as images for models that read 2D images.

    a 2D scan   one image, at most `size` pixels on its longer side
    a volume    one image of size x size pixels: `grid` x `grid` tiles of evenly spaced slices, the first and the last
                included, in the order of reading. A slice keeps its aspect ratio; the rest of its tile is black. With
                fewer slices than tiles, the last tiles are black.

Gray values run from black to white between the ends of the scan's window, or between the minimum and the maximum of the
whole scan. Images have pixels only, no header data. Text that is part of the pixels stays visible.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from pathlib import Path

from PIL import Image

from input_pipeline.images.slices import slices
from input_pipeline.samples import Scan


@dataclasses.dataclass(frozen=True)
class Layout:
    """Size of the images of scans."""

    grid: int = 4  # tiles per side of a volume's montage
    size: int = 1024  # pixels per side of a montage; the maximum of a 2D scan's longer side

    def __post_init__(self):
        if self.grid < 1 or self.size < 16 * self.grid:
            raise ValueError(
                f"a montage needs a grid of at least 1 and 16 pixels per tile (got grid {self.grid}, size {self.size})"
            )


@dataclasses.dataclass(frozen=True)
class ScanImage:
    """The image of a scan, and what it shows."""

    image: Image.Image
    numbers: tuple[int, ...]  # slices, from 1
    count: int  # slices of the scan
    low: float  # value that is black
    high: float  # value that is white

    def description(self) -> str:
        """Return a sentence that tells the model what the image shows; "" for a 2D scan."""
        if self.count == 1:
            return ""
        listed = ", ".join(map(str, self.numbers))
        return (
            f"{len(self.numbers)} of the {self.count} slices of one volume, row by row from the top left: slices "
            f"{listed}. Black is {self.low:g} and white {self.high:g} in the unit of the scan."
        )

    def data_url(self) -> str:
        """Return the image as a data URL of a PNG file."""
        content = io.BytesIO()
        self.image.save(content, format="PNG")
        return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def scan_image(scan: Scan, layout: Layout = Layout()) -> ScanImage:  # noqa: B008
    """Return the image of a scan. Raises ScanError, a ValueError, for a scan that cannot be used."""
    shown = slices(scan, layout.grid**2)
    first = shown[0]
    if first.count == 1:
        image = first.image
        image.thumbnail((layout.size, layout.size))
    else:
        tile = layout.size // layout.grid
        image = Image.new(first.image.mode, (tile * layout.grid, tile * layout.grid))
        for k, one in enumerate(shown):
            scale = tile / max(one.image.size)
            size = tuple(max(1, round(side * scale)) for side in one.image.size)
            row, column = divmod(k, layout.grid)
            corner = column * tile + (tile - size[0]) // 2, row * tile + (tile - size[1]) // 2
            image.paste(one.image.resize(size, Image.Resampling.BILINEAR), corner)
    return ScanImage(image, tuple(one.number for one in shown), first.count, first.low, first.high)


def image_tokens(layout: Layout) -> int:
    """Return an estimate of the tokens of one image: OpenAI's rule for GPT-4o, 85 plus 170 per tile of 512 pixels.

    The longer side is first reduced to 2048 pixels, then the shorter one to 768. Other models count differently.
    """
    side = min(layout.size, 768)
    return 85 + 170 * (-(-side // 512)) ** 2


def save(image: ScanImage, file: Path) -> None:
    """Save an image as PNG, for inspection by people."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.image.save(file, format="PNG")
