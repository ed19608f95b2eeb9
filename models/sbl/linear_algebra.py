"""Cholesky factors of Hermitian matrices, real or complex."""

from __future__ import annotations

import torch
from torch import Tensor

from probkit.numerics import safe_cholesky

__all__ = ["hermitian_cholesky", "log_det_of_factor", "solve_with_factor"]


def hermitian_cholesky(matrix: Tensor) -> Tensor:
    """Lower factor L of Hermitian positive definite matrices [*batch, n, n], A = L L^H.

    A matrix that fails gets jitter: the ladder of :func:`~probkit.numerics.safe_cholesky`, climbed
    by the real form [[Re, -Im], [Im, Re]], whose eigenvalues are those of A, twice.
    """
    if not matrix.is_complex():
        return safe_cholesky(matrix)[0]
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool((info > 0).any()):
        return factor
    top = torch.cat([matrix.real, -matrix.imag], -1)
    bottom = torch.cat([matrix.imag, matrix.real], -1)
    _, jitter = safe_cholesky(torch.cat([top, bottom], -2).detach())
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.cholesky(matrix + jitter[..., None, None] * eye)


def log_det_of_factor(factor: Tensor) -> Tensor:
    """Return log |L L^H| [*batch]."""
    return 2 * factor.diagonal(dim1=-2, dim2=-1).real.log().sum(-1)


def solve_with_factor(factor: Tensor, right: Tensor) -> Tensor:
    """(L L^H)^{-1} right, for right [*batch, n, k]."""
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mH, half, upper=True)
