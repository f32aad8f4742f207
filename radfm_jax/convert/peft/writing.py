"""The language model's adapters of a checkpoint -> a folder that PEFT loads."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from input_pipeline.files import read_json
from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.convert import hf_config, hf_folder, inherited
from radfm_jax.convert.families import FAMILIES
from radfm_jax.convert.model_card import adapter_card
from radfm_jax.convert.peft import config as peft_config
from radfm_jax.convert.peft import tensors as peft_tensors
from radfm_jax.convert.peft.reading import ADAPTER, RECORD
from radfm_jax.convert.report import NO_PROGRESS, Progress, Report
from radfm_jax.convert.tensor_files import TensorInfo, write_safetensors
from radfm_jax.inference import stored
from radfm_jax.models import lora
from radfm_jax.models.computation import COMPUTE
from radfm_jax.models.lora import LoraConfig
from radfm_jax.models.radfm import RadFMConfig


def to_peft(
    src,
    dst,
    *,
    base=None,  # checkpoint directory of the base, if it is not where it was during training
    base_model: str | None = None,  # id or folder of the base on Hugging Face, for base_model_name_or_path
    dtype: str | None = None,  # of the adapters; None: as stored
    progress: Progress = NO_PROGRESS,
) -> Report:
    """Write the adapters of a run's language model as a folder for `peft.PeftModel.from_pretrained`.

    Weights and adapters of other parts have no place in it; the report lists them. Raises ValueError if the language
    model has no adapters, if transformers has no such language model, or if `base_model` is a folder of another one.
    """
    src = run_directory.select_checkpoint(src)
    progress.stage("verifying", None)
    checkpoint.verify(src)
    description = checkpoint.read_description(src)
    adapters = adapters_of(description, src)
    params = checkpoint.StoredParams(src, base)
    lora.check_rank(adapters, params.shapes, src)
    paths = [path for path in params.shapes if lora.is_adapter(path) and path.startswith(peft_tensors.LLAMA)]
    if not paths:
        raise ValueError(f"{src} has no adapters of the language model, only {', '.join(adapters.targets)}")
    config = RadFMConfig.from_dict({"llama": description["model"]["llama"]})
    source = inherited.source_fields(description, checkpoint.read_description(params.base))
    family = FAMILIES[_model_type(config, base_model, source.get("config"))]
    override = np.dtype(checkpoint.DTYPES[dtype]) if dtype else None
    tensors = {}
    for entry in peft_tensors.entries(config, {path: params.shapes[path] for path in paths}):
        value = entry.to_torch(params.read(entry.path, entry.index))
        with np.errstate(over="ignore"):
            tensors[entry.name] = value.astype(override or value.dtype)
        if not np.isfinite(tensors[entry.name]).all():
            raise ValueError(f"{src}: {entry.path} is not finite as {tensors[entry.name].dtype}")
    tensors, stacked = peft_tensors.fuse(tensors, config) if family.fused else (tensors, {})
    original = description.get("source", {}).get(ADAPTER, {})
    base_model = base_model or original.get(peft_config.NAME)
    written = peft_config.written(adapters, peft_tensors.modules_of(tensors), stacked, base_model, original)
    lines = _lines(params, src, description, written)
    tensors = {peft_tensors.PREFIX + name: x for name, x in tensors.items()}
    size = sum(x.nbytes for x in tensors.values())
    dtypes = tuple(sorted({x.dtype.name for x in tensors.values()}))
    report = Report(sum(x.size for x in tensors.values()), size, dtypes, lines)
    progress.stage("writing", size)
    with checkpoint.new_directory(dst, manifest=False) as folder:
        infos = {name: TensorInfo(x.shape, x.dtype) for name, x in tensors.items()}
        options = {"max_shard_bytes": sys.maxsize, "basename": "adapter_model", "progress": progress.advance}
        write_safetensors(folder, infos, tensors.__getitem__, **options)
        hf_folder.write_json(folder / peft_config.FILE, written)
        hf_folder.write_json(folder / RECORD, _record(src, description, lines))
        (folder / "README.md").write_text(adapter_card(adapters, report.parameters, written))
    return report


def adapters_of(description: dict, src: Path) -> LoraConfig:
    """Return the config of a checkpoint's adapters. Raises ValueError if it has none."""
    record = description["model"].get("lora")
    if record is None:
        raise ValueError(f"{src} has no adapters: it was trained without model.lora")
    if checkpoint.BASE not in description:
        raise ValueError(f"{src / checkpoint.DESCRIPTION} has adapters, but no {checkpoint.BASE}: it is damaged")
    return RadFMConfig.from_dict({"lora": record}).lora


def _model_type(config: RadFMConfig, base_model: str | None, source: dict | None) -> str:
    """Return the model type of the base in transformers, which decides the names of its layers."""
    path = Path(base_model or "") / "config.json"
    if base_model and path.is_file():
        source = hf_config.language_model(read_json(path, kind=dict), path)
        theirs = hf_config.decoder_from_hf(source, path)
        names = [f.name for f in dataclasses.fields(theirs) if f.name not in COMPUTE]
        pairs = [(name, getattr(theirs, name), getattr(config.llama, name)) for name in names]
        if differ := [f"{name} {theirs} (the run has {ours})" for name, theirs, ours in pairs if theirs != ours]:
            raise ValueError(f"{base_model} is not the base of the run: it has {', '.join(differ)}")
    return hf_config.decoder_to_hf(config.llama, "float32", source)["model_type"]


def _lines(params: checkpoint.StoredParams, src: Path, description: dict, written: dict[str, Any]) -> list[str]:
    lines = []
    own = [path for path, origin in params.origins.items() if origin == src]
    other = [p for p in own if lora.is_adapter(p) and not p.startswith(peft_tensors.LLAMA)]
    if other:
        maps = ", ".join(dict.fromkeys(path.rpartition("/")[0] for path in other))
        lines.append(f"adapters of other parts are not in the folder: {maps}")
    if learned := sorted({p.split("/")[0] for p in own if not lora.is_adapter(p)}):
        lines.append(
            f"the run also trained {', '.join(learned)}, which PEFT has no place for: the folder has only the language "
            "model's adapters. `convert merge` writes the whole model"
        )
    held = description["model"].get("base", "float32")
    if held != "float32":
        lines.append(f"the run held its base in {held}: logits over a base in another type differ by its rounding")
    if not written[peft_config.NAME]:
        lines.append(f"{peft_config.NAME} is not set: pass --base-model with the id or folder of the base")
    return lines


def _record(src: Path, description: dict, lines: list[str]) -> dict[str, Any]:
    """Return what `from-peft` needs in addition: digest of the base, origin, and preparation of scans and texts."""
    record = {checkpoint.BASE: description[checkpoint.BASE]["sha256"]}
    if origin := stored.origin_of(src):
        record[stored.ORIGIN] = origin
    return record | inherited.preparation(src, description, lines)
