"""Predictions of Bayesian neural networks: mixtures over draws, and linearised Gaussians."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MultivariateNormal,
    Normal,
)

from probkit import distributions as D
from probkit.numerics import safe_cholesky
from probkit.predictive import Analytic, Empirical, Mixture, Predictive

__all__ = [
    "add_noise",
    "gaussian",
    "mixture_of_categoricals",
    "mixture_of_functions",
    "mixture_of_normals",
    "sample_gaussian",
]

_JITTER = 1e-8


def mixture_of_functions(f: Tensor, log_weights: Tensor | None) -> Predictive:
    """Return draws of the network's output [draw, *obs] as they are."""
    return Empirical(f, log_weights)


def mixture_of_normals(
    f: Tensor, sd: Tensor, log_weights: Tensor | None, *, joint: int
) -> Predictive:
    """Return the law of new observations given draws of the network and of the noise.

    Args:
        f: [draw, *obs].
        sd: Noise standard deviation, broadcast against ``f``.
        log_weights: [draw]; None for equal weights.
        joint: How many trailing dims of [*obs] share their draw.
    """
    return _mixture(Normal(f, sd.expand_as(f), validate_args=False), f, log_weights, joint)


def mixture_of_categoricals(
    logits: Tensor, log_weights: Tensor | None, *, joint: int
) -> Predictive:
    """Return the law of new labels given draws of the logits [draw, *obs, class]."""
    laws = Categorical(logits=logits, validate_args=False)
    return _mixture(laws, logits, log_weights, joint)


def _mixture(
    components: Distribution, like: Tensor, log_weights: Tensor | None, joint: int
) -> Predictive:
    if joint:
        components = Independent(components, joint, validate_args=False)
    return Mixture(components, like.new_zeros(len(like)) if log_weights is None else log_weights)


def add_noise(covariance: Tensor, variance: Tensor, *, joint: bool) -> Tensor:
    """Add the noise variance [component, output] to covariances of outputs.

    Args:
        covariance: [component, *lead, row, output, output], or [component, *lead, row * output,
            row * output] when ``joint``.
        variance: [component, output].
        joint: Which of the two it is.
    """
    repeats = covariance.shape[-1] // variance.shape[-1] if joint else 1
    diagonal = variance.repeat(1, repeats)
    between = (1,) * (covariance.ndim - 3)
    return covariance + torch.diag_embed(diagonal.reshape(len(diagonal), *between, -1))


def gaussian(mean: Tensor, covariance: Tensor, *, joint: bool, squeeze: bool) -> Predictive:
    """Return normal laws, one for each component, as one predictive.

    Args:
        mean: [component, *lead, row, output].
        covariance: As for :func:`add_noise`.
        joint: Whether the covariance is between rows.
        squeeze: Whether the single output has no dim of its own.
    """
    law: Distribution
    if not joint:
        sd = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).sqrt()
        if squeeze:
            mean, sd = mean.squeeze(-1), sd.squeeze(-1)
        law = Normal(mean, sd, validate_args=False)
    else:
        factor = _root(covariance)
        if squeeze:
            law = MultivariateNormal(mean.squeeze(-1), scale_tril=factor, validate_args=False)
        else:
            law = D.JointNormal(mean, factor, validate_args=False)
    if len(mean) > 1:
        return Mixture(law, mean.new_zeros(len(mean)))
    return Analytic(D.map_batch(law, lambda value: value.squeeze(0)))


def _root(covariance: Tensor) -> Tensor:
    """Factorise covariances [*batch, n, n] of outputs, which are singular by nature.

    A network has fewer weights than rows at some point, and equal rows have equal outputs. So
    1e-8 of the mean variance is added to every diagonal, as much as rounding calls for.
    """
    jitter = _JITTER * covariance.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    if covariance.dtype == torch.float32:
        jitter = 1e3 * jitter
    full = covariance + torch.diag_embed(jitter.expand(covariance.shape[:-1]))
    return safe_cholesky(full)[0]


def sample_gaussian(
    mean: Tensor, covariance: Tensor, n: int, *, joint: bool, rng: torch.Generator
) -> Tensor:
    """Draw outputs [n, *lead, row, output], in equal shares from the components.

    Args:
        mean: [component, *lead, row, output].
        covariance: As for :func:`add_noise`.
        n: Number of draws.
        joint: Whether the covariance is between rows.
        rng: Generator.
    """
    factor = _root(covariance)
    flat = mean.flatten(-2) if joint else mean
    shape = (n, *flat.shape[1:])
    noise = torch.randn(shape, generator=rng, dtype=mean.dtype, device=rng.device).to(mean)
    owner = torch.arange(n, device=mean.device) % len(mean)
    draws = flat[owner] + (factor[owner] @ noise[..., None]).squeeze(-1)
    return draws.reshape(n, *mean.shape[1:])
