"""What LlamaCppLM refuses before it loads anything."""

from __future__ import annotations

import pytest

from probkit.errors import DataError, MissingExtraError
from probkit.models.language import LlamaCppLM


def test_the_package_is_asked_for_by_its_extra(monkeypatch, tmp_path):
    import sys

    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(MissingExtraError, match=r'pip install "probkit\[llm\]"'):
        LlamaCppLM(tmp_path / "any.gguf")


def test_files_that_are_no_models(tmp_path):
    pytest.importorskip("xllamacpp")
    with pytest.raises(DataError, match=r"there is no file '.*none\.gguf'"):
        LlamaCppLM(tmp_path / "none.gguf")
    (tmp_path / "other.gguf").write_bytes(b"something else")
    with pytest.raises(DataError, match="expected a GGUF file, other.gguf is none"):
        LlamaCppLM(tmp_path / "other.gguf")
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(DataError, match="cannot load damaged.gguf"):
        LlamaCppLM(tmp_path / "damaged.gguf")
