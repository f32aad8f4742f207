"""Volumes and texts rebuilt from the arrays of a row."""

import re

import numpy as np
import pytest

from input_pipeline import phantoms
from input_pipeline.batching.collate import LoadedRow, ScanPlanes, collate_row
from input_pipeline.batching.plan import RowLimits
from input_pipeline.images.planes import Sizes, Volume
from input_pipeline.images.released_volumes import released_volumes
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.inspect.images import volume_of_slot
from input_pipeline.inspect.tokens import TokenDecoder, sample_tokens
from input_pipeline.text.tokenizer import load_tokenizer

LATENTS = 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    data = tmp_path_factory.mktemp("phantoms") / "data"
    phantoms.write(data, train=1, test=1, size=64, workers=1)
    return load_tokenizer(data / "tokenizer.model")


# --- volumes out of the arrays of a row -------------------------------------------------------------------------------


def row_of_volumes(volumes, slots, limits):
    """Return the arrays of a row with volume i in slots[i] = (slot, vision row)."""
    scans = {slot: ScanPlanes.of(volume) for (slot, _), volume in zip(slots, volumes, strict=True)}
    row = LoadedRow(vision_rows=dict(slots), scans=scans)
    return collate_row(row, limits, plane_dtype=volumes[0].voxels.dtype)


def assert_same(rebuilt: Volume, volume: Volume):
    assert rebuilt.voxels.dtype == volume.voxels.dtype and rebuilt.voxels.shape == volume.voxels.shape
    assert rebuilt.voxels.tobytes() == volume.voxels.tobytes()
    assert (rebuilt.scale, rebuilt.offset) == (np.float32(volume.scale), np.float32(volume.offset))
    assert np.array_equal(rebuilt.values(), volume.values())


@pytest.mark.parametrize("storage", ["uint8", "int16", "float32"])
def test_rebuilt_volumes_are_bit_identical(storage):
    """Gray and colour 2D, gray and colour 3D, in two of three vision rows, with shuffled slots."""
    rng, sizes = np.random.default_rng(0), Sizes(64, 96, 16)
    shapes = [(70, 60, 1, 1), (64, 64, 1, 3), (40, 50, 8, 1), (40, 50, 5, 3)]
    volumes = [
        prepare_volume(rng.integers(0, 4000, shape).astype(np.int16), storage=storage, sizes=sizes) for shape in shapes
    ]
    assert [v.voxels.shape[2:] for v in volumes] == [(1, 1), (1, 3), (8, 1), (4, 3)]
    arrays = row_of_volumes(volumes, [(3, 0), (0, 2), (1, 0), (2, 2)], RowLimits(8, 3, 32, 400, 5))
    for slot, number in ((3, 0), (0, 1), (1, 2), (2, 3)):
        assert_same(volume_of_slot(arrays, slot), volumes[number])
    with pytest.raises(ValueError, match="slot 4 has no patches"):
        volume_of_slot(arrays, 4)


def test_repeated_slice_is_rebuilt_once():
    """The released code gives the scans of a sample one depth: its 2D scan is one slice, repeated."""
    rng = np.random.default_rng(1)
    scans_ = [rng.integers(0, 255, shape).astype(np.uint8) for shape in ((90, 80, 1, 1), (30, 30, 8, 1))]
    volumes = released_volumes(scans_)
    assert [v.shape[2] for v in volumes] == [8, 8]
    arrays = row_of_volumes(volumes, [(0, 0), (1, 1)], RowLimits(8, 2, 128, 1024, 2))
    for slot, volume in enumerate(volumes):
        assert_same(volume_of_slot(arrays, slot), volume)


def test_patches_in_any_order():
    """Positions alone decide where a patch is; a repeated patch is an error."""
    volume = prepare_volume(np.random.default_rng(2).random((64, 64, 8, 1), np.float32), sizes=Sizes(64, 64, 8))
    arrays = row_of_volumes([volume], [(0, 0)], RowLimits(8, 1, 8, 40, 1))
    mixed = np.random.default_rng(3).permutation(8)
    for name in ("plane_index", "patch_positions"):
        arrays[name][0] = arrays[name][0][mixed]
    assert_same(volume_of_slot(arrays, 0), volume)
    arrays["patch_positions"][0, 0] = arrays["patch_positions"][0, 1]
    with pytest.raises(ValueError, match="the 8 patches of slot 0 do not cover a volume"):
        volume_of_slot(arrays, 0)


# --- texts out of the arrays of a row ---------------------------------------------------------------------------------


def text_arrays(ids, weights, visual=None):
    """Return the arrays of tokens.encode, from the weights of the tokens themselves."""
    ids = np.array(ids, np.int32)
    return {
        "ids": ids,
        "targets": np.append(ids[1:], 0),
        "weights": np.append(np.array(weights, np.float32)[1:], 0),
        "visual_index": np.full(len(ids), -1) if visual is None else np.array(visual),
        "key_ok": np.ones(len(ids), bool),
    }


def test_token_has_its_own_weight(tokenizer):
    """A token carries the weight with which it is predicted.

    <s> <image> a0 a1 </image>  ▁Why ?  ▁mild ▁lesion  .  </s>        L = 2, the scan in slot 3, "lesion" is a term
     0     0    0  0     0        0  0    1     3      1   1
    """
    words = [tokenizer.encode(word) for word in ("Why", "mild", "lesion")]
    marks, dot = [tokenizer.image_id, 0, 0, tokenizer.image_end_id], tokenizer.encode(".", separator="")
    ids = [tokenizer.bos_id, *marks, *words[0], *words[1], *words[2], *dot, tokenizer.eos_id]
    n = [len(word) for word in words]
    weights = [0] * (5 + n[0]) + [1] * n[1] + [3] * n[2] + [1] * len(dot) + [1]
    arrays = text_arrays(ids, weights, [-1, -1, 6, 7] + [-1] * (len(ids) - 4))
    tokens, slots, warnings = sample_tokens(arrays, TokenDecoder(tokenizer), 2, place=10)
    assert slots == (3,) and warnings == []
    assert [(t.kind, t.places, t.image) for t in tokens[:2]] == [("bos", 1, 0), ("image", 4, 1)]
    assert tokens[-1].kind == "eos" and tokens[-1].weight == 1
    of_weight = lambda w: "".join(t.text for t in tokens if t.kind == "text" and t.weight == w)  # noqa: E731
    assert (of_weight(0), of_weight(1), of_weight(3)) == (" Why", " mild.", " lesion")
    assert [t.place for t in tokens] == [10, 11, *range(15, 10 + len(ids))]


def test_text_is_rebuilt_token_by_token(tokenizer):
    """Spaces, line breaks and characters of several bytes are kept, and every piece is one token."""
    line_end = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\n"][:1]
    ids = [*tokenizer.encode("Two lines:"), *line_end * 2, *tokenizer.encode("\u00e9\u4e2d\U0001fac0 end")]
    ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    tokens, _, warnings = sample_tokens(text_arrays(ids, [0] * len(ids)), TokenDecoder(tokenizer), LATENTS)
    assert "".join(token.text for token in tokens) == " Two lines:\n\n \u00e9\u4e2d\U0001fac0 end" and not warnings
    assert [token.id for token in tokens] == ids
    assert sum(token.kind == "byte" for token in tokens) == 1 + 2 + 3


def test_inconsistent_arrays_are_reported(tokenizer):
    a, b = tokenizer.encode("a b")[-2:]
    v = tokenizer.vocab_size
    cases = [
        (text_arrays([1, a, b], [0, 0, 2]), r"a weight other than 0, 1, 3: position 1$"),
        (
            text_arrays([1, a, b], [0, 1, 1]) | {"targets": np.array([a, a, 0])},
            "not the next token of the text: position 1$",
        ),
        (text_arrays([1, a], [0, 1]) | {"weights": np.array([1, 1.0])}, "not the next token of the text: position 1$"),
        (text_arrays([1, v, 0, 0, v + 1], [0] * 5, [-1, -1, 4, 6, -1]), "without its visual tokens: position 1$"),
        (text_arrays([1, v + 5], [0] * 2), "outside the vocabulary: position 1$"),
    ]
    for arrays, pattern in cases:
        _, _, warnings = sample_tokens(arrays, TokenDecoder(tokenizer), 2)
        assert any(re.search(pattern, warning) for warning in warnings), (pattern, warnings)
    left_out = text_arrays([1, v, 0, 0, v + 1, a], [0] * 6)
    tokens, slots, warnings = sample_tokens(left_out, TokenDecoder(tokenizer), 2)
    assert [t.kind for t in tokens] == ["bos", "lost", "text"] and slots == () and warnings == []
