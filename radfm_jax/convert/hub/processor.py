"""The processor_config.json of an export: the arguments of hub/processing_radfm.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from input_pipeline.text.tokenizer import HUGGING_FACE, SENTENCEPIECE, Tokenizer
from radfm_jax import __version__

FILE = "processor_config.json"
# White space, digits, special tokens as text and letters that tokenizers treat differently.
CHECKED = " Any  edema?\n\nTwo lines: 12.5 mm (new), </s> <|im_end|> <image-1>.\t\u0152d\u00e8me \u80ba\u91ce e\u0301 "


def processor_config(preparation: Mapping[str, Any], channels: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the file's content.

    Args:
      preparation: the record in config.json.
      channels: of the vision encoder.
    """
    return {
        "processor_class": "RadFMProcessor",
        "auto_map": {"AutoProcessor": "processing_radfm.RadFMProcessor"},
        "code_version": __version__,
        "preparation": dict(preparation),
        "channels": channels,
        "image_start_token_id": tokenizer.image_id,
        "bos_token_id": tokenizer.bos_id,
        "stop_token_ids": list(tokenizer.stop_ids),
        "text_model": HUGGING_FACE if HUGGING_FACE in tokenizer.files else SENTENCEPIECE,
        "encoding_check": {"text": CHECKED, "ids": tokenizer.encode(CHECKED)},
    }
