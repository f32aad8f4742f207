"""Configuration of a RadFM that radfm_jax exported: a language model of transformers, a vision encoder and a bridge."""

import math

from transformers import AutoConfig, PreTrainedConfig

VERSION = "0.6.0"  # of radfm_jax; config.json and the code next to it must have the same
VISION_FIELDS = {
    "vit3d": "width num_layers num_heads head_dim mlp_width patch channels tables dropout",
    "ctvit": "width spatial_layers temporal_layers num_heads head_dim mlp_width image_size patch depth channels "
    "codebook mean std",
    "slices": "hidden_size image_size patch_size num_channels depth_positions image_mean image_std",
}
BRIDGE_FIELDS = {"perceiver": "num_latents num_layers num_heads head_dim mlp_factor", "mlp": "hidden grid"}


class RadFMVisionConfig(PreTrainedConfig):
    """Sizes of an encoder that transformers does not have: `kind` is vit3d or ctvit."""

    model_type = "radfm_vision"
    base_config_key = "vision_config"


class RadFMConfig(PreTrainedConfig):
    """Sizes of the parts, and how radfm_jax prepares scans and texts (`preparation`).

    `text_config` is that of the language model's own class. `vision_config` is that of transformers' SigLIP or DINOv2
    plus `depth_positions`, `image_mean` and `image_std`, or a RadFMVisionConfig. Ids from the vocabulary size V of the
    language model on are V for the start of a scan, V + 1 for its end and V + 2 for each visual token.
    """

    model_type = "radfm_jax"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    keys_to_ignore_at_inference = ["cache", "past_key_values", "last_hidden_state"]

    def __init__(
        self, text_config=None, vision_config=None, bridge_config=None, preparation=None, origin=None,
        code_version=VERSION, **kwargs,
    ):  # fmt: skip
        self.code_version = code_version
        self.check_version("configuration_radfm.py", VERSION)
        self.text_config, self.vision_config = _config(text_config), _config(vision_config)
        self.bridge_config, self.preparation, self.origin = bridge_config or {}, preparation, origin
        self.vocab_size = self.image_start_token_id = self.image_end_token_id = self.image_token_id = None
        parts = {"text_config": text_config, "vision_config": vision_config, "bridge_config": bridge_config}
        if any(parts.values()):  # transformers also makes configs without fields
            if missing := [name for name, fields in parts.items() if not fields]:
                raise ValueError(f"config.json lacks {', '.join(missing)}")
            self._check_fields()
            size = self.text_config.vocab_size
            ids = {"image_start_token_id": size, "image_end_token_id": size + 1, "image_token_id": size + 2}
            for name, value in {**ids, "vocab_size": size + 3}.items():
                if kwargs.pop(name, value) != value:
                    raise ValueError(f"config.json: {name} must be {value}, as text_config.vocab_size is {size}")
                setattr(self, name, value)
        super().__init__(**kwargs)

    @property
    def num_latents(self) -> int:
        """Number of visual tokens of a scan."""
        return self.bridge_config.get("num_latents") or math.prod(self.bridge_config["grid"])

    def check_version(self, file: str, version: str) -> None:
        """Raise ValueError if a file of code has another version than config.json."""
        if self.code_version != version:
            raise ValueError(
                f"config.json was written by radfm_jax {self.code_version}, but {file} is of version {version}: take "
                "all files from one export"
            )

    def _check_fields(self) -> None:
        vision, bridge = self.vision_config, self.bridge_config
        kind = getattr(vision, "kind", None) if vision.model_type == RadFMVisionConfig.model_type else "slices"
        for name, part, fields in (
            ("vision_config", vision.to_dict(), VISION_FIELDS.get(kind)),
            ("bridge_config", bridge, BRIDGE_FIELDS.get(bridge.get("kind"))),
        ):
            if fields is None:
                raise ValueError(f"config.json: {name}.kind {part.get('kind')!r} is unknown")
            if missing := [field for field in fields.split() if part.get(field) is None]:
                raise ValueError(f"config.json: {name} lacks {', '.join(missing)}")


def _config(fields):
    """Return the config of a part; that of transformers' class for its model type."""
    if not isinstance(fields, dict):
        return fields
    fields = dict(fields)
    kind = fields.pop("model_type", None)
    if kind == RadFMVisionConfig.model_type:
        return RadFMVisionConfig(**fields)
    return AutoConfig.for_model(kind, **fields)
