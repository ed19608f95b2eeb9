"""Closed-form updates of switching autoregressions: maxima and conjugate posteriors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probkit.errors import DataError
from probkit.models.arphmm.prior import SwitchingPrior
from probkit.models.arphmm.supports import Covariance
from probkit.numerics import safe_cholesky

__all__ = [
    "Regression",
    "draw_regimes",
    "draw_rows",
    "maximise_regimes",
    "maximise_rows",
    "regression",
]


class Regression(NamedTuple):
    """Weighted regression of each state, its prior included.

    Attributes:
        mean: Weights W_k [*batch, K, D, P] at the maximum.
        precision: Sxx + V0 [*batch, K, P, P], the precision of a row of W_k in units of S_k.
        scatter: Residual scatter at ``mean`` plus (W - M0) V0 (W - M0)^T [*batch, K, D, D].
        steps: Expected number of steps [*batch, K].
    """

    mean: Tensor
    precision: Tensor
    scatter: Tensor
    steps: Tensor


def regression(moments: Tensor, regressors: int, prior: SwitchingPrior | None) -> Regression:
    """Solve the weighted regressions of all states.

    Args:
        moments: Sums of z z^T [*batch, K, P + D, P + D], z = (x, y), x_0 = 1.
        regressors: P.
        prior: Its ridge and mean; None for least squares.

    Raises:
        DataError: Without a prior, the regressors of a state are linearly dependent.
    """
    xx = moments[..., :regressors, :regressors]
    xy = moments[..., :regressors, regressors:]
    count = moments[..., 0, 0]
    features = moments.shape[-1] - regressors
    ridge, mean = 0.0, moments.new_zeros(features, regressors)
    if prior is not None:
        ridge = prior.ridge
        mean = prior.matrices(features, regressors, moments)[0]
    eye = torch.eye(regressors, dtype=moments.dtype, device=moments.device)
    precision = xx + ridge * eye
    factor, info = torch.linalg.cholesky_ex(precision)
    # Sums of squares whose factor has lost all its digits are as good as singular.
    weak = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    largest = precision.diagonal(dim1=-2, dim2=-1).amax(-1)
    info = info.bool() | (weak < 1e2 * torch.finfo(weak.dtype).eps * largest)
    if bool(info.any()):
        raise DataError(
            f"state {int(info.nonzero()[0, -1])} has linearly dependent regressors (too few steps, "
            "or a constant column); give the model a prior, fewer states or a lower order"
        )
    weights = torch.cholesky_solve(xy + ridge * mean.mT, factor).mT
    eye_d = torch.eye(features, dtype=moments.dtype, device=moments.device)
    reach = torch.cat([-weights, eye_d.expand(*weights.shape[:-1], features)], -1)
    shift = weights - mean
    scatter = reach @ moments @ reach.mT + ridge * shift @ shift.mT
    return Regression(weights, precision, 0.5 * (scatter + scatter.mT), count)


def maximise_regimes(
    moments: Tensor, regressors: int, prior: SwitchingPrior | None, kind: Covariance
) -> tuple[Tensor, Tensor]:
    """Return the weights and covariances that maximise the expected log joint.

    Args:
        moments: Sums of z z^T [*batch, K, P + D, P + D].
        regressors: P.
        prior: None for maximum likelihood.
        kind: Kind of covariance.

    Returns:
        Weights [*batch, K, D, P] and covariances [*batch, K, D, D].
    """
    fit = regression(moments, regressors, prior)
    states, features = fit.scatter.shape[-3], fit.scatter.shape[-1]
    scatter, count = fit.scatter, fit.steps
    if kind == "shared":
        scatter, count = scatter.sum(-3, keepdim=True), count.sum(-1, keepdim=True)
    if prior is not None:
        scale = prior.matrices(features, regressors, moments)[1]
        dof = prior.degrees(features)
        scatter = scatter + scale
        draws = states if kind == "shared" else 1  # weight matrices that share one covariance
        extra = dof - features + 3 if kind == "diag" else dof + features + 1
        count = count + draws * regressors + extra
    covariance = scatter / count[..., None, None]
    if kind == "diag":
        covariance = torch.diag_embed(covariance.diagonal(dim1=-2, dim2=-1))
    return fit.mean, covariance.expand(*fit.mean.shape[:-2], features, features)


def maximise_rows(counts: Tensor, concentration: Tensor | None, old: Tensor) -> Tensor:
    """Return the rows [*batch, row, entry] that maximise expected log probabilities.

    Rows that were never visited, and have no prior that says otherwise, stay as they are.

    Args:
        counts: Expected counts [*batch, row, entry].
        concentration: Dirichlet concentrations [row, entry]; None for maximum likelihood.
        old: The present rows.
    """
    if concentration is not None:
        counts = (counts + (concentration - 1.0).clamp_min(0.0) * (concentration > 0)).clamp_min(0)
    total = counts.sum(-1, keepdim=True)
    return torch.where(total > 0, counts / total.clamp_min(torch.finfo(counts.dtype).tiny), old)


def draw_regimes(
    moments: Tensor,
    regressors: int,
    prior: SwitchingPrior,
    kind: Covariance,
    *,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Draw weights [*batch, K, D, P] and covariances [*batch, K, D, D] given the states.

    The law is matrix-normal inverse-Wishart with dof + N_k degrees of freedom, scale
    Psi0 + scatter, mean and precision of :func:`regression`.

    Args:
        moments: Sums of z z^T [*batch, K, P + D, P + D]; zeros draw from the prior.
        regressors: P.
        prior: The prior.
        kind: Kind of covariance.
        rng: Stream.
    """
    fit = regression(moments, regressors, prior)
    features = fit.scatter.shape[-1]
    scale = prior.matrices(features, regressors, moments)[1]
    dof = prior.degrees(features)
    if kind == "shared":
        steps, scatter = fit.steps.sum(-1, keepdim=True), fit.scatter.sum(-3, keepdim=True)
        covariance = _inverse_wishart(dof + steps, scale + scatter, rng)
        covariance = covariance.expand(fit.scatter.shape)
    elif kind == "full":
        covariance = _inverse_wishart(dof + fit.steps, scale + fit.scatter, rng)
    else:
        rate = 0.5 * (scale + fit.scatter).diagonal(dim1=-2, dim2=-1)
        shape = 0.5 * (dof - features + 1 + fit.steps)[..., None].expand(rate.shape)
        covariance = torch.diag_embed(rate / torch._standard_gamma(shape.contiguous(), rng))
    left, _ = safe_cholesky(covariance)
    right = torch.linalg.cholesky(fit.precision)
    noise = torch.randn(fit.mean.shape, generator=rng, dtype=moments.dtype, device=moments.device)
    # precision = R R^T, so the rows of noise R^-1 have covariance precision^-1.
    spread = torch.linalg.solve_triangular(right, noise, upper=False, left=False)
    return fit.mean + left @ spread, covariance


def draw_rows(concentration: Tensor, *, rng: torch.Generator) -> Tensor:
    """Draw Dirichlet rows [*row, entry]; entries of concentration zero stay zero."""
    part = concentration > 0
    gamma = torch._standard_gamma(torch.where(part, concentration, 1.0), rng)
    tiny = torch.finfo(gamma.dtype).tiny
    gamma = torch.where(part, gamma.clamp_min(tiny), 0.0)
    return gamma / gamma.sum(-1, keepdim=True)


def _inverse_wishart(dof: Tensor, scale: Tensor, rng: torch.Generator) -> Tensor:
    """Draw S ~ InverseWishart(dof, scale) [*, D, D], by Bartlett's decomposition of its inverse."""
    order = scale.shape[-1]
    index = torch.arange(order, dtype=scale.dtype, device=scale.device)
    shape = 0.5 * (dof[..., None] - index)
    diagonal = (2.0 * torch._standard_gamma(shape.contiguous(), rng)).sqrt()
    noise = torch.randn(scale.shape, generator=rng, dtype=scale.dtype, device=scale.device)
    lower = noise.tril(-1) + torch.diag_embed(diagonal)
    root = torch.linalg.cholesky(scale)
    # S = root lower^-T lower^-1 root^T
    half = torch.linalg.solve_triangular(lower, root.mT.contiguous(), upper=False)
    return half.mT @ half
