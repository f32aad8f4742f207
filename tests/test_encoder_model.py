"""A RadFM with another encoder or bridge: 2D and 3D scans in one program, sharding, and its cost."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from encoder_parts import noise
from jax.interpreters import partial_eval

from input_pipeline.batching.collate import LoadedRow, ScanPlanes, collate_batch, collate_row
from input_pipeline.batching.plan import RowLimits
from input_pipeline.config import DataConfig
from input_pipeline.images.planes import Patches, patch_positions
from input_pipeline.images.volumes import prepare_volume
from input_pipeline.text.tokens import Encoded
from radfm_jax.checkpoints.checkpoint import flatten, unflatten
from radfm_jax.cost import estimate, flops, program
from radfm_jax.models import radfm
from radfm_jax.models.encoders.ctvit import CTViTConfig
from radfm_jax.models.encoders.dinov2 import Dinov2Config
from radfm_jax.models.encoders.kinds import data_preset, encoder
from radfm_jax.models.encoders.siglip import SiglipConfig, medsiglip
from radfm_jax.models.lora import LoraConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.pooling import PooledMlpConfig, pool
from radfm_jax.models.radfm import RadFM, RadFMConfig
from radfm_jax.runtime.sharding import make_mesh, param_shardings
from radfm_jax.training.experiment import Experiment, TrainConfig
from radfm_jax.training.optimizer import OptimizerConfig

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


def random_params(config: RadFMConfig) -> dict:
    """Return parameters that need no compilation; norms keep their scale."""
    rng = np.random.default_rng(0)
    shapes = flatten(nn.unbox(radfm.abstract_params(config)))
    value = lambda name, shape: np.float32(rng.normal(size=shape) * 0.3 + name.endswith("scale"))  # noqa: E731
    return unflatten({name: value(name, x.shape) for name, x in shapes.items()})


@pytest.mark.parametrize("config", [model(ENCODERS["siglip"]), model(ENCODERS["dinov2"], MLP)], ids=["siglip", "mlp"])
def test_2d_and_3d_scans_share_a_row_and_a_program(config):
    """One program gives two samples in one row and each of them alone the same logits; every parameter learns."""
    config = config.with_compute(remat="none", attention="xla")
    scans = [np.uint8(noise(20, 15, 1, 3, seed=1) * 255), np.uint8(noise(15, 15, 3, 1, seed=2) * 255)]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, batch):
        logits = RadFM(config).apply({"params": params}, batch)[0]
        return jnp.square(logits * (batch["segments"] > 0)[..., None]).sum(), logits[0]

    params = random_params(config)
    (_, together), grads = run(params, row(config, scans, 2))
    (_, flat), _ = run(params, row(config, scans[:1], 1))
    (_, volume), _ = run(params, row(config, scans[1:], 1))
    n = config.num_latents + 2  # the tokens of a sample that the words after its scan do not reach
    start = n + 3
    scale = np.abs(together).max()
    np.testing.assert_allclose(together[:start], flat[:start], rtol=0, atol=1e-5 * scale)
    np.testing.assert_allclose(together[start : start + n], volume[:n], rtol=0, atol=1e-5 * scale)
    assert np.isfinite(together).all() and np.abs(flat[:n] - volume[:n]).max() > 1e-3 * scale
    assert run._cache_size() == 1
    # A bias of all keys does not change a softmax.
    assert [k for k, g in flatten(grads).items() if not np.abs(g).max() > 0] in ([], ["vit/blocks/key/bias"])


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("dinov2", "ctvit")]


@pytest.mark.parametrize("name", ["vit3d", "siglip", *SLOW])
def test_every_adapter_changes_the_logits(name):
    """A pattern may match every linear map; an adapter that no computation reads would never learn."""
    config = radfm.tiny() if name == "vit3d" else model(ENCODERS[name], MLP if name == "dinov2" else PERCEIVER)
    config = dataclasses.replace(config, lora=LoraConfig(rank=2, targets=("*",))).with_compute(attention="xla")
    shapes = nn.unbox(radfm.abstract_params(config))
    batch = {k: np.zeros(x.shape, x.dtype) for k, x in radfm.abstract_batch(config).items()}
    trace = jax.make_jaxpr(lambda params: RadFM(config).apply({"params": params}, batch)[0])(shapes)
    _, used = partial_eval.dce_jaxpr(trace.jaxpr, [True])
    assert [path for path, is_used in zip(flatten(shapes), used, strict=True) if not is_used] == []
    assert sum(path.endswith("lora_a") for path in flatten(shapes)) > 12


# --- the MLP bridge ---------------------------------------------------------------------------------------------------


def pooled_by_hand(tokens: np.ndarray, grid: tuple[int, int, int], cells: tuple[int, int, int]) -> np.ndarray:
    """Average float[rows, columns, depths, D] in cells."""
    axes = []
    for n, a in zip(grid, cells, strict=True):
        m = min(n, a)
        parts = [[i for i in range(n) if i * m // n == part] for part in range(m)]
        axes.append([parts[cell * m // a] for cell in range(a)])
    return np.array([tokens[np.ix_(i, j, k)].mean((0, 1, 2)) for i in axes[0] for j in axes[1] for k in axes[2]])


@pytest.mark.parametrize("order, cells", [("columns", (2, 2, 2)), ("slabs", (3, 1, 4))])
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
    out = jax.jit(pool, static_argnums=(3, 4))(values, segments.astype(np.int32), positions.astype(np.int32), 3, cells)
    np.testing.assert_allclose(out[0, :2], expected, rtol=0, atol=1e-6)
    np.testing.assert_array_equal(out[0, 2], 0)  # an empty slot


# --- sharding and cost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_parameters_are_sharded(name):
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings, notes = param_shardings(radfm.abstract_params(model(ENCODERS[name])), mesh)
    vit = {k: tuple(s.spec) for k, s in flatten(shardings["vit"]).items()}
    # The small rest: scales of heads, biases of heads, and the bias network.
    small = {k.removeprefix("vit/") for k in notes if k.startswith("vit/")}
    assert not {k for k in small if "kernel" in k and not k.startswith("bias/")}, small
    if name == "ctvit":
        assert vit["spatial/query/kernel"] == vit["temporal/query/kernel"] == (None, "fsdp", "tensor", None)
    else:
        assert vit["blocks/query/kernel"] == (None, "fsdp", "tensor", None)
        assert vit["blocks/query/bias"][:2] == (None, "tensor")
        assert vit["positions"] == (None, "fsdp")


@pytest.mark.parametrize("name", ["siglip", pytest.param("dinov2", marks=pytest.mark.slow), "ctvit"])
def test_flops_equal_those_of_the_compiled_encoder(name):
    """XLA also counts norms, softmax and activations, and CT-ViT's convolutions and bias network."""
    config = model(dataclasses.replace(ENCODERS[name], remat="none", attention="xla"))
    wide = dataclasses.replace(config.vision, width=64, mlp_width=128, **{"head_dim": 32} if name == "ctvit" else {})
    config = dataclasses.replace(config, vision=wide, perceiver=dataclasses.replace(PERCEIVER, width=64))
    arrays = radfm.abstract_batch(config, patches=45, planes=54)
    names = ("planes", "plane_index", "patch_segments", "patch_positions", "scan_scale", "scan_offset")
    params = nn.unbox(radfm.abstract_params(config))["vit"]
    one = {k: jax.tree.map(lambda x: x.update(shape=(1, *x.shape[1:])), v) for k, v in params.items() if k in STACKS}
    # XLA counts the body of a loop once, so the stacks have one layer.
    single = dataclasses.replace(wide, **{k: 1 for k in LAYERS if hasattr(wide, k)})
    apply = jax.jit(lambda p, *a: encoder(single).apply({"params": p}, *a))
    counted = apply.lower(params | one, *(arrays[k] for k in names)).compile().cost_analysis()["flops"]
    ours = flops.forward(dataclasses.replace(config, vision=single), LIMITS)["vit"]
    assert (0.8 if name == "ctvit" else 0.9) < ours / counted < 1.02, (ours, counted)


STACKS, LAYERS = ("blocks", "spatial", "temporal"), ("num_layers", "spatial_layers", "temporal_layers")


@pytest.mark.parametrize("perceiver", [PERCEIVER, MLP])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_plan_knows_every_part(name, perceiver):
    config = model(ENCODERS[name], perceiver)
    experiment = Experiment(
        config, data(config), TrainConfig(batch=2, remat="attention"), OptimizerConfig(method="muon")
    )
    memory = estimate.memory(experiment, estimate.abstract_mesh(experiment.mesh, 1))
    assert min(memory.values()) > 0
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nn.unbox(radfm.abstract_params(config))))
    assert memory["parameters"] == 4 * count
    parts = flops.forward(config, experiment.data.limits, experiment.data.channels)
    assert min(parts.values()) > 0
    kernels = program.with_kernels(experiment, "tpu")
    assert kernels.vision.attention == ("auto" if name == "ctvit" else "xla")
    assert radfm.RadFMConfig.from_dict(kernels.to_dict()) == kernels


def test_medsiglip_has_413_million_parameters():
    config = RadFMConfig(medsiglip(), dataclasses.replace(RadFMConfig().perceiver, width=1152), radfm.tiny().llama)
    vit = flatten(nn.unbox(radfm.abstract_params(config))["vit"])
    layer = 4 * 1152 * 1153 + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    count = sum(math.prod(x.shape) for name, x in vit.items() if name != "depth_positions")
    assert count == (14 * 14 * 3 + 1) * 1152 + 1024 * 1152 + 27 * layer + 2 * 1152 == 413_327_088
