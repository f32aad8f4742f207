"""The PyTorch oracles of the tests: RadFM against the golden files, LLaMA variants against each other."""

import dataclasses
import hashlib
import json
from types import SimpleNamespace

import golden
import llama_oracle
import numpy as np
import pytest
import torch
import torch_radfm
from transformers import LlamaConfig, LlamaForCausalLM

WEIGHT_DIGESTS = {
    "p1_2d_s1": "f6ea8f570c4b1b7595260898170a02fc6511beffd9e699262fe543c7634e5860",
    "p8_vis48_2d_s2": "c1dd0ff636a67f1eb66b3ebd340b3d0ac617f7b8626368e91b0b2b8a9565abd8",
}
"""SHA-256 of the names and values of all weights, at the two sizes of the golden files."""

LOSSES = ("reg", "hf")

WITHOUT_GRADIENTS = ("p3_3d_s3_d64",)
"""Cases without gradients: three scans of 1,024 patches take more time and memory than all others."""


def _ids(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).long()


def _close(ours: torch.Tensor | np.ndarray, theirs: np.ndarray, atol: float) -> None:
    ours = ours.detach().numpy() if isinstance(ours, torch.Tensor) else ours
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


# The two largest cases are slow in test_golden.py too, which compares the network with the same files.
SLOW = ("p3_3d_s3_d64", "p8_vis48_2d_s2")
CASES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in golden.CASES]


@pytest.fixture(scope="module", params=CASES)
def run(request):
    """A golden case, its model, and the model's outputs, with their graph unless in WITHOUT_GRADIENTS."""
    case = golden.load(request.param)
    model = torch_radfm.of_golden(case.name)
    vision = torch.from_numpy(golden.vision(case))
    with torch.set_grad_enabled(case.name not in WITHOUT_GRADIENTS):
        out = model(_ids(case["lang_x"]), vision, torch.from_numpy(case["attention_mask"]))
        reg, hf, token_ce = torch_radfm.losses(
            out["logits"], _ids(case["labels"]), torch.from_numpy(case["loss_reweight"])
        )
    return SimpleNamespace(case=case, model=model, out=out, token_ce=token_ce, reg=reg, hf=hf)


def test_positions(run):
    positions = run.out["positions"].detach().numpy()
    np.testing.assert_array_equal(positions[run.case["vit_rows"]], run.case["pos_slice"])
    if "pos_full" in run.case:
        np.testing.assert_array_equal(positions, run.case["pos_full"])


def test_vit(run):
    vit = run.out["vit"]
    assert tuple(vit.shape) == tuple(run.case["vit_shape"])
    _close(vit[:, run.case["vit_rows"]], run.case["vit_slice"], 1e-4)
    if "vit_full" in run.case:
        _close(vit, run.case["vit_full"], 1e-4)
    values = vit.detach().double().flatten().numpy()
    stats = [
        values.mean(),
        values.std(),
        values.min(),
        values.max(),
        np.abs(values).sum(),
        values @ np.sin(0.01 * np.arange(values.size)),
    ]
    np.testing.assert_allclose(stats, run.case["vit_stats"], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize(
    ("ours", "theirs", "atol"),
    [
        ("perceiver", "perceiver", 1e-4),
        ("visual_tokens", "visual_tokens", 1e-4),
        ("embeds", "input_embeds", 1e-4),
        ("logits", "logits", 2e-4),
    ],
)
def test_outputs(run, ours, theirs, atol):
    _close(run.out[ours], run.case[theirs], atol)


def test_losses(run):
    _close(run.token_ce, run.case["token_ce"], 1e-4)
    assert (run.token_ce.detach().numpy()[run.case["labels"][:, 1:] == -100] == 0).all()
    np.testing.assert_allclose(run.reg.item(), run.case["loss_reg"], rtol=1e-5)
    np.testing.assert_allclose(run.hf.item(), run.case["loss_hf"], rtol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("run", [case for case in CASES if case.values[0] not in WITHOUT_GRADIENTS], indirect=True)
def test_gradients(run, kind):
    parameters = dict(run.model.named_parameters())
    grads = torch.autograd.grad(getattr(run, kind), list(parameters.values()), retain_graph=True)
    grads = {key: grad.numpy() for key, grad in zip(parameters, grads, strict=True)}
    norms = [np.linalg.norm(grads[name].astype(np.float64)) for name in run.case.meta["grad_names"]]
    np.testing.assert_allclose(norms, run.case[f"grad_norm_{kind}"], rtol=1e-3)
    total = np.sqrt(sum((grad.astype(np.float64) ** 2).sum() for grad in grads.values()))
    np.testing.assert_allclose(total, run.case[f"grad_norm_total_{kind}"], rtol=1e-3)
    stored = [key for key in run.case.arrays if key.startswith(f"grad_{kind}:")]
    assert stored
    for key in stored:
        expected = run.case[key]
        _close(grads[key.split(":", 1)[1]], expected, 1e-3 * np.abs(expected).max())


def test_greedy(run):
    prompt = _ids(run.case["gen_prompt"])[None]
    stop = run.case.meta["gen_eos_default"]
    new, scores = run.model.greedy(prompt, run.out["visual_tokens"][:1], 20, stop)
    assert new.tolist() == run.case["gen_new"].tolist()
    _close(scores[0], run.case["gen_step_scores_first"], 2e-4)
    best = scores.topk(2).values
    _close(best[:, 0] - best[:, 1], run.case["gen_margin"], 2e-4)


def test_weight_recipe():
    for name, digest in WEIGHT_DIGESTS.items():
        found = hashlib.sha256()
        for key, value in golden.state_dict(name).items():
            found.update(key.encode())
            found.update(value.tobytes())
        assert found.hexdigest() == digest, name


@pytest.mark.parametrize("name", sorted(WEIGHT_DIGESTS))
def test_names_and_shapes(name):
    model = torch_radfm.of_golden(name)
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert ours == {key: shape for key, shape in golden.shapes(name).items() if golden.is_used(key)}
    assert model.embedding_layer.weight is model.lang_model.model.embed_tokens.weight
    arrays = golden.state_dict(name)
    for key in ("embedding_layer.fc.bias", "lang_model.lm_head.weight", "embedding_layer.perceiver.latents"):
        with pytest.raises(RuntimeError, match="Missing key"):
            torch_radfm.load_arrays(model, {k: v for k, v in arrays.items() if k != key})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        torch_radfm.load_arrays(model, {**arrays, "embedding_layer.perceiver.extra": np.zeros(1, np.float32)})


def test_other_sizes():
    """At sizes without a golden case, weights are reproducible, and scans and samples are independent."""
    sizes = golden.Sizes(
        vocab=11,
        hidden=16,
        inter=20,
        layers=1,
        heads=4,
        kv_heads=2,
        vis_dim=6,
        vit_depth=2,
        vit_heads=2,
        vit_dim_head=4,
        vit_mlp=10,
        patch=(4, 2, 2),
        tables=(4, 6, 9),
        perceiver_depth=2,
        perceiver_heads=3,
        perceiver_dim_head=2,
        latents=5,
        ff_mult=2,
        rope_theta=500.0,
        rms_eps=1e-5,
    )
    model = torch_radfm.build(sizes, salt="a")
    again = torch_radfm.load_arrays(torch_radfm.TorchRadFM(sizes), torch_radfm.arrays_of(model)).eval()
    other = torch_radfm.build(dataclasses.replace(sizes), salt="b")
    rng = np.random.default_rng(0)
    vision = torch.from_numpy(rng.random((2, 3, 3, 8, 12, 4), dtype=np.float32))  # a grid of 2 x 6 x 2
    ids = torch.tensor([[1, 11, 13, 14, 15, 16, 17, 12, 5, 2], [11, 23, 24, 25, 26, 27, 12, 6, 2, 0]])
    mask = torch.tensor([[1] * 10, [1] * 8 + [0] * 2])
    with torch.no_grad():
        out = model(ids, vision, mask)
        assert {key: tuple(value.shape) for key, value in out.items()} == {
            "vit": (6, 24, 6),
            "positions": (24, 6),
            "perceiver": (2, 3, 5, 6),
            "visual_tokens": (2, 15, 16),
            "embeds": (2, 10, 16),
            "logits": (2, 10, 11),
        }
        tables = model.embedding_layer.vision_encoder.pos_embedding
        last = torch.cat([tables.row_embed.weight[1], tables.col_embed.weight[3], tables.dep_embed.weight[7]])
        assert torch.equal(out["positions"][0 * 12 + 3 * 2 + 1], last)  # patch (0, 3, 1)
        assert torch.equal(out["embeds"][1, 1], out["visual_tokens"][1, 10])
        assert torch.equal(again(ids, vision, mask)["logits"], out["logits"])
        assert (other(ids, vision, mask)["logits"] - out["logits"]).abs().max() > 0.1
        alone = model(ids[1:], vision[1:], mask[1:])
        torch.testing.assert_close(alone["logits"], out["logits"][1:], rtol=0, atol=1e-5)
        changed = ids.clone()
        changed[1, 8] = 7  # masked: only its own logits may change
        difference = (model(changed, vision, mask)["logits"] - out["logits"]).abs().amax(-1)
        assert difference[1, 8] > 1e-2
        difference[1, 8] = 0
        assert difference.max() < 1e-5


def test_llm_masking_by_transformers_agrees():
    """With a plain mask, the installed transformers give unmasked tokens the same logits."""
    model = torch_radfm.of_golden("p4_b2s2_2d_pad")
    case = golden.load("p4_b2s2_2d_pad")
    embeds, mask = torch.from_numpy(case["input_embeds"]), torch.from_numpy(case["attention_mask"])
    with torch.no_grad():
        ours = model.llm(embeds, mask)
        theirs = model.lang_model(inputs_embeds=embeds, attention_mask=mask).logits
    torch.testing.assert_close(ours[mask == 1], theirs[mask == 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(llama_oracle.variants()))
def test_llama_variants(name, tmp_path):
    config = llama_oracle.variants()[name]
    state, logits, save = llama_oracle.build(config, seed=3)
    ids = np.random.default_rng(5).integers(0, config.vocab_size, (2, 20))
    expected = logits(ids)
    assert expected.shape == (2, 20, config.vocab_size) and expected.dtype == np.float32
    assert state["lm_head.weight"].shape == state["model.embed_tokens.weight"].shape
    assert np.array_equal(state["lm_head.weight"], state["model.embed_tokens.weight"]) == (name == "tied")
    np.testing.assert_array_equal(llama_oracle.build(config, seed=3)[1](ids), expected)
    assert np.abs(llama_oracle.build(config, seed=4)[1](ids) - expected).max() > 0.1

    masked = np.ones((2, 20), np.int64)
    masked[1, 12:] = 0
    np.testing.assert_allclose(logits(ids, masked)[:, :12], expected[:, :12], rtol=0, atol=1e-5)

    save(tmp_path)
    new_form = json.loads((tmp_path / "config.json").read_text())
    for form in (new_form, llama_oracle.old_form(new_form)):
        (tmp_path / "config.json").write_text(json.dumps(form))
        read = LlamaForCausalLM.from_pretrained(tmp_path).eval()
        with torch.no_grad():
            found = read(input_ids=torch.from_numpy(ids)).logits.numpy()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_llama_variants_differ():
    """Without a variant's RoPE settings the logits differ at the lengths of these tests."""
    ids = np.random.default_rng(5).integers(0, 64, (1, 20))
    plain = {"rope_type": "default", "rope_theta": 500000.0}
    changes = {
        "rope_500k": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "llama31": {"rope_parameters": plain},
    }
    for name, change in changes.items():
        config = llama_oracle.variants()[name]
        fields = {**config.to_dict(), **change, "attn_implementation": "eager"}
        others = llama_oracle.build(LlamaConfig(**fields))[1](ids)
        assert np.abs(others - llama_oracle.build(config)[1](ids)).max() > 1e-2, name
