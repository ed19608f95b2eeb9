"""The tiny language model of transformers, written and loaded once."""

from __future__ import annotations

import pytest
from support.tiny_lm import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """Folder of the tiny model."""
    pytest.importorskip("transformers")
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_lm(tiny_folder):
    """The tiny model, loaded the way any model is."""
    from probkit.models.language import TransformersLM

    return TransformersLM(tiny_folder)
