"""A small tokenizer, scans and a training run to generate answers from."""

import dataclasses
import functools
import io
import json

import jax
import nibabel
import numpy as np
import parity
import sentencepiece
from PIL import Image

from input_pipeline.text.tokenizer import load_tokenizer
from radfm_jax.checkpoints import checkpoint
from radfm_jax.models import radfm
from radfm_jax.models.decoder import DecoderConfig
from radfm_jax.models.perceiver import PerceiverConfig
from radfm_jax.models.vit3d import ViTConfig

CONFIG = radfm.RadFMConfig(
    ViTConfig(width=24, num_layers=1, num_heads=2, head_dim=8, mlp_width=32, dropout=0.0),
    PerceiverConfig(width=24, num_layers=1, num_heads=2, head_dim=8, num_latents=4),
    DecoderConfig(vocab_size=360, width=32, mlp_width=64, num_layers=1, num_heads=4, num_kv_heads=4, head_dim=8),
)
PREPARED = {"preprocess": "paper", "storage": "uint8", "size_2d": 64, "size_3d": 32, "depth": 8, "num_latents": 4}
SHORT = ["--max-new-tokens", "12", "--devices", "1", "--no-verify"]


def train_tokenizer(folder):
    """Train a tokenizer of 360 pieces with byte fallback, like LLaMA's."""
    words = "is there a lesion in the left lung right none seen size small large report findings normal".split()
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, 8)) for _ in range(400)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=360, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def write_scans(folder):
    """Write a 2D scan, a volume and a broken file."""
    rng = np.random.default_rng(1)
    Image.fromarray(rng.integers(0, 255, (60, 80), np.uint8)).save(folder / "film.png")
    volume = rng.integers(-1000, 1000, (40, 30, 8)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([1, 1, 2, 1])), folder / "ct.nii.gz")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder


def write_run(workdir, tokenizer):
    """Write a training run with two checkpoints; the first is the best."""
    config = dataclasses.replace(CONFIG, llama=dataclasses.replace(CONFIG.llama, vocab_size=size_of(tokenizer)))
    params = parity.recipe_params(config)
    for step in (5, 10):
        with checkpoint.new_directory(workdir / "checkpoints" / str(step)) as directory:
            checkpoint.save_params(directory, jax.tree.map(lambda x, step=step: x * (10 - step) / 5, params))
            checkpoint.write_description(directory, "radfm", config.to_dict(), source={"training": "run", "step": step})
            (directory / "tokenizer.model").write_bytes(tokenizer.read_bytes())
            data = PREPARED | {"text_length": 128, "terms": "none"}
            (directory / "run.json").write_text(json.dumps({"step": step, "config": {"data": data}}))
    (workdir / "checkpoints" / "best.json").write_text(json.dumps({"step": 5}))
    return workdir


@functools.cache
def size_of(tokenizer) -> int:
    return load_tokenizer(tokenizer).vocab_size


def greedy(model, *args, **options):
    """Return an answer of at most 12 tokens."""
    return model.answer(*args, max_new_tokens=12, **options)
