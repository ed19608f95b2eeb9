"""What every backend computes a network's kernel from, before the first tile."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from probkit.kernels.backends.activations import Activation
from probkit.kernels.backends.torch_dense import tangent_variance, variances

__all__ = ["Inputs", "Options", "broadcast", "with_variances"]


class Inputs(NamedTuple):
    """Tensors that a matrix is computed from, all with the batch dims of the result."""

    x1: Tensor  # [*batch, n, d]
    x2: Tensor | None  # [*batch, m, d]; None for x1
    w: Tensor  # [*batch, steps]
    b: Tensor  # [*batch, steps]
    k1: Tensor  # [*batch, steps, n]
    k2: Tensor | None  # [*batch, steps, m]; None for k1
    diagonal: Tensor | None  # [*batch, n]; None where x1 and x2 differ


class Options(NamedTuple):
    """Which network, and which of its two kernels."""

    activation: Activation
    tangent: bool
    residual: bool


def broadcast(
    x1: Tensor, x2: Tensor | None, w: Tensor, b: Tensor, more: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Give all tensors the same batch dims, and those of ``more``."""
    # not torch.broadcast_shapes, whose first call imports sympy
    inputs = [x.shape[:-2] for x in (x1, x2) if x is not None]
    batch = np.broadcast_shapes(*inputs, w.shape[:-1], b.shape[:-1], more)
    x1 = x1.expand(*batch, *x1.shape[-2:])
    x2 = None if x2 is None else x2.expand(*batch, *x2.shape[-2:])
    return x1, x2, w.expand(*batch, w.shape[-1]), b.expand(*batch, b.shape[-1])


def with_variances(x1: Tensor, x2: Tensor | None, w: Tensor, b: Tensor, options: Options) -> Inputs:
    """Add the variances of all steps, and the diagonal where the matrix has one."""
    activation, tangent, residual = options
    k1 = variances(x1, w, b, activation, residual=residual)
    if x2 is not None:
        return Inputs(x1, x2, w, b, k1, variances(x2, w, b, activation, residual=residual), None)
    diagonal = k1[..., -1, :]
    if tangent:
        diagonal = tangent_variance(k1, w, activation, residual=residual)
    return Inputs(x1, None, w, b, k1, None, diagonal)
