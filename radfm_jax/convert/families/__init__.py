"""config.json of the language models in transformers <-> DecoderConfig: groups of keys, and families made of them.

Reading and writing a folder's file, and what happens to keys that change nothing, belong to `hf_config.py`.
"""

from radfm_jax.convert.families.families import FAMILIES, Family

__all__ = ["FAMILIES", "Family"]
