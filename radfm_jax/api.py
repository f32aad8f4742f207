"""The Python interface: `model = radfm_jax.load(directory)`, then `model.answer("...", ["scan.nii.gz"])`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.files import nearest
from input_pipeline.text.tokenizer import Tokenizer, load_tokenizer, read_tokenizer_files
from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.inference import Answer, EncodedScans, Generator, Request, Sampling, inputs, require_answers, stored
from radfm_jax.inference.plain_rows import plain_rows
from radfm_jax.inference.stored import preparation_of
from radfm_jax.models import quantised, radfm
from radfm_jax.runtime import sharding

CHUNK = 8  # tokens per piece of a streamed answer


@dataclasses.dataclass(frozen=True)
class Model:
    """A RadFM model with its parameters."""

    config: radfm.RadFMConfig  # sizes and compute dtype (`config.with_compute(dtype="bfloat16")`)
    params: dict
    directory: Path | None = None  # the checkpoint it was loaded from; None for a model built in memory
    mesh: jax.sharding.Mesh | None = None  # the mesh of the parameters; None for one device
    tokenizer_file: Path | None = None  # file or folder (load_tokenizer), instead of that of the directory
    prepared: inputs.Preparation | None = None  # scan preparation; None: as stored in the checkpoint
    adapters: Mapping[str, Model] = dataclasses.field(default_factory=dict)  # of `with_adapters`
    base: Path | None = None  # the checkpoint with the parameters that `directory` refers to, if it has only adapters

    def __repr__(self) -> str:
        """Return a description with sizes and origin, without the weights."""
        count = sum(x.size for x in jax.tree.leaves(self.params))
        dtypes = ", ".join(sorted({str(x.dtype) for x in jax.tree.leaves(self.params)}))
        origin = "built in memory" if self.directory is None else f"from {str(self.directory)!r}"
        return f"Model({count:,} parameters in {dtypes}, {origin})"

    def answer(
        self,
        prompt: str,
        scans: Sequence[inputs.Scan] | EncodedScans = (),
        *,
        context: str = "",
        place: str = "first",
        system: str = "",
        history: Sequence[tuple[str, str]] = (),
        adapter: str = "",
        on_text: Callable[[str], None] | None = None,
        **options,
    ) -> str:
        """Return the answer to a question about scans.

            model.answer("Compare <image-2> with <image-1>. What is new?", ["old.png", "new.dcm"], max_new_tokens=80)

        Args:
          prompt: the question. `<image-1>` marks set the positions of scans; without marks all scans are at `place`.
          scans: paths (all formats of the pipeline), samples.Scan (a volume of a 4D file, a window), PIL images, or
            arrays (gray image [H, W], volume [H, W, D] or [H, W, D, C]; inputs.Scan describes the axes); or the result
            of `encode_scans`, for several questions about the same scans.
          context: clinical context, inserted before the prompt.
          place: position of scans without marks: `first` or `last`.
          system: how to answer.
          history: earlier questions and answers.
          adapter: name of one of `adapters`; "": this model itself.
          on_text: called with each new piece of the answer while it is generated.
          options: fields of inference.Sampling (max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed,
            stop, stop_ids).
        Warns:
          ScanNotice: a scan has doubtful contrast, shape or metadata.
        Raises:
          ValueError: a mark has no scan or a scan no mark, a scan cannot be read, the prompt is empty or too long,
            logits are not finite, or the checkpoint lacks its tokenizer or the preparation of its scans.
        """
        request = Request(prompt, scans, context, place, system, history, adapter)
        if on_text is None:
            return self.answers([request], **options)[0]
        text = ""
        for piece, answer in self._streamed(request, CHUNK, options):
            text = answer.text
            if piece:
                on_text(piece)
        return text

    def answers(self, requests: Sequence[Request | tuple], **options) -> list[str]:
        """Answer several questions in one batch, with the same results as `answer`.

        A request is an inference.Request or (prompt, scans). Question i is sampled with seed + i. Raises ValueError if
        any of them has no answer.
        """
        if invalid := [r for r in requests if not isinstance(r, Request | tuple)]:
            raise ValueError(f"{invalid[0]!r} is not a request: pass (prompt, scans) or a Request")
        requests = [r if isinstance(r, Request) else Request(*r) for r in requests]
        sampling = Sampling(**options)
        answers: dict[int, Answer] = {}
        for name in dict.fromkeys(r.adapter for r in requests):
            members = [i for i, r in enumerate(requests) if r.adapter == name]
            group, seeds = [requests[i] for i in members], [sampling.seed + i for i in members]
            generator = self._generator_for(name, group)
            answers |= dict(zip(members, generator.answers(group, sampling, seeds=seeds), strict=True))
        return [a.text for a in require_answers([answers[i] for i in range(len(requests))])]

    def stream(
        self,
        prompt: str,
        scans: Sequence[inputs.Scan] | EncodedScans = (),
        *,
        context: str = "",
        place: str = "first",
        system: str = "",
        history: Sequence[tuple[str, str]] = (),
        adapter: str = "",
        chunk: int = CHUNK,
        **options,
    ) -> Iterator[str]:
        """Yield the pieces of an answer: one after every `chunk` tokens, which may be empty."""
        request = Request(prompt, scans, context, place, system, history, adapter)
        for piece, _ in self._streamed(request, chunk, options):
            yield piece

    def _streamed(self, request: Request, chunk: int, options: dict) -> Iterator[tuple[str, Answer]]:
        sampling = Sampling(**options)
        generator = self._generator_for(request.adapter, [request])
        for pieces, answers in generator.stream([request], sampling, chunk=chunk):
            yield pieces[0], require_answers(answers)[0]

    def encode_scans(self, scans: Sequence[inputs.Scan], *, adapter: str = "") -> EncodedScans:
        """Return the visual tokens of scans, on the device. Pass them instead of the scans to any number of questions.

        In `released` mode all scans of one question get the same depth, so encode them together. `adapter` is that of
        the questions, which may have its own vision encoder and preparation.
        """
        model = self._adapted(adapter)
        _ = model.preparation
        return dataclasses.replace(model.generator.encode_scans(scans), adapter=adapter)

    def with_adapters(self, runs: Mapping[str, Path | str]) -> Model:
        """Return this model with what other runs learned on the same base, chosen by the `adapter` of a request.

            model = radfm_jax.load("radfm", weights="nf4").with_adapters({"chest": "runs/chest", "head": "runs/head"})
            model.answer("Describe the scan.", ["ct.nii.gz"], adapter="head")

        All of them share the arrays of the base, so each costs only the parameters that its run learned.

        Args:
          runs: name -> run or checkpoint that trained adapters.
        Raises:
          ValueError: a run has another base, holds it in another type, or cannot be read.
        """
        if "" in runs:
            raise ValueError(f'the adapter of {runs[""]} has the name "", which is this model itself: choose another')
        adapters = {name: _on_shared_base(self, Path(directory)) for name, directory in runs.items()}
        return dataclasses.replace(self, adapters=self.adapters | adapters)

    def _adapted(self, name: str) -> Model:
        if name and name not in self.adapters:
            known = ", ".join(self.adapters) or "none: see Model.with_adapters"
            raise ValueError(f"adapter {name!r} is unknown{nearest(name, self.adapters)}; adapters: {known}")
        return self.adapters[name] if name else self

    def _generator_for(self, adapter: str, requests: Sequence[Request]) -> Generator:
        """Return the generator of an adapter, or of this model.

        Raises ValueError if the tokenizer or the preparation is missing, or scans were encoded by another encoder.
        """
        model = self._adapted(adapter)
        _ = model.tokenizer, model.preparation if any(len(r.scans) for r in requests) else None
        for scans in (r.scans for r in requests if isinstance(r.scans, EncodedScans)):
            encoder = self._adapted(scans.adapter)
            if model.preparation != encoder.preparation or not _share_encoder(model, encoder):
                names = [repr(name) if name else "no adapter" for name in (scans.adapter, adapter)]
                raise ValueError(
                    f"the scans were encoded with {names[0]}, but {names[1]} has another vision encoder or preparation "
                    f"of scans: encode them with encode_scans(scans, adapter={adapter!r})"
                )
        return model.generator

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises ValueError if there is none."""
        path = self.tokenizer_file
        if path is None:
            if self.directory is None:
                raise ValueError("this model was built in memory and has no tokenizer: pass `tokenizer_file`")
            path = checkpoint.tokenizer_path(self.directory)
        if path is None:
            raise ValueError(
                f"{self.directory} has no {checkpoint.TOKENIZER} and no tokenizer.json: load it with tokenizer=FILE "
                "(command line: --tokenizer FILE), the SentencePiece model or the tokenizer.json of its decoder"
            )
        return load_tokenizer(path, vocab_size=self.config.llama.vocab_size)

    @functools.cached_property
    def preparation(self) -> inputs.Preparation:
        """Preparation of the scans. Raises ValueError if it is unknown."""
        if self.prepared is not None:
            return self.prepared
        if self.directory is None:
            raise ValueError("this model was built in memory and has no preparation of scans: pass `prepared`")
        return preparation_of(self.directory, self.config)

    @functools.cached_property
    def generator(self) -> Generator:
        tokenizer = preparation = None
        with contextlib.suppress(ValueError):  # raised when a request needs it
            tokenizer = self.tokenizer
        with contextlib.suppress(ValueError):
            preparation = self.preparation
        options = {} if preparation is None else {"preparation": preparation, "length": preparation.text_length}
        return Generator(self.config, self.params, tokenizer=tokenizer, mesh=self.mesh, **options)

    def logits(self, ids, vision=None, attention_mask=None) -> jax.Array:
        """Return the logits float32[B, L, V] of every position, in the layout of the released model.

        Args:
          ids: int[B, L]. Below V: text; V `<image>`, V + 1 `</image>`; V + 2 + 32 s + j: visual token j of scan s.
          vision: float[B, S, 3, H, W, D], values in [0, 1]; H and W multiples of 32, D of 4. None: no scans.
            Values far outside that range cause a warning: training used min-max scaled intensities.
          attention_mask: int or bool[B, L]; no token attends to one whose mask is 0.
        Raises:
          ValueError: ids are out of range, sizes do not match, or voxels are not finite.
        """
        return self.forward(ids, vision, attention_mask)[0]

    def forward(self, ids, vision=None, attention_mask=None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Return `logits` and a dict of intermediates.

        These are vit float[B, S, P, D] (patch tokens), perceiver float[B, S, 32, D], visual_tokens
        float[B, S, 32, E] and embeddings float[B, L, E] (text and scans fused). A sharded model runs on its own mesh.
        """
        c, ids = self.config, np.asarray(ids)
        if vision is None or np.shape(vision)[1:2] == (0,):
            # The network needs at least one scan; no token may refer to this placeholder.
            if ids.size and ids.max() >= c.llama.vocab_size + 2:
                raise ValueError(f"ids contain {ids.max()}, a visual token, but there is no scan: pass vision")
            vision = np.zeros((*ids.shape[:1], 1, c.vision.channels, *c.vision.scan_shape(1)), np.float32)
        vision = np.asarray(vision)
        bad = np.argwhere(~np.isfinite(vision).reshape(*vision.shape[:2], -1).all(-1)) if vision.ndim == 6 else []
        if len(bad):
            scans = ", ".join(f"scan {s} of sample {b}" for b, s in bad)
            raise ValueError(f"voxels are not finite in {scans}")
        if vision.size and (vision.min() < -0.5 or vision.max() > 1.5):
            warnings.warn(
                f"vision runs from {vision.min():g} to {vision.max():g}, the model expects [0, 1]: scale each scan",
                stacklevel=3,
            )
        batch = plain_rows(
            ids, vision, attention_mask, vocab_size=c.llama.vocab_size, num_latents=c.num_latents,
            patch=c.vision.patch, channels=c.vision.channels, tables=c.vision.tables,
            order=c.vision.patch_order,
        )  # fmt: skip
        with jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
            return _forward(c, self.params, batch)


def _share_encoder(model: Model, other: Model) -> bool:
    """Return whether two models have the same arrays of the vision encoder, the perceiver and the projection."""
    parts = [{k: x for k, x in m.params.items() if k not in ("llama", "image_marks")} for m in (model, other)]
    first, second = map(checkpoint.flatten, parts)
    return first.keys() == second.keys() and all(x is second[path] for path, x in first.items())


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, batch):
    return radfm.RadFM(config).apply({"params": params}, batch)


def load(
    directory,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    int8: bool = False,
    weights: str | None = None,
    base=None,
    mesh=None,
    verify: bool = True,
    tokenizer=None,
    prepared: inputs.Preparation | None = None,
) -> Model:
    """Load a checkpoint (from `python -m radfm_jax.convert`, training or `save`).

    A run that trained adapters is loaded together with its base.

    Args:
      directory: a checkpoint or a training run. Of a run, the best checkpoint is loaded, or the newest if none was
        evaluated.
      dtype: compute dtype of matrix products: float32 or bfloat16.
      param_dtype: dtype of the parameters; None: as stored.
      int8: the same as weights="int8".
      weights: how the decoder's weights are held: float32, bfloat16, int8 or nf4 (radfm_jax.models.quantised); None: as
        in the training of adapters, otherwise as stored.
      base: directory of the base of a run that trained adapters, if it is not where it was then.
      mesh: from `sharding.make_mesh`, to shard the parameters over; None: the first device.
      verify: check the SHA-256 of every file; False checks sizes only.
      tokenizer: SentencePiece model, tokenizer.json or a folder with one, for a checkpoint without a tokenizer.
      prepared: overrides the scan preparation stored in the checkpoint.
    Raises:
      ValueError: not a checkpoint, a damaged one, or not a complete RadFM.
    """
    for name in filter(None, (dtype, param_dtype)):
        if name not in checkpoint.DTYPES:
            raise ValueError(f"dtype {name!r} is unknown: choose one of {', '.join(checkpoint.DTYPES)}")
    if weights not in (None, *quantised.BASES):
        raise ValueError(f"weights {weights!r} is unknown: choose one of {', '.join(quantised.BASES)}")
    if int8 and weights not in (None, "int8"):
        raise ValueError(f"int8=True and weights={weights!r} contradict each other: pass one of them")
    if mesh is not None and mesh.axis_names != sharding.AXES:
        raise ValueError(f"mesh has axes {mesh.axis_names}, expected {sharding.AXES}: use sharding.make_mesh")
    if tokenizer is not None and not Path(tokenizer).exists():
        raise ValueError(f"tokenizer {tokenizer} does not exist: pass a SentencePiece model file or a tokenizer.json")
    directory = run_directory.select_checkpoint(directory)
    checkpoint.verify(directory, hashes=verify, allow_missing=() if tokenizer is None else checkpoint.TOKENIZERS)
    if (base := checkpoint.base_of(directory, base)) is not None:
        checkpoint.verify(base, hashes=verify)
    config = checkpoint.model_config(checkpoint.read_description(directory), directory)
    weights = "int8" if int8 else weights
    as_stored = config.base == "float32" and weights in (None, "int8")  # other than the matrices
    config = dataclasses.replace(config, base=weights or config.base)
    boxed = radfm.abstract_params(config)
    stored_params, leaves = checkpoint.StoredParams(directory, base), checkpoint.flatten(nn.unbox(boxed))
    fixed = quantised.quantised_shapes(leaves)
    for path, leaf in leaves.items():
        is_own = base is not None and stored_params.origins.get(path) != base  # learned in float32
        if path in stored_params.dtypes and path not in fixed and (as_stored or is_own or leaf.dtype != jnp.bfloat16):
            dtype_of_leaf = stored_params.dtypes[path] if param_dtype is None or is_own else param_dtype
            leaves[path] = jax.ShapeDtypeStruct(leaf.shape, dtype_of_leaf)
    shardings = sharding.param_shardings(boxed, mesh)[0] if mesh is not None else None
    params = checkpoint.restore_params(directory, checkpoint.unflatten(leaves), shardings, base)
    tokenizer = None if tokenizer is None else Path(tokenizer)
    return Model(config.with_compute(dtype=dtype), params, directory, mesh, tokenizer, prepared, base=base)


def _on_shared_base(model: Model, directory: Path) -> Model:
    """Return the model of a run that trained adapters, with the arrays of the base that `model` has already."""
    directory = run_directory.select_checkpoint(directory)
    description = checkpoint.read_description(directory)
    config = checkpoint.model_config(description, directory)
    if model.directory is None:
        raise ValueError("this model was built in memory: load the base of the adapters from a checkpoint")
    if checkpoint.BASE not in description:
        raise ValueError(f"{directory} has all its parameters and needs no base: load it by itself")
    base = checkpoint.base_of(directory, model.base or model.directory)
    if config.base != model.config.base:
        raise ValueError(
            f"{directory} was trained on a base in {config.base}, but this model holds it in {model.config.base}: "
            f"load it with weights={config.base!r}"
        )
    checkpoint.verify(directory)
    stored_params, leaves = checkpoint.StoredParams(directory, base), checkpoint.flatten(model.params)
    learned = checkpoint.StoredParams(model.directory, model.base).origins if model.base else {}
    boxed = radfm.abstract_params(config)
    abstract = checkpoint.flatten(nn.unbox(boxed))
    shardings = checkpoint.flatten(sharding.param_shardings(boxed, model.mesh)[0]) if model.mesh is not None else None
    is_shared = lambda path: (  # noqa: E731
        stored_params.origins.get(path, base) == base and learned.get(path) != model.directory and path in leaves
    )
    missing = {path: x for path, x in abstract.items() if not is_shared(path)}
    dtypes = {path: stored_params.dtypes.get(path, x.dtype) for path, x in missing.items()}
    wanted = checkpoint.with_shardings(
        {path: jax.ShapeDtypeStruct(x.shape, dtypes[path]) for path, x in missing.items()},
        shardings and {path: shardings[path] for path in missing},
    )
    read = stored_params.read_leaves(wanted)
    params = checkpoint.unflatten({path: read.get(path, leaves.get(path)) for path in abstract})
    compute = {"dtype": model.config.llama.dtype}
    return dataclasses.replace(
        model, config=config.with_compute(**compute), params=params, directory=directory, adapters={}, base=base
    )


def save(model: Model, directory) -> None:
    """Write a checkpoint directory atomically, from one process that has all parameters.

    The other files of the loaded checkpoint (tokenizer, unused tensors of a released file) are copied. The preparation
    and the tokenizer that the model was loaded with replace those of the checkpoint. Raises ValueError if `directory`
    exists, the disk is too small, weights are int8 or nf4, the model has adapters, or there are several processes.
    """
    if model.config.lora is not None:
        raise ValueError("a model with adapters cannot be saved: merge them first (python -m radfm_jax.convert merge)")
    if any(np.issubdtype(x.dtype, np.integer) for x in jax.tree.leaves(model.params)):
        raise ValueError('int8 and nf4 weights cannot be saved: load the model with weights="float32" and save that')
    if jax.process_count() > 1:
        raise ValueError("save needs a single process: gather the parameters in one process and save there")
    extra_files, fields = [], {"source": {}}
    if model.directory is not None:
        names = [*checkpoint.EXTRA_FILES, run_directory.RUN]
        names = [name for name in names if model.tokenizer_file is None or name not in checkpoint.TOKENIZERS]
        extra_files = [path for name in names if (path := model.directory / name).is_file()]
        description = checkpoint.read_description(model.directory)
        fields |= {k: description[k] for k in ("source", stored.KEY) if k in description}
    if model.prepared is not None:
        fields[stored.KEY] = stored.to_record(model.prepared)
    size = sum(x.nbytes for x in jax.tree.leaves(model.params)) + sum(p.stat().st_size for p in extra_files)
    checkpoint.require_space(directory, size + size // 50, f"saving {directory}")
    with checkpoint.new_directory(directory) as partial:
        checkpoint.save_params(partial, model.params)
        for path in extra_files:
            shutil.copyfile(path, partial / path.name)
        if model.tokenizer_file is not None:
            for name, content in read_tokenizer_files(model.tokenizer_file).items():
                (partial / name).write_bytes(content)
        checkpoint.write_description(partial, "radfm", model.config.to_dict(), **fields)
