"""Samples in a packed row give the same results as alone, and no sample affects another.

The row of all tests below has L = 2 visual tokens per scan. V is `<image>`, W is `</image>`, . a position whose id is
not read. No token attends to 30 or to an EOS. Segment 1 is sample A, 2 is B, 3 is C, 4 is D:

    ids           1  V  .  .  W 11 12 13  2   1  V  .  .  W 14  V  .  .  W 15 16 17  2
    visual_index -1 -1  0  1 -1 -1 -1 -1 -1  -1 -1  2  3 -1 -1 -1  4  5 -1 -1 -1 -1 -1
    segments      1  1  1  1  1  1  1  1  1   2  2  2  2  2  2  2  2  2  2  2  2  2  2
    positions     0  1  2  3  4  5  6  7  8   0  1  2  3  4  5  6  7  8  9 10 11 12 13
    key_ok        1  1  1  1  1  1  1  1  0   1  1  1  1  1  1  1  1  1  1  1  1  1  0
    targets       .  .  .  .  .  . 13  2  .   .  .  .  .  .  .  .  .  .  . 16 17  2  .
    weights       0  0  0  0  0  0  3  1  0   0  0  0  0  0  0  0  0  0  0  1  3  1  0

    ids           1 18 19 30 20 21  2   1  V  .  .  W 22 23 24  2   0  0  0  0  0
    visual_index -1 -1 -1 -1 -1 -1 -1  -1 -1  2  3 -1 -1 -1 -1 -1  -1 -1 -1 -1 -1
    segments      3  3  3  3  3  3  3   4  4  4  4  4  4  4  4  4   0  0  0  0  0
    positions     0  1  2  3  4  5  6   0  1  2  3  4  5  6  7  8   0  0  0  0  0
    key_ok        1  1  1  0  1  1  0   1  1  1  1  1  1  1  1  0   0  0  0  0  0
    targets       .  .  .  . 21  2  .   .  .  .  .  . 23 24  2  .   .  .  .  .  .
    weights       0  0  0  0  1  1  0   0  0  0  0  0  1  1  3  0   0  0  0  0  0

    scan slot             0 cxr             1 ct              2 mr              3 empty
    voxels                8 x 8 gray, 2D    8 x 4 x 4         4 x 12 x 4
    patches               2 x 2 x 1         2 x 1 x 2         1 x 3 x 2
    planes                0-3, each 2 x 3   4-11, each 3      12-23, each 3     times in a patch of 2 slices, 3 channels
    scan_rows             0                 0                 1                -1
    of samples            A                 B and D           B

    patch_segments        1 1 1 1 2 2 2 2 0 0 0 0      vision row 0
                          3 3 3 3 3 3 0 0 0 0 0 0      vision row 1
"""

import golden
import jax
import numpy as np
import packed
import parity
import pytest
import torch
import torch_radfm
from packed import CONFIG, SAMPLES, SCANS, SIZES, Sample

from radfm_jax.models.radfm import RadFM
from radfm_jax.models.vit3d import PatchEmbedding
from radfm_jax.training.losses import radfm_loss

PARAMS = parity.recipe_params(CONFIG)
SEGMENT = {name: i for i, name in enumerate(SAMPLES, 1)}
SLOT = {name: i for i, name in enumerate(SCANS)}

# Tolerances, with the largest difference measured on the CPU.
ATOL = 2e-5  # outputs: alone and at other positions 0, float32 voxels 5.3e-6, PyTorch 5.4e-6 (logits reach 10)
LOSS_RTOL = 1e-6  # of the sum: 1.3e-7
GRADS = 5e-5  # of a tensor's largest value: alone 2.2e-6, float32 voxels 1.1e-5


@jax.jit
def run(params, batch) -> dict:
    """Return all outputs for a row, and the gradients of the summed loss. Compiled once per dtype of voxels."""
    model = RadFM(CONFIG)

    def loss(params):
        total, weight, out = radfm_loss(model, params, batch, chunk=16)
        return total, {**out, "sum": total, "weight": weight}

    grads, out = jax.grad(loss, has_aux=True)(params)
    return {**out, "grads": grads, "logits": model.apply({"params": params}, batch)[0]}


def evaluate(batch) -> dict:
    return jax.tree.map(np.asarray, run(PARAMS, batch))


def all_four(dtype=np.int16, scans=SCANS) -> dict:
    return packed.row(SAMPLES.values(), scans, dtype=dtype, **SIZES)


def as_float(scans=SCANS) -> dict:
    return {name: scan.expand() for name, scan in scans.items()}


def only(batch, sample: str) -> dict:
    """Return the batch with the weights of one sample only."""
    return {**batch, "weights": np.where(batch["segments"] == SEGMENT[sample], batch["weights"], 0)}


def largest(tree) -> float:
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def difference(ours, theirs) -> float:
    return largest(jax.tree.map(lambda a, b: a.astype(np.float64) - b, ours, theirs))


def assert_equal_trees(ours, theirs):
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (ours, theirs)), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def assert_same_for(sample: str, before: dict, after: dict, grads: bool = True):
    """Assert that a sample's outputs, and with `grads` the gradients of its loss, are bit-identical."""
    mask = before["segments"] == SEGMENT[sample]
    for key in ("logits", "token_loss", "correct", "embeddings", "nonfinite_tokens"):
        np.testing.assert_array_equal(before[key][mask], after[key][mask], err_msg=f"{key} of {sample}")
    if grads:
        assert np.isfinite(largest(before["grads"])) and largest(before["grads"]) > 1e-3
        assert_equal_trees(before["grads"], after["grads"])


def outcome(batch) -> dict:
    return {**evaluate(batch), "segments": batch["segments"]}


def test_row_matches_the_drawing_above():
    batch = {k: v[0] for k, v in all_four().items()}
    lines = [line.split() for line in __doc__.splitlines()]
    drawn = {}
    for name, *numbers in (line for line in lines if line and line[0] in batch and len(line) > 15):
        drawn.setdefault(name, []).extend(numbers)
    words = {"V": 40, "W": 41, ".": 0}
    for name in ("ids", "visual_index", "segments", "positions", "key_ok", "targets", "weights"):
        numbers = [words.get(n, n) for n in drawn[name]]
        np.testing.assert_array_equal(batch[name], np.array(numbers, np.float64), err_msg=name)
    np.testing.assert_array_equal(batch["patch_segments"], [[1] * 4 + [2] * 4 + [0] * 4, [3] * 6 + [0] * 6])
    np.testing.assert_array_equal(batch["scan_rows"], [0, 0, 1, -1])
    np.testing.assert_array_equal(batch["plane_index"][0, 1], np.full((2, 3), 1))
    np.testing.assert_array_equal(batch["plane_index"][0, 5], [[6] * 3, [7] * 3])
    np.testing.assert_array_equal(batch["plane_index"][1, 0], [[12] * 3, [13] * 3])


# --- a sample alone ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed_together():
    return outcome(all_four())


@pytest.fixture(scope="module")
def alone():
    return {name: outcome(packed.row([sample], **SIZES)) for name, sample in SAMPLES.items()}


def test_sample_gives_the_same_alone(packed_together, alone):
    for name in SAMPLES:
        mask, own = packed_together["segments"] == SEGMENT[name], alone[name]["segments"] == 1
        for key in ("logits", "token_loss", "embeddings"):
            np.testing.assert_allclose(
                packed_together[key][mask], alone[name][key][own], rtol=0, atol=ATOL, err_msg=key
            )
        np.testing.assert_array_equal(packed_together["correct"][mask], alone[name]["correct"][own])


def test_losses_and_gradients_add_up(packed_together, alone):
    total = sum(one["sum"].astype(np.float64) for one in alone.values())
    assert packed_together["weight"] == sum(one["weight"] for one in alone.values()) == 16
    np.testing.assert_allclose(packed_together["sum"], total, rtol=LOSS_RTOL)
    summed = jax.tree.map(lambda *g: sum(x.astype(np.float64) for x in g), *(one["grads"] for one in alone.values()))
    for (path, ours), (_, theirs) in zip(
        *(jax.tree_util.tree_leaves_with_path(t) for t in (packed_together["grads"], summed)), strict=True
    ):
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=GRADS * np.abs(theirs).max(), err_msg=jax.tree_util.keystr(path)
        )


# --- samples do not affect each other ---------------------------------------------------------------------------------


def with_other_ids(batch) -> dict:
    ids = np.where((batch["segments"] == SEGMENT["A"]) & (batch["ids"] < 40), (batch["ids"] + 7) % 40, batch["ids"])
    return {**batch, "ids": ids.astype(np.int32)}


def with_other_voxels(batch) -> dict:
    planes = batch["planes"].copy()
    planes[:, :4] = planes[:, :4][..., ::-1] + 3
    return {**batch, "planes": planes}


def with_scale(value: float, key: str = "scan_scale"):
    def change(batch) -> dict:
        scale = batch[key].copy()
        scale[:, SLOT["cxr"]] = value
        return {**batch, key: scale}

    return change


def without_a(batch) -> dict:
    """Turn A's tokens and patches into padding, in place."""
    tokens = batch["segments"] == SEGMENT["A"]
    patches = batch["patch_segments"] == SLOT["cxr"] + 1
    slots = np.arange(SIZES["slots"]) == SLOT["cxr"]
    empty = {"ids": 0, "visual_index": -1, "segments": 0, "positions": 0, "key_ok": False, "targets": 0, "weights": 0}
    out = {k: np.where(tokens, v, batch[k]).astype(batch[k].dtype) for k, v in empty.items()}
    for key in ("plane_index", "patch_segments", "patch_positions"):
        where = patches.reshape(*patches.shape, *(1,) * (batch[key].ndim - 3))
        out[key] = np.where(where, 0, batch[key])
    out["scan_rows"] = np.where(slots, -1, batch["scan_rows"])
    out |= {k: np.where(slots, np.float32(0), batch[k]) for k in ("scan_scale", "scan_offset")}
    return {**batch, **out}


CHANGES = {
    "ids": with_other_ids,
    "voxels": with_other_voxels,
    "scale": with_scale(0.01),
    "scale_nan": with_scale(np.nan),
    "offset_inf": with_scale(np.inf, "scan_offset"),
    "scale_huge": with_scale(3e38),  # finite, but voxel * scale is not
    "removed": without_a,
}


@pytest.fixture(scope="module")
def only_b():
    return outcome(only(all_four(), "B"))


@pytest.mark.parametrize("change", CHANGES)
def test_a_changes_nothing_for_b(change, only_b):
    before, batch = all_four(), CHANGES[change](all_four())
    mask = batch["segments"] == SEGMENT["A"]
    after = {**outcome(only(batch, "B")), "segments": before["segments"]}
    for other in ("B", "C", "D"):
        assert_same_for(other, only_b, after)
    if mask.any():  # the change has an effect on A itself
        assert not np.array_equal(only_b["logits"][mask], after["logits"][mask])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])  # the last is finite, but not its square
def test_non_finite_voxel_affects_only_its_sample(value):
    before = all_four(np.float32, as_float())
    after = {**before, "planes": before["planes"].copy()}
    after["planes"][0, 5, 0, 1] = value  # one voxel of A's scan
    clean, dirty = outcome(only(before, "B")), outcome(only(after, "B"))
    assert not clean["nonfinite_scans"].any() and not clean["nonfinite_tokens"].any()
    np.testing.assert_array_equal(dirty["nonfinite_scans"], [[True, False, False, False]])
    np.testing.assert_array_equal(dirty["nonfinite_tokens"], after["segments"] == SEGMENT["A"])
    assert np.isnan(dirty["logits"][dirty["nonfinite_tokens"]]).all()
    assert np.isfinite(dirty["logits"][~dirty["nonfinite_tokens"]]).all()
    for other in ("B", "C", "D"):
        assert_same_for(other, clean, dirty)

    whole = outcome(after)  # A's losses and the sum are NaN; the losses of the others are unchanged
    clean = outcome(before)
    trained = (after["segments"] == SEGMENT["A"]) & (after["weights"] > 0)
    assert np.isnan(whole["token_loss"][trained]).all() and np.isnan(whole["sum"])
    for other in ("B", "C", "D"):
        assert_same_for(other, clean, whole, grads=False)


def test_unused_planes_may_have_any_value():
    before = all_four(np.float32, as_float())
    after = {**before, "planes": before["planes"].copy()}
    used = np.unique(before["plane_index"])
    after["planes"][:, np.setdiff1d(np.arange(SIZES["planes"]), used)] = np.nan
    clean, dirty = outcome(before), outcome(after)
    assert not dirty["nonfinite_scans"].any() and np.isfinite(dirty["logits"]).all()
    assert_equal_trees(clean["grads"], dirty["grads"])


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_shared_scan_that_is_not_finite(value):
    """The scan of B and D: both are nonfinite_tokens, A and C are not."""
    batch = all_four()
    batch["scan_offset"] = batch["scan_offset"].copy()
    batch["scan_offset"][0, SLOT["ct"]] = value
    out, clean = outcome(batch), outcome(all_four())
    np.testing.assert_array_equal(out["nonfinite_scans"], [[False, True, False, False]])
    np.testing.assert_array_equal(out["nonfinite_tokens"], np.isin(batch["segments"], [SEGMENT["B"], SEGMENT["D"]]))
    assert np.isnan(out["logits"][out["nonfinite_tokens"]]).all()
    np.testing.assert_array_equal(np.isnan(out["token_loss"]), out["nonfinite_tokens"] & (batch["weights"] > 0))
    for other in ("A", "C"):
        assert_same_for(other, clean, out, grads=False)


def test_a_slot_that_is_bad_but_unused_poisons_nobody():
    batch = all_four()
    batch["scan_scale"] = batch["scan_scale"].copy()
    batch["scan_scale"][0, 3] = np.nan
    out, clean = outcome(batch), outcome(all_four())
    assert not out["nonfinite_tokens"].any()
    np.testing.assert_array_equal(out["logits"], clean["logits"])
    assert_equal_trees(out["grads"], clean["grads"])


def test_a_key_that_nobody_may_see():
    """Token 30 of C: what stands there changes its own logits alone; its neighbour 20 changes all that follow."""
    batch, clean = all_four(), outcome(all_four())
    for token, changed in ((30, [False] * 3 + [True] + [False] * 3), (20, [False] * 4 + [True] * 3)):
        other = {**batch, "ids": np.where(batch["ids"] == token, 31, batch["ids"])}
        mask = batch["segments"] == SEGMENT["C"]
        differs = (outcome(other)["logits"] != clean["logits"]).any(-1)
        np.testing.assert_array_equal(differs[mask], changed)
        assert not differs[~mask].any()


def test_positions_come_from_the_batch():
    """RoPE depends on distances, so stretched positions of a segment change its logits and no others."""
    batch, clean = all_four(), outcome(all_four())
    mask = batch["segments"] == SEGMENT["B"]
    stretched = outcome({**batch, "positions": np.where(mask, 2 * batch["positions"], batch["positions"])})
    assert np.abs(stretched["logits"] - clean["logits"])[mask].max() > 0.1
    for other in "ACD":
        assert_same_for(other, clean, stretched, grads=False)


def test_padding_patches_do_not_depend_on_planes():
    """Their index points at plane 0, which belongs to A; its values do not change the padding."""
    before, after = all_four(), with_other_voxels(all_four())
    padding = before["patch_segments"] == 0
    clean, other = outcome(before)["vit"], outcome(after)["vit"]
    np.testing.assert_array_equal(clean[padding], other[padding])
    assert np.abs(clean - other)[before["patch_segments"] == SLOT["cxr"] + 1].max() > 0.1


def test_row_without_weights():
    out = outcome({**all_four(), "weights": np.zeros((1, SIZES["text"]), np.float32)})
    assert out["sum"] == 0 and out["weight"] == 0
    assert largest(out["grads"]) == 0 and largest(out["token_loss"]) == 0
    # The same with a non-finite scan, whose sample is not trained on.
    bad = with_scale(np.nan)({**all_four(), "weights": np.zeros((1, SIZES["text"]), np.float32)})
    out = outcome(bad)
    assert out["sum"] == 0 and out["weight"] == 0 and out["nonfinite_scans"].any()
    assert largest(out["grads"]) == 0


# --- the same voxels in other forms -----------------------------------------------------------------------------------


def test_shared_planes_are_exact(packed_together):
    """A row with a plane of its own for each slice and channel gives the same bits."""
    scans = {name: scan.expand(scaled=False) for name, scan in SCANS.items()}
    batch = all_four(scans=scans)
    own = batch["plane_index"][batch["patch_segments"] > 0]
    assert np.unique(own).size == own.size
    out = evaluate(batch)
    np.testing.assert_array_equal(out["logits"], packed_together["logits"])
    assert_equal_trees(out["grads"], packed_together["grads"])


def test_stored_integers_match_float32(packed_together):
    """Compare voxel * scale + offset on the device with float32 values computed on the host."""
    out = evaluate(all_four(np.float32, as_float()))
    np.testing.assert_allclose(out["logits"], packed_together["logits"], rtol=0, atol=ATOL)
    for a, b in zip(jax.tree.leaves(out["grads"]), jax.tree.leaves(packed_together["grads"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=GRADS * np.abs(b).max())


def test_order_of_scans_and_vision_rows_does_not_matter(packed_together):
    """Reversed samples use other slots and other patches."""
    batch = packed.row([SAMPLES[name] for name in "CDBA"], **SIZES)
    out = evaluate(batch)
    for segment, name in enumerate("CDBA", 1):
        mask, expected = batch["segments"] == segment, packed_together["segments"] == SEGMENT[name]
        np.testing.assert_allclose(out["logits"][mask], packed_together["logits"][expected], rtol=0, atol=ATOL)
    np.testing.assert_allclose(out["sum"], packed_together["sum"], rtol=LOSS_RTOL)


# --- one program for every depth --------------------------------------------------------------------------------------

MIXES = {
    "2D and 3D, gray": {"a": (8, 8, 1, 1), "b": (8, 4, 4, 1), "c": (4, 12, 4, 1)},
    "2D only, one in colour": {"a": (8, 8, 1, 3), "b": (16, 8, 1, 1), "c": (4, 4, 1, 1)},
    "deep 3D": {"a": (4, 4, 16, 1), "b": (4, 8, 4, 3), "c": (4, 4, 6, 1)},
    "one volume that fills a vision row": {"a": (8, 4, 12, 1), "b": (4, 4, 2, 1), "c": (8, 8, 4, 1)},
}
MIXED = [Sample((1, "a", 11, "b"), (12, 2), (1, 1)), Sample((1, 13, "c"), (14, 2), (1, 3))]


def test_one_program_serves_every_mix_of_depths():
    """No mix of depths compiles again, and each scan's visual tokens match PyTorch's for the scan alone."""
    vision, latents, text = CONFIG.vision, CONFIG.perceiver, CONFIG.llama
    oracle = torch_radfm.build(
        golden.Sizes(
            vocab=text.vocab_size,
            hidden=text.width,
            inter=text.mlp_width,
            layers=text.num_layers,
            heads=text.num_heads,
            kv_heads=text.num_kv_heads,
            vis_dim=vision.width,
            vit_depth=vision.num_layers,
            vit_heads=vision.num_heads,
            vit_dim_head=vision.head_dim,
            vit_mlp=vision.mlp_width,
            patch=vision.patch,
            tables=vision.tables,
            perceiver_depth=latents.num_layers,
            perceiver_heads=latents.num_heads,
            perceiver_dim_head=latents.head_dim,
            latents=latents.num_latents,
            ff_mult=latents.mlp_factor,
        )
    )
    evaluate(all_four())
    programs = run._cache_size()
    for shapes in MIXES.values():
        scans = {name: packed.scan(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
        tokens = evaluate(packed.row(MIXED, scans, **SIZES))["visual_tokens"]
        for slot, scan in enumerate(scans.values()):
            with torch.no_grad():
                expected = oracle.embedding_layer.see(torch.from_numpy(scan.values()[None, None]))["visual_tokens"]
            np.testing.assert_allclose(tokens[0, slot], expected[0], rtol=0, atol=ATOL)
    assert run._cache_size() == programs


def test_gray_values_of_eight_bits():
    """Rows of 2D scans can be stored as uint8, with the same patches as in int16."""
    scans = {name: packed.scan(8, 8, 1, dtype=np.uint8, seed=i) for i, name in enumerate("abc")}
    patches = {}
    for dtype in (np.int16, np.uint8):
        batch = packed.row(MIXED, scans, dtype=dtype, **SIZES)
        assert batch["planes"].dtype == dtype
        keys = ("planes", "plane_index", "patch_segments", "patch_positions", "scan_scale", "scan_offset")
        embedding = PatchEmbedding(CONFIG.vision)
        patches[dtype] = embedding.apply({"params": PARAMS["vit"]["embedding"]}, *(batch[k] for k in keys))
    np.testing.assert_array_equal(patches[np.uint8], patches[np.int16])


def test_every_answer_token_has_its_weight():
    batch = all_four()
    for name, sample in SAMPLES.items():
        mask = (batch["segments"] == SEGMENT[name]) & (batch["weights"] > 0)
        np.testing.assert_array_equal(batch["targets"][mask], sample.answer)
        np.testing.assert_array_equal(batch["weights"][mask], sample.weights)
