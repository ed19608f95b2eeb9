"""The E-step of plain sparse Bayesian learning: M x M or N x N, whichever is smaller.

x_j ~ (C)N(0, g_j), y = H x + n, n ~ (C)N(0, s2). Both forms return the same moments; each costs one
Cholesky factor. Shapes lead with [*batch]; every snapshot (column of data that shares g) has its
own weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from probkit.models.sbl.linear_algebra import (
    hermitian_cholesky,
    log_det_of_factor,
    solve_with_factor,
)
from probkit.models.sbl.moments import Moments, abs_square, gaussian_log_evidence

__all__ = ["data_form_moments", "dense_moments", "weight_form_moments"]


def dense_moments(dictionary: Tensor, variance: Tensor, noise_var: Tensor, y: Tensor) -> Moments:
    """Posterior moments of the weights, and the evidence.

    Args:
        dictionary: H [*batch, M, N].
        variance: g [*batch, N] >= 0; zero entries are pruned weights.
        noise_var: s2 [*batch] > 0.
        y: [*batch, snapshot, M].

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> moments = dense_moments(one[:, None], one, one[0], 2 * one[:, None])
        >>> round(moments.mean.item(), 6), round(moments.variance.item(), 6)
        (1.0, 0.5)
    """
    rows, columns = dictionary.shape[-2:]
    form = data_form_moments if rows <= columns else weight_form_moments
    return form(dictionary, variance, noise_var, y)


def data_form_moments(
    dictionary: Tensor, variance: Tensor, noise_var: Tensor, y: Tensor
) -> Moments:
    """The M x M form: one factor of C = s2 I + H diag(g) H^H."""
    rows = dictionary.shape[-2]
    scaled = dictionary * variance.unsqueeze(-2)
    covariance = scaled @ dictionary.mH
    covariance = covariance + torch.diag_embed(
        noise_var.unsqueeze(-1).expand(covariance.shape[:-1])
    )
    factor = hermitian_cholesky(covariance)
    half = torch.linalg.solve_triangular(factor, y.mT, upper=False)
    solved = torch.linalg.solve_triangular(factor.mH, half, upper=True)  # C^{-1} y, a column each
    leverage = abs_square(torch.linalg.solve_triangular(factor, dictionary, upper=False)).sum(-2)
    projection = (dictionary.mH @ solved).mT
    shrink = variance * leverage
    return Moments(
        mean=projection * variance.unsqueeze(-2),
        variance=(variance * (1 - shrink)).clamp_min(0),
        projection=projection,
        leverage=leverage,
        residual=noise_var.square() * abs_square(solved).sum((-2, -1)),
        freedom=shrink.sum(-1),
        log_evidence=gaussian_log_evidence(
            log_det_of_factor(factor),
            abs_square(half).sum((-2, -1)),
            rows,
            y.shape[-2],
            is_complex=y.is_complex(),
        ),
    )


def weight_form_moments(
    dictionary: Tensor, variance: Tensor, noise_var: Tensor, y: Tensor
) -> Moments:
    """The N x N form: one factor of A = s2 I + G^{1/2} H^H H G^{1/2}.

    Sigma = s2 G^{1/2} A^{-1} G^{1/2}: no division by g, which may be zero.
    """
    rows, columns = dictionary.shape[-2:]
    root = variance.sqrt()
    gram = dictionary.mH @ dictionary
    noise = noise_var.unsqueeze(-1)
    inner = root.unsqueeze(-1) * gram * root.unsqueeze(-2)
    inner = inner + torch.diag_embed(noise.expand(inner.shape[:-1]))
    factor = hermitian_cholesky(inner)
    correlation = dictionary.mH @ y.mT
    mean = root.unsqueeze(-1) * solve_with_factor(factor, root.unsqueeze(-1) * correlation)
    error = y.mT - dictionary @ mean
    eye = torch.eye(columns, dtype=factor.dtype, device=factor.device).expand(factor.shape)
    unshrunk = noise * abs_square(torch.linalg.solve_triangular(factor, eye, upper=False)).sum(-2)
    # The leverage of a pruned weight needs its whole column; of others it is (1 - unshrunk) / g.
    half = torch.linalg.solve_triangular(factor, root.unsqueeze(-1) * gram, upper=False)
    direct = (gram.diagonal(dim1=-2, dim2=-1).real - abs_square(half).sum(-2)) / noise
    active = variance > 0
    leverage = torch.where(active, (1 - unshrunk) / torch.where(active, variance, 1.0), direct)
    quadratic = abs_square(error).sum((-2, -1)) / noise_var + (
        torch.where(active, 1 / torch.where(active, variance, 1.0), 0.0) * abs_square(mean).sum(-1)
    ).sum(-1)
    log_det = log_det_of_factor(factor) + (rows - columns) * noise_var.log()
    return Moments(
        mean=mean.mT,
        variance=variance * unshrunk,
        projection=(dictionary.mH @ error).mT / noise.unsqueeze(-1),
        leverage=leverage.clamp_min(0),
        residual=abs_square(error).sum((-2, -1)),
        freedom=(1 - unshrunk).sum(-1),
        log_evidence=gaussian_log_evidence(
            log_det, quadratic, rows, y.shape[-2], is_complex=y.is_complex()
        ),
    )
