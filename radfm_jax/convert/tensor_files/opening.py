"""Opening of weight files and folders of any format."""

import contextlib
import os
import re
import zipfile
from pathlib import Path
from typing import Any

from input_pipeline.files import read_json
from radfm_jax.convert.tensor_files.base import Progress, TensorReader, reject
from radfm_jax.convert.tensor_files.safetensors_format import open_safetensors
from radfm_jax.convert.tensor_files.torch_format import import_torch, open_torch, torch_roots, unpack, zip_errors

MAX_INDEX_BYTES = 2**26
_DEEPSPEED = (
    "join its shards with the zero_to_fp32.py that DeepSpeed saved next to them (python zero_to_fp32.py . "
    "pytorch_model.bin), and pass the result"
)
_DISTRIBUTED = (
    "join its shards with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin`, "
    "and pass the result"
)


def open_tensors(
    path: str | os.PathLike[str],
    *,
    verify: bool = True,  # read a torch file once and compare the CRC-32 of every record; safetensors have none
    scratch: str | os.PathLike[str] | None = None,  # default: the file's folder or, if its disk is too small, $TMPDIR
    progress: Progress = lambda done: None,  # called for bytes that are unpacked or verified
) -> TensorReader:
    """Open a weight file, a zip around `pytorch_model.bin`, a folder in Hugging Face layout, or its index.

    A zipped `pytorch_model.bin` is unpacked to an unnamed temporary file, which the kernel deletes when the reader is
    closed or the process is killed.

    Raises:
      ValueError: the file is missing, damaged, hostile or of an unsupported kind; the message has the remedy.
      ImportError: a torch file, and torch >= 2.10 is not installed.
    """
    path = Path(path)
    if path.is_dir():
        path = _find_in_folder(path)
    elif re.fullmatch(r"(zero_pp_rank|mp_rank|bf16_zero_pp_rank)_.*_states\.pt", path.name):
        raise ValueError(f"{path} is a shard of a DeepSpeed checkpoint: {_DEEPSPEED}")
    open_path = _open_index if path.suffix == ".json" else _open_file
    return open_path(path, verify, scratch, progress)


def _find_in_folder(folder: Path) -> Path:
    """Return the safetensors of a folder or, if it has none, its torch file."""
    for single, index in (("model.safetensors", "*.safetensors.index.json"), ("pytorch_model.bin", "*.bin.index.json")):
        files = [*folder.glob(single), *sorted(folder.glob(index))]
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"{folder} has several sets of weights ({names}): pass the path of one of them")
        if files:
            return files[0]
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("*_states.pt")) or any(folder.glob("*/*_states.pt")):
        raise ValueError(f"{folder} is a DeepSpeed checkpoint: {_DEEPSPEED}")
    if any(folder.glob("*.distcp")):
        raise ValueError(f"{folder} is a checkpoint of torch.distributed: {_DISTRIBUTED}")
    raise ValueError(
        f"{folder} has no model.safetensors, *.safetensors.index.json, pytorch_model.bin or *.bin.index.json: "
        "pass the path of the weight file itself"
    )


def _open_file(path: Path, verify: bool, scratch: Any, progress: Progress) -> TensorReader:
    if not path.is_file():
        raise ValueError(f"{path} is not a file: check the path")
    with contextlib.ExitStack() as resources:
        file = resources.enter_context(open(path, "rb"))
        head = file.read(64)
        if head[:2] == b"PK":
            with zip_errors(path):
                archive = zipfile.ZipFile(file)
            if not torch_roots(archive):
                import_torch()  # fail before unpacking tens of gigabytes
                file = resources.enter_context(unpack(path, archive, scratch, progress))
            return TensorReader(path, *open_torch(path, file, verify, progress), resources.pop_all())
        if path.suffix == ".safetensors" and not head.startswith(b"version https://git-lfs"):
            return TensorReader(path, *open_safetensors(path, file), resources.pop_all())
    if not head:
        raise ValueError(f"{path} is empty: download or copy it again")
    if head[:1] == b"\x80":
        raise ValueError(
            f"{path} is in torch's legacy pickle format: load it on a machine where you trust it and save it again "
            "with a current torch.save, or as safetensors"
        )
    raise ValueError(
        f"{path} is neither a torch file nor safetensors but starts with {head[:24]!r}: it may be a Git LFS pointer or "
        "an error page; download it again"
    )


def _open_index(path: Path, verify: bool, scratch: Any, progress: Progress) -> TensorReader:
    """Open all shards of a Hugging Face index. Shards and index must agree on every tensor."""
    weight_map, root = _read_weight_map(path), path.parent
    shards = list(dict.fromkeys(weight_map.values()))
    inside = {s for s in shards if "\0" not in s and (root / s).resolve().is_relative_to(root.resolve())}
    outside = [f"{shard!r}" for shard in shards if shard not in inside]
    reject(path, f"names shards outside its folder {root}", outside, "put the files into that folder")
    missing = [f"{shard!r}" for shard in shards if not (root / shard).is_file()]
    reject(path, "names shards that do not exist", missing, "download them")
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
            indexed = [name for name in weight_map if weight_map[name] == shard]
            problems += [f"{name!r} is not in {shard!r}" for name in indexed if name not in reader.infos]
            infos |= reader.infos
            ties |= reader.ties
            readers |= reader._readers
        remedy = "download the shards and the index of the same version"
        reject(path, "does not agree with its shards", problems, remedy)
        return TensorReader(path, infos, ties, readers, resources.pop_all())


def _read_weight_map(path: Path) -> dict[str, str]:
    """Return tensor name -> shard name."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file: pass the index file of the shards")
    try:
        index = read_json(path, limit=MAX_INDEX_BYTES)
    except ValueError as error:
        raise ValueError(f"{error}: download it again") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{path} has no weight_map (tensor name -> file name): pass the index file of the shards")
    return weight_map
