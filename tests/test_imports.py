"""What the packages import: training stays light, the packages keep their order, and no modules import each other."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("input_pipeline", "radfm_jax")
# Only the tools that prepare, show or build data need these.
NOT_IN_TRAINING = (
    *(
        f"input_pipeline.index.{name}"
        for name in ("prepare", "scan_checks", "row_checks", "results", "reports", "command", "summary", "unchanged")
    ),
    "input_pipeline.inspect",
    "input_pipeline.curate",
    "apache_beam",
    "sqlite3",
)


def modules(package: str) -> dict[str, Path]:
    """Return name -> file of every module of a package."""
    names = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


def statements(body):
    """Yield the statements that run when a module is imported: not the bodies of functions, not TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for field in ("body", "orelse", "finalbody", "handlers"):
            yield from statements(getattr(node, field, []))


def imports(nodes, name: str, is_package: bool):
    """Yield (module, imported name or "") of the import statements of a module."""
    package = name if is_package else name.rpartition(".")[0]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            module = importlib.util.resolve_name(module, package) if node.level else module
            yield from ((module, alias.name) for alias in node.names)


def import_graph() -> dict[str, set[str]]:
    """Return module -> the modules of both packages that it imports at module level.

    `from a import b` is an edge to a.b if that is a module, and to `a` otherwise.
    """
    files = {name: file for package in PACKAGES for name, file in modules(package).items()}
    graph = {}
    for name, file in files.items():
        nodes = statements(ast.parse(file.read_text()).body)
        targets = imports(nodes, name, file.name == "__init__.py")
        edges = {
            f"{module}.{attribute}" if f"{module}.{attribute}" in files else module for module, attribute in targets
        }
        graph[name] = edges & files.keys()
    return graph


def test_training_imports_no_tool():
    program = (
        "import sys, radfm_jax.training.loop\n"
        f"loaded = [name for name in sys.modules if name.startswith({NOT_IN_TRAINING!r})]\n"
        "sys.exit(', '.join(loaded) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_input_pipeline_never_imports_the_model():
    offenders = []
    for name, file in modules("input_pipeline").items():
        found = imports(ast.walk(ast.parse(file.read_text())), name, file.name == "__init__.py")
        offenders += [f"{name}: {module}" for module, _ in found if module.split(".")[0] == "radfm_jax"]
    assert not offenders


def test_no_import_cycles():
    graph, done = import_graph(), set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
