"""What the page is made from: volumes and texts as they come back out of the arrays of a row."""

import re

import numpy as np
import pytest

from input_pipeline import phantoms
from input_pipeline.batching import packing
from input_pipeline.batching.packing import Row, RowLimits
from input_pipeline.images.planes import Sizes, Volume, patch_grid, patch_positions, planes
from input_pipeline.images.released_volumes import released_volumes
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.inspect.pictures import volume_of_slot
from input_pipeline.inspect.texts import Speller, sample_tokens
from input_pipeline.text.tokenizer import Tokenizer

LATENTS = 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    data = tmp_path_factory.mktemp("phantoms") / "data"
    phantoms.write(data, train=1, test=1, size=64, workers=1)
    return Tokenizer(data / "tokenizer.model")


# --- volumes out of the arrays of a row -------------------------------------------------------------------------------


def placed(volume: Volume) -> packing.Planes:
    cut, index = planes(volume)
    return packing.Planes(cut, index, patch_positions(patch_grid(volume.shape)), volume.scale, volume.offset)


def row_of_volumes(volumes, places, limits):
    """The arrays of a row that holds volume i in places[i] = (slot, vision row)."""
    dtype = volumes[0].voxels.dtype
    return packing.assemble(
        Row([], dict(enumerate(places))), [], [], dict(enumerate(map(placed, volumes))), limits, plane_dtype=dtype
    )


def assert_same(found: Volume, volume: Volume):
    assert found.voxels.dtype == volume.voxels.dtype and found.voxels.shape == volume.voxels.shape
    assert found.voxels.tobytes() == volume.voxels.tobytes()
    assert (found.scale, found.offset) == (np.float32(volume.scale), np.float32(volume.offset))
    assert np.array_equal(found.values(), volume.values())


@pytest.mark.parametrize("storage", ["uint8", "int16", "float32"])
def test_volumes_come_back_bit_for_bit(storage):
    """Gray and colour 2D, gray and colour 3D, in two of three vision rows, slots in another order than vision rows."""
    rng, sizes = np.random.default_rng(0), Sizes(64, 96, 16)
    shapes = [(70, 60, 1, 1), (64, 64, 1, 3), (40, 50, 8, 1), (40, 50, 5, 3)]
    volumes = [
        prepare_volume(rng.integers(0, 4000, shape).astype(np.int16), storage=storage, sizes=sizes) for shape in shapes
    ]
    assert [v.voxels.shape[2:] for v in volumes] == [(1, 1), (1, 3), (8, 1), (4, 3)]
    arrays = row_of_volumes(volumes, [(3, 0), (0, 2), (1, 0), (2, 2)], RowLimits(8, 3, 32, 400, 5))
    for slot, number in ((3, 0), (0, 1), (1, 2), (2, 3)):
        assert_same(volume_of_slot(arrays, slot), volumes[number])
    with pytest.raises(ValueError, match="slot 4 holds no patches"):
        volume_of_slot(arrays, 4)


def test_a_slice_that_stands_for_eight_comes_back_as_one():
    """The released code brings the scans of a sample to one depth: its 2D scan is one slice, repeated."""
    rng = np.random.default_rng(1)
    scans_ = [rng.integers(0, 255, shape).astype(np.uint8) for shape in ((90, 80, 1, 1), (30, 30, 8, 1))]
    volumes = released_volumes(scans_)
    assert [v.shape[2] for v in volumes] == [8, 8]
    arrays = row_of_volumes(volumes, [(0, 0), (1, 1)], RowLimits(8, 2, 128, 1024, 2))
    for slot, volume in enumerate(volumes):
        assert_same(volume_of_slot(arrays, slot), volume)


def test_patches_stand_where_their_positions_say():
    """In whatever order they lie in their vision row; and not at all if one is there twice."""
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
    """As tokens.encode leaves them, weights being given for the tokens themselves."""
    ids = np.array(ids, np.int32)
    return {
        "ids": ids,
        "targets": np.append(ids[1:], 0),
        "weights": np.append(np.array(weights, np.float32)[1:], 0),
        "visual_index": np.full(len(ids), -1) if visual is None else np.array(visual),
        "key_ok": np.ones(len(ids), bool),
    }


def test_a_token_has_the_colour_of_its_own_weight(tokenizer):
    """
    <s> <image> a0 a1 </image>  ▁Why ?  ▁mild ▁lesion  .  </s>        L = 2, the scan in slot 3, "lesion" is a term
     0     0    0  0     0        0  0    1     3      1   1
    """
    words = [tokenizer.encode(word) for word in ("Why", "mild", "lesion")]
    marks, dot = [tokenizer.image_id, 0, 0, tokenizer.image_end_id], tokenizer.encode(".", starts_word=False)
    ids = [tokenizer.bos_id, *marks, *words[0], *words[1], *words[2], *dot, tokenizer.eos_id]
    n = [len(word) for word in words]
    weights = [0] * (5 + n[0]) + [1] * n[1] + [3] * n[2] + [1] * len(dot) + [1]
    arrays = text_arrays(ids, weights, [-1, -1, 6, 7] + [-1] * (len(ids) - 4))
    tokens, slots, odd = sample_tokens(arrays, Speller(tokenizer), 2, place=10)
    assert slots == (3,) and odd == []
    assert [(t.kind, t.places, t.image) for t in tokens[:2]] == [("bos", 1, 0), ("image", 4, 1)]
    assert tokens[-1].kind == "eos" and tokens[-1].weight == 1
    of_weight = lambda w: "".join(t.text for t in tokens if t.kind == "text" and t.weight == w)  # noqa: E731
    assert (of_weight(0), of_weight(1), of_weight(3)) == (" Why", " mild.", " lesion")
    assert [t.place for t in tokens] == [10, 11, *range(15, 10 + len(ids))]


def test_text_comes_back_token_by_token(tokenizer):
    """Spaces, line ends and characters that are spelled in bytes: nothing gets lost, and every piece is one token."""
    line_end = [i for i in range(tokenizer.vocab_size) if tokenizer.decode([i]) == "\n"][:1]
    ids = [*tokenizer.encode("Two lines:"), *line_end * 2, *tokenizer.encode("\u00e9\u4e2d\U0001fac0 end")]
    ids = [tokenizer.bos_id, *ids, tokenizer.eos_id]
    tokens, _, odd = sample_tokens(text_arrays(ids, [0] * len(ids)), Speller(tokenizer), LATENTS)
    assert "".join(token.text for token in tokens) == " Two lines:\n\n \u00e9\u4e2d\U0001fac0 end" and not odd
    assert [token.id for token in tokens] == ids
    assert sum(token.kind == "byte" for token in tokens) == 1 + 2 + 3


def test_what_is_odd_is_said(tokenizer):
    a, b = tokenizer.encode("a b")[-2:]
    v = tokenizer.vocab_size
    cases = [
        (text_arrays([1, a, b], [0, 0, 2]), r"a weight that is none of 0, 1, 3: place 1$"),
        (
            text_arrays([1, a, b], [0, 1, 1]) | {"targets": np.array([a, a, 0])},
            "not the next token of the text: place 1$",
        ),
        (text_arrays([1, a], [0, 1]) | {"weights": np.array([1, 1.0])}, "not the next token of the text: place 1$"),
        (text_arrays([1, v, 0, 0, v + 1], [0] * 5, [-1, -1, 4, 6, -1]), "without its visual tokens: place 1$"),
        (text_arrays([1, v + 5], [0] * 2), "outside the vocabulary: place 1$"),
    ]
    for arrays, words in cases:
        _, _, odd = sample_tokens(arrays, Speller(tokenizer), 2)
        assert any(re.search(words, said) for said in odd), (words, odd)
    left_out = text_arrays([1, v, 0, 0, v + 1, a], [0] * 6)
    tokens, slots, odd = sample_tokens(left_out, Speller(tokenizer), 2)
    assert [t.kind for t in tokens] == ["bos", "lost", "text"] and slots == () and odd == []
