"""The choice of an attention kernel by platform, all with the meaning of `layers.attention`; the choice has this one
place.

TPU: splash attention (blockwise, segment ids inside the kernel). NVIDIA GPU: cuDNN through
`jax.nn.dot_product_attention` (bf16 and fp16). CPU: long rows tile by tile, without the tiles between samples.
Everything else, and every shape that a kernel does not take: plain XLA.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from radfm_jax.sharding import BATCH

NAMES = ("auto", "xla", "blocks", "cudnn", "splash")


BLOCKS_FROM = 512  # shorter rows are quicker in one product


def choose(kernel: str, q: jax.Array, k: jax.Array, platform: str | None = None) -> str:
    """The kernel that runs: `xla`, `blocks`, `cudnn` or `splash`. One asked for by name is not silently replaced.

    Args:
      q: [B, T, H, K]; k: [B, U, G, K].
    Raises:
      ValueError: an unknown name, or shapes that the kernel asked for does not take.
    """
    if kernel not in NAMES:
        raise ValueError(f"attention kernel {kernel!r} is unknown: choose one of {', '.join(NAMES)}")
    t, u, width = q.shape[1], k.shape[1], q.shape[3]
    refusals = {
        "xla": [],
        "blocks": [f"lengths {t} and {u} are not multiples of 128"] if t % 128 or u % 128 else [],
        "splash": [  # it multiplies float32 in bfloat16, forward and backward
            *([f"dtype {q.dtype} is not bfloat16"] if q.dtype != jnp.bfloat16 else []),
            *([f"head width {width} is not a multiple of 64"] if width % 64 else []),
            *([f"lengths {t} and {u} are not multiples of 128"] if t % 128 or u % 128 else []),
        ],
        "cudnn": [
            *([f"dtype {q.dtype} is not bfloat16 or float16"] if q.dtype not in (jnp.bfloat16, jnp.float16) else []),
            *([f"head width {width} is not a multiple of 8 up to 128"] if width % 8 or width > 128 else []),
            # With a bias its backward pass takes even lengths only.
            *([f"lengths {t} and {u} are not even"] if t % 2 or u % 2 else []),
        ],
    }
    if kernel != "auto":
        if refusals[kernel]:
            raise ValueError(f"attention kernel {kernel!r}: {'; '.join(refusals[kernel])}")
        return kernel
    best = {"tpu": "splash", "cuda": "cudnn", "cpu": "blocks"}.get(platform or _platform(), "xla")
    if best == "blocks" and min(t, u) < BLOCKS_FROM:
        return "xla"
    return best if not refusals[best] else "xla"


def _platform() -> str:
    """`tpu`, `cpu`, or `cuda` for NVIDIA GPUs from Ampere on, which cuDNN's fused attention needs; else `gpu`."""
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    device = jax.devices()[0]
    is_nvidia = "cuda" in device.client.platform_version.lower()
    return "cuda" if is_nvidia and float(device.compute_capability) >= 8 else "gpu"


def cudnn(q, k, v, q_segments, k_segments, *, causal: bool) -> jax.Array:
    """cuDNN takes lengths or a bias, not segment ids: the mask of the row becomes a bias of one head."""
    from radfm_jax.models.layers import attention_mask

    mask = attention_mask(q_segments, k_segments, causal)[:, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn")


def splash(q, k, v, q_segments, k_segments, *, causal: bool, interpret: bool = False) -> jax.Array:
    """Splash attention on each device's rows and heads. `interpret` runs it on any platform, slowly, for tests."""
    # Pallas takes a second to import and only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash_lib

    def local(q, k, v, q_segments, k_segments):
        t, h, width = q.shape[1:]
        u, g = k.shape[1:3]
        mask = (splash_lib.CausalMask if causal else splash_lib.FullMask)((t, u))
        block = functools.partial(_divisor, limit=512)
        run = splash_lib.make_splash_mha(
            splash_lib.MultiHeadMask([mask] * h),
            block_sizes=splash_lib.BlockSizes(
                **dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), block(t)),
                **dict.fromkeys(("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute"), block(u)),
                block_kv_dq=block(u),
            ),
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        heads_first = lambda x: jnp.moveaxis(x, 2, 1)  # noqa: E731
        k, v = (jnp.repeat(x, h // g, axis=2) for x in (k, v))
        ids = splash_lib.SegmentIds(q_segments, k_segments)
        out = jax.vmap(run)(heads_first(q * width**-0.5), heads_first(k), heads_first(v), segment_ids=ids)
        return jnp.moveaxis(out, 1, 2).astype(v.dtype)

    return _by_device(local, q, k, v, q_segments, k_segments)


def blocks(q, k, v, q_segments, k_segments, *, causal: bool) -> jax.Array:
    """Attention tile by tile (radfm_jax.models.blocks) on each device's rows and heads."""
    from radfm_jax.models.blocks import attend

    arrays = (jnp.asarray(x) for x in (q, k, v, q_segments, k_segments))
    return _by_device(lambda *local: attend(*local, causal), *arrays)


def _by_device(local, q, k, v, q_segments, k_segments) -> jax.Array:
    """XLA cannot partition a hand-written kernel or loop: its rows and heads are handed out here."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = {a for a in mesh.axis_names if mesh._name_to_type[a] != AxisType.Manual}
    if not axes:
        return local(q, k, v, q_segments, k_segments)
    tensor = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None
    heads, rows = PartitionSpec(BATCH, None, tensor), PartitionSpec(BATCH)
    return jax.shard_map(
        local, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, axis_names=axes, check_vma=False
    )(q, k, v, q_segments, k_segments)


def _divisor(length: int, limit: int) -> int:
    """The largest multiple of 128 up to `limit` that divides `length` (itself a multiple of 128)."""
    return max(size for size in range(128, limit + 1, 128) if length % size == 0)


KERNELS = {"blocks": blocks, "cudnn": cudnn, "splash": splash}
