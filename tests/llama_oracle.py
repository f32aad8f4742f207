"""Tiny LLaMA models of the installed transformers, in the variants of published checkpoints."""

from collections.abc import Callable
from os import PathLike
from typing import Any

import golden
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LLAMA31_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""As Llama 3.1, with an original length so short that 20 tokens show the difference. At head_dim 32 the wavelengths
6, 14, 32, 74 .. of the pairs are kept, interpolated (8 to 32) and stretched (above 32)."""


def _config(rope: dict[str, Any] | None = None, **fields: Any) -> LlamaConfig:
    """A tiny configuration; ``rope`` in the form of transformers 5 (rope_parameters)."""
    base: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 88,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_cache": False,
        "attn_implementation": "eager",
    }
    return LlamaConfig(**{**base, **fields}, rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0})


def variants() -> dict[str, LlamaConfig]:
    """Return fresh configurations by name; each differs from ``mha`` in one respect."""
    return {
        "mha": _config(),
        "gqa": _config(hidden_size=64, num_attention_heads=8, num_key_value_heads=2),
        "head_dim": _config(head_dim=12),
        "rope_500k": _config({"rope_type": "default", "rope_theta": 500000.0}),
        "llama31": _config(
            dict(LLAMA31_ROPE),
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rms_norm_eps=1e-5,
        ),
        "tied": _config(tie_word_embeddings=True),
        "odd_vocab": _config(vocab_size=97),
    }


def model(config: LlamaConfig, seed: int = 0) -> LlamaForCausalLM:
    """Return a model in evaluation mode with sharp random weights from their names, shapes and ``seed``."""
    net = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            parameter.copy_(torch.from_numpy(golden.tensor(key, parameter.shape, f"llama {seed} ")))
    return net


def build(
    config: LlamaConfig, seed: int = 0
) -> tuple[dict[str, np.ndarray], Callable[..., np.ndarray], Callable[[str | PathLike[str]], None]]:
    """A model of ``config`` as (state, logits, save).

    state: its state_dict as float32 arrays under transformers' names (``model.embed_tokens.weight`` and so on); with
    tied embeddings ``lm_head.weight`` is in it too and equals the table.
    logits(ids, attention_mask=None): integers (B, L), mask (B, L) of 0 and 1 -> float32 (B, L, V). Positions count
    from 0 whatever the mask; a query sees key j when j is not after it and attention_mask[j] is 1.
    save(folder): write config.json and model.safetensors as ``save_pretrained`` does (a tied head is left out there).
    """
    net = model(config, seed)
    state = {key: value.numpy().astype(np.float32) for key, value in net.state_dict().items()}

    @torch.no_grad()
    def logits(ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        tokens = torch.from_numpy(np.asarray(ids, np.int64))
        length = tokens.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(len(tokens), 1, -1, -1)
        if attention_mask is not None:
            seen = seen & torch.from_numpy(np.asarray(attention_mask, bool))[:, None, None, :]
        additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        return net(input_ids=tokens, attention_mask=additive, position_ids=torch.arange(length)[None]).logits.numpy()

    def save(folder: str | PathLike[str]) -> None:
        net.save_pretrained(folder)

    return state, logits, save


def old_form(config: dict[str, Any], torch_dtype: str = "float32") -> dict[str, Any]:
    """A config.json of transformers 5 rewritten as those of 4.28 to 4.50 look: rope_theta and rope_scaling at the top,
    torch_dtype instead of dtype. (4.28 itself knows neither key of RoPE, no grouped heads and no head_dim.)"""
    old = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(config["rope_parameters"])
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    old["torch_dtype"] = torch_dtype
    return old
