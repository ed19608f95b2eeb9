from __future__ import annotations

import pytest

from probkit.errors import DataError, MissingExtraError
from probkit.extras import available
from probkit.kernels import NNGPKernel, backend
from probkit.kernels.backends import torch_tiled


def test_torch_by_name_and_by_default():
    assert backend("torch") is torch_tiled
    assert backend() is torch_tiled
    assert backend(device="cpu") is torch_tiled


@pytest.mark.skipif(available("cupy"), reason="CuPy is installed")
def test_absent_cupy_names_the_extras(points):
    with pytest.raises(MissingExtraError, match=r"probkit\[cuda12\].*probkit\[cuda13\]"):
        backend("cupy")
    with pytest.raises(MissingExtraError, match="cuda12"):
        NNGPKernel(backend="cupy")(points(2, 2)).to_dense()


def test_unknown_name():
    with pytest.raises(DataError, match="expected one of 'torch', 'cupy', .* got 'jax'"):
        backend("jax")
    with pytest.raises(DataError, match="expected one of 'torch', 'cupy', .* or None, got 'jax'"):
        NNGPKernel(backend="jax")
