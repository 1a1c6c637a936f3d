# SPDX-License-Identifier: Apache-2.0
"""The house rules that a machine can check: layers, cycles, names, the package list, sizes."""

import ast
import configparser
import functools
import importlib
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {"pyro_latentde": ROOT / "pyro_latentde", "pyro_latentde.models": ROOT / "models"}

# A file imports only from its own or a lower layer. cli is on top: it runs the zoo.
LAYERS = {
    "errors": 0,
    "solve": 1,
    "data": 1,
    "sites": 2,
    "control": 2,
    "distributions": 2,
    "nn": 2,
    "posterior": 3,
    "guides": 4,
    "infer": 4,
    "analysis": 5,
    "models": 6,
    "train": 7,
    "fitting": 7,
    "demo": 7,
    "cli": 7,
    "__main__": 8,
    "": 8,  # pyro_latentde/__init__.py: public names, nothing else
}
STRANGERS = {
    ("infer", "guides"),
    ("guides", "infer"),
    ("models", "infer"),
    ("solve", "data"),
    ("data", "solve"),
}
WITHOUT_PYRO = {"errors", "solve", "data", "nn"}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


@functools.cache
def modules() -> dict[str, Path]:
    """Name of every module of the package -> its file."""
    found = {}
    for prefix, folder in SOURCES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((prefix, *parts))] = path
    return found


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def area(module: str) -> str:
    """First folder or file below the package: "pyro_latentde.solve.methods.catalog" -> "solve"."""
    return module.removeprefix("pyro_latentde").removeprefix(".").split(".")[0]


def imports(module: str, *, top_level_only: bool = False) -> set[str]:
    """Names of the modules imported by a module, inside functions too, except for type checking."""
    path = modules()[module]
    found = set()
    for node in _walk(parse(path), top_level_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [base])])
            for alias in node.names:
                if (base, alias.name) == ("pyro_latentde", "__version__") and not top_level_only:
                    continue  # a version number, asked for when it is needed, ties nothing together
                child = f"{base}.{alias.name}"
                found.add(child if child in modules() else base)
    return found


def _walk(node, top_level_only):
    """Like ast.walk, but not into `if TYPE_CHECKING:` and, on request, not into functions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if top_level_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from _walk(child, top_level_only)


def python_files() -> list[Path]:
    folders = [*SOURCES.values(), ROOT / "tests", ROOT / "benchmarks"]
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


def test_every_area_has_a_layer():
    unknown = {area(module) for module in modules()} - set(LAYERS)
    assert not unknown, f"give these a layer in tests/test_architecture.py: {sorted(unknown)}"


@pytest.mark.parametrize("module", modules())
def test_imports_only_lower_layers(module):
    here = area(module)
    for target in imports(module):
        if target.split(".")[0] != "pyro_latentde":
            continue
        there = area(target)
        assert LAYERS[there] <= LAYERS[here], f"{module} imports {target}, of a higher layer"
        assert (here, there) not in STRANGERS, f"{module} imports {target}: {here} must not know {there}"


@pytest.mark.parametrize("module", [m for m in modules() if area(m) in WITHOUT_PYRO])
def test_lower_layers_never_import_pyro(module):
    assert "pyro" not in {target.split(".")[0] for target in imports(module)}


def test_data_and_solve_load_without_pyro():
    """Also at run time and through dependencies: a fresh interpreter that may not import pyro."""
    names = [m for m in modules() if area(m) in WITHOUT_PYRO - {"nn"} and "adapters" not in m]
    code = (
        "import importlib, sys, types\nroot = types.ModuleType('pyro_latentde')\n"
        f"root.__path__ = [{str(SOURCES['pyro_latentde'])!r}]\nsys.modules['pyro_latentde'] = root\n"
        "sys.modules['pyro'] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_no_import_cycles():
    graph = {m: {t for t in imports(m, top_level_only=True) if t in modules() and t != m} for m in modules()}
    done, path = set(), []

    def visit(module):
        assert module not in path, f"import cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for target in sorted(graph[module]):
            visit(target)
        path.pop()
        done.add(module)

    for module in graph:
        visit(module)


def test_package_list_equals_folders():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    folders = {}
    for prefix, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            folders[".".join((prefix, *path.parent.relative_to(folder).parts))] = path.parent
    assert sorted(listed) == sorted(folders), "setup.cfg [options] packages differs from the folders"
    assert [p for p in folders.values() if not (p / "__init__.py").exists()] == []


@pytest.mark.parametrize("path", python_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_models_bare(path):
    assert not _bare_models(parse(path)), f"{path.name}: write `from pyro_latentde.models import ...`"


def test_no_notebook_imports_models_bare():
    for path in (ROOT / "tutorials").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        for cell in cells:
            lines = "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else []
            code = "\n".join("pass" if line.lstrip().startswith(("%", "!")) else line for line in lines)
            assert not _bare_models(ast.parse(code)), path.name


def _bare_models(tree):
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        if "models" in {name.split(".")[0] for name in names}:
            return True
    return False


def test_bare_import_of_models_is_refused():
    result = subprocess.run([sys.executable, "-c", "import models"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and "pyro_latentde.models" in result.stderr


@pytest.mark.parametrize("module", modules())
def test_public_modules_list_their_names(module):
    path = modules()[module]
    body = [node for node in parse(path).body if not isinstance(node, ast.Expr)]
    private = any(part.startswith("_") for part in module.split("."))
    if private or not body or module == "pyro_latentde":
        return  # an empty __init__ has nothing to list; the root is checked through its import
    listed = [n for n in body if "__all__" in _targets(n)]
    assert listed, f"{path.relative_to(ROOT)} has no __all__"
    loaded = importlib.import_module(module)
    assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []


def _targets(node):
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {t.id for t in targets if isinstance(t, ast.Name)}


@pytest.mark.parametrize("package", [m for m, path in modules().items() if path.name == "__init__.py"])
def test_function_and_module_never_share_a_name(package):
    """Importing the module would replace the function, or the other way round, depending on the order."""
    children = {m.removeprefix(f"{package}.") for m in modules() if m.startswith(f"{package}.")}
    children = {name for name in children if "." not in name}
    bound = set()
    for node in parse(modules()[package]).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            bound |= {a.asname or a.name for a in node.names if f"{node.module}.{a.name}" not in modules()}
    assert not bound & children, f"{package}: a function and a module are both called {bound & children}"
    loaded = importlib.import_module(package)
    for name in children:
        found = getattr(loaded, name, loaded)
        assert isinstance(found, types.ModuleType), f"{package}.{name} is not the module"


def test_every_tutorial_is_covered():
    notebooks = sorted(p.name for p in (ROOT / "tutorials").glob("*.ipynb"))
    if notebooks:
        covered = (ROOT / "tests" / "test_tutorials.py").read_text(encoding="utf-8")
        assert [name for name in notebooks if name not in covered] == []


def test_test_files_have_unique_names():
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("module", modules())
def test_files_and_functions_stay_small(module):
    text = modules()[module].read_text(encoding="utf-8")
    lines = text.splitlines()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert len(lines) <= MAX_FILE_LINES, f"{module}: {len(lines)} lines; does it hold one concept?"
    for node in ast.walk(parse(modules()[module])):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            doc = node.body[0] if ast.get_docstring(node) else None
            inside = range(node.lineno, node.end_lineno + 1)
            documented = range(doc.lineno, doc.end_lineno + 1) if doc else ()
            code = [i for i in inside if i not in documented and lines[i - 1].split("#")[0].strip()]
            assert len(code) <= MAX_FUNCTION_LINES, f"{module}.{node.name}: {len(code)} lines of code"
