"""PyTorch weights matched against the conversion table: sizes, names, dtypes, and a list of all problems."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import diagnosis, llama_config, model_config, table
from radfm_jax.convert.report import NO_PROGRESS, Progress
from radfm_jax.convert.tensor_files import TensorReader, open_tensors
from radfm_jax.models.decoder import rope_frequencies
from radfm_jax.models.radfm import RadFMConfig

BLOCK_BYTES = 256 * 2**20
COMMANDS = {"radfm": "from-torch", "llama": "from-llama"}
EMBEDDINGS = (table.EMBEDDING_ALIAS, table.EMBEDDING, "model.embed_tokens.weight")  # names of the embedding
VOCABULARY = ("llama/embedding", "llama/head")  # parameters with a row or column per token


class TorchModel(contextlib.AbstractContextManager):
    """A file or folder of PyTorch weights, matched against the table. Use as a context manager.

    `check` raises one ValueError that lists every problem; `slices` yields the parameters.
    """

    part: str  # `radfm` (released names) or `llama` (a Hugging Face folder)
    config: RadFMConfig  # for part `llama` only `config.llama` is meaningful
    shapes: dict[str, tuple[tuple[int, ...], np.dtype]]  # by parameter path
    unused: list[str]  # names of tensors that the model does not read, including the buffers of transformers 4.28
    notes: list[str]  # lines for the report

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
        self.src = Path(src)
        self.folder = self.src if self.src.is_dir() else self.src.parent
        self.reader: TensorReader = open_tensors(self.src, verify=verify, progress=progress.advance)
        self.notes, self.problems = [], []
        try:
            self._rename()
            self.part = diagnosis.part_of(self.reader.infos)
            if part not in (None, self.part):
                alone = " (a language model alone)" if self.part == "llama" else ""
                raise ValueError(f"{src} has the tensors of a {self.part}{alone}: use `{COMMANDS[self.part]}`")
            path = model_config.config_next_to(self.src) if config is None else None
            self.user_config = model_config.read_config(path) if path is not None else config
            self.config = self._sizes(path)
            self.rows = self.config.llama.vocab_size  # number of rows in the file
            if vocabulary is not None:
                self._trim(vocabulary)
            self.entries = table.entries(self.config, self.part)
            self._match()
            self._check_rotary()
            self.shapes = self._param_shapes(np.dtype(checkpoint.DTYPES[dtype]) if dtype else None)
        except BaseException:
            self.reader.close()
            raise

    def __exit__(self, *exception) -> None:
        self.reader.close()

    def _rename(self) -> None:
        """Remove the prefixes of wrappers from the names of the tensors."""
        if not self.reader.infos:
            raise ValueError(f"{self.src} has no tensors: save model.state_dict()")
        if empty := [name for name, info in self.reader.infos.items() if 0 in info.shape]:
            listed = ", ".join(empty[:3]) + (", ..." if len(empty) > 3 else "")
            raise ValueError(
                f"{self.src} has {len(empty)} tensors without values ({listed}): it was saved without its weights, "
                "as by DeepSpeed's ZeRO-3, or is damaged"
            )
        try:
            names = diagnosis.plain_names(self.reader.infos)
        except ValueError as e:
            raise ValueError(f"{self.src} {e}") from None
        if renamed := {name: plain for name, plain in names.items() if name != plain}:
            first = next(iter(renamed))
            self.notes.append(f"renamed {len(renamed)} tensors: prefixes removed, as in {first} -> {renamed[first]}")
            self.reader.rename(names)

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
        return RadFMConfig(llama=llama_config.llama_from_hf(self.user_config, where))

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

    def _match(self) -> None:
        """Find the tensor of every table entry, and list those that are missing, unexpected or of another shape."""
        infos = self.reader.infos
        # A released file has the embedding twice. Either name is enough.
        self.sources = {e.name: e.name for e in self.entries}
        alias = table.EMBEDDING_ALIAS if self.part == "radfm" else None
        if alias in infos:
            self.sources[table.EMBEDDING] = alias
            if table.EMBEDDING not in infos:
                self.notes.append(f"{table.EMBEDDING} is absent; read its other name {alias} instead")
        elif alias and table.EMBEDDING in infos:
            self.notes.append(f"{alias} is absent; read its other name {table.EMBEDDING} instead")
        known = {*self.sources, *self.sources.values()}
        # The state dict of a model with a tied head also has the embedding under the name of the head.
        heads = [n for n in ("lm_head.weight", "lang_model.lm_head.weight") if n in infos]
        self.tied_head = heads[0] if heads and self.config.llama.tied_head else None
        others = [name for name in infos if name not in known and name != self.tied_head]
        self.unused = [name for name in others if table.UNUSED.fullmatch(name) or table.is_buffer(name)]
        unexpected = [name for name in others if name not in set(self.unused)]
        self.problems += [f"unexpected: {name} {infos[name].shape}" for name in unexpected]
        absent = [e for e in self.entries if self.source(e) not in infos]
        self.problems += [f"missing: {e.name} {self._shape_in_file(e)}" for e in absent]
        for name, e in ((self.source(e), e) for e in self.entries if self.source(e) in infos):
            info, expected = infos[name], self._shape_in_file(e)
            if info.shape != expected:
                self.problems.append(f"shape of {name}: {info.shape}, expected {expected}")
            elif info.dtype.name not in (*checkpoint.DTYPES, "float64"):
                self.problems.append(f"dtype of {name}: {info.dtype} is not a float of 16, 32 or 64 bits")

    def _shape_in_file(self, entry: table.Entry) -> tuple[int, ...]:
        return (self.rows, *entry.torch_shape[1:]) if entry.path in VOCABULARY else entry.torch_shape

    def _stop(self, entry: table.Entry) -> int | None:
        """Return the number of rows to read of a tensor; None for all."""
        vocabulary = self.config.llama.vocab_size
        return vocabulary if entry.path in VOCABULARY and vocabulary < self.rows else None

    def source(self, entry: table.Entry) -> str:
        """Return the name of a table entry's tensor in the file."""
        return self.sources[entry.name]

    def _param_shapes(self, dtype: np.dtype | None) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        stored: dict[str, set] = {}
        for e in self.entries:
            if info := self.reader.infos.get(self.source(e)):
                stored.setdefault(e.path, set()).add(info.dtype)
        doubles = [path for path, dtypes in stored.items() if np.dtype(np.float64) in dtypes]
        if doubles and dtype is None:
            self.problems.append(f"{len(doubles)} parameters are float64 ({doubles[0]}, ...): pass --dtype float32")
        for path, dtypes in stored.items():
            if len(dtypes) > 1 and dtype is None:
                self.problems.append(f"layers of {path} are {' and '.join(sorted(map(str, dtypes)))}: pass --dtype")
        chosen = {path: dtype or min(dtypes, key=str) for path, dtypes in stored.items()}
        shapes = table.param_shapes(self.config, self.part)
        return {path: (shape, chosen.get(path, np.dtype(np.float32))) for path, shape in shapes.items()}

    def check(self) -> None:
        """Raise ValueError listing every tensor that is missing, unexpected, misshapen or not finite.

        Values are read only if names or shapes are wrong, to report all problems at once. Otherwise `slices` reports
        non-finite values during conversion.
        """
        if self.problems:
            for e in self.entries:
                name = self.source(e)
                if name in self.reader.infos and not all(np.isfinite(b).all() for _, b in self._blocks(name)):
                    self.problems.append(f"not finite: {name}")
            raise self.error()

    def error(self) -> ValueError:
        from_config = "; sizes are those of --config" if self.user_config and "model" in self.user_config else ""
        lines = "\n  ".join(dict.fromkeys(self.problems))
        return ValueError(f"{self.src} cannot be converted, nothing was written{from_config}:\n  {lines}")

    def slices(self, progress: Progress = NO_PROGRESS) -> Iterator[tuple[str, tuple, np.ndarray]]:
        """Yield (parameter path, index, value) for every part of every parameter, in the stored dtype.

        Raises:
          ValueError: at the end, with every tensor that is not finite, or not finite in a narrower dtype.
        """
        for e in self.entries:
            name, (_, dtype) = self.source(e), self.shapes[e.path]
            for rows, block in self._blocks(name, split=e.layer is None, stop=self._stop(e)):
                with np.errstate(over="ignore"):  # an overflow is reported below, with the tensor's name
                    value = e.to_ours(block).astype(dtype, copy=False)
                if not np.isfinite(value).all():
                    suffix = f" as {dtype}" if np.isfinite(block).all() else ""
                    self.problems.append(f"not finite{suffix}: {name}")
                yield e.path, e.index or e.row_index(rows), value
                progress.advance(block.nbytes)
        self._compare_copies()
        if self.problems:
            raise self.error()

    def _compare_copies(self) -> None:
        """Compare tensors that a file may have under two names."""
        names = (table.EMBEDDING, table.EMBEDDING_ALIAS)
        if all(n in self.reader.infos for n in names) and not self._equal(*names):
            self.notes.append(f"{names[0]} and {names[1]} differ; read the second, as the released code does")
        if self.tied_head is not None:
            embedding = next(self.source(e) for e in self.entries if e.path == "llama/embedding")
            if not self._equal(embedding, self.tied_head):
                self.problems.append(f"{self.tied_head} differs from {embedding}, although the config ties them")

    def _equal(self, first: str, second: str) -> bool:
        infos, ties = self.reader.infos, self.reader.ties
        if ties.get(first, first) == ties.get(second, second):
            return True
        return infos[first] == infos[second] and all(
            np.array_equal(block, self.reader.read(second, (rows,))) for rows, block in self._blocks(first)
        )

    def _blocks(self, name: str, split: bool = True, stop: int | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield the rows up to `stop` in blocks: float32 embeddings of 128,000 x 8,192 take 4 GB at once."""
        info = self.reader.infos[name]
        if stop is None and (not split or info.nbytes <= BLOCK_BYTES or not info.shape):
            yield slice(None), self.reader.read(name)
            return
        stop = info.shape[0] if stop is None else stop
        step = max(1, BLOCK_BYTES * info.shape[0] // info.nbytes)
        for start in range(0, stop, step):
            rows = slice(start, min(start + step, stop))
            yield rows, self.reader.read(name, (rows,))
