"""Runs of the objectives on practice data: DPO from pairs and GRPO from generated answers, resumed bit by bit."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from practice import practice, write_index
from test_train import MODEL, bits, record

from input_pipeline.files import write_json_lines
from radfm_jax.checkpoints import run_directory
from radfm_jax.training import display, loop, programs
from radfm_jax.training.experiment import CheckpointConfig, Experiment, TrainConfig
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
        assert steps[0]["train/loss"] == pytest.approx(np.log(2), abs=1e-6) and steps[0]["train/margin"] == 0
        assert steps[-1]["train/loss"] < np.log(2) and steps[-1]["train/preferred"] > 0.5
        assert 0 <= held_out["validation/all/preferred"] <= 1
    else:
        assert all(0 <= line["train/reward"] <= 1 and line["train/answer_tokens"] >= 1 for line in steps)
        assert held_out["validation/all/loss"] == pytest.approx(1 - held_out["validation/all/reward"])
        assert steps[-1]["train/kl"] > 0
    assert run_directory.best(tmp_path / "whole").name == "4"
