"""Emission densities of switching autoregressions, and the moments that update them.

Regressors and values are stacked, z_t = (x_t, y_t). With S_k = C_k C_k^T, the whitened residuals of
all states are one matrix product, [-C_k^-1 W_k, C_k^-1] z_t.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from probkit.models.arphmm.lagged import Lagged
from probkit.numerics import safe_cholesky

__all__ = ["log_densities", "log_emission", "second_moments", "whitener"]

_ROWS = 1024  # rows of a block: residuals, and products with weights, stay in the cache


def whitener(weights: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return [-C^-1 W, C^-1] [*batch, K, D, P + D] and log det C [*batch, K], S = C C^T.

    Args:
        weights: [*batch, K, D, P].
        covariance: [*batch, K, D, D].
    """
    factor, _ = safe_cholesky(covariance)
    features = factor.shape[-1]
    eye = torch.eye(features, dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False)
    log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return torch.cat([-inverse @ weights, inverse], -1), log_det


def log_densities(design: Tensor, weights: Tensor, covariance: Tensor) -> Tensor:
    """Log N(y_t; W_k x_t, S_k) of every row and state.

    Args:
        design: Rows (x_t, y_t) [*rows, P + D], shared by all parameters.
        weights: [*batch, K, D, P].
        covariance: [*batch, K, D, D].

    Returns:
        [*batch, *rows, K].
    """
    matrix, log_det = whitener(weights, covariance)
    *batch, states, features, width = matrix.shape
    flat = design.reshape(-1, width).to(matrix.dtype)
    rows = matrix.reshape(-1, width).mT.contiguous()
    squares = torch.cat(
        [
            (block @ rows).square().reshape(len(block), -1, features).sum(-1)
            for block in flat.split(_ROWS)
        ]
    )
    constant = log_det.reshape(-1) + 0.5 * features * math.log(2.0 * math.pi)
    result = (-0.5 * squares - constant).reshape(len(flat), -1, states)
    return result.movedim(1, 0).reshape(*batch, *design.shape[:-1], states)


def log_emission(data: Lagged, weights: Tensor, covariance: Tensor) -> Tensor:
    """Log emission terms [*batch, N, T, K]: densities, plus log plausibilities.

    A step with a missing value or lag has density one: only its plausibility counts.
    """
    densities = log_densities(data.design, weights, covariance)
    if not data.complete:
        densities = torch.where(data.usable[..., None], densities, 0.0)
    if data.log_plausibility is None:
        return densities
    return densities + data.log_plausibility


def second_moments(data: Lagged, responsibility: Tensor) -> Tensor:
    """Weighted sums of z_t z_t^T over all usable steps of all sequences.

    Args:
        data: The rows.
        responsibility: p(z_t = k | y) [*batch, N, T, K]; zero on padding.

    Returns:
        [*batch, K, P + D, P + D].
    """
    *batch, n, steps, states = responsibility.shape
    width = data.design.shape[-1]
    rows = data.design.reshape(-1, width)
    weight = responsibility
    if not data.complete:
        weight = torch.where(data.usable[..., None], weight, 0.0)
    weight = weight.reshape(-1, n * steps, states).movedim(0, 1).reshape(n * steps, -1)
    total = rows.new_zeros(width, weight.shape[1] * width)
    for z, w in zip(rows.split(_ROWS), weight.split(_ROWS), strict=True):
        total = total.addmm(z.mT, (w[:, :, None] * z[:, None, :]).reshape(len(z), -1))
    return total.reshape(width, *batch, states, width).movedim(0, -2)
