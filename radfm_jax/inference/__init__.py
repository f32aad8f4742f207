"""Generation: prompts about scans in, answers out. Scoring belongs in `evaluate`, network code in `models`.

requests.py      Request, Prompt, Answer: inputs and outputs of generation
inputs.py        text and scan files -> tokens and volumes
stored.py        records in a checkpoint: preparation of scans, origin of the weights
engine.py        Generator: tokenizes, encodes scans, answers batches
batch.py         one batch while its answers are generated
decoding.py      the compiled functions and the decode state
sampling.py      selection of the next token
plain_rows.py    rows from arrays in the layout of the released model
answer_text.py   tokens of an answer -> text, incrementally
batch_files.py   the JSON Lines format of prompts and answers
batch_run.py     batch file -> answers file, resumable
command.py       python -m radfm_jax.generate
"""

from radfm_jax.inference.engine import Generator
from radfm_jax.inference.requests import Answer, EncodedScans, GenerationError, Prompt, Request, require_answers
from radfm_jax.inference.sampling import Sampling

__all__ = ["Answer", "EncodedScans", "GenerationError", "Generator", "Prompt", "Request", "Sampling", "require_answers"]
