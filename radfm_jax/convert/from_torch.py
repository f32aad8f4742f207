"""PyTorch weights -> a checkpoint directory. One tensor, or a block of its rows, is in memory at a time."""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import table
from radfm_jax.convert.report import NO_PROGRESS, Progress, Report
from radfm_jax.convert.tensor_files import TensorInfo, write_safetensors
from radfm_jax.convert.torch_source import TorchModel
from radfm_jax.inference import stored


def from_torch(
    src,
    dst,
    *,
    part: str = "radfm",  # what `src` must be: `radfm`, or `llama` for a Hugging Face LLaMA folder
    config: dict | None = None,  # from model_config.read_config, for sizes that tensor shapes do not show
    tokenizer=None,  # SentencePiece model; default: `tokenizer.model` next to `src`
    trim_vocabulary: bool = False,  # drop the rows of the vocabulary that the tokenizer lacks
    unused: str = "drop",  # `keep` stores tensors that the model never reads, `drop` only their names and shapes
    dtype: str | None = None,  # float32, bfloat16 or float16; None keeps the dtype of the file
    verify: bool = True,  # check the CRC-32 of every record first
    progress: Progress = NO_PROGRESS,
) -> Report:
    """Convert PyTorch weights (`.bin`, the published zip, safetensors or a folder) to a checkpoint directory.

    Raises one ValueError with every problem of the input; `dst` does not exist then.
    """
    if Path(dst).exists():
        raise ValueError(f"{dst} exists: choose another name or remove it first")
    if tokenizer and not Path(tokenizer).is_file():
        raise ValueError(f"tokenizer {tokenizer} does not exist")
    source = Path(src)
    vocabulary = Path(tokenizer or (source if source.is_dir() else source.parent) / checkpoint.TOKENIZER)
    pieces = piece_count(vocabulary) if vocabulary.is_file() else None
    if trim_vocabulary and pieces is None:
        raise ValueError(f"--trim-vocabulary needs the tokenizer: {vocabulary} does not exist; pass --tokenizer")
    progress.stage("opening", None)
    options = {"part": part, "config": config, "vocabulary": pieces if trim_vocabulary else None, "dtype": dtype}
    with TorchModel(src, **options, verify=verify, progress=progress) as model:
        model.check()
        if pieces is not None:
            check_pieces(vocabulary, pieces, model.config.llama.vocab_size)
        records, infos = _records(model), model.reader.infos
        kept = {n: infos[n] for n in model.unused} if unused == "keep" else {}
        size = checkpoint.bytes_of(model.shapes) + sum(info.nbytes for info in kept.values())
        checkpoint.require_space(dst, size + size // 50, f"converting {src}")
        _write(model, Path(dst), kept, vocabulary, records, progress)
        return _report(model, kept, vocabulary)


def _write(
    model: TorchModel,
    dst: Path,
    kept: dict[str, TensorInfo],
    vocabulary: Path,
    records: dict[str, dict],
    progress: Progress,
) -> None:
    infos, part = model.reader.infos, model.part
    sources = [*(infos[model.source(e)] for e in model.entries), *kept.values()]
    progress.stage("converting", sum(info.nbytes for info in sources))
    with checkpoint.new_directory(dst) as directory:
        stacked = {e.path for e in model.entries if e.layer is not None}
        writer = checkpoint.ParamWriter(directory, model.shapes, stacked)
        for path, index, value in model.slices(progress):
            writer.write(path, value, index)
        if kept:
            options = {"max_shard_bytes": sys.maxsize, "basename": "unused", "progress": progress.advance}
            write_safetensors(directory, kept, model.reader.read, **options)
        for name in checkpoint.TOKENIZERS if part == "llama" else ():
            if (model.folder / name).is_file():
                shutil.copyfile(model.folder / name, directory / name)
        if vocabulary.is_file():
            shutil.copyfile(vocabulary, directory / checkpoint.TOKENIZER)
        sizes = model.config.to_dict()
        dropped = {} if kept else {n: [list(infos[n].shape), infos[n].dtype.name] for n in model.unused}
        hf_config = model.user_config if part == "llama" and "model" not in model.user_config else None
        source = {"file": model.src.name, "unused": dropped, "config": hf_config, **records.pop("source", {})}
        sizes = sizes if part == "radfm" else {"llama": sizes["llama"]}
        checkpoint.write_description(directory, part, sizes, source=source, **records)
        progress.stage("hashing", None)


def _records(model: TorchModel) -> dict[str, dict]:
    """Return the fields of radfm.json that the config next to the weights records: preparation and origin.

    Without a record, a model of the released sizes gets the preparation of the released weights. Raises ValueError if
    a record does not fit the model.
    """
    config, where = model.user_config or {}, f"the config of {model.src}"
    origin = config.get(stored.ORIGIN)
    fields: dict[str, dict] = {"source": {stored.ORIGIN: origin}} if isinstance(origin, dict) else {}
    if model.part == "llama":
        return fields
    if (record := config.get(stored.KEY)) is not None:
        latents = stored.from_record(record, where).num_latents
        if latents != model.config.num_latents:
            raise ValueError(f"{where}: `{stored.KEY}` has {latents} latents, the weights {model.config.num_latents}")
        return fields | {stored.KEY: record}
    if (released := stored.released_preparation(model.config)) is not None:
        model.notes.append(
            f"the source does not state how scans are prepared: assumed {released.preprocess!r} preprocessing at "
            f"{released.size_2d}/{released.size_3d}, because all sizes are those of the released weights"
        )
        return fields | {stored.KEY: stored.to_record(released)}
    model.notes.append(f"the source does not state how scans are prepared: {stored.REMEDY}")
    return fields


def piece_count(path: Path) -> int:
    """Return the number of pieces of a SentencePiece model. Raises ValueError if `path` is something else, or empty."""
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    except (OSError, RuntimeError) as e:
        raise ValueError(f"{path} is not a SentencePiece model: {e}") from None
    if not pieces:
        raise ValueError(f"{path} has no pieces: pass the model's own tokenizer")
    return pieces


def check_pieces(path: Path, pieces: int, vocab_size: int) -> None:
    """Raise ValueError unless the vocabulary has a row for each piece of the tokenizer and no others."""
    if pieces < vocab_size:
        raise ValueError(
            f"vocabulary of {path} is {pieces:,}, but the embedding has {vocab_size:,} rows: pass the model's own "
            f"tokenizer. If the other {vocab_size - pieces:,} rows are padding or tokens that no text has ([PAD]), "
            "--trim-vocabulary drops them"
        )
    if pieces > vocab_size:
        raise ValueError(
            f"vocabulary of {path} is {pieces:,}, but the embedding has {vocab_size:,} rows: pass the model's own "
            "tokenizer"
        )


def _report(model: TorchModel, kept: dict, vocabulary: Path) -> Report:
    infos, lines = model.reader.infos, list(model.notes)
    buffers = [n for n in model.unused if table.is_buffer(n)]
    unused = [n for n in model.unused if not table.is_buffer(n)]
    if unused:
        count = sum(math.prod(infos[n].shape) for n in unused)
        modules = ", ".join(sorted({table.UNUSED.fullmatch(n)[1] for n in unused}))
        action = "kept next to the parameters" if kept else "dropped (--unused keep stores them)"
        lines.append(f"{len(unused)} tensors ({count:,} numbers) that RadFM never uses were {action}: {modules}")
    if buffers:
        lines.append(f"{len(buffers)} buffers of transformers 4.28 are computed, not learned")
    if model.reader.ties:
        lines.append("tied: " + ", ".join(f"{a} = {b}" for a, b in model.reader.ties.items()))
    if not vocabulary.is_file():
        lines.append(
            f"no tokenizer: to use this checkpoint with text, put the SentencePiece model next to the source as "
            f"{checkpoint.TOKENIZER} or pass --tokenizer"
        )
    return Report(
        parameters=sum(math.prod(shape) for shape, _ in model.shapes.values()),
        bytes=checkpoint.bytes_of(model.shapes),
        dtypes=tuple(sorted({dtype.name for _, dtype in model.shapes.values()})),
        lines=lines,
    )
