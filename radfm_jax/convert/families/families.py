"""The families of language models, each a list of groups of keys with the defaults of its class in transformers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from input_pipeline.field_rules import Size
from radfm_jax.convert.families.group import Group, Values, fixed
from radfm_jax.convert.families.groups import (
    activation,
    gemma_scores,
    layers_without_rope,
    sizes,
    window_by_pattern,
    window_of_all_layers,
    window_of_upper_layers,
)
from radfm_jax.convert.families.rope import flat_rope, gemma3_rope, phi_rope
from radfm_jax.models.decoder import DecoderConfig

NO_BIAS = {"attention_bias": (False,), "mlp_bias": (False,)}
CAUSAL = {"attention_bias": (False,), "use_bidirectional_attention": (None, False)}
PATTERN = "the class does not read it: the layers are those of layer_types"
REMOTE = "the class of transformers is used, not code in the folder"


@dataclasses.dataclass(frozen=True)
class Family:
    """How one model type of transformers states a decoder."""

    model_type: str
    architecture: str  # the class that loads an export
    groups: tuple[Group, ...]
    only: Mapping[str, tuple] = dataclasses.field(default_factory=dict)  # key -> the values that are implemented
    irrelevant: Mapping[str, str] = dataclasses.field(default_factory=dict)  # key -> why it changes nothing
    fused: bool = False  # query, key and value are one tensor, and so are gate and up

    @property
    def keys(self) -> dict[str, tuple[Any, Any]]:
        """Key -> (default, type) of all groups."""
        return {key: entry for group in self.groups for key, entry in group.keys.items()}

    def read(self, values: Values) -> DecoderConfig:
        """Return the decoder of a config.json; `values` has every key of `keys`."""
        fields = {field: value for group in self.groups for field, value in group.read(values).items()}
        if not fields.get("sliding_layers"):
            fields["local_rope_theta"] = None
        return DecoderConfig(**fields)

    def write(self, config: DecoderConfig, source: Values) -> dict[str, Any]:
        """Return the keys of a config.json; `source` is that of the folder the weights come from, or empty."""
        return {key: value for group in self.groups for key, value in group.write(config, source).items()}


GEMMA = fixed(unit_offset=True, post_norms=True, scale_embeddings=True)

# The first family that can state a decoder writes it, if its source is not known.
FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "llama", "LlamaForCausalLM",
            (sizes(32000, 4096, 11008, 32, 32, None, whole=True), activation("hidden_act", "silu"), flat_rope(2048)),
            only={**NO_BIAS, "rope_interleaved": (False,), "is_llama_config": (True,)},
            irrelevant={"max_sequence_length": "RoPE has no table of positions"},
        ),
        Family(
            "mistral", "MistralForCausalLM",
            (sizes(32000, 4096, 14336, 32, 32, 8), activation("hidden_act", "silu"), flat_rope(131072),
             window_of_all_layers(4096)),
            only=NO_BIAS,
        ),
        Family(
            "qwen2", "Qwen2ForCausalLM",
            (sizes(151936, 4096, 22016, 32, 32, 32), activation("hidden_act", "silu"), flat_rope(32768),
             window_of_upper_layers(), fixed(qkv_bias=True)),
            only={"use_mrope": (False,)},
        ),
        Family(
            "qwen3", "Qwen3ForCausalLM",
            (sizes(151936, 4096, 22016, 32, 32, 32, 128), activation("hidden_act", "silu"), flat_rope(32768),
             window_of_upper_layers(), fixed(qk_norm=True)),
            only={"attention_bias": (False,)},
        ),
        Family(
            "smollm3", "SmolLM3ForCausalLM",
            (sizes(128256, 2048, 11008, 36, 16, 4, tied=True), activation("hidden_act", "silu"),
             flat_rope(32768, theta=2e6), layers_without_rope()),
            only=NO_BIAS,
            irrelevant={"max_window_layers": PATTERN},
        ),
        Family(
            "gemma2", "Gemma2ForCausalLM",
            (sizes(256000, 2304, 9216, 26, 8, 4, 256, tied=True, whole=True),
             activation("hidden_activation", "gelu_pytorch_tanh"), flat_rope(8192),
             window_by_pattern(lambda values: lambda layer: layer % 2 == 0),
             gemma_scores(50.0, 30.0, caps_scores=True), GEMMA),
            only=CAUSAL,
            irrelevant={"hidden_act": "the class reads hidden_activation"},
        ),
        Family(
            "gemma3_text", "Gemma3ForCausalLM",
            (sizes(262208, 2304, 9216, 26, 8, 4, 256, tied=True, whole=True),
             activation("hidden_activation", "gelu_pytorch_tanh"), gemma3_rope(131072),
             window_by_pattern(lambda values: lambda layer: (layer + 1) % values["sliding_window_pattern"] != 0,
                               sliding_window_pattern=(6, Size)),
             gemma_scores(None, None, caps_scores=False), GEMMA, fixed(qk_norm=True)),
            only=CAUSAL,
            irrelevant={"hidden_act": "the class reads hidden_activation", "_sliding_window_pattern": PATTERN},
        ),
        Family(
            "phi3", "Phi3ForCausalLM",
            (sizes(32064, 3072, 8192, 32, 32, None, eps=1e-5), activation("hidden_act", "silu"), phi_rope(4096),
             window_of_all_layers(None)),
            only={**NO_BIAS, "lm_head_bias": (False,), "full_attn_mod": (1,), "interpolate_factor": (1,)},
            irrelevant={"auto_map": REMOTE},
            fused=True,
        ),
    )
}  # fmt: skip
