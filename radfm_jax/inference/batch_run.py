"""Batch file -> answers file. A run can be stopped at any time and resumes when it is started again."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from input_pipeline.images.planes import Volume
from input_pipeline.samples import Scan
from radfm_jax.inference import inputs
from radfm_jax.inference.batch_files import BatchLine, existing_answers, locked_output, read_batch_file
from radfm_jax.inference.engine import Generator
from radfm_jax.inference.requests import Answer, EncodedScans, Prompt, Request, suspicious
from radfm_jax.inference.sampling import Sampling

CACHE_BYTES = 2**30  # visual tokens of 1,600 scans in float32 at full size


@dataclasses.dataclass(frozen=True)
class BatchResult:
    """Result of a batch run."""

    answered: int  # new answers
    existing: int  # lines that already had an answer
    failed: dict[str, str]  # id -> error
    seconds: float  # wall time
    suspicious: dict[str, str] = dataclasses.field(default_factory=dict)  # id -> why its answer looks wrong

    def summary(self) -> str:
        rate = self.answered / max(self.seconds, 1e-9)
        return (
            f"{self.answered} answers in {self.seconds:.1f} s ({rate:.2f} samples/s), {self.existing} existed, "
            f"{len(self.failed)} failed"
        )


def answer_file(
    generator: Generator,
    file: Path,
    out: Path,
    sampling: Sampling,
    *,
    root: Path | None = None,  # directory of relative scan paths; None: that of `file`
    roots: Mapping[str, Path] | None = None,  # data set -> root (read_batch_file)
    batch: int = 8,
    place: str = "first",  # see inputs.encode_prompt
    model: str = "",  # name of the model, recorded with each answer
    checkpoint: str = "",
    progress: Callable[[int, int, int], None] = lambda answered, failed, total: None,
    watch: Sequence[int] = (),  # see Generator.answers
    extra_fields: Callable[[str, Answer], dict] = lambda row_id, answer: {},
    reject_unknown_ids: bool = False,
    on_start: Callable[[], None] = lambda: None,
) -> BatchResult:
    """Answer all lines of a batch file that have no answer in `out`.

    Scans of the next batch are read while the device computes, and encoded scans are cached. Lines that fail are not
    written to `out`, so the next run tries them again.

    Args:
      checkpoint: digest of the weights (checkpoint.digest); "" if `model` identifies them.
      progress: called with the numbers of answered, failed and all lines of this run.
      extra_fields: function that returns additional fields for the line of an answer.
      reject_unknown_ids: raise if `out` has answers to ids that are not in `file`.
      on_start: called after all checks, before the first prompt.
    Raises:
      ValueError: see `read_batch_file`, `existing_answers` and `locked_output`; max_new_tokens exceeds the cache.
    """
    if (limit := sampling.max_new_tokens or 0) >= generator.length:
        raise ValueError(f"max_new_tokens is {limit}: it must be below the cache length of {generator.length}")
    made_with = _settings(generator, sampling, model, checkpoint, place)
    lines = {line.row_id: line for line in read_batch_file(file, (root or file.parent).absolute(), roots)}
    numbers = {row_id: number for number, row_id in enumerate(lines)}
    failed: dict[str, str] = {}
    odd: dict[str, str] = {}
    answered, start_time, cache = 0, time.perf_counter(), _ScanCache()
    with locked_output(out) as output, concurrent.futures.ThreadPoolExecutor(1) as reader:
        existing = existing_answers(out, made_with, lines, reject_unknown_ids)
        on_start()
        todo = [line for line in lines.values() if line.row_id not in existing]
        for members, loaded in _batches_with_scans(todo, generator, batch, reader, cache):
            prompts: dict[str, Prompt] = {}
            for line, encoded in zip(members, _encode_batch(generator, members, loaded, cache), strict=True):
                try:
                    if isinstance(encoded, ValueError):
                        raise encoded
                    (prompt,) = generator.prompts([_request(line, encoded, place)])
                    generator.token_limit(prompt, sampling)
                    prompts[line.row_id] = prompt
                except ValueError as error:
                    failed[line.row_id] = str(error)
            # The seed depends on the line alone, so that a resumed run gives the same answers.
            seeds = [(sampling.seed + numbers[row_id]) % 2**31 for row_id in prompts]
            answers = generator.answers(list(prompts.values()), sampling, seeds=seeds, watch=watch)
            for row_id, answer in zip(prompts, answers, strict=True):
                if answer.error:
                    failed[row_id] = answer.error
                    continue
                fields = _recorded(lines[row_id], answer) | extra_fields(row_id, answer) | {"made_with": made_with}
                output.write(json.dumps(fields, ensure_ascii=False) + "\n")
                answered += 1
                if reason := suspicious(answer):
                    odd[row_id] = reason
            output.flush()
            progress(answered, len(failed), len(todo))
    return BatchResult(answered, len(lines) - len(todo), failed, time.perf_counter() - start_time, odd)


def _request(line: BatchLine, scans: EncodedScans, place: str) -> Request:
    return Request(line.prompt, scans, line.context, place, line.system, line.history)


def _recorded(line: BatchLine, answer: Answer) -> dict:
    """Return the fields of an answer that do not depend on the caller."""
    echo = {key: value for key, value in line.echo().items() if key != "context" or value}
    return {
        "id": line.row_id, **echo, "answer": answer.text, "ended": answer.ended, "tokens": len(answer.ids),
        "logprob": sum(answer.logprobs),
    }  # fmt: skip


def model_name(directory: Path) -> str:
    """Return the name of a checkpoint for the records of answers: `finetune/checkpoints/1200`, or its directory's name.

    The name is for people. The digest identifies the weights, so answers and checkpoints can be moved.
    """
    parts = directory.resolve().parts
    return "/".join(parts[-3:] if parts[-2:-1] == ("checkpoints",) else parts[-1:])


def _settings(generator: Generator, sampling: Sampling, model: str, checkpoint: str, place: str) -> dict:
    """Return the settings that an answer depends on in addition to its line, as JSON restores them."""
    dtype, weights = generator.config.llama.dtype, generator.weights
    settings = {"model": model, "checkpoint": checkpoint, "dtype": dtype, "weights": weights}
    if generator.tokenizer is not None:
        settings["tokenizer"] = generator.tokenizer.fingerprint
    prepared = None if generator.preparation is None else generator.preparation.to_dict()
    settings |= {"place": place, "prepared": prepared, **dataclasses.asdict(sampling)}
    return json.loads(json.dumps(settings))


ScanState = list[Volume] | EncodedScans | ValueError  # read, encoded or failed


class _ScanCache:
    """Least-recently-used cache of visual tokens in host memory, by the scans of a line."""

    def __init__(self):
        self._entries: dict[tuple[Scan, ...], EncodedScans] = {}
        self._bytes = 0

    def add(self, scans: tuple[Scan, ...], encoded: EncodedScans) -> None:
        tokens = np.asarray(encoded.tokens)[: len(encoded)].copy()
        self._entries[scans] = EncodedScans(tokens, encoded.names)
        self._bytes += tokens.nbytes
        while self._bytes > CACHE_BYTES and len(self._entries) > 1:
            self._bytes -= self._entries.pop(next(iter(self._entries))).tokens.nbytes

    def get(self, scans: tuple[Scan, ...]) -> EncodedScans | None:
        encoded = self._entries.pop(scans, None)
        if encoded is not None:
            self._entries[scans] = encoded  # the most recent entry is the last one
        return encoded


def _batches_with_scans(
    todo: list[BatchLine], generator: Generator, batch: int, reader: concurrent.futures.Executor, cache: _ScanCache
) -> Iterator[tuple[list[BatchLine], dict[tuple[Scan, ...], ScanState]]]:
    """Yield batches of lines with their scans, each read once; the next batch is read meanwhile."""

    def read(scans: tuple[Scan, ...]) -> ScanState:
        try:
            if generator.preparation is None:
                raise ValueError("the preparation of scans is unknown for this model")
            return inputs.read_scans(scans, generator.preparation)
        except ValueError as error:
            return error

    pending: list[tuple[list, dict, concurrent.futures.Future]] = []
    for start in range(0, len(todo), batch):
        members = todo[start : start + batch]
        cached = {line.scans: cache.get(line.scans) for line in members if line.scans and not line.error}
        new = [scans for scans, encoded in cached.items() if encoded is None]
        pending.append((members, cached, reader.submit(lambda new=new: {s: read(s) for s in new})))
        if len(pending) > 1:
            members, cached, future = pending.pop(0)
            yield members, cached | future.result()
    for members, cached, future in pending:
        yield members, cached | future.result()


def _encode_batch(
    generator: Generator, members: list[BatchLine], loaded: dict[tuple[Scan, ...], ScanState], cache: _ScanCache
) -> list[EncodedScans | ValueError]:
    """Return the visual tokens of each line, or the error that prevents them."""
    names = {line.scans: [scan.path for scan in line.listed_scans] for line in members}
    new = []
    for scans, state in loaded.items():
        if isinstance(state, list):  # the previous batch may have encoded the same scans meanwhile
            loaded[scans] = cache.get(scans) or state
            new += [scans] if loaded[scans] is state else []

    def encode(*keys: tuple[Scan, ...]) -> None:
        encoded = generator.encode_volumes([loaded[k] for k in keys], [names[k] for k in keys])
        for key, tokens in zip(keys, encoded, strict=True):
            loaded[key] = tokens
            cache.add(key, tokens)

    try:
        encode(*new)
    except ValueError:  # some tokens are not finite: encode one line at a time to find out which
        for scans in new:
            try:
                encode(scans)
            except ValueError as error:
                loaded[scans] = error
    loaded[()] = generator.encode_volumes([[]])[0]
    return [ValueError(line.error) if line.error else loaded[line.scans] for line in members]
