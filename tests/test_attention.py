"""The choice of an attention kernel, and the fused kernels against the plain form.

Splash attention runs in Pallas' interpreter; cuDNN's call runs with the XLA implementation of the same function.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radfm_jax.models.attention import attention, choose
from radfm_jax.models.kernels import cpu, splash
from radfm_jax.models.kernels.cudnn import cudnn_attention
from radfm_jax.models.kernels.xla import attention_mask
from radfm_jax.models.layers import REMAT_POLICIES
from radfm_jax.runtime.sharding import make_mesh

# --- choice -----------------------------------------------------------------------------------------------------------


def arrays(length=256, keys=None, width=64, dtype="bfloat16"):
    """Return shapes of queries [1, T, 8, K] and keys [1, U, 2, K]."""
    shapes = (1, length, 8, width), (1, keys or length, 2, width)
    return [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape in shapes]


@pytest.mark.parametrize(
    "platform, form, chosen",
    [
        ("tpu", {}, "splash"),
        ("tpu", {"width": 128, "length": 2048}, "splash"),
        ("tpu", {"width": 80}, "xla"),
        ("tpu", {"length": 200}, "xla"),
        ("tpu", {"length": 128, "keys": 200}, "xla"),
        ("tpu", {"length": 32, "keys": 1056}, "xla"),  # the perceiver
        ("tpu", {"dtype": "float32"}, "xla"),
        ("cuda", {}, "cudnn"),
        ("cuda", {"dtype": "float16", "width": 8, "length": 34}, "cudnn"),
        ("cuda", {"length": 33}, "xla"),  # cuDNN's backward pass with a bias needs even lengths
        ("cuda", {"dtype": "float32"}, "xla"),
        ("cuda", {"width": 12}, "xla"),
        ("cuda", {"width": 256}, "xla"),
        ("gpu", {}, "xla"),  # not NVIDIA, or older than Ampere
        ("cpu", {}, "xla"),
        ("cpu", {"length": 512, "dtype": "float32"}, "blocks"),
        ("cpu", {"length": 512, "keys": 128}, "xla"),
        ("cpu", {"length": 600}, "xla"),
        ("rocm", {}, "xla"),
        (None, {}, "xla"),  # tests run on the CPU
    ],
)
def test_auto_selects_the_fastest_supported_kernel(platform, form, chosen):
    assert choose("auto", *arrays(**form), platform=platform) == chosen


@pytest.mark.parametrize(
    "kernel, form, reasons",
    [
        ("splash", {"width": 80}, ["head width 80 is not a multiple of 64"]),
        ("blocks", {"length": 128, "keys": 200}, ["lengths 128 and 200 are not multiples of 128"]),
        ("splash", {"length": 128, "keys": 200}, ["lengths 128 and 200 are not multiples of 128"]),
        ("splash", {"width": 8, "length": 10, "dtype": "float32"}, ["float32", "head width 8", "lengths 10 and 10"]),
        ("cudnn", {"dtype": "float32"}, ["float32 is not bfloat16 or float16"]),
        ("cudnn", {"width": 12}, ["head width 12 is not a multiple of 8 up to 128"]),
        ("cudnn", {"width": 136}, ["head width 136"]),
        ("cudnn", {"length": 33}, ["lengths 33 and 33 are not even"]),
        ("flash2", {}, ["auto, xla, blocks, cudnn, splash"]),
    ],
)
@pytest.mark.parametrize("platform", ["tpu", "cuda", "gpu", "cpu"])
def test_a_named_kernel_runs_or_raises(kernel, form, reasons, platform):
    with pytest.raises(ValueError, match=re.escape(repr(kernel))) as raised:
        choose(kernel, *arrays(**form), platform=platform)
    assert all(reason in str(raised.value) for reason in reasons), raised.value


@pytest.mark.parametrize("platform, chosen", [("tpu", "splash"), ("cuda", "xla"), ("cpu", "blocks")])
def test_auto_selects_a_kernel_with_soft_caps(platform, chosen):
    assert choose("auto", *arrays(length=512), platform=platform, softcap=50.0) == chosen
    with pytest.raises(ValueError, match="'cudnn': it has no soft cap"):
        choose("cudnn", *arrays(), platform=platform, softcap=50.0)


@pytest.mark.parametrize("kernel", ["xla", "blocks", "cudnn", "splash"])
@pytest.mark.parametrize("platform", ["tpu", "cuda", "gpu", "cpu"])
def test_a_supported_named_kernel_is_used(kernel, platform):
    assert choose(kernel, *arrays(), platform=platform) == kernel


# --- splash attention and tiles ---------------------------------------------------------------------------------------

LENGTH = 256


def packed_row(seed=0, rows=2, heads=4, kv_heads=2, width=64):
    """Return q, k, v and segments of rows like [1 1 .. 2 2 .. 3 .. 0 0], with a few hidden keys in each segment."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((rows, LENGTH, n, width)).astype(np.float32) for n in (heads, kv_heads, kv_heads))
    q_segments = np.zeros((rows, LENGTH), np.int32)
    k_segments = q_segments.copy()
    for row in range(rows):
        ends = np.sort(rng.choice(np.arange(20, LENGTH - 8, 10), 3, replace=False))
        for segment, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
            q_segments[row, start:end] = k_segments[row, start:end] = segment
            k_segments[row, rng.integers(start + 1, end, 3)] = -1
    return q, k, v, q_segments, k_segments


def outputs_and_gradients(form, args, causal, **options):
    weights = np.random.default_rng(5).standard_normal(args[0].shape)

    def total(q, k, v):
        out = form(q, k, v, *args[3:], causal=causal, **options)
        return (out * weights).sum(), out

    grads, out = jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(*args[:3])
    return {"out": out, **dict(zip("qkv", grads, strict=True))}


interpreted = functools.partial(splash.splash_attention, interpret=True)


@pytest.fixture(params=["splash", "blocks"])
def form(request, monkeypatch):
    """Splash attention (interpreted) and tile attention with several tiles per row."""
    monkeypatch.setattr(cpu, "TILE", 128)
    return {"splash": interpreted, "blocks": cpu.tiled_attention}[request.param]


def close(ours, plain, atol=2e-5):
    """Measured 6e-6 of values and gradients up to 7."""
    for name in plain:
        np.testing.assert_allclose(ours[name], plain[name], atol=atol, err_msg=name)


@pytest.mark.parametrize("causal, width, kv_heads", [(True, 64, 2), (False, 64, 2), (True, 128, 4)])
def test_kernels_equal_plain_xla_on_packed_rows(form, causal, width, kv_heads):
    args = packed_row(width=width, kv_heads=kv_heads)
    close(outputs_and_gradients(form, args, causal), outputs_and_gradients(attention, args, causal))


# Gemma 2 has all three; scores here are up to 8, so a cap of 4 bends them.
WINDOWS = [{"window": 37}, {"window": 150, "softcap": 4.0, "scale": 0.2}]


@pytest.mark.parametrize("options", WINDOWS, ids=str)
def test_windows_and_soft_caps_in_packed_rows_equal_plain_xla(form, options):
    """Windows shorter and longer than the samples of a row, and than a tile of 128 tokens."""
    args = packed_row(rows=1)
    plain = outputs_and_gradients(attention, args, True, **options)
    close(outputs_and_gradients(form, args, True, **options), plain)
    assert np.abs(plain["out"] - attention(*args, causal=True)).max() > 0.1, "the options have no effect"


def test_plain_attention_with_a_window_by_hand():
    """Two samples of 3 and 2 tokens; each token sees itself and the one before it in its sample."""
    segments = np.array([[1, 1, 1, 2, 2]], np.int32)
    seen = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(attention_mask(segments, segments, True, window=2)[0], seen)
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, 5, 1, 4))
    scores = 2 * np.tanh(np.einsum("tk,uk->tu", q[0, :, 0], k[0, :, 0]) * 0.7 / 2)
    weights = np.where(seen, np.exp(scores), 0)
    expected = weights / weights.sum(1, keepdims=True) @ v[0, :, 0]
    options = {"causal": True, "window": 2, "scale": 0.7, "softcap": 2.0}
    np.testing.assert_allclose(attention(q, k, v, segments, segments, **options)[0, :, 0], expected, atol=1e-5)
    with pytest.raises(ValueError, match="window 2 must be causal"):
        attention(q, k, v, segments, segments, causal=False, window=2)


def test_packed_samples_are_independent(form):
    """The second segment of a row gives the same result as its sample alone in a row."""
    q, k, v, q_segments, k_segments = packed_row(rows=1)
    at = np.flatnonzero(q_segments[0] == 2)
    packed = form(q, k, v, q_segments, k_segments, causal=True)[:, at]
    alone = [np.zeros_like(x) for x in (q, k, v, q_segments, k_segments)]
    for single, x in zip(alone, (q, k, v, q_segments, k_segments), strict=True):
        single[:, : at.size] = x[:, at]
    # Measured 6e-8: other blocks sum in another order.
    np.testing.assert_allclose(packed, form(*alone, causal=True)[:, : at.size], atol=1e-6)
    noisy = [np.where((q_segments == 2)[..., None, None], x, 1e3) for x in (q, k, v)]
    np.testing.assert_array_equal(packed, form(*noisy, q_segments, k_segments, causal=True)[:, at])


def test_queries_and_keys_of_different_lengths(form):
    q, k, v, q_segments, k_segments = packed_row(rows=1)
    args = (q[:, :128], k, v, q_segments[:, :128], k_segments)
    close(outputs_and_gradients(form, args, False), outputs_and_gradients(attention, args, False))


def test_a_query_that_sees_no_key_is_finite(form):
    q, k, v, q_segments, k_segments = packed_row(rows=1)
    k_segments[:, 0] = -1
    found = outputs_and_gradients(form, (q, k, v, q_segments, k_segments), True)
    assert all(np.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("sizes, kv_heads", [((2, 2, 2), 2), ((1, 4, 2), 1)])
def test_on_a_mesh(form, sizes, kv_heads):
    """Rows and heads are sharded; a single key head is replicated over the tensor axis."""
    args = packed_row(rows=4, heads=2, kv_heads=kv_heads)
    plain = outputs_and_gradients(attention, args, True)
    with jax.set_mesh(make_mesh(*sizes)):
        close(outputs_and_gradients(form, args, True), plain)


def test_tiles_between_samples_are_skipped():
    """Three samples of 128, 256 and 100 tokens: x marks the active tiles in each row of causal tiles."""
    segments = np.repeat([1, 2, 3, 0], [128, 256, 100, 28]).astype(np.int32)[None]
    q = k = v = np.random.default_rng(0).standard_normal((1, 512, 2, 8)).astype(np.float32)
    args = q, k, v, segments, segments
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "TILE", 128)
        # 1: x...   2: .x..   2: .xx.   3 and padding, whose segment range overlaps all before: xxxx
        count = lambda ids, *form: int(cpu._Tiles(q, k, ids, ids, cpu.Form(*form, 1.0, None)).count)  # noqa: E731
        assert count(segments, True, 0) == 1 + 1 + 2 + 4
        assert count(segments, False, 0) == 2 + 3 + 3 + 4
        # A window of 1 leaves the diagonal, 2 and 129 reach the tile before it, 130 the one before that.
        assert [count(segments, True, window) for window in (1, 2, 129, 130)] == [4, 6, 6, 7]
        close(outputs_and_gradients(cpu.tiled_attention, args, True), outputs_and_gradients(attention, args, True))
        empty = np.zeros_like(segments)
        assert count(empty, False, 0) == 0
        assert not np.asarray(cpu.tiled_attention(q, k, v, empty, empty, causal=False)).any()


@pytest.mark.parametrize("policy, walks", [("attention", 2), ("full", 3)])
def test_saved_attention_is_not_recomputed(policy, walks):
    """Count the tile loops: forward, backward, and another forward if nothing is saved."""
    q = jnp.ones((1, 256, 1, 8))
    segments = jnp.ones((1, 256), jnp.int32)
    block = jax.checkpoint(
        lambda q: cpu.tiled_attention(q, q, q, segments, segments, causal=True).sum(), policy=REMAT_POLICIES[policy]
    )
    assert str(jax.make_jaxpr(jax.grad(block))(q)).count("while[") == walks


@pytest.mark.parametrize("length", range(128, 4097, 128))
def test_splash_blocks_divide_every_length(length):
    block = splash._block_size(length)
    assert length % block == 0 and block % 128 == 0 and block <= 512
    assert block == {128: 128, 384: 384, 1024: 512, 2048: 512}.get(length, block)


# --- cuDNN ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
def test_cudnn_is_called_with_the_mask_of_the_row(monkeypatch, causal):
    plain, asked = jax.nn.dot_product_attention, []

    def on_cpu(*args, implementation, **kwargs):
        asked.append(implementation)
        return plain(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    args = packed_row(rows=1)
    half = [x.astype(jnp.bfloat16) for x in args[:3]]
    through = attention(*half, *args[3:], causal=causal, kernel="cudnn")
    assert asked == ["cudnn"] and through.dtype == jnp.bfloat16
    close(outputs_and_gradients(cudnn_attention, args, causal), outputs_and_gradients(attention, args, causal))
    if causal:
        window = {"window": 37, "scale": 0.2}
        expected = outputs_and_gradients(attention, args, True, **window)
        close(outputs_and_gradients(cudnn_attention, args, True, **window), expected)
        with pytest.raises(ValueError, match="no soft cap"):
            cudnn_attention(*args, causal=True, softcap=4.0)
