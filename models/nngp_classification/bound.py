"""The evidence lower bound of a sparse scale mixture, as pure functions.

Inducing values u_c = f_c(Z) of class c have the prior N(0, sigma^2 K) with K = K_zz + jitter, and
the variational law N(mu_c, sigma^2 S_c), both given the shared sigma^2. With L L' = K they are
written in whitened coordinates, u_c = L v_c: m_c = L^-1 mu_c and R_c R_c' = L^-1 S_c L^-T. Then
(Lee, Yun, Yang and Lee, ICLR 2022, appendix on classification)

    f_c(x) | sigma^2 ~ N(W' m_c, sigma^2 (k(x, x) - W'W + W' R_c R_c' W)),   W = L^-1 k(Z, x),

and KL(q(u | sigma^2) || p(u | sigma^2)), averaged over q(sigma^2), needs of it E[1 / sigma^2] only.

Shapes: M inducing values, C classes, B rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import gpytorch
import torch
from torch import Tensor

from probkit.kernels import functional
from probkit.numerics import safe_cholesky

__all__ = [
    "Projection",
    "Whitened",
    "gaussian_divergence",
    "inducing_factor",
    "marginals",
    "project",
]


@dataclass(frozen=True)
class Whitened:
    """Normal laws of the whitened inducing values of every class, for sigma^2 = 1.

    Attributes:
        mean: m [class, inducing].
        factor: Lower factor R of the covariance [class, inducing, inducing], or standard
            deviations [class, inducing].
    """

    mean: Tensor
    factor: Tensor

    @property
    def is_diagonal(self) -> bool:
        """Whether the whitened values are independent."""
        return self.factor.ndim == 2


@dataclass(frozen=True)
class Projection:
    """How function values at some rows hang on the whitened inducing values.

    Attributes:
        weights: W = L^-1 k(Z, x) [inducing, row].
        residual: Variance that is left given the inducing values [row], for sigma^2 = 1.
    """

    weights: Tensor
    residual: Tensor


def inducing_factor(
    kernel: gpytorch.kernels.Kernel,
    inducing: Tensor,
    jitter: float,
    params: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Factorise the prior covariance of the inducing values.

    Args:
        kernel: Covariance for sigma^2 = 1.
        inducing: Inducing inputs Z [inducing, feature].
        jitter: Added to the diagonal, in units of its mean; part of the prior everywhere.
        params: Kernel hyper-parameters in place of the kernel's own.

    Returns:
        The lower factor L [inducing, inducing].
    """
    gram = functional.evaluate(kernel, inducing, params=params)
    unit = jitter * gram.diagonal().mean()
    factor, _ = safe_cholesky(gram + unit * torch.eye(len(gram), dtype=gram.dtype).to(gram))
    return factor


def project(
    kernel: gpytorch.kernels.Kernel,
    factor: Tensor,
    inducing: Tensor,
    x: Tensor,
    params: Mapping[str, Tensor] | None = None,
) -> Projection:
    """Express function values at ``x`` [row, feature] by whitened inducing values."""
    cross = functional.evaluate(kernel, inducing, x, params=params)
    prior = functional.evaluate(kernel, x, params=params, diag=True)
    weights = torch.linalg.solve_triangular(factor, cross, upper=False)
    left = prior - weights.square().sum(0)
    return Projection(weights, torch.maximum(left, torch.finfo(left.dtype).eps * prior))


def marginals(projection: Projection, law: Whitened) -> tuple[Tensor, Tensor]:
    """Return mean and variance [row, class] of the function values, for sigma^2 = 1.

    Given sigma^2 the mean stays and the variance is multiplied by it. No covariance between rows is
    formed.
    """
    mean = (law.mean @ projection.weights).mT
    if law.is_diagonal:
        spread = law.factor.square() @ projection.weights.square()
    else:
        spread = (law.factor.mT @ projection.weights).square().sum(-2)
    return mean, (projection.residual + spread).mT


def gaussian_divergence(law: Whitened, expected_precision: Tensor) -> Tensor:
    """Return E_q(sigma^2)[KL(q(u | sigma^2) || p(u | sigma^2))], a scalar.

    1/2 [ -sum_c ln|R_c R_c'| - M C + sum_c tr(R_c R_c') + E[1/sigma^2] sum_c m_c' m_c ]; the trace
    term carries no sigma^2, since both laws scale with it.

    Args:
        law: The variational law.
        expected_precision: E[1 / sigma^2] under q.

    Example:
        >>> one = torch.ones(2, 3)
        >>> gaussian_divergence(Whitened(0 * one, one), torch.tensor(5.0)).item()
        0.0
    """
    if law.is_diagonal:
        log_det = 2 * law.factor.abs().log().sum()
    else:
        log_det = 2 * law.factor.diagonal(dim1=-2, dim2=-1).abs().log().sum()
    trace = law.factor.square().sum()
    return 0.5 * (trace - log_det - law.mean.numel() + expected_precision * law.mean.square().sum())
