"""One name for each module, imports in one direction, and a light ``import probkit``."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: What each layer may import of the others: bo -> models -> inference -> core.
ABOVE = {
    "core": {"inference", "models", "bo"},
    "inference": {"models", "bo"},
    "models": {"bo"},
    "bo": set(),
}

WALK = """
import importlib, pkgutil, sys, warnings
warnings.simplefilter("ignore")
import probkit
names = [m.name for m in pkgutil.walk_packages(probkit.__path__, "probkit.")]
for name in names:
    if not name.endswith("__main__"):
        importlib.import_module(name)
bare = sorted(m for m in sys.modules if m.partition(".")[0] in ("models", "inference", "bo"))
assert "probkit.errors" in names and "probkit.models" in names, names
print(bare)
"""


def run_python(code: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def sources(folder: str) -> Iterator[Path]:
    for place, inner, names in os.walk(ROOT / folder):  # links are not followed
        inner[:] = sorted(set(inner) - {"__pycache__", "envs", "_build"})
        yield from (Path(place) / name for name in sorted(names) if name.endswith(".py"))


def layer_files() -> list[tuple[str, Path]]:
    folders = {"core": "probkit", "inference": "inference", "models": "models", "bo": "bo"}
    return [(layer, path) for layer, folder in folders.items() for path in sources(folder)]


def imported(tree: ast.AST, module: str, is_package: bool, *, top_only: bool) -> Iterator[str]:
    """Absolute names of what a module imports, type-checking blocks apart."""
    for node in _statements(tree, top_only=top_only):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")
                parent = parent[: len(parent) - node.level + is_package]
                base = ".".join([*parent, base] if base else parent)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _statements(tree: ast.AST, *, top_only: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if top_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield node
        yield from _statements(node, top_only=top_only)


def upward(layer: str, path: Path, source: str) -> set[str]:
    relative = path.relative_to(ROOT).with_suffix("").parts
    parts = relative if layer == "core" else ("probkit", *relative)
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    # the core may hand names on lazily, the others not even that
    names = imported(ast.parse(source), module, is_package, top_only=layer == "core")
    found = {tuple(name.split(".")[:2]) for name in names}
    return {f"probkit.{above}" for above in ABOVE[layer] if ("probkit", above) in found}


def test_imports_point_one_way():
    wrong = {
        str(path.relative_to(ROOT)): bad
        for layer, path in layer_files()
        if (bad := upward(layer, path, path.read_text(encoding="utf-8")))
    }
    assert not wrong


@pytest.mark.parametrize(
    ("layer", "file", "source", "found"),
    [
        ("core", "probkit/x.py", "import probkit.models", {"probkit.models"}),
        ("core", "probkit/x.py", "from probkit import bo", {"probkit.bo"}),
        ("core", "probkit/a/x.py", "from ..inference import svi", {"probkit.inference"}),
        ("core", "probkit/__init__.py", "from . import bo", {"probkit.bo"}),
        ("core", "probkit/x.py", "class A:\n    import probkit.bo", {"probkit.bo"}),
        ("core", "probkit/x.py", "def f():\n    import probkit.bo", set()),
        ("core", "probkit/x.py", "if TYPE_CHECKING:\n    import probkit.bo", set()),
        ("inference", "inference/x.py", "def f():\n    import probkit.models", {"probkit.models"}),
        ("models", "models/x.py", "from ..bo import study", {"probkit.bo"}),
        ("models", "models/x.py", "from probkit.inference import svi", set()),
        ("bo", "bo/x.py", "import probkit.models.nngp", set()),
    ],
)
def test_direction_check_catches_what_it_should(layer, file, source, found):
    assert upward(layer, ROOT / file, source) == found


def test_no_file_imports_a_bare_folder_name():
    wrong = []
    for folder in ("probkit", "models", "inference", "bo", "tests", "benchmarks", "notebooks"):
        for path in sources(folder):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = imported(tree, "x.y", is_package=False, top_only=False)
            if any(n.partition(".")[0] in ("models", "inference", "bo") for n in names):
                wrong.append(str(path.relative_to(ROOT)))
    assert not wrong


def test_every_module_has_one_name(tmp_path):
    assert run_python(WALK, tmp_path) == "[]"


def test_import_of_probkit_is_light(tmp_path):
    heavy = ("botorch", "arviz", "matplotlib", "transformers", "cupy", "optuna", "dask", "sklearn")
    code = f"import sys, probkit; print([m for m in {heavy!r} if m in sys.modules])"
    assert run_python(code, tmp_path) == "[]"
