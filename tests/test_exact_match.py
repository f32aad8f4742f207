"""Exact match on test rows, and the control with exchanged scans."""

import dataclasses
import json

import jax
import numpy as np
import parity
import pytest
from ml_collections import ConfigDict
from practice import practice

import radfm_jax
from input_pipeline.batching.mixture import by_side
from input_pipeline.batching.pipeline import Rows, batches
from input_pipeline.sources import open_sources, rows_shown
from radfm_jax.checkpoints import checkpoint
from radfm_jax.evaluate import exact_match as evaluate
from radfm_jax.evaluate import own_answers
from radfm_jax.evaluate.exact_match import ExactMatch
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.radfm import RadFM, RadFMConfig
from radfm_jax.models.vit3d import ViTConfig
from radfm_jax.training.experiment import Experiment, TrainConfig

MODEL = RadFMConfig(
    ViTConfig(width=24, num_layers=1, num_heads=2, head_dim=8, mlp_width=32, dropout=0.0),
    PerceiverConfig(width=24, num_layers=1, num_heads=2, head_dim=8, num_latents=4),
    DecoderConfig(vocab_size=512, width=32, mlp_width=64, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8),
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    data = practice(tmp_path_factory.mktemp("evaluate"), train=6, test=6, num_latents=4, text_length=128)
    return Experiment(MODEL, data, TrainConfig(batch=4, remat="none", chunk=64))


@pytest.fixture(scope="module")
def params(config):
    return jax.device_put(parity.recipe_params(MODEL))


@pytest.fixture(scope="module")
def scored(config, params):
    return evaluate.evaluate(config, params, progress=False)


def test_every_row_is_scored_once_in_each_pass(config, scored):
    datasets = open_sources(config.data, "test")
    rows = {(name, d.row_id(i)) for name, d in datasets.items() for i in range(len(d))}
    sizes = by_side(datasets["yes_no_test"].sides())[1]  # balanced: as many rows of one side as of the other
    unused = sum(max(pair) - min(pair) for pair in zip(sizes[::2], sizes[1::2], strict=True))
    for scans_of in ("own", "another"):
        found = [(one.source, one.row_id) for one in scored if one.scans_of == scans_of]
        assert len(found) == len(set(found)) == len(rows) - unused and set(found) <= rows
        assert {name for name, _ in rows - set(found)} <= {"yes_no_test"}
    texts = {one.source: one for one in scored}
    assert texts["yes_no_test"].reference in ("yes", "no") and texts["vqa_test"].question.endswith("?")


def test_exact_is_what_the_logits_say(config, params):
    """Compare with the plain forward pass; every other sample gets the model's own output as its reference."""
    with Rows(config.data, "test", batch=4, epochs=1) as rows:
        batch = next(iter(batches(rows)))
    arrays = {name: np.array(x) for name, x in batch.arrays.items()}
    logits = np.asarray(jax.jit(lambda p, b: RadFM(MODEL).apply({"params": p}, b)[0])(params, arrays))
    said = logits.argmax(-1)
    trained = arrays["weights"] > 0
    arrays["targets"] = np.where(trained & (arrays["segments"] % 2 == 0), said, arrays["targets"])
    exact = np.asarray(evaluate._exact(config.compute, "weighted", 64, params, arrays))
    seen = []
    for row in range(4):
        for segment in range(1, arrays["segments"][row].max() + 1):
            here = trained[row] & (arrays["segments"][row] == segment)
            seen.append(bool((said[row] == arrays["targets"][row])[here].all()))
            assert exact[row, segment] == seen[-1], (row, segment)
    assert True in seen and False in seen


def test_scans_are_exchanged(config):
    dataset = open_sources(config.data, "test")["modality_test"]
    shown = rows_shown("modality_test", dataset, np.arange(len(dataset)), seed=0)
    assert sorted(shown) == sorted(shown.values()) == list(range(len(dataset)))
    assert all(a != b for a, b in shown.items())
    with pytest.raises(ValueError, match=r"no row of modality_test other than 4 has 1 scans"):
        rows_shown("modality_test", dataset, np.array([3]), seed=0)
    own, other = (
        {
            s.row_id: arrays["planes"][: len(arrays["planes"])].sum()
            for arrays, info in _rows(dataclasses.replace(config.data, shuffle_scans=shuffled))
            for s in info.samples
        }
        for shuffled in (False, True)
    )
    assert own.keys() == other.keys() and own != other


def _rows(data):
    data = dataclasses.replace(data, test={"modality_test": data.test["modality_test"]})
    with Rows(data, "test", batch=1, epochs=1) as rows:
        return [(b.arrays, b.rows[0]) for b in batches(rows) if b.rows[0] is not None]


def test_exchanged_scans_are_those_of_the_other_row(config):
    """The planes of a sample are those of the row whose scans it gets."""
    data = dataclasses.replace(config.data, test={"modality_test": config.data.test["modality_test"]})
    dataset = open_sources(data, "test")["modality_test"]
    shown = rows_shown("modality_test", dataset, np.arange(len(dataset)), data.seed)
    one_each = dataclasses.replace(data, text_length=48, window=1)  # one sample a row

    def scans(config):
        return {info.samples[0].row_id: arrays["planes"] for arrays, info in _rows(config)}

    own, other = scans(one_each), scans(dataclasses.replace(one_each, shuffle_scans=True))
    ids = [dataset.row_id(i) for i in range(len(dataset))]
    for row, another in shown.items():
        np.testing.assert_array_equal(other[ids[row]], own[ids[another]])


# --- tables -----------------------------------------------------------------------------------------------------------


def answers(source, question, reference, right, wrong):
    return [ExactMatch(source, str(i), None, "vqa", question, reference, i < right) for i in range(right + wrong)]


def test_accuracies():
    some = (
        answers("vqa", "Side?", "left", 8, 2)
        + answers("vqa", "Side?", "right", 1, 3)
        + answers("vqa", "Big?", "no", 1, 0)
    )
    some += [ExactMatch("report", str(i), None, "report", f"Q{i}", f"R{i}", i < 5) for i in range(20)]
    report, big, side = evaluate.accuracies(some)
    assert (report.kind, report.samples, report.exact, report.balanced) == ("report", 20, 0.25, None)
    assert (big.kind, big.samples, big.exact, big.balanced) == ("vqa: Big?", 1, 1.0, 1.0)
    assert (side.kind, side.samples) == ("vqa: Side?", 14)
    assert side.exact == pytest.approx(9 / 14) and side.balanced == pytest.approx((0.8 + 0.25) / 2)


@pytest.mark.parametrize(
    "right, n, low, high",
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962)],
)
def test_wilson(right, n, low, high):
    """Published values of the interval."""
    np.testing.assert_allclose(evaluate.wilson(right, n), (low, high), atol=6e-5)


def test_the_command(config, params, tmp_path, capsys):
    file = tmp_path / "config.py"
    file.write_text(
        "import json\nfrom ml_collections import ConfigDict\n"
        f"def get_config():\n    return ConfigDict(json.loads({json.dumps(json.dumps(config.to_dict()))})).lock()\n"
    )
    assert ConfigDict(config.to_dict())
    radfm_jax.save(radfm_jax.Model(MODEL, params, tokenizer_file=config.data.tokenizer), tmp_path / "model")
    assert checkpoint.read_description(tmp_path / "model")
    command = [f"--config={file}", f"--checkpoint={tmp_path / 'model'}", f"--out={tmp_path / 'out'}"]
    assert evaluate.main([*command, "--answers=9", "--config.train.log_every=7"]) == 0
    text = (tmp_path / "out" / "answers.jsonl").read_text()
    answers = [json.loads(line) for line in text.splitlines()]
    sources = open_sources(config.data, "test")
    assert {a["source"] for a in answers} == set(sources)
    for answer in answers:
        assert {"id", "question", "reference", "answer", "correct"} <= answer.keys() and answer["reference"]
        assert answer["correct"] == (answer["answer"].lower() == answer["reference"].lower())
    (generated,) = (tmp_path / "out" / "generated").glob("*/answers.jsonl")
    assert str(tmp_path) not in generated.read_text()
    assert own_answers._generated(tmp_path / "out", [], "other weights") != generated.parent
    assert not generated.exists()  # a run with other weights starts afresh
    shown = " ".join(capsys.readouterr().err.split())
    assert "the model may be untrained" in shown and "next: read the answers" in shown and "exchanged" in shown
    lines = [json.loads(line) for line in (tmp_path / "out" / "exact_match.jsonl").read_text().splitlines()]
    assert {line["scans_of"] for line in lines} == {"own", "another"}
    found = json.loads((tmp_path / "out" / "accuracy.json").read_text())
    assert sum(a["samples"] for a in found["own"]) == len(lines) / 2
    assert evaluate.main([*command, "--config.model.llama.width=64"]) == 2
    assert "different model sizes" in capsys.readouterr().err
