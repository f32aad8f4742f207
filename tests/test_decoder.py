"""The decoder against transformers, in every variant of published checkpoints."""

import dataclasses
import decimal
import functools

import jax
import jax.numpy as jnp
import llama_oracle
import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from radfm_jax.checkpoints.checkpoint import flatten, unflatten
from radfm_jax.convert.table import entries
from radfm_jax.models import radfm
from radfm_jax.models.decoder import (
    Decoder,
    DecoderConfig,
    RopeScaling,
    head_logits,
    rope_frequencies,
    rope_table,
    rotate,
)

VARIANTS = list(llama_oracle.variants())
# A Decoder whose gradients depend on all differences between the variants.
GRADIENT_VARIANTS = ["llama31", "tied"]


def config_of(theirs) -> DecoderConfig:
    rope = theirs.rope_parameters
    scaling = None
    if rope["rope_type"] == "llama3":
        scaling = RopeScaling(
            rope["factor"],
            rope["low_freq_factor"],
            rope["high_freq_factor"],
            rope["original_max_position_embeddings"],
        )
    return DecoderConfig(
        vocab_size=theirs.vocab_size,
        width=theirs.hidden_size,
        mlp_width=theirs.intermediate_size,
        num_layers=theirs.num_hidden_layers,
        num_heads=theirs.num_attention_heads,
        num_kv_heads=theirs.num_key_value_heads,
        head_dim=theirs.head_dim,
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling,
        norm_eps=theirs.rms_norm_eps,
        tied_head=theirs.tie_word_embeddings,
    )


def table(config: DecoderConfig):
    return entries(dataclasses.replace(radfm.tiny(), llama=config), part="llama")


def params_of(config: DecoderConfig, state: dict[str, np.ndarray]) -> dict:
    """Convert a state_dict of transformers to parameters of `Decoder`."""
    leaves: dict = {}
    for e in table(config):
        leaves.setdefault(e.path, []).append(e.to_ours(state[e.name]))
    stacked = {e.path for e in table(config) if e.layer is not None}
    arrays = {path: jnp.asarray(np.stack(v) if path in stacked else v[0]) for path, v in leaves.items()}
    return unflatten(arrays)["llama"]


def logits_of(config: DecoderConfig, params, ids, positions=None, segments=None, key_ok=None):
    ids = jnp.asarray(ids)
    ones = np.ones(ids.shape, np.int32)
    positions = np.arange(ids.shape[1]) * ones if positions is None else positions
    segments, key_ok = ones if segments is None else segments, ones > 0 if key_ok is None else key_ok

    def forward(model: Decoder):
        return model.logits(model(model.embed(ids), positions, segments, key_ok))

    return Decoder(config).apply({"params": params}, method=forward)


@functools.cache
def loaded(variant: str):
    theirs = llama_oracle.variants()[variant]
    state, logits, _ = llama_oracle.build(theirs)
    config = config_of(theirs)
    return config, params_of(config, state), state, logits


def jitted(config, **fixed):
    return jax.jit(lambda params, ids, key_ok: logits_of(config, params, ids, key_ok=key_ok, **fixed))


# --- parity -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_match_transformers(variant):
    """Without and with holes in the mask; the hole at position 0 leaves a query that sees no key."""
    config, params, _, oracle = loaded(variant)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (3, 40))
    holes = np.ones_like(ids)
    holes[0, [7, 8, 21]] = holes[1, [0, 39]] = holes[2, 1::2] = 0
    forward = jitted(config)
    for mask in (np.ones_like(ids), holes):
        theirs = oracle(ids, mask)
        assert 1 < np.abs(theirs).max() < 20
        np.testing.assert_allclose(forward(params, ids, mask > 0), theirs, atol=6e-5)  # measured 1.4e-5 of 14
    assert np.abs(theirs - oracle(ids)).max() > 0.1, "the holes are of no consequence"


@pytest.mark.parametrize("variant", GRADIENT_VARIANTS)
def test_gradients_match_transformers(variant):
    theirs = llama_oracle.variants()[variant]
    net = llama_oracle.model(theirs)
    config, params, _, _ = loaded(variant)
    rng = np.random.default_rng(2)
    ids, targets = rng.integers(0, config.vocab_size - 1, (2, 2, 24))
    targets[0, 5] = last = config.vocab_size - 1
    out = net(input_ids=torch.from_numpy(ids)).logits
    torch.nn.functional.cross_entropy(out.flatten(0, 1), torch.from_numpy(targets).flatten()).backward()
    named = {name: p.grad.numpy() for name, p in net.named_parameters()}

    def loss(params):
        log_p = jax.nn.log_softmax(logits_of(config, params, ids))
        return -jnp.take_along_axis(log_p, targets[..., None], axis=-1).mean()

    ours = flatten({"llama": jax.jit(jax.grad(loss))(params)})
    assert {e.name for e in table(config)} == named.keys()
    for e in table(config):
        reference = named[e.name]
        scale = np.abs(reference).max()
        assert scale > 1e-4, e.name
        mine = e.to_torch(np.asarray(ours[e.path][e.index]))
        np.testing.assert_allclose(mine / scale, reference / scale, atol=2e-5, err_msg=e.name)  # measured 2e-6
    # A token that is a target but never an input gets its gradient only through the head.
    assert (np.abs(ours["llama/embedding"][last]).max() > 1e-4) == config.tied_head


@pytest.mark.parametrize("variant", VARIANTS)
def test_frequencies_match_transformers(variant):
    theirs = llama_oracle.variants()[variant]
    ours = rope_frequencies(config_of(theirs))
    np.testing.assert_array_max_ulp(ours, LlamaRotaryEmbedding(theirs).inv_freq.numpy(), maxulp=1)


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_frequencies_equal_torch_at_the_head_width_of_llama(theta):
    ours = rope_frequencies(DecoderConfig(rope_theta=theta))
    theirs = 1.0 / (theta ** (torch.arange(0, 128, 2).float() / 128))
    np.testing.assert_array_equal(ours, theirs.numpy())


@pytest.mark.parametrize("head_dim", [64, 128])
def test_scaled_frequencies_equal_transformers(head_dim):
    scaling = llama_oracle.LLAMA31_ROPE
    theirs = LlamaConfig(head_dim=head_dim, rope_parameters=scaling)
    np.testing.assert_array_equal(rope_frequencies(config_of(theirs)), LlamaRotaryEmbedding(theirs).inv_freq.numpy())


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [32, 48, 64, 96, 112, 128, 192, 256])
def test_frequencies_are_the_nearest_float32_on_every_cpu(head_dim, theta):
    """The float32 power of numpy is the nearest at some widths on some CPUs; torch's is off by at most one unit."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    with decimal.localcontext(prec=40):
        powers = [np.float32(decimal.Decimal(theta) ** decimal.Decimal(float(x))) for x in exponents]
    ours = rope_frequencies(DecoderConfig(head_dim=head_dim, rope_theta=theta))
    np.testing.assert_array_equal(ours, np.float32(1) / np.array(powers))
    theirs = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    np.testing.assert_array_max_ulp(ours, theirs.numpy(), maxulp=2)


def test_llama31_scales_low_frequencies():
    """Llama 3.1 keeps wavelengths up to 8192 / 4, stretches those from 8192 on by 8, and interpolates between."""
    plain = DecoderConfig(rope_theta=500000.0)
    scaled = dataclasses.replace(plain, rope_scaling=RopeScaling())
    wave = 2 * np.pi / rope_frequencies(plain)
    ratio = rope_frequencies(plain) / rope_frequencies(scaled)
    np.testing.assert_allclose(ratio[wave < 2048], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[wave > 8192], 8, rtol=1e-6)
    between = ratio[(wave > 2048) & (wave < 8192)]
    assert between.size and ((between > 1) & (between < 8)).all() and (np.diff(between) > 0).all()


# --- properties -------------------------------------------------------------------------------------------------------


def test_rotation_depends_only_on_the_distance():
    """Shifting a query and a key together keeps their score; rotation keeps norms."""
    config = DecoderConfig(head_dim=16)
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, 1, 1, 1, 16)).astype(np.float32)

    def score(i, j):
        turned = [rotate(x, rope_table(jnp.full((1, 1), at), config)) for x, at in ((q, i), (k, j))]
        np.testing.assert_allclose(jnp.linalg.norm(turned[0]), jnp.linalg.norm(q), rtol=1e-6)  # measured 0
        return float((turned[0] * turned[1]).sum())

    assert score(5, 2) == pytest.approx(score(905, 902), abs=1e-3)  # measured 1e-4, angles of 900 in float32
    assert abs(score(5, 2) - score(5, 3)) > 1e-2


def test_rotation_of_bfloat16_computes_in_float32():
    """At position 2,000 a bfloat16 angle would be off by 4 radians."""
    config = DecoderConfig(head_dim=16)
    x = np.random.default_rng(4).standard_normal((1, 1, 2, 16)).astype(jnp.bfloat16)
    table = rope_table(jnp.full((1, 1), 2047), config)
    assert table[0].dtype == jnp.float32
    turned = rotate(x, table)
    assert turned.dtype == jnp.bfloat16
    exact = rotate(np.asarray(x, np.float32), table)
    np.testing.assert_array_equal(turned, exact.astype(jnp.bfloat16))


def test_segments_equal_separate_rows():
    """ids        a a a a a b b b b b b b 0 0
    segments   1 1 1 1 1 2 2 2 2 2 2 2 0 0
    positions  0 1 2 3 4 0 1 2 3 4 5 6 0 0     as if a and b stood in two rows
    """
    config, params, _, oracle = loaded("llama31")
    ids = np.random.default_rng(5).integers(0, config.vocab_size, (1, 14))
    segments = np.array([[1] * 5 + [2] * 7 + [0] * 2])
    positions = np.array([[*range(5), *range(7), 0, 0]])
    key_ok = np.ones((1, 14), bool)
    key_ok[0, [2, 7]] = False
    packed = logits_of(config, params, ids, positions, segments, key_ok)
    assert np.isfinite(packed).all()
    for own in (slice(0, 5), slice(5, 12)):
        alone = oracle(ids[:, own], key_ok[:, own])
        np.testing.assert_allclose(packed[:, own], alone, atol=3e-5)  # measured 4e-6
    late = logits_of(config, params, ids, np.arange(14)[None], segments, key_ok)
    np.testing.assert_allclose(late[:, 5:12], packed[:, 5:12], atol=3e-5)  # RoPE is relative; measured 2e-6


def test_other_segments_and_later_tokens_have_no_effect():
    config, params, _, _ = loaded("gqa")
    rng = np.random.default_rng(6)
    ids = rng.integers(0, config.vocab_size, (1, 14))
    segments = np.array([[1] * 5 + [2] * 7 + [0] * 2])
    positions = np.array([[*range(5), *range(7), 0, 0]])
    changed = np.where(segments == 2, ids, (ids + 1) % config.vocab_size)
    changed[0, 10:] = (ids[0, 10:] + 3) % config.vocab_size
    forward = jax.jit(lambda ids: logits_of(config, params, ids, positions, segments))
    np.testing.assert_array_equal(forward(ids)[:, 5:10], forward(changed)[:, 5:10])
    assert (forward(ids)[:, 10:] != forward(changed)[:, 10:]).any()


def test_ids_outside_the_vocabulary_are_clipped():
    config, params, _, _ = loaded("odd_vocab")
    ids = np.array([[-5, 0, 96, 97, 10**6]])
    embedded = Decoder(config).apply({"params": params}, ids, method=Decoder.embed)
    np.testing.assert_array_equal(embedded, params["embedding"][np.array([[0, 0, 96, 96, 96]])])


def test_logits_are_float32_in_bfloat16():
    rng = np.random.default_rng(7)
    hidden, kernel = rng.standard_normal((4, 512)), rng.standard_normal((512, 9))
    half = [x.astype(jnp.bfloat16) for x in (hidden, kernel)]
    logits = head_logits(*(x.astype(np.float32) for x in half), "bfloat16")
    assert logits.dtype == jnp.float32
    # Measured 4e-6 for sums up to 50; bfloat16 rounding would give 0.1.
    np.testing.assert_allclose(logits, half[0].astype(np.float64) @ half[1].astype(np.float64), atol=3e-5)


def test_every_float32_product_has_full_precision():
    config, params, _, _ = loaded("gqa")
    ids = np.zeros((1, 8), int)
    text = jax.jit(jax.grad(lambda p: logits_of(config, p, ids).sum())).lower(params).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) > 20
    assert [line for line in products if "HIGHEST, HIGHEST" not in line] == []


def test_invalid_sizes():
    with pytest.raises(ValueError, match=r"llama.num_heads \(8\) must be a multiple of num_kv_heads \(3\)"):
        DecoderConfig(num_heads=8, num_kv_heads=3)
    with pytest.raises(ValueError, match=r"llama.head_dim must be even for RoPE \(got 7\)"):
        DecoderConfig(head_dim=7)


def test_parameters_of_the_released_size():
    assert sum(int(np.prod(e.torch_shape)) for e in table(DecoderConfig())) == 13_015_864_320  # LLaMA-13B
