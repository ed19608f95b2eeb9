"""The univariate Student-t law: density, distribution function and quantiles."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pyro.distributions
import scipy.special
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from probkit.distributions._roots import apply_scipy, implicit_derivative
from probkit.errors import NumericsWarning
from probkit.numerics import lgamma_difference

__all__ = [
    "StudentT",
    "spread_factor",
    "student_log_prob",
    "student_t_cdf",
    "student_t_icdf",
]


def spread_factor(df: Tensor) -> Tensor:
    """Ratio df / (df - 2), infinite (with a warning) where df <= 2."""
    if bool((df <= 2).any()):
        warnings.warn(
            f"the variance of a Student-t law is infinite for df <= 2, got df={float(df.min()):.4g}"
            "; use quantiles, or a scale law with alpha > 1",
            NumericsWarning,
            stacklevel=4,
        )
    return torch.where(df > 2, df / torch.where(df > 2, df - 2, 1.0), torch.inf)


def student_log_prob(df: Tensor, n: int, squared_distance: Tensor, half_log_det: Tensor) -> Tensor:
    """Log density of an n-dimensional t law from its Mahalanobis distance and log determinant."""
    return (
        lgamma_difference(df / 2, n / 2)
        - 0.5 * n * (torch.log(df) + math.log(math.pi))
        - half_log_det
        - 0.5 * (df + n) * torch.log1p(squared_distance / df)
    )


class StudentT(pyro.distributions.StudentT):
    """Student's t law, accurate at any df, with ``cdf`` and ``icdf``.

    Torch's own class loses digits in ``log_prob`` for large df and has neither ``cdf`` nor
    ``icdf``.

    Args:
        df: Degrees of freedom > 0 [*batch].
        loc: Location [*batch].
        scale: Scale > 0 [*batch].

    Example:
        >>> import torch
        >>> nu = torch.tensor(4.0, dtype=torch.float64)
        >>> round(StudentT(nu).cdf(torch.zeros(()).double()).item(), 6)
        0.5
    """

    @property
    def variance(self) -> Tensor:
        """scale^2 df / (df - 2); infinite, with a NumericsWarning, where df <= 2."""
        return self.scale.square() * spread_factor(self.df)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density at ``value`` [*sample, *batch, *event]."""
        if self._validate_args:
            self._validate_sample(value)
        z = (value - self.loc) / self.scale
        return student_log_prob(self.df, 1, z.square(), torch.log(self.scale))

    def cdf(self, value: Tensor) -> Tensor:
        """Return the distribution function at ``value``."""
        return student_t_cdf(self.df, (value - self.loc) / self.scale)

    def icdf(self, value: Tensor) -> Tensor:
        """Quantile; gradients flow to loc and scale (and to df through the implicit function)."""
        return self.loc + self.scale * student_t_icdf(self.df, value)


class _StudentTCdf(torch.autograd.Function):
    """F(t; df) with the density as derivative in t and a five-point difference in df."""

    @staticmethod
    def forward(ctx: Any, df: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(df, t)
        return apply_scipy(scipy.special.stdtr, df, t)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        df, t = ctx.saved_tensors
        grad_df = grad_t = None
        if ctx.needs_input_grad[1]:
            zero = torch.zeros_like(df)
            grad_t = grad * student_log_prob(df, 1, t.square(), zero).exp()
        if ctx.needs_input_grad[0]:
            # torch has no derivative of the incomplete beta function in its parameters; the
            # error of this stencil is below 1e-10 relative to the density.
            h = 1e-3
            points = (-2.0, 1 / 12), (-1.0, -2 / 3), (1.0, 2 / 3), (2.0, -1 / 12)
            slope = sum(
                w * apply_scipy(scipy.special.stdtr, df * (1 + k * h), t) for k, w in points
            )
            grad_df = grad * slope / (h * df)
        return grad_df, grad_t


def student_t_cdf(df: Tensor, t: Tensor) -> Tensor:
    """Distribution function of the standard Student-t law, differentiable in both arguments.

    Args:
        df: Degrees of freedom > 0.
        t: Points, broadcast with ``df``.

    Returns:
        Probabilities of the broadcast shape.

    Example:
        >>> import torch
        >>> student_t_cdf(torch.tensor(1.0).double(), torch.tensor(1.0).double()).item()
        0.75
    """
    df, t = torch.broadcast_tensors(df, t)
    result: Tensor = _StudentTCdf.apply(df, t)
    return result


def student_t_icdf(df: Tensor, q: Tensor) -> Tensor:
    """Quantile of the standard law, differentiable by the implicit function theorem."""
    df, q = torch.broadcast_tensors(df, q)
    t = apply_scipy(scipy.special.stdtrit, df.detach(), q.detach())
    # SciPy maps 0 and 1 to finite or infinite values depending on the version.
    t = torch.where(q <= 0, -torch.inf, torch.where(q >= 1, torch.inf, t))
    if not (df.requires_grad or q.requires_grad):
        return t
    density = student_log_prob(df.detach(), 1, t.square(), torch.zeros_like(t)).exp()
    return implicit_derivative(t, student_t_cdf(df, t) - q, density)
