"""Parts of the HTML pages: head, tables and images.

Pages load nothing from outside and show every character of a text: see `input_pipeline.inspect.escaping.visible`.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence

from PIL import Image

from input_pipeline.inspect.escaping import POLICY, visible


def head(title: str, style: str, policy: str = POLICY) -> Iterator[str]:
    """Yield the head of a page and the start of its body. The default Content-Security-Policy forbids scripts."""
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{visible(title)}</title><style>\n{style}</style></head><body>"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], row_classes: Sequence[str] = ()) -> str:
    """Return a table. Cells are HTML; those that start with a digit, and `none`, are aligned as numbers."""
    cell = lambda text: f"<td{_class('n' if text[:1].isdigit() or text == 'none' else '')}>{text}</td>"  # noqa: E731
    body = "".join(
        f"<tr{_class(row_class)}>{''.join(map(cell, row))}</tr>"
        for row, row_class in zip(rows, row_classes or [""] * len(rows), strict=True)
    )
    return f"<table><tr>{''.join(f'<th>{visible(column)}</th>' for column in columns)}</tr>{body}</table>"


def image(content: bytes | Image.Image, description: str, css_class: str = "") -> str:
    """Return an embedded image. content: the bytes of a PNG file, or an image."""
    if isinstance(content, Image.Image):
        file = io.BytesIO()
        content.save(file, format="PNG")
        content = file.getvalue()
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    return f'<img{_class(css_class)} alt="{visible(description)}" src="{source}">'


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
