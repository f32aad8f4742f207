"""PyTorch weights -> a checkpoint directory. One tensor, or a block of its rows, is in memory at a time."""

from __future__ import annotations

import contextlib
import math
import sys
from pathlib import Path
from typing import Any

from input_pipeline.text.tokenizer import HUGGING_FACE, SENTENCEPIECE
from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import table
from radfm_jax.convert.hub import source as hub_source
from radfm_jax.convert.hub.source import HubModel
from radfm_jax.convert.report import NO_PROGRESS, Progress, Report
from radfm_jax.convert.tensor_files import TensorInfo, write_safetensors
from radfm_jax.convert.tokenizer_files import TokenizerFiles
from radfm_jax.convert.torch_source import TorchModel
from radfm_jax.convert.vision_source import VisionWeights
from radfm_jax.convert.weights import Weights
from radfm_jax.inference import stored


def from_torch(
    src,
    dst,
    *,
    part: str = "radfm",  # what `src` must be: `radfm` for released names, or `llama` for a folder of Hugging Face
    vision=None,  # Hugging Face folder of a vision encoder; with it, `src` may be None
    image_size: int | None = None,  # of the vision encoder, if not that of the file
    config: dict | None = None,  # from model_config.read_config, for sizes that tensor shapes do not show
    tokenizer=None,  # SentencePiece model; default: the tokenizer next to `src`
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
    if src is None and vision is None:
        raise ValueError("nothing to convert: pass the folder of a language model, --vision DIR, or both")
    if image_size is not None and vision is None:
        raise ValueError("--image-size is the size of a vision encoder: pass --vision")
    exported = hub_source.is_export(src)
    if exported and (vision is not None or config is not None or trim_vocabulary):
        raise ValueError(
            f"{src} is an exported RadFM, which is read as it is: --vision, --config and --trim-vocabulary do not apply"
        )
    files = TokenizerFiles.of(src, tokenizer, part) if src is not None else TokenizerFiles()
    if trim_vocabulary and files.size is None:
        raise ValueError(f"--trim-vocabulary needs the tokenizer: {files.main} does not exist; pass --tokenizer")
    progress.stage("opening", None)
    options = {"dtype": dtype, "verify": verify, "progress": progress}
    with contextlib.ExitStack() as stack:
        models: list[Weights] = []
        if src is not None:
            if exported:
                model = HubModel(src, **options)
            else:
                vocabulary = files.size if trim_vocabulary else None
                model = TorchModel(src, part=part, config=config, vocabulary=vocabulary, **options)
            models.append(stack.enter_context(model))
        if vision is not None:
            models.append(stack.enter_context(VisionWeights(vision, image_size=image_size, **options)))
        for model in models:
            model.check()
        if not isinstance(models[0], VisionWeights):
            files.check(models[0].config.llama.vocab_size)
        kept = _kept(models[0]) if unused == "keep" else {}
        size = sum(checkpoint.bytes_of(m.shapes) for m in models) + sum(info.nbytes for info in kept.values())
        checkpoint.require_space(dst, size + size // 50, f"converting {src if vision is None else vision}")
        _write(models, Path(dst), kept, files, progress)
        return _report(models, kept, files)


def _kept(model: Weights) -> dict[str, TensorInfo]:
    return {name: model.reader.infos[name] for name in model.unused} if model.part == "radfm" else {}


def _write(models: list[Weights], dst: Path, kept: dict[str, TensorInfo], files: TokenizerFiles, progress) -> None:
    total = sum(m.reader.infos[name].nbytes for m in models for name in m.tensors)
    progress.stage("converting", total + sum(info.nbytes for info in kept.values()))
    fields = {name: value for model in models for name, value in _records(model).items()}
    with checkpoint.new_directory(dst) as directory:
        shapes = {path: shape for model in models for path, shape in model.shapes.items()}
        stacked = {e.path for model in models for e in model.entries if e.layer is not None}
        writer = checkpoint.ParamWriter(directory, shapes, stacked)
        for model in models:
            for path, index, value in model.slices(progress):
                writer.write(path, value, index)
        if kept:
            options = {"max_shard_bytes": sys.maxsize, "basename": "unused", "progress": progress.advance}
            write_safetensors(directory, kept, models[0].reader.read, **options)
        files.copy(directory)
        sizes = {name: values for model in models for name, values in model.sizes.items()}
        source = {"file": models[0].src.name, **fields.pop("source", {})}
        if models[0].part == "radfm" and not kept:
            infos = models[0].reader.infos
            source["unused"] = {n: [list(infos[n].shape), infos[n].dtype.name] for n in models[0].unused}
        if absent := [path for model in models for path in model.absent]:
            fields[checkpoint.ABSENT] = absent
        part = "+".join(model.part for model in models)
        checkpoint.write_description(directory, part, sizes, source=source, **fields)
        progress.stage("hashing", None)


def _records(model: Weights) -> dict[str, dict]:
    """Return the fields of radfm.json that the config next to the weights records.

    These are the preparation of scans and the origin of a RadFM, and the config.json of a language model. Without a
    record, a model of the released sizes gets the preparation of the released weights. Raises ValueError if a record
    does not fit the model.
    """
    if model.part == "vision":
        return {}
    config, where = model.user_config or {}, f"the config of {model.src}"
    origin = config.get(stored.ORIGIN)
    source: dict[str, Any] = {stored.ORIGIN: origin} if isinstance(origin, dict) else {}
    if model.hf_config is not None:
        source["config"] = model.hf_config
    fields = {"source": source}
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


def _report(models: list[Weights], kept: dict, files: TokenizerFiles) -> Report:
    lines = [note for model in models for note in model.notes]
    shapes = [shape for model in models for shape in model.shapes.values()]
    if models[0].part == "radfm":
        lines += _unused_lines(models[0], kept)
    for model in models:
        if model.reader.ties:
            lines.append("tied: " + ", ".join(f"{a} = {b}" for a, b in model.reader.ties.items()))
    if not files.all and models[0].part != "vision":
        lines.append(
            f"no tokenizer: to use this checkpoint with text, put {HUGGING_FACE} or {SENTENCEPIECE} next to the source "
            "or pass --tokenizer"
        )
    return Report(
        parameters=sum(math.prod(shape) for shape, _ in shapes),
        bytes=sum(checkpoint.bytes_of(model.shapes) for model in models),
        dtypes=tuple(sorted({dtype.name for _, dtype in shapes})),
        lines=lines,
    )


def _unused_lines(model: Weights, kept: dict) -> list[str]:
    infos, lines = model.reader.infos, []
    buffers = [n for n in model.unused if table.is_buffer(n)]
    if unused := [n for n in model.unused if not table.is_buffer(n)]:
        count = sum(math.prod(infos[n].shape) for n in unused)
        modules = ", ".join(sorted({table.UNUSED.fullmatch(n)[1] for n in unused}))
        action = "kept next to the parameters" if kept else "dropped (--unused keep stores them)"
        lines.append(f"{len(unused)} tensors ({count:,} numbers) that RadFM never uses were {action}: {modules}")
    if buffers:
        lines.append(f"{len(buffers)} buffers of transformers 4.28 are computed, not learned")
    return lines
