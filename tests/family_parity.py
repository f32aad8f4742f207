"""Tiny models of the decoder families that differ from LLaMA: their configs in transformers and ours, and weights.

`llama_oracle.py` has the variants of LLaMA.
"""

import dataclasses
import functools

import golden
import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from radfm_jax.checkpoints.checkpoint import unflatten
from radfm_jax.models.decoder import Decoder, DecoderConfig, RopeScaling

WINDOW, ORIGINAL = 8, 16  # tokens; rows are five times as long
SIZES = {"vocab_size": 67, "width": 40, "mlp_width": 56, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2,
         "head_dim": 16, "remat": "none"}  # fmt: skip
HF_SIZES = {"vocab_size": 67, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
            "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "use_cache": False,
            "attn_implementation": "eager"}  # fmt: skip
SHORT_FACTORS = [1.0, 1.1, 1.3, 1.6, 2.0, 2.5]
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
GEMMA = {"tied_head": True, "unit_offset": True, "post_norms": True, "scale_embeddings": True,
         "activation": "gelu_tanh", "window": WINDOW}  # fmt: skip
EVERY_LAYER = tuple(range(SIZES["num_layers"]))


@dataclasses.dataclass(frozen=True)
class Family:
    """The config of transformers, and the fields of ours that are not in SIZES."""

    theirs: type
    their_fields: dict
    our_fields: dict

    @property
    def config(self) -> DecoderConfig:
        return DecoderConfig(**{**SIZES, **self.our_fields})


FAMILIES = {
    "mistral": Family(
        MistralConfig,
        {"sliding_window": WINDOW, "rms_norm_eps": 1e-5},
        {"window": WINDOW, "sliding_layers": EVERY_LAYER, "norm_eps": 1e-5},
    ),
    "smollm3": Family(
        SmolLM3Config,
        {"no_rope_layer_interval": 2, "tie_word_embeddings": True},
        {"nope_layers": (1, 3), "tied_head": True, "rope_theta": 2e6},
    ),
    "qwen2": Family(Qwen2Config, {"rope_parameters": YARN | {"truncate": False, "attention_factor": 1.2}},
                    {"qkv_bias": True, "rope_scaling": RopeScaling(4.0, kind="yarn", original_context=ORIGINAL,
                                                                   truncate=False, attention_factor=1.2)}),
    "qwen3": Family(Qwen3Config, {"rope_parameters": YARN},
                    {"qk_norm": True, "rope_scaling": RopeScaling(4.0, kind="yarn", original_context=ORIGINAL)}),
    "gemma2": Family(
        Gemma2Config,
        {"sliding_window": WINDOW, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 3.0},
        GEMMA | {"sliding_layers": (0, 2), "attention_scale": 24**-0.5, "attention_softcap": 5.0,
                 "logit_softcap": 3.0},
    ),
    "gemma3": Family(
        Gemma3TextConfig,
        {"sliding_window": WINDOW, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        GEMMA | {"sliding_layers": (0, 1, 3), "qk_norm": True, "rope_theta": 1e6, "local_rope_theta": 1e4,
                 "rope_scaling": RopeScaling(kind="linear", factor=8.0)},
    ),
    "phi3": Family(
        Phi3Config,
        {"hidden_size": 64, "partial_rotary_factor": 0.75, "max_position_embeddings": 1024,
         "original_max_position_embeddings": 64, "sliding_window": 2 * WINDOW, "rope_parameters": {
             "rope_type": "longrope", "rope_theta": 1e4, "short_factor": SHORT_FACTORS,
             "original_max_position_embeddings": 64, "long_factor": [2 * x for x in SHORT_FACTORS]}},
        {"width": 64, "rotary_share": 0.75, "norm_eps": 1e-5, "window": 2 * WINDOW, "sliding_layers": EVERY_LAYER,
         "rope_scaling": RopeScaling(16.0, kind="longrope", original_context=64,
                                     channel_factors=tuple(SHORT_FACTORS))},
    ),
}  # fmt: skip

# Hugging Face's name in a layer -> ours, and how its axes become ours; sizes are those of the config.
NAMES = {
    "input_layernorm.weight": "attention_norm/scale",
    "self_attn.q_norm.weight": "query_norm/scale",
    "self_attn.k_norm.weight": "key_norm/scale",
    "mlp.gate_proj.weight": "gate/kernel",
    "mlp.up_proj.weight": "up/kernel",
    "mlp.down_proj.weight": "down/kernel",
    "self_attn.o_proj.weight": "out/kernel",
    **{f"self_attn.{x[0]}_proj.weight": f"{x}/kernel" for x in ("query", "key", "value")},
    **{f"self_attn.{x[0]}_proj.bias": f"{x}/bias" for x in ("query", "key", "value")},
}
TWO_NORMS = {"post_attention_layernorm.weight": "mlp_norm/scale"}
FOUR_NORMS = {
    "post_attention_layernorm.weight": "attention_post_norm/scale",
    "pre_feedforward_layernorm.weight": "mlp_norm/scale",
    "post_feedforward_layernorm.weight": "mlp_post_norm/scale",
}


@functools.cache
def their_model(name: str):
    """Return a family's transformers model with random weights."""
    family = FAMILIES[name]
    net = AutoModelForCausalLM.from_config(family.theirs(**{**HF_SIZES, **family.their_fields})).eval()
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            parameter.copy_(torch.from_numpy(golden.tensor(key, parameter.shape, f"{name} ")))
    return net


def params_of(config: DecoderConfig, state: dict[str, np.ndarray]) -> dict:
    """Return parameters of `Decoder` from a state_dict of transformers, or gradients from its gradients."""
    c, leaves = config, {}
    h, g, k = c.num_heads, c.num_kv_heads, c.head_dim
    shapes = {"query/kernel": (-1, h, k), "key/kernel": (-1, g, k), "value/kernel": (-1, g, k),
              "out/kernel": (h, k, -1), "query/bias": (h, k), "key/bias": (g, k), "value/bias": (g, k)}  # fmt: skip
    names = NAMES | (FOUR_NORMS if c.post_norms else TWO_NORMS)
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}."
        own = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
        if "self_attn.qkv_proj.weight" in own:  # Phi
            parts = np.split(own.pop("self_attn.qkv_proj.weight"), [h * k, (h + g) * k])
            own |= {f"self_attn.{x}_proj.weight": part for x, part in zip("qkv", parts, strict=True)}
            gate_up = np.split(own.pop("mlp.gate_up_proj.weight"), 2)
            own |= {f"mlp.{x}_proj.weight": part for x, part in zip(("gate", "up"), gate_up, strict=True)}
        for key, x in own.items():
            path = names[key]
            leaves.setdefault(f"blocks/{path}", []).append(x.T.reshape(shapes.get(path, x.T.shape)))
    leaves = {path: np.stack(x) for path, x in leaves.items()}
    leaves |= {"embedding": state["model.embed_tokens.weight"], "norm/scale": state["model.norm.weight"]}
    if not c.tied_head:
        leaves["head"] = state["lm_head.weight"].T
    return jax.tree.map(jnp.asarray, unflatten(leaves))


def logits_of(config: DecoderConfig, params, ids, positions=None, segments=None, key_ok=None):
    """Return float32[B, T, V]; without more arguments each row is one sequence."""
    ids = jnp.asarray(ids)
    ones = np.ones(ids.shape, np.int32)
    positions = np.arange(ids.shape[1]) * ones if positions is None else positions
    segments, key_ok = ones if segments is None else segments, ones > 0 if key_ok is None else key_ok

    def forward(model: Decoder):
        return model.logits(model(model.embed(ids), positions, segments, key_ok))

    return Decoder(config).apply({"params": params}, method=forward)
