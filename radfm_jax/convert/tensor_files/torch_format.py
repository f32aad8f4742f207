"""torch's zip format: the file that `torch.save` writes of a state dict."""

import collections
import contextlib
import dataclasses
import functools
import io
import lzma
import math
import os
import pickle
import re
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from input_pipeline.files import atomic_write
from radfm_jax.convert.tensor_files import base
from radfm_jax.convert.tensor_files.base import DTYPES, Contents, Progress, TensorInfo, reject

CHUNK_BYTES = 2**22
MAX_PICKLE_BYTES = 2**26  # the structure of 100,000 tensors is about 20 MB
MAX_INFLATION = 100  # trained weights hardly compress; deflate reaches 1,032 on zeros
STORAGE_ALIGNMENT = 64  # as in torch: a mapped tensor starts on a cache line
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, RuntimeError,
    UnicodeDecodeError, OverflowError, OSError,
)  # fmt: skip


@contextlib.contextmanager
def zip_errors(path: Path) -> Iterator[None]:
    """Turn the errors that a damaged zip file causes into a ValueError."""
    try:
        yield
    except _ZIP_ERRORS as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}): download or copy it again") from error


# --- reading ----------------------------------------------------------------------------------------------------------


def import_torch() -> Any:
    """Import torch, or raise ImportError with the versions that are safe."""
    remedy = "pip install 'torch>=2.10', or convert the file to safetensors on another machine"
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"PyTorch's .bin files need torch: {remedy}") from error
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if release is None or tuple(map(int, release.groups())) < (2, 10):
        raise ImportError(
            f"torch {torch.__version__} is too old: before 2.10 a file could run code even through "
            f"torch.load(weights_only=True). {remedy}"
        )
    return torch


def torch_roots(archive: zipfile.ZipFile) -> list[str]:
    """Return the folders of an archive that contain a data.pkl; a torch file has one."""
    return [name.removesuffix("data.pkl") for name in archive.namelist() if re.fullmatch("[^/]+/data.pkl", name)]


def unpack(path: Path, archive: zipfile.ZipFile, scratch: Any, progress: Progress) -> BinaryIO:
    """Unpack the only pytorch_model.bin of an archive into an unnamed temporary file, up to its declared size."""
    entries = [entry for entry in archive.infolist() if entry.filename.rsplit("/", 1)[-1] == "pytorch_model.bin"]
    if len(entries) != 1:
        names = f" ({', '.join(repr(entry.filename) for entry in entries)})" if entries else ""
        raise ValueError(
            f"{path} is not a torch state dict and has {len(entries)} files named pytorch_model.bin{names}: unpack it "
            "and pass the path of the weights"
        )
    entry, size, packed = entries[0], entries[0].file_size, entries[0].compress_size
    if size > MAX_INFLATION * packed + CHUNK_BYTES:
        raise ValueError(
            f"{path}: {entry.filename!r} would grow from {packed:,} to {size:,} bytes, but weights barely "
            "compress: the file is damaged or meant to fill the disk; do not use it"
        )
    folders = [Path(scratch)] if scratch is not None else [path.parent, Path(tempfile.gettempdir())]
    free = {folder: shutil.disk_usage(folder).free for folder in folders if os.access(folder, os.W_OK)}
    folder = next((folder for folder in free if free[folder] > size), None)
    if folder is None:
        available = ", ".join(f"{n:,} bytes free in {f}" for f, n in free.items()) or f"no writable folder in {folders}"
        raise ValueError(f"{path}: unpacking needs {size:,} bytes, but found {available}: pass another scratch folder")
    with contextlib.ExitStack() as guard:
        file = guard.enter_context(tempfile.TemporaryFile(dir=folder))
        with zip_errors(path):
            source = guard.enter_context(archive.open(entry))
        for chunk in _chunks(path, source, size):
            file.write(chunk)
            progress(len(chunk))
        guard.pop_all()
    return file


def _chunks(path: Path, record: Any, size: int) -> Iterator[bytes]:
    """Yield the bytes of a record; zipfile compares the CRC-32 at its end."""
    done = 0
    while True:
        with zip_errors(path):
            chunk = record.read(CHUNK_BYTES)
            done += len(chunk)
            if done > size or not chunk and done < size:
                raise zipfile.BadZipFile(f"{record.name!r} has {done:,} bytes, not the declared {size:,}")
        if not chunk:
            return
        yield chunk


def open_torch(path: Path, file: BinaryIO, verify: bool, progress: Progress) -> Contents:
    """Read the structure of a state dict; values are read later, by position.

    The documented `torch.load(mmap=True)` maps the whole file privately and writably. Linux refuses that for a file
    larger than memory (a 56 GB checkpoint on a 32 GB machine), and resident memory grows with every tensor.
    `map_location="meta"` reads no values but returns their positions, which are compared with the zip directory.
    """
    torch = import_torch()
    with zip_errors(path):
        archive = zipfile.ZipFile(file)
        records = {_data_position(file, entry): entry.file_size for entry in archive.infolist()}
        _check_layout(path, file, archive)
    if verify:
        _check_sums(path, archive, progress)
    file.seek(0)
    try:
        state = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # a malicious pickle can make the loader raise any exception
        # torch's message suggests loading the file unsafely, so quote only the refused object.
        match = re.search(r"Unsupported (?:global|operand|class)[^.\n]*|GLOBAL [\w.]+", str(error))
        reason = match[0] if match else "the pickle has more than plain tensors"
        raise ValueError(
            f"{path} was refused by torch's safe loader ({type(error).__name__}: {reason}): it is damaged or "
            "contains objects other than tensors; get a file with the plain state dict, preferably safetensors"
        ) from error
    return _tensors_of_state(path, file, state, records, torch)


def _data_position(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    file.seek(entry.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + name_bytes + extra_bytes


def _check_layout(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Refuse layouts that torch.save never writes, so that torch's and Python's zip readers see the same records."""
    roots = torch_roots(archive)
    if len(roots) != 1:
        raise ValueError(f"{path} has {len(roots)} records */data.pkl, not one: save it again with torch.save")
    if min(entry.header_offset for entry in archive.infolist()) != 0:
        raise zipfile.BadZipFile("its first record does not start at byte 0")
    counts = collections.Counter(archive.namelist())
    problems = [f"{name!r} appears {count} times" for name, count in counts.items() if count > 1]
    problems += [f"{name!r} is outside {roots[0]!r}" for name in counts if not name.startswith(roots[0])]
    for entry in archive.infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            problems.append(f"{entry.filename!r} is compressed or encrypted")
    pickle_bytes = archive.getinfo(roots[0] + "data.pkl").file_size
    if pickle_bytes > MAX_PICKLE_BYTES:
        problems.append(f"its pickle has {pickle_bytes:,} bytes, more than the {MAX_PICKLE_BYTES:,} allowed")
    if counts[roots[0] + "byteorder"]:
        file.seek(_data_position(file, archive.getinfo(roots[0] + "byteorder")))
        if file.read(6) != b"little":
            problems.append("its values are not little-endian")
    reject(path, "is not laid out as by torch.save", problems, "save it again with torch.save")


def _check_sums(path: Path, archive: zipfile.ZipFile, progress: Progress) -> None:
    if not any(entry.CRC for entry in archive.infolist()):
        raise ValueError(
            f"{path} was saved without checksums, so damage cannot be detected: save it again with "
            "torch.serialization.set_crc32_options(True), or pass verify=False"
        )
    for entry in archive.infolist():
        with zip_errors(path):
            record = archive.open(entry)
        with record:
            for chunk in _chunks(path, record, entry.file_size):
                progress(len(chunk))


def _tensors_of_state(path: Path, file: BinaryIO, state: Any, records: dict[int, int], torch: Any) -> Contents:
    """Return the tensors of a state dict; `records` is position -> size of every record, both in bytes."""
    if not isinstance(state, dict):
        raise ValueError(f"{path} has a {type(state).__name__}, not a state dict: save model.state_dict()")
    has_tensors = lambda value: isinstance(value, dict) and any(torch.is_tensor(t) for t in value.values())  # noqa: E731
    nested = [key for key, value in state.items() if has_tensors(value)]
    if nested and not has_tensors(state):
        raise ValueError(
            f"{path} is a training checkpoint; its tensors are under {', '.join(map(repr, nested))}: save the "
            f"model's with torch.save(torch.load({path.name!r}, weights_only=True)[{nested[0]!r}], 'pytorch_model.bin')"
        )
    infos, ties, readers, problems, first = {}, {}, {}, [], {}
    for name, tensor in state.items():
        problem = _unsupported(name, tensor, records, torch)
        if problem:
            problems.append(f"{name!r}: {problem}")
            continue
        infos[name] = info = TensorInfo(tuple(tensor.shape), np.dtype(str(tensor.dtype).removeprefix("torch.")))
        strides = tuple(stride * info.dtype.itemsize for stride in tensor.stride())
        position = 0
        if info.nbytes:
            position = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * info.dtype.itemsize
            owner = first.setdefault((position, info, strides), name)
            if owner != name:
                ties[name] = owner
        readers[name] = functools.partial(base.read_strided, path, file, position, info.dtype, strides)
    reject(path, "has values that are not plain tensors", problems, "save only the model's state_dict()")
    return infos, ties, readers


def _unsupported(name: Any, tensor: Any, records: dict[int, int], torch: Any) -> str | None:
    """Return why an item of a state dict cannot be read, or None."""
    if not isinstance(name, str):
        return f"its name is a {type(name).__name__}"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"a tensor of layout {tensor.layout}, dtype {tensor.dtype}"
    if str(tensor.dtype).removeprefix("torch.") not in DTYPES or tensor.is_neg():
        return f"a tensor of dtype {tensor.dtype}" + (", lazily negated" if tensor.is_neg() else "")
    if not tensor.numel():
        return None
    storage = tensor.untyped_storage()
    size = records.get(getattr(storage, "_checkpoint_offset", None))
    steps = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + steps + 1) * tensor.itemsize
    if size is None or size != storage.nbytes() or end > size:
        return f"its {storage.nbytes():,} bytes do not match a record of the file"
    if tensor.numel() * tensor.itemsize > size:
        return f"an expanded tensor of shape {tuple(tensor.shape)} over {size:,} bytes"
    return None


# --- writing ----------------------------------------------------------------------------------------------------------


def write_torch_bin(
    path: str | os.PathLike[str],
    infos: Mapping[str, TensorInfo],  # in the order of the state dict, tied names included
    read: Callable[[str], np.ndarray],  # called once per name, in order, except for tied names
    *,
    ties: Mapping[str, str] | None = None,  # name -> name whose storage it shares
    progress: Progress = lambda done: None,
) -> None:
    """Write a state dict (an OrderedDict of tensors) as `torch.save` would, with one tensor in memory at a time.

    The write is atomic. The folder of `path` must exist.

    Raises:
      ValueError: the file exists, the disk is too small, torch does not support a dtype, ties are inconsistent, or
        `read` returns another shape or dtype than `infos`.
    """
    path, ties = Path(path), ties or {}
    torch = import_torch()
    problems = [f"{name!r}: dtype {info.dtype}" for name, info in infos.items() if not _storage_class(info)]
    problems += [
        f"{name!r} is tied to {owner!r}, which is missing, tied itself or has another shape or dtype"
        for name, owner in ties.items()
        if name not in infos or owner in ties or infos.get(owner) != infos[name]
    ]
    reject(path, "cannot hold these tensors", problems, "convert or untie them first")
    owners = [name for name in infos if name not in ties]
    pickled = _pickle_state(torch, infos, owners, ties)
    base.check_room(path.parent, sum(infos[name].nbytes for name in owners) + len(pickled) + 512 * (len(owners) + 4))
    base.refuse_existing([path])
    # torch.serialization.skip_data is a prototype, and every CRC-32 would have to be patched into the zip afterwards.
    # The format has been stable since torch 1.6: these records, stored and aligned.
    with atomic_write(path) as partial, open(partial, "wb") as file, zipfile.ZipFile(file, "w") as archive:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            _add_record(file, archive, name, data)
        for key, name in enumerate(owners):
            _add_record(file, archive, f"data/{key}", base.values(path, name, infos[name], read))
            progress(infos[name].nbytes)


def _storage_class(info: TensorInfo) -> str | None:
    return DTYPES.get(info.dtype.name, (None, None))[1]


def _pickle_state(torch: Any, infos: Mapping[str, TensorInfo], owners: Sequence[str], ties: Mapping[str, str]) -> bytes:
    """Return the record data.pkl: an OrderedDict of tensors whose storages are named by their position in `owners`."""

    @dataclasses.dataclass(frozen=True)
    class Storage:
        key: str
        info: TensorInfo

    @dataclasses.dataclass(frozen=True)
    class Tensor:
        storage: Storage

        def __reduce__(self) -> tuple[Any, ...]:
            shape = self.storage.info.shape
            state = (self.storage, 0, shape, base.row_major(shape), False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, state

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
            if not isinstance(obj, Storage):
                return None
            return "storage", getattr(torch, _storage_class(obj.info)), obj.key, "cpu", math.prod(obj.info.shape)

    tensors = {name: Tensor(Storage(str(key), infos[name])) for key, name in enumerate(owners)}
    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(collections.OrderedDict((name, tensors[ties.get(name, name)]) for name in infos))
    return buffer.getvalue()


def _add_record(file: BinaryIO, archive: zipfile.ZipFile, name: str, data: bytes | np.ndarray) -> None:
    """Store a record whose data is aligned to STORAGE_ALIGNMENT by an extra field, as torch does ("FB")."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    zip64_bytes = 20  # size of the field that force_zip64 adds
    padding = -(file.tell() + 30 + len(entry.filename) + zip64_bytes + 4) % STORAGE_ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(entry, "w", force_zip64=True) as record:
        record.write(data)
