"""The four conversions. Each reads one tensor (or a block of its rows) at a time and writes it at once."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from radfm_jax.checkpoints import checkpoint
from radfm_jax.convert import model_config, table
from radfm_jax.convert.model_card import model_card
from radfm_jax.convert.tensor_files import TensorInfo, TensorReader, open_tensors, write_safetensors, write_torch_bin
from radfm_jax.models.radfm import RadFMConfig

BLOCK_BYTES = 256 * 2**20


class Progress:
    """Hears how far a conversion is, in bytes; this one tells nobody."""

    def stage(self, name: str, total: int | None) -> None:
        """A new stage begins; `total` is None where nobody knows it yet."""

    def advance(self, done: int) -> None:
        """So many bytes more are done."""


SILENT = Progress()


@dataclasses.dataclass
class Report:
    """What a conversion did; `lines` are for people."""

    parameters: int = 0
    bytes: int = 0
    dtypes: tuple[str, ...] = ()
    lines: list[str] = dataclasses.field(default_factory=list)


# --- PyTorch -> Orbax -------------------------------------------------------------------------------------------------


class TorchModel:
    """A file or folder of PyTorch weights, matched against the table: which tensor is which parameter.

    Use as a context manager. `check` raises one ValueError with everything that is wrong; `slices` yields the
    parameters.

    Attributes:
      part: `radfm` (released names) or `llama` (a Hugging Face folder).
      config: the sizes; of a `llama` only `config.llama` means anything.
      unused: names of tensors that no part of the model reads, buffers of transformers 4.28 included.
    """

    def __init__(self, src, *, config: dict | None = None, dtype=None, verify=True, progress: Progress = SILENT):
        self.src = Path(src)
        self.reader: TensorReader = open_tensors(self.src, verify=verify, progress=progress.advance)
        self.dtype = np.dtype(checkpoint.DTYPES[dtype]) if dtype else None
        self.notes: list[str] = []
        try:
            self.given = config if config is not None else self._config_beside()
            self._match(self.given)
        except BaseException:
            self.reader.close()
            raise

    def __enter__(self) -> TorchModel:
        return self

    def __exit__(self, *exception) -> None:
        self.reader.close()

    @property
    def folder(self) -> Path:
        return self.src if self.src.is_dir() else self.src.parent

    def _config_beside(self) -> dict | None:
        path = self.folder / "config.json"
        return model_config.read_config(path) if path.is_file() else None

    def _match(self, given: dict | None) -> None:
        infos = self.reader.infos
        shapes = {name: info.shape for name, info in infos.items()}
        self.part = "llama" if "model.embed_tokens.weight" in infos else "radfm"
        if self.part == "llama":
            if given is None:
                raise ValueError(f"{self.folder} has no config.json: pass the language model's with --config")
            where = self.folder / "config.json"
            self.config = (
                RadFMConfig.from_dict(given["model"])
                if "model" in given
                else RadFMConfig(llama=model_config.llama_from_hf(given, where))
            )
        else:
            self.config = model_config.radfm_from_shapes(shapes, given, self.src)
        self.entries = table.entries(self.config, self.part)
        # The released file has the embedding twice; where a file kept one of the two names, either will do.
        self.sources = {e.name: e.name for e in self.entries}
        alias = table.EMBEDDING_ALIAS if self.part == "radfm" else None
        if alias in infos:
            self.sources[table.EMBEDDING] = alias
            if table.EMBEDDING not in infos:
                self.notes.append(f"{table.EMBEDDING} is absent; its other name {alias} was read")
        elif alias and table.EMBEDDING in infos:
            self.notes.append(f"{alias} is absent; its other name {table.EMBEDDING} was read")
        known = {*self.sources, *self.sources.values()}
        # state_dict() of a model with a tied head has the embedding under the head's name too.
        self.tied_head = next((n for n in ("lm_head.weight", "lang_model.lm_head.weight") if n in infos), None)
        if self.config.llama.tied_head and self.tied_head:
            known.add(self.tied_head)
        else:
            self.tied_head = None
        others = [name for name in infos if name not in known]
        self.unused = [name for name in others if table.UNUSED.fullmatch(name) or table.is_buffer(name)]
        self.problems = [f"unexpected: {name} {shapes[name]}" for name in others if name not in set(self.unused)]
        self.problems += [f"missing: {e.name} {e.torch_shape}" for e in self.entries if self.source(e) not in infos]
        for e in self.entries:
            info = infos.get(self.source(e))
            if info is not None and info.shape != e.torch_shape:
                self.problems.append(f"shape of {self.source(e)}: {info.shape}, expected {e.torch_shape}")
            elif info is not None and info.dtype.name not in checkpoint.DTYPES:
                self.problems.append(f"dtype of {self.source(e)}: {info.dtype} is not a float of 16 or 32 bits")
        self.shapes = self._param_shapes()

    def source(self, entry: table.Entry) -> str:
        return self.sources[entry.name]

    def _param_shapes(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        dtypes: dict[str, set] = {}
        for e in self.entries:
            info = self.reader.infos.get(self.source(e))
            if info is not None:
                dtypes.setdefault(e.path, set()).add(info.dtype)
        for path, several in dtypes.items():
            if len(several) > 1 and self.dtype is None:
                self.problems.append(f"layers of {path} are {' and '.join(sorted(map(str, several)))}: pass --dtype")
        found = {path: self.dtype or min(several, key=str) for path, several in dtypes.items()}
        shapes = table.param_shapes(self.config, self.part)
        return {path: (shape, found.get(path, np.dtype(np.float32))) for path, shape in shapes.items()}

    def check(self) -> None:
        """Raises ValueError listing every tensor that is missing, unexpected, misshapen or not finite.

        Reads values only if something else is wrong already: otherwise `slices` finds what is not finite on its way.
        """
        if self.problems:
            for e in self.entries:
                name = self.source(e)
                if name in self.reader.infos and not all(np.isfinite(b).all() for _, b in self._blocks(name)):
                    self.problems.append(f"not finite: {name}")
            raise self.error()

    def error(self) -> ValueError:
        sizes_from = "; the sizes are those of --config" if self.given and "model" in self.given else ""
        return ValueError(
            f"{self.src} cannot be converted, nothing was written{sizes_from}:\n  " + "\n  ".join(self.problems)
        )

    def slices(self, progress: Progress = SILENT) -> Iterator[tuple[str, tuple, np.ndarray]]:
        """Yields (parameter path, index, value) for every part of every parameter, in the stored dtype.

        Raises ValueError at the end listing every tensor that is not finite (or became so in a narrower dtype).
        """
        for e in self.entries:
            name, (_, dtype) = self.source(e), self.shapes[e.path]
            for rows, block in self._blocks(name, whole=e.layer is not None):
                with np.errstate(over="ignore"):  # an overflow is found below, with its name
                    value = e.to_ours(block).astype(dtype, copy=False)
                if not np.isfinite(value).all():
                    fit = "" if not np.isfinite(block).all() else f" as {dtype}"
                    self.problems.append(f"not finite{fit}: {name}")
                yield e.path, e.index or e.row_index(rows), value
                progress.advance(block.nbytes)
        self._check_alias()
        self._check_tied_head()
        if self.problems:
            self.problems = list(dict.fromkeys(self.problems))
            raise self.error()

    def _check_alias(self) -> None:
        names = (table.EMBEDDING, table.EMBEDDING_ALIAS)
        if all(n in self.reader.infos for n in names) and not self._equal(*names):
            self.notes.append(f"{names[0]} and {names[1]} differ; the second was read, as the released code does")

    def _check_tied_head(self) -> None:
        if self.tied_head is not None:
            embedding = next(self.source(e) for e in self.entries if e.path == "llama/embedding")
            if not self._equal(embedding, self.tied_head):
                self.problems.append(f"{self.tied_head} differs from {embedding}, although the config ties them")

    def _equal(self, one: str, other: str) -> bool:
        infos, ties = self.reader.infos, self.reader.ties
        if ties.get(one, one) == ties.get(other, other):
            return True
        return infos[one] == infos[other] and all(
            np.array_equal(a, self.reader.read(other, (rows,))) for rows, a in self._blocks(one)
        )

    def _blocks(self, name: str, whole: bool = False) -> Iterator[tuple[slice, np.ndarray]]:
        """A tensor in blocks of rows: a vocabulary of 128,000 x 8,192 float32 would alone be 4 GB."""
        info = self.reader.infos[name]
        if whole or info.nbytes <= BLOCK_BYTES or not info.shape:
            yield slice(None), self.reader.read(name)
            return
        step = max(1, BLOCK_BYTES * info.shape[0] // info.nbytes)
        for start in range(0, info.shape[0], step):
            rows = slice(start, min(start + step, info.shape[0]))
            yield rows, self.reader.read(name, (rows,))


def from_torch(
    src,
    dst,
    *,
    part: str = "radfm",
    config: dict | None = None,
    tokenizer=None,
    unused: str = "drop",
    dtype: str | None = None,
    verify: bool = True,
    progress: Progress = SILENT,
) -> Report:
    """PyTorch weights -> a checkpoint directory.

    Args:
      src: `.bin`, the published zip, safetensors, or a folder.
      dst: the directory to make.
      part: what `src` must be: `radfm`, or `llama` for a Hugging Face LLaMA folder.
      config: as `sizes.read_config` returns it, where sizes cannot be read off the file.
      tokenizer: SentencePiece model; by default `tokenizer.model` beside `src`.
      unused: `keep` stores tensors that the model never reads, `drop` their names and shapes only.
      dtype: float32, bfloat16 or float16; None keeps what the file has.
      verify: check the file's CRCs first.
    Raises:
      ValueError: everything that is wrong with the input, in one message; `dst` then does not exist.
    """
    if Path(dst).exists():
        raise ValueError(f"{dst} exists: choose another name or remove it first")
    if tokenizer and not Path(tokenizer).is_file():
        raise ValueError(f"tokenizer {tokenizer} does not exist")
    progress.stage("opening", None)
    with TorchModel(src, config=config, dtype=dtype, verify=verify, progress=progress) as model:
        if model.part != part:
            command = {"radfm": "from-torch", "llama": "from-llama"}[model.part]
            raise ValueError(f"{src} holds the tensors of a {model.part}: use `{command}`")
        model.check()
        infos = model.reader.infos
        kept = {n: infos[n] for n in model.unused} if unused == "keep" else {}
        size = checkpoint.bytes_of(model.shapes) + sum(i.nbytes for i in kept.values())
        checkpoint.require_space(dst, size + size // 50, f"converting {src}")
        vocabulary = Path(tokenizer) if tokenizer else model.folder / checkpoint.TOKENIZER
        if tokenizer or vocabulary.is_file():
            check_tokenizer(vocabulary, model.config.llama.vocab_size)
        read = [*(infos[model.source(e)] for e in model.entries), *kept.values()]
        progress.stage("converting", sum(info.nbytes for info in read))
        with checkpoint.new_directory(dst) as directory:
            stacked = {e.path for e in model.entries if e.layer is not None}
            writer = checkpoint.ParamWriter(directory, model.shapes, stacked)
            for path, index, value in model.slices(progress):
                writer.write(path, value, index)
            if kept:
                more = {"max_shard_bytes": size + 1, "basename": "unused", "progress": progress.advance}  # one file
                write_safetensors(directory, kept, model.reader.read, **more)
            for name in checkpoint.TOKENIZERS if part == "llama" else ():
                if (model.folder / name).is_file():
                    shutil.copyfile(model.folder / name, directory / name)
            if vocabulary.is_file():
                shutil.copyfile(vocabulary, directory / checkpoint.TOKENIZER)
            sizes_of = model.config.to_dict() if part == "radfm" else {"llama": model.config.to_dict()["llama"]}
            dropped = {} if kept else {n: [list(infos[n].shape), infos[n].dtype.name] for n in model.unused}
            checkpoint.write_description(
                directory,
                part,
                sizes_of,
                source={
                    "file": model.src.name,
                    "unused": dropped,
                    "config": model.given if part == "llama" and "model" not in model.given else None,
                },
            )
            progress.stage("hashing", None)
        return _report_from(model, kept, vocabulary)


def check_tokenizer(path: Path, vocab_size: int) -> None:
    """Raises ValueError unless `path` is a SentencePiece model of `vocab_size` pieces."""
    import sentencepiece

    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()
    except (OSError, RuntimeError) as e:
        raise ValueError(f"{path} is not a SentencePiece model: {e}") from None
    if pieces != vocab_size:
        raise ValueError(
            f"vocabulary of {path} is {pieces}, but the embedding has {vocab_size} rows: pass the model's own"
        )


def _report_from(model: TorchModel, kept: dict, vocabulary: Path) -> Report:
    infos = model.reader.infos
    report = Report(
        parameters=sum(int(np.prod(shape, dtype=np.int64)) for shape, _ in model.shapes.values()),
        bytes=checkpoint.bytes_of(model.shapes),
        dtypes=tuple(sorted({np.dtype(d).name for _, d in model.shapes.values()})),
        lines=list(model.notes),
    )
    buffers = [n for n in model.unused if table.is_buffer(n)]
    rest = [n for n in model.unused if not table.is_buffer(n)]
    if rest:
        count = sum(int(np.prod(infos[n].shape, dtype=np.int64)) for n in rest)
        modules = ", ".join(sorted({table.UNUSED.fullmatch(n)[1] for n in rest}))
        what = "kept beside the parameters" if kept else "dropped (--unused keep stores them)"
        report.lines.append(f"{len(rest)} tensors ({count:,} numbers) that RadFM never uses were {what}: {modules}")
    if buffers:
        report.lines.append(f"{len(buffers)} buffers of transformers 4.28 are computed, not learned")
    if model.reader.ties:
        report.lines.append("tied: " + ", ".join(f"{a} = {b}" for a, b in model.reader.ties.items()))
    if not vocabulary.is_file():
        report.lines.append(
            f"no tokenizer: put the SentencePiece model beside the source as {checkpoint.TOKENIZER} or pass it with "
            "--tokenizer, if text is to go through this checkpoint"
        )
    return report


# --- Orbax -> PyTorch -------------------------------------------------------------------------------------------------


def to_torch(
    src,
    dst,
    *,
    part: str = "radfm",
    layout: str = "4.28",
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    progress: Progress = SILENT,
) -> Report:
    """A checkpoint directory -> PyTorch weights.

    Args:
      dst: `x.bin` writes one file in torch's format; any other name a folder of safetensors, config.json, tokenizer and
        model card.
      part: `radfm` for the released names, `llama` for the language model alone in Hugging Face names (from either).
      layout: `4.28` adds the 41 buffers that the released code's strict load wants, `plain` leaves them out.
      dtype, progress: as in `from_torch`.
    Raises:
      ValueError: `src` is damaged or not a checkpoint, `dst` exists, too little space.
    """
    dst = Path(dst)
    if dst.suffix == ".safetensors":
        raise ValueError(f"{dst}: safetensors are written as a folder; name it without .safetensors")
    if dst.exists():
        raise ValueError(f"{dst} exists: choose another name or remove it first")
    progress.stage("verifying", None)
    checkpoint.verify(src)
    description = checkpoint.read_description(src)
    if part == "radfm":
        config = checkpoint.model_config(description, src)
    else:
        config = RadFMConfig.from_dict({"llama": description["model"]["llama"]})
    reader = checkpoint.ParamReader(src)
    entries = table.entries(config, part)
    found = {k: v for k, v in reader.shapes.items() if part == "radfm" or k.startswith("llama/")}
    checkpoint.check_shapes(table.param_shapes(config, part), found, src)
    wanted = np.dtype(checkpoint.DTYPES[dtype]) if dtype else None
    infos = {e.name: TensorInfo(e.torch_shape, wanted or np.dtype(reader.dtypes[e.path])) for e in entries}
    by_name = {e.name: e for e in entries}
    report = Report(parameters=sum(int(np.prod(s, dtype=np.int64)) for s in found.values()))
    extras: dict[str, Callable[[], np.ndarray]] = {}
    ties: dict[str, str] = {}
    with contextlib.ExitStack() as resources:
        if part == "radfm":
            infos[table.EMBEDDING_ALIAS] = infos[table.EMBEDDING]
            ties[table.EMBEDDING_ALIAS] = table.EMBEDDING
            more, extras, notes = released_extras(Path(src), description, config, layout, resources)
            infos |= more
            report.lines += notes

        def read(name: str) -> np.ndarray:
            if name in extras:
                return extras[name]()
            entry = by_name[ties.get(name, name)]
            value = entry.to_torch(reader.read(entry.path, entry.index))
            with np.errstate(over="ignore"):
                cast = value.astype(infos[name].dtype, copy=False)
            if not np.isfinite(cast).all():
                raise ValueError(f"{src}: {entry.path} is not finite as {infos[name].dtype} (tensor {name})")
            return cast

        # A folder cannot share one tensor between two names.
        as_bin = dst.suffix in (".bin", ".pt", ".pth")
        report.bytes = sum(info.nbytes for name, info in infos.items() if not (as_bin and name in ties))
        report.dtypes = tuple(sorted({infos[e.name].dtype.name for e in entries}))
        checkpoint.require_space(dst, report.bytes + report.bytes // 50, f"writing {dst}")
        progress.stage("converting", report.bytes)
        if as_bin:
            dst.parent.mkdir(parents=True, exist_ok=True)
            write_torch_bin(dst, infos, read, ties=ties, progress=progress.advance)
        else:
            hf = model_config.llama_to_hf(config.llama, report.dtypes[0], description.get("source", {}).get("config"))
            if part == "radfm":
                hf |= {"architectures": ["MultiLLaMAForCausalLM"], "model": config.to_dict()}
            with checkpoint.new_directory(dst, manifest=False) as folder:
                write_safetensors(folder, infos, read, max_shard_bytes=max_shard_bytes, progress=progress.advance)
                (folder / "config.json").write_text(json.dumps(hf, indent=2))
                (folder / "README.md").write_text(model_card(config, part, report.parameters))
                tokenizers = [p for n in checkpoint.TOKENIZERS if (p := Path(src) / n).is_file()]
                for path in tokenizers:
                    shutil.copyfile(path, folder / path.name)
                if not tokenizers:
                    report.lines.append("the checkpoint has no tokenizer, so the folder has none")
    return report


def released_extras(
    src: Path, description: dict, config: RadFMConfig, layout: str, resources: contextlib.ExitStack
) -> tuple[dict[str, TensorInfo], dict[str, Callable[[], np.ndarray]], list[str]]:
    """What the released class holds beyond the model's parameters: infos, a reader for each, and notes for people.

    Unused tensors come as they were kept, else as zeros; buffers as they were kept, else computed.
    """
    path, notes = src / checkpoint.UNUSED, []
    if path.is_file():
        kept = resources.enter_context(open_tensors(path))
        infos = dict(kept.infos)
        readers = {name: functools.partial(kept.read, name) for name in infos}
    else:
        shapes = description.get("source", {}).get("unused") or table.unused_shapes(config)
        infos = {n: TensorInfo(tuple(shape), np.dtype(dtype)) for n, (shape, dtype) in shapes.items()}
        readers = {n: functools.partial(np.zeros, info.shape, info.dtype) for n, info in infos.items()}
        notes.append(
            f"{sum(not table.is_buffer(n) for n in infos)} tensors of modules that RadFM never uses are not in the "
            "checkpoint and were filled with zeros (from-torch --unused keep stores the originals)"
        )
    tokens = infos[table.POSITION_IDS].shape[1] if table.POSITION_IDS in infos else 512
    wanted = table.buffers(config, tokens) if layout == "4.28" else {}
    stored = {n for n in infos if table.is_buffer(n)} if path.is_file() else set()
    for name in [n for n in infos if table.is_buffer(n) and (n not in stored or n not in wanted)]:
        del infos[name], readers[name]
    for name in wanted.keys() - stored:
        infos[name] = TensorInfo(wanted[name].shape, wanted[name].dtype)
        readers[name] = functools.partial(wanted.__getitem__, name)
    return infos, readers, notes
