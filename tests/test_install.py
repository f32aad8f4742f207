"""An installed wheel works from another directory: subpackages, data files, configs, the console script."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("radfm_jax", "input_pipeline", "configs")
DATA = {".json", ".txt", ".css", ".js", ".html"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A directory with the wheel of this tree, installed without its dependencies, and the wheel's file list."""
    folder = tmp_path_factory.mktemp("install")
    copy = folder / "source"  # setuptools writes build/ and egg-info next to pyproject.toml
    copy.mkdir()
    for name in ("pyproject.toml", "requirements.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in SOURCES:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "wheel", *options, "--wheel-dir", folder / "wheels", copy], check=True, capture_output=True)
    (wheel,) = (folder / "wheels").glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True, capture_output=True)
    (folder / "names.txt").write_text("\n".join(zipfile.ZipFile(wheel).namelist()))
    return folder


def run(installed: Path, *command: str) -> subprocess.CompletedProcess:
    """Run a command in an empty directory, with the installed packages in front of everything else."""
    elsewhere = installed / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(installed / "site"), "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300)


def test_the_wheel_has_every_module_and_data_file(installed):
    names = set((installed / "names.txt").read_text().splitlines())
    expected = {
        str(path.relative_to(ROOT))
        for source in SOURCES
        for path in (ROOT / source).rglob("*")
        if path.suffix in DATA | {".py"} and "__pycache__" not in path.parts
    }
    assert len(expected) > 150
    assert expected - names == set()


def test_every_module_imports_from_the_wheel(installed):
    code = """
import importlib, pkgutil, sys
import radfm_jax, input_pipeline, configs
assert radfm_jax.__file__.startswith(sys.argv[1]), radfm_jax.__file__
for package in (radfm_jax, input_pipeline, configs):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith(("__main__", "isolated")):
            importlib.import_module(module.name)
from input_pipeline.datasets import prompts
from input_pipeline.text.vocabularies import open_terms
assert prompts.load()
"""
    done = run(installed, sys.executable, "-c", code, str(installed / "site"))
    assert done.returncode == 0, done.stderr


def test_the_console_script_runs_a_command_and_a_packaged_config(installed):
    script = installed / "site" / "bin" / "radfm"
    usage = run(installed, sys.executable, str(script), "--help")
    assert usage.returncode == 0 and "prepare" in usage.stdout and "ask" in usage.stdout, usage.stderr
    made = run(installed, sys.executable, str(script), "phantoms", "--out", "practice", "--train", "4", "--test", "4",
               "--size", "64", "--workers", "1")  # fmt: skip
    assert made.returncode == 0, made.stderr
    done = run(installed, sys.executable, str(script), "prepare", "--config=configs/quickstart.py", "--out", "index",
               "--workers", "0", "--config.data.text_length=159.5")  # fmt: skip
    assert done.returncode == 2 and "text_length" in done.stderr and "no such file" not in done.stderr, done.stderr
