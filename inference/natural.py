"""Natural-gradient steps of a Gaussian guide: closed-form updates in its mean and precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["antithetic", "expected_derivatives", "natural_step"]


def antithetic(n: int, like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw standard normals [m, D] in pairs z, -z; m is ``n``, made even."""
    half = -(-n // 2)
    noise = torch.randn(
        half, *like.shape, generator=generator, dtype=like.dtype, device=generator.device
    ).to(like.device)
    return torch.cat([noise, -noise])


def expected_derivatives(
    log_density: Callable[[Tensor], Tensor], draws: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Average the derivatives of a log density over draws.

    By the theorems of Bonnet and Price they are the gradients of the expectation with respect to
    the mean, and twice that with respect to the covariance, of the Gaussian that was drawn from.

    Args:
        log_density: Maps [n, D] to [n].
        draws: [n, D].

    Returns:
        The log densities [n], the mean gradient [D] and the mean Hessian [D, D].
    """
    with torch.enable_grad():
        points = draws.detach().requires_grad_()
        values = log_density(points)
        (slope,) = torch.autograd.grad(values.sum(), points, create_graph=True)
        rows = []
        for column in slope.unbind(-1):
            if column.requires_grad:
                (row,) = torch.autograd.grad(
                    column.sum(), points, retain_graph=True, allow_unused=True
                )
            else:
                row = None  # The density is linear in this entry.
            rows.append(torch.zeros_like(points) if row is None else row)
    curvature = torch.stack(rows, 1).detach().mean(0)
    return values.detach(), slope.detach().mean(0), 0.5 * (curvature + curvature.mT)


def natural_step(
    loc: Tensor, factor: Tensor, gradient: Tensor, curvature: Tensor, rate: float
) -> tuple[Tensor, Tensor]:
    """Take one natural-gradient step of the evidence lower bound (Khan and Rue 2023, section 4.2).

    precision <- (1 - rate) precision - rate E[Hessian], then
    loc <- loc + rate precision^(-1) E[gradient]. On a normal log density with ``rate=1`` this is
    the posterior in one step. Where the new precision is not positive definite (log densities that
    are not concave), a term of second order keeps it so (Lin, Schmidt and Khan 2020, equation 13).

    Args:
        loc: Mean [D].
        factor: Cholesky factor [D, D] of the covariance.
        gradient: Expected gradient of the log density [D].
        curvature: Expected Hessian [D, D].
        rate: Step length in (0, 1].

    Returns:
        The new mean and factor.
    """
    precision = torch.cholesky_inverse(factor)
    change = -curvature - precision
    root, info = torch.linalg.cholesky_ex(precision + rate * change)
    if int(info) > 0 or not bool(torch.isfinite(root).all()):
        half = change @ factor  # change precision^(-1) change = half half^T
        second = 0.5 * rate**2 * half @ half.mT
        root = torch.linalg.cholesky(precision + rate * change + second)
    covariance = torch.cholesky_inverse(root)
    loc = loc + rate * covariance @ gradient
    return loc, torch.linalg.cholesky(0.5 * (covariance + covariance.mT))
