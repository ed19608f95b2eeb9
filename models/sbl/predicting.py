"""Predictions from the posterior law of the weights, without its covariance matrix."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution, MultivariateNormal

from probkit import distributions as D
from probkit.errors import CapabilityError
from probkit.models.sbl.kronecker_e_step import kronecker_spectrum
from probkit.models.sbl.laws import WeightLaw, elementwise_law
from probkit.models.sbl.linear_algebra import hermitian_cholesky
from probkit.models.sbl.mode_products import mode_products, outer
from probkit.models.sbl.moments import abs_square
from probkit.numerics import check_allocation, safe_cholesky
from probkit.predictive import Analytic, Mixture, Predictive

__all__ = ["predictive_of"]


def predictive_of(
    law: WeightLaw,
    new: Sequence[Tensor],
    *,
    observation: bool,
    joint: bool,
    log_weights: Tensor | None,
) -> Predictive:
    """Predict H_new x, plus noise where ``observation``.

    Args:
        law: Posterior of the weights, batch shape () or [chain, draw].
        new: One matrix [row, N], or as many factors [row_i, N_i] as the law has.
        observation: Whether the noise is part of it.
        joint: Joint law over rows.
        log_weights: [chain, draw] of the variances; None for equal ones.
    """
    mixed = law.batch_shape.numel() > 1
    if len(law.batch_shape):
        law = D.flatten_batch(law, len(law.batch_shape))
        law = law if mixed else D.select(law, 0)
    dist = _joint_law(law, new, observation) if joint else _separate_law(law, new, observation)
    if not mixed:
        return Analytic(dist)
    count = int(law.batch_shape[0])
    weights = torch.zeros(count, dtype=torch.float64) if log_weights is None else log_weights
    return Mixture(dist, weights.flatten())


def _mean(law: WeightLaw, new: Sequence[Tensor]) -> Tensor:
    """H_new E[x], [*batch, *problem, snapshot, *row]."""
    mean = law.internal_mean
    if len(new) == 1:
        mean = mean.flatten(-len(law.factors))
        return mean.to(_common(mean, new[0])) @ new[0].mT.to(_common(mean, new[0]))
    common = _common(mean, new[0])
    return mode_products(mean.to(common), [matrix.to(common).unsqueeze(-3) for matrix in new])


def _common(a: Tensor, b: Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, b.dtype)


def _separate_law(law: WeightLaw, new: Sequence[Tensor], observation: bool) -> Distribution:
    mean = _mean(law, new)
    if len(new) == 1:
        variance = _row_variance(law, new[0])
    elif law.observed is None:
        variance = _factored_variance(law, new)
    else:
        variance = _row_variance(law, _kronecker_product(new)).reshape(
            *mean.shape[: mean.ndim - 1 - len(new)], *mean.shape[mean.ndim - len(new) :]
        )
    noise = law.noise_var.reshape(law.noise_var.shape + (1,) * len(new))
    variance = variance + noise if observation else variance
    dim = mean.ndim - 1 - len(new)
    variance = variance.unsqueeze(dim).expand(mean.shape)
    if law.shared:
        return elementwise_law(mean.movedim(dim, -1), variance.movedim(dim, -1))
    return elementwise_law(mean.squeeze(dim), variance.squeeze(dim))


def _factored_variance(law: WeightLaw, new: Sequence[Tensor]) -> Tensor:
    """diag(H_new Sigma H_new^H) for factored H_new [*batch, *problem, *row].

    Sigma = G - G H^H C^{-1} H G, and both terms are Kronecker products around one diagonal.
    """
    spectrum = kronecker_spectrum(law.factors, law.variances, law.noise_var)
    prior, reduced = [], []
    for matrix, variance, crossed in zip(new, law.variances, spectrum.crossed, strict=True):
        scaled = matrix * variance.unsqueeze(-2)
        prior.append((abs_square(matrix) * variance.unsqueeze(-2)).sum(-1))
        common = _common(scaled, crossed)
        reduced.append(abs_square(scaled.to(common) @ crossed.to(common)))
    explained = mode_products(spectrum.values.reciprocal(), reduced)
    return (outer(prior) - explained).clamp_min(0)


def _cross(law: WeightLaw, new: Tensor) -> tuple[Tensor, Tensor]:
    """H_new G, and C^{-1/2} H G H_new^H [*, M, row]."""
    prior = outer(law.variances).flatten(-len(law.factors))
    scaled = new * prior.unsqueeze(-2)
    if len(law.factors) == 1:
        dictionary, variance = law.factors[0], law.variances[0]
        common = _common(scaled, dictionary)
        right = dictionary.to(common) @ scaled.to(common).mH
        covariance = (dictionary * variance.unsqueeze(-2)) @ dictionary.mH
        noise = law.noise_var.unsqueeze(-1).expand(covariance.shape[:-1])
        factor = hermitian_cholesky(covariance + torch.diag_embed(noise)).to(common)
        half = torch.linalg.solve_triangular(factor, right, upper=False)
        return scaled, half
    spectrum = kronecker_spectrum(law.factors, law.variances, law.noise_var)
    modes = len(law.factors)
    check_allocation(
        16 * scaled.shape[:-1].numel() * spectrum.values.shape[-modes:].numel(),
        f"the covariance of {new.shape[-2]} rows with the data",
        device=new.device,
    )
    rows = scaled.reshape(*scaled.shape[:-1], *law.sizes)
    common = _common(rows, spectrum.crossed[0])
    turned = mode_products(
        rows.to(common), [part.mT.to(common).unsqueeze(-3) for part in spectrum.crossed]
    )
    half = turned * spectrum.values.rsqrt().unsqueeze(-modes - 1)
    return scaled, half.flatten(-modes).mH


def _kronecker_product(matrices: Sequence[Tensor]) -> Tensor:
    """H_1 kron ... kron H_I in full, for a few rows."""
    size = math.prod(m.shape[-2] * m.shape[-1] for m in matrices)
    check_allocation(16 * size, f"a dictionary of {size} entries", device=matrices[0].device)
    common = functools.reduce(torch.promote_types, (m.dtype for m in matrices))
    return functools.reduce(torch.kron, [m.to(common) for m in matrices])


def _explained(law: WeightLaw, new: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prior terms and (row, row) factors a, b with H_new Sigma H_new^H = H_new G H_new^H - a^H b.

    Returns H_new G, a and b [*, data, row].
    """
    if law.observed is None:
        scaled, half = _cross(law, new)
        return scaled, half, half
    system = law.masked_covariance()
    prior = outer(law.variances).flatten(-len(law.factors))
    scaled = new * prior.unsqueeze(-2)
    rows = scaled.conj().reshape(*scaled.shape[:-1], *law.sizes)
    common = _common(rows, law.factors[0])
    right = system.forward(rows.to(common))
    solved = system.solve(right)
    modes = len(law.factors)
    return scaled, right.flatten(-modes).mT, solved.flatten(-modes).mT


def _row_variance(law: WeightLaw, new: Tensor) -> Tensor:
    """diag(H_new Sigma H_new^H) for a matrix H_new [row, N], [*batch, *problem, row]."""
    scaled, left, right = _explained(law, new)
    prior = (new.conj() * scaled).sum(-1).real
    return (prior - (left.conj() * right).sum(-2).real).clamp_min(0)


def _joint_law(law: WeightLaw, new: Sequence[Tensor], observation: bool) -> Distribution:
    if len(new) > 1:
        raise CapabilityError(
            "joint=True takes one matrix [row, N]; multiply the factors (torch.kron) where the "
            "rows are few"
        )
    mean = _mean(law, new)
    if mean.is_complex() or law.shared:
        raise CapabilityError(
            "joint=True is for real data with one snapshot; use post.sample(n, rng=0)"
        )
    scaled, left, right = _explained(law, new[0])
    check_allocation(
        8 * scaled.shape[:-1].numel() * new[0].shape[-2],
        f"a covariance of {new[0].shape[-2]} rows",
        device=scaled.device,
    )
    prior = scaled @ new[0].mT
    covariance = prior - left.mT @ right
    if observation:
        noise = law.noise_var.unsqueeze(-1).expand(covariance.shape[:-1])
        covariance = covariance + torch.diag_embed(noise)
    unit = prior.diagonal(dim1=-2, dim2=-1).mean(-1)
    factor, _ = safe_cholesky((covariance + covariance.mT) / 2, unit=unit)
    return MultivariateNormal(mean.squeeze(-2), scale_tril=factor, validate_args=False)
