"""Writes a phantom data set: scans, tables, labels and checksums. The directory is complete or absent.

DIR/phantoms.json             arguments, package versions, conventions, counts
DIR/SHA256SUMS                checksums of all other files, for `sha256sum -c SHA256SUMS`
DIR/contact_sheet.png         examples of every modality
DIR/tokenizer.model           SentencePiece model with 512 pieces, trained on the texts of train and on the prompts
DIR/scans/SPLIT/              PNG, JPEG, DICOM (files, and directories for volumes), NIfTI
DIR/SPLIT/                    modality.csv diagnosis_yes_no.csv diagnosis.csv report.csv vqa.csv rationale.json
                              all.jsonl labels.jsonl
SPLIT is train, validation or test; splits without scans have no directories.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import sentencepiece

from input_pipeline.datasets import prompts
from input_pipeline.files import PARTIAL, parse_json, read_json, sha256_of_file, try_lock
from input_pipeline.parallel.resilient_pool import ResilientPool, no_state
from input_pipeline.parallel.workers import available_cpus, heartbeat
from input_pipeline.phantoms import drawing, formats, sheet, tables
from input_pipeline.phantoms.plan import SPLITS, Study, describe

FORMAT = 2  # increase it when the same arguments give different bytes
CHUNK = 16
TIMEOUT = 300.0  # seconds for one phantom
MARKER = ".phantoms"  # marks an incomplete directory of this program
VOCABULARY = 512
CONVENTION = (
    "Every picture is hung as in radiology: the patient's left is on its right. CT and MRI are axial, front on top, "
    "slices from the feet to the head; X-rays are frontal. 'upper' and 'lower' mean halves of the picture."
)


def write(
    out: str | os.PathLike,
    train: int = 3000,
    test: int = 800,
    validation: int = 0,
    seed: int = 0,
    size: int = 128,
    volumes: float = 0.12,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict:
    """Write a data set, or verify an existing one.

    Files are written to `out` + ".partial", which is renamed when it is complete. A partial directory of a killed run
    is deleted first. The bytes do not depend on the number of workers.

    Args:
      out: a directory that is absent, is empty, or has the same data set.
      train, test, validation: number of scans.
      seed, size, volumes: as for `describe`.
      workers: number of processes; None: all cores. With more than one, a calling script needs the
        `if __name__ == "__main__":` guard, because multiprocessing starts new interpreters.
      progress: called with the number of scans finished since the last call.
    Returns:
      The content of phantoms.json, and `written`: False if the data set existed and all checksums agree.
    Raises:
      ValueError: an argument is invalid; `out` has unrelated, different or damaged files; another run is writing it.
      OSError: a file cannot be written.
    """
    counts = {"train": train, "validation": validation, "test": test}
    if min(counts.values()) < 0 or not any(counts.values()):
        listed = ", ".join(f"{split} {count}" for split, count in counts.items())
        raise ValueError(f"{listed}: all must be 0 or more, with at least one scan in total")
    describe(seed, "train", 0, size, volumes)  # raises for invalid arguments before anything is written
    out = Path(out)
    partial = out.parent / (out.name + PARTIAL)
    arguments = {"format": FORMAT, "train": train, "test": test, "seed": seed, "size": size, "volumes": volumes}
    if validation:  # absent in the data sets of earlier versions
        arguments["validation"] = validation

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _check_existing(out, arguments, progress)
    if partial.exists() and not (partial / MARKER).exists() and any(partial.iterdir()):
        raise ValueError(f"{partial} was not made by this program: move it, or choose another --out")
    partial.mkdir(parents=True, exist_ok=True)
    with _locked(partial):
        (partial / MARKER).touch()
        for entry in partial.iterdir():
            if entry.name != MARKER:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        summary = _write_all(partial, arguments, workers, progress)
        (partial / MARKER).unlink()
        os.rename(partial, out)
    return summary | {"written": True}


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Lock the directory itself, without a lock file, because it will be renamed."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        if not try_lock(handle):
            raise ValueError(f"another run is writing {directory}: wait for it, or stop it first")
        yield
    finally:
        os.close(handle)


def _check_existing(out: Path, arguments: dict, progress) -> dict:
    """Verify that a directory has the data set of these arguments, undamaged. Returns its summary."""
    try:
        summary = read_json(out / "phantoms.json", kind=dict)
        existing = summary["arguments"]
        checksums = [line.split("  ", 1) for line in (out / "SHA256SUMS").read_text().splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{out} is not a complete phantom data set ({error}): choose another --out") from error
    differences = [
        f"{k} is {existing.get(k, 0)}, not {arguments.get(k, 0)}"
        for k in dict.fromkeys([*arguments, *existing])
        if existing.get(k) != arguments.get(k)
    ]
    if differences:
        raise ValueError(f"{out} has another phantom data set ({', '.join(differences)}): choose another --out")
    bad = []
    for digest, name in checksums:
        if not (out / name).is_file():
            bad.append(f"{name} is missing")
        elif sha256_of_file(out / name) != digest:
            bad.append(f"{name} has changed")
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise ValueError(f"{out} is damaged: {shown}; delete it and run again")
    if progress:
        progress(sum(arguments.get(split, 0) for split in SPLITS))
    return summary | {"written": False}


def _write_all(directory: Path, arguments: dict, workers: int | None, progress) -> dict:
    seed, size, volumes = (arguments[k] for k in ("seed", "size", "volumes"))
    # Earlier versions had directories of an empty train or test split, too.
    splits = [split for split in SPLITS if split in arguments]
    keys = [(seed, split, i, size, volumes) for split in splits for i in range(arguments[split])]
    for split in splits:
        (directory / "scans" / split).mkdir(parents=True)
        (directory / split).mkdir()

    checksums: list[tuple[str, str]] = []  # name, SHA-256
    processes = min(workers or available_cpus(), -(-len(keys) // CHUNK))
    with ResilientPool(no_state, 0 if processes == 1 else processes, TIMEOUT) as pool:
        for chunk, results in pool.map(_write_scans, keys, CHUNK, directory, label=_label, failed=_raise_failed):
            checksums += [entry for study in results for entry in study]
            if progress:
                progress(len(chunk))

    counts = {}
    for split in splits:
        studies = [describe(seed, split, i, size, volumes) for i in range(arguments[split])]
        for name, content in _tables(studies).items():
            checksums.append(_save(directory, f"{split}/{name}", content))
        counts[split] = _counts(studies)
    checksums.append(_save(directory, "tokenizer.model", _tokenizer(directory)))
    checksums.append(_save(directory, "contact_sheet.png", sheet.contact_sheet(seed, size=size, volumes=volumes)))
    _save(directory, "SHA256SUMS", "".join(f"{digest}  {name}\n" for name, digest in sorted(checksums)).encode())
    packages = ("numpy", "pillow", "nibabel", "pydicom", "sentencepiece")
    summary = {
        "what": "drawn phantoms with labels, for practice; no patients, no clinical meaning",
        "arguments": arguments,
        "convention": CONVENTION,
        "counts": counts,
        "files": len(checksums),
        "versions": {p: importlib.metadata.version(p) for p in packages},
    }
    _save(directory, "phantoms.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _tokenizer(directory: Path) -> bytes:
    """Train a SentencePiece model in LLaMA's layout: `<unk>`, `<s>`, `</s>`, 256 bytes, then pieces."""
    texts = {sentence for group in prompts.load().values() for sentence in group}
    for line in (directory / "train" / "all.jsonl").read_text().splitlines():
        row = parse_json(line)
        texts |= {row[key].replace("<image-1>", "").strip() for key in ("instruction", "response")}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sorted(texts)),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        character_coverage=1.0,
        byte_fallback=True,
        num_threads=1,  # more threads would change the bytes
        minloglevel=2,
    )
    return model.getvalue()


def _write_scans(state, keys: list[tuple], directory: Path) -> list[list[tuple[str, str]]]:
    """Draw and write phantoms. Returns (name, SHA-256) of the files of each."""
    checksums = []
    for key in keys:
        heartbeat(_label(key))
        study = describe(*key)
        contents = formats.encode(study, drawing.to_stored(study, drawing.paint(study)))
        checksums.append([_save(directory, name, content) for name, content in contents.items()])
    return checksums


def _label(key: tuple) -> str:
    return f"phantom {key[2]} of {key[1]}"


def _raise_failed(key: tuple, reason: str):
    raise OSError(f"{_label(key)} was not written: {reason}")


def _save(directory: Path, name: str, content: bytes) -> tuple[str, str]:
    """Write a file. Returns its name and SHA-256."""
    path = directory / name
    try:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    except OSError as error:  # a full disk does not name the file
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
    """Return a line of labels.jsonl: everything known about a phantom, for scoring and for error analysis."""
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

    row_counts = collections.Counter()
    for study in studies:
        row_counts.update({table: len(entries) for table, entries in tables.rows(study).items()})
    flat, one_lesion = sum(s.depth == 1 for s in studies), [s.labels for s in studies if s.labels.count == 1]
    solitary = collections.Counter(f"{labels.side} {labels.level} {labels.size}" for labels in one_lesion)
    return {
        "scans": {"all": len(studies), "2D": flat, "3D": len(studies) - flat},
        "modality": count(lambda s: s.labels.modality),
        "file": count(lambda s: f"{s.file_format} {'2D' if s.depth == 1 else '3D'}"),
        "lesions": count(lambda s: str(s.labels.count)),
        "solitary": dict(sorted(solitary.items())),
        "rows": dict(row_counts),
    }
