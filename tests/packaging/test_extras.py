"""A missing extra is one line that names it."""

from __future__ import annotations

import json
import sys

import pytest

from probkit import extras
from probkit.errors import MissingExtraError


def test_present_module_is_returned():
    assert extras.require("json", extra="demo") is json


def test_missing_package_names_the_extra():
    with pytest.raises(MissingExtraError) as caught:
        extras.require("no_such_package.part", extra="cuda12")
    assert str(caught.value) == (
        'no_such_package is needed here and is not installed: pip install "probkit[cuda12]"'
    )
    assert caught.value.name == "no_such_package.part"


def test_broken_package_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import its_own_missing_requirement")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="its_own_missing_requirement") as caught:
        extras.require("half_installed", extra="llm")
    assert not isinstance(caught.value, MissingExtraError)


def test_available_does_not_import(tmp_path, monkeypatch):
    (tmp_path / "loud_package.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert extras.available("loud_package")
    assert "loud_package" not in sys.modules
    assert not extras.available("no_such_package") and not extras.available("no_such_package.x")
