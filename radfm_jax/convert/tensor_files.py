"""Reads and writes the weight files of the PyTorch world in the memory of one tensor.

Reading: torch's zip format (`.bin`, `.pt`, `.pth`), the zip around `pytorch_model.bin` in which RadFM's weights are
published, safetensors, and Hugging Face's sharded folders of either. Writing: torch's zip format and safetensors.

Nothing read here is trusted: a pickle goes through torch's restricted loader or not at all, names inside archives are
never used as paths, and every size is checked against the file before memory or disk is taken.

torch is imported only for its own format, so safetensors need no torch.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import json
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

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy and, through it, with safetensors)
import numpy as np
import safetensors

CHUNK_BYTES = 2**22
MAX_PICKLE_BYTES = 2**26  # the structure of 100,000 tensors is about 20 MB
MAX_INDEX_BYTES = 2**26
MAX_INFLATION = 100  # trained weights hardly compress; deflate reaches 1,032 on zeros
STORAGE_ALIGNMENT = 64  # torch's own, so that a mapped tensor starts on a cache line

# Name in numpy and torch: (code in safetensors, storage class in torch).
_DTYPES = {
    "bool": ("BOOL", "BoolStorage"),
    "uint8": ("U8", "ByteStorage"),
    "int8": ("I8", "CharStorage"),
    "int16": ("I16", "ShortStorage"),
    "int32": ("I32", "IntStorage"),
    "int64": ("I64", "LongStorage"),
    "uint16": ("U16", None),
    "uint32": ("U32", None),
    "uint64": ("U64", None),
    "float16": ("F16", "HalfStorage"),
    "bfloat16": ("BF16", "BFloat16Storage"),
    "float32": ("F32", "FloatStorage"),
    "float64": ("F64", "DoubleStorage"),
}
_ZIP_ERRORS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, RuntimeError,
    UnicodeDecodeError, OverflowError, OSError,
)  # fmt: skip

Index = tuple[slice, ...]
Progress = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of a tensor that has not been read; dtype bfloat16 is that of ml_dtypes."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# What a format's reader makes of a file: infos, ties, and for each name a function that reads a part of the tensor.
Contents = tuple[dict[str, TensorInfo], dict[str, str], dict[str, Callable[[Index], np.ndarray]]]


class TensorReader(contextlib.AbstractContextManager["TensorReader"]):
    """The tensors of a file or folder, read one at a time. Not for use from several threads at once.

    Attributes:
      path: the file that was opened; of a sharded folder, its index.
      infos: every tensor by name, in file order, tied ones included.
      ties: name -> first name with the very same values: one storage, offset and shape. Only torch's format has ties.
    """

    def __init__(
        self,
        path: Path,
        infos: dict[str, TensorInfo],
        ties: dict[str, str],
        readers: dict[str, Callable[[Index], np.ndarray]],
        resources: contextlib.ExitStack,
    ):
        self.path, self.infos, self.ties = path, infos, ties
        self._readers, self._resources = readers, resources

    def read(self, name: str, index: Index | None = None) -> np.ndarray:
        """Returns a tensor, or the part that `index` selects, as a contiguous array with its own memory.

        Args:
          name: a key of `infos`.
          index: slices of step 1 for the leading axes, as `jax.make_array_from_callback` passes them; None is all.

        Raises:
          ValueError: no such tensor, or an index of another kind.
        """
        if name not in self.infos:
            raise ValueError(f"{self.path} has no tensor {name!r}: it holds {len(self.infos)} others, see `infos`")
        shape, index = self.infos[name].shape, index or ()
        if len(index) > len(shape) or not all(isinstance(part, slice) and part.step in (None, 1) for part in index):
            raise ValueError(f"{self.path}: {name} of shape {shape} cannot be read at {index}: pass slices of step 1")
        bounds = [part.indices(size) for part, size in zip(index, shape, strict=False)]
        bounds += [(0, size, 1) for size in shape[len(index) :]]
        return self._readers[name](tuple(slice(start, max(start, stop)) for start, stop, _ in bounds))

    def close(self) -> None:
        self._resources.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


def open_tensors(
    path: str | os.PathLike[str],
    *,
    verify: bool = True,
    scratch: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> TensorReader:
    """Opens a weight file, a zip around `pytorch_model.bin`, a folder in Hugging Face layout, or its index.

    A zipped `pytorch_model.bin` is unpacked to an unnamed temporary file, which vanishes with the reader even when the
    process is killed.

    Args:
      path: the file or folder.
      verify: read a torch file once from end to end and compare the CRC-32 of every record. safetensors have none.
      scratch: folder to unpack in; by default that of the file or, where that has no room, the system's.
      progress: called with the number of bytes just unpacked or verified.

    Raises:
      ValueError: the file is missing, damaged, hostile or of an unsupported kind; the message says what to do.
      ImportError: a torch file, and torch >= 2.10 is not installed.
    """
    path = Path(path)
    if path.is_dir():
        path = _find_in_folder(path)
    if path.suffix == ".json":
        return _open_index(path, verify, scratch, progress)
    return _open_file(path, verify, scratch, progress)


def _find_in_folder(folder: Path) -> Path:
    """The safetensors of a folder or, without any, its torch file."""
    for whole, index in (("model.safetensors", "*.safetensors.index.json"), ("pytorch_model.bin", "*.bin.index.json")):
        found = [*folder.glob(whole), *sorted(folder.glob(index))]
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{folder} holds several sets of weights ({names}): pass the path of one of them")
        if found:
            return found[0]
    raise ValueError(
        f"{folder} has no model.safetensors, *.safetensors.index.json, pytorch_model.bin or *.bin.index.json: "
        "pass the path of the weight file itself"
    )


def _open_file(path: Path, verify: bool, scratch: Any, progress: Progress | None) -> TensorReader:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: check the path")
    with contextlib.ExitStack() as resources:
        file = resources.enter_context(open(path, "rb"))
        head = file.read(64)
        if head[:2] == b"PK":
            with _as_damage(path):
                archive = zipfile.ZipFile(file)
            if not _torch_roots(archive):
                _import_torch()  # before tens of gigabytes are unpacked for nothing
                file = resources.enter_context(_unpack(path, archive, scratch, progress))
            return TensorReader(path, *_open_torch(path, file, verify, progress), resources.pop_all())
        if path.suffix == ".safetensors" and not head.startswith(b"version https://git-lfs"):
            return TensorReader(path, *_open_safetensors(path, file), resources.pop_all())
    if not head:
        raise ValueError(f"{path} is empty: download or copy it again")
    if head[:1] == b"\x80":
        raise ValueError(
            f"{path} is in torch's legacy pickle format: load it where you trust it and save it again with a current "
            "torch.save, or as safetensors"
        )
    raise ValueError(
        f"{path} is neither a torch file nor safetensors but starts with {head[:24]!r}: a Git LFS pointer or an error "
        "page may have been saved in its place, download it again"
    )


@contextlib.contextmanager
def _as_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except _ZIP_ERRORS as error:
        raise ValueError(f"{path} is damaged or incomplete ({error}): download or copy it again") from error


# ---- torch's zip format ----------------------------------------------------------------------------------------------


def _import_torch() -> Any:
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


def _torch_roots(archive: zipfile.ZipFile) -> list[str]:
    return [name.removesuffix("data.pkl") for name in archive.namelist() if re.fullmatch("[^/]+/data.pkl", name)]


def _unpack(path: Path, archive: zipfile.ZipFile, scratch: Any, progress: Progress | None) -> BinaryIO:
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
        with _as_damage(path):
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
        with _as_damage(path):
            chunk = record.read(CHUNK_BYTES)
            done += len(chunk)
            if done > size or not chunk and done < size:
                raise zipfile.BadZipFile(f"{record.name!r} has {done:,} bytes, not the {size:,} announced")
        if not chunk:
            return
        yield chunk


def _open_torch(path: Path, file: BinaryIO, verify: bool, progress: Progress | None) -> Contents:
    """Reads the structure of a state dict; the values are read by position later.

    The documented way, `torch.load(mmap=True)`, maps the whole file privately and writably, which Linux refuses for a
    file larger than its memory (a 56 GB checkpoint on a 32 GB machine), and its resident pages grow with every tensor.
    `map_location="meta"` leaves the values where they are and says where: each place is compared with the zip
    directory before it is used.
    """
    torch = _import_torch()
    with _as_damage(path):
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
    roots = _torch_roots(archive)
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
    _refuse(path, "is not laid out as torch.save does", problems, "save it again with torch.save")


def _check_sums(path: Path, archive: zipfile.ZipFile, progress: Progress | None) -> None:
    if not any(entry.CRC for entry in archive.infolist()):
        raise ValueError(
            f"{path} was saved without checksums, so damage to it cannot be noticed: save it again with "
            "torch.serialization.set_crc32_options(True), or pass verify=False to take it as it is"
        )
    for entry in archive.infolist():
        with _as_damage(path):
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
        readers[name] = functools.partial(_read_strided, path, file, position, info.dtype, strides)
    _refuse(path, "holds values that are no plain tensors", problems, "save only the model's state_dict()")
    return infos, ties, readers


def _unsupported(name: Any, tensor: Any, places: dict[int, int], torch: Any) -> str | None:
    """Why an item of a state dict cannot be read, or None."""
    if not isinstance(name, str):
        return f"its name is a {type(name).__name__}"
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a {type(tensor).__name__}"
    if tensor.layout != torch.strided or tensor.is_quantized:
        return f"a tensor of layout {tensor.layout}, dtype {tensor.dtype}"
    if str(tensor.dtype).removeprefix("torch.") not in _DTYPES or tensor.is_neg():
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


def _read_strided(
    path: Path, file: BinaryIO, position: int, dtype: np.dtype, strides: tuple[int, ...], index: Index
) -> np.ndarray:
    """Reads a part of a (possibly strided) tensor; its position in the file and its strides are in bytes."""
    shape = tuple(part.stop - part.start for part in index)
    if 0 in shape:
        return np.empty(shape, dtype)
    start = position + sum(part.start * stride for part, stride in zip(index, strides, strict=True))
    span = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + dtype.itemsize
    buffer = np.empty(span, np.uint8)
    file.seek(start)
    if file.readinto(buffer) != span:
        raise ValueError(f"{path} ended before byte {start + span:,}: it was cut since it was opened: copy it again")
    return np.asarray(np.ndarray(shape, dtype, buffer, strides=strides), order="C")


# ---- safetensors and folders -----------------------------------------------------------------------------------------


def _open_safetensors(path: Path, file: BinaryIO) -> Contents:
    """Lets the library check the header and reads the values by position.

    The library itself either maps the file, whose resident pages then grow with every tensor, or reads a whole tensor
    for every part of one. The format has no gaps, so positions follow from sizes and order.
    """
    codes = {code: np.dtype(name) for name, (code, _) in _DTYPES.items()}
    infos, readers, problems = {}, {}, []
    file.seek(0)
    position = 8 + int.from_bytes(file.read(8), "little")
    try:
        with safetensors.safe_open(path, framework="numpy", backend="pread") as header:
            for name in header.offset_keys():
                part = header.get_slice(name)
                if part.get_dtype() not in codes:
                    problems.append(f"{name!r}: dtype {part.get_dtype()}")
                    continue
                infos[name] = info = TensorInfo(tuple(part.get_shape()), codes[part.get_dtype()])
                strides = tuple(step * info.dtype.itemsize for step in _row_major(info.shape))
                readers[name] = functools.partial(_read_strided, path, file, position, info.dtype, strides)
                position += info.nbytes
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file ({error}): download or copy it again") from error
    _refuse(path, "holds tensors of other dtypes", problems, f"convert them to one of {', '.join(_DTYPES)}")
    assert position == path.stat().st_size, (position, path)
    return infos, {}, readers


def _open_index(path: Path, verify: bool, scratch: Any, progress: Progress | None) -> TensorReader:
    """Opens all shards of a Hugging Face index; shards and index must agree on every tensor."""
    weight_map, root = _read_weight_map(path), path.parent
    shards = list(dict.fromkeys(weight_map.values()))
    outside = [f"{shard!r}" for shard in shards if not _is_inside(root, shard)]
    _refuse(path, f"names shards outside its folder {root}", outside, "put the files themselves into that folder")
    missing = [f"{shard!r}" for shard in shards if not (root / shard).is_file()]
    _refuse(path, "names shards that do not exist", missing, "download them")
    infos, ties, readers, problems, owner = {}, {}, {}, [], {}
    with contextlib.ExitStack() as resources:
        for shard in shards:
            reader = resources.enter_context(_open_file(root / shard, verify, scratch, progress))
            for name in reader.infos:
                if name in owner:
                    problems.append(f"{name!r} is in {owner[name]!r} and in {shard!r}")
                elif weight_map.get(name) != shard:
                    problems.append(f"{name!r} is in {shard!r} but the index says {weight_map.get(name)!r}")
                owner.setdefault(name, shard)
            promised = [name for name in weight_map if weight_map[name] == shard]
            problems += [f"{name!r} is not in {shard!r}" for name in promised if name not in reader.infos]
            infos |= reader.infos
            ties |= reader.ties
            readers |= reader._readers
        _refuse(path, "does not agree with its shards", problems, "download the shards and the index of one version")
        return TensorReader(path, infos, ties, readers, resources.pop_all())


def _read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name -> shard name."""
    if not path.is_file() or path.stat().st_size > MAX_INDEX_BYTES:
        raise ValueError(f"{path} is no file or has more than {MAX_INDEX_BYTES:,} bytes: pass the index of the shards")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): download it again") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{path} has no weight_map from tensor to file names: pass the index of the shards")
    return weight_map


def _is_inside(root: Path, name: str) -> bool:
    return "\0" not in name and (root / name).resolve().is_relative_to(root.resolve())


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _refuse(path: Path, what: str, problems: Sequence[str], remedy: str) -> None:
    if problems:
        raise ValueError(f"{path} {what}:\n  " + "\n  ".join(problems) + f"\nRemedy: {remedy}.")


# ---- writing ---------------------------------------------------------------------------------------------------------


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
    torch = _import_torch()
    problems = [f"{name!r}: dtype {info.dtype}" for name, info in infos.items() if not _storage_class(info)]
    problems += [
        f"{name!r} is tied to {owner!r}, which is missing, tied itself or of another shape or dtype"
        for name, owner in ties.items()
        if name not in infos or owner in ties or infos.get(owner) != infos[name]
    ]
    _refuse(path, "cannot hold these tensors", problems, "convert or untie them first")
    owners = [name for name in infos if name not in ties]
    pickled = _pickle_state(torch, infos, owners, ties)
    _check_room(path.parent, sum(infos[name].nbytes for name in owners) + len(pickled) + 512 * (len(owners) + 4))
    # torch.serialization.skip_data could lay the file out, but it is a prototype and leaves every CRC-32 to be patched
    # into the zip afterwards. The format itself has been stable since torch 1.6: these records, stored and aligned.
    with _all_or_nothing([path]) as (file,), zipfile.ZipFile(file, "w") as archive:
        for name, data in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            _add_record(file, archive, name, data)
        for key, name in enumerate(owners):
            _add_record(file, archive, f"data/{key}", _values(path, name, infos[name], read))
            if progress:
                progress(infos[name].nbytes)


def _storage_class(info: TensorInfo) -> str | None:
    return _DTYPES.get(info.dtype.name, (None, None))[1]


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
            layout = (0, shape, _row_major(shape))
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


def write_safetensors(
    directory: str | os.PathLike[str],
    infos: Mapping[str, TensorInfo],
    read: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int = 2**31,
    metadata: Mapping[str, str] | None = None,
    basename: str = "model",
    progress: Progress | None = None,
) -> None:
    """Writes `model.safetensors` or, beyond one shard, numbered shards and their index, in the memory of one tensor.

    The files appear under their names only when all are complete and on disk, the index last.

    Args:
      directory: the folder, made when missing.
      infos: name -> shape and dtype; shards are filled in this order.
      read: returns the values of a name; called once for each.
      max_shard_bytes: size of the tensors in a shard, which only a single larger tensor exceeds.
      metadata: texts to add to the header, beside {"format": "pt"}, without which transformers refuses the file.
      basename: "model" in `model-00001-of-00002.safetensors`.
      progress: called with the number of bytes just written.

    Raises:
      ValueError: files of this basename exist, the disk is too small, safetensors has no such dtype, or `read` returns
        another shape or dtype than announced.
    """
    directory = Path(directory)
    problems = [f"{name!r}: dtype {info.dtype}" for name, info in infos.items() if info.dtype.name not in _DTYPES]
    _refuse(directory, "cannot hold these tensors", problems, "convert them first")
    directory.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, TensorInfo]] = [{}]
    for name, info in infos.items():
        if shards[-1] and sum(i.nbytes for i in shards[-1].values()) + info.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = info
    index_path = directory / f"{basename}.safetensors.index.json"
    if len(shards) == 1:
        paths = [directory / f"{basename}.safetensors"]
    else:
        paths = [directory / f"{basename}-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    # One kind beside the other would leave two sets of weights in the folder.
    rivals = [index_path, directory / f"{basename}.safetensors", *directory.glob(f"{basename}-?????-of-*.safetensors")]
    _refuse_existing(rivals)
    total = sum(info.nbytes for info in infos.values())
    _check_room(directory, total + sum(512 + 2 * len(name) for name in infos) + 4096 * len(shards))
    targets = paths if len(shards) == 1 else [*paths, index_path]
    with _all_or_nothing(targets) as files:
        # The library writes a file from tensors that are all in memory; the format is short enough to stream.
        for path, file, shard in zip(paths, files, shards, strict=False):
            shard = dict(sorted(shard.items(), key=lambda item: -item[1].dtype.itemsize))  # keeps all values aligned
            file.write(_safetensors_header(shard, {"format": "pt", **(metadata or {})}))
            for name, info in shard.items():
                file.write(_values(path, name, info, read))
                if progress:
                    progress(info.nbytes)
        if len(shards) > 1:
            weight_map = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            files[-1].write(json.dumps(index, indent=2).encode())


def _safetensors_header(infos: Mapping[str, TensorInfo], metadata: Mapping[str, str]) -> bytes:
    """Length of the header (uint64, little-endian), then the header: JSON filled with spaces to a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, info in infos.items():
        begin, end = end, end + info.nbytes
        header[name] = {"dtype": _DTYPES[info.dtype.name][0], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _values(path: Path, name: str, info: TensorInfo, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The values of a tensor as uint8[nbytes]: bfloat16 arrays have no buffer interface of their own."""
    array = np.asarray(read(name), order="C")
    if array.shape != info.shape or array.dtype != info.dtype:
        raise ValueError(
            f"{path}: {name!r} was announced as {info.dtype}{list(info.shape)} but read as "
            f"{array.dtype}{list(array.shape)}: correct the one or the other"
        )
    return array.reshape(-1).view(np.uint8)


def _check_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(f"{folder} has {free:,} bytes free but {needed:,} are needed: free some or write elsewhere")


def _refuse_existing(paths: Sequence[Path]) -> None:
    existing = [str(path) for path in paths if os.path.lexists(path)]
    if existing:
        raise ValueError(f"{', '.join(existing)} already exist(s): remove what is there or write elsewhere")


@contextlib.contextmanager
def _all_or_nothing(paths: Sequence[Path]) -> Iterator[list[BinaryIO]]:
    """Opens a temporary file beside each path; gives them their names, in order, when the block ends well."""
    _refuse_existing(paths)
    temporary = [path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in paths]
    named: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "xb")) for path in temporary]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for source, path in zip(temporary, paths, strict=True):
            os.replace(source, path)
            named.append(path)
        folder = os.open(paths[0].parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        for path in (*temporary, *named):
            path.unlink(missing_ok=True)
        raise
