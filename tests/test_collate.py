"""A row by hand: the arrays that a loaded row becomes."""

import numpy as np
import pytest

from input_pipeline.batching.collate import LoadedRow, ScanPlanes, collate_batch, collate_row
from input_pipeline.batching.plan import RowLimits
from input_pipeline.samples import Scan
from input_pipeline.text.tokens import Encoded


def encoded(ids, targets, weights, key_ok, visual, scans):
    return Encoded(
        np.array(ids),
        np.array(targets),
        np.array(weights, np.float32),
        np.array(visual),
        np.array(key_ok, bool),
        tuple(map(Scan, scans)),
    )


def test_a_row_by_hand():
    """Two samples show one scan (L = 2 latents, slot 1); the first also shows another (slot 0).

    ids           1  V  0  0  0  0  9   1  0  0  8   0         segments  1 1 1 1 1 1 1 2 2 2 2 0
    visual_index -1 -1  2  3  0  1 -1  -1  2  3 -1  -1         positions 0 1 2 3 4 5 6 0 1 2 3 0
    """
    first = encoded(
        [1, 90, 0, 0, 0, 0, 9],
        [0, 0, 0, 0, 0, 9, 0],
        [0, 0, 0, 0, 0, 3, 0],
        [1] * 7,
        [[-1, -1], [-1, -1], [0, 0], [0, 1], [1, 0], [1, 1], [-1, -1]],
        ["seven", "five"],
    )
    second = encoded(
        [1, 0, 0, 8], [0, 0, 8, 0], [0, 0, 1, 0], [1, 1, 1, 0], [[-1, -1], [0, 0], [0, 1], [-1, -1]], ["seven"]
    )
    scan = lambda n, value: ScanPlanes(  # noqa: E731  n patches of one plane each, repeated in 2 slices, 1 channel
        np.full((n, 2, 2), value, np.uint8),
        np.arange(n, dtype=np.int32).reshape(n, 1, 1).repeat(2, 1),
        np.full((n, 3), value, np.int32),
        scale=value / 255,
        offset=0.5,
    )
    limits = RowLimits(text_length=12, vision_rows=2, patch_length=3, planes=6, scans=3)
    planned = {"samples": [first, second], "slots": [(1, 0), (1,)], "vision_rows": {0: 1, 1: 0}}
    scans = {0: scan(2, 50), 1: scan(3, 70)}
    row = collate_row(LoadedRow(**planned, scans=scans), limits, num_latents=2)
    assert row["planes"][:, 0, 0].tolist() == [50, 50, 70, 70, 70]
    out = {name: array[0] for name, array in collate_batch([(row, None)], limits.planes).arrays.items()}
    assert out["ids"].tolist() == [1, 90, 0, 0, 0, 0, 9, 1, 0, 0, 8, 0]
    assert out["visual_index"].tolist() == [-1, -1, 2, 3, 0, 1, -1, -1, 2, 3, -1, -1]
    assert out["segments"].tolist() == [1] * 7 + [2] * 4 + [0]
    assert out["positions"].tolist() == [*range(7), *range(4), 0]
    assert out["key_ok"].tolist() == [True] * 10 + [False] * 2
    assert out["weights"].tolist() == [0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0]
    assert out["targets"].tolist() == [0, 0, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0]
    assert out["planes"][:, 0, 0].tolist() == [50, 50, 70, 70, 70, 0]
    assert out["patch_segments"].tolist() == [[2, 2, 2], [1, 1, 0]]
    assert out["plane_index"][:, :, 0, 0].tolist() == [[2, 3, 4], [0, 1, 0]]
    assert out["patch_positions"][1, :, 0].tolist() == [50, 50, 0]
    assert out["scan_rows"].tolist() == [1, 0, -1]
    np.testing.assert_allclose(out["scan_scale"], [50 / 255, 70 / 255, 1])
    assert out["scan_offset"].tolist() == [0.5, 0.5, 0]
    # Without the scan of slot 0, the slot is empty and the first sample, which shows it, has no weights.
    row = collate_row(LoadedRow(**planned, scans={1: scans[1]}), limits, num_latents=2)
    out = {name: array[0] for name, array in collate_batch([(row, None)], limits.planes).arrays.items()}
    assert out["scan_rows"].tolist() == [-1, 0, -1]
    assert out["visual_index"].tolist() == [-1] * 8 + [2, 3, -1, -1]
    assert out["weights"].tolist() == [0] * 9 + [1, 0, 0]
    assert out["planes"][:, 0, 0].tolist() == [70, 70, 70, 0, 0, 0]
    assert out["patch_segments"].tolist() == [[2, 2, 2], [0, 0, 0]]


def test_scan_larger_than_in_the_index_is_refused():
    scan = ScanPlanes(np.zeros((4, 2, 2), np.uint8), np.zeros((4, 1, 1), np.int32), np.zeros((4, 3), np.int32))
    limits = RowLimits(text_length=12, vision_rows=1, patch_length=3, planes=6, scans=3)
    with pytest.raises(
        ValueError, match="the scan in slot 0 has 4 planes of uint8 and 4 patches; .*index is out of date"
    ):
        collate_row(LoadedRow(vision_rows={0: 0}, scans={0: scan}), limits)
