"""Settings that a run copies from the checkpoint in `checkpoint.init_from`."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from pathlib import Path

from ml_collections import ConfigDict

from input_pipeline.field_rules import errors_of, plain_mapping
from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.inference import stored
from radfm_jax.models.computation import COMPUTE
from radfm_jax.models.radfm import PARTS, RadFMConfig
from radfm_jax.runtime import console

ROW_LIMITS = ("vision_rows", "patch_length", "planes", "scans")  # fields of DataConfig; Preparation has text_length


def follow_checkpoint(config: ConfigDict, overridden: Collection[str]) -> ConfigDict:
    """Return a config with the model, the tokenizer and the preparation of scans of `checkpoint.init_from`.

    A run that trained adapters sets `model.lora` and `model.base`, unless the config has adapters.

    A step of a training run also sets the sizes of a row. A language model alone sets only its own sizes and the
    tokenizer, a vision encoder alone its own sizes and the fields of `data` that it requires. If the directory does not
    exist, nothing changes.

    Args:
      overridden: fields that the command line sets, such as "model.llama.num_layers". They do not change.
    Raises:
      ValueError: the checkpoint is damaged, or does not record how its scans were prepared.
    """
    if not config.checkpoint.init_from or not Path(config.checkpoint.init_from).is_dir():
        return config
    directory = run_directory.select_checkpoint(config.checkpoint.init_from)
    description = checkpoint.read_description(directory)
    parts = {part: sizes for part, sizes in description["model"].items() if part in PARTS}
    followed = {f"model.{part}.{name}": x for part, sizes in parts.items() for name, x in sizes.items()}
    if description["part"] == "radfm":
        model = checkpoint.model_config(description, directory)
        preparation = dataclasses.asdict(stored.preparation_of(directory, model))
        if len(intensities := preparation.pop("intensities")) == 1:  # otherwise each source of the config needs its own
            preparation["intensity"] = intensities[0]
        followed |= {f"data.{name}": value for name, value in preparation.items()}
    elif fields := description["model"].get("vision"):
        vision = RadFMConfig.from_dict({"vision": fields, "perceiver": {"width": fields["width"]}}).vision
        followed |= {f"data.{name}": value for name, value in vision.data_fields.items()}
    if (directory / run_directory.RUN).is_file():
        with errors_of(directory / run_directory.RUN):
            config_of_run = plain_mapping(run_directory.read_run(directory).get("config"), "config")
            data = plain_mapping(config_of_run.get("data"), "config.data")
        followed |= {f"data.{name}": data[name] for name in ROW_LIMITS if name in data}
    if (tokenizer := checkpoint.tokenizer_path(directory)) is not None:
        followed["data.tokenizer"] = str(tokenizer)
        if tokenizer == directory:  # its vocabulary may be smaller than that of the model
            followed["data.vocab_size"] = description["model"]["llama"]["vocab_size"]
    with config.unlocked(), config.ignore_type():
        for part, sizes in parts.items():
            kind = getattr(getattr(RadFMConfig(), part), "kind", None)  # of files that do not have the field
            group = config.model[part]
            if sizes.get("kind", kind) != group.get("kind", kind):  # another network, with other fields
                config.model[part] = ConfigDict({name: group[name] for name in COMPUTE if name in group})
        for path, value in followed.items():
            *groups, name = path.split(".")
            group = config
            for part in groups:
                group = group[part]
            if path not in overridden and not any(path.startswith(f"{field}.") for field in overridden):
                group[name] = tuple(value) if isinstance(group.get(name), tuple) else value
        if (trained := description["model"].get("lora")) and config.model.lora is None:
            config.model.lora = ConfigDict(trained | {"targets": tuple(trained["targets"])})
            config.model.base = description["model"].get("base", config.model.base)
    console.log(f"model, tokenizer and preparation of scans are those of {directory}, unless an option sets them")
    return config
