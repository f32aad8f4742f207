"""Private APIs: each function of compat.py works with the installed versions, and no other module uses such an API."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from ports import free_port

from radfm_jax.runtime import compat

ROOT = Path(__file__).parents[1]
PRODUCT = ("radfm_jax", "input_pipeline", "configs", "launch")
# Documented names (os._exit, namedtuple), lxml's type of an element, what torch_format.py needs to read pickles, and
# what every multimodal model of vLLM calls.
ALLOWED = {
    "_exit", "_asdict", "_fields", "_replace", "_Element", "_utils", "_rebuild_tensor_v2", "_checkpoint_offset",
    "_mark_tower_model", "_mark_language_model", "_get_expected_hidden_size",
}  # fmt: skip


def run(code: str, *arguments) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- the functions ----------------------------------------------------------------------------------------------------


def test_service_connection_and_client():
    """One process serves and connects to itself; barrier.py and peers.py need exactly these methods of the client."""
    output = run(
        """
        import sys
        import jax
        from radfm_jax.runtime import compat
        address = f"127.0.0.1:{sys.argv[1]}"
        service = compat.start_coordination_service(address, 1, timeout=10, heartbeat=10)
        compat.connect(address, 0, 1, timeout=10, heartbeat=10)
        client = compat.coordination_client()
        client.key_value_set("a/x", "1")
        client.key_value_set("a/x", "2", allow_overwrite=True)
        print(client.key_value_dir_get("a/"))
        client.key_value_delete("a/")
        client.wait_at_barrier("b", 1000)
        print(client.key_value_dir_get("a/"), list(client.get_live_nodes([0])), jax.distributed.is_initialized())
        jax.distributed.shutdown()
        """,
        free_port(),
    )
    assert output == "[('a/x', '2')]\n[] [0] True\n"


def test_no_client_in_a_single_process():
    assert compat.coordination_client() is None


def test_detect_cluster(monkeypatch):
    values = {"JOB_ID": "77", "STEP_NODELIST": "node[03-04]", "NTASKS": "2", "PROCID": "1", "LOCALID": "0"}
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert compat.detect_cluster(None, 10) == ("node03:61517", 2, 1, [0])


def test_on_cloud_tpu():
    assert compat.on_cloud_tpu() in (False, True)


def test_before_thread_pools_shut_down():
    """The callback can still use a pool, which an atexit hook cannot."""
    output = run(
        """
        from concurrent.futures import ThreadPoolExecutor
        from radfm_jax.runtime import compat
        pool = ThreadPoolExecutor(1)
        compat.before_thread_pools_shut_down(lambda: print(pool.submit(lambda: "still works").result()))
        """
    )
    assert output == "still works\n"


# --- the rest of the tree ---------------------------------------------------------------------------------------------


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def private_uses(tree: ast.AST, own: set[str]) -> list[str]:
    """Return private modules that are imported, and private attributes of objects that this project does not define."""
    uses = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Attribute):
            if is_private(node.attr) and node.attr not in own | ALLOWED:
                uses.append(f"line {node.lineno}: .{node.attr}")
            continue
        else:
            continue
        private = [n for n in names if n.startswith("jaxlib") or any(map(is_private, n.split(".")))]
        uses += [f"line {node.lineno}: {name}" for name in private if name.split(".")[-1] not in own]
    return uses


def own_names(tree: ast.AST) -> set[str]:
    """Return private names that a module defines: functions, classes, fields, and attributes of self or cls."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if name.startswith("_")}


def test_no_other_module_uses_private_apis():
    trees = {p: ast.parse(p.read_text()) for folder in PRODUCT for p in (ROOT / folder).rglob("*.py")}
    own = set().union(*map(own_names, trees.values()))
    uses = {str(p.relative_to(ROOT)): private_uses(tree, own) for p, tree in trees.items()}
    assert uses.pop("radfm_jax/runtime/compat.py")
    assert {name: lines for name, lines in uses.items() if lines} == {}


@pytest.mark.parametrize(
    "code", ["from jax._src import mesh", "import jaxlib", "from jax import _jax", "mesh._name_to_type", "a.b._x()"]
)
def test_private_uses_are_found(code):
    assert private_uses(ast.parse(code), {"_own"})
    assert not private_uses(ast.parse("import jax.numpy\nfrom __future__ import annotations\nx._own"), {"_own"})
