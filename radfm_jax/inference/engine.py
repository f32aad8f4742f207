"""Answers to prompts about scans, from a model and its compiled functions.

All compiled shapes are buckets, so a few programs serve all requests: prompts of 64, 128 ... tokens, caches of
256, 512 ... positions (up to `length`), batches of 1, 2, 4 ... prompts with up to 4, 8 ... scans, and scans of
64, 128 ... patches and planes. An encoder that reads slices or slabs has buckets of 1, 2, 4 ... of them instead.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from input_pipeline.batching.collate import ScanPlanes
from input_pipeline.field_rules import raise_problems
from input_pipeline.images.planes import Volume
from input_pipeline.text.tokenizer import Tokenizer
from input_pipeline.text.tokens import Encoded
from radfm_jax.inference import decoding, inputs
from radfm_jax.inference.batch import SCANS, Batch, bucket
from radfm_jax.inference.requests import Answer, EncodedScans, GenerationError, Prompt, Request
from radfm_jax.inference.sampling import Sampling
from radfm_jax.models import cpu_decode, radfm
from radfm_jax.models.encoders.kinds import data_problems
from radfm_jax.runtime import sharding

NEW_TOKENS = 200  # default length limit of an answer, as in the released model
CHUNK = 16  # tokens decoded between two checks for stop texts
PATCHES = 64  # smallest bucket of an encoder that reads any number of patches
VISION_PATCHES = 4096  # patches encoded per call: four of the largest scans


class Generator:
    """Generates answers to batches of prompts; see the module docstring.

    Args:
      params: as stored in a checkpoint, on `mesh`.
      mesh: None: one device. Batch rows are sharded over `data` and `fsdp`, heads of the cache over `tensor`.
      tokenizer: without it, prompts and answers are tokens only.
      preparation: how scans are prepared; without it no scan can be read.
      length: length limit of the cache: prompt plus answer.
      split: decode with split layers (cpu_decode), which doubles the memory and is two to three times as fast on CPUs.
        None: on one CPU device, if the decoder takes less than 8 GB.
    Raises:
      ValueError: the arguments do not fit together, or there are several processes.
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
        split: bool | None = None,
    ):
        if jax.process_count() > 1:
            raise ValueError("generation runs in one process: start it on one host, with all its devices")
        vocabulary = config.llama.vocab_size
        if tokenizer is not None and tokenizer.vocab_size != vocabulary:
            raise ValueError(
                f"{tokenizer.path} has {tokenizer.vocab_size} pieces, the model {vocabulary}: "
                "pass the tokenizer of the model, opened with its vocab_size"
            )
        if preparation is not None and preparation.num_latents != config.num_latents:
            raise ValueError(
                f"preparation.num_latents is {preparation.num_latents}, the model has {config.num_latents} latents"
            )
        if preparation is not None:
            raise_problems(data_problems(config.vision, preparation))
        if length < 2:
            raise ValueError(f"length must be at least 2 (got {length})")
        self.config, self.params, self.mesh, self.length = config, params, mesh, length
        self.tokenizer, self.preparation = tokenizer, preparation
        self.batch_shards = 1 if mesh is None else int(np.prod([mesh.shape[a] for a in sharding.BATCH]))
        if split is None:
            split = mesh is None and cpu_decode.is_worthwhile(params["llama"])
        if split and mesh is not None:
            raise ValueError("split layers need one device: drop `split` or `mesh`")
        with self.on_mesh():
            llama = self._cast(dict(params["llama"]))
            if split:
                llama = cpu_decode.split_params(config.llama, llama)
        self.decode_params = {"llama": llama, "image_marks": params["image_marks"]}

    @property
    def template(self) -> str:
        """Form of a conversation: `radfm` or `chat`."""
        return "radfm" if self.preparation is None else self.preparation.template

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: those of the tokenizer, and the end of a turn in the chat template."""
        if self.tokenizer is None:
            return ()
        ends = (self.tokenizer.chat.end_id,) if self.template == "chat" else ()
        return tuple(dict.fromkeys(self.tokenizer.stop_ids + ends))

    @property
    def weights(self) -> str:
        """Type of the language model's matrices: int8, nf4, or the compute dtype."""
        kernel = self.params["llama"]["blocks"]["query"]["kernel"]
        stored = {jnp.dtype(jnp.int8): "int8", jnp.dtype(jnp.uint8): "nf4"}
        return stored.get(kernel.dtype, jnp.dtype(self.config.llama.dtype).name)

    def _cast(self, params: dict) -> dict:
        """Cast the matrices to the compute dtype once; casting at each use would read twice the bytes per token.

        Norm scales are multiplied in float32 and keep their dtype, as do int8 and nf4 matrices and their scales.
        """
        dtype = jnp.dtype(self.config.llama.dtype)

        def cast(path, x):
            is_kept = path[-1].key.endswith(("scale", "absmax")) or jnp.issubdtype(x.dtype, jnp.integer)
            return x if is_kept or x.dtype == dtype else x.astype(dtype)

        return jax.tree_util.tree_map_with_path(cast, params)

    def on_mesh(self):
        """Return a context that sets the mesh, if there is one."""
        return jax.set_mesh(self.mesh) if self.mesh is not None else contextlib.nullcontext()

    def device_put(self, arrays: dict) -> dict:
        """Shard the arrays of a batch over the mesh, if there is one."""
        return arrays if self.mesh is None else sharding.place_batch(arrays, self.mesh)

    def row_bucket(self, count: int) -> int:
        """Return the bucket of a batch size, with equally many rows on each batch shard."""
        return self.batch_shards * bucket(-(-count // self.batch_shards))

    def encode_scans(self, scans: Sequence[inputs.Scan] | EncodedScans) -> EncodedScans:
        """Read, prepare and encode the scans of one prompt.

        Raises ValueError if a scan cannot be used (the message names it), or the preparation is unknown.
        """
        return self._encode([Request("", scans)])[0]

    def encode_volumes(
        self, prompts: Sequence[Sequence[Volume]], names: Sequence[Sequence[str]] | None = None
    ) -> list[EncodedScans]:
        """Encode the volumes of several prompts. Volumes of one size bucket share a call.

        Raises ValueError if visual tokens are not finite; the message names the scans.
        """
        names = names or [[f"scan {i + 1}" for i in range(len(volumes))] for volumes in prompts]
        groups: dict[tuple, list[tuple[int, int]]] = {}
        slab = self.config.vision.slab
        for p, volumes in enumerate(prompts):
            for s, volume in enumerate(volumes):
                planes = ScanPlanes.of(volume)
                patches = bucket(len(planes.plane_index), slab if slab > 1 else PATCHES)
                size = patches, bucket(len(planes.planes), 64), volume.voxels.dtype.name
                groups.setdefault(size, []).append((p, s))
        llama, latents = self.config.llama, self.config.num_latents
        # Row 0 is empty: it fills unused slots.
        pool, pool_index = [np.zeros((1, latents, llama.width), llama.dtype)], {}
        for (patches, planes, _), members in groups.items():
            per_call = self.row_bucket(max(VISION_PATCHES // patches, 1))
            for start in range(0, len(members), per_call):
                chunk = members[start : start + per_call]
                rows = [prompts[p][s] for p, s in chunk]
                rows += [None] * (self.row_bucket(len(rows)) - len(rows))
                batch = inputs.scan_rows(rows, patches, planes, latents, self.config.vision.channels)
                with self.on_mesh():
                    tokens, nonfinite = decoding.visual_tokens(self.config, self.params, self.device_put(batch))
                nonfinite = np.asarray(nonfinite).any(axis=-1)
                if failed := [str(names[p][s]) for (p, s), bad in zip(chunk, nonfinite, strict=False) if bad]:
                    raise ValueError(f"{', '.join(failed)}: values are not finite")
                first = sum(map(len, pool))
                pool_index |= {member: first + i for i, member in enumerate(chunk)}
                pool.append(tokens[:, 0])
        pooled = jnp.concatenate(pool) if pool_index else pool[0]
        encoded = []
        for p, volumes in enumerate(prompts):
            index = np.zeros(bucket(len(volumes), SCANS), np.int32)
            index[: len(volumes)] = [pool_index[p, s] for s in range(len(volumes))]
            encoded.append(EncodedScans(pooled[index], tuple(map(str, names[p])), tuple(volumes)))
        return encoded

    def _encode(self, requests: Sequence[Request]) -> list[EncodedScans]:
        """Encode the scans of several requests together. Scans that are already encoded are returned unchanged."""
        scans = [() if isinstance(r.scans, EncodedScans) else tuple(r.scans) for r in requests]
        if any(scans) and self.preparation is None:
            raise ValueError("the preparation of scans is unknown for this model: pass `preparation`")
        volumes = [inputs.read_scans(s, self.preparation) if s else [] for s in scans]
        names = [[inputs.scan_name(scan, i) for i, scan in enumerate(s, 1)] for s in scans]
        encoded = self.encode_volumes(volumes, names)
        return [r.scans if isinstance(r.scans, EncodedScans) else e for r, e in zip(requests, encoded, strict=True)]

    def encode_text(self, request: Request) -> Encoded:
        """Return the tokens of a request and the positions of its scans, without reading a scan.

        Raises ValueError as `prompts` does.
        """
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer: pass its SentencePiece model or tokenizer.json")
        return inputs.encode_prompt(
            request.prompt, len(request.scans), self.tokenizer,
            self.preparation or inputs.Preparation(num_latents=self.config.num_latents),
            context=request.context, place=request.place, system=request.system, history=request.history,
        )  # fmt: skip

    def prompts(self, requests: Sequence[Request]) -> list[Prompt]:
        """Return the tokens of several requests, whose scans are encoded together.

        All texts are checked before any scan is read, because reading can take minutes. Raises ValueError if a mark has
        no scan or a scan no mark, a scan cannot be used, the prompt is empty, or the tokenizer or the preparation is
        missing.
        """
        texts = [self.encode_text(r) for r in requests]
        encoded, latents = self._encode(requests), self.config.num_latents
        return [
            Prompt(text.ids, inputs.visual_index(text, latents), scans.tokens if len(scans) else None)
            for text, scans in zip(texts, encoded, strict=True)
        ]

    def answers(
        self,
        prompts: Sequence[Prompt | Request],
        sampling: Sampling = Sampling(),  # noqa: B008
        *,
        seeds: Sequence[int] | None = None,
        watch: Sequence[int] = (),
    ) -> list[Answer]:
        """Return the answers of a batch, in order.

        A prompt with non-finite logits gets an `error` instead of an answer; the other rows are not affected.

        Args:
          seeds: seed of each prompt, in place of sampling.seed + i.
          watch: tokens whose probability at the first position is reported.
        Raises:
          ValueError: a prompt is invalid or too long for the cache.
        """
        answers: list[Answer] = []
        chunk = CHUNK if sampling.stop else None
        for _, latest in self.stream(prompts, sampling, chunk=chunk, seeds=seeds, watch=watch):
            answers = latest
        return answers

    def stream(
        self,
        prompts: Sequence[Prompt | Request],
        sampling: Sampling = Sampling(),  # noqa: B008
        *,
        chunk: int | None = CHUNK,
        seeds: Sequence[int] | None = None,
        watch: Sequence[int] = (),
    ) -> Iterator[tuple[list[str], list[Answer]]]:
        """Yield the new piece of text of each row and the answers so far.

        Yields after the first token, then after every `chunk` tokens (None: at the end). For `seeds` and `watch` see
        `answers`.
        """
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1 token (got {chunk})")
        tokenized = iter(self.prompts([p for p in prompts if isinstance(p, Request)]))
        prompts = [next(tokenized) if isinstance(p, Request) else p for p in prompts]
        if not prompts:
            return
        batch = Batch(self, prompts, sampling, seeds, tuple(watch))
        while True:
            yield batch.answers()
            if batch.finished:
                return
            batch.decode(chunk)

    def token_limit(self, prompt: Prompt, sampling: Sampling, name: str = "the prompt") -> int:
        """Return the maximum number of tokens of the answer. `name` is that of the prompt in messages.

        Raises ValueError if the prompt is invalid, GenerationError if it is too long.
        """
        ids, index = np.asarray(prompt.ids), np.asarray(prompt.visual_index)
        slots, last = 0 if prompt.visual is None else len(prompt.visual), self.config.image_id + 1
        if ids.size == 0 or ids.ndim != 1 or ids.shape != index.shape:
            raise ValueError(
                f"{name}: ids have shape {list(ids.shape)}, visual_index {list(index.shape)}; both must be [t], t > 0"
            )
        if ids.min() < 0 or ids.max() > last:
            raise ValueError(f"{name}: ids run from {ids.min()} to {ids.max()}; valid are 0 to {last}")
        if index.max() >= slots * self.config.num_latents:
            raise ValueError(f"{name}: visual_index refers to visual token {index.max()}, but there are {slots} scans")
        room, requested = self.length - len(ids), sampling.max_new_tokens
        if room < (requested or 1):
            fewer = ", or reduce max_new_tokens" if room > 0 else ""
            raise GenerationError(
                f"{name} has {len(ids)} tokens: with an answer of {requested or 1} it exceeds the cache length of "
                f"{self.length}. Shorten the prompt{fewer}; in Python, increase Generator(length=...)"
            )
        return requested or min(NEW_TOKENS, room)
