"""The groups of keys that families share: sizes, activation, Gemma's attention, sliding layers, layers without RoPE."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

from input_pipeline.field_rules import Count, Size, above
from radfm_jax.convert.families.group import Fields, Group, Values
from radfm_jax.models.decoder import DecoderConfig

# Keys of all families -> fields of DecoderConfig, types.
SIZES = {
    "vocab_size": ("vocab_size", Size), "hidden_size": ("width", Size), "intermediate_size": ("mlp_width", Size),
    "num_hidden_layers": ("num_layers", Size), "num_attention_heads": ("num_heads", Size),
    "num_key_value_heads": ("num_kv_heads", Size | None), "head_dim": ("head_dim", Size | None),
    "rms_norm_eps": ("norm_eps", Annotated[float, above(0)]), "tie_word_embeddings": ("tied_head", bool),
}  # fmt: skip
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
FULL, SLIDING = "full_attention", "sliding_attention"
LayerTypes = tuple[str, ...] | None


def sizes(
    vocab_size: int, hidden_size: int, intermediate_size: int, num_hidden_layers: int, num_attention_heads: int,
    num_key_value_heads: int | None, head_dim: int | None = None, *, eps: float = 1e-6, tied: bool = False,
    whole: bool = False,
) -> Group:  # fmt: skip
    """Return the group of sizes with a family's defaults.

    Args:
      whole: whether the class in transformers wants `hidden_size` to be a multiple of the number of heads.
    """
    values = (vocab_size, hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, num_key_value_heads,
              head_dim, eps, tied)  # fmt: skip
    keys = {key: (default, kind) for (key, (_, kind)), default in zip(SIZES.items(), values, strict=True)}

    def read(values: Values) -> Fields:
        fields = {field: values[key] for key, (field, _) in SIZES.items()}
        width, heads = fields["width"], fields["num_heads"]
        if whole and width % heads:
            raise ValueError(
                f"hidden_size {width} must be a multiple of num_attention_heads {heads}, as in transformers"
            )
        fields["num_kv_heads"] = fields["num_kv_heads"] or heads
        fields["head_dim"] = fields["head_dim"] or width // heads
        return fields

    def write(config: DecoderConfig, source: Values) -> dict[str, Any]:
        written = {key: getattr(config, field) for key, (field, _) in SIZES.items()}
        # Phi and Qwen2 have the key only where heads are wider or narrower than usual.
        if head_dim is None and "head_dim" not in source and config.head_dim * config.num_heads == config.width:
            del written["head_dim"]
        return written

    return Group(keys, read, write)


def activation(key: str, default: str) -> Group:
    """Return the group of the MLP's activation."""

    def read(values: Values) -> Fields:
        if values[key] not in ACTIVATIONS:
            raise ValueError(f"{key} {values[key]!r} is not supported ({', '.join(ACTIVATIONS)} are)")
        return {"activation": ACTIVATIONS[values[key]]}

    def write(config: DecoderConfig, source: Values) -> dict[str, Any]:
        return {key: next(name for name, ours in ACTIVATIONS.items() if ours == config.activation)}

    return Group({key: (default, str)}, read, write)


def gemma_scores(attention_softcap: float | None, logit_softcap: float | None, *, caps_scores: bool) -> Group:
    """Return the group of the scale of scores, and of the soft caps of scores and logits.

    Args:
      caps_scores: whether the class caps scores. Gemma 3 has the key, but its attention does not read it.
    """
    cap = Annotated[float, above(0)] | None
    keys = {
        "query_pre_attn_scalar": (256, Annotated[float, above(0)]),
        "attn_logit_softcapping": (attention_softcap, cap), "final_logit_softcapping": (logit_softcap, cap),
    }  # fmt: skip

    def read(values: Values) -> Fields:
        scalar, attention_cap = values["query_pre_attn_scalar"], values["attn_logit_softcapping"]
        if attention_cap is not None and not caps_scores:
            raise ValueError("attn_logit_softcapping is not supported for this model type: transformers ignores it")
        head_dim = values["head_dim"] or values["hidden_size"] // values["num_attention_heads"]
        return {
            "attention_scale": None if scalar == head_dim else scalar**-0.5,
            "attention_softcap": attention_cap,
            "logit_softcap": values["final_logit_softcapping"],
        }

    def write(config: DecoderConfig, source: Values) -> dict[str, Any]:
        scale = config.attention_scale
        return {
            "query_pre_attn_scalar": config.head_dim if scale is None else round(scale**-2),
            "attn_logit_softcapping": config.attention_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }

    return Group(keys, read, write)


# --- sliding layers ---------------------------------------------------------------------------------------------------


def _sliding(values: Values, window: int | None, default: Callable[[int], bool]) -> Fields:
    """Return the fields of `layer_types`, or of the layers for which `default` is true."""
    count, types = values["num_hidden_layers"], values["layer_types"]
    if types is None:
        types = [SLIDING if window is not None and default(i) else FULL for i in range(count)]
    if len(types) != count:
        raise ValueError(f"layer_types has {len(types)} entries, but num_hidden_layers is {count}")
    if unknown := sorted({kind for kind in types if kind not in (FULL, SLIDING)}):
        raise ValueError(f"layer_types {', '.join(unknown)} are not supported ({FULL} and {SLIDING} are)")
    layers = tuple(i for i, kind in enumerate(types) if kind == SLIDING)
    if layers and window is None:
        raise ValueError(f"layer_types has {SLIDING}, but sliding_window is not set or not used")
    return {"window": window if layers else 0, "sliding_layers": layers}


def _layer_types(config: DecoderConfig) -> list[str]:
    return [SLIDING if i in config.sliding_layers else FULL for i in range(config.num_layers)]


def window_of_all_layers(default: int | None) -> Group:
    """Return the group of Mistral and Phi: `sliding_window` holds for all layers, null for none."""

    def read(values: Values) -> Fields:
        return _sliding({**values, "layer_types": None}, values["sliding_window"], lambda layer: True)

    return Group(
        {"sliding_window": (default, Size | None)},
        read,
        lambda config, source: {"sliding_window": config.window or None},
    )


def window_of_upper_layers() -> Group:
    """Return the group of Qwen: if `use_sliding_window`, layers from `max_window_layers` on, or `layer_types`."""
    keys = {
        "use_sliding_window": (False, bool), "sliding_window": (4096, Size | None), "max_window_layers": (28, Count),
        "layer_types": (None, LayerTypes),
    }  # fmt: skip

    def read(values: Values) -> Fields:
        window = values["sliding_window"] if values["use_sliding_window"] else None
        return _sliding(values, window, lambda layer: layer >= values["max_window_layers"])

    def write(config: DecoderConfig, source: Values) -> dict[str, Any]:
        written = {"use_sliding_window": bool(config.window), "layer_types": _layer_types(config)}
        if not config.window:
            return written
        upper = config.sliding_layers == tuple(range(config.sliding_layers[0], config.num_layers))
        first = {"max_window_layers": config.sliding_layers[0]} if upper else {}  # for versions without layer_types
        return written | first | {"sliding_window": config.window}

    return Group(keys, read, write)


def window_by_pattern(default: Callable[[Values], Callable[[int], bool]], **keys: tuple[Any, Any]) -> Group:
    """Return the group of Gemma: sliding and full layers alternate, or `layer_types`.

    Args:
      default: from the values, a function that tells whether a layer slides if `layer_types` is absent.
      keys: further keys that `default` reads.
    """

    def read(values: Values) -> Fields:
        return _sliding(values, values["sliding_window"], default(values))

    def write(config: DecoderConfig, source: Values) -> dict[str, Any]:
        window = {"sliding_window": config.window} if config.window else {}
        return {"layer_types": _layer_types(config), **window}

    return Group({"sliding_window": (4096, Size | None), "layer_types": (None, LayerTypes), **keys}, read, write)


def layers_without_rope() -> Group:
    """Return the group of SmolLM3: every fourth layer has no RoPE, and could have a window."""
    keys = {
        "no_rope_layers": (None, tuple[int, ...] | None), "no_rope_layer_interval": (4, Size),
        "use_sliding_window": (False, bool), "sliding_window": (None, Size | None), "layer_types": (None, LayerTypes),
    }  # fmt: skip

    def read(values: Values) -> Fields:
        count, every = values["num_hidden_layers"], values["no_rope_layer_interval"]
        has_rope: Sequence[int] | None = values["no_rope_layers"]
        if has_rope is None:
            has_rope = [int((layer + 1) % every != 0) for layer in range(count)]
        if len(has_rope) < count or not set(has_rope) <= {0, 1}:
            raise ValueError(f"no_rope_layers must have a 1 (RoPE) or 0 for each of {count} layers (got {has_rope})")
        nope = tuple(layer for layer in range(count) if not has_rope[layer])
        window = values["sliding_window"] if values["use_sliding_window"] else None
        return {"nope_layers": nope, **_sliding(values, window, lambda layer: layer in nope)}

    def write(config: DecoderConfig, source: Values) -> dict[str, Any]:
        return {
            "no_rope_layers": [int(layer not in config.nope_layers) for layer in range(config.num_layers)],
            "use_sliding_window": bool(config.window),
            "sliding_window": config.window or None,
            "layer_types": _layer_types(config),
        }

    return Group(keys, read, write)
