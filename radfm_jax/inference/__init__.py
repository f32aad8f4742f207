"""Prefill and decode with an explicit cache: answers to prompts about scans.

decoding.py     the compiled functions and the state between two tokens
sampling.py     how the next token is chosen
text.py         tokens of an answer -> text, piece by piece
generator.py    batches, buckets, scans, prompts, answers
__main__.py     python -m radfm_jax.generate
"""

from radfm_jax.inference.engine import Answer, EncodedScans, GenerationError, Generator, Prompt, Request, checked
from radfm_jax.inference.sampling import Sampling

__all__ = [
    "Answer",
    "EncodedScans",
    "GenerationError",
    "Generator",
    "Prompt",
    "Request",
    "Sampling",
    "checked",
]
