"""The network: full size, config, and equal results with scan, remat, meshes and other sizes."""

import dataclasses
import functools
import json

import flax.linen as nn
import golden
import jax
import jax.numpy as jnp
import numpy as np
import packed
import parity
import pytest
import torch
import torch_radfm
from packed import CONFIG, SAMPLES, SIZES

from radfm_jax.inference.plain_rows import plain_rows
from radfm_jax.models import decoder, perceiver, vit3d
from radfm_jax.models.layers import REMAT_POLICIES
from radfm_jax.models.radfm import (
    RadFM,
    RadFMConfig,
    abstract_batch,
    abstract_params,
    init_params,
    radfm_14b,
    tiny,
)
from radfm_jax.runtime.sharding import batch_sharding, make_mesh, param_shardings, place_batch

PARAMS = parity.recipe_params(CONFIG)

# Tolerances with the largest error measured on a CPU.
ATOL = 2e-5  # outputs: scan 5e-6, remat 0, meshes 3e-6 (values are of order 1, logits up to 10)
LOSS_RTOL = 1e-6  # meshes 1.1e-7, rows reversed 2.2e-7
GRADS = 2e-5  # of a tensor's largest value: remat 8e-7, rows reversed 6e-7
MESH_GRADS = 5e-5  # likewise: 5.3e-6 with XLA's fusions, 2.1e-5 without (these tests)
PYTORCH_GRADS = 3e-4  # likewise: 6.3e-5
PYTORCH_NOISE = 8  # times the largest error of PyTorch's own float32: 3.0, with XLA's fusions 4.2


def assert_close_trees(ours, theirs, to_peak: float):
    """Check that each tensor's error is within `to_peak` times its expected largest absolute value."""
    for (path, a), (_, b) in zip(*(jax.tree_util.tree_leaves_with_path(t) for t in (ours, theirs)), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=to_peak * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


@functools.cache
def eight_rows() -> dict:
    """Return eight packed rows with different samples and scans."""
    names = ["ABCD", "BDC", "C", "AD", "CA", "DBA", "B", "CDAC"]
    shapes = {"cxr": (8, 8, 1), "ct": (8, 4, 4), "mr": (4, 12, 4)}
    rows = []
    for i, row in enumerate(names):
        scans = {name: packed.scan(*shape, seed=10 * i + j) for j, (name, shape) in enumerate(shapes.items())}
        rows.append(packed.row([SAMPLES[name] for name in row], scans, **SIZES))
    return packed.stack(rows)


@functools.cache
def plain_run():
    """Return losses and gradients of the eight rows on one device."""
    return jax.device_get(parity.step(CONFIG)(PARAMS, eight_rows()))


# --- full size --------------------------------------------------------------------------------------------------------


def test_full_size_shapes():
    config = radfm_14b()
    batch = abstract_batch(config, rows=2, text=2048, scans=16, vision_rows=4, patches=1024, planes=16384)
    params = nn.unbox(abstract_params(config))
    model = RadFM(config)
    logits, out = jax.eval_shape(lambda p, b: model.apply({"params": p}, b), params, batch)
    hidden, _ = jax.eval_shape(lambda p, b: model.apply({"params": p}, b, method=RadFM.hidden), params, batch)
    assert (logits.shape, logits.dtype) == ((2, 2048, 32000), jnp.float32)
    assert hidden.shape == (2, 2048, 5120)
    assert {name: value.shape for name, value in out.items()} == {
        "vit": (2, 4, 1024, 768),
        "perceiver": (2, 16, 32, 768),
        "visual_tokens": (2, 16, 32, 5120),
        "embeddings": (2, 2048, 5120),
        "nonfinite_scans": (2, 16),
        "nonfinite_tokens": (2, 2048),
    }


def test_full_size_parameters():
    """Count the released state_dict without unused parts, and its tied table once."""
    params = nn.unbox(abstract_params(radfm_14b()))
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert {part: count(tree) for part, tree in params.items()} == {
        "vit": 66_208_000,  # embedding_layer.vision_encoder
        "perceiver": 37_802_496,  # embedding_layer.perceiver
        "projection": 3_937_280,  # embedding_layer.fc
        "image_marks": 10_240,  # embedding_layer.figure_token_weight
        "llama": 12_852_024_320 + 163_840_000,  # lang_model.model, lang_model.lm_head
    }
    assert count(params) == 13_123_822_336
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_full_size_is_sharded():
    """On 32 devices with the mesh of the paper's runs, no array over a megabyte is replicated."""
    mesh = jax.sharding.AbstractMesh((1, 32, 1), ("data", "fsdp", "tensor"))
    shardings, notes = param_shardings(abstract_params(radfm_14b()), mesh)
    shapes = nn.unbox(abstract_params(radfm_14b()))
    whole = jax.tree.map(lambda s, leaf: leaf.size if s.is_fully_replicated else 0, shardings, shapes)
    assert max(jax.tree.leaves(whole)) * 4 < 2**20, notes


# --- config -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", [radfm_14b, tiny])
def test_config_round_trip(preset):
    config = preset()
    scaling = decoder.RopeScaling(factor=4.0, original_context=64)
    scaled = dataclasses.replace(config, llama=dataclasses.replace(config.llama, rope_scaling=scaling))
    for c in (config, scaled, config.with_compute(dtype="bfloat16", remat="dots")):
        assert RadFMConfig.from_dict(c.to_dict()) == c
        again = RadFMConfig.from_dict(json.loads(json.dumps(c.to_dict())))  # JSON turns tuples into lists
        assert again == c and hash(again) == hash(c)
    assert RadFMConfig.from_dict({}) == radfm_14b()


def test_config_names_every_unknown_field():
    fields = tiny().to_dict()
    fields["vision"] |= {"depth": 3, "heads": 1}
    fields["llama"]["theta"] = 1.0
    fields["audio"] = {}
    with pytest.raises(ValueError, match="unknown fields: model.audio") as error:
        RadFMConfig.from_dict(fields)
    for name in ("vision.depth", "vision.heads", "llama.theta", "audio"):
        assert name in str(error.value)


def test_config_rejects_inconsistent_sizes():
    with pytest.raises(ValueError, match="vision width 24 and perceiver width 48"):
        RadFMConfig(tiny().vision, dataclasses.replace(tiny().perceiver, width=48), tiny().llama)
    with pytest.raises(ValueError, match="vision width 25"):
        dataclasses.replace(tiny().vision, width=25)
    with pytest.raises(ValueError, match=r"llama.num_heads \(4\) must be a multiple of num_kv_heads \(3\)"):
        dataclasses.replace(tiny().llama, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"remat must be one of full, attention.*\(did you mean full\?\)"):
        abstract_params(tiny().with_compute(remat="ful"))
    with pytest.raises(TypeError, match="unexpected keyword"):
        tiny().with_compute(dytpe="bfloat16")


def test_compute_is_set_in_every_part():
    config = tiny().with_compute(dtype="bfloat16", param_dtype="bfloat16", remat="none", attention="xla")
    for part in (config.vision, config.perceiver, config.llama):
        assert (part.dtype, part.param_dtype, part.remat, part.attention) == ("bfloat16", "bfloat16", "none", "xla")
    assert {leaf.dtype for leaf in jax.tree.leaves(nn.unbox(abstract_params(config)))} == {jnp.dtype("bfloat16")}
    assert config.with_compute(dtype="float32", param_dtype="float32", remat="full", attention="auto") == tiny()
    assert (config.num_latents, config.image_id) == (4, 96)


@functools.cache
def fresh_params():
    return jax.device_get(jax.jit(functools.partial(init_params, CONFIG))(jax.random.key(3)))


def test_parameters_match_their_abstract_tree():
    """`init_params` returns the tree of `abstract_params`: norms 1, all biases but one 0, different layers."""
    params, kind = fresh_params(), lambda x: (x.shape, x.dtype)
    assert jax.tree.map(kind, params) == jax.tree.map(kind, nn.unbox(abstract_params(CONFIG)))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, leaf in leaves:
        name, stacked = jax.tree_util.keystr(path, simple=True, separator="/"), "blocks" in str(path)
        if name == "vit/embedding/projection/bias":
            assert leaf.std() == pytest.approx(0.5, rel=0.3)
        elif name == "vit/embedding/projection/kernel":
            assert not (leaf[0] == leaf[1:]).all(axis=0).any()  # see test_fresh_filters_are_smooth
        elif name.endswith(("scale", "bias")):
            assert (leaf == name.endswith("scale")).all(), name
        elif name.endswith("_positions"):
            assert leaf.std() == pytest.approx(1.2, rel=0.25), name  # of 16 to 128 entries
        else:
            assert 0.01 < leaf.std() < 1.1 and not (stacked and (leaf[0] == leaf[1]).any()), name
    firsts = [leaf.ravel()[0] for path, leaf in leaves if leaf.std() > 0]
    assert len(set(firsts)) == len(firsts)


def test_fresh_filters_are_smooth():
    """Fresh filters keep the deviation of a blob and a ramp, and almost remove noise."""
    config = vit3d.ViTConfig()
    filters = vit3d.smooth_filters(config)(jax.random.key(0), (config.patch_size, config.width), jnp.float32)
    y, x = np.mgrid[-1:1:32j, -1:1:32j]
    blob, noise = np.exp(-4 * (x**2 + y**2)), np.random.default_rng(0).standard_normal((32, 32, 4, 1))

    def seen(patch):
        patch = np.broadcast_to(patch.reshape(32, 32, -1, 1), (32, 32, 4, 3))
        return np.std((patch - patch.mean()).ravel() / patch.std() @ np.asarray(filters))

    assert 0.6 < seen(blob) < 1.2 and 0.6 < seen(x) < 1.2 and seen(noise) < 0.1, (seen(blob), seen(x), seen(noise))


# --- equal results ----------------------------------------------------------------------------------------------------


def layer(params: dict, i: int) -> dict:
    return {"params": jax.tree.map(lambda x: x[i], params)}


def test_one_channel_equals_three_equal_ones():
    """Compare outputs and gradients of the patch embedding."""
    batch = {k: jnp.asarray(v) for k, v in packed.row(SAMPLES.values(), **SIZES).items()}
    gray = batch["plane_index"][..., :1]

    def embed(params, index):
        others = [batch[k] for k in ("patch_segments", "patch_positions", "scan_scale", "scan_offset")]
        embedding = vit3d.PatchEmbedding(CONFIG.vision)
        return embedding.apply({"params": params}, batch["planes"], index, *others)

    def both(params):
        whole, folded = embed(params, jnp.repeat(gray, 3, axis=-1)), embed(params, gray)
        return (jnp.square(whole).sum(), jnp.square(folded).sum()), (whole, folded)

    params = PARAMS["vit"]["embedding"]
    _, (whole, folded) = jax.jit(both)(params)
    np.testing.assert_allclose(folded, whole, rtol=0, atol=ATOL)
    of_whole, of_folded = (jax.jit(jax.grad(lambda p, i=i: both(p)[0][i]))(params) for i in (0, 1))
    assert_close_trees(of_folded, of_whole, to_peak=GRADS)


@pytest.mark.slow
def test_scanned_stacks_equal_separate_blocks():
    batch = {k: jnp.asarray(v) for k, v in packed.row(SAMPLES.values(), **SIZES).items()}
    logits, out = jax.jit(lambda p, b: RadFM(CONFIG).apply({"params": p}, b))(PARAMS, batch)

    patches = [batch[k] for k in ("planes", "plane_index", "patch_segments", "patch_positions")]
    embedding = vit3d.PatchEmbedding(CONFIG.vision)
    x = embedding.apply({"params": PARAMS["vit"]["embedding"]}, *patches, batch["scan_scale"], batch["scan_offset"])
    b, r, p, width = x.shape
    x, segments = x.reshape(b * r, p, width), batch["patch_segments"].reshape(b * r, p)
    for i in range(CONFIG.vision.num_layers):
        x, _ = vit3d.EncoderBlock(CONFIG.vision).apply(layer(PARAMS["vit"]["blocks"], i), x, segments)
    np.testing.assert_allclose(x.reshape(b, r, p, width), out["vit"], rtol=0, atol=ATOL)

    own = PARAMS["perceiver"]
    x = jnp.broadcast_to(own["latents"], (*batch["scan_rows"].shape, *own["latents"].shape))
    for i in range(CONFIG.perceiver.num_layers):
        block = perceiver.ResamplerBlock(CONFIG.perceiver)
        rows = jnp.maximum(batch["scan_rows"], 0)
        x, _ = block.apply(layer(own["blocks"], i), x, out["vit"], batch["patch_segments"], rows)
    x = nn.LayerNorm(epsilon=1e-5).apply({"params": own["norm"]}, x)
    np.testing.assert_allclose(x, out["perceiver"], rtol=0, atol=ATOL)

    own, c = PARAMS["llama"], CONFIG.llama
    x, rope = out["embeddings"], decoder.rope_table(batch["positions"], c)
    seen = jnp.where(batch["key_ok"] | (batch["segments"] == 0), batch["segments"], -1)
    for i in range(c.num_layers):
        x, _ = decoder.DecoderBlock(c).apply(layer(own["blocks"], i), x, rope, batch["segments"], seen)
    x = nn.RMSNorm(epsilon=c.norm_eps).apply({"params": own["norm"]}, x)
    np.testing.assert_allclose(x @ own["head"], logits, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    "remat",
    [
        pytest.param(name, marks=() if name == "dots" else pytest.mark.slow)
        for name in REMAT_POLICIES
        if name != CONFIG.llama.remat
    ],
)
def test_remat_does_not_change_results(remat):
    (loss, out), grads = plain_run()
    (other_loss, other_out), other_grads = parity.step(CONFIG.with_compute(remat=remat))(PARAMS, eight_rows())
    np.testing.assert_allclose(other_loss, loss, rtol=LOSS_RTOL)
    np.testing.assert_allclose(other_out["token_loss"], out["token_loss"], rtol=0, atol=ATOL)
    assert_close_trees(other_grads, grads, to_peak=GRADS)


def test_bfloat16():
    (loss, out), grads = plain_run()
    (half_loss, half_out), half_grads = parity.step(CONFIG.with_compute(dtype="bfloat16"))(PARAMS, eight_rows())
    assert half_out["vit"].dtype == half_out["embeddings"].dtype == jnp.bfloat16
    assert half_out["token_loss"].dtype == half_loss.dtype == jnp.float32
    assert {g.dtype for g in jax.tree.leaves(half_grads)} == {jnp.dtype("float32")}
    assert np.isfinite(half_out["token_loss"]).all()
    np.testing.assert_allclose(half_loss, loss, rtol=1e-3)  # measured: 6.8e-5
    np.testing.assert_allclose(half_out["token_loss"], out["token_loss"], rtol=0, atol=0.15)  # 5.4e-2
    norm = lambda tree: np.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in jax.tree.leaves(tree)))  # noqa: E731
    apart = norm(jax.tree.map(lambda a, b: np.asarray(a, np.float64) - b, half_grads, grads))
    assert apart < 0.1 * norm(grads), apart / norm(grads)  # measured: 0.047


def test_dropout():
    config = dataclasses.replace(CONFIG, vision=dataclasses.replace(CONFIG.vision, dropout=0.3))
    run = parity.step(config)
    # Without a key the program is exactly that of a model without dropout.
    assert run.lower(PARAMS, eight_rows()).as_text() == parity.step(CONFIG).lower(PARAMS, eight_rows()).as_text()
    (off, out), _ = plain_run()
    first, again, other = (run(PARAMS, eight_rows(), jax.random.key(i)) for i in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    losses = [float(x[0][0]) for x in (first, other)]
    assert np.isfinite(losses).all() and len({*losses, float(off)}) == 3
    # The language model has no dropout: losses of rows without scans are equal.
    text = eight_rows()["scan_rows"].max(axis=1) < 0
    assert text.sum() == 1
    np.testing.assert_allclose(first[0][1]["token_loss"][text], out["token_loss"][text], rtol=0, atol=ATOL)
    seen = np.abs(first[0][1]["token_loss"] - out["token_loss"]).max(axis=1)
    assert (seen[~text] > 1e-3).all()


def test_rows_are_independent():
    """With rows reordered or one replaced, the losses of the others keep their bits."""
    (loss, out), grads = plain_run()
    run, rows = parity.step(CONFIG), eight_rows()
    (turned_loss, turned), turned_grads = run(PARAMS, {k: v[::-1] for k, v in rows.items()})
    np.testing.assert_array_equal(turned["logits"][::-1], out["logits"])
    np.testing.assert_allclose(turned_loss, loss, rtol=LOSS_RTOL)
    assert_close_trees(turned_grads, grads, to_peak=GRADS)
    (_, changed), _ = run(PARAMS, {k: np.concatenate([v[:3], v[:1], v[4:]]) for k, v in rows.items()})
    same = np.arange(8) != 3
    np.testing.assert_array_equal(changed["logits"][same], out["logits"][same])
    assert np.abs(changed["logits"][3] - out["logits"][3]).max() > 0.1


@pytest.mark.parametrize(
    "shape",
    [(2, 2, 2), *(pytest.param(shape, marks=pytest.mark.slow) for shape in ((8, 1, 1), (1, 8, 1), (2, 4, 1)))],
    ids=str,
)
def test_meshes(shape):
    """With data, fsdp and tensor parallelism, the loss and all gradients match one device."""
    (loss, out), grads = plain_run()
    mesh = make_mesh(*shape)
    shardings, notes = param_shardings(abstract_params(CONFIG), mesh)
    divides = [why for why in notes.values() if "not divisible" in why]
    assert not divides
    out_shardings = ((None, batch_sharding(mesh)), shardings)
    with jax.set_mesh(mesh):
        run = jax.jit(parity.loss_and_gradients(CONFIG), out_shardings=out_shardings)
        params, batch = jax.device_put(PARAMS, shardings), place_batch(eight_rows(), mesh)
        (mesh_loss, mesh_out), mesh_grads = run(params, batch)
    kernel = mesh_grads["llama"]["blocks"]["up"]["kernel"]  # [layers, embed, mlp]
    assert kernel.addressable_shards[0].data.shape == (2, 32 // shape[1], 64 // shape[2])
    rows = {shard.data.shape[0] for shard in batch["ids"].addressable_shards}
    assert rows == {8 // (shape[0] * shape[1])}

    np.testing.assert_allclose(mesh_loss, loss, rtol=LOSS_RTOL)
    np.testing.assert_allclose(mesh_out["token_loss"], out["token_loss"], rtol=0, atol=ATOL)
    np.testing.assert_array_equal(mesh_out["correct"], out["correct"])
    assert_close_trees(mesh_grads, grads, to_peak=MESH_GRADS)


def test_parameters_are_created_sharded():
    """Each device creates its shards, and values do not depend on the mesh."""
    mesh = make_mesh(2, 2, 2)
    shardings, _ = param_shardings(abstract_params(CONFIG), mesh)
    with jax.set_mesh(mesh):
        params = jax.jit(functools.partial(init_params, CONFIG), out_shardings=shardings)(jax.random.key(3))
    for leaf, sharding in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert params["llama"]["head"].addressable_shards[0].data.shape == (32 // 2, 40 // 2)
    # Bit-equal with XLA's optimisations; without them, as here, the normal distribution differs in its last bit.
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6)
    jax.tree.map(close, jax.device_get(params), fresh_params())


# --- parity at sizes without a golden case ----------------------------------------------------------------------------


def drawn_sizes(rng) -> golden.Sizes:
    one_of = lambda *values: int(rng.choice(values))  # noqa: E731
    kv_heads = one_of(1, 2, 3)
    heads = kv_heads * one_of(1, 2, 3)
    return golden.Sizes(
        vocab=one_of(37, 50, 64),
        hidden=heads * one_of(4, 6, 10),
        inter=one_of(20, 33),
        layers=one_of(1, 3),
        heads=heads,
        kv_heads=kv_heads,
        vis_dim=one_of(6, 15, 30),
        vit_depth=one_of(1, 3),
        vit_heads=one_of(1, 3),
        vit_dim_head=one_of(4, 7),
        vit_mlp=one_of(10, 25),
        patch=(one_of(2, 4), one_of(3, 5), one_of(2, 3)),
        tables=(one_of(5, 6), one_of(7, 8), one_of(9, 11)),
        perceiver_depth=one_of(1, 2),
        perceiver_heads=one_of(1, 3),
        perceiver_dim_head=one_of(3, 8),
        latents=one_of(1, 5),
        ff_mult=one_of(2, 3),
        rope_theta=float(one_of(300, 20000)),
        rms_eps=float(rng.choice([1e-5, 1e-3])),
    )


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_any_size_matches_pytorch(seed):
    """Two samples of two scans with H != W and D > 1, a mask with holes, and gradients of all parameters."""
    rng = np.random.default_rng(seed)
    sizes = drawn_sizes(rng)
    height, width, depth = (step * n for step, n in zip(sizes.patch, (2, 3, 2), strict=True))
    vision = rng.random((2, 2, 3, height, width, depth), np.float32)
    v, n = sizes.vocab, sizes.latents
    text = lambda k: [int(i) for i in rng.integers(3, v, k)]  # noqa: E731
    image = lambda s: [v, *range(v + 2 + n * s, v + 2 + n * (s + 1)), v + 1]  # noqa: E731
    rows = [
        [1, *image(0), *text(3), *image(1), *text(5), 2],
        [1, *text(2), *image(1), *text(3), *image(0), *text(2)],  # scans in reverse order
    ]
    length = max(map(len, rows)) + 2
    ids = np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32)
    mask = (np.arange(length) < [[len(row)] for row in rows]).astype(np.int32)
    mask[0, 5], mask[1, [2, length - 6]] = 0, 0
    labels = np.where((ids < v) & (ids > 1) & (rng.random(ids.shape) < 0.7), ids, -100)
    weights = rng.choice([1, 3], ids.shape).astype(np.float32)

    def forward(model, dtype):
        theirs = model(torch.from_numpy(ids).long(), torch.from_numpy(vision).to(dtype), torch.from_numpy(mask))
        loss, _, token_ce = torch_radfm.losses(
            theirs["logits"], torch.from_numpy(labels).long(), torch.from_numpy(weights)
        )
        return loss, {k: value.detach().numpy() for k, value in {**theirs, "token_loss": token_ce}.items()}

    model = torch_radfm.build(sizes, salt=str(seed))
    their_loss, theirs = forward(model, torch.float32)
    names, parameters = zip(*model.named_parameters(), strict=True)
    their_grads = dict(zip(names, torch.autograd.grad(their_loss, parameters), strict=True))

    config = parity.config_of(sizes)
    params = parity.params_of(config, torch_radfm.arrays_of(model))
    exact_loss, exact = forward(model.double(), torch.float64)
    batch = plain_rows(ids, vision, mask, vocab_size=v, num_latents=n, patch=sizes.patch, tables=sizes.tables)
    targets, weights = parity.targets_of(labels, weights)
    (loss, out), grads = parity.step(config)(params, {**batch, "targets": targets, "weights": weights})

    out["embeds"], out["token_loss"] = out["embeddings"], out["token_loss"][:, :-1]
    for key in ("vit", "perceiver", "visual_tokens", "embeds", "logits", "token_loss"):
        noise = np.abs(theirs[key] - exact[key]).max()  # rounding error of PyTorch's float32
        close = functools.partial(np.testing.assert_allclose, rtol=0, atol=PYTORCH_NOISE * noise, err_msg=key)
        close(out[key].reshape(exact[key].shape), exact[key])
    np.testing.assert_allclose(loss, exact_loss.item(), rtol=LOSS_RTOL)
    ours = parity.under_torch_names(config, grads)
    assert ours.keys() == their_grads.keys()
    assert_close_trees(ours, {name: their_grads[name].numpy() for name in ours}, to_peak=PYTORCH_GRADS)
