"""A whole data set on disk: scans, tables, labels, checksums; complete or not there at all.

DIR/phantoms.json             what this is: arguments, versions, conventions, counts
DIR/SHA256SUMS                of every other file (`sha256sum -c SHA256SUMS` checks them)
DIR/contact_sheet.png         what the scans look like
DIR/tokenizer.model           a SentencePiece model of 512 pieces, trained on the texts of train and on the prompts
DIR/scans/{train,test}/       PNG, JPEG, DICOM (files, and directories for volumes), NIfTI
DIR/{train,test}/             modality.csv diagnosis_yes_no.csv diagnosis.csv report.csv vqa.csv rationale.json
                              all.jsonl labels.jsonl
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import io
import json
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import sentencepiece

from input_pipeline.datasets import prompts
from input_pipeline.phantoms import drawing, files, sheet, tables
from input_pipeline.phantoms.plan import SPLITS, Study, describe

FORMAT = 2  # raise it when the same arguments give other bytes
CHUNK = 16
VOCABULARY = 512
CONVENTION = (
    "Every picture is hung as in radiology: the patient's left is on its right. CT and MRI are axial, front on top, "
    "slices from the feet to the head; X-rays are frontal. 'upper' and 'lower' mean halves of the picture."
)


def write(
    out: str | os.PathLike,
    train: int = 3000,
    test: int = 800,
    seed: int = 0,
    size: int = 128,
    volumes: float = 0.12,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Write a data set, or check the one that is there.

    The files are written to `out` + ".partial" and renamed when all are there: what is called `out` is complete. A
    partial directory left by a killed run is deleted and written anew. Bytes do not depend on the number of workers.

    Args:
      out: a directory that does not exist or is empty, or holds the same data set.
      train, test: number of scans.
      seed, size, volumes: as for `describe`.
      workers: processes; None = one for each core this process may use. Programs that call this with more than one need
        the `if __name__ == "__main__":` guard, as multiprocessing starts fresh interpreters.
      progress: called with the number of scans finished since the last call.

    Returns:
      The content of phantoms.json, plus `written`: False if the data set was there and all checksums agree.

    Raises:
      ValueError: bad arguments; `out` holds something else, another data set or damaged files; another run is at it.
      OSError: a file cannot be written; it is named.
    """
    if train < 0 or test < 0 or train + test == 0:
        raise ValueError(f"train {train}, test {test}: use 0 or more, and at least one scan")
    describe(seed, "train", 0, size, volumes)  # refuses bad arguments before anything is written
    out = Path(out)
    partial = out.parent / (out.name + ".partial")
    arguments = {"format": FORMAT, "train": train, "test": test, "seed": seed, "size": size, "volumes": volumes}

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _check_existing(out, arguments, progress)
    if partial.exists() and not (partial / ".phantoms").exists() and any(partial.iterdir()):
        raise ValueError(f"{partial} exists and was not made by this program: move it, or choose another directory")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        (partial / ".phantoms").touch()
        for entry in partial.iterdir():
            if entry.name != ".phantoms":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        summary = _write_all(partial, arguments, workers, progress)
        (partial / ".phantoms").unlink()
        os.rename(partial, out)
    return summary | {"written": True}


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Holds a lock on a directory, which the operating system drops when the process ends, however it ends."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another run is writing {directory}: wait for it, or end it first") from None
        yield
    finally:
        os.close(handle)


def _check_existing(out: Path, arguments: dict, progress) -> dict:
    try:
        summary = json.loads((out / "phantoms.json").read_text())
        found = summary["arguments"]
        sums = [line.split("  ", 1) for line in (out / "SHA256SUMS").read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out} exists and is no complete phantom data set ({error}): choose another --out") from error
    differences = [f"{k} {found.get(k)} there, {v} asked for" for k, v in arguments.items() if found.get(k) != v]
    if differences:
        raise ValueError(f"{out} holds another phantom data set ({', '.join(differences)}): choose another --out")
    bad = []
    for digest, name in sums:
        path = out / name
        if not path.is_file():
            bad.append(f"{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            bad.append(f"{name} has changed")
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise ValueError(f"{out} is damaged: {shown}; delete it and run again")
    if progress:
        progress(arguments["train"] + arguments["test"])
    return summary | {"written": False}


def _write_all(directory: Path, arguments: dict, workers: int | None, progress) -> dict:
    workers = workers or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    seed, size, volumes = (arguments[k] for k in ("seed", "size", "volumes"))
    chunks = [
        (str(directory), [(seed, split, i, size, volumes) for i in range(start, min(start + CHUNK, arguments[split]))])
        for split in SPLITS
        for start in range(0, arguments[split], CHUNK)
    ]
    for split in SPLITS:
        (directory / "scans" / split).mkdir(parents=True)
        (directory / split).mkdir()

    sums: list[tuple[str, str]] = []
    for done in _in_order(chunks, min(workers, len(chunks))):
        sums += [entry for study_sums in done for entry in study_sums]
        if progress:
            progress(len(done))

    counts = {}
    for split in SPLITS:
        studies = [describe(seed, split, i, size, volumes) for i in range(arguments[split])]
        for name, content in _tables(studies).items():
            sums.append(_save(directory, f"{split}/{name}", content))
        counts[split] = _counts(studies)
    sums.append(_save(directory, "tokenizer.model", _tokenizer(directory)))
    sums.append(_save(directory, "contact_sheet.png", sheet.contact_sheet(seed, size=size, volumes=volumes)))
    _save(directory, "SHA256SUMS", "".join(f"{digest}  {name}\n" for name, digest in sorted(sums)).encode())
    packages = ("numpy", "pillow", "nibabel", "pydicom", "sentencepiece")
    summary = {
        "what": "drawn phantoms with labels, for practice; no patients, no clinical meaning",
        "arguments": arguments,
        "convention": CONVENTION,
        "counts": counts,
        "files": len(sums),
        "versions": {p: importlib.metadata.version(p) for p in packages},
    }
    _save(directory, "phantoms.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _tokenizer(directory: Path) -> bytes:
    """A SentencePiece model in LLaMA's layout: `<unk>`, `<s>`, `</s>`, 256 bytes, then pieces."""
    texts = {sentence for group in prompts.load().values() for sentence in group}
    for line in (directory / "train" / "all.jsonl").read_text().splitlines():
        row = json.loads(line)
        texts |= {row[key].replace("<image-1>", "").strip() for key in ("instruction", "response")}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sorted(texts)),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        character_coverage=1.0,
        byte_fallback=True,
        num_threads=1,  # more would change its bytes
        minloglevel=2,
    )
    return model.getvalue()


def _in_order(chunks: list, workers: int) -> Iterator[list]:
    """Results of `_write_chunk` in the order of the chunks, at most a few chunks ahead of the slowest."""
    if workers <= 1:
        yield from map(_write_chunk, chunks)
        return
    context = multiprocessing.get_context("spawn")  # fork is unsafe beside the threads of a host program
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent) as pool:
        waiting = collections.deque()
        for chunk in chunks:
            waiting.append(pool.submit(_write_chunk, chunk))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _end_with_parent() -> None:
    """A worker whose parent is killed would wait for ever: end it."""

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_chunk(chunk) -> list[list[tuple[str, str]]]:
    directory, keys = chunk
    result = []
    for key in keys:
        study = describe(*key)
        contents = files.encode(study, drawing.to_stored(study, drawing.paint(study)))
        result.append([_save(Path(directory), name, content) for name, content in contents.items()])
    return result


def _save(directory: Path, name: str, content: bytes) -> tuple[str, str]:
    """Write a file; its name and SHA-256."""
    path = directory / name
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    except OSError as error:  # a full disk does not name the file by itself
        raise OSError(error.errno, f"{error.strerror}, writing {len(content)} bytes", str(path)) from error
    return name, hashlib.sha256(content).hexdigest()


def _tables(studies: list[Study]) -> dict[str, bytes]:
    rows = collections.defaultdict(list)
    for study in studies:
        for table, entries in tables.rows(study).items():
            rows[table] += entries
    contents = {}
    for table, columns in tables.COLUMNS.items():
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows[table])
        contents[f"{table}.csv"] = text.getvalue().encode()
    contents["rationale.json"] = (json.dumps(rows["rationale"], indent=1) + "\n").encode()
    contents["all.jsonl"] = _json_lines(rows["all"])
    contents["labels.jsonl"] = _json_lines(truth(study) for study in studies)
    return contents


def _json_lines(entries) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def truth(study: Study) -> dict:
    """A line of labels.jsonl: everything known about a phantom, for scoring and for looking at mistakes."""
    return {
        "study_id": study.study_id,
        "path": study.path,
        **dataclasses.asdict(study.labels),
        "diagnosis": study.labels.diagnosis,
        "file_format": study.file_format,
        "shape": [study.size, study.size, study.depth],
        "spacing": study.spacing,
        "lesions": [dataclasses.asdict(lesion) for lesion in study.lesions],
    }


def _counts(studies: list[Study]) -> dict[str, dict[str, int]]:
    def count(key):
        return dict(sorted(collections.Counter(map(key, studies)).items()))

    questions_of = collections.Counter()
    for study in studies:
        questions_of.update({table: len(entries) for table, entries in tables.rows(study).items()})
    solitary = collections.Counter(
        f"{s.labels.side} {s.labels.level} {s.labels.size}" for s in studies if s.labels.count == 1
    )
    return {
        "scans": {
            "all": len(studies),
            "2D": sum(s.depth == 1 for s in studies),
            "3D": sum(s.depth > 1 for s in studies),
        },
        "modality": count(lambda s: s.labels.modality),
        "file": count(lambda s: f"{s.file_format} {'2D' if s.depth == 1 else '3D'}"),
        "lesions": count(lambda s: str(s.labels.count)),
        "solitary": dict(sorted(solitary.items())),
        "rows": dict(questions_of),
    }
