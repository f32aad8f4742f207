"""An exported RadFM as weights: the folder of `to-hf`, or one that transformers saved again."""

from __future__ import annotations

from input_pipeline.files import read_json
from radfm_jax.convert import model_config, table, vision_tables
from radfm_jax.convert.families import FAMILIES
from radfm_jax.convert.hub import config as hub_config
from radfm_jax.convert.hub import table as hub_table
from radfm_jax.convert.report import NO_PROGRESS, Progress
from radfm_jax.convert.weights import Weights
from radfm_jax.models.encoders.slices import SliceConfig

TIED_HEAD = f"{hub_table.LANGUAGE_MODEL}lm_head.weight"


def is_export(path) -> bool:
    """Return whether a folder, or the folder of a weight file, is an exported RadFM with code for transformers."""
    config = model_config.config_next_to(path) if path is not None else None
    return config is not None and config.name == "config.json" and hub_config.is_export(read_json(config))


class HubModel(Weights):
    """The weights of an exported RadFM."""

    part = "radfm"

    def __init__(self, src, *, dtype: str | None = None, verify: bool = True, progress: Progress = NO_PROGRESS):
        super().__init__(src, verify=verify, progress=progress)
        try:
            path = self.folder / "config.json"
            self.user_config = read_json(path, kind=dict)
            self.config = hub_config.read_config(self.user_config, path)
            self.hf_config = dict(self.user_config["text_config"])
            self.sizes = self.config.to_dict()
            self.remark = f"; sizes are those of {path}"
            fused = FAMILIES[self.hf_config["model_type"]].fused
            self.entries = hub_table.entries(self.config, fused=fused)
            names = {name: self._table_name(name) for name in self.reader.infos}
            self.sources = {e.name: e.name for e in self.entries} | {
                plain: name for name, plain in names.items() if plain is not None
            }
            self.tied_head = TIED_HEAD if self.config.llama.tied_head and TIED_HEAD in self.reader.infos else None
            others = {name for name, plain in names.items() if plain is None}
            if self.tied_head:
                del self.sources[TIED_HEAD]
                others.add(TIED_HEAD)
            self.match(table.param_shapes(self.config), dtype, others)
            self.unused = []  # no tensors of a released file
        except BaseException:
            self.reader.close()
            raise

    def _table_name(self, name: str) -> str | None:
        """Return the name of a file's tensor in the table, or None if the model does not read it.

        transformers saves an encoder with other prefixes than it may have had.
        """
        if isinstance(self.config.vision, SliceConfig) and name.startswith(hub_table.ENCODER):
            plain = vision_tables.local_name(self.config.vision.kind, name.removeprefix(hub_table.ENCODER))
            return None if plain is None else hub_table.ENCODER + plain
        return name

    def compare_copies(self) -> None:
        embedding = f"{hub_table.LANGUAGE_MODEL}model.embed_tokens.weight"
        if self.tied_head and not self.equal(embedding, self.tied_head):
            self.problems.append(f"{self.tied_head} differs from {embedding}, although the config ties them")
