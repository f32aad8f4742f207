"""Presets of published language models: parameters, plans, and the defaults of transformers."""

import dataclasses

import flax.linen as nn
import jax
import pytest
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from radfm_jax.cost import candidates, flops
from radfm_jax.cost.topology import parse
from radfm_jax.models import radfm
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.families import PRESETS
from radfm_jax.training.experiment import Experiment, TrainConfig

PARAMETERS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-3.1-8b": 8_030_261_248,
    "mistral-7b-v0.1": 7_241_732_096,
    "smollm2-135m": 134_515_008,
    "smollm3-3b": 3_075_098_624,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "gemma-2-9b": 9_241_705_984,
    "gemma-3-4b": 3_880_263_168,
    "phi-4": 14_659_507_200,
    "phi-4-mini": 3_836_021_760,
}
"""As published with each checkpoint; of Gemma 3, the language model."""


QUICK = ("llama-3.1-8b", "qwen3-8b", "gemma-3-4b")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in PRESETS]
)
def test_presets_have_the_published_parameters_and_a_plan(name):
    model = dataclasses.replace(radfm.tiny(), llama=PRESETS[name])
    numbers = sum(x.size for x in jax.tree.leaves(nn.unbox(radfm.abstract_params(model))["llama"]))
    assert numbers == PARAMETERS[name]
    config = Experiment(model, train=TrainConfig(dtype="bfloat16"))
    plan = lambda text: candidates.evaluate(config, parse(text), 0.4, batch=8, accumulation=1, remat="none")  # noqa: E731
    on_gpus = plan("gpu:8xH100")
    assert numbers / 8 * 4 <= on_gpus.memory["parameters"] < numbers / 8 * 4 * 1.02  # float32 on each of 8 devices
    assert on_gpus.compute > 0
    if name.startswith("gemma"):
        # cuDNN has neither heads of 256 channels nor soft caps: scores and their softmax are stored.
        more = on_gpus.memory["activations"] - plan("v5p:2x2x2").memory["activations"]
        c, text = PRESETS[name], config.data.text_length
        assert more == 2 * 4 * text**2 * c.num_heads * c.num_layers


def test_windows_have_less_attention():
    """5 tokens and a window of 2: 9 of 15 pairs by hand; of the formula's 12.5, a band of (25 - 9) / 2 = 8."""
    c = DecoderConfig(num_layers=3, num_heads=2, num_kv_heads=2, head_dim=4)
    attention = lambda **fields: flops.decoder_attention(dataclasses.replace(c, **fields), 5)  # noqa: E731
    pair = 4 * 2 * 4  # two products of a pair's four channels in two heads
    assert attention() == 3 * 12.5 * pair
    assert attention(window=2, sliding_layers=(0, 2)) == (12.5 + 2 * 8) * pair
    assert attention(window=9, sliding_layers=(0, 1, 2)) == attention()


# Fields of a preset that are defaults of the config class in transformers, which has the sizes of one of its models.
DEFAULTS = {
    "llama-7b": (LlamaConfig, "vocab_size width mlp_width num_layers num_heads num_kv_heads norm_eps tied_head"),
    "mistral-7b-v0.1": (MistralConfig, "vocab_size width mlp_width num_layers num_heads num_kv_heads window tied_head"),
    "smollm3-3b": (SmolLM3Config, "vocab_size width mlp_width num_layers num_heads num_kv_heads nope_layers tied_head"),
    "qwen2.5-7b": (Qwen2Config, "norm_eps tied_head activation"),
    "qwen3-8b": (Qwen3Config, "vocab_size width head_dim norm_eps tied_head activation"),
    "gemma-2-9b": (Gemma2Config, "vocab_size head_dim attention_softcap logit_softcap window norm_eps tied_head"),
    "gemma-3-4b": (Gemma3TextConfig, "vocab_size head_dim num_heads num_kv_heads rope_theta local_rope_theta norm_eps"),
    "phi-4-mini": (Phi3Config, "width mlp_width num_layers norm_eps"),
}
"""`Fields of transformers by ours` is in `default_of`."""


def default_of(their_config, field: str):
    c = their_config
    rope = c.rope_parameters
    named = {
        "width": "hidden_size", "mlp_width": "intermediate_size", "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps",
        "tied_head": "tie_word_embeddings", "window": "sliding_window", "attention_softcap": "attn_logit_softcapping",
        "logit_softcap": "final_logit_softcapping",
    }  # fmt: skip
    if field == "nope_layers":
        return tuple(i for i, has_rope in enumerate(c.no_rope_layers) if not has_rope)
    if field in ("rope_theta", "local_rope_theta"):
        return rope["sliding_attention" if field.startswith("local") else "full_attention"]["rope_theta"]
    if field == "activation":
        return c.hidden_act
    return getattr(c, named.get(field, field))


@pytest.mark.parametrize("name", DEFAULTS)
def test_presets_agree_with_the_defaults_of_transformers(name):
    kind, fields = DEFAULTS[name]
    default = kind()
    for field in fields.split():
        assert getattr(PRESETS[name], field) == default_of(default, field), field
    if kind in (Gemma2Config, Gemma3TextConfig):
        slides = [layer == "sliding_attention" for layer in default.layer_types]  # of a model with fewer layers
        assert PRESETS[name].layer_slides[: len(slides)] == slides
        assert default.query_pre_attn_scalar == PRESETS[name].head_dim  # so the scale of scores is the usual one
