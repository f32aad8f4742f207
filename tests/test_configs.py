"""Every file of configs/: it loads, its sizes are consistent, its numbers and commands are correct.

Also tests the estimates that the numbers come from.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import json
import math
import re
import shlex
from pathlib import Path

import config_docs
import jax
import pytest
from ml_collections import ConfigDict

from input_pipeline import command_line
from input_pipeline.datasets import FAMILIES
from radfm_jax.checkpoints import checkpoint
from radfm_jax.checkpoints.checkpoint import flatten
from radfm_jax.cost import estimate
from radfm_jax.evaluate.radbench import Benchmark
from radfm_jax.models import radfm
from radfm_jax.models.lora import LoraConfig
from radfm_jax.training import train_step
from radfm_jax.training.data import check_validation
from radfm_jax.training.experiment import GROUPS, Experiment

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "__init__")
BENCHMARKS = [name for name in NAMES if name.startswith("radbench")]
FILES = [name for name in NAMES if name not in BENCHMARKS]
STAGES = ("pretrain_align", "pretrain", "finetune")
ADAPTATIONS = [name for name in FILES if name.startswith("adapt") and name != "adapt_small"]
PRACTICE = ("quickstart", "tiny", "smollm2_practice", "preference_practice")  # of the practice data, without a root
BACKBONES = ("qwen3_8b_medsiglip", "gemma3_4b_medsiglip", "llama31_8b_vit3d")
# The hardware of the numbers in the docstrings.
HARDWARE = {
    **dict.fromkeys(STAGES, estimate.published("A100", 32)),
    **dict.fromkeys(ADAPTATIONS, estimate.published("H200", 1)),
    **dict.fromkeys(BACKBONES, estimate.published("H100", 1)),
}


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


def parsed(name: str, *changes: str) -> ConfigDict:
    parser = argparse.ArgumentParser(prog="program", allow_abbrev=False)
    command_line.add_config(parser)
    name, _, root = name.partition(":")
    return command_line.parse(parser, [f"--config=configs/{name}.py" + (root and f":{root}"), *changes])[1]


def plain(config: dict) -> dict:
    return json.loads(json.dumps(config, default=list))


def module(name: str):
    return importlib.import_module(f"configs.{name}")


def experiment(name: str, *changes: str) -> Experiment:
    return Experiment.from_dict(parsed(name, *changes))


def test_the_expected_configs_exist():
    benchmarks = {f"adapt_{name}" for name in ("vqa_rad", "slake", "pmc_vqa", "mimic_cxr", "diagnosis")}
    assert {"radfm_14b", "quickstart", "tiny", "adapt", *STAGES, *benchmarks} <= set(FILES)


# --- every file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_config_has_every_field(name):
    """Every field of every group is present, so that every field can be overridden."""
    config = parsed(name)
    read = Experiment.from_dict(config)
    assert plain(config.to_dict()) == plain(read.to_dict())
    assert config.is_locked
    assert Experiment.from_dict(read.to_dict()) == read


@pytest.mark.parametrize("name", FILES)
def test_sizes_fit_each_other(name):
    config = experiment(name)
    assert config.data.num_latents == config.model.num_latents
    rows, columns, depths = config.model.vision.tables
    h, w, d = config.model.vision.patch
    for side, depth in ((config.data.size_2d, d), (config.data.size_3d, config.data.depth)):
        assert side % h == side % w == depth % d == 0 and side // h <= rows and side // w <= columns
        assert depth // d <= depths and (side // h) * (side // w) * (depth // d) <= config.data.patch_length
    devices = HARDWARE[name].count if name in HARDWARE else 1
    mesh = estimate.abstract_mesh(config.mesh, devices)
    assert min(estimate.memory(config, mesh).values()) > 0  # raises where rows do not divide
    # Checks the schedule and the names in `rates` and `frozen`.
    train_step.abstract_state(config.model, config.optimizer, mesh)
    for where, source in config.data.sources().items():
        known = {field.name for field in dataclasses.fields(FAMILIES[source["family"]])} | {"family", "weight"}
        assert source.keys() <= known, where


@pytest.mark.parametrize("name", FILES)
def test_misspelt_fields(name, capsys):
    for given, near in (
        ("train.bacth=3", "batch"),
        ("optimizer.learning_rat=1.0", "learning_rate"),
        ("model.llama.widht=3", "width"),
        ("data.text_lenght=3", "text_length"),
        ("mesh.fsp=3", "fsdp"),
        ("checkpoint.init_form=x", "init_from"),
    ):
        with pytest.raises(SystemExit):
            parsed(name, f"--config.{given}")
        assert near in capsys.readouterr().err.strip().splitlines()[-1]
    whole = experiment(name).to_dict()
    for group in GROUPS:
        known = next(iter(whole[group]))
        with pytest.raises(ValueError, match=rf"{group}\.{known}x \(did you mean .*{known}\?\)"):
            Experiment.from_dict(whole | {group: whole[group] | {known + "x": 1}})
    with pytest.raises(ValueError, match=r"dato \(did you mean data\?\)"):
        Experiment.from_dict(whole | {"dato": {}})


def commands():
    for name in NAMES:
        text = (module(name).__doc__ or "").replace("\\\n", " ")
        for line in text.splitlines():
            if line.startswith("    python -m ") or line.startswith("python -m "):
                yield pytest.param(shlex.split(line), id=f"{name}: {line.split()[2]}")


@pytest.mark.parametrize("command", list(commands()))
def test_the_commands_of_docstrings(command):
    """The module exists, and the config accepts every override in the command."""
    assert importlib.util.find_spec(command[2]) is not None
    parser = argparse.ArgumentParser(allow_abbrev=False)
    command_line.add_config(parser)
    if "radfm_jax.convert" not in command and "input_pipeline.phantoms" not in command:
        given = [part for part in command if part.startswith("--config")]
        if not given:  # generate reads the config of the checkpoint
            return
        kind = Benchmark if "configs/radbench" in given[0] else Experiment
        kind.from_dict(command_line.parse(parser, given)[1])


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_has_every_field(name, capsys):
    config = parsed(name)
    assert config.is_locked and plain(Benchmark.from_dict(config).to_dict()) == plain(config.to_dict())
    with pytest.raises(SystemExit):
        parsed(name, "--config.limt=3")
    assert "limit" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", HARDWARE)
def test_the_numbers_of_docstrings(name):
    """Recompute the numbers: on a failure, copy the lines of the left side into the docstring."""
    lines = config_docs.summary(experiment(name), HARDWARE[name], getattr(module(name), "SIZES", None))
    text = module(name).__doc__
    assert [line for line in lines if f"    {line}\n" not in text + "\n"] == []
    assert text.count("\n    memory: ") == 1 and text.count("\n    a step: ") == 1


def test_the_table_of_the_docs():
    text = (ROOT / "docs" / "configs.md").read_text()
    for name, devices in HARDWARE.items():
        if name == "adapt" or name in BACKBONES:  # their data are the user's
            continue
        config, sizes = experiment(name), module(name).SIZES
        mesh = estimate.abstract_mesh(config.mesh, devices.count)
        gigabytes = sum(estimate.memory(config, mesh).values()) / 1e9
        each, steps = estimate.step_seconds(config, devices), estimate.epoch(config, sizes).steps
        received = estimate.traffic(config, mesh) / config_docs.LINK
        cells = [
            f"`{name}`", devices.basis.split(" on ")[1], f"{gigabytes:.0f}", f"{each:.3g}", estimate.about(steps),
            estimate.duration(each * steps), f"{received:.2g} s a step" if received else "none",
        ]  # fmt: skip
        assert f"| {' | '.join(map(str, cells))} |" in text


@pytest.mark.parametrize("name", STAGES)
def test_memory_of_the_stages_with_one_micro_batch(name):
    whole, merged = experiment(name), experiment(name, "--config.train.accumulation=1")
    mesh = estimate.abstract_mesh(whole.mesh, 32)
    assert estimate.traffic(merged, mesh) * 4 == estimate.traffic(whole, mesh)
    stated = re.search(r"accumulation=1` computes .* It needs (\d+) GB a device", module(name).__doc__, re.DOTALL)
    assert int(stated[1]) == round(sum(estimate.memory(merged, mesh).values()) / 1e9)
    # At 25 GB/s, arithmetic hides the traffic of one micro-batch, but not of four.
    seconds = estimate.step_seconds(whole, HARDWARE[name])
    link = config_docs.LINK
    assert estimate.traffic(merged, mesh) / link < seconds < estimate.traffic(whole, mesh) / link


@pytest.mark.parametrize("name", HARDWARE)
def test_warm_up_ends_well_before_the_run(name):
    config = experiment(name)
    if hasattr(module(name), "SIZES"):
        steps = estimate.epoch(config, module(name).SIZES).steps
        assert config.optimizer.warmup_steps <= 0.2 * steps and config.train.eval_every < steps


# --- the stages -------------------------------------------------------------------------------------------------------


def test_each_stage_starts_from_the_one_before():
    stages = {name: experiment(name) for name in STAGES}
    assert [c.checkpoint.init_from for c in stages.values()] == ["medllama", "runs/pretrain_align", "runs/pretrain"]
    for name in STAGES:
        assert f"--workdir=runs/{name}" in module(name).__doc__
    assert "convert from-hf MedLLaMA_13B/ medllama/" in module("pretrain_align").__doc__
    assert [c.train.epochs for c in stages.values()] == [1, 3, 2]
    # With equal seeds, the first epoch of a stage would repeat the order and crops of the stage before.
    assert len({c.data.seed for c in stages.values()}) == len({c.train.seed for c in stages.values()}) == 3
    for config in stages.values():  # section 4.3.1
        assert config.data.text_length == 2048 and config.train.accumulation == 4
        assert config.train.batch == 32 * 4 and config.train.dtype == "bfloat16" and config.train.remat == "full"
        assert config.model == radfm.radfm_14b()
        assert {part.param_dtype for part in (config.model.vision, config.model.llama)} == {"float32"}


def test_the_data_are_those_of_tables_1_and_2():
    align, pretrain, finetune = (experiment(name) for name in STAGES)
    assert align.data == dataclasses.replace(pretrain.data, seed=0)
    families = lambda c: {source["family"] for source in c.data.train.values()}  # noqa: E731
    elsewhere = {"diagnosis", "jsonl", "tfds", "mpx_questions"}
    assert families(pretrain) == FAMILIES.keys() - elsewhere
    assert families(pretrain) - families(finetune) == {"pmc_inline", "pmc_oa"}
    # 4.3: all available data
    assert pretrain.data.epoch == "all" and {s["fraction"] for s in pretrain.data.train.values()} == {1.0}
    released = experiment("pretrain", "--config.data.epoch=released")
    drawn = [estimate.epoch(config, module("pretrain").SIZES).samples for config in (pretrain, released)]
    fifths = module("pretrain").SIZES["mpx_single"].rows + module("pretrain").SIZES["rad3d_modality"].rows
    assert drawn[0] - drawn[1] == pytest.approx(0.8 * fifths * (1 - pretrain.data.validation_share))
    changed = {name for name, source in finetune.data.train.items() if source != pretrain.data.train[name]}
    balanced = {"cxr_mix", "vindr_pcxr", "vindr_mammo", "vindr_spinexr"}
    assert changed == set(module("finetune").FILTERED) | balanced
    # Table 2: normal and abnormal; cxr_mix_yes_no is balanced by default.
    assert {name for name, s in finetune.data.train.items() if s.get("balance")} == balanced
    assert not any(s.get("balance") for s in pretrain.data.train.values())
    assert finetune.data.train["rad3d_caption"]["sizes"] == "remove"
    assert finetune.data.index != pretrain.data.index == align.data.index
    assert len(pretrain.data.test) == 13  # Table 3


@pytest.mark.parametrize("name", FILES)
def test_training_does_not_evaluate_test_tables(name):
    config = experiment(name)
    check_validation(config)
    assert config.data.validates and config.data.test and not config.train.validate_on_test


def test_all_stages_hold_out_the_same_studies():
    splits = {(c.data.validation_share, c.data.validation_seed) for c in map(experiment, STAGES)}
    assert len(splits) == 1


@pytest.mark.parametrize("name", [name for name in FILES if name not in PRACTICE])
def test_another_root_is_one_argument(name):
    config = experiment(f"{name}:/mnt/medmd")
    roots = {Path(source["root"]) for source in config.data.sources().values()}
    assert all(root.is_relative_to("/mnt/medmd") for root in (*roots, Path(config.data.index)))


def test_folders_of_another_root():
    config = experiment("finetune:/mnt/medmd")
    assert {Path(source["root"]).parent for source in config.data.sources().values()} == {Path("/mnt/medmd")}
    assert config.data.index == "/mnt/medmd/radmd_index"


def test_a_frozen_language_model_costs_no_moments():
    """At full size over 32 devices, from shapes alone."""
    bytes_of = lambda tree: sum(  # noqa: E731
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
    whole, beside_llm = 13_123_822_336, 107_958_016
    for name, learning in (("pretrain_align", beside_llm), ("pretrain", whole)):
        config = experiment(name)
        mesh = estimate.abstract_mesh(config.mesh, 32)
        state, _, _ = train_step.abstract_state(config.model, config.optimizer, mesh)
        named = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state["opt"])}
        assert any("llama" in path for path in named) == (name == "pretrain")
        assert {path.partition("/")[0] for path in flatten(state["frozen"])} == (
            {"llama"} if name == "pretrain_align" else set()
        )
        assert bytes_of(state["params"]) + bytes_of(state["frozen"]) == whole * 4 / 32
        assert bytes_of(state["opt"]) == pytest.approx(2 * learning * 4 / 32, abs=64)  # and two counters
        found = estimate.memory(config, mesh)
        assert found["parameters"] == whole * 4 / 32 and found["optimizer"] == bytes_of(state["opt"])
        assert found["gradients"] == 2 * learning * 4 / 32


@pytest.mark.parametrize("name", ADAPTATIONS)
def test_adaptations_freeze_the_language_model(name):
    config = experiment(name)
    assert config.optimizer.frozen == ("llama",) and config.checkpoint.init_from == "radfm"
    assert config.model == radfm.radfm_14b()
    assert config.data.test and len((ROOT / "configs" / f"{name}.py").read_text().splitlines()) < 75


@pytest.mark.parametrize("name", [*ADAPTATIONS, "adapt_small", *BACKBONES])
def test_adaptations_have_variants_with_adapters(name, tmp_path):
    """The variants differ from the config in the model's adapters, its base, what is frozen, and learning rates."""
    plain_config, lora, qlora = (parsed(name + variant) for variant in ("", ":lora", f":qlora,{tmp_path}"))
    assert (lora.model.base, qlora.model.base, lora.model.lora.rank) == ("bfloat16", "nf4", 16)
    assert str(tmp_path) in str(qlora.data.train)
    read = Experiment.from_dict(lora)
    assert "llama" in read.optimizer.frozen
    assert read.optimizer.rates["vit"] * read.optimizer.learning_rate == pytest.approx(
        plain_config.optimizer.learning_rate * plain_config.optimizer.rates.get("vit", 1.0)
    )
    assert lora.train.accumulation == lora.train.batch
    lora.train.accumulation = plain_config.train.accumulation
    same = ("data", "train", "mesh", "checkpoint")
    assert plain({k: lora[k].to_dict() for k in same}) == plain({k: plain_config[k].to_dict() for k in same})
    changed = parsed(f"{name}:lora", "--config.model.lora.rank=4", "--config.model.base=int8")
    assert Experiment.from_dict(changed).model.lora.rank == 4 and changed.model.base == "int8"


@pytest.mark.parametrize("name", [*ADAPTATIONS, "adapt_small"])
def test_adaptations_follow_the_checkpoint(name, tmp_path, capsys):
    """Model, tokenizer and preparation are those of `init_from`, but for what an option sets."""
    quickstart = experiment("quickstart")
    model = dataclasses.replace(quickstart.model, llama=dataclasses.replace(quickstart.model.llama, rope_theta=5e5))
    checkpoint.write_description(tmp_path, "radfm", model.to_dict())
    (tmp_path / "tokenizer.model").write_bytes(b"pieces")
    (tmp_path / "run.json").write_text(json.dumps({"config": plain(quickstart.to_dict())}))
    config = experiment(name, f"--config.checkpoint.init_from={tmp_path}", "--config.data.depth=16")
    assert config.model == model and config.data.tokenizer == str(tmp_path / "tokenizer.model")
    followed = ("size_2d", "size_3d", "storage", "num_latents", "text_length", "vision_rows", "patch_length", "scans")
    assert [getattr(config.data, f) for f in followed] == [getattr(quickstart.data, f) for f in followed]
    assert config.data.depth == 16 and config.data.channels == 3
    for start in ("nowhere", ""):
        assert experiment(name, f"--config.checkpoint.init_from={start}").model == radfm.radfm_14b()
    trained = dataclasses.replace(model, lora=LoraConfig(rank=2, targets=("llama/blocks/up",)), base="int8")
    checkpoint.write_description(tmp_path, "radfm", trained.to_dict())
    assert experiment(name, f"--config.checkpoint.init_from={tmp_path}").model == trained
    for damaged in ("{}", '{"config": []}', '{"config": {"data": {"train": 1}}}'):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(SystemExit):
            parsed(name, f"--config.checkpoint.init_from={tmp_path}")
        assert "run.json" in capsys.readouterr().err


def test_memory_of_adapt_when_the_language_model_learns():
    changes = re.findall(r"--config\.optimizer[^\s`]+", module("adapt").__doc__)
    given = [shlex.split(change)[0] for change in changes]
    assert len(given) == 2
    config = experiment("adapt", *given, "--config.train.accumulation=1")
    assert config.optimizer.frozen == () and config.optimizer.learning_rate == 5e-6
    found = estimate.memory(config, estimate.abstract_mesh(config.mesh, 8))
    state = 8 * sum(found[part] for part in ("parameters", "optimizer", "gradients"))
    assert round(state / 1e9) == 210 and "210 GB over all devices" in module("adapt").__doc__


def test_memory_of_adapt_with_adapters():
    for variant, most in (("lora", 40), ("qlora", 24)):
        config = experiment(f"adapt:{variant}")
        found = estimate.memory(config, estimate.abstract_mesh(config.mesh, 1))
        (stated,) = re.findall(rf"adapt.py:{variant}` \((\d+) GB", module("adapt").__doc__)
        assert int(stated) == round(sum(found.values()) / 1e9) < 0.9 * most
        state = sum(found[part] for part in ("parameters", "optimizer", "gradients"))
        assert variant == "lora" or state < 16e9


@pytest.mark.parametrize("name", ["radfm_14b", *STAGES, "radbench"])
def test_stages_use_umls_if_the_data_folder_has_it(name, tmp_path):
    config = lambda: parsed(f"{name}:{tmp_path}")  # noqa: E731
    terms = lambda c: c.terms if name == "radbench" else c.data.terms  # noqa: E731
    assert terms(config()) == "open"
    (tmp_path / "umls").mkdir()
    (tmp_path / "umls" / "MRCONSO.RRF").touch()
    assert terms(config()) == f"umls:{tmp_path}/umls"
    assert terms(parsed(f"{name}:{tmp_path}", f"--config.{'' if name == 'radbench' else 'data.'}terms=open")) == "open"
