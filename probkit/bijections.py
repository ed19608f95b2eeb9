"""Bijections from the reals to the supports of sites, with Jacobians.

Those that torch registers (``torch.distributions.biject_to``), and the two that it lacks: Cholesky
factors and positive definite matrices.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import IndependentTransform, Transform

from probkit.errors import CapabilityError

__all__ = ["LowerCholeskyBijection", "PositiveDefiniteBijection", "bijection"]


def bijection(support: Constraint) -> Transform:
    """Return a bijection from (a box of) the reals to ``support``.

    Raises:
        CapabilityError: None is known; discrete supports have none.

    Example:
        >>> bijection(constraints.positive)(torch.tensor(0.0))
        tensor(1.)
    """
    if isinstance(support, constraints.independent):
        inner = bijection(support.base_constraint)
        return IndependentTransform(inner, support.reinterpreted_batch_ndims)
    if isinstance(support, type(constraints.lower_cholesky)):
        return LowerCholeskyBijection()
    if isinstance(support, type(constraints.positive_definite)):
        return PositiveDefiniteBijection()
    try:
        return biject_to(support)
    except (NotImplementedError, KeyError, AttributeError, TypeError) as error:
        raise CapabilityError(
            f"no bijection to the reals is known for the support {support}; use one of real, "
            "positive, interval, simplex, corr_cholesky, lower_cholesky, positive_definite"
        ) from error


class LowerCholeskyBijection(Transform):
    """Vector [*, D (D + 1) / 2] -> lower triangular matrix [*, D, D] with a positive diagonal.

    The vector holds the lower triangle row by row, the diagonal as logarithms.
    """

    domain = constraints.real_vector
    codomain: Constraint = constraints.lower_cholesky
    bijective = True

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    __hash__ = Transform.__hash__

    def _call(self, x: Tensor) -> Tensor:
        place, below, diagonal = _triangle(_order(x.shape[-1]), x.device)
        return x[..., place] * below.to(x.dtype) + torch.diag_embed(x[..., diagonal].exp())

    def _inverse(self, y: Tensor) -> Tensor:
        row, column = torch.tril_indices(y.shape[-1], y.shape[-1], device=y.device)
        logs = torch.diag_embed(y.diagonal(dim1=-2, dim2=-1).log())
        return (y.tril(-1) + logs)[..., row, column]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log |d lower triangle / d vector|: the sum of the logarithms on the diagonal."""
        return y.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def forward_shape(self, shape: Any) -> torch.Size:
        """Shape of the matrix."""
        order = _order(shape[-1])
        return torch.Size((*shape[:-1], order, order))

    def inverse_shape(self, shape: Any) -> torch.Size:
        """Shape of the vector."""
        return torch.Size((*shape[:-2], shape[-1] * (shape[-1] + 1) // 2))


class PositiveDefiniteBijection(LowerCholeskyBijection):
    """Vector [*, D (D + 1) / 2] -> L L^T [*, D, D], L as :class:`LowerCholeskyBijection` has it.

    The Jacobian is that of the lower triangle, the measure in which Wishart densities are stated.
    """

    codomain: Constraint = constraints.positive_definite

    def _call(self, x: Tensor) -> Tensor:
        factor = super()._call(x)
        return factor @ factor.mT

    def _inverse(self, y: Tensor) -> Tensor:
        return super()._inverse(torch.linalg.cholesky(y))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log of 2^D prod_i L_ii^(D + 1 - i), times that of the factor; i from 1."""
        order = y.shape[-1]
        logs = x[..., _triangle(order, x.device)[2]]
        powers = torch.arange(order, 0, -1, dtype=x.dtype, device=x.device)
        return order * math.log(2.0) + (logs * (powers + 1)).sum(-1)


def _order(length: int) -> int:
    """Order D of the matrix whose triangle has ``length`` = D (D + 1) / 2 entries."""
    return (math.isqrt(8 * length + 1) - 1) // 2


def _triangle(order: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return where in the vector each entry lies [D, D], which lie below [D, D], diagonal [D]."""
    row = torch.arange(order, device=device)
    start = row * (row + 1) // 2
    below = row[:, None] > row
    place = torch.where(below, start[:, None] + row, 0)
    return place, below, start + row
