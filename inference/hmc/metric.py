"""The mass matrix, as a change of coordinates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError

__all__ = ["Metric", "check_inverse_mass"]


class Metric:
    """Inverse mass matrix M^-1 = S S^T, shared by all chains.

    Momenta are kept whitened, p ~ N(0, I): velocities are then S p and forces S^T grad U, the
    kinetic energy is |p|^2 / 2 and the U-turn criterion needs no matrix.

    Args:
        inverse_mass: Variances [D] or a covariance [D, D], as the posterior's own would be.

    Example:
        >>> metric = Metric(torch.tensor([4.0, 9.0]))
        >>> metric.velocity(torch.ones(1, 2)), metric.force(torch.ones(1, 2))
        (tensor([[2., 3.]]), tensor([[2., 3.]]))
    """

    def __init__(self, inverse_mass: Tensor) -> None:
        self.inverse_mass = inverse_mass
        self.dense = inverse_mass.ndim == 2
        self.root = torch.linalg.cholesky(inverse_mass) if self.dense else inverse_mass.sqrt()

    def velocity(self, momentum: Tensor) -> Tensor:
        """Map whitened momenta [chain, D] to the velocities S p of positions."""
        return momentum @ self.root.T if self.dense else momentum * self.root

    def force(self, gradient: Tensor) -> Tensor:
        """Map gradients [chain, D] to S^T grad U, the rates at which whitened momenta fall."""
        return gradient @ self.root if self.dense else gradient * self.root

    def whiten(self, position: Tensor) -> Tensor:
        """Return S^-1 q for positions [chain, D]."""
        if self.dense:
            solved: Tensor = torch.linalg.solve_triangular(self.root, position.T, upper=False)
            return solved.T
        return position / self.root


def check_inverse_mass(inverse_mass: Any, size: int, dense: bool) -> Tensor:
    """Return a usable inverse mass matrix for ``size`` unconstrained dimensions.

    Raises:
        ShapeError: Neither [D] nor [D, D], or [D, D] for a diagonal sampler.
        DataError: Not finite, not symmetric, or not positive definite.
    """
    matrix = torch.as_tensor(inverse_mass)
    if tuple(matrix.shape) not in ((size,), (size, size)):
        raise ShapeError(
            f"inverse_mass: expected variances [D={size}] or a covariance [D={size}, D={size}] of "
            f"the unconstrained vector, got shape {tuple(matrix.shape)}"
        )
    if matrix.ndim == 2 and not dense:
        raise ShapeError(
            f"inverse_mass: got a matrix [D={size}, D={size}] for a diagonal mass matrix; pass "
            "dense=True, or its diagonal"
        )
    if not bool(torch.isfinite(matrix).all()):
        raise DataError("inverse_mass: expected finite numbers, got NaN or infinity")
    if matrix.ndim == 1:
        if bool((matrix <= 0).any()):
            raise DataError(f"inverse_mass: expected variances > 0, got {float(matrix.min()):g}")
        return torch.diag(matrix) if dense else matrix
    if not torch.allclose(matrix, matrix.T, rtol=1e-6, atol=0.0):
        raise DataError("inverse_mass: expected a symmetric matrix; symmetrise it")
    if int(torch.linalg.cholesky_ex(matrix).info) != 0:
        raise DataError("inverse_mass: expected a positive definite matrix; add to its diagonal")
    return matrix
