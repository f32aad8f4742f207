"""A RadFM or a language model in PyTorch's form: names, sizes, and the tensors that a file may have twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from radfm_jax.convert import diagnosis, hf_config, model_config, table
from radfm_jax.convert.families import FAMILIES
from radfm_jax.convert.report import NO_PROGRESS, Progress
from radfm_jax.convert.weights import Weights
from radfm_jax.models.decoder import rope_frequencies
from radfm_jax.models.radfm import RadFMConfig

COMMANDS = {"radfm": "from-torch", "llama": "from-hf"}
EMBEDDINGS = (table.EMBEDDING_ALIAS, table.EMBEDDING, "model.embed_tokens.weight")  # names of the embedding
VOCABULARY = ("llama/embedding", "llama/head")  # parameters with a row or column per token


class TorchModel(Weights):
    """The weights of a RadFM (released names) or of a language model (a Hugging Face folder)."""

    config: RadFMConfig  # for part `llama` only `config.llama` is meaningful
    hf_config: dict | None  # config.json of the language model, if it is one of Hugging Face

    def __init__(
        self,
        src,
        *,
        part: str | None = None,  # what the tensors must be; None: either
        config: dict | None = None,  # from model_config.read_config; None: read the file next to `src`
        vocabulary: int | None = None,  # rows of the vocabulary to keep; None: all
        dtype=None,
        verify=True,
        progress: Progress = NO_PROGRESS,
    ):
        super().__init__(src, verify=verify, progress=progress)
        try:
            others = self._rename()
            self.part = diagnosis.part_of(self.reader.infos)
            if part not in (None, self.part):
                alone = " (a language model alone)" if self.part == "llama" else ""
                raise ValueError(f"{src} has the tensors of a {self.part}{alone}: use `{COMMANDS[self.part]}`")
            path = model_config.config_next_to(self.src) if config is None else None
            self.user_config = model_config.read_config(path) if path is not None else config
            if self.user_config and "model" in self.user_config:
                self.remark = "; sizes are those of --config"
            self.hf_config = None
            self.config = self._sizes(path)
            self.rows = self.config.llama.vocab_size  # number of rows in the file
            if vocabulary is not None:
                self._trim(vocabulary)
            sizes = self.config.to_dict()
            self.sizes = sizes if self.part == "radfm" else {"llama": sizes["llama"]}
            self._match(others, dtype)
            self._check_rotary()
        except BaseException:
            self.reader.close()
            raise

    def _rename(self) -> set[str]:
        """Remove the prefixes of wrappers from the tensors' names. Return the names of parts that are not read."""
        try:
            names, others = diagnosis.plain_names(self.reader.infos)
        except ValueError as e:
            raise ValueError(f"{self.src} {e}") from None
        if renamed := {name: plain for name, plain in names.items() if name != plain}:
            first = next(iter(renamed))
            self.notes.append(f"renamed {len(renamed)} tensors: prefixes removed, as in {first} -> {renamed[first]}")
            self.reader.rename(names)
        if others:
            modules = ", ".join(sorted({diagnosis.module_of(name) for name in others}))
            self.notes.append(f"{len(others)} tensors of other parts were not read: {modules}")
        return others

    def _sizes(self, config_path: Path | None) -> RadFMConfig:
        where = config_path or self.src
        if self.part == "radfm":
            shapes = {name: info.shape for name, info in self.reader.infos.items()}
            sizes = model_config.radfm_from_shapes(shapes, self.user_config, self.src)
            if not (self.user_config and "model" in self.user_config):
                self.notes.append("heads, patch and other sizes that tensor shapes do not give are the released ones")
            return sizes
        if self.user_config is None:
            raise ValueError(f"{self.folder} has no config.json: pass that of the language model with --config")
        if "model" in self.user_config:
            return model_config.radfm_from_model(self.user_config["model"], where, ("llama",))
        self.hf_config = hf_config.language_model(self.user_config, where)
        return RadFMConfig(llama=hf_config.decoder_from_hf(self.hf_config, where))

    def _trim(self, vocabulary: int) -> None:
        """Keep the first rows of the vocabulary."""
        shapes = [self.reader.infos[n].shape for n in EMBEDDINGS if n in self.reader.infos]
        self.rows = shapes[0][0] if shapes and shapes[0] else self.rows
        if vocabulary > self.rows:
            raise ValueError(f"{self.src}: the embedding has {self.rows:,} rows, the tokenizer {vocabulary:,} pieces")
        if vocabulary < self.rows:
            self.notes.append(f"dropped rows {vocabulary:,} to {self.rows - 1:,} of the vocabulary (--trim-vocabulary)")
        self.config = dataclasses.replace(
            self.config, llama=dataclasses.replace(self.config.llama, vocab_size=vocabulary)
        )

    def _check_rotary(self) -> None:
        """Report rotary buffers whose base differs from that of the config. Shapes do not show the base."""
        llama = self.config.llama
        allowed = [rope_frequencies(c) for c in (llama, dataclasses.replace(llama, rope_scaling=None))]
        for name in filter(table.ROTARY.fullmatch, self.reader.infos):
            values = self.reader.read(name).astype(np.float64)
            # Buffers may be stored in 16 bits. The rounding is much smaller than the effect of another base.
            if not any(x.shape == values.shape and np.allclose(values, x, rtol=1e-2, atol=1e-7) for x in allowed):
                self.problems.append(f"{name} does not fit rope_theta {llama.rope_theta:g} of the config")
                return  # all layers have the same

    def _match(self, others: set[str], dtype: str | None) -> None:
        """Match the tensors of the table. A released file has the embedding twice; either name is enough."""
        infos = self.reader.infos
        fused = self.hf_config is not None and FAMILIES[self.hf_config["model_type"]].fused
        self.entries = table.entries(self.config, self.part, fused=fused)
        self.sources = {e.name: e.name for e in self.entries}
        alias = table.EMBEDDING_ALIAS if self.part == "radfm" else None
        if alias in infos:
            self.sources[table.EMBEDDING] = alias
            if table.EMBEDDING not in infos:
                self.notes.append(f"{table.EMBEDDING} is absent; read its other name {alias} instead")
        elif alias and table.EMBEDDING in infos:
            self.notes.append(f"{alias} is absent; read its other name {table.EMBEDDING} instead")
        # The state dict of a model with a tied head also has the embedding under the name of the head.
        heads = [n for n in ("lm_head.weight", "lang_model.lm_head.weight") if n in infos]
        self.tied_head = heads[0] if heads and self.config.llama.tied_head else None
        copies = {name for name in (table.EMBEDDING if alias else None, self.tied_head) if name is not None}
        unused = {name for name in infos if table.UNUSED.fullmatch(name) or table.is_buffer(name)}
        self.match(table.param_shapes(self.config, self.part), dtype, unused | others | copies)
        self.unused = [name for name in self.unused if name in unused]

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = super()._expected_shapes()
        vocabulary = {e.name for e in self.entries if e.path in VOCABULARY}
        return {name: (self.rows, *shape[1:]) if name in vocabulary else shape for name, shape in shapes.items()}

    def compare_copies(self) -> None:
        names = (table.EMBEDDING, table.EMBEDDING_ALIAS)
        if all(n in self.reader.infos for n in names) and not self.equal(*names):
            self.notes.append(f"{names[0]} and {names[1]} differ; read the second, as the released code does")
        if self.tied_head is not None:
            embedding = next(self.source(e) for e in self.entries if e.path == "llama/embedding")
            if not self.equal(embedding, self.tied_head):
                self.problems.append(f"{self.tied_head} differs from {embedding}, although the config ties them")
