"""Adapters of PEFT -> checkpoint -> PEFT: tensors, configs and logits of every kind of family, and what is refused."""

import copy
import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
from family_parity import logits_of, their_model
from llama_oracle import variants
from safetensors.numpy import load_file, save_file
from transformers import LlamaForCausalLM

from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert.__main__ import main
from radfm_jax.convert.from_torch import from_torch
from radfm_jax.convert.merge import merge
from radfm_jax.convert.peft import config as peft_config
from radfm_jax.convert.peft import tensors as peft_tensors
from radfm_jax.convert.peft.reading import from_peft
from radfm_jax.convert.peft.writing import to_peft
from radfm_jax.convert.to_torch import to_torch
from radfm_jax.models.lora import LoraConfig
from radfm_jax.models.radfm import RadFMConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # PEFT reads it
IDS = np.random.default_rng(0).integers(3, 60, (2, 24))
# Family -> fields of PEFT's LoraConfig.
CASES = {
    "llama": {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "qwen3": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.25, "use_rslora": True, "target_modules": "all-linear"},
    "gemma3": {"r": 2, "lora_alpha": 7, "target_modules": r".*\.(o|k|up)_proj"},
    "phi3": {"r": 3, "lora_alpha": 4, "target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]},
}


def theirs(name: str):
    if name != "llama":
        return copy.deepcopy(their_model(name))  # PEFT changes the model that it adapts
    torch.manual_seed(0)
    return LlamaForCausalLM(variants()["gqa"]).eval()


def their_logits(net) -> np.ndarray:
    with torch.no_grad():
        return net(torch.from_numpy(IDS)).logits.numpy()


def our_logits(directory) -> np.ndarray:
    config = RadFMConfig.from_dict(checkpoint.read_description(directory)["model"])
    params = checkpoint.StoredParams(directory)
    leaves = {name.removeprefix("llama/"): params.read(name) for name in params.shapes}
    llama = dataclasses.replace(config.llama, remat="none")  # compiles faster
    return np.asarray(jax.jit(lambda params: logits_of(llama, params, IDS))(checkpoint.unflatten(leaves)))


def tensors_of(folder) -> dict[str, np.ndarray]:
    return load_file(folder / "adapter_model.safetensors")


def config_of(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a function: family -> folder with hf, base, adapter (of PEFT), checkpoint, again (to-peft), and logits."""
    folders = {}

    def make(name: str):
        if name in folders:
            return folders[name]
        root = tmp_path_factory.mktemp(name)
        net = theirs(name)
        net.save_pretrained(root / "hf")
        adapted = peft.get_peft_model(net, peft.LoraConfig(task_type="CAUSAL_LM", **CASES[name])).eval()
        generator = torch.Generator().manual_seed(1)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
        adapted.save_pretrained(root / "adapter")
        from_torch(root / "hf", root / "base", part="llama")
        from_peft(root / "adapter", root / "checkpoint", base=root / "base")
        to_peft(root / "checkpoint", root / "again")
        folders[name] = root, their_logits(adapted)
        return folders[name]

    return make


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "gemma3")) for n in CASES])
def test_a_round_trip_keeps_every_bit_and_the_logits_agree(name, made):
    root, expected = made(name)
    before, after = tensors_of(root / "adapter"), tensors_of(root / "again")
    assert before.keys() == after.keys() and len(before) > 10
    assert [k for k in before if before[k].tobytes() != after[k].tobytes() or before[k].dtype != after[k].dtype] == []
    old, new = config_of(root / "adapter"), config_of(root / "again")
    assert {key: old[key] for key in peft_config.KEYS} == {key: new[key] for key in peft_config.KEYS}
    ours = our_logits(root / "checkpoint")
    base = their_logits(theirs(name))
    assert np.abs(expected - base).max() > 0.1  # the adapters matter
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    loaded = peft.PeftModel.from_pretrained(theirs(name), root / "again").eval()
    np.testing.assert_array_equal(their_logits(loaded), expected)
    merge(root / "checkpoint", root / "merged")
    to_torch(root / "merged", root / "merged_hf", part="llama")
    merged, theirs_merged = load_file(root / "merged_hf" / "model.safetensors"), loaded.merge_and_unload().state_dict()
    for key, x in merged.items():
        np.testing.assert_allclose(x, theirs_merged[key].numpy(), rtol=0, atol=2e-6, err_msg=key)


def test_what_a_checkpoint_of_adapters_contains(made):
    root, _ = made("llama")
    description = checkpoint.read_description(root / "checkpoint")
    assert description["model"]["lora"] == {
        "rank": 3, "alpha": 5.0, "dropout": 0.0, "rank_stabilised": False,
        "targets": ["llama/blocks/query", "llama/blocks/value", "llama/blocks/down"],
    }  # fmt: skip
    assert description["base"]["sha256"] == checkpoint.digest(root / "base")
    assert sorted(checkpoint._open_stores(root / "checkpoint")) == sorted(
        f"llama/blocks/{name}/{leaf}" for name in ("query", "value", "down") for leaf in ("lora_a", "lora_b")
    )


# --- fused modules ----------------------------------------------------------------------------------------------------


def test_parts_of_a_fused_module_may_have_their_own_adapters(made, tmp_path):
    """Training gives query, key and value each its own A: Phi's qkv_proj then has three times the rank."""
    root, _ = made("phi3")
    directory = shutil.copytree(root / "checkpoint", tmp_path / "checkpoint")
    description = json.loads((directory / checkpoint.DESCRIPTION).read_text())
    params = checkpoint.StoredParams(directory)
    leaves = {name: params.read(name) for name, source in params.origins.items() if source == directory}
    leaves["llama/blocks/query/lora_a"] *= -1
    for leaf in ("lora_a", "lora_b"):
        del leaves[f"llama/blocks/value/{leaf}"]
    shutil.rmtree(directory / "params")
    (directory / checkpoint.MANIFEST).unlink()
    checkpoint.save_params(directory, checkpoint.unflatten(leaves))
    targets = ["llama/blocks/query", "llama/blocks/key", "llama/blocks/out", "llama/blocks/gate", "llama/blocks/up"]
    description["model"]["lora"]["targets"] = targets
    (directory / checkpoint.DESCRIPTION).write_text(json.dumps(description))
    checkpoint.write_manifest(directory)
    to_peft(directory, tmp_path / "adapter", base_model=str(root / "hf"))
    written = config_of(tmp_path / "adapter")
    assert written["rank_pattern"] == {"qkv_proj": 9} and written["alpha_pattern"] == {"qkv_proj": 12}
    assert written["base_model_name_or_path"] == str(root / "hf")
    loaded = peft.PeftModel.from_pretrained(theirs("phi3"), tmp_path / "adapter").eval()
    ours = our_logits(directory)
    np.testing.assert_allclose(their_logits(loaded), ours, rtol=0, atol=2e-5 * np.abs(ours).max())
    from_peft(tmp_path / "adapter", tmp_path / "back", base=root / "base")
    again = checkpoint.StoredParams(tmp_path / "back")
    assert all(np.array_equal(again.read(name), x) for name, x in leaves.items())
    assert checkpoint.read_description(tmp_path / "back")["model"]["lora"]["targets"] == targets
    assert "llama/blocks/value/lora_a" not in again.shapes


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(made, tmp_path):
    """Return a function: (family, change of the config, change of the tensors) -> the error of from_peft."""

    def error(name="llama", tensors=lambda x: None, **keys) -> str:
        root, _ = made(name)
        folder = shutil.copytree(root / "adapter", tmp_path / "adapter", dirs_exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps({**config_of(root / "adapter"), **keys}))
        values = tensors_of(root / "adapter")
        tensors(values)
        save_file(values, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError) as caught:
            from_peft(folder, tmp_path / "new", base=root / "base")
        assert not (tmp_path / "new").exists()
        return str(caught.value)

    return error


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported (LORA supported)"),
        ({"use_dora": True}, "use_dora True is not supported (DoRA also trains a magnitude per output)"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save ['lm_head'] is not supported"),
        ({"bias": "lora_only"}, "bias 'lora_only' is not supported (none supported)"),
        (
            {"rank_pattern": {"q_proj": 8}},
            "rank_pattern {'q_proj': 8} is not supported: all linear maps have the rank 3",
        ),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern {'q_proj': 8} is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported (it changes the base"),
        ({"task_type": "SEQ_CLS"}, "task_type 'SEQ_CLS' is not supported (CAUSAL_LM and None supported)"),
        ({"use_new_variant": {"k": 2}}, "use_new_variant {'k': 2} is not supported (the key is unknown)"),
        ({"r": 0, "lora_alpha": -1}, "r must be at least 1 (got 0); lora_alpha must be above 0 (got -1)"),
        ({"r": 4}, "q_proj.lora_A.weight is (3, 64), expected (4, 64), in 2 layers"),
    ],
)
def test_configs_that_are_refused(keys, words, broken):
    assert words in broken(**keys)


def rename(old: str, new: str):
    def change(tensors: dict) -> None:
        for name in [n for n in tensors if old in n]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def test_tensors_that_are_refused(broken):
    a, b = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", "down_proj.lora_B.weight"
    message = broken(tensors=rename("q_proj.lora_A", "q_proj.lora_C"))
    assert "missing: model.layers.*.self_attn.q_proj.lora_A.weight (3, 64), in 2 layers" in message
    assert "unexpected: model.layers.*.self_attn.q_proj.lora_C.weight (3, 64), in 2 layers" in message
    assert "the base has 2 layers" in broken(tensors=rename("layers.1.", "layers.7."))
    assert "has no LoRA tensors of the language model" in broken(
        tensors=lambda x: [x.pop(k) for k in list(x)[1:]] and rename("proj", "x")(x)
    )
    head = {"base_model.model.lm_head.lora_A.weight": np.ones((3, 64), np.float32)}
    assert "unexpected: lm_head.lora_A.weight (3, 64)\n" in broken(tensors=lambda x: x.update(head))
    assert "q_proj.lora_A.weight (not finite)" in broken(tensors=lambda x: x[a].fill(np.nan))
    assert "layers of llama/blocks/query/lora_a differ in dtype: pass --dtype" in broken(
        tensors=lambda x: x.update({a: x[a].astype(np.float16)})
    )
    assert "has several tensors of model.layers.1.self_attn.q_proj.lora_A.weight, with different prefixes" in broken(
        tensors=lambda x: x.update({a.removeprefix("base_model.model."): x[a] + 1})
    )
    assert "adapters of vision_tower" in broken(
        tensors=lambda x: x.update({f"base_model.model.vision_tower.{b}": x[a]})
    )


def test_names_of_a_vision_language_model_and_files_of_torch(made, tmp_path):
    root, _ = made("llama")
    tensors = {k: torch.from_numpy(x) for k, x in tensors_of(root / "adapter").items()}
    rename(".model.layers.", ".model.language_model.layers.")(tensors)
    config = config_of(root / "adapter") | {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 5}}  # no change
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.save(tensors, tmp_path / "adapter_model.bin")
    from_peft(tmp_path, tmp_path / "checkpoint", base=root / "base")
    ours, same = (checkpoint.StoredParams(folder / "checkpoint") for folder in (tmp_path, root))
    assert ours.shapes == same.shapes
    assert all(np.array_equal(ours.read(path), same.read(path)) for path in same.shapes if "lora" in path)


def test_another_base_is_refused(made, tmp_path):
    root, _ = made("llama")
    qwen, _ = made("qwen3")
    with pytest.raises(ValueError, match=r"(?s)is \(3, 64\), expected \(3, 40\), in 2 layers\n.*the base has 4 layers"):
        from_peft(root / "adapter", tmp_path / "x", base=qwen / "base")
    digest = checkpoint.digest(root / "base")
    net = theirs("llama")
    net.lm_head.weight.data += 1
    net.save_pretrained(tmp_path / "hf")
    from_torch(tmp_path / "hf", tmp_path / "base", part="llama")
    with pytest.raises(ValueError, match=f"a base with the digest {digest}, but .*add --any-base"):
        from_peft(root / "again", tmp_path / "x", base=tmp_path / "base")
    from_peft(root / "again", tmp_path / "x", base=tmp_path / "base", any_base=True)
    with pytest.raises(ValueError, match="has adapters itself: pass its base, or merge it first"):
        from_peft(root / "again", tmp_path / "y", base=tmp_path / "x")
    with pytest.raises(ValueError, match=r"is not the base of the run: it has vocab_size 67 \(the run has 64\), width"):
        to_peft(root / "checkpoint", tmp_path / "y", base_model=str(qwen / "hf"))
    with pytest.raises(ValueError, match="base has no adapters: it was trained without model.lora"):
        to_peft(root / "base", tmp_path / "y")


def test_fused_modules_that_fit_no_form(made):
    root, _ = made("phi3")
    config = RadFMConfig.from_dict({"llama": checkpoint.read_description(root / "base")["model"]["llama"]})
    a, b = np.ones((3, 64), np.float32), np.ones((128, 3), np.float32)
    name = "model.layers.0.self_attn.qkv_proj"
    split = lambda a, b, rank=3: peft_tensors.split(  # noqa: E731
        {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, config, rank
    )
    for arguments, words in (
        ((a, b[:100]), f"{name}: lora_A is (3, 64) and lora_B (100, 3), expected lora_A (3, E) and lora_B (128, 3)"),
        ((a, b, 2), f"{name}: lora_A is (3, 64) and lora_B (128, 3), expected lora_A (2, E) and lora_B (128, 2)"),
        ((a, b, 1), f"{name}: lora_B has values outside its 3 blocks of rank 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            split(*arguments)


def test_commands(made, tmp_path, capsys):
    root, _ = made("llama")
    assert main(["from-peft", str(root / "adapter"), str(tmp_path / "x"), "--base", str(root / "base")]) == 0
    printed = capsys.readouterr().out
    assert "rank 3, alpha 5, adapters of query, value, down" in printed and "was converted from hf" in printed
    assert main(["to-peft", str(tmp_path / "x"), str(tmp_path / "y"), "--dtype", "bfloat16"]) == 0
    assert "base_model_name_or_path is not set: pass --base-model" in capsys.readouterr().out
    assert {x.dtype.name for x in tensors_of(tmp_path / "y").values()} == {"bfloat16"}
    assert "not for clinical use" in (tmp_path / "y" / "README.md").read_text()
    assert main(["merge", str(tmp_path / "x"), str(tmp_path / "z"), "--dtype", "nf4"]) == 2
    assert "merging into nf4 loses the adapters" in capsys.readouterr().err


def test_patterns_of_stacked_modules_keep_the_scale():
    for stabilised in (False, True):
        lora = LoraConfig(rank=4, alpha=6.0, rank_stabilised=stabilised)
        patterns = peft_config.patterns(lora, {"qkv_proj": 3})
        single = LoraConfig(patterns["rank_pattern"]["qkv_proj"], patterns["alpha_pattern"]["qkv_proj"],
                            rank_stabilised=stabilised)  # fmt: skip
        assert single.rank == 12 and abs(single.scale - lora.scale) < 1e-12
