from __future__ import annotations

import pytest

from probkit.errors import DataError, MissingExtraError, NumericsWarning
from probkit.extras import available
from probkit.kernels import NNGPKernel, backend, backends
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


def test_a_gpu_without_cupy_falls_back_with_one_warning(monkeypatch):
    monkeypatch.setattr(backends, "available", lambda module: False)
    backends._warn_of_fallback.cache_clear()
    with pytest.warns(NumericsWarning, match=r"CuPy is not installed.*probkit\[cuda12\]") as said:
        chosen = [backend(device="cuda:0") for _ in range(2)]
    assert chosen == [torch_tiled, torch_tiled] and len(said) == 1
    backends._warn_of_fallback.cache_clear()


def test_a_gpu_with_cupy_takes_the_fused_kernels(monkeypatch):
    monkeypatch.setattr(backends, "available", lambda module: True)
    monkeypatch.setattr(backends, "check_cupy", lambda device: None)
    assert backend(device="cuda").gram == "exact"
    assert backend("cupy-bf16x6", "cuda").gram == "bf16x6"
