"""Arithmetic of FLOPs, memory, traffic and time, for the configs and by hand."""

from __future__ import annotations

import dataclasses
import io
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from rich.console import Console
from test_configs import STAGES, experiment, root  # noqa: F401

from input_pipeline.batching.plan import RowLimits
from radfm_jax.checkpoints.checkpoint import flatten, unflatten
from radfm_jax.cost import estimate, flops
from radfm_jax.cost.estimate import Source
from radfm_jax.cost.topology import GPUS, TPUS
from radfm_jax.models import quantised, radfm
from radfm_jax.models.lora import LoraConfig
from radfm_jax.models.quantised import BASES
from radfm_jax.runtime import sharding
from radfm_jax.training import display
from radfm_jax.training import optimizer as opt
from radfm_jax.training.experiment import Experiment, MeshConfig, TrainConfig
from radfm_jax.training.optimizer import OptimizerConfig, split


def test_flops_by_what_learns():
    model, limits = radfm.tiny(), RowLimits(64, 2, 16, 64, 3)
    parts = flops.forward(model, limits)
    vit, perceiver, llama = parts["vit"], parts["perceiver"], parts["llama"] + parts["head"]
    for frozen, expected in (
        ((), 3 * (vit + perceiver + llama)),
        (("llama",), 3 * (vit + perceiver) + 2 * llama),
        (("vit",), vit + 3 * (perceiver + llama)),
        (("perceiver",), 3 * (vit + llama) + 2 * perceiver),
        (("vit", "perceiver", "projection", "image_marks"), vit + perceiver + 3 * llama),
        (("vit", "perceiver", "llama"), vit + perceiver + 2 * llama),  # the projection learns
    ):
        assert flops.training(model, limits, frozen) == pytest.approx(expected), frozen
    # A patch of one channel meets a third of the kernel.
    kernel = 2 * 32 * 32 * 32 * 4 * 24
    assert parts["vit"] - flops.forward(model, limits, channels=1)["vit"] == pytest.approx(2 * kernel)
    # performance.md of the paper's size: 54.4 TFLOP forward for 2,048 tokens.
    whole = flops.forward(radfm.radfm_14b(), RowLimits(2048, 14, 1024, 57344, 56))
    assert (whole["llama"] + whole["head"]) / 1e12 == pytest.approx(54.4, abs=0.05)


def test_flops_of_adapters():
    """A frozen language model computes gradients of its inputs, but not of its weights; its adapters learn."""
    limits = RowLimits(64, 2, 16, 64, 3)
    frozen = ("llama", "vit", "perceiver", "projection", "image_marks")
    model = dataclasses.replace(radfm.tiny(), lora=LoraConfig(rank=4))
    parts = flops.forward(model, limits)
    assert parts == flops.forward(radfm.tiny(), limits)
    # 2 layers of query, key, value and out (32 -> 4 x 8), gate and up (32 -> 64), down (64 -> 32).
    adapted = 2 * 64 * 2 * 4 * (4 * (32 + 32) + 3 * (32 + 64))
    language = 2 * (parts["llama"] + parts["head"])
    expected = parts["vit"] + parts["perceiver"] + language + 3 * adapted
    assert flops.training(model, limits, frozen) == pytest.approx(expected)
    # Adapters of the vision encoder: everything after them needs the gradients of its inputs. 2 x 16 patches of a row.
    lora = LoraConfig(rank=4, targets=("vit/blocks/out", "perceiver/blocks/key_value"))
    model = dataclasses.replace(radfm.tiny(), lora=lora)
    adapted = 2 * 32 * 2 * 4 * (16 + 24) + 2 * (32 + 3 * 4) * 2 * 4 * (24 + 2 * 16)
    expected = 2 * parts["vit"] + 2 * parts["perceiver"] + language + 3 * adapted
    assert flops.training(model, limits, frozen) == pytest.approx(expected)


def test_kinds_of_devices():
    for kind, name in (
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
        ("NVIDIA A10G", None),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("TPU v5 lite", "TPU v5 lite"),
        ("TPU v5p", "TPU v5p"),
        ("cpu", None),
    ):
        assert flops.known_device(kind) == name
    assert flops.REACHED.keys() == flops.PEAK.keys()
    assert {chip.name for chip in (*GPUS.values(), *TPUS.values())} <= flops.PEAK.keys()
    assert estimate.published("a100", 4) == estimate.Hardware(4, 156e12, "50 % of 312 TFLOP/s on 4 x A100")
    with pytest.raises(ValueError, match="unknown peak FLOP/s of 'GTX 1080'; known devices: A100"):
        estimate.published("GTX 1080", 1)


def test_a_cpu_is_measured(monkeypatch):
    devices = jax.devices()
    measured = estimate.product_rate(devices[0], "float32", seconds=0.05)
    assert 1e8 < measured < 1e14
    monkeypatch.setattr(estimate, "product_rate", lambda device, dtype: 100e9)
    said = "12 % of the 100 GFLOP/s that a float32 product reaches on this cpu"
    assert estimate.hardware(devices[:1], "float32") == estimate.Hardware(1, 12e9, said)
    # Eight simulated devices share the cores of one; bfloat16 has no published peak here either.
    assert estimate.hardware(devices, "bfloat16") == estimate.Hardware(8, 1.5e9, said.replace("float32", "bfloat16"))


def test_time_in_words():
    config = experiment("pretrain", "--config.train.batch=32")
    line = estimate.time_line(config, 1500, estimate.published("H200", 8))
    assert line == (
        "estimated time: 43 min for 1,500 steps (1.73 s per step: 171 TFLOP per row x 32 rows at 40 % of 989 TFLOP/s "
        "on 8 x H200), without evaluation, saving and communication"
    )
    said = {0.2: "1 s", 40: "40 s", 100: "2 min", 5000: "1 h 23 min", 7170: "2 h 0 min", 1e6: "11 d 14 h"}
    assert {seconds: estimate.duration(seconds) for seconds in said} == said
    assert estimate.amount(999.9e9, "FLOP") == "1 TFLOP" and estimate.amount(4.5e6, "FLOP") == "4.5 MFLOP"


def test_an_epoch_is_as_long_as_tokens_or_scans_make_it():
    sizes = {"a": Source(1000, 100, 256), "b": Source(400, 500, 0), "not used": Source(10**9, 1, 1)}
    config = experiment("quickstart")
    sources = {"a": {"family": "vqa_rad", "fraction": 0.5}, "b": {"family": "pmc_oa"}}
    data = {"train": sources, "mixture": "epoch", "text_length": 2000, "vision_rows": 8, "patch_length": 1000}
    settings = {"data": dataclasses.replace(config.data, **data), "train": TrainConfig(epochs=2, batch=8)}
    config = dataclasses.replace(config, **settings)
    found = estimate.epoch(config, sizes)
    tokens = 500 * 100 + 400 * 500
    assert found.samples == 900 and found.rows == pytest.approx(tokens / 2000 / 0.95)
    assert found.steps == math.ceil(2 * tokens / 2000 / 0.95 / 8)
    crowded = estimate.epoch(config, sizes | {"a": Source(1000, 100, 4096)})
    assert crowded.rows == 500 * 4096 / 8000
    shares = {"a": sources["a"] | {"weight": 3.0}, "b": sources["b"] | {"weight": 1.0}}
    weighted = dataclasses.replace(config.data, train=shares, mixture="weights", epoch_samples=100)
    found = estimate.epoch(dataclasses.replace(config, data=weighted), sizes)
    assert found.samples == 100 and found.rows == pytest.approx((75 * 100 + 25 * 500) / 2000 / 0.95)
    held = dataclasses.replace(config, data=dataclasses.replace(config.data, validation_share=0.1))
    assert estimate.epoch(held, sizes).samples == pytest.approx(810)
    with pytest.raises(ValueError, match="unknown size of data.train sources b"):
        estimate.epoch(config, {"a": sizes["a"]})


def large(batch: int, accumulation: int = 1, remat: str = "full", frozen=(), **mesh) -> Experiment:
    return dataclasses.replace(
        experiment("radfm_14b"),
        train=TrainConfig(batch=batch, accumulation=accumulation, dtype="bfloat16", remat=remat),
        optimizer=OptimizerConfig(frozen=frozen),
        mesh=MeshConfig(**mesh),
    )


def parts_of(config: Experiment, devices: int = 32) -> dict[str, int]:
    return estimate.memory(config, estimate.abstract_mesh(config.mesh, devices))


def test_activations_follow_remat_rows_and_tensor():
    # By hand: what enters each block. A row: 40 x 2,048 x 5,120 of the LLM, 12 x 14,336 x 768 of the vision encoder,
    # 6 x 56 x 32 x 768 of the perceiver, 2 bytes each.
    entries = 2 * (40 * 2048 * 5120 + 12 * 14336 * 768 + 6 * 56 * 32 * 768)
    assert parts_of(large(32))["activations"] == entries
    assert parts_of(large(128))["activations"] == 4 * entries
    assert parts_of(large(128, 4))["activations"] == entries
    # Keys, values, queries and what attention gives: 4 x 5,120 beside the 5,120 that enter; vision 4 x 512 beside 768.
    more = 2 * (40 * 2048 * 4 * 5120 + 12 * 14336 * 4 * 512 + 6 * 56 * 32 * 4 * 512)
    assert parts_of(large(32, remat="projections"))["activations"] == entries + more
    held = [parts_of(large(32, remat=policy))["activations"] for policy in radfm_policies()]
    assert held == sorted(held) and len(set(held)) == len(held)
    # Heads and hidden layers lie over `tensor`, what enters a block does not.
    split = parts_of(large(16, remat="projections", tensor=2))["activations"]
    assert split == entries + more // 2


def radfm_policies() -> list[str]:
    from radfm_jax.models.layers import REMAT_POLICIES

    return list(REMAT_POLICIES)


def test_memory_near_what_a_compiler_said():
    """XLA's TPU compiler, LLaMA-13B alone with float32 state: v6e:4x8, 4 rows a device, full remat 17.5 GB; v5e:8x8,
    1 row, 8.7 GB. Here with vision, and without what one program's layout costs: 20.0 and 7.5, so within a fifth."""
    assert sum(parts_of(large(128)).values()) == pytest.approx(17.5e9, rel=0.2)
    assert sum(parts_of(large(64), 64).values()) == pytest.approx(8.7e9, rel=0.2)


def test_gradients_are_kept_twice_only_where_they_are_added_up():
    assert parts_of(large(128, 4))["gradients"] == 2 * parts_of(large(128))["gradients"]
    assert parts_of(large(128, 4))["batch"] == parts_of(large(128))["batch"]


@pytest.mark.parametrize("base", BASES)
def test_the_state_equals_real_arrays(base):
    """Parameters, optimizer and gradients against the bytes of arrays, after quantisation."""
    lora = LoraConfig(rank=4, targets=("llama/blocks/*", "vit/blocks/out"))
    model = dataclasses.replace(radfm.tiny(), lora=lora, base=base)
    optimizer = OptimizerConfig(frozen=("llama", "vit/blocks"), mu_dtype="bfloat16")
    shapes = nn.unbox(radfm.abstract_params(dataclasses.replace(model, base="float32")))
    params = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), shapes)
    if base in ("int8", "nf4"):
        params = quantised.quantise_params(params, base)
    if base != "float32":  # what is not quantised
        paths = [p for p in flatten(shapes) if p.startswith("llama/") and not p.endswith(("lora_a", "lora_b"))]
        leaves = flatten(params)
        rest = {p: leaves[p].astype(jnp.bfloat16) for p in paths if leaves[p].dtype == jnp.float32}
        params = unflatten(leaves | rest)
    learned, frozen = split(params, optimizer.frozen)
    moments = opt.optimizer(optimizer, learned).init(learned)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))  # noqa: E731
    config = dataclasses.replace(experiment("tiny"), model=model, optimizer=optimizer)
    parts = parts_of(config, devices=1)
    assert parts["parameters"] == size(learned) + size(frozen)
    assert parts["optimizer"] == size(moments)
    assert parts["gradients"] == size(jax.tree.map(jnp.zeros_like, learned))


def test_working_set_and_activations_of_a_quantised_base_with_adapters():
    config = large(1, frozen=("llama",))
    lora = LoraConfig(rank=16, dropout=0.1)
    model = dataclasses.replace(config.model, lora=lora, base="nf4")
    quantised_config = dataclasses.replace(config, model=model)
    # The weights of two blocks in bfloat16, as those of a float32 base, and adapters with their gradient.
    weights, adapters = 4 * 5120 * 5120 + 3 * 5120 * 13824, 16 * (4 * (5120 + 5120) + 3 * (5120 + 13824))
    norms = 2 * 5120
    block = lambda config: estimate._gathered(config, ["llama/blocks"])  # noqa: E731
    assert block(config) == [2 * 2 * (weights + norms)]
    assert block(quantised_config) == [2 * (2 * (weights + norms) + 3 * adapters)]
    plain, adapted = (
        estimate._stacks(c, 1, 1, fused=True, decoder_kernel=True)["llama/blocks"] for c in (config, quantised_config)
    )
    products = 2 * 2048 * (7 * 16 + 5 * 5120 + 2 * 13824)
    assert adapted.dots - plain.dots == products
    assert adapted.live - plain.live == products + 3 * 2048 * (6 * 5120 + 13824)
    assert adapted.saved("full") == plain.saved("full")
    # A frozen head in bfloat16 has no gradient and no copy.
    assert estimate._head(config, 1) - estimate._head(quantised_config, 1) == 4 * 5120 * 32000
    assert estimate._head(large(1), 1) - estimate._head(config, 1) == 4 * 5120 * 32000


def test_dequantised_weights_of_one_layer_at_a_time():
    """A compiled scan over nf4 layers keeps a few arrays of the size of a kernel, not 16 for its table of codes."""
    layers, width = 4, 512
    packed = jax.ShapeDtypeStruct((layers, width // 2, width), jnp.uint8)
    absmax = jax.ShapeDtypeStruct((layers, width // quantised.BLOCK, width), jnp.float32)

    def loss(x, stack):
        @jax.checkpoint
        def layer(x, weights):
            return jnp.tanh(x @ quantised.from_nf4(*weights, 0, jnp.float32)), None

        return jax.lax.scan(layer, x, stack)[0].sum()

    x = jax.ShapeDtypeStruct((8, width), jnp.float32)
    memory = jax.jit(jax.grad(loss)).lower(x, (packed, absmax)).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 4 * width**2


def test_traffic():
    numbers, llama = 13_123_822_336, 13_015_864_320
    cases = (((), 1, 3 * numbers), ((), 4, 12 * numbers), (("llama",), 1, 3 * numbers - llama))
    for frozen, accumulation, passes in cases:
        config = large(128, accumulation, frozen=frozen)
        found = estimate.traffic(config, estimate.abstract_mesh(config.mesh, 32))
        assert found == pytest.approx(2 * passes * 31 / 32, rel=1e-6)
    assert estimate.traffic(large(4), estimate.abstract_mesh(MeshConfig(), 1)) == 0
    # Two replicas of 16 sum the gradients that each has; over 1,024 most of vision (768 wide) is whole everywhere.
    config = large(128, data=2)
    both = 2 * numbers * (3 * 15 / 16 + 1 / 16)
    assert estimate.traffic(config, estimate.abstract_mesh(config.mesh, 32)) == pytest.approx(both, rel=1e-6)
    config = large(1024)
    found = estimate.traffic(config, estimate.abstract_mesh(config.mesh, 1024))
    assert 2 * 3 * llama < found / (1023 / 1024) < 2 * 3 * numbers


def test_a_batch_is_counted_as_it_is_placed():
    """Against the arrays that the pipeline's own empty row has."""
    limits = experiment("pretrain").data.limits
    planes, index = limits.planes * 32 * 32, limits.vision_rows * limits.patch_length * (12 + 1 + 3) * 4
    text = limits.text_length * (4 * 4 + 1 + 3 * 4)
    assert parts_of(large(32))["batch"] == 2 * (planes + index + text + limits.scans * 3 * 4)


def test_rows_that_do_not_divide_and_meshes_that_do_not_fit():
    with pytest.raises(ValueError, match="train.batch 48 is not a multiple of train.accumulation 2 times the 32 dev"):
        parts_of(large(48, 2))
    with pytest.raises(ValueError, match="mesh.data must be at least 1, or -1"):
        MeshConfig(data=0)
    for mesh in ({"fsdp": 16}, {"tensor": 5}, {"data": -1}):
        with pytest.raises(ValueError, match="does not make a mesh of 32 devices"):
            estimate.abstract_mesh(MeshConfig(**mesh), 32)
    assert dict(estimate.abstract_mesh(MeshConfig(data=2, tensor=2), 32).shape) == {"data": 2, "fsdp": 8, "tensor": 2}


def test_a_real_mesh_will_do():
    config = experiment("tiny", "--config.train.remat=none")
    simulated = sharding.make_mesh()
    plain, fused = estimate.memory(config, simulated), estimate.memory(config, simulated.abstract_mesh)
    assert plain["parameters"] == fused["parameters"]
    # Without a fused kernel the scores of all pairs of tokens exist, and without remat they are kept.
    assert plain["activations"] > fused["activations"]
    assert estimate.capacity(simulated) is None


def test_the_memory_table():
    def shown(limit):
        console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
        console.print(display.memory_table({"parameters": 1_640_000_000, "working set": 500_000_000}, limit))
        return console.export_text(styles=True)

    assert "1.6 GB" in shown(None) and "500.0 MB" in shown(None) and "2.1 GB" in shown(None)
    assert "2.1 GB of 80.0 GB" in shown(80_000_000_000)
    assert "\x1b[1;31m" in shown(2_000_000_000) and "\x1b[1;31m" not in shown(80_000_000_000)
