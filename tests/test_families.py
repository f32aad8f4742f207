"""Every decoder family against transformers, the caches of a decoder with every option, and what is refused."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from family_parity import FAMILIES, SIZES, WINDOW, logits_of, params_of, their_model
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from radfm_jax.checkpoints.checkpoint import flatten
from radfm_jax.models import cpu_decode, decoder, quantised
from radfm_jax.models.decoder import Decoder, DecoderConfig, RopeScaling
from radfm_jax.runtime.sharding import make_mesh, param_specs
from radfm_jax.training.losses import token_losses

T = 5 * WINDOW

# --- parity -----------------------------------------------------------------------------------------------------------


def rows():
    """Return ids, targets, positions, segments and key_ok of two rows: one sequence with holes, and a packed row.

    key_ok     1 1 0 1 .. 0 0 1 .. 1          segments   1 x 18, 2 x 14, 0 x 8
    positions  0 1 2 .. 39                    positions  0 .. 17, 0 .. 13, 0
    """
    ids, targets = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, 2, T))
    positions = np.stack([np.arange(T), [*range(18), *range(14), *[0] * 8]])
    segments = np.stack([np.ones(T, int), np.repeat([1, 2, 0], [18, 14, 8])])
    key_ok = np.ones((2, T), bool)
    key_ok[0, [2, 20, 21]] = False
    return ids, targets, positions, segments, key_ok


SEQUENCES = ((0, slice(0, T)), (1, slice(0, 18)), (1, slice(18, 32)))  # row and place of each sequence


def theirs(name: str):
    """Return the logits [2, T, V] of transformers, each sequence in its own row, and the gradients of its loss."""
    net, (ids, targets, _, _, key_ok) = their_model(name), rows()
    logits, loss = np.zeros((*ids.shape, SIZES["vocab_size"]), np.float32), 0
    for row, at in SEQUENCES:
        mine, mask = (torch.from_numpy(x[row, at][None]) for x in (ids, key_ok.astype(int)))
        out = net(input_ids=mine, attention_mask=mask).logits
        loss = loss + torch.nn.functional.cross_entropy(out[0], torch.from_numpy(targets[row, at]), reduction="sum")
        logits[row, at] = out[0].detach()
    net.zero_grad()
    loss.backward()
    gradients = {key: x.grad.numpy() for key, x in net.named_parameters()}
    return logits, loss.item(), params_of(FAMILIES[name].config, gradients)


def ours(name: str):
    config, (ids, targets, positions, segments, key_ok) = FAMILIES[name].config, rows()
    state = {key: x.numpy() for key, x in their_model(name).state_dict().items()}

    def loss(params):
        model = Decoder(config)
        x = model.apply({"params": params}, ids, method="embed")
        hidden = model.apply({"params": params}, x, positions, segments, key_ok)
        kernel = params["embedding"].T if config.tied_head else params["head"]
        options = {"softcap": config.logit_softcap, "chunk": 32}
        losses, _ = token_losses(hidden, kernel, jnp.asarray(targets), segments > 0, **options)
        return losses.sum(), model.apply({"params": params}, hidden, method="logits")

    (total, logits), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params_of(config, state))
    return logits, float(total), gradients


def differences(name: str) -> dict[str, float]:
    """Return the largest difference of the logits, and of the gradients as a share of each parameter's largest one."""
    (logits, loss, gradients), (their_logits, their_loss, their_gradients) = ours(name), theirs(name)
    mine, reference = flatten(gradients), flatten(their_gradients)
    assert mine.keys() == reference.keys()
    active = rows()[3] > 0
    assert 1 < np.abs(their_logits).max() < 60
    largest = {path: float(np.abs(x).max()) for path, x in reference.items()}
    assert min(largest.values()) > 1e-3, largest
    shares = {path: float(np.abs(mine[path] - x).max()) / largest[path] for path, x in reference.items()}
    worst = max(shares, key=shares.get)
    return {
        "logits": float(np.abs(logits - their_logits)[active].max()),
        "loss": abs(loss / their_loss - 1),
        "gradients": shares[worst],
        "of": worst,
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_match_transformers(name):
    """Beyond the sliding window and the original context of RoPE, with holes, and packed."""
    found = differences(name)
    assert found["logits"] < 5e-5 and found["gradients"] < 5e-5 and found["loss"] < 1e-6, found


ROPES = {
    "linear": RopeScaling(8.0, kind="linear"),
    "llama3": RopeScaling(8.0, original_context=64),
    "yarn": RopeScaling(4.0, kind="yarn", original_context=32768),
    "yarn, untruncated": RopeScaling(4.0, kind="yarn", original_context=512, truncate=False, beta_fast=16, beta_slow=2),
    "yarn, as long": RopeScaling(1.0, kind="yarn", original_context=8),
    "longrope": RopeScaling(32.0, kind="longrope", original_context=4096, channel_factors=(1.0, *[3.7] * 47)),
    "longrope, given": RopeScaling(2.0, kind="longrope", channel_factors=(1.5,) * 48, attention_factor=0.9),
}


@pytest.mark.parametrize("name", ROPES)
def test_scaled_frequencies_match_transformers(name):
    scaling = ROPES[name]
    c = DecoderConfig(head_dim=128, rope_theta=1e6, rotary_share=0.75, rope_scaling=scaling)
    rope = {
        "rope_type": scaling.kind, "rope_theta": 1e6, "partial_rotary_factor": 0.75, "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_context, "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "short_factor": [9.0] * 48, "long_factor": list(scaling.channel_factors), "truncate": scaling.truncate,
        "attention_factor": scaling.attention_factor,
    }  # fmt: skip
    their_config = LlamaConfig(head_dim=128, rope_parameters=rope, max_position_embeddings=10**6)
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[scaling.kind](their_config, seq_len=10**5)
    np.testing.assert_array_max_ulp(decoder.rope_frequencies(c), frequencies.numpy(), maxulp=2)
    assert scaling.magnitude == pytest.approx(magnitude, rel=1e-12)


# --- a decoder with every option --------------------------------------------------------------------------------------

# Layers: 0 slides with its own RoPE, 1 has no RoPE, 2 slides without RoPE, 3 is LLaMA's.
EVERYTHING = DecoderConfig(
    **SIZES, qkv_bias=True, qk_norm=True, unit_offset=True, post_norms=True, scale_embeddings=True,
    activation="gelu_tanh", attention_scale=0.3, attention_softcap=4.0, logit_softcap=6.0, window=WINDOW,
    sliding_layers=(0, 2), local_rope_theta=500.0, nope_layers=(1, 2), rotary_share=0.75,
    rope_scaling=RopeScaling(4.0, kind="yarn", original_context=16),
)  # fmt: skip


@functools.cache
def everything() -> dict:
    """Return random parameters of EVERYTHING; biases and scales too."""
    boxed = jax.eval_shape(Decoder(EVERYTHING).init, jax.random.key(0), *abstract_row())["params"]
    rng = np.random.default_rng(3)
    draw = lambda x: jnp.asarray(rng.standard_normal(x.shape) * (0.3 if x.ndim > 1 else 0.1), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, nn.unbox(boxed))


def abstract_row():
    ints = jax.ShapeDtypeStruct((1, T), jnp.int32)
    return jax.ShapeDtypeStruct((1, T, SIZES["width"]), jnp.float32), ints, ints, jax.ShapeDtypeStruct((1, T), bool)


@pytest.mark.parametrize("kind", ["stacked", pytest.param("split", marks=pytest.mark.slow), "split int8"])
def test_decoding_with_a_cache_equals_the_full_pass(kind):
    """Prompts of 3 and 20 tokens, then 12 more tokens, across the edge of the window and of the original context."""
    c, params = EVERYTHING, everything()
    if kind == "split int8":
        params = quantised.quantise_params({"llama": params}, "int8")["llama"]
    ids = np.random.default_rng(2).integers(0, c.vocab_size, (2, 32))
    lengths = jnp.array([3, 20])
    full = np.asarray(jax.jit(functools.partial(logits_of, c))(params, ids))
    implementation = decoder if kind == "stacked" else cpu_decode
    own = params if kind == "stacked" else cpu_decode.split_params(c, params)
    embed = lambda ids: Decoder(c).apply({"params": own}, ids, method="embed")  # noqa: E731

    @jax.jit
    def prefill(ids):
        hidden, cache = decoder.prefill(c, own, embed(ids), lengths, implementation.empty_cache(c, 2, 32))
        return implementation.next_logits(c, own, hidden[jnp.arange(2), lengths - 1]), cache

    @jax.jit
    def extend(ids, positions, cache):
        hidden, cache = decoder.extend(c, own, embed(ids), positions, cache)
        return implementation.next_logits(c, own, hidden[:, 0]), cache

    logits, cache = prefill(ids[:, :20])
    for step in range(13):
        at = np.asarray(lengths) + step - 1
        np.testing.assert_allclose(logits, full[np.arange(2), at], atol=2e-5, err_msg=f"step {step}")
        if step < 12:
            logits, cache = extend(jnp.asarray(ids[np.arange(2), at + 1])[:, None], jnp.asarray(at + 1), cache)


def test_all_parameters_have_logical_axes():
    boxed = jax.eval_shape(Decoder(EVERYTHING).init, jax.random.key(0), *abstract_row())["params"]
    specs = flatten(param_specs(boxed))
    assert tuple(specs["blocks/query/bias"]) == (None, "tensor", None)
    assert {path for path in specs if path.startswith("blocks/")} >= {
        f"blocks/{name}" for name in ("key/bias", "value/bias", "query_norm/scale", "key_norm/scale",
                                      "attention_post_norm/scale", "mlp_post_norm/scale")
    }  # fmt: skip


def test_a_window_as_long_as_the_rows_compiles_to_the_program_without_one():
    plain = FAMILIES["mistral"].config
    params = nn.unbox(jax.eval_shape(Decoder(plain).init, jax.random.key(0), *abstract_row())["params"])
    text = [
        jax.jit(functools.partial(logits_of, c)).lower(params, np.zeros((1, T), int)).as_text()
        for c in (
            dataclasses.replace(plain, window=0, sliding_layers=()),
            dataclasses.replace(plain, window=T),
            dataclasses.replace(plain, window=T - 1, sliding_layers=(1, 2)),
        )
    ]
    assert text[0] == text[1] and "stablehlo.case" not in text[1]
    assert "stablehlo.case" in text[2]


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["xla", "blocks"])
def test_layers_that_differ_on_a_mesh(kernel):
    """Branches between attention calls in a scan, with rows over two axes and heads over the third."""
    rng, length = np.random.default_rng(6), 512
    x = rng.standard_normal((4, length, SIZES["width"])).astype(np.float32)
    segments = np.sort(rng.integers(1, 4, (4, length)))
    positions = np.arange(length) - np.argmax(segments[..., None] == segments[:, None], axis=-1)
    row = (x, positions, segments, np.ones((4, length), bool))

    def run(config):
        def loss(params):
            hidden = Decoder(config).apply({"params": params}, *row)
            return (hidden**2 * jnp.arange(length)[:, None]).mean(), hidden

        return jax.jit(jax.grad(loss, has_aux=True))(everything())

    gradients, hidden = run(dataclasses.replace(EVERYTHING, attention="xla"))
    with jax.set_mesh(make_mesh(2, 2, 2)):
        sharded, hidden_too = run(dataclasses.replace(EVERYTHING, attention=kernel, remat="attention"))
    np.testing.assert_allclose(hidden_too, hidden, atol=1e-4)
    for (path, ours), plain in zip(flatten(sharded).items(), flatten(gradients).values(), strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-4 * np.abs(plain).max(), err_msg=path)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"window": 4}, r"llama.window \(4\) and llama.sliding_layers \(\(\)\) must be set together"),
        ({"sliding_layers": (0,)}, r"llama.window \(0\) and llama.sliding_layers"),
        ({"window": 4, "sliding_layers": (2, 1)}, r"llama.sliding_layers must be ascending"),
        ({"nope_layers": (1, 40)}, r"llama.nope_layers must be ascending and below llama.num_layers 40"),
        ({"local_rope_theta": 1e4}, r"llama.local_rope_theta \(10000.0\) needs llama.sliding_layers"),
        ({"rotary_share": 0.01}, r"llama.rotary_share \(0.01\) of llama.head_dim \(128\) is 1 channels"),
        ({"activation": "gelu"}, r"activation must be one of silu, gelu_tanh \(got 'gelu'\)"),
        ({"rope_scaling": ROPES["longrope"]}, r"llama.rope_scaling.channel_factors has 48 numbers"),
    ],
)
def test_refused_options(fields, message):
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "ntk"}, "kind must be one of llama3, linear, yarn, longrope"),
        ({"kind": "yarn", "beta_fast": 1.0}, r"beta_fast \(1.0\) must be above beta_slow \(1.0\)"),
        ({"kind": "linear", "attention_factor": 1.1}, "attention_factor must be unset: kind linear has none"),
        ({"kind": "longrope"}, "channel_factors must be set for kind longrope"),
        ({"channel_factors": (1.0,)}, r"channel_factors must be set for kind longrope .* \(got llama3\)"),
    ],
)
def test_refused_rope_scaling(fields, message):
    with pytest.raises(ValueError, match=message):
        RopeScaling(**fields)
