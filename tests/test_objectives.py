"""DPO and GRPO: losses against numpy, gradients, advantages, and the segments that they read."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import packed
import pytest
from ml_collections import ConfigDict
from token_parts import installed

from input_pipeline.batching.collate import LoadedRow, ScanPlanes, collate_row
from input_pipeline.batching.plan import RowLimits, plan_rows
from input_pipeline.images.planes import Volume
from input_pipeline.samples import RowError, Sample, Scan, Text
from input_pipeline.sources import NoTerms
from input_pipeline.text.alternatives import Group, Pair
from input_pipeline.text.tokens import encode
from radfm_jax.checkpoints.checkpoint import flatten, unflatten
from radfm_jax.models import radfm
from radfm_jax.models.lora import B, LoraConfig, is_adapter
from radfm_jax.runtime import sharding
from radfm_jax.training import objectives, train_step
from radfm_jax.training.experiment import Experiment
from radfm_jax.training.losses import answer_losses
from radfm_jax.training.objectives import DPOConfig, GRPOConfig, group_advantages
from radfm_jax.training.optimizer import OptimizerConfig
from radfm_jax.training.rewards import Rewards, term_f1

# --- losses -----------------------------------------------------------------------------------------------------------

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 0, 0], [1, 1, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0]])
WEIGHTS = np.array([[0, 1, 3, 0, 1, 0, 1, 0, 1, 1, 0, 0], [0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]], np.float32)
# Chosen and rejected positions of each pair, by hand.
PAIRS = [((0, [1, 2]), (0, [4])), ((0, [6]), (0, [8, 9])), ((1, [1]), (1, [3, 4]))]


def draw(seed: int) -> np.ndarray:
    """Return losses of tokens, float32[2, 12]."""
    return np.random.default_rng(seed).gamma(1.0, 1.0, SEGMENTS.shape).astype(np.float32)


@pytest.fixture
def table(monkeypatch):
    """Replace the network by a table: the parameters are the losses of the tokens."""

    def losses(model, params, batch, active, *, chunk):
        return {"token_loss": jnp.where(active, params, 0.0), "correct": active}

    monkeypatch.setattr(objectives, "answer_losses", losses)


def run(config, policy, reference, **arrays):
    batch = {"segments": jnp.asarray(SEGMENTS), "weights": jnp.asarray(WEIGHTS)}
    batch |= {name: jnp.asarray(x) for name, x in arrays.items()}

    def mean(policy):
        total, weight, out = config.loss(None, policy, reference, batch, chunk=4, normalise="sample")
        return total / weight, (weight, out)

    (loss, (weight, out)), gradient = jax.value_and_grad(mean, has_aux=True)(jnp.asarray(policy))
    return float(loss), float(weight), out, np.asarray(gradient)


@pytest.mark.parametrize("smoothing, likelihood", [(0.0, 0.0), (0.1, 0.0), (0.0, 0.5)])
def test_dpo_loss_equals_numpy(table, smoothing, likelihood):
    policy, reference = draw(0), draw(1)
    config = DPOConfig(beta=0.3, label_smoothing=smoothing, likelihood=likelihood)
    loss, weight, out, gradient = run(config, policy, reference)
    losses, margins = [], []
    for (row, chosen), (_, rejected) in PAIRS:
        gain = reference[row].astype(float) - policy[row]  # log of the probability relative to the reference
        margins.append(0.3 * (gain[chosen].sum() - gain[rejected].sum()))
        sigmoid = 1 / (1 + np.exp(-margins[-1]))
        losses.append(-(1 - smoothing) * np.log(sigmoid) - smoothing * np.log(1 - sigmoid))
        losses[-1] += likelihood * policy[row][chosen].mean()
    assert weight == 3 and loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(out["measures"]["margin"]) == pytest.approx(np.sum(margins), rel=1e-4)
    assert float(out["measures"]["preferred"]) == sum(margin > 0 for margin in margins)
    # The loss falls if a chosen token becomes more likely, and a rejected one less likely.
    for (row, chosen), (_, rejected) in PAIRS if not smoothing else ():
        assert (gradient[row][chosen] > 0).all() and (gradient[row][rejected] < 0).all()
    assert not gradient[WEIGHTS == 0].any()


def test_dpo_at_the_start(table):
    """The policy equals the reference: the loss is log 2, and the gradient of a pair is beta / 2 / pairs."""
    loss, _, out, gradient = run(DPOConfig(beta=0.2), draw(0), draw(0))
    assert loss == pytest.approx(np.log(2)) and float(out["measures"]["margin"]) == 0
    signs = np.where(WEIGHTS > 0, np.where(SEGMENTS % 2, 1, -1), 0)
    np.testing.assert_allclose(gradient, signs * 0.2 / 2 / 3, rtol=1e-6)


def test_a_pair_without_its_scan_does_not_count(table, monkeypatch):
    """`collate_row` sets the weights of samples without their scan to 0."""
    monkeypatch.setitem(globals(), "WEIGHTS", WEIGHTS * np.array([[1], [0]], np.float32))
    loss, weight, _, gradient = run(DPOConfig(), draw(0), draw(0))
    assert weight == 2 and loss == pytest.approx(np.log(2)) and not gradient[1].any()


@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_grpo_loss_equals_numpy(table, kl):
    policy, reference, old = draw(0), draw(1), -draw(0) + 0.4 * np.random.default_rng(2).standard_normal(SEGMENTS.shape)
    advantages = np.array([0, 1.2, -0.7, 0.3, -1.1])[SEGMENTS].astype(np.float32)
    config = GRPOConfig(clip=0.2, kl=kl)
    loss, weight, out, gradient = run(
        config, policy, reference if kl else None, advantages=advantages, log_probs=old.astype(np.float32)
    )
    of_answers, clipped, divergences = [], [], []
    for row, segment in [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2)]:
        at = np.flatnonzero((SEGMENTS[row] == segment) & (WEIGHTS[row] > 0))
        ratio, a = np.exp(-policy[row][at] - old[row][at]), advantages[row][at]
        surrogate = np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
        x = policy[row][at].astype(float) - reference[row][at]  # log of reference over policy
        divergence = np.exp(x) - x - 1
        of_answers.append((-surrogate + kl * divergence).mean())
        clipped.append((surrogate < ratio * a).mean())
        divergences.append(divergence.mean())
    assert weight == pytest.approx(6) and loss == pytest.approx(np.mean(of_answers), rel=1e-4)
    assert 0 < float(out["measures"]["clipped"]) == pytest.approx(sum(clipped), rel=1e-5)
    assert float(out["measures"]["kl"]) == pytest.approx(sum(divergences) if kl else 0, rel=1e-4)
    if not kl:  # a token of an answer with an advantage becomes more likely, unless its ratio is clipped
        assert (np.sign(gradient)[gradient != 0] == np.sign(advantages)[gradient != 0]).all()
        assert 0 < (gradient != 0).sum() < (WEIGHTS > 0).sum()


def test_group_advantages():
    rewards = np.array([[1, 0, 0, 1], [0.5, 0.5, 0.5, 0.5], [0.1, 0.1, 0.1, 0.1], [0, 0, 0, 1]])
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-4)
    expected[1:3] = 0
    np.testing.assert_allclose(group_advantages(rewards), expected, rtol=1e-6)
    np.testing.assert_allclose(group_advantages(rewards, scale=False)[3], [-0.25, -0.25, -0.25, 0.75])


def test_rewards():
    class Terms:
        def find(self, text):
            start = text.find("edema")
            return [] if start < 0 else [(start, start + 5)]

    assert Rewards(("exact",), NoTerms())(["Left.", "right", "", "left lung"], ["left"] * 4).tolist() == [1, 0, 0, 0]
    assert Rewards(("exact", "rouge"), NoTerms())(["left lung"], ["left"]).tolist() == pytest.approx([1 / 3])
    assert term_f1("mild edema", "edema", Terms()) == 1 and term_f1("normal", "edema", Terms()) == 0
    assert term_f1("normal", "clear", Terms()) == 0


def test_radgraph_reward(monkeypatch):
    """The metric is made once."""
    made = []

    class FakeRadEval:
        def __init__(self, metrics, show_progress):
            made.append(metrics)

        def __call__(self, refs, hyps):
            return {"radgraph_simple": float(refs == hyps), "radgraph_partial": 0.5}

    with pytest.raises(ValueError, match="grpo.reward 'radgraph': RadEval is not installed"):
        Rewards(("radgraph",), NoTerms())
    monkeypatch.setitem(__import__("sys").modules, "radeval", types.SimpleNamespace(RadEval=FakeRadEval))
    rewards = Rewards(("radgraph",), NoTerms())
    assert rewards(["a", "b"], ["a", "c"]).tolist() == [0.75, 0.25] and made == [["radgraph"]]


# --- segments ---------------------------------------------------------------------------------------------------------

LATENTS = 2


def sample(response="yes", rejected: str | None = "no, none", scans=("a",)):
    parts = (*map(Scan, scans), Text("Any edema?", "instruction"), Text(response, "response"))
    return Sample("row-1", "jsonl", "vqa", None, parts, rejected)


def encoded(form, one, max_tokens=200):
    def encode_one(sample, **options):
        return encode(sample, installed(), NoTerms(), max_scans=1, num_latents=LATENTS, **options)

    return form.encode(one, encode_one, max_tokens, np.random.default_rng(0)), encode_one


def test_pairs_survive_packing():
    """A row has the scan of each pair once, and segment 2k - 1 and 2k are what each answer gives alone."""
    pairs = [sample(), sample("a lot of it", "no", scans=("b",))]
    together = [encoded(Pair(), one)[0] for one in pairs]
    tokens = [len(one.ids) for one in together]
    limits = RowLimits(text_length=sum(tokens) + 3, vision_rows=1, patch_length=64, planes=128, scans=2)
    (planned,) = plan_rows(tokens, [(0,), (1,)], [16, 16], [64, 64], limits)
    volume = ScanPlanes.of(Volume(np.zeros((128, 128, 4, 1), np.uint8), 1.0, 0.0))
    row = collate_row(
        LoadedRow(
            [together[i] for i in planned.samples], planned.slots, dict(enumerate(planned.vision_rows)),
            {0: volume, 1: volume},
        ),
        limits, num_latents=LATENTS,
    )  # fmt: skip
    assert sorted(set(row["segments"].tolist())) == [0, 1, 2, 3, 4] and (row["scan_rows"] == 0).all()
    for k, i in enumerate(planned.samples):
        slots = set()
        for segment, answer in ((2 * k + 1, pairs[i].parts[-1].text), (2 * k + 2, pairs[i].rejected)):
            at = np.flatnonzero(row["segments"] == segment)
            alone = encoded(Pair(), pairs[i])[1](sample(answer, None, [pairs[i].scans[0].path]), max_tokens=200)
            for name in ("ids", "targets", "weights", "key_ok"):
                np.testing.assert_array_equal(row[name][at], getattr(alone, name), err_msg=name)
            assert row["positions"][at].tolist() == list(range(len(at)))
            slots |= set((row["visual_index"][at][row["visual_index"][at] >= 0] // LATENTS).tolist())
        assert slots == {planned.slots[k][0]}


def test_both_answers_see_the_same_scans():
    """With too many scans, both answers of a pair show the same choice."""
    found, _ = encoded(Pair(), sample(scans=("a", "b", "c")))
    assert len(found.scans) == 1 and found.dropped_scans == 2


def test_a_group_has_room_for_answers():
    one, encode_one = encoded(Group(3, room=4), sample("yes, a lot"))
    answer = [*installed().encode("yes", separator=" "), installed().eos_id]
    whole = encode_one(sample(), max_tokens=200).ids.tolist()
    prompt = whole[: -len(answer)]
    assert [*prompt, *answer] == whole
    n = len(prompt) + 4
    assert one.starts == (0, n, 2 * n) and len(one.ids) == 3 * n
    for start in one.starts:
        np.testing.assert_array_equal(one.ids[start : start + n], [*prompt, 0, 0, 0, 0])
        np.testing.assert_array_equal(one.weights[start : start + n], [0] * (n - 5) + [1] * 4 + [0])
    assert Group(3, 4).reference(sample("yes, a lot")) == "yes, a lot" and not one.targets.any()


@pytest.mark.parametrize(
    "form, one, words",
    [
        (Pair(), sample(rejected=None), "row row-1: it has no `rejected` answer"),
        (Pair(), sample("yes", "yes "), "row row-1: chosen and rejected are the same tokens"),
        (Pair(), sample("yes " * 150, "no " * 150), "at least .* tokens, and a row 200"),
        (Group(2, 4), dataclasses.replace(sample(), parts=(Text("long text", "interleaved"),)), "has no question"),
        (
            Group(8, 22),
            sample(),
            "tokens: a row of 200 has 8 copies with 22 for an answer.*lower grpo.group",
        ),
    ],
)
def test_samples_that_do_not_fit(form, one, words):
    with pytest.raises(RowError, match=words):
        encoded(form, one)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"grpo": {"group": 1}}, r"grpo.group must be at least 2 \(got 1\)"),
        ({"grpo": {"reward": ("rogue",)}}, r"grpo.reward\[0\] must be one of .*did you mean rouge\?"),
        ({"grpo": {"reward": ()}}, "grpo.reward must name at least one of exact, rouge"),
        ({"grpo": {"temperature": 0.0}}, r"grpo.temperature must be above 0"),
        ({"dpo": {"beta": 0.0}}, r"dpo.beta must be above 0"),
        ({"dpo": {"label_smoothing": 0.5}}, "dpo.label_smoothing must be below 0.5"),
        ({"dpo": {"betta": 1.0}}, r"unknown fields: dpo.betta \(did you mean dpo.beta\?\)"),
        ({"train": {"objective": "dp0"}}, r"objective must be one of likelihood, dpo, grpo .*did you mean dpo\?"),
        ({"train": {"objective": "dpo", "normalise": "micro_batch"}}, "'micro_batch' cannot be combined with"),
        ({"train": {"objective": "grpo"}, "data": {"text_length": 500}}, "500 has no room for grpo.group 8 prompts"),
    ],
)
def test_bad_options(changes, words):
    with pytest.raises(ValueError, match=words):
        Experiment.from_dict({"model": radfm.tiny().to_dict()} | changes)


def test_options_round_trip():
    config = Experiment(radfm.tiny(), dpo=DPOConfig(beta=0.2), grpo=GRPOConfig(reward=("rouge", "umls")))
    assert Experiment.from_dict(ConfigDict(config.to_dict(), convert_dict=True)) == config
    assert config.objective is None and not config.has_reference


# --- steps ------------------------------------------------------------------------------------------------------------

LORA = LoraConfig(rank=2, targets=("llama/blocks/*",))


def tuned(lora: LoraConfig | None):
    """Return the state after three DPO steps, their metrics, and how often the step was compiled."""
    model = dataclasses.replace(packed.CONFIG, lora=lora).with_compute(remat="none")
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, frozen=("llama",) if lora else ())
    abstract, transform, _ = train_step.abstract_state(model, config, mesh, reference=True)
    state = train_step.init_state(abstract, model, config, transform, seed=0)
    # The samples of packed.py in turn are chosen and rejected.
    arrays = packed.stack(packed.row([packed.SAMPLES[s] for s in names], **packed.SIZES) for names in ("AB", "CD"))
    arrays["tasks"] = np.minimum(arrays["segments"], 1)
    batch = train_step.put_batch(arrays, mesh, accumulation=2)
    options = train_step.StepConfig(chunk=16, objective=DPOConfig(beta=0.5))
    shardings = train_step.shardings_of(abstract), None
    step = jax.jit(train_step.make_train_step(model, transform, options), out_shardings=shardings)
    metrics = []
    for _ in range(3):
        state, values = step(state, batch, np.float32(1e-2))
        metrics.append(jax.device_get(values))
    return state, metrics, step._cache_size()


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LORA], ids=["all", "lora"])
def test_dpo_steps(lora):
    """The loss starts at log 2 and falls, with one program; a state keeps its reference."""
    state, metrics, programs = tuned(lora)
    losses = [float(values["loss"]) for values in metrics]
    assert programs == 1 and losses[0] == pytest.approx(np.log(2), abs=1e-5) and losses[2] < losses[1] < losses[0]
    assert metrics[0]["measures"]["margin"] == pytest.approx(0, abs=1e-5) and metrics[2]["measures"]["margin"] > 0
    assert metrics[2]["measures"]["preferred"] == 1 and metrics[0]["weight"] == 2
    learned, kept = flatten(state["params"]), flatten(state["reference"])
    assert learned.keys() == kept.keys() and any((learned[path] != kept[path]).any() for path in learned)


def abstract(lora: LoraConfig | None = LORA):
    """Return the model, the mesh, and the state with its optimizer; the language model is frozen."""
    model = dataclasses.replace(packed.CONFIG, lora=lora)
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    config = OptimizerConfig(warmup_steps=0, frozen=("llama",))
    return model, mesh, *train_step.abstract_state(model, config, mesh, reference=True)[:2]


def test_a_step_keeps_the_state():
    """By shapes: the state has the same arrays after a step, and the metrics have all measures."""
    objective = GRPOConfig(kl=0.1, updates=2)
    model, _, state, transform = abstract()
    arrays = packed.row([packed.A, packed.B], **packed.SIZES)
    arrays |= {"tasks": arrays["ids"]} | dict.fromkeys(objective.arrays, arrays["weights"])
    batch = {name: jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for name, x in arrays.items()}
    step = train_step.make_train_step(model, transform, train_step.StepConfig(chunk=16, objective=objective))
    after, metrics = jax.eval_shape(step, state, batch, np.float32(1))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["measures"].keys() == set(objective.measures) and metrics["loss"].shape == ()


def test_the_reference_is_the_base_without_adapters():
    """Its answers have the probabilities of the model without adapters, and only what learns is stored twice."""
    model, _, shapes, _ = abstract()
    assert not any(path.startswith("llama") and not is_adapter(path) for path in flatten(shapes["reference"]))
    rng = np.random.default_rng(0)
    draw = lambda tree: jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32) / 8, tree)  # noqa: E731
    fresh = flatten(draw(shapes["params"]))
    fresh = {path: np.zeros_like(x) if path.endswith(B) else x for path, x in fresh.items()}
    state = {"reference": unflatten(fresh), "params": draw(shapes["params"]), "frozen": draw(shapes["frozen"])}
    base = {path: x for path, x in flatten(train_step.reference_of(state)).items() if not is_adapter(path)}
    batch = packed.row([packed.A, packed.C], **packed.SIZES)
    active = batch["weights"] > 0
    of = jax.jit(
        lambda params, config: answer_losses(radfm.RadFM(config), params, batch, active, chunk=16)["token_loss"],
        static_argnums=1,
    )
    reference = of(train_step.reference_of(state), model)
    # The adapter adds a product with zeros.
    np.testing.assert_allclose(reference, of(unflatten(base), packed.CONFIG), rtol=1e-6)
    assert (np.abs(of(train_step.params_of(state), model) - reference)[active] > 1e-4).any()
