"""The vLLM plugin without vLLM: its entry point, and what it uses of the code of an export.

tests/test_hub_practice.py runs it with vLLM.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
import tomllib
import types
from pathlib import Path

import jinja2

from radfm_jax.convert.hf_folder import CODE
from radfm_jax.convert.hub import config as hub_config

PLUGIN = Path(__file__).parent.parent / "launch" / "vllm"


def definitions(path: Path, name: str) -> set[str]:
    """Return the names of the methods of a class, and of the attributes that they set."""
    (node,) = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name]
    stored = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    return stored | {n.name for n in node.body if isinstance(n, ast.FunctionDef)}


def test_entry_point_registers_the_architecture_of_exports(monkeypatch):
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())
    module, function = project["project"]["entry-points"]["vllm.general_plugins"]["radfm"].split(":")
    assert all((PLUGIN / f"{name}.py").is_file() for name in project["tool"]["setuptools"]["py-modules"])
    registered: dict[str, str] = {}
    registry = types.SimpleNamespace(get_supported_archs=registered.keys, register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    spec = importlib.util.spec_from_file_location(module, PLUGIN / f"{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    for _ in range(2):  # vLLM may call it several times
        getattr(loaded, function)()
    ((architecture, target),) = registered.items()
    assert architecture == hub_config.ARCHITECTURE
    file, name = target.split(":")
    assert {"embed_multimodal", "compute_logits", "load_weights"} <= definitions(PLUGIN / f"{file}.py", name)


def test_plugin_uses_what_the_code_of_an_export_has():
    model = definitions(CODE / "modeling_radfm.py", hub_config.ARCHITECTURE)
    assert {"add_vision", "get_image_features", "projection", "image_marks"} <= model
    processor = definitions(CODE / "processing_radfm.py", "RadFMProcessor")
    assert {"parts", "ids", "image_start_token_id"} <= processor
    source = (PLUGIN / "radfm_vllm_model.py").read_text()
    assert all(f".{name}" in source for name in ("add_vision", "get_image_features", "parts", "ids"))


def test_chat_template_writes_a_conversation_as_the_processor():
    template = jinja2.Environment(trim_blocks=True).from_string((PLUGIN / "radfm.jinja").read_text())
    roles = ("system", "user", "assistant", "user")
    texts = ("Be brief.", "<image-1>\nLeft?", "No.", "Right?")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    assert template.render(messages=messages) == "Be brief.\n<image-1>\nLeft? No.\nRight?"
