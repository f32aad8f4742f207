"""Sizes in JPEG, JPEG 2000 and JPEG-LS streams."""

from __future__ import annotations

import io

import pytest
from PIL import Image
from scan_files import COLOUR

from input_pipeline.images.scans import codestream


def test_codestream_sizes():
    buffer = io.BytesIO()
    Image.fromarray(COLOUR).save(buffer, "JPEG")
    assert codestream.jpeg(buffer.getvalue()) == codestream.Size(5, 12, 3, 8)
    with pytest.raises(ValueError, match="end marker"):
        codestream.jpeg(buffer.getvalue()[:-2])
    with pytest.raises(ValueError, match="201 JPEG scans"):
        codestream.jpeg(b"\xff\xd8" + b"\xff\xda" * 201 + b"\xff\xd9")
    # 3 literals, one byte repeated 5 times, a no-op
    assert codestream.packbits_size(b"\x02abc\xfcx\x80", 100) == 8
    # Zeros after the expected size are padding; each pair of them would be one more byte.
    assert codestream.packbits_size(b"\x02abc" + bytes(9), 3) == 3
    assert codestream.packbits_size(b"\x02abc" + bytes(8) + b"\x01", 3) > 4
    assert codestream.packbits_size(b"\x02abc" + bytes(9), 100) == 8
