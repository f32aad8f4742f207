"""Hugging Face folders of every family of language models -> checkpoint directory -> folder."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from family_parity import FAMILIES, params_of, their_model

from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import hf_config, weights
from radfm_jax.convert.families import FAMILIES as WRITERS
from radfm_jax.convert.from_torch import from_torch
from radfm_jax.convert.tensor_files import open_tensors
from radfm_jax.convert.to_torch import to_torch
from radfm_jax.models.decoder import DecoderConfig, RopeScaling
from radfm_jax.models.radfm import RadFMConfig

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def tensors_of(folder) -> dict[str, np.ndarray]:
    with open_tensors(folder) as reader:
        return {name: reader.read(name) for name in reader.infos}


def stored_decoder(directory) -> DecoderConfig:
    return RadFMConfig.from_dict({"llama": checkpoint.read_description(directory)["model"]["llama"]}).llama


def params_in(directory) -> dict[str, np.ndarray]:
    reader = checkpoint.StoredParams(directory)
    return {name.removeprefix("llama/"): reader.read(name) for name in reader.shapes}


def meaning(folder) -> dict:
    """Return the config that transformers reads from a folder, without records of the library."""
    config = transformers.AutoConfig.from_pretrained(folder).to_dict()
    return {k: v for k, v in config.items() if k not in ("transformers_version", "architectures", "_name_or_path")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function: family -> (folder by transformers, checkpoint, folder written again)."""
    made = {}

    def make(name: str):
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            their_model(name).save_pretrained(root / "hf")
            from_torch(root / "hf", root / "checkpoint", part="llama")
            to_torch(root / "checkpoint", root / "again", part="llama")
            made[name] = tuple(root / part for part in ("hf", "checkpoint", "again"))
        return made[name]

    return make


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_round_trips(name, folders):
    """Config, parameters, tensors and logits. `test_families.py` compares the logits of our decoder."""
    folder, directory, again = folders(name)
    expected = dataclasses.replace(FAMILIES[name].config, remat="full")
    assert stored_decoder(directory) == expected
    net = their_model(name)
    state = {key: value.numpy() for key, value in net.state_dict().items()}
    ours, params = params_in(directory), checkpoint.flatten(params_of(expected, state))
    assert ours.keys() == params.keys()
    assert [path for path in ours if not np.array_equal(ours[path], params[path])] == []
    assert meaning(again) == meaning(folder)
    before, after = tensors_of(folder), tensors_of(again)
    assert before.keys() == after.keys()
    assert [key for key in before if before[key].tobytes() != after[key].tobytes()] == []
    loaded = transformers.AutoModelForCausalLM.from_pretrained(again, attn_implementation="eager").eval()
    assert type(loaded) is type(net)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, net.config.vocab_size, (2, 40)))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, net(ids).logits)


def old_spelling(config: dict) -> dict:
    """Return a config.json of transformers 5 as version 4 wrote it, where keys state the layers and RoPE."""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "layer_types")}
    rope = config["rope_parameters"]
    if "full_attention" in rope:  # Gemma 3
        old["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        old["sliding_window_pattern"] = 3
        rope = rope["full_attention"]
    rope = dict(rope)
    old["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        old["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    old["rope_scaling"] = None if kind == "default" else {**rope, "type": {"longrope": "su"}.get(kind, kind)}
    if "no_rope_layers" in old:
        old["no_rope_layers"] = None
    return {**old, "torch_dtype": config["dtype"]}


@pytest.mark.parametrize("name", FAMILIES)
def test_old_spellings_mean_the_same(name, folders):
    config = read_config(folders(name)[0])
    old = old_spelling(config)
    assert hf_config.decoder_from_hf(old, "x") == hf_config.decoder_from_hf(config, "x")
    written = hf_config.decoder_to_hf(hf_config.decoder_from_hf(old, "x"), "float32", old)
    assert hf_config.decoder_from_hf(written, "x") == hf_config.decoder_from_hf(config, "x")


@pytest.mark.parametrize("model_type", WRITERS)
def test_absent_keys_have_the_defaults_of_transformers(model_type):
    """Every key that transformers writes is accounted for, and an empty file means the default config of the class."""
    default = transformers.AutoConfig.for_model(model_type)
    written = json.loads(default.to_json_string(use_diff=False))
    ours = hf_config.decoder_from_hf({"model_type": model_type}, "x")
    assert hf_config.decoder_from_hf(written, "x") == ours
    assert (ours.width, ours.vocab_size, ours.tied_head) == (
        default.hidden_size, default.vocab_size, default.tie_word_embeddings
    )  # fmt: skip
    assert getattr(transformers, WRITERS[model_type].architecture).config_class is type(default)


def window(**keys) -> dict:
    return {"use_sliding_window": True, "sliding_window": 8, **keys}


@pytest.mark.parametrize(
    "model_type, keys, window_of_layers",
    [
        ("qwen2", {}, (0, ())),
        ("qwen2", {"sliding_window": 8, "max_window_layers": 1}, (0, ())),
        ("qwen2", window(max_window_layers=3), (8, (3,))),
        ("qwen3", window(max_window_layers=4), (0, ())),
        ("qwen3", window(layer_types=["sliding_attention", "full_attention"] * 2), (8, (0, 2))),
        ("mistral", {"sliding_window": None}, (0, ())),
        ("mistral", {}, (4096, (0, 1, 2, 3))),
        ("smollm3", window(), (8, (3,))),
        ("gemma2", {}, (4096, (0, 2))),
        ("gemma3_text", {"num_hidden_layers": 7}, (4096, (0, 1, 2, 3, 4, 6))),
        ("phi3", {"sliding_window": 9}, (9, (0, 1, 2, 3))),
    ],
)
def test_sliding_layers(model_type, keys, window_of_layers, tmp_path):
    config = {"model_type": model_type, **SIZES, **keys}
    ours = hf_config.decoder_from_hf(config, "x")
    assert (ours.window, ours.sliding_layers) == window_of_layers
    theirs = transformers.AutoConfig.for_model(**config)
    if (types := getattr(theirs, "layer_types", None)) is not None:
        sliding = tuple(i for i, kind in enumerate(types) if kind == "sliding_attention")
        assert sliding == ours.sliding_layers
    written = hf_config.decoder_to_hf(ours, "float32", config)
    assert hf_config.decoder_from_hf(written, "x") == ours and written["model_type"] == model_type


# Values of published files that the other tests do not have.
PUBLISHED = {
    "qwen3": {"attention_bias": False, "max_window_layers": 36, "sliding_window": None, "rope_scaling": None,
              "rope_theta": 1000000, "head_dim": 16},
    "qwen2": {"use_mrope": False, "max_window_layers": 28, "rope_theta": 1000000.0,
              "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    "smollm3": {"pretraining_tp": 2, "max_window_layers": 28, "no_rope_layers": [1, 1, 1, 0, 1], "rope_theta": 5e6},
    "llama": {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"},
              "head_dim": 8, "mlp_bias": False},
    "gemma2": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid", "query_pre_attn_scalar": 144},
    "gemma3_text": {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "_sliding_window_pattern": 6,
                    "query_pre_attn_scalar": 168, "use_bidirectional_attention": False},
    "phi3": {"auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "full_attn_mod": 1, "lm_head_bias": False, "interpolate_factor": 1, "attention_bias": False},
}  # fmt: skip


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_keys_of_published_files(model_type):
    config = {"model_type": model_type, **SIZES, **PUBLISHED[model_type], "eos_token_id": [1, 2]}
    ours = hf_config.decoder_from_hf(config, "x")
    written = hf_config.decoder_to_hf(ours, "bfloat16", config)
    assert hf_config.decoder_from_hf(written, "x") == ours and written["eos_token_id"] == [1, 2]
    assert "auto_map" not in written


def test_attention_factor_of_yarn():
    """DeepSeek states it by two numbers; without any, the decoder computes it from the factor."""
    rope = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 16}
    config = {"model_type": "qwen3", **SIZES, "rope_scaling": rope | {"mscale": 1.0, "mscale_all_dim": 0.5}}
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))
    function = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"]
    ours = hf_config.decoder_from_hf(config, "x").rope_scaling
    assert ours.attention_factor == function(theirs, "cpu")[1] != 1
    assert hf_config.decoder_from_hf({**config, "rope_scaling": rope}, "x").rope_scaling.attention_factor is None


# --- vision-language folders ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory):
    """A Gemma 3 with its SigLIP, as transformers 5 writes it. text_config has only values that are not the default."""
    text = {**SIZES, "head_dim": 16, "sliding_window": 8, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14, "vision_use_head": False}  # fmt: skip
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4,
                                       image_token_index=60, boi_token_index=61, eoi_token_index=62)  # fmt: skip
    net = transformers.Gemma3ForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("gemma3") / "hf"
    net.save_pretrained(folder)
    return net, folder


@pytest.mark.parametrize("names", ["new", "old"])
def test_the_language_model_of_a_vision_language_folder(names, multimodal, tmp_path):
    net, source = multimodal
    folder = shutil.copytree(source, tmp_path / "hf")
    if names == "old":
        from safetensors.numpy import load_file, save_file

        state = load_file(folder / "model.safetensors")
        renamed = {key.replace("model.language_model.", "language_model.model."): x for key, x in state.items()}
        save_file(
            {key.replace("model.vision", "vision"): x for key, x in renamed.items()}, folder / "model.safetensors"
        )
    report = from_torch(folder, tmp_path / "checkpoint", part="llama")
    assert any("tensors of other parts were not read: multi_modal_projector, vision_tower" in x for x in report.lines)
    to_torch(tmp_path / "checkpoint", tmp_path / "again", part="llama")
    assert read_config(tmp_path / "again")["model_type"] == "gemma3_text"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", attn_implementation="eager").eval()
    net.set_attn_implementation("eager")
    ids = torch.arange(1, 31)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, net(ids).logits)


def test_a_vision_language_config_that_contradicts_itself(multimodal):
    config = read_config(multimodal[1])
    for change, words in (
        ({"text_config": None}, "x: text_config must be the config of the language model"),
        ({"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": True}}, "tie_word_embeddings is False"),
        ({"text_config": {"model_type": "llama"}}, "text_config.model_type must be gemma3_text .got 'llama'"),
        ({"depth": 3}, "unknown keys depth of a gemma3"),
    ):
        with pytest.raises(ValueError, match=words):
            hf_config.decoder_from_hf({**config, **change}, "x")


# --- exports without a source -----------------------------------------------------------------------------------------


def decoder(**fields) -> DecoderConfig:
    sizes = {"vocab_size": 64, "width": 32, "mlp_width": 48, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2}
    return DecoderConfig(**sizes, head_dim=8, **fields)


GEMMA = {"unit_offset": True, "post_norms": True, "scale_embeddings": True, "activation": "gelu_tanh"}


@pytest.mark.parametrize(
    "model_type, fields",
    [
        ("llama", {"rope_scaling": RopeScaling()}),
        ("mistral", {"window": 4, "sliding_layers": (0, 1)}),
        ("qwen2", {"qkv_bias": True}),
        ("qwen2", {"qkv_bias": True, "window": 4, "sliding_layers": (0,)}),
        ("qwen3", {"qk_norm": True}),
        ("smollm3", {"nope_layers": (1,)}),
        ("gemma2", GEMMA),
        ("gemma3_text", {**GEMMA, "qk_norm": True, "window": 4, "sliding_layers": (1,), "local_rope_theta": 500.0}),
        ("phi3", {"rotary_share": 0.5}),
    ],
)
def test_a_trained_model_is_written_as_the_family_that_has_its_options(model_type, fields):
    """The description of a training step has no config.json of Hugging Face."""
    hf = hf_config.decoder_to_hf(decoder(**fields), "float32")
    assert hf["model_type"] == model_type
    assert hf_config.decoder_from_hf(hf, "x") == decoder(**fields)
    transformers.AutoConfig.for_model(**json.loads(json.dumps(hf)))


@pytest.mark.parametrize(
    "fields, words",
    [
        (
            {"qkv_bias": True, "qk_norm": True},
            "qwen2: qk_norm True would be False.*qwen3: qkv_bias True would be",
        ),
        ({**GEMMA, "attention_scale": 0.3}, "gemma2: attention_scale 0.3 would be 0.301511"),
        ({"unit_offset": True}, "llama: unit_offset True would be False"),
    ],
)
def test_a_decoder_that_no_family_has(fields, words):
    with pytest.raises(ValueError, match=f"(?s)no model type of transformers has this decoder:.*{words}"):
        hf_config.decoder_to_hf(decoder(**fields), "float32")


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model_type, keys, words",
    [
        ("qwen3_moe", {}, "model_type 'qwen3_moe' is not supported .did you mean qwen3... Known: llama, mistral"),
        (None, {}, "model_type None is not supported"),
        (["llama"], {}, r"model_type \['llama'\] is not supported"),
        ("llama", {"sliding_windows": 4}, "unknown keys sliding_windows.*Known keys of llama: vocab_size, .*rope"),
        ("qwen3", {"max_window_layer": 3}, "unknown keys max_window_layer .did you mean max_window_layers"),
        ("llama", {"hidden_act": "relu2"}, "hidden_act 'relu2' is not supported .silu, swish, gelu_pytorch_tanh"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported"),
        ("llama", {"attention_bias": True}, "attention_bias True is not supported .False supported"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported for this"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention True is not"),
        ("llama", {"quantization_config": {"bits": 4}}, "the weights are quantised: .*dequantize"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported .known"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "'llama3' lacks low_freq_factor, high"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factr": 2.0}}, "unknown keys factr .did you mean factor"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "RoPE's factor must be a finite number"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "type": "yarn"}}, "rope_type 'linear' and type 'yarn'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}},
         "rope_scaling and rope_parameters differ"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ("llama", {"rope_scaling": {"rope_type": ["yarn"]}}, r"RoPE scaling \['yarn'\] is not supported"),
        ("phi3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not supported .known for this"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters has rope_theta: its keys must be"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries, but num_hidden_layers is 4"),
        ("qwen2", {"layer_types": ["linear_attention"] * 4}, "layer_types linear_attention are not supported"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "sliding_window is not set or not used"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must have a 1 .RoPE. or 0 for each of 4 layers"),
        ("llama", {"num_attention_heads": 5}, "hidden_size 32 must be a multiple of num_attention_heads 5"),
        ("qwen3", {"num_attention_heads": 5, "head_dim": 8}, "num_heads .5. must be a multiple of num_kv_heads"),
    ],
)  # fmt: skip
def test_configs_that_are_refused(model_type, keys, words):
    with pytest.raises(ValueError, match=f"(?s)^dir/config.json: .*{words}"):
        hf_config.decoder_from_hf({"model_type": model_type, **SIZES, **keys}, "dir/config.json")


def test_damaged_folders(folders, tmp_path):
    from safetensors.numpy import load_file, save_file

    folder = shutil.copytree(folders("phi3")[0], tmp_path / "hf")
    state = load_file(folder / "model.safetensors")
    fused = "model.layers.1.self_attn.qkv_proj.weight"
    wrong = {**state, fused: state[fused][:-1], "model.layers.0.mlp.gate_up_proj.bias": np.zeros(3, np.float32)}
    del wrong["model.norm.weight"]
    save_file(wrong, folder / "model.safetensors")
    with pytest.raises(ValueError) as e:
        from_torch(folder, tmp_path / "checkpoint", part="llama")
    for line in (
        f"shape of {fused}: (127, 64), expected (128, 64)",
        "unexpected: model.layers.0.mlp.gate_up_proj.bias (3,)",
        "missing: model.norm.weight (64,)",
    ):
        assert line in str(e.value)
    to_torch(folders("phi3")[1], tmp_path / "sharded", part="llama", max_shard_bytes=40_000)
    sorted((tmp_path / "sharded").glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match="model-00002-of-.*safetensors"):
        from_torch(tmp_path / "sharded", tmp_path / "checkpoint", part="llama")
    assert not (tmp_path / "checkpoint").exists()


def test_fused_tensors_are_read_in_rows(folders, tmp_path, monkeypatch):
    """Shards of one tensor each, and blocks of some rows, give the same checkpoint."""
    monkeypatch.setattr(weights, "BLOCK_BYTES", 1000)
    folder, directory, _ = folders("phi3")
    to_torch(directory, tmp_path / "sharded", part="llama", max_shard_bytes=1)
    from_torch(tmp_path / "sharded", tmp_path / "checkpoint", part="llama")
    first, second = params_in(directory), params_in(tmp_path / "checkpoint")
    assert all(np.array_equal(first[path], second[path]) for path in first)
