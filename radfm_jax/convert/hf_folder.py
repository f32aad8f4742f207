"""The files next to the weights of an export: config.json, tokenizer and model card."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from input_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import hf_config, run_facts
from radfm_jax.convert.hub import config as hub_config
from radfm_jax.convert.hub import processor as hub_processor
from radfm_jax.convert.hub.config import MODEL_TYPE
from radfm_jax.convert.model_card import model_card
from radfm_jax.convert.report import Report
from radfm_jax.inference import stored
from radfm_jax.models.radfm import RadFMConfig

CODE = Path(__file__).parent / "hub" / "code"  # copied into an export of a RadFM, never imported
TOKENIZER_CONFIG, GENERATION_CONFIG = "tokenizer_config.json", "generation_config.json"


def config_json(src: Path, part: str, config: RadFMConfig, description: dict, dtype: str, lines: list[str]) -> dict:
    """Return the config.json of an export.

    For a RadFM it has everything that the tensors do not show: sizes, the preparation of scans and texts, and the
    origin of the weights. With the released names, transformers does not know the model type and rejects the folder.
    What is missing is added to `lines`, the notes of the report.
    """
    if part != "radfm":
        original = description.get("source", {}).get("config") or _special_ids(src)
        if part == "llama":
            return hf_config.decoder_to_hf(config.llama, dtype, original)
        hf = hub_config.write_config(config, dtype, original)
    else:
        sizes = {name: fields for name, fields in config.to_dict().items() if name not in checkpoint.OPTIONS}
        hf = {"architectures": ["RadFM"], "model_type": MODEL_TYPE, "torch_dtype": dtype, "model": sizes}
    if origin := stored.origin_of(src):
        hf[stored.ORIGIN] = origin
    try:
        hf[stored.KEY] = stored.to_record(stored.preparation_of(src, config))
    except ValueError as e:
        lines.append(f"the export does not state how scans are prepared: {e}")
    return hf


def _special_ids(src: Path) -> dict[str, Any]:
    """Return the special tokens of a checkpoint's tokenizer as keys of config.json; {} without one."""
    try:
        tokenizer = load_tokenizer(src)
    except ValueError:  # no tokenizer, or one without an end token, which a language model alone may have
        return {}
    ends = tokenizer.stop_ids
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else list(ends)}


@contextlib.contextmanager
def config_next_to(path: Path, hf: dict) -> Iterator[None]:
    """Write the config of a weight file, then yield. The caller writes the file; if it fails, the config is removed."""
    write_json(path, hf)
    try:
        yield
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_folder(
    folder: Path, src: Path, part: str, config: RadFMConfig, hf: dict, report: Report, **card: str
) -> None:
    """Write config.json, the model card and the tokenizer of an exported folder, and for part `hub` its code.

    card: more of its sections (model_card).
    """
    write_json(folder / "config.json", hf)
    if part == "hub":
        _write_code(folder, src, config, hf, report)
    training = run_facts.training(src)
    (folder / "README.md").write_text(model_card(config, part, report.parameters, hf, training=training, **card))
    tokenizers = [path for name in checkpoint.TOKENIZERS if (path := src / name).is_file()]
    for path in tokenizers:
        if not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
    if not tokenizers:
        report.lines.append("the checkpoint has no tokenizer, so the folder has none")
    elif [path.name for path in tokenizers] == [checkpoint.TOKENIZER]:
        try:
            write_json(folder / TOKENIZER_CONFIG, tokenizer_config(load_tokenizer(tokenizers[0])))
        except ValueError as e:
            report.lines.append(f"no {TOKENIZER_CONFIG}: {e}")


def _write_code(folder: Path, src: Path, config: RadFMConfig, hf: dict, report: Report) -> None:
    """Write the code of a model for transformers, its processor, and the defaults of its answers: greedy, as here."""
    for path in CODE.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    with contextlib.suppress(ValueError):  # no tokenizer, which the report states
        tokenizer = load_tokenizer(src, vocab_size=config.llama.vocab_size)
        ids = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
        bos = {} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id}
        write_json(folder / GENERATION_CONFIG, {**bos, **ids, "do_sample": False, "max_new_tokens": 200})
        if stored.KEY in hf:
            record = hub_processor.processor_config(hf[stored.KEY], config.vision.channels, tokenizer)
            write_json(folder / hub_processor.FILE, record)
    if not (folder / hub_processor.FILE).is_file():
        report.lines.append(f"no {hub_processor.FILE}: AutoProcessor needs the tokenizer and the preparation of scans")


def tokenizer_config(tokenizer: Tokenizer) -> dict:
    """Return a tokenizer_config.json for a SentencePiece model.

    With it, transformers encodes like `Tokenizer` and adds BOS, which prompts need. Without it, AutoTokenizer does not
    know the tokenizer class of a folder, or does not add BOS.
    """
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": tokenizer.piece(tokenizer.bos_id),
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "unk_token": tokenizer.piece(tokenizer.unk_id),
        "clean_up_tokenization_spaces": False,
        "legacy": True,
    }


def write_json(path: Path, value: dict) -> None:
    """Write an indented JSON file for other programs."""
    path.write_text(json.dumps(value, indent=2))
