"""A RadFM with another encoder or bridge: 2D and 3D scans in one program, sharding, and its cost."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_parts import noise

from input_pipeline.batching.collate import LoadedRow, ScanPlanes, collate_batch, collate_row
from input_pipeline.batching.plan import RowLimits
from input_pipeline.config import DataConfig
from input_pipeline.images.planes import Patches, patch_positions
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.text.tokens import Encoded
from radfm_jax.checkpoints.checkpoint import flatten
from radfm_jax.cost import estimate, flops, program
from radfm_jax.models import radfm
from radfm_jax.models.encoders.ctvit import CTViTConfig
from radfm_jax.models.encoders.dinov2 import Dinov2Config
from radfm_jax.models.encoders.kinds import data_preset
from radfm_jax.models.encoders.siglip import SiglipConfig, medsiglip
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.pooling import PooledMlpConfig, pool
from radfm_jax.models.radfm import RadFM, RadFMConfig
from radfm_jax.runtime.sharding import make_mesh, param_shardings
from radfm_jax.training.experiment import Experiment, TrainConfig

TINY = {"width": 16, "num_layers": 2, "num_heads": 2, "mlp_width": 24, "image_size": 12, "patch": (4, 4, 1),
        "depth_positions": 8}  # fmt: skip
ENCODERS = {
    "siglip": SiglipConfig(**TINY),
    "dinov2": Dinov2Config(**TINY, registers=3, mlp="swiglu"),
    "ctvit": CTViTConfig(width=16, spatial_layers=1, temporal_layers=1, num_heads=2, head_dim=8, mlp_width=24,
                         image_size=12, patch=(4, 4, 2), depth=4, codebook=8),
}  # fmt: skip
PERCEIVER = PerceiverConfig(width=16, num_layers=1, num_heads=2, head_dim=8, num_latents=4)
MLP = PooledMlpConfig(width=16, hidden=32, grid=(2, 2, 1))
LIMITS = RowLimits(text_length=24, vision_rows=1, patch_length=45, planes=54, scans=3)


def model(vision, perceiver=PERCEIVER) -> RadFMConfig:
    return RadFMConfig(vision, perceiver, radfm.tiny().llama)


def data(config: RadFMConfig) -> DataConfig:
    return DataConfig(
        **data_preset(config.vision) | {"storage": "uint8"}, depth=4, num_latents=config.num_latents, text_length=24,
        vision_rows=1, patch_length=45, planes=54, scans=3,
    )  # fmt: skip


def row(config: RadFMConfig, scans: list[np.ndarray], samples: int) -> dict[str, np.ndarray]:
    """Return a row in which sample i shows scan i: `<image>`, visual tokens, `</image>`, three words."""
    latents, sizes = config.num_latents, data(config).sizes
    texts = []
    for i in range(samples):
        ids = [config.image_id, *[0] * latents, config.image_id + 1, 7 + i, 8, 9]
        visual = [[-1, -1], *[[0, j] for j in range(latents)], *[[-1, -1]] * 4]
        zeros = np.zeros(len(ids))
        texts.append(Encoded(np.array(ids, np.int32), zeros.astype(np.int32), zeros.astype(np.float32),
                             np.array(visual, np.int32), np.ones(len(ids), bool), ()))  # fmt: skip
    loaded = {i: ScanPlanes.of(prepare_volume(scan, sizes=sizes)) for i, scan in enumerate(scans)}
    loaded_row = LoadedRow(texts, [(i,) for i in range(samples)], dict.fromkeys(loaded, 0), loaded)
    arrays = collate_row(loaded_row, LIMITS, num_latents=latents, patch=config.vision.patch)
    return collate_batch([(arrays, None)], LIMITS.planes).arrays


@pytest.mark.parametrize("config", [model(ENCODERS["siglip"]), model(ENCODERS["dinov2"], MLP)], ids=["siglip", "mlp"])
def test_2d_and_3d_scans_share_a_row_and_a_program(config):
    scans = [np.uint8(noise(20, 15, 1, 3, seed=1) * 255), np.uint8(noise(15, 15, 3, 1, seed=2) * 255)]
    params = jax.jit(lambda key: radfm.init_params(config, key))(jax.random.key(0))
    run = jax.jit(lambda params, batch: RadFM(config).apply({"params": params}, batch)[0])
    together = run(params, row(config, scans, 2))[0]
    alone = run(params, row(config, scans[1:], 1))[0]
    flat = run(params, row(config, scans[:1], 1))[0]
    n = config.num_latents + 5
    np.testing.assert_allclose(together[:n], flat[:n], rtol=0, atol=1e-5)
    words = together[n + n - 3 : n + n], alone[n - 3 : n]  # the first word of a sample differs in its id
    np.testing.assert_allclose(together[n : n + config.num_latents + 2], alone[: config.num_latents + 2], atol=1e-5)
    assert np.isfinite(together).all() and np.abs(words[0] - words[1]).max() > 1e-4
    assert run._cache_size() == 1


def test_every_parameter_learns_with_the_mlp_bridge():
    config = model(ENCODERS["siglip"], MLP)
    params = radfm.init_params(config, jax.random.key(0))
    batch = row(config, [np.uint8(noise(12, 12, 3, 1) * 255)], 1)
    loss = lambda params: jnp.square(RadFM(config).apply({"params": params}, batch)[0][:, :9]).sum()  # noqa: E731
    grads = flatten(jax.jit(jax.grad(loss))(params))
    # A bias of all keys does not change a softmax; slices 1 to 3 of 8 positions; embeddings of other words.
    assert [k for k, g in grads.items() if np.abs(g).max() < 1e-7] == ["vit/blocks/key/bias"]


# --- the MLP bridge ---------------------------------------------------------------------------------------------------


def pooled_by_hand(tokens: np.ndarray, grid: tuple[int, int, int], cells: tuple[int, int, int]) -> np.ndarray:
    """Average float[rows, columns, depths, D] in cells."""
    axes = []
    for n, a in zip(grid, cells, strict=True):
        m = min(n, a)
        parts = [[i for i in range(n) if i * m // n == part] for part in range(m)]
        axes.append([parts[cell * m // a] for cell in range(a)])
    return np.array([tokens[np.ix_(i, j, k)].mean((0, 1, 2)) for i in axes[0] for j in axes[1] for k in axes[2]])


@pytest.mark.parametrize("order", ["columns", "slabs"])
@pytest.mark.parametrize("cells", [(2, 2, 2), (3, 1, 4), (1, 1, 1)])
def test_pooling_averages_cells_of_each_scan(order, cells):
    """Scans of other sizes are pooled to the same grid; a 2D scan repeats its slice."""
    patches, grids, width = Patches((4, 4, 2), (8, 8, 16), order), [(4, 5, 1), (2, 2, 6)], 3
    tokens, segments, positions, expected = [noise(7, width, seed=9)], [np.zeros(7)], [np.zeros((7, 3))], []
    for slot, grid in enumerate(grids):
        values = noise(*grid, width, seed=slot)
        entries = patch_positions(grid, patches.tables, order)
        step = np.array(patches.tables) // grid
        tokens.append(values[tuple(((entries + 1) // step - 1).T)])
        segments.append(np.full(len(entries), slot + 1))
        positions.append(entries)
        expected.append(pooled_by_hand(values, grid, cells))
    arrays = (np.concatenate(x)[None, None] for x in (tokens, segments, positions))
    values, segments, positions = arrays
    out = pool(jnp.asarray(values), jnp.asarray(segments, int), jnp.asarray(positions, int), 3, cells)
    np.testing.assert_allclose(out[0, :2], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(out[0, 2], 0)  # an empty slot


# --- sharding and cost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters_are_sharded(name):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings, notes = param_shardings(radfm.abstract_params(model(ENCODERS[name])), mesh)
    vit = {k: s.spec for k, s in flatten(shardings["vit"]).items()}
    # The small rest: scales of heads, biases of heads, and the bias network.
    small = {k.removeprefix("vit/") for k in notes if k.startswith("vit/")}
    assert not {k for k in small if "kernel" in k and not k.startswith("bias/")}, small
    if name == "ctvit":
        assert vit["spatial/query/kernel"] == vit["temporal/query/kernel"] == (None, "fsdp", "tensor", None)
    else:
        assert vit["blocks/query/kernel"] == (None, "fsdp", "tensor", None)
        assert vit["blocks/query/bias"] == (None, "tensor", None)
        assert vit["positions"] == (None, "fsdp")


@pytest.mark.parametrize("name", ENCODERS)
def test_flops_equal_those_of_the_compiled_encoder(name):
    """XLA also counts norms, softmax and activations, and CT-ViT's convolutions and bias network."""
    config = model(dataclasses.replace(ENCODERS[name], remat="none", attention="xla"))
    wide = dataclasses.replace(config.vision, width=64, mlp_width=128, **{"head_dim": 32} if name == "ctvit" else {})
    config = dataclasses.replace(config, vision=wide, perceiver=dataclasses.replace(PERCEIVER, width=64))
    from radfm_jax.models.encoders.kinds import encoder

    arrays = radfm.abstract_batch(config, patches=45, planes=54)
    names = ("planes", "plane_index", "patch_segments", "patch_positions", "scan_scale", "scan_offset")
    params = nn.unbox(radfm.abstract_params(config))["vit"]
    one = {k: jax.tree.map(lambda x: x.update(shape=(1, *x.shape[1:])), v) for k, v in params.items() if k in STACKS}
    # XLA counts the body of a loop once, so the stacks have one layer.
    single = dataclasses.replace(wide, **{k: 1 for k in LAYERS if hasattr(wide, k)})
    apply = jax.jit(lambda p, *a: encoder(single).apply({"params": p}, *a))
    counted = apply.lower(params | one, *(arrays[k] for k in names)).compile().cost_analysis()["flops"]
    ours = flops.forward(dataclasses.replace(config, vision=single), LIMITS)["vit"]
    assert 0.9 < ours / counted < 1.02, (ours, counted)


STACKS, LAYERS = ("blocks", "spatial", "temporal"), ("num_layers", "spatial_layers", "temporal_layers")


@pytest.mark.parametrize("perceiver", [PERCEIVER, MLP])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_plan_knows_every_part(name, perceiver):
    config = model(ENCODERS[name], perceiver)
    experiment = Experiment(config, data(config), TrainConfig(batch=2, remat="attention"))
    memory = estimate.memory(experiment, estimate.abstract_mesh(experiment.mesh, 1))
    assert min(memory.values()) > 0
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nn.unbox(radfm.abstract_params(config))))
    assert memory["parameters"] == 4 * count
    parts = flops.forward(config, experiment.data.limits, experiment.data.channels)
    assert min(parts.values()) > 0
    kernels = program.with_kernels(experiment, "tpu")
    assert kernels.vision.attention == ("auto" if name == "ctvit" else "xla")
    assert radfm.RadFMConfig.from_dict(kernels.to_dict()) == kernels


def test_medsiglip_has_428_million_parameters():
    config = RadFMConfig(medsiglip(), dataclasses.replace(RadFMConfig().perceiver, width=1152), radfm.tiny().llama)
    vit = nn.unbox(radfm.abstract_params(config))["vit"]
    count = sum(math.prod(x.shape) for name, x in flatten(vit).items() if name != "depth_positions")
    assert count == 412_442_352  # 427,883,312 of SiglipVisionModel without its pooling head of 15,240,... parameters
