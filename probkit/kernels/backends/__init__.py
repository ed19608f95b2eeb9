"""One function set for each way to compute large kernels; chosen by name or by device."""

from __future__ import annotations

import functools
import warnings
from typing import Protocol, cast

import torch
from torch import Tensor

from probkit.errors import DataError, NumericsWarning
from probkit.extras import available
from probkit.kernels.backends import torch_tiled
from probkit.kernels.backends.cupy_fused import Fused
from probkit.kernels.backends.launcher import check_cupy

__all__ = ["NAMES", "Backend", "backend"]

NAMES = ("torch", "cupy", "cupy-bf16x3", "cupy-bf16x6")
"""Every name that :func:`backend` accepts."""

_GRAM = {"cupy": "exact", "cupy-bf16x3": "bf16x3", "cupy-bf16x6": "bf16x6"}


class _KernelFunction(Protocol):
    def __call__(
        self,
        x1: Tensor,
        x2: Tensor | None,
        weight_var: Tensor,
        bias_var: Tensor,
        *,
        activation: str = "relu",
        residual: bool = False,
        diag: bool = False,
    ) -> Tensor: ...


class _ProductFunction(Protocol):
    def __call__(
        self,
        x1: Tensor,
        x2: Tensor | None,
        vectors: Tensor,
        weight_var: Tensor,
        bias_var: Tensor,
        *,
        activation: str = "relu",
        residual: bool = False,
    ) -> Tensor: ...


class _StationaryFunction(Protocol):
    def __call__(
        self,
        x1: Tensor,
        x2: Tensor | None,
        lengthscale: Tensor,
        *,
        family: str,
        diag: bool = False,
    ) -> Tensor: ...


class _StationaryProductFunction(Protocol):
    def __call__(
        self,
        x1: Tensor,
        x2: Tensor | None,
        vectors: Tensor,
        lengthscale: Tensor,
        *,
        family: str,
    ) -> Tensor: ...


class _ConvKernelFunction(Protocol):
    def __call__(
        self,
        x1: Tensor,
        x2: Tensor | None,
        weight_var: Tensor,
        bias_var: Tensor,
        *,
        pooling: str = "flatten",
        activation: str = "relu",
        diag: bool = False,
    ) -> Tensor: ...


class Backend(Protocol):
    """What a backend offers.

    See :mod:`probkit.kernels.backends.torch_tiled`,
    :mod:`probkit.kernels.backends.conv_tiled` and
    :mod:`probkit.kernels.backends.stationary_tiled` for the contract.
    """

    @property
    def nngp(self) -> _KernelFunction:
        """Covariance function of an infinitely wide network."""

    @property
    def ntk(self) -> _KernelFunction:
        """Its tangent kernel."""

    @property
    def nngp_product(self) -> _ProductFunction:
        """Its covariance matrix times vectors, never stored."""

    @property
    def ntk_product(self) -> _ProductFunction:
        """Its tangent kernel times vectors, never stored."""

    @property
    def stationary(self) -> _StationaryFunction:
        """RBF and Matern kernels."""

    @property
    def stationary_product(self) -> _StationaryProductFunction:
        """RBF and Matern kernel matrices times vectors, never stored."""

    @property
    def conv_nngp(self) -> _ConvKernelFunction:
        """Covariance function of an infinitely wide convolutional network."""

    @property
    def conv_ntk(self) -> _ConvKernelFunction:
        """Its tangent kernel."""


def backend(name: str | None = None, device: torch.device | str | None = None) -> Backend:
    """Choose the functions that compute kernel matrices.

    Args:
        name: "torch"; "cupy" for the fused CUDA kernels; "cupy-bf16x3" and "cupy-bf16x6" for the
            same with inner products of float32 data on tensor cores
            (:mod:`~probkit.kernels.backends.split_gram` states the error); None to choose by
            device: "cupy" for data on a CUDA device where CuPy is installed, else "torch".
        device: Where the data lives.

    Raises:
        DataError: Unknown name; "cupy" for data that is not on a CUDA device, or with a CuPy for
            another CUDA major than PyTorch's.
        MissingExtraError: "cupy" where CuPy is absent.

    Warns:
        NumericsWarning: Once in a process: None on a CUDA device without CuPy; "torch" is used.

    Example:
        >>> backend("torch").nngp.__name__
        'nngp'
    """
    if name is None:
        name = _by_device(device)
    if name == "torch":
        return cast(Backend, torch_tiled)
    if name not in _GRAM:
        raise DataError(f"backend: expected one of {', '.join(map(repr, NAMES))}, got {name!r}")
    check_cupy(device)
    return cast(Backend, Fused(_GRAM[name]))


@functools.cache
def _warn_of_fallback() -> None:
    """Say once in a process that the fused kernels are not there."""
    warnings.warn(
        "CuPy is not installed, so kernels on CUDA devices are computed by tiled PyTorch; "
        "pip install 'probkit[cuda12]' or 'probkit[cuda13]' brings the fused kernels",
        NumericsWarning,
        stacklevel=4,
    )


def _by_device(device: torch.device | str | None) -> str:
    """The name that None stands for."""
    if device is None or torch.device(device).type != "cuda":
        return "torch"
    if available("cupy"):
        return "cupy"
    _warn_of_fallback()
    return "torch"
