"""Runs of the objectives on practice data: DPO from pairs and GRPO from generated answers, resumed bit by bit."""

import contextlib
import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from practice import practice, write_index
from test_train import MODEL, bits, record

from input_pipeline.batching.pipeline import Rows
from input_pipeline.files import write_json_lines
from radfm_jax.checkpoints import run_directory
from radfm_jax.models import radfm
from radfm_jax.models.lora import LoraConfig
from radfm_jax.runtime import sharding
from radfm_jax.training import display, loop, programs, rollouts
from radfm_jax.training.data import device_batches
from radfm_jax.training.experiment import CheckpointConfig, Experiment, TrainConfig
from radfm_jax.training.losses import answer_losses
from radfm_jax.training.objectives import GRPOConfig
from radfm_jax.training.optimizer import OptimizerConfig

OTHER = {"yes": "no", "no": "yes", "left": "right", "right": "left"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Yes/no questions, and questions about sides, with the wrong answer as the rejected one."""
    directory = tmp_path_factory.mktemp("preference")
    data = practice(directory, train=16, test=0, validation=4, num_latents=4, text_length=256, indexed=False)
    sources = {}
    for split in ("train", "validation"):
        table = directory / "data" / split / "all.jsonl"
        lines = [json.loads(line) for line in table.read_text().splitlines()]
        pairs = [line | {"chosen": line.pop("response")} for line in lines if line["response"] in OTHER]
        pairs = [pair | {"rejected": OTHER[pair["chosen"]]} for pair in pairs]
        pairs.append(pairs[0] | {"id": "too long", "rejected": "no " * 200})
        write_json_lines(directory / "data" / split / "pairs.jsonl", pairs)
        sources[split] = {
            "family": "jsonl",
            "table": f"{split}/pairs.jsonl",
            "root": str(directory / "data"),
        }
    data = dataclasses.replace(
        data, train={"pairs": sources["train"]}, validation={"held_out": sources["validation"]},
        index=str(directory / "pairs_index"), vision_rows=1, scans=4, planes=64,
    )  # fmt: skip
    write_index(data)
    return Experiment(
        dataclasses.replace(MODEL, vision=dataclasses.replace(MODEL.vision, dropout=0.0)),
        data,
        TrainConfig(
            objective="dpo", steps=4, batch=8, accumulation=1, remat="none", log_every=2, eval_every=4, eval_batches=1,
            chunk=64, normalise="sample",
        ),
        OptimizerConfig(learning_rate=1e-2, warmup_steps=1),
        checkpoint=CheckpointConfig(save_every=2, keep_last=9),
        grpo=GRPOConfig(group=3, max_new_tokens=4, kl=0.01, updates=2, generation_batch=16),
    )  # fmt: skip


def mesh_of_one() -> jax.sharding.Mesh:
    return sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])


def random_params(model: radfm.RadFMConfig) -> dict:
    """Return parameters without compiling their initialisation."""
    rng = np.random.default_rng(0)
    shapes = nn.unbox(radfm.abstract_params(model))
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32) / 8), shapes)


def test_answers_of_a_step(config):
    """Every segment gets its own answer, with the log probabilities that training computes, and a resume repeats it.

    The model has adapters.
    """
    model = dataclasses.replace(config.model, lora=LoraConfig(rank=2))
    config = dataclasses.replace(config, model=model, checkpoint=CheckpointConfig(init_from="base"))
    compute, objective, mesh = config.compute, config.grpo, mesh_of_one()
    params = random_params(compute)
    sampler = rollouts.Rollouts(config, mesh)
    with (
        Rows(config.data, "train", batch=2, form=objective.form(training=True)) as rows,
        contextlib.closing(device_batches(rows, mesh, 1)) as data,
    ):
        arrays, infos = next(data)
    filled, sampled = sampler.fill(params, arrays, infos, 3)
    before, after = (jax.tree.map(np.asarray, x) for x in (arrays, filled))
    questions = [sample for info in infos for sample in info.samples]
    assert {sample.reference for sample in questions} <= OTHER.keys() and all(s.reference for s in questions)
    weights, segments = after["weights"], after["segments"]
    answers = {(b, s) for _, b, t in np.argwhere(weights > 0) for s in [int(segments[0, b, t])]}
    assert len(answers) == objective.group * len(questions) == sum(int(x.max()) for x in before["segments"][0])
    assert sampled["answer_tokens"] == pytest.approx(weights.sum() / len(answers))
    np.testing.assert_array_equal(
        after["targets"][..., :-1][weights[..., :-1] > 0], after["ids"][..., 1:][weights[..., :-1] > 0]
    )
    prompt = (before["weights"] == 0) & (before["ids"] > 0)
    np.testing.assert_array_equal(after["ids"][prompt], before["ids"][prompt])
    assert (segments[after["key_ok"] == 0] == 0).all() and not after["advantages"][weights == 0].any()
    batch = {name: jnp.asarray(x[0]) for name, x in filled.items()}
    losses = jax.jit(lambda batch: answer_losses(radfm.RadFM(compute), params, batch, batch["weights"] > 0, chunk=64))
    # The sampler and the training step compute the same probabilities by other programs; measured 4e-6.
    np.testing.assert_allclose(after["log_probs"][0], -np.asarray(losses(batch)["token_loss"]), atol=1e-4)
    again, _ = sampler.fill(params, arrays, infos, 3)
    jax.tree.map(np.testing.assert_array_equal, again, filled)
    other, _ = sampler.fill(params, arrays, infos, 4)
    assert (np.asarray(other["ids"]) != after["ids"]).any()


@pytest.mark.slow
def test_held_out_answers_are_greedy(config):
    """A validation row has one answer to each question."""
    mesh, params = mesh_of_one(), random_params(config.compute)
    with (
        Rows(config.data, "validation", batch=2, form=config.grpo.form(training=False), epochs=1) as rows,
        contextlib.closing(device_batches(rows, mesh, 1)) as data,
    ):
        arrays, infos = next(data)
    sums = rollouts.Rollouts(config, mesh).held_out(params, arrays, infos)
    assert sums["weight"] == sum(len(info.samples) for info in infos if info)
    assert sums["loss"] + sums["reward"] == sums["weight"]


def test_a_pair_that_is_too_long_is_in_quarantine(config):
    quarantined = Path(config.data.index, "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in quarantined] == ["too long"] * 2
    assert "increase data.text_length" in quarantined[0] and "has at least" in quarantined[0]


def test_rows_without_pairs(config):
    """The error names the source, the number of rows and the first of them."""
    fields = dict(config.data.train["pairs"]) | {"table": "train/all.jsonl"}
    data = dataclasses.replace(config.data, train={"plain": fields}, validation={})
    directory = config.data.index + "_plain"
    write_index(dataclasses.replace(data, index=directory))
    with pytest.raises(ValueError, match=r"no `rejected` answer in rows of plain \(.* rows, first: p0-train-.*chosen"):
        Rows(dataclasses.replace(data, index=directory), "train", batch=1, form=config.dpo.form(training=True))


def test_several_processes_are_refused(config, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="'grpo' generates answers in one process, but there are 2"):
        rollouts.Rollouts(config, None)


@pytest.fixture(scope="module")
def compiled_once():
    """The second start of a run uses the programs of the first one."""
    compiled, known = programs.Programs.compile, {}

    def compile_once(config, *others):
        if config.train.objective not in known:
            known[config.train.objective] = compiled(config, *others)
        return known[config.train.objective]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs.Programs, "compile", compile_once)
        yield known


def resumed(config, workdir):
    """Run half of the steps, then the rest in a second start."""
    half = dataclasses.replace(config, train=dataclasses.replace(config.train, eval_every=0))
    stop = {"saves": 0}
    save = loop.Saver.save

    def interrupted(self, state, *arguments, **options):
        save(self, state, *arguments, **options)
        stop["saves"] += 1
        if stop["saves"] == 1:
            self.wait()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Saver, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            loop.train(half, workdir)
    assert run_directory.steps(workdir) == [2]
    assert loop.train(config, workdir) == 0


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_a_run_and_its_resume(config, compiled_once, tmp_path, objective):
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, objective=objective))
    assert loop.train(config, tmp_path / "whole") == 0
    resumed(config, tmp_path / "resumed")
    assert record(tmp_path / "resumed") == record(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, bits(tmp_path / "resumed", 4), bits(tmp_path / "whole", 4))
    lines = display.read_metrics(tmp_path / "whole")
    steps = [line for line in lines if "train/loss" in line]
    held_out = next(line for line in lines if "validation/all/loss" in line)
    if objective == "dpo":
        assert steps[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-5)
        assert steps[0]["train/margin"] == pytest.approx(0, abs=1e-5)
        assert steps[-1]["train/loss"] < np.log(2) and steps[-1]["train/preferred"] > 0.5
        assert 0 <= held_out["validation/all/preferred"] <= 1
    else:
        assert all(0 <= line["train/reward"] <= 1 and line["train/answer_tokens"] >= 1 for line in steps)
        assert held_out["validation/all/loss"] == pytest.approx(1 - held_out["validation/all/reward"])
        assert steps[-1]["train/kl"] > 0
    assert run_directory.best(tmp_path / "whole").name == "4"
