"""Which methods fit on which devices: radfm_jax.cost.methods, and its tables in `python -m radfm_jax.plan`."""

import dataclasses
import json

import pytest

from configs import radfm_14b, tiny
from radfm_jax.cost import command, estimate, methods, report
from radfm_jax.cost.topology import parse
from radfm_jax.models.lora import LoraConfig
from radfm_jax.training.experiment import Experiment, MeshConfig, TrainConfig

MESH = estimate.abstract_mesh(MeshConfig(), 1)


@pytest.fixture(scope="module")
def tiny_config():
    """The tiny model with three rows of 512 tokens, so that activations matter."""
    config = Experiment.from_dict(tiny.get_config())
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, text_length=512),
        train=dataclasses.replace(config.train, batch=4, remat="none"),
        optimizer=dataclasses.replace(config.optimizer, frozen=("vit",)),
    )


def test_methods_change_what_learns_and_how_the_base_is_held(tiny_config):
    variants = {method: methods.variant(tiny_config, method) for method in (methods.CONFIG, *methods.METHODS)}
    assert variants[methods.CONFIG] == tiny_config
    settings = {name: (v.optimizer.frozen, v.model.lora, v.model.base) for name, v in variants.items()}
    adapters = LoraConfig()
    assert settings == {
        methods.CONFIG: (("vit",), None, "float32"),
        "full": ((), None, "float32"),
        "frozen": (("vit", "llama"), None, "float32"),
        "frozen, bfloat16": (("vit", "llama"), None, "bfloat16"),
        "LoRA": (("vit", "llama"), adapters, "bfloat16"),
        "QLoRA": (("vit", "llama"), adapters, "nf4"),
    }
    groups = ("data", "train", "mesh")
    assert all(getattr(v, group) == getattr(tiny_config, group) for v in variants.values() for group in groups)
    # The config's own adapters remain.
    own = LoraConfig(rank=3, targets=("llama/blocks/up",))
    adapted = methods.variant(tiny_config, "LoRA")
    adapted = dataclasses.replace(adapted, model=dataclasses.replace(adapted.model, lora=own))
    assert methods.variant(adapted, "QLoRA").model.lora == own and methods.variant(adapted, "full").model.lora is None


def test_methods_by_row_length(tiny_config):
    """Each method needs less than the one before, longer rows need more, and the leanest micro-batches are chosen."""
    topology = parse("gpu:1xRTX4090-24GB")
    table = methods.table(tiny_config, topology, (256, 1024))
    assert {len(fits) for fits in table.values()} == {3}
    states = [fits[0].state for fits in table.values()]
    full, frozen, narrow, lora, qlora = states
    assert full > frozen > narrow and lora > narrow and qlora < lora
    for fits in table.values():
        assert [fit.config.data.text_length for fit in fits] == [256, 512, 1024]
        assert fits[0].total < fits[1].total < fits[2].total and len({fit.state for fit in fits}) == 1
        assert all(fit.config.train.remat == "full" and fit.fits for fit in fits)
        train = fits[2].config.train
        for accumulation in (1, 2, 4):
            other = dataclasses.replace(train, accumulation=accumulation)
            memory = estimate.memory(dataclasses.replace(fits[2].config, train=other), MESH, "cuda")
            assert sum(memory.values()) >= fits[2].total
    small = dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=fits[2].total / 0.91))
    assert not dataclasses.replace(fits[2], topology=small).fits


def test_the_smallest_devices(monkeypatch, tiny_config):
    assert methods.smallest(tiny_config, "QLoRA").topology.text == "gpu:1xRTX4080-16GB"
    calls = []

    def needs(config, topology, method, lengths):
        """A state of 200 GB that is sharded, and 10 GB on each device."""
        calls.append(topology.count)
        return [methods.Fit(method, topology, config, {"parameters": int(200e9 / topology.count + 10e9)})]

    monkeypatch.setattr(methods, "fits", needs)
    assert methods.smallest(tiny_config, "full").topology.text == "gpu:2xH200" and calls == [1, 2]
    fixed = dataclasses.replace(tiny_config, mesh=MeshConfig(data=1, fsdp=8))
    assert methods.smallest(fixed, "full").topology.text == "gpu:8xA100-40GB"
    with pytest.raises(ValueError, match="mesh.fsdp=3, mesh.tensor=1 does not make a mesh of 1 devices"):
        methods.smallest(dataclasses.replace(tiny_config, mesh=MeshConfig(fsdp=3)), "full")
    monkeypatch.setattr(
        methods, "fits", lambda config, t, method, _: [methods.Fit(method, t, config, {"batch": 10**12})]
    )
    assert methods.smallest(tiny_config, "full") is None


def test_qlora_of_the_released_model_fits_on_a_consumer_gpu():
    """At most 16 GB of state on one device, by hand: 4 bits and 4 bytes per 64 of the weights of the blocks, bfloat16
    of the rest of the language model; the other parts and the adapters with two moments and a gradient."""
    config = dataclasses.replace(Experiment.from_dict(radfm_14b.get_config()), train=TrainConfig(dtype="bfloat16"))
    [fit] = methods.fits(config, parse("gpu:1xRTX4090-24GB"), "QLoRA", [2048])
    blocks = 40 * (4 * 5120 * 5120 + 3 * 5120 * 13824)
    others = 2 * 32000 * 5120 + 81 * 5120  # embedding, head, norms
    adapters = 40 * 16 * (4 * (5120 + 5120) + 3 * (5120 + 13824))
    learned = 13_123_822_336 - blocks - others + adapters
    assert fit.memory["parameters"] == blocks / 2 + blocks / 64 * 4 + others * 2 + learned * 4
    assert fit.memory["optimizer"] == pytest.approx(2 * 4 * learned, abs=100)
    assert fit.memory["gradients"] == 4 * learned * (2 if fit.config.train.accumulation > 1 else 1)
    assert fit.state < 16e9 and fit.fits


def test_the_tables_of_the_command(tmp_path, capsys):
    options = ("--config=configs/tiny.py", f"--json={tmp_path / 'plan.json'}")

    def run(*arguments):
        code = command.main(list(arguments))
        return code, capsys.readouterr()

    code, output = run(*options, "--topology=gpu:1xL4", "--compile=none", "--config.train.minutes=2",
                       "--config.train.steps=0")  # fmt: skip
    fits = json.loads((tmp_path / "plan.json").read_text())["methods"]
    assert code == 0 and "2 minutes: " in output.out and "the state is" in output.out
    assert len(fits) == len(methods.METHODS) * 6 and {fit["text_length"] for fit in fits} >= {160, 512, 8192}
    assert all(fit["fits"] == (fit["memory_total"] <= 0.9 * 24e9) for fit in fits)
    assert (
        f"{report.brief(fits[-1]['memory_total'] / 1e9)} yes" in output.out and "40% of 121 TFLOP/s, assu" in output.out
    )
    code, output = run(*options, "--smallest")
    smallest = json.loads((tmp_path / "plan.json").read_text())["smallest"]
    assert code == 0 and smallest.keys() == {methods.CONFIG, *methods.METHODS}
    assert {fit["topology"] for fit in smallest.values()} == {"gpu:1xRTX4080-16GB"} and "gpu:1xRTX4080" in output.out
    code, output = run(*options, "--smallest", "--batch=3")
    assert code == 2 and "--batch needs --topology" in output.err
