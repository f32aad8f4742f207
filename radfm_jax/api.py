"""The Python interface: `model = radfm_jax.load(directory)`, then `model.answer("...", ["scan.nii.gz"])`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

from input_pipeline.text.tokenizer import Tokenizer
from radfm_jax.checkpoints import checkpoint, run_directory
from radfm_jax.checkpoints import int8 as quantised
from radfm_jax.inference import Answer, EncodedScans, Generator, Request, Sampling, checked, inputs
from radfm_jax.inference.plain_rows import plain_rows
from radfm_jax.models import radfm
from radfm_jax.runtime import sharding

CHUNK = 8  # tokens between two pieces of a streamed answer


@dataclasses.dataclass(frozen=True)
class Model:
    """A RadFM with its weights.

    Attributes:
      config: sizes, and how to compute (`config.with_compute(dtype="bfloat16")`).
      params: a plain dict of arrays.
      directory: where it was loaded from, None for a model made in memory.
      mesh: what the parameters are sharded over, None for one device.
      tokenizer_file: of a model whose directory has none.
      prepared: how its scans were prepared, where that is not to be what its directory says.
    """

    config: radfm.RadFMConfig
    params: dict
    directory: Path | None = None
    mesh: jax.sharding.Mesh | None = None
    tokenizer_file: Path | None = None
    prepared: inputs.Preparation | None = None

    # --- answers ------------------------------------------------------------------------------------------------------

    def answer(
        self,
        prompt: str,
        scans: Sequence[inputs.Scan] | EncodedScans = (),
        *,
        context: str = "",
        place: str = "first",
        on_text: Callable[[str], None] | None = None,
        **options,
    ) -> str:
        """The answer to a question about scans.

            model.answer("Compare <image-2> with <image-1>. What is new?", ["old.png", "new.dcm"], max_new_tokens=80)

        Args:
          prompt: the question. `<image-1>` marks say where scans stand; without any they stand first, or where `place`
            says: `first`, `last`.
          scans: paths (all formats of the pipeline), samples.Scan (a volume of a 4D file, a window), voxels [H, W, D]
            or [H, W, D, C]; or what `encode_scans` made of them, for further questions about the same.
          context: what is known of the patient.
          on_text: called with each new piece of the answer while it is written.
          options: generate.Sampling (max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, stop,
            stop_ids).
        Raises:
          ValueError: a mark without scan, a scan without mark or that cannot be read, an empty or too long prompt,
            logits that are not finite; a checkpoint that lacks its tokenizer or does not say how scans are prepared.
        """
        if on_text is None:
            return self.answers([Request(prompt, scans, context, place)], **options)[0]
        text = ""
        for piece, answer in self._streamed(Request(prompt, scans, context, place), CHUNK, options):
            text = answer.text
            if piece:
                on_text(piece)
        return text

    def answers(self, requests: Sequence[Request | tuple], **options) -> list[str]:
        """The same for several questions at once: generate.Request or (prompt, scans). Each answer is that which
        `answer` gives; of draws, number i is that of seed + i. Raises ValueError if any of them has none."""
        if wrong := [r for r in requests if not isinstance(r, Request | tuple)]:
            raise ValueError(f"{wrong[0]!r} is no question: give (prompt, scans) or a Request")
        requests = [r if isinstance(r, Request) else Request(*r) for r in requests]
        sampling = Sampling(**options)
        return [a.text for a in checked(self._speaking(requests).answers(requests, sampling))]

    def stream(
        self,
        prompt: str,
        scans: Sequence[inputs.Scan] | EncodedScans = (),
        *,
        context: str = "",
        place: str = "first",
        chunk: int = CHUNK,
        **options,
    ) -> Iterator[str]:
        """`answer` in pieces, as they come: after every `chunk` tokens one, which may be empty."""
        for piece, _ in self._streamed(Request(prompt, scans, context, place), chunk, options):
            yield piece

    def _streamed(self, request: Request, chunk: int, options: dict) -> Iterator[tuple[str, Answer]]:
        sampling = Sampling(**options)
        for pieces, answers in self._speaking([request]).stream([request], sampling, chunk=chunk):
            yield pieces[0], checked(answers)[0]

    def encode_scans(self, scans: Sequence[inputs.Scan]) -> EncodedScans:
        """Visual tokens of scans, which stay on the device: in place of the scans they go into any number of
        questions. In `released` mode scans of one question are prepared together, so encode them together."""
        _ = self.preparation
        return self.generator.encode_scans(scans)

    def _speaking(self, requests: Sequence[Request]) -> Generator:
        """The generator, once it is certain that it has what words and scans need."""
        _ = self.tokenizer, self.preparation if any(len(r.scans) for r in requests) else None
        return self.generator

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Raises ValueError if there is none."""
        if self.tokenizer_file is not None:
            return Tokenizer(self.tokenizer_file)
        if self.directory is None:
            raise ValueError("this model was made in memory and has no tokenizer: give it `tokenizer_file`")
        if not (self.directory / checkpoint.TOKENIZER).is_file():
            raise ValueError(
                f"{self.directory} has no {checkpoint.TOKENIZER}: load it with tokenizer=FILE (on the command line "
                "--tokenizer FILE), the SentencePiece model of its language model"
            )
        return Tokenizer(self.directory / checkpoint.TOKENIZER)

    @functools.cached_property
    def preparation(self) -> inputs.Preparation:
        """How scans are prepared for this model. Raises ValueError if nothing says so."""
        if self.prepared is not None:
            return self.prepared
        if self.directory is None:
            raise ValueError("this model was made in memory: give it `prepared`, how its scans were prepared")
        return preparation_of(self.directory, self.config)

    @functools.cached_property
    def generator(self) -> Generator:
        """Compiled functions, and tokens instead of words."""
        tokenizer = preparation = None
        with contextlib.suppress(ValueError):  # what is lacking is said when it is needed
            tokenizer = self.tokenizer
        with contextlib.suppress(ValueError):
            preparation = self.preparation
        length = {} if preparation is None else {"length": preparation.text_length}
        more = {"tokenizer": tokenizer, "preparation": preparation, "mesh": self.mesh}
        return Generator(self.config, self.params, **more, **length)

    # --- logits -------------------------------------------------------------------------------------------------------

    def logits(self, ids, vision=None, attention_mask=None) -> jax.Array:
        """Logits of every position, in the layout of the released model.

        Args:
          ids: int[B, L]. Below V: text; V `<image>`, V + 1 `</image>`; V + 2 + 32 s + j: visual token j of scan s.
          vision: float[B, S, 3, H, W, D], values in [0, 1]; H and W multiples of 32, D of 4. None: no scans.
            Values far outside that range give a warning: the network was trained on min-max scaled intensities.
          attention_mask: int or bool[B, L]; a token whose mask is 0 is seen by nobody.
        Returns:
          float32[B, L, V].
        Raises:
          ValueError: ids out of range, sizes that do not fit, voxels that are not finite.
        """
        return self.forward(ids, vision, attention_mask)[0]

    def forward(self, ids, vision=None, attention_mask=None) -> tuple[jax.Array, dict[str, jax.Array]]:
        """`logits` and a dict `out` of intermediates: vit float[B, S, P, D] (patch tokens), perceiver
        float[B, S, 32, D], visual_tokens float[B, S, 32, E], embeddings float[B, L, E] (text and scans fused).
        A sharded model runs on its mesh."""
        c = self.config
        ids = np.asarray(ids)
        text_only = vision is None or np.shape(vision)[1:2] == (0,)
        if text_only:
            # The network always encodes at least one scan; nothing may refer to this one.
            if ids.size and ids.max() >= c.llama.vocab_size + 2:
                raise ValueError(f"ids reach {ids.max()}, which is a visual token, but there is no scan: pass vision")
            vision = np.zeros((*ids.shape[:1], 1, c.vision.channels, *c.vision.patch), np.float32)
        vision = np.asarray(vision)
        bad = np.argwhere(~np.isfinite(vision).reshape(*vision.shape[:2], -1).all(-1)) if vision.ndim == 6 else []
        if len(bad):
            scans = ", ".join(f"scan {s} of sample {b}" for b, s in bad)
            raise ValueError(f"voxels that are not finite in {scans}")
        if vision.size and (vision.min() < -0.5 or vision.max() > 1.5):
            warnings.warn(
                f"vision runs from {vision.min():g} to {vision.max():g}, the model reads [0, 1]: scale each scan first",
                stacklevel=3,
            )
        batch = plain_rows(
            ids,
            vision,
            attention_mask,
            vocab_size=c.llama.vocab_size,
            num_latents=c.num_latents,
            patch=c.vision.patch,
            channels=c.vision.channels,
            tables=c.vision.tables,
        )
        with jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext():
            return _forward(c, self.params, batch)


@functools.partial(jax.jit, static_argnums=0)
def _forward(config, params, batch):
    return radfm.RadFM(config).apply({"params": params}, batch)


def load(
    directory,
    *,
    dtype: str = "float32",
    param_dtype: str | None = None,
    int8: bool = False,
    mesh=None,
    verify: bool = True,
    tokenizer=None,
    prepared: inputs.Preparation | None = None,
) -> Model:
    """Reads a checkpoint directory (made by `python -m radfm_jax.convert`, training or `save`).

    Args:
      directory: of a checkpoint; or of a training run, of which the best step is taken, or the newest if none was
        ever compared.
      dtype: what matrices are multiplied in: float32 or bfloat16.
      param_dtype: what parameters are kept in; None keeps each as it is stored.
      int8: keep the matrices of the language model as int8 with a scale for each output (radfm_jax.checkpoints.int8).
      mesh: a mesh of `sharding.make_mesh` to shard the parameters over; None uses the first device.
      verify: compare every file with its SHA-256 first; False compares sizes only.
      tokenizer: SentencePiece model of a checkpoint that has none.
      prepared: how scans are prepared, if not as the checkpoint says.
    Raises:
      ValueError: not a checkpoint directory, damaged, or not a whole RadFM.
    """
    for name in filter(None, (dtype, param_dtype)):
        if name not in checkpoint.DTYPES:
            raise ValueError(f"dtype {name!r} is unknown: choose one of {', '.join(checkpoint.DTYPES)}")
    if mesh is not None and mesh.axis_names != sharding.AXES:
        raise ValueError(f"mesh has axes {mesh.axis_names}, expected {sharding.AXES}: use sharding.make_mesh")
    if tokenizer is not None and not Path(tokenizer).is_file():
        raise ValueError(f"tokenizer {tokenizer} is no file that is there: give the SentencePiece model")
    directory = run_directory.select_checkpoint(directory)
    checkpoint.verify(directory, hashes=verify, allow_missing=() if tokenizer is None else (checkpoint.TOKENIZER,))
    config = checkpoint.model_config(checkpoint.read_description(directory), directory)
    boxed = radfm.abstract_params(config)
    stored = checkpoint.ParamReader(directory).dtypes
    abstract = checkpoint.unflatten(
        {
            path: jax.ShapeDtypeStruct(leaf.shape, param_dtype or stored.get(path, leaf.dtype))
            for path, leaf in checkpoint.flatten(nn.unbox(boxed)).items()
        }
    )
    shardings = sharding.param_shardings(boxed, mesh)[0] if mesh is not None else None
    restore = quantised.restore_params if int8 else checkpoint.restore_params
    params = restore(directory, abstract, shardings)
    tokenizer = None if tokenizer is None else Path(tokenizer)
    return Model(config.with_compute(dtype=dtype), params, directory, mesh, tokenizer, prepared)


def preparation_of(directory, config: radfm.RadFMConfig) -> inputs.Preparation:
    """How scans were prepared for a checkpoint: as its training run was told; converted weights are the released ones.

    Raises:
      ValueError: nothing says so.
    """
    path = Path(directory) / run_directory.RUN
    try:
        data = json.loads(path.read_text())["config"]["data"]
    except FileNotFoundError:
        data = None
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f"{path} does not say how scans were prepared ({e!r}): {_PREPARED}") from None
    if data is not None:
        known = {f.name for f in dataclasses.fields(inputs.Preparation)}
        return inputs.Preparation(**{name: value for name, value in data.items() if name in known})
    if "file" in checkpoint.read_description(directory).get("source", {}):
        return dataclasses.replace(inputs.RELEASED, num_latents=config.num_latents)
    raise ValueError(f"{directory} has no {run_directory.RUN} that says how scans were prepared: {_PREPARED}")


_PREPARED = (
    "load it with prepared=Preparation(preprocess=..., size_2d=..., ...) (on the command line --preprocess paper "
    "--size-2d ... --size-3d ... --depth ...)"
)


def save(model: Model, directory) -> None:
    """Writes a checkpoint directory, whole or not at all; what `load` found beside the parameters (tokenizer, unused
    tensors of a released file) goes along. For one process with all parameters.

    Raises ValueError if `directory` exists, the disk is too small, weights are int8, or there are several processes.
    """
    if any(x.dtype == np.int8 for x in jax.tree.leaves(model.params)):
        raise ValueError("weights in int8 cannot be saved: load the model without int8 and save that")
    if jax.process_count() > 1:
        raise ValueError("save writes from one process, and there are several: gather the parameters in one of them")
    beside = []
    if model.directory is not None:
        beside = [p for n in (*checkpoint.EXTRA_FILES, run_directory.RUN) if (p := model.directory / n).is_file()]
    size = sum(x.nbytes for x in jax.tree.leaves(model.params)) + sum(p.stat().st_size for p in beside)
    checkpoint.require_space(directory, size + size // 50, f"saving {directory}")
    with checkpoint.new_directory(directory) as partial:
        checkpoint.save_params(partial, model.params)
        source = {}
        if model.directory is not None:
            source = checkpoint.read_description(model.directory).get("source", {})
        for path in beside:
            shutil.copyfile(path, partial / path.name)
        checkpoint.write_description(partial, "radfm", model.config.to_dict(), source=source)
