"""The HTML page of a study: one file with its images and style, no scripts, and nothing to download."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from markupsafe import Markup

from input_pipeline.images.scans.base import ScanError
from input_pipeline.images.scans.study.reading import OpenStudy
from input_pipeline.images.scans.study.survey import Series, Study
from input_pipeline.images.slices import slices_of
from input_pipeline.inspect import page as inspect_page
from input_pipeline.inspect.escaping import POLICY, visible
from input_pipeline.inspect.images import SliceImage, slice_image
from input_pipeline.series import report

GENERATOR = "input_pipeline.series"
SIDE = 192  # pixels of a thumbnail
SHOWN = 3  # slices of a volume
ELSEWHERE = ("series", "description", "notes")  # headings of the table that the page shows as titles and notices


@dataclasses.dataclass(frozen=True)
class SeriesView:
    """What the page shows about a series. `error`: why there is no image, or ""."""

    series: Series
    images: tuple[SliceImage, ...] = ()
    window: str = ""
    notices: tuple[str, ...] = ()
    error: str = ""

    @property
    def cells(self) -> list[tuple[str, str]]:
        """(heading, text) of the properties."""
        named = [*zip(report.HEADINGS, report.cells(self.series), strict=True), ("part", self.series.label)]
        return [(heading, text) for heading, text in named if text and heading not in ELSEWHERE]


def view(opened: OpenStudy, series: Series) -> SeriesView:
    """Return the view of a series: slices of its first volume, a CT in the window of its header."""
    if series.problem:  # it has names of files
        return SeriesView(series, error="some of its files cannot be read; the table of the command names them")
    try:
        voxels, header = opened.read(series, 0)
        shown = slices_of(voxels, header, opened.path, max_slices=SHOWN + 2, for_people=True)
    except ScanError as error:
        return SeriesView(series, error=f"cannot be read ({error.fault}); the table or --nifti gives the reason")
    inner = shown[1:-1] if len(shown) == SHOWN + 2 else shown[:SHOWN]  # the ends of a volume often show little
    images = tuple(slice_image(pixels_of(one.image), one.number, SIDE) for one in inner)
    return SeriesView(series, images, shown[0].window, header.notices)


def pixels_of(image) -> np.ndarray:
    pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def page(study: Study, views: Sequence[SeriesView]) -> str:
    """Return the HTML of the page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(visible(value)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = (inspect_page.FOLDER / "style.css").read_text()
    return environment.get_template("page.html").render(
        generator=GENERATOR, policy=Markup(POLICY), style=Markup(style), study=study, views=views
    )
