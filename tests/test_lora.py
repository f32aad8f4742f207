"""Adapters and frozen weights of fewer bits: their arithmetic, training, checkpoints that leave out the base."""

import dataclasses
import functools
import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import packed
import parity
import pytest
from scipy.stats import norm

import radfm_jax
from radfm_jax import api
from radfm_jax.checkpoints import checkpoint, run_directory, train_state
from radfm_jax.checkpoints.checkpoint import flatten, unflatten
from radfm_jax.checkpoints.saver import Saver
from radfm_jax.inference import Generator, Prompt, Sampling
from radfm_jax.models import lora, quantised, radfm
from radfm_jax.models.lora import LoraConfig
from radfm_jax.runtime import sharding
from radfm_jax.training import loop, train_step
from radfm_jax.training.experiment import CheckpointConfig, Experiment
from radfm_jax.training.losses import radfm_loss
from radfm_jax.training.optimizer import OptimizerConfig

LORA = LoraConfig(rank=3, alpha=6.0, targets=("llama/blocks/*", "vit/blocks/out"))
CONFIG = dataclasses.replace(packed.CONFIG, lora=LORA).with_compute(remat="none")
PLAIN = dataclasses.replace(CONFIG, lora=None)
BASE = parity.recipe_params(packed.CONFIG)
FROZEN = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, frozen=("llama", "vit/blocks"))
RATE = np.float32(1e-2)
IDS = np.random.default_rng(0).integers(3, packed.CONFIG.llama.vocab_size, (2, 12)).astype(np.int32)


def trained_adapters(config=CONFIG, seed=0) -> dict:
    """Return adapters whose B is not zero, {path: array}."""
    shapes = {path: x.shape for path, x in flatten(nn.unbox(radfm.abstract_params(config))).items()}
    rng = np.random.default_rng(seed)
    return {p: rng.normal(0, 0.1, x).astype(np.float32) for p, x in shapes.items() if lora.is_adapter(p)}


ADAPTERS = trained_adapters()


def merged(base: dict, adapters: dict, scale: float) -> dict:
    """Return parameters with each adapter added to its kernel, by an einsum over the layers."""
    leaves = {path: np.asarray(x, np.float64) for path, x in flatten(base).items()}
    for path in adapters:
        if path.endswith(lora.A):
            name = path.removesuffix("/" + lora.A)
            a, b = np.asarray(adapters[path], np.float64), np.asarray(adapters[f"{name}/{lora.B}"], np.float64)
            flat = np.einsum("lir,lro->lio", a.reshape(len(a), -1, a.shape[-1]), b.reshape(len(b), b.shape[1], -1))
            leaves[f"{name}/kernel"] += scale * flat.reshape(leaves[f"{name}/kernel"].shape)
    return unflatten({path: jnp.asarray(x, jnp.float32) for path, x in leaves.items()})


@jax.jit
def losses_and_gradients(base, adapters, whole):
    """Return loss and gradients with respect to adapters, and to all weights of a plain model."""

    def loss(network, params):
        total, weight, _ = radfm_loss(network, params, BATCH, chunk=16)
        return total / weight

    with_adapters = jax.value_and_grad(lambda x: loss(radfm.RadFM(CONFIG), unflatten(flatten(base) | x)))(adapters)
    return with_adapters, jax.value_and_grad(lambda x: loss(radfm.RadFM(PLAIN), x))(whole)


def batch_of(*rows):
    arrays = packed.stack(packed.row([packed.SAMPLES[s] for s in names], **packed.SIZES) for names in rows)
    return arrays | {"tasks": np.minimum(arrays["segments"], 5)}


BATCH = batch_of("AB", "CD")


def test_loss_and_gradients_equal_those_of_the_merged_weights():
    """The gradient of B is scale * A^T dW, and that of A is scale * dW B^T."""
    whole = merged(BASE, ADAPTERS, LORA.scale)
    (loss, grads), (expected, weights) = losses_and_gradients(BASE, ADAPTERS, whole)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    changed = flatten(weights)
    for name in ("llama/blocks/query", "llama/blocks/out", "llama/blocks/down", "vit/blocks/out"):
        a, b = ADAPTERS[f"{name}/{lora.A}"], ADAPTERS[f"{name}/{lora.B}"]
        layers, rank = len(a), LORA.rank
        flat_a, flat_b = a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
        change = np.asarray(changed[f"{name}/kernel"]).reshape(layers, flat_a.shape[1], -1)
        for leaf, gradient in (
            (lora.A, np.einsum("lio,lro->lir", change, flat_b)), (lora.B, np.einsum("lio,lir->lro", change, flat_a)),
        ):  # fmt: skip
            ours = np.asarray(grads[f"{name}/{leaf}"]).reshape(gradient.shape)
            np.testing.assert_allclose(
                ours, LORA.scale * gradient, atol=3e-5 * np.abs(LORA.scale * gradient).max(), err_msg=f"{name}/{leaf}"
            )


def test_a_fresh_adapter_changes_nothing_and_answers_follow_a_trained_one():
    fresh = nn.unbox(jax.jit(functools.partial(radfm.init_params, CONFIG))(jax.random.key(0)))
    assert all((x == 0).all() for path, x in flatten(fresh).items() if path.endswith(lora.B))
    a = flatten(fresh)["llama/blocks/up/lora_a"]
    assert 0.9 < float(jnp.std(a)) * np.sqrt(3 * a.shape[1]) < 1.1
    fresh = unflatten(flatten(BASE) | {p: x for p, x in flatten(fresh).items() if lora.is_adapter(p)})
    model, plain = api.Model(CONFIG, fresh), api.Model(PLAIN, BASE)
    np.testing.assert_array_equal(model.logits(IDS), plain.logits(IDS))
    prompts = [Prompt(row, np.full(len(row), -1, np.int32)) for row in IDS]
    trained, whole = (
        [a.ids for a in Generator(config, params, length=32).answers(prompts, Sampling(8, stop_ids=()))]
        for config, params in (
            (CONFIG, jax.tree.map(jnp.asarray, unflatten(flatten(BASE) | ADAPTERS))),
            (PLAIN, merged(BASE, ADAPTERS, LORA.scale)),
        )
    )
    assert trained == whole
    assert np.argmax(plain.logits(IDS)[:, -1], -1).tolist() != [ids[0] for ids in trained]


def test_dropout_is_applied_to_the_inputs_of_a_only_in_training():
    class Map(nn.Module):
        rate: float

        @nn.compact
        def __call__(self, x):
            compute = dataclasses.replace(CONFIG.llama, lora=LoraConfig(rank=2, alpha=2.0, dropout=self.rate))
            return radfm.dense(3, ("embed", "mlp"), compute, name="map")(x)

    rng = np.random.default_rng(0)
    params = {"map": {"kernel": np.zeros((4, 3)), "lora_a": rng.normal(size=(4, 2)), "lora_b": rng.normal(size=(2, 3))}}
    x = rng.normal(size=(2000, 4)).astype(np.float32)
    plain = Map(0.0).apply({"params": params}, x)
    np.testing.assert_array_equal(Map(0.5).apply({"params": params}, x), plain)
    dropped = Map(0.5).apply({"params": params}, x, rngs={"dropout": jax.random.key(0)})
    change = params["map"]["lora_a"] @ params["map"]["lora_b"]
    possible = [(x * mask * 2) @ change for mask in np.ndindex(2, 2, 2, 2)]
    distance = np.min([np.abs(dropped - y).max(-1) for y in possible], axis=0)
    assert distance.max() < 1e-4  # each row is that of one of the 16 masks
    np.testing.assert_allclose(dropped.mean(0), plain.mean(0), atol=0.15)


def test_scale():
    assert LoraConfig(rank=16, alpha=32.0).scale == 2
    assert LoraConfig(rank=16, alpha=32.0, rank_stabilised=True).scale == 8


# --- int8 and nf4 -----------------------------------------------------------------------------------------------------


def test_nf4_codes_are_quantiles_of_the_normal_distribution():
    """QLoRA, appendix E: eight quantiles above zero and seven below, scaled to 1, and zero."""
    offset = 0.9677083
    above = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    below = -norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    codes = np.sort([*above, 0.0, *below]) / above.max()
    np.testing.assert_allclose(quantised.CODES, codes, atol=1e-6)


@pytest.mark.parametrize("shape, inputs, block", [((128, 6), 1, 64), ((2, 96, 5), 2, 32), ((10, 3), 1, 2)])
def test_nf4_rounds_to_the_nearest_code_of_each_block(shape, inputs, block):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    kernel[..., -1] = 0
    packed_codes, absmax = quantised.to_nf4(kernel, inputs)
    axis = inputs - 1
    assert packed_codes.nbytes * 2 == kernel.size and absmax.size * block == kernel.size
    values = np.asarray(quantised.from_nf4(packed_codes, absmax, axis, np.float32))
    flat, ours = (np.moveaxis(x, axis, -1).reshape(-1, block) for x in (kernel, values))
    largest = np.abs(flat).max(-1, keepdims=True)
    codes = np.asarray(quantised.CODES, np.float32)
    nearest = codes[np.abs(flat[..., None] - codes * largest[..., None]).argmin(-1)] * largest
    np.testing.assert_array_equal(ours, nearest)
    again = quantised.to_nf4(values, inputs)
    np.testing.assert_array_equal(again[0], packed_codes)
    with pytest.raises(ValueError, match="not finite"):
        quantised.to_nf4(np.full((4, 4), np.nan, np.float32), 1)
    with pytest.raises(ValueError, match="has 3 inputs .* needs an even number"):
        quantised.to_nf4(np.ones((3, 4), np.float32), 1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return the checkpoint of the base weights."""
    directory = tmp_path_factory.mktemp("lora") / "base"
    api.save(api.Model(packed.CONFIG, jax.tree.map(jnp.asarray, BASE)), directory)
    return directory


@pytest.mark.parametrize(
    "weights", [*(pytest.param(base, marks=pytest.mark.slow) for base in ("bfloat16", "int8")), "nf4"]
)
def test_held_weights_compute_what_their_float_values_compute(base, weights):
    model = api.load(base, weights=weights)
    leaves = flatten(model.params)
    kernel = leaves["llama/blocks/gate/kernel"]
    size = {"bfloat16": 2, "int8": 1, "nf4": 0.5}[weights]
    assert kernel.nbytes == size * flatten(BASE)["llama/blocks/gate/kernel"].size
    assert leaves["vit/blocks/qkv/kernel"].dtype == np.float32
    floats = {path: np.asarray(x, np.float32) for path, x in leaves.items() if x.dtype not in (np.int8, np.uint8)}
    for path in quantised.quantised_shapes(leaves):
        scales = np.asarray(leaves[quantised.companion(path, leaves[path].dtype)])
        floats.pop(quantised.companion(path, leaves[path].dtype))
        layers = [(leaves[path], scales)] if path == quantised.HEAD else zip(leaves[path], scales, strict=True)
        values = [quantised.dequantise(path, np.asarray(w), s) for w, s in layers]
        floats[path] = values[0] if path == quantised.HEAD else np.stack(values)
    exact = api.Model(packed.CONFIG, unflatten({p: jnp.asarray(x) for p, x in floats.items()}))
    np.testing.assert_allclose(model.logits(IDS), exact.logits(IDS), atol=3e-5)
    prompts = [Prompt(row, np.full(len(row), -1, np.int32)) for row in IDS]
    ours, same = (m.generator.answers(prompts, Sampling(8, stop_ids=())) for m in (model, exact))
    assert [a.ids for a in ours] == [a.ids for a in same]
    with pytest.raises(ValueError, match="cannot be saved" if weights != "bfloat16" else "exists"):
        api.save(model, base)


# --- training and checkpoints -----------------------------------------------------------------------------------------


def setting(weights: str, where=(1, 1, 1), config=CONFIG):
    """Return (config, mesh, abstract state, transform)."""
    config = dataclasses.replace(config, base=weights)
    mesh = sharding.make_mesh(*where, devices=jax.devices()[: int(np.prod(where))])
    frozen = ("llama",) if config.lora is None else FROZEN.frozen
    abstract, transform, _ = train_step.abstract_state(config, dataclasses.replace(FROZEN, frozen=frozen), mesh)
    return config, mesh, abstract, transform


@pytest.fixture(scope="module", params=[pytest.param("float32", marks=pytest.mark.slow), "nf4"])
def run(request, base, tmp_path_factory):
    """Return (weights, directory of a run of two steps, the state after each, the compiled step)."""
    config, mesh, abstract, transform = setting(request.param)
    loaded, report = train_state.init_from(base, abstract, config)
    assert all(lora.is_adapter(path) for path in report.new) and not report.unused
    assert ("float32 -> nf4: 7 arrays" in str(report)) == (request.param == "nf4")
    state = train_step.init_state(abstract, config, FROZEN, transform, 0, loaded)
    step = jax.jit(train_step.make_train_step(config, transform, train_step.StepConfig(chunk=16)))
    batch = train_step.put_batch(batch_of("AB", "CD"), mesh, 1)
    workdir = tmp_path_factory.mktemp("run") / "run"
    with Saver(workdir, config={}, model=config, base=train_state.find_base(base, abstract, config)) as saver:
        states = []
        for _ in range(2):
            state, metrics = step(state, batch, RATE)
            saver.save(state, {"row": 1}, wait=True)
            states.append((jax.tree.map(np.asarray, state), float(metrics["loss"])))
    return request.param, workdir, states, step


def test_a_step_has_what_learned_and_resumes_bit_for_bit(run, base):
    weights, workdir, states, step = run
    assert states[1][1] < states[0][1]
    learned, frozen = flatten(states[1][0]["params"]), flatten(states[1][0]["frozen"])
    assert set(ADAPTERS) <= set(learned) and not any(lora.is_adapter(path) for path in frozen)
    assert all(path.startswith(("llama/", "vit/blocks/")) for path in frozen)
    first, second = (s[0]["params"]["llama"]["blocks"]["up"]["lora_b"] for s in states)
    assert (first != second).any()
    directory = run_directory.step_directory(workdir, 1)
    assert set(checkpoint.stored_arrays(directory / "params")) == set(learned)
    record = checkpoint.read_description(directory)
    assert record["base"] == {"directory": str(base), "sha256": checkpoint.digest(base)}
    assert record["model"]["lora"]["rank"] == 3 and record["model"].get("base", "float32") == weights
    config, mesh, abstract, _ = setting(weights)
    restored = train_state.restore(directory, abstract, base=train_state.find_base(directory, abstract, config))
    after, _ = step(restored, train_step.put_batch(batch_of("AB", "CD"), mesh, 1), RATE)
    for path, x in flatten(after).items():
        np.testing.assert_array_equal(np.asarray(x), flatten(states[1][0])[path], err_msg=path)


def test_other_meshes_and_load_read_a_step_with_its_base(run, base):
    weights, workdir, states, _ = run
    directory = run_directory.step_directory(workdir, 2)
    config, _, abstract, _ = setting(weights, (1, 2, 2))
    restored = train_state.restore(directory, abstract, base=train_state.find_base(directory, abstract, config))
    expected = flatten(states[1][0])
    for path, x in flatten(restored).items():
        np.testing.assert_array_equal(np.asarray(x), expected[path], err_msg=path)
    model = radfm_jax.load(workdir)
    assert model.config.lora == LORA and model.config.base == weights
    leaves = flatten(model.params)
    for part in ("params", "frozen"):
        for path, x in flatten(states[1][0][part]).items():
            np.testing.assert_array_equal(np.asarray(leaves[path], x.dtype), x, err_msg=path)
    with pytest.raises(ValueError, match="merge them first"):
        api.save(model, workdir.parent / "copy")


def test_several_adapters_share_the_arrays_of_one_base(run, base):
    weights, workdir, states, _ = run
    steps = {f"step {n}": run_directory.step_directory(workdir, n) for n in (1, 2)}
    model = api.load(base, weights=weights).with_adapters(steps)
    shared = [m.params["llama"]["blocks"]["up"]["kernel"] for m in (model, *model.adapters.values())]
    assert shared[0] is shared[1] is shared[2]
    alone = radfm_jax.load(workdir)
    assert alone.with_adapters(steps).adapters["step 1"].config == alone.config
    for path, x in flatten(model.adapters["step 2"].params).items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(flatten(alone.params)[path]), err_msg=path)
    first = states[0][0]["params"]["llama"]["blocks"]["up"]["lora_b"]
    for whole in (model, alone.with_adapters(steps)):
        np.testing.assert_array_equal(whole.adapters["step 1"].params["llama"]["blocks"]["up"]["lora_b"], first)
    with pytest.raises(ValueError, match=r"adapter 'step' is unknown \(did you mean step \d\?\); adapters: step 1"):
        model.answer("Is there an effusion?", adapter="step")
    if weights == "nf4":
        with pytest.raises(ValueError, match="trained on a base in nf4, but this model holds it in float32: load it w"):
            api.load(base).with_adapters(steps)
    with pytest.raises(ValueError, match="has all its parameters and needs no base"):
        model.with_adapters({"base": base})


def test_a_base_that_moved_or_changed(run, base, tmp_path):
    weights, workdir, _, _ = run
    directory = run_directory.step_directory(workdir, 2)
    copy, moved = tmp_path / "2", tmp_path / "moved"
    shutil.copytree(directory, copy)
    shutil.copytree(base, moved)
    description = json.loads((copy / "radfm.json").read_text())
    description["base"]["directory"] = str(tmp_path / "gone")
    (copy / "radfm.json").write_text(json.dumps(description))
    (copy / "manifest.json").unlink()
    checkpoint.write_manifest(copy)
    with pytest.raises(ValueError, match=r"its base .*gone does not exist or is not a checkpoint: pass its dir"):
        radfm_jax.load(copy)
    model = radfm_jax.load(copy, base=moved)
    assert model.config.base == weights and model.base == moved
    # A run that has the base as one of its steps is a place of it too, and adapters are added over a base that moved.
    in_a_run = tmp_path / "run" / "checkpoints" / "7"
    in_a_run.parent.mkdir(parents=True)
    in_a_run.symlink_to(moved)
    assert checkpoint.base_of(copy, tmp_path / "run") == in_a_run
    assert model.with_adapters({"again": copy}).adapters["again"].base == moved
    with pytest.raises(ValueError, match="has all its parameters and needs no base: do not pass"):
        radfm_jax.load(moved, base=base)
    with pytest.raises(ValueError, match="int8=True and weights='nf4' contradict each other"):
        radfm_jax.load(copy, base=moved, int8=True, weights="nf4")
    with pytest.raises(ValueError, match=r"its base .*nothing does not exist or is not a checkpoint: pass"):
        radfm_jax.load(copy, base=tmp_path / "nothing")
    other = {**BASE, "projection": jax.tree.map(lambda x: x + 1, BASE["projection"])}
    api.save(api.Model(packed.CONFIG, jax.tree.map(jnp.asarray, other)), tmp_path / "other")
    digests = [checkpoint.digest(path) for path in (tmp_path / "other", base)]
    with pytest.raises(ValueError, match=f"trained on another base than .*other, whose digest is {digests[0]}: .*"):
        radfm_jax.load(copy, base=tmp_path / "other")
    # A run resumes from init_from if the recorded directory has another checkpoint by now.
    shutil.copytree(tmp_path / "other", tmp_path / "gone")
    config, _, abstract, _ = setting(weights)
    experiment = Experiment(config, optimizer=FROZEN, checkpoint=CheckpointConfig(init_from=str(moved)))
    assert loop._base(experiment, copy, abstract).directory == moved


def test_resuming_or_starting_with_other_adapters(run, base):
    weights, workdir, states, _ = run
    directory = run_directory.step_directory(workdir, 2)
    config, _, abstract, _ = setting(weights, config=dataclasses.replace(CONFIG, lora=LoraConfig(rank=5)))
    found = train_state.find_base(directory, abstract, config)
    with pytest.raises(ValueError, match=r"lora_a is float32\[2, \d+, 3\], expected float32\[2, \d+, 5\]"):
        train_state.check(directory, abstract, found)
    with pytest.raises(ValueError, match=r"llama/blocks/query/lora_a is \(2, \d+, 3\), expected \(2, \d+, 5\)"):
        train_state.check_init(directory, abstract, config)
    _, _, plain, _ = setting("float32", config=PLAIN)
    with pytest.raises(ValueError, match=r"has adapters \(.*: set model.lora .* or start from its merged weights"):
        train_state.check_init(directory, plain, PLAIN)
    # A second run starts from the adapters of the first one, on the same base.
    config, _, abstract, _ = setting(weights)
    loaded, report = train_state.init_from(directory, abstract, config)
    assert not report.new
    np.testing.assert_array_equal(
        loaded["llama/blocks/up/lora_b"], states[1][0]["params"]["llama"]["blocks"]["up"]["lora_b"]
    )
    assert train_state.find_base(directory, abstract, config).directory == base
    assert not report.sizes
    # Another scale or base type changes what the adapters compute, but no shape.
    other = dataclasses.replace(config, lora=dataclasses.replace(LORA, alpha=12.0, dropout=0.5), base="bfloat16")
    _, report = train_state.init_from(directory, abstract, other)
    assert "\n  DIFFERS: lora.alpha is 12.0, was 6.0 in the checkpoint" in str(report)
    assert f"\n  DIFFERS: base is 'bfloat16', was {weights!r} in the checkpoint" in str(report)
    assert len(report.sizes) == 2


def test_errors_of_the_config():
    with pytest.raises(ValueError, match=r"model.lora.rank must be at least 1 \(got 0\)"):
        LoraConfig(rank=0)
    with pytest.raises(ValueError, match="must name a linear map"):
        LoraConfig(targets=())
    with pytest.raises(ValueError, match=r"no linear map matches 'llama/blocks/querry' \(did you mean llama/blocks/q"):
        radfm.abstract_params(dataclasses.replace(CONFIG, lora=LoraConfig(targets=("llama/blocks/querry",))))
    with pytest.raises(ValueError, match=r"model\.llama\.lora \(set model\.lora"):
        radfm.RadFMConfig.from_dict({"llama": {"lora": {"rank": 4}}})
    with pytest.raises(ValueError, match="match llama/blocks/down/kernel, which is trained itself: add it"):
        train_step.abstract_state(CONFIG, OptimizerConfig(), sharding.make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(ValueError, match="model.lora and model.base need checkpoint.init_from"):
        loop._base(Experiment(CONFIG, optimizer=FROZEN), None, {})
    with pytest.raises(ValueError, match="model.base nf4 holds llama/blocks/.*/kernel, which is trained: add it"):
        mesh = sharding.make_mesh(devices=jax.devices()[:1])
        train_step.abstract_state(dataclasses.replace(PLAIN, base="nf4"), OptimizerConfig(), mesh)
    assert radfm.RadFMConfig.from_dict(CONFIG.to_dict()) == CONFIG
