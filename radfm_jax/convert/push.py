"""`push`: an exported folder -> a repository of the Hugging Face Hub."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from input_pipeline.files import sha256_of_file
from radfm_jax.convert.model_card import WARNING

FILES = ("*.safetensors", "*.json", "*.py", "*.jinja", "tokenizer.model", "README.md", "LICENSE*", ".gitattributes")
CONFIGS = ("config.json", "adapter_config.json")
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
NOTICE = "Research only, not for clinical use: keep this warning in the model card of the repository."


def push(
    folder: Path | str, repository: str, *, public: bool = False, dry_run: bool = False, out: Callable = print, api=None
) -> str | None:
    """Upload an exported folder to a model repository, which is created if there is none.

    Names, sizes and SHA-256 of all files are passed to `out` first. An interrupted upload resumes when it is repeated.

    Args:
      repository: OWNER/NAME.
      public: whether a new repository is public.
      dry_run: only list the files.
      api: a huggingface_hub.HfApi; None: with the token of `hf auth login`.
    Returns:
      The address of the repository; None after a dry run.
    Raises:
      ValueError: the folder is not an export, has other files, or its model card lacks the warning.
    """
    folder = Path(folder)
    files = check_export(folder)
    if not REPOSITORY.fullmatch(repository):
        raise ValueError(f"{repository!r} is not a repository: write OWNER/NAME")
    for path in files:
        out(f"{sha256_of_file(path)}  {path.stat().st_size:>14,}  {path.name}")
    total = f"{len(files)} files, {sum(path.stat().st_size for path in files) / 1e9:.2f} GB"
    out(f"{total} -> {'public' if public else 'private'} repository {repository}")
    out(NOTICE)
    if dry_run:
        return None
    hub: Any = api or _hub()
    address = hub.create_repo(repository, private=not public, exist_ok=True)
    hub.upload_folder(
        repo_id=repository, folder_path=folder, allow_patterns=[path.name for path in files],
        commit_message="Upload the export of radfm_jax",
    )  # fmt: skip
    return str(address)


def check_export(folder: Path) -> list[Path]:
    """Return the files of an export. Raises ValueError as `push` does."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: pass one that to-hf, to-torch or to-peft wrote")
    files = sorted(folder.iterdir())
    names = [path.name for path in files]
    weights = any(name.endswith(".safetensors") for name in names)
    if not weights or not any(name in names for name in CONFIGS) or "README.md" not in names:
        reason = "has no weights, config or model card, so it is not an export"
        raise ValueError(f"{folder} {reason}: pass a folder that to-hf, to-torch or to-peft wrote")
    if others := [path.name for path in files if not path.is_file() or not _known(path.name)]:
        raise ValueError(f"{folder} has files that no export has: move away {', '.join(others)}")
    if " ".join(WARNING.split()) not in " ".join((folder / "README.md").read_text().split()):
        raise ValueError(f"{folder / 'README.md'} lacks the warning of research use: restore it, or export again")
    return files


def _known(name: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in FILES)


def _hub() -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise ValueError("push needs huggingface_hub: pip install huggingface_hub, then hf auth login") from None
    return HfApi()
