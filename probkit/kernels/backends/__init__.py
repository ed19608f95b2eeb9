"""One function set for each way to compute large kernels; chosen by name or by device."""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from probkit.errors import DataError, MissingExtraError
from probkit.extras import available
from probkit.kernels.backends import torch_tiled

__all__ = ["NAMES", "Backend", "backend"]

NAMES = ("torch", "cupy")
"""Every name that :func:`backend` accepts."""


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

    See :mod:`probkit.kernels.backends.torch_tiled` and
    :mod:`probkit.kernels.backends.conv_tiled` for the contract.
    """

    @property
    def nngp(self) -> _KernelFunction:
        """Covariance function of an infinitely wide network."""

    @property
    def ntk(self) -> _KernelFunction:
        """Its tangent kernel."""

    @property
    def conv_nngp(self) -> _ConvKernelFunction:
        """Covariance function of an infinitely wide convolutional network."""

    @property
    def conv_ntk(self) -> _ConvKernelFunction:
        """Its tangent kernel."""


def backend(name: str | None = None, device: torch.device | str | None = None) -> Backend:
    """Choose the functions that compute kernel matrices.

    Args:
        name: "torch", "cupy", or None to choose by device.
        device: Where the data lives; the choice of None is cache-tiled torch on every device.

    Raises:
        DataError: Unknown name, or "cupy" for data that is not on a CUDA device.
        MissingExtraError: "cupy" where CuPy is absent.

    Example:
        >>> backend("torch").nngp.__name__
        'nngp'
    """
    if name is None or name == "torch":
        return cast(Backend, torch_tiled)
    if name != "cupy":
        raise DataError(f"backend: expected one of {', '.join(map(repr, NAMES))}, got {name!r}")
    if not available("cupy"):
        raise MissingExtraError(
            "the 'cupy' backend needs CuPy: pip install 'probkit[cuda12]' or 'probkit[cuda13]', "
            "whichever matches the CUDA version"
        )
    if device is not None and torch.device(device).type != "cuda":
        raise DataError(
            f"backend 'cupy': expected data on a CUDA device, got {device}; use 'torch'"
        )
    raise DataError("backend 'cupy': this version of probkit computes kernels by 'torch' only")
