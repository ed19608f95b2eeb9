"""The wheel and the sdist hold every module as a real file, and the wheel works elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("models", "inference", "bo")

pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={
            k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COVERAGE", "COV_"))
        },
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to know what is tracked")
    files = run("git", "ls-files", "-z", cwd=ROOT).split("\0")
    return [name for name in files if name and os.path.lexists(ROOT / name)]


def installed_name(name: str) -> str | None:
    """Where a tracked file lies inside the wheel; None if it does not belong there."""
    top = name.split("/")[0]
    if top in FOLDERS:
        return f"probkit/{name}"
    if top == "probkit" and not (ROOT / name).is_symlink():
        return name
    return None


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with an sdist, and the wheel that was built from it."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=copy)
    return out


@pytest.fixture(scope="module")
def environment(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scripts folder of a new environment with the wheel; requirements are lent by this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / "bin" / "python"
    (wheel,) = built.glob("*.whl")
    run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel, cwd=folder)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code, cwd=folder).strip())
    # a folder named in a .pth file comes after the environment's own packages, and the .pth
    # files inside it, which would lead back to the checkout, are not read
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


def test_wheel_holds_every_tracked_file(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
        links = [i.filename for i in archive.infolist() if (i.external_attr >> 28) == 0o12]
    wanted = {where for name in tracked() if (where := installed_name(name))}
    assert "probkit/models/__init__.py" in wanted and "probkit/py.typed" in wanted
    assert not wanted - held
    assert not links
    assert {name.split("/")[0] for name in held if ".dist-info/" not in name} == {"probkit"}


def test_sdist_holds_real_files(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers()}
    wanted = {where for name in tracked() if (where := installed_name(name))}
    assert not wanted - set(members)
    assert not [name for name, member in members.items() if member.issym() or member.islnk()]


def test_wheel_imports_everything_from_another_folder(environment, tmp_path):
    code = """
import importlib, pkgutil, sys
import probkit
for module in pkgutil.walk_packages(probkit.__path__, "probkit."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(probkit.__file__)
print(sorted(m for m in sys.modules if m.partition(".")[0] in ("models", "inference", "bo")))
print(len({m for m in sys.modules if m.partition(".")[0] == "probkit"}))
"""
    file, bare, count = run(environment / "python", "-c", code, cwd=tmp_path).splitlines()[-3:]
    assert Path(file).is_relative_to(environment.parent)
    assert bare == "[]"
    modules = [n for n in tracked() if n.endswith(".py") and installed_name(n)]
    assert int(count) == len(modules) - 1  # all but probkit/__main__.py


def test_wheel_runs_the_command(environment, tmp_path):
    assert run(environment / "probkit", "--version", cwd=tmp_path).startswith("probkit ")
    assert "demo" in run(environment / "probkit", "demo", "--list", cwd=tmp_path)
    assert "demo" in run(environment / "python", "-m", "probkit", "demo", "--help", cwd=tmp_path)


def test_wheel_runs_the_demo(environment, tmp_path):
    run(environment / "probkit", "demo", "pyro", "--out", "report", cwd=tmp_path)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Eight schools" in page and "data:image/png;base64," in page
    assert list((tmp_path / "report").glob("*.nc"))
