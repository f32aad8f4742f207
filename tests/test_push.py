"""`convert push`, with a fake of huggingface_hub's HfApi: nothing is uploaded."""

from __future__ import annotations

import hashlib

import pytest

from radfm_jax.convert import push as command
from radfm_jax.convert.__main__ import main
from radfm_jax.convert.model_card import WARNING


class Hub:
    """Records the calls that push makes."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repository, **options):
        self.calls.append(("create_repo", repository, options))
        return f"https://hub.invalid/{repository}"

    def upload_folder(self, **options):
        self.calls.append(("upload_folder", options))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    for name in ("config.json", "model-00001-of-00001.safetensors", "modeling_radfm.py", "tokenizer.model"):
        (folder / name).write_bytes(name.encode())
    (folder / "README.md").write_text(f"# Model\n\n{WARNING}\n\nMore.\n")
    return folder


def test_lists_and_uploads_an_export(folder):
    hub, lines = Hub(), []
    address = command.push(folder, "me/radfm", api=hub, out=lines.append)
    assert address == "https://hub.invalid/me/radfm"
    names = sorted(path.name for path in folder.iterdir())
    assert [line.split()[-1] for line in lines[:5]] == names
    assert lines[1].split()[:2] == [hashlib.sha256(b"config.json").hexdigest(), "11"]
    assert "5 files" in lines[5] and "private repository me/radfm" in lines[5] and "Research only" in lines[6]
    (create, upload) = hub.calls
    assert create == ("create_repo", "me/radfm", {"private": True, "exist_ok": True})
    assert upload[1] | {"commit_message": ""} == {
        "repo_id": "me/radfm", "folder_path": folder, "allow_patterns": names, "commit_message": "",
    }  # fmt: skip
    assert command.push(folder, "me/radfm", public=True, api=hub, out=lines.append)
    assert hub.calls[2][2]["private"] is False


def test_the_calls_exist_in_huggingface_hub():
    from inspect import signature

    from huggingface_hub import HfApi

    signature(HfApi.create_repo).bind(None, "me/radfm", private=True, exist_ok=True)
    signature(HfApi.upload_folder).bind(None, repo_id="", folder_path="", allow_patterns=[], commit_message="")


def test_dry_run_uploads_nothing(folder, capsys, monkeypatch):
    monkeypatch.setattr(command, "_hub", lambda: pytest.fail("a dry run must not open the Hub"))
    assert main(["push", str(folder), "me/radfm", "--dry-run"]) == 0
    assert "tokenizer.model" in capsys.readouterr().out


def test_refuses_what_is_not_an_export(folder, tmp_path, capsys):
    def refused(path, repository="me/radfm"):
        assert main(["push", str(path), repository, "--dry-run"]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert "is not a folder" in refused(tmp_path / "missing")
    (tmp_path / "run").mkdir()
    assert "is not an export" in refused(tmp_path / "run")
    assert "write OWNER/NAME" in refused(folder, "radfm")
    (folder / "scan.dcm").touch()
    assert "has files that no export has: move away scan.dcm" in refused(folder)
    (folder / "scan.dcm").unlink()
    (folder / "README.md").write_text("# My model")
    assert "lacks the warning of research use" in refused(folder)
