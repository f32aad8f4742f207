"""Answers to prompts about scans, from a model and its compiled functions.

Every shape that is compiled is a bucket, so that few programs serve all questions: prompts of 64, 128 ... tokens,
caches of 256, 512 ... places (up to `length`), batches of 1, 2, 4 ... prompts with up to 4, 8 ... scans, scans of 64,
128 ... patches and planes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.batching.collate import ScanPlanes
from input_pipeline.images.planes import Volume
from input_pipeline.text.tokenizer import Tokenizer
from input_pipeline.text.tokens import Encoded
from radfm_jax.inference import decoding, inputs
from radfm_jax.inference.answer_text import AnswerText
from radfm_jax.inference.sampling import Sampling
from radfm_jax.models import cpu_decode, radfm
from radfm_jax.runtime import sharding

NEW_TOKENS = 200  # of an answer, as the released model's
CHUNK = 16  # tokens between two looks at the text
# The smallest buckets.
PROMPT_TOKENS, CACHE_PLACES, SCANS = 64, 256, 4
VISION_PATCHES = 4096  # encoded at a time: four of the largest scans


class GenerationError(ValueError):
    """A prompt that got no answer."""


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedScans:
    """Visual tokens on the device, to be given in place of the scans in any number of questions.

    Attributes:
      tokens: float[S, L, E], zeros behind the last scan.
      names: of the scans, for messages.
      volumes: what the model saw.
    """

    tokens: jax.Array
    names: tuple[str, ...] = ()
    volumes: tuple[Volume, ...] = ()

    def __len__(self) -> int:
        return len(self.names)


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """What the model continues.

    Attributes:
      ids: int32[t]; V and V + 1 are `<image>` and `</image>`.
      visual_index: int32[t], slot * L + latent where a visual token stands, else -1.
      visual: float[S, L, E] of the slots; None without scans.
    """

    ids: np.ndarray
    visual_index: np.ndarray
    visual: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Answer:
    """What came of a prompt.

    Attributes:
      text: without white space around it; "" if it failed, or without a tokenizer.
      ids: tokens, the stop token included.
      logprobs: natural logarithm of each token's probability, before temperature and the like.
      ended: `stop id`, `stop text`, `length` or `failed`.
      error: why there is no answer; "" if there is one.
      watched: natural logarithm of the probability that each watched token had of being the first.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: str
    error: str = ""
    watched: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A question in words.

    Attributes:
      prompt, context, place: radfm_jax.inference.inputs.encode_prompt.
      scans: paths, samples.Scan, arrays; or EncodedScans.
    """

    prompt: str
    scans: Sequence[inputs.Scan] | EncodedScans = ()
    context: str = ""
    place: str = "first"

    def __post_init__(self):
        if not isinstance(self.scans, EncodedScans | list | tuple):
            raise ValueError(f"scans are a {type(self.scans).__name__}: give a list of paths or arrays")


def bucket(size: int, least: int = 1) -> int:
    """The smallest of least, 2 least, 4 least ... that holds `size`."""
    while least < size:
        least *= 2
    return least


def _padded(tokens: jax.Array | np.ndarray, slots: int) -> jax.Array | np.ndarray:
    """Visual tokens [S, L, E] with zeros up to as many slots; where they lie."""
    if len(tokens) == slots:
        return tokens
    return (np if isinstance(tokens, np.ndarray) else jnp).pad(tokens, ((0, slots - len(tokens)), (0, 0), (0, 0)))


class Generator:
    """See the head of this file.

    Args:
      config: sizes, and in which dtype to compute.
      params: as a checkpoint holds them, on `mesh`.
      mesh: None: one device. Rows of a batch lie over `data` and `fsdp`, heads of the cache over `tensor`.
      tokenizer: for words; without it only tokens go in and out.
      preparation: of scans; without it none are read.
      length: most places of the cache: prompt and answer together.
      apart: keep layers apart from their stack, and matrices by their outputs, which doubles their memory and makes
        decoding on CPUs two to three times as fast; None: on one CPU, where they take less than 8 GB.
    """

    def __init__(
        self,
        config: radfm.RadFMConfig,
        params: dict,
        *,
        mesh: jax.sharding.Mesh | None = None,
        tokenizer: Tokenizer | None = None,
        preparation: inputs.Preparation | None = None,
        length: int = 2048,
        apart: bool | None = None,
    ):
        if jax.process_count() > 1:
            raise ValueError("generation runs in one process: start it on one machine, over all its devices")
        vocabulary = config.llama.vocab_size
        if tokenizer is not None and tokenizer.vocab_size != vocabulary:
            raise ValueError(
                f"{tokenizer.path} has {tokenizer.vocab_size} pieces, the model {vocabulary}: give the model's own"
            )
        if preparation is not None and preparation.num_latents != config.num_latents:
            raise ValueError(
                f"scans are prepared for {preparation.num_latents} latents, the model makes {config.num_latents}"
            )
        if length < 2:
            raise ValueError(f"the cache has {length} places: 2 are the least")
        self.config, self.params, self.mesh, self.length = config, params, mesh, length
        self.tokenizer, self.preparation = tokenizer, preparation
        self.ways = 1 if mesh is None else int(np.prod([mesh.shape[a] for a in sharding.BATCH]))
        if apart is None:
            apart = mesh is None and cpu_decode.is_worthwhile(params["llama"])
        if apart and mesh is not None:
            raise ValueError("layers are kept apart on one device only: leave out `apart` or the mesh")
        self._decoding = {"llama": dict(params["llama"]), "image_marks": params["image_marks"]}
        with self._on_mesh():
            self._prepare(apart)

    @property
    def weights(self) -> str:
        """The dtype of the language model's matrices: int8, or that of the computation."""
        kernel = self.params["llama"]["blocks"]["query"]["kernel"]
        return "int8" if kernel.dtype == jnp.int8 else jnp.dtype(self.config.llama.dtype).name

    def _prepare(self, apart: bool) -> None:
        """Parameters as decoding reads them: matrices in the dtype of the computation, layers apart."""
        dtype = jnp.dtype(self.config.llama.dtype)
        # A matrix is cast where it is used; once is enough, and half the bytes to read for every token. The scales of
        # norms are multiplied in float32 and stay as they are, matrices of integers too, and their scales.
        keep = lambda path, x: path[-1].key.endswith("scale") or x.dtype in (dtype, jnp.int8)  # noqa: E731
        cast = lambda path, x: x if keep(path, x) else x.astype(dtype)  # noqa: E731
        of = jax.tree_util.tree_map_with_path(cast, self._decoding["llama"])
        if apart:
            of = cpu_decode.split_params(self.config.llama, of)
        self._decoding["llama"] = of

    def _on_mesh(self):
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def _place(self, arrays: dict) -> dict:
        return arrays if self.mesh is None else sharding.place_batch(arrays, self.mesh)

    # --- scans --------------------------------------------------------------------------------------------------------

    def encode_scans(self, scans: Sequence[inputs.Scan] | EncodedScans) -> EncodedScans:
        """Reads, prepares and encodes the scans of one question.

        Raises:
          ValueError: a scan that cannot be used, by its name; no preparation is known.
        """
        return self._encoded([Request("", scans)])[0]

    def encode_volumes(
        self, questions: Sequence[Sequence[Volume]], names: Sequence[Sequence[str]] | None = None
    ) -> list[EncodedScans]:
        """Volumes of several questions, encoded together; those of one size share a call.

        Raises:
          ValueError: values that are not finite, by the scan's name.
        """
        names = names or [[f"scan {i + 1}" for i in range(len(volumes))] for volumes in questions]
        groups: dict[tuple, list[tuple[int, int]]] = {}
        for q, volumes in enumerate(questions):
            for s, volume in enumerate(volumes):
                planes = ScanPlanes.of(volume)
                size = bucket(len(planes.plane_index), 64), bucket(len(planes.planes), 64), volume.voxels.dtype.name
                groups.setdefault(size, []).append((q, s))
        decoder, latents = self.config.llama, self.config.num_latents
        pool, places = [np.zeros((1, latents, decoder.width), decoder.dtype)], {}
        for (patches, planes, _), members in groups.items():
            most = self._rows(max(VISION_PATCHES // patches, 1))
            for start in range(0, len(members), most):
                some = members[start : start + most]
                rows = [questions[q][s] for q, s in some]
                rows += [None] * (self._rows(len(rows)) - len(rows))
                batch = inputs.scan_rows(rows, patches, planes, latents)
                with self._on_mesh():
                    tokens, bad = decoding.visual_tokens(self.config, self.params, self._place(batch))
                if wrong := [str(names[q][s]) for (q, s), b in zip(some, np.asarray(bad), strict=False) if b.any()]:
                    raise ValueError(f"{', '.join(wrong)}: values that are not finite")
                first = sum(map(len, pool))
                places |= {member: first + i for i, member in enumerate(some)}
                pool.append(tokens[:, 0])
        found = []
        whole = jnp.concatenate(pool) if any(questions) else pool[0]
        for q, volumes in enumerate(questions):
            index = np.zeros(bucket(len(volumes), SCANS), np.int32)
            index[: len(volumes)] = [places[q, s] for s in range(len(volumes))]
            found.append(EncodedScans(whole[index], tuple(map(str, names[q])), tuple(volumes)))
        return found

    def _rows(self, count: int) -> int:
        """The bucket of a batch: every device that shares it gets as many rows."""
        return self.ways * bucket(-(-count // self.ways))

    # --- words --------------------------------------------------------------------------------------------------------

    def words(self, request: Request) -> Encoded:
        """Tokens of a request and where its scans stand; no scan is read. Raises ValueError as `prompt`."""
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: give its SentencePiece model")
        return inputs.encode_prompt(
            request.prompt, len(request.scans), self.tokenizer,
            self.preparation or inputs.Preparation(num_latents=self.config.num_latents),
            context=request.context, place=request.place,
        )  # fmt: skip

    def prompt(self, request: Request, encoded: EncodedScans | None = None) -> Prompt:
        """Tokens of a request. encoded: of its scans, if they were encoded before.

        Raises:
          ValueError: a mark without scan, a scan without mark or that cannot be used, an empty prompt; no tokenizer or
            no preparation is known.
        """
        return self.prompts([request], None if encoded is None else [encoded])[0]

    def prompts(self, requests: Sequence[Request], encoded: Sequence[EncodedScans] | None = None) -> list[Prompt]:
        """The same for several; their scans are encoded together. Nothing is encoded if any of them is wrong."""
        # Words are looked at before any scan is read: a misspelt mark should not cost a minute.
        texts = [self.words(r) for r in requests]
        if encoded is None:
            encoded = self._encoded(requests)
        latents = self.config.num_latents
        return [
            Prompt(text.ids, inputs.visual_index(text, latents), of.tokens if len(of) else None)
            for text, of in zip(texts, encoded, strict=True)
        ]

    def _encoded(self, requests: Sequence[Request]) -> list[EncodedScans]:
        """Scans of several requests; those that are encoded already are not encoded again."""
        fresh = [() if isinstance(r.scans, EncodedScans) else tuple(r.scans) for r in requests]
        volumes = [self._read(scans) for scans in fresh]
        names = [[inputs.scan_name(scan, i) for i, scan in enumerate(scans, 1)] for scans in fresh]
        encoded = self.encode_volumes(volumes, names)
        return [r.scans if isinstance(r.scans, EncodedScans) else e for r, e in zip(requests, encoded, strict=True)]

    def _read(self, scans: Sequence[inputs.Scan]) -> list[Volume]:
        if not scans:
            return []
        if self.preparation is None:
            raise ValueError("it is not known how scans are prepared for this model: give `preparation`")
        return inputs.read_scans(scans, self.preparation)

    def answers(
        self,
        prompts: Sequence[Prompt | Request],
        sampling: Sampling = Sampling(),  # noqa: B008
        *,
        seeds: Sequence[int] | None = None,
        watch: Sequence[int] = (),
    ) -> list[Answer]:
        """Answers of a batch, in its order. A prompt whose logits are not finite has an `error` instead of an answer;
        the others are not touched by it. watch: tokens whose probability of being the first is wanted.

        Raises:
          ValueError: prompts that cannot be used, or that are too long for the cache.
        """
        found: list[Answer] = []
        chunk = CHUNK if sampling.stop else None
        for _, answers in self.stream(prompts, sampling, chunk=chunk, seeds=seeds, watch=watch):
            found = answers
        return found

    def stream(
        self,
        prompts: Sequence[Prompt | Request],
        sampling: Sampling = Sampling(),  # noqa: B008
        *,
        chunk: int | None = CHUNK,
        seeds: Sequence[int] | None = None,
        watch: Sequence[int] = (),
    ) -> Iterator[tuple[list[str], list[Answer]]]:
        """After the first token, and every `chunk` more (None: all at once), the new piece of text of each row, and the
        answers so far. seeds: of each prompt's draws, instead of sampling.seed + i. watch: as in `answers`."""
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk is {chunk}: at least 1 token")
        prompts = self._as_prompts(prompts)
        if not prompts:
            return
        run = _Run(self, prompts, sampling, seeds, tuple(watch))
        while True:
            yield run.look()
            if run.finished:
                return
            run.go_on(chunk)

    def check(self, prompt: Prompt, sampling: Sampling, name: str = "the prompt") -> int:
        """How many tokens its answer may have. Raises ValueError for a prompt that cannot be used, GenerationError for
        one that is too long; `name` is what the message calls it."""
        ids, index = np.asarray(prompt.ids), np.asarray(prompt.visual_index)
        slots, last = 0 if prompt.visual is None else len(prompt.visual), self.config.image_id + 1
        if ids.size == 0 or ids.ndim != 1 or ids.shape != index.shape:
            raise ValueError(f"{name}: ids are {list(ids.shape)}, visual_index {list(index.shape)}; give both as [t]")
        if ids.min() < 0 or ids.max() > last:
            raise ValueError(f"{name}: ids run from {ids.min()} to {ids.max()}, known are 0 to {last}")
        if index.max() >= slots * self.config.num_latents:
            raise ValueError(f"{name} shows visual token {index.max()}, but has {slots} scans")
        room, wanted = self.length - len(ids), sampling.max_new_tokens
        if room < (wanted or 1):
            fewer = ", or ask for fewer tokens" if room > 0 else ""
            raise GenerationError(
                f"{name} has {len(ids)} tokens, and {wanted or 1} of an answer do not fit behind it: the cache has "
                f"{self.length} places. Shorten the prompt{fewer}; in Python, Generator(length=...) has more places"
            )
        return wanted or min(NEW_TOKENS, room)

    def _as_prompts(self, prompts) -> list[Prompt]:
        prompts = list(prompts)
        asked = [i for i, p in enumerate(prompts) if isinstance(p, Request)]
        for i, prompt in zip(asked, self.prompts([prompts[i] for i in asked]) if asked else [], strict=True):
            prompts[i] = prompt
        return prompts


class _Run:
    """One batch, from prompts to answers."""

    def __init__(
        self,
        generator: Generator,
        prompts: list[Prompt],
        sampling: Sampling,
        seeds: Sequence[int] | None,
        watch: tuple[int, ...],
    ):
        self.generator, self.prompts, self.sampling = generator, prompts, sampling
        g, c = generator, generator.config
        lengths = [len(p.ids) for p in prompts]
        limits = [g.check(p, sampling, f"prompt {i}") for i, p in enumerate(prompts, 1)]
        rows = g._rows(len(prompts))
        self.places = min(bucket(max(map(operator.add, lengths, limits)), CACHE_PLACES), g.length)
        t = min(bucket(max(lengths), PROMPT_TOKENS), self.places)
        s = bucket(max(0 if p.visual is None else len(p.visual) for p in prompts), SCANS)
        arrays = {
            "ids": np.zeros((rows, t), np.int32),
            "visual_index": np.full((rows, t), -1, np.int32),
            "lengths": np.ones(rows, np.int32),
            "limit": np.zeros(rows, np.int32),
            "keys": np.zeros((rows, 2), np.uint32),
        }
        for i, p in enumerate(prompts):
            arrays["ids"][i, : lengths[i]], arrays["visual_index"][i, : lengths[i]] = p.ids, p.visual_index
            # What jax.random.key makes of a seed.
            arrays["keys"][i] = 0, sampling.seed + i if seeds is None else seeds[i]
        arrays["lengths"][: len(prompts)], arrays["limit"][: len(prompts)] = lengths, limits
        stop_ids = sampling.stop_ids
        if stop_ids is None:
            stop_ids = () if g.tokenizer is None else (g.tokenizer.eos_id,)
        if wrong := [i for i in stop_ids if not 0 <= i < c.llama.vocab_size]:
            raise ValueError(f"stop_ids: {wrong[0]} is no token, they run from 0 to {c.llama.vocab_size - 1}")
        self.stop_ids = stop_ids
        sample, penalise = sampling.temperature > 0, sampling.repetition_penalty != 1
        choice = decoding.sampling_arrays(sampling, stop_ids, watch)
        with g._on_mesh():
            nothing = np.zeros((s, c.num_latents, c.llama.width), c.llama.dtype)
            of = [nothing if p.visual is None else p.visual for p in prompts] + [nothing] * (rows - len(prompts))
            visual = jnp.stack([_padded(v, s) for v in of])
            if g.mesh is not None:
                visual = jax.device_put(visual, sharding.batch_sharding(g.mesh))
            prompt = g._place(arrays) | {"visual": visual}
            self.state = decoding.first_token(c, self.places, sample, penalise, g._decoding, prompt, choice)
        self._more = functools.partial(decoding.more_tokens, c, sample, penalise, g._decoding)
        self.texts = [AnswerText(g.tokenizer, sampling.stop) if g.tokenizer else None for _ in prompts]
        self.read = [0] * len(prompts)
        self.closed = [False] * len(prompts)

    def go_on(self, chunk: int | None) -> None:
        stop = np.zeros(len(self.state["done"]), bool)
        stop[: len(self.closed)] = self.closed
        steps = np.int32(self.places if chunk is None else chunk)
        g = self.generator
        with g._on_mesh():
            where = g._place({"stop": stop})["stop"]
            self.state = self._more(self.state, steps, where)

    def look(self) -> tuple[list[str], list[Answer]]:
        """New pieces of text, and the answers so far."""
        names = ("out", "logprob", "count", "done", "failed", "length", "watched")
        now = jax.device_get({name: self.state[name] for name in names})
        pieces, answers = [], []
        for i, text in enumerate(self.texts):
            count, failed = int(now["count"][i]), bool(now["failed"][i])
            ids = now["out"][i, :count].tolist()
            over = bool(now["done"][i])
            piece = ""
            if text is not None and not self.closed[i]:
                end = count - 1 if over and ids and ids[-1] in self.stop_ids else count
                piece = text.add(ids[self.read[i] : end])
                if over and not text.stopped and not failed:
                    piece += text.finish()
            self.read[i] = count
            stopped = text is not None and text.stopped
            self.closed[i] = self.closed[i] or over or stopped
            pieces.append("" if failed else piece)
            answer = self._answer(text, ids, now["logprob"][i], failed, stopped, over, i)
            answers.append(dataclasses.replace(answer, watched=tuple(map(float, now["watched"][i]))))
        self.finished = all(self.closed)
        return pieces, answers

    def _answer(self, text, ids, logprobs, failed: bool, stopped: bool, over: bool, i: int) -> Answer:
        if failed:
            why = f"the logits of token {len(ids) + 1} of answer {i + 1} are not finite: there is no answer"
            return Answer("", tuple(ids), tuple(map(float, logprobs[: len(ids)])), "failed", why)
        if stopped:
            ids, ended = text.ids, "stop text"
        elif over and ids and ids[-1] in self.stop_ids:
            ended = "stop id"
        else:
            ended = "length" if over else ""
        said = "" if text is None else text.text
        return Answer(said, tuple(ids), tuple(map(float, logprobs[: len(ids)])), ended)


def checked(answers: Sequence[Answer]) -> list[Answer]:
    """Raises GenerationError naming every answer that failed."""
    if failed := [a.error for a in answers if a.error]:
        raise GenerationError("; ".join(failed))
    return list(answers)
