"""torch's zip format: what `torch.save` makes of a state dict."""

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

from radfm_jax.convert.tensor_files.base import DTYPES, Contents, Progress, TensorInfo, read_strided, refuse, row_major
from radfm_jax.convert.tensor_files.writing import all_or_nothing, check_room, values

CHUNK_BYTES = 2**22
MAX_PICKLE_BYTES = 2**26  # the structure of 100,000 tensors is about 20 MB
MAX_INFLATION = 100  # trained weights hardly compress; deflate reaches 1,032 on zeros
STORAGE_ALIGNMENT = 64  # torch's own, so that a mapped tensor starts on a cache line
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, RuntimeError,
    UnicodeDecodeError, OverflowError, OSError,
)  # fmt: skip


@contextlib.contextmanager
def as_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except _ZIP_ERRORS as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}): download or copy it again") from error


# --- reading ----------------------------------------------------------------------------------------------------------


def import_torch() -> Any:
    remedy = "pip install 'torch>=2.10', or convert the file to safetensors elsewhere"
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"PyTorch's .bin files need torch: {remedy}") from error
    release = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if release is None or tuple(map(int, release.groups())) < (2, 10):
        raise ImportError(
            f"torch {torch.__version__} is too old: before 2.10 even torch.load(weights_only=True) could be made to "
            f"run code from a file. {remedy}"
        )
    return torch


def torch_roots(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix("data.pkl") for name in archive.namelist() if re.fullmatch("[^/]+/data.pkl", name)]


def unpack(path: Path, archive: zipfile.ZipFile, scratch: Any, progress: Progress | None) -> BinaryIO:
    """Unpacks the one pytorch_model.bin into an unnamed temporary file, never more bytes than are announced."""
    found = [entry for entry in archive.infolist() if entry.filename.rsplit("/", 1)[-1] == "pytorch_model.bin"]
    if len(found) != 1:
        names = f" ({', '.join(repr(entry.filename) for entry in found)})" if found else ""
        raise ValueError(
            f"{path} is no torch state dict and holds {len(found)} files named pytorch_model.bin{names}: unpack it and "
            "pass the path of the weights"
        )
    entry, size, packed = found[0], found[0].file_size, found[0].compress_size
    if size > MAX_INFLATION * packed + CHUNK_BYTES:
        raise ValueError(
            f"{path}: {entry.filename!r} would grow from {packed:,} to {size:,} bytes, which weights never do: "
            "the file is damaged or made to fill the disk, do not use it"
        )
    folders = [Path(scratch)] if scratch is not None else [path.parent, Path(tempfile.gettempdir())]
    free = {folder: shutil.disk_usage(folder).free for folder in folders if os.access(folder, os.W_OK)}
    folder = next((folder for folder in free if free[folder] > size), None)
    if folder is None:
        seen = ", ".join(f"{room:,} bytes free in {f}" for f, room in free.items()) or f"no writable one in {folders}"
        raise ValueError(f"{path}: unpacking needs {size:,} bytes, there is {seen}: pass a scratch folder with room")
    with contextlib.ExitStack() as guard:
        file = guard.enter_context(tempfile.TemporaryFile(dir=folder))
        with as_damage(path):
            source = guard.enter_context(archive.open(entry))
        for chunk in _chunks(path, source, size):
            file.write(chunk)
            if progress:
                progress(len(chunk))
        guard.pop_all()
    return file


def _chunks(path: Path, record: Any, size: int) -> Iterator[bytes]:
    """The bytes of a record, of which zipfile compares the CRC-32 at the end."""
    done = 0
    while True:
        with as_damage(path):
            chunk = record.read(CHUNK_BYTES)
            done += len(chunk)
            if done > size or not chunk and done < size:
                raise zipfile.BadZipFile(f"{record.name!r} has {done:,} bytes, not the {size:,} announced")
        if not chunk:
            return
        yield chunk


def open_torch(path: Path, file: BinaryIO, verify: bool, progress: Progress | None) -> Contents:
    """Reads the structure of a state dict; the values are read by position later.

    The documented way, `torch.load(mmap=True)`, maps the whole file privately and writably, which Linux refuses for a
    file larger than its memory (a 56 GB checkpoint on a 32 GB machine), and its resident pages grow with every tensor.
    `map_location="meta"` leaves the values where they are and says where: each place is compared with the zip
    directory before it is used.
    """
    torch = import_torch()
    with as_damage(path):
        archive = zipfile.ZipFile(file)
        places = {_data_position(file, entry): entry.file_size for entry in archive.infolist()}
        _check_layout(path, file, archive)
    if verify:
        _check_sums(path, archive, progress)
    file.seek(0)
    try:
        state = torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # whatever a hostile pickle makes the loader raise; there is no second, unsafe try
        # Only what it met, never torch's own advice to load the file unsafely.
        met = re.search(r"Unsupported (?:global|operand|class)[^.\n]*|GLOBAL [\w.]+", str(error))
        reason = met[0] if met else "the pickle is not one of plain tensors"
        raise ValueError(
            f"{path} was refused by torch's safe loader ({type(error).__name__}: {reason}): it is damaged or holds "
            "more than tensors; get a file with the plain state dict, best as safetensors"
        ) from error
    return _tensors_of_state(path, file, state, places, torch)


def _data_position(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    file.seek(entry.header_offset + 26)
    name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
    return entry.header_offset + 30 + name_bytes + extra_bytes


def _check_layout(path: Path, file: BinaryIO, archive: zipfile.ZipFile) -> None:
    """Refuses what torch.save never writes, so that torch's zip reader and Python's see one and the same file."""
    roots = torch_roots(archive)
    if len(roots) != 1:
        raise ValueError(f"{path} has {len(roots)} records */data.pkl, not one: save it again with torch.save")
    if min(entry.header_offset for entry in archive.infolist()) != 0:
        raise zipfile.BadZipFile("its first record is not at its beginning")
    counts = collections.Counter(archive.namelist())
    problems = [f"{name!r} appears {count} times" for name, count in counts.items() if count > 1]
    problems += [f"{name!r} lies outside {roots[0]!r}" for name in counts if not name.startswith(roots[0])]
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
    refuse(path, "is not laid out as torch.save does", problems, "save it again with torch.save")


def _check_sums(path: Path, archive: zipfile.ZipFile, progress: Progress | None) -> None:
    if not any(entry.CRC for entry in archive.infolist()):
        raise ValueError(
            f"{path} was saved without checksums, so damage to it cannot be noticed: save it again with "
            "torch.serialization.set_crc32_options(True), or pass verify=False to take it as it is"
        )
    for entry in archive.infolist():
        with as_damage(path):
            record = archive.open(entry)
        with record:
            for chunk in _chunks(path, record, entry.file_size):
                if progress:
                    progress(len(chunk))


def _tensors_of_state(path: Path, file: BinaryIO, state: Any, places: dict[int, int], torch: Any) -> Contents:
    """The tensors of a state dict; `places` is position in the file -> size, both in bytes, of every record."""
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, not a state dict: save model.state_dict()")
    infos, ties, readers, problems, first = {}, {}, {}, [], {}
    for name, tensor in state.items():
        problem = _unsupported(name, tensor, places, torch)
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
        readers[name] = functools.partial(read_strided, path, file, position, info.dtype, strides)
    refuse(path, "holds values that are no plain tensors", problems, "save only the model's state_dict()")
    return infos, ties, readers


def _unsupported(name: Any, tensor: Any, places: dict[int, int], torch: Any) -> str | None:
    """Why an item of a state dict cannot be read, or None."""
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
    room = places.get(getattr(storage, "_checkpoint_offset", None))
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    end = (tensor.storage_offset() + steps + 1) * tensor.itemsize
    if room is None or room != storage.nbytes() or end > room:
        return f"its {storage.nbytes():,} bytes are not those of a record of the file"
    if tensor.numel() * tensor.itemsize > room:
        return f"an expanded tensor of shape {tuple(tensor.shape)} over {room:,} bytes"
    return None


# --- writing ----------------------------------------------------------------------------------------------------------


def write_torch_bin(
    path: str | os.PathLike[str],
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    *,
    ties: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a state dict (an OrderedDict of tensors) as `torch.save` would, in the memory of one tensor.

    The file appears under its name only when it is complete and on disk.

    Args:
      path: the file to write; its folder exists.
      infos: name -> shape and dtype, in the order of the state dict, tied names included.
      read: returns the values of a name; called once for each, in order, except for tied names.
      ties: name -> name whose storage it shares.
      progress: called with the number of bytes just written.

    Raises:
      ValueError: the file exists, the disk is too small, torch has no such dtype, ties do not fit, or `read` returns
        another shape or dtype than announced.
    """
    path, ties = Path(path), ties or {}
    torch = import_torch()
    problems = [f"{name!r}: dtype {info.dtype}" for name, info in infos.items() if not _storage_class(info)]
    problems += [
        f"{name!r} is tied to {owner!r}, which is missing, tied itself or of another shape or dtype"
        for name, owner in ties.items()
        if name not in infos or owner in ties or infos.get(owner) != infos[name]
    ]
    refuse(path, "cannot hold these tensors", problems, "convert or untie them first")
    owners = [name for name in infos if name not in ties]
    pickled = _pickle_state(torch, infos, owners, ties)
    check_room(path.parent, sum(infos[name].nbytes for name in owners) + len(pickled) + 512 * (len(owners) + 4))
    # torch.serialization.skip_data could lay the file out, but it is a prototype and leaves every CRC-32 to be patched
    # into the zip afterwards. The format itself has been stable since torch 1.6: these records, stored and aligned.
    with all_or_nothing([path]) as (file,), zipfile.ZipFile(file, "w") as archive:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            _add_record(file, archive, name, data)
        for key, name in enumerate(owners):
            _add_record(file, archive, f"data/{key}", values(path, name, infos[name], read))
            if progress:
                progress(infos[name].nbytes)


def _storage_class(info: TensorInfo) -> str | None:
    return DTYPES.get(info.dtype.name, (None, None))[1]


def _pickle_state(torch: Any, infos: Mapping[str, TensorInfo], owners: Sequence[str], ties: Mapping[str, str]) -> bytes:
    """The record data.pkl: an OrderedDict of tensors whose storages are named by their position in `owners`."""

    @dataclasses.dataclass(frozen=True)
    class Storage:
        key: str
        info: TensorInfo

    @dataclasses.dataclass(frozen=True)
    class Tensor:
        storage: Storage

        def __reduce__(self) -> tuple[Any, ...]:
            shape = self.storage.info.shape
            layout = (0, shape, row_major(shape))
            return torch._utils._rebuild_tensor_v2, (self.storage, *layout, False, collections.OrderedDict())

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
    """Stores a record whose data starts on STORAGE_ALIGNMENT, by an extra field of torch's kind ("FB")."""
    entry = zipfile.ZipInfo(f"archive/{name}")
    zip64_bytes = 20  # force_zip64 gives every record this field, whatever its size
    padding = -(file.tell() + 30 + len(entry.filename) + zip64_bytes + 4) % STORAGE_ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(entry, "w", force_zip64=True) as record:
        record.write(data)
